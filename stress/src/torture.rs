//! A client process of level 3: bulk connections that call without pause, a probe on an interactive one, or both in one
//! event loop.
//!
//! Bulk requests go out as long as there are slots, each connection in its turn; after every single step of that the
//! loop looks whether a probe is due or answered. A probe's time runs from before its request is written until its
//! answer has been copied out and checked. Every byte of every answer is checked.

use crate::client::{Connect, Ready};
use crate::clock::{now_ns, sleep_until};
use crate::content::{self, Nonces, SIZE};
use crate::error::StressError;
use crate::floor::Pace;
use crate::latency::{Histogram, Latency};
use crate::load::{Outcome, Schedule, Silence};
use crate::machine;
use crate::processes::{self, Process, Role};
use crate::server::MASKED_ECHO;
use doorbell::{CallOptions, ClientConfig, ConnectionId, IpcClient, IpcError, Status, WaitPolicy};
use doorbell_shm::entry::codec;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;

/// Bytes of a bulk request and of its answer.
pub const BULK: usize = 4 << 10;
/// Bulk calls in flight at most: their slots are a third of the memory that server and clients may take.
const SLOTS: usize = 256;
/// From one probe to the next, by chance, so that probes keep no step with the load.
pub const PACE: Pace = Pace::Every(700_000);
/// The probe's tag; those of bulk calls are the numbers of their connections.
const PROBE: u64 = u64::MAX;

/// What one client process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TortureJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// Whether others run there too: then whoever finds nothing to do gives way.
    pub yields: bool,
    /// Bulk connections.
    pub bulk: usize,
    /// Whether there is a probe.
    pub probe: bool,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// What the process found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tortured {
    /// The probes of the window.
    pub probes: Latency,
    /// Bulk calls answered rightly in the window.
    pub bulk: u64,
    /// Bulk calls in flight at most.
    pub in_flight_most: usize,
    /// All answers, and the faults.
    pub faults: Outcome,
}

/// Starts a process. It says `()`; to [`Connect`] it says [`Ready`], to a [`Schedule`] what it [found](Tortured), and
/// stays connected until its standard input ends.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &TortureJob) -> Result<Process, StressError> {
    processes::spawn(Role::Torture, job, Stdio::piped())
}

/// The process itself.
///
/// # Errors
///
/// Whatever keeps it from opening its connections. What happens later is counted.
pub fn run(job: &TortureJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    processes::say(&())?;
    let Some(Connect { at_ns }) = processes::hear()? else { return Ok(()) };
    sleep_until(at_ns);
    let client = connect(job)?;
    let open = |bulk| client.open_with(codec::RAW, bulk).map(|connection| connection.detach());
    let bulk = (0..job.bulk).map(|_| open(true)).collect::<Result<Vec<_>, _>>();
    let bulk = bulk.map_err(StressError::ipc("opening a connection"))?;
    let probe = if job.probe { Some(open(false)) } else { None };
    let probe = probe.transpose().map_err(StressError::ipc("opening a connection"))?;
    processes::say(&Ready { at_ns: now_ns() })?;
    while let Some(schedule) = processes::hear::<Schedule>()? {
        let found = Torture::new(&client, &bulk, probe, job).run(&schedule);
        processes::say(&found)?;
    }
    Ok(())
}

fn connect(job: &TortureJob) -> Result<IpcClient, StressError> {
    let slots = job.bulk.min(SLOTS);
    // One entry and one slot beside those of bulk calls are the probe's.
    let base = ClientConfig::for_load(slots as u32 + 1, BULK);
    let config = ClientConfig { policy: WaitPolicy::Spin, lanes: 1, name: "torture".to_owned(), ..base };
    let config = ClientConfig { small_slots: 4, medium_slots: slots as u16, ..config };
    IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))
}

/// The probe between two looks.
#[derive(Debug, Clone, Copy)]
enum Probe {
    /// The next one begins then.
    Due(u64),
    /// Under way: its nonce, and since when.
    Sent(u64, u64),
}

struct Torture<'a> {
    client: &'a IpcClient,
    connections: &'a [ConnectionId],
    yields: bool,
    nonces: Nonces,
    /// The nonce of each connection's call in flight, 0 for none.
    calls: Vec<u64>,
    /// Connections whose turn it is.
    ready: VecDeque<u32>,
    in_flight: usize,
    probing: Option<ConnectionId>,
    probe: Probe,
    histogram: Histogram,
    bulk_right: u64,
    buffer: Vec<u8>,
    found: Tortured,
    broken: bool,
}

impl<'a> Torture<'a> {
    fn new(
        client: &'a IpcClient,
        connections: &'a [ConnectionId],
        probing: Option<ConnectionId>,
        job: &TortureJob,
    ) -> Self {
        Self {
            client,
            connections,
            yields: job.yields,
            nonces: Nonces::new(job.seed, job.number),
            calls: vec![0; connections.len()],
            ready: (0..connections.len() as u32).collect(),
            in_flight: 0,
            probing,
            probe: Probe::Due(0),
            histogram: Histogram::new(),
            bulk_right: 0,
            buffer: vec![0; BULK],
            found: Tortured::default(),
            broken: false,
        }
    }

    fn run(mut self, schedule: &Schedule) -> Tortured {
        self.probe = Probe::Due(schedule.begin_ns);
        let mut silence = Silence::from_now();
        let mut before = None;
        loop {
            let now = now_ns();
            let over = now >= schedule.end_ns;
            if now >= schedule.begin_ns && !over {
                self.found.bulk = self.bulk_right - *before.get_or_insert(self.bulk_right);
            }
            let answered = self.found.faults.answered_in_all;
            if self.broken || over && self.is_idle() || silence.is_over(now, answered) {
                break;
            }
            if !over {
                self.send_one();
                self.probe_if_due(now);
            }
            self.take_one();
        }
        self.found.faults.lost = self.in_flight as u64 + u64::from(matches!(self.probe, Probe::Sent(..)));
        self.found.probes = self.histogram.summary();
        self.found
    }

    fn is_idle(&self) -> bool {
        self.in_flight == 0 && matches!(self.probe, Probe::Due(_))
    }

    /// Sends the next bulk request, if there is room.
    #[inline(always)]
    fn send_one(&mut self) {
        if self.in_flight >= SLOTS {
            return;
        }
        let Some(connection) = self.ready.pop_front() else { return };
        let nonce = self.nonces.draw();
        let to = self.client.attached(self.connections[connection as usize]);
        let options = CallOptions { tag: connection.into(), ..CallOptions::default() };
        let sent = to.submit_with(MASKED_ECHO, BULK, &options, |writer| {
            let mut block = [0; SIZE];
            for index in 0..(BULK / SIZE) as u64 {
                content::fill_block(nonce, index, &mut block);
                writer.write(&block)?;
            }
            Ok(())
        });
        match sent {
            Ok(_) => {
                self.calls[connection as usize] = nonce;
                self.in_flight += 1;
                self.found.in_flight_most = self.found.in_flight_most.max(self.in_flight);
            }
            Err(IpcError::WouldBlock) => self.ready.push_front(connection),
            Err(error) => self.fault(error.to_string()),
        }
    }

    #[inline(always)]
    fn probe_if_due(&mut self, now: u64) {
        let (Some(id), Probe::Due(due)) = (self.probing, self.probe) else { return };
        if now < due {
            return;
        }
        let nonce = self.nonces.draw();
        let begun = now_ns();
        let mut request = [0; SIZE];
        content::fill(nonce, &mut request);
        let options = CallOptions { tag: PROBE, ..CallOptions::default() };
        match self.client.attached(id).submit(MASKED_ECHO, &request, &options) {
            Ok(_) => self.probe = Probe::Sent(nonce, begun),
            Err(IpcError::WouldBlock) => self.fault("no room for the probe".to_owned()),
            Err(error) => self.fault(error.to_string()),
        }
    }

    /// Takes one answer, if one has come: the probe's first.
    #[inline(always)]
    fn take_one(&mut self) {
        match self.client.poll_into(&mut self.buffer) {
            Ok(Some(taken)) if taken.status != Some(Status::Ok) => self.refused(taken.tag, taken.status),
            Ok(Some(taken)) if taken.tag == PROBE => self.take_probe(taken.len),
            Ok(Some(taken)) => self.take_bulk(taken.tag, taken.len),
            Ok(None) if self.yields => std::thread::yield_now(),
            Ok(None) => std::hint::spin_loop(),
            Err(error) => {
                self.fault(error.to_string());
                self.broken = true;
            }
        }
    }

    #[inline(always)]
    fn take_probe(&mut self, len: usize) {
        let Probe::Sent(nonce, begun) = self.probe else {
            return self.wrong("an answer to no probe".to_owned());
        };
        let answer: &[u8; SIZE] = self.buffer[..SIZE].try_into().expect("it is that long");
        let right = len == SIZE && content::is_right(nonce, answer);
        let now = now_ns();
        self.probe = Probe::Due(PACE.next(now, nonce));
        if right {
            self.histogram.add(now - begun);
            self.found.faults.answered_in_all += 1;
        } else {
            self.wrong(format!("the probe: a wrong answer of {len} bytes"));
        }
    }

    #[inline(always)]
    fn take_bulk(&mut self, tag: u64, len: usize) {
        let Some(nonce) = self.finish(tag) else {
            return self.wrong(format!("an answer that nobody asked for, tag {tag}"));
        };
        if len == BULK && content::is_right_from(nonce, 0, &self.buffer) {
            self.bulk_right += 1;
            self.found.faults.answered_in_all += 1;
        } else {
            self.wrong(format!("connection {tag}: a wrong answer of {len} bytes"));
        }
    }

    /// The nonce of the bulk call that is over; its connection has its turn again.
    #[inline(always)]
    fn finish(&mut self, tag: u64) -> Option<u64> {
        let call = self.calls.get_mut(tag as usize).filter(|nonce| **nonce != 0)?;
        self.in_flight -= 1;
        self.ready.push_back(tag as u32);
        Some(std::mem::take(call))
    }

    #[cold]
    fn refused(&mut self, tag: u64, status: Option<Status>) {
        self.fault(format!("refused: {status:?}"));
        if tag == PROBE {
            self.probe = Probe::Due(PACE.next(now_ns(), self.nonces.draw()));
        } else if self.finish(tag).is_none() {
            self.wrong(format!("a refusal of nothing, tag {tag}"));
        }
    }

    #[cold]
    fn fault(&mut self, why: String) {
        self.found.faults.errors += 1;
        self.found.faults.note(why);
    }

    #[cold]
    fn wrong(&mut self, what: String) {
        self.found.faults.wrong += 1;
        self.found.faults.note(what);
    }
}

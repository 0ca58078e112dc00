//! A client process with short and long calls at once: some connections with calls of 4 KiB, others with calls of 1 MiB,
//! one in flight on each as far as there is room. One thread drives all of them and never waits inside a call.
//!
//! Every request has a content of its own, written frame by frame right into the slots that carry it; every byte of
//! every answer is checked as its frame comes. A call that finds no room waits for it: nothing is dropped. A call whose
//! memory the server took back (`MemoryTakenBack`) is made again, and counted.
//!
//! Short calls come in waves, each let go when the long ones have got a part further: so both go on together to the end,
//! and in each wave there are as many short calls in flight as there are slots.

use crate::client::{Connect, Ready};
use crate::clock::{SECOND, now_ns, sleep_until};
use crate::content::{self, Nonces, SIZE};
use crate::error::StressError;
use crate::load::{Outcome, Sent, Silence};
use crate::machine;
use crate::processes::{self, Process, Role};
use crate::server::MASKED_ECHO;
use doorbell::{
    Answer, CallId, CallOptions, ClientConfig, ConnectionId, IpcClient, IpcError, SlotWriter, WaitPolicy,
};
use doorbell_shm::layout::SLOT_LARGE;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// Bytes of a short request and of its answer.
pub const SHORT: usize = 4 << 10;
/// Bytes of a long request and of its answer.
pub const LONG: usize = 1 << 20;
/// Waves of short calls.
const WAVES: u64 = 20;
/// Answers, or frames of them, taken before requests have their turn again.
const BURST: usize = 64;
/// A process that does not look at the clock for so long has been stopped.
const STANDSTILL_NS: u64 = SECOND;
/// No call in flight.
const NONE: u64 = 0;
/// How long a process that waits sleeps at most.
const NAP: Duration = Duration::from_millis(20);

/// Connections of one kind, and the calls that each of them makes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// How many connections.
    pub connections: usize,
    /// Calls of each.
    pub rounds: u64,
}

impl Calls {
    /// Calls of all of them.
    pub fn all(&self) -> u64 {
        self.connections as u64 * self.rounds
    }
}

/// What a process does when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Idle {
    /// Looks again: it has the core for itself.
    Spin,
    /// Looks again after others have had the core.
    Yield,
    /// Sleeps until the server has done something.
    Sleep,
}

/// The shared memory that a process asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Entries of each ring.
    pub ring_entries: u32,
    /// Slots of 1 KiB: the names of long calls.
    pub small_slots: u16,
    /// Slots of 4 KiB: short calls.
    pub medium_slots: u16,
    /// Pages that may be leased at once: the windows of long calls.
    pub lease_pages: u16,
    /// Long calls under way at once, at most; each needs a name.
    pub long_at_once: usize,
}

/// What one client process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MixedJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// What to do when there is nothing to do.
    pub idle: Idle,
    /// The session.
    pub share: Share,
    /// Connections with short calls.
    pub short: Calls,
    /// Connections with long calls.
    pub long: Calls,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// The word to begin. Calls that begin before `begin_ns` are checked like all, and made beside those that were ordered.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Go {
    /// When what is ordered begins, CLOCK_MONOTONIC, nanoseconds. The load begins at once.
    pub begin_ns: u64,
}

/// What the load found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Mixture {
    /// Short calls answered rightly, of those ordered.
    pub short: u64,
    /// Long ones.
    pub long: u64,
    /// Both, with those made before the word.
    pub faults: Outcome,
    /// Calls whose memory was taken back; they were made again.
    pub taken_back: u64,
    /// From the first request to the last answer, CLOCK_MONOTONIC, nanoseconds.
    pub from_ns: u64,
    /// See `from_ns`.
    pub to_ns: u64,
    /// Short calls in flight, on average while there were some to send.
    pub short_in_flight: f64,
    /// At most.
    pub short_in_flight_most: u64,
    /// Long calls that had begun to be sent and were not answered, at most.
    pub long_in_flight_most: u64,
    /// How often the session waited for memory to lease.
    pub memory_waits: u64,
    /// How long in sum, nanoseconds.
    pub memory_wait_ns: u64,
    /// How long at most, nanoseconds.
    pub memory_wait_most_ns: u64,
}

impl Mixture {
    /// Adds what another process found at the same time.
    pub fn add(&mut self, other: Self) {
        self.short += other.short;
        self.long += other.long;
        self.faults.add(other.faults);
        self.taken_back += other.taken_back;
        self.from_ns = if self.from_ns == 0 { other.from_ns } else { self.from_ns.min(other.from_ns) };
        self.to_ns = self.to_ns.max(other.to_ns);
        self.short_in_flight += other.short_in_flight;
        self.short_in_flight_most += other.short_in_flight_most;
        self.long_in_flight_most += other.long_in_flight_most;
        self.memory_waits += other.memory_waits;
        self.memory_wait_ns += other.memory_wait_ns;
        self.memory_wait_most_ns = self.memory_wait_most_ns.max(other.memory_wait_most_ns);
    }
}

/// Starts a client process. It says `()`; to [`Connect`] it says [`Ready`], to [`Go`] a [`Mixture`], and stays connected
/// until its standard input ends.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &MixedJob) -> Result<Process, StressError> {
    processes::spawn(Role::Mixed, job, Stdio::piped())
}

/// The client process itself.
///
/// # Errors
///
/// Whatever keeps it from opening its connections. What happens later is counted.
pub fn run(job: &MixedJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    processes::say(&())?;
    let Some(Connect { at_ns }) = processes::hear()? else { return Ok(()) };
    sleep_until(at_ns);
    let mut session = Session::connect(job)?;
    processes::say(&Ready { at_ns: now_ns() })?;
    while let Some(Go { begin_ns }) = processes::hear()? {
        let mut load = Load::new(&mut session, job, begin_ns);
        load.run();
        processes::say(&load.found)?;
    }
    Ok(())
}

/// What carries calls: a session, or a fake in tests. Connections have numbers, those with short calls first.
trait Carrier {
    /// Submits a short call.
    fn submit(&mut self, connection: u32, nonce: u64) -> Sent;

    /// Starts a long call; its request goes out with [`Carrier::feed`].
    fn start(&mut self, connection: u32) -> Sent;

    /// Sends of a long request, of which `sent` bytes have been sent, what there is room for; returns how many bytes that
    /// were, 0 also if the call is over already.
    ///
    /// # Errors
    ///
    /// In words.
    fn feed(&mut self, connection: u32, nonce: u64, sent: u64) -> Result<u64, String>;

    /// Takes one answer, or a frame of one, into the first bytes of `buffer`.
    fn poll(&mut self, buffer: &mut [u8]) -> Came;

    /// For how long the session has been waiting for memory.
    fn waits_for_memory(&self) -> Option<Duration>;

    /// There is nothing to do.
    fn pause(&mut self);
}

/// What came.
#[derive(Debug)]
enum Came {
    /// Nothing now.
    Nothing,
    /// An answer, or a frame of one, of so many bytes, even if more than the buffer took.
    Bytes { connection: u32, len: usize, last: bool },
    /// One that can be read no more, or the end of a call whose memory is gone.
    TakenBack { connection: u32, last: bool },
    /// An error instead of an answer.
    Refused { connection: u32, why: String },
    /// The session is broken: nothing comes any more.
    Broken(String),
}

/// The session of this process.
struct Session {
    client: IpcClient,
    connections: Vec<ConnectionId>,
    calls: Vec<Option<CallId>>,
    idle: Idle,
}

impl Session {
    fn connect(job: &MixedJob) -> Result<Self, StressError> {
        let Share { ring_entries, small_slots, medium_slots, lease_pages, .. } = job.share;
        let policy = if job.idle == Idle::Sleep { WaitPolicy::Block } else { WaitPolicy::Spin };
        let base = ClientConfig { policy, lanes: 1, name: "stress".to_owned(), ..ClientConfig::default() };
        let config = ClientConfig { ring_entries, small_slots, medium_slots, lease_pages, ..base };
        let client = IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))?;
        let all = job.short.connections + job.long.connections;
        let open = |_| client.open().map(|connection| connection.detach());
        let connections = (0..all)
            .map(open)
            .collect::<Result<Vec<_>, _>>()
            .map_err(StressError::ipc("opening a connection"))?;
        Ok(Self { client, connections, calls: vec![None; all], idle: job.idle })
    }
}

fn sent(result: Result<CallId, IpcError>) -> (Sent, Option<CallId>) {
    match result {
        Ok(id) => (Sent::Yes, Some(id)),
        Err(IpcError::WouldBlock) => (Sent::NoRoom, None),
        Err(error) => (Sent::Failed(error.to_string()), None),
    }
}

impl Carrier for Session {
    fn submit(&mut self, connection: u32, nonce: u64) -> Sent {
        let options = CallOptions { tag: connection.into(), ..CallOptions::default() };
        let to = self.client.attached(self.connections[connection as usize]);
        let write = |writer: &mut SlotWriter<'_>| write_blocks(writer, nonce, 0);
        sent(to.submit_with(MASKED_ECHO, SHORT, &options, write)).0
    }

    fn start(&mut self, connection: u32) -> Sent {
        let options = CallOptions {
            tag: connection.into(),
            reply_capacity: LONG,
            pieces: true,
            ..CallOptions::default()
        };
        let to = self.client.attached(self.connections[connection as usize]);
        let (sent, id) = sent(to.start(MASKED_ECHO, Some(LONG as u64), &options));
        self.calls[connection as usize] = id;
        sent
    }

    fn feed(&mut self, connection: u32, nonce: u64, sent: u64) -> Result<u64, String> {
        let Some(id) = self.calls[connection as usize] else { return Ok(0) };
        let mut at = sent;
        while at < LONG as u64 {
            let before = at;
            let went = self.client.send_with(id, |writer| {
                at += writer.remaining() as u64;
                write_blocks(writer, nonce, before / SIZE as u64)
            });
            match went {
                Ok(true) => {}
                Ok(false) => return Ok(before - sent),
                // Answered before it was complete: the answer says why.
                Err(IpcError::NoSuchCall) => return Ok(before - sent),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(at - sent)
    }

    fn poll(&mut self, buffer: &mut [u8]) -> Came {
        match self.client.poll() {
            Ok(None) => Came::Nothing,
            Ok(Some(reply)) => came(&reply, buffer),
            Err(error) => Came::Broken(error.to_string()),
        }
    }

    fn waits_for_memory(&self) -> Option<Duration> {
        self.client.waits_for_memory()
    }

    fn pause(&mut self) {
        match self.idle {
            Idle::Spin => std::hint::spin_loop(),
            Idle::Yield => std::thread::yield_now(),
            Idle::Sleep => {
                // What keeps it from sleeping is the end of the session, which the next poll tells.
                self.client.wait(Some(NAP)).ok();
            }
        }
    }
}

fn came(reply: &Answer<'_>, buffer: &mut [u8]) -> Came {
    let (connection, last) = (reply.tag() as u32, reply.is_last());
    match reply.result().and_then(|len| reply.copy_to(buffer).map(|_| len)) {
        Ok(len) => Came::Bytes { connection, len, last },
        Err(IpcError::MemoryTakenBack) => Came::TakenBack { connection, last },
        Err(error) => Came::Refused { connection, why: error.to_string() },
    }
}

/// Fills what there is room for with blocks of a body, from block `first` on. Slots and bodies are whole blocks.
fn write_blocks(writer: &mut SlotWriter<'_>, nonce: u64, first: u64) -> Result<(), IpcError> {
    let mut block = [0; SIZE];
    for index in first..first + (writer.remaining() / SIZE) as u64 {
        content::fill_block(nonce, index, &mut block);
        writer.write(&block)?;
    }
    Ok(())
}

/// A connection.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    /// The nonce of its call in flight, or [`NONE`].
    nonce: u64,
    /// The call is one of those ordered.
    ordered: bool,
    /// Bytes of its request that have been sent, and of its answer that have come.
    sent: u64,
    came: u64,
    /// What has come of the answer is wrong, or cannot be known any more.
    is_wrong: bool,
    is_gone: bool,
    /// Calls of those ordered that are over.
    rounds: u64,
}

struct Load<'a, C> {
    carrier: &'a mut C,
    short: Calls,
    long: Calls,
    long_at_once: usize,
    begin_ns: u64,
    now_ns: u64,
    nonces: Nonces,
    lines: Vec<Line>,
    /// Connections whose next call is to be made, by kind, and short ones that wait for their wave.
    next_short: VecDeque<u32>,
    next_long: VecDeque<u32>,
    held: Vec<u32>,
    /// Long calls whose request is not complete.
    feeding: Vec<u32>,
    in_flight: [u64; 2],
    /// Long calls of those ordered that are over.
    long_over: u64,
    /// Connections that have made all their calls.
    finished: usize,
    flow: Flow,
    is_broken: bool,
    /// Calls and frames that moved, to know silence by.
    moved: u64,
    buffer: Vec<u8>,
    found: Mixture,
}

impl<'a, C: Carrier> Load<'a, C> {
    fn new(carrier: &'a mut C, job: &MixedJob, begin_ns: u64) -> Self {
        let (short, long) = (job.short, job.long);
        let all = (short.connections + long.connections) as u32;
        let shorts = short.connections as u32;
        Self {
            carrier,
            short,
            long,
            long_at_once: job.share.long_at_once,
            begin_ns,
            now_ns: now_ns(),
            nonces: Nonces::new(job.seed, job.number),
            lines: vec![Line::default(); all as usize],
            next_short: (0..shorts).collect(),
            next_long: (shorts..all).collect(),
            held: Vec::new(),
            feeding: Vec::new(),
            in_flight: [0; 2],
            long_over: 0,
            finished: 0,
            flow: Flow::default(),
            is_broken: false,
            moved: 0,
            buffer: vec![0; SLOT_LARGE],
            found: Mixture::default(),
        }
    }

    /// Makes all calls; returns when all are answered, or nothing comes any more.
    fn run(&mut self) {
        let mut silence = Silence::from_now();
        self.found.from_ns = now_ns();
        while self.finished < self.lines.len() && !self.is_broken {
            let last_ns = std::mem::replace(&mut self.now_ns, now_ns());
            if self.now_ns - last_ns > STANDSTILL_NS {
                // Not the server was silent: this process did not run.
                silence = Silence::from_now();
            }
            if silence.is_over(self.now_ns, self.moved) {
                self.fault("nothing moves any more".to_owned());
                break;
            }
            let before = self.moved;
            self.begin_calls();
            self.feed();
            self.note_flow();
            self.take();
            if self.moved == before {
                self.carrier.pause();
            }
        }
        self.found.to_ns = now_ns();
        self.flow.end(&mut self.found);
        self.found.faults.lost = self.in_flight.iter().sum();
    }

    fn is_long(&self, connection: u32) -> bool {
        connection as usize >= self.short.connections
    }

    /// Makes what calls there is room for, those first that wait longest.
    fn begin_calls(&mut self) {
        while self.in_flight[1] < self.long_at_once as u64
            && let Some(connection) = self.next_long.front().copied()
        {
            let sent = self.carrier.start(connection);
            if !self.began(connection, sent, None) {
                break;
            }
            self.next_long.pop_front();
        }
        while let Some(connection) = self.next_short.front().copied() {
            let nonce = self.nonces.draw();
            let sent = self.carrier.submit(connection, nonce);
            if !self.began(connection, sent, Some(nonce)) {
                break;
            }
            self.next_short.pop_front();
        }
    }

    /// Takes note of a call that was tried; says whether it is none of those that wait any more.
    fn began(&mut self, connection: u32, sent: Sent, nonce: Option<u64>) -> bool {
        match sent {
            Sent::NoRoom => {
                self.found.faults.waited += 1;
                return false;
            }
            Sent::Failed(why) => {
                self.fault(why);
                self.lines[connection as usize].ordered = self.now_ns >= self.begin_ns;
                self.over(connection, false);
                return true;
            }
            Sent::Yes => {}
        }
        let long = self.is_long(connection);
        let nonce = nonce.unwrap_or_else(|| self.nonces.draw());
        let rounds = self.lines[connection as usize].rounds;
        let ordered = self.now_ns >= self.begin_ns;
        self.lines[connection as usize] = Line { nonce, ordered, rounds, ..Line::default() };
        self.in_flight[usize::from(long)] += 1;
        self.moved += 1;
        if long {
            self.feeding.push(connection);
        }
        true
    }

    /// Sends of long requests what there is room for.
    fn feed(&mut self) {
        let mut at = 0;
        while let Some(connection) = self.feeding.get(at).copied() {
            let line = &mut self.lines[connection as usize];
            match self.carrier.feed(connection, line.nonce, line.sent) {
                Ok(bytes) => {
                    line.sent += bytes;
                    self.moved += u64::from(bytes > 0);
                    if line.sent < LONG as u64 {
                        at += 1;
                    } else {
                        self.feeding.swap_remove(at);
                    }
                }
                Err(why) => {
                    // Its answer, if one comes, ends it.
                    self.feeding.swap_remove(at);
                    self.fault(why);
                }
            }
        }
    }

    fn take(&mut self) {
        for _ in 0..BURST {
            match self.carrier.poll(&mut self.buffer) {
                Came::Nothing => return,
                Came::Bytes { connection, len, last } => self.check(connection, len, last),
                Came::TakenBack { connection, last } => self.gone(connection, last),
                Came::Refused { connection, why } => {
                    if self.is_asked(connection) {
                        self.fault(why);
                        self.end_call(connection);
                        self.over(connection, false);
                    }
                }
                Came::Broken(why) => {
                    self.is_broken = true;
                    return self.fault(why);
                }
            }
            self.moved += 1;
        }
    }

    /// Whether there is such a call; if not that is an answer to nothing, and wrong.
    fn is_asked(&mut self, connection: u32) -> bool {
        let asked = self.lines.get(connection as usize).is_some_and(|line| line.nonce != NONE);
        if !asked {
            self.wrong(format!("connection {connection}: an answer that nobody asked for"));
        }
        asked
    }

    fn check(&mut self, connection: u32, len: usize, last: bool) {
        if !self.is_asked(connection) {
            return;
        }
        let whole = if self.is_long(connection) { LONG } else { SHORT } as u64;
        let line = &mut self.lines[connection as usize];
        let piece = self.buffer.get(..len);
        line.is_wrong |= !piece.is_some_and(|piece| content::is_right_from(line.nonce, line.came, piece));
        line.came += len as u64;
        line.is_wrong |= if last { line.came != whole } else { line.came >= whole };
        if last {
            self.answered(connection);
        }
    }

    fn gone(&mut self, connection: u32, last: bool) {
        if self.is_asked(connection) {
            self.lines[connection as usize].is_gone = true;
            if last {
                self.answered(connection);
            }
        }
    }

    /// The last of an answer has come.
    fn answered(&mut self, connection: u32) {
        let line = self.lines[connection as usize];
        self.end_call(connection);
        if line.is_gone {
            self.found.taken_back += 1;
            return self.again(connection);
        }
        if line.is_wrong {
            self.wrong(format!("connection {connection}: a wrong answer of {} bytes", line.came));
        }
        self.over(connection, !line.is_wrong);
    }

    fn end_call(&mut self, connection: u32) {
        let long = self.is_long(connection);
        self.in_flight[usize::from(long)] -= 1;
        self.lines[connection as usize].nonce = NONE;
        if long {
            self.feeding.retain(|other| *other != connection);
        }
    }

    /// A call is over, rightly answered or not: the next one of its connection, if there is one.
    fn over(&mut self, connection: u32, right: bool) {
        let long = self.is_long(connection);
        let line = &mut self.lines[connection as usize];
        let ordered = line.ordered;
        line.rounds += u64::from(ordered);
        self.found.faults.answered_in_all += u64::from(right);
        let counted = u64::from(right && ordered);
        if long {
            self.found.long += counted;
            self.long_over += u64::from(ordered);
            self.release_wave();
        } else {
            self.found.short += counted;
        }
        let rounds = if long { self.long.rounds } else { self.short.rounds };
        if self.lines[connection as usize].rounds >= rounds {
            self.finished += 1;
        } else {
            self.again(connection);
        }
    }

    fn again(&mut self, connection: u32) {
        if self.is_long(connection) {
            self.next_long.push_back(connection);
        } else if self.lines[connection as usize].rounds < self.rounds_let_go() {
            self.next_short.push_back(connection);
        } else {
            self.held.push(connection);
        }
    }

    /// Rounds of short calls that the waves so far hold.
    fn rounds_let_go(&self) -> u64 {
        let all = self.long.all();
        if all == 0 || self.long_over >= all {
            return self.short.rounds;
        }
        let waves = self.long_over * WAVES / all + 1;
        (self.short.rounds * waves).div_ceil(WAVES)
    }

    fn release_wave(&mut self) {
        let rounds = self.rounds_let_go();
        let lines = &self.lines;
        self.next_short.extend(self.held.extract_if(.., |c| lines[*c as usize].rounds < rounds));
    }

    fn note_flow(&mut self) {
        let [short, long] = self.in_flight;
        self.found.short_in_flight_most = self.found.short_in_flight_most.max(short);
        self.found.long_in_flight_most = self.found.long_in_flight_most.max(long);
        let wave = short > 0 || !self.next_short.is_empty();
        self.flow.note(self.now_ns, wave.then_some(short), self.carrier.waits_for_memory(), &mut self.found);
    }

    fn fault(&mut self, why: String) {
        self.found.faults.errors += 1;
        self.found.faults.note(why);
    }

    fn wrong(&mut self, why: String) {
        self.found.faults.wrong += 1;
        self.found.faults.note(why);
    }
}

/// How many short calls were in flight, and how long the session waited for memory.
#[derive(Debug, Default)]
struct Flow {
    last_ns: u64,
    /// Nanoseconds of waves, and calls in flight times nanoseconds.
    wave_ns: u64,
    call_ns: u128,
    waited: Option<Duration>,
}

impl Flow {
    /// `short`: calls in flight, if there is a wave.
    fn note(&mut self, now_ns: u64, short: Option<u64>, waits: Option<Duration>, found: &mut Mixture) {
        let passed = if self.last_ns == 0 { 0 } else { now_ns.saturating_sub(self.last_ns) };
        self.last_ns = now_ns;
        if let Some(short) = short {
            self.wave_ns += passed;
            self.call_ns += u128::from(short) * u128::from(passed);
        }
        match (self.waited, waits) {
            // A wait that is shorter than the last look is another one.
            (Some(before), Some(now)) if now >= before => {}
            (before, _) => self.waited(before, found),
        }
        self.waited = waits;
    }

    fn waited(&self, wait: Option<Duration>, found: &mut Mixture) {
        let Some(wait) = wait.map(|wait| wait.as_nanos() as u64) else { return };
        found.memory_waits += 1;
        found.memory_wait_ns += wait;
        found.memory_wait_most_ns = found.memory_wait_most_ns.max(wait);
    }

    fn end(&mut self, found: &mut Mixture) {
        let waited = self.waited.take();
        self.waited(waited, found);
        if self.wave_ns > 0 {
            found.short_in_flight = self.call_ns as f64 / self.wave_ns as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a [`Fake`] does with one of its answers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        FlipByte,
        SwapFrames,
        Short,
        Refuse,
        TakeBack,
        Swallow,
        Break,
    }

    /// A server in this process with room for few calls, which answers in frames of 16 KiB; one of its long or short
    /// answers has a fault.
    struct Fake {
        fault: Option<(u32, Fault)>,
        room: [usize; 2],
        /// Of each connection: the nonce, and bytes that have come and that have been sent back.
        calls: Vec<Option<(u64, u64, u64)>>,
        shorts: usize,
        answers: u32,
        most: [usize; 2],
        turn: usize,
        waits: Option<Duration>,
    }

    const FRAME: u64 = 16 << 10;

    impl Fake {
        fn new(job: &MixedJob, fault: Option<(u32, Fault)>) -> Self {
            let (shorts, longs) = (job.short.connections, job.long.connections);
            Self {
                fault,
                room: [3, 2],
                calls: vec![None; shorts + longs],
                shorts,
                answers: 0,
                most: [0; 2],
                turn: 0,
                waits: None,
            }
        }

        fn admit(&mut self, connection: u32, call: (u64, u64, u64)) -> Sent {
            let long = connection as usize >= self.shorts;
            let range = if long { self.shorts..self.calls.len() } else { 0..self.shorts };
            let under_way = self.calls[range].iter().flatten().count();
            if under_way == self.room[usize::from(long)] {
                return Sent::NoRoom;
            }
            self.most[usize::from(long)] = self.most[usize::from(long)].max(under_way + 1);
            assert!(self.calls[connection as usize].replace(call).is_none(), "one call in flight on each");
            Sent::Yes
        }
    }

    impl Carrier for Fake {
        fn submit(&mut self, connection: u32, nonce: u64) -> Sent {
            self.admit(connection, (nonce, SHORT as u64, 0))
        }

        fn start(&mut self, connection: u32) -> Sent {
            self.admit(connection, (NONE, 0, 0))
        }

        fn feed(&mut self, connection: u32, nonce: u64, sent: u64) -> Result<u64, String> {
            let Some((known, came, back)) = &mut self.calls[connection as usize] else { return Ok(0) };
            assert_eq!(*came, sent);
            *known = nonce;
            // There is room for two frames.
            let more = (LONG as u64 - *came).min(*back + 2 * FRAME - *came);
            *came += more;
            Ok(more)
        }

        fn poll(&mut self, buffer: &mut [u8]) -> Came {
            let count = self.calls.len();
            let ready = |i: &usize| self.calls[i % count].is_some_and(|(_, came, back)| came > back);
            let Some(index) = (self.turn..self.turn + count).find(ready) else { return Came::Nothing };
            self.turn = index + 1;
            let connection = (index % count) as u32;
            let Some((nonce, came, back)) = &mut self.calls[connection as usize] else {
                return Came::Nothing;
            };
            let whole = if (connection as usize) < self.shorts { SHORT } else { LONG } as u64;
            let len = (*came - *back).min(FRAME) as usize;
            self.answers += 1;
            let fault = self.fault.filter(|(nth, _)| *nth == self.answers).map(|(_, fault)| fault);
            let from = if fault == Some(Fault::SwapFrames) { *back + FRAME } else { *back };
            let mut block = [0; SIZE];
            for (i, target) in buffer[..len].chunks_mut(SIZE).enumerate() {
                content::fill_block(*nonce, from / SIZE as u64 + i as u64, &mut block);
                content::answer(&block, target);
            }
            *back += len as u64;
            let last = *back == whole;
            if last || matches!(fault, Some(Fault::Refuse | Fault::TakeBack | Fault::Swallow)) {
                self.calls[connection as usize] = None;
            }
            match fault {
                Some(Fault::FlipByte) => buffer[len - 1] ^= 1,
                Some(Fault::Short) => return Came::Bytes { connection, len: len - 8, last },
                Some(Fault::Refuse) => return Came::Refused { connection, why: "no".to_owned() },
                Some(Fault::TakeBack) => return Came::TakenBack { connection, last: true },
                Some(Fault::Swallow) => return Came::Nothing,
                Some(Fault::Break) => return Came::Broken("gone".to_owned()),
                Some(Fault::SwapFrames) | None => {}
            }
            Came::Bytes { connection, len, last }
        }

        fn waits_for_memory(&self) -> Option<Duration> {
            self.waits
        }

        fn pause(&mut self) {}
    }

    const SHORTS: Calls = Calls { connections: 5, rounds: 8 };
    const LONGS: Calls = Calls { connections: 3, rounds: 2 };

    fn job(short: Calls, long: Calls) -> MixedJob {
        let share =
            Share { ring_entries: 16, small_slots: 4, medium_slots: 0, lease_pages: 0, long_at_once: 3 };
        MixedJob { path: PathBuf::new(), core: 0, idle: Idle::Spin, share, short, long, seed: 1, number: 0 }
    }

    fn carry(fault: Option<(u32, Fault)>) -> (Mixture, Fake) {
        let job = job(SHORTS, LONGS);
        let mut fake = Fake::new(&job, fault);
        let mut load = Load::new(&mut fake, &job, 0);
        load.run();
        let found = std::mem::take(&mut load.found);
        (found, fake)
    }

    /// Goal:   all calls ordered are made and answered, none more, as many at once as there is room for.
    #[test]
    fn every_call_is_made_once_and_answered() {
        let (found, fake) = carry(None);
        assert_eq!((found.short, found.long), (40, 6));
        let Outcome { wrong, errors, lost, answered_in_all, waited, .. } = found.faults;
        assert_eq!((wrong, errors, lost, answered_in_all), (0, 0, 0, 46));
        assert!(waited > 0, "some found no room");
        assert_eq!(fake.most, [3, 2]);
        assert_eq!((found.short_in_flight_most, found.long_in_flight_most), (3, 2));
        assert!(found.short_in_flight > 0.0 && found.short_in_flight <= 3.0, "{found:?}");
    }

    /// Goal:   every fault is found and counted once, and the others' calls go on.
    /// Method: the answer, or the frame of one, that comes fifth has a fault, then the twentieth: in a wave both kinds
    ///         are under way, afterwards only long ones.
    #[test]
    fn one_fault_is_counted_once() {
        for nth in [5, 20] {
            let counts = |fault| {
                let (found, _) = carry(Some((nth, fault)));
                let Outcome { wrong, errors, lost, answered_in_all, .. } = found.faults;
                (wrong, errors, lost, answered_in_all, found.taken_back)
            };
            assert_eq!(counts(Fault::FlipByte), (1, 0, 0, 45, 0));
            assert_eq!(counts(Fault::SwapFrames), (1, 0, 0, 45, 0));
            assert_eq!(counts(Fault::Short), (1, 0, 0, 45, 0));
            assert_eq!(counts(Fault::Refuse), (0, 1, 0, 45, 0));
            assert_eq!(counts(Fault::TakeBack), (0, 0, 0, 46, 1), "it is made again");
            let (_, errors, lost, answered, _) = counts(Fault::Break);
            assert!(errors == 1 && lost > 0 && answered < 46);
        }
    }

    #[test]
    fn a_call_that_is_never_answered_is_lost_and_ends_the_load() {
        let (found, _) = carry(Some((5, Fault::Swallow)));
        assert_eq!((found.faults.lost, found.faults.errors), (1, 1), "{found:?}");
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_wrong() {
        let job = job(SHORTS, LONGS);
        let mut fake = Fake::new(&job, None);
        let mut load = Load::new(&mut fake, &job, 0);
        load.check(1, SHORT, true);
        load.check(99, SHORT, true);
        load.gone(7, true);
        assert_eq!((load.found.faults.wrong, load.found.taken_back), (3, 0));
    }

    /// Goal:   what is made before the word comes beside what was ordered.
    #[test]
    fn calls_before_the_word_do_not_count() {
        let job = job(Calls::default(), Calls { connections: 1, rounds: 2 });
        let mut fake = Fake::new(&job, None);
        let begin_ns = now_ns() + 50_000_000;
        let mut load = Load::new(&mut fake, &job, begin_ns);
        load.run();
        assert!(load.found.long == 2 && load.found.faults.answered_in_all > 2, "{:?}", load.found);
        assert!(load.found.to_ns > begin_ns);
    }

    /// Goal:   short calls go on as long as long ones do, and are all let go before these end.
    #[test]
    fn short_calls_are_let_go_as_the_long_ones_get_on() {
        let job = job(Calls { connections: 1, rounds: 100 }, Calls { connections: 1, rounds: 40 });
        let mut fake = Fake::new(&job, None);
        let mut load = Load::new(&mut fake, &job, 0);
        let let_go = |over| {
            load.long_over = over;
            load.rounds_let_go()
        };
        assert_eq!([0, 1, 2, 20, 37, 38, 39, 40].map(let_go), [5, 5, 10, 55, 95, 100, 100, 100]);
    }

    #[test]
    fn each_wait_for_memory_counts_once() {
        let (mut flow, mut found) = (Flow::default(), Mixture::default());
        let ms = Duration::from_millis;
        for (now, wait) in [None, Some(1), Some(5), None, Some(2), Some(1), Some(3)].into_iter().enumerate() {
            flow.note(now as u64 + 1, Some(2), wait.map(ms), &mut found);
        }
        flow.end(&mut found);
        assert_eq!(
            (found.memory_waits, found.memory_wait_ns, found.memory_wait_most_ns),
            (3, 10_000_000, 5_000_000)
        );
        assert!((found.short_in_flight - 2.0).abs() < 1e-9);
    }
}

//! Clients that go on whatever happens to their server, and know what they were told of each call: several threads of one
//! process. For servers that suffer a kill point they are the traffic; for clients that do, they are those who want memory.

use super::ledger::{LOGGED, Numbers, Reading, Told, judge, request};
use super::victim::{AWAY, LONG, SHORT, cancelled};
use crate::error::StressError;
use crate::{machine, processes};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, Reconnect, ReconnectingClient, WaitPolicy};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the threads may take to come to a pause.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DriverJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// Where the server notes what it executes.
    pub log: PathBuf,
    /// The core to run on: not the home reactor's.
    pub core: usize,
    /// So many who want memory, and nobody else.
    pub callers: Option<usize>,
    /// The process says that it is there when they have connected, and not before.
    pub waits: bool,
}

/// What it is told to do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Order {
    /// Say how many calls have been answered since the start.
    Progress,
    /// Pause, and say what became of the calls since the last time ([`Audit`](super::ledger::Audit)).
    Audit,
    /// Go on.
    GoOn,
}

/// Whether to pause, and how many do.
#[derive(Debug, Default)]
struct Gate {
    closed: bool,
    waiting: usize,
}

/// What the threads share.
#[derive(Default)]
struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    told: Mutex<Vec<(u64, Told)>>,
    answered: AtomicU64,
    /// Clients that have a connection.
    connected: AtomicUsize,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn note(&self, number: u64, told: Told) {
        locked(&self.told).push((number, told));
        if told == Told::Answered {
            self.answered.fetch_add(1, SeqCst);
        }
    }

    /// Between two calls: waits while the gate is closed.
    fn pass(&self) {
        let mut gate = locked(&self.gate);
        gate.waiting += 1;
        self.changed.notify_all();
        while gate.closed {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.waiting -= 1;
    }

    /// Closes the gate and waits until all threads are there; says whether they are.
    fn close(&self, threads: usize) -> bool {
        let mut gate = locked(&self.gate);
        gate.closed = true;
        let result = self.changed.wait_timeout_while(gate, PATIENCE, |gate| gate.waiting < threads);
        result.is_ok_and(|(_, timeout)| !timeout.timed_out())
    }

    fn open(&self) {
        locked(&self.gate).closed = false;
        self.changed.notify_all();
    }
}

/// What a thread does.
type Part = fn(&Shared, &DriverJob, Numbers) -> Result<(), IpcError>;

/// The process itself; says `()` when its threads have been started, and does what it is told until nobody speaks to it.
///
/// # Errors
///
/// [`StressError::Os`] if a thread cannot be started; what ends a client for good ends the process.
pub fn run(job: &DriverJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let shared: &'static Shared = Box::leak(Box::default());
    let long: Part = |shared, job, numbers| go_on(shared, job, numbers, LONG);
    let short: Part = |shared, job, numbers| go_on(shared, job, numbers, SHORT);
    let parts = match job.callers {
        Some(callers) => vec![long; callers],
        None => vec![long, long, short, come_and_go as Part, come_and_go],
    };
    let mut log = Reading::new(&job.log);
    for (caller, part) in (1..).zip(&parts) {
        let (part, job) = (*part, job.clone());
        let body = move || {
            if let Err(error) = part(shared, &job, Numbers::of(caller)) {
                eprintln!("doorbell-stress: driver {caller}: {error}");
                std::process::exit(1);
            }
        };
        std::thread::Builder::new().spawn(body).map_err(|e| StressError::os("starting a thread", e))?;
    }
    while job.waits && shared.connected.load(SeqCst) < parts.len() {
        std::thread::sleep(AWAY);
    }
    processes::say(&())?;
    while let Some(order) = processes::hear()? {
        match order {
            Order::Progress => processes::say(&shared.answered.load(SeqCst))?,
            Order::Audit => {
                let paused = shared.close(parts.len());
                let told = std::mem::take(&mut *locked(&shared.told));
                let mut audit = judge(&told, &log.counts()?);
                if !paused {
                    audit.violations.push("a call of a client that goes on has no end".to_owned());
                }
                processes::say(&audit)?;
            }
            Order::GoOn => shared.open(),
        }
    }
    Ok(())
}

/// A client that comes back: one call after the other, every second idempotent.
fn go_on(shared: &Shared, job: &DriverJob, mut numbers: Numbers, len: usize) -> Result<(), IpcError> {
    let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
    let reconnect = Reconnect { pause_max: Duration::from_millis(4), ..Reconnect::default() };
    let client = ReconnectingClient::begin(&job.path, &config, reconnect)?;
    let connection = client.open()?;
    shared.connected.fetch_add(1, SeqCst);
    for round in 0u64.. {
        shared.pass();
        let idempotent = round.is_multiple_of(2);
        let number = numbers.draw(idempotent);
        let request = request(number, len);
        let options = CallOptions { idempotent, ..CallOptions::default() };
        let result = connection.call_with(LOGGED, &request, &options);
        shared.note(number, Told::of(&request, &result));
    }
    Ok(())
}

/// Clients that come, take a lane on their own core, call, cancel, and go.
fn come_and_go(shared: &Shared, job: &DriverJob, mut numbers: Numbers) -> Result<(), IpcError> {
    loop {
        shared.pass();
        // The server dies all the time: whatever that means for this session, the next one begins anew.
        if one_session(shared, job, &mut numbers).is_err() {
            std::thread::sleep(AWAY);
        }
    }
}

fn one_session(shared: &Shared, job: &DriverJob, numbers: &mut Numbers) -> Result<(), IpcError> {
    let config = ClientConfig { policy: WaitPolicy::Handoff, lanes: 2, ..ClientConfig::default() };
    let client = IpcClient::connect_with(&job.path, &config)?;
    let connection = client.open()?;
    for _ in 0..2 {
        let number = numbers.draw(false);
        let request = request(number, SHORT);
        let result = connection.call(LOGGED, &request);
        shared.note(number, Told::of(&request, &result));
        result?;
    }
    for len in [SHORT, LONG] {
        let number = numbers.draw(false);
        let told = cancelled(&client, &connection, number, len);
        shared.note(number, *told.as_ref().unwrap_or(&Told::Unknown));
        told?;
    }
    Ok(())
}

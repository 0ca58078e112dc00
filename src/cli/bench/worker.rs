//! The client process: connects its share of the sessions, says so, waits for the start, drives the load,
//! reports, and stays connected until its standard input ends.

use super::child::{self, Process, Role};
use super::clock::{now_ns, sleep_until};
use super::error::BenchError;
use super::load::{self, LoadResult, Schedule, Shape};
use super::long;
use super::options::{BenchOptions, PeerKind, Policy, SLOT_MAX, share};
use super::placement::{self, Cpus};
use super::{doorbell, uds, uds_long};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::num::NonZeroU64;
use std::process::Stdio;

/// What one client process is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientJob {
    /// Whom to drive.
    pub peer: PeerKind,
    /// Where its server listens; what that means is the peer's affair.
    pub endpoint: String,
    /// For each session of this process, its connections.
    pub sessions: Vec<usize>,
    /// Whether all sessions say hello before the first is waited for, or one connects after the other.
    pub at_once: bool,
    /// The load; its `connections` is the sum of `sessions`.
    pub shape: Shape,
    /// How to wait.
    pub policy: Policy,
    /// Whether the connections of the load are bulk ones.
    pub bulk: bool,
    /// The core to run on.
    pub cpu: Option<usize>,
    /// Whether the server runs on the same core: then whoever spins must yield.
    pub shares_core: bool,
}

impl ClientJob {
    /// The share of process `index`; the one behind all others has the probe and no load.
    pub fn new(options: &BenchOptions, endpoint: &str, cpus: &Cpus, index: usize) -> Self {
        let sessions = if index < options.processes { sessions_of_process(options, index) } else { vec![0] };
        let connections = sessions.iter().sum();
        let part = connections as f64 / options.connections as f64;
        Self {
            peer: options.peer,
            endpoint: endpoint.to_owned(),
            sessions,
            at_once: options.connect_only,
            shape: Shape {
                connections,
                in_flight: options.in_flight,
                size: options.size,
                think_ns: options.think_us * 1000,
                rate: options.rate.map(|rate| rate * part),
                sleeps: options.policy != Policy::Spin,
                first_request: (index as u64) << 44,
                think_random: options.think_random,
                seed: options.seed.unwrap_or_default(),
                // On the first session of the first process, or in a process of its own.
                probe: options
                    .probe
                    .filter(|_| index == if options.probe_process { options.processes } else { 0 }),
            },
            policy: options.policy,
            bulk: options.probe.is_some(),
            cpu: cpus.client(index),
            shares_core: match options.peer {
                PeerKind::Doorbell => cpus.reactors.share(cpus.client(index)),
                _ => cpus.shared,
            },
        }
    }
}

/// The connections of each session that process `index` has.
fn sessions_of_process(options: &BenchOptions, index: usize) -> Vec<usize> {
    let first: usize = (0..index).map(|i| share(options.sessions, options.processes, i)).sum();
    let count = share(options.sessions, options.processes, index);
    (first..first + count).map(|session| share(options.connections, options.sessions, session)).collect()
}

/// What a client process says once it is connected.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ready {
    /// From its first attempt to connect until its last session was ready, nanoseconds.
    pub connect_last_ns: u64,
}

/// Starts a client process; the next that it says is [`Ready`], then, to each [`Schedule`], a [`LoadResult`].
///
/// # Errors
///
/// [`BenchError::Os`] if it cannot be started.
pub fn start(job: &ClientJob) -> Result<Process, BenchError> {
    child::spawn(Role::Client, job, Stdio::piped(), Stdio::piped())
}

/// The client process itself.
///
/// # Errors
///
/// Whatever stops it.
pub fn run(job: &ClientJob) -> Result<(), BenchError> {
    placement::pin(job.cpu)?;
    // Pauses and due times are the load: the 50 µs that the kernel may add to every sleep would be another one.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))
        .map_err(|e| BenchError::os("prctl(PR_SET_TIMERSLACK)", e))?;
    match (job.peer, job.shape.size > SLOT_MAX) {
        (PeerKind::Uds, false) => drive(job, uds::Connector::new(job)?, load::run),
        (PeerKind::Uds, true) => drive(job, uds_long::Connector::new(job)?, long::run),
        (PeerKind::Doorbell, false) => drive(job, doorbell::Connector::new(job)?, load::run),
        (PeerKind::Doorbell, true) => drive(job, doorbell::Connector::new(job)?, long::run),
        (PeerKind::Floor, _) => Err(BenchError::option("peer floor", "has no client process")),
    }
}

/// Connects the sessions of one client process.
pub trait Connector {
    /// What comes out of it, to be driven.
    type Target;

    /// Begins to connect so many sessions at once, if this peer has a handshake to wait for; [`Self::connect`] then
    /// goes on with them.
    ///
    /// # Errors
    ///
    /// [`BenchError::Peer`] or [`BenchError::Os`].
    fn begin(&mut self, sessions: usize) -> Result<(), BenchError>;

    /// Connects session `index` with so many connections.
    ///
    /// # Errors
    ///
    /// [`BenchError::Peer`] or [`BenchError::Os`].
    fn connect(&mut self, index: usize, connections: usize) -> Result<(), BenchError>;

    /// All sessions as one target. Connections are numbered through, session by session.
    ///
    /// # Errors
    ///
    /// [`BenchError::Peer`] or [`BenchError::Os`].
    fn finish(self) -> Result<Self::Target, BenchError>;
}

/// What drives a target through one schedule.
type Run<T> = fn(&mut T, &Shape, &Schedule) -> Result<LoadResult, BenchError>;

fn drive<C: Connector>(job: &ClientJob, mut connector: C, run: Run<C::Target>) -> Result<(), BenchError> {
    let before = now_ns();
    if job.at_once {
        connector.begin(job.sessions.len())?;
    }
    for (index, connections) in job.sessions.iter().enumerate() {
        connector.connect(index, *connections)?;
    }
    let connect_last_ns = now_ns() - before;
    let mut target = connector.finish()?;
    say(&Ready { connect_last_ns })?;
    while let Some(schedule) = hear()? {
        let result = match (schedule.probe_alone, job.shape.probe) {
            (false, _) => run(&mut target, &job.shape, &schedule)?,
            (true, Some(_)) => run(&mut target, &job.shape.without_load(), &schedule)?,
            (true, None) => {
                sleep_until(schedule.end_ns());
                LoadResult::none(&schedule)
            }
        };
        say(&result)?;
    }
    Ok(())
}

/// Says one message to the parent, a line of JSON.
///
/// # Errors
///
/// [`BenchError::Os`] if the parent is gone.
pub fn say(message: &impl Serialize) -> Result<(), BenchError> {
    let line = serde_json::to_string(message).expect("a message has string keys only") + "\n";
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(line.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|e| BenchError::os("write(stdout)", e))
}

/// The next schedule, or `None` when the parent has closed the pipe.
fn hear() -> Result<Option<Schedule>, BenchError> {
    let mut line = String::new();
    let n = std::io::stdin().lock().read_line(&mut line).map_err(|e| BenchError::os("read(stdin)", e))?;
    if n == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).map_err(|e| BenchError::peer("reading the schedule", e))
}

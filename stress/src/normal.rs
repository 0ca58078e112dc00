//! A client process of level 5 that goes on whatever happens: a call of 1 KiB now and then, every byte of every answer
//! checked; where the server is gone it connects again as soon as there is one.

use crate::clock::{SECOND, now_ns};
use crate::content::{self, Nonces, SIZE};
use crate::error::StressError;
use crate::latency::{Histogram, Latency};
use crate::load::Outcome;
use crate::machine;
use crate::processes::{self, Process, Role};
use crate::server::MASKED_ECHO;
use doorbell::{CallOptions, ClientConfig, Connection, IpcClient, IpcError, WaitPolicy};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// Between two calls: from half to one and a half of it, by chance. The core is free for others meanwhile.
const THINK_NS: u64 = 200_000;
/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(1);
/// How long a call may take.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What the process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NormalJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// A server that was lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// When a call told so, CLOCK_MONOTONIC, nanoseconds.
    pub lost_ns: u64,
    /// When the next right answer came; 0: never.
    pub back_ns: u64,
    /// What the call said.
    pub why: String,
}

/// What the process found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endured {
    /// Calls that were answered.
    pub calls: Latency,
    /// Servers lost, in order.
    pub losses: Vec<Loss>,
    /// All answers, and the faults.
    pub faults: Outcome,
}

/// Starts the process. It begins when it is told `()`, and when it is told so again it says what it [found](Endured).
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &NormalJob) -> Result<Process, StressError> {
    processes::spawn(Role::Normal, job, Stdio::piped())
}

/// The process itself.
///
/// # Errors
///
/// What keeps it from hearing and speaking; what happens to its calls is counted.
pub fn run(job: &NormalJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    while let Some(()) = processes::hear()? {
        let found = Normal::new(job).run();
        let Some(()) = processes::hear()? else { return Ok(()) };
        processes::say(&found)?;
    }
    Ok(())
}

/// Whether the parent has said something, or is gone.
fn is_told() -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // What cannot be asked is told by the attempt to hear.
    poll(&mut [PollFd::new(&std::io::stdin(), PollFlags::IN)], Some(&now)) != Ok(0)
}

struct Normal<'a> {
    job: &'a NormalJob,
    nonces: Nonces,
    histogram: Histogram,
    found: Endured,
}

impl<'a> Normal<'a> {
    fn new(job: &'a NormalJob) -> Self {
        let nonces = Nonces::new(job.seed, job.number);
        Self { job, nonces, histogram: Histogram::new(), found: Endured::default() }
    }

    fn run(mut self) -> Endured {
        while !is_told() {
            // A client that connects again by itself belongs here: then this is one client, and no loop.
            match self.connect() {
                Ok(client) => self.use_session(&client),
                Err(_) => std::thread::sleep(RETRY),
            }
        }
        self.found.calls = self.histogram.summary();
        self.found
    }

    fn connect(&self) -> Result<IpcClient, IpcError> {
        let config = ClientConfig {
            policy: WaitPolicy::Spin,
            lanes: 1,
            connect_timeout: Duration::from_secs(1),
            name: "normal".to_owned(),
            ..ClientConfig::smallest()
        };
        IpcClient::connect_with(&self.job.path, &config)
    }

    /// Calls until the server is lost, or it is told to stop.
    fn use_session(&mut self, client: &IpcClient) {
        let connection = match client.open() {
            Ok(connection) => connection,
            Err(error) => return self.lost(&error),
        };
        while !is_told() {
            if let Err(error) = self.call(&connection) {
                return self.lost(&error);
            }
            std::thread::sleep(Duration::from_nanos(THINK_NS / 2 + self.nonces.draw() % THINK_NS));
        }
    }

    fn call(&mut self, connection: &Connection<'_>) -> Result<(), IpcError> {
        let nonce = self.nonces.draw();
        let (mut request, mut answer) = ([0; SIZE], [0; SIZE]);
        let options = CallOptions { timeout: Some(TIMEOUT), ..CallOptions::default() };
        let begun = now_ns();
        content::fill(nonce, &mut request);
        let taken = connection.call_with(MASKED_ECHO, &request, &options, |reply| {
            reply.copy_to(&mut answer).map(|_| reply.len())
        });
        let len = taken.and_then(|len| len)?;
        let right = len == SIZE && content::is_right(nonce, &answer);
        let now = now_ns();
        if right {
            self.histogram.add(now - begun);
            self.found.faults.answered_in_all += 1;
            if let Some(loss) = self.found.losses.last_mut().filter(|loss| loss.back_ns == 0) {
                loss.back_ns = now;
            }
        } else {
            self.found.faults.wrong += 1;
            self.found.faults.note(format!("a wrong answer of {len} bytes"));
        }
        Ok(())
    }

    /// A lost server is expected, if one was killed; anything else is an error.
    #[cold]
    fn lost(&mut self, error: &IpcError) {
        use IpcError::{ConnectionLost, Disconnected, NotExecuted};
        if !matches!(error, ConnectionLost | Disconnected(_) | NotExecuted) {
            self.found.faults.errors += 1;
            self.found.faults.note(error.to_string());
        }
        // One that has not been got over is still the same.
        if self.found.losses.last().is_none_or(|loss| loss.back_ns != 0) {
            self.found.losses.push(Loss { lost_ns: now_ns(), back_ns: 0, why: error.to_string() });
        }
    }
}

/// What a server's end has to become within: the next right answer, after the new one listens.
pub const RECOVERY_NS: u64 = SECOND / 10;

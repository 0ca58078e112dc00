//! A client process: opens its share of the connections, says so, carries the load, reports, and stays
//! connected until its standard input ends.

use crate::clock::{now_ns, sleep_until};
use crate::content::{Nonces, SIZE};
use crate::error::StressError;
use crate::load::{self, Link, Polled, Schedule, Sent};
use crate::machine;
use crate::processes::{self, Process, Role};
use crate::server::MASKED_ECHO;
use doorbell::{CallOptions, ClientConfig, ConnectionId, IpcClient, IpcError, MessageType, WaitPolicy};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// How long the server may take to say what it has counted.
const COUNT_TIMEOUT: Duration = Duration::from_secs(10);

/// What one client process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// Whether others run there too: then whoever finds nothing to do gives way.
    pub yields: bool,
    /// For each session of this process, its connections.
    pub sessions: Vec<usize>,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// When connecting begins, CLOCK_MONOTONIC, nanoseconds: at once in all processes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Connect {
    /// The moment.
    pub at_ns: u64,
}

/// What the parent asks of a client process once that is ready.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Order {
    /// Carry the load; the answer is a [`load::Outcome`].
    Load(Schedule),
    /// Ask the server what it has counted; the answer is a `Result<Counted, String>`.
    Count,
}

/// What the server has counted since it started: a second witness beside the clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Calls answered with success.
    #[serde(rename = "calls_ok")]
    pub calls: u64,
    /// Bytes of answers.
    pub bytes_out: u64,
    /// Connections open.
    #[serde(rename = "connections_open")]
    pub connections: u64,
}

/// Every connection of the process is open.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ready {
    /// Since when.
    pub at_ns: u64,
}

/// Starts a client process. It says `()`; to [`Connect`] it says [`Ready`], then it obeys each
/// [`Order`].
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &ClientJob) -> Result<Process, StressError> {
    processes::spawn(Role::Client, job, Stdio::piped())
}

/// The client process itself.
///
/// # Errors
///
/// Whatever keeps it from opening its connections. What happens later is counted.
pub fn run(job: &ClientJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    // A session of a client's is a socket and a segment.
    let descriptors = 2 * job.sessions.len() as u64;
    doorbell::config::raise_file_limit(descriptors).map_err(StressError::ipc("raising limits"))?;
    processes::say(&())?;
    let Some(Connect { at_ns }) = processes::hear()? else { return Ok(()) };
    sleep_until(at_ns);
    let mut sessions = Sessions::connect(job)?;
    processes::say(&Ready { at_ns: now_ns() })?;
    while let Some(order) = processes::hear()? {
        match order {
            Order::Load(schedule) => {
                let connections = sessions.connections.len();
                let nonces = Nonces::new(job.seed, job.number);
                processes::say(&load::run(&mut sessions, connections, nonces, job.yields, &schedule))?;
            }
            Order::Count => processes::say(&sessions.count())?,
        }
    }
    Ok(())
}

/// The sessions of this process.
struct Sessions {
    clients: Vec<IpcClient>,
    /// The session of each connection, and its name there.
    connections: Vec<(u32, ConnectionId)>,
    /// Sessions that are polled: all that are not broken.
    polled: Vec<u32>,
    /// Whose answers are taken next.
    cursor: usize,
}

impl Sessions {
    fn connect(job: &ClientJob) -> Result<Self, StressError> {
        let mut sessions = Self {
            clients: Vec::with_capacity(job.sessions.len()),
            connections: Vec::new(),
            polled: (0..job.sessions.len() as u32).collect(),
            cursor: 0,
        };
        for (index, connections) in job.sessions.iter().enumerate() {
            // One call in flight on each connection, and as many slots.
            let load = ClientConfig::for_load(*connections as u32, SIZE);
            let config = ClientConfig { policy: WaitPolicy::Spin, name: "stress".to_owned(), ..load };
            let client =
                IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))?;
            for _ in 0..*connections {
                let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
                sessions.connections.push((index as u32, connection.detach()));
            }
            sessions.clients.push(client);
        }
        Ok(sessions)
    }

    /// Asks over the first connection: one more would be beyond the server's limit.
    fn count(&self) -> Result<Counted, String> {
        let Some((session, id)) = self.connections.first() else { return Err("no connection".to_owned()) };
        let options =
            CallOptions { reply_capacity: SIZE, timeout: Some(COUNT_TIMEOUT), ..CallOptions::default() };
        let json = self.clients[*session as usize]
            .attached(*id)
            .call_with(MessageType::STATS, b"", &options, |reply| reply.to_vec())
            .and_then(|json| json)
            .map_err(|error| error.to_string())?;
        serde_json::from_slice(&json).map_err(|error| error.to_string())
    }
}

/// Takes a broken session out of those that are polled.
#[cold]
fn broken(polled: &mut Vec<u32>, cursor: &mut usize, error: &IpcError) -> Polled {
    let session = polled.remove(*cursor);
    *cursor = 0;
    Polled::Broken(format!("session {session}: {error}"))
}

impl Link for Sessions {
    #[inline(always)]
    fn send(&mut self, connection: u32, request: &[u8; SIZE]) -> Sent {
        let (session, id) = self.connections[connection as usize];
        let options = CallOptions { tag: connection.into(), ..CallOptions::default() };
        match self.clients[session as usize].attached(id).submit(MASKED_ECHO, request, &options) {
            Ok(_) => Sent::Yes,
            Err(IpcError::WouldBlock) => Sent::NoRoom,
            Err(error) => Sent::Failed(error.to_string()),
        }
    }

    #[inline(always)]
    fn poll(&mut self, answer: &mut [u8; SIZE]) -> Polled {
        let Self { clients, polled, cursor, .. } = self;
        for _ in 0..polled.len() {
            match clients[polled[*cursor] as usize].poll() {
                Ok(None) => {}
                Ok(Some(reply)) => {
                    let connection = reply.tag() as u32;
                    return match reply.result().and_then(|len| reply.copy_to(answer).map(|_| len)) {
                        Ok(len) => Polled::Answer { connection, len },
                        Err(error) => Polled::Refused { connection, why: error.to_string() },
                    };
                }
                Err(error) => return broken(polled, cursor, &error),
            }
            *cursor += 1;
            if *cursor == polled.len() {
                *cursor = 0;
            }
        }
        Polled::Nothing
    }
}

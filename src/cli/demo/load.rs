//! The clients of the demonstration: an editor's keystrokes, and processes that call without pause. The same script over
//! either peer.

use super::super::bench::clock::{SECOND, now_ns, sleep_until};
use super::super::bench::error::BenchError;
use super::super::bench::histogram::{Latencies, SparseLatencies};
use super::super::bench::work;
use super::super::bench::worker::say;
use super::server::WORK;
use doorbell::{CallOptions, ClientConfig, ConnectionId, IpcClient, IpcError};
use doorbell_shm::entry::codec;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Bytes of each request and of each answer.
pub const SIZE: usize = 1024;
/// Bytes before each frame of the unix socket: length, tag.
const HEADER: usize = 8;
/// Bursts of calls before anything counts.
const WARM_UP: u32 = 10;
/// Between two keystrokes.
const KEY_NS: u64 = SECOND / 100;

/// Who is called.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Peer {
    /// A doorbell server, at this path.
    Doorbell(PathBuf),
    /// A unix socket, at this abstract address.
    Unix(String),
}

/// What a client process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadJob {
    /// Who is called.
    pub peer: Peer,
    /// Sessions of this process.
    pub sessions: usize,
    /// One call for each key, a hundred a second, instead of calls without pause.
    pub keys: bool,
}

/// When to begin and to end, CLOCK_MONOTONIC, ns.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Schedule {
    /// Nothing is called before.
    pub start_ns: u64,
    /// Nothing is called after.
    pub end_ns: u64,
}

/// What a client process has seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadResult {
    /// Calls that were answered.
    pub calls: u64,
    /// Answers that were wrong.
    pub wrong: u64,
    /// How long each took.
    pub latencies: SparseLatencies,
}

/// A session with either peer: a request is sent, later its answer is waited for.
trait Session {
    fn send(&mut self, request: &[u8]) -> Result<(), BenchError>;
    fn receive(&mut self, answer: &mut [u8]) -> Result<usize, BenchError>;
}

fn ipc(doing: &'static str) -> impl FnOnce(IpcError) -> BenchError {
    move |error| BenchError::peer(doing, error)
}

struct Doorbell {
    client: IpcClient,
    connection: ConnectionId,
}

impl Doorbell {
    fn connect(path: &PathBuf, bulk: bool) -> Result<Self, BenchError> {
        let client = IpcClient::connect_with(path, &ClientConfig::smallest()).map_err(ipc("connecting"))?;
        let opened = if bulk { client.open_with(codec::RAW, true) } else { client.open() };
        let connection = opened.map_err(ipc("opening"))?.detach();
        Ok(Self { client, connection })
    }
}

impl Session for Doorbell {
    fn send(&mut self, request: &[u8]) -> Result<(), BenchError> {
        let connection = self.client.attached(self.connection);
        connection.submit(WORK, request, &CallOptions::default()).map_err(ipc("submitting"))?;
        self.client.flush().map_err(ipc("flushing"))
    }

    fn receive(&mut self, answer: &mut [u8]) -> Result<usize, BenchError> {
        loop {
            if let Some(taken) = self.client.poll_into(answer).map_err(ipc("polling"))? {
                return Ok(taken.len);
            }
            self.client.wait(None).map_err(ipc("waiting"))?;
        }
    }
}

struct Unix(UnixStream);

impl Unix {
    fn connect(address: &str) -> Result<Self, BenchError> {
        let kind = (AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC);
        let socket: OwnedFd = rustix::net::socket_with(kind.0, kind.1, kind.2, None)
            .map_err(|e| BenchError::os("socket", e))?;
        let address = SocketAddrUnix::new_abstract_name(address.as_bytes());
        let address = address.map_err(|e| BenchError::os("address", e))?;
        rustix::net::connect(&socket, &address).map_err(|e| BenchError::os("connect", e))?;
        Ok(Self(socket.into()))
    }
}

impl Session for Unix {
    fn send(&mut self, request: &[u8]) -> Result<(), BenchError> {
        let mut frame = [0; HEADER + SIZE];
        frame[..HEADER].copy_from_slice(&(request.len() as u64).to_le_bytes());
        frame[HEADER..].copy_from_slice(request);
        self.0.write_all(&frame).map_err(|e| BenchError::os("send", e))
    }

    fn receive(&mut self, answer: &mut [u8]) -> Result<usize, BenchError> {
        let mut frame = [0; HEADER + SIZE];
        self.0.read_exact(&mut frame).map_err(|e| BenchError::os("recv", e))?;
        answer[..SIZE].copy_from_slice(&frame[HEADER..]);
        Ok(SIZE)
    }
}

/// A client process.
///
/// # Errors
///
/// [`BenchError`] if the server cannot be reached or does not answer.
pub fn run(job: &LoadJob) -> Result<(), BenchError> {
    match &job.peer {
        Peer::Doorbell(path) => play(job, || Doorbell::connect(path, !job.keys)),
        Peer::Unix(address) => play(job, || Unix::connect(address)),
    }
}

fn play<S: Session>(job: &LoadJob, connect: impl Fn() -> Result<S, BenchError>) -> Result<(), BenchError> {
    let mut sessions = (0..job.sessions).map(|_| connect()).collect::<Result<Vec<_>, _>>()?;
    // The first calls find their lanes and touch their memory, of either peer.
    for _ in 0..WARM_UP {
        Seen::default().burst(&mut sessions)?;
    }
    say(&())?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(|e| BenchError::os("reading the schedule", e))?;
    let schedule: Schedule =
        serde_json::from_str(&line).map_err(|e| BenchError::option("job", e.to_string()))?;
    sleep_until(schedule.start_ns);
    let mut seen = Seen::default();
    let mut due = schedule.start_ns;
    while now_ns() < schedule.end_ns {
        seen.burst(&mut sessions)?;
        if job.keys {
            due += KEY_NS;
            sleep_until(due.min(schedule.end_ns));
        }
    }
    say(&LoadResult { calls: seen.calls, wrong: seen.wrong, latencies: seen.latencies.to_sparse() })
}

/// What has been seen so far.
#[derive(Default)]
struct Seen {
    calls: u64,
    wrong: u64,
    latencies: Latencies,
}

impl Seen {
    /// A call on every session, then every answer.
    fn burst(&mut self, sessions: &mut [impl Session]) -> Result<(), BenchError> {
        let (first, begun) = (self.calls, now_ns());
        let (mut request, mut answer) = ([0; SIZE], [0; SIZE]);
        // No two payloads are alike, of whatever process.
        let nonce = |index: usize| work::nonce(u64::from(std::process::id()) << 32 | (first + index as u64));
        for (index, session) in sessions.iter_mut().enumerate() {
            work::fill(nonce(index), &mut request);
            session.send(&request)?;
        }
        for (index, session) in sessions.iter_mut().enumerate() {
            let len = session.receive(&mut answer)?;
            self.calls += 1;
            self.wrong += u64::from(len != SIZE || !work::check(nonce(index), &answer));
            self.latencies.record(now_ns() - begun);
        }
        Ok(())
    }
}

//! A server, in a process of its own, whose handlers write down what they execute before they do it, in a file that
//! outlives it; to be killed and started again on the same path.

use super::TestDir;
use super::process::{Actor, ready};
use super::streams::pattern;
use doorbell::{
    Context, HandlerError, HandlerTable, IpcServer, MessageType, Pieces, Progress, Reply, ServerConfig,
};
use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Writes down the number at the begin of its body, works for as many microseconds as the next four bytes say, and answers
/// with the number and a checksum of the body.
pub const LOG: MessageType = MessageType(290);
/// Writes down the number, then does not return while there is a file `hang` beside the log.
pub const HANG: MessageType = MessageType(291);
/// Writes down the number, then answers with the bytes of [`pattern`] without end.
pub const NUMBERS: MessageType = MessageType(292);
/// As [`HANG`], and answers with the trace of the call behind that.
pub const TRACED: MessageType = MessageType(294);
/// Answers with the codec of the connection.
pub const CODEC: MessageType = MessageType(293);

/// The role of the server's process.
pub const ROLE: &str = "log-server";

struct State {
    log: File,
    hang: PathBuf,
}

fn write_down(state: &State, request: &[u8]) -> Result<u64, HandlerError> {
    let (id, _) = request
        .split_first_chunk::<8>()
        .ok_or_else(|| HandlerError::Decode("there is no number".to_owned()))?;
    // One write, appended: whole or not at all, whatever happens to this process.
    assert_eq!((&state.log).write(id).unwrap(), 8);
    Ok(u64::from_le_bytes(*id))
}

/// What no wrong body has the same of, as far as these tests go.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The request of a call of [`LOG`], `len` bytes long, at least 12.
pub fn log_request(id: u64, work_us: u32, len: usize) -> Vec<u8> {
    let mut request = [&id.to_le_bytes()[..], &work_us.to_le_bytes()].concat();
    request.extend((request.len()..len).map(|at| (at as u64 ^ id) as u8));
    request
}

/// What [`LOG`] answers a request.
pub fn log_answer(request: &[u8]) -> Vec<u8> {
    [&request[..8], &checksum(request).to_le_bytes()].concat()
}

fn log(context: &Context<'_, State>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    write_down(context.state(), request)?;
    let work = request[8..].first_chunk::<4>().map_or(0, |us| u32::from_le_bytes(*us));
    let until = Instant::now() + Duration::from_micros(work.into());
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    reply.write(&log_answer(request))
}

fn hang(context: &Context<'_, State>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    write_down(context.state(), request)?;
    while context.state().hang.exists() {
        std::thread::yield_now();
    }
    reply.write(&log_answer(request))
}

fn traced(context: &Context<'_, State>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    hang(context, request, reply)?;
    context.traceparent().map_or(Ok(()), |trace| reply.write(&trace.to_text()))
}

fn codec(context: &Context<'_, State>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&[context.codec()])
}

#[derive(Default)]
struct Numbers {
    at: usize,
}

impl Pieces<State> for Numbers {
    fn take(
        &mut self,
        context: &Context<'_, State>,
        bytes: &[u8],
        _: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        if !bytes.is_empty() {
            write_down(context.state(), bytes)?;
        }
        let more: Vec<u8> = (self.at..self.at + reply.room()).map(pattern).collect();
        self.at += more.len();
        reply.write(&more)?;
        Ok(Progress::Took(bytes.len()))
    }
}

fn numbers(_: &Context<'_, State>, _: Option<u64>) -> Result<Box<dyn Pieces<State>>, HandlerError> {
    Ok(Box::<Numbers>::default())
}

static TABLE: HandlerTable<State> = HandlerTable::with_builtins()
    .on(LOG, log)
    .on(HANG, hang)
    .on_pieces(NUMBERS, numbers)
    .on(CODEC, codec)
    .on(TRACED, traced);

/// In the server's process: serves until it is killed.
pub fn serve(path: &Path) {
    let directory = path.parent().unwrap();
    let log = File::options().append(true).create(true).open(directory.join("log")).unwrap();
    let state = State { log, hang: directory.join("hang") };
    let config = ServerConfig { max_sessions: 2048, max_connections: 4096, ..ServerConfig::default() };
    let bound = IpcServer::new(&TABLE, state).config(config).bind(path).unwrap();
    ready();
    bound.serve().unwrap();
}

/// Such a server.
pub struct LogServer {
    actor: Option<Actor>,
    path: PathBuf,
    pub directory: TestDir,
}

impl LogServer {
    pub fn start() -> Self {
        let mut server = Self::away();
        server.restart();
        server
    }

    /// One that is not there yet.
    pub fn away() -> Self {
        let directory = TestDir::new();
        Self { actor: None, path: directory.join("s"), directory }
    }

    /// Starts it, once the last one is gone; it listens when this returns.
    pub fn restart(&mut self) {
        assert!(self.actor.is_none());
        self.actor = Some(Actor::ready(ROLE, &self.path));
    }

    pub fn kill(&mut self) {
        self.actor.take().unwrap().process.kill();
    }

    pub fn stop(&self) {
        self.actor.as_ref().unwrap().process.stop();
    }

    /// Calls of [`HANG`] hang from here on, or no longer.
    pub fn let_hang(&self, hang: bool) {
        let file = self.directory.join("hang");
        match hang {
            true => drop(File::create(file).unwrap()),
            false => std::fs::remove_file(file).unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls executed so far.
    pub fn executions(&self) -> u64 {
        std::fs::metadata(self.directory.join("log")).map_or(0, |log| log.len() / 8)
    }

    /// How often each call has been executed, by its number.
    pub fn executed(&self) -> HashMap<u64, u32> {
        let log = std::fs::read(self.directory.join("log")).unwrap_or_default();
        let (ids, rest) = log.as_chunks::<8>();
        assert!(rest.is_empty());
        let mut executed = HashMap::new();
        for id in ids {
            *executed.entry(u64::from_le_bytes(*id)).or_default() += 1;
        }
        executed
    }
}

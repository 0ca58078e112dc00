//! The demonstration's server: the work of the benchmarks, and a handler that writes down what it executes before it
//! answers.

use super::super::bench::error::BenchError;
use super::super::bench::work;
use super::super::bench::worker::say;
use doorbell::{Context, HandlerError, HandlerTable, IpcError, IpcServer, MessageType, Reply, ServerConfig};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

/// Answers with every word of the request XOR a constant.
pub const WORK: MessageType = MessageType::USER;
/// Writes down the number that its request begins with, then answers as [`WORK`].
pub const LOGGED: MessageType = MessageType(MessageType::USER.0 + 1);
/// Bytes of an entry of the log: the server's number and the call's.
pub const LOG_ENTRY: usize = 16;
/// What is answered at once, bytes.
const BLOCK: usize = 1024;

/// What the server's process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerJob {
    /// Where to listen.
    pub path: PathBuf,
    /// Where to write down what is executed; appended to.
    pub log: PathBuf,
    /// Which server this is, for the log.
    pub number: u64,
    /// Sessions, and connections, that there may be.
    pub sessions: u32,
}

struct State {
    log: File,
    number: u64,
}

static TABLE: HandlerTable<State> = HandlerTable::with_builtins().on(WORK, answer).on(LOGGED, logged);

fn answer(_: &Context<'_, State>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let mut out = [0; BLOCK];
    for part in request.chunks(BLOCK) {
        work::answer(part, &mut out);
        reply.write(&out[..part.len()])?;
    }
    Ok(())
}

fn logged(context: &Context<'_, State>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let State { log, number } = context.state();
    let (call, _) = request
        .split_first_chunk::<8>()
        .ok_or_else(|| HandlerError::Decode("a request begins with the number of its call".to_owned()))?;
    let entry = [number.to_le_bytes(), *call];
    // One write, appended: whole or not at all, whatever happens to this process.
    (&mut &*log).write_all(entry.as_flattened()).map_err(|e| HandlerError::Failed(e.to_string()))?;
    answer(context, request, reply)
}

/// Serves until it is killed.
///
/// # Errors
///
/// [`BenchError`] if it cannot serve.
pub fn run(job: &ServerJob) -> Result<(), BenchError> {
    let log = File::options().create(true).append(true).open(&job.log);
    let log = log.map_err(|e| BenchError::os("opening the log", e))?;
    let peer = |doing| move |error: IpcError| BenchError::peer(doing, error);
    let (max_sessions, max_connections) = (job.sessions, job.sessions + 32);
    let config = ServerConfig { max_sessions, max_connections, ..ServerConfig::default() };
    let server = IpcServer::new(&TABLE, State { log, number: job.number }).config(config);
    let bound = server.bind(&job.path).map_err(peer("binding"))?;
    say(&())?;
    bound.serve().map(|_| ()).map_err(peer("serving"))
}

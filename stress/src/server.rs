//! The server process, and its handler: the echo under a mask of `content.rs`. A body of more than one frame is answered
//! as it comes: the server never has it as a whole.

use crate::content;
use crate::error::StressError;
use crate::processes::{self, Process, Role};
use doorbell::provider::{HostHandle, ProviderHost, ProviderPool, ProvidersConfig};
use doorbell::{
    Context, HandlerError, HandlerTable, IpcServer, MessageType, Pieces, Progress, Reply, ServerConfig,
    WaitPolicy,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

/// The echo under a mask.
pub const MASKED_ECHO: MessageType = MessageType::USER;
/// Bytes worked on at once, in memory of the handler's own.
const BLOCK: usize = 512;
/// How long a server may take to start.
const START: Duration = Duration::from_secs(30);

static TABLE: HandlerTable<()> =
    HandlerTable::with_builtins().on(MASKED_ECHO, masked_echo).on_pieces(MASKED_ECHO, masked_pieces);

static ASSISTANTS: HandlerTable<HostHandle> = HandlerTable::with_builtins().register_provider_handlers();

fn masked_echo(_: &Context<'_, ()>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    mask_whole(request, reply)
}

/// Answers a whole request of whole blocks under a mask.
///
/// # Errors
///
/// [`HandlerError`] for one that does not consist of them.
pub fn mask_whole(request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let (blocks, []) = request.as_chunks::<BLOCK>() else {
        return Err(HandlerError::Decode(format!("{} bytes are not whole blocks", request.len())));
    };
    for block in blocks {
        let mut masked = [0; BLOCK];
        content::answer(block, &mut masked);
        reply.write(&masked)?;
    }
    Ok(())
}

fn masked_pieces(_: &Context<'_, ()>, _: Option<u64>) -> Result<Box<dyn Pieces<()>>, HandlerError> {
    // Has no state: nothing is allocated.
    Ok(Box::new(MaskedPieces))
}

/// The echo under a mask of a body that comes in pieces. It knows nothing of what has to come: it cannot help anybody to
/// a right answer.
struct MaskedPieces;

impl Pieces<()> for MaskedPieces {
    fn take(
        &mut self,
        _: &Context<'_, ()>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        mask_piece(bytes, last, reply)
    }
}

/// Answers a piece of a body of whole words under a mask, as far as there is room.
///
/// # Errors
///
/// [`HandlerError`] for a body that does not consist of them.
pub fn mask_piece(bytes: &[u8], last: bool, reply: &mut Reply<'_>) -> Result<Progress, HandlerError> {
    let words = bytes.len().min(reply.room()) / 8 * 8;
    for part in bytes[..words].chunks(BLOCK) {
        let mut masked = [0; BLOCK];
        content::answer(part, &mut masked[..part.len()]);
        reply.write(&masked[..part.len()])?;
    }
    if last && !bytes.len().is_multiple_of(8) {
        return Err(HandlerError::Decode("the body does not consist of whole words".to_owned()));
    }
    Ok(if last && words == bytes.len() { Progress::Done } else { Progress::Took(words) })
}

/// What a server process is told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ServerJob {
    /// Where to listen.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// Its limit: the level's connections and none more.
    pub connections: u32,
    /// The same for sessions.
    pub sessions: u32,
    /// Handshakes of one process that may be under way, where that is not the default.
    pub half_open_per_process: Option<u32>,
    /// Where the files lie that clients may have analysed. With it the server has providers, too, and sleeps while there
    /// is nothing to do: they need the core.
    pub files: Option<PathBuf>,
}

/// Starts a server process; it listens when this returns.
///
/// # Errors
///
/// [`StressError`] if it does not start.
pub fn start(job: &ServerJob) -> Result<Process, StressError> {
    let mut process = processes::spawn(Role::Server, job, Stdio::null())?;
    let () = process.receive(START)?;
    Ok(process)
}

/// The server process itself.
///
/// # Errors
///
/// Whatever keeps it from serving.
pub fn serve(job: &ServerJob) -> Result<(), StressError> {
    let usual = ServerConfig::default();
    let config = ServerConfig {
        // Who is silent here is silent on purpose.
        idle_timeout: None,
        policy: if job.files.is_some() { WaitPolicy::Handoff } else { WaitPolicy::Spin },
        reactors: 1,
        cores: vec![job.core],
        max_connections: job.connections,
        max_sessions: job.sessions,
        max_half_open: job.sessions.min(usual.max_half_open),
        max_half_open_per_process: job.half_open_per_process.unwrap_or(usual.max_half_open_per_process),
        file_roots: job.files.iter().cloned().collect(),
        ..usual
    };
    if job.files.is_none() {
        return listen(IpcServer::new(&TABLE, ()), config, job);
    }
    let pool = ProviderPool::from_config(&ProvidersConfig::default())
        .map_err(|fault| StressError::Providers(fault.to_string()))?;
    let host = ProviderHost::start(Arc::new(pool)).map_err(|e| StressError::os("clone for providers", e))?;
    listen(IpcServer::new(&ASSISTANTS, host.handle()), config, job)
}

fn listen<S: Send + Sync>(
    server: IpcServer<S>,
    config: ServerConfig,
    job: &ServerJob,
) -> Result<(), StressError> {
    let bound = server.config(config).bind(&job.path).map_err(StressError::ipc("binding"))?;
    processes::say(&())?;
    bound.serve().map_err(StressError::ipc("serving"))?;
    Ok(())
}

//! The proof: a real server on a path of its own, and a client that calls it. What no single check foresees shows here.

use super::super::findings::Trial;
use doorbell::{
    BoundServer, CallOptions, ClientConfig, Connection, HandlerTable, IpcClient, IpcError, IpcServer,
    MessageType, ServerConfig,
};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

static TABLE: HandlerTable<()> = HandlerTable::with_builtins();

/// How long all of it may take. It takes less than a tenth of a second.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one call may take.
const CALL_PATIENCE: Duration = Duration::from_secs(2);
/// Calls one after the other.
const BACK_TO_BACK: usize = 200;
/// Calls after a pause, and how long that is.
const AFTER_PAUSE: usize = 20;
const PAUSE: Duration = Duration::from_millis(1);

/// Starts a server of `config`, with room for a few sessions only, calls it, and stops it.
pub fn run(config: &ServerConfig) -> Trial {
    let directory = match Scratch::new() {
        Ok(directory) => directory,
        Err(why) => return Trial::NotTried(why),
    };
    let path = directory.0.join("s");
    let config = ServerConfig {
        max_sessions: 4,
        max_half_open: 4,
        // A machine that is busy at the moment is not unfit.
        handshake_timeout: CALL_PATIENCE,
        ..config.clone()
    };
    let bound = match IpcServer::new(&TABLE, ()).config(config).bind(&path) {
        Ok(bound) => bound,
        // The directory for temporary files is unfit, which a server elsewhere need not mind.
        Err(error @ (IpcError::SocketPath { .. } | IpcError::SocketPathTooLong { .. })) => {
            return Trial::NotTried(error.to_string());
        }
        // Said better of the sessions that are wanted.
        Err(IpcError::Config(_)) => {
            return Trial::NotTried("too few file descriptors may be opened".to_owned());
        }
        Err(error) => return Trial::Failed(error.to_string()),
    };
    let (tell, told) = channel();
    // Not a scoped thread: if it hangs, that is the finding, and the process ends without it.
    let thread = std::thread::Builder::new().name("trial".to_owned()).spawn(move || {
        // Whoever is late has nobody to tell.
        tell.send(serve_and_call(bound, &path)).ok();
    });
    if let Err(error) = thread {
        return Trial::Failed(format!("no thread can be started: {error}"));
    }
    match told.recv_timeout(PATIENCE) {
        Ok(trial) => trial,
        Err(RecvTimeoutError::Timeout) => Trial::Failed(format!("nothing happened for {PATIENCE:?}")),
        Err(RecvTimeoutError::Disconnected) => Trial::Failed("the server panicked".to_owned()),
    }
}

fn serve_and_call(bound: BoundServer<()>, path: &Path) -> Trial {
    let stop = bound.shutdown_handle();
    let (served, called) = std::thread::scope(|scope| {
        let server = scope.spawn(|| bound.serve());
        let called = call(path);
        // A server that has ended by itself says why below.
        stop.shutdown().ok();
        (server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), called)
    });
    match (served, called) {
        (Err(error), _) => Trial::Failed(error.to_string()),
        (Ok(_), Err(error)) => Trial::Failed(error),
        (Ok(_), Ok((back_to_back_ns, after_pause_ns))) => Trial::Answered { back_to_back_ns, after_pause_ns },
    }
}

/// Medians of calls without and with a pause before, ns.
fn call(path: &Path) -> Result<(u64, u64), String> {
    let config = ClientConfig { connect_timeout: CALL_PATIENCE, ..ClientConfig::default() };
    let client = IpcClient::connect_with(path, &config).map_err(|error| error.to_string())?;
    let connection = client.open().map_err(|error| error.to_string())?;
    let back_to_back = median(&connection, BACK_TO_BACK, Duration::ZERO)?;
    Ok((back_to_back, median(&connection, AFTER_PAUSE, PAUSE)?))
}

fn median(connection: &Connection<'_>, calls: usize, pause: Duration) -> Result<u64, String> {
    let options = CallOptions { timeout: Some(CALL_PATIENCE), ..CallOptions::default() };
    let mut took = Vec::new();
    for number in 0..calls {
        std::thread::sleep(pause);
        let request = [number as u8; 64];
        let began = Instant::now();
        let answer = connection.call_with(MessageType::ECHO, &request, &options, |answer| answer.to_vec());
        let ns = began.elapsed().as_nanos() as u64;
        if answer.and_then(|answer| answer).map_err(|error| error.to_string())? != request {
            return Err(format!("the answer to call {number} differs from its request"));
        }
        took.push(ns);
    }
    took.sort_unstable();
    Ok(took[took.len() / 2])
}

/// A directory for one socket, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("doorbell-doctor-{}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(error) => Err(format!("mkdir {}: {error}", path.display())),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("doorbell: {} could not be removed: {error}", self.0.display());
        }
    }
}

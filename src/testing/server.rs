//! A server on a thread of the test.

use super::Directory;
use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use crate::metrics::Metrics;
use crate::server::{HandlerTable, IpcServer, ShutdownHandle, TABLE_LEN};
use std::fmt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// A server of the test's own handlers, on a thread of this process, stopped when dropped. One reactor, so that calls are
/// executed one after the other, and what it counts is exact.
pub struct TestServer<S: Clone + Send + Sync + 'static, const N: usize = TABLE_LEN> {
    table: &'static HandlerTable<S, N>,
    state: S,
    config: ServerConfig,
    running: Option<Running>,
    path: PathBuf,
    _directory: Directory,
}

struct Running {
    stop: ShutdownHandle,
    thread: JoinHandle<Result<Metrics>>,
}

impl<S: Clone + Send + Sync + 'static, const N: usize> TestServer<S, N> {
    /// Starts a server; clients can connect when this returns.
    ///
    /// # Errors
    ///
    /// As for [`IpcServer::bind`].
    pub fn start(table: &'static HandlerTable<S, N>, state: S) -> Result<Self> {
        let config =
            ServerConfig { reactors: 1, pinned: false, thin_executable: false, ..ServerConfig::default() };
        Self::start_with(table, state, config)
    }

    /// The same with other limits.
    ///
    /// # Errors
    ///
    /// As for [`TestServer::start`].
    pub fn start_with(table: &'static HandlerTable<S, N>, state: S, config: ServerConfig) -> Result<Self> {
        let directory = Directory::new()?;
        let path = directory.socket();
        let mut server = Self { table, state, config, running: None, path, _directory: directory };
        server.restart()?;
        Ok(server)
    }

    /// Where clients connect; the same after each restart.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops it in order: clients are told. Returns what it has counted; `None` if it had been stopped.
    ///
    /// # Errors
    ///
    /// What made it end before.
    pub fn stop(&mut self) -> Result<Option<Metrics>> {
        let Some(Running { stop, thread }) = self.running.take() else { return Ok(None) };
        stop.shutdown()?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Some)
    }

    /// Starts it again on the same path, with the same state; stops it first if it is running.
    ///
    /// # Errors
    ///
    /// As for [`TestServer::start`] and [`TestServer::stop`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let server = IpcServer::new(self.table, self.state.clone()).config(self.config.clone());
        let bound = server.bind(&self.path)?;
        let stop = bound.shutdown_handle();
        let thread = std::thread::Builder::new()
            .name("doorbell-test-server".to_owned())
            .spawn(move || bound.serve())
            .map_err(|e| IpcError::io("starting the thread of a test's server", e))?;
        self.running = Some(Running { stop, thread });
        Ok(())
    }
}

impl<S: Clone + Send + Sync + 'static, const N: usize> Drop for TestServer<S, N> {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "a test's server");
        }
    }
}

impl<S: Clone + Send + Sync + 'static, const N: usize> fmt::Debug for TestServer<S, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestServer").field("path", &self.path).finish_non_exhaustive()
    }
}

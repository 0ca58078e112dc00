//! The server: a static handler table, a listener, a reactor for each core.

pub mod builtin;
mod connections;
pub(crate) mod core;
mod crew;
#[cfg(fuzzing)]
pub mod fuzz;
mod half_open;
mod home;
mod lane;
mod listener;
mod process;
mod reactor;
mod spin;
mod staging;
mod start;
mod storm;
mod table;
mod throttle;

pub use connections::ConnectionPool;
pub use staging::BufferPool;
pub use table::{Context, Handler, HandlerError, HandlerTable, Reply, TABLE_LEN};

use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use crate::metrics::Metrics;
use listener::Listener;
use rustix::pipe::PipeFlags;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// A server before it is bound: a handler table, the state its handlers share, limits.
///
/// ```no_run
/// use doorbell::{HandlerTable, IpcServer};
///
/// static TABLE: HandlerTable<()> = HandlerTable::with_builtins();
///
/// fn main() -> doorbell::Result<()> {
///     IpcServer::new(&TABLE, ()).bind(doorbell::default_socket_path())?.serve()?;
///     Ok(())
/// }
/// ```
pub struct IpcServer<S: 'static> {
    handlers: &'static [Option<Handler<S>>],
    state: S,
    config: ServerConfig,
}

impl<S: Send + Sync + 'static> IpcServer<S> {
    /// A server of `table` with the default limits.
    pub fn new<const N: usize>(table: &'static HandlerTable<S, N>, state: S) -> Self {
        Self { handlers: table.as_slice(), state, config: ServerConfig::default() }
    }

    /// The same with other limits.
    pub fn config(mut self, config: ServerConfig) -> Self {
        self.config = config;
        self
    }

    /// Takes the socket path. From here on clients queue; they are answered once [`BoundServer::serve`]
    /// runs.
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] for a limit out of range; [`IpcError::AlreadyRunning`],
    /// [`IpcError::SocketPath`] or [`IpcError::SocketPathTooLong`] for a path that cannot be had.
    pub fn bind(self, path: impl AsRef<Path>) -> Result<BoundServer<S>> {
        self.config.check()?;
        self.config.raise_file_limit()?;
        let listener = Listener::bind(path.as_ref())?;
        let (stop, bell) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| IpcError::io("pipe for the shutdown handle", e))?;
        Ok(BoundServer { server: self, listener, stop, shutdown: ShutdownHandle { bell: Arc::new(bell) } })
    }
}

/// A server that holds its path and can serve.
pub struct BoundServer<S: 'static> {
    server: IpcServer<S>,
    listener: Listener,
    /// Readable once the server has to stop.
    stop: OwnedFd,
    shutdown: ShutdownHandle,
}

impl<S: Send + Sync + 'static> BoundServer<S> {
    /// The path clients connect to.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// A handle that stops this server from any thread or signal handler.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
    }

    /// Serves until stopped, on the calling thread and one more for each further reactor; returns what was
    /// counted. Clients are told why.
    ///
    /// A pinned reactor pins its thread, so the calling thread is pinned until this returns.
    ///
    /// # Errors
    ///
    /// [`IpcError::Uring`] if this machine refuses io_uring, saying which operation and the likely cause;
    /// [`IpcError::Config`] for a core that may not be used; [`IpcError::Driver`] if the kernel fails a running
    /// ring. A client can cause none of them.
    pub fn serve(self) -> Result<Metrics> {
        let IpcServer { handlers, state, config } = self.server;
        start::serve(handlers, Arc::new(state), config, self.listener, self.stop, self.shutdown)
    }
}

/// Stops a server from outside. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShutdownHandle {
    bell: Arc<OwnedFd>,
}

impl ShutdownHandle {
    /// Asks the server to take leave of its clients and return from [`BoundServer::serve`].
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the server has returned already.
    pub fn shutdown(&self) -> Result<()> {
        match rustix::io::write(&*self.bell, &[1]) {
            // A full pipe has been written to often enough.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(IpcError::io("write to the shutdown pipe", e)),
        }
    }

    /// The writing end of a pipe: a byte written to it stops the server, which a signal handler may do.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.bell
    }
}

//! The server: a static handler table, a listener, a reactor for each core.

mod analyze;
mod bodies;
pub(crate) mod budget;
pub mod builtin;
mod connections;
pub(crate) mod core;
mod crew;
mod deferred;
mod exchange;
pub mod files;
#[cfg(fuzzing)]
pub mod fuzz;
mod half_open;
mod home;
mod jobs;
mod lane;
mod leases;
mod listener;
mod memory;
mod process;
mod reactor;
#[cfg(any(test, fuzzing))]
pub mod simulation;
mod spin;
mod staging;
mod start;
mod storm;
mod table;
pub(crate) mod throttle;
mod tickets;

pub use connections::ConnectionPool;
pub use deferred::{Answering, AsyncHandler, Deferred, DeferredError, DeferredHandler, Executor};
pub use listener::check_socket_path;
pub use staging::BufferPool;
pub use start::{reactor_cores, wake_cost};
pub use table::{
    Context, FileQuestion, FileQuestionHandler, Handler, HandlerError, HandlerTable, MakePieces, Pieces,
    Progress, Reply, TABLE_LEN,
};

use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use crate::metrics::Metrics;
use analyze::FileSource;
use files::Roots;
use listener::Listener;
use rustix::pipe::PipeFlags;
use start::Helpers;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
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
    handlers: &'static [table::Entry<S>],
    state: S,
    config: ServerConfig,
    executor: Option<Executor>,
}

impl<S: Send + Sync + 'static> IpcServer<S> {
    /// A server of `table` with the default limits.
    pub fn new<const N: usize>(table: &'static HandlerTable<S, N>, state: S) -> Self {
        Self { handlers: table.as_slice(), state, config: ServerConfig::default(), executor: None }
    }

    /// The same with other limits.
    pub fn config(mut self, config: ServerConfig) -> Self {
        self.config = config;
        self
    }

    /// The same with somebody who runs the futures of [`HandlerTable::on_async`]: what spawns a task on the runtime of
    /// the embedder, such as `|task| { handle.spawn(task); }` with a handle of tokio's. Called on a reactor's thread.
    pub fn executor(
        mut self,
        executor: impl Fn(Pin<Box<dyn Future<Output = ()> + Send>>) + Send + Sync + 'static,
    ) -> Self {
        self.executor = Some(Box::new(executor));
        self
    }

    /// Takes the socket path. From here on clients queue; they are answered once [`BoundServer::serve`]
    /// runs.
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] for a limit out of range, a directory in `file_roots` that cannot be opened, or handlers
    /// that are futures without an [`executor`](IpcServer::executor);
    /// [`IpcError::AlreadyRunning`],
    /// [`IpcError::SocketPath`] or [`IpcError::SocketPathTooLong`] for a path that cannot be had.
    pub fn bind(self, path: impl AsRef<Path>) -> Result<BoundServer<S>> {
        self.config.check()?;
        let future = |entry: &table::Entry<S>| matches!(entry.elsewhere, Some(table::Elsewhere::Future(_)));
        if self.executor.is_none()
            && let Some(message_type) = self.handlers.iter().position(future)
        {
            return Err(IpcError::Config(format!(
                "the handler of message type {message_type} is a future, and nothing runs it: give the server an \
                 executor"
            )));
        }
        self.config.raise_file_limit()?;
        let roots = Roots::open(&self.config.file_roots, self.config.max_file_size)?;
        let listener = Listener::bind(path.as_ref())?;
        let (stop, bell) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| IpcError::io("pipe for the shutdown handle", e))?;
        let shutdown = ShutdownHandle { bell: Arc::new(bell) };
        Ok(BoundServer { server: self, roots, listener, stop, shutdown })
    }
}

/// A server that holds its path and can serve.
pub struct BoundServer<S: 'static> {
    server: IpcServer<S>,
    roots: Roots,
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
    /// [`IpcError::Uring`] if the server was told to use io_uring and this machine refuses it, saying which operation
    /// and the likely cause;
    /// [`IpcError::Config`] for a core that may not be used; [`IpcError::Driver`] if the kernel fails what a running
    /// reactor waits with. A client can cause none of them.
    pub fn serve(self) -> Result<Metrics> {
        let IpcServer { handlers, state, config, executor } = self.server;
        let files = Arc::new(FileSource::new(self.roots));
        let helpers = Helpers { files, executor: executor.map(Arc::new) };
        start::serve(handlers, Arc::new(state), config, helpers, self.listener, self.stop, self.shutdown)
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

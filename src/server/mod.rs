//! The server: a static handler table, a listener, a reactor for each core.

#[cfg(feature = "messages")]
mod analyze;
#[cfg(not(feature = "messages"))]
#[path = "without_messages.rs"]
mod analyze;
mod bodies;
pub(crate) mod budget;
pub mod builtin;
mod connections;
mod control;
pub(crate) mod core;
mod crew;
mod deferred;
mod drain;
mod exchange;
#[cfg(feature = "messages")]
pub mod files;
#[cfg(fuzzing)]
pub mod fuzz;
mod half_open;
mod home;
mod idle;
mod inspect;
mod jobs;
mod json;
mod lane;
mod leases;
mod linger;
mod listener;
mod memory;
mod process;
mod reactor;
#[cfg(test)]
pub(crate) mod simulated;
#[cfg(any(test, fuzzing))]
pub mod simulation;
mod spin;
mod staging;
mod start;
mod storm;
mod table;
pub(crate) mod throttle;
mod tickets;
mod trace;
mod watch;

#[cfg(feature = "messages")]
pub use analyze::FileQuestion;
pub use connections::ConnectionPool;
pub use control::{ReloadHandle, ShutdownHandle};
pub use deferred::{Answering, AsyncHandler, Deferred, DeferredError, DeferredHandler, Executor};
pub(crate) use listener::open_start_lock;
pub use listener::{check_socket_path, prepare_default_directory};
pub use staging::BufferPool;
pub use start::{reactor_cores, wake_cost};
#[cfg(feature = "messages")]
pub use table::FileQuestionHandler;
pub use table::{
    Context, Handler, HandlerError, HandlerTable, MakePieces, Pieces, Progress, Reply, TABLE_LEN,
};
pub use watch::Caretaker;

use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use crate::metrics::{Metrics, MetricsReader};
use analyze::FileSource;
use control::Control;
use listener::Listener;
use start::Helpers;
use std::os::fd::{BorrowedFd, OwnedFd};
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
    /// [`IpcError::Config`] for a limit out of range, a directory in `file_roots` that cannot be opened (any of
    /// them without the feature `messages`), or handlers that are futures without an
    /// [`executor`](IpcServer::executor); [`IpcError::AlreadyRunning`], [`IpcError::SocketPath`] or
    /// [`IpcError::SocketPathTooLong`] for a path that cannot be had.
    pub fn bind(self, path: impl AsRef<Path>) -> Result<BoundServer<S>> {
        self.bind_with(|| Listener::bind(path.as_ref()))
    }

    /// Takes over a socket that listens for packets at `path` already, from a service manager or from the server before:
    /// whoever has connected meanwhile is answered by this one. The socket is left there in the end.
    ///
    /// # Errors
    ///
    /// As for [`IpcServer::bind`]; [`IpcError::SocketPath`] if the socket is another one.
    pub fn inherit(self, socket: OwnedFd, path: impl AsRef<Path>) -> Result<BoundServer<S>> {
        self.bind_with(|| Listener::inherit(socket, path.as_ref()))
    }

    fn bind_with(self, listener: impl FnOnce() -> Result<Listener>) -> Result<BoundServer<S>> {
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
        let files = FileSource::open(&self.config)?;
        let listener = listener()?;
        let (control, shutdown, reload) = Control::new()?;
        Ok(BoundServer {
            server: self,
            files,
            listener,
            control,
            shutdown,
            reload,
            metrics: MetricsReader::default(),
            caretaker: None,
            ready: None,
        })
    }
}

/// A server that holds its path and can serve.
pub struct BoundServer<S: 'static> {
    server: IpcServer<S>,
    files: FileSource,
    listener: Listener,
    control: Control,
    shutdown: ShutdownHandle,
    reload: ReloadHandle,
    metrics: MetricsReader,
    caretaker: Option<Box<dyn Caretaker>>,
    ready: Option<Box<dyn FnOnce() + Send>>,
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

    /// A handle that gives this server new limits, from any thread.
    pub fn reload_handle(&self) -> ReloadHandle {
        self.reload.clone()
    }

    /// Reads what this server counts, from any thread.
    pub fn metrics(&self) -> MetricsReader {
        self.metrics.clone()
    }

    /// The socket that listens, to be handed to whoever shall keep it beyond this server's end.
    pub fn listening_socket(&self) -> BorrowedFd<'_> {
        self.listener.socket()
    }

    /// The same, but the socket is left at its path in the end, and nobody is accepted while the server drains: somebody
    /// else has the socket, and whoever connects waits for him.
    pub fn leave_socket(mut self) -> Self {
        self.listener.leave();
        self
    }

    /// The same, and `ready` is called on the thread that serves when every reactor has what it needs, right before the
    /// first client is answered.
    pub fn on_ready(mut self, ready: impl FnOnce() + Send + 'static) -> Self {
        self.ready = Some(Box::new(ready));
        self
    }

    /// The same with somebody who is told that the reactors are well, and does what else is to be done beside them.
    pub fn caretaker(mut self, caretaker: impl Caretaker + 'static) -> Self {
        self.caretaker = Some(Box::new(caretaker));
        self
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
        let helpers = Helpers {
            files: Arc::new(self.files),
            executor: executor.map(Arc::new),
            metrics: self.metrics,
            caretaker: self.caretaker,
            ready: self.ready,
        };
        start::serve(handlers, Arc::new(state), config, helpers, self.listener, self.control, self.shutdown)
    }
}

//! doorbell: request/response IPC between processes of one Linux machine.
//!
//! Payloads travel through shared memory, io_uring futexes are the doorbells, a single-threaded reactor
//! dispatches handlers from a static table. `ARCHITECTURE.md` says how it fits together.
//!
//! - Server: [`IpcServer`] with a [`HandlerTable`].
//! - Client: [`IpcClient`]; [`ReconnectingClient`] comes back to a server that was away; for the tasks of tokio `AsyncClient`; for threads that must not wait [`CallbackClient`].

/// The examples of README.md, compiled.
#[cfg(all(doctest, feature = "tokio"))]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;

/// Those of the book.
#[cfg(doctest)]
#[doc = include_str!("../docs/quick-start.md")]
struct BookExamples;

mod client;
#[cfg(feature = "messages")]
pub mod codec;
pub mod config;
mod error;
#[cfg(feature = "exporter")]
pub mod exporter;
pub mod inspect;
mod machine;
#[cfg(feature = "messages")]
pub mod messages;
mod metrics;
pub mod protocol;
#[cfg(feature = "providers")]
pub mod provider;
mod server;
#[cfg(test)]
mod simulation;
#[cfg(feature = "testing")]
pub mod testing;

pub use client::{
    AnswerRecords, AnswerStream, CallHandle, CallId, CallOptions, CallbackClient, CallbackConfig,
    ClientConfig, Connecting, Connection, ConnectionId, IpcClient, LinkOptions, LinkStatus, PendingCall,
    PendingOutcome, Reconnect, ReconnectingClient, ReconnectingConnection, ReconnectingRecords,
    ReconnectingStream, Reply as Answer, SlotWriter, StatusCallback, StreamEvent,
};
#[cfg(feature = "tokio")]
pub use client::{AsyncAnswer, AsyncClient, AsyncRecords};
pub use config::{Backend, Movable, ServerConfig, WaitPolicy};
pub use doorbell_shm::entry::Status;
pub use error::{IpcError, Result};
#[doc(hidden)]
pub use metrics::StopWatch;
pub use metrics::{
    BOUNDS_NS, BUCKETS, Counters, Metrics, MetricsReader, OTHER_TYPES, ReactorMetrics, TypeMetrics,
};
pub use protocol::{MessageType, TraceParent, TraceParentError, default_socket_path};
#[cfg(feature = "providers")]
pub use provider::ProviderPool;
pub use server::{
    Answering, AsyncHandler, BoundServer, BufferPool, Caretaker, ConnectionPool, Context, Deferred,
    DeferredError, DeferredHandler, Executor, Handler, HandlerError, HandlerTable, IpcServer, MakePieces,
    Pieces, Progress, ReloadHandle, Reply, ShutdownHandle, TABLE_LEN, check_socket_path,
    prepare_default_directory, reactor_cores, wake_cost,
};
#[cfg(feature = "messages")]
pub use server::{FileQuestion, FileQuestionHandler, files};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use server::{fuzz, simulation};

//! Providers: what answers `Complete` and `Chat`, be it a service on the network or a loopback in this process.
//!
//! ```text
//! reactor --- submit ---> ProviderHost (one thread) ---> ProviderPool ---> Provider (Loopback, OpenAi, yours)
//!    <---- ChunkSink: chunks as they come, then finish or fail ----            | route, queue, time-outs, retry
//! ```
//!
//! A [`Provider`] knows one service and nothing of limits. The [`ProviderPool`] chooses a provider by model, bounds how
//! much runs at once, times out, tries again. The [`ProviderHost`] runs the pool on a thread of its own, off the
//! reactors, and hands what comes to a [`ChunkSink`]. `docs/providers.md` describes the configuration.
//!
//! No text of a conversation and no key is ever part of an error or a log line (trap 21).

mod cancel;
mod collect;
mod config;
mod error;
mod gate;
mod handlers;
mod host;
mod loopback;
#[cfg(feature = "openai")]
mod openai;
mod pool;
mod retry;
mod room;
mod route;
pub mod sse;
mod stream;

pub use cancel::CancelToken;
pub use collect::collect;
pub use config::{
    ConfigFault, LoopbackConfig, MaxTokensField, ProviderConfig, ProviderKind, ProvidersConfig, RetryConfig,
    Timeouts,
};
pub use error::{Phase, ProviderError};
pub use handlers::HasProviders;
pub use host::{ChunkSink, Gone, HostHandle, ProviderHost};
pub use loopback::Loopback;
#[cfg(feature = "openai")]
pub use openai::OpenAi;
pub use pool::{Health, ProviderPool, ProviderPoolBuilder};
pub use stream::Answer;

use crate::messages::{AIRequest, AIResponse, StreamChunk};
use crate::protocol::TraceParent;
use futures_core::Stream;
use std::pin::Pin;
use std::sync::Arc;

/// A future that can be called through a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The chunks of an answer as a provider gives them: any number, the last one `End`; or an error, and nothing after it.
pub type ChunkStream = Pin<Box<dyn Stream<Item = Result<StreamChunk, ProviderError>> + Send>>;

/// What is asked of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A completion (`MessageType::COMPLETE`).
    Complete,
    /// The next turn of a conversation (`MessageType::CHAT`).
    Chat,
}

/// One request on its way to a provider. Cheap to clone; all clones share one token.
#[derive(Debug, Clone)]
pub struct Call {
    /// What is asked.
    pub kind: Kind,
    /// The request. Whether it wants a stream is for whoever calls to obey.
    pub request: Arc<AIRequest>,
    /// Ends the call early.
    pub cancel: CancelToken,
    /// The trace that it belongs to; passed on to a service on the network as it came.
    pub traceparent: Option<TraceParent>,
}

impl Call {
    /// A call with a token of its own, of no trace.
    pub fn new(kind: Kind, request: AIRequest) -> Self {
        Self { kind, request: Arc::new(request), cancel: CancelToken::new(), traceparent: None }
    }

    /// The same call as part of a trace.
    pub fn with_traceparent(self, traceparent: Option<TraceParent>) -> Self {
        Self { traceparent, ..self }
    }
}

/// A service that answers requests.
///
/// To drop a future or a stream is to cancel it: nothing of the call goes on, and a connection that it used is closed.
/// [`Call::cancel`] does the same from elsewhere; the call then ends with [`ProviderError::Cancelled`]. Futures need a
/// tokio runtime with time and, for providers on the network, I/O; the one of [`ProviderHost`] has them.
pub trait Provider: Send + Sync {
    /// Names it in the configuration, in errors and in logs.
    fn name(&self) -> &str;

    /// The whole answer to a [`Kind::Chat`].
    fn chat<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>>;

    /// The whole answer to a [`Kind::Complete`]; as a chat unless the provider has something better.
    fn complete<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        self.chat(call)
    }

    /// The answer as it comes. The future ends when the provider has accepted the request, or refused it.
    fn stream<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<ChunkStream, ProviderError>>;

    /// Ends a call early, wherever it is.
    fn cancel(&self, call: &Call) {
        call.cancel.cancel();
    }

    /// Whether it can be reached and accepts us. Asks for no answer of a model.
    fn health(&self) -> BoxFuture<'_, Result<(), ProviderError>>;
}

//! The thread on which providers run, off the reactors.

use super::room::{Room, Share};
use super::{Answer, Call, Kind, ProviderError, ProviderPool};
use crate::messages::{AIRequest, AIResponse, FinishReason, StreamChunk};
use futures_core::Stream;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

/// The caller has gone, or wants no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the caller wants no more")]
pub struct Gone;

/// Where the answer to one request goes. Used by one thread, that of the host.
///
/// `poll_ready`, then `chunk`, any number of times, the last chunk being `End`, then `finish`; or `answer`, where no stream
/// was wanted; or `fail`. A sink that is dropped without any of the last three (the host stopped, a provider panicked)
/// has to tell its caller so itself.
pub trait ChunkSink: Send {
    /// Whether a chunk can be written now. While it cannot, nothing is read from the provider: a reader that stops stops
    /// the provider's socket.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>>;

    /// Whether the caller wants no more. Looked at all the time; wakes the task when it comes to that.
    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Writes one chunk. Called after `poll_ready` said so.
    ///
    /// # Errors
    ///
    /// [`Gone`], which cancels the call.
    fn chunk(&mut self, chunk: &StreamChunk) -> Result<(), Gone>;

    /// The stream is over; its `End` has been written.
    fn finish(self: Box<Self>);

    /// The whole answer to a request that wanted no stream.
    fn answer(self: Box<Self>, response: AIResponse);

    /// The call failed before its first chunk, or was cancelled, at any time.
    fn fail(self: Box<Self>, error: ProviderError);
}

/// Runs a pool on a thread of its own. Dropped, it ends all calls and joins the thread.
pub struct ProviderHost {
    handle: HostHandle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Gives requests to a [`ProviderHost`]. To be cloned for every thread.
#[derive(Clone)]
pub struct HostHandle {
    requests: mpsc::Sender<Submission>,
    room: Arc<Room>,
}

struct Submission {
    call: Call,
    sink: Box<dyn ChunkSink>,
    share: Share,
}

impl ProviderHost {
    /// Requests that the thread has not looked at yet; they take microseconds each.
    const INBOX: usize = 1024;

    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// That of the kernel, if it gives no thread or no descriptors.
    pub fn start(pool: Arc<ProviderPool>) -> io::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time();
        #[cfg(feature = "openai")]
        builder.enable_io();
        let runtime = builder.thread_name("providers-dns").max_blocking_threads(4).build()?;
        let (requests, inbox) = mpsc::channel(Self::INBOX);
        let room = Arc::new(Room::new(pool.max_request_bytes()));
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("providers".into()).spawn(move || {
            runtime.block_on(serve(pool, inbox, stopped));
            // A name that is being looked up would be waited for otherwise: for as long as the resolver is patient.
            runtime.shutdown_background();
        })?;
        Ok(Self { handle: HostHandle { requests, room }, stop: Some(stop), thread: Some(thread) })
    }

    /// A way to give it requests.
    pub fn handle(&self) -> HostHandle {
        self.handle.clone()
    }
}

impl Drop for ProviderHost {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread of the providers panicked");
        }
    }
}

impl HostHandle {
    /// Has `request` answered into `sink`, as a stream if the request says so. Never blocks. To be cancelled by the sink.
    pub fn submit(&self, request: AIRequest, kind: Kind, sink: Box<dyn ChunkSink>) {
        self.submit_call(Call::new(kind, request), sink);
    }

    /// The same for a call that its token can end as well.
    pub fn submit_call(&self, call: Call, sink: Box<dyn ChunkSink>) {
        let share = match Room::take(&self.room, &call.request) {
            Ok(share) => share,
            Err(error) => return sink.fail(error),
        };
        match self.requests.try_send(Submission { call, sink, share }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(refused)) => {
                let (whom, waiting) = ("the thread of the providers".into(), ProviderHost::INBOX);
                refused.sink.fail(ProviderError::Overloaded { whom, waiting });
            }
            Err(mpsc::error::TrySendError::Closed(refused)) => refused.sink.fail(ProviderError::Stopped),
        }
    }
}

/// Starts a task for each request until it is told to stop, or nobody is left who could ask.
async fn serve(
    pool: Arc<ProviderPool>,
    mut inbox: mpsc::Receiver<Submission>,
    mut stopped: oneshot::Receiver<()>,
) {
    let next = |cx: &mut Context<'_>| match Pin::new(&mut stopped).poll(cx) {
        Poll::Ready(_) => Poll::Ready(None),
        Poll::Pending => inbox.poll_recv(cx),
    };
    let mut next = poll_fn(next);
    while let Some(Submission { call, sink, share }) = (&mut next).await {
        let pool = Arc::clone(&pool);
        // A task that panics drops its sink, which tells its caller.
        tokio::spawn(async move {
            run(&pool, call, sink).await;
            drop(share);
        });
    }
}

async fn run(pool: &ProviderPool, call: Call, mut sink: Box<dyn ChunkSink>) {
    if call.request.stream != Some(true) {
        return match unless_cancelled(&mut *sink, pool.answer(&call)).await {
            Ok(response) => sink.answer(response),
            Err(error) => sink.fail(error),
        };
    }
    match call.cancel.run(stream(pool, &call, &mut *sink)).await {
        Ok(()) => sink.finish(),
        Err(error) => sink.fail(error),
    }
}

async fn stream(pool: &ProviderPool, call: &Call, sink: &mut dyn ChunkSink) -> Result<(), ProviderError> {
    let answer = unless_cancelled(sink, pool.stream(call)).await?;
    pass_on(answer, sink).await
}

/// `work`, which is dropped as soon as the caller wants no more.
async fn unless_cancelled<T>(
    sink: &mut dyn ChunkSink,
    work: impl Future<Output = Result<T, ProviderError>>,
) -> Result<T, ProviderError> {
    let mut work = std::pin::pin!(work);
    poll_fn(|cx| match sink.poll_cancelled(cx) {
        Poll::Ready(()) => Poll::Ready(Err(ProviderError::Cancelled)),
        Poll::Pending => work.as_mut().poll(cx),
    })
    .await
}

/// Chunks from the answer to the sink, one whenever the sink can take one. An error is always `Cancelled`.
async fn pass_on(mut answer: Answer, sink: &mut dyn ChunkSink) -> Result<(), ProviderError> {
    let mut budget = CHUNKS_IN_A_ROW;
    while let Some(chunk) = next_for(&mut answer, sink).await? {
        // That the call's token was cancelled is told by `fail`, whoever sees it first.
        if matches!(chunk, StreamChunk::End { finish_reason: FinishReason::Cancelled }) {
            return Err(ProviderError::Cancelled);
        }
        sink.chunk(&chunk).map_err(|Gone| ProviderError::Cancelled)?;
        budget -= 1;
        if budget == 0 {
            budget = CHUNKS_IN_A_ROW;
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

/// Chunks of one answer before those of others have their turn.
const CHUNKS_IN_A_ROW: u32 = 64;

/// The next chunk once the sink is ready for it.
async fn next_for(
    answer: &mut Answer,
    sink: &mut dyn ChunkSink,
) -> Result<Option<StreamChunk>, ProviderError> {
    poll_fn(|cx| {
        if sink.poll_cancelled(cx).is_ready() {
            return Poll::Ready(Err(ProviderError::Cancelled));
        }
        match sink.poll_ready(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut *answer).poll_next(cx).map(Ok),
            Poll::Ready(Err(Gone)) => Poll::Ready(Err(ProviderError::Cancelled)),
            Poll::Pending => {
                // Whoever does not read does not keep a provider longer than it may.
                answer.poll_expired(cx);
                Poll::Pending
            }
        }
    })
    .await
}

impl fmt::Debug for ProviderHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProviderHost").finish_non_exhaustive()
    }
}

impl fmt::Debug for HostHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostHandle").finish_non_exhaustive()
    }
}

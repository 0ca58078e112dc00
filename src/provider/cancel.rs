//! Ending a call early from outside.

use super::{ChunkStream, ProviderError};
use crate::messages::StreamChunk;
use futures_core::Stream;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// Tells whoever works on a call to stop. Clones are the same token.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    waiting: Notify,
}

impl CancelToken {
    /// One that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. A second time, or after the end of the call, it does nothing.
    pub fn cancel(&self) {
        // Release pairs with the Acquire of `is_cancelled`.
        self.0.cancelled.store(true, Ordering::Release);
        self.0.waiting.notify_waiters();
    }

    /// Whether it has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Waits until it is cancelled; at once if it is.
    pub async fn cancelled(&self) {
        loop {
            let mut notified = pin!(self.0.waiting.notified());
            // Counts from here on: a cancel between the look below and the wait is not missed.
            notified.as_mut().enable();
            if self.is_cancelled() {
                return;
            }
            notified.await;
        }
    }

    /// Runs `work` until it is done or the token is cancelled, whichever comes first; then `work` is dropped.
    ///
    /// # Errors
    ///
    /// [`ProviderError::Cancelled`], or that of `work`.
    pub async fn run<T>(
        &self,
        work: impl Future<Output = Result<T, ProviderError>>,
    ) -> Result<T, ProviderError> {
        let mut work = pin!(work);
        let mut cancelled = pin!(self.cancelled());
        std::future::poll_fn(|cx| {
            if cancelled.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(ProviderError::Cancelled));
            }
            work.as_mut().poll(cx)
        })
        .await
    }

    /// The same for a stream, which is dropped at once when the token is cancelled.
    pub fn guard(&self, stream: impl Stream<Item = Item> + Send + 'static) -> ChunkStream {
        let token = self.clone();
        let cancelled = Box::pin(async move { token.cancelled().await });
        Box::pin(Guarded { stream: Some(Box::pin(stream)), cancelled })
    }
}

type Item = Result<StreamChunk, ProviderError>;

struct Guarded<S> {
    stream: Option<Pin<Box<S>>>,
    cancelled: super::BoxFuture<'static, ()>,
}

impl<S: Stream<Item = Item>> Stream for Guarded<S> {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        let this = &mut *self;
        let Some(stream) = &mut this.stream else { return Poll::Ready(None) };
        if this.cancelled.as_mut().poll(cx).is_ready() {
            this.stream = None;
            return Poll::Ready(Some(Err(ProviderError::Cancelled)));
        }
        let item = stream.as_mut().poll_next(cx);
        if matches!(item, Poll::Ready(None | Some(Err(_)) | Some(Ok(StreamChunk::End { .. })))) {
            this.stream = None;
        }
        item
    }
}

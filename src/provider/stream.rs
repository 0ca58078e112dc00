//! A streamed answer as the pool gives it: chunks, then exactly one end, whatever the provider does.

use super::gate::Permit;
use super::{ChunkStream, Phase, ProviderError};
use crate::messages::{FinishReason, StreamChunk};
use futures_core::Stream;
use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Any number of chunks, then exactly one `End`, then nothing. Where the provider fails, `Error` and `End` follow what has
/// come. Dropped, it is cancelled.
pub struct Answer {
    provider: String,
    /// With the places it takes; gone once the answer has come to its end.
    source: Option<(ChunkStream, [Permit; 2])>,
    /// Comes before what the source has next.
    next: VecDeque<StreamChunk>,
    total: Pin<Box<Sleep>>,
    total_time: Duration,
    gap: Pin<Box<Sleep>>,
    gap_time: Duration,
    /// `gap` runs: the reader waits for a chunk.
    is_waiting: bool,
}

/// How long an answer may take from here on.
pub(super) struct Times {
    pub total_at: Instant,
    pub total: Duration,
    pub gap: Duration,
}

impl Answer {
    pub(super) fn new(
        provider: &str,
        first: StreamChunk,
        source: ChunkStream,
        permits: [Permit; 2],
        times: Times,
    ) -> Self {
        let over = matches!(first, StreamChunk::End { .. });
        Self {
            provider: provider.into(),
            source: (!over).then_some((source, permits)),
            next: VecDeque::from([first]),
            total: Box::pin(tokio::time::sleep_until(times.total_at)),
            total_time: times.total,
            gap: Box::pin(tokio::time::sleep(times.gap)),
            gap_time: times.gap,
            is_waiting: false,
        }
    }

    /// The provider that answers.
    pub fn provider(&self) -> &str {
        &self.provider
    }

    /// Lets go of the provider if the answer has taken longer than it may. For whoever holds an answer without asking it
    /// for more; wakes the task then.
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) {
        if self.source.is_some() && self.total.as_mut().poll(cx).is_ready() {
            let error = self.timed_out(Phase::Total, self.total_time);
            self.give_up(&error);
        }
    }

    fn timed_out(&self, phase: Phase, after: Duration) -> ProviderError {
        ProviderError::Timeout { provider: self.provider.clone(), phase, after }
    }

    fn give_up(&mut self, error: &ProviderError) {
        tracing::debug!(provider = self.provider, code = error.code(), "an answer broke off: {error}");
        self.source = None;
        let cancelled = *error == ProviderError::Cancelled;
        if !cancelled {
            let (code, message) = (error.code().to_owned(), error.to_string());
            self.next.push_back(StreamChunk::Error { code, message });
        }
        let finish_reason = if cancelled { FinishReason::Cancelled } else { FinishReason::Error };
        self.next.push_back(StreamChunk::End { finish_reason });
    }

    fn take(&mut self, item: Option<Result<StreamChunk, ProviderError>>) {
        self.is_waiting = false;
        match item {
            Some(Ok(chunk)) => {
                if matches!(chunk, StreamChunk::End { .. }) {
                    self.source = None;
                }
                self.next.push_back(chunk);
            }
            Some(Err(error)) => self.give_up(&error),
            None => {
                let error = ProviderError::Interrupted { provider: self.provider.clone() };
                self.give_up(&error);
            }
        }
    }

    /// Gives up if the next chunk, or all of it, has taken too long.
    fn look_at_the_clock(&mut self, cx: &mut Context<'_>) {
        if !std::mem::replace(&mut self.is_waiting, true) {
            self.gap.as_mut().reset(Instant::now() + self.gap_time);
        }
        self.poll_expired(cx);
        if self.source.is_some() && self.gap.as_mut().poll(cx).is_ready() {
            let error = self.timed_out(Phase::BetweenChunks, self.gap_time);
            self.give_up(&error);
        }
    }
}

impl Stream for Answer {
    type Item = StreamChunk;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<StreamChunk>> {
        let this = &mut *self;
        if this.next.is_empty() {
            let Some((source, _)) = &mut this.source else { return Poll::Ready(None) };
            match source.as_mut().poll_next(cx) {
                Poll::Ready(item) => this.take(item),
                Poll::Pending => this.look_at_the_clock(cx),
            }
        }
        match this.next.pop_front() {
            Some(chunk) => Poll::Ready(Some(chunk)),
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("provider", &self.provider).finish_non_exhaustive()
    }
}

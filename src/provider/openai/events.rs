//! The body of a streamed answer, read piece by piece.

use super::assemble::Assembler;
use super::fault::{Found, Naming};
use super::http::{Body, BodyFault};
use crate::messages::StreamChunk;
use crate::provider::ProviderError;
use crate::provider::sse::{SseError, SseParser};
use futures_core::Stream;
use hyper::body::Bytes;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// Chunks as they come. Nothing is read while nobody asks for a chunk.
pub struct Events {
    /// Gone, with its connection, after a fault or the end.
    body: Option<Body>,
    parser: SseParser,
    assembler: Assembler,
    /// Comes behind the chunks that are good.
    fault: Option<ProviderError>,
    naming: Naming,
}

impl Events {
    pub fn new(body: Body, naming: Naming, max_answer: usize) -> Self {
        let (parser, assembler) = (SseParser::default(), Assembler::new(max_answer));
        Self { body: Some(body), parser, assembler, fault: None, naming }
    }

    fn piece(&mut self, piece: &[u8]) -> Result<(), Found> {
        let mut events = Vec::new();
        let read = self.parser.feed(piece, &mut events);
        events.iter().try_for_each(|event| self.assembler.event(&event.data))?;
        read.map_err(no_events)
    }

    /// The bytes are over: half an event is none, but for `[DONE]`, behind which some servers leave out the empty line.
    fn end(&mut self) -> Result<(), Found> {
        let half = std::mem::take(&mut self.parser).finish().map_err(no_events)?;
        if let Some(half) = half.filter(|_| !self.assembler.is_over()) {
            if half.data.trim() != "[DONE]" {
                return Err(Found::Cut);
            }
            self.assembler.event(&half.data)?;
        }
        self.assembler.finish()
    }

    fn take(&mut self, piece: Option<Result<Bytes, hyper::Error>>) {
        let is_last = piece.is_none();
        let found = match piece {
            Some(Ok(piece)) => self.piece(&piece).map_err(|found| self.naming.name(found)),
            Some(Err(error)) => Err(BodyFault::Http(error).named(self.naming.provider())),
            None => self.end().map_err(|found| self.naming.name(found)),
        };
        self.fault = found.err();
        if is_last || self.fault.is_some() {
            self.body = None;
        }
    }

    /// Behind the end of the answer there is only the end of the body, which is on its way if it is not here: waited for,
    /// so that the connection can be used again, by a task that nobody waits for.
    fn let_go(&mut self) {
        if let Some(mut body) = self.body.take() {
            tokio::spawn(async move {
                // Whatever else comes, or nothing, closes the connection.
                tokio::time::timeout(END_OF_BODY, body.read(64)).await.ok();
            });
        }
    }
}

/// How long the end of a body may take behind the end of its answer.
const END_OF_BODY: Duration = Duration::from_millis(100);

fn no_events(error: SseError) -> Found {
    Found::Protocol(error.to_string())
}

impl Stream for Events {
    type Item = Result<StreamChunk, ProviderError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(chunk) = this.assembler.next() {
                return Poll::Ready(Some(Ok(chunk)));
            }
            if let Some(fault) = this.fault.take() {
                return Poll::Ready(Some(Err(fault)));
            }
            let Some(body) = &mut this.body else { return Poll::Ready(None) };
            let piece = std::task::ready!(body.poll_piece(cx));
            this.take(piece);
            if this.assembler.is_over() {
                this.let_go();
            }
        }
    }
}

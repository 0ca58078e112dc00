//! Answers that are written elsewhere: the ticket that a handler hands to a thread or a future, and the words that it
//! shares with the reactor which sends what is written (`tickets.rs` is that side).
//!
//! Nothing here locks. The reactor takes what is there and never waits; whoever writes waits while his buffer is full,
//! by the waker of his task or of his thread. A chunk costs no allocation and, while the reactor is awake, no system
//! call.

use super::table::{Context, HandlerError};
use crate::machine;
use crate::protocol::records;
use atomic_waker::AtomicWaker;
use doorbell_shm::bell::{Published, ServerBell, fence_before_bell};
use doorbell_shm::bytes::SharedBytes;
#[cfg(fuzzing)]
use doorbell_shm::hooked::AtomicU32;
use doorbell_shm::pipe::{Pipe, PipeWriter, Range, ReadySet};
use std::cell::Cell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
#[cfg(not(fuzzing))]
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::Thread;

/// What the client is told of a ticket that nobody finished.
pub(super) const DROPPED: &str = "the answer was given up: its ticket was dropped before it was finished";

/// Begins a call whose answer is written through a [`Deferred`] ticket, by whatever thread or future it is handed to.
/// The request is a private copy that is gone when the handler returns.
pub type DeferredHandler<S> = fn(&Context<'_, S>, &[u8], Deferred) -> Result<(), HandlerError>;

/// Begins a call that a future answers, on the runtime of the embedder
/// ([`IpcServer::executor`](crate::IpcServer::executor)).
pub type AsyncHandler<S> = fn(&Context<'_, S>, &[u8]) -> Answering;

/// A future that has the answer in the end; it is dropped if the call is cancelled.
pub type Answering = Pin<Box<dyn Future<Output = Result<Vec<u8>, HandlerError>> + Send>>;

/// Takes a future to the runtime of the embedder, which runs it. It is called on a reactor's thread and must not block.
pub type Executor = Box<dyn Fn(Pin<Box<dyn Future<Output = ()> + Send>>) + Send + Sync>;

/// Why nothing more is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeferredError {
    /// Nobody waits for the answer: the client has cancelled the call or gone, its deadline has passed, the answer has
    /// become too long, or the server stops.
    #[error("nobody waits for this answer any more: stop working on it")]
    Cancelled,
}

/// How an answer ends, beside what has been written to the pipe.
#[derive(Debug)]
pub(crate) enum End {
    /// These bytes follow.
    Rest(Vec<u8>),
    /// With this error, instead of what has not been sent.
    Failed(HandlerError),
    /// As the handler of a call that panicked.
    Panicked,
    /// Nobody has finished it.
    Dropped,
}

/// What a ticket and its reactor share.
#[derive(Debug)]
pub(super) struct Record {
    pub pipe: Pipe,
    /// Set before the pipe is done, at most once.
    pub end: OnceLock<End>,
    /// Who waits for room.
    pub room: AtomicWaker,
    /// Who waits for the call to be cancelled.
    pub cancelled: AtomicWaker,
}

impl Record {
    pub fn new(range: Range) -> Self {
        Self {
            pipe: Pipe::new(range),
            end: OnceLock::new(),
            room: AtomicWaker::new(),
            cancelled: AtomicWaker::new(),
        }
    }
}

/// What all tickets of one reactor share with it.
#[derive(Debug)]
pub(crate) struct Desk {
    /// Where the bytes of all pipes lie.
    pub store: SharedBytes,
    pub ready: ReadySet,
    bell: Line<AtomicU32>,
    /// Where the reactor is rung that cannot sleep on the bell.
    eventfd: Option<Arc<OwnedFd>>,
}

/// A cache line of its own.
#[repr(align(64))]
#[derive(Debug)]
struct Line<T>(T);

impl Desk {
    pub fn new(store: SharedBytes, most: u32, eventfd: Option<Arc<OwnedFd>>) -> Self {
        Self { store, ready: ReadySet::new(most), bell: Line(AtomicU32::new(0)), eventfd }
    }

    /// The word that the reactor sleeps on.
    pub fn bell(&self) -> ServerBell<&AtomicU32> {
        ServerBell(&self.bell.0)
    }

    /// Puts a ticket among the ready ones, and wakes the reactor if it sleeps.
    #[inline(always)]
    fn notify(&self, number: u32) {
        if self.ready.set(number) {
            // Pairs with the fence in `ServerBell::mark`.
            fence_before_bell();
            if self.bell().take(Published::Submissions) {
                self.wake();
            }
        }
    }

    #[cold]
    fn wake(&self) {
        // Neither can fail for what is our own; were it to, the sweep of the reactor would find what is ready.
        match &self.eventfd {
            None => machine::futex_wake(&self.bell.0, u32::MAX).map(drop).ok(),
            Some(eventfd) => doorbell_uring::ring_eventfd(eventfd).ok(),
        };
    }
}

/// A ticket for the answer of one call: whoever holds it writes the answer, from any thread or future, while the reactor
/// goes on with other calls.
///
/// What is written goes to the client as soon as the reactor sees it, a frame for each chunk while it keeps up, packed
/// while the writer is ahead. The buffer between the two is small and bounded: a client that stops reading stops
/// the writer of its own answer and nobody else.
///
/// End it with [`Deferred::finish`], [`Deferred::reply`] or [`Deferred::fail`]. A ticket that is dropped without that
/// answers the call `Internal`, saying so. Tickets that are not dropped count against
/// [`ServerConfig::max_deferred`](crate::ServerConfig::max_deferred), cancelled ones too.
///
/// ```
/// use doorbell::{Context, Deferred, HandlerError, HandlerTable, MessageType};
///
/// fn count_down(_: &Context<'_, ()>, from: &[u8], mut answer: Deferred) -> Result<(), HandlerError> {
///     let from = *from.first().ok_or_else(|| HandlerError::Decode("a number is wanted".into()))?;
///     std::thread::spawn(move || {
///         for number in (0..from).rev() {
///             // Whoever has cancelled wants no more of it.
///             if answer.write_record(&[number]).is_err() {
///                 return;
///             }
///         }
///         answer.finish();
///     });
///     Ok(())
/// }
///
/// static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on_deferred(MessageType::USER, count_down);
/// ```
pub struct Deferred {
    /// `None` once it has ended.
    record: Option<Arc<Record>>,
    desk: Arc<Desk>,
    number: u32,
    writer: PipeWriter,
    /// The end of a record that did not fit: comes before anything else.
    rest: Vec<u8>,
    /// How much of it has gone.
    rest_gone: usize,
    /// Whether a longer range is there to be had.
    largest: usize,
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferred")
            .field("number", &self.number)
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl Deferred {
    pub(super) fn new(
        record: Arc<Record>,
        desk: Arc<Desk>,
        number: u32,
        range: Range,
        largest: usize,
    ) -> Self {
        let writer = PipeWriter::new(range);
        Self { record: Some(record), desk, number, writer, rest: Vec::new(), rest_gone: 0, largest }
    }

    /// Appends as much of `bytes` to the answer as there is room for; returns how many, 0 if there is none.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`].
    pub fn try_write(&mut self, bytes: &[u8]) -> Result<usize, DeferredError> {
        if !self.send_rest()? {
            return Ok(0);
        }
        Ok(self.push(&[bytes]))
    }

    /// Appends all of `bytes` to the answer; waits, with its thread, while there is no room. Not for futures, which have
    /// [`Deferred::ready`], nor for the handler itself: it runs on the thread that makes room.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`], with some of the bytes written or none.
    ///
    /// # Panics
    ///
    /// If it would have to wait on a reactor's thread, that is, in a handler. The call is answered `HandlerPanic`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DeferredError> {
        let mut gone = self.try_write(bytes)?;
        while gone < bytes.len() {
            self.block(bytes.len() - gone)?;
            gone += self.try_write(&bytes[gone..])?;
        }
        Ok(())
    }

    /// Appends one record ([`records`]) to the answer, if there is room for it now; `false` if there is none. A record
    /// that is longer than the whole buffer is taken when that is empty, and what does not fit is kept aside: it goes
    /// with the next call of any method that writes, waits or finishes.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`], with nothing written.
    pub fn try_write_record(&mut self, record: &[u8]) -> Result<bool, DeferredError> {
        if !self.send_rest()? {
            return Ok(false);
        }
        // No answer is as long as a head cannot say: such a record is refused by the limit on answers.
        let head = (record.len() as u32).to_le_bytes();
        let len = head.len() + record.len();
        let wanted = len.min(self.writer.capacity());
        let Some(shared) = &self.record else { return Err(DeferredError::Cancelled) };
        if self.writer.room(&shared.pipe, wanted) < wanted {
            return Ok(false);
        }
        let gone = self.push(&[&head, record]);
        if gone < len {
            // At least the head has gone, for no range is as short.
            self.rest.extend_from_slice(&record[gone - head.len()..]);
        }
        Ok(true)
    }

    /// Appends one record to the answer without waiting: what does not fit the buffer is kept aside and goes with the next
    /// call of any method that writes, waits or finishes. For those who wait for [`Deferred::ready`] before each record:
    /// nothing piles up then but the end of one.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`], with nothing written.
    pub fn queue_record(&mut self, record: &[u8]) -> Result<(), DeferredError> {
        let head = (record.len() as u32).to_le_bytes();
        let gone = if self.send_rest()? { self.push(&[&head, record]) } else { 0 };
        let parts = [&head[gone.min(head.len())..], &record[gone.saturating_sub(head.len())..]];
        parts.into_iter().for_each(|part| self.rest.extend_from_slice(part));
        Ok(())
    }

    /// Appends one record to the answer, in one piece; waits as [`Deferred::write`] does.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`]. Whatever was sent of the record, its client has no use for it.
    ///
    /// # Panics
    ///
    /// As [`Deferred::write`].
    pub fn write_record(&mut self, record: &[u8]) -> Result<(), DeferredError> {
        while !self.try_write_record(record)? {
            self.block(records::RECORD_HEAD + record.len())?;
        }
        while !self.send_rest()? {
            self.block(self.rest.len() - self.rest_gone)?;
        }
        Ok(())
    }

    /// As [`Deferred::write_record`], for futures.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn send_record(&mut self, record: &[u8]) -> Result<(), DeferredError> {
        while !self.try_write_record(record)? {
            self.ready(records::RECORD_HEAD + record.len()).await?;
        }
        while !self.send_rest()? {
            self.ready(self.rest.len() - self.rest_gone).await?;
        }
        Ok(())
    }

    /// Whether there is room for `len` bytes, or for as many as the buffer holds at most; the task is woken when there
    /// is. What has been kept aside goes first.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`].
    pub fn poll_ready(&mut self, cx: &mut TaskContext<'_>, len: usize) -> Poll<Result<(), DeferredError>> {
        self.poll_room(cx.waker(), len)
    }

    /// Waits until there is room for `len` bytes, or for as many as the buffer holds at most.
    ///
    /// # Errors
    ///
    /// [`DeferredError::Cancelled`].
    pub async fn ready(&mut self, len: usize) -> Result<(), DeferredError> {
        poll_fn(|cx| self.poll_ready(cx, len)).await
    }

    /// The answer is complete.
    pub fn finish(mut self) {
        let rest = self.take_rest();
        self.end((!rest.is_empty()).then_some(End::Rest(rest)));
    }

    /// Appends `bytes` to the answer, which is then complete. Never waits: what does not fit the buffer goes in memory
    /// of its own.
    pub fn reply(mut self, bytes: &[u8]) {
        let gone = if matches!(self.send_rest(), Ok(true)) { self.push(&[bytes]) } else { 0 };
        let mut rest = self.take_rest();
        rest.extend_from_slice(&bytes[gone..]);
        self.end((!rest.is_empty()).then_some(End::Rest(rest)));
    }

    /// Answers with bytes that are handed over as they are.
    fn reply_with(mut self, bytes: Vec<u8>) {
        self.end(Some(End::Rest(bytes)));
    }

    /// Answers with an error: its status, and its text behind what has been sent so far. What has not been sent is
    /// dropped.
    pub fn fail(mut self, error: HandlerError) {
        self.end(Some(End::Failed(error)));
    }

    /// Whether nobody waits for the answer any more.
    #[inline(always)]
    pub fn is_cancelled(&self) -> bool {
        self.record.as_ref().is_none_or(|record| record.pipe.is_cancelled())
    }

    /// Whether nobody waits for the answer any more; otherwise the task is woken when that is so.
    pub fn poll_cancelled(&self, cx: &mut TaskContext<'_>) -> Poll<()> {
        let Some(record) = &self.record else { return Poll::Ready(()) };
        record.cancelled.register(cx.waker());
        if record.pipe.is_cancelled() { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Waits until nobody waits for the answer any more.
    pub async fn cancelled(&self) {
        poll_fn(|cx| self.poll_cancelled(cx)).await;
    }

    /// Writes what fits and makes the reactor see it.
    #[inline(always)]
    fn push(&mut self, parts: &[&[u8]]) -> usize {
        let Some(record) = &self.record else { return 0 };
        let gone = self.writer.write(&record.pipe, &self.desk.store, parts);
        if gone > 0 {
            self.desk.notify(self.number);
        }
        gone
    }

    /// Sends what has been kept aside; whether none of it is left.
    #[inline(always)]
    fn send_rest(&mut self) -> Result<bool, DeferredError> {
        if self.is_cancelled() {
            return Err(DeferredError::Cancelled);
        }
        if self.rest.is_empty() {
            return Ok(true);
        }
        let rest = std::mem::take(&mut self.rest);
        self.rest_gone += self.push(&[&rest[self.rest_gone..]]);
        self.rest = rest;
        if self.rest_gone < self.rest.len() {
            return Ok(false);
        }
        self.rest.clear();
        self.rest_gone = 0;
        Ok(true)
    }

    fn take_rest(&mut self) -> Vec<u8> {
        let mut rest = std::mem::take(&mut self.rest);
        rest.drain(..std::mem::take(&mut self.rest_gone));
        rest
    }

    fn poll_room(&mut self, waker: &Waker, len: usize) -> Poll<Result<(), DeferredError>> {
        let sent = self.send_rest()?;
        let Some(record) = &self.record else { return Poll::Ready(Err(DeferredError::Cancelled)) };
        let pipe = &record.pipe;
        let wanted = if sent { len } else { self.rest.len() - self.rest_gone };
        let capacity = self.writer.capacity();
        let room = self.writer.room(pipe, wanted.min(capacity));
        if sent && room >= wanted.min(capacity) {
            return Poll::Ready(Ok(()));
        }
        record.room.register(waker);
        if !self.writer.wait(pipe, wanted.min(capacity), capacity < self.largest) {
            return Poll::Ready(Err(DeferredError::Cancelled));
        }
        // The reactor looks at whoever waits after this, so room that has come meanwhile wakes us at once.
        self.desk.notify(self.number);
        Poll::Pending
    }

    /// Sleeps until there is room for `len` bytes, or as many as there may be.
    #[cold]
    fn block(&mut self, len: usize) -> Result<(), DeferredError> {
        // It would wait for itself, for ever, and everybody with it.
        assert!(
            !IS_REACTOR.get(),
            "a handler waits for room on the reactor's thread: hand its ticket to another"
        );
        thread_local! {
            // Made once for each thread that ever waits.
            static UNPARKS: Waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        }
        let waker = UNPARKS.with(Waker::clone);
        loop {
            match self.poll_room(&waker, len) {
                Poll::Ready(result) => return result,
                Poll::Pending => std::thread::park(),
            }
        }
    }

    /// The last word: everything of the ticket is given back, and then the reactor is told, so that it finds the record
    /// its own.
    fn end(&mut self, end: Option<End>) {
        let Some(record) = self.record.take() else { return };
        if let Some(end) = end {
            // Empty: a ticket ends once.
            record.end.set(end).ok();
        }
        record.pipe.finish();
        drop(record);
        self.desk.notify(self.number);
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        self.end(Some(End::Dropped));
    }
}

thread_local! {
    static IS_REACTOR: Cell<bool> = const { Cell::new(false) };
}

/// Takes note of whether the calling thread is a reactor's, which makes room in buffers and must not wait for it.
pub(super) fn set_reactor(is_reactor: bool) {
    IS_REACTOR.set(is_reactor);
}

/// Wakes a thread that waits.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs the future of a call, until it has the answer or nobody waits for that any more.
pub(super) struct AsyncCall {
    future: Option<Answering>,
    ticket: Option<Deferred>,
}

impl AsyncCall {
    pub fn new(future: Answering, ticket: Deferred) -> Self {
        Self { future: Some(future), ticket: Some(ticket) }
    }
}

impl Future for AsyncCall {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<()> {
        let Self { future, ticket } = &mut *self;
        let (Some(running), Some(waits)) = (future.as_mut(), ticket.as_ref()) else { return Poll::Ready(()) };
        if waits.poll_cancelled(cx).is_ready() {
            (*future, *ticket) = (None, None);
            return Poll::Ready(());
        }
        // A future that panics is dropped and never polled again.
        let polled = catch_unwind(AssertUnwindSafe(|| running.as_mut().poll(cx)));
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        *future = None;
        if let Some(mut ticket) = ticket.take() {
            match polled {
                Ok(Poll::Ready(Ok(bytes))) => ticket.reply_with(bytes),
                Ok(Poll::Ready(Err(error))) => ticket.fail(error),
                Ok(Poll::Pending) | Err(_) => ticket.end(Some(End::Panicked)),
            }
        }
        Poll::Ready(())
    }
}

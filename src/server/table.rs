//! The static handler table, and what a handler sees: a context, a private request, a reply to write.

use super::analyze::FileQuestion;
use super::deferred::{AsyncHandler, Deferred, DeferredHandler};
use crate::metrics::{Counters, Metrics, Totals};
use crate::protocol::{MessageType, TraceParent};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::Status;
use doorbell_shm::layout::{LaneLayout, SLOT_SMALL};
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Entries of a handler table unless told otherwise: the fixed types and the first 64 of the embedder's.
pub const TABLE_LEN: usize = 320;

/// Runs one call whose whole request is at hand. The request is a private copy: nothing the client does can change
/// it.
pub type Handler<S> = fn(&Context<'_, S>, &[u8], &mut Reply<'_>) -> Result<(), HandlerError>;

/// Begins a call whose request is taken piece by piece; gets the length of the body in bytes where the client has
/// announced it.
pub type MakePieces<S> = fn(&Context<'_, S>, Option<u64>) -> Result<Box<dyn Pieces<S>>, HandlerError>;

/// Takes the body of one call piece by piece and answers meanwhile: for bodies that need not be in memory as a whole.
///
/// ```
/// use doorbell::{Context, HandlerError, Pieces, Progress, Reply};
///
/// /// Answers with every byte but one.
/// struct Without(u8);
///
/// impl<S> Pieces<S> for Without {
///     fn take(
///         &mut self,
///         _: &Context<'_, S>,
///         bytes: &[u8],
///         last: bool,
///         reply: &mut Reply<'_>,
///     ) -> Result<Progress, HandlerError> {
///         let taken = bytes.len().min(reply.room());
///         for byte in bytes[..taken].iter().filter(|byte| **byte != self.0) {
///             reply.write(std::slice::from_ref(byte))?;
///         }
///         Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
///     }
/// }
/// ```
pub trait Pieces<S>: Send {
    /// Takes some of `bytes`, the next ones of the body, and may write to the answer. Is called only while the answer
    /// has room, with at least one byte or as the `last` time round: `bytes` are then the end of the body, or empty
    /// because all of it has been taken.
    ///
    /// What was not taken comes again once the answer has room again. Whoever neither takes nor writes anything
    /// although there is room fails the call.
    ///
    /// # Errors
    ///
    /// The call is answered with the error; what has been written before has been sent or is dropped.
    fn take(
        &mut self,
        context: &Context<'_, S>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError>;
}

/// How far a call got whose body comes piece by piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many of the bytes have been taken; more of the body, or more room, is wanted.
    Took(usize),
    /// The answer is complete. What is left of the body is not wanted.
    Done,
}

/// Answers a question about a file, whose bytes are at hand, through a ticket.
pub type FileQuestionHandler<S> = fn(&Context<'_, S>, FileQuestion, Deferred) -> Result<(), HandlerError>;

/// Runs one call of this codec whose whole request is at hand, as far as that takes no system call.
pub(crate) type Defer = fn(u8, &[u8]) -> Result<Deferral, HandlerError>;

/// How a call goes on that may take system calls.
#[derive(Debug)]
#[cfg_attr(not(feature = "messages"), expect(dead_code, reason = "what AnalyzeFile is answered with"))]
pub(crate) enum Deferral {
    /// It does not: this is the answer.
    Answer(Vec<u8>),
    /// The reactor reads this file, and answers with what it finds, or has this question about it answered.
    File(PathBuf, Option<String>),
    /// This question is to be answered.
    Question(FileQuestion),
    /// The reactor answers this about the server.
    Inspect(super::inspect::Question),
}

/// What begins a call that is answered from elsewhere.
pub(crate) enum Elsewhere<S: 'static> {
    Ticket(DeferredHandler<S>),
    Future(AsyncHandler<S>),
}

impl<S> Clone for Elsewhere<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Elsewhere<S> {}

/// How a table serves one message type.
pub(crate) struct Entry<S: 'static> {
    pub whole: Option<Handler<S>>,
    pub pieces: Option<MakePieces<S>>,
    /// Instead of the others.
    pub deferred: Option<Defer>,
    /// Instead of the others.
    pub elsewhere: Option<Elsewhere<S>>,
    /// Beside `deferred`: answers questions about files.
    pub questions: Option<FileQuestionHandler<S>>,
    /// Longest body that is put together for `whole`, bytes.
    pub whole_max: usize,
}

impl<S> Entry<S> {
    const NONE: Self = Self {
        whole: None,
        pieces: None,
        deferred: None,
        elsewhere: None,
        questions: None,
        whole_max: usize::MAX,
    };

    /// Whether it takes all requests of its type, so that no other may be added.
    const fn is_sole(&self) -> bool {
        self.deferred.is_some() || self.elsewhere.is_some()
    }
}

/// Handlers by message type, built by `const fn`, so that it is a `static` and dispatch is one indexed
/// load (R1.4).
///
/// ```
/// use doorbell::{Context, HandlerError, HandlerTable, MessageType, Reply};
///
/// fn shout(_: &Context<'_, ()>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
///     reply.write(&request.to_ascii_uppercase())
/// }
///
/// static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(MessageType::USER, shout);
/// ```
pub struct HandlerTable<S: 'static, const N: usize = TABLE_LEN> {
    entries: [Entry<S>; N],
}

impl<S, const N: usize> HandlerTable<S, N> {
    /// A table without handlers.
    pub const fn empty() -> Self {
        Self { entries: [const { Entry::NONE }; N] }
    }

    /// The same table with `handler` for whole requests of `message_type`: those that come in one frame (16 KiB at
    /// most), and, unless [`HandlerTable::on_pieces`] takes these, longer ones, which are put together in memory of
    /// their own first.
    ///
    /// # Panics
    ///
    /// At compile time for a `static`: if the number lies beyond the table (choose a larger `N`), or has a
    /// handler already.
    pub const fn on(mut self, message_type: MessageType, handler: Handler<S>) -> Self {
        let index = message_type.0 as usize;
        assert!(index < N, "the message type lies beyond the handler table: choose a larger N");
        let entry = &self.entries[index];
        let free = entry.whole.is_none() && !entry.is_sole();
        assert!(free, "the message type has a handler already");
        self.entries[index].whole = Some(handler);
        self
    }

    /// The same table with `make` for requests of `message_type` that are to be taken piece by piece: all that come
    /// in several frames, and those of one frame too if there is no handler for whole requests.
    ///
    /// # Panics
    ///
    /// As for [`HandlerTable::on`].
    pub const fn on_pieces(mut self, message_type: MessageType, make: MakePieces<S>) -> Self {
        let index = message_type.0 as usize;
        assert!(index < N, "the message type lies beyond the handler table: choose a larger N");
        let entry = &self.entries[index];
        let free = entry.pieces.is_none() && !entry.is_sole();
        assert!(free, "the message type has a handler for pieces already");
        self.entries[index].pieces = Some(make);
        self
    }

    /// The same table with `handler` for all requests of `message_type`, whole as for [`HandlerTable::on`]: it gets a
    /// ticket for the answer, which any thread or future may write, and which may be a stream.
    ///
    /// # Panics
    ///
    /// As for [`HandlerTable::on`].
    pub const fn on_deferred(self, message_type: MessageType, handler: DeferredHandler<S>) -> Self {
        self.elsewhere(message_type, Elsewhere::Ticket(handler))
    }

    /// The same table with `handler` for all requests of `message_type`, whole as for [`HandlerTable::on`]: it makes a
    /// future of the answer, which runs on the runtime of the embedder and is dropped if the call is cancelled. A
    /// server of such a table needs an [`executor`](crate::IpcServer::executor).
    ///
    /// ```
    /// use doorbell::{Answering, Context, HandlerTable, MessageType};
    ///
    /// fn reverse(_: &Context<'_, ()>, request: &[u8]) -> Answering {
    ///     let mut bytes = request.to_vec();
    ///     Box::pin(async move {
    ///         bytes.reverse();
    ///         Ok(bytes)
    ///     })
    /// }
    ///
    /// static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on_async(MessageType::USER, reverse);
    /// ```
    ///
    /// # Panics
    ///
    /// As for [`HandlerTable::on`].
    pub const fn on_async(self, message_type: MessageType, handler: AsyncHandler<S>) -> Self {
        self.elsewhere(message_type, Elsewhere::Future(handler))
    }

    const fn elsewhere(mut self, message_type: MessageType, elsewhere: Elsewhere<S>) -> Self {
        let index = message_type.0 as usize;
        assert!(index < N, "the message type lies beyond the handler table: choose a larger N");
        let entry = &self.entries[index];
        let free = entry.whole.is_none() && entry.pieces.is_none() && !entry.is_sole();
        assert!(free, "the message type has a handler already");
        self.entries[index].elsewhere = Some(elsewhere);
        self
    }

    /// The same table with `defer` for all requests of `message_type`, which has no other handler.
    pub(crate) const fn deferred(mut self, message_type: MessageType, defer: Defer) -> Self {
        self.entries[message_type.0 as usize].deferred = Some(defer);
        self
    }

    /// The same table with `handler` for questions about files: calls of `AnalyzeFile` with a `question`. Without it such
    /// calls fail; without a question they are answered by doorbell itself.
    ///
    /// # Panics
    ///
    /// At compile time for a `static`: if the table does not serve `AnalyzeFile`
    /// ([`HandlerTable::with_builtins`]), or has such a handler already.
    #[cfg(feature = "messages")]
    pub const fn on_file_question(mut self, handler: FileQuestionHandler<S>) -> Self {
        let entry = &mut self.entries[MessageType::ANALYZE_FILE.0 as usize];
        assert!(entry.deferred.is_some(), "the table does not serve AnalyzeFile");
        assert!(entry.questions.is_none(), "questions about files have a handler already");
        entry.questions = Some(handler);
        self
    }

    /// The same table with a limit on the requests of `message_type` that are put together for its handler; a longer
    /// one is answered `TooLarge`. Without it the server's `max_message_size` is the limit.
    ///
    /// # Panics
    ///
    /// At compile time for a `static`: if the number lies beyond the table.
    pub const fn at_most(mut self, message_type: MessageType, bytes: usize) -> Self {
        let index = message_type.0 as usize;
        assert!(index < N, "the message type lies beyond the handler table: choose a larger N");
        self.entries[index].whole_max = bytes;
        self
    }

    /// The entries, for dispatch that does not care about `N`.
    pub(crate) fn as_slice(&self) -> &[Entry<S>] {
        &self.entries
    }
}

impl<S, const N: usize> fmt::Debug for HandlerTable<S, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let served = |e: &Entry<S>| e.whole.is_some() || e.pieces.is_some() || e.is_sole();
        let types = self.entries.iter().enumerate().filter(|(_, e)| served(e)).map(|(i, _)| i);
        f.debug_set().entries(types).finish()
    }
}

/// What a handler knows beside the request.
#[derive(Debug)]
pub struct Context<'a, S> {
    pub(crate) state: &'a S,
    pub(crate) metrics: &'a Counters,
    pub(crate) totals: &'a Totals,
    pub(crate) message_type: MessageType,
    pub(crate) connection: u32,
    pub(crate) codec: u8,
    /// By reference: a copy of what the lane has just written in pieces would wait for all of its stores.
    pub(crate) traceparent: Option<&'a TraceParent>,
}

impl<'a, S> Context<'a, S> {
    /// The server's state, shared by all handlers.
    pub fn state(&self) -> &'a S {
        self.state
    }

    /// The counters of the whole server: exact for the reactor that runs this call, of the others as they were
    /// at their last pause or some rounds ago.
    pub fn metrics(&self) -> Metrics {
        Metrics::of(self.totals, Some(self.metrics))
    }

    /// The type of this message.
    pub fn message_type(&self) -> MessageType {
        self.message_type
    }

    /// The number of the connection that it came on.
    pub fn connection(&self) -> u32 {
        self.connection
    }

    /// The codec that the client named for the body, one of [`doorbell_shm::entry::codec`].
    pub fn codec(&self) -> u8 {
        self.codec
    }

    /// The trace that the caller has named as the call's
    /// ([`CallOptions::traceparent`](crate::CallOptions::traceparent)).
    pub fn traceparent(&self) -> Option<TraceParent> {
        self.traceparent.copied()
    }
}

/// The slots that an answer goes to, one frame after another: a window of slots next to each other.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Window {
    pub first: u32,
    pub count: u32,
    /// Bytes of each slot.
    pub capacity: u32,
    /// The frame that is being written.
    pub frame: u32,
    /// Frames that the client has done with, modulo 2^31.
    pub released: u32,
}

impl Window {
    /// The slot of frame `frame`.
    pub fn slot(&self, frame: u32) -> u32 {
        self.first + frame % self.count * (self.capacity / SLOT_SMALL as u32)
    }

    /// Frames that may be written, the present one included.
    pub fn credit(&self) -> u32 {
        let unreleased = self.frame.wrapping_sub(self.released) & RELEASED_MASK;
        self.count.saturating_sub(unreleased)
    }
}

/// Counts of released frames have 31 bits.
pub(crate) const RELEASED_MASK: u32 = u32::MAX >> 1;

/// Where an answer goes on that does not fit into the slot it began in. One per reactor; clean between two calls.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// Something is in it.
    pub used: bool,
    /// The window of a call that may go on in it; of any other call `frames` is 0.
    pub window: Window,
    /// Frames of the window that may be begun after the present one.
    pub frames: u32,
    /// Frames that have been filled.
    pub full: u32,
    /// What did not fit into the window: to be sent as the client makes room.
    pub spill: Vec<u8>,
    /// Bytes that the answer may still have.
    pub limit: usize,
    pub too_large: bool,
}

/// Writes the answer into the slots that the client lent for it, and what does not fit there into private memory,
/// from where it follows as the client makes room.
///
/// What is written goes straight to shared memory and cannot be read back: the server never looks at what
/// the client may have changed. Only bytes given to [`Reply::write`] get there, so nothing leaks (F21).
#[derive(Debug)]
pub struct Reply<'a> {
    payload: &'a SharedBytes,
    offset: usize,
    capacity: usize,
    len: usize,
    rest: &'a mut Rest,
}

impl<'a> Reply<'a> {
    /// A reply into a slot at `offset` that holds `capacity` bytes, `len` of them written before.
    #[inline(always)]
    pub(crate) fn new(
        payload: &'a SharedBytes,
        offset: usize,
        capacity: usize,
        len: usize,
        rest: &'a mut Rest,
    ) -> Self {
        Self { payload, offset, capacity, len, rest }
    }

    /// Bytes that can be written now without being kept in the server's memory.
    pub fn room(&self) -> usize {
        if !self.rest.spill.is_empty() {
            return 0;
        }
        self.capacity - self.len + (self.rest.frames * self.rest.window.capacity) as usize
    }

    /// Bytes of the answer that have not been sent yet.
    pub fn len(&self) -> usize {
        self.len + (self.rest.full * self.rest.window.capacity) as usize + self.rest.spill.len()
    }

    /// Whether nothing has been written yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends `bytes` to the answer.
    ///
    /// # Errors
    ///
    /// [`HandlerError::TooLarge`] if the answer would exceed the server's `max_message_size`. The call is then
    /// answered with that status, whatever the handler returns: an answer is never cut short silently.
    #[inline(always)]
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), HandlerError> {
        if bytes.len() > self.capacity - self.len {
            return self.write_on(bytes);
        }
        self.payload.write(self.offset + self.len, bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Fills the slot, goes on to the next ones of the window, and keeps the rest.
    #[cold]
    fn write_on(&mut self, mut bytes: &[u8]) -> Result<(), HandlerError> {
        self.rest.used = true;
        if self.rest.too_large || self.len() + bytes.len() > self.rest.limit {
            self.rest.too_large = true;
            return Err(HandlerError::TooLarge);
        }
        while !bytes.is_empty() && self.rest.spill.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.capacity - self.len));
            self.payload.write(self.offset + self.len, now);
            self.len += now.len();
            bytes = later;
            if self.len < self.capacity {
                return Ok(());
            }
            if bytes.is_empty() || self.rest.frames == 0 {
                break;
            }
            let window = &mut self.rest.window;
            window.frame = window.frame.wrapping_add(1);
            self.offset = LaneLayout::slot_offset(window.slot(window.frame));
            self.len = 0;
            self.rest.frames -= 1;
            self.rest.full += 1;
        }
        self.rest.spill.extend_from_slice(bytes);
        Ok(())
    }

    /// Forgets what was written and has not been sent, to answer something else.
    pub fn clear(&mut self) {
        let Rest { window, frames, full, .. } = &mut *self.rest;
        if *full > 0 {
            window.frame = window.frame.wrapping_sub(*full);
            self.offset = LaneLayout::slot_offset(window.slot(window.frame));
            *frames += *full;
            *full = 0;
        }
        self.len = 0;
        self.rest.spill.clear();
        (self.rest.used, self.rest.too_large) = (false, false);
    }

    /// Bytes in the present slot.
    #[inline(always)]
    pub(crate) fn in_slot(&self) -> usize {
        self.len
    }

    /// Bytes that the present slot holds.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether everything lies in the slot that the answer began in.
    #[cfg(test)]
    pub(crate) fn fits(&self) -> bool {
        !self.rest.used
    }

    /// Takes note if the answer has become too long: a write that fits the slot is not compared with the limit.
    pub(crate) fn check_limit(&mut self) {
        self.rest.too_large |= self.len() > self.rest.limit;
    }

    pub(crate) fn is_too_large(&self) -> bool {
        self.rest.too_large
    }
}

impl io::Write for Reply<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Reply::write(self, bytes).map_err(|e| io::Error::new(io::ErrorKind::WriteZero, e))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a handler did not answer. The client gets the status, and the text if there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// The answer does not fit.
    #[error("the answer exceeds the longest message")]
    TooLarge,
    /// The body makes no sense; says what and where.
    #[error("{0}")]
    Decode(String),
    /// A service behind the handler failed.
    #[error("{code}: {message}")]
    Upstream {
        /// A word for programs, without a colon.
        code: &'static str,
        /// A sentence for people.
        message: String,
    },
    /// Anything else; says what.
    #[error("{0}")]
    Failed(String),
}

impl HandlerError {
    /// The answer to what needs the feature `messages`.
    #[cfg(not(feature = "messages"))]
    pub(crate) fn left_out() -> Self {
        let why = "this server was built without the feature `messages`, which Inspect, EndSession and AnalyzeFile need";
        Self::Failed(why.to_owned())
    }

    pub(crate) fn status(&self) -> Status {
        match self {
            Self::TooLarge => Status::TooLarge,
            Self::Decode(_) => Status::DecodeError,
            Self::Upstream { .. } => Status::Upstream,
            Self::Failed(_) => Status::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doorbell_shm::map::{Mapping, PAGE};

    const CAPACITY: usize = SLOT_SMALL;

    /// A reply into the second of four small slots, of a window that may go on to the third.
    fn reply<'a>(payload: &'a SharedBytes, rest: &'a mut Rest, frames: u32) -> Reply<'a> {
        let window = Window { first: 0, count: 4, capacity: CAPACITY as u32, frame: 1, released: 0 };
        *rest = Rest { window, frames, limit: 5000, ..Rest::default() };
        Reply::new(payload, LaneLayout::slot_offset(1), CAPACITY, 0, rest)
    }

    /// Goal:   an answer goes on in the next slots of its window and then in private memory; every byte is where it
    ///         belongs and none beyond.
    /// Method: pieces of sizes that meet the ends of slots and do not, against one vector.
    #[test]
    fn an_answer_goes_on_in_its_window_and_then_in_memory() {
        let map = Mapping::on_heap(PAGE);
        let payload = SharedBytes::new(&map, 0, PAGE).unwrap();
        for piece in [1, 7, 1000, 1024, 2048, 2049, 3000] {
            let mut rest = Rest::default();
            payload.write(0, &[0; PAGE]);
            let mut reply = reply(&payload, &mut rest, 1);
            let expected: Vec<u8> = (0..3000).map(|i| (i * 7 % 251) as u8).collect();
            for (i, part) in expected.chunks(piece).enumerate() {
                let room = 2048usize.saturating_sub(i * piece);
                assert_eq!(reply.room(), room, "{piece}");
                reply.write(part).unwrap();
            }
            assert_eq!((reply.len(), reply.in_slot(), reply.fits()), (3000, CAPACITY, false));
            let mut bytes = [0; PAGE];
            payload.read(0, &mut bytes);
            assert_eq!(bytes[1024..3072], expected[..2048]);
            assert!(bytes[..1024].iter().chain(&bytes[3072..]).all(|b| *b == 0));
            assert_eq!(rest.spill, expected[2048..]);
            assert_eq!((rest.full, rest.window.frame), (1, 2));
        }
    }

    #[test]
    fn an_answer_that_exceeds_the_limit_is_remembered_and_can_be_taken_back() {
        let map = Mapping::on_heap(PAGE);
        let payload = SharedBytes::new(&map, 0, PAGE).unwrap();
        let mut rest = Rest::default();
        let mut reply = reply(&payload, &mut rest, 1);
        reply.write(&[1; 3000]).unwrap();
        assert_eq!(reply.write(&[2; 4000]), Err(HandlerError::TooLarge));
        assert_eq!(reply.write(b"3"), Err(HandlerError::TooLarge), "an answer is not cut short silently");
        assert!(reply.is_too_large() && !reply.fits());
        reply.clear();
        assert!(!reply.is_too_large() && reply.fits() && reply.is_empty());
        assert_eq!(reply.room(), 2048);
        reply.write(b"text").unwrap();
        let mut bytes = [0; 4];
        payload.read(1024, &mut bytes);
        assert_eq!(&bytes, b"text");
    }
}

//! The static handler table, and what a handler sees: a context, a private request, a reply to write.

use crate::metrics::{Metrics, Totals};
use crate::protocol::MessageType;
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::Status;
use std::fmt;
use std::io;

/// Entries of a handler table unless told otherwise: the fixed types and the first 64 of the embedder's.
pub const TABLE_LEN: usize = 320;

/// Runs one call. The request is a private copy: nothing the client does can change it.
pub type Handler<S> = fn(&Context<'_, S>, &[u8], &mut Reply<'_>) -> Result<(), HandlerError>;

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
    handlers: [Option<Handler<S>>; N],
}

impl<S, const N: usize> HandlerTable<S, N> {
    /// A table without handlers.
    pub const fn empty() -> Self {
        Self { handlers: [None; N] }
    }

    /// The same table with `handler` for `message_type`.
    ///
    /// # Panics
    ///
    /// At compile time for a `static`: if the number lies beyond the table (choose a larger `N`), or has a
    /// handler already.
    pub const fn on(mut self, message_type: MessageType, handler: Handler<S>) -> Self {
        let index = message_type.0 as usize;
        assert!(index < N, "the message type lies beyond the handler table: choose a larger N");
        assert!(self.handlers[index].is_none(), "the message type has a handler already");
        self.handlers[index] = Some(handler);
        self
    }

    /// The handlers, for dispatch that does not care about `N`.
    pub(crate) fn as_slice(&self) -> &[Option<Handler<S>>] {
        &self.handlers
    }
}

impl<S, const N: usize> fmt::Debug for HandlerTable<S, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types = self.handlers.iter().enumerate().filter(|(_, h)| h.is_some()).map(|(i, _)| i);
        f.debug_set().entries(types).finish()
    }
}

/// What a handler knows beside the request.
#[derive(Debug)]
pub struct Context<'a, S> {
    pub(crate) state: &'a S,
    pub(crate) metrics: &'a Metrics,
    pub(crate) totals: &'a Totals,
    pub(crate) message_type: MessageType,
    pub(crate) connection: u32,
    pub(crate) codec: u8,
}

impl<'a, S> Context<'a, S> {
    /// The server's state, shared by all handlers.
    pub fn state(&self) -> &'a S {
        self.state
    }

    /// The counters of the whole server: exact for the reactor that runs this call, of the others as they were
    /// at their last pause or some rounds ago.
    pub fn metrics(&self) -> Metrics {
        self.totals.sum(self.metrics)
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
}

/// Writes the answer into the slot that the client lent for it.
///
/// What is written goes straight to shared memory and cannot be read back: the server never looks at what
/// the client may have changed. Only bytes given to [`Reply::write`] get there, so nothing leaks (F21).
#[derive(Debug)]
pub struct Reply<'a> {
    payload: &'a SharedBytes,
    offset: usize,
    capacity: usize,
    len: usize,
    overflow: bool,
}

impl<'a> Reply<'a> {
    pub(crate) fn new(payload: &'a SharedBytes, offset: usize, capacity: usize) -> Self {
        Self { payload, offset, capacity, len: 0, overflow: false }
    }

    /// Bytes that the answer may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been written yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `bytes` to the answer.
    ///
    /// # Errors
    ///
    /// [`HandlerError::TooLarge`] if the answer would exceed its capacity. The call is then answered with
    /// that status, whatever the handler returns: an answer is never cut short silently.
    #[inline(always)]
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), HandlerError> {
        if bytes.len() > self.capacity - self.len {
            self.overflow = true;
            return Err(HandlerError::TooLarge);
        }
        self.payload.write(self.offset + self.len, bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Forgets what was written, to answer something else.
    pub fn clear(&mut self) {
        self.len = 0;
        self.overflow = false;
    }

    pub(crate) fn overflowed(&self) -> bool {
        self.overflow
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
    #[error("the answer exceeds the capacity of its slot")]
    TooLarge,
    /// The body makes no sense; says what and where.
    #[error("{0}")]
    Decode(String),
    /// Anything else; says what.
    #[error("{0}")]
    Failed(String),
}

impl HandlerError {
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::TooLarge => Status::TooLarge,
            Self::Decode(_) => Status::DecodeError,
            Self::Failed(_) => Status::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doorbell_shm::map::{Mapping, PAGE};

    #[test]
    fn an_answer_that_does_not_fit_is_remembered_and_touches_nothing_beyond() {
        let map = Mapping::on_heap(PAGE);
        let payload = SharedBytes::new(&map, 0, PAGE).unwrap();
        let mut reply = Reply::new(&payload, 1024, 8);
        reply.write(b"1234567").unwrap();
        assert_eq!(reply.write(b"89"), Err(HandlerError::TooLarge));
        assert!(reply.overflowed());
        let mut bytes = [0; 16];
        payload.read(1024, &mut bytes);
        assert_eq!(&bytes, b"1234567\0\0\0\0\0\0\0\0\0");
        reply.clear();
        assert!(!reply.overflowed() && reply.is_empty() && reply.write(b"12345678").is_ok());
    }
}

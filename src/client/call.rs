//! What a caller says with a call, writes into it, and gets back.

use super::IpcClient;
use super::lane::{Answered, Outcome, Plain};
use crate::error::{IpcError, Result};
use crate::protocol::traceparent::BLOCK_LEN;
use crate::protocol::{MessageType, TraceParent};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::Status;
use std::time::Duration;

/// Names a call for as long as it is in flight: a slot and its generation, so that a late answer or a late
/// cancel never meets another call (trap 15, R2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId {
    pub(super) lane: u32,
    pub(super) slot: u32,
    pub(super) generation: u32,
}

impl CallId {
    /// Index of the lane that the call took; 0 is the home lane.
    pub fn lane(&self) -> u32 {
        self.lane
    }
}

/// What goes with a call beside its type and body.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallOptions {
    /// Comes back with the answer; doorbell does not look at it.
    pub tag: u64,
    /// How long a blocking call waits; then it is cancelled and its slot set aside. `None`: for ever.
    pub timeout: Option<Duration>,
    /// From now: if the server has not started the call by then it answers `DeadlineExceeded`.
    pub deadline: Option<Duration>,
    /// Bytes that the answer is expected to have at most, where it may be longer than the request: it then gets room to
    /// come quickly. A longer one comes all the same.
    pub reply_capacity: usize,
    /// The call may be executed more than once: its request stays untouched in a slot of its own. It takes two slots for that,
    /// and goes in frames where the session has no two that are large enough.
    pub idempotent: bool,
    /// The answer is handed out by [`IpcClient::poll`] frame by frame as it comes, each with the call's tag, the last
    /// one being the one that [`Reply::is_last`]; the server sends more as frames are dropped. Otherwise an answer of
    /// several frames is put together in memory of the client's own first.
    pub pieces: bool,
    /// The trace that the call belongs to: its handler sees it, and a provider's server behind that. Takes 60 bytes of the
    /// request's slot.
    pub traceparent: Option<TraceParent>,
}

impl CallOptions {
    /// Bytes of metadata that go before the request.
    #[inline(always)]
    pub(super) fn meta_len(&self) -> usize {
        if self.traceparent.is_some() { BLOCK_LEN } else { 0 }
    }
}

/// Writes a request into the slot that carries it.
#[derive(Debug)]
pub struct SlotWriter<'a> {
    pub(super) payload: &'a SharedBytes,
    pub(super) offset: usize,
    pub(super) capacity: usize,
    pub(super) len: usize,
    /// Where the request of a call goes that no slot holds, and how long it may become.
    pub(super) owned: Option<(&'a mut Vec<u8>, usize)>,
}

impl<'a> SlotWriter<'a> {
    /// A writer of at most `capacity` bytes into private memory.
    pub(super) fn owned(bytes: &'a mut Vec<u8>, capacity: usize, payload: &'a SharedBytes) -> Self {
        Self { payload, offset: 0, capacity: 0, len: 0, owned: Some((bytes, capacity)) }
    }

    /// Appends `bytes` to the request.
    ///
    /// # Errors
    ///
    /// [`IpcError::MessageTooLarge`] with the capacity asked for.
    #[inline(always)]
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.capacity - self.len {
            return self.write_owned(bytes);
        }
        self.payload.write(self.offset + self.len, bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Writes what goes before the request; there is room for it.
    #[inline(always)]
    pub(super) fn write_metadata(&mut self, options: &CallOptions) -> Result<()> {
        match options.traceparent {
            Some(traceparent) => self.write(&traceparent.to_block()),
            None => Ok(()),
        }
    }

    #[cold]
    fn write_owned(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.owned {
            Some((owned, capacity)) if bytes.len() <= *capacity - owned.len() => {
                owned.extend_from_slice(bytes);
                Ok(())
            }
            Some((_, capacity)) => Err(IpcError::MessageTooLarge(*capacity)),
            None => Err(IpcError::MessageTooLarge(self.capacity)),
        }
    }

    /// Bytes that still fit.
    pub fn remaining(&self) -> usize {
        match &self.owned {
            Some((owned, capacity)) => *capacity - owned.len(),
            None => self.capacity - self.len,
        }
    }
}

/// What [`IpcClient::poll_into`] says of an answer that it has copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The tag that the call was submitted with.
    pub tag: u64,
    /// Bytes of the answer, even if fewer were copied.
    pub len: usize,
    /// How the call ended; `None` if the session ended first, or with a status that is not known.
    pub status: Option<Status>,
}

impl Taken {
    #[inline(always)]
    pub(super) fn of(answered: &Answered) -> Self {
        let (status, len) = match answered.outcome {
            Outcome::Reply { status, len, .. } => (status_of(status), len),
            Outcome::Piece(piece) => (Status::from_code(piece.status), piece.len),
            Outcome::Lost { .. } => (None, 0),
        };
        Self { tag: answered.tag, len: len as usize, status }
    }

    #[inline(always)]
    pub(super) fn of_plain(plain: &Plain) -> Self {
        Self { tag: plain.tag, len: plain.len as usize, status: status_of(plain.status) }
    }
}

/// As [`Status::from_code`], which looks through all of them: it is success nearly always.
#[inline(always)]
fn status_of(code: u8) -> Option<Status> {
    if code == Status::Ok as u8 { Some(Status::Ok) } else { Status::from_code(code) }
}

/// The answer of a call, or a frame of it. Dropping it gives its slot back.
#[derive(Debug)]
pub struct Reply<'c> {
    pub(super) client: &'c IpcClient,
    pub(super) answered: Answered,
}

impl Reply<'_> {
    /// The tag that the call was submitted with.
    #[inline(always)]
    pub fn tag(&self) -> u64 {
        self.answered.tag
    }

    /// The call that this answers.
    pub fn id(&self) -> CallId {
        CallId { lane: self.answered.lane, slot: self.answered.slot, generation: self.answered.generation }
    }

    /// Bytes of the answer; of the error's text where the handler gave one.
    #[inline(always)]
    pub fn len(&self) -> usize {
        match self.answered.outcome {
            Outcome::Reply { len, .. } => len as usize,
            Outcome::Piece(_) => self.client.session.borrow().body_len(&self.answered),
            Outcome::Lost { .. } => 0,
        }
    }

    /// Whether this ends the call: always, unless the answer is handed out in [pieces](CallOptions::pieces).
    pub fn is_last(&self) -> bool {
        self.answered.is_last()
    }

    /// Whether the answer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the call was executed and answered.
    #[inline(always)]
    pub fn is_ok(&self) -> bool {
        match self.answered.outcome {
            Outcome::Reply { status, .. } => status == Status::Ok as u8,
            Outcome::Piece(piece) => piece.status == Status::Ok as u8,
            Outcome::Lost { .. } => false,
        }
    }

    /// The length of the answer, or why there is none.
    ///
    /// # Errors
    ///
    /// The status that the server answered, or what became of the session.
    #[inline(always)]
    pub fn result(&self) -> Result<usize> {
        if self.is_ok() { Ok(self.len()) } else { Err(self.error()) }
    }

    /// Copies the answer into `target` and returns how many bytes that were: the shorter of the two.
    ///
    /// # Errors
    ///
    /// [`IpcError::MemoryTakenBack`] if the answer lay in memory that the server has taken back, because this process
    /// stood still while others waited for it. `target` may hold anything then.
    #[inline(always)]
    pub fn copy_to(&self, target: &mut [u8]) -> Result<usize> {
        let len = self.len().min(target.len());
        self.client.session()?.read(&self.answered, &mut target[..len])?;
        Ok(len)
    }

    /// The answer in memory of its own; of a call that failed, the error's text: [`Reply::result`] says which it is.
    ///
    /// # Errors
    ///
    /// As for [`Reply::copy_to`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(&mut bytes)?;
        Ok(bytes)
    }

    /// The answer in memory of its own, without a copy if it has been put together there.
    pub(super) fn into_vec(self) -> Result<Vec<u8>> {
        if matches!(self.answered.outcome, Outcome::Piece(_))
            && let Some(bytes) = self.client.session.borrow_mut().take_assembled(&self.answered)
        {
            return Ok(bytes);
        }
        self.to_vec()
    }

    #[cold]
    fn error(&self) -> IpcError {
        let (status, detail) = match self.answered.outcome {
            Outcome::Reply { status, detail, .. } => (status, detail),
            Outcome::Piece(piece) => (piece.status, piece.detail),
            Outcome::Lost { started: false } => return IpcError::NotExecuted,
            Outcome::Lost { started: true } => return IpcError::ConnectionLost,
        };
        // A text that could not be read any more is none.
        let text = || String::from_utf8_lossy(&self.to_vec().unwrap_or_default()).into_owned();
        match Status::from_code(status) {
            Some(Status::UnknownType) => IpcError::UnknownMessageType(MessageType(detail as u32)),
            Some(Status::TooLarge) => IpcError::MessageTooLarge(detail as usize),
            Some(Status::DecodeError) => IpcError::Decode(text()),
            Some(Status::HandlerPanic) => IpcError::HandlerPanic,
            Some(Status::DeadlineExceeded) => IpcError::DeadlineExceeded,
            Some(Status::Cancelled) => IpcError::Cancelled,
            Some(Status::Overloaded) => IpcError::Overloaded { retry_ms: detail },
            Some(Status::Internal) => IpcError::Handler(text()),
            Some(Status::TakenBack) => IpcError::MemoryTakenBack,
            Some(Status::Upstream) => IpcError::upstream(text()),
            Some(Status::Ok) | None => IpcError::Handshake("the server answered with an unknown status"),
        }
    }
}

impl Drop for Reply<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.client.release(&self.answered);
    }
}

//! What ring entries say: their words, packed and checked.
//!
//! Layout: `shm/LAYOUT.md`, sections Submission entry and Completion entry; the golden vectors there are
//! checked by `tests/layout.rs`. Reserved bits are written as zero and refused when they are not (F13).

use crate::error::PeerFault;

/// 64-bit words of a submission entry.
pub const SUBMISSION_WORDS: usize = 8;
/// 64-bit words of a completion entry.
pub const COMPLETION_WORDS: usize = 4;

/// Kinds of entries. 0 is never used, so that a zeroed entry means nothing.
pub mod kind {
    /// Submission: a call, its first or only frame.
    pub const CALL: u8 = 1;
    /// Submission: a further frame of a body. Completion: a frame of an answer that goes on.
    pub const FRAME: u8 = 2;
    /// Submission: opens a connection; its number comes in the completion's detail.
    pub const OPEN: u8 = 3;
    /// Submission: closes a connection.
    pub const CLOSE: u8 = 4;
    /// Submission: the first entry of a connection on a further lane. It has neither slot nor completion.
    pub const ATTACH: u8 = 5;
    /// Completion: the last entry of a call.
    pub const REPLY: u8 = 6;
    /// Completion: a call that the server starts (reserved).
    pub const CALLBACK: u8 = 7;
    /// Submission: asks for leased slots: `response_count` of `len` bytes each.
    pub const LEASE: u8 = 8;
    /// Submission: gives a lease back, named by its first slot and its epoch.
    pub const RETURN: u8 = 9;
}

/// Flags of entries.
pub mod flag {
    /// More frames of this body follow.
    pub const MORE: u16 = 1 << 0;
    /// The last frame of this body.
    pub const END: u16 = 1 << 1;
    /// The caller sleeps on the reactor's core: do not spin there after this.
    pub const HANDOFF: u16 = 1 << 2;
    /// The caller allows the call to be executed again.
    pub const IDEMPOTENT: u16 = 1 << 3;
    /// The slot begins with `meta_len` bytes of TLV metadata.
    pub const META: u16 = 1 << 4;
    /// Submission OPEN and ATTACH: the connection uses the bulk rings.
    pub const BULK: u16 = 1 << 5;
    /// Submission: payload or answer window lies in leased memory; word 7 says where and in which epoch.
    pub const LEASED: u16 = 1 << 6;
    /// Every flag a submission may carry.
    pub const SUBMISSION: u16 = MORE | END | HANDOFF | IDEMPOTENT | META | BULK | LEASED;
    /// Every flag a completion may carry.
    pub const COMPLETION: u16 = MORE | END;
}

/// Codecs of a body, named at OPEN and in each call.
pub mod codec {
    /// Bytes that doorbell does not interpret.
    pub const RAW: u8 = 0;
    /// JSON, as `JSON.stringify` writes it.
    pub const JSON: u8 = 1;
    /// rkyv archives.
    pub const RKYV: u8 = 2;
}

/// Types of the elements of the metadata at the start of a slot ([`crate::meta`]).
pub mod tlv {
    /// `traceparent` of W3C Trace Context, version 00: 55 bytes of ASCII.
    pub const TRACEPARENT: u16 = 1;
    /// Idempotency key: 16 bytes of client id, u64 call number.
    pub const IDEMPOTENCY: u16 = 2;
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Executed; the answer lies in the response slot.
    Ok = 0,
    /// No handler is registered for the message type; detail: the type. The connection goes on (R1.4).
    UnknownType = 1,
    /// The request or its answer is longer than can be carried; detail: the limit in bytes.
    TooLarge = 2,
    /// The handler could not make sense of the body; the answer may say why.
    DecodeError = 3,
    /// The handler panicked; the connection goes on (R3.2).
    HandlerPanic = 4,
    /// The deadline had passed before the call was started; it was not run (R2.9).
    DeadlineExceeded = 5,
    /// Cancelled before it was started.
    Cancelled = 6,
    /// The server could not take the call now; detail: milliseconds after which to try again.
    Overloaded = 7,
    /// The handler failed in a way of its own; the answer may say why.
    Internal = 8,
    /// Memory that the call had leased was taken back, because its holder did nothing with it while others
    /// waited for it (F59).
    TakenBack = 9,
    /// A service behind the server failed; the answer says how: a word for programs, `: `, a sentence.
    Upstream = 10,
}

impl Status {
    /// The status numbered `code`, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        use Status::*;
        [
            Ok,
            UnknownType,
            TooLarge,
            DecodeError,
            HandlerPanic,
            DeadlineExceeded,
            Cancelled,
            Overloaded,
            Internal,
            TakenBack,
            Upstream,
        ]
        .into_iter()
        .find(|s| *s as u8 == code)
    }
}

/// A submission entry, unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Submission {
    /// One of [`kind`].
    pub kind: u8,
    /// Bits of [`flag`].
    pub flags: u16,
    /// One of [`codec`].
    pub codec: u8,
    /// Message type: index into the handler table.
    pub message_type: u32,
    /// Connection number, as OPEN's completion gave it.
    pub connection: u32,
    /// Slot that holds the request and names the call.
    pub slot: u32,
    /// Generation of the slot: its previous one plus 1.
    pub generation: u32,
    /// Bytes in the slot, metadata included.
    pub len: u32,
    /// Bytes of metadata at the start of the slot.
    pub meta_len: u16,
    /// Number of consecutive slots of the answer window, at least 1 for a call.
    pub response_count: u16,
    /// First slot of the answer window; `slot` itself for a small call.
    pub response_slot: u32,
    /// Number of this frame in its body, from 0.
    pub frame: u32,
    /// Bytes of the whole body where known in advance, else 0.
    pub body_len: u64,
    /// Nanoseconds of the server's CLOCK_MONOTONIC after which the call must not start; 0 for none.
    pub deadline: u64,
    /// Slot that holds this frame, where that is not `slot`: of a FRAME, or with [`flag::LEASED`].
    pub payload_slot: u32,
    /// Epoch of the leases that the entry uses, with [`flag::LEASED`].
    pub lease_epoch: u32,
}

/// Word 7, which says where a payload lies that does not lie in the slot which names its call.
const PLACE: usize = 7;

impl Submission {
    /// The entry's words; the lap's half of word 0 is zero.
    #[inline(always)]
    pub fn pack(&self) -> [u64; SUBMISSION_WORDS] {
        [
            u64::from(self.kind) << 32 | u64::from(self.flags) << 40 | u64::from(self.codec) << 56,
            u64::from(self.message_type) | u64::from(self.connection) << 32,
            u64::from(self.slot) | u64::from(self.generation) << 32,
            u64::from(self.len) | u64::from(self.meta_len) << 32 | u64::from(self.response_count) << 48,
            u64::from(self.response_slot) | u64::from(self.frame) << 32,
            self.body_len,
            self.deadline,
            u64::from(self.payload_slot) | u64::from(self.lease_epoch) << 32,
        ]
    }

    /// Unpacks a private copy of an entry if it is a plain call: one frame, no metadata, no deadline, answer
    /// in the request's own slot. Everything that [`Submission::unpack`] and a check of a call's shape would
    /// refuse is not plain.
    #[inline(always)]
    pub fn plain(words: &[u64; SUBMISSION_WORDS]) -> Option<Self> {
        const HEAD: u64 = kind::CALL as u64 | (flag::END as u64) << 8;
        const CODEC_AND_HANDOFF: u64 = 0xff << 24 | (flag::HANDOFF as u64) << 8;
        let (slot, len) = (words[2] as u32, words[3] as u32);
        let head_is_plain = (words[0] >> 32) & !CODEC_AND_HANDOFF == HEAD;
        // No metadata and one answer slot; that slot is the request's, and this is frame 0.
        let window_is_plain = words[3] >> 32 == 1 << 16 && words[4] == u64::from(slot);
        let rest_is_plain = (words[5] == u64::from(len) || words[5] == 0) && words[6] | words[7] == 0;
        (head_is_plain && window_is_plain && rest_is_plain).then_some(Self {
            kind: kind::CALL,
            flags: flag::END,
            codec: (words[0] >> 56) as u8,
            message_type: words[1] as u32,
            connection: (words[1] >> 32) as u32,
            slot,
            generation: (words[2] >> 32) as u32,
            len,
            meta_len: 0,
            response_count: 1,
            response_slot: slot,
            frame: 0,
            body_len: words[5],
            deadline: 0,
            payload_slot: 0,
            lease_epoch: 0,
        })
    }

    /// Unpacks a private copy of an entry.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Reserved`] if a bit without meaning is set. Numbers are not judged here.
    #[inline(always)]
    pub fn unpack(words: [u64; SUBMISSION_WORDS]) -> Result<Self, PeerFault> {
        let flags = (words[0] >> 40) as u16;
        if flags & !flag::SUBMISSION != 0 {
            return Err(PeerFault::Reserved { word: 0, value: words[0] });
        }
        // A FRAME says where it lies; the epoch is told where leases are used, and nowhere else.
        let is_frame = (words[0] >> 32) as u8 == kind::FRAME;
        let told = match (flags & flag::LEASED != 0, is_frame) {
            (true, _) => u64::MAX,
            (false, true) => u64::from(u32::MAX),
            (false, false) => 0,
        };
        if words[PLACE] & !told != 0 {
            return Err(PeerFault::Reserved { word: PLACE as u32, value: words[PLACE] });
        }
        Ok(Self {
            kind: (words[0] >> 32) as u8,
            flags,
            codec: (words[0] >> 56) as u8,
            message_type: words[1] as u32,
            connection: (words[1] >> 32) as u32,
            slot: words[2] as u32,
            generation: (words[2] >> 32) as u32,
            len: words[3] as u32,
            meta_len: (words[3] >> 32) as u16,
            response_count: (words[3] >> 48) as u16,
            response_slot: words[4] as u32,
            frame: (words[4] >> 32) as u32,
            body_len: words[5],
            deadline: words[6],
            payload_slot: words[PLACE] as u32,
            lease_epoch: (words[PLACE] >> 32) as u32,
        })
    }
}

/// A completion entry, unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Completion {
    /// [`kind::REPLY`] or [`kind::FRAME`].
    pub kind: u8,
    /// Code of a [`Status`].
    pub status: u8,
    /// Bits of [`flag::COMPLETION`].
    pub flags: u16,
    /// Slot that names the call.
    pub slot: u32,
    /// Generation of the call.
    pub generation: u32,
    /// Bytes of the answer in this frame's slot.
    pub len: u32,
    /// Number of this frame in the answer, from 0.
    pub frame: u32,
    /// A number that goes with the status: a limit, a message type, a connection.
    pub detail: u64,
}

impl Completion {
    /// The entry's words; the lap's half of word 0 is zero.
    #[inline(always)]
    pub fn pack(&self) -> [u64; COMPLETION_WORDS] {
        [
            u64::from(self.kind) << 32 | u64::from(self.status) << 40 | u64::from(self.flags) << 48,
            u64::from(self.slot) | u64::from(self.generation) << 32,
            u64::from(self.len) | u64::from(self.frame) << 32,
            self.detail,
        ]
    }

    /// Unpacks a private copy of an entry.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Reserved`] if a flag without meaning is set.
    #[inline(always)]
    pub fn unpack(words: [u64; COMPLETION_WORDS]) -> Result<Self, PeerFault> {
        let flags = (words[0] >> 48) as u16;
        if flags & !flag::COMPLETION != 0 {
            return Err(PeerFault::Reserved { word: 0, value: words[0] });
        }
        Ok(Self {
            kind: (words[0] >> 32) as u8,
            status: (words[0] >> 40) as u8,
            flags,
            slot: words[1] as u32,
            generation: (words[1] >> 32) as u32,
            len: words[2] as u32,
            frame: (words[2] >> 32) as u32,
            detail: words[3],
        })
    }
}

//! The two kinds of error of this crate: what a peer did wrong, and what the kernel refused.

use std::io;

/// What the other side wrote that no correct side writes.
///
/// Handled in one place: the session that it came from is ended, with this as the reason. It never goes
/// further up and never touches another session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    /// The sequence of a ring entry is neither the expected lap nor the previous one (F11, S4).
    #[error("ring entry at position {position} carries lap {theirs}, expected {expected} or the one before")]
    Lap {
        /// The lap read from the entry.
        theirs: u32,
        /// The lap that an entry at this position must carry.
        expected: u32,
        /// Our private position.
        position: u64,
    },
    /// A published or consumed position that lies outside what our own position allows (F11).
    #[error("peer published position {theirs}, but only {oldest}..={newest} are possible")]
    Position {
        /// The position read.
        theirs: u32,
        /// The oldest possible position.
        oldest: u32,
        /// The newest possible position.
        newest: u32,
    },
    /// A slot number that the session was never granted (F12).
    #[error("slot {slot} was not granted to this lane")]
    Slot {
        /// The slot number read.
        slot: u32,
    },
    /// A slot named while it is still lent (F12).
    #[error("slot {slot} is already lent with generation {generation}")]
    SlotBusy {
        /// The slot number read.
        slot: u32,
        /// The generation of the call that holds it.
        generation: u32,
    },
    /// A generation that is not the previous one plus one (F12, P2).
    #[error("slot {slot} came with generation {theirs}, expected {expected}")]
    Generation {
        /// The slot number read.
        slot: u32,
        /// The generation read.
        theirs: u32,
        /// The only generation that is right.
        expected: u32,
    },
    /// A length above the size of its slot (F12).
    #[error("{len} bytes announced in slot {slot}, which holds {capacity}")]
    Length {
        /// The length read, bytes.
        len: u32,
        /// The slot number read.
        slot: u32,
        /// The size of the slot's class, bytes.
        capacity: u32,
    },
    /// A reserved bit or word that is not zero, or a combination of flags that means nothing (F13).
    #[error("reserved or contradictory bits {value:#x} in word {word} of a ring entry")]
    Reserved {
        /// The index of the 64-bit word in the entry.
        word: u32,
        /// What was found there.
        value: u64,
    },
    /// An entry kind that this side never accepts (F13).
    #[error("entry kind {kind} is unknown or not allowed here")]
    Kind {
        /// The kind read.
        kind: u8,
    },
    /// Metadata that is no sequence of elements (F13).
    #[error("the metadata of a call is no sequence of elements: wrong at byte {at}")]
    Metadata {
        /// Where the element begins that is wrong, bytes.
        at: u32,
    },
    /// A connection number that this session did not open.
    #[error("connection {connection:#x} is not open in this session")]
    Connection {
        /// The connection number read.
        connection: u32,
    },
    /// A hint for a slot that the lane does not have.
    #[error("hint bit {bit} lies beyond the {slots} slots of the lane")]
    Hint {
        /// The bit read.
        bit: u32,
        /// The number of slots of the lane.
        slots: u32,
    },
    /// A frame that does not follow the one before it, or comes after the last one.
    #[error("frame {theirs} of the call in slot {slot}, where only {expected} can come")]
    Frame {
        /// The slot that names the call.
        slot: u32,
        /// The frame number read.
        theirs: u32,
        /// The number of the next frame; [`u32::MAX`] after the last one.
        expected: u32,
    },
    /// A body that is not as long as its first frame announced.
    #[error("a body of {announced} bytes was announced in slot {slot}, {sent} were sent")]
    Body {
        /// The slot that names the call.
        slot: u32,
        /// Bytes announced.
        announced: u64,
        /// Bytes sent, up to and including the frame that shows it.
        sent: u64,
    },
    /// Frames of an answer released that were not sent, or taken back after they had been released.
    #[error("{theirs} frames released of the call in slot {slot}, possible are {oldest} to {newest}")]
    Credit {
        /// The slot that names the call.
        slot: u32,
        /// The count read.
        theirs: u32,
        /// The count known before.
        oldest: u32,
        /// Frames sent.
        newest: u32,
    },
    /// A lease given back while one of its slots is still lent, or that does not exist.
    #[error("the lease at slot {slot} of epoch {epoch} cannot be given back: it does not exist or is in use")]
    Lease {
        /// The first slot of the lease.
        slot: u32,
        /// The epoch read.
        epoch: u32,
    },
    /// A header or segment that does not say what the handshake said.
    #[error("segment header field {field} holds {theirs:#x}, expected {expected:#x}")]
    Header {
        /// The field's name as in `LAYOUT.md`.
        field: &'static str,
        /// The value read.
        theirs: u64,
        /// The value expected.
        expected: u64,
    },
}

/// A segment that could not be made, attached or mapped.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// A refusal by the kernel, naming the call.
    #[error("{call} failed for a segment of {len} bytes: {source}")]
    Os {
        /// The system call.
        call: &'static str,
        /// Bytes of the segment concerned.
        len: usize,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A geometry outside the limits of the layout.
    #[error("{what} is {value}, allowed are {min} to {max}")]
    Geometry {
        /// The parameter.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },
    /// A range that leaves the mapping or is not aligned.
    #[error("{len} bytes at offset {offset} do not lie aligned inside a mapping of {mapped} bytes")]
    OutOfBounds {
        /// Offset of the range, bytes.
        offset: usize,
        /// Length of the range, bytes.
        len: usize,
        /// Length of the mapping, bytes.
        mapped: usize,
    },
    /// A file descriptor received that is not a segment sealed against shrinking, growing and resealing.
    #[error("the segment lacks the seals {missing:#x} (F_SEAL_SHRINK|F_SEAL_GROW|F_SEAL_SEAL are required)")]
    Unsealed {
        /// The missing seal bits as in fcntl(2).
        missing: u32,
    },
    /// The header contradicts the handshake.
    #[error(transparent)]
    Header(#[from] PeerFault),
}

impl SegmentError {
    pub(crate) fn os(call: &'static str, len: usize, source: impl Into<io::Error>) -> Self {
        Self::Os { call, len, source: source.into() }
    }

    /// Whether the kernel lacked memory (answered as `NoMemory` at the handshake, F33, F34).
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Os { source, .. } if matches!(
            source.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   F33, F34: shortage of memory is told from other refusals.
    /// Method: every error that the calls of `segment.rs` document, as the kernel numbers it.
    #[test]
    fn f34_shortage_is_recognised_by_the_kernels_answer() {
        use rustix::io::Errno;
        let shortage = |e: Errno| SegmentError::os("fallocate", 1, e).is_out_of_memory();
        assert!([Errno::NOMEM, Errno::NOSPC, Errno::DQUOT].into_iter().all(shortage));
        assert!(![Errno::PERM, Errno::INVAL, Errno::MFILE, Errno::FBIG].into_iter().any(shortage));
    }
}

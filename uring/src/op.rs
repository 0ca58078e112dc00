//! The operations a ring of ours can be asked for, what identifies them, and what they end with.

use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;

/// What the caller calls an operation: the `user_data` of its entry, returned with its completion.
///
/// Opaque here; pack a slot and its generation into it, so that the late completion of a dead
/// generation is recognised. The values above [`Token::LAST`] are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

impl Token {
    /// The largest token a caller may use. Those above mark operations whose completion nobody wants
    /// (wakes, cancels, messages), so that a failed wake is told from a cancel that came too late, and
    /// reads, whose completion first has to find its buffer.
    pub const LAST: Token = Token(Self::FIRST_READ - 1);

    pub(crate) const WAKE: Token = Token(u64::MAX);
    pub(crate) const CANCEL: Token = Token(u64::MAX - 1);
    pub(crate) const MESSAGE: Token = Token(u64::MAX - 2);

    /// The tokens of 2^32 reads lie below those.
    const FIRST_READ: u64 = Self::MESSAGE.0 - (1 << 32);

    /// What the entry of a read carries: its number among those in flight.
    pub(crate) fn of_read(number: u32) -> Token {
        Token(Self::FIRST_READ + u64::from(number))
    }

    /// The number, if an entry of a read carried this.
    #[inline]
    pub(crate) fn read_number(self) -> Option<u32> {
        u32::try_from(self.0.wrapping_sub(Self::FIRST_READ)).ok().filter(|_| self < Self::MESSAGE)
    }

    pub(crate) fn is_reserved(self) -> bool {
        self > Token::LAST
    }
}

/// The end of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// What the caller called the operation; for a message, what the sender called it.
    pub token: Token,
    /// How it ended:
    ///
    /// | operation | `Ok` | `Err` |
    /// | --- | --- | --- |
    /// | futex wait | 0: rung | AGAIN: the word differed; NOMEM: try later; FAULT: no such page |
    /// | poll | the events, see [`Completion::events`] | BADF: not open at the enter |
    /// | timeout | never | TIME: the time has come |
    /// | message | the value sent | never |
    /// | read | bytes read, 0 at the end of the file | as read(2) |
    /// | any, cancelled | | CANCELED |
    pub result: Result<u32, Errno>,
}

impl Completion {
    /// The result of a poll as flags; empty if it failed.
    pub fn events(&self) -> PollFlags {
        PollFlags::from_bits_retain(self.result.unwrap_or(0) as u16)
    }
}

/// One operation, before it becomes an entry (`ring.rs`). Pointers are addresses for the kernel to
/// look up, never read here.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    FutexWait {
        word: *const AtomicU32,
        expected: u32,
        token: Token,
    },
    FutexWake {
        word: *const AtomicU32,
        count: u32,
    },
    Poll {
        fd: RawFd,
        events: PollFlags,
        token: Token,
    },
    Timeout {
        at: Duration,
        token: Token,
    },
    Cancel {
        token: Token,
    },
    Message {
        ring: RawFd,
        value: i32,
        token_there: Token,
    },
    /// `number` is that of the read among those in flight, `fixed` that of a registered buffer.
    Read {
        fd: RawFd,
        offset: u64,
        address: *mut u8,
        len: u32,
        fixed: Option<u16>,
        number: u32,
    },
}

/// A completion as the ring holds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawCompletion {
    pub(crate) token: Token,
    pub(crate) result: i32,
}

impl RawCompletion {
    pub(crate) fn result(self) -> Result<u32, Errno> {
        u32::try_from(self.result).map_err(|_| Errno::from_raw_os_error(-self.result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   no internal operation can be mistaken for one of the caller's.
    /// Method: both edges of the reserved range.
    #[test]
    fn exactly_the_internal_tokens_are_reserved() {
        assert!(!Token(0).is_reserved() && !Token::LAST.is_reserved());
        for internal in [Token::WAKE, Token::CANCEL, Token::MESSAGE] {
            assert!(internal.is_reserved());
        }
        assert!(Token(Token::LAST.0 + 1).is_reserved());
        for number in [0, 1, u32::MAX] {
            assert!(Token::of_read(number).is_reserved());
            assert_eq!(Token::of_read(number).read_number(), Some(number));
        }
        for other in [Token(0), Token::LAST, Token::WAKE, Token::CANCEL, Token::MESSAGE] {
            assert_eq!(other.read_number(), None);
        }
    }

    /// Goal:   negative results are errors by their number, the rest are values.
    /// Method: both sides of zero and both ends.
    #[test]
    fn results_split_at_zero() {
        let result = |result| RawCompletion { token: Token(1), result }.result();
        assert_eq!(result(0), Ok(0));
        assert_eq!(result(i32::MAX), Ok(i32::MAX as u32));
        assert_eq!(result(-11), Err(Errno::AGAIN));
        assert_eq!(result(-125), Err(Errno::CANCELED));
    }
}

//! What the kernel can refuse: when a ring is made, and when it is used.

use std::fmt;

use rustix::io::Errno;

use crate::cause::{Cause, Host};
use crate::op::Token;

/// A ring in use failed. The first is the kernel's doing, the others are bugs of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The kernel refused a call. Operations not yet submitted stay queued; entering again is allowed.
    #[error("{call}: {source}")]
    Os {
        /// The system call.
        call: &'static str,
        /// Its errno.
        source: Errno,
    },
    /// A token above [`Token::LAST`]. Nothing was queued.
    #[error("token {:#x} is reserved", .0.0)]
    Reserved(Token),
    /// A message's value above `i32::MAX`, which would arrive as an error. Nothing was queued.
    #[error("message value {0} does not fit in 31 bits")]
    Value(u32),
}

/// What was being done when [`Driver::new`](crate::Driver::new) or [`self_test`](crate::self_test)
/// failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// io_uring_setup(2) and mapping the ring.
    CreateRing,
    /// Restricting the ring to the operations used, and enabling it.
    RestrictRing,
    /// A memfd, mapped twice.
    MapMemory,
    /// FUTEX_WAIT on a word with another value must end with EAGAIN.
    FutexDiffers,
    /// futex(2) on another mapping of the word must end an armed FUTEX_WAIT.
    FutexRungByCall,
    /// The ring's FUTEX_WAKE must end an armed FUTEX_WAIT.
    FutexRungByRing,
    /// POLL_ADD on an eventfd.
    Poll,
    /// TIMEOUT at an absolute time.
    Timeout,
    /// ASYNC_CANCEL of an armed FUTEX_WAIT.
    Cancel,
}

impl Step {
    /// Every step of the self-test, in the order in which it tries them: what comes after one that is refused has
    /// not been tried.
    pub const ALL: [Self; 9] = [
        Step::CreateRing,
        Step::RestrictRing,
        Step::MapMemory,
        Step::FutexDiffers,
        Step::FutexRungByCall,
        Step::FutexRungByRing,
        Step::Poll,
        Step::Timeout,
        Step::Cancel,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::CreateRing => "creating a ring",
            Step::RestrictRing => "restricting the ring",
            Step::MapMemory => "mapping a memfd",
            Step::FutexDiffers => "futex wait on a changed word",
            Step::FutexRungByCall => "futex wait rung by futex(2)",
            Step::FutexRungByRing => "futex wait rung by a ring",
            Step::Poll => "polling an eventfd",
            Step::Timeout => "an absolute timeout",
            Step::Cancel => "cancelling a futex wait",
        })
    }
}

/// io_uring cannot be used here. The caller falls back to another way of waiting, and logs this once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// The kernel refused a step.
    #[error("{step}: {errno}; {cause}")]
    Refused {
        /// What was tried.
        step: Step,
        /// What the kernel answered.
        errno: Errno,
        /// The likely reason, and what to do.
        cause: Cause,
    },
    /// The ring lacks a feature that the driver cannot do without.
    #[error("io_uring lacks IORING_FEAT_{feature} on kernel {release}; kernel 6.7 or newer has it")]
    Feature {
        /// Its name, without the prefix.
        feature: &'static str,
        /// The kernel's release.
        release: String,
    },
    /// A step of the self-test ended, but not as it must: this io_uring does not do what is relied on.
    #[error("{step}: ended with {got:?} instead of {expected:?}")]
    Differs {
        /// What was tried.
        step: Step,
        /// How it should have ended.
        expected: Result<u32, Errno>,
        /// How it did end.
        got: Result<u32, Errno>,
    },
    /// A step of the self-test did not end within a second.
    #[error("{step}: no completion within a second")]
    Silent {
        /// What was tried.
        step: Step,
    },
}

impl SetupError {
    pub(crate) fn refused(step: Step, errno: Errno, host: Host) -> Self {
        SetupError::Refused { step, errno, cause: Cause::of(step, errno, host) }
    }
}

/// The errno in `error`. The calls we make set one; EIO stands for a library error without any.
pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

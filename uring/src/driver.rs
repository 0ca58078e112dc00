//! What a reactor waits with: a ring where the kernel grants one, else epoll (F38).
//!
//! An enum and not a trait: the reactor is there once, not once for each driver, and what it pays is a branch on a word
//! beside those that it reads anyway.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::buffers::{Buffer, Staging};
use crate::epoll::EpollDriver;
use crate::error::{DriverError, SetupError};
use crate::op::{Completion, Token};
use crate::ring_driver::RingDriver;
use crate::setup::Options;

/// Whether [`Driver::enter`] waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Submit, let the kernel finish what it has, come back. No system call if there is nothing to do.
    No,
    /// As `No`, then wait until there is a completion: at most so long (relative), or for ever.
    Until(Option<Duration>),
}

/// What a driver has done since it was made. Plain sums; they wrap after 2^64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Calls of io_uring_enter(2), or of epoll_wait(2).
    pub enters: u64,
    /// Futex waits queued.
    pub arms: u64,
    /// Futex wakes queued.
    pub wakes: u64,
    /// Wakes that the kernel refused, as far as completions have been taken.
    pub failed_wakes: u64,
    /// Polls queued.
    pub polls: u64,
    /// Timeouts queued.
    pub timeouts: u64,
    /// Cancels queued.
    pub cancels: u64,
    /// Messages to other rings queued.
    pub messages: u64,
    /// Reads queued.
    pub reads: u64,
    /// Reads among them into registered buffers.
    pub fixed_reads: u64,
    /// Messages that the kernel refused, as far as completions have been taken.
    pub failed_messages: u64,
    /// Completions handed to the caller.
    pub completions: u64,
    /// Early submissions because the submission queue was full (F35).
    pub queue_full: u64,
    /// Enters repeated because the kernel answered EAGAIN or EBUSY.
    pub retries: u64,
}

/// A driver of one kind or the other. Made and used by one thread.
///
/// The contract is that of [`RingDriver`]: operations are asked for, an [`enter`](Self::enter) makes the kernel see them and
/// may wait, completions are taken. [`EpollDriver`] says where it differs.
///
/// ```compile_fail
/// fn send<T: Send>() {}
/// send::<doorbell_uring::Driver>();
/// ```
/// ```compile_fail
/// fn sync<T: Sync>() {}
/// sync::<doorbell_uring::Driver>();
/// ```
#[allow(clippy::large_enum_variant)] // One for each reactor, which lives as long as it.
pub enum Driver {
    /// io_uring.
    Ring(RingDriver),
    /// epoll.
    Epoll(EpollDriver),
}

/// Does the same with either driver.
macro_rules! either {
    ($self:ident, $driver:ident => $does:expr) => {
        match $self {
            Driver::Ring($driver) => $does,
            Driver::Epoll($driver) => $does,
        }
    };
}

impl Driver {
    /// A ring, see [`RingDriver::new`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::new`].
    pub fn new(options: &Options) -> Result<Self, SetupError> {
        RingDriver::new(options).map(Self::Ring)
    }

    /// The driver that needs no io_uring, see [`EpollDriver::new`].
    ///
    /// # Errors
    ///
    /// As for [`EpollDriver::new`].
    pub fn epoll(mail: Token) -> Result<Self, DriverError> {
        EpollDriver::new(mail).map(Self::Epoll)
    }

    /// Whether [`futex_wait`](Self::futex_wait) waits. If not, whoever rings a bell has to write to a descriptor that is
    /// polled, too.
    #[inline]
    pub fn waits_on_words(&self) -> bool {
        matches!(self, Self::Ring(_))
    }

    /// See [`RingDriver::futex_wait`]. Where the driver [cannot wait on words](Self::waits_on_words) nothing happens.
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::futex_wait`].
    #[inline]
    pub fn futex_wait(&mut self, word: &AtomicU32, expected: u32, token: Token) -> Result<(), DriverError> {
        match self {
            Self::Ring(ring) => ring.futex_wait(word, expected, token),
            Self::Epoll(_) => Ok(()),
        }
    }

    /// See [`RingDriver::futex_wake`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::futex_wake`].
    #[inline]
    pub fn futex_wake(&mut self, word: &AtomicU32, count: u32) -> Result<(), DriverError> {
        match self {
            Self::Ring(ring) => ring.futex_wake(word, count),
            Self::Epoll(epoll) => {
                epoll.futex_wake(word, count);
                Ok(())
            }
        }
    }

    /// See [`RingDriver::poll`] and [`EpollDriver::poll`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::poll`].
    pub fn poll(&mut self, fd: BorrowedFd<'_>, events: PollFlags, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.poll(fd, events, token))
    }

    /// See [`RingDriver::timeout`] and [`EpollDriver::timeout`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::timeout`].
    pub fn timeout(&mut self, at: Duration, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.timeout(at, token))
    }

    /// See [`RingDriver::read`] and [`EpollDriver::read`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::read`].
    pub fn read(
        &mut self,
        file: Arc<OwnedFd>,
        offset: u64,
        len: usize,
        buffer: Buffer,
        token: Token,
    ) -> Result<(), DriverError> {
        either!(self, driver => driver.read(file, offset, len, buffer, token))
    }

    /// See [`RingDriver::take_buffer`].
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        either!(self, driver => driver.take_buffer())
    }

    /// See [`RingDriver::take_registration_refusal`].
    pub fn take_registration_refusal(&mut self) -> Option<Errno> {
        match self {
            Self::Ring(ring) => ring.take_registration_refusal(),
            Self::Epoll(_) => None,
        }
    }

    /// See [`RingDriver::trim`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::trim`].
    pub fn trim(&mut self, staging: &Staging) -> Result<usize, DriverError> {
        match self {
            Self::Ring(ring) => ring.trim(staging),
            Self::Epoll(_) => staging.trim(|_| Ok(false)),
        }
    }

    /// Gives back memory that grew with descriptors which are closed by now. Costs a look through them.
    pub fn forget(&mut self) {
        if let Self::Epoll(epoll) = self {
            epoll.forget();
        }
    }

    /// See [`RingDriver::cancel`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::cancel`].
    pub fn cancel(&mut self, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.cancel(token))
    }

    /// See [`RingDriver::msg_ring`]; `other` is what [`AsFd`] gives of a driver of the same kind. One of epoll hears that
    /// there is mail, not what: `value` is lost, and its token is the one that it was made with.
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::msg_ring`].
    pub fn msg_ring(
        &mut self,
        other: BorrowedFd<'_>,
        value: u32,
        token_there: Token,
    ) -> Result<(), DriverError> {
        match self {
            Self::Ring(ring) => ring.msg_ring(other, value, token_there),
            Self::Epoll(epoll) => {
                epoll.send_mail(other);
                Ok(())
            }
        }
    }

    /// See [`RingDriver::pending`] and [`EpollDriver::pending`].
    #[inline]
    pub fn pending(&self) -> bool {
        either!(self, driver => driver.pending())
    }

    /// See [`RingDriver::enter`] and [`EpollDriver::enter`].
    ///
    /// # Errors
    ///
    /// As for [`RingDriver::enter`].
    pub fn enter(&mut self, wait: Wait) -> Result<(), DriverError> {
        either!(self, driver => driver.enter(wait))
    }

    /// See [`RingDriver::next_completion`].
    pub fn next_completion(&mut self) -> Option<Completion> {
        either!(self, driver => driver.next_completion())
    }

    /// See [`RingDriver::overflowed`].
    pub fn overflowed(&self) -> u32 {
        match self {
            Self::Ring(ring) => ring.overflowed(),
            Self::Epoll(_) => 0,
        }
    }

    /// See [`RingDriver::failed_wakes`].
    pub fn failed_wakes(&self) -> u64 {
        self.counters().failed_wakes
    }

    /// What the driver has done since it was made.
    pub fn counters(&self) -> Counters {
        either!(self, driver => driver.counters())
    }
}

/// Where [`Driver::msg_ring`] of another driver reaches this one.
impl AsFd for Driver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, driver => driver.as_fd())
    }
}

//! Plain futex(2) on a word shared between processes. All that a client needs; no ring is involved.
//!
//! Always *shared*, never `FUTEX_PRIVATE_FLAG`: the kernel files private and shared waiters under
//! different keys, so a private wake does not find a shared waiter even within one process, and the
//! ring's futex operations here are shared as well.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags};

use crate::time;

/// Why [`wait`] returned. None of them says that the word has changed: look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// Somebody rang, or the kernel woke us for no reason.
    Woken,
    /// The word did not hold the expected value, so nobody waited (EAGAIN).
    Changed,
    /// The timeout passed.
    TimedOut,
    /// A signal handler ran (EINTR). The time that remains is the caller's to compute.
    Interrupted,
}

/// Sleeps until `word` is rung, unless it already differs from `expected`.
///
/// Shape:  `timeout` is relative, CLOCK_MONOTONIC; `None` waits for ever.
/// Cost:   one system call; a sleep and a wake on another core take tens of microseconds.
/// Source: futex(2), FUTEX_WAIT.
///
/// # Errors
///
/// What the kernel refuses, unchanged: EFAULT if the word's page is gone, EINVAL, ENOSYS.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> Result<Woken, Errno> {
    let timeout = timeout.map(time::for_syscall);
    match futex::wait(word, Flags::empty(), expected, timeout.as_ref()) {
        Ok(()) => Ok(Woken::Woken),
        Err(Errno::AGAIN) => Ok(Woken::Changed),
        Err(Errno::TIMEDOUT) => Ok(Woken::TimedOut),
        Err(Errno::INTR) => Ok(Woken::Interrupted),
        Err(errno) => Err(errno),
    }
}

/// Wakes at most `count` of those who wait on `word`, by futex(2) or by a ring, and returns how many.
///
/// Shape:  `count` above `i32::MAX` counts as `i32::MAX`. Towards a ring wake `i32::MAX`: waits of a
///         ring that was just closed absorb wakes for some milliseconds. Towards a client a small
///         count: a thousand waiters planted on one word cost the waker milliseconds.
/// Cost:   one system call, 15 µs more if it has to wake an idle core.
/// Source: futex(2), FUTEX_WAKE.
///
/// # Errors
///
/// What the kernel refuses, unchanged: EFAULT if the word's page is gone, EINVAL, ENOSYS.
pub fn wake(word: &AtomicU32, count: u32) -> Result<u32, Errno> {
    let count = count.min(i32::MAX as u32);
    futex::wake(word, Flags::empty(), count).map(|woken| woken as u32)
}

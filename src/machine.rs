//! What the machine tells a client or a reactor: the time, the core it runs on, whether it has been rung. Without tests
//! these are the calls that they stand for; a simulation answers in their place.

use doorbell_shm::SegmentError;
use doorbell_shm::layout::Geometry;
use doorbell_shm::segment::{Identity, Segment};
use doorbell_uring::futex;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

#[cfg(test)]
pub(crate) use crate::simulation::driver::Driver;
#[cfg(test)]
use crate::simulation::kernel;
#[cfg(not(test))]
pub(crate) use doorbell_uring::Driver;

/// CLOCK_MONOTONIC.
#[inline(always)]
pub(crate) fn now() -> Instant {
    #[cfg(test)]
    if let Some(now) = kernel::now() {
        return now;
    }
    Instant::now()
}

/// The core that the caller runs on.
#[inline(always)]
pub(crate) fn current_cpu() -> u32 {
    #[cfg(test)]
    if let Some(cpu) = kernel::cpu() {
        return cpu;
    }
    doorbell_uring::current_cpu()
}

/// Lets others run.
#[inline(always)]
pub(crate) fn yield_now() {
    #[cfg(test)]
    if kernel::others_run(Duration::ZERO) {
        return;
    }
    std::thread::yield_now();
}

/// As [`futex::wait`].
#[inline(always)]
pub(crate) fn futex_wait(
    word: &AtomicU32,
    expected: u32,
    timeout: Duration,
) -> std::result::Result<futex::Woken, Errno> {
    #[cfg(test)]
    if let Some(woken) = kernel::futex_wait(word, expected, timeout) {
        return Ok(woken);
    }
    futex::wait(word, expected, Some(timeout))
}

/// As [`futex::wake`].
#[inline(always)]
pub(crate) fn futex_wake(word: &AtomicU32, count: u32) -> std::result::Result<u32, Errno> {
    #[cfg(test)]
    if let Some(woken) = kernel::ring(word) {
        return Ok(woken);
    }
    futex::wake(word, count)
}

/// poll(2) of one socket.
pub(crate) fn poll(
    socket: &OwnedFd,
    events: PollFlags,
    timeout: Option<&Timespec>,
) -> rustix::io::Result<usize> {
    #[cfg(test)]
    if let Some(ready) = kernel::poll(socket, events, timeout) {
        return ready;
    }
    rustix::event::poll(&mut [PollFd::new(socket, events)], timeout)
}

/// As [`Segment::create`].
pub(crate) fn create_segment(
    geometry: Geometry,
    lanes: u32,
    identity: Identity,
) -> std::result::Result<Segment, SegmentError> {
    #[cfg(test)]
    if let Some(made) = kernel::create_segment(geometry, lanes, identity) {
        return made;
    }
    Segment::create(geometry, lanes, identity)
}

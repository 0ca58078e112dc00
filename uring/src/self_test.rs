//! Does io_uring do here what the driver relies on? Tried, not asked for (F38).
//!
//! A probe of opcodes would say "supported" where a seccomp filter, a restriction or a bug says no,
//! and would not say why.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::io::Errno;

use crate::cause::{Host, futex_bug_unfixed};
use crate::driver::{Driver, Wait};
use crate::error::{DriverError, SetupError, Step};
use crate::futex;
use crate::memory::SharedWord;
use crate::op::Token;
use crate::setup::Options;
use crate::time::monotonic_now;

/// How long a step may take. Each needs microseconds; a loaded machine needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a passed self-test has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// uname(2) release of the kernel.
    pub release: String,
    /// The steps that were tried, all of which passed.
    pub passed: Vec<Step>,
    /// Whether this kernel may lack the fix of CVE-2025-39698 ([`futex_bug_unfixed`]).
    pub futex_bug_unfixed: bool,
    /// How long it took.
    pub took: Duration,
}

/// Tries on a ring of its own all that a [`Driver`] is relied on for: futex waits and wakes on shared
/// memory, from both sides; a poll; a timeout; a cancel.
///
/// Cost:   about 2 ms, most of it the timeout; at most a second per step where something hangs. One
///         descriptor for the ring, two more for the memory and the poll; nothing remains.
/// Source: fault F38.
///
/// # Errors
///
/// [`SetupError`], naming the step, the errno, the likely cause and what to do.
pub fn self_test() -> Result<Report, SetupError> {
    let start = monotonic_now();
    let options = Options { entries: 8, completion_entries: 16, restrict: true };
    let mut bench = Bench { driver: Driver::new(&options)?, step: Step::CreateRing, passed: Vec::new() };
    bench.passed.extend([Step::CreateRing, Step::RestrictRing]);

    bench.step = Step::MapMemory;
    let word = SharedWord::new().map_err(|errno| bench.refused(errno))?;
    word.here().store(WORD, Relaxed);
    bench.passed.push(Step::MapMemory);

    for (step, check) in [
        (Step::FutexDiffers, futex_differs as fn(&mut Bench, &SharedWord) -> Result<(), SetupError>),
        (Step::FutexRungByCall, futex_rung_by_call),
        (Step::FutexRungByRing, futex_rung_by_ring),
        (Step::Poll, poll),
        (Step::Timeout, timeout),
        (Step::Cancel, cancel),
    ] {
        bench.step = step;
        check(&mut bench, &word)?;
        bench.passed.push(step);
    }

    let release = Host::read().release;
    Ok(Report {
        futex_bug_unfixed: futex_bug_unfixed(&release),
        release,
        passed: bench.passed,
        took: monotonic_now().saturating_sub(start),
    })
}

/// What the word holds.
const WORD: u32 = 7;
/// One operation at a time: they need no other name.
const TOKEN: Token = Token(1);

fn futex_differs(bench: &mut Bench, word: &SharedWord) -> Result<(), SetupError> {
    bench.queue(|driver| driver.futex_wait(word.here(), WORD + 1, TOKEN))?;
    bench.expect(Err(Errno::AGAIN))
}

fn futex_rung_by_call(bench: &mut Bench, word: &SharedWord) -> Result<(), SetupError> {
    bench.queue(|driver| driver.futex_wait(word.here(), WORD, TOKEN))?;
    let woken = futex::wake(word.there(), i32::MAX as u32);
    bench.compare(Ok(1), woken)?;
    bench.expect(Ok(0))
}

fn futex_rung_by_ring(bench: &mut Bench, word: &SharedWord) -> Result<(), SetupError> {
    bench.queue(|driver| driver.futex_wait(word.here(), WORD, TOKEN))?;
    bench.queue(|driver| driver.futex_wake(word.there(), i32::MAX as u32))?;
    bench.expect(Ok(0))
}

fn poll(bench: &mut Bench, _: &SharedWord) -> Result<(), SetupError> {
    let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| bench.refused(errno))?;
    bench.queue(|driver| driver.poll(event.as_fd(), PollFlags::IN, TOKEN))?;
    rustix::io::write(&event, &1u64.to_ne_bytes()).map_err(|errno| bench.refused(errno))?;
    bench.expect(Ok(PollFlags::IN.bits().into()))
}

fn timeout(bench: &mut Bench, _: &SharedWord) -> Result<(), SetupError> {
    let at = monotonic_now() + Duration::from_millis(1);
    bench.queue(|driver| driver.timeout(at, TOKEN))?;
    bench.expect(Err(Errno::TIME))?;
    // Too early would be a timeout that took its time for a relative one or for another clock.
    if monotonic_now() < at { bench.compare(Err(Errno::TIME), Ok(0)) } else { Ok(()) }
}

fn cancel(bench: &mut Bench, word: &SharedWord) -> Result<(), SetupError> {
    bench.queue(|driver| driver.futex_wait(word.here(), WORD, TOKEN))?;
    bench.queue(|driver| driver.cancel(TOKEN))?;
    bench.expect(Err(Errno::CANCELED))
}

/// The ring under test, and what is being tried on it.
struct Bench {
    driver: Driver,
    step: Step,
    passed: Vec<Step>,
}

impl Bench {
    /// Queues an operation and lets the kernel take it.
    fn queue(
        &mut self,
        operation: impl FnOnce(&mut Driver) -> Result<(), DriverError>,
    ) -> Result<(), SetupError> {
        let done = operation(&mut self.driver).and_then(|()| self.driver.enter(Wait::No));
        done.map_err(|error| self.failed(error))
    }

    /// Waits for the operation to end, and compares.
    fn expect(&mut self, expected: Result<u32, Errno>) -> Result<(), SetupError> {
        let deadline = monotonic_now() + PATIENCE;
        loop {
            if let Some(completion) = self.driver.next_completion() {
                return self.compare(expected, completion.result);
            }
            let left = deadline.saturating_sub(monotonic_now());
            if left.is_zero() {
                return Err(SetupError::Silent { step: self.step });
            }
            self.driver.enter(Wait::Until(Some(left))).map_err(|error| self.failed(error))?;
        }
    }

    fn compare(&self, expected: Result<u32, Errno>, got: Result<u32, Errno>) -> Result<(), SetupError> {
        match got {
            _ if got == expected => Ok(()),
            Err(errno) => Err(self.refused(errno)),
            Ok(_) => Err(SetupError::Differs { step: self.step, expected, got }),
        }
    }

    fn failed(&self, error: DriverError) -> SetupError {
        match error {
            DriverError::Os { source, .. } => self.refused(source),
            DriverError::Reserved(_) | DriverError::Value(_) => unreachable!("TOKEN is not reserved"),
        }
    }

    fn refused(&self, errno: Errno) -> SetupError {
        SetupError::refused(self.step, errno, Host::read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   what ends wrongly is told apart from what is refused.
    /// Method: compare by hand.
    #[test]
    fn f38_wrong_and_refused_are_told_apart() {
        let bench = Bench {
            driver: Driver::new(&Options { entries: 1, completion_entries: 2, restrict: false }).unwrap(),
            step: Step::Poll,
            passed: Vec::new(),
        };
        assert_eq!(bench.compare(Ok(1), Ok(1)), Ok(()));
        assert_eq!(
            bench.compare(Ok(1), Ok(4)),
            Err(SetupError::Differs { step: Step::Poll, expected: Ok(1), got: Ok(4) })
        );
        let refused = bench.compare(Ok(1), Err(Errno::MFILE)).unwrap_err();
        assert!(refused.to_string().starts_with("polling an eventfd: "), "{refused}");
        assert!(refused.to_string().contains("RLIMIT_NOFILE"), "{refused}");
    }
}

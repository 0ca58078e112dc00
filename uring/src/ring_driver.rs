//! The driver over io_uring: operations are queued, one enter submits them and waits, completions are taken.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::buffers::{Buffer, Staging};
use crate::driver::{Counters, Wait};
use crate::error::{DriverError, SetupError};
use crate::op::{Completion, Op, RawCompletion, Token};
use crate::reads::{Read, Reads, Registration};
use crate::ring::Ring;
use crate::setup::Options;
use crate::time::monotonic_now;

/// How often one call is repeated while the kernel has no memory for the entries (EAGAIN, EBUSY).
const ATTEMPTS: u32 = 16;

/// How long dropping a driver waits for its reads to end. Cancelled, they end at once, unless a disk or a
/// file server hangs.
const READS_END_WITHIN: Duration = Duration::from_secs(1);

/// One ring and what is in flight on it. Made and used by one thread: the type is not `Send`, since
/// the kernel takes submissions from the creating thread only.
///
/// Operations are queued without a system call and submitted by the next [`enter`](Self::enter), in
/// order. All but wakes, cancels and messages end in exactly one [`Completion`]. If the submission
/// queue is full, it is submitted at once: nothing is ever dropped (F35).
///
/// Dropping the driver ends all its operations without completions; its armed futex waits may
/// absorb wakes for some milliseconds more, so ring a doorbell with `i32::MAX`, never 1. It waits for its reads
/// to end, at most a second; the buffers of those that do not end by then are never used again. A forked child
/// does not inherit the ring's memory and must not touch the driver.
///
/// Source: io_uring_enter(2); the facts of kernel and ring that it relies on are tested by
/// `tests/kernel.rs`.
pub struct RingDriver {
    ring: Ring,
    /// Completions taken out of the ring to let the kernel go on. Normally empty, never allocated.
    aside: VecDeque<RawCompletion>,
    counters: Counters,
    reads: Reads,
    registration: Registration,
    /// The buffer of the read whose completion was taken last.
    landed: Option<Buffer>,
}

impl RingDriver {
    /// Makes a ring for the calling thread.
    ///
    /// Shape:  see [`Options`], also for the memory.
    /// Cost:   tens of microseconds, one file descriptor (closed on exec).
    /// Source: io_uring_setup(2). A ring that can be made may still refuse futexes: see
    ///         [`self_test`](crate::self_test).
    ///
    /// # Errors
    ///
    /// [`SetupError::Refused`] with the likely cause, [`SetupError::Feature`].
    pub fn new(options: &Options) -> Result<Self, SetupError> {
        let ring = Ring::new(options)?;
        Ok(RingDriver {
            ring,
            aside: VecDeque::new(),
            counters: Counters::default(),
            reads: Reads::default(),
            registration: Registration::default(),
            landed: None,
        })
    }

    /// Waits for `word` to be rung, unless it differs from `expected` when the kernel looks. One-shot.
    ///
    /// Shape:  completes with `Ok(0)` when rung, `AGAIN` if the word differed, `CANCELED`.
    ///         Unmapping the word does not end the wait: cancel it.
    /// Cost:   0.2 to 0.4 µs in the kernel, 448 B of its memory while armed. An untouched page of
    ///         shared memory gets allocated.
    /// Source: io_uring_enter(2), IORING_OP_FUTEX_WAIT; always a shared futex.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn futex_wait(&mut self, word: &AtomicU32, expected: u32, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.arms += 1;
        self.push(Op::FutexWait { word, expected, token })
    }

    /// Wakes at most `count` of those who wait on `word`, by futex(2) or a ring. Never completes; if
    /// the kernel refuses it, [`failed_wakes`](Self::failed_wakes) counts.
    ///
    /// Shape:  `count` above `i32::MAX` counts as `i32::MAX`. Happens at the next enter, after the
    ///         operations queued before it.
    /// Cost:   0.2 to 0.3 µs in the kernel, 15 µs more to wake an idle core.
    /// Source: io_uring_enter(2), IORING_OP_FUTEX_WAKE; always a shared futex.
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn futex_wake(&mut self, word: &AtomicU32, count: u32) -> Result<(), DriverError> {
        self.counters.wakes += 1;
        self.push(Op::FutexWake { word, count: count.min(i32::MAX as u32) })
    }

    /// Waits for one of `events` on `fd`. One-shot; HUP and ERR are always among the events.
    ///
    /// Shape:  completes with the events ([`Completion::events`]). `fd` must stay open until the next
    ///         enter; from then on the kernel keeps the file, so that closing `fd` does not end the
    ///         poll: cancel it.
    /// Source: poll(2), IORING_OP_POLL_ADD.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn poll(&mut self, fd: BorrowedFd<'_>, events: PollFlags, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.polls += 1;
        self.push(Op::Poll { fd: fd.as_raw_fd(), events, token })
    }

    /// Completes with `TIME` at the CLOCK_MONOTONIC time `at` (see
    /// [`monotonic_now`](crate::monotonic_now)), at once if that has passed.
    ///
    /// Shape:  `at` beyond 95 years counts as 95 years. Late by 25 to 40 µs where measured.
    /// Cost:   a kernel timer. To bound one wait, [`Wait::Until`] is cheaper.
    /// Source: io_uring_enter(2), IORING_OP_TIMEOUT with IORING_TIMEOUT_ABS.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn timeout(&mut self, at: Duration, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.timeouts += 1;
        self.push(Op::Timeout { at, token })
    }

    /// Reads from `file` at `offset` into `buffer`: at most `len` bytes, and at most what it holds.
    ///
    /// File and buffer are the driver's until the completion is taken; then [`take_buffer`](Self::take_buffer)
    /// gives the buffer back. If this fails they are dropped.
    ///
    /// Shape:  completes with the number of bytes, 0 at the end of the file, fewer than asked for near it. A
    ///         pipe or socket has no offset. A file opened with O_NONBLOCK may be read within the enter however
    ///         long that takes, where its file system cannot tell in advance: clear the flag.
    /// Cost:   a read of cached pages happens within the enter, at the price of its copy. tmpfs and what is not
    ///         cached go to a thread of the kernel. The first read into a buffer registers it, if it is of the pool
    ///         that this driver read into first and the kernel lets us: 7 µs for 4 KiB, 30 µs for 64 KiB, 0.5 ms
    ///         for 1 MiB where measured, nearly all of it for pages that had to be made anyway.
    /// Source: io_uring_enter(2), IORING_OP_READ_FIXED, IORING_OP_READ.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn read(
        &mut self,
        file: Arc<OwnedFd>,
        offset: u64,
        len: usize,
        buffer: Buffer,
        token: Token,
    ) -> Result<(), DriverError> {
        checked(token)?;
        let fixed = self.registration.number(&buffer, &self.ring);
        let (fd, address) = (file.as_raw_fd(), buffer.address());
        let len = len.min(buffer.class().size()) as u32;
        let number = self.reads.begin(Read { token, buffer, _file: file });
        let pushed = self.push(Op::Read { fd, offset, address, len, fixed, number });
        if pushed.is_err() {
            // The kernel has not been given it.
            self.reads.end(number);
            return pushed;
        }
        self.counters.reads += 1;
        self.counters.fixed_reads += u64::from(fixed.is_some());
        Ok(())
    }

    /// The buffer of the read whose completion was taken last, with [`Buffer::bytes`] being what was read.
    ///
    /// Not taken before the next completion is, it goes back to its pool: the completion of a read that nobody
    /// waits for any more can be ignored.
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        self.landed.take()
    }

    /// Why the kernel has refused to register a buffer; once, for the log. Reads go on without (F40).
    ///
    /// NOMEM is RLIMIT_MEMLOCK in most cases, which privileged processes do not have.
    pub fn take_registration_refusal(&mut self) -> Option<Errno> {
        self.registration.take_refusal()
    }

    /// Gives the memory back of every free buffer of `staging` that has not been held since the last call, and
    /// returns how many bytes that were. To be called now and then.
    ///
    /// Cost:   a system call for each buffer given back, two if it is registered; else some nanoseconds a buffer.
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if the kernel does not let go of a registered buffer, which then keeps its memory.
    pub fn trim(&mut self, staging: &Staging) -> Result<usize, DriverError> {
        let own = self.registration.is_of(staging);
        staging.trim(|index| match own {
            true => self
                .ring
                .unregister(index)
                .map(|()| true)
                .map_err(|source| DriverError::Os { call: "io_uring_register", source }),
            false => Ok(false),
        })
    }

    /// Ends one operation called `token`, which then completes with `CANCELED`, unless it has ended
    /// already or does so meanwhile. The cancel itself never completes.
    ///
    /// Cost:   a search through the ring's operations of each kind: 2.7 µs with 1000 armed waits.
    /// Source: io_uring_enter(2), IORING_OP_ASYNC_CANCEL.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] if a full queue cannot be submitted.
    pub fn cancel(&mut self, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.cancels += 1;
        let token = self.reads.find(token).map_or(token, Token::of_read);
        self.push(Op::Cancel { token })
    }

    /// Makes a completion `token_there` with the result `value` appear on another driver's ring,
    /// which wakes its thread. Never completes here; if the kernel refuses it (the other ring is
    /// gone), [`Counters::failed_messages`] counts.
    ///
    /// Shape:  `other` is what [`AsFd`] gives of the other driver; it must stay open until the next
    ///         enter. `value` has 31 bits.
    /// Source: io_uring_enter(2), IORING_OP_MSG_RING.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`], [`DriverError::Value`]; [`DriverError::Os`] if a full queue cannot be
    /// submitted.
    pub fn msg_ring(
        &mut self,
        other: BorrowedFd<'_>,
        value: u32,
        token_there: Token,
    ) -> Result<(), DriverError> {
        checked(token_there)?;
        let value = i32::try_from(value).map_err(|_| DriverError::Value(value))?;
        self.counters.messages += 1;
        self.push(Op::Message { ring: other.as_raw_fd(), value, token_there })
    }

    /// Whether there is anything to enter for or to take: operations not yet submitted, work the
    /// kernel put off until we enter, completions.
    ///
    /// A polling loop must test this each round: without an enter no completion ever appears.
    /// `false` is a snapshot: what the kernel raises right after it is seen next time.
    ///
    /// Cost:   some loads from two cache lines, about 2 ns. No system call, no fence.
    #[inline]
    pub fn pending(&self) -> bool {
        self.has_completions() || self.ring.has_work()
    }

    /// Submits what is queued, lets the kernel finish what it has, and waits if told so: one system
    /// call, or none if it is [`Wait::No`] and the kernel has nothing to do.
    ///
    /// A wait also ends without a completion: when its time is over or by a signal. If completions
    /// can already be taken, it does not wait. A short submission (no memory) is repeated.
    ///
    /// Newer kernels finish a limited number of operations per enter (6.18: 20 or 40), so that
    /// `pending` may still be true after all completions are taken: enter again before any wait
    /// elsewhere.
    ///
    /// Source: io_uring_enter(2).
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`]: what is queued stays queued, entering again is allowed.
    pub fn enter(&mut self, wait: Wait) -> Result<(), DriverError> {
        if wait == Wait::No && !self.ring.has_work() {
            return Ok(());
        }
        let mut entered = self.enter_once(wait)?;
        while entered == Entered::Done && self.ring.has_unsubmitted() {
            entered = self.enter_once(wait)?;
        }
        Ok(())
    }

    /// The oldest completion that somebody wants, or `None` until the next enter.
    ///
    /// Cost:   some nanoseconds. The kernel's part, 60 to 260 ns, was paid by the enter.
    pub fn next_completion(&mut self) -> Option<Completion> {
        self.landed = None;
        loop {
            let raw = self.aside.pop_front().or_else(|| self.ring.pop())?;
            match raw.token {
                Token::WAKE => self.counters.failed_wakes += u64::from(raw.result < 0),
                Token::MESSAGE => self.counters.failed_messages += u64::from(raw.result < 0),
                Token::CANCEL => {} // too late: the operation had ended
                token => {
                    let token = match token.read_number().map(|number| self.land(number, raw.result)) {
                        None => token,
                        Some(Some(token)) => token,
                        Some(None) => continue,
                    };
                    self.counters.completions += 1;
                    return Some(Completion { token, result: raw.result() });
                }
            }
        }
    }

    /// A read has ended: its buffer is ours again. Returns what the caller called it.
    fn land(&mut self, number: u32, result: i32) -> Option<Token> {
        let read = self.reads.end(number);
        debug_assert!(read.is_some(), "every read completes once");
        let Read { token, mut buffer, .. } = read?;
        buffer.set_filled(u32::try_from(result).unwrap_or(0));
        self.landed = Some(buffer);
        Some(token)
    }

    /// Cancels the reads in flight and waits for their end. What has not ended then is leaked: the kernel may write
    /// to it at any time, even when the ring is closed.
    fn end_reads(&mut self, patience: Duration) {
        let numbers: Vec<u32> = self.reads.numbers().collect();
        let deadline = monotonic_now() + patience;
        let cancelled = numbers
            .into_iter()
            .try_for_each(|number| self.push(Op::Cancel { token: Token::of_read(number) }));
        let mut goes_on = cancelled.is_ok();
        while goes_on {
            while self.next_completion().is_some() {}
            let left = deadline.saturating_sub(monotonic_now());
            goes_on =
                !self.reads.is_empty() && !left.is_zero() && self.enter(Wait::Until(Some(left))).is_ok();
        }
        self.reads.leak();
    }

    /// Completions that the kernel lost for want of memory, since the ring was made (F36).
    ///
    /// A full completion queue loses nothing. If this number ever moves, look at every word and
    /// arm everything again.
    pub fn overflowed(&self) -> u32 {
        self.ring.dropped()
    }

    /// Wakes that the kernel refused, as far as completions have been taken. Wakes refused mean a word
    /// that is gone: an error of the caller, or of nobody when a peer truncated its file.
    pub fn failed_wakes(&self) -> u64 {
        self.counters.failed_wakes
    }

    /// What the driver has done since it was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn has_completions(&self) -> bool {
        !self.aside.is_empty() || self.ring.has_completions()
    }

    fn push(&mut self, op: Op) -> Result<(), DriverError> {
        while !self.ring.push(&op) {
            self.counters.queue_full += 1;
            self.enter_once(Wait::No)?;
        }
        Ok(())
    }

    /// One system call, repeated while the kernel cannot take entries at all.
    fn enter_once(&mut self, wait: Wait) -> Result<Entered, DriverError> {
        for _ in 0..ATTEMPTS {
            self.counters.enters += 1;
            let result = match wait {
                Wait::Until(timeout) if self.aside.is_empty() => self.ring.submit_and_wait(timeout),
                _ => self.ring.submit(),
            };
            match result {
                Ok(()) => return Ok(Entered::Done),
                // BADR: completions were dropped; `overflowed` tells, and the bit is now cleared.
                Err(Errno::TIME | Errno::INTR | Errno::BADR) => return Ok(Entered::Ended),
                Err(Errno::AGAIN | Errno::BUSY) => self.make_room(),
                Err(source) => return Err(DriverError::Os { call: "io_uring_enter", source }),
            }
        }
        Err(DriverError::Os { call: "io_uring_enter", source: Errno::AGAIN })
    }

    /// Takes all completions aside, so that the kernel can place those it holds back and free what
    /// they occupy. Bounded by the operations in flight.
    fn make_room(&mut self) {
        self.counters.retries += 1;
        while let Some(raw) = self.ring.pop() {
            self.aside.push_back(raw);
        }
        std::thread::yield_now();
    }
}

impl Drop for RingDriver {
    fn drop(&mut self) {
        if !self.reads.is_empty() {
            self.end_reads(READS_END_WITHIN);
        }
    }
}

/// The descriptor of the ring, for [`RingDriver::msg_ring`] of another driver, or to be polled.
impl AsFd for RingDriver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }
}

/// Whether entries that are still queued are worth another call at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entered {
    Done,
    /// The wait was over: the caller decides.
    Ended,
}

pub(crate) fn checked(token: Token) -> Result<(), DriverError> {
    if token.is_reserved() { Err(DriverError::Reserved(token)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::{Class, Counts};

    fn small() -> RingDriver {
        RingDriver::new(&Options { entries: 8, completion_entries: 64, restrict: true }).unwrap()
    }

    /// Goal:   a wake that the kernel refuses is counted, and shown to nobody.
    /// Method: a wake of the null page, which safe code cannot ask for, behind a timeout long past.
    #[test]
    fn a_refused_wake_is_counted_and_hidden() {
        let mut driver = small();
        driver.push(Op::FutexWake { word: std::ptr::null(), count: 1 }).unwrap();
        driver.timeout(Duration::ZERO, Token(1)).unwrap();
        driver.enter(Wait::Until(None)).unwrap();
        assert_eq!(driver.next_completion().unwrap().token, Token(1));
        assert_eq!(driver.next_completion(), None);
        assert_eq!(driver.failed_wakes(), 1);
    }

    /// Goal:   completions taken aside keep their order, show in `pending`, and keep an enter from
    ///         sleeping (F35, F36).
    /// Method: take two aside by hand, arm a wait that nobody ends, enter with a long wait.
    #[test]
    fn f36_completions_taken_aside_come_first() {
        let mut driver = small();
        let word = AtomicU32::new(0);
        for token in [1, 2] {
            driver.futex_wait(&word, 1, Token(token)).unwrap();
        }
        driver.enter(Wait::No).unwrap();
        driver.make_room();
        assert!(!driver.ring.has_work() && driver.pending());

        driver.futex_wait(&word, 0, Token(3)).unwrap();
        let start = monotonic_now();
        driver.enter(Wait::Until(Some(Duration::from_secs(10)))).unwrap();
        assert!(monotonic_now() < start + Duration::from_secs(9));
        driver.cancel(Token(3)).unwrap();
        driver.enter(Wait::No).unwrap();
        let tokens: Vec<_> = std::iter::from_fn(|| driver.next_completion()).map(|c| c.token.0).collect();
        assert_eq!(tokens, [1, 2, 3]);
        assert_eq!(driver.counters().retries, 1);
    }

    /// Goal:   a buffer whose read has not ended when the driver goes is never used again, and stays mapped.
    /// Method: a read of an empty pipe, and no patience. Whoever writes to the pipe then finds a reader, since the
    ///         file is kept too.
    #[test]
    fn a_read_that_does_not_end_costs_its_buffer() {
        let staging = Staging::new(Counts { small: 1, medium: 1, large: 0 }).unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut driver = small();
        driver.read(Arc::new(read), 0, 100, staging.take(Class::Small).unwrap(), Token(1)).unwrap();
        driver.enter(Wait::No).unwrap();
        driver.end_reads(Duration::ZERO);
        assert!(driver.reads.is_empty());
        drop(driver);
        assert_eq!(staging.free(Class::Small), 0);
        assert_eq!(rustix::io::write(&write, b"late"), Ok(4));
        drop(staging);
    }
}

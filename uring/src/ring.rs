//! The ring itself: entries in, completions out, the kernel's flags. The only file that pushes.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, TimeoutFlags, Timespec};
use io_uring::{CompletionStatus, EnterFlags, IoUring, opcode};
use libc::iovec;
use rustix::io::Errno;

use crate::buffers::Buffer;
use crate::error::{SetupError, errno_of};
use crate::op::{Op, RawCompletion, Token};
use crate::setup::{self, Options};
use crate::time;

/// `FUTEX2_SIZE_U32`, and nothing else: neither `FUTEX2_PRIVATE`, whose waiters a shared wake
/// misses, nor `FUTEX2_NUMA`.
const FUTEX_SHARED_U32: u32 = rustix::thread::futex::WaitFlags::SIZE_U32.bits();
/// `FUTEX_BITSET_MATCH_ANY`: any waiter, any waker.
const ANY: u64 = u32::MAX as u64;

/// A ring. Neither `Send` nor `Sync`: `completions` holds pointers. The kernel accepts submissions
/// from the creating thread only, and `has_work` must not run beside `push`.
pub(crate) struct Ring {
    /// The kernel's completion head and tail; never used after `ring` is dropped with it.
    completions: CompletionStatus,
    ring: IoUring,
    /// The times of timeouts not yet submitted, one per submission entry, taken in turn.
    times: Vec<Timespec>,
    next_time: usize,
}

impl Ring {
    pub(crate) fn new(options: &Options) -> Result<Self, SetupError> {
        let mut ring = setup::ring(options)?;
        let times = vec![Timespec::new(); ring.submission().capacity()];
        // SAFETY:
        // - Not outliving the ring: both are private fields of one struct, the status has no `Drop`,
        //   and nothing hands it out.
        // - The pointers stay right when the struct moves: they lead into the mapped ring.
        let completions = unsafe { ring.completion().status() };
        Ok(Ring { completions, ring, times, next_time: 0 })
    }

    /// Queues `op`. `false`: the submission queue is full, nothing was done.
    pub(crate) fn push(&mut self, op: &Op) -> bool {
        if self.ring.submission().is_full() {
            return false;
        }
        let entry = self.entry(op);
        // SAFETY: "parameters are valid for the entire duration of the operation", op by op:
        // - FutexWait, FutexWake: the address is looked up by the kernel while it takes the entry, and
        //   the word is then known by its key (inode or address space, and offset). The kernel only
        //   ever reads it, to compare. An address that was unmapped meanwhile gives EFAULT, one that
        //   was mapped anew a wait on the wrong word: wrong, but no memory is written or unmapped.
        // - Timeout: the time is copied while the kernel takes the entry (FEAT_SUBMIT_STABLE, which
        //   `setup` requires; there is no SQPOLL thread). Until then it lies in `times`: a heap
        //   block never resized. Its place is used again only after `capacity` further timeouts
        //   were pushed, and the queue holds `capacity` entries, so this one has been taken by then.
        //   `times` outlives the ring's last enter, since entering needs `self`.
        // - Poll, Message: plain numbers. A descriptor closed before the enter gives EBADF or names
        //   another file; the kernel holds its own reference from then on.
        // - Cancel: a plain number.
        // - Read: the memory is that of a `Buffer`, at least `len` bytes of a mapping. The driver holds the
        //   buffer until the completion has been taken, or forgets it, and its mapping with it, if there is
        //   none in the end. So it stays mapped, and nobody has a reference to it while the kernel writes.
        //   The driver also holds the file.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "there was room");
        pushed.is_ok()
    }

    fn entry(&mut self, op: &Op) -> Entry {
        match *op {
            Op::FutexWait { word, expected, token } => {
                opcode::FutexWait::new(word.cast(), expected.into(), ANY, FUTEX_SHARED_U32)
                    .build()
                    .user_data(token.0)
            }
            Op::FutexWake { word, count } => {
                let entry = opcode::FutexWake::new(word.cast(), count.into(), ANY, FUTEX_SHARED_U32).build();
                silent(entry, Token::WAKE)
            }
            Op::Poll { fd, events, token } => {
                opcode::PollAdd::new(Fd(fd), events.bits().into()).build().user_data(token.0)
            }
            Op::Timeout { at, token } => {
                let place = self.next_time;
                self.next_time = (place + 1) % self.times.len();
                self.times[place] = time::for_ring(at);
                opcode::Timeout::new(&raw const self.times[place])
                    .flags(TimeoutFlags::ABS)
                    .build()
                    .user_data(token.0)
            }
            Op::Cancel { token } => silent(opcode::AsyncCancel::new(token.0).build(), Token::CANCEL),
            Op::Message { ring, value, token_there } => {
                let entry = opcode::MsgRingData::new(Fd(ring), value, token_there.0, None).build();
                silent(entry, Token::MESSAGE)
            }
            Op::Read { fd, offset, address, len, fixed, number } => {
                let fd = Fd(fd);
                let entry = match fixed {
                    Some(index) => opcode::ReadFixed::new(fd, address, len, index).offset(offset).build(),
                    None => opcode::Read::new(fd, address, len).offset(offset).build(),
                };
                entry.user_data(Token::of_read(number).0)
            }
        }
    }

    /// Makes room for so many registered buffers. Pins nothing.
    pub(crate) fn register_table(&self, buffers: u32) -> Result<(), Errno> {
        self.ring.submitter().register_buffers_sparse(buffers).map_err(|error| errno_of(&error))
    }

    /// Registers `buffer` under its own number: makes all its pages and pins them.
    pub(crate) fn register(&self, buffer: &Buffer) -> Result<(), Errno> {
        let iov = iovec { iov_base: buffer.address().cast(), iov_len: buffer.class().size() };
        self.update_buffer(buffer.index(), iov)
    }

    /// Lets go of the buffer of this number. No read of it may be in flight, or it would keep its pages pinned.
    pub(crate) fn unregister(&self, index: u16) -> Result<(), Errno> {
        self.update_buffer(index, iovec { iov_base: ptr::null_mut(), iov_len: 0 })
    }

    fn update_buffer(&self, index: u16, iov: iovec) -> Result<(), Errno> {
        // SAFETY: "valid until buffers are unregistered or the ring destroyed":
        // - The kernel takes a reference to each page now. Should the mapping go before the registration does, the
        //   pages are the kernel's alone, and what it writes to them is seen by nobody.
        // - A null address of length 0 empties the place.
        let updated = unsafe { self.ring.submitter().register_buffers_update(index.into(), &[iov], None) };
        updated.map_err(|error| errno_of(&error))
    }

    /// Submits all there is and runs what the kernel has put off, without waiting.
    pub(crate) fn submit(&mut self) -> Result<(), Errno> {
        let entries = self.ring.submission().len() as u32;
        // GETEVENTS always, unlike `IoUring::submit`, which asks for it only if work was put off before:
        // an entry can put off work itself, such as a cancel or a wake of our own waits.
        // SAFETY:
        // - No argument is passed; the flag is no EXT_ARG, so the kernel expects a signal mask or null.
        // - The entries are whole: `push` wrote them and published the tail.
        let entries =
            unsafe { self.ring.submitter().enter::<()>(entries, 0, EnterFlags::GETEVENTS.bits(), None) };
        taken(entries)
    }

    /// Submits all there is and waits for a completion, at most for `timeout`.
    pub(crate) fn submit_and_wait(&self, timeout: Option<Duration>) -> Result<(), Errno> {
        let Some(timeout) = timeout else { return taken(self.ring.submit_and_wait(1)) };
        let timeout = time::for_ring(timeout);
        taken(self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout)))
    }

    /// The oldest completion.
    pub(crate) fn pop(&mut self) -> Option<RawCompletion> {
        let entry = self.ring.completion().next()?;
        Some(RawCompletion { token: Token(entry.user_data()), result: entry.result() })
    }

    /// Whether completions can be popped.
    #[inline]
    pub(crate) fn has_completions(&self) -> bool {
        !self.completions.is_empty()
    }

    /// Whether an enter would do something: entries to submit, work to run, completions kept aside.
    #[inline]
    pub(crate) fn has_work(&self) -> bool {
        // SAFETY: no other `SubmissionQueue` exists: each lives within one method, and the type is
        // not `Sync`, so no two methods run at once.
        let queue = unsafe { self.ring.submission_shared() };
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Whether entries wait to be submitted.
    pub(crate) fn has_unsubmitted(&self) -> bool {
        // SAFETY: as in `has_work`.
        let queue = unsafe { self.ring.submission_shared() };
        !queue.is_empty()
    }

    /// Completions the kernel had to drop, since the ring was made.
    pub(crate) fn dropped(&self) -> u32 {
        // SAFETY: as in `has_work`, of the completion queue.
        let queue = unsafe { self.ring.completion_shared() };
        queue.overflow()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// An entry that completes only if it fails.
fn silent(entry: Entry, token: Token) -> Entry {
    entry.flags(Flags::SKIP_SUCCESS).user_data(token.0)
}

fn taken(entries: std::io::Result<usize>) -> Result<(), Errno> {
    entries.map(drop).map_err(|error| errno_of(&error))
}

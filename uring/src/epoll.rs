//! The driver where io_uring cannot be had: epoll, an eventfd, and plain system calls (F38).
//!
//! Words:  no system call waits for words and descriptors together, so whoever rings a bell writes to a descriptor that
//!         is polled, too. Wakes are futex(2), at once: who sleeps on a word is woken by either driver.
//! Looks:  what happens shows only in an enter, and nothing in memory says that it has happened. So
//!         [`EpollDriver::pending`] asks for an enter now and then.
//! Files:  are read within an enter if they are cached, a little at a time; else by a helper thread.
//! Bound:  an enter makes one epoll_wait and reads at least one piece of a file, and no more than 64 KiB in others.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::io::Errno;

use crate::buffers::Buffer;
use crate::driver::{Counters, Wait};
use crate::error::DriverError;
use crate::futex;
use crate::helper::{Helper, Job, read_cached, read_whatever_it_takes};
use crate::op::{Completion, Token};
use crate::ring_driver::checked;
use crate::time::{for_syscall, monotonic_now};

/// Calls of [`EpollDriver::pending`] between two that ask for an enter. A look costs as much as two empty rounds of a
/// reactor, and what comes on a descriptor waits for it.
const CALLS_PER_LOOK: u32 = 16;
/// Events taken by one epoll_wait. The others are not lost.
const EVENTS_MAX: usize = 64;
/// Timers that there is room for from the start: a reactor has one or two.
const TIMERS: usize = 8;
/// Bytes of files that one enter reads before it looks at anything else.
const READ_PER_ENTER: usize = 64 << 10;
/// What an event of our own eventfd carries; those of others carry a descriptor below 2^31.
const MAIL: u64 = u64::MAX;

/// epoll and what it is to wait for. Made and used by one thread.
///
/// The contract is that of [`RingDriver`](crate::RingDriver), but for words ([`Driver::waits_on_words`]), mail
/// ([`Driver::msg_ring`]) and this: what is asked for happens at once, not with the next enter; timeouts are late by up to
/// a millisecond.
///
/// [`Driver::waits_on_words`]: crate::Driver::waits_on_words
/// [`Driver::msg_ring`]: crate::Driver::msg_ring
pub struct EpollDriver {
    epoll: OwnedFd,
    /// An eventfd that others write to: messages, and reads of the helper that have ended.
    mail: OwnedFd,
    mail_token: Token,
    /// By descriptor, as far as the highest that was polled since [`EpollDriver::forget`].
    watches: Vec<Watch>,
    /// The last one given to a watch.
    serial: u32,
    timers: BinaryHeap<Reverse<(Duration, Token)>>,
    /// Reads that no enter has tried yet.
    reads: VecDeque<Read>,
    /// Reads what is not cached; there from the first such read on.
    helper: Option<Helper>,
    /// Reads that the helper has, by what it calls them.
    handed_over: Vec<(u32, Token, Buffer)>,
    next_job: u32,
    completions: VecDeque<Done>,
    /// The buffer of the read whose completion was taken last.
    landed: Option<Buffer>,
    events: Vec<Event>,
    /// Calls of `pending` since the last enter.
    asked: Cell<u32>,
    counters: Counters,
}

/// What is known of a descriptor.
#[derive(Debug, Clone, Copy)]
struct Watch {
    token: Token,
    /// No other has it: an event of an earlier watch of the same number means nothing.
    serial: u32,
    /// epoll has probably had it under this number; a closed file has left by itself.
    known: bool,
    /// Its completion is still to come.
    armed: bool,
}

const UNWATCHED: Watch = Watch { token: Token(0), serial: 0, known: false, armed: false };

/// A read that has been asked for.
struct Read {
    file: Arc<OwnedFd>,
    offset: u64,
    len: usize,
    buffer: Buffer,
    token: Token,
}

/// A completion, with the buffer if it is that of a read.
struct Done {
    completion: Completion,
    buffer: Option<Buffer>,
}

impl EpollDriver {
    /// Makes a driver for the calling thread. Mail completes as `mail`, with the value 0.
    ///
    /// Cost:   two file descriptors (closed on exec), some KiB.
    /// Source: epoll(7), eventfd(2).
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if there is no descriptor or no memory; [`DriverError::Reserved`].
    pub fn new(mail: Token) -> Result<Self, DriverError> {
        checked(mail)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|source| os("epoll_create1", source))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let eventfd = eventfd(0, flags).map_err(|source| os("eventfd", source))?;
        epoll::add(&epoll, &eventfd, EventData::new_u64(MAIL), EventFlags::IN)
            .map_err(|source| os("epoll_ctl", source))?;
        Ok(EpollDriver {
            epoll,
            mail: eventfd,
            mail_token: mail,
            watches: Vec::new(),
            serial: 0,
            timers: BinaryHeap::with_capacity(TIMERS),
            reads: VecDeque::new(),
            helper: None,
            handed_over: Vec::new(),
            next_job: 0,
            completions: VecDeque::with_capacity(EVENTS_MAX + TIMERS),
            landed: None,
            events: Vec::with_capacity(EVENTS_MAX),
            asked: Cell::new(0),
            counters: Counters::default(),
        })
    }

    /// Wakes at most `count` of those who wait on `word`, now. A refusal counts in [`Counters::failed_wakes`].
    pub fn futex_wake(&mut self, word: &std::sync::atomic::AtomicU32, count: u32) {
        self.counters.wakes += 1;
        if futex::wake(word, count).is_err() {
            self.counters.failed_wakes += 1;
        }
    }

    /// Waits for one of `events` on `fd`. One-shot; HUP and ERR are always among the events.
    ///
    /// Shape:  completes with the events ([`Completion::events`]); at once with NOMEM or NOSPC if the kernel has no room
    ///         for it. A poll of a descriptor that is polled already takes its place, and the earlier one never completes.
    ///         Closing the last descriptor of a file ends it without a completion.
    /// Cost:   a system call of some 100 ns.
    /// Source: epoll_ctl(2), EPOLLONESHOT.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`]; [`DriverError::Os`] for a descriptor that cannot be polled.
    pub fn poll(&mut self, fd: BorrowedFd<'_>, events: PollFlags, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.polls += 1;
        let index = fd.as_raw_fd() as usize;
        if self.watches.len() <= index {
            self.watches.resize(index + 1, UNWATCHED);
        }
        self.serial = self.serial.wrapping_add(1);
        let (watch, serial) = (&mut self.watches[index], self.serial);
        let data = EventData::new_u64(u64::from(serial) << 32 | index as u64);
        let flags = EventFlags::from_bits_retain(events.bits().into()) | EventFlags::ONESHOT;
        let changed = match watch.known {
            true => match epoll::modify(&self.epoll, fd, data, flags) {
                // That was a file which has been closed since.
                Err(Errno::NOENT) => epoll::add(&self.epoll, fd, data, flags),
                other => other,
            },
            false => match epoll::add(&self.epoll, fd, data, flags) {
                // It was forgotten, not closed.
                Err(Errno::EXIST) => epoll::modify(&self.epoll, fd, data, flags),
                other => other,
            },
        };
        match changed {
            Ok(()) => *watch = Watch { token, serial, known: true, armed: true },
            Err(errno @ (Errno::NOMEM | Errno::NOSPC)) => {
                *watch = Watch { token, serial, known: false, armed: false };
                self.done(token, Err(errno), None);
            }
            Err(source) => return Err(os("epoll_ctl", source)),
        }
        Ok(())
    }

    /// Gives back what is kept for descriptors above the highest that is polled now.
    pub fn forget(&mut self) {
        let kept = self.watches.iter().rposition(|watch| watch.armed).map_or(0, |last| last + 1);
        self.watches.truncate(kept);
        self.watches.shrink_to_fit();
    }

    /// Completes with `TIME` at the CLOCK_MONOTONIC time `at`, or up to a millisecond later.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`].
    pub fn timeout(&mut self, at: Duration, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.timeouts += 1;
        self.timers.push(Reverse((at, token)));
        Ok(())
    }

    /// Reads from a regular file at `offset` into `buffer`: at most `len` bytes, and at most what it holds.
    ///
    /// Shape:  as for [`RingDriver::read`](crate::RingDriver::read).
    /// Cost:   of cached pages a copy, within an enter. What is not cached, or lies on a file system that cannot say so,
    ///         goes to a thread, and takes a copy more.
    /// Source: preadv2(2), RWF_NOWAIT; pread(2).
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`].
    pub fn read(
        &mut self,
        file: Arc<OwnedFd>,
        offset: u64,
        len: usize,
        buffer: Buffer,
        token: Token,
    ) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.reads += 1;
        let len = len.min(buffer.class().size());
        self.reads.push_back(Read { file, offset, len, buffer, token });
        Ok(())
    }

    /// The buffer of the read whose completion was taken last, with [`Buffer::bytes`] being what was read. Not taken
    /// before the next completion is, it goes back to its pool.
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        self.landed.take()
    }

    /// Ends one operation called `token`, which then completes with `CANCELED`, unless it has ended already. A read that
    /// the helper has ends by itself.
    ///
    /// Cost:   a search through all descriptors: a microsecond for a thousand.
    ///
    /// # Errors
    ///
    /// [`DriverError::Reserved`].
    pub fn cancel(&mut self, token: Token) -> Result<(), DriverError> {
        checked(token)?;
        self.counters.cancels += 1;
        let watched = self.watches.iter_mut().find(|watch| watch.armed && watch.token == token);
        if let Some(watch) = watched {
            // epoll goes on watching, and reports it once at most, which means nothing any more.
            watch.armed = false;
            self.done(token, Err(Errno::CANCELED), None);
        } else if self.timers.iter().any(|Reverse((_, timer))| *timer == token) {
            self.timers.retain(|Reverse((_, timer))| *timer != token);
            self.done(token, Err(Errno::CANCELED), None);
        } else if let Some(at) = self.reads.iter().position(|read| read.token == token)
            && let Some(read) = self.reads.remove(at)
        {
            self.done(token, Err(Errno::CANCELED), Some(read.buffer));
        }
        Ok(())
    }

    /// Tells another driver that there is mail; `other` is what [`AsFd`] gives of it. A refusal counts in
    /// [`Counters::failed_messages`].
    pub fn send_mail(&mut self, other: BorrowedFd<'_>) {
        self.counters.messages += 1;
        if ring_eventfd(other).is_err() {
            self.counters.failed_messages += 1;
        }
    }

    /// Whether to enter: there are completions to take or files to read, or it is time to look what has happened, as it
    /// is every sixteenth time that this is asked.
    ///
    /// Cost:   three loads and a store. No system call, no fence.
    #[inline]
    pub fn pending(&self) -> bool {
        let asked = self.asked.get() + 1;
        self.asked.set(asked);
        asked >= CALLS_PER_LOOK || !self.completions.is_empty() || !self.reads.is_empty()
    }

    /// Looks what has happened, and waits if told so and nothing has: one system call, and one for each piece of a file.
    ///
    /// A wait also ends without a completion: when its time is over or by a signal. If completions can already be taken,
    /// nothing is done.
    ///
    /// Source: epoll_wait(2).
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`]; entering again is allowed.
    pub fn enter(&mut self, wait: Wait) -> Result<(), DriverError> {
        self.asked.set(0);
        if !self.completions.is_empty() {
            return Ok(());
        }
        self.read_some();
        let longest = match wait {
            Wait::Until(longest) if self.completions.is_empty() && self.reads.is_empty() => longest,
            _ => Some(Duration::ZERO),
        };
        let longest = match self.timers.peek() {
            None => longest,
            Some(Reverse((at, _))) => {
                let left = at.saturating_sub(monotonic_now());
                Some(longest.map_or(left, |longest| longest.min(left)))
            }
        };
        self.counters.enters += 1;
        self.events.clear();
        let timeout = longest.map(for_syscall);
        let events = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.epoll, events, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(source) => return Err(os("epoll_wait", source)),
        }
        for i in 0..self.events.len() {
            let Event { flags, data, .. } = self.events[i];
            self.happened(data.u64(), flags)?;
        }
        self.expire();
        Ok(())
    }

    /// The oldest completion, or `None` until the next enter.
    pub fn next_completion(&mut self) -> Option<Completion> {
        let done = self.completions.pop_front();
        self.landed = None;
        let Done { completion, buffer } = done?;
        self.landed = buffer;
        self.counters.completions += 1;
        Some(completion)
    }

    /// What the driver has done since it was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn done(&mut self, token: Token, result: Result<u32, Errno>, buffer: Option<Buffer>) {
        self.completions.push_back(Done { completion: Completion { token, result }, buffer });
    }

    /// An event of epoll's.
    fn happened(&mut self, data: u64, flags: EventFlags) -> Result<(), DriverError> {
        if data == MAIL {
            return self.mail_came();
        }
        let (index, serial) = (data as u32 as usize, (data >> 32) as u32);
        let watch = self.watches.get_mut(index).filter(|watch| watch.armed && watch.serial == serial);
        if let Some(watch) = watch {
            watch.armed = false;
            let token = watch.token;
            self.done(token, Ok(flags.bits()), None);
        }
        Ok(())
    }

    fn mail_came(&mut self) -> Result<(), DriverError> {
        match rustix::io::read(&self.mail, &mut [0u8; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(source) => return Err(os("read of an eventfd", source)),
        }
        while let Some((job, result)) = self.helper.as_ref().and_then(Helper::next_result) {
            let Some(at) = self.handed_over.iter().position(|(number, ..)| *number == job) else { continue };
            let (_, token, mut buffer) = self.handed_over.swap_remove(at);
            let result = result.map(|bytes| {
                buffer.whole()[..bytes.len()].copy_from_slice(&bytes);
                bytes.len()
            });
            self.land(token, buffer, result);
        }
        self.done(self.mail_token, Ok(0), None);
        Ok(())
    }

    /// Completes timers whose time has come.
    fn expire(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = monotonic_now();
        while self.timers.peek().is_some_and(|Reverse((at, _))| *at <= now)
            && let Some(Reverse((_, token))) = self.timers.pop()
        {
            self.done(token, Err(Errno::TIME), None);
        }
    }

    /// Reads what is cached of the files that are to be read, and hands over to the helper what is not.
    fn read_some(&mut self) {
        let mut left = READ_PER_ENTER;
        while left > 0
            && let Some(mut read) = self.reads.pop_front()
        {
            left = left.saturating_sub(read.len);
            let target = &mut read.buffer.whole()[..read.len];
            match read_cached(&read.file, read.offset, target) {
                Some(result) => self.land(read.token, read.buffer, result),
                None => self.hand_over(read),
            }
        }
    }

    /// Gives a read to the helper; without one it is done here, however long that takes.
    fn hand_over(&mut self, mut read: Read) {
        if self.helper.is_none() {
            // Refused for want of a thread or a descriptor: the next read tries again.
            self.helper = Helper::start(&self.mail).ok();
        }
        self.next_job = self.next_job.wrapping_add(1);
        let job =
            Job { number: self.next_job, file: Arc::clone(&read.file), offset: read.offset, len: read.len };
        if self.helper.as_ref().is_some_and(|helper| helper.take(job)) {
            self.handed_over.push((self.next_job, read.token, read.buffer));
            return;
        }
        if self.helper.take().is_some() {
            // It has died, and what it had with it. The next read starts another one.
            for (_, token, buffer) in std::mem::take(&mut self.handed_over) {
                self.land(token, buffer, Err(Errno::IO));
            }
        }
        let target = &mut read.buffer.whole()[..read.len];
        let result = read_whatever_it_takes(&read.file, read.offset, target);
        self.land(read.token, read.buffer, result);
    }

    fn land(&mut self, token: Token, mut buffer: Buffer, result: Result<usize, Errno>) {
        buffer.set_filled(result.unwrap_or(0) as u32);
        self.done(token, result.map(|bytes| bytes as u32), Some(buffer));
    }
}

/// Where mail for this driver goes.
impl AsFd for EpollDriver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mail.as_fd()
    }
}

/// Rings an eventfd, such as a driver of epoll has. One whose count is full has been rung.
///
/// # Errors
///
/// What the kernel refuses: a descriptor that is none.
pub fn ring_eventfd(eventfd: impl AsFd) -> Result<(), Errno> {
    match rustix::io::retry_on_intr(|| rustix::io::write(&eventfd, &1u64.to_ne_bytes())) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn os(call: &'static str, source: Errno) -> DriverError {
    DriverError::Os { call, source }
}

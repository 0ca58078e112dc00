//! The simulated kernel of one thread: clock, futexes, polls, timers, memory. Its answers come late, out of order, twice or
//! as errors, as the seed has it; nothing of it happens by itself.

use super::random::Random;
use doorbell_shm::SegmentError;
use doorbell_shm::layout::Geometry;
use doorbell_shm::segment::{Identity, Segment};
use doorbell_uring::futex::Woken;
use doorbell_uring::{Completion, PollFlags, Token};
use rustix::event::{PollFd, Timespec};
use rustix::io::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// What others do while somebody waits.
type Others = Rc<dyn Fn()>;

thread_local! {
    static KERNEL: RefCell<Option<Kernel>> = const { RefCell::new(None) };
    static OTHERS: RefCell<Option<Others>> = const { RefCell::new(None) };
    /// Whether things go wrong.
    static FAULTS: Cell<bool> = const { Cell::new(false) };
    /// Whether others run while a reactor waits, which cannot get on before they have.
    static REACTOR_WAITS: Cell<bool> = const { Cell::new(false) };
}

/// Reading the clock takes so long.
const LOOK_NS: u64 = 20;
/// The token of mail.
const MAIL: Token = Token(7 << 60);
/// Looks at the clock that are too many for anybody who does not wait: he who polls looks at it seldom.
const LOOKS_MAX: u64 = 20_000;
/// Steps of others that one wait lasts at most; then time goes on to its end.
const STEPS_PER_WAIT: u32 = 200;

/// A wait of a driver on a word.
struct Wait {
    node: usize,
    word: usize,
    token: Token,
}

/// A wait of a driver for a descriptor.
struct Poll {
    node: usize,
    fd: OwnedFd,
    events: PollFlags,
    token: Token,
}

/// The kernel.
pub struct Kernel {
    now_ns: u64,
    cpu: u32,
    random: Random,
    waits: Vec<Wait>,
    polls: Vec<Poll>,
    timers: Vec<(usize, u64, Token)>,
    /// Completions, of which node, and when they come.
    late: Vec<(u64, usize, Completion)>,
    ready: Vec<VecDeque<Completion>>,
    /// Where each node gets mail.
    mailboxes: Vec<i32>,
    /// The event descriptors behind them, by which others than reactors ring.
    events: Vec<Option<OwnedFd>>,
    /// Words that have been rung since somebody began to wait there.
    rung: BTreeSet<usize>,
    made: Option<Segment>,
    /// Looks at the clock since somebody else ran.
    looks: u64,
    /// Bells that did not ring, answers that were errors, memory that was refused.
    pub lost_bells: u64,
    pub errors: u64,
    pub refusals: u64,
}

/// Begins to simulate on this thread.
pub fn begin(seed: u64) {
    let kernel = Kernel {
        now_ns: 1_000_000_000,
        cpu: 0,
        random: Random::new(seed),
        waits: Vec::new(),
        polls: Vec::new(),
        timers: Vec::new(),
        late: Vec::new(),
        ready: Vec::new(),
        mailboxes: Vec::new(),
        events: Vec::new(),
        rung: BTreeSet::new(),
        made: None,
        looks: 0,
        lost_bells: 0,
        errors: 0,
        refusals: 0,
    };
    KERNEL.with_borrow_mut(|slot| *slot = Some(kernel));
}

/// Ends that.
pub fn end() {
    KERNEL.with_borrow_mut(Option::take);
    OTHERS.with_borrow_mut(Option::take);
    FAULTS.set(false);
    REACTOR_WAITS.set(false);
}

/// Whether things go wrong from here on.
pub fn set_faults(faults: bool) {
    FAULTS.set(faults);
}

/// Who runs while somebody waits.
pub fn set_others(others: Option<Others>) {
    OTHERS.with_borrow_mut(|slot| *slot = others);
}

pub fn with<R>(does: impl FnOnce(&mut Kernel) -> R) -> Option<R> {
    KERNEL.with_borrow_mut(|kernel| kernel.as_mut().map(does))
}

/// The same for those who are part of a simulation.
pub fn with_kernel<R>(does: impl FnOnce(&mut Kernel) -> R) -> R {
    with(does).expect("a simulation runs")
}

pub fn now_ns() -> Option<u64> {
    with(|kernel| {
        kernel.now_ns += LOOK_NS;
        kernel.looks += 1;
        assert!(kernel.looks < LOOKS_MAX, "somebody waits and lets nobody else run");
        kernel.now_ns
    })
}

pub fn now() -> Option<Instant> {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    now_ns().map(|ns| *BEGAN.get_or_init(Instant::now) + Duration::from_nanos(ns))
}

pub fn cpu() -> Option<u32> {
    with(|kernel| kernel.cpu)
}

/// Has others run for a step; `false` if nothing is simulated here.
pub fn others_run(at_least: Duration) -> bool {
    if with(|kernel| kernel.now_ns += at_least.as_nanos() as u64).is_none() {
        return false;
    }
    let others = OTHERS.with_borrow(Clone::clone);
    if let Some(others) = others {
        others();
    }
    true
}

/// The same while a reactor waits.
pub fn others_run_beside_reactor(at_least: Duration) {
    let before = REACTOR_WAITS.replace(true);
    others_run(at_least);
    REACTOR_WAITS.set(before);
}

/// Whether whoever runs now may wait for a reactor without an end.
pub fn may_wait() -> bool {
    !REACTOR_WAITS.get()
}

/// Waits until `ends` says so, or until `timeout` is over; whether it did.
fn wait_until(timeout: Option<Duration>, mut ends: impl FnMut() -> bool) -> bool {
    let until = timeout.map(|timeout| with_kernel(|kernel| kernel.now_ns) + timeout.as_nanos() as u64);
    for step in 1.. {
        if ends() {
            return true;
        }
        let now = with_kernel(|kernel| kernel.now_ns);
        match until {
            Some(until) if now >= until => return false,
            Some(until) if step % STEPS_PER_WAIT == 0 => with_kernel(|kernel| kernel.now_ns = until),
            // Signals wake whoever waits for ever now and then.
            None if step % STEPS_PER_WAIT == 0 => return true,
            _ => {}
        }
        others_run(Duration::ZERO);
    }
    true
}

/// A client sleeps on a word.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) -> Option<Woken> {
    let address = std::ptr::from_ref(word) as usize;
    with(|kernel| kernel.rung.remove(&address))?;
    if word.load(Relaxed) != expected {
        return Some(Woken::Changed);
    }
    let rung = wait_until(Some(timeout), || with_kernel(|kernel| kernel.rung.remove(&address)));
    Some(if rung { Woken::Woken } else { Woken::TimedOut })
}

/// A client waits for its socket.
pub fn poll(
    socket: &OwnedFd,
    events: PollFlags,
    timeout: Option<&Timespec>,
) -> Option<rustix::io::Result<usize>> {
    with(|_| ())?;
    let left = timeout.map(|left| Duration::new(left.tv_sec as u64, left.tv_nsec as u32));
    wait_until(left, || is_ready(socket, events));
    Some(Ok(usize::from(is_ready(socket, events))))
}

/// Whether a descriptor has something to say.
pub fn is_ready(socket: &impl AsFd, events: PollFlags) -> bool {
    let none = Timespec::default();
    rustix::event::poll(&mut [PollFd::new(socket, events)], Some(&none)).is_ok_and(|ready| ready > 0)
}

/// A client rings a word.
pub fn ring(word: &AtomicU32) -> Option<u32> {
    let address = std::ptr::from_ref(word) as usize;
    with(|kernel| {
        let mut woken = 0;
        for at in (0..kernel.waits.len()).rev() {
            if kernel.waits[at].word != address {
                continue;
            }
            if FAULTS.get() && kernel.random.one_in(40) {
                kernel.lost_bells += 1;
                continue;
            }
            let Wait { node, token, .. } = kernel.waits.swap_remove(at);
            kernel.answer(node, Completion { token, result: Ok(0) });
            woken += 1;
        }
        woken
    })
}

pub fn create_segment(
    geometry: Geometry,
    lanes: u32,
    identity: Identity,
) -> Option<Result<Segment, SegmentError>> {
    with(|kernel| {
        if FAULTS.get() && kernel.random.one_in(12) {
            kernel.refusals += 1;
            let errno = kernel.random.of(&[Errno::MFILE, Errno::NOMEM, Errno::NOSPC]);
            let source = io::Error::from(errno);
            return Err(SegmentError::Os { call: "memfd_create", len: 0, source });
        }
        let segment = Segment::on_heap(geometry, lanes, identity)?;
        kernel.made = segment.other_end().ok();
        Ok(segment)
    })
}

/// The client's end of the segment that was made last.
pub fn take_segment() -> Option<Segment> {
    with_kernel(|kernel| kernel.made.take())
}

impl Kernel {
    /// Another driver, which gets its mail here; returns its number.
    pub fn add_node(&mut self, mailbox: BorrowedFd<'_>) -> usize {
        self.mailboxes.push(mailbox.as_raw_fd());
        self.events.push(mailbox.try_clone_to_owned().ok());
        self.ready.push(VecDeque::new());
        self.ready.len() - 1
    }

    /// A driver gets its mail elsewhere.
    pub fn move_mailbox(&mut self, node: usize, mailbox: BorrowedFd<'_>) {
        self.mailboxes[node] = mailbox.as_raw_fd();
    }

    /// The process of a driver has gone.
    pub fn forget_node(&mut self, node: usize) {
        self.waits.retain(|wait| wait.node != node);
        self.polls.retain(|poll| poll.node != node);
        self.timers.retain(|timer| timer.0 != node);
        self.late.retain(|late| late.1 != node);
        self.ready[node].clear();
        self.mailboxes[node] = -1;
        self.events[node] = None;
    }

    pub fn set_cpu(&mut self, cpu: u32) {
        self.cpu = cpu;
    }

    pub fn pass(&mut self, ns: u64) {
        self.looks = 0;
        self.now_ns += ns;
    }

    pub fn time(&self) -> u64 {
        self.now_ns
    }

    /// Answers now or a little later.
    fn answer(&mut self, node: usize, completion: Completion) {
        let late = match self.random.below(4) {
            0 if FAULTS.get() => self.random.below(2_000_000) as u64,
            _ => 0,
        };
        self.late.push((self.now_ns + late, node, completion));
    }

    pub fn futex_wait(&mut self, node: usize, word: &AtomicU32, expected: u32, token: Token) {
        if word.load(Relaxed) != expected {
            return self.answer(node, Completion { token, result: Err(Errno::AGAIN) });
        }
        if FAULTS.get() && self.random.one_in(50) {
            self.errors += 1;
            let result = match self.random.below(4) {
                0 => Err(Errno::NOMEM),
                1 => Err(Errno::INTR),
                2 => Err(Errno::AGAIN),
                // Woken for nothing.
                _ => Ok(0),
            };
            return self.answer(node, Completion { token, result });
        }
        self.waits.push(Wait { node, word: std::ptr::from_ref(word) as usize, token });
    }

    pub fn futex_wake(&mut self, word: &AtomicU32) {
        self.rung.insert(std::ptr::from_ref(word) as usize);
    }

    pub fn poll(&mut self, node: usize, fd: BorrowedFd<'_>, events: PollFlags, token: Token) {
        // From here on the kernel keeps the file.
        let fd = fd.try_clone_to_owned().expect("descriptors enough");
        self.polls.push(Poll { node, fd, events, token });
    }

    pub fn timeout(&mut self, node: usize, at: Duration, token: Token) {
        self.timers.push((node, at.as_nanos() as u64, token));
    }

    pub fn cancel(&mut self, node: usize, token: Token) {
        let before = self.waits.len() + self.polls.len();
        self.waits.retain(|wait| wait.node != node || wait.token != token);
        self.polls.retain(|poll| poll.node != node || poll.token != token);
        for _ in self.waits.len() + self.polls.len()..before {
            self.answer(node, Completion { token, result: Err(Errno::CANCELED) });
        }
    }

    pub fn send_mail(&mut self, other: BorrowedFd<'_>, token: Token) {
        if let Some(node) = self.mailboxes.iter().position(|fd| *fd == other.as_raw_fd()) {
            self.answer(node, Completion { token, result: Ok(0) });
        }
    }

    /// Rings a driver's waits without a reason.
    pub fn ring_for_nothing(&mut self) {
        if !self.waits.is_empty() {
            let at = self.random.below(self.waits.len());
            let Wait { node, token, .. } = self.waits.swap_remove(at);
            self.answer(node, Completion { token, result: Ok(0) });
        }
    }

    /// Whether something has come for a driver.
    pub fn has_come(&self, node: usize) -> bool {
        let now = self.now_ns;
        !self.ready[node].is_empty()
            || self.late.iter().any(|late| late.1 == node && late.0 <= now)
            || self.timers.iter().any(|timer| timer.0 == node && timer.1 <= now)
    }

    /// Hands over what has come, in some order.
    pub fn enter(&mut self, node: usize) {
        let now = self.now_ns;
        let mut at = 0;
        while at < self.timers.len() {
            let (of, due, token) = self.timers[at];
            if of == node && due <= now {
                self.timers.swap_remove(at);
                self.ready[node].push_back(Completion { token, result: Err(Errno::TIME) });
            } else {
                at += 1;
            }
        }
        let mut at = 0;
        while at < self.late.len() {
            let (due, of, completion) = self.late[at];
            if of == node && due <= now {
                self.late.swap_remove(at);
                self.ready[node].push_back(completion);
            } else {
                at += 1;
            }
        }
    }

    pub fn next_completion(&mut self, node: usize) -> Option<Completion> {
        self.ready[node].pop_front()
    }

    /// Looks which of the descriptors that drivers wait for have something to say.
    pub fn look_at_descriptors(&mut self) {
        for node in 0..self.events.len() {
            let Some(event) = &self.events[node] else { continue };
            if rustix::io::read(event, &mut [0u8; 8]).is_ok() {
                self.answer(node, Completion { token: MAIL, result: Ok(1) });
            }
        }
        if self.polls.is_empty() {
            return;
        }
        let answers: Vec<PollFlags> = {
            let mut all: Vec<PollFd<'_>> =
                self.polls.iter().map(|poll| PollFd::new(&poll.fd, poll.events)).collect();
            if rustix::event::poll(&mut all, Some(&Timespec::default())).is_err() {
                return;
            }
            all.iter().map(PollFd::revents).collect()
        };
        for at in (0..answers.len()).rev().filter(|at| !answers[*at].is_empty()) {
            let Poll { node, token, .. } = self.polls.swap_remove(at);
            self.answer(node, Completion { token, result: Ok(answers[at].bits().into()) });
        }
    }
}

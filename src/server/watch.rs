//! Who watches over the reactors (F45, F46): a thread that looks at their pulses now and then. It names handlers that hold
//! a reactor for long, ends the process when one never comes back, and tells its caretaker that all is well.
//!
//! Rule:   what counts is the processor time that the reactor's thread has used since its pulse last changed: a machine
//!         that stood still, or is too busy to run the reactor, is no fault of the handler's. A reactor that stands still
//!         without using any (its handler waits for something) is logged, and its server is not said to be well.
//! Cost:   two stores a round and one a call, to a line that nobody else writes. The thread sleeps for long while the
//!         reactors do.

use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::rendezvous::monotonic_ns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// Longest time between two looks.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Shortest and longest time between two looks while a reactor works.
const BUSY_PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(500)];

/// What one reactor shows of itself. Only it writes here.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Pulse {
    /// Twice the rounds begun, modulo 2^32; plus 1 while it sleeps.
    rounds: AtomicU32,
    /// The message type whose handler ran last.
    running: AtomicU32,
}

impl Pulse {
    /// A round begins.
    #[inline(always)]
    pub fn beat(&self) {
        self.rounds.store(self.rounds.load(Relaxed).wrapping_add(2), Relaxed);
    }

    /// The reactor waits in the kernel, or does no longer.
    #[inline(always)]
    pub fn sleeps(&self, sleeps: bool) {
        self.rounds.store(self.rounds.load(Relaxed) & !1 | u32::from(sleeps), Relaxed);
    }

    /// The handler of a message type is about to run.
    #[inline(always)]
    pub fn runs(&self, message_type: u32) {
        self.running.store(message_type, Relaxed);
    }
}

/// A reactor that is watched over.
#[derive(Debug)]
pub(super) struct Watched {
    reactor: usize,
    pulse: Arc<Pulse>,
    /// What the kernel says of its thread; `None` where it says nothing.
    times: Option<File>,
    vigil: Vigil,
}

impl Watched {
    /// The reactor that runs on the calling thread.
    pub fn own(reactor: usize, pulse: Arc<Pulse>) -> Self {
        // Held open: the process may not be allowed to open it later.
        let times = File::open("/proc/thread-self/schedstat");
        if let Err(error) = &times {
            tracing::info!(%error, "nothing tells how long handlers run");
        }
        Self { reactor, pulse, times: times.ok(), vigil: Vigil::default() }
    }

    /// Processor time that its thread has used, ns.
    fn used_ns(&self) -> Option<u64> {
        let mut text = [0u8; 64];
        let len = self.times.as_ref()?.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(&text[..len]).ok()?.split_ascii_whitespace().next()?.parse().ok()
    }
}

/// What is bearable.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Processor time after which a handler is named.
    pub slow: Duration,
    /// Processor time after which the process ends; time after which it is said to be unwell.
    pub most: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Asleep,
    Works,
    /// It has used so much processor time for one round, told for the first time.
    Slow(Duration),
    /// So much that it will not come back.
    Stalled(Duration),
    /// Nothing has moved for too long, and no time was used; told for the first time.
    Waits(Duration),
    /// The same, told before.
    StillWaits,
}

/// What has been seen of one reactor.
#[derive(Debug, Default)]
struct Vigil {
    rounds: u32,
    since_ns: u64,
    used_then_ns: u64,
    told_slow: bool,
    told_waits: bool,
}

impl Vigil {
    fn look(&mut self, rounds: u32, now_ns: u64, used_ns: Option<u64>, patience: Patience) -> Verdict {
        let asleep = rounds & 1 == 1;
        if rounds != self.rounds || asleep || self.since_ns == 0 {
            let used_then_ns = used_ns.unwrap_or_default();
            *self = Self { rounds, since_ns: now_ns, used_then_ns, ..Self::default() };
            return if asleep { Verdict::Asleep } else { Verdict::Works };
        }
        let used = Duration::from_nanos(used_ns.unwrap_or_default().saturating_sub(self.used_then_ns));
        let lasted = Duration::from_nanos(now_ns - self.since_ns);
        if patience.most.is_some_and(|most| used >= most) {
            return Verdict::Stalled(used);
        }
        if used >= patience.slow && !self.told_slow {
            self.told_slow = true;
            return Verdict::Slow(used);
        }
        if patience.most.is_some_and(|most| lasted >= most) {
            let told = std::mem::replace(&mut self.told_waits, true);
            return if told { Verdict::StillWaits } else { Verdict::Waits(lasted) };
        }
        Verdict::Works
    }
}

/// What an embedder has done on the watching thread: for a thread of its own it may be too little.
pub trait Caretaker: Send {
    /// Readable when [`Caretaker::rung`] is to be called.
    fn bell(&self) -> BorrowedFd<'_>;

    /// Takes what has made the bell readable.
    fn rung(&mut self);

    /// How often [`Caretaker::well`] is wanted at least; `None`: not at all.
    fn interval(&self) -> Option<Duration>;

    /// Every reactor has moved lately, or sleeps.
    fn well(&mut self);
}

/// Watches over reactors until `ended` says that the server has returned.
pub(super) fn watch(
    ended: &OwnedFd,
    reactors: &Receiver<Watched>,
    mut caretaker: Option<Box<dyn Caretaker>>,
    patience: Patience,
) -> Result<()> {
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        watched.extend(reactors.try_iter());
        let (asleep, well) = look_at_all(&mut watched, patience);
        let interval = caretaker.as_ref().and_then(|caretaker| caretaker.interval());
        if well && let (Some(caretaker), Some(_)) = (&mut caretaker, interval) {
            caretaker.well();
        }
        let [shortest, longest] = BUSY_PAUSES;
        let busy = (patience.slow / 2).clamp(shortest, longest);
        let idle = patience.most.map_or(LONGEST_PAUSE, |most| (most / 4).min(LONGEST_PAUSE));
        // Until all reactors have begun they are about to.
        let pause = if asleep && !watched.is_empty() { idle.max(busy) } else { busy };
        let pause = interval.map_or(pause, |interval| pause.min(interval));
        let (over, rung) = wait(ended, caretaker.as_deref(), pause)?;
        // First: a server that has nothing to finish ends in the same moment.
        if rung && let Some(caretaker) = &mut caretaker {
            caretaker.rung();
        }
        if over {
            return Ok(());
        }
    }
}

/// Whether all of them sleep, and whether all of them are well.
fn look_at_all(watched: &mut [Watched], patience: Patience) -> (bool, bool) {
    let (mut asleep, mut well) = (true, true);
    for one in watched {
        let rounds = one.pulse.rounds.load(Relaxed);
        let verdict = one.vigil.look(rounds, monotonic_ns(), one.used_ns(), patience);
        let (reactor, handler) = (one.reactor, MessageType(one.pulse.running.load(Relaxed)));
        asleep &= verdict == Verdict::Asleep;
        match verdict {
            Verdict::Asleep | Verdict::Works => {}
            Verdict::Slow(used) => {
                tracing::warn!(reactor, ?used, "the handler of message type {handler} holds its reactor");
            }
            Verdict::Stalled(used) => {
                tracing::error!(
                    reactor,
                    ?used,
                    "the handler of message type {handler} does not come back: the server aborts"
                );
                std::process::abort();
            }
            Verdict::Waits(lasted) => {
                well = false;
                tracing::error!(
                    reactor,
                    ?lasted,
                    "the handler of message type {handler} keeps its reactor waiting"
                );
            }
            Verdict::StillWaits => well = false,
        }
    }
    (asleep, well)
}

/// Sleeps for a while; says whether the server has returned, and whether the caretaker's bell has rung.
fn wait(ended: &OwnedFd, caretaker: Option<&dyn Caretaker>, pause: Duration) -> Result<(bool, bool)> {
    let pause = Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: pause.subsec_nanos().into() };
    let bell = caretaker.map_or(ended.as_fd(), Caretaker::bell);
    let mut fds = [
        PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(bell, PollFlags::IN),
    ];
    match poll(&mut fds, Some(&pause)) {
        Ok(_) => Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty())),
        Err(Errno::INTR) => Ok((false, false)),
        Err(e) => Err(IpcError::io("poll of who watches over reactors", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const PATIENCE: Patience = Patience { slow: Duration::from_secs(1), most: Some(Duration::from_secs(30)) };

    /// Goal:   F45, F46: a handler is named once when its reactor has used a second for one round, and given up after
    ///         thirty; a reactor that goes on, sleeps, or does not get the processor is left alone.
    /// Method: by hand: rounds, the clock, and the processor time that the thread has used.
    #[test]
    fn f45_f46_processor_time_of_one_round_counts() {
        let mut vigil = Vigil::default();
        let mut look = |rounds, second: u64, used: u64| {
            vigil.look(rounds, (100 + second) * SECOND, Some(used * SECOND), PATIENCE)
        };
        let seconds = Duration::from_secs;
        assert_eq!([look(2, 0, 0), look(4, 1, 1)], [Verdict::Works; 2]);
        assert_eq!(look(4, 2, 2), Verdict::Slow(seconds(1)));
        assert_eq!([look(4, 3, 3), look(6, 4, 4)], [Verdict::Works; 2]);
        assert_eq!(look(6, 9, 6), Verdict::Slow(seconds(2)));
        assert_eq!(look(6, 40, 34), Verdict::Stalled(seconds(30)));
        assert_eq!([look(7, 80, 34), look(7, 800, 34)], [Verdict::Asleep; 2]);
        assert_eq!([look(8, 801, 34), look(8, 830, 34)], [Verdict::Works; 2]);
        assert_eq!(look(8, 832, 34), Verdict::Waits(seconds(31)));
        assert_eq!([look(8, 990, 34), look(10, 991, 34)], [Verdict::StillWaits, Verdict::Works]);
    }

    /// Goal:   F46: what the kernel says of a thread's time is understood.
    #[test]
    fn f46_the_time_of_a_thread_is_read() {
        let watched = Watched::own(0, Arc::default());
        let before = watched.used_ns().expect("the kernel tells");
        let begun = std::time::Instant::now();
        while watched.used_ns().unwrap() < before + 5_000_000 {
            assert!(begun.elapsed() < Duration::from_secs(30));
        }
    }
}

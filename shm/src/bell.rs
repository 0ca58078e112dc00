//! Doorbell words: how a side that is about to sleep and a side that has just published see each other.
//!
//! Rule:   both sides *publish, fence (SeqCst), read the other's state* (Dekker). Either the sleeper finds
//!         the entry when it looks again, or the publisher finds the mark and rings.
//! Cost:   a fence right behind the stores it orders waits for their cache lines, 50 to 100 ns; the same
//!         fence a moment later costs 10. So whoever has published looks without a fence first, goes on
//!         polling, and asks behind a fence once it has nothing better to do, always before it sleeps.
//! Trust:  a bell is a hint. A peer that scribbles on it loses wakes of its own, nothing else; the server's
//!         sweep finds what it did not ring for (S6, F25).
//! Layout: one 32-bit word on a line of its own, `shm/LAYOUT.md`, section Lane.
//!
//! No system call is made here: the functions say whether one is due.

use crate::sync::{
    AtomicU32,
    Ordering::{Relaxed, SeqCst},
    fence,
};
use std::ops::Deref;

/// The server runs: nobody needs to ring.
pub const AWAKE: u32 = 0;
/// The server sleeps until something is submitted.
pub const ASLEEP: u32 = 1;
/// The server sleeps and could not admit calls for lack of completion space: consuming rings too.
pub const ASLEEP_WANTS_SPACE: u32 = 2;

/// A client thread sleeps on the word itself.
pub const WAITER_FUTEX: u32 = 1;
/// A client waits on the session socket.
pub const WAITER_SOCKET: u32 = 2;

/// Orders what was published before it against the reading of the other side's bell after it.
///
/// One fence serves any number of lanes and entries: it is called once per flush or batch.
#[inline(always)]
pub fn fence_before_bell() {
    fence(SeqCst);
}

/// What a client has published since it last looked at the server's bell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// Submissions, or hints: rings a server that sleeps for whatever reason.
    Submissions,
    /// A consumed position only: rings a server that waits for completion space.
    Consumed,
}

/// The word that the server sleeps on, one per lane.
#[derive(Debug)]
pub struct ServerBell<B>(pub B);

impl<B: Deref<Target = AtomicU32>> ServerBell<B> {
    /// Server: says that it is about to sleep. It must look again at everything the lane may bring before
    /// it does, and call [`ServerBell::clear`] if it finds something.
    pub fn mark(&self, state: u32) {
        self.0.store(state, Relaxed);
        // SeqCst pairs with `fence_before_bell` in the client's flush.
        fence(SeqCst);
    }

    /// Server: says that it is awake.
    pub fn clear(&self) {
        self.0.store(AWAKE, Relaxed);
    }

    /// Server: whether its own mark still stands, that is, nobody has rung since.
    pub fn is_marked(&self) -> bool {
        self.0.load(Relaxed) != AWAKE
    }

    /// Client: whether the server *seems* to sleep, without a fence. `true` is worth an immediate look with
    /// [`ServerBell::take`]; `false` proves nothing until that has been asked behind a fence.
    #[inline(always)]
    pub fn seems_asleep(&self, published: Published) -> bool {
        let state = self.0.load(Relaxed);
        state != AWAKE && (state != ASLEEP || published == Published::Submissions)
    }

    /// Client: whether the server has to be woken, after [`fence_before_bell`]. Takes the mark, so that
    /// the caller that gets `true` is the only one who pays for the wake.
    #[inline(always)]
    pub fn take(&self, published: Published) -> bool {
        if !self.seems_asleep(published) {
            return false;
        }
        // Relaxed: what was published is ordered by the fences. The wake that follows cannot precede the
        // swap: FUTEX_WAIT compares the word under the lock that FUTEX_WAKE takes.
        self.0.swap(AWAKE, Relaxed) != AWAKE
    }
}

/// The word that clients sleep on, one per lane.
#[derive(Debug)]
pub struct ClientBell<B>(pub B);

impl<B: Deref<Target = AtomicU32>> ClientBell<B> {
    /// Client: says that it is about to sleep as `waiter` and returns the value to sleep on. It must look
    /// again at its completions before it does.
    pub fn mark(&self, waiter: u32) -> u32 {
        let value = self.0.fetch_or(waiter, Relaxed) | waiter;
        // SeqCst pairs with `fence_before_bell` in the server's round.
        fence(SeqCst);
        value
    }

    /// Client: says that it no longer waits as `waiter`. The bit is everybody's who waits that way: it may
    /// be cleared only while nobody else does (one leader per kind of waiter), or that one sleeps on.
    pub fn clear(&self, waiter: u32) {
        self.0.fetch_and(!waiter, Relaxed);
    }

    /// Server: whether somebody *seems* to sleep, without a fence; as for [`ServerBell::seems_asleep`].
    #[inline(always)]
    pub fn seems_asleep(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Server: who has to be woken, after [`fence_before_bell`]: bits of [`WAITER_FUTEX`] and
    /// [`WAITER_SOCKET`], 0 for nobody. Takes every bit.
    #[inline(always)]
    pub fn take(&self) -> u32 {
        if self.0.load(Relaxed) == 0 {
            return 0;
        }
        // Relaxed: as in `ServerBell::take`.
        self.0.swap(0, Relaxed) & (WAITER_FUTEX | WAITER_SOCKET)
    }
}

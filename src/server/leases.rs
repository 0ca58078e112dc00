//! Who waits for leased memory, who gives it back, and when it is taken. Sans-I/O: backing pages and punching them is
//! the reactor's.
//!
//! Rule:   wishes are granted in the order in which they came. While one waits, every other lane's leases are void: in
//!         use no longer than the calls that have them. A lane that does nothing with its leases for 100 ms meanwhile
//!         loses them, whatever it had in them (F59). Leases that nobody uses for half a second are taken back too.
//! Circle: a lease is wished for before its call begins and never while holding another one of that call; and
//!         every call can go on in its base slots without any. So nobody waits for somebody who waits for him.

use super::lane::SessionLane;
use doorbell_shm::lease::Granted;
use std::collections::VecDeque;

/// How long a lane may hold memory that others wait for without doing anything with it.
const PATIENCE_NS: u64 = 100_000_000;
/// How long leases may lie unused while nobody waits.
const IDLE_NS: u64 = 500_000_000;

/// A LEASE that has not been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish {
    /// The lane's seat.
    pub seat: u32,
    pub ring: usize,
    pub slot: u32,
    pub generation: u32,
    /// Bytes of each slot.
    pub bytes: u32,
    pub slots: u32,
}

/// A RETURN that has not been answered: its memory is to be given back to the kernel first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Giving {
    pub seat: u32,
    pub ring: usize,
    pub slot: u32,
    pub generation: u32,
    pub lease: Granted,
}

/// What the lanes of one reactor want of its memory.
#[derive(Debug, Default)]
pub(crate) struct LeaseQueue {
    wishes: VecDeque<Wish>,
    givings: Vec<Giving>,
    /// When the oldest wish was first found to have to wait; 0 if none does.
    pub waits_since_ns: u64,
    /// Somebody waits, as the budget knows.
    waits: bool,
}

impl LeaseQueue {
    pub fn wish(&mut self, wish: Wish) {
        self.wishes.push_back(wish);
    }

    pub fn give_back(&mut self, giving: Giving) {
        self.givings.push(giving);
    }

    /// Forgets the wish that this call is.
    pub fn cancel(&mut self, seat: u32, slot: u32, generation: u32) -> Option<Wish> {
        let is = |wish: &Wish| (wish.seat, wish.slot, wish.generation) == (seat, slot, generation);
        let at = self.wishes.iter().position(is)?;
        self.wishes.remove(at)
    }

    /// Forgets all that a lane wanted; returns the pages that it had returned.
    pub fn forget(&mut self, seat: u32) -> u32 {
        self.wishes.retain(|wish| wish.seat != seat);
        let theirs = self.givings.iter().filter(|giving| giving.seat == seat);
        let pages = theirs.map(|giving| giving.lease.pages).sum();
        self.givings.retain(|giving| giving.seat != seat);
        pages
    }

    /// The oldest wish.
    pub fn first(&self) -> Option<Wish> {
        self.wishes.front().copied()
    }

    /// The oldest wish has been answered.
    pub fn pop(&mut self) {
        self.wishes.pop_front();
        self.waits_since_ns = 0;
    }

    pub fn next_giving(&mut self) -> Option<Giving> {
        self.givings.pop()
    }

    /// Whether there is anything to do. That nobody waits any more is to be told, too.
    #[inline(always)]
    pub fn has_work(&self) -> bool {
        !self.givings.is_empty() || !self.wishes.is_empty() || self.waits_since_ns != 0
    }

    /// Whether somebody other than the lane at `seat` waits.
    pub fn others_wait(&self, seat: u32) -> bool {
        self.waits_since_ns != 0 && self.wishes.iter().any(|wish| wish.seat != seat)
    }

    /// Whether the budget has to be told that somebody begins, or ceases, to wait. Asked once for each change.
    pub fn begins_or_ceases_to_wait(&mut self) -> bool {
        let before = std::mem::replace(&mut self.waits, !self.wishes.is_empty());
        before != self.waits
    }

    /// Whether somebody waits, as the budget knows.
    pub fn is_waiting(&self) -> bool {
        self.waits
    }

    /// Wishes that wait.
    pub fn len(&self) -> usize {
        self.wishes.len()
    }
}

/// What one lane does with its leases.
#[derive(Debug, Default)]
pub(crate) struct LaneLeases {
    /// Something has been done with them since somebody last looked.
    pub used: bool,
    /// When they were last known to be used; 0 if nobody has looked yet.
    used_at_ns: u64,
    /// When they were declared void; 0 if they have not been.
    void_at_ns: u64,
}

/// What is to be done about the leases of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Leave,
    /// Their memory is nobody's any more: take it.
    Take,
    /// Calls that have them end; then take it.
    Force,
}

impl SessionLane {
    /// Looks after the leases of this lane; `wanted`: others wait for memory.
    pub fn judge_leases(&mut self, now_ns: u64, wanted: bool) -> Verdict {
        if self.lane().leases.granted().is_empty() {
            self.leases = LaneLeases::default();
            return Verdict::Leave;
        }
        if std::mem::take(&mut self.leases.used) || self.leases.used_at_ns == 0 {
            self.leases.used_at_ns = now_ns;
        }
        let unused_ns = now_ns - self.leases.used_at_ns;
        let is_void = self.leases.void_at_ns != 0;
        if !wanted && !is_void && unused_ns < IDLE_NS {
            return Verdict::Leave;
        }
        if !is_void {
            self.lane_mut().leases.next_epoch();
            self.leases.void_at_ns = now_ns;
        }
        let epoch = self.lane().leases.epoch();
        if self.lane().common.leases.take_back_idle(epoch) {
            return Verdict::Take;
        }
        let held_ns = unused_ns.min(now_ns - self.leases.void_at_ns);
        if wanted && held_ns >= PATIENCE_NS {
            self.lane().common.leases.take_back(epoch);
            return Verdict::Force;
        }
        Verdict::Leave
    }

    /// Leases that were void have gone, all of them: those granted from now on are good.
    pub fn leases_gone(&mut self) {
        self.leases.void_at_ns = 0;
    }

    /// Whether void leases are still there.
    pub fn has_void_leases(&self) -> bool {
        let epoch = self.lane().leases.epoch();
        self.lane().leases.granted().iter().any(|lease| lease.epoch != epoch)
    }
}

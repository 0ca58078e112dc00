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
    /// When others were last seen to wait for memory.
    wanted_at_ns: u64,
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
        if wanted {
            self.leases.wanted_at_ns = now_ns;
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
        // Who waits asks for a while only and then gets on without: that he has just given up changes nothing.
        let still_wanted = now_ns - self.leases.wanted_at_ns < IDLE_NS;
        if still_wanted && held_ns >= PATIENCE_NS {
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

#[cfg(test)]
mod tests {
    //! A model of who waits for whom, searched completely: sessions that each have calls to make and share less memory
    //! to lease than they want, any of which but the first may stop for ever at any moment.

    use std::collections::{HashMap, VecDeque};

    const SESSIONS: usize = 3;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
    enum Call {
        /// None is under way; so many are left.
        None,
        /// It has its name and has not begun.
        Queued,
        OnBase,
        OnLease,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct Session {
        left: u8,
        call: Call,
        has_lease: bool,
        is_void: bool,
        wishes: bool,
        stopped: bool,
    }

    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct World {
        sessions: [Session; SESSIONS],
        /// Who waits for a lease, first come first served.
        wishes: Vec<u8>,
    }

    /// The rules that can be left out, to see that the model needs them.
    #[derive(Debug, Clone, Copy)]
    struct Rules {
        memory: usize,
        begins_on_base: bool,
        voids: bool,
        forces: bool,
    }

    const ALL: Rules = Rules { memory: 1, begins_on_base: true, voids: true, forces: true };

    impl World {
        fn new(calls: u8) -> Self {
            let session = Session {
                left: calls,
                call: Call::None,
                has_lease: false,
                is_void: false,
                wishes: false,
                stopped: false,
            };
            Self { sessions: [(); SESSIONS].map(|()| session.clone()), wishes: Vec::new() }
        }

        fn others_wait(&self, session: usize) -> bool {
            self.wishes.iter().any(|other| usize::from(*other) != session)
        }

        /// What can happen next; sessions stop only if `stops`.
        fn next(&self, rules: Rules, stops: bool) -> Vec<World> {
            let mut next = Vec::new();
            let mut can = |change: &dyn Fn(&mut World)| {
                let mut world = self.clone();
                change(&mut world);
                next.push(world);
            };
            for i in 0..SESSIONS {
                let s = &self.sessions[i];
                if !s.stopped {
                    self.client(i, rules, &mut can);
                    if stops && i > 0 {
                        can(&|w| w.sessions[i].stopped = true);
                    }
                }
                if rules.voids && s.has_lease && self.others_wait(i) {
                    // Void from now on; gone at once if it is not in use.
                    can(&|w| {
                        w.sessions[i].is_void = true;
                        w.sessions[i].has_lease = w.sessions[i].call == Call::OnLease;
                    });
                    if rules.forces && s.stopped && s.is_void && s.call == Call::OnLease {
                        can(&|w| {
                            (w.sessions[i].has_lease, w.sessions[i].call) = (false, Call::None);
                        });
                    }
                }
            }
            let leased = self.sessions.iter().filter(|s| s.has_lease).count();
            if let Some(first) = self.wishes.first().copied()
                && leased < rules.memory
                && !self.sessions[usize::from(first)].has_lease
            {
                can(&|w| {
                    w.wishes.remove(0);
                    let s = &mut w.sessions[usize::from(first)];
                    (s.wishes, s.has_lease, s.is_void) = (false, true, false);
                });
            }
            next
        }

        fn client(&self, i: usize, rules: Rules, can: &mut impl FnMut(&dyn Fn(&mut World))) {
            let s = &self.sessions[i];
            match s.call {
                Call::None if s.left > 0 => can(&|w| w.sessions[i].call = Call::Queued),
                Call::None => {}
                Call::Queued => {
                    if s.has_lease && !s.is_void {
                        can(&|w| w.sessions[i].call = Call::OnLease);
                    } else if !s.wishes && !s.has_lease {
                        can(&|w| {
                            w.sessions[i].wishes = true;
                            w.wishes.push(i as u8);
                        });
                    }
                    if rules.begins_on_base {
                        can(&|w| w.sessions[i].call = Call::OnBase);
                    }
                }
                Call::OnBase | Call::OnLease => can(&|w| {
                    (w.sessions[i].call, w.sessions[i].left) = (Call::None, w.sessions[i].left - 1);
                }),
            }
            if s.has_lease && s.is_void && s.call != Call::OnLease {
                can(&|w| w.sessions[i].has_lease = false);
            }
        }
    }

    /// All worlds that can come about, and which of them can still come to one that is `good`, without anybody stopping
    /// on the way and without those that have stopped.
    fn stuck(rules: Rules, needs: impl Fn(&World) -> bool, good: impl Fn(&World) -> bool) -> (usize, usize) {
        let mut index: HashMap<World, usize> = HashMap::new();
        let mut worlds = Vec::new();
        let mut queue = VecDeque::from([World::new(1)]);
        while let Some(world) = queue.pop_front() {
            if !index.contains_key(&world) {
                index.insert(world.clone(), worlds.len());
                queue.extend(world.next(rules, true));
                worlds.push(world);
            }
        }
        let mut before: Vec<Vec<usize>> = vec![Vec::new(); worlds.len()];
        for (from, world) in worlds.iter().enumerate() {
            for next in world.next(rules, false) {
                before[index[&next]].push(from);
            }
        }
        let mut reaches = vec![false; worlds.len()];
        let mut queue: VecDeque<usize> = (0..worlds.len()).filter(|i| good(&worlds[*i])).collect();
        while let Some(world) = queue.pop_front() {
            if !std::mem::replace(&mut reaches[world], true) {
                queue.extend(&before[world]);
            }
        }
        let stuck = (0..worlds.len()).filter(|i| needs(&worlds[*i]) && !reaches[*i]).count();
        (worlds.len(), stuck)
    }

    /// Goal:   P3, F59: whoever has not stopped can always end all of its calls, and gets every lease that it waits for,
    ///         whatever the others do or fail to do.
    /// Method: all states of three sessions with a call each and memory for one or two leases; from each of them there
    ///         must be a way. Without the rules there must be states from which there is none.
    #[test]
    fn p3_f59_nobody_waits_in_a_circle() {
        let runs = |_: &World| true;
        let ended = |w: &World| w.sessions[0].left == 0;
        let waits = |w: &World| w.sessions[0].wishes;
        let granted = |w: &World| !w.sessions[0].wishes;
        for memory in [1, 2] {
            let rules = Rules { memory, ..ALL };
            let (all, stuck_calls) = stuck(rules, runs, ended);
            assert!(all > 1000, "{all} states");
            assert_eq!(stuck_calls, 0, "of {all}, memory {memory}");
            assert_eq!(stuck(rules, waits, granted).1, 0, "of {all}, memory {memory}");
            // Leases alone would do, too, as long as they are taken from those who stop.
            assert_eq!(stuck(Rules { begins_on_base: false, ..rules }, runs, ended).1, 0);
            assert!(stuck(Rules { forces: false, ..rules }, waits, granted).1 > 0);
            assert!(stuck(Rules { voids: false, ..rules }, waits, granted).1 > 0);
            assert!(stuck(Rules { forces: false, begins_on_base: false, ..rules }, runs, ended).1 > 0);
            assert_eq!(
                stuck(Rules { forces: false, voids: false, ..rules }, runs, ended).1,
                0,
                "base slots do"
            );
        }
    }
}

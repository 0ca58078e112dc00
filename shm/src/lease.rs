//! Leases: payload memory beyond the base slots, granted by the server while there is some, and taken back.
//!
//! Trust:  the server decides by its private [`LeaseTable`]. A leased slot only carries payload; what names a
//!         call, with generation and words, is always a base slot. The client allocates by its private
//!         [`LeaseAllocator`].
//! Rule:   every lease belongs to an *epoch* of its lane. To take memory back the server first says that leases of
//!         earlier epochs are *void*: they must not be begun to be used. If the client uses none, their memory is
//!         *gone* at once; else the client gives them back when it is done, or, when it does nothing with them
//!         while others wait, they are gone all the same and an entry of their epoch is answered so (F59).
//! Bells:  none. The two sides meet as at a bell: *publish, fence (SeqCst), read the other's word*. Either the
//!         client sees that its lease is void, or the server sees that it is used.
//! Layout: `shm/LAYOUT.md`, section Leases.

use crate::error::PeerFault;
use crate::layout::{Geometry, SLOT_LARGE, SLOT_MEDIUM, SLOTS_PER_PAGE};
use crate::map::PAGE;
use crate::sync::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
use std::ops::Deref;

/// Most slots of one lease.
pub const LEASE_SLOTS_MAX: u32 = 64;

/// Whether `epoch` lies before `bound`; epochs count modulo 2^32.
#[inline(always)]
pub fn is_before(epoch: u32, bound: u32) -> bool {
    (epoch.wrapping_sub(bound) as i32) < 0
}

/// The words by which leases are taken back, one set per lane.
#[derive(Debug)]
pub struct LeaseWords<W> {
    void_before: W,
    gone_before: W,
    using: W,
}

impl<W: Deref<Target = AtomicU32>> LeaseWords<W> {
    /// A view of the two words that the server writes and the one that the client does.
    pub fn new(void_before: W, gone_before: W, using: W) -> Self {
        Self { void_before, gone_before, using }
    }

    /// Server: says that leases before `epoch` are void, and says whether the client uses none of any epoch: then
    /// their memory is nobody's, and the client has been told that it is gone.
    pub fn take_back_idle(&self, epoch: u32) -> bool {
        self.void_before.store(epoch, Relaxed);
        // SeqCst pairs with the fence in `enter`.
        fence(SeqCst);
        // Acquire pairs with the Release in `end`: the client's accesses are over.
        let idle = self.using.load(Acquire) == 0;
        if idle {
            // Release pairs with the Acquire in `is_gone`.
            self.gone_before.store(epoch, Release);
        }
        idle
    }

    /// Server: says that leases before `epoch` are gone, whoever uses them. What is done to their memory
    /// afterwards the client may see; it asks [`LeaseWords::is_gone`] before it believes what it has read.
    pub fn take_back(&self, epoch: u32) {
        self.void_before.store(epoch, Relaxed);
        // Release pairs with the Acquire in `is_gone`.
        self.gone_before.store(epoch, Release);
        // The memory is touched only after both are visible; pairs with the fence in `is_gone`.
        fence(SeqCst);
    }

    /// Client: about to use a lease, the first one at the moment; whether it is void is to be asked after this.
    pub fn enter(&self) {
        self.using.store(1, Relaxed);
        // SeqCst pairs with the fence in `take_back_idle`.
        fence(SeqCst);
    }

    /// Client: no lease is used any more.
    pub fn end(&self) {
        // Release pairs with the Acquire in `take_back_idle`.
        self.using.store(0, Release);
    }

    /// Client: whether a lease of `epoch` must not be begun to be used any more; to be asked after
    /// [`LeaseWords::enter`], or while another one is in use.
    #[inline(always)]
    pub fn is_void(&self, epoch: u32) -> bool {
        is_before(epoch, self.void_before.load(Relaxed))
    }

    /// Client: whether the memory of a lease of `epoch` was taken before or while it was read.
    pub fn is_gone(&self, epoch: u32) -> bool {
        // Pairs with the fence in `take_back`: whoever has read memory that was taken sees that it was.
        fence(SeqCst);
        // Acquire pairs with the Release in `take_back`.
        is_before(epoch, self.gone_before.load(Acquire))
    }
}

/// Why a lane cannot have a lease at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoom;

/// One lease, as the server knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// First page of the lane that it has.
    pub page: u32,
    /// Pages of it.
    pub pages: u32,
    /// Its epoch.
    pub epoch: u32,
}

/// What a leased page is: in the low bits the pages of its slot's class, 0 for one that is not granted or is the
/// tail of a slot; and the flag below.
type PageState = u8;
/// The slot that begins on the page is lent.
const BUSY: PageState = 0x80;

/// The server's private record of a lane's leases. Takes no memory while there are none.
#[derive(Debug)]
pub struct LeaseTable {
    base_pages: u32,
    lease_pages: u32,
    pages: Vec<PageState>,
    /// In the order of their pages.
    granted: Vec<Granted>,
    /// The epoch that leases are granted in.
    epoch: u32,
    /// Leases before this epoch do not exist any more.
    gone_before: u32,
}

impl LeaseTable {
    /// No leases of a lane of this geometry.
    pub fn new(geometry: &Geometry) -> Self {
        let (base_pages, lease_pages) = (geometry.base_pages(), geometry.lease_pages.into());
        Self { base_pages, lease_pages, pages: Vec::new(), granted: Vec::new(), epoch: 1, gone_before: 0 }
    }

    /// The leases that exist.
    pub fn granted(&self) -> &[Granted] {
        &self.granted
    }

    /// Pages of all leases that exist.
    pub fn pages(&self) -> u32 {
        self.granted.iter().map(|lease| lease.pages).sum()
    }

    /// Where a lease of at most `slots` slots of `bytes` each would go, as (page, slots): as many as fit next to
    /// each other.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if not even one does.
    pub fn room(&self, bytes: u32, slots: u32) -> Result<(u32, u32), NoRoom> {
        let each = bytes / PAGE as u32;
        let wanted = slots.clamp(1, LEASE_SLOTS_MAX) * each;
        let end = self.base_pages + self.lease_pages;
        let mut best = (0, 0);
        let mut from = self.base_pages;
        for next in
            self.granted.iter().map(|lease| (lease.page, lease.page + lease.pages)).chain([(end, end)])
        {
            let free = next.0 - from;
            if free > best.1 {
                best = (from, free);
            }
            if free >= wanted {
                break;
            }
            from = next.1;
        }
        match best.1.min(wanted) / each {
            0 => Err(NoRoom),
            fit => Ok((best.0, fit)),
        }
    }

    /// Grants `slots` slots of `bytes` each from `page` on, which [`LeaseTable::room`] has named and whose memory
    /// exists by now. Returns the epoch of the lease.
    pub fn grant(&mut self, page: u32, bytes: u32, slots: u32) -> u32 {
        let each = bytes / PAGE as u32;
        let lease = Granted { page, pages: each * slots, epoch: self.epoch };
        if self.pages.is_empty() {
            self.pages = vec![0; self.lease_pages as usize];
        }
        for slot in 0..slots {
            self.pages[(page - self.base_pages + slot * each) as usize] = each as PageState;
        }
        let at = self.granted.partition_point(|other| other.page < page);
        self.granted.insert(at, lease);
        self.epoch
    }

    /// From here on leases are granted in a later epoch; returns it, for [`LeaseWords`].
    pub fn next_epoch(&mut self) -> u32 {
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch
    }

    /// The epoch that leases are granted in.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// All leases of earlier epochs than the present one are gone, lent or not; calls `gone` with each.
    pub fn take_back(&mut self, mut gone: impl FnMut(Granted)) {
        let epoch = self.epoch;
        self.gone_before = epoch;
        let old: Vec<Granted> =
            self.granted.iter().copied().filter(|lease| is_before(lease.epoch, epoch)).collect();
        for lease in old {
            self.remove(lease);
            gone(lease);
        }
    }

    /// The client gives back the lease that begins with `slot`. `None` if it has been taken already.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Lease`] if there is none, or one of its slots is lent.
    pub fn give_back(&mut self, slot: u32, epoch: u32) -> Result<Option<Granted>, PeerFault> {
        if is_before(epoch, self.gone_before) {
            return Ok(None);
        }
        let fault = PeerFault::Lease { slot, epoch };
        let starts = |lease: &&Granted| lease.page * SLOTS_PER_PAGE == slot && lease.epoch == epoch;
        let lease = *self.granted.iter().find(starts).ok_or(fault)?;
        let first = (lease.page - self.base_pages) as usize;
        if self.pages[first..first + lease.pages as usize].iter().any(|page| page & BUSY != 0) {
            return Err(fault);
        }
        self.remove(lease);
        Ok(Some(lease))
    }

    fn remove(&mut self, lease: Granted) {
        self.granted.retain(|other| other != &lease);
        let first = (lease.page - self.base_pages) as usize;
        self.pages[first..first + lease.pages as usize].fill(0);
        if self.granted.is_empty() {
            self.pages = Vec::new();
            self.granted = Vec::new();
        }
    }

    /// Whether leases of `epoch` have been taken back.
    #[inline(always)]
    pub fn is_gone(&self, epoch: u32) -> bool {
        is_before(epoch, self.gone_before)
    }

    /// Whether a slot number lies in the leased part of the lane.
    #[inline(always)]
    pub fn is_leased(&self, slot: u32) -> bool {
        slot / SLOTS_PER_PAGE >= self.base_pages
    }

    fn page(&mut self, slot: u32) -> Result<&mut PageState, PeerFault> {
        let index = (slot / SLOTS_PER_PAGE).wrapping_sub(self.base_pages) as usize;
        match self.pages.get_mut(index) {
            Some(page) if slot.is_multiple_of(SLOTS_PER_PAGE) && *page & !BUSY != 0 => Ok(page),
            _ => Err(PeerFault::Slot { slot }),
        }
    }

    /// Bytes that a leased slot holds.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] if there is no such slot.
    pub fn capacity(&mut self, slot: u32) -> Result<u32, PeerFault> {
        Ok(u32::from(*self.page(slot)? & !BUSY) * PAGE as u32)
    }

    /// Lends a leased slot. Returns its capacity in bytes.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] or [`PeerFault::SlotBusy`]; nothing is changed.
    pub fn lend(&mut self, slot: u32) -> Result<u32, PeerFault> {
        let page = self.page(slot)?;
        if *page & BUSY != 0 {
            return Err(PeerFault::SlotBusy { slot, generation: 0 });
        }
        *page |= BUSY;
        Ok(u32::from(*page & !BUSY) * PAGE as u32)
    }

    /// A leased slot is lent no more; one that has been taken meanwhile is nothing to care about.
    pub fn free(&mut self, slot: u32) {
        if let Ok(page) = self.page(slot) {
            *page &= !BUSY;
        }
    }
}

/// A lease that a client has.
#[derive(Debug, Clone, Copy)]
struct Held {
    first: u32,
    slots: u32,
    bytes: u32,
    epoch: u32,
    /// Bit i: slot i is not in use.
    free: u64,
}

impl Held {
    fn all(&self) -> u64 {
        u64::MAX >> (64 - self.slots)
    }

    /// Slot numbers from one slot to the next.
    fn stride(&self) -> u32 {
        self.bytes / PAGE as u32 * SLOTS_PER_PAGE
    }

    fn holds(&self, slot: u32) -> bool {
        slot >= self.first && slot < self.first + self.slots * self.stride()
    }
}

/// Slots of one lease, next to each other, for one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first of them.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Bytes of each.
    pub bytes: u32,
    /// Epoch of their lease.
    pub epoch: u32,
}

/// The client's private allocator over the leases of a lane.
#[derive(Debug, Default)]
pub struct LeaseAllocator {
    held: Vec<Held>,
}

impl LeaseAllocator {
    /// Takes note of a lease of `slots` slots of `bytes` each.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Lease`] if the server grants what no lease can be, or what is held already.
    pub fn add(
        &mut self,
        geometry: &Geometry,
        first: u32,
        slots: u32,
        bytes: u32,
        epoch: u32,
    ) -> Result<(), PeerFault> {
        let held = Held { first, slots, bytes, epoch, free: 0 };
        let fault = PeerFault::Lease { slot: first, epoch };
        let class = bytes as usize == SLOT_MEDIUM || bytes as usize == SLOT_LARGE;
        if !class || !(1..=LEASE_SLOTS_MAX).contains(&slots) || !first.is_multiple_of(SLOTS_PER_PAGE) {
            return Err(fault);
        }
        let end = u64::from(first) + u64::from(slots) * u64::from(held.stride());
        let lane_end = u64::from(geometry.slot_pages() * SLOTS_PER_PAGE);
        let overlaps =
            self.held.iter().any(|h| held.first < h.first + h.slots * h.stride() && h.first < end as u32);
        if first < geometry.base_numbers() || end > lane_end || overlaps {
            return Err(fault);
        }
        self.held.push(Held { free: held.all(), ..held });
        Ok(())
    }

    /// At most `count` free slots of at least `bytes` bytes next to each other, of a lease that `good` accepts the
    /// epoch of; as many as there are at one place, `None` if there is not even one.
    pub fn take(&mut self, bytes: usize, count: u32, good: impl Fn(u32) -> bool) -> Option<Run> {
        let mut best: Option<(usize, u32, u32)> = None;
        for (index, held) in self.held.iter().enumerate() {
            if (held.bytes as usize) < bytes || held.free == 0 || !good(held.epoch) {
                continue;
            }
            let (start, len) = longest_run(held.free, count);
            if best.is_none_or(|(_, _, most)| len > most) {
                best = Some((index, start, len));
            }
        }
        let (index, start, count) = best?;
        let held = &mut self.held[index];
        held.free &= !((u64::MAX >> (64 - count)) << start);
        let first = held.first + start * held.stride();
        Some(Run { first, count, bytes: held.bytes, epoch: held.epoch })
    }

    /// A slot of a run is free again. Returns whether the allocator knows it.
    pub fn put_back(&mut self, slot: u32) -> bool {
        let Some(held) = self.held.iter_mut().find(|held| held.holds(slot)) else { return false };
        held.free |= 1 << ((slot - held.first) / held.stride());
        true
    }

    /// Forgets a lease none of whose slots is in use and whose epoch `void` accepts; returns its first slot and
    /// epoch, to be given back to the server.
    pub fn drop_void(&mut self, void: impl Fn(u32) -> bool) -> Option<(u32, u32)> {
        let at = self.held.iter().position(|held| held.free == held.all() && void(held.epoch))?;
        let held = self.held.swap_remove(at);
        Some((held.first, held.epoch))
    }

    /// Whether there is a lease whose epoch `gone` accepts.
    pub fn any(&self, gone: impl Fn(u32) -> bool) -> bool {
        self.held.iter().any(|held| gone(held.epoch))
    }

    /// Epoch of the lease that a slot belongs to, and the slot's bytes.
    pub fn of_slot(&self, slot: u32) -> Option<(u32, u32)> {
        self.held.iter().find(|held| held.holds(slot)).map(|held| (held.epoch, held.bytes))
    }

    /// Whether any slot is in use.
    pub fn in_use(&self) -> bool {
        self.held.iter().any(|held| held.free != held.all())
    }

    /// Whether there are leases at all.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Slots of at least `bytes` bytes, in use or not, of leases that `good` accepts the epoch of.
    pub fn slots(&self, bytes: usize, good: impl Fn(u32) -> bool) -> u32 {
        self.held.iter().filter(|h| h.bytes as usize >= bytes && good(h.epoch)).map(|h| h.slots).sum()
    }
}

/// The longest run of ones in `bits`, at most `most` long, as (first bit, length).
fn longest_run(bits: u64, most: u32) -> (u32, u32) {
    let mut best = (0, 0);
    let mut from = 0;
    while from < 64 {
        from += (bits >> from).trailing_zeros();
        if from >= 64 {
            break;
        }
        let len = (!(bits >> from)).trailing_zeros();
        if len > best.1 {
            best = (from, len.min(most));
        }
        if best.1 == most {
            break;
        }
        from += len;
    }
    best
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::layout::SLOT_SMALL;
    use proptest::prelude::*;

    /// Goal:   the longest run is the longest run.
    /// Method: any bits, against a scan bit by bit.
    #[test]
    fn the_longest_run_is_found() {
        let naive = |bits: u64, most: u32| {
            let mut best = 0;
            let mut run = 0;
            for bit in 0..64 {
                run = if bits >> bit & 1 == 1 { run + 1 } else { 0 };
                best = best.max(run);
            }
            best.min(most)
        };
        let mut bits = 0x9E37_79B9_7F4A_7C15u64;
        for most in (1..=64).chain([1, 2, 4]) {
            for shape in [0, u64::MAX, 1, 1 << 63, bits, !bits, bits & bits >> 1, bits | bits >> 3] {
                let (first, len) = longest_run(shape, most);
                assert_eq!(len, naive(shape, most), "{shape:#x} {most}");
                let run = if len == 0 { 0 } else { (u64::MAX >> (64 - len)) << first };
                assert_eq!(shape & run, run);
            }
            bits = bits.wrapping_mul(6364136223846793005).wrapping_add(most.into());
        }
    }

    /// Goal:   what nobody was granted is neither lent, freed nor put back, and what is in use is not lent twice.
    /// Method: slots beyond the pages of the lane, before a grant and beside one.
    #[test]
    fn f12_slots_outside_any_lease_belong_to_nobody() {
        let geometry = Geometry { lease_pages: 4, ..Geometry::SMALLEST };
        let (mut table, mut client) = (LeaseTable::new(&geometry), LeaseAllocator::default());
        let (page, _) = table.room(SLOT_MEDIUM as u32, 1).unwrap();
        let slot = page * 4;
        for nobodys in [slot, slot + 400, u32::MAX] {
            table.free(nobodys);
            assert_eq!(table.lend(nobodys), Err(PeerFault::Slot { slot: nobodys }));
            assert!(!client.put_back(nobodys));
        }
        let epoch = table.grant(page, SLOT_MEDIUM as u32, 1);
        client.add(&geometry, slot, 1, SLOT_MEDIUM as u32, epoch).unwrap();
        assert_eq!(table.lend(slot), Ok(SLOT_MEDIUM as u32));
        assert_eq!(table.lend(slot), Err(PeerFault::SlotBusy { slot, generation: 0 }));
        table.free(slot);
        assert_eq!(table.lend(slot), Ok(SLOT_MEDIUM as u32));
        assert!(client.take(SLOT_MEDIUM, 1, |_| true).is_some() && client.put_back(slot));
        assert!(!client.put_back(slot + 4));
    }

    #[derive(Debug, Clone, Copy)]
    enum Op {
        Grant { large: bool, slots: u32 },
        Take { large: bool, count: u32 },
        Free(usize),
        Void,
        Force,
        DropVoid,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (any::<bool>(), 1..9u32).prop_map(|(large, slots)| Op::Grant { large, slots }),
            4 => (any::<bool>(), 1..5u32).prop_map(|(large, count)| Op::Take { large, count }),
            4 => any::<usize>().prop_map(Op::Free),
            1 => Just(Op::Void),
            1 => Just(Op::Force),
            2 => Just(Op::DropVoid),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: if cfg!(miri) { 4 } else { 400 }, ..ProptestConfig::default() })]

        /// Goal:   server and client agree on who has which slot; no two uses share a byte; what is given back or
        ///         taken can be granted again, and nothing leaks.
        /// Method: any order of grants, uses, ends, take-backs and returns, both ends side by side; the oracle is
        ///         the list of the runs in use.
        #[test]
        fn f59_table_and_allocator_agree_on_leases(ops in prop::collection::vec(op(), 1..80)) {
            let geometry = Geometry { lease_pages: 24, ..Geometry::SMALLEST };
            let (mut table, mut client) = (LeaseTable::new(&geometry), LeaseAllocator::default());
            let (mut void, mut gone) = (0u32, 0u32);
            let mut runs: Vec<Run> = Vec::new();
            for op in ops {
                match op {
                    Op::Grant { large, slots } => {
                        let bytes = if large { SLOT_LARGE } else { SLOT_MEDIUM } as u32;
                        if let Ok((page, fit)) = table.room(bytes, slots) {
                            prop_assert!(fit <= slots);
                            let epoch = table.grant(page, bytes, fit);
                            // A forced lease may still be held by the client: it drops it when it looks.
                            while client.drop_void(|e| is_before(e, gone)).is_some() {}
                            if client.add(&geometry, page * 4, fit, bytes, epoch).is_err() {
                                // Only where runs of a forced lease are still in use there.
                                prop_assert!(runs.iter().any(|r| is_before(r.epoch, gone)));
                                prop_assert!(table.give_back(page * 4, epoch).unwrap().is_some());
                            }
                        }
                    }
                    Op::Take { large, count } => {
                        let bytes = if large { SLOT_LARGE } else { SLOT_MEDIUM };
                        if let Some(run) = client.take(bytes, count, |e| !is_before(e, void)) {
                            prop_assert!(run.count <= count && run.bytes as usize >= bytes);
                            let stride = run.bytes / SLOT_SMALL as u32;
                            for i in 0..run.count {
                                prop_assert_eq!(table.lend(run.first + i * stride), Ok(run.bytes));
                            }
                            runs.push(run);
                        }
                    }
                    Op::Free(nth) if !runs.is_empty() => {
                        let run = runs.swap_remove(nth % runs.len());
                        for i in 0..run.count {
                            let slot = run.first + i * (run.bytes / SLOT_SMALL as u32);
                            if !table.is_gone(run.epoch) {
                                table.free(slot);
                            }
                            prop_assert!(client.put_back(slot));
                        }
                    }
                    Op::Free(_) => {}
                    Op::Void => void = table.next_epoch(),
                    Op::Force => {
                        void = table.next_epoch();
                        gone = void;
                        table.take_back(|_| {});
                    }
                    Op::DropVoid => {
                        while let Some((slot, epoch)) = client.drop_void(|e| is_before(e, void)) {
                            let back = table.give_back(slot, epoch);
                            prop_assert_eq!(back.map(|b| b.is_none()), Ok(is_before(epoch, gone)));
                        }
                    }
                }
                let mut live: Vec<_> = runs.iter().filter(|r| !is_before(r.epoch, gone))
                    .map(|r| (r.first, r.first + r.count * (r.bytes / SLOT_SMALL as u32))).collect();
                live.sort_unstable();
                prop_assert!(live.windows(2).all(|w| w[0].1 <= w[1].0), "{:?}", live);
                prop_assert!(live.last().is_none_or(|r| r.1 <= 4 * geometry.slot_pages()));
                prop_assert_eq!(client.in_use(), !runs.is_empty());
                prop_assert_eq!(table.pages(), table.granted().iter().map(|l| l.pages).sum::<u32>());
            }
        }
    }

    /// Goal:   F12, F23: what was never leased cannot be used or given back, nor what is in use.
    #[test]
    fn f12_f23_only_what_was_leased_can_be_lent_or_given_back() {
        let geometry = Geometry { lease_pages: 8, ..Geometry::SMALLEST };
        let mut table = LeaseTable::new(&geometry);
        assert_eq!(table.lend(4), Err(PeerFault::Slot { slot: 4 }));
        assert_eq!(table.room(SLOT_LARGE as u32, 9), Ok((1, 2)));
        let epoch = table.grant(1, SLOT_LARGE as u32, 1);
        for slot in [0, 5, 8, 20, 36, u32::MAX] {
            assert_eq!(table.lend(slot), Err(PeerFault::Slot { slot }), "{slot}");
        }
        assert_eq!(table.lend(4), Ok(SLOT_LARGE as u32));
        assert_eq!(table.lend(4), Err(PeerFault::SlotBusy { slot: 4, generation: 0 }));
        let fault = |slot, epoch| Err(PeerFault::Lease { slot, epoch });
        assert_eq!(table.give_back(4, epoch), fault(4, epoch), "in use");
        assert_eq!(table.give_back(8, epoch), fault(8, epoch));
        assert_eq!(table.give_back(4, epoch + 1), fault(4, epoch + 1));
        assert_eq!(table.give_back(u32::MAX, epoch), fault(u32::MAX, epoch));
        table.free(4);
        assert_eq!(table.give_back(4, epoch).unwrap().map(|l| (l.page, l.pages)), Some((1, 4)));
        assert_eq!((table.pages(), table.give_back(4, epoch)), (0, fault(4, epoch)));
    }

    /// Goal:   a client believes no grant that cannot be.
    #[test]
    fn f12_an_impossible_grant_is_refused_by_the_client() {
        let geometry = Geometry { lease_pages: 8, ..Geometry::SMALLEST };
        let mut client = LeaseAllocator::default();
        let large = SLOT_LARGE as u32;
        for (first, slots, bytes) in [
            (0, 1, large),
            (5, 1, large),
            (4, 3, large),
            (4, 0, large),
            (4, 65, 4096),
            (4, 1, 1024),
            (4, 1, 0),
            (u32::MAX - 3, 1, large),
            (36, 1, 4096),
        ] {
            let fault = PeerFault::Lease { slot: first, epoch: 1 };
            assert_eq!(client.add(&geometry, first, slots, bytes, 1), Err(fault), "{first} {slots} {bytes}");
        }
        client.add(&geometry, 4, 1, large, 1).unwrap();
        assert!(client.add(&geometry, 16, 1, 4096, 1).is_err(), "held already");
        client.add(&geometry, 20, 4, 4096, 1).unwrap();
        assert_eq!((client.slots(1, |_| true), client.slots(5000, |_| true)), (5, 1));
    }

    #[test]
    fn epochs_wrap() {
        assert!(is_before(u32::MAX, 0) && is_before(0, 1) && !is_before(1, 1) && !is_before(0, u32::MAX));
    }
}

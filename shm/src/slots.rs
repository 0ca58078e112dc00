//! Slots: who may write into which piece of payload memory, and the words that go with each.
//!
//! Trust:  the server decides by its private [`SlotTable`]; a slot comes by number, so overlapping and
//!         out-of-range memory cannot be said (S1). The client allocates by its private
//!         [`SlotAllocator`]; nobody else's allocation exists in its segment.
//! Rule:   a slot stays lent until the call's terminal completion has been taken. A local time-out is a
//!         cancel and a zombie slot, never a free one (P3, F58).
//! Leased: slots beyond these carry payload only, see [`crate::lease`]. A base slot alone names a call.
//! Layout: `shm/LAYOUT.md`, sections Slot words and Hints.

use crate::error::PeerFault;
use crate::layout::{Geometry, SLOT_MEDIUM, SLOT_SMALL};
use crate::sync::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::ops::Deref;

/// The client's word of a slot: what it says about a call without an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientWord {
    /// The call it speaks of; a word of another generation says nothing.
    pub generation: u32,
    /// The answer is no longer wanted.
    pub cancelled: bool,
    /// Frames of the answer whose slot may be written again, modulo 2^31.
    pub released: u32,
}

impl ClientWord {
    /// As it stands in the segment.
    pub fn pack(self) -> u64 {
        u64::from(self.generation) | u64::from(self.cancelled) << 32 | u64::from(self.released) << 33
    }

    /// From a private copy.
    pub fn unpack(word: u64) -> Self {
        Self { generation: word as u32, cancelled: word >> 32 & 1 == 1, released: (word >> 33) as u32 }
    }
}

/// The server's word of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerWord {
    /// The call it speaks of.
    pub generation: u32,
    /// Frames of the request that have been copied out, modulo 2^32.
    pub taken: u32,
}

impl ServerWord {
    /// As it stands in the segment.
    pub fn pack(self) -> u64 {
        u64::from(self.generation) | u64::from(self.taken) << 32
    }

    /// From a private copy.
    pub fn unpack(word: u64) -> Self {
        Self { generation: word as u32, taken: (word >> 32) as u32 }
    }

    /// Server: says how many frames have been copied out.
    #[inline(always)]
    pub fn publish(self, word: &AtomicU64) {
        // Release pairs with the Acquire in `read`: the copies are complete.
        word.store(self.pack(), Release);
    }

    /// Client: how many frames have been copied out; their slots may be written again.
    #[inline(always)]
    pub fn read(word: &AtomicU64) -> Self {
        // Acquire pairs with the Release in `publish`.
        Self::unpack(word.load(Acquire))
    }
}

/// The hint bitmap: which slot words the server should look at. A summary word, then a bit per slot.
#[derive(Debug)]
pub struct Hints<H> {
    words: H,
    slots: u32,
}

impl<H: Deref<Target = [AtomicU64]>> Hints<H> {
    /// A view of a summary word and one bit for each of `slots` slot numbers.
    ///
    /// # Panics
    ///
    /// If `words` is not as long as that takes.
    pub fn new(words: H, slots: u32) -> Self {
        assert_eq!(words.len(), 1 + (slots as usize).div_ceil(64), "hint words for {slots} slots");
        Self { words, slots }
    }

    /// Client: says that the word of `slot` has something new. The word must have been written before.
    pub fn set(&self, slot: u32) {
        // Release pairs with the Acquire swaps in `take`: the slot word is visible with its bit, and the
        // bit with the summary.
        self.words[1 + slot as usize / 64].fetch_or(1 << (slot % 64), Release);
        self.words[0].fetch_or(1 << (slot / 64), Release);
    }

    /// Server: whether there is anything to take. One relaxed load.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.words[0].load(Relaxed) != 0
    }

    /// Server: takes all bits and calls `found` with each slot number.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Hint`] for a bit beyond the lane's slots.
    pub fn take(&self, mut found: impl FnMut(u32)) -> Result<(), PeerFault> {
        // Acquire pairs with the Release in `set`.
        let mut summary = self.words[0].swap(0, Acquire);
        while summary != 0 {
            let index = summary.trailing_zeros();
            summary &= summary - 1;
            let Some(word) = self.words.get(1 + index as usize) else {
                return Err(PeerFault::Hint { bit: index * 64, slots: self.slots });
            };
            // A model only: elsewhere a swap may take effect before the one of the summary unless that one
            // acquires; loom's never does, its plain loads do.
            #[cfg(loom)]
            if word.load(Relaxed) == 0 {
                continue;
            }
            // Acquire pairs with the Release in `set`.
            let mut bits = word.swap(0, Acquire);
            while bits != 0 {
                let slot = index * 64 + bits.trailing_zeros();
                bits &= bits - 1;
                if slot >= self.slots {
                    return Err(PeerFault::Hint { bit: slot, slots: self.slots });
                }
                found(slot);
            }
        }
        Ok(())
    }
}

/// The server's private record of a lane's base slots.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<SlotState>,
}

#[derive(Debug, Clone, Copy)]
struct SlotState {
    /// Generation of the latest call that came in this slot.
    generation: u32,
    /// Bytes of the slot's class in the low bits (0: not granted), and the two flags below.
    class: u32,
}

/// The slot is lent: a call came in it and has not ended.
const BUSY: u32 = 1 << 31;
/// The client has hinted at the slot's word and no call was there yet to look at it.
const HINTED: u32 = 1 << 30;
const CAPACITY: u32 = HINTED - 1;

impl SlotTable {
    /// All base slots of `geometry`, granted and free, at generation 0.
    pub fn new(geometry: &Geometry) -> Self {
        let slots = (0..geometry.base_numbers())
            .map(|slot| SlotState { generation: 0, class: geometry.base_capacity(slot) as u32 })
            .collect();
        Self { slots }
    }

    /// Lends `slot` to the call of `generation` with `len` bytes in it. Returns the slot's capacity in
    /// bytes and whether its word has to be looked at before the call is started.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`], [`PeerFault::SlotBusy`], [`PeerFault::Generation`] or [`PeerFault::Length`];
    /// the table is unchanged.
    #[inline(always)]
    pub fn lend(&mut self, slot: u32, generation: u32, len: u32) -> Result<(u32, bool), PeerFault> {
        let Some(state) = self.slots.get_mut(slot as usize) else { return Err(PeerFault::Slot { slot }) };
        let capacity = state.class & CAPACITY;
        let expected = state.generation.wrapping_add(1);
        if state.class & BUSY != 0 || generation != expected || len > capacity || capacity == 0 {
            return Err(Self::refusal(*state, slot, generation, len));
        }
        let hinted = state.class & HINTED != 0;
        *state = SlotState { generation, class: capacity | BUSY };
        Ok((capacity, hinted))
    }

    /// Lends `slot` as an answer slot only: no generation of its own passes. Returns its capacity.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] or [`PeerFault::SlotBusy`]; the table is unchanged.
    pub fn lend_for_answer(&mut self, slot: u32) -> Result<u32, PeerFault> {
        let Some(state) = self.slots.get_mut(slot as usize) else { return Err(PeerFault::Slot { slot }) };
        let capacity = state.class & CAPACITY;
        if capacity == 0 || state.class & BUSY != 0 {
            return Err(Self::refusal(*state, slot, state.generation.wrapping_add(1), 0));
        }
        state.class |= BUSY;
        Ok(capacity)
    }

    #[cold]
    fn refusal(state: SlotState, slot: u32, theirs: u32, len: u32) -> PeerFault {
        let capacity = state.class & CAPACITY;
        let expected = state.generation.wrapping_add(1);
        if capacity == 0 {
            PeerFault::Slot { slot }
        } else if state.class & BUSY != 0 {
            PeerFault::SlotBusy { slot, generation: state.generation }
        } else if theirs != expected {
            PeerFault::Generation { slot, theirs, expected }
        } else {
            PeerFault::Length { len, slot, capacity }
        }
    }

    /// Takes note of a hint. Returns the generation of the call that holds the slot, or `None` if none
    /// does: then the note is kept for the next one.
    pub fn hint(&mut self, slot: u32) -> Option<u32> {
        let state = self.slots.get_mut(slot as usize)?;
        if state.class & BUSY != 0 {
            return Some(state.generation);
        }
        state.class |= HINTED;
        None
    }

    /// Generation of the latest call that came in `slot`, and whether that has not ended.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] if there is no such slot.
    pub fn call_in(&self, slot: u32) -> Result<(u32, bool), PeerFault> {
        match self.slots.get(slot as usize) {
            Some(state) if state.class & CAPACITY != 0 => Ok((state.generation, state.class & BUSY != 0)),
            _ => Err(PeerFault::Slot { slot }),
        }
    }

    /// Bytes that `slot` holds.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] if there is no such slot.
    pub fn capacity(&self, slot: u32) -> Result<u32, PeerFault> {
        match self.slots.get(slot as usize).map(|state| state.class & CAPACITY) {
            Some(capacity) if capacity != 0 => Ok(capacity),
            _ => Err(PeerFault::Slot { slot }),
        }
    }

    /// The call in `slot` has ended.
    #[inline(always)]
    pub fn give_back(&mut self, slot: u32) {
        if let Some(state) = self.slots.get_mut(slot as usize) {
            state.class &= !BUSY;
        }
    }

    /// Slot numbers, granted or not.
    pub fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Whether the lane has no slots; never true for a checked geometry.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

/// A slot that a client may write into: its number and the generation of the call to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Slot number.
    pub slot: u32,
    /// Generation that the call must carry.
    pub generation: u32,
    /// Bytes that the slot holds.
    pub capacity: u32,
}

/// The client's private allocator over a lane's slots.
#[derive(Debug)]
pub struct SlotAllocator {
    /// Free slot numbers of each class, smallest class first, last freed first.
    free: [Vec<u32>; 3],
    generations: Vec<u32>,
    capacities: Vec<u32>,
    largest: u32,
    /// Bytes of the largest slot beside that one, 0 if there is none.
    second: u32,
}

impl SlotAllocator {
    /// All base slots of `geometry`, free, at generation 0. The only allocation it ever makes.
    pub fn new(geometry: &Geometry) -> Self {
        let numbers = geometry.base_numbers();
        let capacities: Vec<u32> = (0..numbers).map(|s| geometry.base_capacity(s) as u32).collect();
        let free = [0, 1, 2].map(|class| {
            (0..numbers)
                .rev()
                .filter(|s| {
                    let capacity = capacities[*s as usize] as usize;
                    capacity > 0 && Self::class(capacity) == class
                })
                .collect()
        });
        let (largest, second) = capacities.iter().fold((0, 0), |(largest, second), bytes| {
            if *bytes > largest { (*bytes, largest) } else { (largest, second.max(*bytes)) }
        });
        Self { free, generations: vec![0; numbers as usize], capacities, largest, second }
    }

    #[inline(always)]
    fn class(len: usize) -> usize {
        usize::from(len > SLOT_SMALL) + usize::from(len > SLOT_MEDIUM)
    }

    /// A free slot of at least `len` bytes, the smallest class that has one; `None` when all are lent.
    /// The generation passes when the grant is [used](SlotAllocator::advance), not here.
    #[inline(always)]
    pub fn take(&mut self, len: usize) -> Option<Grant> {
        let class = Self::class(len);
        let slot = match self.free[class].pop() {
            Some(slot) => slot,
            None => self.take_larger(class)?,
        };
        let capacity = self.capacities[slot as usize];
        if (capacity as usize) < len {
            self.put_back(slot);
            return None;
        }
        Some(Grant { slot, generation: self.generations[slot as usize].wrapping_add(1), capacity })
    }

    #[cold]
    fn take_larger(&mut self, class: usize) -> Option<u32> {
        self.free[class + 1..].iter_mut().find_map(Vec::pop)
    }

    /// The grant goes out with a call: its generation has passed.
    #[inline(always)]
    pub fn advance(&mut self, grant: Grant) {
        self.generations[grant.slot as usize] = grant.generation;
    }

    /// The slot is free again: its call has ended, or the grant was never used.
    #[inline(always)]
    pub fn put_back(&mut self, slot: u32) {
        let class = Self::class(self.capacities[slot as usize] as usize);
        self.free[class].push(slot);
    }

    /// Bytes that `slot` holds, 0 if there is no such slot.
    #[inline(always)]
    pub fn capacity(&self, slot: u32) -> u32 {
        self.capacities.get(slot as usize).copied().unwrap_or(0)
    }

    /// Bytes of the largest slot that the lane has, free or not.
    #[inline(always)]
    pub fn largest(&self) -> usize {
        self.largest as usize
    }

    /// Whether two slots of the lane, free or not, hold so many bytes each.
    #[inline(always)]
    pub fn holds_both(&self, one: usize, other: usize) -> bool {
        let (less, more) = (one.min(other), one.max(other));
        // Two that hold nothing are two all the same.
        more <= self.largest as usize && less.max(1) <= self.second as usize
    }

    /// Free slots of any class.
    pub fn free(&self) -> usize {
        self.free.iter().map(Vec::len).sum()
    }

    /// Bytes of the smallest class that has a free slot; 0 if none has.
    pub fn smallest_free(&self) -> usize {
        let class = self.free.iter().find_map(|free| free.last());
        class.map_or(0, |slot| self.capacities[*slot as usize] as usize)
    }

    /// Slot numbers, granted or not.
    pub fn numbers(&self) -> u32 {
        self.generations.len() as u32
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Goal:   generations go on over 2^32, on both sides alike (P2).
    /// Method: both sides are put before the wrap; the call at generation 0 is as good as any.
    #[test]
    fn f12_generations_wrap() {
        let (mut client, mut server) =
            (SlotAllocator::new(&Geometry::SMALLEST), SlotTable::new(&Geometry::SMALLEST));
        client.generations.fill(u32::MAX - 1);
        server.slots.iter_mut().for_each(|s| s.generation = u32::MAX - 1);
        for expected in [u32::MAX, 0, 1] {
            let grant = client.take(1).expect("all are free");
            assert_eq!(grant.generation, expected);
            client.advance(grant);
            assert_eq!(server.lend(grant.slot, grant.generation, 1), Ok((1024, false)));
            server.give_back(grant.slot);
            client.put_back(grant.slot);
        }
    }

    /// Goal:   a grant that was given up has cost no generation.
    /// Method: taken and put back, taken again.
    #[test]
    fn f12_a_grant_that_was_never_used_passes_no_generation() {
        let mut client = SlotAllocator::new(&Geometry::SMALLEST);
        let first = client.take(1).expect("all are free");
        client.put_back(first.slot);
        assert_eq!(client.take(1), Some(first));
    }
}

//! Single-producer single-consumer rings, published by a sequence in each entry.
//!
//! Trust:  the peer may write any entry and any position at any time. A side believes its own private
//!         position; what it reads of the other's is a hint within bounds that follow from its own.
//! Bound:  [`Consumer::pop`] does at most `W` loads, [`Producer::push`] at most one load beside its `W`
//!         stores, whatever the peer wrote.
//! Layout: drawn byte by byte in `shm/LAYOUT.md`, section Rings; pinned by the asserts below.
//!
//! An entry is `W` 64-bit words. The low half of word 0 is the *lap*: `position / N + 1` modulo 2^32 (P2).
//! It is stored last, with Release, and polled with Acquire: the consumer polls the very line that it is
//! going to read, and there is no shared head or tail. The consumer's position is published apart, and
//! read only by a producer that would otherwise think the ring full.

use crate::error::PeerFault;
use crate::kill_point;
use crate::sync::{
    AtomicU32,
    Ordering::{Acquire, Release},
    Word,
};
use std::ops::Deref;

/// The bits of word 0 that belong to the lap; the upper half is the entry's own.
pub const LAP_MASK: u64 = 0xffff_ffff;

/// One ring entry of `W` 64-bit words: 64 bytes for a submission, 32 for a completion.
#[repr(C)]
#[derive(Debug)]
pub struct Entry<const W: usize> {
    words: [Word; W],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Entry<8>>() == 64 && size_of::<Entry<4>>() == 32);

impl<const W: usize> Entry<W> {
    /// An entry that no lap has published.
    pub fn new() -> Self {
        Self { words: std::array::from_fn(|_| Word::new()) }
    }
}

impl<const W: usize> Default for Entry<W> {
    fn default() -> Self {
        Self::new()
    }
}

/// The lap that the entry at `position` carries in a ring of `1 << order` entries.
#[inline(always)]
pub fn lap(position: u64, order: u32) -> u32 {
    ((position >> order) as u32).wrapping_add(1)
}

fn order_of(len: usize) -> u32 {
    assert!(len.is_power_of_two() && len <= 1 << 31, "a ring has a power of two of entries, not {len}");
    len.trailing_zeros()
}

/// The side that writes entries.
#[derive(Debug)]
pub struct Producer<E, P, const W: usize> {
    entries: E,
    order: u32,
    /// Position of the next entry to write. Private: never read back from shared memory.
    next: u64,
    /// The latest of the consumer's positions that we saw; `next - passed <= N` always holds.
    passed: u64,
    position: P,
}

impl<E, P, const W: usize> Producer<E, P, W>
where
    E: Deref<Target = [Entry<W>]>,
    P: Deref<Target = AtomicU32>,
{
    /// A producer at position 0 of `entries`; `position` is where the consumer publishes its own.
    ///
    /// # Panics
    ///
    /// If the number of entries is not a power of two.
    pub fn new(entries: E, position: P) -> Self {
        let order = order_of(entries.len());
        Self { entries, order, next: 0, passed: 0, position }
    }

    /// A producer that has already written `at` entries, all of them consumed, of a ring filled in to
    /// match: for tests of wrap-around, before the consumer starts.
    #[doc(hidden)]
    pub fn starting_at(entries: E, position: P, at: u64) -> Self {
        let order = order_of(entries.len());
        for ahead in at..at + entries.len() as u64 {
            let entry = &entries[ahead as usize & ((1 << order) - 1)];
            entry.words[0].publish(u64::from(lap(ahead, order).wrapping_sub(1)));
        }
        position.store(at as u32, Release);
        Self { entries, order, next: at, passed: at, position }
    }

    /// Entries of the ring.
    #[inline(always)]
    pub fn capacity(&self) -> u64 {
        1 << self.order
    }

    /// Position of the next entry.
    #[inline(always)]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The latest of the consumer's positions that we have seen.
    #[inline(always)]
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// Entries written that the consumer, as far as we have looked, has not passed.
    #[inline(always)]
    pub fn outstanding(&self) -> u64 {
        self.next - self.passed
    }

    /// Looks at the consumer's position.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Position`] if it lies before the last one seen or beyond what was written.
    pub fn refresh(&mut self) -> Result<(), PeerFault> {
        // Acquire pairs with the Release in `Consumer::publish`: entries below it have been copied out.
        let theirs = self.position.load(Acquire);
        let advanced = u64::from(theirs.wrapping_sub(self.passed as u32));
        if advanced > self.outstanding() {
            let (oldest, newest) = (self.passed as u32, self.next as u32);
            return Err(PeerFault::Position { theirs, oldest, newest });
        }
        self.passed += advanced;
        Ok(())
    }

    /// Asks for the line of the entry `ahead` of the next one, which will be written soon.
    #[inline(always)]
    pub fn prefetch(&self, ahead: u64) {
        let index = (self.next + ahead) as usize & ((1 << self.order) - 1);
        crate::bytes::prefetch_for_write(&raw const self.entries[index]);
    }

    /// Writes an entry, or returns `false` when the ring is full: the caller waits, nothing is lost (R1.9).
    ///
    /// Shape: the low half of `words[0]` is ignored, the lap takes its place.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Position`] as for [`Producer::refresh`].
    #[inline(always)]
    pub fn push(&mut self, words: [u64; W]) -> Result<bool, PeerFault> {
        if self.outstanding() == self.capacity() {
            self.refresh()?;
            if self.outstanding() == self.capacity() {
                return Ok(false);
            }
        }
        let entry = &self.entries[self.next as usize & ((1 << self.order) - 1)];
        for (word, value) in entry.words[1..].iter().zip(&words[1..]) {
            word.set(*value);
        }
        // Both directions are written here: entries of eight words are a client's.
        kill_point!(W == crate::entry::SUBMISSION_WORDS => "client.entry.half", "server.completion.half");
        entry.words[0].publish(words[0] & !LAP_MASK | u64::from(lap(self.next, self.order)));
        self.next += 1;
        Ok(true)
    }
}

/// The side that reads entries.
#[derive(Debug)]
pub struct Consumer<E, P, const W: usize> {
    entries: E,
    order: u32,
    /// Position of the next entry to read. Private: `position` is written for the producer only.
    next: u64,
    position: P,
}

impl<E, P, const W: usize> Consumer<E, P, W>
where
    E: Deref<Target = [Entry<W>]>,
    P: Deref<Target = AtomicU32>,
{
    /// A consumer at position 0 of `entries`; `position` is where it publishes how far it got.
    ///
    /// # Panics
    ///
    /// If the number of entries is not a power of two.
    pub fn new(entries: E, position: P) -> Self {
        let order = order_of(entries.len());
        Self { entries, order, next: 0, position }
    }

    /// A consumer that has already taken `at` entries: the other half of [`Producer::starting_at`].
    #[doc(hidden)]
    pub fn starting_at(entries: E, position: P, at: u64) -> Self {
        Self { next: at, ..Self::new(entries, position) }
    }

    /// Position of the next entry.
    #[inline(always)]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether an entry, or a fault, is there to be popped.
    #[inline(always)]
    pub fn is_ready(&self) -> bool {
        let expected = lap(self.next, self.order);
        self.current().words[0].sequence() as u32 != expected.wrapping_sub(1)
    }

    /// Asks for the lines of the next `count` entries, which have probably been written already.
    #[inline(always)]
    pub fn prefetch(&self, count: u64) {
        for position in self.next..self.next + count {
            let index = position as usize & ((1 << self.order) - 1);
            crate::bytes::prefetch_for_read(&raw const self.entries[index]);
        }
    }

    /// The words of the next entry if it is there: a hint for prefetching. What is read later may differ.
    #[inline(always)]
    pub fn peek(&self) -> Option<[u64; W]> {
        let entry = self.current();
        let sequence = entry.words[0].sequence();
        (sequence as u32 == lap(self.next, self.order)).then(|| {
            let mut words = [sequence; W];
            for (word, value) in entry.words[1..].iter().zip(&mut words[1..]) {
                *value = word.get();
            }
            words
        })
    }

    /// The words of the entry `ahead` of the next one, if it is there: for people to look at, not to be acted upon.
    /// `None` from the end of the ring on.
    pub fn peek_at(&self, ahead: u64) -> Option<[u64; W]> {
        if ahead >= 1 << self.order {
            return None;
        }
        let position = self.next + ahead;
        let entry = &self.entries[position as usize & ((1 << self.order) - 1)];
        let sequence = entry.words[0].sequence();
        (sequence as u32 == lap(position, self.order)).then(|| {
            let mut words = [sequence; W];
            for (word, value) in entry.words[1..].iter().zip(&mut words[1..]) {
                *value = word.get();
            }
            words
        })
    }

    /// Takes the oldest entry, or `None` when there is none. Does not publish that it did.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Lap`] if the sequence is neither the expected lap nor the previous one; nothing is
    /// consumed (S4).
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<[u64; W]>, PeerFault> {
        let expected = lap(self.next, self.order);
        let entry = self.current();
        let sequence = entry.words[0].sequence();
        let theirs = sequence as u32;
        if theirs != expected {
            if theirs == expected.wrapping_sub(1) {
                return Ok(None);
            }
            return Err(PeerFault::Lap { theirs, expected, position: self.next });
        }
        // Copied out once: from here on the peer can change the entry but not `words`.
        let mut words = [sequence; W];
        for (word, value) in entry.words[1..].iter().zip(&mut words[1..]) {
            *value = word.get();
        }
        self.next += 1;
        Ok(Some(words))
    }

    /// Takes the oldest entry if it is there and `accepts` its words; otherwise nothing is consumed, and
    /// [`Consumer::pop`] says what there is.
    #[inline(always)]
    pub fn pop_if(&mut self, accepts: impl FnOnce(&[u64; W]) -> bool) -> Option<[u64; W]> {
        // Copied out once, as in `pop`: what is judged is what is returned.
        let words = self.peek()?;
        if !accepts(&words) {
            return None;
        }
        self.next += 1;
        Some(words)
    }

    /// Tells the producer that everything popped so far may be written again.
    #[inline(always)]
    pub fn publish(&self) {
        self.publish_at(self.next);
    }

    /// Tells the producer that entries before `position` may be written again, and, for a submission ring,
    /// may have been executed (FAULTS §5). `position` is at most [`Consumer::next`].
    #[inline(always)]
    pub fn publish_at(&self, position: u64) {
        debug_assert!(position <= self.next, "an entry is published only after it has been copied out");
        // Release pairs with the Acquire in `Producer::refresh`: our copies are complete.
        self.position.store(position as u32, Release);
    }

    #[inline(always)]
    fn current(&self) -> &Entry<W> {
        &self.entries[self.next as usize & ((1 << self.order) - 1)]
    }
}

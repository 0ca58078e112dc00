//! A lane assembled from its parts: the server's end and the client's end.

use crate::bell::{ClientBell, ServerBell};
use crate::bytes::SharedBytes;
use crate::entry::{COMPLETION_WORDS, SUBMISSION_WORDS};
use crate::error::{PeerFault, SegmentError};
use crate::layout::{Geometry, LaneLayout};
use crate::lease::{LeaseAllocator, LeaseTable, LeaseWords};
use crate::map::{Mapping, PAGE, Shared};
use crate::ring::{Consumer, Entry, Producer};
use crate::slots::{Hints, SlotAllocator, SlotTable};
use crate::sync::{AtomicU32, AtomicU64};
use std::sync::Arc;

/// The interactive ring pair: looked at between any two bulk calls.
pub const INTERACTIVE: usize = 0;
/// The bulk ring pair.
pub const BULK: usize = 1;

/// Which ring a lane's entries are taken from next: interactive ones first, between any two bulk ones too; but
/// after [`Drain::RUN`] interactive entries in a row one bulk entry has its turn, if there is one (R2.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drain {
    /// Interactive entries taken since the last bulk one.
    run: u32,
}

impl Drain {
    /// Both rings, in the order in which they are looked at; whoever is about to sleep looks at all of them.
    pub const ORDER: [usize; 2] = [INTERACTIVE, BULK];

    /// Interactive entries in a row before a waiting bulk entry: bulk has at least one entry in 17.
    #[cfg(not(loom))]
    pub const RUN: u32 = 16;
    /// A small model has few entries.
    #[cfg(loom)]
    pub const RUN: u32 = 1;

    /// Interactive entries that may be taken before bulk is looked at; 0 if that has to happen now.
    #[inline(always)]
    pub fn interactive_now(&self) -> u32 {
        Self::RUN - self.run
    }

    /// Notes that `count` entries of `ring` were taken, at most as many as [`Drain::interactive_now`] said.
    #[inline(always)]
    pub fn took(&mut self, ring: usize, count: u32) {
        self.run = if ring == BULK { 0 } else { self.run + count };
    }
}

type Submissions = Shared<[Entry<SUBMISSION_WORDS>]>;
type Completions = Shared<[Entry<COMPLETION_WORDS>]>;
type Position = Shared<AtomicU32>;

/// What both ends of a lane see alike.
#[derive(Debug)]
pub struct Common {
    /// The word that the server sleeps on.
    pub server_bell: ServerBell<Shared<AtomicU32>>,
    /// The word that clients sleep on.
    pub client_bell: ClientBell<Shared<AtomicU32>>,
    /// How leases are taken back.
    pub leases: LeaseWords<Shared<AtomicU32>>,
    /// Which slot words to look at.
    pub hints: Hints<Shared<[AtomicU64]>>,
    /// The client's slot words, one per base slot number.
    pub client_words: Shared<[AtomicU64]>,
    /// The server's slot words, one per base slot number.
    pub server_words: Shared<[AtomicU64]>,
    /// The slot region; slot `s` begins at [`LaneLayout::slot_offset`].
    pub payload: SharedBytes,
}

impl Common {
    fn open(map: &Arc<Mapping>, geometry: &Geometry, layout: &LaneLayout) -> Result<Self, SegmentError> {
        let names = geometry.base_numbers();
        Ok(Self {
            server_bell: ServerBell(map.object(layout.server_bell)?),
            client_bell: ClientBell(map.object(layout.client_bell)?),
            leases: LeaseWords::new(
                map.object(layout.void_before)?,
                map.object(layout.gone_before)?,
                map.object(layout.using)?,
            ),
            hints: Hints::new(map.slice(layout.hints, 1 + layout.hint_words)?, names),
            client_words: map.slice(layout.client_words, names as usize)?,
            server_words: map.slice(layout.server_words, names as usize)?,
            payload: SharedBytes::new(map, layout.slots, geometry.slot_pages() as usize * PAGE)?,
        })
    }
}

/// The server's end: consumes submissions, produces completions, decides by its slot table.
#[derive(Debug)]
pub struct ServerLane {
    /// Submission rings, [`INTERACTIVE`] and [`BULK`].
    pub submissions: [Consumer<Submissions, Position, SUBMISSION_WORDS>; 2],
    /// Completion rings.
    pub completions: [Producer<Completions, Position, COMPLETION_WORDS>; 2],
    /// The private record of the base slots.
    pub slots: SlotTable,
    /// The private record of the leases.
    pub leases: LeaseTable,
    /// Bells, hints, slot words, payload.
    pub common: Common,
}

impl ServerLane {
    /// Lends a slot that carries payload and names no call: base or leased. Returns its capacity in bytes.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] or [`PeerFault::SlotBusy`]; nothing is changed.
    pub fn lend_payload(&mut self, slot: u32) -> Result<u32, PeerFault> {
        if self.leases.is_leased(slot) { self.leases.lend(slot) } else { self.slots.lend_for_answer(slot) }
    }

    /// A slot that carried payload is lent no more.
    pub fn give_back_payload(&mut self, slot: u32) {
        if self.leases.is_leased(slot) { self.leases.free(slot) } else { self.slots.give_back(slot) }
    }

    /// Bytes that a slot holds, base or leased.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Slot`] if there is no such slot.
    pub fn capacity(&mut self, slot: u32) -> Result<u32, PeerFault> {
        if self.leases.is_leased(slot) { self.leases.capacity(slot) } else { self.slots.capacity(slot) }
    }

    /// The server's end of the lane at `layout` in `map`, everything at position 0.
    ///
    /// # Errors
    ///
    /// [`SegmentError::OutOfBounds`] if the mapping is too short for the layout.
    pub fn open(map: &Arc<Mapping>, geometry: &Geometry, layout: &LaneLayout) -> Result<Self, SegmentError> {
        let n = geometry.ring_len() as usize;
        let submission = |i: usize| -> Result<_, SegmentError> {
            Ok(Consumer::new(map.slice(layout.submissions[i], n)?, map.object(layout.published[i])?))
        };
        let completion = |i: usize| -> Result<_, SegmentError> {
            Ok(Producer::new(map.slice(layout.completions[i], n)?, map.object(layout.consumed[i])?))
        };
        Ok(Self {
            submissions: [submission(INTERACTIVE)?, submission(BULK)?],
            completions: [completion(INTERACTIVE)?, completion(BULK)?],
            slots: SlotTable::new(geometry),
            leases: LeaseTable::new(geometry),
            common: Common::open(map, geometry, layout)?,
        })
    }
}

/// The client's end: produces submissions, consumes completions, owns the slots.
#[derive(Debug)]
pub struct ClientLane {
    /// Submission rings, [`INTERACTIVE`] and [`BULK`].
    pub submissions: [Producer<Submissions, Position, SUBMISSION_WORDS>; 2],
    /// Completion rings.
    pub completions: [Consumer<Completions, Position, COMPLETION_WORDS>; 2],
    /// The private allocator of the base slots.
    pub slots: SlotAllocator,
    /// The private allocator of the leases.
    pub leases: LeaseAllocator,
    /// Bells, hints, slot words, payload.
    pub common: Common,
}

impl ClientLane {
    /// The client's end of the lane at `layout` in `map`, everything at position 0.
    ///
    /// # Errors
    ///
    /// [`SegmentError::OutOfBounds`] if the mapping is too short for the layout.
    pub fn open(map: &Arc<Mapping>, geometry: &Geometry, layout: &LaneLayout) -> Result<Self, SegmentError> {
        let n = geometry.ring_len() as usize;
        let submission = |i: usize| -> Result<_, SegmentError> {
            Ok(Producer::new(map.slice(layout.submissions[i], n)?, map.object(layout.published[i])?))
        };
        let completion = |i: usize| -> Result<_, SegmentError> {
            Ok(Consumer::new(map.slice(layout.completions[i], n)?, map.object(layout.consumed[i])?))
        };
        Ok(Self {
            submissions: [submission(INTERACTIVE)?, submission(BULK)?],
            completions: [completion(INTERACTIVE)?, completion(BULK)?],
            slots: SlotAllocator::new(geometry),
            leases: LeaseAllocator::default(),
            common: Common::open(map, geometry, layout)?,
        })
    }
}

//! Where everything lies in a segment. Drawn in `shm/LAYOUT.md`; `tests/layout.rs` holds the two together.
//!
//! A segment is a header, the home lane behind it in the same page, and further lanes on pages of their
//! own. A lane is a *head* (positions, bells, hints, lease words, slot words of the base slots, four rings)
//! and slot pages, base and lease. With the default geometry header and head fill one page.

use crate::error::SegmentError;
use crate::map::PAGE;

/// "DOORBELL" as little-endian bytes.
pub const MAGIC: u64 = u64::from_le_bytes(*b"DOORBELL");
/// Version of the layout and of the rules behind it. Minor changes are feature bits.
pub const VERSION: u32 = 1;
/// Lines: what one side writes never shares one with what the other writes.
pub const LINE: usize = 64;
/// Where the home lane's head begins: right behind the header.
pub const HEADER_LEN: usize = 256;
/// Most lanes of a segment, the home lane included.
pub const LANES_MAX: u32 = 64;
/// Smallest and largest ring order: 8 to 1024 entries.
pub const RING_ORDER_MIN: u8 = 3;
/// See [`RING_ORDER_MIN`].
pub const RING_ORDER_MAX: u8 = 10;
/// Most slot pages of a lane, base and lease together (4 MiB).
pub const LANE_PAGES_MAX: u32 = 1024;
/// Bytes of the smallest slot class, four of which share a page.
pub const SLOT_SMALL: usize = 1024;
/// Bytes of the middle slot class: one page.
pub const SLOT_MEDIUM: usize = 4096;
/// Bytes of the largest slot class, and so of a frame: four aligned pages granted together.
pub const SLOT_LARGE: usize = 16384;
/// Slot numbers of a page.
pub const SLOTS_PER_PAGE: u32 = 4;

/// Byte offsets of the header's fields.
pub mod header {
    /// u64, [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// u32 version in the low half, u32 [`super::HEADER_LEN`] in the high half.
    pub const VERSION: usize = 8;
    /// u64, features that a client must know.
    pub const FEATURES_REQUIRED: usize = 16;
    /// u64, features that a client may use.
    pub const FEATURES_OPTIONAL: usize = 24;
    /// u64, random at the start of the server.
    pub const EPOCH: usize = 32;
    /// Two u64, the random id of the session.
    pub const SESSION: usize = 40;
    /// u64, the packed geometry, see [`super::Geometry::pack`].
    pub const GEOMETRY: usize = 56;
    /// u32 state in the low half, u32 disconnect reason in the high half; the only field that changes.
    pub const STATE: usize = 64;
    /// u64: page number of lane 1's head in the low u16, and so on, four lanes a word; lane 0's is unused.
    pub const DIRECTORY: usize = 128;
}

/// Values of the state field of the header.
pub mod state {
    /// Calls are taken.
    pub const RUNNING: u32 = 0;
    /// No new calls are taken, those in flight finish.
    pub const DRAINING: u32 = 1;
    /// Nothing will be answered any more.
    pub const CLOSED: u32 = 2;
}

/// What the handshake fixes about a segment's size. The same for all lanes of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Each ring has `1 << ring_order` entries.
    pub ring_order: u8,
    /// Base slots of [`SLOT_LARGE`] bytes.
    pub large: u16,
    /// Base slots of [`SLOT_MEDIUM`] bytes.
    pub medium: u16,
    /// Base slots of [`SLOT_SMALL`] bytes, in whole pages: rounded up to a multiple of 4.
    pub small: u16,
    /// Pages beyond the base slots that may be leased.
    pub lease_pages: u16,
}

impl Default for Geometry {
    /// 16 entries, four slots of 1 KiB, 64 pages that may be leased: one page of head, one of slots, 256 KiB of
    /// holes.
    fn default() -> Self {
        Self { lease_pages: 64, ..Self::SMALLEST }
    }
}

impl Geometry {
    /// The smallest geometry: one page of head and one page of four small slots.
    pub const SMALLEST: Self = Self { ring_order: 4, large: 0, medium: 0, small: 4, lease_pages: 0 };

    /// Checks every limit, and rounds small slots up to whole pages.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Geometry`] naming the field and its limits.
    pub fn checked(mut self) -> Result<Self, SegmentError> {
        let (min, max) = (RING_ORDER_MIN.into(), RING_ORDER_MAX.into());
        let order = u64::from(self.ring_order);
        if !(min..=max).contains(&order) {
            return Err(SegmentError::Geometry { what: "ring order", value: order, min, max });
        }
        let max = u64::from(LANE_PAGES_MAX);
        let small = self.small.div_ceil(SLOTS_PER_PAGE as u16).saturating_mul(SLOTS_PER_PAGE as u16);
        self.small = small;
        if self.base_pages() == 0 {
            return Err(SegmentError::Geometry { what: "number of base slot pages", value: 0, min: 1, max });
        }
        let value = u64::from(self.base_pages()) + u64::from(self.lease_pages);
        if value > max {
            return Err(SegmentError::Geometry { what: "number of slot pages", value, min: 1, max });
        }
        Ok(self)
    }

    /// Entries of each ring.
    pub fn ring_len(&self) -> u32 {
        1 << self.ring_order
    }

    /// Calls that a ring pair admits at once: every one reserves its terminal completion, the rest of the
    /// completion ring carries frames (P4).
    pub fn admitted(&self) -> u32 {
        let n = self.ring_len();
        n - (n / 64).max(1)
    }

    /// Pages of base slots.
    pub fn base_pages(&self) -> u32 {
        4 * u32::from(self.large) + u32::from(self.medium) + u32::from(self.small) / SLOTS_PER_PAGE
    }

    /// Numbers of base slots: four a page, whether or not each is a slot.
    pub fn base_numbers(&self) -> u32 {
        self.base_pages() * SLOTS_PER_PAGE
    }

    /// Base and lease pages.
    pub fn slot_pages(&self) -> u32 {
        self.base_pages() + u32::from(self.lease_pages)
    }

    /// Bytes that base slot `slot` holds, or 0 if there is no such slot: large ones come first, then
    /// medium, then small ones; a slot number is `page * 4 + sub-index`.
    pub fn base_capacity(&self, slot: u32) -> usize {
        let (page, sub) = (slot / SLOTS_PER_PAGE, slot % SLOTS_PER_PAGE);
        let large_end = 4 * u32::from(self.large);
        let medium_end = large_end + u32::from(self.medium);
        if page < large_end {
            if slot.is_multiple_of(4 * SLOTS_PER_PAGE) { SLOT_LARGE } else { 0 }
        } else if page < medium_end {
            if sub == 0 { SLOT_MEDIUM } else { 0 }
        } else if page < self.base_pages() {
            SLOT_SMALL
        } else {
            0
        }
    }

    /// The geometry as it stands in the header and in the handshake.
    pub fn pack(&self) -> u64 {
        u64::from(self.ring_order)
            | u64::from(self.lease_pages) << 8
            | u64::from(self.small) << 24
            | u64::from(self.medium) << 40
            | u64::from(self.large) << 52
    }

    /// The geometry packed in `word`; not checked.
    pub fn unpack(word: u64) -> Self {
        Self {
            ring_order: word as u8,
            lease_pages: (word >> 8) as u16,
            small: (word >> 24) as u16,
            medium: (word >> 40) as u16 & 0xfff,
            large: (word >> 52) as u16,
        }
    }
}

/// Byte offsets of the parts of a lane inside its segment. Index 0 is interactive, 1 is bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneLayout {
    /// u32 per ring: submissions that the server has taken. Written by the server.
    pub published: [usize; 2],
    /// u32 per ring: completions that the client has taken. Written by the client.
    pub consumed: [usize; 2],
    /// u32: whether the client uses leased memory. Written by the client, see [`crate::lease::LeaseWords`].
    pub using: usize,
    /// u32, see [`crate::bell::ServerBell`].
    pub server_bell: usize,
    /// u32, see [`crate::bell::ClientBell`].
    pub client_bell: usize,
    /// u64 summary, then one bit per base slot number.
    pub hints: usize,
    /// u64s of hints behind the summary.
    pub hint_words: usize,
    /// u32: leases of earlier epochs must not be begun to be used. Written by the server.
    pub void_before: usize,
    /// u32: the memory of leases of earlier epochs is gone. Written by the server.
    pub gone_before: usize,
    /// u64 per base slot number. Written by the client.
    pub client_words: usize,
    /// u64 per base slot number. Written by the server.
    pub server_words: usize,
    /// Submission rings, 64 bytes an entry.
    pub submissions: [usize; 2],
    /// Completion rings, 32 bytes an entry.
    pub completions: [usize; 2],
    /// Slot pages: base, then lease. Also the end of the head, on a page boundary.
    pub slots: usize,
    /// First byte behind the lane; a page boundary.
    pub end: usize,
}

impl LaneLayout {
    /// The home lane of a segment of this geometry.
    pub fn home(geometry: &Geometry) -> Self {
        Self::at(HEADER_LEN, geometry)
    }

    /// Lane number `lane` of a segment of this geometry; 0 is the home lane. Further lanes are all alike and
    /// follow each other.
    pub fn nth(geometry: &Geometry, lane: u32) -> Self {
        if lane == 0 { Self::home(geometry) } else { Self::at(Self::start(geometry, lane), geometry) }
    }

    /// Where the head of lane `lane`, at least 1, begins: a page boundary.
    fn start(geometry: &Geometry, lane: u32) -> usize {
        Self::home(geometry).end + (lane as usize - 1) * Self::at(0, geometry).end
    }

    /// A lane whose head begins at byte `start`.
    pub fn at(start: usize, geometry: &Geometry) -> Self {
        let mut next = start;
        let mut lines = |bytes: usize| {
            let here = next;
            next += bytes.next_multiple_of(LINE);
            here
        };
        let ring_len = geometry.ring_len() as usize;
        let base_numbers = geometry.base_numbers() as usize;
        let hint_words = base_numbers.div_ceil(64);
        let published = lines(8);
        let consumed = lines(12);
        let server_bell = lines(4);
        let client_bell = lines(4);
        let hints = lines(8 + 8 * hint_words);
        let lease_words = lines(8);
        let client_words = lines(8 * base_numbers);
        let server_words = lines(8 * base_numbers);
        let interactive = (lines(64 * ring_len), lines(32 * ring_len));
        let bulk = (lines(64 * ring_len), lines(32 * ring_len));
        let slots = next.next_multiple_of(PAGE);
        Self {
            published: [published, published + 4],
            consumed: [consumed, consumed + 4],
            using: consumed + 8,
            server_bell,
            client_bell,
            hints,
            hint_words,
            void_before: lease_words,
            gone_before: lease_words + 4,
            client_words,
            server_words,
            submissions: [interactive.0, bulk.0],
            completions: [interactive.1, bulk.1],
            slots,
            end: slots + geometry.slot_pages() as usize * PAGE,
        }
    }

    /// Byte offset of slot number `slot` inside the slot region.
    #[inline(always)]
    pub fn slot_offset(slot: u32) -> usize {
        slot as usize * SLOT_SMALL
    }
}

/// Bytes of a segment with room for `lanes` lanes, the home lane included. All but the granted ones are holes.
pub fn segment_len(geometry: &Geometry, lanes: u32) -> usize {
    LaneLayout::nth(geometry, lanes.saturating_sub(1)).end
}

/// Most lanes that a segment of this geometry can have: [`LANES_MAX`], or as many as the directory's page
/// numbers reach.
pub fn lanes_max(geometry: &Geometry) -> u32 {
    let reach = |lane: &u32| LaneLayout::start(geometry, *lane) / PAGE <= usize::from(u16::MAX);
    1 + (1..LANES_MAX).take_while(reach).count() as u32
}

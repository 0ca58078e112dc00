//! Calls and their times by message type: one record for each type that a reactor has served, written by that reactor
//! alone and read by anybody at any time.
//!
//! Bound:  [`TYPES_MAX`] records of 256 bytes for each reactor, [`AT_ONCE`] of them from the start, the others made when a
//!         type is first used; the types beyond that share the last record, which has no number of its own.
//! Cost:   relaxed loads and stores on lines of the reactor's own, no locked instruction.

use crate::inspect::Running;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Upper bounds of the histogram, ns, each within its bucket. The last bucket has none.
pub const BOUNDS_NS: [u64; 27] = [
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
    60_000_000_000,
    120_000_000_000,
];

/// Buckets of a histogram: one for each bound and one beyond them.
pub const BUCKETS: usize = BOUNDS_NS.len() + 1;

/// Records of one reactor, the last of them for all types that found no other.
pub(crate) const TYPES_MAX: usize = 32;

/// Records that there are from the start: as long as they do, no call costs an allocation.
const AT_ONCE: usize = 8;

/// The type of a record that has none yet.
const NO_TYPE: u32 = u32::MAX - 1;

/// Stands for the types that share a record.
pub const OTHER_TYPES: u32 = u32::MAX;

/// The bucket of a time.
#[inline(always)]
pub(crate) fn bucket(ns: u64) -> usize {
    // Most times are short: from the left.
    BOUNDS_NS.iter().position(|bound| ns <= *bound).unwrap_or(BOUNDS_NS.len())
}

/// Adds to a word that nobody else writes.
#[inline(always)]
fn add(word: &AtomicU64, more: u64) {
    word.store(word.load(Relaxed).wrapping_add(more), Relaxed);
}

/// What one reactor knows of one type.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct TypeRecord {
    message_type: AtomicU32,
    sum_ns: AtomicU64,
    longest_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

const _: () = assert!(size_of::<TypeRecord>() == 256);

impl TypeRecord {
    fn new(message_type: u32) -> Self {
        Self {
            message_type: AtomicU32::new(message_type),
            sum_ns: AtomicU64::new(0),
            longest_ns: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Counts `calls` of `each_ns` ns, which belong into `bucket`.
    #[inline(always)]
    pub fn count(&self, bucket: usize, each_ns: u64, calls: u64) {
        add(&self.buckets[bucket], calls);
        add(&self.sum_ns, each_ns * calls);
        if each_ns > self.longest_ns.load(Relaxed) {
            self.longest_ns.store(each_ns, Relaxed);
        }
    }

    fn read(&self) -> TypeMetrics {
        TypeMetrics {
            message_type: self.message_type.load(Relaxed),
            sum_ns: self.sum_ns.load(Relaxed),
            longest_ns: self.longest_ns.load(Relaxed),
            buckets: std::array::from_fn(|i| self.buckets[i].load(Relaxed)),
        }
    }
}

/// The records of one reactor.
#[derive(Debug)]
pub(crate) struct TypeTable {
    first: [TypeRecord; AT_ONCE],
    further: [OnceLock<Box<TypeRecord>>; TYPES_MAX - AT_ONCE],
    running: Now,
}

/// The call that a reactor runs, on a line of its own.
#[repr(align(64))]
#[derive(Debug, Default)]
struct Now {
    /// Connection in the upper half, type in the lower; 0 for none.
    call: AtomicU64,
    /// When the clock was last read before it, ns.
    since_ns: AtomicU64,
}

impl TypeTable {
    pub fn new() -> Self {
        Self {
            first: std::array::from_fn(|_| TypeRecord::new(NO_TYPE)),
            further: [const { OnceLock::new() }; TYPES_MAX - AT_ONCE],
            running: Now::default(),
        }
    }

    /// The reactor begins to run a call.
    #[inline(always)]
    pub fn runs(&self, message_type: u32, connection: u32) {
        self.running.call.store(u64::from(connection) << 32 | u64::from(message_type), Relaxed);
    }

    /// It has read the clock.
    #[inline(always)]
    pub fn runs_since(&self, now_ns: u64) {
        self.running.since_ns.store(now_ns, Relaxed);
    }

    /// It runs none.
    #[inline(always)]
    pub fn runs_nothing(&self) {
        self.running.call.store(0, Relaxed);
    }

    /// What the reactor of this number runs at the moment.
    pub fn running(&self, reactor: u32, now_ns: u64) -> Option<Running> {
        let call = self.running.call.load(Relaxed);
        let for_ns = now_ns.saturating_sub(self.running.since_ns.load(Relaxed));
        (call != 0).then_some(Running {
            reactor,
            message_type: call as u32,
            connection: (call >> 32) as u32,
            for_ns,
        })
    }

    /// The record at `index` is for this type. For the reactor that owns the table.
    pub fn begin(&self, index: usize, message_type: u32) {
        self.record(index).message_type.store(message_type, Relaxed);
    }

    /// The record at `index`. For the reactor that owns the table.
    #[inline(always)]
    pub fn record(&self, index: usize) -> &TypeRecord {
        match self.first.get(index) {
            Some(record) => record,
            None => self.further[index - AT_ONCE].get_or_init(|| Box::new(TypeRecord::new(OTHER_TYPES))),
        }
    }

    /// Adds what has been counted to `sum`, type by type.
    pub fn add_to(&self, sum: &mut Vec<TypeMetrics>) {
        let further = self.further.iter().filter_map(OnceLock::get).map(Box::as_ref);
        for read in self.first.iter().chain(further).map(TypeRecord::read) {
            if read.message_type == NO_TYPE {
                continue;
            }
            match sum.iter_mut().find(|known| known.message_type == read.message_type) {
                Some(known) => known.add(&read),
                None => sum.push(read),
            }
        }
    }
}

/// What has been counted of one message type.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct TypeMetrics {
    /// The type, or [`OTHER_TYPES`].
    pub message_type: u32,
    /// Time of all calls together, ns.
    pub sum_ns: u64,
    /// The longest time, ns; that of short calls is the mean of a few of them.
    pub longest_ns: u64,
    /// Calls by time: those up to each of [`BOUNDS_NS`] and above the bound before it, then those beyond the last.
    pub buckets: [u64; BUCKETS],
}

impl TypeMetrics {
    /// Calls that have ended.
    pub fn calls(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Adds what another reactor has counted of the same type.
    pub fn add(&mut self, other: &Self) {
        self.sum_ns += other.sum_ns;
        self.longest_ns = self.longest_ns.max(other.longest_ns);
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(ours, theirs)| *ours += theirs);
    }

    /// What has been counted since `before`, an earlier state of the same type. The longest time is that of both.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            sum_ns: self.sum_ns.saturating_sub(before.sum_ns),
            buckets: std::array::from_fn(|i| self.buckets[i].saturating_sub(before.buckets[i])),
            ..*self
        }
    }

    /// The time that `share` (0 to 1) of the calls do not exceed, ns, as well as the buckets tell: within a bucket
    /// times are taken to be spread evenly. `None` without calls.
    pub fn quantile_ns(&self, share: f64) -> Option<u64> {
        let calls = self.calls();
        if calls == 0 {
            return None;
        }
        let rank = (share.clamp(0.0, 1.0) * calls as f64).max(1.0);
        let mut below = 0;
        for (i, count) in self.buckets.iter().enumerate() {
            if *count > 0 && (below + count) as f64 >= rank {
                let from = if i == 0 { 0 } else { BOUNDS_NS[i - 1] };
                let to = BOUNDS_NS.get(i).map_or(self.longest_ns, |to| self.longest_ns.min(*to)).max(from);
                let within = (rank - below as f64) / *count as f64;
                return Some(from + ((to - from) as f64 * within) as u64);
            }
            below += count;
        }
        Some(self.longest_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   trap 27: a time lies in the bucket of the smallest bound that it does not exceed; the bounds that R4.6
    ///         names are among them, and the first is 250 ns.
    /// Method: every bound, its neighbours, and both ends.
    #[test]
    fn trap27_r4_6_a_time_is_in_the_bucket_of_the_first_bound_that_holds_it() {
        assert!(BOUNDS_NS.is_sorted_by(|a, b| a < b));
        for (i, bound) in BOUNDS_NS.iter().enumerate() {
            assert_eq!((bucket(*bound - 1), bucket(*bound), bucket(*bound + 1)), (i, i, i + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BOUNDS_NS.len()));
        assert_eq!(BOUNDS_NS[0], 250);
        for named in [1_000_000, 10_000_000, 100_000_000] {
            assert!(BOUNDS_NS.contains(&named));
        }
    }

    /// Goal:   what reactors have counted of a type adds up; a record exists for types that were used, and no other.
    #[test]
    fn r4_2_types_of_all_reactors_add_up() {
        let (one, other) = (TypeTable::new(), TypeTable::new());
        one.begin(0, 2);
        one.begin(TYPES_MAX - 2, 7);
        other.begin(0, 7);
        one.record(0).count(bucket(300), 300, 2);
        one.record(TYPES_MAX - 2).count(bucket(10), 10, 1);
        other.record(0).count(bucket(9_000), 9_000, 1);
        let mut sum = Vec::new();
        one.add_to(&mut sum);
        other.add_to(&mut sum);
        let told: Vec<_> = sum.iter().map(|t| (t.message_type, t.calls(), t.sum_ns, t.longest_ns)).collect();
        assert_eq!(told, [(2, 2, 600, 300), (7, 2, 9_010, 9_000)]);
        assert_eq!((sum[1].buckets[0], sum[1].buckets[bucket(9_000)]), (1, 1));
    }

    /// Goal:   percentiles are found within the right bucket.
    #[test]
    fn quantiles_lie_within_their_buckets() {
        let record = TypeRecord::new(1);
        record.count(bucket(400), 400, 98);
        record.count(bucket(3_000_000), 3_000_000, 2);
        let read = record.read();
        let at = |share| read.quantile_ns(share).unwrap();
        assert!((250..=500).contains(&at(0.5)) && (250..=500).contains(&at(0.98)));
        assert!((2_500_000..=3_000_000).contains(&at(0.99)) && at(1.0) == 3_000_000);
        assert_eq!(read.since(&read).quantile_ns(0.5), None);
    }
}

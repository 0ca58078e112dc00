//! Latencies: recorded without allocating, merged across client processes, read as percentiles.
//!
//! Exact to the nanosecond up to 2 µs, to a part in a thousand above, and the maximum always exact.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest latency told apart from a longer one: one minute.
const LONGEST_NS: u64 = 60_000_000_000;
const DIGITS: u8 = 3;

/// A histogram of latencies, nanoseconds.
#[derive(Debug, Clone)]
pub struct Latencies {
    counts: Histogram<u64>,
    max: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    /// An empty histogram. Allocates everything that it will ever need (some 200 KiB).
    pub fn new() -> Self {
        let counts = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("the bounds are constants");
        Self { counts, max: 0 }
    }

    /// Counts one latency.
    ///
    /// Cost: a few nanoseconds, no allocation.
    #[inline(always)]
    pub fn record(&mut self, ns: u64) {
        self.counts.saturating_record(ns);
        self.max = self.max.max(ns);
    }

    /// How many were recorded.
    #[cfg(test)]
    pub fn len(&self) -> u64 {
        self.counts.len()
    }

    /// Whether none was recorded.
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The latency that this share (0 to 1) of all calls did not exceed; `None` if none was recorded.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        (!self.is_empty()).then(|| self.counts.value_at_quantile(share).min(self.max))
    }

    /// The longest; `None` if none was recorded.
    pub fn max(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.max)
    }

    /// Adds another process's latencies.
    pub fn merge(&mut self, other: &Self) {
        self.counts.add(&other.counts).expect("all histograms have the same bounds");
        self.max = self.max.max(other.max);
    }

    /// A form that can be sent to another process.
    pub fn to_sparse(&self) -> SparseLatencies {
        let counts =
            self.counts.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect();
        SparseLatencies { counts, max: self.max }
    }

    /// What another process sent.
    pub fn from_sparse(sparse: &SparseLatencies) -> Self {
        let mut all = Self::new();
        for (value, count) in &sparse.counts {
            all.counts.saturating_record_n(*value, *count);
        }
        all.max = sparse.max;
        all
    }
}

/// The recorded values alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SparseLatencies {
    /// Value, and how often it was recorded.
    counts: Vec<(u64, u64)>,
    max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap26_percentiles_are_exact_below_two_microseconds_and_close_above() {
        let mut all = Latencies::new();
        (1..=1000).for_each(|ns| all.record(ns));
        assert_eq!(
            (all.quantile(0.5), all.quantile(0.99), all.quantile(1.0)),
            (Some(500), Some(990), Some(1000))
        );
        let mut far = Latencies::new();
        far.record(1_234_567);
        let p50 = far.quantile(0.5).unwrap();
        assert!(p50.abs_diff(1_234_567) * 200 <= 1_234_567, "{p50}");
        assert_eq!(far.max(), Some(1_234_567));
    }

    #[test]
    fn an_empty_histogram_has_no_percentiles() {
        assert_eq!((Latencies::new().quantile(0.5), Latencies::new().max()), (None, None));
    }

    #[test]
    fn what_is_too_long_counts_as_the_longest_and_the_maximum_stays_true() {
        let mut all = Latencies::new();
        all.record(u64::MAX / 2);
        assert_eq!((all.len(), all.max()), (1, Some(u64::MAX / 2)));
    }

    #[test]
    fn latencies_survive_the_way_between_processes_and_add_up() {
        let mut a = Latencies::new();
        let mut b = Latencies::new();
        (1..5000).for_each(|i| a.record(i * 37));
        (1..3000).for_each(|i| b.record(i * 91));
        let back = Latencies::from_sparse(&a.to_sparse());
        for share in [0.01, 0.5, 0.9, 0.999] {
            assert_eq!(back.quantile(share), a.quantile(share));
        }
        a.merge(&b);
        assert_eq!((a.len(), a.max()), (4999 + 2999, Some(2999 * 91)));
    }
}

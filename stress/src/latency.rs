//! How long calls took: every sample in a bucket of ten nanoseconds, beyond a millisecond of a hundred microseconds, so that
//! tails are exact, not guessed.

use serde::{Deserialize, Serialize};

/// Nanoseconds of a bucket.
const STEP_NS: u64 = 10;
/// Buckets: up to a millisecond.
const BUCKETS: usize = 100_000;
/// Nanoseconds of a bucket of those that took longer: up to ten seconds. The longest is known by itself.
const LONG_STEP_NS: u64 = 100_000;
/// A call that took longer is a violation (R5.1).
pub const VIOLATION_NS: u64 = 10_000;
/// No call may take so long, unless the host itself stood still (R5.1).
pub const MAX_NS: u64 = 50_000;

/// Samples, by length.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    long: Vec<u64>,
    samples: u64,
    violations: u64,
    beyond_max: u64,
    max_ns: u64,
}

impl Histogram {
    /// No samples yet.
    pub fn new() -> Self {
        let (buckets, long) = (vec![0; BUCKETS], vec![0; BUCKETS]);
        Self { buckets, long, samples: 0, violations: 0, beyond_max: 0, max_ns: 0 }
    }

    /// One more.
    #[inline(always)]
    pub fn add(&mut self, ns: u64) {
        match self.buckets.get_mut((ns / STEP_NS) as usize) {
            Some(bucket) => *bucket += 1,
            None => self.long[((ns / LONG_STEP_NS) as usize).min(BUCKETS - 1)] += 1,
        }
        self.samples += 1;
        self.violations += u64::from(ns > VIOLATION_NS);
        self.beyond_max += u64::from(ns >= MAX_NS);
        self.max_ns = self.max_ns.max(ns);
    }

    /// The upper end of the bucket that `per_mille` thousandths of the samples do not exceed, nanoseconds.
    fn quantile(&self, per_mille: u64) -> u64 {
        let rank = (self.samples * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (step, buckets) in [(STEP_NS, &self.buckets), (LONG_STEP_NS, &self.long)] {
            for (index, count) in buckets.iter().enumerate() {
                seen += count;
                if seen >= rank {
                    return ((index as u64 + 1) * step).min(self.max_ns);
                }
            }
        }
        self.max_ns
    }

    /// What there is to say of them.
    pub fn summary(&self) -> Latency {
        Latency {
            samples: self.samples,
            p50_ns: self.quantile(500),
            p90_ns: self.quantile(900),
            p99_ns: self.quantile(990),
            p999_ns: self.quantile(999),
            max_ns: self.max_ns,
            above_10_us: self.violations,
            from_50_us: self.beyond_max,
        }
    }
}

/// What there is to say of some samples; quantiles to the next ten nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Names are those of the JSON object.
pub struct Latency {
    pub samples: u64,
    pub p50_ns: u64,
    pub p90_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub max_ns: u64,
    pub above_10_us: u64,
    pub from_50_us: u64,
}

impl Latency {
    /// The worse of two runs in each figure.
    pub fn worse(self, other: Self) -> Self {
        Self {
            samples: self.samples + other.samples,
            p50_ns: self.p50_ns.max(other.p50_ns),
            p90_ns: self.p90_ns.max(other.p90_ns),
            p99_ns: self.p99_ns.max(other.p99_ns),
            p999_ns: self.p999_ns.max(other.p999_ns),
            max_ns: self.max_ns.max(other.max_ns),
            above_10_us: self.above_10_us + other.above_10_us,
            from_50_us: self.from_50_us + other.from_50_us,
        }
    }
}

/// Nanoseconds as microseconds.
pub fn us(ns: u64) -> String {
    format!("{:.2} us", ns as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   quantiles are those of the sorted samples, to the bucket; nothing longer than the last bucket is lost.
    /// Method: samples of which the sorted order is known, some beyond the last bucket.
    #[test]
    fn quantiles_are_those_of_the_sorted_samples() {
        let mut histogram = Histogram::new();
        (0..1000).for_each(|n| histogram.add(n * 100));
        let summary = histogram.summary();
        assert_eq!((summary.samples, summary.max_ns), (1000, 99_900));
        assert_eq!((summary.p50_ns, summary.p99_ns, summary.p999_ns), (49_910, 98_910, 99_810));
        assert_eq!((summary.above_10_us, summary.from_50_us), (899, 500));
        (0..20).for_each(|_| histogram.add(7_000_050));
        histogram.add(90_000_000_000);
        let longer = histogram.summary();
        assert_eq!((longer.p99_ns, longer.p999_ns, longer.max_ns), (7_100_000, 7_100_000, 90_000_000_000));
        assert_eq!(Histogram::new().summary(), Latency::default());
    }

    #[test]
    fn the_worse_of_two_is_so_in_each_figure() {
        let a = Latency { samples: 1, p50_ns: 5, max_ns: 7, ..Latency::default() };
        let b = Latency { samples: 2, p50_ns: 3, max_ns: 9, from_50_us: 1, ..Latency::default() };
        assert_eq!(a.worse(b), Latency { samples: 3, p50_ns: 5, max_ns: 9, from_50_us: 1, ..a });
    }
}

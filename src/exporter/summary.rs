//! One line in the log that says how the last interval was (R4.6).

use crate::metrics::{Metrics, TypeMetrics};
use doorbell_shm::entry::Status;
use std::time::Duration;

/// What had been counted when the last line was written.
#[derive(Debug, Default)]
pub struct Summary {
    before: Metrics,
}

/// The numbers of one line: of the interval, or as of its end.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    calls: u64,
    per_second: u64,
    errors: u64,
    p50_us: u64,
    p99_us: u64,
    bytes_in: u64,
    bytes_out: u64,
    sessions: u64,
    connections: u64,
    memory: u64,
    overruns: u64,
}

impl Summary {
    /// Writes a line about what came since the last one.
    pub fn log(&mut self, metrics: &Metrics, interval: Duration) {
        let line = self.next(metrics, interval);
        tracing::info!(
            calls = line.calls,
            per_second = line.per_second,
            errors = line.errors,
            p50_us = line.p50_us,
            p99_us = line.p99_us,
            bytes_in = line.bytes_in,
            bytes_out = line.bytes_out,
            sessions = line.sessions,
            connections = line.connections,
            memory = line.memory,
            overruns = line.overruns,
            "metrics"
        );
    }

    fn next(&mut self, metrics: &Metrics, interval: Duration) -> Line {
        let before = std::mem::replace(&mut self.before, metrics.clone());
        let errors = |m: &Metrics| m.calls_total() - m.calls[Status::Ok as usize];
        let calls = metrics.calls_total().saturating_sub(before.calls_total());
        let mut times: Option<TypeMetrics> = None;
        for of in &metrics.types {
            let earlier = before.types.iter().find(|earlier| earlier.message_type == of.message_type);
            let since = earlier.map_or_else(|| of.clone(), |earlier| of.since(earlier));
            match &mut times {
                Some(times) => times.add(&since),
                None => times = Some(since),
            }
        }
        let quantile_us =
            |share| times.as_ref().and_then(|times| times.quantile_ns(share)).unwrap_or(0) / 1000;
        Line {
            calls,
            per_second: (calls as f64 / interval.as_secs_f64()).round() as u64,
            errors: errors(metrics).saturating_sub(errors(&before)),
            p50_us: quantile_us(0.5),
            p99_us: quantile_us(0.99),
            bytes_in: metrics.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: metrics.bytes_out.saturating_sub(before.bytes_out),
            sessions: metrics.sessions_open,
            connections: metrics.connections_open,
            memory: metrics.budget_used,
            overruns: metrics.overruns.saturating_sub(before.overruns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{BUCKETS, Counters};

    fn counted(calls: u64, slow: u64, panics: u64) -> Metrics {
        let mut buckets = [0; BUCKETS];
        (buckets[2], buckets[13]) = (calls, slow);
        let of = TypeMetrics { message_type: 2, sum_ns: 0, longest_ns: 5_000_000, buckets };
        let mut counters = Counters { bytes_in: calls * 10, sessions_open: 3, ..Counters::default() };
        counters.calls[Status::Ok as usize] = calls + slow - panics;
        counters.calls[Status::HandlerPanic as usize] = panics;
        Metrics { counters, types: vec![of], ..Metrics::default() }
    }

    /// Goal:   R4.6: a line is about its own interval, not about all time.
    #[test]
    fn r4_6_a_line_tells_of_its_interval() {
        let mut summary = Summary::default();
        let first = summary.next(&counted(1000, 50, 3), Duration::from_secs(10));
        assert_eq!((first.calls, first.per_second, first.errors, first.bytes_in), (1050, 105, 3, 10_000));
        assert!(first.p50_us < 2 && first.p99_us >= 2_500, "{first:?}");
        let second = summary.next(&counted(1600, 50, 3), Duration::from_secs(10));
        assert_eq!((second.calls, second.errors, second.bytes_in, second.sessions), (600, 0, 6000, 3));
        assert!(second.p99_us < 2, "{second:?}");
        let third = summary.next(&counted(1600, 50, 3), Duration::from_secs(10));
        assert_eq!((third.calls, third.p50_us), (0, 0));
    }
}

//! What counting costs a reactor, in processor time: other work on the machine is not charged. Calls that come alone pay
//! for looks at the clock of their own; of many, thirty-two share one.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doorbell::StopWatch;
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::time::Duration;

/// Processor time of this thread that `work` takes.
fn processor_time(mut work: impl FnMut()) -> Duration {
    let now = || {
        let used = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
    };
    let before = now();
    work();
    now() - before
}

/// What does it cost to time a call and count it by type and by connection, in batches of 1 to 8 that follow each other?
/// The criterion is 5 ns for each call. `off` is what is left if nothing is timed; `alone` is a call before which and
/// behind which there is nothing to do, so that the clock is read twice for it.
fn timing(c: &mut Criterion) {
    for (name, is_on, is_alone) in [("on", true, false), ("off", false, false), ("alone", true, true)] {
        let mut group = c.benchmark_group(format!("metrics/timing/{name}"));
        for calls in if is_alone { &[1u32][..] } else { &[1, 4, 8] } {
            group.throughput(Throughput::Elements((*calls).into()));
            let mut watch = StopWatch::new(is_on);
            let mut of_connection = (0u64, 0u64);
            group.bench_with_input(BenchmarkId::from_parameter(calls), calls, |b, calls| {
                let mut count = |calls: u32, ns: u64| {
                    of_connection.0 += u64::from(calls);
                    of_connection.1 += ns;
                };
                b.iter_custom(|batches| {
                    processor_time(|| {
                        for _ in 0..batches {
                            watch.batch(black_box(2), *calls, &mut count);
                            if is_alone {
                                watch.pause(&mut count);
                            }
                        }
                    })
                })
            });
            assert_eq!(watch.busy_ns() > 0, is_on);
            assert!(of_connection.1 <= watch.busy_ns() && (of_connection.0 > 0) == is_on);
        }
        group.finish();
    }
}

/// What does a reading cost whoever asks, with 32 types in use?
fn reading(c: &mut Criterion) {
    let metrics = doorbell::Metrics {
        types: (0..32)
            .map(|message_type| doorbell::TypeMetrics {
                message_type,
                sum_ns: 1,
                longest_ns: 1,
                buckets: [1; doorbell::BUCKETS],
            })
            .collect(),
        ..doorbell::Metrics::default()
    };
    let text = metrics.export_prometheus();
    assert!(text.lines().count() > 32 * doorbell::BUCKETS);
    c.bench_function("metrics/export_prometheus/32_types", |b| {
        b.iter(|| assert_eq!(black_box(&metrics).export_prometheus().len(), text.len()))
    });
}

criterion_group!(benches, timing, reading);
criterion_main!(benches);

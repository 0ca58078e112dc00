//! What counting costs a reactor. Calls that come alone pay for a look at the clock of their own; of many, eight share
//! one.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doorbell::StopWatch;
use std::hint::black_box;

/// What does it cost to time a call and count it by type and by connection, in batches of 1 to 8? The criterion is 5 ns
/// for each call of many; `off` is what is left if nothing is timed.
fn timing(c: &mut Criterion) {
    for (name, is_on) in [("on", true), ("off", false)] {
        let mut group = c.benchmark_group(format!("metrics/timing/{name}"));
        for calls in [1u32, 4, 8] {
            group.throughput(Throughput::Elements(calls.into()));
            let mut watch = StopWatch::new(is_on);
            let mut of_connections = [0u64; 8];
            group.bench_with_input(BenchmarkId::from_parameter(calls), &calls, |b, calls| {
                b.iter(|| watch.batch(black_box(2), *calls, |i, ns| of_connections[i as usize] += ns))
            });
            assert_eq!(watch.busy_ns() > 0, is_on);
            assert!(of_connections.iter().sum::<u64>() <= watch.busy_ns());
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

//! What the parts of the shared memory cost on one thread: the floor under every other figure. Nothing
//! crosses a core here; what crossing costs is `doorbell bench --peer floor`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doorbell_shm::bell::{ASLEEP, ClientBell, Published, ServerBell, WAITER_FUTEX, fence_before_bell};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::layout::Geometry;
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::ring::{Consumer, Entry, Producer};
use doorbell_shm::slots::{Hints, SlotAllocator, SlotTable};
use std::hint::black_box;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Entries of the ring: the largest that a session asks for.
const ENTRIES: usize = 1024;

/// What does one push and one pop cost when nothing crosses a core?
///
/// `W` words to the entry: 8 for a submission, 4 for a completion.
fn push_pop<const W: usize>(c: &mut Criterion, name: &str) {
    let map = Mapping::on_heap((ENTRIES * size_of::<Entry<W>>() + PAGE).next_multiple_of(PAGE));
    let entries = map.slice::<Entry<W>>(PAGE, ENTRIES).unwrap();
    let position = map.object::<AtomicU32>(0).unwrap();
    let mut producer = Producer::new(entries.clone(), position.clone());
    let mut consumer = Consumer::new(entries, position);
    let words: [u64; W] = std::array::from_fn(|i| i as u64 + 1);
    c.bench_function(&format!("ring/same_thread/push_pop/{name}"), |b| {
        b.iter(|| {
            assert!(producer.push(black_box(words)).unwrap());
            let popped = consumer.pop().unwrap().unwrap();
            assert_eq!(popped[1..], words[1..]);
            consumer.publish();
        })
    });
}

fn rings(c: &mut Criterion) {
    push_pop::<8>(c, "submission");
    push_pop::<4>(c, "completion");
}

/// What does it cost to copy a payload into shared memory and out again, each once?
fn copy_in_and_out(c: &mut Criterion) {
    let mut group = c.benchmark_group("bytes/copy_in_and_out");
    for len in [64, 1 << 10, 4 << 10, 16 << 10] {
        let map = Mapping::on_heap(len.max(PAGE));
        let shared = SharedBytes::new(&map, 0, len).unwrap();
        let payload: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let mut copy = vec![0; len];
        group.throughput(Throughput::Bytes(2 * len as u64));
        group.bench_with_input(BenchmarkId::from_parameter(len), &payload, |b, payload| {
            b.iter(|| {
                shared.write(0, black_box(payload));
                shared.read(0, black_box(&mut copy));
            })
        });
        assert_eq!(copy, payload);
    }
    group.finish();
}

/// What does a bell cost whose other side is awake, asleep, or about to sleep? No system call is among it.
fn bells(c: &mut Criterion) {
    let mut group = c.benchmark_group("bell");
    let map = Mapping::on_heap(PAGE);
    let server = ServerBell(map.object::<AtomicU32>(0).unwrap());
    let client = ClientBell(map.object::<AtomicU32>(64).unwrap());
    group.bench_function("fence", |b| b.iter(fence_before_bell));
    group.bench_function("server/look/awake", |b| {
        b.iter(|| assert!(!server.take(black_box(Published::Submissions))))
    });
    group.bench_function("server/mark_and_take", |b| {
        b.iter(|| {
            server.mark(ASLEEP);
            fence_before_bell();
            assert!(server.take(black_box(Published::Submissions)));
        })
    });
    group.bench_function("client/look/nobody", |b| b.iter(|| assert_eq!(client.take(), 0)));
    group.bench_function("client/mark_and_take", |b| {
        b.iter(|| {
            client.mark(black_box(WAITER_FUTEX));
            fence_before_bell();
            assert_eq!(client.take(), WAITER_FUTEX);
        })
    });
    group.finish();
}

/// What do the slots of a call cost on both sides, and a hint?
fn slots(c: &mut Criterion) {
    let mut group = c.benchmark_group("slots");
    let geometry = Geometry { small: 64, ..Geometry::default() };
    let (mut client, mut server) = (SlotAllocator::new(&geometry), SlotTable::new(&geometry));
    group.bench_function("call", |b| {
        b.iter(|| {
            let grant = client.take(black_box(64)).unwrap();
            client.advance(grant);
            assert!(server.lend(grant.slot, grant.generation, 64).is_ok());
            server.give_back(grant.slot);
            client.put_back(grant.slot);
        })
    });
    let map = Mapping::on_heap(PAGE);
    let hints = Hints::new(map.slice::<AtomicU64>(0, 2).unwrap(), 64);
    group.bench_function("hint/none", |b| b.iter(|| assert!(!black_box(&hints).any())));
    group.bench_function("hint/set_and_take", |b| {
        b.iter(|| {
            hints.set(black_box(5));
            let mut found = None;
            hints.take(|slot| found = Some(slot)).unwrap();
            assert_eq!(found, Some(5));
        })
    });
    group.finish();
}

criterion_group!(benches, rings, bells, slots, copy_in_and_out);
criterion_main!(benches);

//! What calls cost in one process, the server's reactor on a thread and core of its own: the bare ring between two threads
//! first, then a call that carries nothing, round trips by size, and many connections. Between processes, with bells and in
//! all placements, `doorbell bench` measures; this is for looking at one change, on one machine, within minutes.
//!
//! `cargo bench --bench calls`. Answers are checked. Needs two cores.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use doorbell::{
    CallOptions, ClientConfig, HandlerTable, IpcClient, IpcServer, MessageType, ServerConfig, ShutdownHandle,
    WaitPolicy,
};
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::ring::{Consumer, Entry, Producer};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::hint::{black_box, spin_loop};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

static TABLE: HandlerTable<()> = HandlerTable::with_builtins();
const IN_FLIGHT: usize = 64;

/// The first core that this process might use when it began, before anything was pinned, and the last.
fn cores() -> (usize, usize) {
    static CORES: OnceLock<(usize, usize)> = OnceLock::new();
    *CORES.get_or_init(|| {
        let set = sched_getaffinity(None).unwrap();
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
        (cores[0], cores[cores.len() - 1])
    })
}

/// Has this thread, and those that it starts from here on, run on these cores alone.
fn pin(cores: &[usize]) {
    let mut set = CpuSet::new();
    cores.iter().for_each(|core| set.set(*core));
    sched_setaffinity(None, &set).unwrap();
}

/// A server that polls on a thread of its own; stopped when dropped.
struct Server {
    directory: PathBuf,
    stop: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(core: usize) -> Self {
        let directory = std::env::temp_dir().join(format!("doorbell-calls-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
        let config = ServerConfig {
            policy: WaitPolicy::Spin,
            reactors: 1,
            cores: vec![core],
            ..ServerConfig::default()
        };
        let bound = IpcServer::new(&TABLE, ()).config(config).bind(directory.join("s")).unwrap();
        let stop = bound.shutdown_handle();
        let thread = std::thread::spawn(move || {
            bound.serve().unwrap();
        });
        Self { directory, stop, thread: Some(thread) }
    }

    fn client(&self) -> IpcClient {
        let config = ClientConfig {
            policy: WaitPolicy::Spin,
            ring_entries: 128,
            small_slots: 64,
            medium_slots: 1,
            ..ClientConfig::default()
        };
        let path: &Path = &self.directory.join("s");
        IpcClient::connect_with(path, &config).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.shutdown_now().unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

/// The floor: what does it cost to have a word come back through two bare rings from another core?
fn floor(c: &mut Criterion) {
    const ENTRIES: usize = 64;
    let (theirs, ours) = cores();
    let ring = || {
        let map = Mapping::on_heap((ENTRIES * size_of::<Entry<8>>() + PAGE).next_multiple_of(PAGE));
        let entries = map.slice::<Entry<8>>(PAGE, ENTRIES).unwrap();
        let position = map.object::<AtomicU32>(0).unwrap();
        (Producer::new(entries.clone(), position.clone()), Consumer::new(entries, position))
    };
    let ((mut there, mut heard), (mut back, mut answers)) = (ring(), ring());
    let over = Arc::new(AtomicBool::new(false));
    let ends = Arc::clone(&over);
    let echo = std::thread::spawn(move || {
        pin(&[theirs]);
        while !ends.load(Relaxed) {
            match heard.pop().unwrap() {
                Some(words) => {
                    heard.publish();
                    assert!(back.push(words).unwrap());
                }
                None => spin_loop(),
            }
        }
    });
    pin(&[ours]);
    let mut number = 0;
    c.bench_function("floor/bare_ring", |b| {
        b.iter(|| {
            number += 1;
            assert!(there.push([number; 8]).unwrap());
            loop {
                if let Some(words) = answers.pop().unwrap() {
                    answers.publish();
                    break assert_eq!(words[1], number);
                }
                spin_loop();
            }
        })
    });
    over.store(true, Relaxed);
    echo.join().unwrap();
}

/// What does a call cost that carries nothing, and one of so many bytes?
fn round_trips(c: &mut Criterion) {
    let (theirs, ours) = cores();
    // A server takes only cores that whoever starts it may use.
    pin(&[theirs, ours]);
    let server = Server::start(theirs);
    pin(&[ours]);
    let client = server.client();
    let connection = client.open().unwrap();
    c.bench_function("call/dispatch", |b| {
        b.iter(|| connection.call(MessageType::PING, black_box(b"")).unwrap())
    });
    let mut group = c.benchmark_group("call/round_trip");
    for len in [64, 1 << 10, 4 << 10, 64 << 10] {
        let mut request: Vec<u8> = (0..len).map(|i| i as u8).collect();
        group.throughput(Throughput::Bytes(2 * len as u64));
        group.bench_function(BenchmarkId::from_parameter(len), |b| {
            b.iter(|| {
                request[0] = request[0].wrapping_add(1);
                assert!(connection.call(MessageType::ECHO, black_box(&request)).unwrap() == request);
            })
        });
    }
    group.finish();
}

/// What does a call of 64 bytes cost with 64 of them in flight, over so many connections of one session?
fn fan_in(c: &mut Criterion) {
    let (theirs, ours) = cores();
    // A server takes only cores that whoever starts it may use.
    pin(&[theirs, ours]);
    let server = Server::start(theirs);
    pin(&[ours]);
    let mut group = c.benchmark_group("call/fan_in");
    group.throughput(Throughput::Elements(1));
    for count in [1, 10, 100, 1000] {
        let client = server.client();
        let connections: Vec<_> = (0..count).map(|_| client.open().unwrap()).collect();
        let (mut next, mut in_flight, mut number) = (0, 0, 0u64);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                while in_flight < IN_FLIGHT {
                    number += 1;
                    let options = CallOptions { tag: number, ..CallOptions::default() };
                    let request = [number; 8].map(u64::to_le_bytes);
                    connections[next].submit(MessageType::ECHO, request.as_flattened(), &options).unwrap();
                    next = (next + 1) % count;
                    in_flight += 1;
                }
                loop {
                    if let Some(answer) = client.poll().unwrap() {
                        let expected = [answer.tag(); 8].map(u64::to_le_bytes);
                        assert_eq!(answer.to_vec().unwrap(), expected.as_flattened());
                        in_flight -= 1;
                        break;
                    }
                    client.flush().unwrap();
                }
            })
        });
    }
    group.finish();
}

criterion_group!(benches, floor, round_trips, fan_in);
criterion_main!(benches);

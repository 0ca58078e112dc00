//! What a round trip costs through each kind of client, beside the one that blocks: 64 bytes, every byte of every
//! answer checked, the server in a process of its own.
//!
//! - `awake`: the reactor polls on the first core, the client is pinned to the last one, calls follow each
//!   other at once.
//! - `asleep`: a reactor on every core, a millisecond between calls, the client wherever the scheduler puts it. The
//!   callback client goes to a reactor of another core on purpose.
//!
//! `cargo bench --bench clients [-- PART]` measures those whose name contains PART; rounds are run in turn, and the
//! figures are the medians over rounds.

use doorbell::{
    AsyncClient, CallOptions, CallbackClient, CallbackConfig, ClientConfig, IpcClient, MessageType,
    WaitPolicy,
};
use std::process::{Child, Command};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
const REQUEST: [u8; 64] = [0xA5; 64];

/// A `doorbell serve`, killed when dropped.
struct Server {
    child: Child,
    directory: std::path::PathBuf,
}

impl Server {
    fn start(name: &str, arguments: &[&str]) -> Self {
        use std::os::unix::fs::DirBuilderExt;
        let directory = std::env::temp_dir().join(format!("doorbell-clients-{name}-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_doorbell"));
        command.arg("serve").arg("--socket").arg(directory.join("s")).args(arguments);
        let child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        let server = Self { child, directory };
        let begun = Instant::now();
        while IpcClient::connect(server.path()).is_err() {
            assert!(begun.elapsed().as_secs() < 30, "the server does not start");
            std::thread::yield_now();
        }
        server
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.join("s")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

/// Times of calls, ns, with pauses between them.
fn measure(calls: usize, pause: Duration, mut call: impl FnMut() -> Vec<u8>) -> Vec<u64> {
    let mut times = Vec::with_capacity(calls);
    for i in 0..calls + calls / 10 {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        let begun = Instant::now();
        let answer = call();
        let took = begun.elapsed().as_nanos() as u64;
        assert_eq!(answer, REQUEST);
        // The first tenth warms up.
        if i >= calls / 10 {
            times.push(took);
        }
    }
    times
}

async fn measure_async(client: &AsyncClient, calls: usize, pause: Duration) -> Vec<u64> {
    let mut times = Vec::with_capacity(calls);
    for i in 0..calls + calls / 10 {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        let begun = Instant::now();
        let answer = client.call(MessageType::ECHO, &REQUEST).await.unwrap();
        let took = begun.elapsed().as_nanos() as u64;
        assert_eq!(answer, REQUEST);
        if i >= calls / 10 {
            times.push(took);
        }
    }
    times
}

fn blocking(path: &std::path::Path, policy: WaitPolicy, calls: usize, pause: Duration) -> Vec<u64> {
    let config = ClientConfig { policy, ..ClientConfig::default() };
    let client = IpcClient::connect_with(path, &config).unwrap();
    let connection = client.open().unwrap();
    let options = CallOptions::default();
    measure(calls, pause, || {
        connection.call_with(MessageType::ECHO, &REQUEST, &options, |a| a.to_vec()).unwrap().unwrap()
    })
}

fn on_tokio(
    path: &std::path::Path,
    policy: WaitPolicy,
    threads: usize,
    calls: usize,
    pause: Duration,
) -> Vec<u64> {
    let runtime = match threads {
        0 => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        n => tokio::runtime::Builder::new_multi_thread().worker_threads(n).enable_all().build(),
    };
    let config = ClientConfig { policy, ..ClientConfig::for_tasks() };
    let path = path.to_owned();
    let runtime = runtime.unwrap();
    let work = async move {
        let client = AsyncClient::connect_with(&path, &config).await.unwrap();
        measure_async(&client, calls, pause).await
    };
    runtime.block_on(async { tokio::spawn(work).await.unwrap() })
}

fn called_back(path: &std::path::Path, calls: usize, pause: Duration) -> Vec<u64> {
    let client = CallbackClient::connect_with(path, &CallbackConfig::default()).unwrap();
    measure(calls, pause, || {
        let (tell, told) = sync_channel(1);
        let answered = move |answer| tell.send(answer).unwrap();
        let _handle = client.call(MessageType::ECHO, REQUEST.to_vec(), answered).unwrap();
        told.recv().unwrap().unwrap()
    })
}

type Kind = (&'static str, fn(&std::path::Path, usize, Duration) -> Vec<u64>);

const KINDS: [Kind; 8] = [
    ("blocking, spin", |p, n, d| blocking(p, WaitPolicy::Spin, n, d)),
    ("blocking, handoff", |p, n, d| blocking(p, WaitPolicy::Handoff, n, d)),
    ("blocking, block", |p, n, d| blocking(p, WaitPolicy::Block, n, d)),
    ("tokio, one thread, handoff", |p, n, d| on_tokio(p, WaitPolicy::Handoff, 0, n, d)),
    ("tokio, one thread, block", |p, n, d| on_tokio(p, WaitPolicy::Block, 0, n, d)),
    ("tokio, two threads, handoff", |p, n, d| on_tokio(p, WaitPolicy::Handoff, 2, n, d)),
    ("tokio, two threads, block", |p, n, d| on_tokio(p, WaitPolicy::Block, 2, n, d)),
    ("callback", called_back),
];

fn percentile(times: &mut [u64], percent: usize) -> u64 {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

fn row(server: &Server, name: &str, kind: &Kind, rounds: usize, calls: usize, pause: Duration) {
    let (mut middle, mut late) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut times = kind.1(&server.path(), calls, pause);
        middle.push(percentile(&mut times, 50));
        late.push(percentile(&mut times, 99));
    }
    let us = |times: &mut [u64]| percentile(times, 50) as f64 / 1000.0;
    println!("{name:7} {:28} p50 {:8.2} us   p99 {:8.2} us", kind.0, us(&mut middle), us(&mut late));
}

fn pin(cores: &[usize]) {
    let mut set = rustix::thread::CpuSet::new();
    cores.iter().for_each(|core| set.set(*core));
    rustix::thread::sched_setaffinity(None, &set).unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let once = arguments.iter().any(|a| a == "--test") || !arguments.iter().any(|a| a == "--bench");
    let part = arguments.iter().find(|a| !a.starts_with("--")).cloned().unwrap_or_default();
    let (rounds, awake, asleep) = if once { (1, 10, 2) } else { (ROUNDS, 20_000, 300) };
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    let cores: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
    let (first, last) = (cores[0], cores[cores.len() - 1]);
    for (name, calls, pause) in
        [("awake", awake, Duration::ZERO), ("asleep", asleep, Duration::from_millis(1))]
    {
        let core = first.to_string();
        let server = match name {
            "awake" => Server::start(name, &["--policy", "spin", "--cores", &core]),
            _ => Server::start(name, &[]),
        };
        if name == "awake" {
            pin(&[last]);
        }
        for kind in KINDS.iter().filter(|kind| format!("{name} {}", kind.0).contains(&part)) {
            row(&server, name, kind, rounds, calls, pause);
        }
        pin(&cores);
    }
}

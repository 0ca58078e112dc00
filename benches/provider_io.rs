//! Plain tokio or tokio-uring for the sockets of providers: what does it cost to read answers that are streamed?
//!
//! A server thread writes events of 200 bytes over TCP on this machine; the client, on a thread of its own, reads them and
//! counts their ends, as the provider's parser must. Asked three times each, in turn: one stream as fast as it goes, 200
//! streams at 50 events a second, and a round trip of 64 bytes. Not criterion: of paced streams the time is given, and what
//! is measured is CPU time, of the client's thread and what the kernel adds for it.
//!
//! `cargo bench --bench provider_io`; under `cargo test --benches` everything runs once, briefly.

use rustix::time::{ClockId, clock_gettime};
use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const EVENT: usize = 200;
const PIECE: usize = 16 << 10;

/// What is run.
#[derive(Clone, Copy)]
struct Load {
    fast_events: usize,
    streams: usize,
    paced_events: usize,
    round_trips: usize,
}

const BRIEF: Load = Load { fast_events: 1000, streams: 4, paced_events: 2, round_trips: 10 };
const FULL: Load = Load { fast_events: 2_000_000, streams: 200, paced_events: 150, round_trips: 50_000 };

fn event() -> Vec<u8> {
    let (head, tail) = ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"", "\"}}]}\n\n");
    let text = "x".repeat(EVENT - head.len() - tail.len());
    format!("{head}{text}{tail}").into_bytes()
}

/// Ends of events in `bytes`, where the byte before them was `last`.
fn ends(bytes: &[u8], last: &mut u8) -> usize {
    let mut count = 0;
    for byte in bytes {
        count += usize::from(*byte == b'\n' && *last == b'\n');
        *last = *byte;
    }
    count
}

fn cpu(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What one question took: by the wall, of the client's thread, of the whole process (io_uring may work in threads of its
/// own; the server's share is in it).
struct Took {
    wall: Duration,
    thread: Duration,
    process: Duration,
}

/// Runs `work` on a new thread and measures it there.
fn measured(work: impl FnOnce() + Send) -> Took {
    let run = || {
        let (wall, thread, process) =
            (Instant::now(), cpu(ClockId::ThreadCPUTime), cpu(ClockId::ProcessCPUTime));
        work();
        Took {
            wall: wall.elapsed(),
            thread: cpu(ClockId::ThreadCPUTime) - thread,
            process: cpu(ClockId::ProcessCPUTime) - process,
        }
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Writes `events` events, one write for as many as fit into a piece, and closes.
fn serve_fast(events: usize) -> SocketAddr {
    serve(move |mut socket| {
        let many = event().repeat(PIECE / EVENT);
        let mut left = events;
        while left > 0 {
            let now = left.min(PIECE / EVENT);
            socket.write_all(&many[..now * EVENT]).unwrap();
            left -= now;
        }
    })
}

/// Accepts `streams` sockets and writes an event to each, 50 times a second, `events` times.
fn serve_paced(streams: usize, events: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut sockets: Vec<TcpStream> = (0..streams).map(|_| listener.accept().unwrap().0).collect();
        let event = event();
        let tick = Duration::from_millis(20) / streams as u32;
        let mut due = Instant::now();
        for _ in 0..events {
            for socket in &mut sockets {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                due += tick;
                socket.write_all(&event).unwrap();
            }
        }
    });
    address
}

fn serve_echo() -> SocketAddr {
    serve(|mut socket| {
        let mut bytes = [0; 64];
        while socket.read_exact(&mut bytes).is_ok() && socket.write_all(&bytes).is_ok() {}
    })
}

fn serve(work: impl FnOnce(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let socket = listener.accept().unwrap().0;
        socket.set_nodelay(true).unwrap();
        work(socket);
    });
    address
}

/// A runtime and its sockets.
trait Stack {
    const NAME: &'static str;
    fn run(work: impl Future<Output = ()>);
    fn read(address: SocketAddr, events: usize) -> impl Future<Output = ()> + 'static;
    fn echo(address: SocketAddr, times: usize) -> impl Future<Output = ()>;
    fn spawn(work: impl Future<Output = ()> + 'static) -> impl Future<Output = ()>;
}

struct Plain;

impl Stack for Plain {
    const NAME: &'static str = "tokio";

    fn run(work: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, work);
    }

    async fn read(address: SocketAddr, events: usize) {
        use tokio::io::AsyncReadExt;
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut bytes, mut found, mut last) = (vec![0; PIECE], 0, 0);
        while found < events {
            let len = socket.read(&mut bytes).await.unwrap();
            assert!(len > 0, "the server closed after {found} events");
            found += ends(&bytes[..len], &mut last);
        }
    }

    async fn echo(address: SocketAddr, times: usize) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let mut bytes = [7; 64];
        for _ in 0..times {
            socket.write_all(&bytes).await.unwrap();
            socket.read_exact(&mut bytes).await.unwrap();
        }
    }

    async fn spawn(work: impl Future<Output = ()> + 'static) {
        tokio::task::spawn_local(work).await.unwrap();
    }
}

struct Uring;

impl Stack for Uring {
    const NAME: &'static str = "tokio-uring";

    fn run(work: impl Future<Output = ()>) {
        tokio_uring::start(work);
    }

    async fn read(address: SocketAddr, events: usize) {
        let socket = tokio_uring::net::TcpStream::connect(address).await.unwrap();
        let (mut bytes, mut found, mut last) = (vec![0; PIECE], 0, 0);
        while found < events {
            let (len, buffer) = socket.read(bytes).await;
            let len = len.unwrap();
            assert!(len > 0, "the server closed after {found} events");
            bytes = buffer;
            found += ends(&bytes[..len], &mut last);
        }
    }

    async fn echo(address: SocketAddr, times: usize) {
        let socket = tokio_uring::net::TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let mut bytes = vec![7; 64];
        for _ in 0..times {
            let (sent, buffer) = socket.write_all(bytes).await;
            sent.unwrap();
            let (len, buffer) = socket.read(buffer).await;
            // 64 bytes come in one piece on this machine.
            assert_eq!(len.unwrap(), 64);
            bytes = buffer;
        }
    }

    async fn spawn(work: impl Future<Output = ()> + 'static) {
        tokio_uring::spawn(work).await.unwrap();
    }
}

/// As fast as it goes, paced, and round trips.
fn ask<S: Stack>(load: Load) -> [Took; 3] {
    let address = serve_fast(load.fast_events);
    let fast = measured(|| S::run(S::read(address, load.fast_events)));
    let address = serve_paced(load.streams, load.paced_events);
    let paced = measured(|| {
        S::run(async {
            let tasks: Vec<_> =
                (0..load.streams).map(|_| Box::pin(S::spawn(S::read(address, load.paced_events)))).collect();
            all(tasks).await;
        });
    });
    let address = serve_echo();
    let echo = measured(|| S::run(S::echo(address, load.round_trips)));
    [fast, paced, echo]
}

/// Polls all until each is done.
async fn all<F: Future<Output = ()> + Unpin>(mut futures: Vec<F>) {
    use std::pin::Pin;
    use std::task::Poll;
    std::future::poll_fn(|cx| {
        futures.retain_mut(|future| Pin::new(future).poll(cx).is_pending());
        if futures.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

fn report(name: &str, load: Load, [fast, paced, echo]: [Took; 3]) {
    let each = |time: Duration, count: usize| time.as_nanos() as f64 / count as f64;
    let events = load.streams * load.paced_events;
    println!(
        "{name:12} fast: {:6.0} ns/event ({:6.0} of thread, {:6.0} of process)   paced: {:6.0} ns/event of thread, {:6.0} of \
         process   round trip: {:6.2} us ({:5.2} of thread)",
        each(fast.wall, load.fast_events),
        each(fast.thread, load.fast_events),
        each(fast.process, load.fast_events),
        each(paced.thread, events),
        each(paced.process, events),
        each(echo.wall, load.round_trips) / 1e3,
        each(echo.thread, load.round_trips) / 1e3,
    );
}

fn main() {
    let full = std::env::args().any(|argument| argument == "--bench");
    let (load, rounds) = if full { (FULL, 3) } else { (BRIEF, 1) };
    assert_eq!(ends(&event(), &mut 0), 1);
    for _ in 0..rounds {
        report(Plain::NAME, load, ask::<Plain>(load));
        report(Uring::NAME, load, ask::<Uring>(load));
    }
}

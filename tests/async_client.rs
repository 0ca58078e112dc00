//! The client for tokio: many tasks on one session (R1.9, R2.6, R2.9; traps 7, 9, 11, 15, 19).

mod common;

use common::process::ServerProcess;
use common::streams::{ENDLESS, RECORDS, is_pattern, pattern, records_request};
use common::{COUNT, FLOOD, GATE, PANIC, REFUSE, TestServer, eventually, stat};
use doorbell::{
    AsyncAnswer, AsyncClient, CallOptions, ClientConfig, IpcClient, IpcError, MessageType, ServerConfig,
    WaitPolicy,
};
use futures_core::Stream;
use rustix::process::Signal;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering::SeqCst;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

/// Both kinds of runtime.
fn runtimes() -> [Runtime; 2] {
    let single = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let multi = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    [single, multi]
}

/// Runs a test on both kinds of runtime; fails after half a minute.
fn on_both<T: Future<Output = ()>>(test: impl Fn() -> T) {
    for runtime in runtimes() {
        let limit = Duration::from_secs(30);
        runtime.block_on(async { tokio::time::timeout(limit, test()).await.expect("done within 30 s") });
    }
}

fn plain() -> CallOptions {
    CallOptions::default()
}

/// Polls a future once.
fn poll_once<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Lets the other tasks of the runtime run until a condition holds.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed().as_secs() < 30, "waited 30 s for: {what}");
        tokio::task::yield_now().await;
    }
}

async fn check_echo(client: &AsyncClient) {
    assert_eq!(client.call(MessageType::ECHO, b"on").await.unwrap(), b"on");
}

/// Frames of an endless stream, checked; returns where the last one ended.
async fn read_frames(stream: &mut AsyncAnswer, frames: usize, mut at: usize) -> usize {
    for _ in 0..frames {
        let frame = stream.next().await.unwrap().unwrap();
        assert!(is_pattern(&frame, at));
        at += frame.len();
    }
    at
}

/// Goal:   calls of every length come back byte for byte, by every policy; errors are typed.
#[test]
fn r1_1_r3_1_calls_of_tasks_are_answered() {
    for policy in [WaitPolicy::Block, WaitPolicy::Handoff, WaitPolicy::Spin] {
        let server = TestServer::start(policy);
        on_both(async || {
            let config = ClientConfig { policy, ..ClientConfig::for_tasks() };
            let client = AsyncClient::connect_with(server.path(), &config).await.unwrap();
            for len in [0, 1, 1024, 1025, 4096, 16384, 16385, 300_000] {
                let request: Vec<u8> = (0..len).map(pattern).collect();
                assert!(client.call(MessageType::ECHO, &request).await.unwrap() == request, "{len}");
            }
            assert!(matches!(client.call(PANIC, b"").await, Err(IpcError::HandlerPanic)));
            let refused = client.call(REFUSE, b"123").await;
            assert!(matches!(&refused, Err(IpcError::Decode(why)) if why == "3 bytes make no sense"));
            let unknown = client.call(MessageType(99), b"").await;
            assert!(matches!(unknown, Err(IpcError::UnknownMessageType(MessageType(99)))));
            let long = client.call(MessageType::ECHO, &vec![0; 10_485_761]).await;
            assert!(matches!(long, Err(IpcError::MessageTooLarge(10_485_760))));
            assert_eq!(client.call(FLOOD, b"").await.unwrap().len(), 2 << 20);
        });
    }
    runtimes()[0].block_on(async {
        let nobody = AsyncClient::connect("/nonexistent/doorbell.sock").await;
        assert!(matches!(nobody, Err(IpcError::NotRunning { .. })));
    });
}

/// Goal:   R1.9, trap 15, trap 7: a thousand calls at once on one client, from tasks of several threads: whoever finds
///         no room waits, each answer meets its own call.
/// Method: 1000 tasks with bodies of their own, on a session of four slots, one of 64, one of 1000.
#[test]
fn r1_9_trap15_a_thousand_concurrent_calls_are_answered_each_its_own() {
    let server = TestServer::start(WaitPolicy::Handoff);
    let configs = [ClientConfig::smallest(), ClientConfig::for_tasks(), ClientConfig::for_load(1000, 1024)];
    on_both(async || {
        for config in &configs {
            let client = AsyncClient::connect_with(server.path(), config).await.unwrap();
            let mut tasks = JoinSet::new();
            for i in 0..1000u32 {
                let client = client.clone();
                tasks.spawn(async move {
                    // A few of them in frames.
                    let len = if i.is_multiple_of(50) { 5000 } else { 200 + i as usize % 700 };
                    let request: Vec<u8> = i.to_le_bytes().into_iter().cycle().take(len).collect();
                    let answer = client.call(MessageType::ECHO, &request).await.unwrap();
                    assert!(answer == request, "call {i}");
                });
            }
            let mut answered = 0;
            while let Some(done) = tasks.join_next().await {
                done.unwrap();
                answered += 1;
            }
            assert_eq!(answered, 1000);
        }
    });
}

/// Goal:   calls start in the order in which they were first polled, waiting for room included.
/// Method: a held reactor; 20 calls on four slots, polled in order; their counts.
#[test]
fn r1_9_calls_start_in_the_order_in_which_they_were_polled() {
    let server = TestServer::start(WaitPolicy::Block);
    on_both(async || {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        let before = server.entered();
        let mut gate = pin!(client.call(GATE, b""));
        assert!(poll_once(gate.as_mut()).is_pending());
        until("the gate holds the reactor", || server.entered() > before).await;
        let mut calls: Vec<_> = (0..20).map(|_| Box::pin(client.call(COUNT, b""))).collect();
        for call in &mut calls {
            assert!(poll_once(call.as_mut()).is_pending());
        }
        server.open_gate();
        let number = |answer: Vec<u8>| u64::from_le_bytes(answer.try_into().unwrap());
        let mut last = number(gate.await.unwrap());
        for call in calls {
            let count = number(call.await.unwrap());
            assert_eq!(count, last + 1);
            last = count;
        }
    });
}

/// Goal:   R1.9: a stream comes whole and in order, its end once; as a `Stream`, too.
#[test]
fn r1_9_streams_come_whole_and_end_once() {
    let server = TestServer::start(WaitPolicy::Handoff);
    on_both(async || {
        let client = AsyncClient::connect(server.path()).await.unwrap();
        for len in [0, 1, 1024, 1025, 16384, 16385, 300_000] {
            let request: Vec<u8> = (0..len).map(pattern).collect();
            let mut stream = client.stream(MessageType::ECHO, &request, &plain()).await.unwrap();
            let mut at = 0;
            while let Some(frame) = poll_fn(|cx| Pin::new(&mut stream).poll_next(cx)).await {
                let frame = frame.unwrap();
                assert!(!frame.is_empty() && is_pattern(&frame, at));
                at += frame.len();
            }
            assert_eq!(at, len);
            assert!(stream.next().await.is_none(), "one end");
        }
        let mut failed = client.stream(PANIC, b"", &plain()).await.unwrap();
        assert!(matches!(failed.next().await, Some(Err(IpcError::HandlerPanic))));
        assert!(failed.next().await.is_none(), "one end");
        let mut records =
            client.stream(RECORDS, &records_request(50, 3000, true), &plain()).await.unwrap().records();
        for _ in 0..50 {
            assert!(is_pattern(&records.next().await.unwrap().unwrap(), 0));
        }
        assert!(matches!(records.next().await, Some(Err(IpcError::Records(_)))), "torn");
        assert!(records.next().await.is_none(), "one end");
    });
}

/// Goal:   R1.9: a consumer that does not take its frames stops its own stream: no more come, and everybody else goes
///         on.
/// Method: streams nobody reads, as many as half the slots; calls and another stream beside them; then what was not
///         read, in order. The server's streams have stood still: they have sent no more than their windows.
#[test]
fn r1_9_a_slow_consumer_stalls_its_own_stream_alone() {
    let server = TestServer::start(WaitPolicy::Handoff);
    on_both(async || {
        let client = AsyncClient::connect(server.path()).await.unwrap();
        let mut slow = Vec::new();
        for _ in 0..16 {
            slow.push(client.stream(ENDLESS, b"", &plain()).await.unwrap());
        }
        for i in 0..300u32 {
            let request = i.to_le_bytes();
            assert_eq!(client.call(MessageType::ECHO, &request).await.unwrap(), request);
        }
        let mut quick = client.stream(ENDLESS, b"", &plain()).await.unwrap();
        read_frames(&mut quick, 100, 0).await;
        for stream in &mut slow {
            read_frames(stream, 5, 0).await;
        }
        drop((slow, quick));
        until("the server's streams end", || server.state.streams.load(SeqCst) == 0).await;
    });
}

/// Goal:   R2.6, trap 19: a future or stream that is dropped cancels its call, at every moment, and meets no other
///         call.
/// Method: dropped before the first poll, while it waits for room, after it was sent and not started, while its handler
///         runs, once its answer has come, and, streams, at once, in mid-stream and after the end; calls behind it are
///         counted.
#[test]
fn r2_6_trap19_drop_is_cancel_at_every_moment() {
    let server = TestServer::start(WaitPolicy::Block);
    on_both(async || {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        drop(client.call(COUNT, b""));
        let (entered, counted) = (server.entered(), server.state.counted.load(SeqCst));
        let mut gate = Box::pin(client.call(GATE, b""));
        assert!(poll_once(gate.as_mut()).is_pending());
        until("the gate holds the reactor", || server.entered() > entered).await;
        // Three are sent, one waits for room, one for its turn.
        let mut dropped: Vec<_> = (0..5).map(|_| Box::pin(client.call(COUNT, b""))).collect();
        for call in &mut dropped {
            assert!(poll_once(call.as_mut()).is_pending());
        }
        // The one that waits for room first, then those behind and before it.
        for which in [3, 3, 1, 0, 0] {
            drop(dropped.remove(which));
        }
        // Its handler runs.
        drop(gate);
        let behind = client.clone();
        let behind = tokio::spawn(async move { behind.call(MessageType::ECHO, b"behind").await });
        tokio::task::yield_now().await;
        server.open_gate();
        assert_eq!(behind.await.unwrap().unwrap(), b"behind");
        assert_eq!(server.state.counted.load(SeqCst), counted + 1, "nothing but the gate ran");

        // The answer is there, and nobody takes it.
        let mut answered = Box::pin(client.call(COUNT, b""));
        assert!(poll_once(answered.as_mut()).is_pending());
        until("it has run", || server.state.counted.load(SeqCst) == counted + 2).await;
        check_echo(&client).await;
        drop(answered);
        check_echo(&client).await;

        for frames in [0, 1, 2, 9] {
            let mut stream = client.stream(ENDLESS, b"", &plain()).await.unwrap();
            read_frames(&mut stream, frames, 0).await;
            drop(stream);
            check_echo(&client).await;
            until("the server's stream ends", || server.state.streams.load(SeqCst) == 0).await;
        }
        let mut ended = client.stream(MessageType::ECHO, b"all", &plain()).await.unwrap();
        while ended.next().await.is_some() {}
        drop(ended);
        // It has ended, and that has not been taken.
        let unread = client.stream(COUNT, b"", &plain()).await.unwrap();
        until("it has run", || server.state.counted.load(SeqCst) == counted + 3).await;
        check_echo(&client).await;
        drop(unread);
        check_echo(&client).await;
    });
}

/// Goal:   R2.6, trap 15: cancels racing with answers lose nothing and mix nothing up.
/// Method: 4000 calls from eight tasks, each dropped after a number of polls that changes, among calls that are
///         checked.
#[test]
fn r2_6_trap15_cancels_racing_with_answers_mix_nothing_up() {
    let server = TestServer::start(WaitPolicy::Handoff);
    on_both(async || {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        let mut tasks = JoinSet::new();
        for task in 0..8u32 {
            let client = client.clone();
            tasks.spawn(async move {
                for i in 0..500u32 {
                    let request = [task.to_le_bytes(), i.to_le_bytes()].concat();
                    let mut call = Box::pin(client.call(MessageType::ECHO, &request));
                    let mut polls = i % 4;
                    let answer = poll_fn(|cx| match call.as_mut().poll(cx) {
                        Poll::Ready(answer) => Poll::Ready(Some(answer)),
                        Poll::Pending if polls == 0 => Poll::Ready(None),
                        Poll::Pending => {
                            polls -= 1;
                            cx.waker().wake_by_ref();
                            Poll::Pending
                        }
                    });
                    if let Some(answer) = answer.await {
                        assert_eq!(answer.unwrap(), request);
                    }
                    drop(call);
                    assert_eq!(client.call(MessageType::ECHO, &request).await.unwrap(), request);
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
}

/// Goal:   R2.9: time-outs end a call wherever it is, deadlines keep it from being run.
#[test]
fn r2_9_time_outs_and_deadlines_end_calls() {
    let server = TestServer::start(WaitPolicy::Block);
    on_both(async || {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        let (entered, counted) = (server.entered(), server.state.counted.load(SeqCst));
        let soon = CallOptions { timeout: Some(Duration::from_millis(20)), ..plain() };
        let gone = client.call_with(GATE, b"", &soon).await;
        assert!(matches!(gone, Err(IpcError::Timeout)));
        until("the gate holds the reactor", || server.entered() > entered).await;
        let late = CallOptions { deadline: Some(Duration::from_millis(1)), ..plain() };
        let mut late = pin!(client.call_with(COUNT, b"", &late));
        assert!(poll_once(late.as_mut()).is_pending());
        // All slots are in use: the wait for room is bounded, too.
        let mut more: Vec<_> = (0..3).map(|_| Box::pin(client.call(COUNT, b""))).collect();
        for call in &mut more {
            assert!(poll_once(call.as_mut()).is_pending());
        }
        assert!(matches!(client.call_with(COUNT, b"", &soon).await, Err(IpcError::Timeout)));
        assert!(matches!(client.stream(ENDLESS, b"", &soon).await, Err(IpcError::Timeout)));
        let overdue = CallOptions { deadline: Some(Duration::from_millis(20)), ..plain() };
        let unsent = client.call_with(COUNT, b"", &overdue).await;
        assert!(matches!(unsent, Err(IpcError::DeadlineExceeded)), "{unsent:?}");
        drop(more);
        server.open_gate();
        assert!(matches!(late.await, Err(IpcError::DeadlineExceeded)));
        check_echo(&client).await;
        assert_eq!(server.state.counted.load(SeqCst), counted + 1, "nothing but the gate ran");
    });
}

/// Goal:   trap 9, R3.1: a server that is killed ends everything with a typed error: calls in flight, calls that wait
///         for room, streams, and what is begun later; nothing hangs.
/// Method: a stopped server, calls beyond the slots and a stream in mid-flow; then SIGKILL.
#[test]
fn trap9_f50_a_killed_server_ends_every_call_and_stream() {
    on_both(async || {
        let server = ServerProcess::start(&[]);
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        let request = vec![7; 1 << 20];
        let mut stream = client.stream(MessageType::ECHO, &request, &plain()).await.unwrap();
        assert!(stream.next().await.unwrap().is_ok());
        server.process.stop();
        let mut tasks = JoinSet::new();
        for _ in 0..20 {
            let client = client.clone();
            tasks.spawn(async move { client.call(MessageType::ECHO, b"lost").await });
        }
        tokio::task::yield_now().await;
        server.process.signal(Signal::KILL);
        while let Some(done) = tasks.join_next().await {
            let lost = done.unwrap().unwrap_err();
            assert!(matches!(lost, IpcError::NotExecuted | IpcError::ConnectionLost), "{lost}");
        }
        let mut last = None;
        while let Some(frame) = stream.next().await {
            assert!(last.is_none(), "the error is the end");
            last = frame.err();
        }
        assert!(matches!(last, Some(IpcError::ConnectionLost)), "{last:?}");
        assert!(matches!(client.call(MessageType::ECHO, b"").await, Err(IpcError::NotExecuted)));
        assert!(client.stream(MessageType::ECHO, b"", &plain()).await.is_err());
    });
}

/// Goal:   R3.7: a server that stops says why to a client that sleeps.
#[test]
fn r3_7_a_server_that_stops_tells_the_tasks_that_wait() {
    for runtime in runtimes() {
        // What is under way would be finished first, and this stream has no end of its own.
        let config = ServerConfig { drain_timeout: Duration::ZERO, ..ServerConfig::default() };
        let server = TestServer::start_with(config);
        let client = runtime.block_on(AsyncClient::connect(server.path())).unwrap();
        let mut stream = runtime.block_on(client.stream(ENDLESS, b"", &plain())).unwrap();
        runtime.block_on(read_frames(&mut stream, 1, 0));
        let stopped = std::thread::spawn(move || server.stop());
        runtime.block_on(async {
            let mut last = None;
            while let Some(frame) = stream.next().await {
                last = frame.err();
            }
            assert!(matches!(last, Some(IpcError::ConnectionLost)), "{last:?}");
            assert!(matches!(client.call(MessageType::ECHO, b"").await, Err(IpcError::Disconnected(_))));
        });
        stopped.join().unwrap();
    }
}

/// Goal:   a client ends with its last clone and stream, and not before; what is left when its runtime ends is told so.
#[test]
fn r3_3_a_client_ends_with_its_last_user_or_its_runtime() {
    let server = TestServer::start(WaitPolicy::Block);
    let watcher = common::client(server.path(), WaitPolicy::Block);
    let watched = watcher.open().unwrap();
    on_both(async || {
        let client = AsyncClient::connect(server.path()).await.unwrap();
        assert_eq!(stat(&watched, "connections_open"), 2);
        let mut stream = client.clone().stream(ENDLESS, b"", &plain()).await.unwrap();
        drop(client);
        read_frames(&mut stream, 10, 0).await;
        drop(stream);
        until("the session ends", || stat(&watched, "connections_open") == 1).await;
    });
    for runtime in runtimes() {
        let client = runtime.block_on(AsyncClient::connect(server.path())).unwrap();
        let mut stream = runtime.block_on(client.stream(ENDLESS, b"", &plain())).unwrap();
        runtime.shutdown_timeout(Duration::from_secs(10));
        let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        other.block_on(async {
            assert!(matches!(client.call(COUNT, b"").await, Err(IpcError::ClientClosed)));
            let mut last = None;
            while let Some(frame) = stream.next().await {
                last = frame.err();
            }
            assert!(matches!(last, Some(IpcError::ClientClosed)), "{last:?}");
        });
        drop((client, stream));
        eventually("the session ends", || stat(&watched, "connections_open") == 1);
    }
}

/// Goal:   trap 11: a client that waits costs no time, whatever it waits for.
/// Method: on a runtime of one thread, half a second of nothing: with nothing under way; with a stream that nobody
///         reads; with calls that wait for an answer, for room and for their turn, of a server that is stopped.
#[test]
fn trap11_a_client_that_waits_costs_no_time() {
    let used = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        text.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let rest = async |what: &str| {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let before = used();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(used() - before < 5_000_000, "{} ns of waiting with {what}", used() - before);
    };
    let server = ServerProcess::start(&[]);
    let [runtime, _] = runtimes();
    runtime.block_on(async {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::smallest()).await.unwrap();
        check_echo(&client).await;
        rest("nothing under way").await;
        let mut stream = client.stream(MessageType::ECHO, &[1; 100_000], &plain()).await.unwrap();
        assert!(stream.next().await.unwrap().is_ok());
        rest("a stream that nobody reads").await;
        server.process.stop();
        let mut calls = JoinSet::new();
        for _ in 0..10 {
            let client = client.clone();
            calls.spawn(async move { client.call(MessageType::ECHO, b"on").await.unwrap() });
        }
        rest("calls that wait for room").await;
        server.process.signal(Signal::CONT);
        drop(stream);
        while let Some(answer) = calls.join_next().await {
            assert_eq!(answer.unwrap(), b"on");
        }
    });
}

/// Goal:   a request that waits for memory that does not come begins without it, though nobody rings.
/// Method: a server with no memory to lease beside what a blocking client holds.
#[test]
fn r1_9_a_long_call_that_gets_no_memory_goes_on_without() {
    let server = TestServer::start(WaitPolicy::Block);
    let greedy = |pages| ClientConfig { medium_slots: pages, lease_pages: 0, ..ClientConfig::default() };
    on_both(async || {
        let client = AsyncClient::connect_with(server.path(), &ClientConfig::default()).await.unwrap();
        let (mut held, mut pages) = (Vec::new(), 256);
        while pages > 0 {
            match IpcClient::connect_with(server.path(), &greedy(pages)) {
                Ok(client) => held.push(client),
                Err(IpcError::NoMemory { .. }) => pages /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        let request: Vec<u8> = (0..100_000).map(pattern).collect();
        assert!(client.call(MessageType::ECHO, &request).await.unwrap() == request);
    });
}

/// Goal:   R5.3: a session for many tasks exists with as much memory as its documentation says.
#[test]
fn r5_3_a_session_for_tasks_has_as_much_memory_as_documented() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = IpcClient::connect_with(server.path(), &ClientConfig::for_tasks()).unwrap();
    assert_eq!(client.shared_bytes().unwrap(), 92 << 10);
}

/// Goal:   R1.9, trap 15: a thousand streams at once on one session, each in order and with its own bytes; dropping
///         them ends all of them at the server.
/// Method: 1000 endless streams, begun before any is read; frames of each in turn.
#[test]
fn r1_9_trap15_a_thousand_streams_at_once_stay_apart() {
    let server = TestServer::start_with(ServerConfig { memory_budget: 8 << 20, ..ServerConfig::default() });
    on_both(async || {
        let slots =
            ClientConfig { ring_entries: 1024, small_slots: 2048, lease_pages: 0, ..ClientConfig::default() };
        let client = AsyncClient::connect_with(server.path(), &slots).await.unwrap();
        let mut streams = Vec::new();
        for _ in 0..1000 {
            streams.push((client.stream(ENDLESS, b"", &plain()).await.unwrap(), 0));
        }
        for round in 0..3 {
            for (stream, at) in &mut streams {
                *at = read_frames(stream, 1, *at).await;
            }
            assert_eq!(server.state.streams.load(SeqCst), 1000, "round {round}");
        }
        check_echo(&client).await;
        drop(streams);
        until("the server's streams end", || server.state.streams.load(SeqCst) == 0).await;
        check_echo(&client).await;
    });
}

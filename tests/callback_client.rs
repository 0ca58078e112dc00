//! The client of threads that must not be held up (R1.9, R2.6, R2.9; traps 9, 15, 19).

mod common;

use common::process::ServerProcess;
use common::streams::{CORE, ENDLESS, is_pattern, pattern};
use common::{COUNT, GATE, PANIC, REFUSE, TestServer, eventually};
use doorbell::{
    CallHandle, CallOptions, CallbackClient, CallbackConfig, ClientConfig, IpcError, MessageType, Result,
    ServerConfig, StreamEvent, WaitPolicy,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

/// Called back on the client's thread, and when polled; on few slots.
fn both() -> [CallbackConfig; 2] {
    let threaded =
        CallbackConfig { client: ClientConfig::smallest(), pending_max: 100, ..CallbackConfig::default() };
    [threaded.clone(), CallbackConfig { polled: true, ..threaded }]
}

fn connect(path: &Path, config: &CallbackConfig) -> CallbackClient {
    CallbackClient::connect_with(path, config).unwrap()
}

/// The next thing that callbacks have told.
fn next<T>(client: &CallbackClient, told: &Receiver<T>) -> T {
    let begun = Instant::now();
    loop {
        client.poll_events(1);
        match told.recv_timeout(Duration::from_millis(1)) {
            Ok(next) => return next,
            Err(_) => assert!(begun.elapsed() < LIMIT, "no callback within 30 s"),
        }
    }
}

/// A call whose answer is told.
fn call(
    client: &CallbackClient,
    message: MessageType,
    body: &[u8],
) -> (CallHandle, Receiver<Result<Vec<u8>>>) {
    let (tell, told) = channel();
    (client.call(message, body.to_vec(), move |answer| tell.send(answer).unwrap()).unwrap(), told)
}

/// A stream whose events are told.
fn stream(client: &CallbackClient, message: MessageType, body: &[u8]) -> (CallHandle, Receiver<StreamEvent>) {
    let (tell, told) = channel();
    // Nobody may listen any more.
    let on_event = move |event| drop(tell.send(event));
    (client.stream(message, body.to_vec(), on_event).unwrap(), told)
}

fn check_echo(client: &CallbackClient) {
    let (_handle, told) = call(client, MessageType::ECHO, b"on");
    assert_eq!(next(client, &told).unwrap(), b"on");
}

fn hold(server: &TestServer, client: &CallbackClient) -> (CallHandle, Receiver<Result<Vec<u8>>>) {
    let before = server.entered();
    let held = call(client, GATE, b"");
    eventually("the gate holds the reactor", || server.entered() > before);
    held
}

/// Goal:   calls of every length are called back with what they asked for, errors typed; streams whole, their end once.
#[test]
fn r1_1_r3_1_calls_and_streams_are_called_back() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Handoff);
        let client = connect(server.path(), &config);
        for len in [0, 1, 1024, 1025, 16384, 16385, 300_000] {
            let request: Vec<u8> = (0..len).map(pattern).collect();
            let (_handle, told) = call(&client, MessageType::ECHO, &request);
            assert!(next(&client, &told).unwrap() == request);
            let (_handle, told) = stream(&client, MessageType::ECHO, &request);
            let mut at = 0;
            loop {
                match next(&client, &told) {
                    StreamEvent::Frame(frame) => {
                        assert!(is_pattern(&frame, at) && !frame.is_empty());
                        at += frame.len();
                    }
                    StreamEvent::End(result) => break result.unwrap(),
                }
            }
            assert_eq!(at, len);
            assert!(told.recv().is_err(), "nothing follows the end");
        }
        let (_handle, told) = call(&client, PANIC, b"");
        assert!(matches!(next(&client, &told), Err(IpcError::HandlerPanic)));
        let (_handle, told) = stream(&client, REFUSE, b"123");
        assert!(matches!(next(&client, &told), StreamEvent::End(Err(IpcError::Decode(_)))));
        eventually("nothing is pending", || client.pending() == 0);
    }
}

/// Goal:   R1.9: submission never blocks: beyond the limit it is `WouldBlock`, what was taken is answered, each its own
///         (trap 15), in order.
/// Method: a held reactor, calls until none is taken; then the gate opens.
#[test]
fn r1_9_trap15_a_full_queue_would_block_and_loses_nothing() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        let client = connect(server.path(), &config);
        let (_gate, gated) = hold(&server, &client);
        let (tell, told) = channel();
        let mut handles = Vec::new();
        loop {
            let (tell, i) = (tell.clone(), handles.len() as u32);
            let body = i.to_le_bytes().to_vec();
            let answered = move |answer: Result<Vec<u8>>| tell.send((i, answer.unwrap())).unwrap();
            match client.call(MessageType::ECHO, body, answered) {
                Ok(handle) => handles.push(handle),
                Err(IpcError::WouldBlock) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((handles.len(), client.pending()), (99, 100));
        assert!(matches!(client.stream(ENDLESS, Vec::new(), |_| ()), Err(IpcError::WouldBlock)));
        server.open_gate();
        next(&client, &gated).unwrap();
        for i in 0..99u32 {
            assert_eq!(next(&client, &told), (i, i.to_le_bytes().to_vec()));
        }
        eventually("nothing is pending", || client.pending() == 0);
        check_echo(&client);
    }
}

/// Goal:   R2.6, trap 19: a dropped or cancelled handle ends its call, whenever that happens; each is called back
///         exactly once.
/// Method: while it waits in the queue, once sent, while its handler runs, once answered, twice; streams at once, in
///         mid-stream, after the end. What was cancelled in time does not run.
#[test]
fn r2_6_trap19_a_cancel_at_every_moment_is_called_back_once() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        let client = connect(server.path(), &config);
        let (gate, gated) = hold(&server, &client);
        // Three are sent, the others wait for room.
        let mut calls: Vec<_> = (0..8).map(|_| call(&client, COUNT, b"")).collect();
        for (handle, told) in calls.drain(..) {
            handle.cancel();
            drop(handle);
            assert!(matches!(next(&client, &told), Err(IpcError::Cancelled)));
            assert!(told.recv().is_err(), "called back once");
        }
        drop(gate);
        assert!(matches!(next(&client, &gated), Err(IpcError::Cancelled)));
        server.open_gate();
        check_echo(&client);
        assert_eq!(server.state.counted.load(SeqCst), 1, "nothing but the gate ran");
        let (handle, told) = call(&client, COUNT, b"");
        next(&client, &told).unwrap();
        handle.cancel();
        drop(handle);
        assert!(told.recv().is_err(), "called back once");
        let (handle, told) = call(&client, COUNT, b"");
        handle.detach();
        next(&client, &told).unwrap();

        for frames in [0, 1, 2, 9] {
            let (handle, told) = stream(&client, ENDLESS, b"");
            let mut at = 0;
            for _ in 0..frames {
                let StreamEvent::Frame(frame) = next(&client, &told) else { panic!("no frame") };
                assert!(is_pattern(&frame, at));
                at += frame.len();
            }
            drop(handle);
            let end = loop {
                match next(&client, &told) {
                    // Told before the handle was dropped.
                    StreamEvent::Frame(_) => {}
                    StreamEvent::End(result) => break result,
                }
            };
            assert!(matches!(end, Err(IpcError::Cancelled)), "{end:?}");
            assert!(told.recv().is_err(), "nothing follows the end");
            eventually("the server's stream ends", || server.state.streams.load(SeqCst) == 0);
            check_echo(&client);
        }
        eventually("nothing is pending", || client.pending() == 0);
    }
}

/// Goal:   R1.9: a caller who does not poll stops its streams, and the calls of nobody else; no memory grows.
/// Method: a polled client whose stream is left alone: the server's part of it stands still. Beside it a call, whose
///         callback comes when its turn does.
#[test]
fn r1_9_a_caller_who_does_not_poll_stops_its_stream() {
    let server = TestServer::start(WaitPolicy::Block);
    let [_, config] = both();
    let client = connect(server.path(), &config);
    let watcher = common::client(server.path(), WaitPolicy::Block);
    let watched = watcher.open().unwrap();
    let (_handle, told) = stream(&client, ENDLESS, b"");
    eventually("the stream has begun", || server.state.streams.load(SeqCst) == 1);
    let (_second, answered) = call(&client, COUNT, b"");
    eventually("the call has run", || server.state.counted.load(SeqCst) == 1);
    let mut before = (0, 0);
    eventually("the stream stands still", || {
        let answer = watched.call(MessageType::STATS, b"").unwrap();
        let counters: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        let now = (counters["bytes_out"].as_u64().unwrap(), answer.len() as u64);
        // Nothing but the answer to the question before.
        let still = now.0 - before.0 == before.1;
        before = now;
        still
    });
    let mut at = 0;
    while at < 100_000 {
        let StreamEvent::Frame(frame) = next(&client, &told) else { panic!("no frame") };
        assert!(is_pattern(&frame, at));
        at += frame.len();
    }
    next(&client, &answered).unwrap();
}

/// Goal:   a polled client's descriptor is readable exactly while there are events; callbacks run on the thread that
///         polls, and only there; a callback that polls runs nothing.
#[test]
fn r1_9_a_polled_client_is_readable_while_there_are_events() {
    let server = TestServer::start(WaitPolicy::Handoff);
    let [_, config] = both();
    let client = std::sync::Arc::new(connect(server.path(), &config));
    let readable = |limit| {
        let limit = Timespec { tv_sec: limit, tv_nsec: 0 };
        poll(&mut [PollFd::new(&*client, PollFlags::IN)], Some(&limit)).unwrap() == 1
    };
    assert!(!readable(0));
    let here = std::thread::current().id();
    let (tell, told) = channel();
    let mut handles = Vec::new();
    for i in 0..5 {
        let (tell, client_too) = (tell.clone(), std::sync::Arc::clone(&client));
        let answered = move |answer: Result<Vec<u8>>| {
            answer.unwrap();
            assert_eq!((std::thread::current().id(), client_too.poll_events(9)), (here, 0));
            tell.send(i).unwrap();
        };
        handles.push(client.call(MessageType::PING, Vec::new(), answered).unwrap());
    }
    let mut done = 0;
    while done < 5 {
        assert!(readable(30) && told.try_recv().is_err());
        let ran = client.poll_events(1);
        assert!(told.try_iter().eq(done..done + ran));
        done += ran;
    }
    client.poll_events(1);
    assert!(!readable(0));
    assert_eq!(client.panics(), 0);
}

/// Goal:   a callback that panics is contained, counted, and its stream cancelled; everything else goes on.
#[test]
fn r3_2_a_callback_that_panics_is_contained() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        let client = connect(server.path(), &config);
        let panics = |_: Result<Vec<u8>>| panic!("a callback that panics on purpose");
        let _first = client.call(MessageType::PING, Vec::new(), panics).unwrap();
        let _second =
            client.stream(ENDLESS, Vec::new(), |_| panic!("a callback that panics on purpose")).unwrap();
        eventually("both have panicked", || {
            client.poll_events(1);
            client.panics() == 2 && client.pending() == 0
        });
        eventually("the server's stream ends", || server.state.streams.load(SeqCst) == 0);
        check_echo(&client);
    }
}

/// Goal:   R2.9: a call, sent or not, and a stream that does not go on, time out.
#[test]
fn r2_9_calls_and_streams_time_out() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        let client = connect(server.path(), &config);
        let (_gate, _gated) = hold(&server, &client);
        let options = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
        let (tell, told) = channel();
        let mut handles = Vec::new();
        for _ in 0..6 {
            let tell = tell.clone();
            let answered = move |answer| tell.send(answer).unwrap();
            handles.push(client.call_with(COUNT, Vec::new(), &options, answered).unwrap());
        }
        for _ in 0..6 {
            assert!(matches!(next(&client, &told), Err(IpcError::Timeout)));
        }
        let (tell, told) = channel();
        let on_event = move |event| tell.send(event).unwrap();
        let _stream = client.stream_with(ENDLESS, Vec::new(), &options, on_event).unwrap();
        assert!(matches!(next(&client, &told), StreamEvent::End(Err(IpcError::Timeout))));
        server.open_gate();
        check_echo(&client);
        assert_eq!(server.state.counted.load(SeqCst), 1, "nothing but the gate ran");
    }
}

/// Goal:   R2.9: a call that finds no slot until its deadline ends with it; one that waits at the server is not begun after it.
/// Method: a gate holds the reactor; more calls than slots. Some end while it does, the others once it has opened.
#[test]
fn r2_9_a_deadline_holds_for_calls_that_wait_on_either_side() {
    const CALLS: usize = 6;
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        let client = connect(server.path(), &config);
        let (_gate, gated) = hold(&server, &client);
        let options = CallOptions { deadline: Some(Duration::from_millis(20)), ..CallOptions::default() };
        let (tell, told) = channel();
        let begin = |_| {
            let tell = tell.clone();
            client.call_with(COUNT, Vec::new(), &options, move |answer| tell.send(answer).unwrap()).unwrap()
        };
        let _handles: Vec<_> = (0..CALLS).map(begin).collect();
        // As many as there are slots beside that of the gate's call have been sent.
        let sent = config.client.small_slots as usize - 1;
        for number in 0..CALLS {
            if number == CALLS - sent {
                server.open_gate();
            }
            let end = next(&client, &told);
            assert!(matches!(end, Err(IpcError::DeadlineExceeded)), "{number}: {end:?}");
        }
        next(&client, &gated).unwrap();
        assert_eq!(server.state.counted.load(SeqCst), 1, "nothing but the gate ran");
    }
}

/// Goal:   trap 9, R3.1: a server that is killed ends every call and stream with a typed error, once; later calls are
///         refused.
#[test]
fn trap9_f50_a_killed_server_ends_every_call_and_stream() {
    for config in both() {
        let server = ServerProcess::start(&[]);
        let client = connect(server.path(), &config);
        let (_handle, streamed) = stream(&client, MessageType::ECHO, &vec![7; 1 << 20]);
        assert!(matches!(next(&client, &streamed), StreamEvent::Frame(_)));
        server.process.stop();
        let calls: Vec<_> = (0..20).map(|_| call(&client, MessageType::ECHO, b"lost")).collect();
        server.process.signal(Signal::KILL);
        for (_handle, told) in &calls {
            let lost = next(&client, told).unwrap_err();
            assert!(matches!(lost, IpcError::NotExecuted | IpcError::ConnectionLost), "{lost}");
            assert!(told.recv().is_err(), "called back once");
        }
        let end = loop {
            if let StreamEvent::End(end) = next(&client, &streamed) {
                break end;
            }
        };
        assert!(matches!(end, Err(IpcError::ConnectionLost)), "{end:?}");
        // The thread may be about to find out.
        eventually("later calls are refused", || {
            client.poll_events(9);
            matches!(client.call(MessageType::PING, Vec::new(), |_| ()), Err(IpcError::NotExecuted))
        });
    }
}

/// Goal:   a client that is closed or dropped calls everything back with that, ends its thread and its session; one
///         that cannot connect answers so.
#[test]
fn r3_3_a_client_that_is_closed_calls_everything_back() {
    for config in both() {
        let server = TestServer::start(WaitPolicy::Block);
        for closes in [true, false] {
            let client = connect(server.path(), &config);
            let (_gate, gated) = hold(&server, &client);
            let waiting: Vec<_> = (0..6).map(|_| call(&client, COUNT, b"")).collect();
            if closes {
                client.close()
            } else {
                drop(client)
            }
            for (_handle, told) in waiting.iter().chain([&(_gate, gated)]) {
                let answer = told.recv_timeout(LIMIT).unwrap();
                assert!(matches!(answer, Err(IpcError::ClientClosed)), "{answer:?}");
                assert!(told.recv().is_err(), "called back once");
            }
            server.open_gate();
        }
        let nobody = Path::new("/nonexistent/doorbell.sock");
        let refused = CallbackClient::connect_with(nobody, &config);
        assert!(matches!(refused, Err(IpcError::NotRunning { .. })));
        let client = CallbackClient::begin(nobody, &config).unwrap();
        match client.call(MessageType::PING, Vec::new(), |_| ()) {
            Err(error) => assert!(matches!(error, IpcError::NotRunning { .. })),
            Ok(handle) => handle.detach(),
        }
        eventually("it is known", || {
            client.poll_events(9);
            matches!(client.call(MessageType::PING, Vec::new(), |_| ()), Err(IpcError::NotRunning { .. }))
        });
    }
}

/// Goal:   no work of the server's is done on the caller's core, whichever that is (DESIGN §4).
/// Method: a reactor on every core, a handler that says where it runs, a caller pinned to each core in turn.
#[test]
fn p6_the_server_never_works_on_the_callers_core() {
    let config = ServerConfig { policy: WaitPolicy::Handoff, ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let cores: Vec<usize> = {
        let set = rustix::thread::sched_getaffinity(None).unwrap();
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
    };
    if cores.len() < 2 {
        return;
    }
    let client = CallbackClient::connect(server.path()).unwrap();
    for core in cores.into_iter().cycle().take(10) {
        let mut only = rustix::thread::CpuSet::new();
        only.set(core);
        rustix::thread::sched_setaffinity(None, &only).unwrap();
        for _ in 0..20 {
            let (_handle, told) = call(&client, CORE, b"");
            let ran_on = u32::from_le_bytes(told.recv_timeout(LIMIT).unwrap().unwrap().try_into().unwrap());
            assert_ne!(ran_on as usize, core);
        }
    }
}

//! Clients that come back to a server which was killed: R3.4, FAULTS §5 and its invariants I3 to I5, F48, F50, F51,
//! traps 9, 15 and 25. Servers are processes that are really killed and started again on the same path.

mod common;

use common::executed::{self, CODEC, HANG, LOG, LogServer, NUMBERS, TRACED, log_answer, log_request};
use common::process::{returns, role};
use common::raw::listen;
use common::{COUNT, GATE, TestServer, eventually, stat, streams};
use doorbell::protocol::handshake::{DisconnectReason, Goodbye, Scope, Welcome, code};
use doorbell::{
    CallOptions, ClientConfig, IpcClient, IpcError, LinkStatus, PendingOutcome, Reconnect,
    ReconnectingClient, ReconnectingConnection, WaitPolicy,
};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

#[test]
fn child() {
    if let Some((role, path)) = role() {
        assert_eq!(role, executed::ROLE);
        executed::serve(&path);
    }
}

fn idempotent() -> CallOptions {
    CallOptions { idempotent: true, ..CallOptions::default() }
}

fn tagged(tag: u64) -> CallOptions {
    CallOptions { tag, ..CallOptions::default() }
}

fn within(timeout: Duration) -> CallOptions {
    CallOptions { timeout: Some(timeout), ..CallOptions::default() }
}

fn connect(path: &Path, policy: WaitPolicy, reconnect: Reconnect) -> ReconnectingClient {
    let connect_timeout = Duration::from_secs(30);
    let config = ClientConfig { policy, small_slots: 12, connect_timeout, ..ClientConfig::default() };
    ReconnectingClient::connect_with(path, &config, reconnect).unwrap()
}

/// Takes what becomes of so many submitted calls, by their tags.
fn collect(client: &ReconnectingClient, count: usize) -> HashMap<u64, doorbell::Result<Vec<u8>>> {
    let mut results = HashMap::new();
    while results.len() < count {
        assert!(client.wait(Some(Duration::from_secs(30))).unwrap(), "nothing came for 30 s");
        while let Some(PendingOutcome { tag, result }) = client.poll().unwrap() {
            assert!(results.insert(tag, result).is_none(), "call {tag} was answered twice");
        }
    }
    results
}

/// Goal:   R1.9, F58: a call that waits for room gets it when calls end that were given up, though nobody hears of their ends.
/// Method: calls that are given up have all slots of a session whose reactor is held; it goes on, and all of them have ended
///         when the next call is made.
#[test]
fn r1_9_f58_a_call_finds_the_room_of_calls_that_were_given_up() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let client = connect(server.path(), policy, Reconnect::default());
        let connection = client.open().unwrap();
        let other = IpcClient::connect(server.path()).unwrap();
        let holder = other.open().unwrap();
        holder.submit(GATE, b"", &CallOptions::default()).unwrap();
        other.flush().unwrap();
        eventually("the gate holds the reactor", || server.entered() == 1);
        let mut given_up = 0;
        loop {
            match connection.call_with(COUNT, b"", &within(Duration::from_millis(1))) {
                Err(IpcError::Timeout) => given_up += 1,
                Err(IpcError::NotExecuted) => break,
                answer => panic!("{answer:?}"),
            }
        }
        server.open_gate();
        eventually("they have ended", || stat(&holder, "calls_cancelled") == given_up);
        let answer = connection.call_with(COUNT, b"", &within(Duration::from_secs(30)));
        assert_eq!(answer.unwrap(), 2u64.to_le_bytes(), "{given_up} were given up, under {policy:?}");
    }
}

/// Goal:   R3.4: calls that a killed server had not started are executed by the next one, each once, in their order, long
///         ones too, and nobody is told of any trouble.
/// Method: submitted to a stopped server, which is then killed; the next one is started.
#[test]
fn r3_4_i5_calls_that_were_not_started_are_executed_by_the_next_server() {
    for policy in ALL {
        let mut server = LogServer::start();
        let client = connect(server.path(), policy, Reconnect::default());
        let connection = client.open().unwrap();
        assert_eq!(
            connection.call(LOG, &log_request(100, 0, 12)).unwrap(),
            log_answer(&log_request(100, 0, 12))
        );
        server.stop();
        let requests: Vec<_> =
            [12, 1024, 5000].iter().enumerate().map(|(i, len)| log_request(i as u64, 0, *len)).collect();
        for (tag, request) in requests.iter().enumerate() {
            connection.submit(LOG, request, &tagged(tag as u64)).unwrap();
        }
        assert!(!client.wait(Some(Duration::from_millis(1))).unwrap());
        server.kill();
        server.restart();
        for (tag, result) in collect(&client, requests.len()) {
            assert_eq!(result.unwrap(), log_answer(&requests[tag as usize]));
        }
        let executed = server.executed();
        assert!((0..3).all(|id| executed[&id] == 1), "{executed:?}");
    }
}

/// Goal:   R3.4, R4.3: a call that is sent again has its trace and its request, wherever that lay.
/// Method: idempotent calls of several lengths, each under way when its server is killed.
#[test]
fn r3_4_r4_3_a_call_that_is_sent_again_has_its_trace() {
    let trace = doorbell::TraceParent::new([4; 16], [2; 8], 0).unwrap();
    for len in [12, 964, 1000, 5000] {
        let mut server = LogServer::start();
        server.let_hang(true);
        let path = server.path().to_owned();
        let calling = std::thread::spawn(move || {
            let client = connect(&path, WaitPolicy::Block, Reconnect::default());
            let options = CallOptions { traceparent: Some(trace), ..idempotent() };
            client.open().unwrap().call_with(TRACED, &log_request(7, 0, len), &options)
        });
        eventually("the handler runs", || server.executions() == 1);
        server.kill();
        server.let_hang(false);
        server.restart();
        let answer = returns("the call is answered", move || calling.join().unwrap()).unwrap();
        assert_eq!(
            answer,
            [&log_answer(&log_request(7, 0, len))[..], &trace.to_text()].concat(),
            "{len} bytes"
        );
    }
}

/// Goal:   R2.6, R3.4: a call that was cancelled is not sent again, whether its server has heard of that or not.
/// Method: two calls to a stopped server, idempotent ones; one is cancelled; the server is killed and another one started.
#[test]
fn r2_6_r3_4_a_cancelled_call_is_not_sent_again() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Block, Reconnect::default());
    let connection = client.open().unwrap();
    server.stop();
    let submit = |id: u64| {
        let options = CallOptions { tag: id, ..idempotent() };
        connection.submit(LOG, &log_request(id, 0, 12), &options).unwrap()
    };
    let (unwanted, _wanted) = (submit(1), submit(2));
    assert!(!client.wait(Some(Duration::from_millis(1))).unwrap());
    client.cancel(unwanted);
    server.kill();
    server.restart();
    let ended: HashMap<u64, _> = collect(&client, 2).into_iter().collect();
    assert!(matches!(ended[&1], Err(IpcError::Cancelled)), "{ended:?}");
    assert_eq!(*ended[&2].as_ref().unwrap(), log_answer(&log_request(2, 0, 12)));
    assert_eq!(server.executed(), HashMap::from([(2, 1)]));
}

/// Goal:   R2.9, R3.4: the deadline of a call counts from when it is made: one that finds no server in time is not executed
///         when there is one.
/// Method: the callback client, whose server is killed; a call with a deadline; then the server comes back.
#[test]
fn r2_9_r3_4_a_deadline_counts_while_the_server_is_away() {
    use doorbell::{CallbackClient, CallbackConfig, LinkOptions};
    let mut server = LogServer::start();
    let config = CallbackConfig { link: LinkOptions::reconnecting(), ..CallbackConfig::default() };
    let client = CallbackClient::connect_with(server.path(), &config).unwrap();
    server.kill();
    let (tell, told) = std::sync::mpsc::channel();
    let options = CallOptions { deadline: Some(Duration::from_millis(20)), ..CallOptions::default() };
    let answered = move |result| tell.send(result).unwrap();
    client.call_with(LOG, log_request(1, 0, 12), &options, answered).unwrap().detach();
    let result = told.recv_timeout(Duration::from_secs(30)).unwrap();
    // Not executed either way: it may have gone into the segment of the server that died.
    assert!(matches!(result, Err(IpcError::DeadlineExceeded)), "{result:?}");
    server.restart();
    let (tell, told) = std::sync::mpsc::channel();
    let answered = move |result| tell.send(result).unwrap();
    client.call_with(LOG, log_request(2, 0, 12), &CallOptions::default(), answered).unwrap().detach();
    told.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
    assert_eq!(server.executed(), HashMap::from([(2, 1)]));
}

/// Goal:   R3.4, I3: a call that was under way when its server died fails as one that may have been executed, unless it is
///         idempotent: then the next server executes it.
/// Method: a handler that hangs until the server is killed, and does not in the next.
#[test]
fn r3_4_i3_a_call_under_way_is_sent_again_only_if_it_is_idempotent() {
    for (options, runs) in [(CallOptions::default(), 1), (idempotent(), 2)] {
        for policy in ALL {
            let mut server = LogServer::start();
            server.let_hang(true);
            let path = server.path().to_owned();
            let calling = std::thread::spawn(move || {
                let client = connect(&path, policy, Reconnect::default());
                let connection = client.open().unwrap();
                let result = connection.call_with(HANG, &log_request(7, 0, 500), &options);
                let later = connection.call(LOG, &log_request(8, 0, 20));
                (result, later)
            });
            eventually("the handler runs", || server.executions() == 1);
            server.kill();
            server.let_hang(false);
            server.restart();
            let (result, later) = returns("the caller is answered", move || calling.join().unwrap());
            match options.idempotent {
                true => assert_eq!(result.unwrap(), log_answer(&log_request(7, 0, 500))),
                false => assert!(matches!(result, Err(IpcError::ConnectionLost)), "{result:?}"),
            }
            assert_eq!(later.unwrap(), log_answer(&log_request(8, 0, 20)));
            assert_eq!(server.executed(), HashMap::from([(7, runs), (8, 1)]));
        }
    }
}

/// Goal:   R3.4, R1.9: an idempotent call whose request and answer both want the only large slot of a session is sent, and sent
///         again with the request that it had; those behind it are sent, too.
/// Method: a session of one slot of 4 KiB; a handler that hangs until its server is killed, and does not in the next.
#[test]
fn r3_4_r1_9_an_idempotent_call_wants_no_second_slot_and_is_sent_again() {
    for policy in ALL {
        let mut server = LogServer::start();
        server.let_hang(true);
        let path = server.path().to_owned();
        let calling = std::thread::spawn(move || {
            let config = ClientConfig { policy, ..ClientConfig::for_load(1, 4096) };
            let client = ReconnectingClient::connect_with(path, &config, Reconnect::default()).unwrap();
            let connection = client.open().unwrap();
            let options = CallOptions { reply_capacity: 4096, ..idempotent() };
            let result = connection.call_with(HANG, &log_request(7, 0, 3000), &options);
            (result, connection.call(LOG, &log_request(8, 0, 20)))
        });
        eventually("the handler runs", || server.executions() == 1);
        server.kill();
        server.let_hang(false);
        server.restart();
        let (result, later) = returns("the caller is answered", move || calling.join().unwrap());
        assert_eq!(result.unwrap(), log_answer(&log_request(7, 0, 3000)));
        assert_eq!(later.unwrap(), log_answer(&log_request(8, 0, 20)));
        assert_eq!(server.executed(), HashMap::from([(7, 2), (8, 1)]));
    }
}

/// Goal:   R3.4: an idempotent call that was under way in so many servers that died is not sent to another one: it is
///         likely to be what kills them.
/// Method: it hangs in each of them until they are killed.
#[test]
fn r3_4_a_call_under_way_in_every_server_that_died_is_given_up() {
    let mut server = LogServer::start();
    server.let_hang(true);
    let path = server.path().to_owned();
    let calling = std::thread::spawn(move || {
        let client = connect(&path, WaitPolicy::Block, Reconnect::default());
        client.open().unwrap().call_with(HANG, &log_request(1, 0, 12), &idempotent())
    });
    for runs in 1..=4 {
        eventually("the handler runs", || server.executions() == runs);
        server.kill();
        server.restart();
    }
    let result = returns("the caller is told", move || calling.join().unwrap());
    assert!(matches!(result, Err(IpcError::ConnectionLost)), "{result:?}");
    assert_eq!(server.executions(), 4);
}

/// Goal:   R3.4: a caller whose time is over while the server is away is told so in time, and told that its call was not
///         executed, which is true for ever.
/// Method: calls with a time-out and with a deadline while nobody listens; then a server, which is asked for another call.
#[test]
fn r3_4_i5_a_time_out_while_the_server_is_away_means_not_executed() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Handoff, Reconnect::default());
    let connection = client.open().unwrap();
    server.kill();
    let limit = Duration::from_millis(30);
    let deadline = CallOptions { deadline: Some(limit), ..CallOptions::default() };
    for (id, options) in
        [(1, within(limit)), (2, deadline), (3, CallOptions { idempotent: true, ..deadline })]
    {
        let begun = Instant::now();
        let told = connection.call_with(LOG, &log_request(id, 0, 12), &options);
        assert!(matches!(told, Err(IpcError::NotExecuted)), "{told:?}");
        assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
    }
    assert!(matches!(connection.stream(NUMBERS, &[0; 8], &within(limit)), Err(IpcError::NotExecuted)));
    assert!(matches!(connection.submit(LOG, &log_request(4, 0, 12), &tagged(4)), Err(IpcError::WouldBlock)));
    assert!(!client.wait(Some(limit)).unwrap());
    server.restart();
    connection.call(LOG, &log_request(5, 0, 12)).unwrap();
    assert_eq!(server.executed(), HashMap::from([(5, 1)]));
}

/// Goal:   R3.4: a call that waits to be sent again when its caller's time is over is told that it was not executed; one
///         that has no time-out goes on waiting, and none of them is executed again meanwhile.
/// Method: one submitted call that was started and one that was not, both idempotent; the server stays away.
#[test]
fn r3_4_a_time_out_of_a_call_that_is_to_be_sent_again_means_not_executed() {
    let mut server = LogServer::start();
    server.let_hang(true);
    let path = server.path().to_owned();
    let (kill, killed) = std::sync::mpsc::channel();
    let calling = std::thread::spawn(move || {
        let hanging = connect(&path, WaitPolicy::Block, Reconnect::default());
        let connection = hanging.open().unwrap();
        connection.submit(HANG, &log_request(1, 0, 12), &CallOptions { tag: 1, ..idempotent() }).unwrap();
        let options = CallOptions { timeout: Some(Duration::from_millis(300)), ..idempotent() };
        // The same reactor is kept busy by the other one.
        let waiting = connection.call_with(LOG, &log_request(2, 0, 12), &options);
        killed.recv().unwrap();
        hanging.wait(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(hanging.pending(), 1);
        (waiting, hanging.is_connected())
    });
    eventually("the handler runs", || server.executions() == 1);
    server.kill();
    kill.send(()).unwrap();
    let (waiting, connected) = returns("the caller is told", move || calling.join().unwrap());
    assert!(!connected);
    assert!(matches!(waiting, Err(IpcError::NotExecuted)), "{waiting:?}");
    assert_eq!(server.executed(), HashMap::from([(1, 1)]));
}

/// Goal:   R3.4: a stream that the server's death breaks ends with an error that says how far it got; it is not resumed.
///         One that had not been started is sent again.
/// Method: some frames read, then the server is killed and another one started; then a stream is begun at a stopped one.
#[test]
fn r3_4_a_broken_stream_says_how_far_it_got() {
    for policy in ALL {
        let mut server = LogServer::start();
        let client = connect(server.path(), policy, Reconnect::default());
        let connection = client.open().unwrap();
        let mut stream = connection.stream(NUMBERS, &1u64.to_le_bytes(), &idempotent()).unwrap();
        let (mut read, mut taken) = (0u64, 0u64);
        while taken < 10 {
            let frame = stream.next().unwrap().unwrap();
            assert!(streams::is_pattern(&frame, read as usize));
            (read, taken) = (read + frame.len() as u64, taken + 1);
        }
        server.kill();
        server.restart();
        let end = loop {
            match stream.next().unwrap() {
                Ok(frame) => (read, taken) = (read + frame.len() as u64, taken + 1),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(end, IpcError::StreamLost { frames, bytes } if (frames, bytes) == (taken, read)),
            "{end:?} after {taken} frames"
        );
        assert!(stream.next().is_none());
        connection.call(LOG, &log_request(2, 0, 12)).unwrap();
        server.stop();
        let mut stream = connection.stream(NUMBERS, &3u64.to_le_bytes(), &CallOptions::default()).unwrap();
        server.kill();
        server.restart();
        let first = stream.next().unwrap().unwrap();
        assert!(streams::is_pattern(&first, 0));
        drop(stream);
        assert_eq!(server.executed(), HashMap::from([(1, 1), (2, 1), (3, 1)]));
    }
}

/// Goal:   R3.4: connections are opened again with their codec; closed ones are not.
/// Method: three connections of different codecs, one of them closed, one bulk, before and after a kill.
#[test]
fn r3_4_connections_are_opened_again_as_they_were() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Handoff, Reconnect::default());
    let raw = client.open().unwrap();
    let closed = client.open_with(1, false).unwrap();
    let json = client.open_with(1, true).unwrap();
    let rkyv = client.open_with(2, false).unwrap();
    drop(closed);
    for _ in 0..3 {
        for (connection, codec) in [(&raw, 0), (&json, 1), (&rkyv, 2)] {
            assert_eq!(connection.call(CODEC, b"").unwrap(), [codec]);
        }
        server.kill();
        server.restart();
    }
    // Closed while the server is away, and while connections are being opened again.
    server.kill();
    eventually("the loss is noticed", || {
        !client.wait(Some(Duration::from_millis(1))).unwrap() && !is_up(&client, &raw)
    });
    server.restart();
    client.poll().unwrap();
    drop(rkyv);
    assert_eq!(json.call(CODEC, b"").unwrap(), [1]);
    let again = client.open_with(2, true).unwrap();
    assert_eq!(again.call(CODEC, b"").unwrap(), [2]);
    assert_eq!(raw.call(CODEC, b"").unwrap(), [0]);
}

/// Whether a client that knows of no loss yet finds its server.
fn is_up(client: &ReconnectingClient, connection: &ReconnectingConnection<'_>) -> bool {
    connection.call_with(CODEC, b"", &within(Duration::from_millis(1))).is_ok() && client.is_connected()
}

/// Goal:   R3.4: the owner is told of every change of the link, in order, and of none that did not happen.
/// Method: two kills, with what was told in between; a client that waits for its first server.
#[test]
fn r3_4_every_change_of_the_link_is_told() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&told);
    let reconnect = Reconnect::default().on_status(move |status| {
        let word = match status {
            LinkStatus::Connecting => "connecting",
            LinkStatus::Connected => "connected",
            LinkStatus::Disconnected { reason: IpcError::NotExecuted } => "died",
            _ => "something else",
        };
        log.lock().unwrap().push(word);
    });
    let mut server = LogServer::away();
    let client = ReconnectingClient::begin(server.path(), &ClientConfig::default(), reconnect).unwrap();
    assert!(!client.wait(Some(Duration::from_millis(5))).unwrap());
    server.restart();
    let connection = client.open().unwrap();
    let mut expected = vec!["connecting", "connected"];
    for id in 0..2 {
        connection.call(LOG, &log_request(id, 0, 12)).unwrap();
        assert_eq!(*told.lock().unwrap(), expected);
        server.kill();
        assert!(
            connection.call_with(LOG, &log_request(9, 0, 12), &within(Duration::from_millis(60))).is_err()
        );
        server.restart();
        expected.extend(["died", "connecting", "connected"]);
    }
    connection.call(LOG, &log_request(2, 0, 12)).unwrap();
    assert_eq!(*told.lock().unwrap(), expected);
}

/// Goal:   F48, R3.4: a server of another version is no server to come back to: whoever waits is told that at once, and so
///         is everybody later.
/// Method: the server is killed with a call in flight, and something listens there that answers every hello with a
///         version mismatch.
#[test]
fn f48_r3_4_a_server_of_another_version_ends_the_client() {
    let mut server = LogServer::start();
    let finals = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&finals);
    let reconnect = Reconnect::default().on_status(move |status| {
        if let LinkStatus::Disconnected { reason: IpcError::VersionMismatch { .. } } = status {
            counted.fetch_add(1, SeqCst);
        }
    });
    let client = connect(server.path(), WaitPolicy::Handoff, reconnect);
    let connection = client.open().unwrap();
    server.stop();
    connection.submit(LOG, &log_request(1, 0, 12), &tagged(1)).unwrap();
    server.kill();
    std::fs::remove_file(server.path()).unwrap();
    let socket = listen(server.path(), 16);
    std::thread::spawn(move || {
        loop {
            let peer = rustix::net::accept(&socket).unwrap();
            let mut hello = [0u8; 256];
            rustix::net::recv(&peer, &mut hello, RecvFlags::empty()).unwrap();
            let answer =
                Welcome { version_min: 7, version_max: 9, ..Welcome::refusal(code::VERSION_MISMATCH) };
            rustix::net::send(&peer, answer.as_bytes(), SendFlags::NOSIGNAL).unwrap();
        }
    });
    let mismatch = |error: &IpcError| matches!(error, IpcError::VersionMismatch { min: 7, max: 9, ours: 1 });
    let told = connection.call(LOG, &log_request(2, 0, 12)).unwrap_err();
    assert!(mismatch(&told), "{told}");
    let PendingOutcome { tag, result } = client.poll().unwrap().expect("the call in flight has an end");
    assert!(tag == 1 && mismatch(&result.unwrap_err()));
    assert!(mismatch(&client.poll().unwrap_err()));
    assert!(mismatch(&client.wait(None).unwrap_err()));
    assert!(mismatch(&connection.call(LOG, &log_request(3, 0, 12)).unwrap_err()));
    assert!(mismatch(&client.open().map(|_| ()).unwrap_err()));
    assert_eq!(finals.load(SeqCst), 1, "told once");
    assert_eq!(server.executions(), 0);
}

/// Goal:   R3.4, F27: a server that is busy holds up nobody who polls: what it is told is taken, and it is asked again later,
///         in another poll.
/// Method: a server by hand on the thread of its client: a poll that waited for it would wait for itself.
#[test]
fn r3_4_f27_who_polls_does_not_wait_for_a_busy_server() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Block, Reconnect::default());
    server.kill();
    std::fs::remove_file(server.path()).unwrap();
    let socket = listen(server.path(), 16);
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    let hear = || {
        let mut peer = None;
        eventually("a hello comes", || {
            assert!(client.poll().unwrap().is_none());
            peer = rustix::net::accept(&socket).ok();
            peer.is_some()
        });
        let (peer, mut hello) = (peer.unwrap(), [0; 256]);
        rustix::net::recv(&peer, &mut hello, RecvFlags::empty()).unwrap();
        peer
    };
    let busy = Welcome::too_many(Scope::HandshakesOfProcess, 4, 1);
    let late = Goodbye::new(DisconnectReason::HandshakeTimeout);
    for answer in [busy.as_bytes(), late.as_bytes(), busy.as_bytes()] {
        let peer = hear();
        rustix::net::send(&peer, answer, SendFlags::NOSIGNAL).unwrap();
        assert!(client.poll().unwrap().is_none());
        assert_eq!(rustix::net::accept(&socket).unwrap_err(), rustix::io::Errno::AGAIN);
    }
    let last = Welcome { version_min: 7, version_max: 9, ..Welcome::refusal(code::VERSION_MISMATCH) };
    rustix::net::send(hear(), last.as_bytes(), SendFlags::NOSIGNAL).unwrap();
    let told = client.poll().unwrap_err();
    assert!(matches!(told, IpcError::VersionMismatch { min: 7, .. }), "{told}");
}

/// Goal:   R3.4: whoever gives up after some time has given up for good.
/// Method: a limit of 20 ms, no server.
#[test]
fn r3_4_a_client_that_gives_up_says_why() {
    let mut server = LogServer::start();
    let reconnect = Reconnect { give_up_after: Some(Duration::from_millis(20)), ..Reconnect::default() };
    let client = connect(server.path(), WaitPolicy::Block, reconnect);
    let connection = client.open().unwrap();
    server.kill();
    let told = connection.call(LOG, &log_request(1, 0, 12));
    assert!(matches!(told, Err(IpcError::NotRunning { .. })), "{told:?}");
    server.restart();
    let told = connection.call(LOG, &log_request(2, 0, 12));
    assert!(matches!(told, Err(IpcError::NotRunning { .. })), "{told:?}");
    assert_eq!(server.executions(), 0);
}

/// Goal:   F51, trap 9: who only ever polls comes back to the server, too.
/// Method: calls in flight at a stopped server that is killed; nothing but polls until they are answered.
#[test]
fn f51_trap9_r3_4_a_client_that_only_polls_comes_back() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Block, Reconnect::default());
    let connection = client.open().unwrap();
    server.stop();
    let call = connection.submit(LOG, &log_request(1, 0, 12), &tagged(1)).unwrap();
    connection.submit(LOG, &log_request(2, 0, 12), &tagged(2)).unwrap();
    server.kill();
    eventually("the loss is noticed", || {
        assert!(client.poll().unwrap().is_none());
        !client.is_connected()
    });
    // It waits to be sent again, and is not.
    client.cancel(call);
    let cancelled = client.poll().unwrap().unwrap();
    assert!(cancelled.tag == 1 && matches!(cancelled.result, Err(IpcError::Cancelled)));
    server.restart();
    let mut answered = None;
    eventually("the call is answered", || {
        answered = answered.take().or(client.poll().unwrap());
        answered.is_some()
    });
    let PendingOutcome { tag, result } = answered.unwrap();
    assert_eq!((tag, result.unwrap()), (2, log_answer(&log_request(2, 0, 12))));
    assert_eq!(server.executed(), HashMap::from([(2, 1)]));
}

/// Goal:   trap 15: dropping or cancelling what a dead session left touches no call of the next one, whose calls have the
///         same slots and generations.
/// Method: calls and streams of a dead session are dropped after others have taken their slots in the next.
#[test]
fn trap15_r3_4_what_a_dead_session_left_is_dropped_without_touching_the_next() {
    let mut server = LogServer::start();
    let client = connect(server.path(), WaitPolicy::Block, Reconnect::default());
    let connection = client.open().unwrap();
    for round in 0..20u64 {
        let mut stream =
            connection.stream(NUMBERS, &(1000 + round).to_le_bytes(), &CallOptions::default()).unwrap();
        stream.next().unwrap().unwrap();
        let old = connection.submit(LOG, &log_request(2000 + round, 0, 12), &tagged(1)).unwrap();
        eventually("it is executed", || server.executed().contains_key(&(2000 + round)));
        server.kill();
        server.restart();
        // Comes back, and uses the same slots.
        let next = connection.submit(LOG, &log_request(3000 + round, 0, 12), &tagged(2));
        let submitted = usize::from(next.is_ok());
        drop(stream);
        client.cancel(old);
        let answer = connection.call(LOG, &log_request(4000 + round, 0, 12)).unwrap();
        assert_eq!(answer, log_answer(&log_request(4000 + round, 0, 12)));
        let results = collect(&client, 1 + submitted);
        if let Some(next) = results.get(&2) {
            assert_eq!(next.as_ref().unwrap(), &log_answer(&log_request(3000 + round, 0, 12)));
        }
    }
}

/// What a client of the chaos has been told of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Ok,
    NotExecuted,
    Unknown,
}

/// What a client of the chaos did: for each call whether it was idempotent, and what was told.
type Tale = HashMap<u64, (bool, Told)>;

fn judge(request: &[u8], result: &doorbell::Result<Vec<u8>>) -> Told {
    match result {
        Ok(answer) => {
            assert_eq!(*answer, log_answer(request), "a wrong answer");
            Told::Ok
        }
        Err(IpcError::NotExecuted | IpcError::WouldBlock) => Told::NotExecuted,
        Err(IpcError::ConnectionLost | IpcError::Timeout) => Told::Unknown,
        Err(error) => panic!("{error}"),
    }
}

/// Numbers that look random, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    /// A request of a call, short or long, that works for a while.
    fn request(&mut self, id: u64) -> Vec<u8> {
        let len = [12, 200, 1024, 3000, 40_000][self.below(5) as usize];
        log_request(id, self.below(1000) as u32, len)
    }
}

/// Holds one tale against what was executed: I3, I4, I5.
fn check(tale: &Tale, executed: &HashMap<u64, u32>) {
    for (id, (idempotent, told)) in tale {
        let runs = executed.get(id).copied().unwrap_or(0);
        match told {
            Told::Ok if *idempotent => assert!((1..=4).contains(&runs), "call {id} ran {runs} times"),
            Told::Ok => assert_eq!(runs, 1, "call {id} was answered"),
            Told::NotExecuted => assert_eq!(runs, 0, "call {id} was said not to be executed"),
            Told::Unknown if *idempotent => assert!(runs <= 4, "call {id} ran {runs} times"),
            Told::Unknown => assert!(runs <= 1, "call {id} ran {runs} times"),
        }
    }
    assert!(executed.keys().all(|id| tale.contains_key(id)), "something was executed that nobody called");
}

/// Calls one after the other and many at once, until told to stop.
fn client_of_chaos(path: &Path, client: u64, policy: WaitPolicy, stop: &AtomicBool) -> Tale {
    let mut random = Random(client.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let client_of = connect(path, policy, Reconnect::default());
    let connection = client_of.open().unwrap();
    let mut tale = Tale::new();
    let mut in_flight: HashMap<u64, (bool, Vec<u8>)> = HashMap::new();
    let mut next = client << 32;
    let note = |tale: &mut Tale, id: u64, idempotent: bool, told: Told| {
        assert!(tale.insert(id, (idempotent, told)).is_none(), "call {id} was answered twice");
    };
    while !stop.load(SeqCst) || !in_flight.is_empty() {
        let idempotent = random.below(2) == 0;
        if random.below(4) == 0 && !stop.load(SeqCst) {
            next += 1;
            let request = random.request(next);
            let timeout = (random.below(8) == 0).then(|| Duration::from_micros(random.below(20_000)));
            let options = CallOptions { idempotent, timeout, ..CallOptions::default() };
            let told = judge(&request, &connection.call_with(LOG, &request, &options));
            note(&mut tale, next, idempotent, told);
        }
        while in_flight.len() < 8 && !stop.load(SeqCst) {
            next += 1;
            let request = random.request(next);
            let options = CallOptions { tag: next, idempotent, ..CallOptions::default() };
            match connection.submit(LOG, &request, &options) {
                Ok(_) => assert!(in_flight.insert(next, (idempotent, request)).is_none()),
                Err(IpcError::WouldBlock) => break,
                Err(error) => panic!("{error}"),
            }
        }
        client_of.wait(Some(Duration::from_millis(500))).unwrap();
        while let Some(PendingOutcome { tag, result }) = client_of.poll().unwrap() {
            let (idempotent, request) = in_flight.remove(&tag).expect("an answer to a call in flight");
            note(&mut tale, tag, idempotent, judge(&request, &result));
        }
    }
    tale
}

/// Goal:   I3 to I5, R3.4, F50: whatever a server was doing when it was killed, no call is executed twice unless it was
///         marked idempotent, one that is answered was executed, one that is said not to be executed never was, and every
///         answer is its own call's.
/// Method: clients of all policies with blocking and pipelined calls, short and long, idempotent or not, with time-outs;
///         a server that is killed and started again on the same path, at once or later, after so many executions each
///         time; then what the clients were told is compared with the log of all servers.
#[test]
fn i3_i4_i5_r3_4_f50_no_kill_makes_a_call_run_twice_or_lie() {
    let mut server = LogServer::start();
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (1..=3u64)
        .map(|client| {
            let (path, stop) = (server.path().to_owned(), Arc::clone(&stop));
            let policy = ALL[client as usize % 3];
            std::thread::spawn(move || client_of_chaos(&path, client, policy, &stop))
        })
        .collect();
    let mut random = Random(u64::from(std::process::id()) << 20 | 1);
    eprintln!("seed {}", random.0);
    for round in 0..20 {
        let target = server.executions() + 1 + random.below(60);
        eventually("calls are executed", || {
            assert!(clients.iter().all(|client| !client.is_finished()));
            server.executions() >= target
        });
        server.kill();
        if round % 5 == 0 {
            // Long enough for every client to notice, and for its pauses to reach their limit.
            std::thread::sleep(Duration::from_millis(150));
        }
        server.restart();
    }
    stop.store(true, SeqCst);
    let tales: Vec<Tale> =
        clients.into_iter().map(|client| returns("a client ends", move || client.join().unwrap())).collect();
    let executed = server.executed();
    let tale: Tale = tales.into_iter().flatten().collect();
    let told = |what: Told| tale.values().filter(|(_, told)| *told == what).count();
    let twice = executed.values().filter(|runs| **runs > 1).count();
    eprintln!(
        "{} calls: {} answered, {} not executed, {} unknown; {twice} idempotent ones ran twice",
        tale.len(),
        told(Told::Ok),
        told(Told::NotExecuted),
        told(Told::Unknown)
    );
    check(&tale, &executed);
    assert!(told(Told::Unknown) > 0 && twice > 0, "nothing was under way at any kill: nothing was tested");
}

/// Goal:   R3.4, I3 to I5: the client that calls back comes back to its server, too; what was cancelled or overdue meanwhile
///         is called back in time, and every call exactly once.
/// Method: kills while many calls are under way; calls made, cancelled and timed out while the server is away.
#[test]
fn r3_4_i3_i5_the_callback_client_comes_back() {
    use doorbell::{CallbackClient, CallbackConfig, LinkOptions};
    let mut server = LogServer::start();
    let link = LinkOptions { codec: 1, bulk: true, ..LinkOptions::reconnecting() };
    let config = CallbackConfig { link, ..CallbackConfig::default() };
    let client = CallbackClient::connect_with(server.path(), &config).unwrap();
    let tale = Arc::new(Mutex::new(Tale::new()));
    let mut random = Random(77);
    let mut next = 0;
    let mut call = |options: CallOptions| {
        next += 1;
        let (id, request, tale) = (next, random.request(next), Arc::clone(&tale));
        let sent = request.clone();
        client.call_with(LOG, request, &options, move |result| {
            let told = judge(&sent, &result);
            assert!(tale.lock().unwrap().insert(id, (options.idempotent, told)).is_none());
        })
    };
    for _ in 0..8 {
        let target = server.executions() + 30;
        eventually("calls are executed", || {
            for options in [CallOptions::default(), idempotent()] {
                match call(options) {
                    Ok(handle) => handle.detach(),
                    Err(IpcError::WouldBlock) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            server.executions() >= target
        });
        server.kill();
        let overdue = loop {
            match call(within(Duration::from_millis(5))) {
                Err(IpcError::WouldBlock) => std::thread::yield_now(),
                handle => break handle.unwrap(),
            }
        };
        overdue.detach();
        server.restart();
    }
    eventually("every call is called back", || client.pending() == 0);
    assert_eq!(client.panics(), 0);
    let codec = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&codec);
    client
        .call(CODEC, Vec::new(), move |answer| *seen.lock().unwrap() = Some(answer.unwrap()))
        .unwrap()
        .detach();
    eventually("the codec is told", || client.pending() == 0);
    assert_eq!(codec.lock().unwrap().as_deref(), Some(&[1][..]));
    let tale = tale.lock().unwrap();
    check(&tale, &server.executed());
    assert!(tale.values().filter(|(_, told)| *told == Told::Ok).count() > 200);
}

/// Goal:   R3.4: whoever closes a callback client whose server is away waits for nobody, and every call is called back.
/// Method: one call to be sent again, one that was never sent; then it is closed.
#[test]
fn r3_4_a_callback_client_is_closed_while_its_server_is_away() {
    use doorbell::{CallbackClient, CallbackConfig, LinkOptions};
    let mut server = LogServer::start();
    let config = CallbackConfig { link: LinkOptions::reconnecting(), ..CallbackConfig::default() };
    let client = CallbackClient::connect_with(server.path(), &config).unwrap();
    server.stop();
    let told = Arc::new(AtomicU64::new(0));
    let call = |client: &CallbackClient| {
        let told = Arc::clone(&told);
        let called = move |answer: doorbell::Result<Vec<u8>>| {
            assert!(answer.is_err());
            told.fetch_add(1, SeqCst);
        };
        client.call(LOG, log_request(1, 0, 12), called).unwrap()
    };
    let first = call(&client);
    server.kill();
    let second = call(&client);
    first.cancel();
    eventually("the cancelled one is called back", || told.load(SeqCst) == 1);
    returns("it is closed", move || client.close());
    assert_eq!(told.load(SeqCst), 2);
    drop((first, second));
}

#[cfg(feature = "tokio")]
mod tasks {
    use super::*;
    use doorbell::{AsyncClient, LinkOptions};

    async fn connect(path: &Path, link: LinkOptions) -> AsyncClient {
        AsyncClient::connect_as(path, &ClientConfig::for_tasks(), &link).await.unwrap()
    }

    /// Goal:   R3.4, I3 to I5: the client of tasks comes back to its server: calls of many tasks are executed once or failed
    ///         truly, whatever was under way.
    /// Method: tasks that call, some with time-outs, while the server is killed and started again; then the log.
    #[test]
    fn r3_4_i3_i5_the_client_of_tasks_comes_back() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut server = LogServer::start();
        let stop = Arc::new(AtomicBool::new(false));
        let client =
            runtime.block_on(connect(server.path(), LinkOptions { codec: 2, ..LinkOptions::reconnecting() }));
        let tasks: Vec<_> = (1..=40u64)
            .map(|task| {
                let (client, stop) = (client.clone(), Arc::clone(&stop));
                runtime.spawn(async move {
                    let (mut random, mut tale) = (Random(task * 7919), Tale::new());
                    for id in (task << 32).. {
                        if stop.load(SeqCst) {
                            return tale;
                        }
                        let (request, idempotent) = (random.request(id), random.below(2) == 0);
                        let timeout =
                            (random.below(10) == 0).then(|| Duration::from_millis(random.below(40)));
                        let options = CallOptions { idempotent, timeout, ..CallOptions::default() };
                        let told = judge(&request, &client.call_with(LOG, &request, &options).await);
                        tale.insert(id, (idempotent, told));
                    }
                    tale
                })
            })
            .collect();
        for round in 0..8 {
            let target = server.executions() + 40;
            eventually("calls are executed", || server.executions() >= target);
            server.kill();
            if round % 4 == 0 {
                std::thread::sleep(Duration::from_millis(100));
            }
            server.restart();
        }
        stop.store(true, SeqCst);
        eventually("all tasks end", || tasks.iter().all(|task| task.is_finished()));
        assert_eq!(runtime.block_on(client.call(CODEC, b"")).unwrap(), [2]);
        let tales = tasks.into_iter().map(|task| runtime.block_on(task).unwrap());
        let tale: Tale = tales.flatten().collect();
        check(&tale, &server.executed());
    }

    /// Goal:   R2.9, R3.4: a call that waits to be sent again ends once it can no longer be started in time, whether there is
    ///         a server by then or not; it may have been executed, and is said to.
    /// Method: an idempotent call with a deadline hangs in its handler; the server is killed, and none comes after it.
    #[test]
    fn r2_9_r3_4_a_call_to_be_sent_again_ends_with_its_deadline() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut server = LogServer::start();
        server.let_hang(true);
        let client = runtime.block_on(connect(server.path(), LinkOptions::reconnecting()));
        // Long enough to be started in.
        let options = CallOptions { deadline: Some(Duration::from_secs(2)), ..idempotent() };
        let call =
            runtime.spawn(async move { client.call_with(HANG, &log_request(1, 0, 12), &options).await });
        eventually("the handler runs", || server.executions() == 1);
        server.kill();
        eventually("the call ends", || call.is_finished());
        let result = runtime.block_on(call).unwrap();
        assert!(matches!(result, Err(IpcError::ConnectionLost)), "{result:?}");
    }

    /// Goal:   R3.4: a stream of a client of tasks that the server's death breaks says how far it got; the client goes on.
    ///         Whoever drops all that is left of a client whose server is away ends it.
    /// Method: frames, a kill, the end; another call; then a kill, and the client is dropped: nothing connects any more.
    #[test]
    fn r3_4_a_broken_stream_of_tasks_says_how_far_it_got() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut server = LogServer::start();
        let attempts = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&attempts);
        let reconnect = Reconnect::default().on_status(move |status| {
            counted.fetch_add(u64::from(matches!(status, LinkStatus::Connected)), SeqCst);
        });
        let link = LinkOptions { reconnect: Some(reconnect), ..LinkOptions::default() };
        let client = runtime.block_on(connect(server.path(), link));
        let options = CallOptions::default();
        let mut stream = runtime.block_on(client.stream(NUMBERS, &1u64.to_le_bytes(), &options)).unwrap();
        let (mut read, mut taken) = (0u64, 0u64);
        while taken < 5 {
            let frame = runtime.block_on(stream.next()).unwrap().unwrap();
            (read, taken) = (read + frame.len() as u64, taken + 1);
        }
        server.kill();
        server.restart();
        let end = loop {
            match runtime.block_on(stream.next()).unwrap() {
                Ok(frame) => (read, taken) = (read + frame.len() as u64, taken + 1),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(end, IpcError::StreamLost { frames, bytes } if (frames, bytes) == (taken, read)),
            "{end:?} after {taken} frames"
        );
        runtime.block_on(client.call(LOG, &log_request(2, 0, 12))).unwrap();
        assert_eq!(attempts.load(SeqCst), 2);
        server.kill();
        drop((client, stream));
        server.restart();
        let other = super::connect(server.path(), WaitPolicy::Block, Reconnect::default());
        other.open().unwrap().call(LOG, &log_request(3, 0, 12)).unwrap();
        assert_eq!(attempts.load(SeqCst), 2, "nobody wanted another session");
        assert_eq!(server.executed(), HashMap::from([(1, 1), (2, 1), (3, 1)]));
    }
}

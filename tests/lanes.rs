//! Several reactors and several lanes: who goes where, in which order, and what a liar gets.

mod common;

use common::process::ServerProcess;
use common::raw::{Raw, SMALL};
use common::{Bystander, COUNT, GATE, TestServer, client, eventually, stat};
use doorbell::protocol::handshake::{DisconnectReason, LaneChoice};
use doorbell::{
    CallOptions, ClientConfig, Connection, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy,
};
use doorbell_shm::bell::ASLEEP;
use doorbell_shm::entry::{Status, Submission, flag, kind};
use doorbell_shm::lane::{BULK, INTERACTIVE};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FallocateFlags;
use rustix::thread::CpuSet;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

/// The cores that this process may use; a test that needs two says so and passes where there is one.
fn cores() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

fn two_cores() -> Option<(usize, usize)> {
    let cores = cores();
    if cores.len() < 2 {
        eprintln!("one core alone: nothing to be tested here");
        return None;
    }
    Some((cores[0], cores[1]))
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set).unwrap();
}

/// A server with a reactor on each of two cores.
fn server(policy: WaitPolicy, (home, other): (usize, usize)) -> TestServer {
    let cores = vec![home, other];
    TestServer::start_with(ServerConfig { policy, reactors: 2, cores, ..ServerConfig::default() })
}

fn number(answer: &[u8]) -> u64 {
    u64::from_le_bytes(answer.try_into().unwrap())
}

/// Calls from this core until the calls of `connection` take the lane of its reactor: one that still polls elsewhere
/// is preferred to it.
fn settle(connection: &Connection<'_>, core: usize) {
    pin(core);
    let lane_of = || {
        let id = connection.submit(MessageType::PING, b"", &CallOptions::default()).unwrap();
        assert!(connection.client().wait(None).unwrap());
        connection.client().poll().unwrap().unwrap();
        id.lane()
    };
    eventually("the lane of this core is used", || lane_of() != 0);
}

/// Goal:   P6, I2: a session that has ended leaves nothing, at a reactor either that had one lane of it and has nothing else
///         to do.
/// Method: a server that polls, so that no bell is armed when the lane goes; a client that takes a lane of the other reactor,
///         and leaves; the segments that the server's process has mapped.
#[test]
fn p6_i2_a_further_reactor_without_work_keeps_no_segment() {
    let Some((home, other)) = two_cores() else { return };
    let cores = format!("{home},{other}");
    let server = ServerProcess::start(&["--policy", "spin", "--reactors", "2", "--cores", &cores]);
    // A client that spins on the core of its home reactor takes a lane elsewhere.
    pin(home);
    for _ in 0..3 {
        let client = client(server.path(), WaitPolicy::Spin);
        let connection = client.open().unwrap();
        settle(&connection, home);
        drop(connection);
        drop(client);
        eventually("no segment is mapped", || server.process.segments() == 0);
    }
}

/// Goal:   P6, R1.3: calls are made on the core that the caller runs on, whichever that is at the moment, and
///         arrive in order.
/// Method: one connection, called from two cores in turn; the server counts the lanes, the state the calls.
#[test]
fn p6_a_caller_that_changes_its_core_changes_its_lane() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connection = client.open().unwrap();
    for round in 0..200 {
        pin(if round % 2 == 0 { pair.0 } else { pair.1 });
        assert_eq!(number(&connection.call(COUNT, b"").unwrap()), round + 1);
    }
    drop(connection);
    drop(client);
    let metrics = server.stop();
    assert_eq!((metrics.further_lanes, metrics.sweeps_healed), (1, 0));
    assert_eq!((metrics.calls_total(), metrics.connections_opened), (200, 1));
}

/// Goal:   P6: a connection does not move while something of it is in flight, so its calls start in order.
/// Method: a call that holds the first reactor; the caller moves to the other core and submits more. On the other
///         reactor they would run at once.
#[test]
fn p6_a_connection_with_a_call_in_flight_stays_on_its_lane() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let elsewhere = client(server.path(), WaitPolicy::Handoff);
    let free = elsewhere.open().unwrap();
    settle(&free, pair.1);
    pin(pair.0);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connection = client.open().unwrap();
    connection.submit(GATE, b"", &CallOptions::default()).unwrap();
    client.flush().unwrap();
    eventually("the gate holds the reactor", || server.entered() == 1);
    pin(pair.1);
    for _ in 0..2 {
        connection.submit(COUNT, b"", &CallOptions::default()).unwrap();
    }
    client.flush().unwrap();
    // The other reactor is free: what had moved there would have been counted by now.
    assert_eq!(number(&free.call(COUNT, b"").unwrap()), 1, "the first to be counted");
    server.open_gate();
    let mut answers = Vec::new();
    while answers.len() < 3 {
        match client.poll().unwrap() {
            Some(answer) => answers.push(number(&answer.to_vec().unwrap())),
            None => assert!(client.wait(None).unwrap()),
        }
    }
    assert_eq!(answers, [2, 3, 4]);
}

/// A connection whose lane is that of this core, with a call that holds its reactor until the gate opens.
fn hold_further<'c>(server: &TestServer, client: &'c IpcClient, core: usize) -> Connection<'c> {
    let connection = client.open().unwrap();
    settle(&connection, core);
    connection.submit(GATE, b"", &CallOptions::default()).unwrap();
    client.flush().unwrap();
    eventually("the gate holds the further reactor", || server.entered() == 1);
    connection
}

/// Goal:   P6: a connection that is dropped while its last call runs on another lane is closed after that call,
///         not before; the session goes on.
/// Method: a gated call on the further lane, the connection dropped, the home lane used meanwhile.
#[test]
fn p6_a_close_does_not_overtake_calls_on_another_lane() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    pin(pair.1);
    let client = client(server.path(), WaitPolicy::Handoff);
    let dropped = hold_further(&server, &client, pair.1);
    drop(dropped);
    pin(pair.0);
    let other = client.open().unwrap();
    for _ in 0..10 {
        other.call(MessageType::PING, b"").unwrap();
    }
    assert_eq!(stat(&other, "connections_open"), 2);
    server.open_gate();
    assert!(client.wait(None).unwrap());
    assert_eq!(number(&client.poll().unwrap().unwrap().to_vec().unwrap()), 1);
    eventually("the dropped connection is closed", || stat(&other, "connections_open") == 1);
}

/// Goal:   P6: a connection that is closed before its ATTACH on another lane is taken ends nothing: its client did nothing wrong.
/// Method: a gate holds the further reactor, and calls behind it all slots of that lane; a call on a new connection attaches
///         it, finds no slot, and the connection is dropped. Its CLOSE is taken at home first.
#[test]
fn p6_s9_a_close_may_overtake_an_attach_that_no_call_follows() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    pin(pair.1);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connection = client.open().unwrap();
    settle(&connection, pair.1);
    let mut calls = 1;
    connection.submit(GATE, b"", &CallOptions::default()).unwrap();
    client.flush().unwrap();
    eventually("the gate holds the further reactor", || server.entered() == 1);
    let dropped = client.open().unwrap();
    while connection.submit(COUNT, b"", &CallOptions::default()).is_ok() {
        calls += 1;
    }
    // With so much in flight, calls keep off the core that they are made on.
    pin(pair.0);
    let refused = dropped.submit(COUNT, b"", &CallOptions::default());
    assert!(matches!(refused, Err(IpcError::WouldBlock)), "{refused:?}");
    drop(dropped);
    client.flush().unwrap();
    let watcher = common::client(server.path(), WaitPolicy::Block);
    let watched = watcher.open().unwrap();
    eventually("it is closed at home", || stat(&watched, "connections_open") == 2);
    server.open_gate();
    let mut answered = 0;
    while answered < calls {
        match client.poll().unwrap() {
            Some(answer) => answered += u32::from(answer.result().is_ok()),
            None => assert!(client.wait(None).unwrap()),
        }
    }
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
}

/// Goal:   F50: what a reactor completes after its client has heard that the session is over, and has been told what became of
///         its calls, breaks nothing: the end stays what it was.
/// Method: a gate holds the further reactor while the server ends; the call in it is lost, then the gate opens.
#[test]
fn f50_an_answer_that_comes_after_the_end_of_its_session_is_nobodys() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    pin(pair.1);
    let client = client(server.path(), WaitPolicy::Handoff);
    let _connection = hold_further(&server, &client, pair.1);
    server.end_at_once();
    let lost = loop {
        match client.poll().unwrap() {
            Some(answer) => break answer.result().unwrap_err(),
            None => assert!(client.wait(Some(Duration::from_secs(30))).unwrap()),
        }
    };
    assert!(matches!(lost, IpcError::ConnectionLost), "{lost:?}");
    let is_over = || match client.poll().map(|answer| assert!(answer.is_none())) {
        Ok(()) => false,
        Err(IpcError::Disconnected(DisconnectReason::Draining)) => true,
        Err(other) => panic!("{other}"),
    };
    eventually("its client has heard of the end", is_over);
    server.open_gate();
    eventually("the further reactor has ended", || {
        is_over();
        server.has_ended()
    });
    eventually("the end is what it was", is_over);
    assert!(client.wait(None).is_err());
}

/// Goal:   DESIGN §4: calls in flight on several lanes are all waited for, and none is missed.
/// Method: one gated call on each of two reactors, a long wait, the gate opened in either order.
#[test]
fn r1_2_a_client_waits_for_several_lanes_at_once() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let client = client(server.path(), WaitPolicy::Handoff);
    for round in 0..10u64 {
        pin(pair.0);
        let connections = [client.open().unwrap(), client.open().unwrap()];
        settle(&connections[1], pair.1);
        for (connection, core) in connections.iter().zip([pair.0, pair.1]) {
            pin(core);
            connection.submit(GATE, b"", &CallOptions::default()).unwrap();
            client.flush().unwrap();
        }
        eventually("both reactors are held", || server.entered() == 2 * round + 2);
        for answered in 1..=2 {
            std::thread::scope(|scope| {
                scope.spawn(|| server.open_gate());
                assert!(client.wait(None).unwrap());
            });
            let answer = client.poll().unwrap().expect("waited for");
            assert_eq!(number(&answer.to_vec().unwrap()), 2 * round + answered);
        }
    }
    assert_eq!(server.stop().sweeps_healed, 0);
}

/// Goal:   a client that waits on its descriptor in an event loop of its own misses nothing and is not woken for
///         nothing for ever (the socket bell).
/// Method: `prepare_to_wait` and poll(2), with gated calls on both reactors; afterwards the descriptor is silent.
#[test]
fn p5_the_descriptor_tells_of_answers_on_every_lane() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connections = [client.open().unwrap(), client.open().unwrap()];
    for round in 0..20u64 {
        pin(if round % 2 == 0 { pair.0 } else { pair.1 });
        connections[round as usize % 2].submit(GATE, b"", &CallOptions::default()).unwrap();
        assert!(!client.prepare_to_wait().unwrap());
        eventually("the gate is reached", || server.entered() == round + 1);
        std::thread::scope(|scope| {
            scope.spawn(|| server.open_gate());
            let mut answer = None;
            while answer.is_none() {
                poll(&mut [PollFd::new(&client.as_fd(), PollFlags::IN)], None).unwrap();
                answer = client.poll().unwrap().map(|answer| number(&answer.to_vec().unwrap()));
                if answer.is_none() {
                    client.prepare_to_wait().unwrap();
                }
            }
            assert_eq!(answer, Some(round + 1));
        });
    }
    assert!(!client.prepare_to_wait().unwrap());
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&client.as_fd(), PollFlags::IN)], Some(&now)), Ok(0));
}

/// Goal:   F51 on the socket: a client that waits long is told at once that the server stops.
/// Method: a gated call waited for beyond the futex slice, then the server stops.
#[test]
fn f51_a_long_wait_ends_with_the_server() {
    for policy in [WaitPolicy::Handoff, WaitPolicy::Block] {
        let server = TestServer::start_with(ServerConfig { policy, ..ServerConfig::default() });
        let client = client(server.path(), policy);
        let id = client.open().unwrap().detach();
        client.attached(id).call(MessageType::PING, b"").unwrap();
        assert!(!client.wait(Some(Duration::from_millis(50))).unwrap(), "nothing is in flight");
        std::thread::scope(|scope| {
            let waits = scope.spawn(move || client.wait(None).unwrap_err());
            server.stop();
            let told = waits.join().unwrap();
            let draining = DisconnectReason::Draining;
            assert!(matches!(told, doorbell::IpcError::Disconnected(r) if r == draining), "{told}");
        });
    }
}

/// Goal:   a client that cannot have a lane of its core works all the same.
/// Method: reactors not pinned; one reactor; one lane; lanes of all sessions used up.
#[test]
fn p6_without_a_lane_of_its_core_a_client_uses_the_home_lane() {
    let base = ServerConfig::default();
    for config in [
        ServerConfig { pinned: false, reactors: 2, ..base.clone() },
        ServerConfig { reactors: 1, ..base.clone() },
        ServerConfig { max_lanes: 1, ..base.clone() },
        ServerConfig { max_further_lanes: 0, ..base },
    ] {
        let server = TestServer::start_with(config);
        for policy in [WaitPolicy::Handoff, WaitPolicy::Spin, WaitPolicy::Block] {
            let client = client(server.path(), policy);
            let connection = client.open().unwrap();
            for core in cores() {
                pin(core);
                assert_eq!(connection.call(MessageType::ECHO, b"here").unwrap(), b"here");
            }
        }
        assert_eq!(server.stop().further_lanes, 0);
    }
}

/// Goal:   a client that spins does so away from the core of its reactor, if there is another.
/// Method: a client on the home reactor's core; its calls are answered by the other one.
#[test]
fn p6_a_spinning_client_keeps_off_its_own_core() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Spin, pair);
    pin(pair.0);
    let client = client(server.path(), WaitPolicy::Spin);
    let connection = client.open().unwrap();
    for i in 0..100u32 {
        assert_eq!(connection.call(MessageType::ECHO, &i.to_le_bytes()).unwrap(), i.to_le_bytes());
    }
    assert_eq!(server.stop().further_lanes, 1);
}

/// What a client may not do on a further lane, and what on its home lane.
type Lie = (&'static str, bool, fn(&mut Raw));

const LIES: [Lie; 7] = [
    ("a call without an ATTACH", true, |raw| {
        let entry = raw.entry(2, 20, b"x");
        raw.push(INTERACTIVE, &entry);
    }),
    ("a call behind an ATTACH of a connection that is not open", true, |raw| {
        raw.connection ^= 1 << 20;
        let attach = raw.attach();
        raw.push_words(INTERACTIVE, attach.pack());
        let entry = raw.entry(2, 20, b"x");
        raw.push(INTERACTIVE, &entry);
    }),
    ("an ATTACH with another codec", true, |raw| {
        let entry = Submission { codec: 1, ..raw.attach() };
        raw.push_words(INTERACTIVE, entry.pack());
    }),
    ("an ATTACH with another priority", true, |raw| {
        let entry = Submission { flags: flag::BULK, ..raw.attach() };
        raw.push_words(BULK, entry.pack());
    }),
    ("an ATTACH with a slot", true, |raw| {
        let entry = Submission { slot: 20, generation: 1, ..raw.attach() };
        raw.push_words(INTERACTIVE, entry.pack());
    }),
    ("an OPEN", true, |raw| {
        let entry = raw.control(kind::OPEN, 0);
        raw.push(INTERACTIVE, &entry);
    }),
    ("an ATTACH on the home lane", false, |raw| {
        let entry = raw.attach();
        raw.push_words(INTERACTIVE, entry.pack());
    }),
];

fn raw_with_lane(server: &TestServer, other: usize) -> Raw {
    let mut raw = Raw::connect_with_lanes(server.path(), 2);
    raw.connection = raw.open(0, 0);
    raw.use_lane(LaneChoice::On(other as u32));
    raw
}

/// Goal:   P6, S9: what breaks the rules on any lane ends that session on all of them, with a reason; nobody else
///         notices.
/// Method: each lie by a client that goes past the library; a correct one first; a bystander.
#[test]
fn p6_s9_a_lie_on_a_further_lane_ends_the_session_everywhere() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let bystander = Bystander::new(server.path());
    let mut honest = raw_with_lane(&server, pair.1);
    let attach = honest.attach();
    honest.push_words(INTERACTIVE, attach.pack());
    honest.echo(b"on the further lane");
    for (name, on_further, lie) in LIES {
        let mut raw = raw_with_lane(&server, pair.1);
        if !on_further {
            raw.swap_lanes();
        }
        lie(&mut raw);
        raw.ring();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation, "{name}");
        bystander.check(name);
    }
    honest.echo(b"still there");
    honest.swap_lanes();
    honest.echo(b"and on the home lane");
    eventually("all liars are gone", || bystander.stat("protocol_violations") == LIES.len() as u64);
}

/// Goal:   F18: a hole punched into a further lane is that client's own loss, as on the home lane.
/// Method: all of the segment punched after calls on both lanes; then a call on one of them. An honest session of the
///         same two reactors, and a bystander, go on.
#[test]
fn f18_a_hole_punched_under_a_further_lane_ends_that_session_alone() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let bystander = Bystander::new(server.path());
    let mut honest = raw_with_lane(&server, pair.1);
    let attach = honest.attach();
    honest.push_words(INTERACTIVE, attach.pack());
    honest.echo(b"on the further lane");
    for on_further in [true, false] {
        let mut raw = raw_with_lane(&server, pair.1);
        let attach = raw.attach();
        raw.push_words(INTERACTIVE, attach.pack());
        // More than a lap less one: the zeros are of no lap that is expected.
        for _ in 0..9 {
            raw.echo(b"before");
        }
        raw.swap_lanes();
        for _ in 0..9 {
            raw.echo(b"before");
        }
        if on_further {
            raw.swap_lanes();
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&raw.memory, flags, 0, raw.segment.len() as u64).unwrap();
        bystander.check("a hole punched while idle");
        let entry = raw.entry(COUNT.0, SMALL, b"after");
        raw.push(INTERACTIVE, &entry);
        raw.ring();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation, "on the further lane: {on_further}");
        honest.echo(b"still there");
        bystander.check("a session ended by holes");
    }
    honest.swap_lanes();
    honest.echo(b"and on the home lane");
    eventually("both are gone", || bystander.stat("protocol_violations") == 2);
}

/// Goal:   P6: a connection can be used on every lane right after its OPEN was answered, and no longer after its
///         CLOSE was, however many come and go.
/// Method: opened on the home lane, attached and called on the other at once, 200 times; then a call on the one
///         that was closed last.
#[test]
fn p6_what_was_opened_can_be_attached_at_once_and_what_was_closed_cannot() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let mut raw = raw_with_lane(&server, pair.1);
    for _ in 0..200 {
        raw.swap_lanes();
        raw.connection = raw.open(0, 0);
        raw.swap_lanes();
        let attach = raw.attach();
        raw.push_words(INTERACTIVE, attach.pack());
        raw.echo(b"at once");
        raw.swap_lanes();
        let close = raw.control(kind::CLOSE, raw.connection);
        assert_eq!(raw.call(&close).status, Status::Ok as u8);
        raw.swap_lanes();
    }
    let attach = raw.attach();
    raw.push_words(INTERACTIVE, attach.pack());
    let entry = raw.entry(2, 20, b"x");
    raw.push(INTERACTIVE, &entry);
    raw.ring();
    assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
}

/// Goal:   asking for lanes has its limits: a reactor gives one lane, an unknown core none; who never stops asking
///         is ended, and a packet that is no wish is a violation.
/// Method: by hand, with a bystander.
#[test]
fn p6_s12_lanes_are_given_once_and_asking_has_an_end() {
    let Some(pair) = two_cores() else { return };
    let server = server(WaitPolicy::Handoff, pair);
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect_with_lanes(server.path(), 4);
    assert_eq!(raw.welcome.lanes, 2, "no more lanes than reactors");
    let (home, other) = (pair.0 as u32, pair.1 as u32);
    for (choice, lane) in [
        (LaneChoice::On(home), 0),
        (LaneChoice::On(other), 1),
        (LaneChoice::On(other), 1),
        (LaneChoice::NotOn(home), 1),
        (LaneChoice::NotOn(other), 0),
        (LaneChoice::On(99_999), 0),
        (LaneChoice::On(u32::MAX), 0),
    ] {
        assert_eq!(raw.ask_for_lane(choice).lane, lane, "{choice:?}");
    }
    for _ in 7..4096 {
        assert_eq!(raw.ask_for_lane(LaneChoice::On(99_999)).lane, 0);
    }
    common::raw::send(&raw.socket, zerocopy::IntoBytes::as_bytes(&wish())).unwrap();
    assert_eq!(raw.ended(), DisconnectReason::Quota);
    let raw = Raw::connect_with_lanes(server.path(), 2);
    common::raw::send(&raw.socket, b"LANE, please....").unwrap();
    assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
    bystander.check("wishes");
}

fn wish() -> doorbell::protocol::handshake::LaneRequest {
    doorbell::protocol::handshake::LaneRequest::new(LaneChoice::On(0))
}

/// Goal:   F3, P6: everything of a session that ends is given back by every reactor, in whatever state it was.
/// Method: sessions with two lanes, ended by their client between calls and in the middle of one, many times; the
///         limits on sessions and lanes would be reached if anything were kept.
#[test]
fn p6_s10_sessions_with_several_lanes_come_and_go() {
    let Some(pair) = two_cores() else { return };
    let server = TestServer::start_with(ServerConfig {
        reactors: 2,
        cores: vec![pair.0, pair.1],
        max_sessions: 4,
        max_half_open: 4,
        max_further_lanes: 2,
        ..ServerConfig::default()
    });
    for round in 0..300u32 {
        pin(if round % 2 == 0 { pair.0 } else { pair.1 });
        let mut connected = None;
        eventually("there is room for a session", || {
            connected = IpcClient::connect(server.path()).ok();
            connected.is_some()
        });
        let client = connected.unwrap();
        let connection = client.open().unwrap();
        assert_eq!(connection.call(MessageType::ECHO, &round.to_le_bytes()).unwrap(), round.to_le_bytes());
        pin(if round % 2 == 0 { pair.1 } else { pair.0 });
        assert_eq!(connection.call(MessageType::ECHO, &round.to_le_bytes()).unwrap(), round.to_le_bytes());
        connection.submit(COUNT, b"", &CallOptions::default()).unwrap();
        client.flush().unwrap();
    }
    let metrics = server.stop();
    assert!(metrics.further_lanes > 100, "{} lanes were given", metrics.further_lanes);
    assert_eq!((metrics.sessions_opened, metrics.sweeps_healed), (300, 0));
}

/// Goal:   S6: no cold call is lost, whatever the pause before it, and none needs the sweep to find it.
/// Method: a million calls with random pauses (none, some µs, a sleep) of two clients that the scheduler moves as it
///         likes, every answer checked; the sweep's counter stays 0.
#[test]
fn s6_trap08_a_million_cold_calls_are_answered_without_the_sweep() {
    const CALLS: u64 = 500_000;
    let server = TestServer::start_with(ServerConfig::default());
    std::thread::scope(|scope| {
        for seed in [1u64, 2] {
            let server = &server;
            scope.spawn(move || {
                let client = IpcClient::connect_with(server.path(), &ClientConfig::smallest()).unwrap();
                let connection = client.open().unwrap();
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut answer = [0; 8];
                for call in 0..CALLS {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    match random % 64 {
                        0 => std::thread::sleep(Duration::from_micros(random >> 32 & 127)),
                        1..20 => (0..random >> 32 & 1023).for_each(|_| std::hint::spin_loop()),
                        _ => {}
                    }
                    let body = (call ^ random).to_le_bytes();
                    let options = CallOptions::default();
                    let len = connection.call_into(MessageType::ECHO, &body, &mut answer, &options).unwrap();
                    assert_eq!((len, answer), (8, body), "call {call} of seed {seed}");
                }
            });
        }
    });
    let metrics = server.stop();
    assert_eq!((metrics.calls_total(), metrics.sweeps_healed), (2 * CALLS, 0));
}

/// Goal:   F24: a client that rings without cause is left alone for a while each time, disturbs nobody, and is ended
///         when it does not stop.
/// Method: rings and hints without entries; a bystander; a short patience.
#[test]
fn f24_doorbell_storm_is_damped_and_ended() {
    let config = ServerConfig { storm_patience: Duration::from_millis(200), ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let bystander = Bystander::new(server.path());
    for by_hint in [false, true] {
        let raw = Raw::connect(server.path());
        let before = bystander.stat("storms_damped");
        while raw.runs() {
            if by_hint {
                raw.lane.common.hints.set(20);
            }
            raw.ring();
        }
        assert_eq!(raw.ended(), DisconnectReason::DoorbellAbuse);
        assert!(bystander.stat("storms_damped") >= before + 5);
        bystander.check("a storm");
    }
    // Each pause is longer than the one before: 16 wakes each, and few pauses fit into the patience.
    assert!(server.stop().storms_damped < 100);
}

/// Goal:   F24: a storm that ends is forgiven, and calls made in it are answered.
/// Method: rings without cause until it is damped, then calls.
#[test]
fn f24_calls_in_a_storm_are_answered() {
    let server = TestServer::start_with(ServerConfig::default());
    let mut raw = Raw::connect(server.path());
    let watcher = Bystander::new(server.path());
    eventually("the storm is damped", || {
        raw.ring();
        watcher.stat("storms_damped") > 0
    });
    for _ in 0..20 {
        raw.echo(b"in the storm");
        raw.ring();
    }
    assert!(raw.runs());
}

/// Goal:   F57: waiters planted on a client's bell cost the server four wakes, not one each.
/// Method: a dozen threads wait on the bell of one session; one answer wakes four of them.
#[test]
fn f57_planted_waiters_are_woken_by_fours() {
    const PLANTED: usize = 12;
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    let bell = raw.lane.common.client_bell.0.clone();
    let (waiting, woken) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // It may still be about to ring for the answer before.
    let of_server = raw.lane.common.server_bell.0.clone();
    eventually("the server sleeps", || of_server.load(SeqCst) & ASLEEP != 0);
    std::thread::scope(|scope| {
        bell.store(1, SeqCst);
        for _ in 0..PLANTED {
            scope.spawn(|| {
                waiting.fetch_add(1, SeqCst);
                doorbell_uring::futex::wait(&bell, 1, None).unwrap();
                woken.fetch_add(1, SeqCst);
            });
        }
        let asleep = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let address = format!("{:#x}", bell_address(&bell));
            // A thread that ends meanwhile is none that sleeps.
            let calls =
                tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("syscall")).ok());
            calls.filter(|call| call.contains(&address)).count()
        };
        eventually("all are asleep on the bell", || waiting.load(SeqCst) == PLANTED && asleep() == PLANTED);
        raw.echo(b"once");
        eventually("some were woken", || woken.load(SeqCst) >= 4);
        // The server has answered, so it has woken whom it wakes: the others still sleep.
        raw.echo(b"twice");
        assert_eq!(asleep(), PLANTED - 4);
        bell.store(0, SeqCst);
        doorbell_uring::futex::wake(&bell, i32::MAX as u32).unwrap();
    });
    assert_eq!(woken.load(SeqCst), PLANTED);
}

fn bell_address(bell: &std::sync::atomic::AtomicU32) -> usize {
    std::ptr::from_ref(bell).addr()
}

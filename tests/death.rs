//! Who dies, stops or is interrupted, and what becomes of the others: FAULTS F1 to F10, F41, F50, F51,
//! R3.3, R3.7. Clients and servers here are processes that are really killed.

mod common;

use common::process::{Actor, Process, ServerProcess, copy_of_test, ready, returns, role};
use common::raw::{Heard, Raw, SMALL, connect_silently, hear, hello, send, send_with_fds};
use common::{Bystander, COUNT, GATE, HELD, TestDir, TestServer, client, eventually, stat};
use doorbell::protocol::handshake::{DisconnectReason, code};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy};
use doorbell_shm::lane::INTERACTIVE;
use rustix::process::Signal;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

fn tagged(tag: u64) -> CallOptions {
    CallOptions { tag, ..CallOptions::default() }
}

/// What a copy of this program does, as the client or server that a test kills. Each part says so once it is where the
/// test wants it.
#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    let for_ever = || loop {
        std::thread::park();
    };
    match role.as_str() {
        "silent" => {
            let _socket = connect_silently(&path);
            ready();
            for_ever();
        }
        "deaf" => {
            let socket = connect_silently(&path);
            send(&socket, hello().as_bytes()).unwrap();
            ready();
            for_ever();
        }
        "idle" => {
            let client = client(&path, WaitPolicy::Block);
            let _connections: Vec<_> = (0..3).map(|_| client.open().unwrap()).collect();
            ready();
            for_ever();
        }
        "busy" => {
            let client = client(&path, WaitPolicy::Block);
            let connections: Vec<_> = (0..3).map(|_| client.open().unwrap()).collect();
            ready();
            for round in 0u64.. {
                let body = vec![round as u8; (round * 97 % 5000) as usize];
                while connections[round as usize % 3].submit(MessageType::ECHO, &body, &tagged(round)).is_ok()
                {
                }
                client.wait(None).unwrap();
                while client.poll().unwrap().is_some() {}
            }
        }
        "half-written" => {
            let mut raw = Raw::connect(&path);
            let entry = raw.entry(COUNT.0, SMALL, b"half");
            let bell = raw.word32(raw.layout.server_bell);
            eventually("the server sleeps", || bell.load(SeqCst) == 1);
            // All words but the one that publishes.
            raw.forge(INTERACTIVE, &entry, 0);
            raw.ring();
            eventually("the server has looked, and sleeps again", || bell.load(SeqCst) == 1);
            ready();
            for_ever();
        }
        "not-rung" => {
            let mut raw = Raw::connect(&path);
            let bell = raw.word32(raw.layout.server_bell);
            eventually("the server sleeps", || bell.load(SeqCst) == 1);
            let entry = raw.entry(COUNT.0, SMALL, b"published");
            raw.push(INTERACTIVE, &entry);
            ready();
            for_ever();
        }
        "not-taken" => {
            let mut raw = Raw::connect(&path);
            for _ in 0..3 {
                let entry = raw.entry(COUNT.0, SMALL, b"");
                raw.push(INTERACTIVE, &entry);
            }
            raw.ring();
            eventually("all have been answered", || {
                raw.word32(raw.layout.published[INTERACTIVE]).load(SeqCst) == 4
            });
            ready();
            for_ever();
        }
        "gate" => {
            let client = client(&path, WaitPolicy::Block);
            let connection = client.open().unwrap();
            connection.call(GATE, b"").unwrap();
        }
        "count" => {
            let client = client(&path, WaitPolicy::Block);
            let connection = client.open().unwrap();
            ready();
            loop {
                connection.call(COUNT, b"").unwrap();
            }
        }
        "give" => {
            let raw = Raw::connect(&path);
            // Whoever started us gets a duplicate of the session's socket.
            send_with_fds(std::io::stdin().as_fd(), b"x", &[raw.socket.as_fd()]);
            for_ever();
        }
        "signalled" => {
            let signal = signal_hook::consts::SIGUSR1;
            let hits = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
            signal_hook::flag::register_usize(signal, hits.clone(), 1).unwrap();
            ready();
            for round in 0..300u32 {
                let policy = ALL[round as usize % 2];
                let client = client(&path, policy);
                let connection = client.open().unwrap();
                let body = round.to_le_bytes();
                for _ in 0..5 {
                    assert_eq!(connection.call(MessageType::ECHO, &body).unwrap(), body);
                }
            }
            assert_eq!(hits.load(SeqCst), 1, "no signal came, so nothing was tested");
        }
        "server" => common::serve_here(&path, move |state| {
            eventually("the gate's handler runs", || state.entered.load(SeqCst) == 1);
            ready();
        }),
        other => panic!("no part is called {other}"),
    }
}

/// Goal:   a client that is killed anywhere costs nothing but itself: descriptors, segments and connections
///         of the server come back, and a bystander never notices (I2).
/// Method: 50 clients in every stage of a session's life, killed after a random number of the bystander's
///         calls; the seed is printed.
#[test]
fn f1_f2_f3_f6_f7_r3_3_clients_killed_at_any_time_leave_nothing_behind() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let kept = bystander.client.open().unwrap();
    let baseline = (server.process.fds(), server.process.segments());
    let mut seed = u64::from(std::process::id()) << 20 | 1;
    eprintln!("seed {seed}");
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let roles = ["silent", "deaf", "idle", "busy", "half-written"];
    for round in 0..50 {
        let role = roles[round % roles.len()];
        // Half of them are killed on their way, half of them once they are where they want to be.
        let mut actor = match round / roles.len() % 2 {
            0 => Actor::ready(role, server.path()),
            _ => Actor::start(role, server.path()),
        };
        for call in 0..random(40) {
            let body = call.to_le_bytes();
            assert_eq!(kept.call(MessageType::ECHO, &body).unwrap(), body);
        }
        actor.process.kill();
        bystander.check(role);
    }
    eventually("descriptors and segments are back", || {
        (server.process.fds(), server.process.segments()) == baseline
    });
    eventually("connections are back", || stat(&kept, "connections_open") == 1);
    assert_eq!(stat(&kept, "protocol_violations"), 0);
}

/// Goal:   a client that is gone when its segment is to be sent leaves nothing: no session, no descriptor, no segment, and
///         its part of the memory budget can be had again (F2).
/// Method: while the server is stopped sockets say hello and are closed; then it goes on, and answers one that stays.
#[test]
fn f2_a_client_that_is_gone_after_its_hello_leaves_nothing() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let budget = bystander.budget();
    let baseline = (server.process.fds(), server.process.segments());
    server.process.stop();
    for _ in 0..20 {
        let socket = connect_silently(server.path());
        send(&socket, hello().as_bytes()).unwrap();
    }
    server.process.signal(Signal::CONT);
    // Sockets are accepted in their order.
    drop(client(server.path(), WaitPolicy::Block));
    bystander.check("clients that are gone");
    assert_eq!(bystander.stat("sessions_opened"), 2);
    eventually("descriptors and segments are back", || {
        (server.process.fds(), server.process.segments()) == baseline
    });
    eventually("the budget is as before", || bystander.budget() == budget);
}

/// Goal:   a session ends when its socket is closed, although the process that opened it lives: the hang-up alone is
///         enough (F7).
/// Method: clients of this very process, which stays.
#[test]
fn f7_a_client_that_closes_its_socket_and_lives_on_is_gone() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    for _ in 0..5 {
        let raw = Raw::connect(server.path());
        assert_eq!(server.process.segments(), baseline.1 + 1);
        drop(raw);
        eventually("descriptors and segments are back", || {
            (server.process.fds(), server.process.segments()) == baseline
        });
        bystander.check("a socket that was closed");
    }
}

/// Goal:   what was published and not consumed when its client died is not run (F4); what was half written
///         is not seen (F3).
/// Method: the server sleeps; the client writes half of an entry and rings, or all of it and does not, and is killed; no sweep
///         comes meanwhile.
#[test]
fn f3_f4_what_was_not_consumed_when_its_client_died_is_not_run() {
    for role in ["half-written", "not-rung"] {
        let config = ServerConfig { sweep_interval: Duration::from_secs(60), ..ServerConfig::default() };
        let server = TestServer::start_with(config);
        let bystander = Bystander::new(server.path());
        let mut actor = Actor::ready(role, server.path());
        actor.process.kill();
        eventually("the session has ended", || bystander.stat("sessions_ended") == 1);
        bystander.check(role);
        assert_eq!(server.state.counted.load(SeqCst), 0, "a dead client's call was run");
        drop(bystander);
        assert!(server.stop().ended(DisconnectReason::PeerDied) >= 1);
    }
}

/// Goal:   a client killed while its handler runs: the handler ends on its private copy, its answer goes
///         nowhere, the server and others go on (F5).
/// Method: a gate holds the handler while the client is killed.
#[test]
fn f5_a_client_killed_during_its_handler_costs_nobody_anything() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let mut actor = Actor::start("gate", server.path());
        eventually("the handler runs", || server.entered() == 1);
        actor.process.kill();
        server.open_gate();
        bystander.check("a client killed during its handler");
        eventually("the session has ended", || bystander.stat("sessions_ended") == 1);
        assert_eq!(server.state.counted.load(SeqCst), 1, "the side effect stays");
        assert_eq!(bystander.stat("calls_handler_panic"), 0);
    }
}

/// Goal:   answers that a dead client has not taken are dropped with it (F6).
/// Method: killed between completion and taking.
#[test]
fn f6_answers_that_a_dead_client_has_not_taken_are_dropped_with_it() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let mut actor = Actor::ready("not-taken", server.path());
    actor.process.kill();
    eventually("the session has ended", || bystander.stat("sessions_ended") == 1);
    bystander.check("answers not taken");
    assert_eq!(server.state.counted.load(SeqCst), 3);
}

/// Goal:   a stopped client stops nobody else, and goes on where it was once it is continued.
/// Method: several clients stopped in mid-call, many calls of a bystander, then SIGCONT: they call on.
#[test]
fn f8_r3_3_stopped_clients_stop_nobody_and_go_on_afterwards() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let actors: Vec<Actor> = (0..3).map(|_| Actor::ready("count", server.path())).collect();
    for _ in 0..5 {
        for actor in &actors {
            actor.process.stop();
        }
        for _ in 0..20 {
            bystander.check("stopped clients");
        }
        let before = server.state.counted.load(SeqCst);
        for actor in &actors {
            actor.process.signal(Signal::CONT);
        }
        eventually("they call on", || server.state.counted.load(SeqCst) >= before + 30);
    }
    assert_eq!(bystander.stat("sessions_ended"), 0);
}

/// Goal:   a session ends with the process that opened it, although another process holds its socket: the
///         pidfd decides, not the socket, and not a pid number (F9, F10).
/// Method: the client passes its socket to the test, then is killed; the test still holds the duplicate.
#[test]
fn f9_f10_a_session_ends_with_its_process_although_another_holds_its_socket() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    for _ in 0..5 {
        let (ours, theirs) = socketpair();
        let mut command = copy_of_test("child", "give", server.path());
        let mut owner = Process(command.stdin(Stdio::from(theirs)).spawn().unwrap());
        drop(command);
        let duplicate = receive_fd(&ours);
        assert_eq!(server.process.segments(), baseline.1 + 1);
        owner.kill();
        assert!(matches!(hear(&duplicate), Heard::End), "the server ended it");
        bystander.check("a socket held by another process");
        eventually("descriptors and segments are back", || {
            (server.process.fds(), server.process.segments()) == baseline
        });
    }
}

fn socketpair() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn receive_fd(socket: &OwnedFd) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    let mut buffers = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.next().expect("a descriptor came")
}

/// Goal:   when the server dies, calls that it had not started are known not to have run (FAULTS §5); a
///         caller that waits is told, whichever way it waits (F51); new clients are told that nobody is
///         there (F50, trap 9).
/// Method: the server is stopped, calls are submitted, blocking and pipelined, and then it is killed.
#[test]
fn f50_f51_trap9_calls_that_a_killed_server_had_not_started_are_not_executed() {
    for policy in ALL {
        let mut server = ServerProcess::start(&[]);
        let path = server.path().to_owned();
        let blocked = client(&path, policy);
        blocked.open().unwrap().call(MessageType::PING, b"").unwrap();
        let pipelined = client(&path, policy);
        let id = pipelined.open().unwrap().detach();
        pipelined.attached(id).call(MessageType::PING, b"").unwrap();
        server.process.stop();
        for tag in 0..3 {
            pipelined.attached(id).submit(MessageType::ECHO, b"never", &tagged(tag)).unwrap();
        }
        pipelined.flush().unwrap();
        let waiting = std::thread::spawn(move || {
            let opened = blocked.open().map(|c| c.number());
            (opened, blocked)
        });
        server.process.kill();
        eventually("the blocked caller is told", || waiting.is_finished());
        let (opened, blocked) = waiting.join().unwrap();
        assert!(matches!(opened, Err(IpcError::NotExecuted)), "{opened:?}");
        let again = returns("a later call is told, too", move || blocked.open().map(|c| c.number()));
        assert!(again.is_err());
        returns("the pipelined caller is told", move || {
            for tag in 0..3 {
                assert!(pipelined.wait(None).unwrap());
                let answer = pipelined.poll().unwrap().unwrap();
                assert_eq!(answer.tag(), tag);
                assert!(matches!(answer.result(), Err(IpcError::NotExecuted)), "{:?}", answer.result());
            }
            assert!(pipelined.poll().unwrap().is_none());
            assert!(pipelined.wait(None).is_err(), "nothing will ever come");
        });
        let error = IpcClient::connect(&path).map(|_| ()).unwrap_err();
        assert!(matches!(error, IpcError::NotRunning { .. }), "{error}");
    }
}

/// Goal:   a call that had been started when the server died may have run, and is reported so; those behind
///         it in the same batch have not (the position is published call by call).
/// Method: a server whose handler never returns; one call runs, three wait behind it; then it is killed.
#[test]
fn f50_a_started_call_is_unknown_and_those_behind_it_are_not_executed() {
    for policy in ALL {
        let directory = TestDir::new();
        let path = directory.join("s");
        let mut server = Actor::start("server", &path);
        eventually("the server serves", || IpcClient::connect(&path).is_ok());
        let caller = client(&path, policy);
        let id = caller.open().unwrap().detach();
        for tag in 0..4 {
            let message_type = if tag == 0 { GATE } else { COUNT };
            caller.attached(id).submit(message_type, b"", &tagged(tag)).unwrap();
        }
        caller.flush().unwrap();
        server.wait_until_ready();
        server.process.kill();
        returns("every call is accounted for", move || {
            for tag in 0..4 {
                assert!(caller.wait(None).unwrap());
                let answer = caller.poll().unwrap().unwrap();
                assert_eq!(answer.tag(), tag);
                match tag {
                    0 => assert!(matches!(answer.result(), Err(IpcError::ConnectionLost))),
                    _ => assert!(matches!(answer.result(), Err(IpcError::NotExecuted)), "{tag}"),
                }
            }
        });
    }
}

/// Goal:   F50, F51: a caller whose long request is still going out is told of the server's death, and that the call was
///         not executed only if no entry of it had been taken.
/// Method: a request longer than its window, once to a stopped server, once to a handler that takes no more of it; then
///         the server is killed.
#[test]
fn f50_f51_a_caller_in_the_midst_of_a_long_request_is_told_what_became_of_it() {
    for policy in ALL {
        for started in [false, true] {
            let directory = TestDir::new();
            let path = directory.join("s");
            let mut server = Actor::start("server", &path);
            eventually("the server serves", || IpcClient::connect(&path).is_ok());
            let caller = client(&path, policy);
            let id = caller.open().unwrap().detach();
            if !started {
                server.process.stop();
            }
            let calling = std::thread::spawn(move || caller.attached(id).call(HELD, &[7; 1 << 20]));
            if started {
                server.wait_until_ready();
            }
            server.process.kill();
            eventually("the caller is told", || calling.is_finished());
            let told = calling.join().unwrap();
            match started {
                true => assert!(matches!(told, Err(IpcError::ConnectionLost)), "{told:?}"),
                // Killed before or after it wrote its first entry.
                false => assert!(matches!(told, Err(IpcError::NotExecuted)), "{told:?}"),
            }
        }
    }
}

/// Goal:   answers that had come when the server died are handed out as they are.
/// Method: answered, not taken, killed; then taken.
#[test]
fn f50_answers_that_had_come_when_the_server_died_are_handed_out() {
    for policy in ALL {
        let mut server = ServerProcess::start(&[]);
        let caller = client(server.path(), policy);
        let id = caller.open().unwrap().detach();
        let other = Bystander::new(server.path());
        for tag in 0..3 {
            caller.attached(id).submit(MessageType::ECHO, &[tag as u8; 100], &tagged(tag)).unwrap();
        }
        caller.flush().unwrap();
        eventually("they have been answered", || other.stat("calls") >= 3 + 4);
        // Questions for that are calls, too: the first answer is there, and with it those of its batch.
        assert!(caller.wait(None).unwrap());
        server.process.kill();
        returns("the answers are there", move || {
            for tag in 0..3 {
                assert!(caller.wait(None).unwrap());
                let answer = caller.poll().unwrap().unwrap();
                assert_eq!((answer.tag(), answer.to_vec().unwrap()), (tag, vec![tag as u8; 100]));
            }
            assert!(caller.wait(None).is_err());
        });
    }
}

/// Goal:   a caller that waits for room in a dead session is told, too, although answers lie there that
///         nobody has taken (F51).
/// Method: one answer kept for a poll that never comes, all other slots in flight in a stopped server that
///         is then killed; a blocking call.
#[test]
fn f51_a_caller_that_waits_for_room_notices_the_servers_death() {
    for policy in ALL {
        let mut server = ServerProcess::start(&[]);
        let config = ClientConfig { policy, ..ClientConfig::smallest() };
        let caller = IpcClient::connect_with(server.path(), &config).unwrap();
        let id = caller.open().unwrap().detach();
        caller.attached(id).submit(MessageType::ECHO, b"kept", &tagged(1)).unwrap();
        // Waiting for its own answer, this call comes across the other and keeps it.
        caller.attached(id).call(MessageType::PING, b"").unwrap();
        server.process.stop();
        while caller.attached(id).submit(MessageType::ECHO, b"", &tagged(2)).is_ok() {}
        caller.flush().unwrap();
        server.process.kill();
        returns("the call for which there is no room returns", move || {
            let told = caller.attached(id).call(MessageType::ECHO, b"no room").unwrap_err();
            assert!(matches!(told, IpcError::NotExecuted | IpcError::WouldBlock), "{told}");
        });
    }
}

/// Goal:   who only ever polls learns of the server's death as well (trap 9).
/// Method: one call in flight in a stopped server that is killed; poll until something comes.
#[test]
fn f51_trap9_a_caller_that_only_polls_notices_the_servers_death() {
    for policy in ALL {
        let mut server = ServerProcess::start(&[]);
        let caller = client(server.path(), policy);
        let id = caller.open().unwrap().detach();
        server.process.stop();
        caller.attached(id).submit(MessageType::ECHO, b"", &tagged(1)).unwrap();
        caller.flush().unwrap();
        server.process.kill();
        let result = returns("a poll brings the call's end", move || {
            loop {
                match caller.poll() {
                    Ok(Some(answer)) => return answer.result().map(|_| ()),
                    Ok(None) => std::thread::yield_now(),
                    Err(error) => return Err(error),
                }
            }
        });
        assert!(matches!(result, Err(IpcError::NotExecuted)), "{result:?}");
    }
}

/// Goal:   connections and clients of a dead server can be dropped without a hang or a panic.
/// Method: dropped with calls in flight, with answers held, in any order.
#[test]
fn f50_what_is_left_of_a_dead_session_can_be_dropped() {
    for policy in ALL {
        let mut server = ServerProcess::start(&[]);
        let caller = client(server.path(), policy);
        let id = caller.open().unwrap().detach();
        caller.attached(id).submit(MessageType::ECHO, b"held", &tagged(1)).unwrap();
        caller.wait(None).unwrap();
        server.process.stop();
        caller.attached(id).submit(MessageType::ECHO, b"in flight", &tagged(2)).unwrap();
        caller.flush().unwrap();
        server.process.kill();
        returns("everything is dropped", move || {
            let connection = caller.open();
            assert!(connection.is_err());
            let held = caller.poll().unwrap();
            drop(connection);
            drop(held);
            drop(caller);
        });
    }
}

/// Goal:   signals that mean nothing to the server disturb no call: EINTR is not an error (F41).
/// Method: stopped and continued, and told of window changes, again and again during calls.
#[test]
fn f41_signals_to_the_server_disturb_no_call() {
    for policy in ["block", "spin"] {
        let server = ServerProcess::start(&["--policy", policy]);
        let bystander = Bystander::new(server.path());
        let path = server.path().to_owned();
        let caller = std::thread::spawn(move || {
            let client = client(&path, WaitPolicy::Block);
            let connection = client.open().unwrap();
            for round in 0..2000u32 {
                let body = round.to_le_bytes();
                assert_eq!(connection.call(MessageType::ECHO, &body).unwrap(), body);
            }
        });
        for _ in 0..50 {
            server.process.stop();
            server.process.signal(Signal::WINCH);
            server.process.signal(Signal::CONT);
            server.process.signal(Signal::PIPE);
            bystander.check("signals");
        }
        eventually("all calls have been answered", || caller.is_finished());
        caller.join().unwrap();
        assert_eq!(bystander.stat("protocol_violations"), 0);
    }
}

/// Goal:   a signal handler that runs in the client's thread disturbs neither connecting nor calling (F41).
/// Method: a client with a handler for SIGUSR1 is sent that signal, to the thread that calls, until it is done.
#[test]
fn f41_signals_to_the_client_disturb_neither_connecting_nor_calling() {
    let server = ServerProcess::start(&[]);
    let mut actor = Actor::ready("signalled", server.path());
    let mut status = None;
    eventually("it has made all its calls", || {
        status = actor.process.0.try_wait().unwrap();
        if status.is_none() {
            actor.process.signal_threads(Signal::USR1);
        }
        status.is_some()
    });
    assert!(status.unwrap().success(), "{status:?}");
}

/// Goal:   SIGTERM and SIGINT stop the server in order: clients are told why, the socket is removed, the exit
///         status is 0 (R3.7).
/// Method: one idle client, one that waits for an answer, one that polls; both signals.
#[test]
fn r3_7_f49_a_server_told_to_stop_tells_its_clients_and_leaves_nothing() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = ServerProcess::start(&[]);
        let idle = client(server.path(), WaitPolicy::Block);
        let id = idle.open().unwrap().detach();
        let path = server.path().to_owned();
        let (calling, is_calling) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            let client = client(&path, WaitPolicy::Spin);
            let connection = client.open().unwrap();
            calling.send(()).unwrap();
            loop {
                if let Err(error) = connection.call(MessageType::PING, b"") {
                    return (error, client.wait(None).unwrap_err());
                }
            }
        });
        is_calling.recv().unwrap();
        let silent = connect_silently(server.path());
        Bystander::new(server.path()).check("nothing");
        server.process.signal(signal);
        let status = server.process.wait();
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(!server.path().exists(), "the socket is gone");
        assert!(server.log().contains("stopped after"), "{}", server.log());
        eventually("the busy client is told", || waiting.is_finished());
        let (first, later) = waiting.join().unwrap();
        let draining = DisconnectReason::Draining;
        // The call under way may have been refused, not started or lost; after it the reason is plain.
        let refused = matches!(first, IpcError::Draining { .. } | IpcError::NotExecuted);
        let lost = matches!(first, IpcError::ConnectionLost | IpcError::Disconnected(_));
        assert!(refused || lost, "{first}");
        assert!(matches!(later, IpcError::Disconnected(r) if r == draining), "{later}");
        returns("the idle client is told", move || {
            idle.attached(id).call(MessageType::PING, b"").unwrap_err();
            let told = idle.attached(id).call(MessageType::PING, b"").unwrap_err();
            assert!(matches!(told, IpcError::Disconnected(r) if r == draining), "{told}");
        });
        // Told that the server stops, unless its time was over before.
        if let Heard::Welcome(welcome, memory) = hear(&silent) {
            assert_eq!((welcome.code, memory.is_none()), (code::DRAINING, true));
        }
        let error = IpcClient::connect(server.path()).map(|_| ()).unwrap_err();
        assert!(matches!(error, IpcError::NotRunning { .. }), "{error}");
    }
}

/// Goal:   a server killed and started again at once takes its path and serves: nothing of the dead one is
///         in its way, and clients can connect right then (R3.4, F50, F52).
/// Method: kill and restart, 20 times, with clients connected and without.
#[test]
fn f50_f52_r3_4_a_killed_server_can_be_started_again_at_once() {
    let mut server = ServerProcess::start(&[]);
    for round in 0..20 {
        let left = (round % 2 == 0).then(|| Bystander::new(server.path()));
        server.process.kill();
        server.restart(&[]);
        Bystander::new(server.path()).check("a restart");
        drop(left);
    }
}

/// Goal:   trap 11: no thread per connection, and a server with nothing to do does nothing.
/// Method: many idle sessions; a thread for each core, that of the providers, the one that watches over reactors and that which
///         tells of metrics; nobody asks anything while the server sleeps and wakes for some sweeps, as its context
///         switches tell; then its own count of wake-ups.
#[test]
fn trap11_many_idle_sessions_cost_no_thread_and_no_wake_up() {
    let server = ServerProcess::start(&[]);
    let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
    let sessions: Vec<_> =
        (0..50).map(|_| IpcClient::connect_with(server.path(), &config).unwrap()).collect();
    let connections: Vec<_> = sessions.iter().map(|session| session.open().unwrap().detach()).collect();
    let watcher = Bystander::new(server.path());
    let tasks = || std::fs::read_dir(format!("/proc/{}/task", server.process.0.id())).unwrap();
    let (providers, watch, metrics) = (1, 1, 1);
    // What reactors are counted by; a quota of time is no core less.
    let cores = rustix::thread::sched_getaffinity(None).unwrap().count() as usize;
    assert_eq!(tasks().count(), cores + providers + watch + metrics);
    let slept = || {
        let status = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()
        };
        let count = |text: String| {
            let line = text.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:").map(str::trim));
            line.unwrap().parse::<u64>().unwrap()
        };
        tasks().map(status).map(count).sum::<u64>()
    };
    let (wakeups, sweeps) = (watcher.stat("wakeups"), watcher.stat("sweeps"));
    let before = slept();
    eventually("the server has slept and woken some times", || slept() >= before + 20);
    let (woken, swept) = (watcher.stat("wakeups") - wakeups, watcher.stat("sweeps") - sweeps);
    assert!(swept >= 5, "only {swept} sweeps");
    // Only the two looks woke the server, each with an OPEN, a call and a CLOSE; a ring that comes late may wake a
    // server that has answered and gone to sleep again. Fifty sessions would have woken it hundreds of times.
    assert!(woken <= 2 * 3 * 2, "{woken} wake-ups in {swept} sweeps");
    assert_eq!(watcher.stat("sweeps_healed"), 0);
    drop(connections);
}

/// Goal:   R2.9, F24: the deadline of a call that was over long before wakes nobody: a server whose last client has gone sleeps
///         through it.
/// Method: a call in frames, that is answered in time; its client goes; the moment passes; the server's processor time has to
///         stand still.
#[test]
fn r2_9_f24_the_deadline_of_a_call_that_is_over_leaves_a_sleeping_server() {
    let server = ServerProcess::start(&["--reactors", "1"]);
    let client = IpcClient::connect(server.path()).unwrap();
    let deadline = Duration::from_millis(300);
    let options = CallOptions { deadline: Some(deadline), ..CallOptions::default() };
    let begun = Instant::now();
    let answer = client.open().unwrap().call_with(MessageType::ECHO, &[7; 100_000], &options, |a| a.to_vec());
    assert_eq!(answer.unwrap().unwrap(), [7; 100_000]);
    drop(client);
    eventually("the moment has passed", || begun.elapsed() > deadline);
    eventually("the server sleeps", || server.process.rests());
}

/// Goal:   F24: a client that was left alone for its needless ringing and goes away meanwhile leaves a server that
///         sleeps.
/// Method: a storm until the only session rests, then its end; the server's processor time has to stand still.
#[test]
fn f24_a_stormer_that_leaves_while_it_rests_leaves_a_sleeping_server() {
    let server = ServerProcess::start(&["--reactors", "1"]);
    for _ in 0..5 {
        let raw = Raw::connect(server.path());
        for _ in 0..2000 {
            raw.ring();
        }
        drop(raw);
        eventually("the server sleeps", || server.process.rests());
    }
}

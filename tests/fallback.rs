//! The backend without io_uring (F38): when it is chosen, and that whatever users and attackers do with the other one goes
//! with it as well. `ci/fallback.sh` runs all test programs on it; what is here is run with every build.

mod common;

use common::process::{Actor, ServerProcess, copy_of_test, has_io_uring, role, until_dismissed};
use common::raw::{Raw, SMALL};
use common::streams::CORE;
use common::{Bystander, COUNT, GATE, TestDir, TestServer, client, eventually, stat};
use doorbell::protocol::handshake::{DisconnectReason, LaneChoice, doorbell_kind};
use doorbell::{Backend, ClientConfig, IpcClient, MessageType, ServerConfig, WaitPolicy};
use doorbell_shm::lane::INTERACTIVE;
use rustix::io::Errno;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

const ALL: [WaitPolicy; 3] = [WaitPolicy::Handoff, WaitPolicy::Spin, WaitPolicy::Block];

fn config(policy: WaitPolicy, reactors: u32) -> ServerConfig {
    ServerConfig { policy, reactors, backend: Backend::Epoll, ..ServerConfig::default() }
}

/// A server of one reactor without io_uring.
fn server(policy: WaitPolicy) -> TestServer {
    TestServer::start_with(config(policy, 1))
}

/// Sessions that the server of this client has.
fn open_sessions(client: &IpcClient) -> u64 {
    let connection = client.open().unwrap();
    let ended = stat(&connection, "sessions_ended");
    stat(&connection, "sessions_opened") - ended
}

/// What a copy of this program does where io_uring is refused: it becomes a server, with the arguments of the role.
#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    match role.as_str() {
        "client" => {
            let client = client(&path, WaitPolicy::Block);
            assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"here").unwrap(), b"here");
            common::process::ready();
            until_dismissed();
        }
        role => {
            let (answer, arguments) = role.split_once(' ').unwrap();
            refuse_io_uring(if answer == "ENOSYS" { Errno::NOSYS } else { Errno::PERM });
            let mut serve = Command::new(env!("CARGO_BIN_EXE_doorbell"));
            serve.arg("serve").arg("--socket").arg(path).args(arguments.split_whitespace());
            let error = std::os::unix::process::CommandExt::exec(serve.env("NO_COLOR", "1"));
            panic!("exec: {error}");
        }
    }
}

/// Refuses io_uring to this thread, as container engines do by default: to what their profiles do not allow they answer
/// EPERM or ENOSYS.
fn refuse_io_uring(answer: Errno) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let calls = [425, 426, 427].map(|call| (call, Vec::new())).into();
    let refusal = SeccompAction::Errno(answer.raw_os_error() as u32);
    let here = std::env::consts::ARCH.try_into().unwrap();
    let filter: BpfProgram =
        SeccompFilter::new(calls, SeccompAction::Allow, refusal, here).unwrap().try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
}

/// Goal:   F38: where io_uring is refused a server serves with epoll and says so once, with the reason; one that was told
///         to use io_uring does not start, and says why.
/// Method: `doorbell serve` behind filters with either answer that container engines give, with and without `--backend`.
#[test]
fn f38_where_io_uring_is_refused_epoll_serves_and_the_log_says_why() {
    let directory = TestDir::new();
    let log = directory.join("log");
    let start = |arguments: &str| {
        let mut command = copy_of_test("child", arguments, &directory.join("s"));
        command.stderr(std::fs::File::create(&log).unwrap());
        common::process::Process(command.stdin(Stdio::null()).spawn().unwrap())
    };
    let said = || std::fs::read_to_string(&log).unwrap();
    for answer in ["EPERM", "ENOSYS"] {
        let mut server = start(&format!("{answer} --policy block"));
        eventually("the server serves", || said().contains("serving at"));
        Bystander::new(&directory.join("s")).check("the start");
        server.signal(rustix::process::Signal::TERM);
        assert!(server.wait().success());
        assert_eq!(said().matches("\"backend\":\"epoll\"").count(), 1, "{answer}: {}", said());
        assert!(said().contains("creating a ring") && said().contains("seccomp"), "{answer}: {}", said());

        let mut server = start(&format!("{answer} --backend io-uring"));
        assert_eq!(server.wait().code(), Some(1), "{answer}: {}", said());
        assert!(said().contains("creating a ring") && said().contains("seccomp"), "{answer}: {}", said());
    }
}

/// Goal:   F38: either backend can be forced, by the option and by what stands for the file, and is named once.
#[test]
fn f38_either_backend_can_be_forced() {
    let mut told = vec!["epoll"];
    if has_io_uring("forcing it") {
        told.push("io-uring");
    }
    for backend in told {
        let server = ServerProcess::start(&["--backend", backend]);
        Bystander::new(server.path()).check("the start");
        let line = format!("\"backend\":\"{backend}\"");
        eventually("the backend is named", || server.log().contains(&line));
        assert_eq!(server.log().matches("\"backend\":").count(), 1, "{}", server.log());
    }
    let directory = TestDir::new();
    let log = directory.join("log");
    let mut serve = common::process::doorbell();
    serve.arg("serve").arg("--socket").arg(directory.join("s")).env("DOORBELL_IPC_BACKEND", "epoll");
    serve.stdin(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let _server = common::process::Process(serve.spawn().unwrap());
    eventually("the backend is named", || {
        std::fs::read_to_string(&log).unwrap().contains("\"backend\":\"epoll\"")
    });
    assert!("uring".parse::<Backend>().unwrap_err().to_string().contains("io-uring or epoll"));
}

/// Goal:   F38: the handshake says how the server is rung; calls of every policy on either side are answered, long ones
///         too, and a server that never sleeps is never rung.
/// Method: all pairs of policies; the server's wakeups.
#[test]
fn f38_calls_are_answered_whoever_waits_in_whatever_way() {
    for policy in ALL {
        let server = server(policy);
        assert_eq!(Raw::connect(server.path()).welcome.doorbell_kind, doorbell_kind::SOCKET);
        for theirs in ALL {
            let client = client(server.path(), theirs);
            let connection = client.open().unwrap();
            for len in [0, 100, 5000, 16_384, 100_000, 1 << 20] {
                let request: Vec<u8> = (0..len).map(|i| (i * 7 + len) as u8).collect();
                assert!(connection.call(MessageType::ECHO, &request).unwrap() == request, "{len}");
            }
            // Asleep for sure, since nobody sent anything for as long as it takes.
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(connection.call(MessageType::ECHO, b"cold").unwrap(), b"cold");
        }
        let metrics = server.stop();
        assert_eq!(metrics.wakeups == 0, policy == WaitPolicy::Spin, "{}", metrics.wakeups);
    }
}

/// Goal:   F38: a sleeping server gets one byte for a call and no more: bells are marked and taken as ever.
/// Method: a hundred calls one by one to a server that sleeps at once. Each wakes it once, and none is left to the sweep.
#[test]
fn f38_a_bell_is_rung_once_for_each_sleep() {
    const CALLS: u64 = 100;
    let server = server(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let before = stat(&connection, "wakeups");
    for i in 0..CALLS {
        assert_eq!(connection.call(MessageType::ECHO, &i.to_le_bytes()).unwrap(), i.to_le_bytes());
    }
    let woken = stat(&connection, "wakeups") - before;
    // Beside others on this core it does not get as far as sleeping each time.
    assert!((1..=CALLS + 1).contains(&woken), "{woken}");
    assert_eq!(stat(&connection, "sweeps_healed"), 0);
}

/// Goal:   F38: lanes with other reactors are granted with the socket that they are rung by, work, and end with their
///         session.
/// Method: two reactors on two cores; a raw client on a further lane, whose calls are answered by another thread.
#[test]
fn f38_further_lanes_have_a_socket_of_their_own() {
    if rustix::thread::sched_getaffinity(None).unwrap().count() < 2 {
        eprintln!("skipped, for it takes two cores");
        return;
    }
    for policy in ALL {
        let server = TestServer::start_with(config(policy, 2));
        let bystander = Bystander::new(server.path());
        let mut raw = Raw::connect_with_lanes(server.path(), 2);
        raw.connection = raw.open(0, 0);
        let home = raw.call(&raw.entry(CORE.0, SMALL, b""));
        let at_home = raw.slot(SMALL, home.len as usize);
        raw.use_lane(LaneChoice::NotOn(raw.welcome.home_core));
        raw.push(INTERACTIVE, &raw.attach());
        for _ in 0..20 {
            let there = raw.call(&raw.entry(CORE.0, SMALL, b""));
            assert_ne!(raw.slot(SMALL, there.len as usize), at_home, "answered by the other reactor");
            std::thread::sleep(Duration::from_micros(500));
        }
        drop(raw);
        eventually("the session has ended", || open_sessions(&bystander.client) == 1);
        bystander.check("a further lane that is gone");
    }
}

/// Goal:   F24: whoever sends bytes for nothing is left alone, then ended; others are answered.
/// Method: a flood of bytes on the session's socket of a lane that has nothing to do.
#[test]
fn f24_f38_a_storm_of_bytes_is_damped_and_ended() {
    let patience = Duration::from_millis(200);
    let server =
        TestServer::start_with(ServerConfig { storm_patience: patience, ..config(WaitPolicy::Block, 1) });
    let bystander = Bystander::new(server.path());
    let raw = Raw::connect(server.path());
    let before = bystander.stat("storms_damped");
    eventually("the storm is ended", || {
        raw.wake();
        !raw.runs()
    });
    assert_eq!(raw.ended(), DisconnectReason::DoorbellAbuse);
    assert!(bystander.stat("storms_damped") > before + 3);
    bystander.check("a storm of bytes");
}

/// Goal:   F11, S9: what is no ring and no wish on a session's socket ends the session.
#[test]
fn f11_f38_other_bytes_on_the_socket_end_the_session() {
    let server = server(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    for bytes in [&b"xx"[..], &[0; 16], &[1; 100]] {
        let raw = Raw::connect(server.path());
        common::raw::send(&raw.socket, bytes).unwrap();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
        bystander.check("bytes that mean nothing");
    }
}

/// Goal:   F5, F7, F51: the death of a client is noticed, whatever it had sent; that of the server by its clients.
#[test]
fn f7_f38_deaths_are_noticed() {
    let server = server(WaitPolicy::Handoff);
    let bystander = Bystander::new(server.path());
    for _ in 0..3 {
        let mut actor = Actor::ready("client", server.path());
        assert_eq!(open_sessions(&bystander.client), 2);
        actor.process.kill();
        eventually("the session has ended", || open_sessions(&bystander.client) == 1);
    }
    let mut process = ServerProcess::start(&["--backend", "epoll", "--policy", "block"]);
    let client = client(process.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    assert_eq!(connection.call(MessageType::ECHO, b"one").unwrap(), b"one");
    process.process.kill();
    assert!(connection.call(MessageType::ECHO, b"two").is_err());
    process.restart(&["--backend", "epoll"]);
    Bystander::new(process.path()).check("a restart");
}

/// Goal:   hundreds of sessions fit, each is answered, and all of them go away without a trace (F5, I2).
#[test]
fn f38_many_sessions_come_and_go() {
    const SESSIONS: usize = 300;
    doorbell::config::raise_file_limit(4 * SESSIONS as u64).unwrap();
    let server = ServerProcess::start(&["--backend", "epoll", "--policy", "block", "--reactors", "1"]);
    let first = client(server.path(), WaitPolicy::Block);
    assert_eq!(open_sessions(&first), 1);
    let before = server.process.fds();
    for round in 0..2 {
        let clients: Vec<IpcClient> = (0..SESSIONS)
            .map(|_| IpcClient::connect_with(server.path(), &ClientConfig::default()).unwrap())
            .collect();
        for (i, client) in clients.iter().enumerate() {
            let request = (i + round).to_le_bytes();
            assert_eq!(client.open().unwrap().call(MessageType::ECHO, &request).unwrap(), request);
        }
        drop(clients);
        eventually("all have gone", || open_sessions(&first) == 1);
        eventually("their descriptors are closed", || server.process.fds() == before);
    }
}

/// Goal:   R2.9, F38: a call whose deadline has passed is answered so and not run, here as with io_uring.
/// Method: a handler of another client holds the only reactor until the deadline of a call that waits has passed; one that
///         has time is run after it.
#[test]
fn f38_deadlines_are_kept() {
    let server = server(WaitPolicy::Block);
    let (holding, waiting) =
        (client(server.path(), WaitPolicy::Block), client(server.path(), WaitPolicy::Block));
    let connection = waiting.open().unwrap();
    let gate = holding.open().unwrap();
    gate.submit(GATE, b"", &doorbell::CallOptions::default()).unwrap();
    holding.flush().unwrap();
    eventually("the gate holds the reactor", || server.entered() == 1);
    let deadline = Duration::from_millis(20);
    let submit = |tag, deadline| {
        let options =
            doorbell::CallOptions { tag, deadline: Some(deadline), ..doorbell::CallOptions::default() };
        connection.submit(COUNT, b"", &options).unwrap();
    };
    submit(1, deadline);
    submit(2, Duration::from_secs(3600));
    waiting.flush().unwrap();
    let begun = std::time::Instant::now();
    eventually("the deadline has passed", || begun.elapsed() > 2 * deadline);
    server.open_gate();
    let mut ended = std::collections::HashMap::new();
    while ended.len() < 2 {
        assert!(waiting.wait(Some(Duration::from_secs(30))).unwrap(), "no answer within 30 s");
        while let Some(answer) = waiting.poll().unwrap() {
            ended.insert(answer.tag(), answer.result());
        }
    }
    assert!(matches!(ended[&1], Err(doorbell::IpcError::DeadlineExceeded)), "{ended:?}");
    assert!(ended[&2].is_ok(), "{ended:?}");
    assert_eq!(server.state.counted.load(SeqCst), 2, "the gate and the second");
}

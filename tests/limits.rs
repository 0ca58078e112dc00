//! What happens at the limits: quotas, half-open handshakes, connect storms, and a kernel that gives no more
//! descriptors or memory (F26 to F29, F32 to F34, F39, F40). A bystander must not notice any of it.

mod common;

use common::process::{
    Actor, Process, ServerProcess, copy_at, copy_for_everybody, doorbell, has_io_uring, is_root, ready, role,
    stderr, until_dismissed,
};
use common::raw::{
    Heard, connect_silently, hear, hear_goodbye, hear_refusal, hello, listen, send, send_with_fds,
};
use common::{Bystander, TestDir, TestServer, eventually};
use doorbell::protocol::handshake::{DisconnectReason, Goodbye, Scope, Welcome, code};
use doorbell::{ClientConfig, Connecting, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Sockets of one attacker: as many as a server lets one process have.
const SILENT: usize = 4;
/// Sessions of one honest process of a crowd.
const SESSIONS: usize = 100;

/// What a copy of this program does, as a client among many.
#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    match role.as_str() {
        "silent" => attack(&path),
        "crowd" => {
            let clients: Vec<_> = (0..SESSIONS).map(|_| connect(&path)).collect();
            ready();
            for client in &clients {
                assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"here").unwrap(), b"here");
            }
            ready();
            until_dismissed();
        }
        "one" => {
            let client = connect(&path);
            assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"one").unwrap(), b"one");
            ready();
            until_dismissed();
        }
        "hoarder" => hoard(&path),
        other => panic!("no part is called {other}"),
    }
}

/// The smallest session; however busy the machine is, half a minute is enough.
fn connect(path: &Path) -> IpcClient {
    let config = ClientConfig {
        policy: WaitPolicy::Block,
        connect_timeout: Duration::from_secs(30),
        ..ClientConfig::smallest()
    };
    IpcClient::connect_with(path, &config).unwrap()
}

/// Keeps sockets open that say nothing, and opens others in their place, until dismissed. Each has to be told why it
/// is closed.
fn attack(path: &Path) {
    let mut silent: Vec<_> = (0..SILENT).map(|_| connect_silently(path)).collect();
    ready();
    loop {
        let stdin = std::io::stdin();
        let mut fds = vec![PollFd::new(&stdin, PollFlags::IN)];
        fds.extend(silent.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
        let told = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if told(&fds[0]) {
            return;
        }
        let told: Vec<bool> = fds[1..].iter().map(told).collect();
        for (socket, _) in silent.iter_mut().zip(told).filter(|(_, told)| *told) {
            assert_sent_away(socket);
            *socket = connect_silently(path);
        }
    }
}

/// Sends more descriptors to itself than the server may have on their way, and does not receive them.
fn hoard(path: &Path) {
    let bystander = Bystander::new(path);
    let flags = SocketFlags::CLOEXEC;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for _ in 0..3 {
        send_with_fds(&pair.0, b"x", &[null.as_fd(); 64]);
    }
    for _ in 0..5 {
        let told = too_many(IpcClient::connect(path));
        assert_eq!(told, ("file descriptors sent and not received", 100));
        bystander.check("descriptors on their way");
    }
    drop(pair);
    drop(connect(path));
    bystander.check("their end");
}

/// Hears that there was no hello in time, or too many sockets of this process; `true` for the former.
fn assert_sent_away(socket: &OwnedFd) -> bool {
    let timed_out = match hear(socket) {
        Heard::Goodbye(reason) => {
            assert_eq!(reason, DisconnectReason::HandshakeTimeout);
            true
        }
        Heard::Welcome(welcome, None) => {
            assert_eq!((welcome.code, welcome.scope()), (code::TOO_MANY, Some(Scope::HandshakesOfProcess)));
            assert!(welcome.retry_ms > 0);
            false
        }
        other => panic!("{other:?}"),
    };
    assert!(matches!(hear(socket), Heard::End), "something came after the end");
    timed_out
}

fn has_heard(socket: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&now)).unwrap() > 0
}

/// The scope of a refusal for too much of something.
fn too_many(result: Result<IpcClient, IpcError>) -> (&'static str, u64) {
    match result.map(|_| ()) {
        Err(IpcError::TooMany { scope, limit, retry_ms }) if retry_ms > 0 => (scope, limit),
        other => panic!("{other:?}"),
    }
}

/// Goal:   F27: a process has four handshakes open at most; those beyond are told at once, the four when their time is
///         over. Others, and this very process, connect all the while, and nothing of it all is left.
/// Method: 50 silent sockets of this process, an honest process, an honest client here; a time-out that nobody here
///         waits for by accident.
#[test]
fn f27_a_process_may_have_four_handshakes_open() {
    let config =
        ServerConfig { handshake_timeout: Duration::from_secs(3), reactors: 1, ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let bystander = Bystander::new(server.path());
    let silent: Vec<_> = (0..50).map(|_| connect_silently(server.path())).collect();
    for socket in &silent[4..] {
        let refusal = hear_refusal(socket);
        assert_eq!((refusal.code, refusal.limit), (code::TOO_MANY, 4));
        assert_eq!(refusal.scope(), Some(Scope::HandshakesOfProcess));
    }
    assert!(!silent[..4].iter().any(has_heard), "the first four have not had their time");
    // What matters is that the hello is there, whatever else this process does.
    let late = connect_silently(server.path());
    send(&late, hello().as_bytes()).ok();
    match hear(&late) {
        Heard::Welcome(welcome, Some(_)) => assert_eq!(welcome.code, code::OK),
        // Accepted in between.
        Heard::Welcome(welcome, None) => assert_eq!(welcome.scope(), Some(Scope::HandshakesOfProcess)),
        other => panic!("{other:?}"),
    }
    drop(connect(server.path()));
    Actor::ready("one", server.path()).dismiss();
    bystander.check("silent sockets");
    for socket in &silent[..4] {
        assert_eq!(hear_goodbye(socket), DisconnectReason::HandshakeTimeout);
    }
    bystander.check("their end");
    drop(silent);
    let (metrics, refused) = (server.stop(), 46);
    assert_eq!(metrics.ended(DisconnectReason::HandshakeTimeout), 4);
    assert!(metrics.sessions_refused >= refused + 4, "{}", metrics.sessions_refused);
}

/// Goal:   F27: silent sockets that take all places keep nobody out for as long as they may stay: the oldest goes when
///         somebody else needs its place and it has had a tenth of its time.
/// Method: eight places, all taken, 20 s for each: an honest client is in while most of them still wait.
#[test]
fn f27_the_oldest_silent_socket_makes_room_for_others() {
    let config = ServerConfig {
        max_half_open: 8,
        max_half_open_per_process: 100,
        handshake_timeout: Duration::from_secs(20),
        ..ServerConfig::default()
    };
    let server = TestServer::start_with(config);
    let bystander = Bystander::new(server.path());
    let silent: Vec<_> = (0..9).map(|_| connect_silently(server.path())).collect();
    // Behind the ninth, who has no place yet.
    drop(connect(server.path()));
    bystander.check("silent sockets");
    assert!(has_heard(&silent[0]) && !silent[2..].iter().any(has_heard), "the oldest and nobody else");
    assert_eq!(hear_goodbye(&silent[0]), DisconnectReason::HandshakeTimeout);
}

/// Goal:   F26, F27, R1.8: a thousand sessions that connect at once all get in, although 200 sockets of 50 processes
///         say nothing and come again whenever they are sent away; a bystander does not notice.
/// Method: processes; each session makes a call; every attacker checks that it is told why it is sent away.
#[test]
fn f26_f27_r1_8_a_thousand_sessions_connect_beside_two_hundred_silent_sockets() {
    let server = ServerProcess::start(&["--max-sessions", "1002", "--max-connections", "1002"]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    let mut attackers: Vec<_> = (0..50).map(|_| Actor::start("silent", server.path())).collect();
    attackers.iter_mut().for_each(Actor::wait_until_ready);
    let mut crowd: Vec<_> = (0..10).map(|_| Actor::start("crowd", server.path())).collect();
    crowd.iter_mut().for_each(Actor::wait_until_ready);
    bystander.check("a thousand sessions");
    assert_eq!(server.process.segments(), baseline.1 + 10 * SESSIONS);
    crowd.iter_mut().for_each(Actor::wait_until_ready);
    attackers.iter_mut().for_each(Actor::dismiss);
    bystander.check("a thousand calls");
    assert!(bystander.stat("sessions_refused") >= 200, "each attacker has been sent away or is about to be");
    crowd.iter_mut().for_each(Actor::dismiss);
    eventually("descriptors and segments are back", || {
        (server.process.fds(), server.process.segments()) == baseline
    });
    bystander.check("the end of all");
}

/// Goal:   F26: many threads of one process that connect at the same moment all get in, although the kernel may let
///         each be accepted before it has said hello, and only four of a process may be.
/// Method: 32 threads that start together, several times.
#[test]
fn f26_f27_threads_of_one_process_connect_at_once() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    for _ in 0..5 {
        let together = std::sync::Barrier::new(32);
        std::thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    together.wait();
                    let client = connect(server.path());
                    assert_eq!(
                        client.open().unwrap().call(MessageType::ECHO, b"at once").unwrap(),
                        b"at once"
                    );
                });
            }
        });
        bystander.check("32 threads");
    }
}

/// Goal:   F26: one thread that begins to connect many sessions before it waits for the first gets them all, and can
///         wait for each on its descriptor.
/// Method: a hundred, finished from the last to the first; then one that nobody answers, and one that is refused.
#[test]
fn f26_many_handshakes_of_one_thread_are_under_way_at_once() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let config = ClientConfig::smallest();
    let begun: Vec<_> = (0..100).map(|_| Connecting::begin(server.path(), &config).unwrap()).collect();
    let finished = begun.into_iter().rev().map(|connecting| {
        let half_a_minute = Timespec { tv_sec: 30, tv_nsec: 0 };
        let readable = poll(&mut [PollFd::new(&connecting, PollFlags::IN)], Some(&half_a_minute)).unwrap();
        assert_eq!(readable, 1, "no answer for 30 s");
        connecting.finish().unwrap()
    });
    let clients: Vec<_> = finished.collect();
    for client in &clients {
        assert_eq!(client.open().unwrap().call(MessageType::ECHO, b"one of many").unwrap(), b"one of many");
    }
    bystander.check("a hundred handshakes at once");

    let directory = TestDir::new();
    let path = directory.join("s");
    let listener = listen(&path, 0);
    let config = ClientConfig { connect_timeout: Duration::from_millis(20), ..config };
    let unanswered = Connecting::begin(&path, &config).unwrap().finish().map(|_| ());
    assert!(matches!(unanswered, Err(IpcError::HandshakeTimeout(_))), "{unanswered:?}");
    drop(rustix::net::accept(&listener).unwrap());
    let refused = Connecting::begin(&path, &config).unwrap();
    answer(&listener, Welcome::too_many(Scope::Sessions, 7, 1).as_bytes());
    assert_eq!(too_many(refused.finish()), ("sessions", 7));
}

/// Accepts a client, hears its hello, answers.
fn answer(listener: &OwnedFd, bytes: &[u8]) {
    let half_a_minute = Timespec { tv_sec: 30, tv_nsec: 0 };
    let came = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&half_a_minute)).unwrap();
    assert_eq!(came, 1, "nobody came for 30 s");
    let socket = rustix::net::accept(listener).unwrap();
    let mut hello = [0; 96];
    assert_eq!(rustix::net::recv(&socket, &mut hello[..], rustix::net::RecvFlags::empty()).unwrap().0, 96);
    send(&socket, bytes).unwrap();
}

/// Goal:   F26: a client that finds the server's queue full waits for room, as long as its time allows.
/// Method: a queue that holds one; a client gives up when its time is over, with the reason; another, which is between two
///         attempts when the queue moves, gets in.
#[test]
fn f26_a_client_waits_for_room_in_the_servers_queue() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let listener = listen(&path, 0);
    let _queued = connect_silently(&path);
    let patience = Duration::from_millis(20);
    let config = ClientConfig { connect_timeout: patience, ..ClientConfig::default() };
    let begun = Instant::now();
    let error = IpcClient::connect_with(&path, &config).map(|_| ()).unwrap_err();
    assert!(matches!(error, IpcError::Io { .. }) && error.to_string().contains("queue full"), "{error}");
    assert!(begun.elapsed() >= patience, "given up after {:?}", begun.elapsed());
    let waiting = std::thread::Builder::new().name("waits-for-room".to_owned());
    let waiting = waiting.spawn(move || IpcClient::connect(&path).map(|_| ())).unwrap();
    eventually("it waits", || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let file = |task: &std::fs::DirEntry, name| std::fs::read_to_string(task.path().join(name));
        let named =
            |task: &std::fs::DirEntry| file(task, "comm").is_ok_and(|name| name == "waits-for-room\n");
        let sleeps = format!("{CLOCK_NANOSLEEP} ");
        waiting.is_finished()
            || tasks
                .filter(named)
                .any(|task| file(&task, "syscall").is_ok_and(|call| call.starts_with(&sleeps)))
    });
    drop(rustix::net::accept(&listener).unwrap());
    answer(&listener, Welcome::too_many(Scope::Sessions, 7, 1).as_bytes());
    let told = waiting.join().unwrap();
    assert!(matches!(told, Err(IpcError::TooMany { scope: "sessions", limit: 7, .. })), "{told:?}");
}

/// The number of clock_nanosleep on x86-64, as /proc tells it.
const CLOCK_NANOSLEEP: u32 = 230;

/// Goal:   F27: a client that is refused because its process has other handshakes under way, or that said hello too
///         late, tries again; a limit that is not its own doing is for its caller to know.
/// Method: a server by hand that refuses for each of these reasons, in turn.
#[test]
fn f27_a_client_that_was_sent_away_for_its_haste_or_slowness_tries_again() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let listener = listen(&path, 0);
    let trying = std::thread::spawn(move || IpcClient::connect(&path).map(|_| ()));
    answer(&listener, Welcome::too_many(Scope::HandshakesOfProcess, 4, 1).as_bytes());
    answer(&listener, Goodbye::new(DisconnectReason::HandshakeTimeout).as_bytes());
    answer(&listener, Welcome::too_many(Scope::HandshakesOfProcess, 4, 1).as_bytes());
    answer(&listener, Welcome::too_many(Scope::SessionsOfProcess, 3, 100).as_bytes());
    let told = trying.join().unwrap();
    assert!(
        matches!(told, Err(IpcError::TooMany { scope: "sessions of one process", limit: 3, .. })),
        "{told:?}"
    );
}

/// Goal:   F29: a process has its quota of sessions; others get in; one that ends makes room.
/// Method: three for each process, asked of the command; this process, and another one.
#[test]
fn f29_r1_8_the_quota_of_a_process_keeps_nobody_else_out() {
    let server = ServerProcess::start(&["--max-sessions-per-process", "3"]);
    let bystander = Bystander::new(server.path());
    let mut ours: Vec<_> = (0..2).map(|_| connect(server.path())).collect();
    for _ in 0..5 {
        assert_eq!(too_many(IpcClient::connect(server.path())), ("sessions of one process", 3));
        Actor::ready("one", server.path()).dismiss();
    }
    let mut others: Vec<_> = (0..3).map(|_| Actor::ready("one", server.path())).collect();
    bystander.check("a quota");
    ours.pop();
    eventually("the place can be had", || {
        let client = IpcClient::connect(server.path());
        ours.extend(client);
        ours.len() == 2
    });
    assert_eq!(too_many(IpcClient::connect(server.path())), ("sessions of one process", 3));
    others.iter_mut().for_each(Actor::dismiss);
    bystander.check("the end of others");
}

/// A soft limit of a running process that is as it was when this is dropped.
struct Limited {
    pid: rustix::process::Pid,
    resource: Resource,
    before: Rlimit,
    soft: u64,
}

impl Limited {
    fn to(process: &Process, resource: Resource, soft: u64) -> Self {
        // Inherited from us.
        let maximum = getrlimit(resource).maximum;
        let before = prlimit(Some(process.pid()), resource, Rlimit { current: Some(soft), maximum }).unwrap();
        Self { pid: process.pid(), resource, before, soft }
    }

    /// A limit on descriptors below which so many are free.
    fn to_free_descriptors(process: &Process, free: usize) -> Self {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", process.0.id())).unwrap();
        let number =
            |fd: std::io::Result<std::fs::DirEntry>| fd.unwrap().file_name().to_str()?.parse::<u64>().ok();
        let taken: BTreeSet<u64> = fds.map(|fd| number(fd).unwrap()).collect();
        let mut unused = (0..).filter(|number| !taken.contains(number));
        Self::to(process, Resource::Nofile, unused.nth(free).unwrap())
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        prlimit(Some(self.pid), self.resource, self.before).unwrap();
    }
}

/// Goal:   F32, F33: without descriptors for a session, whichever of them is the first that cannot be had, its client
///         is told so, nothing is left of it, sessions that exist go on, and all is well once there are descriptors.
/// Method: limits of a running server that leave room for none, one and two more.
#[test]
fn f32_f33_without_descriptors_clients_are_told_and_sessions_go_on() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    // The socket, the process, the segment.
    for free in 0..3 {
        let limited = Limited::to_free_descriptors(&server.process, free);
        for _ in 0..5 {
            let told = too_many(IpcClient::connect(server.path()));
            assert_eq!(told, ("file descriptors", limited.soft), "{free} free descriptors");
            bystander.check("a shortage of descriptors");
        }
        assert_eq!((server.process.fds(), server.process.segments()), baseline, "{free} free descriptors");
        drop(limited);
        drop(connect(server.path()));
        eventually("descriptors are back", || server.process.fds() == baseline.0);
    }
    assert_eq!(bystander.stat("accepts_failed"), 5, "only without any the kernel does not even accept");
    assert_eq!(bystander.stat("sessions_refused"), 15);
    bystander.check("the end of the shortage");
}

/// Goal:   F32: clients that come while there are no descriptors cost no busy loop: accepting pauses for longer and
///         longer, up to 100 ms, and everybody is told in the end.
/// Method: three clients that try again at once, 64 of whom are told between two pauses; processor time of the server,
///         which a loop would have used all the while.
#[test]
fn f32_a_server_without_descriptors_does_not_spin() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let limited = Limited::to_free_descriptors(&server.process, 0);
    let (begun, used) = (Instant::now(), server.process.used_ns());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..300 {
                    assert_eq!(too_many(IpcClient::connect(server.path())).0, "file descriptors");
                }
            });
        }
    });
    let (took, used) = (begun.elapsed(), server.process.used_ns() - used);
    // Fourteen pauses of 10, 20, 40, 80 and then 100 ms.
    assert!(took > Duration::from_millis(1100), "{took:?}");
    assert!(used < took.as_nanos() as u64 / 5, "{used} ns of processor time in {took:?}");
    assert_eq!(bystander.stat("accepts_failed"), 900);
    drop(limited);
    bystander.check("a shortage of descriptors");
    drop(connect(server.path()));
}

/// Goal:   F32, F27: nor does it where half-open sockets have taken all places, one of which would be made free.
/// Method: one place, taken for longer than it is safe by a socket that says nothing; no descriptors; clients as above.
#[test]
fn f32_f27_a_server_without_descriptors_and_places_does_not_spin() {
    let directory = TestDir::new();
    let config = directory.join("config.toml");
    std::fs::write(&config, "[ipc]\nmax_half_open = 1\nhandshake_timeout_ms = 5000\n").unwrap();
    let config = config.to_str().unwrap().to_owned();
    let server = ServerProcess::start_in(directory, &["--config", &config]);
    let fds = server.process.fds();
    let silent = connect_silently(server.path());
    eventually("it is half open", || server.process.fds() > fds);
    let limited = Limited::to_free_descriptors(&server.process, 0);
    let begun = Instant::now();
    eventually("a tenth of its time is over", || begun.elapsed() > Duration::from_millis(500));
    let (begun, used) = (Instant::now(), server.process.used_ns());
    for _ in 0..300 {
        assert_eq!(too_many(IpcClient::connect(server.path())).0, "file descriptors");
    }
    let (took, used) = (begun.elapsed(), server.process.used_ns() - used);
    assert!(used < took.as_nanos() as u64 / 5, "{used} ns of processor time in {took:?}");
    drop((limited, silent));
}

/// Goal:   F32: a client is let in with the descriptors of sessions that end, although accepting paused for want of them.
/// Method: two sessions and no room for a third; they end while a client keeps trying.
#[test]
fn f32_a_session_that_ends_makes_room_for_another() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = server.process.fds();
    for _ in 0..5 {
        // Their numbers are to lie below the limit.
        eventually("the sessions before are gone", || server.process.fds() == baseline);
        let sessions = [connect(server.path()), connect(server.path())];
        bystander.check("sessions");
        let limited = Limited::to_free_descriptors(&server.process, 0);
        assert_eq!(too_many(IpcClient::connect(server.path())).0, "file descriptors");
        drop(sessions);
        eventually("the next one is let in", || IpcClient::connect(server.path()).is_ok());
        drop(limited);
    }
}

/// Goal:   F33, F34: a segment that the kernel refuses to make or map is answered NoMemory, and nothing is left of it: no
///         descriptor, no mapping, and what it was to take of the memory budget can be had again.
/// Method: limits of a running server on the size of files, which ftruncate meets, and on address space, which mmap
///         does.
#[test]
fn f33_f34_a_segment_that_cannot_be_made_is_answered_no_memory() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    // So that nothing but what is tested needs memory for the first time.
    drop(connect(server.path()));
    let address_space = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.process.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        1024 * line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap()
    };
    eventually("the first session is gone", || (server.process.fds(), server.process.segments()) == baseline);
    let used = bystander.budget();
    for (resource, soft) in [(Resource::Fsize, 4096), (Resource::As, address_space())] {
        let limited = Limited::to(&server.process, resource, soft);
        for _ in 0..20 {
            let refused = IpcClient::connect(server.path()).map(|_| ());
            assert!(
                matches!(refused, Err(IpcError::NoMemory { retry_ms: 1.. })),
                "{resource:?}: {refused:?}"
            );
        }
        bystander.check("no memory");
        assert_eq!((server.process.fds(), server.process.segments()), baseline, "{resource:?}");
        drop(limited);
        drop(connect(server.path()));
        eventually("it is gone again", || (server.process.fds(), server.process.segments()) == baseline);
        eventually("the budget is as before", || bystander.budget() == used);
    }
    assert_eq!(bystander.stat("sessions_refused"), 40);
}

/// The steps of making a session, each of which the kernel may refuse: the call, when it fails, with what, and what its
/// client is told.
const STEPS: [(&str, &str, &str, Option<&str>); 13] = [
    ("accept4", "1+2", "ENFILE", None),
    ("accept4", "1+2", "EMFILE", Some("file descriptors")),
    ("getsockopt", "2+2", "EMFILE", Some("file descriptors")),
    ("getsockopt", "2+2", "ENOMEM", None),
    ("memfd_create", "1+", "ENOMEM", None),
    ("memfd_create", "1+", "EMFILE", Some("file descriptors")),
    ("ftruncate", "1+", "ENOSPC", None),
    ("fallocate", "1+", "ENOSPC", None),
    ("fallocate", "1+", "ENOMEM", None),
    ("fcntl", "1+", "EPERM", None),
    ("mmap", "1+", "ENOMEM", None),
    ("sendmsg", "1+2", "ENOMEM", None),
    ("sendmsg", "1+2", "ETOOMANYREFS", Some("file descriptors sent and not received")),
];

/// Goal:   F28, F32 to F34: whichever step of making a session the kernel refuses, what was made before is undone, the
///         client is told, others notice nothing, and the next one gets his session.
/// Method: strace makes one call after the other fail in a running server; descriptors and segments are counted after
///         each.
#[test]
fn f28_f32_f33_f34_every_step_that_fails_is_undone_and_answered() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = (server.process.fds(), server.process.segments());
    for (call, when, error, scope) in STEPS {
        let Some(mut strace) = inject(&server.process, &format!("{call}:error={error}:when={when}")) else {
            return;
        };
        match (IpcClient::connect(server.path()).map(|_| ()), scope) {
            (Err(IpcError::NoMemory { retry_ms: 1.. }), None) => {}
            (Err(IpcError::TooMany { scope, retry_ms: 1.., .. }), Some(expected)) => {
                assert_eq!(scope, expected, "{call} {error}");
            }
            (other, _) => panic!("{call} {error}: {other:?}"),
        }
        strace.signal(rustix::process::Signal::INT);
        strace.wait();
        eventually("nobody traces the server", || traced(&server.process) == (0, false));
        bystander.check(call);
        assert_eq!((server.process.fds(), server.process.segments()), baseline, "{call} {error}");
        drop(connect(server.path()));
        eventually("it is gone again", || (server.process.fds(), server.process.segments()) == baseline);
    }
}

/// Makes system calls of a server fail until it is ended by SIGINT; `None` where that cannot be done.
fn inject(server: &Process, fault: &str) -> Option<Process> {
    let call = fault.split(':').next().unwrap();
    let mut strace = Command::new("strace");
    strace.args(["-f", "-q", "-o", "/dev/null", "-p", &server.0.id().to_string()]);
    strace.args(["-e", &format!("trace={call}"), "-e", &format!("inject={fault}")]);
    let strace = strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(strace) = strace else {
        eprintln!("skipped, for it takes strace");
        return None;
    };
    let mut strace = Process(strace);
    let mut ended = false;
    eventually("strace traces the server", || {
        ended = strace.0.try_wait().unwrap().is_some();
        ended || traced(server).1
    });
    if ended {
        eprintln!("skipped, for it takes the right to trace processes");
    }
    (!ended).then_some(strace)
}

/// How many threads of a process somebody traces, and whether that is all of them.
fn traced(process: &Process) -> (usize, bool) {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.0.id())).unwrap();
    let tracer = |task: std::io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        !status.contains("TracerPid:\t0\n")
    };
    let tasks: Vec<bool> = tasks.map(tracer).collect();
    let traced = tasks.iter().filter(|traced| **traced).count();
    (traced, traced == tasks.len())
}

/// `doorbell serve` under limits of the shell, in a directory of its own.
struct Limits {
    command: Command,
    socket: std::path::PathBuf,
    _directory: TestDir,
}

/// Prepares a server of a user, if given, behind `ulimit` commands.
fn serve_under(limits: &str, uid: Option<u32>, arguments: &[&str]) -> Limits {
    let directory = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &directory, "doorbell");
    let theirs = directory.join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, uid, uid).unwrap();
    let socket = theirs.join("s");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("{limits}; exec \"$0\" serve --socket \"$@\"")]).arg(program).arg(&socket);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    Limits { command, socket, _directory: directory }
}

impl Limits {
    /// Starts a server that has to serve.
    fn start(&mut self) -> Process {
        let server = Process(self.command.stderr(Stdio::null()).spawn().unwrap());
        eventually("the server listens", || self.socket.exists());
        server
    }

    /// Starts a server that has to end with an error; returns what it said.
    fn refused(&mut self) -> String {
        let mut server = Process(self.command.stderr(Stdio::piped()).spawn().unwrap());
        let status = server.wait();
        let mut said = String::new();
        server.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(1), "{said}");
        said
    }
}

/// A user that no other test runs as at this moment.
fn some_user() -> u32 {
    2_000_000 + std::process::id()
}

/// Goal:   F28: while the kernel sends no more descriptors of this user, for too many are on their way, clients are
///         told; sessions go on; when that is over all is well.
/// Method: as root: a server of another user with 100 descriptors, another process of whom sends itself 192.
#[test]
fn f28_a_segment_that_cannot_be_sent_is_answered_and_nothing_is_left() {
    if !is_root("a user without privileges, whose descriptors the kernel counts") {
        return;
    }
    let user = some_user();
    let mut limits = serve_under("ulimit -n 100", Some(user), &["--max-sessions", "8"]);
    let server = limits.start();
    let programs = TestDir::new();
    let test = copy_for_everybody(&std::env::current_exe().unwrap(), &programs, "test");
    let mut baseline = None;
    for _ in 0..2 {
        let mut hoarder = copy_at(&test, "child", "hoarder", &limits.socket);
        let output = hoarder.uid(user).gid(user).current_dir("/").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        eventually("the sessions are gone", || server.segments() == 0);
        let fds = server.fds();
        assert_eq!(*baseline.get_or_insert(fds), fds);
    }
}

/// Goal:   F39: the soft limit on descriptors is raised to the hard one at the start; where that does not carry the
///         sessions configured the server does not start, and says both numbers; where it just does, all fit.
/// Method: limits set by the shell; as many sessions as fit, each with a call; one more.
#[test]
fn f39_the_limit_on_descriptors_carries_all_sessions_or_the_server_does_not_start() {
    let arguments = ["--max-sessions", "64", "--max-connections", "128"];
    let said = serve_under("ulimit -n 255", None, &arguments).refused();
    for words in
        ["max_sessions = 64", "256 file descriptors are needed", "the hard limit is 255", "ulimit -Hn 256"]
    {
        assert!(said.contains(words), "`{words}` in: {said}");
    }
    let said =
        serve_under("ulimit -n 256", None, &[&arguments[..], &["--reactors", "64"]].concat()).refused();
    assert!(said.contains("400 file descriptors are needed"), "{said}");
    let mut limits = serve_under("ulimit -Sn 40; ulimit -Hn 256", None, &arguments);
    let server = limits.start();
    let bystander = Bystander::new(&limits.socket);
    let raised = std::fs::read_to_string(format!("/proc/{}/limits", server.0.id())).unwrap();
    let raised = raised.lines().find(|line| line.starts_with("Max open files")).unwrap().to_owned();
    assert_eq!(raised.split_whitespace().collect::<Vec<_>>()[3..5], ["256", "256"]);
    let sessions: Vec<_> = (1..64).map(|_| connect(&limits.socket)).collect();
    for session in &sessions {
        assert_eq!(session.open().unwrap().call(MessageType::ECHO, b"fits").unwrap(), b"fits");
    }
    assert_eq!(too_many(IpcClient::connect(&limits.socket)), ("sessions", 64));
    bystander.check("as many sessions as fit");
    assert_eq!(bystander.stat("accepts_failed"), 0);
}

/// Goal:   F40: a limit on locked memory that the rings do not fit below is named by the server that cannot start.
/// Method: as root: a server of another user with none.
#[test]
fn f40_a_limit_on_locked_memory_that_is_too_low_is_named() {
    if !is_root("a user without privileges, whose locked memory the kernel counts") {
        return;
    }
    if !has_io_uring("rings that take locked memory") {
        return;
    }
    let said = serve_under("ulimit -l 0", Some(some_user()), &["--backend", "io-uring"]).refused();
    assert!(said.contains("creating a ring") && said.contains("RLIMIT_MEMLOCK"), "{said}");
}

/// Goal:   F38, F40: the same limit stops nobody who has not asked for io_uring.
#[test]
fn f38_f40_without_locked_memory_for_rings_epoll_serves() {
    if !is_root("a user without privileges, whose locked memory the kernel counts") {
        return;
    }
    let mut limits = serve_under("ulimit -l 0", Some(some_user()), &[]);
    let mut server = limits.start();
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
}

/// Goal:   F33, F41: whether the log can be written is no business of the clients'.
/// Method: a server whose stderr is a full device; refusals, which are logged.
#[test]
fn f33_f41_a_log_that_cannot_be_written_stops_nobody() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut serve = doorbell();
    serve.args(["serve", "--verbose", "--socket"]).arg(&path).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = Process(serve.stderr(full).spawn().unwrap());
    eventually("the server listens", || path.exists());
    let bystander = Bystander::new(&path);
    for _ in 0..5 {
        let socket = connect_silently(&path);
        send(&socket, b"no hello").unwrap();
        assert_eq!(hear_refusal(&socket).code, code::BAD_HELLO);
    }
    bystander.check("lines that could not be written");
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait().success());
}

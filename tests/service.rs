//! `doorbell serve` under a service manager: sockets handed over, what it tells, signals; and who watches over handlers
//! (R3.4, R4.7; F41, F46, F47, F49, trap 13). The test plays the manager.

mod common;

use common::process::{
    NOBODY, Process, ServerProcess, copy_for_everybody, copy_of_test, doorbell, is_root, role,
};
use common::{Bystander, TestDir, client, eventually};
use doorbell::protocol::handshake::DisconnectReason;
use doorbell::{
    CallOptions, Context, HandlerError, HandlerTable, IpcClient, IpcError, IpcServer, MessageType, Reply,
    ServerConfig, WaitPolicy,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::process::Signal;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// A socket at `path`, as a socket unit makes it.
fn socket_at(path: &Path, kind: SocketType, listens: bool) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    if listens {
        rustix::net::listen(&socket, 256).unwrap();
    }
    socket
}

/// A manager of one service: a directory, the socket that it is told things through, and the service's log.
struct Manager {
    directory: TestDir,
    notify: OwnedFd,
}

impl Manager {
    fn new() -> Self {
        let directory = TestDir::new();
        let notify = socket_at(&directory.join("notify"), SocketType::DGRAM, false);
        Self { directory, notify }
    }

    fn path(&self) -> PathBuf {
        self.directory.join("s")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Starts a server; `socket` becomes its descriptor 3. A shell does that, whose process is the server's then.
    fn start(&self, socket: Option<&OwnedFd>, arguments: &[&str]) -> Process {
        let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(doorbell().get_program());
        command.args(["serve", "--log-format", "human", "--socket"]).arg(self.path()).args(arguments);
        command.env("NO_COLOR", "1").env("NOTIFY_SOCKET", self.directory.join("notify"));
        command.env("LISTEN_FDNAMES", "doorbell").env("WATCHDOG_USEC", "40000");
        command.env("LISTEN_FDS", if socket.is_some() { "1" } else { "0" });
        let stdin = socket.map_or_else(Stdio::null, |socket| socket.try_clone().unwrap().into());
        let log = std::fs::File::options().create(true).append(true).open(self.directory.join("log"));
        Process(command.stdin(stdin).stdout(Stdio::null()).stderr(log.unwrap()).spawn().unwrap())
    }

    /// Waits until it is told something that begins so; returns the descriptor that came along.
    fn told(&self, beginning: &str) -> Option<OwnedFd> {
        let mut bytes = [0u8; 1024];
        let mut found = None;
        eventually(beginning, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let Ok(message) = rustix::net::recvmsg(&self.notify, &mut parts, &mut ancillary, flags) else {
                return false;
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                    found = fds.next();
                }
            }
            bytes[..message.bytes].starts_with(beginning.as_bytes())
        });
        found
    }
}

fn connect(path: &Path) -> Result<IpcClient, IpcError> {
    IpcClient::connect(path)
}

/// Goal:   F49, R3.4: with a socket that the manager has, no attempt to connect is lost while one server follows
///         another: it is answered by the next one, or told to come again.
/// Method: threads that connect and call without pause over six restarts in order; whatever is not an answer has to be
///         the end of a session that was told, or a call that was not executed.
#[test]
fn f49_r3_4_no_connection_attempt_is_lost_in_a_restart() {
    let manager = Manager::new();
    let socket = socket_at(&manager.path(), SocketType::SEQPACKET, true);
    let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let path = manager.path();
    let call = || {
        while !over.load(SeqCst) {
            let answer = connect(&path).and_then(|client| {
                client.open()?.call(MessageType::ECHO, b"hello").map(|answer| assert_eq!(answer, b"hello"))
            });
            match answer {
                Ok(()) => _ = answered.fetch_add(1, SeqCst),
                Err(
                    IpcError::Draining { .. }
                    | IpcError::NotExecuted
                    | IpcError::Disconnected(DisconnectReason::Draining),
                ) => {}
                Err(error) => panic!("an attempt was lost: {error}"),
            }
        }
    };
    let last = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(call);
        }
        for _ in 0..6 {
            let mut server = manager.start(Some(&socket), &[]);
            manager.told("READY=1");
            let before = answered.load(SeqCst);
            eventually("clients are answered", || answered.load(SeqCst) > before + 20);
            server.signal(Signal::TERM);
            assert!(server.wait().success(), "{}", manager.log());
        }
        // Those that wait now are answered by this one, which lives until they have been.
        let last = manager.start(Some(&socket), &[]);
        over.store(true, SeqCst);
        last
    });
    drop(last);
    assert!(manager.path().exists(), "the socket is the manager's");
}

/// Goal:   F49: who connects while no server runs, the last one having been killed, is answered by the next one.
#[test]
fn f49_a_client_that_connects_between_two_servers_is_answered() {
    let manager = Manager::new();
    let socket = socket_at(&manager.path(), SocketType::SEQPACKET, true);
    let mut first = manager.start(Some(&socket), &[]);
    manager.told("READY=1");
    Bystander::new(&manager.path()).check("the start");
    first.kill();
    let path = manager.path();
    let waiting = std::thread::spawn(move || connect(&path).map(|client| client.open().map(|_| ()).is_ok()));
    let _second = manager.start(Some(&socket), &[]);
    assert!(waiting.join().unwrap().unwrap());
}

/// Goal:   F49: a server that gives its socket to the manager's store leaves it there; the next one, started with what
///         was stored, answers whoever has connected meanwhile. What the manager is told.
#[test]
fn f49_a_stored_socket_outlives_its_server() {
    let manager = Manager::new();
    let mut first = manager.start(None, &["--store-socket"]);
    let stored = manager.told("FDSTORE=1\nFDNAME=doorbell").expect("a descriptor comes along");
    manager.told("READY=1\nSTATUS=serving");
    manager.told("WATCHDOG=1");
    Bystander::new(&manager.path()).check("the start");
    first.signal(Signal::TERM);
    manager.told("STOPPING=1");
    assert!(first.wait().success());
    let path = manager.path();
    let waiting = std::thread::spawn(move || connect(&path).map(|client| client.open().map(|_| ()).is_ok()));
    let _second = manager.start(Some(&stored), &["--store-socket"]);
    assert!(waiting.join().unwrap().unwrap());
    assert!(manager.log().contains("handed over"), "{}", manager.log());
}

/// Goal:   F49, F54: a socket of another kind, one that does not listen, and one bound elsewhere are refused by name.
#[test]
fn f49_f54_a_socket_that_is_none_of_ours_is_refused() {
    let cases = [
        (SocketType::STREAM, true, "s", "not one for packets"),
        (SocketType::SEQPACKET, false, "s", "does not listen"),
        (SocketType::SEQPACKET, true, "elsewhere", "bound elsewhere"),
    ];
    for (kind, listens, name, words) in cases {
        let manager = Manager::new();
        let socket = socket_at(&manager.directory.join(name), kind, listens);
        let mut server = manager.start(Some(&socket), &[]);
        assert_eq!(server.wait().code(), Some(1));
        assert!(manager.log().contains(words), "{}", manager.log());
    }
}

/// Goal:   R4.7: SIGHUP has a server read its configuration again: what can change does, what cannot is named, what is
///         wrong changes nothing; the manager is told.
#[test]
fn r4_7_a_hang_up_reloads_the_configuration() {
    let manager = Manager::new();
    let file = manager.directory.join("doorbell.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    write("[ipc]\nidle_timeout_secs = 0\nsweep_interval_ms = 1\n");
    let server = manager.start(None, &["--config", file.to_str().unwrap()]);
    manager.told("READY=1");
    let idle = client(&manager.path(), WaitPolicy::Block);
    let connection = idle.open().unwrap();
    write("[ipc]\nidle_timeout_secs = nonsense\n");
    server.signal(Signal::HUP);
    manager.told("RELOADING=1\nMONOTONIC_USEC=");
    manager.told("READY=1\nSTATUS=serving with the old configuration");
    write(
        "[ipc]\nidle_timeout_secs = 1\nsweep_interval_ms = 1\nmax_connections = 7\nlog_level = \"debug\"\n[metrics]\nenable = false\n",
    );
    server.signal(Signal::HUP);
    manager.told("READY=1\nSTATUS=serving");
    let log = manager.log();
    for words in [
        "nothing has changed",
        "taken=\"log_level, idle_timeout_secs\"",
        "later=\"max_connections, metrics\"",
    ] {
        assert!(log.contains(words), "{words}: {log}");
    }
    eventually("the log tells of single sessions", || manager.log().contains("session ended"));
    let told = connection.call(MessageType::PING, b"").unwrap_err();
    assert!(matches!(told, IpcError::Disconnected(DisconnectReason::IdleTimeout)), "{told}");
}

/// Goal:   trap 13: a server that was started from a terminal, without a configuration, ends with it.
#[test]
fn trap13_a_hang_up_ends_a_server_that_has_nothing_to_read_again() {
    let mut server = ServerProcess::start(&[]);
    server.process.signal(Signal::HUP);
    assert!(server.process.wait().success());
    assert!(!server.path().exists());
}

/// Runs for ever.
const LOOPS: MessageType = MessageType(256);

fn loops(_: &Context<'_, ()>, _: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    loop {
        std::hint::spin_loop();
    }
}

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(LOOPS, loops);

/// The parts that copies of this test play: servers that do not end well.
#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let config = ServerConfig {
        reactors: 2,
        slow_handler: Duration::from_millis(50),
        watchdog: Some(Duration::from_secs(1)),
        ..ServerConfig::default()
    };
    let bound = IpcServer::new(&TABLE, ()).config(config).bind(path).unwrap();
    let bound = match &role[..] {
        "loops" => bound,
        "fails" => bound.on_ready(|| panic!("a reactor that panics on purpose")),
        other => panic!("no role {other}"),
    };
    bound.serve().unwrap();
}

fn start_child(role: &str, directory: &TestDir) -> (Process, PathBuf) {
    let log = directory.join("log");
    let mut command = copy_of_test("child", role, &directory.join("s"));
    let process = Process(command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap());
    (process, log)
}

/// Goal:   F45, F46: a handler that does not come back is named, and in the end its server aborts; clients see that it is
///         gone.
#[test]
fn f45_f46_a_handler_that_never_returns_is_named_and_ends_the_server() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let (mut server, log) = start_child("loops", &directory);
    eventually("it serves", || connect(&path).is_ok());
    let client = connect(&path).unwrap();
    let connection = client.open().unwrap();
    let lost = connection.call_with(LOOPS, b"", &CallOptions::default(), |_| ()).unwrap_err();
    assert!(matches!(lost, IpcError::ConnectionLost), "{lost}");
    assert_eq!(server.wait().signal(), Some(Signal::ABORT.as_raw()));
    let log = std::fs::read_to_string(log).unwrap();
    let named = log.contains("the handler of message type 256 holds its reactor");
    assert!(named && log.contains("does not come back"), "{log}");
}

/// Goal:   F47: a reactor that panics outside of a handler ends the process at once, and does not leave half a server.
#[test]
fn f47_a_reactor_that_fails_ends_the_server() {
    let directory = TestDir::new();
    let (mut server, log) = start_child("fails", &directory);
    assert_eq!(server.wait().signal(), Some(Signal::ABORT.as_raw()));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("a reactor has failed"), "{log}");
}

/// Goal:   other processes of the same user cannot look into a server's memory, and with it into what its clients send,
///         unless it is told to be debuggable.
/// Method: whom the kernel makes the owner of its entries in /proc, which for such a process is root.
#[test]
fn a_server_does_not_let_others_look_into_it() {
    use std::os::unix::fs::MetadataExt;
    if !is_root("becoming another user") {
        return;
    }
    let directory = TestDir::new();
    let program = copy_for_everybody(Path::new(doorbell().get_program()), &directory, "doorbell");
    for (arguments, owner) in [(&[][..], 0), (&["--debuggable"][..], NOBODY)] {
        let home = directory.join(if owner == 0 { "closed" } else { "open" });
        std::fs::create_dir(&home).unwrap();
        std::os::unix::fs::chown(&home, Some(NOBODY), None).unwrap();
        let log = home.join("log");
        let mut command = Command::new(&program);
        command
            .arg("serve")
            .arg("--socket")
            .arg(home.join("s"))
            .args(["--max-sessions", "8"])
            .args(arguments);
        command.uid(NOBODY).stderr(std::fs::File::create(&log).unwrap());
        let server = Process(command.spawn().unwrap());
        eventually("it serves", || std::fs::read_to_string(&log).unwrap().contains("serving at"));
        let maps = std::fs::metadata(format!("/proc/{}/maps", server.0.id())).unwrap();
        assert_eq!(maps.uid(), owner);
    }
}

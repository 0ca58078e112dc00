//! The rendezvous socket: whose path it is, who may use it, what is refused and left alone (R3.6, F52 to
//! F55, trap 12).

mod common;

use common::process::{
    NOBODY, Process, ServerProcess, copy_at, copy_for_everybody, doorbell, is_root, role, run, stderr,
};
use common::raw::{connect_silently, hear_refusal, hello, send};
use common::{Bystander, TestDir, client, eventually};
use doorbell::protocol::handshake::code;
use doorbell::{
    BoundServer, HandlerTable, IpcClient, IpcError, IpcServer, MessageType, WaitPolicy, check_socket_path,
};
use std::ffi::OsStr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use zerocopy::IntoBytes;

static TABLE: HandlerTable<()> = HandlerTable::with_builtins();

fn bind(path: &Path) -> Result<BoundServer<()>, IpcError> {
    IpcServer::new(&TABLE, ()).bind(path)
}

/// Binds a path that nobody else has. Another test that forks at this moment may hold duplicates of a lock
/// or listener that this one has just closed, until its child runs a program: hence the patience.
fn bound(path: &Path) -> BoundServer<()> {
    let mut bound = None;
    eventually("the path can be had", || match bind(path) {
        Ok(server) => {
            bound = Some(server);
            true
        }
        Err(IpcError::AlreadyRunning { .. }) => false,
        Err(other) => panic!("{}: {other}", path.display()),
    });
    bound.unwrap()
}

/// A socket that nobody listens on, whoever may hold a duplicate of it.
fn dead_socket(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
}

/// Refused with a message about the path that contains `words`, also to those who only ask.
fn refused(path: &Path, words: &str) {
    let foretold = check_socket_path(path).unwrap_err();
    let error = bind(path).map(|_| ()).unwrap_err();
    assert!(matches!(error, IpcError::SocketPath { .. }), "{error}");
    assert_eq!(foretold.to_string(), error.to_string());
    assert!(error.to_string().contains(words), "`{words}` in: {error}");
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
}

fn already_running(path: &Path) {
    for error in [check_socket_path(path).unwrap_err(), bind(path).map(|_| ()).unwrap_err()] {
        assert!(matches!(&error, IpcError::AlreadyRunning { path: p } if p == path), "{error}");
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Names in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Not a test of its own: the part of another user's client, in a copy of this program.
#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    let socket = connect_silently(&path);
    if role == "stranger-with-hello" {
        // The server may have refused and gone by now.
        send(&socket, hello().as_bytes()).ok();
    }
    assert_eq!(hear_refusal(&socket).code, code::NOT_PERMITTED);
}

/// Goal:   what a dead server left behind does not stop the next one (trap 12).
/// Method: a server process that is killed, and a socket that nobody listens on and no lock belongs to.
#[test]
fn f52_r3_6_a_stale_socket_is_replaced() {
    let mut server = ServerProcess::start(&[]);
    for _ in 0..3 {
        server.process.kill();
        assert!(is_socket(server.path()), "a killed server leaves its socket");
        let inode = std::fs::metadata(server.path()).unwrap().ino();
        let error = IpcClient::connect(server.path()).map(|_| ()).unwrap_err();
        assert!(matches!(error, IpcError::NotRunning { .. }), "{error}");
        server.restart(&[]);
        assert!(std::fs::metadata(server.path()).unwrap().ino() != inode || is_socket(server.path()));
        Bystander::new(server.path()).check("a restart");
    }
    let directory = TestDir::new();
    let path = directory.join("s");
    dead_socket(&path);
    assert!(is_socket(&path));
    assert_eq!(names(&directory.0), ["s"]);
    check_socket_path(&path).unwrap();
    assert_eq!(names(&directory.0), ["s"], "asking leaves no trace");
    drop(bound(&path));
    // What a server that died between bind and rename left.
    dead_socket(&directory.join("s.new"));
    drop(bound(&path));
    assert_eq!(names(&directory.0), ["s.lock"]);
}

/// Goal:   a live server never loses its path (F53).
/// Method: a second bind, from this process and from another, with the lock in place, deleted, and with
///         both lock and a foreign listener that knows no lock; the first serves on.
#[test]
fn f53_trap12_a_live_servers_path_is_refused_even_without_its_lock() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let inode = std::fs::metadata(server.path()).unwrap().ino();
    for lock_deleted in [false, true] {
        if lock_deleted {
            std::fs::remove_file(server.directory().join("s.lock")).unwrap();
        }
        already_running(server.path());
        let second = run(&["serve", "--socket", server.path().to_str().unwrap()]);
        assert_eq!(second.status.code(), Some(1));
        assert!(stderr(&second).contains("already running at"), "{}", stderr(&second));
        assert_eq!(std::fs::metadata(server.path()).unwrap().ino(), inode);
        bystander.check("a second server");
        Bystander::new(server.path()).check("a second server, from anew");
    }
    let directory = TestDir::new();
    let path = directory.join("s");
    let foreign = UnixListener::bind(&path).unwrap();
    already_running(&path);
    assert!(is_socket(&path));
    drop(foreign);
}

/// Goal:   of two servers that start at once exactly one gets the path, and it serves.
/// Method: 20 races of two processes, every other one over the socket of a killed server.
#[test]
fn f53_of_two_servers_that_race_exactly_one_wins() {
    for round in 0..20 {
        let mut directory = Some(TestDir::new());
        let path = directory.as_ref().unwrap().join("s");
        if round % 2 == 1 {
            let mut dead = ServerProcess::start_in(directory.take().unwrap(), &[]);
            dead.process.kill();
            race(&path);
            continue;
        }
        race(&path);
    }
}

fn race(path: &Path) {
    let mut racers: Vec<(Process, PathBuf)> = (0..2)
        .map(|n| {
            let log = path.with_file_name(format!("log{n}"));
            let stderr = std::fs::File::create(&log).unwrap();
            let mut command = doorbell();
            command.args([OsStr::new("serve"), OsStr::new("--socket"), path.as_os_str()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
            (Process(command.spawn().unwrap()), log)
        })
        .collect();
    let mut loser = None;
    eventually("one of the two ends", || {
        loser = racers.iter_mut().position(|(racer, _)| racer.0.try_wait().unwrap().is_some());
        loser.is_some()
    });
    let (mut lost, log) = racers.remove(loser.unwrap());
    assert_eq!(lost.wait().code(), Some(1));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("already running at"), "{log}");
    let (mut winner, log) = racers.remove(0);
    eventually("the other serves", || std::fs::read_to_string(&log).unwrap().contains("serving at"));
    Bystander::new(path).check("a race");
    winner.signal(rustix::process::Signal::TERM);
    assert!(winner.wait().success());
    assert!(!path.exists(), "the winner takes its socket along");
}

/// Goal:   nothing that is not a socket is followed, replaced or removed.
/// Method: a file, a directory, a FIFO, links to each of them, to a socket and to nothing, at the path.
#[test]
fn f54_r3_6_whatever_is_not_a_socket_is_refused_and_left_alone() {
    let directory = TestDir::new();
    let elsewhere = TestDir::new();
    let file = elsewhere.join("file");
    std::fs::write(&file, "precious").unwrap();
    let live = UnixListener::bind(elsewhere.join("socket")).unwrap();
    std::fs::write(directory.join("a-file"), "precious").unwrap();
    std::fs::create_dir(directory.join("a-directory")).unwrap();
    let mode = rustix::fs::Mode::RWXU;
    rustix::fs::mknodat(rustix::fs::CWD, directory.join("a-fifo"), rustix::fs::FileType::Fifo, mode, 0)
        .unwrap();
    symlink(&file, directory.join("link-to-file")).unwrap();
    symlink(elsewhere.join("socket"), directory.join("link-to-socket")).unwrap();
    symlink(elsewhere.join("nothing"), directory.join("link-to-nothing")).unwrap();
    for name in ["a-file", "a-directory", "a-fifo", "link-to-file", "link-to-socket", "link-to-nothing"] {
        let path = directory.join(name);
        let before = std::fs::symlink_metadata(&path).unwrap();
        refused(&path, "something that is not a socket lies there");
        let after = std::fs::symlink_metadata(&path).unwrap();
        assert_eq!((before.ino(), before.mode(), before.mtime()), (after.ino(), after.mode(), after.mtime()));
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    assert_eq!(std::fs::read_to_string(directory.join("a-file")).unwrap(), "precious");
    assert!(!elsewhere.join("nothing").exists() && is_socket(&elsewhere.join("socket")));
    drop(live);
}

/// Goal:   the socket lives only where nobody else can replace it.
/// Method: directories that others may write, that are links, files or missing; each message says what to
///         do. A sticky one that everybody may write is fine.
#[test]
fn f54_r3_6_a_directory_that_others_control_is_refused() {
    let directory = TestDir::new();
    let make = |name: &str, mode: u32| {
        let path = directory.join(name);
        std::fs::create_dir(&path).unwrap();
        set_mode(&path, mode);
        path
    };
    for (name, mode) in [("everybody", 0o777), ("group", 0o770), ("others", 0o702)] {
        refused(&make(name, mode).join("s"), "writable by others");
    }
    for (name, mode) in [("own", 0o700), ("readable", 0o755), ("sticky", 0o1777)] {
        let path = make(name, mode).join("s");
        drop(bound(&path));
    }
    symlink(directory.join("own"), directory.join("link")).unwrap();
    refused(&directory.join("link/s"), "symbolic link");
    std::fs::write(directory.join("file"), "").unwrap();
    refused(&directory.join("file/s"), "is a file or a symbolic link");
    refused(&directory.join("missing/s"), "does not exist");
    refused(Path::new("/"), "does not end in a file name");
    refused(&directory.join("own/.."), "does not end in a file name");
    assert_eq!(names(&directory.join("own")), ["s.lock"]);
}

/// Goal:   a directory of another user is refused, unless it is sticky; there, what is another user's is.
/// Method: as root, directories, sockets and locks given to another uid.
#[test]
fn f54_r3_6_what_belongs_to_another_user_is_refused() {
    if !is_root("giving files to another user") {
        return;
    }
    let directory = TestDir::new();
    let give = |path: &Path| std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    let foreign = directory.join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    set_mode(&foreign, 0o755);
    give(&foreign);
    refused(&foreign.join("s"), "belongs to another user");
    set_mode(&foreign, 0o1777);
    drop(bound(&foreign.join("s")));

    let socket = foreign.join("theirs");
    dead_socket(&socket);
    give(&socket);
    refused(&socket, "a socket of another user lies there");
    assert!(is_socket(&socket));

    let lock = foreign.join("x.lock");
    std::fs::write(&lock, "").unwrap();
    give(&lock);
    let error = bind(&foreign.join("x")).map(|_| ()).unwrap_err();
    // Some kernels refuse to open another user's file there (fs.protected_regular), which is as good.
    let text = error.to_string();
    assert!(text.contains("belongs to another user") || text.contains("may not be written"), "{text}");
    assert_eq!(std::fs::metadata(&lock).unwrap().uid(), NOBODY);
}

/// Goal:   the lock file is not followed and not anything but a file.
/// Method: a link to a file, to nothing, a directory and a FIFO in its place.
#[test]
fn f54_a_lock_that_is_not_a_file_is_refused() {
    let directory = TestDir::new();
    let target = directory.join("target");
    std::fs::write(&target, "precious").unwrap();
    let lock = directory.join("s.lock");
    for link in [&target, &directory.join("nothing")] {
        symlink(link, &lock).unwrap();
        refused(&directory.join("s"), "symbolic link");
        std::fs::remove_file(&lock).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    assert!(!directory.join("nothing").exists());
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &lock, fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    refused(&directory.join("s"), "not a regular file");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    assert!(bind(&directory.join("s")).is_err());
    assert!(!directory.join("s").exists());
}

/// Goal:   a path that no socket address can hold is refused by both sides with its length and the limit;
///         the longest that can be held works, wherever in it the bytes are.
/// Method: one byte above and exactly at the limit, in a long directory and in a long name.
#[test]
fn r3_6_a_path_too_long_is_refused_by_both_sides() {
    let directory = TestDir::new();
    // A file name has a limit of its own, 80: it must not be reached first, however short the test's directory is.
    let inner = directory.join("inner-directory");
    std::fs::create_dir(&inner).unwrap();
    set_mode(&inner, 0o700);
    let base = inner.as_os_str().len() + 1;
    let long = inner.join("d".repeat(107 - base - 2));
    std::fs::create_dir(&long).unwrap();
    set_mode(&long, 0o700);
    for at_limit in [long.join("s"), inner.join("n".repeat(107 - base))] {
        assert_eq!(at_limit.as_os_str().len(), 107);
        let server = bound(&at_limit);
        let stop = server.shutdown_handle();
        let server = std::thread::spawn(move || server.serve().unwrap());
        Bystander::new(&at_limit).check("a long path");
        stop.shutdown().unwrap();
        server.join().unwrap();
        assert!(!at_limit.exists());
    }
    for above in [long.join("ss"), inner.join("n".repeat(108 - base)), inner.join("n".repeat(4000))] {
        let len = above.as_os_str().len();
        for error in
            [bind(&above).map(|_| ()).unwrap_err(), IpcClient::connect(&above).map(|_| ()).unwrap_err()]
        {
            assert!(
                matches!(&error, IpcError::SocketPathTooLong { len: l, max: 107, .. } if *l == len),
                "{error}"
            );
            assert!(error.to_string().contains(&format!("has {len} bytes")), "{error}");
        }
    }
}

/// Goal:   the socket and the lock are for their owner alone, whatever the umask.
/// Method: a server started with umask 0.
#[test]
fn f55_r3_6_the_socket_is_0600_whatever_the_umask() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "umask 0; exec \"$0\" serve --socket \"$1\""]);
    shell.arg(env!("CARGO_BIN_EXE_doorbell")).arg(&path);
    let _server = Process(shell.stderr(Stdio::null()).spawn().unwrap());
    eventually("the server serves", || IpcClient::connect(&path).is_ok());
    for name in ["s", "s.lock"] {
        let mode = std::fs::metadata(directory.join(name)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600, "{name}");
    }
}

/// Goal:   a server that stops removes its socket, and no other.
/// Method: stopped as it is; stopped with a file, and with another socket, in the place of its own.
#[test]
fn r3_6_a_server_that_stops_removes_its_own_socket_and_no_other() {
    let directory = TestDir::new();
    let path = directory.join("s");
    drop(bound(&path));
    assert_eq!(names(&directory.0), ["s.lock"]);

    let server = bound(&path);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "not yours").unwrap();
    drop(server);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "not yours");
    std::fs::remove_file(&path).unwrap();

    let server = bound(&path);
    std::fs::rename(&path, directory.join("moved")).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(is_socket(&path), "another's socket was removed");
    drop(other);
}

/// Goal:   who listens nowhere is said at once, with the path and what to do.
/// Method: no file, a dead socket, a plain file; by the library and by the command.
#[test]
fn r3_6_without_a_server_the_client_says_so() {
    let directory = TestDir::new();
    let (missing, dead, file) = (directory.join("missing"), directory.join("dead"), directory.join("file"));
    dead_socket(&dead);
    std::fs::write(&file, "").unwrap();
    for path in [&missing, &dead, &file, &directory.join("no/directory")] {
        let error = IpcClient::connect(path).map(|_| ()).unwrap_err();
        assert!(matches!(&error, IpcError::NotRunning { path: p } if p == path), "{error}");
        let call = run(&["call", "--type", "ping", "--socket", path.to_str().unwrap()]);
        assert_eq!(call.status.code(), Some(1));
        let said = stderr(&call);
        assert!(said.contains("no server listens at") && said.contains(path.to_str().unwrap()), "{said}");
        assert!(call.stdout.is_empty());
    }
    let stream = directory.join("stream");
    let _listener = UnixListener::bind(&stream).unwrap();
    let error = IpcClient::connect(&stream).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("not a doorbell socket"), "{error}");
    let error = IpcClient::connect(file.join("s")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("not a directory"), "{error}");
}

/// Goal:   another user cannot use the server: the socket's mode refuses him, and where somebody loosened
///         that, the server does, without making a segment (F55).
/// Method: as root: `doorbell call` as another uid; then, with the socket opened to all, a client that
///         checks nothing, with and without a hello.
#[test]
fn f55_r3_6_a_client_of_another_user_is_refused() {
    if !is_root("running as another user") {
        return;
    }
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    set_mode(server.directory(), 0o755);
    let programs = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &programs, "doorbell");
    let test = copy_for_everybody(&std::env::current_exe().unwrap(), &programs, "test");
    let call = || {
        let mut call = Command::new(&program);
        call.args(["call", "--type", "ping", "--socket"]).arg(server.path());
        let output = call.uid(NOBODY).gid(NOBODY).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    let said = call();
    assert!(said.contains("refuses other users than its own"), "{said}");
    set_mode(server.path(), 0o666);
    let said = call();
    // This library does not even say hello to a server of another user.
    assert!(said.contains("runs as uid 0"), "{said}");
    for role in ["stranger", "stranger-with-hello"] {
        for _ in 0..5 {
            let mut stranger = copy_at(&test, "child", role, server.path());
            let output = stranger.uid(NOBODY).gid(NOBODY).current_dir("/").output().unwrap();
            assert!(output.status.success(), "{role}: {}", stderr(&output));
        }
    }
    assert_eq!(server.process.segments(), 1, "a segment was made for a stranger");
    bystander.check("strangers");
    assert!(bystander.stat("sessions_refused") >= 10);
}

/// Goal:   F55: who cannot see the other's process, as between a container and the machine, is told by his user all the same:
///         a server in a pid namespace of its own serves clients outside of it, and those of another one.
/// Method: as root: `doorbell serve` in such a namespace; calls from here, and by `doorbell call` in a third one.
#[test]
fn f55_a_client_in_another_pid_namespace_is_served() {
    if !is_root("pid namespaces") {
        return;
    }
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", env!("CARGO_BIN_EXE_doorbell")]);
        command.stdin(Stdio::null());
        command
    };
    if !unshare().arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped, for there are no pid namespaces here: clients of another one");
        return;
    }
    let directory = TestDir::new();
    let (path, log) = (directory.join("s"), directory.join("log"));
    let mut serve = unshare();
    serve.args(["serve", "--socket"]).arg(&path).stderr(std::fs::File::create(&log).unwrap());
    let _server = Process(serve.spawn().unwrap());
    let said = || std::fs::read_to_string(&log).unwrap();
    eventually("the server serves", || said().contains("serving at"));
    Bystander::new(&path).check("the start");
    let output = unshare().args(["call", "--type", "ping", "--socket"]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{} {}", stderr(&output), said());
}

/// Goal:   a client sends nothing to a server of another user (F54).
/// Method: as root: a server as another uid, in a directory of its own; the library and the command.
#[test]
fn f54_r3_6_a_server_of_another_user_is_refused_by_the_client() {
    if !is_root("running as another user") {
        return;
    }
    let directory = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &directory, "doorbell");
    let theirs = directory.join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    set_mode(&theirs, 0o755);
    std::os::unix::fs::chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
    let path = theirs.join("s");
    let mut serve = Command::new(program);
    serve.args(["serve", "--socket"]).arg(&path).stderr(Stdio::null()).uid(NOBODY).gid(NOBODY);
    let _server = Process(serve.current_dir("/").spawn().unwrap());
    eventually("the server listens", || is_socket(&path));
    let error = IpcClient::connect(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error, IpcError::WrongServer { uid: NOBODY, .. }), "{error}");
    let call = run(&["call", "--type", "ping", "--socket", path.to_str().unwrap()]);
    assert_eq!(call.status.code(), Some(1));
    assert!(stderr(&call).contains("runs as uid 65534"), "{}", stderr(&call));
}

/// Goal:   without a runtime directory the default path is in a directory of the user's own that the server
///         makes; one that somebody else made there first is refused.
/// Method: as root: server and client of a made-up uid without any environment; then a squatter's directory.
#[test]
fn f54_the_default_directory_is_made_private_and_a_squatters_is_refused() {
    if !is_root("running as another user") {
        return;
    }
    let programs = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &programs, "doorbell");
    // A uid that no other run of this test uses at the same time.
    let uid = 1_000_000 + std::process::id();
    let directory = PathBuf::from(format!("/tmp/doorbell-{uid}"));
    let command = |name: &str| {
        let mut command = Command::new(&program);
        command.arg(name).uid(uid).gid(uid).env_clear().current_dir("/");
        command
    };
    let mut serve = command("serve");
    let mut server = Process(serve.stderr(Stdio::null()).spawn().unwrap());
    eventually("the server listens", || is_socket(&directory.join("doorbell.sock")));
    let stat = std::fs::metadata(&directory).unwrap();
    assert_eq!((stat.uid(), stat.mode() & 0o7777), (uid, 0o700));
    let call = command("call").args(["--type", "stats"]).output().unwrap();
    assert!(call.status.success() && call.stdout.starts_with(b"{\"calls\":"), "{}", stderr(&call));
    server.kill();
    std::fs::remove_dir_all(&directory).unwrap();

    std::fs::create_dir(&directory).unwrap();
    set_mode(&directory, 0o777);
    let squatted = command("serve").output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(squatted.status.code(), Some(1));
    assert!(stderr(&squatted).contains("belongs to another user"), "{}", stderr(&squatted));
}

/// Goal:   R3.4, F50: a path that is there can be connected to: nobody who comes while a server starts is told that none
///         is running once its socket can be seen.
/// Method: somebody who connects all the time while a server binds, many times over.
#[test]
fn f50_r3_4_a_socket_that_can_be_seen_can_be_connected_to() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let directory = TestDir::new();
    for round in 0..300 {
        // A path of its own each time: a server that goes may be met while it does.
        let path = directory.join(&format!("s{round}"));
        let address = SocketAddrUnix::new(&path).unwrap();
        let connecting = std::thread::spawn(move || {
            let flags = SocketFlags::CLOEXEC;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
            loop {
                match rustix::net::connect(&socket, &address) {
                    Err(rustix::io::Errno::NOENT) => std::hint::spin_loop(),
                    other => return other,
                }
            }
        });
        let server = bound(&path);
        assert_eq!(connecting.join().unwrap(), Ok(()), "round {round}");
        drop(server);
    }
}

/// Goal:   clients that connect between bind and serve wait and are answered (F26).
/// Method: connects queue before the reactor runs.
#[test]
fn f26_clients_that_come_before_the_reactor_runs_are_answered_once_it_does() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let server = bound(&path);
    let stop = server.shutdown_handle();
    let early: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || {
                let client = client(&path, WaitPolicy::Block);
                client.open().unwrap().call(MessageType::ECHO, b"early").unwrap()
            })
        })
        .collect();
    let server = std::thread::spawn(move || server.serve().unwrap());
    for client in early {
        assert_eq!(client.join().unwrap(), b"early");
    }
    stop.shutdown().unwrap();
    assert_eq!(server.join().unwrap().sessions_opened, 8);
}

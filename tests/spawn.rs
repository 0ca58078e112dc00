//! Servers that are started by their clients and end with them: trap 13, F52, F53.

mod common;

use common::process::{Actor, ServerProcess, doorbell, ready, returns, role, until_dismissed};
use common::{TestDir, eventually};
use doorbell::{ClientConfig, IpcClient, IpcError, MessageType, check_socket_path};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// How long servers stay without clients.
const LINGER: &str = "0.2";

/// The command of a server at `path` that writes its log beside it.
fn server_at(path: &Path) -> Command {
    let log = File::options().append(true).create(true).open(path.with_extension("log")).unwrap();
    let mut command = doorbell();
    command.args(["serve", "--linger", LINGER, "--socket"]).arg(path).stderr(Stdio::from(log));
    command
}

fn log(path: &Path) -> String {
    std::fs::read_to_string(path.with_extension("log")).unwrap_or_default()
}

fn patient() -> ClientConfig {
    ClientConfig { connect_timeout: Duration::from_secs(30), ..ClientConfig::smallest() }
}

#[test]
fn child() {
    let Some((role, path)) = role() else { return };
    assert_eq!(role, "caller");
    let client = IpcClient::connect_or_spawn(&path, &patient(), &mut server_at(&path)).unwrap();
    client.open().unwrap().call(MessageType::PING, b"").unwrap();
    ready();
    until_dismissed();
}

/// Goal:   however many callers race for a server that is not there, one is started; it ends with the last of them, whoever
///         that is, and leaves nothing (trap 13, F53).
/// Method: threads of this process and other processes at once, three times on the same path; the servers' log is counted.
#[test]
fn trap13_f53_one_server_is_started_and_ends_with_its_last_client() {
    let directory = TestDir::new();
    let path = directory.join("s");
    for round in 1..=3 {
        let mut actors: Vec<_> = (0..3).map(|_| Actor::start("caller", &path)).collect();
        let barrier = Arc::new(Barrier::new(8));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (path, barrier) = (path.clone(), Arc::clone(&barrier));
                std::thread::spawn(move || {
                    barrier.wait();
                    IpcClient::connect_or_spawn(&path, &patient(), &mut server_at(&path)).unwrap()
                })
            })
            .collect();
        let clients: Vec<IpcClient> = threads
            .into_iter()
            .map(|thread| returns("it connects", move || thread.join().unwrap()))
            .collect();
        actors.iter_mut().for_each(Actor::wait_until_ready);
        // With clients, it stays for longer than it would without.
        let begun = Instant::now();
        let connection = clients[0].open().unwrap();
        while begun.elapsed() < Duration::from_millis(500) {
            connection.call(MessageType::PING, b"").unwrap();
        }
        drop(connection);
        drop(clients);
        // One is left, in a process that is then killed: nobody says good-bye.
        let mut last = actors.pop().unwrap();
        actors.iter_mut().for_each(Actor::dismiss);
        assert!(IpcClient::connect(&path).is_ok());
        last.process.kill();
        eventually("the server has ended", || log(&path).matches("stopped after").count() == round);
        assert_eq!(log(&path).matches("serving at").count(), round, "{}", log(&path));
        eventually("its path is free", || check_socket_path(&path).is_ok());
        assert!(!path.exists());
    }
}

/// Goal:   a server whose starter dies before anybody connects does not stay (trap 13).
/// Method: nobody ever connects; it ends by itself, in order.
#[test]
fn trap13_a_server_that_nobody_comes_to_ends() {
    let mut server = ServerProcess::start(&["--linger", LINGER]);
    assert_eq!(server.process.wait().code(), Some(0));
    assert!(server.log().contains("stopped after 0 calls"), "{}", server.log());
}

/// Goal:   whoever starts something that is no server is told what became of it, and leaves nothing behind.
/// Method: a command that fails, three times at most; one that is not there, one that never listens, and its process.
#[test]
fn trap13_what_cannot_be_started_is_told_and_not_left_behind() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let mut failing = Command::new("sh");
    failing.arg("-c").arg("echo started >> \"$0\"; exit 7").arg(directory.join("starts"));
    let ended = IpcClient::connect_or_spawn(&path, &patient(), &mut failing).map(|_| ());
    assert!(matches!(&ended, Err(IpcError::ServerEnded { status }) if status.code() == Some(7)), "{ended:?}");
    assert_eq!(std::fs::read_to_string(directory.join("starts")).unwrap().lines().count(), 3);
    let none = Command::new(directory.join("no such program"));
    let absent = IpcClient::connect_or_spawn(&path, &patient(), &mut { none }).map(|_| ());
    assert!(matches!(absent, Err(IpcError::Io { .. })), "{absent:?}");
    let limit = Duration::from_millis(300);
    let hurried = ClientConfig { connect_timeout: limit, ..patient() };
    let mut silent = Command::new("sh");
    silent.arg("-c").arg("echo $$ > \"$0\"; exec sleep 1000").arg(directory.join("pid"));
    let late = IpcClient::connect_or_spawn(&path, &hurried, &mut silent).map(|_| ());
    assert!(matches!(late, Err(IpcError::ServerNotReady(after)) if after == limit), "{late:?}");
    let pid = std::fs::read_to_string(directory.join("pid")).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "{pid} was left behind");
    // The lock is free again.
    let client = IpcClient::connect_or_spawn(&path, &patient(), &mut server_at(&path)).unwrap();
    client.open().unwrap().call(MessageType::PING, b"").unwrap();
}

/// Goal:   a server that is there is used, whoever started it.
/// Method: one that was started otherwise; the command would fail.
#[test]
fn f53_a_server_that_is_there_is_used() {
    let server = ServerProcess::start(&[]);
    let client = IpcClient::connect_or_spawn(server.path(), &patient(), &mut Command::new("false")).unwrap();
    client.open().unwrap().call(MessageType::PING, b"").unwrap();
}

/// Goal:   a server that was started has no zombie when it ends before its starter.
/// Method: it ends because its client has gone; then this process has no child of that number.
#[test]
fn trap13_a_started_server_that_ends_is_waited_for() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let client = IpcClient::connect_or_spawn(&path, &patient(), &mut server_at(&path)).unwrap();
    drop(client);
    eventually("it has ended", || log(&path).contains("stopped after"));
    let own = std::process::id().to_string();
    eventually("it is no zombie", || {
        let zombie = |process: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            let Some((name, rest)) = stat.rsplit_once(')') else { return false };
            let mut rest = rest.split_whitespace();
            rest.next() == Some("Z") && rest.next() == Some(&own) && name.contains("(doorbell")
        };
        !std::fs::read_dir("/proc").unwrap().flatten().any(zombie)
    });
}

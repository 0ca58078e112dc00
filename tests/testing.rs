//! The kit for tests of programs that use doorbell: servers that are late, fail, hang, die and come back on demand.

use doorbell::testing::{Behaviour, TestProcess, TestServer, child_socket};
use doorbell::{
    CallOptions, ClientConfig, Context, HandlerError, HandlerTable, IpcClient, IpcError, IpcServer,
    MessageType, Reconnect, ReconnectingClient, Reply,
};
use std::process::Command;
use std::time::{Duration, Instant};

const GREET: MessageType = MessageType(260);
const PATIENCE: Duration = Duration::from_secs(30);

fn greet(context: &Context<'_, Behaviour>, name: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    context.state().pass()?;
    reply.write(b"hello ")?;
    reply.write(name)
}

static TABLE: HandlerTable<Behaviour> = HandlerTable::with_builtins().on(GREET, greet);

/// The server of [`TestProcess::of_test`].
#[test]
fn serve() {
    let Some(path) = child_socket() else { return };
    IpcServer::new(&TABLE, Behaviour::default()).bind(path).unwrap().serve().unwrap();
}

/// Goal:   handlers are late, fail and hang when the test says so, and only then.
/// Method: each of them, seen by a client; a call that hangs until it is let go on.
#[test]
fn f45_f58_a_servers_calls_are_late_fail_and_hang_on_demand() {
    let behaviour = Behaviour::default();
    let mut server = TestServer::start(&TABLE, behaviour.clone()).unwrap();
    let client = IpcClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    assert_eq!(connection.call(GREET, b"a").unwrap(), b"hello a");

    behaviour.fail(2);
    for _ in 0..2 {
        let failed = connection.call(GREET, b"b");
        assert!(matches!(&failed, Err(IpcError::Handler(why)) if why.contains("the test")), "{failed:?}");
    }
    assert_eq!(connection.call(GREET, b"c").unwrap(), b"hello c");

    let delay = Duration::from_millis(30);
    behaviour.delay(delay);
    let begun = Instant::now();
    assert_eq!(connection.call(GREET, b"d").unwrap(), b"hello d");
    assert!(begun.elapsed() >= delay);
    behaviour.delay(Duration::ZERO);

    behaviour.hang();
    let impatient = CallOptions { timeout: Some(Duration::from_millis(5)), ..CallOptions::default() };
    let late = connection.call_with(GREET, b"e", &impatient, |_| ());
    assert!(matches!(late, Err(IpcError::Timeout)), "{late:?}");
    assert!(behaviour.wait_until_waiting(1, PATIENCE), "it hangs in its handler");
    assert!(!behaviour.wait_until_waiting(2, Duration::ZERO));
    behaviour.go_on();
    assert_eq!(connection.call(GREET, b"f").unwrap(), b"hello f");
    assert_eq!(behaviour.entered(), 7);
    let counted = server.stop().unwrap().unwrap();
    assert!(counted.calls_total() >= 7);
    assert!(server.stop().unwrap().is_none());
}

/// Goal:   a server on a thread is stopped and started again on the same path, with the same state.
/// Method: a client that comes back to it.
#[test]
fn r3_4_a_server_on_a_thread_comes_back_on_the_same_path() {
    let behaviour = Behaviour::default();
    let mut server = TestServer::start(&TABLE, behaviour.clone()).unwrap();
    let client = ReconnectingClient::connect(server.path()).unwrap();
    let connection = client.open().unwrap();
    for round in 1..=5 {
        assert_eq!(connection.call(GREET, b"again").unwrap(), b"hello again");
        assert_eq!(behaviour.entered(), round);
        server.restart().unwrap();
    }
}

/// Goal:   a server in a process is killed, stopped, continued, terminated and started again on demand.
/// Method: a copy of this test as the server; what a client sees of each.
#[test]
fn f50_a_server_in_a_process_dies_and_comes_back_on_demand() {
    let mut server = TestProcess::of_test("serve").unwrap();
    let config = ClientConfig::default();
    let client = ReconnectingClient::connect_with(server.path(), &config, Reconnect::default()).unwrap();
    let connection = client.open().unwrap();
    assert_eq!(connection.call(GREET, b"a").unwrap(), b"hello a");

    server.pause().unwrap();
    let impatient = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
    let late = connection.call_with(GREET, b"b", &impatient);
    assert!(matches!(late, Err(IpcError::Timeout)), "{late:?}");
    server.resume().unwrap();
    assert_eq!(connection.call(GREET, b"c").unwrap(), b"hello c");

    server.kill().unwrap();
    let away = connection.call_with(GREET, b"d", &impatient);
    assert!(matches!(away, Err(IpcError::NotExecuted)), "{away:?}");
    server.kill().unwrap();
    server.restart().unwrap();
    assert_eq!(connection.call(GREET, b"e").unwrap(), b"hello e");
    server.restart().unwrap();
    assert_eq!(connection.call(GREET, b"f").unwrap(), b"hello f");
    assert!(server.terminate().unwrap().is_some());
    assert!(server.terminate().unwrap().is_none());
    let (path, directory) = (server.path().to_owned(), server.directory().to_owned());
    drop(server);
    assert!(!path.exists() && !directory.exists());
}

/// Goal:   what is no server is told so.
#[test]
fn a_process_that_does_not_serve_is_told_so() {
    let ended = TestProcess::start(|_| Command::new("false"));
    assert!(matches!(ended, Err(IpcError::ServerEnded { .. })), "{ended:?}");
}

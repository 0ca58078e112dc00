//! The examples, run against a real server.

#![allow(dead_code)]

mod common;

#[path = "../examples/callback_client.rs"]
mod callback_client;
#[path = "../examples/editor.rs"]
mod editor;
#[path = "../examples/reconnecting_client.rs"]
mod reconnecting_client;
#[path = "../examples/spawned_server.rs"]
mod spawned_server;
#[path = "../examples/testing_kit.rs"]
mod testing_kit;
#[path = "../examples/tokio_client.rs"]
mod tokio_client;

use common::process::{ServerProcess, returns};
use common::{Bystander, TestDir, eventually, stat};
use std::path::Path;
use std::time::Duration;

#[test]
fn r1_9_the_tokio_client_talks_to_doorbell_serve() {
    let server = ServerProcess::start(&[]);
    tokio_client::run(server.path()).unwrap();
}

#[test]
fn r1_9_the_callback_client_talks_to_doorbell_serve() {
    let server = ServerProcess::start(&[]);
    callback_client::run(server.path()).unwrap();
}

/// Goal:   R2.6: an editor whose every key cancels what was asked for with the one before shows what belongs to the last.
#[test]
fn r2_6_an_editor_shows_what_belongs_to_the_last_key() {
    let server = ServerProcess::start(&[]);
    let text: String = "let answer = forty_two(); // ".repeat(20);
    assert_eq!(editor::run(server.path(), &text).unwrap(), text);
}

/// Goal:   `shm/LAYOUT.md` is all that a client in another language needs.
/// Method: the one in Python calls, streams a model's answer, names a trace, and is told what was wrong; it shares no code
///         with the library.
#[test]
fn r2_5_a_client_of_another_language_talks_to_doorbell_serve() {
    let server = ServerProcess::start(&[]);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let python = |arguments: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/client.py");
        let mut command = std::process::Command::new("python3");
        command.arg(script).arg(server.path()).args(arguments).env("TRACEPARENT", trace);
        let output = command.output().expect("python3, which ci/setup.sh installs");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (said, wrong) = python(&[]);
    assert_eq!(wrong, "");
    assert!(said.starts_with("200 requests answered, byte for byte\n"), "{said}");
    assert!(
        said.contains("the server has answered 1200 calls\nloopback: no model has been asked."),
        "{said}"
    );
    assert!(said.trim_end().ends_with("say a few words"), "{said}");
    let (said, wrong) = python(&["99", "x"]);
    assert_eq!((said.as_str(), wrong.as_str()), ("", "client.py: UnknownType\n"));
    let (_, wrong) = python(&["17", "{\"messages\":1}"]);
    assert!(wrong.starts_with("client.py: DecodeError: "), "{wrong}");
    assert_eq!(python(&["2", "hello"]), ("hello\n".to_owned(), String::new()));
    assert!(!server.log().contains(trace));
    let (_, wrong) =
        python(&["17", r#"{"messages":[{"role":"user","content":""}],"model":"loopback-unauthorized"}"#]);
    assert!(wrong.starts_with("client.py: Upstream: unauthorized"), "{wrong}");
    assert!(server.log().contains(trace), "{}", server.log());
}

/// Goal:   R3.4: the reconnecting client gets its answers although the server is killed and started again.
/// Method: killed several times while it calls.
#[test]
fn r3_4_the_reconnecting_client_outlives_its_server() {
    let mut server = ServerProcess::start(&[]);
    let path = server.path().to_owned();
    let calling =
        std::thread::spawn(move || reconnecting_client::run(&path, 400, Duration::from_millis(2)).unwrap());
    for _ in 0..5 {
        let watcher = Bystander::new(server.path());
        let connection = watcher.client.open().unwrap();
        // Its own calls: those of the check, and each look.
        let mut own = 4;
        eventually("the client calls", || {
            own += 1;
            stat(&connection, "calls") >= own + 10
        });
        assert!(!calling.is_finished());
        server.process.kill();
        server.restart(&[]);
    }
    let answered = returns("all calls have an end", move || calling.join().unwrap());
    // One at most was under way at each kill, and half of them are sent again even then.
    assert!(answered >= 395, "{answered}");
}

/// Goal:   trap 13: two programs that bring their server with them share one, which ends with the last.
#[test]
fn trap13_a_spawned_server_is_shared_and_ends() {
    let directory = TestDir::new();
    let path = directory.join("s");
    let connect = || spawned_server::connect(Path::new(env!("CARGO_BIN_EXE_doorbell")), &path).unwrap();
    let clients = [connect(), connect()];
    for client in &clients {
        client.open().unwrap().call(doorbell::MessageType::PING, b"").unwrap();
    }
    drop(clients);
    eventually("the server has ended", || !path.exists());
}

#[test]
fn r3_4_the_testing_kit_shows_what_a_program_bears() {
    testing_kit::run().unwrap();
}

//! The examples, run against a real server.

#![allow(dead_code)]

mod common;

#[path = "../examples/callback_client.rs"]
mod callback_client;
#[path = "../examples/editor.rs"]
mod editor;
#[path = "../examples/tokio_client.rs"]
mod tokio_client;

use common::process::ServerProcess;

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
/// Method: the one in Python calls, streams a model's answer, and is told what was wrong; it shares no code with the library.
#[test]
fn r2_5_a_client_of_another_language_talks_to_doorbell_serve() {
    let server = ServerProcess::start(&[]);
    let python = |arguments: &[&str]| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/client.py");
        let output =
            std::process::Command::new("python3").arg(script).arg(server.path()).args(arguments).output();
        let output = output.expect("python3, which ci/setup.sh installs");
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
}

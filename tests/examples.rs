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

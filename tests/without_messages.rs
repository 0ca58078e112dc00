//! A server that was built without the feature `messages`: what is left of the built-in handlers.
#![cfg(not(feature = "messages"))]

mod common;

use common::{Bystander, TestDir, TestServer, client, stat};
use doorbell::{HandlerTable, IpcError, IpcServer, MessageType, ServerConfig, WaitPolicy};

/// Goal:   what needs JSON says that it was left out, whatever the body; everything else is served on.
/// Method: each of the three with no body, JSON and nonsense; the built-in handlers that are left, before and after.
#[test]
fn what_needs_json_says_that_it_was_left_out() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    for message_type in [MessageType::INSPECT, MessageType::END_SESSION, MessageType::ANALYZE_FILE] {
        for body in ["", "{}", r#"{"session":0,"generation":0}"#, r#"{"content":"x"}"#, "nonsense"] {
            let answer = connection.call(message_type, body.as_bytes());
            assert!(
                matches!(&answer, Err(IpcError::Handler(why)) if why.contains("without the feature `messages`")),
                "{message_type}, {body}: {answer:?}"
            );
        }
    }
    assert_eq!(connection.call(MessageType::PING, b"").unwrap(), b"");
    assert_eq!(stat(&connection, "calls_internal"), 15);
    bystander.check("what was left out");
}

/// Goal:   roots beneath which nothing would be read are refused, and the path is not taken.
#[test]
fn roots_of_files_are_refused() {
    static TABLE: HandlerTable<()> = HandlerTable::with_builtins();
    let directory = TestDir::new();
    let path = directory.join("s");
    let config = ServerConfig { file_roots: vec!["/".into()], ..ServerConfig::default() };
    let refused = IpcServer::new(&TABLE, ()).config(config).bind(&path).map(|_| ());
    assert!(
        matches!(&refused, Err(IpcError::Config(why)) if why.starts_with("file_roots: ") && why.contains("`messages`")),
        "{refused:?}"
    );
    assert!(!path.exists());
}

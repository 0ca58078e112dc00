//! Memory of a session that the machine has lost (FAULTS F19). One test: guarded memory is the process's, not a server's.

mod common;

use common::{TestServer, client, eventually};
use doorbell::protocol::handshake::DisconnectReason;
use doorbell::{CallOptions, IpcError, MessageType, WaitPolicy};
use doorbell_shm::bus;
use std::time::Duration;

/// Goal:   F19: a session of which memory is lost is ended and its client told why; the server and everybody else go on, and
///         the client can come back.
/// Method: the pages of one of two sessions are replaced as the handler of SIGBUS does it.
#[test]
fn f19_a_session_whose_memory_is_lost_ends_alone() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = client(server.path(), WaitPolicy::Block);
    let watching = bystander.open().unwrap();
    let before = bus::guarded();
    let victim = client(server.path(), WaitPolicy::Block);
    let connection = victim.open().unwrap();
    assert_eq!(connection.call(MessageType::ECHO, b"well").unwrap(), b"well");
    let own: Vec<_> = bus::guarded().into_iter().filter(|range| !before.contains(range)).collect();
    let [(start, len)] = own[..] else { panic!("{own:?}") };
    assert!((start..start + len).step_by(4096).all(bus::lose));
    // Bounded: without what is tested, nobody would answer.
    let bounded = CallOptions { timeout: Some(Duration::from_secs(20)), ..CallOptions::default() };
    let ping = || connection.call_with(MessageType::PING, b"", &bounded, |_| ());
    let under_way = ping();
    assert!(matches!(under_way, Err(IpcError::NotExecuted)), "{under_way:?}");
    let end = ping();
    assert!(matches!(end, Err(IpcError::Disconnected(DisconnectReason::MemoryLost))), "{end:?}");
    assert_eq!(watching.call(MessageType::ECHO, b"on").unwrap(), b"on");
    drop(connection);
    drop(victim);
    eventually("its memory is not guarded any more", || bus::guarded() == before);
    let again = client(server.path(), WaitPolicy::Block);
    assert_eq!(again.open().unwrap().call(MessageType::ECHO, b"again").unwrap(), b"again");
    drop(watching);
    assert_eq!(server.stop().ended(DisconnectReason::MemoryLost), 1);
}

//! Clients in a fork of their process (F9).
#![allow(unsafe_code)]

mod common;

use common::process::returns;
use common::{COUNT, TestServer, eventually};
use doorbell::{
    CallOptions, CallbackClient, IpcClient, IpcError, MessageType, Reconnect, ReconnectingClient, Result,
    WaitPolicy,
};
use rustix::process::{Pid, WaitOptions, waitpid};
use std::sync::mpsc::channel;
use std::time::Duration;

/// A fork of this process, which has no thread but this one; in it `None`.
fn fork() -> Option<Fork> {
    // SAFETY: the child waits for no thread of the parent's, and ends with `end`, or where it panics.
    match unsafe { libc::fork() } {
        0 => {
            std::panic::set_hook(Box::new(|_| end(false)));
            None
        }
        pid => Some(Fork(Pid::from_raw(pid).expect("a fork"))),
    }
}

/// Ends a fork, and says whether all was as it should be.
fn end(is_well: bool) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(i32::from(!is_well)) }
}

struct Fork(Pid);

impl Fork {
    /// Waits for its end. One that hangs is a failure, too, not a test that does not end.
    fn was_well(self) -> bool {
        let ended = move || waitpid(Some(self.0), WaitOptions::empty()).unwrap().unwrap().1;
        returns("the fork ends", ended).exit_status() == Some(0)
    }
}

fn is_refused<T>(result: Result<T>) -> bool {
    matches!(result, Err(IpcError::ForkedClient))
}

/// Goal:   F9: whatever a fork does with its parent's client is an error, and does nothing to the parent's session, in which a
///         call is under way; the fork gets a session of its own.
/// Method: a call whose body is to come; the fork tries everything, drops all, and connects; the rest of the body comes.
#[test]
fn f9_a_fork_may_not_use_its_parents_client_and_connects_anew() {
    for policy in [WaitPolicy::Handoff, WaitPolicy::Spin, WaitPolicy::Block] {
        let server = TestServer::start_with(doorbell::ServerConfig { reactors: 2, ..Default::default() });
        let client = common::client(server.path(), policy);
        let connection = client.open().unwrap();
        let call = connection.start(MessageType::ECHO, Some(5), &CallOptions::default()).unwrap();
        client.flush().unwrap();
        let (path, options) =
            (server.path().to_owned(), CallOptions { pieces: true, ..CallOptions::default() });
        let Some(fork) = fork() else {
            let started = connection.start(MessageType::ECHO, None, &CallOptions::default());
            let refused = is_refused(connection.call(COUNT, b""))
                && is_refused(connection.submit(COUNT, b"", &CallOptions::default()))
                && is_refused(connection.call(MessageType::ECHO, &[7; 100_000]))
                && is_refused(connection.stream(MessageType::ECHO, b"", &options))
                && is_refused(started)
                && is_refused(client.send(call, b"more"))
                && is_refused(client.flush())
                && is_refused(client.poll())
                && is_refused(client.poll_into(&mut [0; 8]))
                && is_refused(client.wait(None))
                && is_refused(client.prepare_to_wait())
                && is_refused(client.open());
            client.cancel(call);
            drop(connection);
            drop(client);
            let own = IpcClient::connect(&path).unwrap();
            end(refused && own.open().unwrap().call(MessageType::ECHO, b"mine").unwrap() == b"mine")
        };
        assert!(fork.was_well());
        eventually("there is room", || client.send(call, b"whole").unwrap() == 5);
        assert_eq!(connection.call(COUNT, b"").unwrap().len(), 8);
        eventually("it is answered", || client.wait(None).unwrap() && client.poll().unwrap().is_some());
        assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    }
}

/// Goal:   F9: so it is with an answer that has been taken and is read and dropped in the fork.
#[test]
fn f9_an_answer_is_its_takers() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = common::client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    connection.submit(MessageType::ECHO, b"answer", &CallOptions::default()).unwrap();
    assert!(client.wait(None).unwrap());
    let reply = client.poll().unwrap().unwrap();
    let Some(fork) = fork() else {
        let refused = is_refused(reply.to_vec());
        drop(reply);
        end(refused)
    };
    assert!(fork.was_well());
    assert_eq!(reply.to_vec().unwrap(), b"answer");
}

/// Goal:   F9: clients that come back by themselves do not come back in a fork; those with a thread do not wait for it there.
#[test]
fn f9_so_it_is_with_clients_that_do_more() {
    let server = TestServer::start(WaitPolicy::Block);
    let config = doorbell::ClientConfig { policy: WaitPolicy::Block, ..Default::default() };
    let reconnecting =
        ReconnectingClient::connect_with(server.path(), &config, Reconnect::default()).unwrap();
    let connection = reconnecting.open().unwrap();
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    let callback = CallbackClient::connect(server.path()).unwrap();
    let Some(fork) = fork() else {
        let refused = is_refused(connection.call(MessageType::ECHO, b""))
            && is_refused(reconnecting.poll())
            && is_refused(reconnecting.open())
            && is_refused(callback.call(MessageType::ECHO, vec![], |_| {}));
        drop(connection);
        drop(reconnecting);
        callback.close();
        end(refused)
    };
    assert!(fork.was_well());
    assert_eq!(connection.call(MessageType::ECHO, b"on").unwrap(), b"on");
    let (answered, answer) = channel();
    let told = move |answer| answered.send(answer).unwrap();
    callback.call(MessageType::ECHO, b"on".to_vec(), told).unwrap().detach();
    assert_eq!(answer.recv_timeout(Duration::from_secs(30)).unwrap().unwrap(), b"on");
}

//! Bodies of any length: frames in both directions, credit, leases, and what goes wrong with them
//! (R1.5, R1.9, P3, P4; DESIGN §3, §5).

mod common;

use common::{TestServer, client, eventually, stat};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy};

const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

/// Different for every seed, in every byte.
fn body(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn configs(policy: WaitPolicy) -> [ClientConfig; 3] {
    let base = ClientConfig { policy, ..ClientConfig::default() };
    [
        base.clone(),
        ClientConfig { policy, ..ClientConfig::smallest() },
        ClientConfig { medium_slots: 2, large_slots: 2, ring_entries: 64, ..base },
    ]
}

/// Goal:   R1.5: a message of any length up to the limit comes back byte for byte.
/// Method: lengths at every edge of slots, frames and windows, through leases, through base slots alone, and through
///         large base slots; every policy.
#[test]
fn r1_5_messages_of_any_length_come_back() {
    for policy in ALL {
        let server = TestServer::start(policy);
        for config in configs(policy) {
            let client = IpcClient::connect_with(server.path(), &config).unwrap();
            let connection = client.open().unwrap();
            for len in
                [0, 1, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 16383, 16384, 16385, 65536, 65537, 300_001]
            {
                let request = body(len, len as u64);
                let answer = connection.call(MessageType::ECHO, &request).unwrap();
                assert!(answer == request, "{len} bytes under {policy:?}");
            }
        }
    }
}

/// Goal:   R1.5: 10 485 760 bytes pass; one byte more is `MessageTooLarge`, and nothing else is lost.
#[test]
fn r1_5_the_longest_message_passes_and_one_byte_more_is_refused() {
    let server = TestServer::start(WaitPolicy::Handoff);
    let client = client(server.path(), WaitPolicy::Handoff);
    let connection = client.open().unwrap();
    assert_eq!(client.max_message_size(), 10_485_760);
    let mut longest = body(10_485_761, 1);
    let error = connection.call(MessageType::ECHO, &longest).unwrap_err();
    assert!(matches!(error, IpcError::MessageTooLarge(10_485_760)), "{error}");
    let error = connection.submit(MessageType::ECHO, &longest, &CallOptions::default()).unwrap_err();
    assert!(matches!(error, IpcError::MessageTooLarge(10_485_760)), "{error}");
    longest.pop();
    assert!(connection.call(MessageType::ECHO, &longest).unwrap() == longest);
    assert_eq!(connection.call(MessageType::ECHO, b"short").unwrap(), b"short");
}

/// Goal:   room for the next frame of a request is not forgotten between a poll, which notes it, and a wait: whoever
///         sends, polls and waits gets on, and so does a call of one frame at a time.
/// Method: the one slot for frames has been used; when the server has taken it, polls; then a wait must say so, once.
#[test]
fn r1_9_room_that_a_poll_has_seen_ends_the_next_wait() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let probe = client(server.path(), WaitPolicy::Block);
        let probe = probe.open().unwrap();
        let client =
            IpcClient::connect_with(server.path(), &ClientConfig { policy, ..ClientConfig::smallest() });
        let client = client.unwrap();
        let connection = client.open().unwrap();
        let request = body(5 * 1024, 3);
        let id = connection.start(MessageType::ECHO, Some(5 * 1024), &CallOptions::default()).unwrap();
        let (mut sent, mut answer) = (0, None);
        loop {
            eventually("there is room for a frame", || {
                let more = client.send(id, &request[sent..]).unwrap();
                sent += more;
                client.flush().unwrap();
                more > 0
            });
            if sent == request.len() {
                break;
            }
            eventually("the frame is taken", || {
                assert!(client.poll().unwrap().is_none());
                stat(&probe, "bytes_in") >= sent as u64
            });
            assert!(client.poll().unwrap().is_none());
            let second = Some(std::time::Duration::from_secs(1));
            assert!(client.wait(second).unwrap(), "{sent} bytes under {policy:?}");
        }
        eventually("the answer is there", || {
            answer = client.poll().unwrap().map(|reply| reply.to_vec().unwrap());
            answer.is_some()
        });
        assert!(answer.unwrap() == request);
    }
}

/// Waits until as much shared memory of a session's exists as `condition` says.
fn eventually_has(client: &IpcClient, what: &str, condition: impl Fn(u64) -> bool) {
    eventually(what, || condition(client.shared_bytes().unwrap()));
}

/// Goal:   F59: a lease may lie where another one was that the server has taken back without the client's knowing,
///         whether answers in the old one have been done with or not.
/// Method: a client has a lease of 4 KiB slots, asks for another of 16 KiB slots and has to wait; others, who wait too,
///         have the old one taken back; then they go, and the new one comes to the same place. Once with nothing in the
///         old one, once with an answer in it that the caller still holds, which is gone then.
#[test]
fn f59_a_lease_may_lie_where_one_was_that_has_gone() {
    for holds in [false, true] {
        let sweep_interval = std::time::Duration::from_millis(250);
        let base = ServerConfig { policy: WaitPolicy::Block, reactors: 1, ..ServerConfig::default() };
        let server = TestServer::start_with(ServerConfig { sweep_interval, memory_budget: 2 << 20, ..base });
        let probe = client(server.path(), WaitPolicy::Block);
        let probe = probe.open().unwrap();
        let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
        let patient = IpcClient::connect_with(server.path(), &config).unwrap();
        let without = patient.shared_bytes().unwrap();
        let connection = patient.open().unwrap();
        let small = body(3000, 1);
        assert_eq!(connection.call(MessageType::ECHO, &small).unwrap(), small);
        assert_eq!(patient.shared_bytes().unwrap(), without + (8 << 10), "it has a lease");
        let mut held = None;
        if holds {
            connection.submit(MessageType::ECHO, &small, &CallOptions::default()).unwrap();
            assert!(patient.wait(None).unwrap());
            held = patient.poll().unwrap();
            assert_eq!(held.as_ref().unwrap().len(), 3000);
        }

        let config =
            ClientConfig { ring_entries: 128, small_slots: 64, lease_pages: 1000, ..ClientConfig::default() };
        let greedy = IpcClient::connect_with(server.path(), &config).unwrap();
        let many = greedy.open().unwrap().detach();
        while stat(&probe, "leases_waited") == 0 {
            greedy.attached(many).start(MessageType::ECHO, Some(1 << 20), &CallOptions::default()).unwrap();
            eventually("a lease is granted, or waits", || {
                assert!(greedy.poll().unwrap().is_none());
                greedy.waits_for_memory().is_none() || stat(&probe, "leases_waited") > 0
            });
        }
        let large = body(100_000, 2);
        let id = connection.start(MessageType::ECHO, Some(100_000), &CallOptions::default()).unwrap();
        patient.flush().unwrap();
        // Only the old lease is no multiple of 16 KiB. The others stand still, too: what is taken from them may come at
        // once.
        let is_gone = |bytes: u64| (bytes - without).is_multiple_of(16 << 10);
        eventually_has(&patient, "the old lease has gone", is_gone);
        drop(greedy);
        eventually_has(&patient, "the new lease has come", |bytes| is_gone(bytes) && bytes > without);

        let (mut sent, mut answer) = (0, None);
        eventually("the long call is answered", || {
            if sent < large.len() {
                sent += patient.send(id, &large[sent..]).unwrap();
            }
            answer = patient.poll().unwrap().map(|reply| reply.to_vec().unwrap());
            answer.is_some()
        });
        assert!(answer.unwrap() == large);
        if let Some(held) = held {
            assert!(matches!(held.to_vec(), Err(IpcError::MemoryTakenBack)));
        }
        assert!(connection.call(MessageType::ECHO, &large).unwrap() == large);
    }
}

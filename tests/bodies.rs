//! Bodies of any length: frames in both directions, credit, leases, and what goes wrong with them
//! (R1.5, R1.9, P3, P4; DESIGN §3, §5).

mod common;

use common::{TestServer, client};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, WaitPolicy};

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

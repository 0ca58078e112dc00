//! Calls end to end, through a real socket and a real segment.

mod common;

use common::TestServer;
use doorbell::{ClientConfig, IpcClient, MessageType, WaitPolicy};

#[test]
fn an_echo_comes_back_byte_for_byte_at_every_length() {
    for policy in [WaitPolicy::Spin, WaitPolicy::Block] {
        let server = TestServer::start(policy);
        let config = ClientConfig { policy, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let connection = client.open().unwrap();
        for len in [0, 1, 7, 8, 1023, 1024, 1025, 4096, 4097, 16384] {
            let request: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
            assert_eq!(
                connection.call(MessageType::ECHO, &request).unwrap(),
                request,
                "{len} bytes, {policy:?}"
            );
        }
    }
}

//! A client that outlives its server: stop `doorbell serve` while it runs, and start it again.
//!
//! ```sh
//! doorbell serve &
//! cargo run --example reconnecting_client
//! ```

use doorbell::{
    CallOptions, ClientConfig, IpcError, LinkStatus, MessageType, Reconnect, ReconnectingClient, Result,
};
use std::path::Path;
use std::time::Duration;

fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).map_or_else(doorbell::default_socket_path, Into::into);
    run(&socket, 100, Duration::from_millis(100)).map(drop)
}

/// Calls so many times, with a pause in between; returns how many calls were answered.
pub fn run(socket: &Path, calls: u32, pause: Duration) -> Result<u32> {
    let reconnect = Reconnect::default().on_status(|status| match status {
        LinkStatus::Disconnected { reason } => println!("disconnected: {reason}"),
        other => println!("{other:?}"),
    });
    let client = ReconnectingClient::connect_with(socket, &ClientConfig::default(), reconnect)?;
    let connection = client.open()?;
    // An echo may be executed twice; an order for a pizza may not.
    let patience = Some(Duration::from_secs(10));
    let idempotent = CallOptions { idempotent: true, timeout: patience, ..CallOptions::default() };
    let once = CallOptions { timeout: patience, ..CallOptions::default() };
    let mut answered = 0;
    for i in 0..calls {
        let options = if i % 2 == 0 { &idempotent } else { &once };
        match connection.call_with(MessageType::ECHO, &i.to_le_bytes(), options) {
            Ok(answer) => {
                assert_eq!(answer, i.to_le_bytes());
                answered += 1;
            }
            // Only its owner knows whether to send it again.
            Err(IpcError::ConnectionLost) => println!("call {i} may or may not have been executed"),
            Err(IpcError::NotExecuted) => println!("call {i} was not executed: no server for too long"),
            Err(error) => return Err(error),
        }
        std::thread::sleep(pause);
    }
    println!("{answered} of {calls} calls were answered");
    Ok(answered)
}

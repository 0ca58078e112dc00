//! A client for plain threads: calls return at once and are answered by callback, on a thread of the client's.
//!
//! ```sh
//! doorbell serve &
//! cargo run --example callback_client
//! ```

use doorbell::{CallbackClient, IpcError, MessageType, Result, StreamEvent};
use std::path::Path;
use std::sync::mpsc::channel;

fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).map_or_else(doorbell::default_socket_path, Into::into);
    run(&socket)
}

/// All of it, against the server at `socket`.
pub fn run(socket: &Path) -> Result<()> {
    let client = CallbackClient::connect(socket)?;
    let (done, all_done) = channel();

    let told = done.clone();
    let call = client.call(MessageType::ECHO, b"hello".to_vec(), move |answer| {
        match answer {
            Ok(bytes) => println!("answered: {}", String::from_utf8_lossy(&bytes)),
            Err(error) => println!("not answered: {error}"),
        }
        told.send(()).ok();
    })?;
    // Dropping the handle would cancel the call.
    call.detach();

    let (told, mut bytes) = (done, 0);
    let stream = client.stream(MessageType::ECHO, vec![7; 1_000_000], move |event| match event {
        StreamEvent::Frame(frame) => bytes += frame.len(),
        StreamEvent::End(result) => {
            println!("streamed: {bytes} bytes, {result:?}");
            told.send(()).ok();
        }
    })?;
    // This thread is free meanwhile. Both senders are gone once both calls have ended.
    for () in all_done {}
    drop(stream);

    // A queue that is full says so instead of making the caller wait.
    let mut sent = Vec::new();
    let refused = loop {
        match client.call(MessageType::ECHO, vec![1; 1000], |_| ()) {
            Ok(call) => sent.push(call),
            Err(error) => break error,
        }
        if sent.len() == 100_000 {
            break IpcError::WouldBlock;
        }
    };
    println!("{} calls were taken at once, then: {refused}", sent.len());
    // These have nobody who wants their answers any more.
    drop(sent);
    client.close();
    Ok(())
}

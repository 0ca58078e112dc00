//! A client on tokio: many calls at once, a stream, a time-out, and calls that are cancelled by dropping them.
//!
//! ```sh
//! doorbell serve &
//! cargo run --example tokio_client
//! ```

use doorbell::{AsyncClient, CallOptions, IpcError, MessageType, Result};
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;

fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).map_or_else(doorbell::default_socket_path, Into::into);
    run(&socket)
}

/// All of it, against the server at `socket`.
pub fn run(socket: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("tokio starts").block_on(talk(socket))
}

async fn talk(socket: &Path) -> Result<()> {
    let client = AsyncClient::connect(socket).await?;

    // Clones share one session: a call that finds no room waits for it.
    let mut calls = JoinSet::new();
    for i in 0..1000u32 {
        let client = client.clone();
        calls.spawn(async move { client.call(MessageType::ECHO, &i.to_le_bytes()).await });
    }
    let mut bytes = 0;
    while let Some(call) = calls.join_next().await {
        bytes += call.expect("no task panics")?.len();
    }
    println!("1000 calls at once were answered with {bytes} bytes");

    // An answer is read as it comes; while nobody reads, the server stands still.
    let mut frames = 0;
    let mut answer = client.stream(MessageType::ECHO, &vec![7; 1_000_000], &CallOptions::default()).await?;
    while let Some(frame) = answer.next().await {
        frame?;
        frames += 1;
    }
    println!("a megabyte came back in {frames} frames");

    // Whoever drops a call cancels it, here by giving up at once.
    let impatient = CallOptions { timeout: Some(Duration::ZERO), ..CallOptions::default() };
    match client.call_with(MessageType::ECHO, b"too late", &impatient).await {
        Err(IpcError::Timeout) => println!("a call was given up and cancelled"),
        answer => println!("a call was answered before it could be given up: {} bytes", answer?.len()),
    }
    drop(client.stream(MessageType::ECHO, &vec![7; 1_000_000], &CallOptions::default()).await?);
    client.call(MessageType::PING, b"").await?;
    println!("a stream was dropped, and the session goes on");
    Ok(())
}

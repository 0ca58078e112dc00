//! `doorbell call`: one request, one answer.

use clap::Args;
use doorbell::{
    ClientConfig, IpcClient, IpcError, MessageType, TraceParent, WaitPolicy, default_socket_path,
};
use std::error::Error;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Send one request and print its answer.
#[derive(Debug, Args)]
pub struct CallOptions {
    /// Message type: ping, echo, stats, complete, chat, analyze-file, or a number.
    #[arg(long = "type", value_name = "TYPE", default_value = "echo")]
    message_type: MessageType,
    /// File whose JSON is the body; `-` reads standard input. Without it the body is empty.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Give up after so many milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    timeout_ms: u64,
    /// The trace that the call belongs to, as in the header of W3C Trace Context: 00-<32 hex digits>-<16>-<2>.
    #[arg(long, value_name = "TRACEPARENT")]
    traceparent: Option<TraceParent>,
}

/// Sends the request; prints the answer and a line end.
pub fn run(options: &CallOptions) -> Result<(), Box<dyn Error>> {
    let body = match &options.json {
        Some(path) => read_json(path)?,
        None => Vec::new(),
    };
    let path = options.socket.clone().unwrap_or_else(default_socket_path);
    let timeout = Duration::from_millis(options.timeout_ms);
    let config = ClientConfig {
        policy: WaitPolicy::Block,
        connect_timeout: timeout,
        name: "doorbell call".to_owned(),
        ..ClientConfig::default()
    };
    let client = IpcClient::connect_with(path, &config)?;
    if body.len() > client.max_message_size() {
        return Err(IpcError::MessageTooLarge(client.max_message_size()).into());
    }
    let connection = client.open()?;
    let call = doorbell::CallOptions {
        timeout: Some(timeout),
        reply_capacity: client.max_message_size(),
        traceparent: options.traceparent,
        ..doorbell::CallOptions::default()
    };
    let answer = connection.call_with(options.message_type, &body, &call, |reply| reply.to_vec())??;
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&answer)?;
    stdout.write_all(b"\n")?;
    Ok(())
}

/// The bytes of one JSON value, as they stand in the file, surrounding white space left out.
fn read_json(path: &Path) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut text = Vec::new();
    let name = if path == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut text)?;
        "standard input".to_owned()
    } else {
        let file = std::fs::File::open(path).map_err(|e| format!("cannot open {}: {e}", path.display()))?;
        { file }.read_to_end(&mut text).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        path.display().to_string()
    };
    let value: &serde_json::value::RawValue = serde_json::from_slice(&text).map_err(|e| {
        format!("{name} does not hold one JSON value: {e}; give one value, or convert lines one by one")
    })?;
    Ok(value.get().as_bytes().to_vec())
}

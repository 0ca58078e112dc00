//! Commands that look at a running server: `stat`, `ps`, `top`, `trace`. They ask it by messages of its own protocol
//! ([`doorbell::inspect`]), so whoever can connect can look, and nobody else.

pub mod ps;
pub mod stat;
pub mod top;
pub mod trace;
mod words;

use clap::Args;
use doorbell::inspect::{EndSession, Inquiry, Report};
use doorbell::protocol::handshake::DisconnectReason;
use doorbell::{
    CallOptions, ClientConfig, IpcClient, IpcError, MessageType, WaitPolicy, default_socket_path,
};
use std::cell::RefCell;
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Prints a text; `false` if whoever reads has had enough.
fn print(text: &str) -> std::io::Result<bool> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    }
}

/// Which server.
#[derive(Debug, Args)]
pub struct Where {
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// How long a server may take to answer. A handler may hold it up.
const PATIENCE: Duration = Duration::from_secs(3);

/// A server that is looked at.
pub struct Watched {
    client: RefCell<IpcClient>,
    path: PathBuf,
    config: ClientConfig,
}

impl Watched {
    /// Connects to it.
    pub fn connect(at: &Where, name: &str) -> Result<Self, IpcError> {
        let config = ClientConfig {
            policy: WaitPolicy::Block,
            connect_timeout: PATIENCE,
            name: format!("doorbell {name}"),
            ..ClientConfig::default()
        };
        let path = at.socket.clone().unwrap_or_else(default_socket_path);
        Ok(Self { client: RefCell::new(IpcClient::connect_with(&path, &config)?), path, config })
    }

    /// Asks what there is.
    pub fn ask(&self, inquiry: &Inquiry) -> Result<Report, Box<dyn Error>> {
        let answer = self.call(MessageType::INSPECT, &serde_json::to_vec(inquiry)?)?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// Ends a session; whether it lived, if that is known.
    pub fn end(&self, whom: EndSession) -> Result<Option<bool>, Box<dyn Error>> {
        let answer = self.call(MessageType::END_SESSION, &serde_json::to_vec(&whom)?)?;
        let answer: serde_json::Value = serde_json::from_slice(&answer)?;
        Ok(answer["ended"].as_bool())
    }

    fn call(&self, message_type: MessageType, body: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
        let mut answer = self.call_once(message_type, body);
        if matches!(answer, Err(IpcError::Disconnected(DisconnectReason::IdleTimeout))) {
            // It was looked at too long ago.
            *self.client.borrow_mut() = IpcClient::connect_with(&self.path, &self.config)?;
            answer = self.call_once(message_type, body);
        }
        match answer {
            Err(IpcError::Timeout) => Err("the server does not answer within 3 s: a handler may hold its first reactor \
                                           up; what that runs is also in the metrics, which a thread of their own serves"
                .into()),
            other => Ok(other?),
        }
    }

    fn call_once(&self, message_type: MessageType, body: &[u8]) -> Result<Vec<u8>, IpcError> {
        let client = self.client.borrow();
        let options = CallOptions {
            timeout: Some(PATIENCE),
            reply_capacity: client.max_message_size(),
            ..CallOptions::default()
        };
        let connection = client.open()?;
        let until = Instant::now() + PATIENCE;
        loop {
            match connection.call_with(message_type, body, &options, |reply| reply.to_vec()) {
                // Others watch, too, and a server answers few at a time.
                Err(IpcError::Overloaded { retry_ms }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(retry_ms));
                }
                answer => return answer?,
            }
        }
    }
}

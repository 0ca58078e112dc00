//! `doorbell chat`, `complete`, `analyze`: a question, and its answer as it comes.

mod analyze;
mod exchange;
mod print;

pub use analyze::{AnalyzeOptions, run as analyze};

use clap::Args;
use doorbell::codec::{Codec, Json};
use doorbell::messages::{AIRequest, Message, MessageRole};
use doorbell::{
    CallOptions, ClientConfig, IpcClient, IpcError, MessageType, TraceParent, WaitPolicy, default_socket_path,
};
use exchange::{Exchange, Interrupt};
use std::error::Error;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What a shell reports of a program that an interrupt has ended.
const INTERRUPTED: u8 = 130;

/// A prompt, and who is to answer it.
#[derive(Debug, Args)]
pub struct AskOptions {
    /// The prompt; words are joined by spaces. Without it, or as `-`, standard input is the prompt.
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
    /// The model that is to answer.
    #[arg(long, short, value_name = "MODEL", env = "DOORBELL_MODEL", default_value = "loopback")]
    model: String,
    /// Instructions that come before the prompt.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Sampling temperature.
    #[arg(long, value_name = "T", value_parser = finite)]
    temperature: Option<f64>,
    /// Most tokens of the answer.
    #[arg(long, value_name = "N")]
    max_tokens: Option<u32>,
    /// Print each chunk of the answer as a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: Server,
}

/// Which server is asked, and how long it has.
#[derive(Debug, Args)]
struct Server {
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The server gives up on an answer that is not complete after so many milliseconds [default: never]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout_ms: Option<u64>,
    /// The trace that the call belongs to, as in the header of W3C Trace Context: 00-<32 hex digits>-<16>-<2>.
    #[arg(long, value_name = "TRACEPARENT")]
    traceparent: Option<TraceParent>,
}

impl Server {
    /// How long a connection may take.
    const CONNECT: Duration = Duration::from_secs(5);

    fn connect(&self, name: &str) -> Result<IpcClient, IpcError> {
        let config = ClientConfig {
            policy: WaitPolicy::Block,
            connect_timeout: Self::CONNECT,
            name: format!("doorbell {name}"),
            ..ClientConfig::default()
        };
        IpcClient::connect_with(self.socket.clone().unwrap_or_else(default_socket_path), &config)
    }

    /// What a call says beside its request.
    fn options(&self) -> CallOptions {
        let deadline = self.timeout_ms.map(Duration::from_millis);
        CallOptions { deadline, traceparent: self.traceparent, ..CallOptions::default() }
    }
}

fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("a number is wanted, such as 0.7".to_owned()),
    }
}

/// Asks with a message of `message_type`, prints the answer as it comes.
pub fn run(options: &AskOptions, message_type: MessageType, name: &str) -> Result<ExitCode, Box<dyn Error>> {
    let prompt = prompt(&options.prompt)?;
    let request = AIRequest {
        messages: vec![Message { role: MessageRole::User, content: prompt, tool_calls: None }],
        model: options.model.clone(),
        temperature: options.temperature,
        max_tokens: options.max_tokens.map(f64::from),
        system_prompt: options.system.clone(),
        stream: Some(true),
        tools: None,
    };
    let mut body = Vec::new();
    Json::new().encode_request(&request, &mut body);
    let interrupt = Interrupt::listen()?;
    let client = options.server.connect(name)?;
    let mut exchange = Exchange::begin(&client, message_type, &body, &options.server.options())?;
    let mut printer = print::Printer::new(options.json);
    while let Some(chunk) = exchange.next(&interrupt)? {
        printer.chunk(&chunk)?;
    }
    printer.end()?;
    Ok(if exchange.is_cancelled() {
        ExitCode::from(INTERRUPTED)
    } else if printer.has_failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The prompt of the arguments, or of standard input.
fn prompt(words: &[String]) -> Result<String, Box<dyn Error>> {
    let text = match words {
        [] if std::io::stdin().is_terminal() => {
            return Err("there is no prompt: give one as an argument, or on standard input".into());
        }
        [] => read_stdin()?,
        [dash] if dash == "-" => read_stdin()?,
        words => words.join(" "),
    };
    if text.trim().is_empty() {
        return Err("the prompt is empty: give one as an argument, or on standard input".into());
    }
    Ok(text)
}

fn read_stdin() -> Result<String, Box<dyn Error>> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut bytes)
        .map_err(|e| format!("cannot read standard input: {e}"))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        format!("standard input is no UTF-8 text: byte {at} begins no character; convert it first").into()
    })
}

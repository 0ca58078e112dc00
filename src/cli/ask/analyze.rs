//! `doorbell analyze`: facts about a file, and an answer to a question about it.

use super::{Server, read_stdin};
use clap::Args;
use doorbell::codec::{Codec, Json};
use doorbell::messages::AnalyzeFile;
use doorbell::{CallOptions, IpcError, MessageType};
use doorbell_shm::entry::codec;
use serde_json::Value;
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

/// A file, and what is asked about it.
#[derive(Debug, Args)]
pub struct AnalyzeOptions {
    /// The file; `-` is standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// A question about it, for the server's provider; words are joined by spaces.
    #[arg(value_name = "QUESTION")]
    question: Vec<String>,
    /// Let the server read the file, which must lie beneath one of its roots, instead of sending what is in it.
    #[arg(long)]
    by_path: bool,
    /// Print the answer as the server gave it, a line of JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: Server,
}

/// Asks about the file and prints what comes.
pub fn run(options: &AnalyzeOptions) -> Result<(), Box<dyn Error>> {
    let mut request = AnalyzeFile {
        question: Some(options.question.join(" ")).filter(|question| !question.is_empty()),
        ..AnalyzeFile::default()
    };
    if options.by_path {
        let path = std::path::absolute(&options.file)?;
        let text = path.into_os_string().into_string().map_err(|_| "the path is no UTF-8 text")?;
        request.path = Some(text);
    } else {
        request.content = Some(content(&options.file)?);
    }
    let mut body = Vec::new();
    Json::new().encode_analyze(&request, &mut body);
    let client = options.server.connect("analyze")?;
    if body.len() > client.max_message_size() {
        return Err(IpcError::MessageTooLarge(client.max_message_size()).into());
    }
    let connection = client.open_with(codec::JSON, false)?;
    let call =
        CallOptions { reply_capacity: client.max_message_size().min(16 << 10), ..options.server.options() };
    let answer = connection.call_with(MessageType::ANALYZE_FILE, &body, &call, |reply| reply.to_vec())??;
    if options.json {
        return write(&answer);
    }
    write(text(&serde_json::from_slice(&answer)?).as_bytes())
}

/// Prints a text and the end of its last line.
fn write(bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.write_all(b"\n")?;
    Ok(())
}

fn content(file: &std::path::Path) -> Result<String, Box<dyn Error>> {
    if file == std::path::Path::new("-") {
        return read_stdin();
    }
    let name = file.display();
    let bytes = std::fs::read(file).map_err(|e| format!("cannot read {name}: {e}"))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        format!("{name} is no UTF-8 text (byte {at} begins no character): use --by-path, for any bytes")
            .into()
    })
}

/// The facts, in the order in which they are printed.
const FACTS: [&str; 6] = ["size", "lines", "encoding", "invalidUtf8At", "lineEnding", "sha256"];

/// Facts a line each, then the answer.
fn text(answer: &Value) -> String {
    let fact = |name: &&str| {
        let value = answer.get(*name)?;
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some(format!("{name:14} {value}"))
    };
    let facts: Vec<String> = FACTS.iter().filter_map(fact).collect();
    match answer["answer"]["content"].as_str() {
        Some(content) => format!("{}\n\n{content}", facts.join("\n")),
        None => facts.join("\n"),
    }
}

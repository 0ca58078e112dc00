//! Answers on the terminal.

use doorbell::codec::{Codec, Json};
use doorbell::messages::{FinishReason, StreamChunk};
use std::io::{self, IsTerminal, Write};

/// Prints chunks as they come: the answer to stdout, everything else to stderr; or all of them as lines of JSON.
pub struct Printer {
    json: bool,
    /// Reasons are told apart from the answer by being dim.
    dims: bool,
    /// The answer has text, and whether that ends a line.
    has_text: bool,
    ends_line: bool,
    /// Reasons have been printed behind which a line has to end.
    reasons: bool,
    failed: bool,
}

impl Printer {
    pub fn new(json: bool) -> Self {
        let dims = io::stderr().is_terminal();
        Self { json, dims, has_text: false, ends_line: true, reasons: false, failed: false }
    }

    /// Whether the answer says that something failed.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    pub fn chunk(&mut self, chunk: &StreamChunk) -> io::Result<()> {
        self.failed |= matches!(
            chunk,
            StreamChunk::Error { .. } | StreamChunk::End { finish_reason: FinishReason::Error }
        );
        let mut out = io::stdout().lock();
        if self.json {
            let mut line = Vec::new();
            Json::new().encode_chunk(chunk, &mut line);
            line.push(b'\n');
            out.write_all(&line)?;
            return out.flush();
        }
        match chunk {
            StreamChunk::Text { text } => {
                self.end_reasons()?;
                out.write_all(text.as_bytes())?;
                if !text.is_empty() {
                    (self.has_text, self.ends_line) = (true, text.ends_with('\n'));
                }
                out.flush()
            }
            StreamChunk::Reasoning { text } => {
                self.reasons = true;
                let (on, off) = if self.dims { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
                write!(io::stderr(), "{on}{text}{off}")
            }
            StreamChunk::ToolCallStart { name, id } => {
                self.say(&format!("calls the tool {name} ({id}) with "))
            }
            StreamChunk::ToolCallDelta { parameters, .. } => write!(io::stderr(), "{parameters}"),
            StreamChunk::ToolCallEnd { .. } => writeln!(io::stderr()),
            StreamChunk::Error { code, message } => self.say(&format!("doorbell: {message} ({code})\n")),
            StreamChunk::End { finish_reason: FinishReason::Length } => {
                self.say("doorbell: the answer ends here because the most tokens have been reached\n")
            }
            StreamChunk::Usage(_) | StreamChunk::End { .. } => Ok(()),
        }
    }

    /// Nothing more comes.
    pub fn end(&mut self) -> io::Result<()> {
        self.end_reasons()?;
        if self.has_text && !self.ends_line && !self.json {
            self.ends_line = true;
            io::stdout().write_all(b"\n")?;
        }
        Ok(())
    }

    /// A line of ours, not in the middle of one of the answer's.
    fn say(&mut self, text: &str) -> io::Result<()> {
        self.end()?;
        write!(io::stderr(), "{text}")
    }

    fn end_reasons(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.reasons) { writeln!(io::stderr()) } else { Ok(()) }
    }
}

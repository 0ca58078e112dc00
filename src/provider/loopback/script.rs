//! The chunks of a loopback's answer, made one by one; sans-I/O.

use super::behaviour::Behaviour;
use crate::messages::{AIRequest, FinishReason, Message, StreamChunk, Tool, Usage};
use rustix::time::{ClockId, clock_gettime};

/// Every answer begins so, whatever limits it.
const MARK: &str = "loopback: ";
/// Bytes of the last message that are repeated.
const REPEATED_MAX: usize = 1 << 10;
/// Bytes of a token.
const TOKEN: usize = 4;

/// Makes the chunks.
#[derive(Debug)]
pub struct Script {
    text: Text,
    is_stamped: bool,
    chunk_bytes: usize,
    reasoning: Option<String>,
    /// What comes behind the text, last first.
    behind: Vec<StreamChunk>,
    finish_reason: FinishReason,
    prompt_bytes: usize,
    answer_bytes: usize,
    stage: Stage,
}

#[derive(Debug)]
enum Text {
    /// What is left of a text.
    Plain { text: String, at: usize },
    /// Numbered pieces: the next number, and the last.
    Numbered { next: u64, last: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Text,
    Tools,
    Usage,
    End,
    Over,
}

impl Script {
    /// The answer to `request`.
    pub fn new(request: &AIRequest, behaviour: &Behaviour) -> Self {
        let calls = called(request, behaviour);
        let mut finish_reason = if calls.is_empty() { FinishReason::Stop } else { FinishReason::ToolCalls };
        let text = match behaviour.chunks {
            Some(last) => Text::Numbered { next: 1, last },
            None => {
                let (text, is_cut) = limited(told(request), request.max_tokens);
                if is_cut {
                    finish_reason = FinishReason::Length;
                }
                Text::Plain { text, at: 0 }
            }
        };
        Self {
            text,
            is_stamped: behaviour.is_stamped,
            chunk_bytes: behaviour.chunk_bytes,
            reasoning: behaviour.reasons.then(|| format!("{MARK}it repeats what it is told")),
            behind: call_chunks(&calls, request),
            finish_reason,
            prompt_bytes: prompt_bytes(request),
            answer_bytes: 0,
            stage: Stage::Text,
        }
    }

    /// Whether the next chunk is one of text or reasoning.
    pub fn next_is_piece(&self) -> bool {
        self.reasoning.is_some() || self.stage == Stage::Text && !self.text.is_over()
    }

    fn text(&mut self) -> Option<StreamChunk> {
        let text = self.text.next(self.chunk_bytes)?;
        self.answer_bytes += text.len();
        let text = if self.is_stamped { format!("{} {text}", now_ns()) } else { text };
        Some(StreamChunk::Text { text })
    }

    fn usage(&self) -> Usage {
        let [prompt, answer] =
            [self.prompt_bytes, self.answer_bytes].map(|bytes| bytes.div_ceil(TOKEN) as f64);
        Usage { prompt_tokens: prompt, completion_tokens: answer, total_tokens: prompt + answer }
    }
}

impl Iterator for Script {
    type Item = StreamChunk;

    fn next(&mut self) -> Option<StreamChunk> {
        if let Some(text) = self.reasoning.take() {
            return Some(StreamChunk::Reasoning { text });
        }
        loop {
            let (chunk, behind) = match self.stage {
                Stage::Text => (self.text(), Stage::Tools),
                Stage::Tools => (self.behind.pop(), Stage::Usage),
                Stage::Usage => {
                    self.stage = Stage::End;
                    return Some(StreamChunk::Usage(self.usage()));
                }
                Stage::End => {
                    self.stage = Stage::Over;
                    return Some(StreamChunk::End { finish_reason: self.finish_reason });
                }
                Stage::Over => return None,
            };
            match chunk {
                Some(chunk) => return Some(chunk),
                None => self.stage = behind,
            }
        }
    }
}

impl Text {
    fn is_over(&self) -> bool {
        match self {
            Self::Plain { text, at } => *at == text.len(),
            Self::Numbered { next, last } => next > last,
        }
    }

    fn next(&mut self, chunk_bytes: usize) -> Option<String> {
        if self.is_over() {
            return None;
        }
        match self {
            Self::Plain { text, at } => {
                let end = boundary(text, *at + chunk_bytes);
                let piece = text[*at..end].to_owned();
                *at = end;
                Some(piece)
            }
            Self::Numbered { next, .. } => {
                let mark = if *next == 1 { MARK } else { "" };
                let mut piece = format!("{mark}{next} ");
                while piece.len() < chunk_bytes {
                    piece.push('.');
                }
                *next += 1;
                Some(piece)
            }
        }
    }
}

/// The first place at or behind `at` where a character begins, or the end.
fn boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

fn last_message(request: &AIRequest) -> Option<&Message> {
    request.messages.last()
}

fn told(request: &AIRequest) -> String {
    let last = last_message(request).map_or("", |message| &message.content);
    let end = boundary(last, REPEATED_MAX.min(last.len()));
    let (model, count) = (&request.model, request.messages.len());
    let rest = if end < last.len() { " (and more)" } else { "" };
    format!(
        "{MARK}no model has been asked. Model {model:?}, messages: {count}. The last one says: {}{rest}",
        &last[..end]
    )
}

/// At most so many tokens of a text, and whether it was longer. The mark is never cut.
fn limited(mut text: String, max_tokens: Option<f64>) -> (String, bool) {
    // A float becomes an integer by cutting and saturating; what is no number becomes 0.
    let most =
        max_tokens.map_or(usize::MAX, |tokens| (tokens as usize).saturating_mul(TOKEN)).max(MARK.len());
    let is_cut = text.len() > most;
    if is_cut {
        text.truncate(boundary(&text, most));
    }
    (text, is_cut)
}

/// The tools to call: those that the last message names, unless it is itself the result of a call.
fn called<'a>(request: &'a AIRequest, behaviour: &Behaviour) -> Vec<&'a Tool> {
    let Some(last) = last_message(request).filter(|last| last.tool_calls.is_none()) else {
        return Vec::new();
    };
    let wanted = |tool: &&Tool| {
        behaviour.calls_all_tools || !tool.name.is_empty() && last.content.contains(&tool.name)
    };
    request.tools.iter().flatten().filter(wanted).collect()
}

/// The chunks of these calls, last first.
fn call_chunks(tools: &[&Tool], request: &AIRequest) -> Vec<StreamChunk> {
    let last = last_message(request).map_or("", |message| &message.content);
    let said = &last[..boundary(last, REPEATED_MAX.min(last.len()))];
    let parameters = serde_json::json!({ "loopback": true, "message": said }).to_string();
    let (first, second) = parameters.split_at(boundary(&parameters, parameters.len() / 2));
    let mut chunks = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        let id = format!("loopback_{}", index + 1);
        chunks.push(StreamChunk::ToolCallStart { id: id.clone(), name: tool.name.clone() });
        chunks.push(StreamChunk::ToolCallDelta { id: id.clone(), parameters: first.into() });
        chunks.push(StreamChunk::ToolCallDelta { id: id.clone(), parameters: second.into() });
        chunks.push(StreamChunk::ToolCallEnd { id });
    }
    chunks.reverse();
    chunks
}

fn prompt_bytes(request: &AIRequest) -> usize {
    let system = request.system_prompt.as_deref().map_or(0, str::len);
    system + request.messages.iter().map(|message| message.content.len()).sum::<usize>()
}

fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

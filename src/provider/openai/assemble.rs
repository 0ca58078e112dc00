//! The events of a streamed answer as our chunks; sans-I/O.

use super::fault::{Found, Refusal};
use crate::messages::{FinishReason, StreamChunk, Usage};
use serde::Deserialize;
use std::collections::VecDeque;

/// Most calls of tools in one answer.
pub const CALLS_MAX: usize = 128;

/// Makes chunks of events. Chunks before a fault are good.
#[derive(Debug)]
pub struct Assembler {
    chunks: VecDeque<StreamChunk>,
    calls: Vec<Call>,
    usage: Option<Usage>,
    finish_reason: Option<FinishReason>,
    events: u64,
    /// Bytes of text that may still come.
    room: usize,
    is_over: bool,
}

#[derive(Debug)]
struct Call {
    index: u64,
    id: String,
    /// `Start` has been given; before that, parameters wait.
    started: bool,
    ended: bool,
    name: String,
    waiting: String,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: Option<WireUsage>,
    #[serde(default)]
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: Option<u64>,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    reasoning: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<CallDelta>>,
}

#[derive(Deserialize)]
struct CallDelta {
    #[serde(default)]
    index: Option<u64>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionDelta>,
}

#[derive(Deserialize)]
struct FunctionDelta {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<String>,
}

/// Tokens as the API counts them.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct WireUsage {
    #[serde(default)]
    prompt_tokens: f64,
    #[serde(default)]
    completion_tokens: f64,
    #[serde(default)]
    total_tokens: Option<f64>,
}

impl From<WireUsage> for Usage {
    fn from(wire: WireUsage) -> Self {
        let WireUsage { prompt_tokens, completion_tokens, total_tokens } = wire;
        let total_tokens = total_tokens.unwrap_or(prompt_tokens + completion_tokens);
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// What the API calls the end; `None` for an answer that its filter stopped.
pub fn finish_reason(word: &str, has_calls: bool) -> Option<FinishReason> {
    match word {
        "length" | "max_tokens" => Some(FinishReason::Length),
        "tool_calls" | "function_call" => Some(FinishReason::ToolCalls),
        "content_filter" => None,
        // `stop`, and other servers' words for it; some say so although tools are to be called.
        _ if has_calls => Some(FinishReason::ToolCalls),
        _ => Some(FinishReason::Stop),
    }
}

impl Assembler {
    /// For an answer of at most `max_answer` bytes of text, reasoning and parameters.
    pub fn new(max_answer: usize) -> Self {
        Self {
            chunks: VecDeque::new(),
            calls: Vec::new(),
            usage: None,
            finish_reason: None,
            events: 0,
            room: max_answer,
            is_over: false,
        }
    }

    /// The next chunk that is complete.
    pub fn next(&mut self) -> Option<StreamChunk> {
        self.chunks.pop_front()
    }

    /// Whether `End` is among the chunks, or was.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Takes the data of one event.
    pub fn event(&mut self, data: &str) -> Result<(), Found> {
        if self.is_over {
            return Ok(());
        }
        self.events += 1;
        if data.trim() == "[DONE]" {
            self.end();
            return Ok(());
        }
        let event: Event = serde_json::from_str(data).map_err(|fault| self.no_chunk(&fault))?;
        if let Some(refusal) = event.error {
            return Err(Found::Refusal(refusal));
        }
        self.usage = event.usage.map(Into::into).or(self.usage);
        // Of several answers to one question, which we never ask for, the first counts.
        for choice in event.choices.into_iter().flatten().filter(|choice| choice.index.unwrap_or(0) == 0) {
            self.choice(choice)?;
        }
        Ok(())
    }

    /// The bytes are over. Servers that do not say `[DONE]` at least say why the answer ends.
    pub fn finish(&mut self) -> Result<(), Found> {
        if !self.is_over && self.finish_reason.is_none() {
            return Err(Found::Cut);
        }
        if !self.is_over {
            self.end();
        }
        Ok(())
    }

    fn no_chunk(&self, fault: &serde_json::Error) -> Found {
        let problem = match fault.classify() {
            serde_json::error::Category::Data => "is no chunk of a chat completion",
            _ => "is no JSON",
        };
        // Not the error's own text, which may quote the answer.
        Found::Protocol(format!(
            "event {} {problem} at line {} column {}",
            self.events,
            fault.line(),
            fault.column()
        ))
    }

    fn choice(&mut self, choice: Choice) -> Result<(), Found> {
        if let Some(delta) = choice.delta {
            self.delta(delta)?;
        }
        if let Some(word) = choice.finish_reason {
            self.end_calls();
            let reason = finish_reason(&word, !self.calls.is_empty()).ok_or(Found::Filtered)?;
            self.finish_reason = Some(reason);
        }
        Ok(())
    }

    fn delta(&mut self, delta: Delta) -> Result<(), Found> {
        // Servers that know both words say the same in both.
        if let Some(text) = delta.reasoning_content.or(delta.reasoning).filter(|text| !text.is_empty()) {
            self.take_room(text.len())?;
            self.chunks.push_back(StreamChunk::Reasoning { text });
        }
        for text in [delta.content, delta.refusal].into_iter().flatten().filter(|text| !text.is_empty()) {
            self.take_room(text.len())?;
            self.chunks.push_back(StreamChunk::Text { text });
        }
        for (place, call) in delta.tool_calls.into_iter().flatten().enumerate() {
            self.call(place, call)?;
        }
        Ok(())
    }

    fn take_room(&mut self, len: usize) -> Result<(), Found> {
        let too_long = || Found::Protocol("its answer is longer than max_answer".into());
        self.room = self.room.checked_sub(len).ok_or_else(too_long)?;
        Ok(())
    }

    fn call(&mut self, place: usize, delta: CallDelta) -> Result<(), Found> {
        let at = self.call_at(delta.index.unwrap_or(place as u64), delta.id.as_deref())?;
        let function = delta.function.unwrap_or(FunctionDelta { name: None, arguments: None });
        let name = function.name.unwrap_or_default();
        let arguments = function.arguments.unwrap_or_default();
        self.take_room(name.len() + arguments.len() + delta.id.as_ref().map_or(0, String::len))?;
        let call = &mut self.calls[at];
        if !call.started {
            call.name.push_str(&name);
            call.id = delta.id.filter(|id| !id.is_empty()).unwrap_or_else(|| std::mem::take(&mut call.id));
            call.waiting.push_str(&arguments);
            // An id comes with the name or before it; without one we name the call ourselves.
            if !call.name.is_empty() {
                Self::start(call, &mut self.chunks);
            }
        } else if !arguments.is_empty() && !call.ended {
            self.chunks.push_back(StreamChunk::ToolCallDelta { id: call.id.clone(), parameters: arguments });
        }
        Ok(())
    }

    /// The place of the call that a delta belongs to. Servers that number every call 0 give each an id of its own.
    fn call_at(&mut self, index: u64, id: Option<&str>) -> Result<usize, Found> {
        let is_new = |call: &Call| call.started && id.is_some_and(|id| !id.is_empty() && id != call.id);
        let found = self.calls.iter().rposition(|call| call.index == index);
        if let Some(at) = found.filter(|at| !is_new(&self.calls[*at])) {
            return Ok(at);
        }
        if self.calls.len() == CALLS_MAX {
            return Err(Found::Protocol(format!("it calls more than {CALLS_MAX} tools in one answer")));
        }
        let (name, waiting, id) = (String::new(), String::new(), String::new());
        self.calls.push(Call { index, id, started: false, ended: false, name, waiting });
        Ok(self.calls.len() - 1)
    }

    fn start(call: &mut Call, chunks: &mut VecDeque<StreamChunk>) {
        if call.id.is_empty() {
            call.id = format!("call_{}", call.index);
        }
        call.started = true;
        chunks.push_back(StreamChunk::ToolCallStart { id: call.id.clone(), name: call.name.clone() });
        let parameters = std::mem::take(&mut call.waiting);
        if !parameters.is_empty() {
            chunks.push_back(StreamChunk::ToolCallDelta { id: call.id.clone(), parameters });
        }
    }

    /// Ends the calls that have not ended; one that never got a name begins here, without one.
    fn end_calls(&mut self) {
        for call in &mut self.calls {
            if !call.started {
                Self::start(call, &mut self.chunks);
            }
            if !std::mem::replace(&mut call.ended, true) {
                self.chunks.push_back(StreamChunk::ToolCallEnd { id: call.id.clone() });
            }
        }
    }

    fn end(&mut self) {
        self.end_calls();
        self.chunks.extend(self.usage.take().map(StreamChunk::Usage));
        let without_reason = if self.calls.is_empty() { FinishReason::Stop } else { FinishReason::ToolCalls };
        let finish_reason = self.finish_reason.unwrap_or(without_reason);
        self.chunks.push_back(StreamChunk::End { finish_reason });
        self.is_over = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembled(events: &[&str]) -> (Vec<String>, Result<(), Found>) {
        let mut assembler = Assembler::new(1000);
        let result =
            events.iter().try_for_each(|event| assembler.event(event)).and_then(|()| assembler.finish());
        let chunks =
            std::iter::from_fn(|| assembler.next()).map(|chunk| serde_json::to_string(&chunk).unwrap());
        (chunks.collect(), result)
    }

    fn delta(delta: &str) -> String {
        format!(r#"{{"choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]}}"#)
    }

    const STOP: &str = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
    const USAGE: &str =
        r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;

    /// Goal:   text, reasoning and usage become chunks, then exactly one end.
    #[test]
    fn r2_7_r2_5_text_reasoning_and_usage_become_chunks() {
        let [one, two, three] =
            [r#"{"role":"assistant","content":""}"#, r#"{"reasoning_content":"r"}"#, r#"{"content":"t"}"#]
                .map(delta);
        let (chunks, result) = assembled(&[&one, &two, &three, STOP, USAGE, "[DONE]", &three]);
        assert_eq!(result.map_err(|found| format!("{found:?}")), Ok(()));
        assert_eq!(
            chunks,
            [
                r#"{"type":"reasoning","text":"r"}"#,
                r#"{"type":"text","text":"t"}"#,
                r#"{"type":"usage","promptTokens":3,"completionTokens":4,"totalTokens":7}"#,
                r#"{"type":"end","finishReason":"stop"}"#,
            ]
        );
    }

    /// Goal:   deltas of several calls, mixed, become a start, deltas and one end each, with ids.
    #[test]
    fn r2_7_r2_5_deltas_of_tool_calls_are_put_in_order_by_index() {
        let events = [
            r#"{"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":""}}]}"#,
            r#"{"tool_calls":[{"index":1,"id":"b","function":{"name":"g","arguments":"{"}}]}"#,
            r#"{"tool_calls":[{"index":0,"function":{"arguments":"{}"}},{"index":1,"function":{"arguments":"}"}}]}"#,
        ]
        .map(delta);
        let (chunks, result) = assembled(&[&events[0], &events[1], &events[2], STOP]);
        assert!(result.is_ok());
        let short: Vec<String> = chunks.iter().map(|chunk| chunk.replace("toolCall", "")).collect();
        assert_eq!(
            short,
            [
                r#"{"type":"Start","id":"a","name":"f"}"#,
                r#"{"type":"Start","id":"b","name":"g"}"#,
                r#"{"type":"Delta","id":"b","parameters":"{"}"#,
                r#"{"type":"Delta","id":"a","parameters":"{}"}"#,
                r#"{"type":"Delta","id":"b","parameters":"}"}"#,
                r#"{"type":"End","id":"a"}"#,
                r#"{"type":"End","id":"b"}"#,
                r#"{"type":"end","finishReason":"s"}"#,
            ]
        );
    }

    /// Goal:   what makes no sense is named without being quoted, and what came before it stays.
    #[test]
    fn r2_7_trap21_nonsense_is_named_and_not_quoted() {
        let text = delta(r#"{"content":"t"}"#);
        for (nonsense, problem) in
            [("secret {", "event 2 is no JSON"), (r#"{"choices":"secret"}"#, "event 2 is no chunk")]
        {
            let (chunks, result) = assembled(&[&text, nonsense]);
            assert_eq!(chunks, [r#"{"type":"text","text":"t"}"#]);
            let Err(Found::Protocol(what)) = result else { panic!("{result:?}") };
            assert!(what.contains(problem) && !what.contains("secret"), "{what}");
        }
        assert!(matches!(assembled(&[&text]).1, Err(Found::Cut)));
        let filtered = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"content_filter"}]}"#;
        assert!(matches!(assembled(&[&text, filtered]).1, Err(Found::Filtered)));
        let error = r#"{"error":{"message":"m","code":429}}"#;
        assert!(matches!(assembled(&[&text, error]).1, Err(Found::Refusal(_))));
    }

    /// Goal:   S12: neither calls nor text grow without end.
    #[test]
    fn r2_7_s12_an_answer_is_bounded() {
        let long = delta(&format!(r#"{{"content":"{}"}}"#, "x".repeat(501)));
        assert!(matches!(assembled(&[&long, &long]).1, Err(Found::Protocol(_))));
        let calls: Vec<String> = (0..=CALLS_MAX).map(|index| format!(r#"{{"index":{index}}}"#)).collect();
        let calls = delta(&format!(r#"{{"tool_calls":[{}]}}"#, calls.join(",")));
        assert!(matches!(assembled(&[&calls]).1, Err(Found::Protocol(_))));
    }
}

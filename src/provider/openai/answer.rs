//! A whole answer of the API.

use super::assemble::{CALLS_MAX, WireUsage, finish_reason};
use super::fault::{Found, Refusal};
use crate::messages::{AIResponse, StreamChunk, ToolCall};
use crate::provider::ProviderError;
use crate::provider::collect::tool_call;
use futures_core::Stream;
use serde::Deserialize;
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: Option<WireUsage>,
    #[serde(default)]
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
    #[serde(default)]
    reasoning: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<Call>>,
}

#[derive(Deserialize)]
struct Call {
    #[serde(default)]
    id: Option<String>,
    function: Function,
}

#[derive(Deserialize)]
struct Function {
    name: String,
    #[serde(default)]
    arguments: Option<String>,
}

/// Reads an answer.
pub fn read(bytes: &[u8]) -> Result<AIResponse, Found> {
    let completion: Completion = serde_json::from_slice(bytes).map_err(|fault| {
        // Not the error's own text, which may quote the answer.
        let (line, column) = (fault.line(), fault.column());
        Found::Protocol(format!("its answer is no chat completion at line {line} column {column}"))
    })?;
    if let Some(refusal) = completion.error {
        return Err(Found::Refusal(refusal));
    }
    let choice = completion.choices.into_iter().flatten().next();
    let choice = choice.ok_or_else(|| Found::Protocol("its answer has no choices".into()))?;
    let calls = calls(choice.message.tool_calls.unwrap_or_default())?;
    let word = choice.finish_reason.as_deref().unwrap_or("stop");
    let finish_reason = finish_reason(word, !calls.is_empty()).ok_or(Found::Filtered)?;
    Ok(AIResponse {
        content: choice.message.content.or(choice.message.refusal).unwrap_or_default(),
        reasoning: choice.message.reasoning_content.or(choice.message.reasoning),
        tool_calls: (!calls.is_empty()).then_some(calls),
        usage: completion.usage.map(Into::into),
        finish_reason,
    })
}

fn calls(wire: Vec<Call>) -> Result<Vec<ToolCall>, Found> {
    if wire.len() > CALLS_MAX {
        return Err(Found::Protocol(format!("it calls more than {CALLS_MAX} tools in one answer")));
    }
    let call = |(index, call): (usize, Call)| {
        let id = call.id.filter(|id| !id.is_empty()).unwrap_or_else(|| format!("call_{index}"));
        tool_call("", id, call.function.name, call.function.arguments.unwrap_or_default())
    };
    let calls: Result<Vec<ToolCall>, ProviderError> = wire.into_iter().enumerate().map(call).collect();
    calls.map_err(|_no_json| Found::Protocol("the parameters of a tool call are no JSON".into()))
}

/// A whole answer as a stream.
pub struct Chunks(VecDeque<StreamChunk>);

impl Chunks {
    pub fn new(answer: AIResponse) -> Self {
        let mut chunks = VecDeque::new();
        chunks.extend(answer.reasoning.map(|text| StreamChunk::Reasoning { text }));
        if !answer.content.is_empty() {
            chunks.push_back(StreamChunk::Text { text: answer.content });
        }
        for ToolCall { name, parameters, id } in answer.tool_calls.into_iter().flatten() {
            chunks.push_back(StreamChunk::ToolCallStart { id: id.clone(), name });
            chunks.extend(parameters.map(|json| StreamChunk::ToolCallDelta {
                id: id.clone(),
                parameters: json.get().to_owned(),
            }));
            chunks.push_back(StreamChunk::ToolCallEnd { id });
        }
        chunks.extend(answer.usage.map(StreamChunk::Usage));
        chunks.push_back(StreamChunk::End { finish_reason: answer.finish_reason });
        Self(chunks)
    }
}

impl Stream for Chunks {
    type Item = Result<StreamChunk, ProviderError>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

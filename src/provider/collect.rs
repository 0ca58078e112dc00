//! Chunks put together to a whole answer.

use super::{ChunkStream, ProviderError};
use crate::config::MESSAGE_MAX;
use crate::messages::{AIResponse, FinishReason, RawJson, StreamChunk, ToolCall, Usage};
use std::future::poll_fn;

/// Bytes of text, reasoning and parameters that are put together at most: no answer may be longer anyway.
const ANSWER_MAX: usize = MESSAGE_MAX as usize;
/// Chunks before others have their turn.
const CHUNKS_IN_A_ROW: u64 = 64;

/// Puts the chunks of `stream` together. `provider` is named in errors. Needs a tokio runtime.
///
/// # Errors
///
/// That of the stream; [`ProviderError::Failed`] for an error among the chunks; [`ProviderError::Protocol`] if the
/// parameters of a tool call are no JSON, or the answer exceeds 10 MiB; [`ProviderError::Interrupted`] if the stream ends
/// without `End`.
pub async fn collect(provider: &str, mut stream: ChunkStream) -> Result<AIResponse, ProviderError> {
    let mut parts = Parts::default();
    let mut chunks = 0u64;
    while let Some(chunk) = poll_fn(|cx| stream.as_mut().poll_next(cx)).await {
        if let Some(finish_reason) = parts.take(provider, chunk?)? {
            return parts.response(provider, finish_reason);
        }
        chunks += 1;
        if chunks.is_multiple_of(CHUNKS_IN_A_ROW) {
            tokio::task::yield_now().await;
        }
    }
    Err(ProviderError::Interrupted { provider: provider.into() })
}

/// Bytes of a chunk that stay.
fn len(chunk: &StreamChunk) -> usize {
    match chunk {
        StreamChunk::Text { text } | StreamChunk::Reasoning { text } => text.len(),
        StreamChunk::ToolCallStart { id, name } => {
            size_of::<(String, String, String)>() + id.len() + name.len()
        }
        StreamChunk::ToolCallDelta { parameters, .. } => parameters.len(),
        _ => 0,
    }
}

#[derive(Default)]
struct Parts {
    content: String,
    reasoning: Option<String>,
    calls: Vec<(String, String, String)>,
    usage: Option<Usage>,
    /// Bytes of all of it.
    len: usize,
}

impl Parts {
    fn take(&mut self, provider: &str, chunk: StreamChunk) -> Result<Option<FinishReason>, ProviderError> {
        self.len += len(&chunk);
        if self.len > ANSWER_MAX {
            let what = format!("its answer is longer than {ANSWER_MAX} bytes");
            return Err(ProviderError::Protocol { provider: provider.to_owned(), what });
        }
        match chunk {
            StreamChunk::Text { text } => self.content.push_str(&text),
            StreamChunk::Reasoning { text } => self.reasoning.get_or_insert_default().push_str(&text),
            StreamChunk::Usage(usage) => self.usage = Some(usage),
            StreamChunk::ToolCallStart { id, name } => self.calls.push((id, name, String::new())),
            StreamChunk::ToolCallDelta { id, parameters } => {
                if let Some(call) = self.calls.iter_mut().rev().find(|call| call.0 == id) {
                    call.2.push_str(&parameters);
                }
            }
            StreamChunk::ToolCallEnd { .. } => {}
            StreamChunk::Error { code, message } => {
                let provider = provider.to_owned();
                return Err(ProviderError::Failed { provider, code: Some(code), message });
            }
            StreamChunk::End { finish_reason } => return Ok(Some(finish_reason)),
        }
        Ok(None)
    }

    fn response(self, provider: &str, finish_reason: FinishReason) -> Result<AIResponse, ProviderError> {
        let calls =
            self.calls.into_iter().map(|(id, name, parameters)| tool_call(provider, id, name, parameters));
        let calls: Vec<ToolCall> = calls.collect::<Result<_, _>>()?;
        Ok(AIResponse {
            content: self.content,
            reasoning: self.reasoning,
            tool_calls: (!calls.is_empty()).then_some(calls),
            usage: self.usage,
            finish_reason,
        })
    }
}

/// A call of a tool whose parameters are `text`; none if it is empty.
pub(super) fn tool_call(
    provider: &str,
    id: String,
    name: String,
    text: String,
) -> Result<ToolCall, ProviderError> {
    let parameters = match text.trim().is_empty() {
        true => None,
        false => Some(RawJson::new(text).map_err(|fault| ProviderError::Protocol {
            provider: provider.into(),
            what: format!("the parameters of a tool call are no JSON at byte {}", fault.offset),
        })?),
    };
    Ok(ToolCall { name, parameters, id })
}

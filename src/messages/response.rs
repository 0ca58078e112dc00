//! Answers.

use super::number;
use super::request::ToolCall;
use serde::{Deserialize, Serialize};

/// The whole answer to a request that did not ask for a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "rkyv", derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize))]
#[serde(rename_all = "camelCase")]
pub struct AIResponse {
    /// What the model says.
    pub content: String,
    /// What it says of how it got there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Calls of tools that it asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
    /// What was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Why it ends.
    pub finish_reason: FinishReason,
}

/// Tokens that a request and its answer took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "rkyv", derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize))]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Of the request.
    #[serde(with = "number")]
    pub prompt_tokens: f64,
    /// Of the answer.
    #[serde(with = "number")]
    pub completion_tokens: f64,
    /// Of both.
    #[serde(with = "number")]
    pub total_tokens: f64,
}

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "rkyv", derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize))]
#[serde(rename_all = "camelCase")]
pub enum FinishReason {
    /// The model had nothing more to say.
    Stop,
    /// The most tokens have been reached.
    Length,
    /// Tools are to be called.
    ToolCalls,
    /// The client wanted no more.
    Cancelled,
    /// Something failed; a chunk or the call's status says what.
    Error,
}

//! Requests as they lie in a body: texts are borrowed from it where they stand there as they are.

use super::raw::RawJsonRef;
use super::request::{AIRequest, Message, MessageRole, Tool, ToolCall};
use std::borrow::Cow;

/// [`AIRequest`], borrowed from a body where it can be.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AIRequestRef<'a> {
    /// The conversation so far, oldest first.
    pub messages: Vec<MessageRef<'a>>,
    /// The model that is to answer.
    pub model: Cow<'a, str>,
    /// Sampling temperature; NaN where the client had none that is a number.
    pub temperature: Option<f64>,
    /// Most tokens of the answer; NaN where the client had no number.
    pub max_tokens: Option<f64>,
    /// Tools that the model may call.
    pub tools: Option<Vec<ToolRef<'a>>>,
    /// Comes before the conversation.
    pub system_prompt: Option<Cow<'a, str>>,
    /// Whether the answer is wanted as a stream.
    pub stream: Option<bool>,
}

/// [`Message`], borrowed.
#[derive(Debug, Clone, PartialEq)]
pub struct MessageRef<'a> {
    /// Who speaks.
    pub role: MessageRole,
    /// What is said.
    pub content: Cow<'a, str>,
    /// Calls of tools that the assistant asked for.
    pub tool_calls: Option<Vec<ToolCallRef<'a>>>,
}

/// [`ToolCall`], borrowed.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCallRef<'a> {
    /// The tool's name.
    pub name: Cow<'a, str>,
    /// What it is called with: any JSON, or absent.
    pub parameters: Option<RawJsonRef<'a>>,
    /// Names the call.
    pub id: Cow<'a, str>,
}

/// [`Tool`], borrowed.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolRef<'a> {
    /// The tool's name.
    pub name: Cow<'a, str>,
    /// What it is for.
    pub description: Option<Cow<'a, str>>,
    /// JSON schema of its parameters.
    pub parameters: Option<RawJsonRef<'a>>,
}

fn all<T, U>(list: Vec<T>, each: impl FnMut(T) -> U) -> Vec<U> {
    list.into_iter().map(each).collect()
}

impl AIRequestRef<'_> {
    /// The same, with memory of its own.
    pub fn into_owned(self) -> AIRequest {
        AIRequest {
            messages: all(self.messages, MessageRef::into_owned),
            model: self.model.into_owned(),
            temperature: self.temperature,
            max_tokens: self.max_tokens,
            tools: self.tools.map(|tools| all(tools, ToolRef::into_owned)),
            system_prompt: self.system_prompt.map(Cow::into_owned),
            stream: self.stream,
        }
    }
}

impl MessageRef<'_> {
    /// The same, with memory of its own.
    pub fn into_owned(self) -> Message {
        Message {
            role: self.role,
            content: self.content.into_owned(),
            tool_calls: self.tool_calls.map(|calls| all(calls, ToolCallRef::into_owned)),
        }
    }
}

impl ToolCallRef<'_> {
    /// The same, with memory of its own.
    pub fn into_owned(self) -> ToolCall {
        ToolCall {
            name: self.name.into_owned(),
            parameters: self.parameters.map(RawJsonRef::into_owned),
            id: self.id.into_owned(),
        }
    }
}

impl ToolRef<'_> {
    /// The same, with memory of its own.
    pub fn into_owned(self) -> Tool {
        Tool {
            name: self.name.into_owned(),
            description: self.description.map(Cow::into_owned),
            parameters: self.parameters.map(RawJsonRef::into_owned),
        }
    }
}

impl From<AIRequest> for AIRequestRef<'static> {
    fn from(request: AIRequest) -> Self {
        Self {
            messages: all(request.messages, MessageRef::from),
            model: Cow::Owned(request.model),
            temperature: request.temperature,
            max_tokens: request.max_tokens,
            tools: request.tools.map(|tools| all(tools, ToolRef::from)),
            system_prompt: request.system_prompt.map(Cow::Owned),
            stream: request.stream,
        }
    }
}

impl From<Message> for MessageRef<'static> {
    fn from(message: Message) -> Self {
        Self {
            role: message.role,
            content: Cow::Owned(message.content),
            tool_calls: message.tool_calls.map(|calls| all(calls, ToolCallRef::from)),
        }
    }
}

impl From<ToolCall> for ToolCallRef<'static> {
    fn from(call: ToolCall) -> Self {
        Self {
            name: Cow::Owned(call.name),
            parameters: call.parameters.map(RawJsonRef::from),
            id: Cow::Owned(call.id),
        }
    }
}

impl From<Tool> for ToolRef<'static> {
    fn from(tool: Tool) -> Self {
        Self {
            name: Cow::Owned(tool.name),
            description: tool.description.map(Cow::Owned),
            parameters: tool.parameters.map(RawJsonRef::from),
        }
    }
}

//! Our requests as the API wants them.

use crate::messages::{AIRequest, Message, MessageRole, RawJson, Tool, ToolCall};
use crate::provider::MaxTokensField;
use serde::Serialize;

/// What depends on the provider.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub max_tokens_field: MaxTokensField,
    pub stream: bool,
    pub usage: bool,
}

/// The body of a request to `chat/completions`.
pub fn body(request: &AIRequest, options: Options) -> Vec<u8> {
    let max_tokens = request.max_tokens.map(Number);
    let is_new = options.max_tokens_field == MaxTokensField::MaxCompletionTokens;
    let wire = Body {
        model: &request.model,
        messages: messages(request),
        temperature: request.temperature.map(Number),
        max_tokens: max_tokens.filter(|_| !is_new),
        max_completion_tokens: max_tokens.filter(|_| is_new),
        tools: request
            .tools
            .as_ref()
            .filter(|tools| !tools.is_empty())
            .map(|tools| tools.iter().map(Into::into).collect()),
        stream: options.stream,
        stream_options: options.usage.then_some(StreamOptions { include_usage: true }),
    };
    // Strings, numbers and raw JSON in vectors cannot fail to be written to memory.
    serde_json::to_vec(&wire).unwrap_or_default()
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<WireMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<Number>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<Vec<WireTool<'a>>>,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// A number of JavaScript's; whole ones without a fraction, for APIs that want integers.
#[derive(Clone, Copy)]
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Exact below 2^53.
        if self.0.fract() == 0.0 && self.0.abs() < 9e15 {
            serializer.serialize_i64(self.0 as i64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

#[derive(Serialize)]
struct WireMessage<'a> {
    role: &'static str,
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WireCall<'a>>,
}

impl<'a> WireMessage<'a> {
    fn plain(role: &'static str, content: &'a str) -> Self {
        Self { role, content: Some(content), tool_call_id: None, tool_calls: Vec::new() }
    }

    fn result(call: &'a str, content: &'a str) -> Self {
        Self { tool_call_id: Some(call), ..Self::plain("tool", content) }
    }
}

#[derive(Serialize)]
struct WireCall<'a> {
    id: &'a str,
    r#type: &'static str,
    function: WireFunction<'a>,
}

#[derive(Serialize)]
struct WireFunction<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> From<&'a ToolCall> for WireCall<'a> {
    fn from(call: &'a ToolCall) -> Self {
        let arguments = call.parameters.as_ref().map_or("{}", RawJson::get);
        Self { id: &call.id, r#type: "function", function: WireFunction { name: &call.name, arguments } }
    }
}

#[derive(Serialize)]
struct WireTool<'a> {
    r#type: &'static str,
    function: WireToolFunction<'a>,
}

#[derive(Serialize)]
struct WireToolFunction<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<&'a RawJson>,
}

impl<'a> From<&'a Tool> for WireTool<'a> {
    fn from(tool: &'a Tool) -> Self {
        let (description, parameters) = (tool.description.as_deref(), tool.parameters.as_ref());
        Self { r#type: "function", function: WireToolFunction { name: &tool.name, description, parameters } }
    }
}

/// The API wants a result for every call of a tool, right behind the message with the calls. Our messages have no role for
/// that: a user's message with tool calls carries the result of the calls that it names by id. What has no result gets
/// one that says so.
fn messages(request: &AIRequest) -> Vec<WireMessage<'_>> {
    let mut wire: Vec<WireMessage<'_>> = Vec::with_capacity(request.messages.len() + 1);
    wire.extend(request.system_prompt.as_deref().map(|prompt| WireMessage::plain("system", prompt)));
    let mut open: Vec<&str> = Vec::new();
    for message in &request.messages {
        let calls = message.tool_calls.as_deref().unwrap_or_default();
        let results: Vec<&str> = match message.role {
            MessageRole::User => {
                calls.iter().map(|call| call.id.as_str()).filter(|id| open.contains(id)).collect()
            }
            _ => Vec::new(),
        };
        if results.is_empty() {
            wire.extend(open.drain(..).map(|id| WireMessage::result(id, "(no result)")));
            wire.push(turn(message, calls, &mut open));
        } else {
            open.retain(|id| !results.contains(id));
            wire.extend(results.into_iter().map(|id| WireMessage::result(id, &message.content)));
        }
    }
    wire.extend(open.into_iter().map(|id| WireMessage::result(id, "(no result)")));
    wire
}

fn turn<'a>(message: &'a Message, calls: &'a [ToolCall], open: &mut Vec<&'a str>) -> WireMessage<'a> {
    let content = message.content.as_str();
    match message.role {
        MessageRole::System => WireMessage::plain("system", content),
        MessageRole::User => WireMessage::plain("user", content),
        MessageRole::Assistant => {
            open.extend(calls.iter().map(|call| call.id.as_str()));
            let mut wire = WireMessage::plain("assistant", content);
            wire.tool_calls = calls.iter().map(Into::into).collect();
            // The API wants null where there are only calls.
            wire.content = wire.content.filter(|content| !content.is_empty() || calls.is_empty());
            wire
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(request: &str, max_tokens_field: MaxTokensField, stream: bool) -> String {
        let request: AIRequest = serde_json::from_str(request).unwrap();
        String::from_utf8(body(&request, Options { max_tokens_field, stream, usage: stream })).unwrap()
    }

    /// Goal:   all that a request can say arrives, in the API's words; raw JSON as it is.
    #[test]
    fn r2_7_a_request_is_written_in_the_words_of_the_api() {
        let request = r#"{"messages":[{"role":"user","content":"hi"}],"model":"m","temperature":0.7,"maxTokens":64,
            "tools":[{"name":"t","description":"d","parameters":{"b":1e400,"a":"\ud800"}},{"name":"u"}],
            "systemPrompt":"terse"}"#;
        let head = r#"{"model":"m","messages":[{"role":"system","content":"terse"},{"role":"user","content":"hi"}],"#;
        let tools = r#""tools":[{"type":"function","function":{"name":"t","description":"d","parameters":{"b":1e400,"a":"\ud800"}}},{"type":"function","function":{"name":"u"}}],"#;
        let expected = format!(r#"{head}"temperature":0.7,"max_tokens":64,{tools}"stream":false}}"#);
        assert_eq!(written(request, MaxTokensField::MaxTokens, false), expected);
        let tail = r#""stream":true,"stream_options":{"include_usage":true}}"#;
        let expected = format!(r#"{head}"temperature":0.7,"max_completion_tokens":64,{tools}{tail}"#);
        assert_eq!(written(request, MaxTokensField::MaxCompletionTokens, true), expected);
    }

    /// Goal:   calls of tools and their results reach the API, each call with exactly one result.
    #[test]
    fn r2_7_every_tool_call_has_one_result() {
        let request = r#"{"messages":[
            {"role":"assistant","content":"","toolCalls":[{"name":"t","parameters":{"x": 1},"id":"a"},{"name":"t","id":"b"}]},
            {"role":"user","content":"one","toolCalls":[{"name":"t","id":"a"}]},
            {"role":"user","content":"go on"}],"model":"m"}"#;
        let calls = r#"{"role":"assistant","content":null,"tool_calls":[{"id":"a","type":"function","function":{"name":"t","arguments":"{\"x\": 1}"}},{"id":"b","type":"function","function":{"name":"t","arguments":"{}"}}]}"#;
        let results = r#"{"role":"tool","content":"one","tool_call_id":"a"},{"role":"tool","content":"(no result)","tool_call_id":"b"}"#;
        let rest = r#"{"role":"user","content":"go on"}"#;
        let expected = format!(r#"{{"model":"m","messages":[{calls},{results},{rest}],"stream":false}}"#);
        assert_eq!(written(request, MaxTokensField::MaxTokens, false), expected);
    }
}

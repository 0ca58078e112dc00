//! Messages as JSON, to the byte as `JSON.stringify` writes them (R2.3).

use super::Codec;
use super::error::{DEPTH_MAX, DecodeError, Problem};
use super::read::{Field, Reader, Step};
use super::write::{self, Object};
use crate::messages::{
    AIRequest, AIRequestRef, AIResponse, AnalyzeFile, AnalyzeFileRef, FinishReason, Message, MessageRef,
    MessageRole, RawJson, RawJsonRef, StreamChunk, Tool, ToolCall, ToolCallRef, ToolRef, Usage,
};
use doorbell_shm::entry::codec;
use std::borrow::Cow;

/// JSON, to the byte as `JSON.stringify` writes the same values.
///
/// Reading is that of `JSON.parse`: unknown fields are passed over, of several fields of a name the last one counts, and
/// it alone has to be of the right kind. A `null` is NaN where a number is, JSON where JSON is passed through, and
/// nothing where something else may be absent.
#[derive(Debug, Clone, Copy)]
pub struct Json {
    len_max: usize,
    depth_max: usize,
}

impl Default for Json {
    fn default() -> Self {
        Self::new()
    }
}

impl Json {
    /// With the limits of [`codec_of`](super::codec_of): a length that a message never has, and [`DEPTH_MAX`].
    pub const fn new() -> Self {
        Self::with_limits(1 << 31, DEPTH_MAX)
    }

    /// Reads bodies of at most `len_max` bytes, in which objects and arrays are at most `depth_max` deep (more than
    /// [`DEPTH_MAX`] is as good as that).
    pub const fn with_limits(len_max: usize, depth_max: usize) -> Self {
        Self { len_max, depth_max }
    }

    fn read<'a, T>(
        &self,
        body: &'a [u8],
        message: impl FnOnce(&mut Reader<'a>) -> Step<T>,
    ) -> Result<T, DecodeError> {
        if body.len() > self.len_max {
            return Err(*DecodeError::at(0, Problem::Length { len: body.len(), max: self.len_max }));
        }
        match std::str::from_utf8(body) {
            Ok(text) => Reader::new(text, self.depth_max).whole(message).map_err(|e| *e),
            Err(error) => Err(self.not_utf8(body, error.valid_up_to(), message)),
        }
    }

    /// What is wrong with a body that is UTF-8 up to `valid` only: where that is, if nothing else is wrong before.
    #[cold]
    fn not_utf8<'a, T>(
        &self,
        body: &'a [u8],
        valid: usize,
        message: impl FnOnce(&mut Reader<'a>) -> Step<T>,
    ) -> DecodeError {
        let text = std::str::from_utf8(&body[..valid]).unwrap_or_default();
        match Reader::new(text, self.depth_max).whole(message) {
            Err(error) if error.offset < valid => *error,
            Err(error) => DecodeError { path: error.path, offset: valid, what: Problem::NotUtf8 },
            Ok(_) => *DecodeError::at(valid, Problem::NotUtf8),
        }
    }
}

impl Codec for Json {
    fn id(&self) -> u8 {
        codec::JSON
    }

    fn decode_request<'a>(&self, body: &'a [u8]) -> Result<AIRequestRef<'a>, DecodeError> {
        self.read(body, read_request)
    }

    fn encode_request(&self, request: &AIRequest, body: &mut Vec<u8>) {
        write_request(body, request);
    }

    fn decode_response(&self, body: &[u8]) -> Result<AIResponse, DecodeError> {
        self.read(body, read_response)
    }

    fn encode_response(&self, response: &AIResponse, body: &mut Vec<u8>) {
        write_response(body, response);
    }

    fn decode_chunk(&self, body: &[u8]) -> Result<StreamChunk, DecodeError> {
        self.read(body, read_chunk)
    }

    fn encode_chunk(&self, chunk: &StreamChunk, body: &mut Vec<u8>) {
        write_chunk(body, chunk);
    }

    fn decode_analyze<'a>(&self, body: &'a [u8]) -> Result<AnalyzeFileRef<'a>, DecodeError> {
        self.read(body, read_analyze)
    }

    fn encode_analyze(&self, request: &AnalyzeFile, body: &mut Vec<u8>) {
        write_analyze(body, request);
    }
}

// What the kinds of fields are called in errors.
const STRING: &str = "a string";
const NUMBER: &str = "a number";
const MESSAGES: &str = "an array of messages";
const TOOLS: &str = "an array of tools";
const CALLS: &str = "an array of tool calls";
const ROLE: &str = "\"system\", \"user\" or \"assistant\"";
const REASON: &str = "\"stop\", \"length\", \"toolCalls\", \"cancelled\" or \"error\"";

fn optional_string<'a>(reader: &mut Reader<'a>) -> Step<Option<Cow<'a, str>>> {
    reader.nullable(Reader::string)
}

fn optional_number(reader: &mut Reader<'_>) -> Step<Option<f64>> {
    reader.number().map(Some)
}

fn raw_json<'a>(reader: &mut Reader<'a>) -> Step<Option<RawJsonRef<'a>>> {
    reader.raw().map(|text| Some(RawJsonRef::checked(text)))
}

fn read_request<'a>(reader: &mut Reader<'a>) -> Step<AIRequestRef<'a>> {
    let offset = reader.offset();
    let (mut messages, mut model) = (Field::Absent, Field::Absent);
    let (mut temperature, mut max_tokens) = (Field::Absent, Field::Absent);
    let (mut tools, mut system_prompt, mut stream) = (Field::Absent, Field::Absent, Field::Absent);
    reader.object("an object, the request", |reader, key| match key {
        "messages" => messages.read(reader, "messages", |r| r.array(MESSAGES, read_message)),
        "model" => model.read(reader, "model", Reader::string),
        "temperature" => temperature.read(reader, "temperature", optional_number),
        "maxTokens" => max_tokens.read(reader, "maxTokens", optional_number),
        "tools" => tools.read(reader, "tools", |r| r.nullable(|r| r.array(TOOLS, read_tool))),
        "systemPrompt" => system_prompt.read(reader, "systemPrompt", optional_string),
        "stream" => stream.read(reader, "stream", |r| r.nullable(Reader::boolean)),
        unknown => reader.skip_value().map_err(|e| e.in_field(unknown)),
    })?;
    Ok(AIRequestRef {
        messages: messages.required("messages", MESSAGES, offset)?,
        model: model.required("model", STRING, offset)?,
        temperature: temperature.optional()?,
        max_tokens: max_tokens.optional()?,
        tools: tools.optional()?,
        system_prompt: system_prompt.optional()?,
        stream: stream.optional()?,
    })
}

fn read_message<'a>(reader: &mut Reader<'a>) -> Step<MessageRef<'a>> {
    let offset = reader.offset();
    let (mut role, mut content, mut tool_calls) = (Field::Absent, Field::Absent, Field::Absent);
    reader.object("an object, a message", |reader, key| match key {
        "role" => role.read(reader, "role", |r| r.word(ROLE, role_of)),
        "content" => content.read(reader, "content", Reader::string),
        "toolCalls" => tool_calls.read(reader, "toolCalls", read_tool_calls),
        unknown => reader.skip_value().map_err(|e| e.in_field(unknown)),
    })?;
    Ok(MessageRef {
        role: role.required("role", ROLE, offset)?,
        content: content.required("content", STRING, offset)?,
        tool_calls: tool_calls.optional()?,
    })
}

fn role_of(word: &str) -> Option<MessageRole> {
    match word {
        "system" => Some(MessageRole::System),
        "user" => Some(MessageRole::User),
        "assistant" => Some(MessageRole::Assistant),
        _ => None,
    }
}

fn read_tool_calls<'a>(reader: &mut Reader<'a>) -> Step<Option<Vec<ToolCallRef<'a>>>> {
    reader.nullable(|reader| reader.array(CALLS, read_tool_call))
}

fn read_tool_call<'a>(reader: &mut Reader<'a>) -> Step<ToolCallRef<'a>> {
    let offset = reader.offset();
    let (mut name, mut parameters, mut id) = (Field::Absent, Field::Absent, Field::Absent);
    reader.object("an object, a tool call", |reader, key| match key {
        "name" => name.read(reader, "name", Reader::string),
        "parameters" => parameters.read(reader, "parameters", raw_json),
        "id" => id.read(reader, "id", Reader::string),
        unknown => reader.skip_value().map_err(|e| e.in_field(unknown)),
    })?;
    Ok(ToolCallRef {
        name: name.required("name", STRING, offset)?,
        parameters: parameters.optional()?,
        id: id.required("id", STRING, offset)?,
    })
}

fn read_tool<'a>(reader: &mut Reader<'a>) -> Step<ToolRef<'a>> {
    let offset = reader.offset();
    let (mut name, mut description, mut parameters) = (Field::Absent, Field::Absent, Field::Absent);
    reader.object("an object, a tool", |reader, key| match key {
        "name" => name.read(reader, "name", Reader::string),
        "description" => description.read(reader, "description", optional_string),
        "parameters" => parameters.read(reader, "parameters", raw_json),
        unknown => reader.skip_value().map_err(|e| e.in_field(unknown)),
    })?;
    Ok(ToolRef {
        name: name.required("name", STRING, offset)?,
        description: description.optional()?,
        parameters: parameters.optional()?,
    })
}

fn read_response(reader: &mut Reader<'_>) -> Step<AIResponse> {
    let offset = reader.offset();
    let (mut content, mut reasoning, mut tool_calls) = (Field::Absent, Field::Absent, Field::Absent);
    let (mut usage, mut finish_reason) = (Field::Absent, Field::Absent);
    reader.object("an object, the answer", |reader, key| match key {
        "content" => content.read(reader, "content", Reader::string),
        "reasoning" => reasoning.read(reader, "reasoning", optional_string),
        "toolCalls" => tool_calls.read(reader, "toolCalls", read_tool_calls),
        "usage" => usage.read(reader, "usage", |r| r.nullable(read_usage)),
        "finishReason" => finish_reason.read(reader, "finishReason", |r| r.word(REASON, reason_of)),
        unknown => reader.skip_value().map_err(|e| e.in_field(unknown)),
    })?;
    let owned = |calls: Vec<ToolCallRef<'_>>| calls.into_iter().map(ToolCallRef::into_owned).collect();
    Ok(AIResponse {
        content: content.required("content", STRING, offset)?.into_owned(),
        reasoning: reasoning.optional()?.map(Cow::into_owned),
        tool_calls: tool_calls.optional()?.map(owned),
        usage: usage.optional()?,
        finish_reason: finish_reason.required("finishReason", REASON, offset)?,
    })
}

fn reason_of(word: &str) -> Option<FinishReason> {
    match word {
        "stop" => Some(FinishReason::Stop),
        "length" => Some(FinishReason::Length),
        "toolCalls" => Some(FinishReason::ToolCalls),
        "cancelled" => Some(FinishReason::Cancelled),
        "error" => Some(FinishReason::Error),
        _ => None,
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "toolCalls",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Error => "error",
    }
}

/// The numbers of a usage, which are fields of their own or of a chunk.
struct UsageFields([Field<f64>; 3]);

impl UsageFields {
    const NAMES: [&str; 3] = ["promptTokens", "completionTokens", "totalTokens"];

    fn new() -> Self {
        Self([Field::Absent, Field::Absent, Field::Absent])
    }

    /// Reads the value that is next, if `key` is one of these fields.
    fn read(&mut self, reader: &mut Reader<'_>, key: &str) -> Step<bool> {
        match Self::NAMES.iter().position(|name| *name == key) {
            Some(i) => self.0[i].read(reader, Self::NAMES[i], Reader::number).map(|()| true),
            None => Ok(false),
        }
    }

    fn usage(self, offset: usize) -> Step<Usage> {
        let [prompt, completion, total] = self.0;
        Ok(Usage {
            prompt_tokens: prompt.required(Self::NAMES[0], NUMBER, offset)?,
            completion_tokens: completion.required(Self::NAMES[1], NUMBER, offset)?,
            total_tokens: total.required(Self::NAMES[2], NUMBER, offset)?,
        })
    }
}

fn read_usage(reader: &mut Reader<'_>) -> Step<Usage> {
    let offset = reader.offset();
    let mut fields = UsageFields::new();
    reader.object("an object, the usage", |reader, key| {
        if fields.read(reader, key)? {
            return Ok(());
        }
        reader.skip_value().map_err(|e| e.in_field(key))
    })?;
    fields.usage(offset)
}

/// The kinds of chunks, by their `type`.
#[derive(Clone, Copy)]
enum ChunkKind {
    Text,
    Reasoning,
    Usage,
    ToolCallStart,
    ToolCallDelta,
    ToolCallEnd,
    Error,
    End,
}

const CHUNK: &str = "\"text\", \"reasoning\", \"usage\", \"toolCallStart\", \"toolCallDelta\", \"toolCallEnd\", \
                     \"error\" or \"end\"";

fn chunk_kind_of(word: &str) -> Option<ChunkKind> {
    match word {
        "text" => Some(ChunkKind::Text),
        "reasoning" => Some(ChunkKind::Reasoning),
        "usage" => Some(ChunkKind::Usage),
        "toolCallStart" => Some(ChunkKind::ToolCallStart),
        "toolCallDelta" => Some(ChunkKind::ToolCallDelta),
        "toolCallEnd" => Some(ChunkKind::ToolCallEnd),
        "error" => Some(ChunkKind::Error),
        "end" => Some(ChunkKind::End),
        _ => None,
    }
}

/// The texts of chunks, whatever kind they are of.
struct ChunkTexts<'a>([Field<Cow<'a, str>>; 6]);

impl<'a> ChunkTexts<'a> {
    const NAMES: [&'static str; 6] = ["text", "id", "name", "parameters", "code", "message"];

    /// Reads the value that is next, if `key` is one of these fields.
    fn read(&mut self, reader: &mut Reader<'a>, key: &str) -> Step<bool> {
        match Self::NAMES.iter().position(|name| *name == key) {
            Some(i) => self.0[i].read(reader, Self::NAMES[i], Reader::string).map(|()| true),
            None => Ok(false),
        }
    }

    fn take(&mut self, name: &'static str, offset: usize) -> Step<String> {
        let field = Self::NAMES.iter().position(|known| *known == name).map(|i| &mut self.0[i]);
        let field = field.map_or(Field::Absent, |field| std::mem::replace(field, Field::Absent));
        field.required(name, STRING, offset).map(Cow::into_owned)
    }
}

fn read_chunk(reader: &mut Reader<'_>) -> Step<StreamChunk> {
    let offset = reader.offset();
    let (mut kind, mut finish_reason) = (Field::Absent, Field::Absent);
    let mut usage = UsageFields::new();
    let mut texts = ChunkTexts(std::array::from_fn(|_| Field::Absent));
    reader.object("an object, a chunk", |reader, key| match key {
        "type" => kind.read(reader, "type", |r| r.word(CHUNK, chunk_kind_of)),
        "finishReason" => finish_reason.read(reader, "finishReason", |r| r.word(REASON, reason_of)),
        other => {
            if texts.read(reader, other)? || usage.read(reader, other)? {
                return Ok(());
            }
            reader.skip_value().map_err(|e| e.in_field(other))
        }
    })?;
    let mut text = |name| texts.take(name, offset);
    Ok(match kind.required("type", CHUNK, offset)? {
        ChunkKind::Text => StreamChunk::Text { text: text("text")? },
        ChunkKind::Reasoning => StreamChunk::Reasoning { text: text("text")? },
        ChunkKind::Usage => StreamChunk::Usage(usage.usage(offset)?),
        ChunkKind::ToolCallStart => StreamChunk::ToolCallStart { id: text("id")?, name: text("name")? },
        ChunkKind::ToolCallDelta => {
            StreamChunk::ToolCallDelta { id: text("id")?, parameters: text("parameters")? }
        }
        ChunkKind::ToolCallEnd => StreamChunk::ToolCallEnd { id: text("id")? },
        ChunkKind::Error => StreamChunk::Error { code: text("code")?, message: text("message")? },
        ChunkKind::End => {
            StreamChunk::End { finish_reason: finish_reason.required("finishReason", REASON, offset)? }
        }
    })
}

fn read_analyze<'a>(reader: &mut Reader<'a>) -> Step<AnalyzeFileRef<'a>> {
    let (mut path, mut content, mut question) = (Field::Absent, Field::Absent, Field::Absent);
    reader.object("an object with `path` or `content`", |reader, key| match key {
        "path" => path.read(reader, "path", optional_string),
        "content" => content.read(reader, "content", optional_string),
        "question" => question.read(reader, "question", optional_string),
        unknown => {
            let known = "`path`, `content` and `question`";
            Err(DecodeError::at(reader.offset(), Problem::Unknown { known }).in_field(unknown))
        }
    })?;
    Ok(AnalyzeFileRef {
        path: path.optional()?,
        content: content.optional()?,
        question: question.optional()?,
    })
}

/// Appends `"key":"text"` if there is a text.
fn optional_text(object: &mut Object<'_>, key: &'static str, text: Option<&str>) {
    if let Some(text) = text {
        write::string(object.field(key), text);
    }
}

fn optional_raw(object: &mut Object<'_>, raw: Option<&RawJson>) {
    if let Some(raw) = raw {
        object.field("parameters").extend_from_slice(raw.get().as_bytes());
    }
}

fn optional_calls(object: &mut Object<'_>, calls: Option<&[ToolCall]>) {
    if let Some(calls) = calls {
        write::array(object.field("toolCalls"), calls, write_tool_call);
    }
}

fn write_request(out: &mut Vec<u8>, request: &AIRequest) {
    let mut object = Object::begin(out);
    write::array(object.field("messages"), &request.messages, write_message);
    write::string(object.field("model"), &request.model);
    if let Some(temperature) = request.temperature {
        write::number(object.field("temperature"), temperature);
    }
    if let Some(max_tokens) = request.max_tokens {
        write::number(object.field("maxTokens"), max_tokens);
    }
    if let Some(tools) = &request.tools {
        write::array(object.field("tools"), tools, write_tool);
    }
    optional_text(&mut object, "systemPrompt", request.system_prompt.as_deref());
    if let Some(stream) = request.stream {
        write::boolean(object.field("stream"), stream);
    }
    object.end();
}

fn write_message(out: &mut Vec<u8>, message: &Message) {
    let role = match message.role {
        MessageRole::System => "system",
        MessageRole::User => "user",
        MessageRole::Assistant => "assistant",
    };
    let mut object = Object::begin(out);
    write::string(object.field("role"), role);
    write::string(object.field("content"), &message.content);
    optional_calls(&mut object, message.tool_calls.as_deref());
    object.end();
}

fn write_tool_call(out: &mut Vec<u8>, call: &ToolCall) {
    let mut object = Object::begin(out);
    write::string(object.field("name"), &call.name);
    optional_raw(&mut object, call.parameters.as_ref());
    write::string(object.field("id"), &call.id);
    object.end();
}

fn write_tool(out: &mut Vec<u8>, tool: &Tool) {
    let mut object = Object::begin(out);
    write::string(object.field("name"), &tool.name);
    optional_text(&mut object, "description", tool.description.as_deref());
    optional_raw(&mut object, tool.parameters.as_ref());
    object.end();
}

fn write_response(out: &mut Vec<u8>, response: &AIResponse) {
    let mut object = Object::begin(out);
    write::string(object.field("content"), &response.content);
    optional_text(&mut object, "reasoning", response.reasoning.as_deref());
    optional_calls(&mut object, response.tool_calls.as_deref());
    if let Some(usage) = &response.usage {
        let mut inner = Object::begin(object.field("usage"));
        write_usage(&mut inner, usage);
        inner.end();
    }
    write::string(object.field("finishReason"), reason_name(response.finish_reason));
    object.end();
}

fn write_usage(object: &mut Object<'_>, usage: &Usage) {
    let numbers = [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens];
    for (name, number) in UsageFields::NAMES.into_iter().zip(numbers) {
        write::number(object.field(name), number);
    }
}

fn write_chunk(out: &mut Vec<u8>, chunk: &StreamChunk) {
    let mut object = Object::begin(out);
    let mut texts = |kind: &str, texts: &[(&'static str, &str)]| {
        write::string(object.field("type"), kind);
        for (name, text) in texts {
            write::string(object.field(name), text);
        }
    };
    match chunk {
        StreamChunk::Text { text } => texts("text", &[("text", text)]),
        StreamChunk::Reasoning { text } => texts("reasoning", &[("text", text)]),
        StreamChunk::Usage(usage) => {
            texts("usage", &[]);
            write_usage(&mut object, usage);
        }
        StreamChunk::ToolCallStart { id, name } => texts("toolCallStart", &[("id", id), ("name", name)]),
        StreamChunk::ToolCallDelta { id, parameters } => {
            texts("toolCallDelta", &[("id", id), ("parameters", parameters)]);
        }
        StreamChunk::ToolCallEnd { id } => texts("toolCallEnd", &[("id", id)]),
        StreamChunk::Error { code, message } => texts("error", &[("code", code), ("message", message)]),
        StreamChunk::End { finish_reason } => {
            texts("end", &[("finishReason", reason_name(*finish_reason))]);
        }
    }
    object.end();
}

fn write_analyze(out: &mut Vec<u8>, request: &AnalyzeFile) {
    let mut object = Object::begin(out);
    optional_text(&mut object, "path", request.path.as_deref());
    optional_text(&mut object, "content", request.content.as_deref());
    optional_text(&mut object, "question", request.question.as_deref());
    object.end();
}

//! Messages as rkyv archives, looked at only after they have been checked as a whole.

use super::error::{DecodeError, Problem};
use super::{Codec, check_json};
use crate::messages::{
    AIRequest, AIRequestRef, AIResponse, AnalyzeFile, AnalyzeFileRef, ArchivedAIRequest, ArchivedAIResponse,
    ArchivedAnalyzeFile, ArchivedMessage, ArchivedMessageRole, ArchivedStreamChunk, ArchivedTool,
    ArchivedToolCall, MessageRef, MessageRole, RawJsonRef, StreamChunk, ToolCallRef, ToolRef,
};
use doorbell_shm::entry::codec;
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::option::ArchivedOption;
use rkyv::rancor::{Failure, Panic};
use rkyv::ser::allocator::ArenaHandle;
use rkyv::ser::{Positional, Writer};
use rkyv::string::ArchivedString;
use rkyv::util::AlignedVec;
use rkyv::{Deserialize, Portable, Serialize, rancor};
use std::borrow::Cow;

/// rkyv archives in rkyv's default format: little-endian, 32-bit offsets, aligned. Access is checked.
///
/// A body whose address is not a multiple of 8 is copied first, and nothing is borrowed from it.
///
/// The format is that of the `rkyv` crate as it is compiled: a program that turns on one of the crate's features
/// `big_endian`, `unaligned`, `pointer_width_16` or `pointer_width_64` does not understand others.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rkyv(());

impl Rkyv {
    /// The codec.
    pub const fn new() -> Self {
        Self(())
    }
}

/// The largest alignment of what messages have: that of their numbers.
const ALIGN: usize = align_of::<ArchivedAIRequest>();
const _: () =
    assert!(align_of::<ArchivedAIResponse>() <= ALIGN && align_of::<ArchivedStreamChunk>() <= ALIGN);
const _: () = assert!(align_of::<ArchivedAnalyzeFile>() <= ALIGN);

impl Codec for Rkyv {
    fn id(&self) -> u8 {
        codec::RKYV
    }

    fn decode_request<'a>(&self, body: &'a [u8]) -> Result<AIRequestRef<'a>, DecodeError> {
        if is_aligned(body) {
            return view_request(access(body)?, body);
        }
        let copy = aligned(body);
        let view = view_request(access(&copy)?, &copy)?;
        Ok(view.into_owned().into())
    }

    fn encode_request(&self, request: &AIRequest, body: &mut Vec<u8>) {
        append(request, body);
    }

    fn decode_response(&self, body: &[u8]) -> Result<AIResponse, DecodeError> {
        owned::<ArchivedAIResponse, _>(body, |response, body| {
            check_calls(response.tool_calls.as_deref().unwrap_or_default(), body)
        })
    }

    fn encode_response(&self, response: &AIResponse, body: &mut Vec<u8>) {
        append(response, body);
    }

    fn decode_chunk(&self, body: &[u8]) -> Result<StreamChunk, DecodeError> {
        owned::<ArchivedStreamChunk, _>(body, |_, _| Ok(()))
    }

    fn encode_chunk(&self, chunk: &StreamChunk, body: &mut Vec<u8>) {
        append(chunk, body);
    }

    fn decode_analyze<'a>(&self, body: &'a [u8]) -> Result<AnalyzeFileRef<'a>, DecodeError> {
        if is_aligned(body) {
            return Ok(view_analyze(access(body)?));
        }
        Ok(view_analyze(access(&aligned(body))?).into_owned().into())
    }

    fn encode_analyze(&self, request: &AnalyzeFile, body: &mut Vec<u8>) {
        append(request, body);
    }
}

fn is_aligned(body: &[u8]) -> bool {
    body.as_ptr().addr().is_multiple_of(ALIGN)
}

fn aligned(body: &[u8]) -> AlignedVec<ALIGN> {
    let mut copy = AlignedVec::with_capacity(body.len());
    copy.extend_from_slice(body);
    copy
}

fn no_archive(error: impl ToString) -> DecodeError {
    let what = Problem::Archive(error.to_string());
    DecodeError { path: String::new(), offset: 0, what }
}

/// The archive in `body`, checked as a whole.
fn access<T>(body: &[u8]) -> Result<&T, DecodeError>
where
    T: Portable + for<'v> CheckBytes<HighValidator<'v, rancor::Error>>,
{
    rkyv::access::<T, rancor::Error>(body).map_err(no_archive)
}

/// The message in `body`, with memory of its own; `check` judges what rkyv does not.
fn owned<A, T>(
    body: &[u8],
    check: impl FnOnce(&A, &[u8]) -> Result<(), DecodeError>,
) -> Result<T, DecodeError>
where
    A: Portable + for<'v> CheckBytes<HighValidator<'v, rancor::Error>>,
    A: Deserialize<T, HighDeserializer<Failure>>,
{
    let copy = (!is_aligned(body)).then(|| aligned(body));
    let body = copy.as_deref().unwrap_or(body);
    let archived = access::<A>(body)?;
    check(archived, body)?;
    rkyv::deserialize::<T, Failure>(archived).map_err(no_archive)
}

/// Where an archive begins in a vector that may have something before it.
struct Tail<'o> {
    out: &'o mut Vec<u8>,
    start: usize,
}

impl Positional for Tail<'_> {
    fn pos(&self) -> usize {
        self.out.len() - self.start
    }
}

impl<E> Writer<E> for Tail<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

/// Appends the archive of `message`. It panics above 2 GiB, which is more than a message may have.
fn append<M>(message: &M, out: &mut Vec<u8>)
where
    M: for<'t, 'a> Serialize<HighSerializer<Tail<'t>, ArenaHandle<'a>, Panic>>,
{
    let start = out.len();
    let Ok(_) = rkyv::api::high::to_bytes_in::<_, Panic>(message, Tail { out, start });
}

/// Texts that are passed through as JSON: rkyv knows only that they are texts.
fn raw<'a>(text: &'a ArchivedString, body: &[u8]) -> Result<RawJsonRef<'a>, DecodeError> {
    let text = text.as_str();
    let begin = text.as_ptr().addr().saturating_sub(body.as_ptr().addr());
    match check_json(text) {
        Ok(()) => Ok(RawJsonRef::checked(text)),
        Err(error) => {
            Err(DecodeError { path: "parameters".to_owned(), offset: begin + error.offset, ..error })
        }
    }
}

fn check_calls(calls: &[ArchivedToolCall], body: &[u8]) -> Result<(), DecodeError> {
    for (i, call) in calls.iter().enumerate() {
        if let ArchivedOption::Some(parameters) = &call.parameters {
            raw(parameters, body).map_err(|e| inside("toolCalls", i, e))?;
        }
    }
    Ok(())
}

/// The error of a field of element `index` of `list`.
fn inside(list: &str, index: usize, error: DecodeError) -> DecodeError {
    *Box::new(error).in_element(index).in_field(list)
}

/// Every element as `each` sees it.
fn views<'a, T, U>(
    list: &'a [T],
    name: &str,
    mut each: impl FnMut(&'a T) -> Result<U, DecodeError>,
) -> Result<Vec<U>, DecodeError> {
    let mut views = Vec::with_capacity(list.len());
    for (i, element) in list.iter().enumerate() {
        views.push(each(element).map_err(|e| inside(name, i, e))?);
    }
    Ok(views)
}

fn borrowed(text: &ArchivedString) -> Cow<'_, str> {
    Cow::Borrowed(text.as_str())
}

fn optional(text: &ArchivedOption<ArchivedString>) -> Option<Cow<'_, str>> {
    text.as_ref().map(borrowed)
}

fn optional_raw<'a>(
    text: &'a ArchivedOption<ArchivedString>,
    body: &[u8],
) -> Result<Option<RawJsonRef<'a>>, DecodeError> {
    text.as_ref().map(|text| raw(text, body)).transpose()
}

fn view_request<'a>(request: &'a ArchivedAIRequest, body: &[u8]) -> Result<AIRequestRef<'a>, DecodeError> {
    let tools = request.tools.as_ref().map(|tools| views(tools, "tools", |tool| view_tool(tool, body)));
    Ok(AIRequestRef {
        messages: views(&request.messages, "messages", |message| view_message(message, body))?,
        model: borrowed(&request.model),
        temperature: request.temperature.as_ref().map(|number| number.to_native()),
        max_tokens: request.max_tokens.as_ref().map(|number| number.to_native()),
        tools: tools.transpose()?,
        system_prompt: optional(&request.system_prompt),
        stream: request.stream.as_ref().copied(),
    })
}

fn view_message<'a>(message: &'a ArchivedMessage, body: &[u8]) -> Result<MessageRef<'a>, DecodeError> {
    let calls = message.tool_calls.as_ref();
    let calls = calls.map(|calls| views(calls, "toolCalls", |call| view_call(call, body)));
    Ok(MessageRef {
        role: match message.role {
            ArchivedMessageRole::System => MessageRole::System,
            ArchivedMessageRole::User => MessageRole::User,
            ArchivedMessageRole::Assistant => MessageRole::Assistant,
        },
        content: borrowed(&message.content),
        tool_calls: calls.transpose()?,
    })
}

fn view_call<'a>(call: &'a ArchivedToolCall, body: &[u8]) -> Result<ToolCallRef<'a>, DecodeError> {
    Ok(ToolCallRef {
        name: borrowed(&call.name),
        parameters: optional_raw(&call.parameters, body)?,
        id: borrowed(&call.id),
    })
}

fn view_tool<'a>(tool: &'a ArchivedTool, body: &[u8]) -> Result<ToolRef<'a>, DecodeError> {
    Ok(ToolRef {
        name: borrowed(&tool.name),
        description: optional(&tool.description),
        parameters: optional_raw(&tool.parameters, body)?,
    })
}

fn view_analyze(request: &ArchivedAnalyzeFile) -> AnalyzeFileRef<'_> {
    AnalyzeFileRef {
        path: optional(&request.path),
        content: optional(&request.content),
        question: optional(&request.question),
    }
}

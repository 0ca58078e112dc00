//! The handlers by which a server's providers answer: `Complete`, `Chat`, and questions about files.
//!
//! Rule:   a handler decodes, gives the request to the thread of the providers, and is done; the answer goes through its
//!         ticket. A client that cancels, goes, or is past its deadline ends the provider's call too.
//! Errors: a body that makes no sense is answered at once, with field and place. What a provider fails with before its
//!         first chunk is the status of the call ([`HandlerError::Upstream`]); later it is the chunk `error`, then `end`.

use super::{Call, ChunkSink, Gone, HostHandle, Kind, ProviderError};
use crate::codec::{Codec, Json, codec_of};
use crate::messages::{AIRequest, AIResponse, Message, MessageRole, StreamChunk};
use crate::protocol::MessageType;
use crate::protocol::records::RECORD_HEAD;
use crate::server::files::FileFacts;
use crate::server::{Context as CallContext, Deferred, FileQuestion, HandlerError, HandlerTable};
use std::task::{Context, Poll};

/// The state of a server that has providers.
///
/// ```
/// use doorbell::provider::{HasProviders, HostHandle};
/// use doorbell::HandlerTable;
///
/// struct State {
///     providers: HostHandle,
/// }
///
/// impl HasProviders for State {
///     fn providers(&self) -> &HostHandle {
///         &self.providers
///     }
/// }
///
/// static TABLE: HandlerTable<State> = HandlerTable::with_builtins().register_provider_handlers();
/// ```
pub trait HasProviders: Sync {
    /// Where requests go.
    fn providers(&self) -> &HostHandle;

    /// The model that answers questions about files.
    fn file_model(&self) -> &str {
        "loopback"
    }
}

impl HasProviders for HostHandle {
    fn providers(&self) -> &HostHandle {
        self
    }
}

impl<S: HasProviders + 'static, const N: usize> HandlerTable<S, N> {
    /// The same table with `Complete`, `Chat` and questions about files, answered by the providers of the state.
    ///
    /// # Panics
    ///
    /// At compile time for a `static`: if one of them has a handler, or the table does not serve `AnalyzeFile`
    /// ([`HandlerTable::with_builtins`]).
    pub const fn register_provider_handlers(self) -> Self {
        self.on_deferred(MessageType::COMPLETE, complete)
            .on_deferred(MessageType::CHAT, chat)
            .on_file_question(answer_about_file)
    }
}

fn complete<S: HasProviders>(
    context: &CallContext<'_, S>,
    body: &[u8],
    ticket: Deferred,
) -> Result<(), HandlerError> {
    submit(context, body, ticket, Kind::Complete)
}

fn chat<S: HasProviders>(
    context: &CallContext<'_, S>,
    body: &[u8],
    ticket: Deferred,
) -> Result<(), HandlerError> {
    submit(context, body, ticket, Kind::Chat)
}

fn submit<S: HasProviders>(
    context: &CallContext<'_, S>,
    body: &[u8],
    ticket: Deferred,
    kind: Kind,
) -> Result<(), HandlerError> {
    let codec = codec_of(context.codec()).unwrap_or(&JSON);
    let request = codec.decode_request(body)?.into_owned();
    let sink = AnswerSink { ticket, codec, bytes: Vec::new() };
    let call = Call::new(kind, request).with_traceparent(context.traceparent());
    context.state().providers().submit_call(call, Box::new(sink));
    Ok(())
}

fn answer_about_file<S: HasProviders>(
    context: &CallContext<'_, S>,
    file: FileQuestion,
    ticket: Deferred,
) -> Result<(), HandlerError> {
    let FileQuestion { facts, content, question } = file;
    let content = String::from_utf8(content).map_err(|_| {
        HandlerError::Failed(
            "a question can be asked about UTF-8 text only: ask without one for facts".into(),
        )
    })?;
    let request = AIRequest {
        messages: vec![Message {
            role: MessageRole::User,
            content: format!("{question}\n\nThe file:\n\n{content}"),
            tool_calls: None,
        }],
        model: context.state().file_model().to_owned(),
        system_prompt: Some("You answer a question about a file, which follows the question.".to_owned()),
        ..AIRequest::default()
    };
    let call = Call::new(Kind::Chat, request).with_traceparent(context.traceparent());
    context.state().providers().submit_call(call, Box::new(FileSink { ticket, facts }));
    Ok(())
}

/// Bodies that are not said to be anything else are taken for JSON.
static JSON: Json = Json::new();

/// Room that a chunk is waited for with: of most chunks.
const ROOM: usize = RECORD_HEAD + 124;

/// Writes what a provider says to the client that asked.
struct AnswerSink {
    ticket: Deferred,
    codec: &'static dyn Codec,
    /// The chunk that is being written; kept for the next one.
    bytes: Vec<u8>,
}

impl ChunkSink for AnswerSink {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        self.ticket.poll_ready(cx, ROOM).map_err(|_| Gone)
    }

    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.ticket.poll_cancelled(cx)
    }

    fn chunk(&mut self, chunk: &StreamChunk) -> Result<(), Gone> {
        self.bytes.clear();
        self.codec.encode_chunk(chunk, &mut self.bytes);
        self.ticket.queue_record(&self.bytes).map_err(|_| Gone)
    }

    fn finish(self: Box<Self>) {
        self.ticket.finish();
    }

    fn answer(self: Box<Self>, response: AIResponse) {
        let mut body = self.bytes;
        body.clear();
        self.codec.encode_response(&response, &mut body);
        self.ticket.reply(&body);
    }

    fn fail(self: Box<Self>, error: ProviderError) {
        self.ticket.fail(error.into());
    }
}

/// Answers a question about a file: the facts, and beside them what the provider says.
struct FileSink {
    ticket: Deferred,
    facts: FileFacts,
}

impl ChunkSink for FileSink {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        self.ticket.poll_ready(cx, ROOM).map_err(|_| Gone)
    }

    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.ticket.poll_cancelled(cx)
    }

    fn chunk(&mut self, _: &StreamChunk) -> Result<(), Gone> {
        // No stream was asked for.
        Ok(())
    }

    fn finish(self: Box<Self>) {
        self.ticket.finish();
    }

    fn answer(self: Box<Self>, response: AIResponse) {
        let mut body = self.facts.to_json().into_bytes();
        // Instead of the closing brace.
        body.pop();
        body.extend_from_slice(b",\"answer\":");
        JSON.encode_response(&response, &mut body);
        body.push(b'}');
        self.ticket.reply(&body);
    }

    fn fail(self: Box<Self>, error: ProviderError) {
        self.ticket.fail(error.into());
    }
}

impl From<ProviderError> for HandlerError {
    fn from(error: ProviderError) -> Self {
        Self::Upstream { code: error.code(), message: error.to_string() }
    }
}

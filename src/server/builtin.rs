//! The handlers that every server has: `Ping`, `Echo`, `Stats`, `Inspect`, `EndSession`, `AnalyzeFile`.

use super::files::{Analysis, AnalyzeRequest, Subject};
use super::inspect::Question;
use super::table::{Context, Deferral, FileQuestion, HandlerError, HandlerTable, Pieces, Progress, Reply};
use crate::codec::{Json, codec_of};
use crate::config::QUESTION_MAX;
use crate::inspect::{EndSession, Inquiry};
use crate::protocol::MessageType;
use std::borrow::Cow;

impl<S: Sync, const N: usize> HandlerTable<S, N> {
    /// A table with `Ping`, `Echo`, `Stats`, `Inspect`, `EndSession` and `AnalyzeFile`.
    pub const fn with_builtins() -> Self {
        Self::empty()
            .on(MessageType::PING, ping)
            .on(MessageType::ECHO, echo)
            .on_pieces(MessageType::ECHO, echo_pieces)
            .on(MessageType::STATS, stats)
            .deferred(MessageType::INSPECT, inspect)
            .deferred(MessageType::END_SESSION, end_session)
            .deferred(MessageType::ANALYZE_FILE, analyze_file)
    }
}

fn ping<S>(_: &Context<'_, S>, _: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    Ok(())
}

fn echo<S>(_: &Context<'_, S>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(request)
}

fn echo_pieces<S>(_: &Context<'_, S>, _: Option<u64>) -> Result<Box<dyn Pieces<S>>, HandlerError> {
    // Has no state: nothing is allocated.
    Ok(Box::new(EchoPieces))
}

/// Echoes a long body as it comes.
struct EchoPieces;

impl<S> Pieces<S> for EchoPieces {
    fn take(
        &mut self,
        _: &Context<'_, S>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        let taken = bytes.len().min(reply.room());
        reply.write(&bytes[..taken])?;
        Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
    }
}

fn stats<S>(context: &Context<'_, S>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(context.metrics().to_json().as_bytes())
}

fn inspect(_: u8, request: &[u8]) -> Result<Deferral, HandlerError> {
    let inquiry = match request {
        [] => Inquiry::default(),
        json => serde_json::from_slice(json).map_err(|e| HandlerError::Decode(e.to_string()))?,
    };
    Ok(Deferral::Inspect(Question::Inspect(inquiry)))
}

fn end_session(_: u8, request: &[u8]) -> Result<Deferral, HandlerError> {
    let whom: EndSession =
        serde_json::from_slice(request).map_err(|e| HandlerError::Decode(e.to_string()))?;
    Ok(Deferral::Inspect(Question::End(whom)))
}

/// Content is analysed at once, a file when it has been read; a question about either goes on from there.
fn analyze_file(codec: u8, request: &[u8]) -> Result<Deferral, HandlerError> {
    let codec = codec_of(codec).unwrap_or(&JSON);
    let AnalyzeRequest { subject, question } = AnalyzeRequest::decode(codec, request)?;
    let question = question.map(Cow::into_owned);
    let text = match subject {
        Subject::Content(text) => text,
        Subject::Path(path) => return Ok(Deferral::File(path.into_owned().into(), question)),
    };
    let facts = Analysis::of(text.as_bytes());
    let Some(question) = question else { return Ok(Deferral::Answer(facts.to_json().into_bytes())) };
    if text.len() as u64 > QUESTION_MAX {
        let len = text.len();
        let why = format!("`content` has {len} bytes: questions are answered about {QUESTION_MAX} at most");
        return Err(HandlerError::Decode(why));
    }
    Ok(Deferral::Question(FileQuestion { facts, content: text.into_owned().into_bytes(), question }))
}

/// Bodies that are not said to be anything else are taken for JSON.
static JSON: Json = Json::new();

//! The handlers that every server has: `Ping`, `Echo`, `Stats`, `Inspect`, `EndSession`, `AnalyzeFile`.

use super::analyze::analyze_file;
use super::inspect::Question;
use super::json;
use super::table::{Context, Deferral, HandlerError, HandlerTable, Pieces, Progress, Reply};
use crate::inspect::Inquiry;
use crate::protocol::MessageType;

impl<S: Sync, const N: usize> HandlerTable<S, N> {
    /// A table with `Ping`, `Echo`, `Stats`, `Inspect`, `EndSession` and `AnalyzeFile`. The last three answer with
    /// an error if the feature `messages` is off.
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
        inquiry => json::read(inquiry)?,
    };
    Ok(Deferral::Inspect(Question::Inspect(inquiry)))
}

fn end_session(_: u8, request: &[u8]) -> Result<Deferral, HandlerError> {
    Ok(Deferral::Inspect(Question::End(json::read(request)?)))
}

//! The handlers that every server has: `Ping`, `Echo`, `Stats`.

use super::table::{Context, HandlerError, HandlerTable, Reply};
use crate::protocol::MessageType;

impl<S: Sync, const N: usize> HandlerTable<S, N> {
    /// A table with `Ping`, `Echo` and `Stats`.
    pub const fn with_builtins() -> Self {
        Self::empty().on(MessageType::PING, ping).on(MessageType::ECHO, echo).on(MessageType::STATS, stats)
    }
}

fn ping<S>(_: &Context<'_, S>, _: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    Ok(())
}

fn echo<S>(_: &Context<'_, S>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(request)
}

fn stats<S>(context: &Context<'_, S>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(context.metrics().to_json().as_bytes())
}

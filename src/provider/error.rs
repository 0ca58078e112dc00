//! What can go wrong with a provider.

use std::fmt;
use std::time::Duration;

/// What went wrong between us and a provider: what, with whom, and what to do. Never a key, never the text of a
/// conversation.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// It cannot be reached, or says itself that it cannot answer now.
    #[error(
        "provider `{provider}` is unavailable: {what}; check that it runs and that its base_url is right, or try again"
    )]
    Unavailable {
        /// Its name.
        provider: String,
        /// What was tried and how it failed.
        what: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// It does not accept our key.
    #[error(
        "provider `{provider}` does not accept the key (HTTP {status}); put a valid one into the environment variable that its key_env names, and start again"
    )]
    Unauthorized {
        /// Its name.
        provider: String,
        /// The HTTP status.
        status: u16,
    },
    /// It has been asked too often, or a quota is used up.
    #[error("provider `{provider}` limits our rate{}; {}", in_brackets(code), again(retry_after))]
    RateLimited {
        /// Its name.
        provider: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
        /// Its own word for it, such as `insufficient_quota`.
        code: Option<String>,
    },
    /// It refuses the request as such; to send it again is no use.
    #[error(
        "provider `{provider}` refuses the request (HTTP {status}{}): {message}; change the request",
        and(code)
    )]
    BadRequest {
        /// Its name.
        provider: String,
        /// The HTTP status.
        status: u16,
        /// Its own word for it, such as `context_length_exceeded`.
        code: Option<String>,
        /// Its sentence, shortened, without what the request said.
        message: String,
    },
    /// Nobody here answers for this model.
    #[error("no provider answers for the model {}; known are: {}", quoted(model), listed(known))]
    UnknownModel {
        /// The model asked for.
        model: String,
        /// Those that are configured.
        known: Vec<String>,
    },
    /// It took too long.
    #[error("provider `{provider}` took longer than {after:?} {phase}; try again, or raise {} of its timeouts", phase.key())]
    Timeout {
        /// Its name.
        provider: String,
        /// What took too long.
        phase: Phase,
        /// The limit.
        after: Duration,
    },
    /// What it sent makes no sense.
    #[error(
        "provider `{provider}` does not speak the protocol: {what}; check that its kind and base_url are right"
    )]
    Protocol {
        /// Its name.
        provider: String,
        /// What makes no sense; a description, not the bytes.
        what: String,
    },
    /// The connection ended before the answer did.
    #[error(
        "provider `{provider}` closed the connection in the middle of the answer; what has come is incomplete, ask again"
    )]
    Interrupted {
        /// Its name.
        provider: String,
    },
    /// It began to answer and then gave up, or filtered the answer.
    #[error("provider `{provider}` gave up on the answer{}: {message}", in_brackets(code))]
    Failed {
        /// Its name.
        provider: String,
        /// Its own word for it.
        code: Option<String>,
        /// Its sentence, shortened, without what the request said.
        message: String,
    },
    /// As many requests wait already as may.
    #[error("{whom} has {waiting} requests waiting, as many as may; try again later, or raise max_waiting")]
    Overloaded {
        /// Whose queue is full.
        whom: String,
        /// Requests waiting.
        waiting: usize,
    },
    /// Requests that are under way take too much memory.
    #[error(
        "requests under way take {used} of {limit} bytes and this one {wanted}; try again later, or raise max_request_bytes"
    )]
    NoMemory {
        /// Bytes in use.
        used: usize,
        /// Bytes that there are.
        limit: usize,
        /// Bytes of the request that is refused.
        wanted: usize,
    },
    /// The caller wanted no more.
    #[error("the request was cancelled")]
    Cancelled,
    /// The providers have been stopped.
    #[error("the providers of this server have been stopped; connect to a running one")]
    Stopped,
    /// The configuration asks for something impossible.
    #[error(transparent)]
    Config(#[from] super::ConfigFault),
}

/// What a provider took too long for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// To be connected to: name, TCP, TLS.
    Connect,
    /// Until the first piece of the answer.
    FirstChunk,
    /// From one piece of the answer to the next.
    BetweenChunks,
    /// For all of it, waiting in our queue included.
    Total,
}

impl Phase {
    /// The key of the configuration that limits it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Connect => "connect_ms",
            Self::FirstChunk => "first_chunk_ms",
            Self::BetweenChunks => "between_chunks_ms",
            Self::Total => "total_ms",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "to be connected to",
            Self::FirstChunk => "until its answer began",
            Self::BetweenChunks => "from one piece of its answer to the next",
            Self::Total => "for the whole answer",
        })
    }
}

impl ProviderError {
    /// A word for programs; the `code` of a [`StreamChunk::Error`](crate::messages::StreamChunk::Error).
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "unavailable",
            Self::Unauthorized { .. } => "unauthorized",
            Self::RateLimited { .. } => "rate_limited",
            Self::BadRequest { .. } => "bad_request",
            Self::UnknownModel { .. } => "unknown_model",
            Self::Timeout { .. } => "timeout",
            Self::Protocol { .. } => "protocol",
            Self::Interrupted { .. } => "interrupted",
            Self::Failed { .. } => "failed",
            Self::Overloaded { .. } | Self::NoMemory { .. } => "overloaded",
            Self::Cancelled => "cancelled",
            Self::Stopped => "stopped",
            Self::Config(_) => "config",
        }
    }

    /// When the provider wants to be asked again, if it said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } | Self::RateLimited { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether the same provider may give an answer when it is asked again a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { code, .. } => code.as_deref() != Some("insufficient_quota"),
            Self::Timeout { phase, .. } => matches!(phase, Phase::Connect | Phase::FirstChunk),
            Self::Unavailable { .. } | Self::Interrupted { .. } => true,
            _ => false,
        }
    }

    /// Whether another provider may give the answer that this one did not.
    pub fn is_of_this_provider(&self) -> bool {
        match self {
            Self::Timeout { phase, .. } => *phase != Phase::Total,
            Self::Unavailable { .. }
            | Self::Unauthorized { .. }
            | Self::RateLimited { .. }
            | Self::UnknownModel { .. }
            | Self::Protocol { .. }
            | Self::Interrupted { .. }
            | Self::Overloaded { .. } => true,
            Self::BadRequest { .. }
            | Self::Failed { .. }
            | Self::Cancelled
            | Self::NoMemory { .. }
            | Self::Stopped
            | Self::Config(_) => false,
        }
    }
}

fn in_brackets(code: &Option<String>) -> String {
    code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default()
}

fn and(code: &Option<String>) -> String {
    code.as_ref().map(|code| format!(", {code}")).unwrap_or_default()
}

fn again(retry_after: &Option<Duration>) -> String {
    match retry_after {
        Some(time) => format!("try again in {time:?}"),
        None => "try again later, or look at its quota".into(),
    }
}

/// At most 100 characters, with controls escaped.
fn quoted(name: &str) -> String {
    let short: String = name.chars().take(100).collect();
    format!("{short:?}")
}

fn listed(known: &[String]) -> String {
    match known {
        [] => "none, configure a provider".into(),
        known if known.len() <= 20 => known.join(", "),
        known => format!("{}, and {} more", known[..20].join(", "), known.len() - 20),
    }
}

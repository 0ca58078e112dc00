//! Numbers of message types (R2.10).

use std::fmt;
use std::str::FromStr;

/// The type of a message: index into the server's handler table.
///
/// 1 to 255 are fixed by the protocol, from [`MessageType::USER`] on they are the embedder's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageType(pub u32);

impl MessageType {
    /// Answers with nothing.
    pub const PING: Self = Self(1);
    /// Answers with the request's own bytes.
    pub const ECHO: Self = Self(2);
    /// Answers with the server's counters as one JSON object.
    pub const STATS: Self = Self(3);
    /// Tells of sessions, connections and calls, see [`crate::inspect`].
    pub const INSPECT: Self = Self(4);
    /// Ends a session, see [`crate::inspect`].
    pub const END_SESSION: Self = Self(5);
    /// A completion request.
    pub const COMPLETE: Self = Self(16);
    /// A chat request.
    pub const CHAT: Self = Self(17);
    /// A file analysis request.
    pub const ANALYZE_FILE: Self = Self(18);
    /// The first number of the embedder's own.
    pub const USER: Self = Self(256);

    /// The fixed types by name.
    const NAMED: [(&'static str, Self); 8] = [
        ("ping", Self::PING),
        ("echo", Self::ECHO),
        ("stats", Self::STATS),
        ("inspect", Self::INSPECT),
        ("end-session", Self::END_SESSION),
        ("complete", Self::COMPLETE),
        ("chat", Self::CHAT),
        ("analyze-file", Self::ANALYZE_FILE),
    ];
}

impl MessageType {
    /// The name of a fixed type.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED.iter().find(|(_, t)| *t == self).map(|(name, _)| *name)
    }
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{} ({name})", self.0),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A text that names no message type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no message type: give ping, echo, stats, inspect, end-session, complete, chat, analyze-file, or a number"
)]
pub struct UnknownTypeName(pub String);

impl FromStr for MessageType {
    type Err = UnknownTypeName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::NAMED.iter().find(|(name, _)| *name == text).map(|(_, t)| *t);
        named.or_else(|| text.parse().ok().map(Self)).ok_or_else(|| UnknownTypeName(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_read_and_shown() {
        assert_eq!("echo".parse(), Ok(MessageType::ECHO));
        assert_eq!("300".parse(), Ok(MessageType(300)));
        assert_eq!(MessageType::ECHO.to_string(), "2 (echo)");
        assert_eq!(MessageType(300).to_string(), "300");
        let error = "ecko".parse::<MessageType>().unwrap_err().to_string();
        assert!(error.contains("`ecko`") && error.contains("echo"), "{error}");
    }
}

//! What is wrong with a body.

use crate::server::HandlerError;
use std::fmt;

/// Why a body could not be decoded: which field, where, and what must be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeError {
    /// The field, as in `messages[2].toolCalls[0].name`; empty if it is the body as such.
    pub path: String,
    /// Where in the body, bytes from its start.
    pub offset: usize,
    /// What is wrong there.
    pub what: Problem,
}

/// What is wrong at one place of a body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It is no JSON.
    #[error("invalid JSON: {expected} must be here, not {}", found_text(.found))]
    Syntax {
        /// What could stand there.
        expected: &'static str,
        /// What does; `None` at the end of the body.
        found: Option<char>,
    },
    /// JSON of another kind than the field's.
    #[error("must be {expected}, not {found}")]
    Type {
        /// The kind of the field.
        expected: &'static str,
        /// The kind that is there.
        found: &'static str,
    },
    /// A word that is none of those the field can be.
    #[error("must be {expected}, not {found:?}")]
    Word {
        /// The words that the field can be.
        expected: &'static str,
        /// The beginning of what is there.
        found: String,
    },
    /// A field that must be there is not.
    #[error("is missing: it must be {expected}")]
    Missing {
        /// The kind of the field.
        expected: &'static str,
    },
    /// A field that does not exist, in a message all of whose fields are known.
    #[error("is an unknown field: there are {known}")]
    Unknown {
        /// The fields that exist.
        known: &'static str,
    },
    /// Objects and arrays in each other, more than are read.
    #[error("is nested deeper than {max} levels: send it flatter")]
    Depth {
        /// Levels that are read.
        max: usize,
    },
    /// The body is longer than is read.
    #[error("has {len} bytes, at most {max} are read: send less, or raise the limit")]
    Length {
        /// Bytes of the body.
        len: usize,
        /// Bytes that are read.
        max: usize,
    },
    /// Bytes that are no UTF-8.
    #[error("is not UTF-8: send JSON in UTF-8")]
    NotUtf8,
    /// Half of a surrogate pair in a text: JavaScript has such strings, Unicode has not.
    #[error("has the lone surrogate \\u{unit:04x}: send text that is valid Unicode")]
    LoneSurrogate {
        /// The UTF-16 unit.
        unit: u16,
    },
    /// It is no archive of this message.
    #[error("is no valid rkyv archive of this message: {0}")]
    Archive(String),
}

/// Levels of objects and arrays in each other that are read, `parameters` included.
pub const DEPTH_MAX: usize = 1024;

/// Characters of a client's own words that an error repeats.
const REPEATED_MAX: usize = 32;

impl DecodeError {
    pub(crate) fn at(offset: usize, what: Problem) -> Box<Self> {
        Box::new(Self { path: String::new(), offset, what })
    }

    /// The same error, seen from the object that has the value as field `name`.
    pub(crate) fn in_field(mut self: Box<Self>, name: &str) -> Box<Self> {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{}{dot}{}", beginning(name), self.path);
        self
    }

    /// The same error, seen from the array that has the value at `index`.
    pub(crate) fn in_element(mut self: Box<Self>, index: usize) -> Box<Self> {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("[{index}]{dot}{}", self.path);
        self
    }

    /// Whether the body is sound in itself and only something else than the field wants.
    pub(crate) fn is_about_kind(&self) -> bool {
        match self.what {
            Problem::Type { .. } | Problem::Word { .. } | Problem::Missing { .. } => true,
            Problem::LoneSurrogate { .. } | Problem::Unknown { .. } => true,
            Problem::Syntax { .. } | Problem::Depth { .. } | Problem::Length { .. } => false,
            Problem::NotUtf8 | Problem::Archive(_) => false,
        }
    }
}

/// The beginning of a word of the client's: enough to find it, not enough to flood a log.
pub(crate) fn beginning(word: &str) -> String {
    let mut beginning: String = word.chars().take(REPEATED_MAX).flat_map(char::escape_debug).collect();
    if word.chars().nth(REPEATED_MAX).is_some() {
        beginning.push('…');
    }
    beginning
}

fn found_text(found: &Option<char>) -> String {
    match found {
        Some(found) => format!("{found:?}"),
        None => "the end".to_owned(),
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.path {
            "" => write!(f, "the body, byte {}: {}", self.offset, self.what),
            path => write!(f, "`{path}`, byte {}: {}", self.offset, self.what),
        }
    }
}

impl std::error::Error for DecodeError {}

/// What the client is told.
impl From<DecodeError> for HandlerError {
    fn from(error: DecodeError) -> Self {
        HandlerError::Decode(error.to_string())
    }
}

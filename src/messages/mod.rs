//! What an IDE and the services behind it say to each other: requests, answers, and the chunks of a streamed answer.
//!
//! Field names are Rust's here and camelCase in JSON, in the order of declaration, absent where `None`. All numbers are
//! JavaScript's, that is `f64`; NaN and the infinities are `null` in JSON, and a `null` is read as NaN, so that it comes
//! back. A `null` where a text, list or boolean may be absent is as good as absent.
//!
//! To the byte as `JSON.stringify` writes them they are written by [`codec::Json`](crate::codec::Json); plain serde_json
//! differs in the digits of some numbers, in what it says of errors, and in that a field may come only once.

mod analyze;
mod chunk;
mod number;
mod raw;
mod request;
mod response;
mod view;

pub use analyze::{AnalyzeFile, AnalyzeFileRef};
pub use chunk::StreamChunk;
pub use raw::{RawJson, RawJsonRef};
pub use request::{AIRequest, Message, MessageRole, Tool, ToolCall};
pub use response::{AIResponse, FinishReason, Usage};
pub use view::{AIRequestRef, MessageRef, ToolCallRef, ToolRef};

/// The messages as they lie in archives.
#[cfg(feature = "rkyv")]
pub use self::{
    analyze::ArchivedAnalyzeFile,
    chunk::ArchivedStreamChunk,
    request::{ArchivedAIRequest, ArchivedMessage, ArchivedMessageRole, ArchivedTool, ArchivedToolCall},
    response::{ArchivedAIResponse, ArchivedFinishReason, ArchivedUsage},
};

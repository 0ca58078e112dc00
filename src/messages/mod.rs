//! What an IDE and the services behind it say to each other: requests, answers, and the chunks of a streamed answer.
//!
//! Field names are Rust's here and camelCase in JSON, in the order of declaration, absent where `None`. All numbers are
//! JavaScript's, that is `f64`.

mod chunk;
mod request;
mod response;

pub use chunk::StreamChunk;
pub use request::{AIRequest, Message, MessageRole, RawJson, Tool, ToolCall};
pub use response::{AIResponse, FinishReason, Usage};

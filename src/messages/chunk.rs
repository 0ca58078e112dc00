//! The chunks of a streamed answer.

use super::response::{FinishReason, Usage};
use serde::{Deserialize, Serialize};

/// One chunk of a streamed answer. Any number of others, then exactly one `End`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "rkyv", derive(rkyv::Archive, rkyv::Serialize, rkyv::Deserialize))]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum StreamChunk {
    /// More of the answer.
    Text {
        /// What comes next.
        text: String,
    },
    /// More of what the model says of how it gets there.
    Reasoning {
        /// What comes next.
        text: String,
    },
    /// What has been used.
    Usage(Usage),
    /// A call of a tool begins.
    ToolCallStart {
        /// Names the call.
        id: String,
        /// The tool's name.
        name: String,
    },
    /// More of the parameters of a call, as JSON text.
    ToolCallDelta {
        /// Names the call.
        id: String,
        /// What comes next; the pieces put together are JSON.
        parameters: String,
    },
    /// The parameters of a call are complete.
    ToolCallEnd {
        /// Names the call.
        id: String,
    },
    /// Something failed; an `End` with the reason `error` follows.
    Error {
        /// A word for programs, such as `rate_limited`.
        code: String,
        /// A sentence for people.
        message: String,
    },
    /// The answer is over.
    End {
        /// Why.
        finish_reason: FinishReason,
    },
}

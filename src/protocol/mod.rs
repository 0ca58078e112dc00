//! What client and server agree on beside the bytes of the segment: message types, the handshake, the
//! rendezvous socket.

/// A connection's number as OPEN answers it: 20 bits of index, which tables can be indexed with, below 12 bits of
/// generation.
pub const CONNECTION_INDEX_BITS: u32 = 20;

pub mod handshake;
mod message_type;
pub mod records;
pub(crate) mod rendezvous;
pub(crate) mod traceparent;

pub use message_type::MessageType;
pub use rendezvous::default_socket_path;
pub use traceparent::{TraceParent, TraceParentError};

//! What client and server agree on beside the bytes of the segment: message types, the handshake, the
//! rendezvous socket.

pub mod handshake;
mod message_type;
pub(crate) mod rendezvous;

pub use message_type::MessageType;
pub use rendezvous::default_socket_path;

//! What the processes of one doorbell session share: a sealed segment with sequence-published rings,
//! slots, slot words, hints and doorbell words.
//!
//! Trust:  whoever maps the other side may write any byte at any time. Each side believes its own private
//!         position and nothing else; every shared word is read once, as a whole, into a private copy.
//! Layout: every shared byte is drawn in `shm/LAYOUT.md`, computed in [`layout`] and pinned by assertions
//!         and golden vectors there.
//! Unsafe: three files. `map.rs` turns a mapping into typed references, `bytes.rs` copies payloads, `bus.rs` handles SIGBUS.
//!
//! The crate knows no io_uring, no sockets and no policy. [`ring`], [`bell`] and [`slots`] do not know
//! [`segment`]: they run on the heap too, under loom and Miri.

pub mod bell;
pub mod bus;
pub mod bytes;
pub mod entry;
pub mod error;
pub mod fork;
#[cfg(fuzzing)]
pub mod hooked;
pub mod kill;
pub mod lane;
pub mod layout;
pub mod lease;
pub mod map;
pub mod meta;
pub mod pipe;
pub mod ring;
pub mod segment;
pub mod slots;
mod sync;

pub use error::{PeerFault, SegmentError};

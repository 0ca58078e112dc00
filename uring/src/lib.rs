//! What a doorbell reactor waits with: one io_uring per thread, its futex operations, descriptors,
//! timers and messages from other rings. It knows nothing of sessions or of what a word means.
//!
//! - [`Driver`]: the ring, or epoll where there is none to be had. Push operations, [`Driver::enter`] once, take
//!   [`Driver::next_completion`].
//! - [`Staging`]: private buffers that [`Driver::read`] reads files into.
//! - [`futex`]: plain futex(2), for those who never need a ring (the client library).
//! - [`self_test`]: does this machine's io_uring *do* what [`Driver`] relies on? And if not, why?
//!
//! # The rule of a polling loop
//!
//! The ring is `DEFER_TASKRUN`: whatever happens, **no completion appears before the next enter**. The
//! kernel raises a flag instead, and [`Driver::pending`] reads it. A loop that polls something else
//! must test `pending` each round and enter when it is true, else a bell is never heard:
//!
//! ```
//! # use doorbell_uring::*;
//! # fn round(driver: &mut Driver) -> Result<(), DriverError> {
//! if driver.pending() {
//!     driver.enter(Wait::No)?;
//!     while let Some(completion) = driver.next_completion() {
//!         // Look `completion.token` up; a token of a dead generation is ignored.
//!         # let _ = completion;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Trust
//!
//! The kernel is trusted, the peers behind words and descriptors are not: whatever they write or
//! close, an operation only ever ends with a number the caller must check. The value of a futex word
//! is compared by the kernel and never read here.
//!
//! # Unsafe
//!
//! Six files: `ring.rs` (pushing entries, reading the kernel's flags), `buffers.rs` (memory that the kernel
//! reads files into), `peer.rs` (two socket options: one that no kept crate offers, one that rustix misreads),
//! `cpu.rs` (two scheduler calls that no kept crate offers), `memory.rs` (the two mappings the self-test works on) and `resident.rs` (letting go of memory that
//! a process which mostly waits need not have).

mod buffers;
mod cause;
mod cpu;
mod driver;
mod epoll;
mod error;
pub mod futex;
mod helper;
mod inherited;
mod memory;
mod op;
mod peer;
mod reads;
mod resident;
mod ring;
mod ring_driver;
mod self_test;
mod setup;
mod time;

pub use buffers::{Buffer, Class, Counts, Staging};
pub use cause::{Cause, Host, KERNEL_MIN, futex_bug_unfixed, kernel_version};
pub use cpu::{ask_for_short_turns, current_cpu};
pub use driver::{Counters, Driver, Wait};
pub use epoll::{EpollDriver, ring_eventfd};
pub use error::{DriverError, SetupError, Step};
pub use inherited::inherited_descriptors;
pub use op::{Completion, Token};
pub use peer::{PeerCredentials, peer_credentials, peer_process};
pub use resident::{thin_executable, trim_heap};
pub use ring_driver::RingDriver;
pub use rustix::event::PollFlags;
pub use self_test::{Report, self_test};
pub use setup::Options;
pub use time::monotonic_now;

//! Files that clients ask about (`AnalyzeFile`, R2.11): what they may ask for, reading it, what is found.
//!
//! - [`AnalyzeRequest`]: the question, with content or a path.
//! - [`Roots`]: which paths may be opened, and what happens to the others.
//! - [`FileReads`]: files being read through a reactor's ring; [`FileRead`] is one of them, without I/O.
//! - [`Analysis`]: bytes in, [`FileFacts`] out.

mod analysis;
mod error;
mod read;
mod reads;
mod request;
mod roots;

pub use analysis::{Analysis, Encoding, FileFacts, LineEnding};
pub use error::FileError;
pub use read::{FileRead, Want};
pub use reads::{Ended, FileReads, ReadId};
pub use request::{AnalyzeRequest, RequestError, Subject};
pub use roots::{Opened, Roots};

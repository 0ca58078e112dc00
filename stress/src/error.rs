//! Why a level could not be run to its end. What a client found wrong is not one of these: it is counted
//! and judged.

use doorbell::IpcError;
use doorbell_shm::SegmentError;
use std::io;

/// What stopped a level.
#[derive(Debug, thiserror::Error)]
pub enum StressError {
    /// The kernel refused a call.
    #[error("{call} failed: {source}")]
    Os {
        /// The call and what it was for.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Shared memory for the bare ring could not be had.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The server or a client could not do what comes before the load.
    #[error("{doing}: {source}")]
    Ipc {
        /// What was being done.
        doing: &'static str,
        /// The library's error.
        #[source]
        source: IpcError,
    },
    /// A process ended before it had done its part; it has said why on stderr.
    #[error("the {role} process ended early ({how})")]
    Child {
        /// Which one.
        role: &'static str,
        /// Its exit status, or what it said instead of what was expected.
        how: String,
    },
    /// A server holds something of a client long after its end (I2, I8).
    #[error("something of client {number} is left 10 s after its end: {what}")]
    Left {
        /// Which of those that were started.
        number: u64,
        /// What there was before it, and is now.
        what: String,
    },
    /// A process did not say in time what it had to say.
    #[error("the {role} process said nothing for {seconds} s: it hangs")]
    Silent {
        /// Which one.
        role: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Server and clients need a core each.
    #[error("{allowed} core is allowed here; server and clients need one each")]
    Cores {
        /// How many are allowed.
        allowed: usize,
    },
    /// The footprint would lack some segments.
    #[error("{found} of {expected} segments were found, so the footprint cannot be told")]
    Segments {
        /// How many were found in the processes.
        found: usize,
        /// How many sessions there are.
        expected: usize,
    },
    /// The server's memory could not be read.
    #[error("the server's memory cannot be read: {0}")]
    Memory(String),
    /// The bare ring itself went wrong: nothing can be compared with it.
    #[error("the bare ring went wrong: {0}")]
    Floor(String),
    /// A child was told something that it does not understand.
    #[error("a job that cannot be read: {0}")]
    Job(#[from] serde_json::Error),
    /// The providers cannot be had.
    #[error("the providers cannot be had: {0}")]
    Providers(String),
    /// A client got an answer that is not its own.
    #[error("a wrong answer: {0}")]
    Wrong(String),
    /// A child was not started by its parent.
    #[error("this subcommand is for this program's own processes")]
    NotAChild,
}

impl StressError {
    /// A refusal by the kernel.
    pub fn os(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Os { call, source: source.into() }
    }

    /// Wraps an error of the library: for `map_err`.
    pub fn ipc(doing: &'static str) -> impl FnOnce(IpcError) -> Self {
        move |source| Self::Ipc { doing, source }
    }
}

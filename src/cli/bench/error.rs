//! Why a benchmark could not be run. A wrong answer is not one of these: it is counted and reported.

use doorbell_shm::SegmentError;
use std::error::Error;
use std::io;

/// What stopped a benchmark.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// An option that cannot be meant, or cannot be combined with another.
    #[error("--{option}: {reason}")]
    Option {
        /// The option's name, without dashes.
        option: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The kernel refused a call.
    #[error("{call} failed: {source}")]
    Os {
        /// The call and what it was for.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Shared memory could not be had.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The peer under test failed while it was driven.
    #[error("{doing}: {source}")]
    Peer {
        /// What was being done.
        doing: &'static str,
        /// The peer's own error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Calls were outstanding, but no answer came.
    #[error("no answer for {seconds} s with {outstanding} calls outstanding: the server hangs or is gone")]
    Silent {
        /// How long nothing came.
        seconds: u64,
        /// Calls without an answer.
        outstanding: u64,
    },
    /// A process that the benchmark started ended before it had done its part; it has said why on stderr.
    #[error("the {role} process ended early ({how})")]
    Child {
        /// Which one.
        role: &'static str,
        /// Its exit status, or what it sent instead of what was expected.
        how: String,
    },
}

impl BenchError {
    /// A refusal by the kernel.
    pub fn os(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Os { call, source: source.into() }
    }

    /// A failure of the peer.
    pub fn peer(doing: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Peer { doing, source: source.into() }
    }

    /// A value that cannot be meant.
    pub fn option(option: &'static str, reason: impl Into<String>) -> Self {
        Self::Option { option, reason: reason.into() }
    }
}

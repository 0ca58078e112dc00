//! Why a file was not analysed. Each says which, and what to do where something can be done.

use crate::server::HandlerError;
use rustix::io::Errno;
use std::path::PathBuf;

/// Why a file was not analysed. Paths are as the client named them, and shown escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The server reads no files at all.
    #[error(
        "{path:?} was not read: this server reads no files; configure `file_roots`, or send the `content`"
    )]
    NoRoots {
        /// The path asked for.
        path: PathBuf,
    },
    /// Not beneath a configured directory, or it leads out of it.
    #[error(
        "{path:?} lies outside the directories in `file_roots`: name a file beneath one of them, or send the \
         `content`"
    )]
    Outside {
        /// The path asked for.
        path: PathBuf,
    },
    /// There is no such file.
    #[error("{path:?} does not exist")]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// Something else than a regular file.
    #[error("{path:?} is {kind}, not a file")]
    NotAFile {
        /// The path asked for.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// The server's user may not read it.
    #[error("{path:?} may not be read by the server's user: check its permissions")]
    NotPermitted {
        /// The path asked for.
        path: PathBuf,
    },
    /// It leads through links that are not followed.
    #[error("{path:?} leads through too many symbolic links, or through one of those in /proc")]
    Links {
        /// The path asked for.
        path: PathBuf,
    },
    /// Longer than the limit.
    #[error("{path:?} has {size} bytes, the limit is {limit}: raise `max_file_size`")]
    TooLarge {
        /// The path asked for.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// Shorter or longer at the end of reading than when it was opened.
    #[error(
        "{path:?} was changed while it was read: {opened} bytes when it was opened, {} when it was read; try again",
        found_text(*.opened, *.found)
    )]
    Changed {
        /// The path asked for.
        path: PathBuf,
        /// Its size when it was opened, bytes.
        opened: u64,
        /// The bytes that there were; if these are more, there may be still more.
        found: u64,
    },
    /// As many files are being read as may be.
    #[error("{path:?} was not read: {limit} files are being read already; try again")]
    Busy {
        /// The path asked for.
        path: PathBuf,
        /// How many may be read at once.
        limit: usize,
    },
    /// A system call failed.
    #[error("{path:?} was not read: {call}: {errno}")]
    Os {
        /// The path asked for.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

fn found_text(opened: u64, found: u64) -> String {
    if found > opened { format!("{found} or more") } else { found.to_string() }
}

/// What the client of a handler is told.
impl From<FileError> for HandlerError {
    fn from(error: FileError) -> Self {
        HandlerError::Failed(error.to_string())
    }
}

//! Stands for `analyze.rs` in a server without the feature `messages`: `AnalyzeFile` is refused, and no file is read.

use super::reactor::Reactor;
use super::table::{Deferral, HandlerError};
use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use rustix::io::Errno;
use std::sync::Arc;

/// There is none.
#[derive(Debug)]
pub enum FileQuestion {}

/// Names a file being read; nobody makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadId {
    pub index: u32,
    pub generation: u32,
}

/// No directories.
#[derive(Debug)]
pub(super) struct FileSource;

impl FileSource {
    /// # Errors
    ///
    /// [`IpcError::Config`] if there are directories: nothing beneath them would be read.
    pub fn open(config: &ServerConfig) -> Result<Self> {
        match config.file_roots.is_empty() {
            true => Ok(Self),
            false => Err(IpcError::Config(
                "file_roots: this server was built without the feature `messages` and reads no files: leave it \
                 empty"
                    .to_owned(),
            )),
        }
    }
}

/// No files.
#[derive(Debug)]
pub(super) struct FileDesk;

impl FileDesk {
    pub fn new(_: Arc<FileSource>) -> Self {
        Self
    }

    /// Never.
    pub fn due_ns(&self) -> u64 {
        u64::MAX
    }
}

impl<S> Reactor<S> {
    /// Nobody asks for a file.
    pub(super) fn serve_files(&mut self) -> Result<u32> {
        Ok(0)
    }

    /// No file is being read.
    pub(super) fn file_came(&mut self, _: ReadId, _: std::result::Result<u32, Errno>) -> Result<()> {
        Ok(())
    }

    /// No buffers are used.
    pub(super) fn trim_files(&mut self, _: u64) -> Result<()> {
        Ok(())
    }
}

pub(super) fn analyze_file(_: u8, _: &[u8]) -> std::result::Result<Deferral, HandlerError> {
    Err(HandlerError::left_out())
}

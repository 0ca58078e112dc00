//! Which files a client may have read: those beneath configured directories, as the kernel resolves them.
//!
//! Trust:  a path is a client's word. The kernel alone decides whether it stays beneath a root, link by link
//!         (RESOLVE_BENEATH): nothing here compares a path that was resolved earlier.
//! Opened: regular files only, looked at before they are opened, since opening a FIFO or a device is felt by others.

use super::error::FileError;
use crate::error::{IpcError, Result};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fcntl_setfl, fstat, open, openat2};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How often a path is resolved again when something was renamed meanwhile.
const ATTEMPTS: u32 = 16;

/// The directories beneath which files may be read, and how long those may be.
#[derive(Debug)]
pub struct Roots {
    roots: Vec<Root>,
    limit: u64,
}

#[derive(Debug)]
struct Root {
    /// As configured.
    path: PathBuf,
    /// Without links.
    canonical: PathBuf,
    directory: OwnedFd,
}

/// A regular file that may be read, and its size when it was opened.
#[derive(Debug)]
pub struct Opened {
    /// As the client named it.
    pub path: PathBuf,
    /// Open for reading; reads block where the file system does.
    pub file: Arc<OwnedFd>,
    /// Bytes.
    pub size: u64,
}

impl Roots {
    /// No directory: every path is refused.
    pub fn none() -> Self {
        Self { roots: Vec::new(), limit: 0 }
    }

    /// Opens the directories; they stay open, so that a path is resolved beneath them whatever becomes of their
    /// names. Files of more than `limit` bytes are refused.
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] naming the directory and what is wrong with it.
    pub fn open(directories: &[PathBuf], limit: u64) -> Result<Self> {
        let roots = directories.iter().map(|path| Root::open(path)).collect::<Result<_>>()?;
        Ok(Self { roots, limit })
    }

    /// Opens a file for a client. An absolute path must begin with a root, as configured or without links; a
    /// relative one is tried beneath each root in order.
    ///
    /// Cost:   two walks along the path, for each root that is tried; nothing is read.
    /// Source: openat2(2).
    ///
    /// # Errors
    ///
    /// [`FileError`], naming `path`.
    pub fn open_file(&self, path: &Path) -> std::result::Result<Opened, FileError> {
        let own = || path.to_path_buf();
        if self.roots.is_empty() {
            return Err(FileError::NoRoots { path: own() });
        }
        if path.as_os_str().as_bytes().contains(&0) {
            return Err(FileError::NotFound { path: own() });
        }
        let mut refused = FileError::Outside { path: own() };
        for root in &self.roots {
            let Some(beneath) = root.beneath(path) else { continue };
            match self.open_beneath(root, beneath, path) {
                // Another root may have it; that it is outside of one and nowhere in the others is less to know.
                Err(error @ FileError::NotFound { .. }) => refused = error,
                Err(FileError::Outside { .. }) => {}
                decided => return decided,
            }
        }
        Err(refused)
    }

    fn open_beneath(
        &self,
        root: &Root,
        beneath: &Path,
        path: &Path,
    ) -> std::result::Result<Opened, FileError> {
        let failed = |call, errno| failure(path, call, errno);
        let look = resolve(root, beneath, OFlags::PATH).map_err(|errno| failed("openat2", errno))?;
        self.check(look.as_fd(), path)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = resolve(root, beneath, flags).map_err(|errno| failed("openat2", errno))?;
        // Looked at again: it may be another one by now.
        let size = self.check(file.as_fd(), path)?;
        // Else the ring reads within the enter, however long that takes (see `Driver::read`).
        fcntl_setfl(&file, OFlags::empty()).map_err(|errno| failed("fcntl(F_SETFL)", errno))?;
        Ok(Opened { path: path.to_path_buf(), file: Arc::new(file), size })
    }

    /// Its size, if it is a regular file that is not too long.
    fn check(&self, file: BorrowedFd<'_>, path: &Path) -> std::result::Result<u64, FileError> {
        let stat = fstat(file).map_err(|errno| failure(path, "fstat", errno))?;
        if let Some(kind) = kind(&stat) {
            return Err(FileError::NotAFile { path: path.to_path_buf(), kind });
        }
        let size = stat.st_size.unsigned_abs();
        if size > self.limit {
            return Err(FileError::TooLarge { path: path.to_path_buf(), size, limit: self.limit });
        }
        Ok(size)
    }
}

impl Root {
    fn open(path: &Path) -> Result<Self> {
        let wrong = |problem: &str| IpcError::Config(format!("file_roots: {}: {problem}", path.display()));
        if !path.is_absolute() {
            return Err(wrong("not an absolute path: begin it with /"));
        }
        let directory = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| wrong(&std::io::Error::from(errno).to_string()))?;
        let canonical = std::fs::canonicalize(path).map_err(|error| wrong(&error.to_string()))?;
        Ok(Self { path: path.to_path_buf(), canonical, directory })
    }

    /// What is to be resolved beneath this root, if `path` names something there.
    fn beneath<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        if !path.is_absolute() {
            return Some(path);
        }
        let rest = path.strip_prefix(&self.path).or_else(|_| path.strip_prefix(&self.canonical)).ok()?;
        Some(if rest.as_os_str().is_empty() { Path::new(".") } else { rest })
    }
}

fn resolve(root: &Root, beneath: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match openat2(&root.directory, beneath, flags | OFlags::CLOEXEC, Mode::empty(), how) {
            // Something on the way was renamed: the kernel cannot tell whether it was beneath.
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

fn failure(path: &Path, call: &'static str, errno: Errno) -> FileError {
    let path = path.to_path_buf();
    match errno {
        Errno::NOENT | Errno::NOTDIR => FileError::NotFound { path },
        Errno::XDEV => FileError::Outside { path },
        Errno::ACCESS | Errno::PERM => FileError::NotPermitted { path },
        Errno::LOOP => FileError::Links { path },
        errno => FileError::Os { path, call, errno },
    }
}

/// What it is if it is no regular file.
fn kind(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Fifo => Some("a FIFO"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice | FileType::BlockDevice => Some("a device"),
        FileType::Symlink => Some("a link"),
        FileType::Unknown => Some("something unknown"),
    }
}

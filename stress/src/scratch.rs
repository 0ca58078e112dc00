//! The private directory in which a server listens, removed however this process ends, SIGKILL excepted.

use crate::error::StressError;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The directories that exist.
static EXISTING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A directory of this user's alone, removed with everything in it when dropped.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// A new one, told apart by `name`.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if it cannot be made.
    pub fn new(name: &str) -> Result<Self, StressError> {
        let path = std::env::temp_dir().join(format!("doorbell-stress-{}-{name}", std::process::id()));
        let mut existing = EXISTING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        DirBuilder::new().mode(0o700).create(&path).map_err(|e| StressError::os("mkdir", e))?;
        existing.push(path.clone());
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let mut existing = EXISTING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        existing.retain(|path| *path != self.0);
        remove(&self.0);
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_dir_all(path) {
        eprintln!("doorbell-stress: the socket's directory could not be removed: {error}");
    }
}

/// From now on a signal that ends this process removes its directories first. Its children die with it.
///
/// # Errors
///
/// [`StressError::Os`] if the signals cannot be had.
pub fn remove_on_signals() -> Result<(), StressError> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(|e| StressError::os("sigaction", e))?;
    let wait = move || {
        let Some(signal) = signals.forever().next() else { return };
        // Held until the process is gone: no directory is made any more.
        let existing = EXISTING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        existing.iter().for_each(|path| remove(path));
        std::process::exit(128 + signal);
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map_err(|e| StressError::os("clone for the signal thread", e))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_directory_is_private_and_goes_with_everything_in_it() {
        let directory = Directory::new("test").unwrap();
        let path = directory.path().to_owned();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(path.join("s"), b"").unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}

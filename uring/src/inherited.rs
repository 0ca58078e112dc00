#![allow(unsafe_code)]
//! Descriptors that whoever started this process has handed over, by systemd's protocol (sd_listen_fds(3)).

use rustix::io::{Errno, FdFlags};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first descriptor behind the standard streams: those handed over begin there.
const FIRST: RawFd = 3;
/// Nobody hands over more.
const MOST: RawFd = 1024;

/// The descriptors that were handed over to this process, with the names that the environment gives them (`unknown`
/// where it gives none), closed on exec from here on. Once: none are left for a second call.
///
/// To be called before anything else opens descriptors: if the environment promises more than there are, the next
/// ones that this process opened would be taken for them.
///
/// # Errors
///
/// `INVAL` for a count that is none, `BADF` if a descriptor that was promised is not open.
pub fn inherited_descriptors() -> Result<Vec<(String, OwnedFd)>, Errno> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).ok();
    let Some(count) = variable("LISTEN_FDS") else { return Ok(Vec::new()) };
    // Meant for another process, whose environment this one has inherited.
    if variable("LISTEN_PID").and_then(|pid| pid.parse::<u32>().ok()) != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = count.parse::<RawFd>().ok().filter(|count| (0..=MOST).contains(count)).ok_or(Errno::INVAL)?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    for raw in FIRST..FIRST + count {
        // SAFETY: the kernel answers BADF if it is not open; nothing is done with it otherwise.
        let fd = unsafe { BorrowedFd::borrow_raw(raw) };
        rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    }
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let owned = |raw| {
        let name = names.next().filter(|name| !name.is_empty());
        // SAFETY:
        // - Open: asked for above.
        // - Ours alone: the protocol gives these numbers to this process, `TAKEN` gives them out once, and nothing
        //   of ours had been opened before.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        (name.unwrap_or_else(|| "unknown".to_owned()), fd)
    };
    Ok((FIRST..FIRST + count).map(owned).collect())
}

#![allow(unsafe_code)]
//! The process at the other end of a unix socket, as a descriptor that no reuse of its number can fool.

use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// getsockopt(2) option of kernel 6.5 and later, from `include/uapi/asm-generic/socket.h`.
const SO_PEERPIDFD: libc::c_int = 77;

/// A pidfd of the process that connected `socket` (F10): readable once that process has ended, whoever
/// else holds the socket by then (F9).
///
/// # Errors
///
/// The kernel's answer: `NODATA` or `SRCH` if the process has been reaped, `NOPROTOOPT` before kernel 6.5.
pub fn peer_process(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mut raw: libc::c_int = -1;
    // SAFETY: an `int` is what the kernel writes for this option, and any bytes are one.
    unsafe { get_option(socket, SO_PEERPIDFD, &mut raw) }?;
    // SAFETY: the call succeeded, so `raw` is a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Who connected a socket, as it was then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process, as this one sees it; 0 if that is of a pid namespace which this one does not see.
    pub pid: u32,
    /// The user, as this process sees him.
    pub uid: u32,
}

/// Who connected `socket`, or bound it if it listened (F54, F55).
///
/// rustix takes a pid of 0 for an error, and with it every peer outside of a container that this process is in.
///
/// # Errors
///
/// The kernel's answer.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> Result<PeerCredentials, Errno> {
    let mut raw = libc::ucred { pid: 0, uid: 0, gid: 0 };
    // SAFETY: a `ucred` is what the kernel writes for this option, and any bytes are one.
    unsafe { get_option(socket, libc::SO_PEERCRED, &mut raw) }?;
    Ok(PeerCredentials { pid: u32::try_from(raw.pid).unwrap_or(0), uid: raw.uid })
}

/// Reads an option of a socket into `value`.
///
/// # Safety
///
/// Whatever the kernel writes for this option must be a `T`.
unsafe fn get_option<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &mut T) -> Result<(), Errno> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY:
    // - `value` and `len` are live, writable, and `len` says how large `value` is.
    // - `socket` is open for the duration of the borrow.
    let result = unsafe {
        let value = std::ptr::from_mut(value).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, value, &mut len)
    };
    if result != 0 {
        let errno = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&errno).unwrap_or(Errno::INVAL));
    }
    Ok(())
}

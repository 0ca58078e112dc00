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
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY:
    // - `raw` and `len` are live, writable, and `len` says how large `raw` is.
    // - `socket` is open for the duration of the borrow.
    let result = unsafe {
        let value = (&raw mut raw).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, value, &mut len)
    };
    if result != 0 {
        let errno = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&errno).unwrap_or(Errno::INVAL));
    }
    // SAFETY: the call succeeded, so `raw` is a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

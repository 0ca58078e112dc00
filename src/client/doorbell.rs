//! How the reactor of a lane is woken: on its bell's word, or by a byte on the socket that it sleeps on.

use crate::error::{IpcError, Result};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Where a lane's reactor sleeps. Its bell's word says in either case whether it does.
#[derive(Debug, Clone)]
pub(super) enum Doorbell {
    /// On the word.
    Futex,
    /// On this socket's other end.
    Socket(Arc<OwnedFd>),
}

/// Wakes a reactor by its socket. To be called by whoever has taken the mark of its bell.
///
/// # Errors
///
/// [`IpcError::Io`] with what the kernel refuses. That the server has gone is none: whoever waits finds out.
pub(super) fn ring_socket(socket: &OwnedFd) -> Result<()> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match rustix::io::retry_on_intr(|| send(socket, &[1], flags)) {
        // A full socket has been rung.
        Ok(_) | Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => Ok(()),
        Err(e) => Err(IpcError::io("send of a byte that wakes the server", e)),
    }
}

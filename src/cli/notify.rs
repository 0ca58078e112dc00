//! What a service manager that speaks systemd's protocol is told, and what it hands over (sd_notify(3),
//! sd_listen_fds(3)). Two environment variables and one datagram: a crate for it would bring no more than this.

use rustix::net::sockopt::Timeout;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Name of our listening socket in the manager's store, and of the one that a socket unit hands over under it.
pub const LISTENER: &str = "doorbell";

/// How long one message waits while the manager's queue is full.
const PATIENCE: Duration = Duration::from_millis(250);

/// The manager's socket; `None` where nobody wants to know.
pub struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
}

impl Manager {
    /// The manager that has started this process, if it wants to be told.
    ///
    /// # Errors
    ///
    /// An address that is none, or what the kernel refuses.
    pub fn from_environment() -> io::Result<Option<Self>> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Ok(None);
        };
        Self::at(path).map(Some)
    }

    fn at(path: OsString) -> io::Result<Self> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(path)?,
        };
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        // A manager that does not listen keeps nobody waiting.
        rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
        Ok(Self { socket, address })
    }

    /// Tells it `what`, lines of KEY=VALUE, with a descriptor if there is one. That nobody listens is no business of the
    /// clients': it is logged.
    pub fn tell(&self, what: &str, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = self.send(what, fd) {
            tracing::warn!(%error, "the service manager could not be told");
        }
    }

    fn send(&self, what: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(rustix::io::Errno::NOBUFS.into());
        }
        let text = [IoSlice::new(what.as_bytes())];
        rustix::net::sendmsg_addr(&self.socket, &self.address, &text, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// How often the manager wants to hear that all is well (`WatchdogSec`): twice in the time that it waits.
pub fn watchdog_interval() -> Option<Duration> {
    let for_us = std::env::var("WATCHDOG_PID")
        .map_or(Ok(true), |pid| pid.parse::<u32>().map(|pid| pid == std::process::id()));
    let micros = std::env::var("WATCHDOG_USEC").ok()?.parse::<u64>().ok()?;
    (for_us == Ok(true) && micros > 0)
        .then(|| Duration::from_micros(micros / 2).max(Duration::from_millis(1)))
}

//! Attackers of the handshake: processes whose sockets connect, say nothing, and connect again as soon as they are sent
//! away (F27). What honest clients notice of them is what `--half-open` asks.

use super::child::{self, Process, Role};
use super::error::BenchError;
use super::worker;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

/// Sockets of one process: as many as a server lets one process have, so that no quota of a process helps it.
const SOCKETS_PER_PROCESS: usize = 4;
/// Between two attempts while the server's queue is full.
const AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// What one process is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SilentJob {
    path: String,
    sockets: usize,
}

/// Starts so many sockets, in processes of four, and returns once all have connected. They end when they are dropped.
///
/// # Errors
///
/// [`BenchError`] if a process cannot be started, or cannot connect.
pub fn start(sockets: usize, path: &str) -> Result<Vec<Process>, BenchError> {
    let start = |from| {
        let job = SilentJob { path: path.to_owned(), sockets: SOCKETS_PER_PROCESS.min(sockets - from) };
        child::spawn(Role::Silent, &job, Stdio::piped(), Stdio::piped())
    };
    let processes = (0..sockets).step_by(SOCKETS_PER_PROCESS).map(start);
    let mut processes = processes.collect::<Result<Vec<_>, _>>()?;
    processes.iter_mut().try_for_each(Process::receive::<()>)?;
    Ok(processes)
}

/// The process itself, until its standard input ends.
///
/// # Errors
///
/// [`BenchError`] if it can connect no more.
pub fn run(job: &SilentJob) -> Result<(), BenchError> {
    let address = SocketAddrUnix::new(job.path.as_str()).map_err(|e| BenchError::os("socket address", e))?;
    let mut sockets: Vec<Option<OwnedFd>> = (0..job.sockets).map(|_| None).collect();
    let stdin = std::io::stdin();
    let mut said = false;
    loop {
        for socket in sockets.iter_mut().filter(|socket| socket.is_none()) {
            match connect_silently(&address) {
                Ok(connected) => *socket = connected,
                // The server is gone, and the parent about to end this process.
                Err(Errno::NOENT | Errno::CONNREFUSED) if said => return Ok(()),
                Err(e) => return Err(BenchError::os("connect of a silent socket", e)),
            }
        }
        let connected = sockets.iter().all(Option::is_some);
        if connected && !said {
            worker::say(&())?;
            said = true;
        }
        let mut fds = vec![PollFd::new(&stdin, PollFlags::IN)];
        // Whatever the server says, it is the end.
        fds.extend(
            sockets.iter().flatten().map(|socket| PollFd::new(socket, PollFlags::IN | PollFlags::RDHUP)),
        );
        match poll(&mut fds, (!connected).then_some(&AGAIN)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(BenchError::os("poll", e)),
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        let ended: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ended = ended.into_iter();
        for socket in sockets.iter_mut().filter(|socket| socket.is_some()) {
            if ended.next() == Some(true) {
                *socket = None;
            }
        }
    }
}

/// A socket that is connected, or waits in the server's queue; `None` while the queue is full.
fn connect_silently(address: &SocketAddrUnix) -> Result<Option<OwnedFd>, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match connect(socket.as_fd(), address) {
        Ok(()) => Ok(Some(socket)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(e) => Err(e),
    }
}

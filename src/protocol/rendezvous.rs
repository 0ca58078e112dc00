//! The rendezvous socket: where it lies, who may use it, how messages and descriptors cross it.

use crate::error::{IpcError, Result};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a path that fit into a unix socket address, its terminating zero left out.
pub(crate) const SOCKET_PATH_MAX: usize = 107;

/// Bytes of a socket's file name: it is bound as `/proc/self/fd/N/NAME.new`, which has to fit, too.
const NAME_MAX: usize = 80;

/// Where `doorbell serve` listens unless told otherwise: `doorbell.sock` in `$XDG_RUNTIME_DIR`, else in
/// `/run/user/UID` where that exists, else in `/tmp/doorbell-UID`.
pub fn default_socket_path() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|d| d.is_absolute());
    let user = PathBuf::from(format!("/run/user/{uid}"));
    let directory = runtime
        .or_else(|| user.is_dir().then_some(user))
        .unwrap_or_else(|| PathBuf::from(format!("/tmp/doorbell-{uid}")));
    directory.join("doorbell.sock")
}

/// A directory, opened and found safe to keep a socket in, and a name inside it.
pub(crate) struct Place {
    pub directory: OwnedFd,
    pub name: OsString,
    pub path: PathBuf,
}

impl Place {
    /// Opens the directory of `path` and checks it (F54): it is ours and nobody else may write into it,
    /// or it is sticky.
    pub fn open(path: &Path) -> Result<Self> {
        check_length(path)?;
        let refuse = |problem| IpcError::SocketPath { path: path.to_owned(), problem };
        let Some(name) = path.file_name() else { return Err(refuse("it does not end in a file name")) };
        if name.len() > NAME_MAX {
            return Err(refuse("its file name is longer than 80 bytes: choose a shorter one"));
        }
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty()).map_err(|e| match e {
            rustix::io::Errno::NOENT => {
                refuse("its directory does not exist: create it, or choose another path")
            }
            rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP => refuse(
                "its directory is a file or a symbolic link, which is not followed: name the real directory",
            ),
            rustix::io::Errno::ACCESS => refuse("its directory may not be opened by this user"),
            other => IpcError::io("open of the socket's directory", other),
        })?;
        let stat =
            rustix::fs::fstat(&directory).map_err(|e| IpcError::io("fstat of the socket's directory", e))?;
        let ours = stat.st_uid == rustix::process::geteuid().as_raw();
        let sticky = stat.st_mode & 0o1000 != 0;
        if !sticky && !ours {
            return Err(refuse("its directory belongs to another user: choose one of your own"));
        }
        if !sticky && stat.st_mode & 0o022 != 0 {
            return Err(refuse("its directory is writable by others: remove that permission (chmod go-w)"));
        }
        Ok(Self { directory, name: name.to_owned(), path: path.to_owned() })
    }

    /// An address for `name` in this directory that no symbolic link on the way can redirect.
    pub fn address(&self, name: &std::ffi::OsStr) -> Result<SocketAddrUnix> {
        use std::os::fd::AsRawFd;
        let mut path = OsString::from(format!("/proc/self/fd/{}/", self.directory.as_raw_fd()));
        path.push(name);
        SocketAddrUnix::new(path.as_os_str()).map_err(|_| IpcError::SocketPathTooLong {
            path: self.path.clone(),
            len: path.len(),
            max: SOCKET_PATH_MAX,
        })
    }

    /// What lies at `name` now, without following links: (file type, owner).
    pub fn look(&self, name: &std::ffi::OsStr) -> Result<Option<(FileType, u32)>> {
        match rustix::fs::statat(&self.directory, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some((FileType::from_raw_mode(stat.st_mode), stat.st_uid))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(IpcError::io("stat of the socket path", e)),
        }
    }
}

/// Refuses a path that no socket address can hold.
pub(crate) fn check_length(path: &Path) -> Result<()> {
    let len = path.as_os_str().as_bytes().len();
    if len > SOCKET_PATH_MAX {
        return Err(IpcError::SocketPathTooLong { path: path.to_owned(), len, max: SOCKET_PATH_MAX });
    }
    Ok(())
}

/// A new unix socket for packets.
pub(crate) fn packet_socket(flags: SocketFlags) -> Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC, None)
        .map_err(|e| IpcError::io("socket", e))
}

/// What one receive brought.
pub(crate) struct Packet {
    /// Bytes received; 0 at the end of the connection.
    pub len: usize,
    /// The packet was longer than the buffer, or its descriptors did not fit.
    pub truncated: bool,
    /// Descriptors that came along. Dropped means closed.
    pub fds: Vec<OwnedFd>,
}

/// Receives one packet and the descriptors with it.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> std::result::Result<Packet, rustix::io::Errno> {
    // Room for more than anybody may send, so that what came too much is received and closed (F31).
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    use rustix::net::ReturnFlags;
    let truncated = message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok(Packet { len: message.bytes, truncated, fds })
}

/// The same without waiting, for who must not miss the last word of a peer that closes right behind it.
///
/// The kernel looks into the queue first, and then whether the peer has closed. A packet that comes between the two looks
/// lies there, and the answer is that this is the end all the same. Nothing comes behind an end: one more look is enough.
pub(crate) fn receive_last_word(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> std::result::Result<Packet, rustix::io::Errno> {
    let packet = receive(socket, buffer, RecvFlags::DONTWAIT)?;
    if packet.len > 0 { Ok(packet) } else { receive(socket, buffer, RecvFlags::DONTWAIT) }
}

/// Sends one packet, with a descriptor if given. Never raises SIGPIPE (F41).
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> std::result::Result<(), rustix::io::Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::NOBUFS);
    }
    rustix::io::retry_on_intr(|| {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags)
    })?;
    Ok(())
}

/// The uid of the process at the other end.
pub(crate) fn peer_uid(socket: impl AsFd) -> Result<u32> {
    let credentials = doorbell_uring::peer_credentials(socket.as_fd())
        .map_err(|e| IpcError::io("getsockopt(SO_PEERCRED)", e))?;
    Ok(credentials.uid)
}

/// Whether the peer of a socket is of our own user; not if the kernel does not say.
pub(crate) fn is_ours(socket: impl AsFd) -> bool {
    peer_uid(socket).is_ok_and(|uid| uid == rustix::process::geteuid().as_raw())
}

/// CLOCK_MONOTONIC, ns.
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    #[cfg(test)]
    if let Some(now) = crate::simulation::kernel::now_ns() {
        return now;
    }
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// 128 random bits.
pub(crate) fn random_id() -> Result<[u64; 2]> {
    let mut bytes = [0u8; 16];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| IpcError::io("getrandom", e))?;
    debug_assert_eq!(got, bytes.len(), "the kernel never cuts requests up to 256 bytes short");
    let (low, high) = bytes.split_at(8);
    let word = |half: &[u8]| half.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    Ok([word(low), word(high)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    /// Goal:   F27, F33: whoever is refused is told why, however soon the server closes his socket.
    /// Method: one thread sends a word and closes, another one asks for it all the time: the end comes behind the word, each
    ///         time. With [`receive`] alone it came before it within some ten thousand rounds.
    #[test]
    fn f27_f33_the_last_word_of_a_peer_that_closes_is_heard() {
        const ROUNDS: usize = 100_000;
        let (give, given) = channel::<OwnedFd>();
        let other = std::thread::spawn(move || {
            for socket in given {
                send(socket.as_fd(), &[7], None).unwrap();
            }
        });
        for _ in 0..ROUNDS {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
            .unwrap();
            give.send(theirs).unwrap();
            let mut word = [0];
            let packet = loop {
                match receive_last_word(ours.as_fd(), &mut word) {
                    Err(rustix::io::Errno::AGAIN) => std::hint::spin_loop(),
                    other => break other.unwrap(),
                }
            };
            assert_eq!((packet.len, word), (1, [7]));
        }
        drop(give);
        other.join().unwrap();
    }
}

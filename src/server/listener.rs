//! The listening socket: whose path it is, and for how long (R3.6, F52 to F55, trap 12).

use crate::error::{IpcError, Result};
use crate::protocol::rendezvous::{Place, SOCKET_PATH_MAX, check_length, packet_socket};
use doorbell_shm::kill_point;
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::net::SocketFlags;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Connections that the kernel queues while the reactor is busy; capped by net.core.somaxconn (F26).
const BACKLOG: i32 = 4096;

/// A bound, listening socket. Its path is ours while the lock is held; dropping removes the socket.
pub(crate) struct Listener {
    socket: OwnedFd,
    place: Place,
    /// Inode of our socket file, to remove no other; `None` if the socket is somebody else's, too, and outlives us.
    inode: Option<u64>,
    /// Held until the process ends, however it ends. The file stays: unlinking it would let two servers
    /// lock two different files of the same name.
    lock: OwnedFd,
    /// Given up to accept a client when descriptors have run out, so that he can be told (F32).
    spare: Option<OwnedFd>,
}

impl Listener {
    /// Binds `path`: takes the lock first, refuses what is not ours or alive, replaces what is stale.
    pub fn bind(path: &Path) -> Result<Self> {
        // The lock and the temporary name are longer than the path; clients need the path itself.
        check_length(path)?;
        prepare_default_directory(path)?;
        let place = Place::open(path)?;
        let lock = take_lock(&place)?;
        kill_point!("server.lock.taken");
        refuse_what_is_not_stale(&place)?;
        let (socket, inode) = listen_beside_and_rename(&place)?;
        let spare = Some(spare().map_err(|e| IpcError::io("eventfd for the spare descriptor", e))?);
        Ok(Self { socket, place, inode: Some(inode), lock, spare })
    }

    /// One that nobody knocks at, for a server in a simulation.
    #[cfg(test)]
    pub fn nowhere() -> Result<Self> {
        let fd = || spare().map_err(|e| IpcError::io("eventfd in the place of a socket", e));
        let place = Place { directory: fd()?, name: "nowhere".into(), path: "nowhere".into() };
        Ok(Self { socket: fd()?, place, inode: None, lock: fd()?, spare: None })
    }

    /// Takes over a socket that listens at `path` already, and that whoever has handed it over keeps (F49).
    ///
    /// # Errors
    ///
    /// [`IpcError::SocketPath`] if it does not listen for packets there, else as for [`Listener::bind`].
    pub fn inherit(socket: OwnedFd, path: &Path) -> Result<Self> {
        use rustix::net::{SocketAddrUnix, SocketType, getsockname, sockopt};
        let refuse = |problem| IpcError::SocketPath { path: path.to_owned(), problem };
        let io = |e| IpcError::io("asking what the socket is that was handed over", e);
        if sockopt::socket_type(&socket).map_err(io)? != SocketType::SEQPACKET {
            return Err(refuse(
                "the socket handed over is not one for packets: ListenSequentialPacket= is wanted",
            ));
        }
        if !sockopt::socket_acceptconn(&socket).map_err(io)? {
            return Err(refuse("the socket handed over does not listen"));
        }
        let address = SocketAddrUnix::try_from(getsockname(&socket).map_err(io)?);
        let bound = address.ok().and_then(|address| address.path_bytes().map(<[u8]>::to_owned));
        if !bound.is_some_and(|bound| is_bound_at(&bound, path)) {
            return Err(refuse(
                "the socket handed over is bound elsewhere: configure the same path on both sides",
            ));
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(io)?;
        let place = Place::open(path)?;
        let lock = take_lock(&place)?;
        let spare = Some(spare().map_err(|e| IpcError::io("eventfd for the spare descriptor", e))?);
        Ok(Self { socket, place, inode: None, lock, spare })
    }

    /// Leaves the socket to others when this server ends.
    pub fn leave(&mut self) {
        self.inode = None;
    }

    /// Whether others have the socket, too: who connects while this server ends is answered by them.
    pub fn is_shared(&self) -> bool {
        self.inode.is_none()
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub fn path(&self) -> &PathBuf {
        &self.place.path
    }

    /// Takes the next waiting client after `accept` has failed for want of a descriptor, in the place of the spare
    /// one; `None` when there is none. To be closed before the next call, which takes a spare one again.
    ///
    /// # Errors
    ///
    /// The kernel's answer: there was no spare descriptor any more, or it was of no use.
    pub fn accept_with_spare(&mut self) -> std::result::Result<Option<OwnedFd>, rustix::io::Errno> {
        self.keep_spare();
        self.spare = None;
        self.accept()
    }

    /// Takes a spare descriptor if there is none and one can be had.
    pub fn keep_spare(&mut self) {
        if self.spare.is_none() {
            self.spare = spare().ok();
        }
    }

    /// Takes the next waiting client; `None` when there is none.
    pub fn accept(&self) -> std::result::Result<Option<OwnedFd>, rustix::io::Errno> {
        use rustix::io::Errno;
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(socket)),
            // A client that gave up while it was queued is no reason to stop (F1).
            Err(Errno::AGAIN) => Ok(None),
            Err(Errno::INTR | Errno::CONNABORTED) => self.accept(),
            Err(other) => Err(other),
        }
    }
}

/// A descriptor that is good for nothing but its number. It has a file of its own, so that closing it helps against
/// a limit on files, too.
fn spare() -> std::result::Result<OwnedFd, rustix::io::Errno> {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC)
}

impl Drop for Listener {
    fn drop(&mut self) {
        let stat = rustix::fs::statat(&self.place.directory, &self.place.name, AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|s| Some(s.st_ino) == self.inode)
            && let Err(error) =
                rustix::fs::unlinkat(&self.place.directory, &self.place.name, AtFlags::empty())
        {
            tracing::warn!(path = %self.place.path.display(), %error, "could not remove the socket");
        }
        // Said aloud: a child that another thread is just forking holds a copy of the descriptor until it
        // executes something else.
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(%error, "could not unlock the socket's lock file");
        }
    }
}

/// Whether a socket that was bound by this name is the one at `path`: by a manager under its own name, by a server of ours
/// beside it (`listen_beside_and_rename`).
fn is_bound_at(bound: &[u8], path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let beside = path.file_name().map(|name| with_suffix(name, ".new"));
    let is_ours = |rest: &[u8]| {
        let mut parts = rest.splitn(2, |byte| *byte == b'/');
        let number = parts.next().is_some_and(|part| part.iter().all(u8::is_ascii_digit));
        number && parts.next() == beside.as_deref().map(OsStrExt::as_bytes)
    };
    bound == path.as_os_str().as_bytes() || bound.strip_prefix(b"/proc/self/fd/").is_some_and(is_ours)
}

/// Whether a server of this user could take `path` now, found out without making, locking or removing anything.
///
/// A server that listens there is connected to for a moment and takes that for a client that went away.
///
/// # Errors
///
/// Those of [`IpcServer::bind`](crate::IpcServer::bind) for a path that cannot be had, above all
/// [`IpcError::AlreadyRunning`].
pub fn check_socket_path(path: &Path) -> Result<()> {
    check_length(path)?;
    if fallback_directory(path).is_some_and(|directory| !directory.exists()) {
        return match writable(rustix::fs::CWD, Path::new("/tmp")) {
            true => Ok(()),
            false => Err(IpcError::SocketPath {
                path: path.to_owned(),
                problem: "its directory does not exist and /tmp may not be written by this user",
            }),
        };
    }
    let place = Place::open(path)?;
    if let Some((kind, owner)) = place.look(&lock_name(&place))? {
        check_lock(&place, kind, owner)?;
    }
    if !writable(&place.directory, Path::new(".")) {
        return Err(refuse(&place, "its directory may not be written by this user"));
    }
    refuse_what_is_not_stale(&place)
}

fn writable(directory: impl AsFd, path: &Path) -> bool {
    use rustix::fs::Access;
    rustix::fs::accessat(directory, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

/// The directory of `path` if that is the default one of a user without a runtime directory.
fn fallback_directory(path: &Path) -> Option<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let fallback = PathBuf::from(format!("/tmp/doorbell-{uid}"));
    (path.parent() == Some(fallback.as_path())).then_some(fallback)
}

/// Makes the directory of the default path, mode 0700, when there is no runtime directory to use; any other path is left as
/// it is. [`IpcServer::bind`](crate::IpcServer::bind) does that, too.
///
/// # Errors
///
/// [`IpcError::Io`] if it cannot be made.
pub fn prepare_default_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let Some(fallback) = fallback_directory(path) else { return Ok(()) };
    match std::fs::DirBuilder::new().mode(0o700).create(&fallback) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(IpcError::io("mkdir of the default socket directory", e))
        }
        _ => Ok(()),
    }
}

fn with_suffix(name: &std::ffi::OsStr, suffix: &str) -> OsString {
    let mut name = name.to_owned();
    name.push(suffix);
    name
}

fn lock_name(place: &Place) -> OsString {
    with_suffix(&place.name, ".lock")
}

fn refuse(place: &Place, problem: &'static str) -> IpcError {
    IpcError::SocketPath { path: place.path.clone(), problem }
}

/// Opens `<path>.start`, which is locked by whoever is about to start a server at `path`. It stays, as the other lock file.
///
/// # Errors
///
/// [`IpcError::SocketPath`] for a place where no server can be.
pub(crate) fn open_start_lock(path: &Path) -> Result<OwnedFd> {
    check_length(path)?;
    prepare_default_directory(path)?;
    let place = Place::open(path)?;
    open_lock(&place, &with_suffix(&place.name, ".start"))
}

/// Locks `<path>.lock`; the kernel releases it when we die (F52, F53).
fn take_lock(place: &Place) -> Result<OwnedFd> {
    let lock = open_lock(place, &lock_name(place))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::AGAIN) => Err(IpcError::AlreadyRunning { path: place.path.clone() }),
        Err(e) => Err(IpcError::io("flock of the socket's lock file", e)),
    }
}

fn open_lock(place: &Place, name: &std::ffi::OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let lock =
        rustix::fs::openat(&place.directory, name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| match e {
            rustix::io::Errno::LOOP => refuse(place, LOCK_IS_A_LINK),
            rustix::io::Errno::ACCESS => {
                refuse(place, "its directory or lock file may not be written by this user")
            }
            other => IpcError::io("open of the socket's lock file", other),
        })?;
    let stat = rustix::fs::fstat(&lock).map_err(|e| IpcError::io("fstat of the socket's lock file", e))?;
    check_lock(place, FileType::from_raw_mode(stat.st_mode), stat.st_uid)?;
    Ok(lock)
}

const LOCK_IS_A_LINK: &str = "its lock file is a symbolic link, which is not followed: remove it";

/// Refuses a lock file that no server of this user has made.
fn check_lock(place: &Place, kind: FileType, owner: u32) -> Result<()> {
    match kind {
        FileType::Symlink => Err(refuse(place, LOCK_IS_A_LINK)),
        _ if owner != rustix::process::geteuid().as_raw() => {
            Err(refuse(place, "its lock file belongs to another user: choose another path"))
        }
        FileType::RegularFile => Ok(()),
        _ => Err(refuse(place, "its lock file is not a regular file: remove it")),
    }
}

/// With the lock held: a dead server's socket may be replaced, anything else may not.
fn refuse_what_is_not_stale(place: &Place) -> Result<()> {
    let Some((kind, owner)) = place.look(&place.name)? else { return Ok(()) };
    if kind != FileType::Socket {
        return Err(refuse(
            place,
            "something that is not a socket lies there: remove it or choose another path",
        ));
    }
    if owner != rustix::process::geteuid().as_raw() {
        return Err(refuse(place, "a socket of another user lies there: choose another path"));
    }
    // A server that does not know our lock may listen there all the same.
    let probe = packet_socket(SocketFlags::NONBLOCK)?;
    use rustix::io::Errno;
    match rustix::net::connect(&probe, &place.address(&place.name)?) {
        // Nobody listens: stale.
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // The kernel still takes a dead server's ring apart: its listener answers for some milliseconds.
        Ok(()) if listener_is_dead(&probe) => Ok(()),
        // Somebody listens: for packets, with a full backlog, or for another type of socket.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            Err(IpcError::AlreadyRunning { path: place.path.clone() })
        }
        Err(e) => Err(IpcError::io("connect to the socket that lies at the path", e)),
    }
}

/// Whether the process that listens at the other end of a connected probe has ended.
fn listener_is_dead(probe: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let process = match doorbell_uring::peer_process(probe.as_fd()) {
        Ok(process) => process,
        // Reaped already. Any other refusal proves nothing, and a live server's path is not taken.
        Err(error) => return matches!(error, rustix::io::Errno::SRCH | rustix::io::Errno::NODATA),
    };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&now)), Ok(1))
}

/// Listens under a temporary name and renames: the path is either absent, stale or a listening socket.
fn listen_beside_and_rename(place: &Place) -> Result<(OwnedFd, u64)> {
    let temporary = with_suffix(&place.name, ".new");
    let address = place.address(&temporary)?;
    let socket = packet_socket(SocketFlags::NONBLOCK)?;
    // Mode 0600 from birth: the inode takes the socket's own mode (F55).
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
        .map_err(|e| IpcError::io("fchmod of the socket", e))?;
    // Only a server that holds the lock makes this name, so what lies there is a dead one's.
    match rustix::fs::unlinkat(&place.directory, &temporary, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(e) => return Err(IpcError::io("unlink of a stale temporary socket", e)),
    }
    rustix::net::bind(&socket, &address).map_err(|e| match e {
        rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
            refuse(place, "its directory may not be written")
        }
        rustix::io::Errno::NAMETOOLONG => {
            let path = place.path.clone();
            IpcError::SocketPathTooLong { path, len: place.name.len(), max: SOCKET_PATH_MAX }
        }
        other => IpcError::io("bind", other),
    })?;
    let stat = rustix::fs::statat(&place.directory, &temporary, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| IpcError::io("stat of the new socket", e))?;
    kill_point!("server.socket.bound");
    rustix::net::listen(&socket, BACKLOG).map_err(|e| IpcError::io("listen", e))?;
    kill_point!("server.socket.listening");
    rustix::fs::renameat(&place.directory, &temporary, &place.directory, &place.name)
        .map_err(|e| IpcError::io("rename of the new socket", e))?;
    kill_point!("server.socket.renamed");
    Ok((socket, stat.st_ino))
}

//! A client process of level 5 that breaks the protocol on purpose, and does what it is told to once more each time.
//!
//! It goes past the library: it shakes hands by the book and then writes whatever it likes into its segment. It reports
//! what the server made of it: whatever is not what the protocol says is an error of the run.

use crate::content::Nonces;
use crate::error::StressError;
use crate::processes::{self, Process, Role};
use crate::server::MASKED_ECHO;
use doorbell::protocol::handshake::{DisconnectReason, Goodbye, Hello, Welcome, code};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, WaitPolicy};
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::lane::{ClientLane, INTERACTIVE};
use doorbell_shm::layout::{Geometry, LaneLayout};
use doorbell_shm::segment::Segment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// Eight entries a ring, four small slots, numbers 20 to 23.
const GEOMETRY: Geometry = Geometry { ring_order: 3, large: 1, medium: 1, small: 4, lease_pages: 0 };
const SMALL: u32 = 20;
/// The first number behind the slots.
const BEYOND: u32 = 24;
/// How long the server may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest message of a server that is not configured otherwise, bytes.
const MESSAGE_MAX: u64 = 10 << 20;
/// Bytes of a tiny message.
const TINY: usize = 8;

/// What the process is told to do, so many times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attack {
    /// Entries with something wrong in them, each in a session of its own.
    Corrupted(u64),
    /// Sockets that say nothing until the server has had enough of them.
    Silent(usize),
    /// Messages that are longer than allowed.
    Oversized(u64),
    /// Tiny messages, as fast as possible.
    Flood(u64),
}

/// What the process is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostileJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// Why an attack did not go as it had to.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}: {1}")]
    Os(&'static str, #[source] std::io::Error),
    #[error(transparent)]
    Ipc(#[from] IpcError),
    #[error(transparent)]
    Segment(#[from] doorbell_shm::SegmentError),
    #[error("the server broke the protocol: {0}")]
    Peer(#[from] doorbell_shm::PeerFault),
    #[error("{0}")]
    Unexpected(String),
}

fn os(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> Failed {
    move |errno| Failed::Os(call, errno.into())
}

/// Starts the process. To an [`Attack`] it says `Result<u64, String>`: how many times it was made, each to the end that
/// it had to come to; or what was otherwise.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &HostileJob) -> Result<Process, StressError> {
    processes::spawn(Role::Hostile, job, Stdio::piped())
}

/// The process itself.
///
/// # Errors
///
/// What keeps it from hearing and speaking; what goes wrong in an attack is reported.
pub fn run(job: &HostileJob) -> Result<(), StressError> {
    crate::machine::pin(job.core)?;
    let mut chance = Nonces::new(job.seed, job.number);
    while let Some(attack) = processes::hear::<Attack>()? {
        let made = match attack {
            Attack::Corrupted(count) => {
                (0..count).try_for_each(|_| corrupt(&job.path, &mut chance)).map(|()| count)
            }
            Attack::Silent(count) => keep_silent(&job.path, count),
            Attack::Oversized(count) => oversized(&job.path, count),
            Attack::Flood(count) => flood(&job.path, count, &mut chance),
        };
        processes::say(&made.map_err(|why| format!("{attack:?}: {why}")))?;
    }
    Ok(())
}

/// A socket connected to the server, nothing said yet.
fn connect(path: &Path) -> Result<OwnedFd, Failed> {
    let kind = SocketType::SEQPACKET;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(os("socket"))?;
    let address = SocketAddrUnix::new(path).map_err(os("the path"))?;
    rustix::net::connect(&socket, &address).map_err(os("connect"))?;
    Ok(socket)
}

/// The next packet and the descriptor that came with it; an empty one is the end.
fn hear(socket: &OwnedFd) -> Result<(Vec<u8>, Option<OwnedFd>), Failed> {
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&patience)).map_err(os("poll"))? == 0 {
        return Err(Failed::Unexpected(format!("the server said nothing for {PATIENCE:?}")));
    }
    let mut bytes = [0u8; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let len = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
        Ok(message) => message.bytes,
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(errno) => return Err(os("recvmsg")(errno)),
    };
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            descriptor = fds.next();
        }
    }
    Ok((bytes[..len].to_vec(), descriptor))
}

/// Hears why the server takes leave; one-byte bells may come before.
fn goodbye(socket: &OwnedFd) -> Result<DisconnectReason, Failed> {
    loop {
        let (packet, _) = hear(socket)?;
        match Goodbye::read(&packet) {
            Some(reason) => return Ok(reason),
            None if packet.len() == 1 => {}
            None => {
                let what = format!("{} bytes where a goodbye was due", packet.len());
                return Err(Failed::Unexpected(what));
            }
        }
    }
}

/// A session without a library around it.
struct Raw {
    socket: OwnedFd,
    _segment: Segment,
    lane: ClientLane,
    connection: u32,
    generation: u32,
}

impl Raw {
    fn connect(path: &Path) -> Result<Self, Failed> {
        let socket = connect(path)?;
        let hello = Hello::new(GEOMETRY, [1, 2], 0, "hostile");
        rustix::net::send(&socket, hello.as_bytes(), SendFlags::NOSIGNAL).map_err(os("send"))?;
        let (packet, memory) = hear(&socket)?;
        let welcome = Welcome::read_from_bytes(&packet)
            .map_err(|_| Failed::Unexpected(format!("{} bytes where a welcome was due", packet.len())))?;
        let memory = memory.filter(|_| welcome.code == code::OK);
        let Some(memory) = memory else {
            return Err(Failed::Unexpected(format!("refused with code {}", welcome.code)));
        };
        let segment = Segment::attach(memory.as_fd(), GEOMETRY, welcome.lanes, welcome.identity())?;
        let lane = ClientLane::open(segment.mapping(), &GEOMETRY, &LaneLayout::home(&GEOMETRY))?;
        let mut raw = Self { socket, _segment: segment, lane, connection: 0, generation: 0 };
        let open = Submission { kind: kind::OPEN, slot: SMALL, generation: 1, ..Submission::default() };
        let opened = raw.call(&open)?;
        raw.generation = 1;
        raw.connection = opened.detail as u32;
        Ok(raw)
    }

    /// A correct call of the echo under a mask, with 512 bytes of zeros.
    fn entry(&self) -> Submission {
        Submission {
            kind: kind::CALL,
            flags: flag::END,
            message_type: MASKED_ECHO.0,
            connection: self.connection,
            slot: SMALL,
            generation: self.generation.wrapping_add(1),
            len: 512,
            response_count: 1,
            response_slot: SMALL,
            ..Submission::default()
        }
    }

    fn push(&mut self, words: [u64; 8]) -> Result<(), Failed> {
        if !self.lane.submissions[INTERACTIVE].push(words)? {
            return Err(Failed::Unexpected("the ring is full".to_owned()));
        }
        let bell = &self.lane.common.server_bell.0;
        bell.store(0, SeqCst);
        Ok(())
    }

    /// Sends an entry and waits for its completion. The server polls: its bell need not be rung.
    fn call(&mut self, entry: &Submission) -> Result<Completion, Failed> {
        self.push(entry.pack())?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(words) = self.lane.completions[INTERACTIVE].pop()? {
                self.lane.completions[INTERACTIVE].publish();
                self.generation = entry.generation;
                return Ok(Completion::unpack(words)?);
            }
            std::thread::yield_now();
        }
        Err(Failed::Unexpected("no completion came".to_owned()))
    }
}

/// Sends an entry that would be right but for one thing, and hears that the session is over because of it.
fn corrupt(path: &Path, chance: &mut Nonces) -> Result<(), Failed> {
    let mut raw = Raw::connect(path)?;
    let nonce = chance.draw();
    let (words, what) = spoil(raw.entry(), nonce);
    raw.push(words)?;
    match goodbye(&raw.socket)? {
        DisconnectReason::ProtocolViolation => Ok(()),
        reason => Err(Failed::Unexpected(format!("{what} ended the session with: {reason}"))),
    }
}

/// Kinds of things that [`spoil`] can spoil.
const SPOILS: u64 = 14;

/// Spoils one thing of a correct call, and says which.
fn spoil(entry: Submission, nonce: u64) -> ([u64; 8], &'static str) {
    let by = (nonce >> 8) as u32;
    // Never 0.
    let some = by | 1;
    let beyond = BEYOND + by % (u32::MAX - BEYOND);
    let (bad, what) = match nonce % SPOILS {
        0 => {
            let bad = Submission { slot: beyond, response_slot: beyond, generation: 1, ..entry };
            (bad, "a slot that does not exist")
        }
        1 => (Submission { response_slot: beyond, ..entry }, "an answer slot that does not exist"),
        2 => (Submission { len: 1025 + by % (u32::MAX - 1025), ..entry }, "more bytes than the slot has"),
        3 => (Submission { generation: entry.generation.wrapping_add(some), ..entry }, "a wrong generation"),
        4 => (Submission { flags: flag::MORE | flag::END, ..entry }, "MORE and END"),
        5 => (Submission { flags: 0, ..entry }, "neither MORE nor END"),
        6 => (Submission { flags: flag::END | 1 << (7 + by % 9), ..entry }, "a reserved flag"),
        7 => (Submission { meta_len: 4, ..entry }, "metadata without META"),
        8 => (Submission { response_count: 0, ..entry }, "an answer window of no slot"),
        9 => (Submission { frame: some, ..entry }, "a frame that is not the first"),
        10 => (Submission { body_len: 513, ..entry }, "a body length that is not the body's"),
        11 => (Submission { codec: 255, ..entry }, "an unknown codec"),
        12 => (Submission { kind: 128 | by as u8, ..entry }, "an unknown kind"),
        _ => {
            (Submission { connection: entry.connection ^ some, ..entry }, "a connection that is not its own")
        }
    };
    (bad.pack(), what)
}

/// Opens sockets that say nothing, and waits until the server has hung up on each of them.
fn keep_silent(path: &Path, count: usize) -> Result<u64, Failed> {
    let sockets = (0..count).map(|_| connect(path)).collect::<Result<Vec<_>, _>>()?;
    for socket in &sockets {
        match goodbye(socket)? {
            DisconnectReason::HandshakeTimeout => {}
            reason => return Err(Failed::Unexpected(format!("a silent socket ended with: {reason}"))),
        }
    }
    Ok(count as u64)
}

/// Announces messages that are longer than allowed; each is refused, and the session goes on.
fn oversized(path: &Path, count: u64) -> Result<u64, Failed> {
    let mut raw = Raw::connect(path)?;
    for n in 0..count {
        let announced = Submission { flags: flag::MORE, body_len: MESSAGE_MAX + 1 + n, ..raw.entry() };
        let refused = raw.call(&announced)?;
        if (refused.status, refused.detail) != (Status::TooLarge as u8, MESSAGE_MAX) {
            return Err(Failed::Unexpected(format!("answered with status {}", refused.status)));
        }
        let entry = raw.entry();
        let right = raw.call(&entry)?;
        if (right.status, right.len) != (Status::Ok as u8, entry.len) {
            return Err(Failed::Unexpected(format!("the call behind it: status {}", right.status)));
        }
    }
    Ok(count)
}

/// Sends tiny messages as fast as there is room, and checks every answer.
fn flood(path: &Path, count: u64, chance: &mut Nonces) -> Result<u64, Failed> {
    let base = ClientConfig::for_load(64, TINY);
    let config = ClientConfig { policy: WaitPolicy::Block, lanes: 1, name: "flood".to_owned(), ..base };
    let client = IpcClient::connect_with(path, &config)?;
    let connection = client.open()?;
    let (mut sent, mut taken) = (0, 0);
    let base = chance.draw();
    let mut answer = [0; TINY];
    while taken < count {
        if sent < count {
            let options = CallOptions { tag: sent, ..CallOptions::default() };
            match connection.submit(MessageType::ECHO, &base.wrapping_add(sent).to_le_bytes(), &options) {
                Ok(_) => {
                    sent += 1;
                    continue;
                }
                Err(IpcError::WouldBlock) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !client.wait(Some(PATIENCE))? {
            return Err(Failed::Unexpected(format!("{taken} of {sent} answered")));
        }
        while let Some(got) = client.poll_into(&mut answer)? {
            if got.status != Some(Status::Ok) || answer != base.wrapping_add(got.tag).to_le_bytes() {
                return Err(Failed::Unexpected(format!("a wrong answer, status {:?}", got.status)));
            }
            taken += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   what is called corrupted differs from the correct entry, in every kind, and every kind is met.
    #[test]
    fn every_spoilt_entry_differs_from_the_right_one() {
        let right = Submission { kind: kind::CALL, flags: flag::END, len: 512, ..Submission::default() };
        let entry = Submission { slot: SMALL, response_count: 1, response_slot: SMALL, ..right };
        let mut chance = Nonces::new(1, 1);
        let mut met = std::collections::HashSet::new();
        for _ in 0..1000 {
            let (words, what) = spoil(entry, chance.draw());
            assert_ne!(words, entry.pack(), "{what}");
            met.insert(what);
        }
        assert_eq!(met.len() as u64, SPOILS);
    }
}

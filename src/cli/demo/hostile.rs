//! The hostile client of the demonstration: it shakes hands by the book, and then writes random words all over its shared
//! memory, punches holes into it and rings, until its session is ended; and again.

use super::super::bench::clock::{SECOND, now_ns};
use super::super::bench::error::BenchError;
use super::super::bench::worker::say;
use doorbell::protocol::handshake::{Hello, Welcome, code};
use doorbell_shm::layout::Geometry;
use doorbell_shm::map::{PAGE, Shared};
use doorbell_shm::segment::Segment;
use doorbell_uring::futex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use zerocopy::{FromBytes, IntoBytes};

/// Words that are written between two looks at whether the session has ended.
const WORDS: u64 = 512;
/// Where the server's bell lies (`shm/LAYOUT.md`).
const SERVER_BELL: usize = 384;

/// What the process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostileJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// How long to go on.
    pub seconds: f64,
    /// Where chance begins.
    pub seed: u64,
}

/// What it has done.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Attacks {
    /// Random words, at random places.
    pub words: u64,
    /// Pages that were punched out of the segment.
    pub holes: u64,
    /// Wakes for nothing.
    pub rings: u64,
    /// Sessions that the server ended.
    pub ended: u64,
}

/// The hostile process.
///
/// # Errors
///
/// [`BenchError`] if it cannot attack: the server is not there.
pub fn run(job: &HostileJob) -> Result<(), BenchError> {
    let ends = now_ns() + (job.seconds * SECOND as f64) as u64;
    let (mut attacks, mut random) = (Attacks::default(), job.seed | 1);
    while now_ns() < ends {
        let Some((socket, memory, segment)) = connect(&job.path)? else { continue };
        let words: Shared<[AtomicU64]> = segment.mapping().slice(0, segment.len() / 8)?;
        let bell: Shared<AtomicU32> = segment.mapping().object(SERVER_BELL)?;
        while now_ns() < ends && !is_over(&socket)? {
            for _ in 0..WORDS {
                random = next(random);
                words[(random >> 32) as usize % words.len()].store(next(random) | random << 40, Relaxed);
            }
            attacks.words += WORDS;
            if random.is_multiple_of(4) {
                let page = random >> 20 & 0xF;
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&memory, punch, page * PAGE as u64, PAGE as u64)
                    .map_err(|e| BenchError::os("punching a hole", e))?;
                attacks.holes += 1;
            }
            futex::wake(&bell, u32::MAX).map_err(|e| BenchError::os("futex wake", e))?;
            attacks.rings += 1;
        }
        attacks.ended += u64::from(is_over(&socket)?);
    }
    say(&attacks)
}

/// Xorshift: every word but 0, in no order.
fn next(mut word: u64) -> u64 {
    word ^= word << 13;
    word ^= word >> 7;
    word ^ word << 17
}

/// Whether the server has said something, which is good-bye, or closed the socket.
fn is_over(socket: &OwnedFd) -> Result<bool, BenchError> {
    let mut look = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ready = poll(&mut look, Some(&now)).map_err(|e| BenchError::os("poll", e))?;
    if ready == 0 {
        return Ok(false);
    }
    let mut bytes = [0; 64];
    match rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
        // A bell is one byte; anything else is the end.
        Ok((1, _)) => Ok(false),
        Ok(_) | Err(rustix::io::Errno::CONNRESET) => Ok(true),
        Err(rustix::io::Errno::AGAIN) => Ok(false),
        Err(e) => Err(BenchError::os("recv", e)),
    }
}

/// A session's socket and memory; `None` if the server had no time for us and has closed the socket.
fn connect(path: &Path) -> Result<Option<(OwnedFd, OwnedFd, Segment)>, BenchError> {
    let refused = |what: &'static str| BenchError::peer("shaking hands", what);
    let address = SocketAddrUnix::new(path).map_err(|e| BenchError::os("socket address", e))?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|e| BenchError::os("socket", e))?;
    rustix::net::connect(&socket, &address).map_err(|e| BenchError::os("connect", e))?;
    let hello = Hello::new(Geometry::default(), [1, 2], now_ns(), "hostile");
    rustix::net::send(&socket, hello.as_bytes(), SendFlags::NOSIGNAL)
        .map_err(|e| BenchError::os("send", e))?;
    let (mut bytes, mut space) =
        ([0; size_of::<Welcome>()], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    match received {
        Ok(received) if received.bytes > 0 => {}
        Ok(_) | Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(e) => return Err(BenchError::os("recvmsg", e)),
    }
    let welcome = Welcome::read_from_bytes(&bytes).map_err(|_| refused("that is no welcome"))?;
    if welcome.code != code::OK {
        return Err(refused("the server refuses another session"));
    }
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let memory = descriptor.ok_or_else(|| refused("the segment did not come"))?;
    let geometry = Geometry::unpack(welcome.geometry);
    let segment = Segment::attach(memory.as_fd(), geometry, welcome.lanes, welcome.identity())?;
    Ok(Some((socket, memory, segment)))
}

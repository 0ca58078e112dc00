//! What hostile clients do, each a function that does it once from the beginning and says whether it ended as it must.

use crate::clock::now_ns;
use crate::error::StressError;
use crate::raw::{BEYOND, Raw, SMALL, connect_silently, hello, send, send_with_fds};
use crate::{machine, processes};
use doorbell::protocol::handshake::{DisconnectReason, Hello};
use doorbell_shm::entry::{Status, Submission, flag};
use doorbell_shm::lane::{BULK, INTERACTIVE};
use doorbell_shm::layout::LaneLayout;
use rustix::fs::{FallocateFlags, SealFlags};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Between two attacks: the attacker shall harm by what it does, not by burning the core that it shares.
const PAUSE: Duration = Duration::from_millis(1);
/// ECHO of the built-in handlers.
const ECHO: u32 = 2;

/// One attack.
pub struct Attack {
    /// With the row of the fault list that it is about.
    pub name: &'static str,
    /// Does it once. `false`: it did not end as it must.
    run: fn(&Path) -> bool,
}

/// What the process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttackJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// [`Attack::name`].
    pub name: String,
    /// When to stop, CLOCK_MONOTONIC, ns.
    pub until_ns: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Attacked {
    /// How often it was done.
    pub done: u64,
    /// How often it did not end as it must.
    pub unexpected: u64,
    /// The first such.
    pub note: Option<String>,
}

/// The process itself: attacks until its time is over.
///
/// # Errors
///
/// [`StressError`] if there is no such attack or the parent is gone.
pub fn run(job: &AttackJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let mut attacked = Attacked::default();
    let Some(attack) = ATTACKS.iter().find(|attack| attack.name == job.name) else {
        return Err(StressError::NotAChild);
    };
    // Once in any case: on a busy machine the window may be over before this process has started.
    loop {
        // The raw client asserts what it needs.
        let ended = std::panic::catch_unwind(|| (attack.run)(&job.path));
        attacked.done += 1;
        if !matches!(ended, Ok(true)) {
            attacked.unexpected += 1;
            let note = format!("attack {} ended otherwise than it must", attacked.done);
            attacked.note.get_or_insert(note);
        }
        if now_ns() >= job.until_ns {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    processes::say(&attacked)
}

/// All attacks; the first is none, and what the others are compared with.
pub const ATTACKS: &[Attack] = &[
    Attack { name: "an honest neighbour", run: honest },
    Attack { name: "F1 connects and goes", run: goes },
    Attack { name: "F5 dies with calls in flight", run: dies },
    Attack { name: "F11 a lap that cannot be", run: wrong_lap },
    Attack { name: "F11 a consumed position that cannot be", run: wrong_position },
    Attack { name: "F11 a hint beyond the slots", run: wrong_hint },
    Attack { name: "F12 a slot that does not exist", run: wrong_slot },
    Attack { name: "F12 more bytes than its slot holds", run: wrong_length },
    Attack { name: "F12 a slot named twice in one batch", run: named_twice },
    Attack { name: "F12 a generation that has been", run: wrong_generation },
    Attack { name: "F13 reserved bits", run: reserved_bits },
    Attack { name: "F13 message types that nobody knows", run: unknown_types },
    Attack { name: "F15 scribbles over entry and slot of a running call", run: scribbles_on_call },
    Attack { name: "F16 scribbles over what the server writes", run: scribbles_on_answers },
    Attack { name: "F17 resizes and seals the segment", run: resizes },
    Attack { name: "F18 punches the segment", run: punches },
    Attack { name: "F22 takes no completions", run: takes_nothing },
    Attack { name: "F24 rings without cause", run: storms },
    Attack { name: "F25 publishes and does not ring", run: withholds },
    Attack { name: "F27 connects and says nothing", run: silent },
    Attack { name: "F29 uses connections of others", run: others_connection },
    Attack { name: "F31 a wrong hello, with descriptors", run: wrong_hello },
    Attack { name: "F31 bytes on the socket that mean nothing", run: wrong_bytes },
];

/// Whether the session is ended for breaking the protocol.
fn ended(raw: &Raw) -> bool {
    raw.ring();
    raw.ended() == DisconnectReason::ProtocolViolation
}

fn honest(path: &Path) -> bool {
    Raw::connect(path).echo(b"honest");
    true
}

fn goes(path: &Path) -> bool {
    drop(connect_silently(path));
    true
}

fn dies(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    for slot in SMALL..SMALL + 4 {
        let entry = raw.entry(ECHO, slot, b"and goodbye");
        raw.push(INTERACTIVE, &entry);
    }
    raw.ring();
    true
}

fn wrong_lap(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    raw.echo(b"right");
    let entry = raw.entry(ECHO, SMALL, b"forged");
    let lap = raw.next_lap(INTERACTIVE).wrapping_add(1000);
    raw.forge(INTERACTIVE, &entry, lap);
    ended(&raw)
}

fn wrong_position(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    raw.word32(raw.layout.consumed[INTERACTIVE]).store(1 << 31, SeqCst);
    for slot in [SMALL, SMALL + 1] {
        let entry = raw.entry(ECHO, slot, b"x");
        raw.push(INTERACTIVE, &entry);
        raw.ring();
    }
    ended(&raw)
}

fn wrong_hint(path: &Path) -> bool {
    let raw = Raw::connect(path);
    raw.lane.common.hints.set(BEYOND + 1);
    ended(&raw)
}

fn wrong_call(path: &Path, change: impl Fn(&mut Submission)) -> bool {
    let mut raw = Raw::connect(path);
    let mut entry = raw.entry(ECHO, SMALL, b"x");
    change(&mut entry);
    raw.push(INTERACTIVE, &entry);
    ended(&raw)
}

fn wrong_slot(path: &Path) -> bool {
    wrong_call(path, |e| (e.slot, e.response_slot, e.generation) = (u32::MAX, u32::MAX, 1))
}

fn wrong_length(path: &Path) -> bool {
    wrong_call(path, |e| e.len = 1025)
}

fn named_twice(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    let twice = raw.entry(ECHO, SMALL, b"twice");
    raw.push(INTERACTIVE, &twice);
    raw.push(INTERACTIVE, &twice);
    ended(&raw)
}

fn wrong_generation(path: &Path) -> bool {
    wrong_call(path, |e| e.generation = e.generation.wrapping_add(7))
}

fn reserved_bits(path: &Path) -> bool {
    wrong_call(path, |e| e.flags |= 1 << 13)
}

/// Is answered, and goes on.
fn unknown_types(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    [0, 317, u32::MAX].into_iter().all(|unknown| {
        let entry = raw.entry(unknown, SMALL, b"?");
        raw.call(&entry).status == Status::UnknownType as u8
    }) && raw.runs()
}

/// Whatever comes of it, the answer is one of its own bytes.
fn scribbles_on_call(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    for round in 0..8u8 {
        let entry = raw.entry(ECHO, SMALL, &[round; 64]);
        raw.push(INTERACTIVE, &entry);
        raw.ring();
        for _ in 0..64 {
            raw.lane.common.payload.write(LaneLayout::slot_offset(SMALL), &[!round; 64]);
        }
        let answer = raw.completion(INTERACTIVE);
        if answer.status != Status::Ok as u8 || answer.len != 64 {
            return false;
        }
    }
    raw.runs()
}

fn scribbles_on_answers(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    for ring in [INTERACTIVE, BULK] {
        raw.word32(raw.layout.published[ring]).store(!0, SeqCst);
        for word in 0..32 {
            raw.word64(raw.layout.completions[ring] + 8 * word).store(!0, SeqCst);
        }
    }
    raw.word32(raw.layout.client_bell).store(!0, SeqCst);
    let entry = raw.entry(ECHO, SMALL, b"x");
    raw.push_past_published(INTERACTIVE, &entry);
    raw.ring();
    raw.runs()
}

/// The kernel refuses all of it.
fn resizes(path: &Path) -> bool {
    let raw = Raw::connect(path);
    let len = raw.segment.len() as u64;
    let sizes = [0, len / 2, len * 2].into_iter();
    sizes.map(|size| rustix::fs::ftruncate(&raw.memory, size)).all(|result| result.is_err())
        && rustix::fs::fcntl_add_seals(&raw.memory, SealFlags::WRITE).is_err()
        && raw.runs()
}

fn punches(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punched = rustix::fs::fallocate(&raw.memory, flags, 0, raw.segment.len() as u64);
    let entry = raw.entry(ECHO, SMALL, b"x");
    raw.push_past_published(INTERACTIVE, &entry);
    raw.ring();
    punched.is_ok()
}

/// Stalls itself alone.
fn takes_nothing(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    for slot in SMALL..SMALL + 4 {
        let entry = raw.entry(ECHO, slot, b"kept");
        raw.push(INTERACTIVE, &entry);
        raw.ring();
    }
    raw.runs()
}

/// Rings for half a second as fast as it can, as long as it is let.
fn storms(path: &Path) -> bool {
    let raw = Raw::connect(path);
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until && raw.runs() {
        for _ in 0..16 {
            raw.wake();
        }
        // Half of its core is enough.
        std::thread::sleep(Duration::from_micros(50));
    }
    true
}

/// The sweep finds it.
fn withholds(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    let entry = raw.entry(ECHO, SMALL, b"found");
    raw.push(INTERACTIVE, &entry);
    raw.completion(INTERACTIVE).status == Status::Ok as u8
}

fn silent(path: &Path) -> bool {
    let sockets: Vec<_> = (0..3).map(|_| connect_silently(path)).collect();
    std::thread::sleep(Duration::from_millis(20));
    drop(sockets);
    true
}

fn others_connection(path: &Path) -> bool {
    let mut raw = Raw::connect(path);
    raw.connection = raw.connection.wrapping_add(1);
    let entry = Submission { flags: flag::END, ..raw.entry(ECHO, SMALL, b"yours") };
    raw.push(INTERACTIVE, &entry);
    ended(&raw)
}

fn wrong_hello(path: &Path) -> bool {
    for bytes in [&b"no hello"[..], &[0; 96], &[0xff; 200]] {
        let socket = connect_silently(path);
        let stderr = std::io::stderr();
        let fds = [stderr.as_fd(); 8];
        send_with_fds(&socket, bytes, &fds);
    }
    let socket = connect_silently(path);
    let hello = Hello { lanes: 0, ..hello() };
    send(&socket, hello.as_bytes()).is_ok()
}

fn wrong_bytes(path: &Path) -> bool {
    let raw = Raw::connect(path);
    send(&raw.socket, &[7; 33]).is_ok() && raw.ended() == DisconnectReason::ProtocolViolation
}

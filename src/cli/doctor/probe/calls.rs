//! Trying the calls that server and client rely on, as they make them. Nothing remains of it.

use super::super::findings::{Limit, MemoryStep, Process, Tried, Uring};
use doorbell_shm::SegmentError;
use doorbell_shm::layout::Geometry;
use doorbell_shm::segment::{Identity, Segment};
use doorbell_uring::{Host, SetupError, Step, ask_for_short_turns, current_cpu, peer_process, self_test};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, CpuSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Runs the self-test of io_uring and reads who may use it.
pub fn uring() -> Uring {
    let failed = self_test().err().map(|error| {
        let step = match &error {
            SetupError::Refused { step, .. }
            | SetupError::Differs { step, .. }
            | SetupError::Silent { step } => *step,
            SetupError::Feature { .. } => Step::CreateRing,
        };
        (step, error)
    });
    let host = Host::read();
    Uring { disabled: host.disabled, group: host.group.filter(|group| *group >= 0), failed }
}

/// Asks for short turns on a thread of its own.
pub fn short_turns() -> Tried {
    on_a_thread(|| tried("sched_setattr", ask_for_short_turns(100_000)))
}

/// Gives up files, on a thread that ends then.
#[cfg(feature = "hardening")]
pub fn landlock() -> Tried {
    on_a_thread(crate::cli::harden::try_files)
}

/// Gives up system calls, on a thread that ends then.
#[cfg(feature = "hardening")]
pub fn seccomp() -> Tried {
    on_a_thread(crate::cli::harden::try_calls)
}

/// This program does not give up files.
#[cfg(not(feature = "hardening"))]
pub fn landlock() -> Tried {
    Tried::Skipped
}

/// This program does not give up system calls.
#[cfg(not(feature = "hardening"))]
pub fn seccomp() -> Tried {
    Tried::Skipped
}

/// Work on a thread of its own, which may be pinned without consequences.
fn on_a_thread(work: impl FnOnce() -> Tried + Send) -> Tried {
    std::thread::scope(|scope| match std::thread::Builder::new().spawn_scoped(scope, work) {
        Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        Err(error) => Tried::Wrong(format!("no thread can be started: {error}")),
    })
}

fn tried<T>(call: &'static str, result: Result<T, Errno>) -> Tried {
    match result {
        Ok(_) => Tried::Works,
        Err(errno) => Tried::Refused { call, errno },
    }
}

/// Pages of the memory that is tried.
const PAGES: u64 = 4;
const PAGE: u64 = 4096;

/// Tries shared memory, step by step; what comes after a failure is not tried.
pub fn memory() -> Vec<(MemoryStep, Tried)> {
    let mut memory = None;
    let mut steps = Vec::new();
    for (step, work) in [
        (MemoryStep::Memfd, memfd as fn(&mut Option<OwnedFd>) -> Tried),
        (MemoryStep::Allocate, allocate),
        (MemoryStep::Punch, punch),
        (MemoryStep::Seal, seal),
        (MemoryStep::Segment, segment),
    ] {
        // Not giving pages back stops nothing else.
        let stopped = steps.iter().any(|(step, tried)| *step != MemoryStep::Punch && *tried != Tried::Works);
        steps.push((step, if stopped { Tried::Skipped } else { work(&mut memory) }));
    }
    steps
}

fn memfd(memory: &mut Option<OwnedFd>) -> Tried {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let made = rustix::fs::memfd_create("doorbell-doctor", flags).and_then(|fd| {
        let mode = rustix::fs::fstat(&fd)?.st_mode;
        Ok((fd, mode))
    });
    match made {
        Ok((_, mode)) if mode & 0o111 != 0 => {
            Tried::Wrong(format!("it may be executed (mode {:o})", mode & 0o777))
        }
        Ok((fd, _)) => {
            *memory = Some(fd);
            Tried::Works
        }
        Err(errno) => Tried::Refused { call: "memfd_create", errno },
    }
}

/// Bytes that exist in a file.
fn existing(fd: &OwnedFd) -> Result<u64, Errno> {
    Ok(rustix::fs::fstat(fd)?.st_blocks as u64 * 512)
}

fn allocate(memory: &mut Option<OwnedFd>) -> Tried {
    let Some(fd) = memory else { return Tried::Skipped };
    if let Err(errno) = rustix::fs::ftruncate(&*fd, PAGES * PAGE) {
        return Tried::Refused { call: "ftruncate", errno };
    }
    let done =
        rustix::fs::fallocate(&*fd, FallocateFlags::empty(), 0, PAGES * PAGE).and_then(|()| existing(fd));
    match done {
        Ok(bytes) if bytes < PAGES * PAGE => {
            Tried::Wrong(format!("of {} bytes {bytes} were made to exist", PAGES * PAGE))
        }
        other => tried("fallocate", other),
    }
}

fn punch(memory: &mut Option<OwnedFd>) -> Tried {
    let Some(fd) = memory else { return Tried::Skipped };
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let done = existing(fd).and_then(|before| {
        rustix::fs::fallocate(&*fd, hole, PAGE, PAGE)?;
        Ok((before, existing(fd)?))
    });
    match done {
        Ok((before, after)) if after >= before => Tried::Wrong("the page is still counted".to_owned()),
        other => tried("fallocate(FALLOC_FL_PUNCH_HOLE)", other),
    }
}

fn seal(memory: &mut Option<OwnedFd>) -> Tried {
    let Some(fd) = memory else { return Tried::Skipped };
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    if let Err(errno) = rustix::fs::fcntl_add_seals(&*fd, seals) {
        return Tried::Refused { call: "fcntl(F_ADD_SEALS)", errno };
    }
    for len in [PAGE, 2 * PAGES * PAGE] {
        if rustix::fs::ftruncate(&*fd, len) != Err(Errno::PERM) {
            return Tried::Wrong(format!("a sealed memfd could be resized to {len} bytes"));
        }
    }
    Tried::Works
}

fn segment(_: &mut Option<OwnedFd>) -> Tried {
    let identity = Identity { epoch: 1, session: [2, 3] };
    let (geometry, lanes) = (Geometry::default(), 2);
    let attached = Segment::create(geometry, lanes, identity).and_then(|segment| {
        segment.grant_lane(1)?;
        let memory = segment.memory().expect("a segment that was created has its memfd");
        Segment::attach(memory, geometry, lanes, identity)
    });
    match attached {
        Ok(_) => Tried::Works,
        Err(SegmentError::Os { call, source, .. }) => match Errno::from_io_error(&source) {
            Some(errno) => Tried::Refused { call, errno },
            None => Tried::Wrong(format!("{call}: {source}")),
        },
        Err(other) => Tried::Wrong(other.to_string()),
    }
}

/// Tries what is relied on about threads and processes; `allowed` are the cores that this process may use.
pub fn process(allowed: &[usize]) -> Process {
    let mut current_core = Tried::Skipped;
    let pinning = on_a_thread(|| {
        let (pinning, current) = pin_everywhere(allowed);
        current_core = current;
        pinning
    });
    Process { peer: peer(), pinning, current_core, current_core_ns: current_core_ns() }
}

/// A pidfd of the process at the other end, which is this one and lives.
fn peer() -> Tried {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, _theirs) = match socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None) {
        Ok(pair) => pair,
        Err(errno) => return Tried::Refused { call: "socketpair(SOCK_SEQPACKET)", errno },
    };
    let process = match peer_process(ours.as_fd()) {
        Ok(process) => process,
        Err(errno) => return Tried::Refused { call: "getsockopt(SO_PEERPIDFD)", errno },
    };
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(1..) => Tried::Wrong("the pidfd says that a living process has ended".to_owned()),
        other => tried("poll of a pidfd", other),
    }
}

/// Pins the calling thread to each core in turn and asks it where it runs.
fn pin_everywhere(allowed: &[usize]) -> (Tried, Tried) {
    for core in allowed {
        let mut set = CpuSet::new();
        set.set(*core);
        if let Err(errno) = rustix::thread::sched_setaffinity(None, &set) {
            return (Tried::Refused { call: "sched_setaffinity", errno }, Tried::Skipped);
        }
        let told = current_cpu();
        if told as usize != *core {
            return (
                Tried::Works,
                Tried::Wrong(format!("on core {core} a thread is told that it runs on {told}")),
            );
        }
    }
    (Tried::Works, Tried::Works)
}

/// What asking for the current core costs, ns.
fn current_core_ns() -> Option<u64> {
    const TIMES: u32 = 1000;
    let round = || {
        let began = Instant::now();
        for _ in 0..TIMES {
            std::hint::black_box(current_cpu());
        }
        u64::try_from(began.elapsed().as_nanos()).ok().map(|ns| ns / u64::from(TIMES))
    };
    // The least of some rounds: whatever interrupts makes it more.
    (0..5).filter_map(|_| round()).min()
}

/// A limit of this process.
pub fn limit(resource: Resource) -> Limit {
    let limit = getrlimit(resource);
    Limit { soft: limit.current, hard: limit.maximum }
}

/// Whether RLIMIT_MEMLOCK does not hold for this process. A capability inside a user namespace does not count.
pub fn may_lock(uid_map: Option<&str>) -> bool {
    let in_first_namespace = uid_map.is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]));
    let capable =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    in_first_namespace && capable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: where the tests pass, whatever server and client rely on works, and a step after a failure is not tried.
    #[test]
    fn what_is_relied_on_works_here() {
        // Where it is refused, the doctor says so as the self-test does.
        assert_eq!(uring().failed.is_none(), self_test().is_ok());
        assert!(memory().iter().all(|(_, tried)| *tried == Tried::Works), "{:?}", memory());
        let here = current_cpu() as usize;
        let process = process(&[here]);
        for tried in [process.peer, process.pinning, process.current_core, short_turns()] {
            assert_eq!(tried, Tried::Works);
        }
        assert!(process.current_core_ns.is_some());
        let mut nothing = None;
        assert_eq!(seal(&mut nothing), Tried::Skipped);
    }

    /// Goal: a core that may not be used is a refusal with its call, and the caller stays where it may run.
    #[test]
    fn a_refusal_names_its_call() {
        let affinity = || rustix::thread::sched_getaffinity(None).unwrap();
        let before = affinity();
        let process = process(&[CpuSet::MAX_CPU - 1]);
        assert_eq!(process.pinning, Tried::Refused { call: "sched_setaffinity", errno: Errno::INVAL });
        assert_eq!((process.current_core, affinity()), (Tried::Skipped, before));
    }

    /// Goal: root of a user namespace is not taken for root.
    #[test]
    fn a_capability_in_a_user_namespace_does_not_count() {
        assert!(!may_lock(Some("0 1000 1")));
        assert_eq!(may_lock(None), may_lock(Some("         0          0 4294967295")));
    }
}

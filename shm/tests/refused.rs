//! What segments and the handler of SIGBUS do when the kernel refuses a call: they name it, and nothing is left. Each call is
//! refused to one thread by a seccomp filter. Nothing here runs under Miri or loom.
#![cfg(not(any(loom, miri)))]

use doorbell_shm::layout::{Geometry, LaneLayout};
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::segment::{self, Identity, Segment};
use doorbell_shm::{SegmentError, bus};
use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const GEOMETRY: Geometry = Geometry { ring_order: 4, large: 0, medium: 0, small: 4, lease_pages: 4 };
const IDENTITY: Identity = Identity { epoch: 1, session: [2, 3] };
const LANES: u32 = 2;
const HOLE: u64 = libc::FALLOC_FL_PUNCH_HOLE as u64;

/// A system call, with conditions for its arguments.
type Refusal<'a> = (i64, &'a [(u8, SeccompCmpOp, u64)]);

use SeccompCmpOp::{Eq, MaskedEq, Ne};
const MEMFD_CREATE: Refusal<'_> = (libc::SYS_memfd_create, &[]);
const FTRUNCATE: Refusal<'_> = (libc::SYS_ftruncate, &[]);
const FSTAT: Refusal<'_> = (libc::SYS_fstat, &[]);
const BACK: Refusal<'_> = (libc::SYS_fallocate, &[(1, MaskedEq(HOLE), 0)]);
const PUNCH: Refusal<'_> = (libc::SYS_fallocate, &[(1, MaskedEq(HOLE), HOLE)]);
const ADD_SEALS: Refusal<'_> = (libc::SYS_fcntl, &[(1, Eq, libc::F_ADD_SEALS as u64)]);
const GET_SEALS: Refusal<'_> = (libc::SYS_fcntl, &[(1, Eq, libc::F_GET_SEALS as u64)]);
/// Shared mappings alone: what a thread allocates is private.
const MAP: Refusal<'_> = (libc::SYS_mmap, &[(3, MaskedEq(libc::MAP_SHARED as u64), libc::MAP_SHARED as u64)]);
/// What takes the place of something else.
const MAP_OVER: Refusal<'_> =
    (libc::SYS_mmap, &[(3, MaskedEq(libc::MAP_FIXED as u64), libc::MAP_FIXED as u64)]);
const DONTFORK: Refusal<'_> = (libc::SYS_madvise, &[(2, Eq, libc::MADV_DONTFORK as u64)]);
/// A page of this process alone.
const MAP_PAGE: Refusal<'_> = (
    libc::SYS_mmap,
    &[(1, Eq, PAGE as u64), (3, MaskedEq(libc::MAP_PRIVATE as u64), libc::MAP_PRIVATE as u64)],
);
const WIPEONFORK: Refusal<'_> = (libc::SYS_madvise, &[(2, Eq, libc::MADV_WIPEONFORK as u64)]);
const ASK_HANDLER: Refusal<'_> = (libc::SYS_rt_sigaction, &[(0, Eq, libc::SIGBUS as u64), (1, Eq, 0)]);
const SET_HANDLER: Refusal<'_> = (libc::SYS_rt_sigaction, &[(0, Eq, libc::SIGBUS as u64), (1, Ne, 0)]);

/// Descriptors are the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// What `attempt` comes to on a thread to which the kernel answers ENOMEM instead.
fn refused<T: Send>((call, conditions): Refusal<'_>, attempt: impl FnOnce() -> T + Send) -> T {
    let condition = |(argument, op, value): &(u8, SeccompCmpOp, u64)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Qword, op.clone(), *value).unwrap()
    };
    let conditions: Vec<_> = conditions.iter().map(condition).collect();
    let rules = if conditions.is_empty() { vec![] } else { vec![SeccompRule::new(conditions).unwrap()] };
    let refusal = SeccompAction::Errno(Errno::NOMEM.raw_os_error() as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let calls = BTreeMap::from([(call, rules)]);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, refusal, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&program).unwrap();
            attempt()
        });
        thread.join().unwrap()
    })
}

/// The call that an error names.
fn named<T>(result: Result<T, SegmentError>) -> &'static str {
    match result {
        Err(SegmentError::Os { call, .. }) => call,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

/// Descriptors of this process that belong to segments.
fn memfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = links.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("doorbell-")).count()
}

/// Goal:   F33: a segment that cannot be made or attached is an error that names the call, and no descriptor is left.
/// Method: each call in turn is refused.
#[test]
fn f33_every_refused_call_is_named_and_nothing_is_left() {
    let _alone = ALONE.lock().unwrap();
    let server = Segment::create(GEOMETRY, LANES, IDENTITY).unwrap();
    let memory = server.memory().unwrap();
    let (_scratch, scratch_memory) = segment::scratch(PAGE).unwrap();
    let before = memfds();
    for (refusal, name) in [
        (MEMFD_CREATE, "memfd_create"),
        (FTRUNCATE, "ftruncate"),
        (BACK, "fallocate"),
        (ADD_SEALS, "fcntl(F_ADD_SEALS)"),
        (MAP, "mmap"),
    ] {
        assert_eq!(named(refused(refusal, || Segment::create(GEOMETRY, LANES, IDENTITY))), name);
    }
    for (refusal, name) in [
        // These are asked for once in each process: by the first to get so far.
        (MAP_PAGE, "mmap"),
        (WIPEONFORK, "madvise(MADV_WIPEONFORK)"),
        (GET_SEALS, "fcntl(F_GET_SEALS)"),
        (FSTAT, "fstat"),
        (MAP, "mmap"),
        (DONTFORK, "madvise(MADV_DONTFORK)"),
    ] {
        let attach = || Segment::attach(memory, GEOMETRY, LANES, IDENTITY);
        assert_eq!(named(refused(refusal, attach)), name);
    }
    for (refusal, name) in
        [(MEMFD_CREATE, "memfd_create"), (FTRUNCATE, "ftruncate"), (BACK, "fallocate"), (MAP, "mmap")]
    {
        assert_eq!(named(refused(refusal, || segment::scratch(PAGE))), name);
    }
    let attach = || segment::attach_scratch(scratch_memory.as_fd(), PAGE);
    assert_eq!(named(refused(MAP, attach)), "mmap");
    assert_eq!(memfds(), before);
    assert!(Segment::attach(memory, GEOMETRY, LANES, IDENTITY).is_ok(), "and it can be attached as before");
}

/// Goal:   F34: pages that the kernel refuses are not granted, and pages that it does not take back still are.
/// Method: grants and returns that are refused, told from `excess`, which counts pages that nobody was granted.
#[test]
fn f34_what_was_refused_does_not_change_what_is_granted() {
    let _alone = ALONE.lock().unwrap();
    let server = Segment::create(GEOMETRY, LANES, IDENTITY).unwrap();
    let lease = LaneLayout::home(&GEOMETRY).slots + GEOMETRY.base_pages() as usize * PAGE;
    let excess = || server.excess().unwrap();
    let refusal = refused(BACK, || server.back(lease, PAGE)).unwrap_err();
    assert!(refusal.is_out_of_memory(), "{refusal}");
    assert_eq!(named(refused(BACK, || server.grant_lane(1))), "fallocate");
    assert_eq!(server.lane(1), Ok(None));
    server.mapping().object::<AtomicU64>(lease).unwrap().store(1, Relaxed);
    assert_eq!(excess(), PAGE as u64, "touched, and granted to nobody");
    server.back(lease, PAGE).unwrap();
    assert_eq!(excess(), 0);
    assert_eq!(named(refused(PUNCH, || server.give_back(lease, PAGE))), "fallocate(FALLOC_FL_PUNCH_HOLE)");
    assert_eq!(excess(), 0, "still granted");
    assert_eq!(named(refused(FSTAT, || server.excess())), "fstat");
    server.give_back(lease, PAGE).unwrap();
    assert_eq!(excess(), 0);
}

const CHILD: &str = "DOORBELL_TEST_REFUSED";

/// How the named test ends as a process of its own, in which [`CHILD`] is set.
fn as_process(name: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name]).env(CHILD, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("running 1 test\n"), "there is no {name}: {said}");
    output.status
}

/// Goal:   F19: whoever cannot handle SIGBUS is told, and may try again.
/// Method: a process of its own, since the handler is the process's; both calls refused in turn, then neither.
#[test]
fn f19_a_handler_that_is_refused_is_an_error_and_can_be_installed_later() {
    if std::env::var_os(CHILD).is_some() {
        for refusal in [ASK_HANDLER, SET_HANDLER] {
            let error = refused(refusal, bus::install).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::OutOfMemory);
        }
        return bus::install().unwrap();
    }
    let status = as_process("f19_a_handler_that_is_refused_is_an_error_and_can_be_installed_later");
    assert!(status.success(), "{status}");
}

/// Goal:   F19: where there is no page to put in the place of one that is lost, the process ends as without a handler.
/// Method: a process of its own; the file behind a guarded mapping is cut where nothing can be mapped over it.
#[test]
fn f19_a_page_that_cannot_be_replaced_ends_the_process() {
    if std::env::var_os(CHILD).is_some() {
        bus::install().unwrap();
        let fd = memfd_create("doorbell-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE as u64).unwrap();
        let map = Mapping::guarded(MmapRaw::map_raw(&fd).unwrap());
        let word = map.object::<AtomicU64>(0).unwrap();
        ftruncate(&fd, 0).unwrap();
        let value = refused(MAP_OVER, || word.load(Relaxed));
        panic!("it reads {value}");
    }
    let status = as_process("f19_a_page_that_cannot_be_replaced_ends_the_process");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

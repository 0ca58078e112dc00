//! Real segments: memfds, seals, grants, and what attaching refuses. Nothing here runs under Miri or loom.
#![cfg(not(any(loom, miri)))]

use doorbell_shm::lane::{ClientLane, ServerLane};
use doorbell_shm::layout::{self, Geometry, HEADER_LEN, LaneLayout, header, state};
use doorbell_shm::map::PAGE;
use doorbell_shm::ring::{Consumer, Entry};
use doorbell_shm::segment::{self, Identity, Segment};
use doorbell_shm::{PeerFault, SegmentError};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A slot of each larger class and four small ones: six pages.
const MIXED: Geometry = Geometry { ring_order: 4, large: 1, medium: 1, small: 4, lease_pages: 0 };
const IDENTITY: Identity = Identity { epoch: 11, session: [22, 33] };
const REQUIRED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

fn default_segment() -> (Segment, OwnedFd) {
    let segment = Segment::create(MIXED, 1, IDENTITY).unwrap();
    let fd = segment.memory().unwrap().try_clone_to_owned().unwrap();
    (segment, fd)
}

/// A memfd of `len` bytes with a correct header of the default geometry and these seals.
fn forged(len: usize, seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("forged", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let good = Segment::on_heap(MIXED, 1, IDENTITY).unwrap();
    let words = good.mapping().slice::<AtomicU64>(0, HEADER_LEN / 8).unwrap();
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.load(Relaxed).to_le_bytes()).collect();
    assert_eq!(rustix::io::pwrite(&fd, &bytes, 0), Ok(HEADER_LEN));
    rustix::fs::ftruncate(&fd, len as u64).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn attach_default(fd: &OwnedFd) -> Result<Segment, SegmentError> {
    Segment::attach(fd.as_fd(), MIXED, 1, IDENTITY)
}

/// Goal:   both sides see one memory.
/// Method: created, attached by its descriptor, state and payload written by one and read by the other.
#[test]
fn a_segment_is_shared_by_the_two_that_map_it() {
    let (server, fd) = default_segment();
    let client = attach_default(&fd).unwrap();
    drop(fd);
    assert_eq!((server.len(), client.len()), (7 * PAGE, 7 * PAGE));
    assert_eq!((client.geometry(), client.state()), (&MIXED, (state::RUNNING, 0)));
    server.set_state(state::DRAINING, 4);
    assert_eq!(client.state(), (state::DRAINING, 4));
    let last = |s: &Segment| s.mapping().object::<AtomicU64>(7 * PAGE - 8).unwrap();
    last(&client).store(77, Relaxed);
    assert_eq!(last(&server).load(Relaxed), 77);
}

/// Goal:   F17: nobody who holds the descriptor can change the size, the seals or the mode.
/// Method: every such call on a real segment is refused with EPERM, through the client's own duplicate too;
///         the segment still works.
#[test]
fn f17_truncating_growing_sealing_and_making_executable_are_refused() {
    let (server, fd) = default_segment();
    let duplicate = rustix::io::dup(&fd).unwrap();
    for fd in [&fd, &duplicate] {
        for len in [0, PAGE as u64, 7 * PAGE as u64 - 1, 7 * PAGE as u64 + 1, 1 << 40] {
            assert_eq!(rustix::fs::ftruncate(fd, len), Err(Errno::PERM), "to {len}");
        }
        let beyond = rustix::fs::fallocate(fd, FallocateFlags::empty(), 7 * PAGE as u64, PAGE as u64);
        assert_eq!(beyond, Err(Errno::PERM), "grow by fallocate");
        assert_eq!(rustix::io::pwrite(fd, &[1], 7 * PAGE as u64), Err(Errno::PERM), "grow by writing");
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE, SealFlags::SEAL, SealFlags::SHRINK] {
            assert_eq!(rustix::fs::fcntl_add_seals(fd, seal), Err(Errno::PERM), "{seal:?}");
        }
        assert_eq!(rustix::fs::fchmod(fd, Mode::from_raw_mode(0o700)), Err(Errno::PERM), "chmod +x");
    }
    assert!(rustix::fs::fcntl_get_seals(&fd).unwrap().contains(REQUIRED));
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 7 * PAGE as i64);
    server.set_state(state::CLOSED, 1);
    assert_eq!(attach_default(&duplicate).unwrap().state(), (state::CLOSED, 1));
}

/// Goal:   F17, F20: a segment that could change its size is never mapped.
/// Method: every subset of the three seals; only the full one is accepted, the missing ones are named.
#[test]
fn f17_attach_refuses_a_segment_that_lacks_a_seal() {
    for set in 0..8u32 {
        let parts = [SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL];
        let seals: SealFlags = (0..3).filter(|i| set >> i & 1 == 1).map(|i| parts[i]).collect();
        let result = attach_default(&forged(7 * PAGE, seals));
        if seals == REQUIRED {
            assert!(result.is_ok());
        } else {
            let missing = (REQUIRED - seals).bits();
            assert!(
                matches!(result, Err(SegmentError::Unsealed { missing: m }) if m == missing),
                "{seals:?}"
            );
        }
    }
}

/// Goal:   F17, F20: a segment of another size than the handshake said is never mapped.
/// Method: shorter and longer by a byte and by a page, and empty; both sizes are reported.
#[test]
fn f17_attach_refuses_a_segment_of_the_wrong_size() {
    for len in [0, PAGE, 7 * PAGE - 1, 7 * PAGE + 1, 8 * PAGE] {
        let expected = 7 * PAGE as u64;
        let fault = PeerFault::Header { field: "size", theirs: len as u64, expected };
        let result = attach_default(&forged(len, REQUIRED));
        assert!(matches!(result, Err(SegmentError::Header(f)) if f == fault), "{len}: {result:?}");
    }
}

/// Goal:   a header that contradicts the handshake is refused, naming the field.
/// Method: one bit of each fixed field is changed in an otherwise correct segment; then each parameter of
///         the handshake.
#[test]
fn f48_attach_refuses_a_header_that_contradicts_the_handshake() {
    let fields = [
        ("magic", header::MAGIC),
        ("version", header::VERSION),
        ("features_required", header::FEATURES_REQUIRED),
        ("features_optional", header::FEATURES_OPTIONAL),
        ("epoch", header::EPOCH),
        ("session.0", header::SESSION),
        ("session.1", header::SESSION + 8),
        ("geometry", header::GEOMETRY),
    ];
    let named = |result: Result<Segment, SegmentError>| match result {
        Err(SegmentError::Header(PeerFault::Header { field, .. })) => field,
        other => panic!("{other:?}"),
    };
    for (name, offset) in fields {
        for bit in [0, 31, 32, 63] {
            let (server, fd) = default_segment();
            let word = server.mapping().object::<AtomicU64>(offset).unwrap();
            word.store(word.load(Relaxed) ^ 1 << bit, Relaxed);
            assert_eq!(named(attach_default(&fd)), name, "bit {bit}");
        }
    }
    let (_server, fd) = default_segment();
    let fd = fd.as_fd();
    let other = Identity { epoch: 12, ..IDENTITY };
    assert_eq!(named(Segment::attach(fd, MIXED, 1, other)), "epoch");
    let other = Identity { session: [22, 34], ..IDENTITY };
    assert_eq!(named(Segment::attach(fd, MIXED, 1, other)), "session.1");
    assert_eq!(named(Segment::attach(fd, Geometry::SMALLEST, 1, IDENTITY)), "size");
    let same_size = Geometry { large: 0, medium: 5, ..MIXED };
    assert_eq!(layout::segment_len(&same_size, 1), 7 * PAGE);
    assert_eq!(named(Segment::attach(fd, same_size, 1, IDENTITY)), "geometry");
}

/// Goal:   F20: something that is no memfd is refused with the kernel's answer.
/// Method: a pipe, and a directory.
#[test]
fn f20_attach_refuses_what_is_no_memfd() {
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let here = rustix::fs::open(".", rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
    for fd in [pipe, here] {
        let error = attach_default(&fd).unwrap_err();
        assert!(matches!(error, SegmentError::Os { call: "fcntl(F_GET_SEALS)", .. }), "{error}");
        assert!(!error.is_out_of_memory());
    }
}

/// Goal:   a geometry outside the limits makes no segment, on either side.
/// Method: a ring order of 11.
#[test]
fn a_geometry_outside_the_limits_makes_no_segment() {
    let bad = Geometry { ring_order: 11, ..MIXED };
    let is_geometry = |e: SegmentError| matches!(e, SegmentError::Geometry { what: "ring order", .. });
    assert!(is_geometry(Segment::create(bad, 1, IDENTITY).unwrap_err()));
    assert!(is_geometry(Segment::on_heap(bad, 1, IDENTITY).unwrap_err()));
    let (_server, fd) = default_segment();
    assert!(is_geometry(Segment::attach(fd.as_fd(), bad, 1, IDENTITY).unwrap_err()));
}

/// Goal:   trap 6: no name in /dev/shm that could leak, be reused or be reset; the descriptor does not
///         survive an exec.
/// Method: the directory before and after; the link of the descriptor; its CLOEXEC flag.
#[test]
fn trap06_a_segment_has_no_name_in_the_file_system() {
    use std::os::fd::AsRawFd;
    let names = || -> BTreeSet<_> {
        let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        entries.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains("doorbell")).collect()
    };
    let before = names();
    let (_server, fd) = default_segment();
    assert_eq!(names(), before);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
    assert!(link.to_string_lossy().starts_with("/memfd:doorbell-session"), "{link:?}");
    assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

/// Goal:   F9: a forked child of the client does not inherit the mapping (two writers of one ring).
/// Method: the kernel's flags of both mappings: `dc` (do not copy on fork) on the client's.
#[test]
fn f09_the_mapping_of_a_client_is_not_inherited_by_a_fork() {
    let (server, fd) = default_segment();
    let client = attach_default(&fd).unwrap();
    let flags = |segment: &Segment| {
        let at = &*segment.mapping().object::<AtomicU64>(0).unwrap() as *const AtomicU64 as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.split_once(&format!("\n{at:x}-")).expect("the mapping is listed").1.to_owned();
        mapping.lines().find_map(|l| l.strip_prefix("VmFlags:")).unwrap().to_owned()
    };
    assert!(flags(&client).split_whitespace().any(|f| f == "dc"));
    assert!(!flags(&server).split_whitespace().any(|f| f == "dc"), "the server does not fork");
}

/// Goal:   F34: exactly what was granted is backed by memory, so shortage shows at the grant and never as
///         SIGBUS.
/// Method: blocks of the file for geometries with and without lease pages.
#[test]
fn f34_exactly_the_granted_pages_are_backed() {
    let leases = Geometry { lease_pages: 64, ..MIXED };
    let large = Geometry { ring_order: 10, large: 4, medium: 10, small: 100, lease_pages: 7 };
    for geometry in [Geometry::SMALLEST, MIXED, leases, large] {
        let server = Segment::create(geometry, 1, IDENTITY).unwrap();
        let stat = rustix::fs::fstat(server.memory().unwrap()).unwrap();
        assert_eq!(stat.st_blocks as usize * 512, segment::granted_bytes(&geometry), "{geometry:?}");
        assert_eq!(stat.st_size as usize, server.len());
        assert_eq!(
            server.len() - segment::granted_bytes(&geometry),
            PAGE * usize::from(geometry.lease_pages)
        );
    }
}

/// Goal:   F18: a hole punched by the client is found out as a violation; the server does not fault.
/// Method: entries of the second lap, then a hole over the whole head, on a real memfd.
#[test]
fn f18_a_hole_punched_into_the_rings_is_a_violation() {
    let (server, fd) = default_segment();
    let lane = LaneLayout::home(&MIXED);
    let entries = server.mapping().slice::<Entry<8>>(lane.submissions[0], 16).unwrap();
    let position = || server.mapping().object::<AtomicU32>(lane.published[0]).unwrap();
    let mut tx = doorbell_shm::ring::Producer::starting_at(entries.clone(), position(), 32);
    let mut rx = Consumer::starting_at(entries, position(), 32);
    tx.push([0; 8]).unwrap();
    assert!(rx.pop().unwrap().is_some());
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&fd, hole, 0, PAGE as u64).unwrap();
    assert_eq!(rx.pop(), Err(PeerFault::Lap { theirs: 0, expected: 3, position: 33 }));
    rx.publish();
    assert_eq!(position().load(Relaxed), 33, "the page is back, zeroed");
}

/// Goal:   what the benchmarks share is one memory too.
/// Method: written through one mapping, read through the other.
#[test]
fn scratch_memory_is_shared() {
    let (one, fd) = segment::scratch(2 * PAGE).unwrap();
    let two = segment::attach_scratch(fd.as_fd(), 2 * PAGE).unwrap();
    one.object::<AtomicU64>(PAGE).unwrap().store(9, Relaxed);
    assert_eq!(two.object::<AtomicU64>(PAGE).unwrap().load(Relaxed), 9);
    assert_eq!((one.len(), one.is_empty()), (2 * PAGE, false));
}

/// Goal:   P6, F34: a further lane exists only once granted, costs exactly its pages, and both ends then meet on it.
/// Method: a segment with room for three lanes; the kernel counts blocks, an entry crosses the granted lane.
#[test]
fn p6_f34_a_further_lane_is_a_hole_until_it_is_granted() {
    let geometry = Geometry::SMALLEST;
    let server = Segment::create(geometry, 3, IDENTITY).unwrap();
    let client = Segment::attach(server.memory().unwrap(), geometry, 3, IDENTITY).unwrap();
    let blocks = || rustix::fs::fstat(server.memory().unwrap()).unwrap().st_blocks as usize * 512;
    assert_eq!(blocks(), segment::granted_bytes(&geometry));
    assert_eq!(client.lane(1), Ok(None));

    let layout = server.grant_lane(1).unwrap();
    let new = blocks() - segment::granted_bytes(&geometry);
    assert_eq!(new, segment::lane_bytes(&geometry), "its head and its base slots");
    assert_eq!((new, layout.slots - layout::segment_len(&geometry, 1)), (2 * PAGE, PAGE));
    assert_eq!(client.lane(1), Ok(Some(layout)));
    assert_eq!((client.lane(2), client.lane(3), client.lane(0)), (Ok(None), Ok(None), Ok(None)));
    let mut ours = ServerLane::open(server.mapping(), &geometry, &layout).unwrap();
    let mut theirs = ClientLane::open(client.mapping(), &geometry, &layout).unwrap();
    assert!(theirs.submissions[0].push([0, 1, 2, 3, 4, 5, 6, 7]).unwrap());
    assert_eq!(ours.submissions[0].pop().unwrap().unwrap()[1..], [1, 2, 3, 4, 5, 6, 7]);
}

/// Goal:   F49, F50: a client can tell which lanes their reactors have let go of: one goes, and no other with it.
/// Method: lanes whose entries share a word of the directory and lie in the next one; those that there are not.
#[test]
fn f49_f50_a_lane_that_was_let_go_is_not_in_the_directory() {
    let server = Segment::create(Geometry::SMALLEST, 6, IDENTITY).unwrap();
    let client = Segment::attach(server.memory().unwrap(), Geometry::SMALLEST, 6, IDENTITY).unwrap();
    for lane in 1..6 {
        server.grant_lane(lane).unwrap();
    }
    let there = || (1..6).filter(|lane| client.lane(*lane).unwrap().is_some()).collect::<Vec<_>>();
    for (gone, left) in
        [(0, &[1, 2, 3, 4, 5][..]), (6, &[1, 2, 3, 4, 5]), (2, &[1, 3, 4, 5]), (4, &[1, 3, 5])]
    {
        server.let_go_lane(gone);
        assert_eq!(there(), left);
    }
}

/// Goal:   a lane that there is no room for is refused, and so is a directory that says something else.
/// Method: numbers at both ends; a forged entry.
#[test]
fn p6_a_lane_out_of_range_or_a_forged_directory_is_refused() {
    let segment = Segment::on_heap(Geometry::SMALLEST, 2, IDENTITY).unwrap();
    for lane in [0, 2, u32::MAX] {
        assert!(matches!(segment.grant_lane(lane), Err(SegmentError::Geometry { .. })), "{lane}");
    }
    segment.grant_lane(1).unwrap();
    let directory = segment.mapping().slice::<AtomicU64>(header::DIRECTORY, 1).unwrap();
    directory[0].store(7 << 16, Relaxed);
    assert!(matches!(segment.lane(1), Err(PeerFault::Header { field: "directory", theirs: 7, .. })));
    for lanes in [0, layout::LANES_MAX + 1, u32::MAX] {
        assert!(Segment::create(Geometry::SMALLEST, lanes, IDENTITY).is_err(), "{lanes}");
    }
    // The directory holds 16 bits of a page number: large lanes are fewer.
    let large = Geometry { large: 256, medium: 0, small: 0, ..MIXED };
    let most = layout::lanes_max(&large);
    assert!(most < layout::LANES_MAX && most > 1, "{most}");
    assert!(LaneLayout::nth(&large, most - 2).end / PAGE <= 0xffff);
    assert_eq!(layout::lanes_max(&Geometry::default()), layout::LANES_MAX);
}

/// Goal:   F34, F59: leased memory exists from its grant until it is given back, and what a client makes exist
///         beyond it is seen.
/// Method: the kernel counts; the client touches a page before the grant, and again after it was given back.
#[test]
fn f34_f59_leased_pages_exist_while_they_are_granted_and_foreign_ones_are_seen() {
    let geometry = Geometry { lease_pages: 8, ..Geometry::SMALLEST };
    let server = Segment::create(geometry, 1, IDENTITY).unwrap();
    let client = Segment::attach(server.memory().unwrap(), geometry, 1, IDENTITY).unwrap();
    let blocks = || rustix::fs::fstat(server.memory().unwrap()).unwrap().st_blocks as usize * 512;
    let (before, lease) = (blocks(), LaneLayout::home(&geometry).slots + PAGE);
    assert_eq!((before, server.excess().unwrap()), (2 * PAGE, 0));
    let touch = |page: usize| {
        client.mapping().object::<AtomicU64>(lease + page * PAGE).unwrap().store(1, Relaxed);
    };
    touch(7);
    assert_eq!(server.excess().unwrap(), PAGE as u64);
    server.punch(lease + 7 * PAGE, PAGE).unwrap();
    server.back(lease, 4 * PAGE).unwrap();
    touch(3);
    assert_eq!((blocks(), server.excess().unwrap()), (before + 4 * PAGE, 0));
    server.give_back(lease, 4 * PAGE).unwrap();
    assert_eq!((blocks(), server.excess().unwrap()), (before, 0));
    touch(3);
    assert_eq!(server.excess().unwrap(), PAGE as u64);
    let heap = Segment::on_heap(geometry, 1, IDENTITY).unwrap();
    heap.back(lease, PAGE).unwrap();
    heap.give_back(lease, PAGE).unwrap();
    assert_eq!(heap.excess().unwrap(), 0);
}

/// Goal:   F34: a segment on the heap, which simulations use, grants, refuses and clears pages as one in a memfd does.
/// Method: pages refused once, granted, written, given back; nothing, and what lies outside, is punched.
#[test]
fn f34_pages_on_the_heap_are_granted_refused_and_cleared() {
    let geometry = Geometry { lease_pages: 4, ..MIXED };
    let segment = Segment::on_heap(geometry, 1, IDENTITY).unwrap();
    let offset = LaneLayout::home(&geometry).slots + geometry.base_pages() as usize * PAGE;
    segment.refuse_pages();
    let refused = segment.back(offset, PAGE).unwrap_err();
    assert!(refused.is_out_of_memory() && matches!(refused, SegmentError::Os { call: "fallocate", .. }));
    segment.back(offset, PAGE).unwrap();
    let word = segment.mapping().object::<AtomicU64>(offset).unwrap();
    word.store(7, Relaxed);
    segment.punch(offset, 0).unwrap();
    assert_eq!((word.load(Relaxed), segment.excess().unwrap()), (7, 0));
    segment.give_back(offset, PAGE).unwrap();
    assert_eq!(word.load(Relaxed), 0);
    assert!(matches!(segment.punch(segment.len(), PAGE), Err(SegmentError::OutOfBounds { .. })));
}

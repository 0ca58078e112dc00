//! Everything that either side reads from the rendezvous socket, whatever the other side sends there.
//!
//! The first byte of the input chooses what is read, the rest is what is sent: as it is, or as changes to a message that
//! is right, since few inputs get past a magic number by chance.
//!
//! Asserted: nothing panics; a server grants what its limits allow and no more, of a geometry that a segment can be made
//! of, and refuses all else by a code that means it, as a second, plainer judgement of the same bytes says; what a server
//! answers is what a client understands; what is read is, written again, the same bytes; of a packet with descriptors
//! none stays open.
#![no_main]

use doorbell::ServerConfig;
use doorbell::fuzz::{Heard, Judge, hear};
use doorbell::protocol::handshake::{
    Answer, DisconnectReason, Goodbye, Hello, LaneChoice, LaneGrant, LaneRequest, Scope, VERSION_MAX,
    VERSION_MIN, Welcome, code,
};
use doorbell_shm::layout::{Geometry, MAGIC, lanes_max, segment_len};
use doorbell_shm::segment::{Identity, Segment};
use libfuzzer_sys::fuzz_target;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

/// Where the segments of this target are made for real, on the heap.
const LEN_MAX: usize = 1 << 20;
const IDENTITY: Identity = Identity { epoch: 1, session: [2, 3] };
const GEOMETRY: Geometry = Geometry { ring_order: 3, large: 0, medium: 0, small: 4, lease_pages: 0 };

/// Changes bytes of a message that is right: pairs of place and value, as long as there are any.
fn changed(right: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut bytes = right.to_vec();
    for change in changes.chunks_exact(2) {
        let place = usize::from(change[0]) % (bytes.len() + 1);
        match bytes.get_mut(place) {
            Some(byte) => *byte = change[1],
            // One behind the last: longer or shorter.
            None if change[1] % 2 == 0 => bytes.push(change[1]),
            None => bytes.truncate(usize::from(change[1])),
        }
    }
    bytes
}

/// The servers that judge: one with the defaults, a small one, one that is full, one that is stopping.
fn judges() -> [Judge; 4] {
    let small = ServerConfig {
        max_ring_order: 5,
        max_slot_pages: 8,
        max_lanes: 2,
        reactors: 3,
        max_connections: 1,
        ..ServerConfig::default()
    };
    // Never checked: nobody fits in.
    let full = ServerConfig { max_sessions: 0, ..ServerConfig::default() };
    [
        Judge::new(ServerConfig { reactors: 64, max_lanes: 64, ..ServerConfig::default() }),
        Judge::new(small.clone()),
        Judge::new(full),
        Judge::new(small).draining(),
    ]
}

/// Whether bytes are a hello that this version answers with a session if there is room, told field by field.
fn is_right(bytes: &[u8]) -> Result<Hello, u16> {
    let Ok(bytes) = <&[u8; 96]>::try_from(bytes) else { return Err(code::BAD_HELLO) };
    if &bytes[..8] != b"DOORBELL" {
        return Err(code::BAD_HELLO);
    }
    let [oldest, newest] = [8, 10].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    if oldest > VERSION_MAX || newest < VERSION_MIN {
        return Err(code::VERSION_MISMATCH);
    }
    let lanes = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    let name = String::from_utf8(bytes[64..].to_vec()).map(|name| name.trim_end_matches('\0').to_owned());
    let readable = name.is_ok_and(|name| !name.chars().any(|c| c.is_control()));
    if oldest > newest || lanes == 0 || bytes[56..64] != [0; 8] || !readable {
        return Err(code::BAD_HELLO);
    }
    Ok(Hello::read_from_bytes(bytes).unwrap())
}

fn server_reads_a_hello(judge: &Judge, which: usize, bytes: &[u8], now_ns: u64) {
    let expected = is_right(bytes);
    match judge.judge(bytes, now_ns) {
        Ok((geometry, welcome)) => {
            let hello = expected.expect("what is granted was asked for");
            assert!(which < 2, "a server that is full or stopping grants nothing");
            granted(judge, &hello, geometry, &welcome, now_ns);
        }
        Err(welcome) => {
            match (expected, welcome.code) {
                (Err(expected), told) => assert_eq!(told, expected),
                (Ok(_), code::DRAINING) => assert_eq!(which, 3),
                (Ok(_), code::TOO_MANY) => assert_eq!((which, welcome.scope()), (2, Some(Scope::Sessions))),
                // Geometries: none, or too large a one.
                (Ok(hello), code::BAD_HELLO) => assert!(Geometry::unpack(hello.geometry).checked().is_err()),
                (Ok(hello), code::NO_MEMORY) => {
                    let pages = Geometry::unpack(hello.geometry).checked().unwrap().base_pages();
                    assert!(
                        pages > judge.config().max_slot_pages
                            && welcome.limit == judge.config().max_slot_pages
                    );
                }
                (Ok(_), other) => panic!("refused by code {other}"),
            }
            assert_eq!(Answer::read(welcome.as_bytes(), 0), Ok(Answer::Refused(welcome)));
        }
    }
}

/// What was granted: within what was asked for and what the limits allow, and something that a segment can be made of.
fn granted(judge: &Judge, hello: &Hello, geometry: Geometry, welcome: &Welcome, now_ns: u64) {
    let limits = judge.config();
    let asked = Geometry::unpack(hello.geometry).checked().unwrap();
    assert_eq!(geometry.checked().unwrap(), geometry);
    assert_eq!((geometry.large, geometry.medium, geometry.small), (asked.large, asked.medium, asked.small));
    assert_eq!(geometry.ring_order, asked.ring_order.min(limits.max_ring_order));
    assert!(geometry.lease_pages <= asked.lease_pages && geometry.base_pages() <= limits.max_slot_pages);
    assert_eq!(Geometry::unpack(welcome.geometry), geometry);
    let most = hello.lanes.min(limits.max_lanes).min(limits.reactors).min(lanes_max(&geometry));
    assert!(welcome.lanes == most && most >= 1);
    assert!((hello.version_min..=hello.version_max).contains(&welcome.version));
    assert_eq!(welcome.clock_offset_ns.wrapping_add(hello.now_ns), now_ns);
    assert_eq!(Answer::read(welcome.as_bytes(), 1), Ok(Answer::Granted(*welcome)));
    if segment_len(&geometry, welcome.lanes) <= LEN_MAX {
        Segment::on_heap(geometry, welcome.lanes, IDENTITY).expect("a segment of what was granted");
    }
}

fn client_reads_an_answer(bytes: &[u8], descriptors: usize, real: &OwnedFd) {
    match Answer::read(bytes, descriptors) {
        Ok(Answer::Granted(welcome)) => {
            assert_eq!(welcome.as_bytes(), bytes);
            assert!(descriptors == 1 && welcome.magic == MAGIC && welcome.code == code::OK);
            assert!((VERSION_MIN..=VERSION_MAX).contains(&welcome.version));
            // Whatever it says of a segment, that segment is taken for what it is or not at all.
            let geometry = Geometry::unpack(welcome.geometry);
            if Segment::attach(real.as_fd(), geometry, welcome.lanes, welcome.identity()).is_ok() {
                assert_eq!((geometry.checked().unwrap(), welcome.lanes), (GEOMETRY, 1));
                assert_eq!(welcome.identity(), IDENTITY);
            }
        }
        Ok(Answer::Refused(welcome)) => {
            assert!(bytes.len() == size_of::<Welcome>() && welcome.code != code::OK);
            assert!(welcome.scope().is_none() || welcome.code == code::TOO_MANY);
        }
        Ok(Answer::Ended(reason)) => assert_eq!(Goodbye::new(reason).as_bytes(), bytes),
        Err(why) => assert!(!why.is_empty()),
    }
}

fn small_messages_are_read(bytes: &[u8]) {
    if let Some(choice) = LaneRequest::read(bytes) {
        assert_eq!(LaneRequest::new(choice).as_bytes(), bytes);
    }
    if let Some(grant) = LaneGrant::read(bytes) {
        assert_eq!(grant.as_bytes(), bytes);
    }
    if let Some(reason) = Goodbye::read(bytes) {
        assert_eq!(Goodbye::new(reason).as_bytes(), bytes);
    }
    let read = [LaneRequest::read(bytes).is_some(), Goodbye::read(bytes).is_some()];
    assert!(read != [true, true], "one message is two");
}

/// A packet with descriptors, over a real socket.
fn server_hears(bytes: &[u8], descriptors: usize, real: &OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = vec![real.as_fd(); descriptors];
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&theirs, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    let mut heard = [0u8; size_of::<Hello>() + 1];
    let unused = || rustix::io::fcntl_dupfd_cloexec(real, 0).unwrap().as_raw_fd();
    let before = unused();
    let expected = match bytes.len() {
        0 => Heard::End,
        len => Heard::Packet(len.min(heard.len()), descriptors == 0 && len <= heard.len()),
    };
    assert_eq!(hear(&ours, &mut heard), expected);
    assert_eq!(unused(), before, "a descriptor stays open");
    if let Heard::Packet(len, true) = expected {
        assert_eq!(&heard[..len], bytes);
    }
    assert_eq!(hear(&ours, &mut heard), Heard::Nothing);
    drop(theirs);
    assert_eq!(hear(&ours, &mut heard), Heard::End);
}

thread_local! {
    static JUDGES: [Judge; 4] = judges();
    static REAL: (Segment, OwnedFd) = {
        let segment = Segment::create(GEOMETRY, 1, IDENTITY).unwrap();
        let memory = segment.memory().unwrap().try_clone_to_owned().unwrap();
        (segment, memory)
    };
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, rest)) = data.split_first() else { return };
    let which = usize::from(how >> 3) % 4;
    let descriptors = usize::from(how >> 3) % 17;
    let now_ns = rest.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    match how & 7 {
        0 => JUDGES.with(|judges| server_reads_a_hello(&judges[which], which, rest, now_ns)),
        1 | 2 => {
            let right = Hello::new(Geometry::default(), [1, 2], 3, "fuzz");
            let bytes = changed(right.as_bytes(), rest);
            JUDGES.with(|judges| server_reads_a_hello(&judges[which], which, &bytes, now_ns));
        }
        3 => REAL.with(|(_, real)| client_reads_an_answer(rest, descriptors.min(2), real)),
        4 => {
            let right = Welcome {
                version: VERSION_MAX,
                geometry: GEOMETRY.pack(),
                lanes: 1,
                epoch: IDENTITY.epoch,
                session: IDENTITY.session,
                ..Welcome::refusal(code::OK)
            };
            let bytes = changed(right.as_bytes(), rest);
            REAL.with(|(_, real)| client_reads_an_answer(&bytes, [1, 1, 0, 2][which], real));
        }
        5 => small_messages_are_read(rest),
        6 => {
            let requests = [LaneChoice::On(1), LaneChoice::NotOn(0)].map(|choice| LaneRequest::new(choice));
            let bye = Goodbye::new(DisconnectReason::ALL[which]);
            let right = [requests[0].as_bytes(), requests[1].as_bytes(), bye.as_bytes()][which % 3];
            small_messages_are_read(&changed(right, rest));
        }
        _ => REAL.with(|(_, real)| server_hears(rest, descriptors.min(16), real)),
    }
});

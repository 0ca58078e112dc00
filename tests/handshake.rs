//! The handshake's bytes against `shm/LAYOUT.md`.

use doorbell::protocol::handshake::{
    DisconnectReason, Goodbye, Hello, LaneChoice, LaneGrant, LaneRequest, Scope, Welcome, code,
};
use doorbell_shm::layout::Geometry;
use std::mem::offset_of;
use zerocopy::IntoBytes;

const LAYOUT: &str = include_str!("../shm/LAYOUT.md");

/// The hex bytes of the golden vector called `name`.
fn golden(name: &str) -> Vec<u8> {
    let begin =
        LAYOUT.find(&format!("```golden {name}\n")).unwrap_or_else(|| panic!("no golden vector {name}"));
    let lines = LAYOUT[begin..].lines().skip(2).take_while(|line| *line != "```");
    lines.flat_map(str::split_whitespace).map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// The (offset, field) pairs of the table that follows `title`.
fn table(title: &str) -> Vec<(usize, String)> {
    let begin = LAYOUT.find(title).unwrap_or_else(|| panic!("no table {title}"));
    let rows = LAYOUT[begin..].lines().skip_while(|line| !line.starts_with("| ---")).skip(1);
    let cells = |row: &str| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    rows.take_while(|row| row.starts_with('|'))
        .map(cells)
        .map(|cells| (cells[1].parse().unwrap(), cells[3].clone()))
        .collect()
}

macro_rules! offsets {
    ($type:ty: $($field:ident),+) => { vec![$((offset_of!($type, $field), stringify!($field).to_owned())),+] };
}

/// Goal:   the drawing and the structs cannot drift apart (trap 20).
/// Method: offsets of every field against the tables; bytes of a hello and a goodbye against golden vectors.
#[test]
fn trap20_the_handshake_is_as_drawn() {
    let hello = offsets!(Hello: magic, version_min, version_max, lanes, features, geometry, client_id, now_ns,
        reserved, name);
    assert_eq!(table("Hello, client to server"), hello);
    let welcome = offsets!(Welcome: magic, code, version, doorbell_kind, features, geometry, lanes, retry_ms,
        epoch, session, clock_offset_ns, max_message_size, version_min, version_max, limit, home_core, reactors);
    assert_eq!(table("Welcome, server to client"), welcome);
    assert_eq!(Hello::new(Geometry::default(), [1, 2], 3, "test").as_bytes(), golden("hello"));
    assert_eq!(Hello::read(&golden("hello")).unwrap().display_name(), Some("test"));
    assert_eq!(Goodbye::new(DisconnectReason::Draining).as_bytes(), golden("goodbye"));
    assert_eq!(Goodbye::read(&golden("goodbye")), Some(DisconnectReason::Draining));
    assert_eq!(LaneRequest::new(LaneChoice::On(3)).as_bytes(), golden("lane_request"));
    assert_eq!(LaneRequest::read(&golden("lane_request")), Some(LaneChoice::On(3)));
    assert_eq!(LaneGrant::new(2, 5).as_bytes(), golden("lane_grant"));
    assert_eq!(LaneGrant::read(&golden("lane_grant")), Some(LaneGrant::new(2, 5)));
}

#[test]
fn codes_are_as_drawn() {
    let drawn = "0 Ok, 1 VersionMismatch, 2 NotPermitted, 3 TooMany, 4 NoMemory, 5 Draining, 6 BadHello";
    assert!(LAYOUT.contains(drawn));
    let codes = [
        code::OK,
        code::VERSION_MISMATCH,
        code::NOT_PERMITTED,
        code::TOO_MANY,
        code::NO_MEMORY,
        code::DRAINING,
        code::BAD_HELLO,
    ];
    assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6]);
    for reason in DisconnectReason::ALL {
        assert!(LAYOUT.contains(&format!("{} {reason:?}", reason as u32)), "{reason:?}");
    }
    for scope in Scope::ALL {
        assert!(LAYOUT.contains(&format!("{} {scope:?}", scope as u32)), "{scope:?}");
    }
}

/// Goal:   F14: bytes of any kind are either a valid record or refused; nothing is read as what it is not.
/// Method: every single-bit change of good records, and cut and lengthened ones.
#[test]
fn f14_records_are_checked_before_they_are_believed() {
    let good = Hello::new(Geometry::default(), [1, 2], 3, "test");
    for bit in 0..8 * size_of::<Hello>() {
        let mut bytes = good.as_bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        match Hello::read(&bytes) {
            // Whatever is accepted is what was sent, to the bit, and has the shape that everything relies on.
            Ok(hello) => {
                assert_eq!(hello.as_bytes(), bytes);
                assert!(
                    hello.lanes > 0 && hello.reserved == 0 && hello.display_name().is_some(),
                    "bit {bit}"
                );
            }
            Err(code) => assert!([code::BAD_HELLO, code::VERSION_MISMATCH].contains(&code), "bit {bit}"),
        }
        let geometry = Geometry::unpack(u64::from_le_bytes(bytes[24..32].try_into().unwrap()));
        if let Ok(geometry) = geometry.checked() {
            assert!(geometry.base_pages() >= 1 && geometry.slot_pages() <= 1024, "bit {bit}: {geometry:?}");
        }
    }
    for len in (0..200).filter(|len| *len != size_of::<Hello>()) {
        let bytes: Vec<u8> = good.as_bytes().iter().copied().cycle().take(len).collect();
        assert_eq!(Hello::read(&bytes), Err(code::BAD_HELLO), "{len} bytes");
        assert_eq!(Goodbye::read(&bytes), None);
    }
}

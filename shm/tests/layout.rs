//! `LAYOUT.md` and the code say the same: its tables and golden vectors are read here and compared with
//! what the code does, in both directions (trap 20).
#![cfg(not(loom))]

use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::{Completion, Status, Submission, codec, flag, kind, tlv};
use doorbell_shm::layout::{self, Geometry, LaneLayout, header, state};
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::meta;
use doorbell_shm::ring::{self, Entry, LAP_MASK, Producer};
use doorbell_shm::segment::{Identity, Segment};
use doorbell_shm::slots::{ClientWord, ServerWord};
use doorbell_shm::{SegmentError, bell};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

const DOC: &str = include_str!("../LAYOUT.md");

// ---- reading the document ----

/// The rows of the table marked `name`, each as its cells, without the head.
fn table(name: &str) -> Vec<Vec<String>> {
    let mark = format!("<!-- table: {name} -->");
    let rest = DOC.split_once(&mark).unwrap_or_else(|| panic!("LAYOUT.md has no table {name}")).1;
    let rows: Vec<_> = rest
        .trim_start()
        .lines()
        .take_while(|l| l.starts_with('|'))
        .skip(2)
        .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>())
        .collect();
    assert!(!rows.is_empty(), "table {name} is empty");
    rows
}

/// Name and value of each row of a table of numbers.
fn numbers(name: &str) -> BTreeMap<String, u64> {
    table(name).into_iter().map(|r| (r[0].clone(), r[1].parse().expect("a decimal number"))).collect()
}

/// A `a-b` cell as a half-open range.
fn bits(cell: &str) -> Range<u32> {
    let (a, b) = cell.split_once('-').expect("bits are written first-last");
    a.parse().unwrap()..b.parse::<u32>().unwrap() + 1
}

/// A mask with the bits of `range` set.
fn mask(range: &Range<u32>) -> u64 {
    (u64::MAX >> (64 - range.len() as u32)) << range.start
}

/// A golden vector: what it is called, its fields and its bytes.
struct Golden {
    what: String,
    fields: BTreeMap<String, u64>,
    bytes: Vec<u8>,
}

impl Golden {
    /// The golden vectors of `kind`, one of those below.
    fn named(kind: &str) -> Vec<Self> {
        let mut found = Vec::new();
        for block in DOC.split("```golden ").skip(1) {
            let block = block.split_once("```").expect("a fence is closed").0;
            let (what, body) = block.split_once('\n').expect("a block has lines");
            let of = what.split_whitespace().next().expect("a block has a kind");
            let known = ["submission", "completion", "metadata", "client_word", "server_word", "header"];
            // The handshake's are read by the test of the code that writes them.
            assert!(
                known.contains(&of)
                    || ["hello", "welcome", "goodbye", "lane_request", "lane_grant"].contains(&of),
                "nobody reads {of}"
            );
            if of == kind {
                found.push(Self::read(what, body));
            }
        }
        found
    }

    fn read(what: &str, body: &str) -> Self {
        let (mut fields, mut bytes) = (BTreeMap::new(), Vec::new());
        for token in body.split_whitespace() {
            match token.split_once('=') {
                Some((name, value)) => {
                    fields.insert(name.to_owned(), value.parse().expect("a decimal number"));
                }
                None => bytes.push(u8::from_str_radix(token, 16).expect("a hexadecimal byte")),
            }
        }
        Self { what: what.trim().to_owned(), fields, bytes }
    }

    fn get(&self, name: &str) -> u64 {
        *self.fields.get(name).unwrap_or_else(|| panic!("{} lacks {name}", self.what))
    }
}

// ---- reading the code ----

/// The names of the `pub const`s of a module (or a whole file) of the crate's source.
fn constants(source: &str, module: Option<&str>) -> BTreeSet<String> {
    let text = match module {
        Some(module) => {
            let head = format!("pub mod {module} {{");
            source.split_once(&head).expect("the module exists").1.split_once("\n}").expect("it ends").0
        }
        None => source,
    };
    let indent = if module.is_some() { "    pub const " } else { "pub const " };
    text.lines()
        .filter_map(|l| l.strip_prefix(indent)?.split_once(':'))
        .map(|(name, _)| name.to_owned())
        .filter(|name| !name.starts_with("fn "))
        .collect()
}

const LAYOUT_RS: &str = include_str!("../src/layout.rs");
const ENTRY_RS: &str = include_str!("../src/entry.rs");
const BELL_RS: &str = include_str!("../src/bell.rs");

/// The listed constants by name.
macro_rules! named {
    ($path:ident { $($name:ident),* $(,)? }) => {
        BTreeMap::from([$((stringify!($name).to_owned(), u64::from($path::$name))),*])
    };
}

/// Every field of a submission, set by name. A new field does not compile until it is named here.
fn submission(get: impl Fn(&str) -> u64) -> Submission {
    Submission {
        kind: get("kind") as u8,
        flags: get("flags") as u16,
        codec: get("codec") as u8,
        message_type: get("message_type") as u32,
        connection: get("connection") as u32,
        slot: get("slot") as u32,
        generation: get("generation") as u32,
        len: get("len") as u32,
        meta_len: get("meta_len") as u16,
        response_count: get("response_count") as u16,
        response_slot: get("response_slot") as u32,
        frame: get("frame") as u32,
        body_len: get("body_len"),
        deadline: get("deadline"),
        payload_slot: get("payload_slot") as u32,
        lease_epoch: get("lease_epoch") as u32,
    }
}

/// Every field of a completion, set by name.
fn completion(get: impl Fn(&str) -> u64) -> Completion {
    Completion {
        kind: get("kind") as u8,
        status: get("status") as u8,
        flags: get("flags") as u16,
        slot: get("slot") as u32,
        generation: get("generation") as u32,
        len: get("len") as u32,
        frame: get("frame") as u32,
        detail: get("detail"),
    }
}

/// The bytes that a producer leaves in a ring for `words` in lap `lap`.
fn as_published<const W: usize>(words: [u64; W], lap: u32) -> Vec<u8> {
    let map = Mapping::on_heap(PAGE);
    let position = map.object::<AtomicU32>(PAGE - 4).unwrap();
    let entries = map.slice::<Entry<W>>(0, 8).unwrap();
    let at = u64::from(lap.wrapping_sub(1)) << 3;
    assert_eq!(ring::lap(at, 3), lap);
    let mut producer = Producer::starting_at(entries, position, at);
    assert_eq!(producer.push(words), Ok(true));
    let mut bytes = vec![0; 8 * W];
    SharedBytes::new(&map, 0, 8 * W).unwrap().read(0, &mut bytes);
    bytes
}

fn words_of<const W: usize>(bytes: &[u8]) -> [u64; W] {
    std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap()))
}

// ---- golden vectors ----

/// Goal:   what a client in another language writes by the document is what this code reads, and the
///         other way round (trap 20).
/// Method: every golden submission is packed, pushed into a ring at its lap and compared byte by byte; its
///         bytes are unpacked and compared field by field.
#[test]
fn trap20_golden_submissions_are_what_the_code_writes_and_reads() {
    let golden = Golden::named("submission");
    assert_eq!(golden.len(), 3, "CALL, OPEN and FRAME");
    for g in golden {
        let entry = submission(|name| g.get(name));
        assert_eq!(as_published(entry.pack(), g.get("lap") as u32), g.bytes, "{}", g.what);
        assert_eq!(Submission::unpack(words_of(&g.bytes)), Ok(entry), "{}", g.what);
        let kind_name = g.what.split_whitespace().nth(1).unwrap();
        assert_eq!(numbers("kind")[kind_name], g.get("kind"), "{} has another kind", g.what);
    }
}

/// Goal:   as for submissions, for completions (trap 20).
/// Method: as for submissions.
#[test]
fn trap20_golden_completions_are_what_the_code_writes_and_reads() {
    let golden = Golden::named("completion");
    assert_eq!(golden.len(), 3, "two REPLYs and a FRAME");
    for g in golden {
        let entry = completion(|name| g.get(name));
        assert_eq!(as_published(entry.pack(), g.get("lap") as u32), g.bytes, "{}", g.what);
        assert_eq!(Completion::unpack(words_of(&g.bytes)), Ok(entry), "{}", g.what);
        let kind_name = g.what.split_whitespace().nth(1).unwrap();
        assert_eq!(numbers("kind")[kind_name], g.get("kind"), "{} has another kind", g.what);
    }
}

/// Goal:   slot words mean to both sides what the document says (trap 20).
/// Method: packed and unpacked against the golden bytes.
#[test]
fn trap20_golden_slot_words_are_what_the_code_writes_and_reads() {
    let g = &Golden::named("client_word")[0];
    let word = ClientWord {
        generation: g.get("generation") as u32,
        cancelled: g.get("cancelled") == 1,
        released: g.get("released") as u32,
    };
    assert_eq!(word.pack().to_le_bytes().as_slice(), g.bytes);
    assert_eq!(ClientWord::unpack(words_of::<1>(&g.bytes)[0]), word);
    let g = &Golden::named("server_word")[0];
    let word = ServerWord { generation: g.get("generation") as u32, taken: g.get("taken") as u32 };
    assert_eq!(word.pack().to_le_bytes().as_slice(), g.bytes);
    assert_eq!(ServerWord::unpack(words_of::<1>(&g.bytes)[0]), word);
}

/// Goal:   metadata is what the document says (trap 20).
/// Method: the golden block is written and read; its value is the text above it.
#[test]
fn trap20_golden_metadata_is_what_the_code_writes_and_reads() {
    let g = &Golden::named("metadata")[0];
    let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    assert!(DOC.contains(&format!("with the traceparent `{text}`")));
    assert_eq!((g.get("type"), g.get("len")), (u64::from(tlv::TRACEPARENT), text.len() as u64));
    let mut block = vec![0xff; meta::element_len(text.len())];
    meta::put(&mut block, tlv::TRACEPARENT, text.as_bytes());
    assert_eq!(block, g.bytes);
    let elements: Vec<_> = meta::Elements::new(&g.bytes).collect();
    assert_eq!(elements, [Ok((tlv::TRACEPARENT, text.as_bytes()))]);
}

/// Goal:   the header is what the document says, all 256 bytes of it (trap 20).
/// Method: a segment of the default geometry on the heap, compared byte by byte; then its state changes,
///         and with it the eight bytes at STATE and no others.
#[test]
fn trap20_the_golden_header_is_what_the_code_writes() {
    let g = &Golden::named("header")[0];
    let identity = Identity { epoch: g.get("epoch"), session: [g.get("session0"), g.get("session1")] };
    let segment = Segment::on_heap(Geometry::default(), 1, identity).unwrap();
    let bytes = SharedBytes::new(segment.mapping(), 0, layout::HEADER_LEN).unwrap();
    let mut found = [0; layout::HEADER_LEN];
    bytes.read(0, &mut found);
    assert_eq!(found.as_slice(), g.bytes);
    assert_eq!(segment.state(), (g.get("state") as u32, g.get("reason") as u32));

    segment.set_state(state::CLOSED, 0x0a0b_0c0d);
    assert_eq!(segment.state(), (state::CLOSED, 0x0a0b_0c0d));
    let mut expected = g.bytes.clone();
    expected[header::STATE..header::STATE + 8].copy_from_slice(&[2, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a]);
    bytes.read(0, &mut found);
    assert_eq!(found.as_slice(), expected);
}

// ---- tables of numbers ----

/// Goal:   every number has one value, here and there, and none is missing on either side.
/// Method: names from the source text, values from the compiled constants, both against the table.
#[test]
fn trap20_every_number_of_the_document_is_one_of_the_code_and_the_other_way_round() {
    let check = |name: &str, source: Option<(&str, Option<&str>)>, code: BTreeMap<String, u64>| {
        assert_eq!(numbers(name), code, "table {name}");
        if let Some((text, module)) = source {
            assert_eq!(constants(text, module), code.keys().cloned().collect(), "constants of {name}");
        }
    };
    check(
        "kind",
        Some((ENTRY_RS, Some("kind"))),
        named!(kind { CALL, FRAME, OPEN, CLOSE, ATTACH, REPLY, CALLBACK, LEASE, RETURN }),
    );
    let mut flags = constants(ENTRY_RS, Some("flag"));
    assert!(flags.remove("SUBMISSION") && flags.remove("COMPLETION"), "the two sums");
    let named_flags = named!(flag { MORE, END, HANDOFF, IDEMPOTENT, META, BULK, LEASED });
    assert_eq!(flags, named_flags.keys().cloned().collect());
    check("flag", None, named_flags);
    check("codec", Some((ENTRY_RS, Some("codec"))), named!(codec { RAW, JSON, RKYV }));
    check("tlv", Some((ENTRY_RS, Some("tlv"))), named!(tlv { TRACEPARENT, IDEMPOTENCY }));
    check("state", Some((LAYOUT_RS, Some("state"))), named!(state { RUNNING, DRAINING, CLOSED }));
    let server = named!(bell { AWAKE, ASLEEP, ASLEEP_WANTS_SPACE });
    let client = named!(bell { WAITER_FUTEX, WAITER_SOCKET });
    let both: BTreeSet<String> = server.keys().chain(client.keys()).cloned().collect();
    assert_eq!(constants(BELL_RS, None), both);
    check("server_bell", None, server);
    check("client_bell", None, client);
}

/// Goal:   the limits are the same in both.
/// Method: as above; PAGE lives in another file than the others.
#[test]
fn trap20_every_limit_of_the_document_is_one_of_the_code() {
    let mut doc = numbers("limits");
    assert_eq!(doc.remove("PAGE"), Some(PAGE as u64));
    let code: BTreeMap<String, u64> = [
        ("MAGIC", layout::MAGIC),
        ("VERSION", layout::VERSION.into()),
        ("LINE", layout::LINE as u64),
        ("HEADER_LEN", layout::HEADER_LEN as u64),
        ("LANES_MAX", layout::LANES_MAX.into()),
        ("RING_ORDER_MIN", layout::RING_ORDER_MIN.into()),
        ("RING_ORDER_MAX", layout::RING_ORDER_MAX.into()),
        ("LANE_PAGES_MAX", layout::LANE_PAGES_MAX.into()),
        ("SLOT_SMALL", layout::SLOT_SMALL as u64),
        ("SLOT_MEDIUM", layout::SLOT_MEDIUM as u64),
        ("SLOT_LARGE", layout::SLOT_LARGE as u64),
        ("SLOTS_PER_PAGE", layout::SLOTS_PER_PAGE.into()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    assert_eq!(doc, code);
    assert_eq!(constants(LAYOUT_RS, None), code.keys().cloned().collect());
    assert_eq!(layout::MAGIC.to_le_bytes(), *b"DOORBELL");
}

/// Goal:   status codes are the same in both, for all 256 of them.
/// Method: `from_code` of every byte against the table.
#[test]
fn trap20_every_status_code_is_in_the_document() {
    let code: BTreeMap<String, u64> =
        (0..=255u8).filter_map(|c| Status::from_code(c).map(|s| (format!("{s:?}"), u64::from(c)))).collect();
    assert_eq!(numbers("status"), code);
}

/// Goal:   the flags allowed in each ring are those that the document allows there.
/// Method: the sums in the code against the column of the table.
#[test]
fn trap20_flags_are_allowed_where_the_document_allows_them() {
    let allowed = |rings: &[&str]| -> u64 {
        table("flag")
            .iter()
            .filter(|r| rings.contains(&r[2].as_str()))
            .map(|r| r[1].parse::<u64>().unwrap())
            .sum()
    };
    assert_eq!(allowed(&["both", "submission"]), u64::from(flag::SUBMISSION));
    assert_eq!(allowed(&["both", "completion"]), u64::from(flag::COMPLETION));
}

// ---- tables of fields ----

/// The (field, word, bits) of a table of entry fields; word 0 where the table has no such column.
fn fields(name: &str) -> Vec<(String, usize, Range<u32>)> {
    table(name)
        .into_iter()
        .map(|r| match r[0].parse() {
            Ok(word) => (r[3].clone(), word, bits(&r[1])),
            Err(_) => (r[2].clone(), 0, bits(&r[0])),
        })
        .collect()
}

/// Every bit of `words` 64-bit words belongs to exactly one field of the table.
fn assert_covers(name: &str, words: usize) {
    let mut seen = vec![0u64; words];
    for (field, word, range) in fields(name) {
        assert_eq!(seen[word] & mask(&range), 0, "{name}.{field} overlaps another field");
        seen[word] |= mask(&range);
    }
    assert!(seen.iter().all(|w| *w == u64::MAX), "{name} leaves bits undrawn: {seen:x?}");
}

/// Goal:   each field of a ring entry lies where the table draws it, and no bit is undrawn.
/// Method: one field at a time is set to ones and packed; exactly the drawn bits must come out. The
///         struct is built by name from the table, so neither side can have a field more.
#[test]
fn trap20_entry_fields_lie_where_the_document_draws_them() {
    assert_covers("submission", 8);
    assert_covers("completion", 4);
    let drawn = |name: &str| -> BTreeSet<String> { fields(name).into_iter().map(|f| f.0).collect() };
    for (table, words) in [("submission", 8), ("completion", 4)] {
        for (field, word, range) in fields(table) {
            let asked = std::cell::RefCell::new(BTreeSet::from(["lap".to_owned()]));
            let get = |name: &str| {
                asked.borrow_mut().insert(name.to_owned());
                if name == field { u64::MAX } else { 0 }
            };
            let mut packed = vec![0; words];
            if table == "submission" {
                packed.copy_from_slice(&submission(get).pack());
            } else {
                packed.copy_from_slice(&completion(get).pack());
            }
            let mut expected = vec![0; words];
            if field != "lap" {
                expected[word] = mask(&range);
            }
            assert_eq!(packed, expected, "{table}.{field}");
            assert_eq!(*asked.borrow(), drawn(table), "fields of {table}");
        }
    }
    assert_eq!(LAP_MASK, mask(&fields("submission")[0].2));
}

/// Goal:   the fields of slot words and of the packed geometry lie where the tables draw them.
/// Method: as above.
#[test]
fn trap20_word_fields_lie_where_the_document_draws_them() {
    assert_covers("client_word", 1);
    assert_covers("server_word", 1);
    for (field, _, range) in fields("client_word") {
        let word = match field.as_str() {
            "generation" => ClientWord { generation: u32::MAX, ..Default::default() },
            "cancelled" => ClientWord { cancelled: true, ..Default::default() },
            "released" => ClientWord { released: u32::MAX >> 1, ..Default::default() },
            other => panic!("no field {other}"),
        };
        assert_eq!(word.pack(), mask(&range), "{field}");
        assert_eq!(ClientWord::unpack(mask(&range)), word, "{field}");
    }
    for (field, _, range) in fields("server_word") {
        let word = match field.as_str() {
            "generation" => ServerWord { generation: u32::MAX, ..Default::default() },
            "taken" => ServerWord { taken: u32::MAX, ..Default::default() },
            other => panic!("no field {other}"),
        };
        assert_eq!(word.pack(), mask(&range), "{field}");
        assert_eq!(ServerWord::unpack(mask(&range)), word, "{field}");
    }
    let none = Geometry { ring_order: 0, large: 0, medium: 0, small: 0, lease_pages: 0 };
    let mut seen = 0;
    for (field, _, range) in fields("geometry") {
        let geometry = match field.as_str() {
            "ring_order" => Geometry { ring_order: u8::MAX, ..none },
            "lease_pages" => Geometry { lease_pages: u16::MAX, ..none },
            "small" => Geometry { small: u16::MAX, ..none },
            "medium" => Geometry { medium: 0xfff, ..none },
            "large" => Geometry { large: 0xfff, ..none },
            other => panic!("no field {other}"),
        };
        assert_eq!(geometry.pack(), mask(&range), "{field}");
        assert_eq!(Geometry::unpack(mask(&range)), geometry, "{field}");
        seen |= mask(&range);
    }
    assert_eq!(seen, u64::MAX, "every bit of the geometry is drawn");
}

/// Goal:   the header's fields lie where the table draws them, without gap or overlap.
/// Method: offsets against the constants by name, both ways; lengths add up to the header.
#[test]
fn trap20_header_fields_lie_where_the_document_draws_them() {
    let mut next = 0;
    let mut doc = BTreeMap::new();
    for row in table("header") {
        let (offset, len): (u64, u64) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!(offset, next, "{} follows the field before it", row[3]);
        next = offset + len;
        if row[3] != "reserved" {
            doc.insert(row[3].clone(), offset);
        }
    }
    assert_eq!(next, layout::HEADER_LEN as u64);
    let code = [
        ("MAGIC", header::MAGIC),
        ("VERSION", header::VERSION),
        ("FEATURES_REQUIRED", header::FEATURES_REQUIRED),
        ("FEATURES_OPTIONAL", header::FEATURES_OPTIONAL),
        ("EPOCH", header::EPOCH),
        ("SESSION", header::SESSION),
        ("GEOMETRY", header::GEOMETRY),
        ("STATE", header::STATE),
        ("DIRECTORY", header::DIRECTORY),
    ]
    .map(|(name, offset)| (name.to_owned(), offset as u64));
    assert_eq!(doc, BTreeMap::from(code));
    assert_eq!(constants(LAYOUT_RS, Some("header")), doc.into_keys().collect());
    assert_eq!(header::DIRECTORY + 2 * layout::LANES_MAX as usize, layout::HEADER_LEN);
}

/// Who writes a region of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Server,
    Client,
    Both,
}

/// Every region of a lane: name as in the document, bytes, writer. Takes the layout apart completely, so
/// that a new field does not compile until it is named here.
fn regions(lane: &LaneLayout, geometry: &Geometry) -> Vec<(&'static str, Range<usize>, Writer)> {
    use Writer::*;
    let LaneLayout {
        published,
        consumed,
        using,
        server_bell,
        client_bell,
        hints,
        hint_words,
        void_before,
        gone_before,
        client_words,
        server_words,
        submissions,
        completions,
        slots,
        end,
    } = *lane;
    let n = geometry.ring_len() as usize;
    let base = 4 * geometry.base_pages() as usize;
    assert_eq!(published[1], published[0] + 4);
    assert_eq!((consumed[1], using), (consumed[0] + 4, consumed[0] + 8));
    assert_eq!(gone_before, void_before + 4);
    let at = |start: usize, len: usize| start..start + len;
    vec![
        ("published", at(published[0], 8), Server),
        ("consumed", at(consumed[0], 12), Client),
        ("server_bell", at(server_bell, 4), Both),
        ("client_bell", at(client_bell, 4), Both),
        ("hints", at(hints, 8 + 8 * hint_words), Both),
        ("lease_epochs", at(void_before, 8), Server),
        ("client_words", at(client_words, 8 * base), Client),
        ("server_words", at(server_words, 8 * base), Server),
        ("submissions[0]", at(submissions[0], 64 * n), Client),
        ("completions[0]", at(completions[0], 32 * n), Server),
        ("submissions[1]", at(submissions[1], 64 * n), Client),
        ("completions[1]", at(completions[1], 32 * n), Server),
        ("slots", slots..end, Both),
    ]
}

/// Goal:   the parts of the home lane lie where the document draws them for the default geometry.
/// Method: offsets and writers of the table against `LaneLayout`, in order and completely.
#[test]
fn trap20_the_default_lane_lies_where_the_document_draws_it() {
    let geometry = Geometry::default();
    let lane = LaneLayout::home(&geometry);
    let mut doc: Vec<(String, usize, String)> =
        table("lane").into_iter().map(|r| (r[3].clone(), r[0].parse().unwrap(), r[4].clone())).collect();
    assert_eq!(doc.pop(), Some(("end".to_owned(), lane.end, "–".to_owned())));
    let writer = |name: &str, w: Writer| match (name, w) {
        ("slots", _) => "holder",
        (_, Writer::Server) => "server",
        (_, Writer::Client) => "client",
        (_, Writer::Both) => "both",
    };
    let code: Vec<(String, usize, String)> = regions(&lane, &geometry)
        .into_iter()
        .map(|(name, range, w)| (name.to_owned(), range.start, writer(name, w).to_owned()))
        .collect();
    assert_eq!(doc, code);
    assert_eq!(layout::segment_len(&geometry, 1), lane.end);
}

/// Goal:   the drawing of the segment shows the same offsets as the table below it.
/// Method: every number that starts a line of the drawing is a start or the end of a region.
#[test]
fn trap20_the_drawing_shows_the_offsets_of_the_table() {
    let geometry = Geometry::default();
    let lane = LaneLayout::home(&geometry);
    let drawing = DOC.split_once("```text").unwrap().1.split_once("```").unwrap().0;
    let drawn: BTreeSet<usize> =
        drawing.lines().filter_map(|l| l.split_whitespace().next()?.parse().ok()).collect();
    let mut known: BTreeSet<usize> = regions(&lane, &geometry).into_iter().map(|(_, r, _)| r.start).collect();
    known.extend([0, lane.completions[1] + 32 * geometry.ring_len() as usize, lane.end]);
    assert_eq!(drawn, known);
}

// ---- any geometry ----

/// Goal:   small sessions stay small: header and head of the home lane fill exactly one page (P1).
/// Method: both named geometries; the slot region begins at the second page.
#[test]
fn header_and_lane_head_of_the_default_and_the_smallest_geometry_fit_one_page() {
    for geometry in [Geometry::default(), Geometry::SMALLEST] {
        assert_eq!(geometry.checked().unwrap(), geometry);
        let lane = LaneLayout::home(&geometry);
        assert_eq!(lane.slots, PAGE);
        assert_eq!(lane.published[0], layout::HEADER_LEN);
        assert_eq!(lane.end, PAGE * (1 + geometry.slot_pages() as usize));
    }
}

/// Any geometry that `checked` accepts.
fn geometries() -> impl Strategy<Value = Geometry> {
    let order = layout::RING_ORDER_MIN..=layout::RING_ORDER_MAX;
    (order, 0..=64u16, 0..=256u16, 0..=1024u16, 0..=512u16).prop_filter_map(
        "within the limits",
        |(ring_order, large, medium, small, lease_pages)| {
            Geometry { ring_order, large, medium, small, lease_pages }.checked().ok()
        },
    )
}

fn config() -> ProptestConfig {
    let cases = if cfg!(miri) { 4 } else { 256 };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    /// Goal:   no line is written by both sides, no region overlaps another, none leaves the segment.
    /// Method: any geometry; the lines of each region are disjoint from those of every other (which is
    ///         stronger than different writers), in the order drawn, from the header to the end.
    #[test]
    fn regions_never_share_a_line_and_all_lie_inside(geometry in geometries(), page in 0..3usize) {
        let start = if page == 0 { layout::HEADER_LEN } else { page * PAGE };
        let lane = LaneLayout::at(start, &geometry);
        let mut next = start;
        for (name, range, _) in regions(&lane, &geometry) {
            prop_assert!(range.start >= next, "{} at {} overlaps what ends at {}", name, range.start, next);
            prop_assert!(range.start.is_multiple_of(layout::LINE), "{} begins inside a line", name);
            prop_assert!(range.start - next < PAGE, "a hole before {}", name);
            next = range.end.next_multiple_of(layout::LINE);
        }
        prop_assert_eq!(next, lane.end);
        prop_assert!(lane.end.is_multiple_of(PAGE) && lane.slots.is_multiple_of(PAGE));
        prop_assert!(lane.hint_words <= 64, "one summary word is enough");
        prop_assert!(geometry.admitted() < geometry.ring_len());
    }

    /// Goal:   slots never overlap and fill the base pages exactly; large ones lie on aligned pages.
    /// Method: any geometry; every slot number in order.
    #[test]
    fn slots_tile_the_base_pages_and_large_ones_are_aligned_in_page_numbers(geometry in geometries()) {
        let mut next = 0;
        let mut count = [0; 3];
        for slot in 0..4 * geometry.slot_pages() {
            let capacity = geometry.base_capacity(slot);
            if capacity == 0 {
                continue;
            }
            prop_assert_eq!(LaneLayout::slot_offset(slot), next);
            next += capacity;
            match capacity {
                layout::SLOT_LARGE => {
                    prop_assert!((slot / 4).is_multiple_of(4) && slot.is_multiple_of(4));
                    count[0] += 1;
                }
                layout::SLOT_MEDIUM => {
                    prop_assert!(slot.is_multiple_of(4));
                    count[1] += 1;
                }
                layout::SLOT_SMALL => count[2] += 1,
                other => prop_assert!(false, "no class has {} bytes", other),
            }
        }
        prop_assert_eq!(next, geometry.base_pages() as usize * PAGE);
        prop_assert_eq!(count, [geometry.large, geometry.medium, geometry.small]);
        prop_assert_eq!(geometry.base_capacity(u32::MAX), 0);
    }

    /// Goal:   a geometry survives the header and the handshake.
    /// Method: packed and unpacked.
    #[test]
    fn a_checked_geometry_is_unpacked_as_it_was_packed(geometry in geometries()) {
        prop_assert_eq!(Geometry::unpack(geometry.pack()), geometry);
        prop_assert_eq!(geometry.checked().unwrap(), geometry);
    }

    /// Goal:   whatever a peer packs, checking it neither panics nor lets a limit pass.
    /// Method: any word; what is accepted obeys every limit.
    #[test]
    fn a_geometry_from_a_peer_is_within_the_limits_or_refused(word: u64) {
        match Geometry::unpack(word).checked() {
            Ok(g) => {
                prop_assert!((layout::RING_ORDER_MIN..=layout::RING_ORDER_MAX).contains(&g.ring_order));
                prop_assert!((1..=layout::LANE_PAGES_MAX).contains(&g.slot_pages()));
                prop_assert!(g.base_pages() >= 1 && g.small.is_multiple_of(4));
            }
            Err(e) => prop_assert!(matches!(e, SegmentError::Geometry { .. }), "{}", e),
        }
    }
}

/// Goal:   every limit of a geometry holds at its edge.
/// Method: the last value inside and the first outside of each.
#[test]
fn a_geometry_outside_a_limit_is_refused_by_name() {
    let g = Geometry::SMALLEST;
    let refused = |g: Geometry| match g.checked() {
        Err(SegmentError::Geometry { what, .. }) => what,
        other => panic!("{g:?} gave {other:?}"),
    };
    assert_eq!(refused(Geometry { ring_order: 2, ..g }), "ring order");
    assert_eq!(refused(Geometry { ring_order: 11, ..g }), "ring order");
    assert_eq!(refused(Geometry { small: 0, ..g }), "number of base slot pages");
    assert_eq!(refused(Geometry { lease_pages: 1024, ..g }), "number of slot pages");
    assert_eq!(refused(Geometry { small: u16::MAX, ..g }), "number of slot pages");
    assert_eq!(refused(Geometry { large: u16::MAX, ..g }), "number of slot pages");
    for good in [
        Geometry { ring_order: 3, ..g },
        Geometry { ring_order: 10, ..g },
        Geometry { lease_pages: 1023, ..g },
        Geometry { small: 4096, ..g },
        Geometry { large: 256, small: 0, ..g },
    ] {
        assert_eq!(good.checked().unwrap(), good);
    }
    assert_eq!(Geometry { small: 1, ..g }.checked().unwrap().small, 4, "whole pages");
}

/// Goal:   admission leaves space for frames in every ring: N − max(1, N/64) calls (P4).
/// Method: every ring order, against the rule worked out by hand.
#[test]
fn admission_reserves_a_terminal_completion_for_every_call() {
    let expected = [(3, 7), (4, 15), (5, 31), (6, 63), (7, 126), (8, 252), (9, 504), (10, 1008)];
    for (ring_order, admitted) in expected {
        assert_eq!(Geometry { ring_order, ..Geometry::SMALLEST }.admitted(), admitted);
    }
}

/// Goal:   the mapping that tests scribble on is the one that the segment uses.
/// Method: a header word is changed through a second view and seen through the first.
#[test]
fn two_views_of_a_segment_are_the_same_memory() {
    let segment = Segment::on_heap(Geometry::SMALLEST, 1, Identity { epoch: 1, session: [2, 3] }).unwrap();
    let words = segment.mapping().slice::<std::sync::atomic::AtomicU64>(0, layout::HEADER_LEN / 8).unwrap();
    words[header::STATE / 8].store(7 | 9 << 32, Ordering::Release);
    assert_eq!(segment.state(), (7, 9));
    assert_eq!((segment.len(), segment.is_empty()), (2 * PAGE, false));
}

/// Goal:   an entry taken for a plain call says exactly what unpacking it says.
/// Method: entries one change away from a plain one: either not plain, or unpacked alike but for the hint
///         that the caller sleeps, which a plain call does not need.
#[test]
fn what_is_plain_is_what_unpacking_says() {
    use doorbell_shm::entry::{Submission, flag, kind};
    let plain = Submission {
        kind: kind::CALL,
        flags: flag::END,
        codec: 1,
        message_type: 300,
        connection: 0x0010_0007,
        slot: 9,
        generation: 77,
        len: 500,
        response_count: 1,
        response_slot: 9,
        body_len: 500,
        ..Submission::default()
    };
    assert_eq!(Submission::plain(&plain.pack()), Some(plain));
    let mut taken = 0;
    for word in 0..8 {
        for bit in 0..64 {
            let mut words = plain.pack();
            words[word] ^= 1 << bit;
            if let Some(call) = Submission::plain(&words) {
                let unpacked = Submission::unpack(words).unwrap();
                let flags = unpacked.flags & !flag::HANDOFF;
                assert_eq!(call, Submission { flags, ..unpacked }, "word {word} bit {bit}");
                taken += 1;
            }
        }
    }
    // Lap, HANDOFF, codec, type, connection, generation; slot and length are each told in two places.
    assert_eq!(taken, 32 + 1 + 8 + 64 + 32);
    assert_eq!(Submission::plain(&[0; 8]), None);
}

//! What hostile clients write into their segments and onto their sockets, and that nobody else notices:
//! FAULTS F11 to F31, S1 to S9. Every attack has a bystander who was there before it.

mod common;

use common::process::ServerProcess;
use common::raw::{
    BEYOND, Heard, LARGE, MEDIUM, Raw, SMALL, connect_silently, hear, hear_goodbye, hear_refusal, hello,
    send, send_with_fds,
};
use common::{Bystander, COUNT, GATE, PANIC, READ_TWICE, REFUSE, TestServer, client, eventually};
use doorbell::protocol::handshake::{DisconnectReason, Hello, Scope, VERSION_MAX, VERSION_MIN, code};
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, MessageType, ServerConfig, WaitPolicy};
use doorbell_shm::entry::{Completion, Status, Submission, codec, flag, kind};
use doorbell_shm::lane::{BULK, INTERACTIVE};
use doorbell_shm::layout::{HEADER_LEN, LaneLayout, SLOT_LARGE};
use doorbell_shm::slots::ClientWord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, Mode, SealFlags};
use rustix::io::Errno;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;
use zerocopy::IntoBytes;

const ECHO: u32 = MessageType::ECHO.0;
const ALL: [WaitPolicy; 3] = [WaitPolicy::Block, WaitPolicy::Spin, WaitPolicy::Handoff];

/// An attack and its name.
struct Attack(String, Box<dyn Fn(&mut Raw)>);

fn attack(name: impl Into<String>, attack: impl Fn(&mut Raw) + 'static) -> Attack {
    Attack(name.into(), Box::new(attack))
}

/// A call that would be right but for one thing.
fn wrong_call(name: impl Into<String>, change: impl Fn(&mut Submission) + 'static) -> Attack {
    attack(name, move |raw| {
        let mut entry = raw.entry(COUNT.0, SMALL, b"12345678");
        change(&mut entry);
        raw.push(INTERACTIVE, &entry);
    })
}

/// Runs each attack in a session of its own and expects that it ends that session, that the offender is
/// told on the socket and in the header, that it is counted, that no handler ran, and that the bystander
/// and the server go on.
fn each_ends_its_own_session(attacks: &[Attack]) {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        for (i, Attack(name, attack)) in attacks.iter().enumerate() {
            let mut raw = Raw::connect(server.path());
            attack(&mut raw);
            raw.ring();
            assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation, "{name}");
            bystander.check(name);
            assert_eq!(bystander.stat("protocol_violations"), i as u64 + 1, "{name}");
        }
        assert_eq!(server.state.counted.load(SeqCst), 0, "a handler ran for a broken entry");
        drop(bystander);
        let metrics = server.stop();
        assert_eq!(metrics.ended(DisconnectReason::ProtocolViolation), attacks.len() as u64);
    }
}

/// Goal:   no sequence that a client can write makes the server run an entry that was not published.
/// Method: laps before, between and far beyond the two possible ones, on both rings, in the first lap and
///         after a wrap; the entry itself would be right.
#[test]
fn f11_s4_a_lap_that_is_neither_expected_nor_the_one_before_ends_the_session() {
    let mut attacks = Vec::new();
    for ring in [INTERACTIVE, BULK] {
        for calls in [0, 9, 17] {
            for off in [1, 2, 1000, 1 << 31, 2u32.wrapping_neg(), 3u32.wrapping_neg()] {
                attacks.push(attack(
                    format!("lap off by {} on ring {ring} after {calls} calls", off as i32),
                    move |raw| {
                        if ring == BULK {
                            raw.connection = raw.open(codec::RAW, flag::BULK);
                        }
                        for _ in 0..calls {
                            let entry = raw.entry(ECHO, SMALL, b"right");
                            assert_eq!(raw.call_on(ring, &entry).status, Status::Ok as u8);
                        }
                        let entry = raw.entry(COUNT.0, SMALL, b"forged");
                        let lap = raw.next_lap(ring).wrapping_add(off);
                        raw.forge(ring, &entry, lap);
                    },
                ));
            }
        }
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   the server believes no consumed position that its own does not allow (trap 1).
/// Method: positions beyond what was produced, and backwards, then a call that makes the server look.
#[test]
fn f11_a_consumed_position_beyond_or_backwards_ends_the_session() {
    let mut attacks = Vec::new();
    for (name, off) in
        [("2 beyond", 2u32), ("1000 beyond", 1000), ("half way round", 1 << 31), ("2 back", u32::MAX - 1)]
    {
        attacks.push(attack(format!("consumed position {name}"), move |raw| {
            // The server looks before each call, so it has seen the position of the call before the last.
            for _ in 0..4 {
                raw.echo(b"right");
            }
            let consumed = raw.word32(raw.layout.consumed[INTERACTIVE]);
            let right = consumed.load(SeqCst);
            assert_eq!(right, 5);
            // This one may still run, if the server has just looked, and then one beyond is right; the next
            // look ends the session.
            let entry = raw.entry(ECHO, SMALL, b"x");
            consumed.store(right.wrapping_add(off), SeqCst);
            raw.push(INTERACTIVE, &entry);
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   slots that do not exist, were not granted, or do not hold what is announced end the session.
/// Method: numbers at and beyond each edge, sub-slots of larger classes, lengths one above each class.
#[test]
fn f12_s1_an_impossible_slot_or_length_ends_the_session() {
    let mut attacks = Vec::new();
    for slot in [BEYOND, BEYOND + 1, 1 << 20, u32::MAX, LARGE + 1, LARGE + 15, MEDIUM + 1, MEDIUM + 3] {
        attacks.push(wrong_call(format!("slot {slot}"), move |e| {
            (e.slot, e.response_slot, e.generation) = (slot, slot, 1);
        }));
        attacks.push(wrong_call(format!("response slot {slot}"), move |e| e.response_slot = slot));
    }
    for (slot, len) in [
        (SMALL, 1025),
        (SMALL, u32::MAX),
        (MEDIUM, 4097),
        (LARGE, SLOT_LARGE as u32 + 1),
        (LARGE, 1 << 31),
        (LARGE, u32::MAX),
    ] {
        attacks.push(wrong_call(format!("{len} bytes in slot {slot}"), move |e| {
            (e.slot, e.response_slot, e.len, e.generation) = (slot, slot, len, 1);
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   a generation is exactly the previous plus one, so no call is ever run twice or mistaken (P2).
/// Method: the same again, skipped ones, zero, the far end; in a fresh slot and in a used one.
#[test]
fn f12_a_wrong_generation_ends_the_session() {
    let mut attacks = Vec::new();
    for used in [false, true] {
        for off in [0u32, 2, 3, 1 << 31, u32::MAX] {
            attacks.push(attack(format!("generation +{} in a used slot: {used}", off as i32), move |raw| {
                if used {
                    let entry = raw.entry(ECHO, SMALL + 2, b"right");
                    raw.call(&entry);
                }
                let mut entry = raw.entry(COUNT.0, SMALL + 2, b"x");
                entry.generation = entry.generation.wrapping_sub(1).wrapping_add(off);
                raw.push(INTERACTIVE, &entry);
            }));
        }
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   a slot named twice in one batch runs once: what came before the broken entry has run, nothing
///         after it does.
/// Method: the same entry twice, and a good one behind, published before the server looks (a gate holds it).
#[test]
fn f12_a_slot_used_twice_in_one_batch_runs_once_and_ends_the_session() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let mut raw = Raw::connect(server.path());
        let holder = client(server.path(), WaitPolicy::Block);
        let connection = holder.open().unwrap();
        connection.submit(GATE, b"", &CallOptions::default()).unwrap();
        holder.flush().unwrap();
        eventually("the gate holds the reactor", || server.entered() == 1);
        let twice = raw.entry(COUNT.0, SMALL, b"twice");
        raw.push(INTERACTIVE, &twice);
        raw.push(INTERACTIVE, &twice);
        let behind = raw.entry(COUNT.0, SMALL + 1, b"behind");
        raw.push(INTERACTIVE, &behind);
        raw.ring();
        server.open_gate();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
        let first = raw.completion(INTERACTIVE);
        assert_eq!((first.slot, first.generation, first.status), (SMALL, twice.generation, 0));
        assert!(raw.lane.completions[INTERACTIVE].pop().unwrap().is_none(), "only the first was answered");
        assert_eq!(server.state.counted.load(SeqCst), 2, "the gate's call and the first of the two");
        bystander.check("a slot used twice");
    }
}

/// Goal:   what has no meaning today stays usable tomorrow: it is refused, not ignored.
/// Method: each reserved word and flag, each kind that is not accepted, each contradiction, one at a time.
#[test]
fn f13_reserved_bits_unknown_kinds_and_contradictions_end_the_session() {
    let mut attacks = vec![
        wrong_call("MORE and END", |e| e.flags |= flag::MORE),
        wrong_call("neither MORE nor END", |e| e.flags = 0),
        wrong_call("BULK on a call", |e| e.flags |= flag::BULK),
        wrong_call("META without metadata", |e| e.flags |= flag::META),
        wrong_call("metadata without META", |e| e.meta_len = 4),
        wrong_call("more metadata than bytes", |e| (e.flags, e.meta_len) = (flag::END | flag::META, 9)),
        wrong_call("an answer window of no slot", |e| e.response_count = 0),
        wrong_call("an answer window that leaves its class", |e| e.response_count = 9),
        wrong_call("frame 1 of a new call", |e| e.frame = 1),
        wrong_call("a body length that is not the body's", |e| e.body_len = 9),
        wrong_call("a codec that is not the connection's", |e| e.codec = codec::JSON),
        wrong_call("an unknown codec", |e| e.codec = 255),
    ];
    let blocks: [(&str, &[u8]); 6] = [
        ("metadata that is cut off", &[1, 0, 0]),
        ("an element that leaves the metadata", &[1, 0, 55, 0, b'0', b'0', b'-', b'4']),
        ("an element of 65 535 bytes", &[1, 0, 255, 255, 0, 0, 0, 0]),
        ("padding that is not zero", &[9, 0, 1, 0, 7, 0, 1, 0]),
        ("padding that is missing", &[9, 0, 1, 0, 7]),
        ("a second element that is wrong", &[9, 0, 0, 0, 2, 0, 24, 0]),
    ];
    for (name, block) in blocks {
        attacks.push(attack(name, move |raw| {
            let entry = raw.entry(COUNT.0, SMALL, &[block, b"body"].concat());
            let (flags, meta_len) = (flag::END | flag::META, block.len() as u16);
            raw.push(INTERACTIVE, &Submission { flags, meta_len, body_len: 4, ..entry });
        }));
    }
    for bit in [1, 1 << 32, 1 << 63] {
        attacks.push(attack(format!("reserved word {bit:#x}"), move |raw| {
            let mut words = raw.entry(COUNT.0, SMALL, b"x").pack();
            words[7] = bit;
            raw.push_words(INTERACTIVE, words);
        }));
    }
    for bit in 7..16 {
        attacks.push(wrong_call(format!("flag bit {bit}"), move |e| e.flags |= 1 << bit));
    }
    for bad in [0, kind::FRAME, kind::ATTACH, kind::REPLY, kind::CALLBACK, 10, 128, 255] {
        attacks.push(wrong_call(format!("kind {bad}"), move |e| e.kind = bad));
    }
    type Change = fn(&mut Submission);
    let controls: [(&str, u8, Change); 11] = [
        ("OPEN of a connection", kind::OPEN, |e| e.connection = 1),
        ("OPEN with an unknown codec", kind::OPEN, |e| e.codec = 3),
        ("OPEN with END", kind::OPEN, |e| e.flags = flag::END),
        ("OPEN with a type", kind::OPEN, |e| e.message_type = 1),
        ("OPEN with a length", kind::OPEN, |e| e.len = 1),
        ("OPEN with an answer slot", kind::OPEN, |e| e.response_slot = SMALL),
        ("OPEN with a deadline", kind::OPEN, |e| e.deadline = 1),
        ("OPEN with a wrong generation", kind::OPEN, |e| e.generation += 1),
        ("OPEN in an impossible slot", kind::OPEN, |e| e.slot = BEYOND),
        ("CLOSE with BULK", kind::CLOSE, |e| e.flags = flag::BULK),
        ("CLOSE with an answer window", kind::CLOSE, |e| e.response_count = 1),
    ];
    for (name, kind, change) in controls {
        attacks.push(attack(name, move |raw| {
            let connection = if kind == kind::CLOSE { raw.connection } else { 0 };
            let mut entry = raw.control(kind, connection);
            change(&mut entry);
            raw.push(INTERACTIVE, &entry);
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   an unknown type, or a body that goes on, is the caller's error and not a violation: the
///         connection goes on (R1.4).
/// Method: types beside and far beyond the table, and MORE, each followed by a good call.
#[test]
fn f13_s9_r1_4_an_unknown_type_or_a_body_that_goes_on_is_answered_and_the_session_goes_on() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let mut raw = Raw::connect(server.path());
        for unknown in [0, 6, 17, 319, 320, 1 << 16, u32::MAX] {
            let entry = raw.entry(unknown, SMALL, b"?");
            let answer = raw.call(&entry);
            assert_eq!((answer.status, answer.detail), (Status::UnknownType as u8, unknown.into()));
            assert_eq!((answer.len, answer.kind, answer.flags), (0, kind::REPLY, flag::END));
            raw.echo(b"and on it goes");
        }
        let announced =
            Submission { flags: flag::MORE, body_len: 1 << 24, ..raw.entry(ECHO, SMALL, b"first") };
        let answer = raw.call(&announced);
        assert_eq!((answer.status, answer.detail), (Status::TooLarge as u8, 10 << 20));
        raw.echo(b"and on it goes");
        assert!(raw.runs());
    }
}

/// Goal:   flags that mean something are no violation, and metadata is no part of the body.
/// Method: HANDOFF, IDEMPOTENT, and several blocks of metadata in front of the body of an echo.
#[test]
fn f13_flags_with_a_meaning_are_accepted_and_metadata_is_left_out_of_the_body() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    for flags in [flag::HANDOFF, flag::IDEMPOTENT, flag::HANDOFF | flag::IDEMPOTENT] {
        let entry = raw.entry(ECHO, SMALL, b"body");
        let entry = Submission { flags: flag::END | flags, body_len: 4, ..entry };
        assert_eq!(raw.call(&entry).status, Status::Ok as u8);
    }
    // A traceparent that is none, elements that nobody knows, an idempotency key: passed over.
    let capital = b"\x01\x00\x37\x0000-4BF92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\x00";
    let blocks: [&[u8]; 5] = [
        b"\x01\x00\x00\x00",
        capital,
        b"\xff\xff\x05\x00abcde\x00\x00\x00",
        b"\x00\x00\x00\x00\x00\x00\x00\x00",
        b"\x02\x00\x18\x00abcdefghijklmnopqrstuvwx",
    ];
    for block in blocks {
        let entry = raw.entry(ECHO, SMALL, &[block, b"the body"].concat());
        let meta_len = block.len() as u16;
        let entry = Submission { flags: flag::END | flag::META, meta_len, body_len: 8, ..entry };
        let answer = raw.call(&entry);
        assert_eq!((answer.status, raw.slot(SMALL, answer.len as usize)), (0, b"the body".to_vec()));
    }
}

/// Goal:   an idempotent call's request stays as it was, so that it can be sent again (DESIGN §3).
/// Method: an answer slot of its own, smaller and larger than the request's; both are looked at.
#[test]
fn f12_an_answer_in_a_slot_of_its_own_leaves_the_request_untouched() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    for answer_slot in [SMALL + 3, MEDIUM, LARGE] {
        let body = b"a request that may be sent again";
        let entry = raw.entry(REFUSE.0, SMALL, body);
        let entry = Submission { flags: flag::END | flag::IDEMPOTENT, response_slot: answer_slot, ..entry };
        let answer = raw.call(&entry);
        assert_eq!(answer.status, Status::DecodeError as u8);
        assert_eq!(raw.slot(answer_slot, answer.len as usize), b"32 bytes make no sense");
        assert_eq!(raw.slot(SMALL, body.len()), body);
    }
    // The answer slot's own generation has not passed.
    raw.echo(b"again");
    let entry = raw.entry(ECHO, SMALL + 3, b"first call in this slot");
    assert_eq!(entry.generation, 1);
    assert_eq!(raw.call(&entry).status, Status::Ok as u8);
}

/// Goal:   a client cannot use what it did not open: another session's connection is out of its reach.
/// Method: calls and closes on the bystander's number, on made-up ones, on one closed already, and on the
///         wrong ring; the bystander's connection answers as before.
#[test]
fn f29_s2_a_connection_of_another_session_is_out_of_reach() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let victim = client(server.path(), WaitPolicy::Block);
        let connection = victim.open().unwrap();
        let theirs = connection.number();
        let mut count = 0;
        let mut attack = |name: &str, attack: &dyn Fn(&mut Raw)| {
            let mut raw = Raw::connect(server.path());
            attack(&mut raw);
            raw.ring();
            assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation, "{name}");
            assert_eq!(connection.call(MessageType::ECHO, name.as_bytes()).unwrap(), name.as_bytes());
            count += 1;
        };
        attack("a call on another session's connection", &|raw| {
            let entry = Submission { connection: theirs, ..raw.entry(COUNT.0, SMALL, b"") };
            raw.push(INTERACTIVE, &entry);
        });
        attack("a close of another session's connection", &|raw| {
            let entry = raw.control(kind::CLOSE, theirs);
            raw.push(INTERACTIVE, &entry);
        });
        for made_up in [0, 1, 2 << 20, 1 << 20 | 999, 0xfff << 20, u32::MAX] {
            attack("a call on a number never given", &|raw| {
                assert!(raw.connection != made_up && theirs != made_up);
                let entry = Submission { connection: made_up, ..raw.entry(COUNT.0, SMALL, b"") };
                raw.push(INTERACTIVE, &entry);
            });
        }
        attack("a connection closed twice", &|raw| {
            let entry = raw.control(kind::CLOSE, raw.connection);
            assert_eq!(raw.call(&entry).status, Status::Ok as u8);
            let entry = raw.control(kind::CLOSE, raw.connection);
            raw.push(INTERACTIVE, &entry);
        });
        attack("a call on a closed connection", &|raw| {
            let entry = raw.control(kind::CLOSE, raw.connection);
            raw.call(&entry);
            let entry = raw.entry(COUNT.0, SMALL, b"");
            raw.push(INTERACTIVE, &entry);
        });
        attack("an interactive connection on the bulk ring", &|raw| {
            let entry = raw.entry(COUNT.0, SMALL, b"");
            raw.push(BULK, &entry);
        });
        attack("a bulk connection on the interactive ring", &|raw| {
            raw.connection = raw.open(codec::RAW, flag::BULK);
            let entry = raw.entry(COUNT.0, SMALL, b"");
            raw.push(INTERACTIVE, &entry);
        });
        assert_eq!(server.state.counted.load(SeqCst), 0);
        drop(connection);
        assert_eq!(server.stop().ended(DisconnectReason::ProtocolViolation), count);
    }
}

/// Goal:   what a handler reads does not change while it reads it (S3).
/// Method: the handler copies its request, the client scribbles over the slot, the handler compares. In
///         every slot class, since each is staged apart.
#[test]
fn f15_s3_scribbling_over_the_slot_while_the_handler_runs_is_not_seen() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    for (round, (slot, len)) in [(SMALL, 1024), (MEDIUM, 4096), (LARGE, SLOT_LARGE)].into_iter().enumerate() {
        let entry = raw.entry(READ_TWICE.0, slot, &vec![0xaa; len]);
        raw.push(INTERACTIVE, &entry);
        raw.ring();
        eventually("the handler has read once", || server.entered() == round as u64 + 1);
        raw.lane.common.payload.write(LaneLayout::slot_offset(slot), &vec![0x55; len]);
        server.open_gate();
        let answer = raw.completion(INTERACTIVE);
        assert_eq!((answer.status, answer.len), (Status::Ok as u8, 1));
        assert_eq!(raw.slot(slot, 2), [1, 0x55], "the handler's request changed under it");
    }
}

/// Goal:   the descriptor is judged and used from one private copy: changing it in the ring afterwards
///         changes nothing (S3).
/// Method: while the handler holds the reactor, the entry in the ring is overwritten with another slot,
///         length and type; the answer is that of the entry as it was.
#[test]
fn f15_s3_scribbling_over_the_entry_while_its_call_runs_is_not_seen() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    let index = raw.lane.submissions[INTERACTIVE].next() as usize;
    let entry = raw.entry(GATE.0, SMALL, b"as it was");
    raw.push(INTERACTIVE, &entry);
    raw.ring();
    eventually("the handler runs", || server.entered() == 1);
    let start = raw.layout.submissions[INTERACTIVE] + 64 * index;
    for word in 1..8 {
        raw.word64(start + 8 * word).store(u64::MAX, SeqCst);
    }
    server.open_gate();
    let answer = raw.completion(INTERACTIVE);
    assert_eq!((answer.slot, answer.generation, answer.status), (SMALL, entry.generation, 0));
    assert_eq!(raw.slot(SMALL, 8), 1u64.to_le_bytes());
    raw.echo(b"and on it goes");
}

/// Goal:   what the server writes it never reads back: scribbling on it harms only the scribbler (S2).
/// Method: garbage over completion rings, published positions, server words, the header and free slots,
///         many times over a few laps; the server's answers stay right, and so do the bystander's.
#[test]
fn f16_s2_scribbling_on_what_the_server_writes_harms_nobody_else() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let mut raw = Raw::connect(server.path());
        let mut position = raw.lane.completions[INTERACTIVE].next();
        for round in 0..20u64 {
            let garbage = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for ring in [INTERACTIVE, BULK] {
                for word in 0..8 * 4 {
                    raw.word64(raw.layout.completions[ring] + 8 * word).store(garbage, SeqCst);
                }
                raw.word32(raw.layout.published[ring]).store(garbage as u32, SeqCst);
            }
            for word in 0..BEYOND as usize {
                raw.word64(raw.layout.server_words + 8 * word).store(garbage, SeqCst);
            }
            for offset in (0..HEADER_LEN).step_by(8) {
                raw.word64(offset).store(garbage, SeqCst);
            }
            let body = round.to_le_bytes();
            let entry = raw.entry(ECHO, SMALL, &body);
            raw.push_past_published(INTERACTIVE, &entry);
            raw.ring();
            // The completion is where the server's own position says, whatever stood there.
            let start = raw.layout.completions[INTERACTIVE] + 32 * (position % 8) as usize;
            let lap = (position / 8 + 1) as u32;
            eventually("the completion", || {
                let word = raw.word64(start).load(SeqCst);
                word as u32 == lap && word != garbage
            });
            let words = std::array::from_fn(|i| raw.word64(start + 8 * i).load(SeqCst));
            let answer = Completion::unpack(words).unwrap();
            assert_eq!((answer.slot, answer.generation, answer.len), (SMALL, entry.generation, 8));
            assert_eq!(raw.slot(SMALL, 8), body);
            position += 1;
            raw.word32(raw.layout.consumed[INTERACTIVE]).store(position as u32, SeqCst);
            bystander.check("scribbling on what the server writes");
        }
        assert_eq!(bystander.stat("protocol_violations"), 0);
        assert_eq!(bystander.stat("sessions_ended"), 0);
    }
}

/// Goal:   a client cannot change the size, the seals or the mode of its segment, so SIGBUS is impossible.
/// Method: every such call on the descriptor it was sent.
#[test]
fn f17_the_segment_can_be_neither_resized_nor_sealed_further_nor_made_executable() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    let len = raw.segment.len() as u64;
    for size in [0, 4096, len - 1, len + 1, len + 4096] {
        assert_eq!(rustix::fs::ftruncate(&raw.memory, size), Err(Errno::PERM), "ftruncate to {size}");
    }
    let grow = rustix::fs::fallocate(&raw.memory, FallocateFlags::empty(), len, 4096);
    assert_eq!(grow, Err(Errno::PERM), "fallocate beyond the end");
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE, SealFlags::SEAL] {
        assert_eq!(rustix::fs::fcntl_add_seals(&raw.memory, seal), Err(Errno::PERM), "{seal:?}");
    }
    assert_eq!(rustix::fs::fchmod(&raw.memory, Mode::RWXU), Err(Errno::PERM), "chmod +x");
    let again = std::fs::OpenOptions::new().write(true).truncate(true).open(raw.memory_path());
    assert!(again.is_err(), "opening it anew with O_TRUNC");
    raw.echo(b"as before");
}

/// Goal:   a hole punched into the segment is a client's own loss: zeros are judged like anything else.
/// Method: all of it punched between calls and while a handler writes its answer; then another call.
#[test]
fn f18_punching_the_segment_leaves_the_server_and_others_alone() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let punch = |raw: &Raw| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&raw.memory, flags, 0, raw.segment.len() as u64).unwrap();
    };
    let mut idle = Raw::connect(server.path());
    for _ in 0..4 {
        idle.echo(b"before");
    }
    punch(&idle);
    bystander.check("a hole punched while idle");
    let entry = idle.entry(COUNT.0, SMALL, b"after");
    idle.push(INTERACTIVE, &entry);
    idle.ring();
    // The consumed position is zero now, which is before what the server has seen.
    assert_eq!(idle.ended(), DisconnectReason::ProtocolViolation);

    let mut running = Raw::connect(server.path());
    let entry = running.entry(GATE.0, SMALL, b"");
    running.push(INTERACTIVE, &entry);
    running.ring();
    eventually("the handler runs", || server.entered() == 1);
    punch(&running);
    server.open_gate();
    // Its consumed position is zero, which is seen in the round after the answer; taking that would store another one.
    assert_eq!(running.ended(), DisconnectReason::ProtocolViolation);
    let answer = running.completion(INTERACTIVE);
    assert_eq!((answer.slot, answer.status), (SMALL, 0), "the answer went into fresh pages");
    // Its slots are taken when the session ends.
    assert!([1u64, 0].map(u64::to_le_bytes).contains(&running.slot(SMALL, 8).try_into().unwrap()));
    bystander.check("a hole punched under a running handler");
}

/// Goal:   no byte reaches a client but what a handler wrote for it (nothing of the staging buffers, of
///         other sessions, of the server's memory).
/// Method: a victim sends a secret through the same staging buffers; then every way an answer can come
///         about, in slots filled with a canary; the whole segment is searched for the secret.
#[test]
fn f21_nothing_but_what_a_handler_wrote_reaches_the_answer_slot() {
    let server = TestServer::start(WaitPolicy::Block);
    let victim = client(server.path(), WaitPolicy::Block);
    let connection = victim.open().unwrap();
    let secret = b"SECRET-SECRET-SECRET-SECRET-SECRET-SECRET-".repeat(391);
    let mut raw = Raw::connect(server.path());
    let fresh = raw.slot(LARGE, 6 * 4096);
    assert!(fresh.iter().all(|b| *b == 0), "a fresh segment's slots are zero");
    let refusal = b"3 bytes make no sense".to_vec();
    for slot in [SMALL, MEDIUM, LARGE] {
        let capacity = match slot {
            SMALL => 1024,
            MEDIUM => 4096,
            _ => SLOT_LARGE,
        };
        for (message_type, status, answer) in [
            (ECHO, Status::Ok, b"abc".to_vec()),
            (MessageType::PING.0, Status::Ok, Vec::new()),
            (REFUSE.0, Status::DecodeError, refusal.clone()),
            (PANIC.0, Status::HandlerPanic, Vec::new()),
            (77, Status::UnknownType, Vec::new()),
        ] {
            connection.call(MessageType::ECHO, &secret[..SLOT_LARGE]).unwrap();
            connection.call(MessageType::ECHO, &secret[..4096]).unwrap();
            raw.lane.common.payload.write(LaneLayout::slot_offset(slot), &vec![0xee; capacity]);
            let entry = raw.entry(message_type, slot, b"abc");
            let completion = raw.call(&entry);
            assert_eq!((completion.status, completion.len as usize), (status as u8, answer.len()));
            let after = raw.slot(slot, capacity);
            let untouched = answer.len().max(if answer.is_empty() { 3 } else { 0 });
            let expected = if answer.is_empty() { b"abc".to_vec() } else { answer };
            assert_eq!(&after[..expected.len()], expected, "type {message_type}");
            assert!(after[untouched..].iter().all(|b| *b == 0xee), "type {message_type} touched more");
        }
    }
    let words = raw.segment.len() / 8;
    let all: Vec<u8> = (0..words).flat_map(|i| raw.word64(8 * i).load(Relaxed).to_le_bytes()).collect();
    assert!(!all.windows(7).any(|w| w == b"SECRET-"), "another client's bytes in this segment");
}

/// Goal:   a hint for a slot that the lane does not have ends the session; others are looked at and no more.
/// Method: bits beyond the slots in the one word there is, and in words there are not.
#[test]
fn f11_s2_a_hint_beyond_the_slots_ends_the_session() {
    let mut attacks = Vec::new();
    for bit in [BEYOND, BEYOND + 1, 63] {
        attacks.push(attack(format!("hint bit {bit}"), move |raw| {
            raw.word64(raw.layout.hints + 8).fetch_or(1 << bit, SeqCst);
            raw.word64(raw.layout.hints).fetch_or(1, SeqCst);
        }));
    }
    for bit in [1, 2, 63] {
        attacks.push(attack(format!("summary bit {bit}"), move |raw| {
            raw.word64(raw.layout.hints).fetch_or(1 << bit, SeqCst);
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   a hint that no call follows is taken, and the server sleeps: it must not poll for ever for a call
///         that never comes (a cancel that comes just too late leaves such a hint, too).
/// Method: hints for free slots, one by one and all at once; the bitmap is empty and the bell armed again.
#[test]
fn f16_s6_a_hint_that_no_call_follows_lets_the_server_sleep() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    for bits in [1u64 << SMALL, 1 << LARGE, 1 << (MEDIUM + 1), (1 << BEYOND) - 1] {
        raw.word64(raw.layout.hints + 8).fetch_or(bits, SeqCst);
        raw.word64(raw.layout.hints).fetch_or(1, SeqCst);
        raw.ring();
        eventually("the hint is taken and the server sleeps", || {
            raw.word64(raw.layout.hints).load(SeqCst) == 0
                && raw.word32(raw.layout.server_bell).load(SeqCst) == 1
        });
        raw.echo(b"and on it goes");
    }
}

/// Goal:   hints and slot words are hints: what they say of other generations, of slots not granted or of
///         nothing at all changes nothing; a cancel that comes before its call is kept for it (trap 19).
/// Method: every valid hint bit with words of every wrong generation, then calls; then a right one.
#[test]
fn f16_s2_hints_and_words_of_other_generations_change_nothing() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let mut raw = Raw::connect(server.path());
        for generation in [0, 1000, 1 << 31, u32::MAX] {
            for slot in 0..BEYOND {
                let word = ClientWord { generation, cancelled: true, released: u32::MAX >> 1 };
                raw.word64(raw.layout.client_words + 8 * slot as usize).store(word.pack(), SeqCst);
            }
            raw.word64(raw.layout.hints + 8).store((1 << BEYOND) - 1, SeqCst);
            raw.word64(raw.layout.hints).store(1, SeqCst);
            // Slots 22, 16 and 0 have seen no call, so their next generation is 1.
            raw.echo(b"hints");
        }
        for slot in [LARGE, MEDIUM, SMALL + 2] {
            let entry = raw.entry(COUNT.0, slot, b"");
            assert_eq!(raw.call(&entry).status, Status::Ok as u8, "cancelled by another's word");
            let next = ClientWord { generation: 2, cancelled: true, released: 0 };
            raw.word64(raw.layout.client_words + 8 * slot as usize).store(next.pack(), SeqCst);
            raw.lane.common.hints.set(slot);
            raw.echo(b"between the hint and its call");
            let entry = raw.entry(COUNT.0, slot, b"");
            assert_eq!(raw.call(&entry).status, Status::Cancelled as u8, "cancelled before it came");
            let entry = raw.entry(COUNT.0, slot, b"");
            assert_eq!(raw.call(&entry).status, Status::Ok as u8, "the next call is not cancelled");
        }
        assert_eq!(server.state.counted.load(SeqCst), 6);
        assert!(raw.runs());
    }
}

/// Goal:   bells are hints: whatever stands in them, calls are answered and nobody else is slower (S6).
/// Method: garbage in both bells before every call; the server is rung by hand.
#[test]
fn f16_s6_garbage_in_the_bells_costs_nobody_anything() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let mut raw = Raw::connect(server.path());
        for garbage in [1, 2, 3, 4, 7, 0x8000_0000, u32::MAX] {
            for _ in 0..4 {
                raw.word32(raw.layout.client_bell).store(garbage, SeqCst);
                let entry = raw.entry(ECHO, SMALL, b"bells");
                raw.push(INTERACTIVE, &entry);
                raw.word32(raw.layout.server_bell).store(garbage, SeqCst);
                raw.wake();
                assert_eq!(raw.completion(INTERACTIVE).status, Status::Ok as u8);
            }
            bystander.check("garbage in the bells");
        }
        assert!(raw.runs());
    }
}

/// Goal:   a client that asks for its bell on the socket and never reads it stalls only itself (S5).
/// Method: more one-byte bells than any socket holds; every call is answered all the same.
#[test]
fn f16_s5_a_socket_that_nobody_reads_does_not_stop_the_server() {
    let server = TestServer::start(WaitPolicy::Block);
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect(server.path());
    for _ in 0..1000 {
        raw.word32(raw.layout.client_bell).store(2, SeqCst);
        let entry = raw.entry(ECHO, SMALL, b"ring my socket");
        assert_eq!(raw.call(&entry).status, Status::Ok as u8);
    }
    assert!(matches!(hear(&raw.socket), Heard::Bell), "the bell does ring on the socket");
    bystander.check("a socket that is full");
    assert!(raw.runs());
}

/// Goal:   a client that does not take its completions is not read further, and nothing is lost: what
///         waited in its ring is run once there is space (S5, P4).
/// Method: a full completion ring (8 entries admit 7 calls), a full submission ring behind it; others go
///         on; the bell says that the server waits for space; then everything is taken.
#[test]
fn f22_s5_a_client_that_takes_no_completions_stalls_only_itself() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let bystander = Bystander::new(server.path());
        let mut raw = Raw::connect(server.path());
        for _ in 0..7 {
            let entry = raw.entry(COUNT.0, SMALL, b"");
            raw.push(INTERACTIVE, &entry);
        }
        raw.ring();
        eventually("7 calls ran", || server.state.counted.load(SeqCst) == 7);
        for _ in 0..8 {
            let entry = raw.entry(COUNT.0, SMALL, b"");
            raw.push(INTERACTIVE, &entry);
        }
        raw.ring();
        if policy == WaitPolicy::Block {
            let bell = raw.word32(raw.layout.server_bell);
            eventually("the bell says that it waits for space", || bell.load(SeqCst) == 2);
        }
        for _ in 0..20 {
            bystander.check("a full completion ring");
        }
        assert_eq!(server.state.counted.load(SeqCst), 7, "calls ran whose completions had no space");
        for n in 1..=15u32 {
            let answer = raw.completion(INTERACTIVE);
            assert_eq!((answer.generation, answer.status), (raw.first_generation() + n, 0));
            raw.ring();
        }
        assert_eq!(server.state.counted.load(SeqCst), 15);
        assert!(raw.runs());
    }
}

/// Goal:   S9: the offender is told why, the log says what, and the counters say how often.
/// Method: two different violations against a server process; its log and its answer to Stats.
#[test]
fn s9_r3_5_a_violation_is_told_logged_and_counted() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    for (change, words) in [
        ((|e| (e.slot, e.response_slot) = (777, 777)) as fn(&mut Submission), "slot 777 was not granted"),
        (|e| e.kind = 99, "entry kind 99"),
    ] {
        let mut raw = Raw::connect(server.path());
        let mut entry = raw.entry(ECHO, SMALL, b"");
        change(&mut entry);
        raw.push(INTERACTIVE, &entry);
        raw.ring();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
        eventually("the log says so", || {
            let log = server.log();
            log.lines().any(|line| line.contains("protocol violation") && line.contains(words))
        });
    }
    assert_eq!(bystander.stat("protocol_violations"), 2);
    assert_eq!(bystander.stat("sessions_ended"), 2);
}

/// Goal:   a client of the library learns the reason, too: its next call fails with it, nothing hangs.
/// Method: it uses the number of a connection that another client opened, which the library cannot know;
///         that other client's connection answers as before.
#[test]
fn s9_a_client_of_the_library_learns_why_its_session_was_ended() {
    for policy in ALL {
        let server = TestServer::start(policy);
        let owner = client(server.path(), policy);
        let id = owner.open().unwrap().detach();
        let offender = client(server.path(), policy);
        let stolen = offender.attached(id).call(MessageType::PING, b"");
        // The server had taken that entry: nobody can say that the call was not executed.
        assert!(matches!(stolen, Err(IpcError::ConnectionLost)), "{stolen:?}");
        let again = offender.open().map(|connection| connection.number());
        let violation = DisconnectReason::ProtocolViolation;
        assert!(matches!(again, Err(IpcError::Disconnected(why)) if why == violation), "{again:?}");
        let wait = offender.wait(None);
        assert!(matches!(wait, Err(IpcError::Disconnected(why)) if why == violation), "{wait:?}");
        owner.attached(id).call(MessageType::PING, b"").unwrap();
    }
}

/// Goal:   correctness does not depend on a bell: work that nobody rang for is found by the sweep, and the
///         sweep counts it (S6).
/// Method: the server sleeps (its bell says so); entries are published without a ring, several times.
#[test]
fn f25_s6_a_client_that_withholds_the_bell_is_healed_by_the_sweep_and_counted() {
    let config = ServerConfig { sweep_interval: Duration::from_millis(5), ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let mut raw = Raw::connect(server.path());
    for _ in 0..5 {
        let bell = raw.word32(raw.layout.server_bell);
        eventually("the server sleeps", || bell.load(SeqCst) == 1);
        let entry = raw.entry(ECHO, SMALL, b"no bell");
        raw.push(INTERACTIVE, &entry);
        assert_eq!(raw.completion(INTERACTIVE).status, Status::Ok as u8);
    }
    drop(raw);
    assert!(server.stop().sweeps_healed >= 5, "healed and not counted");
}

/// Goal:   the same when the client takes the server's mark and then does not wake it: what the server
///         decides by is its own record, not a word that the client can write (S2, S6).
/// Method: as above, with the bell cleared by hand.
#[test]
fn f25_s6_a_client_that_clears_the_bell_and_does_not_wake_is_healed_by_the_sweep() {
    let config = ServerConfig { sweep_interval: Duration::from_millis(5), ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let mut raw = Raw::connect(server.path());
    for _ in 0..3 {
        let bell = raw.word32(raw.layout.server_bell);
        eventually("the server sleeps", || bell.load(SeqCst) == 1);
        let entry = raw.entry(ECHO, SMALL, b"no wake");
        raw.push(INTERACTIVE, &entry);
        bell.store(0, SeqCst);
        assert_eq!(raw.completion(INTERACTIVE).status, Status::Ok as u8);
    }
}

/// Goal:   with honest clients the sweep heals nothing: no wake is ever lost (S6).
/// Method: clients of both policies that call, pause until the server sleeps, and call again, while sweeps
///         go on; the counter stays 0.
#[test]
fn s6_with_honest_clients_the_sweep_heals_nothing() {
    let server = TestServer::start(WaitPolicy::Block);
    let block = client(server.path(), WaitPolicy::Block);
    let spin = client(server.path(), WaitPolicy::Spin);
    let (a, b) = (block.open().unwrap(), spin.open().unwrap());
    let mut rounds = 0u32;
    eventually("some sweeps", || {
        for connection in [&a, &b] {
            assert_eq!(
                connection.call(MessageType::ECHO, &rounds.to_le_bytes()).unwrap(),
                rounds.to_le_bytes()
            );
        }
        rounds += 1;
        rounds.is_multiple_of(50) && common::stat(&a, "sweeps") >= 4
    });
    assert_eq!(common::stat(&a, "sweeps_healed"), 0);
}

/// Goal:   a first message that is no hello is answered BadHello and the socket closed; descriptors that
///         come with it are closed, too (trap 10).
/// Method: wrong lengths, wrong contents, a hello with descriptors; a server process whose descriptors are
///         counted, many times over.
#[test]
fn f31_trap10_a_wrong_hello_is_refused_and_leaks_nothing() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = server.process.fds();
    let right = hello();
    let mut wrong: Vec<Vec<u8>> = [1, 8, 95, 97, 200, 4096].map(|len| vec![0; len]).into();
    wrong.push(right.as_bytes()[..95].to_vec());
    wrong.push([right.as_bytes(), &[0]].concat());
    wrong.push(Hello { magic: 0, ..right }.as_bytes().to_vec());
    wrong.push(Hello { reserved: 1, ..right }.as_bytes().to_vec());
    wrong.push(Hello { lanes: 0, ..right }.as_bytes().to_vec());
    wrong.push(Hello { geometry: 0, ..right }.as_bytes().to_vec());
    wrong.push(Hello { geometry: u64::MAX, ..right }.as_bytes().to_vec());
    wrong.push(Hello { name: [b'\n'; 32], ..right }.as_bytes().to_vec());
    for bytes in &wrong {
        let socket = connect_silently(server.path());
        send(&socket, bytes).unwrap();
        let refusal = hear_refusal(&socket);
        assert_eq!(refusal.code, code::BAD_HELLO, "{} bytes", bytes.len());
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    for fds in [1, 2, 8, 9, 64] {
        for _ in 0..5 {
            let socket = connect_silently(server.path());
            send_with_fds(&socket, right.as_bytes(), &vec![null.as_fd(); fds]);
            assert_eq!(hear_refusal(&socket).code, code::BAD_HELLO, "{fds} descriptors");
        }
    }
    bystander.check("wrong hellos");
    eventually("no descriptor has leaked", || server.process.fds() == baseline);
    assert_eq!(server.process.segments(), 1, "only the bystander has a segment");
    assert_eq!(bystander.stat("sessions_refused"), wrong.len() as u64 + 25);
}

/// Goal:   an end of the stream, or an empty packet, instead of a hello is the end and no more.
/// Method: sockets closed at once, half closed, and with an empty packet; descriptors counted.
#[test]
fn f1_f31_a_socket_that_ends_without_a_hello_leaves_nothing() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = server.process.fds();
    for _ in 0..20 {
        drop(connect_silently(server.path()));
        let half = connect_silently(server.path());
        rustix::net::shutdown(&half, rustix::net::Shutdown::Write).unwrap();
        assert!(matches!(hear(&half), Heard::End));
        let empty = connect_silently(server.path());
        send(&empty, b"").unwrap();
        assert!(matches!(hear(&empty), Heard::End));
    }
    bystander.check("sockets without a hello");
    eventually("no descriptor has leaked", || server.process.fds() == baseline);
}

/// Goal:   a client of another version is told the server's, for good.
/// Method: version ranges below and above; the refusal carries both ends of ours.
#[test]
fn f48_a_client_of_another_version_is_told_ours() {
    let server = TestServer::start(WaitPolicy::Block);
    for (version_min, version_max) in [(0, 0), (VERSION_MAX + 1, u16::MAX), (9, 12)] {
        let socket = connect_silently(server.path());
        send(&socket, Hello { version_min, version_max, ..hello() }.as_bytes()).unwrap();
        let refusal = hear_refusal(&socket);
        assert_eq!(refusal.code, code::VERSION_MISMATCH);
        assert_eq!((refusal.version_min, refusal.version_max), (VERSION_MIN, VERSION_MAX));
    }
    let socket = connect_silently(server.path());
    send(&socket, Hello { version_min: 0, version_max: u16::MAX, ..hello() }.as_bytes()).unwrap();
    let Heard::Welcome(welcome, Some(_)) = hear(&socket) else { panic!("a range that holds ours fits") };
    assert_eq!((welcome.code, welcome.version), (code::OK, VERSION_MAX));
}

/// Goal:   who connects and says nothing is sent away, nothing is made for him meanwhile (trap 10), and
///         honest clients connect all the while.
/// Method: many silent sockets of this process, of which four may wait and the others are refused, also the honest
///         ones' own as long as they have said nothing. A server process: its segments are counted while they wait.
#[test]
fn f27_trap10_silent_sockets_time_out_and_honest_clients_connect_meanwhile() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = server.process.fds();
    let silent: Vec<_> = (0..200).map(|_| connect_silently(server.path())).collect();
    assert!(server.process.segments() <= 1, "a segment was made for a socket that has said nothing");
    let honest = Bystander::new(server.path());
    honest.check("silent sockets");
    bystander.check("silent sockets");
    let mut timed_out = 0;
    for socket in &silent {
        match hear(socket) {
            Heard::Goodbye(reason) => {
                assert_eq!(reason, DisconnectReason::HandshakeTimeout);
                timed_out += 1;
            }
            Heard::Welcome(welcome, None) => assert_eq!(welcome.scope(), Some(Scope::HandshakesOfProcess)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(hear(socket), Heard::End));
    }
    assert!(timed_out >= 4, "{timed_out}");
    drop((silent, honest));
    eventually("no descriptor has leaked", || server.process.fds() == baseline);
}

/// Goal:   the same while the reactor always has work: what is due by the clock does not wait for a pause.
/// Method: a thousand gated calls are queued and taken a few a round, so that no round is empty; after most
///         of them the socket whose time was over before the first has been told.
#[test]
fn f27_a_reactor_that_always_has_work_still_sends_silent_sockets_away() {
    for policy in ALL {
        let config = ServerConfig {
            policy,
            entries_per_turn: 1,
            handshake_timeout: Duration::from_millis(200),
            ..ServerConfig::default()
        };
        let server = TestServer::start_with(config);
        let busy = IpcClient::connect_with(server.path(), &ClientConfig::for_load(1000, 8)).unwrap();
        let connection = busy.open().unwrap();
        let silent = connect_silently(server.path());
        let begun = std::time::Instant::now();
        // Sockets are accepted in their order: with this one the silent one has been accepted, too.
        drop(Bystander::new(server.path()));
        for _ in 0..1000 {
            connection.submit(GATE, b"", &CallOptions::default()).unwrap();
        }
        busy.flush().unwrap();
        eventually("the first call holds the reactor", || server.entered() == 1);
        eventually("the silent socket's time is over", || begun.elapsed() > Duration::from_millis(250));
        for call in 2..=900 {
            server.open_gate();
            eventually("the next call", || server.entered() == call);
        }
        let mut told = [PollFd::new(&silent, PollFlags::IN)];
        let ready = poll(&mut told, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        assert_eq!(ready, 1, "900 calls and the silent socket has not been told ({policy:?})");
        assert_eq!(hear_goodbye(&silent), DisconnectReason::HandshakeTimeout);
    }
}

/// Goal:   the session socket is silent after the hello; whatever else comes on it ends the session, and
///         descriptors that come with it are closed.
/// Method: a byte, a second hello, a hundred descriptors; a server process whose descriptors are counted.
#[test]
fn f31_bytes_on_the_socket_after_the_hello_end_the_session() {
    let server = ServerProcess::start(&[]);
    let bystander = Bystander::new(server.path());
    let baseline = server.process.fds();
    let null = std::fs::File::open("/dev/null").unwrap();
    for fds in [0, 0, 8, 64] {
        let raw = Raw::connect(server.path());
        let bytes = if fds == 0 { hello().as_bytes().to_vec() } else { vec![1] };
        match fds {
            0 => {
                send(&raw.socket, &bytes).unwrap();
            }
            n => send_with_fds(&raw.socket, &bytes, &vec![null.as_fd(); n]),
        }
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
        bystander.check("bytes on the socket after the hello");
    }
    assert_eq!(bystander.stat("protocol_violations"), 4);
    eventually("no descriptor has leaked", || server.process.fds() == baseline);
}

/// Goal:   a violation costs nothing but its own session: whatever it held is given back (F7, S8).
/// Method: 100 offenders with connections open and calls in flight, one after the other, against limits
///         that would be reached at once if anything stayed behind.
#[test]
fn r3_5_a_hundred_offenders_leave_nothing_behind() {
    let server = ServerProcess::start(&["--max-connections", "8", "--max-sessions", "3"]);
    let bystander = Bystander::new(server.path());
    let kept = bystander.client.open().unwrap();
    let baseline = (server.process.fds(), server.process.segments());
    for _ in 0..100 {
        let mut raw = Raw::connect(server.path());
        for _ in 0..5 {
            raw.open(codec::RAW, 0);
        }
        let right = raw.entry(ECHO, MEDIUM, b"in flight");
        raw.push(INTERACTIVE, &right);
        let wrong = Submission { kind: 0, ..raw.entry(ECHO, SMALL, b"") };
        raw.push(INTERACTIVE, &wrong);
        raw.ring();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation);
    }
    bystander.check("a hundred offenders");
    assert_eq!(common::stat(&kept, "connections_open"), 1);
    eventually("descriptors and segments are back", || {
        (server.process.fds(), server.process.segments()) == baseline
    });
}

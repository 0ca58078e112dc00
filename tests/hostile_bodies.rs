//! What hostile clients do with calls of many frames, with credit and with leases, and that nobody else notices:
//! FAULTS F12, F18, F23, F59, P3, P4. Every attack has a bystander who was there before it.

mod common;

use common::raw::{BEYOND, Heard, LARGE, MEDIUM, Raw, SMALL, connect_silently, hear, hello, send};
use common::{Bystander, COUNT, TestServer, eventually};
use doorbell::protocol::handshake::{DisconnectReason, code};
use doorbell::{MessageType, ServerConfig, WaitPolicy};
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::lane::{BULK, INTERACTIVE};
use doorbell_shm::layout::SLOT_LARGE;
use doorbell_shm::map::PAGE;
use rustix::fs::FallocateFlags;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use zerocopy::IntoBytes;

const ECHO: u32 = MessageType::ECHO.0;
const PAGE_LEN: u32 = PAGE as u32;
const LEASE_PAGES: u16 = 128;

/// An attack and its name.
struct Attack(String, Box<dyn Fn(&mut Raw)>);

fn attack(name: impl Into<String>, attack: impl Fn(&mut Raw) + 'static) -> Attack {
    Attack(name.into(), Box::new(attack))
}

fn server() -> TestServer {
    TestServer::start(WaitPolicy::Block)
}

/// Runs each attack in a session of its own, with lease pages, and expects that it ends that session and nothing else,
/// and that all of its memory is in the budget again.
fn each_ends_its_own_session(attacks: &[Attack]) {
    let server = server();
    let bystander = Bystander::new(server.path());
    for (i, Attack(name, attack)) in attacks.iter().enumerate() {
        let mut raw = Raw::connect_with_leases(server.path(), LEASE_PAGES);
        attack(&mut raw);
        raw.ring();
        assert_eq!(raw.ended(), DisconnectReason::ProtocolViolation, "{name}");
        bystander.check(name);
        assert_eq!(bystander.stat("protocol_violations"), i as u64 + 1, "{name}");
    }
    assert_eq!(server.state.counted.load(SeqCst), 0, "a handler ran for a broken entry");
    eventually("no lease is left", || bystander.stat("leased_bytes") == 0);
}

/// A call whose body goes on, begun and seen by the server: named by the first small slot, answered in the second.
fn begun(raw: &mut Raw, body_len: u64) -> Submission {
    let call = raw.begin(ECHO, SMALL, (SMALL + 1, 1), body_len);
    raw.push(INTERACTIVE, &call);
    call
}

fn push_frame(raw: &mut Raw, call: &Submission, frame: u32, bytes: &[u8], last: bool) {
    let entry = raw.frame(call, frame, SMALL, bytes, last);
    raw.push(INTERACTIVE, &entry);
}

/// Waits until the server has taken so many frames of a call, that which came with it included.
fn frames_taken(raw: &Raw, call: &Submission, count: u32) {
    let word = &raw.lane.common.server_words[call.slot as usize];
    let expected = u64::from(call.generation) | u64::from(count) << 32;
    eventually("the frames have been taken", || word.load(SeqCst) == expected);
}

/// Goal:   frames come one after the other, each once, on their call's ring, until its last one, and of no call that has
///         not been made (F12).
#[test]
fn f12_frames_out_of_order_end_the_session() {
    let mut attacks = Vec::new();
    for (name, numbers) in [
        ("skipped", &[2][..]),
        ("number 0", &[0]),
        ("repeated", &[1, 1]),
        ("going back", &[1, 2, 1]),
        ("far ahead", &[u32::MAX]),
    ] {
        attacks.push(attack(name, move |raw| {
            let call = begun(raw, 0);
            for (number, place) in numbers.iter().zip([SMALL + 2, SMALL + 3, MEDIUM]) {
                let entry = raw.frame(&call, *number, place, b"frame", false);
                raw.push(INTERACTIVE, &entry);
            }
        }));
    }
    attacks.push(attack("on the other ring", |raw| {
        let call = begun(raw, 0);
        raw.ring();
        frames_taken(raw, &call, 1);
        let entry = raw.frame(&call, 1, SMALL, b"frame", false);
        raw.push(BULK, &entry);
    }));
    attacks.push(attack("after the last one", |raw| {
        let call = begun(raw, 0);
        // The answer needs three frames and its window has one slot: the call lives.
        for number in [1, 2] {
            raw.ring();
            frames_taken(raw, &call, number);
            push_frame(raw, &call, number, &[7; 1000], false);
        }
        for (number, place) in [(3, SMALL + 2), (4, SMALL + 3)] {
            let entry = raw.frame(&call, number, place, &[7; 1000], true);
            raw.push(INTERACTIVE, &entry);
        }
    }));
    for off in [1, 1000, i32::MAX as u32] {
        attacks.push(attack(format!("of the call {off} after the present one"), move |raw| {
            let call = begun(raw, 0);
            let generation = call.generation.wrapping_add(off);
            push_frame(raw, &Submission { generation, ..call }, 1, b"frame", false);
        }));
    }
    attacks.push(attack("with both MORE and END", |raw| {
        let call = begun(raw, 0);
        let entry = raw.frame(&call, 1, SMALL, b"frame", false);
        raw.push(INTERACTIVE, &Submission { flags: flag::MORE | flag::END, ..entry });
    }));
    each_ends_its_own_session(&attacks);
}

/// Goal:   a frame lies in a slot that exists, is the client's at the moment, and holds it (F12, S1).
#[test]
fn f12_s1_a_frame_in_an_impossible_slot_ends_the_session() {
    let mut attacks = Vec::new();
    for place in [BEYOND, BEYOND + 4, u32::MAX, LARGE + 1, LARGE + 4, MEDIUM + 1] {
        attacks.push(attack(format!("in slot {place}"), move |raw| {
            let call = begun(raw, 0);
            let entry = raw.frame(&call, 1, SMALL, b"frame", false);
            raw.push(INTERACTIVE, &Submission { payload_slot: place, ..entry });
        }));
    }
    attacks.push(attack("in the slot of its answer", |raw| {
        let call = begun(raw, 0);
        let entry = raw.frame(&call, 1, SMALL + 1, b"frame", false);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("in a leased slot, and does not say so", |raw| {
        let (first, ..) = raw.leased(SMALL + 2, PAGE_LEN, 2);
        let call = begun(raw, 0);
        let entry = raw.frame(&call, 1, first, b"frame", false);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("in a page of a larger leased slot", |raw| {
        let (first, _, epoch) = raw.leased(SMALL + 2, SLOT_LARGE as u32, 1);
        let call = begun(raw, 0);
        let entry = raw.frame(&call, 1, first + 4, b"frame", false);
        raw.push(INTERACTIVE, &Submission { flags: flag::MORE | flag::LEASED, lease_epoch: epoch, ..entry });
    }));
    for (place, len) in [(SMALL, 1025), (MEDIUM, 4097), (LARGE, u32::MAX)] {
        attacks.push(attack(format!("{len} bytes in slot {place}"), move |raw| {
            let call = begun(raw, 0);
            let entry = raw.frame(&call, 1, place, b"frame", false);
            raw.push(INTERACTIVE, &Submission { len, ..entry });
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   a body is as long as it was announced (F12).
#[test]
fn f12_a_body_of_another_length_than_announced_ends_the_session() {
    let mut attacks = Vec::new();
    for (announced, sent, last) in [(10, 11, false), (10, 11, true), (10, 9, true), (1000, 0, true)] {
        attacks.push(attack(format!("{sent} of {announced} bytes, the last: {last}"), move |raw| {
            let call = begun(raw, announced);
            push_frame(raw, &call, 1, &vec![1; sent], last);
        }));
    }
    each_ends_its_own_session(&attacks);
}

/// Goal:   a client that has not seen yet that its call has ended may go on sending: that is dropped.
/// Method: frames of a call that was answered, of one that was cancelled, and of the one before the present one.
#[test]
fn f12_frames_of_a_call_that_has_ended_are_dropped() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect(server.path());
    let done = raw.entry(ECHO, SMALL, b"one frame");
    raw.call(&done);
    push_frame(&mut raw, &done, 1, b"late", true);
    let cancelled = begun(&mut raw, 0);
    raw.ring();
    frames_taken(&raw, &cancelled, 1);
    raw.say(&cancelled, true, 0);
    assert_eq!(raw.completion(INTERACTIVE).status, Status::Cancelled as u8);
    push_frame(&mut raw, &cancelled, 1, b"late", false);
    push_frame(&mut raw, &cancelled, 7, b"later", true);
    let present = begun(&mut raw, 5);
    let late = raw.frame(&cancelled, 9, SMALL, b"", true);
    raw.push_words(INTERACTIVE, late.pack());
    push_frame(&mut raw, &present, 1, b"right", true);
    raw.ring();
    let answer = raw.completion(INTERACTIVE);
    assert_eq!((answer.generation, answer.status, answer.len), (present.generation, Status::Ok as u8, 5));
    assert_eq!(raw.slot(SMALL + 1, 5), b"right");
    raw.echo(b"goes on");
    bystander.check("frames of calls that have ended");
}

/// Goal:   R1.5: a body of unknown length is taken up to the limit, and no further; the session goes on.
#[test]
fn f12_r1_5_an_endless_body_is_too_large_at_the_limit() {
    let limit = 64 << 10;
    let config = ServerConfig { max_message_size: limit, reactors: 1, ..ServerConfig::default() };
    let server = TestServer::start_with(config);
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect(server.path());
    for message_type in [ECHO, COUNT.0] {
        let call = raw.begin(message_type, SMALL, (SMALL + 1, 1), 0);
        raw.push(INTERACTIVE, &call);
        raw.ring();
        let (mut number, mut released) = (0, 0);
        let reply = loop {
            if let Some(completion) = next(&mut raw) {
                if completion.kind == kind::REPLY {
                    break completion;
                }
                released += 1;
                raw.say(&call, false, released);
            } else if taken(&raw, &call) > number {
                number += 1;
                let entry = raw.frame(&call, number, SMALL, &[3; 1000], false);
                raw.push(INTERACTIVE, &entry);
                raw.ring();
            }
            assert!(number < 100, "{} bytes were taken", number * 1000);
        };
        assert_eq!((reply.status, reply.detail), (Status::TooLarge as u8, limit));
        bystander.check("an endless body");
        raw.echo(b"goes on");
    }
    assert_eq!(server.state.counted.load(SeqCst), 0);
}

fn next(raw: &mut Raw) -> Option<Completion> {
    let words = raw.lane.completions[INTERACTIVE].pop().unwrap()?;
    raw.lane.completions[INTERACTIVE].publish();
    Some(Completion::unpack(words).unwrap())
}

fn taken(raw: &Raw, call: &Submission) -> u32 {
    let word = raw.lane.common.server_words[call.slot as usize].load(SeqCst);
    if word as u32 == call.generation { (word >> 32) as u32 } else { 0 }
}

/// Goal:   a body that never ends costs nobody anything, and ends by a cancel and by its deadline.
#[test]
fn f12_a_body_that_never_ends_is_ended_by_cancel_and_deadline() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect(server.path());
    let call = begun(&mut raw, 0);
    raw.ring();
    frames_taken(&raw, &call, 1);
    bystander.check("a body that stands still");
    raw.say(&call, true, 0);
    assert_eq!(raw.completion(INTERACTIVE).status, Status::Cancelled as u8);
    for message_type in [ECHO, COUNT.0] {
        let call = raw.begin(message_type, SMALL, (SMALL + 1, 1), 0);
        let deadline = deadline_soon();
        raw.push(INTERACTIVE, &Submission { deadline, ..call });
        raw.ring();
        assert_eq!(raw.completion(INTERACTIVE).status, Status::DeadlineExceeded as u8);
        raw.echo(b"goes on");
    }
    bystander.check("bodies that never ended");
    eventually("no memory is reserved for bodies", || bystander.stat("body_bytes") == 0);
}

/// 100 ms from now on the server's clock.
fn deadline_soon() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64 + 100_000_000
}

/// A call whose answer has four frames of 1000 bytes at least, and room for one: it has sent one and waits for credit.
fn waits_for_credit(raw: &mut Raw) -> Submission {
    let body: Vec<u8> = (0..4096).map(|i| (i % 251) as u8).collect();
    let call = Submission { response_slot: SMALL + 1, ..raw.entry(ECHO, MEDIUM, &body) };
    raw.push(INTERACTIVE, &call);
    raw.ring();
    let first = raw.completion(INTERACTIVE);
    assert_eq!((first.kind, first.len, first.frame), (kind::FRAME, 1024, 0));
    call
}

/// Goal:   P3: credit is for what was sent, and given once.
#[test]
fn p3_credit_that_was_not_given_or_is_taken_back_ends_the_session() {
    let mut attacks = Vec::new();
    for released in [2, 3, 1000, u32::MAX >> 1] {
        attacks.push(attack(format!("{released} of 1 frame released"), move |raw| {
            let call = waits_for_credit(raw);
            raw.say(&call, false, released);
        }));
    }
    attacks.push(attack("credit taken back", |raw| {
        let call = waits_for_credit(raw);
        raw.say(&call, false, 1);
        raw.completion(INTERACTIVE);
        raw.say(&call, false, 0);
    }));
    each_ends_its_own_session(&attacks);
}

/// Goal:   P3, P4: a client that releases nothing stops its own answer; nothing is written beyond its window; others, and
///         its other calls, go on; a cancel ends it although completion ring and window are full.
#[test]
fn p3_p4_a_client_that_releases_nothing_stops_only_its_own_answer() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect(server.path());
    let call = waits_for_credit(&mut raw);
    let first: Vec<u8> = (0..1024).map(|i| (i % 251) as u8).collect();
    for _ in 0..20 {
        bystander.check("an answer that nobody reads");
        let other = raw.entry(ECHO, SMALL + 2, b"another call");
        assert_eq!(raw.call(&other).status, Status::Ok as u8);
        assert_eq!(raw.slot(SMALL + 1, 1024), first, "written before it was released");
        assert_eq!(raw.slot(SMALL + 3, 1024), [0; 1024], "beyond the window");
    }
    // Seven completions that nobody takes: with the one that the first call has reserved the ring is full.
    for i in 0..7 {
        let entry = raw.entry(ECHO, SMALL + 2, b"x");
        raw.push(INTERACTIVE, &entry);
        raw.ring();
        let published = raw.word32(raw.layout.published[INTERACTIVE]);
        if i < 6 {
            eventually("the call was taken", || {
                published.load(SeqCst) == raw.lane.submissions[0].next() as u32
            });
        }
        bystander.check("a full completion ring");
    }
    raw.say(&call, true, 0);
    let mut seen = Vec::new();
    eventually("the cancelled call has ended", || {
        seen.extend(next(&mut raw).map(|completion| (completion.slot, completion.status)));
        seen.contains(&(MEDIUM, Status::Cancelled as u8))
    });
    while seen.len() < 8 {
        let completion = raw.completion(INTERACTIVE);
        seen.push((completion.slot, completion.status));
    }
    raw.echo(b"goes on");
    bystander.check("a cancel with everything full");
}

/// Goal:   F23: only what is leased and unused can be given back, once; only what a lease can be is asked for.
#[test]
fn f23_leases_that_cannot_be_end_the_session() {
    let mut attacks = Vec::new();
    for (bytes, slots) in
        [(PAGE_LEN, 0), (PAGE_LEN, 65), (PAGE_LEN, u16::MAX), (1024, 1), (5, 1), (0, 1), (u32::MAX, 1)]
    {
        attacks.push(attack(format!("{slots} slots of {bytes} bytes"), move |raw| {
            let entry = raw.lease(SMALL, bytes, slots);
            raw.push(INTERACTIVE, &entry);
        }));
    }
    attacks.push(attack("a RETURN of a lease in use", |raw| {
        let (first, _, epoch) = raw.leased(SMALL + 2, PAGE_LEN, 2);
        let call = raw.begin(ECHO, SMALL, (first, 1), 0);
        let leased =
            Submission { flags: flag::MORE | flag::LEASED, payload_slot: SMALL, lease_epoch: epoch, ..call };
        raw.push(INTERACTIVE, &leased);
        let entry = raw.give_back(SMALL + 2, first, epoch);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("a RETURN of a part of a lease", |raw| {
        let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 2);
        let entry = raw.give_back(SMALL, first + 4, epoch);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("a RETURN of base slots", |raw| {
        let (.., epoch) = raw.leased(SMALL, PAGE_LEN, 2);
        let entry = raw.give_back(SMALL, MEDIUM, epoch);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("a RETURN without any lease", |raw| {
        let entry = raw.give_back(SMALL, BEYOND, 1);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("a RETURN of another epoch", |raw| {
        let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 2);
        let entry = raw.give_back(SMALL, first, epoch + 1);
        raw.push(INTERACTIVE, &entry);
    }));
    attacks.push(attack("the same RETURN twice", |raw| {
        let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 2);
        for slot in [SMALL, SMALL + 1] {
            let entry = raw.give_back(slot, first, epoch);
            raw.push(INTERACTIVE, &entry);
        }
    }));
    attacks.push(attack("a leased slot after its RETURN", |raw| {
        let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 2);
        let back = raw.give_back(SMALL, first, epoch);
        assert_eq!(raw.call(&back).status, Status::Ok as u8);
        let call = raw.entry(COUNT.0, SMALL, b"");
        let (flags, payload_slot, lease_epoch) = (flag::END | flag::LEASED, first, epoch);
        let call = Submission { flags, payload_slot, response_slot: first, lease_epoch, ..call };
        raw.push(INTERACTIVE, &call);
    }));
    each_ends_its_own_session(&attacks);
}

/// Goal:   a lane gets no more leases than it has pages for: `Overloaded`, and it goes on.
#[test]
fn f23_a_lane_that_is_full_of_leases_gets_no_more() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect_with_leases(server.path(), 9);
    assert_eq!(raw.leased(SMALL, SLOT_LARGE as u32, 64).1, 2);
    assert_eq!(raw.leased(SMALL, PAGE_LEN, 64).1, 1);
    for bytes in [PAGE_LEN, SLOT_LARGE as u32] {
        let entry = raw.lease(SMALL, bytes, 1);
        assert_eq!(raw.call(&entry).status, Status::Overloaded as u8);
    }
    raw.echo(b"goes on");
    bystander.check("a lane full of leases");
}

/// A server whose memory a session or two can lease altogether.
fn small_server() -> TestServer {
    TestServer::start_with(ServerConfig { memory_budget: 2 << 20, reactors: 1, ..ServerConfig::default() })
}

/// Leases all that the budget has left; returns the first slot and the epoch of one lease.
fn lease_everything(raw: &mut Raw) -> (u32, u32) {
    let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 1);
    loop {
        let got = raw.leased(SMALL + 2, PAGE_LEN, 64).1;
        if got < 64 {
            return (first, epoch);
        }
    }
}

/// Goal:   F59: who keeps memory that others wait for and does nothing with it loses it, and the calls that have it are
///         answered so; uses of it afterwards are answered `TakenBack`; a wish that is cancelled ends.
/// Method: one session leases everything, says that it uses it, has a call in it and stands still; another one asks.
#[test]
fn f59_a_client_that_stands_still_on_its_leases_loses_them_to_one_who_waits() {
    let server = small_server();
    let bystander = Bystander::new(server.path());
    let mut hoarder = Raw::connect_with_leases(server.path(), 1000);
    let mut other = Raw::connect_with_leases(server.path(), 64);
    let using = hoarder.word32(hoarder.layout.using);
    using.store(1, SeqCst);
    let (first, epoch) = lease_everything(&mut hoarder);
    let call = hoarder.begin(ECHO, SMALL, (first, 1), 0);
    let (flags, payload_slot) = (flag::MORE | flag::LEASED, SMALL);
    let call = Submission { flags, payload_slot, lease_epoch: epoch, ..call };
    hoarder.push(INTERACTIVE, &call);
    hoarder.ring();
    frames_taken(&hoarder, &call, 1);
    let cancelled = other.lease(SMALL, PAGE_LEN, 1);
    other.push(INTERACTIVE, &cancelled);
    other.say(&cancelled, true, 0);
    assert_eq!(other.completion(INTERACTIVE).status, Status::Cancelled as u8);
    let granted = other.leased(SMALL, PAGE_LEN, 4);
    assert!(granted.1 >= 1);
    assert_eq!(hoarder.completion(INTERACTIVE).status, Status::TakenBack as u8);
    assert_eq!(bystander.stat("leases_forced"), 1);
    let late = hoarder.entry(COUNT.0, SMALL, b"");
    let (flags, payload_slot) = (flag::END | flag::LEASED, first);
    let late = Submission { flags, payload_slot, response_slot: first, lease_epoch: epoch, ..late };
    assert_eq!(hoarder.call(&late).status, Status::TakenBack as u8);
    let back = hoarder.give_back(SMALL, first, epoch);
    assert_eq!(hoarder.call(&back).status, Status::Ok as u8, "a RETURN of what is gone does nothing");
    hoarder.echo(b"goes on");
    assert_eq!(server.state.counted.load(SeqCst), 0);
    bystander.check("leases taken by force");
}

/// Goal:   F18: a client that makes holes of its own leases harms nobody: what lies there is zero.
#[test]
fn f18_holes_in_leased_memory_harm_nobody() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let mut raw = Raw::connect_with_leases(server.path(), 64);
    let (first, _, epoch) = raw.leased(SMALL, PAGE_LEN, 8);
    let start = raw.layout.slots + first as usize * 1024;
    for _ in 0..3 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&raw.memory, flags, start as u64, 8 * PAGE as u64).unwrap();
        let call = raw.entry(ECHO, SMALL, b"");
        let (flags, payload_slot, len) = (flag::END | flag::LEASED, first, 100);
        let call =
            Submission { flags, payload_slot, len, response_slot: first + 4, lease_epoch: epoch, ..call };
        let answer = raw.call(&call);
        assert_eq!((answer.status, answer.len), (Status::Ok as u8, 100));
        assert_eq!(raw.slot(first + 4, 100), [0; 100]);
        bystander.check("holes in leases");
    }
    let back = raw.give_back(SMALL, first, epoch);
    assert_eq!(raw.call(&back).status, Status::Ok as u8);
}

/// Goal:   F18: pages that a client makes exist although nobody granted them are found and taken; who goes on so is
///         ended with `Quota`.
#[test]
fn f18_pages_that_were_not_granted_are_found_and_taken_and_in_the_end_their_session_ends() {
    let server = server();
    let bystander = Bystander::new(server.path());
    let raw = Raw::connect_with_leases(server.path(), 64);
    let blocks = || rustix::fs::fstat(raw.memory.as_fd()).unwrap().st_blocks;
    let granted = blocks();
    let touch =
        || (raw.layout.slots..raw.segment.len()).step_by(PAGE).for_each(|at| raw.word64(at).store(1, SeqCst));
    touch();
    assert!(blocks() > granted);
    eventually("the pages are gone", || blocks() == granted);
    assert!(bystander.stat("excess_found") >= 1);
    assert!(raw.runs());
    eventually("the session is ended", || {
        touch();
        !raw.runs()
    });
    assert_eq!(raw.ended(), DisconnectReason::Quota);
    bystander.check("pages that were not granted");
}

/// Goal:   DESIGN §5: a session that the budget has no room for is refused with `NoMemory`; those that exist go on.
#[test]
fn r5_3_sessions_beyond_the_memory_budget_are_refused() {
    let server = small_server();
    let bystander = Bystander::new(server.path());
    let mut hoarder = Raw::connect_with_leases(server.path(), 1000);
    hoarder.word32(hoarder.layout.using).store(1, SeqCst);
    lease_everything(&mut hoarder);
    // What is leased leaves room for some.
    let mut sessions = Vec::new();
    let refusal = loop {
        let socket = connect_silently(server.path());
        send(&socket, hello().as_bytes()).unwrap();
        match hear(&socket) {
            Heard::Welcome(_, Some(_)) => sessions.push(socket),
            Heard::Welcome(refusal, None) => break refusal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refusal.code, code::NO_MEMORY);
    assert!((1..=32).contains(&sessions.len()), "{} sessions", sessions.len());
    hoarder.echo(b"goes on");
    bystander.check("a session without memory");
}

//! What a hostile client can do to a whole lane: entries, flags, words and positions of its segment.
#![cfg(not(loom))]

mod common;

use common::{MIXED, config, steps};
use doorbell_shm::PeerFault;
use doorbell_shm::bell::{self, Published};
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE, ServerLane};
use doorbell_shm::layout::{HEADER_LEN, LaneLayout};
use doorbell_shm::map::Shared;
use doorbell_shm::ring::Consumer;
use doorbell_shm::segment::{Identity, Segment};
use proptest::prelude::*;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

const IDENTITY: Identity = Identity { epoch: 1, session: [2, 3] };

/// Both ends of a home lane in one process, and every word of the segment.
struct Lane {
    server: ServerLane,
    client: ClientLane,
    words: Shared<[AtomicU64]>,
    layout: LaneLayout,
    segment: Segment,
}

impl Lane {
    fn new() -> Self {
        let segment = Segment::on_heap(MIXED, 1, IDENTITY).unwrap();
        let (map, geometry) = (segment.mapping(), segment.geometry());
        let layout = LaneLayout::home(geometry);
        Self {
            server: ServerLane::open(map, geometry, &layout).unwrap(),
            client: ClientLane::open(map, geometry, &layout).unwrap(),
            words: map.slice(0, map.len() / 8).unwrap(),
            layout,
            segment,
        }
    }

    fn bytes(&self) -> Vec<u64> {
        self.words.iter().map(|w| w.load(Relaxed)).collect()
    }
}

/// A correct call in a small slot, answered in the same slot.
fn call(slot: u32, generation: u32, len: u32) -> Submission {
    Submission {
        kind: kind::CALL,
        flags: flag::END,
        slot,
        generation,
        len,
        response_slot: slot,
        response_count: 1,
        ..Default::default()
    }
}

/// Goal:   one call goes through a lane: the floor for everything below.
/// Method: payload, submission, position, answer, completion; both priorities.
#[test]
fn a_call_and_its_answer_pass_through_a_lane() {
    for ring in [INTERACTIVE, BULK] {
        let mut lane = Lane::new();
        let grant = lane.client.slots.take(5).unwrap();
        lane.client.slots.advance(grant);
        let offset = LaneLayout::slot_offset(grant.slot);
        lane.client.common.payload.write(offset, b"hello");
        let sent = call(grant.slot, grant.generation, 5);
        assert_eq!(lane.client.submissions[ring].push(sent.pack()), Ok(true));

        let taken = Submission::unpack(lane.server.submissions[ring].pop().unwrap().unwrap()).unwrap();
        assert_eq!(taken, sent);
        lane.server.submissions[ring].publish();
        assert_eq!(lane.server.slots.lend(taken.slot, taken.generation, taken.len), Ok((1024, false)));
        let mut staging = [0; 5];
        lane.server.common.payload.read(offset, &mut staging);
        assert_eq!(&staging, b"hello");
        lane.server.common.payload.write(offset, b"world!");
        let reply = Completion {
            kind: kind::REPLY,
            status: Status::Ok as u8,
            flags: flag::END,
            slot: taken.slot,
            generation: taken.generation,
            len: 6,
            ..Default::default()
        };
        assert_eq!(lane.server.completions[ring].push(reply.pack()), Ok(true));
        lane.server.slots.give_back(taken.slot);

        assert_eq!(lane.client.submissions[1 - ring].outstanding(), 0, "the other ring is not concerned");
        let got = Completion::unpack(lane.client.completions[ring].pop().unwrap().unwrap()).unwrap();
        assert_eq!((got, Status::from_code(got.status)), (reply, Some(Status::Ok)));
        lane.client.completions[ring].publish();
        lane.client.slots.put_back(got.slot);
        lane.client.submissions[ring].refresh().unwrap();
        lane.server.completions[ring].refresh().unwrap();
        assert_eq!(
            lane.client.submissions[ring].outstanding() + lane.server.completions[ring].outstanding(),
            0
        );
    }
}

/// Goal:   F13: every reserved bit of an entry is refused, so that it can be given a meaning later; no
///         other bit is.
/// Method: each of the 480 bits that are not the lap's, alone, in both kinds of entry.
#[test]
fn f13_every_reserved_bit_is_refused_and_no_other() {
    for bit in (0..512).filter(|b| *b >= 32) {
        let (word, value) = (bit / 64, 1u64 << (bit % 64));
        let mut words = [0; 8];
        words[word] = value;
        let unknown_flag = word == 0 && (40 + 7..56).contains(&bit);
        let found = Submission::unpack(words);
        if word == 7 || unknown_flag {
            assert_eq!(found, Err(PeerFault::Reserved { word: word as u32, value }), "bit {bit}");
        } else {
            assert_eq!(found.map(|s| s.pack()), Ok(words), "bit {bit}");
        }
        if word < 4 {
            let found = Completion::unpack([words[0], words[1], words[2], words[3]]);
            if word == 0 && (48 + 2..64).contains(&bit) {
                assert_eq!(found, Err(PeerFault::Reserved { word: 0, value }), "bit {bit}");
            } else {
                assert_eq!(found.map(|c| c.pack().to_vec()), Ok(words[..4].to_vec()), "bit {bit}");
            }
        }
    }
}

/// Goal:   F13: a reserved bit is refused in whatever company it comes, and the lap is not judged.
/// Method: a correct call with all its bits, plus one reserved bit.
#[test]
fn f13_a_reserved_bit_in_a_correct_entry_is_refused() {
    let good = call(20, 1, 100).pack();
    assert!(Submission::unpack([good[0] | 0xffff_ffff, good[1], good[2], good[3], good[4], 0, 0, 0]).is_ok());
    let mut bad = good;
    bad[7] = 1 << 63;
    assert_eq!(Submission::unpack(bad), Err(PeerFault::Reserved { word: 7, value: 1 << 63 }));
    bad = good;
    bad[0] |= 1 << 55;
    assert!(matches!(Submission::unpack(bad), Err(PeerFault::Reserved { word: 0, .. })));
}

/// Goal:   F12: a hostile entry that came through a ring is refused by the table, and costs the lane
///         nothing: the next correct call is served.
/// Method: slot out of range, length above the class, wrong generation, a slot twice, then a correct call.
#[test]
fn f12_hostile_descriptors_are_refused_by_the_slot_table() {
    let mut lane = Lane::new();
    let hostile = [
        (call(24, 1, 0), PeerFault::Slot { slot: 24 }),
        (call(u32::MAX, 1, 0), PeerFault::Slot { slot: u32::MAX }),
        (call(20, 1, 1025), PeerFault::Length { len: 1025, slot: 20, capacity: 1024 }),
        (call(20, 2, 0), PeerFault::Generation { slot: 20, theirs: 2, expected: 1 }),
    ];
    let mut serve = |s: Submission| {
        assert_eq!(lane.client.submissions[0].push(s.pack()), Ok(true));
        let s = Submission::unpack(lane.server.submissions[0].pop().unwrap().unwrap()).unwrap();
        lane.server.slots.lend(s.slot, s.generation, s.len)
    };
    for (entry, fault) in hostile {
        assert_eq!(serve(entry), Err(fault));
    }
    assert_eq!(serve(call(20, 1, 1024)), Ok((1024, false)));
    assert_eq!(serve(call(20, 2, 0)), Err(PeerFault::SlotBusy { slot: 20, generation: 1 }));
}

/// Goal:   F16: what the server writes it never reads back, so scribbling there changes nothing for it.
/// Method: the same forty calls twice, the second time with every word that the server alone writes
///         (header, published positions, server words, completion rings) overwritten between any two steps.
///         The server's own answers and positions are the same.
#[test]
fn f16_scribbles_on_what_the_server_writes_change_nothing_for_it() {
    let run = |scribble: bool| {
        let mut lane = Lane::new();
        let n = lane.segment.geometry().ring_len() as usize;
        let theirs: Vec<usize> = [
            0..HEADER_LEN,
            lane.layout.published[0]..lane.layout.published[0] + 8,
            lane.layout.server_words..lane.layout.submissions[0],
            lane.layout.completions[0]..lane.layout.completions[0] + 32 * n,
            lane.layout.completions[1]..lane.layout.completions[1] + 32 * n,
        ]
        .into_iter()
        .flat_map(|r| r.step_by(8).map(|b| b / 8))
        .collect();
        let mut seed = 1u64;
        let mut attack = || {
            for word in theirs.iter().filter(|_| scribble) {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                lane.words[*word].store(seed, Relaxed);
            }
        };
        let mut seen = Vec::new();
        for i in 0..steps(40) as u32 {
            let sent = call(20 + i % 4, 1 + i / 4, i);
            lane.client.submissions[0].refresh().ok();
            let entry = (i as usize % n) * 8;
            let at = lane.layout.submissions[0] / 8 + entry;
            // The hostile client does not care about published positions: it writes its entries anyway.
            for (word, value) in sent.pack().into_iter().enumerate() {
                let lap = if word == 0 { u64::from(i) / n as u64 + 1 } else { 0 };
                lane.words[at + word].store(value | lap, Relaxed);
            }
            attack();
            let words = lane.server.submissions[0].pop();
            attack();
            lane.server.submissions[0].publish();
            attack();
            let s = Submission::unpack(words.unwrap().unwrap()).unwrap();
            let lent = lane.server.slots.lend(s.slot, s.generation, s.len);
            lane.server.common.server_words[s.slot as usize].store(7, Relaxed);
            attack();
            let pushed =
                lane.server.completions[0].push(Completion { slot: s.slot, ..Default::default() }.pack());
            lane.server.slots.give_back(s.slot);
            attack();
            lane.words[lane.layout.consumed[0] / 8].store(u64::from(i) + 1, Relaxed);
            let refreshed = lane.server.completions[0].refresh();
            let positions = (lane.server.submissions[0].next(), lane.server.completions[0].next());
            seen.push((s, lent, pushed, refreshed, positions, lane.server.completions[0].outstanding()));
        }
        seen
    };
    let (clean, attacked) = (run(false), run(true));
    assert_eq!(clean, attacked);
    assert!(clean.iter().all(|s| s.2 == Ok(true) && s.3 == Ok(())));
}

/// Goal:   F16: a scribble on completions and published positions harms the client that did it, no more.
/// Method: the client's own end reports the faults that it made itself.
#[test]
fn f16_a_client_that_scribbles_finds_its_own_faults() {
    let mut lane = Lane::new();
    lane.words[lane.layout.completions[0] / 8].store(99, Relaxed);
    let fault = PeerFault::Lap { theirs: 99, expected: 1, position: 0 };
    assert_eq!(lane.client.completions[0].pop(), Err(fault));
    lane.words[lane.layout.published[0] / 8].store(5, Relaxed);
    let fault = PeerFault::Position { theirs: 5, oldest: 0, newest: 0 };
    assert_eq!(lane.client.submissions[0].refresh(), Err(fault));
    assert_eq!(lane.server.completions[0].push([0; 4]), Ok(true), "the server has not noticed");
}

/// Goal:   F11, trap 1: the server's end writes only what it owns, whatever the segment says.
/// Method: every word of the segment is hostile; the server pushes, publishes, marks and clears. Only the
///         regions that it writes have changed.
#[test]
fn trap01_the_server_writes_only_its_own_regions_whatever_the_segment_says() {
    let mut lane = Lane::new();
    for word in lane.words.iter() {
        word.store(0xdead_beef_dead_beef, Relaxed);
    }
    let before = lane.bytes();
    for ring in [INTERACTIVE, BULK] {
        assert_eq!(lane.server.completions[ring].push([1, 2, 3, 4]), Ok(true));
        lane.server.submissions[ring].publish();
        assert!(lane.server.submissions[ring].pop().is_err());
    }
    let l = &lane.layout;
    let own = |at: usize| {
        at / 64 == l.published[0] / 64
            || (l.completions[0]..l.completions[0] + 32).contains(&at)
            || (l.completions[1]..l.completions[1] + 32).contains(&at)
    };
    for (i, (was, is)) in before.iter().zip(lane.bytes()).enumerate() {
        assert!(*was == is || own(8 * i), "byte {} changed", 8 * i);
    }
}

/// Goal:   a bell is a hint: any value in it makes the server at most look, or be woken once too often.
/// Method: the full table of states and what was published; then values that nobody wrote.
#[test]
fn trap08_any_value_of_a_bell_leads_at_most_to_one_wake() {
    use Published::{Consumed, Submissions};
    let lane = Lane::new();
    let server = &lane.server.common.server_bell;
    let client = &lane.client.common.server_bell;
    let rung = [
        (bell::AWAKE, Submissions, false),
        (bell::AWAKE, Consumed, false),
        (bell::ASLEEP, Submissions, true),
        (bell::ASLEEP, Consumed, false),
        (bell::ASLEEP_WANTS_SPACE, Submissions, true),
        (bell::ASLEEP_WANTS_SPACE, Consumed, true),
        (3, Submissions, true),
        (u32::MAX, Consumed, true),
    ];
    for (state, published, expected) in rung {
        server.mark(state);
        bell::fence_before_bell();
        assert_eq!(client.take(published), expected, "{state} {published:?}");
        assert_eq!(client.take(Submissions), state != bell::AWAKE && !expected, "taken once only");
        server.clear();
    }
    let (server, client) = (&lane.server.common.client_bell, &lane.client.common.client_bell);
    assert_eq!(server.take(), 0);
    assert_eq!(client.mark(bell::WAITER_FUTEX), 1);
    assert_eq!(client.mark(bell::WAITER_SOCKET), 3, "the value to sleep on has both bits");
    client.clear(bell::WAITER_FUTEX);
    assert_eq!((server.take(), server.take()), (bell::WAITER_SOCKET, 0));
    client.mark(u32::MAX - 1);
    assert_eq!(server.take(), bell::WAITER_SOCKET, "bits that mean nothing wake nobody");
}

proptest! {
    #![proptest_config(config(300))]

    /// Goal:   F11–F13, F16: no segment contents make the server's end panic, loop, or report anything but
    ///         a peer's fault; its positions move by what it did itself.
    /// Method: a random segment, then random single words changed between the steps of a server's round.
    #[test]
    fn f11_a_server_survives_any_segment(
        seed: u64, mut scribbles in prop::collection::vec((0..512usize, prop_oneof![0..3u64, any::<u64>()]), steps(64)),
    ) {
        let mut lane = Lane::new();
        let mut state = seed;
        for word in lane.words.iter().take(512).skip(HEADER_LEN / 8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Mostly small numbers in the low half: laps that look right are the interesting ones.
            word.store(if state >> 62 == 0 { state } else { state << 32 | state >> 63 }, Relaxed);
        }
        while let Some((word, value)) = scribbles.pop() {
            lane.words[word].store(value, Relaxed);
            let rx = &mut lane.server.submissions[scribbles.len() % 2];
            let before = rx.next();
            let popped = rx.pop();
            prop_assert_eq!(rx.next() - before, u64::from(matches!(popped, Ok(Some(_)))));
            rx.publish();
            if let Ok(Some(words)) = popped
                && let Ok(s) = Submission::unpack(words)
                && let Ok((capacity, _)) = lane.server.slots.lend(s.slot, s.generation, s.len)
            {
                prop_assert!(s.len <= capacity);
                let mut staging = vec![0; s.len as usize];
                lane.server.common.payload.read(LaneLayout::slot_offset(s.slot), &mut staging);
                lane.server.slots.give_back(s.slot);
            }
            let mut count = 0;
            let taken = lane.server.common.hints.take(|s| { count += 1; assert!(s < 24); });
            prop_assert!(count <= 24);
            prop_assert!(matches!(taken, Ok(()) | Err(PeerFault::Hint { .. })), "{:?}", taken);
            let tx = &mut lane.server.completions[scribbles.len() % 2];
            let before = (tx.next(), tx.outstanding());
            match tx.push([1, 2, 3, 4]) {
                Ok(true) => prop_assert_eq!(tx.next(), before.0 + 1),
                Ok(false) => prop_assert_eq!((tx.next(), tx.outstanding()), (before.0, 16)),
                Err(fault) => {
                    prop_assert!(matches!(fault, PeerFault::Position { .. }), "{:?}", fault);
                    prop_assert_eq!((tx.next(), tx.outstanding()), before);
                }
            }
            prop_assert!(lane.server.common.client_bell.take() <= 3);
        }
    }
}

/// Goal:   a lane does not open on a mapping that is too short for its layout.
/// Method: every length in pages below the right one.
#[test]
fn a_lane_on_a_short_mapping_is_refused() {
    let geometry = MIXED;
    let layout = LaneLayout::home(&geometry);
    let pages = layout.end / doorbell_shm::map::PAGE;
    for n in 1..=pages {
        let map = doorbell_shm::map::Mapping::on_heap(n * doorbell_shm::map::PAGE);
        assert_eq!(ServerLane::open(&map, &geometry, &layout).is_ok(), n == pages);
        assert_eq!(ClientLane::open(&map, &geometry, &layout).is_ok(), n == pages);
    }
}

/// Goal:   a consumer's view stays usable when the lane that made it is gone.
/// Method: a ring on a mapping whose other owners were dropped.
#[test]
fn a_ring_keeps_its_mapping_alive() {
    let Lane { server, segment, words, client, .. } = Lane::new();
    drop((segment, words, client));
    let [mut rx, _]: [Consumer<_, _, 8>; 2] = server.submissions;
    assert_eq!(rx.pop(), Ok(None));
}

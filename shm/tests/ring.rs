//! Rings against a queue as oracle, across every wrap, and against a peer that writes whatever it likes.
#![cfg(not(loom))]

mod common;

use common::{Ring, config, steps};
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{SUBMISSION_WORDS, Submission, kind};
use doorbell_shm::ring::{LAP_MASK, lap};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

const W: usize = 4;

/// Words that say who they are in every half that is theirs.
fn message(id: u64) -> [u64; W] {
    [id << 32, id, !id, id.rotate_left(17)]
}

/// Pops one entry and returns the id of its message, checking every word.
fn pop_id(ring: &mut Ring<W>) -> Option<u64> {
    let at = ring.rx.next();
    let words = ring.rx.pop().unwrap()?;
    assert_eq!(words[0] & LAP_MASK, u64::from(lap(at, ring.len.trailing_zeros())), "the lap of {at}");
    let id = words[1];
    assert_eq!([words[0] & !LAP_MASK, words[1], words[2], words[3]], message(id), "torn entry at {at}");
    Some(id)
}

// ---- the oracle ----

#[derive(Debug, Clone, Copy)]
enum Op {
    Push,
    Pop,
    Publish,
    /// Publishes only the part `.0` / 255 of what was popped since the last time.
    PublishPart(u8),
    Refresh,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![4 => Just(Op::Push), 4 => Just(Op::Pop), 2 => Just(Op::Publish), 1 => any::<u8>().prop_map(Op::PublishPart), 1 => Just(Op::Refresh)];
    prop::collection::vec(op, 1..steps(200))
}

/// Where rings start in the property: everywhere that a number of theirs wraps.
fn starts(order: u32) -> impl Strategy<Value = u64> {
    let lap_wraps = 1u64 << (32 + order);
    prop_oneof![
        Just(0),
        Just((1 << 32) - 3),
        Just(lap_wraps - (1 << order) - 2),
        Just(lap_wraps - 2),
        0..=1u64 << 50,
    ]
}

proptest! {
    #![proptest_config(config(2000))]

    /// Goal:   a ring is a bounded queue: first in first out, nothing lost, doubled, torn or invented, over
    ///         every wrap of index, position and lap.
    /// Method: any mix of calls on rings of 1 to 32 entries, compared call by call with a `VecDeque` and
    ///         three counters. Starts near 0, near 2^32 positions and near 2^32 laps.
    #[test]
    fn a_ring_does_what_a_queue_does(
        (order, at) in (0..=5u32).prop_flat_map(|order| (Just(order), starts(order))),
        ops in ops(),
    ) {
        let mut ring = Ring::<W>::starting_at(order, at);
        let mut queue = VecDeque::new();
        // Positions: written, taken, published by the consumer, and last seen by the producer.
        let (mut written, mut taken, mut published, mut seen) = (at, at, at, at);
        for op in ops {
            match op {
                Op::Push => {
                    if written - seen == ring.len {
                        seen = published;
                    }
                    let fits = written - seen < ring.len;
                    prop_assert_eq!(ring.tx.push(message(written)), Ok(fits));
                    if fits {
                        queue.push_back(written);
                        written += 1;
                    }
                }
                Op::Pop => {
                    let expected = queue.pop_front();
                    prop_assert_eq!(pop_id(&mut ring), expected);
                    taken += u64::from(expected.is_some());
                }
                Op::Publish => {
                    ring.rx.publish();
                    published = taken;
                    prop_assert_eq!(ring.position.load(Relaxed), published as u32);
                }
                Op::PublishPart(part) => {
                    published += (taken - published) * u64::from(part) / 255;
                    ring.rx.publish_at(published);
                    prop_assert_eq!(ring.position.load(Relaxed), published as u32);
                }
                Op::Refresh => {
                    ring.tx.refresh().unwrap();
                    seen = published;
                }
            }
            prop_assert_eq!(ring.rx.is_ready(), !queue.is_empty());
            prop_assert_eq!(ring.rx.peek().map(|words| words[1]), queue.front().copied());
            prop_assert_eq!((ring.tx.next(), ring.rx.next()), (written, taken));
            prop_assert_eq!(ring.tx.outstanding(), written - seen);
            prop_assert!(ring.tx.outstanding() <= ring.tx.capacity());
        }
    }

    /// Goal:   F11: no memory that a peer can write makes a consumer panic, skip, or take what is not there.
    /// Method: random words in every entry; a pop takes one entry of the expected lap, or nothing, or
    ///         reports a lap, just as the raw word says.
    #[test]
    fn f11_arbitrary_entries_are_taken_refused_or_absent_as_their_lap_says(
        memory in prop::collection::vec(prop_oneof![0..4u64, any::<u64>()], 4 * W),
        pops in 1..12usize,
    ) {
        let mut ring = Ring::<W>::new(2);
        for (word, value) in ring.words.iter().zip(&memory) {
            word.store(*value, Relaxed);
        }
        for _ in 0..pops {
            let at = ring.rx.next();
            let first = memory[(at % 4) as usize * W];
            let expected = lap(at, 2);
            let ready = ring.rx.is_ready();
            let peeked = ring.rx.peek();
            match ring.rx.pop() {
                Ok(Some(words)) => {
                    prop_assert_eq!(peeked, Some(words));
                    prop_assert_eq!(&words[..], &memory[(at % 4) as usize * W..][..W]);
                    prop_assert_eq!(first as u32, expected);
                    prop_assert_eq!(ring.rx.next(), at + 1);
                    prop_assert!(ready);
                }
                Ok(None) => {
                    prop_assert_eq!(first as u32, expected.wrapping_sub(1));
                    prop_assert_eq!(ring.rx.next(), at);
                    prop_assert!(!ready);
                }
                Err(fault) => {
                    prop_assert_eq!(fault, PeerFault::Lap { theirs: first as u32, expected, position: at });
                    prop_assert!(first as u32 != expected && first as u32 != expected.wrapping_sub(1));
                    prop_assert_eq!(ring.rx.next(), at);
                    prop_assert!(ready, "a fault is something to be popped");
                }
            }
        }
    }

    /// Goal:   F11: a producer believes a consumed position only within what it wrote itself.
    /// Method: any 32-bit position after any number of pushes; refused unless it lies between the last one
    ///         seen and the next entry, and then nothing but `outstanding` changes.
    #[test]
    fn f11_a_position_outside_what_was_written_is_refused(
        at in starts(3), pushed in 0..=8u64, offset in prop_oneof![-10i64..=20, any::<i64>()],
    ) {
        let mut ring = Ring::<W>::starting_at(3, at);
        for id in 0..pushed {
            prop_assert_eq!(ring.tx.push(message(id)), Ok(true));
        }
        let theirs = (at as i64).wrapping_add(offset) as u32;
        ring.position.store(theirs, Relaxed);
        let advanced = u64::from(theirs.wrapping_sub(at as u32));
        if advanced <= pushed {
            prop_assert_eq!(ring.tx.refresh(), Ok(()));
            prop_assert_eq!(ring.tx.outstanding(), pushed - advanced);
        } else {
            let fault = PeerFault::Position { theirs, oldest: at as u32, newest: (at + pushed) as u32 };
            prop_assert_eq!(ring.tx.refresh(), Err(fault));
            prop_assert_eq!(ring.tx.outstanding(), pushed);
        }
        prop_assert_eq!(ring.tx.next(), at + pushed);
    }
}

// ---- traps ----

/// Goal:   trap 1: nothing that the peer can write moves our position, our bounds or our writes.
/// Method: every word around and in the ring is set to the largest value before each push. The producer
///         goes on at its own position, writes only inside its ring, and stops when *it* counts N.
#[test]
fn trap01_positions_and_bounds_are_never_read_back_from_shared_memory() {
    let mut ring = Ring::<W>::new(2);
    let all = ring.map.slice::<std::sync::atomic::AtomicU64>(0, ring.map.len() / 8).unwrap();
    for id in 0..4 {
        for word in all.iter() {
            word.store(u64::MAX, Relaxed);
        }
        assert_eq!((ring.tx.next(), ring.tx.capacity()), (id, 4));
        assert_eq!(ring.tx.push(message(id + 7)), Ok(true));
        let first = (doorbell_shm::map::PAGE / 8) + id as usize * W;
        for (i, word) in all.iter().enumerate() {
            let inside = (first..first + W).contains(&i);
            assert_eq!(word.load(Relaxed) != u64::MAX, inside, "word {i} after push {id}");
        }
    }
    assert!(matches!(ring.tx.push(message(4)), Err(PeerFault::Position { theirs: u32::MAX, .. })));
    assert_eq!(ring.tx.next(), 4);
}

/// Goal:   trap 2: full is not empty.
/// Method: at 0 and across the wraps of position and lap: a full ring refuses a push, gives back all N
///         entries, refuses again until the position is published, and is empty after that.
#[test]
fn trap02_full_is_not_empty() {
    for at in [0, (1 << 32) - 2, (1 << 34) - 6, (1 << 34) - 2] {
        let mut ring = Ring::<W>::starting_at(2, at);
        for id in 0..4 {
            assert_eq!(ring.tx.push(message(id)), Ok(true));
        }
        assert_eq!(ring.tx.push(message(4)), Ok(false), "full at {at}");
        assert!(ring.rx.is_ready(), "full is not empty");
        assert_eq!((0..4).map(|_| pop_id(&mut ring)).collect::<Vec<_>>(), [0, 1, 2, 3].map(Some));
        assert_eq!(pop_id(&mut ring), None);
        assert_eq!(ring.tx.push(message(4)), Ok(false), "popped, but not published");
        ring.rx.publish();
        assert_eq!(ring.tx.push(message(4)), Ok(true));
        assert_eq!(pop_id(&mut ring), Some(4));
        assert_eq!(pop_id(&mut ring), None);
    }
}

/// Goal:   trap 2: an entry is not written again before its copy is complete and published.
/// Method: the producer fills the ring round after round while the consumer stays one `publish` behind;
///         `pop_id` checks every word of every entry. (Between threads: `tests/threads.rs`, loom models.)
#[test]
fn trap02_an_entry_is_written_again_only_after_its_position_was_published() {
    let mut ring = Ring::<W>::new(1);
    let (mut sent, mut received) = (0, 0);
    for _ in 0..50 {
        while ring.tx.push(message(sent)).unwrap() {
            sent += 1;
        }
        assert_eq!(sent - received, 2, "never more than the ring holds");
        assert_eq!(pop_id(&mut ring), Some(received));
        received += 1;
        assert_eq!(ring.tx.push(message(sent)), Ok(false), "taken but not published");
        ring.rx.publish();
    }
}

/// Goal:   trap 2: an entry has no part beyond the end of the ring, whatever the position.
/// Method: three laps; the words outside the entries stay zero.
#[test]
fn trap02_no_entry_crosses_the_end_of_the_ring() {
    let mut ring = Ring::<W>::new(2);
    for id in 0..12 {
        assert_eq!(ring.tx.push([u64::MAX; W]), Ok(true), "{id}");
        ring.rx.pop().unwrap().unwrap();
        ring.rx.publish();
    }
    let all = ring.map.slice::<std::sync::atomic::AtomicU64>(0, ring.map.len() / 8).unwrap();
    let behind = doorbell_shm::map::PAGE / 8 + 4 * W;
    assert!(all[behind..].iter().all(|w| w.load(Relaxed) == 0));
    assert!(ring.words.iter().all(|w| w.load(Relaxed) != 0));
}

/// Goal:   trap 3: a corrupt entry is a fault that stays; nothing behind it is skipped or lost silently.
/// Method: the second of three entries is corrupted: the fault repeats, nothing is consumed. Mended, all
///         three have come.
#[test]
fn trap03_a_corrupt_entry_is_reported_and_nothing_is_skipped() {
    let mut ring = Ring::<W>::new(2);
    for id in 0..3 {
        ring.tx.push(message(id)).unwrap();
    }
    assert_eq!(pop_id(&mut ring), Some(0));
    let good = ring.word(1, 0).load(Relaxed);
    ring.word(1, 0).store(good + 1, Relaxed);
    for _ in 0..3 {
        assert_eq!(ring.rx.pop(), Err(PeerFault::Lap { theirs: 2, expected: 1, position: 1 }));
        assert_eq!(ring.rx.next(), 1);
    }
    ring.word(1, 0).store(good, Relaxed);
    assert_eq!((pop_id(&mut ring), pop_id(&mut ring), pop_id(&mut ring)), (Some(1), Some(2), None));
}

/// Goal:   trap 4: messages are framed: two are never read as one, and no length is cut at 64 KiB.
/// Method: neighbouring entries with lengths around 2^16 and 2^32 come back one by one, unchanged.
#[test]
fn trap04_two_messages_are_two_and_a_long_one_keeps_its_length() {
    let mut ring = Ring::<SUBMISSION_WORDS>::new(3);
    let lengths = [(0, 0), (1, 65_535), (65_535, 65_536), (65_536, 10 << 20), (u32::MAX, u64::MAX)];
    let calls =
        lengths.map(|(len, body_len)| Submission { kind: kind::CALL, len, body_len, ..Default::default() });
    for call in &calls {
        assert_eq!(ring.tx.push(call.pack()), Ok(true));
    }
    for call in calls {
        assert_eq!(Submission::unpack(ring.rx.pop().unwrap().unwrap()), Ok(call));
    }
    assert_eq!(ring.rx.pop(), Ok(None));
}

/// Goal:   trap 5: a full ring is a value, not an error, and costs no message.
/// Method: a producer that tries again gets everything through a ring of two, in order.
#[test]
fn trap05_a_full_ring_makes_the_producer_wait_and_loses_nothing() {
    let mut ring = Ring::<W>::new(1);
    let (mut sent, mut refused, mut received) = (0, 0, Vec::new());
    while received.len() < 40 {
        while sent < 40 && ring.tx.push(message(sent)).unwrap() {
            sent += 1;
        }
        refused += 1;
        received.extend(pop_id(&mut ring));
        ring.rx.publish();
    }
    assert_eq!(received, (0..40).collect::<Vec<_>>());
    assert!(refused > 30);
}

// ---- hostile peers ----

/// Goal:   F11: every lap but the expected one and the one before is a violation that consumes nothing.
/// Method: edges and middle of the impossible range, at the start, in the middle and where laps wrap.
#[test]
fn f11_an_impossible_lap_is_refused_and_consumes_nothing() {
    for at in [0, 13, (1 << 32) - 1, (1 << 35) - 8, (1 << 35) - 1, 1 << 35] {
        let expected = lap(at, 3);
        for distance in [1, 2, 1000, 1 << 31, u32::MAX - 2, u32::MAX - 1] {
            let mut ring = Ring::<W>::starting_at(3, at);
            let theirs = expected.wrapping_add(distance);
            ring.word(at, 0).store(u64::from(theirs) | 7 << 32, Relaxed);
            assert_eq!(ring.rx.pop(), Err(PeerFault::Lap { theirs, expected, position: at }));
            assert_eq!(ring.rx.next(), at);
        }
        let mut ring = Ring::<W>::starting_at(3, at);
        assert_eq!(ring.rx.pop(), Ok(None), "the lap before");
        ring.word(at, 0).store(u64::from(expected), Relaxed);
        assert!(ring.rx.pop().unwrap().is_some(), "the expected lap");
    }
}

/// Goal:   F11: our own published position is written, never read back.
/// Method: the peer changes it between any two steps of the consumer; nothing follows from it, and the
///         next `publish` puts it right.
#[test]
fn f11_a_scribble_on_our_own_position_changes_nothing() {
    let mut ring = Ring::<W>::new(1);
    for id in 0..20 {
        assert_eq!(ring.tx.push(message(id)), Ok(true));
        ring.position.store(u32::MAX - id as u32, Relaxed);
        assert_eq!(pop_id(&mut ring), Some(id));
        ring.position.store(12345, Relaxed);
        ring.rx.publish();
        assert_eq!(ring.position.load(Relaxed), id as u32 + 1);
    }
}

/// Goal:   F15: an entry that changes after it was popped does not change what we decide by.
/// Method: every word is overwritten after the pop; the copy still holds what was pushed.
#[test]
fn f15_the_copy_of_an_entry_does_not_change_with_the_entry() {
    let mut ring = Ring::<W>::new(2);
    ring.tx.push(message(5)).unwrap();
    let copy = ring.rx.pop().unwrap().unwrap();
    for word in ring.words.iter() {
        word.store(u64::MAX, Relaxed);
    }
    assert_eq!([copy[0] & !LAP_MASK, copy[1], copy[2], copy[3]], message(5));
}

/// Goal:   an entry that is not accepted stays where it is, and what was judged is what is taken (S4, F15).
/// Method: an empty ring, an entry refused, then accepted and overwritten, a lap that is wrong.
#[test]
fn f15_an_entry_that_is_not_accepted_is_not_taken() {
    let mut ring = Ring::<W>::new(2);
    assert_eq!(ring.rx.pop_if(|_| true), None);
    ring.tx.push(message(5)).unwrap();
    assert_eq!(ring.rx.pop_if(|_| false), None);
    let mut judged = None;
    let taken = ring.rx.pop_if(|words| {
        judged = Some(*words);
        ring.words.iter().for_each(|word| word.store(u64::MAX, Relaxed));
        true
    });
    assert_eq!(taken, judged);
    assert_eq!(taken.map(|words| words[1..].to_vec()), Some(message(5)[1..].to_vec()));
    assert_eq!(ring.rx.pop_if(|_| true), None, "no entry of this lap");
    assert!(
        matches!(ring.rx.pop(), Err(PeerFault::Lap { position: 1, .. })),
        "the same entry is judged by pop"
    );
}

/// Goal:   whoever looks at what is queued sees each entry at its place, takes none, and nothing beyond the ring.
/// Method: rings filled by and by, from the start and across the wraps of position and lap; every place from one lap back to
///         one beyond the end.
#[test]
fn entries_that_are_looked_at_stay_where_they_are() {
    for start in [0, 6, u64::from(u32::MAX) - 2, (u64::from(u32::MAX) << 2) - 2] {
        let mut ring = Ring::<W>::starting_at(2, start);
        for pushed in 0..=ring.len {
            for ahead in 0..=2 * ring.len {
                let expected = (ahead < pushed).then(|| message(start + ahead));
                let seen = ring.rx.peek_at(ahead);
                if let Some(words) = seen {
                    assert_eq!(words[0] & LAP_MASK, u64::from(lap(start + ahead, 2)));
                }
                let seen = seen.map(|words| [words[0] & !LAP_MASK, words[1], words[2], words[3]]);
                assert_eq!(seen, expected, "{ahead} ahead of {start} with {pushed} there");
            }
            assert_eq!(ring.rx.next(), start);
            assert_eq!(ring.tx.push(message(start + pushed)), Ok(pushed < ring.len));
        }
    }
}

/// Goal:   a producer knows how far the consumer had come when it last looked.
/// Method: a ring of two that runs full; what is published shows only after a look.
#[test]
fn how_far_the_consumer_had_come_is_known_from_the_last_look() {
    let mut ring = Ring::<W>::new(1);
    for id in 0..2 {
        assert_eq!(ring.tx.push(message(id)), Ok(true));
    }
    assert_eq!((pop_id(&mut ring), pop_id(&mut ring)), (Some(0), Some(1)));
    ring.rx.publish();
    assert_eq!((ring.tx.passed(), ring.tx.outstanding()), (0, 2));
    ring.tx.refresh().unwrap();
    assert_eq!((ring.tx.passed(), ring.tx.outstanding()), (2, 0));
}

/// Goal:   F18: a hole punched into a ring (entries read as zero) is found out, after the first lap.
/// Method: all words zeroed at a later lap: violation. In the first lap zero is just an empty ring.
#[test]
fn f18_a_zeroed_ring_is_a_violation_after_the_first_lap() {
    let mut ring = Ring::<W>::starting_at(2, 8);
    for word in ring.words.iter() {
        word.store(0, Relaxed);
    }
    assert_eq!(ring.rx.pop(), Err(PeerFault::Lap { theirs: 0, expected: 3, position: 8 }));
    assert_eq!(Ring::<W>::new(2).rx.pop(), Ok(None));
}

/// Goal:   a ring whose length is not a power of two is our own bug, not a peer's.
/// Method: three entries.
#[test]
#[should_panic(expected = "power of two")]
fn a_ring_of_three_entries_is_refused() {
    let map = doorbell_shm::map::Mapping::on_heap(doorbell_shm::map::PAGE);
    let entries = map.slice::<doorbell_shm::ring::Entry<W>>(64, 3).unwrap();
    doorbell_shm::ring::Consumer::<_, _, W>::new(
        entries,
        map.object::<std::sync::atomic::AtomicU32>(0).unwrap(),
    );
}

//! Slot allocator, slot table and hints against simple models; slots that no correct client names.
#![cfg(not(loom))]

mod common;

use common::{MIXED, config, steps};
use doorbell_shm::PeerFault;
use doorbell_shm::layout::{Geometry, LaneLayout, SLOT_LARGE, SLOT_MEDIUM, SLOT_SMALL};
use doorbell_shm::map::{Mapping, PAGE, Shared};
use doorbell_shm::slots::{ClientWord, Grant, Hints, ServerWord, SlotAllocator, SlotTable};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

// ---- allocator and table together ----

#[derive(Debug, Clone, Copy)]
enum Op {
    /// The client takes a slot for so many bytes.
    Take(usize),
    /// It sends a call in the grant of this index, of so many bytes (cut to what fits).
    Send(usize, u32),
    /// It gives up a grant that it has not used.
    GiveUp(usize),
    /// A call ends and its completion is taken.
    Finish(usize),
    /// Something that no correct client sends: slot, generation, length.
    Hostile(u32, u32, u32),
}

fn op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![
        0..=SLOT_LARGE + 1,
        prop::sample::select(vec![0, 1, 1024, 1025, 4096, 4097, SLOT_LARGE, SLOT_LARGE + 1, usize::MAX]),
    ];
    prop_oneof![
        4 => len.prop_map(Op::Take),
        4 => (any::<usize>(), 0..=16384u32).prop_map(|(i, l)| Op::Send(i, l)),
        1 => any::<usize>().prop_map(Op::GiveUp),
        3 => any::<usize>().prop_map(Op::Finish),
        2 => (prop_oneof![0..40u32, any::<u32>()], prop_oneof![0..6u32, any::<u32>()],
              prop_oneof![0..=5000u32, any::<u32>()]).prop_map(|(s, g, l)| Op::Hostile(s, g, l)),
    ]
}

fn geometries() -> impl Strategy<Value = Geometry> {
    (0..=2u16, 0..=2u16, 0..=9u16, 0..=2u16).prop_filter_map(
        "at least a page",
        |(large, medium, small, lease_pages)| {
            Geometry { ring_order: 3, large, medium, small, lease_pages }.checked().ok()
        },
    )
}

/// What the model knows of a granted slot number.
#[derive(Debug, Clone, Copy, Default)]
struct Model {
    capacity: u32,
    generation: u32,
    /// Granted by the allocator and not given back.
    granted: bool,
    /// Lent by the table.
    lent: bool,
}

/// The answer that the rules give to `lend`, worked out from the model.
fn verdict(model: &HashMap<u32, Model>, slot: u32, generation: u32, len: u32) -> Result<u32, PeerFault> {
    let Some(m) = model.get(&slot) else { return Err(PeerFault::Slot { slot }) };
    let expected = m.generation.wrapping_add(1);
    if m.lent {
        Err(PeerFault::SlotBusy { slot, generation: m.generation })
    } else if generation != expected {
        Err(PeerFault::Generation { slot, theirs: generation, expected })
    } else if len > m.capacity {
        Err(PeerFault::Length { len, slot, capacity: m.capacity })
    } else {
        Ok(m.capacity)
    }
}

proptest! {
    #![proptest_config(config(1500))]

    /// Goal:   client and server agree for ever on who holds which slot; no two live grants share a byte;
    ///         generations pass by one, with each call and only then; nothing hostile changes the table.
    /// Method: any mix of calls on any small geometry, compared step by step with a map from slot number to
    ///         what is known of it.
    #[test]
    fn allocator_and_table_agree_with_a_map_of_slots(geometry in geometries(), ops in prop::collection::vec(op(), 1..steps(120))) {
        let mut client = SlotAllocator::new(&geometry);
        let mut server = SlotTable::new(&geometry);
        prop_assert_eq!(client.numbers(), 4 * geometry.base_pages());
        prop_assert_eq!(server.len(), client.numbers());
        prop_assert!(!server.is_empty());
        let mut model: HashMap<u32, Model> = (0..client.numbers())
            .map(|s| (s, Model { capacity: geometry.base_capacity(s) as u32, ..Model::default() }))
            .filter(|(_, m)| m.capacity > 0)
            .collect();
        prop_assert_eq!(client.largest() as u32, model.values().map(|m| m.capacity).max().unwrap());
        let (mut grants, mut calls): (Vec<Grant>, Vec<Grant>) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Take(len) => {
                    let best = model.values().filter(|m| !m.granted && m.capacity as usize >= len).map(|m| m.capacity).min();
                    let grant = client.take(len);
                    prop_assert_eq!(grant.map(|g| g.capacity), best, "the smallest class that has one");
                    if let Some(g) = grant {
                        let m = model.get_mut(&g.slot).expect("granted slots exist");
                        prop_assert!(!m.granted);
                        prop_assert_eq!((g.capacity, g.generation), (m.capacity, m.generation.wrapping_add(1)));
                        m.granted = true;
                        grants.push(g);
                    }
                }
                Op::Send(index, len) if !grants.is_empty() => {
                    let g = grants.swap_remove(index % grants.len());
                    client.advance(g);
                    prop_assert_eq!(server.lend(g.slot, g.generation, len.min(g.capacity)), Ok((g.capacity, false)));
                    let m = model.get_mut(&g.slot).unwrap();
                    (m.generation, m.lent) = (g.generation, true);
                    calls.push(g);
                }
                Op::GiveUp(index) if !grants.is_empty() => {
                    let g = grants.swap_remove(index % grants.len());
                    client.put_back(g.slot);
                    model.get_mut(&g.slot).unwrap().granted = false;
                }
                Op::Finish(index) if !calls.is_empty() => {
                    let g = calls.swap_remove(index % calls.len());
                    server.give_back(g.slot);
                    client.put_back(g.slot);
                    let m = model.get_mut(&g.slot).unwrap();
                    (m.granted, m.lent) = (false, false);
                }
                Op::Hostile(slot, generation, len) => {
                    let expected = verdict(&model, slot, generation, len);
                    if expected.is_err() {
                        prop_assert_eq!(server.lend(slot, generation, len), expected.map(|c| (c, false)));
                    }
                }
                _ => {}
            }
            prop_assert_eq!(client.free(), model.values().filter(|m| !m.granted).count());
            let mut live: Vec<_> = grants.iter().chain(&calls)
                .map(|g| { let at = LaneLayout::slot_offset(g.slot); at..at + g.capacity as usize })
                .collect();
            live.sort_by_key(|r| r.start);
            prop_assert!(live.windows(2).all(|w| w[0].end <= w[1].start), "two grants share a byte: {:?}", live);
            prop_assert!(live.last().is_none_or(|r| r.end <= geometry.base_pages() as usize * PAGE));
        }
    }

    /// Goal:   an answer slot is lent under the same rules, but its generation stays.
    /// Method: any order of both kinds of lending on one slot, compared with two variables.
    #[test]
    fn a_slot_lent_for_an_answer_keeps_its_generation(ops in prop::collection::vec(0..4u8, 1..steps(60))) {
        let mut table = SlotTable::new(&Geometry::SMALLEST);
        let (mut generation, mut lent) = (0, false);
        for op in ops {
            let busy = PeerFault::SlotBusy { slot: 2, generation };
            match op {
                0 => {
                    prop_assert_eq!(table.lend_for_answer(2), if lent { Err(busy) } else { Ok(1024) });
                    lent = true;
                }
                1 => {
                    let expected = if lent { Err(busy) } else { generation += 1; Ok((1024, false)) };
                    prop_assert_eq!(table.lend(2, if lent { generation + 1 } else { generation }, 9), expected);
                    lent = true;
                }
                2 => { table.give_back(2); lent = false; }
                _ => if lent { prop_assert_eq!(table.hint(2), Some(generation)) },
            }
        }
    }

    /// Goal:   hints are a set: what was set is taken once, nothing else is.
    /// Method: any lane size, any order of `set`, `take` and `any`, compared with a `BTreeSet`.
    #[test]
    fn hints_do_what_a_set_does(
        slots in prop_oneof![1..200u32, Just(64), Just(4096)],
        ops in prop::collection::vec(prop_oneof![4 => any::<u32>().prop_map(Some), 1 => Just(None)], 1..steps(100)),
    ) {
        let (hints, _) = hints(slots);
        let mut oracle = BTreeSet::new();
        for op in ops {
            match op {
                Some(slot) => { hints.set(slot % slots); oracle.insert(slot % slots); }
                None => {
                    let mut found = Vec::new();
                    prop_assert_eq!(hints.take(|s| found.push(s)), Ok(()));
                    prop_assert_eq!(found, std::mem::take(&mut oracle).into_iter().collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(hints.any(), !oracle.is_empty());
        }
    }

    /// Goal:   F11: whatever a peer writes into the bitmap, a take names each slot of the lane at most once,
    ///         none beyond it, and ends.
    /// Method: random words; found slots are exactly the set bits up to the first that is out of range.
    #[test]
    fn f11_arbitrary_hints_name_slots_of_the_lane_or_are_refused(
        slots in prop_oneof![1..260u32, Just(4096)], memory in prop::collection::vec(any::<u64>(), 65), sparse: bool,
    ) {
        let (hints, words) = hints(slots);
        for (word, value) in words.iter().zip(&memory) {
            word.store(if sparse { value & value.rotate_left(7) & value.rotate_left(13) } else { *value }, Relaxed);
        }
        let before: Vec<u64> = words.iter().map(|w| w.load(Relaxed)).collect();
        let expected: Vec<u32> = (0..64u32)
            .filter(|i| before[0] >> i & 1 == 1)
            .flat_map(|i| {
                let word = before.get(1 + i as usize).copied();
                // A summary bit without a word stands for its first slot number.
                (0..64).filter(move |b| word.map_or(*b == 0, |w| w >> b & 1 == 1)).map(move |b| i * 64 + b)
            })
            .collect();
        let mut found = Vec::new();
        let result = hints.take(|s| found.push(s));
        match expected.iter().position(|s| *s >= slots) {
            Some(first) => {
                prop_assert_eq!(result, Err(PeerFault::Hint { bit: expected[first], slots }));
                prop_assert_eq!(&found[..], &expected[..first]);
            }
            None => {
                prop_assert_eq!(result, Ok(()));
                prop_assert_eq!(found, expected);
            }
        }
    }

    /// Goal:   slot words survive packing, and any word that a peer writes means something harmless.
    /// Method: any word is unpacked and packed again; no bit is lost in either word.
    #[test]
    fn slot_words_are_unpacked_as_they_were_packed(word: u64) {
        prop_assert_eq!(ClientWord::unpack(word).pack(), word);
        prop_assert_eq!(ServerWord::unpack(word).pack(), word);
    }
}

/// Hints for `slots` slot numbers, and a view of their words for a hostile peer.
fn hints(slots: u32) -> (Hints<Shared<[AtomicU64]>>, Shared<[AtomicU64]>) {
    let words = 1 + slots.div_ceil(64) as usize;
    let map = Mapping::on_heap(PAGE);
    let view = map.slice(0, words).unwrap();
    (Hints::new(view.clone(), slots), view)
}

// ---- slots that no correct client names ----

/// The default geometry: slot 0 is large, 16 is medium, 20 to 23 are small; no other number is a slot.
fn table() -> SlotTable {
    SlotTable::new(&Geometry { lease_pages: 2, ..MIXED })
}

/// Goal:   F12: a slot number that was not granted is refused, wherever it points.
/// Method: inside a large or medium slot, behind the base slots, on a lease page, far out.
#[test]
fn f12_a_slot_that_was_not_granted_is_refused() {
    for slot in [1, 4, 15, 17, 19, 24, 31, 32, 4096, u32::MAX / 4 + 1, u32::MAX] {
        assert_eq!(table().lend(slot, 1, 0), Err(PeerFault::Slot { slot }));
        assert_eq!(table().lend_for_answer(slot), Err(PeerFault::Slot { slot }));
        assert_eq!(table().hint(slot), None);
        table().give_back(slot);
    }
    let mut t = table();
    t.hint(1);
    assert_eq!(t.lend(1, 1, 0), Err(PeerFault::Slot { slot: 1 }), "a hint grants nothing");
}

/// Goal:   F12: a length above the slot's class is refused, whatever the class.
/// Method: the largest length that fits, one byte more, and the largest number.
#[test]
fn f12_a_length_above_the_class_of_its_slot_is_refused() {
    for (slot, capacity) in [(0, SLOT_LARGE as u32), (16, SLOT_MEDIUM as u32), (20, SLOT_SMALL as u32)] {
        for len in [capacity + 1, 1 << 31, u32::MAX] {
            assert_eq!(table().lend(slot, 1, len), Err(PeerFault::Length { len, slot, capacity }));
        }
        assert_eq!(table().lend(slot, 1, capacity), Ok((capacity, false)));
    }
}

/// Goal:   F12: a slot named twice is refused until its call has ended, and the first call goes on.
/// Method: as request and as answer slot, with every generation that might seem right.
#[test]
fn f12_a_slot_named_twice_is_refused_until_its_call_ended() {
    let mut t = table();
    assert_eq!(t.lend(20, 1, 10), Ok((1024, false)));
    for generation in [0, 1, 2, 3] {
        assert_eq!(t.lend(20, generation, 10), Err(PeerFault::SlotBusy { slot: 20, generation: 1 }));
    }
    assert_eq!(t.lend_for_answer(20), Err(PeerFault::SlotBusy { slot: 20, generation: 1 }));
    assert_eq!(t.lend(21, 1, 10), Ok((1024, false)), "others are not touched");
    t.give_back(20);
    assert_eq!(t.lend(20, 2, 10), Ok((1024, false)));
}

/// Goal:   F12: the only right generation is the previous one plus 1; a refusal costs nothing.
/// Method: the one before, the same, two ahead and far off; then the right one still works.
#[test]
fn f12_a_generation_that_is_not_the_next_one_is_refused() {
    let mut t = table();
    t.lend(20, 1, 0).unwrap();
    t.give_back(20);
    for theirs in [0, 1, 3, u32::MAX, 1 << 31] {
        assert_eq!(t.lend(20, theirs, 0), Err(PeerFault::Generation { slot: 20, theirs, expected: 2 }));
    }
    assert_eq!(t.lend(20, 2, 0), Ok((1024, false)));
}

/// Goal:   trap 19: a cancel that comes before its call is not lost, and reaches no later call.
/// Method: hinted while free: the next call is told to look at the word, the one after is not.
#[test]
fn trap19_a_hint_before_its_call_is_kept_for_that_call_only() {
    let mut t = table();
    assert_eq!(t.hint(20), None);
    assert_eq!(t.lend(20, 1, 0), Ok((1024, true)), "look at the word before dispatch");
    assert_eq!(t.hint(20), Some(1), "a call is there: look now");
    t.give_back(20);
    assert_eq!(t.lend(20, 2, 0), Ok((1024, false)));
}

/// Goal:   F58: a slot whose call was given up locally is not granted again until it is put back.
/// Method: all slots are taken; nothing is left until one comes back, and then it is that one with the
///         next generation.
#[test]
fn f58_a_lent_slot_is_not_granted_again() {
    let mut client = SlotAllocator::new(&Geometry::SMALLEST);
    let grants: Vec<Grant> = std::iter::from_fn(|| client.take(1)).collect();
    assert_eq!(grants.iter().map(|g| g.slot).collect::<BTreeSet<_>>(), (0..4).collect());
    for g in &grants {
        client.advance(*g);
    }
    assert_eq!((client.take(0), client.free()), (None, 0));
    client.put_back(2);
    assert_eq!(client.take(0), Some(Grant { slot: 2, generation: 2, capacity: 1024 }));
}

/// Goal:   what a server says it has copied out of a request is what its client reads.
/// Method: a word written and read, from zeroed memory on.
#[test]
fn how_many_frames_were_taken_is_read_as_it_was_published() {
    let word = AtomicU64::new(0);
    assert_eq!(ServerWord::read(&word), ServerWord::default());
    let said = ServerWord { generation: u32::MAX - 1, taken: 0x8000_0001 };
    said.publish(&word);
    assert_eq!(ServerWord::read(&word), said);
    assert_eq!(word.load(Relaxed), u64::from(said.generation) | u64::from(said.taken) << 32);
}

/// Goal:   S1: a slot holds what its class says, lent or not; a number in the midst of a larger slot, or beyond all, names none.
/// Method: every number of a lane with slots of each class, and two beyond.
#[test]
fn s1_a_slot_holds_what_its_class_says() {
    let (mut table, allocator) = (SlotTable::new(&MIXED), SlotAllocator::new(&MIXED));
    assert!(!table.is_empty() && table.len() == allocator.numbers());
    let mut found = Vec::new();
    for slot in 0..table.len() + 2 {
        let capacity = table.capacity(slot);
        match capacity {
            Ok(bytes) => found.push(bytes as usize),
            Err(fault) => assert_eq!(fault, PeerFault::Slot { slot }),
        }
        assert_eq!(capacity.unwrap_or(0), allocator.capacity(slot), "{slot}");
        assert_eq!(table.lend(slot, 1, 0).is_ok(), capacity.is_ok(), "{slot}");
        assert_eq!(table.capacity(slot), capacity, "{slot} is lent");
    }
    found.sort_unstable();
    assert_eq!(found, [SLOT_SMALL, SLOT_SMALL, SLOT_SMALL, SLOT_SMALL, SLOT_MEDIUM, SLOT_LARGE]);
    assert_eq!(allocator.largest(), SLOT_LARGE);
}

/// Goal:   P3: whether two slots of a lane hold so much each does not depend on which are free, and is what a lane finds that has
///         lent none.
/// Method: all small geometries, lengths at every edge of the classes; the longer one is taken first, so that the shorter one does
///         not take the only slot for it.
#[test]
fn p3_two_lengths_have_a_slot_each_or_not() {
    const EDGES: [usize; 7] =
        [0, SLOT_SMALL, SLOT_SMALL + 1, SLOT_MEDIUM, SLOT_MEDIUM + 1, SLOT_LARGE, SLOT_LARGE + 1];
    for number in 0..27u16 {
        let (large, medium, small) = (number % 3, number / 3 % 3, number / 9 * 4);
        let geometry = Geometry { ring_order: 3, large, medium, small, lease_pages: 1 };
        let Ok(geometry) = geometry.checked() else { continue };
        for (one, other) in EDGES.into_iter().flat_map(|one| EDGES.map(|other| (one, other))) {
            let mut lane = SlotAllocator::new(&geometry);
            let told = lane.holds_both(one, other);
            let taken = [one.max(other), one.min(other)].map(|len| lane.take(len).is_some());
            assert_eq!(told, taken == [true; 2], "{one} and {other} in {geometry:?}");
            assert_eq!(lane.holds_both(one, other), told, "{one} and {other}, lent, in {geometry:?}");
        }
    }
}

/// Goal:   S1: whoever asks for the call in a slot is told its generation and whether it goes on; of what is no slot, nothing.
/// Method: every number of a lane with slots of each class, and two beyond: before a call, during it, after it, during the next.
#[test]
fn s1_the_call_in_a_slot_is_told_by_generation() {
    let mut table = SlotTable::new(&MIXED);
    for slot in 0..table.len() + 2 {
        if table.capacity(slot).is_err() {
            assert_eq!(table.call_in(slot), Err(PeerFault::Slot { slot }));
            continue;
        }
        assert_eq!(table.call_in(slot), Ok((0, false)));
        for generation in 1..4 {
            table.lend(slot, generation, 0).unwrap();
            assert_eq!(table.call_in(slot), Ok((generation, true)));
            table.give_back(slot);
            assert_eq!(table.call_in(slot), Ok((generation, false)));
        }
        table.lend_for_answer(slot).unwrap();
        assert_eq!(table.call_in(slot), Ok((3, true)));
    }
}

/// Goal:   whoever waits for a slot knows how many are free, and of what length the smallest is.
/// Method: all slots of a lane with slots of each class taken, smallest first, and given back.
#[test]
fn the_smallest_free_slot_is_known() {
    let mut slots = SlotAllocator::new(&MIXED);
    let mut taken = Vec::new();
    for (free, smallest) in [
        (6, SLOT_SMALL),
        (5, SLOT_SMALL),
        (4, SLOT_SMALL),
        (3, SLOT_SMALL),
        (2, SLOT_MEDIUM),
        (1, SLOT_LARGE),
    ] {
        assert_eq!((slots.free(), slots.smallest_free()), (free, smallest));
        taken.push(slots.take(1).unwrap());
    }
    assert_eq!((slots.free(), slots.smallest_free(), slots.take(1)), (0, 0, None));
    slots.put_back(taken[5].slot);
    assert_eq!((slots.free(), slots.smallest_free()), (1, SLOT_LARGE));
    slots.put_back(taken[0].slot);
    assert_eq!((slots.free(), slots.smallest_free()), (2, SLOT_SMALL));
}

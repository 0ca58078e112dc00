//! The server's end of a lane against memory that changes under it, between any two of its loads.
//!
//! The input is read from both ends. Its front is a script: what the server does next, what an honest client
//! does meanwhile. Its back feeds a hook that `cfg(fuzzing)` calls before every load of shared memory (and
//! every exchange), which may change any word of the segment at that very moment. One thread, so that every
//! finding replays from its input alone.
//!
//! Asserted: nothing panics; every operation does a bounded number of loads; positions move by what the
//! server did itself; only a `PeerFault` of the kind that belongs to the operation comes out; no slot is
//! lent twice, beyond its class or outside what was granted; payload copies stay inside the segment (the
//! address sanitizer watches too).
#![no_main]

use doorbell_shm::PeerFault;
use doorbell_shm::bell::{self, Published};
use doorbell_shm::entry::{Completion, Submission, flag, kind};
use doorbell_shm::hooked::{AtomicU64, set_hook};
use doorbell_shm::lane::{ClientLane, ServerLane};
use doorbell_shm::layout::{Geometry, HEADER_LEN, LaneLayout, SLOT_LARGE};
use doorbell_shm::map::Shared;
use doorbell_shm::segment::{Identity, Segment};
use doorbell_shm::slots::ClientWord;
use libfuzzer_sys::fuzz_target;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

/// The input, read from both ends until they meet. Past that everything is zero, and nothing scribbles.
struct Input {
    data: Vec<u8>,
    front: Cell<usize>,
    back: Cell<usize>,
}

impl Input {
    fn next(&self) -> Option<u8> {
        let at = self.front.get();
        (at < self.back.get()).then(|| {
            self.front.set(at + 1);
            self.data[at]
        })
    }

    fn byte(&self) -> u8 {
        self.next().unwrap_or(0)
    }

    fn u32(&self) -> u32 {
        u32::from_le_bytes([(); 4].map(|()| self.byte()))
    }

    /// Mostly small numbers, where slots, generations and lengths are right or nearly so.
    fn number(&self) -> u32 {
        match self.byte() {
            255 => self.u32(),
            254 => u32::MAX - u32::from(self.byte()),
            253 => u32::from(self.byte()) << 7,
            small => small.into(),
        }
    }

    fn from_back(&self) -> Option<u8> {
        let at = self.back.get();
        (self.front.get() < at).then(|| {
            self.back.set(at - 1);
            self.data[at - 1]
        })
    }
}

/// Changes one word of the segment, as bytes from `next` say.
fn scribble(words: &[AtomicU64], next: impl Fn() -> Option<u8>) -> Option<()> {
    let how = next()?;
    let word = &words[(usize::from(next()?) | usize::from(next()?) << 8) % words.len()];
    let operand = u64::from(next()?);
    let old = word.load(Relaxed);
    word.store(
        match how % 6 {
            0 => old ^ 1 << (operand % 64),
            1 => old.wrapping_add(operand),
            2 => old.wrapping_sub(operand),
            3 => operand,
            4 => old & !0xffff_ffff | operand,
            _ => u64::from_le_bytes([(); 8].map(|()| next().unwrap_or(0xff))),
        },
        Relaxed,
    );
    Some(())
}

/// Both ends, and what must hold of them.
struct World {
    input: Rc<Input>,
    /// Loads since the last time it was set to zero; counted by the hook.
    loads: Rc<Cell<u32>>,
    words: Shared<[AtomicU64]>,
    geometry: Geometry,
    server: ServerLane,
    client: ClientLane,
    lent: BTreeSet<u32>,
    staging: [u8; SLOT_LARGE],
}

impl World {
    /// Runs one step of the server and checks how much it looked at.
    fn at_most<T>(&mut self, loads: u32, step: impl FnOnce(&mut ServerLane) -> T) -> T {
        self.loads.set(0);
        let result = step(&mut self.server);
        assert!(self.loads.get() <= loads, "{} loads where {loads} are enough", self.loads.get());
        result
    }

    fn consume(&mut self, ring: usize) {
        let before = self.server.submissions[ring].next();
        let popped = self.at_most(8, |s| s.submissions[ring].pop());
        let after = self.server.submissions[ring].next();
        self.at_most(0, |s| s.submissions[ring].publish());
        let words = match popped {
            Ok(Some(words)) => {
                assert_eq!(after, before + 1);
                words
            }
            Ok(None) => return assert_eq!(after, before),
            Err(PeerFault::Lap { theirs, expected, position }) => {
                assert_eq!((after, position), (before, before));
                assert!(theirs != expected && theirs != expected.wrapping_sub(1));
                return;
            }
            Err(other) => panic!("a pop gave {other}"),
        };
        let entry = match Submission::unpack(words) {
            Ok(entry) => entry,
            Err(PeerFault::Reserved { .. }) => return,
            Err(other) => panic!("unpacking gave {other}"),
        };
        assert_eq!(entry.pack()[1..], words[1..], "what was unpacked is all that there was");
        match self.at_most(0, |s| s.slots.lend(entry.slot, entry.generation, entry.len)) {
            Ok((capacity, _)) => {
                assert_eq!(capacity as usize, self.geometry.base_capacity(entry.slot));
                assert!(entry.len <= capacity && capacity > 0);
                assert!(self.lent.insert(entry.slot), "slot {} lent twice", entry.slot);
                let offset = LaneLayout::slot_offset(entry.slot);
                self.server.common.payload.read(offset, &mut self.staging[..entry.len as usize]);
                if entry.response_slot != entry.slot {
                    self.answer_slot(entry.response_slot);
                }
            }
            Err(
                PeerFault::Slot { .. }
                | PeerFault::SlotBusy { .. }
                | PeerFault::Generation { .. }
                | PeerFault::Length { .. },
            ) => {}
            Err(other) => panic!("lending gave {other}"),
        }
    }

    fn answer_slot(&mut self, slot: u32) {
        match self.at_most(0, |s| s.slots.lend_for_answer(slot)) {
            Ok(capacity) => {
                assert_eq!(capacity as usize, self.geometry.base_capacity(slot));
                assert!(self.lent.insert(slot), "answer slot {slot} lent twice");
                self.server
                    .common
                    .payload
                    .write(LaneLayout::slot_offset(slot), &self.staging[..capacity as usize]);
            }
            Err(PeerFault::Slot { .. }) => assert_eq!(self.geometry.base_capacity(slot), 0),
            Err(PeerFault::SlotBusy { .. }) => assert!(self.lent.contains(&slot)),
            Err(other) => panic!("lending for an answer gave {other}"),
        }
    }

    fn complete(&mut self, ring: usize) {
        let nth = usize::from(self.input.byte());
        let slot = self.lent.iter().copied().nth(nth % self.lent.len().max(1));
        let reply =
            Completion { kind: kind::REPLY, flags: flag::END, slot: slot.unwrap_or(0), ..Default::default() };
        let tx = &self.server.completions[ring];
        let (next, outstanding, capacity) = (tx.next(), tx.outstanding(), tx.capacity());
        let pushed = self.at_most(1, |s| s.completions[ring].push(reply.pack()));
        let tx = &self.server.completions[ring];
        match pushed {
            Ok(true) => {
                assert_eq!(tx.next(), next + 1);
                if let Some(slot) = slot {
                    self.server.slots.give_back(slot);
                    self.lent.remove(&slot);
                }
            }
            Ok(false) => assert_eq!((tx.next(), tx.outstanding(), outstanding), (next, capacity, capacity)),
            Err(PeerFault::Position { .. }) => assert_eq!((tx.next(), tx.outstanding()), (next, outstanding)),
            Err(other) => panic!("a push gave {other}"),
        }
        assert!(self.server.completions[ring].outstanding() <= capacity);
    }

    fn refresh(&mut self, ring: usize) {
        let before = (self.server.completions[ring].next(), self.server.completions[ring].outstanding());
        let result = self.at_most(1, |s| s.completions[ring].refresh());
        let after = (self.server.completions[ring].next(), self.server.completions[ring].outstanding());
        match result {
            Ok(()) => assert!(after.0 == before.0 && after.1 <= before.1),
            Err(PeerFault::Position { .. }) => assert_eq!(after, before),
            Err(other) => panic!("a refresh gave {other}"),
        }
    }

    fn hints(&mut self) {
        let slots = self.server.slots.len();
        let mut found = BTreeSet::new();
        let result = self.at_most(65, |s| {
            let (hints, table) = (&s.common.hints, &mut s.slots);
            hints.take(|slot| {
                assert!(slot < slots && found.insert(slot), "hint for {slot} of {slots}");
                table.hint(slot);
            })
        });
        match result {
            Ok(()) | Err(PeerFault::Hint { .. }) => {}
            Err(other) => panic!("hints gave {other}"),
        }
        for slot in found {
            let Some(word) = self.server.common.client_words.get(slot as usize) else { continue };
            let word = ClientWord::unpack(word.load(Relaxed));
            assert!(word.released <= u32::MAX >> 1);
        }
    }

    fn bells(&mut self) {
        self.at_most(0, |s| s.common.server_bell.mark(bell::ASLEEP));
        self.at_most(1, |s| s.common.hints.any());
        self.at_most(0, |s| s.common.server_bell.clear());
        let waiters = self.at_most(2, |s| s.common.client_bell.take());
        assert!(waiters <= bell::WAITER_FUTEX | bell::WAITER_SOCKET);
    }

    fn honest_call(&mut self, ring: usize) {
        let input = Rc::clone(&self.input);
        let Some(grant) = self.client.slots.take(input.number() as usize) else { return };
        self.client.slots.advance(grant);
        let call = Submission {
            kind: kind::CALL,
            flags: flag::END,
            slot: grant.slot,
            generation: grant.generation.wrapping_add(u32::from(input.byte() == 77)),
            len: input.number(),
            response_slot: if input.byte() == 88 { input.number() } else { grant.slot },
            response_count: 1,
            ..Default::default()
        };
        // Full, or confused by a scribble: its own affair.
        if self.client.submissions[ring].push(call.pack()) == Ok(true) {
            bell::fence_before_bell();
            self.client.common.server_bell.take(Published::Submissions);
        }
    }

    fn honest_completion(&mut self, ring: usize) {
        if let Ok(Some(words)) = self.client.completions[ring].pop()
            && let Ok(completion) = Completion::unpack(words)
        {
            self.client.completions[ring].publish();
            self.client.slots.put_back(completion.slot % self.client.slots.numbers());
            self.client.common.client_bell.mark(bell::WAITER_FUTEX);
        }
    }

    fn honest_hint(&mut self) {
        let slot = self.input.number() % self.client.slots.numbers();
        let word = ClientWord {
            generation: self.input.number(),
            cancelled: true,
            released: self.input.number() >> 1,
        };
        if let Some(shared) = self.client.common.client_words.get(slot as usize) {
            shared.store(word.pack(), Relaxed);
        }
        self.client.common.hints.set(slot);
    }

    fn run(&mut self) {
        while let Some(op) = self.input.next() {
            let ring = usize::from(op >> 7);
            match op & 0x7f {
                0..=29 => self.consume(ring),
                30..=49 => self.honest_call(ring),
                50..=64 => self.complete(ring),
                65..=74 => self.honest_completion(ring),
                75..=79 => self.refresh(ring),
                80..=87 => self.honest_hint(),
                88..=94 => self.hints(),
                95..=99 => self.bells(),
                100..=104 => {
                    let ready = self.at_most(1, |s| s.submissions[ring].is_ready());
                    let peeked = self.at_most(8, |s| s.submissions[ring].peek());
                    // Between the two anything may have changed; neither moves the position.
                    let _: (bool, Option<[u64; 8]>) = (ready, peeked);
                }
                105..=109 => {
                    let slot = self.input.number();
                    self.server.slots.give_back(slot);
                    self.lent.remove(&slot);
                }
                _ => {
                    scribble(&self.words, || self.input.next());
                }
            }
        }
    }
}

/// The segments, one of each geometry, made once: most of an execution's time would go into them.
fn segments() -> [Segment; 4] {
    [
        Geometry::SMALLEST,
        Geometry::default(),
        Geometry { ring_order: 3, lease_pages: 3, ..Geometry::default() },
        Geometry { ring_order: 3, large: 0, medium: 1, small: 80, lease_pages: 1 },
    ]
    .map(|g| Segment::on_heap(g, 1, Identity { epoch: 1, session: [2, 3] }).expect("a good geometry"))
}

thread_local! {
    static SEGMENTS: [Segment; 4] = segments();
}

fn run(segment: &Segment, script: &[u8]) {
    let geometry = *segment.geometry();
    let layout = LaneLayout::home(&geometry);
    let map = segment.mapping();
    let input = Rc::new(Input { data: script.to_vec(), front: Cell::new(0), back: Cell::new(script.len()) });
    let loads = Rc::new(Cell::new(0));
    // The rings are where it hurts: scribbles fall on the head, not on payload, which nothing here reads.
    let head = map.slice::<AtomicU64>(HEADER_LEN, (layout.slots - HEADER_LEN) / 8).expect("inside");
    for word in head.iter() {
        word.store(0, Relaxed);
    }
    let mut world = World {
        input: Rc::clone(&input),
        loads: Rc::clone(&loads),
        words: head.clone(),
        geometry,
        server: ServerLane::open(map, &geometry, &layout).expect("the mapping fits"),
        client: ClientLane::open(map, &geometry, &layout).expect("the mapping fits"),
        lent: BTreeSet::new(),
        staging: [0; SLOT_LARGE],
    };
    set_hook(Some(Box::new(move || {
        loads.set(loads.get() + 1);
        if input.from_back().is_some_and(|b| b & 3 == 1) {
            scribble(&head, || input.from_back());
        }
    })));
    world.run();
    set_hook(None);
}

fuzz_target!(|data: &[u8]| {
    if let Some((choice, script)) = data.split_first() {
        SEGMENTS.with(|segments| run(&segments[usize::from(choice % 4)], script));
    }
});

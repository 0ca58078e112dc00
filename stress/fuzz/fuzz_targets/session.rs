//! Everything that a session can ask of a server's core: calls of one frame and of many, credit, leases, cancels,
//! deadlines, against memory that changes under it between any two of its loads.
//!
//! The input is read from both ends. Its front is a script: what a client that knows the rules does next, how time goes
//! on, and, if the first byte allows, what it does against the rules. Its back then feeds a hook that `cfg(fuzzing)`
//! calls before every load that the server makes, which may change any word of that client's segment. One thread, so that
//! every finding replays from its input alone. Beside it a bystander calls, by the rules.
//!
//! Asserted after every step: nothing panics; a round does a bounded number of loads; the core's books are right
//! (`Simulation::check`: budget, memory of bodies, exchanges, slots lent, who waits); nothing of a session that has
//! ended is run. The bystander's answers are right. So are those of a client that keeps the rules: it is never found to
//! break them, and each of its calls ends exactly once.
#![no_main]

use doorbell::simulation::{
    BIG, BIG_LEN, ECHO, ERR, HALVES, MESSAGE_MAX, NEVER, PANIC, PANIC_LATER, PIECES, Peer, SHORT, SHORT_LEN,
    STUCK, Simulation,
};
use doorbell::{MessageType, Status};
use doorbell_shm::entry::{Completion, Submission, flag, kind};
use doorbell_shm::hooked::{AtomicU64, set_hook};
use doorbell_shm::layout::{Geometry, HEADER_LEN, LaneLayout, SLOT_LARGE, SLOT_MEDIUM, SLOT_SMALL};
use doorbell_shm::lease::Run;
use doorbell_shm::map::Shared;
use doorbell_shm::segment::{Identity, Segment};
use doorbell_shm::slots::{ClientWord, Grant, ServerWord};
use libfuzzer_sys::fuzz_target;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Loads of shared memory that a round may take: each of two lanes takes 16 entries or steps of each ring at most.
const LOADS_PER_ROUND: u32 = 10_000;
const TYPES: [MessageType; 11] =
    [ECHO, PIECES, BIG, PANIC, ERR, HALVES, STUCK, PANIC_LATER, SHORT, NEVER, MessageType(300)];

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

    /// Mostly small numbers, where slots, generations and lengths are right or nearly so.
    fn number(&self) -> u32 {
        match self.byte() {
            255 => u32::from_le_bytes([(); 4].map(|()| self.byte())),
            254 => u32::MAX - u32::from(self.byte()),
            253 => u32::from(self.byte()) << 7,
            small => small.into(),
        }
    }

    /// The length of a body: 0 to some 60 000 bytes, edges of slots among them.
    fn len(&self) -> usize {
        let edges = [0, 1, 1023, 1024, 1025, 4096, 4097, 16384, 16385, 5000, 5001, 40_000];
        match self.byte() {
            n if n < 12 => edges[usize::from(n)],
            n if n < 128 => usize::from(n) * 16,
            n => usize::from(n) * 240,
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

/// Byte `i` of body number `seed`.
fn pattern(seed: usize, i: usize) -> u8 {
    (i % 253 * 7 + i / 253 + seed * 31) as u8
}

fn body(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| pattern(seed, i)).collect()
}

/// Slots of a window, next to each other; `epoch` of a leased one.
#[derive(Debug, Clone, Copy)]
struct Window {
    first: u32,
    count: u32,
    bytes: u32,
    epoch: Option<u32>,
}

impl Window {
    fn slot(&self, k: u32) -> u32 {
        self.first + k % self.count * (self.bytes / SLOT_SMALL as u32)
    }
}

impl From<Run> for Window {
    fn from(run: Run) -> Self {
        Self { first: run.first, count: run.count, bytes: run.bytes, epoch: Some(run.epoch) }
    }
}

impl From<Grant> for Window {
    fn from(grant: Grant) -> Self {
        Self { first: grant.slot, count: 1, bytes: grant.capacity, epoch: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Open,
    Lease(u32),
    Return,
    Call(MessageType),
}

/// A call under way, as its client knows it.
struct Call {
    what: What,
    ring: usize,
    name: Grant,
    body: Vec<u8>,
    /// Bytes that have been sent, frames too.
    sent: usize,
    frames: u32,
    ended: bool,
    /// Slots for the frames of the request, and for the answer; those of one frame are answered where they lie.
    requests: Option<Window>,
    answers: Window,
    answer: Vec<u8>,
    got: u32,
    released: u32,
    cancelled: bool,
    deadline: u64,
}

/// A client that keeps the rules of `shm/LAYOUT.md`.
struct Client {
    peer: Peer,
    geometry: Geometry,
    connections: [u32; 2],
    calls: Vec<Call>,
    seeds: usize,
    /// Leased slots are in use.
    using: bool,
    /// Every answer is expected to be right.
    honest: bool,
}

impl Client {
    fn join(simulation: &mut Simulation, segment: &Arc<Segment>, honest: bool) -> Option<Self> {
        let geometry = *segment.geometry();
        let peer = simulation.open(Arc::clone(segment))?;
        let connections = [0; 2];
        let mut client =
            Self { peer, geometry, connections, calls: Vec::new(), seeds: 0, using: false, honest };
        for ring in 0..2 {
            let flags = if ring == 1 { flag::BULK } else { 0 };
            client.control(0, What::Open, Submission { kind: kind::OPEN, flags, ..Submission::default() });
            simulation.round();
            let words = client.peer.lane.completions[0].pop().expect("a lap")?;
            client.peer.lane.completions[0].publish();
            let opened = Completion::unpack(words).expect("an answer");
            client.connections[ring] = opened.detail as u32;
            client.calls.clear();
            client.peer.lane.slots.put_back(opened.slot);
        }
        Some(client)
    }

    fn push(&mut self, ring: usize, entry: &Submission) -> bool {
        self.peer.lane.submissions[ring].push(entry.pack()) == Ok(true)
    }

    fn started(&mut self, what: What, ring: usize, name: Grant, body: Vec<u8>) -> Call {
        let answers = Window { first: name.slot, count: 1, bytes: name.capacity, epoch: None };
        Call {
            what,
            ring,
            name,
            body,
            sent: 0,
            frames: 1,
            ended: true,
            requests: None,
            answers,
            answer: Vec::new(),
            got: 0,
            released: 0,
            cancelled: false,
            deadline: 0,
        }
    }

    fn control(&mut self, ring: usize, what: What, entry: Submission) -> bool {
        let Some(name) = self.peer.lane.slots.take(0) else { return false };
        let entry = Submission { slot: name.slot, generation: name.generation, ..entry };
        if !self.push(ring, &entry) {
            self.peer.lane.slots.put_back(name.slot);
            return false;
        }
        self.peer.lane.slots.advance(name);
        let call = self.started(what, ring, name, Vec::new());
        self.calls.push(call);
        true
    }

    fn lease(&mut self, ring: usize, large: bool, slots: u16) {
        let len = if large { SLOT_LARGE } else { SLOT_MEDIUM } as u32;
        let entry = Submission { kind: kind::LEASE, len, response_count: slots, ..Submission::default() };
        self.control(ring, What::Lease(len), entry);
    }

    /// Gives back what is void, or anything that is not in use.
    fn give_lease_back(&mut self, ring: usize, any: bool) {
        let words = &self.peer.lane.common.leases;
        let held = self.peer.lane.leases.drop_void(|epoch| any || words.is_void(epoch));
        let Some((payload_slot, lease_epoch)) = held else { return };
        let kind = kind::RETURN;
        let entry =
            Submission { kind, flags: flag::LEASED, payload_slot, lease_epoch, ..Submission::default() };
        // A client that cannot keeps what is void until the server takes it.
        self.control(ring, What::Return, entry);
    }

    /// Slots of good leases.
    fn leased(&mut self, bytes: usize, count: u32) -> Option<Window> {
        let lane = &mut self.peer.lane;
        if !self.using {
            lane.common.leases.enter();
        }
        let words = &lane.common.leases;
        let run = lane.leases.take(bytes, count, |epoch| !words.is_void(epoch));
        self.using |= run.is_some();
        if !self.using {
            lane.common.leases.end();
        }
        run.map(Window::from)
    }

    fn put_back(&mut self, window: &Window) {
        for k in 0..window.count {
            match window.epoch {
                Some(_) => {
                    self.peer.lane.leases.put_back(window.slot(k));
                }
                None => self.peer.lane.slots.put_back(window.slot(k)),
            }
        }
        if self.using && !self.peer.lane.leases.in_use() {
            self.using = false;
            self.peer.lane.common.leases.end();
        }
    }

    /// Begins a call: `how` says in which slots.
    fn call(&mut self, ring: usize, message_type: MessageType, len: usize, how: u8, deadline: u64) {
        self.seeds += 1;
        let body = body(self.seeds, len);
        let one_frame = how & 1 == 0;
        let Some(name) = self.peer.lane.slots.take(if one_frame { len.min(SLOT_LARGE) } else { 0 }) else {
            return;
        };
        let mut call = self.started(What::Call(message_type), ring, name, body);
        let mut entry = Submission {
            kind: kind::CALL,
            flags: flag::END,
            message_type: message_type.0,
            connection: self.connections[ring],
            slot: name.slot,
            generation: name.generation,
            response_count: 1,
            response_slot: name.slot,
            deadline,
            ..Submission::default()
        };
        call.deadline = deadline;
        let count = 1 + u32::from(how >> 5 & 3);
        // The answer's window: the slot itself, a base slot, leased ones.
        let answers = match how >> 1 & 3 {
            0 if one_frame => None,
            0 | 1 => self.peer.lane.slots.take(0).map(Window::from),
            _ => self.leased(1, count),
        };
        if !one_frame && answers.is_none() {
            return self.peer.lane.slots.put_back(name.slot);
        }
        if let Some(answers) = answers {
            call.answers = answers;
            (entry.response_slot, entry.response_count) = (answers.first, answers.count as u16);
            if let Some(epoch) = answers.epoch {
                entry.flags |= flag::LEASED;
                (entry.lease_epoch, entry.payload_slot) = (epoch, name.slot);
            }
        }
        if one_frame {
            let len = call.body.len().min(name.capacity as usize);
            call.body.truncate(len);
            self.write(name.slot, &call.body);
            (entry.len, call.sent) = (len as u32, len);
        } else {
            entry.flags = entry.flags & !flag::END | flag::MORE;
            entry.body_len = if how & 0x80 == 0 { call.body.len() as u64 } else { 0 };
            call.ended = false;
            call.requests = if how >> 3 & 1 == 1 { self.leased(1, count) } else { None };
        }
        let windows = [answers, call.requests];
        if self.push(ring, &entry) {
            self.peer.lane.slots.advance(name);
            return self.calls.push(call);
        }
        windows.into_iter().flatten().for_each(|window| self.put_back(&window));
        self.peer.lane.slots.put_back(name.slot);
    }

    fn write(&self, slot: u32, bytes: &[u8]) {
        self.peer.lane.common.payload.write(LaneLayout::slot_offset(slot), bytes);
    }

    /// Sends the next frame of a call, of at most `most` bytes.
    fn frame(&mut self, nth: usize, most: usize) {
        let n = self.calls.len().max(1);
        let Some(call) = self.calls.get(nth % n).filter(|call| !call.ended) else { return };
        let word = &self.peer.lane.common.server_words[call.name.slot as usize];
        let word = ServerWord::read(word);
        // The frame that came with the call is empty and the first to be taken.
        let taken = if word.generation == call.name.generation { word.taken } else { 0 };
        let own = Window::from(call.name);
        let window = call.requests.unwrap_or(own);
        let untaken = call.frames.saturating_sub(taken);
        // The slot was used by the frame that is `count` before; the call's own first by the one that came with it.
        let is_free = untaken < window.count || call.requests.is_some() && call.frames <= window.count;
        if !is_free {
            return;
        }
        let slot = window.slot(call.frames - 1);
        let len = most.min(window.bytes as usize).min(call.body.len() - call.sent);
        let last = call.sent + len == call.body.len();
        let entry = Submission {
            kind: kind::FRAME,
            flags: if last { flag::END } else { flag::MORE }
                | if window.epoch.is_some() { flag::LEASED } else { 0 },
            slot: call.name.slot,
            generation: call.name.generation,
            len: len as u32,
            frame: call.frames,
            payload_slot: slot,
            lease_epoch: window.epoch.unwrap_or(0),
            ..Submission::default()
        };
        self.write(slot, &call.body[call.sent..call.sent + len]);
        let ring = call.ring;
        if self.push(ring, &entry) {
            let call = &mut self.calls[nth % n];
            (call.sent, call.frames, call.ended) = (call.sent + len, call.frames + 1, last);
        }
    }

    fn hint(&mut self, nth: usize, cancel: bool) {
        let n = self.calls.len().max(1);
        let Some(call) = self.calls.get_mut(nth % n) else { return };
        call.cancelled |= cancel;
        call.released = call.got;
        let word = ClientWord {
            generation: call.name.generation,
            cancelled: call.cancelled,
            released: call.released,
        };
        self.peer.lane.common.client_words[call.name.slot as usize].store(word.pack(), Relaxed);
        self.peer.lane.common.hints.set(call.name.slot);
    }

    /// Takes a completion, if there is one.
    fn take(&mut self, ring: usize, now_ns: u64) -> bool {
        let completion = match self.peer.lane.completions[ring].pop() {
            Ok(Some(words)) => Completion::unpack(words),
            Ok(None) => return false,
            // Scribbled over.
            Err(_) if !self.honest => return false,
            Err(fault) => panic!("the server wrote nonsense: {fault}"),
        };
        let Ok(completion) = completion else {
            assert!(!self.honest, "the server wrote nonsense");
            return true;
        };
        let names = (completion.slot, completion.generation);
        let is = |call: &Call| (call.name.slot, call.name.generation) == names && call.ring == ring;
        let Some(at) = self.calls.iter().position(is) else {
            assert!(!self.honest, "a completion of no call: {completion:?}");
            self.peer.lane.completions[ring].publish();
            return true;
        };
        let call = &self.calls[at];
        let slot = call.answers.slot(completion.frame);
        let fits = completion.len <= call.answers.bytes;
        let is_call = matches!(call.what, What::Call(_));
        let mut bytes = vec![0; if fits && is_call { completion.len as usize } else { 0 }];
        self.peer.lane.common.payload.read(LaneLayout::slot_offset(slot), &mut bytes);
        let gone = call.answers.epoch.is_some_and(|epoch| self.peer.lane.common.leases.is_gone(epoch));
        self.peer.lane.completions[ring].publish();
        let call = &mut self.calls[at];
        if self.honest {
            assert!(fits && completion.frame == call.got || !is_call, "{completion:?}");
        }
        call.answer.extend_from_slice(&bytes);
        call.got = call.got.wrapping_add(1);
        if gone {
            // Not to be believed.
            call.cancelled = true;
        }
        if completion.kind == kind::REPLY {
            let call = self.calls.swap_remove(at);
            if self.honest {
                right(&call, &completion, gone, now_ns);
            }
            self.ended(&call, &completion);
        }
        true
    }

    /// The slots of a call are free again.
    fn ended(&mut self, call: &Call, completion: &Completion) {
        if call.answers.first != call.name.slot {
            self.put_back(&call.answers);
        }
        if let Some(requests) = call.requests {
            self.put_back(&requests);
        }
        self.peer.lane.slots.put_back(call.name.slot);
        if let (What::Lease(bytes), 0) = (call.what, completion.status) {
            let (first, slots) = (completion.detail as u32, (completion.detail >> 32) as u32);
            let words = &self.peer.lane.common.leases;
            if words.is_gone(completion.frame) {
                // Taken already: its ring was looked at late.
                return;
            }
            // What has been taken may lie where the new one does.
            while self.peer.lane.leases.drop_void(|epoch| words.is_gone(epoch)).is_some() {}
            let in_use = self.peer.lane.leases.in_use();
            let added = self.peer.lane.leases.add(&self.geometry, first, slots, bytes, completion.frame);
            // Slots of a lease that was taken by force are the client's until their calls have ended.
            assert!(added.is_ok() || !self.honest || in_use, "an impossible lease: {completion:?}");
        }
    }
}

/// Whether a call ended as it had to.
fn right(call: &Call, completion: &Completion, gone: bool, now_ns: u64) {
    let status = completion.status;
    let What::Call(message_type) = call.what else {
        let expected: &[Status] = match call.what {
            What::Lease(_) if call.cancelled => &[Status::Ok, Status::Overloaded, Status::Cancelled],
            What::Lease(_) => &[Status::Ok, Status::Overloaded],
            _ => &[Status::Ok],
        };
        return assert!(expected.iter().any(|s| *s as u8 == status), "{:?} ended as {status}", call.what);
    };
    let leased = call.answers.epoch.is_some() || call.requests.is_some();
    let stood_still = !call.ended || call.released < call.got;
    if gone
        || call.cancelled && status == Status::Cancelled as u8
        || call.deadline != 0 && now_ns >= call.deadline && status == Status::DeadlineExceeded as u8
        || (leased || stood_still) && status == Status::TakenBack as u8
    {
        return;
    }
    let (all, whole) = (&call.body, call.ended);
    let expected = match message_type {
        HALVES if 2 * all.len() > MESSAGE_MAX => (Status::TooLarge, None),
        HALVES => (Status::Ok, Some(all.iter().flat_map(|byte| [*byte, *byte]).collect())),
        ECHO | PIECES => (Status::Ok, Some(all.clone())),
        BIG => (Status::Ok, Some((0..BIG_LEN).map(|i| (i % 251) as u8).collect())),
        PANIC => (Status::HandlerPanic, None),
        ERR | NEVER => (Status::DecodeError, None),
        STUCK => (Status::Internal, None),
        PANIC_LATER if all.len() > 2000 => (Status::HandlerPanic, None),
        PANIC_LATER => (Status::Ok, Some(all.clone())),
        SHORT if all.len() > SHORT_LEN && call.frames + u32::from(!whole) > 1 => (Status::TooLarge, None),
        SHORT => (Status::Ok, Some(all.clone())),
        _ => (Status::UnknownType, None),
    };
    // A body that goes on is announced with its first frame only: the answer may come before its end.
    assert_eq!(status, expected.0 as u8, "{message_type:?} of {} bytes, {} sent", all.len(), call.sent);
    if let Some(bytes) = expected.1 {
        assert!(
            call.answer == bytes,
            "{message_type:?}: {} bytes, {} expected",
            call.answer.len(),
            bytes.len()
        );
    }
}

/// Small slots only, many of them; some of each class and few lease pages; the smallest rings.
const GEOMETRIES: [Geometry; 3] = [
    Geometry { ring_order: 4, large: 0, medium: 0, small: 8, lease_pages: 32 },
    Geometry { ring_order: 4, large: 1, medium: 2, small: 24, lease_pages: 9 },
    Geometry { ring_order: 3, large: 0, medium: 0, small: 16, lease_pages: 16 },
];
const BYSTANDER: Geometry = Geometry { ring_order: 3, large: 0, medium: 1, small: 4, lease_pages: 4 };

/// The segments, made once: most of an execution's time would go into them.
struct Segments {
    of_clients: [Arc<Segment>; 3],
    of_bystander: Arc<Segment>,
}

impl Segments {
    fn new() -> Self {
        let make = |geometry| {
            let identity = Identity { epoch: 1, session: [2, 3] };
            Arc::new(Segment::on_heap(geometry, 1, identity).expect("a good geometry"))
        };
        Self { of_clients: GEOMETRIES.map(make), of_bystander: make(BYSTANDER) }
    }
}

/// The head of the home lane, where all words are.
fn head(segment: &Segment) -> Shared<[AtomicU64]> {
    let layout = LaneLayout::home(segment.geometry());
    let words =
        segment.mapping().slice::<AtomicU64>(HEADER_LEN, (layout.slots - HEADER_LEN) / 8).expect("inside");
    words.iter().for_each(|word| word.store(0, Relaxed));
    words
}

struct World {
    input: Rc<Input>,
    loads: Rc<Cell<u32>>,
    /// The server is at work: the hook may scribble.
    serving: Rc<Cell<bool>>,
    words: Shared<[AtomicU64]>,
    simulation: Simulation,
    client: Client,
    bystander: Client,
}

impl World {
    fn serve<T>(&mut self, step: impl FnOnce(&mut Simulation) -> T) -> T {
        self.loads.set(0);
        self.serving.set(true);
        let result = step(&mut self.simulation);
        self.serving.set(false);
        let loads = self.loads.get();
        assert!(loads <= LOADS_PER_ROUND, "{loads} loads");
        self.simulation.check();
        if self.client.honest {
            assert_eq!(self.simulation.fault_of(&self.client.peer), None, "a client that kept the rules");
        }
        assert_eq!(self.simulation.fault_of(&self.bystander.peer), None, "the bystander");
        result
    }

    /// The bystander calls and is answered within a few rounds, whatever the other does.
    fn bystand(&mut self, long: bool) {
        let (message_type, len, how) = if long { (PIECES, 3000, 1) } else { (ECHO, 1000, 0) };
        self.bystander.call(0, message_type, len, how, 0);
        assert_eq!(self.bystander.calls.len(), 1);
        for _ in 0..60 {
            self.serve(Simulation::round);
            self.bystander.frame(0, usize::MAX);
            let now = self.simulation.now_ns;
            while self.bystander.take(0, now) {
                self.bystander.hint(0, false);
            }
            if self.bystander.calls.is_empty() {
                return;
            }
        }
        panic!("the bystander waits");
    }

    fn hostile(&mut self, how: u8) {
        let input = Rc::clone(&self.input);
        let ring = usize::from(how & 1);
        match how >> 1 & 3 {
            0 => {
                let name = self.client.calls.first().map(|call| call.name);
                let (slot, generation) =
                    name.map_or((input.number(), input.number()), |n| (n.slot, n.generation));
                let kinds =
                    [kind::CALL, kind::FRAME, kind::LEASE, kind::RETURN, kind::CLOSE, kind::OPEN, kind::CALL];
                let entry = Submission {
                    kind: kinds.get(usize::from(input.byte())).copied().unwrap_or(kind::FRAME),
                    flags: input.number() as u16,
                    message_type: TYPES[usize::from(input.byte()) % TYPES.len()].0,
                    connection: self.client.connections[ring] * u32::from(input.byte() & 1),
                    slot,
                    generation: generation.wrapping_add(input.number()),
                    len: input.number(),
                    response_count: input.byte().into(),
                    response_slot: input.number(),
                    frame: input.number(),
                    payload_slot: input.number(),
                    lease_epoch: input.number(),
                    body_len: input.number().into(),
                    ..Submission::default()
                };
                self.client.push(ring, &entry);
            }
            1 => {
                // A call by the rules, but for one number.
                if let Some(call) = self.client.calls.last_mut() {
                    match input.byte() % 5 {
                        0 => call.frames += 1,
                        1 => call.name.generation = call.name.generation.wrapping_add(1),
                        2 => call.got = call.got.wrapping_add(1),
                        3 => call.ended = !call.ended,
                        _ => {
                            call.requests =
                                Some(Window { first: input.number(), count: 1, bytes: 1024, epoch: None })
                        }
                    }
                }
            }
            _ => {
                scribble(&self.words, || input.next());
            }
        }
    }

    fn run(&mut self) {
        while let Some(op) = self.input.next() {
            let ring = usize::from(op >> 7);
            match op & 0x7f {
                0..=19 => {
                    self.serve(Simulation::round);
                }
                20..=44 => {
                    let message_type = TYPES[usize::from(op & 0x7f) % TYPES.len()];
                    let (how, len) = (self.input.byte(), self.input.len());
                    let deadline = if how == 77 { self.simulation.now_ns + 50_000_000 } else { 0 };
                    self.client.call(ring, message_type, len, how, deadline);
                }
                45..=64 => {
                    let (nth, most) = (usize::from(self.input.byte()), self.input.len());
                    self.client.frame(nth, most);
                }
                65..=79 => {
                    let now = self.simulation.now_ns;
                    self.client.take(ring, now);
                }
                80..=89 => {
                    let nth = usize::from(self.input.byte());
                    self.client.hint(nth, false);
                }
                90..=92 => {
                    let nth = usize::from(self.input.byte());
                    self.client.hint(nth, true);
                }
                93..=98 => {
                    let how = self.input.byte();
                    self.client.lease(ring, how & 1 == 1, 1 + u16::from(how >> 1 & 7));
                }
                99..=101 => self.client.give_lease_back(ring, op & 1 == 1),
                102..=107 => {
                    let ns =
                        [1_000_000, 50_000_000, 110_000_000, 600_000_000][usize::from(self.input.byte() & 3)];
                    self.simulation.now_ns += ns;
                    self.serve(|simulation| simulation.tick(ns >= 50_000_000));
                }
                108..=111 => self.bystand(op & 1 == 1),
                112..=114 => {
                    // So many at once that completions have no space.
                    for _ in 0..self.input.byte() % 16 {
                        self.client.call(ring, ECHO, 10, 0, 0);
                    }
                }
                how if !self.client.honest => self.hostile(how),
                _ => {}
            }
        }
        self.end();
    }

    /// A client that keeps the rules gets an end of all that it began; afterwards nothing is left of anybody.
    fn end(&mut self) {
        if self.client.honest {
            for round in 0..3000 {
                self.serve(Simulation::round);
                let now = self.simulation.now_ns;
                while self.client.take(0, now) || self.client.take(1, now) {}
                for nth in 0..self.client.calls.len() {
                    self.client.frame(nth, usize::MAX);
                    self.client.hint(nth, round > 2000);
                }
                if round % 8 == 0 {
                    self.simulation.now_ns += 50_000_000;
                    self.serve(|simulation| simulation.tick(true));
                }
                if self.client.calls.is_empty() {
                    break;
                }
            }
            let left = self.client.calls.iter().map(|call| (call.what, call.sent, call.got, call.cancelled));
            assert_eq!(left.clone().count(), 0, "calls without an end: {:?}", left.collect::<Vec<_>>());
        }
        self.bystand(true);
        self.simulation.end(&self.client.peer);
        self.simulation.check();
        self.bystand(false);
        self.simulation.end(&self.bystander.peer);
        self.simulation.check();
        assert!(self.simulation.is_unused());
    }
}

thread_local! {
    static SEGMENTS: Segments = Segments::new();
}

fn run(segments: &Segments, choice: u8, script: &[u8]) {
    let honest = choice & 1 == 0;
    let segment = &segments.of_clients[usize::from(choice >> 1) % 3];
    let pages = [20, 48, 26][usize::from(choice >> 3) % 3];
    let body_memory = [1, 60_000, MESSAGE_MAX as u32 * 2][usize::from(choice >> 5) % 3];
    let input = Rc::new(Input { data: script.to_vec(), front: Cell::new(0), back: Cell::new(script.len()) });
    let (loads, serving) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
    let words = head(segment);
    head(&segments.of_bystander);
    let mut simulation = Simulation::new(pages, body_memory);
    let bystander = Client::join(&mut simulation, &segments.of_bystander, true);
    let client = Client::join(&mut simulation, segment, honest);
    let (Some(bystander), Some(client)) = (bystander, client) else { return };
    let mut world = World {
        input: Rc::clone(&input),
        loads: Rc::clone(&loads),
        serving: Rc::clone(&serving),
        words: words.clone(),
        simulation,
        client,
        bystander,
    };
    set_hook(Some(Box::new(move || {
        loads.set(loads.get() + 1);
        if !honest && serving.get() && input.from_back().is_some_and(|b| b & 3 == 1) {
            scribble(&words, || input.from_back());
        }
    })));
    world.run();
    set_hook(None);
}

fuzz_target!(|data: &[u8]| {
    if let Some((choice, script)) = data.split_first() {
        SEGMENTS.with(|segments| run(segments, *choice, script));
    }
});

//! One lane's dispatch: entries in, completions out. Sans-I/O: shared memory, time and handlers are its
//! inputs, a count of work and a fault its outputs; it makes no system call.
//!
//! Trust: an entry is copied once and judged as a whole; whatever a correct client could not have written
//!        is a [`PeerFault`], which ends this session and touches nothing else (S9). What a correct client
//!        can get wrong (unknown type, too long) is a status, and the connection goes on.

use super::connections::ConnectionPool;
use super::crew::{Inbox, Notice};
use super::staging::BufferPool;
use super::table::{Context, Handler, Reply};
use crate::config::MESSAGE_MAX;
use crate::metrics::{Metrics, Totals};
use crate::protocol::MessageType;
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Completion, Status, Submission, codec, flag, kind};
use doorbell_shm::lane::{BULK, Drain, INTERACTIVE, ServerLane};
use doorbell_shm::layout::LaneLayout;
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::ClientWord;
use doorbell_shm::{SegmentError, bell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a lane works with and does not own.
pub(crate) struct Bench<'a, S> {
    pub handlers: &'a [Option<Handler<S>>],
    pub state: &'a S,
    pub connections: &'a mut ConnectionPool,
    pub staging: &'a mut BufferPool,
    pub metrics: &'a mut Metrics,
    /// The counters of all reactors, for handlers that ask.
    pub totals: &'a Totals,
    pub batch: &'a mut Batch,
    /// The server's CLOCK_MONOTONIC, ns; asked only for calls that carry a deadline, and in turns that are timed.
    pub now_ns: &'a mut dyn FnMut() -> u64,
    /// What the home reactor has told of connections and is not known yet.
    pub inbox: &'a mut Inbox,
    /// Tells the other reactors of a session what became of its connections, before the client learns of it.
    pub announce: &'a mut dyn FnMut(u32, Notice),
    pub limits: TurnLimits,
    /// Words 0 of the entries taken, or-ed: which flags occurred.
    pub flags_seen: u64,
}

/// What a lane may use of the reactor before the next one has its turn (S7).
#[derive(Debug, Clone, Copy)]
pub(crate) struct TurnLimits {
    pub entries: u32,
    /// Bytes of requests and answers.
    pub bytes: u64,
    /// Nanoseconds; `None` while turns are short and not timed.
    pub time_ns: Option<u64>,
}

/// The server's half of one lane of a session.
#[derive(Debug)]
pub(crate) struct SessionLane {
    lane: ServerLane,
    segment: Arc<Segment>,
    /// 0 is the home lane, where connections are opened and closed.
    number: u32,
    /// Further lanes of the session, at other reactors. Counted at the home lane only.
    further: u32,
    /// Calls that a ring pair may have between submission and consumed completion (P4).
    admitted: u64,
    /// Entries may wait in a ring because their completions would find no space.
    starved: bool,
    drain: Drain,
}

/// Entries copied out before the first of them is run.
const BATCH: usize = 8;

/// Private copies of consecutive entries of one ring. Made once and used for every turn.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Batch {
    entries: [[u64; 8]; BATCH],
}

impl Batch {
    pub fn new() -> Self {
        Self { entries: [[0; 8]; BATCH] }
    }
}

/// What is in a [`Batch`].
struct Filled {
    len: usize,
    /// Position of the first entry.
    first: u64,
    /// What stopped the copying, to be reported once the entries before it have run.
    fault: Option<PeerFault>,
}

/// How a call ended: status, bytes of the answer, a number that goes with the status.
struct Outcome {
    status: Status,
    len: usize,
    detail: u64,
}

impl Outcome {
    fn of(status: Status, detail: u64) -> Self {
        Self { status, len: 0, detail }
    }
}

/// What one turn has used.
struct Turn {
    taken: u32,
    bytes_before: u64,
    ends_ns: Option<u64>,
}

impl Turn {
    fn begin<S>(bench: &mut Bench<'_, S>) -> Self {
        let ends_ns = bench.limits.time_ns.map(|time| (bench.now_ns)() + time);
        Self { taken: 0, bytes_before: bench.metrics.bytes(), ends_ns }
    }

    /// Entries that may still be taken: 0 when any of the limits is reached.
    #[inline(always)]
    fn left<S>(&self, bench: &mut Bench<'_, S>) -> u32 {
        let over = bench.metrics.bytes() - self.bytes_before >= bench.limits.bytes
            || self.ends_ns.is_some_and(|end| self.taken > 0 && (bench.now_ns)() >= end);
        if over { 0 } else { bench.limits.entries - self.taken }
    }
}

impl SessionLane {
    /// The server's end of lane `number` of a segment, everything at position 0.
    pub fn new(segment: Arc<Segment>, number: u32) -> Result<Self, SegmentError> {
        let geometry = *segment.geometry();
        let lane = ServerLane::open(segment.mapping(), &geometry, &LaneLayout::nth(&geometry, number))?;
        let admitted = geometry.admitted().into();
        Ok(Self { lane, segment, number, further: 0, admitted, starved: false, drain: Drain::default() })
    }

    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    pub fn lane(&self) -> &ServerLane {
        &self.lane
    }

    /// Home lane: another reactor has got a lane of this session.
    pub fn add_further(&mut self) {
        self.further += 1;
    }

    /// Takes interactive entries until none is left that may be taken, or the turn is over; returns how many.
    #[inline]
    pub fn turn<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        // Taken here too: a hint that no call follows must not keep the lane awake.
        if self.lane.common.hints.any() {
            self.take_hints()?;
        }
        self.starved = false;
        let mut turn = Turn::begin(bench);
        loop {
            let left = turn.left(bench) as usize;
            if left == 0 {
                break;
            }
            let filled = self.fill(INTERACTIVE, BATCH.min(left), bench.batch);
            if filled.len == 0 && filled.fault.is_none() {
                break;
            }
            turn.taken += filled.len as u32;
            self.run_batch(id, INTERACTIVE, filled, bench)?;
        }
        Ok(turn.taken)
    }

    /// Takes bulk entries, and before each of them the interactive ones that have come meanwhile, in the order
    /// that [`Drain`] says; returns how many.
    #[inline]
    pub fn turn_bulk<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        if !self.lane.submissions[BULK].is_ready() {
            return Ok(0);
        }
        let mut turn = Turn::begin(bench);
        loop {
            let left = turn.left(bench);
            if left == 0 {
                break;
            }
            let most = BATCH.min(left.min(self.drain.interactive_now()) as usize);
            let (ring, filled) = match self.fill(INTERACTIVE, most, bench.batch) {
                Filled { len: 0, fault: None, .. } => (BULK, self.fill(BULK, 1, bench.batch)),
                filled => (INTERACTIVE, filled),
            };
            if filled.len == 0 && filled.fault.is_none() {
                break;
            }
            self.drain.took(ring, filled.len as u32);
            turn.taken += filled.len as u32;
            self.run_batch(id, ring, filled, bench)?;
        }
        Ok(turn.taken)
    }

    /// Copies out what is there, as far as completions would find space, and asks for the payloads: their
    /// lines travel while earlier entries run.
    #[inline(always)]
    fn fill(&mut self, ring: usize, most: usize, batch: &mut Batch) -> Filled {
        let mut filled = Filled { len: 0, first: self.lane.submissions[ring].next(), fault: None };
        let space = match self.space(ring) {
            Ok(space) => space,
            Err(fault) => return Filled { fault: Some(fault), ..filled },
        };
        for entry in batch.entries.iter_mut().take(most.min(space as usize)) {
            match self.lane.submissions[ring].pop() {
                Ok(Some(words)) => {
                    // A hint only: the slot is judged when its entry is.
                    let slot = words[2] as u32;
                    self.lane
                        .common
                        .payload
                        .prefetch(LaneLayout::slot_offset(slot), words[3] as u32 as usize);
                    self.lane.completions[ring].prefetch(filled.len as u64);
                    *entry = words;
                    filled.len += 1;
                }
                Ok(None) => break,
                Err(fault) => return Filled { fault: Some(fault), ..filled },
            }
        }
        if filled.len == BATCH {
            // Where so many were waiting, more are.
            self.lane.submissions[ring].prefetch(BATCH as u64 / 2);
        }
        self.starved |= space == 0 && self.lane.submissions[ring].is_ready();
        filled
    }

    /// Calls that may still be admitted: each reserves the space of its completion.
    #[inline(always)]
    fn space(&mut self, ring: usize) -> Result<u64, PeerFault> {
        let completions = &mut self.lane.completions[ring];
        if self.admitted - completions.outstanding() < BATCH as u64 {
            completions.refresh()?;
        }
        Ok(self.admitted - completions.outstanding())
    }

    #[inline(always)]
    fn run_batch<S>(
        &mut self,
        id: u32,
        ring: usize,
        filled: Filled,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let mut flags_seen = 0;
        for i in 0..filled.len {
            // Published before the entry is run: after our death the client knows which calls were not
            // started (FAULTS §5).
            self.lane.submissions[ring].publish_at(filled.first + i as u64 + 1);
            let words = bench.batch.entries[i];
            flags_seen |= words[0];
            match Submission::plain(&words) {
                // The same code with most of its conditions known: half the instructions.
                Some(call) => self.call(id, ring, &call, bench)?,
                None => self.other(id, ring, words, bench)?,
            }
        }
        bench.flags_seen |= flags_seen;
        // What came before a broken entry has run; nothing after it will.
        filled.fault.map_or(Ok(()), Err)
    }

    /// Any entry but a plain call.
    #[inline(never)]
    fn other<S>(
        &mut self,
        id: u32,
        ring: usize,
        words: [u64; 8],
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let entry = Submission::unpack(words)?;
        match entry.kind {
            kind::CALL => {
                check_shape(&entry)?;
                self.call(id, ring, &entry, bench)
            }
            kind::OPEN if self.number == 0 => self.open(id, ring, &entry, bench),
            kind::CLOSE if self.number == 0 => self.close(id, ring, &entry, bench),
            kind::ATTACH if self.number != 0 => self.attach(id, ring, &entry, bench),
            kind => Err(PeerFault::Kind { kind }),
        }
    }

    /// Whether a turn would find something to do. Looks at everything that a client's ring may be about.
    pub fn has_work(&mut self) -> Result<bool, PeerFault> {
        if self.lane.common.hints.any() {
            return Ok(true);
        }
        for ring in Drain::ORDER {
            if self.lane.submissions[ring].is_ready() {
                self.lane.completions[ring].refresh()?;
                if self.lane.completions[ring].outstanding() < self.admitted {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Entries taken so far.
    pub fn taken(&self) -> u64 {
        self.lane.submissions.iter().map(|ring| ring.next()).sum()
    }

    /// The state that the server bell has to show while this session's reactor sleeps.
    pub fn asleep_state(&self) -> u32 {
        if self.starved { bell::ASLEEP_WANTS_SPACE } else { bell::ASLEEP }
    }

    fn take_hints(&mut self) -> Result<(), PeerFault> {
        let slots = &mut self.lane.slots;
        // Calls run to their end within a turn, so no slot is busy here: every hint is kept for its call.
        self.lane.common.hints.take(|slot| {
            slots.hint(slot);
        })
    }

    /// A call whose entry means something.
    #[inline(always)]
    fn call<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        // Looked at for every call: one may have been cancelled while another of its batch ran.
        if self.lane.common.hints.any() {
            self.take_hints()?;
        }
        let Some(connection) = bench.connections.get(id, call.connection) else {
            return Err(PeerFault::Connection { connection: call.connection });
        };
        if connection.bulk != (ring == BULK) || connection.codec != call.codec {
            return Err(PeerFault::Connection { connection: call.connection });
        }
        connection.requests = connection.requests.wrapping_add(1);
        connection.bytes += u64::from(call.len);
        let (capacity, hinted) = self.lane.slots.lend(call.slot, call.generation, call.len)?;
        let capacity = if call.response_slot == call.slot {
            capacity
        } else {
            self.lane.slots.lend_for_answer(call.response_slot)?
        };
        let outcome = match self.refusal(call, hinted, bench) {
            Some(refusal) => refusal,
            None => self.run(call, capacity as usize, bench),
        };
        if call.response_slot != call.slot {
            self.lane.slots.give_back(call.response_slot);
        }
        bench.metrics.bytes_in += u64::from(call.len);
        bench.metrics.bytes_out += outcome.len as u64;
        bench.metrics.count_call(outcome.status);
        self.complete(ring, call, outcome)
    }

    /// Why a call must not be started, if so.
    #[inline(always)]
    fn refusal<S>(&self, call: &Submission, hinted: bool, bench: &mut Bench<'_, S>) -> Option<Outcome> {
        if call.flags & flag::MORE != 0 {
            return Some(Outcome::of(Status::TooLarge, MESSAGE_MAX as u64));
        }
        if hinted && self.is_cancelled(call) {
            return Some(Outcome::of(Status::Cancelled, 0));
        }
        if call.deadline != 0 && (bench.now_ns)() >= call.deadline {
            return Some(Outcome::of(Status::DeadlineExceeded, 0));
        }
        None
    }

    #[cold]
    fn is_cancelled(&self, call: &Submission) -> bool {
        let word = self.lane.common.client_words.get(call.slot as usize);
        // The Acquire of the hint made the word visible; it is read once.
        let word = word.map(|w| ClientWord::unpack(w.load(std::sync::atomic::Ordering::Relaxed)));
        word.is_some_and(|w| w.cancelled && w.generation == call.generation)
    }

    /// Copies the request, runs its handler, and says how that went.
    #[inline(always)]
    fn run<S>(&mut self, call: &Submission, capacity: usize, bench: &mut Bench<'_, S>) -> Outcome {
        let message_type = MessageType(call.message_type);
        let Some(Some(handler)) = bench.handlers.get(message_type.0 as usize) else {
            return Outcome::of(Status::UnknownType, message_type.0.into());
        };
        let payload = &self.lane.common.payload;
        // Copied once: from here on the client can change the slot but not the request (S3, F15).
        let request = bench.staging.take(call.len as usize);
        payload.read(LaneLayout::slot_offset(call.slot), request);
        let request = &request[call.meta_len as usize..];
        let mut reply = Reply::new(payload, LaneLayout::slot_offset(call.response_slot), capacity);
        let context = Context {
            state: bench.state,
            metrics: bench.metrics,
            totals: bench.totals,
            message_type,
            connection: call.connection,
            codec: call.codec,
        };
        // A handler owns nothing of ours that its unwinding could leave half done (F43).
        let result = catch_unwind(AssertUnwindSafe(|| handler(&context, request, &mut reply)));
        if let Ok(Ok(())) = result
            && !reply.overflowed()
        {
            return Outcome { status: Status::Ok, len: reply.len(), detail: 0 };
        }
        failure(result, reply)
    }

    fn open<S>(
        &mut self,
        id: u32,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        check_control(entry, flag::BULK)?;
        if entry.connection != 0 || entry.codec > codec::RKYV {
            return Err(PeerFault::Reserved { word: 1, value: entry.connection.into() });
        }
        self.lane.slots.lend(entry.slot, entry.generation, 0)?;
        let bulk = entry.flags & flag::BULK != 0;
        let outcome = match bench.connections.open(id, entry.codec, bulk) {
            Some(number) => {
                bench.metrics.connections_opened += 1;
                if self.further > 0 {
                    (bench.announce)(id, Notice::Opened { number, codec: entry.codec, bulk });
                }
                Outcome::of(Status::Ok, number.into())
            }
            None => {
                bench.metrics.connections_refused += 1;
                Outcome::of(Status::Overloaded, bench.connections.limit().into())
            }
        };
        bench.metrics.connections_open = bench.connections.open_count().into();
        self.complete(ring, entry, outcome)
    }

    fn close<S>(
        &mut self,
        id: u32,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        check_control(entry, 0)?;
        self.lane.slots.lend(entry.slot, entry.generation, 0)?;
        if !bench.connections.close(id, entry.connection) {
            return Err(PeerFault::Connection { connection: entry.connection });
        }
        if self.further > 0 {
            (bench.announce)(id, Notice::Closed { number: entry.connection });
        }
        bench.metrics.connections_open = bench.connections.open_count().into();
        self.complete(ring, entry, Outcome::of(Status::Ok, 0))
    }

    /// The first entry of a connection on this lane (P6). The home reactor announced the connection before the
    /// client could know of it, so one that is still unknown after a look at the inbox does not exist.
    #[inline(never)]
    fn attach<S>(
        &mut self,
        id: u32,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        check_control(entry, flag::BULK)?;
        if entry.slot != 0 || entry.generation != 0 {
            return Err(PeerFault::Reserved { word: 2, value: entry.slot.into() });
        }
        bench.connections.follow(bench.inbox);
        let bulk = entry.flags & flag::BULK != 0;
        if bulk != (ring == BULK) || !bench.connections.attach(id, entry.connection, entry.codec, bulk) {
            return Err(PeerFault::Connection { connection: entry.connection });
        }
        Ok(())
    }

    /// Ends a call: its slot is the client's again, its terminal completion is published.
    #[inline(always)]
    fn complete(&mut self, ring: usize, call: &Submission, outcome: Outcome) -> Result<(), PeerFault> {
        self.lane.slots.give_back(call.slot);
        let completion = Completion {
            kind: kind::REPLY,
            status: outcome.status as u8,
            flags: flag::END,
            slot: call.slot,
            generation: call.generation,
            len: outcome.len as u32,
            frame: 0,
            detail: outcome.detail,
        };
        if self.lane.completions[ring].push(completion.pack())? {
            return Ok(());
        }
        // Excluded by admission: should it ever happen, this session ends and no other notices (F47).
        let (oldest, newest) = (self.lane.completions[ring].passed(), self.lane.completions[ring].next());
        Err(PeerFault::Position { theirs: oldest as u32, oldest: oldest as u32, newest: newest as u32 })
    }
}

/// Refuses combinations in a CALL that mean nothing.
fn check_shape(call: &Submission) -> Result<(), PeerFault> {
    let ends = call.flags & (flag::MORE | flag::END);
    if (ends != flag::MORE && ends != flag::END) || call.flags & flag::BULK != 0 {
        return Err(PeerFault::Reserved { word: 0, value: call.flags.into() });
    }
    if u32::from(call.meta_len) > call.len || (call.meta_len != 0) != (call.flags & flag::META != 0) {
        return Err(PeerFault::Reserved { word: 3, value: call.meta_len.into() });
    }
    // A window of one answer slot, and one frame, until bodies travel as frames.
    if call.response_count != 1 {
        return Err(PeerFault::Reserved { word: 3, value: call.response_count.into() });
    }
    if call.frame != 0 {
        return Err(PeerFault::Reserved { word: 4, value: call.frame.into() });
    }
    let body = u64::from(call.len - u32::from(call.meta_len));
    if ends == flag::END && call.body_len != 0 && call.body_len != body {
        return Err(PeerFault::Reserved { word: 5, value: call.body_len });
    }
    Ok(())
}

/// Refuses an OPEN or CLOSE that says more than it may.
fn check_control(entry: &Submission, flags: u16) -> Result<(), PeerFault> {
    if entry.flags & !flags != 0 {
        return Err(PeerFault::Reserved { word: 0, value: entry.flags.into() });
    }
    let numbers = [
        u64::from(entry.message_type),
        entry.len.into(),
        entry.meta_len.into(),
        entry.response_count.into(),
        entry.response_slot.into(),
        entry.frame.into(),
        entry.body_len,
        entry.deadline,
    ];
    match numbers.iter().find(|n| **n != 0) {
        Some(value) => Err(PeerFault::Reserved { word: 1, value: *value }),
        None => Ok(()),
    }
}

/// Turns a handler's failure into a status and, where there is one, a text for the caller.
#[cold]
fn failure(
    result: std::thread::Result<Result<(), super::table::HandlerError>>,
    mut reply: Reply<'_>,
) -> Outcome {
    let capacity = reply.capacity() as u64;
    let error = match result {
        Err(_) => return Outcome::of(Status::HandlerPanic, 0),
        Ok(Ok(())) => super::table::HandlerError::TooLarge,
        Ok(Err(_)) if reply.overflowed() => super::table::HandlerError::TooLarge,
        Ok(Err(error)) => error,
    };
    reply.clear();
    if error.status() == Status::TooLarge {
        return Outcome::of(Status::TooLarge, capacity);
    }
    let text = error.to_string();
    let mut len = text.len().min(reply.capacity());
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    // Cannot fail: the text was cut to the capacity.
    let written = reply.write(&text.as_bytes()[..len]);
    debug_assert!(written.is_ok());
    Outcome { status: error.status(), len: reply.len(), detail: 0 }
}

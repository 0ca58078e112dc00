//! One session's dispatch: entries in, completions out. Sans-I/O: shared memory, time and handlers are its
//! inputs, a count of work and a fault its outputs; it makes no system call.
//!
//! Trust: an entry is copied once and judged as a whole; whatever a correct client could not have written
//!        is a [`PeerFault`], which ends this session and touches nothing else (S9). What a correct client
//!        can get wrong (unknown type, too long) is a status, and the connection goes on.

use super::connections::ConnectionPool;
use super::staging::BufferPool;
use super::table::{Context, Handler, Reply};
use crate::config::MESSAGE_MAX;
use crate::metrics::Metrics;
use crate::protocol::MessageType;
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Completion, Status, Submission, codec, flag, kind};
use doorbell_shm::lane::{BULK, INTERACTIVE, ServerLane};
use doorbell_shm::layout::LaneLayout;
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::ClientWord;
use doorbell_shm::{SegmentError, bell};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a session works with and does not own.
pub(crate) struct Bench<'a, S> {
    pub handlers: &'a [Option<Handler<S>>],
    pub state: &'a S,
    pub connections: &'a mut ConnectionPool,
    pub staging: &'a mut BufferPool,
    pub metrics: &'a mut Metrics,
    pub batch: &'a mut Batch,
    /// The server's CLOCK_MONOTONIC, ns; asked only for calls that carry a deadline.
    pub now_ns: &'a mut dyn FnMut() -> u64,
    pub entries_per_turn: u32,
}

/// The server's half of one session.
#[derive(Debug)]
pub(crate) struct Session {
    lane: ServerLane,
    segment: Segment,
    /// Calls that a ring pair may have between submission and consumed completion (P4).
    admitted: u64,
    /// Entries may wait in a ring because their completions would find no space.
    starved: bool,
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

impl Session {
    pub fn new(segment: Segment) -> Result<Self, SegmentError> {
        let geometry = *segment.geometry();
        let lane = ServerLane::open(segment.mapping(), &geometry, &LaneLayout::home(&geometry))?;
        Ok(Self { lane, segment, admitted: geometry.admitted().into(), starved: false })
    }

    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    pub fn lane(&self) -> &ServerLane {
        &self.lane
    }

    /// Takes entries until none is left that may be taken, or the turn is over; returns how many.
    /// Interactive entries are looked for between any two bulk ones.
    #[inline]
    pub fn turn<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        // Taken here too: a hint that no call follows must not keep the lane awake.
        if self.lane.common.hints.any() {
            self.take_hints()?;
        }
        self.starved = false;
        let mut taken = 0;
        while taken < bench.entries_per_turn {
            let most = BATCH.min((bench.entries_per_turn - taken) as usize);
            let (ring, filled) = match self.fill(INTERACTIVE, most, bench.batch) {
                Filled { len: 0, fault: None, .. } => (BULK, self.fill(BULK, 1, bench.batch)),
                filled => (INTERACTIVE, filled),
            };
            if filled.len == 0 && filled.fault.is_none() {
                break;
            }
            taken += filled.len as u32;
            self.run_batch(id, ring, filled, bench)?;
        }
        Ok(taken)
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
        for i in 0..filled.len {
            // Published before the entry is run: after our death the client knows which calls were not
            // started (FAULTS §5).
            self.lane.submissions[ring].publish_at(filled.first + i as u64 + 1);
            let words = bench.batch.entries[i];
            match Submission::plain(&words) {
                // The same code with most of its conditions known: half the instructions.
                Some(call) => self.call(id, ring, &call, bench)?,
                None => self.other(id, ring, words, bench)?,
            }
        }
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
            kind::OPEN => self.open(id, ring, &entry, bench),
            kind::CLOSE => self.close(id, ring, &entry, bench),
            kind => Err(PeerFault::Kind { kind }),
        }
    }

    /// Whether a turn would find something to do. Looks at everything that a client's ring may be about.
    pub fn has_work(&mut self) -> Result<bool, PeerFault> {
        if self.lane.common.hints.any() {
            return Ok(true);
        }
        for ring in [INTERACTIVE, BULK] {
            if self.lane.submissions[ring].is_ready() {
                self.lane.completions[ring].refresh()?;
                if self.lane.completions[ring].outstanding() < self.admitted {
                    return Ok(true);
                }
            }
        }
        Ok(false)
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
        bench.metrics.connections_open = bench.connections.open_count().into();
        self.complete(ring, entry, Outcome::of(Status::Ok, 0))
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
        let pushed = self.lane.completions[ring].push(completion.pack())?;
        debug_assert!(pushed, "every admitted call has reserved the space of its completion");
        Ok(())
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

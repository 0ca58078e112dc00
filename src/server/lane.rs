//! One lane's dispatch: entries in, completions out. Sans-I/O: shared memory, time and handlers are its
//! inputs, a count of work and a fault its outputs; it makes no system call.
//!
//! Trust: an entry is copied once and judged as a whole; whatever a correct client could not have written
//!        is a [`PeerFault`], which ends this session and touches nothing else (S9). What a correct client
//!        can get wrong (unknown type, too long) is a status, and the connection goes on.

use super::bodies::window;
use super::connections::{Attached, ConnectionPool};
use super::crew::{Inbox, Notice};
use super::deferred::Executor;
use super::exchange::{Exchange, Exchanges, LaneExchanges};
use super::idle::Seen;
use super::leases::{Giving, LaneLeases, LeaseQueue, Wish};
use super::staging::BufferPool;
use super::table::{Context, Entry, HandlerError, Reply, Rest};
use super::trace::Trace;
use super::watch::Pulse;
use crate::inspect::{CallReport, CallState, LaneReport, TracedCall};
use crate::metrics::{Counters, Ended, Timing, Totals};
use crate::protocol::{MessageType, TraceParent};
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Completion, Status, Submission, codec, flag, kind};
use doorbell_shm::kill_point;
use doorbell_shm::lane::{BULK, Drain, INTERACTIVE, ServerLane};
use doorbell_shm::layout::{LaneLayout, SLOT_LARGE, SLOT_MEDIUM, SLOT_SMALL};
use doorbell_shm::lease::LEASE_SLOTS_MAX;
use doorbell_shm::map::PAGE;
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::ClientWord;
use doorbell_shm::{SegmentError, bell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What a lane works with and does not own.
pub(crate) struct Bench<'a, S: 'static> {
    pub handlers: &'a [Entry<S>],
    pub state: &'a S,
    pub connections: &'a mut ConnectionPool,
    pub staging: &'a mut BufferPool,
    pub metrics: &'a mut Counters,
    /// How long calls take.
    pub timing: &'a mut Timing,
    /// Where it is told whose handler runs.
    pub pulse: &'a Pulse,
    /// The calls of one connection, if somebody looks at them.
    pub trace: &'a mut Trace,
    /// The number of this reactor.
    pub reactor: u32,
    /// The counters of all reactors, for handlers that ask.
    pub totals: &'a Totals,
    pub batch: &'a mut Batch,
    /// Calls of several frames.
    pub exchanges: &'a mut Exchanges<S>,
    /// Empty; for looking at hints without allocating (R1.7).
    pub hinted: &'a mut Vec<(u32, u32)>,
    /// Where answers go on that do not fit their slot.
    pub rest: &'a mut Rest,
    /// Who waits for leased memory, and who gives it back.
    pub leases: &'a mut LeaseQueue,
    /// Where a request lies while its handler makes something of it that may use the rest of the bench.
    pub request: &'a mut Vec<u8>,
    /// Runs the futures of handlers.
    pub executor: Option<&'a Executor>,
    /// What calls of several frames, and those answered later, have from now that have no deadline; 0 for ever.
    pub deadline_ns: u64,
    /// Longest message, bytes.
    pub message_max: usize,
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

impl<S> Bench<'_, S> {
    /// Counts the calls that have ended, with the time that they took.
    #[inline(never)]
    pub fn count_times(&mut self) {
        let now = (self.now_ns)();
        let connections = &mut *self.connections;
        self.timing.count(now, |ended, ns| {
            connections.add(ended.session, ended.connection, ns, ended.sent);
        });
    }

    /// A traced call has ended, at the time that was read last.
    #[cold]
    pub fn note_traced(&mut self, session: u32, call: &Submission, began_ns: u64, status: u8, sent: u64) {
        self.trace.note(TracedCall {
            session,
            connection: call.connection,
            reactor: self.reactor,
            message_type: call.message_type,
            slot: call.slot,
            generation: call.generation,
            long: false,
            began_ns,
            ended_ns: self.timing.last_ns(),
            status,
            received: call.len.into(),
            sent,
        });
    }

    /// Something is about to be done that is no short call, and takes its own time.
    pub fn settle_times(&mut self) {
        if self.timing.is_pending() {
            self.count_times();
        }
        self.timing.pause();
    }

    /// A fresh record of a call that is not answered within its turn, with its deadline, its trace and the places of its
    /// answer.
    pub(super) fn begin(
        &mut self,
        call: &Submission,
        places: Places,
        ring: usize,
        id: u32,
    ) -> (u32, Box<Exchange<S>>) {
        let mut call = *call;
        let timed = self.timing.is_on();
        let now = if timed || self.deadline_ns != 0 { (self.now_ns)() } else { 0 };
        if call.deadline == 0 && self.deadline_ns != 0 {
            call.deadline = now.saturating_add(self.deadline_ns);
        }
        let (index, mut exchange) = self.exchanges.begin(&call, ring, id);
        exchange.began_ns = self.timing.began(now);
        exchange.traceparent = places.traceparent;
        exchange.window = window(&call, places);
        self.settle_times();
        (index, exchange)
    }
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
    admitted_most: u64,
    /// The same without those that have been taken and not completed: completions that may be outstanding before the
    /// next call is taken.
    admitted: [u64; 2],
    /// Entries of the batch that is being run which come after the present one: each of them may need the space of a
    /// completion.
    behind: u64,
    /// Entries may wait in a ring because their completions would find no space.
    starved: [bool; 2],
    drain: Drain,
    /// Calls of several frames; made with the first.
    pub(super) exchanges: Option<Box<LaneExchanges>>,
    pub(super) leases: LaneLeases,
}

/// Bytes of answers that wait for a client to make room, of one lane, beyond which none of its entries is taken: whoever
/// does not read what he asks for stands still alone (S12). As much as four of the longest messages by default.
const UNREAD_MOST: usize = 40 << 20;
/// Entries of a ring that are looked at to tell how many wait.
const PEEKS: u64 = 64;

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
pub(super) struct Filled {
    pub len: usize,
    /// Position of the first entry.
    first: u64,
    /// What stopped the copying, to be reported once the entries before it have run.
    pub fault: Option<PeerFault>,
}

/// How a call ended: status, bytes of the answer, a number that goes with the status.
pub(super) struct Outcome {
    pub status: Status,
    pub len: usize,
    pub detail: u64,
}

impl Outcome {
    pub fn of(status: Status, detail: u64) -> Self {
        Self { status, len: 0, detail }
    }
}

/// The slots of a call beside the one that names it.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// The slot of its first frame.
    pub payload: u32,
    /// Slots of the answer window.
    pub count: u32,
    /// Bytes that each of them holds.
    pub capacity: u32,
    /// The trace that the call belongs to.
    pub traceparent: Option<TraceParent>,
}

/// What one turn has used.
pub(super) struct Turn {
    pub taken: u32,
    bytes_before: u64,
    ends_ns: Option<u64>,
}

impl Turn {
    pub(super) fn begin<S>(bench: &mut Bench<'_, S>) -> Self {
        let ends_ns = bench.limits.time_ns.map(|time| (bench.now_ns)() + time);
        Self { taken: 0, bytes_before: bench.metrics.bytes(), ends_ns }
    }

    /// Entries that may still be taken: 0 when any of the limits is reached.
    #[inline(always)]
    pub fn left<S>(&self, bench: &mut Bench<'_, S>) -> u32 {
        let over = bench.metrics.bytes() - self.bytes_before >= bench.limits.bytes
            || self.ends_ns.is_some_and(|end| self.taken > 0 && (bench.now_ns)() >= end);
        if over { 0 } else { bench.limits.entries.saturating_sub(self.taken) }
    }
}

impl SessionLane {
    /// The server's end of lane `number` of a segment, everything at position 0.
    pub fn new(segment: Arc<Segment>, number: u32) -> Result<Self, SegmentError> {
        let geometry = *segment.geometry();
        let lane = ServerLane::open(segment.mapping(), &geometry, &LaneLayout::nth(&geometry, number))?;
        let admitted_most = geometry.admitted().into();
        Ok(Self {
            lane,
            segment,
            number,
            further: 0,
            admitted_most,
            admitted: [admitted_most; 2],
            behind: 0,
            starved: [false; 2],
            drain: Drain::default(),
            exchanges: None,
            leases: LaneLeases::default(),
        })
    }

    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    pub fn lane(&self) -> &ServerLane {
        &self.lane
    }

    pub(super) fn lane_mut(&mut self) -> &mut ServerLane {
        &mut self.lane
    }

    /// 0 is the home lane.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Home lane: another reactor has got a lane of this session.
    pub fn add_further(&mut self) {
        self.further += 1;
    }

    /// Takes interactive entries until none is left that may be taken, or the turn is over; returns how many.
    #[inline]
    pub fn turn<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        // Taken here too: a hint that no call follows must not keep the lane awake.
        let mut answered = 0;
        if self.lane.common.hints.any() {
            let before = self.published();
            self.take_hints(id, bench)?;
            answered = (self.published() - before) as u32;
        }
        self.starved[INTERACTIVE] = false;
        let mut turn = Turn::begin(bench);
        // Nothing was taken for them, but whoever has cancelled waits for the end.
        turn.taken += answered;
        // Calls of several frames move a step each; before every step short calls have their turn, and wait for no other.
        let mut steps = None;
        loop {
            let left = turn.left(bench) as usize;
            if left == 0 {
                break;
            }
            let filled = self.fill(INTERACTIVE, BATCH.min(left), bench.batch);
            if filled.len > 0 || filled.fault.is_some() {
                turn.taken += filled.len as u32;
                self.run_batch(id, INTERACTIVE, filled, bench)?;
                continue;
            }
            let Some(exchanges) = &self.exchanges else { break };
            let steps = steps.get_or_insert(exchanges.live);
            if *steps == 0 || self.step_one(&mut turn, bench)? == 0 {
                break;
            }
            *steps -= 1;
        }
        if steps.is_none() && self.exchanges.is_some() {
            // Short calls have filled the turn, and may fill all others: one long call moves all the same.
            let mut beyond = Turn::begin(bench);
            turn.taken += self.step_one(&mut beyond, bench)?;
        }
        Ok(turn.taken)
    }

    /// One step of an interactive call of several frames, if one can move; returns how many moved.
    fn step_one<S>(&mut self, turn: &mut Turn, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        bench.settle_times();
        self.move_exchanges(INTERACTIVE, 1, turn, bench)
    }

    /// Takes bulk entries, and before each of them the interactive ones that have come meanwhile, in the order
    /// that [`Drain`] says; returns how many.
    #[inline]
    pub fn turn_bulk<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<u32, PeerFault> {
        self.starved[BULK] = false;
        if !self.lane.submissions[BULK].is_ready() && self.exchanges.is_none() {
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
            let nothing = filled.len == 0 && filled.fault.is_none();
            if !nothing {
                self.drain.took(ring, filled.len as u32);
                turn.taken += filled.len as u32;
                self.run_batch(id, ring, filled, bench)?;
            }
            // A step of a bulk exchange is a bulk entry that has waited.
            let moved = self.exchanges.is_some() && {
                bench.settle_times();
                self.move_exchanges(BULK, 1, &mut turn, bench)? > 0
            };
            if nothing && !moved {
                break;
            }
        }
        Ok(turn.taken)
    }

    /// Copies out what is there, as far as completions would find space, and asks for the payloads: their
    /// lines travel while earlier entries run.
    #[inline(always)]
    pub(super) fn fill(&mut self, ring: usize, most: usize, batch: &mut Batch) -> Filled {
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
                    kill_point!("server.entry.copied");
                }
                Ok(None) => break,
                Err(fault) => return Filled { fault: Some(fault), ..filled },
            }
        }
        if filled.len == BATCH {
            // Where so many were waiting, more are.
            self.lane.submissions[ring].prefetch(BATCH as u64 / 2);
        }
        self.starved[ring] |= space == 0 && self.lane.submissions[ring].is_ready();
        filled
    }

    /// Calls that may still be admitted: each reserves the space of its completion.
    #[inline(always)]
    fn space(&mut self, ring: usize) -> Result<u64, PeerFault> {
        if self.is_stuffed() {
            return Ok(0);
        }
        let completions = &mut self.lane.completions[ring];
        // Frames of answers may have taken the space beyond what is admitted.
        if self.admitted[ring].saturating_sub(completions.outstanding()) < BATCH as u64 {
            completions.refresh()?;
        }
        Ok(self.admitted[ring].saturating_sub(completions.outstanding()))
    }

    /// Whether so much of its answers is unread that none of its entries is taken.
    #[inline(always)]
    fn is_stuffed(&self) -> bool {
        self.exchanges.as_ref().is_some_and(|all| all.unread > UNREAD_MOST)
    }

    #[inline(always)]
    pub(super) fn run_batch<S>(
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
            kill_point!("server.position.published");
            self.behind = (filled.len - i - 1) as u64;
            let words = bench.batch.entries[i];
            flags_seen |= words[0];
            match Submission::plain(&words) {
                // The same code with most of its conditions known: half the instructions.
                Some(call) => self.call::<S, true>(id, ring, &call, bench)?,
                None => self.other(id, ring, words, bench)?,
            }
        }
        bench.flags_seen |= flags_seen;
        if bench.timing.batch_ended() {
            bench.count_times();
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
                self.call::<S, false>(id, ring, &entry, bench)
            }
            kind::FRAME => self.frame(ring, &entry, bench),
            kind::LEASE => self.lease(id, ring, &entry, bench),
            kind::RETURN => self.give_back_lease(id, ring, &entry, bench),
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
                if !self.is_stuffed() {
                    self.lane.completions[ring].refresh()?;
                    if self.lane.completions[ring].outstanding() < self.admitted[ring] {
                        return Ok(true);
                    }
                }
                self.starved[ring] = true;
            }
        }
        if self.exchanges.is_some() { self.exchanges_have_work() } else { Ok(false) }
    }

    /// What there is to be seen of how its client uses it; `busy` and `stuck` as far as calls within a turn tell.
    pub fn seen(&mut self) -> Result<Seen, PeerFault> {
        let mut seen = Seen { taken: self.taken(), busy: false, progress: 0, stuck: false };
        for ring in Drain::ORDER {
            self.lane.completions[ring].refresh()?;
            let completions = &self.lane.completions[ring];
            seen.progress += completions.next() + completions.passed();
            let full = completions.outstanding() >= self.admitted[ring];
            seen.stuck |= full && self.lane.submissions[ring].is_ready();
        }
        Ok(seen)
    }

    /// Entries that lie in the rings, with the ring of each; [`PEEKS`] of a ring at most. For people to look at: the
    /// client may change them until they are taken.
    pub fn entries_waiting(&self) -> impl Iterator<Item = (usize, [u64; 8])> + '_ {
        let of =
            move |ring: usize| (0..PEEKS).map_while(move |ahead| self.lane.submissions[ring].peek_at(ahead));
        Drain::ORDER.into_iter().flat_map(move |ring| of(ring).map(move |words| (ring, words)))
    }

    /// How many that are. They lie one behind the other, so few of them have to be looked at.
    pub fn count_waiting(&self) -> u64 {
        let of = |ring: usize| {
            let (mut least, mut most) = (0, PEEKS);
            while least < most {
                let middle = (least + most) / 2;
                match self.lane.submissions[ring].peek_at(middle) {
                    Some(_) => least = middle + 1,
                    None => most = middle,
                }
            }
            least
        };
        Drain::ORDER.into_iter().map(of).sum()
    }

    /// What there is to tell of the lane; which session's it is, and where, others know.
    pub fn tell(&mut self) -> LaneReport {
        LaneReport {
            session: 0,
            generation: 0,
            lane: self.number,
            reactor: 0,
            pid: 0,
            hot: false,
            taken: self.taken(),
            entries_waiting: self.count_waiting(),
            answers_waiting: self.answers_waiting(),
            exchanges: self.exchanges.iter().flat_map(|all| all.all()).count() as u64,
            leased_bytes: u64::from(self.lane.leases.pages()) * PAGE as u64,
        }
    }

    /// Calls that lie in the rings, as the client has written them up to now.
    pub fn queued_calls(&self, session: u32, reactor: u32) -> impl Iterator<Item = CallReport> + '_ {
        let calls = self.entries_waiting().filter_map(|(_, words)| Submission::unpack(words).ok());
        calls.filter(|entry| entry.kind == kind::CALL).map(move |call| CallReport {
            session,
            connection: call.connection,
            reactor,
            message_type: call.message_type,
            slot: call.slot,
            generation: call.generation,
            state: CallState::Queued,
            age_ns: None,
            received: 0,
            sent: 0,
        })
    }

    /// Completions that the client has not taken. One that lies about that is found out when the lane is served.
    pub fn answers_waiting(&mut self) -> u64 {
        let mut waiting = 0;
        for completions in &mut self.lane.completions {
            waiting += completions.refresh().map_or(0, |()| completions.outstanding());
        }
        waiting
    }

    /// Entries taken so far.
    pub fn taken(&self) -> u64 {
        self.lane.submissions.iter().map(|ring| ring.next()).sum()
    }

    /// The state that the server bell has to show while this session's reactor sleeps.
    pub fn asleep_state(&self) -> u32 {
        if self.starved.contains(&true) { bell::ASLEEP_WANTS_SPACE } else { bell::ASLEEP }
    }

    /// Completions published so far.
    fn published(&self) -> u64 {
        self.lane.completions.iter().map(|ring| ring.next()).sum()
    }

    /// Looks at the words that the client has hinted at: what it says of calls that are under way, kept for those
    /// that have not come.
    pub(super) fn take_hints<S>(&mut self, id: u32, bench: &mut Bench<'_, S>) -> Result<(), PeerFault> {
        let slots = &mut self.lane.slots;
        // Most calls run to their end within a turn; only of longer ones is there anything to be found here.
        let mut of_calls = std::mem::take(bench.hinted);
        self.lane.common.hints.take(|slot| {
            if let Some(generation) = slots.hint(slot) {
                of_calls.push((slot, generation));
            }
        })?;
        kill_point!("server.hints.taken");
        for (slot, generation) in of_calls.drain(..) {
            self.hinted(id, slot, generation, bench)?;
        }
        *bench.hinted = of_calls;
        Ok(())
    }

    /// The client's word of `slot`, if it speaks of the call of `generation`.
    #[cold]
    pub(super) fn word_of(&self, slot: u32, generation: u32) -> Option<ClientWord> {
        let word = self.lane.common.client_words.get(slot as usize)?;
        // The Acquire of the hint made the word visible; it is read once.
        let word = ClientWord::unpack(word.load(std::sync::atomic::Ordering::Relaxed));
        (word.generation == generation).then_some(word)
    }

    /// A call whose entry means something. `PLAIN`: it is one for [`Submission::plain`].
    #[inline(always)]
    fn call<S, const PLAIN: bool>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        // Looked at for every call: one may have been cancelled while another of its batch ran.
        if self.lane.common.hints.any() {
            self.take_hints(id, bench)?;
        }
        let (record, count_first) = bench.timing.take_up(call.message_type, call.connection);
        if count_first {
            bench.count_times();
        }
        let Some(connection) = bench.connections.get(id, call.connection) else {
            return Err(PeerFault::Connection { connection: call.connection });
        };
        if connection.bulk != (ring == BULK) || connection.codec != call.codec {
            return Err(PeerFault::Connection { connection: call.connection });
        }
        connection.requests = connection.requests.wrapping_add(1);
        connection.bytes += u64::from(call.len);
        if PLAIN {
            let (capacity, hinted) = self.lane.slots.lend(call.slot, call.generation, call.len)?;
            // Made where they are needed: to copy what has just been written in pieces waits for every store before it,
            // those to lines of the client's among them.
            let places = || Places { payload: call.slot, count: 1, capacity, traceparent: None };
            let outcome = match self.refusal(call, hinted, bench) {
                Some(refusal) => refusal,
                None => match self.run(call, call.slot, capacity, None, bench) {
                    Some(outcome) => outcome,
                    None => return self.begin(id, ring, call, places(), bench),
                },
            };
            if bench.rest.used {
                return self.go_on(id, ring, call, places(), outcome, bench);
            }
            return self.complete_now(id, ring, call, record, outcome, bench);
        }
        self.call_with_places(id, ring, call, record, bench)
    }

    /// A call whose payload or answer may lie elsewhere than in the slot that names it, or that has more frames.
    #[inline(never)]
    fn call_with_places<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        record: u8,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let leased = call.flags & flag::LEASED != 0;
        let in_slot = if leased { 0 } else { call.len };
        let (_, hinted) = self.lane.slots.lend(call.slot, call.generation, in_slot)?;
        if leased && self.lane.leases.is_gone(call.lease_epoch) {
            // Its memory was taken while its entry was under way: not executed.
            return self.complete_now(id, ring, call, record, Outcome::of(Status::TakenBack, 0), bench);
        }
        self.leases.used |= leased;
        let mut places = self.lend_places(call, leased)?;
        if call.meta_len != 0 {
            places.traceparent = self.traceparent(call, places, bench)?;
        }
        let more = call.flags & flag::MORE != 0;
        let outcome = match self.refusal(call, hinted, bench) {
            Some(refusal) => refusal,
            None if more => return self.begin(id, ring, call, places, bench),
            None => match self.run(call, places.payload, places.capacity, places.traceparent.as_ref(), bench)
            {
                Some(outcome) => outcome,
                None => return self.begin(id, ring, call, places, bench),
            },
        };
        if bench.rest.used {
            return self.go_on(id, ring, call, places, outcome, bench);
        }
        self.give_back_places(call, places);
        self.complete_now(id, ring, call, record, outcome, bench)
    }

    /// Ends a call within its turn, and counts it.
    #[inline(always)]
    fn complete_now<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        record: u8,
        outcome: Outcome,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        count(bench, call, &outcome);
        let ended =
            Ended { record, connection: call.connection, session: id, sent: outcome.len as u64, calls: 1 };
        let (status, sent) = (outcome.status as u8, outcome.len as u64);
        self.complete(ring, call, outcome)?;
        if bench.timing.ended(ended) {
            let began_ns = bench.timing.last_ns();
            bench.count_times();
            if call.connection == bench.trace.connection() {
                bench.note_traced(id, call, began_ns, status, sent);
            }
        }
        Ok(())
    }

    /// Lends the window of a call and the slot of its payload.
    fn lend_places(&mut self, call: &Submission, leased: bool) -> Result<Places, PeerFault> {
        let (first, count) = (call.response_slot, u32::from(call.response_count));
        if !leased && self.lane.leases.is_leased(first) {
            return Err(PeerFault::Slot { slot: first });
        }
        let capacity = self.lane.capacity(first)?;
        let stride = capacity / SLOT_SMALL as u32;
        for i in 0..count {
            let slot = i.checked_mul(stride).and_then(|off| first.checked_add(off));
            let slot = slot.ok_or(PeerFault::Slot { slot: first })?;
            let own = slot == call.slot && count == 1;
            if !own && self.lane.lend_payload(slot)? != capacity {
                return Err(PeerFault::Slot { slot });
            }
        }
        let payload = if leased { call.payload_slot } else { call.slot };
        if payload != call.slot {
            let shared = payload == first && count == 1 && call.flags & flag::END != 0;
            let holds = if shared { capacity } else { self.lane.lend_payload(payload)? };
            if call.len > holds {
                return Err(PeerFault::Length { len: call.len, slot: payload, capacity: holds });
            }
        } else if call.len > self.lane.slots.capacity(payload)? {
            let capacity = self.lane.slots.capacity(payload)?;
            return Err(PeerFault::Length { len: call.len, slot: payload, capacity });
        }
        Ok(Places { payload, count, capacity, traceparent: None })
    }

    /// What the metadata of a call says of its trace.
    #[cold]
    fn traceparent<S>(
        &self,
        call: &Submission,
        places: Places,
        bench: &mut Bench<'_, S>,
    ) -> Result<Option<TraceParent>, PeerFault> {
        // Copied once, as the body is: what is judged is what is used (S3, F15).
        let block = bench.staging.take(call.meta_len.into());
        self.lane.common.payload.read(LaneLayout::slot_offset(places.payload), block);
        TraceParent::in_block(block)
    }

    pub(super) fn give_back_places(&mut self, call: &Submission, places: Places) {
        let stride = places.capacity / SLOT_SMALL as u32;
        for slot in (0..places.count).map(|i| call.response_slot + i * stride).chain([places.payload]) {
            if slot != call.slot {
                self.lane.give_back_payload(slot);
            }
        }
    }

    /// Why a call must not be started, if so.
    #[inline(always)]
    fn refusal<S>(&self, call: &Submission, hinted: bool, bench: &mut Bench<'_, S>) -> Option<Outcome> {
        // What has come in one frame need not have been announced.
        let body = u64::from(call.len.saturating_sub(u32::from(call.meta_len)));
        if call.body_len.max(body) > bench.message_max as u64 {
            return Some(Outcome::of(Status::TooLarge, bench.message_max as u64));
        }
        if hinted && self.word_of(call.slot, call.generation).is_some_and(|word| word.cancelled) {
            return Some(Outcome::of(Status::Cancelled, 0));
        }
        if call.deadline != 0 && (bench.now_ns)() >= call.deadline {
            return Some(Outcome::of(Status::DeadlineExceeded, 0));
        }
        None
    }

    /// Copies the request, runs its handler, and says how that went. `None` if there is no handler for whole requests:
    /// the call is one for [`SessionLane::begin`].
    #[inline(always)]
    fn run<S>(
        &mut self,
        call: &Submission,
        payload_slot: u32,
        capacity: u32,
        traceparent: Option<&TraceParent>,
        bench: &mut Bench<'_, S>,
    ) -> Option<Outcome> {
        let message_type = MessageType(call.message_type);
        let Some(Entry { whole: Some(handler), .. }) = bench.handlers.get(message_type.0 as usize) else {
            return None;
        };
        let payload = &self.lane.common.payload;
        // Copied once: from here on the client can change the slot but not the request (S3, F15).
        let request = bench.staging.take(call.len as usize);
        payload.read(LaneLayout::slot_offset(payload_slot), request);
        kill_point!("server.request.staged");
        let request = &request[call.meta_len as usize..];
        let offset = LaneLayout::slot_offset(call.response_slot);
        let capacity = (capacity as usize).min(bench.message_max);
        let mut reply = Reply::new(payload, offset, capacity, 0, bench.rest);
        let context = Context {
            state: bench.state,
            metrics: bench.metrics,
            totals: bench.totals,
            message_type,
            connection: call.connection,
            codec: call.codec,
            traceparent,
        };
        bench.pulse.runs(message_type.0);
        // A handler owns nothing of ours that its unwinding could leave half done (F43).
        let result = catch_unwind(AssertUnwindSafe(|| handler(&context, request, &mut reply)));
        kill_point!("server.handler.returned");
        if let Ok(Ok(())) = result
            && !reply.is_too_large()
        {
            return Some(Outcome { status: Status::Ok, len: reply.in_slot(), detail: 0 });
        }
        Some(failure(result, &mut reply, bench.message_max))
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
                kill_point!("server.connection.opened");
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
        kill_point!("server.connection.closed");
        if self.further > 0 {
            (bench.announce)(id, Notice::Closed { number: entry.connection });
        }
        bench.metrics.connections_open = bench.connections.open_count().into();
        self.complete(ring, entry, Outcome::of(Status::Ok, 0))
    }

    /// The first entry of a connection on this lane (P6). The home reactor announced the connection before the
    /// client could know of it, so one that is still unknown after a look at the inbox is not open any more, which the
    /// client may have seen to on its home lane meanwhile. No call on it can follow.
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
        match bench.connections.attach(id, entry.connection, entry.codec, bulk) {
            Attached::Usable | Attached::NotOpen if bulk == (ring == BULK) => Ok(()),
            _ => Err(PeerFault::Connection { connection: entry.connection }),
        }
    }

    /// Asks for leased slots: answered when there is memory for them.
    fn lease<S>(
        &mut self,
        id: u32,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let (bytes, slots) = (entry.len, u32::from(entry.response_count));
        check_control(&Submission { len: 0, response_count: 0, ..*entry }, 0)?;
        let class = bytes as usize == SLOT_MEDIUM || bytes as usize == SLOT_LARGE;
        if entry.connection != 0 || entry.codec != 0 {
            return Err(PeerFault::Reserved { word: 1, value: entry.connection.into() });
        }
        if !class || !(1..=LEASE_SLOTS_MAX).contains(&slots) {
            return Err(PeerFault::Reserved { word: 3, value: bytes.into() });
        }
        let (_, hinted) = self.lane.slots.lend(entry.slot, entry.generation, 0)?;
        if hinted && self.word_of(entry.slot, entry.generation).is_some_and(|word| word.cancelled) {
            return self.complete(ring, entry, Outcome::of(Status::Cancelled, 0));
        }
        self.reserve_terminal(ring);
        let (slot, generation) = (entry.slot, entry.generation);
        bench.leases.wish(Wish { seat: id, ring, slot, generation, bytes, slots });
        Ok(())
    }

    /// Gives a lease back: answered once its memory has gone.
    fn give_back_lease<S>(
        &mut self,
        id: u32,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        check_control(&Submission { payload_slot: 0, lease_epoch: 0, ..*entry }, flag::LEASED)?;
        self.lane.slots.lend(entry.slot, entry.generation, 0)?;
        let given = self.lane.leases.give_back(entry.payload_slot, entry.lease_epoch)?;
        let Some(lease) = given else { return self.complete(ring, entry, Outcome::of(Status::Ok, 0)) };
        self.reserve_terminal(ring);
        let (slot, generation) = (entry.slot, entry.generation);
        bench.leases.give_back(Giving { seat: id, ring, slot, generation, lease });
        Ok(())
    }

    /// Space for the completion of a call that is answered later.
    pub(super) fn reserve_terminal(&mut self, ring: usize) {
        self.admitted[ring] -= 1;
    }

    /// A call whose completion's space was reserved is about to be answered.
    pub(super) fn use_terminal(&mut self, ring: usize) {
        self.admitted[ring] += 1;
    }

    /// Answers a LEASE or RETURN.
    pub(super) fn answer_control(
        &mut self,
        ring: usize,
        slot: u32,
        generation: u32,
        status: Status,
        detail: u64,
    ) -> Result<(), PeerFault> {
        self.use_terminal(ring);
        self.lane.slots.give_back(slot);
        let completion = Completion {
            kind: kind::REPLY,
            status: status as u8,
            flags: flag::END,
            slot,
            generation,
            frame: self.lane.leases.epoch(),
            detail,
            ..Completion::default()
        };
        self.push(ring, &completion)
    }

    /// Frames that may go into a completion ring now: what neither consumed completions nor reserved ones take, nor those
    /// of entries that have been taken from the ring and are still to be run.
    pub(super) fn frames_free(&mut self, ring: usize) -> Result<u64, PeerFault> {
        let reserved = self.admitted_most - self.admitted[ring] + self.behind;
        let completions = &mut self.lane.completions[ring];
        let most = completions.capacity() - reserved;
        if completions.outstanding() >= most {
            completions.refresh()?;
        }
        Ok(most.saturating_sub(completions.outstanding()))
    }

    /// Entries or exchanges wait because the completion ring is full.
    pub(super) fn starve(&mut self, ring: usize) {
        self.starved[ring] = true;
    }

    /// Publishes a completion for which there is space.
    pub(super) fn push(&mut self, ring: usize, completion: &Completion) -> Result<(), PeerFault> {
        if self.lane.completions[ring].push(completion.pack())? {
            kill_point!("server.completion.published");
            return Ok(());
        }
        // Excluded by admission: should it ever happen, this session ends and no other notices (F47).
        let (oldest, newest) = (self.lane.completions[ring].passed(), self.lane.completions[ring].next());
        Err(PeerFault::Position { theirs: oldest as u32, oldest: oldest as u32, newest: newest as u32 })
    }

    /// Ends a call: its slot is the client's again, its terminal completion is published.
    #[inline(always)]
    pub(super) fn complete(
        &mut self,
        ring: usize,
        call: &Submission,
        outcome: Outcome,
    ) -> Result<(), PeerFault> {
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
        self.push(ring, &completion)
    }
}

/// Counts a call that has ended within its turn.
#[inline(always)]
fn count<S>(bench: &mut Bench<'_, S>, call: &Submission, outcome: &Outcome) {
    bench.metrics.bytes_in += u64::from(call.len);
    bench.metrics.bytes_out += outcome.len as u64;
    bench.metrics.count_call(outcome.status);
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
    if call.response_count == 0 {
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
        entry.payload_slot.into(),
        entry.lease_epoch.into(),
    ];
    match numbers.iter().find(|n| **n != 0) {
        Some(value) => Err(PeerFault::Reserved { word: 1, value: *value }),
        None => Ok(()),
    }
}

/// Turns a handler's failure into a status and, where there is one, a text for the caller.
#[cold]
pub(super) fn failure<T>(
    result: std::thread::Result<Result<T, HandlerError>>,
    reply: &mut Reply<'_>,
    message_max: usize,
) -> Outcome {
    let error = match result {
        _ if reply.is_too_large() => HandlerError::TooLarge,
        Err(_) => {
            reply.clear();
            return Outcome::of(Status::HandlerPanic, 0);
        }
        Ok(Ok(_)) => HandlerError::TooLarge,
        Ok(Err(error)) => error,
    };
    reply.clear();
    if error.status() == Status::TooLarge {
        return Outcome::of(Status::TooLarge, message_max as u64);
    }
    let text = error.to_string();
    let mut len = text.len().min(reply.capacity());
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    // Cannot fail: the text was cut to the capacity.
    let written = reply.write(&text.as_bytes()[..len]);
    debug_assert!(written.is_ok());
    Outcome { status: error.status(), len: reply.in_slot(), detail: 0 }
}

//! Calls of several frames, from the client's side: sending a body, taking an answer that comes in frames, and the
//! memory for both.
//!
//! Rule:   a call of several frames takes the slot that names it first, and its window of answer slots before it
//!         begins; both in one go, and never the last free base slot (P3). Leased slots only widen its windows: it waits
//!         for them a little, and then begins on base slots. So a session always gets on, whoever has the memory. While
//!         others of its lane have all leases it waits as long as base slots would cost it.
//! Order:  such calls of a lane begin in the order in which they were submitted.

use super::call::{CallId, CallOptions, SlotWriter};
use super::lane::{Answered, BODY, Lane, Outcome, Piece};
use super::session::{Session, Target};
use crate::error::{IpcError, Result};
use crate::machine;
use crate::protocol::{MessageType, TraceParent};
use doorbell_shm::PeerFault;
use doorbell_shm::bell::Published;
use doorbell_shm::entry::{Status, Submission, flag, kind};
use doorbell_shm::kill_point;
use doorbell_shm::layout::{LaneLayout, SLOT_LARGE, SLOT_MEDIUM, SLOT_SMALL};
use doorbell_shm::lease::Run;
use doorbell_shm::slots::{ClientWord, Grant, ServerWord};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Slots of each window that a long body gets at most.
const WINDOW: u32 = 4;
/// How long a call waits for a lease before it begins on base slots.
const LEASE_PATIENCE: Duration = Duration::from_millis(5);
/// Of a request so long, base slots cost about [`LEASE_PATIENCE`] more than leased ones.
const LEN_OF_PATIENCE: u64 = 1 << 20;

/// How far a call of several frames has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It has its name only.
    Queued {
        since: Instant,
        /// When it begins without leases; `None` while it waits for something else than time.
        until: Option<Instant>,
    },
    /// Its first entry has been published.
    Begun,
    /// Its last completion has been taken.
    Ended,
}

/// Slots next to each other, or the one that names the call.
#[derive(Debug, Clone, Copy)]
struct Window {
    first: u32,
    count: u32,
    capacity: u32,
    /// Epoch of its lease; `None` of base slots.
    epoch: Option<u32>,
}

impl Window {
    fn of_run(run: Run) -> Self {
        Self { first: run.first, count: run.count, capacity: run.bytes, epoch: Some(run.epoch) }
    }

    fn of_slot(slot: u32, capacity: u32) -> Self {
        Self { first: slot, count: 1, capacity, epoch: None }
    }

    fn slots(&self) -> impl Iterator<Item = u32> + use<> {
        let (first, stride) = (self.first, self.capacity / SLOT_SMALL as u32);
        (0..self.count).map(move |i| first + i * stride)
    }

    fn slot(&self, frame: u32) -> u32 {
        self.first + frame % self.count * (self.capacity / SLOT_SMALL as u32)
    }
}

/// A call of several frames.
#[derive(Debug)]
pub(super) struct Body {
    lane: u32,
    name: Grant,
    target: Target,
    /// What its first entry says, but for slots and flags.
    entry: Submission,
    traceparent: Option<TraceParent>,
    tag: u64,
    stage: Stage,
    /// Bytes of the whole request, where they are known.
    total: Option<u64>,
    /// Bytes of the answer that are expected.
    reply: usize,
    /// The request, of a caller who has given all of it at once.
    owned: Option<Vec<u8>>,
    sent: u64,
    next_frame: u32,
    /// The last frame is to be sent, or has been.
    finishing: bool,
    finished: bool,
    /// Where frames of the request go.
    requests: Option<Window>,
    free: VecDeque<u32>,
    /// Slots of frames that have been sent and not taken, oldest first.
    untaken: VecDeque<u32>,
    taken: u32,
    answers: Option<Window>,
    /// Frames of the answer that have come, and that have been done with.
    received: u32,
    released: u32,
    /// Frames behind those, bit 0 the first of them, that have been done with out of order.
    done: u64,
    /// The answer is handed out frame by frame.
    pieces: bool,
    assembled: Vec<u8>,
    /// Memory of the answer was taken before it was read.
    lost: bool,
    /// Nobody waits for it.
    orphaned: bool,
    cancelled: bool,
    /// It has got room, and its caller may not know.
    has_news: bool,
    /// The same, while its caller waits for something else.
    news_later: bool,
}

/// The calls of several frames of a session.
#[derive(Debug, Default)]
pub(super) struct Bodies {
    all: Vec<Option<Box<Body>>>,
    /// Those that have not begun, in order.
    queued: VecDeque<u32>,
    /// Those that have something to send, or wait to.
    sending: Vec<u32>,
}

impl Bodies {
    /// The session has ended: forgets a body; returns its tag, unless nobody waits for it.
    pub fn lose(&mut self, index: u32) -> Option<u64> {
        self.queued.retain(|other| *other != index);
        self.sending.retain(|other| *other != index);
        let body = self.all.get_mut(index as usize).and_then(Option::take)?;
        (!body.orphaned).then_some(body.tag)
    }

    /// How they stand.
    #[cfg(test)]
    pub fn describe(&self) -> String {
        let of = |body: &Body| {
            let (owned, free, untaken) = (body.owned.is_some(), body.free.len(), body.untaken.len());
            let (answers, requests) = (body.answers.map(|w| w.first), body.requests.map(|w| w.first));
            let Body { name, stage, sent, taken, finishing, finished, received, released, cancelled, .. } =
                body;
            format!(
                "{}: {stage:?} owned {owned} sent {sent} free {free} untaken {untaken} taken {taken} {finishing} {finished} \
                 received {received} released {released} cancelled {cancelled} windows {answers:?} {requests:?}",
                name.slot
            )
        };
        let all: Vec<String> = self.all.iter().flatten().map(|body| of(body)).collect();
        format!("queued {:?} sending {:?} {all:?}", self.queued, self.sending)
    }

    /// Whether anything is to be done for any of them without being asked.
    #[inline(always)]
    pub fn are_active(&self) -> bool {
        !self.sending.is_empty() || !self.queued.is_empty()
    }

    /// Whether calls of this connection have not begun: the server knows nothing of them yet.
    pub fn wait_to_begin(&self, connection: u32) -> bool {
        let body = |index: &u32| self.all.get(*index as usize).and_then(Option::as_ref);
        self.queued.iter().filter_map(body).any(|body| body.target.connection == connection)
    }

    /// Whether there are any.
    pub fn exist(&self) -> bool {
        self.all.iter().any(Option::is_some)
    }

    /// Whether a caller can send more of a request than when this was last asked.
    pub fn take_news(&mut self) -> bool {
        let mut news = false;
        for index in &self.sending {
            if let Some(body) = self.all[*index as usize].as_deref_mut() {
                news |= std::mem::take(&mut body.has_news);
            }
        }
        news
    }

    /// The caller waits for something else than room: news of that wakes nobody until they are [told](Bodies::tell_news)
    /// again.
    pub fn keep_news(&mut self) {
        for index in &self.sending {
            if let Some(body) = self.all[*index as usize].as_deref_mut() {
                body.news_later |= std::mem::take(&mut body.has_news);
            }
        }
    }

    /// The caller has what he waited for.
    pub fn tell_news(&mut self) {
        for body in self.all.iter_mut().flatten() {
            body.has_news |= std::mem::take(&mut body.news_later);
        }
    }

    fn get(&mut self, index: u32) -> Option<&mut Body> {
        self.all.get_mut(index as usize)?.as_deref_mut()
    }

    /// Calls that have been begun or queued on a lane and have not ended.
    fn begun_on(&self, lane: u32) -> bool {
        self.all.iter().flatten().any(|body| body.lane == lane && body.stage == Stage::Begun)
    }

    /// Calls of a lane that have frames of their requests to send.
    fn sending_on(&self, lane: u32) -> usize {
        let body = |index: &u32| self.all[*index as usize].as_deref();
        let sends = |body: &&Body| body.lane == lane && body.stage == Stage::Begun && !body.finished;
        self.sending.iter().filter_map(body).filter(sends).count()
    }

    /// An index that is not in use.
    fn vacancy(&mut self) -> u32 {
        match self.all.iter().position(Option::is_none) {
            Some(index) => index as u32,
            None => {
                self.all.push(None);
                self.all.len() as u32 - 1
            }
        }
    }
}

impl Session {
    /// A call that no base slot is large enough for, or no two of them where it takes two: in a leased slot if there is one,
    /// else as a body of frames.
    #[cold]
    pub(super) fn submit_long(
        &mut self,
        target: Target,
        message_type: MessageType,
        capacity: usize,
        options: &CallOptions,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<CallId> {
        if capacity > self.max_message {
            return Err(IpcError::MessageTooLarge(self.max_message));
        }
        let (index, flags) = match self.routes {
            None => (0, 0),
            Some(_) => self.choose_lane(target)?,
        };
        let meta_len = options.meta_len();
        let wanted = capacity.saturating_add(meta_len).max(options.reply_capacity);
        let in_one_slot = !options.idempotent && !options.pieces;
        if wanted <= SLOT_LARGE && in_one_slot && !self.bodies.are_active() {
            let offset = self.clock_offset_ns;
            let lane = self.lane_mut(index);
            let name = lane.lane.slots.take(0);
            let run = name.and_then(|_| lane.take_run(wanted, 1));
            if let (Some(name), Some(run)) = (name, run) {
                let mut writer = lane.writer_at(run.first, run.bytes as usize);
                let written = writer.write_metadata(options).and_then(|()| write(&mut writer));
                let len = writer.len;
                let mut entry = call_entry(target, message_type, flags | flag::END | flag::LEASED);
                (entry.slot, entry.generation) = (name.slot, name.generation);
                (entry.len, entry.body_len) = (len as u32, len.saturating_sub(meta_len) as u64);
                add_metadata(&mut entry, meta_len);
                (entry.response_slot, entry.payload_slot, entry.lease_epoch) =
                    (run.first, run.first, run.epoch);
                super::session::add_deadline(&mut entry, options, offset);
                if let Err(error) = written {
                    lane.lane.slots.put_back(name.slot);
                    lane.put_back(run.first);
                    return Err(error);
                }
                let id = lane.send(name, &entry, options.tag, target.bulk)?;
                if let Some(routes) = &mut self.routes {
                    routes.started(target.connection);
                }
                return Ok(id);
            }
            if let Some(name) = name {
                lane.lane.slots.put_back(name.slot);
            }
        }
        let mut owned = Vec::with_capacity(capacity);
        write(&mut SlotWriter::owned(&mut owned, capacity, self.payload(0)))?;
        let index = self.queue_body(index, flags, target, message_type, Some(owned.len() as u64), options)?;
        let Some(body) = self.bodies.get(index) else { return Err(IpcError::WouldBlock) };
        (body.owned, body.finishing) = (Some(owned), true);
        let id = body.id();
        self.pump()?;
        Ok(id)
    }

    /// A call whose request fits a base slot, and whose answer is handed out frame by frame: the frames come in that very
    /// slot, one at a time, so that a stream takes no more memory than any other call. Never in the last free one.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "what `submit` has found out already")]
    pub(super) fn submit_in_pieces(
        &mut self,
        lane_index: u32,
        flags: u16,
        target: Target,
        message_type: MessageType,
        capacity: usize,
        options: &CallOptions,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<CallId> {
        let offset = self.clock_offset_ns;
        let meta_len = options.meta_len();
        let lane = self.lane_mut(lane_index);
        if lane.base_slots() < 2 {
            return Err(too_few_slots("a session with a single slot carries no answers frame by frame"));
        }
        if lane.lane.slots.free() < 2 || !lane.has_entry(target.bulk)? {
            return Err(IpcError::WouldBlock);
        }
        let Some(name) = lane.lane.slots.take((capacity + meta_len).max(options.reply_capacity)) else {
            return Err(IpcError::WouldBlock);
        };
        let mut writer = lane.writer(&name);
        if let Err(error) = writer.write_metadata(options).and_then(|()| write(&mut writer)) {
            lane.lane.slots.put_back(name.slot);
            return Err(error);
        }
        let mut entry = call_entry(target, message_type, flags | flag::END);
        (entry.slot, entry.generation, entry.response_slot) = (name.slot, name.generation, name.slot);
        (entry.len, entry.body_len) = (writer.len as u32, (writer.len - meta_len) as u64);
        add_metadata(&mut entry, meta_len);
        super::session::add_deadline(&mut entry, options, offset);
        let index = self.bodies.vacancy();
        let mut body = Body::new(lane_index, name, target, entry, Some(entry.body_len), options);
        (body.stage, body.finishing, body.finished) = (Stage::Begun, true, true);
        body.answers = Some(Window::of_slot(name.slot, name.capacity));
        let id = body.id();
        let lane = self.lane_mut(lane_index);
        lane.hold_name(name, index, target.connection, target.bulk);
        // There is room: that was asked for before anything was written.
        lane.send_body(name, &entry, target.bulk)?;
        self.bodies.all[index as usize] = Some(Box::new(body));
        if let Some(routes) = &mut self.routes {
            routes.started(target.connection);
        }
        Ok(id)
    }

    /// Begins a call whose request the caller sends piece by piece.
    pub(super) fn start_body(
        &mut self,
        target: Target,
        message_type: MessageType,
        total: Option<u64>,
        options: &CallOptions,
    ) -> Result<CallId> {
        if self.end.is_some() {
            return Err(self.ended());
        }
        if total.is_some_and(|total| total > self.max_message as u64) {
            return Err(IpcError::MessageTooLarge(self.max_message));
        }
        let (index, flags) = match self.routes {
            None => (0, 0),
            Some(_) => self.choose_lane(target)?,
        };
        let index = self.queue_body(index, flags, target, message_type, total, options)?;
        let Some(body) = self.bodies.get(index) else { return Err(IpcError::WouldBlock) };
        let id = body.id();
        self.pump()?;
        Ok(id)
    }

    /// Takes a name for a body and puts it at the end of the queue.
    fn queue_body(
        &mut self,
        lane_index: u32,
        flags: u16,
        target: Target,
        message_type: MessageType,
        total: Option<u64>,
        options: &CallOptions,
    ) -> Result<u32> {
        // Together with its answer slot, which the first of those that wait must find, and the last one.
        let needed = if self.bodies.begun_on(lane_index) { 2 } else { 3 };
        let offset = self.clock_offset_ns;
        let lane = self.lane_mut(lane_index);
        if lane.base_slots() < 3 {
            return Err(too_few_slots(if options.idempotent && !options.pieces {
                "an idempotent call takes a slot for its request and another one for its answer, or three to go in frames"
            } else {
                "a session with fewer than three slots carries no calls of several frames"
            }));
        }
        if lane.lane.slots.free() < needed {
            return Err(IpcError::WouldBlock);
        }
        let Some(name) = lane.lane.slots.take(0) else { return Err(IpcError::WouldBlock) };
        let mut entry = call_entry(target, message_type, flags);
        (entry.slot, entry.generation) = (name.slot, name.generation);
        entry.body_len = total.unwrap_or(0);
        if options.idempotent {
            entry.flags |= flag::IDEMPOTENT;
        }
        super::session::add_deadline(&mut entry, options, offset);
        let index = self.bodies.vacancy();
        let body = Body::new(lane_index, name, target, entry, total, options);
        self.bodies.all[index as usize] = Some(Box::new(body));
        self.lane_mut(lane_index).hold_name(name, index, target.connection, target.bulk);
        self.bodies.queued.push_back(index);
        if let Some(routes) = &mut self.routes {
            routes.started(target.connection);
        }
        Ok(index)
    }

    /// Does what can be done for bodies: begins those whose turn it is, sends what there is room for, asks for leases
    /// and gives back those that are void.
    #[cold]
    pub(super) fn pump(&mut self) -> Result<()> {
        if self.end.is_some() {
            return Ok(());
        }
        let mut blocked = 0u64;
        let mut at = 0;
        while let Some(index) = self.bodies.queued.get(at).copied() {
            let Some(body) = self.bodies.all[index as usize].as_deref() else { break };
            let lane = body.lane;
            if blocked & 1 << lane == 0 && self.begin_body(index)? {
                self.bodies.queued.remove(at);
                self.bodies.sending.push(index);
            } else {
                // Those behind it on its lane wait for their turn.
                blocked |= 1 << lane;
                at += 1;
            }
        }
        let mut at = 0;
        while let Some(index) = self.bodies.sending.get(at).copied() {
            let body = self.bodies.all[index as usize].as_deref();
            if body.is_some_and(|body| !body.can_move(self.lane(body.lane))) {
                at += 1;
                continue;
            }
            if self.send_owned(index)? {
                self.bodies.sending.swap_remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    /// Begins a body if it can have its windows; says whether it did.
    fn begin_body(&mut self, index: u32) -> Result<bool> {
        let now = machine::now();
        let Some(mut body) = self.bodies.all[index as usize].take() else { return Ok(true) };
        let begun = self.begin_with_windows(&mut body, now);
        if let Stage::Queued { until, .. } = &mut body.stage {
            // It has had its turn: from here on it waits for room in the ring, not for the clock.
            *until = until.filter(|at| *at > now);
        }
        self.bodies.all[index as usize] = Some(body);
        begun
    }

    fn begin_with_windows(&mut self, body: &mut Body, now: Instant) -> Result<bool> {
        let Stage::Queued { since, .. } = body.stage else { return Ok(true) };
        let (begun, sending) = (self.bodies.begun_on(body.lane), self.bodies.sending_on(body.lane));
        let lane = self.lane_mut(body.lane);
        // A ring is read while there is room for another call's answer: as many calls as that would wait for their own
        // frames for ever.
        if sending > 0 && sending + 1 >= lane.admits() as usize && !body.cancelled {
            return Ok(false);
        }
        // Whoever begins next finds his answer slot and the last one, unless others are under way that will end.
        let spare = if begun { 1 } else { 2 };
        if body.cancelled {
            // It begins to be answered as cancelled: its slot's generation has to pass.
            return body.begin(lane, Window::of_slot(body.name.slot, body.name.capacity), None);
        }
        let (class, slots_in, slots_out) = body.wishes();
        let run = lane.take_run(class, slots_out);
        if let Some(run) = run {
            let mut answers = Window::of_run(run);
            let mut requests = lane.take_run(class, slots_in).map(Window::of_run);
            if requests.is_none() && answers.count > 1 {
                // One of each is better than many of one.
                answers.count -= 1;
                let first = run.first + answers.count * (run.bytes / SLOT_SMALL as u32);
                requests = Some(Window { first, count: 1, ..answers });
            }
            return body.begin(lane, answers, requests);
        }
        let may_ask = lane.wish_for(class, slots_in + slots_out, spare, now)?;
        let until = since + body.patience(may_ask, lane.lane.leases.in_use());
        let waits = now < until;
        // One that cannot begin for want of base slots waits for completions.
        body.stage = Stage::Queued { since, until: waits.then_some(until) };
        if waits || lane.lane.slots.free() < 2 {
            return Ok(false);
        }
        let Some(answer) = lane.lane.slots.take(0) else { return Ok(false) };
        body.begin(lane, Window::of_slot(answer.slot, answer.capacity), None)
    }

    /// Sends of a request that the session has what there is room for; says whether the body needs no more attention.
    fn send_owned(&mut self, index: u32) -> Result<bool> {
        let Some(mut body) = self.bodies.all[index as usize].take() else { return Ok(true) };
        let lane = self.lane_mut(body.lane);
        let sent = body.send_what_there_is(lane);
        let done = body.finished || body.stage == Stage::Ended;
        self.bodies.all[index as usize] = Some(body);
        sent?;
        Ok(done)
    }

    /// Gives the caller room for the next frame of a request; `false` if there is none now.
    pub(super) fn send_piece(
        &mut self,
        id: CallId,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<bool> {
        let index = self.known_body(id)?;
        let Some(mut body) = self.bodies.all[index as usize].take() else { return Ok(false) };
        let lane = self.lane_mut(body.lane);
        // All that was announced has been sent: there will be no room for more.
        let is_complete = body.finished && !body.cancelled;
        let sent = if body.owned.is_some() || body.finishing || is_complete {
            Err(IpcError::BodyFinished)
        } else {
            body.send_frame(lane, write)
        };
        self.bodies.all[index as usize] = Some(body);
        sent
    }

    /// The request is complete.
    pub(super) fn finish_body(&mut self, id: CallId) -> Result<()> {
        let index = self.known_body(id)?;
        let Some(body) = self.bodies.get(index) else { return Ok(()) };
        if let Some(announced) = body.total
            && body.sent != announced
        {
            return Err(IpcError::BodyLength { announced, sent: body.sent });
        }
        body.finishing = true;
        self.pump()
    }

    fn known_body(&mut self, id: CallId) -> Result<u32> {
        if self.end.is_some() {
            return Err(self.ended());
        }
        if id.lane as usize > self.further.len() {
            return Err(IpcError::NoSuchCall);
        }
        // One that has been answered is in flight no more.
        self.lane(id.lane).body_of(id).ok_or(IpcError::NoSuchCall)
    }

    /// Whether a body can send more than when it was last looked at, or than its caller has been told.
    pub(super) fn body_has_room(&self) -> bool {
        self.bodies.sending.iter().any(|index| {
            let body = self.bodies.all[*index as usize].as_deref();
            body.is_some_and(|body| body.has_news || body.has_new_room(self.lane(body.lane)))
        })
    }

    /// When a body that waits for a lease is to begin without one: now, if that has passed since it was looked at.
    pub(super) fn body_begins_at(&self) -> Option<Instant> {
        let waits = |index: &u32| match self.bodies.all[*index as usize].as_deref()?.stage {
            Stage::Queued { until, .. } => until,
            Stage::Begun | Stage::Ended => None,
        };
        self.bodies.queued.iter().filter_map(waits).min()
    }

    /// A frame of an answer, or its end; returns what is to be handed out.
    #[cold]
    pub(super) fn body_event(&mut self, answered: Answered) -> Result<Option<Answered>> {
        let Outcome::Piece(piece) = answered.outcome else { return Ok(Some(answered)) };
        let index = match answered.response_slot {
            BODY => self.answer_becomes_body(&answered),
            index => index,
        };
        let answered = Answered { response_slot: index, ..answered };
        let Some(mut body) = self.bodies.all.get_mut(index as usize).and_then(Option::take) else {
            return Err(IpcError::ServerFault(PeerFault::Slot { slot: answered.slot }));
        };
        let lane = self.lane_mut(body.lane);
        let result = body.take(lane, piece);
        let (orphaned, pieces, last, tag) = (body.orphaned, body.pieces, piece.last, body.tag);
        let status = if body.lost { Status::TakenBack as u8 } else { piece.status };
        let outcome = Outcome::Piece(Piece { status, ..piece });
        self.bodies.all[index as usize] = Some(body);
        result?;
        if last {
            self.bodies.sending.retain(|other| *other != index);
            if orphaned {
                self.drop_body(index);
            }
            self.lane_mut(answered.lane).return_void_leases()?;
        }
        Ok((!orphaned && (pieces || last)).then_some(Answered { tag, outcome, ..answered }))
    }

    /// An answer turns out to be longer than the slot of its call.
    fn answer_becomes_body(&mut self, answered: &Answered) -> u32 {
        let index = self.bodies.vacancy();
        let (slot, generation) = (answered.slot, answered.generation);
        let lane = self.lane_mut(answered.lane);
        let (first, capacity, connection, bulk) = lane.becomes_body(slot, index);
        let epoch = lane.lane.leases.of_slot(first).map(|(epoch, _)| epoch);
        let name = Grant { slot, generation, capacity: lane.lane.slots.capacity(slot) };
        let target = Target { connection, codec: 0, bulk };
        let options = CallOptions { tag: answered.tag, ..CallOptions::default() };
        let mut body = Body::new(answered.lane, name, target, Submission::default(), None, &options);
        body.stage = Stage::Begun;
        (body.finishing, body.finished) = (true, true);
        body.answers = Some(Window { first, count: 1, capacity, epoch });
        self.bodies.all[index as usize] = Some(Box::new(body));
        index
    }

    /// Bytes of an answer, or of the frame of it that is at hand.
    pub(super) fn body_len(&self, answered: &Answered) -> usize {
        let Outcome::Piece(piece) = answered.outcome else { return 0 };
        let body = self.bodies.all.get(answered.response_slot as usize).and_then(Option::as_deref);
        match body {
            Some(body) if !body.pieces && body.is_of(answered) => body.assembled.len(),
            _ => piece.len as usize,
        }
    }

    /// Copies an answer, or the frame of it that is at hand.
    pub(super) fn read_body(&self, answered: &Answered, target: &mut [u8]) -> Result<()> {
        let Outcome::Piece(piece) = answered.outcome else { return Ok(()) };
        let body = self.bodies.all.get(answered.response_slot as usize).and_then(Option::as_deref);
        let Some(body) = body.filter(|body| body.is_of(answered)) else { return Err(IpcError::NoSuchCall) };
        if !body.pieces {
            target.copy_from_slice(&body.assembled[..target.len()]);
            return Ok(());
        }
        let (Some(window), lane) = (body.answers, self.lane(body.lane)) else { return Ok(()) };
        lane.read(window.slot(piece.frame), window.epoch, target)
    }

    /// Takes an answer that has been put together out of its record.
    pub(super) fn take_assembled(&mut self, answered: &Answered) -> Option<Vec<u8>> {
        let body = self.bodies.get(answered.response_slot)?;
        (!body.pieces).then(|| std::mem::take(&mut body.assembled))
    }

    /// The caller has done with an answer, or with one frame of it.
    #[cold]
    pub(super) fn release_body(&mut self, answered: &Answered) {
        let index = answered.response_slot;
        let (Outcome::Piece(Piece { last, frame, .. }), Some(body)) =
            (answered.outcome, self.bodies.get(index))
        else {
            return;
        };
        // The answer's end may have been dropped before this frame of it.
        if !body.is_of(answered) {
            return;
        }
        if last {
            self.drop_body(index);
            return;
        }
        let lane = body.lane;
        let Some(mut body) = self.bodies.all[index as usize].take() else { return };
        body.release_frame(self.lane_mut(lane), frame);
        self.bodies.all[index as usize] = Some(body);
    }

    /// The record of a body is not needed any more.
    pub(super) fn drop_body(&mut self, index: u32) {
        if let Some(body) = self.bodies.all.get_mut(index as usize).and_then(Option::take) {
            self.bodies.queued.retain(|other| *other != index);
            self.bodies.sending.retain(|other| *other != index);
            let lane = self.lane_mut(body.lane);
            let windows = body.answers.iter().chain(&body.requests);
            lane.put_back_window(windows.flat_map(Window::slots), body.name.slot);
            lane.free_name(body.name.slot);
        }
    }

    /// Says that the answer of a body is not wanted.
    pub(super) fn cancel_body(&mut self, index: u32, orphaned: bool) {
        let Some(mut body) = self.bodies.all.get_mut(index as usize).and_then(Option::take) else { return };
        body.orphaned |= orphaned;
        body.cancelled = true;
        if body.stage == Stage::Begun {
            body.write_word(self.lane_mut(body.lane));
        }
        self.bodies.all[index as usize] = Some(body);
    }
}

/// No waiting helps: the session has not the slots that such a call takes.
fn too_few_slots(why: &str) -> IpcError {
    IpcError::Config(format!("{why}: connect with more small_slots"))
}

/// What the entry of a call says whatever its place.
fn call_entry(target: Target, message_type: MessageType, flags: u16) -> Submission {
    Submission {
        kind: kind::CALL,
        flags,
        codec: target.codec,
        message_type: message_type.0,
        connection: target.connection,
        response_count: 1,
        ..Submission::default()
    }
}

/// So many bytes of metadata go before the request.
fn add_metadata(entry: &mut Submission, meta_len: usize) {
    if meta_len != 0 {
        entry.flags |= flag::META;
        entry.meta_len = meta_len as u16;
    }
}

impl Body {
    fn new(
        lane: u32,
        name: Grant,
        target: Target,
        entry: Submission,
        total: Option<u64>,
        options: &CallOptions,
    ) -> Self {
        let now = machine::now();
        Self {
            lane,
            name,
            target,
            entry,
            traceparent: options.traceparent,
            tag: options.tag,
            stage: Stage::Queued { since: now, until: None },
            total,
            reply: options.reply_capacity,
            owned: None,
            sent: 0,
            next_frame: 1,
            finishing: total == Some(0),
            finished: false,
            requests: None,
            free: VecDeque::new(),
            untaken: VecDeque::new(),
            taken: 0,
            answers: None,
            received: 0,
            released: 0,
            done: 0,
            pieces: options.pieces,
            assembled: Vec::new(),
            lost: false,
            orphaned: false,
            cancelled: false,
            has_news: false,
            news_later: false,
        }
    }

    /// Whether an answer is this call's.
    fn is_of(&self, answered: &Answered) -> bool {
        let name = (self.lane, self.name.slot, self.name.generation);
        name == (answered.lane, answered.slot, answered.generation)
    }

    fn id(&self) -> CallId {
        CallId { lane: self.lane, slot: self.name.slot, generation: self.name.generation }
    }

    /// The class of slot that suits it, and how many for its request and its answer.
    fn wishes(&self) -> (usize, u32, u32) {
        let request = self.total.map_or(usize::MAX, |total| total as usize);
        let answer = self.reply.max(if self.total.is_some() { request } else { 0 });
        let longest = request.max(answer);
        let class = if longest <= SLOT_MEDIUM { SLOT_MEDIUM } else { SLOT_LARGE };
        let slots = |bytes: usize| (bytes.div_ceil(class) as u32).clamp(1, WINDOW);
        (class, slots(request), slots(answer))
    }

    /// How long it waits for leased slots: for those that the server has been asked for, or for those that others of
    /// its lane use.
    fn patience(&self, asked: bool, in_use: bool) -> Duration {
        let for_server = if asked { LEASE_PATIENCE } else { Duration::ZERO };
        let for_others = match self.total {
            _ if !in_use => Duration::ZERO,
            Some(total) => {
                Duration::from_nanos(total.saturating_mul(LEASE_PATIENCE.as_nanos() as u64) / LEN_OF_PATIENCE)
            }
            None => LEASE_PATIENCE,
        };
        for_server.max(for_others)
    }

    /// Publishes the first entry, with an empty frame behind the metadata, if there is any; the windows are the call's from here on.
    fn begin(&mut self, lane: &mut Lane, answers: Window, requests: Option<Window>) -> Result<bool> {
        let mut entry = self.entry;
        let empty = self.total == Some(0) || self.cancelled;
        entry.flags |= if empty { flag::END } else { flag::MORE };
        entry.body_len = if empty { 0 } else { entry.body_len };
        if let Some(traceparent) = self.traceparent {
            let block = traceparent.to_block();
            // Any slot has room for it.
            lane.lane.common.payload.write(LaneLayout::slot_offset(self.name.slot), &block);
            entry.len = block.len() as u32;
            add_metadata(&mut entry, block.len());
        }
        entry.response_slot = answers.first;
        entry.response_count = answers.count as u16;
        if let Some(epoch) = answers.epoch {
            entry.flags |= flag::LEASED;
            (entry.payload_slot, entry.lease_epoch) = (self.name.slot, epoch);
        }
        if self.cancelled {
            // Said before it is published: it will not be started.
            self.write_word(lane);
        }
        if !lane.send_body(self.name, &entry, self.target.bulk)? {
            lane.put_back_window(answers.slots(), self.name.slot);
            lane.put_back_window(requests.iter().flat_map(Window::slots), self.name.slot);
            return Ok(false);
        }
        kill_point!("client.body.begun");
        self.stage = Stage::Begun;
        self.finished = empty;
        self.has_news = self.owned.is_none() && !self.finishing && !self.cancelled;
        self.answers = Some(answers);
        self.untaken.push_back(self.name.slot);
        if let Some(window) = requests {
            self.free.extend(window.slots());
        }
        self.requests = requests;
        Ok(true)
    }

    fn taken_word(&self, lane: &Lane) -> Option<u32> {
        let word = lane.lane.common.server_words.get(self.name.slot as usize)?;
        let word = ServerWord::read(word);
        (word.generation == self.name.generation).then_some(word.taken)
    }

    /// Whether anything can be sent that is the session's to send, or the caller can be told of new room.
    fn can_move(&self, lane: &Lane) -> bool {
        let own = self.owned.is_some() || self.finishing;
        self.stage != Stage::Begun || own && !self.free.is_empty() || self.has_new_room(lane)
    }

    fn has_new_room(&self, lane: &Lane) -> bool {
        let sends = self.stage == Stage::Begun && !self.cancelled;
        sends && self.taken_word(lane).is_some_and(|taken| taken != self.taken)
    }

    /// Slots of frames that have been taken are free again.
    fn reclaim(&mut self, lane: &Lane) -> Result<()> {
        let Some(taken) = self.taken_word(lane) else { return Ok(()) };
        let newly = taken.wrapping_sub(self.taken);
        if newly as usize > self.untaken.len() {
            let (oldest, newest) = (self.taken, self.taken.wrapping_add(self.untaken.len() as u32));
            return Err(IpcError::ServerFault(PeerFault::Position { theirs: taken, oldest, newest }));
        }
        for _ in 0..newly {
            // The slot that names the call carries frames only where there is no other.
            if let Some(slot) = self.untaken.pop_front()
                && (slot != self.name.slot || self.requests.is_none())
            {
                self.free.push_back(slot);
            }
        }
        self.has_news |= newly > 0 && self.owned.is_none() && !self.finishing && !self.cancelled;
        self.taken = taken;
        Ok(())
    }

    /// Sends one frame that `write` fills; `false` if there is no room now.
    fn send_frame(
        &mut self,
        lane: &mut Lane,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<bool> {
        if self.stage != Stage::Begun || self.finished || self.cancelled {
            return Ok(false);
        }
        self.reclaim(lane)?;
        if self.free.is_empty() || !lane.has_entry(self.target.bulk)? {
            return Ok(false);
        }
        let Some(slot) = self.free.front().copied() else { return Ok(false) };
        let window = self.requests.unwrap_or(Window::of_slot(slot, self.name.capacity));
        let left = self.total.map_or(u64::MAX, |total| total - self.sent);
        let capacity = u64::from(window.capacity).min(left) as usize;
        let mut writer = lane.writer_at(slot, capacity);
        write(&mut writer)?;
        kill_point!("client.frame.written");
        let len = writer.len as u32;
        let ends = match self.total {
            Some(total) => self.sent + u64::from(len) == total,
            None => self.finishing,
        };
        if len == 0 && !ends {
            return Ok(true);
        }
        let mut entry = Submission {
            kind: kind::FRAME,
            flags: if ends { flag::END } else { flag::MORE },
            slot: self.name.slot,
            generation: self.name.generation,
            len,
            frame: self.next_frame,
            payload_slot: slot,
            ..Submission::default()
        };
        if let Some(epoch) = window.epoch {
            entry.flags |= flag::LEASED;
            entry.lease_epoch = epoch;
        }
        if !lane.send_bare(&entry, self.target.bulk)? {
            return Ok(false);
        }
        kill_point!("client.frame.published");
        self.free.pop_front();
        self.untaken.push_back(slot);
        self.next_frame = self.next_frame.wrapping_add(1);
        self.sent += u64::from(len);
        self.finished = ends;
        Ok(true)
    }

    /// Sends what the session itself has to send: an owned request, or the end of one.
    fn send_what_there_is(&mut self, lane: &mut Lane) -> Result<()> {
        while !self.finished {
            let at = self.sent as usize;
            let sent = match self.owned.take() {
                Some(owned) => {
                    let sent = self.send_frame(lane, |writer| {
                        let part = &owned[at..];
                        writer.write(&part[..part.len().min(writer.remaining())])
                    });
                    self.owned = Some(owned);
                    sent?
                }
                None if self.finishing => self.send_frame(lane, |_| Ok(()))?,
                None => {
                    self.reclaim(lane)?;
                    false
                }
            };
            if !sent {
                break;
            }
        }
        if self.finished {
            self.owned = None;
        }
        Ok(())
    }

    /// Takes note of a frame of the answer.
    fn take(&mut self, lane: &mut Lane, piece: Piece) -> Result<()> {
        let Some(window) = self.answers else {
            return Err(IpcError::ServerFault(PeerFault::Kind { kind: kind::FRAME }));
        };
        let slot = self.name.slot;
        if piece.frame != self.received {
            let (theirs, expected) = (piece.frame, self.received);
            return Err(IpcError::ServerFault(PeerFault::Frame { slot, theirs, expected }));
        }
        if piece.len > window.capacity {
            let (len, capacity) = (piece.len, window.capacity);
            return Err(IpcError::ServerFault(PeerFault::Length { len, slot, capacity }));
        }
        if piece.last {
            self.stage = Stage::Ended;
        } else {
            self.received = self.received.wrapping_add(1);
        }
        if !self.orphaned && !self.pieces {
            let from = self.assembled.len();
            if piece.status != Status::Ok as u8 {
                // What came before is of no use; the last frame may say why.
                self.assembled.clear();
            }
            let from = from.min(self.assembled.len());
            self.assembled.resize(from + piece.len as usize, 0);
            let read = lane.read(window.slot(piece.frame), window.epoch, &mut self.assembled[from..]);
            self.lost |= matches!(read, Err(IpcError::MemoryTakenBack));
        }
        if piece.last {
            self.give_back_windows(lane);
        } else if !self.pieces && !self.orphaned {
            self.release_frame(lane, piece.frame);
        }
        Ok(())
    }

    /// The answer has ended: its memory is free, but what the caller still reads of it.
    fn give_back_windows(&mut self, lane: &mut Lane) {
        let keeps = self.pieces && !self.orphaned;
        let requests = self.requests.take();
        lane.put_back_window(requests.iter().flat_map(Window::slots), self.name.slot);
        if !keeps {
            let answers = self.answers.take();
            lane.put_back_window(answers.iter().flat_map(Window::slots), self.name.slot);
        }
    }

    /// A frame has been done with. The server may write again what is done with from the oldest on.
    fn release_frame(&mut self, lane: &mut Lane, frame: u32) {
        self.done |= 1u64.checked_shl(frame.wrapping_sub(self.released)).unwrap_or(0);
        let newly = self.done.trailing_ones();
        self.done = self.done.checked_shr(newly).unwrap_or(0);
        self.released = self.released.wrapping_add(newly);
        if newly > 0 && self.stage == Stage::Begun {
            self.write_word(lane);
        }
    }

    /// Says in the slot's word what is wanted of the answer, and hints at it (P4). Needs no entry.
    fn write_word(&self, lane: &mut Lane) {
        let word = ClientWord {
            generation: self.name.generation,
            cancelled: self.cancelled,
            released: self.released & (u32::MAX >> 1),
        };
        if let Some(shared) = lane.lane.common.client_words.get(self.name.slot as usize) {
            // Published by the Release of the hint.
            shared.store(word.pack(), Relaxed);
            kill_point!("client.credit.written");
            lane.lane.common.hints.set(self.name.slot);
            kill_point!("client.credit.hinted");
            lane.unrung = Some(Published::Submissions);
        }
    }
}

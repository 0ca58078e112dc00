//! The client's half of a session: its lanes, and which of them a call takes. One thread at a time, by type.

use super::body::Bodies;
use super::call::{CallId, CallOptions, SlotWriter};
use super::classify::Witness;
use super::doorbell::Doorbell;
use super::lane::{Answered, Lane, NO_CONNECTION, Outcome, Plain};
use super::route::Routes;
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::handshake::{DisconnectReason, LaneGrant};
use crate::protocol::rendezvous::monotonic_ns;
use doorbell_shm::bell::fence_before_bell;
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::{Submission, flag, kind};
use doorbell_shm::kill_point;
use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
use doorbell_shm::layout::{LaneLayout, state};
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::{Grant, SlotAllocator};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// Empty polls between two looks at the clock, for those who never wait.
const POLLS_PER_LOOK: u32 = 256;
/// Polls between two looks at calls of several frames, for those whose polls find something each time.
const POLLS_PER_PUMP: u32 = 16;

/// Where a call goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub connection: u32,
    pub codec: u8,
    pub bulk: bool,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The server said why.
    Told(DisconnectReason),
    /// The socket broke.
    Died,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) home: Lane,
    /// Lanes 1, 2 and so on.
    pub(super) further: Vec<Lane>,
    pub(super) segment: Segment,
    pub(super) socket: Arc<OwnedFd>,
    memory: OwnedFd,
    pub(super) policy: WaitPolicy,
    /// Which lane each connection uses; `None` while all use the home lane for good.
    pub(super) routes: Option<Box<Routes>>,
    /// The core that no work of the server's is to be brought to, where that can be avoided.
    pub(super) avoided: Option<u32>,
    /// Waits for which the core counts as crowded: callers sleep there and do not yield.
    pub(super) crowded: u32,
    /// Calls of several frames.
    pub(super) bodies: Bodies,
    /// Longest request, bytes.
    pub(super) max_message: usize,
    /// Calls answered while somebody waited for another one.
    kept: VecDeque<Answered>,
    /// Polls while there are calls of several frames to go on with.
    polls: u32,
    /// Polls that found nothing, and when one of them last looked at the socket.
    empty_polls: u32,
    pub(super) looked_at: Option<Instant>,
    /// Connections to close as soon as a slot is free and nothing of theirs is in flight on another lane.
    closing: Vec<(u32, bool)>,
    pub(super) end: Option<End>,
    pub(super) clock_offset_ns: u64,
    /// The server's reactors sleep on sockets.
    rings_sockets: bool,
}

/// What the handshake came to.
pub(super) struct Joined {
    pub segment: Segment,
    pub socket: OwnedFd,
    pub memory: OwnedFd,
    pub clock_offset_ns: u64,
    /// Core of the home lane's reactor.
    pub home_core: u32,
    /// Reactors of the server.
    pub reactors: u32,
    /// Longest message, bytes.
    pub max_message: u64,
    pub policy: WaitPolicy,
    /// The server's reactors sleep on sockets.
    pub rings_sockets: bool,
}

impl Session {
    pub fn new(joined: Joined) -> Result<Self> {
        let Joined { segment, socket, memory, clock_offset_ns, home_core, reactors, .. } = joined;
        let (max_message, policy, rings_sockets) = (joined.max_message, joined.policy, joined.rings_sockets);
        let socket = Arc::new(socket);
        let doorbell = if rings_sockets { Doorbell::Socket(Arc::clone(&socket)) } else { Doorbell::Futex };
        let geometry = *segment.geometry();
        let lane = ClientLane::open(segment.mapping(), &geometry, &LaneLayout::home(&geometry))?;
        let home = Lane::new(lane, geometry, 0, home_core, doorbell);
        let kept = VecDeque::with_capacity(home.slots());
        let routes = (segment.lanes() > 1).then(|| Routes::new(policy, home_core, reactors)).flatten();
        Ok(Self {
            home,
            further: Vec::new(),
            segment,
            socket,
            memory,
            policy,
            routes,
            avoided: None,
            crowded: 0,
            bodies: Bodies::default(),
            max_message: usize::try_from(max_message).unwrap_or(usize::MAX),
            kept,
            polls: 0,
            empty_polls: 0,
            looked_at: None,
            closing: Vec::new(),
            end: None,
            clock_offset_ns,
            rings_sockets,
        })
    }

    /// Whether this process is a fork of the one that it was joined in: there is no memory behind it here.
    #[inline(always)]
    pub fn was_left_behind(&self) -> bool {
        self.segment.was_left_behind()
    }

    #[inline(always)]
    pub fn lane(&self, index: u32) -> &Lane {
        match index {
            0 => &self.home,
            further => &self.further[further as usize - 1],
        }
    }

    #[inline(always)]
    pub fn lane_mut(&mut self, index: u32) -> &mut Lane {
        match index {
            0 => &mut self.home,
            further => &mut self.further[further as usize - 1],
        }
    }

    /// All lanes, the home lane first.
    #[inline(always)]
    pub fn lanes(&self) -> impl Iterator<Item = &Lane> {
        std::iter::once(&self.home).chain(&self.further)
    }

    /// Takes note of a lane that the server has granted, and of the socket that it is rung by.
    pub fn add_lane(&mut self, grant: LaneGrant, bell: Option<OwnedFd>) -> Result<()> {
        let next = self.further.len() as u32 + 1;
        // Named again, or none: nothing to be opened.
        if grant.lane != next {
            return Ok(());
        }
        let doorbell = match (self.rings_sockets, bell) {
            (false, _) => Doorbell::Futex,
            (true, Some(bell)) => Doorbell::Socket(Arc::new(bell)),
            // We had no descriptor left for it: a lane that cannot be rung is none.
            (true, None) => return Ok(()),
        };
        let layout = self.segment.lane(grant.lane).map_err(IpcError::ServerFault)?;
        // Its reactor has let go of it since: the session is about to end.
        let Some(layout) = layout else { return Ok(()) };
        let lane = ClientLane::open(self.segment.mapping(), self.segment.geometry(), &layout)?;
        kill_point!("client.lane.mapped");
        let lane = Lane::new(lane, *self.segment.geometry(), grant.lane, grant.core, doorbell);
        self.kept.reserve(lane.slots());
        self.further.push(lane);
        Ok(())
    }

    /// The payload memory of a lane.
    #[inline(always)]
    pub fn payload(&self, lane: u32) -> &SharedBytes {
        &self.lane(lane).lane.common.payload
    }

    pub fn in_flight(&self) -> usize {
        self.lanes().map(|lane| lane.calls_in_flight()).sum()
    }

    pub fn shared_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::fstat(&self.memory).map_err(|e| IpcError::io("fstat of the segment", e))?;
        Ok(stat.st_blocks as u64 * 512)
    }

    /// Writes a request into a slot and its entry into the ring.
    #[inline(always)]
    pub fn submit(
        &mut self,
        target: Target,
        message_type: MessageType,
        capacity: usize,
        options: &CallOptions,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<CallId> {
        if self.end.is_some() {
            return Err(self.ended());
        }
        // The first call after a pause: the server may have ended the session meanwhile, or be about to stop.
        if self.home.in_flight == 0 && self.segment.state().0 != state::RUNNING {
            self.look_at_state()?;
        }
        let (index, flags) = match self.routes {
            None => (0, 0),
            Some(_) => self.choose_lane(target)?,
        };
        let meta_len = options.meta_len();
        let request = capacity.saturating_add(meta_len);
        let wanted = if options.idempotent { request } else { request.max(options.reply_capacity) };
        let offset = self.clock_offset_ns;
        let lane = self.lane_mut(index);
        if !has_slots(&lane.lane.slots, request, options) {
            return self.submit_long(target, message_type, capacity, options, write);
        }
        if options.pieces {
            return self.submit_in_pieces(index, flags, target, message_type, capacity, options, write);
        }
        let Some(grant) = lane.lane.slots.take(wanted) else { return Err(IpcError::WouldBlock) };
        kill_point!("client.slot.taken");
        let mut writer = lane.writer(&grant);
        if let Err(error) = writer.write_metadata(options).and_then(|()| write(&mut writer)) {
            lane.lane.slots.put_back(grant.slot);
            return Err(error);
        }
        kill_point!("client.request.written");
        let len = writer.len as u32;
        let mut entry = Submission {
            kind: kind::CALL,
            flags: flag::END | flags | if meta_len == 0 { 0 } else { flag::META },
            codec: target.codec,
            message_type: message_type.0,
            connection: target.connection,
            slot: grant.slot,
            generation: grant.generation,
            len,
            meta_len: meta_len as u16,
            response_count: 1,
            response_slot: grant.slot,
            frame: 0,
            body_len: (writer.len - meta_len) as u64,
            deadline: 0,
            payload_slot: 0,
            lease_epoch: 0,
        };
        if options.deadline.is_some() || options.idempotent {
            add_options(lane, &mut entry, grant, options, offset)?;
        }
        let id = lane.send(grant, &entry, options.tag, target.bulk)?;
        if let Some(routes) = &mut self.routes {
            routes.started(target.connection);
        }
        Ok(id)
    }

    /// The lane of a call on a session that has, or may have, several; and the flags that go with it.
    #[inline(never)]
    pub(super) fn choose_lane(&mut self, target: Target) -> Result<(u32, u16)> {
        let Some(mut routes) = self.routes.take() else { return Ok((0, 0)) };
        let chosen = routes.choose(self, target);
        self.routes = Some(routes);
        chosen
    }

    /// Calls go to reactors of other cores than this one from here on, each connection's as soon as none is in flight. To be
    /// said again before each call: what was submitted before it was first said has not been counted, and as long as any of
    /// that is in flight all calls stay on the home lane, so that none overtakes it (P6).
    pub fn keep_off(&mut self, core: u32) {
        self.avoided = Some(core);
        if self.routes.is_none() && self.segment.lanes() > 1 && self.in_flight() == 0 {
            self.routes = Routes::keeping_off(self.home.core);
        }
    }

    /// Submits an OPEN; returns the slot that names it.
    pub fn submit_open(&mut self, codec: u8, flags: u16) -> Result<u32> {
        if self.end.is_some() {
            return Err(self.ended());
        }
        if self.segment.state().0 != state::RUNNING {
            self.look_at_state()?;
        }
        let slot = self.home.submit_control(kind::OPEN, 0, codec, flags, false)?;
        kill_point!("client.open.sent");
        Ok(slot)
    }

    /// Closes a connection now or, if all slots are in use or calls of it are in flight on another lane, with a
    /// later flush.
    pub fn close_later(&mut self, connection: u32, bulk: bool) {
        if self.end.is_none() && !self.close_now(connection, bulk) {
            self.closing.push((connection, bulk));
        }
    }

    fn close_now(&mut self, connection: u32, bulk: bool) -> bool {
        // Calls that wait for memory to begin with come before the end of their connection.
        if self.bodies.wait_to_begin(connection) {
            return false;
        }
        // On the home lane its CLOSE follows its calls in the same ring.
        if self.routes.as_ref().is_some_and(|routes| routes.is_busy_elsewhere(connection)) {
            return false;
        }
        match self.home.submit_control(kind::CLOSE, connection, 0, 0, bulk) {
            Ok(slot) => {
                kill_point!("client.close.sent");
                self.home.orphan(slot);
                true
            }
            Err(_) => false,
        }
    }

    /// One fence, and a wake for each lane whose reactor sleeps.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<()> {
        if !self.closing.is_empty() {
            self.send_closes();
        }
        if self.bodies.are_active() {
            self.pump()?;
        }
        if self.further.is_empty() { self.home.flush() } else { self.flush_all() }
    }

    #[inline(never)]
    fn flush_all(&mut self) -> Result<()> {
        // Pairs with the fence in `ServerBell::mark`.
        fence_before_bell();
        for index in 0..=self.further.len() as u32 {
            let lane = self.lane_mut(index);
            if let Some(published) = lane.take_unrung() {
                lane.ring(published)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn send_closes(&mut self) {
        let mut waiting = std::mem::take(&mut self.closing);
        waiting.retain(|(connection, bulk)| !self.close_now(*connection, *bulk));
        self.closing = waiting;
    }

    /// As [`Session::next`] where there is nothing but calls of one frame on one lane, which is most of the time; of whatever
    /// else there is nothing is taken.
    #[inline(always)]
    pub fn next_plain(&mut self) -> Option<Plain> {
        let others = !self.kept.is_empty()
            || !self.further.is_empty()
            || self.routes.is_some()
            || self.bodies.are_active();
        if others { None } else { self.home.take_plain(INTERACTIVE) }
    }

    /// The next answered call, kept ones first.
    #[inline(always)]
    pub fn next(&mut self) -> Result<Option<Answered>> {
        if let Some(answered) = self.kept.pop_front() {
            return Ok(Some(answered));
        }
        self.next_completed()
    }

    /// The next call whose completion is in a ring, interactive ones first.
    #[inline(always)]
    pub fn next_completed(&mut self) -> Result<Option<Answered>> {
        if self.bodies.are_active() {
            // However quickly short calls are answered, and called again, long ones go on beside them.
            self.polls = self.polls.wrapping_add(1);
            if self.polls.is_multiple_of(POLLS_PER_PUMP) {
                self.pump()?;
            }
        }
        for ring in [INTERACTIVE, BULK] {
            for index in 0..=self.further.len() as u32 {
                while let Some(taken) = self.lane_mut(index).take(ring)? {
                    if let Some(routes) = &mut self.routes
                        && taken.connection != NO_CONNECTION
                    {
                        routes.ended(taken.connection);
                    }
                    match taken.answered {
                        Some(answered) if matches!(answered.outcome, Outcome::Piece(_)) => {
                            if let Some(answered) = self.body_event(answered)? {
                                return Ok(Some(answered));
                            }
                        }
                        Some(answered) => return Ok(Some(answered)),
                        None => {}
                    }
                }
            }
        }
        self.idle()?;
        self.empty_polls = self.empty_polls.wrapping_add(1);
        if self.empty_polls.is_multiple_of(POLLS_PER_LOOK) {
            self.look_after_server()?;
        }
        Ok(None)
    }

    /// Nothing has come: rings where something has gone out.
    #[inline(always)]
    pub fn idle(&mut self) -> Result<()> {
        if !self.closing.is_empty() {
            self.send_closes();
        }
        if self.bodies.are_active() {
            self.pump()?;
        }
        for index in 0..=self.further.len() as u32 {
            self.lane_mut(index).idle()?;
        }
        Ok(())
    }

    /// Keeps an answered call for `next`.
    pub fn keep(&mut self, answered: Answered) {
        self.kept.push_back(answered);
    }

    /// Moves every completion that is there to those kept.
    pub fn stash(&mut self) -> Result<()> {
        while let Some(answered) = self.next_completed()? {
            self.kept.push_back(answered);
        }
        Ok(())
    }

    /// Takes a call from those kept, if it is there.
    pub fn take_kept(&mut self, lane: u32, slot: u32) -> Option<Answered> {
        let at = self.kept.iter().position(|answered| (answered.lane, answered.slot) == (lane, slot))?;
        self.kept.remove(at)
    }

    /// Whether nothing is in flight that could free a slot: only the caller can.
    pub fn only_untaken_answers(&self) -> bool {
        self.in_flight() == 0
    }

    /// Whether answers are kept that came while somebody waited for others.
    pub fn has_kept(&self) -> bool {
        !self.kept.is_empty()
    }

    /// The slot of an answered call is free again, or that of a frame of its answer.
    #[inline(always)]
    pub fn release(&mut self, answered: &Answered) {
        if matches!(answered.outcome, Outcome::Piece(_)) {
            return self.release_body(answered);
        }
        self.lane_mut(answered.lane).release(answered.slot);
    }

    /// Copies an answer, or the frame of it that is at hand, to `target`, which is not longer.
    #[inline(always)]
    pub fn read(&self, answered: &Answered, target: &mut [u8]) -> Result<()> {
        let lane = self.lane(answered.lane);
        if matches!(answered.outcome, Outcome::Reply { .. }) && !lane.is_leased(answered.response_slot) {
            lane.lane.common.payload.read(LaneLayout::slot_offset(answered.response_slot), target);
            return Ok(());
        }
        self.read_elsewhere(answered, target)
    }

    #[cold]
    fn read_elsewhere(&self, answered: &Answered, target: &mut [u8]) -> Result<()> {
        match answered.outcome {
            Outcome::Piece(_) => self.read_body(answered, target),
            Outcome::Reply { .. } => self.lane(answered.lane).read_leased(answered.response_slot, target),
            Outcome::Lost { .. } => Ok(()),
        }
    }

    /// Whether there are calls whose completions are not all answers.
    #[inline(always)]
    pub fn has_inner_calls(&self) -> bool {
        self.bodies.exist() || self.lanes().any(|lane| lane.calls_in_flight() != lane.in_flight)
    }

    /// Since when some lane waits for memory.
    pub fn waits_for_memory_since(&self) -> Option<Instant> {
        self.lanes().filter_map(Lane::waits_since).min()
    }

    /// Says that the answer of a call is not wanted.
    pub fn cancel(&mut self, id: CallId) {
        if id.lane as usize > self.further.len() {
            return;
        }
        match self.lane(id.lane).body_of(id) {
            Some(body) => self.cancel_body(body, false),
            None => self.lane_mut(id.lane).cancel(id),
        }
    }

    /// A caller that stops waiting: cancels, and sets the slot aside until its completion has come.
    pub fn abandon(&mut self, id: CallId) -> Result<()> {
        match self.lane(id.lane).body_of(id) {
            Some(body) => self.cancel_body(body, true),
            None => self.lane_mut(id.lane).abandon(id),
        }
        self.flush()
    }

    /// Notes that the session is over. Answers that came are still handed out; what is in flight is
    /// classified (FAULTS §5).
    pub fn finish(&mut self, end: End) -> Result<()> {
        // Before completions are taken: those of a lane that was let go are all there then.
        let gone = |lane: u32| lane == 0 || matches!(self.segment.lane(lane), Ok(None));
        let let_go: Vec<bool> = (0..=self.further.len() as u32).map(gone).collect();
        self.stash()?;
        self.end = Some(end);
        let witness = match end {
            End::Told(_) => Witness::Server,
            End::Died => Witness::Kernel,
        };
        let Self { home, further, kept, bodies, .. } = self;
        for (lane, let_go) in std::iter::once(home).chain(further).zip(let_go) {
            lane.classify(witness, let_go, |mut lost, is_body| {
                if is_body {
                    let Some(tag) = bodies.lose(lost.tag as u32) else { return false };
                    lost.tag = tag;
                }
                kept.push_back(lost);
                true
            })?;
        }
        Ok(())
    }

    /// Whether the request of such a call lies whole in a base slot of its own, where it stays as it is until the call
    /// has been started; that of an idempotent one until it has been answered.
    pub fn keeps_request(&self, len: usize, options: &CallOptions) -> bool {
        let request = len.saturating_add(options.meta_len());
        !options.pieces && has_slots(&self.home.lane.slots, request, options)
    }

    /// Of a session that is over: whether what lies in its slots is what the client wrote there. From a client that did
    /// what none may do, or took too much, the server takes the memory away.
    pub fn left_requests(&self) -> bool {
        use DisconnectReason::{Draining, IdleTimeout};
        matches!(self.end, Some(End::Died | End::Told(Draining | IdleTimeout)))
    }

    /// Copies the request of a call that a session which is over has lost, and that [kept](Session::keeps_request) it.
    pub fn read_request(&self, lost: &Answered, options: &CallOptions, target: &mut [u8]) {
        self.payload(lost.lane).read(LaneLayout::slot_offset(lost.slot) + options.meta_len(), target);
    }

    /// The error for whoever wants something of a session that is over.
    #[cold]
    pub fn ended(&self) -> IpcError {
        match self.end {
            Some(End::Told(reason)) => IpcError::Disconnected(reason),
            Some(End::Died) | None => IpcError::NotExecuted,
        }
    }
}

/// Whether a lane has, free or not, the base slots that such a call goes in: one for both its request and its answer; two for
/// an idempotent call, whose request stays in its slot, and none if that is to be answered frame by frame.
#[inline(always)]
fn has_slots(slots: &SlotAllocator, request: usize, options: &CallOptions) -> bool {
    if options.idempotent {
        return !options.pieces && slots.holds_both(request, options.reply_capacity);
    }
    request.max(options.reply_capacity) <= slots.largest()
}

/// A deadline in the server's clock.
pub(super) fn add_deadline(entry: &mut Submission, options: &CallOptions, clock_offset_ns: u64) {
    if let Some(deadline) = options.deadline {
        let now = monotonic_ns().wrapping_add(clock_offset_ns);
        let left = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
        // 0 would mean no deadline.
        entry.deadline = now.saturating_add(left).max(1);
    }
}

/// A deadline in the server's clock, an answer slot of its own.
#[cold]
fn add_options(
    lane: &mut Lane,
    entry: &mut Submission,
    grant: Grant,
    options: &CallOptions,
    clock_offset_ns: u64,
) -> Result<()> {
    add_deadline(entry, options, clock_offset_ns);
    if options.idempotent {
        entry.flags |= flag::IDEMPOTENT;
        match lane.lane.slots.take(options.reply_capacity.max(1)) {
            Some(answer) => entry.response_slot = answer.slot,
            None => {
                lane.lane.slots.put_back(grant.slot);
                return Err(IpcError::WouldBlock);
            }
        }
    }
    Ok(())
}

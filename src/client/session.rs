//! The client's half of a session: slots out, answers in. One thread at a time, by type.
//!
//! Trust: the server runs as the same user and is believed more than it believes us; still, every
//!        completion is checked against what was submitted, and a late answer never meets another call.

use super::call::{CallId, CallOptions, SlotWriter};
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::handshake::DisconnectReason;
use crate::protocol::rendezvous::monotonic_ns;
use doorbell_shm::PeerFault;
use doorbell_shm::bell::{Published, fence_before_bell};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::entry::{Completion, Submission, flag, kind};
use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
use doorbell_shm::layout::LaneLayout;
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::{ClientWord, Grant};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// Empty polls after which the server's bell is looked at behind a fence.
const QUIET_POLLS: u32 = 8;

/// Empty polls between two looks at the clock, for those who never wait.
const POLLS_PER_LOOK: u32 = 256;

/// Where a call goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub connection: u32,
    pub codec: u8,
    pub bulk: bool,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The server answered.
    Reply { status: u8, len: u32, detail: u64 },
    /// The session ended first. Not `started`: provably not executed (FAULTS §5).
    Lost { started: bool },
}

/// What a slot is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No call.
    Free,
    /// Submitted; its completion has not come.
    InFlight,
    /// Completed; the answer has not been dropped.
    Answered,
    /// Its caller has gone: the slot is free once its completion has come (F58).
    Zombie,
}

/// An answered call, as it is handed out. By value: going through the call's record would make every
/// answer wait for its own stores.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    pub slot: u32,
    pub generation: u32,
    pub response_slot: u32,
    pub tag: u64,
    pub outcome: Outcome,
}

/// The private record of the call in a slot.
#[derive(Debug, Clone, Copy)]
struct Call {
    tag: u64,
    /// Position of its entry in the submission ring.
    position: u64,
    generation: u32,
    response_slot: u32,
    phase: Phase,
    bulk: bool,
}

const NO_CALL: Call =
    Call { tag: 0, position: 0, generation: 0, response_slot: 0, phase: Phase::Free, bulk: false };

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
    pub(super) lane: ClientLane,
    pub(super) segment: Segment,
    pub(super) socket: OwnedFd,
    memory: OwnedFd,
    calls: Vec<Call>,
    /// Calls answered while somebody waited for another one.
    kept: VecDeque<Answered>,
    in_flight: usize,
    /// Something was published since the server's bell was last looked at.
    pub(super) unrung: Option<Published>,
    /// Polls that found nothing since something was published.
    quiet_polls: u32,
    /// Polls that found nothing, and when one of them last looked at the socket.
    empty_polls: u32,
    pub(super) looked_at: Option<Instant>,
    /// Position behind the last CLOSE in the bulk ring.
    bulk_closes_end: u64,
    /// Connections to close as soon as a slot is free.
    closing: Vec<(u32, bool)>,
    pub(super) end: Option<End>,
    clock_offset_ns: u64,
}

impl Session {
    pub fn new(segment: Segment, socket: OwnedFd, memory: OwnedFd, clock_offset_ns: u64) -> Result<Self> {
        let geometry = *segment.geometry();
        let lane = ClientLane::open(segment.mapping(), &geometry, &LaneLayout::home(&geometry))?;
        let slots = lane.slots.numbers() as usize;
        Ok(Self {
            lane,
            segment,
            socket,
            memory,
            calls: vec![NO_CALL; slots],
            kept: VecDeque::with_capacity(slots),
            in_flight: 0,
            unrung: None,
            quiet_polls: 0,
            empty_polls: 0,
            looked_at: None,
            bulk_closes_end: 0,
            closing: Vec::new(),
            end: None,
            clock_offset_ns,
        })
    }

    pub fn payload(&self) -> &SharedBytes {
        &self.lane.common.payload
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn largest_slot(&self) -> usize {
        self.lane.slots.largest()
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
        let wanted = if options.idempotent { capacity } else { capacity.max(options.reply_capacity) };
        let Some(grant) = self.lane.slots.take(wanted) else { return Err(self.no_slot(capacity, options)) };
        let mut writer = SlotWriter {
            payload: &self.lane.common.payload,
            offset: LaneLayout::slot_offset(grant.slot),
            capacity: grant.capacity as usize,
            len: 0,
        };
        if let Err(error) = write(&mut writer) {
            self.lane.slots.put_back(grant.slot);
            return Err(error);
        }
        let len = writer.len as u32;
        let mut entry = Submission {
            kind: kind::CALL,
            flags: flag::END,
            codec: target.codec,
            message_type: message_type.0,
            connection: target.connection,
            slot: grant.slot,
            generation: grant.generation,
            len,
            meta_len: 0,
            response_count: 1,
            response_slot: grant.slot,
            frame: 0,
            body_len: u64::from(len),
            deadline: 0,
        };
        if options.deadline.is_some() || options.idempotent {
            self.add_options(&mut entry, grant, options)?;
        }
        self.send(grant, entry, options.tag, target.bulk)
    }

    /// A deadline in the server's clock, an answer slot of its own.
    #[cold]
    fn add_options(&mut self, entry: &mut Submission, grant: Grant, options: &CallOptions) -> Result<()> {
        if let Some(deadline) = options.deadline {
            let now = monotonic_ns().wrapping_add(self.clock_offset_ns);
            let left = u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX);
            // 0 would mean no deadline.
            entry.deadline = now.saturating_add(left).max(1);
        }
        if options.idempotent {
            entry.flags |= flag::IDEMPOTENT;
            match self.lane.slots.take(options.reply_capacity.max(1)) {
                Some(answer) => entry.response_slot = answer.slot,
                None => {
                    self.lane.slots.put_back(grant.slot);
                    return Err(self.no_slot(0, options));
                }
            }
        }
        Ok(())
    }

    /// Publishes an entry and notes its call.
    #[inline(always)]
    fn send(&mut self, grant: Grant, entry: Submission, tag: u64, bulk: bool) -> Result<CallId> {
        let ring = if bulk { BULK } else { INTERACTIVE };
        let position = self.lane.submissions[ring].next();
        if !self.lane.submissions[ring].push(entry.pack()).map_err(IpcError::ServerFault)? {
            self.lane.slots.put_back(grant.slot);
            if entry.response_slot != grant.slot && entry.kind == kind::CALL {
                self.lane.slots.put_back(entry.response_slot);
            }
            return Err(IpcError::WouldBlock);
        }
        self.lane.slots.advance(grant);
        self.calls[grant.slot as usize] = Call {
            tag,
            position,
            generation: grant.generation,
            response_slot: entry.response_slot,
            phase: Phase::InFlight,
            bulk,
        };
        self.in_flight += 1;
        self.unrung = Some(Published::Submissions);
        Ok(CallId { slot: grant.slot, generation: grant.generation })
    }

    /// Submits an OPEN or CLOSE; returns the slot that names it.
    pub fn submit_control(
        &mut self,
        kind: u8,
        connection: u32,
        codec: u8,
        flags: u16,
        bulk: bool,
    ) -> Result<u32> {
        if self.end.is_some() {
            return Err(self.ended());
        }
        let Some(grant) = self.lane.slots.take(0) else { return Err(IpcError::WouldBlock) };
        let entry = Submission {
            kind,
            flags,
            codec,
            connection,
            slot: grant.slot,
            generation: grant.generation,
            ..Submission::default()
        };
        // A bulk connection's CLOSE follows its calls in the same ring. An OPEN follows such a CLOSE that has
        // not been taken, so that it finds the room which that makes.
        let ring_is_bulk = match kind {
            kind::CLOSE => bulk,
            _ => self.bulk_close_is_queued()?,
        };
        let id = self.send(grant, entry, 0, ring_is_bulk)?;
        if kind == kind::CLOSE && bulk {
            self.bulk_closes_end = self.lane.submissions[BULK].next();
        }
        // It has no answer slot: 0 there is not one.
        self.calls[id.slot as usize].response_slot = id.slot;
        Ok(id.slot)
    }

    fn bulk_close_is_queued(&mut self) -> Result<bool> {
        let ring = &mut self.lane.submissions[BULK];
        if self.bulk_closes_end > ring.passed() {
            ring.refresh().map_err(IpcError::ServerFault)?;
        }
        Ok(self.bulk_closes_end > ring.passed())
    }

    /// Closes a connection now or, if all slots are in use, with a later flush.
    pub fn close_later(&mut self, connection: u32, bulk: bool) {
        if self.end.is_some() {
            return;
        }
        match self.submit_control(kind::CLOSE, connection, 0, 0, bulk) {
            Ok(slot) => self.calls[slot as usize].phase = Phase::Zombie,
            Err(_) => self.closing.push((connection, bulk)),
        }
    }

    #[cold]
    fn no_slot(&self, capacity: usize, options: &CallOptions) -> IpcError {
        let largest = self.lane.slots.largest();
        if capacity > largest {
            IpcError::MessageTooLarge(largest)
        } else if options.reply_capacity > largest {
            IpcError::ReplyTooLarge(largest)
        } else {
            IpcError::WouldBlock
        }
    }

    /// One fence, and one wake if the server sleeps.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<()> {
        if !self.closing.is_empty() {
            self.send_closes();
        }
        self.quiet_polls = 0;
        match self.unrung.take() {
            Some(published) => self.ring(published),
            None => Ok(()),
        }
    }

    #[cold]
    fn send_closes(&mut self) {
        while let Some((connection, bulk)) = self.closing.pop() {
            match self.submit_control(kind::CLOSE, connection, 0, 0, bulk) {
                Ok(slot) => self.calls[slot as usize].phase = Phase::Zombie,
                Err(_) => {
                    self.closing.push((connection, bulk));
                    return;
                }
            }
        }
    }

    #[inline(always)]
    fn ring(&self, published: Published) -> Result<()> {
        // Pairs with the fence in `ServerBell::mark`.
        fence_before_bell();
        if self.lane.common.server_bell.take(published) { self.wake_server() } else { Ok(()) }
    }

    #[cold]
    fn wake_server(&self) -> Result<()> {
        // Every waiter: waits of a ring that is gone still absorb wakes for some milliseconds.
        doorbell_uring::futex::wake(&self.lane.common.server_bell.0, i32::MAX as u32)
            .map_err(|e| IpcError::io("futex(FUTEX_WAKE) towards the server", e))?;
        Ok(())
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
        for ring in [INTERACTIVE, BULK] {
            while let Some(words) = self.lane.completions[ring].pop().map_err(IpcError::ServerFault)? {
                self.lane.completions[ring].publish();
                self.unrung.get_or_insert(Published::Consumed);
                self.prefetch_next(ring);
                if let Some(answered) = self.complete(words)? {
                    return Ok(Some(answered));
                }
            }
        }
        if let Some(published) = self.unrung {
            self.idle(published)?;
        }
        self.empty_polls = self.empty_polls.wrapping_add(1);
        if self.empty_polls.is_multiple_of(POLLS_PER_LOOK) {
            self.look_after_server()?;
        }
        Ok(None)
    }

    /// The next answer's lines travel while this one is looked at; its slot, and an entry, will probably be
    /// written again.
    #[inline(always)]
    fn prefetch_next(&self, ring: usize) {
        self.lane.submissions[ring].prefetch(1);
        if let Some(words) = self.lane.completions[ring].peek() {
            // Slot and length, a hint only: the completion is judged when it is taken.
            self.lane
                .common
                .payload
                .prefetch(LaneLayout::slot_offset(words[1] as u32), words[2] as u32 as usize);
        }
    }

    /// Nothing has come and something has gone out: rings at once if the server seems to sleep, else makes
    /// sure behind a fence a few polls later, when that is cheap.
    #[inline(always)]
    pub fn idle(&mut self, published: Published) -> Result<()> {
        self.quiet_polls += 1;
        if self.quiet_polls >= QUIET_POLLS || self.lane.common.server_bell.seems_asleep(published) {
            return self.flush();
        }
        Ok(())
    }

    /// Notes a completion; `None` if nobody waits for it any more.
    #[inline(always)]
    fn complete(&mut self, words: [u64; 4]) -> Result<Option<Answered>> {
        let completion = Completion::unpack(words).map_err(IpcError::ServerFault)?;
        let Completion { slot, generation, status, len, detail, .. } = completion;
        let Some(call) = self.calls.get_mut(slot as usize) else {
            return Err(IpcError::ServerFault(PeerFault::Slot { slot }));
        };
        if completion.kind != kind::REPLY {
            return Err(IpcError::ServerFault(PeerFault::Kind { kind: completion.kind }));
        }
        if call.generation != generation || !matches!(call.phase, Phase::InFlight | Phase::Zombie) {
            let (theirs, expected) = (generation, call.generation);
            return Err(IpcError::ServerFault(PeerFault::Generation { slot, theirs, expected }));
        }
        let capacity = self.lane.slots.capacity(call.response_slot);
        if len > capacity {
            return Err(IpcError::ServerFault(PeerFault::Length { len, slot, capacity }));
        }
        self.in_flight -= 1;
        if call.phase == Phase::Zombie {
            self.release(slot);
            return Ok(None);
        }
        call.phase = Phase::Answered;
        let Call { tag, response_slot, .. } = *call;
        let outcome = Outcome::Reply { status, len, detail };
        Ok(Some(Answered { slot, generation, response_slot, tag, outcome }))
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

    /// Takes the call in `slot` from those kept, if it is there.
    pub fn take_kept(&mut self, slot: u32) -> Option<Answered> {
        let at = self.kept.iter().position(|answered| answered.slot == slot)?;
        self.kept.remove(at)
    }

    /// Whether nothing is in flight that could free a slot: only the caller can.
    pub fn only_untaken_answers(&self) -> bool {
        self.in_flight == 0
    }

    /// Whether answers are kept that came while somebody waited for others.
    pub fn has_kept(&self) -> bool {
        !self.kept.is_empty()
    }

    /// The slot of an answered call is free again.
    #[inline(always)]
    pub fn release(&mut self, slot: u32) {
        let call = &mut self.calls[slot as usize];
        call.phase = Phase::Free;
        let response_slot = call.response_slot;
        if response_slot != slot {
            self.lane.slots.put_back(response_slot);
        }
        self.lane.slots.put_back(slot);
    }

    /// Says in the slot's word that the answer is not wanted, and hints at it (P4). Needs no entry.
    pub fn cancel(&mut self, id: CallId) {
        let Some(call) = self.calls.get(id.slot as usize) else { return };
        if call.generation != id.generation || call.phase != Phase::InFlight {
            return;
        }
        let word = ClientWord { generation: id.generation, cancelled: true, released: 0 };
        if let Some(shared) = self.lane.common.client_words.get(id.slot as usize) {
            // Published by the Release of the hint.
            shared.store(word.pack(), std::sync::atomic::Ordering::Relaxed);
            self.lane.common.hints.set(id.slot);
            self.unrung = Some(Published::Submissions);
        }
    }

    /// A caller that stops waiting: cancels, and sets the slot aside until its completion has come.
    pub fn abandon(&mut self, id: CallId) -> Result<()> {
        self.cancel(id);
        if let Some(call) = self.calls.get_mut(id.slot as usize)
            && call.generation == id.generation
            && call.phase == Phase::InFlight
        {
            call.phase = Phase::Zombie;
        }
        self.flush()
    }

    /// Notes that the session is over. Answers that came are still handed out; what is in flight is
    /// classified by the server's published position (FAULTS §5).
    pub fn finish(&mut self, end: End) -> Result<()> {
        self.stash()?;
        self.end = Some(end);
        for ring in [INTERACTIVE, BULK] {
            self.lane.submissions[ring].refresh().map_err(IpcError::ServerFault)?;
        }
        for slot in 0..self.calls.len() as u32 {
            let call = &mut self.calls[slot as usize];
            match call.phase {
                Phase::InFlight => {
                    let ring = if call.bulk { BULK } else { INTERACTIVE };
                    let started = call.position < self.lane.submissions[ring].passed();
                    call.phase = Phase::Answered;
                    let Call { tag, generation, response_slot, .. } = *call;
                    let outcome = Outcome::Lost { started };
                    self.kept.push_back(Answered { slot, generation, response_slot, tag, outcome });
                }
                Phase::Zombie => self.release(slot),
                Phase::Free | Phase::Answered => {}
            }
        }
        self.in_flight = 0;
        Ok(())
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

//! The client's end of one lane: slots out, answers in.
//!
//! Trust: the server runs as the same user and is believed more than it believes us; still, every
//!        completion is checked against what was submitted, and a late answer never meets another call.

use super::call::{CallId, SlotWriter};
use crate::error::{IpcError, Result};
use doorbell_shm::PeerFault;
use doorbell_shm::bell::{AWAKE, Published, fence_before_bell};
use doorbell_shm::entry::{Completion, Submission, kind};
use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
use doorbell_shm::layout::LaneLayout;
use doorbell_shm::slots::{ClientWord, Grant};
use std::sync::atomic::Ordering::Relaxed;

/// Empty polls after which the server's bell is looked at behind a fence.
const QUIET_POLLS: u32 = 8;

/// Calls of no connection: OPEN and CLOSE.
pub(super) const NO_CONNECTION: u32 = u32::MAX;

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
    /// Index of its lane.
    pub lane: u32,
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
    connection: u32,
    phase: Phase,
    bulk: bool,
}

const NO_CALL: Call = Call {
    tag: 0,
    position: 0,
    generation: 0,
    response_slot: 0,
    connection: NO_CONNECTION,
    phase: Phase::Free,
    bulk: false,
};

/// A completion that has been taken.
pub(super) struct Taken {
    /// The connection of the call, or [`NO_CONNECTION`].
    pub connection: u32,
    /// `None` if nobody waits for it any more.
    pub answered: Option<Answered>,
}

/// One lane, its slots and the calls in them.
#[derive(Debug)]
pub(super) struct Lane {
    pub lane: ClientLane,
    /// 0 is the home lane.
    index: u32,
    /// The core that its reactor is pinned to.
    pub core: u32,
    calls: Vec<Call>,
    pub in_flight: usize,
    /// Something was published since the server's bell was last looked at.
    pub unrung: Option<Published>,
    /// Polls that found nothing since something was published.
    quiet_polls: u32,
    /// Position behind the last CLOSE in the bulk ring.
    bulk_closes_end: u64,
}

impl Lane {
    pub fn new(lane: ClientLane, index: u32, core: u32) -> Self {
        let calls = vec![NO_CALL; lane.slots.numbers() as usize];
        let (in_flight, unrung, quiet_polls, bulk_closes_end) = (0, None, 0, 0);
        Self { lane, index, core, calls, in_flight, unrung, quiet_polls, bulk_closes_end }
    }

    /// Slots there are, free or not.
    pub fn slots(&self) -> usize {
        self.calls.len()
    }

    /// Whether a completion, or a fault, is in a ring.
    #[inline(always)]
    pub fn is_ready(&self) -> bool {
        self.lane.completions[INTERACTIVE].is_ready() || self.lane.completions[BULK].is_ready()
    }

    /// Whether its reactor polls it, as far as can be seen without a fence: a hint.
    #[inline(always)]
    pub fn seems_polled(&self) -> bool {
        self.lane.common.server_bell.0.load(Relaxed) == AWAKE
    }

    /// A writer for the request in a slot.
    #[inline(always)]
    pub fn writer(&self, grant: &Grant) -> SlotWriter<'_> {
        SlotWriter {
            payload: &self.lane.common.payload,
            offset: LaneLayout::slot_offset(grant.slot),
            capacity: grant.capacity as usize,
            len: 0,
        }
    }

    /// Publishes an entry and notes its call.
    #[inline(always)]
    pub fn send(&mut self, grant: Grant, entry: &Submission, tag: u64, bulk: bool) -> Result<CallId> {
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
        let is_call = entry.kind == kind::CALL;
        self.calls[grant.slot as usize] = Call {
            tag,
            position,
            generation: grant.generation,
            response_slot: if is_call { entry.response_slot } else { grant.slot },
            connection: if is_call { entry.connection } else { NO_CONNECTION },
            phase: Phase::InFlight,
            bulk,
        };
        self.in_flight += 1;
        self.unrung = Some(Published::Submissions);
        Ok(CallId { lane: self.index, slot: grant.slot, generation: grant.generation })
    }

    /// Publishes an entry that needs no slot and has no completion; `false` if there is no room.
    pub fn send_bare(&mut self, entry: &Submission, bulk: bool) -> Result<bool> {
        let ring = if bulk { BULK } else { INTERACTIVE };
        let sent = self.lane.submissions[ring].push(entry.pack()).map_err(IpcError::ServerFault)?;
        if sent {
            self.unrung = Some(Published::Submissions);
        }
        Ok(sent)
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
        let Some(grant) = self.lane.slots.take(0) else { return Err(IpcError::WouldBlock) };
        let (slot, generation) = (grant.slot, grant.generation);
        let entry = Submission { kind, flags, codec, connection, slot, generation, ..Submission::default() };
        // A bulk connection's CLOSE follows its calls in the same ring. An OPEN follows such a CLOSE that has
        // not been taken, so that it finds the room which that makes.
        let ring_is_bulk = match kind {
            kind::CLOSE => bulk,
            _ => self.bulk_close_is_queued()?,
        };
        self.send(grant, &entry, 0, ring_is_bulk)?;
        if kind == kind::CLOSE && bulk {
            self.bulk_closes_end = self.lane.submissions[BULK].next();
        }
        Ok(slot)
    }

    fn bulk_close_is_queued(&mut self) -> Result<bool> {
        let ring = &mut self.lane.submissions[BULK];
        if self.bulk_closes_end > ring.passed() {
            ring.refresh().map_err(IpcError::ServerFault)?;
        }
        Ok(self.bulk_closes_end > ring.passed())
    }

    /// Nobody waits for the call in `slot`.
    pub fn orphan(&mut self, slot: u32) {
        self.calls[slot as usize].phase = Phase::Zombie;
    }

    /// What has been published and nobody has been rung for; counts as rung from here on.
    #[inline(always)]
    pub fn take_unrung(&mut self) -> Option<Published> {
        self.quiet_polls = 0;
        self.unrung.take()
    }

    /// One fence, and one wake if the server sleeps.
    #[inline(always)]
    pub fn flush(&mut self) -> Result<()> {
        match self.take_unrung() {
            Some(published) => {
                // Pairs with the fence in `ServerBell::mark`.
                fence_before_bell();
                self.ring(published)
            }
            None => Ok(()),
        }
    }

    /// Wakes the server if it sleeps; behind a fence.
    #[inline(always)]
    pub fn ring(&self, published: Published) -> Result<()> {
        if self.lane.common.server_bell.take(published) { self.wake_server() } else { Ok(()) }
    }

    #[cold]
    fn wake_server(&self) -> Result<()> {
        // Every waiter: waits of a ring that is gone still absorb wakes for some milliseconds.
        doorbell_uring::futex::wake(&self.lane.common.server_bell.0, i32::MAX as u32)
            .map_err(|e| IpcError::io("futex(FUTEX_WAKE) towards the server", e))?;
        Ok(())
    }

    /// Nothing has come and something has gone out: rings at once if the server seems to sleep, else makes
    /// sure behind a fence a few polls later, when that is cheap.
    #[inline(always)]
    pub fn idle(&mut self) -> Result<()> {
        let Some(published) = self.unrung else { return Ok(()) };
        self.quiet_polls += 1;
        if self.quiet_polls >= QUIET_POLLS || self.lane.common.server_bell.seems_asleep(published) {
            return self.flush();
        }
        Ok(())
    }

    /// Takes the next completion of one ring.
    #[inline(always)]
    pub fn take(&mut self, ring: usize) -> Result<Option<Taken>> {
        let Some(words) = self.lane.completions[ring].pop().map_err(IpcError::ServerFault)? else {
            return Ok(None);
        };
        self.lane.completions[ring].publish();
        self.unrung.get_or_insert(Published::Consumed);
        self.prefetch_next(ring);
        self.complete(words).map(Some)
    }

    /// The next answer's lines travel while this one is looked at; its slot, and an entry, will probably be
    /// written again.
    #[inline(always)]
    fn prefetch_next(&self, ring: usize) {
        self.lane.submissions[ring].prefetch(1);
        if let Some(words) = self.lane.completions[ring].peek() {
            // Slot and length, a hint only: the completion is judged when it is taken.
            let offset = LaneLayout::slot_offset(words[1] as u32);
            self.lane.common.payload.prefetch(offset, words[2] as u32 as usize);
        }
    }

    /// Notes a completion.
    #[inline(always)]
    fn complete(&mut self, words: [u64; 4]) -> Result<Taken> {
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
        let Call { tag, response_slot, connection, phase, .. } = *call;
        if phase == Phase::Zombie {
            self.release(slot);
            return Ok(Taken { connection, answered: None });
        }
        call.phase = Phase::Answered;
        let outcome = Outcome::Reply { status, len, detail };
        let answered = Answered { slot, generation, response_slot, lane: self.index, tag, outcome };
        Ok(Taken { connection, answered: Some(answered) })
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
            shared.store(word.pack(), Relaxed);
            self.lane.common.hints.set(id.slot);
            self.unrung = Some(Published::Submissions);
        }
    }

    /// A caller that stops waiting: cancels, and sets the slot aside until its completion has come.
    pub fn abandon(&mut self, id: CallId) {
        self.cancel(id);
        if let Some(call) = self.calls.get_mut(id.slot as usize)
            && call.generation == id.generation
            && call.phase == Phase::InFlight
        {
            call.phase = Phase::Zombie;
        }
    }

    /// The session is over and every completion has been taken: what is in flight is classified by the server's
    /// published position (FAULTS §5).
    pub fn classify(&mut self, mut lost: impl FnMut(Answered)) -> Result<()> {
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
                    lost(Answered { slot, generation, response_slot, lane: self.index, tag, outcome });
                }
                Phase::Zombie => self.release(slot),
                Phase::Free | Phase::Answered => {}
            }
        }
        self.in_flight = 0;
        Ok(())
    }
}

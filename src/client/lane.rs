//! The client's end of one lane: slots out, answers in.
//!
//! Trust: the server runs as the same user and is believed more than it believes us; still, every
//!        completion is checked against what was submitted, and a late answer never meets another call.

use super::call::{CallId, SlotWriter};
use super::classify::{Fate, Remains, Witness, fate};
use super::doorbell::{Doorbell, ring_socket};
use crate::error::{IpcError, Result};
use crate::machine;
use doorbell_shm::PeerFault;
use doorbell_shm::bell::{AWAKE, Published, fence_before_bell};
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::kill_point;
use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
use doorbell_shm::layout::{Geometry, LaneLayout};
use doorbell_shm::lease::Run;
use doorbell_shm::slots::{ClientWord, Grant};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Empty polls after which the server's bell is looked at behind a fence.
const QUIET_POLLS: u32 = 8;

/// Calls of no connection: OPEN and CLOSE.
pub(super) const NO_CONNECTION: u32 = u32::MAX;

/// Stands for the answer slot of a call of several frames: its tag is then the index of its record.
pub(super) const BODY: u32 = u32::MAX;
/// Stands for the answer slot of a LEASE.
const LEASE: u32 = u32::MAX - 1;
/// The position of an entry that has not been published.
const UNPUBLISHED: u64 = u64::MAX;
/// How long no lease is asked for after the lane was found full.
const FULL_REST: Duration = Duration::from_millis(100);
/// Whatever a server says, it is asked again after this.
const REST_MAX: Duration = Duration::from_secs(1);

/// One frame of an answer that has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub status: u8,
    pub last: bool,
    pub len: u32,
    pub frame: u32,
    pub detail: u64,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The server answered.
    Reply { status: u8, len: u32, detail: u64 },
    /// A frame of the answer of a call that may have several, whose record is [`Answered::response_slot`].
    Piece(Piece),
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

impl Answered {
    /// Whether this ends its call.
    pub fn is_last(&self) -> bool {
        !matches!(self.outcome, Outcome::Piece(piece) if !piece.last)
    }
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

/// An answered call of one frame whose answer lies in a base slot of the home lane.
pub(super) struct Plain {
    pub slot: u32,
    pub generation: u32,
    pub response_slot: u32,
    pub tag: u64,
    pub status: u8,
    /// Bytes of the answer.
    pub len: u32,
    pub detail: u64,
}

impl From<Plain> for Answered {
    #[inline(always)]
    fn from(plain: Plain) -> Self {
        let Plain { slot, generation, response_slot, tag, status, len, detail } = plain;
        Self {
            slot,
            generation,
            response_slot,
            lane: 0,
            tag,
            outcome: Outcome::Reply { status, len, detail },
        }
    }
}

/// One lane, its slots and the calls in them.
#[derive(Debug)]
pub(super) struct Lane {
    pub lane: ClientLane,
    /// 0 is the home lane.
    index: u32,
    /// The core that its reactor is pinned to.
    pub core: u32,
    doorbell: Doorbell,
    calls: Vec<Call>,
    pub in_flight: usize,
    /// Something was published since the server's bell was last looked at.
    pub unrung: Option<Published>,
    /// Polls that found nothing since something was published.
    quiet_polls: u32,
    /// Position behind the last CLOSE in the bulk ring.
    bulk_closes_end: u64,
    /// The session is over and what was in flight has been judged: what its reactor still completes is nobody's.
    judged: bool,
    geometry: Geometry,
    /// LEASEs and RETURNs among those in flight.
    controls: usize,
    /// The LEASE that has not been answered: bytes of each slot, and since when.
    wish: Option<(u32, Instant)>,
    /// No lease is asked for before.
    refused_until: Option<Instant>,
    /// First slot and epoch of a lease that lies where another one is in use whose memory is gone: to be given back.
    unusable: Option<(u32, u32)>,
}

impl Lane {
    pub fn new(lane: ClientLane, geometry: Geometry, index: u32, core: u32, doorbell: Doorbell) -> Self {
        let calls = vec![NO_CALL; lane.slots.numbers() as usize];
        Self {
            lane,
            index,
            core,
            doorbell,
            calls,
            in_flight: 0,
            unrung: None,
            quiet_polls: 0,
            bulk_closes_end: 0,
            judged: false,
            geometry,
            controls: 0,
            wish: None,
            refused_until: None,
            unusable: None,
        }
    }

    /// How it stands.
    #[cfg(test)]
    pub fn describe(&self) -> String {
        let (free, waits, refused) =
            (self.lane.slots.free(), self.wish.is_some(), self.refused_until.is_some());
        let bell = self.lane.common.server_bell.0.load(Relaxed);
        let Self { in_flight, controls, unrung, .. } = self;
        format!(
            "{free} slots free, {in_flight} in flight, {controls} controls, waits for a lease {waits}, was refused {refused}, \
             unrung {unrung:?}, bell {bell}, ready {}, leases in use {}",
            self.is_ready(),
            self.lane.leases.in_use()
        )
    }

    /// Calls that the server admits from each ring at the same time.
    pub fn admits(&self) -> u32 {
        self.geometry.admitted()
    }

    /// Calls in flight.
    pub fn calls_in_flight(&self) -> usize {
        self.in_flight - self.controls
    }

    /// Since when this lane waits for memory.
    pub fn waits_since(&self) -> Option<Instant> {
        self.wish.map(|(_, since)| since)
    }

    /// Slots there are, free or not.
    pub fn slots(&self) -> usize {
        self.calls.len()
    }

    /// Base slots, free or not.
    pub fn base_slots(&self) -> u32 {
        let Geometry { large, medium, small, .. } = self.geometry;
        u32::from(large) + u32::from(medium) + u32::from(small)
    }

    /// Whether a completion, or a fault, is in a ring.
    #[inline(always)]
    pub fn is_ready(&self) -> bool {
        self.lane.completions[INTERACTIVE].is_ready() || self.lane.completions[BULK].is_ready()
    }

    /// Whether the next completion in one of its rings ends a call of one frame that somebody waits for: a hint, it is judged
    /// when it is taken.
    #[inline(always)]
    pub fn brings_answer(&self) -> bool {
        let answers = |words| {
            let Ok(Completion { kind, slot, generation, .. }) = Completion::unpack(words) else {
                return false;
            };
            let call = self.calls.get(slot as usize).filter(|call| call.generation == generation);
            let waited_for = |call: &Call| call.phase == Phase::InFlight && call.response_slot != LEASE;
            kind == kind::REPLY && call.is_some_and(waited_for)
        };
        [INTERACTIVE, BULK].iter().any(|ring| self.lane.completions[*ring].peek().is_some_and(answers))
    }

    /// Whether its reactor polls it, as far as can be seen without a fence: a hint.
    #[inline(always)]
    pub fn seems_polled(&self) -> bool {
        self.lane.common.server_bell.0.load(Relaxed) == AWAKE
    }

    /// A writer for the request in a slot.
    #[inline(always)]
    pub fn writer(&self, grant: &Grant) -> SlotWriter<'_> {
        self.writer_at(grant.slot, grant.capacity as usize)
    }

    /// A writer of at most `capacity` bytes into a slot.
    #[inline(always)]
    pub fn writer_at(&self, slot: u32, capacity: usize) -> SlotWriter<'_> {
        SlotWriter {
            payload: &self.lane.common.payload,
            offset: LaneLayout::slot_offset(slot),
            capacity,
            len: 0,
            owned: None,
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
                self.put_back(entry.response_slot);
            }
            return Err(IpcError::WouldBlock);
        }
        kill_point!("client.entry.published");
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

    /// The slot of a grant names a body that has not begun; its record has this index.
    pub fn hold_name(&mut self, name: Grant, body: u32, connection: u32, bulk: bool) {
        self.calls[name.slot as usize] = Call {
            tag: body.into(),
            position: UNPUBLISHED,
            generation: name.generation,
            response_slot: BODY,
            connection,
            phase: Phase::InFlight,
            bulk,
        };
        self.in_flight += 1;
    }

    /// Publishes the first entry of a body whose name is held; `false` if there is no room.
    pub fn send_body(&mut self, name: Grant, entry: &Submission, bulk: bool) -> Result<bool> {
        let position = self.lane.submissions[if bulk { BULK } else { INTERACTIVE }].next();
        let sent = self.send_bare(entry, bulk)?;
        if sent {
            self.lane.slots.advance(name);
            self.calls[name.slot as usize].position = position;
        }
        Ok(sent)
    }

    /// Whether there is room for an entry.
    pub fn has_entry(&mut self, bulk: bool) -> Result<bool> {
        let ring = &mut self.lane.submissions[if bulk { BULK } else { INTERACTIVE }];
        if ring.outstanding() == ring.capacity() {
            ring.refresh().map_err(IpcError::ServerFault)?;
        }
        Ok(ring.outstanding() < ring.capacity())
    }

    /// The record of the call that `id` names, if that is one of several frames.
    pub fn body_of(&self, id: CallId) -> Option<u32> {
        let call = self.calls.get(id.slot as usize)?;
        let live = call.generation == id.generation && call.phase == Phase::InFlight;
        (live && call.response_slot == BODY).then_some(call.tag as u32)
    }

    /// The slot that named a body is free again.
    pub fn free_name(&mut self, slot: u32) {
        self.calls[slot as usize].phase = Phase::Free;
        self.lane.slots.put_back(slot);
    }

    /// Takes leased slots next to each other, of at least `bytes` bytes.
    pub fn take_run(&mut self, bytes: usize, count: u32) -> Option<Run> {
        if self.lane.leases.is_empty() {
            return None;
        }
        let words = &self.lane.common.leases;
        let first = !self.lane.leases.in_use();
        if first {
            words.enter();
            kill_point!("client.lease.entered");
        }
        let run = self.lane.leases.take(bytes, count, |epoch| !words.is_void(epoch));
        if first && run.is_none() {
            words.end();
        }
        run
    }

    /// A slot that carried payload is free again.
    pub fn put_back(&mut self, slot: u32) {
        if slot < self.geometry.base_numbers() {
            self.lane.slots.put_back(slot);
        } else if self.lane.leases.put_back(slot) && !self.lane.leases.in_use() {
            self.lane.common.leases.end();
        }
    }

    /// The slots of a window are free again, but for the one that names the call.
    pub fn put_back_window(&mut self, slots: impl Iterator<Item = u32>, name: u32) {
        slots.filter(|slot| *slot != name).for_each(|slot| self.put_back(slot));
    }

    /// Copies from a slot.
    ///
    /// # Errors
    ///
    /// [`IpcError::MemoryTakenBack`] if it is a leased one whose memory was taken before or while it was read.
    pub fn read(&self, slot: u32, epoch: Option<u32>, target: &mut [u8]) -> Result<()> {
        self.lane.common.payload.read(LaneLayout::slot_offset(slot), target);
        match epoch {
            Some(epoch) if self.lane.common.leases.is_gone(epoch) => Err(IpcError::MemoryTakenBack),
            _ => Ok(()),
        }
    }

    /// Copies from the answer slot of a call of one frame.
    #[cold]
    pub fn read_leased(&self, slot: u32, target: &mut [u8]) -> Result<()> {
        self.read(slot, self.lane.leases.of_slot(slot).map(|(epoch, _)| epoch), target)
    }

    /// Whether a slot is a leased one.
    #[inline(always)]
    pub fn is_leased(&self, slot: u32) -> bool {
        slot as usize >= self.calls.len()
    }

    /// Asks for a lease of so many slots of `bytes` bytes, unless that has been done or less than `spare` base slots would be
    /// left: the server may take long to answer. Says whether one may come.
    pub fn wish_for(&mut self, bytes: usize, slots: u32, spare: usize, now: Instant) -> Result<bool> {
        if self.wish.is_some() {
            return Ok(true);
        }
        let refused = self.refused_until.is_some_and(|until| now < until);
        // Slots by which leases are given back come back at once: that needs no memory.
        let few = self.lane.slots.free() + self.controls <= spare;
        if self.geometry.lease_pages == 0 || refused || few {
            return Ok(false);
        }
        self.return_void_leases()?;
        if self.unusable.is_some() {
            return Ok(false);
        }
        if self.lane.slots.free() < 2 {
            // The last slot is for what needs it; others come.
            return Ok(true);
        }
        let Some(name) = self.lane.slots.take(0) else { return Ok(false) };
        let entry = Submission {
            kind: kind::LEASE,
            slot: name.slot,
            generation: name.generation,
            len: bytes as u32,
            response_count: slots as u16,
            ..Submission::default()
        };
        match self.send(name, &entry, 0, false) {
            Ok(_) => {}
            Err(IpcError::WouldBlock) => return Ok(false),
            Err(error) => return Err(error),
        }
        kill_point!("client.lease.asked");
        self.calls[name.slot as usize].response_slot = LEASE;
        self.controls += 1;
        self.wish = Some((bytes as u32, now));
        Ok(true)
    }

    /// Gives void leases back that nothing uses.
    pub fn return_void_leases(&mut self) -> Result<()> {
        while self.lane.slots.free() > 1 && self.has_entry(false)? {
            let words = &self.lane.common.leases;
            let unusable = self.unusable.take();
            let Some((first, epoch)) =
                unusable.or_else(|| self.lane.leases.drop_void(|epoch| words.is_void(epoch)))
            else {
                break;
            };
            let Some(name) = self.lane.slots.take(0) else { break };
            let entry = Submission {
                kind: kind::RETURN,
                flags: flag::LEASED,
                slot: name.slot,
                generation: name.generation,
                payload_slot: first,
                lease_epoch: epoch,
                ..Submission::default()
            };
            self.send(name, &entry, 0, false)?;
            kill_point!("client.lease.returned");
            self.controls += 1;
            self.calls[name.slot as usize].response_slot = LEASE;
            self.orphan(name.slot);
        }
        Ok(())
    }

    /// A LEASE or RETURN has been answered.
    #[cold]
    fn control_answered(&mut self, completion: &Completion) -> Result<()> {
        self.controls -= 1;
        let slot = completion.slot;
        let is_return = self.calls[slot as usize].phase == Phase::Zombie;
        self.free_name(slot);
        if is_return {
            return Ok(());
        }
        let Some((bytes, _)) = self.wish.take() else { return Ok(()) };
        match Status::from_code(completion.status) {
            Some(Status::Ok) => {
                let (first, slots) = (completion.detail as u32, (completion.detail >> 32) as u32);
                self.granted(first, slots, bytes, completion.frame)?;
            }
            _ => {
                self.refused_until = Some(machine::now() + rest(completion.detail));
            }
        }
        Ok(())
    }

    /// Takes note of a lease. Where it lies there may have been another one that the server has taken back without
    /// this client having seen it: that one is forgotten, or, if answers in it have not been done with, the new one is
    /// given back.
    fn granted(&mut self, first: u32, slots: u32, bytes: u32, epoch: u32) -> Result<()> {
        kill_point!("client.lease.granted");
        let words = &self.lane.common.leases;
        while self.lane.leases.drop_void(|old| words.is_gone(old)).is_some() {}
        match self.lane.leases.add(&self.geometry, first, slots, bytes, epoch) {
            Ok(()) => Ok(()),
            Err(_) if self.lane.leases.any(|old| words.is_gone(old)) => {
                self.unusable = Some((first, epoch));
                // The next one would lie there too.
                self.refused_until = Some(machine::now() + FULL_REST);
                self.return_void_leases()
            }
            Err(fault) => Err(IpcError::ServerFault(fault)),
        }
    }

    /// A completion of a call whose answer may have several frames.
    #[cold]
    fn complete_body(&mut self, completion: &Completion) -> Result<Taken> {
        let Completion { slot, generation, status, len, frame, detail, .. } = *completion;
        let call = &mut self.calls[slot as usize];
        let last = completion.kind == kind::REPLY;
        if !last && completion.kind != kind::FRAME {
            return Err(IpcError::ServerFault(PeerFault::Kind { kind: completion.kind }));
        }
        if last {
            self.in_flight -= 1;
            call.phase = Phase::Answered;
        }
        let connection = if last { call.connection } else { NO_CONNECTION };
        let outcome = Outcome::Piece(Piece { status, last, len, frame, detail });
        let response_slot = call.tag as u32;
        let answered = Answered { slot, generation, response_slot, lane: self.index, tag: 0, outcome };
        Ok(Taken { connection, answered: Some(answered) })
    }

    /// A frame of an answer that is longer than the slot of its call. Its record is made by the session: until then
    /// [`BODY`] stands for it.
    #[cold]
    fn answer_goes_on(&mut self, completion: Completion) -> Result<Taken> {
        let Completion { slot, generation, status, len, frame, detail, kind, .. } = completion;
        let call = &self.calls[slot as usize];
        if kind != kind::FRAME || call.response_slot == LEASE {
            return Err(IpcError::ServerFault(PeerFault::Kind { kind }));
        }
        if call.phase == Phase::Zombie {
            // It has been cancelled: its end will come without more credit.
            return Ok(Taken { connection: NO_CONNECTION, answered: None });
        }
        let outcome = Outcome::Piece(Piece { status, last: false, len, frame, detail });
        let (lane, tag) = (self.index, call.tag);
        let answered = Answered { slot, generation, response_slot: BODY, lane, tag, outcome };
        Ok(Taken { connection: NO_CONNECTION, answered: Some(answered) })
    }

    /// The call in `slot` is one of several frames from here on; returns its answer slot, that slot's bytes, and its
    /// connection.
    pub fn becomes_body(&mut self, slot: u32, body: u32) -> (u32, u32, u32, bool) {
        let leased = |slot| self.lane.leases.of_slot(slot).map_or(0, |(_, bytes)| bytes);
        let call = &mut self.calls[slot as usize];
        let answer = call.response_slot;
        let capacity = match self.lane.slots.capacity(answer) {
            0 => leased(answer),
            base => base,
        };
        (call.tag, call.response_slot) = (body.into(), BODY);
        (answer, capacity, call.connection, call.bulk)
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
        kill_point!("client.bell.taken");
        match &self.doorbell {
            Doorbell::Socket(socket) => ring_socket(socket)?,
            // Every waiter: waits of a ring that is gone still absorb wakes for some milliseconds.
            Doorbell::Futex => {
                machine::futex_wake(&self.lane.common.server_bell.0, i32::MAX as u32)
                    .map_err(|e| IpcError::io("futex(FUTEX_WAKE) towards the server", e))?;
            }
        }
        kill_point!("client.bell.rung");
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
        self.pass(ring);
        self.complete(words).map(Some)
    }

    /// A completion has been copied out: the server may write there again.
    #[inline(always)]
    fn pass(&mut self, ring: usize) {
        kill_point!("client.answer.taken");
        self.lane.completions[ring].publish();
        kill_point!("client.answer.passed");
        self.unrung.get_or_insert(Published::Consumed);
        self.prefetch_next(ring);
    }

    /// Takes the next completion of one ring if it ends a call of one frame, somebody waits for that, and its answer lies in
    /// a base slot: the same as [`Lane::take`] for most, with most of its conditions known. Whatever else there is, nothing
    /// is taken.
    #[inline(always)]
    pub fn take_plain(&mut self, ring: usize) -> Option<Plain> {
        /// Kind and flags of such a completion, in word 0 without its status.
        const HEAD: u64 = (kind::REPLY as u64) << 32 | (flag::END as u64) << 48;
        const HEAD_MASK: u64 = 0xffff_00ff << 32;
        let (calls, slots) = (&mut self.calls, &self.lane.slots);
        let mut plain = None;
        self.lane.completions[ring].pop_if(|words| {
            let (slot, generation, len) = (words[1] as u32, (words[1] >> 32) as u32, words[2] as u32);
            let Some(call) = calls.get_mut(slot as usize) else { return false };
            let expected = words[0] & HEAD_MASK == HEAD
                && call.generation == generation
                && call.phase == Phase::InFlight;
            let capacity = slots.capacity(call.response_slot);
            if !expected || capacity == 0 || len > capacity {
                return false;
            }
            call.phase = Phase::Answered;
            let Call { tag, response_slot, .. } = *call;
            let (status, detail) = ((words[0] >> 40) as u8, words[3]);
            plain = Some(Plain { slot, generation, response_slot, tag, status, len, detail });
            true
        })?;
        self.pass(ring);
        self.in_flight -= 1;
        plain
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
        if call.generation != generation || !matches!(call.phase, Phase::InFlight | Phase::Zombie) {
            if self.judged {
                return Ok(Taken { connection: NO_CONNECTION, answered: None });
            }
            let (theirs, expected) = (generation, call.generation);
            return Err(IpcError::ServerFault(PeerFault::Generation { slot, theirs, expected }));
        }
        if call.response_slot == BODY {
            return self.complete_body(&completion);
        }
        if completion.kind != kind::REPLY {
            return self.answer_goes_on(completion);
        }
        let response_slot = call.response_slot;
        let mut capacity = self.lane.slots.capacity(response_slot);
        if capacity == 0 {
            if response_slot == LEASE {
                self.in_flight -= 1;
                self.control_answered(&completion)?;
                return Ok(Taken { connection: NO_CONNECTION, answered: None });
            }
            capacity = self.lane.leases.of_slot(response_slot).map_or(0, |(_, bytes)| bytes);
        }
        let call = &mut self.calls[slot as usize];
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
        kill_point!("client.answer.read");
        let call = &mut self.calls[slot as usize];
        call.phase = Phase::Free;
        let response_slot = call.response_slot;
        if response_slot != slot {
            self.put_back(response_slot);
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
            kill_point!("client.cancel.written");
            self.lane.common.hints.set(id.slot);
            kill_point!("client.cancel.hinted");
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
    /// published position (FAULTS §5). `let_go`: its reactor had let go of it before the completions were taken. `lost`
    /// says whether anybody wants to know of a call.
    pub fn classify(
        &mut self,
        witness: Witness,
        let_go: bool,
        mut lost: impl FnMut(Answered, bool) -> bool,
    ) -> Result<()> {
        for ring in [INTERACTIVE, BULK] {
            self.lane.submissions[ring].refresh().map_err(IpcError::ServerFault)?;
        }
        for slot in 0..self.calls.len() as u32 {
            let call = &mut self.calls[slot as usize];
            match call.phase {
                Phase::InFlight if call.response_slot == LEASE => {
                    self.wish = None;
                    self.free_name(slot);
                }
                Phase::InFlight => {
                    let ring = if call.bulk { BULK } else { INTERACTIVE };
                    let remains = Remains {
                        completed: false,
                        position: (call.position != UNPUBLISHED).then_some(call.position),
                        taken: self.lane.submissions[ring].passed(),
                        let_go,
                    };
                    let started = fate(remains, witness) != Fate::NotExecuted;
                    call.phase = Phase::Answered;
                    let Call { tag, generation, response_slot, .. } = *call;
                    let is_body = response_slot == BODY;
                    if is_body {
                        // Nothing of its answer is kept: it ends as any call does.
                        call.response_slot = slot;
                    }
                    let response_slot = call.response_slot;
                    let outcome = Outcome::Lost { started };
                    let answered =
                        Answered { slot, generation, response_slot, lane: self.index, tag, outcome };
                    if !lost(answered, is_body) {
                        self.release(slot);
                    }
                }
                Phase::Zombie if call.response_slot == LEASE => self.free_name(slot),
                Phase::Zombie => self.release(slot),
                Phase::Free | Phase::Answered => {}
            }
        }
        (self.in_flight, self.controls) = (0, 0);
        self.judged = true;
        Ok(())
    }
}

/// How long no lease is asked for after a refusal, which says so many milliseconds, or 0 for no time of its own.
fn rest(millis: u64) -> Duration {
    if millis == 0 { FULL_REST } else { Duration::from_millis(millis).min(REST_MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   a server cannot keep a client from its leases for longer than [`REST_MAX`], nor have it ask without pause.
    #[test]
    fn a_rest_is_what_the_server_says_within_bounds() {
        let said = [0, 1, 999, 1000, 1001, u64::MAX].map(rest);
        let ms = Duration::from_millis;
        assert_eq!(said, [FULL_REST, ms(1), ms(999), REST_MAX, REST_MAX, REST_MAX]);
        assert!(!FULL_REST.is_zero());
    }
}

//! A server without a kernel: the core, sessions on the heap, and of a reactor what memory and time need. Time is a
//! number that its user sets. For unit tests and for the fuzz target `session` (`stress/fuzz`): no part of the library.
//!
//! After every step [`Simulation::check`] compares what the core believes with what it has: nothing leaks, nothing is
//! lent twice, nothing of one session is found in another.

use super::budget::{Budget, PRIVATE_PER_SESSION};
use super::core::{Core, SessionId};
use super::crew::{Inbox, Notice};
use super::exchange::Work;
use super::lane::SessionLane;
use super::table::{Context, HandlerError, HandlerTable, Pieces, Progress, Reply};
use crate::config::ServerConfig;
use crate::metrics::Totals;
use crate::protocol::MessageType;
use doorbell_shm::PeerFault;
use doorbell_shm::lane::ClientLane;
use doorbell_shm::layout::{Geometry, LaneLayout, SLOT_SMALL};
use doorbell_shm::map::PAGE;
use doorbell_shm::segment::{Identity, Segment, granted_bytes};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Answers with its request, taken as a whole.
pub const ECHO: MessageType = MessageType::ECHO;
/// Answers with its request, taken piece by piece.
pub const PIECES: MessageType = MessageType(256);
/// Answers with [`BIG_LEN`] bytes, byte i being i modulo 251.
pub const BIG: MessageType = MessageType(257);
/// Panics.
pub const PANIC: MessageType = MessageType(258);
/// Refuses its request.
pub const ERR: MessageType = MessageType(259);
/// Answers with each byte of its request twice; takes half of each piece at most, rounded up. So its answer soon lies
/// where the rest of its request does if both have the same slot.
pub const HALVES: MessageType = MessageType(260);
/// Takes everything and then makes no progress.
pub const STUCK: MessageType = MessageType(261);
/// Panics once it has taken more than 2000 bytes.
pub const PANIC_LATER: MessageType = MessageType(262);
/// Like [`ECHO`], but requests of at most 5000 bytes are put together.
pub const SHORT: MessageType = MessageType(263);
/// Cannot begin.
pub const NEVER: MessageType = MessageType(264);

/// Bytes of the answer of [`BIG`].
pub const BIG_LEN: usize = 100 << 10;
/// Longest request that is put together for [`SHORT`].
pub const SHORT_LEN: usize = 5000;
/// The longest message of the simulated server.
pub const MESSAGE_MAX: usize = 110_000;
/// Connections whose calls ran since somebody looked.
#[derive(Debug, Default)]
pub struct Ran(Mutex<Vec<u32>>);

impl Ran {
    fn note(context: &Context<'_, Self>) {
        context.state().0.lock().unwrap_or_else(PoisonError::into_inner).push(context.connection());
        #[cfg(test)]
        if let Some(meanwhile) = tests::MEANWHILE.take() {
            meanwhile();
        }
    }
}

type Answer = Result<(), HandlerError>;

fn echo(context: &Context<'_, Ran>, request: &[u8], reply: &mut Reply<'_>) -> Answer {
    Ran::note(context);
    reply.write(request)
}

fn big(context: &Context<'_, Ran>, _: &[u8], reply: &mut Reply<'_>) -> Answer {
    Ran::note(context);
    let all: Vec<u8> = (0..BIG_LEN).map(|i| (i % 251) as u8).collect();
    // In parts of different lengths, so that they end anywhere in a slot.
    all.chunks(777).try_for_each(|part| reply.write(part))
}

fn panic(context: &Context<'_, Ran>, _: &[u8], reply: &mut Reply<'_>) -> Answer {
    Ran::note(context);
    reply.write(b"something first")?;
    // Past the hook that a fuzzer has for panics: this one is meant.
    std::panic::resume_unwind(Box::new(()))
}

fn err(context: &Context<'_, Ran>, _: &[u8], reply: &mut Reply<'_>) -> Answer {
    Ran::note(context);
    reply.write(b"something first")?;
    Err(HandlerError::Decode("no".to_owned()))
}

/// Takes pieces as its type says.
struct Taker {
    taken: usize,
    how: MessageType,
}

impl Pieces<Ran> for Taker {
    fn take(
        &mut self,
        context: &Context<'_, Ran>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        Ran::note(context);
        if self.how == STUCK {
            return Ok(Progress::Took(bytes.len()));
        }
        let taken = match self.how {
            HALVES => bytes.len().div_ceil(2).min(reply.room() / 2),
            _ => bytes.len().min(reply.room()),
        };
        match self.how {
            HALVES => bytes[..taken].iter().try_for_each(|byte| reply.write(&[*byte, *byte]))?,
            _ => reply.write(&bytes[..taken])?,
        }
        self.taken += taken;
        if self.how == PANIC_LATER && self.taken > 2000 {
            std::panic::resume_unwind(Box::new(()));
        }
        Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
    }
}

fn taker(context: &Context<'_, Ran>, _: Option<u64>) -> Result<Box<dyn Pieces<Ran>>, HandlerError> {
    match context.message_type() {
        NEVER => Err(HandlerError::Decode("never".to_owned())),
        how => Ok(Box::new(Taker { taken: 0, how })),
    }
}

static TABLE: HandlerTable<Ran> = HandlerTable::empty()
    .on(ECHO, echo)
    .on_pieces(PIECES, taker)
    .on(BIG, big)
    .on(PANIC, panic)
    .on(ERR, err)
    .on_pieces(HALVES, taker)
    .on_pieces(STUCK, taker)
    .on_pieces(PANIC_LATER, taker)
    .on(SHORT, echo)
    .at_most(SHORT, SHORT_LEN)
    .on_pieces(NEVER, taker);

fn number(notice: Notice) -> Option<u32> {
    match notice {
        Notice::Opened { number, .. } => Some(number),
        Notice::Closed { .. } | Notice::Ended => None,
    }
}

/// A session: the client's end, and what names it at the server.
#[derive(Debug)]
pub struct Peer {
    /// The client's end of its only lane.
    pub lane: ClientLane,
    id: SessionId,
}

/// The server.
pub struct Simulation {
    core: Core<Ran>,
    state: Arc<Ran>,
    /// The server's CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// What the budget held before the first session.
    unused: u64,
    sessions: Vec<(SessionId, u64)>,
    /// Connections of sessions that have ended, and of those that had before the present step.
    ended: BTreeSet<u32>,
    buried: BTreeSet<u32>,
    faults: Vec<(SessionId, PeerFault)>,
}

impl fmt::Debug for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulation").field("now_ns", &self.now_ns).finish_non_exhaustive()
    }
}

impl Simulation {
    /// A server without sessions, whose budget has room for a few of them and for `pages` pages to lease.
    pub fn new(pages: u32, body_memory: u32) -> Self {
        let config = ServerConfig {
            max_message_size: MESSAGE_MAX as u64,
            body_memory: body_memory.into(),
            entries_per_turn: 16,
            bytes_per_turn: 64 << 10,
            max_connections: 16,
            max_sessions: 8,
            reactors: 1,
            ..ServerConfig::default()
        };
        let state = Arc::new(Ran::default());
        let budget = Budget::new(0);
        let unused = budget.used();
        let budget = Budget::new(unused + u64::from(pages) * PAGE as u64);
        let inbox = Inbox::default();
        let core = Core::new(TABLE.as_slice(), Arc::clone(&state), config, Totals::new(0, 1), inbox, budget);
        let (sessions, faults) = (Vec::new(), Vec::new());
        let (ended, buried) = (BTreeSet::new(), BTreeSet::new());
        Self { core, state, now_ns: 1, unused, sessions, ended, buried, faults }
    }

    /// A session on `segment`, which has one lane that nobody has used.
    pub fn open(&mut self, segment: Arc<Segment>) -> Option<Peer> {
        let geometry = *segment.geometry();
        let lane = ClientLane::open(segment.mapping(), &geometry, &LaneLayout::home(&geometry)).ok()?;
        let bytes = granted_bytes(&geometry) as u64 + PRIVATE_PER_SESSION;
        if !self.core.budget.take_session(bytes) {
            return None;
        }
        let id = self.core.open(SessionLane::new(segment, 0).ok()?);
        self.sessions.push((id, bytes));
        Some(Peer { lane, id })
    }

    /// A session on memory of its own.
    pub fn join(&mut self, geometry: Geometry) -> Option<Peer> {
        let identity = Identity { epoch: 1, session: [2, 3] };
        self.open(Arc::new(Segment::on_heap(geometry, 1, identity).ok()?))
    }

    /// Ends a session, as its death does. One that has been ended already stays so.
    pub fn end(&mut self, peer: &Peer) {
        self.end_session(peer.id);
        self.serve_memory();
        assert!(self.core.lane(peer.id).is_none());
        assert!(self.core.connections_of(peer.id).next().is_none());
    }

    fn end_session(&mut self, id: SessionId) {
        let numbers: Vec<u32> = self.core.connections_of(id).filter_map(number).collect();
        let Some(at) = self.sessions.iter().position(|(other, _)| *other == id) else { return };
        let (_, bytes) = self.sessions.swap_remove(at);
        self.ended.extend(numbers);
        assert!(self.core.unseat(id).is_some(), "a session that lives has a lane");
        self.core.budget.give_session(bytes);
    }

    /// Whether a session lives.
    pub fn lives(&mut self, peer: &Peer) -> bool {
        self.core.lane(peer.id).is_some()
    }

    /// How a session broke the protocol, if it did.
    pub fn fault_of(&self, peer: &Peer) -> Option<&PeerFault> {
        self.faults.iter().find(|(id, _)| *id == peer.id).map(|(_, fault)| fault)
    }

    /// One round, and what a reactor does after it; returns the entries and steps taken.
    pub fn round(&mut self) -> u32 {
        let now = self.now_ns;
        let taken = self.core.round(&mut || now, &mut |_, _| unreachable!("there is one reactor"));
        self.end_faulty();
        self.serve_memory();
        self.nothing_ran_of_the_dead();
        taken
    }

    /// Rounds until there is nothing to do; says whether that came.
    pub fn settle(&mut self) -> bool {
        (0..1000).any(|_| {
            let quiet = self.round() == 0 && !self.core.bodies_can_go_on();
            let ids: Vec<SessionId> = self.core.ids().collect();
            let mut work = |id| self.core.lane(id).is_some_and(|lane| lane.has_work() == Ok(true));
            quiet && !ids.into_iter().any(&mut work)
        })
    }

    /// What is due by the clock; `sweep`: every 50 ms.
    pub fn tick(&mut self, sweep: bool) {
        self.core.end_overdue(self.now_ns, sweep);
        self.end_faulty();
        let elsewhere = self.core.others_want_memory();
        let indices: Vec<u32> =
            self.core.ids().map(|id| id.index).filter(|i| self.core.has_leases(*i)).collect();
        for index in indices {
            let taken = self.core.look_after_leases(index, self.now_ns, elsewhere);
            assert!(taken.is_ok(), "memory on the heap is always had");
            self.end_faulty();
        }
        self.serve_memory();
        self.nothing_ran_of_the_dead();
    }

    fn serve_memory(&mut self) {
        if self.core.leases.has_work() {
            let now = self.now_ns;
            assert!(self.core.serve_memory(&mut || now).is_ok(), "memory on the heap is always had");
            self.end_faulty();
        }
        self.core.untouch();
    }

    fn end_faulty(&mut self) {
        while let Some((id, fault)) = self.core.take_fault() {
            self.faults.push((id, fault));
            self.end_session(id);
        }
    }

    fn nothing_ran_of_the_dead(&mut self) {
        let ran = std::mem::take(&mut *self.state.0.lock().unwrap_or_else(PoisonError::into_inner));
        let dead = ran.iter().find(|number| self.buried.contains(number));
        assert_eq!(dead, None, "a call of a session that has ended was run");
        // Those that ended in this very step may have run before that.
        self.buried.append(&mut self.ended);
    }

    /// Whether nothing is left of any session: to be asked when all have ended.
    pub fn is_unused(&self) -> bool {
        let unused = self.core.budget.used() == self.unused && self.core.body_bytes() == 0;
        unused && !self.core.has_exchanges() && !self.core.leases.has_work()
    }

    /// Compares what the core believes with what there is.
    ///
    /// # Panics
    ///
    /// If the two differ: that is a mistake of the server, whatever a client did.
    pub fn check(&mut self) {
        assert_eq!(self.core.ids().count(), self.sessions.len());
        let leased = audit(&mut self.core);
        let sessions: u64 = self.sessions.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(self.core.budget.used(), self.unused + sessions + leased, "the budget");
        assert_eq!(self.core.budget.waiting(), u32::from(self.core.leases.len() > 0), "who waits");
    }
}

/// Compares what a core believes of its lanes with what there is of them; returns the bytes that are leased.
///
/// # Panics
///
/// If the two differ.
pub(super) fn audit<S>(core: &mut Core<S>) -> u64 {
    let message_max = core.config().max_message_size as usize;
    let ids: Vec<SessionId> = core.ids().collect();
    let (mut live, mut reserved, mut with_deadline, mut pages, mut seen) = (0, 0, 0, 0, BTreeSet::new());
    for id in &ids {
        let Some(lane) = core.lane(*id) else { panic!("{id:?} has no lane") };
        pages += lane.lane().leases.pages();
        let all = lane.exchanges.iter().flat_map(|all| all.all()).collect::<Vec<_>>();
        let granted: BTreeSet<u32> = lane
            .lane()
            .leases
            .granted()
            .iter()
            .flat_map(|lease| lease.page..lease.page + lease.pages)
            .collect();
        let base = lane.segment().geometry().base_pages();
        let mut lent = BTreeSet::new();
        for index in all {
            assert!(seen.insert(index), "exchange {index} is in two lanes");
            let Some(e) = core.exchanges().get_mut(index) else { panic!("no exchange {index}") };
            assert_eq!(e.seat, id.index);
            live += 1;
            with_deadline += u32::from(e.call.deadline != 0);
            if let Work::Whole(body) = &e.work {
                reserved += body.reserved;
            }
            let window: Vec<u32> = e.window_slots().collect();
            let parked = e
                .parked
                .iter()
                .map(|frame| frame.slot)
                .filter(|slot| *slot != e.call.slot && !window.contains(slot));
            for slot in window.iter().copied().chain(parked).chain([e.call.slot]) {
                assert!(lent.insert(slot), "slot {slot} is lent twice");
                let page = slot / 4;
                assert!(page < base || granted.contains(&page), "slot {slot} is nobody's");
            }
            assert!(e.filled <= e.window.capacity && e.window.capacity >= SLOT_SMALL as u32);
            assert!(e.window.frame.wrapping_sub(e.window.released) <= e.window.count);
            assert!(e.spill.len() <= message_max && e.sent <= message_max);
        }
    }
    assert_eq!(core.exchanges().live(), live, "exchanges without a lane");
    assert_eq!(core.exchanges().reserved(), reserved, "memory of bodies");
    assert_eq!(core.exchanges().with_deadline, with_deadline);
    let leased = u64::from(pages) * PAGE as u64;
    assert_eq!(core.metrics.leased_bytes, leased);
    leased
}

#[cfg(test)]
mod tests {
    //! What the fuzz target `session` has found, and what was found on the way to it.

    use super::*;
    use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
    use doorbell_shm::slots::ClientWord;
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;
    use std::sync::atomic::Ordering::Relaxed;

    /// Sixteen entries a ring; small slots from number 0 on, lease pages behind them.
    const GEOMETRY: Geometry = Geometry { ring_order: 4, large: 0, medium: 0, small: 32, lease_pages: 64 };

    struct Client {
        peer: Peer,
        connection: u32,
        generations: Vec<u32>,
    }

    impl Client {
        fn join(simulation: &mut Simulation, geometry: Geometry) -> Self {
            let peer = simulation.join(geometry).expect("room for a session");
            let generations = vec![0; peer.lane.slots.numbers() as usize];
            let mut client = Self { peer, connection: 0, generations };
            let open = client.named(0, Submission { kind: kind::OPEN, ..Submission::default() });
            client.push(&open);
            simulation.round();
            client.connection = client.taken().detail as u32;
            client
        }

        /// `entry` with a name: the slot and its next generation.
        fn named(&mut self, slot: u32, entry: Submission) -> Submission {
            let generation = &mut self.generations[slot as usize];
            *generation += 1;
            Submission { slot, generation: *generation, ..entry }
        }

        fn push(&mut self, entry: &Submission) {
            assert!(self.peer.lane.submissions[0].push(entry.pack()).unwrap(), "the ring is full");
        }

        /// A call in one frame that is answered in its own slot.
        fn call(&mut self, message_type: MessageType, slot: u32, body: &[u8]) -> Submission {
            self.peer.lane.common.payload.write(LaneLayout::slot_offset(slot), body);
            let entry = Submission {
                kind: kind::CALL,
                flags: flag::END,
                message_type: message_type.0,
                connection: self.connection,
                len: body.len() as u32,
                response_count: 1,
                response_slot: slot,
                ..Submission::default()
            };
            self.named(slot, entry)
        }

        /// Its first frame, empty; `body_len` is 0 if it is not known.
        fn begin(
            &mut self,
            message_type: MessageType,
            slot: u32,
            window: (u32, u16),
            body_len: u64,
        ) -> Submission {
            let call = self.call(message_type, slot, b"");
            let (response_slot, response_count) = window;
            let call = Submission { flags: flag::MORE, response_slot, response_count, body_len, ..call };
            self.push(&call);
            call
        }

        /// A frame in the slot that names its call.
        fn frame(&mut self, call: &Submission, frame: u32, body: &[u8], last: bool) {
            self.peer.lane.common.payload.write(LaneLayout::slot_offset(call.slot), body);
            self.push(&Submission {
                kind: kind::FRAME,
                flags: if last { flag::END } else { flag::MORE },
                slot: call.slot,
                generation: call.generation,
                len: body.len() as u32,
                frame,
                payload_slot: call.slot,
                ..Submission::default()
            });
        }

        fn lease(&mut self, slot: u32, bytes: usize, slots: u16) -> Submission {
            let (len, response_count) = (bytes as u32, slots);
            let lease = Submission { kind: kind::LEASE, len, response_count, ..Submission::default() };
            let lease = self.named(slot, lease);
            self.push(&lease);
            lease
        }

        fn word(&self, call: &Submission, cancelled: bool, released: u32) {
            let word = ClientWord { generation: call.generation, cancelled, released };
            self.peer.lane.common.client_words[call.slot as usize].store(word.pack(), Relaxed);
            self.peer.lane.common.hints.set(call.slot);
        }

        fn next(&mut self) -> Option<Completion> {
            let words = self.peer.lane.completions[0].pop().unwrap()?;
            self.peer.lane.completions[0].publish();
            Some(Completion::unpack(words).unwrap())
        }

        fn taken(&mut self) -> Completion {
            self.next().expect("a completion")
        }

        fn read(&self, slot: u32, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.peer.lane.common.payload.read(LaneLayout::slot_offset(slot), &mut bytes);
            bytes
        }
    }

    /// Goal:   P4: frames of an answer do not take the place of completions whose calls have been taken from the ring
    ///         and have not run.
    /// Method: a completion ring half full; in one batch the last frame of a call with a wide window, and behind it as
    ///         many calls as there is space for.
    #[test]
    fn p4_frames_leave_space_for_the_calls_behind_them_in_their_batch() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let lease = client.lease(1, 4096, 4);
        simulation.round();
        let granted = client.taken();
        assert_eq!((granted.slot, granted.detail >> 32), (lease.slot, 4));
        for slot in 8..16 {
            let echo = client.call(ECHO, slot, b"before");
            client.push(&echo);
        }
        simulation.round();
        let big = Submission {
            flags: flag::END | flag::LEASED,
            payload_slot: 1,
            response_slot: granted.detail as u32,
            response_count: 4,
            lease_epoch: granted.frame,
            ..client.call(BIG, 1, b"")
        };
        client.push(&big);
        for slot in 16..24 {
            let echo = client.call(ECHO, slot, b"behind");
            client.push(&echo);
        }
        simulation.round();
        simulation.check();
        assert_eq!(simulation.fault_of(&client.peer), None);
        let (mut replies, mut frames) = (0, 0);
        for _ in 0..100 {
            while let Some(completion) = client.next() {
                let is_frame = completion.kind == kind::FRAME;
                (replies, frames) = (replies + u32::from(!is_frame), frames + u32::from(is_frame));
                client.word(&big, false, frames);
            }
            simulation.round();
            simulation.check();
        }
        assert_eq!((replies, frames), (17, BIG_LEN as u32 / 4096 - 1));
    }

    /// Goal:   what a lane has returned is in the budget again even if the lane ends before its RETURN is answered.
    /// Method: a RETURN, and behind it an entry that ends the session.
    #[test]
    fn f23_a_lease_that_was_returned_is_nobodys_when_its_session_ends_at_once() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        client.lease(1, 16384, 4);
        simulation.round();
        let granted = client.taken();
        let back = Submission {
            kind: kind::RETURN,
            flags: flag::LEASED,
            payload_slot: granted.detail as u32,
            lease_epoch: granted.frame,
            ..Submission::default()
        };
        let back = client.named(1, back);
        client.push(&back);
        client.push(&Submission { kind: 99, ..Submission::default() });
        simulation.round();
        assert!(!simulation.lives(&client.peer));
        assert_eq!(simulation.fault_of(&client.peer), Some(&PeerFault::Kind { kind: 99 }));
        simulation.check();
    }

    /// Goal:   a LEASE that is cancelled while it waits leaves nobody waiting: else every reactor would go on taking
    ///         leases back for it.
    #[test]
    fn f59_a_lease_that_is_cancelled_waits_no_more() {
        let mut simulation = Simulation::new(8 + 3 + 8, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        while simulation.core.budget.take(1, 1, PAGE as u64) > 0 {
            simulation.unused += PAGE as u64;
        }
        let lease = client.lease(1, 16384, 1);
        simulation.round();
        simulation.check();
        assert_eq!(simulation.core.budget.waiting(), 1);
        client.word(&lease, true, 0);
        simulation.round();
        assert_eq!(client.taken().status, Status::Cancelled as u8);
        simulation.check();
        assert_eq!((simulation.core.budget.waiting(), simulation.core.leases.waits_since_ns), (0, 0));
    }

    /// Goal:   S2: what is left in a queue of a call that has ended concerns nobody's call that came after it.
    /// Method: memory comes for a body that waits, which is cancelled in the same round; its record becomes that of
    ///         another session's call, which waits too and is then moved by whoever finds it.
    #[test]
    fn s2_memory_that_came_for_a_body_that_has_ended_moves_nobody_elses() {
        let mut simulation = Simulation::new(256, 4096);
        let mut clients = [(); 3].map(|()| Client::join(&mut simulation, GEOMETRY));
        let holders = [1, 2].map(|slot| clients[0].begin(ECHO, slot, (slot, 1), 2000));
        simulation.round();
        let waits = clients[1].begin(ECHO, 1, (1, 1), 4000);
        simulation.round();
        clients[0].word(&holders[0], true, 0);
        clients[1].word(&waits, true, 0);
        let body: Vec<u8> = (0..4000).map(|i| (i % 251) as u8).collect();
        let call = clients[2].call(ECHO, 2, &body[..1000]);
        let call = Submission { flags: flag::MORE, response_slot: 3, body_len: 4000, ..call };
        clients[2].push(&call);
        simulation.round();
        clients[0].word(&holders[1], true, 0);
        for frame in 1..=3 {
            assert!(simulation.settle());
            simulation.check();
            let from = frame as usize * 1000;
            clients[2].frame(&call, frame, &body[from..][..1000], frame == 3);
        }
        let mut answer = Vec::new();
        while answer.len() < 4000 {
            assert!(simulation.settle());
            simulation.check();
            let frame = clients[2].taken();
            assert_eq!(frame.status, Status::Ok as u8);
            answer.extend(clients[2].read(3, frame.len as usize));
            clients[2].word(&call, false, frame.frame + 1);
        }
        assert!(answer == body, "bytes of another session");
        for client in &clients {
            simulation.end(&client.peer);
            simulation.check();
        }
        assert!(simulation.is_unused());
    }

    /// Goal:   a body that can have its memory gets it when it is there, not when some other body has ended.
    /// Method: a long body before two short ones, all of which wait for it; then neither of these ends.
    #[test]
    fn p3_all_bodies_for_which_there_is_memory_go_on() {
        let mut simulation = Simulation::new(256, 4096);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let long = client.begin(ECHO, 1, (1, 1), 4096);
        client.begin(ECHO, 2, (2, 1), 1000);
        client.begin(ECHO, 3, (3, 1), 1000);
        simulation.round();
        client.word(&long, true, 0);
        assert!(simulation.settle());
        simulation.check();
        assert_eq!(simulation.core.body_bytes(), 2000);
    }

    /// Goal:   a call that stands still for long with a deadline that has not come is left alone, for however many
    ///         sweeps.
    #[test]
    fn r1_5_a_body_may_stand_still_for_any_number_of_sweeps() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let call = client.call(ECHO, 1, b"");
        let call = Submission { flags: flag::MORE, deadline: u64::MAX, ..call };
        client.push(&call);
        for _ in 0..600 {
            simulation.round();
            simulation.tick(true);
        }
        client.frame(&call, 1, b"late", true);
        assert!(simulation.settle());
        assert_eq!((client.taken().status, client.read(1, 4)), (Status::Ok as u8, b"late".to_vec()));
    }

    /// Goal:   R2.8, R5.1: a short call waits for no step of a long one, whose copies take their time: also if frames of it
    ///         lie before the short call in the ring.
    /// Method: the last frames of two calls, then a short call, all there when the reactor looks.
    #[test]
    fn r2_8_r5_1_a_short_call_comes_before_frames_that_lie_before_it() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let long = [1, 2].map(|slot| client.begin(ECHO, slot, (slot, 1), 0));
        assert!(simulation.settle());
        long.iter().for_each(|call| client.frame(call, 1, b"last", true));
        let short = client.call(ECHO, 3, b"short");
        client.push(&short);
        assert!(simulation.settle());
        let answered: Vec<u32> = std::iter::from_fn(|| client.next()).map(|answer| answer.slot).collect();
        assert_eq!(answered, [3, 1, 2]);
    }

    thread_local! {
        /// What happens while the next handler of this thread runs.
        pub(super) static MEANWHILE: Cell<Option<Box<dyn FnOnce()>>> = const { Cell::new(None) };
    }

    /// Goal:   R2.8, R5.1: a short call waits for at most one step of a long one.
    /// Method: the last frames of two long calls are there; a short call comes while the first of them has its step.
    #[test]
    fn r2_8_r5_1_a_short_call_waits_for_one_step_of_a_long_one() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let long = [1, 2].map(|slot| client.begin(ECHO, slot, (slot, 1), 0));
        assert!(simulation.settle());
        long.iter().for_each(|call| client.frame(call, 1, b"last", true));
        let client = Rc::new(RefCell::new(client));
        let shared = Rc::clone(&client);
        MEANWHILE.set(Some(Box::new(move || {
            let mut client = shared.borrow_mut();
            let short = client.call(ECHO, 3, b"short");
            client.push(&short);
        })));
        assert!(simulation.settle());
        let answers = std::iter::from_fn(|| client.borrow_mut().next());
        assert_eq!(answers.map(|answer| answer.slot).collect::<Vec<_>>(), [1, 3, 2]);
    }

    /// Goal:   R1.5, R2.8: long calls go on however many short ones their session makes: those fill every turn of the lane,
    ///         and are not all it is for.
    /// Method: a frame of a long call, then more short calls than a turn takes, before every round.
    #[test]
    fn r1_5_r2_8_a_long_call_goes_on_beside_short_ones_without_end() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, Geometry { ring_order: 5, ..GEOMETRY });
        let long = client.begin(ECHO, 1, (1, 1), 0);
        assert!(simulation.settle());
        client.frame(&long, 1, b"last", true);
        for _ in 0..10 {
            for slot in 2..2 + 16 {
                let short = client.call(ECHO, slot, b"short");
                client.push(&short);
            }
            assert!(simulation.round() >= 16, "short calls fill the turn");
            while let Some(answer) = client.next() {
                if answer.slot == 1 {
                    return;
                }
            }
        }
        panic!("the long call did not move");
    }

    /// Goal:   R1.5: a handler that takes its request in parts finds it as it came, although its answer lies where the
    ///         request does.
    /// Method: one frame in the slot that names the call, and in a leased one; a handler that takes half of what it is
    ///         given each time and answers with it.
    #[test]
    fn r1_5_an_answer_does_not_overwrite_what_is_left_of_its_request() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        let body: Vec<u8> = (0..512).map(|i| (i % 251) as u8).collect();
        let twice: Vec<u8> = body.iter().flat_map(|byte| [*byte, *byte]).collect();
        let call = client.call(HALVES, 1, &body);
        client.push(&call);
        assert!(simulation.settle());
        let answer = client.taken();
        assert_eq!((answer.status, answer.len), (Status::Ok as u8, 1024));
        assert!(client.read(1, 1024) == twice);
        client.lease(2, 4096, 1);
        simulation.round();
        let granted = client.taken();
        let first = granted.detail as u32;
        client.peer.lane.common.payload.write(LaneLayout::slot_offset(first), &body);
        let call = client.call(HALVES, 2, b"");
        let call = Submission {
            flags: flag::END | flag::LEASED,
            payload_slot: first,
            response_slot: first,
            lease_epoch: granted.frame,
            len: 512,
            ..call
        };
        client.push(&call);
        simulation.round();
        simulation.check();
        assert!(simulation.settle());
        assert!(client.taken().status == Status::Ok as u8 && client.read(first, 1024) == twice);
    }

    /// Goal:   R1.5: an answer in pieces that is longer than a message may be is too large, even if what is too much fits
    ///         the slot that is being written.
    /// Method: answers of exactly the limit, and of two bytes more.
    #[test]
    fn r1_5_an_answer_in_pieces_ends_at_the_limit() {
        for (len, expected) in [(MESSAGE_MAX / 2, Status::Ok), (MESSAGE_MAX / 2 + 1, Status::TooLarge)] {
            let mut simulation = Simulation::new(64, 1 << 20);
            let mut client = Client::join(&mut simulation, GEOMETRY);
            let call = client.begin(HALVES, 1, (2, 1), len as u64);
            let (mut sent, mut frames, mut answer) = (0, 0, 0);
            let reply = loop {
                assert!(simulation.settle());
                let word = client.peer.lane.common.server_words[1].load(Relaxed);
                if sent < len && (word >> 32) as u32 > frames {
                    let part = (len - sent).min(1024);
                    (sent, frames) = (sent + part, frames + 1);
                    client.frame(&call, frames, &vec![5; part], sent == len);
                }
                if let Some(completion) = client.next() {
                    if completion.kind == kind::REPLY {
                        break completion;
                    }
                    answer += completion.len as usize;
                    client.word(&call, false, completion.frame + 1);
                }
            };
            assert_eq!((reply.status, answer <= MESSAGE_MAX), (expected as u8, true));
            if expected == Status::Ok {
                assert_eq!(answer + reply.len as usize, MESSAGE_MAX);
            }
            simulation.check();
        }
    }

    /// Goal:   a lease that its client uses while it says that it uses none is taken, and with it the calls that have it:
    ///         no slot is lent to two of them.
    #[test]
    fn f59_calls_end_with_the_memory_that_their_client_says_it_does_not_use() {
        let mut simulation = Simulation::new(64, 1 << 20);
        let mut client = Client::join(&mut simulation, GEOMETRY);
        client.lease(2, 4096, 1);
        simulation.round();
        let granted = client.taken();
        let call = client.call(PIECES, 1, b"");
        client.push(&Submission {
            flags: flag::MORE | flag::LEASED,
            payload_slot: 1,
            response_slot: granted.detail as u32,
            lease_epoch: granted.frame,
            ..call
        });
        simulation.round();
        for _ in 0..3 {
            simulation.now_ns += 1_000_000_000;
            simulation.tick(true);
            simulation.check();
        }
        assert_eq!(client.taken().status, Status::TakenBack as u8);
        assert_eq!(simulation.core.metrics.leased_bytes, 0);
    }
}

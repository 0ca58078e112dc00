//! The sans-I/O heart of a reactor: sessions, connections, the hot set, dispatch. Time, hellos, segments
//! and hang-ups are its inputs; completions to ring for and sessions to end its outputs.

use super::connections::ConnectionPool;
use super::session::{Batch, Bench, Session};
use super::staging::BufferPool;
use super::table::Handler;
use crate::config::{MESSAGE_MAX, ServerConfig};
use crate::metrics::Metrics;
use crate::protocol::handshake::{DisconnectReason, Hello, VERSION_MAX, Welcome, code};
use doorbell_shm::layout::{Geometry, state};
use doorbell_shm::segment::Segment;
use doorbell_shm::{PeerFault, SegmentError};

/// Names a session for as long as it lives: a number used again later has another generation (S10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SessionId {
    pub index: u32,
    pub generation: u32,
}

/// What a hello deserves.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// A session of this geometry; the answer lacks epoch and ids.
    Grant(Geometry, Box<Welcome>),
    /// This answer, then the end.
    Refuse(Box<Welcome>),
}

#[derive(Debug, Default)]
struct Seat {
    generation: u32,
    session: Option<Box<Session>>,
    hot: bool,
    /// Is among [`Core::touched`].
    touched: bool,
}

pub(crate) struct Core<S: 'static> {
    handlers: &'static [Option<Handler<S>>],
    state: S,
    config: ServerConfig,
    seats: Vec<Seat>,
    free: Vec<u32>,
    live: u32,
    /// Seats whose lanes are polled.
    hot: Vec<u32>,
    /// Seats that completed something since the last [`Core::untouch`]: their clients may have to be woken.
    touched: Vec<u32>,
    /// Sessions that broke the protocol in this round.
    faults: Vec<(SessionId, PeerFault)>,
    connections: ConnectionPool,
    staging: BufferPool,
    batch: Box<Batch>,
    pub metrics: Metrics,
    draining: bool,
}

impl<S> Core<S> {
    /// Makes every table at its full size: nothing is allocated while serving but a session's own record.
    pub fn new(handlers: &'static [Option<Handler<S>>], state: S, config: ServerConfig) -> Self {
        let sessions = config.max_sessions;
        Self {
            handlers,
            state,
            seats: Vec::new(),
            free: Vec::new(),
            live: 0,
            hot: Vec::with_capacity(sessions as usize),
            touched: Vec::with_capacity(sessions as usize),
            faults: Vec::new(),
            connections: ConnectionPool::new(config.max_connections),
            staging: BufferPool::new(),
            batch: Box::new(Batch::new()),
            metrics: Metrics::default(),
            draining: false,
            config,
        }
    }

    pub fn config(&self) -> &ServerConfig {
        &self.config
    }

    /// Judges a first message. `now_ns` is the server's CLOCK_MONOTONIC.
    pub fn judge(&self, hello: &[u8], now_ns: u64) -> Verdict {
        let refuse = |code| Verdict::Refuse(Box::new(Welcome::refusal(code)));
        let hello = match Hello::read(hello) {
            Ok(hello) => hello,
            Err(code) => return refuse(code),
        };
        if self.draining {
            return Verdict::Refuse(Box::new(Welcome { retry_ms: 100, ..Welcome::refusal(code::DRAINING) }));
        }
        if self.live >= self.config.max_sessions {
            let limit = self.config.max_sessions;
            return Verdict::Refuse(Box::new(Welcome {
                retry_ms: 100,
                limit,
                ..Welcome::refusal(code::TOO_MANY)
            }));
        }
        let Ok(mut geometry) = Geometry::unpack(hello.geometry).checked() else {
            return refuse(code::BAD_HELLO);
        };
        // Leases are not granted; rings and base slots are, up to the limits.
        geometry.lease_pages = 0;
        geometry.ring_order = geometry.ring_order.min(self.config.max_ring_order);
        if geometry.base_pages() > self.config.max_slot_pages {
            let limit = self.config.max_slot_pages;
            return Verdict::Refuse(Box::new(Welcome { limit, ..Welcome::refusal(code::NO_MEMORY) }));
        }
        let welcome = Welcome {
            version: VERSION_MAX.min(hello.version_max),
            geometry: geometry.pack(),
            lanes: 1,
            clock_offset_ns: now_ns.wrapping_sub(hello.now_ns),
            max_message_size: MESSAGE_MAX as u64,
            ..Welcome::refusal(code::OK)
        };
        Verdict::Grant(geometry, Box::new(welcome))
    }

    /// Seats a session. Its lane starts hot: a first call usually follows at once.
    pub fn open(&mut self, segment: Segment) -> Result<SessionId, SegmentError> {
        let session = Box::new(Session::new(segment)?);
        let index = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Seat::default());
            self.seats.len() as u32 - 1
        });
        let seat = &mut self.seats[index as usize];
        seat.generation = seat.generation.wrapping_add(1);
        seat.session = Some(session);
        seat.hot = false;
        self.live += 1;
        self.metrics.sessions_opened += 1;
        let id = SessionId { index, generation: seat.generation };
        self.heat(id);
        Ok(id)
    }

    /// Ends a session: tells the client in its segment, closes its connections, frees its seat.
    pub fn close(&mut self, id: SessionId, reason: DisconnectReason) {
        let Some(session) = self.session(id) else { return };
        session.segment().set_state(state::CLOSED, reason as u32);
        let seat = &mut self.seats[id.index as usize];
        seat.session = None;
        if seat.hot {
            self.hot.retain(|i| *i != id.index);
        }
        self.free.push(id.index);
        self.live -= 1;
        self.connections.close_all(id.index);
        self.metrics.connections_open = self.connections.open_count().into();
        self.metrics.count_end(reason);
    }

    /// The session that `id` names, if it still lives.
    pub fn session(&mut self, id: SessionId) -> Option<&mut Session> {
        let seat = self.seats.get_mut(id.index as usize)?;
        if seat.generation != id.generation {
            return None;
        }
        seat.session.as_deref_mut()
    }

    /// Sessions that live.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Ids of all sessions that live.
    pub fn ids(&self) -> impl Iterator<Item = SessionId> + '_ {
        self.seats
            .iter()
            .enumerate()
            .filter(|(_, seat)| seat.session.is_some())
            .map(|(index, seat)| SessionId { index: index as u32, generation: seat.generation })
    }

    /// Tells every client that no new calls are taken; hellos are refused from now on.
    pub fn drain(&mut self) {
        self.draining = true;
        for seat in &self.seats {
            if let Some(session) = &seat.session {
                session.segment().set_state(state::DRAINING, DisconnectReason::Draining as u32);
            }
        }
    }

    /// One turn for every hot lane; returns the entries taken. Afterwards [`Core::touched`] and
    /// [`Core::take_fault`] say whom to wake and whom to end.
    #[inline]
    pub fn round(&mut self, now_ns: &mut dyn FnMut() -> u64) -> u32 {
        let mut total = 0;
        let mut bench = Bench {
            handlers: self.handlers,
            state: &self.state,
            connections: &mut self.connections,
            staging: &mut self.staging,
            metrics: &mut self.metrics,
            batch: &mut self.batch,
            now_ns,
            entries_per_turn: self.config.entries_per_turn,
        };
        for &index in &self.hot {
            let seat = &mut self.seats[index as usize];
            let Some(session) = seat.session.as_deref_mut() else { continue };
            match session.turn(index, &mut bench) {
                Ok(0) => {}
                Ok(taken) => {
                    total += taken;
                    if !seat.touched {
                        seat.touched = true;
                        self.touched.push(index);
                    }
                }
                Err(fault) => {
                    let id = SessionId { index, generation: seat.generation };
                    self.faults.push((id, fault));
                }
            }
        }
        total
    }

    /// Lanes that completed something and whose clients have not been looked at behind a fence.
    pub fn touched(&self) -> &[u32] {
        &self.touched
    }

    /// The session seated at `index`, if any.
    #[inline(always)]
    pub fn seated(&self, index: u32) -> Option<&Session> {
        self.seats.get(index as usize)?.session.as_deref()
    }

    /// Forgets who was touched: they have been woken.
    pub fn untouch(&mut self) {
        for index in self.touched.drain(..) {
            self.seats[index as usize].touched = false;
        }
    }

    /// A session that broke the protocol, and how.
    pub fn take_fault(&mut self) -> Option<(SessionId, PeerFault)> {
        self.faults.pop()
    }

    /// Puts a lane among those polled.
    pub fn heat(&mut self, id: SessionId) {
        let Some(seat) = self.seats.get_mut(id.index as usize) else { return };
        if seat.generation == id.generation && seat.session.is_some() && !seat.hot {
            seat.hot = true;
            self.hot.push(id.index);
        }
    }

    /// Lanes that are polled.
    pub fn hot_lanes(&self) -> impl Iterator<Item = SessionId> + '_ {
        let id = |&index: &u32| SessionId { index, generation: self.seats[index as usize].generation };
        self.hot.iter().map(id)
    }

    /// Takes a lane from those polled: its bell is armed.
    pub fn cool(&mut self, id: SessionId) {
        let Some(seat) = self.seats.get_mut(id.index as usize) else { return };
        if seat.generation == id.generation && seat.hot {
            seat.hot = false;
            self.hot.retain(|i| *i != id.index);
        }
    }

    /// Whether this lane is not polled: only its bell, or the sweep, brings it back.
    pub fn is_cold(&self, id: SessionId) -> bool {
        self.seats.get(id.index as usize).is_some_and(|seat| seat.generation == id.generation && !seat.hot)
    }

    /// Whether no lane is polled.
    pub fn all_cold(&self) -> bool {
        self.hot.is_empty()
    }
}

#[cfg(test)]
mod tests {
    //! The core without a kernel: segments on the heap, a client's lane beside it, time by hand.

    use super::*;
    use crate::protocol::MessageType;
    use crate::server::table::{Context, HandlerError, HandlerTable, Reply};
    use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
    use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
    use doorbell_shm::layout::LaneLayout;
    use doorbell_shm::segment::Identity;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// Answers with how many calls came before it.
    const COUNT: MessageType = MessageType::USER;

    fn count(context: &Context<'_, AtomicU64>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
        reply.write(&context.state().fetch_add(1, Relaxed).to_le_bytes())
    }

    static TABLE: HandlerTable<AtomicU64> = HandlerTable::with_builtins().on(COUNT, count);

    fn core(config: ServerConfig) -> Core<AtomicU64> {
        Core::new(TABLE.as_slice(), AtomicU64::new(0), config)
    }

    /// A client's end on the heap, with one open connection of each priority.
    struct Client {
        lane: ClientLane,
        id: SessionId,
        connections: [u32; 2],
    }

    const GEOMETRY: Geometry = Geometry { ring_order: 6, large: 0, medium: 0, small: 128, lease_pages: 0 };

    impl Client {
        fn join(core: &mut Core<AtomicU64>) -> Self {
            let segment = Segment::on_heap(GEOMETRY, 1, Identity { epoch: 1, session: [2, 3] }).unwrap();
            let lane = ClientLane::open(segment.mapping(), &GEOMETRY, &LaneLayout::home(&GEOMETRY)).unwrap();
            let id = core.open(segment).unwrap();
            let mut client = Self { lane, id, connections: [0; 2] };
            for ring in [INTERACTIVE, BULK] {
                client.control(if ring == BULK { flag::BULK } else { 0 });
                core.round(&mut || 0);
                client.connections[ring] = client.take(INTERACTIVE).unwrap().detail as u32;
            }
            client
        }

        fn control(&mut self, flags: u16) {
            let grant = self.lane.slots.take(0).unwrap();
            let (slot, generation) = (grant.slot, grant.generation);
            let entry = Submission { kind: kind::OPEN, flags, slot, generation, ..Submission::default() };
            assert!(self.lane.submissions[INTERACTIVE].push(entry.pack()).unwrap());
            self.lane.slots.advance(grant);
        }

        fn call(&mut self, ring: usize, deadline: u64) -> bool {
            let Some(grant) = self.lane.slots.take(8) else { return false };
            let entry = Submission {
                kind: kind::CALL,
                flags: flag::END,
                message_type: COUNT.0,
                connection: self.connections[ring],
                slot: grant.slot,
                generation: grant.generation,
                response_count: 1,
                response_slot: grant.slot,
                deadline,
                ..Submission::default()
            };
            if !self.lane.submissions[ring].push(entry.pack()).unwrap() {
                self.lane.slots.put_back(grant.slot);
                return false;
            }
            self.lane.slots.advance(grant);
            true
        }

        fn take(&mut self, ring: usize) -> Option<Completion> {
            let words = self.lane.completions[ring].pop().unwrap()?;
            self.lane.completions[ring].publish();
            let completion = Completion::unpack(words).unwrap();
            self.lane.slots.put_back(completion.slot);
            Some(completion)
        }

        fn count_of(&self, completion: Completion) -> u64 {
            let mut bytes = [0; 8];
            self.lane.common.payload.read(LaneLayout::slot_offset(completion.slot), &mut bytes);
            u64::from_le_bytes(bytes)
        }
    }

    /// Goal:   S5: a client that takes no completion stalls itself, and no completion is ever lost.
    /// Method: more calls than the completion ring admits, none taken, then all taken.
    #[test]
    fn s5_trap05_admission_stops_before_the_completion_ring_is_full() {
        let mut core = core(ServerConfig { entries_per_turn: 1000, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        let admitted = u64::from(GEOMETRY.admitted());
        let mut sent = 0;
        for _ in 0..100 {
            while client.call(INTERACTIVE, 0) {
                sent += 1;
            }
            core.round(&mut || 0);
        }
        // The ring took what it holds, and the server ran what it could answer.
        assert_eq!(core.state.load(Relaxed), admitted);
        assert_eq!(sent, admitted + u64::from(GEOMETRY.ring_len()).min(128 - admitted));
        assert_eq!(core.session(client.id).unwrap().asleep_state(), doorbell_shm::bell::ASLEEP_WANTS_SPACE);
        let mut answered = 0;
        while answered < sent {
            while let Some(completion) = client.take(INTERACTIVE) {
                assert_eq!(client.count_of(completion), answered, "in order, none lost");
                answered += 1;
            }
            core.round(&mut || 0);
        }
        assert_eq!(core.session(client.id).unwrap().asleep_state(), doorbell_shm::bell::ASLEEP);
    }

    /// Goal:   S7: a client with a full ring does not keep others waiting for more than its turn.
    /// Method: 60 calls of one, one call of another behind them, one round.
    #[test]
    fn s7_every_lane_has_its_turn() {
        let mut core = core(ServerConfig { entries_per_turn: 8, ..ServerConfig::default() });
        let (mut greedy, mut modest) = (Client::join(&mut core), Client::join(&mut core));
        for _ in 0..60 {
            assert!(greedy.call(INTERACTIVE, 0));
        }
        assert!(modest.call(INTERACTIVE, 0));
        core.round(&mut || 0);
        let completion = modest.take(INTERACTIVE).expect("answered in the first round");
        assert_eq!(modest.count_of(completion), 8, "behind one turn of the other");
    }

    /// Goal:   R2.8: an interactive call overtakes queued bulk ones.
    /// Method: bulk calls first, an interactive one last, all in one round.
    #[test]
    fn r2_8_interactive_entries_are_taken_before_bulk_ones() {
        let mut core = core(ServerConfig::default());
        let mut client = Client::join(&mut core);
        for _ in 0..5 {
            assert!(client.call(BULK, 0));
        }
        assert!(client.call(INTERACTIVE, 0));
        core.round(&mut || 0);
        let completion = client.take(INTERACTIVE).unwrap();
        assert_eq!(client.count_of(completion), 0);
        for expected in 1..=5 {
            let completion = client.take(BULK).unwrap();
            assert_eq!(client.count_of(completion), expected);
        }
    }

    /// Goal:   R2.9, S11: a call whose deadline has passed is answered so and not run; the clock is asked
    ///         only where there is a deadline.
    /// Method: time is an input.
    #[test]
    fn r2_9_s11_a_passed_deadline_is_answered_and_nothing_runs() {
        let mut core = core(ServerConfig::default());
        let mut client = Client::join(&mut core);
        for deadline in [0, 99, 100, 101] {
            assert!(client.call(INTERACTIVE, deadline));
        }
        let mut asked = 0;
        core.round(&mut || {
            asked += 1;
            100
        });
        let status: Vec<u8> = std::iter::from_fn(|| client.take(INTERACTIVE)).map(|c| c.status).collect();
        let (ok, late) = (Status::Ok as u8, Status::DeadlineExceeded as u8);
        assert_eq!(status, [ok, late, late, ok]);
        assert_eq!((asked, core.state.load(Relaxed)), (3, 2));
    }

    /// Goal:   S9, S10: a fault ends the session it came from; its number, used again, is another session.
    /// Method: a broken entry between two good clients.
    #[test]
    fn s9_s10_a_fault_ends_one_session_and_its_number_gets_a_new_generation() {
        let mut core = core(ServerConfig::default());
        let (mut bad, mut good) = (Client::join(&mut core), Client::join(&mut core));
        assert!(bad.call(INTERACTIVE, 0) && good.call(INTERACTIVE, 0));
        let broken = Submission { kind: 99, ..Submission::default() };
        assert!(bad.lane.submissions[INTERACTIVE].push(broken.pack()).unwrap());
        core.round(&mut || 0);
        assert_eq!(core.take_fault(), Some((bad.id, PeerFault::Kind { kind: 99 })));
        assert!(bad.take(INTERACTIVE).is_some(), "what came before the broken entry was answered");
        assert!(good.take(INTERACTIVE).is_some());
        core.close(bad.id, DisconnectReason::ProtocolViolation);
        let next = Client::join(&mut core);
        assert_eq!(next.id.index, bad.id.index);
        assert!(core.session(bad.id).is_none() && core.session(next.id).is_some());
        assert_eq!(core.metrics.ended(DisconnectReason::ProtocolViolation), 1);
    }

    /// Goal:   S12: limits are enforced at the hello, by the right code.
    /// Method: hellos judged against a full server, too large a geometry, a draining server.
    #[test]
    fn s12_hellos_beyond_a_limit_are_refused_by_code() {
        use zerocopy::IntoBytes;
        let config = ServerConfig { max_sessions: 1, max_slot_pages: 8, ..ServerConfig::default() };
        let mut core = core(ServerConfig { max_half_open: 1, ..config });
        let refusal = |core: &Core<AtomicU64>, geometry| match core
            .judge(Hello::new(geometry, [0; 2], 0, "x").as_bytes(), 0)
        {
            Verdict::Refuse(welcome) => welcome.code,
            Verdict::Grant(..) => code::OK,
        };
        assert_eq!(refusal(&core, Geometry::default()), code::OK);
        assert_eq!(refusal(&core, Geometry { medium: 9, ..Geometry::default() }), code::NO_MEMORY);
        let _client = Client::join(&mut core);
        assert_eq!(refusal(&core, Geometry::default()), code::TOO_MANY);
        core.drain();
        assert_eq!(refusal(&core, Geometry::default()), code::DRAINING);
    }
}

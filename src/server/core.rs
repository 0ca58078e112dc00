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
    /// Turns in a row that found nothing; a lane is cooled when there are many.
    idle_turns: u32,
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
                Ok(0) => seat.idle_turns = seat.idle_turns.saturating_add(1),
                Ok(taken) => {
                    seat.idle_turns = 0;
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
            seat.idle_turns = 0;
            self.hot.push(id.index);
        }
    }

    /// Hot lanes that found nothing for `turns` turns or more.
    pub fn cold_candidates(&self, turns: u32) -> impl Iterator<Item = SessionId> + '_ {
        self.hot.iter().filter_map(move |&index| {
            let seat = &self.seats[index as usize];
            (seat.idle_turns >= turns).then_some(SessionId { index, generation: seat.generation })
        })
    }

    /// Takes a lane from those polled: its bell is armed.
    pub fn cool(&mut self, id: SessionId) {
        let Some(seat) = self.seats.get_mut(id.index as usize) else { return };
        if seat.generation == id.generation && seat.hot {
            seat.hot = false;
            self.hot.retain(|i| *i != id.index);
        }
    }

    /// Whether no lane is polled.
    pub fn all_cold(&self) -> bool {
        self.hot.is_empty()
    }
}

//! The sans-I/O heart of a reactor: lanes, connections, the hot set, dispatch. Time, hellos, segments, hang-ups
//! and what other reactors tell are its inputs; completions to ring for and sessions to end its outputs.

use super::analyze::FileQuestion;
use super::budget::Budget;
use super::connections::{Connection, ConnectionPool};
use super::crew::{Inbox, Message, Notice};
use super::deferred::Executor;
use super::exchange::{Exchanges, Work};
use super::idle::Seen;
use super::inspect::{CALLS_MAX, Part, Question};
use super::jobs::{Answer, Job, Ticket};
use super::lane::{Batch, Bench, SessionLane, TurnLimits};
use super::leases::{LeaseQueue, Verdict as LeaseVerdict};
use super::staging::BufferPool;
use super::table::{Entry, Rest};
use super::tickets::Tickets;
use super::trace::Trace;
use super::watch::Pulse;
use crate::config::{Movable, ServerConfig};
use crate::inspect::{ConnectionReport, Inquiry, LaneReport};
use crate::metrics::{Counters, Timing, Totals};
use crate::protocol::handshake::{DisconnectReason, Hello, Scope, VERSION_MAX, Welcome, code};
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Status, flag};
use doorbell_shm::lane::Drain;
use doorbell_shm::layout::{Geometry, lanes_max, state};
use doorbell_shm::map::PAGE;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Busy rounds between two that are timed: a clock in every round would cost more than it tells.
const ROUNDS_PER_TIMING: u32 = 8;
/// Sweeps (of 50 ms each) that a body may lie still while others wait for its memory.
const STALE_SWEEPS: u8 = 2;
/// Lanes whose bulk rings are served in one round, of 64 or fewer that are polled. All interactive rings are
/// looked at between two rounds.
const BULK_LANES_PER_ROUND: usize = 2;

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

/// Everything that a lane works with, borrowed from a core beside its seats.
macro_rules! bench {
    ($core:ident, $now_ns:expr, $announce:expr, $time_ns:expr) => {
        Bench {
            handlers: $core.handlers,
            state: &$core.state,
            connections: &mut $core.connections,
            staging: &mut $core.staging,
            metrics: &mut $core.metrics,
            timing: &mut $core.timing,
            pulse: &$core.pulse,
            trace: &mut $core.trace,
            reactor: $core.totals.own as u32,
            totals: &$core.totals,
            batch: &mut $core.batch,
            exchanges: &mut $core.exchanges,
            hinted: &mut $core.hinted,
            rest: &mut $core.rest,
            leases: &mut $core.leases,
            request: &mut $core.request,
            executor: $core.executor.as_deref(),
            deadline_ns: $core.config.default_deadline.map_or(0, |after| after.as_nanos() as u64),
            message_max: $core.config.max_message_size as usize,
            now_ns: $now_ns,
            inbox: &mut $core.inbox,
            announce: $announce,
            limits: TurnLimits {
                entries: $core.config.entries_per_turn,
                bytes: $core.config.bytes_per_turn,
                time_ns: $time_ns,
            },
            flags_seen: 0,
        }
    };
}

#[derive(Debug, Default)]
struct Seat {
    generation: u32,
    lane: Option<Box<SessionLane>>,
    hot: bool,
    /// Has had an entry since it was last put among the hot ones.
    worked: bool,
    /// Is among [`Core::touched`].
    touched: bool,
}

pub(crate) struct Core<S: 'static> {
    handlers: &'static [Entry<S>],
    state: Arc<S>,
    config: ServerConfig,
    seats: Vec<Seat>,
    free: Vec<u32>,
    live: u32,
    /// Seats whose lanes are polled.
    hot: Vec<u32>,
    /// Where in `hot` bulk rings are looked at next.
    next_bulk: usize,
    /// Seats that completed something since the last [`Core::untouch`]: their clients may have to be woken.
    touched: Vec<u32>,
    /// Sessions that broke the protocol in this round.
    faults: Vec<(SessionId, PeerFault)>,
    connections: ConnectionPool,
    pub staging: BufferPool,
    batch: Box<Batch>,
    exchanges: Exchanges<S>,
    rest: Rest,
    request: Vec<u8>,
    executor: Option<Arc<Executor>>,
    pub pulse: Arc<Pulse>,
    hinted: Vec<(u32, u32)>,
    pub leases: LeaseQueue,
    pub budget: Budget,
    pub inbox: Inbox,
    pub metrics: Counters,
    pub timing: Timing,
    trace: Trace,
    totals: Totals,
    draining: bool,
    /// Sessions that tables were made for.
    most_sessions: u32,
    /// Busy rounds until two are timed.
    until_timing: u32,
    /// When the first of the two ended; 0 if it has not, or if an idle round followed.
    round_ended_ns: u64,
    /// The last timed round was longer than a turn may be: from then on turns are timed.
    long_rounds: bool,
    /// A caller of the entries taken since the last [`Core::take_handed_over`] sleeps on this core.
    handed_over: bool,
}

/// What the turns of one round came to.
struct Served<'a> {
    total: u32,
    touched: &'a mut Vec<u32>,
    faults: &'a mut Vec<(SessionId, PeerFault)>,
}

impl Served<'_> {
    /// One turn of the lane seated at `index`.
    #[inline(always)]
    fn turn(
        &mut self,
        seats: &mut [Seat],
        index: u32,
        turn: impl FnOnce(&mut SessionLane) -> Result<u32, PeerFault>,
    ) {
        let seat = &mut seats[index as usize];
        let Some(lane) = seat.lane.as_deref_mut() else { return };
        // Its other ring is served no more either.
        if self.faults.iter().any(|(id, _)| id.index == index) {
            return;
        }
        match turn(lane) {
            Ok(0) => {}
            Ok(taken) => {
                self.total += taken;
                seat.worked = true;
                if !seat.touched {
                    seat.touched = true;
                    self.touched.push(index);
                }
            }
            Err(fault) => self.faults.push((SessionId { index, generation: seat.generation }, fault)),
        }
    }
}

impl<S> Core<S> {
    /// Makes every table at its full size: nothing is allocated while serving but a session's own record. A
    /// further reactor makes its tables when it is told of connections.
    pub fn new(
        handlers: &'static [Entry<S>],
        state: Arc<S>,
        config: ServerConfig,
        totals: Totals,
        inbox: Inbox,
        budget: Budget,
    ) -> Self {
        let home = totals.own == 0;
        let table = config.time_calls.then(|| Arc::clone(&totals.types[totals.own]));
        let timing = Timing::new(table, handlers.len(), config.turn_time.as_nanos() as u64);
        let lanes =
            if home { config.max_sessions } else { config.max_further_lanes.min(config.max_sessions) };
        let connections = match home {
            true => ConnectionPool::new(config.max_connections),
            false => ConnectionPool::on_demand(config.max_connections),
        };
        Self {
            handlers,
            state,
            seats: Vec::new(),
            free: Vec::new(),
            live: 0,
            hot: Vec::with_capacity(lanes as usize),
            next_bulk: 0,
            touched: Vec::with_capacity(lanes as usize),
            faults: Vec::new(),
            connections,
            staging: BufferPool::sized(config.buffer_pool_size as u16),
            batch: Box::new(Batch::new()),
            exchanges: Exchanges::new(
                config.body_memory as usize,
                Tickets::new(config.max_deferred, budget.clone()),
            ),
            rest: Rest { limit: config.max_message_size as usize, ..Rest::default() },
            request: Vec::new(),
            executor: None,
            pulse: Arc::default(),
            hinted: Vec::new(),
            leases: LeaseQueue::default(),
            budget,
            inbox,
            metrics: Counters::default(),
            timing,
            trace: Trace::default(),
            totals,
            draining: false,
            most_sessions: config.max_sessions,
            until_timing: ROUNDS_PER_TIMING,
            round_ended_ns: 0,
            long_rounds: false,
            handed_over: false,
            config,
        }
    }

    /// The same with somebody who runs the futures of handlers.
    pub fn executor(self, executor: Option<Arc<Executor>>) -> Self {
        Self { executor, ..self }
    }

    /// The reactor is rung by this eventfd, since it cannot sleep on words.
    pub fn rung_through(&mut self, eventfd: Arc<OwnedFd>) {
        self.exchanges.tickets.rung_through(eventfd);
    }

    /// The same with this pulse.
    pub fn pulse(self, pulse: Arc<Pulse>) -> Self {
        Self { pulse, ..self }
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
            let welcome = Welcome::too_many(Scope::Sessions, self.config.max_sessions, 100);
            return Verdict::Refuse(Box::new(welcome));
        }
        let Ok(mut geometry) = Geometry::unpack(hello.geometry).checked() else {
            return refuse(code::BAD_HELLO);
        };
        // What cannot be given is not promised: rings and leases are cut to the limits, base slots are refused.
        geometry.ring_order = geometry.ring_order.min(self.config.max_ring_order);
        let leases = self.config.max_slot_pages.saturating_sub(geometry.base_pages());
        geometry.lease_pages = geometry.lease_pages.min(leases as u16);
        if geometry.base_pages() > self.config.max_slot_pages {
            let limit = self.config.max_slot_pages;
            return Verdict::Refuse(Box::new(Welcome { limit, ..Welcome::refusal(code::NO_MEMORY) }));
        }
        let welcome = Welcome {
            version: VERSION_MAX.min(hello.version_max),
            geometry: geometry.pack(),
            lanes: hello.lanes.min(self.config.max_lanes).min(self.config.reactors).min(lanes_max(&geometry)),
            clock_offset_ns: now_ns.wrapping_sub(hello.now_ns),
            max_message_size: self.config.max_message_size,
            reactors: self.config.reactors,
            ..Welcome::refusal(code::OK)
        };
        Verdict::Grant(geometry, Box::new(welcome))
    }

    /// Seats a session at its home reactor. Its lane starts hot: a first call usually follows at once.
    pub fn open(&mut self, lane: SessionLane) -> SessionId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Seat::default());
            self.seats.len() as u32 - 1
        });
        let generation = self.seats[index as usize].generation.wrapping_add(1);
        self.metrics.sessions_opened += 1;
        let id = SessionId { index, generation };
        self.seat(id, lane);
        id
    }

    /// Seats a lane of a session that is at home with another reactor, under the same number.
    pub fn seat(&mut self, id: SessionId, lane: SessionLane) {
        let index = id.index as usize;
        if self.seats.len() <= index {
            self.seats.resize_with(index + 1, Seat::default);
        }
        let seat = &mut self.seats[index];
        seat.generation = id.generation;
        seat.lane = Some(Box::new(lane));
        seat.hot = false;
        self.live += 1;
        self.heat(id);
    }

    /// Takes a session's lane from its seat, and closes its connections here.
    pub fn unseat(&mut self, id: SessionId) -> Option<Box<SessionLane>> {
        let home = self.totals.own == 0;
        let seat = self.seats.get_mut(id.index as usize).filter(|seat| seat.generation == id.generation)?;
        let lane = seat.lane.take()?;
        // From here on its client knows that nothing more is taken from it.
        lane.segment().let_go_lane(lane.number());
        if seat.hot {
            seat.hot = false;
            self.hot.retain(|i| *i != id.index);
        }
        self.live -= 1;
        for index in lane.exchanges.iter().flat_map(|all| all.all()) {
            if let Some(exchange) = self.exchanges.take(index) {
                self.exchanges.end(index, exchange);
            }
        }
        // What it has returned and has not been given back to the kernel goes with its segment.
        let returned = self.leases.forget(id.index);
        let leased = u64::from(lane.lane().leases.pages() + returned) * PAGE as u64;
        self.metrics.leased_bytes -= leased;
        self.budget.give(leased);
        if home {
            self.free.push(id.index);
            self.connections.close_all(id.index);
            self.metrics.connections_open = self.connections.open_count().into();
        }
        Some(lane)
    }

    /// The open connections of a session at home here.
    pub fn connections_of(&self, id: SessionId) -> impl Iterator<Item = Notice> + '_ {
        self.connections.opened_by(id.index)
    }

    /// The next thing that another reactor has told, after all that was told of connections has been noted.
    pub fn next_message(&mut self) -> Option<Message> {
        self.connections.follow(&mut self.inbox);
        self.inbox.next()
    }

    /// The session that `id` names, if it still lives.
    pub fn lane(&mut self, id: SessionId) -> Option<&mut SessionLane> {
        let seat = self.seats.get_mut(id.index as usize)?;
        if seat.generation != id.generation {
            return None;
        }
        seat.lane.as_deref_mut()
    }

    /// Lanes that live.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Ids of all sessions that have a lane here.
    pub fn ids(&self) -> impl Iterator<Item = SessionId> + '_ {
        self.seats
            .iter()
            .enumerate()
            .filter(|(_, seat)| seat.lane.is_some())
            .map(|(index, seat)| SessionId { index: index as u32, generation: seat.generation })
    }

    /// Brings the counters up to date that are kept elsewhere, or follow from what there is.
    pub fn note_gauges(&mut self) {
        let metrics = &mut self.metrics;
        (metrics.busy_ns, metrics.overruns) = (self.timing.busy_ns, self.timing.overruns);
        metrics.sessions_open = if self.totals.own == 0 { self.live.into() } else { 0 };
        metrics.lanes_hot = self.hot.len() as u64;
        metrics.exchanges_live = self.exchanges.live() as u64;
        metrics.jobs_live = self.exchanges.jobs.live() as u64;
        metrics.bodies_waiting = self.exchanges.waiting() as u64;
        metrics.leases_waiting = self.leases.len() as u64;
    }

    /// Looks how many entries and answers lie in the rings of all lanes.
    pub fn note_queues(&mut self) {
        let (mut entries, mut answers) = (0, 0);
        for lane in self.seats.iter_mut().filter_map(|seat| seat.lane.as_deref_mut()) {
            entries += lane.count_waiting();
            answers += lane.answers_waiting();
        }
        (self.metrics.entries_waiting, self.metrics.answers_waiting) = (entries, answers);
    }

    /// Tells every client that no new calls are taken; hellos are refused from now on.
    pub fn drain(&mut self) {
        self.draining = true;
        for seat in &self.seats {
            if let Some(lane) = &seat.lane {
                lane.segment().set_state(state::DRAINING, DisconnectReason::Draining as u32);
            }
        }
    }

    /// Tells every client that the server has come to an end.
    #[cold]
    pub fn close_all(&self) {
        for lane in self.seats.iter().filter_map(|seat| seat.lane.as_deref()) {
            lane.segment().set_state(state::CLOSED, DisconnectReason::Draining as u32);
        }
    }

    /// One turn of every lane, on both rings, that goes on with what has been begun and begins no call; returns what
    /// was done (F49).
    pub fn drain_round(
        &mut self,
        now_ns: &mut dyn FnMut() -> u64,
        announce: &mut dyn FnMut(u32, Notice),
    ) -> u32 {
        self.run_waiting();
        let mut served = Served { total: 0, touched: &mut self.touched, faults: &mut self.faults };
        let mut bench = bench!(self, now_ns, announce, None);
        for index in 0..self.seats.len() as u32 {
            served.turn(&mut self.seats, index, |lane| lane.turn_draining(index, &mut bench));
        }
        served.total
    }

    /// What there is to be seen of how a lane is used; `None` if it has gone, or breaks the protocol, which is noted.
    pub fn seen(&mut self, id: SessionId) -> Option<Seen> {
        let busy = !self.is_quiet(id);
        let mut seen = match self.lane(id)?.seen() {
            Ok(seen) => seen,
            Err(fault) => {
                self.note_fault(id, fault);
                return None;
            }
        };
        seen.busy = busy;
        let (seats, exchanges) = (&self.seats, &mut self.exchanges);
        let lane = seats[id.index as usize].lane.as_deref();
        if let Some(all) = lane.and_then(|lane| lane.exchanges.as_deref()) {
            // All of the answer's window has been sent, and none of it taken.
            let full = |index| exchanges.get_mut(index).is_some_and(|e| e.window.credit() == 0);
            seen.stuck |= Drain::ORDER.iter().any(|ring| all.wants_space(*ring)) || all.iter().any(full);
        }
        Some(seen)
    }

    /// Uses these limits from now on; no more sessions than there is room for.
    pub fn adopt(&mut self, limits: &Movable) {
        self.config
            .adopt(&Movable { max_sessions: limits.max_sessions.min(self.most_sessions), ..limits.clone() });
        self.timing.overrun_ns = self.config.turn_time.as_nanos() as u64;
    }

    /// Whether no call of a lane is under way: nothing of it is lost if the lane goes.
    pub fn is_quiet(&self, id: SessionId) -> bool {
        let lane = self.seated(id.index);
        lane.and_then(|lane| lane.exchanges.as_ref()).is_none_or(|all| all.live == 0)
    }

    /// One turn for every hot lane, then one for the bulk rings of some; returns the entries taken. Afterwards
    /// [`Core::touched`] and [`Core::take_fault`] say whom to wake and whom to end.
    ///
    /// `announce` is given the index of a session with further lanes and what became of one of its connections.
    #[inline]
    pub fn round(&mut self, now_ns: &mut dyn FnMut() -> u64, announce: &mut dyn FnMut(u32, Notice)) -> u32 {
        if !self.exchanges.runnable.is_empty() {
            self.run_waiting();
        }
        self.timing.round(now_ns);
        let mut served = Served { total: 0, touched: &mut self.touched, faults: &mut self.faults };
        let time_ns = self.long_rounds.then_some(self.config.turn_time.as_nanos() as u64);
        let mut bench = bench!(self, now_ns, announce, time_ns);
        for &index in &self.hot {
            served.turn(&mut self.seats, index, |lane| lane.turn(index, &mut bench));
        }
        // A bulk turn may take long, and interactive calls of other lanes wait meanwhile: some of them per round.
        let bulk = BULK_LANES_PER_ROUND.max(self.hot.len() / 64).min(self.hot.len());
        for _ in 0..bulk {
            if self.next_bulk >= self.hot.len() {
                self.next_bulk = 0;
            }
            let index = self.hot[self.next_bulk];
            self.next_bulk += 1;
            served.turn(&mut self.seats, index, |lane| lane.turn_bulk(index, &mut bench));
        }
        let taken = served.total;
        if taken == 0 {
            // The clock is read behind the last completion, not before it: nobody waits for this.
            match bench.timing.is_pending() {
                true => bench.count_times(),
                false => bench.timing.is_idle(),
            }
        }
        self.handed_over |= bench.flags_seen >> 40 & u64::from(flag::HANDOFF) != 0;
        self.time_round(taken > 0, now_ns);
        taken
    }

    /// Memory has come for bodies that waited for it.
    #[cold]
    fn run_waiting(&mut self) {
        for (seat, index) in std::mem::take(&mut self.exchanges.runnable) {
            let Some(lane) = self.seats.get_mut(seat as usize).and_then(|seat| seat.lane.as_deref_mut())
            else {
                continue;
            };
            lane.run_exchange(seat, index, &mut self.exchanges);
            let generation = self.seats[seat as usize].generation;
            self.heat(SessionId { index: seat, generation });
        }
    }

    /// Ends calls of several frames whose deadline has passed, and, if `sweep`, those that keep the memory of their
    /// body from others and have not moved since the sweep before the last.
    pub fn end_overdue(&mut self, now: u64, sweep: bool) {
        self.settle_times(&mut || now);
        let memory_is_wanted = self.exchanges.anybody_waits();
        if now < self.exchanges.next_deadline && !(sweep && memory_is_wanted) {
            return;
        }
        let mut over = Vec::new();
        let mut next_deadline = u64::MAX;
        for (index, exchange) in self.exchanges.iter_mut() {
            let deadline = exchange.call.deadline;
            if deadline > now {
                next_deadline = next_deadline.min(deadline);
            }
            let holds = matches!(exchange.work, Work::Whole(_));
            if sweep {
                exchange.stale =
                    if std::mem::take(&mut exchange.moved) { 0 } else { exchange.stale.saturating_add(1) };
            }
            if deadline != 0 && now >= deadline {
                over.push((exchange.seat, index, Status::DeadlineExceeded));
            } else if sweep && memory_is_wanted && holds && exchange.stale >= STALE_SWEEPS {
                over.push((exchange.seat, index, Status::TakenBack));
            }
        }
        self.exchanges.next_deadline = next_deadline;
        for (seat, index, status) in over {
            self.end_exchange(seat, index, status, now);
        }
    }

    /// Counts the calls that have ended; whatever comes next, until the next round, is no call.
    #[inline(always)]
    pub fn settle_times(&mut self, now_ns: &mut dyn FnMut() -> u64) {
        if self.timing.is_pending() {
            bench!(self, now_ns, &mut |_, _| {}, None).count_times();
        }
        self.timing.pause();
        self.timing.runs_nothing();
    }

    /// No deadline of a call that is under way passes before this.
    pub fn next_deadline(&self) -> u64 {
        self.exchanges.next_deadline
    }

    /// Who answers calls from elsewhere.
    pub fn tickets(&self) -> &Tickets {
        &self.exchanges.tickets
    }

    /// Sends what the holders of at most `most` tickets have written, and about as many bytes as a turn has; returns how
    /// many tickets these were.
    #[inline(never)]
    pub fn serve_tickets(&mut self, most: u32, now_ns: &mut dyn FnMut() -> u64) -> u32 {
        let mut announce = |_, _| {};
        let mut seen = 0;
        let bytes_before = self.metrics.bytes();
        while seen < most
            && self.metrics.bytes() - bytes_before < self.config.bytes_per_turn
            && let Some((seat, exchange)) = self.exchanges.tickets.next_ready()
        {
            seen += 1;
            let mut goes_on = false;
            let mut bench = bench!(self, now_ns, &mut announce, None);
            let mut served = Served { total: 0, touched: &mut self.touched, faults: &mut self.faults };
            served.turn(&mut self.seats, seat, |lane| {
                goes_on = lane.step_ticket(exchange, &mut bench)?;
                if goes_on {
                    lane.lane().common.server_bell.clear();
                }
                Ok(1)
            });
            if goes_on {
                self.heat(SessionId { index: seat, generation: self.seats[seat as usize].generation });
            }
        }
        seen
    }

    /// Wakes the holders of tickets that have got room, or have been cancelled.
    #[inline(always)]
    pub fn wake_holders(&mut self) {
        self.exchanges.tickets.wake();
    }

    fn end_exchange(&mut self, index: u32, exchange: u32, status: Status, now: u64) {
        let mut now_ns = || now;
        let mut announce = |_, _| {};
        let mut bench = bench!(self, &mut now_ns, &mut announce, None);
        let mut served = Served { total: 0, touched: &mut self.touched, faults: &mut self.faults };
        served.turn(&mut self.seats, index, |lane| {
            lane.end_early(exchange, status, 0, &mut bench)?;
            Ok(1)
        });
    }

    /// Looks after the leases of the lane seated at `index`: says what is to be done about them. By force it ends the
    /// calls that have them.
    pub fn judge_leases(&mut self, index: u32, now: u64, wanted_elsewhere: bool) -> LeaseVerdict {
        let wanted = wanted_elsewhere || self.leases.others_wait(index);
        let seat = self.seats.get_mut(index as usize);
        let Some(lane) = seat.and_then(|seat| seat.lane.as_deref_mut()) else { return LeaseVerdict::Leave };
        let verdict = lane.judge_leases(now, wanted);
        // There are none if the client says truly that it uses no lease.
        if verdict != LeaseVerdict::Leave {
            let all = lane.exchanges.iter().flat_map(|all| all.all());
            let exchanges = &mut self.exchanges;
            let leased = |i: &u32| {
                exchanges
                    .get_mut(*i)
                    .is_some_and(|e| e.uses_leases(|slot| lane.lane().leases.is_leased(slot)))
            };
            for exchange in all.filter(leased).collect::<Vec<_>>() {
                self.end_exchange(index, exchange, Status::TakenBack, now);
            }
        }
        verdict
    }

    /// Whether the lane seated at `index` has leases.
    pub fn has_leases(&self, index: u32) -> bool {
        self.seated(index).is_some_and(|lane| !lane.lane().leases.granted().is_empty())
    }

    /// The lane at `index` has completed something outside of its turn.
    pub fn touch(&mut self, index: u32) {
        let seat = &mut self.seats[index as usize];
        if !seat.touched {
            seat.touched = true;
            self.touched.push(index);
        }
    }

    /// The lane seated at `index`, to be answered outside of its turn.
    pub fn seated_mut(&mut self, index: u32) -> Option<(SessionId, &mut SessionLane)> {
        let seat = self.seats.get_mut(index as usize)?;
        Some((SessionId { index, generation: seat.generation }, seat.lane.as_deref_mut()?))
    }

    /// Whether a body can go on that waited for memory: its lane is to be polled.
    pub fn bodies_can_go_on(&self) -> bool {
        !self.exchanges.runnable.is_empty()
    }

    /// Whether calls of several frames are under way: their next frames are about to come.
    pub fn has_exchanges(&self) -> bool {
        self.exchanges.moving() > 0
    }

    /// Whether there are jobs for the reactor, or jobs that it may forget.
    #[inline(always)]
    pub fn has_jobs(&self) -> bool {
        self.exchanges.jobs.has_work()
    }

    /// Whether somebody asks about the server.
    #[inline(always)]
    pub fn has_questions(&self) -> bool {
        self.exchanges.jobs.has_questions()
    }

    /// The next such question; [`Core::answer`] ends it.
    pub fn next_question(&mut self) -> Option<(Ticket, Question)> {
        self.exchanges.jobs.next_question()
    }

    /// Tells what there is, as far as it is asked for.
    pub fn tell(&mut self, inquiry: &Inquiry, reactor: u32, now: u64) -> Part {
        let mut part = Part::default();
        if inquiry.trace != 0 {
            (part.traced, part.untraced) = self.trace.ask(inquiry.trace, now);
            self.timing.trace(inquiry.trace);
        }
        if inquiry.connections {
            let report = |(session, connection, of): (u32, u32, &Connection)| ConnectionReport {
                session,
                connection,
                reactor,
                bulk: of.bulk,
                requests: of.requests.into(),
                bytes: of.bytes,
                time_ns: of.time_ns,
            };
            part.connections = self.connections.iter().map(report).collect();
        }
        for (index, seat) in self.seats.iter_mut().enumerate() {
            let Some(lane) = seat.lane.as_deref_mut() else { continue };
            let session = index as u32;
            if inquiry.sessions {
                part.lanes.push(LaneReport {
                    session,
                    generation: seat.generation,
                    reactor,
                    hot: seat.hot,
                    ..lane.tell()
                });
            }
        }
        if inquiry.calls {
            // Those that have been begun first: there may be more than can be told.
            let begun = self.exchanges.iter_mut().map(|(_, exchange)| exchange.tell(reactor, now));
            part.calls.extend(begun.take(CALLS_MAX));
            for (index, seat) in self.seats.iter().enumerate() {
                let Some(lane) = seat.lane.as_deref() else { continue };
                let room = CALLS_MAX - part.calls.len();
                part.calls.extend(lane.queued_calls(index as u32, reactor).take(room));
            }
        }
        part
    }

    /// Traces nothing of which nobody has asked for long.
    pub fn end_trace(&mut self, now: u64) {
        self.trace.end(now);
        self.timing.trace(self.trace.connection());
    }

    /// Answers the call of a job; returns whose lane is to be polled, so that the answer is sent. `None` if the call
    /// has ended meanwhile.
    pub fn answer(&mut self, ticket: Ticket, answer: Answer) -> Option<SessionId> {
        let seat = self.seats.get_mut(ticket.seat as usize)?;
        let lane = seat.lane.as_deref_mut()?;
        let message_max = self.config.max_message_size as usize;
        let id = SessionId { index: ticket.seat, generation: seat.generation };
        lane.answer_deferred(ticket, answer, &mut self.exchanges, message_max).then_some(id)
    }

    /// The calls of several frames.
    #[cfg(any(test, fuzzing))]
    pub fn exchanges(&mut self) -> &mut Exchanges<S> {
        &mut self.exchanges
    }

    /// Connections that are open here.
    #[cfg(test)]
    pub fn connections_open(&self) -> u32 {
        self.connections.open_count()
    }

    /// Bytes that are reserved for bodies which are put together.
    pub fn body_bytes(&self) -> usize {
        self.exchanges.reserved()
    }

    /// Finds out whether rounds take longer than a turn may: the time from the end of one busy round to the end of
    /// the next, once in a while.
    #[inline(always)]
    fn time_round(&mut self, busy: bool, now_ns: &mut dyn FnMut() -> u64) {
        if !busy {
            self.round_ended_ns = 0;
            return;
        }
        if self.until_timing > 0 {
            self.until_timing -= 1;
            return;
        }
        let now = now_ns();
        if self.round_ended_ns == 0 {
            self.round_ended_ns = now;
            return;
        }
        self.long_rounds = now - self.round_ended_ns > self.config.turn_time.as_nanos() as u64;
        self.round_ended_ns = 0;
        self.until_timing = ROUNDS_PER_TIMING;
    }

    /// Whether a caller whose entry has been taken since this was last asked sleeps on this core.
    pub fn take_handed_over(&mut self) -> bool {
        std::mem::take(&mut self.handed_over)
    }

    /// Lanes that completed something and whose clients have not been looked at behind a fence.
    pub fn touched(&self) -> &[u32] {
        &self.touched
    }

    /// The lane seated at `index`, if any.
    #[inline(always)]
    pub fn seated(&self, index: u32) -> Option<&SessionLane> {
        self.seats.get(index as usize)?.lane.as_deref()
    }

    /// Whether a lane has had an entry since it was last put among those polled.
    pub fn has_worked(&self, id: SessionId) -> bool {
        self.seats.get(id.index as usize).is_some_and(|seat| seat.worked)
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

    /// Notes that a lane broke the protocol outside of its turn.
    pub fn note_fault(&mut self, id: SessionId, fault: PeerFault) {
        self.faults.push((id, fault));
    }

    /// Puts a lane among those polled.
    pub fn heat(&mut self, id: SessionId) {
        let Some(seat) = self.seats.get_mut(id.index as usize) else { return };
        if seat.generation == id.generation && seat.lane.is_some() && !seat.hot {
            seat.hot = true;
            seat.worked = false;
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

/// What calls of `AnalyzeFile` want of the reactor.
#[cfg_attr(not(feature = "messages"), expect(dead_code, reason = "nobody asks for files"))]
impl<S> Core<S> {
    /// The next file that the reactor is to read; [`Core::answer`] ends that.
    pub fn next_job(&mut self) -> Option<Job> {
        self.exchanges.jobs.next()
    }

    /// Numbers of jobs that the reactor has and that nobody waits for any more.
    pub fn take_given_up(&mut self) -> Vec<u64> {
        self.exchanges.jobs.take_given_up()
    }

    /// Has the question of a job answered, whose file has been read; returns as [`Core::answer`] does.
    pub fn ask(&mut self, ticket: Ticket, question: FileQuestion) -> Option<SessionId> {
        let mut now_ns = || 0;
        let mut announce = |_, _| {};
        let mut bench = bench!(self, &mut now_ns, &mut announce, None);
        let seat = self.seats.get_mut(ticket.seat as usize)?;
        let lane = seat.lane.as_deref_mut()?;
        let id = SessionId { index: ticket.seat, generation: seat.generation };
        lane.ask_deferred(ticket, question, &mut bench).then_some(id)
    }
}

#[cfg(test)]
mod tests {
    //! The core without a kernel: segments on the heap, a client's lane beside it, time by hand.

    use super::*;
    use crate::protocol::MessageType;
    use crate::server::table::{Context, HandlerError, HandlerTable, Pieces, Progress, Reply};
    use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
    use doorbell_shm::lane::{BULK, ClientLane, INTERACTIVE};
    use doorbell_shm::layout::LaneLayout;
    use doorbell_shm::segment::{Identity, Segment};
    use doorbell_shm::slots::ClientWord;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// Answers with how many calls came before it.
    const COUNT: MessageType = MessageType::USER;

    fn count(context: &Context<'_, AtomicU64>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
        reply.write(&context.state().fetch_add(1, Relaxed).to_le_bytes())
    }

    static TABLE: HandlerTable<AtomicU64> = HandlerTable::with_builtins().on(COUNT, count);

    fn core(config: ServerConfig) -> Core<AtomicU64> {
        let state = Arc::new(AtomicU64::new(0));
        Core::new(TABLE.as_slice(), state, config, Totals::new(0, 1), Inbox::default(), Budget::new(1 << 30))
    }

    fn round(core: &mut Core<AtomicU64>) -> u32 {
        core.round(&mut || 0, &mut |_, _| unreachable!("there is one reactor"))
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
            let id = core.open(SessionLane::new(Arc::new(segment), 0).unwrap());
            let mut client = Self { lane, id, connections: [0; 2] };
            for ring in [INTERACTIVE, BULK] {
                client.control(if ring == BULK { flag::BULK } else { 0 });
                round(core);
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

        /// A call with a body of zeros.
        fn call_of(&mut self, ring: usize, message_type: MessageType, len: u32) -> bool {
            let Some(grant) = self.lane.slots.take(len as usize) else { return false };
            let entry = Submission {
                kind: kind::CALL,
                flags: flag::END,
                message_type: message_type.0,
                connection: self.connections[ring],
                slot: grant.slot,
                generation: grant.generation,
                len,
                response_count: 1,
                response_slot: grant.slot,
                ..Submission::default()
            };
            let pushed = self.lane.submissions[ring].push(entry.pack()).unwrap();
            self.lane.slots.advance(grant);
            pushed
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
            round(&mut core);
        }
        // The ring took what it holds, and the server ran what it could answer.
        assert_eq!(core.state.load(Relaxed), admitted);
        assert_eq!(sent, admitted + u64::from(GEOMETRY.ring_len()).min(128 - admitted));
        assert_eq!(core.lane(client.id).unwrap().asleep_state(), doorbell_shm::bell::ASLEEP_WANTS_SPACE);
        let mut answered = 0;
        while answered < sent {
            while let Some(completion) = client.take(INTERACTIVE) {
                assert_eq!(client.count_of(completion), answered, "in order, none lost");
                answered += 1;
            }
            round(&mut core);
        }
        assert_eq!(core.lane(client.id).unwrap().asleep_state(), doorbell_shm::bell::ASLEEP);
    }

    /// Goal:   S6, P5: a lane that is to sleep and finds an entry for which there is no space says that space is to ring, although
    ///         no turn has seen that entry.
    #[test]
    fn s6_p5_an_entry_without_space_is_seen_by_the_last_look() {
        let mut core = core(ServerConfig { entries_per_turn: 1000, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        for _ in 0..GEOMETRY.admitted() {
            assert!(client.call(INTERACTIVE, 0));
        }
        round(&mut core);
        round(&mut core);
        assert_eq!(core.lane(client.id).unwrap().asleep_state(), doorbell_shm::bell::ASLEEP);
        assert!(client.call(INTERACTIVE, 0));
        let lane = core.lane(client.id).unwrap();
        assert_eq!(lane.has_work(), Ok(false));
        assert_eq!(lane.asleep_state(), doorbell_shm::bell::ASLEEP_WANTS_SPACE);
        client.take(INTERACTIVE).unwrap();
        assert_eq!(core.lane(client.id).unwrap().has_work(), Ok(true));
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
        round(&mut core);
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
        round(&mut core);
        let completion = client.take(INTERACTIVE).unwrap();
        assert_eq!(client.count_of(completion), 0);
        for expected in 1..=5 {
            let completion = client.take(BULK).unwrap();
            assert_eq!(client.count_of(completion), expected);
        }
    }

    /// Goal:   R2.8: bulk has its share however many interactive calls there are.
    /// Method: an interactive ring kept full for many rounds; bulk calls behind it.
    #[test]
    fn r2_8_bulk_entries_have_their_share_beside_a_flood_of_interactive_ones() {
        let mut core = core(ServerConfig { entries_per_turn: 32, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        for _ in 0..20 {
            assert!(client.call(BULK, 0));
        }
        let (mut interactive, mut bulk) = (0u32, 0u32);
        while bulk < 20 {
            while client.call(INTERACTIVE, 0) {}
            round(&mut core);
            interactive += std::iter::from_fn(|| client.take(INTERACTIVE)).count() as u32;
            bulk += std::iter::from_fn(|| client.take(BULK)).count() as u32;
            assert!(interactive < 20 * 64, "{bulk} bulk calls beside {interactive} interactive ones");
        }
    }

    /// Goal:   R2.8, S7: an interactive call does not wait for the bulk calls of all other sessions.
    /// Method: six sessions with full bulk rings, one with an interactive call that comes in the middle of it.
    #[test]
    fn r2_8_s7_an_interactive_call_waits_for_few_other_lanes_bulk_turns() {
        let mut core = core(ServerConfig { entries_per_turn: 8, ..ServerConfig::default() });
        let mut bulk: Vec<Client> = (0..6).map(|_| Client::join(&mut core)).collect();
        let mut modest = Client::join(&mut core);
        for client in &mut bulk {
            for _ in 0..16 {
                assert!(client.call(BULK, 0));
            }
        }
        round(&mut core);
        let before = core.state.load(Relaxed);
        assert!(before <= 2 * 8, "two bulk turns in a round, not {before} calls");
        assert!(modest.call(INTERACTIVE, 0));
        round(&mut core);
        let completion = modest.take(INTERACTIVE).expect("answered in the next round");
        assert_eq!(modest.count_of(completion), before, "before any other bulk call");
        for _ in 0..8 {
            round(&mut core);
        }
        assert_eq!(core.state.load(Relaxed), 6 * 16 + 1, "and every bulk ring has its turn");
    }

    /// Goal:   S7: a turn ends after so many bytes.
    /// Method: calls of 1000 bytes against a limit of 4000, one round.
    #[test]
    fn s7_a_turn_ends_after_its_bytes() {
        let mut core = core(ServerConfig { bytes_per_turn: 4000, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        for _ in 0..40 {
            assert!(client.call_of(INTERACTIVE, MessageType::ECHO, 1000));
        }
        // A batch of eight is begun while less than the limit has been used.
        assert_eq!(round(&mut core), 8);
        assert_eq!(round(&mut core), 8);
    }

    /// Goal:   S7: once rounds are longer than a turn may be, turns end by the clock; afterwards it is not asked any
    ///         more.
    /// Method: a clock that every call moves on by 150 us, against 200 us a turn; then one that stands still.
    #[test]
    fn s7_long_turns_are_ended_by_the_clock() {
        let config = ServerConfig { entries_per_turn: 64, ..ServerConfig::default() };
        let mut core = core(config);
        let mut client = Client::join(&mut core);
        let state = Arc::clone(&core.state);
        let mut slow = || 1_000_000 + 150_000 * state.load(Relaxed);
        let nobody = &mut |_, _| unreachable!("there is one reactor");
        let mut most_before_timing = 0;
        // Busy rounds, until two in a row have been timed.
        for _ in 0..12 {
            while client.call(INTERACTIVE, 0) {}
            most_before_timing = core.round(&mut slow, nobody).max(most_before_timing);
            while client.take(INTERACTIVE).is_some() {}
        }
        assert!(most_before_timing > 8, "turns are not timed while nothing is known: {most_before_timing}");
        while client.call(INTERACTIVE, 0) {}
        assert_eq!(core.round(&mut slow, nobody), 8, "one batch of 8 x 150 us is a turn");
        while client.take(INTERACTIVE).is_some() {}
        let mut taken = 0;
        for _ in 0..40 {
            while client.call(INTERACTIVE, 0) {}
            taken = core.round(&mut || 77_000_000, nobody);
            while client.take(INTERACTIVE).is_some() {}
        }
        assert!(taken > 8, "short rounds are not timed: {taken}");
    }

    /// Goal:   R2.9, S11: a call whose deadline has passed is answered so and not run; the clock is asked
    ///         only where there is a deadline.
    /// Method: time is an input.
    #[test]
    fn r2_9_s11_a_passed_deadline_is_answered_and_nothing_runs() {
        let mut core = core(ServerConfig { time_calls: false, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        for deadline in [0, 99, 100, 101] {
            assert!(client.call(INTERACTIVE, deadline));
        }
        let mut asked = 0;
        let mut clock = || {
            asked += 1;
            100
        };
        core.round(&mut clock, &mut |_, _| unreachable!("there is one reactor"));
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
        assert!(bad.call(BULK, 0));
        round(&mut core);
        assert!(bad.take(BULK).is_none(), "nothing runs after a broken entry, on whichever ring");
        assert_eq!(core.take_fault(), Some((bad.id, PeerFault::Kind { kind: 99 })));
        assert!(bad.take(INTERACTIVE).is_some(), "what came before the broken entry was answered");
        assert!(good.take(INTERACTIVE).is_some());
        core.unseat(bad.id).unwrap();
        let next = Client::join(&mut core);
        assert_eq!(next.id.index, bad.id.index);
        assert!(core.lane(bad.id).is_none() && core.lane(next.id).is_some());
    }

    /// Text of `AnalyzeFile` for a file.
    #[cfg(feature = "messages")]
    const FILE: &[u8] = br#"{"path":"some/file"}"#;

    impl Client {
        /// A call of `AnalyzeFile` with this body, in one frame.
        #[cfg(feature = "messages")]
        fn analyze(&mut self, ring: usize, body: &[u8], deadline: u64) -> (u32, u32) {
            let grant = self.lane.slots.take(body.len()).unwrap();
            self.lane.common.payload.write(LaneLayout::slot_offset(grant.slot), body);
            let entry = Submission {
                kind: kind::CALL,
                flags: flag::END,
                message_type: MessageType::ANALYZE_FILE.0,
                connection: self.connections[ring],
                slot: grant.slot,
                generation: grant.generation,
                len: body.len() as u32,
                response_count: 1,
                response_slot: grant.slot,
                deadline,
                ..Submission::default()
            };
            assert!(self.lane.submissions[ring].push(entry.pack()).unwrap());
            let call = (grant.slot, grant.generation);
            self.lane.slots.advance(grant);
            call
        }

        /// The next answer: status and bytes.
        fn answer(&mut self, ring: usize) -> Option<(Status, Vec<u8>)> {
            let completion = self.take(ring)?;
            let mut bytes = vec![0; completion.len as usize];
            self.lane.common.payload.read(LaneLayout::slot_offset(completion.slot), &mut bytes);
            Some((Status::from_code(completion.status).unwrap(), bytes))
        }
    }

    /// Goal:   R2.11: a call that takes system calls is handed out, holds up nobody, and is answered once the reactor
    ///         has its answer, on either ring, also of a lane that sleeps; content takes none.
    /// Method: by hand.
    #[cfg(feature = "messages")]
    #[test]
    fn r2_11_a_deferred_call_is_answered_from_outside() {
        let mut core = core(ServerConfig::default());
        let mut client = Client::join(&mut core);
        for ring in [INTERACTIVE, BULK] {
            client.analyze(ring, FILE, 0);
            client.analyze(ring, br#"{"content":"x"}"#, 0);
            client.analyze(ring, b"nonsense", 0);
            assert!(client.call(ring, 0));
            round(&mut core);
            let (status, facts) = client.answer(ring).unwrap();
            assert!(status == Status::Ok && facts.starts_with(br#"{"size":1,"#));
            assert_eq!(client.answer(ring).unwrap().0, Status::DecodeError);
            assert_eq!(client.answer(ring).unwrap().0, Status::Ok);
            assert!(client.answer(ring).is_none() && core.has_jobs() && !core.has_exchanges());

            let job = core.next_job().unwrap();
            assert_eq!(job.path.to_str(), Some("some/file"));
            assert!(!core.has_jobs() && core.next_job().is_none());
            core.cool(client.id);
            assert_eq!(core.answer(job.ticket, Answer::of(b"found".to_vec())), Some(client.id));
            core.heat(client.id);
            assert!(core.lane(client.id).unwrap().has_work().unwrap());
            assert_eq!(round(&mut core), 1);
            assert_eq!(client.answer(ring), Some((Status::Ok, b"found".to_vec())));
            assert_eq!(core.answer(job.ticket, Answer::of(b"again".to_vec())), None);
            assert_eq!(round(&mut core), 0);
        }
    }

    /// Goal:   R2.6: a client that cancels a call which waits, and sends nothing else, is among those to be woken: its end
    ///         has been published.
    #[cfg(feature = "messages")]
    #[test]
    fn r2_6_whoever_cancels_a_waiting_call_is_woken() {
        let mut core = core(ServerConfig::default());
        let mut client = Client::join(&mut core);
        for ring in [INTERACTIVE, BULK] {
            let (slot, generation) = client.analyze(ring, FILE, 0);
            round(&mut core);
            core.untouch();
            let word = ClientWord { generation, cancelled: true, released: 0 };
            client.lane.common.client_words[slot as usize].store(word.pack(), Relaxed);
            client.lane.common.hints.set(slot);
            assert_eq!(round(&mut core), 1);
            assert_eq!(core.touched(), [client.id.index]);
            assert_eq!(client.answer(ring).unwrap().0, Status::Cancelled);
            core.untouch();
            assert_eq!((round(&mut core), core.touched().len()), (0, 0));
        }
    }

    /// Goal:   S10, trap 15: the answer of a call that has ended meets nobody, whoever is in its place; the reactor is
    ///         told that nobody waits.
    /// Method: a deadline that passes, a session that ends; each time another call takes the same slot, exchange and
    ///         seat before the answer comes.
    #[cfg(feature = "messages")]
    #[test]
    fn s10_trap15_a_late_answer_of_a_deferred_call_meets_nobody() {
        let mut core = core(ServerConfig::default());
        let mut client = Client::join(&mut core);
        client.analyze(INTERACTIVE, FILE, 100);
        round(&mut core);
        let late = core.next_job().unwrap();
        core.end_overdue(100, false);
        assert_eq!(client.answer(INTERACTIVE).unwrap().0, Status::DeadlineExceeded);
        assert_eq!(core.take_given_up(), [late.ticket.number]);

        client.analyze(INTERACTIVE, FILE, 0);
        round(&mut core);
        let next = core.next_job().unwrap();
        assert_eq!((next.ticket.seat, next.ticket.exchange), (late.ticket.seat, late.ticket.exchange));
        assert_eq!(core.answer(late.ticket, Answer::of(b"late".to_vec())), None);
        round(&mut core);
        assert!(client.answer(INTERACTIVE).is_none());

        core.unseat(client.id).unwrap();
        assert_eq!(core.take_given_up(), [next.ticket.number]);
        let mut other = Client::join(&mut core);
        other.analyze(INTERACTIVE, FILE, 0);
        round(&mut core);
        let last = core.next_job().unwrap();
        assert_eq!((last.ticket.seat, last.ticket.exchange), (next.ticket.seat, next.ticket.exchange));
        assert_eq!(core.answer(next.ticket, Answer::of(b"late".to_vec())), None);
        assert_eq!(core.answer(last.ticket, Answer::of(b"right".to_vec())), Some(other.id));
        round(&mut core);
        assert_eq!(other.answer(INTERACTIVE), Some((Status::Ok, b"right".to_vec())));
        assert!(!core.has_jobs());
    }

    /// Goal:   S12: calls beyond the jobs that there may be are answered `Overloaded` at once and leave nothing.
    /// Method: one more than there may be; a job that nobody has taken yet goes with its session.
    #[cfg(feature = "messages")]
    #[test]
    fn s12_deferred_calls_beyond_the_limit_are_refused() {
        let mut core = core(ServerConfig { entries_per_turn: 1000, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        for _ in 0..=crate::config::FILE_READS_MAX {
            client.analyze(INTERACTIVE, FILE, 0);
        }
        round(&mut core);
        assert_eq!(client.answer(INTERACTIVE), Some((Status::Overloaded, Vec::new())));
        assert!(client.answer(INTERACTIVE).is_none());
        core.unseat(client.id).unwrap();
        assert!(!core.has_jobs() && !core.has_exchanges());
    }

    /// Goal:   an answer that exceeds the longest message is `TooLarge`, deferred or not.
    #[cfg(feature = "messages")]
    #[test]
    fn r1_5_a_deferred_answer_that_is_too_long_is_refused() {
        let mut core = core(ServerConfig { max_message_size: 20, ..ServerConfig::default() });
        let mut client = Client::join(&mut core);
        client.analyze(INTERACTIVE, br#"{"content":"x"}"#, 0);
        client.analyze(INTERACTIVE, FILE, 0);
        round(&mut core);
        assert_eq!(client.answer(INTERACTIVE), Some((Status::TooLarge, Vec::new())));
        let job = core.next_job().unwrap();
        core.answer(job.ticket, Answer::of(vec![7; 21])).unwrap();
        round(&mut core);
        assert_eq!(client.answer(INTERACTIVE), Some((Status::TooLarge, Vec::new())));
    }

    /// Goal:   R1.5: the longest message holds below the size of a slot, too, for requests and for answers in one frame.
    #[test]
    fn r1_5_a_longest_message_below_a_slots_size_holds() {
        static ANSWERS: HandlerTable<AtomicU64> = HandlerTable::with_builtins()
            .on(COUNT, |_, request, reply| reply.write(&[7; 64][..2 * request.len()]));
        let mut core = core(ServerConfig { max_message_size: 20, ..ServerConfig::default() });
        core.handlers = ANSWERS.as_slice();
        let mut client = Client::join(&mut core);
        for (of, len, expected) in [
            (MessageType::ECHO, 20, Status::Ok),
            (MessageType::ECHO, 21, Status::TooLarge),
            (COUNT, 10, Status::Ok),
            (COUNT, 11, Status::TooLarge),
        ] {
            assert!(client.call_of(INTERACTIVE, of, len));
            round(&mut core);
            let (status, answer) = client.answer(INTERACTIVE).unwrap();
            assert_eq!(status, expected, "{of:?} of {len} bytes");
            assert_eq!(answer.len(), if status == Status::Ok { 20 } else { 0 });
        }
    }

    /// Goal:   S12, R1.9: a client that does not read its answers is not served beyond what the server keeps for it, and
    ///         nobody else notices; once it has cancelled them it is served on.
    /// Method: sixty calls, each answered by 1 MiB where a slot holds 1 KiB; a call of another session; cancels.
    #[test]
    fn s12_r1_9_answers_that_nobody_reads_stop_their_own_lane() {
        static BIG: HandlerTable<AtomicU64> =
            HandlerTable::with_builtins().on(COUNT, |_, _, reply| reply.write(&vec![7; 1 << 20]));
        let mut core = core(ServerConfig::default());
        core.handlers = BIG.as_slice();
        let (mut greedy, mut other) = (Client::join(&mut core), Client::join(&mut core));
        for _ in 0..60 {
            assert!(greedy.call_of(INTERACTIVE, COUNT, 8));
        }
        // First frames are taken and kept, so that no answer has room.
        while round(&mut core) > 0 {
            while greedy.take(INTERACTIVE).is_some() {}
        }
        let kept = core.exchanges.live();
        // At most as many as pass the limit, and those of a batch that had begun.
        assert!((40..50).contains(&kept), "{kept} answers are kept");
        assert!(other.call_of(INTERACTIVE, MessageType::ECHO, 9));
        round(&mut core);
        assert_eq!(other.answer(INTERACTIVE), Some((Status::Ok, vec![0; 9])));
        assert!(
            !core.lane(greedy.id).unwrap().has_work().unwrap(),
            "nothing can be done until something is read"
        );
        // The slot that both OPENs had is in its third generation. Those calls that have not begun are cancelled as well.
        for generation in [1, 2, 3] {
            for slot in 0..greedy.lane.slots.numbers() {
                let word = ClientWord { generation, cancelled: true, released: 0 };
                greedy.lane.common.client_words[slot as usize].store(word.pack(), Relaxed);
                greedy.lane.common.hints.set(slot);
            }
            while round(&mut core) > 0 {
                while greedy.take(INTERACTIVE).is_some() {}
            }
        }
        assert_eq!(core.exchanges.live(), 0);
    }

    /// Goal:   a plain call of a type that has a handler for pieces only is for that handler.
    #[test]
    fn a_plain_call_is_given_to_a_handler_for_pieces_if_there_is_no_other() {
        struct Count;
        impl Pieces<AtomicU64> for Count {
            fn take(
                &mut self,
                _: &Context<'_, AtomicU64>,
                bytes: &[u8],
                last: bool,
                reply: &mut Reply<'_>,
            ) -> Result<Progress, HandlerError> {
                reply.write(&[bytes.len() as u8])?;
                Ok(if last { Progress::Done } else { Progress::Took(bytes.len()) })
            }
        }
        static PIECES: HandlerTable<AtomicU64> =
            HandlerTable::empty().on_pieces(COUNT, |_, _| Ok(Box::new(Count)));
        let mut core = core(ServerConfig::default());
        core.handlers = PIECES.as_slice();
        let mut client = Client::join(&mut core);
        assert!(client.call_of(INTERACTIVE, COUNT, 9) && client.call_of(INTERACTIVE, MessageType::ECHO, 9));
        round(&mut core);
        let answers = [client.answer(INTERACTIVE).unwrap(), client.answer(INTERACTIVE).unwrap()];
        assert_eq!(answers, [(Status::Ok, vec![9]), (Status::UnknownType, Vec::new())]);
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

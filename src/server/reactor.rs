//! A reactor: one thread, one ring, its lanes of all sessions. It turns kernel answers into inputs of [`Core`]
//! and the core's outputs into ring operations; it decides nothing about messages.
//!
//! Reactor 0 is home to every session and has the duties of `home.rs` beside; the others have lanes only.

use super::analyze::{FileDesk, ReadId};
use super::core::{Core, SessionId};
use super::crew::{BellSocket, Crew, Message, Notice};
use super::home::Home;
use super::idle::{Habits, LOOKS};
use super::inspect::Inspections;
use super::lane::SessionLane;
use super::spin::SpinBudget;
use super::storm::{self, Storm};
use super::throttle::Throttle;
use crate::config::{Backend, ServerConfig, WaitPolicy};
use crate::error::Result;
use crate::inspect::Running;
use crate::machine::Driver;
use crate::metrics::{Counters, Metrics, Totals, TypeTable};
use crate::protocol::handshake::{DisconnectReason, LaneGrant};
use crate::protocol::rendezvous::{self, monotonic_ns};
use doorbell_shm::PeerFault;
use doorbell_shm::bell::{self, WAITER_FUTEX, WAITER_SOCKET, fence_before_bell};
use doorbell_shm::kill_point;
use doorbell_shm::segment::Segment;
use doorbell_uring::{Completion, PollFlags, SetupError, Step, Token, Wait};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Waiters woken on a client's bell at once: one leader passes it on (F57).
const CLIENT_WAKES: u32 = 4;
/// Work between two looks at the clock, busy or not: what is due by it does not wait for a pause (F27, S6). A round
/// counts as one, and [`ENTRIES_PER_ROUND`] entries, that may be frames of 16 KiB, as another.
const ROUNDS_PER_TICK: u32 = 64;
/// See [`ROUNDS_PER_TICK`].
const ENTRIES_PER_ROUND: u32 = 4;
/// Between two times that a busy reactor does what is due by the clock: it looks at every call that has a deadline.
const BUSY_TICK_NS: u64 = 250_000;
/// Entries taken before clients are looked at behind a fence, however busy the reactor is. They are looked at
/// without one after every round.
const ENTRIES_PER_FENCE: u32 = 256;
/// Rounds without work after which clients are looked at behind a fence: by then what was published has
/// left the store buffer, and the fence costs 10 ns instead of 100.
const QUIET_ROUNDS: u32 = 4;
/// Rounds without work after which a polling reactor lets others run, and again after as many: about a
/// microsecond. A client on its core would wait for milliseconds else.
const ROUNDS_PER_YIELD: u32 = 32;
/// Sweeps that a client has between taking the bell's mark and waking before it is healed: it may have been
/// preempted between the two.
const MARK_TAKEN_SWEEPS: u32 = 3;
/// Sweeps, the first of which looks how much lies in the rings: once a second.
const SWEEPS_PER_LOOK: u64 = 20;
/// Handed-over calls between two sweeps (50 ms) up to which they are rare: 5000 a second.
const RARE_PER_SWEEP: u32 = 250;
/// Lanes that have gone since free memory was last given back to the kernel, before that is done again: what they
/// have left is some 64 KiB.
const GONE_PER_TRIM: u32 = 64;
/// How long a lane is left alone whose wait the kernel had no memory for (F37).
const ARM_AGAIN_NS: u64 = 10_000_000;
/// Between two looks at leases while somebody waits for memory.
const MEMORY_TICK_NS: u64 = 1_000_000;
/// How long a reactor polls for the next frame of a call that has several, before it sleeps, whatever its budget for
/// polling: a client that sends a long body is about to send more.
const FRAME_POLL_NS: u64 = 50_000;

/// Tickets that are looked at between two rounds, some 100 ns each.
const TICKETS_PER_ROUND: u32 = 128;

/// What a completion is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Shutdown,
    /// A socket whose hello has not come; index and generation of its half-open record.
    HalfOpen(SessionId),
    /// A session's socket.
    Socket(SessionId),
    /// A session's process.
    Process(SessionId),
    /// The server bell of a session's lane here.
    Bell(SessionId),
    /// Another reactor has put something into the inbox.
    Mail,
    /// Something is due by the clock.
    Timer,
    /// A file that is being read.
    File(ReadId),
    /// The bell of whoever answers calls from elsewhere.
    Tickets,
}

/// Tokens: kind in the top 4 bits, 28 bits of generation, 32 bits of index.
pub(super) const GENERATION_MASK: u32 = (1 << 28) - 1;

impl Source {
    pub fn token(self) -> Token {
        let none = SessionId { index: 0, generation: 0 };
        let (kind, id) = match self {
            Self::Listener => (1, none),
            Self::Shutdown => (2, none),
            Self::HalfOpen(id) => (3, id),
            Self::Socket(id) => (4, id),
            Self::Process(id) => (5, id),
            Self::Bell(id) => (6, id),
            Self::Mail => (7, none),
            Self::Timer => (8, none),
            Self::File(ReadId { index, generation }) => (9, SessionId { index, generation }),
            Self::Tickets => (10, none),
        };
        Token(kind << 60 | u64::from(id.generation & GENERATION_MASK) << 32 | u64::from(id.index))
    }

    fn of(token: Token) -> Option<Self> {
        let generation = (token.0 >> 32) as u32 & GENERATION_MASK;
        let id = SessionId { index: token.0 as u32, generation };
        Some(match token.0 >> 60 {
            1 => Self::Listener,
            2 => Self::Shutdown,
            3 => Self::HalfOpen(id),
            4 => Self::Socket(id),
            5 => Self::Process(id),
            6 => Self::Bell(id),
            7 => Self::Mail,
            8 => Self::Timer,
            9 => Self::File(ReadId { index: id.index, generation }),
            10 => Self::Tickets,
            _ => return None,
        })
    }
}

/// The kernel's side of a lane.
#[derive(Debug)]
struct Peer {
    id: SessionId,
    socket: Arc<OwnedFd>,
    /// Where the client rings a further lane's bell, if it rings sockets. That of a home lane is the session's.
    bell: Option<OwnedFd>,
    /// A FUTEX_WAIT on its bell has been pushed and has not completed. Never the word's value (P5). Where the client
    /// rings sockets: the lane sleeps, and no ring has come since.
    bell_armed: bool,
    /// Woken, and no entry has been seen since.
    woken: bool,
    /// Sweeps in a row that found the same work although nobody had rung.
    suspect: u32,
    /// Entries that the lane had taken then.
    suspect_taken: u64,
    storm: Storm,
    /// Left alone until then, neither polled nor armed; 0 for not.
    rests_until_ns: u64,
    habits: Habits,
}

/// A lane whose memory the kernel may still be asked about.
#[derive(Debug)]
struct Parting {
    id: SessionId,
    _segment: Arc<Segment>,
    /// Its wait has been cancelled, and the completion has not come.
    bell_armed: bool,
}

/// What the end of a wait on a bell means (F37).
#[derive(Debug, PartialEq, Eq)]
enum AfterWait {
    /// Rung, or the word had changed before the wait began: there may be work.
    Look,
    /// The kernel had no memory: try again by the clock.
    Later,
    /// Cancelled by ourselves.
    Nothing,
    /// The word is gone or was none: our own mistake, which this session alone shall notice.
    End(Errno),
}

impl AfterWait {
    fn of(result: std::result::Result<u32, Errno>) -> Self {
        match result {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Self::Look,
            Err(Errno::NOMEM) => Self::Later,
            Err(Errno::CANCELED) => Self::Nothing,
            Err(errno) => Self::End(errno),
        }
    }
}

/// What a reactor's loop remembers from one step to the next.
#[derive(Debug, Default)]
pub(super) struct Pace {
    idle_rounds: u32,
    unfenced: u32,
    rounds_since_tick: u32,
    busy_tick_ns: u64,
    wakes_postponed: bool,
    handed_over: bool,
    /// Until when to poll under the policy `handoff`; 0 while it has not been asked.
    polls_until_ns: u64,
}

pub(crate) struct Reactor<S: 'static> {
    pub(super) driver: Driver,
    pub(super) core: Core<S>,
    pub(super) crew: Crew,
    pub(super) log: Throttle,
    /// The duties of the reactor that sessions are at home with.
    home: Option<Home>,
    pub(super) desk: FileDesk,
    totals: Totals,
    peers: Vec<Option<Peer>>,
    parting: Vec<Parting>,
    /// Lanes that have gone since the heap was last trimmed.
    gone: u32,
    /// Earliest end of a lane's rest; 0 for none.
    rest_ends_ns: u64,
    spin: SpinBudget,
    next_sweep_ns: u64,
    /// When the earliest timeout on the ring ends; `u64::MAX` if there is none. One timeout serves many sleeps: a
    /// timeout of each sleep's own would have to be armed and cancelled in every cold call.
    timer_ns: u64,
    /// Times that work ran out behind a caller that had handed its core over, since the last sweep.
    handed_over_calls: u32,
    /// They were few between the last two sweeps.
    handed_over_rarely: bool,
    /// When to look at leases next, while somebody waits.
    memory_tick_ns: u64,
    /// Lanes that are being put to sleep.
    arming: Vec<SessionId>,
    /// A FUTEX_WAIT on the bell of tickets has been pushed and has not completed.
    tickets_armed: bool,
    /// What is told to whoever watches.
    pub(super) inspections: Inspections,
    pub(super) stopping: bool,
    /// Nothing is waited for any more.
    pub(super) hurried: bool,
}

impl<S> Reactor<S> {
    /// A reactor that runs on the calling thread, and must be run there. `wake_ns` is what waking it from
    /// another core costs.
    pub fn new(
        driver: Driver,
        core: Core<S>,
        crew: Crew,
        totals: Totals,
        home: Option<Home>,
        desk: FileDesk,
        wake_ns: u64,
    ) -> Self {
        let config = core.config();
        let percent = if config.policy == WaitPolicy::Handoff { config.spin_percent } else { 0 };
        Self {
            driver,
            crew,
            home,
            desk,
            totals,
            log: Throttle::default(),
            peers: Vec::new(),
            parting: Vec::new(),
            gone: 0,
            rest_ends_ns: 0,
            spin: SpinBudget::new(wake_ns, percent),
            next_sweep_ns: 0,
            timer_ns: u64::MAX,
            handed_over_calls: 0,
            handed_over_rarely: true,
            memory_tick_ns: 0,
            arming: Vec::new(),
            tickets_armed: false,
            inspections: Inspections::default(),
            stopping: false,
            hurried: false,
            core,
        }
    }

    /// Serves until told to stop; returns what this reactor counted.
    pub fn run(mut self) -> Result<Counters> {
        let served = self.serve().and_then(|()| self.drain());
        if let Err(error) = served {
            if self.crew.is_home() {
                // Before the sockets close: other reactors may take entries until they hear of it, so a client must not
                // conclude from a socket that is gone that nobody does.
                self.core.close_all();
            }
            return Err(error);
        }
        self.stop()
    }

    /// Begins to listen, if it is home.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.with_home(Home::begin)
    }

    fn serve(&mut self) -> Result<()> {
        self.begin()?;
        let mut pace = Pace::default();
        while !self.stopping {
            if self.step(&mut pace)? {
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// One round, and what there is to do beside it; whether the reactor is to sleep then.
    #[inline(always)]
    pub(super) fn step(&mut self, pace: &mut Pace) -> Result<bool> {
        let spins = self.core.config().policy == WaitPolicy::Spin;
        pace.rounds_since_tick += 1;
        if pace.rounds_since_tick >= ROUNDS_PER_TICK {
            pace.rounds_since_tick = 0;
            let now = monotonic_ns();
            if now >= pace.busy_tick_ns {
                self.core.settle_times(&mut || now);
                pace.busy_tick_ns = now + BUSY_TICK_NS;
                self.tick(now)?;
            }
        }
        // DEFER_TASKRUN: without this enter a bell rung by a sleeping lane's client is never seen.
        if self.driver.pending() && !std::mem::take(&mut pace.wakes_postponed) {
            self.core.settle_times(&mut monotonic_ns);
            self.driver.enter(Wait::No)?;
            self.events()?;
            if self.stopping {
                return Ok(false);
            }
        }
        let mut taken = self.round();
        pace.rounds_since_tick += taken / ENTRIES_PER_ROUND;
        self.end_faulty()?;
        let beside = self.core.has_jobs() || self.core.has_questions() || self.core.tickets().has_work();
        if beside || self.core.leases.has_work() {
            self.core.settle_times(&mut monotonic_ns);
        }
        if self.core.leases.has_work() {
            self.serve_memory()?;
        }
        if self.core.has_questions() {
            self.serve_inspections()?;
            taken += 1;
        }
        if self.core.has_jobs() {
            taken += self.serve_files()?;
        }
        if self.core.tickets().has_work() {
            taken += self.core.serve_tickets(TICKETS_PER_ROUND, &mut monotonic_ns);
            self.end_faulty()?;
        }
        self.core.wake_holders();
        if taken > 0 {
            // For whoever asks for the counters: a copy that is as old as one round.
            self.core.metrics.enters = self.driver.counters().enters;
            if pace.idle_rounds > 0 && self.spin.is_timing() {
                let now = monotonic_ns();
                self.core.metrics.spun_ns += self.spin.polled(now);
                self.spin.work(now);
            }
            pace.idle_rounds = 0;
            pace.unfenced += taken;
            if pace.unfenced >= ENTRIES_PER_FENCE || self.somebody_seems_asleep() {
                pace.unfenced = 0;
                // If the next round finds nothing the wakes go with the wait for more, in one enter (R1.2).
                // They are put off for one round, not for as long as there is work.
                pace.wakes_postponed = !spins && !self.driver.pending();
                self.ring_clients()?;
            }
            return Ok(false);
        }
        pace.idle_rounds = pace.idle_rounds.wrapping_add(1);
        if pace.idle_rounds == 1 {
            pace.handed_over = self.core.take_handed_over();
            pace.polls_until_ns = self.poll_budget(pace.handed_over);
        }
        let expects = !self.core.all_cold() || self.core.tickets().attached() > 0;
        let polls = expects && (spins || pace.polls_until_ns != 0);
        // Calls may also be answered between two rounds, however long there has been nothing to take: by a deadline, say.
        if (!polls || pace.idle_rounds >= QUIET_ROUNDS) && !self.core.touched().is_empty() {
            pace.unfenced = 0;
            self.ring_clients()?;
        }
        if pace.handed_over && pace.idle_rounds == 1 && self.hand_back() {
            // The caller has its answer, and its core back, before we arm and sleep: that takes as long as
            // the call. We go on when it sleeps, or calls again.
            self.submit()?;
            std::thread::yield_now();
            self.core.settle_times(&mut monotonic_ns);
        } else if polls {
            self.submit()?;
            if pace.idle_rounds.is_multiple_of(ROUNDS_PER_YIELD) {
                self.trim();
                std::thread::yield_now();
                self.core.settle_times(&mut monotonic_ns);
                if !spins && monotonic_ns() >= pace.polls_until_ns {
                    self.core.metrics.spun_ns += self.spin.polled(monotonic_ns());
                    pace.polls_until_ns = 0;
                }
            } else {
                std::hint::spin_loop();
            }
        } else {
            return Ok(true);
        }
        Ok(false)
    }

    #[inline(always)]
    fn round(&mut self) -> u32 {
        self.core.pulse.beat();
        let (crew, home) = (&self.crew, &self.home);
        let mut announce = |index: u32, notice: Notice| {
            if let Some(home) = home {
                home.announce(crew, index, notice);
            }
        };
        self.core.round(&mut monotonic_ns, &mut announce)
    }

    /// The same for a server that stops.
    pub(super) fn drain_round(&mut self) -> u32 {
        self.core.pulse.beat();
        let (crew, home) = (&self.crew, &self.home);
        let mut announce = |index: u32, notice: Notice| {
            if let Some(home) = home {
                home.announce(crew, index, notice);
            }
        };
        self.core.drain_round(&mut monotonic_ns, &mut announce)
    }

    /// There is nothing to do any more: until when to poll, 0 for not at all.
    #[inline(always)]
    fn poll_budget(&mut self, handed_over: bool) -> u64 {
        // A caller that has handed its core over waits on this very core: no poll, and no clock.
        if handed_over || (self.spin.is_zero() && !self.core.has_exchanges()) {
            self.spin.leave_untimed();
            return 0;
        }
        let now = monotonic_ns();
        let budget = if self.spin.is_zero() { 0 } else { self.spin.idle(now) };
        if self.core.has_exchanges() { budget.max(now + FRAME_POLL_NS) } else { budget }
    }

    /// Gives back and grants memory; ends the sessions that could not be answered.
    #[cold]
    pub(super) fn serve_memory(&mut self) -> Result<()> {
        self.core.serve_memory(&mut monotonic_ns)?;
        self.end_faulty()
    }

    /// Ends the sessions that broke the protocol.
    #[inline(always)]
    pub(super) fn end_faulty(&mut self) -> Result<()> {
        while let Some((id, fault)) = self.core.take_fault() {
            self.fault(id, fault)?;
        }
        Ok(())
    }

    /// Takes back leases that nobody uses, and, while others wait, those that somebody keeps.
    fn look_after_leases(&mut self, now: u64) -> Result<()> {
        let elsewhere = self.core.others_want_memory();
        let mut freed = false;
        for index in 0..self.peers.len() as u32 {
            if self.peers[index as usize].is_none() || !self.core.has_leases(index) {
                continue;
            }
            let Some(taken) = self.core.look_after_leases(index, now, elsewhere)? else { continue };
            freed = true;
            if taken.by_force {
                let bytes = taken.bytes;
                self.log.warn(|| {
                    tracing::warn!(session = index, bytes, "memory taken back from a lane that stood still")
                });
            }
        }
        if freed || self.core.leases.has_work() {
            self.serve_memory()?;
        }
        Ok(())
    }

    /// Whether to let the caller run before arming and sleeping: while calls are so rare that nobody minds the
    /// switch that this costs.
    fn hand_back(&mut self) -> bool {
        self.handed_over_calls += 1;
        self.handed_over_rarely
    }

    /// Does something that only the home reactor does, with the rest of it at hand.
    pub(super) fn with_home(&mut self, duty: impl FnOnce(&mut Home, &mut Self) -> Result<()>) -> Result<()> {
        let Some(mut home) = self.home.take() else { return Ok(()) };
        let done = duty(&mut home, self);
        self.home = Some(home);
        done
    }

    /// A look without a fence: good enough to ring at once, not to conclude that nobody sleeps.
    #[inline(always)]
    fn somebody_seems_asleep(&self) -> bool {
        let asleep = |index: &u32| {
            self.core.seated(*index).is_some_and(|lane| lane.lane().common.client_bell.seems_asleep())
        };
        self.core.touched().iter().any(asleep)
    }

    /// Queues wakes for the clients for whom something was completed and who sleep: one fence for all of them,
    /// and one enter (R1.2), the caller's next.
    pub(super) fn ring_clients(&mut self) -> Result<()> {
        self.core.settle_times(&mut monotonic_ns);
        // Pairs with the fence in `ClientBell::mark`.
        fence_before_bell();
        let (mut rung, mut awake) = (0, 0);
        for i in 0..self.core.touched().len() {
            let index = self.core.touched()[i];
            let Some(lane) = self.core.seated(index) else { continue };
            let bell = &lane.lane().common.client_bell;
            let waiters = bell.take();
            if waiters == 0 {
                awake += 1;
                continue;
            }
            kill_point!("server.bell.taken");
            if waiters & WAITER_FUTEX != 0 {
                self.driver.futex_wake(&bell.0, CLIENT_WAKES)?;
            }
            if waiters & WAITER_SOCKET != 0
                && let Some(Some(peer)) = self.peers.get(index as usize)
            {
                ring_socket(&peer.socket);
            }
            rung += 1;
        }
        let metrics = &mut self.core.metrics;
        metrics.wakes_rung += rung;
        metrics.wakes_suppressed += awake;
        metrics.wakes_in_one_enter_max = metrics.wakes_in_one_enter_max.max(rung);
        kill_point!("server.clients.rung");
        self.core.untouch();
        Ok(())
    }

    /// Makes the kernel see what has been queued.
    #[inline(always)]
    fn submit(&mut self) -> Result<()> {
        if self.driver.pending() {
            self.driver.enter(Wait::No)?;
        }
        Ok(())
    }

    pub(super) fn events(&mut self) -> Result<()> {
        // What was queued about lanes that have gone has been submitted by the enter that brought us here.
        self.parting.retain(|parting| parting.bell_armed);
        while let Some(completion) = self.driver.next_completion() {
            let Completion { token, result } = completion;
            match Source::of(token) {
                Some(Source::Bell(id)) if self.driver.waits_on_words() => self.bell_rang(id, result)?,
                Some(Source::Bell(id)) => self.bell_socket_spoke(id, result)?,
                Some(Source::Mail) => self.mail()?,
                Some(Source::Timer) => {
                    self.timer_ns = u64::MAX;
                    self.tick(monotonic_ns())?;
                }
                Some(Source::File(id)) => self.file_came(id, result)?,
                Some(Source::Tickets) => {
                    self.tickets_armed = false;
                    self.core.metrics.wakeups += 1;
                }
                Some(source) => self.with_home(|home, reactor| home.event(reactor, source, result))?,
                None => {}
            }
        }
        Ok(())
    }

    /// The peer that a token's id names: the token has only 28 bits of the generation.
    fn peer(&mut self, id: SessionId) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(id.index as usize)?.as_mut()?;
        (peer.id.generation & GENERATION_MASK == id.generation & GENERATION_MASK).then_some(peer)
    }

    /// A wait on a lane's bell has ended.
    fn bell_rang(&mut self, id: SessionId, result: std::result::Result<u32, Errno>) -> Result<()> {
        let Some(peer) = self.peer(id) else {
            // The wait of a lane that has gone: the last that the kernel knew of its memory (P6).
            let gone = |p: &Parting| {
                p.id.index == id.index && p.id.generation & GENERATION_MASK == id.generation & GENERATION_MASK
            };
            self.parting.retain(|parting| !gone(parting));
            return Ok(());
        };
        peer.bell_armed = false;
        let id = peer.id;
        match AfterWait::of(result) {
            AfterWait::Look => {
                peer.woken = true;
                self.core.metrics.wakeups += 1;
                self.heat(id);
            }
            AfterWait::Later => self.rest(id, monotonic_ns() + ARM_AGAIN_NS),
            AfterWait::Nothing => {}
            AfterWait::End(error) => {
                tracing::error!(session = id.index, %error, "a bell could not be armed");
                self.give_up(id, Message::Unarmed(id))?;
            }
        }
        Ok(())
    }

    /// The socket of a further lane's bell has something to say (F38): a byte for each ring.
    fn bell_socket_spoke(&mut self, id: SessionId, result: std::result::Result<u32, Errno>) -> Result<()> {
        // No room to listen to it, or not to be listened to: to ask again at once would be a loop. The sweep finds its work.
        let Some(peer) = self.peer(id).filter(|_| result.is_ok()) else { return Ok(()) };
        let (id, Some(bell)) = (peer.id, &peer.bell) else { return Ok(()) };
        match rendezvous::receive(bell.as_fd(), &mut [0], RecvFlags::DONTWAIT) {
            Ok(packet) if packet.len > 0 => self.socket_rang(id)?,
            Err(Errno::AGAIN) => {}
            // Closed by a client that wants to be found by the sweep.
            Ok(_) | Err(_) => return Ok(()),
        }
        self.listen(id)
    }

    /// A client has rung by a socket. A ring for a lane that is awake is for nothing, like one without work.
    pub(super) fn socket_rang(&mut self, id: SessionId) -> Result<()> {
        match self.peer(id) {
            Some(peer) if peer.bell_armed => self.bell_rang(id, Ok(0)),
            Some(peer) => {
                peer.woken = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Listens to the socket that a lane is rung by. That of a home lane is listened to for its end in any case, but who
    /// rests is not heard (F24).
    pub(super) fn listen(&mut self, id: SessionId) -> Result<()> {
        let (by_socket, is_home) = (!self.driver.waits_on_words(), self.crew.is_home());
        let Some(Some(peer)) = self.peers.get(id.index as usize) else { return Ok(()) };
        let heard = peer.rests_until_ns == 0 || !by_socket;
        if is_home {
            let events = if heard { PollFlags::IN | PollFlags::RDHUP } else { PollFlags::RDHUP };
            self.driver.poll(peer.socket.as_fd(), events, Source::Socket(peer.id).token())?;
        } else if let Some(bell) = peer.bell.as_ref().filter(|_| heard) {
            self.driver.poll(bell.as_fd(), PollFlags::IN, Source::Bell(peer.id).token())?;
        }
        Ok(())
    }

    /// Polls a lane again.
    pub(super) fn heat(&mut self, id: SessionId) {
        if let Some(lane) = self.core.lane(id) {
            lane.lane().common.server_bell.clear();
        }
        self.core.heat(id);
    }

    /// Leaves a lane alone until then: its bell says awake, so that nobody rings it.
    fn rest(&mut self, id: SessionId, until_ns: u64) {
        let Some(peer) = self.peer(id) else { return };
        peer.rests_until_ns = until_ns;
        self.rest_ends_ns = if self.rest_ends_ns == 0 { until_ns } else { self.rest_ends_ns.min(until_ns) };
        if let Some(lane) = self.core.lane(id) {
            lane.lane().common.server_bell.clear();
        }
        self.core.cool(id);
    }

    /// Heats the lanes whose rest is over.
    fn end_rests(&mut self, now_ns: u64) -> Result<()> {
        self.rest_ends_ns = 0;
        for index in 0..self.peers.len() {
            let Some(peer) = self.peers[index].as_mut().filter(|peer| peer.rests_until_ns != 0) else {
                continue;
            };
            let (id, until_ns) = (peer.id, peer.rests_until_ns);
            if now_ns >= until_ns {
                peer.rests_until_ns = 0;
                self.heat(id);
                if !self.driver.waits_on_words() {
                    self.listen(id)?;
                }
            } else if self.rest_ends_ns == 0 || until_ns < self.rest_ends_ns {
                self.rest_ends_ns = until_ns;
            }
        }
        Ok(())
    }

    /// What other reactors have told.
    fn mail(&mut self) -> Result<()> {
        while let Some(message) = self.core.next_message() {
            match message {
                // Noted by the core already.
                Message::Notice(..) => {}
                Message::Lane { id, number, segment, socket, bell } => {
                    self.take_lane(id, number, segment, socket, bell)?
                }
                Message::End(id) => self.let_go(id)?,
                Message::Unarmed(id) => self.end(id, DisconnectReason::ProtocolViolation)?,
                Message::Fault(id, fault) => self.fault(id, fault)?,
                Message::Abuse(id, abuse) => self.abuse(id, abuse)?,
                Message::Punch(id) => {
                    if let Some(lane) = self.core.lane(id) {
                        lane.punch_excess()?;
                    }
                }
                Message::Inspect { ticket, inquiry, from } => self.inspect_for(ticket, inquiry, from)?,
                Message::Inspected { ticket, part, of } => self.inspected(ticket, *part, of),
                Message::Evict(id) => self.evict(id)?,
                Message::Limits(limits) => self.core.adopt(&limits),
                Message::Idle(id, idle) => self.with_home(|home, _| home.lane_is_idle(id, idle))?,
                Message::EndFor(id, reason) => self.end(id, reason)?,
                Message::Drain => self.stopping = true,
                Message::Quiet(id) => self.with_home(|home, _| home.lane_is_quiet(id))?,
                Message::Stop => (self.stopping, self.hurried) = (true, true),
            }
        }
        Ok(())
    }

    /// Rings another reactor for what has been put into its inbox.
    pub(super) fn ring_reactor(&mut self, reactor: usize) -> Result<()> {
        let crew = self.crew.clone();
        self.driver.msg_ring(crew.addresses[reactor].ring(), 0, Source::Mail.token())?;
        Ok(())
    }

    /// Tells the home reactor, which tells the others; the lane here is let go at once.
    fn give_up(&mut self, id: SessionId, message: Message) -> Result<()> {
        if self.crew.is_home() {
            return self.end(id, DisconnectReason::ProtocolViolation);
        }
        self.let_go(id)?;
        if self.crew.addresses[0].put(message) {
            self.ring_reactor(0)?;
        }
        Ok(())
    }

    /// A session has broken the protocol: it ends, here and everywhere (S9).
    fn fault(&mut self, id: SessionId, fault: PeerFault) -> Result<()> {
        // A session that is over has no connections any more: its calls that another reactor still finds break nothing.
        if self.core.lane(id).is_none() {
            return Ok(());
        }
        if self.crew.is_home() {
            self.log.warn(|| tracing::warn!(session = id.index, %fault, "protocol violation"));
        }
        self.give_up(id, Message::Fault(id, fault))
    }

    /// A client rings without cause, and has done so for long (F24).
    fn abuse(&mut self, id: SessionId, abuse: storm::Abuse) -> Result<()> {
        if self.crew.is_home() {
            self.log
                .warn(|| tracing::warn!(session = id.index, lasted_ns = abuse.lasted_ns, "doorbell abuse"));
            return self.end(id, DisconnectReason::DoorbellAbuse);
        }
        self.give_up(id, Message::Abuse(id, abuse))
    }

    /// Home: ends a session at every reactor.
    pub(super) fn end(&mut self, id: SessionId, reason: DisconnectReason) -> Result<()> {
        self.with_home(|home, reactor| home.end(reactor, id, reason))
    }

    /// Takes a lane of a session that is at home elsewhere, and tells its client.
    fn take_lane(
        &mut self,
        id: SessionId,
        number: u32,
        segment: Arc<Segment>,
        socket: Arc<OwnedFd>,
        bell: Option<BellSocket>,
    ) -> Result<()> {
        let (ours, theirs) = bell.map_or((None, None), |bell| (Some(bell.ours), Some(bell.theirs)));
        let grant = LaneGrant::new(number, self.crew.core());
        self.core.seat(id, SessionLane::new(segment, number)?);
        kill_point!("server.lane.seated");
        self.core.metrics.further_lanes += 1;
        // A client that is gone or does not listen finds out by itself.
        if let Err(error) =
            rendezvous::send(socket.as_fd(), grant.as_bytes(), theirs.as_ref().map(AsFd::as_fd))
        {
            tracing::debug!(%error, "a granted lane could not be announced");
        }
        self.add_peer(id, socket, ours);
        self.listen(id)?;
        tracing::debug!(session = id.index, lane = number, "lane opened");
        Ok(())
    }

    /// The kernel's side of a lane that has just been seated.
    pub(super) fn add_peer(&mut self, id: SessionId, socket: Arc<OwnedFd>, bell: Option<OwnedFd>) {
        let index = id.index as usize;
        if self.peers.len() <= index {
            self.peers.resize_with(index + 1, || None);
        }
        self.peers[index] = Some(Peer {
            id,
            socket,
            bell,
            bell_armed: false,
            woken: false,
            suspect: 0,
            suspect_taken: 0,
            storm: Storm::default(),
            rests_until_ns: 0,
            habits: Habits::default(),
        });
    }

    /// Lets go of a lane: wakes whoever sleeps on it, so that he sees that the session is over; cancels its wait.
    /// The memory stays mapped until the kernel has answered (P6).
    pub(super) fn let_go(&mut self, id: SessionId) -> Result<()> {
        let Some(lane) = self.core.unseat(id) else { return Ok(()) };
        self.gone = self.gone.saturating_add(1);
        let peer = self.peers.get_mut(id.index as usize).and_then(|peer| peer.take_if(|peer| peer.id == id));
        let bell_armed = self.driver.waits_on_words() && peer.as_ref().is_some_and(|peer| peer.bell_armed);
        self.driver.futex_wake(&lane.lane().common.client_bell.0, CLIENT_WAKES)?;
        if bell_armed || peer.as_ref().is_some_and(|peer| peer.bell.is_some()) {
            self.driver.cancel(Source::Bell(id).token())?;
        }
        self.parting.push(Parting { id, _segment: Arc::clone(lane.segment()), bell_armed });
        Ok(())
    }

    /// What is due by the clock: half-open sockets, the sweep, accepting again, rests that are over.
    pub(super) fn tick(&mut self, now: u64) -> Result<()> {
        let home_waits = self.home.as_ref().is_some_and(Home::waits);
        // A lane may have gone while it rested: the end of its rest is due all the same.
        let nothing_rests = self.rest_ends_ns == 0;
        let nobody_asks = self.inspections.due_ns() == u64::MAX && self.desk.due_ns() == u64::MAX;
        if self.core.live() == 0 && nothing_rests && !home_waits && nobody_asks {
            return Ok(());
        }
        self.trim_files(now)?;
        if self.rest_ends_ns != 0 && now >= self.rest_ends_ns {
            self.end_rests(now)?;
        }
        if home_waits {
            self.with_home(|home, reactor| home.tick(reactor, now))?;
        }
        let sweeps = now >= self.next_sweep_ns;
        self.core.end_overdue(now, sweeps);
        self.end_inspections(now);
        if sweeps || (self.memory_is_wanted() && now >= self.memory_tick_ns) {
            self.memory_tick_ns = now + MEMORY_TICK_NS;
            self.look_after_leases(now)?;
        }
        if sweeps {
            self.next_sweep_ns = now + self.core.config().sweep_interval.as_nanos() as u64;
            self.mail()?;
            self.sweep(now)?;
            self.with_home(Home::end_lost)?;
            self.with_home(Home::audit)?;
        }
        self.show();
        Ok(())
    }

    /// Whether somebody waits for memory, here or at another reactor.
    fn memory_is_wanted(&self) -> bool {
        self.core.budget.waiting() > 0
    }

    /// What the whole server has counted.
    pub(super) fn metrics(&self) -> Metrics {
        Metrics::of(&self.totals, Some(&self.core.metrics))
    }

    /// Handlers that run at this moment.
    pub(super) fn running(&self, now: u64) -> Vec<Running> {
        let running = |(i, table): (usize, &Arc<TypeTable>)| table.running(i as u32, now);
        self.totals.types.iter().enumerate().filter_map(running).collect()
    }

    /// Home: the process of a session, as the kernel names it for us; 0 where it cannot be told.
    pub(super) fn pid_of(&self, id: SessionId) -> u32 {
        let peer = self.peers.get(id.index as usize).and_then(Option::as_ref).filter(|peer| peer.id == id);
        let credentials = peer.and_then(|peer| doorbell_uring::peer_credentials(peer.socket.as_fd()).ok());
        credentials.map_or(0, |of| of.pid)
    }

    /// Shows the counters to the other reactors.
    pub(super) fn show(&mut self) {
        self.core.note_gauges();
        self.core.metrics.body_bytes = self.core.body_bytes() as u64;
        self.core.metrics.deferred_live = self.core.tickets().attached().into();
        self.core.metrics.deferred_detached = self.core.tickets().detached().into();
        self.core.metrics.staged_bytes = self.core.staging.staged_bytes() as u64;
        if self.crew.is_home() {
            self.core.metrics.budget_used = self.core.budget.used();
        }
        self.totals.boards[self.totals.own].show(&self.core.metrics);
    }

    /// Looks at every sleeping lane whether it rang or not (S6, F25). A lane with work and an untouched
    /// bell is a suspect, since its client may be about to ring; when the next sweep finds it so again, and
    /// nothing has been taken meanwhile, it is healed and counted.
    fn sweep(&mut self, now: u64) -> Result<()> {
        self.core.metrics.sweeps += 1;
        self.core.metrics.cpu_ns = thread_cpu_ns();
        if self.core.metrics.sweeps % SWEEPS_PER_LOOK == 1 {
            self.core.note_queues();
        }
        self.handed_over_rarely = self.handed_over_calls < RARE_PER_SWEEP;
        self.handed_over_calls = 0;
        let turn = self.core.metrics.sweeps as u32;
        for index in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[index] else { continue };
            let id = peer.id;
            // Our own record decides, not the word that the client can write (S2).
            let asleep = self.core.is_cold(id) && peer.rests_until_ns == 0;
            let Some(lane) = self.core.lane(id) else { continue };
            // A client that took the mark may be about to wake us: it gets longer than one that left it.
            let patience = if lane.lane().common.server_bell.is_marked() { 1 } else { MARK_TAKEN_SWEEPS };
            let found = if asleep { lane.has_work() } else { Ok(false) };
            if peer.suspect_taken != lane.taken() {
                // Another call that is about to be rung for, at the same moment by chance.
                peer.suspect_taken = lane.taken();
                peer.suspect = 0;
            }
            match found {
                Ok(false) => peer.suspect = 0,
                Ok(true) if peer.suspect < patience => peer.suspect += 1,
                Ok(true) => {
                    peer.suspect = 0;
                    self.core.metrics.sweeps_healed += 1;
                    self.heat(id);
                }
                Err(fault) => self.fault(id, fault)?,
            }
            if (index as u32).wrapping_add(turn).is_multiple_of(LOOKS) && !self.stopping {
                self.look_at_habits(id, now)?;
            }
        }
        self.end_faulty()
    }

    /// What has been seen of how a lane is used.
    pub(super) fn habits(&mut self, id: SessionId) -> Option<&mut Habits> {
        self.peer(id).map(|peer| &mut peer.habits)
    }

    /// Arms every lane that is polled, looks again, and sleeps if there is nothing.
    fn sleep(&mut self) -> Result<()> {
        if !self.lie_down()? {
            return Ok(());
        }
        self.core.pulse.sleeps(true);
        let woken = self.driver.enter(Wait::Until(None));
        self.core.pulse.sleeps(false);
        woken?;
        self.get_up()
    }

    /// Arms every lane that is polled and looks again; whether there is nothing, so that the driver may wait.
    pub(super) fn lie_down(&mut self) -> Result<bool> {
        // Kept between calls: a call that is answered from sleep allocates nothing either (R1.7).
        self.core.settle_times(&mut monotonic_ns);
        if self.core.live() == 0 {
            // Nobody will come by the clock to show them.
            self.show();
        }
        let mut hot = std::mem::take(&mut self.arming);
        hot.clear();
        hot.extend(self.core.hot_lanes());
        for id in hot.iter().copied() {
            self.put_to_sleep(id)?;
        }
        self.arming = hot;
        if !self.core.all_cold() || self.core.bodies_can_go_on() || self.arm_tickets()? {
            self.submit()?;
            return Ok(false);
        }
        // Answers given outside of a turn, of leases and of calls that have been ended.
        if !self.core.touched().is_empty() {
            self.ring_clients()?;
        }
        if self.parting.iter().any(|parting| !parting.bell_armed) {
            // Submitted, the last wakes of clients that have gone are done with. What comes next may be long in coming: the
            // memory of their sessions does not wait for it.
            self.submit()?;
            self.parting.retain(|parting| parting.bell_armed);
        }
        self.trim();
        self.arm_timer()?;
        Ok(true)
    }

    /// What the driver waited for has come.
    pub(super) fn get_up(&mut self) -> Result<()> {
        if let Some(desk) = self.core.tickets().desk() {
            desk.bell().clear();
        }
        self.events()
    }

    /// Marks the bell of tickets, looks again, arms it; whether one of them is ready.
    fn arm_tickets(&mut self) -> Result<bool> {
        let Some(desk) = self.core.tickets().desk() else { return Ok(false) };
        let bell = desk.bell();
        // Mark, fence, look again (P5): pairs with the fence of a holder that has made his ticket ready.
        bell.mark(bell::ASLEEP);
        if self.core.tickets().has_work() {
            bell.clear();
            return Ok(true);
        }
        if !self.tickets_armed {
            self.driver.futex_wait(bell.0, bell::ASLEEP, Source::Tickets.token())?;
            self.tickets_armed = true;
        }
        Ok(false)
    }

    /// There is nothing to do: gives back what lanes have left, once there are enough of them. As long as the kernel
    /// has to answer about one, most of its pages hold something that is still needed.
    fn trim(&mut self) {
        if self.gone >= GONE_PER_TRIM && self.parting.is_empty() {
            self.gone = 0;
            self.driver.forget();
            doorbell_uring::trim_heap();
        }
    }

    /// Makes sure that a timeout ends no later than the next thing that is due by the clock. Reads no clock.
    fn arm_timer(&mut self) -> Result<()> {
        let mut due_ns = self.home.as_ref().map_or(u64::MAX, Home::due_ns).min(self.desk.due_ns());
        if self.core.live() > 0 {
            due_ns = due_ns.min(self.next_sweep_ns);
        }
        // Who has no lanes has nothing to give back.
        if self.core.live() > 0 && self.memory_is_wanted() {
            due_ns = due_ns.min(self.memory_tick_ns);
        }
        if self.rest_ends_ns != 0 {
            due_ns = due_ns.min(self.rest_ends_ns);
        }
        due_ns = due_ns.min(self.core.next_deadline()).min(self.inspections.due_ns());
        if due_ns < self.timer_ns {
            self.driver.timeout(Duration::from_nanos(due_ns), Source::Timer.token())?;
            self.timer_ns = due_ns;
        }
        Ok(())
    }

    /// Marks one lane's bell, looks again, arms it.
    #[inline]
    fn put_to_sleep(&mut self, id: SessionId) -> Result<()> {
        let worked = self.core.has_worked(id);
        let Some(lane) = self.core.lane(id) else { return Ok(()) };
        let mut state = lane.asleep_state();
        // Mark, fence, look again (P5): pairs with publish, fence, look at the bell in the client.
        lane.lane().common.server_bell.mark(state);
        kill_point!("server.sleep.marked");
        let mut found = lane.has_work();
        if lane.asleep_state() != state && matches!(found, Ok(false)) {
            // An entry has come for whose completion there is no space: that it takes some is to ring, too.
            state = lane.asleep_state();
            lane.lane().common.server_bell.mark(state);
            found = lane.has_work();
        }
        let Some(Some(peer)) = self.peers.get_mut(id.index as usize) else { return Ok(()) };
        if worked {
            peer.storm.worked();
        } else if peer.woken || matches!(found, Ok(true)) {
            // Woken, or kept awake by hints or a bell, and no entry came.
            let patience = self.core.config().storm_patience.as_nanos() as u64;
            match peer.storm.woken_for_nothing(monotonic_ns, patience) {
                storm::Next::Arm => {}
                storm::Next::RestUntil(until_ns) => {
                    peer.woken = false;
                    self.core.metrics.storms_damped += 1;
                    self.rest(id, until_ns);
                    return Ok(());
                }
                storm::Next::End(abuse) => return self.abuse(id, abuse),
            }
        }
        peer.woken = false;
        let Some(lane) = self.core.lane(id) else { return Ok(()) };
        match found {
            Ok(true) => lane.lane().common.server_bell.clear(),
            Ok(false) => {
                if !peer.bell_armed {
                    let word = &lane.lane().common.server_bell.0;
                    self.driver.futex_wait(word, state, Source::Bell(id).token())?;
                    peer.bell_armed = true;
                }
                self.core.cool(id);
            }
            Err(fault) => self.fault(id, fault)?,
        }
        Ok(())
    }

    /// Takes leave of every client; returns what was counted.
    pub(super) fn stop(mut self) -> Result<Counters> {
        let ids: Vec<SessionId> = self.core.ids().collect();
        for id in ids {
            match self.crew.is_home() {
                true => self.end(id, DisconnectReason::Draining)?,
                false => self.let_go(id)?,
            }
        }
        self.with_home(Home::stop)?;
        self.submit()?;
        self.core.metrics.cpu_ns = thread_cpu_ns();
        self.show();
        Ok(std::mem::take(&mut self.core.metrics))
    }
}

/// Processor time of the calling thread, ns.
fn thread_cpu_ns() -> u64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    used.tv_sec.unsigned_abs() * 1_000_000_000 + used.tv_nsec.unsigned_abs()
}

/// Rings a client that waits on its socket: one byte; a full socket has been rung already.
fn ring_socket(socket: &OwnedFd) {
    match rendezvous::send(socket.as_fd(), &[1], None) {
        Ok(()) | Err(Errno::AGAIN) => {}
        Err(error) => tracing::debug!(%error, "socket bell not delivered"),
    }
}

/// Fewest and most completion entries of a ring: 8 and 64 KiB.
const COMPLETION_ENTRIES: std::ops::RangeInclusive<u32> = 512..=4096;

/// What a reactor waits with: epoll, or a ring, as large as its sessions need: two of the three things that the home
/// reactor waits for in each of them may happen at once, when its process dies. A further reactor has nothing but bells
/// to wait for.
pub(crate) fn driver(config: &ServerConfig, home: bool) -> Result<Driver> {
    if config.backend == Backend::Epoll {
        return Ok(Driver::epoll(Source::Mail.token())?);
    }
    let (fewest, most) = COMPLETION_ENTRIES.into_inner();
    let (entries, completion_entries) =
        if home { (256, config.max_sessions.saturating_mul(2).clamp(fewest, most)) } else { (64, fewest) };
    let options = doorbell_uring::Options { entries, completion_entries, restrict: true };
    match Driver::new(&options) {
        // It works as well without; what it keeps out is a mistake of our own.
        Err(SetupError::Refused { step: Step::RestrictRing, .. }) => {
            tracing::info!("the ring cannot be locked down to what the server needs");
            Ok(Driver::new(&doorbell_uring::Options { restrict: false, ..options })?)
        }
        made => Ok(made?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   F37: every way in which a wait can end has its consequence, and none is taken for another.
    #[test]
    fn f37_the_end_of_a_wait_is_understood() {
        for look in [Ok(0), Err(Errno::AGAIN), Err(Errno::INTR)] {
            assert_eq!(AfterWait::of(look), AfterWait::Look);
        }
        assert_eq!(AfterWait::of(Err(Errno::NOMEM)), AfterWait::Later);
        assert_eq!(AfterWait::of(Err(Errno::CANCELED)), AfterWait::Nothing);
        for ours in [Errno::FAULT, Errno::INVAL] {
            assert_eq!(AfterWait::of(Err(ours)), AfterWait::End(ours));
        }
    }

    #[test]
    fn s10_tokens_name_what_they_were_made_of() {
        let id = SessionId { index: 7, generation: GENERATION_MASK };
        let file = Source::File(ReadId { index: 7, generation: GENERATION_MASK });
        let sources = [Source::Listener, Source::Shutdown, Source::HalfOpen(id), Source::Socket(id)];
        for source in sources.into_iter().chain([
            Source::Process(id),
            Source::Bell(id),
            Source::Mail,
            Source::Timer,
            Source::Tickets,
            file,
        ]) {
            let read = Source::of(source.token());
            let none = SessionId { index: 0, generation: 0 };
            assert!(read == Some(source), "{source:?} {read:?} {none:?}");
            assert!(source.token() <= Token::LAST);
        }
        assert_eq!(Source::of(Token(0)), None);
    }
}

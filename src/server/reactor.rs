//! The reactor: one thread, one ring, all sessions. It turns kernel answers into inputs of [`Core`] and
//! the core's outputs into ring operations; it decides nothing about messages.

use super::core::{Core, SessionId, Verdict};
use super::listener::Listener;
use super::throttle::Throttle;
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::metrics::Metrics;
use crate::protocol::handshake::{DisconnectReason, Goodbye, Hello, Welcome, code};
use crate::protocol::rendezvous::{self, monotonic_ns};
use doorbell_shm::bell::{WAITER_FUTEX, WAITER_SOCKET, fence_before_bell};
use doorbell_shm::segment::{Identity, Segment};
use doorbell_uring::{Completion, Driver, PollFlags, Token, Wait};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Waiters woken on a client's bell at once: one leader passes it on (F57).
const CLIENT_WAKES: u32 = 4;
/// Clients accepted before the lanes have their turn again.
const ACCEPTS_PER_EVENT: usize = 64;
/// Rounds between two looks at the clock, busy or not: what is due by it does not wait for a pause (F27, S6).
const ROUNDS_PER_TICK: u32 = 64;
/// Entries taken before clients are looked at behind a fence, however busy the reactor is. They are looked at
/// without one after every round.
const ENTRIES_PER_FENCE: u32 = 256;
/// Rounds without work after which clients are looked at behind a fence: by then what was published has
/// left the store buffer, and the fence costs 10 ns instead of 100.
const QUIET_ROUNDS: u32 = 4;
/// Sweeps that a client has between taking the bell's mark and waking before it is healed: it may have been
/// preempted between the two.
const MARK_TAKEN_SWEEPS: u32 = 3;
/// How long accepting pauses after the process ran out of descriptors (F32).
const ACCEPT_PAUSE_NS: u64 = 10_000_000;

/// What a completion is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Listener,
    Shutdown,
    /// A socket whose hello has not come; index and generation of its half-open record.
    HalfOpen(SessionId),
    /// A session's socket.
    Socket(SessionId),
    /// A session's process.
    Process(SessionId),
    /// A session's server bell.
    Bell(SessionId),
}

/// Tokens: kind in the top 4 bits, 28 bits of generation, 32 bits of index.
const GENERATION_MASK: u32 = (1 << 28) - 1;

impl Source {
    fn token(self) -> Token {
        let (kind, id) = match self {
            Self::Listener => (1, SessionId { index: 0, generation: 0 }),
            Self::Shutdown => (2, SessionId { index: 0, generation: 0 }),
            Self::HalfOpen(id) => (3, id),
            Self::Socket(id) => (4, id),
            Self::Process(id) => (5, id),
            Self::Bell(id) => (6, id),
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
            _ => return None,
        })
    }
}

/// The kernel's side of a session.
#[derive(Debug)]
struct Peer {
    id: SessionId,
    socket: OwnedFd,
    /// Open for as long as it is polled.
    _process: OwnedFd,
    /// A FUTEX_WAIT on its bell has been pushed and has not completed. Never the word's value (P5).
    bell_armed: bool,
    /// Sweeps in a row that found work although nobody had rung.
    suspect: u32,
}

/// A socket that has been accepted and has not said hello.
#[derive(Debug)]
struct HalfOpen {
    id: SessionId,
    socket: OwnedFd,
    process: OwnedFd,
    deadline_ns: u64,
}

pub(crate) struct Reactor<S: 'static> {
    driver: Driver,
    core: Core<S>,
    listener: Listener,
    listener_armed: bool,
    accept_again_ns: u64,
    shutdown: OwnedFd,
    peers: Vec<Option<Peer>>,
    half_open: Vec<Option<HalfOpen>>,
    half_open_count: u32,
    generation: u32,
    epoch: u64,
    next_sweep_ns: u64,
    log: Throttle,
    /// Lanes that are being put to sleep.
    arming: Vec<SessionId>,
    stopping: bool,
}

impl<S> Reactor<S> {
    /// A reactor that runs on the calling thread, and must be run there.
    pub fn new(driver: Driver, core: Core<S>, listener: Listener, shutdown: OwnedFd) -> Result<Self> {
        let [epoch, _] = rendezvous::random_id()?;
        Ok(Self {
            driver,
            core,
            listener,
            listener_armed: false,
            accept_again_ns: 0,
            shutdown,
            peers: Vec::new(),
            half_open: Vec::new(),
            half_open_count: 0,
            generation: 0,
            epoch,
            next_sweep_ns: 0,
            log: Throttle::default(),
            arming: Vec::new(),
            stopping: false,
        })
    }

    /// Serves until told to stop; returns what was counted.
    pub fn run(mut self) -> Result<Metrics> {
        self.driver.poll(self.shutdown.as_fd(), PollFlags::IN, Source::Shutdown.token())?;
        self.arm_listener()?;
        let spin = self.core.config().policy == WaitPolicy::Spin;
        let mut idle_rounds = 0u32;
        let mut unfenced = 0u32;
        let mut rounds_since_tick = 0u32;
        while !self.stopping {
            rounds_since_tick += 1;
            if rounds_since_tick >= ROUNDS_PER_TICK {
                rounds_since_tick = 0;
                self.tick()?;
            }
            // DEFER_TASKRUN: without this enter a bell rung by a sleeping lane's client is never seen.
            if self.driver.pending() {
                self.driver.enter(Wait::No)?;
                self.events()?;
                if self.stopping {
                    break;
                }
            }
            let taken = self.core.round(&mut monotonic_ns);
            while let Some((id, fault)) = self.core.take_fault() {
                self.log.warn(|| tracing::warn!(session = id.index, %fault, "protocol violation"));
                self.end(id, DisconnectReason::ProtocolViolation)?;
            }
            if taken > 0 {
                // For whoever asks for the counters: a copy that is as old as one round.
                self.core.metrics.enters = self.driver.counters().enters;
                idle_rounds = 0;
                unfenced += taken;
                if unfenced >= ENTRIES_PER_FENCE || self.somebody_seems_asleep() {
                    unfenced = 0;
                    self.ring_clients()?;
                }
                continue;
            }
            idle_rounds = idle_rounds.wrapping_add(1);
            let sleeps = !spin || self.core.all_cold();
            if (sleeps || idle_rounds == QUIET_ROUNDS) && !self.core.touched().is_empty() {
                unfenced = 0;
                self.ring_clients()?;
            }
            if sleeps {
                self.tick()?;
                self.sleep()?;
            } else {
                std::hint::spin_loop();
            }
        }
        self.stop()
    }

    /// A look without a fence: good enough to ring at once, not to conclude that nobody sleeps.
    #[inline(always)]
    fn somebody_seems_asleep(&self) -> bool {
        let asleep = |index: &u32| {
            self.core.seated(*index).is_some_and(|session| session.lane().common.client_bell.seems_asleep())
        };
        self.core.touched().iter().any(asleep)
    }

    /// Wakes the clients for whom something was completed and who sleep: one fence, then one enter for all
    /// of them (R1.2).
    fn ring_clients(&mut self) -> Result<()> {
        // Pairs with the fence in `ClientBell::mark`.
        fence_before_bell();
        let mut rung = 0;
        for i in 0..self.core.touched().len() {
            let index = self.core.touched()[i];
            let Some(session) = self.core.seated(index) else { continue };
            let bell = &session.lane().common.client_bell;
            let waiters = bell.take();
            if waiters == 0 {
                continue;
            }
            if waiters & WAITER_FUTEX != 0 {
                self.driver.futex_wake(&bell.0, CLIENT_WAKES)?;
            }
            if waiters & WAITER_SOCKET != 0
                && let Some(Some(peer)) = self.peers.get(index as usize)
            {
                ring_socket(peer.socket.as_fd());
            }
            rung += 1;
        }
        let metrics = &mut self.core.metrics;
        metrics.wakes_rung += rung;
        metrics.wakes_in_one_enter_max = metrics.wakes_in_one_enter_max.max(rung);
        self.core.untouch();
        if self.driver.pending() {
            self.driver.enter(Wait::No)?;
        }
        Ok(())
    }

    fn events(&mut self) -> Result<()> {
        while let Some(completion) = self.driver.next_completion() {
            let Completion { token, result } = completion;
            let Some(source) = Source::of(token) else { continue };
            match source {
                Source::Listener => {
                    self.listener_armed = false;
                    self.accept()?;
                }
                Source::Shutdown => self.stopping = true,
                Source::HalfOpen(id) => self.hello(id)?,
                Source::Socket(id) => self.socket_spoke(id, result)?,
                Source::Process(id) => {
                    if self.peer(id).is_some() && result != Err(Errno::CANCELED) {
                        self.end_by_token(id, DisconnectReason::PeerDied)?;
                    }
                }
                Source::Bell(id) => self.bell_rang(id),
            }
        }
        Ok(())
    }

    /// The peer that a token's id names: the token has only 28 bits of the generation.
    fn peer(&mut self, id: SessionId) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(id.index as usize)?.as_mut()?;
        (peer.id.generation & GENERATION_MASK == id.generation & GENERATION_MASK).then_some(peer)
    }

    fn end_by_token(&mut self, id: SessionId, reason: DisconnectReason) -> Result<()> {
        match self.peer(id).map(|peer| peer.id) {
            Some(id) => self.end(id, reason),
            None => Ok(()),
        }
    }

    /// A bell's wait ended: rung, or (EAGAIN) changed before it was armed; either way there may be work.
    fn bell_rang(&mut self, id: SessionId) {
        let Some(peer) = self.peer(id) else { return };
        peer.bell_armed = false;
        let id = peer.id;
        self.core.metrics.wakeups += 1;
        if let Some(session) = self.core.session(id) {
            session.lane().common.server_bell.clear();
        }
        self.core.heat(id);
    }

    fn arm_listener(&mut self) -> Result<()> {
        let full = self.half_open_count >= self.core.config().max_half_open;
        if !self.listener_armed && !full && self.accept_again_ns == 0 {
            self.driver.poll(self.listener.socket(), PollFlags::IN, Source::Listener.token())?;
            self.listener_armed = true;
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<()> {
        for _ in 0..ACCEPTS_PER_EVENT {
            if self.half_open_count >= self.core.config().max_half_open {
                break;
            }
            let socket = match self.listener.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => break,
                Err(error) => {
                    self.log.warn(|| tracing::warn!(%error, "accept failed; pausing for 10 ms"));
                    self.accept_again_ns = monotonic_ns() + ACCEPT_PAUSE_NS;
                    break;
                }
            };
            self.greet(socket)?;
        }
        self.arm_listener()
    }

    /// Takes note of a new socket, and of its hello if that has come already, as it usually has.
    fn greet(&mut self, socket: OwnedFd) -> Result<()> {
        let ours = rustix::process::geteuid().as_raw();
        if rendezvous::peer_uid(&socket).ok() != Some(ours) {
            self.refuse(&socket, &Welcome::refusal(code::NOT_PERMITTED));
            return Ok(());
        }
        // A process that is dead already leaves nothing to greet (F1).
        let Ok(process) = doorbell_uring::peer_process(socket.as_fd()) else { return Ok(()) };
        self.generation = self.generation.wrapping_add(1);
        let index = match self.half_open.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.half_open.push(None);
                self.half_open.len() - 1
            }
        };
        let id = SessionId { index: index as u32, generation: self.generation & GENERATION_MASK };
        let deadline_ns = monotonic_ns() + self.core.config().handshake_timeout.as_nanos() as u64;
        self.half_open[index] = Some(HalfOpen { id, socket, process, deadline_ns });
        self.half_open_count += 1;
        self.hello(id)
    }

    /// Reads the hello of a half-open socket, or waits for it.
    fn hello(&mut self, id: SessionId) -> Result<()> {
        let Some(Some(half)) = self.half_open.get(id.index as usize) else { return Ok(()) };
        if half.id != id {
            return Ok(());
        }
        let mut bytes = [0u8; size_of::<Hello>() + 1];
        let packet = match rendezvous::receive(half.socket.as_fd(), &mut bytes, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                let token = Source::HalfOpen(id).token();
                self.driver.poll(half.socket.as_fd(), PollFlags::IN | PollFlags::RDHUP, token)?;
                return Ok(());
            }
            Err(_) => return self.forget_half_open(id),
            Ok(packet) if packet.len == 0 => return self.forget_half_open(id),
            Ok(packet) => packet,
        };
        let Some(half) = self.half_open[id.index as usize].take() else { return Ok(()) };
        self.half_open_count -= 1;
        self.arm_listener()?;
        // A hello comes alone: whatever descriptors came with it are closed with the packet (F31).
        let verdict = if packet.truncated || !packet.fds.is_empty() {
            Verdict::Refuse(Box::new(Welcome::refusal(code::BAD_HELLO)))
        } else {
            self.core.judge(&bytes[..packet.len], monotonic_ns())
        };
        match verdict {
            Verdict::Refuse(welcome) => {
                self.refuse(&half.socket, &welcome);
                Ok(())
            }
            Verdict::Grant(geometry, welcome) => self.seat(half, geometry, *welcome),
        }
    }

    fn forget_half_open(&mut self, id: SessionId) -> Result<()> {
        if self.half_open[id.index as usize].take().is_some() {
            self.half_open_count -= 1;
        }
        self.arm_listener()
    }

    fn refuse(&mut self, socket: &OwnedFd, welcome: &Welcome) {
        self.core.metrics.sessions_refused += 1;
        let code = welcome.code;
        self.log.warn(|| tracing::warn!(code, "handshake refused"));
        // A socket closed with something unread resets its peer, who would then not see the answer: nothing
        // more is accepted, and what is there is taken.
        if let Err(error) = rustix::net::shutdown(socket, rustix::net::Shutdown::Read) {
            tracing::debug!(%error, "shutdown of a refused socket");
        }
        let mut unread = [0u8; 1];
        while rendezvous::receive(socket.as_fd(), &mut unread, RecvFlags::DONTWAIT).is_ok_and(|p| p.len > 0) {
        }
        // A client that is gone by now needs no answer.
        if let Err(error) = rendezvous::send(socket.as_fd(), welcome.as_bytes(), None) {
            tracing::debug!(%error, "refusal not delivered");
        }
    }

    /// Makes a session of a half-open socket.
    fn seat(
        &mut self,
        half: HalfOpen,
        geometry: doorbell_shm::layout::Geometry,
        welcome: Welcome,
    ) -> Result<()> {
        let identity = Identity { epoch: self.epoch, session: rendezvous::random_id()? };
        let welcome = Welcome { epoch: identity.epoch, session: identity.session, ..welcome };
        let (segment, memory) = match Segment::create(geometry, 1, identity) {
            Ok(made) => made,
            Err(error) => {
                self.log.warn(|| tracing::warn!(%error, "no segment for a new session"));
                self.refuse(&half.socket, &Welcome { retry_ms: 100, ..Welcome::refusal(code::NO_MEMORY) });
                return Ok(());
            }
        };
        if rendezvous::send(half.socket.as_fd(), welcome.as_bytes(), Some(memory.as_fd())).is_err() {
            // Killed after its hello: the segment goes with this scope (F2).
            return Ok(());
        }
        let id = self.core.open(segment)?;
        let index = id.index as usize;
        if self.peers.len() <= index {
            self.peers.resize_with(index + 1, || None);
        }
        let events = PollFlags::IN | PollFlags::RDHUP;
        self.driver.poll(half.socket.as_fd(), events, Source::Socket(id).token())?;
        self.driver.poll(half.process.as_fd(), PollFlags::IN, Source::Process(id).token())?;
        self.peers[index] =
            Some(Peer { id, socket: half.socket, _process: half.process, bell_armed: false, suspect: 0 });
        tracing::debug!(session = id.index, "session opened");
        Ok(())
    }

    /// A session's socket has something to say: after the hello, only its end.
    fn socket_spoke(&mut self, id: SessionId, result: std::result::Result<u32, Errno>) -> Result<()> {
        let Some(peer) = self.peer(id) else { return Ok(()) };
        if result == Err(Errno::CANCELED) {
            return Ok(());
        }
        let id = peer.id;
        let mut byte = [0u8; 1];
        match rendezvous::receive(peer.socket.as_fd(), &mut byte, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                let events = PollFlags::IN | PollFlags::RDHUP;
                let Some(Some(peer)) = self.peers.get(id.index as usize) else { return Ok(()) };
                self.driver.poll(peer.socket.as_fd(), events, Source::Socket(id).token())?;
                Ok(())
            }
            Ok(packet) if packet.len > 0 => {
                self.log.warn(|| tracing::warn!(session = id.index, "bytes on the socket after the hello"));
                self.end(id, DisconnectReason::ProtocolViolation)
            }
            _ => self.end(id, DisconnectReason::PeerDied),
        }
    }

    /// Ends one session and nothing else: everything it held is released here.
    fn end(&mut self, id: SessionId, reason: DisconnectReason) -> Result<()> {
        let Some(session) = self.core.session(id) else { return Ok(()) };
        let bell = session.lane().common.client_bell.0.clone();
        self.core.close(id, reason);
        // Whoever sleeps on the bell shall see that the session is closed.
        self.driver.futex_wake(&bell, CLIENT_WAKES)?;
        if let Some(peer) = self.peers.get_mut(id.index as usize).and_then(Option::take) {
            if reason != DisconnectReason::PeerDied {
                // A client that is gone or full needs no goodbye: its segment says the same.
                if let Err(error) =
                    rendezvous::send(peer.socket.as_fd(), Goodbye::new(reason).as_bytes(), None)
                {
                    tracing::debug!(%error, "goodbye not delivered");
                }
            }
            // The kernel holds the socket until its poll is cancelled; the peer shall see the end now.
            if let Err(error) = rustix::net::shutdown(&peer.socket, rustix::net::Shutdown::Both) {
                tracing::debug!(%error, "shutdown of a session's socket");
            }
            self.driver.cancel(Source::Socket(id).token())?;
            self.driver.cancel(Source::Process(id).token())?;
            if peer.bell_armed {
                self.driver.cancel(Source::Bell(id).token())?;
            }
        }
        tracing::debug!(session = id.index, %reason, "session ended");
        Ok(())
    }

    /// What is due by the clock: half-open sockets, the sweep, accepting again.
    fn tick(&mut self) -> Result<()> {
        if self.half_open_count == 0 && self.core.live() == 0 && self.accept_again_ns == 0 {
            return Ok(());
        }
        let now = monotonic_ns();
        if self.accept_again_ns != 0 && now >= self.accept_again_ns {
            self.accept_again_ns = 0;
            self.arm_listener()?;
        }
        if self.half_open_count > 0 {
            self.expire_half_open(now)?;
        }
        if now >= self.next_sweep_ns {
            self.next_sweep_ns = now + self.core.config().sweep_interval.as_nanos() as u64;
            self.sweep()?;
        }
        Ok(())
    }

    fn expire_half_open(&mut self, now: u64) -> Result<()> {
        for index in 0..self.half_open.len() {
            let expired = self.half_open[index].as_ref().is_some_and(|h| now >= h.deadline_ns);
            if expired && let Some(half) = self.half_open[index].take() {
                self.half_open_count -= 1;
                self.core.metrics.sessions_refused += 1;
                self.core.metrics.count_end(DisconnectReason::HandshakeTimeout);
                self.log.warn(|| tracing::warn!("a client connected and did not say hello in time"));
                let bye = Goodbye::new(DisconnectReason::HandshakeTimeout);
                if let Err(error) = rendezvous::send(half.socket.as_fd(), bye.as_bytes(), None) {
                    tracing::debug!(%error, "goodbye not delivered");
                }
                if let Err(error) = rustix::net::shutdown(&half.socket, rustix::net::Shutdown::Both) {
                    tracing::debug!(%error, "shutdown of a half-open socket");
                }
                self.driver.cancel(Source::HalfOpen(half.id).token())?;
            }
        }
        self.arm_listener()
    }

    /// Looks at every sleeping lane whether it rang or not (S6, F25). A lane with work and an untouched
    /// bell is a suspect, since its client may be about to ring; when the next sweep finds it so again it
    /// is healed and counted.
    fn sweep(&mut self) -> Result<()> {
        self.core.metrics.sweeps += 1;
        for index in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[index] else { continue };
            let id = peer.id;
            let cold = self.core.is_cold(id);
            let Some(session) = self.core.session(id) else { continue };
            // Our own record decides, not the word that the client can write (S2). A client that took the mark
            // may be about to wake us: it gets longer than one that left it.
            let patience = if session.lane().common.server_bell.is_marked() { 1 } else { MARK_TAKEN_SWEEPS };
            let found = if cold { session.has_work() } else { Ok(false) };
            match found {
                Ok(false) => peer.suspect = 0,
                Ok(true) if peer.suspect < patience => peer.suspect += 1,
                Ok(true) => {
                    peer.suspect = 0;
                    session.lane().common.server_bell.clear();
                    self.core.metrics.sweeps_healed += 1;
                    self.core.heat(id);
                }
                Err(fault) => {
                    self.log.warn(|| tracing::warn!(session = id.index, %fault, "protocol violation"));
                    self.end(id, DisconnectReason::ProtocolViolation)?;
                }
            }
        }
        Ok(())
    }

    /// Arms every lane that is polled, looks again, and sleeps if there is nothing.
    fn sleep(&mut self) -> Result<()> {
        // Kept between calls: a call that is answered from sleep allocates nothing either (R1.7).
        let mut hot = std::mem::take(&mut self.arming);
        hot.clear();
        hot.extend(self.core.hot_lanes());
        for id in hot.iter().copied() {
            let Some(session) = self.core.session(id) else { continue };
            let state = session.asleep_state();
            // Mark, fence, look again (P5): pairs with publish, fence, look at the bell in the client.
            session.lane().common.server_bell.mark(state);
            match session.has_work() {
                Ok(true) => session.lane().common.server_bell.clear(),
                Ok(false) => {
                    if let Some(Some(peer)) = self.peers.get_mut(id.index as usize)
                        && !peer.bell_armed
                    {
                        let word = &session.lane().common.server_bell.0;
                        self.driver.futex_wait(word, state, Source::Bell(id).token())?;
                        peer.bell_armed = true;
                    }
                    self.core.cool(id);
                }
                Err(fault) => {
                    self.log.warn(|| tracing::warn!(session = id.index, %fault, "protocol violation"));
                    self.end(id, DisconnectReason::ProtocolViolation)?;
                }
            }
        }
        self.arming = hot;
        if !self.core.all_cold() {
            return Ok(());
        }
        let timeout = self.next_timeout();
        self.driver.enter(Wait::Until(timeout))?;
        self.events()
    }

    /// How long the reactor may sleep; `None` while there is nothing to time.
    fn next_timeout(&self) -> Option<Duration> {
        let mut due = u64::MAX;
        if self.core.live() > 0 {
            due = due.min(self.next_sweep_ns);
        }
        if self.accept_again_ns != 0 {
            due = due.min(self.accept_again_ns);
        }
        for half in self.half_open.iter().flatten() {
            due = due.min(half.deadline_ns);
        }
        (due != u64::MAX).then(|| Duration::from_nanos(due.saturating_sub(monotonic_ns())))
    }

    /// Takes leave of every client and returns what was counted.
    fn stop(mut self) -> Result<Metrics> {
        self.core.drain();
        let ids: Vec<SessionId> = self.core.ids().collect();
        for id in ids {
            self.end(id, DisconnectReason::Draining)?;
        }
        self.driver.enter(Wait::No)?;
        tracing::info!(path = %self.listener.path().display(), "stopped");
        Ok(std::mem::take(&mut self.core.metrics))
    }
}

/// Rings a client that waits on its socket: one byte; a full socket has been rung already.
fn ring_socket(socket: std::os::fd::BorrowedFd<'_>) {
    match rendezvous::send(socket, &[1], None) {
        Ok(()) | Err(Errno::AGAIN) => {}
        Err(error) => tracing::debug!(%error, "socket bell not delivered"),
    }
}

/// The mapping of setup failures that a server start reports.
pub(crate) fn driver(restrict: bool) -> Result<Driver> {
    let options = doorbell_uring::Options { restrict, ..doorbell_uring::Options::default() };
    Driver::new(&options).map_err(IpcError::from)
}

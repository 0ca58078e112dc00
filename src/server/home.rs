//! What only the home reactor does: accepting, handshakes, the sockets and processes of sessions, lanes for them,
//! and their end.

use super::budget::PRIVATE_PER_SESSION;
use super::control::{Control, Orders};
use super::core::{SessionId, Verdict};
use super::crew::{BellSocket, Crew, Message, Notice};
use super::half_open::{HalfOpen, HalfOpenTable};
use super::lane::SessionLane;
use super::linger::Linger;
use super::listener::Listener;
use super::process::{ProcessKey, Processes};
use super::reactor::{GENERATION_MASK, Reactor, Source};
use crate::config::ServerConfig;
use crate::error::{IpcError, Result};
use crate::machine;
use crate::protocol::handshake::{
    DisconnectReason, Goodbye, Hello, LaneChoice, LaneGrant, LaneRequest, NO_CORE, Scope, Welcome, code,
    doorbell_kind,
};
use crate::protocol::rendezvous::{self, monotonic_ns};
use doorbell_shm::SegmentError;
use doorbell_shm::kill_point;
use doorbell_shm::layout::{Geometry, LaneLayout, state};
use doorbell_shm::segment::{Identity, Segment, granted_bytes, lane_bytes};
use doorbell_uring::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Resource, getrlimit};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Clients accepted before the lanes have their turn again: about a quarter of a millisecond of work. Whoever has just been
/// accepted opens a connection next, and must not wait for all who come after him.
const ACCEPTS_PER_EVENT: usize = 4;
/// Clients sent away for want of descriptors before accepting pauses: whoever comes again at once costs no more than
/// this in each pause.
const SENT_AWAY_PER_PAUSE: u64 = 64;
/// How long accepting pauses after the kernel refused it: at first, then twice as long each time up to the longest,
/// unless something is closed meanwhile (F32).
const PAUSE_MIN_NS: u64 = 10_000_000;
const PAUSE_MAX_NS: u64 = 100_000_000;
/// When those may come again who were refused for want of something that others may give back.
const RETRY_MS: u32 = 100;
/// When those may come again whose process has too many sockets without a hello. Theirs is on its way.
const RETRY_HANDSHAKE_MS: u32 = 1;
/// Wishes for lanes that one session may utter. A client utters one for each core that it meets.
const LANE_REQUESTS_MAX: u32 = 4096;
/// Sessions whose memory is audited in one sweep.
const AUDITS_PER_SWEEP: usize = 32;
/// Audits in a row that may find pages of a client's own making before its session is ended. One page may be an honest
/// mistake: a client that was stopped just before it wrote to memory which was taken meanwhile.
const EXCESS_MAX: u32 = 3;

/// A session: its socket, its process, its lanes.
#[derive(Debug)]
struct Member {
    id: SessionId,
    socket: Arc<OwnedFd>,
    /// Open for as long as it is polled.
    process: OwnedFd,
    /// Where sessions of one process are counted.
    key: Option<ProcessKey>,
    /// The reactors of its lanes beside the home lane: that of lane 1, of lane 2, and so on.
    further: Vec<u16>,
    lane_requests: u32,
    segment: Arc<Segment>,
    /// Audits in a row that found pages which it was not granted.
    excess: u32,
    /// Further lanes that are idle.
    idle_lanes: u16,
    /// Further lanes that have gone because the server drains and no call is under way on them.
    quiet_lanes: u16,
}

pub(crate) struct Home {
    listener: Listener,
    listener_armed: bool,
    /// The socket is left to others.
    accepts_no_more: bool,
    /// Nobody is accepted until then, or until something is closed; 0 for no pause.
    pause_ends_ns: u64,
    /// How long the last pause was to be; 0 once somebody has been accepted since.
    pause_ns: u64,
    control: Control,
    members: Vec<Option<Member>>,
    half_open: HalfOpenTable,
    processes: Processes,
    epoch: u64,
    /// Lanes of each reactor, of sessions that live; home lanes too.
    lanes_of: Vec<u32>,
    /// The member that is audited next.
    next_audit: usize,
    /// Faults in segments of this process that have been looked at.
    faults_seen: u32,
    linger: Linger,
}

/// What a socket that has not said hello says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing yet.
    Nothing,
    /// No more.
    End,
    /// A packet of so many bytes; `false` if it was longer or did not come alone.
    Packet(usize, bool),
}

impl Home {
    pub fn new(listener: Listener, control: Control, config: &ServerConfig) -> Result<Self> {
        let [epoch, _] = rendezvous::random_id()?;
        Ok(Self {
            listener,
            listener_armed: false,
            accepts_no_more: false,
            pause_ends_ns: 0,
            pause_ns: 0,
            control,
            members: Vec::new(),
            half_open: HalfOpenTable::new(config),
            processes: Processes::detect()?,
            epoch,
            lanes_of: vec![0; config.reactors as usize],
            next_audit: 0,
            faults_seen: doorbell_shm::bus::faults(),
            linger: Linger::new(config.linger, monotonic_ns()),
        })
    }

    /// Begins to listen.
    pub fn begin<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        reactor.driver.poll(self.control.bell(), PollFlags::IN, Source::Shutdown.token())?;
        self.arm_listener(reactor)
    }

    /// Ends the other reactors.
    pub fn stop<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        // Who was accepted and has not said hello, or whose hello came just now.
        while let Some(half) = self.half_open.take_overdue(u64::MAX) {
            let draining = Welcome { retry_ms: RETRY_MS, ..Welcome::refusal(code::DRAINING) };
            refuse(reactor, &half.socket, &draining);
        }
        for other in 1..self.lanes_of.len() {
            // One that has ended already needs no telling.
            if reactor.crew.addresses[other].put(Message::Stop) {
                reactor.ring_reactor(other)?;
            }
        }
        tracing::info!(path = %self.listener.path().display(), "stopped");
        Ok(())
    }

    /// Somebody has told the server something.
    fn told<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        let Orders { stop, now, limits } = self.control.orders()?;
        reactor.hurried |= now || (stop && reactor.stopping);
        reactor.stopping |= stop;
        if let Some(limits) = limits {
            reactor.core.adopt(&limits);
            for other in 1..self.lanes_of.len() {
                if reactor.crew.addresses[other].put(Message::Limits(Box::new(limits.clone()))) {
                    reactor.ring_reactor(other)?;
                }
            }
            tracing::info!(?limits, "new limits");
        }
        reactor.driver.poll(self.control.bell(), PollFlags::IN, Source::Shutdown.token())?;
        Ok(())
    }

    /// Begins no more sessions, and has no reactor begin more calls.
    pub fn begin_drain<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        if self.listener.is_shared() {
            // Who connects from here on is answered by whoever has the socket next.
            self.accepts_no_more = true;
            if std::mem::take(&mut self.listener_armed) {
                reactor.driver.cancel(Source::Listener.token())?;
            }
        }
        for other in 1..self.lanes_of.len() {
            if reactor.crew.addresses[other].put(Message::Drain) {
                reactor.ring_reactor(other)?;
            }
        }
        Ok(())
    }

    /// A further lane of a session is idle, or is no longer.
    pub fn lane_is_idle(&mut self, id: SessionId, idle: bool) -> Result<()> {
        if let Some(member) = self.member(id) {
            member.idle_lanes =
                if idle { member.idle_lanes + 1 } else { member.idle_lanes.saturating_sub(1) };
        }
        Ok(())
    }

    /// The home lane of a session is idle: ends it if its other ones are.
    pub fn end_if_idle<S>(&mut self, reactor: &mut Reactor<S>, id: SessionId) -> Result<()> {
        match self.member(id) {
            Some(member) if member.idle_lanes as usize >= member.further.len() => {
                self.end(reactor, id, DisconnectReason::IdleTimeout)
            }
            _ => Ok(()),
        }
    }

    /// No call is under way on a further lane of a session, and none will be.
    pub fn lane_is_quiet(&mut self, id: SessionId) -> Result<()> {
        if let Some(member) = self.member(id) {
            member.quiet_lanes += 1;
        }
        Ok(())
    }

    /// No call is under way on the home lane of a session, and none will be: ends it if that holds for its other lanes.
    pub fn end_if_quiet<S>(&mut self, reactor: &mut Reactor<S>, id: SessionId) -> Result<()> {
        match self.member(id) {
            Some(member) if member.quiet_lanes as usize >= member.further.len() => {
                self.end(reactor, id, DisconnectReason::Draining)
            }
            _ => Ok(()),
        }
    }

    /// Tells the other reactors of a session what became of one of its connections. They need not wake for it.
    pub fn announce(&self, crew: &Crew, index: u32, notice: Notice) {
        let Some(Some(member)) = self.members.get(index as usize) else { return };
        for reactor in &member.further {
            // One that has ended takes the server with it.
            crew.addresses[usize::from(*reactor)].put(Message::Notice(member.id, notice));
        }
    }

    /// Whether anything is due by the clock.
    pub fn waits(&self) -> bool {
        !self.half_open.is_empty() || self.pause_ends_ns != 0 || self.linger.due_ns() != u64::MAX
    }

    /// When something is due; `u64::MAX` for never.
    pub fn due_ns(&self) -> u64 {
        let or_never = |ns| if ns == 0 { u64::MAX } else { ns };
        // While accepting pauses, room is of no use.
        let wants_room = !self.listener_armed && !self.accepts_no_more && self.pause_ends_ns == 0;
        let room_ns = if wants_room { self.half_open.room_ns() } else { 0 };
        // While somebody is about to come the server does not end.
        let linger_ns = if self.half_open.is_empty() { self.linger.due_ns() } else { u64::MAX };
        let others_ns = or_never(self.pause_ends_ns).min(or_never(room_ns)).min(linger_ns);
        self.half_open.due_ns().min(others_ns)
    }

    /// What is due by the clock: accepting again, half-open sockets.
    pub fn tick<S>(&mut self, reactor: &mut Reactor<S>, now: u64) -> Result<()> {
        if self.linger.is_over(now) && self.half_open.is_empty() {
            tracing::info!("the last client has been gone for long enough");
            reactor.stopping = true;
        }
        if now >= self.pause_ends_ns {
            self.pause_ends_ns = 0;
        }
        while let Some(half) = self.half_open.take_overdue(now) {
            Self::send_away(reactor, half)?;
            self.pause_ends_ns = 0;
        }
        self.arm_listener(reactor)
    }

    /// A completion that is this reactor's as the home of sessions.
    pub fn event<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        source: Source,
        result: std::result::Result<u32, Errno>,
    ) -> Result<()> {
        match source {
            Source::Listener => {
                self.listener_armed = false;
                match result {
                    // Not listened to at all: to ask again at once would be a loop.
                    Err(error @ (Errno::NOMEM | Errno::NOSPC)) => {
                        self.accept_failed(reactor, error);
                        Ok(())
                    }
                    _ => self.accept(reactor),
                }
            }
            Source::HalfOpen(id) => self.half_open_spoke(reactor, id, result),
            Source::Socket(id) => self.socket_spoke(reactor, id, result),
            Source::Process(id) => match self.member(id) {
                Some(member) if result != Err(Errno::CANCELED) => {
                    let id = member.id;
                    self.end(reactor, id, DisconnectReason::PeerDied)
                }
                _ => Ok(()),
            },
            // A server that cannot be told to stop is none.
            Source::Shutdown => match result {
                Err(error @ (Errno::NOMEM | Errno::NOSPC)) => Err(IpcError::io("waiting for orders", error)),
                _ => self.told(reactor),
            },
            Source::Bell(_) | Source::Mail | Source::Timer | Source::File(_) | Source::Tickets => Ok(()),
        }
    }

    /// The member that a token's id names: the token has only 28 bits of the generation.
    fn member(&mut self, id: SessionId) -> Option<&mut Member> {
        let member = self.members.get_mut(id.index as usize)?.as_mut()?;
        (member.id.generation & GENERATION_MASK == id.generation & GENERATION_MASK).then_some(member)
    }

    /// Waits for clients, unless accepting pauses or there is no place for one who says nothing.
    fn arm_listener<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        if !self.listener_armed && !self.accepts_no_more && self.pause_ends_ns == 0 && self.has_room() {
            reactor.driver.poll(self.listener.socket(), PollFlags::IN, Source::Listener.token())?;
            self.listener_armed = true;
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        let room_ns = self.half_open.room_ns();
        room_ns == 0 || monotonic_ns() >= room_ns
    }

    /// Something has been closed: whoever waits for a descriptor may have it now.
    fn resume<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        self.pause_ends_ns = 0;
        self.arm_listener(reactor)
    }

    fn accept<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        for _ in 0..ACCEPTS_PER_EVENT {
            if !self.has_room() || self.accepts_no_more {
                break;
            }
            match self.listener.accept() {
                Ok(Some(socket)) => {
                    self.pause_ns = 0;
                    self.greet(reactor, socket)?;
                }
                Ok(None) => break,
                Err(error) => {
                    self.accept_failed(reactor, error);
                    break;
                }
            }
        }
        self.arm_listener(reactor)
    }

    /// Sends away those who wait while descriptors are short, so that they know, and pauses. The kernel refuses to
    /// accept whether anybody waits or not: if nobody does, nothing has happened.
    fn accept_failed<S>(&mut self, reactor: &mut Reactor<S>, error: Errno) {
        let mut failed = 0;
        while failed < SENT_AWAY_PER_PAUSE {
            match self.listener.accept_with_spare() {
                Ok(Some(socket)) => turn_away(reactor, &socket, &shortage(error)),
                Ok(None) if failed == 0 => return self.listener.keep_spare(),
                Ok(None) => break,
                Err(_) => {
                    failed += 1;
                    break;
                }
            }
            failed += 1;
        }
        self.listener.keep_spare();
        reactor.core.metrics.accepts_failed += failed;
        self.pause_ns = (self.pause_ns * 2).clamp(PAUSE_MIN_NS, PAUSE_MAX_NS);
        self.pause_ends_ns = monotonic_ns() + self.pause_ns;
        let pause_ms = self.pause_ns / 1_000_000;
        reactor.log.warn(|| tracing::warn!(%error, failed, pause_ms, "clients could not be accepted"));
    }

    /// Takes a new socket: with its hello if that has come already, as it usually has.
    fn greet<S>(&mut self, reactor: &mut Reactor<S>, socket: OwnedFd) -> Result<()> {
        kill_point!("server.socket.accepted");
        if !rendezvous::is_ours(&socket) {
            refuse(reactor, &socket, &Welcome::refusal(code::NOT_PERMITTED));
            return Ok(());
        }
        let process = match doorbell_uring::peer_process(socket.as_fd()) {
            Ok(process) => process,
            // A process that is dead already leaves nothing to greet (F1).
            Err(Errno::SRCH | Errno::NODATA) => return Ok(()),
            Err(error) => {
                refuse(reactor, &socket, &shortage(error));
                return Ok(());
            }
        };
        let mut bytes = [0u8; size_of::<Hello>() + 1];
        match hear(&socket, &mut bytes) {
            Heard::Packet(len, alone) => {
                self.answer(reactor, socket, process, alone.then_some(&bytes[..len]))
            }
            Heard::End => Ok(()),
            Heard::Nothing => self.wait_for_hello(reactor, socket, process),
        }
    }

    /// Gives a socket its time to say hello. Whatever it costs is bounded, in all and for each process (F27).
    fn wait_for_hello<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        socket: OwnedFd,
        process: OwnedFd,
    ) -> Result<()> {
        let key = self.processes.key(process.as_fd());
        if !self.half_open.admits(key) {
            let limit = self.half_open.most_of_process();
            let welcome = Welcome::too_many(Scope::HandshakesOfProcess, limit, RETRY_HANDSHAKE_MS);
            refuse(reactor, &socket, &welcome);
            return Ok(());
        }
        let (id, sent_away) = self.half_open.enter(socket, process, key, monotonic_ns());
        if let Some(oldest) = sent_away {
            Self::send_away(reactor, oldest)?;
        }
        self.arm_half_open(reactor, id)
    }

    fn arm_half_open<S>(&self, reactor: &mut Reactor<S>, id: SessionId) -> Result<()> {
        let Some(half) = self.half_open.get(id) else { return Ok(()) };
        let events = PollFlags::IN | PollFlags::RDHUP;
        reactor.driver.poll(half.socket.as_fd(), events, Source::HalfOpen(id).token())?;
        Ok(())
    }

    /// A half-open socket has something to say: its hello, or its end.
    fn half_open_spoke<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        id: SessionId,
        result: std::result::Result<u32, Errno>,
    ) -> Result<()> {
        match result {
            Err(Errno::CANCELED) => return Ok(()),
            Err(error) => {
                let Some(half) = self.half_open.take(id) else { return Ok(()) };
                // No room to listen to it: to go on as if there were would be a loop.
                refuse(reactor, &half.socket, &shortage(error));
                drop(half);
                return self.resume(reactor);
            }
            Ok(_) => {}
        }
        let Some(half) = self.half_open.get(id) else { return Ok(()) };
        let mut bytes = [0u8; size_of::<Hello>() + 1];
        let heard = hear(&half.socket, &mut bytes);
        if let Heard::Nothing = heard {
            return self.arm_half_open(reactor, id);
        }
        let Some(half) = self.half_open.take(id) else { return Ok(()) };
        match heard {
            Heard::Packet(len, alone) => {
                self.answer(reactor, half.socket, half.process, alone.then_some(&bytes[..len]))?;
                self.arm_listener(reactor)
            }
            Heard::End | Heard::Nothing => {
                drop(half);
                self.resume(reactor)
            }
        }
    }

    /// Answers a first packet; `None` for one that was too long or did not come alone.
    pub(super) fn answer<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        socket: OwnedFd,
        process: OwnedFd,
        packet: Option<&[u8]>,
    ) -> Result<()> {
        kill_point!("server.hello.heard");
        let verdict = match packet {
            Some(hello) => reactor.core.judge(hello, monotonic_ns()),
            None => Verdict::Refuse(Box::new(Welcome::refusal(code::BAD_HELLO))),
        };
        let (geometry, welcome) = match verdict {
            Verdict::Grant(geometry, welcome) => (geometry, welcome),
            Verdict::Refuse(welcome) => {
                refuse(reactor, &socket, &welcome);
                return Ok(());
            }
        };
        let limit = reactor.core.config().max_sessions_per_process;
        // Where the process may have as many as all together nobody needs to know which it is.
        let counts = limit < reactor.core.config().max_sessions;
        let key = if counts { self.processes.key(process.as_fd()) } else { None };
        if key.is_some() && self.members.iter().flatten().filter(|m| m.key == key).count() >= limit as usize {
            refuse(reactor, &socket, &Welcome::too_many(Scope::SessionsOfProcess, limit, RETRY_MS));
            return Ok(());
        }
        self.seat(reactor, socket, process, key, geometry, *welcome)
    }

    /// Makes a session of a socket. Whatever fails on the way is undone and answered, and goes no further (F33).
    fn seat<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        socket: OwnedFd,
        process: OwnedFd,
        key: Option<ProcessKey>,
        geometry: Geometry,
        welcome: Welcome,
    ) -> Result<()> {
        let identity = Identity { epoch: self.epoch, session: rendezvous::random_id()? };
        let home_core = reactor.crew.core();
        let doorbell_kind =
            if reactor.driver.waits_on_words() { doorbell_kind::FUTEX } else { doorbell_kind::SOCKET };
        let (epoch, session) = (identity.epoch, identity.session);
        let welcome = Welcome { epoch, session, home_core, doorbell_kind, ..welcome };
        let bytes = session_bytes(&geometry);
        if !reactor.core.budget.take_session(bytes) {
            let limit = (reactor.core.config().memory_budget >> 10) as u32;
            reactor
                .log
                .warn(|| tracing::warn!(bytes, limit, "no room in the memory budget for a new session"));
            refuse(reactor, &socket, &Welcome { retry_ms: 100, limit, ..Welcome::refusal(code::NO_MEMORY) });
            return Ok(());
        }
        kill_point!("server.budget.taken");
        let segment = match machine::create_segment(geometry, welcome.lanes, identity) {
            Ok(made) => Arc::new(made),
            Err(error) => {
                reactor.core.budget.give_session(bytes);
                reactor.log.warn(|| tracing::warn!(%error, "no segment for a new session"));
                refuse(reactor, &socket, &shortage(errno_of(&error)));
                return Ok(());
            }
        };
        kill_point!("server.segment.made");
        match rendezvous::send(socket.as_fd(), welcome.as_bytes(), segment.memory()) {
            Ok(()) => {}
            // Killed after its hello: the segment goes with this scope (F2).
            Err(Errno::PIPE | Errno::CONNRESET) => {
                reactor.core.budget.give_session(bytes);
                return Ok(());
            }
            Err(error) => {
                reactor.core.budget.give_session(bytes);
                reactor.log.warn(|| tracing::warn!(%error, "a segment could not be sent"));
                refuse(reactor, &socket, &shortage(error));
                return Ok(());
            }
        }
        kill_point!("server.welcome.sent");
        let id = reactor.core.open(SessionLane::new(Arc::clone(&segment), 0)?);
        kill_point!("server.session.opened");
        let socket = Arc::new(socket);
        reactor.add_peer(id, Arc::clone(&socket), None);
        reactor.listen(id)?;
        reactor.driver.poll(process.as_fd(), PollFlags::IN, Source::Process(id).token())?;
        self.lanes_of[0] += 1;
        self.linger.has_company();
        let index = id.index as usize;
        if self.members.len() <= index {
            self.members.resize_with(index + 1, || None);
        }
        self.members[index] = Some(Member {
            id,
            socket,
            process,
            key,
            further: Vec::new(),
            lane_requests: 0,
            segment,
            excess: 0,
            idle_lanes: 0,
            quiet_lanes: 0,
        });
        kill_point!("server.session.listed");
        tracing::debug!(session = id.index, "session opened");
        Ok(())
    }

    /// A session's socket has something to say: a wish for a lane, a ring where reactors sleep on sockets, or its end.
    fn socket_spoke<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        id: SessionId,
        result: std::result::Result<u32, Errno>,
    ) -> Result<()> {
        let Some(member) = self.member(id) else { return Ok(()) };
        let (id, socket) = (member.id, Arc::clone(&member.socket));
        match result {
            Err(Errno::CANCELED) => return Ok(()),
            // No room to listen to it: to go on as if there were would be a loop.
            Err(_) => return self.end(reactor, id, DisconnectReason::Quota),
            Ok(_) => {}
        }
        let by_socket = !reactor.driver.waits_on_words();
        let mut bytes = [0u8; size_of::<LaneRequest>() + 1];
        match rendezvous::receive(socket.as_fd(), &mut bytes, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {}
            Ok(packet) if packet.len > 0 => match LaneRequest::read(&bytes[..packet.len]) {
                Some(choice) if packet.fds.is_empty() && !packet.truncated => {
                    if !self.lane_wanted(reactor, id, choice)? {
                        return Ok(());
                    }
                }
                None if by_socket && packet.len == 1 && packet.fds.is_empty() => {}
                _ => {
                    reactor
                        .log
                        .warn(|| tracing::warn!(session = id.index, "bytes on the socket that mean nothing"));
                    return self.end(reactor, id, DisconnectReason::ProtocolViolation);
                }
            },
            _ => return self.end(reactor, id, DisconnectReason::PeerDied),
        }
        if by_socket {
            // Whatever came: a client that finds its socket full counts as having rung.
            reactor.socket_rang(id)?;
        }
        reactor.listen(id)
    }

    /// Grants a lane, or says that there is none to be had; `false` if the session has asked too often and ends.
    fn lane_wanted<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        id: SessionId,
        choice: LaneChoice,
    ) -> Result<bool> {
        let chosen = self.choose(&reactor.crew, choice);
        let most = reactor.core.config().max_further_lanes;
        let used: u32 = self.lanes_of[1..].iter().sum();
        let Some(member) = self.member(id) else { return Ok(false) };
        member.lane_requests += 1;
        if member.lane_requests > LANE_REQUESTS_MAX {
            self.end(reactor, id, DisconnectReason::Quota)?;
            return Ok(false);
        }
        let known = |at: usize| member.further.iter().position(|r| usize::from(*r) == at);
        let lane = match chosen {
            None | Some(0) => 0,
            Some(at) if known(at).is_some() => known(at).map_or(0, |i| i as u32 + 1),
            Some(at) => {
                let number = member.further.len() as u32 + 1;
                if used < most && !reactor.stopping && Self::grant(reactor, id, number, &member.socket, at)? {
                    member.further.push(at as u16);
                    self.lanes_of[at] += 1;
                    // Its reactor answers the client once it has taken the lane.
                    return Ok(true);
                }
                0
            }
        };
        let at = if lane == 0 { 0 } else { chosen.unwrap_or(0) };
        let grant = LaneGrant::new(lane, reactor.crew.addresses[at].core);
        let Some(member) = self.member(id) else { return Ok(false) };
        if let Err(error) = rendezvous::send(member.socket.as_fd(), grant.as_bytes(), None) {
            tracing::debug!(%error, "an answer to a wish for a lane was not delivered");
        }
        Ok(true)
    }

    /// The reactor that a client means: that of a core, or the one with the fewest lanes of those of other cores.
    fn choose(&self, crew: &Crew, choice: LaneChoice) -> Option<usize> {
        let reactors = crew.addresses.iter().enumerate();
        match choice {
            LaneChoice::On(NO_CORE) => None,
            LaneChoice::On(core) => reactors.filter(|(_, a)| a.core == core).map(|(i, _)| i).next(),
            LaneChoice::NotOn(core) => {
                reactors.filter(|(_, a)| a.core != core).map(|(i, _)| i).min_by_key(|i| self.lanes_of[*i])
            }
        }
    }

    /// Makes lane `number` of a session and gives it to reactor `at`; `false` if there is no room or memory.
    fn grant<S>(
        reactor: &mut Reactor<S>,
        id: SessionId,
        number: u32,
        socket: &Arc<OwnedFd>,
        at: usize,
    ) -> Result<bool> {
        let Some(lane) = reactor.core.lane(id) else { return Ok(false) };
        if number >= lane.segment().lanes() {
            return Ok(false);
        }
        let bell = match reactor.driver.waits_on_words() {
            true => None,
            false => match bell_socket() {
                Ok(bell) => Some(bell),
                Err(error) => {
                    reactor.log.warn(|| tracing::warn!(%error, "no socket for the bell of a further lane"));
                    return Ok(false);
                }
            },
        };
        let bytes = lane_bytes(lane.segment().geometry()) as u64;
        if reactor.core.budget.take_spare(1, 1, bytes) == 0 {
            return Ok(false);
        }
        let Some(lane) = reactor.core.lane(id) else { return Ok(false) };
        if let Err(error) = lane.segment().grant_lane(number) {
            reactor.core.budget.give(bytes);
            reactor.log.warn(|| tracing::warn!(%error, "no memory for a further lane"));
            return Ok(false);
        }
        kill_point!("server.lane.granted");
        let segment = Arc::clone(lane.segment());
        lane.add_further();
        let address = &reactor.crew.addresses[at];
        let socket = Arc::clone(socket);
        let mut told = address.put(Message::Lane { id, number, segment, socket, bell });
        for notice in reactor.core.connections_of(id) {
            told &= address.put(Message::Notice(id, notice));
        }
        if told {
            reactor.ring_reactor(at)?;
        }
        // Where it is not told, that reactor has failed, and its last message ends the server.
        Ok(told)
    }

    /// Ends one session and nothing else: everything it held is released here, and at its other reactors as soon
    /// as they have heard of it.
    pub fn end<S>(
        &mut self,
        reactor: &mut Reactor<S>,
        id: SessionId,
        reason: DisconnectReason,
    ) -> Result<()> {
        let Some(lane) = reactor.core.lane(id) else { return Ok(()) };
        lane.segment().set_state(state::CLOSED, reason as u32);
        kill_point!("server.session.closed");
        reactor.core.metrics.count_end(reason);
        reactor.let_go(id)?;
        kill_point!("server.session.unseated");
        let Some(member) = self.members.get_mut(id.index as usize).and_then(Option::take) else {
            return Ok(());
        };
        self.lanes_of[0] -= 1;
        self.linger.has_lost_one(self.lanes_of[0] == 0, monotonic_ns());
        let geometry = *member.segment.geometry();
        let lanes = member.further.len();
        reactor.core.budget.give_session(session_bytes(&geometry));
        reactor.core.budget.give(lane_bytes(&geometry) as u64 * lanes as u64);
        if matches!(
            reason,
            DisconnectReason::ProtocolViolation | DisconnectReason::Quota | DisconnectReason::DoorbellAbuse
        ) {
            // Such a client may keep its mapping for ever: it keeps the heads, which say that it is over.
            for lane in 0..=lanes as u32 {
                let LaneLayout { slots, end, .. } = LaneLayout::nth(&geometry, lane);
                member.segment.punch(slots, end - slots)?;
            }
        }
        for at in member.further {
            let at = usize::from(at);
            self.lanes_of[at] -= 1;
            if reactor.crew.addresses[at].put(Message::End(id)) {
                reactor.ring_reactor(at)?;
            }
        }
        if reason != DisconnectReason::PeerDied {
            hear_out(&member.socket);
            // A client that is gone or full needs no goodbye: its segment says the same.
            if let Err(error) = rendezvous::send(member.socket.as_fd(), Goodbye::new(reason).as_bytes(), None)
            {
                tracing::debug!(%error, "goodbye not delivered");
            }
        }
        // The kernel holds the socket until its poll is cancelled; the peer shall see the end now.
        if let Err(error) = rustix::net::shutdown(&*member.socket, rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "shutdown of a session's socket");
        }
        reactor.driver.cancel(Source::Socket(id).token())?;
        reactor.driver.cancel(Source::Process(id).token())?;
        tracing::debug!(session = id.index, %reason, "session ended");
        kill_point!("server.session.released");
        drop((member.socket, member.process));
        self.resume(reactor)
    }

    /// Ends the sessions whose segment has lost memory (F19).
    pub fn end_lost<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        let faults = doorbell_shm::bus::faults();
        if std::mem::replace(&mut self.faults_seen, faults) == faults {
            return Ok(());
        }
        let lost = |member: &Member| member.segment.has_failed().then_some(member.id);
        let lost: Vec<SessionId> = self.members.iter().flatten().filter_map(lost).collect();
        for id in lost {
            reactor.log.warn(|| {
                tracing::warn!(
                    session = id.index,
                    "memory of a session is lost (SIGBUS): is the machine out of memory?"
                )
            });
            self.end(reactor, id, DisconnectReason::MemoryLost)?;
        }
        Ok(())
    }

    /// Looks whether some sessions' clients have made more pages exist than they were granted: those become holes again.
    /// A client that goes on so is ended.
    pub fn audit<S>(&mut self, reactor: &mut Reactor<S>) -> Result<()> {
        let members = self.members.len();
        for _ in 0..AUDITS_PER_SWEEP.min(members) {
            self.next_audit = if self.next_audit + 1 < members { self.next_audit + 1 } else { 0 };
            let Some(member) = self.members.get_mut(self.next_audit).and_then(Option::as_mut) else {
                continue;
            };
            let bytes = member.segment.excess()?;
            if bytes == 0 {
                member.excess = 0;
                continue;
            }
            member.excess += 1;
            let (id, times, further) = (member.id, member.excess, member.further.clone());
            let segment = Arc::clone(&member.segment);
            reactor.core.metrics.excess_found += 1;
            reactor.log.warn(|| {
                tracing::warn!(session = id.index, bytes, "a client touches pages that it was not granted")
            });
            if times > EXCESS_MAX {
                self.end(reactor, id, DisconnectReason::Quota)?;
                continue;
            }
            if let Some(lane) = reactor.core.lane(id) {
                lane.punch_excess()?;
            }
            for at in &further {
                if reactor.crew.addresses[usize::from(*at)].put(Message::Punch(id)) {
                    reactor.ring_reactor(usize::from(*at))?;
                }
            }
            // Lanes that do not exist.
            let from = LaneLayout::nth(segment.geometry(), further.len() as u32).end;
            segment.punch(from, segment.len() - from)?;
        }
        Ok(())
    }

    /// Ends a handshake that took too long.
    fn send_away<S>(reactor: &mut Reactor<S>, half: HalfOpen) -> Result<()> {
        reactor.core.metrics.sessions_refused += 1;
        reactor.core.metrics.count_end(DisconnectReason::HandshakeTimeout);
        reactor.log.warn(|| tracing::warn!("a client connected and did not say hello in time"));
        let bye = Goodbye::new(DisconnectReason::HandshakeTimeout);
        if let Err(error) = rendezvous::send(half.socket.as_fd(), bye.as_bytes(), None) {
            tracing::debug!(%error, "goodbye not delivered");
        }
        if let Err(error) = rustix::net::shutdown(&half.socket, rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "shutdown of a half-open socket");
        }
        Ok(reactor.driver.cancel(Source::HalfOpen(half.id).token())?)
    }
}

/// The two ends by which a further lane is rung.
fn bell_socket() -> std::result::Result<BellSocket, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok(BellSocket { ours, theirs })
}

/// What a session with its home lane takes from the memory budget, bytes.
fn session_bytes(geometry: &Geometry) -> u64 {
    granted_bytes(geometry) as u64 + PRIVATE_PER_SESSION
}

/// Takes what a socket that has not said hello says. Descriptors that come with it are closed with the packet (F31).
pub fn hear(socket: &OwnedFd, bytes: &mut [u8; size_of::<Hello>() + 1]) -> Heard {
    match rendezvous::receive(socket.as_fd(), bytes, RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN) => Heard::Nothing,
        Ok(packet) if packet.len > 0 => Heard::Packet(packet.len, !packet.truncated && packet.fds.is_empty()),
        Ok(_) | Err(_) => Heard::End,
    }
}

/// The answer to a client for whom the kernel refused something with `error` (F28, F32 to F34).
fn shortage(error: Errno) -> Welcome {
    let descriptors =
        getrlimit(Resource::Nofile).current.map_or(u32::MAX, |n| n.try_into().unwrap_or(u32::MAX));
    match error {
        Errno::MFILE => Welcome::too_many(Scope::Descriptors, descriptors, RETRY_MS),
        Errno::TOOMANYREFS => Welcome::too_many(Scope::DescriptorsInFlight, descriptors, RETRY_MS),
        _ => Welcome { retry_ms: RETRY_MS, ..Welcome::refusal(code::NO_MEMORY) },
    }
}

/// What the kernel said when it refused a segment.
fn errno_of(error: &SegmentError) -> Errno {
    match error {
        SegmentError::Os { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::NOMEM),
        _ => Errno::NOMEM,
    }
}

/// Refuses somebody who has just been accepted and not been looked at.
fn turn_away<S>(reactor: &mut Reactor<S>, socket: &OwnedFd, welcome: &Welcome) {
    let stranger = Welcome::refusal(code::NOT_PERMITTED);
    refuse(reactor, socket, if rendezvous::is_ours(socket) { welcome } else { &stranger });
}

/// Takes what a peer has sent, and accepts nothing more: a socket closed with something unread resets its peer, who would
/// then not see our last word.
fn hear_out(socket: &OwnedFd) {
    if let Err(error) = rustix::net::shutdown(socket, rustix::net::Shutdown::Read) {
        tracing::debug!(%error, "shutdown of a socket");
    }
    let mut unread = [0u8; 1];
    while rendezvous::receive(socket.as_fd(), &mut unread, RecvFlags::DONTWAIT).is_ok_and(|p| p.len > 0) {}
}

/// Answers a hello that leads to nothing.
fn refuse<S>(reactor: &mut Reactor<S>, socket: &OwnedFd, welcome: &Welcome) {
    reactor.core.metrics.sessions_refused += 1;
    let (code, scope) = (welcome.code, welcome.scope());
    reactor.log.warn(|| tracing::warn!(code, ?scope, "handshake refused"));
    hear_out(socket);
    // A client that is gone by now needs no answer.
    if let Err(error) = rendezvous::send(socket.as_fd(), welcome.as_bytes(), None) {
        tracing::debug!(%error, "refusal not delivered");
    }
}

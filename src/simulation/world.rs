//! One run: a server, its clients, time, and what goes wrong, all of it by one seed.

use super::hostile::Hostile;
use super::kernel::{self, with_kernel};
use super::ledger::{Call, FLOW, HEAD, LATER, LONG, Ledger, MIRROR, PANIC, REFUSE, TABLE};
use super::many::Many;
use super::plain::{Ended, Plain};
use super::random::Random;
use crate::client::{CallOptions, IpcClient, simulated};
use crate::config::{ServerConfig, WaitPolicy};
use crate::error::IpcError;
use crate::protocol::handshake::{Answer, DisconnectReason, Hello, Welcome};
use crate::protocol::rendezvous;
use crate::server::simulated::Server;
use doorbell_shm::layout::Geometry;
use doorbell_shm::segment::Segment;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// What the server keeps for itself of its budget, and for sessions that come (`budget.rs`).
const UNLEASED: u64 = 1_650_000 + 16 * (8192 + 1536);
/// The longest message.
const MESSAGE_MAX: u64 = 256 << 10;
/// Waits within waits from which on nobody but the server runs.
const DEPTH: u32 = 3;
/// Steps after the last fault within which everything has come to its end.
const PATIENCE: u64 = 400_000;
/// Steps of a run's first part beyond those asked for, that waits within it may take.
const EXCESS: u64 = 200_000;

/// What a run, or many, came to.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    pub events: u64,
    pub calls: u64,
    pub answers: u64,
    pub errors: u64,
    pub losses: u64,
    pub deaths: u64,
    pub stops: u64,
    pub server_deaths: u64,
    pub drains: u64,
    pub lost_bells: u64,
    pub kernel_errors: u64,
    pub refusals: u64,
    pub healed: u64,
    pub forced: u64,
    pub violators_ended: u64,
    pub further_lanes: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        let sums = [
            (&mut self.events, other.events),
            (&mut self.calls, other.calls),
            (&mut self.answers, other.answers),
            (&mut self.errors, other.errors),
            (&mut self.losses, other.losses),
            (&mut self.deaths, other.deaths),
            (&mut self.stops, other.stops),
            (&mut self.server_deaths, other.server_deaths),
            (&mut self.drains, other.drains),
            (&mut self.lost_bells, other.lost_bells),
            (&mut self.kernel_errors, other.kernel_errors),
            (&mut self.refusals, other.refusals),
            (&mut self.healed, other.healed),
            (&mut self.forced, other.forced),
            (&mut self.violators_ended, other.violators_ended),
            (&mut self.further_lanes, other.further_lanes),
        ];
        for (sum, more) in sums {
            *sum += more;
        }
    }
}

/// A rule was broken: what a run unwinds with.
pub struct Broken(pub String);

/// Which client an actor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Plain { fickle: bool },
    Many,
    Hostile { careful: bool },
}

/// A client's process.
struct Actor {
    role: Role,
    plain: Option<Plain>,
    many: Many,
    hostile: Option<Hostile>,
    /// Readable once the process has ended.
    process: Option<OwnedFd>,
    /// The server of its session.
    epoch: u64,
    /// Stands still until then.
    stopped_until: u64,
    /// When it tries to connect next.
    joins_at: u64,
}

/// The run.
pub struct World {
    random: RefCell<Random>,
    ledger: Arc<Ledger>,
    config: ServerConfig,
    by_words: bool,
    server: RefCell<Option<Rc<Server<Ledger>>>>,
    /// Servers so far.
    epoch: Cell<u64>,
    starts_at: Cell<u64>,
    actors: Vec<RefCell<Actor>>,
    depth: Cell<u32>,
    events: Cell<u64>,
    /// Steps by which it has got further.
    limit: Cell<u64>,
    finishing: Cell<bool>,
    /// Of each call: whether it may be executed more than once, and whether it may be executed at all.
    terms: RefCell<Vec<(bool, bool)>>,
    tally: RefCell<Tally>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut roles: Vec<Role> = (0..2 + random.below(3))
            .map(|_| match random.below(3) {
                0 => Role::Many,
                1 => Role::Plain { fickle: true },
                _ => Role::Plain { fickle: false },
            })
            .collect();
        if random.one_in(2) {
            roles.push(Role::Hostile { careful: random.one_in(2) });
        }
        Self::with(random, roles)
    }

    /// One in which nothing happens but to a guest.
    pub fn quiet() -> Rc<Self> {
        Self::quiet_with(|_| ())
    }

    /// The same with another configuration of its servers.
    pub fn quiet_with(change: impl FnOnce(&mut ServerConfig)) -> Rc<Self> {
        let mut world = Self::with(Random::new(1), Vec::new());
        change(&mut world.config);
        let world = Rc::new(world);
        world.finishing.set(true);
        world.limit.set(u64::MAX);
        Rc::clone(&world).let_others_run();
        world
    }

    /// A client that only does what it is told.
    pub fn guest(&self) -> IpcClient {
        let mut actor = Actor::new(Role::Plain { fickle: false });
        loop {
            self.step();
            if let Some(client) = self.join(&mut actor).expect("a handshake") {
                // It never dies.
                std::mem::forget(actor.process);
                return client;
            }
        }
    }

    fn with(mut random: Random, roles: Vec<Role>) -> Self {
        kernel::begin(random.word());
        let leases = random.of(&[0, 64 << 10, 256 << 10, 2 << 20]);
        let config = ServerConfig {
            max_sessions: 8,
            max_sessions_per_process: 8,
            max_connections: random.of(&[12, 64]),
            max_further_lanes: 8,
            max_message_size: MESSAGE_MAX,
            memory_budget: UNLEASED + (random.below(8) as u64) * 10_000 + leases,
            body_memory: random.of(&[300 << 10, 1 << 20]),
            entries_per_turn: random.of(&[4, 32]),
            max_deferred: random.of(&[3, 64]),
            drain_timeout: Duration::from_millis(50),
            idle_timeout: None,
            policy: random.of(&[WaitPolicy::Handoff, WaitPolicy::Block]),
            reactors: random.of(&[1, 1, 2]),
            ..ServerConfig::default()
        };
        Self {
            ledger: Arc::new(Ledger::new(random.word())),
            by_words: !random.one_in(4),
            server: RefCell::new(None),
            epoch: Cell::new(0),
            starts_at: Cell::new(0),
            actors: roles.into_iter().map(|role| RefCell::new(Actor::new(role))).collect(),
            depth: Cell::new(0),
            events: Cell::new(0),
            limit: Cell::new(0),
            finishing: Cell::new(false),
            terms: RefCell::default(),
            tally: RefCell::default(),
            random: RefCell::new(random),
            config,
        }
    }

    /// So many steps, then an end to all faults, and to all that was begun.
    pub fn run(self: Rc<Self>, events: u64) -> Tally {
        Rc::clone(&self).let_others_run();
        kernel::set_faults(true);
        self.limit.set(events + EXCESS);
        while self.events.get() < events {
            self.step();
            if self.events.get().is_multiple_of(16) {
                self.check();
            }
        }
        self.finish();
        self.tally()
    }

    fn let_others_run(self: Rc<Self>) {
        kernel::set_others(Some(Rc::new(move || {
            self.depth.set(self.depth.get() + 1);
            self.step();
            self.depth.set(self.depth.get() - 1);
        })));
    }

    pub fn events(&self) -> u64 {
        self.events.get()
    }

    fn tally(&self) -> Tally {
        let mut tally = self.tally.borrow().clone();
        tally.events = self.events.get();
        tally.calls = self.terms.borrow().len() as u64;
        with_kernel(|kernel| {
            (tally.lost_bells, tally.kernel_errors) = (kernel.lost_bells, kernel.errors);
            tally.refusals += kernel.refusals;
        });
        tally
    }

    fn fails(&self, what: String) -> ! {
        std::panic::resume_unwind(Box::new(Broken(what)))
    }

    fn check(&self) {
        if let Some(what) = self.ledger.wrong() {
            self.fails(what);
        }
        if let Some(server) = &*self.server.borrow() {
            server.check();
        }
    }

    pub fn word(&self) -> u64 {
        self.random.borrow_mut().word()
    }

    pub fn below(&self, end: usize) -> usize {
        self.random.borrow_mut().below(end)
    }

    pub fn one_in(&self, times: usize) -> bool {
        self.random.borrow_mut().one_in(times)
    }

    pub fn of<T: Copy>(&self, all: &[T]) -> T {
        self.random.borrow_mut().of(all)
    }

    pub fn secret(&self) -> u64 {
        self.ledger.secret
    }

    fn now(&self) -> u64 {
        with_kernel(|kernel| kernel.time())
    }

    /// One thing that happens.
    fn step(&self) {
        self.events.set(self.events.get() + 1);
        if self.events.get() > self.limit.get() {
            self.fails(format!("nothing comes to its end: {:?}", self.describe()));
        }
        let ns = match self.below(1000) {
            0 if !self.finishing.get() => 60_000_000,
            1..20 => self.below(1_000_000),
            _ => self.below(4000),
        };
        with_kernel(|kernel| kernel.pass(ns as u64));
        if self.one_in(6) {
            with_kernel(kernel::Kernel::look_at_descriptors);
        }
        match self.below(100) {
            0..44 => self.serve(),
            44..90 if self.depth.get() < DEPTH && !self.actors.is_empty() => self.act(),
            90..95 => self.ledger.write_later(self.word()),
            95.. if !self.finishing.get() => self.disturb(),
            _ => self.serve(),
        }
    }

    fn serve(&self) {
        let server = self.server.borrow().clone();
        let Some(server) = server else {
            if self.now() >= self.starts_at.get() {
                self.epoch.set(self.epoch.get() + 1);
                let server = Server::start(TABLE.as_slice(), &self.ledger, &self.config, self.by_words);
                *self.server.borrow_mut() = Some(Rc::new(server));
            }
            return;
        };
        server.step(self.below(server.reactors()));
        if server.has_ended() {
            drop(server);
            self.bury_server();
        }
    }

    /// The server's process has ended, or is made to; not while it runs further up.
    fn bury_server(&self) -> bool {
        let mut slot = self.server.borrow_mut();
        let Some(server) = slot.take_if(|server| Rc::strong_count(server) == 1) else { return false };
        let counted = server.counted();
        let mut tally = self.tally.borrow_mut();
        tally.healed += counted.sweeps_healed;
        tally.forced += counted.leases_forced;
        tally.further_lanes += counted.further_lanes;
        drop(server);
        self.ledger.forget_owed();
        self.starts_at.set(self.now() + self.below(3_000_000) as u64);
        true
    }

    /// The server's process is killed.
    pub fn kill_server(&self) {
        assert!(self.bury_server(), "it does not run further up");
        self.starts_at.set(u64::MAX);
    }

    /// The next server starts.
    pub fn start_server(&self) {
        self.starts_at.set(0);
    }

    /// A client does something.
    fn act(&self) {
        let at = self.below(self.actors.len());
        let Ok(mut actor) = self.actors[at].try_borrow_mut() else { return };
        if actor.stopped_until > self.now() {
            return;
        }
        let cpu = self.below(self.config.reactors as usize + 1) as u32;
        with_kernel(|kernel| kernel.set_cpu(cpu));
        if let Err(what) = self.act_as(&mut actor) {
            self.fails(what);
        }
    }

    fn act_as(&self, actor: &mut Actor) -> Result<(), String> {
        let finishing = self.finishing.get();
        match actor.role {
            Role::Plain { fickle } => {
                let Some(plain) = &mut actor.plain else {
                    if !finishing && let Some(client) = self.join(actor)? {
                        actor.plain = Some(Plain::new(client, fickle));
                    }
                    return Ok(());
                };
                match plain.step(self, finishing) {
                    Ok(()) => Ok(()),
                    Err(Ended::Wrong(what)) => Err(what),
                    Err(Ended::Session(reason)) => {
                        let reason = plain.why_over(reason);
                        self.session_ended_of(actor.epoch, &reason)?;
                        actor.process = None;
                        actor.plain.take().map_or(Ok(()), |plain| plain.bury(self))
                    }
                }
            }
            Role::Many => {
                if actor.many.is_away() {
                    if kernel::may_wait()
                        && (!finishing || !actor.many.is_idle())
                        && let Some(client) = self.join(actor)?
                    {
                        actor.many.attach(client)?;
                    }
                    if actor.many.is_away() {
                        // Calls that wait for the next session may be cancelled or expire meanwhile.
                        return match actor.many.step(self, finishing) {
                            Err(Ended::Wrong(what)) => Err(what),
                            _ => Ok(()),
                        };
                    }
                    return Ok(());
                }
                match actor.many.step(self, finishing) {
                    Ok(()) => Ok(()),
                    Err(Ended::Wrong(what)) => Err(what),
                    Err(Ended::Session(reason)) => Err(format!("a client that many use ended: {reason}")),
                }
            }
            Role::Hostile { careful } => {
                match &mut actor.hostile {
                    None if !finishing => {
                        if let Some((socket, _, segment)) = self.greet(actor)? {
                            actor.hostile = Hostile::new(segment, socket, careful);
                        }
                    }
                    Some(hostile) => {
                        let goes_on = hostile.step(self);
                        if !goes_on && self.one_in(20) {
                            actor.hostile = None;
                            self.tally.borrow_mut().violators_ended += 1;
                        }
                    }
                    None => {}
                }
                Ok(())
            }
        }
    }

    /// Shakes hands; what came of it if that is a session.
    fn greet(&self, actor: &mut Actor) -> Result<Option<(OwnedFd, Welcome, Segment)>, String> {
        let server = self.server.borrow().clone();
        let Some(server) = server.filter(|_| self.now() >= actor.joins_at) else { return Ok(None) };
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        );
        let (ours, theirs) = pair.map_err(|e| format!("socketpair: {e}"))?;
        let process = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| format!("eventfd: {e}"))?;
        let pidfd = process.try_clone().map_err(|e| format!("dup: {e}"))?;
        // Rings with room for the completion of a call in every slot. With less, as many calls of several frames as a ring
        // admits stop each other: their frames are in the ring, which is not read while it admits no call.
        let (small, least) = self.of(&[(4, 3), (4, 3), (8, 4), (16, 5)]);
        let geometry = Geometry {
            ring_order: least + self.below(3) as u8,
            large: 0,
            medium: 0,
            small,
            lease_pages: self.of(&[0, 16, 64]),
        };
        let hello = Hello::new(geometry, [7, 7], self.now(), "simulated");
        let hello = Hello { lanes: self.of(&[1, 2]), ..hello };
        if !server.greet(theirs, pidfd, &hello) {
            return Ok(None);
        }
        let mut bytes = [0; size_of::<Welcome>()];
        let len = rendezvous::receive(ours.as_fd(), &mut bytes, RecvFlags::DONTWAIT).map_or(0, |p| p.len);
        match Answer::read(&bytes[..len], 1) {
            Ok(Answer::Granted(welcome)) => {
                let segment = kernel::take_segment().ok_or("a welcome without a segment")?;
                actor.process = Some(process);
                actor.epoch = self.epoch.get();
                Ok(Some((ours, welcome, segment)))
            }
            Ok(Answer::Refused(_) | Answer::Ended(_)) => {
                self.tally.borrow_mut().refusals += 1;
                actor.joins_at = self.now() + 500_000;
                Ok(None)
            }
            Err(what) => Err(format!("the answer to a hello: {what}")),
        }
    }

    fn join(&self, actor: &mut Actor) -> Result<Option<IpcClient>, String> {
        let policy = self.of(&[WaitPolicy::Handoff, WaitPolicy::Block]);
        let Some((socket, welcome, segment)) = self.greet(actor)? else { return Ok(None) };
        simulated::join(socket, &welcome, segment, policy).map(Some).map_err(|error| error.to_string())
    }

    /// Something goes wrong.
    fn disturb(&self) {
        match self.below(60) {
            0..4 => with_kernel(kernel::Kernel::ring_for_nothing),
            4..8 => {
                let server = self.server.borrow().clone();
                if let Some(server) = server {
                    server.refuse_pages(self.below(8));
                }
            }
            8..11 => self.kill(),
            11..17 => {
                let at = self.below(self.actors.len());
                if let Ok(mut actor) = self.actors[at].try_borrow_mut() {
                    let ns = self.of(&[100_000, 5_000_000, 150_000_000, 700_000_000]);
                    actor.stopped_until = self.now() + self.below(ns) as u64;
                    self.tally.borrow_mut().stops += 1;
                }
            }
            17 if self.one_in(4) && self.bury_server() => self.tally.borrow_mut().server_deaths += 1,
            18 if self.one_in(4) => {
                let server = self.server.borrow().clone();
                if let Some(server) = server {
                    server.shut_down(self.one_in(3));
                    self.tally.borrow_mut().drains += 1;
                }
            }
            _ => {}
        }
    }

    /// A client's process is killed.
    fn kill(&self) {
        let at = self.below(self.actors.len());
        let Ok(mut actor) = self.actors[at].try_borrow_mut() else { return };
        self.end_process(&mut actor);
        self.tally.borrow_mut().deaths += 1;
    }

    fn end_process(&self, actor: &mut Actor) {
        (actor.plain, actor.hostile) = (None, None);
        actor.many = Many::new();
        if let Some(process) = actor.process.take() {
            // Its pidfd becomes readable.
            rustix::io::write(&process, &1u64.to_ne_bytes()).ok();
        }
    }

    fn session_ended_of(&self, epoch: u64, reason: &IpcError) -> Result<(), String> {
        let died = epoch != self.epoch.get() || self.server.borrow().is_none();
        match reason {
            IpcError::Disconnected(DisconnectReason::Draining) => Ok(()),
            IpcError::NotExecuted if died => Ok(()),
            reason => Err(format!("the session of an honest client ended: {reason} ({reason:?})")),
        }
    }

    /// A client's session is over for this reason.
    pub fn session_ended(&self, reason: &IpcError) -> Result<(), String> {
        match reason {
            IpcError::Disconnected(DisconnectReason::Draining) | IpcError::NotExecuted => Ok(()),
            reason => Err(format!("the session of an honest client ended: {reason} ({reason:?})")),
        }
    }

    /// Faults cease. Every call comes to its end, then every session, and nothing is left.
    fn finish(&self) {
        self.finishing.set(true);
        kernel::set_faults(false);
        for actor in &self.actors {
            let mut actor = actor.borrow_mut();
            actor.stopped_until = 0;
            if matches!(actor.role, Role::Hostile { .. }) {
                self.end_process(&mut actor);
            }
        }
        let busy = || {
            self.actors.iter().any(|actor| {
                let actor = actor.borrow();
                actor.plain.as_ref().is_some_and(|plain| !plain.is_idle()) || !actor.many.is_idle()
            })
        };
        self.limit.set(self.events.get() + PATIENCE);
        while busy() {
            self.step();
        }
        self.check();
        for actor in &self.actors {
            self.end_process(&mut actor.borrow_mut());
        }
        self.limit.set(self.events.get() + PATIENCE);
        loop {
            let left = match &*self.server.borrow() {
                Some(_) if self.ledger.owes() => Some("answers are owed".to_owned()),
                Some(server) => server.leftovers(),
                None => None,
            };
            let Some(left) = left else { break };
            if self.events.get() == self.limit.get() {
                self.fails(format!("left when all clients have gone: {left}"));
            }
            self.step();
        }
        self.check();
        self.bury_server();
        for (id, (repeats, may_run)) in self.terms.borrow().iter().enumerate() {
            let executed = self.ledger.executions(id as u64);
            if executed > 1 && !repeats || executed > 0 && !may_run {
                self.fails(format!("call {id} was executed {executed} times in the end"));
            }
        }
    }

    fn describe(&self) -> Vec<String> {
        let of = |actor: &RefCell<Actor>| actor.try_borrow().map_or("waits".to_owned(), |a| a.describe());
        self.actors.iter().map(of).collect()
    }

    fn len(&self) -> usize {
        let len = match self.below(100) {
            0..50 => HEAD + self.below(500),
            50..60 => 1000 + self.below(60),
            60..70 => 1024,
            70..85 => HEAD + self.below(6000),
            85..92 => 16_384 - 40 + self.below(80),
            92..98 => self.below(60_000),
            _ => 200 << 10,
        };
        len.max(HEAD)
    }

    /// Another call, and what goes with it.
    pub fn make_call(&self) -> (Call, CallOptions) {
        let of = match self.below(100) {
            0..45 => MIRROR,
            45..62 => FLOW,
            62..80 => LONG,
            80..92 => LATER,
            92..96 => PANIC,
            _ => REFUSE,
        };
        let len = if [LONG, LATER].contains(&of) && self.one_in(2) { HEAD } else { self.len() };
        let answer_len = self.len();
        let mut terms = self.terms.borrow_mut();
        let id = terms.len() as u64;
        let idempotent = self.one_in(5);
        let deadline = self.one_in(10).then(|| Duration::from_micros(self.below(5000) as u64));
        terms.push((idempotent, true));
        let call = Call {
            id,
            of,
            len,
            answer_len,
            idempotent,
            has_deadline: deadline.is_some(),
            cancelled: false,
            came: 0,
        };
        let reply_capacity = if self.one_in(3) { self.below(20_000) } else { 0 };
        let pieces = self.one_in(5);
        let options =
            CallOptions { tag: id, deadline, idempotent, reply_capacity, pieces, ..CallOptions::default() };
        (call, options)
    }

    /// Bytes of an answer have come.
    pub fn take_answer(&self, call: &mut Call, bytes: &[u8], last: bool) -> Result<(), String> {
        self.tally.borrow_mut().answers += u64::from(last);
        self.ledger.take_answer(call, bytes, last)
    }

    /// A call has ended without an answer.
    pub fn take_error(&self, call: &Call, error: &IpcError, over: bool) -> Result<(), String> {
        let mut tally = self.tally.borrow_mut();
        match error {
            IpcError::NotExecuted => {
                tally.losses += 1;
                self.terms.borrow_mut()[call.id as usize].1 = false;
            }
            IpcError::ConnectionLost | IpcError::StreamLost { .. } => tally.losses += 1,
            _ => tally.errors += 1,
        }
        self.ledger.take_error(call, error, over)
    }

    /// A call could not be sent.
    pub fn never_sent(&self, call: &Call) -> Result<(), String> {
        self.terms.borrow_mut()[call.id as usize].1 = false;
        match self.ledger.executions(call.id) {
            0 => Ok(()),
            times => Err(format!("{call:?} was not sent and executed {times} times")),
        }
    }

    /// Nobody waits for a call any more.
    pub fn given_up(&self, _: &Call) -> Result<(), String> {
        Ok(())
    }
}

impl Actor {
    fn new(role: Role) -> Self {
        Self {
            role,
            plain: None,
            many: Many::new(),
            hostile: None,
            process: None,
            epoch: 0,
            stopped_until: 0,
            joins_at: 0,
        }
    }

    fn describe(&self) -> String {
        let plain = self.plain.as_ref().map(Plain::describe);
        format!("{:?} {plain:?} {}", self.role, self.many.describe())
    }
}

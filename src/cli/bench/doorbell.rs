//! The peer `doorbell`: this transport, against a server process with the bench handler.

use super::child::{self, Role};
use super::clock::timespec;
use super::error::BenchError;
use super::load::{Received, Target};
use super::long::{Frame, LongTarget, Outgoing};
use super::options::{BenchOptions, Policy, SLOT_MAX};
use super::placement::Cpus;
use super::server::{Counters, Server};
use super::work;
use super::worker::{self, ClientJob};
use doorbell::{
    CallId, CallOptions, ClientConfig, Connecting, ConnectionId, Context, HandlerError, HandlerTable,
    IpcClient, IpcError, IpcServer, MessageType, Pieces, Progress, Reply, ServerConfig, Status, WaitPolicy,
};
use doorbell_shm::entry::codec;
use doorbell_shm::layout::{Geometry, SLOT_MEDIUM, SLOT_SMALL, segment_len};
use rustix::event::epoll;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// The bench handler's message type: answers every 64-bit word XOR the constant.
const WORK: MessageType = MessageType::USER;
/// Bytes worked on at once, in memory of the handler's own.
const BLOCK: usize = 1024;
/// The same for what is left over.
const LINE: usize = 64;
/// Sessions and connections beside those of the load: whoever asks for the counters.
const SPARE: u32 = 8;

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(WORK, xor).on_pieces(WORK, begin_xor);

fn xor(_: &Context<'_, ()>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let (blocks, rest) = request.as_chunks::<BLOCK>();
    let (lines, tail) = rest.as_chunks::<LINE>();
    for block in blocks {
        xor_part(block, &mut [0; BLOCK], reply)?;
    }
    for line in lines {
        xor_part(line, &mut [0; LINE], reply)?;
    }
    xor_part(tail, &mut [0; LINE][..tail.len()], reply)
}

#[inline(always)]
fn xor_part(request: &[u8], out: &mut [u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    work::answer(request, out);
    reply.write(out)
}

/// The same for a body that comes piece by piece.
#[derive(Debug, Default)]
struct XorPieces {
    /// Bytes that have been answered: words go on across pieces.
    at: u64,
}

fn begin_xor(_: &Context<'_, ()>, _: Option<u64>) -> Result<Box<dyn Pieces<()>>, HandlerError> {
    Ok(Box::new(XorPieces::default()))
}

impl XorPieces {
    fn answer(
        &mut self,
        bytes: &[u8],
        mut write: impl FnMut(&[u8]) -> Result<(), HandlerError>,
    ) -> Result<(), HandlerError> {
        let mut out = [0; BLOCK];
        for block in bytes.chunks(BLOCK) {
            let out = &mut out[..block.len()];
            work::answer_at(self.at, block, out);
            write(out)?;
            self.at += block.len() as u64;
        }
        Ok(())
    }
}

impl Pieces<()> for XorPieces {
    fn take(
        &mut self,
        _: &Context<'_, ()>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        let taken = bytes.len().min(reply.room());
        self.answer(&bytes[..taken], |out| reply.write(out))?;
        Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
    }
}

/// What a doorbell server process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoorbellJob {
    path: PathBuf,
    policy: Policy,
    reactors: u32,
    cores: Vec<usize>,
    pinned: bool,
    connections: u32,
    sessions: u32,
    memory_budget: u64,
}

/// What a server has for itself at the start, bytes, rounded up.
const PRIVATE: u64 = 1_700_000;
/// What each session takes from the budget beside its segment, bytes.
const PRIVATE_PER_SESSION: u64 = 1536;
/// Sessions beyond which each adds to the budget, and what it adds, bytes.
const SESSIONS_COVERED: u64 = 100;
const PER_FURTHER_SESSION: u64 = 10 << 10;

/// The memory budget of the server, bytes: that which was asked for, else the default, raised if the sessions' base
/// slots do not fit into it.
pub fn memory_budget(options: &BenchOptions, reactors: usize) -> u64 {
    if let Some(bytes) = options.memory_budget {
        return bytes;
    }
    let most = options.connections.div_ceil(options.sessions) * options.in_flight;
    let config = client_config(most, options.size, options.probe, options.policy);
    let lanes = if options.policy == Policy::Handoff { config.lanes.min(reactors as u32).max(1) } else { 1 };
    let sessions = options.sessions as u64 + u64::from(options.probe_process);
    let each = base_bytes(&config, lanes) + PRIVATE_PER_SESSION;
    let spare = base_bytes(&ClientConfig::smallest(), 1) + PRIVATE_PER_SESSION;
    let further = sessions.saturating_sub(SESSIONS_COVERED) * PER_FURTHER_SESSION;
    let needed = (PRIVATE + sessions * each + u64::from(SPARE) * spare).saturating_sub(further);
    ServerConfig::default().memory_budget.max(needed)
}

/// Shared memory that exists as long as a session does, bytes.
fn base_bytes(config: &ClientConfig, lanes: u32) -> u64 {
    let geometry = Geometry {
        ring_order: config.ring_entries.trailing_zeros() as u8,
        large: config.large_slots,
        medium: config.medium_slots,
        small: config.small_slots.next_multiple_of(4),
        lease_pages: 0,
    };
    segment_len(&geometry, lanes) as u64
}

/// Pages that a session may lease to carry long bodies: the windows of two.
const LEASE_PAGES: u16 = 64;

/// A session for so many calls in flight, and a probe.
fn client_config(in_flight: usize, size: usize, probe: Option<usize>, policy: Policy) -> ClientConfig {
    let (probes, longest) = probe.map_or((0, 0), |size| (1, size));
    let config = if size > SLOT_MAX {
        // Small base slots: one names each body, a few carry what there is no lease for.
        let slots = (in_flight + 3).next_multiple_of(4).min(256) as u16;
        ClientConfig {
            ring_entries: (4 * in_flight + 8).next_power_of_two().clamp(16, 256) as u32,
            small_slots: slots,
            medium_slots: u16::from(longest > SLOT_SMALL && longest <= SLOT_MEDIUM),
            large_slots: u16::from(longest > SLOT_MEDIUM),
            lease_pages: LEASE_PAGES,
            ..ClientConfig::default()
        }
    } else {
        ClientConfig::for_load((in_flight + probes).clamp(1, 1008) as u32, size.max(longest))
    };
    ClientConfig { policy: wait_policy(policy), name: "bench".to_owned(), ..config }
}

fn wait_policy(policy: Policy) -> WaitPolicy {
    match policy {
        Policy::Handoff => WaitPolicy::Handoff,
        Policy::Spin => WaitPolicy::Spin,
        Policy::Block => WaitPolicy::Block,
    }
}

fn peer(doing: &'static str) -> impl FnOnce(IpcError) -> BenchError {
    move |error| BenchError::peer(doing, error)
}

/// Starts the server process, or finds the one that `--socket` names.
///
/// # Errors
///
/// [`BenchError`] if it does not start.
pub fn start_server(options: &BenchOptions, cpus: &Cpus) -> Result<Server, BenchError> {
    if let Some(path) = &options.socket {
        let endpoint = path.to_string_lossy().into_owned();
        return Ok(Server::with_counters(None, None, endpoint, counters(options, path.clone())));
    }
    let directory = ScratchDirectory::new()?;
    let job = DoorbellJob {
        path: directory.0.join("doorbell.sock"),
        policy: options.policy,
        reactors: cpus.reactors.count as u32,
        cores: cpus.reactors.cores.clone(),
        pinned: cpus.reactors.pinned,
        connections: options.connections as u32 + SPARE,
        sessions: options.sessions as u32 + SPARE,
        memory_budget: memory_budget(options, cpus.reactors.count),
    };
    // It inherits every core that this process may use, and pins nothing but its reactors.
    let mut process = child::spawn(Role::DoorbellServer, &job, Stdio::piped(), Stdio::piped())?;
    let () = process.receive()?;
    let endpoint = job.path.to_string_lossy().into_owned();
    let pid = process.pid();
    let mut counters = counters(options, job.path);
    let counters = move || {
        // Owned here, so that the directory goes with the server.
        let _keep = &directory;
        counters()
    };
    Ok(Server::with_counters(Some(process), Some(pid), endpoint, counters))
}

/// A directory of this user's alone, removed with everything in it.
struct ScratchDirectory(PathBuf);

impl ScratchDirectory {
    fn new() -> Result<Self, BenchError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("doorbell-bench-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|e| BenchError::os("mkdir", e))?;
        Ok(Self(path))
    }
}

impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("bench: {} could not be removed: {error}", self.0.display());
        }
    }
}

fn counters(options: &BenchOptions, path: PathBuf) -> Box<dyn FnMut() -> Counters> {
    if options.idle { Box::new(counters_while_idle(path)) } else { Box::new(counters_under_load(path)) }
}

/// Asks a server for its counters, over a session that exists for as long as that takes: a lane more would
/// be polled with the others.
fn counters_under_load(path: PathBuf) -> impl FnMut() -> Counters {
    move || reported(stats_once(&path), 0, 0)
}

/// Asks a server for its counters over a session that stays, so that between two questions nothing happens
/// but the second one: its wakeup is not counted. Connecting and hanging up would be a dozen.
fn counters_while_idle(path: PathBuf) -> impl FnMut() -> Counters {
    let mut session: Option<(IpcClient, ConnectionId)> = None;
    let mut asked = 0;
    move || {
        asked += 1;
        let connected = match session.take() {
            Some(connected) => Ok(connected),
            None => connect_for_counters(&path),
        };
        let stats = connected.and_then(|(client, id)| {
            let stats = stats(&client, id);
            session = Some((client, id));
            stats
        });
        reported(stats, asked, 1)
    }
}

/// Counters without what asking for them has added.
fn reported(stats: Result<serde_json::Value, BenchError>, wakeups: u64, connections: u64) -> Counters {
    let stats = match stats {
        Ok(stats) => stats,
        Err(error) => {
            eprintln!("bench: the server's counters could not be read: {error}");
            return Counters::default();
        }
    };
    let count = |name: &str, own: u64| stats[name].as_u64().map(|n| n.saturating_sub(own));
    Counters {
        wakeups: count("wakeups", wakeups),
        sweeps: count("sweeps", 0),
        syscalls: count("enters", 0),
        connections: count("connections_open", connections),
    }
}

fn stats_once(path: &Path) -> Result<serde_json::Value, BenchError> {
    let (client, id) = connect_for_counters(path)?;
    stats(&client, id)
}

fn connect_for_counters(path: &Path) -> Result<(IpcClient, ConnectionId), BenchError> {
    let client = IpcClient::connect(path).map_err(peer("connecting for the counters"))?;
    let id = client.open().map_err(peer("opening a connection for the counters"))?.detach();
    Ok((client, id))
}

fn stats(client: &IpcClient, id: ConnectionId) -> Result<serde_json::Value, BenchError> {
    let options = CallOptions { reply_capacity: 4096, ..CallOptions::default() };
    let json = client
        .attached(id)
        .call_with(MessageType::STATS, b"", &options, |reply| reply.to_vec())
        .and_then(|json| json)
        .map_err(peer("asking for the counters"))?;
    serde_json::from_slice(&json).map_err(|e| BenchError::peer("reading the counters", e))
}

/// The server process itself.
///
/// # Errors
///
/// Whatever keeps it from serving.
pub fn serve(job: &DoorbellJob) -> Result<(), BenchError> {
    let config = ServerConfig {
        // Who is silent here is silent on purpose.
        idle_timeout: None,
        policy: wait_policy(job.policy),
        reactors: job.reactors,
        cores: job.cores.clone(),
        pinned: job.pinned,
        max_connections: job.connections,
        max_sessions: job.sessions,
        max_half_open: job.sessions.min(128),
        memory_budget: job.memory_budget,
        ..ServerConfig::default()
    };
    let bound = IpcServer::new(&TABLE, ()).config(config).bind(&job.path).map_err(peer("binding"))?;
    worker::say(&())?;
    bound.serve().map_err(peer("serving"))?;
    Ok(())
}

/// Connects sessions.
#[derive(Debug)]
pub struct Connector {
    path: PathBuf,
    config: ClientConfig,
    /// Sessions that have said hello and not been waited for.
    begun: VecDeque<Connecting>,
    clients: Vec<IpcClient>,
    connections: Vec<(u32, ConnectionId)>,
    bulk: bool,
    /// Whether the first session has a connection for the probe, and which it is.
    probed: bool,
    probe: Option<ConnectionId>,
    shares_core: bool,
}

impl Connector {
    /// Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`BenchError::Peer`] if descriptors are short.
    pub fn new(job: &ClientJob) -> Result<Self, BenchError> {
        let most = job.sessions.iter().max().copied().unwrap_or(1) * job.shape.in_flight;
        let config = client_config(most, job.shape.size, job.shape.probe, job.policy);
        // A session of the client's is a socket and a segment.
        doorbell::config::raise_file_limit(2 * job.sessions.len() as u64).map_err(peer("raising limits"))?;
        let path = PathBuf::from(&job.endpoint);
        Ok(Self {
            path,
            config,
            begun: VecDeque::new(),
            clients: Vec::new(),
            connections: Vec::new(),
            bulk: job.bulk,
            probed: job.shape.probe.is_some(),
            probe: None,
            shares_core: job.shares_core,
        })
    }
}

impl worker::Connector for Connector {
    type Target = DoorbellTarget;

    fn begin(&mut self, sessions: usize) -> Result<(), BenchError> {
        let begin = |_| Connecting::begin(&self.path, &self.config).map_err(peer("connecting"));
        self.begun = (0..sessions).map(begin).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn connect(&mut self, index: usize, connections: usize) -> Result<(), BenchError> {
        let client = match self.begun.pop_front() {
            Some(begun) => begun.finish(),
            None => IpcClient::connect_with(&self.path, &self.config),
        };
        let client = client.map_err(peer("connecting"))?;
        let open = |bulk| {
            let connection = client.open_with(codec::RAW, bulk).map_err(peer("opening a connection"))?;
            Ok::<_, BenchError>(connection.detach())
        };
        if self.probed && index == 0 {
            self.probe = Some(open(false)?);
        }
        for _ in 0..connections {
            self.connections.push((index as u32, open(self.bulk)?));
        }
        self.clients.push(client);
        Ok(())
    }

    fn finish(self) -> Result<DoorbellTarget, BenchError> {
        let dirty = Vec::with_capacity(self.clients.len());
        let Self { clients, mut connections, probe, config, shares_core, .. } = self;
        // The probe's connection is the one behind those of the load.
        connections.extend(probe.map(|id| (0, id)));
        let policy = config.policy;
        let sleeps_on_several = policy != WaitPolicy::Spin && clients.len() > 1;
        let sockets = if sleeps_on_several { Some(watch_all(&clients)?) } else { None };
        let bodies = Vec::new();
        Ok(DoorbellTarget { clients, connections, bodies, dirty, cursor: 0, policy, shares_core, sockets })
    }
}

/// The sessions of one client process.
#[derive(Debug)]
pub struct DoorbellTarget {
    clients: Vec<IpcClient>,
    connections: Vec<(u32, ConnectionId)>,
    /// The call that each long body is, by tag, and its session.
    bodies: Vec<Option<(u32, CallId)>>,
    /// Sessions with something to flush, in the order of their first request.
    dirty: Vec<u32>,
    /// Session whose answers are taken next.
    cursor: usize,
    policy: WaitPolicy,
    shares_core: bool,
    /// The sockets of all sessions, where there are several to be waited for.
    sockets: Option<OwnedFd>,
}

/// An epoll instance that is readable when one of the clients' sockets is.
fn watch_all(clients: &[IpcClient]) -> Result<OwnedFd, BenchError> {
    let sockets =
        epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| BenchError::os("epoll_create", e))?;
    for client in clients {
        epoll::add(&sockets, client, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|e| BenchError::os("epoll_ctl", e))?;
    }
    Ok(sockets)
}

impl Target for DoorbellTarget {
    type Error = IpcError;

    #[inline(always)]
    fn try_send(&mut self, connection: usize, payload: &[u8], tag: u32) -> Result<bool, IpcError> {
        let (session, id) = self.connections[connection];
        let options = CallOptions { tag: tag.into(), ..CallOptions::default() };
        let submitted = self.clients[session as usize].attached(id).submit(WORK, payload, &options);
        match submitted {
            Ok(_) => {
                self.note_unflushed(session);
                Ok(true)
            }
            Err(IpcError::WouldBlock) => Ok(false),
            Err(error) => Err(error),
        }
    }

    #[inline(always)]
    fn flush(&mut self) -> Result<(), IpcError> {
        if self.policy == WaitPolicy::Spin {
            // The generator polls from here on, and polling flushes.
            self.dirty.clear();
            return Ok(());
        }
        for session in self.dirty.drain(..) {
            self.clients[session as usize].flush()?;
        }
        Ok(())
    }

    #[inline(always)]
    fn try_receive(&mut self, answer: &mut [u8]) -> Result<Option<Received>, IpcError> {
        for _ in 0..self.clients.len() {
            if let Some(taken) = self.clients[self.cursor].poll_into(answer)? {
                let ok = taken.status == Some(Status::Ok);
                return Ok(Some(Received { tag: taken.tag as u32, len: taken.len, ok }));
            }
            self.cursor += 1;
            if self.cursor == self.clients.len() {
                self.cursor = 0;
            }
        }
        Ok(None)
    }

    #[inline(always)]
    fn wait(&mut self, at_most_ns: u64) -> Result<(), IpcError> {
        if self.policy == WaitPolicy::Spin {
            // Spinning on the server's own core would only keep it from answering.
            if self.shares_core {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            return Ok(());
        }
        self.sleep(at_most_ns)
    }
}

impl LongTarget for DoorbellTarget {
    type Error = IpcError;

    fn try_start(&mut self, connection: usize, tag: u32, size: usize) -> Result<bool, IpcError> {
        let (session, id) = self.connections[connection];
        let options =
            CallOptions { tag: tag.into(), pieces: true, reply_capacity: size, ..CallOptions::default() };
        let tag = tag as usize;
        let started = self.clients[session as usize].attached(id).start(WORK, Some(size as u64), &options);
        match started {
            Ok(call) => {
                self.bodies.resize(self.bodies.len().max(tag + 1), None);
                self.bodies[tag] = Some((session, call));
                self.note_unflushed(session);
                Ok(true)
            }
            Err(IpcError::WouldBlock) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn try_send(&mut self, tag: u32, body: &Outgoing) -> Result<usize, IpcError> {
        let Some((session, call)) = self.bodies[tag as usize] else { return Ok(0) };
        let mut len = 0;
        let sent = self.clients[session as usize].send_with(call, |writer| {
            len = body.left().min(writer.remaining());
            body.write(len, |part| writer.write(part))
        });
        match sent {
            Ok(true) => {
                self.note_unflushed(session);
                Ok(len)
            }
            Ok(false) => Ok(0),
            // Refused before it was complete: its last frame says so.
            Err(IpcError::NoSuchCall) => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn try_receive(&mut self, frame: &mut [u8]) -> Result<Option<Frame>, IpcError> {
        for _ in 0..self.clients.len() {
            if let Some(reply) = self.clients[self.cursor].poll()? {
                let ok = reply.is_ok() && reply.len() <= frame.len();
                let len = if ok { reply.copy_to(frame)? } else { 0 };
                return Ok(Some(Frame { tag: reply.tag() as u32, len, ok, last: reply.is_last() }));
            }
            self.cursor = (self.cursor + 1) % self.clients.len();
        }
        Ok(None)
    }

    fn try_probe(&mut self, connection: usize, payload: &[u8], tag: u32) -> Result<bool, IpcError> {
        Target::try_send(self, connection, payload, tag)
    }

    fn flush(&mut self) -> Result<(), IpcError> {
        Target::flush(self)
    }

    fn wait(&mut self, at_most_ns: u64) -> Result<(), IpcError> {
        Target::wait(self, at_most_ns)
    }
}

impl DoorbellTarget {
    #[inline(always)]
    fn note_unflushed(&mut self, session: u32) {
        if self.dirty.last() != Some(&session) {
            self.dirty.push(session);
        }
    }

    /// Waits as the client does; for several sessions, on all their sockets at once.
    fn sleep(&mut self, at_most_ns: u64) -> Result<(), IpcError> {
        let Some(sockets) = &self.sockets else {
            self.clients[0].wait(Some(Duration::from_nanos(at_most_ns)))?;
            return Ok(());
        };
        let mut at_most = Duration::from_nanos(at_most_ns);
        for client in self.clients.iter().filter(|client| client.in_flight() > 0) {
            match client.prepare_to_sleep()? {
                Some(Duration::ZERO) => return Ok(()),
                Some(due) => at_most = at_most.min(due),
                None => {}
            }
        }
        // One that is ready is enough: the generator looks at all of them.
        let mut ready = [MaybeUninit::uninit()];
        match epoll::wait(sockets, &mut ready, Some(&timespec(at_most.as_nanos() as u64))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(IpcError::Io { call: "epoll_wait", source: e.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   a body is answered as in one go, wherever its pieces begin and end.
    /// Method: pieces of odd lengths, of a block and around it.
    #[test]
    fn words_go_on_across_pieces() {
        let mut request = vec![0; 5003];
        work::fill(work::nonce(3), &mut request);
        for piece in [1, 7, 8, 1023, 1024, 1025, 5003] {
            let (mut handler, mut reply) = (XorPieces::default(), Vec::new());
            for bytes in request.chunks(piece) {
                handler
                    .answer(bytes, |out| {
                        reply.extend_from_slice(out);
                        Ok(())
                    })
                    .unwrap();
            }
            assert!(work::check(work::nonce(3), &reply), "pieces of {piece}");
        }
    }

    #[test]
    fn base_slots_beyond_the_default_budget_raise_it_and_nothing_else_does() {
        use clap::Parser;
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            bench: BenchOptions,
        }
        let budget = |line: &str| {
            let options = Cli::parse_from(std::iter::once("bench").chain(line.split_whitespace())).bench;
            memory_budget(&options, 1)
        };
        for line in [
            "",
            "--size 1024 --connections 1000",
            "--size 1024 --connections 1000 --sessions 1000",
            "--size 1048576 --connections 100",
            "--size 1048576 --connections 100 --sessions 100 --probe 1024",
        ] {
            assert_eq!(budget(line), 3 << 20, "{line}");
        }
        assert!(budget("--size 4096 --connections 999") > (4 << 20) + 1_000_000);
        assert_eq!(budget("--size 4096 --connections 999 --memory-budget 9999999"), 9_999_999);
    }
}

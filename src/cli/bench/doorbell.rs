//! The peer `doorbell`: this transport, against a server process with the bench handler.

use super::child::{self, Role};
use super::clock::timespec;
use super::error::BenchError;
use super::load::{Received, Target};
use super::options::{BenchOptions, Policy};
use super::placement::Cpus;
use super::server::{Counters, Server};
use super::work;
use super::worker::{self, ClientJob};
use doorbell::{
    CallOptions, ClientConfig, Connecting, ConnectionId, Context, HandlerError, HandlerTable, IpcClient,
    IpcError, IpcServer, MessageType, Reply, ServerConfig, Status, WaitPolicy,
};
use doorbell_shm::entry::codec;
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

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(WORK, xor);

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
        policy: wait_policy(job.policy),
        reactors: job.reactors,
        cores: job.cores.clone(),
        pinned: job.pinned,
        max_connections: job.connections,
        max_sessions: job.sessions,
        max_half_open: job.sessions.min(128),
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
        let policy = wait_policy(job.policy);
        let most = job.sessions.iter().max().copied().unwrap_or(1) * job.shape.in_flight;
        let (probes, longest) = job.shape.probe.map_or((0, 0), |size| (1, size));
        let load = ClientConfig::for_load((most + probes).min(1008) as u32, job.shape.size.max(longest));
        let config = ClientConfig { policy, name: "bench".to_owned(), ..load };
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
        Ok(DoorbellTarget { clients, connections, dirty, cursor: 0, policy, shares_core, sockets })
    }
}

/// The sessions of one client process.
#[derive(Debug)]
pub struct DoorbellTarget {
    clients: Vec<IpcClient>,
    connections: Vec<(u32, ConnectionId)>,
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
        match self.clients[session as usize].attached(id).submit(WORK, payload, &options) {
            Ok(_) => {
                if self.dirty.last() != Some(&session) {
                    self.dirty.push(session);
                }
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

impl DoorbellTarget {
    /// Waits as the client does; for several sessions, on all their sockets at once.
    fn sleep(&mut self, at_most_ns: u64) -> Result<(), IpcError> {
        let Some(sockets) = &self.sockets else {
            self.clients[0].wait(Some(Duration::from_nanos(at_most_ns)))?;
            return Ok(());
        };
        for client in self.clients.iter().filter(|client| client.in_flight() > 0) {
            if client.prepare_to_wait()? {
                return Ok(());
            }
        }
        // One that is ready is enough: the generator looks at all of them.
        let mut ready = [MaybeUninit::uninit()];
        match epoll::wait(sockets, &mut ready, Some(&timespec(at_most_ns))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(IpcError::Io { call: "epoll_wait", source: e.into() }),
        }
    }
}

//! How soon clients are back after their server was killed: each in a session of its own, over several processes, with a
//! call in flight. Every answer is verified, and the next server counts what it executes: nothing twice, nothing lost.
//!
//! A round: the server is stopped, every client calls; the server is killed and started again on the same path; each
//! client's answer is timed from the moment when the new server listens.

use crate::clock::{SECOND, now_ns};
use crate::content::{self, Nonces, SIZE};
use crate::error::StressError;
use crate::level1::share;
use crate::processes::{self, Process, Role};
use crate::scratch::{self, Directory};
use clap::Args;
use doorbell::{
    CallOptions, ClientConfig, Context, HandlerError, HandlerTable, IpcClient, IpcServer, MessageType,
    Reconnect, ReconnectingClient, Reply, ServerConfig,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// The echo under a mask, counted.
const ECHO: MessageType = MessageType(300);
/// How many of those there have been.
const COUNT: MessageType = MessageType(301);
/// How long anything may take before it is said to hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a client's thread needs.
const STACK: usize = 256 << 10;
/// Sessions beside the clients': the one that asks for the count.
const OTHERS: u32 = 8;

/// What is to be measured.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ReconnectOptions {
    /// Clients, each with a session of its own.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=4000))]
    clients: u32,
    /// Processes that they are spread over.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    processes: u32,
    /// How often the server is killed.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// How long the server stays away each time, milliseconds.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    away_ms: u64,
    /// Judge: the last client is answered within so many milliseconds of the new server's listening.
    #[arg(long, default_value_t = 100.0)]
    goal_ms: f64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// What one round came to; times are milliseconds since the new server listened.
#[derive(Debug, Clone, Serialize)]
struct Round {
    /// From the kill until it listened.
    restart_ms: f64,
    first_ms: f64,
    p50_ms: f64,
    p99_ms: f64,
    last_ms: f64,
    wrong: u64,
    errors: u64,
    /// Calls that the new server executed, one a client if all is well.
    executed: u64,
}

/// What all rounds came to.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    clients: u32,
    processes: u32,
    goal_ms: f64,
    rounds: Vec<Round>,
    last_ms: f64,
    wrong: u64,
    errors: u64,
    /// Calls executed too often, or not at all.
    miscounted: u64,
    pub passed: bool,
}

impl Report {
    fn new(options: &ReconnectOptions, rounds: Vec<Round>) -> Self {
        let &ReconnectOptions { clients, processes, goal_ms, .. } = options;
        let last_ms = rounds.iter().map(|round| round.last_ms).fold(0.0, f64::max);
        let (wrong, errors) = rounds.iter().fold((0, 0), |(w, e), round| (w + round.wrong, e + round.errors));
        let miscounted = rounds.iter().map(|round| round.executed.abs_diff(clients.into())).sum();
        let passed = last_ms <= goal_ms && (wrong, errors, miscounted) == (0, 0, 0);
        Self { clients, processes, goal_ms, rounds, last_ms, wrong, errors, miscounted, passed }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clients, processes, goal_ms, last_ms, wrong, errors, miscounted, .. } = self;
        writeln!(f, "{clients} clients in {processes} processes, server killed {} times", self.rounds.len())?;
        writeln!(f, "ms since the new server listened:  first    p50    p99   last   (kill to listening)")?;
        for round in &self.rounds {
            let Round { restart_ms, first_ms, p50_ms, p99_ms, last_ms, .. } = round;
            writeln!(f, "{first_ms:40.1} {p50_ms:6.1} {p99_ms:6.1} {last_ms:6.1}   {restart_ms:.1}")?;
        }
        let verdict = if self.passed { "passed" } else { "FAILED" };
        writeln!(
            f,
            "{verdict}: the last of all after {last_ms:.1} ms (goal {goal_ms}), {wrong} wrong, {errors} errors, \
             {miscounted} executed twice or never"
        )
    }
}

/// Measures all rounds.
///
/// # Errors
///
/// [`StressError`] if a process cannot be started or hangs.
pub fn run(options: &ReconnectOptions, progress: impl Fn(&str)) -> Result<Report, StressError> {
    scratch::remove_on_signals()?;
    let directory = Directory::new("reconnect")?;
    let path = directory.path().join("s");
    let server_job = ServerJob { path: path.clone(), sessions: options.clients + OTHERS };
    let (mut server, _) = start_server(&server_job)?;
    let mut clients = Vec::new();
    for index in 0..options.processes as usize {
        let count = share(options.clients as usize, options.processes as usize, index);
        let job = ClientJob { path: path.clone(), clients: count, process: index as u64 };
        clients.push(processes::spawn(Role::ReconnectClient, &job, Stdio::piped())?);
    }
    for client in &mut clients {
        let () = client.receive(PATIENCE)?;
    }
    let mut rounds = Vec::new();
    for number in 1..=options.rounds {
        progress(&format!("reconnect: round {number} of {}", options.rounds));
        server.stop()?;
        for client in &mut clients {
            client.send(&())?;
        }
        for client in &mut clients {
            let () = client.receive(PATIENCE)?;
        }
        let killed = now_ns();
        // Killed and reaped.
        drop(server);
        std::thread::sleep(Duration::from_millis(options.away_ms));
        let listens;
        (server, listens) = start_server(&server_job)?;
        rounds.push(judge(&mut clients, &path, killed, listens)?);
    }
    for client in clients {
        client.end()?;
    }
    Ok(Report::new(options, rounds))
}

/// What the clients of all processes say of a round, and what the server has counted.
fn judge(clients: &mut [Process], path: &Path, killed: u64, listens: u64) -> Result<Round, StressError> {
    let (mut times, mut wrong, mut errors) = (Vec::new(), 0, 0);
    for client in clients {
        let answered: Answered = client.receive(PATIENCE)?;
        times.extend(answered.at_ns);
        wrong += answered.wrong;
        errors += answered.errors;
    }
    let ms = |at: u64| at.saturating_sub(listens) as f64 / (SECOND / 1000) as f64;
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len().max(1) - 1));
    let part = |percent| at(percent).map_or(f64::INFINITY, |at| ms(*at));
    Ok(Round {
        restart_ms: (listens - killed) as f64 / (SECOND / 1000) as f64,
        first_ms: part(0),
        p50_ms: part(50),
        p99_ms: part(99),
        last_ms: part(100),
        wrong,
        errors,
        executed: count(path)?,
    })
}

fn count(path: &Path) -> Result<u64, StressError> {
    let client = IpcClient::connect(path).map_err(StressError::ipc("connecting to ask for the count"))?;
    let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
    let answer = connection.call(COUNT, b"").map_err(StressError::ipc("asking for the count"))?;
    Ok(answer.first_chunk().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes)))
}

fn start_server(job: &ServerJob) -> Result<(Process, u64), StressError> {
    let mut server = processes::spawn(Role::ReconnectServer, job, Stdio::null())?;
    let listens = server.receive(PATIENCE)?;
    Ok((server, listens))
}

/// What the server's process is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct ServerJob {
    path: PathBuf,
    sessions: u32,
}

static TABLE: HandlerTable<AtomicU64> = HandlerTable::with_builtins().on(ECHO, echo).on(COUNT, counted);

fn echo(context: &Context<'_, AtomicU64>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    context.state().fetch_add(1, SeqCst);
    let mut answer = [0; SIZE];
    content::answer(request, &mut answer);
    reply.write(&answer)
}

fn counted(context: &Context<'_, AtomicU64>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&context.state().load(SeqCst).to_le_bytes())
}

/// The server's process itself: says since when it listens.
///
/// # Errors
///
/// Whatever keeps it from serving.
pub fn serve(job: &ServerJob) -> Result<(), StressError> {
    let config = ServerConfig {
        max_sessions: job.sessions,
        max_connections: job.sessions,
        max_half_open: job.sessions.min(ServerConfig::default().max_half_open),
        ..ServerConfig::default()
    };
    let server = IpcServer::new(&TABLE, AtomicU64::new(0)).config(config);
    let bound = server.bind(&job.path).map_err(StressError::ipc("binding"))?;
    processes::say(&now_ns())?;
    bound.serve().map_err(StressError::ipc("serving"))?;
    Ok(())
}

/// What a process of clients is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct ClientJob {
    path: PathBuf,
    clients: usize,
    process: u64,
}

/// What its clients found in a round.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Answered {
    /// When each had its answer.
    at_ns: Vec<u64>,
    wrong: u64,
    errors: u64,
}

/// What one client found.
enum Found {
    Connected,
    Right(u64),
    Wrong,
    Error(doorbell::IpcError),
}

/// A process of clients: says `()` when all are connected; then, for each `()` that it hears, says `()` when all have
/// called, and [`Answered`] when all have been answered.
///
/// # Errors
///
/// Whatever keeps a client from connecting.
pub fn call(job: &ClientJob) -> Result<(), StressError> {
    doorbell::config::raise_file_limit(3 * job.clients as u64).map_err(StressError::ipc("raising limits"))?;
    let calling: &'static AtomicUsize = Box::leak(Box::default());
    let (tell, told) = channel();
    let mut orders: Vec<Sender<()>> = Vec::new();
    for index in 0..job.clients {
        let (order, ordered) = channel();
        let (path, tell) = (job.path.clone(), tell.clone());
        let nonces = Nonces::new(job.process, index as u64);
        std::thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || one_client(&path, nonces, calling, &ordered, &tell))
            .map_err(|e| StressError::os("starting a thread", e))?;
        orders.push(order);
    }
    for _ in 0..job.clients {
        if let Found::Error(source) = next(&told)? {
            return Err(StressError::Ipc { doing: "connecting", source });
        }
    }
    processes::say(&())?;
    while let Some(()) = processes::hear()? {
        calling.store(0, SeqCst);
        // Whoever has ended says so by not answering.
        for order in &orders {
            order.send(()).ok();
        }
        while calling.load(SeqCst) < job.clients {
            std::thread::sleep(Duration::from_millis(1));
        }
        processes::say(&())?;
        let mut answered = Answered::default();
        for _ in 0..job.clients {
            match next(&told)? {
                Found::Right(at_ns) => answered.at_ns.push(at_ns),
                Found::Wrong | Found::Connected => answered.wrong += 1,
                Found::Error(error) => {
                    eprintln!("doorbell-stress: {error}");
                    answered.errors += 1;
                }
            }
        }
        processes::say(&answered)?;
    }
    Ok(())
}

fn next(told: &Receiver<Found>) -> Result<Found, StressError> {
    let silent = |_| StressError::Silent { role: "client's thread", seconds: PATIENCE.as_secs() };
    told.recv_timeout(PATIENCE).map_err(silent)
}

/// One client: one call for each order.
fn one_client(
    path: &Path,
    mut nonces: Nonces,
    calling: &AtomicUsize,
    ordered: &Receiver<()>,
    tell: &Sender<Found>,
) {
    let config = ClientConfig::smallest();
    let connected = ReconnectingClient::connect_with(path, &config, Reconnect::default());
    let say = |found| {
        // Nobody listens any more where the process ends.
        tell.send(found).ok();
    };
    let client = match connected {
        Ok(client) => client,
        Err(error) => return say(Found::Error(error)),
    };
    let connection = match client.open() {
        Ok(connection) => connection,
        Err(error) => return say(Found::Error(error)),
    };
    say(Found::Connected);
    let options = CallOptions { timeout: Some(PATIENCE / 2), ..CallOptions::default() };
    while ordered.recv().is_ok() {
        let nonce = nonces.draw();
        let mut request = [0; SIZE];
        content::fill(nonce, &mut request);
        calling.fetch_add(1, SeqCst);
        let answer = connection.call_with(ECHO, &request, &options);
        let at_ns = now_ns();
        say(match answer {
            Ok(answer) if answer.first_chunk().is_some_and(|a| content::is_right(nonce, a)) => {
                Found::Right(at_ns)
            }
            Ok(_) => Found::Wrong,
            Err(error) => Found::Error(error),
        });
    }
}

//! `doorbell-stress kills`: clients killed at random moments of their lives, some of them stopped before, while a bystander
//! calls on (FAULTS T8). A run can be cut into pieces: what has been done is kept in a file, and added to.
//!
//! After each batch the server has to be the same process (I1), without a descriptor, a mapping or a session more than before
//! (I2, I8), its private memory what it was (I11), and the bystander has to have been answered right, never later than it may
//! be (I1, I6). The server notes what it executes, and a victim each call that was answered: none may be executed twice (I3),
//! none answered that was not executed (I4), no answer may be another call's (I7). What only a client says who lives on, that
//! a call was not executed (I5), is for those of `points/`, whose server dies.

use crate::clock::now_ns;
use crate::content::{self, mix};
use crate::error::StressError;
use crate::kept;
use crate::machine::{self, Cores};
use crate::points::ledger::{
    LOGGED, LedgerJob, Log, Numbers, VICTIMS, VictimsLedger, WRONG, is_right, request,
};
use crate::processes::{self, Process, Role};
use crate::scratch::Directory;
use crate::server::MASKED_ECHO;
use clap::Args;
use doorbell::{CallOptions, ClientConfig, IpcClient, IpcError, WaitPolicy};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Clients that live and die at the same time.
const BATCH: u64 = 8;
/// The longest life of a client. Starting one takes a millisecond or two, so many die before they have connected.
const LIFE_NS: u64 = 12_000_000;
/// How long a stopped client stands still before it is killed.
const STOPPED: Duration = Duration::from_millis(1);
/// How long the server may take to be as it was.
const SETTLED: Duration = Duration::from_secs(10);
/// Batches before what the server holds is taken for what it has to hold.
const WARM_UP: u64 = 4;
/// Batches between two looks at the bystander, and two times that the counts are kept.
const BATCHES_PER_LOOK: u64 = 16;
/// What the private memory of the server may differ by, bytes (I11).
const MEMORY_DIFFERS: u64 = 64 << 10;
/// The longest that the bystander may wait for an answer, twice: the server's heartbeat (I1), and as long again for a
/// machine that starts processes all the time.
const HEARTBEAT_NS: u64 = 200_000_000;
/// How long a process may take to say what it has to.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Clone, Args)]
pub struct KillsOptions {
    /// Kills in all, those of earlier pieces of the run included.
    #[arg(long)]
    count: u64,
    /// Where the counts are kept; a run with the same file goes on where the last one has stopped.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Seed of all random moments; that of the file, or random, unless given.
    #[arg(long)]
    seed: Option<u64>,
}

/// What has been done, and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Clients killed.
    pub kills: u64,
    /// Those among them that had been stopped before.
    pub stopped: u64,
    /// Those that had connected by then.
    pub connected: u64,
    /// Calls of victims that were answered right.
    #[serde(default)]
    pub answered: u64,
    /// Calls of the bystander that were answered right.
    pub bystander_calls: u64,
    /// Calls that were not.
    pub bystander_errors: u64,
    /// Its longest call, ns.
    pub bystander_max_ns: u64,
    /// What was otherwise than it has to be, in words.
    pub violations: Vec<String>,
    /// Where the random moments come from.
    pub seed: u64,
}

impl Counts {
    fn load(options: &KillsOptions, random: u64) -> Result<Self, StressError> {
        let kept: Option<Self> = kept::load(options.state.as_deref())?;
        let mut counts = kept.unwrap_or_else(|| Self { seed: random, ..Self::default() });
        counts.seed = options.seed.unwrap_or(counts.seed);
        Ok(counts)
    }
}

/// What a process of this level is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KillsJob {
    /// Where the server listens.
    path: PathBuf,
    /// Where victims note what was answered.
    answered: PathBuf,
    /// The core to run on.
    core: usize,
    /// What to do: which policy, which sizes.
    number: u64,
}

impl KillsJob {
    /// That of a client that is to be killed.
    pub fn victim(path: &Path, answered: &Path, core: usize, number: u64) -> Self {
        Self { path: path.to_owned(), answered: answered.to_owned(), core, number }
    }

    /// That of a bystander.
    pub fn bystander(path: &Path, core: usize) -> Self {
        Self { path: path.to_owned(), answered: PathBuf::new(), core, number: 0 }
    }
}

/// Runs it.
///
/// # Errors
///
/// [`StressError`] if a process cannot be started; what was found wrong is in the counts.
pub fn run(options: &KillsOptions, cores: &Cores, random: u64) -> Result<Counts, StressError> {
    let mut counts = Counts::load(options, random)?;
    let directory = Directory::new("kills")?;
    let path = directory.path().join("s");
    let (log, answered) = (directory.path().join("log"), directory.path().join("answered"));
    let core = cores.clients[0];
    let job = LedgerJob { path: path.clone(), log: log.clone(), cores: vec![cores.server, core] };
    let mut server = processes::spawn(Role::LedgerServer, &job, Stdio::null())?;
    let () = server.receive(PATIENCE)?;
    let mut ledger = VictimsLedger::new(&log, &answered);
    let job = KillsJob { answered, ..KillsJob::bystander(&path, core) };
    let mut bystander = processes::spawn(Role::Watcher, &job, Stdio::piped())?;
    let () = bystander.receive(PATIENCE)?;
    let mut baseline = None;
    let mut batch = 0;
    while counts.kills < options.count && counts.violations.is_empty() {
        kill_batch(&job, &mut counts, options.count)?;
        batch += 1;
        if let Some(how) = server.has_ended() {
            counts.violations.push(format!("I1: the server ended: {how}"));
            break;
        }
        match baseline {
            None if batch == WARM_UP => baseline = Some(settled(&server, None, OTHERS)?.0),
            None => {}
            Some(before) => {
                if let (_, Some(wrong)) = settled(&server, Some(before), OTHERS)? {
                    counts.violations.push(format!("after {} kills: {wrong}", counts.kills));
                }
            }
        }
        if batch.is_multiple_of(BATCHES_PER_LOOK) {
            compare(&server, &mut ledger, &mut counts)?;
            look(&mut bystander, &mut counts)?;
            kept::keep(options.state.as_deref(), &counts)?;
        }
    }
    if counts.violations.is_empty() || server.has_ended().is_none() {
        compare(&server, &mut ledger, &mut counts)?;
        look(&mut bystander, &mut counts)?;
        bystander.end()?;
    }
    kept::keep(options.state.as_deref(), &counts)?;
    Ok(counts)
}

/// Starts some clients, and kills each at a moment of its own.
fn kill_batch(job: &KillsJob, counts: &mut Counts, most: u64) -> Result<(), StressError> {
    let begun_ns = now_ns();
    let mut victims = Vec::new();
    for _ in 0..BATCH.min(most - counts.kills) {
        let number = counts.kills + victims.len() as u64;
        let job = KillsJob { number, ..job.clone() };
        let dice = mix(counts.seed ^ number);
        victims.push((
            begun_ns + dice % LIFE_NS,
            dice >> 62 == 0,
            processes::spawn(Role::Victim, &job, Stdio::null())?,
        ));
    }
    victims.sort_by_key(|victim| victim.0);
    for (at_ns, stops, mut victim) in victims {
        crate::clock::sleep_until(at_ns);
        if stops {
            victim.signal(Signal::STOP)?;
            std::thread::sleep(STOPPED);
            counts.stopped += 1;
        }
        counts.connected += u64::from(victim.has_said_something()?);
        if let Some(how) = victim.has_ended() {
            counts.violations.push(format!("I6: victim {} of them ended by itself: {how}", counts.kills));
        }
        victim.signal(Signal::KILL)?;
        counts.kills += 1;
    }
    Ok(())
}

/// Sessions that stay: the bystander's.
pub const OTHERS: usize = 1;

/// When the server has done with all victims: what they noted against what was executed.
fn compare(server: &Process, ledger: &mut VictimsLedger, counts: &mut Counts) -> Result<(), StressError> {
    if let (_, Some(wrong)) = settled(server, None, OTHERS)? {
        counts.violations.push(format!("after {} kills: {wrong}", counts.kills));
    }
    let (answered, violations) = ledger.compare()?;
    counts.answered += answered;
    counts.violations.extend(violations);
    Ok(())
}

/// What a process holds: descriptors and segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Open descriptors.
    pub descriptors: usize,
    /// Mapped segments.
    pub segments: usize,
    /// Private memory that is resident, bytes.
    pub anonymous: u64,
}

impl Held {
    /// The same where private memory may grow.
    pub fn without_memory(self) -> Self {
        Self { anonymous: u64::MAX - MEMORY_DIFFERS, ..self }
    }

    /// The same with the private memory that there was then.
    pub fn with_memory_of(self, then: Self) -> Self {
        Self { anonymous: then.anonymous, ..self }
    }
}

/// Waits until the process holds no more than `before`, or, without that, no more than `others` segments; says what is wrong
/// if it goes on holding more.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be looked at.
pub fn settled(
    process: &Process,
    before: Option<Held>,
    others: usize,
) -> Result<(Held, Option<String>), StressError> {
    let give_up = Instant::now() + SETTLED;
    loop {
        let now = held(process.pid())?;
        let goal = before.unwrap_or(Held { segments: others, ..now });
        let fits = now.descriptors <= goal.descriptors && now.segments <= goal.segments;
        if fits && now.anonymous <= goal.anonymous + MEMORY_DIFFERS {
            return Ok((now, None));
        }
        if Instant::now() >= give_up {
            return Ok((now, Some(format!("I2, I8, I11: {now:?} is held, {goal:?} was"))));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What a process holds now.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be looked at.
pub fn held(pid: u32) -> Result<Held, StressError> {
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/{pid}/{name}"))
            .map_err(|source| StressError::Os { call: "reading /proc", source })
    };
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|source| StressError::Os { call: "reading /proc", source })?
        .count();
    let segments = read("maps")?.lines().filter(|line| line.contains("memfd:doorbell-session")).count();
    let status = read("status")?;
    let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = anonymous.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    Ok(Held { descriptors, segments, anonymous: kib << 10 })
}

fn look(bystander: &mut Process, counts: &mut Counts) -> Result<(), StressError> {
    bystander.send(&())?;
    let seen: Watched = bystander.receive(PATIENCE)?;
    counts.bystander_calls += seen.calls;
    counts.bystander_errors += seen.errors;
    counts.bystander_max_ns = counts.bystander_max_ns.max(seen.max_ns);
    if seen.errors > 0 {
        counts.violations.push(format!("I6: {} calls of the bystander failed", seen.errors));
    }
    if seen.max_ns > HEARTBEAT_NS {
        counts.violations.push(format!("I1: the bystander waited {} ns", seen.max_ns));
    }
    Ok(())
}

/// What the bystander has seen since it was last asked.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Watched {
    /// Calls that were answered right.
    pub calls: u64,
    /// Calls that were not.
    pub errors: u64,
    /// The longest, ns.
    pub max_ns: u64,
}

/// The bystander: calls now and then, and says when asked what came of it.
///
/// # Errors
///
/// Whatever keeps it from connecting.
pub fn watch(job: &KillsJob) -> Result<(), StressError> {
    let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
    let client = IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))?;
    let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
    processes::say(&())?;
    let (ask, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Ends with the parent's pipe.
        while let Ok(Some(())) = processes::hear() {
            if ask.send(()).is_err() {
                break;
            }
        }
    });
    let (mut watched, mut number) = (Watched::default(), 0u64);
    loop {
        match asked.recv_timeout(Duration::from_millis(1)) {
            Ok(()) => processes::say(&std::mem::take(&mut watched))?,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(()),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        number += 1;
        let request: [u8; 512] = std::array::from_fn(|i| (number >> (8 * (i % 8))) as u8);
        let mut expected = [0; 512];
        content::answer(&request, &mut expected);
        let began_ns = now_ns();
        match connection.call(MASKED_ECHO, &request) {
            Ok(answer) if answer == expected => watched.calls += 1,
            Ok(_) | Err(_) => watched.errors += 1,
        }
        watched.max_ns = watched.max_ns.max(now_ns() - began_ns);
    }
}

/// A client that is to be killed: whatever a client does, until then.
///
/// # Errors
///
/// Whatever keeps it from connecting.
pub fn be_killed(job: &KillsJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let dice = mix(job.number);
    let policy = [WaitPolicy::Handoff, WaitPolicy::Spin, WaitPolicy::Block][(dice % 3) as usize];
    let config = ClientConfig { policy, lanes: 1 + (dice >> 8) as u32 % 2, ..ClientConfig::default() };
    let client = IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))?;
    processes::say(&())?;
    let log = Log::open(&job.answered)?;
    let mut numbers = Numbers::of(VICTIMS + job.number);
    let sizes = [512usize, 1024, 16 << 10, 200 << 10];
    // By the number, so that whoever has the answer knows how long it has to be.
    let size_of = |tag: u64| sizes[(mix(dice ^ tag) % 4) as usize];
    for round in 0.. {
        let connection = match client.open() {
            Ok(connection) => connection,
            // Its slots are taken by answers that it has not looked at.
            Err(IpcError::WouldBlock) => {
                client.poll().map_err(StressError::ipc("taking an answer"))?;
                continue;
            }
            Err(error) => {
                eprintln!("victim {} round {round}: {error}; {:?}", job.number, client.open().err());
                return Err(StressError::ipc("opening a connection")(error));
            }
        };
        for call in 0..8u64 {
            let tag = numbers.draw(false);
            let options = CallOptions { tag, ..CallOptions::default() };
            // Full queues are part of it, and so are answers that nobody takes.
            match connection.submit(LOGGED, &request(tag, size_of(tag)), &options) {
                Ok(id) if call % 3 == 0 => client.cancel(id),
                Ok(_) | Err(_) => {}
            }
        }
        while client.wait(Some(Duration::from_millis(1))).unwrap_or(false) {
            let Ok(Some(reply)) = client.poll() else { break };
            // What was cancelled, or lost its memory while this client was stopped, has no answer.
            let Ok(answer) = reply.result().and_then(|_| reply.to_vec()) else { continue };
            let right = is_right(&request(reply.tag(), size_of(reply.tag())), &answer);
            let noted = log.note(if right { reply.tag() } else { WRONG });
            noted.map_err(|e| StressError::os("write of a log", e))?;
        }
    }
    Ok(())
}

/// The result in lines.
impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kills, stopped, connected, bystander_calls, bystander_errors, bystander_max_ns, .. } =
            self;
        writeln!(f, "kills: {kills}, of clients that had connected {connected}, stopped before {stopped}")?;
        writeln!(f, "calls of theirs that were answered: {}", self.answered)?;
        writeln!(
            f,
            "bystander: {bystander_calls} calls, {bystander_errors} wrong, longest {bystander_max_ns} ns"
        )?;
        writeln!(f, "seed: {}", self.seed)?;
        self.violations.iter().try_for_each(|violation| writeln!(f, "VIOLATION {violation}"))?;
        writeln!(f, "{}", if self.violations.is_empty() { "passed" } else { "FAILED" })
    }
}

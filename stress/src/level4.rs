//! Level 4, leak detection: cycles of 100 to 500 connections, each with a hundred completions, chats and analyses of files;
//! after each cycle all of them are gone, and nothing may be left of them: no memory, no descriptor, no thread, no session.
//!
//! What is compared is the footprint (resident set, and shared pages that are not in it) with that after one cycle of the
//! largest kind, which touches all code and memory that a cycle needs.

use crate::assistant::{self, AssistantJob, KINDS};
use crate::clock::{SECOND, now_ns};
use crate::content::Nonces;
use crate::error::StressError;
use crate::level1;
use crate::load::Outcome;
use crate::machine::Cores;
use crate::memory::{Peak, Sampler, Segments};
use crate::monitor::{Counters, Monitor};
use crate::processes::Process;
use crate::report::{self, Check, Row, grouped, mib};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use serde::Serialize;
use std::time::Duration;

/// This level's number.
pub const LEVEL: u32 = 4;
/// Cycles with `--full` and `--short`.
pub const FULL: u64 = 120;
/// See [`FULL`].
pub const SHORT: u64 = 6;
/// Connections of a cycle.
const CONNECTIONS: std::ops::RangeInclusive<usize> = 100..=500;
/// Calls of each kind on each connection.
const ROUNDS: u64 = 100;
/// Sessions of a cycle, all of one client process.
const SESSIONS: usize = 4;
/// How much more there may be during a cycle, bytes (R5.4).
const GROWTH_DURING: u64 = 512 << 10;
/// And after the last (R5.4).
const GROWTH_AFTER: u64 = 256 << 10;
/// How long the server has to itself before its memory is looked at.
const REST: Duration = Duration::from_secs(1);
/// The same between cycles: until the sessions are gone, at most.
const GONE: Duration = Duration::from_secs(10);
/// How long a cycle may take.
const STEP: Duration = Duration::from_secs(600);

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Cycles, beside the one that warms up.
    pub cycles: u64,
    /// Seed of every content and of the numbers of connections.
    pub seed: u64,
    /// Thousandths of the connections and rounds.
    pub size: usize,
}

/// Runs the row.
///
/// # Errors
///
/// [`StressError`] if it could not be run to its end.
pub fn run(plan: &Plan, cores: &Cores, progress: impl Fn(&str)) -> Result<Vec<Row>, StressError> {
    let directory = Directory::new("leaks")?;
    assistant::write_files(directory.path())?;
    let most = (CONNECTIONS.end() * plan.size / 1000).max(SESSIONS);
    let job = ServerJob {
        path: directory.path().join("s"),
        core: cores.server,
        // The monitor has one of each; a cycle's sessions may be ending while the next one's begin.
        connections: 2 * most as u32 + 1,
        sessions: 2 * SESSIONS as u32 + 1,
        files: Some(directory.path().to_owned()),
        ..ServerJob::default()
    };
    let server = server::start(&job)?;
    let monitor = Monitor::connect(&job.path)?;
    let mut leaks =
        Leaks { plan, cores, server, monitor, job, outcome: Outcome::default(), during: Peak::default() };
    let begun = now_ns();
    progress(&format!("level {LEVEL}: the cycle that warms up, {most} connections"));
    let mut calls = leaks.cycle(0, most)?;
    leaks.during = Peak::default();
    let before = leaks.rest()?;
    let mut sizes = Nonces::new(plan.seed, u64::from(u16::MAX));
    for cycle in 1..=plan.cycles {
        let span = CONNECTIONS.end() - CONNECTIONS.start() + 1;
        let connections = CONNECTIONS.start() + sizes.draw() as usize % span;
        let connections = (connections * plan.size / 1000).max(SESSIONS);
        progress(&format!("level {LEVEL}: cycle {cycle} of {}, {connections} connections", plan.cycles));
        calls += leaks.cycle(cycle, connections)?;
    }
    let after = leaks.rest()?;
    let seconds = (now_ns() - begun) as f64 / SECOND as f64;
    Ok(vec![leaks.row(calls, &before, &after, seconds)])
}

/// What a server has when it rests.
#[derive(Debug, Clone, Default)]
struct Holdings {
    memory: Peak,
    descriptors: u64,
    threads: u64,
    counters: Counters,
}

struct Leaks<'a> {
    plan: &'a Plan,
    cores: &'a Cores,
    monitor: Monitor,
    server: Process,
    job: ServerJob,
    outcome: Outcome,
    /// The highest of all cycles.
    during: Peak,
}

impl Leaks<'_> {
    /// One cycle, from the start of its process until its sessions are gone; returns the calls that it had to make.
    fn cycle(&mut self, number: u64, connections: usize) -> Result<u64, StressError> {
        let rounds = (ROUNDS * self.plan.size as u64 / 1000).max(1);
        let client = assistant::start(&AssistantJob {
            path: self.job.path.clone(),
            core: self.cores.client(0),
            sessions: SESSIONS,
            connections,
            rounds,
            files: self.job.files.clone().unwrap_or_default(),
            seed: self.plan.seed,
            number,
        })?;
        let mut clients = [client];
        level1::connect(&mut clients)?;
        let [mut client] = clients;
        let pids = [client.pid(), std::process::id()];
        let sampler = Sampler::start(self.server.pid(), Segments::of(&pids, SESSIONS + 1)?);
        client.send(&())?;
        let outcome: Outcome = client.receive(STEP)?;
        let peak = sampler.stop()?;
        self.during = highest(self.during, peak);
        self.outcome.alive += outcome.alive;
        self.outcome.answered_in_all += outcome.answered_in_all;
        self.outcome.add(Outcome { alive: 0, answered_in_all: 0, answered: 0, ..outcome });
        client.end()?;
        self.until_gone()?;
        Ok(connections as u64 * rounds * KINDS)
    }

    /// Waits until the monitor is alone.
    fn until_gone(&self) -> Result<(), StressError> {
        let until = now_ns() + GONE.as_nanos() as u64;
        while now_ns() < until {
            if self.monitor.count()?.connections_open == 1 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Those that are left are counted at the end.
        Ok(())
    }

    fn rest(&self) -> Result<Holdings, StressError> {
        std::thread::sleep(REST);
        let counters = self.monitor.count()?;
        let pid = self.server.pid();
        let memory = Sampler::start(pid, Segments::of(&[std::process::id()], 1)?).stop()?;
        let (descriptors, threads) = (entries(pid, "fd")?, entries(pid, "task")?);
        Ok(Holdings { memory, descriptors, threads, counters })
    }

    fn row(mut self, calls: u64, before: &Holdings, after: &Holdings, seconds: f64) -> Row {
        let alive = self.server.has_ended().is_none();
        let outcome = self.outcome;
        let start = before.memory.footprint_bytes;
        let during = self.during.footprint_bytes.saturating_sub(start);
        let left = after.memory.footprint_bytes.saturating_sub(start);
        let judged = !cfg!(debug_assertions);
        let limit = |bytes: u64| judged.then_some(bytes - 1);
        let counted = after.counters.calls_ok;
        let checks = vec![
            Check::exactly("calls answered rightly", calls, outcome.answered_in_all),
            Check::exactly("answers with wrong content", 0, outcome.wrong),
            Check::exactly("errors", 0, outcome.errors),
            Check::exactly("requests never answered", 0, outcome.lost),
            Check::exactly("answers in all, counted by the server", outcome.answered_in_all, counted),
            Check::at_most("growth during the cycles, bytes", limit(GROWTH_DURING), during),
            Check::at_most("growth after them, bytes", limit(GROWTH_AFTER), left),
            Check::exactly("descriptors of the server", before.descriptors, after.descriptors),
            Check::exactly("threads of the server", before.threads, after.threads),
            Check::exactly("connections left", 1, after.counters.connections_open),
            Check::exactly(
                "sessions that ended",
                SESSIONS as u64 * (self.plan.cycles + 1),
                after.counters.sessions_ended,
            ),
            Check::exactly("answers from elsewhere left", 0, after.counters.deferred_live),
            Check::exactly("bytes leased after", 0, after.counters.leased_bytes),
            Check::exactly("server alive at the end", 1, alive.into()),
            Check::reported("footprint before, during, after", {
                let [a, b, c] = [start, self.during.footprint_bytes, after.memory.footprint_bytes].map(mib);
                format!("{a}, {b}, {c}")
            }),
            Check::reported("calls per second", grouped((calls as f64 / seconds) as u64)),
            Check::reported("calls sent again or that waited", grouped(outcome.waited)),
        ];
        let figures = Figures {
            cycles: self.plan.cycles,
            calls,
            footprint_before: start,
            footprint_during: self.during.footprint_bytes,
            footprint_after: after.memory.footprint_bytes,
            growth_during: during,
            growth_after: left,
            descriptors: [before.descriptors, after.descriptors],
            threads: [before.threads, after.threads],
        };
        Row {
            level: LEVEL,
            row: "completions, chats, files",
            connections: CONNECTIONS.end() * self.plan.size / 1000,
            sessions: SESSIONS + 1,
            client_processes: self.plan.cycles as usize + 1,
            seconds,
            wrong: outcome.wrong,
            errors: outcome.errors,
            lost: outcome.lost,
            memory: self.during,
            figures: report::Figures::Leaks(figures),
            notes: outcome.notes,
            checks,
        }
    }
}

/// How many entries a directory of the process has in `/proc`.
fn entries(pid: u32, what: &str) -> Result<u64, StressError> {
    let all = std::fs::read_dir(format!("/proc/{pid}/{what}"));
    Ok(all.map_err(|e| StressError::os("reading /proc", e))?.count() as u64)
}

fn highest(a: Peak, b: Peak) -> Peak {
    Peak {
        rss_bytes: a.rss_bytes.max(b.rss_bytes),
        shared_bytes: a.shared_bytes.max(b.shared_bytes),
        footprint_bytes: a.footprint_bytes.max(b.footprint_bytes),
        page_tables_bytes: a.page_tables_bytes.max(b.page_tables_bytes),
        samples: a.samples + b.samples,
        samples_per_second: b.samples_per_second,
    }
}

/// What rows of this level have beside what all have.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Figures {
    pub cycles: u64,
    pub calls: u64,
    pub footprint_before: u64,
    pub footprint_during: u64,
    pub footprint_after: u64,
    pub growth_during: u64,
    pub growth_after: u64,
    /// Of the server, before and after.
    pub descriptors: [u64; 2],
    pub threads: [u64; 2],
}

//! `doorbell-stress kill-points`: every labelled point of client and server, suffered by real processes, as often as asked
//! for (FAULTS T9, R3.3, R3.4). A run can be cut into pieces: what has been done is kept in a file, and added to.
//!
//! The process that comes by its point raises SIGKILL at itself, or SIGSTOP; stopped ones are killed or continued. Clients
//! die beside one that is never touched, servers under clients that go on. What must hold afterwards:
//!
//! | invariant | after clients | after servers |
//! | --- | --- | --- |
//! | I1, I6 | the server is the same process, the bystander was answered right and in time | |
//! | I2, I8 | descriptors, mappings, sessions, connections, leases, calls under way, memory budget are what they were | those of the clients, and of the next server |
//! | I3, I4, I5 | no call twice, none that was answered never | the same, and none that is said not to have been executed was |
//! | I7 | every answer is its own call's, every byte of it | the same |
//! | I11 | private memory is what it was | |

mod clients;
pub mod driver;
pub mod ledger;
mod servers;
pub mod victim;

use crate::content::mix;
use crate::error::StressError;
use crate::kept;
use crate::machine::Cores;
use clap::{Args, ValueEnum};
use doorbell_shm::kill;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long a point may take to be reached, and a process to say what it has to.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest occurrence of a point that is asked for: sometimes its first, sometimes a later one.
const OCCURRENCES: u64 = 4;

/// What to do.
#[derive(Debug, Clone, Args)]
pub struct PointsOptions {
    /// How often each point is suffered with each signal, earlier pieces of the run included.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: u64,
    /// Only this point; may be given several times.
    #[arg(long = "point", value_name = "LABEL", value_parser = parse_label)]
    points: Vec<String>,
    /// What the process raises at itself.
    #[arg(long, value_enum, default_value_t = Signals::Both)]
    signal: Signals,
    /// Where the counts are kept; a run with the same file goes on where the last one has stopped.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Seed of all moments; that of the file, or random, unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// The longest that the bystander may wait for an answer, ms.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    patience_ms: u64,
}

/// Which signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Signals {
    /// SIGKILL.
    Kill,
    /// SIGSTOP; the parent kills or continues.
    Stop,
    /// One after the other.
    Both,
}

fn parse_label(text: &str) -> Result<String, String> {
    if kill::is_listed(text) {
        return Ok(text.to_owned());
    }
    let labels: Vec<_> = kill::POINTS.iter().map(|point| point.0).collect();
    Err(format!("there is no such point: {}", labels.join(", ")))
}

/// What a process raises at itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Raised {
    Kill,
    Stop,
}

impl Raised {
    /// As the environment names it.
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "KILL",
            Self::Stop => "STOP",
        }
    }
}

/// What happens to a process that has stopped itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// It is killed so long later.
    Killed(Duration),
    /// It is continued so long later.
    Continued(Duration),
}

/// Memory of a client that stands still is taken back after 100 ms, if others wait for it.
const LONG_STOP: Duration = Duration::from_millis(150);

impl After {
    fn by(dice: u64) -> Self {
        let soon = Duration::from_micros(dice >> 8 & 0x7ff);
        let pause = if (dice >> 20).is_multiple_of(64) { LONG_STOP } else { soon };
        if dice.is_multiple_of(2) { Self::Killed(pause) } else { Self::Continued(pause) }
    }
}

/// One process that is to come by one point.
#[derive(Debug, Clone, Copy)]
struct Item {
    label: &'static str,
    raised: Raised,
    /// Which one of the run, over all pieces.
    number: u64,
    dice: u64,
}

impl Item {
    /// What arms the point.
    fn environment(&self, most: u64) -> (&'static str, String) {
        let occurrence = 1 + (self.dice >> 40) % most;
        (kill::VARIABLE, format!("{}:{occurrence}:{}", self.label, self.raised.name()))
    }
}

/// What has been done with one point.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Processes that killed themselves there.
    pub killed: u64,
    /// That stopped themselves there and were killed.
    pub stopped: u64,
    /// That stopped themselves there and were continued.
    pub continued: u64,
    /// That did not come by.
    pub missed: u64,
}

impl Tally {
    fn done(&self, raised: Raised) -> u64 {
        match raised {
            Raised::Kill => self.killed,
            Raised::Stop => self.stopped + self.continued,
        }
    }

    fn all(&self) -> u64 {
        self.killed + self.stopped + self.continued
    }
}

/// What has been done, and found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Counts {
    /// By label.
    pub points: BTreeMap<String, Tally>,
    /// Processes started for them.
    pub processes: u64,
    /// Calls of the bystander that were answered right.
    pub bystander_calls: u64,
    /// Calls that were not.
    pub bystander_errors: u64,
    /// Its longest call, ns.
    pub bystander_max_ns: u64,
    /// Calls, of clients that knew what became of each, that were answered right.
    pub answered: u64,
    /// That were said not to have been executed.
    pub not_executed: u64,
    /// That may have been.
    pub unknown: u64,
    /// Calls of victims that were answered right.
    pub victims_answered: u64,
    /// What was otherwise than it has to be, in words.
    pub violations: Vec<String>,
    /// How long it took, seconds.
    pub seconds: f64,
    /// Where the moments come from.
    pub seed: u64,
}

impl Counts {
    fn tally(&mut self, label: &str) -> &mut Tally {
        self.points.entry(label.to_owned()).or_default()
    }

    fn violation(&mut self, what: String) {
        eprintln!("doorbell-stress: {what}");
        self.violations.push(what);
    }

    /// A process that did not come by its point.
    fn missed(&mut self, item: &Item, how: &str) {
        self.tally(item.label).missed += 1;
        self.violation(format!("{} ({}) was not reached: {how}", item.label, item.raised.name()));
    }

    fn add(&mut self, audit: ledger::Audit) {
        self.answered += audit.answered;
        self.not_executed += audit.not_executed;
        self.unknown += audit.unknown;
        audit.violations.into_iter().for_each(|violation| self.violation(violation));
    }
}

/// One piece of a run.
struct Run<'a> {
    options: &'a PointsOptions,
    cores: &'a Cores,
    counts: Counts,
    begun: Instant,
    /// Seconds of earlier pieces.
    before: f64,
}

impl Run<'_> {
    /// What is still to be done of points whose labels begin so: all of them once, then all of them again.
    fn items(&mut self, side: &str) -> Vec<Item> {
        let labels = kill::POINTS.iter().map(|point| point.0).filter(|label| label.starts_with(side));
        let points = &self.options.points;
        let labels: Vec<_> =
            labels.filter(|label| points.is_empty() || points.iter().any(|p| p == label)).collect();
        let signals: &[Raised] = match self.options.signal {
            Signals::Kill => &[Raised::Kill],
            Signals::Stop => &[Raised::Stop],
            Signals::Both => &[Raised::Kill, Raised::Stop],
        };
        let mut items = Vec::new();
        for round in 0..self.options.count {
            for label in &labels {
                for raised in signals {
                    if self.counts.tally(label).done(*raised) <= round {
                        let number = self.counts.processes;
                        self.counts.processes += 1;
                        let dice = mix(self.counts.seed ^ number << 8);
                        items.push(Item { label, raised: *raised, number, dice });
                    }
                }
            }
        }
        items
    }

    /// Whether there is any sense in going on.
    fn goes_on(&self) -> bool {
        self.counts.violations.len() < 10
    }

    fn keep(&mut self) -> Result<(), StressError> {
        self.counts.seconds = self.before + self.begun.elapsed().as_secs_f64();
        kept::keep(self.options.state.as_deref(), &self.counts)
    }
}

fn load(options: &PointsOptions, random: u64) -> Result<Counts, StressError> {
    let kept: Option<Counts> = kept::load(options.state.as_deref())?;
    let mut counts = kept.unwrap_or_else(|| Counts { seed: random, ..Counts::default() });
    counts.seed = options.seed.unwrap_or(counts.seed);
    Ok(counts)
}

/// Runs it.
///
/// # Errors
///
/// [`StressError`] if a process cannot be started or hangs; what was found wrong is in the counts.
pub fn run(
    options: &PointsOptions,
    cores: &Cores,
    random: u64,
    progress: impl Fn(&str),
) -> Result<Counts, StressError> {
    let counts = load(options, random)?;
    let before = counts.seconds;
    let mut run = Run { options, cores, counts, begun: Instant::now(), before };
    let (returning, clients) = run
        .items("client.")
        .into_iter()
        .partition::<Vec<_>, _>(|item| victim::Habit::for_point(item.label, 1) == victim::Habit::Returning);
    if !clients.is_empty() {
        clients::run(&mut run, &clients, &progress)?;
    }
    if !returning.is_empty() && run.goes_on() {
        clients::run_returning(&mut run, &returning, &progress)?;
    }
    let servers = run.items("server.");
    if !servers.is_empty() && run.goes_on() {
        servers::run(&mut run, &servers, &progress)?;
    }
    run.keep()?;
    Ok(run.counts)
}

/// The result in lines.
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:32} {:>8} {:>8} {:>10} {:>8}", "point", "killed", "stopped", "continued", "missed")?;
        let known = kill::POINTS.iter().filter_map(|point| Some((point.0, self.points.get(point.0)?)));
        for (label, tally) in known {
            let Tally { killed, stopped, continued, missed } = tally;
            writeln!(f, "{label:32} {killed:8} {stopped:8} {continued:10} {missed:8}")?;
        }
        let of = |side: &str| {
            self.points
                .iter()
                .filter(|(label, _)| label.starts_with(side))
                .fold((0, 0), |(n, all), (_, tally)| (n + u64::from(tally.all() > 0), all + tally.all()))
        };
        let ((client_points, clients), (server_points, servers)) = (of("client."), of("server."));
        let all = clients + servers;
        let rate = all as f64 / self.seconds.max(1e-9);
        writeln!(
            f,
            "{all} in all, {rate:.0} a second: {clients} of clients at {client_points} points, {servers} of servers at \
             {server_points}"
        )?;
        let Self { bystander_calls, bystander_errors, bystander_max_ns, .. } = self;
        writeln!(
            f,
            "bystander: {bystander_calls} calls, {bystander_errors} wrong, longest {bystander_max_ns} ns"
        )?;
        let Self { answered, not_executed, unknown, victims_answered, seed, .. } = self;
        writeln!(
            f,
            "calls of clients that went on: {answered} answered, {not_executed} not executed, {unknown} unknown; of \
             victims: {victims_answered} answered"
        )?;
        writeln!(f, "seed: {seed}")?;
        self.violations.iter().try_for_each(|violation| writeln!(f, "VIOLATION {violation}"))?;
        writeln!(f, "{}", if self.violations.is_empty() { "passed" } else { "FAILED" })
    }
}

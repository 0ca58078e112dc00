//! Level 3, latency torture: 999 bulk connections with calls of 4 KiB without pause, and one interactive connection whose
//! calls of 1 KiB are timed. Once with the probe in the load's own event loop, on its core; once in a process of its own,
//! which is judged only where it has a core of its own.
//!
//! Beside it stands the bare ring on the same two cores, before and after, its calls at the probe's own pace. Nothing is
//! subtracted. Where the bare ring, too, is held up for longer than a call may take, the host or other processes stop the
//! cores, and what is judged is how often calls were held up, not how long the longest one was. It has as much time as
//! the load to show that, up to two minutes.

use crate::clock::{SECOND, now_ns};
use crate::error::StressError;
use crate::floor;
use crate::latency::{Latency, MAX_NS, us};
use crate::level1;
use crate::load::Schedule;
use crate::machine::Cores;
use crate::memory::{Peak, Sampler, Segments};
use crate::monitor::{Counters, Monitor};
use crate::processes::Process;
use crate::report::{self, Check, Row, grouped, mib};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use crate::torture::{self, BULK, PACE, TortureJob, Tortured};
use serde::Serialize;
use std::time::Duration;

/// This level's number.
pub const LEVEL: u32 = 3;
/// Length of the window with `--short` and `--full`, seconds.
pub const SHORT: f64 = 8.5;
/// See [`SHORT`].
pub const FULL: f64 = 600.0;
/// Samples that have to be taken.
const SAMPLES: u64 = 10_000;
/// Violations have to be fewer than this part of the samples.
const VIOLATIONS_MAX: f64 = 0.01;
/// Where the bare ring is held up too, at most this part of the calls may be held up.
const HELD_UP_MAX: f64 = 0.001;
/// What is wished for at p99, nanoseconds.
const GOAL_NS: u64 = 5_000;
/// Cores from which on a probe in a process of its own is judged: server, load, probe, and one for the rest.
const CORES_FOR_OWN_PROCESS: usize = 4;
/// Left out of the window.
const WARM_UP_NS: u64 = SECOND / 2;
/// The bare ring's windows, nanoseconds.
const FLOOR_NS: u64 = SECOND;
/// The longest of them: its calls at the probe's pace are enough to tell parts in a thousand.
const FLOOR_MAX_NS: u64 = 120 * SECOND;
/// How long a process may take to report beyond the window.
const STEP: Duration = Duration::from_secs(60);

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Length of the window.
    pub seconds: f64,
    /// Seed of every content.
    pub seed: u64,
    /// Connections, at most [`level1::CONNECTIONS`]; one of them is the probe's.
    pub connections: usize,
}

impl Plan {
    /// Whether figures can be judged: fewer connections, less time or no optimisation are for trying it out.
    fn is_judged(&self) -> bool {
        self.connections == level1::CONNECTIONS && self.seconds >= SHORT && !cfg!(debug_assertions)
    }
}

/// Runs both rows.
///
/// # Errors
///
/// [`StressError`] if one could not be run to its end.
pub fn run(plan: &Plan, cores: &Cores, progress: impl Fn(&str)) -> Result<Vec<Row>, StressError> {
    let say = |row: &str, doing: &str| progress(&format!("level {LEVEL}, {row}: {doing}"));
    let mut rows = Vec::new();
    for (row, own_process) in [("probe in the load's loop", false), ("probe in a process of its own", true)] {
        say(row, "the bare ring");
        let before = floor::latency(plan.seed, cores, FLOOR_NS, PACE)?;
        say(row, "the load");
        // The second one is reported only, where there are few cores: half the time is enough for that.
        let judged = plan.is_judged() && (!own_process || cores.clients.len() + 1 >= CORES_FOR_OWN_PROCESS);
        let seconds = if own_process && !judged { plan.seconds / 2.0 } else { plan.seconds };
        let mut found = carry(plan, cores, own_process, seconds)?;
        say(row, "the bare ring again");
        found.floor = before.worse(floor::latency(plan.seed, cores, FLOOR_NS, PACE)?);
        if judged && found.tortured.probes.max_ns >= MAX_NS {
            say(row, "the bare ring for longer: is it held up as often?");
            let window_ns = ((seconds * SECOND as f64) as u64).min(FLOOR_MAX_NS);
            found.floor = found.floor.worse(floor::latency(plan.seed, cores, window_ns, PACE)?);
        }
        rows.push(to_row(plan, row, judged, seconds, found));
    }
    Ok(rows)
}

/// What a row is made of.
#[derive(Debug, Default)]
struct Found {
    tortured: Tortured,
    floor: Latency,
    memory: Peak,
    counters: Counters,
    processes: usize,
    server_alive: bool,
}

fn carry(plan: &Plan, cores: &Cores, own_process: bool, seconds: f64) -> Result<Found, StressError> {
    let directory = Directory::new("latency")?;
    let processes = if own_process { 2 } else { 1 };
    let job = ServerJob {
        path: directory.path().join("s"),
        core: cores.server,
        // The monitor has one of each.
        connections: plan.connections as u32 + 1,
        sessions: processes as u32 + 1,
        ..ServerJob::default()
    };
    let mut server = server::start(&job)?;
    let client = |number: usize| {
        torture::start(&TortureJob {
            path: job.path.clone(),
            core: cores.client(number),
            yields: cores.are_shared_by(processes),
            bulk: if number == 0 { plan.connections - 1 } else { 0 },
            probe: number + 1 == processes,
            seed: plan.seed,
            number: number as u64,
        })
    };
    let mut clients = (0..processes).map(client).collect::<Result<Vec<_>, _>>()?;
    level1::connect(&mut clients)?;
    let monitor = Monitor::connect(&job.path)?;
    let pids: Vec<u32> = clients.iter().map(Process::pid).chain([std::process::id()]).collect();
    let sampler = Sampler::start(server.pid(), Segments::of(&pids, processes + 1)?);
    let schedule = Schedule::after(WARM_UP_NS, (seconds * SECOND as f64) as u64);
    clients.iter_mut().try_for_each(|client| client.send(&schedule))?;
    let within = Duration::from_nanos(schedule.end_ns.saturating_sub(now_ns())) + STEP;
    let mut found = Found { processes, ..Found::default() };
    for client in &mut clients {
        found.add(client.receive(within)?);
    }
    let memory = sampler.stop();
    if let Some(how) = server.has_ended() {
        found.tortured.faults.note(format!("the server ended early ({how})"));
        found.memory = memory.unwrap_or_default();
        return Ok(found);
    }
    found.server_alive = true;
    found.memory = memory?;
    found.counters = monitor.count()?;
    clients.into_iter().try_for_each(Process::end)?;
    Ok(found)
}

impl Found {
    /// Adds what a process found: one has the load, one the probe, or one has both.
    fn add(&mut self, other: Tortured) {
        let sum = &mut self.tortured;
        sum.bulk += other.bulk;
        sum.in_flight_most += other.in_flight_most;
        sum.faults.answered_in_all += other.faults.answered_in_all;
        sum.faults.add(client_faults(other.faults));
        if other.probes.samples > 0 {
            sum.probes = other.probes;
        }
    }
}

/// The faults alone: what was answered is added beside them.
fn client_faults(outcome: crate::load::Outcome) -> crate::load::Outcome {
    crate::load::Outcome { answered: 0, answered_in_all: 0, ..outcome }
}

/// What rows of this level have beside what all have.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Figures {
    pub probe: Latency,
    /// The worse of the bare ring's two runs in each figure.
    pub floor: Latency,
    pub violations_percent: f64,
    pub bulk_bytes: usize,
    pub bulk_calls: u64,
    pub bulk_per_second: f64,
    pub bulk_in_flight_most: usize,
}

fn part(of: u64, all: u64) -> f64 {
    of as f64 / (all.max(1)) as f64
}

fn percent(part: f64) -> String {
    format!("{:.3} %", part * 100.0)
}

/// Judges the longest calls, beside those of the bare ring.
fn longest(probe: &Latency, floor: &Latency, judged: bool) -> Check {
    let beside = format!("{} (bare {})", us(probe.max_ns), us(floor.max_ns));
    if floor.max_ns < MAX_NS {
        let holds = judged.then_some(probe.max_ns < MAX_NS);
        return Check::judged("probe, longest", format!("< {}", us(MAX_NS)), beside, holds);
    }
    let (held_up, bare) = (part(probe.from_50_us, probe.samples), part(floor.from_50_us, floor.samples));
    let measured = format!("{} (bare {}), longest {beside}", percent(held_up), percent(bare));
    let limit = format!("bare ring held up too: <= {} from 50 us on", percent(HELD_UP_MAX));
    Check::judged("probe, longest", limit, measured, judged.then_some(held_up <= HELD_UP_MAX))
}

fn to_row(plan: &Plan, row: &'static str, judged: bool, seconds: f64, found: Found) -> Row {
    let Found { tortured, floor, memory, counters, processes, server_alive } = found;
    let Tortured { probes, bulk, in_flight_most, faults } = tortured;
    let violations = part(probes.above_10_us, probes.samples);
    let bare_violations = part(floor.above_10_us, floor.samples);
    let beside = |name: fn(&Latency) -> u64| format!("{} (bare {})", us(name(&probes)), us(name(&floor)));
    let goal = if probes.p99_ns < GOAL_NS { "met" } else { "short" };
    let checks = vec![
        Check::above("probe samples", judged.then_some(SAMPLES - 1), probes.samples),
        Check::judged(
            "probes above 10 us",
            format!("< {}", percent(VIOLATIONS_MAX)),
            format!("{} (bare {})", percent(violations), percent(bare_violations)),
            judged.then_some(violations < VIOLATIONS_MAX),
        ),
        longest(&probes, &floor, judged),
        Check::exactly("answers with wrong content", 0, faults.wrong),
        Check::exactly("errors", 0, faults.errors),
        Check::exactly("requests never answered", 0, faults.lost),
        Check::exactly("answers in all, counted by the server", faults.answered_in_all, counters.calls_ok),
        Check::exactly(
            "connections open at the server",
            plan.connections as u64,
            counters.connections_open - 1,
        ),
        Check::exactly("server alive at the end", 1, server_alive.into()),
        Check::above("bulk calls", Some(0), bulk),
        Check::reported("probe p50", beside(|l| l.p50_ns)),
        Check::reported("probe p99", beside(|l| l.p99_ns)),
        Check::judged("probe p99, goal", format!("< {}", us(GOAL_NS)), goal.to_owned(), None),
        Check::reported("probe p99.9", beside(|l| l.p999_ns)),
        Check::reported("bulk calls per second", grouped((bulk as f64 / seconds) as u64)),
        Check::reported("bulk calls in flight, most", grouped(in_flight_most as u64)),
        Check::reported("server footprint, peak", mib(memory.footprint_bytes)),
    ];
    let figures = Figures {
        probe: probes,
        floor,
        violations_percent: violations * 100.0,
        bulk_bytes: BULK,
        bulk_calls: bulk,
        bulk_per_second: bulk as f64 / seconds,
        bulk_in_flight_most: in_flight_most,
    };
    Row {
        level: LEVEL,
        row,
        connections: plan.connections,
        sessions: processes + 1,
        client_processes: processes,
        seconds,
        wrong: faults.wrong,
        errors: faults.errors,
        lost: faults.lost,
        memory,
        figures: report::Figures::Latency(figures),
        notes: faults.notes,
        checks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Verdict;

    fn verdicts(probe: Latency, floor: Latency) -> Vec<Verdict> {
        let plan = Plan { seconds: SHORT, seed: 1, connections: level1::CONNECTIONS };
        let tortured = Tortured { probes: probe, bulk: 1, ..Tortured::default() };
        let counters = Counters { connections_open: 1001, ..Counters::default() };
        let found = Found { tortured, floor, counters, processes: 1, server_alive: true, ..Found::default() };
        to_row(&plan, "", true, SHORT, found).checks[..3].iter().map(|check| check.verdict).collect()
    }

    /// Goal:   too few samples, too many violations and too long a call fail the row; the longest call is judged by itself
    ///         only where the bare ring was not held up.
    #[test]
    fn violations_and_long_calls_fail_the_row() {
        use Verdict::{Fail, Pass};
        let good = Latency { samples: 10_000, above_10_us: 99, max_ns: 49_999, ..Latency::default() };
        let quiet = Latency { samples: 1000, max_ns: 20_000, ..Latency::default() };
        let noisy = Latency { max_ns: 900_000, ..quiet };
        assert_eq!(verdicts(good, quiet), [Pass; 3]);
        assert_eq!(verdicts(Latency { samples: 9_999, ..good }, quiet)[0], Fail);
        assert_eq!(verdicts(Latency { above_10_us: 100, ..good }, quiet)[1], Fail);
        let held_up = |n| Latency { max_ns: 400_000, from_50_us: n, ..good };
        assert_eq!(verdicts(held_up(1), quiet)[2], Fail);
        assert_eq!(verdicts(held_up(10), noisy)[2], Pass);
        assert_eq!(verdicts(held_up(11), noisy)[2], Fail);
        // However often the bare ring was.
        let oftener = Latency { from_50_us: 500, above_10_us: 500, ..noisy };
        assert_eq!(verdicts(Latency { above_10_us: 100, ..good }, oftener)[1], Fail);
        assert_eq!(verdicts(held_up(11), oftener)[2], Fail);
    }
}

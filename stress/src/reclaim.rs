//! `doorbell-stress reclaim`: how soon a server holds nothing of a client that was killed (R3.3, I2, I8).
//!
//! Clients live one after the other, each with calls of all lengths under way, and are killed at random moments. Timed from the
//! signal on is how long the server has more descriptors or mappings than before the client came, as /proc shows them; the
//! kernel's own work at the end of the process is part of that. Timed beside it is when its counters say so, too: sessions,
//! leases, bodies, budget. They are shown now and then, so they are late.

use crate::clock::{SECOND, now_ns, sleep_until};
use crate::content::mix;
use crate::error::StressError;
use crate::kills::{KillsJob, OTHERS, held, settled};
use crate::machine::Cores;
use crate::monitor::Monitor;
use crate::points::ledger::LedgerJob;
use crate::processes::{self, Role};
use crate::scratch::Directory;
use clap::Args;
use rustix::process::Signal;
use std::fmt;
use std::process::Stdio;
use std::time::Duration;

/// Clients before the first that is timed.
const WARM_UP: u64 = 4;
/// The longest life of a client once it is connected.
const LIFE_NS: u64 = 8_000_000;
/// How long the server may take at all.
const SETTLED_NS: u64 = 10 * SECOND;
/// How long a process may take to say what it has to.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Clone, Args)]
pub struct ReclaimOptions {
    /// Clients to kill.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: u64,
    /// Judge: 99 of 100 clients are gone within so many milliseconds.
    #[arg(long, default_value_t = 10.0)]
    goal_ms: f64,
    /// Seed of all random moments; random unless given.
    #[arg(long)]
    seed: Option<u64>,
}

/// What was found; times from the signal on, milliseconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Reclaim {
    /// Until descriptors and mappings were as before.
    times_ms: Vec<f64>,
    /// Until the counters were, too.
    counted_ms: Vec<f64>,
    goal_ms: f64,
    seed: u64,
}

impl Reclaim {
    /// Whether the goal is met.
    pub fn passed(&self) -> bool {
        of_rank(&self.counted_ms, 0.99) <= self.goal_ms
    }
}

/// The time that this part of all do not exceed; they are in order.
fn of_rank(times_ms: &[f64], part: f64) -> f64 {
    let rank = (times_ms.len() as f64 * part).ceil() as usize;
    times_ms[rank.max(1) - 1]
}

impl fmt::Display for Reclaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} clients killed one after the other, seed {}", self.times_ms.len(), self.seed)?;
        let times = [("nothing is held of it", &self.times_ms), ("the counters say so", &self.counted_ms)];
        for (what, times_ms) in times {
            let [p50, p99, max] = [0.5, 0.99, 1.0].map(|part| of_rank(times_ms, part));
            writeln!(f, "ms from the signal until {what}: p50 {p50:.2}, p99 {p99:.2}, longest {max:.2}")?;
        }
        let p99 = of_rank(&self.counted_ms, 0.99);
        let verdict = if self.passed() { "passed" } else { "FAILED" };
        writeln!(f, "{verdict}: p99 {p99:.2} ms (goal {})", self.goal_ms)
    }
}

/// Runs it.
///
/// # Errors
///
/// [`StressError`] if a process cannot be started, a client ends by itself, or something of one is left for good.
pub fn run(options: &ReclaimOptions, cores: &Cores, random: u64) -> Result<Reclaim, StressError> {
    let seed = options.seed.unwrap_or(random);
    let directory = Directory::new("reclaim")?;
    let path = directory.path().join("s");
    let job = LedgerJob { path: path.clone(), log: directory.path().join("log"), cores: vec![cores.server] };
    let mut server = processes::spawn(Role::LedgerServer, &job, Stdio::null())?;
    let () = server.receive(PATIENCE)?;
    let monitor = Monitor::connect(&path)?;
    let answered = directory.path().join("answered");
    let (mut times_ms, mut counted_ms) = (Vec::new(), Vec::new());
    // Counters are shown now and then: until they know of the monitor itself, they are of before.
    let know_of_it = || {
        let state = monitor.state()?;
        Ok(state.sessions_open == OTHERS as u64 && state.budget_used > 0)
    };
    until(0, now_ns(), know_of_it, || Ok(format!("{:?}", monitor.state()?)))?;
    let idle = monitor.state()?;
    let mut before = None;
    for number in 0..WARM_UP + options.count {
        if number == WARM_UP {
            before = Some(settled(&server, None, OTHERS)?.0.without_memory());
        }
        let job = KillsJob::victim(&path, &answered, cores.clients[0], number);
        let mut victim = processes::spawn(Role::Victim, &job, Stdio::null())?;
        let () = victim.receive(PATIENCE)?;
        sleep_until(now_ns() + mix(seed ^ number) % LIFE_NS);
        if let Some(how) = victim.has_ended() {
            return Err(StressError::Child { role: "victim", how });
        }
        let began_ns = now_ns();
        victim.signal(Signal::KILL)?;
        let is_reclaimed = || match before {
            Some(before) => Ok(held(server.pid())?.without_memory() == before),
            None => Ok(true),
        };
        let what_is_left = || {
            Ok(format!(
                "{:?} and {before:?} were, {:?} and {:?} are",
                idle,
                monitor.state()?,
                held(server.pid())?
            ))
        };
        let time_ns = until(number, began_ns, is_reclaimed, what_is_left)?;
        let counted_ns = until(number, began_ns, || Ok(monitor.state()? == idle), what_is_left)?;
        if before.is_some() {
            times_ms.push(time_ns as f64 / 1e6);
            counted_ms.push(counted_ns as f64 / 1e6);
        }
    }
    times_ms.sort_by(f64::total_cmp);
    counted_ms.sort_by(f64::total_cmp);
    Ok(Reclaim { times_ms, counted_ms, goal_ms: options.goal_ms, seed })
}

/// Nanoseconds since `began_ns` when `condition` has come to hold.
fn until(
    number: u64,
    began_ns: u64,
    condition: impl Fn() -> Result<bool, StressError>,
    what_is_left: impl Fn() -> Result<String, StressError>,
) -> Result<u64, StressError> {
    while !condition()? {
        if now_ns() - began_ns > SETTLED_NS {
            return Err(StressError::Left { number, what: what_is_left()? });
        }
    }
    Ok(now_ns() - began_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_99th_of_a_hundred_is_judged() {
        let of = |last_ms: f64| {
            let mut times_ms = vec![1.0; 98];
            times_ms.extend([last_ms, 50.0]);
            Reclaim { counted_ms: times_ms.clone(), times_ms, goal_ms: 10.0, seed: 0 }
        };
        assert!(!of(10.5).passed() && of(10.0).passed());
        assert!(of_rank(&of(10.0).times_ms, 1.0) == 50.0 && of_rank(&of(9.0).times_ms, 0.5) == 1.0);
    }
}

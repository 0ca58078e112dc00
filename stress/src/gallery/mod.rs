//! `doorbell-stress gallery`: one attacker after the other, each past the library and against a server in a process of its
//! own, while a client that means well is measured (FAULTS T12, F11 to F31).
//!
//! The bystander shares its core with the attacker, so an attacker takes processor time from it as any process would: what
//! is found is compared with what the bystander had beside a neighbour who makes honest calls at the same pace.

pub mod attacks;
pub mod bystander;

use crate::clock::{SECOND, now_ns, sleep_until};
use crate::error::StressError;
use crate::machine::Cores;
use crate::processes::{self, Process, Role};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use attacks::{ATTACKS, Attack, AttackJob, Attacked};
use bystander::{BystanderJob, Measure, Measured};
use clap::Args;
use serde::Serialize;
use std::process::Stdio;
use std::time::Duration;

/// How much longer than its window a process may take to say what it found.
const PATIENCE: Duration = Duration::from_secs(60);
/// The bystander's p99 may be so many times what it is beside an honest neighbour.
const P99_TIMES: u64 = 2;
/// Below this it is not judged: a single turn of another process on its core takes longer.
const P99_FLOOR_NS: u64 = 50_000;

/// What to run.
#[derive(Debug, Clone, Args)]
pub struct GalleryOptions {
    /// Length of each attacker's window, seconds; may be a fraction.
    #[arg(long, default_value_t = 2.0, value_parser = crate::cli::parse_seconds)]
    seconds: f64,
    /// Only attacks whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// What one attacker did, and what the bystander noticed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Which.
    pub attack: &'static str,
    /// How often it was carried out, and how often it did not end as it must.
    pub done: u64,
    /// See `done`.
    pub unexpected: u64,
    /// The bystander's answers a second.
    pub per_second: u64,
    /// The same, relative to what it had beside an honest neighbour.
    pub throughput: f64,
    /// The bystander's latencies.
    pub p50_ns: u64,
    /// See `p50_ns`.
    pub p99_ns: u64,
    /// Calls of the bystander that failed or were answered wrongly.
    pub errors: u64,
    /// Why this row fails, if it does.
    pub failed: Option<String>,
}

/// All of them.
#[derive(Debug, Clone, Serialize)]
pub struct Gallery {
    /// In the order in which they ran; the honest neighbour first.
    pub rows: Vec<Row>,
    /// Nothing failed.
    pub passed: bool,
}

/// Runs the gallery.
///
/// # Errors
///
/// [`StressError`] if a process cannot be started or ends early; the server is one of them.
pub fn run(options: &GalleryOptions, cores: &Cores) -> Result<Gallery, StressError> {
    let directory = Directory::new("gallery")?;
    let path = directory.path().join("s");
    let (server_core, core) = (cores.server, cores.clients[0]);
    let server = ServerJob {
        path: path.clone(),
        core: server_core,
        connections: 256,
        sessions: 256,
        ..ServerJob::default()
    };
    let mut server = server::start(&server)?;
    let mut bystander =
        processes::spawn(Role::Bystander, &BystanderJob { path: path.clone(), core }, Stdio::piped())?;
    let () = bystander.receive(PATIENCE)?;
    let wanted = |attack: &&Attack| options.only.as_ref().is_none_or(|only| attack.name.contains(only));
    let mut rows: Vec<Row> = Vec::new();
    for attack in ATTACKS.iter().take(1).chain(ATTACKS[1..].iter().filter(wanted)) {
        eprintln!("gallery: {}", attack.name);
        let until_ns = now_ns() + (options.seconds * SECOND as f64) as u64;
        let job = AttackJob { path: path.clone(), core, name: attack.name.to_owned(), until_ns };
        let mut attacker = processes::spawn(Role::Attacker, &job, Stdio::null())?;
        bystander.send(&Measure { until_ns })?;
        sleep_until(until_ns);
        let measured: Measured = bystander.receive(PATIENCE)?;
        let attacked: Attacked = attacker.receive(PATIENCE)?;
        attacker.end()?;
        rows.push(judge(attack.name, options.seconds, &attacked, &measured, rows.first(), &mut server));
    }
    bystander.end()?;
    let passed = rows.iter().all(|row| row.failed.is_none());
    Ok(Gallery { rows, passed })
}

fn judge(
    attack: &'static str,
    seconds: f64,
    attacked: &Attacked,
    measured: &Measured,
    neighbour: Option<&Row>,
    server: &mut Process,
) -> Row {
    let per_second = (measured.calls as f64 / seconds) as u64;
    let honest = neighbour.map_or((per_second, measured.p99_ns), |row| (row.per_second, row.p99_ns));
    let limit_ns = (P99_TIMES * honest.1).max(P99_FLOOR_NS);
    let failed = match server.has_ended() {
        Some(how) => Some(format!("the server ended: {how}")),
        None if attacked.done == 0 => Some("it was never carried out".to_owned()),
        None if attacked.unexpected > 0 => attacked.note.clone(),
        None if measured.errors > 0 => Some("the bystander was harmed".to_owned()),
        None if measured.p99_ns > limit_ns => Some(format!("p99 above {limit_ns} ns")),
        None => None,
    };
    Row {
        attack,
        done: attacked.done,
        unexpected: attacked.unexpected,
        per_second,
        throughput: per_second as f64 / honest.0.max(1) as f64,
        p50_ns: measured.p50_ns,
        p99_ns: measured.p99_ns,
        errors: measured.errors,
        failed,
    }
}

/// The table.
impl std::fmt::Display for Gallery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [attack, done, rate, part, p50, p99] =
            ["attack", "done", "bystander/s", "of honest", "p50 ns", "p99 ns"];
        writeln!(f, "{attack:<58} {done:>8} {rate:>12} {part:>9} {p50:>8} {p99:>8}  verdict")?;
        for row in &self.rows {
            let Row { attack, done, per_second, throughput, p50_ns, p99_ns, .. } = row;
            let verdict = row.failed.as_deref().unwrap_or("pass");
            writeln!(
                f,
                "{attack:<58} {done:>8} {per_second:>12} {throughput:>9.2} {p50_ns:>8} {p99_ns:>8}  {verdict}"
            )?;
        }
        writeln!(f, "{}", if self.passed { "passed" } else { "FAILED" })
    }
}

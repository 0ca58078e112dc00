//! `doorbell-stress soak`: chaos for long against one server that is never killed, and whether it comes to hold more and more
//! (FAULTS T12, R6.5). Once a minute everybody gives way until the server is at rest, and what it holds is noted: private
//! memory by its slope over the minutes, descriptors and segments by what they were at first.

use crate::clock::{SECOND, now_ns, sleep_until};
use crate::error::StressError;
use crate::kills::{self, Held};
use crate::level5::{Chaos, INJECTIONS, Injection, Plan, shuffle};
use crate::machine::Cores;
use clap::Args;
use serde::Serialize;
use std::fmt;

/// Sessions that stay: the normal client's. The hostile process has one while it does something.
const OTHERS: usize = 1;
/// Minutes at the beginning that are left out: tables grow to their size.
const WARM_UP: usize = 2;
/// Seconds from one note of what is held to the next.
const MINUTE: u64 = 60;
/// What the slope of private memory has to be below, bytes a minute.
const SLOPE_MAX: f64 = 4096.0;

/// What to do.
#[derive(Debug, Clone, Args)]
pub struct SoakOptions {
    /// How long, minutes.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(5..=10_000))]
    minutes: u64,
    /// Seconds of a minute: fewer than 60 are for trying it out, and private memory is not judged.
    #[arg(long, default_value_t = MINUTE, value_parser = clap::value_parser!(u64).range(1..=MINUTE))]
    minute: u64,
    /// Seed of every content and of what is done when; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // The names are the documentation.
pub struct Soak {
    pub seed: u64,
    pub minutes: u64,
    pub injections: u64,
    /// Calls of the normal client that were answered right, and what was wrong with others.
    pub calls: u64,
    pub wrong: u64,
    pub errors: u64,
    pub notes: Vec<String>,
    /// Bytes of private memory at rest, minute by minute.
    pub anonymous: Vec<u64>,
    pub descriptors: Vec<usize>,
    pub segments: Vec<usize>,
    /// Bytes a minute, and the bound below which it lies with 95 %.
    pub slope: f64,
    pub slope_upper: f64,
    pub passed: bool,
}

/// Runs it.
///
/// # Errors
///
/// [`StressError`] if it could not be run to its end.
pub fn run(
    options: &SoakOptions,
    cores: &Cores,
    random: u64,
    progress: impl Fn(&str),
) -> Result<Soak, StressError> {
    let seed = options.seed.unwrap_or(random);
    let plan = Plan { seconds: (options.minutes * options.minute) as f64, seed };
    let mut chaos = Chaos::start(&plan, cores)?;
    let mut order: Vec<Injection> = INJECTIONS.into_iter().filter(|i| *i != Injection::KillServer).collect();
    chaos.normal.send(&())?;
    let mut held = Vec::new();
    let mut injections = 0;
    for minute in 0..options.minutes {
        let begin_ns = now_ns();
        progress(&format!("soak: minute {} of {}", minute + 1, options.minutes));
        for second in 0..options.minute {
            sleep_until(begin_ns + second * SECOND);
            let turn = injections as usize % order.len();
            if turn == 0 {
                shuffle(&mut order, &mut chaos.chance);
            }
            chaos.inject(order[turn])?;
            injections += 1;
        }
        let (now, wrong) =
            kills::settled(&chaos.server, held.first().copied().map(Held::without_memory), OTHERS)?;
        chaos.faults.errors += u64::from(wrong.is_some());
        wrong.into_iter().for_each(|wrong| chaos.faults.note(format!("minute {}: {wrong}", minute + 1)));
        held.push(now);
    }
    chaos.normal.send(&())?;
    let endured = chaos.normal.receive(std::time::Duration::from_secs(60))?;
    let found = chaos.end(endured)?;
    let anonymous: Vec<u64> = held.iter().map(|held| held.anonymous).collect();
    let (slope, slope_upper) = slope(&anonymous[WARM_UP.min(anonymous.len())..]);
    let losses = found.endured.losses.len() as u64;
    let errors = found.faults.errors + found.endured.faults.errors + losses;
    let wrong = found.faults.wrong + found.endured.faults.wrong;
    let mut notes = found.faults.notes;
    notes.extend(found.endured.faults.notes);
    Ok(Soak {
        seed,
        minutes: options.minutes,
        injections,
        calls: found.endured.faults.answered_in_all,
        wrong,
        errors,
        notes,
        descriptors: held.iter().map(|held| held.descriptors).collect(),
        segments: held.iter().map(|held| held.segments).collect(),
        anonymous,
        slope,
        slope_upper,
        passed: wrong == 0
            && errors == 0
            && found.server_alive
            && (slope_upper < SLOPE_MAX || options.minute < MINUTE),
    })
}

/// The slope of values at equal distances, by least squares, and its upper bound with 95 % (Student's t, one-sided).
fn slope(values: &[u64]) -> (f64, f64) {
    let n = values.len() as f64;
    if values.len() < 3 {
        return (0.0, f64::INFINITY);
    }
    let (mid, mean) = ((n - 1.0) / 2.0, values.iter().sum::<u64>() as f64 / n);
    let points = || values.iter().enumerate().map(|(x, y)| (x as f64 - mid, *y as f64 - mean));
    let spread: f64 = points().map(|(x, _)| x * x).sum();
    let slope = points().map(|(x, y)| x * y).sum::<f64>() / spread;
    let residual: f64 = points().map(|(x, y)| (y - slope * x).powi(2)).sum();
    let error = (residual / (n - 2.0) / spread).sqrt();
    // For 1, 2, … degrees of freedom; from six on that of six, which is a little more than is right.
    let t = [6.314, 2.920, 2.353, 2.132, 2.015, 1.943];
    (slope, slope + t[(values.len() - 3).min(t.len() - 1)] * error)
}

impl fmt::Display for Soak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (|of: &[usize]| of.first().copied(), |of: &[usize]| of.last().copied());
        let Self { minutes, injections, calls, wrong, errors, descriptors, segments, .. } = self;
        writeln!(
            f,
            "{minutes} minutes, {injections} injections, {calls} calls right, {wrong} wrong, {errors} errors"
        )?;
        let kib: Vec<u64> = self.anonymous.iter().map(|bytes| bytes >> 10).collect();
        writeln!(f, "private memory at rest, KiB, minute by minute: {kib:?}")?;
        writeln!(
            f,
            "slope {:.2} KiB a minute, with 95 % below {:.2} (limit {:.0})",
            self.slope / 1024.0,
            self.slope_upper / 1024.0,
            SLOPE_MAX / 1024.0
        )?;
        writeln!(
            f,
            "descriptors {:?} to {:?}, segments {:?} to {:?}",
            first(descriptors),
            last(descriptors),
            first(segments),
            last(segments)
        )?;
        writeln!(f, "seed: {}", self.seed)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "NOTE {note}"))?;
        writeln!(f, "{}", if self.passed { "passed" } else { "FAILED" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   a leak is seen as one, and noise is not.
    #[test]
    fn r6_5_a_slope_has_a_bound() {
        let line: Vec<u64> = (0..20).map(|minute| 1_000_000 + minute * 5000).collect();
        let (rises, upper) = slope(&line);
        assert!((rises - 5000.0).abs() < 1e-6 && (upper - 5000.0).abs() < 1e-3);
        let noise: Vec<u64> = (0..20).map(|minute| 1_000_000 + minute * 7919 % 4096).collect();
        let (rises, upper) = slope(&noise);
        assert!(rises.abs() < 200.0 && upper > rises && upper < SLOPE_MAX, "{rises} {upper}");
        assert_eq!(slope(&[1, 2]).1, f64::INFINITY);
    }
}

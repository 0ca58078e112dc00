//! What the levels found: a table of verdicts, or one JSON object.

use crate::machine::Machine;
use crate::memory::Peak;
use crate::{level1, level2, level3, level4, level5};
use serde::Serialize;
use std::fmt;

/// How a claim stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    Pass,
    /// It does not.
    Fail,
    /// Measured beside the others, not judged here.
    Reported,
}

/// One claim of a row, judged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What is claimed.
    pub claim: &'static str,
    /// What it has to be.
    pub limit: String,
    /// What it is.
    pub measured: String,
    /// How it stands.
    pub verdict: Verdict,
}

impl Check {
    /// More than `limit`; only reported if that is `None`.
    pub fn above(claim: &'static str, limit: Option<u64>, measured: u64) -> Self {
        let verdict = limit.map_or(Verdict::Reported, |limit| verdict(measured > limit));
        let limit = limit.map_or("-".to_owned(), |limit| format!("> {}", grouped(limit)));
        Self { claim, limit, measured: grouped(measured), verdict }
    }

    /// At most `limit`; only reported if that is `None`.
    pub fn at_most(claim: &'static str, limit: Option<u64>, measured: u64) -> Self {
        let verdict = limit.map_or(Verdict::Reported, |limit| verdict(measured <= limit));
        let limit = limit.map_or("-".to_owned(), |limit| format!("<= {}", grouped(limit)));
        Self { claim, limit, measured: grouped(measured), verdict }
    }

    /// At most `limit`, of a moment that may never have come.
    pub fn within(claim: &'static str, limit: f64, measured: Option<f64>) -> Self {
        let verdict = verdict(measured.is_some_and(|measured| measured <= limit));
        let measured = measured.map_or("never".to_owned(), |measured| format!("{measured:.1}"));
        Self { claim, limit: format!("<= {limit}"), measured, verdict }
    }

    /// Exactly `limit`.
    pub fn exactly(claim: &'static str, limit: u64, measured: u64) -> Self {
        let verdict = verdict(measured == limit);
        Self { claim, limit: format!("= {}", grouped(limit)), measured: grouped(measured), verdict }
    }

    /// As `holds` says; only reported if that is `None`.
    pub fn judged(claim: &'static str, limit: String, measured: String, holds: Option<bool>) -> Self {
        Self { claim, limit, measured, verdict: holds.map_or(Verdict::Reported, verdict) }
    }

    /// Not judged.
    pub fn reported(claim: &'static str, measured: String) -> Self {
        Self { claim, limit: "-".to_owned(), measured, verdict: Verdict::Reported }
    }
}

fn verdict(holds: bool) -> Verdict {
    if holds { Verdict::Pass } else { Verdict::Fail }
}

/// One row of a level. Names are those of the JSON object, which has the figures of the level beside them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // The names are the documentation: they are the interface's own.
pub struct Row {
    pub level: u32,
    pub row: &'static str,
    pub connections: usize,
    pub sessions: usize,
    pub client_processes: usize,
    pub seconds: f64,
    pub wrong: u64,
    pub errors: u64,
    pub lost: u64,
    pub memory: Peak,
    #[serde(flatten)]
    pub figures: Figures,
    /// The first faults in words.
    pub notes: Vec<String>,
    pub checks: Vec<Check>,
}

/// What only rows of one level have.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Figures {
    /// Level 1.
    Connections(level1::Figures),
    /// Level 2.
    Memory(level2::Figures),
    /// Level 3.
    Latency(level3::Figures),
    /// Level 4.
    Leaks(level4::Figures),
    /// Level 5.
    Chaos(level5::Figures),
}

/// One run of the suite.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Report {
    pub machine: Machine,
    pub seed: u64,
    pub rows: Vec<Row>,
    pub passed: bool,
}

impl Report {
    /// A report of these rows: passed if there are some and nothing in them failed.
    pub fn new(machine: Machine, seed: u64, rows: Vec<Row>) -> Self {
        let failed = rows.iter().flat_map(|row| &row.checks).any(|check| check.verdict == Verdict::Fail);
        let passed = !rows.is_empty() && !failed;
        Self { machine, seed, rows, passed }
    }

    /// One line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and names are JSON")
    }
}

const HEAD: [&str; 6] = ["level", "row", "claim", "limit", "measured", "verdict"];

/// The table.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![HEAD.map(str::to_owned)];
        for row in &self.rows {
            lines.extend(row.checks.iter().map(|check| cells(row, check)));
        }
        let widths: [usize; 6] =
            std::array::from_fn(|i| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0));
        for line in &lines {
            write_line(f, line, &widths)?;
        }
        for row in self.rows.iter().filter(|row| !row.notes.is_empty()) {
            writeln!(f, "faults in level {}, {}:", row.level, row.row)?;
            row.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))?;
        }
        writeln!(f, "message: one request answered, every byte of the answer right")?;
        writeln!(f, "machine: {}", self.machine)?;
        writeln!(f, "seed: {}", self.seed)?;
        writeln!(f, "{}", if self.passed { "passed" } else { "FAILED" })
    }
}

fn cells(row: &Row, check: &Check) -> [String; 6] {
    let verdict = match check.verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "FAIL",
        Verdict::Reported => "-",
    };
    let Check { claim, limit, measured, .. } = check;
    [
        row.level.to_string(),
        row.row.to_owned(),
        (*claim).to_owned(),
        limit.clone(),
        measured.clone(),
        verdict.into(),
    ]
}

/// Figures to the right, words to the left.
fn write_line(f: &mut fmt::Formatter<'_>, line: &[String; 6], widths: &[usize; 6]) -> fmt::Result {
    for (i, (cell, width)) in line.iter().zip(widths).enumerate() {
        match i {
            3 | 4 => write!(f, "{cell:>width$}  ")?,
            5 => writeln!(f, "{cell}")?,
            _ => write!(f, "{cell:<width$}  ")?,
        }
    }
    Ok(())
}

/// Digits in groups of three.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / (1 << 20) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(checks: Vec<Check>) -> Row {
        Row {
            level: 1,
            row: "a row",
            connections: 1000,
            sessions: 1,
            client_processes: 1,
            seconds: 5.0,
            wrong: 0,
            errors: 0,
            lost: 0,
            memory: Peak::default(),
            figures: Figures::Memory(level2::Figures::default()),
            notes: vec!["a note".to_owned()],
            checks,
        }
    }

    fn report(checks: Vec<Check>) -> Report {
        let machine = Machine {
            cores: 2,
            kernel: "6.18".to_owned(),
            cpu: "CPU".to_owned(),
            hyperthreads: false,
            debug_build: false,
        };
        Report::new(machine, 7, vec![row(checks)])
    }

    #[test]
    fn a_limit_is_not_reached_by_equalling_it() {
        assert_eq!(Check::above("rate", Some(1_000_000), 1_000_000).verdict, Verdict::Fail);
        assert_eq!(Check::above("rate", Some(1_000_000), 1_000_001).verdict, Verdict::Pass);
        assert_eq!(Check::above("rate", None, 5).verdict, Verdict::Reported);
        assert_eq!(Check::at_most("bytes", Some(5), 5).verdict, Verdict::Pass);
        assert_eq!(Check::at_most("bytes", Some(5), 6).verdict, Verdict::Fail);
        assert_eq!(Check::at_most("bytes", None, 6).verdict, Verdict::Reported);
        assert_eq!(Check::within("ms", 5.0, Some(5.0)).verdict, Verdict::Pass);
        assert_eq!(Check::within("ms", 5.0, Some(5.1)).verdict, Verdict::Fail);
        assert_eq!(Check::within("ms", 5.0, None).verdict, Verdict::Fail);
        assert_eq!(Check::exactly("alive", 1000, 999).verdict, Verdict::Fail);
        assert_eq!(Check::exactly("wrong", 0, 0).verdict, Verdict::Pass);
    }

    #[test]
    fn one_failed_claim_fails_the_run_and_so_does_a_run_without_rows() {
        assert!(report(vec![Check::exactly("x", 0, 0), Check::reported("y", "1".into())]).passed);
        let failed = report(vec![Check::exactly("x", 0, 0), Check::exactly("y", 0, 1)]);
        assert!(!failed.passed && failed.to_string().ends_with("FAILED\n"));
        assert!(!Report::new(failed.machine, 7, Vec::new()).passed);
    }

    #[test]
    fn the_table_has_a_line_for_each_claim_and_columns_in_line() {
        let text =
            report(vec![Check::above("rate", Some(1_000_000), 2), Check::exactly("lost", 0, 0)]).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("level  row    claim"), "{text}");
        assert!(lines[1].ends_with("> 1 000 000         2  FAIL"), "{text}");
        assert!(lines[2].ends_with("        = 0         0  pass"), "{text}");
        assert!(text.contains("  a note\n") && text.contains("2 cores, kernel 6.18, CPU\nseed: 7"));
    }

    #[test]
    fn digits_are_grouped_from_the_right() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1 000", "1 234 567"]);
    }
}

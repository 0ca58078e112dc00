//! The report: for people as a table with reasons where there is something to say, for programs as JSON.

use super::check::{Check, Outcome, Verdict};
use super::findings::Findings;
use super::judge::judge;
use super::plan::Plan;
use serde::Serialize;
use std::fmt::Write;

/// Everything that is printed. The keys are the interface of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Of the command.
    version: &'static str,
    /// The kernel's release.
    kernel: String,
    /// What it all comes to.
    pub outcome: Outcome,
    /// The exit status that says so.
    exit_status: u8,
    failures: usize,
    warnings: usize,
    notes: usize,
    /// The socket path that was checked.
    socket: String,
    /// The sessions that were checked against.
    max_sessions: u32,
    /// What a server would use.
    r#use: Plan,
    checks: Vec<Check>,
}

/// How the text is to look.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Colours and bold headings.
    pub colour: bool,
    /// Columns.
    pub width: usize,
    /// Reasons also where everything is as it should be.
    pub verbose: bool,
}

/// How far the text is indented that a check has beside its own line.
const INDENT: usize = 11;

impl Report {
    /// Judges what was found.
    pub fn of(findings: &Findings) -> Self {
        let checks = judge(findings);
        let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
        let outcome = Outcome::of(&checks);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: findings.kernel.release.clone(),
            outcome,
            exit_status: outcome.exit_status(),
            failures: count(Verdict::Failure),
            warnings: count(Verdict::Warning),
            notes: count(Verdict::Note),
            socket: findings.asked.socket.display().to_string(),
            max_sessions: findings.asked.max_sessions,
            r#use: Plan::of(findings),
            checks,
        }
    }

    /// One line of JSON.
    ///
    /// # Errors
    ///
    /// None that can be expected: names and numbers are JSON.
    pub fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    /// The text for people.
    pub fn text(&self, style: Style) -> String {
        let mut text = Text { out: String::new(), style };
        text.line(format_args!("doorbell {} on Linux {}", self.version, self.kernel));
        let width = self.checks.iter().map(|check| check.name().len()).max().unwrap_or_default();
        let mut group = "";
        for check in &self.checks {
            if check.group() != group {
                group = check.group();
                text.heading(group);
            }
            text.check(check, width);
        }
        text.heading("what a server would use");
        for (subject, line) in &self.r#use.lines {
            text.labelled(&format!("  {subject:<8}  "), line, INDENT + 1);
        }
        text.line(format_args!(""));
        text.verdict_in_words(self);
        text.out
    }
}

struct Text {
    out: String,
    style: Style,
}

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.out, "{line}").expect("strings can be written to");
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.style.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn heading(&mut self, heading: &str) {
        let heading = self.painted("1", heading);
        self.line(format_args!("\n{heading}"));
    }

    fn check(&mut self, check: &Check, width: usize) {
        let word = check.verdict.word();
        let colour = match check.verdict {
            Verdict::Ok => "32",
            Verdict::Note => "36",
            Verdict::Warning => "33",
            Verdict::Failure => "31",
        };
        let label = format!(
            "  {}{:pad$} {:<width$}  ",
            self.painted(colour, word),
            "",
            check.name(),
            pad = 8 - word.len()
        );
        self.labelled(&label, &check.found, INDENT + width + 2);
        // What was not tried has no reason to be discussed.
        if check.advice.is_some() || self.style.verbose {
            self.labelled(&format!("{:INDENT$}why: ", ""), check.why, INDENT + 5);
        }
        if let Some(advice) = &check.advice {
            self.labelled(&format!("{:INDENT$}do:  ", ""), advice, INDENT + 5);
        }
    }

    /// A label and text beside it, wrapped; the label takes `indent` columns.
    fn labelled(&mut self, label: &str, text: &str, indent: usize) {
        let mut lines = wrapped(text, self.style.width.saturating_sub(indent)).into_iter();
        let first = lines.next().unwrap_or_default();
        self.line(format_args!("{label}{first}"));
        for line in lines {
            self.line(format_args!("{:indent$}{line}", ""));
        }
    }

    fn verdict_in_words(&mut self, report: &Report) {
        let named = |verdict| {
            let names = report.checks.iter().filter(|check| check.verdict == verdict).map(|check| check.id);
            names.collect::<Vec<_>>().join(", ")
        };
        let (colour, words) = match report.outcome {
            Outcome::RunsWell => ("32", "doorbell will run well here".to_owned()),
            Outcome::RunsWithWarnings => {
                ("33", format!("doorbell will run here, with warnings: {}", named(Verdict::Warning)))
            }
            Outcome::WillNotRun => ("31", format!("doorbell will not run here: {}", named(Verdict::Failure))),
        };
        let (checks, notes) = (report.checks.len(), report.notes);
        for line in wrapped(&format!("{words} ({checks} checks, {notes} notes)"), self.style.width) {
            let line = self.painted(colour, &line);
            self.line(format_args!("{line}"));
        }
    }
}

/// Words of `text` on lines of at most `width` columns, where they fit. What stands between backquotes is one word, so
/// that it can be copied.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in words(text) {
        let line = lines.last_mut().expect("there is always one");
        match line.chars().count() {
            0 => line.push_str(&word),
            len if len + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for part in text.split_whitespace() {
        match words.last_mut() {
            Some(last) if last.matches('`').count() % 2 == 1 => {
                last.push(' ');
                last.push_str(part);
            }
            _ => words.push(part.to_owned()),
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::super::findings::fixture;
    use super::*;

    const PLAIN: Style = Style { colour: false, width: 80, verbose: false };

    /// Goal:   the text has a line for each check, reasons where there is something to say, and fits its width.
    #[test]
    fn the_text_says_why_and_what_to_do_where_something_is_wrong() {
        let good = Report::of(&fixture::good()).text(PLAIN);
        assert!(good.contains("\nlimits\n  ok       descriptors"), "{good}");
        assert!(!good.contains("why:") && !good.contains("do:") && !good.contains('\x1b'), "{good}");
        assert!(good.contains("\nwhat a server would use\n  backend   io_uring"), "{good}");
        assert!(good.ends_with("checks, 0 notes)\n") && good.contains("will run well here"), "{good}");
        let bad = Report::of(&fixture::hopeless()).text(PLAIN);
        assert!(bad.contains("  warning  release"), "{bad}");
        assert!(
            bad.contains("\n           do:  start a kernel of 6.7 or newer; until then epoll serves\n"),
            "{bad}"
        );
        assert!(
            bad.contains("doorbell will not run here: ") && !bad.contains("here: kernel.release"),
            "{bad}"
        );
        for line in good.lines().chain(bad.lines()) {
            assert!(line.len() <= 80 && line == line.trim_end(), "{line}");
        }
        let verbose = Report::of(&fixture::good()).text(Style { verbose: true, ..PLAIN });
        assert_eq!(verbose.matches("why:").count(), Report::of(&fixture::good()).checks.len());
    }

    #[test]
    fn lines_break_between_words_but_not_inside_a_command() {
        assert_eq!(wrapped("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrapped("do: `a b c` now", 6), ["do:", "`a b c`", "now"]);
        assert_eq!(wrapped("", 5), [""]);
    }

    /// Goal:   colours change nothing but colours.
    #[test]
    fn colours_are_only_added() {
        let report = Report::of(&fixture::hopeless());
        let coloured = report.text(Style { colour: true, ..PLAIN });
        assert!(coloured.contains("\x1b[31mfailure\x1b[0m"), "{coloured}");
        let mut bare = coloured;
        for code in ["1", "31", "32", "33", "36", "0"] {
            bare = bare.replace(&format!("\x1b[{code}m"), "");
        }
        assert_eq!(bare, report.text(PLAIN));
    }

    /// Goal:   the keys of the JSON are the same whatever was found, and the numbers agree with each other.
    #[test]
    fn the_keys_are_the_interface() {
        const KEYS: [&str; 11] = [
            "version",
            "kernel",
            "outcome",
            "exit_status",
            "failures",
            "warnings",
            "notes",
            "socket",
            "max_sessions",
            "use",
            "checks",
        ];
        let value = |findings: &Findings| {
            let json = Report::of(findings).json().unwrap();
            assert!(json.ends_with("}\n") && json.lines().count() == 1);
            serde_json::from_str::<serde_json::Value>(&json).unwrap()
        };
        let keys = |value: &serde_json::Value| {
            value.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>()
        };
        let (good, bad) = (value(&fixture::good()), value(&fixture::hopeless()));
        assert_eq!(keys(&good), KEYS.map(str::to_owned).into());
        assert_eq!(keys(&good["use"]), keys(&bad["use"]));
        for (good, bad) in good["checks"].as_array().unwrap().iter().zip(bad["checks"].as_array().unwrap()) {
            assert_eq!((keys(good), &good["id"]), (keys(bad), &bad["id"]));
            assert_eq!(keys(&good["facts"]), keys(&bad["facts"]), "{}", good["id"]);
        }
        assert_eq!((&good["outcome"], &good["exit_status"]), (&"runs_well".into(), &0.into()));
        assert_eq!((&bad["outcome"], &bad["exit_status"]), (&"will_not_run".into(), &1.into()));
        let failures = bad["checks"].as_array().unwrap().iter().filter(|check| check["verdict"] == "failure");
        assert_eq!(failures.count() as u64, bad["failures"].as_u64().unwrap());
        assert_eq!(bad["use"]["backend"], serde_json::Value::from("epoll"));
    }
}

//! What one check says: what was found, how good that is, why it matters, what to do.

use serde::{Serialize, Serializer};
use serde_json::Value;

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing has to be done.
    Note,
    /// A server runs, but something may go wrong or be slow.
    Warning,
    /// A server does not run, or clients cannot use it.
    Failure,
}

impl Verdict {
    /// As it is printed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// Its stable name, `group.subject`.
    pub id: &'static str,
    /// How good it is.
    pub verdict: Verdict,
    /// What was found, one line.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do, if there is something to do.
    pub advice: Option<String>,
    /// The same as numbers and names, for programs.
    #[serde(serialize_with = "as_object")]
    pub facts: Vec<(&'static str, Value)>,
}

fn as_object<S: Serializer>(facts: &[(&'static str, Value)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(facts.iter().map(|(key, value)| (key, value)))
}

impl Check {
    /// A check that found what it should.
    pub fn ok(id: &'static str, why: &'static str, found: impl Into<String>) -> Self {
        Self { id, verdict: Verdict::Ok, found: found.into(), why, advice: None, facts: Vec::new() }
    }

    /// The same with another verdict, and what to do.
    pub fn but(self, verdict: Verdict, advice: impl Into<String>) -> Self {
        Self { verdict, advice: Some(advice.into()), ..self }
    }

    /// The same as something worth knowing that needs no doing.
    pub fn noted(self) -> Self {
        Self { verdict: Verdict::Note, ..self }
    }

    /// The same with a number or name for programs.
    pub fn fact(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.facts.push((key, value.into()));
        self
    }

    /// Its group, as a heading.
    pub fn group(&self) -> &'static str {
        self.id.split_once('.').map_or(self.id, |(group, _)| group)
    }

    /// Its name within the group, in words.
    pub fn name(&self) -> String {
        self.id.split_once('.').map_or(self.id, |(_, name)| name).replace('_', " ")
    }
}

/// What all checks come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// No warning and no failure.
    RunsWell,
    /// Warnings, but no failure.
    RunsWithWarnings,
    /// At least one failure.
    WillNotRun,
}

impl Outcome {
    /// The worst verdict decides.
    pub fn of(checks: &[Check]) -> Self {
        match checks.iter().map(|check| check.verdict).max() {
            Some(Verdict::Failure) => Self::WillNotRun,
            Some(Verdict::Warning) => Self::RunsWithWarnings,
            _ => Self::RunsWell,
        }
    }

    /// The exit status of the command; 2 is left to a wrong command line.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::RunsWell => 0,
            Self::WillNotRun => 1,
            Self::RunsWithWarnings => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   the worst check decides the exit status; notes do not count.
    #[test]
    fn the_worst_verdict_decides_the_exit_status() {
        let check = || Check::ok("group.some_name", "why", "found");
        let status = |checks: &[Check]| Outcome::of(checks).exit_status();
        assert_eq!(status(&[]), 0);
        assert_eq!(status(&[check(), check().noted()]), 0);
        assert_eq!(status(&[check().but(Verdict::Warning, "do"), check()]), 3);
        assert_eq!(status(&[check().but(Verdict::Failure, "do"), check().but(Verdict::Warning, "do")]), 1);
        assert_eq!((check().group(), check().name()), ("group", "some name".to_owned()));
    }
}

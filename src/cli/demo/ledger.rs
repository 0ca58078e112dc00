//! What became of calls that were in flight when their server was killed, and whether that agrees with what the handlers
//! wrote down.

use super::super::bench::clock::{SECOND, now_ns};
use super::super::bench::error::BenchError;
use super::super::bench::work;
use super::super::bench::worker::say;
use super::server::{LOG_ENTRY, LOGGED};
use doorbell::{CallOptions, ClientConfig, IpcError, Reconnect, ReconnectingClient};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Calls that each caller has in flight.
const IN_FLIGHT: u64 = 16;
/// Bytes of a request; its first word is the call's number.
const SIZE: usize = 64;

/// What a caller's process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CallerJob {
    /// Where the servers listen, one after the other.
    pub path: PathBuf,
    /// Which caller this is.
    pub number: u64,
    /// How long to call.
    pub seconds: f64,
}

/// When the server was killed, CLOCK_MONOTONIC, ns.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Killed {
    /// That moment.
    pub kill_ns: u64,
}

/// What a caller has to tell.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Story {
    /// Number of its first call; they go on from there.
    pub first: u64,
    /// Calls that it made.
    pub calls: u64,
    /// Calls that were answered with something else than their answer.
    pub wrong: u64,
    /// Of those that were in flight at the kill: answered, and when.
    pub answered: Vec<(u64, u64)>,
    /// Which may or may not have been executed.
    pub unknown: Vec<u64>,
    /// Which failed otherwise, and how.
    pub failed: Vec<(u64, String)>,
}

/// One call, as its caller saw it.
struct Seen {
    number: u64,
    submitted_ns: u64,
    ended_ns: u64,
    outcome: Outcome,
}

enum Outcome {
    Answered,
    Wrong,
    Unknown,
    Failed(String),
}

fn request(number: u64) -> [u8; SIZE] {
    let mut request = [0; SIZE];
    work::fill(number, &mut request);
    request
}

fn judge(number: u64, result: Result<Vec<u8>, IpcError>) -> Outcome {
    match result {
        Ok(answer) if answer.len() == SIZE && work::check(number, &answer) => Outcome::Answered,
        Ok(_) => Outcome::Wrong,
        Err(IpcError::ConnectionLost) => Outcome::Unknown,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

fn hear<M: DeserializeOwned>() -> Result<M, BenchError> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(|e| BenchError::os("reading what to do", e))?;
    serde_json::from_str(&line).map_err(|e| BenchError::option("job", e.to_string()))
}

/// A caller's process: calls without pause, whatever becomes of the server.
///
/// # Errors
///
/// [`BenchError`] if there is no server to begin with, or none comes back.
pub fn run(job: &CallerJob) -> Result<(), BenchError> {
    let peer = |doing| move |error: IpcError| BenchError::peer(doing, error);
    let config = ClientConfig::for_load(IN_FLIGHT as u32 + 4, SIZE);
    let client = ReconnectingClient::connect_with(&job.path, &config, Reconnect::default());
    let client = client.map_err(peer("connecting"))?;
    let connection = client.open().map_err(peer("opening"))?;
    say(&())?;
    let () = hear()?;
    let first = (job.number + 1) << 32;
    let ends = now_ns() + (job.seconds * SECOND as f64) as u64;
    let (mut next, mut submitted, mut seen) = (first, HashMap::new(), Vec::new());
    loop {
        while now_ns() < ends && (submitted.len() as u64) < IN_FLIGHT {
            let options = CallOptions { tag: next, ..CallOptions::default() };
            match connection.submit(LOGGED, &request(next), &options) {
                Ok(_) => submitted.insert(next, now_ns()),
                // No server at the moment.
                Err(IpcError::WouldBlock) => break,
                Err(error) => return Err(peer("submitting")(error)),
            };
            next += 1;
        }
        while let Some(ended) = client.poll().map_err(peer("polling"))? {
            let (number, ended_ns) = (ended.tag, now_ns());
            let submitted_ns = submitted.remove(&number).unwrap_or_default();
            seen.push(Seen { number, submitted_ns, ended_ns, outcome: judge(number, ended.result) });
        }
        if now_ns() >= ends && submitted.is_empty() {
            break;
        }
        client.wait(Some(Duration::from_millis(10))).map_err(peer("waiting"))?;
    }
    say(&())?;
    let Killed { kill_ns } = hear()?;
    say(&tell(first, &seen, kill_ns))
}

fn tell(first: u64, seen: &[Seen], kill_ns: u64) -> Story {
    let mut story = Story { first, calls: seen.len() as u64, ..Story::default() };
    for call in seen {
        let in_flight = call.submitted_ns < kill_ns && call.ended_ns >= kill_ns;
        match &call.outcome {
            Outcome::Answered if in_flight => story.answered.push((call.number, call.ended_ns)),
            Outcome::Answered => {}
            Outcome::Wrong => story.wrong += 1,
            Outcome::Unknown => story.unknown.push(call.number),
            Outcome::Failed(how) => story.failed.push((call.number, how.clone())),
        }
    }
    story
}

/// What became of every call.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// All calls that were made.
    pub calls: u64,
    /// Those that were in flight at the kill.
    pub in_flight: u64,
    /// Of these: answered, executed by the server that was killed.
    pub answered: u64,
    /// Not executed by it, sent again, executed by the next one.
    pub resent: u64,
    /// May have been executed; their callers were told so.
    pub unknown: u64,
    /// Ended otherwise.
    pub failed: u64,
    /// Answers that were not those of their call, or of calls that nobody executed.
    pub wrong: u64,
    /// Calls that were executed twice.
    pub doubled: u64,
    /// When the last call that was sent again was answered, CLOCK_MONOTONIC, ns.
    pub last_resent_ns: u64,
}

impl Ledger {
    /// Sets what the callers tell against the log, whose entries are a server's number and a call's.
    pub fn draw(stories: &[Story], log: &[u8]) -> Self {
        let mut ledger = Self::default();
        let mut executed: HashMap<u64, u64> = HashMap::new();
        for entry in log.as_chunks::<LOG_ENTRY>().0 {
            let [server, number] =
                [0, 8].map(|at| u64::from_le_bytes(*entry[at..].first_chunk().unwrap_or(&[0; 8])));
            if executed.insert(number, server).is_some() {
                ledger.doubled += 1;
            }
        }
        for story in stories {
            ledger.calls += story.calls;
            ledger.wrong += story.wrong;
            ledger.unknown += story.unknown.len() as u64;
            ledger.failed += story.failed.len() as u64;
            for (number, ended_ns) in &story.answered {
                match executed.get(number) {
                    Some(1) => ledger.answered += 1,
                    Some(_) => {
                        ledger.resent += 1;
                        ledger.last_resent_ns = ledger.last_resent_ns.max(*ended_ns);
                    }
                    None => ledger.wrong += 1,
                }
            }
            let exempt = |number: &u64| {
                story.unknown.contains(number) || story.failed.iter().any(|(other, _)| other == number)
            };
            let missing = (story.first..story.first + story.calls)
                .filter(|number| !executed.contains_key(number))
                .filter(|number| !exempt(number));
            ledger.wrong += missing.count() as u64;
        }
        ledger.in_flight = ledger.answered + ledger.resent + ledger.unknown + ledger.failed;
        ledger
    }

    /// Whether nothing was wrong, doubled, or lost without a word.
    pub fn holds(&self) -> bool {
        self.wrong == 0 && self.doubled == 0 && self.failed == 0 && self.in_flight > 0
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { calls, in_flight, answered, resent, unknown, failed, wrong, doubled, .. } = self;
        writeln!(f, "of {calls} calls, each set against the log that the handlers wrote:")?;
        write!(
            f,
            "in flight {in_flight} = answered {answered} + provably not executed and resent {resent} + unknown {unknown}"
        )?;
        if *failed > 0 {
            write!(f, " + failed {failed}")?;
        }
        write!(f, "; wrong {wrong}, doubled {doubled}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(u64, u64)]) -> Vec<u8> {
        entries
            .iter()
            .flat_map(|(server, number)| [server.to_le_bytes(), number.to_le_bytes()].concat())
            .collect()
    }

    fn story(calls: u64, answered: &[u64], unknown: &[u64]) -> Story {
        let answered = answered.iter().map(|number| (*number, 1000 + number)).collect();
        Story { first: 10, calls, answered, unknown: unknown.to_vec(), ..Story::default() }
    }

    /// Goal:   the ledger balances, and says who executed what.
    #[test]
    fn every_call_is_accounted_for() {
        let stories = [story(5, &[11, 12, 13], &[14])];
        let ledger = Ledger::draw(&stories, &log(&[(1, 10), (1, 11), (2, 12), (2, 13), (1, 14)]));
        assert_eq!((ledger.answered, ledger.resent, ledger.unknown, ledger.in_flight), (1, 2, 1, 4));
        assert_eq!((ledger.wrong, ledger.doubled, ledger.last_resent_ns), (0, 0, 1013));
        assert!(ledger.holds());
    }

    /// Goal:   what is executed twice, or answered and not executed, is found.
    #[test]
    fn doubled_and_invented_answers_are_found() {
        let stories = [story(3, &[11, 12], &[])];
        let twice = Ledger::draw(&stories, &log(&[(1, 10), (1, 11), (2, 11), (2, 12)]));
        assert!(twice.doubled == 1 && !twice.holds());
        let invented = Ledger::draw(&stories, &log(&[(1, 10), (1, 11)]));
        assert!(invented.wrong > 0 && !invented.holds());
        let silent = Ledger::draw(&stories, &log(&[(1, 11), (1, 12)]));
        assert!(silent.wrong == 1 && !silent.holds(), "call 10 was answered before, and nobody executed it");
    }
}

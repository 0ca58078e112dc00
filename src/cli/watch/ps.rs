//! `doorbell ps`: calls in flight, and what each of them waits for.

use super::words::{bytes, table, time};
use super::{Watched, Where};
use clap::Args;
use doorbell::MessageType;
use doorbell::inspect::{CallReport, CallState, Inquiry, Report, type_name};
use serde::Serialize;
use std::error::Error;

/// Print the calls that a server has in flight, and what each of them waits for.
#[derive(Debug, Args)]
pub struct PsOptions {
    #[command(flatten)]
    at: Where,
    /// Only calls that have been under way for so many milliseconds, those that wait in the ring of a reactor that a
    /// handler holds up for as long, and such handlers.
    #[arg(long, value_name = "MS", num_args = 0..=1, default_missing_value = "1000")]
    stuck: Option<u64>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    running: Vec<doorbell::inspect::Running>,
    calls: Vec<&'a CallReport>,
    silent: &'a [u32],
}

impl<'a> Shown<'a> {
    fn of(report: &'a Report, stuck: Option<u64>) -> Self {
        let least_ns = stuck.unwrap_or(0).saturating_mul(1_000_000);
        let running: Vec<_> = report.running.iter().filter(|r| r.for_ns >= least_ns).copied().collect();
        let is_held_up = |reactor: u32| running.iter().any(|r| r.reactor == reactor);
        let is_shown = |call: &&CallReport| {
            // Not our own question.
            call.message_type != MessageType::INSPECT.0
                && match call.age_ns {
                    Some(age) => age >= least_ns,
                    None => stuck.is_none() || call.state != CallState::Queued || is_held_up(call.reactor),
                }
        };
        let mut calls: Vec<_> = report.calls.iter().filter(is_shown).collect();
        calls.sort_by_key(|call| std::cmp::Reverse(call.age_ns));
        Self { running, calls, silent: &report.silent }
    }

    fn text(&self) -> String {
        let mut rows: Vec<Vec<String>> = Vec::new();
        for of in &self.running {
            let state = format!("in a handler for {}", time(of.for_ns));
            let connection = format!("{:#x}", of.connection);
            let kind = type_name(of.message_type);
            rows.push([String::new(), connection, of.reactor.to_string(), kind, state].into());
            rows.last_mut().expect("just pushed").extend([time(of.for_ns), String::new(), String::new()]);
        }
        for call in &self.calls {
            rows.push(vec![
                call.session.to_string(),
                format!("{:#x}", call.connection),
                call.reactor.to_string(),
                type_name(call.message_type),
                state(call.state).to_owned(),
                call.age_ns.map_or_else(String::new, time),
                bytes(call.received),
                bytes(call.sent),
            ]);
        }
        let mut text = match rows.is_empty() {
            true => "no calls\n".to_owned(),
            false => {
                table(&["session", "connection", "reactor", "type", "state", "age", "in", "out"], 5, &rows)
            }
        };
        for reactor in self.silent {
            text += &format!(
                "reactor {reactor} does not answer: a handler holds it up, its other calls are not shown\n"
            );
        }
        text
    }
}

/// A state in words.
pub fn state(state: CallState) -> &'static str {
    match state {
        CallState::Queued => "queued",
        CallState::WaitingForFrames => "waiting for the client's next frame",
        CallState::WaitingForMemory => "waiting for memory",
        CallState::WaitingForCredit => "waiting for credit",
        CallState::WaitingForSpace => "waiting for completions to be taken",
        CallState::ReadingFile => "reading a file",
        CallState::Deferred => "deferred",
        CallState::Moving => "has its turn soon",
    }
}

/// Prints once.
pub fn run(options: &PsOptions) -> Result<(), Box<dyn Error>> {
    let watched = Watched::connect(&options.at, "ps")?;
    let report = watched.ask(&Inquiry { calls: true, ..Inquiry::default() })?;
    let shown = Shown::of(&report, options.stuck);
    match options.json {
        true => super::print(&(serde_json::to_string(&shown)? + "\n"))?,
        false => super::print(&shown.text())?,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(state: CallState, age_ns: Option<u64>) -> CallReport {
        CallReport {
            session: 3,
            connection: 0x10_0005,
            reactor: 1,
            message_type: 17,
            slot: 0,
            generation: 1,
            state,
            age_ns,
            received: 2048,
            sent: 0,
        }
    }

    /// Goal:   what is stuck is shown and what is not is left out; our own question never is.
    #[test]
    fn stuck_calls_are_those_that_have_been_long_under_way() {
        let own = CallReport { message_type: MessageType::INSPECT.0, ..call(CallState::Moving, Some(5)) };
        let mut report = Report {
            calls: vec![
                own,
                call(CallState::Queued, None),
                call(CallState::WaitingForCredit, Some(2_000_000_000)),
                call(CallState::Deferred, Some(5_000_000)),
            ],
            ..Report::default()
        };
        let states = |report: &Report, stuck| {
            Shown::of(report, stuck).calls.iter().map(|call| call.state).collect::<Vec<_>>()
        };
        use CallState::{Deferred, Queued, WaitingForCredit};
        assert_eq!(states(&report, None), [WaitingForCredit, Deferred, Queued]);
        assert_eq!(states(&report, Some(1000)), [WaitingForCredit]);
        report.running = vec![doorbell::inspect::Running {
            reactor: 1,
            message_type: 300,
            connection: 7,
            for_ns: 3_000_000_000,
        }];
        report.silent = vec![1];
        assert_eq!(states(&report, Some(1000)), [WaitingForCredit, Queued]);
        let text = Shown::of(&report, Some(1000)).text();
        for part in
            ["in a handler for 3.00 s", "0x100005", "waiting for credit", "chat", "reactor 1 does not answer"]
        {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}

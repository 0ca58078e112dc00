//! `doorbell trace`: the calls of one connection as a file for Chrome's or Perfetto's viewer, without any payload.

use super::{Watched, Where};
use clap::Args;
use doorbell::Status;
use doorbell::inspect::{Inquiry, Report, TracedCall, type_name};
use serde_json::{Value, json};
use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Trace the calls of one connection: a file for Perfetto (ui.perfetto.dev) or chrome://tracing.
#[derive(Debug, Args)]
pub struct TraceOptions {
    #[command(flatten)]
    at: Where,
    /// The connection's number, as `doorbell top` and `doorbell ps` show it; 0x before a hexadecimal one.
    #[arg(value_name = "CONNECTION", value_parser = number)]
    connection: u32,
    /// For how long.
    #[arg(long, value_name = "SECS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// The file [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Between two questions. A reactor keeps 1024 calls meanwhile: more than that are counted and not told.
const PAUSE: Duration = Duration::from_millis(20);

pub fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.ok().filter(|number| *number != 0).ok_or_else(|| "a connection's number is wanted".to_owned())
}

/// Traces and writes the file.
pub fn run(options: &TraceOptions) -> Result<(), Box<dyn Error>> {
    let watched = Watched::connect(&options.at, "trace")?;
    let first = watched.ask(&Inquiry { connections: true, ..Inquiry::default() })?;
    if !first.connections.iter().any(|of| of.connection == options.connection) {
        return Err(format!(
            "there is no connection {:#x}: `doorbell top` shows those that there are",
            options.connection
        )
        .into());
    }
    let inquiry = Inquiry { trace: options.connection, ..Inquiry::default() };
    let until = Instant::now() + Duration::from_secs(options.seconds);
    let (mut calls, mut untraced) = (Vec::new(), 0);
    loop {
        let report: Report = watched.ask(&inquiry)?;
        calls.extend(report.traced);
        untraced += report.untraced;
        if Instant::now() >= until {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    let text = serde_json::to_string(&events(&calls))? + "\n";
    match &options.output {
        Some(path) => {
            std::fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        None => {
            super::print(&text)?;
        }
    }
    eprintln!("{} calls traced, {untraced} left out because they came too fast", calls.len());
    Ok(())
}

/// Complete events: a process for each session, a thread for each reactor; long calls, which overlap, each on a line of
/// its own.
///
/// Source: the Trace Event Format, which both viewers read.
fn events(calls: &[TracedCall]) -> Value {
    let status =
        |code| Status::from_code(code).map_or_else(|| code.to_string(), |status| format!("{status:?}"));
    let event = |call: &TracedCall| {
        let line = if call.long { 1000 + u64::from(call.slot) } else { u64::from(call.reactor) };
        json!({
            "name": type_name(call.message_type),
            "cat": if call.long { "long" } else { "call" },
            "ph": "X",
            "ts": call.began_ns as f64 / 1000.0,
            "dur": call.ended_ns.saturating_sub(call.began_ns) as f64 / 1000.0,
            "pid": call.session,
            "tid": line,
            "args": {
                "connection": call.connection,
                "reactor": call.reactor,
                "slot": call.slot,
                "generation": call.generation,
                "status": status(call.status),
                "received": call.received,
                "sent": call.sent,
            },
        })
    };
    let mut events: Vec<Value> = calls.iter().map(event).collect();
    let mut names: Vec<(u32, u64, String)> = calls
        .iter()
        .map(|call| match call.long {
            true => (call.session, 1000 + u64::from(call.slot), format!("long calls in slot {}", call.slot)),
            false => (call.session, u64::from(call.reactor), format!("reactor {}", call.reactor)),
        })
        .collect();
    names.sort();
    names.dedup();
    for (pid, tid, name) in names {
        let named = |what: &str, name: &str| json!({"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}});
        events.push(named("process_name", &format!("session {pid}")));
        events.push(named("thread_name", &name));
    }
    json!({"displayTimeUnit": "ns", "traceEvents": events})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_shown() {
        assert_eq!((number("0x100005"), number("7")), (Ok(0x10_0005), Ok(7)));
        assert!(["", "0", "x", "0xg", "4294967296"].iter().all(|bad| number(bad).is_err()));
    }

    /// Goal:   every call is one complete event with its times in microseconds, on a line that has a name.
    #[test]
    fn calls_become_events() {
        let short = TracedCall {
            session: 3,
            connection: 7,
            reactor: 1,
            message_type: 2,
            slot: 5,
            generation: 9,
            long: false,
            began_ns: 1_500,
            ended_ns: 1_750,
            status: 0,
            received: 64,
            sent: 64,
        };
        let long = TracedCall { long: true, message_type: 300, status: 4, ..short };
        let value = events(&[short, short, long]);
        let all = value["traceEvents"].as_array().unwrap();
        let complete: Vec<_> = all.iter().filter(|event| event["ph"] == "X").collect();
        assert_eq!((complete.len(), all.len()), (3, 7));
        assert_eq!((complete[0]["ts"].as_f64(), complete[0]["dur"].as_f64()), (Some(1.5), Some(0.25)));
        assert_eq!((&complete[0]["name"], &complete[2]["name"]), (&json!("echo"), &json!("300")));
        assert_eq!(complete[2]["args"]["status"], "HandlerPanic");
    }
}

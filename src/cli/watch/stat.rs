//! `doorbell stat`: what a server has counted.

use super::words::{bytes, count, table, time};
use super::{Watched, Where};
use clap::Args;
use doorbell::TypeMetrics;
use doorbell::inspect::{Inquiry, Report, type_name};
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

/// Print what a server has counted.
#[derive(Debug, Args)]
pub struct StatOptions {
    #[command(flatten)]
    at: Where,
    /// Print one JSON object a time.
    #[arg(long)]
    json: bool,
    /// Go on, every so many seconds, with what came since the last time.
    #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    watch: Option<u64>,
}

/// Prints once, or for ever.
pub fn run(options: &StatOptions) -> Result<(), Box<dyn Error>> {
    let watched = Watched::connect(&options.at, "stat")?;
    let mut before: Option<Report> = None;
    loop {
        let report = watched.ask(&Inquiry::default())?;
        let text = match options.json {
            true => serde_json::to_string(&report)? + "\n",
            false => describe(&report, before.as_ref()),
        };
        let goes_on = super::print(&text)?;
        let Some(secs) = options.watch.filter(|_| goes_on) else { return Ok(()) };
        before = Some(report);
        std::thread::sleep(Duration::from_secs(secs));
    }
}

/// What came since `before`, or from the start, in words.
fn describe(report: &Report, before: Option<&Report>) -> String {
    let of = |name: &str| report.counter(name);
    let since = |name: &str| of(name).saturating_sub(before.map_or(0, |before| before.counter(name)));
    let mut text = String::new();
    let mut line = |name: &str, what: String| {
        writeln!(text, "{name:<12} {what}").expect("writing to a String cannot fail");
    };
    let rate = before.map_or_else(String::new, |before| {
        let seconds = (report.now_ns - before.now_ns) as f64 / 1e9;
        format!(" ({:.0}/s)", since("calls") as f64 / seconds)
    });
    let (errors, refused) =
        (since("calls") - since("calls_ok").min(since("calls")), since("sessions_refused"));
    line("server", format!("process {}, {} reactors", report.pid, report.reactors.len()));
    line(
        "sessions",
        format!("{} now, {} opened, {refused} refused", of("sessions_open"), since("sessions_opened")),
    );
    line("connections", format!("{} now, {} opened", of("connections_open"), since("connections_opened")));
    line(
        "calls",
        format!("{}{rate}, {errors} not ok, {} overruns", count(since("calls")), since("overruns")),
    );
    line("bytes", format!("{} in, {} out", bytes(since("bytes_in")), bytes(since("bytes_out"))));
    line(
        "memory",
        format!(
            "{} of {}, {} leased, {} for bodies",
            bytes(of("budget_used")),
            bytes(report.memory_budget),
            bytes(of("leased_bytes")),
            bytes(of("body_bytes"))
        ),
    );
    let waiting = ["entries_waiting", "answers_waiting", "exchanges_live", "deferred_live", "leases_waiting"];
    let [entries, answers, exchanges, deferred, leases] = waiting.map(of);
    line(
        "waiting",
        format!(
            "{entries} entries, {answers} answers, {exchanges} exchanges, {deferred} deferred, {leases} leases"
        ),
    );
    let (rung, awake, healed) = (since("wakes_rung"), since("wakes_suppressed"), since("sweeps_healed"));
    line("doorbells", format!("{} rung, {} not needed, {healed} healed", count(rung), count(awake)));
    text += "\n";
    text += &types(report, before);
    text += "\n";
    text += &reactors(report, before);
    text
}

fn types(report: &Report, before: Option<&Report>) -> String {
    let rows: Vec<Vec<String>> = report
        .types
        .iter()
        .map(|of| since(of, before))
        .filter(|of| of.calls() > 0)
        .map(|of| {
            let at = |share| of.quantile_ns(share).map_or_else(String::new, time);
            let mean = time(of.sum_ns / of.calls());
            vec![
                type_name(of.message_type),
                count(of.calls()),
                mean,
                at(0.5),
                at(0.9),
                at(0.99),
                at(0.999),
                time(of.longest_ns),
            ]
        })
        .collect();
    table(&["type", "calls", "mean", "p50", "p90", "p99", "p99.9", "longest"], 1, &rows)
}

/// What was counted of a type since `before`.
pub fn since(of: &TypeMetrics, before: Option<&Report>) -> TypeMetrics {
    let before = before.and_then(|b| b.types.iter().find(|earlier| earlier.message_type == of.message_type));
    before.map_or_else(|| of.clone(), |earlier| of.since(earlier))
}

fn reactors(report: &Report, before: Option<&Report>) -> String {
    let rows: Vec<Vec<String>> = report
        .reactors
        .iter()
        .enumerate()
        .map(|(i, now)| {
            let then = before.and_then(|before| before.reactors.get(i)).copied().unwrap_or_default();
            vec![
                i.to_string(),
                count(now.calls - then.calls),
                time(now.busy_ns - then.busy_ns),
                time(now.spun_ns - then.spun_ns),
                time(now.cpu_ns - then.cpu_ns),
                count(now.wakeups - then.wakeups),
                now.lanes_hot.to_string(),
            ]
        })
        .collect();
    table(&["reactor", "calls", "in calls", "polling", "cpu", "wakeups", "hot lanes"], 1, &rows)
}

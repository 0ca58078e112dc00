//! The text format of Prometheus. Written by hand: the crates for it either write OpenMetrics, whose types another
//! parser does not find, or want to own the counters, which here lie in the reactors. There are three shapes of lines,
//! and labels hold nothing but words of ours and numbers; tests have `promtool` read the result.
//!
//! Source: prometheus.io/docs/instrumenting/exposition_formats, "Text-based format".

use super::types::{BOUNDS_NS, OTHER_TYPES};
use super::{Metrics, TypeMetrics};
use crate::protocol::MessageType;
use crate::protocol::handshake::DisconnectReason;
use doorbell_shm::entry::Status;
use std::fmt::{Display, Write};

/// Writes families one after the other.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("writing to a String cannot fail");
    }

    fn sample(&mut self, name: &str, label: &str, of: impl Display, value: impl Display) {
        self.line(format_args!("{name}{{{label}=\"{of}\"}} {value}"));
    }

    /// A family of one sample.
    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.line(format_args!("{name} {value}"));
    }
}

const COUNTER: &str = "counter";
const GAUGE: &str = "gauge";

/// Nanoseconds as seconds, exactly and without superfluous zeros.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (whole, part) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        if part == 0 {
            return write!(f, "{whole}");
        }
        let digits = format!("{part:09}");
        write!(f, "{whole}.{}", digits.trim_end_matches('0'))
    }
}

/// The name of a type: that of the protocol, or its number.
struct TypeName(u32);

impl Display for TypeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match MessageType(self.0).name() {
            Some(name) => f.write_str(name),
            None if self.0 == OTHER_TYPES => f.write_str("other"),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A status as a label.
fn status_name(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::UnknownType => "unknown_type",
        Status::TooLarge => "too_large",
        Status::DecodeError => "decode_error",
        Status::HandlerPanic => "handler_panic",
        Status::DeadlineExceeded => "deadline_exceeded",
        Status::Cancelled => "cancelled",
        Status::Internal => "internal",
        Status::TakenBack => "taken_back",
        Status::Overloaded => "overloaded",
        Status::Upstream => "upstream",
    }
}

/// A reason as a label: its name in the code, in small letters.
fn reason_name(reason: DisconnectReason) -> String {
    let mut name = String::new();
    for c in format!("{reason:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}

pub(super) fn export(metrics: &Metrics) -> String {
    let mut text = Text(String::with_capacity(8 << 10));
    calls(&mut text, metrics);
    sessions(&mut text, metrics);
    memory(&mut text, metrics);
    queues(&mut text, metrics);
    doorbells(&mut text, metrics);
    reactors(&mut text, metrics);
    text.0
}

fn calls(text: &mut Text, metrics: &Metrics) {
    text.family("ipc_requests_total", COUNTER, "Calls that have ended, by message type.");
    for of in &metrics.types {
        text.sample("ipc_requests_total", "type", TypeName(of.message_type), of.calls());
    }
    let help = "Time from taking a call up to publishing its completion, by message type.";
    text.family("ipc_latency_seconds", "histogram", help);
    metrics.types.iter().for_each(|of| histogram(text, of));
    text.family("ipc_errors_total", COUNTER, "Calls that ended with another status than ok, by status.");
    for code in 1..metrics.calls.len() as u8 {
        if let Some(status) = Status::from_code(code) {
            text.sample("ipc_errors_total", "kind", status_name(status), metrics.calls[usize::from(code)]);
        }
    }
    text.one("ipc_received_bytes_total", COUNTER, "Bytes of requests copied in.", metrics.bytes_in);
    text.one("ipc_sent_bytes_total", COUNTER, "Bytes of answers copied out.", metrics.bytes_out);
    let help = "Calls that held up their reactor for longer than a turn may take.";
    text.one("ipc_handler_overruns_total", COUNTER, help, metrics.overruns);
}

/// Cumulative, as the format wants it: each bucket counts all calls up to its bound.
fn histogram(text: &mut Text, of: &TypeMetrics) {
    let name = TypeName(of.message_type);
    let mut below = 0;
    for (bound, count) in BOUNDS_NS.iter().zip(&of.buckets) {
        below += count;
        let le = Seconds(*bound);
        text.line(format_args!("ipc_latency_seconds_bucket{{type=\"{name}\",le=\"{le}\"}} {below}"));
    }
    let calls = of.calls();
    text.line(format_args!("ipc_latency_seconds_bucket{{type=\"{name}\",le=\"+Inf\"}} {calls}"));
    text.sample("ipc_latency_seconds_sum", "type", &name, Seconds(of.sum_ns));
    text.sample("ipc_latency_seconds_count", "type", &name, calls);
}

fn sessions(text: &mut Text, metrics: &Metrics) {
    text.one("ipc_connections", GAUGE, "Connections open now.", metrics.connections_open);
    let help = "Connections opened.";
    text.one("ipc_connections_opened_total", COUNTER, help, metrics.connections_opened);
    let help = "Connections refused because there were too many.";
    text.one("ipc_connections_refused_total", COUNTER, help, metrics.connections_refused);
    text.one("ipc_sessions", GAUGE, "Sessions, that is, attached clients.", metrics.sessions_open);
    text.one("ipc_sessions_opened_total", COUNTER, "Sessions opened.", metrics.sessions_opened);
    let help = "Clients refused at the handshake.";
    text.one("ipc_sessions_refused_total", COUNTER, help, metrics.sessions_refused);
    text.family("ipc_disconnects_total", COUNTER, "Sessions and handshakes ended, by reason.");
    for reason in DisconnectReason::ALL {
        text.sample("ipc_disconnects_total", "reason", reason_name(reason), metrics.ended(reason));
    }
    let help = "Clients that could not be accepted for want of file descriptors.";
    text.one("ipc_accepts_failed_total", COUNTER, help, metrics.accepts_failed);
    text.one(
        "ipc_further_lanes",
        GAUGE,
        "Lanes beside those that sessions begin with.",
        metrics.further_lanes,
    );
}

fn memory(text: &mut Text, metrics: &Metrics) {
    text.family("ipc_memory_bytes", GAUGE, "Memory by use; leased is part of budget.");
    for (kind, bytes) in [
        ("budget", metrics.budget_used),
        ("leased", metrics.leased_bytes),
        ("bodies", metrics.body_bytes),
        ("staged", metrics.staged_bytes),
    ] {
        text.sample("ipc_memory_bytes", "kind", kind, bytes);
    }
    let help = "Memory budget of a server of up to a hundred sessions.";
    text.one("ipc_memory_budget_bytes", GAUGE, help, metrics.memory_budget);
    text.one("ipc_leases_granted_total", COUNTER, "Leases of slots granted.", metrics.leases_granted);
    let help = "Leases that had to wait for memory.";
    text.one("ipc_leases_waited_total", COUNTER, help, metrics.leases_waited);
    let help = "Time that leases waited for memory.";
    text.one("ipc_lease_wait_seconds_total", COUNTER, help, Seconds(metrics.lease_wait_ns));
    let help = "Leases taken back from lanes that stood still.";
    text.one("ipc_leases_forced_total", COUNTER, help, metrics.leases_forced);
    let help = "Requests that had to wait for memory to be put together in.";
    text.one("ipc_bodies_waited_total", COUNTER, help, metrics.bodies_waited);
    let help = "Times that a client was found to use pages that it was not granted.";
    text.one("ipc_excess_found_total", COUNTER, help, metrics.excess_found);
}

fn queues(text: &mut Text, metrics: &Metrics) {
    text.family("ipc_queue_depth", GAUGE, "What waits, by what it waits in or for.");
    for (queue, depth) in [
        ("submissions", metrics.entries_waiting),
        ("completions", metrics.answers_waiting),
        ("exchanges", metrics.exchanges_live),
        ("deferred", metrics.deferred_live),
        ("detached", metrics.deferred_detached),
        ("files", metrics.jobs_live),
        ("bodies", metrics.bodies_waiting),
        ("leases", metrics.leases_waiting),
    ] {
        text.sample("ipc_queue_depth", "queue", queue, depth);
    }
    let help = "Calls refused because too many were answered from elsewhere.";
    text.one("ipc_deferred_refused_total", COUNTER, help, metrics.deferred_refused);
    text.one("ipc_files_read_total", COUNTER, "Files read for clients.", metrics.files_read);
    let help = "Files that were asked for and not analysed.";
    text.one("ipc_files_refused_total", COUNTER, help, metrics.files_refused);
}

fn doorbells(text: &mut Text, metrics: &Metrics) {
    text.one("ipc_wakes_rung_total", COUNTER, "Wakes sent to clients.", metrics.wakes_rung);
    let help = "Answers, or groups of them, whose client was awake and not rung for.";
    text.one("ipc_wakes_suppressed_total", COUNTER, help, metrics.wakes_suppressed);
    let help = "Times that a lane was left alone because its client rings without cause.";
    text.one("ipc_storms_damped_total", COUNTER, help, metrics.storms_damped);
    text.one("ipc_sweeps_total", COUNTER, "Sweeps over all lanes.", metrics.sweeps);
    let help = "Lanes in which a sweep found work that no bell had told of.";
    text.one("ipc_sweeps_healed_total", COUNTER, help, metrics.sweeps_healed);
}

fn reactors(text: &mut Text, metrics: &Metrics) {
    type Of = fn(&super::ReactorMetrics) -> String;
    let families: [(&str, &str, &str, Of); 6] = [
        ("ipc_reactor_calls_total", COUNTER, "Calls answered, by reactor.", |r| r.calls.to_string()),
        ("ipc_reactor_busy_seconds_total", COUNTER, "Time in which calls were run, by reactor.", |r| {
            Seconds(r.busy_ns).to_string()
        }),
        ("ipc_reactor_polling_seconds_total", COUNTER, "Time of polling for calls, by reactor.", |r| {
            Seconds(r.spun_ns).to_string()
        }),
        ("ipc_reactor_cpu_seconds_total", COUNTER, "Processor time of the thread, by reactor.", |r| {
            Seconds(r.cpu_ns).to_string()
        }),
        ("ipc_reactor_wakeups_total", COUNTER, "Times that a sleeping reactor woke, by reactor.", |r| {
            r.wakeups.to_string()
        }),
        ("ipc_reactor_hot_lanes", GAUGE, "Lanes that are polled, by reactor.", |r| r.lanes_hot.to_string()),
    ];
    for (name, kind, help, of) in families {
        text.family(name, kind, help);
        for (i, reactor) in metrics.reactors.iter().enumerate() {
            text.sample(name, "reactor", i, of(reactor));
        }
    }
    text.one("ipc_ring_enters_total", COUNTER, "System calls that entered an io_uring.", metrics.enters);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::types::{BUCKETS, bucket};

    fn counted() -> Metrics {
        let mut metrics = Metrics { reactors: vec![Default::default(); 2], ..Metrics::default() };
        let mut buckets = [0; BUCKETS];
        (buckets[0], buckets[bucket(1_000_000)], buckets[BUCKETS - 1]) = (5, 3, 1);
        let of = |message_type| TypeMetrics { message_type, sum_ns: 123_000_000_001, longest_ns: 1, buckets };
        metrics.types = vec![of(2), of(300), of(OTHER_TYPES)];
        metrics.counters.calls[Status::HandlerPanic as usize] = 7;
        metrics
    }

    fn value(text: &str, sample: &str) -> String {
        let line = text.lines().find(|line| line.split(' ').next() == Some(sample));
        line.unwrap_or_else(|| panic!("no {sample}")).rsplit(' ').next().unwrap().to_owned()
    }

    /// Goal:   trap 27: histograms are cumulative, the last bucket is `+Inf`, and `_sum` and `_count` go with it.
    #[test]
    fn trap27_r4_2_histograms_are_cumulative_with_inf_sum_and_count() {
        let text = counted().export_prometheus();
        for name in ["echo", "300", "other"] {
            let at = |le: &str| {
                value(&text, &format!("ipc_latency_seconds_bucket{{type=\"{name}\",le=\"{le}\"}}"))
            };
            let told = ["0.00000025", "0.0005", "0.001", "0.01", "0.1", "120", "+Inf"].map(at);
            assert_eq!(told, ["5", "5", "8", "8", "8", "8", "9"]);
            assert_eq!(value(&text, &format!("ipc_latency_seconds_count{{type=\"{name}\"}}")), "9");
            assert_eq!(value(&text, &format!("ipc_latency_seconds_sum{{type=\"{name}\"}}")), "123.000000001");
            assert_eq!(value(&text, &format!("ipc_requests_total{{type=\"{name}\"}}")), "9");
        }
        assert_eq!(value(&text, "ipc_errors_total{kind=\"handler_panic\"}"), "7");
    }

    /// Goal:   every sample belongs to a family that was announced once, with help and type, before it.
    #[test]
    fn r4_2_every_sample_has_its_help_and_type() {
        let text = counted().export_prometheus();
        let mut families: Vec<&str> = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["#", "HELP", name, _, ..] => {
                    assert!(!families.contains(&name), "{name} twice");
                    families.push(name);
                }
                ["#", "TYPE", name, kind] => {
                    assert_eq!(families.last(), Some(&name));
                    assert_eq!(kind == COUNTER, name.ends_with("_total"), "{name}");
                }
                [sample, number] => {
                    let family = families.last().unwrap();
                    assert!(sample.starts_with(family), "{sample} below {family}");
                    assert!(number.parse::<f64>().is_ok_and(|n| n >= 0.0), "{line}");
                }
                _ => panic!("{line}"),
            }
        }
        assert!(families.len() > 30 && text.ends_with('\n'));
    }

    #[test]
    fn seconds_are_written_exactly() {
        let told = [0, 1, 250, 1_000_000_000, 120_500_000_000].map(|ns| Seconds(ns).to_string());
        assert_eq!(told, ["0", "0.000000001", "0.00000025", "1", "120.5"]);
    }

    #[test]
    fn reasons_are_words() {
        assert_eq!(reason_name(DisconnectReason::ProtocolViolation), "protocol_violation");
    }
}

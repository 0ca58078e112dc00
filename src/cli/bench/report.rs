//! What a run found, as one JSON object or as a table.

use super::histogram::Latencies;
use super::load::LoadResult;
use super::memory::Memory;
use super::options::{BenchOptions, PeerKind, Placement, Policy};
use super::placement;
use super::probe::ProbeResult;
use super::server::Counters;
use serde::Serialize;
use std::fmt;

/// The figures of one run. Field names and order are those of the JSON object; `None` is null: it has no
/// meaning here, or could not be had.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)] // The names are the documentation: they are the interface's own.
pub struct BenchReport {
    pub peer: PeerKind,
    pub policy: Policy,
    pub placement: Placement,
    pub connections: u64,
    pub sessions: Option<u64>,
    pub processes: u64,
    pub reactors: Option<u64>,
    pub size: u64,
    pub in_flight: u64,
    pub think_us: u64,
    pub rate: Option<f64>,
    pub seconds: f64,
    pub requests: u64,
    pub errors: u64,
    pub per_second: Option<f64>,
    pub p50_ns: Option<u64>,
    pub p90_ns: Option<u64>,
    pub p99_ns: Option<u64>,
    pub p999_ns: Option<u64>,
    pub max_ns: Option<u64>,
    pub in_flight_mean: Option<f64>,
    pub server_cpu_percent: Option<f64>,
    pub client_cpu_percent: Option<f64>,
    pub machine_cores: u64,
    pub server_cpu_ns_per_request: Option<f64>,
    pub server_wakeups: Option<u64>,
    pub server_sweeps: Option<u64>,
    pub server_syscalls: Option<u64>,
    pub server_rss_bytes: Option<u64>,
    pub shared_bytes: Option<u64>,
    pub footprint_bytes: Option<u64>,
    pub footprint_idle_bytes: Option<u64>,
    pub connect_last_ms: Option<f64>,
    pub hiccup_max_ns: Option<u64>,
    pub floor_p50_ns: Option<u64>,
    pub floor_p99_ns: Option<u64>,
    pub floor_per_second: Option<f64>,
    pub floor_p999_ns: Option<u64>,
    pub floor_max_ns: Option<u64>,
    pub idle: bool,
    pub hogs: bool,
    pub think_random: bool,
    pub seed: Option<u32>,
    pub probe_size: Option<u64>,
    pub probe_requests: Option<u64>,
    pub probe_p50_ns: Option<u64>,
    pub probe_p99_ns: Option<u64>,
    pub probe_p999_ns: Option<u64>,
    pub probe_max_ns: Option<u64>,
    pub probe_errors: Option<u64>,
    pub probe_alone_p50_ns: Option<u64>,
    pub probe_alone_p99_ns: Option<u64>,
    pub probe_process: bool,
    pub memory_budget_bytes: Option<u64>,
    pub footprint_after_bytes: Option<u64>,
    pub frames: Option<u64>,
    pub half_open: u64,
}

impl BenchReport {
    /// What is known before anything ran: the options, and how many reactors the server has if it is ours.
    pub fn new(options: &BenchOptions, reactors: usize) -> Self {
        let doorbell = options.peer == PeerKind::Doorbell;
        let ours = doorbell && options.socket.is_none();
        Self {
            peer: options.peer,
            policy: options.policy,
            placement: options.placement,
            connections: options.connections as u64,
            sessions: doorbell.then_some(options.sessions as u64),
            processes: options.processes as u64,
            reactors: ours.then_some(reactors as u64),
            size: options.size as u64,
            in_flight: options.in_flight as u64,
            think_us: options.think_us,
            rate: options.rate,
            seconds: options.seconds,
            requests: 0,
            errors: 0,
            per_second: None,
            p50_ns: None,
            p90_ns: None,
            p99_ns: None,
            p999_ns: None,
            max_ns: None,
            in_flight_mean: None,
            server_cpu_percent: None,
            client_cpu_percent: None,
            machine_cores: placement::machine_cores(),
            server_cpu_ns_per_request: None,
            server_wakeups: None,
            server_sweeps: None,
            server_syscalls: None,
            server_rss_bytes: None,
            shared_bytes: None,
            footprint_bytes: None,
            footprint_idle_bytes: None,
            connect_last_ms: None,
            hiccup_max_ns: None,
            floor_p50_ns: None,
            floor_p99_ns: None,
            floor_per_second: None,
            floor_p999_ns: None,
            floor_max_ns: None,
            idle: options.idle,
            hogs: options.hogs,
            think_random: options.think_random,
            seed: options.seed.filter(|_| options.think_random),
            probe_size: options.probe.map(|size| size as u64),
            probe_requests: None,
            probe_p50_ns: None,
            probe_p99_ns: None,
            probe_p999_ns: None,
            probe_max_ns: None,
            probe_errors: None,
            probe_alone_p50_ns: None,
            probe_alone_p99_ns: None,
            probe_process: options.probe_process,
            memory_budget_bytes: None,
            footprint_after_bytes: None,
            frames: None,
            half_open: options.half_open as u64,
        }
    }

    /// Adds up what the client processes found.
    pub fn add_load(&mut self, results: &[LoadResult]) {
        let summary = Summary::of(results);
        self.requests = summary.requests;
        self.errors = summary.errors;
        self.per_second = Some(summary.per_second);
        self.p50_ns = summary.latencies.quantile(0.5);
        self.p90_ns = summary.latencies.quantile(0.9);
        self.p99_ns = summary.latencies.quantile(0.99);
        self.p999_ns = summary.latencies.quantile(0.999);
        self.max_ns = summary.latencies.max();
        self.in_flight_mean = Some(summary.in_flight_mean);
        self.client_cpu_percent = Some(summary.cpu_percent);
        self.frames = results.iter().filter_map(|result| result.frames).reduce(|a, b| a + b);
        if let Some(probe) = results.iter().find_map(|result| result.probe.as_ref()) {
            self.add_probe(probe);
        }
    }

    fn add_probe(&mut self, probe: &ProbeResult) {
        let latencies = Latencies::from_sparse(&probe.latencies);
        self.probe_requests = Some(probe.requests);
        self.probe_errors = Some(self.probe_errors.unwrap_or_default() + probe.errors);
        self.probe_p50_ns = latencies.quantile(0.5);
        self.probe_p99_ns = latencies.quantile(0.99);
        self.probe_p999_ns = latencies.quantile(0.999);
        self.probe_max_ns = latencies.max();
    }

    /// What the probe found while there was no load. Its errors count with those beside the load.
    pub fn add_probe_alone(&mut self, results: &[LoadResult]) {
        let Some(probe) = results.iter().find_map(|result| result.probe.as_ref()) else { return };
        let latencies = Latencies::from_sparse(&probe.latencies);
        self.probe_errors = Some(self.probe_errors.unwrap_or_default() + probe.errors);
        self.probe_alone_p50_ns = latencies.quantile(0.5);
        self.probe_alone_p99_ns = latencies.quantile(0.99);
    }

    /// What the server counted over the window.
    pub fn add_counters(&mut self, counters: &Counters) {
        self.server_wakeups = counters.wakeups;
        self.server_sweeps = counters.sweeps;
        self.server_syscalls = counters.syscalls;
    }

    /// Errors of the load and of what ran beside it.
    pub fn all_errors(&self) -> u64 {
        self.errors + self.probe_errors.unwrap_or_default()
    }

    /// The floor of the same run.
    pub fn add_floor(&mut self, result: &LoadResult) {
        let summary = Summary::of(std::slice::from_ref(result));
        self.errors += if self.peer == PeerKind::Floor { 0 } else { summary.errors };
        self.floor_p50_ns = summary.latencies.quantile(0.5);
        self.floor_p99_ns = summary.latencies.quantile(0.99);
        self.floor_per_second = Some(summary.per_second);
        self.floor_p999_ns = summary.latencies.quantile(0.999);
        self.floor_max_ns = summary.latencies.max();
    }

    /// The server's processor time over `wall_ns`.
    pub fn add_server_cpu(&mut self, cpu_ns: Option<u64>, wall_ns: u64) {
        let share = cpu_ns.map(|cpu| cpu as f64 / wall_ns as f64);
        self.server_cpu_percent = share.map(|share| share * 100.0);
        let per_second = self.per_second.filter(|n| *n > 0.0);
        self.server_cpu_ns_per_request = share.zip(per_second).map(|(share, n)| share * 1e9 / n);
    }

    /// Peaks, and what there was before the load. Without segments there is nothing shared to speak of.
    pub fn add_memory(&mut self, peak: Option<Memory>, idle: Option<Memory>, has_segments: bool) {
        self.server_rss_bytes = peak.map(|m| m.rss);
        self.shared_bytes = peak.filter(|_| has_segments).map(|m| m.shared);
        self.footprint_bytes = peak.map(|m| m.footprint);
        self.footprint_idle_bytes = idle.map(|m| m.footprint);
    }

    /// One line of JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and names are JSON")
    }
}

struct Summary {
    requests: u64,
    errors: u64,
    per_second: f64,
    in_flight_mean: f64,
    cpu_percent: f64,
    latencies: Latencies,
}

impl Summary {
    fn of(results: &[LoadResult]) -> Self {
        let mut latencies = Latencies::new();
        results.iter().for_each(|r| latencies.merge(&Latencies::from_sparse(&r.latencies)));
        Self {
            requests: results.iter().map(|r| r.requests).sum(),
            errors: results.iter().map(|r| r.errors).sum(),
            per_second: results.iter().map(|r| r.requests as f64 * 1e9 / r.window_ns as f64).sum(),
            in_flight_mean: results.iter().map(|r| r.in_flight_mean).sum(),
            cpu_percent: results.iter().map(|r| r.cpu_ns as f64 * 100.0 / r.window_ns as f64).sum(),
            latencies,
        }
    }
}

/// The table: what is unknown or has no meaning is left out.
impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows();
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        rows.iter().try_for_each(|(name, value)| writeln!(f, "{name:<width$}  {value}"))
    }
}

impl BenchReport {
    fn rows(&self) -> Vec<(&'static str, String)> {
        let lower = |value: &dyn fmt::Debug| format!("{value:?}").to_lowercase();
        let mut rows = vec![
            ("peer", format!("{}, {}, {}", lower(&self.peer), lower(&self.policy), lower(&self.placement))),
            ("load", self.load()),
        ];
        let mut row = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
        let answered = |n| {
            format!(
                "{} in {} s, {} per second{}, {} errors",
                self.requests,
                self.seconds,
                count(n),
                self.frames.map(|frames| format!(", {frames} frames of answers")).unwrap_or_default(),
                self.errors
            )
        };
        row("answered", self.per_second.map(answered));
        row("latency", self.latency());
        row("probe", self.probe());
        row("in flight", self.in_flight_mean.map(|n| format!("{n:.1} on average")));
        row("server", self.server());
        row(
            "client",
            self.client_cpu_percent.map(|n| format!("{n:.1} % of one core, of {}", self.machine_cores)),
        );
        row("memory", self.memory());
        row("connect", self.connect_last_ms.map(|ms| format!("{ms:.3} ms for the last session")));
        row(
            "hiccup",
            self.hiccup_max_ns.map(|ns| format!("{} taken from a spinning thread at most", time(ns))),
        );
        row("floor", self.floor());
        row("against floor", self.against_floor());
        rows
    }

    fn load(&self) -> String {
        let mut load =
            format!("{} connections x {} in flight, {} bytes", self.connections, self.in_flight, self.size);
        let parts = [
            self.sessions.map(|n| format!("{n} sessions")),
            Some(format!("{} client processes", self.processes)),
            (self.think_us > 0).then(|| format!("{} µs between calls", self.think_us)),
            self.seed.map(|seed| format!("at random from seed {seed}")),
            self.rate.map(|rate| format!("{rate} per second in all")),
            self.hogs.then(|| "a busy process on every core".to_owned()),
            self.idle.then(|| format!("nothing sent for {} s", self.seconds)),
            (self.half_open > 0).then(|| format!("beside {} sockets without a hello", self.half_open)),
        ];
        parts.into_iter().flatten().for_each(|part| load += &format!(", {part}"));
        load
    }

    fn latency(&self) -> Option<String> {
        let names = ["p50", "p90", "p99", "p99.9", "max"];
        times(&names, &[self.p50_ns, self.p90_ns, self.p99_ns, self.p999_ns, self.max_ns])
    }

    fn probe(&self) -> Option<String> {
        let values = [self.probe_p50_ns, self.probe_p99_ns, self.probe_p999_ns, self.probe_max_ns];
        let (answered, errors, size) = (self.probe_requests?, self.probe_errors?, self.probe_size?);
        let beside = times(&["p50", "p99", "p99.9", "max"], &values).unwrap_or_default();
        let values = [self.probe_alone_p50_ns, self.probe_alone_p99_ns];
        let alone =
            times(&["p50", "p99"], &values).map(|alone| format!("; alone {alone}")).unwrap_or_default();
        Some(format!("{answered} interactive calls of {size} bytes, {errors} errors, {beside}{alone}"))
    }

    fn server(&self) -> Option<String> {
        let parts = [
            self.server_cpu_percent.map(|n| format!("{n:.1} % of one core")),
            self.server_cpu_ns_per_request.map(|n| format!("{n:.0} ns per request")),
            self.server_wakeups.map(|n| format!("{n} wakeups")),
            self.server_sweeps.map(|n| format!("{n} sweeps")),
            self.server_syscalls.map(|n| format!("{n} system calls")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }

    fn memory(&self) -> Option<String> {
        let kib = |bytes: u64| format!("{} KiB", bytes / 1024);
        let mut memory = format!("{} resident", kib(self.server_rss_bytes?));
        let parts = [
            self.shared_bytes.map(|n| format!("{} shared", kib(n))),
            self.footprint_bytes.map(|n| format!("{} footprint", kib(n))),
            self.footprint_idle_bytes.map(|n| format!("{} of it before the load", kib(n))),
            self.footprint_after_bytes.map(|n| format!("{} a second after it", kib(n))),
            self.memory_budget_bytes.map(|n| format!("the budget is {}", kib(n))),
        ];
        parts.into_iter().flatten().for_each(|part| memory += &format!(", {part}"));
        Some(memory)
    }

    fn floor(&self) -> Option<String> {
        let (p50, p99) = (self.floor_p50_ns?, self.floor_p99_ns?);
        let max = time(self.floor_max_ns?);
        let n = count(self.floor_per_second?);
        Some(format!("p50 {}, p99 {}, max {max}, {n} per second", time(p50), time(p99)))
    }

    fn against_floor(&self) -> Option<String> {
        let ratio = |ours: u64, floor: Option<u64>| Some(ours as f64 / floor.filter(|n| *n > 0)? as f64);
        let p50 = ratio(self.p50_ns?, self.floor_p50_ns)?;
        let p99 = ratio(self.p99_ns?, self.floor_p99_ns)?;
        let throughput = self.per_second? / self.floor_per_second.filter(|n| *n > 0.0)?;
        Some(format!("p50 x {p50:.2}, p99 x {p99:.2}, throughput x {throughput:.2}"))
    }
}

/// Times with their names, if all are known.
fn times(names: &[&str], values: &[Option<u64>]) -> Option<String> {
    let each = names.iter().zip(values).map(|(name, ns)| Some(format!("{name} {}", time((*ns)?))));
    each.collect::<Option<Vec<_>>>().map(|each| each.join(", "))
}

/// A time with three or more significant digits.
fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} µs", ns as f64 / 1e3),
        _ => format!("{:.1} ms", ns as f64 / 1e6),
    }
}

/// A count per second.
fn count(n: f64) -> String {
    match n {
        n if n >= 1e6 => format!("{:.2} M", n / 1e6),
        n if n >= 1e4 => format!("{:.1} k", n / 1e3),
        n => format!("{n:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchOptions,
    }

    fn report() -> BenchReport {
        report_of(&[])
    }

    fn report_of(arguments: &[&str]) -> BenchReport {
        BenchReport::new(&Cli::parse_from([&["bench"], arguments].concat()).bench, 2)
    }

    fn result(requests: u64, window_ns: u64, latency: u64) -> LoadResult {
        let mut latencies = Latencies::new();
        latencies.record(latency);
        let latencies = latencies.to_sparse();
        let (in_flight_mean, cpu_ns) = (2.0, window_ns / 2);
        LoadResult {
            requests,
            window_ns,
            errors: 1,
            in_flight_mean,
            cpu_ns,
            latencies,
            frames: None,
            probe: None,
        }
    }

    /// Goal:   the JSON object has exactly the keys of the interface, in order, strings first.
    #[test]
    fn the_keys_are_the_interface() {
        let keys = "peer policy placement connections sessions processes reactors size in_flight think_us rate \
            seconds requests errors per_second p50_ns p90_ns p99_ns p999_ns max_ns in_flight_mean \
            server_cpu_percent client_cpu_percent machine_cores server_cpu_ns_per_request server_wakeups \
            server_sweeps server_syscalls server_rss_bytes shared_bytes footprint_bytes footprint_idle_bytes \
            connect_last_ms hiccup_max_ns floor_p50_ns floor_p99_ns floor_per_second \
            floor_p999_ns floor_max_ns idle hogs think_random seed probe_size probe_requests probe_p50_ns \
             probe_p99_ns probe_p999_ns probe_max_ns probe_errors probe_alone_p50_ns probe_alone_p99_ns \
             probe_process memory_budget_bytes footprint_after_bytes frames half_open";
        let json = report().to_json();
        let written: Vec<&str> =
            json.trim_matches(['{', '}']).split(',').map(|field| field.split('"').nth(1).unwrap()).collect();
        assert_eq!(written, keys.split_whitespace().collect::<Vec<_>>());
        assert!(
            json.starts_with(r#"{"peer":"doorbell","policy":"spin","placement":"apart","connections":1,"#)
        );
        assert!(json.contains(r#""rate":null"#));
    }

    #[test]
    fn only_a_server_of_ours_has_a_known_number_of_reactors() {
        assert_eq!(report().reactors, Some(2));
        assert_eq!(report_of(&["--peer", "uds"]).reactors, None);
        assert_eq!(report_of(&["--socket", "/run/x"]).reactors, None);
    }

    #[test]
    fn the_probe_is_reported_for_itself_and_its_errors_fail_the_run() {
        let mut report = report_of(&["--probe", "100"]);
        let mut with_probe = result(1000, 1_000_000_000, 500);
        let probe = ProbeResult { requests: 7, errors: 2, latencies: result(0, 1, 900).latencies };
        with_probe.probe = Some(probe);
        report.add_load(&[result(10, 1_000_000_000, 100), with_probe]);
        assert_eq!(
            (report.max_ns, report.probe_max_ns, report.probe_p50_ns),
            (Some(500), Some(900), Some(900))
        );
        assert_eq!((report.errors, report.probe_errors, report.all_errors()), (2, Some(2), 4));
        assert!(report.to_string().contains("7 interactive calls of 100 bytes, 2 errors, p50 900 ns"));
    }

    #[test]
    fn client_processes_add_up() {
        let mut report = report();
        report.add_load(&[result(1000, 1_000_000_000, 500), result(1000, 2_000_000_000, 700)]);
        assert_eq!((report.requests, report.errors, report.max_ns), (2000, 2, Some(700)));
        assert_eq!((report.per_second, report.client_cpu_percent), (Some(1500.0), Some(100.0)));
        report.add_server_cpu(Some(300_000_000), 1_000_000_000);
        assert_eq!(report.server_cpu_ns_per_request, Some(200_000.0));
        report.add_floor(&result(3000, 1_000_000_000, 250));
        let table = report.to_string();
        assert!(table.contains("throughput x 0.50"), "{table}");
        assert_eq!(
            table.lines().map(|line| line.find("  ").is_some()).filter(|ok| *ok).count(),
            table.lines().count()
        );
    }

    #[test]
    fn what_is_unknown_is_left_out_of_the_table() {
        let table = report().to_string();
        assert_eq!(table.lines().count(), 2, "{table}");
    }
}

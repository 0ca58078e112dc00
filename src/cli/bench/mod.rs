//! `doorbell bench`: starts a server process and client processes, drives them, watches them, reports.
//!
//! This process measures nothing itself but the floor and the machine's hiccups; the clients run in processes
//! of their own (`worker.rs`), the server in another (trap 22). Order of a run: hiccups, floor, server,
//! clients, memory before the load, warm-up, window, hiccups again.

pub mod child;
pub mod clock;
pub mod doorbell;
pub mod error;
pub mod floor;
pub mod floor_long;
pub mod floor_stream;
pub mod histogram;
pub mod hog;
pub mod load;
pub mod long;
pub mod memory;
pub mod options;
pub mod placement;
pub mod probe;
pub mod procfs;
pub mod report;
pub mod server;
pub mod silent;
pub mod stream;
pub mod uds;
pub mod uds_long;
pub mod work;
pub mod worker;

use child::Process;
use clock::{SECOND, now_ns, sleep_until};
use error::BenchError;
use floor::Floor;
use floor_long::LongFloor;
use load::{LoadResult, Schedule};
use memory::{Probe, Sampler, Segments};
use options::{BenchOptions, PeerKind};
use placement::Cpus;
use report::BenchReport;
use server::{Counters, Server};
use std::io::IsTerminal;
use worker::{ClientJob, Ready};

/// What every load begins with and no figure contains.
const WARM_UP_NS: u64 = 300_000_000;
/// The length of each of the two hiccup measurements, if the window is as long.
const HICCUP_SECONDS: f64 = 2.0;

/// Runs one benchmark. [`BenchReport::errors`] above 0 is a failure too.
///
/// # Errors
///
/// [`BenchError`]: refused options, or whatever stopped the run.
pub fn run(options: &BenchOptions) -> Result<BenchReport, BenchError> {
    options.validate()?;
    let options = &with_seed(options);
    let cpus = placement::plan(options.placement, options.policy, options.reactors())?;
    warn_of_siblings(&cpus);
    let mut report = BenchReport::new(options, cpus.reactors.count);
    if options.peer == PeerKind::Doorbell && options.socket.is_none() {
        report.memory_budget_bytes = Some(announced_budget(options, &cpus));
    }
    if options.connect_only {
        connect_only(options, &cpus, &mut report)?;
        return Ok(report);
    }
    if options.idle {
        measure_idle(options, &cpus, &mut report)?;
        return Ok(report);
    }
    progress("how long does the machine take a core away");
    let hiccup_seconds = HICCUP_SECONDS.min(options.seconds);
    let before = clock::hiccup(cpus.client(0), hiccup_seconds)?;
    if options.peer == PeerKind::Floor {
        floor_alone(options, &cpus, &mut report)?;
    } else {
        if options.wants_floor() {
            progress("the floor");
            let window_ns = floor::window_ns(options.seconds);
            report.add_floor(&measure_floor(options, &cpus, window_ns)?.result);
        }
        measure_peer(options, &cpus, &mut report)?;
    }
    progress("hiccups again");
    report.hiccup_max_ns = Some(before.max(clock::hiccup(cpus.client(0), hiccup_seconds)?));
    Ok(report)
}

/// The server's memory budget, bytes; says so if it had to be raised.
fn announced_budget(options: &BenchOptions, cpus: &Cpus) -> u64 {
    let budget = doorbell::memory_budget(options, cpus.reactors.count);
    let usual = ::doorbell::ServerConfig::default().memory_budget;
    if options.memory_budget.is_none() && budget > usual {
        eprintln!(
            "bench: memory budget raised from {usual} to {budget} bytes: base slots of the sessions need it"
        );
    }
    budget
}

/// Draws a seed where one is needed and none was given.
fn with_seed(options: &BenchOptions) -> BenchOptions {
    let mut options = options.clone();
    if options.think_random && options.seed.is_none() {
        options.seed = Some(now_ns() as u32);
    }
    options
}

/// Prints a report as the options want it.
pub fn print(options: &BenchOptions, report: &BenchReport) {
    if options.json {
        println!("{}", report.to_json());
    } else {
        print!("{report}");
    }
}

fn progress(doing: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("bench: {doing}");
    }
}

fn warn_of_siblings(cpus: &Cpus) {
    if let (Some(server), Some(client)) = (cpus.server, cpus.client(0))
        && placement::are_siblings(server, client)
    {
        eprintln!(
            "bench: CPUs {server} and {client} are hyperthreads of one core: figures are not comparable"
        );
    }
}

/// What was seen of the server over the window.
#[derive(Debug, Clone, Copy)]
struct Usage {
    wall_ns: u64,
    cpu_ns: Option<u64>,
    counters: Counters,
}

/// Sleeps from one edge of the window to the other and looks at the server at both.
fn watch(pid: Option<u32>, schedule: &Schedule, mut counters: impl FnMut() -> Counters) -> Usage {
    let mut look = |at| {
        sleep_until(at);
        (now_ns(), pid.and_then(procfs::cpu_ns), counters())
    };
    let (begin, cpu_before, counters_before) = look(schedule.begin_ns());
    let (end, cpu_after, counters_after) = look(schedule.end_ns());
    Usage {
        wall_ns: end - begin,
        cpu_ns: cpu_after.zip(cpu_before).map(|(after, before)| after.saturating_sub(before)),
        counters: counters_after.since(&counters_before),
    }
}

struct FloorRun {
    result: LoadResult,
    usage: Usage,
}

/// The floor's client is a thread of this process; the main thread watches and keeps the server alive.
fn measure_floor(options: &BenchOptions, cpus: &Cpus, window_ns: u64) -> Result<FloorRun, BenchError> {
    let (size, bodies, cpu) = (options.size, options.total_in_flight(), cpus.client(0));
    if options.is_long() {
        let mut floor = LongFloor::start(size, bodies, cpus)?;
        return watch_floor(floor.server_pid(), window_ns, |schedule| floor.run(cpu, schedule));
    }
    let mut floor = Floor::start(size, bodies, cpus)?;
    watch_floor(floor.server_pid(), window_ns, |schedule| floor.run(cpu, schedule))
}

fn watch_floor(
    pid: u32,
    window_ns: u64,
    run: impl FnOnce(&Schedule) -> Result<LoadResult, BenchError> + Send,
) -> Result<FloorRun, BenchError> {
    let schedule = Schedule::soon(WARM_UP_NS, window_ns);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| run(&schedule));
        let usage = watch(Some(pid), &schedule, Counters::default);
        let result = client.join().expect("the floor's client does not panic")?;
        Ok(FloorRun { result, usage })
    })
}

fn floor_alone(options: &BenchOptions, cpus: &Cpus, report: &mut BenchReport) -> Result<(), BenchError> {
    progress("the floor");
    let FloorRun { result, usage } = measure_floor(options, cpus, window_ns(options))?;
    report.add_load(std::slice::from_ref(&result));
    report.add_floor(&result);
    report.add_server_cpu(usage.cpu_ns, usage.wall_ns);
    Ok(())
}

fn window_ns(options: &BenchOptions) -> u64 {
    (options.seconds * SECOND as f64) as u64
}

/// A server and its connected clients.
struct Connected {
    /// The processes of `--half-open`; they go before the server does.
    _silent: Vec<Process>,
    server: Server,
    clients: Vec<Process>,
    connect_last_ns: u64,
}

impl Connected {
    fn start(options: &BenchOptions, cpus: &Cpus) -> Result<Self, BenchError> {
        progress("connecting");
        let server = match options.peer {
            PeerKind::Doorbell => doorbell::start_server(options, cpus)?,
            PeerKind::Uds => uds::start_server(options, cpus)?,
            PeerKind::Floor => return Err(BenchError::option("peer floor", "has no sessions")),
        };
        let silent = silent::start(options.half_open, &server.endpoint)?;
        let start = |i| worker::start(&ClientJob::new(options, &server.endpoint, cpus, i));
        let processes = options.processes + usize::from(options.probe_process);
        let mut clients = (0..processes).map(start).collect::<Result<Vec<_>, _>>()?;
        let ready = clients.iter_mut().map(Process::receive).collect::<Result<Vec<Ready>, _>>()?;
        let connect_last_ns = ready.iter().map(|r| r.connect_last_ns).max().unwrap_or_default();
        Ok(Self { _silent: silent, server, clients, connect_last_ns })
    }

    /// The segments that server or clients hold open.
    fn segments(&self) -> Segments {
        let clients = self.clients.iter().map(Process::pid);
        Segments::of(&clients.chain(self.server.pid).collect::<Vec<_>>())
    }

    fn drive(&mut self, schedule: &Schedule) -> Result<(Vec<LoadResult>, Usage), BenchError> {
        self.clients.iter_mut().try_for_each(|client| client.send(schedule))?;
        let usage = watch(self.server.pid, schedule, &mut self.server.counters);
        let results =
            self.clients.iter_mut().map(Process::receive).collect::<Result<Vec<LoadResult>, _>>()?;
        Ok((results, usage))
    }
}

fn connect_only(options: &BenchOptions, cpus: &Cpus, report: &mut BenchReport) -> Result<(), BenchError> {
    let connected = Connected::start(options, cpus)?;
    report.connect_last_ms = Some(connected.connect_last_ns as f64 / 1e6);
    let segments = connected.segments();
    let has_segments = !segments.is_empty();
    let memory = connected.server.pid.and_then(|pid| Probe::new(pid, segments).sample());
    report.add_memory(memory, memory, has_segments);
    Ok(())
}

fn measure_peer(options: &BenchOptions, cpus: &Cpus, report: &mut BenchReport) -> Result<(), BenchError> {
    let mut connected = Connected::start(options, cpus)?;
    report.connect_last_ms = Some(connected.connect_last_ns as f64 / 1e6);
    let segments = connected.segments();
    let has_segments = !segments.is_empty();
    let mut probe = connected.server.pid.map(|pid| Probe::new(pid, segments));
    let idle = probe.as_mut().and_then(Probe::sample);
    let sampler = probe.map(Sampler::start);

    if options.probe.is_some() {
        progress("the probe alone");
        let window_ns = floor::window_ns(options.seconds);
        let schedule = Schedule { probe_alone: true, ..Schedule::soon(WARM_UP_NS, window_ns) };
        report.add_probe_alone(&connected.drive(&schedule)?.0);
    }
    progress("the load");
    let hogs = start_hogs(options)?;
    let schedule = Schedule::soon(WARM_UP_NS, window_ns(options));
    let (results, usage) = connected.drive(&schedule)?;
    let peak = sampler.and_then(Sampler::stop);
    drop(hogs);
    let ended = now_ns();

    report.add_load(&results);
    report.add_server_cpu(usage.cpu_ns, usage.wall_ns);
    report.add_counters(&usage.counters);
    report.add_memory(peak, idle, has_segments);
    sleep_until(ended + SECOND);
    let after = connected.server.pid.and_then(|pid| Probe::new(pid, connected.segments()).sample());
    report.footprint_after_bytes = after.map(|memory| memory.footprint);
    Ok(())
}

/// Connects everything and leaves it alone: the client processes sleep in a read of their standard input for
/// the whole window. No hiccups and no floor, which are about calls.
fn measure_idle(options: &BenchOptions, cpus: &Cpus, report: &mut BenchReport) -> Result<(), BenchError> {
    let mut connected = Connected::start(options, cpus)?;
    report.connect_last_ms = Some(connected.connect_last_ns as f64 / 1e6);
    let segments = connected.segments();
    let has_segments = !segments.is_empty();
    let mut probe = connected.server.pid.map(|pid| Probe::new(pid, segments));
    let before = probe.as_mut().and_then(Probe::sample);

    progress("idling");
    let hogs = start_hogs(options)?;
    // So that whatever asking for the first time takes is over when the window opens.
    (connected.server.counters)();
    let schedule = Schedule::soon(WARM_UP_NS, window_ns(options));
    let usage = watch(connected.server.pid, &schedule, &mut connected.server.counters);
    let after = probe.as_mut().and_then(Probe::sample);
    drop(hogs);

    connected.clients.iter_mut().try_for_each(Process::check_alive)?;
    let all = options.connections as u64;
    report.errors = usage.counters.connections.map_or(0, |open| all.saturating_sub(open));
    report.add_server_cpu(usage.cpu_ns, usage.wall_ns);
    report.add_counters(&usage.counters);
    report.add_memory(after, before, has_segments);
    Ok(())
}

/// The busy processes of `--hogs`. Only the load has to bear them: hiccups and floor are the bare machine's.
fn start_hogs(options: &BenchOptions) -> Result<Vec<Process>, BenchError> {
    if options.hogs { hog::start() } else { Ok(Vec::new()) }
}

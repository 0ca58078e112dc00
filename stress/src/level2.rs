//! Level 2, memory destruction: 500 connections with calls of 4 KiB and 100 with calls of 1 MiB at the same time, every
//! byte of every answer verified, while the server and all that it shares stay within 3 MiB. Once from one client process,
//! once from 16; and 100 senders of which 20 are stopped in mid-body, whose memory the others must get.

use crate::clock::{SECOND, now_ns, sleep_until};
use crate::error::StressError;
use crate::level1::{self, share};
use crate::machine::Cores;
use crate::memory::{Peak, Sampler, Segments};
use crate::mixed::{self, Calls, Go, Idle, LONG, MixedJob, Mixture, SHORT, Share};
use crate::monitor::{Counters, Monitor, Seen, Watch};
use crate::processes::Process;
use crate::report::{self, Check, Row, grouped, mib};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use crate::takeback::{self, Leases, TakeBack};
use rustix::process::Signal;
use serde::Serialize;
use std::time::Duration;

/// This level's number.
pub const LEVEL: u32 = 2;
/// Rounds of calls of 1 MiB with `--full` and `--short`; those of 4 KiB are twice as many (R6.2).
pub const FULL: u64 = 500;
/// See [`FULL`].
pub const SHORT_ROUNDS: u64 = 40;
/// What server and shared pages may take together, bytes.
const FOOTPRINT_MAX: u64 = 3 << 20;
/// Sessions that this covers, and what each further one adds (DESIGN §5).
const SESSIONS_COVERED: usize = 100;
/// See [`SESSIONS_COVERED`].
const PER_FURTHER_SESSION: u64 = 10 << 10;
/// How soon memory of senders that stand still must be taken back while others wait, milliseconds.
const TAKE_BACK_MS: f64 = 200.0;
/// When the server must be idle again after the last answer.
const REST: Duration = Duration::from_secs(1);
/// How long all senders run before some are stopped.
const WARM_UP_NS: u64 = SECOND / 2;
/// How long a process may take to report.
const STEP: Duration =
    if cfg!(debug_assertions) { Duration::from_secs(600) } else { Duration::from_secs(1800) };

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Calls of 1 MiB on each connection that makes such.
    pub rounds: u64,
    /// Seed of every content.
    pub seed: u64,
    /// Thousandths of the connections and senders.
    pub size: usize,
}

impl Plan {
    fn part(&self, of: usize) -> usize {
        (of * self.size / 1000).max(1)
    }

    fn short(&self) -> Calls {
        Calls { connections: self.part(500), rounds: 2 * self.rounds }
    }

    fn long(&self) -> Calls {
        Calls { connections: self.part(100), rounds: self.rounds }
    }
}

/// A row: who calls what.
#[derive(Debug, Clone, Copy)]
struct Spread {
    row: &'static str,
    processes: usize,
    short: Calls,
    long: Calls,
    share: Share,
    /// Processes that are stopped in mid-body.
    stopped: usize,
}

/// Runs all rows.
///
/// # Errors
///
/// [`StressError`] if one could not be run to its end.
pub fn run(plan: &Plan, cores: &Cores, progress: impl Fn(&str)) -> Result<Vec<Row>, StressError> {
    spreads(plan).iter().map(|spread| run_row(plan, spread, cores, &progress)).collect()
}

fn spreads(plan: &Plan) -> [Spread; 3] {
    let (short, long) = (plan.short(), plan.long());
    let senders = plan.part(100).max(2);
    // Two windows of four slots of 16 KiB are 32 pages.
    let one =
        Share { ring_entries: 512, small_slots: 32, medium_slots: 128, lease_pages: 192, long_at_once: 24 };
    let sixteenth =
        Share { ring_entries: 32, small_slots: 8, medium_slots: 8, lease_pages: 64, long_at_once: 4 };
    let sender =
        Share { ring_entries: 16, small_slots: 4, medium_slots: 0, lease_pages: 64, long_at_once: 1 };
    let bodies = Calls { connections: senders, rounds: (plan.rounds / 10).max(2) };
    [
        Spread { row: "one process", processes: 1, short, long, share: one, stopped: 0 },
        Spread {
            row: "16 processes",
            processes: long.connections.min(16),
            short,
            long,
            share: sixteenth,
            stopped: 0,
        },
        Spread {
            row: "100 senders, 20 stopped",
            processes: senders,
            short: Calls::default(),
            long: bodies,
            share: sender,
            stopped: (senders / 5).max(1),
        },
    ]
}

fn run_row(
    plan: &Plan,
    spread: &Spread,
    cores: &Cores,
    progress: &impl Fn(&str),
) -> Result<Row, StressError> {
    let say = |doing: &str| progress(&format!("level {LEVEL}, {}: {doing}", spread.row));
    say("connecting");
    let mut load = Load::start(plan, spread, cores)?;
    say("the load");
    let found = load.carry(spread)?;
    load.end()?;
    Ok(row(spread, found))
}

/// A server, its clients, and the monitor. Dropped in this order.
struct Load {
    monitor: Option<Monitor>,
    clients: Vec<Process>,
    server: Process,
    _directory: Directory,
}

impl Load {
    fn start(plan: &Plan, spread: &Spread, cores: &Cores) -> Result<Self, StressError> {
        let directory = Directory::new("memory")?;
        let (short, long) = (spread.short.connections, spread.long.connections);
        let job = ServerJob {
            path: directory.path().join("s"),
            core: cores.server,
            // The monitor has one of each.
            connections: (short + long) as u32 + 1,
            sessions: spread.processes as u32 + 1,
            ..ServerJob::default()
        };
        let server = server::start(&job)?;
        let idle = match spread {
            Spread { stopped: 1.., .. } => Idle::Sleep,
            _ if cores.are_shared_by(spread.processes) => Idle::Yield,
            _ => Idle::Spin,
        };
        let client = |number: usize| {
            let calls =
                |all: Calls| Calls { connections: share(all.connections, spread.processes, number), ..all };
            mixed::start(&MixedJob {
                path: job.path.clone(),
                core: cores.client(number),
                idle,
                share: spread.share,
                short: calls(spread.short),
                long: calls(spread.long),
                seed: plan.seed,
                number: number as u64,
            })
        };
        let mut clients = (0..spread.processes).map(client).collect::<Result<Vec<_>, _>>()?;
        level1::connect(&mut clients)?;
        let monitor = Some(Monitor::connect(&job.path)?);
        Ok(Self { monitor, clients, server, _directory: directory })
    }

    /// The segments of all sessions, the monitor's included.
    fn segments(&self) -> Result<Segments, StressError> {
        let own = std::process::id();
        let pids: Vec<u32> = self.clients.iter().map(Process::pid).chain([own]).collect();
        Segments::of(&pids, self.clients.len() + 1)
    }

    /// Memory at this moment.
    fn look(&self) -> Result<Peak, StressError> {
        Sampler::start(self.server.pid(), self.segments()?).stop()
    }

    /// Puts the load on it, and watches memory and counters meanwhile and a second later.
    fn carry(&mut self, spread: &Spread) -> Result<Found, StressError> {
        let Some(monitor) = self.monitor.take() else { unreachable!("it is taken once") };
        // Asked before the first look, so that what asking needs is there.
        monitor.count()?;
        let before = self.look()?;
        let leases = if spread.stopped > 0 { Some(Leases::none_yet(&self.clients)?) } else { None };
        let sampler = Sampler::start(self.server.pid(), self.segments()?);
        let watch = Watch::start(monitor);
        let begin_ns = now_ns() + if spread.stopped > 0 { WARM_UP_NS } else { 0 };
        self.clients.iter_mut().try_for_each(|client| client.send(&Go { begin_ns }))?;
        let mut stopped = Vec::new();
        let mut take_back = None;
        if let Some(leases) = leases {
            sleep_until(begin_ns);
            let (numbers, seen) = takeback::stop_and_watch(&self.clients, &leases, spread.stopped)?;
            (stopped, take_back) = (numbers, Some(seen));
        }
        let (going_on, all) = self.outcome(&stopped)?;
        let memory = sampler.stop();
        let ended = self.server.has_ended();
        let mut found = Found { going_on, all, before, take_back, ..Found::default() };
        if let Some(how) = ended {
            found.all.faults.note(format!("the server ended early ({how})"));
            found.memory = memory.unwrap_or_default();
            return Ok(found);
        }
        found.memory = memory?;
        found.server_alive = true;
        let monitor;
        (monitor, found.seen) = watch.stop()?;
        std::thread::sleep(
            REST.saturating_sub(Duration::from_nanos(now_ns() - found.all.to_ns.min(now_ns()))),
        );
        found.after = self.look()?;
        found.counters = monitor.count()?;
        self.monitor = Some(monitor);
        Ok(found)
    }

    /// What the clients found: those that were not stopped, then all, once the others go on.
    fn outcome(&mut self, stopped: &[usize]) -> Result<(Mixture, Mixture), StressError> {
        let mut going_on = Mixture::default();
        for (_, client) in self.clients.iter_mut().enumerate().filter(|(n, _)| !stopped.contains(n)) {
            going_on.add(client.receive(STEP)?);
        }
        let mut all = going_on.clone();
        stopped.iter().try_for_each(|number| self.clients[*number].signal(Signal::CONT))?;
        for number in stopped {
            all.add(self.clients[*number].receive(STEP)?);
        }
        Ok((going_on, all))
    }

    /// Lets the clients go, each of which must end well; the server dies with this value.
    fn end(self) -> Result<(), StressError> {
        self.clients.into_iter().try_for_each(Process::end)
    }
}

/// What a row is made of.
#[derive(Debug, Default)]
struct Found {
    /// What clients found that were not stopped, and all.
    going_on: Mixture,
    all: Mixture,
    server_alive: bool,
    before: Peak,
    memory: Peak,
    after: Peak,
    seen: Seen,
    counters: Counters,
    take_back: Option<TakeBack>,
}

/// What rows of this level have beside what all have.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Figures {
    pub short_calls: u64,
    pub long_calls: u64,
    pub calls_per_second: f64,
    /// Of requests; answers are as many again.
    pub bytes_per_second: f64,
    pub short_in_flight_average: f64,
    pub short_in_flight_most: u64,
    pub long_in_flight_most: u64,
    pub taken_back: u64,
    /// As the clients saw it.
    pub memory_waits: u64,
    pub memory_wait_ms: f64,
    pub memory_wait_most_ms: f64,
    /// As the server counted.
    pub leases_granted: u64,
    pub leases_waited: u64,
    pub lease_wait_ms: f64,
    pub leases_forced: u64,
    pub leased_bytes_most: u64,
    pub leased_bytes_after: u64,
    pub budget_used_most: u64,
    pub body_bytes_most: u64,
    pub footprint_before: u64,
    pub footprint_after: u64,
    pub take_back: Option<TakeBack>,
}

fn figures(found: &Found, seconds: f64) -> Figures {
    let Found { all, counters, seen, .. } = found;
    let bytes = all.short * SHORT as u64 + all.long * LONG as u64;
    Figures {
        short_calls: all.short,
        long_calls: all.long,
        calls_per_second: (all.short + all.long) as f64 / seconds,
        bytes_per_second: bytes as f64 / seconds,
        short_in_flight_average: all.short_in_flight,
        short_in_flight_most: all.short_in_flight_most,
        long_in_flight_most: all.long_in_flight_most,
        taken_back: all.taken_back,
        memory_waits: all.memory_waits,
        memory_wait_ms: all.memory_wait_ns as f64 / 1e6,
        memory_wait_most_ms: all.memory_wait_most_ns as f64 / 1e6,
        leases_granted: counters.leases_granted,
        leases_waited: counters.leases_waited,
        lease_wait_ms: counters.lease_wait_ns as f64 / 1e6,
        leases_forced: counters.leases_forced,
        leased_bytes_most: seen.leased_bytes,
        leased_bytes_after: counters.leased_bytes,
        budget_used_most: seen.budget_used,
        body_bytes_most: seen.body_bytes,
        footprint_before: found.before.footprint_bytes,
        footprint_after: found.after.footprint_bytes,
        take_back: found.take_back.clone(),
    }
}

/// What may be taken with so many sessions, bytes; `None` where code without optimisation takes more by itself.
fn footprint_max(sessions: usize) -> Option<u64> {
    let further = sessions.saturating_sub(SESSIONS_COVERED) as u64;
    (!cfg!(debug_assertions)).then_some(FOOTPRINT_MAX + further * PER_FURTHER_SESSION)
}

fn row(spread: &Spread, found: Found) -> Row {
    let seconds = (found.all.to_ns.saturating_sub(found.all.from_ns) as f64 / SECOND as f64).max(1e-9);
    let figures = figures(&found, seconds);
    let faults = &found.all.faults;
    let sessions = spread.processes + 1;
    let mut checks = vec![
        Check::exactly("answers with wrong content", 0, faults.wrong),
        Check::exactly("calls of 4 KiB answered", spread.short.all(), found.all.short),
        Check::exactly("calls of 1 MiB answered", spread.long.all(), found.all.long),
        Check::exactly("errors", 0, faults.errors),
        Check::exactly("requests never answered", 0, faults.lost),
        Check::at_most(
            "server footprint, peak, bytes",
            footprint_max(sessions),
            found.memory.footprint_bytes,
        ),
        Check::at_most(
            "one second after the end, bytes",
            footprint_max(sessions),
            found.after.footprint_bytes,
        ),
        Check::exactly("leased one second after the end, bytes", 0, found.counters.leased_bytes),
        Check::exactly("server alive at the end", 1, found.server_alive.into()),
        Check::exactly("sessions that ended", 0, found.counters.sessions_ended),
        counted(&found),
    ];
    if let Some(take_back) = &found.take_back {
        checks.extend(take_back_checks(spread, &found, take_back));
    }
    checks.extend(reported(&found, &figures));
    Row {
        level: LEVEL,
        row: spread.row,
        connections: spread.short.connections + spread.long.connections,
        sessions,
        client_processes: spread.processes,
        seconds,
        wrong: faults.wrong,
        errors: faults.errors,
        lost: faults.lost,
        memory: found.memory,
        figures: report::Figures::Memory(figures),
        notes: found.all.faults.notes,
        checks,
    }
}

/// The server's own count is a witness unless calls were made twice.
fn counted(found: &Found) -> Check {
    const CLAIM: &str = "answers in all, counted by the server";
    if found.all.taken_back == 0 {
        Check::exactly(CLAIM, found.all.faults.answered_in_all, found.counters.calls_ok)
    } else {
        Check::reported(CLAIM, grouped(found.counters.calls_ok))
    }
}

fn take_back_checks(spread: &Spread, found: &Found, take_back: &TakeBack) -> Vec<Check> {
    let others = (spread.processes - spread.stopped) as u64 * spread.long.rounds;
    let ms = |ms: Option<f64>| ms.map_or("never".to_owned(), |ms| format!("{ms:.0} ms"));
    let longest_ms = found.all.memory_wait_most_ns as f64 / 1e6;
    let held = format!("{} in {} of {}", mib(take_back.held_bytes), take_back.holders, take_back.stopped);
    vec![
        Check::exactly("bodies of the others meanwhile", others, found.going_on.long),
        Check::within("memory of stopped ones back after, ms", TAKE_BACK_MS, take_back.first_ms),
        Check::reported("all of it after", ms(take_back.all_ms)),
        Check::within("longest wait for memory, ms", TAKE_BACK_MS, Some(longest_ms)),
        Check::reported("what they had leased", held),
    ]
}

fn reported(found: &Found, figures: &Figures) -> Vec<Check> {
    let Found { all, memory, .. } = found;
    let waits = |n: u64, ms: f64| format!("{} for {ms:.0} ms", grouped(n));
    let in_flight = format!("{:.0}, {} at most", all.short_in_flight, all.short_in_flight_most);
    let samples = format!("{} ({:.0} per second)", memory.samples, memory.samples_per_second);
    vec![
        Check::reported("calls per second", grouped(figures.calls_per_second as u64)),
        Check::reported("each way, per second", mib(figures.bytes_per_second as u64)),
        Check::reported("calls of 4 KiB in flight", in_flight),
        Check::reported("calls of 1 MiB in flight, most", grouped(all.long_in_flight_most)),
        Check::reported("waits for memory, clients", waits(all.memory_waits, figures.memory_wait_ms)),
        Check::reported("longest of them", format!("{:.1} ms", figures.memory_wait_most_ms)),
        Check::reported("waits for memory, server", waits(figures.leases_waited, figures.lease_wait_ms)),
        Check::reported("leases granted", grouped(figures.leases_granted)),
        Check::reported("leases taken back by force", grouped(figures.leases_forced)),
        Check::reported("calls made again after that", grouped(all.taken_back)),
        Check::reported("leased, peak", mib(figures.leased_bytes_most)),
        Check::reported("budget in use, peak", mib(figures.budget_used_most)),
        Check::reported("server footprint, before", mib(figures.footprint_before)),
        Check::reported("server footprint, peak", mib(memory.footprint_bytes)),
        Check::reported("server footprint, one second after", mib(figures.footprint_after)),
        Check::reported("server RSS, peak", mib(memory.rss_bytes)),
        Check::reported("beside it: bodies put together, peak", mib(figures.body_bytes_most)),
        Check::reported("beside it: page tables, peak", mib(memory.page_tables_bytes)),
        Check::reported("memory samples", samples),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Outcome;
    use crate::report::Verdict;

    const PLAN: Plan = Plan { rounds: 500, seed: 1, size: 1000 };

    /// Goal:   R6.2: what is ordered, in numbers, and that the shared memory of all sessions leaves room to lease.
    #[test]
    fn the_rows_are_those_of_the_requirement() {
        let [one, many, senders] = spreads(&PLAN);
        for spread in [one, many] {
            assert_eq!((spread.short.connections, spread.short.rounds), (500, 1000));
            assert_eq!((spread.long.connections, spread.long.rounds), (100, 500));
            let Share { small_slots, medium_slots, long_at_once, .. } = spread.share;
            let base = spread.processes * (usize::from(small_slots) + 4 * usize::from(medium_slots)) * 1024;
            assert!(base <= 1 << 20, "{base}");
            assert!(long_at_once + 2 <= small_slots.into(), "names, and one slot for an answer or a wish");
        }
        assert_eq!((one.processes, many.processes, senders.processes, senders.stopped), (1, 16, 100, 20));
    }

    fn good() -> Found {
        let [_, _, spread] = spreads(&PLAN);
        let all = Mixture { long: spread.long.all(), from_ns: 1, to_ns: SECOND, ..Mixture::default() };
        let take_back = TakeBack { first_ms: Some(199.0), ..TakeBack::default() };
        Found {
            going_on: Mixture { long: 80 * spread.long.rounds, ..all.clone() },
            all,
            server_alive: true,
            take_back: Some(take_back),
            ..Found::default()
        }
    }

    fn failed(found: Found) -> Vec<&'static str> {
        let row = row(&spreads(&PLAN)[2], found);
        row.checks.iter().filter(|check| check.verdict == Verdict::Fail).map(|check| check.claim).collect()
    }

    /// Goal:   each way to fail fails the row.
    /// Method: a good row, then one figure of it spoilt in turn.
    #[test]
    fn every_single_fault_fails_the_row() {
        assert!(failed(good()).is_empty());
        let with = |spoil: &dyn Fn(&mut Found)| {
            let mut found = good();
            spoil(&mut found);
            failed(found).len()
        };
        let faults = |faults| move |found: &mut Found| found.all.faults = faults;
        assert_eq!(with(&|f| faults(Outcome { wrong: 1, ..Outcome::default() })(f)), 1);
        assert_eq!(with(&|f| faults(Outcome { errors: 1, ..Outcome::default() })(f)), 1);
        assert_eq!(with(&|f| faults(Outcome { lost: 1, ..Outcome::default() })(f)), 1);
        assert_eq!(with(&|f| f.all.long -= 1), 1);
        assert_eq!(with(&|f| f.all.short += 1), 1);
        assert_eq!(with(&|f| f.going_on.long -= 1), 1);
        assert_eq!(with(&|f| f.server_alive = false), 1);
        assert_eq!(with(&|f| f.counters.leased_bytes = 4096), 1);
        assert_eq!(with(&|f| f.counters.sessions_ended = 1), 1);
        assert_eq!(with(&|f| f.counters.calls_ok = 1), 1);
        assert_eq!(with(&|f| f.take_back = Some(TakeBack::default())), 1);
        assert_eq!(with(&|f| f.take_back.as_mut().unwrap().first_ms = Some(200.1)), 1);
        let optimised = usize::from(!cfg!(debug_assertions));
        assert_eq!(with(&|f| f.memory.footprint_bytes = (3 << 20) + (10 << 10) + 1), optimised);
        assert_eq!(with(&|f| f.after.footprint_bytes = (3 << 20) + (10 << 10) + 1), optimised);
        assert_eq!(with(&|f| f.memory.footprint_bytes = (3 << 20) + (10 << 10)), 0);
    }
}

//! Level 1, the connection bomb: a thousand connections opened at once, each with one call of 1 KiB in
//! flight all the time, content verified. Once in one session of one client process, once in a session
//! each over ten processes.

use crate::client::{self, ClientJob, Connect, Counted, Order, Ready};
use crate::clock::{SECOND, now_ns};
use crate::content::SIZE;
use crate::error::StressError;
use crate::floor;
use crate::load::{Outcome, Schedule};
use crate::machine::Cores;
use crate::memory::{Peak, Sampler, Segments};
use crate::processes::Process;
use crate::report::{self, Check, Row, Verdict, grouped, mib};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use serde::Serialize;
use std::time::Duration;

/// This level's number.
pub const LEVEL: u32 = 1;
/// What the level is about; fewer are for trying it out, and their rate is not judged.
pub const CONNECTIONS: usize = 1000;
/// The claim that is judged by time.
const RATE: &str = "messages per second";
/// Messages per second that have to be exceeded (R5.2).
const RATE_LIMIT: u64 = 1_000_000;
/// Where a bare ring between the same processes carries less than so many times that, the host has slowed the cores down: the
/// limit is then this part of the bare ring.
const FLOOR_PARTS: f64 = 4.0;
/// Runs of a row of which one has to exceed it: a host that slows the cores down in the midst of one, and not in the bare ring
/// before and after it, makes it slower, never faster.
const TRIES: usize = 3;
/// Left out of the window.
const WARM_UP_NS: u64 = SECOND / 2;
/// The bare ring's window is as long as the level's, up to this.
const FLOOR_WINDOW_MAX_NS: u64 = 2 * SECOND;
/// From the word to the moment at which all processes begin to connect.
const CONNECT_LEAD_NS: u64 = 20_000_000;
/// How long a process may take to start, to connect, to report.
const STEP: Duration = Duration::from_secs(60);

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Length of the window.
    pub seconds: f64,
    /// Seed of every content.
    pub seed: u64,
    /// Connections, at most [`CONNECTIONS`].
    pub connections: usize,
}

/// How the connections are spread.
#[derive(Debug, Clone, Copy)]
struct Spread {
    row: &'static str,
    sessions: usize,
    processes: usize,
}

/// Runs both rows.
///
/// # Errors
///
/// [`StressError`] if one could not be run to its end.
pub fn run(plan: &Plan, cores: &Cores, progress: impl Fn(&str)) -> Result<Vec<Row>, StressError> {
    let n = plan.connections;
    let spreads = [
        Spread { row: "one session", sessions: 1, processes: 1 },
        Spread { row: "a session each, 10 processes", sessions: n, processes: n.min(10) },
    ];
    spreads.iter().map(|spread| again(|| run_row(plan, spread, cores, &progress))).collect()
}

/// A row, run once more where nothing but its rate falls short, [`TRIES`] times at most; the last run counts.
fn again(mut run: impl FnMut() -> Result<Row, StressError>) -> Result<Row, StressError> {
    let mut row = run()?;
    let mut tries = 1;
    while tries < TRIES && is_only_slow(&row) {
        row = run()?;
        tries += 1;
    }
    row.checks.push(Check::reported("runs of the row", tries.to_string()));
    Ok(row)
}

fn is_only_slow(row: &Row) -> bool {
    let failed = |check: &&Check| check.verdict == Verdict::Fail;
    row.checks.iter().filter(failed).map(|check| check.claim).eq([RATE])
}

fn run_row(
    plan: &Plan,
    spread: &Spread,
    cores: &Cores,
    progress: &impl Fn(&str),
) -> Result<Row, StressError> {
    let window_ns = (plan.seconds * SECOND as f64) as u64;
    let say = |doing: &str| progress(&format!("level {LEVEL}, {}: {doing}", spread.row));
    say("the bare ring");
    let floor_window = window_ns.min(FLOOR_WINDOW_MAX_NS);
    let floor = || floor::measure(plan.connections, plan.seed, cores, WARM_UP_NS, floor_window);
    let before = floor()?;
    say("connecting");
    let mut bomb = Bomb::start(plan, spread, cores)?;
    say("the load");
    let (outcome, counted, memory) = bomb.explode(spread, window_ns)?;
    let ready_ms = bomb.ready_ns as f64 / 1e6;
    bomb.end()?;
    say("the bare ring again");
    let floor = [before, floor()?];
    let found = Found { outcome, counted, memory, floor, ready_ms };
    Ok(row(plan, spread, found))
}

/// A server and its connected clients. Dropped in this order.
struct Bomb {
    clients: Vec<Process>,
    server: Process,
    _directory: Directory,
    /// From the moment when all began to connect until the last connection was open.
    ready_ns: u64,
}

impl Bomb {
    fn start(plan: &Plan, spread: &Spread, cores: &Cores) -> Result<Self, StressError> {
        let directory = Directory::new("connections")?;
        let job = ServerJob {
            path: directory.path().join("s"),
            core: cores.server,
            connections: plan.connections as u32,
            sessions: spread.sessions as u32,
            ..ServerJob::default()
        };
        let server = server::start(&job)?;
        let client = |number: usize| {
            client::start(&ClientJob {
                path: job.path.clone(),
                core: cores.client(number),
                yields: cores.are_shared_by(spread.processes),
                sessions: sessions_of(plan.connections, spread, number),
                seed: plan.seed,
                number: number as u64,
            })
        };
        let mut clients = (0..spread.processes).map(client).collect::<Result<Vec<_>, _>>()?;
        let ready_ns = connect(&mut clients)?;
        Ok(Self { clients, server, _directory: directory, ready_ns })
    }

    /// Puts the load on it, watches the server's memory meanwhile.
    fn explode(&mut self, spread: &Spread, window_ns: u64) -> Result<(Outcome, Counted, Peak), StressError> {
        let pids: Vec<u32> = self.clients.iter().map(Process::pid).collect();
        let sampler = Sampler::start(self.server.pid(), Segments::of(&pids, spread.sessions)?);
        let schedule = Schedule::after(WARM_UP_NS, window_ns);
        self.clients.iter_mut().try_for_each(|client| client.send(&Order::Load(schedule)))?;
        let within = Duration::from_nanos(WARM_UP_NS + window_ns) + STEP;
        let mut sum = Outcome::default();
        for client in &mut self.clients {
            sum.add(client.receive(within)?);
        }
        let memory = sampler.stop();
        if let Some(how) = self.server.has_ended() {
            sum.errors += 1;
            sum.notes.insert(0, format!("the server ended early ({how})"));
            return Ok((sum, Counted::default(), memory.unwrap_or_default()));
        }
        let counted = self.count(&mut sum)?;
        Ok((sum, counted, memory?))
    }

    /// What the server has counted; that it cannot be asked is an error of the load.
    fn count(&mut self, outcome: &mut Outcome) -> Result<Counted, StressError> {
        let client = &mut self.clients[0];
        client.send(&Order::Count)?;
        Ok(client.receive::<Result<Counted, String>>(STEP)?.unwrap_or_else(|why| {
            outcome.errors += 1;
            outcome.notes.push(format!("the server does not say what it counted: {why}"));
            Counted::default()
        }))
    }

    /// Lets the clients go, each of which must end well; the server dies with this value.
    fn end(self) -> Result<(), StressError> {
        self.clients.into_iter().try_for_each(Process::end)
    }
}

/// Lets all clients connect at once; returns how long it took until the last was ready.
///
/// # Errors
///
/// [`StressError`] if one of them cannot.
pub fn connect(clients: &mut [Process]) -> Result<u64, StressError> {
    for client in &mut *clients {
        let () = client.receive(STEP)?;
    }
    let at_ns = now_ns() + CONNECT_LEAD_NS;
    clients.iter_mut().try_for_each(|client| client.send(&Connect { at_ns }))?;
    let mut last = at_ns;
    for client in clients {
        last = last.max(client.receive::<Ready>(STEP)?.at_ns);
    }
    Ok(last - at_ns)
}

/// The connections of each session of one process.
fn sessions_of(connections: usize, spread: &Spread, process: usize) -> Vec<usize> {
    let first: usize = (0..process).map(|p| share(spread.sessions, spread.processes, p)).sum();
    let count = share(spread.sessions, spread.processes, process);
    (first..first + count).map(|session| share(connections, spread.sessions, session)).collect()
}

/// The share of part `index` when `total` is spread evenly over `parts`.
pub fn share(total: usize, parts: usize, index: usize) -> usize {
    total / parts + usize::from(index < total % parts)
}

/// What rows of this level have beside what all have.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Figures {
    pub message_bytes: usize,
    /// Right answers in the window.
    pub messages: u64,
    pub messages_per_second: f64,
    pub messages_in_all: u64,
    pub messages_counted_by_server: u64,
    pub bytes_counted_by_server: u64,
    /// The bare ring before and after the row.
    pub floor_per_second: [f64; 2],
    /// The row's rate by the better of the two.
    pub floor_ratio: f64,
    pub ready_ms: f64,
    pub alive: u64,
    pub waited: u64,
}

/// What a row is made of.
struct Found {
    outcome: Outcome,
    counted: Counted,
    memory: Peak,
    /// The bare ring before and after the row, messages per second.
    floor: [f64; 2],
    ready_ms: f64,
}

fn row(plan: &Plan, spread: &Spread, found: Found) -> Row {
    let Found { outcome, counted, memory, floor, ready_ms } = found;
    let rate = outcome.answered as f64 / plan.seconds;
    // Cores that others use, or that the host slows down, make it slower, never faster: the better one counts.
    let better = floor[0].max(floor[1]);
    let ratio = rate / better;
    let rate_limit =
        (plan.connections == CONNECTIONS).then_some(RATE_LIMIT.min((better / FLOOR_PARTS) as u64));
    let samples = format!("{} ({:.0} per second)", memory.samples, memory.samples_per_second);
    let checks = vec![
        Check::above(RATE, rate_limit, rate as u64),
        Check::exactly("connections alive at the end", plan.connections as u64, outcome.alive),
        Check::exactly("answers with wrong content", 0, outcome.wrong),
        Check::exactly("errors", 0, outcome.errors),
        Check::exactly("requests never answered", 0, outcome.lost),
        Check::exactly("answers in all, counted by the server", outcome.answered_in_all, counted.calls),
        Check::exactly("bytes of them", outcome.answered_in_all * SIZE as u64, counted.bytes_out),
        Check::exactly("connections open at the server", plan.connections as u64, counted.connections),
        Check::reported("bare ring before, messages per second", grouped(floor[0] as u64)),
        Check::reported("bare ring after, messages per second", grouped(floor[1] as u64)),
        Check::reported("part of the better bare ring", format!("{:.0} %", ratio * 100.0)),
        Check::reported("all connections open after", format!("{ready_ms:.1} ms")),
        Check::reported("server footprint, peak", mib(memory.footprint_bytes)),
        Check::reported("server RSS, peak", mib(memory.rss_bytes)),
        Check::reported("memory samples", samples),
    ];
    let figures = Figures {
        message_bytes: SIZE,
        messages: outcome.answered,
        messages_per_second: rate,
        messages_in_all: outcome.answered_in_all,
        messages_counted_by_server: counted.calls,
        bytes_counted_by_server: counted.bytes_out,
        floor_per_second: floor,
        floor_ratio: ratio,
        ready_ms,
        alive: outcome.alive,
        waited: outcome.waited,
    };
    Row {
        level: LEVEL,
        row: spread.row,
        connections: plan.connections,
        sessions: spread.sessions,
        client_processes: spread.processes,
        seconds: plan.seconds,
        wrong: outcome.wrong,
        errors: outcome.errors,
        lost: outcome.lost,
        memory,
        figures: report::Figures::Connections(figures),
        notes: outcome.notes,
        checks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_is_in_exactly_one_session_of_one_process() {
        for (connections, sessions, processes) in [(1000, 1, 1), (1000, 1000, 10), (53, 53, 10), (7, 7, 7)] {
            let spread = Spread { row: "", sessions, processes };
            let all: Vec<usize> = (0..processes).flat_map(|p| sessions_of(connections, &spread, p)).collect();
            assert_eq!((all.len(), all.iter().sum::<usize>()), (sessions, connections));
        }
        let spread = Spread { row: "", sessions: 1000, processes: 10 };
        assert_eq!(sessions_of(1000, &spread, 9), [1; 100]);
    }

    fn verdicts(connections: usize, outcome: Outcome) -> Vec<Verdict> {
        row_of(connections, outcome).checks.iter().map(|check| check.verdict).collect()
    }

    fn row_of(connections: usize, outcome: Outcome) -> Row {
        let plan = Plan { seconds: 2.0, seed: 1, connections };
        let spread = Spread { row: "", sessions: 1, processes: 1 };
        let in_all = outcome.answered_in_all;
        let counted = Counted { calls: in_all, bytes_out: in_all * 1024, connections: connections as u64 };
        let found = Found { outcome, counted, memory: Peak::default(), floor: [4e6, 2e6], ready_ms: 1.0 };
        row(&plan, &spread, found)
    }

    /// Goal:   a row is run again for its rate alone, never for an answer that is wrong or missing.
    /// Method: rows with and without faults.
    #[test]
    fn only_a_rate_is_tried_again() {
        let slow = || Outcome { answered: 1, alive: 1000, ..Outcome::default() };
        assert!(is_only_slow(&row_of(CONNECTIONS, slow())));
        assert!(!is_only_slow(&row_of(CONNECTIONS, Outcome { answered: 2_000_002, ..slow() })));
        for fault in [
            Outcome { wrong: 1, ..slow() },
            Outcome { errors: 1, ..slow() },
            Outcome { lost: 1, ..slow() },
            Outcome { alive: 999, ..slow() },
        ] {
            assert!(!is_only_slow(&row_of(CONNECTIONS, fault)));
        }
    }

    /// Goal:   a slow row is run again and the last run counts; a fault, and an error, are not tried away.
    /// Method: runs that are slow a number of times first, or fault.
    #[test]
    fn a_row_is_tried_three_times_at_most() {
        let slow = Outcome { answered: 1, alive: 1000, ..Outcome::default() };
        let good = Outcome { answered: 2_000_002, ..slow.clone() };
        let wrong = Outcome { wrong: 1, ..slow.clone() };
        for (outcomes, runs) in [
            (vec![&good], 1),
            (vec![&slow, &good], 2),
            (vec![&slow, &slow, &good], 3),
            (vec![&slow; 3], 3),
            (vec![&wrong], 1),
            (vec![&slow, &wrong], 2),
        ] {
            let mut left = outcomes.iter();
            // Whoever asks for more than there are panics.
            let row = again(|| Ok(row_of(CONNECTIONS, (*left.next().unwrap()).clone()))).unwrap();
            assert!(left.next().is_none());
            assert_eq!(row.wrong, outcomes.last().unwrap().wrong);
            assert_eq!(row.checks.last().unwrap().measured, runs.to_string());
        }
        let mut runs = 0;
        let failing = again(|| {
            runs += 1;
            Err(StressError::Floor(String::new()))
        });
        assert!(failing.is_err());
        assert_eq!(runs, 1);
    }

    /// Goal:   each way to fail fails the row.
    /// Method: a good outcome, then one figure of it spoilt in turn.
    #[test]
    fn every_single_fault_fails_the_row() {
        use Verdict::{Fail, Pass, Reported};
        let good = || Outcome { answered: 2_000_002, alive: 1000, ..Outcome::default() };
        let first_five = |outcome| verdicts(CONNECTIONS, outcome)[..5].to_vec();
        assert_eq!(first_five(good()), [Pass; 5]);
        assert_eq!(first_five(Outcome { answered: 2_000_000, ..good() }), [Fail, Pass, Pass, Pass, Pass]);
        assert_eq!(first_five(Outcome { alive: 999, ..good() }), [Pass, Fail, Pass, Pass, Pass]);
        assert_eq!(first_five(Outcome { wrong: 1, ..good() }), [Pass, Pass, Fail, Pass, Pass]);
        assert_eq!(first_five(Outcome { errors: 1, ..good() }), [Pass, Pass, Pass, Fail, Pass]);
        assert_eq!(first_five(Outcome { lost: 1, ..good() }), [Pass, Pass, Pass, Pass, Fail]);
        assert_eq!(verdicts(CONNECTIONS, good())[5..8], [Pass; 3]);
        assert_eq!(verdicts(50, Outcome { alive: 50, ..good() })[..2], [Reported, Pass]);
    }

    #[test]
    fn a_server_that_counted_otherwise_fails_the_row() {
        let plan = Plan { seconds: 2.0, seed: 1, connections: CONNECTIONS };
        let spread = Spread { row: "", sessions: 1, processes: 1 };
        let outcome = Outcome { answered_in_all: 10, ..Outcome::default() };
        let counted = Counted { calls: 9, bytes_out: 10_239, connections: 999 };
        let found = Found { outcome, counted, memory: Peak::default(), floor: [4e6, 2e6], ready_ms: 1.0 };
        let row = row(&plan, &spread, found);
        assert!(row.checks[5..8].iter().all(|check| check.verdict == Verdict::Fail));
    }
}

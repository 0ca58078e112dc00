//! Clients that come by their points: eight at a time against one server, which must be as it was afterwards.

use super::driver::{DriverJob, Order};
use super::ledger::{LedgerJob, VictimsLedger};
use super::victim::{Habit, VictimJob};
use super::{After, Item, OCCURRENCES, PATIENCE, Raised, Run};
use crate::error::StressError;
use crate::kills::{self, Held, KillsJob, Watched};
use crate::processes::{self, Process, Role, State};
use crate::scratch::Directory;
use doorbell::inspect::Report;
use doorbell::{ClientConfig, IpcClient, MessageType, WaitPolicy};
use rustix::process::Signal;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Victims that live at the same time.
const BATCH: usize = 8;
/// Batches before what the server's private memory is taken for what it has to be.
const WARM_UP: usize = 4;
/// Batches between two looks at everything.
const BATCHES_PER_LOOK: usize = 32;
/// How long the server may take to be as it was: leases that nobody uses are taken back after half a second.
const SETTLED: Duration = Duration::from_secs(10);
/// What has to be as it was, as the server counts it.
const COUNTERS: [&str; 6] =
    ["sessions_open", "connections_open", "leased_bytes", "leases_waiting", "exchanges_live", "budget_used"];
/// Bytes that are leased.
const LEASED: usize = 2;
/// Clients that want memory beside the victims: so few that there is enough, so many that there never is.
const FEW: usize = 2;
pub(super) const MANY: usize = 20;
/// Between two looks at the victims.
const PAUSE: Duration = Duration::from_micros(100);

/// A server and those who are never touched.
struct Stage {
    server: Process,
    bystander: Process,
    driver: Process,
    /// Our own, to ask the server what it has.
    client: IpcClient,
    path: PathBuf,
    answered: PathBuf,
    ledger: VictimsLedger,
    /// What there was before the first victim.
    counters: Vec<u64>,
    held: Option<Held>,
    /// Its private memory has been used as much as it will be.
    is_warm: bool,
    /// Sessions that stay: the driver's, the bystander's, our own.
    others: usize,
    _directory: Directory,
}

impl Stage {
    fn set(run: &mut Run<'_>, callers: usize) -> Result<Self, StressError> {
        let directory = Directory::new("points")?;
        let path = directory.path().join("s");
        let (log, answered) = (directory.path().join("log"), directory.path().join("answered"));
        let core = run.cores.clients[0];
        let job = LedgerJob { path: path.clone(), log: log.clone(), cores: vec![run.cores.server, core] };
        let mut server = processes::spawn(Role::LedgerServer, &job, Stdio::null())?;
        let () = server.receive(PATIENCE)?;
        let job = KillsJob::bystander(&path, core);
        let mut bystander = processes::spawn(Role::Watcher, &job, Stdio::piped())?;
        let () = bystander.receive(PATIENCE)?;
        let job =
            DriverJob { path: path.clone(), log: log.clone(), core, callers: Some(callers), waits: true };
        let mut driver = processes::spawn(Role::PointsDriver, &job, Stdio::piped())?;
        let () = driver.receive(PATIENCE)?;
        let config = ClientConfig { policy: WaitPolicy::Block, lanes: 1, ..ClientConfig::smallest() };
        let client = IpcClient::connect_with(&path, &config).map_err(StressError::ipc("connecting"))?;
        let mut stage = Self {
            server,
            bystander,
            driver,
            client,
            path,
            ledger: VictimsLedger::new(&log, &answered),
            answered,
            counters: Vec::new(),
            held: None,
            is_warm: false,
            others: callers + 2,
            _directory: directory,
        };
        stage.take_baseline(run)?;
        Ok(stage)
    }

    /// What the server has while everybody who stays is there and rests.
    fn take_baseline(&mut self, run: &mut Run<'_>) -> Result<(), StressError> {
        self.driver.send(&Order::Audit)?;
        run.counts.add(self.driver.receive(PATIENCE)?);
        self.counters = self.without_leases()?;
        let (held, _) = kills::settled(&self.server, None, self.others)?;
        self.held = Some(held.without_memory());
        self.driver.send(&Order::GoOn)
    }

    /// Waits until nothing is leased, while those who want memory rest.
    fn without_leases(&self) -> Result<Vec<u64>, StressError> {
        let give_up = Instant::now() + SETTLED;
        loop {
            let counters = self.ask()?;
            if counters[LEASED] == 0 || Instant::now() >= give_up {
                return Ok(counters);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The counters that have to be as they were.
    fn ask(&self) -> Result<Vec<u64>, StressError> {
        let connection = self.client.open().map_err(StressError::ipc("opening a connection"))?;
        let answer =
            connection.call(MessageType::INSPECT, b"").map_err(StressError::ipc("asking the server"))?;
        let report: Report = serde_json::from_slice(&answer)?;
        Ok(COUNTERS.iter().map(|name| report.counters.get(*name).copied().unwrap_or(u64::MAX)).collect())
    }

    /// Starts victims. Lenders connect before those who want memory go on.
    fn enter(&mut self, run: &mut Run<'_>, batch: &[Item]) -> Result<Vec<Victim>, StressError> {
        let lenders = is_lender(&batch[0]);
        if lenders {
            self.driver.send(&Order::Audit)?;
            run.counts.add(self.driver.receive(2 * PATIENCE)?);
            self.without_leases()?;
        }
        let mut victims = Vec::new();
        for item in batch {
            victims.push(Victim::start(self, run, *item)?);
        }
        if lenders {
            for victim in &mut victims {
                let () = victim.process.receive(PATIENCE)?;
            }
            self.driver.send(&Order::GoOn)?;
            for victim in &mut victims {
                victim.process.send(&())?;
            }
        }
        Ok(victims)
    }

    /// Descriptors, mappings and, once it is warm, private memory of the server, after each batch.
    fn settle(&mut self, run: &mut Run<'_>, warm: bool) -> Result<(), StressError> {
        let (now, wrong) = kills::settled(&self.server, self.held, self.others)?;
        if warm && !std::mem::replace(&mut self.is_warm, true) {
            self.held = self.held.map(|held| held.with_memory_of(now));
        }
        if let Some(wrong) = wrong {
            run.counts.violation(wrong);
        }
        Ok(())
    }

    /// Everything that can be looked at only while those who stay rest.
    fn look(&mut self, run: &mut Run<'_>) -> Result<(), StressError> {
        self.bystander.send(&())?;
        let seen: Watched = self.bystander.receive(PATIENCE)?;
        let counts = &mut run.counts;
        counts.bystander_calls += seen.calls;
        counts.bystander_errors += seen.errors;
        counts.bystander_max_ns = counts.bystander_max_ns.max(seen.max_ns);
        if seen.errors > 0 {
            counts.violation(format!("I6: {} calls of the bystander failed", seen.errors));
        }
        if seen.max_ns > run.options.patience_ms * 1_000_000 {
            counts.violation(format!("I1, I6: the bystander waited {} ns", seen.max_ns));
        }
        self.driver.send(&Order::Audit)?;
        counts.add(self.driver.receive(2 * PATIENCE)?);
        compare(&mut self.ledger, run)?;
        let give_up = Instant::now() + SETTLED;
        loop {
            let counters = self.ask()?;
            if counters == self.counters {
                break;
            }
            if Instant::now() >= give_up {
                let were = &self.counters;
                run.counts.violation(format!("I2, I8: {COUNTERS:?} are {counters:?}, were {were:?}"));
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.driver.send(&Order::GoOn)?;
        run.keep()
    }
}

/// How far a victim has got.
enum Phase {
    Lives,
    /// Stopped; something happens to it then.
    Stopped(Instant),
    /// Continued, and told to leave.
    Leaves,
    Gone,
}

struct Victim {
    item: Item,
    after: After,
    process: Process,
    phase: Phase,
    begun: Instant,
}

impl Victim {
    fn start(stage: &Stage, run: &Run<'_>, item: Item) -> Result<Self, StressError> {
        let job = VictimJob {
            path: stage.path.clone(),
            answered: stage.answered.clone(),
            core: run.cores.clients[0],
            number: item.number,
            habit: Habit::for_point(item.label, item.dice),
        };
        let armed = item.environment(if is_lender(&item) { 1 } else { OCCURRENCES });
        let process = processes::spawn_armed(Role::PointsVictim, &job, Stdio::piped(), Some(armed))?;
        Ok(Self { item, after: After::by(item.dice), process, phase: Phase::Lives, begun: Instant::now() })
    }

    /// Looks what has become of it; says whether that was the last.
    fn step(&mut self, run: &mut Run<'_>) -> Result<bool, StressError> {
        if let Phase::Gone = self.phase {
            return Ok(true);
        }
        let (now, item) = (Instant::now(), self.item);
        match (&self.phase, self.process.state()?) {
            (Phase::Lives, State::Stopped) if item.raised == Raised::Stop => {
                let (After::Killed(pause) | After::Continued(pause)) = self.after;
                self.phase = Phase::Stopped(now + pause);
            }
            (Phase::Lives, State::Ended) => {
                if self.process.was_killed()? && item.raised == Raised::Kill {
                    run.counts.tally(item.label).killed += 1;
                } else {
                    let how = self.process.has_ended().unwrap_or_default();
                    run.counts.missed(&item, &format!("the process ended before ({how})"));
                }
                self.phase = Phase::Gone;
            }
            (Phase::Stopped(until), _) if now >= *until => match self.after {
                After::Killed(_) => {
                    self.process.signal(Signal::KILL)?;
                    run.counts.tally(item.label).stopped += 1;
                    self.phase = Phase::Gone;
                }
                After::Continued(_) => {
                    self.process.signal(Signal::CONT)?;
                    self.process.close();
                    self.phase = Phase::Leaves;
                }
            },
            (Phase::Leaves, State::Ended) => {
                let how = self.process.has_ended().unwrap_or_default();
                if self.process.was_successful()? {
                    run.counts.tally(item.label).continued += 1;
                } else {
                    let label = item.label;
                    run.counts.violation(format!("{label}: a client that was continued there: {how}"));
                }
                self.phase = Phase::Gone;
            }
            _ if now.duration_since(self.begun) > PATIENCE => {
                let how = if matches!(self.phase, Phase::Leaves) { "it hangs" } else { "it lives on" };
                run.counts.missed(&item, how);
                self.process.signal(Signal::KILL)?;
                self.phase = Phase::Gone;
            }
            _ => {}
        }
        Ok(matches!(self.phase, Phase::Gone))
    }
}

/// Whether it is to come by its point only while others want memory. They are among themselves: who connects, or asks for a
/// lane, would be refused as long as that lasts.
fn is_lender(item: &Item) -> bool {
    Habit::for_point(item.label, item.dice) == Habit::Lender
}

/// Has clients come by these points.
pub(super) fn run(run: &mut Run<'_>, items: &[Item], progress: &dyn Fn(&str)) -> Result<(), StressError> {
    let (lenders, others) = items.iter().copied().partition::<Vec<_>, _>(is_lender);
    for (items, callers) in [(others, FEW), (lenders, MANY)] {
        if !items.is_empty() && run.goes_on() {
            run_beside(run, &items, callers, progress)?;
        }
    }
    Ok(())
}

/// The same beside so many who want memory.
fn run_beside(
    run: &mut Run<'_>,
    items: &[Item],
    callers: usize,
    progress: &dyn Fn(&str),
) -> Result<(), StressError> {
    let mut stage = Stage::set(run, callers)?;
    for (number, batch) in items.chunks(BATCH).enumerate() {
        progress(&format!("kill points of clients: {} of {}", number * BATCH, items.len()));
        let mut victims = stage.enter(run, batch)?;
        loop {
            let mut all_gone = true;
            for victim in &mut victims {
                all_gone &= victim.step(run)?;
            }
            if all_gone {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        drop(victims);
        if let Some(how) = stage.server.has_ended() {
            run.counts.violation(format!("I1: the server ended: {how}"));
            return Ok(());
        }
        stage.settle(run, number >= WARM_UP)?;
        if (number + 1).is_multiple_of(BATCHES_PER_LOOK) {
            stage.look(run)?;
        }
        if !run.goes_on() {
            return Ok(());
        }
    }
    stage.look(run)?;
    stage.bystander.end()?;
    stage.driver.end()
}

/// Has clients come by the points of the way back to a server that died under their calls.
pub(super) fn run_returning(
    run: &mut Run<'_>,
    items: &[Item],
    progress: &dyn Fn(&str),
) -> Result<(), StressError> {
    let directory = Directory::new("returning")?;
    let path = directory.path().join("s");
    let (log, answered) = (directory.path().join("log"), directory.path().join("answered"));
    let core = run.cores.clients[0];
    let server_job = LedgerJob { path: path.clone(), log: log.clone(), cores: vec![run.cores.server] };
    let start = || -> Result<Process, StressError> {
        let mut server = processes::spawn(Role::LedgerServer, &server_job, Stdio::null())?;
        let () = server.receive(PATIENCE)?;
        Ok(server)
    };
    let mut ledger = VictimsLedger::new(&log, &answered);
    let mut server = start()?;
    for (done, item) in items.iter().enumerate() {
        progress(&format!("kill points of clients that return: {done} of {}", items.len()));
        let job = VictimJob {
            path: path.clone(),
            answered: answered.clone(),
            core,
            number: item.number,
            habit: Habit::Returning,
        };
        let armed = item.environment(1);
        let mut process = processes::spawn_armed(Role::PointsVictim, &job, Stdio::piped(), Some(armed))?;
        let () = process.receive(PATIENCE)?;
        server.stop()?;
        process.send(&())?;
        let () = process.receive(PATIENCE)?;
        // Killed and reaped, with the calls under way.
        drop(server);
        server = start()?;
        let after = After::by(item.dice);
        let mut victim = Victim { item: *item, after, process, phase: Phase::Lives, begun: Instant::now() };
        while !victim.step(run)? {
            std::thread::sleep(PAUSE);
        }
        drop(victim);
        let (_, wrong) = kills::settled(&server, None, 0)?;
        if let Some(wrong) = wrong {
            run.counts.violation(format!("after {}: {wrong}", item.label));
        }
        if !run.goes_on() {
            return Ok(());
        }
    }
    compare(&mut ledger, run)?;
    run.keep()
}

/// What the victims were answered, against what was executed.
fn compare(ledger: &mut VictimsLedger, run: &mut Run<'_>) -> Result<(), StressError> {
    let (answered, violations) = ledger.compare()?;
    run.counts.victims_answered += answered;
    violations.into_iter().for_each(|violation| run.counts.violation(violation));
    Ok(())
}

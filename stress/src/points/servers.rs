//! Servers that come by their points, one after the other on the same path, under clients that go on.

use super::driver::{DriverJob, Order};
use super::ledger::LedgerJob;
use super::{After, Item, OCCURRENCES, PATIENCE, Raised, Run};
use crate::error::StressError;
use crate::kills::{self, Held};
use crate::processes::{self, Process, Role, State};
use crate::scratch::Directory;
use rustix::process::Signal;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Servers between two comparisons of what callers were told with what was executed.
const ITEMS_PER_AUDIT: usize = 32;
/// Between two looks at the server.
const PAUSE: Duration = Duration::from_micros(100);

/// Points that a server comes by once in its life.
fn is_of_start(label: &str) -> bool {
    ["server.lock.", "server.socket.bound", "server.socket.listening", "server.socket.renamed"]
        .iter()
        .any(|begin| label.starts_with(begin))
}

struct Stage {
    job: LedgerJob,
    driver: Process,
    /// Clients of it that come back.
    returning: usize,
    /// What the driver holds when all of its clients are there and rest.
    held: Option<Held>,
    _directory: Directory,
}

/// A server can be relied on to come by them only while there is too little memory.
const SCARCE: [&str; 2] = ["server.lease.punched", "server.lease.gone"];
/// Clients that come back, of a driver of all kinds.
const RETURNING: usize = 3;

/// Has servers come by these points.
pub(super) fn run(run: &mut Run<'_>, items: &[Item], progress: &dyn Fn(&str)) -> Result<(), StressError> {
    let (scarce, others) = items.iter().copied().partition::<Vec<_>, _>(|item| SCARCE.contains(&item.label));
    for (items, callers) in [(others, None), (scarce, Some(super::clients::MANY))] {
        if !items.is_empty() && run.goes_on() {
            run_under(run, &items, callers, progress)?;
        }
    }
    Ok(())
}

/// The same under clients of all kinds, or so many that want memory.
fn run_under(
    run: &mut Run<'_>,
    items: &[Item],
    callers: Option<usize>,
    progress: &dyn Fn(&str),
) -> Result<(), StressError> {
    let directory = Directory::new("servers")?;
    let (path, log) = (directory.path().join("s"), directory.path().join("log"));
    let core = run.cores.clients[0];
    let job = LedgerJob { path: path.clone(), log: log.clone(), cores: vec![run.cores.server, core] };
    let driver_job = DriverJob { path, log, core, callers, waits: false };
    let mut driver = processes::spawn(Role::PointsDriver, &driver_job, Stdio::piped())?;
    let () = driver.receive(PATIENCE)?;
    let returning = callers.unwrap_or(RETURNING);
    let mut stage = Stage { job, driver, returning, held: None, _directory: directory };
    for (number, item) in items.iter().enumerate() {
        if number.is_multiple_of(ITEMS_PER_AUDIT) {
            progress(&format!("kill points of servers: {number} of {}", items.len()));
        }
        stage.suffer(run, item)?;
        if (number + 1).is_multiple_of(ITEMS_PER_AUDIT) {
            stage.audit(run)?;
        }
        if !run.goes_on() {
            return Ok(());
        }
    }
    stage.audit(run)?;
    // Its clients look for a server that does not come any more.
    Ok(())
}

impl Stage {
    /// One server, until it has come by its point and has had what follows.
    fn suffer(&mut self, run: &mut Run<'_>, item: &Item) -> Result<(), StressError> {
        let armed = item.environment(if is_of_start(item.label) { 1 } else { OCCURRENCES });
        let mut server = processes::spawn_armed(Role::LedgerServer, &self.job, Stdio::null(), Some(armed))?;
        let begun = Instant::now();
        let state = loop {
            match server.state()? {
                State::Lives if begun.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
                state => break state,
            }
        };
        match (state, item.raised) {
            (State::Ended, Raised::Kill) if server.was_killed()? => {
                run.counts.tally(item.label).killed += 1;
            }
            (State::Stopped, Raised::Stop) => match After::by(item.dice) {
                After::Killed(pause) => {
                    std::thread::sleep(pause);
                    run.counts.tally(item.label).stopped += 1;
                }
                After::Continued(pause) => {
                    std::thread::sleep(pause);
                    server.signal(Signal::CONT)?;
                    self.serves_on(run, item, &mut server)?;
                }
            },
            (State::Ended, _) => {
                let how = server.has_ended().unwrap_or_default();
                run.counts.missed(item, &format!("the process ended before ({how})"));
            }
            (State::Lives | State::Stopped, _) => run.counts.missed(item, "it lives on"),
        }
        // Killed, if it is not dead already, and reaped.
        drop(server);
        Ok(())
    }

    /// A server that was continued goes on serving.
    fn serves_on(&mut self, run: &mut Run<'_>, item: &Item, server: &mut Process) -> Result<(), StressError> {
        let before = self.answered()?;
        let begun = Instant::now();
        while self.answered()? <= before + 2 {
            if let Some(how) = server.has_ended() {
                let label = item.label;
                run.counts.violation(format!("{label}: a server that was continued there ended: {how}"));
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                run.counts
                    .violation(format!("{}: a server that was continued there serves nobody", item.label));
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
        run.counts.tally(item.label).continued += 1;
        Ok(())
    }

    /// Calls that the clients have been answered.
    fn answered(&mut self) -> Result<u64, StressError> {
        self.driver.send(&Order::Progress)?;
        self.driver.receive(PATIENCE)
    }

    /// A server that lives: every call comes to its end, and what the callers were told is compared with what was executed;
    /// neither it nor the clients hold more than they did.
    fn audit(&mut self, run: &mut Run<'_>) -> Result<(), StressError> {
        let mut server = processes::spawn(Role::LedgerServer, &self.job, Stdio::null())?;
        let () = server.receive(PATIENCE)?;
        let before = self.answered()?;
        let begun = Instant::now();
        while self.answered()? <= before + 8 && begun.elapsed() < PATIENCE {
            std::thread::sleep(PAUSE);
        }
        self.driver.send(&Order::Audit)?;
        run.counts.add(self.driver.receive(2 * PATIENCE)?);
        // Those who come and go have gone.
        let (_, wrong) = kills::settled(&server, None, self.returning)?;
        if let Some(wrong) = wrong {
            run.counts.violation(format!("the server: {wrong}"));
        }
        let (held, wrong) =
            kills::settled(&self.driver, self.held.map(Held::without_memory), self.returning)?;
        self.held.get_or_insert(held);
        if let Some(wrong) = wrong {
            run.counts.violation(format!("the clients: {wrong}"));
        }
        run.keep()?;
        self.driver.send(&Order::GoOn)
    }
}

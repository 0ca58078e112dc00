//! Level 5, chaos: each second something is done to the server that it must get over, by real processes: clients killed in
//! the middle of calls, corrupted entries, handshakes that never come, messages that are too long, memory that everybody
//! wants, floods, and the server itself killed and started again. A normal client goes on meanwhile and must notice nothing
//! of all that but the death of its server.
//!
//! Whoever does harm gives way to the normal client where both run on one core: judged is what the server makes of them, not how
//! the kernel shares out a core among clients.

use crate::clock::{SECOND, now_ns, sleep_until};
use crate::content::Nonces;
use crate::error::StressError;
use crate::floor::{self, Pace};
use crate::hostile::{self, Attack, HostileJob};
use crate::latency::{Latency, MAX_NS, us};
use crate::level1;
use crate::load::Outcome;
use crate::machine::Cores;
use crate::memory::{Peak, Sampler, Segments};
use crate::mixed::{self, Calls, Go, Idle, MixedJob, Mixture, Share};
use crate::monitor::{Counters, Monitor};
use crate::normal::{self, Endured, NormalJob, RECOVERY_NS};
use crate::processes::Process;
use crate::report::{self, Check, Row, grouped, mib};
use crate::scratch::Directory;
use crate::server::{self, ServerJob};
use rustix::process::Signal;
use serde::Serialize;
use std::time::Duration;

/// This level's number.
pub const LEVEL: u32 = 5;
/// Length with `--short` and `--full`, seconds; one injection each.
pub const SHORT: f64 = 28.0;
/// See [`SHORT`].
pub const FULL: f64 = 1800.0;
/// Times that each attack is made in its second (R6.5).
const KILLED: usize = 10;
const CORRUPTED: u64 = 50;
const SILENT: usize = 20;
const OVERSIZED: u64 = 30;
const FLOOD: u64 = 1000;
/// Long calls of the processes that want more memory than there is.
const PRESSURE: Calls = Calls { connections: 24, rounds: 1 };
/// Recoveries that may take longer than [`RECOVERY_NS`] have to be fewer than this part.
const FAILURES_MAX: f64 = 0.01;
/// The server's memory at the end, bytes.
const FOOTPRINT_MAX: u64 = 3 << 20;
/// The bare ring's windows, nanoseconds.
const FLOOR_NS: u64 = SECOND;
/// How long a process may take to report.
const STEP: Duration = Duration::from_secs(60);

/// What is to be run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Length, seconds.
    pub seconds: f64,
    /// Seed of every content and of what is injected when.
    pub seed: u64,
}

/// What can be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Injection {
    KillClients,
    Corrupt,
    Silent,
    Oversized,
    Pressure,
    Flood,
    KillServer,
}

pub(crate) const INJECTIONS: [Injection; 7] = [
    Injection::KillClients,
    Injection::Corrupt,
    Injection::Silent,
    Injection::Oversized,
    Injection::Pressure,
    Injection::Flood,
    Injection::KillServer,
];

/// How often what was injected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Injected {
    pub seconds: u64,
    pub clients_killed: u64,
    pub entries_corrupted: u64,
    pub handshakes_timed_out: u64,
    pub messages_too_long: u64,
    pub long_calls_under_pressure: u64,
    pub tiny_messages: u64,
    pub servers_killed: u64,
}

/// Runs the row.
///
/// # Errors
///
/// [`StressError`] if it could not be run to its end.
pub fn run(plan: &Plan, cores: &Cores, progress: impl Fn(&str)) -> Result<Vec<Row>, StressError> {
    let say = |doing: &str| progress(&format!("level {LEVEL}: {doing}"));
    say("the bare ring");
    let before = floor::latency(plan.seed, cores, FLOOR_NS, Pace::AtOnce)?;
    let mut chaos = Chaos::start(plan, cores)?;
    let begin_ns = now_ns();
    let end_ns = begin_ns + (plan.seconds * SECOND as f64) as u64;
    chaos.normal.send(&())?;
    let mut order = INJECTIONS;
    for second in 0.. {
        let at_ns = begin_ns + second * SECOND;
        if at_ns + SECOND > end_ns {
            break;
        }
        // Each once in seven seconds, in an order of the seed's.
        if second % INJECTIONS.len() as u64 == 0 {
            shuffle(&mut order, &mut chaos.chance);
        }
        sleep_until(at_ns);
        let injection = order[second as usize % order.len()];
        say(&format!("second {}: {injection:?}", second + 1));
        chaos.inject(injection)?;
        chaos.injected.seconds += 1;
    }
    // Where the machine was too slow for one a second, the last one has its second all the same.
    sleep_until(end_ns.max(now_ns() + SECOND));
    chaos.normal.send(&())?;
    let endured = chaos.normal.receive(STEP)?;
    let mut found = chaos.end(endured)?;
    say("the bare ring again");
    found.floor = before.worse(floor::latency(plan.seed, cores, FLOOR_NS, Pace::AtOnce)?);
    Ok(vec![to_row(plan, found)])
}

pub(crate) fn shuffle(order: &mut [Injection], chance: &mut Nonces) {
    for last in (1..order.len()).rev() {
        order.swap(last, chance.draw() as usize % (last + 1));
    }
}

/// A server that was killed: when, and when the next one listened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Restart {
    pub killed_ns: u64,
    pub listening_ns: u64,
}

/// What a row is made of.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub endured: Endured,
    restarts: Vec<Restart>,
    injected: Injected,
    /// Injections that did not go as they had to.
    pub faults: Outcome,
    memory: Peak,
    counters: Counters,
    pub server_alive: bool,
    floor: Latency,
}

/// Everybody who takes part. Dropped in this order.
pub(crate) struct Chaos<'a> {
    pub normal: Process,
    hostile: Process,
    pub server: Process,
    job: ServerJob,
    cores: &'a Cores,
    plan: &'a Plan,
    pub chance: Nonces,
    /// Client processes started so far.
    started: u64,
    injected: Injected,
    restarts: Vec<Restart>,
    pub faults: Outcome,
    _directory: Directory,
}

impl<'a> Chaos<'a> {
    pub fn start(plan: &'a Plan, cores: &'a Cores) -> Result<Self, StressError> {
        let directory = Directory::new("chaos")?;
        let path = directory.path().join("s");
        let job = ServerJob {
            path: path.clone(),
            core: cores.server,
            connections: 1000,
            sessions: 200,
            half_open_per_process: Some(2 * SILENT as u32),
            ..ServerJob::default()
        };
        let (core, seed) = (cores.client(0), plan.seed);
        let hostile = hostile::start(&HostileJob { path: path.clone(), core, seed, number: 1 })?;
        hostile.give_way()?;
        let server = server::start(&job)?;
        let normal = normal::start(&NormalJob { path, core, seed, number: 0 })?;
        Ok(Self {
            normal,
            hostile,
            server,
            job,
            cores,
            plan,
            chance: Nonces::new(seed, 2),
            started: 2,
            injected: Injected::default(),
            restarts: Vec::new(),
            faults: Outcome::default(),
            _directory: directory,
        })
    }

    /// Does one thing to the server.
    pub fn inject(&mut self, injection: Injection) -> Result<(), StressError> {
        match injection {
            Injection::KillClients => self.kill_clients()?,
            Injection::Corrupt => {
                self.injected.entries_corrupted += self.attack(Attack::Corrupted(CORRUPTED))?
            }
            Injection::Silent => self.injected.handshakes_timed_out += self.attack(Attack::Silent(SILENT))?,
            Injection::Oversized => {
                self.injected.messages_too_long += self.attack(Attack::Oversized(OVERSIZED))?
            }
            Injection::Pressure => self.press()?,
            Injection::Flood => self.injected.tiny_messages += self.attack(Attack::Flood(FLOOD))?,
            Injection::KillServer => self.kill_server()?,
        }
        Ok(())
    }

    /// Has the hostile process do something; returns how often it did.
    fn attack(&mut self, attack: Attack) -> Result<u64, StressError> {
        self.hostile.send(&attack)?;
        Ok(self.hostile.receive::<Result<u64, String>>(STEP)?.unwrap_or_else(|why| {
            self.faults.errors += 1;
            self.faults.note(why);
            0
        }))
    }

    /// Client processes with calls of both kinds, killed while these are under way.
    fn kill_clients(&mut self) -> Result<(), StressError> {
        let share =
            Share { ring_entries: 16, small_slots: 4, medium_slots: 4, lease_pages: 32, long_at_once: 1 };
        let short = Calls { connections: 4, rounds: 1 << 20 };
        let long = Calls { connections: 1, rounds: 1 << 20 };
        let mut victims =
            (0..KILLED).map(|_| self.client(share, short, long)).collect::<Result<Vec<_>, _>>()?;
        level1::connect(&mut victims)?;
        victims.iter_mut().try_for_each(|victim| victim.send(&Go { begin_ns: now_ns() }))?;
        // Long enough for each to be at work, never the same.
        std::thread::sleep(Duration::from_micros(20_000 + self.chance.draw() % 60_000));
        for victim in &mut victims {
            if let Some(how) = victim.has_ended() {
                self.faults.errors += 1;
                self.faults.note(format!("a client ended before it was killed ({how})"));
                continue;
            }
            victim.signal(Signal::KILL)?;
            self.injected.clients_killed += 1;
        }
        Ok(())
    }

    /// A process that wants more memory for long calls than there is; every answer is checked.
    fn press(&mut self) -> Result<(), StressError> {
        let share =
            Share { ring_entries: 128, small_slots: 32, medium_slots: 0, lease_pages: 768, long_at_once: 24 };
        let mut clients = [self.client(share, Calls::default(), PRESSURE)?];
        level1::connect(&mut clients)?;
        let [mut client] = clients;
        client.send(&Go { begin_ns: now_ns() })?;
        let found: Mixture = client.receive(STEP)?;
        self.injected.long_calls_under_pressure += found.long;
        if found.long != PRESSURE.all() {
            self.faults.errors += 1;
            self.faults.note(format!("{} of {} long calls answered", found.long, PRESSURE.all()));
        }
        self.faults.add(Outcome { answered: 0, answered_in_all: 0, alive: 0, ..found.faults });
        client.end()
    }

    fn client(&mut self, share: Share, short: Calls, long: Calls) -> Result<Process, StressError> {
        self.started += 1;
        let client = mixed::start(&MixedJob {
            path: self.job.path.clone(),
            core: self.cores.client(self.started as usize),
            idle: Idle::Sleep,
            share,
            short,
            long,
            seed: self.plan.seed,
            number: self.started,
        })?;
        client.give_way()?;
        Ok(client)
    }

    fn kill_server(&mut self) -> Result<(), StressError> {
        if let Some(how) = self.server.has_ended() {
            self.faults.errors += 1;
            self.faults.note(format!("the server ended before it was killed ({how})"));
        }
        let killed_ns = now_ns();
        self.server.signal(Signal::KILL)?;
        while self.server.has_ended().is_none() {
            std::thread::sleep(Duration::from_micros(100));
        }
        // Its socket is still there: the new one must take that over.
        self.server = server::start(&self.job)?;
        self.restarts.push(Restart { killed_ns, listening_ns: now_ns() });
        self.injected.servers_killed += 1;
        Ok(())
    }

    /// Looks at what is left.
    pub fn end(mut self, endured: Endured) -> Result<Found, StressError> {
        let mut found = Found {
            endured,
            restarts: self.restarts,
            injected: self.injected,
            faults: self.faults,
            ..Found::default()
        };
        if let Some(how) = self.server.has_ended() {
            found.faults.errors += 1;
            found.faults.note(format!("the server ended early ({how})"));
            return Ok(found);
        }
        found.server_alive = true;
        self.normal.end()?;
        self.hostile.end()?;
        std::thread::sleep(Duration::from_secs(1));
        let monitor = Monitor::connect(&self.job.path)?;
        found.counters = monitor.count()?;
        let segments = Segments::of(&[std::process::id()], 1)?;
        found.memory = Sampler::start(self.server.pid(), segments).stop()?;
        Ok(found)
    }
}

/// How long after each restart the normal client was back, nanoseconds; `None` where it never was. And how many servers it
/// lost that nobody had killed.
fn recoveries(restarts: &[Restart], endured: &Endured) -> (Vec<Option<u64>>, usize) {
    let mut taken = vec![false; endured.losses.len()];
    let recovery = |(n, restart): (usize, &Restart)| {
        let until_ns = restarts.get(n + 1).map_or(u64::MAX, |next| next.killed_ns);
        let caused = |loss: &normal::Loss| (restart.killed_ns..until_ns).contains(&loss.lost_ns);
        let loss = endured.losses.iter().position(caused)?;
        taken[loss] = true;
        let back_ns = endured.losses[loss].back_ns;
        (back_ns > 0).then(|| back_ns.saturating_sub(restart.listening_ns))
    };
    let all = restarts.iter().enumerate().map(recovery).collect();
    (all, taken.iter().filter(|taken| !**taken).count())
}

/// What rows of this level have beside what all have.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct Figures {
    pub injected: Injected,
    pub calls: Latency,
    /// The worse of the bare ring's two runs in each figure.
    pub floor: Latency,
    /// From a new server's first breath to the next right answer, milliseconds; `null`: never.
    pub recoveries_ms: Vec<Option<f64>>,
    /// What the normal client's calls said when it lost a server.
    pub losses: Vec<normal::Loss>,
    pub restarts: Vec<Restart>,
}

fn to_row(plan: &Plan, found: Found) -> Row {
    let Found { endured, restarts, injected, mut faults, memory, counters, server_alive, floor } = found;
    let (all, unexplained) = recoveries(&restarts, &endured);
    let failed = all.iter().filter(|after| after.is_none_or(|ns| ns > RECOVERY_NS)).count();
    let failures = failed as f64 / all.len().max(1) as f64;
    let calls = endured.calls;
    let right = endured.faults.answered_in_all;
    faults.add(Outcome { answered: 0, answered_in_all: 0, ..endured.faults });
    let judged = !cfg!(debug_assertions);
    let ms: Vec<Option<f64>> = all.iter().map(|ns| ns.map(|ns| ns as f64 / 1e6)).collect();
    let slowest = ms.iter().flatten().fold(0.0f64, |a, b| a.max(*b));
    let beside = |name: fn(&Latency) -> u64| format!("{} (bare {})", us(name(&calls)), us(name(&floor)));
    let at_least_one = |claim, times| Check::above(claim, Some(0), times);
    let mut checks = vec![
        Check::exactly("answers with wrong content", 0, faults.wrong),
        Check::exactly("errors, and injections that went otherwise", 0, faults.errors),
        Check::exactly("servers lost that nobody had killed", 0, unexplained as u64),
        Check::judged(
            "recoveries that took over 100 ms",
            format!("< {:.0} %", FAILURES_MAX * 100.0),
            format!("{failed} of {}", all.len()),
            judged.then_some(failures < FAILURES_MAX),
        ),
        Check::judged(
            "successful calls, p99",
            format!("< {}", us(MAX_NS)),
            beside(|l| l.p99_ns),
            judged.then_some(calls.p99_ns < MAX_NS),
        ),
        Check::above("calls answered rightly", Some(0), right),
        Check::exactly("server alive at the end", 1, server_alive.into()),
        Check::exactly("connections left at the end", 1, counters.connections_open),
        Check::at_most(
            "server footprint at the end, bytes",
            judged.then_some(FOOTPRINT_MAX),
            memory.footprint_bytes,
        ),
    ];
    // A run too short for all kinds is for trying it out.
    let every = plan.seconds >= INJECTIONS.len() as f64;
    let counts = [
        ("clients killed in mid-call", injected.clients_killed),
        ("entries corrupted, session ended", injected.entries_corrupted),
        ("handshakes timed out", injected.handshakes_timed_out),
        ("messages too long, refused", injected.messages_too_long),
        ("long calls under memory pressure, right", injected.long_calls_under_pressure),
        ("tiny messages in floods, right", injected.tiny_messages),
        ("servers killed and started again", injected.servers_killed),
    ];
    checks.extend(counts.map(|(claim, times)| {
        if every { at_least_one(claim, times) } else { Check::reported(claim, grouped(times)) }
    }));
    checks.extend([
        Check::reported("seconds with an injection", grouped(injected.seconds)),
        Check::reported("slowest recovery", format!("{slowest:.1} ms")),
        Check::reported("calls, p50", beside(|l| l.p50_ns)),
        Check::reported("calls, p99.9", beside(|l| l.p999_ns)),
        Check::reported("calls, longest", beside(|l| l.max_ns)),
        Check::reported("server footprint at the end", mib(memory.footprint_bytes)),
    ]);
    Row {
        level: LEVEL,
        row: "chaos",
        connections: 1,
        sessions: 1,
        client_processes: 2 + injected.clients_killed as usize,
        seconds: plan.seconds,
        wrong: faults.wrong,
        errors: faults.errors,
        lost: faults.lost,
        memory,
        figures: report::Figures::Chaos(Figures {
            injected,
            calls,
            floor,
            recoveries_ms: ms,
            losses: endured.losses,
            restarts,
        }),
        notes: faults.notes,
        checks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normal::Loss;

    fn loss(lost_ns: u64, back_ns: u64) -> Loss {
        Loss { lost_ns, back_ns, why: String::new() }
    }

    /// Goal:   each restart is matched with the loss that it caused; a server lost without a cause, and one that the client
    ///         never got over, are seen.
    #[test]
    fn restarts_and_losses_are_matched() {
        let restart = |killed_ns, listening_ns| Restart { killed_ns, listening_ns };
        let restarts =
            [restart(100, 150), restart(5 * SECOND, 5 * SECOND + 9), restart(9 * SECOND, 10 * SECOND)];
        let losses = vec![
            loss(110, 170),
            loss(3 * SECOND, 3 * SECOND + 1),
            loss(5 * SECOND + 3, 5 * SECOND + 4),
            loss(9 * SECOND + 1, 0),
        ];
        let endured = Endured { losses, ..Endured::default() };
        assert_eq!(recoveries(&restarts, &endured), (vec![Some(20), Some(0), None], 1));
    }

    #[test]
    fn every_injection_has_its_turn_in_seven_seconds() {
        let mut order = INJECTIONS;
        for seed in 0..20 {
            shuffle(&mut order, &mut Nonces::new(seed, 2));
            assert!(INJECTIONS.iter().all(|injection| order.contains(injection)));
        }
    }
}

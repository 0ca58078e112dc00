//! `doorbell demo`: half a minute that shows what doorbell is for, with real processes and a ledger at the end.
//!
//! First an editor's keystrokes: one process that asks for a completion a hundred times a second, beside a hundred
//! processes with ten sessions each that never pause; the same script over a unix socket; the same keystrokes beside a
//! client that writes at random into its shared memory. Then the server is killed in the midst of calls and started again;
//! what became of each call is compared with what the handlers wrote down before they answered.
//!
//! Everything is measured in processes of their own (trap 22), every answer is checked, and the exit status tells whether
//! all that must hold did.

pub mod hostile;
pub mod ledger;
pub mod load;
pub mod server;

use super::bench::child::{self, Process, Role};
use super::bench::clock::{SECOND, now_ns, sleep_until};
use super::bench::error::BenchError;
use super::bench::histogram::Latencies;
use super::bench::memory::{Memory, Probe, Segments};
use super::bench::options::Policy;
use super::bench::procfs;
use super::bench::uds::{self, UdsJob};
use clap::Args;
use hostile::{Attacks, HostileJob};
use ledger::{CallerJob, Killed, Ledger, Story};
use load::{LoadJob, LoadResult, Peer, Schedule};
use rustix::process::{Pid, Signal};
use server::ServerJob;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};

/// Show in half a minute what doorbell does: keystrokes beside a thousand busy sessions, the same over a unix socket, a
/// hostile client, and a killed server with a ledger of every call.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Client processes of the load, each with ten sessions.
    #[arg(long, value_name = "P", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=400))]
    processes: u16,
    /// Length of each of the four parts, seconds.
    #[arg(long, value_name = "S", default_value_t = 4.0, value_parser = seconds)]
    seconds: f64,
}

/// Sessions of each process of the load.
const SESSIONS: usize = 10;
/// Processes whose calls are in flight when the server is killed.
const CALLERS: u64 = 10;

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("`{text}` is no number of seconds from 0.5 to 60")),
    }
}

/// Runs the demonstration; the exit status says whether everything held.
///
/// # Errors
///
/// [`BenchError`]: what kept it from being run.
pub fn run(options: &DemoOptions) -> Result<ExitCode, BenchError> {
    procfs::raise_descriptor_limit()?;
    let stage = Stage::new(options)?;
    println!("An editor asks for a completion a hundred times a second, 1 KiB each way.");
    println!("Beside it {} processes with {SESSIONS} sessions each call without pause.\n", options.processes);
    let mut held = stage.keystrokes()?;
    held &= stage.attacked()?;
    held &= stage.killed()?;
    println!("\n{}", if held { "Everything held." } else { "Something did not hold: see above." });
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where it happens: a directory that goes with it.
struct Stage {
    directory: PathBuf,
    processes: usize,
    seconds: f64,
}

impl Stage {
    fn new(options: &DemoOptions) -> Result<Self, BenchError> {
        use std::os::unix::fs::DirBuilderExt;
        // The clock tells it from one that a killed process of the same number has left.
        let name = format!("doorbell-demo-{}-{}", std::process::id(), now_ns());
        let directory = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&directory).map_err(|e| BenchError::os("mkdir", e))?;
        Ok(Self { directory, processes: options.processes.into(), seconds: options.seconds })
    }

    fn server(&self, name: &str, number: u64) -> Result<(Process, PathBuf), BenchError> {
        let path = self.directory.join(name);
        let job = ServerJob {
            path: path.clone(),
            log: self.directory.join("executed"),
            number,
            sessions: (self.processes * SESSIONS) as u32 + 32,
        };
        let mut server = child::spawn(Role::DemoServer, &job, Stdio::piped(), Stdio::piped())?;
        let () = server.receive()?;
        Ok((server, path))
    }

    /// Keystrokes beside the load, here and over a unix socket; whether every answer was right.
    fn keystrokes(&self) -> Result<bool, BenchError> {
        println!(
            "{:24}{:>12}{:>12}{:>14}{:>14}",
            "keystrokes beside load", "p50", "p99", "load calls/s", "server"
        );
        let (server, path) = self.server("a", 0)?;
        let mine = self.play(Peer::Doorbell(path), server.pid(), self.processes)?;
        drop(server);
        mine.print("doorbell");
        let (server, address) = self.unix_server()?;
        let theirs = self.play(Peer::Unix(address), server.pid(), self.processes)?;
        drop(server);
        theirs.print("unix socket");
        Ok(mine.wrong + theirs.wrong == 0)
    }

    /// A server of unix sockets with the same work.
    fn unix_server(&self) -> Result<(Process, String), BenchError> {
        let (listener, address) = uds::listen().map_err(|e| BenchError::peer("listening", e))?;
        let job = UdsJob {
            connections: self.processes * SESSIONS + 1,
            in_flight: 1,
            size: load::SIZE,
            policy: Policy::Block,
            cpu: None,
            yields: false,
        };
        let server = child::spawn(Role::UdsServer, &job, Stdio::from(listener), Stdio::null())?;
        Ok((server, address))
    }

    /// Load and keystrokes against one server.
    fn play(&self, peer: Peer, server: u32, processes: usize) -> Result<Scene, BenchError> {
        let job = |sessions, keys| LoadJob { peer: peer.clone(), sessions, keys };
        let start = |job| child::spawn(Role::DemoLoad, &job, Stdio::piped(), Stdio::piped());
        let mut editor = start(job(1, true))?;
        let mut load = (0..processes).map(|_| start(job(SESSIONS, false))).collect::<Result<Vec<_>, _>>()?;
        for process in load.iter_mut().chain([&mut editor]) {
            let () = process.receive()?;
        }
        let start_ns = now_ns() + SECOND / 5;
        let end_ns = start_ns + (self.seconds * SECOND as f64) as u64;
        for process in load.iter_mut().chain([&mut editor]) {
            process.send(&Schedule { start_ns, end_ns })?;
        }
        sleep_until(end_ns - SECOND / 10);
        let memory = Probe::new(server, Segments::of(&[server])).sample();
        let keys: LoadResult = editor.receive()?;
        let mut scene = Scene { memory, wrong: keys.wrong, ..Scene::default() };
        for process in &mut load {
            let result: LoadResult = process.receive()?;
            scene.wrong += result.wrong;
            scene.per_second += result.calls as f64 / self.seconds;
        }
        scene.keys = keys.calls;
        scene.latencies = Some(Latencies::from_sparse(&keys.latencies));
        Ok(scene)
    }

    /// Keystrokes beside a client that breaks every rule; whether nobody noticed.
    fn attacked(&self) -> Result<bool, BenchError> {
        let (mut server, path) = self.server("b", 0)?;
        let job = HostileJob { path: path.clone(), seconds: self.seconds + 1.0, seed: now_ns() };
        let mut hostile = child::spawn(Role::DemoHostile, &job, Stdio::piped(), Stdio::piped())?;
        let scene = self.play(Peer::Doorbell(path), server.pid(), 0)?;
        let attacks: Attacks = hostile.receive()?;
        server.check_alive()?;
        println!(
            "\nA client wrote {} random words into its shared memory, punched {} holes into it and rang {} times for\n\
             nothing: {} of its sessions were ended. The server lives; {} keystrokes beside it, p50 {}, p99 {}, wrong {}.",
            attacks.words,
            attacks.holes,
            attacks.rings,
            attacks.ended,
            scene.keys,
            scene.p(0.5),
            scene.p(0.99),
            scene.wrong,
        );
        Ok(scene.wrong == 0 && scene.keys > 0 && attacks.ended > 0)
    }

    /// The server is killed in the midst of calls; whether the ledger agrees with the log.
    fn killed(&self) -> Result<bool, BenchError> {
        let (first, path) = self.server("c", 1)?;
        let seconds = self.seconds.max(2.0);
        let job = |number| CallerJob { path: path.clone(), number, seconds };
        let start = |number| child::spawn(Role::DemoCaller, &job(number), Stdio::piped(), Stdio::piped());
        let mut callers = (0..CALLERS).map(start).collect::<Result<Vec<_>, _>>()?;
        for caller in &mut callers {
            let () = caller.receive()?;
        }
        for caller in &mut callers {
            caller.send(&())?;
        }
        sleep_until(now_ns() + (seconds * 0.4 * SECOND as f64) as u64);
        let kill_ns = now_ns();
        kill(first.pid())?;
        // Reaped, so that its lock is free.
        drop(first);
        let (second, _) = self.server("c", 2)?;
        let listening_ns = now_ns();
        let mut stories = Vec::new();
        for caller in &mut callers {
            let () = caller.receive()?;
            caller.send(&Killed { kill_ns })?;
            stories.push(caller.receive::<Story>()?);
        }
        drop(second);
        let log = std::fs::read(self.directory.join("executed"))
            .map_err(|e| BenchError::os("reading the log", e))?;
        let ledger = Ledger::draw(&stories, &log);
        println!(
            "\nThe server was killed, and started again {} ms later.",
            (listening_ns - kill_ns) / 1_000_000
        );
        println!("{ledger}");
        let back = ledger.last_resent_ns.saturating_sub(listening_ns) as f64 / 1e6;
        println!(
            "back in {back:.1} ms: the last call that was sent again was answered then, after the new server listened"
        );
        Ok(ledger.holds())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("demo: {} could not be removed: {error}", self.directory.display());
        }
    }
}

fn kill(pid: u32) -> Result<(), BenchError> {
    let pid = Pid::from_raw(pid as i32).ok_or_else(|| BenchError::option("pid", "is no process"))?;
    rustix::process::kill_process(pid, Signal::KILL).map_err(|e| BenchError::os("kill", e))
}

/// What was seen of one server.
#[derive(Default)]
struct Scene {
    keys: u64,
    wrong: u64,
    per_second: f64,
    memory: Option<Memory>,
    latencies: Option<Latencies>,
}

impl Scene {
    fn p(&self, share: f64) -> String {
        let ns = self.latencies.as_ref().and_then(|latencies| latencies.quantile(share));
        ns.map_or("-".to_owned(), |ns| {
            if ns < 1_000_000 {
                format!("{:.1} µs", ns as f64 / 1e3)
            } else {
                format!("{:.1} ms", ns as f64 / 1e6)
            }
        })
    }

    fn print(&self, name: &str) {
        let memory = self
            .memory
            .map_or("-".to_owned(), |m| format!("{:.1} MiB", m.footprint as f64 / (1 << 20) as f64));
        let (p50, p99) = (self.p(0.5), self.p(0.99));
        println!("{name:24}{p50:>12}{p99:>12}{:>14.0}{memory:>14}", self.per_second);
    }
}

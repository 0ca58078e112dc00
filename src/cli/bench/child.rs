//! The processes that benchmarks and the demonstration start: servers and clients, all from this very executable.
//!
//! Each dies with its parent's main thread, whatever happens to it (trap 13), and is killed and reaped when
//! its [`Process`] is dropped. A descriptor that a child needs is its standard input; a job is an argument.

use super::super::demo;
use super::error::BenchError;
use super::{doorbell, floor, floor_long, floor_stream, hog, silent, stream, uds, worker};
use clap::{Args, ValueEnum};
use rustix::process::{Pid, Signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The name of the hidden subcommand that takes [`ChildOptions`].
pub const SUBCOMMAND: &str = "bench-child";

/// What a child process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Serves the floor; standard input is the shared memory.
    FloorServer,
    /// Serves the floor of long bodies; standard input is the shared memory.
    LongFloorServer,
    /// Serves unix sockets; standard input is the listener.
    UdsServer,
    /// Serves doorbell with the bench handler.
    DoorbellServer,
    /// Drives any peer's sessions; standard input and output are a line protocol with the parent.
    Client,
    /// Burns its core until its standard input ends.
    Hog,
    /// Keeps sockets at the server that say nothing, until its standard input ends.
    Silent,
    /// Serves streams, with a worker that writes them.
    StreamServer,
    /// The floor of streamed chunks; standard input is the shared memory.
    StreamFloorServer,
    /// Serves the demonstration.
    DemoServer,
    /// Calls it, or its peer.
    DemoLoad,
    /// Breaks every rule there.
    DemoHostile,
    /// Has calls in flight there when the server is killed.
    DemoCaller,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::FloorServer => "floor-server",
            Role::LongFloorServer => "long-floor-server",
            Role::UdsServer => "uds-server",
            Role::DoorbellServer => "doorbell-server",
            Role::Client => "client",
            Role::Hog => "hog",
            Role::Silent => "silent",
            Role::StreamServer => "stream-server",
            Role::StreamFloorServer => "stream-floor-server",
            Role::DemoServer => "demo-server",
            Role::DemoLoad => "demo-load",
            Role::DemoHostile => "demo-hostile",
            Role::DemoCaller => "demo-caller",
        }
    }
}

/// Arguments of the hidden subcommand: for `doorbell bench` alone.
#[derive(Debug, Clone, Args)]
pub struct ChildOptions {
    /// What to be.
    role: Role,
    /// The process to die with.
    #[arg(long)]
    parent: i32,
    /// What to do, as the role wants it, JSON.
    #[arg(long)]
    job: String,
}

/// Does a child's work; returns when it is done.
///
/// # Errors
///
/// Whatever stopped it; to be printed, with a failing exit status.
pub fn run(options: &ChildOptions) -> Result<(), BenchError> {
    die_with(options.parent)?;
    match options.role {
        Role::FloorServer => floor::floor_server(stdin_fd()?, &options.job()?),
        Role::LongFloorServer => floor_long::floor_server(stdin_fd()?, &options.job()?),
        Role::UdsServer => uds::uds_server(stdin_fd()?, &options.job()?),
        Role::DoorbellServer => doorbell::serve(&options.job()?),
        Role::Client => worker::run(&options.job()?),
        Role::Hog => hog::run(options.job()?),
        Role::Silent => silent::run(&options.job()?),
        Role::StreamServer => stream::serve(&options.job()?),
        Role::StreamFloorServer => floor_stream::serve(stdin_fd()?, &options.job()?),
        Role::DemoServer => demo::server::run(&options.job()?),
        Role::DemoLoad => demo::load::run(&options.job()?),
        Role::DemoHostile => demo::hostile::run(&options.job()?),
        Role::DemoCaller => demo::ledger::run(&options.job()?),
    }
}

impl ChildOptions {
    fn job<J: DeserializeOwned>(&self) -> Result<J, BenchError> {
        serde_json::from_str(&self.job).map_err(|e| BenchError::option("job", e.to_string()))
    }
}

fn die_with(parent: i32) -> Result<(), BenchError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| BenchError::os("prctl(PR_SET_PDEATHSIG)", e))?;
    // It may have died before that call.
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Err(BenchError::option("parent", "is not the parent of this process"));
    }
    Ok(())
}

fn stdin_fd() -> Result<OwnedFd, BenchError> {
    std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| BenchError::os("dup(stdin)", e))
}

/// A child, killed when dropped.
#[derive(Debug)]
pub struct Process {
    role: Role,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<BufReader<ChildStdout>>,
}

/// Starts a child. To be called from the main thread: the child dies with the thread that started it.
///
/// # Errors
///
/// [`BenchError::Os`] if the process cannot be started.
pub fn spawn(role: Role, job: &impl Serialize, stdin: Stdio, stdout: Stdio) -> Result<Process, BenchError> {
    let job = serde_json::to_string(job).expect("a job has string keys only");
    let name = role.to_possible_value().expect("no role is skipped");
    let mut child = Command::new("/proc/self/exe")
        .arg0("doorbell")
        .args([SUBCOMMAND, name.get_name(), "--parent", &std::process::id().to_string(), "--job", &job])
        .stdin(stdin)
        .stdout(stdout)
        .spawn()
        .map_err(|e| BenchError::os("starting a process of the benchmark", e))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take().map(BufReader::new));
    Ok(Process { role, child, stdin, stdout })
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes sure that it still runs.
    ///
    /// # Errors
    ///
    /// [`BenchError::Child`] if it has ended.
    pub fn check_alive(&mut self) -> Result<(), BenchError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(self.ended()),
        }
    }

    /// Sends one line of JSON to its standard input.
    ///
    /// # Errors
    ///
    /// [`BenchError::Child`] if it has ended.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), BenchError> {
        let line = serde_json::to_string(message).expect("a message has string keys only") + "\n";
        let sent =
            self.stdin.as_mut().map(|stdin| stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()));
        if let Some(Ok(())) = sent { Ok(()) } else { Err(self.ended()) }
    }

    /// Waits for one line of JSON from its standard output.
    ///
    /// # Errors
    ///
    /// [`BenchError::Child`] if it ends instead, or says something else.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<M, BenchError> {
        let mut line = String::new();
        match self.stdout.as_mut().map(|stdout| stdout.read_line(&mut line)) {
            Some(Ok(n)) if n > 0 => serde_json::from_str(&line)
                .map_err(|e| BenchError::Child { role: self.role.name(), how: format!("{e} in {line:?}") }),
            _ => Err(self.ended()),
        }
    }

    fn ended(&mut self) -> BenchError {
        let how = self.child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
        BenchError::Child { role: self.role.name(), how }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already, which is what is wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

//! The processes of a level: servers and clients, all this very executable once more.
//!
//! Each dies with its parent's main thread, whatever happens to it (trap 13), and is killed and reaped when
//! its [`Process`] is dropped. Parent and child speak lines of JSON over the child's standard streams; a
//! descriptor that a child needs is its standard input instead.

use crate::error::StressError;
use crate::gallery::{attacks, bystander};
use crate::points::{driver, ledger, victim};
use crate::{assistant, client, floor, hostile, kills, mixed, normal, reconnect, server, torture};
use clap::{Args, ValueEnum};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The name of the hidden subcommand that takes [`ChildOptions`].
pub const SUBCOMMAND: &str = "child";
/// How long a process may take to end when it has nothing left to do.
const END: Duration = Duration::from_secs(10);

/// The lowest priority of ordinary processes.
const LAST: i32 = 19;

/// What a child process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// A doorbell server.
    Server,
    /// A doorbell client with its sessions.
    Client,
    /// A doorbell client with short and long calls at once.
    Mixed,
    /// A doorbell client with bulk calls and a probe.
    Torture,
    /// A doorbell client that asks models and has files analysed.
    Assistant,
    /// A client that breaks the protocol.
    Hostile,
    /// A client that goes on whatever happens.
    Normal,
    /// A client that is measured while others attack the server.
    Bystander,
    /// A client that goes past the library.
    Attacker,
    /// A client that calls on while others are killed.
    Watcher,
    /// A client that is to be killed.
    Victim,
    /// Serves the bare ring; standard input is the shared memory.
    FloorServer,
    /// Drives the bare ring; standard input is the shared memory.
    FloorClient,
    /// A doorbell server that is killed and started again.
    ReconnectServer,
    /// Clients that come back to it.
    ReconnectClient,
    /// A doorbell server that notes what it executes.
    LedgerServer,
    /// Clients that go on whatever happens to it.
    PointsDriver,
    /// A client that comes by a kill point.
    PointsVictim,
}

/// Whether a child lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It runs, or waits for something.
    Lives,
    /// A signal has stopped it.
    Stopped,
    /// It has ended.
    Ended,
}

impl Role {
    /// What it is called in messages and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
            Self::Mixed => "mixed",
            Self::Torture => "torture",
            Self::Assistant => "assistant",
            Self::Hostile => "hostile",
            Self::Normal => "normal",
            Self::Bystander => "bystander",
            Self::Attacker => "attacker",
            Self::Watcher => "watcher",
            Self::Victim => "victim",
            Self::FloorServer => "floor-server",
            Self::FloorClient => "floor-client",
            Self::ReconnectServer => "reconnect-server",
            Self::ReconnectClient => "reconnect-client",
            Self::LedgerServer => "ledger-server",
            Self::PointsDriver => "points-driver",
            Self::PointsVictim => "points-victim",
        }
    }
}

/// Arguments of the hidden subcommand.
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
pub fn run(options: &ChildOptions) -> Result<(), StressError> {
    die_with(options.parent)?;
    let job = &options.job;
    match options.role {
        Role::Server => server::serve(&serde_json::from_str(job)?),
        Role::Client => client::run(&serde_json::from_str(job)?),
        Role::Mixed => mixed::run(&serde_json::from_str(job)?),
        Role::Torture => torture::run(&serde_json::from_str(job)?),
        Role::Assistant => assistant::run(&serde_json::from_str(job)?),
        Role::Hostile => hostile::run(&serde_json::from_str(job)?),
        Role::Normal => normal::run(&serde_json::from_str(job)?),
        Role::Bystander => bystander::run(&serde_json::from_str(job)?),
        Role::Attacker => attacks::run(&serde_json::from_str(job)?),
        Role::Watcher => kills::watch(&serde_json::from_str(job)?),
        Role::Victim => kills::be_killed(&serde_json::from_str(job)?),
        Role::FloorServer => floor::serve(stdin_fd()?, &serde_json::from_str(job)?),
        Role::FloorClient => floor::drive(stdin_fd()?, &serde_json::from_str(job)?),
        Role::ReconnectServer => reconnect::serve(&serde_json::from_str(job)?),
        Role::ReconnectClient => reconnect::call(&serde_json::from_str(job)?),
        Role::LedgerServer => ledger::serve(&serde_json::from_str(job)?),
        Role::PointsDriver => driver::run(&serde_json::from_str(job)?),
        Role::PointsVictim => victim::run(&serde_json::from_str(job)?),
    }
}

fn die_with(parent: i32) -> Result<(), StressError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| StressError::os("prctl(PR_SET_PDEATHSIG)", e))?;
    // It may have died before that call.
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Err(StressError::NotAChild);
    }
    Ok(())
}

fn stdin_fd() -> Result<OwnedFd, StressError> {
    std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| StressError::os("dup(stdin)", e))
}

/// In a child: says one message to the parent.
///
/// # Errors
///
/// [`StressError::Os`] if the parent is gone.
pub fn say(message: &impl Serialize) -> Result<(), StressError> {
    let line = line_of(message);
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(line.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|e| StressError::os("write(stdout)", e))
}

/// In a child: the parent's next message, or `None` when it has closed the pipe.
///
/// # Errors
///
/// [`StressError::Os`] or [`StressError::Job`].
pub fn hear<M: DeserializeOwned>() -> Result<Option<M>, StressError> {
    let mut line = String::new();
    let n = std::io::stdin().lock().read_line(&mut line).map_err(|e| StressError::os("read(stdin)", e))?;
    if n == 0 { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
}

fn line_of(message: &impl Serialize) -> String {
    serde_json::to_string(message).expect("a message has string keys only") + "\n"
}

/// A child, killed when dropped.
#[derive(Debug)]
pub struct Process {
    role: Role,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Starts a child. To be called from the main thread: the child dies with the thread that started it.
///
/// # Errors
///
/// [`StressError::Os`] if the process cannot be started.
pub fn spawn(role: Role, job: &impl Serialize, stdin: Stdio) -> Result<Process, StressError> {
    spawn_armed(role, job, stdin, None)
}

/// The same with a variable in its environment: one that arms a kill point.
///
/// # Errors
///
/// As for [`spawn`].
pub fn spawn_armed(
    role: Role,
    job: &impl Serialize,
    stdin: Stdio,
    variable: Option<(&str, String)>,
) -> Result<Process, StressError> {
    let job = serde_json::to_string(job).expect("a job has string keys only");
    let mut child = Command::new("/proc/self/exe")
        .arg0("doorbell-stress")
        .args([SUBCOMMAND, role.name(), "--parent", &std::process::id().to_string(), "--job", &job])
        .envs(variable)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| StressError::os("starting a process", e))?;
    let stdin = child.stdin.take();
    let stdout = BufReader::new(child.stdout.take().expect("it was just made a pipe"));
    Ok(Process { role, child, stdin, stdout })
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends one message to its standard input.
    ///
    /// # Errors
    ///
    /// [`StressError::Child`] if it has ended.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), StressError> {
        let line = line_of(message);
        let sent =
            self.stdin.as_mut().map(|stdin| stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()));
        if let Some(Ok(())) = sent { Ok(()) } else { Err(self.ended()) }
    }

    /// Waits for one message from its standard output, at most so long.
    ///
    /// # Errors
    ///
    /// [`StressError::Child`] if it ends instead or says something else, [`StressError::Silent`] if it
    /// says nothing.
    pub fn receive<M: DeserializeOwned>(&mut self, within: Duration) -> Result<M, StressError> {
        let mut line = String::new();
        self.wait_readable(within)?;
        match self.stdout.read_line(&mut line) {
            Ok(n) if n > 0 => serde_json::from_str(&line)
                .map_err(|e| StressError::Child { role: self.role.name(), how: format!("{e} in {line:?}") }),
            _ => Err(self.ended()),
        }
    }

    /// Lets others have the core first: for processes whose own speed nobody judges.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn give_way(&self) -> Result<(), StressError> {
        rustix::process::setpriority_process(Some(Pid::from_child(&self.child)), LAST)
            .map_err(|e| StressError::os("setpriority", e))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), StressError> {
        // Its number cannot be another's: it is reaped only by this value.
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).map_err(|e| StressError::os("kill", e))
    }

    /// Stops it; when this returns it does nothing any more, and has not ended.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn stop(&self) -> Result<(), StressError> {
        self.signal(Signal::STOP)?;
        // Its end is not taken note of here.
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let stopped = || waitid(WaitId::Pid(Pid::from_child(&self.child)), options);
        rustix::io::retry_on_intr(stopped).map(drop).map_err(|e| StressError::os("waitid", e))
    }

    /// Whether it has said something, or has ended.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn has_said_something(&self) -> Result<bool, StressError> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(self.stdout.get_ref(), PollFlags::IN)];
        poll(&mut fds, Some(&now)).map(|ready| ready > 0).map_err(|e| StressError::os("poll of a process", e))
    }

    /// Whether it lives; its end is not taken note of here.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn state(&self) -> Result<State, StressError> {
        let options =
            WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let asked = || waitid(WaitId::Pid(Pid::from_child(&self.child)), options);
        let status = rustix::io::retry_on_intr(asked).map_err(|e| StressError::os("waitid", e))?;
        Ok(match status {
            None => State::Lives,
            Some(status) if status.stopped() => State::Stopped,
            Some(_) => State::Ended,
        })
    }

    /// Whether SIGKILL has ended it.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn was_killed(&mut self) -> Result<bool, StressError> {
        let signal = Signal::KILL.as_raw();
        Ok(self.status()?.is_some_and(|status| status.signal() == Some(signal)))
    }

    /// Whether it has ended by itself, successfully.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn was_successful(&mut self) -> Result<bool, StressError> {
        Ok(self.status()?.is_some_and(|status| status.success()))
    }

    fn status(&mut self) -> Result<Option<ExitStatus>, StressError> {
        self.child.try_wait().map_err(|e| StressError::os("waitpid", e))
    }

    /// Closes its standard input: nobody will tell it anything any more.
    pub fn close(&mut self) {
        drop(self.stdin.take());
    }

    /// Why it has ended, if it has.
    pub fn has_ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(status) => status.map(|status| status.to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Closes its standard input and waits until it has ended by itself, successfully.
    ///
    /// # Errors
    ///
    /// [`StressError::Child`] if it fails, or says more; [`StressError::Silent`] if it does not end.
    pub fn end(mut self) -> Result<(), StressError> {
        drop(self.stdin.take());
        self.wait_readable(END)?;
        let mut rest = String::new();
        let said = self.stdout.read_line(&mut rest).map_err(|e| StressError::os("read(pipe)", e))?;
        if said > 0 {
            return Err(StressError::Child { role: self.role.name(), how: format!("it said {rest:?}") });
        }
        let status = self.child.wait().map_err(|e| StressError::os("waitpid", e))?;
        if status.success() { Ok(()) } else { Err(self.failed(status)) }
    }

    /// Waits until there is something to read, or the end of it.
    fn wait_readable(&self, within: Duration) -> Result<(), StressError> {
        if !self.stdout.buffer().is_empty() {
            return Ok(());
        }
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(self.stdout.get_ref(), PollFlags::IN)], Some(&left)) {
                Ok(0) => {
                    return Err(StressError::Silent { role: self.role.name(), seconds: within.as_secs() });
                }
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(StressError::os("poll of a process", e)),
            }
        }
    }

    fn ended(&mut self) -> StressError {
        match self.child.wait() {
            Ok(status) => self.failed(status),
            Err(e) => StressError::os("waitpid", e),
        }
    }

    fn failed(&self, status: ExitStatus) -> StressError {
        StressError::Child { role: self.role.name(), how: status.to_string() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone already, which is what is wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_called_what_the_command_line_takes() {
        for role in Role::value_variants() {
            assert_eq!(role.to_possible_value().unwrap().get_name(), role.name());
        }
    }
}

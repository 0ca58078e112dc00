//! Connecting to a server that is started if there is none: one server, however many callers race, and none that outlives
//! them (trap 13).
//!
//! Rule: whoever is about to start a server holds the lock of `<path>.start`, and looks once more before he does. The
//!       kernel releases it when he dies; the server he has started ends by itself, for it lingers no longer than it was
//!       told to.

use super::IpcClient;
use super::connect::ClientConfig;
use super::reconnect::{Pauses, may_pass, sleep_until};
use crate::error::{IpcError, Result};
use crate::protocol::rendezvous;
use crate::server::open_start_lock;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest pause between two looks whether a server listens.
const PAUSE_MAX: Duration = Duration::from_millis(8);
/// How often a server is started that ends at once: the one before it may not have given up the path yet.
const STARTS_MAX: u32 = 3;
/// How long a server that is of no use has to take leave of others; as long as the program lives that it was started
/// through, if that is another one.
const LEAVE: Duration = Duration::from_secs(1);
/// What the thread needs that waits for a server's end.
const STACK: usize = 64 << 10;

impl IpcClient {
    /// Connects to the server at `path`; if there is none, starts one by `command`, which must make it listen there and end
    /// when its last client has gone: `doorbell serve --linger`, or a server of
    /// [`ServerConfig::linger`](crate::ServerConfig::linger). However many callers of however many processes do so at
    /// once, one server is started.
    ///
    /// [`ClientConfig::connect_timeout`] bounds all of it. The server reads no standard input and has no standard output;
    /// its stderr is what `command` says. It is in a process group of its own, so that an interrupt from a terminal does
    /// not take it from others.
    ///
    /// ```no_run
    /// use doorbell::{ClientConfig, IpcClient};
    /// use std::process::Command;
    ///
    /// # fn main() -> doorbell::Result<()> {
    /// let path = doorbell::default_socket_path();
    /// let mut command = Command::new("doorbell");
    /// command.args(["serve", "--linger", "5", "--socket"]).arg(&path);
    /// let client = IpcClient::connect_or_spawn(&path, &ClientConfig::default(), &mut command)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`]; [`IpcError::ServerEnded`], [`IpcError::ServerNotReady`] or [`IpcError::Io`] if
    /// the server cannot be started. No server of this call is left behind then.
    pub fn connect_or_spawn(
        path: impl AsRef<Path>,
        config: &ClientConfig,
        command: &mut Command,
    ) -> Result<Self> {
        let mut start = Start { path: path.as_ref(), command, lock: None, started: None, starts: 0 };
        let result = start.until_connected(config);
        match (&result, start.started.take()) {
            (Ok(_), Some(Started::Running(child))) => reap_later(child)?,
            (Err(_), Some(Started::Running(child))) => kill(child)?,
            (_, Some(Started::Ended(_)) | None) => {}
        }
        result
    }
}

/// A server that this call has started.
enum Started {
    Running(Child),
    Ended(ExitStatus),
}

struct Start<'a> {
    path: &'a Path,
    command: &'a mut Command,
    /// Held while a server is being started, until it has answered.
    lock: Option<Lock>,
    started: Option<Started>,
    /// How many have been started.
    starts: u32,
}

impl Start<'_> {
    fn until_connected(&mut self, config: &ClientConfig) -> Result<IpcClient> {
        let begun = Instant::now();
        let mut pauses = Pauses::up_to(PAUSE_MAX);
        loop {
            let left = config.connect_timeout.saturating_sub(begun.elapsed());
            let attempt = ClientConfig { connect_timeout: left, ..config.clone() };
            let error = match IpcClient::connect_with(self.path, &attempt) {
                Ok(client) => return Ok(client),
                Err(error) if !may_pass(&error) => return Err(error),
                Err(error) => error,
            };
            if left.is_zero() {
                return Err(match self.started {
                    Some(Started::Running(_)) => IpcError::ServerNotReady(config.connect_timeout),
                    _ => error,
                });
            }
            // With the lock just taken there may be a server by now: look again first.
            if self.advance(&error)? {
                continue;
            }
            let [random, _] = rendezvous::random_id()?;
            std::thread::sleep(pauses.next(random, &error).min(left));
        }
    }

    /// Does the next thing to do while nobody listens; says whether it is worth while to look again at once.
    fn advance(&mut self, error: &IpcError) -> Result<bool> {
        match &mut self.started {
            Some(Started::Running(child)) => {
                let ended = child.try_wait().map_err(|e| IpcError::io("waitpid of a server", e))?;
                if let Some(status) = ended {
                    // Somebody else may have taken the path: look once more.
                    self.started = Some(Started::Ended(status));
                }
                Ok(ended.is_some())
            }
            // It has put a server into the background.
            Some(Started::Ended(status)) if status.success() => Ok(false),
            // Another one has the path, or is just giving it up or taking it.
            Some(Started::Ended(_))
                if !matches!(error, IpcError::NotRunning { .. }) || self.starts < STARTS_MAX =>
            {
                self.started = None;
                Ok(false)
            }
            Some(Started::Ended(status)) => Err(IpcError::ServerEnded { status: *status }),
            // A server is there, and busy, or on its way out.
            None if !matches!(error, IpcError::NotRunning { .. }) => Ok(false),
            None if self.lock.is_none() => {
                self.lock = Lock::try_take(self.path)?;
                Ok(self.lock.is_some())
            }
            None => {
                self.command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
                let child = self.command.spawn().map_err(|e| IpcError::io("starting a server", e))?;
                self.started = Some(Started::Running(child));
                self.starts += 1;
                Ok(false)
            }
        }
    }
}

/// The lock of whoever starts a server.
struct Lock(OwnedFd);

impl Lock {
    /// `None` while somebody else has it.
    fn try_take(path: &Path) -> Result<Option<Self>> {
        let file = open_start_lock(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(Errno::AGAIN) => Ok(None),
            Err(e) => Err(IpcError::io("flock of the lock file for starting a server", e)),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Said aloud: a child that another thread is just forking holds a copy of the descriptor for a moment.
        if let Err(error) = flock(&self.0, FlockOperation::Unlock) {
            tracing::warn!(%error, "could not unlock the lock file for starting a server");
        }
    }
}

/// The server is this process's child, and must be waited for when it ends.
fn reap_later(mut child: Child) -> Result<()> {
    std::thread::Builder::new()
        .name("doorbell-reaper".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            if let Err(error) = child.wait() {
                tracing::debug!(%error, "a server that was started could not be waited for");
            }
        })
        .map(drop)
        .map_err(|e| IpcError::io("starting the thread that waits for a server's end", e))
}

/// Ends a server and whatever it was started through. Others may have connected to it meanwhile: it takes leave of them.
fn kill(mut child: Child) -> Result<()> {
    let group = Pid::from_child(&child);
    // Looked at, not waited for: until its group has been killed its number must be nobody else's.
    let unwaited = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let look = || match waitid(WaitId::Pid(group), unwaited) {
        // Somebody else in this process waits for all children: the number may be another's, and is not signalled.
        Err(Errno::CHILD) => Ok(None),
        other => other.map(|ended| Some(ended.is_some())).map_err(|e| IpcError::io("waitid of a server", e)),
    };
    let signal = |signal| match kill_process_group(group, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(e) => Err(IpcError::io("stopping a server that is of no use", e)),
    };
    if look()?.is_none() {
        return Ok(());
    }
    let process =
        pidfd_open(group, PidfdFlags::empty()).map_err(|e| IpcError::io("pidfd_open of a server", e))?;
    signal(Signal::TERM)?;
    let until = Instant::now() + LEAVE;
    loop {
        match look()? {
            None => return Ok(()),
            Some(true) => break,
            Some(false) if Instant::now() >= until => break,
            Some(false) => sleep_until(&[process.as_fd()], Some(until))?,
        }
    }
    signal(Signal::KILL)?;
    // Also if it has left its group.
    child.kill().map_err(|e| IpcError::io("killing a server that is of no use", e))?;
    child.wait().map(drop).map_err(|e| IpcError::io("waitpid of a server", e))
}

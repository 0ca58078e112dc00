//! A server in a process of its own.

use super::Directory;
use crate::client::{ClientConfig, IpcClient};
use crate::error::{IpcError, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The variable that tells a copy of a test program where to serve.
const SOCKET: &str = "DOORBELL_TESTING_SOCKET";
/// How long a server may take to start.
const START: Duration = Duration::from_secs(30);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(1);

/// Makes the command of a server that listens at the path given.
type MakeCommand = Box<dyn FnMut(&Path) -> Command + Send>;

/// A server process that a test kills, stops and starts again on the same path. Killed when dropped.
pub struct TestProcess {
    command: MakeCommand,
    child: Option<Child>,
    path: PathBuf,
    directory: Directory,
}

/// In a copy of a test program that [`TestProcess::of_test`] has started: where it is to serve. `None` in the test itself.
pub fn child_socket() -> Option<PathBuf> {
    std::env::var_os(SOCKET).map(PathBuf::from)
}

impl TestProcess {
    /// Starts a server by what `command` makes for a path; clients can connect when this returns.
    ///
    /// # Errors
    ///
    /// [`IpcError::ServerEnded`] or [`IpcError::ServerNotReady`] if it does not listen; [`IpcError::Io`] if it cannot be
    /// started.
    pub fn start(command: impl FnMut(&Path) -> Command + Send + 'static) -> Result<Self> {
        let directory = Directory::new()?;
        let path = directory.socket();
        let mut process = Self { command: Box::new(command), child: None, path, directory };
        process.restart()?;
        Ok(process)
    }

    /// Starts a copy of the running test program that runs the test function called `test` (with its modules), which serves
    /// if there is a [`child_socket`]: so a test can kill a server that has handlers of its own.
    ///
    /// # Errors
    ///
    /// As for [`TestProcess::start`].
    pub fn of_test(test: &str) -> Result<Self> {
        let program = std::env::current_exe().map_err(|e| IpcError::io("finding the test program", e))?;
        let test = test.to_owned();
        Self::start(move |path| {
            let mut command = Command::new(&program);
            command.args(["--exact", &test, "--nocapture", "--test-threads=1"]).env(SOCKET, path);
            command.stdout(Stdio::null());
            command
        })
    }

    /// Where clients connect; the same after each restart.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory that outlives the process, for what it writes down; removed with this.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Kills it (SIGKILL) and waits until it is gone. Nothing if it is.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill().map_err(|e| IpcError::io("killing a test's server", e))?;
        child.wait().map(drop).map_err(|e| IpcError::io("waitpid of a test's server", e))
    }

    /// Asks it to stop in order (SIGTERM), and waits until it has. `None` if it is gone.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses.
    pub fn terminate(&mut self) -> Result<Option<ExitStatus>> {
        self.signal(Signal::TERM)?;
        let Some(mut child) = self.child.take() else { return Ok(None) };
        child.wait().map(Some).map_err(|e| IpcError::io("waitpid of a test's server", e))
    }

    /// Stops it in mid-work (SIGSTOP): when this returns it answers nothing, and is not gone either.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let Some(child) = &self.child else { return Ok(()) };
        // Not taken note of: the standard library waits for its end.
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let stopped = || waitid(WaitId::Pid(Pid::from_child(child)), options);
        rustix::io::retry_on_intr(stopped).map(drop).map_err(|e| IpcError::io("waitid of a test's server", e))
    }

    /// Lets it go on.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Starts it again on the same path; kills it first if it is there. Clients can connect when this returns.
    ///
    /// # Errors
    ///
    /// As for [`TestProcess::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let mut command = (self.command)(&self.path);
        let child = command.stdin(Stdio::null()).spawn();
        self.child = Some(child.map_err(|e| IpcError::io("starting a test's server", e))?);
        let begun = Instant::now();
        while IpcClient::connect_with(&self.path, &ClientConfig::smallest()).is_err() {
            if let Some(child) = &mut self.child
                && let Some(status) =
                    child.try_wait().map_err(|e| IpcError::io("waitpid of a test's server", e))?
            {
                self.child = None;
                return Err(IpcError::ServerEnded { status });
            }
            if begun.elapsed() > START {
                self.kill()?;
                return Err(IpcError::ServerNotReady(START));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // Its number cannot be another's: it has not been waited for.
        let Some(child) = &self.child else { return Ok(()) };
        kill_process(Pid::from_child(child), signal).map_err(|e| IpcError::io("kill of a test's server", e))
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            tracing::error!(%error, "a test's server is left behind");
        }
    }
}

impl fmt::Debug for TestProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestProcess")
            .field("path", &self.path)
            .field("child", &self.child)
            .finish_non_exhaustive()
    }
}

//! Processes: a `doorbell serve`, and copies of the test itself that play a client to be killed.

use super::{TestDir, eventually};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// The `doorbell` command.
pub fn doorbell() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doorbell"));
    command.env("NO_COLOR", "1");
    command
}

/// Runs `doorbell` with these arguments to its end.
pub fn run(arguments: &[&str]) -> Output {
    doorbell().args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// What a command wrote to stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A child that is killed when dropped.
pub struct Process(pub Child);

impl Process {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Sends a signal to each of its threads but the first, which in a test program does nothing but wait for the others: the
    /// kernel gives a signal to the thread whose number was named, if that one takes it.
    pub fn signal_threads(&self, signal: Signal) {
        let own = self.pid();
        for task in std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap().flatten() {
            let number = task.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            if let Some(number) = number.filter(|number| *number != own) {
                // It may have ended by now.
                kill_process(number, signal).ok();
            }
        }
    }

    /// Stops it and waits until the kernel says that it is stopped.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        eventually("the process is stopped", || self.state() == 'T');
    }

    /// State letter in /proc/PID/stat.
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        stat[stat.rfind(')').unwrap() + 2..].chars().next().unwrap()
    }

    /// Descriptors it has open.
    pub fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().count()
    }

    /// Segments it has mapped.
    pub fn segments(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.0.id())).unwrap();
        maps.lines().filter(|line| line.contains("memfd:doorbell-session")).count()
    }

    /// Processor time that it has used, ns.
    pub fn used_ns(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let time = |task: std::io::Result<std::fs::DirEntry>| {
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            text.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        tasks.map(time).sum()
    }

    /// Whether all its threads sleep for several ticks of the kernel's, at which the time of one that runs is counted.
    pub fn rests(&self) -> bool {
        let sleeps = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('S')
        };
        let tasks = || std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let (before, begun) = (self.used_ns(), Instant::now());
        while begun.elapsed() < Duration::from_millis(50) {
            if !tasks().all(sleeps) || self.used_ns() != before {
                return false;
            }
        }
        true
    }

    /// Waits for its end, half a minute at most.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.wait().signal(), Some(Signal::KILL.as_raw()));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either may fail because it has ended already, which is what is wanted.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A `doorbell serve` on a path of its own.
pub struct ServerProcess {
    pub process: Process,
    path: PathBuf,
    log: PathBuf,
    directory: TestDir,
}

impl ServerProcess {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(TestDir::new(), arguments)
    }

    pub fn start_in(directory: TestDir, arguments: &[&str]) -> Self {
        let path = directory.join("s");
        let log = directory.join("log");
        let process = spawn(&path, &log, arguments);
        let server = Self { process, path, log, directory };
        eventually("the server serves", || server.log().contains("serving at"));
        server
    }

    /// Another server on the same path, once the first is gone.
    pub fn restart(&mut self, arguments: &[&str]) {
        self.process = spawn(&self.path, &self.log, arguments);
        eventually("the server serves again", || self.log().contains("serving at"));
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// What it wrote to stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Asks it to stop and returns how it ended.
    pub fn terminate(&mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.wait()
    }
}

fn spawn(path: &Path, log: &Path, arguments: &[&str]) -> Process {
    let stderr = std::fs::File::create(log).unwrap();
    let mut command = doorbell();
    command.arg("serve").arg("--socket").arg(path).args(arguments);
    // Where lines are counted (`ci/coverage.sh`): a server that has given up files cannot write its counters.
    if std::env::var_os("LLVM_PROFILE_FILE").is_some() && !arguments.contains(&"--unrestricted") {
        command.arg("--unrestricted");
    }
    Process(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap())
}

/// The variable that tells a copy of the test which part it plays.
const ROLE: &str = "DOORBELL_TEST_ROLE";
/// The variable that tells it where the server listens.
const SOCKET: &str = "DOORBELL_TEST_SOCKET";

/// A copy of this test program that runs the test function `entry` on its main thread, in `role`.
pub fn copy_of_test(entry: &str, role: &str, socket: &Path) -> Command {
    copy_at(&std::env::current_exe().unwrap(), entry, role, socket)
}

/// The same of a copy of this program that lies elsewhere.
pub fn copy_at(program: &Path, entry: &str, role: &str, socket: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--exact", entry, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env(SOCKET, socket);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// What a copy says once it is where the test wants it.
const READY: u8 = 1;

/// In a copy: it is where the test wants it.
pub fn ready() {
    let mut stdout = std::io::stdout();
    stdout.write_all(&[READY]).and_then(|()| stdout.flush()).unwrap();
}

/// In a copy: waits until whoever started it lets go of it, which [`Actor::dismiss`] does.
pub fn until_dismissed() {
    std::io::stdin().lock().read_to_end(&mut Vec::new()).unwrap();
}

/// A copy of the test in a role, whose test function is called `child`, and what it says.
pub struct Actor {
    pub process: Process,
    stdout: ChildStdout,
}

impl Actor {
    pub fn start(role: &str, path: &Path) -> Self {
        Self::start_as(role, path, |command| command)
    }

    /// The same with a changed command.
    pub fn start_as(role: &str, path: &Path, change: impl FnOnce(&mut Command) -> &mut Command) -> Self {
        let mut command = copy_of_test("child", role, path);
        Self::of(change(command.stdin(Stdio::piped())))
    }

    /// The process of a command that [`copy_at`] made.
    pub fn of(command: &mut Command) -> Self {
        let mut process = Process(command.stdout(Stdio::piped()).spawn().unwrap());
        let stdout = process.0.stdout.take().unwrap();
        Self { process, stdout }
    }

    /// Starts it and waits until it is where its role wants it.
    pub fn ready(role: &str, path: &Path) -> Self {
        let mut actor = Self::start(role, path);
        actor.wait_until_ready();
        actor
    }

    pub fn wait_until_ready(&mut self) {
        // The test harness of the copy says something first, in plain text.
        let mut byte = [0u8];
        while byte != [READY] {
            let got = self.stdout.read(&mut byte).unwrap();
            assert_eq!(got, 1, "the child ended before it was ready");
        }
    }

    /// Tells it to end, and waits until it has ended well.
    pub fn dismiss(&mut self) {
        drop(self.process.0.stdin.take());
        let status = self.process.wait();
        assert!(status.success(), "{status}");
    }
}

/// Runs `work` in a thread and waits for its end, so that a hang fails the test instead of stopping it.
pub fn returns<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(work);
    eventually(what, || thread.is_finished());
    thread.join().unwrap()
}

/// The part that this process plays, and the server's path, if it is a copy.
pub fn role() -> Option<(String, PathBuf)> {
    Some((std::env::var(ROLE).ok()?, PathBuf::from(std::env::var_os(SOCKET)?)))
}

/// Another user than the one who runs the tests.
pub const NOBODY: u32 = 65534;

/// A copy of `program` in `directory` that any user may run.
pub fn copy_for_everybody(program: &Path, directory: &TestDir, name: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let copy = directory.join(name);
    // Copied by another process: a descriptor of ours that writes it might live on for a moment in a child
    // that another test forks, and nobody could run the copy until then.
    assert!(Command::new("cp").args([program, &copy]).status().unwrap().success());
    for path in [&copy, &directory.0] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    copy
}

/// Whether io_uring works where the tests run; says so when not.
pub fn has_io_uring(what: &str) -> bool {
    match doorbell_uring::self_test() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped, for there is no io_uring here ({error}): {what}");
            false
        }
    }
}

/// Whether the test runs as root, which some need; says so when not.
pub fn is_root(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped, for it takes root: {what}");
    }
    root
}

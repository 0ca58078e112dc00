//! `doorbell doctor` as a user and a script meet it: text, JSON, exit status, and machines that lack something.

mod common;

use common::process::{NOBODY, Process, ServerProcess, copy_for_everybody, doorbell, is_root, run, stderr};
use common::{TestDir, eventually};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The command as a user starts it, with everything temporary in `directory`.
fn doctor(directory: &TestDir) -> Command {
    let mut command = doorbell();
    command.arg("doctor").arg("--socket").arg(directory.join("s"));
    command.env("TMPDIR", &directory.0).stdin(Stdio::null());
    command
}

/// A shell that lowers a limit and then becomes the doctor with `arguments`.
fn doctor_with_limit(ulimit: &str, directory: &TestDir, arguments: &[&str]) -> Output {
    let script = format!("ulimit {ulimit} && exec \"$0\" doctor --json --socket \"$@\"");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_doorbell")]).arg(directory.join("s")).args(arguments);
    command.env("TMPDIR", &directory.0).stdin(Stdio::null()).output().unwrap()
}

/// What a report in JSON says.
struct Report {
    value: Value,
    status: i32,
}

impl Report {
    /// Reads one, and checks that it agrees with itself and with the exit status.
    fn of(output: &Output) -> Self {
        let status = output.status.code().unwrap();
        assert!(output.stderr.is_empty(), "{}", stderr(output));
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let value: Value = serde_json::from_str(&text).expect("one JSON value and nothing else");
        let report = Self { value, status };
        assert_eq!(report.value["exit_status"], status);
        let outcome = match (report.count("failure"), report.count("warning")) {
            (0, 0) => ("runs_well", 0),
            (0, _) => ("runs_with_warnings", 3),
            _ => ("will_not_run", 1),
        };
        assert_eq!((report.value["outcome"].as_str().unwrap(), status), outcome);
        report
    }

    fn checks(&self) -> impl Iterator<Item = &Value> {
        self.value["checks"].as_array().unwrap().iter()
    }

    fn count(&self, verdict: &str) -> usize {
        self.checks().filter(|check| check["verdict"] == verdict).count()
    }

    /// The check of this name.
    fn check(&self, id: &str) -> &Value {
        self.checks().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no check {id}"))
    }

    /// It has this verdict, and says all of `words` in what was found and what to do.
    fn says(&self, id: &str, verdict: &str, words: &[&str]) {
        let check = self.check(id);
        assert_eq!(check["verdict"], verdict, "{check}");
        let text = format!("{} {}", check["found"], check["advice"]);
        for word in words {
            assert!(text.contains(word), "`{word}` in: {check}");
        }
    }
}

/// The names of all checks, in their order.
const IDS: &str = "kernel.release kernel.futex_bug kernel.short_turns kernel.landlock kernel.seccomp io_uring.permission io_uring.create_ring \
    io_uring.restrict_ring io_uring.map_memory io_uring.futex_changed io_uring.futex_rung_by_call \
    io_uring.futex_rung_by_ring io_uring.poll io_uring.timeout io_uring.cancel memory.memfd memory.allocate \
    memory.give_back memory.seals memory.segment process.peer_pidfd process.pinning process.current_core \
    limits.descriptors limits.locked_memory limits.backlog limits.memory limits.cpu cores.allowed \
    cores.hyperthreads cores.hypervisor cores.idle_states cores.wake_same cores.wake_across cores.dma_latency \
    socket.directory socket.server trial.calls";

/// Goal:   where these tests run a server runs, and the JSON says so with stable names; nothing is left behind.
/// Method: the real command in an empty directory; every key, every check.
#[test]
fn f38_f39_a_machine_that_runs_the_tests_is_found_fit() {
    let directory = TestDir::new();
    let report = Report::of(&doctor(&directory).arg("--json").output().unwrap());
    // A kernel with a known bug, or a tight control group, is a warning.
    assert!([0, 3].contains(&report.status), "{}", report.value);
    let ids: Vec<&str> = report.checks().map(|check| check["id"].as_str().unwrap()).collect();
    assert_eq!(ids, IDS.split_whitespace().collect::<Vec<_>>());
    for check in report.checks() {
        let keys: Vec<&String> = check.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["advice", "facts", "found", "id", "verdict", "why"], "{check}");
        assert!(check["facts"].is_object() && !check["why"].as_str().unwrap().is_empty(), "{check}");
        assert!(check["advice"].is_null() || check["verdict"] != "ok", "{check}");
    }
    let works = |group: &str| {
        report.checks().filter(|check| check["id"].as_str().unwrap().starts_with(group)).count()
    };
    assert_eq!(
        report.checks().filter(|check| check["facts"]["passed"] == true).count(),
        works("io_uring.") - 1
    );
    for id in ["memory.memfd", "memory.allocate", "memory.seals", "memory.segment", "process.peer_pidfd"] {
        report.says(id, "ok", &["works"]);
    }
    for ns in ["after_pause_ns", "back_to_back_ns"] {
        assert!(report.check("trial.calls")["facts"][ns].as_u64().unwrap() > 0);
    }
    assert!(report.check("cores.wake_same")["facts"]["ns"].as_u64().unwrap() > 0);
    let plan = &report.value["use"];
    assert_eq!((&plan["backend"], &plan["policy"]), (&"io_uring".into(), &"handoff".into()));
    let cores = report.check("cores.allowed")["facts"]["allowed"].as_array().unwrap();
    assert_eq!(
        (plan["reactors"].as_u64().unwrap() as usize, plan["cores"].as_array().unwrap()),
        (cores.len(), cores)
    );
    assert_eq!(plan["poll_ns"].as_u64().unwrap() > 0, cores.len() > 1);
    assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 0, "nothing is left behind");
}

/// Goal:   the text says the same, without colours where it is not read on a terminal; -v says why of everything.
#[test]
fn the_text_is_plain_and_says_what_the_json_says() {
    let directory = TestDir::new();
    let output = doctor(&directory).env_remove("NO_COLOR").output().unwrap();
    assert!(
        [Some(0), Some(3)].contains(&output.status.code()) && output.stderr.is_empty(),
        "{}",
        stderr(&output)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains('\x1b') && text.lines().all(|line| line.len() <= 110), "{text}");
    for words in [
        "doorbell 0.",
        "\nio_uring\n",
        "  ok       create ring",
        "\nwhat a server would use\n",
        "  backend   io_uring",
        "\ndoorbell will run",
    ] {
        assert!(text.contains(words), "`{words}` in:\n{text}");
    }
    let output = doctor(&directory).arg("-v").output().unwrap();
    let verbose = String::from_utf8(output.stdout).unwrap();
    assert_eq!(verbose.matches("why: ").count(), IDS.split_whitespace().count(), "{verbose}");
}

/// Goal:   colours on a terminal, and none where NO_COLOR says so; an empty NO_COLOR says nothing.
/// Method: a pseudo-terminal as standard output.
#[test]
fn colours_are_for_terminals_and_no_color_is_honoured() {
    let directory = TestDir::new();
    for (no_color, coloured) in [(None, true), (Some(""), true), (Some("1"), false)] {
        let mut command = doctor(&directory);
        command.env_remove("NO_COLOR").envs(no_color.map(|value| ("NO_COLOR", value)));
        assert_eq!(on_a_terminal(command).contains("\x1b["), coloured, "{no_color:?}");
    }
}

/// What a command writes to a terminal.
fn on_a_terminal(mut command: Command) -> String {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
    let theirs = std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    command.stdout(theirs).stderr(Stdio::null());
    let mut child = Process(command.spawn().unwrap());
    // The command holds a copy of the terminal; without it reading ends when the child has.
    drop(command);
    let (mut text, mut terminal) = (Vec::new(), std::fs::File::from(ours));
    // A terminal that everybody has closed answers with EIO.
    terminal.read_to_end(&mut text).ok();
    child.wait();
    String::from_utf8(text).unwrap()
}

/// Goal:   too few file descriptors for the sessions fail before any client is refused, with both ways out; what the
///         server can raise itself is fine (F39).
/// Method: lowered limits, hard and soft; fewer sessions.
#[test]
fn f39_too_few_descriptors_are_a_failure_with_a_way_out() {
    let directory = TestDir::new();
    let report = Report::of(&doctor_with_limit("-n 100", &directory, &[]));
    assert_eq!(report.status, 1);
    report.says("limits.descriptors", "failure", &["hard limit 100", "ulimit -Hn 3136", "--max-sessions 12"]);
    let report = Report::of(&doctor_with_limit("-n 100", &directory, &["--max-sessions", "12"]));
    assert!([0, 3].contains(&report.status), "{}", report.value);
    let report = Report::of(&doctor_with_limit("-Sn 64", &directory, &[]));
    assert!([0, 3].contains(&report.status), "{}", report.value);
    report.says("limits.descriptors", "ok", &["64 (hard limit", "3136 are needed"]);
}

/// Goal:   where not one descriptor is left every check says so, and none of them stops the report.
/// Method: a limit that leaves room for the standard streams alone.
#[test]
fn f38_without_any_descriptor_the_report_is_still_made() {
    let directory = TestDir::new();
    let report = Report::of(&doctor_with_limit("-n 3", &directory, &[]));
    assert_eq!(report.status, 1);
    report.says("io_uring.create_ring", "warning", &["Too many open files", "RLIMIT_NOFILE"]);
    report.says("io_uring.poll", "note", &["not tried"]);
    report.says("memory.memfd", "failure", &["memfd_create is refused", "RLIMIT_NOFILE"]);
    report.says("memory.segment", "note", &["not tried"]);
    report.says("process.peer_pidfd", "failure", &["RLIMIT_NOFILE"]);
    report.says("trial.calls", "note", &["not tried"]);
    assert_eq!((&report.value["use"]["backend"], report.count("failure")), (&"epoll".into(), 4));
}

/// Goal:   another user without home, environment and locked memory gets a report of his own: the default path is
///         judged and not made, and where the kernel counts rings as locked memory io_uring is refused with that cause.
/// Method: as root, a made-up uid with `ulimit -l 0`.
#[test]
fn f38_locked_memory_that_is_used_up_is_named_as_the_cause() {
    if !is_root("running as another user") {
        return;
    }
    let programs = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &programs, "doorbell");
    let uid = 2_000_000 + std::process::id();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -l 0 && exec \"$0\" doctor --json"]).arg(program);
    let report = Report::of(&command.uid(uid).gid(uid).env_clear().current_dir("/").output().unwrap());
    let default = format!("/tmp/doorbell-{uid}/doorbell.sock");
    assert_eq!(report.value["socket"], default.as_str());
    report.says("socket.directory", "ok", &[&default, "will be made"]);
    assert!(!PathBuf::from(&default).parent().unwrap().exists());
    assert_eq!(report.check("limits.locked_memory")["facts"]["exempt"], false);
    match report.check("io_uring.create_ring")["verdict"].as_str().unwrap() {
        // Kernels from 5.12 to 6.13 count no rings.
        "ok" => report.says("limits.locked_memory", "note", &["0 bytes", "ulimit -l"]),
        _ => {
            assert_eq!((report.status, &report.value["use"]["backend"]), (3, &"epoll".into()));
            report.says("io_uring.create_ring", "warning", &["Cannot allocate memory", "RLIMIT_MEMLOCK"]);
            report.says("trial.calls", "ok", &[]);
            report.says("limits.locked_memory", "warning", &["0 bytes", "ulimit -l"]);
        }
    }
}

/// Goal:   where there is no /proc, no /sys, no /dev and no /tmp, what cannot be known is not claimed, and what is
///         needed fails.
/// Method: as root, in a directory that holds nothing but the program.
#[test]
fn a_machine_without_proc_and_sys_gets_a_report() {
    if !is_root("changing the root directory") {
        return;
    }
    let root = TestDir::new();
    copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &root, "doorbell");
    let output =
        Command::new("chroot").arg(&root.0).args(["/doorbell", "doctor", "--json"]).output().unwrap();
    let report = Report::of(&output);
    assert_eq!(report.status, 1);
    report.says("socket.directory", "failure", &["no /proc", "mount /proc"]);
    report.says("cores.hypervisor", "ok", &["cannot be told"]);
    report.says("limits.backlog", "ok", &["cannot be read"]);
    report.says("limits.memory", "ok", &["can be read"]);
    report.says("trial.calls", "note", &["not tried"]);
    assert_eq!(report.check("cores.hypervisor")["facts"]["virtual"], Value::Null);
    assert_eq!(report.value["failures"], 1);
}

/// Goal:   a server that listens at the path is told from one that is stuck and from strangers, and goes on.
/// Method: a real server, stopped and continued; a listener of another kind.
#[test]
fn r3_6_who_listens_at_the_path_is_told() {
    let server = ServerProcess::start(&[]);
    let ask = |path: &Path| {
        let directory = TestDir::new();
        let mut command = doorbell();
        command.args(["doctor", "--json", "--socket"]).arg(path).env("TMPDIR", &directory.0);
        Report::of(&command.output().unwrap())
    };
    let report = ask(server.path());
    assert!([0, 3].contains(&report.status), "{}", report.value);
    report.says("socket.server", "ok", &["one answers at", server.path().to_str().unwrap()]);
    report.says("socket.directory", "ok", &["mode 0700"]);
    server.process.stop();
    let report = ask(server.path());
    assert_eq!(report.status, 1);
    report.says("socket.server", "failure", &["may be stuck", "--socket"]);
    server.process.signal(rustix::process::Signal::CONT);
    eventually("it answers again", || ask(server.path()).check("socket.server")["verdict"] == "ok");

    let directory = TestDir::new();
    let path = directory.join("stream");
    let _listener = UnixListener::bind(&path).unwrap();
    ask(&path).says("socket.server", "failure", &["not a doorbell socket"]);
}

/// Goal:   a path that cannot be used is refused in the words of `serve`, and nothing is made there.
/// Method: a directory that is missing, one that others may write, a file in the way, a path too long.
#[test]
fn r3_6_a_path_that_cannot_be_used_is_a_failure() {
    let directory = TestDir::new();
    let open = directory.join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::write(directory.join("file"), "precious").unwrap();
    for (path, words) in [
        (directory.join("missing/s"), "does not exist"),
        (open.join("s"), "writable by others"),
        (directory.join("file"), "not a socket"),
        (directory.join(&"s".repeat(120)), "holds 107"),
    ] {
        let output = run(&["doctor", "--json", "--socket", path.to_str().unwrap()]);
        let report = Report::of(&output);
        assert_eq!(report.status, 1);
        report.says("socket.directory", "failure", &[words, "XDG_RUNTIME_DIR"]);
        report.says("socket.server", "note", &["cannot be used"]);
        assert_eq!(report.value["failures"], 1);
    }
    assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0);
    assert!(!directory.join("missing").exists());
}

/// Goal:   a directory that this user may not write is told beforehand, as `serve` tells it.
/// Method: as root, another user asks for a path in a directory of his own without that permission, and in a sticky one
///         of root's.
#[test]
fn r3_6_a_directory_that_may_not_be_written_is_told_beforehand() {
    if !is_root("running as another user") {
        return;
    }
    let directory = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &directory, "doorbell");
    for (name, owner, mode) in [("own", NOBODY, 0o500), ("sticky", 0, 0o1755)] {
        let place = directory.join(name);
        std::fs::create_dir(&place).unwrap();
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&place, Some(owner), Some(owner)).unwrap();
        let run = |arguments: &[&str]| {
            let mut command = Command::new(&program);
            command.args(arguments).arg("--socket").arg(place.join("s")).uid(NOBODY).gid(NOBODY);
            command.output().unwrap()
        };
        Report::of(&run(&["doctor", "--json"])).says("socket.directory", "failure", &["may not be written"]);
        let serve = run(&["serve"]);
        assert!(stderr(&serve).contains("may not be written"), "{}", stderr(&serve));
    }
}

/// Goal:   a wrong question has a status of its own, and the help names every option and status.
#[test]
fn r3_1_a_wrong_question_to_the_doctor_has_status_2() {
    for (arguments, words) in [
        (&["--max-sessions", "0"][..], "max_sessions is 0, allowed are 1 to 1048576"),
        (&["--max-sessions", "many"], "--max-sessions"),
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--socket"], "--socket"),
        (&["more"], "more"),
    ] {
        let output = run(&[&["doctor"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && stderr(&output).contains(words), "{}", stderr(&output));
    }
    let output = run(&["doctor", "--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    for words in
        ["--socket <PATH>", "--max-sessions <N>", "--json", "--verbose", "Exit status:", "  3  ", "1024"]
    {
        assert!(help.contains(words), "`{words}` in:\n{help}");
    }
}

/// Goal:   a report that cannot be written is an error and no panic.
#[test]
fn f41_a_report_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let directory = TestDir::new();
    let mut command = doctor(&directory);
    let output = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("No space left"), "{}", stderr(&output));
}

//! The log where stderr is systemd's journal (R4.3). A socket of the test's stands for the journal, at the journal's path in
//! a mount namespace of the server's own.

mod common;

use common::process::{Process, doorbell};
use common::raw::Raw;
use common::{TestDir, eventually};
use doorbell_shm::entry::Submission;
use doorbell_shm::lane::INTERACTIVE;
use rustix::process::Signal;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the journal is told of one event.
type Entry = HashMap<String, String>;

/// Runs a command where the directory of the journal's socket is `$1`.
const WITH_JOURNAL: &str = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
    mount --bind \"$1\" /run/systemd/journal && shift && exec \"$@\"";

/// `unshare` with what it takes here, or `None` where nobody may have mounts of his own; says so then.
fn unshare() -> Option<Command> {
    let root = rustix::process::geteuid().is_root();
    let arguments: &[&str] = if root { &["--mount"] } else { &["--user", "--map-root-user", "--mount"] };
    let may =
        Command::new("unshare").args(arguments).args(["mount", "-t", "tmpfs", "tmpfs", "/run"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped, for there are no mount namespaces here: the log in the journal");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(arguments);
    Some(command)
}

/// A server whose stderr is a file.
struct Server {
    process: Process,
    path: PathBuf,
    stderr: PathBuf,
    _directory: TestDir,
}

impl Server {
    /// Starts one with the journal's directory there; `stream` makes `$JOURNAL_STREAM` of the file that is stderr.
    fn start(
        mut unshare: Command,
        journal: &Path,
        arguments: &[&str],
        stream: impl FnOnce(&File) -> String,
    ) -> Self {
        let directory = TestDir::new();
        let (path, stderr) = (directory.join("s"), directory.join("stderr"));
        let file = File::create(&stderr).unwrap();
        unshare.env("JOURNAL_STREAM", stream(&file)).args(["sh", "-c", WITH_JOURNAL, "sh"]).arg(journal);
        unshare.arg(doorbell().get_program()).args(["serve", "--socket"]).arg(&path).args(arguments);
        let process = Process(unshare.stdin(Stdio::null()).stderr(file).spawn().unwrap());
        Self { process, path, stderr, _directory: directory }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }
}

/// What systemd calls this file.
fn named(file: &File) -> String {
    let file = file.metadata().unwrap();
    format!("{}:{}", file.dev(), file.ino())
}

/// Reads an entry as systemd's native protocol has it: `NAME=value`, or `NAME`, a length of eight bytes, the value.
fn entry(mut bytes: &[u8]) -> Entry {
    let mut entry = Entry::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap();
        let (line, rest) = (std::str::from_utf8(&bytes[..end]).unwrap(), &bytes[end + 1..]);
        let (name, value, rest) = match line.split_once('=') {
            Some((name, value)) => (name, value, rest),
            None => {
                let (len, rest) = rest.split_first_chunk::<8>().unwrap();
                let (value, rest) = rest.split_at(u64::from_le_bytes(*len) as usize);
                (line, std::str::from_utf8(value).unwrap(), rest.strip_prefix(b"\n").unwrap())
            }
        };
        entry.insert(name.to_owned(), value.to_owned());
        bytes = rest;
    }
    entry
}

/// Goal:   R4.3: where systemd has connected stderr with the journal, each event is an entry with its level as a priority and
///         fields for session and reason, and nothing is written to stderr.
/// Method: a server in a mount namespace in which the journal's socket is ours; a session that breaks the protocol; the end.
#[test]
fn r4_3_the_journal_gets_entries_with_fields() {
    let Some(unshare) = unshare() else { return };
    let directory = TestDir::new();
    let journal = UnixDatagram::bind(directory.join("socket")).unwrap();
    journal.set_nonblocking(true).unwrap();
    let mut server = Server::start(unshare, &directory.0, &["--verbose"], named);
    let mut entries: Vec<Entry> = Vec::new();
    let mut find = |message: &str| {
        let mut found = None;
        eventually(message, || {
            let mut bytes = [0; 64 << 10];
            while let Ok(len) = journal.recv(&mut bytes) {
                entries.push(entry(&bytes[..len]));
            }
            let of = |entry: &&Entry| entry.get("MESSAGE").is_some_and(|text| text.starts_with(message));
            found = entries.iter().find(of).cloned();
            found.is_some()
        });
        found.unwrap()
    };
    let serving = find("serving at");
    assert_eq!((serving["PRIORITY"].as_str(), serving["SYSLOG_IDENTIFIER"].as_str()), ("5", "doorbell"));
    let mut raw = Raw::connect(&server.path);
    raw.push(INTERACTIVE, &Submission { kind: 77, ..Submission::default() });
    raw.ring();
    let violation = find("protocol violation");
    assert_eq!(violation["PRIORITY"], "4");
    assert!(violation["FAULT"].contains("entry kind 77"), "{violation:?}");
    let ended = find("session ended");
    assert_eq!((&ended["SESSION"], ended["PRIORITY"].as_str()), (&violation["SESSION"], "6"));
    assert!(ended["REASON"].contains("protocol"), "{ended:?}");
    server.process.signal(Signal::TERM);
    assert!(server.process.wait().success());
    find("stopped after");
    assert_eq!(server.said(), "");
}

/// Goal:   R4.3: a journal that cannot be reached, or that stderr is not connected with, costs no line: they go to stderr; a
///         server that was told to use it does not start without.
/// Method: a journal's directory without a socket; another file's name in `$JOURNAL_STREAM`.
#[test]
fn r4_3_without_a_journal_lines_go_to_stderr() {
    let directory = TestDir::new();
    type Stream = fn(&File) -> String;
    let other: Stream = |_| named(&File::open("/dev/null").unwrap());
    for (stream, is_told) in [(named as Stream, true), (other, false)] {
        let Some(unshare) = unshare() else { return };
        let server = Server::start(unshare, &directory.0, &[], stream);
        eventually("the server serves", || server.said().contains("\"message\":\"serving at"));
        assert_eq!(server.said().contains("the journal cannot be reached"), is_told, "{}", server.said());
    }
    let Some(unshare) = unshare() else { return };
    let mut server = Server::start(unshare, &directory.0, &["--log-format", "journal"], named);
    assert_eq!(server.process.wait().code(), Some(1));
    assert!(server.said().contains("choose another --log-format"), "{}", server.said());
}

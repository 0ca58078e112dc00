//! Rules that hold for the source as such: what must not be in it, and that every row has its test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below `folder`, build directories left out.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// The code of a file: without comments, and without its tests.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn assert_absent(folders: &[&str], words: &[&str], why: &str) {
    for path in folders.iter().flat_map(|folder| sources(folder)) {
        let code = code(&path);
        for word in words {
            assert!(!code.contains(word), "{} contains `{word}`: {why}", path.display());
        }
    }
}

/// Goal:   R1.3: no lock and no shared mutable state between reactors on the message path.
/// Method: what would bring one in is not in the sources of the server and of what it shares, but for files
///         beside the message path: the inboxes of the reactors, orders from outside, their start, the sum of the memory
///         budget, files that are read for clients (one line of the log, given once), and who watches over reactors; and
///         for the clients that several threads use, whose locks and queues lie before a session that has one user; and
///         what starts a server when there is none; and the page that a fork is known by, made once, before there is a session.
///         What a reactor shares with the threads that write
///         deferred answers is in one file, too: words that nobody waits for, `OnceLock`s that are set before they are
///         looked at, and no lock.
#[test]
fn r1_3_no_lock_is_on_the_message_path() {
    let words = ["Mutex", "RwLock", "Condvar", "static mut", "OnceLock", "mpsc", "spawn", "Atomic"];
    // The simulation is no part of a server: tests and fuzz targets drive it.
    let beside = [
        "crew.rs",
        "control.rs",
        "start.rs",
        "budget.rs",
        "analyze.rs",
        "simulation.rs",
        "deferred.rs",
        "watch.rs",
    ]
    .map(|file| format!("src/server/{file}"));
    let shared = ["asynchronous.rs", "callback/", "start.rs"].map(|file| format!("src/client/{file}"));
    let is_shared = |path: &Path| shared.iter().any(|part| path.to_string_lossy().contains(part));
    for path in sources("src/server").into_iter().chain(sources("src/client")) {
        let code = code(&path);
        if !beside.iter().any(|file| path.ends_with(file)) && !is_shared(&path) {
            for word in words {
                assert!(!code.contains(word), "{} contains `{word}`", path.display());
            }
        }
    }
    let deferred = code(&root().join("src/server/deferred.rs"));
    for word in words.iter().filter(|word| !["OnceLock", "Atomic"].contains(word)) {
        assert!(!deferred.contains(word), "deferred.rs contains `{word}`");
    }
    // Shared memory is atomics; they are shared with one client, not between reactors.
    for path in sources("shm/src") {
        let is_made_once = path.ends_with("shm/src/fork.rs");
        for word in words.iter().filter(|word| **word != "Atomic" && !(is_made_once && **word == "OnceLock"))
        {
            assert!(!code(&path).contains(word), "{} contains `{word}`", path.display());
        }
    }
}

/// Goal:   S11: no decision depends on a clock that can jump.
#[test]
fn s11_only_the_monotonic_clock_is_read() {
    assert_absent(&["src", "shm/src", "uring/src"], &["SystemTime", "ClockId::Realtime"], "S11");
}

/// Goal:   trap 6: nothing with a name is left behind in /dev/shm.
#[test]
fn trap06_no_named_shared_memory() {
    assert_absent(&["src", "shm/src", "uring/src", "stress/src"], &["shm_open", "/dev/shm"], "trap 6");
}

/// Goal:   trap 25: no result is thrown away.
#[test]
fn trap25_no_result_is_thrown_away() {
    let folders = ["src", "shm/src", "uring/src", "stress/src"];
    for path in folders.iter().flat_map(|folder| sources(folder)) {
        for line in code(&path).lines().filter(|line| line.contains("let _ = ")) {
            // A value that is no result may be named to be ignored: an address, a borrow that keeps alive.
            assert!(!line.contains('('), "{}: {line}", path.display());
        }
    }
}

/// Goal:   R4.5: the brief's names that exist so far keep their names.
#[test]
fn r4_5_public_names_are_kept() {
    #[allow(unused_imports)]
    use doorbell::{BufferPool, ConnectionPool, IpcClient, IpcError, IpcServer, MessageType, Metrics};
}

/// Goal:   R3.1: the error enum names what the brief wants, and every message says what to do or what was so.
#[test]
fn r3_1_the_error_enum_has_the_named_variants() {
    use doorbell::{IpcError, MessageType};
    let errors = [
        IpcError::Io { call: "connect", source: std::io::Error::from_raw_os_error(13) },
        IpcError::MessageTooLarge(16384),
        IpcError::UnknownMessageType(MessageType(77)),
        IpcError::HandlerPanic,
        IpcError::Timeout,
    ];
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    for (text, part) in texts.iter().zip(["connect", "16384", "77", "log", "cancelled"]) {
        assert!(text.contains(part), "{text}");
    }
}

/// Goal:   R4.8: the page of deviations has every one that the row names.
#[test]
fn r4_8_the_deviations_are_documented() {
    let page = std::fs::read_to_string(root().join("docs/deviations.md")).unwrap();
    for part in [
        "socket to meet",
        "also a bell",
        "`f64`",
        "MessageTooLarge",
        "`static` table",
        "TypeScript",
        "test names",
    ] {
        assert!(page.contains(part), "docs/deviations.md says nothing of: {part}");
    }
}

/// Names of all test functions.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in ["src", "tests", "shm", "uring", "stress"].iter().flat_map(|folder| sources(folder)) {
        let text = std::fs::read_to_string(path).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line == "#[test]" {
                is_test = true;
            } else if let (true, Some(rest)) = (is_test, line.strip_prefix("fn ")) {
                names.insert(rest.split('(').next().unwrap_or_default().to_owned());
                is_test = false;
            }
        }
    }
    names
}

/// Goal:   every row in docs/ids.md has a test, and every test named there exists.
#[test]
fn every_row_has_a_test_that_exists() {
    let page = std::fs::read_to_string(root().join("docs/ids.md")).unwrap();
    let tests = tests();
    let mut rows = 0;
    for row in page.lines().filter(|line| line.starts_with("| ") && line.matches('|').count() == 4) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        if cells[1] == "id" || cells[1].starts_with("---") {
            continue;
        }
        rows += 1;
        let named: Vec<&str> = cells[3].split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "row {} has no test", cells[1]);
        for name in named {
            assert!(tests.contains(name), "row {}: there is no test `{name}`", cells[1]);
        }
    }
    assert!(rows > 60, "only {rows} rows found");
}

/// Goal:   every bug that the simulation is to find can still be planted.
/// Method: what `ci/simulation-mutants.sh` checks without compiling anything.
#[test]
fn every_bug_for_the_simulation_has_its_line() {
    let script = root().join("ci/simulation-mutants.sh");
    let output = std::process::Command::new(script).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Goal:   every fault has a mutant, which has its line and its test, and the book says which.
/// Method: the rows of docs/ids.md against the list; what `ci/fault-mutants.sh` checks without compiling anything; the
///         table in docs/reliability.md against its table.
#[test]
fn every_fault_has_a_mutant_that_its_test_is_to_find() {
    let run = |argument: &str| {
        let output =
            std::process::Command::new(root().join("ci/fault-mutants.sh")).arg(argument).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    run("--check");
    let rows = |table: &str| -> BTreeSet<String> {
        let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
        let is_fault = |row: &&str| row.strip_prefix('F').is_some_and(|number| number.parse::<u32>().is_ok());
        rows.filter(is_fault).map(str::to_owned).collect()
    };
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let table = run("--table");
    assert_eq!(rows(&table), rows(&read("docs/ids.md")));
    let page = read("docs/reliability.md");
    assert!(
        page.contains(&table),
        "docs/reliability.md does not have what `ci/fault-mutants.sh --table` prints"
    );
}

/// Goal:   the book in docs/ has every page, and no link in it or in the README leads nowhere.
/// Method: every relative link of a page that is not to a place within it is a file; all pages are in SUMMARY.md.
#[test]
fn every_page_is_in_the_book_and_no_link_is_broken() {
    let docs = root().join("docs");
    let pages = |folder: &Path| {
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|e| e == "md")).collect::<Vec<_>>()
    };
    let summary = std::fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    let mut links = 0;
    for path in pages(&docs).into_iter().chain(pages(root())) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.parent() == Some(&docs) && name != "SUMMARY.md" {
            assert!(summary.contains(&format!("({name})")), "{name} is not in docs/SUMMARY.md");
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            // Code has brackets before parentheses, too.
            if file.is_empty() || link.contains("://") || file.contains([' ', '`']) {
                continue;
            }
            links += 1;
            assert!(path.with_file_name(file).exists(), "{name} links to `{link}`, which is not there");
        }
    }
    assert!(links > 10, "only {links} links found");
}

/// The crates that the library is made of, those of this workspace left out; or only those that these name themselves.
fn crates_without_default_features(direct: bool) -> BTreeSet<String> {
    let mut command = std::process::Command::new(env!("CARGO"));
    command.current_dir(root()).args([
        "tree",
        "--offline",
        "--locked",
        "--no-default-features",
        "--prefix",
        "none",
    ]);
    command.args(["--edges", "normal,no-proc-macro", "--no-dedupe", "--format", "{p}"]);
    if direct {
        command.args([
            "--depth",
            "1",
            "--package",
            "doorbell",
            "--package",
            "doorbell-shm",
            "--package",
            "doorbell-uring",
        ]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    lines.lines().map(name).filter(|name| !name.is_empty() && !name.starts_with("doorbell")).collect()
}

/// Goal:   the library alone stays small: whoever links it gets few crates that he has not asked for.
/// Method: cargo's own account without default features; procedural macros are not linked. A number that grows is to be
///         justified where it is written.
#[test]
fn the_library_alone_needs_few_crates() {
    let (direct, all) = (crates_without_default_features(true), crates_without_default_features(false));
    assert!(direct.len() <= 8, "{direct:?}");
    // JSON and SHA-256, the feature `messages`, would be as many again.
    assert!(all.len() <= 15, "{all:?}");
}

//! `AnalyzeFile` through a server: content and files, what is refused, what ends early, and who is served meanwhile
//! (R2.11, R1.6, F40).

mod common;

use common::process::{
    NOBODY, Process, ServerProcess, copy_for_everybody, doorbell, has_io_uring, is_root, stderr,
};
use common::{Bystander, TestDir, TestServer, client, eventually, stat};
use doorbell::config::FILE_READS_MAX;
use doorbell::{CallOptions, Connection, IpcClient, IpcError, MessageType, ServerConfig, Status, WaitPolicy};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

const ANALYZE: MessageType = MessageType::ANALYZE_FILE;
/// Sparse, and so long that reading it does not end within a test.
const ENDLESS: u64 = 1 << 40;

/// A server of one reactor with one root, which may be read whatever its files' length.
struct Files {
    server: TestServer,
    root: TestDir,
}

impl Files {
    fn serve(policy: WaitPolicy) -> Self {
        let root = TestDir::new();
        let file_roots = vec![root.0.clone()];
        let config =
            ServerConfig { policy, reactors: 1, file_roots, max_file_size: ENDLESS, ..Default::default() };
        Self { server: TestServer::start_with(config), root }
    }

    fn client(&self) -> IpcClient {
        client(self.server.path(), WaitPolicy::Block)
    }
}

/// A `doorbell serve` of one reactor with one root, whose descriptors can be counted.
fn serve_process() -> (ServerProcess, TestDir) {
    let root = TestDir::new();
    let limit = ENDLESS.to_string();
    let arguments = ["--reactors", "1", "--root", root.0.to_str().unwrap(), "--max-file-size", &limit];
    (ServerProcess::start(&arguments), root)
}

fn endless(root: &TestDir) {
    std::fs::File::create(root.join("endless")).unwrap().set_len(ENDLESS).unwrap();
}

/// Text with line ends here and there, some of them `\r\n`.
fn text(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|i| match (i * 7 + seed) % 61 {
            0 => b'\n',
            n => b' ' + n as u8,
        })
        .collect()
}

/// What is to be found in `bytes`, naively: size, lines, SHA-256.
fn oracle(bytes: &[u8]) -> (u64, u64, String) {
    let ends = bytes.iter().filter(|byte| **byte == b'\n').count();
    let more = usize::from(bytes.last().is_some_and(|last| *last != b'\n'));
    let digest = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    (bytes.len() as u64, (ends + more) as u64, digest)
}

/// The same of an answer.
fn found(answer: &[u8]) -> (u64, u64, String) {
    let facts: Value = serde_json::from_slice(answer).unwrap();
    let digest = facts["sha256"].as_str().unwrap().to_owned();
    (facts["size"].as_u64().unwrap(), facts["lines"].as_u64().unwrap(), digest)
}

fn by_path(path: impl AsRef<Path>) -> Vec<u8> {
    json!({ "path": path.as_ref().to_str().unwrap() }).to_string().into_bytes()
}

/// Analyses a file; tries again while the server has too much to do.
fn analyze(connection: &Connection<'_>, path: impl AsRef<Path>) -> Result<Vec<u8>, IpcError> {
    let request = by_path(path);
    loop {
        match connection.call(ANALYZE, &request) {
            Err(IpcError::Overloaded { .. }) => std::thread::yield_now(),
            decided => return decided,
        }
    }
}

/// The text of a refusal.
#[track_caller]
fn refusal(connection: &Connection<'_>, path: impl AsRef<Path>) -> String {
    match analyze(connection, path.as_ref()) {
        Err(IpcError::Handler(text)) => {
            assert!(text.starts_with(&format!("{:?} ", path.as_ref())), "{text}");
            text
        }
        other => panic!("{:?}: {other:?}", path.as_ref()),
    }
}

/// Goal:   R2.11: content is analysed wherever it fits a message: in one frame, in many, with escapes.
/// Method: lengths on both sides of slots and frames; a naive count; every policy; both kinds of connection.
#[test]
fn r2_11_content_is_analysed() {
    for policy in [WaitPolicy::Block, WaitPolicy::Handoff, WaitPolicy::Spin] {
        let server = TestServer::start(policy);
        let client = client(server.path(), policy);
        let connections =
            [client.open().unwrap(), client.open_with(doorbell_shm::entry::codec::RAW, true).unwrap()];
        for (i, len) in
            [0, 1, 900, 1100, 4000, 5000, 16_000, 17_000, 100_000, 1 << 20].into_iter().enumerate()
        {
            let content = text(len, i);
            let request = json!({ "content": std::str::from_utf8(&content).unwrap() }).to_string();
            let answer = connections[i % 2].call(ANALYZE, request.as_bytes()).unwrap();
            assert_eq!(found(&answer), oracle(&content), "{len} bytes");
        }
        let answer = connections[0].call(ANALYZE, br#"{"content":"gr\u00fc\u00df\r\n"}"#).unwrap();
        let facts: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!((&facts["size"], &facts["encoding"]), (&json!(8), &json!("utf-8")));
        assert_eq!(facts["lineEnding"], "crlf");
        assert_eq!(stat(&connections[0], "body_bytes"), 0);
    }
}

/// Goal:   R2.11: a request that makes no sense is told what is wrong with it, and the connection goes on.
/// Method: short ones and one of several frames.
#[test]
fn r2_11_a_request_without_sense_is_refused() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    let long = json!({ "content": "x".repeat(50_000), "nonsense": 1 }).to_string();
    for (request, problem) in [
        (&b""[..], "an object with `path` or `content`"),
        (b"{}", "neither `path` nor `content`"),
        (br#"{"path":7}"#, "`path`, byte 8: must be a string"),
        (br#"{"path":"a","content":"b"}"#, "both `path` and `content`"),
        (b"{\"path\":\"\xff\"}", "`path`, byte 9: is not UTF-8"),
        (long.as_bytes(), "nonsense"),
    ] {
        match connection.call(ANALYZE, request) {
            Err(IpcError::Decode(text)) => assert!(text.contains(problem), "{text}"),
            other => panic!("{:?}: {other:?}", request.escape_ascii().to_string()),
        }
    }
    assert!(connection.call(ANALYZE, br#"{"content":"x"}"#).is_ok());
}

/// Goal:   R2.11, R1.6: files of every size, asked for by several clients at once, are found as they are.
/// Method: each client asks for each file, in another order, by relative and absolute paths; a naive count.
#[test]
fn r2_11_r1_6_files_are_analysed_for_several_clients_at_once() {
    for policy in [WaitPolicy::Block, WaitPolicy::Spin] {
        let files = Files::serve(policy);
        let sizes = [0, 1, 100, 4095, 4096, 4097, 65_535, 65_536, 70_000, 200_000, (1 << 20) + 7];
        let contents: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, len)| text(*len, i)).collect();
        for (i, content) in contents.iter().enumerate() {
            std::fs::write(files.root.join(&format!("file-{i}")), content).unwrap();
        }
        let expected: Vec<_> = contents.iter().map(|content| oracle(content)).collect();
        std::thread::scope(|scope| {
            for number in 0..4 {
                let (files, expected) = (&files, &expected);
                scope.spawn(move || {
                    let client = files.client();
                    let connection = client.open().unwrap();
                    for step in 0..expected.len() {
                        let i = (step * (number + 1) + number) % expected.len();
                        let name = format!("file-{i}");
                        let path = if step % 2 == 0 { files.root.join(&name) } else { name.into() };
                        let answer = analyze(&connection, &path).unwrap();
                        assert_eq!(found(&answer), expected[i], "{path:?}");
                    }
                });
            }
        });
        let metrics = files.server.stop();
        assert_eq!((metrics.files_read, metrics.files_refused), (4 * expected.len() as u64, 0));
    }
}

/// Goal:   R2.11: one client may have many files read at the same time, on rings of either kind; each answer belongs to
///         its call.
/// Method: as many calls as there are slots in flight, told apart by tags; twice.
#[test]
fn r2_11_many_files_of_one_client_are_in_flight() {
    let files = Files::serve(WaitPolicy::Handoff);
    let contents: Vec<Vec<u8>> = (0..8).map(|i| text(i * 30_000, i)).collect();
    for (i, content) in contents.iter().enumerate() {
        std::fs::write(files.root.join(&i.to_string()), content).unwrap();
    }
    let client = files.client();
    for bulk in [false, true] {
        let connection = client.open_with(doorbell_shm::entry::codec::RAW, bulk).unwrap();
        let (mut next, mut answered) = (0, 0);
        while answered < 2 * contents.len() {
            while next < 2 * contents.len() {
                let options = CallOptions { tag: next as u64, ..CallOptions::default() };
                match connection.submit(ANALYZE, &by_path((next % contents.len()).to_string()), &options) {
                    Ok(_) => next += 1,
                    Err(IpcError::WouldBlock) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            assert!(client.wait(Some(Duration::from_secs(30))).unwrap(), "an answer comes");
            while let Some(answer) = client.poll().unwrap() {
                let content = &contents[answer.tag() as usize % contents.len()];
                assert_eq!(found(&answer.to_vec().unwrap()), oracle(content));
                answered += 1;
            }
        }
    }
}

/// Goal:   R2.11: what may not or cannot be read is refused with its reason, without waiting, and the next call is
///         answered.
/// Method: every way out of the root, and everything that is no file; a long path, whose reason must not be cut off.
#[test]
fn r2_11_what_may_not_be_read_is_refused_with_its_reason() {
    let files = Files::serve(WaitPolicy::Block);
    let outside = TestDir::new();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let root = &files.root;
    std::fs::create_dir(root.join("sub")).unwrap();
    symlink(outside.join("secret"), root.join("link")).unwrap();
    mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    std::fs::write(root.join("good"), "good\n").unwrap();
    std::fs::File::create(root.join("long")).unwrap().set_len(ENDLESS + 1).unwrap();
    let client = files.client();
    let connection = client.open().unwrap();
    let deep = format!("{}missing", "sub/../".repeat(550));
    for (path, reason) in [
        (outside.join("secret"), "outside the directories in `file_roots`"),
        (root.join("../secret"), "outside the directories in `file_roots`"),
        ("sub/../../secret".into(), "outside the directories in `file_roots`"),
        ("link".into(), "outside the directories in `file_roots`"),
        ("/etc/passwd".into(), "outside the directories in `file_roots`"),
        ("sub".into(), "is a directory"),
        ("fifo".into(), "is a FIFO"),
        ("missing".into(), "does not exist"),
        ("long".into(), "raise `max_file_size`"),
        (deep.into(), "does not exist"),
    ] {
        let text = refusal(&connection, &path);
        assert!(text.contains(reason), "{text}");
        assert_eq!(found(&analyze(&connection, "good").unwrap()), oracle(b"good\n"));
    }
    std::fs::set_permissions(root.join("good"), std::fs::Permissions::from_mode(0o000)).unwrap();
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped, for root reads whatever it likes: a file without permissions");
    } else {
        assert!(refusal(&connection, "good").contains("may not be read"));
    }
    assert!(files.server.stop().files_refused >= 10);
}

/// Goal:   R2.11: unless roots are configured no file is read.
#[test]
fn r2_11_without_roots_files_are_refused() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let text = refusal(&client.open().unwrap(), "/etc/hostname");
    assert!(text.contains("configure `file_roots`"), "{text}");
}

/// Goal:   R2.11: bytes that are no text are told, with where they begin.
#[test]
fn r2_11_a_file_that_is_no_text_is_told() {
    let files = Files::serve(WaitPolicy::Block);
    let mut bytes = text(70_000, 1);
    bytes[66_000] = 0xff;
    std::fs::write(files.root.join("binary"), &bytes).unwrap();
    let client = files.client();
    let answer = analyze(&client.open().unwrap(), "binary").unwrap();
    let facts: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((&facts["encoding"], &facts["invalidUtf8At"]), (&json!("binary"), &json!(66_000)));
    assert_eq!(found(&answer), oracle(&bytes));
}

/// Goal:   R2.11: the answer about a file that changes all the time is right for a moment, or says that it changed.
/// Method: a thread that makes it shorter and longer, zeros all of it, so that every answer can be checked.
#[test]
fn r2_11_a_file_that_changes_all_the_time_is_read_right_or_refused() {
    let files = Files::serve(WaitPolicy::Block);
    let path = files.root.join("file");
    std::fs::write(&path, []).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            for len in (0..).map(|i| i * 70_001 % 400_000) {
                file.set_len(len).unwrap();
                if over.load(SeqCst) {
                    break;
                }
            }
        });
        let client = files.client();
        let connection = client.open().unwrap();
        for _ in 0..60 {
            match analyze(&connection, "file") {
                Ok(answer) => {
                    let size = found(&answer).0;
                    assert_eq!(found(&answer), oracle(&vec![0; size as usize]));
                }
                Err(IpcError::Handler(text)) => assert!(text.contains("was changed"), "{text}"),
                Err(error) => panic!("{error}"),
            }
        }
        over.store(true, SeqCst);
    });
}

/// Goal:   R2.6, R2.9, F5: a call that is cancelled, whose deadline passes or whose caller gives up ends while its file
///         is being read; nothing of it is left, and its slot's next call gets its own answer.
/// Method: a file that takes for ever; the server's descriptors before and after.
#[test]
fn f5_r2_6_r2_9_a_file_nobody_waits_for_any_more_is_let_go() {
    let (server, root) = serve_process();
    endless(&root);
    std::fs::write(root.join("small"), "small\n").unwrap();
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    assert_eq!(found(&analyze(&connection, "small").unwrap()), oracle(b"small\n"));
    let before = server.process.fds();
    for round in 0..10 {
        let request = by_path("endless");
        let deadline = (round % 2 == 0).then_some(Duration::from_millis(100));
        let options = CallOptions { deadline, ..CallOptions::default() };
        let calls = [(); 3].map(|()| connection.submit(ANALYZE, &request, &options).unwrap());
        client.flush().unwrap();
        if deadline.is_none() {
            if round % 4 == 1 {
                eventually("the files are being read", || server.process.fds() > before);
            }
            calls.iter().for_each(|call| client.cancel(*call));
        }
        let mut answered = 0;
        while answered < calls.len() {
            assert!(client.wait(Some(Duration::from_secs(30))).unwrap(), "the calls end");
            while let Some(answer) = client.poll().unwrap() {
                match (answer.result(), deadline) {
                    (Err(IpcError::Cancelled), None) | (Err(IpcError::DeadlineExceeded), Some(_)) => {}
                    (other, _) => panic!("{other:?}"),
                }
                answered += 1;
            }
        }
        // In the same slots at once: a late answer would meet these.
        assert_eq!(found(&analyze(&connection, "small").unwrap()), oracle(b"small\n"));
    }
    let options = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
    let given_up = connection.call_with(ANALYZE, &by_path("endless"), &options, |_| ());
    assert!(matches!(given_up, Err(IpcError::Timeout)));
    eventually("all files are closed", || server.process.fds() == before);
    eventually("all buffers are given back", || stat(&connection, "staged_bytes") == 0);
    assert_eq!(stat(&connection, "protocol_violations"), 0);
}

/// Goal:   F5, R1.6: when a session ends its files are let go of, and their buffers are given back although nobody is
///         there any more.
/// Method: sessions with all their calls on a file that takes for ever, dropped; the server's descriptors; its log
///         would tell of faults.
#[test]
fn f5_a_session_that_ends_leaves_no_file_open() {
    let (mut server, root) = serve_process();
    endless(&root);
    let witness = client(server.path(), WaitPolicy::Block);
    drop(witness.open().unwrap());
    let before = server.process.fds();
    for _ in 0..5 {
        let client = client(server.path(), WaitPolicy::Block);
        let connection = client.open().unwrap();
        for _ in 0..4 {
            connection.submit(ANALYZE, &by_path("endless"), &CallOptions::default()).unwrap();
        }
        client.flush().unwrap();
        // Socket, process and segment of the session are three of them.
        eventually("files are being read", || server.process.fds() > before + 3);
    }
    eventually("all is closed", || server.process.fds() == before);
    eventually("all buffers are given back", || stat(&witness.open().unwrap(), "staged_bytes") == 0);
    drop(witness);
    assert!(server.terminate().success());
    assert!(!server.log().contains("WARN"), "{}", server.log());
}

/// Goal:   S12: only so many files are read at once; one more is told to come again, and others are not hurt.
/// Method: endless files until it says so; then they are cancelled, and it goes on.
#[test]
fn s12_too_many_files_at_once_are_told_to_come_again() {
    let files = Files::serve(WaitPolicy::Block);
    endless(&files.root);
    std::fs::write(files.root.join("small"), "small\n").unwrap();
    let bystander = Bystander::new(files.server.path());
    let clients: Vec<IpcClient> = (0..FILE_READS_MAX / 4).map(|_| files.client()).collect();
    let connections: Vec<Connection<'_>> = clients.iter().map(|client| client.open().unwrap()).collect();
    let mut calls = Vec::new();
    for connection in &connections {
        for _ in 0..4 {
            let options = CallOptions::default();
            calls.push((connection, connection.submit(ANALYZE, &by_path("endless"), &options).unwrap()));
        }
        connection.client().flush().unwrap();
    }
    let other = files.client();
    let connection = other.open().unwrap();
    let is_full = || match connection.call(ANALYZE, &by_path("small")) {
        Ok(_) => false,
        Err(IpcError::Overloaded { retry_ms }) => retry_ms > 0,
        Err(error) => panic!("{error}"),
    };
    eventually("as many files are read as may be", is_full);
    bystander.check("as many files as may be");
    for (connection, call) in calls {
        connection.client().cancel(call);
        connection.client().flush().unwrap();
    }
    eventually("there is room again", || !is_full());
}

/// Goal:   S7: small calls are answered while files are read, however many there are.
/// Method: a hundred files asked for again and again by four clients, until a bystander has had its calls answered.
#[test]
fn s7_a_bystander_is_served_while_files_are_read() {
    let files = Files::serve(WaitPolicy::Handoff);
    let contents: Vec<Vec<u8>> = (0..100).map(|i| text(i * 1500, i)).collect();
    for (i, content) in contents.iter().enumerate() {
        std::fs::write(files.root.join(&i.to_string()), content).unwrap();
    }
    let bystander = Bystander::new(files.server.path());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (files, contents, over) = (&files, &contents, &over);
            scope.spawn(move || {
                let client = files.client();
                let connection = client.open().unwrap();
                for i in (number * 25..).map(|i| i % contents.len()) {
                    let answer = analyze(&connection, i.to_string()).unwrap();
                    assert_eq!(found(&answer).0, contents[i].len() as u64);
                    if over.load(SeqCst) {
                        break;
                    }
                }
            });
        }
        while bystander.stat("files_read") < 100 {
            bystander.check("files being read");
        }
        over.store(true, SeqCst);
    });
}

/// Goal:   F40: where the kernel registers no memory, files are read all the same, and the log says so once.
/// Method: a server of another user who may lock no memory, and clients of that user.
#[test]
fn f40_without_locked_memory_files_are_read_and_the_log_says_so_once() {
    if !is_root("running a server as another user") || !has_io_uring("registered buffers") {
        return;
    }
    let directory = TestDir::new();
    let program = copy_for_everybody(Path::new(env!("CARGO_BIN_EXE_doorbell")), &directory, "doorbell");
    let theirs = directory.join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    let content = text(200_000, 3);
    std::fs::write(theirs.join("file"), &content).unwrap();
    std::fs::write(theirs.join("request"), by_path("file")).unwrap();
    std::os::unix::fs::chown(&theirs, Some(NOBODY), Some(NOBODY)).unwrap();
    let (socket, log) = (theirs.join("s"), directory.join("log"));
    let mut serve = Command::new(&program);
    serve.args(["serve", "--socket"]).arg(&socket).arg("--root").arg(&theirs).env("NO_COLOR", "1");
    serve.stderr(std::fs::File::create(&log).unwrap()).stdin(Stdio::null()).uid(NOBODY).gid(NOBODY);
    let server = Process(serve.spawn().unwrap());
    let said = || std::fs::read_to_string(&log).unwrap();
    eventually("the server serves", || said().contains("serving at"));
    let call = |arguments: &[&str]| {
        let mut call = Command::new(&program);
        call.args(["call", "--socket"]).arg(&socket).args(arguments);
        call.uid(NOBODY).gid(NOBODY).output().unwrap()
    };
    // Its rings are locked memory, too: from now on there is no more.
    eventually("the rings are made", || call(&["--type", "ping"]).status.success());
    let nothing = Rlimit { current: Some(0), maximum: Some(0) };
    let pid = server.pid();
    let lowered = std::thread::spawn(move || {
        // Of this thread alone; not even root may do that to another user everywhere.
        rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(NOBODY)).unwrap();
        rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).unwrap();
        prlimit(Some(pid), Resource::Memlock, nothing).map(drop)
    });
    assert_eq!(lowered.join().unwrap(), Ok(()));
    for _ in 0..3 {
        let request = theirs.join("request");
        let output = call(&["--type", "analyze-file", "--json", request.to_str().unwrap()]);
        assert!(output.status.success(), "{} {}", stderr(&output), said());
        assert_eq!(found(&output.stdout), oracle(&content));
    }
    assert_eq!(said().matches("not registered").count(), 1, "{}", said());
    assert!(said().contains("RLIMIT_MEMLOCK"), "{}", said());
}

/// Goal:   R2.11, R3.4: the command serves files beneath the roots that it is given, and says what is wrong with one.
/// Method: two roots, one of them relative; a limit; a root that is none.
#[test]
fn r2_11_the_command_serves_files_beneath_its_roots() {
    let directory = TestDir::new();
    for (root, name, len) in [("one", "a", 10), ("two", "b", 20)] {
        std::fs::create_dir(directory.join(root)).unwrap();
        std::fs::write(directory.join(root).join(name), text(len, len)).unwrap();
    }
    let socket = directory.join("s");
    let mut serve = doorbell();
    serve.args(["serve", "--root", "one", "--max-file-size", "15", "--root"]).arg(directory.join("two"));
    serve.arg("--socket").arg(&socket).current_dir(&directory.0).stderr(Stdio::null());
    let _server = Process(serve.spawn().unwrap());
    eventually("the server serves", || IpcClient::connect(&socket).is_ok());
    let call = |path: &str| {
        let request = directory.join("request");
        std::fs::write(&request, by_path(path)).unwrap();
        let mut call = doorbell();
        call.args(["call", "--type", "analyze-file", "--json"]).arg(request).arg("--socket").arg(&socket);
        call.output().unwrap()
    };
    let output = call("a");
    assert_eq!(found(&output.stdout), oracle(&text(10, 10)), "{}", stderr(&output));
    let said = stderr(&call("b"));
    assert!(said.contains("has 20 bytes, the limit is 15: raise `max_file_size`"), "{said}");

    let refused = doorbell().args(["serve", "--root", "/no/such", "--socket"]).arg(&socket).output().unwrap();
    let said = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("file_roots: /no/such"), "{said}");
}

/// Goal:   the status of each end is counted.
#[test]
fn r2_11_ends_are_counted_by_status() {
    let files = Files::serve(WaitPolicy::Block);
    std::fs::write(files.root.join("file"), "x").unwrap();
    let client = files.client();
    let connection = client.open().unwrap();
    analyze(&connection, "file").unwrap();
    refusal(&connection, "missing");
    drop(connection);
    let metrics = files.server.stop();
    let of = |status: Status| metrics.calls[status as usize];
    assert_eq!((of(Status::Ok), of(Status::Internal)), (1, 1));
    assert_eq!((metrics.files_read, metrics.files_refused), (1, 1));
}

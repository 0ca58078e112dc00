//! What a server tells whoever watches it: `doorbell stat`, `ps`, `top`, `trace`, and the messages behind them (R4.7).
#![cfg(feature = "cli")]

mod common;

use common::process::{Process, doorbell, stderr};
use common::streams::{ENDLESS, is_pattern};
use common::{COUNT, GATE, TestDir, TestServer, client, eventually};
use doorbell::inspect::{Inquiry, Report};
use doorbell::protocol::handshake::DisconnectReason;
use doorbell::{CallOptions, Connection, IpcError, MessageType, ServerConfig, WaitPolicy};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::CpuSet;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn run(server: &Path, command: &str, arguments: &[&str]) -> Output {
    doorbell().arg(command).arg("--socket").arg(server).args(arguments).output().unwrap()
}

/// What a command prints that succeeds.
fn text(server: &Path, command: &str, arguments: &[&str]) -> String {
    let output = run(server, command, arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn json(server: &Path, command: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&text(server, command, arguments)).unwrap()
}

/// Asks a server by a message.
fn ask(connection: &Connection<'_>, inquiry: &Inquiry) -> Report {
    let body = serde_json::to_vec(inquiry).unwrap();
    let options = CallOptions { reply_capacity: 1 << 20, ..CallOptions::default() };
    let answer = connection.call_with(MessageType::INSPECT, &body, &options, |reply| reply.to_vec());
    serde_json::from_slice(&answer.unwrap().unwrap()).unwrap()
}

const ALL: Inquiry = Inquiry { sessions: true, connections: true, calls: true, trace: 0 };

/// Goal:   R4.7: calls, bytes and time of each connection are counted, wherever it was served, and told with its session.
/// Method: two connections of one session on two reactors; what is told is compared with what was sent.
#[test]
fn r4_7_connections_are_counted_each_by_itself() {
    let server = TestServer::start_with(ServerConfig { reactors: 2, ..ServerConfig::default() });
    let client = client(server.path(), WaitPolicy::Handoff);
    let (one, other) = (client.open().unwrap(), client.open().unwrap());
    for _ in 0..10 {
        one.call(MessageType::ECHO, &[1; 500]).unwrap();
    }
    other.call(MessageType::ECHO, &vec![2; 100_000]).unwrap();
    let watcher = common::client(server.path(), WaitPolicy::Block);
    let connection = watcher.open().unwrap();
    let told = ask(&connection, &ALL);
    let pid = std::process::id();
    let sessions: Vec<_> = told.sessions.iter().filter(|lane| lane.lane == 0).collect();
    assert_eq!(sessions.iter().map(|lane| lane.pid).collect::<Vec<_>>(), [pid, pid]);
    let mut sums: Vec<(u64, u64, u64)> = Vec::new();
    for of in [&one, &other] {
        let its = told.connections.iter().filter(|told| told.connection == of.number());
        sums.push(its.fold((0, 0, 0), |(r, b, t), of| (r + of.requests, b + of.bytes, t + of.time_ns)));
    }
    assert_eq!((sums[0].0, sums[0].1), (10, 10_000));
    assert_eq!((sums[1].0, sums[1].1), (1, 200_000));
    assert!(sums.iter().all(|sum| sum.2 > 0), "{sums:?}");
    assert_eq!(told.counter("sessions_open"), 2);
    assert!(told.calls.iter().all(|call| call.message_type == MessageType::INSPECT.0), "{:?}", told.calls);
}

/// Goal:   a stream whose client does not read is seen to wait for credit, and for how long.
/// Method: `doorbell ps` beside such a client; the stream goes on as if nobody had looked.
#[test]
fn r4_7_ps_shows_what_a_call_waits_for() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    connection.submit(ENDLESS, b"", &CallOptions { pieces: true, ..CallOptions::default() }).unwrap();
    client.wait(None).unwrap();
    let mut shown = Value::Null;
    eventually("the stream waits for credit", || {
        shown = json(server.path(), "ps", &["--json", "--stuck", "20"]);
        shown["calls"].as_array().unwrap().iter().any(|call| call["state"] == "waiting_for_credit")
    });
    let call = &shown["calls"][0];
    assert_eq!(call["message_type"], ENDLESS.0);
    assert!(call["age_ns"].as_u64().unwrap() >= 20_000_000);
    let people = text(server.path(), "ps", &[]);
    assert!(people.contains("waiting for credit") && people.contains("280"), "{people}");
    assert_eq!(text(server.path(), "ps", &["--stuck", "3600000"]), "no calls\n");
    let reply = client.poll().unwrap().unwrap();
    assert!(is_pattern(&reply.to_vec().unwrap(), 0));
}

/// Goal:   a handler that holds its reactor up is named, with the calls that wait behind it, although that reactor cannot
///         answer.
/// Method: a handler that waits on the second of two reactors, with a call behind it; the first is asked.
#[test]
fn r4_7_ps_shows_a_handler_that_holds_its_reactor_up() {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).take(2).collect();
    let &[home, other] = &cores[..] else {
        eprintln!("one core alone: nothing to be tested here");
        return;
    };
    let config = ServerConfig { policy: WaitPolicy::Handoff, reactors: 2, cores, ..ServerConfig::default() };
    let server = Arc::new(TestServer::start_with(config));
    let watcher = client(server.path(), WaitPolicy::Block);
    let watching = watcher.open().unwrap();
    let path = server.path().to_owned();
    let stuck = std::thread::spawn(move || {
        let mut set = CpuSet::new();
        set.set(other);
        rustix::thread::sched_setaffinity(None, &set).unwrap();
        let client = client(&path, WaitPolicy::Handoff);
        let connection = client.open().unwrap();
        eventually("the lane of the other reactor is used", || {
            let id = connection.submit(MessageType::PING, b"", &CallOptions::default()).unwrap();
            client.wait(None).unwrap();
            client.poll().unwrap().unwrap();
            id.lane() != 0
        });
        connection.call(GATE, b"").unwrap();
        connection.number()
    });
    eventually("the handler runs", || server.entered() == 1);
    let mut set = CpuSet::new();
    set.set(home);
    rustix::thread::sched_setaffinity(None, &set).unwrap();
    let mut told = ask(&watching, &ALL);
    eventually("it has run for long", || {
        told = ask(&watching, &ALL);
        told.running.iter().any(|running| running.for_ns > 400_000_000)
    });
    assert_eq!(told.silent, [1]);
    let running = told.running.iter().find(|running| running.message_type == GATE.0).unwrap();
    assert_eq!(running.reactor, 1);
    let people = text(server.path(), "ps", &["--stuck", "100"]);
    assert!(people.contains("in a handler for") && people.contains("reactor 1 does not answer"), "{people}");
    server.open_gate();
    assert_eq!(stuck.join().unwrap(), running.connection);
    eventually("it is over", || {
        let told = ask(&watching, &ALL);
        told.silent.is_empty() && told.running.iter().all(|running| running.message_type != GATE.0)
    });
}

/// Goal:   R4.7: whoever looks so seldom that the server has ended his session meanwhile goes on looking.
#[test]
fn r4_7_stat_goes_on_beyond_the_idle_timeout() {
    let (idle_timeout, sweep_interval) = (Some(Duration::from_millis(50)), Duration::from_millis(5));
    let server =
        TestServer::start_with(ServerConfig { idle_timeout, sweep_interval, ..ServerConfig::default() });
    let mut command = doorbell();
    command.args(["stat", "--json", "--watch", "1", "--socket"]).arg(server.path());
    let mut child = Process(command.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let stdout = BufReader::new(child.0.stdout.take().unwrap());
    let reports = stdout.lines().take(3).map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    assert!(reports.map(|report| report["pid"] == std::process::id()).eq([true; 3]));
}

/// Goal:   R4.7, R3.7: a question that has been taken is answered, although the server stops before it has looked at it.
/// Method: the only reactor, which polls, is held up in a handler while two sessions ask and the server is told to stop. It
///         takes both questions in the round in which it is let go, and looks at one of them before it hears of the stop.
#[test]
fn r4_7_r3_7_questions_that_were_taken_are_answered_before_the_stop() {
    let server = TestServer::start(WaitPolicy::Spin);
    let [busy, one, other] = [(); 3].map(|()| client(server.path(), WaitPolicy::Block));
    let (held, asking) = (busy.open().unwrap(), [one.open().unwrap(), other.open().unwrap()]);
    held.submit(GATE, b"", &CallOptions::default()).unwrap();
    busy.flush().unwrap();
    eventually("the handler runs", || server.entered() == 1);
    let body = serde_json::to_vec(&Inquiry::default()).unwrap();
    for connection in &asking {
        let options = CallOptions { reply_capacity: 1024, ..CallOptions::default() };
        connection.submit(MessageType::INSPECT, &body, &options).unwrap();
        connection.client().flush().unwrap();
    }
    server.ask_to_stop();
    server.open_gate();
    for client in [&one, &other] {
        let report = loop {
            match client.poll().unwrap() {
                Some(reply) => break reply.result().map(|_| reply.to_vec().unwrap()).unwrap(),
                None => assert!(client.wait(None).unwrap()),
            }
        };
        serde_json::from_slice::<Report>(&report).unwrap();
    }
}

/// Goal:   `doorbell stat` tells of calls by type, once, as JSON, and again and again.
#[test]
fn r4_2_stat_tells_what_was_counted() {
    let server = TestServer::start(WaitPolicy::Block);
    let client = client(server.path(), WaitPolicy::Block);
    let connection = client.open().unwrap();
    for _ in 0..30 {
        connection.call(COUNT, b"").unwrap();
    }
    let report = json(server.path(), "stat", &["--json"]);
    assert_eq!(report["pid"], std::process::id());
    let of = report["types"].as_array().unwrap().iter().find(|of| of["message_type"] == COUNT.0).unwrap();
    assert_eq!(of["buckets"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>(), 30);
    let people = text(server.path(), "stat", &[]);
    for part in ["sessions", "memory", "p99.9", "259", "hot lanes"] {
        assert!(people.contains(part), "{part} in {people}");
    }
    let mut command = doorbell();
    command.args(["stat", "--json", "--watch", "1", "--socket"]).arg(server.path());
    let mut child = Process(command.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut lines = String::new();
    let stdout = child.0.stdout.as_mut().unwrap();
    eventually("two lines", || {
        let mut some = [0; 4096];
        let got = stdout.read(&mut some).unwrap();
        lines += std::str::from_utf8(&some[..got]).unwrap();
        lines.matches('\n').count() >= 2
    });
}

/// Goal:   a session is ended by whoever watches, is told why, and no other session of the same number is hit.
#[test]
fn r4_7_a_session_can_be_ended() {
    let server = TestServer::start(WaitPolicy::Block);
    let (victim, watcher) =
        (client(server.path(), WaitPolicy::Block), client(server.path(), WaitPolicy::Block));
    let connection = victim.open().unwrap();
    connection.call(COUNT, b"").unwrap();
    let watching = watcher.open().unwrap();
    let told = ask(&watching, &ALL);
    let number = connection.number();
    let session = told.connections.iter().find(|of| of.connection == number).unwrap().session;
    let generation = told.sessions.iter().find(|lane| lane.session == session).unwrap().generation;
    let end = |generation: u32| {
        let whom = format!("{{\"session\":{session},\"generation\":{generation}}}");
        watching.call(MessageType::END_SESSION, whom.as_bytes()).unwrap()
    };
    assert_eq!(end(generation.wrapping_add(1)), b"{\"ended\":false}");
    connection.call(COUNT, b"").unwrap();
    assert_eq!(end(generation), b"{\"ended\":true}");
    // A call that is on its way has an end of its own.
    let mut ended = connection.call(COUNT, b"").unwrap_err();
    if matches!(ended, IpcError::NotExecuted) {
        ended = connection.call(COUNT, b"").unwrap_err();
    }
    assert!(matches!(ended, IpcError::Disconnected(DisconnectReason::Evicted)), "{ended:?}");
    for nonsense in [&b""[..], b"{}", b"{\"session\":1}", b"no"] {
        let error = watching.call(MessageType::END_SESSION, nonsense).unwrap_err();
        assert!(matches!(error, IpcError::Decode(_)), "{error:?}");
    }
    watching.call(COUNT, b"").unwrap();
    drop((connection, watching));
    assert_eq!(server.stop().ended(DisconnectReason::Evicted), 1);
}

/// Goal:   a trace has every call of its connection, none of another, no payload, and is what viewers read.
/// Method: a client that calls all the time beside `doorbell trace`, and another client.
#[test]
fn r4_7_a_connection_is_traced() {
    let server = TestServer::start(WaitPolicy::Block);
    let (traced, other) =
        (client(server.path(), WaitPolicy::Block), client(server.path(), WaitPolicy::Block));
    let (connection, beside) = (traced.open().unwrap(), other.open().unwrap());
    let directory = TestDir::new();
    let file = directory.join("trace.json");
    let number = format!("{:#x}", connection.number());
    let mut command = doorbell();
    command
        .args(["trace", &number, "--seconds", "1", "--output"])
        .arg(&file)
        .arg("--socket")
        .arg(server.path());
    let mut child = Process(command.stderr(std::process::Stdio::null()).spawn().unwrap());
    let mut status = None;
    let mut long = vec![7; 40_000];
    while status.is_none() {
        assert_eq!(connection.call(MessageType::ECHO, b"secret words").unwrap(), b"secret words");
        beside.call(COUNT, b"").unwrap();
        long[0] ^= 1;
        assert!(connection.call(MessageType::ECHO, &long).unwrap() == long);
        status = child.0.try_wait().unwrap();
    }
    assert!(status.unwrap().success());
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains("secret"));
    let trace: Value = serde_json::from_str(&text).unwrap();
    let events: Vec<&Value> =
        trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").collect();
    let of = |kind: &str| events.iter().filter(|event| event["cat"] == kind).count();
    assert!(of("call") > 3 && of("long") > 3, "{} and {}", of("call"), of("long"));
    assert!(of("call").abs_diff(of("long")) <= 1, "every call: {} and {}", of("call"), of("long"));
    assert!(events.iter().all(|event| event["name"] == "echo" && event["args"]["status"] == "Ok"));
    assert!(events.iter().all(|event| event["dur"].as_f64().unwrap() > 0.0));
    let refused = run(server.path(), "trace", &["12345"]);
    assert!(stderr(&refused).contains("there is no connection 0x3039"), "{}", stderr(&refused));
}

/// Goal:   `doorbell top` runs on a terminal of 80x24 and of 200x50, shows the server, and gives the terminal back.
/// Method: a terminal of the test's own, whose keys it presses.
#[test]
fn r4_7_top_runs_on_a_terminal() {
    for (columns, rows) in [(80, 24), (200, 50)] {
        let server = TestServer::start(WaitPolicy::Block);
        let victim = client(server.path(), WaitPolicy::Block);
        let connection = victim.open().unwrap();
        connection.call(COUNT, b"").unwrap();
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        tcsetwinsize(&ours, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let open = || std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
        let mut command = doorbell();
        command.args(["top", "--interval", "0.1", "--socket"]).arg(server.path());
        command.env("TERM", "xterm").env_remove("NO_COLOR");
        command.stdin(open()).stdout(open()).stderr(std::process::Stdio::null());
        let mut child = Process(command.spawn().unwrap());
        drop(command);
        let mut keys = std::fs::File::from(ours.try_clone().unwrap());
        let shown: Arc<Mutex<Vec<u8>>> = Arc::default();
        let reader = std::thread::spawn({
            let (shown, mut terminal) = (Arc::clone(&shown), std::fs::File::from(ours));
            move || {
                let mut some = [0; 4096];
                // A terminal that everybody has closed answers with EIO.
                while let Ok(got @ 1..) = terminal.read(&mut some) {
                    shown.lock().unwrap().extend_from_slice(&some[..got]);
                }
            }
        });
        let shows = |part: &str| {
            let shown = shown.lock().unwrap();
            shown.windows(part.len()).any(|window| window == part.as_bytes())
        };
        eventually("the server is shown", || shows("doorbell") && shows("[sessions]") && shows("reactor"));
        keys.write_all(b"\t\t").unwrap();
        // Only what changes is drawn: the head of a column that the other lists do not have.
        eventually("types are shown", || shows("longest"));
        keys.write_all(b"\t/").unwrap();
        eventually("a filter is asked for", || shows("(Enter"));
        // Ctrl-C is a key like others here, and leaves from everywhere.
        keys.write_all(b"\x03").unwrap();
        assert!(child.wait().success());
        drop(keys);
        reader.join().unwrap();
        let shown = shown.lock().unwrap();
        assert!(shown.ends_with(b"\x1b[?1049l\x1b[?25h") || shown.windows(8).any(|w| w == b"\x1b[?1049l"));
        connection.call(COUNT, b"").unwrap();
    }
    let output = run(Path::new("/nowhere"), "top", &[]);
    assert!(stderr(&output).contains("no terminal"), "{}", stderr(&output));
}

/// Goal:   whoever watches a server that is not there is told so.
#[test]
fn r4_7_a_server_that_is_not_there_is_told() {
    for command in ["stat", "ps"] {
        let output = run(Path::new("/nowhere/s"), command, &[]);
        assert!(!output.status.success() && stderr(&output).contains("/nowhere/s"), "{}", stderr(&output));
    }
}

/// The lines of a log, each an object.
fn log_lines(log: &str) -> Vec<Value> {
    log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// Goal:   R4.3, trap 21: where no terminal is, every line of the log is one JSON object; the end of a session is one of
///         them, with the session and the reason; nothing of what was sent is in it, in whichever format.
/// Method: a server that logs everything, a client that sends, fails, and goes; another that breaks the protocol.
#[test]
fn r4_3_trap21_the_log_has_a_line_for_each_event_and_no_payload() {
    for format in ["auto", "json", "human"] {
        let mut server = common::process::ServerProcess::start(&["--verbose", "--log-format", format]);
        let client = client(server.path(), WaitPolicy::Block);
        let connection = client.open().unwrap();
        for message_type in
            [MessageType::ECHO, MessageType::CHAT, MessageType::ANALYZE_FILE, MessageType(299)]
        {
            connection.call(message_type, b"{\"secret\":\"secret words\"").ok();
            connection.call(message_type, &[b"secret words".as_slice(); 3000].concat()).ok();
        }
        drop(connection);
        drop(client);
        eventually("the end is told", || server.log().contains("session ended"));
        server.terminate();
        let log = server.log();
        assert!(log.contains("stopped after") && !log.contains("secret"), "{log}");
        if format == "human" {
            assert!(log.lines().any(|line| line.contains("session ended session=0 reason=")), "{log}");
            continue;
        }
        let lines = log_lines(&log);
        let end = lines.iter().find(|line| line["message"] == "session ended").unwrap();
        assert_eq!((&end["session"], &end["reason"]), (&Value::from(0), &Value::from("the client is gone")));
        assert!(lines.iter().all(|line| line["level"].is_string() && line["timestamp"].is_string()));
    }
}

//! What a server counts, and what it tells Prometheus (R4.2, R4.6, R4.7).

mod common;

use common::{COUNT, PANIC, TestDir, eventually};
use doorbell::{
    Context, HandlerError, HandlerTable, IpcClient, IpcServer, MessageType, Metrics, MetricsReader, Reply,
    ServerConfig, ShutdownHandle, Status, TypeMetrics, WaitPolicy,
};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Takes 3 ms.
const SLOW: MessageType = MessageType(300);

fn slow(_: &Context<'_, ()>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    std::thread::sleep(Duration::from_millis(3));
    reply.write(b"slow")
}

fn panics(_: &Context<'_, ()>, _: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    panic!("a handler that panics on purpose")
}

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(SLOW, slow).on(PANIC, panics);

struct Server {
    path: PathBuf,
    reader: MetricsReader,
    handle: ShutdownHandle,
    thread: JoinHandle<Metrics>,
    _directory: TestDir,
}

impl Server {
    fn start(config: ServerConfig) -> Self {
        let directory = TestDir::new();
        let path = directory.join("s");
        let bound = IpcServer::new(&TABLE, ()).config(config).bind(&path).unwrap();
        let (reader, handle) = (bound.metrics(), bound.shutdown_handle());
        assert_eq!(reader.read(), Metrics::default());
        let thread = std::thread::spawn(move || bound.serve().unwrap());
        Self { path, reader, handle, thread, _directory: directory }
    }

    fn client(&self) -> IpcClient {
        common::client(&self.path, WaitPolicy::Block)
    }

    fn stop(self) -> (Metrics, MetricsReader) {
        self.handle.shutdown().unwrap();
        (self.thread.join().unwrap(), self.reader)
    }
}

fn of(metrics: &Metrics, message_type: MessageType) -> &TypeMetrics {
    metrics.types.iter().find(|of| of.message_type == message_type.0).unwrap()
}

/// Number of a sample in the text of Prometheus.
fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find(|line| line.split(' ').next() == Some(sample));
    line.unwrap_or_else(|| panic!("no {sample} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
}

/// Goal:   R4.2: every call is counted once under its type, with about the time that it took, whether it is answered at
///         once, in frames, or not at all; a slow type does not make others seem slow.
/// Method: echoes, slow calls, long bodies, unknown types and panics on two reactors; the counters are compared with
///         what was sent.
#[test]
fn r4_2_every_call_is_counted_under_its_type_with_its_time() {
    let server = Server::start(ServerConfig { reactors: 2, ..ServerConfig::default() });
    let client = server.client();
    let connection = client.open().unwrap();
    let long = vec![7u8; 200_000];
    for _ in 0..20 {
        connection.call(MessageType::ECHO, &[1; 100]).unwrap();
        connection.call(SLOW, b"").unwrap();
        assert_eq!(connection.call(MessageType::ECHO, &long).unwrap().len(), long.len());
    }
    let pinging = Instant::now();
    for _ in 0..300 {
        connection.call(MessageType::PING, b"").unwrap();
    }
    connection.call(MessageType(299), b"").unwrap_err();
    connection.call(PANIC, b"").unwrap_err();
    drop(connection);
    drop(client);
    let (metrics, reader) = server.stop();
    let pinged_ns = pinging.elapsed().as_nanos() as u64;
    assert_eq!(reader.read(), metrics, "what anybody could read in the end");
    assert_eq!(metrics.types.iter().map(TypeMetrics::calls).sum::<u64>(), metrics.calls_total());
    let calls = |message_type| of(&metrics, message_type).calls();
    assert_eq!(
        [MessageType::ECHO, SLOW, MessageType::PING, MessageType(299), PANIC].map(calls),
        [40, 20, 300, 1, 1]
    );
    let slow = of(&metrics, SLOW);
    let from = doorbell::BOUNDS_NS.iter().position(|bound| *bound == 2_500_000).unwrap() + 1;
    assert_eq!(slow.buckets[from..].iter().sum::<u64>(), 20, "{slow:?}");
    assert!(slow.sum_ns >= 60_000_000 && metrics.busy_ns >= 60_000_000 && metrics.overruns >= 20);
    let quick = of(&metrics, MessageType::PING);
    // Of the slow calls before it nothing is in this: more than the caller has waited cannot have been spent.
    assert!(quick.sum_ns <= pinged_ns && quick.longest_ns <= pinged_ns, "{quick:?} in {pinged_ns} ns");
    assert_eq!((metrics.sessions_open, metrics.reactors.len()), (0, 2));
    assert!(metrics.cpu_ns > 0);
}

/// Goal:   R4.2: what anybody reads while the server runs is right within a moment, also once nobody is connected.
#[test]
fn r4_2_counters_can_be_read_from_outside() {
    let server = Server::start(ServerConfig { reactors: 1, ..ServerConfig::default() });
    let client = server.client();
    let connection = client.open().unwrap();
    for _ in 0..7 {
        connection.call(MessageType::ECHO, &[0; 1000]).unwrap();
    }
    eventually("the counters are shown", || {
        let metrics = server.reader.read();
        metrics.bytes_in == 7000 && (metrics.sessions_open, metrics.connections_open) == (1, 1)
    });
    let text = server.reader.export_prometheus();
    assert_eq!(value(&text, "ipc_requests_total{type=\"echo\"}"), 7.0);
    assert_eq!(value(&text, "ipc_sessions"), 1.0);
    assert!(value(&text, "ipc_memory_bytes{kind=\"budget\"}") > 1e6);
    drop(connection);
    drop(client);
    eventually("the end is shown", || {
        let text = server.reader.export_prometheus();
        (value(&text, "ipc_sessions"), value(&text, "ipc_disconnects_total{reason=\"peer_died\"}"))
            == (0.0, 1.0)
    });
    server.stop();
}

/// Goal:   without `time_calls` the counters that cost nothing go on and nothing else is told.
#[test]
fn r4_2_calls_need_not_be_timed() {
    let server = Server::start(ServerConfig { reactors: 1, time_calls: false, ..ServerConfig::default() });
    let client = server.client();
    let connection = client.open().unwrap();
    connection.call(MessageType::ECHO, b"x").unwrap();
    connection.call(COUNT, b"").unwrap_err();
    drop(connection);
    let (metrics, _) = server.stop();
    assert_eq!((metrics.calls_total(), metrics.types.len(), metrics.busy_ns), (2, 0, 0));
    assert_eq!(metrics.calls[Status::UnknownType as usize], 1);
}

/// Goal:   R4.2, trap 27: a real parser of Prometheus reads the text, and has nothing to say against its names.
/// Method: `promtool check metrics`; ci/setup.sh installs it.
#[test]
fn r4_2_trap27_promtool_accepts_the_metrics() {
    let server = Server::start(ServerConfig { reactors: 2, ..ServerConfig::default() });
    let client = server.client();
    let connection = client.open().unwrap();
    for message_type in [MessageType::ECHO, SLOW, MessageType(299)] {
        connection.call(message_type, b"x").ok();
    }
    let text = server.reader.export_prometheus();
    common::promtool(&["check", "metrics"], &text);
    server.stop();
}

/// Names of families in a text, such as a query: words that begin with `ipc_`.
fn families(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("ipc_"))
}

/// Goal:   R4.2: the alert rules are what Prometheus reads, and rules and dashboard ask for nothing that a server does not
///         tell.
/// Method: `promtool check rules`; every family that they name is looked up in the text of a server.
#[test]
fn r4_2_rules_and_dashboard_ask_for_what_is_told() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules = root.join("contrib/prometheus/doorbell.rules.yml");
    common::promtool(&["check", "rules", rules.to_str().unwrap()], "");
    let told = Metrics::default().export_prometheus();
    let rules = std::fs::read_to_string(rules).unwrap();
    let dashboard = std::fs::read_to_string(root.join("contrib/grafana/doorbell.json")).unwrap();
    let parsed: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    assert!(parsed["panels"].as_array().unwrap().len() >= 10);
    let docs = std::fs::read_to_string(root.join("docs/metrics.md")).unwrap();
    for name in [&rules, &dashboard, &docs].into_iter().flat_map(|text| families(text)) {
        let family = name.strip_suffix("_bucket").unwrap_or(name);
        assert!(told.contains(&format!("# TYPE {family} ")), "{name} is asked for and not told");
    }
    for family in families(&told).filter(|name| told.contains(&format!("# TYPE {name} "))) {
        assert!(docs.contains(family), "docs/metrics.md says nothing of {family}");
    }
}

/// The process side: `doorbell serve` with a section `metrics`.
#[cfg(feature = "exporter")]
mod exporter {
    use super::value;
    use crate::common::process::ServerProcess;
    use crate::common::{self, TestDir, eventually};
    use doorbell::{IpcClient, MessageType};
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// A server with these lines in its section `metrics`.
    fn start(lines: &str) -> ServerProcess {
        let directory = TestDir::new();
        let config = directory.join("config.toml");
        let lines = lines.replace("DIRECTORY", directory.0.to_str().unwrap());
        std::fs::write(&config, format!("[metrics]\n{lines}\n")).unwrap();
        let config = config.to_str().unwrap().to_owned();
        ServerProcess::start_in(directory, &["--config", &config])
    }

    /// Where a server says that it serves metrics.
    fn address(server: &ServerProcess) -> String {
        let log = server.log();
        let line = log.lines().find(|line| line.contains("serving metrics")).unwrap();
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["address"].as_str().unwrap().to_owned()
    }

    fn ask(mut stream: impl Read + Write, request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// Goal:   R4.6: the text is served at a loopback address, to whoever asks properly, and is what promtool reads.
    #[test]
    fn r4_6_metrics_are_served_by_http() {
        let server = start("listen = \"127.0.0.1:0\"");
        let client = IpcClient::connect(server.path()).unwrap();
        for _ in 0..3 {
            client.open().unwrap().call(MessageType::ECHO, b"x").unwrap();
        }
        let address = address(&server);
        let answer = ask(TcpStream::connect(&address).unwrap(), GET);
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains("text/plain; version=0.0.4"), "{head}");
        assert_eq!(value(text, "ipc_requests_total{type=\"echo\"}"), 3.0);
        common::promtool(&["check", "metrics"], text);
        for (request, status) in [
            ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "405"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let answer = ask(TcpStream::connect(&address).unwrap(), request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        }
    }

    /// Goal:   R4.6: at a unix socket, which is the server's user's alone; a socket that a killed server has left is taken
    ///         over, one that is served at is not. A server removes its own when it ends, and nobody else's.
    #[test]
    fn r4_6_metrics_are_served_at_a_unix_socket() {
        use std::os::unix::fs::MetadataExt;
        let mut server = start("listen = \"unix:DIRECTORY/metrics.sock\"");
        let path = server.path().with_file_name("metrics.sock");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(ask(UnixStream::connect(&path).unwrap(), GET).contains("ipc_sessions 0"));
        let config = server.path().with_file_name("config.toml");
        let other = server.path().with_file_name("other");
        let second = common::process::run(&[
            "serve",
            "--socket",
            other.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ]);
        let said = common::process::stderr(&second);
        assert!(!second.status.success() && said.contains("metrics cannot be served at unix:"), "{said}");
        server.process.kill();
        assert!(path.exists());
        server.restart(&["--config", config.to_str().unwrap()]);
        assert!(ask(UnixStream::connect(&path).unwrap(), GET).contains("ipc_sessions 0"));
        server.terminate();
        assert!(!path.exists());
        server.restart(&["--config", config.to_str().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        let others = std::os::unix::net::UnixListener::bind(&path).unwrap();
        server.terminate();
        UnixStream::connect(&path).unwrap();
        drop(others);
    }

    /// Goal:   S12: slow and hostile readers hold up nobody, and are cut off.
    /// Method: forty connections that say nothing, or a byte, or a head without end; a reader is answered while some of them
    ///         are open; each of the forty ends.
    #[test]
    fn s12_slow_readers_of_metrics_hold_up_nobody() {
        let server = start("listen = \"127.0.0.1:0\"");
        let address = address(&server);
        let connect = || -> Vec<TcpStream> {
            let slow = (0..40).map(|i| {
                let mut stream = TcpStream::connect(&address).unwrap();
                match i % 3 {
                    0 => {}
                    1 => stream.write_all(b"G").unwrap(),
                    // It may have been cut off while it writes.
                    _ => stream.write_all(&[b'x'; 100_000]).unwrap_or_default(),
                }
                stream
            });
            slow.collect()
        };
        let is_open = |stream: &TcpStream| {
            stream.set_nonblocking(true).unwrap();
            let silent = matches!(stream.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock);
            stream.set_nonblocking(false).unwrap();
            silent
        };
        // However slow the machine is, it need happen once: somebody held up would be answered after all of them have gone.
        let mut slow = Vec::new();
        eventually("a reader is answered while slow ones are connected", || {
            slow = connect();
            assert!(ask(TcpStream::connect(&address).unwrap(), GET).contains("ipc_sessions 0"));
            slow.iter().any(is_open)
        });
        for mut stream in slow {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut rest = Vec::new();
            match stream.read_to_end(&mut rest) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
            }
        }
        assert!(ask(TcpStream::connect(&address).unwrap(), GET).contains("ipc_sessions 0"));
    }

    /// Goal:   R4.6: every interval one line in the log, and the text file, which is never half a version.
    /// Method: an interval of a second; the file is read all the time and always ends as a whole text does.
    #[test]
    fn r4_6_a_line_and_a_text_file_every_interval() {
        let server = start("export_interval_secs = 1\ntextfile = \"DIRECTORY/doorbell.prom\"");
        let path = server.path().with_file_name("doorbell.prom");
        let client = IpcClient::connect(server.path()).unwrap();
        let connection = client.open().unwrap();
        for _ in 0..5 {
            connection.call(MessageType::ECHO, b"secret words").unwrap();
        }
        eventually("the file tells of the calls", || {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.lines().last().unwrap().starts_with("ipc_ring_enters_total"), "half a version");
            text.contains("ipc_requests_total{type=\"echo\"} 5")
        });
        eventually("a line tells of the calls", || server.log().contains("\"calls\":5,"));
        assert!(!server.log().contains("secret"));
        let draft = std::fs::read_dir(path.parent().unwrap()).unwrap();
        let names: Vec<_> = draft.map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().starts_with(".doorbell.prom")), "{names:?}");
    }

    /// Goal:   R4.6: a place where the text file cannot be is told at the start, and what to do about it.
    #[test]
    fn r4_6_a_text_file_that_cannot_be_written_is_told_at_the_start() {
        let directory = TestDir::new();
        let config = directory.join("config.toml");
        std::fs::write(&config, "[metrics]\ntextfile = \"/nowhere/doorbell.prom\"\n").unwrap();
        let socket = directory.join("s");
        let output = common::process::run(&[
            "serve",
            "--socket",
            socket.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ]);
        let said = common::process::stderr(&output);
        assert!(!output.status.success());
        assert!(said.contains("/nowhere/doorbell.prom") && said.contains("`textfile`"), "{said}");
    }
}

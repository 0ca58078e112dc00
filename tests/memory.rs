//! What a server keeps resident, region by region, by the kernel's own account (R5.3, R5.4). Shared pages are not
//! judged here: how many there are is a matter of what clients ask for.

mod common;

use common::eventually;
use common::process::{ServerProcess, has_io_uring};
use doorbell::{CallOptions, ClientConfig, IpcClient, MessageType, WaitPolicy};

const KIB: u64 = 1024;

/// Bytes of one process, as `/proc/PID/smaps` has them.
#[derive(Debug, Default)]
struct Resident {
    /// The executable's own pages, as they are in its file.
    executable: u64,
    /// The same, resident or not.
    executable_mapped: u64,
    /// io_uring.
    rings: u64,
    /// Segments of sessions.
    segments: u64,
    /// Heap, stacks, relocated and other data.
    rest: u64,
}

impl Resident {
    fn of(server: &ServerProcess) -> Self {
        let pid = server.process.0.id();
        let executable = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let mut resident = Self::default();
        for mapping in mappings(&smaps) {
            let rss = mapping.kib("Rss:") * KIB;
            if mapping.path == executable.to_str().unwrap() && mapping.kib("Anonymous:") == 0 {
                resident.executable += rss;
                resident.executable_mapped += mapping.kib("Size:") * KIB;
            } else if mapping.path.contains("[io_uring]") {
                resident.rings += rss;
            } else if mapping.path.starts_with("/memfd:doorbell-session") {
                resident.segments += rss;
            } else {
                resident.rest += rss;
            }
        }
        resident
    }
}

/// One mapping in an `smaps`.
struct Mapping<'a> {
    path: &'a str,
    fields: Vec<(&'a str, u64)>,
}

impl Mapping<'_> {
    fn kib(&self, name: &str) -> u64 {
        self.fields.iter().find(|(field, _)| *field == name).map_or(0, |(_, kib)| *kib)
    }
}

fn mappings(smaps: &str) -> Vec<Mapping<'_>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let (first, others) = line.split_once(' ').unwrap_or((line, ""));
        if first.ends_with(':') {
            let kib = others.trim().trim_end_matches(" kB").parse().unwrap_or_default();
            mappings.last_mut().unwrap().fields.push((first, kib));
        } else {
            let path = others.splitn(5, ' ').nth(4).unwrap_or_default().trim_start();
            mappings.push(Mapping { path, fields: Vec::new() });
        }
    }
    mappings
}

/// So many more sessions, each of which has made a call.
fn connect(server: &ServerProcess, sessions: usize) -> Vec<IpcClient> {
    let connect = |i: usize| {
        let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::default() };
        let client = IpcClient::connect_with(server.path(), &config).unwrap();
        let request = [i as u8; 1024];
        assert_eq!(client.open().unwrap().call(MessageType::ECHO, &request).unwrap(), request);
        client
    };
    (0..sessions).map(connect).collect()
}

/// Goal:   R5.3: a server that has served is resident with little more than what it works with: a part of its
///         executable, small rings, and what each session needs.
/// Method: a hundred sessions with a call each; then the kernel's account of every region. A build that is not
///         optimised has more code, and more data that is relocated with it, but not more of anything else.
#[test]
fn r5_3_a_server_is_resident_with_what_it_works_with() {
    let server = ServerProcess::start(&[]);
    let sessions = connect(&server, 100);
    let resident = Resident::of(&server);
    assert!(resident.executable > 0 && resident.segments > 0, "{resident:?}");
    assert_eq!(resident.rings > 0, has_io_uring("the memory of rings"), "{resident:?}");
    assert!(resident.executable < resident.executable_mapped / 2, "{resident:?}");
    let relocated = if cfg!(debug_assertions) { 768 * KIB } else { 0 };
    if !cfg!(debug_assertions) {
        assert!(resident.executable <= 768 * KIB, "{resident:?}");
    }
    assert!(resident.rings <= 96 * KIB, "{resident:?}");
    assert!(resident.rest <= 1024 * KIB + relocated, "{resident:?}");
    drop(sessions);
}

/// Goal:   R5.3, R4.6: to tell what is counted costs a server little memory: a thread, and the code of HTTP once somebody
///         has asked.
/// Method: a server that serves metrics, a hundred sessions with calls of several types, ten readers; its account beside
///         that of a server that tells nothing.
#[test]
fn r5_3_r4_6_metrics_cost_little_memory() {
    let directory = common::TestDir::new();
    let (on, off) = (directory.join("on.toml"), directory.join("off.toml"));
    std::fs::write(&on, "[metrics]\nlisten = \"127.0.0.1:0\"\n").unwrap();
    std::fs::write(&off, "[metrics]\nenable = false\n").unwrap();
    let rest_and_code = [on, off].map(|config| {
        let server = ServerProcess::start(&["--config", config.to_str().unwrap()]);
        let sessions = connect(&server, 100);
        if let Some(address) = metrics_address(&server) {
            (0..10).for_each(|_| assert!(read_metrics(&address).contains("ipc_sessions")));
            eventually("all sessions are shown", || read_metrics(&address).contains("ipc_sessions 100"));
        }
        let resident = Resident::of(&server);
        drop(sessions);
        (resident.rest, resident.executable)
    });
    let [(rest, code), (rest_off, code_off)] = rest_and_code;
    eprintln!("with metrics {rest} and {code} bytes, without {rest_off} and {code_off}");
    assert!(rest <= rest_off + 192 * KIB, "{rest} bytes with metrics, {rest_off} without");
    if !cfg!(debug_assertions) {
        // 296 KiB on 2026-11-26: each function and each text brings a piece of 8 KiB, and they lie apart.
        assert!(code <= code_off + 384 * KIB, "{code} bytes with metrics, {code_off} without");
    }
}

/// Where a server says that it tells its metrics, if it does.
fn metrics_address(server: &ServerProcess) -> Option<String> {
    let log = server.log();
    let line = log.lines().find(|line| line.contains("serving metrics"))?;
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    Some(line["address"].as_str().unwrap().to_owned())
}

fn read_metrics(address: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    std::io::read_to_string(stream).unwrap()
}

/// Goal:   R5.3, R4.6: a server with 1000 connections that all call stays within 3 MiB, shared memory included, while its
///         metrics are read.
/// Method: one session with 1000 connections of 1 KiB, a thousand calls in flight at once, and a reader after each round; its
///         account and the pages of the segment. What a build that is not optimised has more of is left out.
#[test]
fn r5_3_r4_6_a_thousand_connections_and_their_metrics_stay_within_three_mib() {
    const CONNECTIONS: usize = 1000;
    let directory = common::TestDir::new();
    let config = directory.join("on.toml");
    std::fs::write(&config, "[metrics]\nlisten = \"127.0.0.1:0\"\n").unwrap();
    let server = ServerProcess::start(&["--config", config.to_str().unwrap()]);
    let address = metrics_address(&server).unwrap();
    let load = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::for_load(CONNECTIONS as u32, 1024) };
    let client = IpcClient::connect_with(server.path(), &load).unwrap();
    let connections: Vec<_> = (0..CONNECTIONS).map(|_| client.open().unwrap()).collect();
    for round in 0..10u8 {
        for connection in &connections {
            connection.submit(MessageType::ECHO, &[round; 1024], &CallOptions::default()).unwrap();
        }
        let mut left = CONNECTIONS;
        while left > 0 {
            client.wait(None).unwrap();
            while let Some(answer) = client.poll().unwrap() {
                assert!(answer.is_ok());
                left -= 1;
            }
        }
        assert!(read_metrics(&address).contains("ipc_connections 1000"));
    }
    let (resident, shared) = (Resident::of(&server), client.shared_bytes().unwrap());
    let Resident { executable, rings, segments, rest, .. } = resident;
    let optimised = !cfg!(debug_assertions);
    let of_the_build = if optimised { executable } else { 0 };
    let footprint = of_the_build + rings + rest + shared.max(segments);
    eprintln!("{footprint} bytes: {resident:?}, {shared} shared");
    assert!(footprint <= 3 * 1024 * KIB + if optimised { 0 } else { 768 * KIB }, "{footprint}: {resident:?}");
}

/// Goal:   R5.3: a further session with one lane costs the server at most 2 KiB beside its two shared pages. R5.4:
///         what it cost is given back once it has gone.
/// Method: one reactor, which sleeps, then one which polls for ever; the 500 sessions after the first hundred are
///         compared with these, and the server at rest after all of them with the server that had none but one.
#[test]
fn r5_3_r5_4_a_session_costs_little_and_nothing_once_it_has_gone() {
    const MORE: u64 = 500;
    doorbell::config::raise_file_limit(2048).unwrap();
    for policy in ["block", "spin"] {
        let server = ServerProcess::start(&["--reactors", "1", "--policy", policy]);
        let first = connect(&server, 1);
        let start = Resident::of(&server);
        let some = connect(&server, 99);
        let before = Resident::of(&server);
        let more = connect(&server, MORE as usize);
        let after = Resident::of(&server);
        let each = (after.rest - before.rest) / MORE;
        assert!((64..=2 * KIB).contains(&each), "{each} bytes a session: {before:?}, then {after:?}");
        assert_eq!(after.rings, start.rings);
        drop((some, more));
        eventually("the sessions have ended", || server.process.segments() == 1);
        eventually("their memory is given back", || Resident::of(&server).rest <= start.rest + 256 * KIB);
        drop(first);
    }
}

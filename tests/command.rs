//! The `doorbell` command: serve, call, bench, as a user meets them.

mod common;

use common::process::{Process, ServerProcess, doorbell, run, stderr};
use common::{TestDir, eventually};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

/// One AIRequest a line, as the TypeScript side writes them.
const VECTORS: &str = include_str!("data/airequest_vectors.jsonl");

fn call(server: &ServerProcess, arguments: &[&str]) -> Output {
    let mut all = vec!["call", "--socket", server.path().to_str().unwrap()];
    all.extend(arguments);
    run(&all)
}

/// The same with `input` on standard input.
fn call_with_input(server: &ServerProcess, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = doorbell();
    command.args(["call", "--socket", server.path().to_str().unwrap()]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

fn file(directory: &TestDir, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// Fails with this status, prints nothing on stdout, and says all of `words`.
fn fails(output: &Output, status: i32, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(said.contains(word), "`{word}` in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

/// Goal:   a real request comes back as it went, byte for byte: nothing is parsed and written anew on the
///         way (R2.3; key order, big integers, duplicate keys, lone surrogates).
/// Method: every line of the vectors as a file, and as standard input.
#[test]
fn r2_3_trap16_every_vector_comes_back_byte_for_byte() {
    let server = ServerProcess::start(&[]);
    let directory = TestDir::new();
    assert!(VECTORS.lines().count() >= 20);
    for (i, line) in VECTORS.lines().enumerate() {
        let path = file(&directory, &format!("{i}.json"), line.as_bytes());
        let output = call(&server, &["--type", "echo", "--json", path.to_str().unwrap()]);
        assert!(output.status.success(), "line {i}: {}", stderr(&output));
        assert_eq!(output.stdout, format!("{line}\n").as_bytes(), "line {i}");
        assert!(output.stderr.is_empty(), "line {i}: {}", stderr(&output));
        let output = call_with_input(&server, &["--json", "-"], format!("\n {line}\n\n").as_bytes());
        assert_eq!(output.stdout, format!("{line}\n").as_bytes(), "line {i} by standard input");
    }
}

/// Goal:   the other built-in types answer.
/// Method: ping, by name and by number, prints an empty line; stats prints JSON whose counters agree with
///         what was called.
#[test]
fn r1_4_ping_and_stats_answer_on_the_command_line() {
    let server = ServerProcess::start(&[]);
    for message_type in ["ping", "1"] {
        let output = call(&server, &["--type", message_type]);
        assert!(output.status.success() && output.stdout == b"\n", "{}", stderr(&output));
    }
    let output = call(&server, &["--type", "stats"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let stats: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(stats["calls_ok"], 2);
    assert_eq!(stats["sessions_opened"], 3);
    assert_eq!(stats["connections_open"], 1);
    assert_eq!(stats["sweeps_healed"], 0);
    assert!(stats.as_object().unwrap().values().all(serde_json::Value::is_u64));
}

/// Goal:   what the server answers with an error is an error of the command, with the reason.
/// Method: a type without a handler, by name and by number; the server goes on.
#[test]
fn r1_4_an_unknown_type_is_an_error_that_names_it() {
    let server = ServerProcess::start(&[]);
    for (message_type, named) in [("999", "type 999"), ("19", "type 19"), ("4294967295", "4294967295")] {
        let output = call(&server, &["--type", message_type]);
        fails(&output, 1, &["no handler for message", named]);
    }
    assert!(call(&server, &["--type", "ping"]).status.success());
}

/// Goal:   a wrong question is told from a wrong answer: exit status 2, with what would be right.
/// Method: type names, policies, flags, numbers and commands that do not exist.
#[test]
fn r3_1_a_wrong_command_line_is_refused_with_status_2() {
    for (arguments, words) in [
        (&["call", "--type", "ecko"][..], &["`ecko` is no message type", "echo"][..]),
        (&["call", "--type=-1"], &["`-1` is no message type"]),
        (&["call", "--type", "4294967296"], &["is no message type"]),
        (&["call", "--timeout-ms", "soon"], &["--timeout-ms"]),
        (&["call", "--no-such-flag"], &["--no-such-flag"]),
        (&["serve", "--policy", "sleepy"], &["`sleepy` is unknown", "handoff, spin or block"]),
        (&["serve", "--reactors=-1"], &["--reactors"]),
        (&["serve", "--cores", "0,x"], &["--cores", "'x'"]),
        (&["serve", "--max-connections", "many"], &["--max-connections"]),
        (&["serve", "--no-such-flag"], &["--no-such-flag"]),
        (&["bench", "--policy", "sleepy"], &["--policy", "handoff", "spin", "block"]),
        (&["bench", "--no-such-flag"], &["--no-such-flag"]),
        (&["no-such-command"], &["no-such-command"]),
        (&[], &["serve", "call", "bench"]),
    ] {
        fails(&run(arguments), 2, words);
    }
}

/// Goal:   a body that is not one JSON value is refused before anything is sent, saying where.
/// Method: truncated, doubled, empty, not UTF-8, missing; no server is needed to be told so.
#[test]
fn r3_1_a_body_that_is_not_one_json_value_is_refused_by_name() {
    let directory = TestDir::new();
    let socket = directory.join("nobody-listens");
    for (name, content) in [
        ("truncated", &b"{\"messages\":["[..]),
        ("doubled", b"{\"a\":1}\n{\"a\":2}"),
        ("empty", b""),
        ("blank", b" \n"),
        ("not-utf8", b"\"\xff\xfe\""),
        ("words", b"hello"),
    ] {
        let path = file(&directory, name, content);
        let path = path.to_str().unwrap();
        let output = run(&["call", "--socket", socket.to_str().unwrap(), "--json", path]);
        fails(&output, 1, &[path, "does not hold one JSON value", "line "]);
    }
    let missing = directory.join("missing");
    let missing = missing.to_str().unwrap();
    fails(&run(&["call", "--json", missing]), 1, &["cannot open", missing, "No such file"]);
    let directory = directory.0.to_str().unwrap();
    fails(&run(&["call", "--json", directory]), 1, &["cannot read", directory]);
    let server = ServerProcess::start(&[]);
    let output = call_with_input(&server, &["--json", "-"], b"");
    fails(&output, 1, &["standard input does not hold one JSON value"]);
}

/// Goal:   a body above the limit is refused with the limit; the longest one goes through (R1.5).
/// Method: JSON strings of 16384 and 16385 bytes.
#[test]
fn r1_5_a_body_above_the_limit_is_refused_by_number() {
    let server = ServerProcess::start(&[]);
    let text = |len: usize| format!("\"{}\"", "x".repeat(len - 2));
    for len in [16384, 16385, 10 << 20] {
        let output = call_with_input(&server, &["--json", "-"], text(len).as_bytes());
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(output.stdout == format!("{}\n", text(len)).as_bytes());
    }
    let output = call_with_input(&server, &["--json", "-"], text((10 << 20) + 1).as_bytes());
    fails(&output, 1, &["longer than the limit of 10485760 bytes"]);
}

/// Goal:   each way in which a server cannot be had is told apart, with what to do.
/// Method: nobody there, a second server, a path too long, a directory that is missing or anybody's.
#[test]
fn r3_1_f53_a_server_that_cannot_be_had_is_an_error_that_says_what_to_do() {
    let directory = TestDir::new();
    let missing = directory.join("missing/s");
    let nobody = directory.join("nobody");
    let nobody = nobody.to_str().unwrap();
    fails(&run(&["call", "--socket", nobody]), 1, &["no server listens at", nobody, "doorbell serve"]);
    let server = ServerProcess::start(&[]);
    let path = server.path().to_str().unwrap();
    fails(&run(&["serve", "--socket", path]), 1, &["already running at", path, "--socket"]);
    let long = format!("{}/{}", directory.0.display(), "s".repeat(108));
    for command in ["serve", "call"] {
        fails(&run(&[command, "--socket", &long]), 1, &["a unix socket address holds 107", "shorter"]);
    }
    fails(
        &run(&["serve", "--socket", missing.to_str().unwrap()]),
        1,
        &["directory does not exist", "create"],
    );
    assert!(call(&server, &["--type", "ping"]).status.success(), "the first server goes on");
}

/// Goal:   a limit out of its range is refused by name and range, before anything is bound.
/// Method: zero and too many of each.
#[test]
fn r1_8_a_limit_out_of_range_is_refused_by_name() {
    let directory = TestDir::new();
    let socket = directory.join("s");
    let socket = socket.to_str().unwrap();
    for (option, value, words) in [
        ("--max-connections", "0", &["max_connections is 0", "1 to 1048576"][..]),
        ("--max-connections", "1048577", &["max_connections is 1048577"]),
        ("--max-sessions", "0", &["max_sessions is 0"]),
        ("--max-sessions", "1048577", &["max_sessions is 1048577"]),
        ("--max-sessions-per-process", "0", &["max_sessions_per_process is 0", "1 to 1048576"]),
        ("--cores", "0,100000", &["core 100000 may not be used", "taskset"]),
        ("--reactors", "1025", &["reactors is 1025", "0 to 1024"]),
    ] {
        fails(&run(&["serve", "--socket", socket, option, value]), 1, words);
        assert!(!Path::new(socket).exists(), "{option} {value}");
    }
}

/// Goal:   the limits given to `serve` are the ones in force.
/// Method: one connection, one session: the second of either is refused by the command's own words.
#[test]
fn r1_8_f29_the_limits_given_to_serve_hold() {
    let server = ServerProcess::start(&["--max-connections", "1", "--max-sessions", "2"]);
    let first = doorbell::IpcClient::connect(server.path()).unwrap();
    let held = first.open().unwrap();
    fails(&call(&server, &["--type", "ping"]), 1, &["limit of 1 connections is reached"]);
    let mut second = None;
    // The command's session ends a moment after the command.
    eventually("a second session", || {
        second = doorbell::IpcClient::connect(server.path()).ok();
        second.is_some()
    });
    fails(&call(&server, &["--type", "ping"]), 1, &["limit of 2 sessions is reached"]);
    drop((held, second));
}

/// Goal:   an answer that cannot be written is an error and no panic (F41: SIGPIPE kills nobody).
/// Method: standard output is a full device, and a pipe that nobody reads.
#[test]
fn f41_an_answer_that_cannot_be_written_is_an_error() {
    let server = ServerProcess::start(&[]);
    let socket = server.path().to_str().unwrap();
    for arguments in
        [&["call", "--type", "stats", "--socket", socket][..], &["config", "default"], &["config", "check"]]
    {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = doorbell();
        command.args(arguments).stdout(full).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        fails(&output, 1, &["doorbell:", "No space left"]);
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = doorbell();
    command.args(["call", "--type", "stats", "--socket", socket]);
    let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    fails(&output, 1, &["doorbell:", "Broken pipe"]);
}

/// Goal:   a server that hangs does not hang the command.
/// Method: a stopped server; the command gives up by its own time-out, saying so.
#[test]
fn r3_1_a_server_that_does_not_answer_is_given_up() {
    let server = ServerProcess::start(&[]);
    server.process.stop();
    let output = call(&server, &["--type", "ping", "--timeout-ms", "100"]);
    fails(&output, 1, &["did not answer the handshake within 100ms"]);
    server.process.signal(rustix::process::Signal::CONT);
    eventually("it answers again", || call(&server, &["--type", "ping"]).status.success());
}

/// Goal:   every option is in the help, with its default.
/// Method: the help of each command.
#[test]
fn r3_1_help_mentions_every_option_and_its_default() {
    for (command, options) in [
        (
            "serve",
            &[
                "--socket <PATH>",
                "--policy <POLICY>",
                "[default: handoff]",
                "--max-connections <N>",
                "[default: 1000]",
                "--max-sessions <N>",
                "--max-sessions-per-process <N>",
                "[default: --max-sessions]",
                "--reactors <N>",
                "--cores <CPUS>",
                "--unpinned",
                "--verbose",
                "$XDG_RUNTIME_DIR",
            ][..],
        ),
        (
            "call",
            &["--type <TYPE>", "[default: echo]", "--json <FILE>", "--socket <PATH>", "--timeout-ms <MS>"],
        ),
        (
            "bench",
            &[
                "--connections <N>",
                "--sessions <M>",
                "--processes <P>",
                "--in-flight <K>",
                "--size <BYTES>",
                "[default: 64]",
                "--think-us <T>",
                "--rate <R>",
                "--seconds <S>",
                "--policy <POLICY>",
                "handoff",
                "--peer <PEER>",
                "uds",
                "floor",
                "--placement <PLACEMENT>",
                "unpinned",
                "--reactors <R>",
                "[default: 0 with",
                "--hogs",
                "--probe <BYTES>",
                "--think-random",
                "--seed <N>",
                "--idle",
                "--connect-only",
                "--half-open <N>",
                "--socket <PATH>",
                "--json",
            ],
        ),
    ] {
        let output = run(&[command, "--help"]);
        assert!(output.status.success());
        let help = String::from_utf8(output.stdout).unwrap();
        for option in options {
            assert!(help.contains(option), "`{option}` in the help of {command}:\n{help}");
        }
    }
    let output = run(&["--version"]);
    assert_eq!(output.stdout, format!("doorbell {}\n", env!("CARGO_PKG_VERSION")).as_bytes());
}

/// Goal:   options of `bench` that mean nothing together are refused by name, never ignored: a wrong question,
///         exit status 2.
/// Method: each of them; nothing runs, so this is quick.
#[test]
fn bench_refuses_what_it_does_not_honour() {
    for (arguments, name) in [
        (&["--size", "10485761"][..], "--size"),
        (&["--size", "16385", "--rate", "10"], "--rate"),
        (&["--probe", "16385"], "--probe"),
        (&["--probe-process"], "--probe-process"),
        (&["--peer", "uds", "--policy", "handoff"], "--policy"),
        (&["--peer", "uds", "--probe", "64"], "--probe"),
        (&["--peer", "uds", "--reactors", "2"], "--reactors"),
        (&["--peer", "floor", "--idle"], "--idle"),
        (&["--think-random"], "--think-random"),
        (&["--seed", "1"], "--seed"),
        (&["--hogs", "--connect-only"], "--hogs"),
        (&["--half-open", "200"], "--half-open"),
        (&["--sessions", "2"], "--sessions"),
        (&["--in-flight", "0"], "--in-flight"),
        (&["--seconds", "0"], "--seconds"),
    ] {
        let output = run(&[&["bench"], arguments].concat());
        fails(&output, 2, &[name]);
    }
}

/// The keys of `bench --json`, in their order.
const BENCH_KEYS: &str = "peer, policy, placement, connections, sessions, processes, reactors, size, in_flight, \
    think_us, rate, seconds, requests, errors, per_second, p50_ns, p90_ns, p99_ns, p999_ns, max_ns, \
    in_flight_mean, server_cpu_percent, client_cpu_percent, machine_cores, server_cpu_ns_per_request, \
    server_wakeups, server_sweeps, server_syscalls, server_rss_bytes, shared_bytes, footprint_bytes, \
    footprint_idle_bytes, connect_last_ms, hiccup_max_ns, floor_p50_ns, floor_p99_ns, floor_per_second, \
    floor_p999_ns, floor_max_ns, idle, hogs, think_random, seed, probe_size, probe_requests, probe_p50_ns, \
    probe_p99_ns, probe_p999_ns, probe_max_ns, probe_errors, probe_alone_p50_ns, probe_alone_p99_ns, \
    probe_process, memory_budget_bytes, footprint_after_bytes, frames, half_open";

/// Runs `bench --json` with a short window; the text it prints and its value.
fn bench(arguments: &[&str]) -> (String, serde_json::Value) {
    bench_for("0.2", arguments)
}

/// The same with a window of so many seconds.
fn bench_for(seconds: &str, arguments: &[&str]) -> (String, serde_json::Value) {
    let output = run(&[&["bench", "--json", "--seconds", seconds], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).expect("one JSON value and nothing else");
    assert_eq!(value["errors"], 0, "{arguments:?}");
    (text, value)
}

/// Goal:   `bench --json` prints one JSON object with the keys of the interface, in their order, and counts
///         no errors.
/// Method: a short run of each policy; keys are read from the text, numbers from the value.
#[test]
fn bench_json_prints_one_object_with_the_keys_of_the_interface() {
    const FLAGS: [&str; 4] = ["idle", "hogs", "think_random", "probe_process"];
    let expected: Vec<&str> = BENCH_KEYS.split(", ").map(str::trim).collect();
    for policy in ["handoff", "spin", "block"] {
        let (text, value) = bench(&["--size", "64", "--policy", policy]);
        let object = value.as_object().unwrap();
        // No value of this object holds a quote or a colon, so keys are what stands before `":`.
        let keys: Vec<&str> =
            text.split("\":").filter_map(|part| part.rsplit_once('"')).map(|(_, key)| key).collect();
        assert_eq!(keys, expected);
        for (i, key) in expected.iter().enumerate() {
            let value = &object[*key];
            let right = match i {
                0..3 => value.is_string(),
                _ if FLAGS.contains(key) => *value == false,
                _ => value.is_number() || value.is_null(),
            };
            assert!(right, "{key}: {value}");
        }
        assert_eq!(value["policy"], policy);
        assert!(value["requests"].as_u64().unwrap() > 0 && value["p50_ns"].as_u64().unwrap() > 0);
        assert!(["rate", "seed", "probe_size", "probe_requests"].iter().all(|key| value[*key].is_null()));
        let reactors = value["reactors"].as_u64().unwrap();
        assert!(if policy == "handoff" { reactors >= 1 } else { reactors == 1 }, "{policy}: {reactors}");
    }
}

/// Goal:   think time and rate are kept with every policy, by both peers that can be paced.
/// Method: a pause of 5 ms and 5000 requests a second where tens of thousands would be possible; random pauses
///         report their seed.
#[test]
fn bench_keeps_its_pace_with_every_policy() {
    for (peer, policy) in [
        ("doorbell", "handoff"),
        ("doorbell", "spin"),
        ("doorbell", "block"),
        ("uds", "spin"),
        ("uds", "block"),
    ] {
        for (pace, expected) in
            [(&["--think-us", "5000"][..], 40), (&["--rate", "5000", "--in-flight", "16"], 1000)]
        {
            let (_, value) = bench(&[&["--peer", peer, "--policy", policy], pace].concat());
            let requests = value["requests"].as_u64().unwrap();
            // Neighbours may slow it down, and a backlog may be made up for.
            assert!(
                (expected / 20..=2 * expected).contains(&requests),
                "{peer} {policy} {pace:?}: {requests}"
            );
            assert_eq!((&value["think_random"], &value["seed"]), (&false.into(), &serde_json::Value::Null));
        }
    }
    let (_, given) = bench(&["--think-us", "5000", "--think-random", "--seed", "3"]);
    assert_eq!((&given["think_random"], &given["seed"]), (&true.into(), &3.into()));
    assert!((2..=100).contains(&given["requests"].as_u64().unwrap()), "{given}");
    let (_, drawn) = bench(&["--think-us", "5000", "--think-random"]);
    assert!(drawn["seed"].is_u64(), "a seed that was not given is reported, so that it can be given");
}

/// Goal:   idling is connecting everything and sending nothing: no requests, the server's figures, and nobody
///         lost.
/// Method: sessions of one process and of two, with each policy, and the other peer that can idle.
#[test]
fn bench_idle_sends_nothing_and_reports_what_idling_costs() {
    let many = ["--connections", "20", "--sessions", "10", "--processes", "2"];
    for (peer, policy) in
        [("doorbell", "handoff"), ("doorbell", "spin"), ("doorbell", "block"), ("uds", "block")]
    {
        let (_, value) = bench(&[&["--idle", "--peer", peer, "--policy", policy], &many[..]].concat());
        assert_eq!((&value["idle"], &value["requests"]), (&true.into(), &0.into()));
        for key in ["per_second", "p50_ns", "max_ns", "in_flight_mean", "client_cpu_percent", "floor_p50_ns"]
        {
            assert!(value[key].is_null(), "{key}");
        }
        assert!(value["server_wakeups"].is_u64() && value["server_cpu_percent"].is_f64(), "{value}");
        assert_eq!(value["server_sweeps"].is_u64(), peer == "doorbell");
    }
}

/// The same with longer and longer windows, until `key` is above 0: a short one may find no time for a long body on a
/// busy machine.
fn bench_until(key: &str, arguments: &str) -> serde_json::Value {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let windows = ["0.2", "2", "20"].into_iter();
    let mut values = windows.map(|seconds| bench_for(seconds, &arguments).1);
    // The floor has its own window, in which nothing may have ended either.
    let full = |value: &serde_json::Value| value[key].as_u64() > Some(0) && !value["floor_p50_ns"].is_null();
    values.find(full).expect(key)
}

/// Goal:   bodies beyond a frame are carried and checked by every peer, with every policy, over several connections,
///         sessions and processes; what they take is reported.
/// Method: a length that is no multiple of a word, and the longest.
#[test]
fn r1_5_bench_carries_long_bodies() {
    let many = "--connections 4 --sessions 2 --processes 2";
    for (peer, policy, size, load) in [
        ("doorbell", "spin", 10_485_760, ""),
        ("doorbell", "block", 100_003, many),
        ("doorbell", "handoff", 16_385, "--connections 3 --in-flight 2"),
        ("uds", "block", 100_003, many),
        ("uds", "spin", 10_485_760, ""),
        ("floor", "spin", 100_003, "--connections 3"),
    ] {
        let options = format!("--peer {peer} --policy {policy} --size {size} {load}");
        let value = bench_until("requests", &options);
        assert!(value["frames"].as_u64() >= value["requests"].as_u64(), "{value}");
        assert!(value["floor_p50_ns"].is_u64() && value["p50_ns"].is_u64(), "{value}");
        assert_eq!(value["memory_budget_bytes"].is_u64(), peer == "doorbell");
        assert_eq!(value["footprint_after_bytes"].is_u64(), peer != "floor");
    }
    let (_, value) = bench(&["--size", "1048576", "--connect-only", "--connections", "3", "--sessions", "3"]);
    assert!(value["connect_last_ms"].is_f64() && value["frames"].is_null() && value["requests"] == 0);
}

/// Goal:   `bench-stream` measures each of its questions with real processes, every chunk in order, and counts no errors.
/// Method: a short run of each, with the policies that make a difference; wrong options say which.
#[test]
fn bench_stream_answers_each_of_its_questions() {
    for (line, key) in [
        ("latency --policy handoff --rate 500", "floor_p50_ns"),
        ("latency --policy spin --rate 500", "delay_p50_ns"),
        ("throughput --policy spin --same-core", "chunks_per_s"),
        ("many --policy handoff --streams 6 --sessions 2 --rate 100 --unpinned", "footprint_bytes"),
        ("cancel --policy block", "cancel_to_end_p99_ns"),
    ] {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let output = run(&[&["bench-stream", "--json", "--seconds", "0.2"], &arguments[..]].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{line}: {text}{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["errors"], 0, "{line}: {text}");
        assert!(report["chunks"].as_u64() > Some(0) && report[key].is_number(), "{line}: {key} of {text}");
    }
    for (line, named) in [
        ("many --size 4", "size"),
        ("many --streams 1 --sessions 2", "sessions"),
        ("latency --rate 0", "rate"),
        ("sideways", "throughput"),
    ] {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let output = run(&[&["bench-stream"], &arguments[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{line}: {}", stderr(&output));
        assert!(stderr(&output).contains(named), "{line}: {}", stderr(&output));
    }
}

/// Goal:   the probe is measured beside long bodies, and alone before them, in the load's process and in its own.
#[test]
fn bench_probe_measures_one_interactive_call_beside_long_bodies() {
    for (policy, probe, load) in [
        ("spin", "1024", "--connections 5"),
        ("block", "16384", "--connections 2 --sessions 2 --processes 2"),
        ("handoff", "64", "--connections 5 --probe-process"),
    ] {
        let options = format!("--size 100000 --policy {policy} --probe {probe} {load}");
        let value = bench_until("probe_requests", &options);
        assert_eq!(value["probe_errors"], 0, "{value}");
        assert_eq!(value["probe_process"], load.contains("--probe-process"));
        assert!(value["probe_alone_p99_ns"].is_u64() && value["probe_p99_ns"].is_u64(), "{value}");
    }
}

/// Goal:   the probe runs beside the load, is checked, and has figures of its own.
/// Method: probes smaller and larger than the load's calls, with each policy, and over several sessions.
#[test]
fn bench_probe_measures_one_interactive_call_beside_a_bulk_load() {
    for (policy, size, probe, load) in [
        ("spin", "4096", "1024", &["--connections", "50"][..]),
        ("spin", "64", "16384", &["--connections", "4", "--sessions", "2", "--in-flight", "3"]),
        ("block", "1000", "7", &["--connections", "3", "--processes", "1"]),
        ("handoff", "64", "64", &["--connections", "4", "--sessions", "2", "--processes", "2"]),
        ("spin", "64", "64", &["--rate", "1000"]),
    ] {
        let options = [&["--policy", policy, "--size", size, "--probe", probe], load].concat();
        let (_, value) = bench(&options);
        assert!(value["requests"].as_u64().unwrap() > 0, "{options:?}");
        assert!(value["probe_requests"].as_u64().unwrap() > 0, "{options:?}");
        assert_eq!((&value["probe_errors"], value["probe_size"].to_string()), (&0.into(), probe.to_owned()));
        let quantiles = ["probe_p50_ns", "probe_p99_ns", "probe_p999_ns", "probe_max_ns"];
        assert!(quantiles.map(|key| value[key].as_u64().expect(key)).is_sorted(), "{options:?}");
    }
}

/// Goal:   with --hogs every allowed core is kept busy while the load runs, and afterwards none is.
/// Method: the children of a running bench; each hog on a core of its own; none when it has ended.
#[test]
fn bench_hogs_keep_every_core_busy_and_end_with_the_run() {
    let directory = TestDir::new();
    let marker = directory.0.to_str().unwrap();
    let mut command = doorbell();
    command.args(["bench", "--json", "--hogs", "--seconds", "600", "--policy", "block"]);
    command.env("TMPDIR", marker).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = Process(command.spawn().unwrap());
    let allowed = cores_allowed("self").len();
    eventually("a hog burns on every core", || {
        let hogs = children(bench.0.id(), "hog");
        let cores: Vec<Vec<usize>> = hogs.iter().map(|pid| cores_allowed(pid)).collect();
        let distinct: std::collections::BTreeSet<_> = cores.iter().flatten().collect();
        hogs.len() == allowed && cores.iter().all(|c| c.len() == 1) && distinct.len() == allowed
    });
    bench.kill();
    eventually("none burns on", || started_with(marker) == 0);
}

/// Goal:   nothing that `bench` does keeps the server from the cores of its reactors.
/// Method: every thread of a running server: together they may use every core, whatever the client's pinning.
#[test]
fn bench_handoff_leaves_every_core_to_the_reactors() {
    let mut bench = Process(
        doorbell()
            .args(["bench", "--policy", "handoff", "--placement", "unpinned", "--seconds", "600"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let allowed = cores_allowed("self");
    eventually("the client runs wherever it likes, the server on every core it asked for", || {
        let clients = children(bench.0.id(), "client");
        let servers = children(bench.0.id(), "doorbell-server");
        let reactors = servers.iter().flat_map(|pid| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split('\0').filter(|word| word.starts_with('{')).map(str::to_owned).collect::<Vec<_>>()
        });
        let asked = format!("\"reactors\":{},\"cores\":{allowed:?},\"pinned\":true", allowed.len());
        let asked = asked.replace(' ', "");
        clients.iter().any(|pid| cores_allowed(pid) == allowed)
            && reactors.into_iter().any(|job| job.contains(&asked))
    });
    bench.kill();
}

/// Children of a process that are of a role of the benchmark.
fn children(of: u32, role: &str) -> Vec<String> {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let is = |pid: &&str| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split('\0').any(|word| word == role)
    };
    children.split_whitespace().filter(is).map(str::to_owned).collect()
}

/// The cores that a process's first thread may use.
fn cores_allowed(pid: &str) -> Vec<usize> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        from.parse::<usize>().unwrap()..=to.parse::<usize>().unwrap()
    };
    list.trim().split(',').filter(|part| !part.is_empty()).flat_map(range).collect()
}

/// Goal:   a bench run leaves no process, no socket and no file behind (trap 13), even when it is killed.
/// Method: a bench in a private temporary and runtime directory, killed once its server serves; the
///         processes that it started end by themselves.
#[test]
fn trap13_a_killed_bench_leaves_no_process_behind() {
    let directory = TestDir::new();
    let marker = directory.0.to_str().unwrap();
    let mut command = doorbell();
    command.args(["bench", "--seconds", "600"]).env("TMPDIR", marker).env("XDG_RUNTIME_DIR", marker);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = Process(command.spawn().unwrap());
    eventually("it has started others", || started_with(marker) >= 2);
    bench.kill();
    eventually("all of them have ended", || started_with(marker) == 0);
}

/// Processes whose environment holds `marker`.
fn started_with(marker: &str) -> usize {
    let ours = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let of = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        if name == ours || !name.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        // A process that has ended has no environment any more.
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        environment.windows(marker.len()).any(|w| w == marker.as_bytes()).then_some(())
    };
    processes.filter_map(of).count()
}

/// Goal:   trap 22, 23: what is measured crosses processes, and the floor beside it is measured, not typed in.
/// Method: while a bench runs, it has children of both roles; its report has a floor of its own, which differs
///         from another run's in at least one figure.
#[test]
fn trap22_trap23_bench_measures_between_processes_and_measures_its_floor() {
    let arguments = ["bench", "--json", "--seconds", "0.5", "--size", "64"];
    let mut bench = doorbell().args(arguments).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut roles = std::collections::BTreeSet::new();
    eventually("a server and a client process have been seen", || {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", bench.id())).unwrap();
        for child in children.split_whitespace() {
            let line = std::fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
            roles.extend(
                line.split('\0')
                    .filter(|word| ["doorbell-server", "client"].contains(word))
                    .map(str::to_owned),
            );
        }
        roles.len() == 2 || bench.try_wait().unwrap().is_some()
    });
    assert_eq!(roles.len(), 2, "{roles:?}");
    let output = bench.wait_with_output().unwrap();
    let other = run(&arguments);
    let floor = |stdout: &[u8]| {
        let report: serde_json::Value = serde_json::from_slice(stdout).unwrap();
        ["floor_p50_ns", "floor_p99_ns", "floor_per_second"].map(|key| report[key].as_f64().expect(key))
    };
    assert_ne!(floor(&output.stdout), floor(&other.stdout));
}

/// Goal:   the demonstration runs, everything in it holds, and its ledger balances (F50, R3.4, R3.5).
/// Method: a small one; the sum of the ledger's line is computed again. A wrong length is refused.
#[test]
fn r3_4_f50_the_demonstration_ends_in_a_ledger_that_balances() {
    let output = run(&["demo", "--processes", "3", "--seconds", "0.6"]);
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(output.status.success(), "{said}{}", stderr(&output));
    assert!(said.ends_with("Everything held.\n"), "{said}");
    let line = said.lines().find(|line| line.starts_with("in flight")).unwrap_or_else(|| panic!("{said}"));
    let numbers: Vec<u64> =
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let [in_flight, answered, resent, unknown, wrong, doubled] = numbers[..] else { panic!("{line}") };
    assert!(in_flight == answered + resent + unknown && in_flight > 0, "{line}");
    assert_eq!((wrong, doubled), (0, 0), "{line}");
    fails(&run(&["demo", "--seconds", "0"]), 2, &["0.5 to 60"]);
}

/// Goal:   completions and man pages are made of the command line as it is.
/// Method: every shell; a page of each command.
#[test]
fn completions_and_man_pages_are_made() {
    for shell in ["bash", "elvish", "fish", "zsh"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("store-socket"), "{shell}");
    }
    let directory = TestDir::new();
    let output = run(&["man", directory.0.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let page = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    assert!(page("doorbell.1").contains("doorbell\\-serve(1)"));
    assert!(page("doorbell-serve.1").contains("idle") || page("doorbell-serve.1").contains("\\-\\-config"));
    fails(&run(&["man", "/nowhere"]), 1, &["No such file"]);
}

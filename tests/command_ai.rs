//! The commands that ask models: chat, complete, analyze; and the server's configuration file (R2.6, R2.10, R4.1).

mod common;

use common::process::{Process, ServerProcess, doorbell, run, stderr};
use common::{TestDir, all_memory, eventually, stat};
use doorbell::IpcClient;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Output, Stdio};

fn ask(server: &ServerProcess, command: &str, arguments: &[&str]) -> Output {
    let mut all = vec![command, "--socket", server.path().to_str().unwrap()];
    all.extend(arguments);
    run(&all)
}

fn started(server: &ServerProcess, arguments: &[&str], input: Option<&[u8]>) -> Child {
    let mut command = doorbell();
    command.args(arguments).args(["--socket", server.path().to_str().unwrap()]);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    if let Some(input) = input {
        child.stdin.take().unwrap().write_all(input).unwrap();
    }
    child
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Goal:   R2.10: the answer is on stdout, one line end behind it, and nothing on stderr; the prompt comes from arguments
///         or standard input.
#[test]
fn r2_10_chat_and_complete_print_the_answer() {
    let server = ServerProcess::start(&[]);
    for command in ["chat", "complete"] {
        let output = ask(&server, command, &["-m", "loopback-fast", "tell", "me"]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", stderr(&output));
        let said = text(&output.stdout);
        assert!(said.starts_with("loopback: ") && said.ends_with("tell me\n") && !said.ends_with("\n\n"));
        let child = started(&server, &[command, "-m", "loopback-fast"], Some("größe\n".as_bytes()));
        let output = child.wait_with_output().unwrap();
        assert!(text(&output.stdout).ends_with("größe\n"), "{}", stderr(&output));
    }
}

/// Goal:   R2.10, R1.9: a prompt longer than a slot is sent, and answered, where the server has no memory to lease.
/// Method: sessions that use up the budget, all but the room of the one that asks.
#[test]
fn r2_10_r1_9_a_long_prompt_is_answered_without_memory_to_lease() {
    let server = ServerProcess::start(&["--reactors", "1"]);
    let room = IpcClient::connect(server.path()).unwrap();
    let witness = IpcClient::connect(server.path()).unwrap();
    let witness = witness.open().unwrap();
    let _held = all_memory(server.path());
    let prompt = "long ".repeat(20_000);
    let sessions = stat(&witness, "sessions_open");
    drop(room);
    for command in ["chat", "complete"] {
        eventually("there is room for one more", || stat(&witness, "sessions_open") < sessions);
        let mut child = started(&server, &[command, "-m", "loopback-fast"], Some(prompt.as_bytes()));
        let (mut stdout, mut said) = (child.stdout.take().unwrap(), String::new());
        let mut stderr = child.stderr.take().unwrap();
        let reader = std::thread::spawn(move || stdout.read_to_string(&mut said).map(|_| said));
        let status = Process(child).wait();
        let (said, mut wrong) = (reader.join().unwrap().unwrap(), String::new());
        stderr.read_to_string(&mut wrong).unwrap();
        assert!(status.success() && said.contains("long long"), "{command}: {status} {said} {wrong}");
    }
}

/// Goal:   R2.5: `--json` prints the chunks, one a line, the end last.
#[test]
fn r2_5_json_prints_each_chunk() {
    let server = ServerProcess::start(&[]);
    let output = ask(&server, "chat", &["--json", "-m", "loopback-fast-reasoning", "x"]);
    let lines: Vec<serde_json::Value> =
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|chunk| chunk["type"] == "reasoning"));
    assert_eq!(lines.last().unwrap(), &serde_json::json!({ "type": "end", "finishReason": "stop" }));
}

/// Goal:   R2.6: Ctrl-C ends an answer in the middle: what has come stays, the exit status says so, and the server has
///         cancelled the call.
/// Method: an interrupt once the first line has come, of an answer that would take for ever, and of one that comes faster than it
///         is read.
#[test]
fn r2_6_an_interrupt_cancels_the_answer() {
    for model in ["loopback-pace-50-chunks-1000000", "loopback-fast-chunks-300000"] {
        let server = ServerProcess::start(&[]);
        let mut child = started(&server, &["chat", "--json", "-m", model, "x"], None);
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("loopback"), "{line}");
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        for line in stdout.lines().map(Result::unwrap) {
            assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok(), "{line}");
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{model}");
        let stats = || {
            let output = ask(&server, "call", &["--type", "stats"]);
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
        };
        eventually("the call has been cancelled", || stats()["calls_cancelled"] == 1);
        eventually("its ticket has been dropped", || {
            let stats = stats();
            (&stats["deferred_live"], &stats["deferred_detached"]) == (&0.into(), &0.into())
        });
    }
}

/// Goal:   every way to ask wrongly, or to get no answer, is one line that says what to do, and a status.
#[test]
fn r3_1_what_goes_wrong_is_said_in_one_line() {
    let server = ServerProcess::start(&[]);
    let empty = started(&server, &["chat"], Some(b" \n")).wait_with_output().unwrap();
    let binary = started(&server, &["chat"], Some(&[b'a', 0xff])).wait_with_output().unwrap();
    let table = [
        (empty, 1, "the prompt is empty"),
        (binary, 1, "byte 1 begins no character"),
        (ask(&server, "chat", &["-m", "loopback-unauthorized", "x"]), 1, "(unauthorized)"),
        (ask(&server, "chat", &["-m", "loopback-cut", "x"]), 1, "(interrupted)"),
        (ask(&server, "chat", &["--timeout-ms", "50", "-m", "loopback-hang", "x"]), 1, "the deadline passed"),
        (ask(&server, "chat", &["--temperature", "hot", "x"]), 2, "a number is wanted"),
        (ask(&server, "chat", &["--temprature", "1", "x"]), 2, "--temperature"),
        (ask(&server, "analyze", &["/does/not/exist"]), 1, "/does/not/exist"),
        (ask(&server, "analyze", &["--by-path", "Cargo.toml"]), 1, "root"),
        (run(&["chat", "--socket", "/does/not/exist", "x"]), 1, "doorbell serve"),
    ];
    for (output, status, part) in table {
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains(part), "`{part}` in: {said}");
        assert!(!said.contains("panicked") && (status == 2 || said.lines().count() == 1), "{said}");
    }
}

/// Goal:   R2.11: facts about a file, and an answer to a question, by content and by path.
#[test]
fn r2_11_analyze_prints_facts_and_an_answer() {
    let directory = TestDir::new();
    let path = directory.join("poem");
    std::fs::write(&path, "roses\nare red\n").unwrap();
    let (path, root) = (path.to_str().unwrap(), directory.0.to_str().unwrap());
    let server = ServerProcess::start(&["--root", root]);
    for by_path in [&[][..], &["--by-path"]] {
        let facts = ask(&server, "analyze", &[by_path, &[path]].concat());
        let said = text(&facts.stdout);
        assert!(said.starts_with("size           14\nlines          2\nencoding       ascii\n"), "{said}");
        let answered = ask(&server, "analyze", &[by_path, &[path, "what", "colour?"]].concat());
        let said = text(&answered.stdout);
        assert!(said.contains("\n\nloopback: ") && said.contains("what colour?"), "{said}");
        let json = ask(&server, "analyze", &[by_path, &["--json", path]].concat());
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap()["lines"], 2);
    }
}

/// Goal:   R4.3: a trace that is named on the command line is named in the log of the server where a provider fails, and no
///         prompt is; a wrong one is refused before anything is sent.
/// Method: a provider whose server is not there, asked by every command that asks; texts that are no traceparent.
#[cfg(feature = "openai")]
#[test]
fn r4_3_trap21_the_log_names_the_trace_of_a_call_that_fails() {
    let directory = TestDir::new();
    let config = directory.join("config.toml");
    // Bound and not listened at: nobody else gets the port, and nobody answers.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    drop(port);
    let provider = format!("base_url = \"http://{address}/v1\"\nretry = {{ retries = 0 }}\n");
    let text = format!(
        "[ai]\ndefault = \"gone\"\n\n[[ai.providers]]\nname = \"gone\"\nkind = \"openai\"\n{provider}"
    );
    std::fs::write(&config, text).unwrap();
    let server = ServerProcess::start(&["--config", config.to_str().unwrap()]);
    let trace = |number: u8| format!("00-{number:032x}-00f067aa0ba902b7-01");
    for (number, command) in [(1, "chat"), (2, "complete")] {
        let output =
            ask(&server, command, &["-m", "any", "--traceparent", &trace(number), "secret", "words"]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    }
    let request = directory.join("request.json");
    std::fs::write(&request, r#"{"messages":[{"role":"user","content":"secret"}],"model":"any"}"#).unwrap();
    let arguments = ["--type", "chat", "--json", request.to_str().unwrap(), "--traceparent", &trace(3)];
    assert_eq!(ask(&server, "call", &arguments).status.code(), Some(1));
    assert_eq!(ask(&server, "chat", &["-m", "any", "x"]).status.code(), Some(1));
    let lines = || -> Vec<serde_json::Value> {
        let log = server.log();
        assert!(!log.contains("secret"), "{log}");
        let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.filter(|line: &serde_json::Value| line["provider"] == "gone").collect()
    };
    eventually("the failures are in the log", || lines().len() == 4);
    let traces: Vec<_> = lines().iter().map(|line| line["traceparent"].clone()).collect();
    assert_eq!(traces, [trace(1).into(), trace(2).into(), trace(3).into(), serde_json::Value::Null]);
    let capital = trace(255).to_uppercase();
    for wrong in ["", "x", &trace(0), &capital, &format!("{} ", trace(1))] {
        let output = ask(&server, "chat", &["--traceparent", wrong, "x"]);
        let said = stderr(&output);
        assert!(output.status.code() == Some(2) && said.contains("traceparent"), "{wrong}: {said}");
    }
}

/// Goal:   R4.1: a file and the environment say what a server does; what is wrong with them is said before it starts;
///         `config default` prints a file that is good.
#[test]
fn r4_1_a_server_is_configured_by_a_file() {
    let directory = TestDir::new();
    let good = directory.join("good.toml");
    std::fs::write(&good, "[ipc]\nmax_connections = 1\n\n[ai]\ndefault = \"echo\"\n\n[[ai.providers]]\nname = \"echo\"\nloopback = { chunks_per_second = 0.0 }\n").unwrap();
    let server = ServerProcess::start(&["--config", good.to_str().unwrap()]);
    let output = ask(&server, "chat", &["-m", "any", "x"]);
    assert!(text(&output.stdout).starts_with("loopback: "), "{}", stderr(&output));

    let bad = directory.join("bad.toml");
    std::fs::write(&bad, "[ipc]\nmax_conections = 1\n").unwrap();
    let expected = format!(
        "{}:2:1: ipc.max_conections: there is no such key: is `max_connections` meant?",
        bad.display()
    );
    for arguments in [["serve", "--config"], ["config", "check"]] {
        let output = run(&[arguments[0], arguments[1], bad.to_str().unwrap()]);
        assert_eq!((output.status.code(), stderr(&output)), (Some(1), format!("doorbell: {expected}\n")));
    }
    let default = directory.join("default.toml");
    std::fs::write(&default, run(&["config", "default"]).stdout).unwrap();
    let checked = run(&["config", "check", default.to_str().unwrap()]);
    assert_eq!(text(&checked.stdout), format!("{}: good\n", default.display()));
    let mut command = doorbell();
    command.args(["config", "check"]).env("DOORBELL_IPC_POLICY", "poll");
    let output = command.output().unwrap();
    assert!(stderr(&output).contains("DOORBELL_IPC_POLICY"), "{}", stderr(&output));
}

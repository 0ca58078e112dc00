//! The command as its users run it, on a small scale. Nothing here looks at a time or a rate.

use serde_json::Value;
use std::process::{Command, Output};

fn stress(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_doorbell-stress")).args(line.split_whitespace()).output().unwrap()
}

/// Goal:   both rows of level 1 run with real processes, nothing is wrong or lost, everybody is alive, and
///         the exit status says so.
/// Method: 50 connections for 0.2 s, the JSON object read back.
#[test]
fn level_1_passes_on_a_small_scale() {
    let output = stress("connections --short --seconds 0.2 --connections 50 --seed 11 --json");
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("server and clients need one each") {
        return;
    }
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["passed"], &report["seed"]), (&Value::Bool(true), &11.into()), "{text}");
    let rows = report["rows"].as_array().unwrap();
    let spread =
        |row: &Value| ["connections", "sessions", "client_processes"].map(|key| row[key].as_u64().unwrap());
    assert_eq!(rows.iter().map(spread).collect::<Vec<_>>(), [[50, 1, 1], [50, 50, 10]]);
    for row in rows {
        let counted = ["alive", "wrong", "errors", "lost"].map(|key| row[key].as_u64().unwrap());
        assert_eq!(counted, [50, 0, 0, 0], "{row}");
        assert!(row["messages_in_all"].as_u64().unwrap() >= 100, "{row}");
        assert_eq!(row["messages_counted_by_server"], row["messages_in_all"], "{row}");
        assert!(row["memory"]["footprint_bytes"].as_u64() >= row["memory"]["rss_bytes"].as_u64(), "{row}");
        assert!(row["memory"]["samples"].as_u64().unwrap() > 0, "{row}");
        assert!(row["notes"].as_array().unwrap().is_empty(), "{row}");
    }
}

/// Goal:   all rows of level 2 run with real processes: calls of both kinds in one process and in several, senders that
///         are stopped and go on; nothing is wrong or lost, and the exit status says so.
/// Method: a twentieth of the connections, two rounds, the JSON object read back. How soon memory was taken back, and how
///         much there was, is not looked at here.
#[test]
fn level_2_passes_on_a_small_scale() {
    let output = stress("memory --short --rounds 2 --connections 50 --seed 11 --json");
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("server and clients need one each") {
        return;
    }
    let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{errors}"));
    let rows = report["rows"].as_array().unwrap();
    let spread =
        |row: &Value| ["connections", "sessions", "client_processes"].map(|key| row[key].as_u64().unwrap());
    assert_eq!(rows.iter().map(spread).collect::<Vec<_>>(), [[30, 2, 1], [30, 6, 5], [5, 6, 5]]);
    for row in rows {
        let counted = ["wrong", "errors", "lost", "leased_bytes_after"].map(|key| row[key].as_u64().unwrap());
        assert_eq!(counted, [0; 4], "{row}");
        assert!(row["memory"]["samples"].as_u64().unwrap() > 0, "{row}");
        assert!(row["leases_granted"].as_u64().unwrap() > 0, "{row}");
        assert!(row["notes"].as_array().unwrap().is_empty(), "{row}");
    }
    let calls = |row: &Value| [&row["short_calls"], &row["long_calls"]].map(|n| n.as_u64().unwrap());
    assert_eq!(rows.iter().map(calls).collect::<Vec<_>>(), [[100, 10], [100, 10], [0, 10]]);
    assert_eq!(rows[2]["take_back"]["stopped"], 1, "{text}");
}

/// Goal:   T12, F11 to F31: every attack of the gallery is carried out, by a process past the library, ends as it must, and
///         costs neither the server nor the client beside it anything but time.
/// Method: windows of 0.1 s, the JSON object read back. How long the bystander waited is not looked at here.
#[test]
fn f11_f31_every_attack_of_the_gallery_ends_as_it_must() {
    let output = stress("gallery --seconds 0.1 --json");
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("server and clients need one each") {
        return;
    }
    let gallery: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{errors}"));
    let rows = gallery["rows"].as_array().unwrap();
    assert!(rows.len() > 20 && rows[0]["attack"] == "an honest neighbour", "{text}");
    for row in rows {
        assert!(row["done"].as_u64().unwrap() >= 1 && row["per_second"].as_u64().unwrap() >= 1, "{row}");
        assert_eq!((&row["unexpected"], &row["errors"]), (&0.into(), &0.into()), "{row}{errors}");
    }
}

/// Goal:   T8: clients are killed at random moments, and a run that was cut into pieces goes on where it stopped.
/// Method: 40 kills, then 16 more with the same file; what is found wrong but for times would be in the counts.
#[test]
fn t8_kills_are_counted_and_resumed() {
    let state = std::env::temp_dir().join(format!("doorbell-kills-{}.json", std::process::id()));
    for count in [40, 56] {
        let output = stress(&format!("kills --count {count} --seed 5 --state {}", state.display()));
        let errors = String::from_utf8_lossy(&output.stderr);
        if errors.contains("server and clients need one each") {
            return;
        }
        let text = std::fs::read_to_string(&state).unwrap_or_else(|e| panic!("{e}: {errors}"));
        let kept: Value = serde_json::from_str(&text).unwrap();
        let wrong: Vec<_> = kept["violations"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        if wrong.iter().any(|wrong| wrong.starts_with("I1: the bystander waited")) {
            // That ends a run early, and says more of a busy machine than of the server.
            break;
        }
        assert!(wrong.is_empty(), "{text}{errors}");
        assert_eq!((&kept["kills"], &kept["bystander_errors"]), (&count.into(), &0.into()), "{text}{errors}");
    }
    std::fs::remove_file(&state).unwrap();
}

/// Goal:   F38: what `without-io-uring` starts is refused io_uring, and gets its arguments and its exit status through.
#[test]
fn f38_a_command_runs_without_io_uring() {
    let command = Command::new(env!("CARGO_BIN_EXE_doorbell-stress"))
        .args([
            "without-io-uring",
            "/bin/sh",
            "-c",
            "grep -q 'Seccomp:[[:space:]]*2' /proc/self/status && exit 7",
        ])
        .output();
    assert_eq!(command.unwrap().status.code(), Some(7));
    let output = stress("without-io-uring /no/such/command");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("execve"));
}

/// Goal:   a level that is to come is refused by name, not ignored and not run.
#[test]
fn a_level_to_come_is_a_wrong_question() {
    for level in ["latency", "5"] {
        let output = stress(&format!("{level} --short"));
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty());
        assert!(String::from_utf8_lossy(&output.stderr).contains("is not there yet"));
    }
}

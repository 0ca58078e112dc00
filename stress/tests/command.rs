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

/// Goal:   T9: what was built without kill points says how to build it with them, and does not pass for done.
#[cfg(not(feature = "kill-points"))]
#[test]
fn t9_without_kill_points_the_way_to_them_is_told() {
    let output = stress("kill-points --count 1");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--features kill-points"));
    let output = stress("kill-points --point client.nowhere");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("client.entry.half"));
}

/// Goal:   T9: a client and a server suffer a point each, with both signals, and a run that was cut into pieces goes on.
/// Method: the counts of both points, with a state file.
#[cfg(feature = "kill-points")]
#[test]
fn t9_points_are_suffered_counted_and_resumed() {
    let state = std::env::temp_dir().join(format!("doorbell-points-{}.json", std::process::id()));
    for count in [1, 3] {
        let points = "--point client.entry.half --point server.position.published";
        let line = format!("kill-points --count {count} --seed 5 --patience-ms 60000 {points}");
        let output = stress(&format!("{line} --state {}", state.display()));
        let errors = String::from_utf8_lossy(&output.stderr);
        if errors.contains("server and clients need one each") {
            return;
        }
        assert_eq!(output.status.code(), Some(0), "{errors}");
        let kept: Value = serde_json::from_str(&std::fs::read_to_string(&state).unwrap()).unwrap();
        for label in ["client.entry.half", "server.position.published"] {
            let [killed, stopped, continued, missed] = ["killed", "stopped", "continued", "missed"]
                .map(|key| kept["points"][label][key].as_u64().unwrap());
            assert_eq!((killed, stopped + continued, missed), (count, count, 0), "{kept}");
        }
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

/// The report of a run that must not have failed; `None` where there are too few cores.
fn report(line: &str) -> Option<Value> {
    let output = stress(line);
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("server and clients need one each") {
        return None;
    }
    Some(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{errors}")))
}

fn numbers<const N: usize>(row: &Value, keys: [&str; N]) -> [u64; N] {
    keys.map(|key| row[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {row}")))
}

/// Goal:   both rows of level 3 run with real processes: bulk calls and probes at the same time, all answered rightly, in one
///         process and in two.
/// Method: 50 connections for a fraction of a second. How long calls took is not looked at here.
#[test]
fn r6_level_3_times_probes_beside_bulk_calls_on_a_small_scale() {
    let Some(report) = report("latency --short --seconds 0.6 --connections 50 --seed 11 --json") else {
        return;
    };
    let rows = report["rows"].as_array().unwrap();
    let processes: Vec<u64> = rows.iter().map(|row| row["client_processes"].as_u64().unwrap()).collect();
    assert_eq!(processes, [1, 2]);
    for row in rows {
        assert_eq!(numbers(row, ["connections", "wrong", "errors", "lost"]), [50, 0, 0, 0], "{row}");
        assert!(row["bulk_calls"].as_u64().unwrap() > 49, "{row}");
        assert!(row["probe"]["samples"].as_u64().unwrap() > 0, "{row}");
        assert!(row["probe"]["max_ns"].as_u64() >= row["probe"]["p50_ns"].as_u64(), "{row}");
        assert!(row["floor"]["samples"].as_u64().unwrap() > 0, "{row}");
    }
    assert_eq!(report["passed"], true, "{report}");
}

/// Goal:   level 4 runs with real processes: completions, streamed chats and analyses of files, all answered rightly; nothing
///         of a cycle's sessions, descriptors, threads and memory is left.
/// Method: three cycles of a few connections. How much memory there was is not looked at here.
#[test]
fn r6_level_4_leaves_nothing_on_a_small_scale() {
    let Some(report) = report("leaks --short --cycles 3 --connections 50 --seed 11 --json") else { return };
    let row = &report["rows"][0];
    assert_eq!(
        numbers(row, ["wrong", "errors", "lost", "cycles", "client_processes"]),
        [0, 0, 0, 3, 4],
        "{row}"
    );
    // A warm-up of 25 connections, then three cycles; 5 calls of each kind on each connection.
    let calls = row["calls"].as_u64().unwrap();
    assert!(calls >= (25 + 3 * 5) * 15 && calls.is_multiple_of(15), "{row}");
    for holdings in ["descriptors", "threads"] {
        assert_eq!(row[holdings][0], row[holdings][1], "{row}");
    }
    assert_eq!(report["passed"], true, "{report}");
}

/// Goal:   level 5 injects all that it names, for real, and the server comes to no harm that it was not dealt.
/// Method: seven seconds, so each injection once; every number of what was injected is the one that was meant. How long
///         calls and recoveries took is not looked at here.
#[test]
fn r6_level_5_injects_each_kind_on_a_small_scale() {
    let Some(report) = report("chaos --short --seconds 7 --seed 11 --json") else { return };
    let row = &report["rows"][0];
    assert_eq!(numbers(row, ["wrong", "errors", "lost"]), [0; 3], "{row}");
    let keys = [
        "seconds",
        "clients_killed",
        "entries_corrupted",
        "handshakes_timed_out",
        "messages_too_long",
        "long_calls_under_pressure",
        "tiny_messages",
        "servers_killed",
    ];
    assert_eq!(numbers(&row["injected"], keys), [7, 10, 50, 20, 30, 24, 1000, 1], "{row}");
    assert!(row["calls"]["samples"].as_u64().unwrap() > 0, "{row}");
    let recoveries = row["recoveries_ms"].as_array().unwrap();
    assert!(recoveries.len() == 1 && recoveries[0].is_number(), "{row}");
    assert_eq!(report["passed"], true, "{report}");
}

/// Goal:   what is no level is refused, not ignored and not run.
#[test]
fn a_level_that_does_not_exist_is_a_wrong_question() {
    for level in ["latencies", "6"] {
        let output = stress(&format!("{level} --short"));
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty());
        assert!(String::from_utf8_lossy(&output.stderr).contains("no level is called that"));
    }
}

/// Goal:   R3.4, F50, trap 25: `reconnect` kills real servers under real clients, whose calls are each executed once by the
///         next server and answered right.
/// Method: 30 clients in 3 processes, two kills, the JSON object read back; times are not judged here.
#[test]
fn r3_4_f50_trap25_reconnect_counts_every_call_once() {
    let output =
        stress("reconnect --clients 30 --processes 3 --rounds 2 --away-ms 20 --goal-ms 60000 --json");
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    let report: Value = serde_json::from_str(&text).unwrap();
    let counted = ["wrong", "errors", "miscounted"].map(|key| report[key].as_u64().unwrap());
    assert_eq!((counted, &report["passed"]), ([0; 3], &Value::Bool(true)), "{text}");
    for round in report["rounds"].as_array().unwrap() {
        assert_eq!(round["executed"], 30, "{round}");
        assert!(
            round["restart_ms"].as_f64().unwrap() >= 20.0
                && round["last_ms"].as_f64() >= round["p50_ms"].as_f64()
        );
    }
}

/// Goal:   I2, I8, R6: `reclaim` kills clients and sees all that the server held of them go; `soak` has every kind of chaos but the
///         death of the server, and its normal client comes to no harm.
/// Method: five clients, and six minutes of a second each. How long things took, and how much memory there was, is not
///         judged here.
#[test]
fn r6_what_is_left_of_the_dead_and_of_chaos_is_looked_at() {
    let output = stress("reclaim --count 5 --goal-ms 60000 --seed 3");
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if errors.contains("server and clients need one each") {
        return;
    }
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    assert!(text.starts_with("5 clients killed") && text.contains("passed: p99 "), "{text}");
    let output = stress("soak --minutes 6 --minute 1 --seed 3 --json");
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{errors}");
    let soak: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&soak["injections"], &soak["passed"]), (&6.into(), &Value::Bool(true)), "{text}");
    assert_eq!([&soak["wrong"], &soak["errors"]], [0, 0], "{text}");
    assert!(soak["calls"].as_u64() > Some(0), "{text}");
    assert_eq!(soak["anonymous"].as_array().unwrap().len(), 6, "{text}");
}

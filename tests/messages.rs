//! What the command says when it is used wrongly, or cannot do what it is told: one table (R3.1, R4.1).

mod common;

use common::TestDir;
use common::process::{doorbell, run, stderr};

/// Arguments, `@` standing for a directory of the test's own; the exit status; what was wrong and where; what to do.
type Case = (&'static str, i32, &'static str, &'static str);

/// Files of that directory.
const FILES: [(&str, &str); 10] = [
    ("plain", ""),
    ("key.toml", "[ipc]\nmax_mesage_size = 5\n"),
    ("table.toml", "[ipcs]\n"),
    ("type.toml", "[ipc]\nmax_message_size = \"5\"\n"),
    ("syntax.toml", "[ipc\n"),
    ("zero.toml", "[ipc]\nmax_message_size = 0\n"),
    ("budget.toml", "[ipc]\nmemory_budget = 1000\n"),
    ("address.toml", "[metrics]\nlisten = \"0.0.0.0:99\"\n"),
    ("policy.toml", "[ipc]\npolicy = \"fast\"\n"),
    ("broken.json", "{\"a\": "),
];

const COMMAND_LINE: [Case; 16] = [
    ("serv", 2, "unrecognized subcommand 'serv'", "'serve'"),
    ("doctor --wrong", 2, "unexpected argument '--wrong'", "try '--help'"),
    ("call --type pong", 2, "`pong` is no message type", "give ping, echo, stats"),
    ("call --type ping --traceparent zz", 2, "this one has 2 bytes", "55 characters, as in 00-"),
    ("bench --size 99999999", 2, "--size", "at most 10485760 bytes"),
    ("bench --connections 0", 2, "--connections", "at least 1"),
    ("bench --sessions 9 --connections 1", 2, "9 sessions for 1 connections", "each needs one"),
    ("call --socket @/none --type ping", 1, "no server listens at @/none", "start one with `doorbell serve`"),
    ("stat --socket @/none", 1, "no server listens at @/none", "start one with `doorbell serve`"),
    ("chat --socket @/none hello", 1, "no server listens at @/none", "name its socket with --socket"),
    ("top --socket @/none", 1, "standard output is no terminal", "`doorbell stat --watch`"),
    (
        "serve --socket @/no/where",
        1,
        "@/no/where: its directory does not exist",
        "create it, or choose another path",
    ),
    ("serve --socket @/plain", 1, "@/plain: something that is not a socket lies there", "remove it"),
    ("call --socket @/none --type echo --json @/absent", 1, "cannot open @/absent", "No such file"),
    (
        "call --socket @/none --type echo --json @/broken.json",
        1,
        "@/broken.json does not hold one JSON value",
        "give one value",
    ),
    ("analyze --socket @/none @/absent", 1, "cannot read @/absent", "No such file"),
];

const CONFIGURATION: [Case; 9] = [
    ("config check @/absent.toml", 1, "@/absent.toml: cannot be read", "`doorbell config default`"),
    ("config check @/key.toml", 1, "@/key.toml:2:1: ipc.max_mesage_size", "is `max_message_size` meant?"),
    ("config check @/table.toml", 1, "@/table.toml:1:", "is `ipc` meant?"),
    ("config check @/type.toml", 1, "@/type.toml:2:20: ipc.max_message_size", "a whole number is wanted"),
    ("config check @/syntax.toml", 1, "@/syntax.toml:1:5: unclosed table", "expected `]`"),
    ("config check @/zero.toml", 1, "@/zero.toml:2:20: ipc.max_message_size", "allowed are 1 to "),
    ("config check @/budget.toml", 1, "@/budget.toml:2:17: ipc.memory_budget", "allowed are 2097152 to "),
    (
        "config check @/address.toml",
        1,
        "metrics.listen: 0.0.0.0 is no loopback address",
        "put a proxy before it",
    ),
    ("config check @/policy.toml", 1, "@/policy.toml:2:10: ipc.policy: `fast` is none", "choose handoff"),
];

fn check(cases: &[Case]) {
    let directory = TestDir::new();
    let place = directory.join("plain").parent().unwrap().to_str().unwrap().to_owned();
    for (name, text) in FILES {
        std::fs::write(directory.join(name), text).unwrap();
    }
    for (arguments, status, wrong, todo) in cases {
        let arguments = arguments.replace('@', &place);
        let output = run(&arguments.split(' ').collect::<Vec<_>>());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(*status), "{arguments}: {said}");
        for word in [wrong, todo] {
            let word = word.replace('@', &place);
            assert!(said.contains(&word), "{arguments}: `{word}` in: {said}");
        }
        assert!(output.stdout.is_empty() && !said.contains("panicked"), "{arguments}: {said}");
    }
}

/// Goal:   R3.1: whatever is wrong with a command line, or in the way of a command, is told with what it was, where, and
///         what to do; the status is 2 for a wrong command line, 1 for what could not be done, and nothing is printed that
///         could be taken for an answer.
/// Method: a table.
#[test]
fn r3_1_every_error_of_the_command_says_what_was_wrong_and_what_to_do() {
    check(&COMMAND_LINE);
}

/// Goal:   R4.1: the same of a configuration: file, line, column and key, and what may stand there.
/// Method: a table.
#[test]
fn r4_1_every_error_of_a_configuration_says_where_it_is_and_what_may_stand_there() {
    check(&CONFIGURATION);
}

/// Goal:   R4.1: what an environment variable overrides is told by the variable's name.
/// Method: a value that is none.
#[test]
fn r4_1_an_error_in_the_environment_names_the_variable() {
    let output =
        doorbell().args(["config", "check"]).env("DOORBELL_IPC_MAX_MESSAGE_SIZE", "much").output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("DOORBELL_IPC_MAX_MESSAGE_SIZE") && said.contains("a whole number is wanted"),
        "{said}"
    );
}

//! Configuration files: what they can say, and how they are told what is wrong with them (R4.1).
#![cfg(feature = "config-file")]

use doorbell::WaitPolicy;
use doorbell::config::file::{ConfigFile, ConfigFileError};
use std::ffi::OsString;
use std::time::Duration;

fn parse(text: &str) -> Result<ConfigFile, ConfigFileError> {
    ConfigFile::parse(text, "doorbell.toml", |_| None)
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

/// Goal:   R4.1: every kind of value gets where it belongs, and the rest is as without a file.
#[test]
fn r4_1_a_file_says_what_differs() {
    let text = r#"
        [ipc]
        socket_path = "/tmp/d.sock"
        max_connections = 2_000
        policy = "block"
        pinned = false
        handshake_timeout_ms = 250
        turn_time_us = 300
        cores = [0, 1]
        file_roots = ["/a", "/b c"]

        [ai]
        default = "local"
        [[ai.providers]]
        name = "local"
        kind = "loopback"
        timeouts = { total_ms = 5 }
    "#;
    let config = parse(text).unwrap();
    let server = &config.ipc.server;
    assert_eq!(config.ipc.socket_path.as_deref(), Some("/tmp/d.sock".as_ref()));
    assert_eq!((server.max_connections, server.policy, server.pinned), (2000, WaitPolicy::Block, false));
    assert_eq!(server.handshake_timeout, Duration::from_millis(250));
    assert_eq!(server.turn_time, Duration::from_micros(300));
    assert_eq!(server.cores, [0, 1]);
    assert_eq!(server.file_roots, ["/a", "/b c"].map(std::path::PathBuf::from));
    assert_eq!(server.max_message_size, 10_485_760, "as without a file");
    assert_eq!(config.ai.default.as_deref(), Some("local"));
    assert_eq!(config.ai.providers[0].timeouts.total_ms, 5);
}

/// Goal:   R4.1: the file that is printed with all defaults is good, and says what holds without it.
/// Method: it is read again, and each limit compared as it is printed.
#[test]
fn r4_1_the_default_file_is_what_holds_without_one() {
    let text = ConfigFile::default_text();
    let config = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let (read, default) = (config.ipc.server, doorbell::ServerConfig::default());
    assert_eq!(format!("{read:?}"), format!("{default:?}"));
    assert_eq!(config.ai, doorbell::provider::ProvidersConfig::default());
    assert!(text.lines().filter(|line| line.contains(" = ")).count() > 20);
}

/// Goal:   R4.1: a limit that another one follows may be lowered alone.
#[test]
fn r4_1_fewer_sessions_need_no_fewer_half_open_ones() {
    let config = parse("[ipc]\nmax_sessions = 100").unwrap();
    assert_eq!(config.ipc.server.max_sessions, 100);
}

/// Goal:   R4.1: what the page about providers shows is good as it stands.
#[test]
fn r4_1_the_file_that_the_book_shows_is_good() {
    let page = include_str!("../docs/providers.md");
    let text = page.split_once("```toml\n").unwrap().1.split_once("```").unwrap().0;
    let config = parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(config.ai.providers.len(), 2);
}

/// Goal:   R4.1: an error names file, line, column and key, and what would be right.
/// Method: a table of every kind of mistake, whole messages compared.
#[test]
fn r4_1_errors_say_where_and_what_is_right() {
    let table = [
        (
            "[ipc]\nmax_conections = 5\n",
            "doorbell.toml:2:1: ipc.max_conections: there is no such key: is `max_connections` meant?",
        ),
        ("[icp]\n", "doorbell.toml:1:2: icp: there is no such section: is `ipc` meant?"),
        (
            "[ipc]\nreactors = \"two\"\n",
            "doorbell.toml:2:12: ipc.reactors: a whole number is wanted, not a string",
        ),
        (
            "[ipc]\n  reactors = -1\n",
            "doorbell.toml:2:14: ipc.reactors: -1 is out of range: a whole number from 0 to 4294967295 is wanted",
        ),
        (
            "[ipc]\nreactors = 99999999999999999999\n",
            "doorbell.toml:2:12: ipc.reactors: 99999999999999999999 is out of range: a whole number from 0 to 4294967295 is wanted",
        ),
        (
            "[ipc]\nmax_sessions = 0\n",
            "doorbell.toml:2:16: ipc.max_sessions: max_sessions is 0, allowed are 1 to 1048576",
        ),
        (
            "[ipc]\nhandshake_timeout_ms = 0\n",
            "doorbell.toml:2:24: ipc.handshake_timeout_ms: handshake_timeout (ms) is 0, allowed are 1 to 60000",
        ),
        (
            "[ipc]\npolicy = \"poll\"\n",
            "doorbell.toml:2:10: ipc.policy: `poll` is none: choose handoff, block or spin",
        ),
        ("[ipc]\npinned = 1\n", "doorbell.toml:2:10: ipc.pinned: true or false is wanted, not an integer"),
        (
            "[ipc]\nsocket_path = \"\"\n",
            "doorbell.toml:2:15: ipc.socket_path: a path is wanted, not an empty text",
        ),
        (
            "[ipc]\ncores = [0, \"1\"]\n",
            "doorbell.toml:2:9: ipc.cores: a whole number is wanted, not a string",
        ),
        ("ipc = 3\n", "doorbell.toml:1:7: ipc: a section is wanted: [ipc]"),
        (
            "[[ai.providers]]\nname = \"x\"\nbase_ulr = \"y\"\n",
            "doorbell.toml:3:1: ai.base_ulr: there is no `base_ulr`: is `base_url` meant?",
        ),
    ];
    for (text, expected) in table {
        assert_eq!(error(text), expected);
    }
    assert!(error("[ipc\n").starts_with("doorbell.toml:1:5: "), "{}", error("[ipc\n"));
    assert!(error("[ipc]\nreactors = 1\nreactors = 2\n").contains("duplicate key"));
    assert!(error("[[ai.providers]]\nname = \"x\"\nkind = \"opnai\"\n").contains("is `openai` meant?"));
    assert!(error("[ai]\ndefault = \"x\"\n").contains("names the provider `x`, which is not configured"));
}

/// Goal:   R4.1: the environment overrides the file, and is blamed for what it says.
#[test]
fn r4_1_the_environment_overrides_the_file() {
    let parse = |name: &'static str, value: &'static str| {
        let variable = move |asked: &str| (asked == name).then(|| OsString::from(value));
        ConfigFile::parse("[ipc]\nreactors = 1\npolicy = \"spin\"\n", "f", variable)
    };
    assert_eq!(parse("DOORBELL_IPC_REACTORS", "2").unwrap().ipc.server.reactors, 2);
    assert_eq!(parse("DOORBELL_IPC_POLICY", "block").unwrap().ipc.server.policy, WaitPolicy::Block);
    assert_eq!(parse("DOORBELL_IPC_POLICY", "\"block\"").unwrap().ipc.server.policy, WaitPolicy::Block);
    assert_eq!(parse("DOORBELL_IPC_CORES", "[1]").unwrap().ipc.server.cores, [1]);
    let error = parse("DOORBELL_IPC_REACTORS", "many").unwrap_err().to_string();
    let source = "environment variable DOORBELL_IPC_REACTORS: ipc.reactors: ";
    assert_eq!(error, format!("{source}a whole number is wanted, not a string"));
    let error = parse("DOORBELL_IPC_REACTORS", "5000").unwrap_err().to_string();
    assert_eq!(error, format!("{source}reactors is 5000, allowed are 0 to 1024"));
}

//! The keys of a configuration file's sections `ipc` (one for each limit, its unit in its name) and `metrics`. One table
//! of each for reading, for checking, for the environment and for `doorbell config default`.

use super::{Backend, MetricsAddress, MetricsConfig, ServerConfig, WaitPolicy};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::DeValue;

/// What the section `ipc` says.
#[derive(Debug, Clone, Default)]
pub struct Ipc {
    /// Where clients connect; `None`: the default place.
    pub socket_path: Option<PathBuf>,
    /// The limits.
    pub server: ServerConfig,
    /// What is logged.
    pub log_level: LogLevel,
}

/// How much is logged: this, and what is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// What the server cannot go on with.
    Error,
    /// What somebody should look at.
    Warn,
    /// What happens to the server.
    #[default]
    Info,
    /// What happens to single sessions.
    Debug,
}

impl LogLevel {
    /// Each with its name in a file.
    const NAMES: [(Self, &str); 4] =
        [(Self::Error, "error"), (Self::Warn, "warn"), (Self::Info, "info"), (Self::Debug, "debug")];
}

/// One key.
pub(super) struct Key<T = Ipc> {
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    pub field: fn(&mut T) -> Field<'_>,
}

/// The place that a key's value goes to.
pub(super) enum Field<'a> {
    U8(&'a mut u8),
    U32(&'a mut u32),
    U64(&'a mut u64),
    Bool(&'a mut bool),
    Millis(&'a mut Duration),
    Micros(&'a mut Duration),
    /// 0 for none.
    OptionalSecs(&'a mut Option<Duration>),
    /// 0 for none.
    OptionalMillis(&'a mut Option<Duration>),
    Path(&'a mut Option<PathBuf>),
    Paths(&'a mut Vec<PathBuf>),
    Cores(&'a mut Vec<usize>),
    Policy(&'a mut WaitPolicy),
    Backend(&'a mut Backend),
    Address(&'a mut Option<MetricsAddress>),
    Level(&'a mut LogLevel),
}

macro_rules! keys {
    ($($name:ident: $kind:ident = $($field:ident).+, $about:literal;)*) => {
        &[$(Key {
            name: stringify!($name),
            about: $about,
            field: |section| Field::$kind(&mut section.$($field).+),
        }),*]
    };
}

/// All keys, in the order in which they are printed.
pub(super) const KEYS: &[Key] = keys! {
    socket_path: Path = socket_path, "Where clients connect. Default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID.";
    log_level: Level = log_level, "What is logged: error, warn, info, or debug, which tells of single sessions.";
    policy: Policy = server.policy, "How a reactor waits: handoff, block or spin.";
    backend: Backend = server.backend, "What reactors wait with: io-uring, epoll, or auto, which is io-uring if it works here.";
    reactors: U32 = server.reactors, "Reactors, each a thread; 0 means one for every core that may be used.";
    cores: Cores = server.cores, "Cores for the reactors; empty means all that may be used.";
    pinned: Bool = server.pinned, "Whether each reactor stays on its core: callers hand over their core to such ones only.";
    memory_budget: U64 = server.memory_budget, "Bytes of the server and of all it shares; each session beyond 100 adds 10 KiB.";
    body_memory: U64 = server.body_memory, "Bytes, beside the budget, in which each reactor puts long requests together.";
    max_message_size: U64 = server.max_message_size, "Longest request and longest answer, bytes.";
    max_connections: U32 = server.max_connections, "Connections over all sessions.";
    max_sessions: U32 = server.max_sessions, "Sessions, each a connected client; three file descriptors each.";
    max_sessions_per_process: U32 = server.max_sessions_per_process, "Sessions of one client process.";
    max_half_open: U32 = server.max_half_open, "Sessions whose hello has not come yet.";
    max_half_open_per_process: U32 = server.max_half_open_per_process, "Those of one process.";
    handshake_timeout_ms: Millis = server.handshake_timeout, "How long a session may stay half open.";
    max_ring_order: U8 = server.max_ring_order, "Largest ring a client may ask for, as a power of two.";
    max_slot_pages: U32 = server.max_slot_pages, "Most slot pages (4 KiB each) a client may ask for.";
    max_lanes: U32 = server.max_lanes, "Lanes of one session, each with a reactor of its own.";
    max_further_lanes: U32 = server.max_further_lanes, "Lanes of all sessions beside their first ones.";
    entries_per_turn: U32 = server.entries_per_turn, "Entries taken from one lane before the next has its turn.";
    bytes_per_turn: U64 = server.bytes_per_turn, "Bytes of one lane before the next has its turn.";
    turn_time_us: Micros = server.turn_time, "Time of one lane before the next has its turn.";
    spin_percent: U32 = server.spin_percent, "Most of its core that a reactor polls away under the policy handoff.";
    storm_patience_ms: Millis = server.storm_patience, "How long a client may ring without cause before it is cut off.";
    sweep_interval_ms: Millis = server.sweep_interval, "How often every lane is looked at, rung for or not.";
    buffer_pool_size: U32 = server.buffer_pool_size, "4 KiB staging buffers of a reactor, made when first needed.";
    file_roots: Paths = server.file_roots, "Directories beneath which clients may have files read.";
    max_file_size: U64 = server.max_file_size, "Longest file that is read for a client, bytes.";
    max_deferred: U32 = server.max_deferred, "Calls of a reactor that are answered by other threads at a time.";
    default_deadline_ms: OptionalMillis = server.default_deadline, "Deadline of such and of long calls that have none of their own; 0 for none.";
    idle_timeout_secs: OptionalSecs = server.idle_timeout, "How long a session may do nothing before it is ended; 0 for ever.";
    slow_consumer_timeout_ms: OptionalMillis = server.slow_consumer_timeout, "How long a session may be full of results and take none; 0 for ever.";
    drain_timeout_ms: Millis = server.drain_timeout, "How long a server that stops waits for calls that are under way.";
    linger_ms: OptionalMillis = server.linger, "How long the server stays without a session before it stops; 0 for ever.";
    slow_handler_ms: Millis = server.slow_handler, "Processor time after which a handler that holds its reactor is named in the log.";
    watchdog_secs: OptionalSecs = server.watchdog, "Processor time after which a server aborts whose handler does not come back; 0 for never.";
    thin_executable: Bool = server.thin_executable, "Whether memory of code that only the start needed is given back.";
};

/// The keys of the section `metrics`.
pub(super) const METRICS_KEYS: &[Key<MetricsConfig>] = keys! {
    enable: Bool = enable, "Whether calls are timed, and anything is told of them.";
    export_interval_secs: OptionalSecs = export_interval, "Between two lines in the log, and two versions of textfile; 0 for neither.";
    textfile: Path = textfile, "File for the text of Prometheus, such as the textfile collector reads.";
    listen: Address = listen, "Where that text is served by HTTP, at /metrics: a loopback address (127.0.0.1:9464), or unix:/path.";
};

impl Field<'_> {
    /// Puts a value there.
    ///
    /// # Errors
    ///
    /// What is wanted instead.
    pub fn set(self, value: &DeValue<'_>) -> Result<(), String> {
        match self {
            Self::U8(to) => *to = whole(value, u8::MAX.into())? as u8,
            Self::U32(to) => *to = whole(value, u32::MAX.into())? as u32,
            Self::U64(to) => *to = whole(value, i64::MAX as u64)?,
            Self::Bool(to) => *to = value.as_bool().ok_or_else(|| wanted("true or false", value))?,
            Self::Millis(to) => *to = Duration::from_millis(whole(value, u32::MAX.into())?),
            Self::Micros(to) => *to = Duration::from_micros(whole(value, u32::MAX.into())?),
            Self::OptionalSecs(to) => {
                let secs = whole(value, u32::MAX.into())?;
                *to = (secs > 0).then(|| Duration::from_secs(secs));
            }
            Self::OptionalMillis(to) => {
                let ms = whole(value, u32::MAX.into())?;
                *to = (ms > 0).then(|| Duration::from_millis(ms));
            }
            Self::Address(to) => {
                let text = value.as_str().ok_or_else(|| wanted("an address in quotes", value))?;
                *to = Some(text.parse()?);
            }
            Self::Path(to) => *to = Some(path(value)?),
            Self::Paths(to) => *to = list(value, "a list of paths", path)?,
            Self::Cores(to) => {
                *to = list(value, "a list of core numbers", |v| Ok(whole(v, 1 << 20)? as usize))?;
            }
            Self::Level(to) => {
                let known = |text: &str| LogLevel::NAMES.iter().find(|(_, name)| *name == text);
                let level = value.as_str().and_then(known);
                *to = level.ok_or("\"error\", \"warn\", \"info\" or \"debug\" is wanted")?.0;
            }
            Self::Policy(to) => {
                let text =
                    value.as_str().ok_or_else(|| wanted("\"handoff\", \"block\" or \"spin\"", value))?;
                *to = text.parse().map_err(|_| format!("`{text}` is none: choose handoff, block or spin"))?;
            }
            Self::Backend(to) => {
                let text =
                    value.as_str().ok_or_else(|| wanted("\"auto\", \"io-uring\" or \"epoll\"", value))?;
                *to =
                    text.parse().map_err(|_| format!("`{text}` is none: choose auto, io-uring or epoll"))?;
            }
        }
        Ok(())
    }

    /// The present value, as it stands in a file; `None` if there is none.
    pub fn to_toml(&self) -> Option<String> {
        Some(match self {
            Self::U8(value) => value.to_string(),
            Self::U32(value) => value.to_string(),
            Self::U64(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::Millis(value) => value.as_millis().to_string(),
            Self::Micros(value) => value.as_micros().to_string(),
            Self::OptionalSecs(value) => value.map_or(0, |after| after.as_secs()).to_string(),
            Self::OptionalMillis(value) => value.map_or(0, |after| after.as_millis()).to_string(),
            Self::Address(value) => format!("{:?}", value.as_ref()?.to_string()),
            Self::Path(value) => quoted(value.as_ref()?),
            Self::Paths(value) => listed(value.iter().map(|path| quoted(path))),
            Self::Cores(value) => listed(value.iter().map(usize::to_string)),
            Self::Level(value) => {
                let (_, name) = LogLevel::NAMES.iter().find(|(level, _)| level == *value)?;
                format!("{name:?}")
            }
            Self::Policy(value) => format!("{:?}", value.as_str()),
            Self::Backend(value) => format!("{:?}", value.as_str()),
        })
    }
}

fn listed(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.display().to_string()).to_string()
}

fn wanted(what: &str, found: &DeValue<'_>) -> String {
    format!("{what} is wanted, not {}", a(found.type_str()))
}

fn a(kind: &str) -> String {
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("{article} {kind}")
}

fn whole(value: &DeValue<'_>, most: u64) -> Result<u64, String> {
    let number = value.as_integer().ok_or_else(|| wanted("a whole number", value))?;
    let parsed = i128::from_str_radix(&number.as_str().replace('_', ""), number.radix()).unwrap_or(i128::MAX);
    if (0..=i128::from(most)).contains(&parsed) {
        Ok(parsed as u64)
    } else {
        Err(format!("{} is out of range: a whole number from 0 to {most} is wanted", number.as_str()))
    }
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    match value.as_str() {
        Some("") => Err("a path is wanted, not an empty text".to_owned()),
        Some(text) => Ok(PathBuf::from(text)),
        None => Err(wanted("a path in quotes", value)),
    }
}

fn list<T>(
    value: &DeValue<'_>,
    what: &str,
    each: impl Fn(&DeValue<'_>) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let items = value.as_array().ok_or_else(|| wanted(what, value))?;
    items.iter().map(|item| each(item.get_ref())).collect()
}

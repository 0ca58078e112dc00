//! Every limit of the server, in one place, with its unit (FAULTS S12).

#[cfg(feature = "config-file")]
pub mod file;
#[cfg(feature = "config-file")]
mod keys;
mod metrics;
mod movable;
#[cfg(feature = "config-file")]
pub mod reload;

#[cfg(feature = "config-file")]
pub use keys::{Ipc, LogLevel};
pub use metrics::{MetricsAddress, MetricsConfig};
pub use movable::Movable;

use crate::error::{IpcError, Result};
use crate::server::budget::BUDGET_MIN;
use crate::server::reactor_cores;
use doorbell_shm::layout::LANES_MAX;
use doorbell_shm::pipe::ReadySet;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Longest message unless a server is configured otherwise, bytes (R1.5).
pub const MESSAGE_MAX: u64 = 10 << 20;

/// 64 KiB staging buffers of a reactor; those of 4 KiB are [`ServerConfig::buffer_pool_size`].
pub const STAGING_MEDIUM: u16 = 4;
/// 1 MiB staging buffers of a reactor. They have memory only while they are used.
pub const STAGING_LARGE: u16 = 2;
/// Files that a reactor reads or is about to read, each with a file descriptor.
pub const FILE_READS_MAX: usize = 32;

/// Longest file that questions are answered about, bytes. A reactor keeps [`FILE_READS_MAX`] of them at most while it
/// reads them, beside the memory budget.
pub const QUESTION_MAX: u64 = 1 << 20;

/// How a side waits when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WaitPolicy {
    /// A caller hands its core to the reactor of that core and gets it back with the answer: no CPU while
    /// idle, no wake-up across cores in a cold call. While a reactor polls on another core, callers spin
    /// briefly instead.
    #[default]
    Handoff,
    /// Poll without pause: the lowest latency, at the price of a whole core. Bells are still answered.
    Spin,
    /// Sleep as soon as there is nothing to do: no CPU while idle, a wake-up (2 µs on the caller's core, 5
    /// to 70 µs across cores) in every cold call.
    Block,
}

impl WaitPolicy {
    /// Its name on command lines and in configuration files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Handoff => "handoff",
            Self::Spin => "spin",
            Self::Block => "block",
        }
    }
}

impl FromStr for WaitPolicy {
    type Err = IpcError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "handoff" => Ok(Self::Handoff),
            "spin" => Ok(Self::Spin),
            "block" => Ok(Self::Block),
            other => {
                Err(IpcError::Config(format!("policy `{other}` is unknown: choose handoff, spin or block")))
            }
        }
    }
}

/// What reactors wait with (F38).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// io_uring if a self-test at the start shows that it works here, else epoll.
    #[default]
    Auto,
    /// io_uring, or no server.
    IoUring,
    /// epoll, with a byte on the session's socket as the bell of a reactor.
    Epoll,
}

impl Backend {
    /// Its name on command lines and in configuration files.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IoUring => "io-uring",
            Self::Epoll => "epoll",
        }
    }
}

impl FromStr for Backend {
    type Err = IpcError;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Auto, Self::IoUring, Self::Epoll]
            .into_iter()
            .find(|backend| backend.as_str() == text)
            .ok_or_else(|| {
                IpcError::Config(format!("backend `{text}` is unknown: choose auto, io-uring or epoll"))
            })
    }
}

/// The limits of a server. `Default` is what `doorbell serve` uses.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Connections over all sessions.
    pub max_connections: u32,
    /// Sessions; each takes three file descriptors: its socket, its process, its segment. All of them are of the
    /// server's own user, for others are refused, so this is also that user's quota.
    pub max_sessions: u32,
    /// Sessions of one process (F29). The default leaves it to `max_sessions`.
    pub max_sessions_per_process: u32,
    /// Sessions whose hello has not come yet; when reached, the kernel's backlog holds the others until the oldest has
    /// had a tenth of `handshake_timeout` (F27). Never more than `max_sessions`.
    pub max_half_open: u32,
    /// Those of one process; whoever comes beyond that without a hello is refused (F27).
    pub max_half_open_per_process: u32,
    /// How long a session may stay half open.
    pub handshake_timeout: Duration,
    /// Largest ring order a client may ask for.
    pub max_ring_order: u8,
    /// Most slot pages a client may ask for.
    pub max_slot_pages: u32,
    /// Lanes of one session, each with a reactor of its own; the client asks for them when it needs them.
    pub max_lanes: u32,
    /// Lanes of all sessions beside their home lanes.
    pub max_further_lanes: u32,
    /// Longest request and longest answer, bytes (R1.5).
    pub max_message_size: u64,
    /// Memory of the server and of everything shared with it, bytes (DESIGN §5). Each session beyond the first hundred
    /// adds 10 KiB to it. What is left over is leased to sessions that carry long bodies.
    pub memory_budget: u64,
    /// Memory, beside the budget, in which each reactor puts requests together for handlers that want them whole,
    /// bytes. One request always has room.
    pub body_memory: u64,
    /// Entries taken from one lane before the next has its turn (S7).
    pub entries_per_turn: u32,
    /// Bytes of requests and answers of one lane before the next has its turn (S7).
    pub bytes_per_turn: u64,
    /// Time of one lane before the next has its turn, as soon as turns are that long (S7). A handler that takes
    /// longer is not interrupted.
    pub turn_time: Duration,
    /// Most of its core that a reactor spends on waiting for calls that are about to come, percent. It spends
    /// nothing unless that saves more than a wake costs.
    pub spin_percent: u32,
    /// How long a client may go on ringing without cause before its session is ended (F24).
    pub storm_patience: Duration,
    /// How often every lane is looked at whether its bell rang or not (S6).
    pub sweep_interval: Duration,
    /// 4 KiB staging buffers of a reactor, made when first needed.
    pub buffer_pool_size: u32,
    /// Directories beneath which clients may have files read; none unless configured. Each is absolute. Without the
    /// feature `messages` no file is read, and a server with directories is refused when it is bound.
    pub file_roots: Vec<PathBuf>,
    /// Longest file that is read for a client, bytes.
    pub max_file_size: u64,
    /// Calls of each reactor that are answered from elsewhere at a time, tickets that are still held of calls that have
    /// ended among them; one more is answered `Overloaded`.
    pub max_deferred: u32,
    /// Deadline, from when the server takes them, of calls that are not answered within their turn and have none of their
    /// own: those of several frames, and those answered from elsewhere. `None`: they may take for ever.
    pub default_deadline: Option<Duration>,
    /// How long a session may do nothing, no call under way and none sent, before it is ended (R4.4). `None`: for ever.
    pub idle_timeout: Option<Duration>,
    /// How long a session may take none of its results while they keep it from being served, its completion ring or the
    /// window of a long answer being full of them, before it is ended (F8, F22). `None`: for ever.
    pub slow_consumer_timeout: Option<Duration>,
    /// How long a server that stops waits for calls that are under way (F49).
    pub drain_timeout: Duration,
    /// How long the server stays when it has no session: one that was started for its clients ends with the last (trap
    /// 13). `None`: until it is stopped.
    pub linger: Option<Duration>,
    /// Processor time that a reactor may use for one round, that is, for one turn of each lane, before the handler that runs
    /// is named in the log (F45).
    pub slow_handler: Duration,
    /// Processor time of one round after which the server aborts: its handler does not come back (F46). `None`: it may
    /// take for ever.
    pub watchdog: Option<Duration>,
    /// How the reactor waits.
    pub policy: WaitPolicy,
    /// What the reactors wait with.
    pub backend: Backend,
    /// Reactors, each a thread with a ring of its own; 0 means one for every core that may be used.
    pub reactors: u32,
    /// Cores for the reactors, in turn; empty means every core that the starting thread may use.
    pub cores: Vec<usize>,
    /// Whether each reactor is pinned to its core. Callers hand over their core to pinned ones only.
    pub pinned: bool,
    /// Whether calls are timed (`ipc_latency_seconds`, requests by type, time by connection): 5 ns for each of many
    /// calls, two looks at the clock (30 ns each) for one that comes alone.
    pub time_calls: bool,
    /// Whether the pages of the executable that only the start needed are let go of once the server has started, and
    /// used ones come back a few at a time. Costs some dozen page faults of a microsecond each; to be turned off in a
    /// process that patches its own code, or shares an executable of hundreds of megabytes with other work.
    pub thin_executable: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_connections: 1000,
            max_sessions: 1024,
            max_sessions_per_process: CONNECTIONS_LIMIT,
            max_half_open: 128,
            max_half_open_per_process: 4,
            handshake_timeout: Duration::from_millis(100),
            max_ring_order: 10,
            max_slot_pages: 1024,
            max_lanes: 4,
            max_further_lanes: 256,
            max_message_size: MESSAGE_MAX,
            memory_budget: 3 << 20,
            body_memory: 64 << 20,
            entries_per_turn: 32,
            bytes_per_turn: 64 << 10,
            turn_time: Duration::from_micros(200),
            spin_percent: 5,
            storm_patience: Duration::from_secs(10),
            sweep_interval: Duration::from_millis(50),
            buffer_pool_size: 100,
            file_roots: Vec::new(),
            max_file_size: 10 << 20,
            max_deferred: 1024,
            default_deadline: None,
            idle_timeout: Some(Duration::from_secs(300)),
            slow_consumer_timeout: Some(Duration::from_secs(30)),
            drain_timeout: Duration::from_secs(5),
            linger: None,
            slow_handler: Duration::from_secs(1),
            watchdog: Some(Duration::from_secs(60)),
            policy: WaitPolicy::default(),
            backend: Backend::default(),
            reactors: 0,
            cores: Vec::new(),
            pinned: true,
            time_calls: true,
            thin_executable: true,
        }
    }
}

/// File descriptors of a session: its socket, its process, its segment.
pub const FDS_PER_SESSION: u64 = 3;
/// File descriptors beside those of sessions: standard streams, rings, listener, lock, directory, spare, and what the
/// embedder opens.
const FDS_BESIDE_SESSIONS: u64 = 64;
/// Reactors whose rings are among them.
const REACTORS_BESIDE_SESSIONS: u64 = 16;
/// File descriptors of a reactor: its ring, twice, and the times of its thread.
const FDS_PER_REACTOR: u64 = 3;
/// Connection numbers have 20 bits of index.
const CONNECTIONS_LIMIT: u32 = 1 << 20;
/// 4 KiB staging buffers; a ring registers 16 384 buffers at most.
const BUFFERS_LIMIT: u32 = 10_000;
/// Reactors of a server.
const REACTORS_LIMIT: u32 = 1024;

impl ServerConfig {
    /// Checks every value against its range.
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] naming the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        let range = |key: &str, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) {
                return Ok(());
            }
            Err(IpcError::Config(format!("{key} is {value}, allowed are {min} to {max}")))
        };
        range("max_connections", self.max_connections.into(), 1, CONNECTIONS_LIMIT.into())?;
        range("max_sessions", self.max_sessions.into(), 1, CONNECTIONS_LIMIT.into())?;
        range("max_sessions_per_process", self.max_sessions_per_process.into(), 1, CONNECTIONS_LIMIT.into())?;
        range("max_half_open", self.max_half_open.into(), 1, CONNECTIONS_LIMIT.into())?;
        let (per_process, most) = (self.max_half_open_per_process.into(), CONNECTIONS_LIMIT.into());
        range("max_half_open_per_process", per_process, 1, most)?;
        range("handshake_timeout (ms)", self.handshake_timeout.as_millis() as u64, 1, 60_000)?;
        range("max_ring_order", self.max_ring_order.into(), 3, 10)?;
        range("max_slot_pages", self.max_slot_pages.into(), 1, 1024)?;
        range("max_lanes", self.max_lanes.into(), 1, LANES_MAX.into())?;
        range("max_further_lanes", self.max_further_lanes.into(), 0, CONNECTIONS_LIMIT.into())?;
        range("max_message_size", self.max_message_size, 1, 1 << 31)?;
        range("memory_budget", self.memory_budget, BUDGET_MIN, 1 << 40)?;
        range("body_memory", self.body_memory, 1, 1 << 40)?;
        range("entries_per_turn", self.entries_per_turn.into(), 1, 1024)?;
        range("bytes_per_turn", self.bytes_per_turn, 1, 1 << 30)?;
        range("turn_time (us)", self.turn_time.as_micros() as u64, 1, 1_000_000)?;
        range("spin_percent", self.spin_percent.into(), 0, 100)?;
        range("storm_patience (ms)", self.storm_patience.as_millis() as u64, 1, 3_600_000)?;
        range("reactors", self.reactors.into(), 0, REACTORS_LIMIT.into())?;
        range("buffer_pool_size", self.buffer_pool_size.into(), 1, BUFFERS_LIMIT.into())?;
        range("max_deferred", self.max_deferred.into(), 1, ReadySet::MOST.into())?;
        let deadline_ms = self.default_deadline.map_or(1, |after| after.as_millis() as u64);
        range("default_deadline (ms)", deadline_ms, 1, 1 << 40)?;
        let idle_ms = self.idle_timeout.map_or(1, |after| after.as_millis() as u64);
        range("idle_timeout (ms)", idle_ms, 1, 1 << 40)?;
        let slow_ms = self.slow_consumer_timeout.map_or(1, |after| after.as_millis() as u64);
        range("slow_consumer_timeout (ms)", slow_ms, 1, 1 << 40)?;
        range("slow_handler (ms)", self.slow_handler.as_millis() as u64, 1, 3_600_000)?;
        range("watchdog (s)", self.watchdog.map_or(1, |after| after.as_secs()), 1, 86_400)?;
        range("drain_timeout (ms)", self.drain_timeout.as_millis() as u64, 0, 3_600_000)?;
        let linger_ms = self.linger.map_or(1, |after| after.as_millis() as u64);
        range("linger (ms)", linger_ms, 1, 1 << 40)?;
        range("max_file_size", self.max_file_size, 1, 1 << 40)?;
        range("sweep_interval (ms)", self.sweep_interval.as_millis() as u64, 1, 60_000)
    }

    /// File descriptors that a server of this configuration may need at once: three for each session (socket, process,
    /// segment), those of files that are read for clients, and 64 beside them, or more if there are more than 16
    /// reactors. Under epoll the bell of each further lane takes one, too, which is not among them: where there is none
    /// left, a session goes without the lane.
    pub fn descriptors_needed(&self) -> u64 {
        // Cores that cannot be asked for are reported when the server starts.
        let reactors = self.count_reactors().unwrap_or(1).saturating_sub(REACTORS_BESIDE_SESSIONS);
        FDS_PER_SESSION * u64::from(self.max_sessions)
            + FDS_PER_REACTOR * reactors
            + self.descriptors_of_files()
            + FDS_BESIDE_SESSIONS
    }

    /// One for each root, and those of the files that all reactors may read at once; none without roots.
    fn descriptors_of_files(&self) -> u64 {
        if self.file_roots.is_empty() {
            return 0;
        }
        // Cores that may not be used are refused when the server starts.
        let reactors = reactor_cores(self).map_or(1, |cores| cores.len());
        (self.file_roots.len() + reactors * FILE_READS_MAX) as u64
    }

    /// Raises the soft limit of file descriptors to the hard one and checks that it carries the sessions
    /// configured, three descriptors each (socket, process, segment), and 64 beside them, or more if there are more than
    /// 16 reactors (F39).
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] with both numbers when the hard limit is too low; the soft limit is as it was.
    pub fn raise_file_limit(&self) -> Result<()> {
        let sessions = self.max_sessions;
        check_file_limit(self.descriptors_needed() - FDS_BESIDE_SESSIONS).map_err(|error| match error {
            IpcError::Config(why) => {
                IpcError::Config(format!("max_sessions = {sessions}: {why}; or lower max_sessions"))
            }
            other => other,
        })?;
        // All of it: half-open sessions and what handlers open take descriptors, too.
        raise_soft_file_limit()
    }

    /// How many reactors there will be.
    fn count_reactors(&self) -> Result<u64> {
        if self.reactors > 0 {
            return Ok(self.reactors.into());
        }
        if !self.cores.is_empty() {
            return Ok(self.cores.len() as u64);
        }
        let cores =
            rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
        Ok(cores.count().into())
    }
}

/// Raises the soft limit of file descriptors to the hard one, if `needed` of them and some spare ones do
/// not fit below it.
///
/// # Errors
///
/// [`IpcError::Config`] with both numbers when the hard limit is too low.
pub fn raise_file_limit(needed: u64) -> Result<()> {
    check_file_limit(needed)?;
    let soft = getrlimit(Resource::Nofile).current;
    if soft.is_some_and(|soft| soft < needed + FDS_BESIDE_SESSIONS) {
        raise_soft_file_limit()
    } else {
        Ok(())
    }
}

fn check_file_limit(needed: u64) -> Result<()> {
    let needed = needed + FDS_BESIDE_SESSIONS;
    match getrlimit(Resource::Nofile).maximum {
        Some(hard) if hard < needed => Err(IpcError::Config(format!(
            "{needed} file descriptors are needed, the hard limit is {hard}: raise it (ulimit -Hn {needed})"
        ))),
        _ => Ok(()),
    }
}

fn raise_soft_file_limit() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
        .map_err(|e| IpcError::io("setrlimit(RLIMIT_NOFILE)", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   F39: descriptors of files are asked for where files are read, and only there.
    #[test]
    fn f39_files_that_are_read_need_descriptors_of_their_own() {
        let without = ServerConfig { reactors: 3, max_sessions: 10, ..ServerConfig::default() };
        let with = ServerConfig { file_roots: vec!["/a".into(), "/b".into()], ..without.clone() };
        assert_eq!(without.descriptors_needed(), 94);
        assert_eq!(with.descriptors_needed(), 94 + 2 + 3 * 32);
    }

    #[test]
    fn a_value_out_of_range_is_named_with_its_range() {
        ServerConfig::default().check().unwrap();
        let config = ServerConfig { max_connections: 0, ..ServerConfig::default() };
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("max_connections is 0") && error.contains("1048576"), "{error}");
        for (value, key) in
            [(0, "buffer_pool_size is 0"), (10_001, "buffer_pool_size is 10001, allowed are 1 to 10000")]
        {
            let config = ServerConfig { buffer_pool_size: value, ..ServerConfig::default() };
            assert!(config.check().unwrap_err().to_string().contains(key));
        }
        assert!("poll".parse::<WaitPolicy>().unwrap_err().to_string().contains("spin or block"));
        assert_eq!("handoff".parse::<WaitPolicy>().unwrap(), WaitPolicy::default());
    }
}

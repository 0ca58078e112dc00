//! `doorbell serve`: a ready server.

use super::log::{Log, LogFormat};
use clap::Args;
use doorbell::config::file::{ConfigFile, socket_path};
use doorbell::exporter::Exporter;
use doorbell::provider::{HasProviders, HostHandle, ProviderHost, ProviderPool};
use doorbell::{HandlerTable, IpcServer, ServerConfig, WaitPolicy};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

static TABLE: HandlerTable<State> = HandlerTable::with_builtins().register_provider_handlers();

/// What handlers share.
struct State {
    providers: HostHandle,
    file_model: String,
}

impl HasProviders for State {
    fn providers(&self) -> &HostHandle {
        &self.providers
    }

    fn file_model(&self) -> &str {
        &self.file_model
    }
}

/// Run a server with the built-in handlers: ping, echo, stats, analyze-file, and complete and chat, which its providers
/// answer; without a configuration that is a loopback.
#[derive(Debug, Args)]
pub struct ServeOptions {
    /// Configuration file, see `doorbell config default`. Options given here override it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How the server waits: `handoff` sleeps and lets callers hand over their core, `block` sleeps, `spin` burns
    /// a core for the lowest latency [default: handoff]
    #[arg(long, value_name = "POLICY")]
    policy: Option<WaitPolicy>,
    /// Connections over all sessions [default: 1000]
    #[arg(long, value_name = "N")]
    max_connections: Option<u32>,
    /// Sessions, that is, connected client processes [default: 1024]
    #[arg(long, value_name = "N")]
    max_sessions: Option<u32>,
    /// Sessions of one client process [default: --max-sessions]
    #[arg(long, value_name = "N")]
    max_sessions_per_process: Option<u32>,
    /// Reactors, each a thread; 0 means one for every core that may be used [default: 0]
    #[arg(long, value_name = "N")]
    reactors: Option<u32>,
    /// Cores for the reactors, separated by commas [default: all that may be used]
    #[arg(long, value_name = "CPUS", value_delimiter = ',')]
    cores: Option<Vec<usize>>,
    /// Leave the reactors to the scheduler: callers then cannot hand over their core.
    #[arg(long)]
    unpinned: bool,
    /// Directory beneath which clients may have files analysed; may be given several times. Without it none is read.
    #[arg(long = "root", value_name = "DIR")]
    roots: Vec<PathBuf>,
    /// Longest file that is analysed [default: 10485760]
    #[arg(long, value_name = "BYTES")]
    max_file_size: Option<u64>,
    /// Log what happens to single sessions, too.
    #[arg(long, short)]
    verbose: bool,
    /// How lines of the log look.
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    log_format: LogFormat,
}

impl ServeOptions {
    /// The limits of the file, as far as no option says otherwise.
    fn limits(&self, file: ServerConfig) -> Result<ServerConfig, Box<dyn Error>> {
        let roots = if self.roots.is_empty() { &file.file_roots } else { &self.roots };
        let file_roots = roots.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
        let max_sessions = self.max_sessions.unwrap_or(file.max_sessions);
        Ok(ServerConfig {
            policy: self.policy.unwrap_or(file.policy),
            max_connections: self.max_connections.unwrap_or(file.max_connections),
            max_sessions,
            max_sessions_per_process: self.max_sessions_per_process.unwrap_or(file.max_sessions_per_process),
            max_half_open: file.max_half_open.min(max_sessions),
            reactors: self.reactors.unwrap_or(file.reactors),
            cores: self.cores.clone().unwrap_or_else(|| file.cores.clone()),
            pinned: file.pinned && !self.unpinned,
            file_roots,
            max_file_size: self.max_file_size.unwrap_or(file.max_file_size),
            ..file
        })
    }
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &ServeOptions) -> Result<(), Box<dyn Error>> {
    let log = Log::start(options.log_format, options.verbose);
    survive_a_file_size_limit()?;
    let file = ConfigFile::load(options.config.as_deref())?;
    let path = options.socket.clone().unwrap_or_else(|| socket_path(&file));
    let config = options.limits(file.ipc.server)?;
    let pool = ProviderPool::from_config(&file.ai)?;
    let host = ProviderHost::start(Arc::new(pool))?;
    let state = State { providers: host.handle(), file_model: file.ai.file_model };
    let bound = IpcServer::new(&TABLE, state).config(config).bind(path)?;
    let _exporter = Exporter::start(bound.metrics(), &file.metrics)?;
    let stop = bound.shutdown_handle();
    for signal in [SIGTERM, SIGINT] {
        // The signal handler writes a byte that the reactor waits for on its ring (F41).
        signal_hook::low_level::pipe::register(signal, stop.descriptor().try_clone()?)?;
    }
    limit_panic_messages();
    log.say(format_args!("serving at {}", bound.path().display()));
    let metrics = bound.serve()?;
    let (calls, sessions) = (metrics.calls_total(), metrics.sessions_opened);
    log.say(format_args!("stopped after {calls} calls in {sessions} sessions"));
    Ok(())
}

/// Writes to stderr. Whether that can be written is no business of the clients' (F41): a full disk or a closed pipe
/// behind it stops nobody, as a panic of `eprintln!` would.
fn say(text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    std::io::stderr().write_fmt(text).ok();
}

/// A segment that does not fit RLIMIT_FSIZE shall be an error of one handshake (F33), not the end of the server, as
/// the signal is that the kernel sends for it beside the error.
fn survive_a_file_size_limit() -> std::io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(|_| ())
}

/// A handler that panics at every call must not fill the log (F43): the first ten panics are printed, then
/// every thousandth.
fn limit_panic_messages() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static PANICS: AtomicU64 = AtomicU64::new(0);
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let n = PANICS.fetch_add(1, Ordering::Relaxed) + 1;
        if n <= 10 || n.is_multiple_of(1000) {
            say(format_args!("doorbell: panic {n}: "));
            print(info);
        }
    }));
}

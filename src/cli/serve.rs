//! `doorbell serve`: a ready server.

use super::caretaker::{Signals, Steward};
use super::log::{Log, LogFormat};
use super::notify::{LISTENER, Manager};
use clap::Args;
use doorbell::config::file::ConfigFile;
use doorbell::config::{Ipc, LogLevel, MetricsAddress, MetricsConfig};
use doorbell::exporter::Exporter;
use doorbell::provider::{HasProviders, HostHandle, ProviderHost, ProviderPool};
use doorbell::{Backend, BoundServer, HandlerTable, IpcServer, ServerConfig, WaitPolicy};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use std::error::Error;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

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
#[derive(Debug, Clone, Args)]
pub struct ServeOptions {
    /// Configuration file, see `doorbell config default`. Options given here override it. SIGHUP reads it again.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How the server waits: `handoff` sleeps and lets callers hand over their core, `block` sleeps, `spin` burns
    /// a core for the lowest latency [default: handoff]
    #[arg(long, value_name = "POLICY")]
    policy: Option<WaitPolicy>,
    /// What the server waits with: `io-uring`, `epoll`, or `auto`, which is io_uring if it works here [default: auto]
    #[arg(long, value_name = "BACKEND")]
    backend: Option<Backend>,
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
    /// Stop when there has been no session for so long, seconds; may be a fraction [default: go on until stopped]
    #[arg(long, value_name = "SECS", value_parser = parse_linger)]
    linger: Option<Duration>,
    /// Give the listening socket to the service manager's store, so that no client finds it closed while the server is
    /// started again.
    #[arg(long)]
    store_socket: bool,
    /// Let debuggers and core dumps at this process, and with them at what its clients send.
    #[arg(long)]
    debuggable: bool,
    /// Do not give up files and system calls that the server does not need.
    #[arg(long)]
    unrestricted: bool,
    /// Log what happens to single sessions, too.
    #[arg(long, short)]
    verbose: bool,
    /// How lines of the log look.
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    log_format: LogFormat,
}

impl ServeOptions {
    /// What the file says, as far as no option says otherwise.
    pub fn apply(&self, file: Ipc) -> Result<Ipc, Box<dyn Error>> {
        let socket_path = self.socket.clone().or(file.socket_path);
        Ok(Ipc { socket_path, server: self.limits(file.server)?, ..file })
    }

    /// Keeps to the files that a server of this configuration needs.
    #[cfg(feature = "hardening")]
    fn give_up_files(&self, socket: &Path, config: &ServerConfig, metrics: &MetricsConfig) {
        use super::harden::{Files, keep_to};
        if self.unrestricted {
            return;
        }
        let file = self.config.as_deref().and_then(|path| std::path::absolute(path).ok());
        let roots = &config.file_roots;
        // What is not there yet cannot be kept.
        if let Err(error) = doorbell::prepare_default_directory(socket) {
            tracing::warn!(%error, "the socket's directory could not be made");
        }
        let written = written_for_metrics(metrics);
        match keep_to(&Files { socket, config: file.as_deref(), roots, written: &written }) {
            Ok(landlock::RulesetStatus::NotEnforced) => {
                tracing::info!("the kernel has no landlock: the server can open what its user can");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the server can open what its user can"),
        }
    }

    /// The level of the log.
    pub fn level(&self, file: LogLevel) -> LevelFilter {
        match file {
            _ if self.verbose => LevelFilter::DEBUG,
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
        }
    }

    /// The limits of the file, as far as no option says otherwise.
    fn limits(&self, file: ServerConfig) -> Result<ServerConfig, Box<dyn Error>> {
        let roots = if self.roots.is_empty() { &file.file_roots } else { &self.roots };
        let file_roots = roots.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
        Ok(ServerConfig {
            policy: self.policy.unwrap_or(file.policy),
            backend: self.backend.unwrap_or(file.backend),
            max_connections: self.max_connections.unwrap_or(file.max_connections),
            max_sessions: self.max_sessions.unwrap_or(file.max_sessions),
            max_sessions_per_process: self.max_sessions_per_process.unwrap_or(file.max_sessions_per_process),
            reactors: self.reactors.unwrap_or(file.reactors),
            cores: self.cores.clone().unwrap_or_else(|| file.cores.clone()),
            pinned: file.pinned && !self.unpinned,
            file_roots,
            max_file_size: self.max_file_size.unwrap_or(file.max_file_size),
            linger: self.linger.or(file.linger),
            ..file
        })
    }
}

/// Directories that the exporter of metrics writes to.
#[cfg(feature = "hardening")]
fn written_for_metrics(metrics: &MetricsConfig) -> Vec<PathBuf> {
    let socket = match &metrics.listen {
        Some(MetricsAddress::Unix(path)) => Some(path),
        Some(MetricsAddress::Tcp(_)) | None => None,
    };
    let files = metrics.textfile.iter().chain(socket);
    files.filter_map(|path| std::path::absolute(path).ok()?.parent().map(Path::to_owned)).collect()
}

fn parse_linger(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    let linger = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    if linger < Duration::from_millis(1) { Err("at least 0.001".to_owned()) } else { Ok(linger) }
}

/// Serves until SIGTERM or SIGINT, or until it has lingered for long enough.
pub fn run(options: &ServeOptions) -> Result<(), Box<dyn Error>> {
    // Before anything else opens descriptors.
    let inherited = doorbell_uring::inherited_descriptors()?;
    survive_a_file_size_limit()?;
    let file = ConfigFile::load(options.config.as_deref())?;
    let running = options.apply(file.ipc)?;
    let (log, set_level) = Log::start(options.log_format, options.level(running.log_level))?;
    let path = match &running.socket_path {
        Some(path) => std::path::absolute(path)?,
        None => doorbell::default_socket_path(),
    };
    // Certificates may lie anywhere, and are read here.
    let pool = ProviderPool::from_config(&file.ai)?;
    // Before the first thread: those that are started later are restricted with this one.
    #[cfg(feature = "hardening")]
    options.give_up_files(&path, &running.server, &file.metrics);
    let host = ProviderHost::start(Arc::new(pool))?;
    let state = State { providers: host.handle(), file_model: file.ai.file_model.clone() };
    let manager = Manager::from_environment()?.map(Arc::new);
    let server = IpcServer::new(&TABLE, state).config(running.server.clone());
    // Whoever sees the socket may stop the server: that must not kill it before it can be told.
    let asked_to_stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&asked_to_stop))?;
    }
    let bound = listen(server, inherited, &path, manager.as_deref(), options.store_socket)?;
    // Before what stops the server: who has to tell of it hears of it first.
    let signals = Signals::listen(options.config.is_some())?;
    stop_by_signals(&bound, options.config.is_some())?;
    if asked_to_stop.load(Relaxed) {
        bound.shutdown_handle().shutdown()?;
    }
    let _exporter = Exporter::start(bound.metrics(), &file.metrics)?;
    let steward = Steward {
        signals,
        manager: manager.clone(),
        reload: bound.reload_handle(),
        options: options.clone(),
        running,
        providers: file.ai,
        metrics: file.metrics,
        set_level,
    };
    limit_panic_messages();
    let ready = become_ready(bound.path(), options, manager, log);
    let metrics = bound.caretaker(steward).on_ready(ready).serve()?;
    let (calls, sessions) = (metrics.calls_total(), metrics.sessions_opened);
    log.say(format_args!("stopped after {calls} calls in {sessions} sessions"));
    Ok(())
}

/// Takes the socket that the service manager has handed over, if it has, or one of our own.
fn listen(
    server: IpcServer<State>,
    inherited: Vec<(String, OwnedFd)>,
    path: &Path,
    manager: Option<&Manager>,
    store: bool,
) -> Result<BoundServer<State>, Box<dyn Error>> {
    if inherited.len() > 1 {
        return Err(format!("{} sockets were handed over, one is wanted", inherited.len()).into());
    }
    if let Some((name, socket)) = inherited.into_iter().next() {
        tracing::info!(name, "the listening socket was handed over");
        return Ok(server.inherit(socket, path)?);
    }
    let bound = server.bind(path)?;
    let Some(manager) = manager.filter(|_| store) else { return Ok(bound) };
    let fd = Some(bound.listening_socket());
    manager.tell(&format!("FDSTORE=1\nFDNAME={LISTENER}\nFDPOLL=0"), fd);
    Ok(bound.leave_socket())
}

/// Has SIGTERM and SIGINT stop the server, and SIGHUP, too, where there is nothing to be read again: a server that was
/// started from a terminal goes with it.
fn stop_by_signals(bound: &BoundServer<State>, reloads: bool) -> std::io::Result<()> {
    let stop = bound.shutdown_handle();
    let hang_up = if reloads { None } else { Some(SIGHUP) };
    for signal in [SIGTERM, SIGINT].into_iter().chain(hang_up) {
        // The signal handler writes a byte that the reactor waits for on its ring (F41).
        signal_hook::low_level::pipe::register(signal, stop.descriptor().try_clone()?)?;
    }
    Ok(())
}

/// What is to be done when every reactor can begin: closing the process to others, telling whoever waits for it.
fn become_ready(
    path: &Path,
    options: &ServeOptions,
    manager: Option<Arc<Manager>>,
    log: Log,
) -> impl FnOnce() + Send + use<> {
    let path = path.to_owned();
    let debuggable = options.debuggable;
    #[cfg(feature = "hardening")]
    let unrestricted = options.unrestricted;
    move || {
        #[cfg(feature = "hardening")]
        if !unrestricted && let Err(error) = super::harden::refuse_calls() {
            tracing::warn!(%error, "system calls that no server needs are not refused");
        }
        if !debuggable {
            use rustix::process::{DumpableBehavior, set_dumpable_behavior};
            if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
                tracing::warn!(%error, "debuggers of the same user can look into this process");
            }
        }
        log.say(format_args!("serving at {}", path.display()));
        if let Some(manager) = manager {
            manager.tell("READY=1\nSTATUS=serving", None);
        }
    }
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

//! `doorbell serve`: a ready server.

use clap::Args;
use doorbell::{HandlerTable, IpcServer, ServerConfig, WaitPolicy, default_socket_path};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::error::Error;
use std::path::PathBuf;
use tracing_subscriber::filter::LevelFilter;

static TABLE: HandlerTable<()> = HandlerTable::with_builtins();

/// Run a server with the built-in handlers: ping, echo, stats, analyze-file.
#[derive(Debug, Args)]
pub struct ServeOptions {
    /// Socket path [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How the server waits: `handoff` sleeps and lets callers hand over their core, `block` sleeps, `spin` burns
    /// a core for the lowest latency.
    #[arg(long, value_name = "POLICY", default_value = "handoff")]
    policy: WaitPolicy,
    /// Connections over all sessions.
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().max_connections)]
    max_connections: u32,
    /// Sessions, that is, connected client processes.
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().max_sessions)]
    max_sessions: u32,
    /// Reactors, each a thread; 0 means one for every core that may be used.
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().reactors)]
    reactors: u32,
    /// Cores for the reactors, separated by commas [default: all that may be used].
    #[arg(long, value_name = "CPUS", value_delimiter = ',')]
    cores: Vec<usize>,
    /// Leave the reactors to the scheduler: callers then cannot hand over their core.
    #[arg(long)]
    unpinned: bool,
    /// Directory beneath which clients may have files analysed; may be given several times. Without it none is read.
    #[arg(long = "root", value_name = "DIR")]
    roots: Vec<PathBuf>,
    /// Longest file that is analysed.
    #[arg(long, value_name = "BYTES", default_value_t = ServerConfig::default().max_file_size)]
    max_file_size: u64,
    /// Log what happens to single sessions, too.
    #[arg(long, short)]
    verbose: bool,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &ServeOptions) -> Result<(), Box<dyn Error>> {
    let level = if options.verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
    let file_roots = options.roots.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
    let config = ServerConfig {
        policy: options.policy,
        max_connections: options.max_connections,
        max_sessions: options.max_sessions,
        max_half_open: ServerConfig::default().max_half_open.min(options.max_sessions),
        reactors: options.reactors,
        cores: options.cores.clone(),
        pinned: !options.unpinned,
        file_roots,
        max_file_size: options.max_file_size,
        ..ServerConfig::default()
    };
    let path = options.socket.clone().unwrap_or_else(default_socket_path);
    let bound = IpcServer::new(&TABLE, ()).config(config).bind(path)?;
    let stop = bound.shutdown_handle();
    for signal in [SIGTERM, SIGINT] {
        // The signal handler writes a byte that the reactor waits for on its ring (F41).
        signal_hook::low_level::pipe::register(signal, stop.descriptor().try_clone()?)?;
    }
    limit_panic_messages();
    eprintln!("doorbell: serving at {}", bound.path().display());
    let metrics = bound.serve()?;
    eprintln!(
        "doorbell: stopped after {} calls in {} sessions",
        metrics.calls_total(),
        metrics.sessions_opened
    );
    Ok(())
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
            eprint!("doorbell: panic {n}: ");
            print(info);
        }
    }));
}

//! `doorbell doctor`: does doorbell work well on this machine, what will it use, what should be changed?
//!
//! `probe` finds out, `judge` judges, `report` prints; `findings` is what the first hands to the second.

mod check;
pub mod findings;
mod judge;
mod plan;
mod probe;
mod report;

use clap::Args;
use doorbell::{ServerConfig, default_socket_path};
use report::{Report, Style};
use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// What the help says beside the options.
const HELP: &str = "\
Exit status:
  0  a server will run well here; there may be notes
  1  a server will not run here, or clients cannot use it: something has failed
  2  wrong usage
  3  a server will run here, with warnings

Everything is tried, not guessed: the doctor makes a ring, memory and threads, starts a server on a path of its own \
in the directory for temporary files and calls it, and leaves nothing behind. A server that already listens at the \
socket path sees one session come and go. Where it may, it holds /dev/cpu_dma_latency at 0 for some milliseconds \
to measure what that brings.";

/// Check whether doorbell works well on this machine, what it will use and why, and what to change.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct DoctorOptions {
    /// Socket path to check [default: doorbell.sock in $XDG_RUNTIME_DIR, /run/user/UID or /tmp/doorbell-UID]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Sessions that the limits of this machine are checked against.
    #[arg(long, value_name = "N", default_value_t = ServerConfig::default().max_sessions)]
    max_sessions: u32,
    /// Print one JSON object instead of text; its keys are stable.
    #[arg(long)]
    json: bool,
    /// Say why a check matters also where all is well.
    #[arg(long, short)]
    verbose: bool,
}

/// Status of a question that makes no sense, as of a wrong command line.
const WRONG_USAGE: u8 = 2;
/// Columns of the text where there is no terminal, and at least and at most where there is one.
const WIDTH: usize = 110;
const WIDTH_MIN: usize = 60;

/// Checks everything and prints the report; the exit status says how it went.
///
/// # Errors
///
/// If the report cannot be written.
pub fn run(options: &DoctorOptions) -> Result<ExitCode, Box<dyn Error>> {
    let config = ServerConfig { max_sessions: options.max_sessions, ..ServerConfig::default() };
    if let Err(error) = config.check() {
        eprintln!("doorbell: {error}");
        return Ok(ExitCode::from(WRONG_USAGE));
    }
    let socket = options.socket.clone().unwrap_or_else(default_socket_path);
    let report = Report::of(&probe::find_out(&config, &socket));
    let text = if options.json { report.json()? } else { report.text(style(options.verbose)) };
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(ExitCode::from(report.outcome.exit_status()))
}

/// How text looks on the present standard output.
fn style(verbose: bool) -> Style {
    let stdout = std::io::stdout();
    let is_terminal = stdout.is_terminal();
    let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| usize::from(size.ws_col));
    Style {
        // Source: no-color.org: set and not empty means none.
        colour: is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        width: if is_terminal && columns > 0 { columns.clamp(WIDTH_MIN, WIDTH) } else { WIDTH },
        verbose,
    }
}

//! The log of a server: one line for each event, on stderr. Never a payload.

use clap::ValueEnum;
use std::fmt::Arguments;
use std::io::{IsTerminal, Write};
use tracing_subscriber::filter::LevelFilter;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// `human` on a terminal, else `json`.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line: `timestamp`, `level`, `message`, and what belongs to the event.
    Json,
}

/// A log that has been started.
#[derive(Debug, Clone, Copy)]
pub struct Log {
    json: bool,
}

impl Log {
    /// Starts the log of this process; `verbose` for what happens to single sessions, too.
    pub fn start(format: LogFormat, verbose: bool) -> Self {
        let json = match format {
            LogFormat::Auto => !std::io::stderr().is_terminal(),
            LogFormat::Human => false,
            LogFormat::Json => true,
        };
        let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
        let log =
            tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
        // A line that cannot be written must not end the server, as complaining about it on the same stderr would.
        let log = log.log_internal_errors(false);
        match json {
            true => log.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
            false => log.init(),
        }
        Self { json }
    }

    /// Says something that is no event of the server's work: that it serves, or has stopped. Whether that can be written
    /// is no business of the clients' (F41): a full disk or a closed pipe behind it stops nobody, as a panic of
    /// `eprintln!` would.
    pub fn say(self, what: Arguments<'_>) {
        match self.json {
            true => tracing::info!("{what}"),
            false => std::io::stderr().write_fmt(format_args!("doorbell: {what}\n")).ok().unwrap_or_default(),
        }
    }
}

//! The log of a server: one line for each event, on stderr. Never a payload.

use super::caretaker::SetLevel;
use clap::ValueEnum;
use std::fmt::Arguments;
use std::io::{IsTerminal, Write};
use tracing::Subscriber;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

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
    /// Starts the log of this process; what is returned beside it changes its level.
    pub fn start(format: LogFormat, level: LevelFilter) -> (Self, SetLevel) {
        let json = match format {
            LogFormat::Auto => !std::io::stderr().is_terminal(),
            LogFormat::Human => false,
            LogFormat::Json => true,
        };
        let log = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::stderr);
        // A line that cannot be written must not end the server, as complaining about it on the same stderr would.
        let log = log.with_target(false).log_internal_errors(false);
        let set_level = match json {
            true => {
                let log = log.json().flatten_event(true).with_current_span(false).with_span_list(false);
                begin(log.finish(), level)
            }
            false => begin(log.finish(), level),
        };
        (Self { json }, set_level)
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

/// Logs by `log` from here on, as far as the level allows.
fn begin<S: Subscriber + Send + Sync>(log: S, level: LevelFilter) -> SetLevel {
    let (filter, handle) = tracing_subscriber::reload::Layer::new(level);
    log.with(filter).init();
    Box::new(move |level| {
        if let Err(error) = handle.reload(level) {
            tracing::error!(%error, "the level of the log could not be changed");
        }
    })
}

//! The log of a server: one line for each event, on stderr, or one entry of the journal. Never a payload.

use super::caretaker::SetLevel;
use clap::ValueEnum;
use std::error::Error;
use std::fmt::Arguments;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use tracing::Subscriber;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// `human` on a terminal, `journal` where systemd has connected stderr with its journal, else `json`.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line: `timestamp`, `level`, `message`, and what belongs to the event.
    Json,
    /// Entries of systemd's journal, with fields of their own for what belongs to the event: `SESSION`, `REASON`, …
    Journal,
}

/// A log that has been started.
#[derive(Debug, Clone, Copy)]
pub struct Log {
    /// For programs: everything is an event.
    structured: bool,
}

impl Log {
    /// Starts the log of this process; what is returned beside it changes its level.
    ///
    /// # Errors
    ///
    /// If the journal was asked for and cannot be reached.
    pub fn start(format: LogFormat, level: LevelFilter) -> Result<(Self, SetLevel), Box<dyn Error>> {
        let is_auto = format == LogFormat::Auto;
        let format = match format {
            LogFormat::Auto if stderr_is_the_journal() => LogFormat::Journal,
            LogFormat::Auto if std::io::stderr().is_terminal() => LogFormat::Human,
            LogFormat::Auto => LogFormat::Json,
            chosen => chosen,
        };
        if format == LogFormat::Journal {
            match tracing_journald::layer() {
                Ok(journal) => {
                    let log = Registry::default().with(journal.with_field_prefix(None));
                    return Ok((Self { structured: true }, begin(log, level)));
                }
                Err(error) if is_auto => {
                    // The journal takes lines from stderr, too.
                    let started = Self::start(LogFormat::Json, level)?;
                    tracing::warn!(%error, "the journal cannot be reached as it should be: lines of JSON go to stderr");
                    return Ok(started);
                }
                Err(error) => {
                    let why = format!("the journal cannot be reached: {error}; choose another --log-format");
                    return Err(why.into());
                }
            }
        }
        let log = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::stderr);
        // A line that cannot be written must not end the server, as complaining about it on the same stderr would.
        let log = log.with_target(false).log_internal_errors(false);
        let structured = format == LogFormat::Json;
        let set_level = match structured {
            true => {
                let log = log.json().flatten_event(true).with_current_span(false).with_span_list(false);
                begin(log.finish(), level)
            }
            false => begin(log.finish(), level),
        };
        Ok((Self { structured }, set_level))
    }

    /// Says something that is no event of the server's work: that it serves, or has stopped. Whether that can be written
    /// is no business of the clients' (F41): a full disk or a closed pipe behind it stops nobody, as a panic of
    /// `eprintln!` would.
    pub fn say(self, what: Arguments<'_>) {
        match self.structured {
            true => tracing::info!("{what}"),
            false => std::io::stderr().write_fmt(format_args!("doorbell: {what}\n")).ok().unwrap_or_default(),
        }
    }
}

/// Whether systemd has connected stderr with the journal: its device and inode are the ones that `$JOURNAL_STREAM` names
/// (systemd.exec(5)). The variable alone may have been inherited by somebody who has another stderr.
fn stderr_is_the_journal() -> bool {
    let Some(stream) = std::env::var("JOURNAL_STREAM").ok() else { return false };
    let Ok(stderr) = rustix::fs::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stderr.st_dev, stderr.st_ino)
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

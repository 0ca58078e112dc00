//! Tells others what a server counts: a line in the log and a text file now and then, and the text of Prometheus by HTTP
//! (R4.6). On a thread of its own, which sleeps in poll(2): no reactor is disturbed.

mod http;
mod summary;
mod textfile;

use crate::MetricsReader;
use crate::config::{MetricsAddress, MetricsConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use summary::Summary;

/// Bytes of the thread's stack.
const STACK: usize = 256 << 10;

/// Why metrics cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// The address cannot be had.
    #[error(
        "metrics cannot be served at {address}: {source}; choose another `listen` in [metrics], or leave it out"
    )]
    Listen {
        /// As configured.
        address: MetricsAddress,
        /// What the kernel said.
        source: io::Error,
    },
    /// The text file cannot be written.
    #[error("metrics cannot be written to {}: {source}; choose another `textfile` in [metrics], or leave it out", path.display())]
    Textfile {
        /// As configured.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel gives no thread, or no descriptors.
    #[error("the thread that tells metrics could not be started: {0}")]
    Thread(io::Error),
}

/// Tells what a server counts until it is dropped.
#[derive(Debug)]
pub struct Exporter {
    /// The end of a pipe: dropped, it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    address: Option<MetricsAddress>,
}

impl Exporter {
    /// Starts to tell what `reader` reads, as `config` says. A text file is written at once, so that a place where it
    /// cannot be is found out here.
    ///
    /// # Errors
    ///
    /// An [`ExporterError`] that names what cannot be had.
    pub fn start(reader: MetricsReader, config: &MetricsConfig) -> Result<Self, ExporterError> {
        if !config.enable || (config.export_interval.is_none() && config.listen.is_none()) {
            return Ok(Self { stop: None, thread: None, address: None });
        }
        let interval = config.export_interval;
        let textfile = config.textfile.clone().filter(|_| interval.is_some());
        if let Some(path) = &textfile {
            textfile::write(path, &reader.export_prometheus())
                .map_err(|source| ExporterError::Textfile { path: path.clone(), source })?;
        }
        let http = match &config.listen {
            Some(listen) => {
                let refused = |source| ExporterError::Listen { address: listen.clone(), source };
                Some(http::Server::bind(listen, reader.clone()).map_err(refused)?)
            }
            None => None,
        };
        let address = http.as_ref().map(|http| http.address().clone());
        if let Some(address) = &address {
            tracing::info!(%address, "serving metrics");
        }
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (stopped, stop) = pipe.map_err(|error| ExporterError::Thread(error.into()))?;
        let teller = Teller { reader, interval, textfile, summary: Summary::default(), is_told: false };
        let thread = std::thread::Builder::new().name("metrics".into()).stack_size(STACK);
        let thread = thread.spawn(move || tell(teller, http, &stopped)).map_err(ExporterError::Thread)?;
        Ok(Self { stop: Some(stop), thread: Some(thread), address })
    }

    /// Where metrics are served, the port that the kernel chose included.
    pub fn address(&self) -> Option<&MetricsAddress> {
        self.address.as_ref()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_panic)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("the thread that tells metrics panicked");
        }
    }
}

/// Tells by the clock, and whoever asks, until the other end of the pipe is closed.
fn tell(mut teller: Teller, mut http: Option<http::Server>, stopped: &OwnedFd) {
    let mut due = teller.next();
    loop {
        let mut waiting = vec![PollFd::new(stopped, PollFlags::IN)];
        if let Some(http) = &http {
            http.watch(&mut waiting);
        }
        let until = [due, http.as_ref().and_then(http::Server::due)].into_iter().flatten().min();
        match poll(&mut waiting, until.map(timeout).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "metrics are told no more"),
        }
        let came: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(waiting);
        if came[0] {
            return;
        }
        if let Some(http) = &mut http {
            http.go_on(&came[1..]);
        }
        if due.is_some_and(|due| due <= Instant::now()) {
            teller.tell();
            due = teller.next();
        }
    }
}

/// From now until then.
fn timeout(until: Instant) -> Timespec {
    let left = until.saturating_duration_since(Instant::now());
    Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() }
}

/// What is told every interval: a line and a text file.
#[derive(Debug)]
struct Teller {
    reader: MetricsReader,
    interval: Option<Duration>,
    textfile: Option<PathBuf>,
    summary: Summary,
    /// That the file cannot be written has been logged.
    is_told: bool,
}

impl Teller {
    /// The next time; `None` of somebody who tells nothing by the clock.
    fn next(&self) -> Option<Instant> {
        Instant::now().checked_add(self.interval?)
    }

    fn tell(&mut self) {
        let Some(interval) = self.interval else { return };
        let metrics = self.reader.read();
        self.summary.log(&metrics, interval);
        let Some(path) = &self.textfile else { return };
        match textfile::write(path, &metrics.export_prometheus()) {
            Ok(()) => self.is_told = false,
            // Once, until it has worked again (F30).
            Err(error) if !self.is_told => {
                self.is_told = true;
                tracing::warn!(path = %path.display(), %error, "metrics could not be written, and are kept trying");
            }
            Err(_) => {}
        }
    }
}

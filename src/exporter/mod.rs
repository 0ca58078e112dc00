//! Tells others what a server counts: a line in the log and a text file now and then, and the text of Prometheus by HTTP
//! (R4.6). On a thread of its own: no reactor is disturbed.
//!
//! HTTP is hyper's, which is part of the command anyway (`openai`); what it does not bound is bounded in `http.rs`.

mod http;
mod summary;
mod textfile;

use crate::MetricsReader;
use crate::config::{MetricsAddress, MetricsConfig};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;
use summary::Summary;
use tokio::sync::oneshot;

/// Bytes of the thread's stack.
const STACK: usize = 256 << 10;

/// A pause of somebody who tells nothing by the clock.
const NEVER: Duration = Duration::from_secs(1 << 30);

/// Dropped, it ends the thread.
#[derive(Debug)]
enum Stop {
    Thread(#[expect(dead_code, reason = "it is there to be dropped")] mpsc::Sender<()>),
    Runtime(#[expect(dead_code, reason = "it is there to be dropped")] oneshot::Sender<()>),
}

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
    stop: Option<Stop>,
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
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("metrics".into()).stack_size(STACK);
        let mut teller = Teller { reader, interval, textfile, summary: Summary::default(), is_told: false };
        let Some(listen) = &config.listen else {
            // No runtime: it would take more memory than all the rest of this.
            let (stop, stopped) = mpsc::channel();
            let work = move || {
                while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(teller.pause()) {
                    teller.tell();
                }
            };
            let thread = thread.spawn(work).map_err(ExporterError::Thread)?;
            return Ok(Self { stop: Some(Stop::Thread(stop)), thread: Some(thread), address: None });
        };
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().enable_io().build().map_err(ExporterError::Thread)?;
        let refused = |source| ExporterError::Listen { address: listen.clone(), source };
        let listener = {
            let _entered = runtime.enter();
            http::Listener::bind(listen).map_err(refused)?
        };
        let address = listener.address().map_err(refused)?;
        tracing::info!(%address, "serving metrics");
        let work = async move {
            let serving = listener.serve(teller.reader.clone());
            let telling = async {
                loop {
                    tokio::time::sleep(teller.pause()).await;
                    teller.tell();
                }
            };
            tokio::select! {
                _ = stopped => {}
                () = serving => {}
                () = telling => {}
            }
        };
        let thread = thread.spawn(move || runtime.block_on(work)).map_err(ExporterError::Thread)?;
        Ok(Self { stop: Some(Stop::Runtime(stop)), thread: Some(thread), address: Some(address) })
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
        if let Some(MetricsAddress::Unix(path)) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(%error, "the socket of the metrics was gone before");
        }
    }
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
    /// Until the next time.
    fn pause(&self) -> Duration {
        self.interval.unwrap_or(NEVER)
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

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
use std::thread::JoinHandle;
use std::time::Duration;
use summary::Summary;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

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
    stop: Option<oneshot::Sender<()>>,
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
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().enable_io().build().map_err(ExporterError::Thread)?;
        let (listener, address) = match &config.listen {
            None => (None, None),
            Some(address) => {
                let refused = |source| ExporterError::Listen { address: address.clone(), source };
                let _entered = runtime.enter();
                let listener = http::Listener::bind(address).map_err(refused)?;
                let address = listener.address().map_err(refused)?;
                tracing::info!(%address, "serving metrics");
                (Some(listener), Some(address))
            }
        };
        let (stop, stopped) = oneshot::channel();
        let work = async move {
            let serving = async {
                match listener {
                    Some(listener) => listener.serve(reader.clone()).await,
                    None => std::future::pending().await,
                }
            };
            let telling = async {
                match interval {
                    Some(interval) => tell(&reader, interval, textfile).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = stopped => {}
                () = serving => {}
                () = telling => {}
            }
        };
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .stack_size(STACK)
            .spawn(move || runtime.block_on(work))
            .map_err(ExporterError::Thread)?;
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
        if let Some(MetricsAddress::Unix(path)) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(%error, "the socket of the metrics was gone before");
        }
    }
}

/// A line and a text file every `interval`.
async fn tell(reader: &MetricsReader, interval: Duration, textfile: Option<PathBuf>) {
    let mut ticks = interval_at(Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut summary = Summary::default();
    let mut is_told = false;
    loop {
        ticks.tick().await;
        let metrics = reader.read();
        summary.log(&metrics, interval);
        let Some(path) = &textfile else { continue };
        match textfile::write(path, &metrics.export_prometheus()) {
            Ok(()) => is_told = false,
            // Once, until it has worked again (F30).
            Err(error) if !is_told => {
                is_told = true;
                tracing::warn!(path = %path.display(), %error, "metrics could not be written, and are kept trying");
            }
            Err(_) => {}
        }
    }
}

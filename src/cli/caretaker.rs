//! What `doorbell serve` does beside serving, on the thread that watches over the reactors: reading its configuration
//! again at SIGHUP, and telling the service manager how it is.

use super::notify::{Manager, watchdog_interval};
use super::serve::ServeOptions;
use doorbell::config::file::ConfigFile;
use doorbell::config::reload::{Changes, changes};
use doorbell::config::{Ipc, MetricsConfig};
use doorbell::provider::ProvidersConfig;
use doorbell::{Caretaker, ReloadHandle};
use rustix::pipe::PipeFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

/// Changes the level of the log.
pub type SetLevel = Box<dyn Fn(LevelFilter) + Send>;

/// The signals that it hears of: each sets its word, then writes to the pipe.
pub struct Signals {
    bell: OwnedFd,
    reload: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Signals {
    /// Hears of SIGTERM and SIGINT from here on, and of SIGHUP if the configuration can be read again.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn listen(reloads: bool) -> std::io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let signals = Self { bell: read, reload: Arc::default(), stop: Arc::default() };
        let mut words = vec![(SIGTERM, &signals.stop), (SIGINT, &signals.stop)];
        words.extend(reloads.then_some((SIGHUP, &signals.reload)));
        for (signal, word) in words {
            signal_hook::flag::register(signal, Arc::clone(word))?;
            signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
        }
        Ok(signals)
    }
}

/// The caretaker of `doorbell serve`.
pub struct Steward {
    pub signals: Signals,
    pub manager: Option<Arc<Manager>>,
    pub reload: ReloadHandle,
    pub options: ServeOptions,
    /// What the server runs with.
    pub running: Ipc,
    pub providers: ProvidersConfig,
    pub metrics: MetricsConfig,
    pub set_level: SetLevel,
}

impl Steward {
    fn tell(&self, what: &str) {
        if let Some(manager) = &self.manager {
            manager.tell(what, None);
        }
    }

    /// Reads the configuration again, uses what can be used, and says what cannot.
    fn read_again(&mut self) -> Result<(), Box<dyn Error>> {
        let file = ConfigFile::load(self.options.config.as_deref())?;
        let wanted = self.options.apply(file.ipc)?;
        let Changes { taken, mut later } = changes(&self.running, &wanted);
        self.reload.reload(&wanted.server)?;
        (self.set_level)(self.options.level(wanted.log_level));
        // What holds from the next start on still differs from what runs, and is named again by the next reload.
        let limits = wanted.server.movable();
        self.running.server.adopt(&limits);
        self.running.log_level = wanted.log_level;
        if file.ai != self.providers {
            later.push("ai");
        }
        if file.metrics != self.metrics {
            later.push("metrics");
        }
        let (taken, later) = (taken.join(", "), later.join(", "));
        tracing::info!(taken, "configuration read again");
        if !later.is_empty() {
            tracing::warn!(later, "these keys hold from the next start on");
        }
        Ok(())
    }
}

impl Caretaker for Steward {
    fn bell(&self) -> BorrowedFd<'_> {
        self.signals.bell.as_fd()
    }

    fn rung(&mut self) {
        let mut bytes = [0u8; 64];
        while rustix::io::read(&self.signals.bell, &mut bytes).is_ok_and(|len| len > 0) {}
        if self.signals.stop.swap(false, SeqCst) {
            self.tell("STOPPING=1\nSTATUS=finishing the calls that are under way");
        }
        if self.signals.reload.swap(false, SeqCst) {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            let micros = now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000;
            self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
            match self.read_again() {
                Ok(()) => self.tell("READY=1\nSTATUS=serving"),
                Err(error) => {
                    tracing::error!(%error, "the configuration cannot be used: nothing has changed");
                    self.tell(
                        "READY=1\nSTATUS=serving with the old configuration: the new one cannot be used",
                    );
                }
            }
        }
    }

    fn interval(&self) -> Option<Duration> {
        self.manager.as_ref().and_then(|_| watchdog_interval())
    }

    fn well(&mut self) {
        self.tell("WATCHDOG=1");
    }
}

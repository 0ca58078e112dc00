//! The server's counters, asked for over a session of the parent's own: a witness beside the clients.

use crate::error::StressError;
use doorbell::{CallOptions, ClientConfig, IpcClient, MessageType, WaitPolicy};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::cell::Cell;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the server may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// From one look to the next while it is watched.
const INTERVAL: Duration = Duration::from_millis(25);

/// What a server counts, as its STATS call names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Counters {
    /// Calls answered with success.
    pub calls_ok: u64,
    /// Calls whose memory was taken back.
    pub calls_taken_back: u64,
    /// Bytes of answers.
    pub bytes_out: u64,
    /// Connections open.
    pub connections_open: u64,
    /// Sessions ended.
    pub sessions_ended: u64,
    /// Leases granted.
    pub leases_granted: u64,
    /// Of those, how many had to wait for memory.
    pub leases_waited: u64,
    /// And how long in sum, nanoseconds.
    pub lease_wait_ns: u64,
    /// Leases taken back although they were in use.
    pub leases_forced: u64,
    /// Bytes leased now.
    pub leased_bytes: u64,
    /// Bytes of the budget in use now.
    pub budget_used: u64,
    /// Answers that are being written from elsewhere now.
    pub deferred_live: u64,
    /// Sessions that were ended for breaking the protocol.
    pub protocol_violations: u64,
    /// Calls refused because their message is too long.
    pub calls_too_large: u64,
    /// Bytes reserved now for requests that are put together, beside the budget.
    pub body_bytes: u64,
}

/// What a server has, as its STATS call names it, a few milliseconds ago at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct State {
    /// Sessions open.
    pub sessions_open: u64,
    /// Bytes leased.
    pub leased_bytes: u64,
    /// Bytes of the budget in use.
    pub budget_used: u64,
    /// Bytes reserved for requests that are put together, beside the budget.
    pub body_bytes: u64,
}

/// A session with the server for nothing else.
#[derive(Debug)]
pub struct Monitor {
    client: IpcClient,
    /// Calls that it has made.
    asked: Cell<u64>,
}

impl Monitor {
    /// Connects.
    ///
    /// # Errors
    ///
    /// [`StressError::Ipc`] if the server does not let it.
    pub fn connect(path: &Path) -> Result<Self, StressError> {
        let base = ClientConfig { policy: WaitPolicy::Block, lanes: 1, ..ClientConfig::smallest() };
        let config = ClientConfig { name: "monitor".to_owned(), ..base };
        let client =
            IpcClient::connect_with(path, &config).map_err(StressError::ipc("connecting the monitor"))?;
        Ok(Self { client, asked: Cell::new(0) })
    }

    /// What the server has counted, this monitor's own calls left out.
    ///
    /// # Errors
    ///
    /// [`StressError::Ipc`] if it does not say, [`StressError::Job`] if it says something else.
    pub fn count(&self) -> Result<Counters, StressError> {
        let mut counters: Counters = self.ask()?;
        // The call that asks is not counted yet when it is answered.
        counters.calls_ok -= self.asked.get() - 1;
        Ok(counters)
    }

    /// What the server has, this monitor's own session included.
    ///
    /// # Errors
    ///
    /// As for [`Monitor::count`].
    pub fn state(&self) -> Result<State, StressError> {
        self.ask()
    }

    fn ask<T: DeserializeOwned>(&self) -> Result<T, StressError> {
        let options = CallOptions { timeout: Some(TIMEOUT), ..CallOptions::default() };
        let ask = || {
            let connection = self.client.open()?;
            connection.call_with(MessageType::STATS, b"", &options, |reply| reply.to_vec())?
        };
        let json = ask().map_err(StressError::ipc("asking for counters"))?;
        self.asked.set(self.asked.get() + 1);
        Ok(serde_json::from_slice(&json)?)
    }
}

/// The highest of what was seen, and the last of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes leased at once.
    pub leased_bytes: u64,
    /// Bytes of the budget in use.
    pub budget_used: u64,
    /// Bytes of bodies that were put together.
    pub body_bytes: u64,
}

impl Seen {
    fn add(&mut self, now: &Counters) {
        self.leased_bytes = self.leased_bytes.max(now.leased_bytes);
        self.budget_used = self.budget_used.max(now.budget_used);
        self.body_bytes = self.body_bytes.max(now.body_bytes);
    }
}

/// Watches the counters from a thread of its own.
pub struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<Result<(Monitor, Seen), StressError>>,
}

impl Watch {
    /// Begins.
    pub fn start(monitor: Monitor) -> Self {
        let (stop, stopped) = mpsc::channel();
        let watch = move || {
            let mut seen = Seen::default();
            loop {
                seen.add(&monitor.count()?);
                if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return Ok((monitor, seen));
                }
            }
        };
        Self { stop, thread: std::thread::spawn(watch) }
    }

    /// Ends; the monitor again, and what it has seen.
    ///
    /// # Errors
    ///
    /// What kept it from watching.
    pub fn stop(self) -> Result<(Monitor, Seen), StressError> {
        drop(self.stop);
        self.thread.join().expect("the watch does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peak_is_its_own() {
        let mut seen = Seen::default();
        seen.add(&Counters { leased_bytes: 5, budget_used: 1, ..Counters::default() });
        seen.add(&Counters { leased_bytes: 3, budget_used: 4, body_bytes: 2, ..Counters::default() });
        assert_eq!(seen, Seen { leased_bytes: 5, budget_used: 4, body_bytes: 2 });
    }
}

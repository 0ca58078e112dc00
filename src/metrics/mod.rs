//! What a server counts. Each reactor writes its own counters, unshared; from time to time it copies them to a board
//! that the others can read (`counters.rs`). Calls and their times by type lie in words that the reactor alone writes
//! and anybody reads (`types.rs`, filled by `timing.rs`).

mod counters;
mod prometheus;
mod timing;
mod types;

pub use counters::Counters;
pub(crate) use counters::Totals;
pub(crate) use timing::{Ended, Timing};
pub(crate) use types::TypeTable;
pub use types::{BOUNDS_NS, BUCKETS, OTHER_TYPES, TypeMetrics};

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// What a server has counted since its start: its [`Counters`], all reactors together, and what goes with them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metrics {
    /// The counters of all reactors together.
    pub counters: Counters,
    /// Calls and their times by message type; only types that were used.
    pub types: Vec<TypeMetrics>,
    /// Each reactor by itself.
    pub reactors: Vec<ReactorMetrics>,
    /// Bytes that the memory budget grants a server of up to a hundred sessions.
    pub memory_budget: u64,
}

/// What one reactor has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct ReactorMetrics {
    /// Calls answered.
    pub calls: u64,
    /// Time in which calls were run, ns.
    pub busy_ns: u64,
    /// Time of polling for calls that were about to come, ns.
    pub spun_ns: u64,
    /// Processor time of its thread, ns.
    pub cpu_ns: u64,
    /// Times that it woke from sleep.
    pub wakeups: u64,
    /// Lanes that it polls.
    pub lanes_hot: u64,
}

impl ReactorMetrics {
    fn of(counters: &Counters) -> Self {
        let Counters { busy_ns, spun_ns, cpu_ns, wakeups, lanes_hot, .. } = *counters;
        Self { calls: counters.calls_total(), busy_ns, spun_ns, cpu_ns, wakeups, lanes_hot }
    }
}

impl Metrics {
    /// The counters of the whole server; `own` are those of reactor `totals.own`, the others are as they show them.
    pub(crate) fn of(totals: &Totals, own: Option<&Counters>) -> Self {
        let each: Vec<Counters> = (0..totals.boards.len())
            .map(|i| match own {
                Some(own) if i == totals.own => own.clone(),
                _ => totals.shown(i),
            })
            .collect();
        let mut counters = Counters::default();
        each.iter().for_each(|reactor| counters.add(reactor));
        Self {
            counters,
            types: Self::types_of(totals),
            reactors: each.iter().map(ReactorMetrics::of).collect(),
            memory_budget: totals.memory_budget,
        }
    }

    fn types_of(totals: &Totals) -> Vec<TypeMetrics> {
        let mut types = Vec::new();
        totals.types.iter().for_each(|table| table.add_to(&mut types));
        types.sort_by_key(|of| of.message_type);
        types
    }

    /// Everything in the text format of Prometheus, version 0.0.4.
    ///
    /// Shape:  families whose names begin with `ipc_`, each with its help and type, ended by line feeds; times in
    ///         seconds, sizes in bytes. `docs/metrics.md` lists them.
    pub fn export_prometheus(&self) -> String {
        prometheus::export(self)
    }
}

impl Deref for Metrics {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        &self.counters
    }
}

/// Reads what a server has counted, from any thread, without disturbing it. Cheap to clone; it may outlive the server.
#[derive(Debug, Clone, Default)]
pub struct MetricsReader(Arc<OnceLock<Totals>>);

impl MetricsReader {
    /// The server starts, and counts here.
    pub(crate) fn begin(&self, totals: Totals) {
        self.0.get_or_init(|| totals);
    }

    /// What has been counted so far, nothing before the server serves: times by type as of now, the other counters as
    /// of each reactor's last pause or sweep, at most 50 ms ago unless a handler holds it up.
    pub fn read(&self) -> Metrics {
        self.0.get().map_or_else(Metrics::default, |totals| Metrics::of(totals, None))
    }

    /// [`Metrics::export_prometheus`] of what has been counted so far.
    pub fn export_prometheus(&self) -> String {
        self.read().export_prometheus()
    }
}

/// What a reactor does to time its calls, by itself: for `benches/metrics.rs`.
#[doc(hidden)]
#[derive(Debug)]
pub struct StopWatch(Timing);

impl StopWatch {
    /// With `is_on` calls are timed, else what is left of it without that.
    pub fn new(is_on: bool) -> Self {
        let table = is_on.then(|| Arc::new(types::TypeTable::new()));
        Self(Timing::new(table, crate::TABLE_LEN, u64::MAX))
    }

    /// A batch of so many calls of one type on one connection; `each` is given the calls that are counted together, and
    /// their time, ns.
    #[inline(always)]
    pub fn batch(&mut self, message_type: u32, calls: u32, mut each: impl FnMut(u32, u64)) {
        let mut now_ns = crate::protocol::rendezvous::monotonic_ns;
        self.0.round(&mut now_ns);
        for _ in 0..calls {
            let (record, count_first) = self.0.take_up(message_type, 1);
            if count_first {
                self.0.count(now_ns(), |ended, ns| each(ended.calls, ns));
            }
            let ended = Ended { record, connection: 1, ..Ended::default() };
            if self.0.ended(ended) {
                self.0.count(now_ns(), |ended, ns| each(ended.calls, ns));
            }
        }
        if self.0.batch_ended() {
            self.0.count(now_ns(), |ended, ns| each(ended.calls, ns));
        }
    }

    /// There is nothing more to do.
    #[inline(always)]
    pub fn pause(&mut self, mut each: impl FnMut(u32, u64)) {
        if self.0.is_pending() {
            self.0.count(crate::protocol::rendezvous::monotonic_ns(), |ended, ns| each(ended.calls, ns));
        }
        self.0.pause();
    }

    /// Time of all calls so far, ns.
    pub fn busy_ns(&self) -> u64 {
        self.0.busy_ns
    }
}

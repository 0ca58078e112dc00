//! Counters of a server. Each reactor writes its own, unshared; from time to time it copies them to a board
//! that the others can read.

use super::types::TypeTable;
use crate::protocol::handshake::DisconnectReason;
use doorbell_shm::entry::Status;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// What a server, or one reactor of it, has counted since its start.
#[repr(C)]
#[derive(Debug, Clone, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Counters {
    /// Calls answered, by status code.
    pub calls: [u64; 11],
    /// Bytes of requests copied in.
    pub bytes_in: u64,
    /// Bytes of answers copied out.
    pub bytes_out: u64,
    /// Sessions that finished their handshake.
    pub sessions_opened: u64,
    /// Sessions refused at the handshake, for whatever reason.
    pub sessions_refused: u64,
    /// Sessions ended, by reason code minus 1.
    pub sessions_ended: [u64; DisconnectReason::ALL.len()],
    /// Connections opened.
    pub connections_opened: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Connections refused for the limit.
    pub connections_refused: u64,
    /// Times the reactor woke from sleep.
    pub wakeups: u64,
    /// Wakes sent to clients.
    pub wakes_rung: u64,
    /// Lanes that something was completed for and whose client was awake: nobody had to be woken.
    pub wakes_suppressed: u64,
    /// Most clients woken by one enter.
    pub wakes_in_one_enter_max: u64,
    /// Sweeps over all lanes.
    pub sweeps: u64,
    /// Lanes in which a sweep found work that no bell had told of (S6); 0 unless a client withholds bells.
    pub sweeps_healed: u64,
    /// System calls of the reactor that enter the ring.
    pub enters: u64,
    /// Lanes that sessions have beside their home lanes.
    pub further_lanes: u64,
    /// Times that a lane whose client rings without cause was left alone for a while (F24).
    pub storms_damped: u64,
    /// Nanoseconds spent on waiting for calls that were about to come.
    pub spun_ns: u64,
    /// Leases granted.
    pub leases_granted: u64,
    /// Leases that had to wait for memory, and for how long all together, nanoseconds.
    pub leases_waited: u64,
    /// See [`Counters::leases_waited`].
    pub lease_wait_ns: u64,
    /// Leases taken back although they were in use, because nothing was done with them while others waited (F59).
    pub leases_forced: u64,
    /// Bytes that are leased now.
    pub leased_bytes: u64,
    /// Bytes of the memory budget in use, the server's own included.
    pub budget_used: u64,
    /// Bytes reserved for requests that are put together, beside the budget.
    pub body_bytes: u64,
    /// Requests that had to wait for memory to be put together in.
    pub bodies_waited: u64,
    /// Times that a client was found to have made pages of its segment exist that it was not granted.
    pub excess_found: u64,
    /// Files read and analysed for clients.
    pub files_read: u64,
    /// Files that clients asked for and that were not analysed, for whatever reason.
    pub files_refused: u64,
    /// Bytes that buffers for files take at most; none once they have not been used for a while.
    pub staged_bytes: u64,
    /// Calls that are answered from elsewhere, now: their tickets are held by threads or futures.
    pub deferred_live: u64,
    /// Tickets that are still held although their calls have ended.
    pub deferred_detached: u64,
    /// Calls refused because there were too many tickets.
    pub deferred_refused: u64,
    /// Clients that could not be accepted, or were sent away at once, because the kernel gave no descriptor (F32).
    pub accepts_failed: u64,
    /// Sessions that live now.
    pub sessions_open: u64,
    /// Time in which calls were run, ns.
    pub busy_ns: u64,
    /// Processor time of the reactors' threads, ns.
    pub cpu_ns: u64,
    /// Calls that held their reactor up for longer than [`turn_time`](crate::ServerConfig::turn_time).
    pub overruns: u64,
    /// Calls of several frames, or answered from elsewhere, that are under way.
    pub exchanges_live: u64,
    /// Files that are read for clients, or are about to be.
    pub jobs_live: u64,
    /// Requests that wait for memory to be put together in.
    pub bodies_waiting: u64,
    /// Leases that wait for memory.
    pub leases_waiting: u64,
    /// Entries that lay in submission rings when they were last looked at, once a second; 64 of a ring at most are
    /// counted.
    pub entries_waiting: u64,
    /// Answers that clients had not taken by then.
    pub answers_waiting: u64,
    /// Lanes that are polled.
    pub lanes_hot: u64,
}

/// Words of [`Counters`].
const WORDS: usize = size_of::<Counters>() / size_of::<u64>();

/// The counters of one reactor as others may see them: as old as its last pause, or as 64 of its rounds.
#[derive(Debug)]
pub(crate) struct Board([AtomicU64; WORDS]);

impl Board {
    pub fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// Shows the counters of the reactor that owns this board. Every word is right by itself; two of them may be
    /// of different moments.
    pub fn show(&self, counters: &Counters) {
        let words: &[u64; WORDS] = zerocopy::transmute_ref!(counters);
        for (shown, word) in self.0.iter().zip(words) {
            shown.store(*word, Relaxed);
        }
    }
}

/// The boards of all reactors, seen from one of them.
#[derive(Debug, Clone)]
pub(crate) struct Totals {
    pub own: usize,
    pub boards: Arc<[Board]>,
    /// Calls and times by type, of each reactor.
    pub types: Arc<[Arc<TypeTable>]>,
    /// The server's memory budget, bytes.
    pub memory_budget: u64,
}

impl Totals {
    /// A server of so many reactors, seen from reactor `own`.
    pub fn new(own: usize, reactors: usize) -> Self {
        let types = (0..reactors).map(|_| Arc::new(TypeTable::new())).collect();
        Self { own, boards: (0..reactors).map(|_| Board::new()).collect(), types, memory_budget: 0 }
    }

    /// What reactor `index` shows.
    pub fn shown(&self, index: usize) -> Counters {
        let mut counters = Counters::new_zeroed();
        let words: &mut [u64; WORDS] = zerocopy::transmute_mut!(&mut counters);
        words.iter_mut().zip(&self.boards[index].0).for_each(|(word, shown)| *word = shown.load(Relaxed));
        counters
    }
}

impl Counters {
    /// Adds the counters of another reactor; of a maximum, the larger one counts.
    pub(crate) fn add(&mut self, other: &Self) {
        let most = self.wakes_in_one_enter_max.max(other.wakes_in_one_enter_max);
        let theirs: &[u64; WORDS] = zerocopy::transmute_ref!(other);
        let ours: &mut [u64; WORDS] = zerocopy::transmute_mut!(self);
        ours.iter_mut().zip(theirs).for_each(|(ours, theirs)| *ours = ours.wrapping_add(*theirs));
        self.wakes_in_one_enter_max = most;
    }

    /// Bytes of requests and answers.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes_in + self.bytes_out
    }

    /// Counts a call answered with `status`.
    #[inline(always)]
    pub(crate) fn count_call(&mut self, status: Status) {
        self.calls[status as usize] += 1;
    }

    pub(crate) fn count_end(&mut self, reason: DisconnectReason) {
        self.sessions_ended[reason as usize - 1] += 1;
    }

    /// Calls answered, whatever the status.
    pub fn calls_total(&self) -> u64 {
        self.calls.iter().sum()
    }

    /// Sessions ended for `reason`.
    pub fn ended(&self, reason: DisconnectReason) -> u64 {
        self.sessions_ended[reason as usize - 1]
    }

    /// Every counter by its name, in a fixed order.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let ended: u64 = self.sessions_ended.iter().sum();
        [
            ("calls", self.calls_total()),
            ("calls_ok", self.calls[Status::Ok as usize]),
            ("calls_unknown_type", self.calls[Status::UnknownType as usize]),
            ("calls_too_large", self.calls[Status::TooLarge as usize]),
            ("calls_decode_error", self.calls[Status::DecodeError as usize]),
            ("calls_handler_panic", self.calls[Status::HandlerPanic as usize]),
            ("calls_deadline_exceeded", self.calls[Status::DeadlineExceeded as usize]),
            ("calls_cancelled", self.calls[Status::Cancelled as usize]),
            ("calls_internal", self.calls[Status::Internal as usize]),
            ("calls_taken_back", self.calls[Status::TakenBack as usize]),
            ("calls_upstream", self.calls[Status::Upstream as usize]),
            ("bytes_in", self.bytes_in),
            ("bytes_out", self.bytes_out),
            ("sessions_opened", self.sessions_opened),
            ("sessions_refused", self.sessions_refused),
            ("sessions_ended", ended),
            ("protocol_violations", self.ended(DisconnectReason::ProtocolViolation)),
            ("connections_opened", self.connections_opened),
            ("connections_open", self.connections_open),
            ("connections_refused", self.connections_refused),
            ("wakeups", self.wakeups),
            ("wakes_rung", self.wakes_rung),
            ("wakes_suppressed", self.wakes_suppressed),
            ("wakes_in_one_enter_max", self.wakes_in_one_enter_max),
            ("sweeps", self.sweeps),
            ("sweeps_healed", self.sweeps_healed),
            ("enters", self.enters),
            ("further_lanes", self.further_lanes),
            ("storms_damped", self.storms_damped),
            ("spun_ns", self.spun_ns),
            ("leases_granted", self.leases_granted),
            ("leases_waited", self.leases_waited),
            ("lease_wait_ns", self.lease_wait_ns),
            ("leases_forced", self.leases_forced),
            ("leased_bytes", self.leased_bytes),
            ("budget_used", self.budget_used),
            ("body_bytes", self.body_bytes),
            ("bodies_waited", self.bodies_waited),
            ("excess_found", self.excess_found),
            ("files_read", self.files_read),
            ("files_refused", self.files_refused),
            ("staged_bytes", self.staged_bytes),
            ("deferred_live", self.deferred_live),
            ("deferred_detached", self.deferred_detached),
            ("deferred_refused", self.deferred_refused),
            ("accepts_failed", self.accepts_failed),
            ("sessions_open", self.sessions_open),
            ("busy_ns", self.busy_ns),
            ("cpu_ns", self.cpu_ns),
            ("overruns", self.overruns),
            ("exchanges_live", self.exchanges_live),
            ("jobs_live", self.jobs_live),
            ("bodies_waiting", self.bodies_waiting),
            ("leases_waiting", self.leases_waiting),
            ("entries_waiting", self.entries_waiting),
            ("answers_waiting", self.answers_waiting),
            ("lanes_hot", self.lanes_hot),
        ]
        .into_iter()
    }

    /// The counters as one JSON object with numbers only, in a fixed order.
    pub fn to_json(&self) -> String {
        let mut json = String::with_capacity(2048);
        for (i, (name, value)) in self.named().enumerate() {
            let open = if i == 0 { '{' } else { ',' };
            write!(json, "{open}\"{name}\":{value}").expect("writing to a String cannot fail");
        }
        json.push('}');
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    /// Goal:   the counters of all reactors add up, whichever is asked.
    /// Method: three boards, two shown, one's own not counted twice.
    #[test]
    fn the_counters_of_all_reactors_add_up() {
        let totals = Totals::new(1, 3);
        let counted = |enters, most| Counters { enters, wakes_in_one_enter_max: most, ..Counters::default() };
        totals.boards[0].show(&counted(5, 7));
        totals.boards[1].show(&counted(90, 9));
        totals.boards[2].show(&counted(30, 2));
        let own = counted(100, 3);
        assert_eq!(Metrics::of(&totals, Some(&own)).counters, counted(135, 7));
        assert_eq!(Metrics::of(&totals, None).counters, counted(125, 9));
    }

    #[test]
    fn the_json_holds_what_was_counted() {
        let mut metrics = Counters { bytes_in: 7, ..Counters::default() };
        metrics.count_call(Status::Ok);
        metrics.count_call(Status::UnknownType);
        metrics.count_end(DisconnectReason::ProtocolViolation);
        let json = metrics.to_json();
        for part in ["{\"calls\":2,", "\"calls_ok\":1,", "\"bytes_in\":7,", "\"protocol_violations\":1,"] {
            assert!(json.contains(part), "{part} in {json}");
        }
    }
}

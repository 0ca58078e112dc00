//! Counters of a server. One reactor writes its own; nothing here is shared or atomic.

use crate::protocol::handshake::DisconnectReason;
use doorbell_shm::entry::Status;
use std::fmt::Write;

/// What a server has counted since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Calls answered, by status code.
    pub calls: [u64; 9],
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
    /// Most clients woken by one enter.
    pub wakes_in_one_enter_max: u64,
    /// Sweeps over all lanes.
    pub sweeps: u64,
    /// Lanes in which a sweep found work that no bell had told of (S6); 0 unless a client withholds bells.
    pub sweeps_healed: u64,
    /// System calls of the reactor that enter the ring.
    pub enters: u64,
}

impl Metrics {
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

    /// The counters as one JSON object with numbers only, in a fixed order.
    pub fn to_json(&self) -> String {
        let mut json = String::with_capacity(768);
        let ended: u64 = self.sessions_ended.iter().sum();
        let fields = [
            ("calls", self.calls_total()),
            ("calls_ok", self.calls[Status::Ok as usize]),
            ("calls_unknown_type", self.calls[Status::UnknownType as usize]),
            ("calls_too_large", self.calls[Status::TooLarge as usize]),
            ("calls_decode_error", self.calls[Status::DecodeError as usize]),
            ("calls_handler_panic", self.calls[Status::HandlerPanic as usize]),
            ("calls_deadline_exceeded", self.calls[Status::DeadlineExceeded as usize]),
            ("calls_cancelled", self.calls[Status::Cancelled as usize]),
            ("calls_internal", self.calls[Status::Internal as usize]),
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
            ("wakes_in_one_enter_max", self.wakes_in_one_enter_max),
            ("sweeps", self.sweeps),
            ("sweeps_healed", self.sweeps_healed),
            ("enters", self.enters),
        ];
        for (i, (name, value)) in fields.iter().enumerate() {
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

    #[test]
    fn the_json_holds_what_was_counted() {
        let mut metrics = Metrics { bytes_in: 7, ..Metrics::default() };
        metrics.count_call(Status::Ok);
        metrics.count_call(Status::UnknownType);
        metrics.count_end(DisconnectReason::ProtocolViolation);
        let json = metrics.to_json();
        for part in ["{\"calls\":2,", "\"calls_ok\":1,", "\"bytes_in\":7,", "\"protocol_violations\":1,"] {
            assert!(json.contains(part), "{part} in {json}");
        }
    }
}

//! The probe: one interactive call, always in flight, beside a load of bulk calls. What it finds says how much
//! somebody who wants one quick answer is kept waiting by those who want many.

use super::histogram::{Latencies, SparseLatencies};
use super::load::Received;
use super::work;
use serde::{Deserialize, Serialize};

/// Where the probe counts its requests from, so that none has the payload of another of its process.
const FIRST_REQUEST: u64 = 1 << 43;

/// One call that is sent again as soon as it has been answered. Every one is timed and checked.
#[derive(Debug)]
pub struct ProbeCall {
    /// The connection it uses.
    pub connection: usize,
    /// What its answers are known by.
    pub tag: u32,
    size: usize,
    /// When the clock of the current call started; `None` between calls. It goes on while there is no room.
    started: Option<u64>,
    requests: u64,
    answered: u64,
    wrong: u64,
    correct: u64,
    latencies: Latencies,
}

/// What the probe of one client process found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProbeResult {
    /// Calls that started in the window and were answered correctly.
    pub requests: u64,
    /// Answers that were wrong or refusals, whenever they came.
    pub errors: u64,
    /// Latencies of the calls that started in the window.
    pub latencies: SparseLatencies,
}

impl ProbeCall {
    /// A probe of `size` bytes in a process that counts its other requests from `first_request`.
    pub fn new(size: usize, tag: u32, connection: usize, first_request: u64) -> Self {
        Self {
            connection,
            tag,
            size,
            started: None,
            requests: first_request + FIRST_REQUEST,
            answered: first_request + FIRST_REQUEST,
            wrong: 0,
            correct: 0,
            latencies: Latencies::new(),
        }
    }

    /// Calls in flight: 0 or 1.
    #[inline(always)]
    pub fn outstanding(&self) -> u64 {
        self.requests - self.answered
    }

    /// A number that grows with every answer.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Starts the clock, unless it runs since an attempt that found no room, and writes the next request into
    /// the first bytes of `buffer`.
    pub fn request<'b>(&mut self, now: impl Fn() -> u64, buffer: &'b mut [u8]) -> &'b [u8] {
        self.started.get_or_insert_with(now);
        let payload = &mut buffer[..self.size];
        work::fill(self.nonce(), payload);
        payload
    }

    /// The request has been taken.
    pub fn sent(&mut self) {
        self.requests += 1;
    }

    fn nonce(&self) -> u64 {
        work::nonce(self.answered + 1)
    }

    /// Checks an answer; `counts` says whether a call that started then belongs to the window. One that nobody
    /// asked for is wrong.
    pub fn take(&mut self, received: Received, now: u64, answer: &[u8], counts: impl Fn(u64) -> bool) {
        let Some(started) = self.started.filter(|_| self.outstanding() > 0) else {
            self.wrong += 1;
            return;
        };
        let right =
            received.ok && received.len == self.size && work::check(self.nonce(), &answer[..self.size]);
        self.started = None;
        self.answered += 1;
        self.wrong += u64::from(!right);
        if counts(started) {
            self.correct += u64::from(right);
            self.latencies.record(now.saturating_sub(started));
        }
    }

    /// What was found.
    pub fn into_result(self) -> ProbeResult {
        ProbeResult { requests: self.correct, errors: self.wrong, latencies: self.latencies.to_sparse() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer_to(request: &[u8]) -> Vec<u8> {
        let mut reply = vec![0; request.len()];
        work::answer(request, &mut reply);
        reply
    }

    /// Goal:   the clock runs while there is no room, and only calls of the window count.
    #[test]
    fn waiting_for_room_is_part_of_the_latency() {
        let mut probe = ProbeCall::new(16, 9, 3, 0);
        let mut buffer = [0; 40];
        for (begin, end, room) in [(100, 200, false), (1000, 1400, true)] {
            if !room {
                probe.request(|| begin, &mut buffer);
                assert_eq!(probe.outstanding(), 0, "it was refused");
            }
            let reply = answer_to(probe.request(|| begin + 50, &mut buffer));
            probe.sent();
            let received = Received { tag: 9, len: 16, ok: true };
            probe.take(received, end, &reply, |started| started >= 500);
        }
        let result = probe.into_result();
        let latencies = Latencies::from_sparse(&result.latencies);
        assert_eq!((result.requests, result.errors, latencies.max()), (1, 0, Some(350)));
    }

    /// Goal:   every wrong answer is an error: broken, too short, refused, not asked for.
    #[test]
    fn trap26_wrong_answers_to_the_probe_are_errors() {
        let mut probe = ProbeCall::new(16, 0, 0, 0);
        let mut buffer = [0; 16];
        for (broken, len, ok) in [(true, 16, true), (false, 15, true), (false, 16, false)] {
            let mut reply = answer_to(probe.request(|| 1, &mut buffer));
            probe.sent();
            reply[15] ^= u8::from(broken);
            probe.take(Received { tag: 0, len, ok }, 2, &reply, |_| true);
        }
        probe.take(Received { tag: 0, len: 16, ok: true }, 3, &buffer, |_| true);
        let result = probe.into_result();
        assert_eq!((result.requests, result.errors), (0, 4));
    }
}

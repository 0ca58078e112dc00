//! The load generator: one thread that drives any [`Target`], in a closed loop, with think time, or open.
//!
//! Rules, the same for every peer:
//! - Every request has a payload of its own, every byte of every answer is checked; the check comes after the
//!   latency clock has stopped but inside the throughput window.
//! - The clock starts before the payload is written, with a rate when the request was due, and stops when the
//!   answer is in private memory. Waiting for room counts: a refused request keeps its clock.
//! - Every call is timed at one in flight and wherever the pace needs the clock anyway, else one in 64, at
//!   irregular distances, so that no connection is timed more often than another.
//! - Warm-up is left out; calls that start in the window are timed even if they end after it. An open loop also
//!   counts calls that were due before the window and answered in it: a server that cannot keep up would
//!   otherwise have no latencies at all.
//!
//! Cost:   a few nanoseconds per call above what the target takes. No allocation after the start.

use super::clock::{SECOND, now_ns, sleep_until, thread_cpu_ns};
use super::error::BenchError;
use super::histogram::{Latencies, SparseLatencies};
use super::probe::{ProbeCall, ProbeResult};
use super::work;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::error::Error;

/// What is driven: all sessions of one client process.
///
/// The generator calls these from one thread and never holds anything across calls. All should be inlined:
/// a call of 64 bytes costs 25 ns in all.
pub trait Target {
    /// What can go wrong with the peer as such. A call that fails is a [`Received`], not an error.
    type Error: Into<Box<dyn Error + Send + Sync>>;

    /// Copies `payload` out as one request on `connection`; `tag` comes back with its answer. `false`
    /// means that there is no room now: the generator comes back after the next answer.
    fn try_send(&mut self, connection: usize, payload: &[u8], tag: u32) -> Result<bool, Self::Error>;

    /// Makes sure that the server sees what was sent. Called once after a batch.
    fn flush(&mut self) -> Result<(), Self::Error>;

    /// Takes one answer of any connection into the first bytes of `answer`, or returns `None`. Never waits.
    fn try_receive(&mut self, answer: &mut [u8]) -> Result<Option<Received>, Self::Error>;

    /// Waits as the policy says until an answer may be there, at most so long; may return early. Spinning
    /// is one `spin_loop` hint.
    fn wait(&mut self, at_most_ns: u64) -> Result<(), Self::Error>;
}

/// One answer.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// What was passed to [`Target::try_send`].
    pub tag: u32,
    /// Bytes of the answer, even if more than the buffer took.
    pub len: usize,
    /// Whether the server answered the call rather than refuse it.
    pub ok: bool,
}

/// The shape of the load of one client process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shape {
    /// Connections of this process.
    pub connections: usize,
    /// Calls in flight on each.
    pub in_flight: usize,
    /// Bytes of a request and of an answer.
    pub size: usize,
    /// Pause between an answer and the next request, nanoseconds.
    pub think_ns: u64,
    /// Requests per second of this process, open loop.
    pub rate: Option<f64>,
    /// Whether waiting for answers puts the thread to sleep.
    pub sleeps: bool,
    /// Where this process starts counting its requests, so that no two send the same payload.
    pub first_request: u64,
    /// Whether each pause is drawn anew, between 0 and twice `think_ns`.
    pub think_random: bool,
    /// Where drawing starts; different processes go on differently from it.
    pub seed: u32,
    /// Bytes of one more call, always in flight on the connection behind those of the load.
    pub probe: Option<usize>,
}

impl Shape {
    /// A closed loop that polls, as fast as answers come.
    pub fn closed(connections: usize, in_flight: usize, size: usize) -> Self {
        Self {
            connections,
            in_flight,
            size,
            think_ns: 0,
            rate: None,
            sleeps: false,
            first_request: 0,
            think_random: false,
            seed: 0,
            probe: None,
        }
    }

    /// What is left of it when the probe is alone.
    pub fn without_load(&self) -> Self {
        Self { in_flight: 0, ..self.clone() }
    }
}

/// When the load runs; all client processes get the same.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Schedule {
    /// Start, CLOCK_MONOTONIC, nanoseconds.
    pub start_ns: u64,
    /// What is left out of the figures.
    pub warm_up_ns: u64,
    /// The window.
    pub window_ns: u64,
    /// Only the probe is sent.
    pub probe_alone: bool,
}

impl Schedule {
    /// Starts at a time of CLOCK_MONOTONIC, nanoseconds.
    pub fn at(start_ns: u64, warm_up_ns: u64, window_ns: u64) -> Self {
        Self { start_ns, warm_up_ns, window_ns, probe_alone: false }
    }

    /// Starts in a moment: long enough for every process to have read it.
    pub fn soon(warm_up_ns: u64, window_ns: u64) -> Self {
        Self::at(now_ns() + 20_000_000, warm_up_ns, window_ns)
    }

    /// When the window opens.
    pub fn begin_ns(&self) -> u64 {
        self.start_ns + self.warm_up_ns
    }

    /// When the window closes.
    pub fn end_ns(&self) -> u64 {
        self.begin_ns() + self.window_ns
    }
}

/// What one client process found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadResult {
    /// Requests answered, correctly, inside the window.
    pub requests: u64,
    /// The window as it was, nanoseconds.
    pub window_ns: u64,
    /// Answers that were wrong or refusals, whenever they came.
    pub errors: u64,
    /// Calls in flight, averaged over the window's time.
    pub in_flight_mean: f64,
    /// Processor time of this thread in the window.
    pub cpu_ns: u64,
    /// Latencies of the timed calls.
    pub latencies: SparseLatencies,
    /// Frames of the answers that came in the window; `None` where none has several.
    pub frames: Option<u64>,
    /// What the probe found, which is in none of the above.
    pub probe: Option<ProbeResult>,
}

impl LoadResult {
    /// Of a process that had nothing to do.
    pub fn none(schedule: &Schedule) -> Self {
        Self {
            requests: 0,
            window_ns: schedule.window_ns,
            errors: 0,
            in_flight_mean: 0.0,
            cpu_ns: 0,
            latencies: Latencies::new().to_sparse(),
            frames: None,
            probe: None,
        }
    }
}

/// Drives `target` through one schedule.
///
/// # Errors
///
/// [`BenchError::Peer`] if the target fails, [`BenchError::Silent`] if answers stop coming.
pub fn run<T: Target>(target: &mut T, shape: &Shape, schedule: &Schedule) -> Result<LoadResult, BenchError> {
    // Two generators, so that a load without a probe does not ask at every call whether there is one.
    if shape.probe.is_some() {
        drive(Generator::<T, true>::new(target, shape, schedule), schedule)
    } else {
        drive(Generator::<T, false>::new(target, shape, schedule), schedule)
    }
}

fn drive<T: Target, const PROBED: bool>(
    mut generator: Generator<'_, T, PROBED>,
    schedule: &Schedule,
) -> Result<LoadResult, BenchError> {
    sleep_until(schedule.start_ns);
    generator.run()?;
    Ok(generator.into_result())
}

/// Not in flight.
const IDLE: u64 = u64::MAX;
/// In flight, not timed.
const UNTIMED: u64 = 0;
/// One call in so many is timed, unless all are.
const SAMPLE: u64 = 64;
/// A spinning generator looks at the clock every so many empty polls.
pub(super) const LOOK_EVERY: u32 = 1024;
/// Requests sent before a flush, at most.
const FLUSH_EVERY: u64 = 32;
/// Refused requests tried again after an answer, at most.
const RETRIES: usize = 4;
/// A generator with nothing outstanding wakes so much before a request is due and polls for the rest.
const WAKE_EARLY_NS: u64 = 100_000;
/// The longest sleep.
pub(super) const SLEEP_MAX_NS: u64 = 100_000_000;
/// How long answers may fail to come.
const SILENCE_NS: u64 = 10 * SECOND;

#[derive(Debug, Clone, Copy)]
struct Call {
    nonce: u64,
    started: u64,
}

/// A call that will be sent when its time comes.
#[derive(Debug, Clone, Copy)]
struct Thinking {
    tag: u32,
    ready_ns: u64,
}

/// A call that found no room; its clock runs.
#[derive(Debug, Clone, Copy)]
struct Refused {
    tag: u32,
    started: u64,
}

/// Where the load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    WarmUp,
    Window,
    Drain,
}

#[derive(Debug, Clone, Copy)]
enum Pace {
    /// The next request as soon as an answer came.
    Closed,
    Think {
        ns: u64,
        random: bool,
    },
    /// Request `next` is due at `start + next * interval`.
    Open {
        interval_ns: f64,
        start_ns: u64,
        next: u64,
    },
}

struct Generator<'a, T, const PROBED: bool> {
    target: &'a mut T,
    size: usize,
    sleeps: bool,
    pace: Pace,
    time_all: bool,
    flush_every: u64,
    /// Holds a payload until it is sent, and an answer until it is checked.
    buffer: work::Buffer,
    calls: Vec<Call>,
    /// The connection of each call.
    connections: Vec<u32>,
    thinking: VecDeque<Thinking>,
    refused: VecDeque<Refused>,
    /// Requests sent, counted from the shape's `first_request` on.
    sent: u64,
    /// Of those, seen by the server.
    flushed: u64,
    /// Of those, answered: rightly or not.
    answered: u64,
    /// Answers that were wrong.
    wrong: u64,
    /// Answers to nothing.
    stray: u64,
    /// The value of `sent` at which the next call is timed.
    next_sample: u64,
    random: u64,
    idle_polls: u32,
    window: Window,
    silence: Silence,
    latencies: Latencies,
    /// There if `PROBED`.
    probe: Option<Box<ProbeCall>>,
}

/// The measured window, and what is taken at its edges.
#[derive(Debug)]
pub(super) struct Window {
    pub phase: Phase,
    pub begin_ns: u64,
    pub end_ns: u64,
    pub correct: u64,
    pub cpu_ns: u64,
    pub level: Level,
    /// Whether calls that were due before it count.
    open: bool,
}

/// Calls in flight times nanoseconds.
#[derive(Debug, Default)]
pub(super) struct Level {
    last_ns: u64,
    pub sum: u128,
}

/// How long no answer has come.
#[derive(Debug, Default)]
pub(super) struct Silence {
    answers: u64,
    since_ns: u64,
}

impl<'a, T: Target, const PROBED: bool> Generator<'a, T, PROBED> {
    fn new(target: &'a mut T, shape: &Shape, schedule: &Schedule) -> Self {
        let total = shape.connections * shape.in_flight;
        let pace = match (shape.rate, shape.think_ns) {
            (Some(rate), _) => {
                Pace::Open { interval_ns: SECOND as f64 / rate, start_ns: schedule.start_ns, next: 0 }
            }
            (None, 0) => Pace::Closed,
            (None, ns) => Pace::Think { ns, random: shape.think_random },
        };
        // Tags go round the connections, so that the first requests are one on each.
        let thinking = (0..total as u32).map(|tag| Thinking { tag, ready_ns: 0 }).collect();
        Self {
            target,
            size: shape.size,
            sleeps: shape.sleeps,
            pace,
            time_all: total == 1 || !matches!(pace, Pace::Closed),
            flush_every: FLUSH_EVERY.min(total.div_ceil(2) as u64),
            buffer: work::Buffer::as_allocated(shape.size.max(shape.probe.unwrap_or_default())),
            calls: vec![Call { nonce: 0, started: IDLE }; total],
            connections: (0..total).map(|tag| (tag % shape.connections) as u32).collect(),
            thinking,
            refused: VecDeque::with_capacity(total + 1),
            sent: shape.first_request,
            flushed: shape.first_request,
            answered: shape.first_request,
            wrong: 0,
            stray: 0,
            next_sample: shape.first_request,
            random: seeded(shape),
            idle_polls: 0,
            window: Window::new(schedule, shape.rate.is_some()),
            silence: Silence::default(),
            latencies: Latencies::new(),
            probe: shape.probe.map(|size| {
                Box::new(ProbeCall::new(size, total as u32, shape.connections, shape.first_request))
            }),
        }
    }

    fn run(&mut self) -> Result<(), BenchError> {
        self.look(now_ns())?;
        while self.window.phase != Phase::Drain || self.owed() > 0 {
            let received = self.target.try_receive(&mut self.buffer);
            match received.map_err(|e| BenchError::peer("receiving", e))? {
                Some(received) => self.take(received)?,
                None => self.idle()?,
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn outstanding(&self) -> u64 {
        self.sent - self.answered
    }

    /// Answers that are to come, the probe's included.
    #[inline(always)]
    fn owed(&self) -> u64 {
        let probe = if PROBED { self.probe.as_ref().map_or(0, |probe| probe.outstanding()) } else { 0 };
        self.outstanding() + probe
    }

    #[inline(always)]
    fn unflushed(&self) -> u64 {
        self.sent - self.flushed
    }

    /// Answers so far that were right. Counted as the difference, since that is one store less per call.
    #[inline(always)]
    fn correct(&self) -> u64 {
        self.answered - self.wrong
    }

    #[inline(always)]
    fn take(&mut self, received: Received) -> Result<(), BenchError> {
        if PROBED && received.tag as usize == self.calls.len() {
            return self.take_probe(received);
        }
        let Some(call) = self.calls.get_mut(received.tag as usize).filter(|call| call.started != IDLE) else {
            self.stray += 1;
            return Ok(());
        };
        let Call { nonce, started } = *call;
        call.started = IDLE;
        let now = if started == UNTIMED { 0 } else { self.timed(started) };
        let right = received.ok && received.len == self.size && work::check(nonce, &self.buffer[..self.size]);
        self.answered += 1;
        if !right {
            self.wrong += 1;
        }
        if PROBED {
            // It goes first where it waits for room.
            self.send_probe()?;
        }
        self.next(received.tag, now)
    }

    /// An answer to the probe, which goes on at once.
    fn take_probe(&mut self, received: Received) -> Result<(), BenchError> {
        let now = now_ns();
        self.see(now);
        let probe = self.probe.as_mut().expect("its tag is known to nobody else");
        let counts = |started| self.window.counts(started) && started >= self.window.begin_ns;
        probe.take(received, now, &self.buffer, counts);
        self.send_probe()
    }

    /// Sends the probe's call, unless it is in flight or nothing more is to be sent.
    fn send_probe(&mut self) -> Result<(), BenchError> {
        let probe = self.probe.as_mut().expect("there is one where this is called");
        if probe.outstanding() > 0 || self.window.phase == Phase::Drain {
            return Ok(());
        }
        let payload = probe.request(now_ns, &mut self.buffer);
        let sent = self.target.try_send(probe.connection, payload, probe.tag);
        if sent.map_err(|e| BenchError::peer("sending", e))? {
            probe.sent();
            return self.flush();
        }
        Ok(())
    }

    /// Stops the clock of a timed call; returns the time.
    #[inline(always)]
    fn timed(&mut self, started: u64) -> u64 {
        let now = now_ns();
        self.see(now);
        if self.window.counts(started) {
            self.latencies.record(now.saturating_sub(started));
        }
        now
    }

    #[inline(always)]
    fn see(&mut self, now: u64) {
        let (outstanding, correct) = (self.outstanding(), self.correct());
        self.window.see(now, outstanding, correct);
    }

    /// What becomes of a call once it has been answered. `now` is valid where every call is timed.
    #[inline(always)]
    fn next(&mut self, tag: u32, now: u64) -> Result<(), BenchError> {
        if self.window.phase == Phase::Drain {
            return Ok(());
        }
        if let Pace::Closed = self.pace {
            let started = self.start_clock();
            self.send(Refused { tag, started })?;
        } else {
            self.rest(tag, now);
            self.send_due(now)?;
        }
        if self.unflushed() >= self.flush_every { self.flush() } else { Ok(()) }
    }

    fn rest(&mut self, tag: u32, now: u64) {
        let pause = match self.pace {
            Pace::Think { ns, random: true } => self.draw() % (2 * ns + 1),
            Pace::Think { ns, random: false } => ns,
            Pace::Closed | Pace::Open { .. } => 0,
        };
        let ready_ns = now + pause;
        // In order of time, which is the order of coming only if all pauses are alike.
        let at = match self.thinking.back() {
            Some(last) if last.ready_ns > ready_ns => {
                self.thinking.partition_point(|t| t.ready_ns <= ready_ns)
            }
            _ => self.thinking.len(),
        };
        self.thinking.insert(at, Thinking { tag, ready_ns });
    }

    /// The start time of a call that is about to be sent, or that it is not timed.
    #[inline(always)]
    fn start_clock(&mut self) -> u64 {
        if !self.time_all {
            if self.sent < self.next_sample {
                return UNTIMED;
            }
            self.next_sample = self.sent + self.sample_distance();
        }
        let now = now_ns();
        self.see(now);
        now
    }

    /// 1 to 127, 64 on average: xorshift is random enough not to follow the round of connections.
    fn sample_distance(&mut self) -> u64 {
        1 + self.draw() % (2 * SAMPLE - 1)
    }

    #[inline(always)]
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Sends one call, after those that have been waiting for room.
    #[inline(always)]
    fn send(&mut self, call: Refused) -> Result<(), BenchError> {
        if !self.refused.is_empty() {
            self.refused.push_back(call);
            return self.retry(RETRIES);
        }
        if !self.submit(call)? {
            self.refused.push_back(call);
        }
        Ok(())
    }

    /// Tries refused calls again, oldest first; one that is refused again goes to the back, since another's
    /// session may have room.
    #[cold]
    fn retry(&mut self, tries: usize) -> Result<(), BenchError> {
        for _ in 0..tries.min(self.refused.len()) {
            let call = self.refused.pop_front().expect("counted");
            if !self.submit(call)? {
                self.refused.push_back(call);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn submit(&mut self, Refused { tag, started }: Refused) -> Result<bool, BenchError> {
        let nonce = work::nonce(self.sent + 1);
        // Without a probe the buffer is as long as a request.
        let end = if PROBED { self.size } else { self.buffer.len() };
        work::fill(nonce, &mut self.buffer[..end]);
        let connection = self.connections[tag as usize] as usize;
        let sent = self.target.try_send(connection, &self.buffer[..end], tag);
        if !sent.map_err(|e| BenchError::peer("sending", e))? {
            return Ok(false);
        }
        self.calls[tag as usize] = Call { nonce, started };
        self.sent += 1;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), BenchError> {
        self.flushed = self.sent;
        self.target.flush().map_err(|e| BenchError::peer("flushing", e))
    }

    /// No answer was there.
    #[inline(always)]
    fn idle(&mut self) -> Result<(), BenchError> {
        if self.unflushed() > 0 {
            return self.flush(); // And look again before waiting.
        }
        self.idle_polls = self.idle_polls.wrapping_add(1);
        if let Pace::Closed = self.pace {
            if self.sleeps || self.idle_polls.is_multiple_of(LOOK_EVERY) {
                self.look(now_ns())?;
            }
            return self.wait(SLEEP_MAX_NS);
        }
        let now = now_ns();
        self.look(now)?;
        if self.unflushed() > 0 { Ok(()) } else { self.wait_for_pace(now) }
    }

    fn wait(&mut self, at_most_ns: u64) -> Result<(), BenchError> {
        self.target.wait(at_most_ns).map_err(|e| BenchError::peer("waiting", e))
    }

    /// Waits for an answer or for the next request's time, whichever comes first.
    fn wait_for_pace(&mut self, now: u64) -> Result<(), BenchError> {
        let left = self.next_event_ns().saturating_sub(now);
        let open = matches!(self.pace, Pace::Open { .. });
        if self.owed() == 0 && self.window.phase == Phase::Drain {
            return Ok(());
        }
        if self.owed() == 0 && self.refused.is_empty() {
            // Nobody to wait for. A pause may be overslept, a due time may not.
            let early = if open { WAKE_EARLY_NS } else { 0 };
            if left > early && (self.sleeps || !open) {
                sleep_until(now + left - early);
            }
            return Ok(());
        }
        // Also when the next request is due in a moment: who polls for it would keep the core that a policy
        // may want to hand over, and would not pay for being woken.
        self.wait(left.min(SLEEP_MAX_NS))
    }

    /// When something is to be done even if no answer comes.
    fn next_event_ns(&self) -> u64 {
        let edge = match self.window.phase {
            Phase::WarmUp => self.window.begin_ns,
            Phase::Window => self.window.end_ns,
            Phase::Drain => return u64::MAX,
        };
        let due = match self.pace {
            Pace::Open { .. } if self.thinking.is_empty() => None,
            Pace::Open { .. } => self.due(),
            _ => self.thinking.front().map(|t| t.ready_ns),
        };
        due.unwrap_or(edge).min(edge)
    }

    /// When the next request of an open loop is due.
    fn due(&self) -> Option<u64> {
        match self.pace {
            Pace::Open { interval_ns, start_ns, next } => Some(start_ns + (next as f64 * interval_ns) as u64),
            _ => None,
        }
    }

    /// Looks at the clock: window, silence, requests whose time has come, requests that found no room.
    #[cold]
    fn look(&mut self, now: u64) -> Result<(), BenchError> {
        self.see(now);
        let of_probe = self.probe.as_ref().map_or(0, |probe| probe.answered());
        self.silence.check(now, self.answered + of_probe, self.owed())?;
        if self.window.phase == Phase::Drain {
            return Ok(());
        }
        if PROBED {
            self.send_probe()?;
        }
        self.retry(usize::MAX)?;
        self.send_due(now)?;
        if self.unflushed() > 0 { self.flush() } else { Ok(()) }
    }

    /// Sends the requests whose time has come.
    fn send_due(&mut self, now: u64) -> Result<(), BenchError> {
        while let Some(front) = self.thinking.front().copied().filter(|t| t.ready_ns <= now) {
            let started = match self.due() {
                Some(due) if due > now => return Ok(()),
                Some(due) => due.max(1),
                None => self.start_clock(),
            };
            if let Pace::Open { next, .. } = &mut self.pace {
                *next += 1;
            }
            self.thinking.pop_front();
            self.send(Refused { tag: front.tag, started })?;
        }
        Ok(())
    }

    fn into_result(self) -> LoadResult {
        let window_ns = self.window.end_ns - self.window.begin_ns;
        LoadResult {
            requests: self.window.correct,
            window_ns,
            errors: self.wrong + self.stray,
            in_flight_mean: self.window.level.sum as f64 / window_ns as f64,
            cpu_ns: self.window.cpu_ns,
            latencies: self.latencies.to_sparse(),
            frames: None,
            probe: self.probe.map(|probe| probe.into_result()),
        }
    }
}

/// Where drawing starts: elsewhere in every process, since no two count from the same request. Never 0, where
/// xorshift would stay.
fn seeded(shape: &Shape) -> u64 {
    (work::nonce(shape.first_request + 1) ^ u64::from(shape.seed) << 20).max(1)
}

impl Window {
    pub fn new(schedule: &Schedule, open: bool) -> Self {
        let (begin_ns, end_ns) = (schedule.begin_ns(), schedule.end_ns());
        Self { phase: Phase::WarmUp, begin_ns, end_ns, correct: 0, cpu_ns: 0, level: Level::default(), open }
    }

    /// Whether a call that started then belongs to the window.
    #[inline(always)]
    pub fn counts(&self, started: u64) -> bool {
        self.phase != Phase::WarmUp && started < self.end_ns && (self.open || started >= self.begin_ns)
    }

    /// Takes note of the time, and opens or closes the window. The edges become the times at which that
    /// was noticed, so that counts and length belong together.
    #[inline(always)]
    pub fn see(&mut self, now: u64, outstanding: u64, correct: u64) {
        if self.phase == Phase::Window {
            self.level.add(now.min(self.end_ns), outstanding);
        }
        if now >= self.begin_ns && self.phase != Phase::Drain {
            self.edge(now, correct);
        }
    }

    fn edge(&mut self, now: u64, correct: u64) {
        if self.phase == Phase::WarmUp {
            let length = self.end_ns - self.begin_ns;
            (self.begin_ns, self.end_ns) = (now, now + length);
            (self.correct, self.cpu_ns) = (correct, thread_cpu_ns());
            self.level.last_ns = now;
            self.phase = Phase::Window;
        } else if now >= self.end_ns {
            self.end_ns = now;
            (self.correct, self.cpu_ns) = (correct - self.correct, thread_cpu_ns() - self.cpu_ns);
            self.phase = Phase::Drain;
        }
    }
}

impl Level {
    #[inline(always)]
    fn add(&mut self, now: u64, outstanding: u64) {
        self.sum += u128::from(now.saturating_sub(self.last_ns)) * u128::from(outstanding);
        self.last_ns = self.last_ns.max(now);
    }
}

impl Silence {
    pub fn check(&mut self, now: u64, answers: u64, outstanding: u64) -> Result<(), BenchError> {
        if answers != self.answers || outstanding == 0 || self.since_ns == 0 {
            (self.answers, self.since_ns) = (answers, now);
        } else if now.saturating_sub(self.since_ns) > SILENCE_NS {
            return Err(BenchError::Silent { seconds: SILENCE_NS / SECOND, outstanding });
        }
        Ok(())
    }
}

/// Runs a load for longer and longer until it has been answered, and its probe too: on a busy machine a short window
/// may find nobody at work.
#[cfg(test)]
pub fn run_until_answered(mut run: impl FnMut(&Schedule) -> Result<LoadResult, BenchError>) -> LoadResult {
    let mut window_ns = 30_000_000;
    loop {
        let result = run(&Schedule::at(now_ns(), 1_000_000, window_ns)).unwrap();
        let answered = match &result.probe {
            Some(probe) => probe.requests > 0,
            None => result.requests > 0,
        };
        if answered || result.errors > 0 || window_ns > 20 * SECOND {
            return result;
        }
        window_ns *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// A server in the same thread that answers each request after `delay_ns`, in order.
    struct Model {
        queue: VecDeque<(u32, Vec<u8>, u64)>,
        room: usize,
        delay_ns: u64,
        break_every: u64,
        served: u64,
        most: usize,
        flushed: bool,
        waits: u64,
    }

    impl Model {
        fn new(room: usize, delay_ns: u64) -> Self {
            let queue = VecDeque::new();
            Self { queue, room, delay_ns, break_every: u64::MAX, served: 0, most: 0, flushed: true, waits: 0 }
        }
    }

    impl Target for Model {
        type Error = Infallible;

        fn try_send(&mut self, _: usize, payload: &[u8], tag: u32) -> Result<bool, Infallible> {
            if self.queue.len() == self.room {
                return Ok(false);
            }
            let mut reply = vec![0; payload.len()];
            work::answer(payload, &mut reply);
            self.queue.push_back((tag, reply, now_ns() + self.delay_ns));
            self.most = self.most.max(self.queue.len());
            self.flushed = false;
            Ok(true)
        }

        fn flush(&mut self) -> Result<(), Infallible> {
            self.flushed = true;
            Ok(())
        }

        fn try_receive(&mut self, answer: &mut [u8]) -> Result<Option<Received>, Infallible> {
            if self.queue.front().is_none_or(|(_, _, at)| *at > now_ns()) {
                return Ok(None);
            }
            let (tag, mut reply, _) = self.queue.pop_front().unwrap();
            self.served += 1;
            if self.served.is_multiple_of(self.break_every) {
                reply[0] ^= 1;
            }
            answer[..reply.len()].copy_from_slice(&reply);
            Ok(Some(Received { tag, len: reply.len(), ok: true }))
        }

        fn wait(&mut self, _: u64) -> Result<(), Infallible> {
            assert!(self.flushed, "waiting for what was never flushed");
            self.waits += u64::from(!self.queue.is_empty());
            Ok(())
        }
    }

    fn shape(connections: usize, in_flight: usize) -> Shape {
        Shape {
            connections,
            in_flight,
            size: 24,
            think_ns: 0,
            rate: None,
            sleeps: false,
            first_request: 0,
            think_random: false,
            seed: 0,
            probe: None,
        }
    }

    fn drive(model: &mut Model, shape: &Shape) -> (LoadResult, Latencies) {
        let schedule = Schedule::at(now_ns(), 5_000_000, 40_000_000);
        let result = run(model, shape, &schedule).unwrap();
        let latencies = Latencies::from_sparse(&result.latencies);
        (result, latencies)
    }

    #[test]
    fn one_in_flight_times_every_call_from_send_to_answer() {
        let (result, latencies) = drive(&mut Model::new(1, 100_000), &shape(1, 1));
        assert_eq!(result.errors, 0);
        assert!(result.requests > 10 && latencies.len().abs_diff(result.requests) <= 2);
        assert!(latencies.quantile(0.0).unwrap() >= 100_000);
        assert!(result.in_flight_mean > 0.5 && result.in_flight_mean <= 1.0, "{}", result.in_flight_mean);
    }

    #[test]
    fn many_in_flight_time_one_call_in_64() {
        let mut model = Model::new(64, 0);
        let (result, latencies) = drive(&mut model, &shape(8, 8));
        assert_eq!((result.errors, model.most), (0, 64));
        let distance = result.requests as f64 / latencies.len() as f64;
        assert!((50.0..80.0).contains(&distance), "{distance}");
    }

    #[test]
    fn trap26_wrong_bytes_are_errors_and_not_requests() {
        let mut model = Model::new(4, 0);
        model.break_every = 10;
        let (result, _) = drive(&mut model, &shape(4, 1));
        let wrong = model.served / 10;
        assert_eq!(result.errors, wrong);
        assert!(wrong > 0 && result.requests <= model.served - wrong);
    }

    #[test]
    fn too_little_room_loses_nothing_and_starves_nobody() {
        let mut model = Model::new(3, 0);
        let mut generator_shape = shape(50, 2);
        generator_shape.size = 8;
        let (result, latencies) = drive(&mut model, &generator_shape);
        assert_eq!((result.errors, model.most, model.queue.len()), (0, 3, 0));
        assert!(result.in_flight_mean <= 3.0);
        // Every call waits for the 97 before it, none for ever: the longest is no outlier of seconds.
        assert!(latencies.max().unwrap() < 40_000_000);
    }

    #[test]
    fn think_time_is_kept_and_not_part_of_the_latency() {
        let mut paced = shape(1, 1);
        paced.think_ns = 1_000_000;
        let (result, latencies) = drive(&mut Model::new(1, 0), &paced);
        assert!(result.requests >= 5 && result.requests <= 41, "{}", result.requests);
        assert!(latencies.quantile(0.5).unwrap() < 500_000);
    }

    /// Goal:   random pauses have the mean asked for, are not all alike, and come again with their seed.
    /// Method: the generator's own pauses, of many calls at once, which also have to be in order of time.
    #[test]
    fn random_pauses_are_spread_around_their_mean_and_come_again_with_their_seed() {
        let pauses = |seed, first_request| {
            let mut paced = shape(1000, 1);
            (paced.think_ns, paced.think_random) = (500, true);
            (paced.seed, paced.first_request) = (seed, first_request);
            let mut model = Model::new(1, 0);
            let mut generator = Generator::<_, false>::new(&mut model, &paced, &Schedule::soon(0, 1));
            generator.thinking.clear();
            (0..1000).for_each(|tag| generator.rest(tag, 7));
            assert!(generator.thinking.iter().is_sorted_by_key(|t| t.ready_ns));
            let mut pauses: Vec<_> = generator.thinking.iter().map(|t| (t.tag, t.ready_ns - 7)).collect();
            pauses.sort_unstable();
            pauses
        };
        let first = pauses(1, 0);
        let mean = first.iter().map(|(_, ns)| ns).sum::<u64>() / 1000;
        let longest = first.iter().map(|(_, ns)| *ns).max().unwrap();
        assert!((450..=550).contains(&mean) && (950..=1000).contains(&longest), "{mean} {longest}");
        assert_eq!(first, pauses(1, 0));
        assert_ne!(first, pauses(2, 0));
        assert_ne!(first, pauses(1, 1 << 44), "every process draws for itself");
    }

    /// Goal:   the probe is one more call, of its own size, and in none of the load's figures.
    /// Method: a load that uses all the room there is but one, so that the load's calls alone are counted.
    #[test]
    fn a_probe_runs_beside_the_load_and_is_counted_for_itself() {
        for (size, room) in [(8, 5), (100, 5), (24, 2)] {
            let mut model = Model::new(room, 0);
            let mut probed = shape(4, 1);
            probed.probe = Some(size);
            let (result, latencies) = drive(&mut model, &probed);
            let probe = result.probe.unwrap();
            assert_eq!((result.errors, probe.errors, model.most), (0, 0, room));
            assert!(probe.requests > 100 && result.requests > 100, "{} {}", probe.requests, result.requests);
            assert!(result.requests + probe.requests <= model.served);
            assert!(result.in_flight_mean <= 4.0, "{}", result.in_flight_mean);
            let of_probe = Latencies::from_sparse(&probe.latencies);
            assert!(of_probe.len() >= probe.requests && latencies.len() < result.requests / 40);
        }
    }

    /// Goal:   a probe goes on while the load pauses, and its wrong answers are its own.
    #[test]
    fn trap26_a_probe_beside_a_slow_load_goes_on_and_its_errors_are_its_own() {
        let mut probed = shape(1, 1);
        (probed.think_ns, probed.probe) = (SECOND, Some(16));
        let mut model = Model::new(2, 0);
        model.break_every = 10;
        let (result, _) = drive(&mut model, &probed);
        let probe = result.probe.unwrap();
        assert!(result.requests <= 1 && probe.requests > 1000, "{}", probe.requests);
        assert_eq!(result.errors + probe.errors, model.served / 10);
        assert!(probe.errors > 100);
        assert!(drive(&mut Model::new(1, 0), &shape(1, 1)).0.probe.is_none());
    }

    /// Goal:   a generator that sleeps waits for outstanding answers however soon the next request is due:
    ///         who polls instead would keep the core that the server needs.
    #[test]
    fn an_open_loop_that_sleeps_waits_while_answers_are_owed() {
        for (sleeps, rate) in [(true, 1000.0), (true, 50_000.0), (false, 50_000.0)] {
            let mut paced = shape(4, 1);
            (paced.sleeps, paced.rate) = (sleeps, Some(rate));
            let mut model = Model::new(4, 5_000);
            let (result, _) = drive(&mut model, &paced);
            assert!(result.requests > 0 && model.waits >= result.requests / 2, "{}", model.waits);
        }
    }

    #[test]
    fn an_open_loop_sends_when_due_and_counts_the_wait() {
        let mut paced = shape(4, 1);
        paced.rate = Some(10_000.0);
        let (result, latencies) = drive(&mut Model::new(4, 0), &paced);
        // Never more than are due; fewer where this thread stood still.
        assert!((100..=450).contains(&result.requests), "{}", result.requests);
        assert!(latencies.len().abs_diff(result.requests) <= 5);
        // One call at a time of 1 ms each cannot keep up with one every 100 µs: the queue shows.
        let mut slow = shape(1, 1);
        slow.rate = Some(10_000.0);
        let (_, latencies) = drive(&mut Model::new(1, 1_000_000), &slow);
        assert!(latencies.max().unwrap() > 20_000_000, "{:?}", latencies.max());
    }

    #[test]
    fn silence_is_an_error_only_while_answers_are_owed() {
        let mut silence = Silence::default();
        silence.check(1, 0, 5).unwrap();
        silence.check(SILENCE_NS, 0, 5).unwrap();
        assert!(matches!(
            silence.check(SILENCE_NS + 2, 0, 5),
            Err(BenchError::Silent { outstanding: 5, .. })
        ));
        silence.check(SILENCE_NS + 3, 1, 5).unwrap();
        silence.check(3 * SILENCE_NS, 1, 0).unwrap();
    }
}

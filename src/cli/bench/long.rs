//! The load generator for long bodies: one thread that drives any [`LongTarget`], many bodies at once, in a closed
//! loop.
//!
//! No body is ever in memory as a whole: frames are generated where they are sent from, and checked as they come, in
//! every byte. The rules of `load.rs` hold, but for two: every body is timed, and its clock runs from before the first
//! frame is generated until the last one has been checked.
//!
//! Order:  a frame is sent, then answers are looked for, and so on in turn: neither side's window stands still for long,
//!         and a probe beside the bodies never waits for more than one frame of theirs.
//! Cost:   some tens of nanoseconds per frame above what the target takes. No allocation after the start.

use super::clock::{now_ns, sleep_until};
use super::error::BenchError;
use super::histogram::Latencies;
use super::load::{LOOK_EVERY, LoadResult, Phase, Received, SLEEP_MAX_NS, Schedule, Shape, Silence, Window};
use super::probe::ProbeCall;
use super::work;
use std::collections::VecDeque;
use std::error::Error;

/// The longest frame, bytes.
pub const FRAME_MAX: usize = 16 << 10;
/// Bytes generated at once: they stay in the nearest cache on their way.
const BLOCK: usize = 1024;
/// Bodies that are tried before answers are looked for again.
const TRIES: usize = 8;
/// The longest sleep while bodies wait for room, which not every peer reports: nanoseconds.
const ROOM_SLEEP_NS: u64 = 1_000_000;

/// What is driven: all sessions of one client process.
pub trait LongTarget {
    /// What can go wrong with the peer as such. A call that fails is a [`Frame`], not an error.
    type Error: Into<Box<dyn Error + Send + Sync>>;

    /// Begins a body of `size` bytes on `connection`; its answer's frames come with `tag`. `false`: no room now.
    fn try_start(&mut self, connection: usize, tag: u32, size: usize) -> Result<bool, Self::Error>;

    /// Sends the next frame of a body that has begun and returns its length in bytes; 0 if there is no room now.
    fn try_send(&mut self, tag: u32, body: &Outgoing) -> Result<usize, Self::Error>;

    /// Takes one frame of any answer into the first bytes of `frame`, which holds [`FRAME_MAX`], or `None`. Never waits.
    fn try_receive(&mut self, frame: &mut [u8]) -> Result<Option<Frame>, Self::Error>;

    /// Sends a short call, which is answered with one frame. Peers that have no interactive connections never have
    /// room for one.
    fn try_probe(&mut self, _connection: usize, _payload: &[u8], _tag: u32) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// Makes sure that the server sees what was sent.
    fn flush(&mut self) -> Result<(), Self::Error>;

    /// Waits as the policy says until a frame or room may be there, at most so long; may return early.
    fn wait(&mut self, at_most_ns: u64) -> Result<(), Self::Error>;
}

/// One frame of an answer.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// What was passed to [`LongTarget::try_start`].
    pub tag: u32,
    /// Its bytes, at most [`FRAME_MAX`].
    pub len: usize,
    /// Whether the call goes well as far as this frame says.
    pub ok: bool,
    /// Whether it ends the call.
    pub last: bool,
}

/// How far a request has been generated.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing {
    nonce: u64,
    at: usize,
    size: usize,
}

impl Outgoing {
    /// Bytes that have not been sent.
    pub fn left(&self) -> usize {
        self.size - self.at
    }

    /// Generates the next `len` bytes, in order, in blocks that `take` puts where they belong.
    ///
    /// # Errors
    ///
    /// Whatever `take` returns.
    #[inline(always)]
    pub fn write<E>(&self, len: usize, mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut block = [0; BLOCK];
        let (mut at, end) = (self.at, self.at + len);
        while at < end {
            let part = &mut block[..BLOCK.min(end - at)];
            work::fill_at(self.nonce, at as u64, part);
            take(part)?;
            at += part.len();
        }
        Ok(())
    }
}

/// Drives `target` through one schedule.
///
/// # Errors
///
/// [`BenchError::Peer`] if the target fails, [`BenchError::Silent`] if no frame comes any more.
pub fn run<T: LongTarget>(
    target: &mut T,
    shape: &Shape,
    schedule: &Schedule,
) -> Result<LoadResult, BenchError> {
    let mut generator = Generator::new(target, shape, schedule);
    sleep_until(schedule.start_ns);
    generator.run()?;
    Ok(generator.into_result())
}

/// One call in flight, over and over again.
#[derive(Debug, Clone, Copy)]
struct Body {
    request: Outgoing,
    started: u64,
    received: usize,
    wrong: bool,
    active: bool,
    /// Its tag is among those to be sent from in turn.
    queued: bool,
}

/// A body that found no room; its clock runs.
#[derive(Debug, Clone, Copy)]
struct Refused {
    tag: u32,
    started: u64,
}

struct Generator<'a, T> {
    target: &'a mut T,
    size: usize,
    connections: usize,
    sleeps: bool,
    /// Holds a frame until it is checked, and the probe's request until it is sent.
    buffer: work::Buffer,
    bodies: Vec<Body>,
    /// Bodies with something left to send, in turn.
    sending: VecDeque<u32>,
    refused: VecDeque<Refused>,
    /// Bodies begun, counted from the shape's `first_request` on.
    begun: u64,
    /// Of those, answered: rightly or not.
    answered: u64,
    wrong: u64,
    /// Frames of nothing.
    stray: u64,
    frames: u64,
    frames_in_window: u64,
    idle_polls: u32,
    window: Window,
    silence: Silence,
    latencies: Latencies,
    probe: Option<Box<ProbeCall>>,
}

impl<'a, T: LongTarget> Generator<'a, T> {
    fn new(target: &'a mut T, shape: &Shape, schedule: &Schedule) -> Self {
        let total = shape.connections * shape.in_flight;
        let request = Outgoing { nonce: 0, at: 0, size: shape.size };
        let body = Body { request, started: 0, received: 0, wrong: false, active: false, queued: false };
        let probe = |size| ProbeCall::new(size, total as u32, shape.connections, shape.first_request);
        Self {
            target,
            size: shape.size,
            connections: shape.connections,
            sleeps: shape.sleeps,
            buffer: work::Buffer::at(0, FRAME_MAX),
            bodies: vec![body; total],
            sending: VecDeque::with_capacity(total + 1),
            refused: VecDeque::with_capacity(total + 1),
            begun: shape.first_request,
            answered: shape.first_request,
            wrong: 0,
            stray: 0,
            frames: 0,
            frames_in_window: 0,
            idle_polls: 0,
            window: Window::new(schedule, false),
            silence: Silence::default(),
            latencies: Latencies::new(),
            probe: shape.probe.map(probe).map(Box::new),
        }
    }

    fn run(&mut self) -> Result<(), BenchError> {
        for tag in 0..self.bodies.len() as u32 {
            self.start(tag)?;
        }
        self.look(now_ns())?;
        while self.window.phase != Phase::Drain || self.owed() > 0 {
            let received = self.target.try_receive(&mut self.buffer);
            match received.map_err(|e| BenchError::peer("receiving", e))? {
                Some(frame) => self.take(frame)?,
                None => self.idle()?,
            }
        }
        Ok(())
    }

    fn outstanding(&self) -> u64 {
        self.begun - self.answered
    }

    /// Answers that are to come, the probe's included.
    fn owed(&self) -> u64 {
        self.outstanding() + self.probe.as_ref().map_or(0, |probe| probe.outstanding())
    }

    fn see(&mut self, now: u64) {
        let (outstanding, correct) = (self.outstanding(), self.answered - self.wrong);
        self.window.see(now, outstanding, correct);
    }

    /// Begins the next body of a tag.
    fn start(&mut self, tag: u32) -> Result<(), BenchError> {
        let started = now_ns();
        self.see(started);
        if self.window.phase == Phase::Drain {
            return Ok(());
        }
        self.refused.push_back(Refused { tag, started });
        self.retry()
    }

    /// Begins bodies that have been waiting for room, oldest first; each session may have some.
    fn retry(&mut self) -> Result<(), BenchError> {
        for _ in 0..self.refused.len().min(TRIES) {
            let Some(Refused { tag, started }) = self.refused.pop_front() else { break };
            let connection = tag as usize % self.connections;
            let begun = self.target.try_start(connection, tag, self.size);
            if !begun.map_err(|e| BenchError::peer("beginning a body", e))? {
                self.refused.push_back(Refused { tag, started });
                continue;
            }
            self.begun += 1;
            let request = Outgoing { nonce: work::nonce(self.begun), at: 0, size: self.size };
            let body = &mut self.bodies[tag as usize];
            let queued = std::mem::replace(&mut body.queued, true);
            *body = Body { request, started, received: 0, wrong: false, active: true, queued: true };
            if !queued {
                self.sending.push_back(tag);
            }
        }
        Ok(())
    }

    /// Sends one frame of the first body in turn that has room for one; says whether there was one.
    fn send(&mut self) -> Result<bool, BenchError> {
        for _ in 0..self.sending.len().min(TRIES) {
            let Some(tag) = self.sending.pop_front() else { break };
            let sent = self.send_of(tag)?;
            let body = &mut self.bodies[tag as usize];
            body.queued = body.active && body.request.left() > 0;
            if body.queued {
                self.sending.push_back(tag);
            }
            if sent {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends one frame of a body, if it has one and there is room; says whether it did.
    fn send_of(&mut self, tag: u32) -> Result<bool, BenchError> {
        let body = &mut self.bodies[tag as usize];
        if !body.active || body.request.left() == 0 {
            return Ok(false);
        }
        let sent = self.target.try_send(tag, &body.request);
        let sent = sent.map_err(|e| BenchError::peer("sending", e))?;
        body.request.at += sent;
        if sent > 0 {
            self.flush()?;
        }
        Ok(sent > 0)
    }

    fn flush(&mut self) -> Result<(), BenchError> {
        self.target.flush().map_err(|e| BenchError::peer("flushing", e))
    }

    fn take(&mut self, frame: Frame) -> Result<(), BenchError> {
        if self.probe.is_some() && frame.tag as usize == self.bodies.len() {
            return self.take_probe(frame);
        }
        let Some(body) = self.bodies.get_mut(frame.tag as usize).filter(|body| body.active) else {
            self.stray += 1;
            return Ok(());
        };
        self.frames += 1;
        self.frames_in_window += u64::from(self.window.phase == Phase::Window);
        let (nonce, at) = (body.request.nonce, body.received as u64);
        body.received += frame.len;
        body.wrong |= !frame.ok
            || body.received > self.size
            || !work::check_at(nonce, at, &self.buffer[..frame.len.min(FRAME_MAX)]);
        if frame.last {
            self.end(frame.tag)?;
        }
        if self.probe.is_some() {
            self.send_probe()?;
        }
        // Whose answer comes on has room: its request has been taken so far.
        if !self.send_of(frame.tag)? {
            self.send()?;
        }
        Ok(())
    }

    /// The last frame of an answer has been checked.
    fn end(&mut self, tag: u32) -> Result<(), BenchError> {
        let now = now_ns();
        let body = &mut self.bodies[tag as usize];
        body.active = false;
        let unsent = body.request.left() > 0;
        let right = !body.wrong && body.received == self.size && !unsent;
        let started = body.started;
        self.see(now);
        if self.window.counts(started) {
            self.latencies.record(now.saturating_sub(started));
        }
        self.answered += 1;
        self.wrong += u64::from(!right);
        self.start(tag)
    }

    /// An answer to the probe, which goes on at once.
    fn take_probe(&mut self, frame: Frame) -> Result<(), BenchError> {
        let now = now_ns();
        self.see(now);
        let Some(probe) = &mut self.probe else { return Ok(()) };
        let window = &self.window;
        let received = Received { tag: frame.tag, len: frame.len, ok: frame.ok && frame.last };
        probe.take(received, now, &self.buffer, |started| window.counts(started));
        self.send_probe()?;
        // The bodies go on, however quickly the probe is answered.
        self.send().map(|_| ())
    }

    /// Sends the probe's call, unless it is in flight or nothing more is to be sent.
    fn send_probe(&mut self) -> Result<(), BenchError> {
        let Some(probe) = &mut self.probe else { return Ok(()) };
        if probe.outstanding() > 0 || self.window.phase == Phase::Drain {
            return Ok(());
        }
        let payload = probe.request(now_ns, &mut self.buffer);
        let sent = self.target.try_probe(probe.connection, payload, probe.tag);
        if sent.map_err(|e| BenchError::peer("sending", e))? {
            probe.sent();
            return self.flush();
        }
        Ok(())
    }

    /// No frame was there.
    fn idle(&mut self) -> Result<(), BenchError> {
        if self.send()? {
            return Ok(()); // And look again before waiting.
        }
        self.idle_polls = self.idle_polls.wrapping_add(1);
        if self.sleeps || self.idle_polls.is_multiple_of(LOOK_EVERY) {
            self.look(now_ns())?;
        }
        let waiting = self.sending.len() + self.refused.len();
        let at_most_ns = if waiting > 0 { ROOM_SLEEP_NS } else { SLEEP_MAX_NS };
        self.target.wait(at_most_ns).map_err(|e| BenchError::peer("waiting", e))
    }

    /// Looks at the clock: window, silence, bodies and probes that found no room.
    fn look(&mut self, now: u64) -> Result<(), BenchError> {
        self.see(now);
        let of_probe = self.probe.as_ref().map_or(0, |probe| probe.answered());
        self.silence.check(now, self.frames + of_probe, self.owed())?;
        if self.window.phase == Phase::Drain {
            self.refused.clear();
            return Ok(());
        }
        self.send_probe()?;
        self.retry()
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
            frames: Some(self.frames_in_window),
            probe: self.probe.map(|probe| probe.into_result()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::load::run_until_answered;
    use std::convert::Infallible;

    /// A server in the same thread: frames of odd lengths in both directions, a few bodies at once.
    struct Model {
        room: usize,
        live: Vec<(u32, usize, VecDeque<Vec<u8>>)>,
        frame: usize,
        /// The frame, counted over all, that comes back broken.
        broken: Option<u64>,
        served: u64,
        most: usize,
        size: usize,
        probe: Option<(u32, Vec<u8>)>,
        looks: u32,
    }

    impl Model {
        fn new(room: usize, frame: usize) -> Self {
            let (live, size) = (Vec::new(), 0);
            Self { room, live, frame, broken: None, served: 0, most: 0, size, probe: None, looks: 0 }
        }
    }

    impl LongTarget for Model {
        type Error = Infallible;

        fn try_start(&mut self, _: usize, tag: u32, size: usize) -> Result<bool, Infallible> {
            if self.live.len() == self.room {
                return Ok(false);
            }
            self.size = size;
            self.live.push((tag, 0, VecDeque::new()));
            self.most = self.most.max(self.live.len());
            Ok(true)
        }

        fn try_send(&mut self, tag: u32, body: &Outgoing) -> Result<usize, Infallible> {
            let (_, at, frames) = self.live.iter_mut().find(|(t, ..)| *t == tag).expect("it has begun");
            if frames.len() == 2 {
                return Ok(0);
            }
            let mut request = Vec::new();
            let len = self.frame.min(body.left());
            body.write(len, |part| {
                request.extend_from_slice(part);
                Ok::<(), Infallible>(())
            })?;
            let mut reply = vec![0; len];
            work::answer_at(*at as u64, &request, &mut reply);
            *at += len;
            frames.push_back(reply);
            Ok(len)
        }

        fn try_receive(&mut self, frame: &mut [u8]) -> Result<Option<Frame>, Infallible> {
            // Now the probe, now a body, if both are there.
            self.looks += 1;
            if let Some((tag, reply)) = self.probe.take_if(|_| self.looks.is_multiple_of(2)) {
                frame[..reply.len()].copy_from_slice(&reply);
                return Ok(Some(Frame { tag, len: reply.len(), ok: true, last: true }));
            }
            let Some(i) = self.live.iter().position(|(.., frames)| !frames.is_empty()) else {
                return Ok(None);
            };
            let (tag, at, frames) = &mut self.live[i];
            let mut reply = frames.pop_front().expect("it has one");
            self.served += 1;
            reply[0] ^= u8::from(self.broken == Some(self.served));
            frame[..reply.len()].copy_from_slice(&reply);
            let last = *at == self.size && frames.is_empty();
            let found = Frame { tag: *tag, len: reply.len(), ok: true, last };
            if last {
                self.live.remove(i);
            }
            Ok(Some(found))
        }

        fn try_probe(&mut self, _: usize, payload: &[u8], tag: u32) -> Result<bool, Infallible> {
            let mut reply = vec![0; payload.len()];
            work::answer(payload, &mut reply);
            self.probe = Some((tag, reply));
            Ok(true)
        }

        fn flush(&mut self) -> Result<(), Infallible> {
            Ok(())
        }

        fn wait(&mut self, _: u64) -> Result<(), Infallible> {
            Ok(())
        }
    }

    fn shape(connections: usize, in_flight: usize, size: usize) -> Shape {
        Shape { sleeps: true, ..Shape::closed(connections, in_flight, size) }
    }

    /// Goal:   bodies in frames of any length are answered rightly, several at once, and no more than there is room
    ///         for; those that found none begin later.
    #[test]
    fn bodies_of_odd_frames_are_checked_and_wait_for_room() {
        for (connections, in_flight, size, frame, room) in
            [(1, 1, 20_000, 16_384, 1), (3, 2, 50_001, 1023, 9), (5, 1, 17_000, 777, 2)]
        {
            let mut model = Model::new(room, frame);
            let result = run_until_answered(|schedule| {
                run(&mut model, &shape(connections, in_flight, size), schedule)
            });
            assert_eq!(result.errors, 0, "{size} in frames of {frame}");
            assert!(result.requests > 0);
            assert_eq!(model.most, room.min(connections * in_flight));
            let expected = model.most as f64;
            assert!(result.in_flight_mean > 0.0 && result.in_flight_mean <= expected + 0.01);
            let timed: u64 = Latencies::from_sparse(&result.latencies).len();
            assert!(timed.abs_diff(result.requests) <= 2 * (connections * in_flight) as u64, "all are timed");
        }
    }

    /// Goal:   one wrong byte in one frame is one error, and the load goes on.
    #[test]
    fn trap26_a_broken_frame_is_an_error_of_its_body() {
        let mut model = Model::new(4, 1000);
        model.broken = Some(3);
        let result = run_until_answered(|schedule| run(&mut model, &shape(2, 1, 20_000), schedule));
        assert_eq!(result.errors, 1);
        assert!(model.served > 3);
    }

    #[test]
    fn a_probe_runs_beside_the_bodies_and_is_counted_for_itself() {
        let mut model = Model::new(4, 1000);
        let probed = Shape { probe: Some(100), ..shape(2, 1, 20_000) };
        let result = run_until_answered(|schedule| run(&mut model, &probed, schedule));
        let probe = result.probe.unwrap();
        assert!(result.requests > 0 && probe.requests > 0);
        assert_eq!((result.errors, probe.errors), (0, 0));
    }

    #[test]
    fn a_probe_alone_needs_no_bodies() {
        let mut model = Model::new(4, 1000);
        let probed = Shape { probe: Some(100), ..shape(3, 1, 20_000).without_load() };
        let result = run_until_answered(|schedule| run(&mut model, &probed, schedule));
        assert_eq!((result.requests, result.errors, model.served), (0, 0, 0));
        assert!(result.probe.unwrap().requests > 0);
    }
}

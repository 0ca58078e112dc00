//! What all peers have in common: the questions they are asked, the work they do, the clock, the output.
//!
//! Work:   the server answers every request with all its 64-bit words XOR [`MASK`]; the client makes every request of a
//!         nonce of its own and checks every word of every answer.
//! Clock:  CLOCK_MONOTONIC. With one call in flight each is timed, from before its request is made until its answer has
//!         been checked; with several one in sixteen is, and what counts is the rate.
//! Output: one line of JSON.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// What every word of an answer differs by from its request's. No byte of it is 0.
pub const MASK: u64 = 0x9E37_79B9_7F4A_7C15;
const GOLDEN: u64 = 0xD134_2543_DE82_EF95;
/// Words of a block; blocks of a longer body differ.
const BLOCK: usize = 128;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = BLOCK * 8;
/// Calls of which one is timed, where several are in flight.
const ONE_IN: u64 = 16;

/// Any error of a peer: it is printed and ends the process.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

static PATTERN: [u64; BLOCK] = pattern();

const fn pattern() -> [u64; BLOCK] {
    let mut words = [0; BLOCK];
    let mut i = 0;
    while i < BLOCK {
        let n = (i as u64 + 1).wrapping_mul(GOLDEN);
        words[i] = (n ^ (n >> 29)).wrapping_mul(MASK);
        i += 1;
    }
    words
}

/// Writes the request of this nonce; whole words only.
#[inline]
pub fn fill(nonce: u64, request: &mut [u8]) {
    fill_at(nonce, 0, request);
}

/// Writes the part of it that begins with block `first`.
#[inline]
pub fn fill_at(nonce: u64, first: usize, part: &mut [u8]) {
    for (index, block) in (first..).zip(part.chunks_mut(BLOCK_BYTES)) {
        let nonce = nonce.wrapping_add((index as u64).wrapping_mul(GOLDEN));
        for (word, constant) in block.as_chunks_mut::<8>().0.iter_mut().zip(&PATTERN) {
            *word = (nonce ^ constant).to_le_bytes();
        }
    }
}

/// Writes the answer to a request of whole words; both are equally long.
#[inline]
pub fn answer(request: &[u8], answer: &mut [u8]) {
    for (answer, word) in answer.as_chunks_mut::<8>().0.iter_mut().zip(request.as_chunks::<8>().0) {
        *answer = (u64::from_le_bytes(*word) ^ MASK).to_le_bytes();
    }
}

/// Whether `answer` is, in every word, the answer to the request of this nonce.
#[inline]
pub fn is_right(nonce: u64, answer: &[u8]) -> bool {
    is_right_at(nonce, 0, answer)
}

/// The same for the part of an answer that begins with block `first`.
#[inline]
pub fn is_right_at(nonce: u64, first: usize, part: &[u8]) -> bool {
    let mut wrong = 0;
    for (index, block) in (first..).zip(part.chunks(BLOCK_BYTES)) {
        let nonce = nonce.wrapping_add((index as u64).wrapping_mul(GOLDEN)) ^ MASK;
        let words = block.as_chunks::<8>().0.iter().zip(&PATTERN);
        wrong |=
            words.fold(0, |wrong, (word, constant)| wrong | (u64::from_le_bytes(*word) ^ nonce ^ constant));
    }
    wrong == 0
}

/// What is asked of a process: `server` or `client`, then `key=value` words.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `server` or `client`, or what else the peer has.
    pub role: String,
    /// The socket's path, or what names are made of.
    pub path: String,
    /// Poll instead of sleeping, where the peer can.
    pub spins: bool,
    /// Bytes of a request and of its answer.
    pub size: usize,
    /// Connections.
    pub connections: usize,
    /// Calls in flight on each.
    pub in_flight: usize,
    /// Between an answer and the next request.
    pub think: Duration,
    /// Length of the window.
    pub seconds: f64,
    /// Left out before it.
    pub warm: f64,
    /// One call on each connection, then wait for the end of standard input.
    pub holds: bool,
}

impl Plan {
    /// Reads the command line.
    ///
    /// # Panics
    ///
    /// For words that mean nothing: the runner is the only caller.
    pub fn from_args() -> Self {
        let mut words = std::env::args().skip(1);
        let mut plan = Self {
            role: words.next().expect("a role"),
            path: String::new(),
            spins: false,
            size: 64,
            connections: 1,
            in_flight: 1,
            think: Duration::ZERO,
            seconds: 1.0,
            warm: 0.2,
            holds: false,
        };
        for word in words {
            let (key, value) = word.split_once('=').expect("key=value");
            match key {
                "path" => plan.path = value.to_owned(),
                "idle" => plan.spins = value == "spin",
                "size" => plan.size = value.parse().expect("a size"),
                "connections" => plan.connections = value.parse().expect("a number"),
                "in_flight" => plan.in_flight = value.parse().expect("a number"),
                "think_us" => plan.think = Duration::from_micros(value.parse().expect("a number")),
                "seconds" => plan.seconds = value.parse().expect("seconds"),
                "warm" => plan.warm = value.parse().expect("seconds"),
                "hold" => plan.holds = value == "1",
                other => panic!("unknown word {other}"),
            }
        }
        assert!(plan.size.is_multiple_of(8) && plan.size > 0, "bodies are whole words");
        plan
    }

    /// The last part of the path: a name for what has no path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// Says one line to the runner.
///
/// # Errors
///
/// If it is gone.
pub fn say(line: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// Waits until the runner closes standard input.
///
/// # Errors
///
/// If it cannot be read.
pub fn until_told() -> Result<()> {
    std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A call that is in flight.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// What its request is made of.
    pub nonce: u64,
    /// When it began, where it is timed.
    begun: Option<Instant>,
    /// Bytes of its answer that came in parts before the last.
    come: usize,
    /// One of these was wrong.
    wrong: bool,
}

/// Counts, times and checks.
#[derive(Debug)]
pub struct Meter {
    one_in: u64,
    /// Requests that a holding client makes at most.
    most: u64,
    begin: Instant,
    end: Instant,
    over: bool,
    asked: u64,
    answered: u64,
    wrong: u64,
    /// Moment and answers at the first and last look inside the window.
    first: Option<(Instant, u64)>,
    last: Option<(Instant, u64)>,
    histogram: Histogram,
}

impl Meter {
    /// The window begins after the warm-up, which begins now.
    pub fn new(plan: &Plan) -> Self {
        let begin = Instant::now() + Duration::from_secs_f64(plan.warm);
        let alone = plan.connections * plan.in_flight == 1;
        Self {
            one_in: if alone { 1 } else { ONE_IN },
            most: if plan.holds { plan.connections as u64 } else { u64::MAX },
            begin,
            end: begin + Duration::from_secs_f64(plan.seconds),
            over: false,
            asked: 0,
            answered: 0,
            wrong: 0,
            first: None,
            last: None,
            histogram: Histogram::default(),
        }
    }

    /// The next call, or `None` once the window is over.
    #[inline]
    pub fn request(&mut self) -> Option<Call> {
        if self.over || self.asked == self.most {
            return None;
        }
        self.asked += 1;
        let begun = self.asked.is_multiple_of(self.one_in).then(Instant::now);
        if self.most == u64::MAX && begun.is_some_and(|now| now >= self.end) {
            self.asked -= 1;
            self.over = true;
            return None;
        }
        Some(Call { nonce: self.asked.wrapping_mul(GOLDEN), begun, come: 0, wrong: false })
    }

    /// A part of its answer that is not the last, of whole blocks: it is checked.
    #[inline]
    pub fn part(&mut self, call: &mut Call, bytes: &[u8]) {
        call.wrong |= !bytes.len().is_multiple_of(BLOCK_BYTES)
            || !is_right_at(call.nonce, call.come / BLOCK_BYTES, bytes);
        call.come += bytes.len();
    }

    /// Its answer, or the last part of it.
    #[inline]
    pub fn answer(&mut self, call: Call, bytes: &[u8], size: usize) {
        self.answered += 1;
        let is_right = is_right_at(call.nonce, call.come / BLOCK_BYTES, bytes);
        if call.wrong || call.come + bytes.len() != size || !is_right {
            self.wrong += 1;
        }
        let Some(begun) = call.begun else { return };
        let now = Instant::now();
        if begun >= self.begin && now <= self.end {
            self.histogram.add((now - begun).as_nanos() as u64);
        }
        if now >= self.begin && now <= self.end {
            self.first.get_or_insert((now, self.answered));
            self.last = Some((now, self.answered));
        }
    }

    /// Whether every request has been answered.
    pub fn is_idle(&self) -> bool {
        self.asked == self.answered
    }

    /// Says what was found.
    ///
    /// # Errors
    ///
    /// If an answer was wrong or did not come.
    pub fn report(&self) -> Result<()> {
        let (seconds, answers) = match (self.first, self.last) {
            (Some((from, before)), Some((to, after))) => ((to - from).as_secs_f64(), after - before),
            _ => (0.0, 0),
        };
        let per_second = if seconds > 0.0 { answers as f64 / seconds } else { 0.0 };
        let [p50, p90, p99, p999] = [0.5, 0.9, 0.99, 0.999].map(|q| self.histogram.quantile(q));
        say(format_args!(
            "{{\"requests\":{},\"per_second\":{per_second:.1},\"samples\":{},\"p50_ns\":{p50},\"p90_ns\":{p90},\
             \"p99_ns\":{p99},\"p999_ns\":{p999},\"max_ns\":{},\"wrong\":{}}}",
            self.answered, self.histogram.samples, self.histogram.max, self.wrong
        ))?;
        if self.wrong > 0 || !self.is_idle() {
            return Err(format!("{} wrong, {} of {} answered", self.wrong, self.answered, self.asked).into());
        }
        Ok(())
    }
}

/// Samples to the next 64th of a power of two.
#[derive(Debug)]
struct Histogram {
    buckets: Vec<u64>,
    samples: u64,
    max: u64,
}

const STEPS: u64 = 64;

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; 64 * STEPS as usize], samples: 0, max: 0 }
    }
}

impl Histogram {
    fn index(ns: u64) -> usize {
        let shift = (64 - ns.leading_zeros()).saturating_sub(7);
        (u64::from(shift) * STEPS + (ns >> shift)) as usize
    }

    fn add(&mut self, ns: u64) {
        self.buckets[Self::index(ns)] += 1;
        self.samples += 1;
        self.max = self.max.max(ns);
    }

    fn quantile(&self, part: f64) -> u64 {
        let rank = ((self.samples as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let shift = (index as u64 / STEPS).saturating_sub(1);
                let value = index as u64 - shift * STEPS;
                return (value << shift).min(self.max);
            }
        }
        self.max
    }
}

/// What carries the calls of a client of one thread.
pub trait Link {
    /// Sends the request of this nonce; may keep it until [`Link::receive`].
    ///
    /// # Errors
    ///
    /// Whatever ends the run.
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()>;

    /// Sends what was kept, waits until at least one answer has come, and hands out all that have, in order on each
    /// connection: whole, or in parts of whole blocks as they come; `true` says that an answer is over.
    ///
    /// # Errors
    ///
    /// Whatever ends the run.
    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()>;
}

/// Runs a client, from the first call to the report.
///
/// # Errors
///
/// What ended it early, and wrong answers.
pub fn drive(link: &mut impl Link, plan: &Plan) -> Result<()> {
    let mut meter = Meter::new(plan);
    let mut calls: Vec<VecDeque<Call>> = vec![VecDeque::with_capacity(plan.in_flight); plan.connections];
    let mut ready: Vec<usize> =
        (0..plan.connections * plan.in_flight).map(|n| n % plan.connections).collect();
    loop {
        for connection in ready.drain(..) {
            if let Some(call) = meter.request() {
                calls[connection].push_back(call);
                link.send(connection, call.nonce)?;
            }
        }
        if meter.is_idle() {
            break;
        }
        link.receive(&mut |connection, bytes, is_over| {
            if !is_over {
                if let Some(call) = calls[connection].front_mut() {
                    meter.part(call, bytes);
                }
            } else if let Some(call) = calls[connection].pop_front() {
                meter.answer(call, bytes, plan.size);
                ready.push(connection);
            }
        })?;
        if !plan.think.is_zero() {
            std::thread::sleep(plan.think);
        }
    }
    finish(&meter, plan)
}

/// The end of a client: what it found, or, where it holds, that it does.
///
/// # Errors
///
/// As for [`Meter::report`].
pub fn finish(meter: &Meter, plan: &Plan) -> Result<()> {
    if plan.holds {
        say("holding")?;
        until_told()?;
    }
    meter.report()
}

/// Bytes that have come on a stream, and the frames in them: a length of 32 bits, then as many bytes.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    taken: usize,
}

impl Inbox {
    /// Appends what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame.
    pub fn next_frame(&mut self) -> Option<&[u8]> {
        let rest = &self.bytes[self.taken..];
        let (head, rest) = rest.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*head) as usize;
        let frame = rest.get(..len)?;
        self.taken += 4 + len;
        Some(frame)
    }
}

/// Appends a frame of `len` bytes, which `write` fills.
pub fn frame(out: &mut Vec<u8>, len: usize, write: impl FnOnce(&mut [u8])) {
    out.extend_from_slice(&(len as u32).to_le_bytes());
    let at = out.len();
    out.resize(at + len, 0);
    write(&mut out[at..]);
}

/// The server's side of a stream: what has come in, what goes out.
#[derive(Debug, Default)]
pub struct Serving {
    inbox: Inbox,
}

impl Serving {
    /// Takes what has come and appends all answers to it.
    pub fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.inbox.push(bytes);
        while let Some(request) = self.inbox.next_frame() {
            frame(out, request.len(), |target| answer(request, target));
        }
    }
}

/// The client's side of a stream with a task of its own.
#[derive(Debug)]
pub struct Conversation {
    inbox: Inbox,
    calls: VecDeque<Call>,
    in_flight: usize,
    size: usize,
}

impl Conversation {
    /// Nothing asked yet.
    pub fn new(plan: &Plan) -> Self {
        Self { inbox: Inbox::default(), calls: VecDeque::new(), in_flight: plan.in_flight, size: plan.size }
    }

    /// Appends as many requests as may be in flight; `false` when nothing is in flight any more.
    pub fn ask(&mut self, meter: &mut Meter, out: &mut Vec<u8>) -> bool {
        while self.calls.len() < self.in_flight {
            let Some(call) = meter.request() else { break };
            frame(out, self.size, |request| fill(call.nonce, request));
            self.calls.push_back(call);
        }
        !self.calls.is_empty()
    }

    /// Takes what has come.
    pub fn take(&mut self, meter: &mut Meter, bytes: &[u8]) {
        self.inbox.push(bytes);
        while let Some(answer) = self.inbox.next_frame() {
            if let Some(call) = self.calls.pop_front() {
                meter.answer(call, answer, self.size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_anywhere_is_seen() {
        for size in [64, 1024, 4096] {
            let (mut request, mut reply) = (vec![0; size], vec![0; size]);
            fill(7, &mut request);
            answer(&request, &mut reply);
            assert!(is_right(7, &reply) && !is_right(8, &reply) && !is_right(7, &request));
            for i in 0..size {
                reply[i] ^= 1;
                assert!(!is_right(7, &reply), "byte {i} of {size}");
                reply[i] ^= 1;
            }
        }
    }

    /// Goal:   an answer that comes in parts is right only if all of them are, are whole blocks, and are as long as asked.
    #[test]
    fn parts_are_checked_where_they_belong() {
        let plan = Plan {
            role: "client".to_owned(),
            path: String::new(),
            spins: false,
            size: 0,
            connections: 1,
            in_flight: 1,
            think: Duration::ZERO,
            seconds: 1.0,
            warm: 0.0,
            holds: true,
        };
        let size = 4 * BLOCK_BYTES + 64;
        let judge = |cuts: &[usize], spoil: Option<usize>| {
            let mut meter = Meter::new(&plan);
            let mut call = meter.request().expect("one call");
            let (mut request, mut reply) = (vec![0; size], vec![0; size]);
            fill(call.nonce, &mut request);
            answer(&request, &mut reply);
            if let Some(at) = spoil {
                reply[at] ^= 1;
            }
            let mut from = 0;
            for to in cuts {
                meter.part(&mut call, &reply[from..*to]);
                from = *to;
            }
            meter.answer(call, &reply[from..], size);
            meter.wrong == 0
        };
        let cuts = [BLOCK_BYTES, 3 * BLOCK_BYTES];
        assert!(judge(&[], None) && judge(&cuts, None));
        for at in [0, BLOCK_BYTES, 3 * BLOCK_BYTES - 1, size - 1] {
            assert!(!judge(&cuts, Some(at)), "byte {at}");
        }
        assert!(!judge(&[100], None), "no whole block");
    }

    #[test]
    fn quantiles_are_right_to_a_sixty_fourth() {
        let mut histogram = Histogram::default();
        (1..=100_000).for_each(|ns| histogram.add(ns));
        for part in [0.01, 0.5, 0.99, 0.999] {
            let (got, exact) = (histogram.quantile(part) as f64, 100_000.0 * part);
            assert!((got / exact - 1.0).abs() < 0.02, "{part}: {got}");
        }
    }

    #[test]
    fn frames_come_whole_however_they_are_cut() {
        let mut out = Vec::new();
        for len in [8, 64, 24] {
            frame(&mut out, len, |bytes| fill(len as u64, bytes));
        }
        let mut inbox = Inbox::default();
        let mut lens = Vec::new();
        for byte in out {
            inbox.push(&[byte]);
            while let Some(frame) = inbox.next_frame() {
                lens.push(frame.len());
            }
        }
        assert_eq!(lens, [8, 64, 24]);
    }
}

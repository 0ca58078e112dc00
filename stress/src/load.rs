//! The load of one client process: a closed loop with one call in flight on each of its connections.
//!
//! Order: a first call on every connection, warm-up, the window, until the last answer is there; then one
//! more call on every connection, which shows who is alive. Every byte of every answer is checked, in the
//! window's time; only right answers count, and only those taken between two looks at the clock inside the
//! window. A request that finds no room waits for it: nothing is dropped.

use crate::clock::{SECOND, now_ns};
use crate::content::{self, Nonces, SIZE};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Answers between two looks at the clock, at most.
const BURST: usize = 64;
/// How long answers may fail to come.
const SILENCE_NS: u64 = if cfg!(test) { SECOND } else { 10 * SECOND };
/// Faults told in words.
const NOTES_MAX: usize = 8;
/// No call in flight.
const NONE: u64 = 0;

/// What carries calls: the sessions of one client process, or the bare ring.
pub trait Link {
    /// Sends a request on a connection that has none in flight.
    fn send(&mut self, connection: u32, request: &[u8; SIZE]) -> Sent;

    /// Takes one answer of any connection into the first bytes of `answer`. Never waits; what was sent
    /// reaches the server at the latest by polling until nothing comes.
    fn poll(&mut self, answer: &mut [u8; SIZE]) -> Polled;
}

/// What became of a request.
#[derive(Debug)]
pub enum Sent {
    /// It is on its way.
    Yes,
    /// There is no room now.
    NoRoom,
    /// It cannot be sent, and why.
    Failed(String),
}

/// What came.
#[derive(Debug)]
pub enum Polled {
    /// Nothing now.
    Nothing,
    /// An answer of `len` bytes, even if more than the buffer took.
    Answer {
        /// Whose.
        connection: u32,
        /// Its length.
        len: usize,
    },
    /// An error instead of an answer.
    Refused {
        /// Whose.
        connection: u32,
        /// What it says.
        why: String,
    },
    /// A session is broken; it is not polled again and its calls stay unanswered.
    Broken(String),
}

/// When the window is; all client processes of a run get the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// Its start, CLOCK_MONOTONIC, nanoseconds. The load begins at once: what comes before is warm-up.
    pub begin_ns: u64,
    /// Its end.
    pub end_ns: u64,
}

impl Schedule {
    /// A window of `window_ns` after so much warm-up.
    pub fn after(warm_up_ns: u64, window_ns: u64) -> Self {
        let begin_ns = now_ns() + warm_up_ns;
        Self { begin_ns, end_ns: begin_ns + window_ns }
    }
}

/// What the load found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Right answers in the window.
    pub answered: u64,
    /// Right answers in all: warm-up, window, what was in flight after it, and the last call of each.
    pub answered_in_all: u64,
    /// Connections that answered their last call, rightly.
    pub alive: u64,
    /// Answers with a byte or a length that is wrong, and answers to nothing.
    pub wrong: u64,
    /// Errors instead of answers, requests that could not be sent, sessions that broke.
    pub errors: u64,
    /// Requests sent and never answered.
    pub lost: u64,
    /// Requests that had to wait for room.
    pub waited: u64,
    /// The first faults in words.
    pub notes: Vec<String>,
}

impl Outcome {
    /// Adds what another process found.
    pub fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.answered_in_all += other.answered_in_all;
        self.alive += other.alive;
        self.wrong += other.wrong;
        self.errors += other.errors;
        self.lost += other.lost;
        self.waited += other.waited;
        other.notes.into_iter().for_each(|note| self.note(note));
    }

    /// Keeps a fault in words, unless there are enough.
    pub fn note(&mut self, note: String) {
        if self.notes.len() < NOTES_MAX && !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// Runs the whole load over `connections` connections of `link`. `yields`: others poll on the same core.
pub fn run<L: Link>(
    link: &mut L,
    connections: usize,
    nonces: Nonces,
    yields: bool,
    schedule: &Schedule,
) -> Outcome {
    let mut load = Load::new(link, connections, nonces, yields);
    load.sustain(schedule);
    load.drain();
    load.one_more_each();
    load.outcome.lost = load.outstanding as u64;
    load.outcome.answered_in_all = load.right;
    load.outcome
}

struct Load<'a, L> {
    link: &'a mut L,
    nonces: Nonces,
    yields: bool,
    /// The nonce of each connection's call in flight, or [`NONE`].
    calls: Vec<u64>,
    outstanding: usize,
    /// Connections whose request found no room.
    waiting: VecDeque<u32>,
    /// Right answers so far.
    right: u64,
    silence: Silence,
    buffer: [u8; SIZE],
    outcome: Outcome,
}

impl<'a, L: Link> Load<'a, L> {
    fn new(link: &'a mut L, connections: usize, nonces: Nonces, yields: bool) -> Self {
        Self {
            link,
            nonces,
            yields,
            calls: vec![NONE; connections],
            outstanding: 0,
            waiting: VecDeque::with_capacity(connections),
            right: 0,
            silence: Silence::from_now(),
            buffer: [0; SIZE],
            outcome: Outcome::default(),
        }
    }

    /// Keeps one call in flight on each connection until the window is over.
    fn sustain(&mut self, schedule: &Schedule) {
        for connection in 0..self.calls.len() as u32 {
            self.send(connection);
        }
        let mut window = Window::new(*schedule);
        loop {
            let now = now_ns();
            if !window.look(now, self.right) || self.silence.is_over(now, self.right) {
                break;
            }
            self.burst(true);
        }
        self.outcome.answered = window.answered;
        // What has not been sent will not be.
        self.waiting.clear();
    }

    /// Takes what is still in flight.
    fn drain(&mut self) {
        while self.outstanding > 0 && !self.silence.is_over(now_ns(), self.right) {
            self.burst(false);
        }
    }

    /// One more call on each connection that owes no answer.
    fn one_more_each(&mut self) {
        let before = self.right;
        self.silence = Silence::from_now();
        for connection in 0..self.calls.len() as u32 {
            if self.calls[connection as usize] == NONE {
                self.send(connection);
            }
        }
        while self.outstanding + self.waiting.len() > 0 && !self.silence.is_over(now_ns(), self.right) {
            self.burst(false);
        }
        self.outcome.alive = self.right - before;
    }

    /// Takes some answers, or pauses when there are none; `again`: each is followed by the next request.
    #[inline(always)]
    fn burst(&mut self, again: bool) {
        for _ in 0..BURST {
            match self.link.poll(&mut self.buffer) {
                Polled::Answer { connection, len } => {
                    self.take(connection, len);
                    self.follow(connection, again);
                }
                Polled::Nothing => {
                    self.pause();
                    return;
                }
                Polled::Refused { connection, why } => {
                    self.refused(connection, why);
                    self.follow(connection, again);
                }
                Polled::Broken(why) => self.fault(why),
            }
        }
    }

    #[inline(always)]
    fn take(&mut self, connection: u32, len: usize) {
        match self.finish(connection) {
            Some(nonce) if len == SIZE && content::is_right(nonce, &self.buffer) => self.right += 1,
            nonce => self.wrong(connection, len, nonce.is_some()),
        }
    }

    /// The nonce of the call that is over, or `None` if there was none.
    #[inline(always)]
    fn finish(&mut self, connection: u32) -> Option<u64> {
        let call = self.calls.get_mut(connection as usize).filter(|nonce| **nonce != NONE)?;
        self.outstanding -= 1;
        Some(std::mem::replace(call, NONE))
    }

    /// An answer was taken: there may be room for who waited first, then for the same connection.
    #[inline(always)]
    fn follow(&mut self, connection: u32, again: bool) {
        if !self.waiting.is_empty() {
            self.retry();
        }
        if again && self.calls.get(connection as usize) == Some(&NONE) {
            self.send(connection);
        }
    }

    #[cold]
    fn retry(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            self.send(first);
        }
    }

    #[inline(always)]
    fn send(&mut self, connection: u32) {
        let nonce = self.nonces.draw();
        let mut request = [0; SIZE];
        content::fill(nonce, &mut request);
        match self.link.send(connection, &request) {
            Sent::Yes => {
                self.calls[connection as usize] = nonce;
                self.outstanding += 1;
            }
            other => self.unsent(connection, other),
        }
    }

    #[inline(always)]
    fn pause(&mut self) {
        if !self.waiting.is_empty() {
            self.retry();
        }
        if self.yields {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }

    #[cold]
    fn unsent(&mut self, connection: u32, sent: Sent) {
        match sent {
            Sent::Yes => {}
            Sent::NoRoom => {
                self.outcome.waited += 1;
                self.waiting.push_back(connection);
            }
            Sent::Failed(why) => self.fault(why),
        }
    }

    #[cold]
    fn refused(&mut self, connection: u32, why: String) {
        if self.finish(connection).is_none() {
            self.wrong(connection, 0, false);
        } else {
            self.fault(why);
        }
    }

    #[cold]
    fn fault(&mut self, why: String) {
        self.outcome.errors += 1;
        self.outcome.note(why);
    }

    #[cold]
    fn wrong(&mut self, connection: u32, len: usize, asked: bool) {
        self.outcome.wrong += 1;
        self.outcome.note(if asked {
            format!("connection {connection}: a wrong answer of {len} bytes")
        } else {
            format!("connection {connection}: an answer that nobody asked for")
        });
    }
}

/// Counts the right answers of the window: those between the first and the last look inside it.
#[derive(Debug)]
struct Window {
    schedule: Schedule,
    /// Right answers at the first look inside.
    before: Option<u64>,
    answered: u64,
}

impl Window {
    fn new(schedule: Schedule) -> Self {
        Self { schedule, before: None, answered: 0 }
    }

    /// Notes how many there are now; `false` when the window is over.
    #[inline(always)]
    fn look(&mut self, now: u64, right: u64) -> bool {
        if now >= self.schedule.end_ns {
            return false;
        }
        if now >= self.schedule.begin_ns {
            self.answered = right - *self.before.get_or_insert(right);
        }
        true
    }
}

/// How long no right answer has come.
#[derive(Debug)]
pub struct Silence {
    right: u64,
    since_ns: u64,
}

impl Silence {
    /// It begins now.
    pub fn from_now() -> Self {
        Self { right: u64::MAX, since_ns: now_ns() }
    }

    /// Whether it has lasted too long.
    #[inline(always)]
    pub fn is_over(&mut self, now: u64, right: u64) -> bool {
        if right != self.right {
            *self = Self { right, since_ns: now };
        }
        now.saturating_sub(self.since_ns) > SILENCE_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a [`Fake`] does with the n-th request.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        NoRoomOnce,
        FlipByte,
        Short,
        AnswerTwice,
        SwapWithNext,
        Refuse,
    }

    /// A server in this process that answers at once, with one fault.
    struct Fake {
        fault: Option<(u64, Fault)>,
        seen: u64,
        answers: VecDeque<(u32, Result<Vec<u8>, String>)>,
    }

    impl Fake {
        fn new(fault: Option<(u64, Fault)>) -> Self {
            Self { fault, seen: 0, answers: VecDeque::new() }
        }
    }

    impl Link for Fake {
        fn send(&mut self, connection: u32, request: &[u8; SIZE]) -> Sent {
            self.seen += 1;
            let mut answer = vec![0; SIZE];
            content::answer(request, &mut answer);
            match self.fault.filter(|(nth, _)| *nth == self.seen).map(|(_, fault)| fault) {
                Some(Fault::NoRoomOnce) => return Sent::NoRoom,
                Some(Fault::FlipByte) => answer[1023] ^= 1,
                Some(Fault::Short) => answer.truncate(1016),
                Some(Fault::AnswerTwice) => self.answers.push_back((connection, Ok(answer.clone()))),
                Some(Fault::Refuse) => {
                    self.answers.push_back((connection, Err("no".to_owned())));
                    return Sent::Yes;
                }
                Some(Fault::SwapWithNext) => {
                    self.answers.push_back((connection + 1, Ok(answer)));
                    return Sent::Yes;
                }
                None => {}
            }
            self.answers.push_back((connection, Ok(answer)));
            Sent::Yes
        }

        fn poll(&mut self, buffer: &mut [u8; SIZE]) -> Polled {
            match self.answers.pop_front() {
                None => Polled::Nothing,
                Some((connection, Err(why))) => Polled::Refused { connection, why },
                Some((connection, Ok(answer))) => {
                    buffer[..answer.len()].copy_from_slice(&answer);
                    Polled::Answer { connection, len: answer.len() }
                }
            }
        }
    }

    fn run_fake(fault: Option<(u64, Fault)>) -> Outcome {
        let schedule = Schedule::after(1_000_000, 5_000_000);
        run(&mut Fake::new(fault), 4, Nonces::new(1, 0), true, &schedule)
    }

    #[test]
    fn a_right_server_has_every_connection_alive_and_nothing_to_complain_of() {
        let outcome = run_fake(None);
        assert!(outcome.answered > 0 && outcome.answered_in_all > outcome.answered);
        let rest = Outcome { answered: 0, answered_in_all: 0, ..outcome };
        assert_eq!(rest, Outcome { alive: 4, ..Outcome::default() });
    }

    /// Goal:   each kind of fault is counted, once, as what it is.
    /// Method: a server that does one thing wrong with its seventh request, in the warm-up: left out of the
    ///         rate is not left out of the verdict.
    #[test]
    fn one_fault_is_counted_once_even_in_the_warm_up() {
        let counts = |fault| {
            let o = run_fake(Some((7, fault)));
            (o.wrong, o.errors, o.lost, o.waited, o.alive)
        };
        assert_eq!(counts(Fault::FlipByte), (1, 0, 0, 0, 4));
        assert_eq!(counts(Fault::Short), (1, 0, 0, 0, 4));
        assert_eq!(counts(Fault::Refuse), (0, 1, 0, 0, 4));
        assert_eq!(counts(Fault::NoRoomOnce), (0, 0, 0, 1, 4));
    }

    #[test]
    fn an_answer_that_nobody_asked_for_is_wrong() {
        // The second answer meets the connection's next call, and that one's answer the next, to the end.
        let outcome = run_fake(Some((7, Fault::AnswerTwice)));
        assert!(outcome.wrong >= 1 && outcome.lost == 0, "{outcome:?}");
        assert!(!outcome.notes.is_empty() && outcome.notes.len() <= NOTES_MAX);
        // An answer on a number that no connection has.
        let mut fake = Fake::new(None);
        let mut load = Load::new(&mut fake, 1, Nonces::new(1, 0), true);
        load.take(5, SIZE);
        assert_eq!((load.outcome.wrong, load.outstanding), (1, 0));
    }

    #[test]
    fn anothers_answer_is_wrong_and_the_one_that_never_came_is_lost() {
        let outcome = run_fake(Some((6, Fault::SwapWithNext)));
        assert!(outcome.wrong >= 1 && outcome.lost == 1 && outcome.alive < 4, "{outcome:?}");
    }

    #[test]
    fn only_answers_between_two_looks_inside_the_window_count() {
        let mut window = Window::new(Schedule { begin_ns: 100, end_ns: 200 });
        assert!(window.look(90, 10));
        assert!(window.look(105, 15) && window.answered == 0);
        assert!(window.look(199, 40) && window.answered == 25);
        assert!(!window.look(200, 70) && window.answered == 25);
    }

    #[test]
    fn silence_is_over_only_after_its_time_without_an_answer() {
        let mut silence = Silence { right: u64::MAX, since_ns: 0 };
        assert!(!silence.is_over(SILENCE_NS * 2, 1));
        assert!(!silence.is_over(SILENCE_NS * 3, 1));
        assert!(silence.is_over(SILENCE_NS * 3 + 1, 1));
        assert!(!silence.is_over(SILENCE_NS * 3 + 2, 2));
    }

    #[test]
    fn outcomes_add_up_and_a_note_is_kept_once() {
        let one = Outcome {
            answered: 1,
            wrong: 2,
            errors: 3,
            lost: 4,
            notes: vec!["x".into()],
            ..Outcome::default()
        };
        let mut sum = one.clone();
        sum.add(one);
        assert_eq!((sum.answered, sum.wrong, sum.errors, sum.lost), (2, 4, 6, 8));
        assert_eq!(sum.notes, ["x"]);
    }
}

//! How a client waits for completions, and how it notices that the server is gone.
//!
//! | policy | on the core of its lane's reactor | elsewhere |
//! | --- | --- | --- |
//! | `handoff` | yields the core to the reactor, then sleeps | spins for 20 µs if that reactor polls, then sleeps |
//! | `spin` | yields between two looks | spins |
//! | `block` | sleeps | sleeps |
//!
//! Who sleeps does so on the futex of his lane for 20 ms, then, or at once if calls are in flight on several lanes,
//! on the session's socket: the server rings it with one byte, and its end shows there too (F51).

use super::lane::{Answered, Lane};
use super::session::{End, Session};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::machine;
use crate::machine::current_cpu;
use crate::protocol::handshake::{DisconnectReason, Goodbye, LaneChoice, LaneGrant, LaneRequest};
use crate::protocol::rendezvous;
use doorbell_shm::bell::{WAITER_FUTEX, WAITER_SOCKET};
use doorbell_shm::kill_point;
use doorbell_shm::layout::state;
use doorbell_uring::futex;
use rustix::event::{PollFlags, Timespec};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Polls between two looks at the core that we run on. Nothing happens in a simulation meanwhile.
const SPINS_PER_CPU: u32 = if cfg!(test) { 1 } else { 64 };
/// Of these, so many between two looks at the clock and at the session's state.
const CPUS_PER_LOOK: u32 = 16;
/// Looks between two looks at the socket (a system call).
const LOOKS_PER_SOCKET: u32 = 1 << 8;
/// Time between two looks at the socket by somebody who only polls.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Longest sleep on a futex, which a server that is killed does not wake (F51). Whoever waits longer waits on the
/// socket.
const FUTEX_SLICE: Duration = Duration::from_millis(20);
/// How often a caller lets the reactor of its own core run before it sleeps. The first time usually does, and saves
/// both sides a sleep and a wake.
const YIELDS: u32 = 3;
/// A yield that takes longer has let others run, too: on a crowded core a caller sleeps instead, since the scheduler prefers
/// those that are woken to those that yield.
const CROWDED_YIELD: Duration = Duration::from_micros(100);
/// How many waits it goes on doing so before it tries again.
const CROWDED_WAITS: u32 = 64;
/// How long a caller spins while a reactor of another core polls.
const SPIN_TIME: Duration = Duration::from_micros(20);
/// How long a wish for a lane may stay unanswered before the call takes the lane it has.
const LANE_TIMEOUT: Duration = Duration::from_millis(100);
/// When to try again with a server that is stopping: another one may have taken its place by then.
const DRAINING_RETRY_MS: u32 = 100;

impl Session {
    /// Waits until an answer can be taken, or more of a request be sent; `false` when the deadline came first, or the last
    /// call in flight ended and answers nobody.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<bool> {
        if !self.has_inner_calls() {
            if !self.wait_for_any(deadline)? {
                return Ok(false);
            }
            // Mostly it is an answer. What else there is has to be taken before it can be seen what is behind it.
            if self.has_kept() || self.lanes().any(Lane::brings_answer) {
                return Ok(true);
            }
        }
        self.wait_inside(deadline, Ends::Answer)
    }

    /// The same for a caller who waits for room, too: ends with any call, whether that answers somebody or not.
    pub fn wait_for_any(&mut self, deadline: Option<Instant>) -> Result<bool> {
        if self.has_inner_calls() {
            return self.wait_inside(deadline, Ends::Call);
        }
        if self.has_kept() || self.is_ready() {
            self.flush()?;
            return Ok(true);
        }
        self.wait_for_completion(deadline)
    }

    /// The same where not every completion is an answer: frames, leases, calls that were given up.
    #[cold]
    fn wait_inside(&mut self, deadline: Option<Instant>, ends: Ends) -> Result<bool> {
        let before = self.in_flight();
        loop {
            self.stash()?;
            if self.has_kept() || self.bodies.take_news() {
                self.flush()?;
                return Ok(true);
            }
            let left = self.in_flight();
            // Of a session that is over something else tells.
            let ended = match ends {
                Ends::Answer => left == 0 && before > 0,
                Ends::Call => left < before,
            };
            if ended && self.end.is_none() {
                self.flush()?;
                return Ok(matches!(ends, Ends::Call));
            }
            if !self.wait_for_completion(deadline)? {
                return Ok(false);
            }
        }
    }

    /// Waits for the next completion of the call in `slot` of `lane`; others that come are kept. Room for the requests of
    /// other calls ends no wait.
    #[inline]
    pub fn wait_for(&mut self, lane: u32, slot: u32, deadline: Option<Instant>) -> Result<Answered> {
        loop {
            while let Some(next) = self.next_completed()? {
                if (next.lane, next.slot) == (lane, slot) {
                    return Ok(next);
                }
                self.keep(next);
            }
            if let Some(answered) = self.take_kept(lane, slot) {
                return Ok(answered);
            }
            if self.bodies.are_active() {
                self.bodies.keep_news();
            }
            if !self.wait_for_completion(deadline)? {
                return Err(IpcError::Timeout);
            }
        }
    }

    /// Runs `attempt` until it does not block, or until `deadline`; while it does, flushes and waits for answers.
    pub fn retry_until<T>(
        &mut self,
        deadline: Option<Instant>,
        attempt: &mut dyn FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        loop {
            match attempt(self) {
                Err(IpcError::WouldBlock) => {
                    // Answers that nobody has taken hold the slots: waiting for them would wait for ever.
                    if self.only_untaken_answers() {
                        return Err(IpcError::WouldBlock);
                    }
                    self.bodies.keep_news();
                    if !self.wait_for_completion(deadline)? {
                        return Err(IpcError::Timeout);
                    }
                    self.stash()?;
                }
                other => return other,
            }
        }
    }

    /// Waits until a completion is in a ring or the session is over; `false` when the deadline came first.
    #[inline]
    pub fn wait_for_completion(&mut self, deadline: Option<Instant>) -> Result<bool> {
        if self.end.is_some() {
            return self.what_is_left();
        }
        match self.policy {
            WaitPolicy::Spin => self.spin(deadline),
            WaitPolicy::Handoff => self.hand_over(deadline),
            WaitPolicy::Block => self.block(deadline),
        }
    }

    #[inline(always)]
    fn is_ready(&self) -> bool {
        self.home.is_ready()
            || self.further.iter().any(|lane| lane.is_ready())
            || (self.bodies.are_active() && self.body_has_room())
    }

    /// Whether a reactor that calls are in flight with is pinned to the core that we run on.
    fn shares_core(&self) -> bool {
        let cpu = current_cpu();
        self.lanes().any(|lane| lane.in_flight > 0 && lane.core == cpu)
    }

    #[inline]
    fn spin(&mut self, deadline: Option<Instant>) -> Result<bool> {
        let mut looks = 0u32;
        loop {
            for _ in 0..CPUS_PER_LOOK {
                for _ in 0..SPINS_PER_CPU {
                    if self.is_ready() {
                        return Ok(true);
                    }
                    self.idle()?;
                    std::hint::spin_loop();
                }
                // Spinning there would only keep the reactor from answering.
                if self.shares_core() {
                    self.flush()?;
                    machine::yield_now();
                }
            }
            looks = looks.wrapping_add(1);
            // Nothing has come for some ten microseconds: whoever else wants this core may be who we wait for, or has to
            // get on before the server comes to us. With nobody there it costs a third of one.
            machine::yield_now();
            let closed = self.segment.state().0 == state::CLOSED;
            if (closed || looks.is_multiple_of(LOOKS_PER_SOCKET)) && self.is_over()? {
                return self.what_is_left();
            }
            if deadline.is_some_and(|d| machine::now() >= d) {
                return Ok(false);
            }
        }
    }

    #[inline]
    fn hand_over(&mut self, deadline: Option<Instant>) -> Result<bool> {
        self.flush()?;
        // A reactor with short turns takes the core over as soon as it is woken: it may have answered by now.
        if self.is_ready() {
            return Ok(true);
        }
        if self.crowded > 0 {
            self.crowded -= 1;
        } else if self.shares_core() {
            for _ in 0..YIELDS {
                let before = machine::now();
                if deadline.is_some_and(|d| before >= d) {
                    return Ok(self.is_ready());
                }
                machine::yield_now();
                if machine::now() - before > CROWDED_YIELD {
                    self.crowded = CROWDED_WAITS;
                }
                if self.is_ready() {
                    return Ok(true);
                }
                if self.crowded > 0 {
                    break;
                }
            }
        } else if self.lanes().any(|lane| lane.in_flight > 0 && lane.seems_polled()) {
            let give_up = machine::now() + SPIN_TIME;
            while machine::now() < give_up && !self.shares_core() {
                for _ in 0..SPINS_PER_CPU {
                    if self.is_ready() {
                        return Ok(true);
                    }
                    std::hint::spin_loop();
                }
            }
        }
        self.block(deadline)
    }

    #[cold]
    fn block(&mut self, deadline: Option<Instant>) -> Result<bool> {
        self.flush()?;
        let mut slept = Duration::ZERO;
        loop {
            let now = machine::now();
            let left = deadline.map(|d| d.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                return Ok(self.is_ready());
            }
            let begins = self.wakes_at();
            let left = match begins.map(|at| at.saturating_duration_since(now)) {
                Some(soon) => Some(left.map_or(soon, |left| left.min(soon))),
                None => left,
            };
            let over = match self.only_busy_lane() {
                Some(lane) if slept < FUTEX_SLICE => self.sleep_on_futex(lane, futex_slice(slept, left))?,
                _ => self.sleep_on_socket(left)?,
            };
            if self.is_ready() {
                return Ok(true);
            }
            if over && self.is_over()? {
                return self.what_is_left();
            }
            if begins.is_some() {
                self.flush()?;
            }
            slept += machine::now() - now;
        }
    }

    /// The lane that calls are in flight on, if it is the only one; the home lane if there is none.
    fn only_busy_lane(&self) -> Option<u32> {
        let mut busy = (0..=self.further.len() as u32).filter(|lane| self.lane(*lane).in_flight > 0);
        let first = busy.next().unwrap_or(0);
        busy.next().is_none().then_some(first)
    }

    /// Sleeps until a lane's bell rings, at most so long; says whether the session may be over.
    fn sleep_on_futex(&mut self, lane: u32, slice: Duration) -> Result<bool> {
        // Mark, fence, look again (P5): pairs with publish, fence, look at the bell in the server.
        let bell = &self.lane(lane).lane.common.client_bell;
        let value = bell.mark(WAITER_FUTEX);
        kill_point!("client.wait.marked");
        let woken = if self.is_ready() || self.segment.state().0 == state::CLOSED {
            futex::Woken::TimedOut
        } else {
            machine::futex_wait(&bell.0, value, slice).map_err(|e| IpcError::io("futex(FUTEX_WAIT)", e))?
        };
        bell.clear(WAITER_FUTEX);
        Ok(woken != futex::Woken::Interrupted)
    }

    /// Sleeps until the server rings the socket or ends; says whether the session may be over.
    fn sleep_on_socket(&mut self, left: Option<Duration>) -> Result<bool> {
        self.mark_for_socket();
        let woken = self.is_ready() || self.segment.state().0 == state::CLOSED || poll_socket(self, left)?;
        self.clear_for_socket();
        Ok(woken)
    }

    fn mark_for_socket(&self) {
        for lane in self.lanes().filter(|lane| lane.in_flight > 0) {
            lane.lane.common.client_bell.mark(WAITER_SOCKET);
        }
    }

    fn clear_for_socket(&self) {
        for lane in self.lanes() {
            lane.lane.common.client_bell.clear(WAITER_SOCKET);
        }
    }

    /// When something is to be done whether anything comes or not: a call that waits for memory begins without it.
    pub fn wakes_at(&self) -> Option<Instant> {
        if self.bodies.are_active() { self.body_begins_at() } else { None }
    }

    /// For a caller that will wait on the socket, and for nothing else: whether there is something to take already. What
    /// is due by the clock is waited for here, since he does not come back for it.
    pub fn prepare_to_wait(&mut self) -> Result<bool> {
        while !self.watch_socket()? {
            let Some(at) = self.wakes_at() else { return Ok(false) };
            // A bell ends it, too, and so does a signal: the next look tells which.
            poll_socket(self, Some(at.saturating_duration_since(machine::now())))?;
        }
        Ok(true)
    }

    /// For a caller that will wait on the socket for at most as long as this says: not at all if there is something to
    /// take already, for ever if nothing is due by the clock.
    pub fn prepare_to_sleep(&mut self) -> Result<Option<Duration>> {
        if self.watch_socket()? {
            return Ok(Some(Duration::ZERO));
        }
        Ok(self.wakes_at().map(|at| at.saturating_duration_since(machine::now())))
    }

    /// Makes the server ring the socket for the next completion; `true` if there is something to take already. What is due
    /// by the clock ([`Session::wakes_at`]) is the caller's to see to.
    pub fn watch_socket(&mut self) -> Result<bool> {
        self.flush()?;
        // Bytes of earlier bells would make the descriptor readable for nothing.
        if self.end.is_some() || self.is_over()? {
            return self.what_is_left();
        }
        self.mark_for_socket();
        let ready = self.has_kept() || self.is_ready() || self.segment.state().0 == state::CLOSED;
        if ready {
            self.clear_for_socket();
            // The caller is told of room once: whoever has nothing to send is not told again.
            self.bodies.take_news();
        }
        Ok(ready)
    }

    /// Asks for a further lane and waits for the answer; returns its index, 0 if there is none to be had.
    #[cold]
    pub fn request_lane(&mut self, choice: LaneChoice) -> Result<u32> {
        match rendezvous::send(self.socket.as_fd(), LaneRequest::new(choice).as_bytes(), None) {
            Ok(()) => kill_point!("client.lane.asked"),
            // Full, or over: whoever waits for an answer finds out.
            Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => return Ok(0),
            Err(e) => return Err(IpcError::io("send of a wish for a lane", e)),
        }
        let give_up = machine::now() + LANE_TIMEOUT;
        loop {
            match self.hear()? {
                Heard::Lane(grant, bell) => {
                    self.add_lane(grant, bell)?;
                    return Ok(if grant.lane as usize <= self.further.len() { grant.lane } else { 0 });
                }
                Heard::Bell => {}
                Heard::End(end) => {
                    self.finish(end)?;
                    return Err(self.ended());
                }
                Heard::Nothing => {
                    let left = give_up.saturating_duration_since(machine::now());
                    if left.is_zero() {
                        return Ok(0);
                    }
                    poll_socket(self, Some(left))?;
                }
            }
        }
    }

    /// For those who poll and never wait: looks at the socket every 10 ms, so that they, too, learn of the
    /// server's end (F51). Once all answers have been taken, an error tells.
    #[cold]
    pub fn look_after_server(&mut self) -> Result<()> {
        if self.end.is_none() {
            let now = machine::now();
            if self.looked_at.is_some_and(|looked_at| now.duration_since(looked_at) < LOOK_INTERVAL) {
                return Ok(());
            }
            self.looked_at = Some(now);
            self.is_over()?;
        }
        if self.end.is_some() { self.what_is_left().map(|_| ()) } else { Ok(()) }
    }

    /// Looks at the socket now: whoever gives up waiting shall know what can be known.
    #[cold]
    pub fn look_at_server(&mut self) -> Result<()> {
        if self.end.is_none() {
            self.is_over()?;
        }
        Ok(())
    }

    /// Of a session that is over: whether there are answers to take, else why there will be none.
    fn what_is_left(&self) -> Result<bool> {
        if self.has_kept() { Ok(true) } else { Err(self.ended()) }
    }

    /// Looks at the socket; when the session is over, notes how, and classifies what is in flight.
    fn is_over(&mut self) -> Result<bool> {
        loop {
            match self.hear()? {
                Heard::Nothing => return Ok(false),
                Heard::Bell => {}
                // The answer to a wish that was given up.
                Heard::Lane(grant, bell) => self.add_lane(grant, bell)?,
                Heard::End(end) => {
                    self.finish(end)?;
                    return Ok(true);
                }
            }
        }
    }

    /// Takes one packet from the socket, if there is one.
    fn hear(&self) -> Result<Heard> {
        let mut bytes = [0u8; size_of::<Goodbye>()];
        Ok(match rendezvous::receive_last_word(self.socket.as_fd(), &mut bytes) {
            Err(Errno::AGAIN) => Heard::Nothing,
            Ok(mut packet) if packet.len > 0 => {
                let bytes = &bytes[..packet.len];
                match (Goodbye::read(bytes), LaneGrant::read(bytes)) {
                    (Some(reason), _) => Heard::End(End::Told(reason)),
                    (None, Some(grant)) => Heard::Lane(grant, packet.fds.pop()),
                    // One byte, or nothing we know.
                    (None, None) => Heard::Bell,
                }
            }
            Ok(_) | Err(_) => Heard::End(self.end_by_header()),
        })
    }

    /// The header says that the session runs no more, or not for long: why nothing may be sent.
    #[cold]
    pub(super) fn look_at_state(&mut self) -> Result<()> {
        match self.segment.state().0 {
            state::DRAINING => return Err(IpcError::Draining { retry_ms: DRAINING_RETRY_MS }),
            state::CLOSED => {}
            _ => return Ok(()),
        }
        // The goodbye may still be on its way; the header says the same.
        if !self.is_over()? {
            self.finish(self.end_by_header())?;
        }
        Err(self.ended())
    }

    /// What the header says of a session whose socket ended without a goodbye.
    fn end_by_header(&self) -> End {
        let (state, reason) = self.segment.state();
        match DisconnectReason::from_code(reason) {
            Some(reason) if state == state::CLOSED => End::Told(reason),
            _ => End::Died,
        }
    }
}

/// How long to sleep on a futex after having slept so long already, with so much left of the deadline. Both may end
/// first: a signal ends a sleep early, as often as it likes.
fn futex_slice(slept: Duration, left: Option<Duration>) -> Duration {
    let slice = FUTEX_SLICE.saturating_sub(slept);
    left.map_or(slice, |left| left.min(slice))
}

/// What ends a wait.
#[derive(Debug, Clone, Copy)]
enum Ends {
    /// An answer, or that none is to come.
    Answer,
    /// The end of any call.
    Call,
}

/// What a look at the socket brought.
enum Heard {
    Nothing,
    Bell,
    /// A lane, and the socket that it is rung by, if that is how.
    Lane(LaneGrant, Option<OwnedFd>),
    End(End),
}

/// Waits until the socket has something to say, at most so long; `false` if a signal came instead.
fn poll_socket(session: &Session, left: Option<Duration>) -> Result<bool> {
    let left = left.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    });
    match machine::poll(&session.socket, PollFlags::IN | PollFlags::RDHUP, left.as_ref()) {
        Ok(_) => Ok(true),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(IpcError::io("poll of the session socket", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   F41: a wait that is interrupted late, with less left than it has slept, goes on for what is left.
    #[test]
    fn f41_a_wait_that_was_interrupted_sleeps_for_what_is_left() {
        let ms = Duration::from_millis;
        assert_eq!(futex_slice(ms(0), None), ms(20));
        assert_eq!(futex_slice(ms(15), None), ms(5));
        assert_eq!(futex_slice(ms(15), Some(ms(2))), ms(2));
        assert_eq!(futex_slice(ms(15), Some(ms(9))), ms(5));
        assert_eq!(futex_slice(ms(25), Some(ms(1))), ms(0));
    }
}

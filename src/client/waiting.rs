//! How a client waits for completions, and how it notices that the server is gone.

use super::session::{End, Session};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::protocol::handshake::{DisconnectReason, Goodbye};
use crate::protocol::rendezvous;
use doorbell_shm::bell::WAITER_FUTEX;
use doorbell_shm::lane::{BULK, INTERACTIVE};
use doorbell_shm::layout::state;
use doorbell_uring::futex;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Polls between two looks at the clock and at the session's state.
const SPINS_PER_LOOK: u32 = 1 << 10;
/// Looks between two looks at the socket (a system call).
const LOOKS_PER_SOCKET: u32 = 1 << 8;
/// Time between two looks at the socket by somebody who only polls.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Longest sleep without a look at the socket: a server that is killed wakes nobody (F51).
const SLEEP_SLICE: Duration = Duration::from_millis(20);

impl Session {
    /// Waits until an answer can be taken; `false` when the deadline came first.
    pub fn wait(&mut self, policy: WaitPolicy, deadline: Option<Instant>) -> Result<bool> {
        if self.has_kept() || self.is_ready() {
            self.flush()?;
            return Ok(true);
        }
        self.wait_for_completion(policy, deadline)
    }

    /// Waits until a completion is in a ring or the session is over; `false` when the deadline came first.
    #[inline]
    pub fn wait_for_completion(&mut self, policy: WaitPolicy, deadline: Option<Instant>) -> Result<bool> {
        if self.end.is_some() {
            return self.what_is_left();
        }
        match policy {
            WaitPolicy::Spin => self.spin(deadline),
            WaitPolicy::Handoff | WaitPolicy::Block => self.block(deadline),
        }
    }

    #[inline(always)]
    fn is_ready(&self) -> bool {
        self.lane.completions[INTERACTIVE].is_ready() || self.lane.completions[BULK].is_ready()
    }

    #[inline]
    fn spin(&mut self, deadline: Option<Instant>) -> Result<bool> {
        let mut looks = 0u32;
        loop {
            for _ in 0..SPINS_PER_LOOK {
                if self.is_ready() {
                    return Ok(true);
                }
                if let Some(published) = self.unrung {
                    self.idle(published)?;
                }
                std::hint::spin_loop();
            }
            looks = looks.wrapping_add(1);
            let closed = self.segment.state().0 == state::CLOSED;
            if (closed || looks.is_multiple_of(LOOKS_PER_SOCKET)) && self.is_over()? {
                return self.what_is_left();
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return Ok(false);
            }
        }
    }

    #[cold]
    fn block(&mut self, deadline: Option<Instant>) -> Result<bool> {
        self.flush()?;
        loop {
            let now = Instant::now();
            let left = deadline.map(|d| d.saturating_duration_since(now));
            if left == Some(Duration::ZERO) {
                return Ok(self.is_ready());
            }
            let slice = left.map_or(SLEEP_SLICE, |l| l.min(SLEEP_SLICE));
            // Mark, fence, look again (P5): pairs with publish, fence, look at the bell in the server.
            let bell = &self.lane.common.client_bell;
            let value = bell.mark(WAITER_FUTEX);
            if self.is_ready() {
                bell.clear(WAITER_FUTEX);
                return Ok(true);
            }
            let woken = if self.segment.state().0 == state::CLOSED {
                futex::Woken::TimedOut
            } else {
                futex::wait(&bell.0, value, Some(slice)).map_err(|e| IpcError::io("futex(FUTEX_WAIT)", e))?
            };
            bell.clear(WAITER_FUTEX);
            if self.is_ready() {
                return Ok(true);
            }
            if woken != futex::Woken::Interrupted && self.is_over()? {
                return self.what_is_left();
            }
        }
    }

    /// For those who poll and never wait: looks at the socket every 10 ms, so that they, too, learn of the
    /// server's end (F51). Once all answers have been taken, an error tells.
    #[cold]
    pub fn look_after_server(&mut self) -> Result<()> {
        if self.end.is_none() {
            let now = Instant::now();
            let looked_at = *self.looked_at.get_or_insert(now);
            if now.duration_since(looked_at) < LOOK_INTERVAL {
                return Ok(());
            }
            self.looked_at = Some(now);
            self.is_over()?;
        }
        if self.end.is_some() { self.what_is_left().map(|_| ()) } else { Ok(()) }
    }

    /// Of a session that is over: whether there are answers to take, else why there will be none.
    fn what_is_left(&self) -> Result<bool> {
        if self.has_kept() || self.is_ready() { Ok(true) } else { Err(self.ended()) }
    }

    /// Looks at the socket; when the session is over, notes how, and classifies what is in flight.
    fn is_over(&mut self) -> Result<bool> {
        let mut bytes = [0u8; size_of::<Goodbye>()];
        loop {
            let end = match rendezvous::receive(self.socket.as_fd(), &mut bytes, RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN) => return Ok(false),
                Ok(packet) if packet.len == 0 => self.end_by_header(),
                Err(_) => self.end_by_header(),
                Ok(packet) => match Goodbye::read(&bytes[..packet.len]) {
                    Some(reason) => End::Told(reason),
                    // The one-byte bell, or nothing we know.
                    None => continue,
                },
            };
            self.finish(end)?;
            return Ok(true);
        }
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

//! The end of a server in order (R3.7, F49): no call is begun any more, those under way come to their end, and every
//! session ends as soon as none of its calls is left, or when the time is over.
//!
//! Rule:   a call that has been taken is finished and its answer published before its session ends; one that has not
//!         been taken lies behind the published position, by which its client knows that it was not executed.
//! Bound:  [`ServerConfig::drain_timeout`](crate::ServerConfig::drain_timeout), or a second request to stop.
//!
//! Bells play no part here: their words say awake, and everything is looked at again after each pause.

use super::core::SessionId;
use super::crew::Message;
use super::exchange::Exchanges;
use super::lane::{Bench, SessionLane, Turn};
use super::reactor::Reactor;
use crate::error::Result;
use crate::protocol::rendezvous::monotonic_ns;
use doorbell_shm::PeerFault;
use doorbell_shm::entry::kind;
use doorbell_shm::lane::Drain;
use doorbell_uring::Wait;
use std::time::Duration;

/// Between two looks at everything while nothing moves. A client that has been woken answers within that time.
const PAUSE: Duration = Duration::from_micros(100);
/// The same once nothing has moved for [`QUICK_LOOKS`] looks: whoever is waited for takes longer.
const LONG_PAUSE: Duration = Duration::from_millis(1);
const QUICK_LOOKS: u32 = 50;
/// Tickets that are looked at between two rounds.
const TICKETS_PER_ROUND: u32 = 128;

impl SessionLane {
    /// Goes on with what has been begun and begins no call; returns what was done.
    ///
    /// A call at the head of a ring stops that ring, and stays there untaken, unless frames of a call that has been
    /// begun may lie behind it: then it is taken like any other.
    pub(super) fn turn_draining<S>(
        &mut self,
        id: u32,
        bench: &mut Bench<'_, S>,
    ) -> std::result::Result<u32, PeerFault> {
        let mut turn = Turn::begin(bench);
        if self.lane().common.hints.any() {
            self.take_hints(id, bench)?;
            turn.taken += 1;
        }
        for ring in Drain::ORDER {
            while turn.left(bench) > 0 && self.may_take(ring, bench.exchanges) {
                let filled = self.fill(ring, 1, bench.batch);
                if filled.len == 0 && filled.fault.is_none() {
                    break;
                }
                turn.taken += 1;
                self.run_batch(id, ring, filled, bench)?;
            }
            if self.exchanges.is_some() {
                self.move_exchanges(ring, u32::MAX, &mut turn, bench)?;
            }
        }
        Ok(turn.taken)
    }

    /// Whether the entry at the head of a ring, if there is one, begins no call. What is found there later may be
    /// another one, if the client will have it so: a call is then run and answered.
    fn may_take<S>(&self, ring: usize, exchanges: &mut Exchanges<S>) -> bool {
        match self.lane().submissions[ring].peek() {
            Some(words) if (words[0] >> 32) as u8 == kind::CALL => self.awaits_frames(ring, exchanges),
            _ => self.lane().submissions[ring].is_ready(),
        }
    }

    /// Whether a call under way still lacks frames that come through this ring.
    fn awaits_frames<S>(&self, ring: usize, exchanges: &mut Exchanges<S>) -> bool {
        let Some(all) = &self.exchanges else { return false };
        all.iter().any(|index| exchanges.get_mut(index).is_some_and(|e| e.ring == ring && !e.ended))
    }
}

impl<S> Reactor<S> {
    /// Lets what is under way come to its end, for as long as it may.
    pub(super) fn drain(&mut self) -> Result<()> {
        let until = monotonic_ns().saturating_add(self.core.config().drain_timeout.as_nanos() as u64);
        self.with_home(|home, reactor| home.begin_drain(reactor))?;
        if self.crew.is_home() {
            // Home alone writes the state of a session: another reactor could take back that one is closed.
            self.core.drain();
        }
        let ids: Vec<SessionId> = self.core.ids().collect();
        for id in ids {
            self.heat(id);
        }
        let mut still = 0;
        while !self.hurried {
            let done = self.drain_once()?;
            self.part_with_the_quiet()?;
            let now = monotonic_ns();
            if self.core.live() == 0 && self.crew.is_home() || now >= until {
                break;
            }
            still = if done > 0 { 0 } else { still + 1 };
            if still > 0 {
                let pause = if still < QUICK_LOOKS { PAUSE } else { LONG_PAUSE };
                let left = Duration::from_nanos(until.saturating_sub(now));
                self.core.pulse.sleeps(true);
                let woken = self.driver.enter(Wait::Until(Some(pause.min(left))));
                self.core.pulse.sleeps(false);
                woken?;
                self.events()?;
            }
            self.tick(now)?;
        }
        if self.crew.is_home() && self.core.live() > 0 {
            let sessions = self.core.live();
            tracing::warn!(sessions, "calls are still under way: their sessions end now");
        }
        Ok(())
    }

    /// Everything that a reactor does between two pauses; returns how much that was.
    fn drain_once(&mut self) -> Result<u32> {
        if self.driver.pending() {
            self.driver.enter(Wait::No)?;
            self.events()?;
        }
        let mut done = self.drain_round();
        self.end_faulty()?;
        if self.core.leases.has_work() {
            self.serve_memory()?;
        }
        while self.core.has_questions() {
            self.serve_inspections()?;
            done += 1;
        }
        if self.core.has_jobs() {
            done += self.serve_files()?;
        }
        if self.core.tickets().has_work() {
            done += self.core.serve_tickets(TICKETS_PER_ROUND, &mut monotonic_ns);
            self.end_faulty()?;
        }
        self.core.wake_holders();
        if !self.core.touched().is_empty() {
            self.ring_clients()?;
        }
        Ok(done)
    }

    /// Ends sessions none of whose calls is under way. A further reactor lets go of its lane and tells home, which ends
    /// a session once all its lanes are quiet. A quiet lane stays quiet: no call is begun.
    fn part_with_the_quiet(&mut self) -> Result<()> {
        let quiet: Vec<SessionId> = self.core.ids().filter(|id| self.core.is_quiet(*id)).collect();
        for id in quiet {
            if self.crew.is_home() {
                self.with_home(|home, reactor| home.end_if_quiet(reactor, id))?;
                continue;
            }
            self.let_go(id)?;
            // Where home has ended there is nobody to tell.
            if self.crew.addresses[0].put(Message::Quiet(id)) {
                self.ring_reactor(0)?;
            }
        }
        Ok(())
    }
}

//! Sessions that nobody uses, and those that take nothing (R4.4, trap 14; F8, F22).
//!
//! Rule:   a session is idle while none of its lanes has a call under way or has had an entry. It is slow while results
//!         of its own keep it from being served, because its completion ring or the window of a long answer is full of
//!         them, and it takes none. A few answers that lie there hurt nobody: that is no reason to end it.
//! Cost:   one lane in [`LOOKS`] is looked at in each sweep.
//!
//! A further reactor tells home when a lane of its becomes idle, and when it is no longer. Home ends a session once all
//! its lanes are. A call that comes at that very moment is not executed, or, on a further lane, may have been: its client
//! is told which.

use super::core::SessionId;
use super::crew::Message;
use super::reactor::Reactor;
use crate::error::Result;
use crate::protocol::handshake::DisconnectReason;
use std::time::Duration;

/// Sweeps until every lane has been looked at.
pub(super) const LOOKS: u32 = 16;

/// What a lane shows at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// Entries that it has taken so far.
    pub taken: u64,
    /// Calls are under way.
    pub busy: bool,
    /// Grows with every completion that is published or taken.
    pub progress: u64,
    /// Untaken results keep it from being served.
    pub stuck: bool,
}

/// What has been seen of a lane so far.
#[derive(Debug, Default)]
pub(super) struct Habits {
    taken: u64,
    progress: u64,
    /// When it was last in use; 0 if it has not been looked at.
    used_ns: u64,
    /// Since when it is stuck and nothing moves; 0 for not.
    stuck_since_ns: u64,
    /// Home has been told that it is idle.
    told: bool,
}

impl Habits {
    /// Takes note of what a lane shows; returns for how long it has been idle, and for how long it has been stuck.
    pub fn note(&mut self, seen: Seen, now_ns: u64) -> (Duration, Duration) {
        if self.used_ns == 0 || seen.busy || seen.taken != self.taken {
            (self.used_ns, self.taken) = (now_ns, seen.taken);
        }
        if !seen.stuck || self.stuck_since_ns == 0 || seen.progress != self.progress {
            self.stuck_since_ns = if seen.stuck { now_ns } else { 0 };
        }
        self.progress = seen.progress;
        let stuck_ns = if self.stuck_since_ns == 0 { 0 } else { now_ns - self.stuck_since_ns };
        (Duration::from_nanos(now_ns - self.used_ns), Duration::from_nanos(stuck_ns))
    }
}

impl<S> Reactor<S> {
    /// Looks at a lane; ends its session, or tells home, if it has been idle or stuck for too long.
    pub(super) fn look_at_habits(&mut self, id: SessionId, now_ns: u64) -> Result<()> {
        let Some(seen) = self.core.seen(id) else { return Ok(()) };
        let config = self.core.config();
        let (most_idle, most_stuck) = (config.idle_timeout, config.slow_consumer_timeout);
        let Some(habits) = self.habits(id) else { return Ok(()) };
        let (idle, stuck) = habits.note(seen, now_ns);
        if most_stuck.is_some_and(|most| stuck >= most) {
            self.log
                .warn(|| tracing::warn!(session = id.index, ?stuck, "a client takes none of its results"));
            return self.give_up_for(id, DisconnectReason::SlowConsumer);
        }
        let is_idle = most_idle.is_some_and(|most| idle >= most);
        if self.crew.is_home() {
            return if is_idle {
                self.with_home(|home, reactor| home.end_if_idle(reactor, id))
            } else {
                Ok(())
            };
        }
        let Some(habits) = self.habits(id) else { return Ok(()) };
        if std::mem::replace(&mut habits.told, is_idle) != is_idle
            && self.crew.addresses[0].put(Message::Idle(id, is_idle))
        {
            self.ring_reactor(0)?;
        }
        Ok(())
    }

    /// Ends a session for `reason`, from whichever reactor.
    fn give_up_for(&mut self, id: SessionId, reason: DisconnectReason) -> Result<()> {
        if self.crew.is_home() {
            return self.end(id, reason);
        }
        self.let_go(id)?;
        if self.crew.addresses[0].put(Message::EndFor(id, reason)) {
            self.ring_reactor(0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOTHING: Seen = Seen { taken: 0, busy: false, progress: 0, stuck: false };

    fn seconds((idle, stuck): (Duration, Duration)) -> (u64, u64) {
        (idle.as_secs(), stuck.as_secs())
    }

    /// Goal:   R4.4: a lane is idle from its last entry, or the end of its last call; the first look begins the count.
    #[test]
    fn r4_4_idleness_is_counted_from_the_last_use() {
        let mut habits = Habits::default();
        let mut at = |seen, second: u64| seconds(habits.note(seen, (100 + second) * SECOND)).0;
        assert_eq!([at(NOTHING, 0), at(NOTHING, 5)], [0, 5]);
        let used = Seen { taken: 1, ..NOTHING };
        assert_eq!([at(used, 6), at(used, 9)], [0, 3]);
        let busy = Seen { busy: true, ..used };
        assert_eq!([at(busy, 50), at(busy, 90), at(used, 91)], [0, 0, 1]);
    }

    /// Goal:   F8, F22: a lane is slow from when it is stuck without anything moving; whatever moves begins the count
    ///         anew, and untaken results that hold up nothing do not count.
    #[test]
    fn f8_f22_slowness_is_counted_while_nothing_moves() {
        let mut habits = Habits::default();
        let mut at = |stuck, progress, second: u64| {
            seconds(habits.note(Seen { stuck, progress, ..NOTHING }, (100 + second) * SECOND)).1
        };
        assert_eq!([at(false, 9, 0), at(false, 9, 40)], [0, 0]);
        assert_eq!([at(true, 9, 41), at(true, 9, 60)], [0, 19]);
        assert_eq!([at(true, 10, 61), at(true, 10, 70)], [0, 9]);
        assert_eq!([at(false, 10, 71), at(true, 10, 80), at(true, 10, 81)], [0, 0, 1]);
    }
}

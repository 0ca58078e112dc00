//! The memory budget of a server: one sum for all its reactors, touched when memory is granted and given back,
//! never on the message path.
//!
//! Source: DESIGN §5. The budget covers the server's private memory and every shared page; each session beyond the
//!         first hundred adds to it what a session with one lane takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// What a server of a few sessions keeps for itself, bytes: its code and tables, stacks, rings, staging (1.02 million
/// at rest, `docs/performance.md`); and what clients whose leases were taken make exist once more until that is found.
const PRIVATE: u64 = 1_650_000;
/// Private memory of a session, bytes: its records.
pub(crate) const PRIVATE_PER_SESSION: u64 = 1536;
/// Sessions that the budget covers.
const SESSIONS_COVERED: u32 = 100;
/// What only speeds things up leaves so much room: sixteen sessions of two pages can come whatever is leased.
const FOR_SESSIONS: u64 = 16 * (8192 + PRIVATE_PER_SESSION);
/// What each further one adds to it, bytes.
const PER_FURTHER_SESSION: u64 = 10 << 10;

/// The least that a budget can be: the server itself and a session.
pub(crate) const BUDGET_MIN: u64 = 2 << 20;

#[derive(Debug)]
struct Sums {
    total: u64,
    used: AtomicU64,
    sessions: AtomicU32,
    /// Reactors on which somebody waits for memory.
    waiting: AtomicU32,
}

/// A share in the budget of a server.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<Sums>);

impl Budget {
    /// Nothing but the server itself, of so many bytes in all.
    pub fn new(total: u64) -> Self {
        Self(Arc::new(Sums {
            total,
            used: AtomicU64::new(PRIVATE),
            sessions: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        }))
    }

    fn limit(&self) -> u64 {
        let further = self.0.sessions.load(Relaxed).saturating_sub(SESSIONS_COVERED);
        self.0.total + u64::from(further) * PER_FURTHER_SESSION
    }

    /// Takes `bytes` for a new session; `false` if there is no room for it.
    pub fn take_session(&self, bytes: u64) -> bool {
        self.0.sessions.fetch_add(1, Relaxed);
        let taken = self.take(1, 1, bytes) == 1;
        if !taken {
            self.0.sessions.fetch_sub(1, Relaxed);
        }
        taken
    }

    /// A session has ended that had so many bytes.
    pub fn give_session(&self, bytes: u64) {
        self.give(bytes);
        self.0.sessions.fetch_sub(1, Relaxed);
    }

    /// Takes at least `least` and at most `most` times `each` bytes; returns how often it was, 0 if there is not even
    /// room for the least.
    pub fn take(&self, least: u64, most: u64, each: u64) -> u64 {
        self.take_below(self.limit(), least, most, each)
    }

    /// The same of what sessions that come will not need.
    pub fn take_spare(&self, least: u64, most: u64, each: u64) -> u64 {
        self.take_below(self.limit().saturating_sub(FOR_SESSIONS), least, most, each)
    }

    fn take_below(&self, limit: u64, least: u64, most: u64, each: u64) -> u64 {
        let mut used = self.0.used.load(Relaxed);
        loop {
            let times = (limit.saturating_sub(used) / each.max(1)).min(most);
            if times < least {
                return 0;
            }
            // Relaxed: a sum, by which no memory is published.
            match self.0.used.compare_exchange_weak(used, used + times * each, Relaxed, Relaxed) {
                Ok(_) => return times,
                Err(other) => used = other,
            }
        }
    }

    /// Gives bytes back.
    pub fn give(&self, bytes: u64) {
        self.0.used.fetch_sub(bytes, Relaxed);
    }

    /// Bytes in use, the server's own included.
    pub fn used(&self) -> u64 {
        self.0.used.load(Relaxed)
    }

    /// Somebody on a reactor has begun, or ceased, to wait for memory.
    pub fn wait(&self, waits: bool) {
        if waits {
            self.0.waiting.fetch_add(1, Relaxed);
        } else {
            self.0.waiting.fetch_sub(1, Relaxed);
        }
    }

    /// Reactors on which somebody waits.
    pub fn waiting(&self) -> u32 {
        self.0.waiting.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   DESIGN §5: what is taken never exceeds the budget, which grows with sessions beyond the hundredth.
    #[test]
    fn r5_3_the_budget_holds_and_grows_with_sessions() {
        let budget = Budget::new(3 << 20);
        let each = 8 << 10;
        let mut sessions = 0u64;
        while sessions < 1000 && budget.take_session(each + PRIVATE_PER_SESSION) {
            sessions += 1;
        }
        assert_eq!(sessions, 1000, "a session of two pages always fits");
        let left = budget.take_spare(1, 10_000, 4096);
        assert!(left > 60, "{left} pages to lease beside a thousand sessions");
        let kept = budget.take(1, 10_000, 4096);
        assert!(kept * 4096 >= FOR_SESSIONS - 4096 && budget.take_spare(1, 1, 4096) == 0);
        let left = left + kept;
        assert_eq!((budget.take(1, 1, 4096), budget.take(0, 0, 4096)), (0, 0));
        assert!(budget.used() <= (3 << 20) + 900 * (10 << 10));
        budget.give(left * 4096);
        for _ in 0..sessions {
            budget.give_session(each + PRIVATE_PER_SESSION);
        }
        assert_eq!(budget.used(), PRIVATE);
        assert!(!budget.take_session(4 << 20) && budget.take(2, 9, 1 << 20) == 0);
        budget.wait(true);
        assert_eq!(budget.waiting(), 1);
        budget.wait(false);
        assert_eq!(budget.waiting(), 0);
    }
}

//! How long an idle reactor polls before it sleeps, under the policy `handoff` (DESIGN §4). Sans-I/O.
//!
//! Rule:   nothing, unless calls come from other cores at shorter intervals than a wake costs; then up to twice the
//!         usual interval, and never more of the core than its share. A caller that has handed its core over waits
//!         on this very core: then nothing at all.
//! Source: a poll repays itself if the wake that it saves costs more than the poll (the ski-rental rule).

/// The share of its core that a reactor may spend on polling is saved up for so long.
const BURST_NS: u64 = 10_000_000;
/// Weight of the newest interval: one in eight.
const WEIGHT: u64 = 8;

/// What one reactor knows of the intervals between its calls.
#[derive(Debug)]
pub(crate) struct SpinBudget {
    /// What waking this reactor from another core costs, ns; 0 if no other core can.
    wake_ns: u64,
    percent: u64,
    /// Usual time between the end of one batch and the next, ns.
    interval_ns: u64,
    /// Time that may still be spent.
    credit_ns: u64,
    credited_at_ns: u64,
    idle_since_ns: u64,
    /// Zero: not polling.
    polls_until_ns: u64,
}

impl SpinBudget {
    pub fn new(wake_ns: u64, percent: u32) -> Self {
        Self {
            wake_ns,
            percent: percent.into(),
            interval_ns: u64::MAX / 2,
            credit_ns: 0,
            credited_at_ns: 0,
            idle_since_ns: 0,
            polls_until_ns: 0,
        }
    }

    /// Whether polling can ever be worth it: if not, no clock needs to be read.
    pub fn is_zero(&self) -> bool {
        self.wake_ns == 0 || self.percent == 0
    }

    /// The idle time that begins now says nothing about intervals, and nobody polls in it.
    pub fn leave_untimed(&mut self) {
        self.idle_since_ns = 0;
    }

    /// Whether the idle time since the last batch is measured.
    pub fn is_timing(&self) -> bool {
        self.idle_since_ns != 0
    }

    /// There is nothing to do any more: until when to poll; 0 for not at all.
    pub fn idle(&mut self, now_ns: u64) -> u64 {
        let saved = (now_ns - self.credited_at_ns) * self.percent / 100;
        self.credit_ns = (self.credit_ns + saved).min(BURST_NS * self.percent / 100);
        self.credited_at_ns = now_ns;
        self.idle_since_ns = now_ns;
        let repays = self.interval_ns < self.wake_ns;
        let most = (2 * self.interval_ns.min(self.wake_ns)).min(self.wake_ns).min(self.credit_ns);
        self.polls_until_ns = if repays && most > 0 { now_ns + most } else { 0 };
        self.polls_until_ns
    }

    /// Polling has ended, for whatever reason; returns how long it took.
    pub fn polled(&mut self, now_ns: u64) -> u64 {
        if self.polls_until_ns == 0 {
            return 0;
        }
        self.polls_until_ns = 0;
        let spent = now_ns - self.idle_since_ns;
        self.credit_ns = self.credit_ns.saturating_sub(spent);
        spent
    }

    /// Calls have come after an idle time.
    pub fn work(&mut self, now_ns: u64) {
        let interval = now_ns - self.idle_since_ns;
        let old = self.interval_ns.min(8 * self.wake_ns);
        self.interval_ns = old - old / WEIGHT + interval.min(8 * self.wake_ns) / WEIGHT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1000;

    /// One idle time of so many ns, polled through if the budget says so; returns the time polled.
    fn idle(budget: &mut SpinBudget, now: &mut u64, length: u64) -> u64 {
        let until = budget.idle(*now);
        let came = *now + length;
        let polled = if until == 0 { 0 } else { budget.polled(until.min(came)) };
        *now = came;
        budget.work(*now);
        polled
    }

    /// Goal:   polling happens only where the interval between calls repays it, and within the share.
    /// Method: time by hand; long intervals, then short ones.
    #[test]
    fn r5_5_a_reactor_polls_only_where_it_repays_and_within_its_share() {
        let mut budget = SpinBudget::new(50 * US, 10);
        let mut now = 1_000_000;
        let rare: u64 = (0..1000).map(|_| idle(&mut budget, &mut now, 1000 * US)).sum();
        assert_eq!(rare, 0);
        let begin = now;
        let frequent: u64 = (0..100_000).map(|_| idle(&mut budget, &mut now, 10 * US)).sum();
        let share = frequent as f64 / (now - begin) as f64;
        assert!(share > 0.08 && share < 0.11, "{share}");
        assert!(budget.is_timing());
        budget.leave_untimed();
        assert!(!budget.is_timing());
        assert!(SpinBudget::new(0, 10).is_zero() && SpinBudget::new(US, 0).is_zero());
    }
}

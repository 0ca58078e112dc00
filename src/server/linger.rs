//! When a server that was started for its clients has outlived them (trap 13). Sans-I/O.

use std::time::Duration;

/// How long a server stays without sessions.
#[derive(Debug)]
pub(super) struct Linger {
    /// `None`: for ever.
    limit_ns: Option<u64>,
    /// Since when there has been no session; of no meaning while there is one.
    alone_since_ns: u64,
    alone: bool,
}

impl Linger {
    /// Of a server that has no session yet.
    pub fn new(limit: Option<Duration>, now_ns: u64) -> Self {
        let limit_ns = limit.map(|limit| u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX));
        Self { limit_ns, alone_since_ns: now_ns, alone: true }
    }

    /// A session has begun.
    pub fn has_company(&mut self) {
        self.alone = false;
    }

    /// A session has ended, the last one or not.
    pub fn has_lost_one(&mut self, was_last: bool, now_ns: u64) {
        if was_last && !self.alone {
            (self.alone, self.alone_since_ns) = (true, now_ns);
        }
    }

    /// When it is over, if nobody comes; `u64::MAX` for never.
    pub fn due_ns(&self) -> u64 {
        match self.limit_ns {
            Some(limit) if self.alone => self.alone_since_ns.saturating_add(limit),
            _ => u64::MAX,
        }
    }

    /// Whether it is over.
    pub fn is_over(&self, now_ns: u64) -> bool {
        now_ns >= self.due_ns()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trap13_a_server_lingers_from_its_start_and_from_its_last_client_on() {
        let mut linger = Linger::new(Some(Duration::from_nanos(100)), 1000);
        assert!((linger.due_ns(), linger.is_over(1099), linger.is_over(1100)) == (1100, false, true));
        linger.has_company();
        assert!(linger.due_ns() == u64::MAX && !linger.is_over(u64::MAX - 1));
        linger.has_lost_one(false, 2000);
        assert_eq!(linger.due_ns(), u64::MAX);
        linger.has_lost_one(true, 3000);
        linger.has_lost_one(true, 4000);
        assert_eq!(linger.due_ns(), 3100);
        assert_eq!(Linger::new(None, 0).due_ns(), u64::MAX);
    }
}

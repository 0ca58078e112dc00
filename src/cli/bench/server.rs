//! The server under test, as the parent process sees it: an address, a process to watch, counters to ask.

use super::child::Process;
use super::procfs;

/// What a server has counted since it started; `None` where it does not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// How often it slept and was woken.
    pub wakeups: Option<u64>,
    /// Rounds of its loop.
    pub sweeps: Option<u64>,
    /// System calls.
    pub syscalls: Option<u64>,
    /// Connections of clients that are open now: a state, not a count.
    pub connections: Option<u64>,
}

impl Counters {
    /// What was counted since `earlier`; the state is the later one.
    pub fn since(&self, earlier: &Self) -> Self {
        let since = |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then?));
        Self {
            wakeups: since(self.wakeups, earlier.wakeups),
            sweeps: since(self.sweeps, earlier.sweeps),
            syscalls: since(self.syscalls, earlier.syscalls),
            connections: self.connections,
        }
    }
}

/// A running server.
pub struct Server {
    /// Where it listens; what that means is the peer's affair.
    pub endpoint: String,
    /// Its process id, if it is known.
    pub pid: Option<u32>,
    /// Asks for its counters. Called from the parent process at both edges of the window, under load.
    pub counters: Box<dyn FnMut() -> Counters>,
    /// Killed when the server is dropped; `None` if somebody else started it.
    _process: Option<Process>,
}

impl Server {
    /// A child process that counts nothing itself: its voluntary context switches stand for wakeups.
    pub fn of_process(process: Process, endpoint: String) -> Self {
        let pid = process.pid();
        let counters = move || Counters { wakeups: procfs::voluntary_switches(pid), ..Counters::default() };
        Self { endpoint, pid: Some(pid), counters: Box::new(counters), _process: Some(process) }
    }

    /// A server with counters of its own; `process` is `None` if somebody else started it.
    pub fn with_counters(
        process: Option<Process>,
        pid: Option<u32>,
        endpoint: String,
        counters: impl FnMut() -> Counters + 'static,
    ) -> Self {
        Self { endpoint, pid, counters: Box::new(counters), _process: process }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_counted_at_both_times_has_a_difference() {
        let earlier = Counters { wakeups: Some(3), sweeps: None, syscalls: Some(9), connections: Some(4) };
        let later = Counters { wakeups: Some(10), sweeps: Some(5), syscalls: Some(9), connections: Some(2) };
        let since = Counters { wakeups: Some(7), sweeps: None, syscalls: Some(0), connections: Some(2) };
        assert_eq!(later.since(&earlier), since);
    }
}

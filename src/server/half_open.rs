//! Sockets that have been accepted and have not said hello (F27). Makes no system call but closing what it is told to
//! drop; time is an input.
//!
//! Rule:   so many in all and so many of each process. Each has its patience, 100 ms; while all places are taken the
//!         oldest goes as soon as it has had a tenth of that and somebody else needs its place. A client says hello
//!         right after connecting, so that only those wait for long who mean nothing good, and those who come after
//!         them wait for a tenth at most for each time that they fill all places.

use super::core::SessionId;
use super::process::ProcessKey;
use super::reactor::GENERATION_MASK;
use crate::config::ServerConfig;
use std::os::fd::OwnedFd;

/// The part of its patience that a socket has for sure, however many come behind it.
const SURE_PART: u64 = 10;

/// A socket without a hello.
#[derive(Debug)]
pub(super) struct HalfOpen {
    pub id: SessionId,
    pub socket: OwnedFd,
    pub process: OwnedFd,
    key: Option<ProcessKey>,
    since_ns: u64,
}

/// All of them.
#[derive(Debug)]
pub(super) struct HalfOpenTable {
    places: Vec<Option<HalfOpen>>,
    count: u32,
    generation: u32,
    most: u32,
    most_of_process: u32,
    patience_ns: u64,
}

impl HalfOpenTable {
    pub fn new(config: &ServerConfig) -> Self {
        let most = config.max_half_open.min(config.max_sessions);
        Self {
            places: Vec::with_capacity(most as usize),
            count: 0,
            generation: 0,
            most,
            most_of_process: config.max_half_open_per_process,
            patience_ns: config.handshake_timeout.as_nanos() as u64,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many one process may have.
    pub fn most_of_process(&self) -> u32 {
        self.most_of_process
    }

    /// Whether a process may have one more.
    pub fn admits(&self, key: Option<ProcessKey>) -> bool {
        let same = |half: &&HalfOpen| half.key == key;
        key.is_none() || self.iter().filter(same).count() < self.most_of_process as usize
    }

    /// When one more can be taken: 0 for now, for a place is free; else when the oldest may be sent away for it.
    pub fn room_ns(&self) -> u64 {
        if self.count < self.most {
            return 0;
        }
        self.oldest().map_or(0, |oldest| oldest.since_ns + self.patience_ns / SURE_PART)
    }

    /// When the patience with one of them ends; `u64::MAX` if there is none.
    pub fn due_ns(&self) -> u64 {
        self.oldest().map_or(u64::MAX, |oldest| oldest.since_ns + self.patience_ns)
    }

    /// Takes a socket in. If that left no place for others before, the oldest comes out.
    pub fn enter(
        &mut self,
        socket: OwnedFd,
        process: OwnedFd,
        key: Option<ProcessKey>,
        now_ns: u64,
    ) -> (SessionId, Option<HalfOpen>) {
        let full = self.count >= self.most;
        let oldest = self.oldest().filter(|_| full).map(|half| half.id);
        let sent_away = oldest.and_then(|id| self.take(id));
        self.generation = self.generation.wrapping_add(1);
        let index = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let id = SessionId { index: index as u32, generation: self.generation & GENERATION_MASK };
        self.places[index] = Some(HalfOpen { id, socket, process, key, since_ns: now_ns });
        self.count += 1;
        (id, sent_away)
    }

    pub fn get(&self, id: SessionId) -> Option<&HalfOpen> {
        self.places.get(id.index as usize)?.as_ref().filter(|half| half.id == id)
    }

    pub fn take(&mut self, id: SessionId) -> Option<HalfOpen> {
        let half = self.places.get_mut(id.index as usize)?.take_if(|half| half.id == id)?;
        self.count -= 1;
        Some(half)
    }

    /// One whose time is over.
    pub fn take_overdue(&mut self, now_ns: u64) -> Option<HalfOpen> {
        let overdue = self.oldest().filter(|oldest| now_ns >= oldest.since_ns + self.patience_ns)?.id;
        self.take(overdue)
    }

    fn iter(&self) -> impl Iterator<Item = &HalfOpen> {
        self.places.iter().flatten()
    }

    fn oldest(&self) -> Option<&HalfOpen> {
        // Asked before every sleep: most of the time there is nobody, and nothing to look through.
        if self.count == 0 {
            return None;
        }
        self.iter().min_by_key(|half| half.since_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::process::Processes;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;

    const MS: u64 = 1_000_000;

    fn table(max_half_open: u32) -> HalfOpenTable {
        HalfOpenTable::new(&ServerConfig { max_half_open, ..ServerConfig::default() })
    }

    fn fd() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    fn enter(
        table: &mut HalfOpenTable,
        key: Option<ProcessKey>,
        now_ns: u64,
    ) -> (SessionId, Option<SessionId>) {
        let (id, sent_away) = table.enter(fd(), fd(), key, now_ns);
        (id, sent_away.map(|half| half.id))
    }

    /// Keys of two processes: ourselves and whoever started us.
    fn keys() -> [Option<ProcessKey>; 2] {
        use rustix::process::{PidfdFlags, getpid, getppid, pidfd_open};
        [getpid(), getppid().unwrap()].map(|pid| {
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
            Processes::detect().unwrap().key(pidfd.as_fd())
        })
    }

    /// Goal:   F27: a process has four places at most, whoever else has how many; one of its own makes room.
    #[test]
    fn f27_a_process_has_four_places() {
        let mut table = table(128);
        let [ours, theirs] = keys();
        let first = enter(&mut table, ours, 0).0;
        for _ in 1..4 {
            assert!(table.admits(ours));
            enter(&mut table, ours, 0);
        }
        enter(&mut table, None, 0);
        assert!(!table.admits(ours) && table.admits(theirs) && table.admits(None));
        table.take(first).unwrap();
        assert!(table.admits(ours));
    }

    /// Goal:   F27: time is over after 100 ms, for the oldest first; with all places taken the oldest goes after 10 ms
    ///         if, and only if, somebody comes.
    #[test]
    fn f27_the_oldest_makes_room_when_it_has_had_its_time() {
        let mut table = table(3);
        assert_eq!((table.room_ns(), table.due_ns(), table.is_empty()), (0, u64::MAX, true));
        let ids = [5, 1, 3].map(|ms| enter(&mut table, None, ms * MS).0);
        assert_eq!((table.room_ns(), table.due_ns()), (11 * MS, 101 * MS));
        let (newest, sent_away) = enter(&mut table, None, 11 * MS);
        assert_eq!(sent_away, Some(ids[1]));
        assert!(table.get(ids[1]).is_none() && table.get(newest).is_some());
        assert_eq!((newest.index, newest.generation), (ids[1].index, 4), "a place used again has another id");
        assert_eq!(table.room_ns(), 13 * MS);
        assert!(table.take_overdue(103 * MS - 1).is_none());
        assert_eq!(table.take_overdue(103 * MS).map(|half| half.id), Some(ids[2]));
        assert_eq!(table.room_ns(), 0);
        assert_eq!(enter(&mut table, None, 104 * MS).1, None);
        let overdue: Vec<_> =
            std::iter::from_fn(|| table.take_overdue(1000 * MS)).map(|half| half.id).collect();
        assert_eq!(overdue[..2], [ids[0], newest]);
        assert!(overdue.len() == 3 && table.is_empty());
    }
}

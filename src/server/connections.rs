//! The pool of connection records: all made at start, numbered, reused, never allocated later (R1.8).
//!
//! The home reactor's pool decides. That of another reactor repeats what it has been told, under the same
//! numbers, for the sessions that have a lane there; a connection can be used on such a lane once it has been
//! attached (P6).

use super::crew::{Inbox, Notice};

use crate::protocol::CONNECTION_INDEX_BITS as INDEX_BITS;

const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;
/// No further record in the free list.
const NONE: u32 = u32::MAX;

/// One conversation inside a session.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// Session in the upper half, number in the lower while it is open; [`FREE`] and the next free index
    /// while it is not. One comparison tells whether a session has a number open.
    key: u64,
    /// Bytes of requests and answers.
    pub bytes: u64,
    /// Time that its calls took, ns.
    pub time_ns: u64,
    /// Calls started on it.
    pub requests: u32,
    /// How often this record has been used, for the generation in its number, which has fewer bits.
    uses: u16,
    /// One of [`doorbell_shm::entry::codec`].
    pub codec: u8,
    /// Whether its calls come on the bulk rings.
    pub bulk: bool,
}

const _: () = assert!(size_of::<Connection>() == 32);

/// The upper half of the key of a record that is not open. No session has this number.
const FREE: u64 = 0xffff_ffff << 32;

/// Set in the key of a connection that is open at the home reactor and not attached here yet. Sessions have 20 bits.
const DETACHED: u64 = 1 << 63;

fn key(session: u32, number: u32) -> u64 {
    u64::from(session) << 32 | u64::from(number)
}

/// What came of attaching a connection to a further lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// It can be used here.
    Usable,
    /// The session has no such connection open.
    NotOpen,
    /// It is open with another codec or priority.
    Otherwise,
}

/// Records of all connections of a server, whichever session they belong to.
#[derive(Debug)]
pub struct ConnectionPool {
    records: Vec<Connection>,
    first_free: u32,
    open: u32,
    /// Records that a further reactor makes as soon as it is told of a connection.
    on_demand: u32,
}

impl ConnectionPool {
    /// `limit` records of 32 bytes each: the only allocation the pool ever makes.
    pub fn new(limit: u32) -> Self {
        let blank = |index| Connection {
            key: FREE | u64::from(if index + 1 == limit { NONE } else { index + 1 }),
            bytes: 0,
            time_ns: 0,
            requests: 0,
            uses: 0,
            codec: 0,
            bulk: false,
        };
        Self { records: (0..limit).map(blank).collect(), first_free: 0, open: 0, on_demand: 0 }
    }

    /// The pool of a further reactor: nothing until it is told of a connection.
    pub(crate) fn on_demand(limit: u32) -> Self {
        Self { on_demand: limit, ..Self::new(0) }
    }

    /// Most connections at once.
    pub fn limit(&self) -> u32 {
        self.records.len() as u32
    }

    /// Connections open now.
    pub fn open_count(&self) -> u32 {
        self.open
    }

    /// Opens a connection of `session` and returns its number; `None` when the limit is reached.
    pub fn open(&mut self, session: u32, codec: u8, bulk: bool) -> Option<u32> {
        let index = self.first_free;
        let record = self.records.get_mut(index as usize)?;
        self.first_free = record.key as u32;
        let mut uses = record.uses.wrapping_add(1);
        if index | u32::from(uses) << INDEX_BITS == 0 {
            // No connection has the number 0.
            uses = uses.wrapping_add(1);
        }
        let number = index | u32::from(uses) << INDEX_BITS;
        *record =
            Connection { key: key(session, number), bytes: 0, time_ns: 0, requests: 0, uses, codec, bulk };
        self.open += 1;
        Some(number)
    }

    /// The record of `number`, if `session` has it open.
    #[inline(always)]
    pub fn get(&mut self, session: u32, number: u32) -> Option<&mut Connection> {
        let record = self.records.get_mut((number & INDEX_MASK) as usize)?;
        (record.key == key(session, number)).then_some(record)
    }

    /// Its calls have taken so much more time, and so many bytes of answers.
    #[inline(always)]
    pub(crate) fn add(&mut self, session: u32, number: u32, time_ns: u64, bytes: u64) {
        if let Some(record) = self.get(session, number) {
            record.time_ns += time_ns;
            record.bytes += bytes;
        }
    }

    /// The connections that can be used here, with their sessions and numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u32, &Connection)> + '_ {
        let is_open = |record: &&Connection| record.key & DETACHED == 0;
        self.records.iter().filter(is_open).map(|r| ((r.key >> 32) as u32, r.key as u32, r))
    }

    /// Closes a connection; `false` if `session` does not have it open.
    pub fn close(&mut self, session: u32, number: u32) -> bool {
        let next = self.first_free;
        let Some(record) = self.get(session, number) else { return false };
        record.key = FREE | u64::from(next);
        self.first_free = number & INDEX_MASK;
        self.open -= 1;
        true
    }

    /// Applies what the home reactor has told of connections.
    pub(crate) fn follow(&mut self, inbox: &mut Inbox) {
        while let Some((session, notice)) = inbox.next_notice() {
            if self.on_demand > 0 {
                *self = Self::new(self.on_demand);
            }
            match notice {
                Notice::Opened { number, codec, bulk } => self.mirror(session, number, codec, bulk),
                Notice::Closed { number } => self.forget(session, number),
                Notice::Ended => self.forget_all(session),
            }
        }
    }

    /// Records of a further reactor are written where the home reactor's are: its numbers are unique.
    fn mirror(&mut self, session: u32, number: u32, codec: u8, bulk: bool) {
        if let Some(record) = self.records.get_mut((number & INDEX_MASK) as usize) {
            let key = DETACHED | key(session, number);
            *record = Connection { key, bytes: 0, time_ns: 0, requests: 0, uses: 0, codec, bulk };
        }
    }

    fn forget(&mut self, session: u32, number: u32) {
        if let Some(record) = self.records.get_mut((number & INDEX_MASK) as usize)
            && record.key & !DETACHED == key(session, number)
        {
            record.key = FREE;
        }
    }

    /// Forgets every connection of `session` at a further reactor.
    fn forget_all(&mut self, session: u32) {
        for record in &mut self.records {
            if ((record.key & !DETACHED) >> 32) as u32 == session {
                record.key = FREE;
            }
        }
    }

    /// Makes a mirrored connection usable, if `session` has it open as this.
    pub fn attach(&mut self, session: u32, number: u32, codec: u8, bulk: bool) -> Attached {
        let Some(record) = self.records.get_mut((number & INDEX_MASK) as usize) else {
            return Attached::NotOpen;
        };
        if record.key & !DETACHED != key(session, number) {
            return Attached::NotOpen;
        }
        if record.codec != codec || record.bulk != bulk {
            return Attached::Otherwise;
        }
        record.key &= !DETACHED;
        Attached::Usable
    }

    /// The open connections of `session`, as notices for another reactor.
    pub(crate) fn opened_by(&self, session: u32) -> impl Iterator<Item = Notice> + '_ {
        let mine = move |record: &&Connection| (record.key >> 32) as u32 == session;
        let notice = |r: &Connection| Notice::Opened { number: r.key as u32, codec: r.codec, bulk: r.bulk };
        self.records.iter().filter(mine).map(notice)
    }

    /// Closes every connection of `session` and returns how many there were.
    pub fn close_all(&mut self, session: u32) -> u32 {
        let mut closed = 0;
        for index in 0..self.records.len() {
            let key = self.records[index].key;
            if (key >> 32) as u32 == session && self.close(session, key as u32) {
                closed += 1;
            }
        }
        closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_numbers_are_not_reused_at_once() {
        let mut pool = ConnectionPool::new(2);
        let (a, b) = (pool.open(7, 0, false).unwrap(), pool.open(7, 0, false).unwrap());
        assert_ne!(a, b);
        assert_eq!(pool.open(8, 0, false), None);
        assert!(pool.close(7, a) && !pool.close(7, a));
        let c = pool.open(8, 0, true).unwrap();
        assert_ne!(a, c, "a late call on the old number must not reach the new connection");
        assert!(pool.get(7, a).is_none() && pool.get(7, c).is_none() && pool.get(8, c).is_some());
        assert_eq!(pool.open_count(), 2);
    }

    /// Goal:   no connection has the number 0, which entries without one carry.
    /// Method: one record, used more often than its number has generations.
    #[test]
    fn no_connection_has_the_number_0() {
        let mut pool = ConnectionPool::new(1);
        for _ in 0..3 << (32 - INDEX_BITS) {
            let number = pool.open(7, 0, false).unwrap();
            assert!(number != 0 && pool.close(7, number));
        }
    }

    #[test]
    fn a_session_that_ends_closes_what_it_opened_and_nothing_else() {
        let mut pool = ConnectionPool::new(8);
        let mine: Vec<u32> = (0..3).filter_map(|_| pool.open(1, 0, false)).collect();
        let other = pool.open(2, 0, false).unwrap();
        assert_eq!(pool.close_all(1), 3);
        assert!(mine.iter().all(|n| pool.get(1, *n).is_none()) && pool.get(2, other).is_some());
        assert_eq!((0..9).filter_map(|_| pool.open(3, 0, false)).count(), 7);
    }

    #[test]
    fn numbers_that_were_never_given_are_refused() {
        let mut pool = ConnectionPool::new(2);
        let a = pool.open(1, 0, false).unwrap();
        for number in [0, 1, 2, a ^ 1, a ^ (1 << INDEX_BITS), u32::MAX] {
            assert!(pool.get(1, number).is_none(), "{number:#x}");
        }
    }
}

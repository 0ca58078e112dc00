//! How long calls take, at the price of one look at the clock for several of them. Sans-I/O: the clock is an input.
//!
//! Meaning: the time of a call is from when the reactor takes up its entry to when its completion is published. What
//!          it waited for in the ring before, and what its client needed to see the completion, is not part of it.
//!          Of a call of several frames, or that is answered from elsewhere, all the time between counts.
//! Rule:    calls that run to their end at once are timed in groups: those of a batch, or, where batches are small, of
//!          a few rounds. They ran one after the other, so each is counted with the mean: the sum is exact, and the
//!          spread within a group is not seen. Types whose calls take long are timed by themselves, each call exactly,
//!          so that none of them hides in a group or is taken for another's; a type begins as such.
//!          Where the reactor polls, up to [`IDLE_ROUNDS`] looks at empty rings, some 20 ns each, are part of the first
//!          call of a group: a time is rather too long than too short.
//! Cost:    one clock for [`GROUP`] calls, or for as many as came before work ran out; one more after a pause. That of
//!          a call that came alone is read when its completion has been published.

use super::types::{TYPES_MAX, TypeTable, bucket};
use std::sync::Arc;

/// Calls after which the clock is read, at the end of their batch.
const GROUP: usize = 32;
/// Most calls between two readings: those of a group that lacks one, and a batch.
const PENDING: usize = GROUP + 8;
/// Rounds without work after which the beginning of the next call has to be read from the clock.
pub(crate) const IDLE_ROUNDS: u32 = 4;
/// Types whose calls take longer are timed by themselves.
const LONG_NS: u64 = 4_000;
/// So are those of a group that took longer in all: one long call may hide among short ones.
const LONG_GROUP_NS: u64 = 20_000;
/// They are no longer when so many calls in a row have taken less than this: of a type most of whose calls are short, long
/// ones are seen as long as they are not rarer.
const SHORT_NS: u64 = 2_000;
const SHORT_IN_A_ROW: u32 = 64;
/// The record of all types that have none of their own.
const OTHER: u8 = TYPES_MAX as u8 - 1;
/// A type that has not been seen.
const UNSEEN: u8 = u8::MAX;

/// A call that has ended and has not been counted, or several of one type and connection in a row.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ended {
    /// How many calls.
    pub calls: u32,
    /// The record of its type.
    pub record: u8,
    /// The number of its connection.
    pub connection: u32,
    /// The session of that.
    pub session: u32,
    /// Bytes of their answers.
    pub sent: u64,
}

impl Ended {
    #[inline(always)]
    fn is_like(&self, other: &Self) -> bool {
        (self.record, self.connection, self.session) == (other.record, other.connection, other.session)
    }
}

/// The stop watch of one reactor.
#[derive(Debug)]
pub(crate) struct Timing {
    /// `None`: nothing is timed.
    table: Option<Arc<TypeTable>>,
    /// The record of each type that the handler table has.
    record_of: Vec<u8>,
    /// Records that are in use.
    types: u8,
    /// Records whose types are timed by themselves, one bit each, and how many of their calls in a row were short.
    alone: u32,
    short_in_a_row: u32,
    /// The time of each call of the last group of short ones.
    usual_ns: u64,
    /// When the present group began; 0 if that is not known.
    began_ns: u64,
    pending: [Ended; PENDING],
    /// The last of them, and how many calls there are in all.
    last: usize,
    len: usize,
    /// Rounds without work since something was pending.
    idle: u32,
    /// Time in which calls were run, ns.
    pub busy_ns: u64,
    /// Calls that took longer than this, ns, without letting others run, and how many there were.
    pub overrun_ns: u64,
    pub overruns: u64,
    /// The connection whose calls are timed by themselves, or 0, which is none's number, and whether the present call is one of them.
    traced: u32,
    is_traced: bool,
}

const _: () = assert!(TYPES_MAX <= u32::BITS as usize);

impl Timing {
    /// Times calls of types below `types` for `table`, unless that is `None`.
    pub fn new(table: Option<Arc<TypeTable>>, types: usize, overrun_ns: u64) -> Self {
        Self {
            record_of: vec![UNSEEN; if table.is_some() { types } else { 0 }],
            table,
            types: 0,
            alone: u32::MAX,
            short_in_a_row: 0,
            usual_ns: 0,
            began_ns: 0,
            pending: [Ended::default(); PENDING],
            last: 0,
            len: 0,
            idle: 0,
            busy_ns: 0,
            overrun_ns,
            overruns: 0,
            traced: 0,
            is_traced: false,
        }
    }

    pub fn is_on(&self) -> bool {
        self.table.is_some()
    }

    /// When the call that is being run was taken up, at `now` or earlier.
    pub fn began(&self, now: u64) -> u64 {
        if self.len > 0 || self.began_ns == 0 { now } else { self.began_ns.min(now) }
    }

    /// A round begins.
    #[inline(always)]
    pub fn round(&mut self, now_ns: &mut dyn FnMut() -> u64) {
        if self.began_ns == 0 && self.table.is_some() {
            self.began_ns = now_ns();
            if let Some(table) = &self.table {
                table.runs_since(self.began_ns);
            }
        }
    }

    /// The record of a type; [`OTHER`] if there is none.
    #[inline(always)]
    fn record_of(&mut self, message_type: u32) -> u8 {
        match self.record_of.get(message_type as usize) {
            Some(&UNSEEN) => self.first_of(message_type),
            Some(&record) => record,
            None => OTHER,
        }
    }

    #[cold]
    fn first_of(&mut self, message_type: u32) -> u8 {
        let record = self.types.min(OTHER);
        if record != OTHER {
            self.types += 1;
            if let Some(table) = &self.table {
                table.begin(record.into(), message_type);
            }
        }
        self.record_of[message_type as usize] = record;
        record
    }

    /// A call of this type is about to be taken up; returns what [`Timing::ended`] wants to know, and whether what came
    /// before it has to be counted first ([`Timing::count`]).
    #[inline(always)]
    pub fn take_up(&mut self, message_type: u32, connection: u32) -> (u8, bool) {
        let Some(table) = &self.table else { return (OTHER, false) };
        table.runs(message_type, connection);
        let record = self.record_of(message_type);
        self.is_traced = connection == self.traced;
        let alone = self.is_traced || self.is_alone(record);
        (record, self.began_ns == 0 || (self.len > 0 && alone))
    }

    /// Calls of this connection are timed by themselves from now on; 0 for none.
    pub fn trace(&mut self, connection: u32) {
        self.traced = connection;
    }

    /// No call is being run: anybody may see that.
    #[inline(always)]
    pub fn runs_nothing(&self) {
        if let Some(table) = &self.table {
            table.runs_nothing();
        }
    }

    /// A handler is about to run whose call was not taken up just now.
    #[cold]
    pub fn runs(&self, message_type: u32, connection: u32, now: u64) {
        if let Some(table) = &self.table {
            table.runs_since(now);
            table.runs(message_type, connection);
        }
    }

    /// When the clock was last read; 0 if something else has been done since.
    pub fn last_ns(&self) -> u64 {
        self.began_ns
    }

    #[inline(always)]
    fn is_alone(&self, record: u8) -> bool {
        self.alone >> record & 1 != 0
    }

    /// A call has ended; returns whether it has to be counted now ([`Timing::count`]).
    #[inline(always)]
    pub fn ended(&mut self, ended: Ended) -> bool {
        if self.table.is_none() {
            return false;
        }
        self.len += 1;
        let last = &mut self.pending[self.last % PENDING];
        if last.calls > 0 && last.is_like(&ended) {
            last.calls += 1;
            last.sent += ended.sent;
        } else {
            self.last += usize::from(last.calls > 0);
            self.pending[self.last % PENDING] = Ended { calls: 1, ..ended };
        }
        self.len >= PENDING || self.is_traced || self.is_alone(ended.record)
    }

    /// A batch has ended; returns whether its calls have to be counted now.
    #[inline(always)]
    pub fn batch_ended(&self) -> bool {
        self.len >= GROUP
    }

    /// Whether calls have ended that are not counted.
    #[inline(always)]
    pub fn is_pending(&self) -> bool {
        self.len > 0
    }

    /// A round has found nothing to do, and nothing is pending.
    #[inline(always)]
    pub fn is_idle(&mut self) {
        self.idle += 1;
        if self.idle >= IDLE_ROUNDS {
            self.runs_nothing();
            self.idle = 0;
            self.began_ns = 0;
        }
    }

    /// Something else than calls is about to be done: the next call begins after it.
    #[inline(always)]
    pub fn pause(&mut self) {
        debug_assert_eq!(self.len, 0);
        self.began_ns = 0;
    }

    /// Counts what has ended; `each` is given the calls of each connection and the time of all of them.
    pub fn count(&mut self, now: u64, mut each: impl FnMut(Ended, u64)) {
        let Some(table) = &self.table else { return };
        let took = if self.began_ns == 0 { 0 } else { now.saturating_sub(self.began_ns) };
        self.began_ns = now;
        table.runs_since(now);
        self.idle = 0;
        let len = std::mem::take(&mut self.len);
        if len == 0 {
            return;
        }
        let last = std::mem::take(&mut self.last).min(PENDING - 1);
        self.busy_ns += took;
        let mut each_ns = took / len as u64;
        let is_long = each_ns > LONG_NS || (len > 1 && took > LONG_GROUP_NS);
        if is_long && len > 1 {
            // Most likely one of them was long: the others are counted as calls were before, and the last with the rest.
            each_ns = each_ns.min(self.usual_ns);
            let rest = took - each_ns * (len as u64 - 1);
            let Ended { record, connection, session, .. } = self.pending[last];
            table.record(record.into()).count(bucket(rest), rest, 1);
            each(Ended { record, connection, session, ..Ended::default() }, rest);
            self.pending[last].calls -= 1;
        } else if !is_long {
            self.usual_ns = each_ns;
        }
        let bucket = bucket(each_ns);
        for ended in &self.pending[..=last] {
            table.record(ended.record.into()).count(bucket, each_ns, ended.calls.into());
            each(*ended, each_ns * u64::from(ended.calls));
        }
        self.overruns += u64::from(took > self.overrun_ns);
        if is_long {
            self.pending[..=last].iter().for_each(|ended| self.alone |= 1 << ended.record);
            self.short_in_a_row = 0;
        } else if len == 1 && each_ns < SHORT_NS {
            self.short_in_a_row += 1;
            if self.short_in_a_row >= SHORT_IN_A_ROW {
                self.short_in_a_row = 0;
                self.alone &= !(1 << self.pending[0].record);
            }
        }
        self.pending[0].calls = 0;
    }

    /// Counts a call of several frames, or that was answered from elsewhere.
    #[cold]
    pub fn count_long(&mut self, message_type: u32, took_ns: u64) {
        let record = self.record_of(message_type);
        if let Some(table) = &self.table {
            table.record(record.into()).count(bucket(took_ns), took_ns, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::TypeMetrics;

    struct Watch {
        timing: Timing,
        table: Arc<TypeTable>,
        now: u64,
        readings: u32,
        /// Time of connections.
        of_connections: [u64; 4],
    }

    impl Watch {
        fn new() -> Self {
            let table = Arc::new(TypeTable::new());
            let timing = Timing::new(Some(Arc::clone(&table)), 64, 200_000);
            let mut watch = Self { timing, table, now: 1, readings: 0, of_connections: [0; 4] };
            watch.round();
            watch
        }

        fn round(&mut self) {
            let (now, readings) = (self.now, &mut self.readings);
            self.timing.round(&mut || {
                *readings += 1;
                now
            });
        }

        fn count(&mut self) {
            self.readings += 1;
            let of = &mut self.of_connections;
            self.timing.count(self.now, |ended, ns| of[ended.connection as usize] += ns);
        }

        fn call(&mut self, message_type: u32, takes: u64) {
            let (record, first) = self.timing.take_up(message_type, 9);
            if first {
                self.count();
            }
            self.now += takes;
            if self.timing.ended(Ended { record, connection: message_type % 4, ..Ended::default() }) {
                self.count();
            }
        }

        fn batch(&mut self, calls: &[(u32, u64)]) {
            calls.iter().for_each(|(message_type, takes)| self.call(*message_type, *takes));
            if self.timing.batch_ended() {
                self.count();
            }
        }

        fn settle(&mut self) {
            if self.timing.is_pending() {
                self.count();
            }
        }

        fn told(&self) -> Vec<TypeMetrics> {
            let mut told = Vec::new();
            self.table.add_to(&mut told);
            told
        }

        fn of(&self, message_type: u32) -> TypeMetrics {
            self.told().into_iter().find(|t| t.message_type == message_type).unwrap()
        }
    }

    /// Goal:   R4.2: every call is counted and all time of calls is accounted for, with one look at the clock for
    ///         thirty-two short calls.
    /// Method: a thousand batches of eight; the clock is counted.
    #[test]
    fn r4_2_every_call_is_counted_with_a_clock_for_many() {
        let mut watch = Watch::new();
        (0..64).for_each(|_| watch.batch(&[(2, 100)]));
        let before = watch.readings;
        for _ in 0..1000 {
            watch.batch(&[(2, 100); 8]);
        }
        assert_eq!(watch.readings - before, 250);
        watch.settle();
        let echo = watch.of(2);
        assert_eq!((echo.calls(), echo.sum_ns, echo.buckets[0]), (8064, 806_400, 8064));
        assert_eq!((watch.timing.busy_ns, watch.of_connections[2]), (806_400, 806_400));
    }

    /// Goal:   a long call is counted with its own time, and short ones beside it are not charged for it.
    /// Method: a slow type between fast ones, on a reactor that knows neither, then one that turns slow later.
    #[test]
    fn r4_2_a_long_call_is_timed_by_itself() {
        let mut watch = Watch::new();
        for _ in 0..100 {
            watch.batch(&[(1, 100), (1, 100), (9, 5_000_000), (1, 100)]);
        }
        watch.settle();
        let (fast, slow) = (watch.of(1), watch.of(9));
        assert_eq!((fast.calls(), fast.buckets[0], fast.sum_ns), (300, 300, 30_000));
        assert_eq!((slow.calls(), slow.buckets[bucket(5_000_000)], slow.longest_ns), (100, 100, 5_000_000));
        assert_eq!(watch.timing.overruns, 100);

        watch.batch(&[(1, 100); 3]);
        watch.batch(&[(1, 900_000)]);
        watch.settle();
        watch.batch(&[(1, 900_000)]);
        assert_eq!(watch.of(1).longest_ns, 900_000, "the second of them at the latest");
        let before = watch.of(1).sum_ns;
        watch.batch(&[(1, 100); 8]);
        watch.settle();
        assert_eq!(watch.of(1).sum_ns - before, 800, "and fast again");

        // One that hides is taken for what it is; the next of its type is seen.
        (0..8).for_each(|_| watch.batch(&[(1, 100); 8]));
        for _ in 0..2 {
            (0..3).for_each(|_| watch.batch(&[(1, 100); 8]));
            watch.batch(&[(1, 100), (1, 100), (1, 30_000), (1, 100)]);
            watch.settle();
        }
        assert_eq!(watch.of(1).buckets[bucket(30_000)], 2);
    }

    /// Goal:   what is done between calls is not charged to them, nor is the time in which there were none.
    #[test]
    fn r4_2_pauses_are_not_part_of_a_call() {
        let mut watch = Watch::new();
        watch.batch(&[(1, 100)]);
        watch.batch(&[(1, 100)]);
        watch.settle();
        watch.timing.pause();
        watch.now += 1_000_000;
        watch.round();
        watch.batch(&[(1, 100)]);
        watch.settle();
        for _ in 0..100 {
            watch.now += 20;
            watch.round();
            watch.timing.is_idle();
        }
        watch.round();
        watch.batch(&[(1, 100)]);
        watch.settle();
        assert_eq!((watch.of(1).calls(), watch.of(1).sum_ns), (4, 400));
    }

    /// Goal:   S12: types beyond the records share one, and so do numbers beyond the table.
    #[test]
    fn s12_types_without_a_record_share_one() {
        let mut watch = Watch::new();
        for message_type in 0..64 {
            watch.call(message_type, 50);
        }
        watch.call(u32::MAX, 50);
        watch.settle();
        let told = watch.told();
        assert_eq!(told.len(), TYPES_MAX);
        assert_eq!(watch.of(super::super::OTHER_TYPES).calls(), 64 + 1 - (TYPES_MAX as u64 - 1));
        assert_eq!(told.iter().map(TypeMetrics::calls).sum::<u64>(), 65);
    }

    /// Goal:   without a table nothing is timed and the clock is not read.
    #[test]
    fn nothing_is_timed_where_nobody_wants_to_know() {
        let mut timing = Timing::new(None, 64, 0);
        timing.round(&mut || panic!("the clock is not needed"));
        let (record, count) = timing.take_up(3, 9);
        assert!(!count && !timing.ended(Ended { record, ..Ended::default() }) && !timing.batch_ended());
    }
}

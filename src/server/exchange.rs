//! Calls of more than one frame: their bodies, the windows of their answers, and what they wait for. Sans-I/O.
//!
//! Rule:   an exchange moves whenever what it waits for has come: a frame, room for its answer (credit and space in the
//!         completion ring), or memory to put its body together in. Meanwhile its frames stay in their slots, and
//!         nobody else waits for it.
//! Bound:  one step takes at most one frame; a lane's turn ends after its bytes as for any call (S7).
//! Memory: a body that is put together reserves all that it may need before its first byte is taken, so that bodies
//!         cannot wait for each other in a circle. Records are made once and used again (R1.8).

use super::jobs::{Answer, Jobs};
use super::table::{Defer, Elsewhere, MakePieces, Pieces, RELEASED_MASK, Window};
use super::tickets::Tickets;
use crate::inspect::{CallReport, CallState};
use crate::protocol::TraceParent;
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Status, Submission};
use doorbell_shm::layout::{LaneLayout, SLOT_SMALL};
use doorbell_shm::slots::ClientWord;
use memmap2::MmapMut;
use std::collections::VecDeque;
use std::fmt;

/// A frame that its call has not taken yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub slot: u32,
    pub len: u32,
    /// Bytes of it that have been taken.
    pub at: u32,
}

/// How a call ends, once all of its answer has been sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terminal {
    pub status: Status,
    pub detail: u64,
}

/// What is done with the body.
pub(crate) enum Work<S> {
    /// Nothing yet: it is to be put together in so many bytes, and these are not to be had.
    Waits(usize),
    /// It is put together.
    Whole(Body),
    /// Its handler takes it as it comes.
    Pieces(Box<dyn Pieces<S>>),
    /// It has been taken; the reactor answers, by the job of this number.
    Deferred(u64),
    /// It has been taken; whoever has the ticket of this number answers.
    Ticket(u32),
    /// There is nothing to be done any more: the answer is complete.
    Answered,
}

/// A body that is being put together, in memory of its own that is given back to the kernel at its end.
pub(crate) struct Body {
    /// `None` of an empty one.
    memory: Option<MmapMut>,
    len: usize,
    /// What has been reserved for it.
    pub reserved: usize,
}

impl Body {
    /// Room for so many bytes.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn new(reserved: usize) -> std::io::Result<Self> {
        let memory = if reserved == 0 { None } else { Some(MmapMut::map_anon(reserved)?) };
        Ok(Self { memory, len: 0, reserved })
    }

    /// The next `len` bytes, to be filled; `None` if the body is longer than its room.
    pub fn grow(&mut self, len: usize) -> Option<&mut [u8]> {
        let start = self.len;
        let end = start + len;
        if len == 0 {
            return Some(&mut []);
        }
        let room = self.memory.as_deref_mut()?.get_mut(start..end)?;
        self.len = end;
        Some(room)
    }

    pub fn bytes(&self) -> &[u8] {
        self.memory.as_deref().map_or(&[], |memory| &memory[..self.len])
    }
}

/// A call of several frames, or whose answer has several.
pub(crate) struct Exchange<S> {
    pub call: Submission,
    /// The trace that it belongs to.
    pub traceparent: Option<TraceParent>,
    pub ring: usize,
    /// Its lane is seated there.
    pub seat: u32,
    /// The number of the next frame of its request.
    pub next_frame: u32,
    /// Bytes of the body that have come, taken or not.
    pub received: u64,
    /// The last frame has come.
    pub ended: bool,
    /// Frames that have come and have not been taken.
    pub parked: VecDeque<Frame>,
    /// Frames that have been taken.
    pub taken: u32,
    /// The end of the frame at the head: a copy, because the answer is being written where it lay.
    pub kept: Vec<u8>,
    pub work: Work<S>,
    pub window: Window,
    /// Bytes in the frame of the window that is being written.
    pub filled: u32,
    /// Bytes of the answer that did not fit into the window, and how many of them have gone since.
    pub spill: Vec<u8>,
    pub spilled: usize,
    /// Bytes of an answer that waited for room when that was last counted ([`LaneExchanges::unread`]).
    pub unread: usize,
    /// Bytes of the answer that have been sent.
    pub sent: usize,
    pub terminal: Option<Terminal>,
    /// It is among those that will be stepped.
    pub queued: bool,
    /// It waits for space in the completion ring.
    pub wants_space: bool,
    /// It is a question about the server itself.
    pub is_question: bool,
    /// When its first entry was taken up, ns; 0 if it is not timed.
    pub began_ns: u64,
    /// Something of it has moved since somebody last asked.
    pub moved: bool,
    /// Sweeps in a row that found that nothing had moved.
    pub stale: u8,
}

impl<S> fmt::Debug for Exchange<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange")
            .field("call", &self.call)
            .field("next_frame", &self.next_frame)
            .field("taken", &self.taken)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

impl<S> Exchange<S> {
    fn new() -> Self {
        Self {
            call: Submission::default(),
            traceparent: None,
            ring: 0,
            seat: 0,
            next_frame: 0,
            received: 0,
            ended: false,
            parked: VecDeque::new(),
            taken: 0,
            kept: Vec::new(),
            work: Work::Answered,
            window: Window::default(),
            filled: 0,
            spill: Vec::new(),
            spilled: 0,
            unread: 0,
            sent: 0,
            terminal: None,
            queued: false,
            wants_space: false,
            is_question: false,
            began_ns: 0,
            moved: true,
            stale: 0,
        }
    }

    /// Whether any slot of it is one for `is_leased`.
    pub fn uses_leases(&self, is_leased: impl Fn(u32) -> bool) -> bool {
        is_leased(self.window.first) || self.parked.iter().any(|frame| is_leased(frame.slot))
    }

    /// Whether a frame that has not been taken lies in the slot that names the call.
    pub fn holds_own_slot(&self) -> bool {
        self.parked.iter().any(|frame| frame.slot == self.call.slot)
    }

    /// Takes note of what a frame says of the body.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Body`] if that contradicts the announcement.
    pub fn count(&mut self, len: u32, ends: bool) -> Result<(), PeerFault> {
        self.received += u64::from(len);
        self.ended = ends;
        let announced = self.call.body_len;
        let wrong = self.received > announced || ends && self.received != announced;
        if announced != 0 && wrong {
            return Err(PeerFault::Body { slot: self.call.slot, announced, sent: self.received });
        }
        Ok(())
    }

    /// Takes note of the client's word.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Credit`] for frames that were not sent, or that had been released before.
    pub fn release(&mut self, word: ClientWord) -> Result<(), PeerFault> {
        let Window { frame, released, .. } = self.window;
        let newly = word.released.wrapping_sub(released) & RELEASED_MASK;
        let unreleased = frame.wrapping_sub(released) & RELEASED_MASK;
        if newly > unreleased {
            let (theirs, slot) = (word.released, self.call.slot);
            return Err(PeerFault::Credit { slot, theirs, oldest: released, newest: frame & RELEASED_MASK });
        }
        self.window.released = word.released;
        Ok(())
    }

    /// Readies all of its answer to be sent.
    pub fn answer(&mut self, answer: Answer, message_max: usize) {
        let Answer { status, detail, bytes } = answer;
        let (status, detail, bytes) = match status {
            Status::TooLarge => (status, message_max as u64, Vec::new()),
            _ if bytes.len() > message_max => (Status::TooLarge, message_max as u64, Vec::new()),
            _ => (status, detail, bytes),
        };
        (self.spill, self.spilled) = (bytes, 0);
        self.work = Work::Answered;
        self.terminal = Some(Terminal { status, detail });
        self.moved = true;
    }

    /// Whether a frame lies in a slot that its own call or the answer's window has.
    pub fn is_shared(&self, frame: &Frame) -> bool {
        frame.slot == self.call.slot || frame.slot == self.window.first
    }

    /// Slots of the window other than the one that names the call.
    pub fn window_slots(&self) -> impl Iterator<Item = u32> + use<S> {
        let (Window { first, count, capacity, .. }, own) = (self.window, self.call.slot);
        (0..count).map(move |i| first + i * (capacity / SLOT_SMALL as u32)).filter(move |slot| *slot != own)
    }

    /// What there is to tell of it.
    pub fn tell(&self, reactor: u32, now: u64) -> CallReport {
        let has_credit = self.window.count == 0 || self.window.credit() > 0;
        let state = match &self.work {
            Work::Waits(_) => CallState::WaitingForMemory,
            _ if self.wants_space => CallState::WaitingForSpace,
            _ if !has_credit => CallState::WaitingForCredit,
            Work::Deferred(_) => CallState::ReadingFile,
            Work::Ticket(_) => CallState::Deferred,
            Work::Whole(_) | Work::Pieces(_) if self.parked.is_empty() && !self.ended => {
                CallState::WaitingForFrames
            }
            Work::Whole(_) | Work::Pieces(_) | Work::Answered => CallState::Moving,
        };
        CallReport {
            session: self.seat,
            connection: self.call.connection,
            reactor,
            message_type: self.call.message_type,
            slot: self.call.slot,
            generation: self.call.generation,
            state,
            age_ns: (self.began_ns != 0).then(|| now.saturating_sub(self.began_ns)),
            received: self.received.max(u64::from(self.call.len)),
            sent: (self.sent + self.filled as usize) as u64,
        }
    }

    /// Where the next byte of the answer goes in the slot region.
    pub fn offset(&self) -> usize {
        LaneLayout::slot_offset(self.window.slot(self.window.frame))
    }

    /// Counts anew what waits for room, in the sum of its lane: all of it, since its memory goes back with its last byte.
    pub fn count_unread(&mut self, sum: &mut usize) {
        let unread = if self.has_spilled() { self.spill.len() } else { 0 };
        *sum = *sum - self.unread + unread;
        self.unread = unread;
    }

    /// Whether the answer has bytes left that wait for room.
    pub fn has_spilled(&self) -> bool {
        self.spilled < self.spill.len()
    }
}

/// Exchanges of all lanes of one reactor, and the memory that their bodies are put together in.
pub(crate) struct Exchanges<S> {
    records: Vec<Option<Box<Exchange<S>>>>,
    free: Vec<u32>,
    /// Records that are not in use. Boxed: they move between here and those in use.
    #[expect(clippy::vec_box, reason = "the boxes are what is kept")]
    spare: Vec<Box<Exchange<S>>>,
    /// Bytes that bodies may take all together, and have reserved.
    memory: usize,
    reserved: usize,
    /// Exchanges that wait for such memory, oldest first.
    waiting: VecDeque<u32>,
    /// Exchanges for which it has come, with their seats.
    pub runnable: Vec<(u32, u32)>,
    /// What the reactor is to do for some of them.
    pub jobs: Jobs,
    /// Who answers the others.
    pub tickets: Tickets,
    /// Deadlines may have to be looked after.
    pub with_deadline: u32,
    /// No deadline passes before this.
    pub next_deadline: u64,
}

/// Records kept for later; each has a few hundred bytes.
const SPARE_MAX: usize = 64;
/// Frames that each of them has room for at most.
const PARKED_KEPT: usize = 64;

impl<S> Exchanges<S> {
    /// None, so many bytes for bodies, and these tickets.
    pub fn new(memory: usize, tickets: Tickets) -> Self {
        Self {
            records: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            memory,
            reserved: 0,
            waiting: VecDeque::new(),
            runnable: Vec::new(),
            jobs: Jobs::default(),
            tickets,
            with_deadline: 0,
            next_deadline: u64::MAX,
        }
    }

    /// A fresh record and its index; to be put there with [`Exchanges::put`].
    pub fn begin(&mut self, call: &Submission, ring: usize, seat: u32) -> (u32, Box<Exchange<S>>) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.records.push(None);
            self.records.len() as u32 - 1
        });
        let mut record = self.spare.pop().unwrap_or_else(|| Box::new(Exchange::new()));
        (record.call, record.ring, record.seat) = (*call, ring, seat);
        if call.deadline != 0 {
            self.with_deadline += 1;
            self.next_deadline = self.next_deadline.min(call.deadline);
        }
        (index, record)
    }

    /// One of them, which is not in its place, has to end by then, whatever its caller has said.
    pub fn ends_by(&mut self, exchange: &mut Exchange<S>, deadline: u64) {
        if exchange.call.deadline == 0 {
            self.with_deadline += 1;
        } else if exchange.call.deadline <= deadline {
            return;
        }
        exchange.call.deadline = deadline;
        self.next_deadline = self.next_deadline.min(deadline);
    }

    /// Takes a record out to work on it.
    pub fn take(&mut self, index: u32) -> Option<Box<Exchange<S>>> {
        self.records.get_mut(index as usize)?.take()
    }

    pub fn get_mut(&mut self, index: u32) -> Option<&mut Exchange<S>> {
        self.records.get_mut(index as usize)?.as_deref_mut()
    }

    pub fn put(&mut self, index: u32, record: Box<Exchange<S>>) {
        self.records[index as usize] = Some(record);
    }

    /// The exchange is over: its record is free, its memory goes to whoever waits for it.
    pub fn end(&mut self, index: u32, mut record: Box<Exchange<S>>) {
        self.with_deadline -= u32::from(record.call.deadline != 0);
        if self.with_deadline == 0 {
            // Nobody is woken for a call that is over.
            self.next_deadline = u64::MAX;
        }
        if record.is_question {
            self.jobs.asked_ended(record.seat);
        }
        match std::mem::replace(&mut record.work, Work::Answered) {
            Work::Whole(body) => self.give_back(body.reserved),
            Work::Waits(_) => {
                self.waiting.retain(|other| *other != index);
                self.wake_waiting();
            }
            Work::Deferred(number) => self.jobs.give_up(number),
            Work::Ticket(number) => self.tickets.detach(number),
            Work::Pieces(_) | Work::Answered => {}
        }
        self.free.push(index);
        if self.spare.len() < SPARE_MAX {
            let (mut parked, mut spill) =
                (std::mem::take(&mut record.parked), std::mem::take(&mut record.spill));
            parked.clear();
            // Records that wait for their next use are nobody's: a client that has sent much must not leave much.
            parked = if parked.capacity() <= PARKED_KEPT { parked } else { VecDeque::new() };
            spill = if spill.capacity() <= 4096 { spill } else { Vec::new() };
            spill.clear();
            *record = Exchange { parked, spill, ..Exchange::new() };
            self.spare.push(record);
        }
    }

    /// Reserves memory for a body; `false` if there is none now: the exchange then has its turn when there is.
    /// `index` waits already if it is asked again.
    pub fn reserve(&mut self, index: u32, bytes: usize) -> bool {
        let first = self.waiting.front().is_none_or(|front| *front == index);
        // One body always fits, however long.
        if first && (self.reserved == 0 || self.reserved + bytes <= self.memory) {
            self.reserved += bytes;
            if first && !self.waiting.is_empty() {
                self.waiting.retain(|other| *other != index);
                // There may be enough for the next one, too.
                self.wake_waiting();
            }
            return true;
        }
        if !self.waiting.contains(&index) {
            self.waiting.push_back(index);
        }
        false
    }

    /// Bytes that a whole body reserved are free.
    pub fn give_back(&mut self, bytes: usize) {
        self.reserved -= bytes;
        self.wake_waiting();
    }

    fn wake_waiting(&mut self) {
        let Some(index) = self.waiting.front().copied() else { return };
        if let Some(Some(record)) = self.records.get(index as usize) {
            self.runnable.push((record.seat, index));
        }
    }

    /// Exchanges that wait for memory to put their bodies together in.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Exchanges that are under way.
    pub fn live(&self) -> usize {
        self.records.len() - self.free.len()
    }

    /// Exchanges that are under way, but for those that the reactor is to answer.
    pub fn moving(&self) -> usize {
        self.records.len() - self.free.len() - self.jobs.live() - self.tickets.attached() as usize
    }

    /// Bytes reserved for bodies.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Whether a body waits for memory.
    pub fn anybody_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Indices and records of all exchanges.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Exchange<S>)> {
        self.records.iter_mut().enumerate().filter_map(|(i, r)| Some((i as u32, r.as_deref_mut()?)))
    }
}

/// The exchanges of one lane; made when it has its first.
#[derive(Debug)]
pub(crate) struct LaneExchanges {
    /// By base slot number: index plus 1, 0 for none.
    by_slot: Vec<u32>,
    /// Those that can move, of each ring.
    pub ready: [VecDeque<u32>; 2],
    /// Those that wait for space in the completion ring.
    pub wanting_space: [Vec<u32>; 2],
    pub live: u32,
    /// Bytes of answers that wait in the server's memory for their client to make room.
    pub unread: usize,
}

impl LaneExchanges {
    /// None yet, of a lane with so many base slot numbers.
    pub fn new(names: u32) -> Self {
        Self {
            by_slot: vec![0; names as usize],
            ready: Default::default(),
            wanting_space: Default::default(),
            live: 0,
            unread: 0,
        }
    }

    /// The exchange that the call in `slot` is.
    pub fn of_slot(&self, slot: u32) -> Option<u32> {
        self.by_slot.get(slot as usize).copied().filter(|index| *index != 0).map(|index| index - 1)
    }

    pub fn insert(&mut self, slot: u32, index: u32) {
        self.by_slot[slot as usize] = index + 1;
        self.live += 1;
    }

    pub fn remove(&mut self, slot: u32, ring: usize, index: u32) {
        self.by_slot[slot as usize] = 0;
        self.live -= 1;
        self.ready[ring].retain(|other| *other != index);
        self.wanting_space[ring].retain(|other| *other != index);
    }

    /// Indices of all of them.
    pub fn all(&self) -> Vec<u32> {
        self.iter().collect()
    }

    /// The same, without memory of its own.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_slot.iter().filter(|index| **index != 0).map(|index| index - 1)
    }

    /// Whether any can move.
    pub fn can_move(&self) -> bool {
        self.ready.iter().any(|ready| !ready.is_empty())
    }

    pub fn wants_space(&self, ring: usize) -> bool {
        !self.wanting_space[ring].is_empty()
    }
}

/// How the body of a call is taken, given what its table entry offers.
pub(super) enum Plan<S: 'static> {
    Pieces(MakePieces<S>),
    /// Put together, in at most so many bytes.
    Whole(usize),
    /// It is there as a whole, for a handler that may leave the answer to the reactor.
    Deferred(Defer),
    /// It is there as a whole, and is answered from elsewhere.
    Elsewhere(Elsewhere<S>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::budget::Budget;

    fn exchange(body_len: u64) -> Exchange<()> {
        Exchange { call: Submission { body_len, slot: 3, ..Submission::default() }, ..Exchange::new() }
    }

    /// Goal:   S12: an answer of which a byte is unread counts with all the memory that it has.
    #[test]
    fn s12_an_answer_counts_until_its_last_byte_has_gone() {
        let (mut exchange, mut sum) = (exchange(0), 7);
        exchange.spill = vec![0; 1000];
        for (spilled, counted) in [(0, 1000), (999, 1000), (1000, 0)] {
            exchange.spilled = spilled;
            exchange.count_unread(&mut sum);
            assert_eq!(sum, 7 + counted);
        }
    }

    /// Goal:   a body that is longer or shorter than announced is found out with the frame that shows it.
    #[test]
    fn f12_a_body_is_as_long_as_it_was_announced() {
        let fault = |announced, sent| Err(PeerFault::Body { slot: 3, announced, sent });
        assert_eq!(exchange(10).count(11, false), fault(10, 11));
        assert_eq!(exchange(10).count(9, true), fault(10, 9));
        assert_eq!(exchange(0).count(9, true), Ok(()));
        let mut good = exchange(10);
        assert_eq!((good.count(4, false), good.count(6, true), good.ended), (Ok(()), Ok(()), true));
    }

    /// Goal:   P3: credit cannot be taken back, nor given for what was not sent; counts wrap.
    /// Method: every distance from two positions, one of them at the wrap of 31 bits.
    #[test]
    fn p3_credit_goes_forward_and_no_further_than_what_was_sent() {
        for released in [0, RELEASED_MASK - 1] {
            for off in -3i64..6 {
                let mut e = exchange(0);
                let frame = released.wrapping_add(3);
                e.window = Window { first: 0, count: 4, capacity: 1024, frame, released };
                let theirs = (i64::from(released) + off) as u32 & RELEASED_MASK;
                let result = e.release(ClientWord { generation: 0, cancelled: false, released: theirs });
                assert_eq!(result.is_ok(), (0..=3).contains(&off), "{released} {off}");
                let expected = if result.is_ok() { 1 + off as u32 } else { 1 };
                assert_eq!(e.window.credit(), expected);
            }
        }
    }

    /// Goal:   a call has to end by its own deadline or by one that is set later, whichever is sooner, and is counted once.
    #[test]
    fn r2_9_the_sooner_of_two_deadlines_holds() {
        let mut all: Exchanges<()> = Exchanges::new(100, Tickets::new(1, Budget::new(1 << 30)));
        for (own, set, expected) in [(0, 50, 50), (70, 50, 50), (30, 50, 30), (50, 50, 50)] {
            let (index, mut record) = all.begin(&Submission { deadline: own, ..Submission::default() }, 0, 9);
            all.ends_by(&mut record, set);
            assert_eq!((record.call.deadline, all.with_deadline), (expected, 1));
            assert!(all.next_deadline <= expected);
            all.end(index, record);
            assert_eq!((all.with_deadline, all.next_deadline), (0, u64::MAX));
        }
    }

    /// Goal:   bodies get their memory in the order in which they asked, and each all of it at once; one that is
    ///         longer than all memory gets it when nobody else has any.
    #[test]
    fn p3_bodies_wait_for_memory_in_order() {
        let mut all: Exchanges<()> = Exchanges::new(100, Tickets::new(1, Budget::new(1 << 30)));
        let begin = |all: &mut Exchanges<()>| {
            let (index, record) = all.begin(&Submission::default(), 0, 9);
            all.put(index, record);
            index
        };
        let (a, b, c) = (begin(&mut all), begin(&mut all), begin(&mut all));
        assert!(all.reserve(a, 60) && !all.reserve(b, 60));
        assert!(!all.reserve(c, 10), "it would overtake");
        assert!(all.runnable.is_empty() && all.anybody_waits());
        all.give_back(60);
        assert_eq!(std::mem::take(&mut all.runnable), [(9, b)]);
        assert!(all.reserve(b, 1000) && !all.reserve(c, 10));
        assert_eq!(std::mem::take(&mut all.runnable), [(9, c)], "there might have been enough for both");
        let record = all.take(c).unwrap();
        let mut waits = record;
        waits.work = Work::Waits(10);
        all.end(c, waits);
        all.give_back(1000);
        assert!(!all.anybody_waits() && all.runnable.is_empty() && all.reserved() == 0);
    }
}

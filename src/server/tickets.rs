//! The reactor's side of deferred answers: which tickets there are, where their bytes lie, whom to wake. Sans-I/O; what
//! crosses threads is in `deferred.rs`.
//!
//! Rule:   a ticket is attached to its call until that ends; then it is detached, which tells its holder, and it goes on
//!         counting until he drops it (P4). A number is used again only after that, so that nothing said late is
//!         taken for another call's (S10).
//! Bound:  `max_deferred` tickets, the detached ones among them; a buffer of [`BLOCK`] bytes for each, and longer ones
//!         for as many as there are of them.
//! Memory: address space for all buffers is taken with the first ticket; there is memory behind it where it has been
//!         used. Records are used again.

use super::budget::Budget;
use super::deferred::{Deferred, Desk, End, Record};
use crate::error::{IpcError, Result};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::pipe::{PipeReader, Range};
use memmap2::{MmapMut, MmapRaw};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

/// Bytes between a writer and the reactor, of every ticket.
const BLOCK: u32 = 256;
/// Longer buffers, for writers that have found theirs full: bytes of each, and how many there are.
const LONGER: [(u32, u32); 2] = [(4 << 10, 64), (64 << 10, 8)];
/// The longest of them.
const LONGEST: u32 = LONGER[LONGER.len() - 1].0;
/// Records kept for later.
const SPARE_MAX: usize = 64;

/// What a ticket takes of the memory budget, bytes: its buffer, its records and those of its call.
const PRIVATE_PER_TICKET: u64 = 1152;

/// What has become of a ticket that is looked at.
#[derive(Debug)]
pub(crate) enum Look {
    /// There are bytes to take.
    Bytes(usize),
    /// All has been taken, and more may come.
    Empty,
    /// All has been taken, and no more comes; how it ended beside that. The number is free.
    Ended(Option<End>),
}

struct Live {
    record: Arc<Record>,
    reader: PipeReader,
    /// Seat and exchange of its call; `None` once that has ended.
    call: Option<(u32, u32)>,
    /// Where its bytes lie as far as is known, and the range that it is to change to.
    range: Range,
    offered: Option<Range>,
}

/// All tickets of one reactor.
pub(crate) struct Tickets {
    most: u32,
    budget: Budget,
    /// Made with the first ticket.
    desk: Option<Arc<Desk>>,
    /// Where the reactor is rung that cannot sleep on a bell.
    eventfd: Option<Arc<OwnedFd>>,
    live: Vec<Option<Live>>,
    free: Vec<u32>,
    spare: Vec<Arc<Record>>,
    /// Free ranges of each length in [`LONGER`].
    longer: [Vec<Range>; LONGER.len()],
    /// Tickets that were ready and have not been looked at, with the last one first.
    ready: Vec<u32>,
    /// Whom to wake once what was done for him can be seen.
    wakes: Vec<Waker>,
    attached: u32,
    detached: u32,
}

impl Tickets {
    /// None; at most so many.
    pub fn new(most: u32, budget: Budget) -> Self {
        Self {
            most,
            budget,
            desk: None,
            eventfd: None,
            live: Vec::new(),
            free: Vec::new(),
            spare: Vec::new(),
            longer: Default::default(),
            ready: Vec::new(),
            wakes: Vec::new(),
            attached: 0,
            detached: 0,
        }
    }

    /// The reactor is rung by this eventfd, since it cannot sleep on a bell. To be said before the first ticket.
    pub fn rung_through(&mut self, eventfd: Arc<OwnedFd>) {
        self.eventfd = Some(eventfd);
    }

    /// A ticket for the call that this exchange is; `None` if there are as many as may be, or the memory budget is used
    /// up.
    ///
    /// # Errors
    ///
    /// What the kernel refuses of the address space, which only the first ticket asks for.
    pub fn open(&mut self, seat: u32, exchange: u32) -> Result<Option<(u32, Deferred)>> {
        if self.attached + self.detached >= self.most || self.budget.take(1, 1, PRIVATE_PER_TICKET) == 0 {
            return Ok(None);
        }
        let desk = match &self.desk {
            Some(desk) => Arc::clone(desk),
            None => match make_desk(self.most, &mut self.longer, self.eventfd.clone()) {
                Ok(desk) => Arc::clone(self.desk.insert(Arc::new(desk))),
                Err(error) => {
                    self.budget.give(PRIVATE_PER_TICKET);
                    return Err(error);
                }
            },
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.live.push(None);
            self.live.len() as u32 - 1
        });
        let range = block(number);
        let record = self.make_record(range);
        let ticket = Deferred::new(Arc::clone(&record), desk, number, range, LONGEST as usize);
        let call = Some((seat, exchange));
        self.live[number as usize] =
            Some(Live { record, reader: PipeReader::default(), call, range, offered: None });
        self.attached += 1;
        Ok(Some((number, ticket)))
    }

    fn make_record(&mut self, range: Range) -> Arc<Record> {
        if let Some(mut spare) = self.spare.pop()
            && let Some(record) = Arc::get_mut(&mut spare)
        {
            *record = Record::new(range);
            return spare;
        }
        Arc::new(Record::new(range))
    }

    /// Whether anything is to be done about any of them.
    #[inline(always)]
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty() || self.desk.as_ref().is_some_and(|desk| desk.ready.any())
    }

    /// The next ticket that its holder has something to say of: seat and exchange of its call. Those whose call has
    /// ended are done with here.
    pub fn next_ready(&mut self) -> Option<(u32, u32)> {
        loop {
            let Some(number) = self.ready.pop() else {
                let desk = self.desk.as_ref().filter(|desk| desk.ready.any())?;
                desk.ready.take(|number| self.ready.push(number));
                // The lowest one first.
                self.ready.reverse();
                continue;
            };
            match self.live.get(number as usize) {
                Some(Some(Live { call: Some(call), .. })) => return Some(*call),
                Some(Some(_)) => self.free_if_done(number),
                _ => {}
            }
        }
    }

    /// What there is to take of an attached ticket.
    pub fn look(&mut self, number: u32) -> Look {
        let Some(Some(live)) = self.live.get_mut(number as usize) else { return Look::Empty };
        // Before the bytes: none come after this.
        let done = live.record.pipe.is_done();
        let available = live.reader.available(&live.record.pipe);
        if available > 0 {
            return Look::Bytes(available);
        }
        if !done {
            return Look::Empty;
        }
        // Its holder gives his share back before he tells of the end.
        let Some(record) = Arc::get_mut(&mut live.record) else { return Look::Empty };
        let end = record.end.take();
        self.attached -= 1;
        self.release(number);
        Look::Ended(end)
    }

    /// Takes the next bytes of a ticket, of which there are as many ([`Tickets::look`]).
    pub fn take(&mut self, number: u32, target: &mut [u8]) {
        if let (Some(Some(live)), Some(desk)) = (self.live.get_mut(number as usize), &self.desk) {
            live.reader.take(&live.record.pipe, &desk.store, target);
        }
    }

    /// Lets the holder of a ticket have the room of what has been taken, and a longer range if he wants one.
    pub fn make_room(&mut self, number: u32) {
        let Some(Some(live)) = self.live.get_mut(number as usize) else { return };
        let pipe = &live.record.pipe;
        live.reader.publish(pipe);
        if let Some(offered) = live.offered.filter(|offered| live.reader.uses(pipe, *offered)) {
            give_back(&mut self.longer, &self.budget, live.range);
            (live.range, live.offered) = (offered, None);
        }
        if live.reader.wants_more(pipe)
            && live.offered.is_none()
            && let Some(range) = take_longer(&mut self.longer, &self.budget, live.range.len)
        {
            live.reader.offer(pipe, range);
            live.offered = Some(range);
        }
        if live.reader.wake_is_due(pipe) {
            self.wakes.extend(live.record.room.take());
        }
    }

    /// The call of a ticket has ended: its holder is told, and counts until he has dropped it.
    pub fn detach(&mut self, number: u32) {
        let Some(Some(live)) = self.live.get_mut(number as usize) else { return };
        if live.call.take().is_none() {
            return;
        }
        live.record.pipe.cancel();
        self.wakes.extend(live.record.room.take());
        self.wakes.extend(live.record.cancelled.take());
        self.attached -= 1;
        self.detached += 1;
        self.free_if_done(number);
    }

    /// Frees the number of a detached ticket that has been dropped.
    fn free_if_done(&mut self, number: u32) {
        let Some(Some(live)) = self.live.get_mut(number as usize) else { return };
        if live.record.pipe.is_done() && Arc::get_mut(&mut live.record).is_some() {
            self.detached -= 1;
            self.release(number);
        }
    }

    fn release(&mut self, number: u32) {
        let Some(live) = self.live[number as usize].take() else { return };
        for range in [Some(live.range), live.offered].into_iter().flatten() {
            give_back(&mut self.longer, &self.budget, range);
        }
        self.budget.give(PRIVATE_PER_TICKET);
        if self.spare.len() < SPARE_MAX {
            let mut record = live.record;
            if let Some(unshared) = Arc::get_mut(&mut record) {
                // An answer or a text may be long.
                unshared.end.take();
                self.spare.push(record);
            }
        }
        self.free.push(number);
    }

    /// Wakes whoever has something to do: once what was done for him can be seen, and the clients have been looked at.
    #[inline(always)]
    pub fn wake(&mut self) {
        if !self.wakes.is_empty() {
            self.wake_all();
        }
    }

    #[cold]
    fn wake_all(&mut self) {
        for waker in self.wakes.drain(..) {
            // A waker is the embedder's; should one panic, it is his task that sleeps on.
            catch_unwind(AssertUnwindSafe(|| waker.wake())).ok();
        }
    }

    /// What the reactor sleeps on while there are tickets.
    pub fn desk(&self) -> Option<&Arc<Desk>> {
        self.desk.as_ref().filter(|_| self.attached + self.detached > 0)
    }

    /// Tickets of calls that are under way.
    pub fn attached(&self) -> u32 {
        self.attached
    }

    /// Tickets whose calls have ended and that are still held.
    pub fn detached(&self) -> u32 {
        self.detached
    }
}

impl Drop for Tickets {
    /// The reactor has ended: whoever still works for it is told.
    fn drop(&mut self) {
        for number in 0..self.live.len() as u32 {
            self.detach(number);
        }
        self.wake();
    }
}

/// The buffer that every ticket of this number has.
fn block(number: u32) -> Range {
    Range { offset: number * BLOCK, len: BLOCK }
}

fn make_desk(
    most: u32,
    longer: &mut [Vec<Range>; LONGER.len()],
    eventfd: Option<Arc<OwnedFd>>,
) -> Result<Desk> {
    let mut end = (most * BLOCK).next_multiple_of(PAGE as u32);
    for ((len, count), free) in LONGER.into_iter().zip(longer) {
        // The lowest one is taken first: memory that has been used is used again.
        *free = (0..count).rev().map(|i| Range { offset: end + i * len, len }).collect();
        end += len * count;
    }
    let map =
        MmapMut::map_anon(end as usize).map_err(|e| IpcError::io("mmap of the buffers of answers", e))?;
    let store = SharedBytes::new(&Mapping::of_file(MmapRaw::from(map)), 0, end as usize)?;
    Ok(Desk::new(store, most, eventfd))
}

/// The shortest free range above `len` bytes, if the memory budget has room for it.
fn take_longer(longer: &mut [Vec<Range>; LONGER.len()], budget: &Budget, len: u32) -> Option<Range> {
    let above = LONGER.iter().zip(longer).filter(|((each, _), free)| *each > len && !free.is_empty());
    let mut affordable = above.filter(|((each, _), _)| budget.take(1, 1, u64::from(*each)) == 1);
    affordable.next().and_then(|(_, free)| free.pop())
}

fn give_back(longer: &mut [Vec<Range>; LONGER.len()], budget: &Budget, range: Range) {
    if let Some(class) = LONGER.iter().position(|(len, _)| *len == range.len) {
        longer[class].push(range);
        budget.give(range.len.into());
    }
}

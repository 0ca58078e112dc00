//! A pipe: the bytes of an answer on their way from the worker that writes it to the reactor that sends it.
//!
//! Rule:   one writer, one reader. The writer publishes how much it has written, then puts its pipe among the ready
//!         ones ([`ReadySet`]) and looks at the reactor's bell; a reader that goes to sleep marks the bell, fences, and
//!         looks at the ready ones again (`bell.rs`). Everything that the writer has to say is said that way, so the
//!         reader fences for nobody: what was written before a pipe was ready is seen when it is taken from the set.
//! Bound:  a range of a store, a power of two long. A writer that finds it full waits, and may ask for a longer one,
//!         to which it changes while nothing lies in the old one.
//! End:    the writer's last word is [`Pipe::finish`], the reader's [`Pipe::cancel`]. Whichever comes first, it is the
//!         reader alone that ends the call, and the pipe is used again only after `finish`.
//! Trust:  private memory of one process: both sides are ours.
//!
//! No system call is made here, and nothing is allocated.

use crate::bytes::SharedBytes;
use crate::sync::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// The writer waits for room, or for the end.
const WAITS: u32 = 1;
/// The writer would rather have a longer range.
const WANTS_MORE: u32 = 2;
/// The writer writes no more.
const DONE: u32 = 4;
/// The reader takes no more.
const CANCELLED: u32 = 8;

/// Where the bytes of pipes lie.
pub trait Store {
    /// Fills `target` with what lies from `offset` on.
    fn read(&self, offset: usize, target: &mut [u8]);
    /// Puts `source` to `offset`.
    fn write(&self, offset: usize, source: &[u8]);
}

impl Store for SharedBytes {
    #[inline(always)]
    fn read(&self, offset: usize, target: &mut [u8]) {
        SharedBytes::read(self, offset, target);
    }

    #[inline(always)]
    fn write(&self, offset: usize, source: &[u8]) {
        SharedBytes::write(self, offset, source);
    }
}

/// A part of a store, `len` bytes long, which is a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u32,
    /// Its length in bytes.
    pub len: u32,
}

impl Range {
    fn pack(self) -> u64 {
        u64::from(self.offset) << 32 | u64::from(self.len)
    }

    fn unpack(word: u64) -> Self {
        Self { offset: (word >> 32) as u32, len: word as u32 }
    }

    /// Where byte `position` lies, and how many bytes follow it before the range begins again.
    #[inline(always)]
    fn place(self, position: u32) -> (usize, usize) {
        let at = position & (self.len - 1);
        ((self.offset + at) as usize, (self.len - at) as usize)
    }
}

/// What the writer alone writes.
#[repr(align(64))]
#[derive(Debug)]
struct WriterLine {
    /// Bytes written, modulo 2^32.
    written: AtomicU32,
    /// Where those lie that have not been taken.
    range: AtomicU64,
    /// What has to be taken until a writer that waits has the room that it waits for.
    wanted: AtomicU32,
}

/// What the reader writes.
#[repr(align(64))]
#[derive(Debug)]
struct ReaderLine {
    /// Bytes taken, modulo 2^32.
    taken: AtomicU32,
    /// Flags of both.
    state: AtomicU32,
    /// The range that the writer is to change to.
    offered: AtomicU64,
}

/// The words that both sides of a pipe share.
#[derive(Debug)]
pub struct Pipe {
    writer: WriterLine,
    reader: ReaderLine,
}

impl Pipe {
    /// An empty pipe with its bytes in `range`.
    pub fn new(range: Range) -> Self {
        Self {
            writer: WriterLine {
                written: AtomicU32::new(0),
                range: AtomicU64::new(range.pack()),
                wanted: AtomicU32::new(0),
            },
            reader: ReaderLine {
                taken: AtomicU32::new(0),
                state: AtomicU32::new(0),
                offered: AtomicU64::new(range.pack()),
            },
        }
    }

    /// Writer: says that it writes no more. The pipe has to be made ready afterwards.
    pub fn finish(&self) {
        // Release pairs with the Acquire in `is_done`: whoever sees the end sees all that was written.
        self.reader.state.fetch_or(DONE, Release);
    }

    /// Reader: whether the writer writes no more. To be asked before [`PipeReader::available`], not after it, by whoever
    /// concludes that nothing will come.
    #[inline(always)]
    pub fn is_done(&self) -> bool {
        // Acquire pairs with the Release in `finish`.
        self.reader.state.load(Acquire) & DONE != 0
    }

    /// Reader: says that it takes no more; whether the writer waits and has to be woken.
    pub fn cancel(&self) -> bool {
        // Release pairs with the Acquire in `PipeWriter::wait`, and Acquire with its Release: of two that are about to
        // miss each other, the later one knows. The writer's waker was there before its flag.
        self.reader.state.fetch_or(CANCELLED, AcqRel) & WAITS != 0
    }

    /// Writer: whether the reader takes no more.
    #[inline(always)]
    pub fn is_cancelled(&self) -> bool {
        // Nothing is read because of it.
        self.reader.state.load(Relaxed) & CANCELLED != 0
    }
}

/// The writing side of a pipe: what it knows of it.
#[derive(Debug)]
pub struct PipeWriter {
    range: Range,
    written: u32,
    /// What the reader had taken when this was last looked at.
    taken: u32,
}

impl PipeWriter {
    /// The writer of a new pipe in `range`.
    pub fn new(range: Range) -> Self {
        Self { range, written: 0, taken: 0 }
    }

    /// Bytes that fit now. Looks at what the reader has taken only if `wanted` bytes do not fit otherwise.
    #[inline(always)]
    pub fn room(&mut self, pipe: &Pipe, wanted: usize) -> usize {
        if (self.free() as usize) < wanted {
            // Acquire pairs with the Release in `PipeReader::publish`: what lay there has been copied.
            self.taken = pipe.reader.taken.load(Acquire);
            if self.taken == self.written {
                self.change_range(pipe);
            }
        }
        self.free() as usize
    }

    #[inline(always)]
    fn free(&self) -> u32 {
        self.range.len - self.written.wrapping_sub(self.taken)
    }

    /// The most bytes that ever fit.
    pub fn capacity(&self) -> usize {
        self.range.len as usize
    }

    /// Changes to the range that is offered. Nothing lies in the present one.
    fn change_range(&mut self, pipe: &Pipe) {
        // Acquire pairs with the Release in `PipeReader::offer`: whoever had that range before has done with it.
        self.range = Range::unpack(pipe.reader.offered.load(Acquire));
        // Published by `written`, as the bytes in it are.
        pipe.writer.range.store(self.range.pack(), Relaxed);
    }

    /// Writes as much of `parts`, one behind the other, as fits; returns how many bytes. They are published together.
    #[inline(always)]
    pub fn write(&mut self, pipe: &Pipe, store: &impl Store, parts: &[&[u8]]) -> usize {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let mut left = self.room(pipe, len).min(len);
        let now = left;
        for part in parts {
            let part = &part[..part.len().min(left)];
            let (offset, before_end) = self.range.place(self.written);
            let (first, second) = part.split_at(part.len().min(before_end));
            store.write(offset, first);
            if !second.is_empty() {
                store.write(self.range.offset as usize, second);
            }
            self.written = self.written.wrapping_add(part.len() as u32);
            left -= part.len();
        }
        // Release pairs with the Acquire in `PipeReader::available`: the bytes, and the range they lie in.
        pipe.writer.written.store(self.written, Release);
        now
    }

    /// Says that the writer waits for room for `wanted` bytes, or as many as ever fit, and in a longer range if
    /// `more`; `false` if the reader takes no more. Whoever is to be woken must be known before, and the pipe has to be
    /// made ready afterwards.
    pub fn wait(&mut self, pipe: &Pipe, wanted: usize, more: bool) -> bool {
        let len = self.range.len;
        // Relaxed: only whether it is another one.
        let offered = Range::unpack(pipe.reader.offered.load(Relaxed)) != self.range;
        // At least half of it, for whoever waits is woken at some cost; all of it to change to another range.
        let room = if offered { len } else { len.min((wanted as u32).max(len / 2)) };
        let until = self.written.wrapping_add(room).wrapping_sub(len);
        pipe.writer.wanted.store(until, Relaxed);
        let flags = if more { WAITS | WANTS_MORE } else { WAITS };
        // Release pairs with the Acquire in `PipeReader::wake_is_due`: position and waker are there with the flag.
        // Acquire pairs with the Release in `Pipe::cancel`.
        pipe.reader.state.fetch_or(flags, AcqRel) & CANCELLED == 0
    }
}

/// The reading side of a pipe: what it knows of it.
#[derive(Debug, Default)]
pub struct PipeReader {
    taken: u32,
}

impl PipeReader {
    /// Bytes that can be taken.
    #[inline(always)]
    pub fn available(&self, pipe: &Pipe) -> usize {
        // Acquire pairs with the Release in `PipeWriter::write`.
        pipe.writer.written.load(Acquire).wrapping_sub(self.taken) as usize
    }

    /// Takes the next bytes, of which there are enough ([`PipeReader::available`]); [`PipeReader::publish`] says so
    /// to the writer.
    #[inline(always)]
    pub fn take(&mut self, pipe: &Pipe, store: &impl Store, target: &mut [u8]) {
        // Relaxed: published with the bytes. The writer changes it only when all of them have been taken.
        let range = Range::unpack(pipe.writer.range.load(Relaxed));
        let (offset, before_end) = range.place(self.taken);
        let (first, second) = target.split_at_mut(target.len().min(before_end));
        store.read(offset, first);
        if !second.is_empty() {
            store.read(range.offset as usize, second);
        }
        self.taken = self.taken.wrapping_add(target.len() as u32);
    }

    /// Lets the writer have the room of what has been taken.
    #[inline(always)]
    pub fn publish(&self, pipe: &Pipe) {
        // Release pairs with the Acquire in `PipeWriter::room`: what lay there has been copied.
        pipe.reader.taken.store(self.taken, Release);
    }

    /// Whether the writer waits and has what it waits for; it is to be woken then. To be asked after
    /// [`PipeReader::publish`].
    #[inline(always)]
    pub fn wake_is_due(&self, pipe: &Pipe) -> bool {
        // Acquire pairs with the Release in `PipeWriter::wait`.
        if pipe.reader.state.load(Acquire) & WAITS == 0 {
            return false;
        }
        let missing = pipe.writer.wanted.load(Relaxed).wrapping_sub(self.taken) as i32;
        if missing > 0 {
            return false;
        }
        // Relaxed: the wake that follows says more. A writer that waits again says so, and makes its pipe ready.
        pipe.reader.state.fetch_and(!WAITS, Relaxed);
        true
    }

    /// The range that the bytes lie in if the writer wants a longer one.
    #[inline(always)]
    pub fn wants_more(&self, pipe: &Pipe) -> bool {
        pipe.reader.state.load(Relaxed) & WANTS_MORE != 0
    }

    /// Offers the writer another range.
    pub fn offer(&self, pipe: &Pipe, range: Range) {
        // Release pairs with the Acquire in `PipeWriter::change_range`: whoever had it before has done with it.
        pipe.reader.offered.store(range.pack(), Release);
        pipe.reader.state.fetch_and(!WANTS_MORE, Relaxed);
    }

    /// Whether the writer has changed to `range`, and the one before is free. To be asked after
    /// [`PipeReader::available`].
    pub fn uses(&self, pipe: &Pipe, range: Range) -> bool {
        pipe.writer.range.load(Relaxed) == range.pack()
    }
}

/// The pipes that somebody has something to say of: a summary word, then a bit for each.
#[derive(Debug)]
pub struct ReadySet {
    summary: AtomicU64,
    words: Box<[AtomicU64]>,
}

impl ReadySet {
    /// The most that a set can have.
    pub const MOST: u32 = 64 * 64;

    /// A set of pipes with the numbers below `most`.
    ///
    /// # Panics
    ///
    /// If that is more than [`ReadySet::MOST`].
    pub fn new(most: u32) -> Self {
        assert!(most <= Self::MOST, "{most} pipes are more than a set can have");
        Self {
            summary: AtomicU64::new(0),
            words: (0..most.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Writer: puts its pipe among the ready ones; whether it was none of them, and the reactor's bell has to be looked
    /// at behind a fence.
    #[inline(always)]
    pub fn set(&self, number: u32) -> bool {
        let bit = 1 << (number % 64);
        // Release pairs with the Acquire swaps in `take`: what was said of the pipe is visible with its bit, and the bit
        // with the summary. An exchange that finds the bit comes before the swap that takes it, whose Acquire sees what
        // was said by then; whoever set it has looked, or will look, at the bell.
        if self.words[number as usize / 64].fetch_or(bit, Release) & bit != 0 {
            return false;
        }
        self.summary.fetch_or(1 << (number / 64), Release);
        true
    }

    /// Reactor: whether any is ready. One relaxed load.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.summary.load(Relaxed) != 0
    }

    /// Reactor: takes all that are ready.
    pub fn take(&self, mut found: impl FnMut(u32)) {
        // Acquire pairs with the Release in `set`.
        let mut summary = self.summary.swap(0, Acquire);
        while summary != 0 {
            let index = summary.trailing_zeros();
            summary &= summary - 1;
            let word = &self.words[index as usize];
            // A model only: elsewhere a swap may take effect before the one of the summary unless that one
            // acquires; loom's never does, its plain loads do.
            #[cfg(loom)]
            if word.load(Relaxed) == 0 {
                continue;
            }
            // Acquire pairs with the Release in `set`.
            let mut bits = word.swap(0, Acquire);
            while bits != 0 {
                found(index * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
    }
}

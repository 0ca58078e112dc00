//! Private buffers that files are read into: three classes, one mapping, pages only while they are used.
//!
//! Trust:  the memory is this process's own; nobody but us and the kernel reaches it.
//! Owner:  a [`Buffer`] is a piece of the mapping that belongs to whoever holds the value. To have it read into,
//!         it is given away to the driver, and comes back with the completion: nobody can look at, free or give
//!         back memory that the kernel may still write to.
//! Bound:  as many buffers as the pool was made for. None free is a value, not an error.
//! Memory: the mapping is address space. A buffer's pages come to be when it is first used; registering makes
//!         and pins all of them. `Driver::trim` gives back what has not been used for a while.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ptr::{self, NonNull};
use std::rc::Rc;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::DriverError;

/// The size of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// 4 KiB.
    Small,
    /// 64 KiB: from here on reading into a registered buffer is measurably cheaper (8 to 16 %).
    Medium,
    /// 1 MiB.
    Large,
}

impl Class {
    /// From the smallest to the largest.
    pub const ALL: [Class; 3] = [Class::Small, Class::Medium, Class::Large];

    /// Bytes of a buffer of this class.
    pub const fn size(self) -> usize {
        match self {
            Class::Small => 4 << 10,
            Class::Medium => 64 << 10,
            Class::Large => 1 << 20,
        }
    }

    /// The smallest class whose buffers hold `len` bytes, or `None` if none does.
    pub fn holding(len: usize) -> Option<Class> {
        Class::ALL.into_iter().find(|class| len <= class.size())
    }
}

/// How many buffers of each class a pool has at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Of 4 KiB.
    pub small: u16,
    /// Of 64 KiB.
    pub medium: u16,
    /// Of 1 MiB.
    pub large: u16,
}

/// The most buffers of a pool: what a ring can register.
const BUFFERS_MAX: usize = 1 << 14;

impl Counts {
    fn of(self, class: Class) -> u16 {
        match class {
            Class::Small => self.small,
            Class::Medium => self.medium,
            Class::Large => self.large,
        }
    }

    fn buffers(self) -> usize {
        Class::ALL.into_iter().map(|class| usize::from(self.of(class))).sum()
    }

    fn bytes(self) -> usize {
        Class::ALL.into_iter().map(|class| usize::from(self.of(class)) * class.size()).sum()
    }
}

/// A pool of buffers. Clones are the same pool; its memory lives as long as any of them or any buffer.
///
/// Used by one thread, that of the driver whose reads it serves: the type is not `Send`.
#[derive(Clone)]
pub struct Staging(Rc<Pool>);

struct Pool {
    memory: Memory,
    slots: Box<[Slot]>,
    /// Numbers of the buffers that nobody holds, by class. The last one given back is the first to be taken, so
    /// that as few as possible have pages.
    free: [RefCell<Vec<u16>>; 3],
}

/// What is known of one buffer, held or not.
struct Slot {
    class: Class,
    /// Where it begins in the mapping.
    offset: usize,
    held: Cell<bool>,
    /// Has been held since the last trim.
    used: Cell<bool>,
    /// May have pages.
    made: Cell<bool>,
    /// A ring has it registered, and its pages pinned.
    registered: Cell<bool>,
}

impl Staging {
    /// A pool of at most so many buffers.
    ///
    /// Cost:   address space for all of them, no page of it; 16 bytes or so for each.
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if the kernel refuses the mapping.
    ///
    /// # Panics
    ///
    /// If there are none or more than 16 384.
    pub fn new(counts: Counts) -> Result<Self, DriverError> {
        assert!((1..=BUFFERS_MAX).contains(&counts.buffers()), "1 to {BUFFERS_MAX} buffers");
        let memory =
            Memory::new(counts.bytes()).map_err(|source| DriverError::Os { call: "mmap", source })?;
        let mut slots = Vec::with_capacity(counts.buffers());
        let mut offset = 0;
        let free = Class::ALL.map(|class| {
            let first = slots.len() as u16;
            for _ in 0..counts.of(class) {
                slots.push(Slot::new(class, offset));
                offset += class.size();
            }
            RefCell::new((first..slots.len() as u16).rev().collect())
        });
        Ok(Staging(Rc::new(Pool { memory, slots: slots.into(), free })))
    }

    /// A buffer of this class, or `None` if all of them are held. It may hold bytes of earlier uses.
    ///
    /// Cost:   some nanoseconds. Pages come to be when it is written to.
    pub fn take(&self, class: Class) -> Option<Buffer> {
        let index = self.0.free[class as usize].borrow_mut().pop()?;
        let slot = &self.0.slots[usize::from(index)];
        slot.held.set(true);
        slot.used.set(true);
        slot.made.set(true);
        Some(Buffer { pool: Rc::clone(&self.0), index, filled: 0 })
    }

    /// Buffers of this class that can be taken.
    pub fn free(&self, class: Class) -> usize {
        self.0.free[class as usize].borrow().len()
    }

    /// Bytes of buffers that may have pages: the most that the pool adds to the resident memory.
    pub fn made_bytes(&self) -> usize {
        self.bytes_where(|slot| slot.made.get())
    }

    /// Bytes of buffers that a ring has registered. They are pinned, and count against RLIMIT_MEMLOCK.
    pub fn registered_bytes(&self) -> usize {
        self.bytes_where(|slot| slot.registered.get())
    }

    fn bytes_where(&self, counts: impl Fn(&Slot) -> bool) -> usize {
        self.0.slots.iter().filter(|slot| counts(slot)).map(|slot| slot.class.size()).sum()
    }

    pub(crate) fn buffers(&self) -> u32 {
        self.0.slots.len() as u32
    }

    pub(crate) fn is(&self, other: &Staging) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Nothing is registered any more: the ring is about to go.
    pub(crate) fn forget_registrations(&self) {
        for slot in &self.0.slots {
            slot.registered.set(false);
        }
    }

    /// Gives the pages back of every free buffer that has not been held since the last call, after `unregister`
    /// has been asked about those that are registered. Returns bytes.
    ///
    /// # Errors
    ///
    /// That of `unregister`, which says `false` where the registration is not its own.
    pub(crate) fn trim<E>(&self, mut unregister: impl FnMut(u16) -> Result<bool, E>) -> Result<usize, E> {
        let mut freed = 0;
        for (index, slot) in self.0.slots.iter().enumerate() {
            if slot.held.get() || slot.used.replace(false) || !slot.made.get() {
                continue;
            }
            // Giving back pinned pages would part the buffer from what the kernel writes to.
            if slot.registered.get() {
                if !unregister(index as u16)? {
                    continue;
                }
                slot.registered.set(false);
            }
            if self.0.memory.give_back(slot.offset, slot.class.size()) {
                slot.made.set(false);
                freed += slot.class.size();
            }
        }
        Ok(freed)
    }
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = Class::ALL.map(|class| self.free(class));
        f.debug_struct("Staging").field("free", &free).field("made_bytes", &self.made_bytes()).finish()
    }
}

impl Slot {
    fn new(class: Class, offset: usize) -> Self {
        let no = || Cell::new(false);
        Slot { class, offset, held: no(), used: no(), made: no(), registered: no() }
    }
}

/// A buffer of a pool, for whoever holds it alone. Dropped, it goes back to its pool.
pub struct Buffer {
    pool: Rc<Pool>,
    index: u16,
    /// Bytes at its beginning that the last read has brought.
    filled: u32,
}

impl Buffer {
    /// Its class.
    pub fn class(&self) -> Class {
        self.slot().class
    }

    /// What the last read has brought; empty before the first one and after one that failed.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY:
        // - In bounds, alive: as `address` says; `filled` is at most the size of the class.
        // - Initialised: anonymous memory is zero until it is written.
        // - Not written meanwhile: this value is the only one of its number (`take` hands out a free number,
        //   `drop` frees it), writing needs `&mut self`, and the kernel writes only while the driver holds it.
        unsafe { std::slice::from_raw_parts(self.address(), self.filled as usize) }
    }

    /// All of it, with bytes of earlier uses: for whoever fills it without the kernel.
    pub fn whole(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.slot().class.size()) }
    }

    pub(crate) fn set_filled(&mut self, len: u32) {
        self.filled = len.min(self.slot().class.size() as u32);
    }

    /// Where it begins: that many bytes as its class has, mapped as long as the buffer lives.
    pub(crate) fn address(&self) -> *mut u8 {
        // SAFETY: `new` has mapped the slots of all counts one behind the other.
        unsafe { self.pool.memory.start.as_ptr().add(self.slot().offset) }
    }

    /// Its number in the pool, and in the table of the ring that registers it.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    pub(crate) fn pool(&self) -> Staging {
        Staging(Rc::clone(&self.pool))
    }

    pub(crate) fn is_of(&self, staging: &Staging) -> bool {
        Rc::ptr_eq(&self.pool, &staging.0)
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.slot().registered.get()
    }

    pub(crate) fn set_registered(&self) {
        self.slot().registered.set(true);
    }

    fn slot(&self) -> &Slot {
        &self.pool.slots[usize::from(self.index)]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let slot = self.slot();
        slot.held.set(false);
        self.pool.free[slot.class as usize].borrow_mut().push(self.index);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never its bytes: they are somebody's file.
        let (class, index, filled) = (self.class(), self.index, self.filled);
        write!(f, "Buffer {{ class: {class:?}, index: {index}, filled: {filled} }}")
    }
}

/// An anonymous private mapping.
struct Memory {
    start: NonNull<u8>,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Result<Self, Errno> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no memory of ours is replaced: the kernel chooses the address.
        let start =
            unsafe { mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)? };
        let memory = Memory { start: NonNull::new(start.cast()).ok_or(Errno::FAULT)?, len };
        // A forked child must not share pages that the kernel writes to; it does not inherit the ring either.
        memory.advise(Advice::LinuxDontFork)?;
        match memory.advise(Advice::LinuxNoHugepage) {
            // One touch of a small buffer would make 2 MiB resident. INVAL: a kernel without huge pages.
            Ok(()) | Err(Errno::INVAL) => Ok(memory),
            Err(errno) => Err(errno),
        }
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: our own mapping, and neither of the two changes what it holds.
        unsafe { madvise(self.start.as_ptr().cast(), self.len, advice) }
    }

    /// Gives pages back: they read as zero from then on. `false` if the kernel refuses, as it does after
    /// mlockall(2).
    fn give_back(&self, offset: usize, len: usize) -> bool {
        // SAFETY:
        // - In bounds: a slot's range, as in `address`.
        // - Nobody's: the caller has found the slot free, so that no `Buffer` and no read refers to it.
        unsafe { madvise(self.start.as_ptr().add(offset).cast(), len, Advice::LinuxDontNeed) }.is_ok()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY:
        // - Ours: `new` mapped exactly these bytes.
        // - Unused: the pool goes with the last buffer, and the driver holds the buffer of every read that the
        //   kernel has not ended, or forgets it.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staging() -> Staging {
        Staging::new(Counts { small: 3, medium: 2, large: 1 }).unwrap()
    }

    /// Pages of `buffer` that exist, by mincore(2).
    fn pages(buffer: &Buffer) -> usize {
        let mut there = vec![0u8; buffer.class().size() / 4096];
        // SAFETY: the range is mapped as long as the buffer lives, the vector has a byte for each of its pages.
        let result =
            unsafe { libc::mincore(buffer.address().cast(), buffer.class().size(), there.as_mut_ptr()) };
        assert_eq!(result, 0);
        there.iter().filter(|page| *page & 1 != 0).count()
    }

    fn never(_: u16) -> Result<bool, ()> {
        panic!("nothing is registered")
    }

    /// Goal:   R1.6: every buffer is memory of its own, of its class's size.
    /// Method: hold all at once, fill each with a number of its own, look at all.
    #[test]
    fn r1_6_buffers_do_not_overlap() {
        let staging = staging();
        let mut held = Vec::new();
        for class in Class::ALL {
            while let Some(buffer) = staging.take(class) {
                assert_eq!(buffer.class(), class);
                held.push(buffer);
            }
        }
        assert_eq!(held.len(), 6);
        for (number, buffer) in held.iter_mut().enumerate() {
            buffer.whole().fill(number as u8 + 1);
        }
        for (number, buffer) in held.iter_mut().enumerate() {
            let class = buffer.class();
            assert_eq!(buffer.whole().len(), class.size());
            assert!(buffer.whole().iter().all(|byte| *byte == number as u8 + 1), "{buffer:?}");
        }
    }

    /// Goal:   a pool that has none left says so, and has one again when one is dropped.
    #[test]
    fn r1_6_an_exhausted_class_is_a_value() {
        let staging = staging();
        let first = staging.take(Class::Medium).unwrap();
        let second = staging.take(Class::Medium).unwrap();
        assert!(staging.take(Class::Medium).is_none());
        assert_eq!(staging.free(Class::Medium), 0);
        assert!(staging.take(Class::Small).is_some(), "the other classes are not concerned");
        drop(first);
        assert!(staging.take(Class::Medium).is_some());
        drop(second);
        assert_eq!(staging.free(Class::Medium), 2);
    }

    /// Goal:   R5.3: a pool takes no memory, a buffer takes its own once it is used, and gives it back when it has
    ///         not been used between two trims.
    /// Method: ask the kernel which pages exist.
    #[test]
    fn r5_3_buffers_have_pages_only_while_they_are_used() {
        let staging = staging();
        assert_eq!(staging.made_bytes(), 0);
        let mut buffer = staging.take(Class::Large).unwrap();
        assert_eq!(pages(&buffer), 0);
        buffer.whole().fill(7);
        assert_eq!((pages(&buffer), staging.made_bytes()), (256, 1 << 20));

        assert_eq!(staging.trim(never), Ok(0));
        assert_eq!(staging.trim(never), Ok(0));
        assert!(buffer.whole().iter().all(|byte| *byte == 7), "a held buffer is left alone");
        drop(buffer);
        assert_eq!(staging.trim(never), Ok(0), "held since the last trim");
        assert_eq!(staging.trim(never), Ok(1 << 20));
        assert_eq!(staging.trim(never), Ok(0));
        assert_eq!(staging.made_bytes(), 0);

        let mut buffer = staging.take(Class::Large).unwrap();
        assert_eq!(pages(&buffer), 0);
        assert!(buffer.whole().iter().all(|byte| *byte == 0), "and nothing of the earlier use");
    }

    /// Goal:   pages that a ring has pinned are given back only after it has let go of them.
    /// Method: a registration of somebody else, then one of our own.
    #[test]
    fn registered_buffers_keep_their_pages_until_they_are_unregistered() {
        let staging = staging();
        let buffer = staging.take(Class::Small).unwrap();
        let index = buffer.index();
        buffer.set_registered();
        drop(buffer);
        assert_eq!(staging.registered_bytes(), 4096);
        assert_eq!(staging.trim(never), Ok(0));
        assert_eq!(staging.trim(|_| Ok::<_, ()>(false)), Ok(0), "another ring's");
        assert_eq!(staging.trim(|_| Err(5)), Err(5));
        assert_eq!(staging.registered_bytes(), 4096);
        let mut asked = Vec::new();
        let freed = staging.trim(|index| {
            asked.push(index);
            Ok::<_, ()>(true)
        });
        assert_eq!((freed, asked, staging.registered_bytes()), (Ok(4096), vec![index], 0));
    }

    /// Goal:   the buffer used last is used next, so that few have pages.
    #[test]
    fn as_few_buffers_as_possible_are_used() {
        let staging = staging();
        let first = staging.take(Class::Small).unwrap().index();
        for _ in 0..10 {
            assert_eq!(staging.take(Class::Small).unwrap().index(), first);
        }
        assert_eq!(staging.made_bytes(), 4096);
    }

    #[test]
    fn lengths_find_their_class() {
        for (len, class) in [
            (0, Some(Class::Small)),
            (4096, Some(Class::Small)),
            (4097, Some(Class::Medium)),
            (65536, Some(Class::Medium)),
            (65537, Some(Class::Large)),
            (1 << 20, Some(Class::Large)),
            ((1 << 20) + 1, None),
        ] {
            assert_eq!(Class::holding(len), class, "{len}");
        }
    }
}

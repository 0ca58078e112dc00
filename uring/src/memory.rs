//! Two mappings of one private memfd: the smallest model of two processes sharing a word.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Enough for a word, and what the kernel rounds up to anyway.
const LEN: usize = 4096;

/// One word at two addresses. Starts as zero.
pub(crate) struct SharedWord {
    here: Mapping,
    there: Mapping,
}

impl SharedWord {
    pub(crate) fn new() -> Result<Self, Errno> {
        let file: OwnedFd = memfd_create("doorbell-self-test", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, LEN as u64)?;
        let view = || Mapping::new(file.as_fd());
        Ok(SharedWord { here: view()?, there: view()? })
    }

    /// The word as the waiting side sees it.
    pub(crate) fn here(&self) -> &AtomicU32 {
        self.here.word()
    }

    /// The same word at the address where the other side sees it.
    pub(crate) fn there(&self) -> &AtomicU32 {
        self.there.word()
    }
}

struct Mapping(NonNull<AtomicU32>);

impl Mapping {
    fn new(file: BorrowedFd<'_>) -> Result<Self, Errno> {
        // SAFETY:
        // - No memory of ours is replaced: the kernel chooses the address.
        let address = unsafe {
            mmap(ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        NonNull::new(address.cast()).map(Mapping).ok_or(Errno::FAULT)
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY:
        // - In bounds, for ever: the file has LEN bytes, and its descriptor was never handed out, so
        //   nobody can shrink it.
        // - Aligned: mmap returns a page boundary.
        // - Valid for any bytes: an integer, and accessed as an atomic only, in both mappings.
        // - Alive: the borrow of `self` keeps it from being unmapped.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY:
        // - Ours: `new` mapped exactly these bytes, and nothing else unmaps them.
        // - Unused: no borrow of the word outlives `self`.
        let unmapped = unsafe { munmap(self.0.as_ptr().cast(), LEN) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
    }
}

//! The atomics of this crate: the processor's, loom's under `cfg(loom)`, or hooked ones under
//! `cfg(fuzzing)`, which let a fuzzer change memory between any two loads.

#[cfg(not(any(loom, fuzzing)))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(fuzzing)]
pub(crate) use crate::hooked::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

#[cfg(not(loom))]
use Ordering::Relaxed;
use Ordering::{Acquire, Release};

/// One 64-bit word of a ring entry: word 0 is the sequence, the others are published by it.
///
/// Outside loom it is one atomic, since a hostile peer may write any of them at any time. Under loom the
/// published part is a race-checked cell of its own, so that a model fails as soon as an *honest* pair
/// touches it without the ordering that the sequence provides.
#[cfg_attr(not(loom), repr(transparent))]
#[derive(Debug)]
pub struct Word {
    atomic: AtomicU64,
    #[cfg(loom)]
    published: loom::cell::UnsafeCell<u64>,
}

impl Word {
    /// A zero word.
    pub fn new() -> Self {
        Self {
            atomic: AtomicU64::new(0),
            #[cfg(loom)]
            published: loom::cell::UnsafeCell::new(0),
        }
    }

    /// Reads a published word once.
    #[cfg(not(loom))]
    #[inline(always)]
    pub fn get(&self) -> u64 {
        self.atomic.load(Relaxed)
    }

    /// Writes a word that a sequence will publish.
    #[cfg(not(loom))]
    #[inline(always)]
    pub fn set(&self, value: u64) {
        self.atomic.store(value, Relaxed);
    }

    /// Reads a sequence. Pairs with [`Word::publish`]: the words it publishes are whole.
    #[inline(always)]
    pub fn sequence(&self) -> u64 {
        self.atomic.load(Acquire)
    }

    /// Writes a sequence. Pairs with [`Word::sequence`].
    #[inline(always)]
    pub fn publish(&self, value: u64) {
        self.atomic.store(value, Release);
    }
}

#[cfg(loom)]
#[allow(unsafe_code)]
impl Word {
    /// Reads a published word once.
    pub fn get(&self) -> u64 {
        // SAFETY: loom reports any write that is not ordered before or after this read.
        self.published.with(|p| unsafe { *p })
    }

    /// Writes a word that a sequence will publish.
    pub fn set(&self, value: u64) {
        // SAFETY: loom reports any access that is not ordered before or after this write.
        self.published.with_mut(|p| unsafe { *p = value });
    }
}

//! Whether a process still is the one in which something was made, or a fork of it (F9).
//!
//! Rule:   a page of its own holds the number of the process's generation; a fork finds it zeroed (MADV_WIPEONFORK), and
//!         whoever connects there counts on. The counter is ordinary memory, which a fork inherits: no generation has the
//!         number of one before it.
//! Source: madvise(2). Nothing is asked of the kernel but once in each process.

use crate::error::SegmentError;
use crate::map::{Mapping, Shared};
use crate::sync::{AtomicU64, Ordering::Relaxed};
use std::sync::OnceLock;

/// Of the last generation that this process, or one that it is a fork of, has begun.
static LAST: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
static PAGE_OF_THIS_PROCESS: OnceLock<Shared<AtomicU64>> = OnceLock::new();

/// The process in which it was taken note of.
#[derive(Debug, Clone)]
pub struct Birthplace {
    generation: u64,
    present: Shared<AtomicU64>,
}

impl Birthplace {
    /// This process.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] if the kernel has no page.
    pub fn here() -> Result<Self, SegmentError> {
        let present = match PAGE_OF_THIS_PROCESS.get() {
            Some(page) => page.clone(),
            None => {
                let page = Mapping::wiped_by_forks()?.object(0)?;
                PAGE_OF_THIS_PROCESS.get_or_init(|| page).clone()
            }
        };
        if present.load(Relaxed) == 0 {
            let next = LAST.fetch_add(1, Relaxed) + 1;
            // Another thread may have been first: its number is as good.
            present.compare_exchange(0, next, Relaxed, Relaxed).ok();
        }
        Ok(Self { generation: present.load(Relaxed), present })
    }

    /// Whether this is that process.
    #[inline(always)]
    pub fn is_here(&self) -> bool {
        self.present.load(Relaxed) == self.generation
    }
}

#![allow(unsafe_code)]
//! From a mapping to typed references: the first of the three files with `unsafe`.
//!
//! A [`Mapping`] is a range of memory that another process may write, or a stand-in for one on the heap.
//! [`Mapping::slice`] and [`Mapping::object`] check bounds and alignment once and hand out [`Shared`]
//! views that keep the mapping alive. A view dereferences to atomics only, never to plain bytes.

use crate::error::SegmentError;
use crate::fork::Birthplace;
#[cfg(not(loom))]
use crate::sync::{AtomicU32, AtomicU64};
use memmap2::{Advice, MmapOptions, MmapRaw};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// The size of a page, bytes. Segments are laid out in pages of this size whatever the kernel uses.
pub const PAGE: usize = 4096;

/// Memory that two sides share, kept mapped for as long as any view of it lives.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// Goes before the memory does.
    guard: Option<crate::bus::Guard>,
    /// A fork of this process has nothing here.
    birthplace: Option<Birthplace>,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    /// Unmapped on drop. Never a slice: `MmapRaw` promises nothing about the bytes.
    File(MmapRaw),
    /// Nobody's any more.
    Gone,
    Heap(Layout),
}

// SAFETY:
// - `base` points to memory that this value owns and that does not move with it.
// - Every access goes through atomics or the raw copies of `bytes.rs`, which are valid from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; `&Mapping` allows nothing but creating views.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Takes over a mapped file.
    pub fn of_file(map: MmapRaw) -> Arc<Self> {
        let base = NonNull::new(map.as_mut_ptr()).expect("mmap never returns null");
        Arc::new(Self { base, len: map.len(), guard: None, birthplace: None, backing: Backing::File(map) })
    }

    /// The same, of a file that forks of this process do not get: what they may have mapped in its place is not unmapped
    /// there.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] naming the call that the kernel refuses.
    pub fn not_inherited(map: MmapRaw) -> Result<Arc<Self>, SegmentError> {
        let (base, len) = (NonNull::new(map.as_mut_ptr()).expect("mmap never returns null"), map.len());
        let birthplace = Some(Birthplace::here()?);
        map.advise(Advice::DontFork).map_err(|e| SegmentError::os("madvise(MADV_DONTFORK)", len, e))?;
        Ok(Arc::new(Self { base, len, guard: None, birthplace, backing: Backing::File(map) }))
    }

    /// A page of zeros, private to this process, which each of its forks finds zeroed again.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] naming the call that the kernel refuses.
    pub(crate) fn wiped_by_forks() -> Result<Arc<Self>, SegmentError> {
        let page = MmapOptions::new().len(PAGE).map_anon().map_err(|e| SegmentError::os("mmap", PAGE, e))?;
        let page = Self::of_file(MmapRaw::from(page));
        // SAFETY: the range is this value's own. The bytes change in processes that are yet to come, and nobody else has a
        // view of them.
        unsafe { rustix::mm::madvise(page.base.as_ptr().cast(), PAGE, rustix::mm::Advice::LinuxWipeOnFork) }
            .map_err(|e| SegmentError::os("madvise(MADV_WIPEONFORK)", PAGE, e))?;
        Ok(page)
    }

    /// Whether this process is a fork of the one that it was mapped in: then there is no memory behind it.
    #[inline(always)]
    pub fn was_left_behind(&self) -> bool {
        self.birthplace.as_ref().is_some_and(|birthplace| !birthplace.is_here())
    }

    /// The same, and faults in it that the kernel cannot resolve are taken care of, if [`bus::install`](crate::bus::install)
    /// has been called.
    pub fn guarded(map: MmapRaw) -> Arc<Self> {
        let base = NonNull::new(map.as_mut_ptr()).expect("mmap never returns null");
        let guard = crate::bus::Guard::of(base.as_ptr().addr(), map.len());
        Arc::new(Self { base, len: map.len(), guard, birthplace: None, backing: Backing::File(map) })
    }

    /// Whether memory of it has been lost and was replaced by zeros.
    pub fn has_failed(&self) -> bool {
        self.guard.as_ref().is_some_and(crate::bus::Guard::has_failed)
    }

    /// Zeroed, page-aligned heap memory of `len` bytes: for tests, models and simulations.
    ///
    /// # Panics
    ///
    /// If `len` is 0 or not a multiple of [`PAGE`].
    pub fn on_heap(len: usize) -> Arc<Self> {
        assert!(len > 0 && len.is_multiple_of(PAGE), "a mapping is whole pages, not {len} bytes");
        let layout = Layout::from_size_align(len, PAGE).expect("a page multiple fits a layout");
        // SAFETY: the layout has a size above 0.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Arc::new(Self { base, len, guard: None, birthplace: None, backing: Backing::Heap(layout) })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `count` values of `T` from byte `offset` on.
    ///
    /// # Errors
    ///
    /// [`SegmentError::OutOfBounds`] if they do not lie inside the mapping or are not aligned.
    pub fn slice<T: Shareable>(
        self: &Arc<Self>,
        offset: usize,
        count: usize,
    ) -> Result<Shared<[T]>, SegmentError> {
        let start = self.check::<T>(offset, count)?;
        Ok(Shared { view: NonNull::slice_from_raw_parts(start.cast(), count), _alive: Arc::clone(self) })
    }

    /// One `T` at byte `offset`.
    ///
    /// # Errors
    ///
    /// [`SegmentError::OutOfBounds`] if it does not lie inside the mapping or is not aligned.
    pub fn object<T: Shareable>(self: &Arc<Self>, offset: usize) -> Result<Shared<T>, SegmentError> {
        let start = self.check::<T>(offset, 1)?;
        Ok(Shared { view: start.cast(), _alive: Arc::clone(self) })
    }

    fn check<T>(&self, offset: usize, count: usize) -> Result<NonNull<u8>, SegmentError> {
        let bytes = count.checked_mul(size_of::<T>());
        let end = bytes.and_then(|b| offset.checked_add(b));
        if end.is_none_or(|e| e > self.len) || !offset.is_multiple_of(align_of::<T>()) {
            let len = bytes.unwrap_or(usize::MAX);
            return Err(SegmentError::OutOfBounds { offset, len, mapped: self.len });
        }
        // SAFETY: `offset <= len`, so the result lies inside or one past the same allocation.
        Ok(unsafe { self.base.add(offset) })
    }

    /// A raw range for `bytes.rs`, checked.
    pub(crate) fn raw(&self, offset: usize, len: usize) -> Result<NonNull<u8>, SegmentError> {
        self.check::<u8>(offset, len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.backing, Backing::Gone) {
            Backing::File(map) if self.was_left_behind() => std::mem::forget(map),
            // SAFETY: `on_heap` allocated `base` with exactly this layout, and views hold the Arc.
            Backing::Heap(layout) => unsafe { dealloc(self.base.as_ptr(), layout) },
            Backing::File(_) | Backing::Gone => {}
        }
    }
}

/// Types that may lie in memory which another process writes.
///
/// # Safety
///
/// The type consists of atomics only (arrays of them, `repr(C)` structs of them): every bit pattern is
/// valid, there is no padding that matters and no reference to it promises stability of its bytes.
pub unsafe trait Shareable {}

#[cfg(not(loom))]
// SAFETY: an atomic.
unsafe impl Shareable for AtomicU32 {}
#[cfg(not(loom))]
// SAFETY: an atomic.
unsafe impl Shareable for AtomicU64 {}
#[cfg(not(loom))]
// SAFETY: `Entry` is `repr(C)` and made of `AtomicU64` and `Word`, which is a transparent `AtomicU64`.
unsafe impl<const W: usize> Shareable for crate::ring::Entry<W> {}
#[cfg(loom)]
// SAFETY: only to let the crate compile under loom; models build their own storage and never map any.
unsafe impl<T> Shareable for T {}

/// A typed view of shared memory that keeps its mapping alive.
#[derive(Debug)]
pub struct Shared<T: ?Sized> {
    view: NonNull<T>,
    _alive: Arc<Mapping>,
}

impl<T: ?Sized> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self { view: self.view, _alive: Arc::clone(&self._alive) }
    }
}

// SAFETY:
// - The view is a `Shareable`, that is atomics, which are Sync.
// - The mapping outlives it wherever it goes.
unsafe impl<T: ?Sized> Send for Shared<T> {}
// SAFETY: as for `Send`.
unsafe impl<T: ?Sized> Sync for Shared<T> {}

impl<T: ?Sized> Deref for Shared<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY:
        // - In bounds and aligned: `Mapping::check` refused anything else, and views never change.
        // - For ever: a segment is sealed against shrinking before it is mapped (`segment.rs`), heap
        //   memory lives as long as the Arc.
        // - Valid for any bytes and under foreign writes: only `Shareable` types, atomics, get here.
        // - Alive: `_alive` keeps the mapping.
        unsafe { self.view.as_ref() }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_view_outside_or_askew_is_refused() {
        let map = Mapping::on_heap(PAGE);
        assert!(map.slice::<AtomicU64>(0, PAGE / 8).is_ok());
        for (offset, count) in [(8, PAGE / 8), (4, 1), (PAGE, 1), (usize::MAX - 7, 1), (0, usize::MAX)] {
            assert!(
                matches!(map.slice::<AtomicU64>(offset, count), Err(SegmentError::OutOfBounds { .. })),
                "{offset}+{count}"
            );
        }
        assert!(map.object::<AtomicU32>(PAGE - 4).is_ok());
    }

    #[test]
    fn a_view_keeps_its_mapping_alive() {
        let view = Mapping::on_heap(PAGE).object::<AtomicU64>(64).unwrap();
        view.store(7, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(view.load(std::sync::atomic::Ordering::Relaxed), 7);
    }
}

#![allow(unsafe_code)]
//! Payload copies: the second of the three files with `unsafe`.
//!
//! The bytes of a slot may change while they are read. So nobody ever gets a reference to them: they are
//! copied, once, into private memory (or out of it), and everything looks at the private copy.
//! `ptr::copy_nonoverlapping` is used rather than atomic words: 1 KiB costs 10 ns instead of 23.

use crate::error::SegmentError;
use crate::layout::LINE;
use crate::map::Mapping;
use std::ptr::NonNull;
use std::sync::Arc;

/// Longest range that [`SharedBytes::prefetch`] asks for, bytes: the processor's own prefetcher goes on.
pub const PREFETCH_MAX: usize = 256;

/// A range of shared memory that can be copied from and to, but not referenced.
#[derive(Debug, Clone)]
pub struct SharedBytes {
    base: NonNull<u8>,
    len: usize,
    _alive: Arc<Mapping>,
}

// SAFETY: the range is only ever accessed by the raw copies below; the mapping outlives it.
unsafe impl Send for SharedBytes {}
// SAFETY: as for `Send`: a racing copy yields unspecified bytes of initialised memory, which the trust
// model allows for anyway.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// `len` bytes of `map` from `offset` on.
    ///
    /// # Errors
    ///
    /// [`SegmentError::OutOfBounds`] if they do not lie inside the mapping.
    pub fn new(map: &Arc<Mapping>, offset: usize, len: usize) -> Result<Self, SegmentError> {
        Ok(Self { base: map.raw(offset, len)?, len, _alive: Arc::clone(map) })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `target` from byte `offset` on.
    ///
    /// Cost: one pass. No allocation, no system call.
    ///
    /// # Panics
    ///
    /// If `offset + target.len()` leaves the range: callers validate lengths before they copy.
    #[inline(always)]
    pub fn read(&self, offset: usize, target: &mut [u8]) {
        self.check(offset, target.len());
        // SAFETY:
        // - In bounds: just checked against the length that `Mapping::raw` checked.
        // - Not overlapping: `target` is a private `&mut`, the mapping is reachable through copies only.
        // - Foreign writes during the copy leave `target` with unspecified but initialised bytes.
        unsafe { copy(self.base.as_ptr().add(offset), target.as_mut_ptr(), target.len()) }
    }

    /// Copies `source` to byte `offset`.
    ///
    /// # Panics
    ///
    /// If `offset + source.len()` leaves the range.
    #[inline(always)]
    pub fn write(&self, offset: usize, source: &[u8]) {
        self.check(offset, source.len());
        // SAFETY: as in `read`; nothing ever holds a reference into the range.
        unsafe { copy(source.as_ptr(), self.base.as_ptr().add(offset), source.len()) }
    }

    /// As [`SharedBytes::read`], by the C library's copy whatever the length: what a floor is measured with.
    ///
    /// # Panics
    ///
    /// If `offset + target.len()` leaves the range.
    #[inline(always)]
    pub fn read_by_memcpy(&self, offset: usize, target: &mut [u8]) {
        self.check(offset, target.len());
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), target.as_mut_ptr(), target.len())
        }
    }

    /// As [`SharedBytes::write`], by the C library's copy whatever the length.
    ///
    /// # Panics
    ///
    /// If `offset + source.len()` leaves the range.
    #[inline(always)]
    pub fn write_by_memcpy(&self, offset: usize, source: &[u8]) {
        self.check(offset, source.len());
        // SAFETY: as in `read`; nothing ever holds a reference into the range.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), self.base.as_ptr().add(offset), source.len())
        }
    }

    /// Asks for the cache lines of a range that will be read and then written, at most [`PREFETCH_MAX`]
    /// bytes of it; a range that leaves this one is ignored. Owning a line at once saves the second
    /// transfer that writing it after reading would cost.
    #[inline(always)]
    pub fn prefetch(&self, offset: usize, len: usize) {
        if offset < self.len {
            let end = offset + len.min(self.len - offset).clamp(1, PREFETCH_MAX);
            for line in (offset..end).step_by(LINE) {
                // SAFETY: `line < self.len`, so the address lies inside the mapping.
                prefetch_for_write(unsafe { self.base.as_ptr().add(line) });
            }
        }
    }

    #[inline(always)]
    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} leave a range of {} bytes",
            self.len
        );
    }
}

/// Copies `len` bytes: half a cache line to a whole one, which most small messages are, without a call.
///
/// # Safety
///
/// As for [`std::ptr::copy_nonoverlapping`].
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if (LINE / 2..=LINE).contains(&len) {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_storeu_si128};
        // The second half overlaps the first where the range is shorter than a line.
        let places = [0, 16, len - 32, len - 16];
        // SAFETY:
        // - The caller's promise for the whole range; each of the four 16-byte places lies inside it.
        // - Unaligned loads and stores; all loads come before the stores, so overlapping places agree.
        unsafe {
            let loaded = places.map(|place| _mm_loadu_si128(from.add(place).cast()));
            for (place, value) in places.into_iter().zip(loaded) {
                _mm_storeu_si128(to.add(place).cast(), value);
            }
        }
        return;
    }
    // SAFETY: the caller's promise, passed on.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

/// Asks for the cache line of `address`, to be owned. Changes nothing but the time of later accesses.
#[inline(always)]
pub(crate) fn prefetch_for_write<T>(address: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch never faults and reads or writes nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// Asks for the cache line of `address`, to be shared. Changes nothing but the time of later accesses.
#[inline(always)]
pub(crate) fn prefetch_for_read<T>(address: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch never faults and reads or writes nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::PAGE;

    #[test]
    fn what_is_written_is_read_back_and_nothing_else_is_touched() {
        let map = Mapping::on_heap(PAGE);
        let bytes = SharedBytes::new(&map, 100, 50).unwrap();
        assert_eq!((bytes.len(), bytes.is_empty()), (50, false));
        bytes.write(10, b"doorbell");
        let mut all = [9u8; 50];
        bytes.read(0, &mut all);
        assert_eq!(&all[10..18], b"doorbell");
        assert!(all[..10].iter().chain(&all[18..]).all(|b| *b == 0));
    }

    #[test]
    fn a_prefetch_of_any_range_changes_nothing() {
        let map = Mapping::on_heap(PAGE);
        let bytes = SharedBytes::new(&map, 64, 100).unwrap();
        for (offset, len) in [(0, 0), (0, 100), (99, 1), (50, usize::MAX), (100, 1), (usize::MAX, usize::MAX)]
        {
            bytes.prefetch(offset, len);
        }
        let mut all = [9u8; 100];
        bytes.read(0, &mut all);
        assert_eq!(all, [0; 100]);
    }

    #[test]
    fn a_copy_that_leaves_the_range_panics_before_it_touches_anything() {
        let map = Mapping::on_heap(PAGE);
        let bytes = SharedBytes::new(&map, 0, 16).unwrap();
        for (offset, len) in [(0, 17), (16, 1), (usize::MAX, 1), (9, 8)] {
            let r = std::panic::catch_unwind(|| bytes.write(offset, &vec![1; len]));
            assert!(r.is_err(), "{offset}+{len}");
        }
        assert!(SharedBytes::new(&map, PAGE - 8, 9).is_err());
    }
}

//! Private staging: where a request is copied before anything looks at it.

use doorbell_shm::layout::{SLOT_LARGE, SLOT_MEDIUM};

/// A reactor's private buffers, made once. The client cannot reach them, so what a handler reads does not
/// change while it reads (F15), and there is no time of check to differ from the time of use.
#[derive(Debug)]
pub struct BufferPool {
    /// Requests up to a page; kept apart so that small calls stay in the same cache lines.
    small: Box<Aligned<SLOT_MEDIUM>>,
    /// Longer requests; made when first needed.
    large: Option<Box<Aligned<SLOT_LARGE>>>,
}

/// Bytes that begin on a cache line, as slots do: a copy that straddles lines on one side only costs a
/// tenth of a call.
#[derive(Debug)]
#[repr(align(64))]
struct Aligned<const N: usize>([u8; N]);

impl BufferPool {
    /// The small buffer only.
    pub fn new() -> Self {
        Self { small: Box::new(Aligned([0; SLOT_MEDIUM])), large: None }
    }

    /// A private buffer of `len` bytes, with bytes of earlier requests in it: the caller fills all of it.
    ///
    /// # Panics
    ///
    /// If `len` exceeds [`SLOT_LARGE`]; lengths are checked against their slot before.
    #[inline(always)]
    pub fn take(&mut self, len: usize) -> &mut [u8] {
        if len <= SLOT_MEDIUM { &mut self.small.0[..len] } else { self.take_large(len) }
    }

    #[cold]
    fn take_large(&mut self, len: usize) -> &mut [u8] {
        &mut self.large.get_or_insert_with(|| Box::new(Aligned([0; SLOT_LARGE]))).0[..len]
    }
}

impl Default for BufferPool {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_every_length_up_to_the_largest_slot() {
        let mut pool = BufferPool::new();
        for len in [0, 1, SLOT_MEDIUM, SLOT_MEDIUM + 1, SLOT_LARGE] {
            assert_eq!(pool.take(len).len(), len);
        }
    }
}

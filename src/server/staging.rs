//! Private staging: where a request is copied before anything looks at it, and what files are read into.

use crate::config::{STAGING_LARGE, STAGING_MEDIUM, ServerConfig};
use crate::machine::Driver;
use doorbell_shm::layout::{SLOT_LARGE, SLOT_MEDIUM};
use doorbell_uring::{Buffer, Class, Counts, DriverError, Staging};

/// A reactor's private buffers. The client cannot reach them, so what a handler reads does not change while it
/// reads (F15), and there is no time of check to differ from the time of use.
///
/// Two kinds: scratch buffers for the request that is being run ([`BufferPool::take`]), made once and never
/// registered; and buffers that somebody holds for longer ([`BufferPool::buffer`]), in classes of 4 KiB, 64 KiB and
/// 1 MiB, which have memory only while they are used and are registered with the ring that reads into them (R1.6).
#[derive(Debug)]
pub struct BufferPool {
    /// Requests up to a page; kept apart so that small calls stay in the same cache lines.
    small: Box<Aligned<SLOT_MEDIUM>>,
    /// Longer requests; made when first needed.
    large: Option<Box<Aligned<SLOT_LARGE>>>,
    /// The classes; made when first needed.
    staging: Option<Staging>,
    counts: Counts,
}

/// Bytes that begin on a cache line, as slots do: a copy that straddles lines on one side only costs a
/// tenth of a call.
#[derive(Debug)]
#[repr(align(64))]
struct Aligned<const N: usize>([u8; N]);

impl BufferPool {
    /// The small scratch buffer, and as many buffers of each class as a server has unless configured.
    pub fn new() -> Self {
        Self::sized(ServerConfig::default().buffer_pool_size as u16)
    }

    /// The same with so many buffers of 4 KiB, `buffer_pool_size` in the configuration: 1 to 10 000.
    pub fn sized(small: u16) -> Self {
        Self {
            small: Box::new(Aligned([0; SLOT_MEDIUM])),
            large: None,
            staging: None,
            counts: Counts { small, medium: STAGING_MEDIUM, large: STAGING_LARGE },
        }
    }

    /// A private scratch buffer of `len` bytes, with bytes of earlier requests in it: the caller fills all of it.
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

    /// A buffer of this class, to be held until it is dropped; `None` while all of them are held. It may have
    /// bytes of earlier uses in it.
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if the kernel refuses the address space, which only the first call asks for.
    pub fn buffer(&mut self, class: Class) -> Result<Option<Buffer>, DriverError> {
        let staging = match &mut self.staging {
            Some(staging) => staging,
            none => none.insert(Staging::new(self.counts)?),
        };
        Ok(staging.take(class))
    }

    /// Gives the memory back of buffers that were not held since the last call; returns bytes. `driver` is that
    /// of the reactor, which may have registered them. To be called about once a second: buffers in use stay
    /// registered, the rest goes.
    ///
    /// # Errors
    ///
    /// [`DriverError::Os`] if the kernel does not let go of a buffer.
    pub fn trim(&self, driver: &mut Driver) -> Result<usize, DriverError> {
        self.staging.as_ref().map_or(Ok(0), |staging| driver.trim(staging))
    }

    /// The most that buffers of the classes add to the resident memory now, bytes.
    pub fn staged_bytes(&self) -> usize {
        self.staging.as_ref().map_or(0, Staging::made_bytes)
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

    /// Goal:   R1.6, R4.1: three classes, of 4 KiB as many as configured, made when first needed; scratch buffers
    ///         are no part of them.
    /// Method: take all of each class; count; drop, trim twice.
    #[test]
    fn r1_6_r4_1_buffers_of_each_class_are_made_when_needed() {
        let mut driver = Driver::epoll(doorbell_uring::Token(1)).unwrap();
        let mut pool = BufferPool::sized(7);
        assert_eq!((pool.take(SLOT_LARGE).len(), pool.staged_bytes()), (SLOT_LARGE, 0));
        assert_eq!(pool.trim(&mut driver), Ok(0));
        let mut held = Vec::new();
        for (class, count) in [(Class::Small, 7), (Class::Medium, 4), (Class::Large, 2)] {
            let before = held.len();
            while let Some(buffer) = pool.buffer(class).unwrap() {
                held.push(buffer);
            }
            assert_eq!(held.len() - before, count, "{class:?}");
        }
        let all = 7 * 4096 + 4 * 65536 + (2 << 20);
        assert_eq!(pool.staged_bytes(), all);
        held.clear();
        assert_eq!((pool.trim(&mut driver), pool.trim(&mut driver)), (Ok(0), Ok(all)));
        assert_eq!(BufferPool::new().counts.small, 100);
    }
}

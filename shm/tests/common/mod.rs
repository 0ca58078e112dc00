//! Rings on the heap, with a second view through which a hostile peer scribbles.
#![allow(dead_code, reason = "each test file uses a part")]

use doorbell_shm::layout::Geometry;
use doorbell_shm::map::{Mapping, PAGE, Shared};
use doorbell_shm::ring::{Consumer, Entry, Producer};
use proptest::prelude::ProptestConfig;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A slot of each larger class and four small ones: six pages.
pub const MIXED: Geometry = Geometry { ring_order: 4, large: 1, medium: 1, small: 4, lease_pages: 0 };

pub type Tx<const W: usize> = Producer<Shared<[Entry<W>]>, Shared<AtomicU32>, W>;
pub type Rx<const W: usize> = Consumer<Shared<[Entry<W>]>, Shared<AtomicU32>, W>;

/// A ring of `1 << order` entries, both ends of it, and what lies in memory.
pub struct Ring<const W: usize> {
    pub tx: Tx<W>,
    pub rx: Rx<W>,
    /// Every word of every entry, as the peer can write it.
    pub words: Shared<[AtomicU64]>,
    /// The consumer's published position, likewise.
    pub position: Shared<AtomicU32>,
    pub len: u64,
    /// The whole mapping: a page with the position, then the entries, then an unused page.
    pub map: Arc<Mapping>,
}

impl<const W: usize> Ring<W> {
    pub fn new(order: u32) -> Self {
        Self::starting_at(order, 0)
    }

    /// Both ends have already done `at` entries.
    pub fn starting_at(order: u32, at: u64) -> Self {
        let n = 1usize << order;
        let map = Mapping::on_heap(2 * PAGE + (n * W * 8).next_multiple_of(PAGE));
        let entries = || map.slice(PAGE, n).unwrap();
        let position = || map.object(64).unwrap();
        let (tx, rx) = if at == 0 {
            (Producer::new(entries(), position()), Consumer::new(entries(), position()))
        } else {
            (
                Producer::starting_at(entries(), position(), at),
                Consumer::starting_at(entries(), position(), at),
            )
        };
        Self { tx, rx, words: map.slice(PAGE, n * W).unwrap(), position: position(), len: n as u64, map }
    }

    /// Word `word` of the entry at `position`.
    pub fn word(&self, position: u64, word: usize) -> &AtomicU64 {
        &self.words[(position % self.len) as usize * W + word]
    }
}

/// Steps of a property: short under Miri.
pub const fn steps(usual: usize) -> usize {
    if cfg!(miri) { usual / 8 } else { usual }
}

/// Few cases under Miri, which is some thousand times slower.
pub fn config(cases: u32) -> ProptestConfig {
    let cases = if cfg!(miri) { 2 } else { cases };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

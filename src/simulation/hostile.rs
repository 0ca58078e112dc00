//! A client that breaks every rule that it can: entries that are wrong or nearly right, and bytes written anywhere in its
//! segment at any time.

use super::world::World;
use crate::protocol::rendezvous;
use doorbell_shm::entry::{Submission, flag, kind};
use doorbell_shm::lane::ClientLane;
use doorbell_shm::layout::{LaneLayout, state};
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::ClientWord;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// The client.
pub struct Hostile {
    segment: Segment,
    lane: ClientLane,
    socket: OwnedFd,
    generations: Vec<u32>,
    /// Keeps to what an honest client could do, but for what it writes.
    careful: bool,
    connection: u32,
}

impl Hostile {
    pub fn new(segment: Segment, socket: OwnedFd, careful: bool) -> Option<Self> {
        let geometry = *segment.geometry();
        let lane = ClientLane::open(segment.mapping(), &geometry, &LaneLayout::home(&geometry)).ok()?;
        let generations = vec![0; lane.slots.numbers() as usize];
        Some(Self { segment, lane, socket, generations, careful, connection: 0 })
    }

    /// One thing that it does; whether its session goes on, as far as it can be seen.
    pub fn step(&mut self, world: &World) -> bool {
        match world.below(8) {
            0 if !self.careful => self.scribble(world),
            0..=3 => self.push(world),
            4 => self.word(world),
            5 => self.take(),
            6 => self.lie_about_bells(world),
            _ if world.one_in(50) => {
                let junk = world.word().to_le_bytes();
                // A full or closed socket is as good.
                rendezvous::send(self.socket.as_fd(), &junk[..world.below(9)], None).ok();
            }
            _ => {}
        }
        self.segment.state().0 != state::CLOSED
    }

    fn scribble(&self, world: &World) {
        let Ok(words) = self.segment.mapping().slice::<AtomicU64>(0, self.segment.len() / 8) else { return };
        for _ in 0..=world.below(8) {
            let word = match world.below(3) {
                0 => world.word(),
                1 => world.below(40) as u64,
                _ => u64::MAX,
            };
            // Heads and rings more often than payload.
            let most = if world.one_in(3) { words.len() } else { words.len().min(1024) };
            words[world.below(most)].store(word, Relaxed);
        }
    }

    fn take(&mut self) {
        for ring in [0, 1] {
            while let Ok(Some(words)) = self.lane.completions[ring].pop() {
                self.lane.completions[ring].publish();
                if words[3] as u32 != 0 {
                    self.connection = words[3] as u32;
                }
            }
        }
    }

    fn word(&self, world: &World) {
        let slot = world.below(self.generations.len());
        let word = ClientWord {
            generation: self.generations[slot],
            cancelled: world.one_in(3),
            released: world.below(4) as u32,
        };
        self.lane.common.client_words[slot].store(word.pack(), Relaxed);
        self.lane.common.hints.set(slot as u32);
    }

    fn lie_about_bells(&self, world: &World) {
        let bell =
            if world.one_in(2) { &self.lane.common.server_bell.0 } else { &self.lane.common.client_bell.0 };
        bell.store(world.below(4) as u32, Relaxed);
        crate::machine::futex_wake(&self.lane.common.server_bell.0, 1).ok();
    }

    fn push(&mut self, world: &World) {
        let slot = world.below(self.generations.len()) as u32;
        self.generations[slot as usize] = self.generations[slot as usize].wrapping_add(1);
        let mut entry = Submission {
            kind: world.of(&[
                kind::CALL,
                kind::CALL,
                kind::FRAME,
                kind::OPEN,
                kind::CLOSE,
                kind::LEASE,
                kind::RETURN,
            ]),
            flags: world.of(&[flag::END, flag::END, flag::MORE, flag::END | flag::LEASED, 0]),
            message_type: 255 + world.below(8) as u32,
            connection: self.connection,
            slot,
            generation: self.generations[slot as usize],
            len: world.of(&[0, 8, 24, 100, 1024]),
            response_count: 1,
            response_slot: slot,
            ..Submission::default()
        };
        match entry.kind {
            kind::OPEN | kind::CLOSE => {
                (entry.flags, entry.len, entry.response_count, entry.response_slot) = (0, 0, 0, 0);
                entry.message_type = 0;
                entry.connection = if entry.kind == kind::OPEN { 0 } else { self.connection };
            }
            kind::LEASE => {
                entry = Submission {
                    kind: kind::LEASE,
                    slot,
                    generation: entry.generation,
                    len: world.of(&[4096, 16384]),
                    response_count: 1 + world.below(6) as u16,
                    ..Submission::default()
                };
            }
            kind::CALL => {
                entry.body_len = if entry.flags & flag::MORE != 0 { 3000 } else { entry.len.into() };
            }
            _ => {}
        }
        let mut words = entry.pack();
        if !self.careful && world.one_in(4) {
            words[1 + world.below(7)] ^= 1 << world.below(64);
        }
        // A full ring is a full ring.
        self.lane.submissions[world.below(2)].push(words).ok();
    }
}

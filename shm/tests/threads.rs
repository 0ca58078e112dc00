//! The two ends on two threads, with the processor's (or Miri's) own memory model and no sleeping: what
//! loom models in the small, in the large. Payload copies race by design and are left out: only what the
//! sequence of an entry orders is copied here.
#![cfg(not(loom))]

mod common;

use common::Ring;
use doorbell_shm::bell::{self, ClientBell, Published, ServerBell};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::map::{Mapping, PAGE};
use doorbell_shm::slots::Hints;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::thread;

const MESSAGES: u64 = if cfg!(miri) { 24 } else { 100_000 };
const PINGS: u64 = if cfg!(miri) { 12 } else { 10_000 };

/// Goal:   trap 2: between threads nothing is lost, doubled, reordered or torn, over every wrap.
/// Method: a ring of four from just before 2^32 laps; each entry's words are functions of its number.
#[test]
fn trap02_a_ring_between_threads_is_a_queue() {
    let Ring { mut tx, mut rx, .. } = Ring::<8>::starting_at(2, (1 << 34) - 10);
    thread::scope(|s| {
        s.spawn(move || {
            for id in 0..MESSAGES {
                while !tx.push([id << 32, id, !id, id * 3, id * 5, id * 7, id * 11, id * 13]).unwrap() {
                    thread::yield_now();
                }
            }
        });
        for id in 0..MESSAGES {
            let words = loop {
                match rx.pop().unwrap() {
                    Some(words) => break words,
                    None => thread::yield_now(),
                }
            };
            rx.publish();
            assert_eq!(words[0] >> 32, id & 0xffff_ffff);
            assert_eq!(words[1..], [id, !id, id * 3, id * 5, id * 7, id * 11, id * 13]);
        }
    });
}

/// Goal:   payload written before its entry is whole when the entry is taken, and is not written again
///         before the position was published: no data race that Miri could find.
/// Method: one 64-byte slot per ring entry, re-used once the ring's entry is free.
#[test]
fn trap02_payload_is_published_by_its_entry() {
    let Ring { mut tx, mut rx, map, .. } = Ring::<4>::new(1);
    let last = map.len() - PAGE;
    let slot = |i: u64| (i % 2) as usize * 64;
    let bytes = || SharedBytes::new(&map, last, 128).unwrap();
    let (theirs, ours) = (bytes(), bytes());
    thread::scope(|s| {
        s.spawn(move || {
            for id in 0..MESSAGES {
                while tx.outstanding() == tx.capacity() {
                    tx.refresh().unwrap();
                    thread::yield_now();
                }
                theirs.write(slot(id), &[id as u8; 64]);
                assert!(tx.push([0, id, 0, 0]).unwrap());
            }
        });
        for id in 0..MESSAGES {
            while !rx.is_ready() {
                thread::yield_now();
            }
            assert_eq!(rx.pop().unwrap().unwrap()[1], id);
            let mut copy = [0; 64];
            ours.read(slot(id), &mut copy);
            rx.publish();
            assert_eq!(copy, [id as u8; 64]);
        }
    });
}

/// Goal:   trap 8: nobody sleeps on what was published, in either direction, and nobody wakes twice for it.
/// Method: ping-pong between two threads that park (a stand-in for FUTEX_WAIT that remembers a wake) and
///         wake each other only when a bell says so. A lost wake hangs the test.
#[test]
fn trap08_no_wake_is_lost_between_threads() {
    let map = Mapping::on_heap(PAGE);
    let word = |offset| map.object::<AtomicU32>(offset).unwrap();
    let (server_bell, client_bell) = (ServerBell(word(0)), ClientBell(word(64)));
    let (server_sees, client_sees) = (ServerBell(word(0)), ClientBell(word(64)));
    let Ring { tx: mut requests, rx: mut calls, .. } = Ring::<8>::new(2);
    let Ring { tx: mut answers, rx: mut completions, .. } = Ring::<4>::new(2);
    let client = thread::current();
    thread::scope(|s| {
        let server = s.spawn(move || {
            let mut served = 0;
            while served < PINGS {
                if let Some(words) = calls.pop().unwrap() {
                    calls.publish();
                    assert!(answers.push([0, words[1], 0, 0]).unwrap());
                    bell::fence_before_bell();
                    if client_bell.take() & bell::WAITER_FUTEX != 0 {
                        client.unpark();
                    }
                    served += 1;
                    continue;
                }
                server_sees.mark(bell::ASLEEP);
                if !calls.is_ready() {
                    thread::park();
                }
                server_sees.clear();
            }
        });
        for id in 0..PINGS {
            assert!(requests.push([0, id, 0, 0, 0, 0, 0, 0]).unwrap());
            bell::fence_before_bell();
            if server_bell.take(Published::Submissions) {
                server.thread().unpark();
            }
            let answer = loop {
                if let Some(words) = completions.pop().unwrap() {
                    completions.publish();
                    break words;
                }
                client_sees.mark(bell::WAITER_FUTEX);
                if !completions.is_ready() {
                    thread::park();
                }
                client_sees.clear(bell::WAITER_FUTEX);
            };
            assert_eq!(answer[1], id);
        }
    });
}

/// Goal:   trap 19: a hint is never lost and never comes before the word that it points at.
/// Method: the client counts each slot's word up and hints; the server takes until all words have come.
#[test]
fn trap19_hints_between_threads_lose_nothing() {
    let rounds = if cfg!(miri) { 3 } else { 2_000u64 };
    let slots = if cfg!(miri) { 66 } else { 130u32 };
    let map = Mapping::on_heap(2 * PAGE);
    let words = 1 + slots.div_ceil(64) as usize;
    let hints = || Hints::new(map.slice::<AtomicU64>(0, words).unwrap(), slots);
    let (set, take) = (hints(), hints());
    let values = map.slice::<AtomicU64>(PAGE, slots as usize).unwrap();
    let seen_by_client = values.clone();
    thread::scope(|s| {
        s.spawn(move || {
            for round in 1..=rounds {
                for slot in (0..slots).step_by(13) {
                    seen_by_client[slot as usize].store(round, Relaxed);
                    set.set(slot);
                }
            }
        });
        let mut latest = vec![0; slots as usize];
        while (0..slots).step_by(13).any(|s| latest[s as usize] != rounds) {
            take.take(|slot| {
                let value = values[slot as usize].load(Relaxed);
                assert!(value >= latest[slot as usize].max(1), "slot {slot} went back to {value}");
                latest[slot as usize] = value;
            })
            .unwrap();
            thread::yield_now();
        }
    });
}

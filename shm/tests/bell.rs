//! What doorbell words say, step by step; that no wake is lost between two threads is for the loom models.
#![cfg(not(loom))]

use doorbell_shm::bell::{
    ASLEEP, ASLEEP_WANTS_SPACE, AWAKE, ClientBell, Published, ServerBell, WAITER_FUTEX, WAITER_SOCKET,
};
use std::sync::atomic::AtomicU32;

/// Goal:   a server that sleeps seems to, is rung once, and does no longer; one that has cleared its mark is rung by nobody.
/// Method: every mark, what every kind of news makes of it, and what the server sees of its own mark.
#[test]
fn a_servers_mark_stands_until_somebody_rings_or_it_is_cleared() {
    let word = AtomicU32::new(AWAKE);
    let bell = ServerBell(&word);
    assert!(!bell.is_marked());
    for (state, consumed_rings) in [(ASLEEP, false), (ASLEEP_WANTS_SPACE, true)] {
        for (published, rings) in [(Published::Submissions, true), (Published::Consumed, consumed_rings)] {
            bell.mark(state);
            assert!(bell.is_marked(), "{state}");
            assert_eq!(bell.seems_asleep(published), rings, "{state} {published:?}");
            assert_eq!(bell.take(published), rings, "{state} {published:?}");
            assert_eq!(bell.is_marked(), !rings, "{state} {published:?}: the mark is taken with the ring");
            assert!(!rings || !bell.take(published), "{state} {published:?}: one ring is enough");
            bell.clear();
            assert!(!bell.is_marked() && !bell.seems_asleep(published) && !bell.take(published));
        }
    }
}

/// Goal:   each kind of waiter is a bit of its own; who marks twice sleeps on the value that is there; a take has all of them
///         and leaves none.
/// Method: both waiters, marked, cleared and taken.
#[test]
fn a_clients_waiters_are_told_apart_and_taken_together() {
    let word = AtomicU32::new(0);
    let bell = ClientBell(&word);
    assert!(!bell.seems_asleep());
    assert_eq!(bell.take(), 0);
    assert_eq!(bell.mark(WAITER_FUTEX), WAITER_FUTEX);
    assert_eq!(bell.mark(WAITER_FUTEX), WAITER_FUTEX, "a second mark changes nothing");
    assert!(bell.seems_asleep());
    assert_eq!(bell.mark(WAITER_SOCKET), WAITER_FUTEX | WAITER_SOCKET);
    bell.clear(WAITER_FUTEX);
    assert_eq!(bell.mark(WAITER_SOCKET), WAITER_SOCKET);
    assert_eq!(bell.mark(WAITER_FUTEX), WAITER_FUTEX | WAITER_SOCKET);
    assert_eq!((bell.take(), bell.take()), (WAITER_FUTEX | WAITER_SOCKET, 0));
    assert!(!bell.seems_asleep());
}

/// Goal:   S6: bits that nobody defined wake nobody, and are gone.
/// Method: a client that writes all of them, with and without a waiter.
#[test]
fn s6_a_client_that_scribbles_on_its_bell_gains_nothing() {
    let word = AtomicU32::new(!(WAITER_FUTEX | WAITER_SOCKET));
    let bell = ClientBell(&word);
    assert_eq!((bell.take(), bell.seems_asleep()), (0, false));
    word.store(u32::MAX, std::sync::atomic::Ordering::Relaxed);
    assert_eq!((bell.take(), bell.take()), (WAITER_FUTEX | WAITER_SOCKET, 0));
}

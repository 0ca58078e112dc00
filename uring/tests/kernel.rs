//! The kernel does what we rely on. A failure here is a fact about the machine, or about a kernel
//! newer than the facts; each test names the fact in its goal.
//!
//! No test sleeps to make something likely: each waits for a condition, with a deadline that only a
//! broken kernel reaches.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use doorbell_uring::futex::{self, Woken};
use doorbell_uring::{
    Completion, Driver, DriverError, Options, PollFlags, Step, Token, Wait, monotonic_now, self_test,
};
use rustix::io::Errno;

const ALL: u32 = i32::MAX as u32;
const PATIENCE: Duration = Duration::from_secs(20);

fn driver() -> Driver {
    sized(64, 1024)
}

fn sized(entries: u32, completion_entries: u32) -> Driver {
    Driver::new(&Options { entries, completion_entries, restrict: true }).unwrap()
}

/// The next completion, waited for.
#[track_caller]
fn next(driver: &mut Driver) -> Completion {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(completion) = driver.next_completion() {
            return completion;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no completion: {:?}", driver.counters());
        driver.enter(Wait::Until(Some(left))).unwrap();
    }
}

#[track_caller]
fn expect(driver: &mut Driver, token: u64, result: Result<u32, Errno>) {
    assert_eq!(next(driver), Completion { token: Token(token), result });
}

/// Repeats `condition` until it holds.
#[track_caller]
fn spin_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "the condition never came true");
        thread::yield_now();
    }
}

/// Goal:   the self-test passes where these tests do, and tries every step, in the order of the list (F38).
/// Method: run it, compare.
#[test]
fn f38_the_self_test_passes() {
    let report = self_test().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.passed, Step::ALL);
    assert!(!report.release.is_empty() && report.took > Duration::from_millis(1));
}

/// Goal:   futex(2) on another thread ends an armed wait that the ring's owner sleeps on.
/// Method: a thread rings until it has woken somebody, so it cannot come too early.
#[test]
fn a_futex_call_of_another_thread_ends_an_armed_wait() {
    let word = AtomicU32::new(0);
    let mut driver = driver();
    driver.futex_wait(&word, 0, Token(5)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| spin_until(|| futex::wake(&word, ALL).unwrap() == 1));
        expect(&mut driver, 5, Ok(0));
    });
    assert_eq!(driver.counters().enters, 1, "submitting and waiting is one system call");
}

/// Goal:   the ring's wake ends waits of its own ring, of another ring and of futex(2).
/// Method: one of each on one word; the sleeper says when it is about to sleep, and is rung until
///         it has been woken.
#[test]
fn a_wake_through_the_ring_ends_every_kind_of_wait() {
    let word = AtomicU32::new(0);
    let (mut here, mut there) = (driver(), driver());
    here.futex_wait(&word, 0, Token(1)).unwrap();
    here.futex_wake(&word, ALL).unwrap();
    expect(&mut here, 1, Ok(0));

    there.futex_wait(&word, 0, Token(2)).unwrap();
    there.enter(Wait::No).unwrap();
    here.futex_wake(&word, ALL).unwrap();
    here.enter(Wait::No).unwrap();
    expect(&mut there, 2, Ok(0));

    thread::scope(|scope| {
        let sleeper = scope.spawn(|| futex::wait(&word, 0, Some(PATIENCE)));
        spin_until(|| {
            here.futex_wake(&word, ALL).unwrap();
            here.enter(Wait::No).unwrap();
            sleeper.is_finished()
        });
        assert_eq!(sleeper.join().unwrap(), Ok(Woken::Woken));
    });
    assert_eq!(here.failed_wakes(), 0);
    assert_eq!(here.next_completion(), None, "wakes do not complete");
}

/// Goal:   a private wake does not find a shared wait, so nobody may ever use the private flag.
/// Method: a private wake wakes nobody; a shared one then wakes the wait.
#[test]
fn trap_8_a_private_wake_misses_a_shared_wait() {
    use rustix::thread::futex::{Flags, wake};
    let word = AtomicU32::new(0);
    let mut driver = driver();
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(wake(&word, Flags::PRIVATE, ALL), Ok(0));
    assert_eq!(futex::wake(&word, ALL), Ok(1));
    expect(&mut driver, 1, Ok(0));
}

/// Goal:   a wait on a word that has changed ends at once with AGAIN (F37).
/// Method: expect another value.
#[test]
fn f37_a_wait_on_a_changed_word_ends_with_again() {
    let word = AtomicU32::new(3);
    let mut driver = driver();
    driver.futex_wait(&word, 2, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), Some(Completion { token: Token(1), result: Err(Errno::AGAIN) }));
}

/// Goal:   a cancelled wait, poll and timeout end with CANCELED, the cancel itself with nothing (F37).
/// Method: one of each; then cancel what is no longer there.
#[test]
fn f37_a_cancelled_operation_ends_with_canceled() {
    let word = AtomicU32::new(0);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut driver = driver();
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    driver.poll(ours.as_fd(), PollFlags::IN, Token(2)).unwrap();
    driver.timeout(monotonic_now() + PATIENCE, Token(3)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);

    for token in 1..=3 {
        driver.cancel(Token(token)).unwrap();
        expect(&mut driver, token, Err(Errno::CANCELED));
        driver.cancel(Token(token)).unwrap();
    }
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None, "a cancel that comes too late is not shown");
    assert_eq!(futex::wake(&word, ALL), Ok(0), "the wait is gone");
}

/// Goal:   what an enter itself sets free, it also finishes: no second enter is needed (R1.2).
/// Method: ring and cancel waits of the same ring, with one `Wait::No` each.
#[test]
fn an_enter_finishes_what_it_sets_free() {
    let word = AtomicU32::new(0);
    let mut driver = driver();
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    driver.futex_wake(&word, ALL).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), Some(Completion { token: Token(1), result: Ok(0) }));

    driver.futex_wait(&word, 0, Token(2)).unwrap();
    driver.cancel(Token(2)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), Some(Completion { token: Token(2), result: Err(Errno::CANCELED) }));
    assert_eq!(driver.counters().enters, 2);
}

/// Goal:   many waits are armed by one enter and reaped by one (R1.2).
/// Method: arm one per word, ring some of them, count enters and tokens.
#[test]
fn one_enter_arms_and_one_enter_reaps_many_waits() {
    let words: Vec<_> = (0..50).map(AtomicU32::new).collect();
    let mut driver = driver();
    arm_and_ring(&mut driver, &words, BATCH);
    driver.enter(Wait::Until(None)).unwrap();
    assert_eq!(driver.counters().enters, 2);
    assert_eq!(take_all(&mut driver), (0..BATCH as u64).collect());
    assert!(!driver.pending());
}

/// Goal:   what one enter does not reap is reaped by the next, and shows as pending until then.
///         (Kernel 6.18 runs 20 deferred completions per enter that waits, older ones all.)
/// Method: as above, ringing more than that.
#[test]
fn completions_beyond_one_enters_batch_stay_pending() {
    let words: Vec<_> = (0..50).map(AtomicU32::new).collect();
    let mut driver = driver();
    arm_and_ring(&mut driver, &words, words.len());
    let mut tokens = HashSet::new();
    while driver.pending() {
        driver.enter(Wait::Until(Some(Duration::ZERO))).unwrap();
        tokens.extend(take_all(&mut driver));
    }
    assert_eq!(tokens, (0..50).collect());
    assert!(driver.counters().enters <= 1 + 50_u64.div_ceil(BATCH as u64), "{:?}", driver.counters());
}

/// How many deferred completions one enter delivers at least.
const BATCH: usize = 20;

/// Arms a wait on each of `words`, with one enter, and rings the first `count`.
fn arm_and_ring(driver: &mut Driver, words: &[AtomicU32], count: usize) {
    for (token, word) in (0..).zip(words) {
        driver.futex_wait(word, token, Token(token.into())).unwrap();
    }
    driver.enter(Wait::No).unwrap();
    assert_eq!((driver.counters().enters, driver.counters().arms), (1, words.len() as u64));
    for word in &words[..count] {
        assert_eq!(futex::wake(word, ALL), Ok(1));
    }
}

fn take_all(driver: &mut Driver) -> HashSet<u64> {
    std::iter::from_fn(|| driver.next_completion()).map(|completion| completion.token.0).collect()
}

/// Goal:   under DEFER_TASKRUN a rung bell shows in `pending` and nowhere else until an enter.
/// Method: another thread rings; spin on `pending`; look for the completion before and after.
#[test]
fn no_completion_appears_without_an_enter_but_pending_turns_true() {
    let word = AtomicU32::new(0);
    let mut driver = driver();
    assert!(!driver.pending());
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    assert!(driver.pending(), "unsubmitted");
    driver.enter(Wait::No).unwrap();
    assert!(!driver.pending());

    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(futex::wake(&word, ALL), Ok(1)));
        spin_until(|| driver.pending());
    });
    assert_eq!(driver.next_completion(), None);
    driver.enter(Wait::No).unwrap();
    assert!(driver.pending(), "not yet taken");
    expect(&mut driver, 1, Ok(0));
    assert!(!driver.pending());
}

/// Goal:   entering without a wait costs no system call when there is nothing to do.
/// Method: count enters.
#[test]
fn an_idle_enter_is_no_system_call() {
    let mut driver = driver();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.counters().enters, 0);
}

/// Goal:   a full submission queue drops nothing and fails nothing (F35).
/// Method: queue ten times its entries, of every kind that completes; each completes once.
#[test]
fn f35_a_full_submission_queue_drops_nothing() {
    let word = AtomicU32::new(0);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut driver = sized(8, 128);
    for token in 0..80 {
        match token % 3 {
            0 => driver.futex_wait(&word, 0, Token(token)).unwrap(),
            1 => driver.poll(ours.as_fd(), PollFlags::OUT, Token(token)).unwrap(),
            _ => driver.timeout(Duration::ZERO, Token(token)).unwrap(),
        }
    }
    driver.futex_wake(&word, ALL).unwrap();
    let results: HashSet<_> = (0..80).map(|_| next(&mut driver)).map(|c| (c.token.0, c.result)).collect();
    let expected = |token| match token % 3 {
        0 => (token, Ok(0)),
        1 => (token, Ok(PollFlags::OUT.bits().into())),
        _ => (token, Err(Errno::TIME)),
    };
    assert_eq!(results, (0..80).map(expected).collect());
    assert!(driver.counters().queue_full >= 9);
    assert!(!driver.pending());
}

/// Goal:   each timeout keeps its own time until the kernel has read it, however full the queue (F35).
/// Method: past and far times in turn, ten queues full; the past ones fire, the others can be cancelled.
#[test]
fn f35_every_timeout_keeps_its_own_time() {
    let mut driver = sized(8, 256);
    let far = monotonic_now() + Duration::from_secs(1000);
    for token in 0..80 {
        let at = if token % 2 == 0 { Duration::ZERO } else { far };
        driver.timeout(at, Token(token)).unwrap();
    }
    let fired: HashSet<_> = (0..40).map(|_| next(&mut driver)).map(|c| (c.token.0, c.result)).collect();
    assert_eq!(fired, (0..80).step_by(2).map(|token| (token, Err(Errno::TIME))).collect());
    for token in (1..80).step_by(2) {
        driver.cancel(Token(token)).unwrap();
        expect(&mut driver, token, Err(Errno::CANCELED));
    }
}

/// Goal:   more completions than the completion queue holds all arrive, and none is dropped (F36).
/// Method: a queue of 64, 1000 waits, all rung at once.
#[test]
fn f36_completion_overflow_loses_nothing() {
    let word = AtomicU32::new(0);
    let mut driver = sized(32, 64);
    for token in 0..1000 {
        driver.futex_wait(&word, 0, Token(token)).unwrap();
    }
    driver.enter(Wait::No).unwrap();
    assert_eq!(futex::wake(&word, ALL), Ok(1000));

    let tokens: HashSet<_> = (0..1000).map(|_| next(&mut driver).token.0).collect();
    assert_eq!(tokens, (0..1000).collect());
    assert_eq!(driver.overflowed(), 0);
    assert!(!driver.pending(), "the overflow flag is down again");
}

/// Goal:   completions kept aside by the kernel show in `pending`, so that a loop that empties the
///         queue and tests `pending` gets them all without ever waiting (F36).
/// Method: as above with immediate completions, and `Wait::No` only.
#[test]
fn f36_completions_kept_aside_show_as_pending() {
    let word = AtomicU32::new(1);
    let mut driver = sized(32, 64);
    for token in 0..200 {
        driver.futex_wait(&word, 0, Token(token)).unwrap();
    }
    let mut seen = 0;
    while driver.pending() {
        driver.enter(Wait::No).unwrap();
        while let Some(completion) = driver.next_completion() {
            assert_eq!(completion.result, Err(Errno::AGAIN));
            seen += 1;
        }
    }
    assert_eq!((seen, driver.overflowed()), (200, 0));
}

/// Goal:   a timeout is absolute, CLOCK_MONOTONIC, and never early.
/// Method: two in the wrong order and one in the past; compare clock and order.
#[test]
fn absolute_timeouts_fire_in_order_and_never_early() {
    let mut driver = driver();
    let now = monotonic_now();
    let (soon, later) = (now + Duration::from_millis(5), now + Duration::from_millis(10));
    driver.timeout(later, Token(3)).unwrap();
    driver.timeout(soon, Token(2)).unwrap();
    driver.timeout(Duration::ZERO, Token(1)).unwrap();
    expect(&mut driver, 1, Err(Errno::TIME));
    expect(&mut driver, 2, Err(Errno::TIME));
    assert!(monotonic_now() >= soon);
    expect(&mut driver, 3, Err(Errno::TIME));
    assert!(monotonic_now() >= later);
}

/// Goal:   a wait ends without a completion when its time is over, and the largest times are no error.
/// Method: a short wait, none, and the longest beside something that ends it.
#[test]
fn a_wait_ends_when_its_time_is_over() {
    let mut driver = driver();
    let start = Instant::now();
    driver.enter(Wait::Until(Some(Duration::from_millis(5)))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(5));
    driver.enter(Wait::Until(Some(Duration::ZERO))).unwrap();
    assert_eq!(driver.next_completion(), None);

    driver.timeout(Duration::MAX, Token(1)).unwrap();
    driver.timeout(monotonic_now() + Duration::from_millis(5), Token(2)).unwrap();
    driver.enter(Wait::Until(Some(Duration::MAX))).unwrap();
    assert_eq!(driver.next_completion().map(|completion| completion.token), Some(Token(2)));
}

/// Goal:   a wait does not sleep while completions are there to be taken.
/// Method: leave one in the queue, wait for ever.
#[test]
fn a_wait_returns_at_once_if_completions_are_left() {
    let word = AtomicU32::new(1);
    let mut driver = driver();
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    driver.enter(Wait::Until(None)).unwrap();
    expect(&mut driver, 1, Err(Errno::AGAIN));
}

/// Goal:   a peer's hang-up ends a poll with HUP, and closing our end does not end it.
/// Method: a socket pair.
#[test]
fn polling_a_socket_tells_of_a_hang_up() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut driver = driver();
    driver.poll(ours.as_fd(), PollFlags::RDHUP, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    drop(ours);
    assert_eq!(driver.next_completion(), None, "the kernel holds the file");
    drop(theirs);
    let completion = next(&mut driver);
    assert!(completion.events().contains(PollFlags::HUP | PollFlags::RDHUP), "{completion:?}");
}

/// Goal:   a poll of a pidfd ends when the process dies.
/// Method: kill a child.
#[test]
fn polling_a_pidfd_tells_of_a_death() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let mut driver = driver();
    driver.poll(pidfd.as_fd(), PollFlags::IN, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);
    child.kill().unwrap();
    assert!(next(&mut driver).events().contains(PollFlags::IN));
    child.wait().unwrap();
}

/// Goal:   a message appears on the other ring with its token and value, wakes its sleeping thread,
///         and does not complete here.
/// Method: the other ring's thread sleeps on it; then one on the same thread, seen through `pending`.
#[test]
fn a_message_reaches_another_ring() {
    let mut here = driver();
    let (send, receive) = mpsc::channel();
    let receiver = thread::spawn(move || {
        let mut there = driver();
        send.send(there.as_fd().try_clone_to_owned().unwrap()).unwrap();
        next(&mut there)
    });
    let ring = receive.recv().unwrap();
    here.msg_ring(ring.as_fd(), ALL, Token(9)).unwrap();
    here.enter(Wait::No).unwrap();
    assert_eq!(receiver.join().unwrap(), Completion { token: Token(9), result: Ok(ALL) });

    let mut there = driver();
    here.msg_ring(there.as_fd(), 0, Token(10)).unwrap();
    here.enter(Wait::No).unwrap();
    assert!(there.pending());
    expect(&mut there, 10, Ok(0));
    assert_eq!(here.next_completion(), None);
    assert_eq!(here.counters().failed_messages, 0);
}

/// Goal:   a message that cannot be delivered is counted and not shown.
/// Method: send one to a socket.
#[test]
fn a_message_to_no_ring_is_counted() {
    let (socket, _other) = UnixStream::pair().unwrap();
    let mut driver = driver();
    driver.msg_ring(socket.as_fd(), 1, Token(1)).unwrap();
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);
    assert_eq!(driver.counters().failed_messages, 1);
}

/// Goal:   tokens and values that would be misread are refused before anything is queued.
/// Method: each operation with a reserved token; a message of 32 bits.
#[test]
fn reserved_tokens_and_large_values_are_refused() {
    let word = AtomicU32::new(0);
    let mut driver = driver();
    let mut other = self::driver();
    let reserved = Token(u64::MAX);
    let refused = Err(DriverError::Reserved(reserved));
    assert_eq!(driver.futex_wait(&word, 0, reserved), refused);
    assert_eq!(driver.poll(other.as_fd(), PollFlags::IN, reserved), refused);
    assert_eq!(driver.timeout(Duration::ZERO, reserved), refused);
    assert_eq!(driver.cancel(reserved), refused);
    assert_eq!(driver.msg_ring(other.as_fd(), 0, reserved), refused);
    assert_eq!(driver.msg_ring(other.as_fd(), ALL + 1, Token(1)), Err(DriverError::Value(ALL + 1)));
    assert!(!driver.pending());

    other.futex_wait(&word, 1, Token::LAST).unwrap();
    expect(&mut other, Token::LAST.0, Err(Errno::AGAIN));
}

/// Goal:   an unrestricted ring does the same.
/// Method: a wait and a wake.
#[test]
fn an_unrestricted_ring_works_too() {
    let word = AtomicU32::new(0);
    let mut driver = Driver::new(&Options { restrict: false, ..Options::default() }).unwrap();
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    driver.futex_wake(&word, ALL).unwrap();
    expect(&mut driver, 1, Ok(0));
}

/// Goal:   futex(2)'s four answers are told apart.
/// Method: a changed word, a timeout, a wake.
#[test]
fn plain_futex_waits_say_why_they_ended() {
    let word = AtomicU32::new(0);
    assert_eq!(futex::wait(&word, 1, None), Ok(Woken::Changed));
    assert_eq!(futex::wait(&word, 0, Some(Duration::from_millis(1))), Ok(Woken::TimedOut));
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| futex::wait(&word, 0, Some(Duration::MAX)));
        spin_until(|| futex::wake(&word, u32::MAX).unwrap() == 1);
        assert_eq!(sleeper.join().unwrap(), Ok(Woken::Woken));
    });
}

/// Goal:   the peer's process is named by descriptor, even where only its socket is known (F10).
/// Method: both ends of a socket pair belong to this process, whose pidfd must not be readable.
#[test]
fn f10_the_peer_of_a_socket_is_a_process_that_still_lives() {
    use rustix::event::{PollFd, Timespec, poll};
    use std::os::fd::AsFd;
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let process = doorbell_uring::peer_process(ours.as_fd()).unwrap();
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap(), 0);
    let not_a_socket = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(doorbell_uring::peer_process(not_a_socket.as_fd()).unwrap_err(), rustix::io::Errno::NOTSOCK);
}

//! The driver without io_uring keeps the contract of the one with it, but for what it says itself (F38).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use doorbell_uring::{Class, Completion, Counts, Driver, PollFlags, Staging, Token, Wait, monotonic_now};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

const MAIL: Token = Token(99);

fn driver() -> Driver {
    Driver::epoll(MAIL).unwrap()
}

fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring(bell: &OwnedFd) {
    rustix::io::write(bell, &1u64.to_ne_bytes()).unwrap();
}

/// The next completion, waited for.
fn next(driver: &mut Driver) -> Completion {
    let deadline = monotonic_now() + Duration::from_secs(10);
    loop {
        if let Some(completion) = driver.next_completion() {
            return completion;
        }
        let left = deadline.saturating_sub(monotonic_now());
        assert!(!left.is_zero(), "nothing completed within 10 s");
        driver.enter(Wait::Until(Some(left))).unwrap();
    }
}

/// Nothing completes now.
fn nothing(driver: &mut Driver) {
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);
}

/// Goal:   a poll completes once, also while the descriptor stays readable, and again when it is asked for again.
#[test]
fn f38_a_poll_is_one_shot() {
    let (mut driver, bell) = (driver(), bell());
    driver.poll(bell.as_fd(), PollFlags::IN, Token(1)).unwrap();
    nothing(&mut driver);
    ring(&bell);
    for _ in 0..3 {
        let completion = next(&mut driver);
        assert_eq!((completion.token, completion.events()), (Token(1), PollFlags::IN));
        nothing(&mut driver);
        driver.poll(bell.as_fd(), PollFlags::IN, Token(1)).unwrap();
    }
}

/// Goal:   S10: what a closed file had been polled for is not taken for another file of its number, polled or not.
/// Method: a pipe that is readable, closed while it lives on in a copy, whose number another file then has.
#[test]
fn s10_a_number_that_is_used_again_is_another_file() {
    let mut driver = driver();
    let (read, write) = rustix::pipe::pipe().unwrap();
    driver.poll(read.as_fd(), PollFlags::IN, Token(1)).unwrap();
    let copy = rustix::io::fcntl_dupfd_cloexec(&read, 0).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&read);
    drop(read);
    let other = rustix::io::fcntl_dupfd_cloexec(bell(), number).unwrap();
    rustix::io::write(&write, b"x").unwrap();
    if std::os::fd::AsRawFd::as_raw_fd(&other) == number {
        driver.poll(other.as_fd(), PollFlags::IN, Token(2)).unwrap();
        nothing(&mut driver);
        ring(&other);
        assert_eq!(next(&mut driver).token, Token(2));
    }
    drop(copy);
    nothing(&mut driver);
}

/// Goal:   a cancelled poll or timeout completes as CANCELED and never otherwise; to cancel what has ended is nothing.
#[test]
fn f38_what_is_cancelled_ends_once() {
    let (mut driver, bell) = (driver(), bell());
    driver.poll(bell.as_fd(), PollFlags::IN, Token(1)).unwrap();
    driver.timeout(monotonic_now() + Duration::from_millis(5), Token(2)).unwrap();
    for token in [Token(1), Token(2)] {
        driver.cancel(token).unwrap();
        assert_eq!(next(&mut driver), Completion { token, result: Err(Errno::CANCELED) });
        driver.cancel(token).unwrap();
    }
    ring(&bell);
    driver.enter(Wait::Until(Some(Duration::from_millis(20)))).unwrap();
    assert_eq!(driver.next_completion(), None);
    // The descriptor can be polled again.
    driver.poll(bell.as_fd(), PollFlags::IN, Token(3)).unwrap();
    assert_eq!(next(&mut driver).token, Token(3));
}

/// Goal:   what was forgotten of descriptors is not needed again: what is polled stays polled, what was cancelled stays so,
///         and each can be polled anew, whether it was closed since or not.
/// Method: two eventfds, the one with the higher number cancelled; both rung before and after.
#[test]
fn f38_descriptors_that_nobody_waits_for_are_forgotten() {
    let (mut driver, low, high) = (driver(), bell(), bell());
    driver.poll(low.as_fd(), PollFlags::IN, Token(1)).unwrap();
    driver.poll(high.as_fd(), PollFlags::IN, Token(2)).unwrap();
    driver.cancel(Token(2)).unwrap();
    assert_eq!(next(&mut driver).token, Token(2));
    driver.forget();
    ring(&low);
    ring(&high);
    assert_eq!(next(&mut driver).token, Token(1));
    nothing(&mut driver);
    driver.forget();
    for (bell, token) in [(&high, Token(3)), (&low, Token(4))] {
        driver.poll(bell.as_fd(), PollFlags::IN, token).unwrap();
        assert_eq!(next(&mut driver).token, token);
    }
}

/// Goal:   timeouts complete in the order of their times, none too early, and a wait ends with them.
#[test]
fn f38_timeouts_are_never_early() {
    let mut driver = driver();
    let now = monotonic_now();
    for (ms, token) in [(6, 2), (3, 1), (9, 3)] {
        driver.timeout(now + Duration::from_millis(ms), Token(token)).unwrap();
    }
    for (ms, token) in [(3, 1), (6, 2), (9, 3)] {
        driver.enter(Wait::Until(None)).unwrap();
        assert_eq!(next(&mut driver), Completion { token: Token(token), result: Err(Errno::TIME) });
        assert!(monotonic_now() >= now + Duration::from_millis(ms));
    }
}

/// Goal:   mail of another driver, on another thread, ends a wait; a loop that only polls is asked to look, too.
#[test]
fn f38_mail_wakes_whoever_waits() {
    let mut driver = driver();
    let address = rustix::io::fcntl_dupfd_cloexec(driver.as_fd(), 0).unwrap();
    let sender = std::thread::spawn(move || {
        let mut other = Driver::epoll(MAIL).unwrap();
        other.msg_ring(address.as_fd(), 0, MAIL).unwrap();
        assert_eq!(other.counters().failed_messages, 0);
    });
    driver.enter(Wait::Until(None)).unwrap();
    assert_eq!(next(&mut driver), Completion { token: MAIL, result: Ok(0) });
    sender.join().unwrap();
    nothing(&mut driver);
    let asked = (1..100).find(|_| driver.pending());
    assert!(asked.is_some_and(|n| n <= 16), "{asked:?}");
    nothing(&mut driver);
    assert!(!driver.pending());
}

/// Goal:   who sleeps on a word is woken at once; waiting on a word is what this driver says that it cannot.
#[test]
fn f38_words_are_woken_and_not_waited_on() {
    let mut driver = driver();
    assert!(!driver.waits_on_words());
    let word = AtomicU32::new(0);
    driver.futex_wait(&word, 0, Token(1)).unwrap();
    nothing(&mut driver);
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| doorbell_uring::futex::wait(&word, 0, None).unwrap());
        while !sleeper.is_finished() {
            driver.futex_wake(&word, 1).unwrap();
            std::thread::yield_now();
        }
    });
    assert_eq!(driver.failed_wakes(), 0);
}

/// Goal:   reads bring what the file has, cached or not, from any offset; the buffer comes back with the completion.
/// Method: a file of 100 kB in /tmp, whose pages may be cached, and one in /proc, which cannot be read without waiting.
#[test]
fn f38_files_are_read() {
    let mut driver = driver();
    let staging = Staging::new(Counts { small: 2, medium: 1, large: 0 }).unwrap();
    let content: Vec<u8> = (0..100_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    let path = std::env::temp_dir().join(format!("doorbell-epoll-{}", std::process::id()));
    std::fs::write(&path, &content).unwrap();
    let file: Arc<OwnedFd> = Arc::new(std::fs::File::open(&path).unwrap().into());
    std::fs::remove_file(&path).unwrap();
    for (offset, len, class, expected) in [
        (0, 65_536, Class::Medium, &content[..65_536]),
        (65_536, 65_536, Class::Medium, &content[65_536..]),
        (99_999, 4096, Class::Small, &content[99_999..]),
        (100_000, 4096, Class::Small, &[]),
        (5, 1 << 20, Class::Small, &content[5..5 + 4096]),
    ] {
        let buffer = staging.take(class).unwrap();
        driver.read(Arc::clone(&file), offset, len, buffer, Token(7)).unwrap();
        assert!(driver.pending());
        let completion = next(&mut driver);
        assert_eq!((completion.token, completion.result), (Token(7), Ok(expected.len() as u32)));
        assert_eq!(driver.take_buffer().unwrap().bytes(), expected);
    }
    let proc: Arc<OwnedFd> = Arc::new(std::fs::File::open("/proc/self/stat").unwrap().into());
    driver.read(proc, 0, 4096, staging.take(Class::Small).unwrap(), Token(8)).unwrap();
    let mut completion = next(&mut driver);
    while completion.token == MAIL {
        completion = next(&mut driver);
    }
    assert!(completion.token == Token(8) && completion.result.unwrap() > 10, "{completion:?}");
    assert!(driver.take_buffer().unwrap().bytes().starts_with(std::process::id().to_string().as_bytes()));
    assert_eq!(staging.free(Class::Small), 2);
}

/// Goal:   many reads at once do not keep the driver from looking at anything else.
/// Method: sixteen reads of 64 KiB, and a bell that is rung: it completes before the last of them.
#[test]
fn f38_reads_leave_room_for_others() {
    let (mut driver, bell) = (driver(), bell());
    let staging = Staging::new(Counts { small: 1, medium: 16, large: 0 }).unwrap();
    let path = std::env::temp_dir().join(format!("doorbell-epoll-many-{}", std::process::id()));
    std::fs::write(&path, vec![1; 65_536]).unwrap();
    let file: Arc<OwnedFd> = Arc::new(std::fs::File::open(&path).unwrap().into());
    std::fs::remove_file(&path).unwrap();
    driver.poll(bell.as_fd(), PollFlags::IN, Token(1)).unwrap();
    ring(&bell);
    for token in 10..26 {
        let buffer = staging.take(Class::Medium).unwrap();
        driver.read(Arc::clone(&file), 0, 65_536, buffer, Token(token)).unwrap();
    }
    driver.cancel(Token(25)).unwrap();
    let mut order = Vec::new();
    while order.len() < 17 {
        let token = next(&mut driver).token;
        if token != MAIL {
            order.push(token.0);
        }
    }
    let place = |token| order.iter().position(|t| *t == token).unwrap();
    assert!(place(1) < place(24), "{order:?}");
    // The last buffer goes back with the next completion that is asked for.
    assert_eq!(driver.next_completion(), None);
    assert_eq!(staging.free(Class::Medium), 16);
}

//! Reading files through a ring into staging buffers: the kernel does what we rely on. As in `kernel.rs`, a failure
//! is a fact about the machine or its kernel, and no test sleeps.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doorbell_uring::{
    Buffer, Class, Completion, Counts, Driver, DriverError, Options, Staging, Token, Wait, monotonic_now,
};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::pipe::pipe;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

const PATIENCE: Duration = Duration::from_secs(20);

fn driver() -> Driver {
    Driver::new(&Options { entries: 64, completion_entries: 1024, restrict: true }).unwrap()
}

fn staging() -> Staging {
    Staging::new(Counts { small: 4, medium: 2, large: 1 }).unwrap()
}

/// Bytes that differ from each other wherever they are looked at.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A file without a name, on disk: the kernel reads it within the enter.
fn on_disk(content: &[u8]) -> File {
    let path = std::env::temp_dir().join(format!(
        "doorbell-reads-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(content).unwrap();
    file
}

/// A file in memory: a thread of the kernel reads it.
fn in_memory(content: &[u8]) -> File {
    let mut file = File::from(memfd_create("reads", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file
}

fn shared(file: &File) -> Arc<OwnedFd> {
    Arc::new(file.try_clone().unwrap().into())
}

/// The next completion, waited for, with its buffer.
#[track_caller]
fn next(driver: &mut Driver) -> (Completion, Option<Buffer>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(completion) = driver.next_completion() {
            return (completion, driver.take_buffer());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no completion: {:?}", driver.counters());
        driver.enter(Wait::Until(Some(left))).unwrap();
    }
}

/// Whether all could be pinned that was to be. Whoever lacks CAP_IPC_LOCK has a limit, shared with whatever the same
/// user runs beside.
#[track_caller]
fn all_pinned(driver: &mut Driver) -> bool {
    let refusal = driver.take_registration_refusal();
    if let Some(errno) = refusal {
        let exempt = capabilities(None).unwrap().effective.contains(CapabilitySet::IPC_LOCK);
        assert!(errno == Errno::NOMEM && !exempt, "{errno}");
        eprintln!("skipped in part: RLIMIT_MEMLOCK is used up");
    }
    refusal.is_none()
}

/// One read to its end.
#[track_caller]
fn read(driver: &mut Driver, file: &File, offset: u64, len: usize, buffer: Buffer) -> (u32, Buffer) {
    driver.read(shared(file), offset, len, buffer, Token(1)).unwrap();
    let (completion, buffer) = next(driver);
    assert_eq!(completion.token, Token(1));
    (completion.result.unwrap(), buffer.unwrap())
}

/// Goal:   R1.6: registered and unregistered reads bring the same bytes, the file's, of every class and from every
///         place.
/// Method: two pools and one driver, which registers the first; files on disk and in memory; a look at what is
///         registered.
#[test]
fn r1_6_registered_and_unregistered_reads_bring_the_same_bytes() {
    let content = pattern((1 << 20) + 5000);
    for file in [on_disk(&content), in_memory(&content)] {
        let (first, second) = (staging(), staging());
        let mut driver = driver();
        let mut registered = 0;
        for class in Class::ALL {
            registered += class.size();
            for offset in [0, 1, 4999] {
                for pool in [&first, &second] {
                    let buffer = pool.take(class).unwrap();
                    let (got, buffer) = read(&mut driver, &file, offset, class.size(), buffer);
                    assert_eq!(got as usize, class.size());
                    assert!(
                        buffer.bytes() == &content[offset as usize..][..class.size()],
                        "{class:?} {offset}"
                    );
                }
            }
            if !all_pinned(&mut driver) {
                return;
            }
            assert_eq!((first.registered_bytes(), second.registered_bytes()), (registered, 0));
        }
        let counters = driver.counters();
        assert_eq!((counters.reads, counters.fixed_reads), (18, 9));
    }
}

/// Goal:   a read ends short at the end of the file, and with 0 behind it; what is read is what `bytes` shows.
#[test]
fn reads_end_short_at_the_end_of_the_file() {
    let content = pattern(5000);
    for file in [on_disk(&content), in_memory(&content)] {
        let mut driver = driver();
        let pool = staging();
        let (got, buffer) = read(&mut driver, &file, 0, 4096, pool.take(Class::Small).unwrap());
        assert_eq!((got, buffer.bytes()), (4096, &content[..4096]));
        let (got, buffer) = read(&mut driver, &file, 4096, 4096, buffer);
        assert_eq!((got, buffer.bytes()), (904, &content[4096..]));
        let (got, buffer) = read(&mut driver, &file, 5000, 4096, buffer);
        assert_eq!((got, buffer.bytes()), (0, &[][..]));
        let (got, buffer) = read(&mut driver, &file, 10, 20, buffer);
        assert_eq!((got, buffer.bytes()), (20, &content[10..30]));
        let (got, buffer) = read(&mut driver, &file, 0, usize::MAX, buffer);
        assert_eq!((got, buffer.bytes()), (4096, &content[..4096]), "never more than the buffer holds");
    }
}

/// Goal:   a file that shrinks or grows between two reads is read as it then is, and is no error.
#[test]
fn a_file_that_shrinks_is_read_as_it_is() {
    let content = pattern(100 << 10);
    for file in [on_disk(&content), in_memory(&content)] {
        let mut driver = driver();
        let (got, buffer) = read(&mut driver, &file, 0, 65536, staging().take(Class::Medium).unwrap());
        assert_eq!(got, 65536);
        file.set_len(70_000).unwrap();
        let (got, buffer) = read(&mut driver, &file, 65536, 65536, buffer);
        assert_eq!((got, buffer.bytes()), (70_000 - 65536, &content[65536..70_000]));
        file.set_len(10).unwrap();
        let (got, buffer) = read(&mut driver, &file, 65536, 65536, buffer);
        assert_eq!(got, 0);
        file.write_all_at(b"more", 65536).unwrap();
        let (_, buffer) = read(&mut driver, &file, 65536, 65536, buffer);
        assert_eq!(buffer.bytes(), b"more");
    }
}

/// Goal:   a read that fails says why, shows no bytes, and gives its buffer back.
/// Method: a file that is open for writing only, after a good read into the same buffer.
#[test]
fn a_read_that_fails_shows_no_bytes() {
    let mut driver = driver();
    let pool = staging();
    let (_, buffer) = read(&mut driver, &in_memory(b"something"), 0, 100, pool.take(Class::Small).unwrap());
    assert_eq!(buffer.bytes(), b"something");
    let (_read, write) = pipe().unwrap();
    driver.read(Arc::new(write), 0, 100, buffer, Token(2)).unwrap();
    let (completion, buffer) = next(&mut driver);
    assert_eq!(completion, Completion { token: Token(2), result: Err(Errno::BADF) });
    assert_eq!(buffer.unwrap().bytes(), b"");
}

/// Goal:   the driver keeps a file open until its read has ended: the number of a file closed meanwhile may belong to
///         another by the time of the enter.
/// Method: close it before the enter, and open pipes, whose numbers are the lowest free ones.
#[test]
fn a_file_closed_before_the_enter_is_read_all_the_same() {
    let mut driver = driver();
    let file = in_memory(b"the right one");
    driver.read(Arc::new(file.into()), 0, 100, staging().take(Class::Small).unwrap(), Token(1)).unwrap();
    let others: Vec<_> = (0..50).map(|_| pipe().unwrap()).collect();
    let (completion, buffer) = next(&mut driver);
    assert_eq!((completion.result, buffer.unwrap().bytes()), (Ok(13), &b"the right one"[..]));
    drop(others);
}

/// Goal:   a cancelled read ends with CANCELED and gives its buffer back, registered or not; others of its kind
///         go on.
/// Method: empty pipes, which are read from for ever.
#[test]
fn f37_a_cancelled_read_ends_with_canceled() {
    let mut driver = driver();
    let (registered, plain) = (staging(), staging());
    let (first, write) = pipe().unwrap();
    let (second, _write) = pipe().unwrap();
    let first = Arc::new(first);
    for (token, file, pool) in [(1, &first, &registered), (2, &first, &plain), (3, &Arc::new(second), &plain)]
    {
        driver.read(Arc::clone(file), 0, 4096, pool.take(Class::Small).unwrap(), Token(token)).unwrap();
    }
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);
    for token in [1, 3] {
        driver.cancel(Token(token)).unwrap();
        let (completion, buffer) = next(&mut driver);
        assert_eq!(completion, Completion { token: Token(token), result: Err(Errno::CANCELED) });
        assert_eq!(buffer.unwrap().bytes(), b"");
        driver.cancel(Token(token)).unwrap();
    }
    rustix::io::write(&write, b"still read").unwrap();
    let (completion, buffer) = next(&mut driver);
    assert_eq!((completion.token, buffer.unwrap().bytes()), (Token(2), &b"still read"[..]));
    driver.enter(Wait::No).unwrap();
    assert_eq!(driver.next_completion(), None);
}

/// Goal:   a buffer that nobody takes goes back to its pool, and not before its read has ended.
/// Method: two reads, whose buffers are not taken, of a pipe with something and one with nothing in it.
#[test]
fn a_buffer_that_is_not_taken_goes_back() {
    let mut driver = driver();
    let pool = staging();
    let (full, fill) = pipe().unwrap();
    let (empty, _write) = pipe().unwrap();
    rustix::io::write(&fill, b"x").unwrap();
    for (token, file) in [(1, full), (2, empty)] {
        driver.read(Arc::new(file), 0, 10, pool.take(Class::Medium).unwrap(), Token(token)).unwrap();
    }
    assert!(pool.take(Class::Medium).is_none());
    driver.enter(Wait::Until(Some(PATIENCE))).unwrap();
    assert_eq!(driver.next_completion(), Some(Completion { token: Token(1), result: Ok(1) }));
    assert_eq!(pool.free(Class::Medium), 0, "it can still be taken");
    assert_eq!(driver.next_completion(), None);
    assert_eq!(pool.free(Class::Medium), 1);
    driver.cancel(Token(2)).unwrap();
    let (_, buffer) = next(&mut driver);
    drop(buffer);
    assert_eq!(pool.free(Class::Medium), 2);
}

/// Goal:   as many reads as there are buffers can be in flight, whatever the size of the ring; each brings its own
///         bytes into its own buffer; one more buffer is not to be had, which is a value (F35).
#[test]
fn r1_6_f35_many_reads_are_in_flight_at_once() {
    let content = pattern(100 * 4096);
    let counts = Counts { small: 100, medium: 4, large: 2 };
    for file in [on_disk(&content), in_memory(&content)] {
        let mut driver =
            Driver::new(&Options { entries: 8, completion_entries: 16, restrict: true }).unwrap();
        let pool = Staging::new(counts).unwrap();
        for round in 0..3 {
            let mut expected = HashMap::new();
            for class in Class::ALL {
                while let Some(buffer) = pool.take(class) {
                    let number = expected.len() as u64;
                    let offset = number * 4096 / 2 + round;
                    expected.insert(Token(number), offset as usize);
                    driver.read(shared(&file), offset, 4096, buffer, Token(number)).unwrap();
                }
            }
            assert_eq!(expected.len(), 106);
            while !expected.is_empty() {
                let (completion, buffer) = next(&mut driver);
                let offset = expected.remove(&completion.token).unwrap();
                assert!(buffer.unwrap().bytes() == &content[offset..][..4096], "{completion:?}");
            }
            assert_eq!(Class::ALL.map(|class| pool.free(class)), [100, 4, 2]);
        }
        assert!(!all_pinned(&mut driver) || driver.counters().fixed_reads == 3 * 106);
    }
}

/// Goal:   dropping a driver ends its reads before it returns: no byte arrives in a buffer afterwards, and none is
///         taken from a file. The buffers are the pool's again, and another driver registers them anew.
/// Method: reads of an empty pipe, registered or not, submitted or not; then write to the pipe.
#[test]
fn a_driver_that_goes_ends_its_reads() {
    let (registered, plain) = (staging(), staging());
    let (read_end, write) = pipe().unwrap();
    let read_end = Arc::new(read_end);
    let start = monotonic_now();
    let mut driver = driver();
    for pool in [&registered, &plain] {
        driver.read(Arc::clone(&read_end), 0, 4096, pool.take(Class::Small).unwrap(), Token(1)).unwrap();
    }
    driver.enter(Wait::No).unwrap();
    for pool in [&registered, &plain] {
        driver.read(Arc::clone(&read_end), 0, 4096, pool.take(Class::Large).unwrap(), Token(1)).unwrap();
    }
    assert!(!all_pinned(&mut driver) || registered.registered_bytes() == (4 << 10) + (1 << 20));
    drop(driver);
    assert!(monotonic_now() < start + PATIENCE);
    assert_eq!(Arc::strong_count(&read_end), 1);
    assert_eq!(registered.registered_bytes(), 0);
    rustix::io::write(&write, b"for the next one").unwrap();
    for pool in [&registered, &plain] {
        for class in [Class::Small, Class::Large] {
            let mut held = Vec::new();
            while let Some(mut buffer) = pool.take(class) {
                assert!(buffer.whole().iter().all(|byte| *byte == 0));
                held.push(buffer);
            }
            assert_eq!(held.len(), if class == Class::Small { 4 } else { 1 });
        }
    }

    let mut driver = self::driver();
    driver.read(read_end, 0, 4096, registered.take(Class::Small).unwrap(), Token(1)).unwrap();
    let (_, buffer) = next(&mut driver);
    assert_eq!(buffer.unwrap().bytes(), b"for the next one");
    let fixed = (registered.registered_bytes(), driver.counters().fixed_reads);
    assert!(!all_pinned(&mut driver) || fixed == (4096, 1), "{fixed:?}");
}

/// Goal:   the kernel does not write to a buffer any more once the driver that had it read into has gone.
/// Method: drop a driver while threads of the kernel copy for it, use the buffers for something else, and let
///         another driver read as much meanwhile: what was written stays.
#[test]
fn a_driver_that_goes_waits_for_what_the_kernel_writes() {
    let file = in_memory(&vec![0xff; 1 << 20]);
    let counts = Counts { small: 0, medium: 0, large: 9 };
    let (registered, plain) = (Staging::new(counts).unwrap(), Staging::new(counts).unwrap());
    for round in 0..10 {
        let mut driver = driver();
        for token in 0..8 {
            // The first read decides which pool is registered.
            let pool = if (round + token) % 2 == 0 { &registered } else { &plain };
            driver.read(shared(&file), 0, 1 << 20, pool.take(Class::Large).unwrap(), Token(token)).unwrap();
        }
        driver.enter(Wait::No).unwrap();
        drop(driver);
        let mut held = Vec::new();
        for pool in [&registered, &plain] {
            while pool.free(Class::Large) > 1 {
                let mut buffer = pool.take(Class::Large).unwrap();
                buffer.whole().fill(0);
                held.push(buffer);
            }
        }
        assert_eq!(held.len(), 16);
        let last = plain.take(Class::Large).unwrap();
        assert_eq!(read(&mut self::driver(), &file, 0, 1 << 20, last).0, 1 << 20);
        assert!(held.iter_mut().all(|buffer| buffer.whole().iter().all(|byte| *byte == 0)), "round {round}");
    }
}

/// Goal:   R5.3: buffers unused between two trims are no longer registered and have no memory; used again, they
///         are registered again, and what is read into them is seen. (Pages given back while they are registered
///         would part the buffer from what the kernel writes to.)
/// Method: read, trim twice, read something else.
#[test]
fn r5_3_trimmed_buffers_can_be_used_again() {
    let mut driver = driver();
    let (pool, other) = (staging(), staging());
    let read_all = |driver: &mut Driver, content: &[u8]| {
        for pool in [&pool, &other] {
            for class in Class::ALL {
                let (_, buffer) =
                    read(driver, &in_memory(content), 0, class.size(), pool.take(class).unwrap());
                assert!(buffer.bytes() == &content[..class.size()]);
            }
        }
    };
    let all = (4 << 10) + (64 << 10) + (1 << 20);
    let mut pinned = true;
    for round in 1..=3 {
        let mut content = pattern(1 << 20);
        content.iter_mut().for_each(|byte| *byte = byte.wrapping_add(round));
        read_all(&mut driver, &content);
        pinned &= all_pinned(&mut driver);
        assert!(!pinned || pool.registered_bytes() == all);
        assert_eq!(pool.made_bytes(), all);
        assert_eq!(driver.trim(&pool), Ok(0), "used since the last one");
        assert_eq!(driver.trim(&pool), Ok(all));
        assert_eq!(driver.trim(&pool), Ok(0));
        assert_eq!((pool.registered_bytes(), pool.made_bytes()), (0, 0));
        assert_eq!(driver.trim(&other), Ok(0));
        assert_eq!(driver.trim(&other), Ok(all));
    }
    assert!(!pinned || driver.counters().fixed_reads == 9);
}

/// Goal:   tokens that would be misread are refused before anything is queued, and the buffer is not lost.
#[test]
fn reserved_tokens_are_refused() {
    let mut driver = driver();
    let pool = staging();
    for reserved in [Token(u64::MAX), Token(Token::LAST.0 + 1)] {
        let refused = driver.read(shared(&in_memory(b"")), 0, 1, pool.take(Class::Large).unwrap(), reserved);
        assert_eq!(refused, Err(DriverError::Reserved(reserved)));
    }
    assert!(!driver.pending());
    assert_eq!(pool.free(Class::Large), 1);
    let (got, _) = {
        driver.read(shared(&in_memory(b"x")), 0, 1, pool.take(Class::Large).unwrap(), Token::LAST).unwrap();
        next(&mut driver)
    };
    assert_eq!(got, Completion { token: Token::LAST, result: Ok(1) });
}

/// The variable that tells a copy of this program to play the part of the next test's child.
const CHILD: &str = "DOORBELL_TEST_MEMLOCK";
/// Another user than root, who is exempt from the limit.
const NOBODY: u32 = 65534;

/// Goal:   F40: where RLIMIT_MEMLOCK refuses to pin the buffers, reads go on unregistered, and this is told once.
/// Method: a child process that is not root and may pin nothing.
#[test]
fn f40_without_locked_memory_reads_go_on_unregistered() {
    if std::env::var_os(CHILD).is_some() {
        return refused_registration();
    }
    let root = rustix::process::geteuid().is_root();
    let own = std::env::current_exe().unwrap();
    let copy = root.then(|| Copy::of(&own));
    let mut child = Command::new(copy.as_ref().map_or(own.as_path(), |copy| copy.program.as_path()));
    if root {
        child.uid(NOBODY).gid(NOBODY);
    }
    child.args(["--exact", "f40_without_locked_memory_reads_go_on_unregistered", "--nocapture"]);
    let output = child.env(CHILD, "1").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("read unregistered"), "{output:?}");
}

/// The child's part.
fn refused_registration() {
    // The ring first: some kernels count its memory against the same limit.
    let mut driver = driver();
    setrlimit(Resource::Memlock, Rlimit { current: Some(0), maximum: Some(0) }).unwrap();
    let content = pattern(1 << 20);
    let pool = staging();
    for class in [Class::Medium, Class::Small, Class::Large] {
        let buffer = pool.take(class).unwrap();
        let (_, buffer) = read(&mut driver, &in_memory(&content), 0, class.size(), buffer);
        assert!(buffer.bytes() == &content[..class.size()]);
    }
    assert_eq!(driver.take_registration_refusal(), Some(Errno::NOMEM));
    assert_eq!(driver.take_registration_refusal(), None, "told once");
    assert_eq!((pool.registered_bytes(), driver.counters().fixed_reads), (0, 0));
    assert_eq!((driver.trim(&pool), driver.trim(&pool)), (Ok(0), Ok((4 << 10) + (64 << 10) + (1 << 20))));
    println!("read unregistered");
}

/// A copy of this program that any user may run, for the time of a test.
struct Copy {
    directory: PathBuf,
    program: PathBuf,
}

impl Copy {
    fn of(program: &Path) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("doorbell-memlock-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let copy = Self { program: directory.join("copy"), directory };
        // Copied by another process: a descriptor of ours that writes it might live on for a moment in a child that
        // another test forks, and nobody could run the copy until then.
        assert!(Command::new("cp").args([program, &copy.program]).status().unwrap().success());
        for path in [&copy.program, &copy.directory] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        copy
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

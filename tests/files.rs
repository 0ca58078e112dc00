//! Files that clients ask about: which may be opened, and reading them through a real ring.

mod common;

use common::TestDir;
use common::process::{NOBODY, has_io_uring, is_root};
use doorbell::config::FILE_READS_MAX;
use doorbell::files::{Analysis, Ended, FileError, FileReads, Opened, ReadId, Roots};
use doorbell::{BufferPool, IpcError};
use doorbell_uring::{Class, Driver, Options, Token, Wait};
use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_getfl, inotify, mknodat};
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

fn roots(directories: &[&Path]) -> Roots {
    let directories: Vec<PathBuf> = directories.iter().map(|path| path.to_path_buf()).collect();
    Roots::open(&directories, LIMIT).unwrap()
}

/// What the file holds that `path` leads to.
#[track_caller]
fn content(roots: &Roots, path: impl AsRef<Path>) -> Vec<u8> {
    let Opened { path: named, file, size } = roots.open_file(path.as_ref()).unwrap();
    assert_eq!(named, path.as_ref());
    let mut bytes = vec![0; LIMIT as usize];
    let len = rustix::io::pread(&file, &mut bytes, 0).unwrap();
    assert_eq!(len as u64, size);
    bytes.truncate(len);
    bytes
}

/// Why `path` is refused; the text names it.
#[track_caller]
fn refusal(roots: &Roots, path: impl AsRef<Path>) -> FileError {
    let error = roots.open_file(path.as_ref()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{:?} ", path.as_ref())), "{error}");
    error
}

/// Goal:   R2.11: without configured directories no file is read, and a client is told what to do.
#[test]
fn r2_11_without_roots_no_file_is_read() {
    for roots in [Roots::none(), roots(&[])] {
        let error = refusal(&roots, "/etc/hostname");
        assert!(matches!(error, FileError::NoRoots { .. }) && error.to_string().contains("`file_roots`"));
    }
}

/// Goal:   R2.11: files beneath a root are found by absolute and relative paths, whatever the spelling of the path
///         and of the root.
/// Method: two roots, one of them named through a link; links that stay beneath.
#[test]
fn r2_11_files_beneath_a_root_are_found() {
    let directory = TestDir::new();
    let (first, second, link) = (directory.join("first"), directory.join("second"), directory.join("link"));
    std::fs::create_dir_all(first.join("sub/deep")).unwrap();
    std::fs::create_dir(&second).unwrap();
    symlink(&second, &link).unwrap();
    std::fs::write(first.join("sub/a"), "a").unwrap();
    std::fs::write(first.join("both"), "of the first").unwrap();
    std::fs::write(second.join("both"), "of the second").unwrap();
    std::fs::write(second.join("b"), "b").unwrap();
    symlink("sub/../sub/a", first.join("inside")).unwrap();
    let roots = roots(&[&first, &link]);

    assert_eq!(content(&roots, first.join("sub/a")), b"a");
    assert_eq!(content(&roots, first.join("sub//./deep/../a")), b"a");
    assert_eq!(content(&roots, first.join("inside")), b"a");
    assert_eq!(content(&roots, link.join("b")), b"b");
    assert_eq!(content(&roots, second.join("b")), b"b", "the root by its own name");
    assert_eq!(content(&roots, "sub/a"), b"a");
    assert_eq!(content(&roots, "b"), b"b", "beneath the second root");
    assert_eq!(content(&roots, "both"), b"of the first");
    assert_eq!(content(&roots, link.join("both")), b"of the second");

    // The directories stay open: what is at their names later is of no account.
    std::fs::rename(&first, directory.join("renamed")).unwrap();
    assert_eq!(content(&roots, first.join("sub/a")), b"a");
}

/// Goal:   R2.11: no path leads out of the roots.
/// Method: every way out that there is, to a file that exists.
#[test]
fn r2_11_no_path_leads_out_of_the_roots() {
    let directory = TestDir::new();
    let (root, secret) = (directory.join("root"), directory.join("secret"));
    std::fs::create_dir_all(root.join("sub")).unwrap();
    std::fs::create_dir(directory.join("root-not")).unwrap();
    std::fs::write(&secret, "secret").unwrap();
    std::fs::write(directory.join("root-not/secret"), "secret").unwrap();
    symlink(&secret, root.join("absolute")).unwrap();
    symlink("../secret", root.join("relative")).unwrap();
    symlink("..", root.join("sub/up")).unwrap();
    symlink("/", root.join("top")).unwrap();
    let one = roots(&[&root]);

    for path in [
        secret.clone(),
        directory.join("root-not/secret"),
        root.join("../secret"),
        root.join("sub/../../secret"),
        root.join("absolute"),
        root.join("relative"),
        root.join("sub/up/../secret"),
        root.join("top").join(secret.strip_prefix("/").unwrap()),
        "../secret".into(),
        "absolute".into(),
        "/etc/passwd".into(),
    ] {
        let error = refusal(&one, &path);
        assert!(matches!(error, FileError::Outside { .. }), "{error}");
        assert!(error.to_string().contains("`file_roots`"), "{error}");
    }
    assert!(matches!(refusal(&one, root.join("sub/up/nothing")), FileError::NotFound { .. }));

    let process = roots(&[Path::new("/proc/self")]);
    for magic in ["root/etc/passwd", "cwd/Cargo.toml", "/proc/self/exe"] {
        let error = refusal(&process, magic);
        assert!(matches!(error, FileError::Links { .. } | FileError::Outside { .. }), "{error}");
    }
    symlink("loop", root.join("loop")).unwrap();
    assert!(matches!(refusal(&one, "loop"), FileError::Links { .. }));

    // What is outside of one root may be beneath another.
    let both = roots(&[&root.join("sub"), &root, &directory.0]);
    assert_eq!(content(&both, root.join("sub/../../secret")), b"secret");
}

/// Goal:   R2.11: what is no regular file, or not there, is refused by kind.
/// Method: one of each.
#[test]
fn r2_11_what_is_no_file_is_refused_by_kind() {
    let directory = TestDir::new();
    let roots = roots(&[&directory.0, Path::new("/dev")]);
    std::fs::create_dir(directory.join("sub")).unwrap();
    std::fs::write(directory.join("file"), "x").unwrap();
    let _listener = UnixListener::bind(directory.join("socket")).unwrap();
    let kind = |path: &Path| match refusal(&roots, path) {
        FileError::NotAFile { kind, .. } => kind,
        other => panic!("{other}"),
    };
    assert_eq!(kind(&directory.join("sub")), "a directory");
    assert_eq!(kind(&directory.0), "a directory");
    assert_eq!(kind(Path::new(".")), "a directory");
    assert_eq!(kind(&directory.join("socket")), "a socket");
    assert_eq!(kind(Path::new("/dev/null")), "a device");
    for missing in ["none", "sub/none", "file/below"] {
        let error = refusal(&roots, directory.join(missing));
        assert!(matches!(error, FileError::NotFound { .. }), "{error}");
    }
    assert!(matches!(refusal(&roots, "a\0b"), FileError::NotFound { .. }));
    let long = refusal(&roots, "x".repeat(300));
    assert!(matches!(long, FileError::Os { call: "openat2", .. }), "{long}");
}

/// Goal:   a FIFO is refused without being opened: whoever waits for a reader is not let down.
/// Method: inotify tells of every open.
#[test]
fn r2_11_a_fifo_is_refused_unopened() {
    let directory = TestDir::new();
    let fifo = directory.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, &fifo, inotify::WatchFlags::OPEN).unwrap();
    let opens = || {
        let mut bytes = [MaybeUninit::uninit(); 512];
        inotify::Reader::new(&watch, &mut bytes).next().map(drop)
    };
    let error = refusal(&roots(&[&directory.0]), "fifo");
    assert!(matches!(error, FileError::NotAFile { kind: "a FIFO", .. }), "{error}");
    assert_eq!(opens(), Err(rustix::io::Errno::AGAIN));
    rustix::fs::open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    assert_eq!(opens(), Ok(()), "the watch works");
}

/// Goal:   R2.11: a file that is too long, or that the server may not read, is refused with the numbers.
/// Method: one byte more than the limit; a thread that is another user.
#[test]
fn r2_11_too_long_or_not_permitted() {
    let directory = TestDir::new();
    let roots = Roots::open(std::slice::from_ref(&directory.0), 5).unwrap();
    std::fs::write(directory.join("fits"), "12345").unwrap();
    std::fs::write(directory.join("long"), "123456").unwrap();
    assert_eq!(content(&roots, "fits"), b"12345");
    assert_eq!(refusal(&roots, "long"), FileError::TooLarge { path: "long".into(), size: 6, limit: 5 });

    std::fs::set_permissions(directory.join("fits"), std::fs::Permissions::from_mode(0o000)).unwrap();
    std::fs::set_permissions(&directory.0, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if is_root("root reads whatever it likes") {
                // Of this thread alone: rustix calls the kernel, not the C library.
                rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(NOBODY)).unwrap();
            }
            refusal(&roots, "fits")
        });
        thread.join().unwrap()
    });
    assert!(matches!(error, FileError::NotPermitted { .. }), "{error}");
}

/// Goal:   a file is opened so that the ring does not read it within the enter where that blocks.
/// Method: its flags.
#[test]
fn r2_11_files_are_opened_for_blocking_reads() {
    let directory = TestDir::new();
    std::fs::write(directory.join("file"), "x").unwrap();
    let opened = roots(&[&directory.0]).open_file(Path::new("file")).unwrap();
    let flags = fcntl_getfl(&opened.file).unwrap();
    assert!(!flags.contains(OFlags::NONBLOCK), "{flags:?}");
    assert!(rustix::io::write(&opened.file, b"y").is_err());
}

/// Goal:   a root that cannot be had is a configuration error that names it.
#[test]
fn r2_11_a_root_that_cannot_be_had_is_named() {
    let directory = TestDir::new();
    std::fs::write(directory.join("file"), "x").unwrap();
    for (path, problem) in [
        (PathBuf::from("relative/path"), "not an absolute path"),
        (directory.join("none"), "No such file"),
        (directory.join("file"), "Not a directory"),
    ] {
        let error = Roots::open(std::slice::from_ref(&path), 1).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, IpcError::Config(_)) && text.contains("file_roots"), "{text}");
        assert!(text.contains(path.to_str().unwrap()) && text.contains(problem), "{text}");
    }
}

/// A reactor's worth of reading: a ring, a pool, the files, and a loop that takes completions.
struct Bench {
    directory: TestDir,
    roots: Roots,
    driver: Driver,
    pool: BufferPool,
    reads: FileReads<u32>,
}

fn token(id: ReadId) -> Token {
    Token(9 << 60 | u64::from(id.generation) << 32 | u64::from(id.index))
}

impl Bench {
    fn new(pool: BufferPool) -> Self {
        let options = Options { entries: 8, completion_entries: 64, restrict: true };
        // Where a ring is refused (`ci/fallback.sh`), the driver that servers have then.
        let driver = match has_io_uring("reads by the ring") {
            true => Driver::new(&options).map_err(|e| e.to_string()),
            false => Driver::epoll(Token(u32::MAX.into())).map_err(|e| e.to_string()),
        };
        Self::with(driver.unwrap(), pool)
    }

    fn with(driver: Driver, pool: BufferPool) -> Self {
        let directory = TestDir::new();
        Self { roots: roots(&[&directory.0]), directory, driver, pool, reads: FileReads::new(token) }
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.directory.join(name), bytes).unwrap();
    }

    fn begin(&mut self, name: &str, ticket: u32) -> Option<Ended<u32>> {
        self.reads.begin(&self.roots, Path::new(name), ticket, &mut self.pool, &mut self.driver).unwrap()
    }

    /// Takes the completions that are there; `true` if there were any.
    fn take(&mut self, ended: &mut Vec<Ended<u32>>) -> bool {
        let mut any = false;
        while let Some(completion) = self.driver.next_completion() {
            any = true;
            let index = completion.token.0 as u32;
            let generation = (completion.token.0 >> 32) as u32 & ((1 << 28) - 1);
            let id = ReadId { index, generation };
            ended.extend(
                self.reads.completed(id, completion.result, &mut self.pool, &mut self.driver).unwrap(),
            );
        }
        any
    }

    /// Runs until no file is left.
    fn run(&mut self) -> Vec<Ended<u32>> {
        let mut ended = Vec::new();
        while !self.reads.is_empty() {
            self.driver.enter(Wait::Until(Some(PATIENCE))).unwrap();
            assert!(self.take(&mut ended), "no read ends: {:?}", self.reads);
        }
        ended
    }
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) * 31 + i / 251) as u8).collect()
}

/// Reads files of sizes around those of the buffers, many at a time, twice.
fn every_file_twice(bench: &mut Bench) {
    let sizes = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 131_072, 300_001, 1 << 20];
    let files: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(seed, len)| bytes(*len, seed)).collect();
    for (number, content) in files.iter().enumerate() {
        bench.write(&number.to_string(), content);
    }
    for _ in 0..2 {
        for number in 0..files.len() {
            assert!(bench.begin(&number.to_string(), number as u32).is_none());
        }
        assert!(bench.reads.waiting() > 0, "more files than buffers of 64 KiB");
        let mut answers: HashMap<u32, _> =
            bench.run().into_iter().map(|ended| (ended.ticket, ended.result)).collect();
        for (number, content) in files.iter().enumerate() {
            let facts = answers.remove(&(number as u32)).unwrap().unwrap();
            assert!(facts == Analysis::of(content), "{} bytes: {facts:?}", content.len());
        }
        assert!(answers.is_empty());
    }
}

/// Goal:   F38, R2.11: the same without io_uring.
#[test]
fn f38_files_are_read_without_a_ring() {
    let mut bench = Bench::with(Driver::epoll(Token(u32::MAX.into())).unwrap(), BufferPool::new());
    every_file_twice(&mut bench);
    let counters = bench.driver.counters();
    assert!(counters.reads > 0 && counters.fixed_reads == 0);
    for _ in 0..2 {
        bench.pool.trim(&mut bench.driver).unwrap();
    }
    assert_eq!(bench.pool.staged_bytes(), 0, "no buffer is held");
}

/// Goal:   R2.11, R1.6: files of every size are read through registered buffers, many at a time, and the answer is
///         that of the whole file; all buffers are free again.
/// Method: sizes around those of the buffers, twice.
#[test]
fn r2_11_r1_6_files_are_read_through_registered_buffers() {
    if !has_io_uring("registered buffers") {
        return;
    }
    let mut bench = Bench::new(BufferPool::new());
    every_file_twice(&mut bench);
    let counters = bench.driver.counters();
    match bench.driver.take_registration_refusal() {
        None => assert_eq!(counters.reads, counters.fixed_reads),
        Some(_) => assert!(!is_root("RLIMIT_MEMLOCK is used up")),
    }
    bench.pool.trim(&mut bench.driver).unwrap();
    bench.pool.trim(&mut bench.driver).unwrap();
    assert_eq!(bench.pool.staged_bytes(), 0, "no buffer is held");
}

/// Goal:   R2.11: a file that cannot be read has ended at once, with its ticket.
#[test]
fn r2_11_a_file_that_cannot_be_read_ends_at_once() {
    let mut bench = Bench::new(BufferPool::new());
    let Ended { ticket, result, .. } = bench.begin("none", 7).unwrap();
    assert_eq!((ticket, result), (7, Err(FileError::NotFound { path: "none".into() })));
    assert!(bench.reads.is_empty());
    assert_eq!(bench.pool.staged_bytes(), 0);
}

/// Goal:   S12: files wait for buffers of their class, in their order, and only so many; one more is refused.
/// Method: one small buffer, as many files as may be, and one more.
#[test]
fn s12_files_wait_for_buffers_and_not_too_many_of_them() {
    let mut bench = Bench::new(BufferPool::sized(1));
    bench.write("small", b"small");
    bench.write("long", &bytes(5000, 0));
    for ticket in 0..FILE_READS_MAX as u32 - 1 {
        assert!(bench.begin("small", ticket).is_none());
    }
    assert!(bench.begin("long", 100).is_none());
    assert_eq!(bench.reads.waiting(), FILE_READS_MAX - 2, "the long one waits for none of the small ones");
    let refused = bench.begin("small", 200).unwrap();
    assert_eq!(refused.result, Err(FileError::Busy { path: "small".into(), limit: FILE_READS_MAX }));
    let order: Vec<u32> =
        bench.run().iter().map(|ended| ended.ticket).filter(|ticket| *ticket < 100).collect();
    assert_eq!(order, (0..FILE_READS_MAX as u32 - 1).collect::<Vec<_>>());
    assert!(bench.begin("small", 1).is_none());
    assert!(bench.run()[0].result.is_ok());
}

/// Goal:   files wait also while somebody else holds the buffers, go on when told that these are back, whoever
///         waits for another class, and are overtaken by none of their own.
#[test]
fn files_wait_for_buffers_that_others_hold() {
    let mut bench = Bench::new(BufferPool::sized(1));
    bench.write("small", b"small");
    bench.write("long", &bytes(5000, 0));
    let small = bench.pool.buffer(Class::Small).unwrap();
    let mut medium = Vec::new();
    while let Some(buffer) = bench.pool.buffer(Class::Medium).unwrap() {
        medium.push(buffer);
    }
    assert!(small.is_some() && bench.begin("small", 1).is_none() && bench.begin("long", 2).is_none());
    bench.reads.go_on(&mut bench.pool, &mut bench.driver).unwrap();
    assert_eq!(bench.reads.waiting(), 2);
    drop(medium);
    bench.reads.go_on(&mut bench.pool, &mut bench.driver).unwrap();
    assert_eq!(bench.reads.waiting(), 1);
    drop(small);
    assert!(bench.begin("small", 3).is_none());
    assert_eq!(bench.reads.waiting(), 2, "the one that came first has the buffer");
    bench.reads.go_on(&mut bench.pool, &mut bench.driver).unwrap();
    let mut tickets: Vec<u32> = bench.run().iter().map(|ended| ended.ticket).collect();
    tickets.retain(|ticket| *ticket != 2);
    assert_eq!(tickets, [1, 3]);
}

/// Goal:   F5, S10: of files that were given up nothing is heard any more, whether they waited or were being read;
///         their buffers serve others, and their late completions meet nobody.
/// Method: give some up before and after the enter; begin others at once, in the same places.
#[test]
fn f5_s10_files_that_are_given_up_are_never_heard_of_again() {
    let mut bench = Bench::new(BufferPool::sized(1));
    bench.write("small", b"small");
    bench.write("long", &bytes(200_000, 1));
    for round in 0..20 {
        for ticket in 0..3 {
            assert!(bench.begin("small", ticket).is_none());
            assert!(bench.begin("long", 10 + ticket).is_none());
        }
        if round % 2 == 0 {
            bench.driver.enter(Wait::No).unwrap();
        }
        bench.reads.give_up(&mut bench.driver, |ticket| [0, 2, 11].contains(ticket)).unwrap();
        assert_eq!(bench.reads.len(), 3);
        for ticket in [20, 21] {
            assert!(bench.begin("small", ticket).is_none());
        }
        let mut tickets: Vec<u32> = bench
            .run()
            .into_iter()
            .map(|ended| {
                assert_eq!(ended.result.unwrap().size, if ended.ticket / 10 == 1 { 200_000 } else { 5 });
                ended.ticket
            })
            .collect();
        tickets.sort_unstable();
        assert_eq!(tickets, [1, 10, 12, 20, 21]);
        // One of the three had waited, and had nothing that could be cancelled.
        assert_eq!(bench.driver.counters().cancels, 2 * (round + 1));
    }
    assert!(bench.begin("small", 1).is_none());
    bench.reads.give_up(&mut bench.driver, |_| true).unwrap();
    // Its completion is taken, and its buffer comes back.
    let mut ended = Vec::new();
    while bench.pool.buffer(Class::Small).unwrap().is_none() {
        bench.driver.enter(Wait::Until(Some(PATIENCE))).unwrap();
        assert!(bench.take(&mut ended));
    }
    assert!(ended.is_empty());
}

/// Goal:   R2.11: a file that shrinks or grows while it is read is told with both sizes.
/// Method: change it between its first read and the second.
#[test]
fn r2_11_a_file_that_changes_while_it_is_read_is_told() {
    for (size, found) in [(70_000, 70_000), (65_536, 65_536), (10, 65_536), (300_000, 200_001)] {
        let mut bench = Bench::new(BufferPool::new());
        bench.write("file", &bytes(200_000, 0));
        assert!(bench.begin("file", 1).is_none());
        let mut ended = Vec::new();
        bench.driver.enter(Wait::Until(Some(PATIENCE))).unwrap();
        assert!(bench.take(&mut ended) && ended.is_empty());
        let file = std::fs::File::options().write(true).open(bench.directory.join("file")).unwrap();
        file.set_len(size).unwrap();
        let error = bench.run().remove(0).result.unwrap_err();
        assert_eq!(error, FileError::Changed { path: "file".into(), opened: 200_000, found });
    }
}

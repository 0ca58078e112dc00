//! Memory of the server: what is resident in it, and what exists on its account without being resident.
//!
//! Footprint = resident set of the server + every page of its sessions' segments that exists and is not in
//! that resident set already (trap 24). Segments are memfds; their allocated blocks are exact.

use super::procfs::field;
use rustix::fs::{CWD, Mode, OFlags};
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// How the segments' memfds are called in `/proc`.
const SEGMENT: &str = "/memfd:doorbell-session";
const INTERVAL: Duration = Duration::from_millis(50);

/// Bytes, at one moment or at the highest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident set of the server.
    pub rss: u64,
    /// Allocated pages of all segments.
    pub shared: u64,
    /// Both, pages that are in both counted once.
    pub footprint: u64,
}

impl Memory {
    fn peak(self, other: Self) -> Self {
        Self {
            rss: self.rss.max(other.rss),
            shared: self.shared.max(other.shared),
            footprint: self.footprint.max(other.footprint),
        }
    }
}

/// What the sum needs besides the server's process id: the allocated bytes of all segments.
pub trait SharedBytesOf: Send + 'static {
    /// Allocated bytes now.
    fn bytes(&mut self) -> u64;
}

impl<F: FnMut() -> u64 + Send + 'static> SharedBytesOf for F {
    fn bytes(&mut self) -> u64 {
        self()
    }
}

/// The segments that some processes hold open, found through `/proc` and kept open.
#[derive(Debug, Default)]
pub struct Segments {
    fds: Vec<OwnedFd>,
}

impl Segments {
    /// Looks through the descriptors of the processes; each segment counts once, however many hold it.
    pub fn of(pids: &[u32]) -> Self {
        let mut seen = HashSet::new();
        let paths = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten());
        let is_segment = |path: &std::path::Path| {
            fs::read_link(path)
                .is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(SEGMENT.as_bytes()))
        };
        let fds = paths
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|path| is_segment(path))
            .filter_map(|path| {
                rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()
            })
            .filter(|fd| rustix::fs::fstat(fd).is_ok_and(|stat| seen.insert((stat.st_dev, stat.st_ino))))
            .collect();
        Self { fds }
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.fds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.fds.is_empty()
    }
}

impl SharedBytesOf for Segments {
    fn bytes(&mut self) -> u64 {
        // `st_blocks` counts 512 bytes, whatever the block size.
        self.fds
            .iter()
            .filter_map(|fd| rustix::fs::fstat(fd).ok())
            .map(|stat| stat.st_blocks as u64 * 512)
            .sum()
    }
}

/// Takes samples of one server.
pub struct Probe<S> {
    pid: u32,
    shared: S,
    last: Option<(u64, u64, u64)>,
}

impl<S: SharedBytesOf> Probe<S> {
    /// For server `pid` and the segments behind `shared`.
    pub fn new(pid: u32, shared: S) -> Self {
        Self { pid, shared, last: None }
    }

    /// Measures now; `None` if the kernel does not let us see, or the server is gone.
    ///
    /// Cost: `smaps_rollup` and a stat per segment; the long `smaps` is read only if one of the two sums
    /// has changed since the last sample, so that a steady run is not disturbed.
    pub fn sample(&mut self) -> Option<Memory> {
        let rss = resident(&fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).ok()?)?;
        let shared = self.shared.bytes();
        let both = match self.last {
            Some((last_rss, last_shared, both)) if (last_rss, last_shared) == (rss, shared) => both,
            _ if shared == 0 => 0,
            _ => resident_segments(&fs::read_to_string(format!("/proc/{}/smaps", self.pid)).ok()?),
        };
        self.last = Some((rss, shared, both));
        Some(Memory { rss, shared, footprint: rss + shared.saturating_sub(both) })
    }
}

/// The resident set in a `smaps_rollup`, bytes.
fn resident(rollup: &str) -> Option<u64> {
    field(rollup, "Rss:").map(|kib| kib * 1024)
}

/// The resident part of all segments in an `smaps`, bytes.
fn resident_segments(smaps: &str) -> u64 {
    let mut inside = false;
    let mut sum = 0;
    for line in smaps.lines() {
        // A field is "Name: value"; anything else is the head of the next mapping.
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = line.contains(SEGMENT);
        } else if inside && first == "Rss:" {
            sum += field(line, "Rss:").unwrap_or_default() * 1024;
        }
    }
    sum
}

/// A thread that samples every 50 ms and keeps the peaks.
pub struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<Option<Memory>>,
}

impl Sampler {
    /// Starts sampling.
    pub fn start<S: SharedBytesOf>(mut probe: Probe<S>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut peak = None;
            loop {
                if let Some(now) = probe.sample() {
                    peak = Some(now.peak(peak.unwrap_or_default()));
                }
                if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return peak;
                }
            }
        });
        Self { stop, thread }
    }

    /// Stops sampling; the peaks, each its own, or `None` if there was never anything to see.
    pub fn stop(self) -> Option<Memory> {
        drop(self.stop);
        self.thread.join().expect("the sampler does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0a00000-55d0c0b00000 r-xp 00000000 fe:00 123 /usr/bin/doorbell
Size:               1024 kB
Rss:                 600 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000040000 rw-s 00000000 00:01 1025 /memfd:doorbell-session (deleted)
Size:                256 kB
Rss:                   8 kB
Pss:                   4 kB
VmFlags: rd wr sh
7f0000040000-7f0000080000 rw-s 00000000 00:01 1026 /memfd:doorbell-session (deleted)
Rss:                  12 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  16 kB
";

    #[test]
    fn trap24_only_segments_count_as_resident_shared_memory() {
        assert_eq!(resident_segments(SMAPS), 20 * 1024);
        assert_eq!(resident_segments(""), 0);
    }

    #[test]
    fn the_rollup_holds_the_resident_set() {
        let rollup = "55d0c0a00000-7ffd00021000 ---p 00000000 00:00 0 [rollup]\nRss:  960 kB\nPss:  800 kB\n";
        assert_eq!(resident(rollup), Some(960 * 1024));
        assert_eq!(resident("Pss: 3 kB\n"), None);
    }

    #[test]
    fn peaks_are_kept_each_for_itself() {
        let a = Memory { rss: 5, shared: 1, footprint: 6 };
        let b = Memory { rss: 3, shared: 4, footprint: 7 };
        assert_eq!(a.peak(b), Memory { rss: 5, shared: 4, footprint: 7 });
    }

    /// Goal:   pages that exist but are not mapped by the server are counted, once.
    /// Method: this process holds a memfd of that name twice, with 16 KiB allocated and nothing mapped.
    #[test]
    fn trap24_pages_that_nobody_mapped_are_part_of_the_footprint() {
        let fd = rustix::fs::memfd_create("doorbell-session", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, 16 << 10).unwrap();
        let _second = fd.try_clone().unwrap();
        let mut segments = Segments::of(&[std::process::id()]);
        assert_eq!((segments.len(), segments.bytes()), (1, 16 << 10));
        let memory = Probe::new(std::process::id(), segments).sample().unwrap();
        assert_eq!(memory.footprint, memory.rss + (16 << 10));
        let sampler = Sampler::start(Probe::new(std::process::id(), || 4096));
        let peak = sampler.stop().unwrap();
        assert!(peak.rss > 0 && peak.shared == 4096);
    }
}

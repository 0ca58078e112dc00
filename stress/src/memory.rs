//! Memory of the server: what is resident in it, and what exists on its account without being resident.
//!
//! Footprint = resident set of the server + every page of its sessions' segments that exists and is not in
//! that resident set already (trap 24). Segments are memfds; their allocated blocks are exact.

use crate::error::StressError;
use rustix::fs::{CWD, Mode, OFlags};
use serde::Serialize;
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How the segments' memfds are called in `/proc`.
const SEGMENT: &str = "/memfd:doorbell-session";
/// From one sample to the next.
const INTERVAL: Duration = Duration::from_millis(25);

/// Bytes at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Memory {
    rss: u64,
    shared: u64,
    footprint: u64,
    page_tables: u64,
}

/// The highest of each, and how often was looked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Peak {
    /// Resident set of the server, bytes.
    pub rss_bytes: u64,
    /// Allocated pages of all segments, bytes.
    pub shared_bytes: u64,
    /// Both, pages that are in both counted once, bytes.
    pub footprint_bytes: u64,
    /// Page tables of the server, kernel memory beside the footprint, bytes; 0 where the kernel does not say.
    pub page_tables_bytes: u64,
    /// Samples taken.
    pub samples: u64,
    /// Samples per second.
    pub samples_per_second: f64,
}

impl Peak {
    fn add(&mut self, now: Memory) {
        self.rss_bytes = self.rss_bytes.max(now.rss);
        self.shared_bytes = self.shared_bytes.max(now.shared);
        self.footprint_bytes = self.footprint_bytes.max(now.footprint);
        self.page_tables_bytes = self.page_tables_bytes.max(now.page_tables);
        self.samples += 1;
    }
}

/// The segments that some processes hold open, kept open by path only.
#[derive(Debug)]
pub struct Segments(Vec<OwnedFd>);

impl Segments {
    /// Looks through the descriptors of the processes; each segment counts once, however many hold it.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if they cannot be looked at, [`StressError::Segments`] if there are not
    /// `expected` of them.
    pub fn of(pids: &[u32], expected: usize) -> Result<Self, StressError> {
        let mut seen = HashSet::new();
        let mut segments = Vec::with_capacity(expected);
        for pid in pids {
            let descriptors =
                fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| StressError::os("reading /proc", e))?;
            for entry in descriptors {
                let path = entry.map_err(|e| StressError::os("reading /proc", e))?.path();
                if !is_segment(&path) {
                    continue;
                }
                let fd = rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|e| StressError::os("open of a segment", e))?;
                let stat = rustix::fs::fstat(&fd).map_err(|e| StressError::os("fstat of a segment", e))?;
                if seen.insert((stat.st_dev, stat.st_ino)) {
                    segments.push(fd);
                }
            }
        }
        if segments.len() == expected {
            Ok(Self(segments))
        } else {
            Err(StressError::Segments { found: segments.len(), expected })
        }
    }

    /// Bytes of them that exist.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if one cannot be looked at.
    pub fn bytes(&self) -> Result<u64, StressError> {
        self.0.iter().try_fold(0, |sum, fd| {
            let stat = rustix::fs::fstat(fd).map_err(|e| StressError::os("fstat of a segment", e))?;
            // `st_blocks` counts 512 bytes, whatever the block size.
            Ok(sum + stat.st_blocks as u64 * 512)
        })
    }
}

fn is_segment(path: &Path) -> bool {
    // A descriptor that is closed meanwhile is none.
    fs::read_link(path).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(SEGMENT.as_bytes()))
}

/// Takes samples of one server.
struct Probe {
    pid: u32,
    segments: Segments,
    /// RSS and shared bytes of the last sample, and what was in both.
    last: Option<(u64, u64, u64)>,
}

impl Probe {
    /// Cost: `smaps_rollup` and a stat per segment; the long `smaps` is read only if one of the two sums
    /// has changed since the last sample, so that a steady run is not disturbed.
    fn sample(&mut self) -> Result<Memory, StressError> {
        let rollup = self.read("smaps_rollup")?;
        let rss = kib(&rollup, "Rss:").ok_or_else(|| StressError::Memory("no Rss in smaps_rollup".into()))?;
        let shared = self.segments.bytes()?;
        let both = match self.last {
            Some((last_rss, last_shared, both)) if (last_rss, last_shared) == (rss, shared) => both,
            _ => resident_segments(&self.read("smaps")?),
        };
        self.last = Some((rss, shared, both));
        let page_tables = kib(&self.read("status")?, "VmPTE:").unwrap_or_default();
        Ok(Memory { rss, shared, footprint: rss + shared.saturating_sub(both), page_tables })
    }

    fn read(&self, file: &str) -> Result<String, StressError> {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid))
            .map_err(|e| StressError::Memory(format!("{file}: {e}")))
    }
}

/// The bytes behind `name` in the kernel's "name: value kB" files.
fn kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
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
        } else if inside {
            sum += kib(line, "Rss:").unwrap_or_default();
        }
    }
    sum
}

/// A thread that samples, at least 20 times a second where the machine lets it, and keeps the peaks.
pub struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<Result<Peak, StressError>>,
}

impl Sampler {
    /// Starts sampling server `pid`.
    pub fn start(pid: u32, segments: Segments) -> Self {
        let (stop, stopped) = mpsc::channel();
        let mut probe = Probe { pid, segments, last: None };
        let sample = move || {
            let mut peak = Peak::default();
            let begun = Instant::now();
            loop {
                let due = Instant::now() + INTERVAL;
                peak.add(probe.sample()?);
                let left = due.saturating_duration_since(Instant::now());
                if stopped.recv_timeout(left) != Err(RecvTimeoutError::Timeout) {
                    peak.samples_per_second = peak.samples as f64 / begun.elapsed().as_secs_f64();
                    return Ok(peak);
                }
            }
        };
        Self { stop, thread: std::thread::spawn(sample) }
    }

    /// Stops sampling; the peaks.
    ///
    /// # Errors
    ///
    /// What kept it from sampling all along.
    pub fn stop(self) -> Result<Peak, StressError> {
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
    fn only_segments_count_as_resident_shared_memory() {
        assert_eq!(resident_segments(SMAPS), 20 * 1024);
        assert_eq!(resident_segments(""), 0);
    }

    #[test]
    fn the_rollup_holds_the_resident_set() {
        let rollup = "55d0c0a00000-7ffd00000000 ---p 00000000 00:00 0 [rollup]\nRss:  960 kB\nPss:  800 kB\n";
        assert_eq!(kib(rollup, "Rss:"), Some(960 * 1024));
        assert_eq!(kib("Pss: 3 kB\n", "Rss:"), None);
    }

    #[test]
    fn each_peak_is_its_own() {
        let mut peak = Peak::default();
        peak.add(Memory { rss: 5, shared: 1, footprint: 6, page_tables: 8 });
        peak.add(Memory { rss: 3, shared: 4, footprint: 7, page_tables: 9 });
        assert_eq!(peak.page_tables_bytes, 9);
        assert_eq!((peak.rss_bytes, peak.shared_bytes, peak.footprint_bytes, peak.samples), (5, 4, 7, 2));
    }

    /// Goal:   pages that exist but are not mapped by the server are counted, once; a missing segment is an
    ///         error.
    /// Method: this process holds a memfd of that name twice, with 16 KiB allocated and nothing mapped.
    #[test]
    fn pages_that_nobody_mapped_are_part_of_the_footprint() {
        let fd = rustix::fs::memfd_create("doorbell-session", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 1 << 20).unwrap();
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, 16 << 10).unwrap();
        let _second = fd.try_clone().unwrap();
        let pid = std::process::id();
        assert!(matches!(Segments::of(&[pid], 2), Err(StressError::Segments { found: 1, expected: 2 })));
        let segments = Segments::of(&[pid], 1).unwrap();
        let memory = Probe { pid, segments, last: None }.sample().unwrap();
        assert_eq!((memory.shared, memory.footprint), (16 << 10, memory.rss + (16 << 10)));
        let peak = Sampler::start(pid, Segments::of(&[pid], 1).unwrap()).stop().unwrap();
        assert!(peak.rss_bytes > 0 && peak.samples >= 1);
    }
}

//! Memory of the server: what is resident in it, and what exists on its account without being resident.
//!
//! Footprint = resident set of the server + every page of its sessions' segments that exists and is not in
//! that resident set already (trap 24). Segments are memfds; their allocated blocks are exact.

use crate::error::StressError;
use doorbell_uring::kernel_version;
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
/// From one sample to the next. What is measured shares its cores with this.
const INTERVAL: Duration = Duration::from_millis(40);
/// The first Linux of which `/proc/PID/status` adds up what each core has counted (82241a83cd15, "mm: fix the inaccurate
/// memory statistics issue for users"). What earlier ones say may be out by 64 pages a core.
const EXACT_STATUS: (u32, u32, u32) = (6, 16, 0);

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
    exact_status: bool,
    /// RSS and shared bytes of the last sample that took in `smaps`, and what was in both.
    last: Option<(u64, u64, u64)>,
}

impl Probe {
    fn new(pid: u32, segments: Segments) -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let exact_status = kernel_version(&release).is_some_and(|version| version >= EXACT_STATUS);
        Self { pid, segments, exact_status, last: None }
    }

    /// Cost, of a server whose executable lies in 350 mappings: 90 us with `status` alone, wake and all; 0.3 ms more for `smaps_rollup`,
    /// 3 for `smaps`, which is read only if one of the sums has changed. Whoever runs on that core is held up for so long.
    fn sample(&mut self) -> Result<Memory, StressError> {
        let status = self.read("status")?;
        let shared = self.segments.bytes()?;
        let (rss, both) = if self.exact_status {
            // The server shares no memory but its segments.
            (field(&status, "VmRSS:")?, field(&status, "RssShmem:")?)
        } else {
            self.walked(shared)?
        };
        let page_tables = kib(&status, "VmPTE:").unwrap_or_default();
        Ok(Memory { rss, shared, footprint: rss + shared.saturating_sub(both), page_tables })
    }

    /// RSS, and what of it are the segments, for which the kernel looks at every page.
    fn walked(&mut self, shared: u64) -> Result<(u64, u64), StressError> {
        let rss = field(&self.read("smaps_rollup")?, "Rss:")?;
        let both = match self.last {
            Some((last_rss, last_shared, both)) if (last_rss, last_shared) == (rss, shared) => both,
            _ => resident_segments(&self.read("smaps")?),
        };
        self.last = Some((rss, shared, both));
        Ok((rss, both))
    }

    fn read(&self, file: &str) -> Result<String, StressError> {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid))
            .map_err(|e| StressError::Memory(format!("{file}: {e}")))
    }
}

/// As [`kib`] for what has to be there.
fn field(text: &str, name: &str) -> Result<u64, StressError> {
    kib(text, name).ok_or_else(|| StressError::Memory(format!("no {name} in /proc")))
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
        let mut probe = Probe::new(pid, segments);
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
    use doorbell_shm::layout::Geometry;
    use doorbell_shm::segment::{Identity, Segment};

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
    /// Method: this process holds a segment twice, of which only the head is mapped; looked at in either way.
    #[test]
    fn pages_that_nobody_mapped_are_part_of_the_footprint() {
        let identity = Identity { epoch: 1, session: [1, 2] };
        let segment = Segment::create(Geometry::SMALLEST, 1, identity).unwrap();
        let _second = segment.memory().unwrap().try_clone_to_owned().unwrap();
        let pid = std::process::id();
        assert!(matches!(Segments::of(&[pid], 2), Err(StressError::Segments { found: 1, expected: 2 })));
        let mut probe = Probe::new(pid, Segments::of(&[pid], 1).unwrap());
        for exact_status in [false, probe.exact_status] {
            probe.exact_status = exact_status;
            let memory = probe.sample().unwrap();
            let unmapped = memory.footprint - memory.rss;
            assert_eq!(unmapped, memory.shared - 4096, "of {memory:?}");
        }
        let peak = Sampler::start(pid, Segments::of(&[pid], 1).unwrap()).stop().unwrap();
        assert!(peak.rss_bytes > 0 && peak.samples >= 1);
    }
}

//! The floor of streamed chunks where everybody sleeps: the bare futex wakes of the same path. A worker that sleeps until a
//! chunk is due writes the time and wakes a relay; the relay wakes the reader, which is another process. Nothing else:
//! no rings, no copies, no tickets.
//!
//! Layout of the shared memory, one page: a cache line each for the relay's word, the reader's word and the stop word,
//! then [`STAMPS`] times. The words count chunks.

use super::child::{self, Role};
use super::clock::{SECOND, now_ns, sleep_until};
use super::error::BenchError;
use super::histogram::Latencies;
use super::placement;
use doorbell_shm::map::{Mapping, PAGE, Shared};
use doorbell_shm::segment;
use doorbell_uring::futex;
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::time::Duration;

/// Times that are kept: so many chunks may be under way before one is overwritten.
const STAMPS: usize = 64;
const LINE: usize = 64;
/// How long a sleeper sleeps before it looks whether all is over.
const SLICE: Duration = Duration::from_millis(100);

/// What the floor's server process is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct StreamFloorJob {
    /// Where the relay runs: the reactor's core.
    pub relay_cpu: Option<usize>,
    /// Where the worker runs.
    pub worker_cpu: Option<usize>,
    /// Nanoseconds between two chunks.
    pub pause_ns: u64,
    /// When the first is due, CLOCK_MONOTONIC.
    pub begin_ns: u64,
    /// When there are no more.
    pub end_ns: u64,
}

/// The page, seen by either side.
struct Path {
    relay: Shared<AtomicU32>,
    reader: Shared<AtomicU32>,
    stop: Shared<AtomicU32>,
    stamps: Shared<[AtomicU64]>,
}

impl Path {
    fn open(map: &Arc<Mapping>) -> Result<Self, BenchError> {
        Ok(Self {
            relay: map.object(0)?,
            reader: map.object(LINE)?,
            stop: map.object(2 * LINE)?,
            stamps: map.slice(3 * LINE, STAMPS)?,
        })
    }

    fn stamp(&self, chunk: u32) -> &AtomicU64 {
        &self.stamps[chunk as usize % STAMPS]
    }

    fn is_over(&self) -> bool {
        self.stop.load(Relaxed) != 0
    }
}

/// Sleeps on a word until it differs from `seen`; `None` once all is over.
fn next(word: &AtomicU32, seen: u32, path: &Path) -> Result<Option<u32>, BenchError> {
    loop {
        // Acquire pairs with the Release of whoever counts: the time of that chunk is there.
        let now = word.load(Acquire);
        if now != seen {
            return Ok(Some(now));
        }
        if path.is_over() {
            return Ok(None);
        }
        futex::wait(word, seen, Some(SLICE)).map_err(|e| BenchError::os("futex wait", e))?;
    }
}

fn wake(word: &AtomicU32) -> Result<(), BenchError> {
    futex::wake(word, 1).map(|_| ()).map_err(|e| BenchError::os("futex wake", e))
}

/// The floor's server process: worker and relay.
///
/// # Errors
///
/// [`BenchError`] if the memory cannot be mapped, or a thread not be pinned or started.
pub fn serve(fd: OwnedFd, job: &StreamFloorJob) -> Result<(), BenchError> {
    let map = segment::attach_scratch(fd.as_fd(), PAGE)?;
    run(&Path::open(&map)?, job)
}

fn run(path: &Path, job: &StreamFloorJob) -> Result<(), BenchError> {
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .spawn_scoped(scope, || work(path, job))
            .map_err(|e| BenchError::os("starting the worker", e))?;
        let relayed = relay(path, job);
        worker.join().map_err(|_| BenchError::peer("writing chunks", "the worker has panicked"))??;
        relayed
    })
}

fn work(path: &Path, job: &StreamFloorJob) -> Result<(), BenchError> {
    let chunks = write(path, job);
    // Whatever happened: the others must not wait for ever.
    path.stop.store(1, Relaxed);
    wake(&path.relay)?;
    chunks
}

fn write(path: &Path, job: &StreamFloorJob) -> Result<(), BenchError> {
    placement::pin(job.worker_cpu)?;
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))
        .map_err(|e| BenchError::os("prctl(PR_SET_TIMERSLACK)", e))?;
    let (mut chunk, mut due) = (0u32, job.begin_ns);
    while due < job.end_ns {
        sleep_until(due);
        path.stamp(chunk).store(now_ns(), Relaxed);
        chunk = chunk.wrapping_add(1);
        path.relay.store(chunk, Release);
        wake(&path.relay)?;
        due += job.pause_ns;
    }
    Ok(())
}

fn relay(path: &Path, job: &StreamFloorJob) -> Result<(), BenchError> {
    placement::pin(job.relay_cpu)?;
    let mut seen = 0;
    while let Some(now) = next(&path.relay, seen, path)? {
        path.reader.store(now, Release);
        wake(&path.reader)?;
        seen = now;
    }
    wake(&path.reader)
}

/// Measures from the writing of a chunk until it is seen by this process, on the thread that calls.
///
/// # Errors
///
/// [`BenchError`] if memory or process cannot be had.
pub fn measure(job: &StreamFloorJob, measured: &Range<u64>) -> Result<Latencies, BenchError> {
    let (map, fd) = segment::scratch(PAGE)?;
    let path = Path::open(&map)?;
    let mut server = child::spawn(Role::StreamFloorServer, job, Stdio::from(fd), Stdio::null())?;
    let delays = read(&path, measured, job.end_ns);
    server.check_alive().or_else(|error| if path.is_over() { Ok(()) } else { Err(error) })?;
    delays
}

fn read(path: &Path, measured: &Range<u64>, end_ns: u64) -> Result<Latencies, BenchError> {
    let mut delays = Latencies::new();
    let mut seen = 0;
    while let Some(now) = next(&path.reader, seen, path)? {
        let at = now_ns();
        // Those that came together were all read now.
        while seen != now {
            let written = path.stamp(seen).load(Relaxed);
            if measured.contains(&written) {
                delays.record(at.saturating_sub(written));
            }
            seen = seen.wrapping_add(1);
        }
        if at > end_ns + 10 * SECOND {
            return Err(BenchError::peer("reading", "a floor that does not end"));
        }
    }
    Ok(delays)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   every chunk is seen, with the time at which it was written, and all of them end.
    /// Method: the three of them as threads on the heap.
    #[test]
    fn chunks_pass_the_relay_and_end() {
        let map = Mapping::on_heap(PAGE);
        let server = Path::open(&map).unwrap();
        let begin_ns = now_ns();
        let end_ns = begin_ns + 50 * 200_000;
        let job = StreamFloorJob { relay_cpu: None, worker_cpu: None, pause_ns: 200_000, begin_ns, end_ns };
        let thread = std::thread::spawn(move || run(&server, &job));
        let delays = read(&Path::open(&map).unwrap(), &(0..u64::MAX), end_ns).unwrap();
        thread.join().unwrap().unwrap();
        assert_eq!(delays.len(), 50);
    }
}

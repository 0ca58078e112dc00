//! The floor of long bodies: what two cores allow where bodies pass as frames in place. Two processes, a window of four
//! frames of 16 KiB for each body, used both ways, a word each way that publishes a frame, and nothing else: no rings, no
//! validation, no bells, no leases.
//!
//! Layout of the shared memory: page 0 the stop word, then for each body a page of words (a cache line each: four for
//! requests, then four for answers; frame number plus 1 in the upper half, length in the lower), then all frames.

use super::child::{self, Process, Role};
use super::error::BenchError;
use super::floor::pause;
use super::load::{LoadResult, Schedule, Shape};
use super::long::{self, FRAME_MAX, Frame, LongTarget, Outgoing};
use super::placement::{self, Cpus};
use super::work;
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::map::{Mapping, PAGE, Shared};
use doorbell_shm::segment;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Frames of a body on their way at once.
const WINDOW: usize = 4;
/// The most bodies at once: 8 MiB of frames. Of a load with more, the floor carries so many.
pub const BODIES_MAX: usize = 128;

const WORDS_PER_LINE: usize = 8;
const WORDS_PER_BODY: usize = PAGE / 8;
/// The first word of a body's answers.
const ANSWERS: usize = WINDOW * WORDS_PER_LINE;
/// Bytes the server works on at once.
const BLOCK: usize = 1024;
/// Empty rounds between two looks at the stop word.
const LOOK_EVERY: u32 = 1024;

/// What a floor server is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct LongFloorJob {
    /// Bodies at once.
    pub bodies: usize,
    /// The core to run on.
    pub cpu: Option<usize>,
    /// Whether the client runs on the same core: then an empty poll yields.
    pub yields: bool,
}

impl LongFloorJob {
    fn frames_offset(&self) -> usize {
        (1 + self.bodies) * PAGE
    }

    fn mapping_len(&self) -> usize {
        self.frames_offset() + self.bodies * WINDOW * FRAME_MAX
    }
}

/// One mapping, seen by either side.
struct Lanes {
    stop: Shared<AtomicU64>,
    words: Shared<[AtomicU64]>,
    frames: SharedBytes,
}

impl Lanes {
    fn open(map: &Arc<Mapping>, job: &LongFloorJob) -> Result<Self, BenchError> {
        Ok(Self {
            stop: map.object(0)?,
            words: map.slice(PAGE, job.bodies * WORDS_PER_BODY)?,
            frames: SharedBytes::new(map, job.frames_offset(), job.bodies * WINDOW * FRAME_MAX)?,
        })
    }

    fn request(&self, body: usize, frame: u32) -> &AtomicU64 {
        &self.words[body * WORDS_PER_BODY + frame as usize % WINDOW * WORDS_PER_LINE]
    }

    fn answer(&self, body: usize, frame: u32) -> &AtomicU64 {
        &self.words[body * WORDS_PER_BODY + ANSWERS + frame as usize % WINDOW * WORDS_PER_LINE]
    }
}

fn offset(body: usize, frame: u32) -> usize {
    (body * WINDOW + frame as usize % WINDOW) * FRAME_MAX
}

/// What publishes a frame.
fn word(frame: u32, len: usize) -> u64 {
    u64::from(frame.wrapping_add(1)) << 32 | len as u64
}

/// The length in a word, if it publishes this frame.
fn published(word: u64, frame: u32) -> Option<usize> {
    ((word >> 32) as u32 == frame.wrapping_add(1)).then_some(word as u32 as usize)
}

/// Serves one client until it sets the stop word. Ends with the parent process too (`child.rs`).
///
/// # Errors
///
/// [`BenchError`] if the memory cannot be mapped or the thread not pinned.
pub fn floor_server(fd: OwnedFd, job: &LongFloorJob) -> Result<(), BenchError> {
    placement::pin(job.cpu)?;
    let map = segment::attach_scratch(fd.as_fd(), job.mapping_len())?;
    serve(&Lanes::open(&map, job)?, job);
    Ok(())
}

fn serve(lanes: &Lanes, job: &LongFloorJob) {
    let mut next = vec![0u32; job.bodies];
    let mut idle = 0u32;
    loop {
        let mut moved = false;
        for (body, frame) in next.iter_mut().enumerate() {
            // Acquire pairs with the Release in `LongFloorClient::try_send`: the frame is whole.
            let Some(len) = published(lanes.request(body, *frame).load(Acquire), *frame) else { continue };
            answer_in_place(&lanes.frames, offset(body, *frame), len);
            // Release pairs with the Acquire in `LongFloorClient::try_receive`.
            lanes.answer(body, *frame).store(word(*frame, len), Release);
            *frame = frame.wrapping_add(1);
            moved = true;
        }
        if !moved {
            idle = idle.wrapping_add(1);
            if idle.is_multiple_of(LOOK_EVERY) && lanes.stop.load(Relaxed) != 0 {
                return;
            }
            pause(job.yields);
        }
    }
}

/// Every frame but the last of a body has whole words, so that none needs to know its place.
fn answer_in_place(frames: &SharedBytes, offset: usize, len: usize) {
    let (mut request, mut reply) = ([0; BLOCK], [0; BLOCK]);
    for at in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - at);
        frames.read(offset + at, &mut request[..n]);
        work::answer(&request[..n], &mut reply[..n]);
        frames.write(offset + at, &reply[..n]);
    }
}

/// One body after another in the same window.
#[derive(Debug, Clone, Copy, Default)]
struct Passage {
    sent: u32,
    taken: u32,
    /// Bytes of the present body that have not come back.
    left: usize,
}

/// The client's side.
struct LongFloorClient {
    lanes: Lanes,
    passages: Vec<Passage>,
    yields: bool,
    /// The body whose answers are looked for next.
    cursor: usize,
}

impl LongFloorClient {
    fn new(map: &Arc<Mapping>, job: &LongFloorJob) -> Result<Self, BenchError> {
        let passages = vec![Passage::default(); job.bodies];
        Ok(Self { lanes: Lanes::open(map, job)?, passages, yields: job.yields, cursor: 0 })
    }
}

impl Drop for LongFloorClient {
    fn drop(&mut self) {
        self.lanes.stop.store(1, Relaxed);
    }
}

impl LongTarget for LongFloorClient {
    type Error = Infallible;

    /// Never refuses: each body has a window of its own.
    fn try_start(&mut self, _connection: usize, tag: u32, size: usize) -> Result<bool, Infallible> {
        self.passages[tag as usize].left = size;
        Ok(true)
    }

    fn try_send(&mut self, tag: u32, body: &Outgoing) -> Result<usize, Infallible> {
        let passage = &mut self.passages[tag as usize];
        if passage.sent.wrapping_sub(passage.taken) as usize == WINDOW {
            return Ok(0);
        }
        let len = body.left().min(FRAME_MAX);
        let mut at = offset(tag as usize, passage.sent);
        let frames = &self.lanes.frames;
        body.write(len, |part| {
            frames.write(at, part);
            at += part.len();
            Ok::<(), Infallible>(())
        })?;
        // Release pairs with the Acquire in `serve`.
        self.lanes.request(tag as usize, passage.sent).store(word(passage.sent, len), Release);
        passage.sent = passage.sent.wrapping_add(1);
        Ok(len)
    }

    fn try_receive(&mut self, frame: &mut [u8]) -> Result<Option<Frame>, Infallible> {
        for _ in 0..self.passages.len() {
            let body = self.cursor;
            self.cursor = (self.cursor + 1) % self.passages.len();
            let passage = &mut self.passages[body];
            // Acquire pairs with the Release in `serve`: the answer is whole.
            let word = self.lanes.answer(body, passage.taken).load(Acquire);
            let Some(len) = published(word, passage.taken) else { continue };
            self.lanes.frames.read(offset(body, passage.taken), &mut frame[..len]);
            passage.taken = passage.taken.wrapping_add(1);
            passage.left -= len;
            return Ok(Some(Frame { tag: body as u32, len, ok: true, last: passage.left == 0 }));
        }
        Ok(None)
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn wait(&mut self, _at_most_ns: u64) -> Result<(), Infallible> {
        pause(self.yields);
        Ok(())
    }
}

/// A floor server process with its client, ready to be driven.
pub struct LongFloor {
    client: LongFloorClient,
    job: LongFloorJob,
    size: usize,
    server: Process,
}

impl LongFloor {
    /// Starts the server process, for bodies of `size` bytes. To be called from the process's main thread, with whose
    /// death the server ends. Of more than [`BODIES_MAX`] bodies in flight, so many are used.
    ///
    /// # Errors
    ///
    /// [`BenchError`] if memory or process cannot be had.
    pub fn start(size: usize, bodies: usize, cpus: &Cpus) -> Result<Self, BenchError> {
        let job = LongFloorJob { bodies: bodies.min(BODIES_MAX), cpu: cpus.server, yields: cpus.shared };
        let (map, fd) = segment::scratch(job.mapping_len())?;
        let client = LongFloorClient::new(&map, &job)?;
        let server = child::spawn(Role::LongFloorServer, &job, Stdio::from(fd), Stdio::null())?;
        Ok(Self { client, job, size, server })
    }

    /// The server's process id.
    pub fn server_pid(&self) -> u32 {
        self.server.pid()
    }

    /// Drives it, on a thread of its own pinned to `cpu`.
    ///
    /// # Errors
    ///
    /// As [`long::run`].
    pub fn run(&mut self, cpu: Option<usize>, schedule: &Schedule) -> Result<LoadResult, BenchError> {
        placement::pin(cpu)?;
        long::run(&mut self.client, &Shape::closed(self.job.bodies, 1, self.size), schedule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::load::run_until_answered;

    /// Goal:   the floor answers and checks, several bodies at once, with ends of any length, and stops when told to.
    /// Method: both sides as threads on the heap, yielding so that one core is enough.
    #[test]
    fn frames_pass_in_place_and_stop() {
        for (size, bodies) in [(16_385, 1), (100_003, 3), (65_536, 20)] {
            let job = LongFloorJob { bodies, cpu: None, yields: true };
            let map = Mapping::on_heap(job.mapping_len());
            let lanes = Lanes::open(&map, &job).unwrap();
            let server = std::thread::spawn(move || serve(&lanes, &job));
            let mut client = LongFloorClient::new(&map, &job).unwrap();
            let result = run_until_answered(|schedule| {
                long::run(&mut client, &Shape::closed(bodies, 1, size), schedule)
            });
            assert_eq!(result.errors, 0);
            assert!(result.requests > 0);
            drop(client);
            server.join().unwrap();
        }
    }

    #[test]
    fn zeroed_memory_publishes_nothing() {
        assert_eq!(
            (published(0, 0), published(word(0, 7), 0), published(word(3, 7), 7)),
            (None, Some(7), None)
        );
    }
}

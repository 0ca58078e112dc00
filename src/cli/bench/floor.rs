//! The floor: what two cores allow. Two processes, one sequence-published ring each way, one slot of memory
//! per call used both ways, and nothing else: no validation, no bells, no flow control.
//!
//! Everything else is compared with it, so it keeps to its protocol: 1024 entries of four words each way,
//! word 3 holds the lap and the message type and publishes the entry; the server copies the request into
//! private memory, calls its handler through a table, copies the answer back into the same slot.
//!
//! Layout of the shared memory: page 0 the stop word, page 1 requests, then answers, slots from 1 MiB on.

use super::child::{self, Process, Role};
use super::clock::SECOND;
use super::error::BenchError;
use super::load::{self, LoadResult, Received, Schedule, Shape, Target};
use super::options::SLOT_MAX;
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

/// Entries of a ring, and therefore the most calls in flight.
pub const IN_FLIGHT_MAX: usize = 1024;

const WORDS: usize = 4;
const RING_WORDS: usize = IN_FLIGHT_MAX * WORDS;
const REQUESTS: usize = PAGE;
const ANSWERS: usize = REQUESTS + RING_WORDS * 8;
const SLOTS: usize = 1 << 20;
/// The message type of the work, an index into [`TABLE`].
const TYPE: u64 = 1;
/// Empty polls between two looks at the stop word.
const LOOK_EVERY: u32 = 1024;

/// What a floor server is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct FloorJob {
    /// Bytes of a request.
    pub size: usize,
    /// Slots.
    pub in_flight: usize,
    /// The core to run on.
    pub cpu: Option<usize>,
    /// Whether the client runs on the same core: then an empty poll yields.
    pub yields: bool,
}

impl FloorJob {
    fn mapping_len(&self) -> usize {
        (SLOTS + self.size * self.in_flight).next_multiple_of(PAGE)
    }
}

/// One mapping, seen by either side.
struct Rings {
    stop: Shared<AtomicU64>,
    requests: Shared<[AtomicU64]>,
    answers: Shared<[AtomicU64]>,
    slots: SharedBytes,
}

impl Rings {
    fn open(map: &Arc<Mapping>, job: &FloorJob) -> Result<Self, BenchError> {
        Ok(Self {
            stop: map.object(0)?,
            requests: map.slice(REQUESTS, RING_WORDS)?,
            answers: map.slice(ANSWERS, RING_WORDS)?,
            slots: SharedBytes::new(map, SLOTS, job.size * job.in_flight)?,
        })
    }
}

/// The lap in the upper half of word 3 of the entry at `position`.
#[inline(always)]
fn lap(position: u32) -> u64 {
    u64::from(position / IN_FLIGHT_MAX as u32 + 1) << 32
}

#[inline(always)]
fn entry(ring: &[AtomicU64], position: u32) -> &[AtomicU64; WORDS] {
    let ring: &[AtomicU64; RING_WORDS] = ring.try_into().expect("a ring has its length");
    let at = position as usize % IN_FLIGHT_MAX;
    &ring.as_chunks::<WORDS>().0[at]
}

/// An empty poll.
#[inline(always)]
pub fn pause(yields: bool) {
    if yields {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

type Handler = fn(&[u8], &mut [u8]);
static TABLE: [Option<Handler>; 4] = [None, Some(work::answer), None, None];

/// Serves one client until it sets the stop word. Ends with the parent process too (`child.rs`).
///
/// # Errors
///
/// [`BenchError`] if the memory cannot be mapped or the thread not pinned.
pub fn floor_server(fd: OwnedFd, job: &FloorJob) -> Result<(), BenchError> {
    placement::pin(job.cpu)?;
    let map = segment::attach_scratch(fd.as_fd(), job.mapping_len())?;
    serve(&Rings::open(&map, job)?, job.yields);
    Ok(())
}

fn serve(rings: &Rings, yields: bool) {
    // Where the reference finds its own.
    let mut stage = work::Buffer::as_allocated(SLOT_MAX);
    let mut reply = work::Buffer::at(0, SLOT_MAX);
    let (mut position, mut idle) = (0u32, 0u32);
    loop {
        let request = entry(&rings.requests, position);
        // Acquire pairs with the Release in `FloorClient::try_send`: entry and payload are whole.
        let sequence = request[3].load(Acquire);
        if sequence & !0xffff_ffff != lap(position) {
            idle = idle.wrapping_add(1);
            if idle.is_multiple_of(LOOK_EVERY) && rings.stop.load(Relaxed) != 0 {
                return;
            }
            pause(yields);
            continue;
        }
        let (place, id) = (request[0].load(Relaxed), request[1].load(Relaxed));
        let (offset, len) = ((place >> 32) as usize, place as u32 as usize);
        rings.slots.read_by_memcpy(offset, &mut stage[..len]);
        let handler = TABLE[(sequence & 3) as usize].expect("the client sends the one type there is");
        handler(&stage[..len], &mut reply[..len]);
        rings.slots.write_by_memcpy(offset, &reply[..len]);
        let answer = entry(&rings.answers, position);
        answer[1].store(id, Relaxed);
        // Release pairs with the Acquire in `FloorClient::try_receive`.
        answer[3].store(lap(position), Release);
        position = position.wrapping_add(1);
    }
}

/// The client's side.
struct FloorClient {
    rings: Rings,
    size: usize,
    yields: bool,
    sent: u32,
    taken: u32,
}

impl FloorClient {
    fn new(map: &Arc<Mapping>, job: &FloorJob) -> Result<Self, BenchError> {
        Ok(Self { rings: Rings::open(map, job)?, size: job.size, yields: job.yields, sent: 0, taken: 0 })
    }
}

impl Drop for FloorClient {
    fn drop(&mut self) {
        self.rings.stop.store(1, Relaxed);
    }
}

impl Target for FloorClient {
    type Error = Infallible;

    /// Never refuses: there are as many slots as calls and no more calls than entries.
    #[inline(always)]
    fn try_send(&mut self, _connection: usize, payload: &[u8], tag: u32) -> Result<bool, Infallible> {
        let offset = tag as usize * self.size;
        self.rings.slots.write_by_memcpy(offset, payload);
        let request = entry(&self.rings.requests, self.sent);
        request[0].store((offset as u64) << 32 | payload.len() as u64, Relaxed);
        request[1].store(u64::from(tag), Relaxed);
        // Release pairs with the Acquire in `serve`.
        request[3].store(lap(self.sent) | TYPE, Release);
        self.sent = self.sent.wrapping_add(1);
        Ok(true)
    }

    #[inline(always)]
    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    #[inline(always)]
    fn try_receive(&mut self, answer: &mut [u8]) -> Result<Option<Received>, Infallible> {
        let reply = entry(&self.rings.answers, self.taken);
        // Acquire pairs with the Release in `serve`: the answer is whole.
        if reply[3].load(Acquire) != lap(self.taken) {
            return Ok(None);
        }
        let tag = reply[1].load(Relaxed) as u32;
        self.rings.slots.read_by_memcpy(tag as usize * self.size, answer);
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(Received { tag, len: self.size, ok: true }))
    }

    #[inline(always)]
    fn wait(&mut self, _at_most_ns: u64) -> Result<(), Infallible> {
        pause(self.yields);
        Ok(())
    }
}

/// A floor server process with its client, ready to be driven.
pub struct Floor {
    client: FloorClient,
    job: FloorJob,
    server: Process,
}

impl Floor {
    /// Starts the server process. To be called from the process's main thread, with whose death the server
    /// ends. More than [`IN_FLIGHT_MAX`] calls in flight do not fit the ring: so many are used then.
    ///
    /// # Errors
    ///
    /// [`BenchError`] if memory or process cannot be had.
    pub fn start(size: usize, in_flight: usize, cpus: &Cpus) -> Result<Self, BenchError> {
        let in_flight = in_flight.min(IN_FLIGHT_MAX);
        let job = FloorJob { size, in_flight, cpu: cpus.server, yields: cpus.shared };
        let (map, fd) = segment::scratch(job.mapping_len())?;
        let client = FloorClient::new(&map, &job)?;
        let server = child::spawn(Role::FloorServer, &job, Stdio::from(fd), Stdio::null())?;
        Ok(Self { client, job, server })
    }

    /// The server's process id.
    pub fn server_pid(&self) -> u32 {
        self.server.pid()
    }

    /// Drives it, on a thread of its own pinned to `cpu`.
    ///
    /// # Errors
    ///
    /// As [`load::run`].
    pub fn run(&mut self, cpu: Option<usize>, schedule: &Schedule) -> Result<LoadResult, BenchError> {
        placement::pin(cpu)?;
        load::run(&mut self.client, &Shape::closed(self.job.in_flight, 1, self.job.size), schedule)
    }
}

/// The length of the floor's window beside a run of `seconds`: long enough for a p99, not as long as the run.
pub fn window_ns(seconds: f64) -> u64 {
    (seconds.min(2.0) * SECOND as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   the floor answers and checks, over several laps of the ring, and stops when told to.
    /// Method: both sides as threads on the heap, yielding so that one core is enough.
    #[test]
    fn the_rings_carry_calls_over_many_laps_and_stop() {
        for (size, in_flight) in [(1, 1), (16, 3), (1000, 64), (64, IN_FLIGHT_MAX)] {
            let job = FloorJob { size, in_flight, cpu: None, yields: true };
            let map = Mapping::on_heap(job.mapping_len());
            let rings = Rings::open(&map, &job).unwrap();
            let server = std::thread::spawn(move || serve(&rings, true));
            let mut client = FloorClient::new(&map, &job).unwrap();
            let shape = Shape::closed(in_flight, 1, size);
            let result = load::run_until_answered(|schedule| load::run(&mut client, &shape, schedule));
            assert_eq!(result.errors, 0);
            assert!(result.requests > 0);
            drop(client);
            server.join().unwrap();
        }
    }

    #[test]
    fn the_first_lap_is_one_so_that_zeroed_memory_is_no_entry() {
        assert_eq!((lap(0), lap(1023), lap(1024)), (1 << 32, 1 << 32, 2 << 32));
    }
}

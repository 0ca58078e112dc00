//! The bare floor: the same calls between two processes over one ring each way, and nothing else. No
//! checks, no bells, no sessions: what the two cores allow.
//!
//! An entry is one 64-bit word: the lap in its upper half publishes it, the call's number is in the lower.
//! Each call has a slot of its own that carries request and answer. The server copies the request into
//! private memory, works there and copies back, as any server must that shares memory with others.
//!
//! Layout of the shared memory: page 0 the stop word, then requests, answers, slots.

use crate::clock::{SECOND, now_ns};
use crate::content::{self, Nonces, SIZE};
use crate::error::StressError;
use crate::latency::{Histogram, Latency};
use crate::load::{self, Link, Outcome, Polled, Schedule, Sent};
use crate::machine::{self, Cores};
use crate::processes::{self, Role};
use doorbell_shm::bytes::SharedBytes;
use doorbell_shm::map::{Mapping, PAGE, Shared};
use doorbell_shm::segment;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::time::Duration;

/// Entries of a ring, and therefore the most calls in flight.
const ENTRIES: usize = 1024;
const REQUESTS: usize = PAGE;
const ANSWERS: usize = REQUESTS + ENTRIES * 8;
const SLOTS: usize = ANSWERS + ENTRIES * 8;
/// Empty polls between two looks at the stop word.
const LOOK_EVERY: u32 = 1024;
/// Left out of the window of [`latency`].
const SETTLE_NS: u64 = SECOND / 10;
/// What its processes may take beside warm-up and window.
const SLACK: Duration = Duration::from_secs(60);

/// What either process is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct FloorJob {
    /// Calls in flight.
    calls: usize,
    /// The core to run on.
    core: usize,
    seed: u64,
    /// For the client.
    schedule: Schedule,
    /// For the client: one call at a time, each timed.
    timed: Option<Pace>,
}

/// When timed calls begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pace {
    /// Each when the one before it is over. Of a core that stands still they show how long, hardly how often: one call waits,
    /// where millions are made between two times.
    AtOnce,
    /// From half to one and a half of so many nanoseconds after the one before it, by chance. Of a core that stands still a
    /// hundredth of the time one call in a hundred shows it.
    Every(u64),
}

impl Pace {
    /// When the next call begins after one that was over at `now`, of nonce `nonce`.
    #[inline(always)]
    pub fn next(self, now: u64, nonce: u64) -> u64 {
        match self {
            Self::AtOnce => now,
            Self::Every(ns) => now + ns / 2 + nonce % ns,
        }
    }
}

fn mapping_len(calls: usize) -> usize {
    (SLOTS + calls * SIZE).next_multiple_of(PAGE)
}

/// Measures it: right answers per second with `calls` in flight.
///
/// # Errors
///
/// [`StressError::Floor`] if an answer was wrong or did not come; others if it could not be run.
pub fn measure(
    calls: usize,
    seed: u64,
    cores: &Cores,
    warm_up_ns: u64,
    window_ns: u64,
) -> Result<f64, StressError> {
    let (_map, fd) = segment::scratch(mapping_len(calls))?;
    let second = fd.try_clone().map_err(|e| StressError::os("dup(memfd)", e))?;
    let schedule = Schedule::after(warm_up_ns, window_ns);
    let job = FloorJob { calls, core: cores.server, seed, schedule, timed: None };
    let mut server = processes::spawn(Role::FloorServer, &job, Stdio::from(second))?;
    let job = FloorJob { core: cores.client(0), ..job };
    let mut client = processes::spawn(Role::FloorClient, &job, Stdio::from(fd))?;
    let outcome: Outcome = client.receive(Duration::from_nanos(warm_up_ns + window_ns) + SLACK)?;
    let () = server.receive(SLACK)?;
    client.end()?;
    server.end()?;
    if outcome.wrong + outcome.errors + outcome.lost > 0 || outcome.alive != calls as u64 {
        return Err(StressError::Floor(format!("{outcome:?}")));
    }
    Ok(outcome.answered as f64 * SECOND as f64 / window_ns as f64)
}

/// Measures its tail: one call of [`SIZE`] bytes at a time, each timed from before its request is written until its answer
/// has been checked. What the longest ones show is whoever stops the cores now and then: the host, and other processes.
///
/// # Errors
///
/// As for [`measure`].
pub fn latency(seed: u64, cores: &Cores, window_ns: u64, pace: Pace) -> Result<Latency, StressError> {
    let (_map, fd) = segment::scratch(mapping_len(1))?;
    let second = fd.try_clone().map_err(|e| StressError::os("dup(memfd)", e))?;
    let schedule = Schedule::after(SETTLE_NS, window_ns);
    let job = FloorJob { calls: 1, core: cores.server, seed, schedule, timed: Some(pace) };
    let mut server = processes::spawn(Role::FloorServer, &job, Stdio::from(second))?;
    let job = FloorJob { core: cores.client(0), ..job };
    let mut client = processes::spawn(Role::FloorClient, &job, Stdio::from(fd))?;
    let latency: Option<Latency> = client.receive(Duration::from_nanos(SETTLE_NS + window_ns) + SLACK)?;
    let () = server.receive(SLACK)?;
    client.end()?;
    server.end()?;
    latency.ok_or_else(|| StressError::Floor("an answer was wrong or did not come".to_owned()))
}

/// The server process.
///
/// # Errors
///
/// [`StressError`] if the memory cannot be mapped or the thread not pinned.
pub fn serve(fd: OwnedFd, job: &FloorJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let map = segment::attach_scratch(fd.as_fd(), mapping_len(job.calls))?;
    Rings::open(&map, job.calls)?.serve(false);
    processes::say(&())
}

/// The client process.
///
/// # Errors
///
/// As for [`serve`].
pub fn drive(fd: OwnedFd, job: &FloorJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let map = segment::attach_scratch(fd.as_fd(), mapping_len(job.calls))?;
    let mut client = Client::new(Rings::open(&map, job.calls)?);
    if let Some(pace) = job.timed {
        let latency = client.time(Nonces::new(job.seed, 0), &job.schedule, pace);
        client.rings.stop.store(1, Relaxed);
        return processes::say(&latency);
    }
    let outcome = load::run(&mut client, job.calls, Nonces::new(job.seed, 0), false, &job.schedule);
    client.rings.stop.store(1, Relaxed);
    processes::say(&outcome)
}

/// The shared memory, as either side sees it.
struct Rings {
    stop: Shared<AtomicU64>,
    requests: Shared<[AtomicU64]>,
    answers: Shared<[AtomicU64]>,
    slots: SharedBytes,
}

impl Rings {
    fn open(map: &Arc<Mapping>, calls: usize) -> Result<Self, StressError> {
        assert!(calls <= ENTRIES, "{calls} calls do not fit a ring of {ENTRIES}");
        Ok(Self {
            stop: map.object(0)?,
            requests: map.slice(REQUESTS, ENTRIES)?,
            answers: map.slice(ANSWERS, ENTRIES)?,
            slots: SharedBytes::new(map, SLOTS, calls * SIZE)?,
        })
    }

    /// Serves until the stop word is set.
    fn serve(&self, yields: bool) {
        let mut request = [0; SIZE];
        let mut answer = [0; SIZE];
        let (mut position, mut idle) = (0u64, 0u32);
        loop {
            let Some(call) = peek(&self.requests, position) else {
                idle = idle.wrapping_add(1);
                if idle.is_multiple_of(LOOK_EVERY) && self.stop.load(Relaxed) != 0 {
                    return;
                }
                if yields {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            };
            if let Some(next) = peek(&self.requests, position + 1) {
                self.slots.prefetch(next as usize * SIZE, SIZE);
            }
            let offset = call as usize * SIZE;
            self.slots.read(offset, &mut request);
            content::answer(&request, &mut answer);
            self.slots.write(offset, &answer);
            publish(&self.answers, position, call);
            position += 1;
        }
    }
}

/// The lap of a position, in an entry's upper half; never 0, which zeroed memory holds.
#[inline(always)]
fn lap(position: u64) -> u64 {
    (position / ENTRIES as u64 + 1) << 32
}

/// The call in the entry at `position`, once it is there.
#[inline(always)]
fn peek(ring: &[AtomicU64], position: u64) -> Option<u32> {
    // Acquire pairs with the Release in `publish`: the slot is whole.
    let entry = ring[position as usize % ENTRIES].load(Acquire);
    (entry & !0xffff_ffff == lap(position)).then_some(entry as u32)
}

#[inline(always)]
fn publish(ring: &[AtomicU64], position: u64, call: u32) {
    // Release pairs with the Acquire in `peek`.
    ring[position as usize % ENTRIES].store(lap(position) | u64::from(call), Release);
}

/// The client's side. There are as many slots as calls and no more calls than entries: it always has room.
struct Client {
    rings: Rings,
    sent: u64,
    taken: u64,
}

impl Client {
    fn new(rings: Rings) -> Self {
        Self { rings, sent: 0, taken: 0 }
    }

    /// One call at a time; how long those of the window took, or `None` if one was answered wrongly or not.
    fn time(&mut self, mut nonces: Nonces, schedule: &Schedule, pace: Pace) -> Option<Latency> {
        let mut histogram = Histogram::new();
        let (mut request, mut answer) = ([0; SIZE], [0; SIZE]);
        let mut due = 0;
        loop {
            let nonce = nonces.draw();
            let mut begun = now_ns();
            while begun < due {
                std::hint::spin_loop();
                begun = now_ns();
            }
            if begun >= schedule.end_ns {
                return Some(histogram.summary());
            }
            content::fill(nonce, &mut request);
            self.send(0, &request);
            while let Polled::Nothing = self.poll(&mut answer) {
                if now_ns() > schedule.end_ns + SECOND {
                    return None;
                }
            }
            if !content::is_right(nonce, &answer) {
                return None;
            }
            let now = now_ns();
            due = pace.next(now, nonce);
            if begun >= schedule.begin_ns {
                histogram.add(now - begun);
            }
        }
    }
}

impl Link for Client {
    #[inline(always)]
    fn send(&mut self, connection: u32, request: &[u8; SIZE]) -> Sent {
        self.rings.slots.write(connection as usize * SIZE, request);
        publish(&self.rings.requests, self.sent, connection);
        self.sent += 1;
        Sent::Yes
    }

    #[inline(always)]
    fn poll(&mut self, answer: &mut [u8; SIZE]) -> Polled {
        let Some(connection) = peek(&self.rings.answers, self.taken) else { return Polled::Nothing };
        if let Some(next) = peek(&self.rings.answers, self.taken + 1) {
            self.rings.slots.prefetch(next as usize * SIZE, SIZE);
        }
        self.rings.slots.read(connection as usize * SIZE, answer);
        self.taken += 1;
        Polled::Answer { connection, len: SIZE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   the rings carry right answers over several laps, and the server stops when told to.
    /// Method: both sides as threads on the heap, yielding so that one core is enough.
    #[test]
    fn the_rings_carry_calls_over_many_laps_and_stop() {
        for calls in [1, 3, 1000, ENTRIES] {
            let map = Mapping::on_heap(mapping_len(calls));
            let rings = Rings::open(&map, calls).unwrap();
            let server = std::thread::spawn(move || rings.serve(true));
            let mut client = Client::new(Rings::open(&map, calls).unwrap());
            let schedule = Schedule::after(0, 30_000_000);
            let outcome = load::run(&mut client, calls, Nonces::new(9, 0), true, &schedule);
            client.rings.stop.store(1, Relaxed);
            server.join().unwrap();
            assert_eq!((outcome.wrong, outcome.errors, outcome.lost), (0, 0, 0), "{calls}");
            assert_eq!(outcome.alive, calls as u64);
        }
    }

    /// Goal:   paced calls begin half to one and a half of the pace after the one before, and a window of a hundred paces has
    ///         200 of them at most, all timed.
    #[test]
    fn paced_calls_keep_their_distance() {
        assert_eq!(Pace::AtOnce.next(7, 9), 7);
        let pace = Pace::Every(100_000);
        assert_eq!((pace.next(7, 0), pace.next(7, 99_999)), (50_007, 150_006));
        let map = Mapping::on_heap(mapping_len(1));
        let rings = Rings::open(&map, 1).unwrap();
        let server = std::thread::spawn(move || rings.serve(true));
        let mut client = Client::new(Rings::open(&map, 1).unwrap());
        let timed = client.time(Nonces::new(3, 0), &Schedule::after(0, 10_000_000), pace);
        client.rings.stop.store(1, Relaxed);
        server.join().unwrap();
        let samples = timed.unwrap().samples;
        // Fewer where another test has the core.
        assert!((1..=200).contains(&samples), "{samples}");
    }

    #[test]
    fn zeroed_memory_and_the_last_lap_hold_no_entry() {
        let ring: Vec<AtomicU64> = (0..ENTRIES).map(|_| AtomicU64::new(0)).collect();
        assert_eq!(peek(&ring, 0), None);
        publish(&ring, 0, 7);
        assert_eq!((peek(&ring, 0), peek(&ring, ENTRIES as u64)), (Some(7), None));
    }
}

//! Senders that stand still in mid-body, and how long the server leaves them memory that others wait for (F59).

use crate::clock::now_ns;
use crate::error::StressError;
use crate::memory::Segments;
use crate::processes::Process;
use rustix::process::Signal;
use serde::Serialize;
use std::time::Duration;

/// How long senders are looked at until some have leased memory.
const FIND_NS: u64 = 10_000_000_000;
/// What a sender gave back itself before it was stopped is gone after this: less than the server's patience.
const SETTLE: Duration = Duration::from_millis(10);
/// How long stopped senders are looked at.
const LOOK_NS: u64 = 3_000_000_000;
/// From one look to the next.
const INTERVAL: Duration = Duration::from_millis(1);

/// What was seen of the senders that were stopped.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs)] // As for `Row`.
pub struct TakeBack {
    pub stopped: usize,
    /// Of them, those that had leased memory, and how much.
    pub holders: usize,
    pub held_bytes: u64,
    /// From the stop until some of it was gone, and until all of it was, milliseconds.
    pub first_ms: Option<f64>,
    pub all_ms: Option<f64>,
}

/// The senders' segments, and what they are without leases.
pub struct Leases {
    segments: Vec<Segments>,
    base: Vec<u64>,
}

impl Leases {
    /// Of senders that have no leases now.
    ///
    /// # Errors
    ///
    /// [`StressError`] if a segment cannot be looked at.
    pub fn none_yet(senders: &[Process]) -> Result<Self, StressError> {
        let segments = senders.iter().map(|s| Segments::of(&[s.pid()], 1)).collect::<Result<Vec<_>, _>>()?;
        let base = segments.iter().map(Segments::bytes).collect::<Result<_, _>>()?;
        Ok(Self { segments, base })
    }

    /// Bytes that sender `number` has leased.
    fn of(&self, number: usize) -> Result<u64, StressError> {
        Ok(self.segments[number].bytes()?.saturating_sub(self.base[number]))
    }

    fn sum(&self, numbers: &[usize]) -> Result<u64, StressError> {
        numbers.iter().try_fold(0, |sum, number| Ok(sum + self.of(*number)?))
    }

    /// The `count` senders that have leased most.
    fn greatest(&self, count: usize) -> Result<Vec<usize>, StressError> {
        let mut all =
            (0..self.base.len()).map(|n| Ok((self.of(n)?, n))).collect::<Result<Vec<_>, StressError>>()?;
        all.sort_unstable_by(|a, b| b.cmp(a));
        Ok(all.into_iter().take(count).map(|(_, number)| number).collect())
    }
}

/// Stops `count` senders in mid-body, those with the most leased memory, and watches what becomes of that. Returns
/// which they are; they stay stopped.
///
/// # Errors
///
/// [`StressError`] if they cannot be stopped or looked at, or never have leased memory.
pub fn stop_and_watch(
    senders: &[Process],
    leases: &Leases,
    count: usize,
) -> Result<(Vec<usize>, TakeBack), StressError> {
    let give_up = now_ns() + FIND_NS;
    while now_ns() < give_up {
        let chosen = leases.greatest(count)?;
        chosen.iter().try_for_each(|number| senders[*number].signal(Signal::STOP))?;
        let stopped_ns = now_ns();
        std::thread::sleep(SETTLE);
        let held_bytes = leases.sum(&chosen)?;
        if held_bytes > 0 {
            let holders = chosen.iter().map(|n| leases.of(*n)).filter(|held| !matches!(held, Ok(0))).count();
            let found = TakeBack { stopped: count, holders, held_bytes, ..TakeBack::default() };
            return Ok((chosen.clone(), watch(leases, &chosen, stopped_ns, found)?));
        }
        chosen.iter().try_for_each(|number| senders[*number].signal(Signal::CONT))?;
    }
    Err(StressError::Memory("no sender has leased memory".to_owned()))
}

fn watch(
    leases: &Leases,
    chosen: &[usize],
    stopped_ns: u64,
    mut found: TakeBack,
) -> Result<TakeBack, StressError> {
    while now_ns() - stopped_ns < LOOK_NS {
        let held = leases.sum(chosen)?;
        let after_ms = (now_ns() - stopped_ns) as f64 / 1e6;
        if held < found.held_bytes {
            found.first_ms.get_or_insert(after_ms);
        }
        if held == 0 {
            found.all_ms = Some(after_ms);
            break;
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(found)
}

//! Time: nanoseconds of CLOCK_MONOTONIC, which all processes of one run share, and the hiccup meter.

use super::error::BenchError;
use super::placement;
use rustix::thread::ClockId;
use rustix::time::Timespec;

/// Nanoseconds per second.
pub const SECOND: u64 = 1_000_000_000;

/// Nanoseconds of CLOCK_MONOTONIC.
///
/// Cost: some 20 ns, in the vDSO, no system call.
#[inline(always)]
pub fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(ClockId::Monotonic);
    t.tv_sec as u64 * SECOND + t.tv_nsec as u64
}

/// Processor time that the calling thread has used, nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    let t = rustix::time::clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec as u64 * SECOND + t.tv_nsec as u64
}

/// A duration as the kernel takes it.
pub fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / SECOND) as i64, tv_nsec: (ns % SECOND) as i64 }
}

/// Sleeps until the clock says `until_ns`; returns at once if it already does.
pub fn sleep_until(until_ns: u64) {
    // Interrupted by a signal: the absolute time makes starting again harmless.
    while now_ns() < until_ns
        && rustix::thread::clock_nanosleep_absolute(ClockId::Monotonic, &timespec(until_ns)).is_err()
    {}
}

/// Spins for `seconds` on `cpu` and returns the longest gap between two readings of the clock: what the
/// machine took away from a thread that never sleeps. Puts the thread's affinity back afterwards.
///
/// # Errors
///
/// [`BenchError::Os`] if the thread cannot be pinned.
pub fn hiccup(cpu: Option<usize>, seconds: f64) -> Result<u64, BenchError> {
    let before = placement::allowed_cpus()?;
    placement::pin(cpu)?;
    let start = now_ns();
    let end = start + (seconds * SECOND as f64) as u64;
    let (mut last, mut longest) = (start, 0);
    while last < end {
        let now = now_ns();
        longest = longest.max(now - last);
        last = now;
    }
    placement::pin_to(&before)?;
    Ok(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_does_not_run_backwards_and_a_sleep_is_not_short() {
        let a = now_ns();
        sleep_until(a + 1_000_000);
        let b = now_ns();
        assert!(b >= a + 1_000_000);
        sleep_until(a);
    }

    #[test]
    fn the_hiccup_meter_sees_a_gap_and_leaves_the_affinity_alone() {
        let before = placement::allowed_cpus().unwrap();
        let longest = hiccup(Some(before[0]), 0.01).unwrap();
        assert!(longest > 0 && longest < 10 * SECOND);
        assert_eq!(placement::allowed_cpus().unwrap(), before);
    }
}

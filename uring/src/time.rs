//! Times as the kernel takes them: CLOCK_MONOTONIC, and never so far away that adding overflows.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Later times count as this one (95 years). The kernel keeps nanoseconds in an i64 and adds the
/// current time to a relative timeout without a check: a larger one would expire at once.
const FAR: Duration = Duration::from_secs(3_000_000_000);

/// The current CLOCK_MONOTONIC time, the clock of [`Driver::timeout`](crate::Driver::timeout).
///
/// Shape:  time since an arbitrary point, in practice since boot.
/// Cost:   about 30 ns, no system call where the vDSO serves the clock.
/// Source: clock_gettime(2).
pub fn monotonic_now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// `time` for an io_uring operation.
pub(crate) fn for_ring(time: Duration) -> io_uring::types::Timespec {
    time.min(FAR).into()
}

/// `time` for futex(2).
pub(crate) fn for_syscall(time: Duration) -> rustix::time::Timespec {
    let time = time.min(FAR);
    rustix::time::Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   the largest duration stays a valid time for the kernel.
    /// Method: convert it, look at the seconds.
    #[test]
    fn the_largest_duration_is_clamped() {
        let longest = for_syscall(Duration::MAX);
        assert_eq!((longest.tv_sec, longest.tv_nsec), (3_000_000_000, 0));
    }

    /// Goal:   nanoseconds survive the conversion.
    /// Method: one odd value.
    #[test]
    fn nanoseconds_are_kept() {
        let time = for_syscall(Duration::new(3, 999_999_999));
        assert_eq!((time.tv_sec, time.tv_nsec), (3, 999_999_999));
    }
}

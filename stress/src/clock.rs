//! Time: nanoseconds of CLOCK_MONOTONIC, which all processes of one run share.

use rustix::thread::ClockId;
use std::time::Duration;

/// Nanoseconds per second.
pub const SECOND: u64 = 1_000_000_000;

/// Nanoseconds of CLOCK_MONOTONIC. Cost: some 20 ns, no system call.
#[inline(always)]
pub fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(ClockId::Monotonic);
    t.tv_sec as u64 * SECOND + t.tv_nsec as u64
}

/// Sleeps until the clock says `until_ns`; returns at once if it already does.
pub fn sleep_until(until_ns: u64) {
    loop {
        let left = until_ns.saturating_sub(now_ns());
        if left == 0 {
            return;
        }
        std::thread::sleep(Duration::from_nanos(left));
    }
}

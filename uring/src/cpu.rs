#![allow(unsafe_code)]
//! Where the calling thread runs, and how soon it runs once woken.

use rustix::io::Errno;

/// The core that the calling thread runs on at this moment; it may be another one right after.
///
/// Cost:   a few nanoseconds and no system call: the C library reads the thread's rseq area, which the kernel
///         keeps up to date (glibc 2.35 and later), else the vDSO.
/// Source: sched_getcpu(3), rseq(2).
#[inline]
pub fn current_cpu() -> u32 {
    // SAFETY: takes nothing, touches nothing of ours.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).unwrap_or(u32::MAX)
}

/// `struct sched_attr` of `include/uapi/linux/sched/types.h`, first version, 48 bytes.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks the scheduler for short turns of the calling thread: it then runs sooner after it was woken beside threads
/// that compute, at the price of being interrupted sooner. Needs no privilege; its share of the core and its
/// nice value stay what they are. Kernels before 6.12 accept it and do nothing.
///
/// Shape:  `slice_ns` from 100 000 to 100 000 000; 0 for the kernel's default, about 3 000 000.
/// Source: sched_setattr(2), `sched_runtime` of SCHED_OTHER.
///
/// # Errors
///
/// What the kernel refuses, unchanged.
pub fn ask_for_short_turns(slice_ns: u64) -> Result<(), Errno> {
    let mut attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..SchedAttr::default() };
    // SAFETY: for both calls: 0 means the calling thread; `attr` is a live structure of the size that it names,
    // which the first call writes and the second reads.
    let result = unsafe {
        let size = size_of::<SchedAttr>();
        match libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) {
            0 => {
                attr.runtime = slice_ns;
                libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0)
            }
            refused => refused,
        }
    };
    if result == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&errno).unwrap_or(Errno::INVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_knows_its_core() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        for core in (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)) {
            let mut set = rustix::thread::CpuSet::new();
            set.set(core);
            rustix::thread::sched_setaffinity(None, &set).unwrap();
            assert_eq!(current_cpu() as usize, core);
        }
        rustix::thread::sched_setaffinity(None, &allowed).unwrap();
    }

    /// Goal: asking for short turns changes nothing else of the thread's scheduling.
    #[test]
    fn short_turns_need_no_privilege() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        ask_for_short_turns(100_000).unwrap();
        assert_eq!(nice(), before);
        ask_for_short_turns(0).unwrap();
    }
}

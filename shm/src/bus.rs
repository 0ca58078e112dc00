#![allow(unsafe_code)]
//! Faults in segments that the kernel cannot resolve (SIGBUS): the page is replaced by one of zeros, the session is lost,
//! and the process lives (F19).
//!
//! Nothing that a client can do is known to cause one: segments are sealed against shrinking and their pages are backed when
//! they are granted. What is left is a kernel without memory for a page that a client has made a hole of, and mistakes of
//! ours. Faults elsewhere are passed on to the handler that was there before.
//!
//! Rule: the handler does what is safe in a handler only: loads, stores, `mmap`. Whoever looks after sessions asks
//!       [`faults`] now and then, and each segment whether it [has failed](crate::segment::Segment::has_failed).

use crate::map::PAGE;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU32, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// Segments that can be guarded at the same time; further ones are not, and a fault in them ends the process.
const RANGES_MAX: usize = 4096;
/// The start of a range that is being written.
const CLAIMED: usize = 1;

/// A range of addresses; free while it starts at 0.
struct Range {
    start: AtomicUsize,
    end: AtomicUsize,
    failed: AtomicBool,
}

impl Range {
    const fn free() -> Self {
        Self { start: AtomicUsize::new(0), end: AtomicUsize::new(0), failed: AtomicBool::new(false) }
    }
}

static RANGES: [Range; RANGES_MAX] = [const { Range::free() }; RANGES_MAX];
/// Ranges that have ever been used: the handler looks no further.
static USED: AtomicUsize = AtomicUsize::new(0);
static FAULTS: AtomicU32 = AtomicU32::new(0);
/// The handler that was there before ours, and its flags; set before ours is.
static PREVIOUS: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static PREVIOUS_FLAGS: AtomicI32 = AtomicI32::new(0);
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Faults that were taken care of since the process began.
pub fn faults() -> u32 {
    // Acquire pairs with the Release in `replaces`: which ranges have failed is seen with their number.
    FAULTS.load(Acquire)
}

/// Has faults in guarded memory taken care of from here on, in the whole process. What was installed for SIGBUS before is
/// called for all others. Does nothing when called again.
///
/// # Errors
///
/// That of `sigaction`.
pub fn install() -> io::Result<()> {
    if INSTALLED.swap(true, AcqRel) {
        return Ok(());
    }
    set_handler().inspect_err(|_| INSTALLED.store(false, Release))
}

fn set_handler() -> io::Result<()> {
    let checked = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the pointer is valid for writes; nothing is installed yet.
    checked(unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded, so the kernel has written it.
    let mut ours = unsafe { previous.assume_init() };
    PREVIOUS_FLAGS.store(ours.sa_flags, Relaxed);
    PREVIOUS.store(ours.sa_sigaction, Release);
    ours.sa_sigaction = on_fault as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler does only what is safe in one, and lives as long as the process.
    checked(unsafe { libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) })
}

/// The guarded range that holds `address`.
fn range_of(address: usize) -> Option<&'static Range> {
    RANGES.iter().take(USED.load(Acquire)).find(|range| {
        // Acquire pairs with the Release in `Guard::of`: the end belongs to this start, or the start changes.
        let start = range.start.load(Acquire);
        let inside = start > CLAIMED && (start..range.end.load(Acquire)).contains(&address);
        inside && range.start.load(Acquire) == start
    })
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler with SA_SIGINFO; SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    if range_of(address).is_some_and(|range| replaces(range, address)) {
        return;
    }
    let (previous, flags) = (PREVIOUS.load(Acquire), PREVIOUS_FLAGS.load(Relaxed));
    if [libc::SIG_DFL, libc::SIG_IGN].contains(&previous) {
        // It is blocked here, and ends the process when this returns.
        // SAFETY: both are allowed in a handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    } else if flags & libc::SA_SIGINFO != 0 {
        type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: whoever has installed it with SA_SIGINFO gave a function of this type.
        let handler: Handler = unsafe { std::mem::transmute(previous) };
        handler(signal, info, context);
    } else {
        // SAFETY: without SA_SIGINFO it takes the signal alone.
        let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(previous) };
        handler(signal);
    }
}

/// Puts a page of zeros where `address` lies; says whether it could.
fn replaces(range: &Range, address: usize) -> bool {
    let page = address & !(PAGE - 1);
    let (rights, how) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    // SAFETY: the page belongs to a mapping that lives, since whoever has run into it uses it, and of which views allow
    // atomics and raw copies only: zeros are as good there as anything.
    let replaced = unsafe {
        let errno = *libc::__errno_location();
        let got = libc::mmap(page as *mut libc::c_void, PAGE, rights, how, -1, 0);
        *libc::__errno_location() = errno;
        got != libc::MAP_FAILED
    };
    if replaced {
        range.failed.store(true, Release);
        FAULTS.fetch_add(1, Release);
    }
    replaced
}

/// A mapping whose faults are taken care of, until this is dropped. To be dropped before it is unmapped.
#[derive(Debug)]
pub(crate) struct Guard(usize);

impl Guard {
    /// `None` if there are too many, or nobody has called [`install`].
    pub fn of(start: usize, len: usize) -> Option<Self> {
        if !INSTALLED.load(Acquire) {
            return None;
        }
        let index = RANGES.iter().position(|range| {
            range.start.load(Relaxed) == 0
                && range.start.compare_exchange(0, CLAIMED, AcqRel, Relaxed).is_ok()
        })?;
        USED.fetch_max(index + 1, AcqRel);
        let range = &RANGES[index];
        range.failed.store(false, Relaxed);
        range.end.store(start + len, Relaxed);
        // Release pairs with the Acquire in `range_of`.
        range.start.store(start, Release);
        Some(Self(index))
    }

    /// Whether a page has been replaced.
    pub fn has_failed(&self) -> bool {
        RANGES[self.0].failed.load(Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RANGES[self.0].end.store(0, Release);
        RANGES[self.0].start.store(0, Release);
    }
}

/// Start and length of all guarded ranges, bytes: for tests.
#[doc(hidden)]
pub fn guarded() -> Vec<(usize, usize)> {
    let of = |range: &Range| (range.start.load(Acquire), range.end.load(Acquire));
    let ranges = RANGES.iter().take(USED.load(Acquire)).map(of);
    ranges.filter(|(start, end)| start < end).map(|(start, end)| (start, end - start)).collect()
}

/// Has the page at `address` lost as a fault there would have it; says whether it is guarded: for tests.
#[doc(hidden)]
pub fn lose(address: usize) -> bool {
    range_of(address).is_some_and(|range| replaces(range, address))
}

#[cfg(all(test, not(miri), not(loom)))]
mod tests {
    use super::*;
    use crate::map::Mapping;
    use memmap2::MmapRaw;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::OwnedFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};

    /// Two pages of a file that can be cut.
    fn file() -> (OwnedFd, MmapRaw) {
        let fd = memfd_create("doorbell-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 2 * PAGE as u64).unwrap();
        let map = MmapRaw::map_raw(&fd).unwrap();
        (fd, map)
    }

    /// Goal:   F19: memory that is gone reads as zeros, can be written, and is known to be lost; other memory is not.
    /// Method: a real SIGBUS: the file behind one of two mappings is cut.
    #[test]
    fn f19_a_page_that_is_gone_is_replaced_and_its_mapping_known_as_lost() {
        install().unwrap();
        let ((cut, map), (_whole, other)) = (file(), file());
        let (lost, kept) = (Mapping::guarded(map), Mapping::guarded(other));
        let word = |map: &std::sync::Arc<Mapping>, at| map.object::<crate::sync::AtomicU64>(at).unwrap();
        word(&lost, PAGE).store(7, Relaxed);
        word(&kept, PAGE).store(8, Relaxed);
        assert!(guarded().len() >= 2 && !lost.has_failed());
        let before = faults();
        ftruncate(&cut, PAGE as u64).unwrap();
        assert_eq!(word(&lost, PAGE).load(Relaxed), 0);
        word(&lost, PAGE).store(9, Relaxed);
        assert_eq!((word(&lost, PAGE).load(Relaxed), word(&lost, 0).load(Relaxed)), (9, 0));
        assert!(lost.has_failed() && !kept.has_failed() && faults() > before);
        assert_eq!(word(&kept, PAGE).load(Relaxed), 8);
    }

    const CHILD: &str = "DOORBELL_TEST_FAULTS";

    /// How the named test ends as a process of its own, in which [`CHILD`] is set.
    fn as_process(name: &str) -> ExitStatus {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output =
            child.args(["--exact", &format!("bus::tests::{name}")]).env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("running 1 test\n"), "there is no {name}: {said}");
        output.status
    }

    /// Runs into a fault in memory that nobody guards.
    fn fault_elsewhere() -> ! {
        install().unwrap();
        let (cut, map) = file();
        let map = Mapping::of_file(map);
        ftruncate(&cut, 0).unwrap();
        let value = map.object::<crate::sync::AtomicU64>(0).unwrap().load(Relaxed);
        panic!("it reads {value}");
    }

    /// Goal:   F19: a fault in memory that is not a segment's ends the process as it always did.
    /// Method: this test once more as a process of its own, which runs into such a fault; the standard library's handler,
    ///         which takes a siginfo, was there before.
    #[test]
    fn f19_a_fault_elsewhere_ends_the_process() {
        if std::env::var_os(CHILD).is_some() {
            fault_elsewhere();
        }
        let status = as_process("f19_a_fault_elsewhere_ends_the_process");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }

    /// Goal:   the same where there was no handler before.
    #[test]
    fn f19_a_fault_elsewhere_ends_a_process_that_had_no_handler() {
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: the default is no code of ours.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
            fault_elsewhere();
        }
        let status = as_process("f19_a_fault_elsewhere_ends_a_process_that_had_no_handler");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }

    /// Goal:   the same where a handler was there that takes the signal alone: it is called.
    #[test]
    fn f19_a_fault_elsewhere_is_handed_to_the_handler_of_before() {
        extern "C" fn leaves(signal: libc::c_int) {
            // SAFETY: allowed in a handler.
            unsafe { libc::_exit(40 + signal) }
        }
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: the handler does only what is safe in one.
            unsafe { libc::signal(libc::SIGBUS, leaves as *const () as libc::sighandler_t) };
            fault_elsewhere();
        }
        let status = as_process("f19_a_fault_elsewhere_is_handed_to_the_handler_of_before");
        assert_eq!(status.code(), Some(40 + libc::SIGBUS), "{status}");
    }

    /// Goal:   nothing is guarded before there is a handler, nor more than there is room for; room comes back.
    /// Method: a process of its own; ranges of addresses that nobody uses.
    #[test]
    fn f19_as_much_is_guarded_as_there_is_room_for() {
        if std::env::var_os(CHILD).is_none() {
            let status = as_process("f19_as_much_is_guarded_as_there_is_room_for");
            return assert!(status.success(), "{status}");
        }
        let guard = |n: usize| Guard::of(n * PAGE, PAGE);
        assert!(guard(1).is_none() && guarded().is_empty());
        install().unwrap();
        let mut guards: Vec<_> = (1..=RANGES_MAX).map(|n| guard(n).unwrap()).collect();
        assert!(guard(RANGES_MAX + 1).is_none());
        assert_eq!(guarded().len(), RANGES_MAX);
        guards.remove(7);
        assert!(guard(RANGES_MAX + 1).is_some_and(|guard| !guard.has_failed()));
    }
}

//! A fork of a process that has a segment: nothing of it is there, and it is known (F9).
#![cfg(not(any(loom, miri, fuzzing)))]
#![allow(unsafe_code)]

use doorbell_shm::fork::Birthplace;
use doorbell_shm::layout::Geometry;
use doorbell_shm::map::PAGE;
use doorbell_shm::segment::{Identity, Segment};
use memmap2::MmapOptions;
use rustix::process::{Pid, WaitOptions, waitpid};

const IDENTITY: Identity = Identity { epoch: 1, session: [2, 3] };

/// Whether `work` holds in a fork of this process. Threads that other tests run on are not there: it prints nothing and
/// waits for nobody.
fn holds_in_a_fork(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child calls what does not wait for another thread, and ends without returning.
    match unsafe { libc::fork() } {
        // SAFETY: ends the process.
        0 => unsafe { libc::_exit(i32::from(!work())) },
        pid => {
            let pid = Pid::from_raw(pid).expect("a fork");
            let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
            status.exit_status() == Some(0)
        }
    }
}

/// Goal:   F9: a fork knows that it is one, and of which of its ancestors it is not; so does a fork of a fork.
#[test]
fn f09_a_fork_is_known_as_one() {
    let here = Birthplace::here().unwrap();
    assert!(here.is_here() && Birthplace::here().unwrap().is_here());
    assert!(holds_in_a_fork(|| {
        let was_known = !here.is_here();
        let child = Birthplace::here().unwrap();
        let grandchild = holds_in_a_fork(|| {
            let was_known = !here.is_here() && !child.is_here();
            let grandchild = Birthplace::here().unwrap();
            was_known && grandchild.is_here() && !here.is_here() && !child.is_here()
        });
        was_known && grandchild && child.is_here() && !here.is_here()
    }));
    assert!(here.is_here());
}

/// Goal:   F9: a fork that drops what it has of its parent's segment unmaps nothing of its own.
/// Method: in the fork other memory is mapped where the segment is in its parent, and read after the drop.
#[test]
fn f09_a_fork_unmaps_nothing_of_its_own() {
    let server = Segment::create(Geometry::SMALLEST, 1, IDENTITY).unwrap();
    let client = Segment::attach(server.memory().unwrap(), Geometry::SMALLEST, 1, IDENTITY).unwrap();
    assert!(!client.was_left_behind() && !server.was_left_behind());
    let at = client.mapping().slice::<std::sync::atomic::AtomicU64>(0, 1).unwrap().as_ptr() as usize;
    let len = client.len();
    assert!(holds_in_a_fork(move || {
        let was_known = client.was_left_behind();
        // The gap that the segment has left is the first that fits.
        let maps: Vec<_> = (0..64).map(|_| MmapOptions::new().len(len).map_anon().unwrap()).collect();
        let is_reused = maps.iter().any(|map| (at..at + len).contains(&(map.as_ptr() as usize + len - PAGE)));
        drop(client);
        was_known && is_reused && maps.iter().all(|map| map.iter().all(|byte| *byte == 0))
    }));
}

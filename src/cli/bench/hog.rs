//! Hogs: processes that keep every allowed core busy, as a compiler beside the editor does. What is cold must
//! stay quick then: whoever wakes competes with somebody who never sleeps.

use super::child::{self, Process, Role};
use super::error::BenchError;
use super::placement;
use super::worker;
use std::io::Read;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Starts one on every allowed core and returns once all of them burn. They end when they are dropped.
///
/// # Errors
///
/// [`BenchError`] if one cannot be started or pinned.
pub fn start() -> Result<Vec<Process>, BenchError> {
    let start = |cpu| child::spawn(Role::Hog, &cpu, Stdio::piped(), Stdio::piped());
    let mut hogs = placement::allowed_cpus()?.into_iter().map(start).collect::<Result<Vec<_>, _>>()?;
    hogs.iter_mut().try_for_each(Process::receive::<()>)?;
    Ok(hogs)
}

/// The process itself: spins on `cpu` until its standard input ends.
///
/// # Errors
///
/// [`BenchError`] if it cannot be pinned, or the parent is gone.
pub fn run(cpu: usize) -> Result<(), BenchError> {
    placement::pin(Some(cpu))?;
    worker::say(&())?;
    let ended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ended);
    // Somebody has to sleep on the input while this thread spins.
    std::thread::spawn(move || {
        // Whether it ends or fails, there is nobody left to burn for.
        std::io::stdin().lock().read_to_end(&mut Vec::new()).ok();
        seen.store(true, Relaxed);
    });
    while !ended.load(Relaxed) {
        std::hint::spin_loop();
    }
    Ok(())
}

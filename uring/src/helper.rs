//! Reading files without a ring: what is cached at once, the rest by a thread that may wait for a disk.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::io::{Errno, ReadWriteFlags};

use crate::epoll::ring_eventfd;

/// The thread's stack: it makes system calls and nothing else.
const STACK: usize = 64 << 10;

/// A read for the helper.
pub(crate) struct Job {
    pub(crate) number: u32,
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

/// How a job has ended.
pub(crate) type JobResult = (u32, Result<Vec<u8>, Errno>);

/// A thread that reads, one job after the other, into memory of its own. It ends when its driver has gone.
pub(crate) struct Helper {
    jobs: Sender<Job>,
    results: Receiver<JobResult>,
}

impl Helper {
    /// Starts the thread, which rings a copy of `eventfd` after each job.
    ///
    /// # Errors
    ///
    /// What the kernel refuses: a thread, or a descriptor.
    pub(crate) fn start(eventfd: &OwnedFd) -> std::io::Result<Self> {
        let eventfd = eventfd.try_clone()?;
        let (jobs, to_do) = channel::<Job>();
        let (done, results) = channel();
        std::thread::Builder::new().name("file-reads".to_owned()).stack_size(STACK).spawn(move || {
            for Job { number, file, offset, len } in to_do {
                let mut bytes = vec![0; len];
                let result = read_whatever_it_takes(&file, offset, &mut bytes);
                let result = result.map(|got| {
                    bytes.truncate(got);
                    bytes
                });
                // The driver may have gone meanwhile: then there are no more jobs either.
                if done.send((number, result)).is_err() || ring_eventfd(&eventfd).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { jobs, results })
    }

    /// Gives it a job; `false` if it has ended.
    pub(crate) fn take(&self, job: Job) -> bool {
        self.jobs.send(job).is_ok()
    }

    /// The next job that has ended.
    pub(crate) fn next_result(&self) -> Option<JobResult> {
        self.results.try_recv().ok()
    }
}

/// Fills `target` as far as the file goes, without waiting for a disk; `None` if that cannot be done.
pub(crate) fn read_cached(file: &OwnedFd, offset: u64, target: &mut [u8]) -> Option<Result<usize, Errno>> {
    match fill(file, offset, target, ReadWriteFlags::NOWAIT) {
        // Not cached, or nobody can tell.
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => None,
        result => Some(result),
    }
}

/// Fills `target` as far as the file goes.
pub(crate) fn read_whatever_it_takes(file: &OwnedFd, offset: u64, target: &mut [u8]) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < target.len() {
        match rustix::io::pread(file, &mut target[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(filled)
}

fn fill(file: &OwnedFd, offset: u64, target: &mut [u8], flags: ReadWriteFlags) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < target.len() {
        let mut rest = [IoSliceMut::new(&mut target[filled..])];
        match rustix::io::preadv2(file, &mut rest, offset + filled as u64, flags) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(filled)
}

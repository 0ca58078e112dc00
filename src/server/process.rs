//! Which process a client is, for its quotas (F27, F29): by its pidfd, never by a number that somebody else may get
//! (F10).

use crate::error::{IpcError, Result};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `f_type` of the file system that pidfds are files of since kernel 6.9, from `include/uapi/linux/magic.h`.
const PID_FS_MAGIC: i64 = 0x5049_4446;

/// A process: two keys are equal if they are of one process, and only then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessKey(u64);

/// How processes are told apart on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Processes {
    /// By the inode of the pidfd, which no other process has for as long as the machine runs.
    Inodes,
    /// By the number that the pidfd shows, before kernel 6.9. Another process can have it only when this one has
    /// ended, and its end is the end of all that it holds here: two share a quota for some milliseconds at worst.
    Numbers,
}

impl Processes {
    /// Finds out by looking at a pidfd of our own.
    pub fn detect() -> Result<Self> {
        let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| IpcError::io("pidfd_open", e))?;
        let system = rustix::fs::fstatfs(&own).map_err(|e| IpcError::io("fstatfs of a pidfd", e))?;
        Ok(if system.f_type == PID_FS_MAGIC { Self::Inodes } else { Self::Numbers })
    }

    /// The process of `pidfd`; `None` where that cannot be found out, which leaves it without a quota of its own.
    pub fn key(self, pidfd: BorrowedFd<'_>) -> Option<ProcessKey> {
        match self {
            Self::Inodes => rustix::fs::fstat(pidfd).ok().map(|stat| ProcessKey(stat.st_ino)),
            Self::Numbers => number(pidfd).map(ProcessKey),
        }
    }
}

/// The number in the pidfd's entry of /proc; `None` for a process that has been reaped, is of another pid namespace,
/// or while descriptors are short.
fn number(pidfd: BorrowedFd<'_>) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd())).ok()?;
    let number: i64 = text.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    u64::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::Pid;
    use std::process::{Child, Command, Stdio};

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap()
    }

    /// Goal:   F10, F27, F29: two pidfds of one process have one key, those of two processes have two, also once one
    ///         of them has ended; in both ways of telling, whichever this kernel needs.
    /// Method: ourselves and two children, one of which is killed and reaped.
    #[test]
    fn f10_f27_a_key_is_of_one_process_alone() {
        let open = |pid| pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let detected = Processes::detect().unwrap();
        let (mut one, mut two) = (sleeper(), sleeper());
        let pids = [getpid(), Pid::from_child(&one), Pid::from_child(&two)];
        let (first, second) = (pids.map(open), pids.map(open));
        for processes in [detected, Processes::Numbers] {
            let keys = |fds: &[_; 3]| [0, 1, 2].map(|i: usize| processes.key(AsFd::as_fd(&fds[i])).unwrap());
            let keys = (keys(&first), keys(&second));
            assert_eq!(keys.0, keys.1);
            let [own, one, two] = keys.0;
            assert!(own != one && own != two && one != two, "{keys:?}");
        }
        let before = detected.key(first[1].as_fd());
        for child in [&mut one, &mut two] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(Processes::Numbers.key(first[1].as_fd()), None);
        if detected == Processes::Inodes {
            assert_eq!(detected.key(first[1].as_fd()), before);
        }
    }
}

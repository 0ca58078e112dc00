//! Finding out. Everything here asks or tries; nothing judges.

mod calls;
mod cgroup;
pub mod files;
mod machine;
mod socket;
mod trial;

use super::findings::{Across, Asked, DmaLatency, Findings, Kernel, Limits, Trial, Uring, Wake};
use doorbell::{ServerConfig, reactor_cores, wake_cost};
use doorbell_uring::SetupError;
use files::Files;
use rustix::io::Errno;
use rustix::process::Resource;
use rustix::thread::CpuSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Finds out everything about this machine for a server of `config` that is to listen at `socket`.
pub fn find_out(config: &ServerConfig, socket: &Path) -> Findings {
    let files = Files(PathBuf::from("/"));
    // First of all: the trial raises the limit on descriptors.
    let limits = limits(&files);
    let cores = machine::cores(&files, allowed_cores());
    let uring = calls::uring();
    let trial = trial(config, &uring);
    Findings {
        asked: asked(config, socket),
        kernel: Kernel {
            release: rustix::system::uname().release().to_string_lossy().into_owned(),
            short_turns: calls::short_turns(),
            landlock: calls::landlock(),
            seccomp: calls::seccomp(),
        },
        memory: calls::memory(),
        process: calls::process(&cores.allowed),
        wake: wake(&cores.allowed, cores.dma_latency == DmaLatency::Usable),
        socket: socket::socket(&files, socket),
        limits,
        cores,
        uring,
        trial,
    }
}

fn asked(config: &ServerConfig, socket: &Path) -> Asked {
    Asked {
        socket: socket.to_owned(),
        max_sessions: config.max_sessions,
        descriptors: config.descriptors_needed(),
        policy: config.policy,
        spin_percent: config.spin_percent,
        reactors: reactor_cores(config).map_err(|error| error.to_string()),
    }
}

/// A server is tried whatever became of io_uring (F38), but not without a descriptor to undo it with.
fn trial(config: &ServerConfig, uring: &Uring) -> Trial {
    match uring.failed {
        Some((_, SetupError::Refused { errno: Errno::MFILE | Errno::NFILE, .. })) => {
            Trial::NotTried("no file descriptor is left".to_owned())
        }
        _ => trial::run(config),
    }
}

fn limits(files: &Files) -> Limits {
    Limits {
        descriptors: calls::limit(Resource::Nofile),
        locked: calls::limit(Resource::Memlock),
        may_lock: calls::may_lock(files.text("/proc/self/uid_map").as_deref()),
        backlog: files.number("/proc/sys/net/core/somaxconn"),
        memory: cgroup::memory(files),
        cpu: cgroup::cpu(files),
    }
}

/// Cores that the calling thread may use; none if the kernel does not say.
fn allowed_cores() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect()
}

/// Measures wakes between the first two cores that may be used, as a server does when it starts.
fn wake(allowed: &[usize], may_forbid_sleep: bool) -> Wake {
    let cost = |from, to| wake_cost(from, to).map_err(|error| error.to_string());
    let Some(first) = allowed.first().copied() else {
        return Wake {
            same: Err("the kernel does not say which cores may be used".to_owned()),
            across: None,
        };
    };
    let across = allowed.get(1).map(|second| Across {
        from: first,
        to: *second,
        cost: cost(first, *second),
        awake_ns: if may_forbid_sleep { without_sleep(|| cost(first, *second).ok()) } else { None },
    });
    Wake { same: cost(first, first), across }
}

/// Measures while no core may enter a sleep state that takes time to leave.
fn without_sleep<T>(measure: impl FnOnce() -> Option<T>) -> Option<T> {
    let mut latency = std::fs::OpenOptions::new().write(true).open(machine::DMA_LATENCY).ok()?;
    latency.write_all(&0i32.to_ne_bytes()).ok()?;
    let measured = measure();
    // Held until here: closing it allows sleep again.
    drop(latency);
    measured
}

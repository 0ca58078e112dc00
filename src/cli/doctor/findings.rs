//! What was found on this machine, without any judgement: numbers, names and answers of the kernel.
//!
//! Probes fill it in, `judge` reads it; tests of `judge` make it up.

use doorbell::WaitPolicy;
use doorbell_uring::{SetupError, Step};
use rustix::io::Errno;
use std::path::PathBuf;

/// Everything that the verdicts and the plan depend on.
#[derive(Debug, Clone)]
pub struct Findings {
    /// What the server is asked to be.
    pub asked: Asked,
    /// The kernel.
    pub kernel: Kernel,
    /// The self-test of io_uring.
    pub uring: Uring,
    /// Shared memory, each step after the one before.
    pub memory: Vec<(MemoryStep, Tried)>,
    /// Threads and processes.
    pub process: Process,
    /// Limits of this process, its cgroup and the machine.
    pub limits: Limits,
    /// Cores and how they sleep.
    pub cores: Cores,
    /// What waking a thread costs.
    pub wake: Wake,
    /// The socket path.
    pub socket: Socket,
    /// A server that was started to see it answer.
    pub trial: Trial,
}

/// The answer to trying something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tried {
    /// It does what is relied on.
    Works,
    /// The kernel refused a call.
    Refused {
        /// The call.
        call: &'static str,
        /// Its answer.
        errno: Errno,
    },
    /// Nothing was refused, but the result is not what is relied on.
    Wrong(String),
    /// Something before it has failed.
    Skipped,
}

/// The server that is asked about.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Where it is to listen.
    pub socket: PathBuf,
    /// Sessions it is to carry.
    pub max_sessions: u32,
    /// Descriptors that it needs for them.
    pub descriptors: u64,
    /// How it waits.
    pub policy: WaitPolicy,
    /// Share of a core that a reactor may spend on polling, percent.
    pub spin_percent: u32,
    /// The core that each reactor is pinned to, the home reactor first; or why that cannot be said.
    pub reactors: Result<Vec<Option<usize>>, String>,
}

/// The kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// uname(2) release.
    pub release: String,
    /// Asking the scheduler for short turns.
    pub short_turns: Tried,
    /// Giving up files.
    pub landlock: Tried,
    /// Giving up system calls.
    pub seccomp: Tried,
}

/// How the self-test of io_uring went.
#[derive(Debug, Clone)]
pub struct Uring {
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for a group only, 2 for nobody; `None` if it cannot be read.
    pub disabled: Option<u32>,
    /// `kernel.io_uring_group`: the group of value 1, if it names one.
    pub group: Option<i64>,
    /// Where it ended, if it did not pass: this step and all after it did not pass.
    pub failed: Option<(Step, SetupError)>,
}

/// What sessions rely on in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryStep {
    /// A memfd that can be sealed and not executed.
    Memfd,
    /// Making pages exist beforehand, and seeing them counted.
    Allocate,
    /// Giving pages back.
    Punch,
    /// Seals, after which the size cannot change.
    Seal,
    /// A session's whole segment, made and attached.
    Segment,
}

/// What the server relies on about threads and processes.
#[derive(Debug, Clone)]
pub struct Process {
    /// A pidfd of the process at the other end of a socket.
    pub peer: Tried,
    /// Pinning a thread to each core that may be used.
    pub pinning: Tried,
    /// The core that a pinned thread is told it runs on.
    pub current_core: Tried,
    /// What asking for it costs, ns.
    pub current_core_ns: Option<u64>,
}

/// A soft and a hard limit; `None` means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The one in force.
    pub soft: Option<u64>,
    /// What it may be raised to.
    pub hard: Option<u64>,
}

/// Limits. What cannot be read is `None`.
#[derive(Debug, Clone)]
pub struct Limits {
    /// RLIMIT_NOFILE.
    pub descriptors: Limit,
    /// RLIMIT_MEMLOCK, bytes.
    pub locked: Limit,
    /// CAP_IPC_LOCK, which that limit does not hold for.
    pub may_lock: bool,
    /// net.core.somaxconn.
    pub backlog: Option<u64>,
    /// The cgroup's limit on memory, bytes; `Some(None)` means that there is none.
    pub memory: Option<Option<u64>>,
    /// The cgroup's limit on processor time, thousandths of a core; `Some(None)` means that there is none.
    pub cpu: Option<Option<u64>>,
}

/// Cores. What cannot be read is empty or `None`.
#[derive(Debug, Clone)]
pub struct Cores {
    /// Online in the machine.
    pub online: Vec<usize>,
    /// That this process may use.
    pub allowed: Vec<usize>,
    /// Of these, the groups that are hyperthreads of one core.
    pub siblings: Vec<Vec<usize>>,
    /// Whether there is a hypervisor.
    pub is_virtual: Option<bool>,
    /// What the machine calls itself.
    pub machine: Option<String>,
    /// What cores do when idle.
    pub idle: Idle,
    /// Whether this process may forbid deep sleep.
    pub dma_latency: DmaLatency,
}

/// What idle cores do.
#[derive(Debug, Clone, Default)]
pub struct Idle {
    /// cpuidle driver.
    pub driver: Option<String>,
    /// cpuidle governor.
    pub governor: Option<String>,
    /// Sleep states of the first core that may be used.
    pub states: Vec<IdleState>,
    /// idle=poll on the kernel's command line.
    pub polls: bool,
}

/// One sleep state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdleState {
    /// Its name.
    pub name: String,
    /// What leaving it takes, us.
    pub latency_us: u64,
    /// Whether it is in use.
    pub enabled: bool,
}

/// /dev/cpu_dma_latency: whoever holds it open with a number of us forbids sleep states that take longer to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DmaLatency {
    /// There is none.
    Absent,
    /// This user may not write it.
    NotPermitted,
    /// It may be used.
    Usable,
}

/// What waking a sleeping thread costs, ns, or why that is not known.
#[derive(Debug, Clone)]
pub struct Wake {
    /// On the core of the waker.
    pub same: Result<u64, String>,
    /// On another core; `None` if there is no other.
    pub across: Option<Across>,
}

/// A wake across cores.
#[derive(Debug, Clone)]
pub struct Across {
    /// The waker's core.
    pub from: usize,
    /// The sleeper's core.
    pub to: usize,
    /// Its cost, ns.
    pub cost: Result<u64, String>,
    /// The same while /dev/cpu_dma_latency was held at 0, if that may be done.
    pub awake_ns: Option<u64>,
}

/// The socket path and who is there.
#[derive(Debug, Clone)]
pub struct Socket {
    /// The directory as it is, if it is there.
    pub directory: Option<Directory>,
    /// Whether sockets can be addressed through /proc/self/fd.
    pub has_proc: bool,
    /// What became of the path.
    pub place: Place,
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Its owner.
    pub uid: u32,
    /// Its permissions.
    pub mode: u32,
}

/// What a server would find at the path.
#[derive(Debug, Clone)]
pub enum Place {
    /// It can have it.
    Free,
    /// A server answers there.
    Answers,
    /// Somebody listens there, but a client cannot use it, for this reason.
    Silent(String),
    /// It cannot have it, for this reason.
    Refused(String),
}

/// How a server that was started for the purpose answered.
#[derive(Debug, Clone)]
pub enum Trial {
    /// It answered; medians, ns.
    Answered {
        /// Calls one after the other.
        back_to_back_ns: u64,
        /// Calls after a pause of a millisecond.
        after_pause_ns: u64,
    },
    /// It could not be tried, for a reason that says nothing about doorbell.
    NotTried(String),
    /// It failed.
    Failed(String),
}

/// Made-up machines for the tests of whoever judges.
#[cfg(test)]
pub mod fixture {
    use super::*;
    use doorbell_uring::{Cause, Host};

    const MEMORY: [MemoryStep; 5] =
        [MemoryStep::Memfd, MemoryStep::Allocate, MemoryStep::Punch, MemoryStep::Seal, MemoryStep::Segment];

    /// A workstation of two cores with nothing to complain about.
    pub fn good() -> Findings {
        let limit = Limit { soft: Some(1 << 20), hard: Some(1 << 20) };
        let sleep = IdleState { name: "C1".to_owned(), latency_us: 2, enabled: true };
        Findings {
            asked: Asked {
                socket: PathBuf::from("/run/user/1000/doorbell.sock"),
                max_sessions: 1024,
                descriptors: 3136,
                policy: WaitPolicy::Handoff,
                spin_percent: 5,
                reactors: Ok(vec![Some(0), Some(1)]),
            },
            kernel: Kernel {
                release: "6.18.2".to_owned(),
                short_turns: Tried::Works,
                landlock: Tried::Works,
                seccomp: Tried::Works,
            },
            uring: Uring { disabled: Some(0), group: None, failed: None },
            memory: MEMORY.map(|step| (step, Tried::Works)).to_vec(),
            process: Process {
                peer: Tried::Works,
                pinning: Tried::Works,
                current_core: Tried::Works,
                current_core_ns: Some(2),
            },
            limits: Limits {
                descriptors: limit,
                locked: limit,
                may_lock: true,
                backlog: Some(4096),
                memory: Some(None),
                cpu: Some(None),
            },
            cores: Cores {
                online: vec![0, 1],
                allowed: vec![0, 1],
                siblings: Vec::new(),
                is_virtual: Some(false),
                machine: Some("Maker Desk 3".to_owned()),
                idle: Idle {
                    driver: Some("acpi_idle".to_owned()),
                    governor: Some("menu".to_owned()),
                    states: vec![sleep],
                    polls: false,
                },
                dma_latency: DmaLatency::NotPermitted,
            },
            wake: Wake {
                same: Ok(1100),
                across: Some(Across { from: 0, to: 1, cost: Ok(2500), awake_ns: None }),
            },
            socket: Socket {
                directory: Some(Directory { uid: 1000, mode: 0o700 }),
                has_proc: true,
                place: Place::Free,
            },
            trial: Trial::Answered { back_to_back_ns: 2000, after_pause_ns: 4000 },
        }
    }

    /// An old kernel in a sandbox without /proc and /sys that refuses everything.
    pub fn hopeless() -> Findings {
        let refused = |call| Tried::Refused { call, errno: Errno::NOSYS };
        let release = "5.4.0".to_owned();
        let host = Host { release: release.clone(), ..Host::default() };
        let (step, errno) = (Step::CreateRing, Errno::NOSYS);
        let error = SetupError::Refused { step, errno, cause: Cause::of(step, errno, host) };
        let low = Limit { soft: Some(16), hard: Some(16) };
        let good = good();
        let unknown = || Err("sched_getaffinity failed".to_owned());
        Findings {
            asked: Asked { reactors: unknown(), ..good.asked },
            kernel: Kernel {
                release,
                short_turns: refused("sched_setattr"),
                landlock: Tried::Wrong("not enforced".to_owned()),
                seccomp: refused("seccomp"),
            },
            uring: Uring { disabled: None, group: None, failed: Some((step, error)) },
            memory: MEMORY
                .map(|step| {
                    (step, if step == MemoryStep::Memfd { refused("memfd_create") } else { Tried::Skipped })
                })
                .to_vec(),
            process: Process {
                peer: refused("getsockopt(SO_PEERPIDFD)"),
                pinning: refused("sched_setaffinity"),
                current_core: Tried::Wrong("on core 1 a thread is told that it runs on 0".to_owned()),
                current_core_ns: None,
            },
            limits: Limits {
                descriptors: low,
                locked: low,
                may_lock: false,
                backlog: None,
                memory: Some(Some(1 << 20)),
                cpu: Some(Some(100)),
            },
            cores: Cores {
                online: Vec::new(),
                allowed: Vec::new(),
                siblings: Vec::new(),
                is_virtual: None,
                machine: None,
                idle: Idle::default(),
                dma_latency: DmaLatency::Absent,
            },
            wake: Wake { same: Err("sched_setaffinity failed".to_owned()), across: None },
            socket: Socket {
                directory: None,
                has_proc: false,
                place: Place::Refused("its directory does not exist".to_owned()),
            },
            trial: Trial::NotTried("io_uring is refused".to_owned()),
        }
    }
}

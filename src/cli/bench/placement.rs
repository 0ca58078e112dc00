//! Which core the server and the clients run on. Unpinned figures are bimodal on most machines: the
//! scheduler puts both on one core or on two as it likes.

use super::error::BenchError;
use super::options::{Placement, Policy};
use rustix::thread::CpuSet;

/// Where everybody runs; `None` and empty mean wherever the scheduler likes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus {
    /// The server's core.
    pub server: Option<usize>,
    /// The clients' cores, given to client processes in turn.
    pub clients: Vec<usize>,
    /// Whether server and client share one core: then whoever polls must yield.
    pub shared: bool,
    /// Where the reactors of a doorbell server run.
    pub reactors: Reactors,
}

impl Cpus {
    /// The core of client process `index`.
    pub fn client(&self, index: usize) -> Option<usize> {
        (!self.clients.is_empty()).then(|| self.clients[index % self.clients.len()])
    }
}

/// Where the reactors of a doorbell server run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reactors {
    /// How many there are.
    pub count: usize,
    /// Their cores, in turn; empty means that the scheduler chooses.
    pub cores: Vec<usize>,
    /// Whether each stays on its core.
    pub pinned: bool,
}

impl Reactors {
    /// Chooses among the allowed cores for so many reactors, 0 for one on each; the first on the server's.
    fn plan(server: Option<usize>, policy: Policy, asked: usize, mut allowed: Vec<usize>) -> Self {
        let count = if asked == 0 { allowed.len() } else { asked };
        // Handing over the core is a matter of one reactor on each: there, unpinned means the client alone.
        if server.is_none() && policy != Policy::Handoff {
            return Self { count, cores: Vec::new(), pinned: false };
        }
        let first = server.and_then(|server| allowed.iter().position(|cpu| *cpu == server));
        allowed.rotate_left(first.unwrap_or_default());
        if count == 1 {
            allowed.truncate(1);
        }
        Self { count, cores: allowed, pinned: true }
    }

    /// Whether a client on `cpu` shares its core with one of them: then whoever polls must yield.
    pub fn share(&self, cpu: Option<usize>) -> bool {
        cpu.is_some_and(|cpu| self.cores.iter().take(self.count).any(|core| *core == cpu))
    }
}

/// Chooses cores for this process and those it starts, and for so many reactors (0: one on every core).
///
/// # Errors
///
/// [`BenchError::Option`] if two cores are needed and one is allowed.
pub fn plan(placement: Placement, policy: Policy, reactors: usize) -> Result<Cpus, BenchError> {
    let allowed = allowed_cpus()?;
    let (server, clients) = choose(placement, &allowed, siblings)?;
    let shared = server.is_some_and(|server| clients.contains(&server));
    Ok(Cpus { server, clients, shared, reactors: Reactors::plan(server, policy, reactors, allowed) })
}

/// The server's core and those of the clients.
fn choose(
    placement: Placement,
    allowed: &[usize],
    siblings: impl Fn(usize) -> Vec<usize>,
) -> Result<(Option<usize>, Vec<usize>), BenchError> {
    let first = allowed[0];
    match placement {
        Placement::Unpinned => Ok((None, Vec::new())),
        Placement::Same => Ok((Some(first), vec![first])),
        Placement::Apart => {
            // A core, not its second hyperthread (trap 26): that one is taken only if nothing else is left.
            let threads = siblings(first);
            let mut clients: Vec<usize> = allowed[1..].to_vec();
            if clients.iter().any(|c| !threads.contains(c)) {
                clients.retain(|c| !threads.contains(c));
            }
            if clients.is_empty() {
                let reason = "one core alone is allowed here: take `same` or `unpinned`";
                return Err(BenchError::option("placement apart", reason));
            }
            Ok((Some(first), clients))
        }
    }
}

/// Whether two CPUs are hyperthreads of one core, as far as the kernel says.
pub fn are_siblings(a: usize, b: usize) -> bool {
    a != b && siblings(a).contains(&b)
}

fn siblings(cpu: usize) -> Vec<usize> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    std::fs::read_to_string(path).map(|text| parse_cpu_list(&text)).unwrap_or_default()
}

/// How many CPUs the machine has online, whatever this process may use of them.
pub fn machine_cores() -> u64 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    match parse_cpu_list(&online).len() {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
        n => n as u64,
    }
}

/// Reads the kernel's list format, such as `0-3,8`. What it cannot read it leaves out.
fn parse_cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<usize>().ok()?..=to.parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// CPUs that the calling thread may use, in ascending order; at least one.
///
/// # Errors
///
/// [`BenchError::Os`] if the kernel does not say.
pub fn allowed_cpus() -> Result<Vec<usize>, BenchError> {
    let set = rustix::thread::sched_getaffinity(None).map_err(|e| BenchError::os("sched_getaffinity", e))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// Pins the calling thread, and the threads and processes it starts from now on; `None` leaves it alone.
///
/// # Errors
///
/// [`BenchError::Os`] if the kernel refuses.
pub fn pin(cpu: Option<usize>) -> Result<(), BenchError> {
    cpu.map_or(Ok(()), |cpu| pin_to(&[cpu]))
}

/// Restricts the calling thread to `cpus`.
///
/// # Errors
///
/// [`BenchError::Os`] if the kernel refuses.
pub fn pin_to(cpus: &[usize]) -> Result<(), BenchError> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| BenchError::os("sched_setaffinity", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(cpu: usize) -> Vec<usize> {
        vec![cpu]
    }

    fn cpus(placement: Placement, allowed: &[usize]) -> Cpus {
        let (server, clients) = choose(placement, allowed, alone).unwrap();
        let reactors = Reactors::plan(server, Policy::Spin, 1, allowed.to_vec());
        Cpus { server, clients, shared: placement == Placement::Same, reactors }
    }

    #[test]
    fn apart_takes_the_first_and_the_second_allowed_core() {
        let cpus = cpus(Placement::Apart, &[2, 5, 7]);
        assert_eq!(
            (cpus.server, cpus.client(0), cpus.client(1), cpus.client(2)),
            (Some(2), Some(5), Some(7), Some(5))
        );
    }

    #[test]
    fn a_hyperthread_of_the_servers_core_is_passed_over_unless_nothing_else_is_left() {
        let pairs = |cpu: usize| vec![cpu & !1, cpu | 1];
        assert_eq!(choose(Placement::Apart, &[0, 1, 2, 3], pairs).unwrap(), (Some(0), vec![2, 3]));
        assert_eq!(choose(Placement::Apart, &[0, 1], pairs).unwrap(), (Some(0), vec![1]));
    }

    #[test]
    fn one_core_cannot_be_two() {
        assert!(choose(Placement::Apart, &[4], alone).is_err());
        let same = cpus(Placement::Same, &[4]);
        assert_eq!((same.server, same.client(3)), (Some(4), Some(4)));
        assert_eq!(cpus(Placement::Unpinned, &[4]).client(0), None);
    }

    /// Goal:   one reactor sits where the server always sat; more go round all cores from there.
    #[test]
    fn reactors_start_on_the_servers_core_and_go_round() {
        let plan = |server, policy, asked| Reactors::plan(Some(server), policy, asked, vec![2, 5, 7]);
        let pinned = |count, cores: &[usize]| Reactors { count, cores: cores.to_vec(), pinned: true };
        assert_eq!(plan(2, Policy::Spin, 1), pinned(1, &[2]));
        assert_eq!(plan(2, Policy::Block, 2), pinned(2, &[2, 5, 7]));
        assert_eq!(plan(2, Policy::Handoff, 0), pinned(3, &[2, 5, 7]));
        let rotated = plan(5, Policy::Handoff, 2);
        assert_eq!(rotated, pinned(2, &[5, 7, 2]));
        assert!(rotated.share(Some(7)) && !rotated.share(Some(2)) && !rotated.share(None));
    }

    /// Goal:   unpinned frees the reactors of policies that do not need one on each core, and no others.
    #[test]
    fn unpinned_leaves_reactors_pinned_where_callers_hand_over_their_core() {
        let plan = |policy, asked| Reactors::plan(None, policy, asked, vec![0, 1]);
        assert_eq!(plan(Policy::Spin, 1), Reactors { count: 1, cores: vec![], pinned: false });
        assert_eq!(plan(Policy::Block, 0), Reactors { count: 2, cores: vec![], pinned: false });
        assert_eq!(plan(Policy::Handoff, 0), Reactors { count: 2, cores: vec![0, 1], pinned: true });
        assert_eq!(plan(Policy::Handoff, 1), Reactors { count: 1, cores: vec![0], pinned: true });
    }

    /// Goal:   only who shares a core with the server has to yield.
    #[test]
    fn a_plan_for_this_machine_says_who_shares() {
        let same = plan(Placement::Same, Policy::Spin, 1).unwrap();
        assert!(same.shared && same.reactors.share(same.client(0)));
        let unpinned = plan(Placement::Unpinned, Policy::Handoff, 0).unwrap();
        assert!(!unpinned.shared && !unpinned.reactors.share(unpinned.client(0)));
        assert_eq!(unpinned.reactors.cores, allowed_cpus().unwrap());
    }

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(parse_cpu_list("\n"), [] as [usize; 0]);
    }
}

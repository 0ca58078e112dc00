//! Which core the server and the clients run on. Unpinned figures are bimodal on most machines: the
//! scheduler puts both on one core or on two as it likes.

use super::error::BenchError;
use super::options::Placement;
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
}

impl Cpus {
    /// The core of client process `index`.
    pub fn client(&self, index: usize) -> Option<usize> {
        (!self.clients.is_empty()).then(|| self.clients[index % self.clients.len()])
    }
}

/// Chooses cores for this process and those it starts.
///
/// # Errors
///
/// [`BenchError::Option`] if two cores are needed and one is allowed.
pub fn plan(placement: Placement) -> Result<Cpus, BenchError> {
    plan_among(placement, &allowed_cpus()?, siblings)
}

fn plan_among(
    placement: Placement,
    allowed: &[usize],
    siblings: impl Fn(usize) -> Vec<usize>,
) -> Result<Cpus, BenchError> {
    let first = allowed[0];
    match placement {
        Placement::Unpinned => Ok(Cpus { server: None, clients: Vec::new(), shared: false }),
        Placement::Same => Ok(Cpus { server: Some(first), clients: vec![first], shared: true }),
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
            Ok(Cpus { server: Some(first), clients, shared: false })
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

    #[test]
    fn apart_takes_the_first_and_the_second_allowed_core() {
        let cpus = plan_among(Placement::Apart, &[2, 5, 7], alone).unwrap();
        assert_eq!(
            (cpus.server, cpus.client(0), cpus.client(1), cpus.client(2)),
            (Some(2), Some(5), Some(7), Some(5))
        );
    }

    #[test]
    fn a_hyperthread_of_the_servers_core_is_passed_over_unless_nothing_else_is_left() {
        let pairs = |cpu: usize| vec![cpu & !1, cpu | 1];
        let cpus = plan_among(Placement::Apart, &[0, 1, 2, 3], pairs).unwrap();
        assert_eq!(cpus.clients, [2, 3]);
        assert_eq!(plan_among(Placement::Apart, &[0, 1], pairs).unwrap().clients, [1]);
    }

    #[test]
    fn one_core_cannot_be_two() {
        assert!(plan_among(Placement::Apart, &[4], alone).is_err());
        let same = plan_among(Placement::Same, &[4], alone).unwrap();
        assert_eq!((same.server, same.client(3), same.shared), (Some(4), Some(4), true));
        assert_eq!(plan_among(Placement::Unpinned, &[4], alone).unwrap().client(0), None);
    }

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(parse_cpu_list("\n"), [] as [usize; 0]);
    }
}

//! The machine: what it is, and who runs on which core.

use crate::error::StressError;
use rustix::thread::CpuSet;
use serde::Serialize;
use std::fs;

/// Where everybody runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cores {
    /// The server's.
    pub server: usize,
    /// The clients', given to client processes in turn; at least one.
    pub clients: Vec<usize>,
}

impl Cores {
    /// The server on the first allowed core, clients on the others.
    ///
    /// # Errors
    ///
    /// [`StressError::Cores`] where only one is allowed.
    pub fn plan() -> Result<Self, StressError> {
        Self::among(&allowed()?, siblings)
    }

    fn among(allowed: &[usize], siblings: impl Fn(usize) -> Vec<usize>) -> Result<Self, StressError> {
        let [server, others @ ..] = allowed else { return Err(StressError::Cores { allowed: 0 }) };
        // A core, not its second hyperthread (trap 26): that one is taken only if nothing else is left.
        let threads = siblings(*server);
        let apart: Vec<usize> = others.iter().copied().filter(|core| !threads.contains(core)).collect();
        let clients = if apart.is_empty() { others.to_vec() } else { apart };
        if clients.is_empty() {
            return Err(StressError::Cores { allowed: allowed.len() });
        }
        Ok(Self { server: *server, clients })
    }

    /// The core of client process `index`.
    pub fn client(&self, index: usize) -> usize {
        self.clients[index % self.clients.len()]
    }

    /// Whether so many client processes must give way to each other.
    pub fn are_shared_by(&self, processes: usize) -> bool {
        processes > self.clients.len()
    }
}

/// What the figures were measured on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Logical cores online.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// CPU model as the kernel names it.
    pub cpu: String,
    /// Server and clients are hyperthreads of one core: figures are worse than they would be apart.
    pub hyperthreads: bool,
    /// Built without optimisation: figures mean nothing.
    pub debug_build: bool,
}

impl Machine {
    /// This one, with everybody placed as `cores` says.
    pub fn describe(cores: &Cores) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Self {
            cores: cpu_list(&online).len(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpu: cpu_model(&info).unwrap_or("unknown").to_owned(),
            hyperthreads: cores.clients.iter().any(|core| siblings(cores.server).contains(core)),
            debug_build: cfg!(debug_assertions),
        }
    }
}

/// One line.
impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} cores, kernel {}, {}", self.cores, self.kernel, self.cpu)?;
        if self.hyperthreads {
            write!(f, "; server and clients are hyperthreads of one core")?;
        }
        if self.debug_build {
            write!(f, "; DEBUG BUILD, the figures mean nothing")?;
        }
        Ok(())
    }
}

/// Pins the calling thread, and what it starts from now on.
///
/// # Errors
///
/// [`StressError::Os`] if the kernel refuses.
pub fn pin(core: usize) -> Result<(), StressError> {
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| StressError::os("sched_setaffinity", e))
}

fn allowed() -> Result<Vec<usize>, StressError> {
    let set = rustix::thread::sched_getaffinity(None).map_err(|e| StressError::os("sched_getaffinity", e))?;
    Ok((0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect())
}

fn siblings(core: usize) -> Vec<usize> {
    let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    fs::read_to_string(path).map(|text| cpu_list(&text)).unwrap_or_default()
}

/// Reads the kernel's list format, such as `0-3,8`. What it cannot read it leaves out.
fn cpu_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse::<usize>().ok()?..=to.parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

fn cpu_model(info: &str) -> Option<&str> {
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_has_the_first_allowed_core_and_clients_the_others_in_turn() {
        let cores = Cores::among(&[2, 5, 7], |core| vec![core]).unwrap();
        assert_eq!((cores.server, cores.client(0), cores.client(1), cores.client(2)), (2, 5, 7, 5));
        assert!(!cores.are_shared_by(2) && cores.are_shared_by(3));
    }

    #[test]
    fn a_hyperthread_of_the_servers_core_is_taken_only_if_nothing_else_is_left() {
        let pairs = |core: usize| vec![core & !1, core | 1];
        assert_eq!(Cores::among(&[0, 1, 2, 3], pairs).unwrap().clients, [2, 3]);
        assert_eq!(Cores::among(&[0, 1], pairs).unwrap().clients, [1]);
        assert!(matches!(Cores::among(&[4], pairs), Err(StressError::Cores { allowed: 1 })));
    }

    #[test]
    fn the_kernels_files_are_read_as_it_writes_them() {
        assert_eq!(cpu_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n"), Some("Some CPU @ 3 GHz"));
        assert_eq!(cpu_model(""), None);
    }
}

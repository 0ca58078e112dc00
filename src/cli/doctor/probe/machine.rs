//! Cores, hyperthreads, hypervisors and idle states, as the kernel's files tell them. No instruction that would trap
//! into a hypervisor is executed.

use super::super::findings::{Cores, DmaLatency, Idle, IdleState};
use super::files::Files;
use std::collections::BTreeSet;

/// Where a number of us forbids sleep states that take longer to leave, for as long as it is open.
pub const DMA_LATENCY: &str = "/dev/cpu_dma_latency";

/// Reads them; `allowed` are the cores that this process may use.
pub fn cores(files: &Files, allowed: Vec<usize>) -> Cores {
    Cores {
        online: files.cores("/sys/devices/system/cpu/online"),
        siblings: siblings(files, &allowed),
        is_virtual: is_virtual(files),
        machine: machine(files),
        idle: idle(files, allowed.first().copied().unwrap_or_default()),
        dma_latency: dma_latency(files),
        allowed,
    }
}

/// The groups of allowed cores that are hyperthreads of one core.
fn siblings(files: &Files, allowed: &[usize]) -> Vec<Vec<usize>> {
    let group = |core: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
        let mut threads = files.cores(&path);
        threads.retain(|thread| allowed.contains(thread));
        threads
    };
    let groups: BTreeSet<Vec<usize>> = allowed.iter().map(group).filter(|group| group.len() > 1).collect();
    groups.into_iter().collect()
}

/// The processor's `hypervisor` flag, or what Xen says of itself.
fn is_virtual(files: &Files) -> Option<bool> {
    let cpus = files.text("/proc/cpuinfo")?;
    let flags = cpus.lines().find(|line| line.starts_with("flags"))?;
    let flagged = flags.split_whitespace().any(|flag| flag == "hypervisor");
    Some(flagged || files.text("/sys/hypervisor/type").is_some_and(|kind| !kind.is_empty()))
}

/// Vendor and product, as the firmware says them.
fn machine(files: &Files) -> Option<String> {
    let read = |name: &str| files.text(&format!("/sys/class/dmi/id/{name}")).filter(|text| !text.is_empty());
    match (read("sys_vendor"), read("product_name")) {
        (Some(vendor), Some(product)) => Some(format!("{vendor} {product}")),
        (vendor, product) => vendor.or(product),
    }
}

fn idle(files: &Files, core: usize) -> Idle {
    let of_machine = |name: &str| files.text(&format!("/sys/devices/system/cpu/cpuidle/{name}"));
    let of_core =
        |state: usize, name: &str| format!("/sys/devices/system/cpu/cpu{core}/cpuidle/state{state}/{name}");
    let state = |state: usize| {
        Some(IdleState {
            name: files.text(&of_core(state, "name"))?,
            latency_us: files.number(&of_core(state, "latency"))?,
            enabled: files.number(&of_core(state, "disable")) != Some(1),
        })
    };
    let command_line = files.text("/proc/cmdline").unwrap_or_default();
    Idle {
        driver: of_machine("current_driver").filter(|driver| driver != "none"),
        governor: of_machine("current_governor").or_else(|| of_machine("current_governor_ro")),
        states: (0..).map_while(state).collect(),
        polls: command_line.split_whitespace().any(|word| word == "idle=poll"),
    }
}

fn dma_latency(files: &Files) -> DmaLatency {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let path = files.0.join(DMA_LATENCY.trim_start_matches('/'));
    if !path.exists() {
        return DmaLatency::Absent;
    }
    match accessat(CWD, &path, Access::WRITE_OK, AtFlags::EACCESS) {
        Ok(()) => DmaLatency::Usable,
        Err(_) => DmaLatency::NotPermitted,
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::tests::Tree;
    use super::*;

    /// Goal:   a machine with hyperthreads, firmware and idle states is read as it is.
    #[test]
    fn a_workstation_is_read() {
        let cpu = "sys/devices/system/cpu";
        let paths = [
            ("online", "0-3"),
            ("cpu0/topology/thread_siblings_list", "0,2"),
            ("cpu1/topology/thread_siblings_list", "1,3"),
            ("cpu2/topology/thread_siblings_list", "0,2"),
            ("cpuidle/current_driver", "intel_idle"),
            ("cpuidle/current_governor_ro", "menu"),
            ("cpu0/cpuidle/state0/name", "POLL"),
            ("cpu0/cpuidle/state0/latency", "0"),
            ("cpu0/cpuidle/state0/disable", "0"),
            ("cpu0/cpuidle/state1/name", "C6"),
            ("cpu0/cpuidle/state1/latency", "133"),
            ("cpu0/cpuidle/state1/disable", "1"),
        ];
        let paths = paths.map(|(path, text)| (format!("{cpu}/{path}"), text));
        let mut files: Vec<(&str, &str)> = paths.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        files.extend([
            ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu sse2 rdtscp\n"),
            ("proc/cmdline", "quiet idle=poll root=/dev/sda1\n"),
            ("sys/class/dmi/id/sys_vendor", "Maker\n"),
            ("sys/class/dmi/id/product_name", "Desk 3\n"),
        ]);
        let tree = Tree::new("workstation", &files);
        let cores = cores(&tree.files, vec![0, 1, 2]);
        assert_eq!((cores.online, cores.siblings), (vec![0, 1, 2, 3], vec![vec![0, 2]]));
        assert_eq!((cores.is_virtual, cores.machine.as_deref()), (Some(false), Some("Maker Desk 3")));
        assert_eq!(cores.idle.driver.as_deref(), Some("intel_idle"));
        assert_eq!(cores.idle.governor.as_deref(), Some("menu"));
        let state = |name: &str, latency_us, enabled| IdleState { name: name.into(), latency_us, enabled };
        assert_eq!(cores.idle.states, [state("POLL", 0, true), state("C6", 133, false)]);
        assert!(cores.idle.polls);
        assert_eq!(cores.dma_latency, DmaLatency::Absent);
    }

    #[test]
    fn a_virtual_machine_is_known_by_its_processor() {
        let tree =
            Tree::new("virtual", &[("proc/cpuinfo", "flags : fpu hypervisor lahf_lm\nmodel : hypervisor\n")]);
        assert_eq!(is_virtual(&tree.files), Some(true));
    }

    /// Goal:   where nothing can be read, nothing is claimed.
    #[test]
    fn a_machine_without_files_is_unknown() {
        let tree = Tree::new("nothing", &[]);
        let cores = cores(&tree.files, vec![5]);
        assert_eq!((cores.online, cores.allowed, cores.siblings), (vec![], vec![5], vec![]));
        assert_eq!((cores.is_virtual, cores.machine, cores.idle.driver), (None, None, None));
        assert!(cores.idle.states.is_empty() && !cores.idle.polls);
    }
}

//! Limits of the control group that this process is in, and of those that it lies in; the smallest one holds.

use super::files::Files;

/// Version 1 writes "no limit" as the largest number of whole pages; nobody has an exbibyte.
const UNLIMITED: u64 = 1 << 60;

/// The limit on memory, bytes: `None` if it cannot be read, `Some(None)` if there is none.
pub fn memory(files: &Files) -> Option<Option<u64>> {
    let max = |directory: &str| {
        let text = files
            .text(&format!("{directory}/memory.max"))
            .or_else(|| files.text(&format!("{directory}/memory.limit_in_bytes")))?;
        Some(text.parse().ok().filter(|limit| *limit < UNLIMITED))
    };
    smallest(&directories(files, "memory"), max)
}

/// The limit on processor time, thousandths of a core: `None` if it cannot be read, `Some(None)` if there is none.
pub fn cpu(files: &Files) -> Option<Option<u64>> {
    let max = |directory: &str| {
        let (quota, period) = match files.text(&format!("{directory}/cpu.max")) {
            Some(text) => {
                let (quota, period) = text.split_once(' ')?;
                (quota.parse().ok(), period.parse().ok()?)
            }
            None => {
                let quota = files.text(&format!("{directory}/cpu.cfs_quota_us"))?;
                // -1 is no limit.
                (quota.parse().ok(), files.number(&format!("{directory}/cpu.cfs_period_us"))?)
            }
        };
        Some(quota.map(|quota: u64| quota.saturating_mul(1000) / period.max(1)))
    };
    smallest(&directories(files, "cpu"), max)
}

fn smallest(directories: &[String], limit: impl Fn(&str) -> Option<Option<u64>>) -> Option<Option<u64>> {
    let limits: Vec<Option<u64>> = directories.iter().filter_map(|directory| limit(directory)).collect();
    if limits.is_empty() { None } else { Some(limits.into_iter().flatten().min()) }
}

/// The directories of this process's group and of those above it, wherever a controller may be mounted.
fn directories(files: &Files, controller: &str) -> Vec<String> {
    let groups = files.text("/proc/self/cgroup").unwrap_or_default();
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let mounts = match controllers {
            "" => vec!["/sys/fs/cgroup".to_owned(), "/sys/fs/cgroup/unified".to_owned()],
            _ if controllers.split(',').any(|name| name == controller) => {
                vec![format!("/sys/fs/cgroup/{controller}"), format!("/sys/fs/cgroup/{controllers}")]
            }
            _ => continue,
        };
        // A path that leaves the group that is mounted here says nothing about files.
        let mut path = if path.contains("..") { "" } else { path.trim_end_matches('/') };
        loop {
            found.extend(mounts.iter().map(|mount| format!("{mount}{path}")));
            let Some((parent, _)) = path.rsplit_once('/') else { break };
            path = parent;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::files::tests::Tree;
    use super::*;

    /// Goal:   with version 2 the smallest limit on the way up holds, and `max` is none.
    #[test]
    fn version_2_is_read_up_to_the_root() {
        let tree = Tree::new(
            "v2",
            &[
                ("proc/self/cgroup", "0::/system.slice/doorbell.service\n"),
                ("sys/fs/cgroup/system.slice/memory.max", "8388608\n"),
                ("sys/fs/cgroup/system.slice/doorbell.service/memory.max", "max\n"),
                ("sys/fs/cgroup/system.slice/doorbell.service/cpu.max", "150000 100000\n"),
                ("sys/fs/cgroup/system.slice/cpu.max", "max 100000\n"),
            ],
        );
        assert_eq!(memory(&tree.files), Some(Some(8 << 20)));
        assert_eq!(cpu(&tree.files), Some(Some(1500)));
    }

    /// Goal:   version 1 is read too, also where both are mounted, and its "no limit" is none.
    #[test]
    fn version_1_is_read_where_its_controllers_are() {
        let groups = "9:name=systemd:/\n4:memory:/box/inner\n2:cpu,cpuacct:/box\n0::/\n";
        let tree = Tree::new(
            "v1",
            &[
                ("proc/self/cgroup", groups),
                ("sys/fs/cgroup/memory/box/inner/memory.limit_in_bytes", "9223372036854771712\n"),
                ("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "50000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
                ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ],
        );
        assert_eq!(memory(&tree.files), Some(None));
        assert_eq!(cpu(&tree.files), Some(Some(500)));
    }

    /// Goal:   in a container whose own group is the root of what is mounted, that is what is read.
    #[test]
    fn a_container_reads_its_own_root() {
        let tree = Tree::new(
            "container",
            &[("proc/self/cgroup", "0::/../outside\n"), ("sys/fs/cgroup/memory.max", "1048576\n")],
        );
        assert_eq!((memory(&tree.files), cpu(&tree.files)), (Some(Some(1 << 20)), None));
        let empty = Tree::new("none", &[]);
        assert_eq!((memory(&empty.files), cpu(&empty.files)), (None, None));
    }
}

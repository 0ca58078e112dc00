//! From "the kernel said EPERM" to a sentence that helps the person who reads the log.

use std::fmt;

use rustix::io::Errno;

use crate::error::Step;

/// The first kernel with futex operations in io_uring.
pub const KERNEL_MIN: (u32, u32) = (6, 7);

/// What the classification knows of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Host {
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for a group only, 2 for nobody. `None` if there is no
    /// such file (kernels before 6.6) or it cannot be read.
    pub disabled: Option<u32>,
    /// `kernel.io_uring_group`: the group of value 1; -1 is no group.
    pub group: Option<i64>,
    /// uname(2) release, such as `6.12.9-amd64`.
    pub release: String,
}

impl Host {
    /// Reads the facts from this machine. Cost: two small files and a system call.
    pub fn read() -> Self {
        Host {
            disabled: sysctl("/proc/sys/kernel/io_uring_disabled"),
            group: sysctl("/proc/sys/kernel/io_uring_group"),
            release: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }
}

fn sysctl<T: std::str::FromStr>(path: &str) -> Option<T> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The likely reason for a refusal. `Display` says what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// No io_uring in this kernel, or a filter that pretends so.
    Absent,
    /// `kernel.io_uring_disabled` is 1 or 2.
    Sysctl {
        /// Its value.
        value: u32,
        /// `kernel.io_uring_group`, if it names one.
        group: Option<i64>,
    },
    /// A seccomp filter or a security module.
    Filter,
    /// A kernel before [`KERNEL_MIN`].
    OldKernel {
        /// Its release.
        release: String,
    },
    /// RLIMIT_MEMLOCK, or the memory cgroup.
    LockedMemory,
    /// RLIMIT_NOFILE (EMFILE) or the machine's limit (ENFILE).
    Descriptors,
    /// Nothing known.
    Unknown {
        /// The kernel's release.
        release: String,
    },
}

impl Cause {
    /// The likely reason why `step` was answered by `errno` on `host`.
    ///
    /// Pure: the same arguments give the same answer on every machine.
    /// Source: io_uring_setup(2), `Documentation/admin-guide/sysctl/kernel.rst`.
    pub fn of(step: Step, errno: Errno, host: Host) -> Self {
        let old = kernel_version(&host.release).is_some_and(|(major, minor, _)| (major, minor) < KERNEL_MIN);
        let on_ring = step != Step::MapMemory;
        match errno {
            Errno::NOSYS if old_enough_for_none(&host.release) => Cause::OldKernel { release: host.release },
            Errno::NOSYS => Cause::Absent,
            Errno::PERM | Errno::ACCESS => match host.disabled {
                Some(value @ 1..) if on_ring => {
                    Cause::Sysctl { value, group: host.group.filter(|group| *group >= 0) }
                }
                _ => Cause::Filter,
            },
            Errno::INVAL | Errno::OPNOTSUPP if old && on_ring => Cause::OldKernel { release: host.release },
            Errno::NOMEM => Cause::LockedMemory,
            Errno::MFILE | Errno::NFILE => Cause::Descriptors,
            _ => Cause::Unknown { release: host.release },
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Absent => f.write_str(
                "the kernel is built without io_uring, or a seccomp filter says so: allow \
                 io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Cause::Sysctl { value: 1, group: Some(group) } => write!(
                f,
                "kernel.io_uring_disabled is 1: run as a member of group {group} \
                 (kernel.io_uring_group) or with CAP_SYS_ADMIN, or set it to 0"
            ),
            Cause::Sysctl { value: 1, group: None } => f.write_str(
                "kernel.io_uring_disabled is 1 and kernel.io_uring_group names no group: name one and \
                 join it, or set kernel.io_uring_disabled to 0",
            ),
            Cause::Sysctl { value, .. } => {
                write!(f, "kernel.io_uring_disabled is {value}: nobody may use it; set it to 0 or 1")
            }
            Cause::Filter => f.write_str(
                "a seccomp filter or security module refuses it, as the default profile of most \
                 container engines does: allow io_uring_setup, io_uring_enter and io_uring_register",
            ),
            Cause::OldKernel { release } => {
                let (major, minor) = KERNEL_MIN;
                write!(f, "kernel {release} is too old: io_uring has futexes since {major}.{minor}")
            }
            Cause::LockedMemory => f.write_str(
                "RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) is used up by this user's rings, or the memory \
                 cgroup is full: raise it, or make the ring smaller",
            ),
            Cause::Descriptors => f.write_str(
                "no file descriptor is left: raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=), or fs.file-max",
            ),
            Cause::Unknown { release } => write!(f, "no known cause on kernel {release}"),
        }
    }
}

/// Whether a kernel of this `release` may still have CVE-2025-39698: io_uring's futex wait leaves a
/// freed request behind when it fails, a way to root for any local user.
///
/// Mainline and stable fixed it in 6.12.44, 6.16.4 and 6.17. Distributions also carry fixes without
/// changing these numbers, so `true` means *ask your vendor*. An unreadable release gives `false`.
pub fn futex_bug_unfixed(release: &str) -> bool {
    kernel_version(release).is_some_and(|(major, minor, patch)| match (major, minor) {
        (6, 12) => patch < 44,
        (6, 16) => patch < 4,
        version => (KERNEL_MIN..(6, 17)).contains(&version),
    })
}

/// Whether ENOSYS needs no other explanation: io_uring came with 5.1.
fn old_enough_for_none(release: &str) -> bool {
    kernel_version(release).is_some_and(|(major, minor, _)| (major, minor) < (5, 1))
}

/// A release of uname(2) as a version: `6.12.9-amd64` is (6, 12, 9). A missing patch level is 0; `None` if there is
/// no major or no minor number.
pub fn kernel_version(release: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    let (major, minor) = (next()?, next()?);
    Some((major, minor, next().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: &str = "6.12.9-amd64";

    fn host(disabled: Option<u32>, group: Option<i64>, release: &str) -> Host {
        Host { disabled, group, release: release.into() }
    }

    /// Goal:   each refusal that is known to happen gets its reason (F38, F40).
    /// Method: a table of (step, errno, machine, reason).
    #[test]
    fn f38_every_known_refusal_is_explained() {
        let open = || host(Some(0), Some(-1), NEW);
        let old = || Cause::OldKernel { release: "6.1.0-44-amd64".into() };
        let debian12 = || host(None, None, "6.1.0-44-amd64");
        for (step, errno, host, cause) in [
            (Step::CreateRing, Errno::NOSYS, open(), Cause::Absent),
            (
                Step::CreateRing,
                Errno::NOSYS,
                host(None, None, "4.19.0"),
                Cause::OldKernel { release: "4.19.0".into() },
            ),
            (
                Step::CreateRing,
                Errno::PERM,
                host(Some(2), Some(-1), NEW),
                Cause::Sysctl { value: 2, group: None },
            ),
            (
                Step::CreateRing,
                Errno::PERM,
                host(Some(1), Some(-1), NEW),
                Cause::Sysctl { value: 1, group: None },
            ),
            (
                Step::CreateRing,
                Errno::PERM,
                host(Some(1), Some(998), NEW),
                Cause::Sysctl { value: 1, group: Some(998) },
            ),
            (Step::CreateRing, Errno::PERM, open(), Cause::Filter),
            (Step::CreateRing, Errno::PERM, debian12(), Cause::Filter),
            (Step::MapMemory, Errno::PERM, host(Some(2), None, NEW), Cause::Filter),
            (Step::CreateRing, Errno::INVAL, debian12(), old()),
            (Step::FutexDiffers, Errno::INVAL, debian12(), old()),
            (Step::FutexDiffers, Errno::INVAL, open(), Cause::Unknown { release: NEW.into() }),
            (Step::MapMemory, Errno::INVAL, debian12(), Cause::Unknown { release: "6.1.0-44-amd64".into() }),
            (Step::CreateRing, Errno::NOMEM, open(), Cause::LockedMemory),
            (Step::CreateRing, Errno::MFILE, open(), Cause::Descriptors),
            (Step::Poll, Errno::NFILE, open(), Cause::Descriptors),
            (Step::Cancel, Errno::IO, open(), Cause::Unknown { release: NEW.into() }),
        ] {
            assert_eq!(Cause::of(step, errno, host.clone()), cause, "{step} {errno} {host:?}");
        }
    }

    /// Goal:   each reason tells the reader which knob to turn.
    /// Method: look for the knob's name in the text.
    #[test]
    fn every_reason_names_its_knob() {
        for (cause, knob) in [
            (Cause::Absent, "io_uring_setup"),
            (Cause::Sysctl { value: 1, group: Some(998) }, "group 998"),
            (Cause::Sysctl { value: 1, group: None }, "kernel.io_uring_group"),
            (Cause::Sysctl { value: 2, group: None }, "kernel.io_uring_disabled is 2"),
            (Cause::Filter, "seccomp"),
            (
                Cause::OldKernel { release: "6.1.0".into() },
                "6.1.0 is too old: io_uring has futexes since 6.7",
            ),
            (Cause::LockedMemory, "RLIMIT_MEMLOCK"),
            (Cause::Descriptors, "RLIMIT_NOFILE"),
            (Cause::Unknown { release: NEW.into() }, NEW),
        ] {
            assert!(cause.to_string().contains(knob), "{cause}");
        }
    }

    /// Goal:   releases as distributions write them are understood, and nonsense is not.
    /// Method: one of each kind.
    #[test]
    fn releases_are_parsed() {
        for (release, version) in [
            ("6.12.9-amd64", Some((6, 12, 9))),
            ("6.18-rc3", Some((6, 18, 0))),
            ("5.15.0-1053-aws", Some((5, 15, 0))),
            ("7.0", Some((7, 0, 0))),
            ("6.6.87.2-microsoft-standard-WSL2", Some((6, 6, 87))),
            ("6", None),
            ("", None),
            ("next-20250101", None),
        ] {
            assert_eq!(kernel_version(release), version, "{release}");
        }
    }

    /// Goal:   the fixed releases are known, on both sides of each fix.
    /// Method: a table of edges.
    #[test]
    fn the_futex_bug_is_known_by_release() {
        for (release, unfixed) in [
            ("6.6.99", false), // no futex operations yet
            ("6.7.0", true),
            ("6.12.43", true),
            ("6.12.44", false),
            ("6.13.0", true),
            ("6.16.3", true),
            ("6.16.4-1", false),
            ("6.17.0", false),
            ("7.0.1", false),
            ("unknown", false),
        ] {
            assert_eq!(futex_bug_unfixed(release), unfixed, "{release}");
        }
    }
}

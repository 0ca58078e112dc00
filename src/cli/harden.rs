//! What `doorbell serve` gives up once it has what it needs: files that are none of its business (landlock), system calls
//! that no server needs (seccomp). Both last until the process ends, and hold for every thread.
//!
//! Rule:   what is given up is what a mistake of ours, or of a handler's, could do harm with. A kernel that lacks either
//!         is no reason not to serve: it is logged, and `doorbell doctor` says so.
//! Beside: io_uring does not pass seccomp; its rings are restricted on their own (`uring/src/setup.rs`).

use super::doctor::findings::Tried;
use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};

/// The rights that are known; a kernel that knows fewer enforces those.
const KNOWN: ABI = ABI::V4;

/// What is read beside the files of the configuration: names of hosts and what resolves them, the machine.
const READ: [&str; 8] = [
    "/etc",
    "/lib",
    "/lib64",
    "/proc",
    "/run/systemd/resolve",
    "/sys/devices/system",
    "/usr/lib",
    "/usr/share",
];

/// Files that a resolver of names reads, and that may be links elsewhere.
const NAMES: [&str; 3] = ["/etc/hosts", "/etc/nsswitch.conf", "/etc/resolv.conf"];

/// System calls that no server needs. Each is answered EPERM.
const REFUSED: &[i64] = &[
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_process_madvise,
    // Other users and namespaces.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capset,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_personality,
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_acct,
    // The kernel and the machine.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_syslog,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    // Keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // More rings: those that the server needs have been made.
    libc::SYS_io_uring_setup,
];

/// What files the server needs.
pub struct Files<'a> {
    /// Where its socket and lock lie.
    pub socket: &'a Path,
    /// Its configuration, which an editor may replace.
    pub config: Option<&'a Path>,
    /// What clients may have read.
    pub roots: &'a [PathBuf],
    /// Directories that it writes to beside.
    pub written: &'a [PathBuf],
}

/// A file, or its directory if that is a service's own: there the file may be replaced by another one. A link to anywhere
/// else opens nothing but what it names.
fn around(file: PathBuf) -> PathBuf {
    match file.parent() {
        Some(directory) if directory.starts_with("/run") && directory != Path::new("/run") => {
            directory.to_owned()
        }
        _ => file,
    }
}

/// Gives up all other files, for the calling thread and those that it starts; says how far that went.
///
/// # Errors
///
/// What the kernel refuses, other than by not knowing it.
pub fn keep_to(files: &Files<'_>) -> Result<RulesetStatus, Box<dyn Error>> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // The lock is opened for writing; the socket is made, renamed and removed.
    let write = read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile;
    let parent = |path: &Path| path.parent().map(Path::to_owned);
    let of_names = NAMES.iter().filter_map(|file| Path::new(file).canonicalize().ok().map(around));
    let read_too = files.roots.iter().cloned().chain(files.config.and_then(parent)).chain(of_names);
    let written = files.written.iter().cloned().chain(parent(files.socket));
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .create()?
        .add_rules(path_beneath_rules(READ, read))?
        .add_rules(path_beneath_rules(read_too, read))?
        .add_rules(path_beneath_rules(written, write))?
        .restrict_self()?;
    Ok(status.ruleset)
}

/// Gives up [`REFUSED`], for every thread of the process.
///
/// # Errors
///
/// What the kernel refuses.
pub fn refuse_calls() -> Result<(), Box<dyn Error>> {
    Ok(seccompiler::apply_filter_all_threads(&filter()?)?)
}

fn filter() -> Result<BpfProgram, Box<dyn Error>> {
    let rules: BTreeMap<i64, Vec<_>> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let refusal = SeccompAction::Errno(Errno::PERM.raw_os_error() as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refusal, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Gives up files on the calling thread, to see whether that works.
pub fn try_files() -> Tried {
    let nothing = Files { socket: Path::new("/"), config: None, roots: &[], written: &[] };
    match keep_to(&nothing) {
        Ok(RulesetStatus::NotEnforced) => Tried::Wrong("the kernel has no landlock".to_owned()),
        Ok(_) => Tried::Works,
        Err(error) => Tried::Wrong(error.to_string()),
    }
}

/// Gives up system calls on the calling thread, to see whether that works.
pub fn try_calls() -> Tried {
    match filter().and_then(|filter| Ok(seccompiler::apply_filter(&filter)?)) {
        Ok(()) => Tried::Works,
        Err(error) => Tried::Wrong(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind;

    /// Goal:   a link to a file of names opens the directory of the service that keeps it, and no other directory.
    #[test]
    fn what_is_around_a_file_of_names_is_a_service() {
        for (file, opened) in [
            ("/run/NetworkManager/resolv.conf", "/run/NetworkManager"),
            ("/run/resolv.conf", "/run/resolv.conf"),
            ("/home/me/resolv.conf", "/home/me/resolv.conf"),
            ("/resolv.conf", "/resolv.conf"),
        ] {
            assert_eq!(around(file.into()), Path::new(opened));
        }
    }

    /// Goal:   what was given up is refused, and what is needed is not.
    /// Method: on a thread of its own, which alone is restricted: a program is started, a namespace left, a file outside
    ///         read, one in a root read and not written, one beside the socket made and removed.
    #[test]
    fn what_was_given_up_is_refused() {
        let directory = std::env::temp_dir().join(format!("doorbell-harden-{}", std::process::id()));
        let [root, socket, outside] = ["root", "run", "outside"].map(|name| directory.join(name));
        for path in [&root, &socket, &outside] {
            fs::create_dir_all(path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
        }
        let outcome = std::thread::spawn(move || {
            let files = Files {
                socket: &socket.join("s"),
                config: None,
                roots: std::slice::from_ref(&root),
                written: &[],
            };
            let status = keep_to(&files).unwrap();
            seccompiler::apply_filter(&filter().unwrap()).unwrap();
            let kind = |error: std::io::Error| error.kind();
            let denied = ErrorKind::PermissionDenied;
            assert_eq!(std::process::Command::new("/bin/true").status().map_err(kind).unwrap_err(), denied);
            if status == RulesetStatus::NotEnforced {
                return "no landlock here";
            }
            assert_eq!(fs::read(outside.join("file")).map_err(kind).unwrap_err(), denied);
            assert_eq!(fs::read(root.join("file")).unwrap(), b"x");
            assert_eq!(fs::write(root.join("file"), "y").map_err(kind).unwrap_err(), denied);
            fs::write(socket.join("s.lock"), "").unwrap();
            fs::remove_file(socket.join("s.lock")).unwrap();
            "all is well"
        })
        .join()
        .unwrap();
        eprintln!("{outcome}");
        fs::remove_dir_all(directory).unwrap();
    }
}

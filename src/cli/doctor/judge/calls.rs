//! Shared memory, threads and processes.

use super::super::check::{Check, Verdict};
use super::super::findings::{Findings, MemoryStep, Process, Tried};
use super::{time, tried};

pub fn checks(findings: &Findings) -> Vec<Check> {
    let mut checks: Vec<Check> = findings.memory.iter().map(|(step, tried)| memory(*step, tried)).collect();
    checks.extend(process(&findings.process));
    checks
}

fn memory(step: MemoryStep, result: &Tried) -> Check {
    let fail = Verdict::Failure;
    let (id, why, verdict, advice) = match step {
        MemoryStep::Memfd => (
            "memory.memfd",
            "sessions share memory that has no name, cannot be executed and can be sealed",
            fail,
            "use a kernel of 6.3 or newer, which has MFD_NOEXEC_SEAL",
        ),
        MemoryStep::Allocate => (
            "memory.allocate",
            "pages are made to exist before they are lent: a shortage is an error then and no crash later",
            fail,
            "use a kernel whose shared memory (tmpfs) has fallocate",
        ),
        MemoryStep::Punch => (
            "memory.give_back",
            "pages that are no longer needed are given back by punching holes",
            Verdict::Warning,
            "use a kernel whose shared memory (tmpfs) can punch holes; without, sessions keep what they once used",
        ),
        MemoryStep::Seal => (
            "memory.seals",
            "no client can change the size of memory that the server uses",
            fail,
            "use a kernel whose memfds can be sealed",
        ),
        MemoryStep::Segment => (
            "memory.segment",
            "a session needs one, mapped by both sides",
            fail,
            "see the refused call above",
        ),
    };
    tried(id, why, result, verdict, advice)
}

fn process(process: &Process) -> [Check; 3] {
    let peer = tried(
        "process.peer_pidfd",
        "the death of a client is noticed whoever else holds its socket (SO_PEERPIDFD)",
        &process.peer,
        Verdict::Failure,
        "use a kernel of 6.5 or newer",
    );
    let pinning = tried(
        "process.pinning",
        "each reactor stays on its core, so that callers can hand theirs over",
        &process.pinning,
        Verdict::Failure,
        "allow sched_setaffinity: a server pins threads, if only to measure what a wake costs",
    );
    let current = tried(
        "process.current_core",
        "a client chooses the reactor of the core that it runs on",
        &process.current_core,
        Verdict::Warning,
        "let clients wait by block or spin: they cannot find the reactor of their core here",
    );
    let current = match (&process.current_core, process.current_core_ns) {
        (Tried::Works, Some(ns)) => Check { found: format!("works, {} a look", time(ns)), ..current },
        _ => current,
    };
    [peer, pinning, current.fact("ns", process.current_core_ns)]
}

#[cfg(test)]
mod tests {
    use super::super::super::findings::fixture;
    use super::*;
    use rustix::io::Errno;

    /// Goal:   what a session cannot do without fails, the rest is warned of, each with the call and what to do.
    #[test]
    fn a_refused_call_is_named_with_what_to_do() {
        let refused = |call, errno| Tried::Refused { call, errno };
        for (step, errno, verdict, words) in [
            (MemoryStep::Memfd, Errno::INVAL, Verdict::Failure, "6.3"),
            (MemoryStep::Memfd, Errno::PERM, Verdict::Failure, "seccomp"),
            (MemoryStep::Allocate, Errno::NOSPC, Verdict::Failure, "memory cgroup"),
            (MemoryStep::Punch, Errno::OPNOTSUPP, Verdict::Warning, "keep what they once used"),
            (MemoryStep::Segment, Errno::MFILE, Verdict::Failure, "RLIMIT_NOFILE"),
        ] {
            let check = memory(step, &refused("some_call", errno));
            assert_eq!(check.verdict, verdict, "{step:?}");
            assert!(check.found.contains("some_call is refused") && check.found.contains(&errno.to_string()));
            assert!(check.advice.as_ref().unwrap().contains(words), "{words} in {:?}", check.advice);
        }
        assert_eq!(memory(MemoryStep::Seal, &Tried::Skipped).verdict, Verdict::Note);

        let mut of = fixture::good().process;
        of.peer = refused("getsockopt(SO_PEERPIDFD)", Errno::NOPROTOOPT);
        of.pinning = refused("sched_setaffinity", Errno::PERM);
        of.current_core = Tried::Wrong("on core 1 a thread is told that it runs on 0".to_owned());
        let [peer, pinning, current] = process(&of);
        assert!(peer.verdict == Verdict::Failure && peer.advice.unwrap().contains("6.5"));
        assert!(
            pinning.verdict == Verdict::Failure
                && pinning.advice.unwrap().contains("allow sched_setaffinity")
        );
        assert!(current.verdict == Verdict::Warning && current.found.contains("core 1"));
    }
}

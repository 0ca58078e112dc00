//! The kernel's release, its known bugs, and io_uring.

use super::super::check::{Check, Verdict};
use super::super::findings::{Findings, Tried, Uring};
use super::tried;
use doorbell_uring::{KERNEL_MIN, SetupError, Step, futex_bug_unfixed, kernel_version};

/// The first kernel that does give short turns to those who ask for them.
const SHORT_TURNS_SINCE: (u32, u32) = (6, 12);

pub fn checks(findings: &Findings) -> Vec<Check> {
    let release = &findings.kernel.release;
    let mut checks = vec![
        age(release, findings.uring.failed.is_none()),
        futex_bug(release),
        short_turns(release, &findings.kernel.short_turns),
        tried(
            "kernel.landlock",
            "a server gives up all files but those that it needs",
            &findings.kernel.landlock,
            Verdict::Note,
            "have the kernel started with landlock (lsm=), unless the server is kept from files by other means",
        ),
        tried(
            "kernel.seccomp",
            "a server gives up system calls that it does not need",
            &findings.kernel.seccomp,
            Verdict::Note,
            "nothing: a server works as well without",
        ),
    ];
    checks.push(permission(&findings.uring));
    checks.extend(Step::ALL.map(|step| step_of_self_test(step, &findings.uring)));
    checks
}

fn age(release: &str, io_uring_works: bool) -> Check {
    let (major, minor) = KERNEL_MIN;
    let check = |found: &str| {
        let why = "a server sleeps on io_uring futexes, which came with 6.7";
        Check::ok("kernel.release", why, format!("{release}, {found}")).fact("release", release)
    };
    match kernel_version(release) {
        None => check("which is no version that can be compared: the self-test below decides").noted(),
        Some((a, b, _)) if (a, b) >= KERNEL_MIN => check(&format!("{major}.{minor} or newer is needed")),
        Some(_) if io_uring_works => {
            check(&format!("older than {major}.{minor}, but the self-test below passes: it decides")).noted()
        }
        Some(_) => check(&format!("older than {major}.{minor}")).but(
            Verdict::Warning,
            format!("start a kernel of {major}.{minor} or newer; until then epoll serves"),
        ),
    }
}

fn futex_bug(release: &str) -> Check {
    let unfixed = futex_bug_unfixed(release);
    let check = |found: &str| {
        let why = "CVE-2025-39698: a failing futex wait of io_uring leaves freed memory behind, a way to root for \
                   any local user";
        Check::ok("kernel.futex_bug", why, found).fact("cve_2025_39698_unfixed", unfixed)
    };
    if unfixed {
        let advice = "update to 6.12.44, 6.16.4, 6.17 or newer, or ask your distribution whether its kernel has the \
                      fix of CVE-2025-39698";
        return check("this release may lack the fix of CVE-2025-39698").but(Verdict::Warning, advice);
    }
    check("no known one in this release")
}

fn short_turns(release: &str, asked: &Tried) -> Check {
    let why = "with short turns a reactor that is rung runs at once, also beside threads that compute; without, calls \
               may wait for the others' turns, some milliseconds";
    let ignored = kernel_version(release).is_some_and(|(a, b, _)| (a, b) < SHORT_TURNS_SINCE);
    let (major, minor) = SHORT_TURNS_SINCE;
    let advice = format!(
        "nothing, unless calls have to be fast beside busy threads: then use {major}.{minor} or newer"
    );
    let check = tried("kernel.short_turns", why, asked, Verdict::Note, &advice);
    match asked {
        Tried::Works if ignored => {
            let found = format!("the scheduler ignores the wish for them before {major}.{minor}");
            Check { found, ..check }.but(Verdict::Note, advice)
        }
        Tried::Works => Check { found: "the scheduler grants them".to_owned(), ..check },
        _ => check,
    }
}

fn permission(uring: &Uring) -> Check {
    let why = "kernel.io_uring_disabled says who may use io_uring, whatever this user may";
    let check = |found: &str| {
        let check = Check::ok("io_uring.permission", why, found);
        check.fact("io_uring_disabled", uring.disabled).fact("io_uring_group", uring.group)
    };
    match (uring.disabled, uring.group) {
        (None, _) => check("the kernel does not limit it, or does not say so"),
        (Some(0), _) => check("everybody may use it"),
        (Some(1), Some(group)) => check(&format!("root and members of group {group} may use it")).but(
            Verdict::Note,
            format!("run the server as a member of group {group}, or: sysctl kernel.io_uring_disabled=0"),
        ),
        (Some(1), None) => check("root alone may use it").but(
            Verdict::Note,
            "for a server of another user: name a group of its in kernel.io_uring_group, or: sysctl \
             kernel.io_uring_disabled=0",
        ),
        (Some(_), _) => {
            check("nobody may use it").but(Verdict::Warning, "allow it: sysctl kernel.io_uring_disabled=0")
        }
    }
}

fn step_of_self_test(step: Step, uring: &Uring) -> Check {
    let (id, why) = match step {
        Step::CreateRing => ("io_uring.create_ring", "a reactor waits for everything with one ring"),
        Step::RestrictRing => {
            ("io_uring.restrict_ring", "a ring can be locked down to the operations that are needed")
        }
        Step::MapMemory => ("io_uring.map_memory", "bells lie in memory that two processes map"),
        Step::FutexDiffers => {
            ("io_uring.futex_changed", "a reactor must not fall asleep when its bell has just been rung")
        }
        Step::FutexRungByCall => ("io_uring.futex_rung_by_call", "clients ring a reactor with futex(2)"),
        Step::FutexRungByRing => {
            ("io_uring.futex_rung_by_ring", "a reactor rings its clients through its ring")
        }
        Step::Poll => ("io_uring.poll", "new clients, hang-ups and deaths are noticed by polls"),
        Step::Timeout => ("io_uring.timeout", "time-outs and sweeps are due at absolute times"),
        Step::Cancel => ("io_uring.cancel", "waits of a session that has ended are cancelled"),
    };
    let check = |found: String, passed: bool| Check::ok(id, why, found).fact("passed", passed);
    let place = |step: Step| Step::ALL.iter().position(|other| *other == step);
    match &uring.failed {
        Some((failed, error)) if *failed == step => {
            let (found, advice) = refusal(error);
            // Another backend serves all the same (F38).
            check(found, false).but(Verdict::Warning, advice)
        }
        Some((failed, _)) if place(*failed) < place(step) => {
            check("not tried: a step before it failed".to_owned(), false).noted()
        }
        _ => check("passed".to_owned(), true),
    }
}

/// What was found and what to do about it.
fn refusal(error: &SetupError) -> (String, String) {
    match error {
        SetupError::Refused { step, errno, cause } => {
            (format!("{step} is refused: {errno}"), cause.to_string())
        }
        SetupError::Feature { .. } => (error.to_string(), "start a newer kernel".to_owned()),
        SetupError::Differs { .. } | SetupError::Silent { .. } => {
            let advice = "this io_uring does not do what it should: update the kernel, or leave the sandbox that \
                          stands in for it";
            (error.to_string(), advice.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::findings::fixture;
    use super::*;
    use doorbell_uring::{Cause, Host};
    use rustix::io::Errno;

    fn of(findings: &Findings, id: &str) -> Check {
        checks(findings).into_iter().find(|check| check.id == id).unwrap()
    }

    fn refused(step: Step, errno: Errno, host: &Host) -> Uring {
        let cause = Cause::of(step, errno, host.clone());
        Uring { failed: Some((step, SetupError::Refused { step, errno, cause })), ..fixture::good().uring }
    }

    /// Goal:   the age of a kernel decides only where the self-test does not.
    /// Method: releases around 6.7, with io_uring and without.
    #[test]
    fn f38_an_old_kernel_is_warned_of_unless_the_self_test_passes() {
        let host = Host::default();
        for (release, works, verdict) in [
            ("6.7.0", true, Verdict::Ok),
            ("6.6.99-lts", false, Verdict::Warning),
            ("5.15.0", false, Verdict::Warning),
            ("6.6.0-vendor", true, Verdict::Note),
            ("next", true, Verdict::Note),
        ] {
            let mut findings = fixture::good();
            findings.kernel.release = release.to_owned();
            if !works {
                findings.uring = refused(Step::FutexDiffers, Errno::INVAL, &host);
            }
            let check = of(&findings, "kernel.release");
            assert_eq!(check.verdict, verdict, "{release}");
            assert!(check.found.contains(release), "{}", check.found);
            assert_eq!(check.advice.is_some(), verdict == Verdict::Warning, "{release}");
        }
    }

    /// Goal:   known bugs are known by release, with the way out.
    #[test]
    fn known_bugs_of_a_kernel_are_told() {
        let mut findings = fixture::good();
        findings.kernel.release = "6.12.43".to_owned();
        let check = of(&findings, "kernel.futex_bug");
        assert_eq!((check.verdict, check.facts[0].1.as_bool()), (Verdict::Warning, Some(true)));
        assert!(check.advice.unwrap().contains("6.12.44"));
        assert_eq!(of(&findings, "kernel.short_turns").verdict, Verdict::Ok);

        findings.kernel.release = "6.11.0".to_owned();
        let check = of(&findings, "kernel.short_turns");
        assert!(check.verdict == Verdict::Note && check.found.contains("before 6.12"), "{}", check.found);
        findings.kernel.short_turns = Tried::Refused { call: "sched_setattr", errno: Errno::PERM };
        let check = of(&findings, "kernel.short_turns");
        assert!(check.verdict == Verdict::Note && check.found.contains("sched_setattr"), "{}", check.found);
    }

    /// Goal:   root is told when others may not use io_uring, and everybody when nobody may.
    #[test]
    fn f38_a_sysctl_that_shuts_others_out_is_told() {
        for (disabled, group, verdict, words) in [
            (None, None, Verdict::Ok, "does not say"),
            (Some(0), None, Verdict::Ok, "everybody"),
            (Some(1), Some(998), Verdict::Note, "members of group 998"),
            (Some(1), None, Verdict::Note, "root alone"),
            (Some(2), None, Verdict::Warning, "nobody"),
        ] {
            let findings = Findings { uring: Uring { disabled, group, failed: None }, ..fixture::good() };
            let check = of(&findings, "io_uring.permission");
            assert_eq!(check.verdict, verdict, "{words}");
            assert!(check.found.contains(words), "{}", check.found);
            assert!(check.advice.is_none_or(|advice| advice.contains("io_uring_disabled=0")), "{words}");
        }
    }

    /// Goal:   a refused operation fails with the likely cause; what came before it passed, what comes after was not
    ///         tried.
    /// Method: a sysctl, a filter, an old kernel, locked memory, descriptors.
    #[test]
    fn f38_a_refused_operation_names_the_knob() {
        let disabled = Host { disabled: Some(2), ..Host::default() };
        let old = Host { release: "6.1.0".to_owned(), ..Host::default() };
        let open = Host { disabled: Some(0), release: "6.12.50".to_owned(), ..Host::default() };
        for (step, errno, host, id, knob) in [
            (
                Step::CreateRing,
                Errno::PERM,
                &disabled,
                "io_uring.create_ring",
                "kernel.io_uring_disabled is 2",
            ),
            (Step::CreateRing, Errno::PERM, &open, "io_uring.create_ring", "seccomp"),
            (Step::CreateRing, Errno::NOMEM, &open, "io_uring.create_ring", "RLIMIT_MEMLOCK"),
            (Step::FutexDiffers, Errno::INVAL, &old, "io_uring.futex_changed", "6.1.0 is too old"),
            (Step::Poll, Errno::MFILE, &open, "io_uring.poll", "RLIMIT_NOFILE"),
        ] {
            let findings = Findings { uring: refused(step, errno, host), ..fixture::good() };
            let check = of(&findings, id);
            assert_eq!(check.verdict, Verdict::Warning, "{id}");
            assert!(check.advice.as_ref().unwrap().contains(knob), "{knob} in {:?}", check.advice);
            assert!(check.found.contains(&errno.to_string()), "{}", check.found);
            let passed = |step: Step| step_of_self_test(step, &findings.uring).found == "passed";
            let at = Step::ALL.iter().position(|other| *other == step).unwrap();
            assert!(Step::ALL[..at].iter().all(|step| passed(*step)), "{id}");
            assert!(Step::ALL[at + 1..].iter().all(|step| !passed(*step)), "{id}");
        }
        let failed = Some((Step::Cancel, SetupError::Silent { step: Step::Cancel }));
        let silent = Uring { failed, ..fixture::good().uring };
        let check = step_of_self_test(Step::Cancel, &silent);
        assert!(
            check.verdict == Verdict::Warning && check.found.contains("within a second"),
            "{}",
            check.found
        );
    }
}

//! From what was found to verdicts: why it matters, how good it is, what to do. Pure: the same findings give the same
//! checks on every machine. Figures that were measured are noted but never warned of: a busy moment must not change
//! the exit status.

mod calls;
mod cores;
mod kernel;
mod limits;
mod socket;

use super::check::{Check, Verdict};
use super::findings::{Findings, Tried};
use rustix::io::Errno;

/// Judges everything, in the order in which it is printed.
pub fn judge(findings: &Findings) -> Vec<Check> {
    let mut checks = kernel::checks(findings);
    checks.extend(calls::checks(findings));
    checks.extend(limits::checks(findings));
    checks.extend(cores::checks(findings));
    checks.extend(socket::checks(findings));
    checks
}

/// The check of something that was tried: `verdict` and `advice` are for the case that it does not work.
fn tried(id: &'static str, why: &'static str, tried: &Tried, verdict: Verdict, advice: &str) -> Check {
    let check = |found: String| Check::ok(id, why, found).fact("works", *tried == Tried::Works);
    match tried {
        Tried::Works => check("works".to_owned()),
        Tried::Skipped => check("not tried: something that it needs does not work".to_owned()).noted(),
        Tried::Wrong(what) => check(what.clone()).but(verdict, advice),
        Tried::Refused { call, errno } => {
            let advice = match reason(*errno) {
                Some(reason) => format!("{reason}; else {advice}"),
                None => advice.to_owned(),
            };
            check(format!("{call} is refused: {errno}")).but(verdict, advice)
        }
    }
}

/// The likely reason for a refusal, whatever was refused.
fn reason(errno: Errno) -> Option<&'static str> {
    match errno {
        Errno::MFILE | Errno::NFILE => {
            Some("no file descriptor is left: raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=) or fs.file-max")
        }
        Errno::NOMEM | Errno::NOSPC => Some("no memory is left: raise the limit of the memory cgroup"),
        Errno::PERM | Errno::ACCESS | Errno::NOSYS => Some(
            "a seccomp filter or security module refuses it, as the default profiles of container engines may: \
             allow it",
        ),
        _ => None,
    }
}

/// A duration in ns, for people.
pub fn time(ns: u64) -> String {
    match ns {
        0..1000 => format!("{ns} ns"),
        1000..10_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        _ => format!("{:.1} ms", ns as f64 / 1e6),
    }
}

/// Bytes, for people.
fn bytes(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} bytes"),
        10_240..10_485_760 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// Cores, for people: `0-3,8`.
pub fn list(cores: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for core in cores {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *core => *last = *core,
            _ => ranges.push((*core, *core)),
        }
    }
    let range = |(first, last): &(usize, usize)| match last - first {
        0 => format!("{first}"),
        _ => format!("{first}-{last}"),
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::super::check::Outcome;
    use super::super::findings::fixture;
    use super::*;
    use std::collections::BTreeSet;

    /// Goal:   a good machine has nothing but oks, each check a name of its own and a reason, and no advice.
    #[test]
    fn a_good_machine_needs_no_advice() {
        let checks = judge(&fixture::good());
        for check in &checks {
            assert_eq!((check.verdict, &check.advice), (Verdict::Ok, &None), "{}: {}", check.id, check.found);
            assert!(!check.why.is_empty() && !check.found.is_empty(), "{}", check.id);
        }
        let ids: BTreeSet<&str> = checks.iter().map(|check| check.id).collect();
        assert_eq!(ids.len(), checks.len());
        assert_eq!(Outcome::of(&checks), Outcome::RunsWell);
    }

    /// Goal:   whatever is wrong says what to do about it.
    /// Method: a machine where nothing works and nothing is known.
    #[test]
    fn every_warning_and_failure_says_what_to_do() {
        let checks = judge(&fixture::hopeless());
        let bad: Vec<&Check> = checks.iter().filter(|check| check.verdict >= Verdict::Warning).collect();
        assert!(bad.len() > 8, "{bad:?}");
        for check in bad {
            assert!(check.advice.as_ref().is_some_and(|advice| advice.len() > 10), "{}", check.id);
        }
        assert_eq!(Outcome::of(&checks), Outcome::WillNotRun);
        let ids = |checks: &[Check]| checks.iter().map(|check| check.id).collect::<Vec<_>>();
        assert_eq!(ids(&checks), ids(&judge(&fixture::good())), "the names do not depend on the findings");
    }

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!([time(999), time(1500), time(12_000_000)], ["999 ns", "1.5 us", "12.0 ms"]);
        assert_eq!([bytes(512), bytes(65_536), bytes(8 << 30)], ["512 bytes", "64 KiB", "8192 MiB"]);
        assert_eq!([list(&[]), list(&[3]), list(&[0, 1, 2, 5, 7, 8])], ["", "3", "0-2,5,7-8"]);
    }
}

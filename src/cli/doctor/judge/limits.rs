//! Limits of the process, its cgroup and the machine, against what the sessions that are configured need.

use super::super::check::{Check, Verdict};
use super::super::findings::{Findings, Limit, Trial};
use super::bytes;
use doorbell::config::FDS_PER_SESSION;
use serde_json::Value;

/// Connections that a server asks the kernel to queue.
const BACKLOG: u64 = 4096;
/// Memory that a kernel may count as locked for the ring of the home reactor, bytes, and for that of another one.
const HOME_RING: u64 = 88 << 10;
const FURTHER_RING: u64 = 20 << 10;
/// Resident memory of a server and its shared pages with up to a hundred sessions, bytes, and for each further one.
const SERVER: u64 = 3 << 20;
const SESSIONS_INCLUDED: u64 = 100;
const SESSION: u64 = 10 << 10;

pub fn checks(findings: &Findings) -> Vec<Check> {
    vec![descriptors(findings), locked_memory(findings), backlog(findings), memory(findings), cpu(findings)]
}

/// A limit for people.
fn shown(limit: Option<u64>, unit: impl Fn(u64) -> String) -> String {
    limit.map_or("unlimited".to_owned(), unit)
}

fn facts(check: Check, limit: Limit, needed: u64) -> Check {
    let number = |limit: Option<u64>| limit.map_or(Value::Null, Value::from);
    check.fact("soft", number(limit.soft)).fact("hard", number(limit.hard)).fact("needed", needed)
}

fn descriptors(findings: &Findings) -> Check {
    let (limit, needed) = (findings.limits.descriptors, findings.asked.descriptors);
    let sessions = findings.asked.max_sessions;
    let found = format!(
        "{} (hard limit {}), {needed} are needed for {sessions} sessions",
        shown(limit.soft, |n| n.to_string()),
        shown(limit.hard, |n| n.to_string()),
    );
    let why = "each session takes three file descriptors of the server, which raises the soft limit itself";
    let check = facts(Check::ok("limits.descriptors", why, found), limit, needed);
    let Some(hard) = limit.hard.filter(|hard| *hard < needed) else { return check };
    let mut advice = format!("raise the hard limit (ulimit -Hn {needed}, LimitNOFILE={needed})");
    let beside = needed - FDS_PER_SESSION * u64::from(sessions);
    if let Some(fewer) =
        hard.checked_sub(beside).map(|left| left / FDS_PER_SESSION).filter(|fewer| *fewer > 0)
    {
        advice += &format!(", or serve --max-sessions {fewer}");
    }
    check.but(Verdict::Failure, advice)
}

fn locked_memory(findings: &Findings) -> Check {
    let limit = findings.limits.locked;
    let further =
        findings.asked.reactors.as_ref().map_or(0, |reactors| reactors.len() as u64).saturating_sub(1);
    let needed = HOME_RING + further * FURTHER_RING;
    let why = "many kernels count rings as locked memory, those of all of a user's processes together";
    let check = |found: String| {
        facts(Check::ok("limits.locked_memory", why, found), limit, needed)
            .fact("exempt", findings.limits.may_lock)
    };
    let allowed = shown(limit.soft, bytes);
    if findings.limits.may_lock {
        return check(format!("{allowed}, which does not hold for this process (CAP_IPC_LOCK)"));
    }
    let found = format!("{allowed}, up to {} are needed for the rings", bytes(needed));
    if limit.soft.is_none_or(|soft| soft >= needed) {
        return check(found);
    }
    let advice = format!("raise the limit (ulimit -l {}, LimitMEMLOCK={needed})", needed >> 10);
    // A trial is answered without a ring, too.
    let suffices = findings.uring.failed.is_none() && matches!(findings.trial, Trial::Answered { .. });
    check(found).but(if suffices { Verdict::Note } else { Verdict::Warning }, advice)
}

fn backlog(findings: &Findings) -> Check {
    let why = "clients that connect at once wait in this queue; where it is full they try again, and again";
    let wanted = BACKLOG.min(findings.asked.max_sessions.into());
    let check = |found: String| {
        Check::ok("limits.backlog", why, found)
            .fact("somaxconn", findings.limits.backlog)
            .fact("wanted", wanted)
    };
    match findings.limits.backlog {
        None => check("net.core.somaxconn cannot be read".to_owned()),
        Some(queue) if queue >= wanted => {
            check(format!("net.core.somaxconn is {queue}, {wanted} are wanted"))
        }
        Some(queue) => check(format!("net.core.somaxconn is {queue}, {wanted} are wanted")).but(
            Verdict::Note,
            format!("if all clients connect at once: sysctl net.core.somaxconn={wanted}"),
        ),
    }
}

fn memory(findings: &Findings) -> Check {
    let further = u64::from(findings.asked.max_sessions).saturating_sub(SESSIONS_INCLUDED);
    let needed = SERVER + further * SESSION;
    let why = "shared memory counts, too: at the limit sessions are refused, or the server is killed";
    let check = |found: String, limit: Option<u64>| {
        Check::ok("limits.memory", why, found).fact("limit_bytes", limit).fact("needed_bytes", needed)
    };
    match findings.limits.memory {
        None => check("no limit of a control group can be read".to_owned(), None),
        Some(None) => check("the control group sets no limit".to_owned(), None),
        Some(Some(limit)) => {
            let sessions = findings.asked.max_sessions;
            let found = format!(
                "the control group allows {}, about {} are needed for {sessions} small sessions",
                bytes(limit),
                bytes(needed)
            );
            let check = check(found, Some(limit));
            if limit >= needed {
                return check;
            }
            check.but(
                Verdict::Warning,
                format!("raise memory.max (MemoryMax=) above {}, or lower --max-sessions", bytes(needed)),
            )
        }
    }
}

fn cpu(findings: &Findings) -> Check {
    let cores = findings.asked.reactors.as_ref().map_or(0, |reactors| reactors.len() as u64);
    let why = "whoever has used up a quota is stopped until its period ends, up to 100 ms";
    let check = |found: String, limit: Option<u64>| {
        Check::ok("limits.cpu", why, found).fact("limit_cores", limit.map(|limit| limit as f64 / 1e3))
    };
    match findings.limits.cpu {
        None => check("no limit of a control group can be read".to_owned(), None),
        Some(None) => check("the control group sets no limit".to_owned(), None),
        Some(Some(limit)) => {
            let found = format!("the control group allows {} cores to {cores} reactors", limit as f64 / 1e3);
            let check = check(found, Some(limit));
            if limit >= cores * 1000 {
                return check;
            }
            let advice =
                "raise cpu.max (CPUQuota=), or use fewer reactors (--reactors, --cores); never --policy spin";
            check.but(Verdict::Note, advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::findings::fixture;
    use super::*;

    /// Goal:   only a hard limit that is too low fails, with a number of sessions that would fit where there is one.
    #[test]
    fn f39_descriptors_are_counted_against_the_sessions() {
        let limit = |soft, hard| {
            let mut findings = fixture::good();
            findings.limits.descriptors = Limit { soft, hard };
            descriptors(&findings)
        };
        for (soft, hard) in
            [(None, None), (Some(1024), None), (Some(1024), Some(3136)), (Some(3136), Some(3136))]
        {
            assert_eq!(limit(soft, hard).verdict, Verdict::Ok, "{soft:?} {hard:?}");
        }
        let check = limit(Some(64), Some(3135));
        assert_eq!(check.verdict, Verdict::Failure);
        let advice = check.advice.unwrap();
        assert!(advice.contains("ulimit -Hn 3136") && advice.contains("--max-sessions 1023"), "{advice}");
        let advice = limit(Some(64), Some(64)).advice.unwrap();
        assert!(!advice.contains("--max-sessions"), "{advice}");
    }

    /// Goal:   a low limit on locked memory is a warning, less if a server ran all the same, nothing to who is exempt.
    #[test]
    fn locked_memory_is_counted_against_the_rings() {
        let mut findings = fixture::good();
        findings.limits.may_lock = false;
        findings.limits.locked = Limit { soft: Some(64 << 10), hard: Some(64 << 10) };
        assert_eq!(locked_memory(&findings).verdict, Verdict::Note);
        findings.trial = Trial::NotTried("io_uring is refused".to_owned());
        let check = locked_memory(&findings);
        assert_eq!(check.verdict, Verdict::Warning);
        // Two reactors.
        assert!(check.advice.as_ref().unwrap().contains("ulimit -l 108"), "{:?}", check.advice);
        findings.limits.may_lock = true;
        assert_eq!(locked_memory(&findings).verdict, Verdict::Ok);
        findings.limits.may_lock = false;
        findings.limits.locked.soft = Some(8 << 20);
        assert_eq!(locked_memory(&findings).verdict, Verdict::Ok);
    }

    /// Goal:   what a control group or the machine allows is set against what is needed; what cannot be read is ok.
    #[test]
    fn f26_f34_groups_and_queues_are_set_against_what_is_needed() {
        let mut findings = fixture::good();
        findings.limits.backlog = Some(128);
        let check = backlog(&findings);
        assert!(check.verdict == Verdict::Note && check.advice.unwrap().contains("somaxconn=1024"));
        findings.asked.max_sessions = 100;
        assert_eq!(backlog(&findings).verdict, Verdict::Ok);

        findings.limits.memory = Some(Some(4 << 20));
        assert_eq!(memory(&findings).verdict, Verdict::Ok);
        findings.asked.max_sessions = 1024;
        let check = memory(&findings);
        assert!(check.verdict == Verdict::Warning && check.advice.unwrap().contains("memory.max"));

        findings.limits.cpu = Some(Some(2000));
        assert_eq!(cpu(&findings).verdict, Verdict::Ok);
        findings.limits.cpu = Some(Some(1500));
        let check = cpu(&findings);
        assert!(
            check.verdict == Verdict::Note && check.found.contains("1.5 cores to 2 reactors"),
            "{}",
            check.found
        );

        (findings.limits.backlog, findings.limits.memory, findings.limits.cpu) = (None, None, None);
        for check in [backlog(&findings), memory(&findings), cpu(&findings)] {
            assert!(check.verdict == Verdict::Ok && check.found.contains("can"), "{}", check.found);
        }
    }
}

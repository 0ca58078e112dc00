//! Cores, what they do when idle, and what waking them costs.

use super::super::check::{Check, Verdict};
use super::super::findings::{Across, Cores, DmaLatency, Findings, Wake};
use super::{list, time};

/// From here on, ns, a wake across cores costs more than a call without it.
const SLOW_ACROSS_NS: u64 = 10_000;
/// A wake on the own core is a switch of threads: beyond this, ns, something else runs there.
const SLOW_SAME_NS: u64 = 10_000;
/// Sleep states that take longer to leave, us, show in every wake.
const DEEP_US: u64 = 20;

/// How to hold the file open from a shell.
const HOLD: &str = "`exec 3>/dev/cpu_dma_latency; printf '\\0\\0\\0\\0' >&3`";

pub fn checks(findings: &Findings) -> Vec<Check> {
    let cores = &findings.cores;
    vec![
        allowed(cores),
        siblings(cores),
        hypervisor(cores),
        idle_states(cores),
        wake_same(&findings.wake),
        wake_across(&findings.wake, cores),
        dma_latency(findings),
    ]
}

fn allowed(cores: &Cores) -> Check {
    let why = "a call is fastest on a core that has a reactor; elsewhere it waits for a wake across cores";
    let (count, online) = (cores.allowed.len(), cores.online.len());
    let check = |found: String| {
        let check = Check::ok("cores.allowed", why, found);
        check.fact("allowed", cores.allowed.clone()).fact("online", cores.online.clone())
    };
    if count == 0 {
        let advice = "allow sched_getaffinity: a server asks which cores it may use";
        return check("the kernel does not say which cores may be used".to_owned())
            .but(Verdict::Failure, advice);
    }
    if count >= online {
        return check(format!("{count}: {}", list(&cores.allowed)));
    }
    let advice = "start the server on the cores that its clients use (taskset, CPUAffinity=, cpusets)";
    check(format!("{count} of {online} that are online: {}", list(&cores.allowed))).but(Verdict::Note, advice)
}

fn siblings(cores: &Cores) -> Check {
    let why =
        "a reactor that polls takes half of the core that it shares with its hyperthread (--policy spin)";
    let check =
        |found: String| Check::ok("cores.hyperthreads", why, found).fact("groups", cores.siblings.clone());
    if cores.siblings.is_empty() {
        return check("no two of them are one core".to_owned());
    }
    let groups: Vec<String> = cores.siblings.iter().map(|group| list(group)).collect();
    let spare = |core: &usize| cores.siblings.iter().any(|group| group[1..].contains(core));
    let first: Vec<usize> = cores.allowed.iter().copied().filter(|core| !spare(core)).collect();
    let first: Vec<String> = first.iter().map(ToString::to_string).collect();
    check(format!("these are one core each: {}", groups.join("; ")))
        .but(Verdict::Note, format!("nothing with handoff; with spin: serve --cores {}", first.join(",")))
}

fn hypervisor(cores: &Cores) -> Check {
    let why =
        "in a virtual machine a wake across cores goes through the hypervisor, and its host takes cores away";
    let machine = cores.machine.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let check = |found: &str| {
        let check = Check::ok("cores.hypervisor", why, format!("{found}{machine}"));
        check.fact("virtual", cores.is_virtual).fact("machine", cores.machine.clone())
    };
    match cores.is_virtual {
        Some(true) => check("a virtual machine").but(
            Verdict::Note,
            "expect figures to vary with the host; leave the policy at handoff, which avoids such wakes",
        ),
        Some(false) => check("none"),
        None => check("cannot be told"),
    }
}

fn idle_states(cores: &Cores) -> Check {
    let why = "a core that sleeps deeply takes longer to be woken";
    let idle = &cores.idle;
    let deepest = idle.states.iter().filter(|state| state.enabled).max_by_key(|state| state.latency_us);
    let check = |found: String| {
        Check::ok("cores.idle_states", why, found)
            .fact("driver", idle.driver.clone())
            .fact("governor", idle.governor.clone())
            .fact("deepest_us", deepest.map(|state| state.latency_us))
            .fact("idle_poll", idle.polls)
    };
    if idle.polls {
        return check(
            "none: idle cores poll (idle=poll), which wakes them fast and saves no power".to_owned(),
        );
    }
    let Some(deepest) = deepest else {
        let who = if cores.is_virtual == Some(true) { "; the hypervisor has its own" } else { "" };
        return check(format!("the kernel lists none{who}"));
    };
    let named = |name: &Option<String>| name.clone().unwrap_or_else(|| "unknown".to_owned());
    let found = format!(
        "{} with governor {}; leaving the deepest, {}, takes {} us",
        named(&idle.driver),
        named(&idle.governor),
        deepest.name,
        deepest.latency_us
    );
    if deepest.latency_us <= DEEP_US {
        return check(found);
    }
    check(found)
        .but(Verdict::Note, "nothing with handoff; if wakes across cores matter, see dma latency below")
}

fn wake_same(wake: &Wake) -> Check {
    let why = "with handoff a call after a pause costs about two of these: its client rings the reactor of its own core";
    let check =
        |found: String| Check::ok("cores.wake_same", why, found).fact("ns", wake.same.as_ref().ok().copied());
    match &wake.same {
        Err(error) => check(format!("not measured: {error}")).noted(),
        Ok(ns) if *ns <= SLOW_SAME_NS => check(format!("{} to wake a thread on the own core", time(*ns))),
        Ok(ns) => check(format!("{} to wake a thread on the own core", time(*ns)))
            .but(Verdict::Note, "measure again while the machine is quiet: something else runs on this core"),
    }
}

fn wake_across(wake: &Wake, cores: &Cores) -> Check {
    let why = "what a call after a pause waits for twice with --policy block, or without a reactor on its core; it also \
               decides how long reactors poll";
    let check = |found: String, ns: Option<u64>| {
        let pair = wake.across.as_ref().map(|across| vec![across.from, across.to]);
        Check::ok("cores.wake_across", why, found).fact("ns", ns).fact("cores", pair)
    };
    match &wake.across {
        None => check("there is no other core".to_owned(), None),
        Some(Across { cost: Err(error), .. }) => check(format!("not measured: {error}"), None).noted(),
        Some(Across { from, to, cost: Ok(ns), .. }) => {
            let check =
                check(format!("{} to wake a thread on core {to} from core {from}", time(*ns)), Some(*ns));
            if *ns <= SLOW_ACROSS_NS {
                return check;
            }
            let through = match cores.is_virtual {
                Some(true) => "; they go through the hypervisor",
                Some(false) => "; they go through sleep states",
                None => "",
            };
            check.but(Verdict::Note, format!("leave the policy at handoff, which avoids them{through}"))
        }
    }
}

fn dma_latency(findings: &Findings) -> Check {
    let why = "who holds /dev/cpu_dma_latency open at 0 keeps cores from sleeping: faster wakes, more power";
    let awake = findings.wake.across.as_ref().and_then(|across| across.awake_ns);
    let asleep = findings.wake.across.as_ref().and_then(|across| across.cost.as_ref().ok().copied());
    let state = findings.cores.dma_latency;
    let check = |found: String| {
        Check::ok("cores.dma_latency", why, found)
            .fact("usable", state == DmaLatency::Usable)
            .fact("awake_ns", awake)
    };
    match (state, awake, asleep) {
        (DmaLatency::Absent, ..) => check("there is no /dev/cpu_dma_latency".to_owned()),
        (DmaLatency::Usable, Some(awake), Some(asleep)) => {
            let check = check(format!(
                "held at 0 a wake across cores takes {} instead of {}",
                time(awake),
                time(asleep)
            ));
            if awake >= asleep / 2 {
                return check;
            }
            check.but(Verdict::Note, format!("if wakes across cores matter more than power: {HOLD}"))
        }
        (DmaLatency::Usable, ..) => check("this user may use it".to_owned()),
        (DmaLatency::NotPermitted, _, Some(asleep)) if asleep > SLOW_ACROSS_NS => {
            check("this user may not write it".to_owned())
                .but(Verdict::Note, format!("if wakes across cores matter more than power, as root: {HOLD}"))
        }
        (DmaLatency::NotPermitted, ..) => check("this user may not write it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::findings::{IdleState, fixture};
    use super::*;

    /// Goal:   hyperthreads are named, with one core of each for who wants to poll.
    #[test]
    fn trap26_hyperthreads_are_named_with_a_way_around_them() {
        let mut cores = fixture::good().cores;
        (cores.allowed, cores.online) = (vec![0, 1, 2, 3], vec![0, 1, 2, 3]);
        cores.siblings = vec![vec![0, 2], vec![1, 3]];
        let check = siblings(&cores);
        assert_eq!(
            (check.verdict, check.found.as_str()),
            (Verdict::Note, "these are one core each: 0,2; 1,3")
        );
        assert!(check.advice.unwrap().ends_with("--cores 0,1"));
    }

    /// Goal:   fewer cores than the machine has are noted, no known core at all is a failure.
    #[test]
    fn cores_that_may_not_be_used_are_noted() {
        let mut cores = fixture::good().cores;
        cores.allowed = vec![1];
        let check = allowed(&cores);
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Note, "1 of 2 that are online: 1"));
        cores.online.clear();
        assert_eq!(allowed(&cores).verdict, Verdict::Ok);
        cores.allowed.clear();
        assert_eq!(allowed(&cores).verdict, Verdict::Failure);
    }

    /// Goal:   a hypervisor is told from none and from no answer.
    #[test]
    fn a_hypervisor_is_noted() {
        let mut cores = fixture::good().cores;
        assert_eq!(hypervisor(&cores).found, "none (Maker Desk 3)");
        (cores.is_virtual, cores.machine) = (Some(true), None);
        let check = hypervisor(&cores);
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Note, "a virtual machine"));
        cores.is_virtual = None;
        assert_eq!(
            (hypervisor(&cores).verdict, hypervisor(&cores).found.as_str()),
            (Verdict::Ok, "cannot be told")
        );
    }

    /// Goal:   sleep states count if they are deep and enabled; none, and idle=poll, are fine.
    #[test]
    fn deep_sleep_is_noted() {
        let mut cores = fixture::good().cores;
        let state = |latency_us, enabled| IdleState { name: format!("C{latency_us}"), latency_us, enabled };
        cores.idle.states = vec![state(1, true), state(133, true), state(900, false)];
        let check = idle_states(&cores);
        assert!(
            check.verdict == Verdict::Note && check.found.contains("C133, takes 133 us"),
            "{}",
            check.found
        );
        cores.idle.states[1].enabled = false;
        assert_eq!(idle_states(&cores).verdict, Verdict::Ok);
        cores.idle.states[1].enabled = true;
        cores.idle.polls = true;
        assert_eq!(idle_states(&cores).verdict, Verdict::Ok);
        cores.idle = Default::default();
        assert_eq!(idle_states(&cores).found, "the kernel lists none");
    }

    /// Goal:   slow wakes are noted, never warned of, and who may forbid sleep is told what that brings.
    #[test]
    fn slow_wakes_are_noted_with_what_helps() {
        let mut findings = fixture::good();
        let slow = Across { from: 0, to: 1, cost: Ok(35_000), awake_ns: Some(2400) };
        findings.wake.across = Some(slow.clone());
        findings.cores.dma_latency = DmaLatency::Usable;
        let across = wake_across(&findings.wake, &findings.cores);
        assert!(across.verdict == Verdict::Note && across.advice.unwrap().contains("handoff"));
        let check = dma_latency(&findings);
        assert_eq!(check.found, "held at 0 a wake across cores takes 2.4 us instead of 35.0 us");
        assert!(check.verdict == Verdict::Note && check.advice.unwrap().contains(HOLD));

        findings.wake.across = Some(Across { awake_ns: Some(34_000), ..slow.clone() });
        assert_eq!(dma_latency(&findings).verdict, Verdict::Ok, "it does not help here");
        findings.cores.dma_latency = DmaLatency::NotPermitted;
        let check = dma_latency(&findings);
        assert!(check.verdict == Verdict::Note && check.advice.unwrap().contains("as root"));

        findings.wake.across = Some(Across { cost: Err("refused".to_owned()), awake_ns: None, ..slow });
        findings.wake.same = Ok(50_000);
        assert_eq!(wake_across(&findings.wake, &findings.cores).verdict, Verdict::Note);
        assert_eq!(wake_same(&findings.wake).verdict, Verdict::Note);
        findings.wake.across = None;
        assert_eq!(wake_across(&findings.wake, &findings.cores).verdict, Verdict::Ok);
    }
}

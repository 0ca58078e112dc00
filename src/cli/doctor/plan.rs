//! What a server would use here, and why.

use super::findings::Findings;
use super::judge::{list, time};
use doorbell::WaitPolicy;
use serde::Serialize;

/// What a server would use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// What reactors wait with.
    pub backend: &'static str,
    /// The wait policy.
    pub policy: &'static str,
    /// How many reactors there are; `None` if that cannot be said.
    pub reactors: Option<usize>,
    /// The core of each, the home reactor first; `None` where one is not pinned.
    pub cores: Option<Vec<Option<usize>>>,
    /// Most that a reactor polls at once before it sleeps, ns; 0 for not at all, `None` for without end.
    pub poll_ns: Option<u64>,
    /// Most of its core that a reactor spends on polling, percent.
    pub poll_percent: u32,
    /// The same in words, by subject.
    #[serde(skip)]
    pub lines: Vec<(&'static str, String)>,
}

impl Plan {
    /// Says what a server would use, from what was found.
    pub fn of(findings: &Findings) -> Self {
        let asked = &findings.asked;
        let works = findings.uring.failed.is_none();
        let cores = asked.reactors.clone().ok();
        let (poll_ns, polling) = polling(findings);
        Self {
            backend: if works { "io_uring" } else { "epoll" },
            policy: policy(asked.policy).0,
            reactors: cores.as_ref().map(Vec::len),
            poll_ns,
            poll_percent: asked.spin_percent,
            lines: vec![
                ("backend", backend(works)),
                ("policy", policy(asked.policy).1.to_owned()),
                ("reactors", reactors(&asked.reactors)),
                ("polling", polling),
            ],
            cores,
        }
    }
}

fn backend(works: bool) -> String {
    match works {
        true => "io_uring, since its self-test passes".to_owned(),
        false => "epoll, since io_uring fails its self-test: calls of sleeping servers take a little longer; see above \
                  for what to change"
            .to_owned(),
    }
}

fn policy(policy: WaitPolicy) -> (&'static str, &'static str) {
    match policy {
        WaitPolicy::Handoff => (
            "handoff",
            "handoff, the default: no CPU while idle, and a caller hands its core over to the reactor there",
        ),
        WaitPolicy::Spin => ("spin", "spin: the lowest latency, a whole core for each reactor"),
        WaitPolicy::Block => ("block", "block: no CPU while idle, a wake for each call after a pause"),
    }
}

fn reactors(reactors: &Result<Vec<Option<usize>>, String>) -> String {
    match reactors {
        Err(error) => format!("cannot be said: {error}"),
        Ok(reactors) => match reactors.iter().copied().collect::<Option<Vec<usize>>>() {
            None => format!("{}, wherever the scheduler puts them", reactors.len()),
            Some(cores) if cores.len() == 1 => {
                format!("1, on core {}, the only one that may be used", cores[0])
            }
            Some(cores) => {
                format!(
                    "{}, one for each core that may be used: {}; home is core {}",
                    cores.len(),
                    list(&cores),
                    cores[0]
                )
            }
        },
    }
}

/// How long a reactor polls before it sleeps, at most, as in [`Plan::poll_ns`]; and in words.
fn polling(findings: &Findings) -> (Option<u64>, String) {
    let (never, percent) = (Some(0), findings.asked.spin_percent);
    let across = findings.wake.across.as_ref().map(|across| &across.cost);
    match (findings.asked.policy, across) {
        (WaitPolicy::Spin, _) => (None, "always".to_owned()),
        (WaitPolicy::Block, _) => (never, "never".to_owned()),
        (WaitPolicy::Handoff, _) if percent == 0 => (never, "never: spin_percent is 0".to_owned()),
        (WaitPolicy::Handoff, None) => (
            never,
            "never: there is one core alone for reactors, and no wake across cores to save".to_owned(),
        ),
        (WaitPolicy::Handoff, Some(Err(error))) => (never, format!("cannot be said: {error}")),
        (WaitPolicy::Handoff, Some(Ok(cost))) => (
            Some(*cost),
            format!(
                "at most {} at once and {percent} % of a core, and only while calls from other cores come closer \
                 together than that: it is what a wake costs",
                time(*cost)
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::findings::fixture;
    use super::*;

    /// Goal:   the plan of a good machine: io_uring, a reactor for each core, polls as long as a wake costs.
    #[test]
    fn a_good_machine_is_used_as_it_is() {
        let plan = Plan::of(&fixture::good());
        assert_eq!((plan.backend, plan.policy, plan.reactors), ("io_uring", "handoff", Some(2)));
        assert_eq!(
            (plan.cores, plan.poll_ns, plan.poll_percent),
            (Some(vec![Some(0), Some(1)]), Some(2500), 5)
        );
        let line = |subject: &str| plan.lines.iter().find(|line| line.0 == subject).unwrap().1.clone();
        assert!(line("reactors").contains("0-1; home is core 0"), "{}", line("reactors"));
        assert!(line("polling").contains("2.5 us at once and 5 %"), "{}", line("polling"));
    }

    /// Goal:   without io_uring the plan is epoll; one core never polls; other policies do as they say.
    #[test]
    fn a_plan_says_when_there_is_none() {
        let plan = Plan::of(&fixture::hopeless());
        assert_eq!((plan.backend, plan.reactors, plan.cores, plan.poll_ns), ("epoll", None, None, Some(0)));
        assert!(plan.lines[0].1.contains("fails its self-test"));
        let mut findings = fixture::good();
        findings.wake.across = None;
        findings.asked.reactors = Ok(vec![Some(3)]);
        let plan = Plan::of(&findings);
        assert!(plan.lines[2].1.contains("1, on core 3") && plan.lines[3].1.starts_with("never"));
        findings.asked.reactors = Ok(vec![None, None]);
        findings.asked.policy = WaitPolicy::Block;
        let plan = Plan::of(&findings);
        assert!(plan.policy == "block" && plan.poll_ns == Some(0) && plan.lines[2].1.contains("scheduler"));
    }
}

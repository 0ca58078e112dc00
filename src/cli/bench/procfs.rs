//! What the kernel tells about a process: processor time, context switches, the limit on descriptors.

use super::error::BenchError;
use rustix::process::{Resource, getrlimit, setrlimit};
use std::fs;
use std::path::PathBuf;

/// Processor time of all threads that `pid` has now, nanoseconds; `None` if the kernel does not say.
pub fn cpu_ns(pid: u32) -> Option<u64> {
    sum_over_threads(pid, "schedstat", |text| text.split_whitespace().next()?.parse().ok())
}

/// How often the threads that `pid` has now went to sleep; `None` if the kernel does not say.
pub fn voluntary_switches(pid: u32) -> Option<u64> {
    sum_over_threads(pid, "status", |text| field(text, "voluntary_ctxt_switches:"))
}

fn sum_over_threads(pid: u32, file: &str, parse: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let tasks = fs::read_dir(PathBuf::from(format!("/proc/{pid}/task"))).ok()?;
    // A thread that ends meanwhile is left out.
    let texts = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join(file)).ok());
    texts.map(|text| parse(&text)).sum()
}

/// The number behind `name` in the kernel's "name: value" files.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

/// Allows this process, and those it starts, as many descriptors as may be had without asking.
///
/// # Errors
///
/// [`BenchError::Os`] if the kernel refuses.
pub fn raise_descriptor_limit() -> Result<(), BenchError> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).map_err(|e| BenchError::os("setrlimit(RLIMIT_NOFILE)", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "Name:\tx\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n";
        assert_eq!(field(text, "voluntary_ctxt_switches:"), Some(17));
        assert_eq!(field(text, "nonvoluntary_ctxt_switches:"), Some(4));
        assert_eq!(field(text, "switches:"), None);
    }

    #[test]
    fn this_process_uses_time_and_an_absent_one_does_not_answer() {
        assert!(cpu_ns(std::process::id()).unwrap() > 0);
        assert!(voluntary_switches(std::process::id()).is_some());
        assert_eq!(cpu_ns(u32::MAX), None);
    }
}

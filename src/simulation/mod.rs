//! Deterministic simulation: the shipped reactors, their home, the shipped clients, on a simulated kernel. One seed is one run.
//!
//! Drives: `Reactor` with `Home` and `Core`, `IpcClient` with `Session`, `Lane` and `Bodies`, `Mux` with its revival and the
//!         classifier; segments on the heap. The sockets between them are socket pairs, which do what they are told.
//! Enemy:  the seed: who runs next, for how long nobody does, who dies, stands still, lies, what the kernel refuses.
//! Oracle: `ledger.rs`: what was executed, and what every byte of an answer has to be.
//!
//! `ci/simulation.sh` runs many seeds; a seed that fails is printed with the command that runs it again.

pub mod driver;
mod hostile;
pub mod kernel;
mod ledger;
mod many;
mod plain;
mod random;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use world::{Broken, Tally, World};

/// A seed that broke a rule.
#[derive(Debug)]
struct Failure {
    seed: u64,
    event: u64,
    what: String,
}

/// One run of so many events.
fn run(seed: u64, events: u64) -> Result<Tally, Failure> {
    let world = Rc::new(World::new(seed));
    let result = catch_unwind(AssertUnwindSafe(|| Rc::clone(&world).run(events)));
    let event = world.events();
    kernel::set_others(None);
    let result = result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let what = match (panic.downcast_ref::<Broken>(), text) {
            (Some(Broken(what)), _) => what.clone(),
            (None, Some(text)) => format!("panicked: {text}"),
            (None, None) => "panicked".to_owned(),
        };
        Failure { seed, event, what }
    });
    drop(world);
    kernel::end();
    result
}

#[cfg(test)]
mod tests {
    use super::kernel::with_kernel;
    use super::*;
    use crate::client::{CallOptions, simulated};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::{Duration, Instant};

    fn number(name: &str, otherwise: u64) -> u64 {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    }

    /// Runs these seeds on so many threads; what they came to, or the first few that failed.
    fn run_all(first: u64, seeds: u64, events: u64, threads: u64) -> Result<Tally, Vec<Failure>> {
        let (next, sum, failures) =
            (AtomicU64::new(first), Mutex::new(Tally::default()), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Relaxed);
                        if seed >= first + seeds || !failures.lock().unwrap().is_empty() {
                            break;
                        }
                        match run(seed, events) {
                            Ok(tally) => sum.lock().unwrap().add(&tally),
                            Err(failure) => failures.lock().unwrap().push(failure),
                        }
                    }
                });
            }
        });
        let failures = failures.into_inner().unwrap();
        if failures.is_empty() { Ok(sum.into_inner().unwrap()) } else { Err(failures) }
    }

    fn report(failures: &[Failure], events: u64) -> String {
        let line = |failure: &Failure| {
            let Failure { seed, event, what } = failure;
            format!(
                "seed {seed}, event {event}: {what}\nagain: ci/simulation.sh --seed {seed} --events {events}\n"
            )
        };
        failures.iter().map(line).collect()
    }

    /// Goal:   I1 to I8, I12: whatever dies, stands still, lies or is refused, nothing is executed that must not be, every
    ///         honest call has its end and its own answer, nobody honest is ended for what others do, and nothing is left.
    /// Method: some seeds; `ci/simulation.sh` runs many.
    #[test]
    fn simulation_seeds() {
        let (seeds, events) = (200, 500);
        match run_all(0, seeds, events, 2) {
            Ok(tally) => {
                assert!(tally.answers > 1000 && tally.server_deaths > 0 && tally.losses > 0, "{tally:?}")
            }
            Err(failures) => panic!("{}", report(&failures, events)),
        }
    }

    /// Goal:   one seed is one run.
    /// Method: each twice.
    #[test]
    fn a_seed_replays_exactly() {
        for seed in 0..8 {
            let [first, second] = [(); 2].map(|()| format!("{:?}", run(seed, 600)));
            assert_eq!(first, second);
        }
    }

    /// Ends the simulation of a world, whatever has become of it.
    struct Ends;

    impl Drop for Ends {
        fn drop(&mut self) {
            kernel::end();
        }
    }

    /// Goal:   the same as [`simulation_seeds`], of as many seeds as asked for.
    /// Method: DOORBELL_SEED is the first, DOORBELL_SEEDS how many, DOORBELL_EVENTS the steps of each, DOORBELL_THREADS.
    #[test]
    #[ignore = "for ci/simulation.sh"]
    fn simulation_of_many_seeds() {
        let (first, seeds) = (number("DOORBELL_SEED", 0), number("DOORBELL_SEEDS", 1));
        let (events, threads) = (number("DOORBELL_EVENTS", 2000), number("DOORBELL_THREADS", 2));
        let began = Instant::now();
        match run_all(first, seeds, events, threads) {
            Ok(tally) => {
                let seconds = began.elapsed().as_secs_f64();
                println!("seeds {first} to {}: no violation in {seconds:.1} s", first + seeds - 1);
                println!("{tally:?}");
            }
            Err(failures) => panic!("{}", report(&failures, events)),
        }
    }
}

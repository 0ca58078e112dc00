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

    /// Goal:   DESIGN §4: whoever waits for one call sleeps although there is room for the request of another, and is told of
    ///         that room later.
    /// Method: seed 3 of the simulation: a request that is sent piece by piece has room, its caller opens a connection, or
    ///         calls, and the clock would tell of who polls instead.
    #[test]
    fn who_waits_for_a_call_sleeps_while_another_has_room() {
        let world = World::quiet();
        let _ends = Ends;
        let client = world.guest();
        let connection = client.open().unwrap().detach();
        let flow = client.attached(connection).start(ledger::FLOW, None, &CallOptions::default()).unwrap();
        for _ in 0..50 {
            client.flush().unwrap();
            kernel::others_run(Duration::from_millis(1));
        }
        let other = client.open().unwrap().detach();
        assert_ne!(connection, other);
        let (call, _) = world.make_call();
        let call = ledger::Call { of: ledger::MIRROR, len: 100, ..call };
        let request = call.request(world.secret());
        assert_eq!(client.attached(other).call(ledger::MIRROR, &request).unwrap().len(), 100);
        assert!(client.wait(Some(Duration::ZERO)).unwrap(), "there is room for more of the request");
        assert_eq!(client.send(flow, &request).unwrap(), 100);
    }

    /// Goal:   F58: a call whose caller has stopped waiting is nobody's when its session ends, long or not.
    /// Method: seed 50 of the simulation: a long call that is not answered in time; then its server dies.
    #[test]
    fn f58_a_call_that_was_given_up_has_no_end_when_its_session_has() {
        let world = World::quiet();
        let _ends = Ends;
        let client = world.guest();
        let connection = client.open().unwrap();
        let (call, _) = world.make_call();
        let call = ledger::Call { of: ledger::MIRROR, len: 200_000, ..call };
        let options = CallOptions { timeout: Some(Duration::from_micros(1)), ..CallOptions::default() };
        let called = connection.call_with(call.of, &call.request(world.secret()), &options, |_| ());
        assert!(matches!(called, Err(crate::IpcError::Timeout)), "{called:?}");
        world.kill_server();
        let over = (0..1000).find_map(|_| client.poll().map(|reply| assert!(reply.is_none())).err());
        assert!(matches!(over, Some(crate::IpcError::NotExecuted)), "{over:?}");
    }

    /// Goal:   R3.3: the time that a caller waits bounds his wait for a slot, too.
    /// Method: calls that only their caller gets on have all slots.
    #[test]
    fn r3_3_a_wait_for_a_slot_ends_with_the_callers_time() {
        let world = World::quiet();
        let _ends = Ends;
        let client = world.guest();
        let connection = client.open().unwrap();
        while connection.start(ledger::FLOW, None, &CallOptions::default()).is_ok() {}
        while connection
            .submit(ledger::LATER, &[0; 24], &CallOptions { pieces: true, ..CallOptions::default() })
            .is_ok()
        {}
        for len in [100, 30_000] {
            let options = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
            let called = connection.call_with(ledger::MIRROR, &vec![0; len], &options, |_| ());
            // A short one may find a slot that is left, and be answered; a long one needs two.
            let answered = len == 100 && matches!(called, Err(crate::IpcError::Decode(_)));
            assert!(answered || matches!(called, Err(crate::IpcError::Timeout)), "{len} bytes: {called:?}");
        }
    }

    /// Goal:   R1.9, P3: a call that waits for memory begins without it when its time has come, also if that comes between the
    ///         last look at it and the moment at which its caller goes to sleep.
    /// Method: seed 101 of the simulation: a server that does not answer; the time passes before it is asked for.
    #[test]
    fn r1_9_the_time_of_a_call_that_waits_for_memory_is_not_missed() {
        let world = World::quiet();
        let _ends = Ends;
        let client = world.guest();
        let connection = client.open().unwrap().detach();
        client.attached(connection).submit(ledger::MIRROR, &[0; 9000], &CallOptions::default()).unwrap();
        let Some(begins_at) = simulated::begins_at(&client) else {
            // There is nothing to lease: it has begun.
            return;
        };
        let at_most = client.prepare_to_sleep().unwrap().expect("whoever waits on the descriptor is told");
        assert!(crate::machine::now() + at_most >= begins_at && at_most <= Duration::from_millis(5));
        with_kernel(|kernel| kernel.pass(6_000_000));
        assert!(simulated::begins_at(&client).is_some_and(|at| at <= crate::machine::now()));
        client.flush().unwrap();
        assert_eq!(simulated::begins_at(&client), None);
    }

    /// Goal:   P6, R3.4: calls that are sent again to the next server are overtaken by none that their caller makes then: it keeps
    ///         off the core of their lane's reactor only once they have been answered.
    /// Method: a server of two reactors dies with a call in flight; the next one has not taken it yet when the caller, on its home
    ///         reactor's core, makes another call, and it has answered both when he makes a third.
    #[test]
    fn p6_r3_4_calls_that_were_sent_again_are_not_overtaken() {
        let world = World::quiet_with(|config| {
            (config.reactors, config.memory_budget) = (2, crate::ServerConfig::default().memory_budget);
        });
        let _ends = Ends;
        let guest = || std::iter::repeat_with(|| world.guest()).find(simulated::stays_home).unwrap();
        let mut many = simulated::Many::away(1);
        many.attach(guest()).unwrap();
        let request = || {
            let (call, _) = world.make_call();
            ledger::Call { of: ledger::MIRROR, len: 100, ..call }.request(world.secret())
        };
        let submit = |many: &mut simulated::Many| {
            // Each reactor is on the core of its number.
            many.keep_off(0);
            let options = CallOptions::default();
            many.submit(0, ledger::MIRROR, &request(), &options, 0).unwrap()
        };
        let first = submit(&mut many);
        assert_eq!(many.lane_of(first), Some(1), "there is a lane away from that core");
        world.kill_server();
        while !many.is_away() {
            assert!(many.take().unwrap().is_none(), "it was not started");
        }
        world.start_server();
        many.attach(guest()).unwrap();
        assert_eq!(many.lane_of(first), Some(0), "it has been sent again");
        let second = submit(&mut many);
        assert_eq!(many.lane_of(second), Some(0), "behind the one that was sent again");
        let mut answered = Vec::new();
        while answered.len() < 2 {
            many.prepare_to_wait().unwrap();
            kernel::others_run(Duration::from_millis(1));
            while let Some((key, _)) = many.take().unwrap() {
                assert!(matches!(many.next(key), simulated::Came::Frame { last: true, .. }));
                answered.push(key);
            }
        }
        assert_eq!(answered, [first, second]);
        let third = submit(&mut many);
        assert_eq!(many.lane_of(third), Some(1), "nothing is in flight on the other one");
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

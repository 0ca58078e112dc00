//! Starting the reactors of a server, each a thread on a core of its own, and waiting for their end.

use super::ShutdownHandle;
use super::core::Core;
use super::crew::{Address, Crew, Inbox, Message};
use super::home::Home;
use super::listener::Listener;
use super::reactor::{self, Reactor, Source};
use super::table::Handler;
use crate::config::{ServerConfig, WaitPolicy};
use crate::error::{IpcError, Result};
use crate::metrics::{Metrics, Totals};
use crate::protocol::rendezvous::monotonic_ns;
use doorbell_uring::{Driver, Wait, futex};
use rustix::thread::CpuSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};

/// What all reactors start with.
struct Plan<S: 'static> {
    handlers: &'static [Option<Handler<S>>],
    state: Arc<S>,
    config: ServerConfig,
    totals: Totals,
    /// What waking a reactor from another core costs, ns; 0 if that cannot happen.
    wake_ns: u64,
    /// Stops home when another reactor has ended.
    shutdown: ShutdownHandle,
}

impl<S> Plan<S> {
    fn core(&self, own: usize, inbox: Inbox) -> Core<S> {
        let totals = Totals { own, ..self.totals.clone() };
        Core::new(self.handlers, Arc::clone(&self.state), self.config.clone(), totals, inbox)
    }

    fn reactor(&self, driver: Driver, crew: Crew, inbox: Inbox, home: Option<Home>) -> Reactor<S> {
        let totals = Totals { own: crew.own, ..self.totals.clone() };
        Reactor::new(driver, self.core(crew.own, inbox), crew, totals, home, self.wake_ns)
    }
}

/// Runs a server on the calling thread and those of its further reactors.
pub(super) fn serve<S: Send + Sync + 'static>(
    handlers: &'static [Option<Handler<S>>],
    state: Arc<S>,
    config: ServerConfig,
    listener: Listener,
    stop: OwnedFd,
    shutdown: ShutdownHandle,
) -> Result<Metrics> {
    let cores = cores(&config)?;
    let reactors = if config.reactors == 0 { cores.len() } else { config.reactors as usize };
    let pins: Vec<Option<usize>> =
        (0..reactors).map(|i| config.pinned.then(|| cores[i % cores.len()])).collect();
    let polls = config.policy == WaitPolicy::Handoff && config.spin_percent > 0;
    let wake_ns = if polls && cores.len() > 1 { wake_cost(cores[0], cores[1])? } else { 0 };
    let config = ServerConfig { reactors: reactors as u32, ..config };
    let totals = Totals::new(0, reactors);
    let plan = Plan { handlers, state, config, totals, wake_ns, shutdown };
    tracing::info!(reactors, wake_ns, "starting");
    let before = rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
    let result = std::thread::scope(|scope| {
        become_reactor(pins[0])?;
        let driver = reactor::driver(true)?;
        let home = Home::new(listener, stop, &plan.config)?;
        let further = Further::start(scope, &plan, &pins[1..])?;
        let (address, inbox) = Address::new(duplicate(&driver)?, pins[0]);
        let addresses: Arc<[Address]> = std::iter::once(address).chain(further.addresses).collect();
        let crew = Crew { own: 0, addresses };
        for (i, start) in further.starts.into_iter().enumerate() {
            // A thread that has ended by now says so when it is joined.
            start.send(Crew { own: i + 1, ..crew.clone() }).ok();
        }
        let result = plan.reactor(driver, crew.clone(), inbox, Some(home)).run();
        if result.is_err() {
            // Home has had no ring to say good-bye with.
            stop_from_outside(&crew)?;
        }
        join(further.threads, result)
    });
    // The calling thread was pinned, with short turns, while it was a reactor's.
    if let Err(error) = doorbell_uring::ask_for_short_turns(0) {
        tracing::info!(%error, "the scheduler's own turns could not be had back");
    }
    rustix::thread::sched_setaffinity(None, &before)
        .map_err(|e| IpcError::io("sched_setaffinity after serving", e))?;
    result
}

/// The reactors beside home.
struct Further<'scope> {
    addresses: Vec<Address>,
    /// Each waits for this before it begins. If it is dropped instead, the start has failed.
    starts: Vec<Sender<Crew>>,
    threads: Vec<ScopedJoinHandle<'scope, Result<Metrics>>>,
}

impl<'scope> Further<'scope> {
    /// Starts their threads and waits until each has its ring.
    fn start<'env: 'scope, S: Send + Sync + 'static>(
        scope: &'scope Scope<'scope, 'env>,
        plan: &'env Plan<S>,
        pins: &[Option<usize>],
    ) -> Result<Self> {
        let mut further = Self { addresses: Vec::new(), starts: Vec::new(), threads: Vec::new() };
        for (i, core) in pins.iter().copied().enumerate() {
            let (made, is_made) = channel();
            let (start, is_started) = channel();
            let thread = std::thread::Builder::new()
                .name(format!("reactor-{}", i + 1))
                .spawn_scoped(scope, move || run_further(plan, core, &made, &is_started))
                .map_err(|e| IpcError::io("starting the thread of a reactor", e))?;
            match is_made.recv() {
                Ok(address) => further.addresses.push(address),
                // It has ended without a ring: its result says why.
                Err(_) => {
                    let ended = || IpcError::Config("a reactor ended while it started".to_owned());
                    return Err(join(vec![thread], Ok(Metrics::default())).err().unwrap_or_else(ended));
                }
            }
            further.starts.push(start);
            further.threads.push(thread);
        }
        Ok(further)
    }
}

/// The thread of a further reactor.
fn run_further<S: Send + Sync + 'static>(
    plan: &Plan<S>,
    core: Option<usize>,
    made: &Sender<Address>,
    started: &Receiver<Crew>,
) -> Result<Metrics> {
    become_reactor(core)?;
    let driver = reactor::driver(false)?;
    let (address, inbox) = Address::new(duplicate(&driver)?, core);
    if made.send(address).is_err() {
        return Ok(Metrics::default());
    }
    let Ok(crew) = started.recv() else { return Ok(Metrics::default()) };
    let _stops_home = StopsHome(plan.shutdown.clone());
    plan.reactor(driver, crew, inbox, None).run()
}

/// Stops the server when a further reactor ends, by a failure or a panic of our own: nobody shall find half of it.
struct StopsHome(ShutdownHandle);

impl Drop for StopsHome {
    fn drop(&mut self) {
        // Home has ended already where this fails.
        self.0.shutdown().ok();
    }
}

/// Waits for the reactors; the first failure counts.
fn join(threads: Vec<ScopedJoinHandle<'_, Result<Metrics>>>, home: Result<Metrics>) -> Result<Metrics> {
    let mut result = home;
    for thread in threads {
        let theirs = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result = match (result, theirs) {
            (Ok(mut sum), Ok(theirs)) => {
                sum.add(&theirs);
                Ok(sum)
            }
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
        };
    }
    result
}

/// Tells the other reactors to stop, over a ring made for that.
fn stop_from_outside(crew: &Crew) -> Result<()> {
    // All of them first: whoever has sessions looks into its inbox at every sweep.
    let told: Vec<&Address> =
        crew.addresses[1..].iter().filter(|address| address.put(Message::Stop)).collect();
    let mut driver = reactor::driver(false)?;
    for address in told {
        driver.msg_ring(address.ring(), 0, Source::Mail.token())?;
    }
    Ok(driver.enter(Wait::No)?)
}

fn duplicate(driver: &Driver) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(driver.as_fd(), 0).map_err(|e| IpcError::io("dup of a reactor's ring", e))
}

/// The cores that reactors run on: those configured, or all that this thread may use.
fn cores(config: &ServerConfig) -> Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
    let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).collect();
    match config.cores.iter().find(|core| !allowed.contains(core)) {
        Some(core) => Err(IpcError::Config(format!(
            "core {core} may not be used, allowed are {allowed:?}: choose among these, or change the affinity \
             (taskset) that the server is started with"
        ))),
        None if config.cores.is_empty() => Ok(allowed),
        None => Ok(config.cores.clone()),
    }
}

/// The turns that a reactor's thread asks of the scheduler, ns: the shortest there are. It works for microseconds
/// and then sleeps; beside threads that compute, a long turn of its own would only make it wait for theirs.
const TURN_NS: u64 = 100_000;

/// Makes the calling thread a reactor's: on its core, with short turns.
fn become_reactor(core: Option<usize>) -> Result<()> {
    pin(core)?;
    if let Err(error) = doorbell_uring::ask_for_short_turns(TURN_NS) {
        tracing::info!(%error, "the scheduler grants no short turns: beside busy threads calls take longer");
    }
    Ok(())
}

/// Pins the calling thread to one core.
fn pin(core: Option<usize>) -> Result<()> {
    let Some(core) = core else { return Ok(()) };
    let mut set = CpuSet::new();
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|e| IpcError::io("sched_setaffinity of a reactor", e))
}

/// Round trips of the measurement below.
const WAKES: u32 = 15;

/// What it takes until a thread that sleeps on `there` runs, woken from `here`, ns: the median of some round trips,
/// halved. Takes a millisecond or two.
fn wake_cost(here: usize, there: usize) -> Result<u64> {
    let before = rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
    let (ping, pong) = (AtomicU32::new(0), AtomicU32::new(0));
    let wake = |word: &AtomicU32, value| {
        word.store(value, SeqCst);
        futex::wake(word, 1).map_err(|e| IpcError::io("futex(FUTEX_WAKE)", e))
    };
    let wait = |word: &AtomicU32, value| {
        while word.load(SeqCst) != value {
            futex::wait(word, value - 1, None).map_err(|e| IpcError::io("futex(FUTEX_WAIT)", e))?;
        }
        Ok::<_, IpcError>(())
    };
    let median = std::thread::scope(|scope| {
        let echo = scope.spawn(|| {
            pin(Some(there))?;
            for round in 1..=WAKES {
                wait(&ping, round)?;
                wake(&pong, round)?;
            }
            Ok::<_, IpcError>(())
        });
        let mut took = Vec::new();
        pin(Some(here))?;
        for round in 1..=WAKES {
            let began = monotonic_ns();
            wake(&ping, round)?;
            wait(&pong, round)?;
            took.push(monotonic_ns() - began);
        }
        echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        took.sort_unstable();
        Ok::<_, IpcError>(took[took.len() / 2] / 2)
    })?;
    rustix::thread::sched_setaffinity(None, &before)
        .map_err(|e| IpcError::io("sched_setaffinity after measuring", e))?;
    Ok(median)
}

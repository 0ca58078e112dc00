//! Starting the reactors of a server, each a thread on a core of its own, and waiting for their end.

use super::ShutdownHandle;
use super::analyze::{FileDesk, FileSource};
use super::budget::Budget;
use super::control::Control;
use super::core::Core;
use super::crew::{Address, Crew, Inbox, Message};
use super::deferred::{self, Executor};
use super::home::Home;
use super::listener::Listener;
use super::reactor::{self, Reactor, Source};
use super::table::Entry;
use super::watch::{self, Caretaker, Patience, Pulse, Watched};
use crate::config::{Backend, ServerConfig, WaitPolicy};
use crate::error::{IpcError, Result};
use crate::machine::Driver;
use crate::metrics::{Counters, Metrics, MetricsReader, Totals};
use crate::protocol::rendezvous::monotonic_ns;
use doorbell_uring::{Wait, futex};
use rustix::pipe::PipeFlags;
use rustix::thread::CpuSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

/// What all reactors start with.
struct Plan<S: 'static> {
    handlers: &'static [Entry<S>],
    state: Arc<S>,
    config: ServerConfig,
    files: Arc<FileSource>,
    executor: Option<Arc<Executor>>,
    pulses: Vec<Arc<Pulse>>,
    /// Where a reactor's thread says that it may be watched over.
    watched: Sender<Watched>,
    totals: Totals,
    budget: Budget,
    /// What waking a reactor from another core costs, ns; 0 if that cannot happen.
    wake_ns: u64,
    /// Stops home when another reactor has ended.
    shutdown: ShutdownHandle,
}

impl<S> Plan<S> {
    fn core(&self, own: usize, inbox: Inbox) -> Core<S> {
        let totals = Totals { own, ..self.totals.clone() };
        let (state, budget) = (Arc::clone(&self.state), self.budget.clone());
        Core::new(self.handlers, state, self.config.clone(), totals, inbox, budget)
            .executor(self.executor.clone())
            .pulse(Arc::clone(&self.pulses[own]))
    }

    /// Makes the calling thread that of reactor `own`, on its core.
    fn become_reactor(&self, core: Option<usize>, own: usize) -> Result<()> {
        become_reactor(core)?;
        // Where nobody watches nobody listens.
        self.watched.send(Watched::own(own, Arc::clone(&self.pulses[own]))).ok();
        Ok(())
    }

    fn reactor(&self, driver: Driver, crew: Crew, inbox: Inbox, home: Option<Home>) -> Result<Reactor<S>> {
        let totals = Totals { own: crew.own, ..self.totals.clone() };
        let files = FileDesk::new(Arc::clone(&self.files));
        let mut core = self.core(crew.own, inbox);
        if !driver.waits_on_words() {
            core.rung_through(Arc::new(duplicate(&driver)?));
        }
        Ok(Reactor::new(driver, core, crew, totals, home, files, self.wake_ns))
    }
}

/// Who does for the reactors what they do not do themselves.
pub(super) struct Helpers {
    /// Has the files that clients may have read.
    pub files: Arc<FileSource>,
    /// Runs the futures of handlers.
    pub executor: Option<Arc<Executor>>,
    /// Learns where the counters are.
    pub metrics: MetricsReader,
    /// Is told that the reactors are well.
    pub caretaker: Option<Box<dyn Caretaker>>,
    /// Called when all reactors can begin.
    pub ready: Option<Box<dyn FnOnce() + Send>>,
}

/// Runs a server on the calling thread and those of its further reactors.
pub(super) fn serve<S: Send + Sync + 'static>(
    handlers: &'static [Entry<S>],
    state: Arc<S>,
    config: ServerConfig,
    helpers: Helpers,
    listener: Listener,
    control: Control,
    shutdown: ShutdownHandle,
) -> Result<Metrics> {
    let Helpers { files, executor, metrics, caretaker, ready } = helpers;
    let cores = cores(&config)?;
    let pins = reactor_cores(&config)?;
    let reactors = pins.len();
    let polls = config.policy == WaitPolicy::Handoff && config.spin_percent > 0;
    let wake_ns = if polls && cores.len() > 1 { wake_cost(cores[0], cores[1])? } else { 0 };
    if let Err(error) = doorbell_shm::bus::install() {
        tracing::warn!(%error, "a lost page of a session's memory would end the whole server (sigaction(SIGBUS))");
    }
    let (backend, driver) = choose_backend(&config)?;
    let config = ServerConfig { reactors: reactors as u32, backend, ..config };
    let totals = Totals { memory_budget: config.memory_budget, ..Totals::new(0, reactors) };
    metrics.begin(totals.clone());
    let budget = Budget::new(config.memory_budget);
    let pulses = (0..reactors).map(|_| Arc::default()).collect();
    let (watched, to_watch) = channel();
    let plan =
        Plan { handlers, state, config, files, executor, pulses, watched, totals, budget, wake_ns, shutdown };
    tracing::info!(reactors, wake_ns, "starting");
    let before = rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
    let result = std::thread::scope(|scope| {
        // Dropped at the end, which ends the watch.
        let _watch = start_watch(scope, &plan.config, to_watch, caretaker)?;
        let _fails_fast = FailsFast;
        plan.become_reactor(pins[0], 0)?;
        let home = Home::new(listener, control, &plan.config)?;
        let further = Further::start(scope, &plan, &pins[1..])?;
        let (address, inbox) = Address::new(duplicate(&driver)?, pins[0]);
        let addresses: Arc<[Address]> = std::iter::once(address).chain(further.addresses).collect();
        let crew = Crew { own: 0, addresses };
        // Before the others begin: nobody would stop them if it fails.
        let reactor = plan.reactor(driver, crew.clone(), inbox, Some(home))?;
        for (i, start) in further.starts.into_iter().enumerate() {
            // A thread that has ended by now says so when it is joined.
            start.send(Crew { own: i + 1, ..crew.clone() }).ok();
        }
        if let Some(ready) = ready {
            ready();
        }
        if plan.config.thin_executable {
            let_go_of_the_start();
        }
        let result = reactor.run();
        if result.is_err() {
            // Home has had no ring to say good-bye with.
            stop_from_outside(&plan.config, &crew)?;
        }
        join(further.threads, result)
    });
    deferred::set_reactor(false);
    // The calling thread was pinned, with short turns, while it was a reactor's.
    if let Err(error) = doorbell_uring::ask_for_short_turns(0) {
        tracing::info!(%error, "the scheduler's own turns could not be had back");
    }
    rustix::thread::sched_setaffinity(None, &before)
        .map_err(|e| IpcError::io("sched_setaffinity after serving", e))?;
    Ok(Metrics { counters: result?, ..Metrics::of(&plan.totals, None) })
}

/// What the reactors wait with (F38), and the home reactor's driver; says which and why, once.
///
/// The calling thread has to be the home reactor's: it alone may use the driver.
fn choose_backend(config: &ServerConfig) -> Result<(Backend, Driver)> {
    let with = |backend| -> Result<(Backend, Driver)> {
        Ok((backend, reactor::driver(&ServerConfig { backend, ..config.clone() }, true)?))
    };
    if config.backend != Backend::Auto {
        tracing::info!(backend = config.backend.as_str(), "as configured");
        return with(config.backend);
    }
    // What works for a small ring may be refused to one of full size, for want of memory.
    let uring = doorbell_uring::self_test().map_err(IpcError::from).and_then(|_| with(Backend::IoUring));
    match uring {
        Ok(chosen) => {
            tracing::info!(backend = Backend::IoUring.as_str(), "its self-test passes");
            Ok(chosen)
        }
        Err(error) => {
            let backend = Backend::Epoll.as_str();
            tracing::info!(backend, "io_uring cannot be used here: {error}");
            with(Backend::Epoll)
        }
    }
}

/// The reactors beside home.
struct Further<'scope> {
    addresses: Vec<Address>,
    /// Each waits for this before it begins. If it is dropped instead, the start has failed.
    starts: Vec<Sender<Crew>>,
    threads: Vec<ScopedJoinHandle<'scope, Result<Counters>>>,
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
                .spawn_scoped(scope, move || run_further(plan, i + 1, core, &made, &is_started))
                .map_err(|e| IpcError::io("starting the thread of a reactor", e))?;
            match is_made.recv() {
                Ok(address) => further.addresses.push(address),
                // It has ended without a ring: its result says why.
                Err(_) => {
                    let ended = || IpcError::Config("a reactor ended while it started".to_owned());
                    return Err(join(vec![thread], Ok(Counters::default())).err().unwrap_or_else(ended));
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
    own: usize,
    core: Option<usize>,
    made: &Sender<Address>,
    started: &Receiver<Crew>,
) -> Result<Counters> {
    let _fails_fast = FailsFast;
    plan.become_reactor(core, own)?;
    let driver = reactor::driver(&plan.config, false)?;
    let (address, inbox) = Address::new(duplicate(&driver)?, core);
    if made.send(address).is_err() {
        return Ok(Counters::default());
    }
    let Ok(crew) = started.recv() else { return Ok(Counters::default()) };
    let _stops_home = StopsHome(plan.shutdown.clone());
    plan.reactor(driver, crew, inbox, None)?.run()
}

/// Stops the server when a further reactor ends, by a failure or a panic of our own: nobody shall find half of it.
struct StopsHome(ShutdownHandle);

impl Drop for StopsHome {
    fn drop(&mut self) {
        // Home has ended already where this fails.
        self.0.shutdown_now().ok();
    }
}

/// Ends the process when a reactor panics outside of a handler (F47): what all sessions share may be half done, and
/// whoever starts the server again finds it whole.
struct FailsFast;

impl Drop for FailsFast {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a reactor has failed: the server aborts");
            std::process::abort();
        }
    }
}

/// The stack of the thread that watches over reactors, bytes.
const WATCH_STACK: usize = 128 << 10;

/// Starts to watch over the reactors, if anybody wants it; it ends when what is returned is dropped.
fn start_watch<'scope>(
    scope: &'scope Scope<'scope, '_>,
    config: &ServerConfig,
    reactors: Receiver<Watched>,
    caretaker: Option<Box<dyn Caretaker>>,
) -> Result<Option<OwnedFd>> {
    if config.watchdog.is_none() && caretaker.is_none() {
        return Ok(None);
    }
    let patience = Patience { slow: config.slow_handler, most: config.watchdog };
    let (ended, ends) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|e| IpcError::io("pipe for the end of the watch", e))?;
    std::thread::Builder::new()
        .name("watch".to_owned())
        .stack_size(WATCH_STACK)
        .spawn_scoped(scope, move || {
            if let Err(error) = watch::watch(&ended, &reactors, caretaker, patience) {
                tracing::error!(%error, "nobody watches over the reactors any more");
            }
        })
        .map_err(|e| IpcError::io("starting the thread that watches over reactors", e))?;
    Ok(Some(ends))
}

/// Waits for the reactors; the first failure counts.
fn join(threads: Vec<ScopedJoinHandle<'_, Result<Counters>>>, home: Result<Counters>) -> Result<Counters> {
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

/// Tries, and pauses between them, to have a ring that tells the other reactors to stop.
const STOP_TRIES: u32 = 100;
const STOP_PAUSE: Duration = Duration::from_millis(10);

/// Tells the other reactors to stop, over a ring made for that. Ends the process if none can be had: those that have no
/// session would sleep for ever (F47).
fn stop_from_outside(config: &ServerConfig, crew: &Crew) -> Result<()> {
    // All of them first: whoever has sessions looks into its inbox at every sweep.
    let told: Vec<&Address> =
        crew.addresses[1..].iter().filter(|address| address.put(Message::Stop)).collect();
    let mut looks = 0;
    // What the home reactor had comes back with its end, though not at once.
    let mut driver = loop {
        match reactor::driver(config, false) {
            Ok(driver) => break driver,
            Err(_) if looks < STOP_TRIES => looks += 1,
            Err(error) => {
                tracing::error!(%error, "the other reactors cannot be told to stop: the server aborts");
                std::process::abort();
            }
        }
        std::thread::sleep(STOP_PAUSE);
    };
    for address in told {
        driver.msg_ring(address.ring(), 0, Source::Mail.token())?;
    }
    Ok(driver.enter(Wait::No)?)
}

/// From here on the server runs a small part of its code and needs little of what the start has allocated.
fn let_go_of_the_start() {
    match doorbell_uring::thin_executable() {
        Ok(bytes) => tracing::debug!(bytes, "pages of the executable let go of"),
        Err(error) => tracing::info!(%error, "all of the executable stays resident"),
    }
    doorbell_uring::trim_heap();
}

fn duplicate(driver: &Driver) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(driver.as_fd(), 0).map_err(|e| IpcError::io("dup of a reactor's ring", e))
}

/// Where a server of this configuration runs when the calling thread starts it: for each reactor, the home reactor
/// first, the core that it is pinned to.
///
/// # Errors
///
/// [`IpcError::Config`] for a core that may not be used.
pub fn reactor_cores(config: &ServerConfig) -> Result<Vec<Option<usize>>> {
    let cores = cores(config)?;
    let reactors = if config.reactors == 0 { cores.len() } else { config.reactors as usize };
    Ok((0..reactors).map(|i| config.pinned.then(|| cores[i % cores.len()])).collect())
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
    deferred::set_reactor(true);
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
/// Fewest of them, and how long the measurement may take once there are as many, ns: on a busy machine a wake takes
/// milliseconds, and whoever waits for the server's start would wait for all of them.
const WAKES_MIN: usize = 3;
const WAKES_TIME_NS: u64 = 4_000_000;
/// No round has this number: it tells the other side that there will be no further one.
const GIVEN_UP: u32 = u32::MAX;

/// What it takes until a thread that sleeps on core `there` runs, woken from core `here`, ns: the median of some
/// round trips, halved. The server measures this when it starts; `here` and `there` may be the same.
///
/// Cost:   one or two milliseconds, during which the calling thread is pinned to `here`.
///
/// # Errors
///
/// [`IpcError::Io`] if the kernel refuses to pin a thread (a core that may not be used), or the futexes.
pub fn wake_cost(here: usize, there: usize) -> Result<u64> {
    let before = rustix::thread::sched_getaffinity(None).map_err(|e| IpcError::io("sched_getaffinity", e))?;
    let (ping, pong) = (AtomicU32::new(0), AtomicU32::new(0));
    let median = std::thread::scope(|scope| {
        let echo = std::thread::Builder::new()
            .spawn_scoped(scope, || releasing(&pong, || answer_wakes(there, &ping, &pong)))
            .map_err(|e| IpcError::io("starting a thread that is woken", e))?;
        let took = releasing(&ping, || time_wakes(here, &ping, &pong));
        // Where it has given up, it knows why.
        echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let mut took = took?;
        took.sort_unstable();
        Ok::<_, IpcError>(took[took.len() / 2] / 2)
    });
    let restored = rustix::thread::sched_setaffinity(None, &before);
    let median = median?;
    restored.map_err(|e| IpcError::io("sched_setaffinity after measuring", e))?;
    Ok(median)
}

/// Does one side's part; if that fails, the other side is not left waiting for `word`.
fn releasing<T>(word: &AtomicU32, part: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = part();
    if result.is_err() {
        wake(word, GIVEN_UP)?;
    }
    result
}

fn time_wakes(here: usize, ping: &AtomicU32, pong: &AtomicU32) -> Result<Vec<u64>> {
    pin(Some(here))?;
    let mut took = Vec::new();
    let enough_ns = monotonic_ns() + WAKES_TIME_NS;
    for round in 1..=WAKES {
        let began = monotonic_ns();
        wake(ping, round)?;
        if !wait(pong, round)? {
            break;
        }
        let now = monotonic_ns();
        took.push(now - began);
        if took.len() >= WAKES_MIN && now >= enough_ns {
            wake(ping, GIVEN_UP)?;
            break;
        }
    }
    Ok(took)
}

fn answer_wakes(there: usize, ping: &AtomicU32, pong: &AtomicU32) -> Result<()> {
    pin(Some(there))?;
    for round in 1..=WAKES {
        if !wait(ping, round)? {
            break;
        }
        wake(pong, round)?;
    }
    Ok(())
}

fn wake(word: &AtomicU32, value: u32) -> Result<()> {
    word.store(value, SeqCst);
    futex::wake(word, 1).map(|_| ()).map_err(|e| IpcError::io("futex(FUTEX_WAKE)", e))
}

/// Sleeps until `word` holds `value`; `false` if the other side has given up.
fn wait(word: &AtomicU32, value: u32) -> Result<bool> {
    loop {
        match word.load(SeqCst) {
            GIVEN_UP => return Ok(false),
            now if now == value => return Ok(true),
            now => futex::wait(word, now, None).map_err(|e| IpcError::io("futex(FUTEX_WAIT)", e))?,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    /// Goal:   whichever side may not be pinned, the measurement ends with the reason and does not hang, and the
    ///         calling thread has its cores back.
    /// Method: a core that no machine has, on either side.
    #[test]
    fn measuring_a_wake_on_a_core_that_may_not_be_used_ends_with_the_reason() {
        let affinity = || rustix::thread::sched_getaffinity(None).unwrap();
        let before = affinity();
        let ours = doorbell_uring::current_cpu() as usize;
        let none = CpuSet::MAX_CPU - 1;
        for (here, there) in [(ours, none), (none, ours)] {
            let error = wake_cost(here, there).unwrap_err();
            let refused =
                |source: &std::io::Error| source.raw_os_error() == Some(Errno::INVAL.raw_os_error());
            assert!(matches!(&error, IpcError::Io { source, .. } if refused(source)), "{error}");
            assert_eq!(affinity(), before);
        }
    }

    /// Goal: a wake on the own core takes some time, and less than a second.
    #[test]
    fn a_wake_on_the_same_core_can_be_measured() {
        let core = cores(&ServerConfig::default()).unwrap()[0];
        let ns = wake_cost(core, core).unwrap();
        assert!((1..1_000_000_000).contains(&ns), "{ns}");
    }

    /// Goal:   reactors go round the cores that may be used, one on each unless told otherwise.
    #[test]
    fn r1_3_each_reactor_has_a_core_of_its_own_unless_told_otherwise() {
        let allowed = cores(&ServerConfig::default()).unwrap();
        let pins: Vec<Option<usize>> = allowed.iter().copied().map(Some).collect();
        assert_eq!(reactor_cores(&ServerConfig::default()).unwrap(), pins);
        let two = ServerConfig { reactors: 2, cores: vec![allowed[0]], ..ServerConfig::default() };
        assert_eq!(reactor_cores(&two).unwrap(), [Some(allowed[0]); 2]);
        let unpinned = ServerConfig { pinned: false, ..two };
        assert_eq!(reactor_cores(&unpinned).unwrap(), [None, None]);
    }
}

//! A server in a simulation: its reactors, stepped one by one where the simulated kernel answers them, and what they
//! believe compared with what there is.

use super::analyze::{FileDesk, FileSource};
use super::budget::Budget;
use super::control::{Control, ShutdownHandle};
use super::core::Core;
use super::crew::{Address, Crew};
use super::home::Home;
use super::listener::Listener;
use super::reactor::{Pace, Reactor};
use super::simulation::audit;
use super::table::Entry;
use crate::config::ServerConfig;
use crate::error::Result;
use crate::machine::Driver;
use crate::metrics::{Counters, Totals};
use crate::protocol::handshake::Hello;
use crate::simulation::driver::Simulated;
use crate::simulation::kernel::{with, with_kernel};
use doorbell_uring::Wait;
use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use zerocopy::IntoBytes;

/// One reactor.
struct Node<S: 'static> {
    number: usize,
    /// `None` once it has come to its end.
    reactor: Option<Reactor<S>>,
    pace: Pace,
    asleep: bool,
}

/// A server.
pub(crate) struct Server<S: 'static> {
    nodes: Vec<RefCell<Node<S>>>,
    budget: Budget,
    /// What the budget held before the first session.
    unused: u64,
    shutdown: ShutdownHandle,
    /// What ended reactors have counted.
    counted: RefCell<Counters>,
}

impl<S: Send + Sync + 'static> Server<S> {
    /// A server of so many reactors, each on the core of its number.
    pub fn start(
        handlers: &'static [Entry<S>],
        state: &Arc<S>,
        config: &ServerConfig,
        by_words: bool,
    ) -> Self {
        Self::try_start(handlers, state, config, by_words).expect("a simulated server starts")
    }

    fn try_start(
        handlers: &'static [Entry<S>],
        state: &Arc<S>,
        config: &ServerConfig,
        by_words: bool,
    ) -> Result<Self> {
        let reactors = config.reactors as usize;
        let drivers: Vec<Simulated> = (0..reactors).map(|_| Simulated::new(by_words)).collect();
        let numbers: Vec<usize> = drivers.iter().map(Simulated::node).collect();
        let drivers: Vec<Driver> = drivers.into_iter().map(Driver::Simulated).collect();
        let clone = |driver: &Driver| driver.as_fd().try_clone_to_owned().expect("descriptors enough");
        // Mail is addressed to the descriptor that the kernel knows.
        let mut inboxes = Vec::new();
        let addresses: Arc<[Address]> = drivers
            .iter()
            .enumerate()
            .map(|(core, driver)| {
                let mailbox = clone(driver);
                with_kernel(|kernel| kernel.move_mailbox(numbers[core], mailbox.as_fd()));
                let (address, inbox) = Address::new(mailbox, Some(core));
                inboxes.push(inbox);
                address
            })
            .collect();
        let totals = Totals { memory_budget: config.memory_budget, ..Totals::new(0, reactors) };
        let budget = Budget::new(config.memory_budget);
        let unused = budget.used();
        let (control, shutdown, _) = Control::new()?;
        let mut home = Some(Home::new(Listener::nowhere()?, control, config)?);
        let files = Arc::new(FileSource::open(config)?);
        let mut nodes = Vec::new();
        for (own, (driver, inbox)) in drivers.into_iter().zip(inboxes).enumerate() {
            let totals = Totals { own, ..totals.clone() };
            let crew = Crew { own, addresses: Arc::clone(&addresses) };
            let mut core =
                Core::new(handlers, Arc::clone(state), config.clone(), totals.clone(), inbox, budget.clone());
            if !by_words {
                core.rung_through(Arc::new(clone(&driver)));
            }
            let desk = FileDesk::new(Arc::clone(&files));
            let mut reactor = Reactor::new(driver, core, crew, totals, home.take(), desk, 0);
            reactor.begin()?;
            let number = numbers[own];
            nodes.push(RefCell::new(Node {
                number,
                reactor: Some(reactor),
                pace: Pace::default(),
                asleep: false,
            }));
        }
        Ok(Self { nodes, budget, unused, shutdown, counted: RefCell::default() })
    }

    /// Reactors.
    pub fn reactors(&self) -> usize {
        self.nodes.len()
    }

    /// One step of a reactor, if it is awake or something has come for it; whether it did anything.
    pub fn step(&self, at: usize) -> bool {
        let Ok(mut node) = self.nodes[at].try_borrow_mut() else { return false };
        node.step(&self.counted)
    }

    /// Says hello for a client at the other end of `socket`, of a process that ends when `process` becomes readable.
    /// `false` if the home reactor is busy, or no more.
    pub fn greet(&self, socket: OwnedFd, process: OwnedFd, hello: &Hello) -> bool {
        let Ok(mut node) = self.nodes[0].try_borrow_mut() else { return false };
        let node = &mut *node;
        let Some(reactor) = node.reactor.as_mut() else { return false };
        let hello = hello.as_bytes();
        let done = reactor.with_home(|home, reactor| home.answer(reactor, socket, process, Some(hello)));
        done.expect("a handshake that fails concerns one client");
        // As if it had been woken by its listener.
        node.asleep = false;
        true
    }

    /// Some session's next pages are refused.
    pub fn refuse_pages(&self, which: usize) {
        let Ok(mut node) = self.nodes[which % self.nodes.len()].try_borrow_mut() else { return };
        if let Some(reactor) = &mut node.reactor
            && let Some(lane) = reactor.core.seated(which as u32)
        {
            lane.segment().refuse_pages();
        }
    }

    /// Asks it to finish what is under way and to end.
    pub fn shut_down(&self, at_once: bool) {
        let told = if at_once { self.shutdown.shutdown_now() } else { self.shutdown.shutdown() };
        // It has ended already.
        told.ok();
    }

    /// Whether all its reactors have ended.
    pub fn has_ended(&self) -> bool {
        self.nodes.iter().all(|node| node.try_borrow().is_ok_and(|node| node.reactor.is_none()))
    }

    /// Compares what the reactors believe with what there is.
    pub fn check(&self) {
        for node in &self.nodes {
            if let Ok(mut node) = node.try_borrow_mut()
                && let Some(reactor) = &mut node.reactor
            {
                audit(&mut reactor.core);
            }
        }
    }

    /// Why something is left of sessions and calls, if anything is.
    pub fn leftovers(&self) -> Option<String> {
        for (at, node) in self.nodes.iter().enumerate() {
            let mut node = node.borrow_mut();
            let Some(reactor) = &mut node.reactor else { continue };
            let core = &mut reactor.core;
            let (lanes, exchanges, bodies) = (core.live(), core.exchanges().live(), core.body_bytes());
            let tickets = (core.tickets().attached(), core.tickets().detached());
            let (connections, leased) = (core.connections_open(), core.metrics.leased_bytes);
            let left = (lanes, exchanges, bodies, tickets, connections, leased, core.leases.len());
            if left != (0, 0, 0, (0, 0), 0, 0, 0) {
                return Some(format!(
                    "reactor {at}: lanes, exchanges, body bytes, tickets, connections, leased, waiting: {left:?}"
                ));
            }
        }
        let (used, waiting) = (self.budget.used(), self.budget.waiting());
        (used != self.unused || waiting != 0)
            .then(|| format!("budget: {used} used, {} unused, {waiting} waiting", self.unused))
    }

    /// What its reactors have counted.
    pub fn counted(&self) -> Counters {
        let mut sum = self.counted.borrow().clone();
        for node in &self.nodes {
            if let Some(reactor) = &node.borrow().reactor {
                sum.add(&reactor.core.metrics);
            }
        }
        sum
    }
}

impl<S: 'static> Node<S> {
    fn step(&mut self, counted: &RefCell<Counters>) -> bool {
        let Some(reactor) = &mut self.reactor else { return false };
        if self.asleep {
            if !with_kernel(|kernel| kernel.has_come(self.number)) {
                return false;
            }
            self.asleep = false;
            reactor.driver.enter(Wait::No).expect("the kernel answers");
            reactor.get_up().expect("a reactor goes on whatever its clients do");
            return true;
        }
        if reactor.stopping {
            reactor.drain().expect("a reactor drains");
            if let Some(reactor) = self.reactor.take() {
                counted.borrow_mut().add(&reactor.stop().expect("a reactor stops"));
            }
            with_kernel(|kernel| kernel.forget_node(self.number));
            return true;
        }
        let sleeps = reactor.step(&mut self.pace).expect("a reactor goes on whatever its clients do");
        self.asleep = sleeps && reactor.lie_down().expect("a reactor goes on whatever its clients do");
        true
    }
}

impl<S: 'static> Drop for Node<S> {
    /// As its process is killed.
    fn drop(&mut self) {
        with(|kernel| kernel.forget_node(self.number));
    }
}

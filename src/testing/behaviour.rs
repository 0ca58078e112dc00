//! What handlers do on demand instead of answering at once.

use crate::server::HandlerError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the calls of a server are to suffer. Shared by its clones: a test keeps one and gives another to the handlers, whose
/// [`Context::state`](crate::Context::state) has it; they [pass](Behaviour::pass) it before anything else.
///
/// A handler that waits here holds up its reactor, as any handler does that waits; and a [`TestServer`](super::TestServer)
/// stops only once its calls go on.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Orders {
    delay: Duration,
    failures: u64,
    hangs: bool,
    /// Calls that have come here, and that wait here.
    entered: u64,
    waiting: u64,
}

impl Behaviour {
    /// Every call takes so much longer from here on.
    pub fn delay(&self, delay: Duration) {
        self.orders().delay = delay;
        self.shared.changed.notify_all();
    }

    /// So many of the next calls fail.
    pub fn fail(&self, calls: u64) {
        self.orders().failures = calls;
    }

    /// Calls hang from here on, until [`Behaviour::go_on`].
    pub fn hang(&self) {
        self.orders().hangs = true;
    }

    /// Calls hang no more; those that do go on.
    pub fn go_on(&self) {
        self.orders().hangs = false;
        self.shared.changed.notify_all();
    }

    /// Calls that have come to [`Behaviour::pass`] so far.
    pub fn entered(&self) -> u64 {
        self.orders().entered
    }

    /// Waits until so many calls wait in [`Behaviour::pass`], because they hang or are delayed; `false` if that takes
    /// longer than `patience`.
    pub fn wait_until_waiting(&self, calls: u64, patience: Duration) -> bool {
        let orders = self.orders();
        let enough =
            self.shared.changed.wait_timeout_while(orders, patience, |orders| orders.waiting < calls);
        enough.unwrap_or_else(PoisonError::into_inner).0.waiting >= calls
    }

    /// What a handler does first: suffers what the test has ordered.
    ///
    /// # Errors
    ///
    /// [`HandlerError`] if this call is to fail; the handler returns it.
    pub fn pass(&self) -> Result<(), HandlerError> {
        let mut orders = self.orders();
        orders.entered += 1;
        if orders.failures > 0 {
            orders.failures -= 1;
            return Err(HandlerError::Failed("the test wants this call to fail".to_owned()));
        }
        orders.waiting += 1;
        self.shared.changed.notify_all();
        let begun = Instant::now();
        loop {
            let left = orders.delay.saturating_sub(begun.elapsed());
            if !orders.hangs && left.is_zero() {
                break;
            }
            let rest = if orders.hangs { Duration::from_secs(3600) } else { left };
            orders = self.shared.changed.wait_timeout(orders, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        orders.waiting -= 1;
        Ok(())
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.shared.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

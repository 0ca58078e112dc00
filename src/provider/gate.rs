//! So many at once, so many waiting, no more.

use super::ProviderError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Places of a provider or of a pool. Who waits gets one in the order of coming.
#[derive(Debug)]
pub(super) struct Gate {
    whom: String,
    places: Arc<Semaphore>,
    waiting: AtomicUsize,
    waiting_max: usize,
}

/// A place; dropped, it is the next one's.
pub(super) type Permit = OwnedSemaphorePermit;

impl Gate {
    pub fn new(whom: String, places: usize, waiting_max: usize) -> Self {
        let places = places.min(Semaphore::MAX_PERMITS);
        Self { whom, places: Arc::new(Semaphore::new(places)), waiting: AtomicUsize::new(0), waiting_max }
    }

    /// A place, as soon as there is one.
    pub async fn enter(&self) -> Result<Permit, ProviderError> {
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(permit);
        }
        let _queued = self.queue()?;
        // The semaphore is never closed; were it, nobody would be let in any more.
        Arc::clone(&self.places).acquire_owned().await.map_err(|_closed| ProviderError::Stopped)
    }

    fn queue(&self) -> Result<Queued<'_>, ProviderError> {
        let waiting = self.waiting.fetch_add(1, Relaxed);
        let queued = Queued(&self.waiting);
        if waiting >= self.waiting_max {
            return Err(ProviderError::Overloaded { whom: self.whom.clone(), waiting });
        }
        Ok(queued)
    }
}

/// Counts one as waiting for as long as it lives.
struct Queued<'a>(&'a AtomicUsize);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

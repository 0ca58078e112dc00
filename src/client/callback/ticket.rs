//! A call of a callback client, from when it is taken until it has been called back.

use super::{Shared, StreamEvent};
use crate::error::{IpcError, Result};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is called back.
pub(super) enum Callback {
    Answer(Box<dyn FnOnce(Result<Vec<u8>>) + Send>),
    Stream(Box<dyn FnMut(StreamEvent) + Send>),
}

/// A call that is to be called back. If it is dropped before, it calls back itself.
pub(super) struct Ticket {
    /// `None` once it has been called for the last time, and while it is being called.
    callback: Mutex<Option<Callback>>,
    /// Set by whoever does not want the answer any more.
    cancel: Arc<AtomicBool>,
    /// Frames on their way.
    frames: AtomicUsize,
    shared: Arc<Shared>,
}

impl Ticket {
    /// `None` if too many are waiting.
    pub fn issue(shared: &Arc<Shared>, callback: Callback) -> Option<Arc<Self>> {
        let one_more = |pending| (pending < shared.pending_max).then_some(pending + 1);
        shared.pending.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        Some(Arc::new(Self {
            callback: Mutex::new(Some(callback)),
            cancel: Arc::new(AtomicBool::new(false)),
            frames: AtomicUsize::new(0),
            shared: Arc::clone(shared),
        }))
    }

    pub fn cancel(&self) -> &Arc<AtomicBool> {
        &self.cancel
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(SeqCst)
    }

    /// Frames that are on their way to the caller.
    pub fn frames(&self) -> usize {
        self.frames.load(SeqCst)
    }

    /// It was never taken: nothing is called.
    pub fn withdraw(&self) {
        if self.callback().take().is_some() {
            self.shared.pending.fetch_sub(1, SeqCst);
        }
    }

    fn callback(&self) -> MutexGuard<'_, Option<Callback>> {
        self.callback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out a frame.
    fn frame(&self, bytes: Vec<u8>) {
        let callback = self.callback().take_if(|_| !self.is_cancelled());
        if let Some(Callback::Stream(mut on_event)) = callback {
            if self.contain(|| on_event(StreamEvent::Frame(bytes))) {
                *self.callback() = Some(Callback::Stream(on_event));
            } else {
                // It is dropped, and so is the rest of the stream.
                self.contain(|| drop(on_event));
                self.shared.pending.fetch_sub(1, SeqCst);
                self.cancel.store(true, SeqCst);
                self.shared.cancelled.store(true, SeqCst);
                self.shared.bell.ring();
            }
        }
    }

    /// Hands out the end.
    fn end(&self, result: Result<Vec<u8>>) {
        let Some(callback) = self.callback().take() else { return };
        // From here on there is nothing to cancel.
        self.cancel.store(true, SeqCst);
        self.contain(|| match callback {
            Callback::Answer(answered) => answered(result),
            Callback::Stream(mut on_event) => on_event(StreamEvent::End(result.map(drop))),
        });
        self.shared.pending.fetch_sub(1, SeqCst);
    }

    /// Runs what is the caller's; `false` if it panicked, which goes no further.
    fn contain(&self, run: impl FnOnce()) -> bool {
        let result = catch_unwind(AssertUnwindSafe(run));
        if result.is_err() {
            self.shared.panics.fetch_add(1, SeqCst);
            tracing::error!("a callback has panicked; its call is over");
        }
        result.is_ok()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.end(Err(self.shared.why_broken()));
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("cancel", &self.cancel)
            .field("frames", &self.frames)
            .finish_non_exhaustive()
    }
}

/// Something to be called back with.
#[derive(Debug)]
pub(super) struct Delivery {
    ticket: Arc<Ticket>,
    what: What,
}

#[derive(Debug)]
enum What {
    Frame(Vec<u8>),
    End(Result<Vec<u8>>),
}

impl Delivery {
    pub fn frame(ticket: Arc<Ticket>, bytes: Vec<u8>) -> Self {
        ticket.frames.fetch_add(1, SeqCst);
        Self { ticket, what: What::Frame(bytes) }
    }

    /// Of a stream, the bytes are none.
    pub fn end(ticket: Arc<Ticket>, result: Result<Vec<u8>>) -> Self {
        Self { ticket, what: What::End(result) }
    }

    /// Calls back.
    pub fn run(self) {
        match self.what {
            What::Frame(bytes) => {
                self.ticket.frame(bytes);
                self.ticket.frames.fetch_sub(1, SeqCst);
                if self.ticket.shared.polled {
                    // The thread may have another one.
                    self.ticket.shared.bell.ring();
                }
            }
            // A call that was cancelled in time has no other answer, even if that is on its way.
            What::End(Ok(_)) if self.ticket.is_cancelled() => self.ticket.end(Err(IpcError::Cancelled)),
            What::End(result) => self.ticket.end(result),
        }
    }
}

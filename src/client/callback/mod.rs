//! The client of threads that must not be held up, such as the one that draws an editor: calls are answered by
//! callback.
//!
//! Shape:   the caller puts a call into a queue and rings; a thread of the client's own has the session, waits on its
//!          socket and on that bell, and calls back, or leaves that to the caller (`poll_events`).
//! Bound:   calls that have not been called back are counted, and no more than so many are taken; a stream has at most
//!          [`FRAMES_MAX`] frames on their way to a caller who polls, the others stay where the server put them (R1.9).
//! Promise: every call that was taken is called back exactly once with its end, whatever happens.

mod ticket;
mod worker;

use super::call::CallOptions;
use super::connect::ClientConfig;
use super::mux::Broken;
use super::reconnect::{Address, LinkOptions};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use doorbell_shm::fork::Birthplace;
use doorbell_uring::current_cpu;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use ticket::{Callback, Delivery, Ticket};
use worker::{Command, Worker};

/// Frames of one stream that are on their way to a caller who polls.
const FRAMES_MAX: usize = 4;

/// What a callback client asks for.
#[derive(Debug, Clone)]
pub struct CallbackConfig {
    /// Slots and rings of its session. The policy is always to sleep: whoever waits is no thread of the caller's.
    pub client: ClientConfig,
    /// Calls that may be waiting for their callback at once; beyond that [`IpcError::WouldBlock`].
    pub pending_max: usize,
    /// Callbacks run inside [`CallbackClient::poll_events`] rather than on the client's thread.
    pub polled: bool,
    /// Codec and priority of its connection, and whether another session follows when one is over. What then becomes of
    /// which call is told of [`ReconnectingClient`](super::ReconnectingClient); calls can be made while there is none.
    pub link: LinkOptions,
}

impl Default for CallbackConfig {
    /// 256 calls at once, called back on the client's thread.
    fn default() -> Self {
        Self {
            client: ClientConfig::for_tasks(),
            pending_max: 256,
            polled: false,
            link: LinkOptions::default(),
        }
    }
}

/// What comes of a stream.
#[derive(Debug)]
pub enum StreamEvent {
    /// The next bytes of the answer.
    Frame(Vec<u8>),
    /// The answer is complete, or this is why it is not. Comes once, and nothing after it.
    End(Result<()>),
}

/// A client that never holds up its caller: calls go into a queue and are answered by callback, from a thread of the
/// client's own or whenever the caller asks for events. It can be shared by threads.
///
/// No work of the server's is brought to the caller's core: calls go to a reactor of another core than the one they are
/// made on, where there is one, as soon as none of this client's calls is in flight elsewhere.
///
/// A callback that panics is caught, logged and [counted](CallbackClient::panics); its stream is cancelled. Dropping
/// the client answers what is outstanding with [`IpcError::ClientClosed`], from its thread, and waits for nothing.
///
/// ```no_run
/// use doorbell::{CallbackClient, MessageType};
///
/// # fn main() -> doorbell::Result<()> {
/// let client = CallbackClient::connect(doorbell::default_socket_path())?;
/// let call = client.call(MessageType::ECHO, b"hello".to_vec(), |answer| println!("{answer:?}"))?;
/// call.detach(); // Dropping it would cancel the call.
/// # client.close();
/// # Ok(())
/// # }
/// ```
pub struct CallbackClient {
    shared: Arc<Shared>,
    commands: Mutex<Sender<Command>>,
    /// Of a client that is polled.
    deliveries: Option<Mutex<Receiver<Delivery>>>,
    thread: Option<JoinHandle<()>>,
}

/// What caller and thread share beside the queues.
#[derive(Debug)]
struct Shared {
    /// Rung for the thread.
    bell: Bell,
    /// Rung for a caller who polls.
    events: Bell,
    /// A call has been cancelled and the thread has not looked which.
    cancelled: AtomicBool,
    closing: AtomicBool,
    pending: AtomicUsize,
    pending_max: usize,
    /// Callbacks run where the caller polls.
    polled: bool,
    panics: AtomicU64,
    /// Somebody runs callbacks in `poll_events`.
    polling: AtomicBool,
    broken: OnceLock<Broken>,
    /// A fork of this process has no thread of the client's.
    birthplace: Birthplace,
}

impl Shared {
    fn why_broken(&self) -> IpcError {
        self.broken.get().map_or(IpcError::ClientClosed, Broken::error)
    }
}

/// A descriptor that is readable from when it is rung until it is heard.
#[derive(Debug)]
struct Bell {
    descriptor: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    fn new() -> Result<Self> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| IpcError::io("eventfd of a callback client", e))?;
        Ok(Self { descriptor, rung: AtomicBool::new(false) })
    }

    /// Rings, unless that has been done; what was written before is seen by whoever hears it.
    fn ring(&self) {
        if !self.rung.swap(true, SeqCst)
            && let Err(error) = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes())
        {
            tracing::error!(%error, "a callback client cannot ring its bell");
        }
    }

    /// Whoever hears looks afterwards at what was rung for.
    fn hear(&self) {
        let mut count = [0; 8];
        match rustix::io::read(&self.descriptor, &mut count) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "a callback client cannot hear its bell"),
        }
        self.rung.store(false, SeqCst);
    }
}

impl CallbackClient {
    /// Connects to the server at `path`. Waits for that: not to be done on a thread that must not wait, which uses
    /// [`CallbackClient::begin`].
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect`](super::IpcClient::connect).
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(path, &CallbackConfig::default())
    }

    /// Connects with a configuration of the caller's.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`](super::IpcClient::connect_with).
    pub fn connect_with(path: impl AsRef<Path>, config: &CallbackConfig) -> Result<Self> {
        let (tell, told) = channel();
        let client = Self::start(path.as_ref(), config, Some(tell))?;
        // A thread that says nothing has ended.
        told.recv().unwrap_or(Err(IpcError::ClientClosed))?;
        Ok(client)
    }

    /// Begins to connect, and returns at once. Calls can be made meanwhile; if connecting fails, that is their answer.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses a thread or a descriptor.
    pub fn begin(path: impl AsRef<Path>, config: &CallbackConfig) -> Result<Self> {
        Self::start(path.as_ref(), config, None)
    }

    fn start(path: &Path, config: &CallbackConfig, tell: Option<Sender<Result<()>>>) -> Result<Self> {
        let shared = Arc::new(Shared {
            bell: Bell::new()?,
            events: Bell::new()?,
            cancelled: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            pending: AtomicUsize::new(0),
            pending_max: config.pending_max,
            polled: config.polled,
            panics: AtomicU64::new(0),
            polling: AtomicBool::new(false),
            broken: OnceLock::new(),
            birthplace: Birthplace::here()?,
        });
        let (commands, incoming) = channel();
        let (outgoing, deliveries) = channel();
        let outgoing = config.polled.then_some(outgoing);
        let client = ClientConfig { policy: WaitPolicy::Block, ..config.client.clone() };
        let (address, link) = (Address::new(path.to_owned(), client)?, config.link.clone());
        let worker = Worker::new(Arc::clone(&shared), incoming, outgoing);
        let thread = std::thread::Builder::new()
            .name("doorbell-client".to_owned())
            .spawn(move || worker.run(address, &link, tell.as_ref()))
            .map_err(|e| IpcError::io("starting the thread of a callback client", e))?;
        let deliveries = config.polled.then(|| Mutex::new(deliveries));
        Ok(Self { shared, commands: Mutex::new(commands), deliveries, thread: Some(thread) })
    }

    /// Sends `request`; `answered` is called exactly once with the answer, or with why there is none. Returns at once.
    ///
    /// # Errors
    ///
    /// [`IpcError::WouldBlock`] while [`CallbackConfig::pending_max`] calls are waiting for their callback, or what
    /// became of the session: nothing was sent, and `answered` is not called.
    pub fn call(
        &self,
        message_type: MessageType,
        request: Vec<u8>,
        answered: impl FnOnce(Result<Vec<u8>>) + Send + 'static,
    ) -> Result<CallHandle> {
        self.call_with(message_type, request, &CallOptions::default(), answered)
    }

    /// As [`CallbackClient::call`], with options; [`CallOptions::tag`] and [`CallOptions::pieces`] mean nothing here.
    ///
    /// # Errors
    ///
    /// As for [`CallbackClient::call`].
    pub fn call_with(
        &self,
        message_type: MessageType,
        request: Vec<u8>,
        options: &CallOptions,
        answered: impl FnOnce(Result<Vec<u8>>) + Send + 'static,
    ) -> Result<CallHandle> {
        let options = CallOptions { pieces: false, ..*options };
        self.submit(message_type, request, options, Callback::Answer(Box::new(answered)))
    }

    /// Sends `request`; `on_event` is called with each frame of the answer as it comes, and exactly once, at last, with
    /// its end. Returns at once. The server sends more as calls of `on_event` return.
    ///
    /// # Errors
    ///
    /// As for [`CallbackClient::call`].
    pub fn stream(
        &self,
        message_type: MessageType,
        request: Vec<u8>,
        on_event: impl FnMut(StreamEvent) + Send + 'static,
    ) -> Result<CallHandle> {
        self.stream_with(message_type, request, &CallOptions::default(), on_event)
    }

    /// As [`CallbackClient::stream`], with options; [`CallOptions::timeout`] bounds each wait for a frame.
    ///
    /// # Errors
    ///
    /// As for [`CallbackClient::call`].
    pub fn stream_with(
        &self,
        message_type: MessageType,
        request: Vec<u8>,
        options: &CallOptions,
        on_event: impl FnMut(StreamEvent) + Send + 'static,
    ) -> Result<CallHandle> {
        let options = CallOptions { pieces: true, ..*options };
        self.submit(message_type, request, options, Callback::Stream(Box::new(on_event)))
    }

    fn submit(
        &self,
        message_type: MessageType,
        request: Vec<u8>,
        options: CallOptions,
        callback: Callback,
    ) -> Result<CallHandle> {
        if !self.shared.birthplace.is_here() {
            return Err(IpcError::ForkedClient);
        }
        if self.shared.broken.get().is_some() {
            return Err(self.shared.why_broken());
        }
        let ticket = Ticket::issue(&self.shared, callback).ok_or(IpcError::WouldBlock)?;
        let handle = CallHandle { cancel: Arc::clone(ticket.cancel()), shared: Arc::clone(&self.shared) };
        let due = options.timeout.and_then(|limit| Instant::now().checked_add(limit));
        let start = options.deadline.and_then(|limit| Instant::now().checked_add(limit));
        let command = Command { ticket, message_type, request, options, core: current_cpu(), due, start };
        // Held for as long as it takes to append to a list.
        let sent = self.commands.lock().unwrap_or_else(PoisonError::into_inner).send(command);
        if let Err(unsent) = sent {
            unsent.0.ticket.withdraw();
            return Err(self.shared.why_broken());
        }
        self.shared.bell.ring();
        Ok(handle)
    }

    /// Runs the callbacks that are due on the calling thread, `most` of them at most; returns how many that were. There
    /// are none of a client that is not [polled](CallbackConfig::polled), inside a callback, and while another thread
    /// polls. Does not wait: the client's descriptor ([`AsFd`]) is readable while there are some.
    pub fn poll_events(&self, most: usize) -> usize {
        let Some(deliveries) = &self.deliveries else { return 0 };
        if self.shared.polling.swap(true, SeqCst) {
            return 0;
        }
        self.shared.events.hear();
        let mut done = 0;
        while done < most {
            let next = deliveries.lock().unwrap_or_else(PoisonError::into_inner).try_recv();
            match next {
                Ok(delivery) => delivery.run(),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
            done += 1;
        }
        if done == most {
            // There may be more.
            self.shared.events.ring();
        }
        self.shared.polling.store(false, SeqCst);
        done
    }

    /// Calls that have not been called back.
    pub fn pending(&self) -> usize {
        self.shared.pending.load(SeqCst)
    }

    /// Callbacks that have panicked.
    pub fn panics(&self) -> u64 {
        self.shared.panics.load(SeqCst)
    }

    /// Answers what is outstanding with [`IpcError::ClientClosed`], and waits until that has been done; inside a
    /// callback it does not wait.
    pub fn close(mut self) {
        // In a fork there is none to wait for.
        let thread = if self.shared.birthplace.is_here() { self.thread.take() } else { None };
        drop(self);
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id())
            && thread.join().is_err()
        {
            tracing::error!("the thread of a callback client has panicked");
        }
    }
}

impl Drop for CallbackClient {
    fn drop(&mut self) {
        if !self.shared.birthplace.is_here() {
            // The thread is not there to be let go of, and the bell is the parent's, too.
            std::mem::forget(self.thread.take());
            return;
        }
        self.shared.closing.store(true, SeqCst);
        self.shared.bell.ring();
    }
}

/// Readable while [`CallbackClient::poll_events`] has callbacks to run; not to be read from.
impl AsFd for CallbackClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.events.descriptor.as_fd()
    }
}

impl fmt::Debug for CallbackClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallbackClient").field("shared", &self.shared).finish_non_exhaustive()
    }
}

/// A call that was submitted to a [`CallbackClient`]. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping it cancels the call: keep it, or `detach` it"]
pub struct CallHandle {
    cancel: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl CallHandle {
    /// Says that the answer is not wanted: the call is answered [`IpcError::Cancelled`], unless its answer came first.
    /// No further frames are handed out, but one that is being handed out on another thread.
    pub fn cancel(&self) {
        if !self.cancel.swap(true, SeqCst) {
            self.shared.cancelled.store(true, SeqCst);
            self.shared.bell.ring();
        }
    }

    /// Lets the call go on without this.
    pub fn detach(self) {
        // What remains is to let go of the two references; the cancel is what `drop` would do beside that.
        let mut this = self;
        this.cancel = Arc::new(AtomicBool::new(true));
    }
}

impl Drop for CallHandle {
    fn drop(&mut self) {
        self.cancel();
    }
}

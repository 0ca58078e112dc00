//! The client of programs that run on tokio: any number of tasks on one session, which waits on one descriptor.
//!
//! Shape:   a task that calls writes its request right into the rings, under a lock that is held for that long; one
//!          task of the client's own, the driver, rings, waits on the session's socket, and wakes whoever something has
//!          come for. So there is no queue of requests and no thread, and what several tasks submit in a row is rung
//!          for once.
//! Waiting: whoever finds no room waits for it, in the order of coming (R1.9).
//! Wakers:  are woken and dropped only while the lock is free: either may run code of anybody's.

use super::ClientConfig;
use super::call::CallOptions;
use super::mux::{Key, Mux, Next};
use super::reconnect::{Address, Link, LinkOptions, LinkStatus, Reconnect, Search};
use super::stream::Splitter;
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use futures_core::Stream;
use futures_core::stream::FusedStream;
use std::fmt;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Sleep, sleep, sleep_until, timeout, timeout_at};

/// A client for tasks of a tokio runtime: cheap to clone, used by any number of tasks and threads at once, one session
/// for all of them. Calls start in the order in which they are first polled.
///
/// Dropping a call's future, or a stream, cancels that call, whenever that happens. The session ends when all clones
/// and streams are gone, or with the runtime it was connected on, which needs its I/O and time drivers (`enable_all`).
///
/// A call waits while all slots are in use ([`ClientConfig`] says how many there are), and allocates nothing but the
/// answer's bytes. The client waits on its socket whatever [`ClientConfig::policy`] says; the policy says which reactor
/// it uses: under `handoff`, the default, the one of the core that the caller runs on. The first call on a core then asks
/// for a lane there, and waits for that where it is, for 0.1 s at most if the server is stopped; under `block` nothing
/// ever waits but tasks.
///
/// ```no_run
/// # use doorbell::{AsyncClient, MessageType};
/// # async fn example() -> doorbell::Result<()> {
/// let client = AsyncClient::connect(doorbell::default_socket_path()).await?;
/// let answer = client.call(MessageType::ECHO, b"hello").await?;
/// assert_eq!(answer, b"hello");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct AsyncClient {
    owner: Arc<Owner>,
}

impl AsyncClient {
    /// Connects to the server at `path`, with 64 slots of 1 KiB and memory to lease.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect`](super::IpcClient::connect).
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, or if that has no I/O driver.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(path, &ClientConfig::for_tasks()).await
    }

    /// Connects with a configuration of the caller's. As connecting may have to wait for a busy server, it is done on
    /// the runtime's pool for blocking work.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`](super::IpcClient::connect_with).
    ///
    /// # Panics
    ///
    /// As for [`AsyncClient::connect`].
    pub async fn connect_with(path: impl AsRef<Path>, config: &ClientConfig) -> Result<Self> {
        Self::connect_as(path, config, &LinkOptions::default()).await
    }

    /// The same with another codec or priority, or with another session whenever one is over: calls that were not
    /// executed, or are idempotent, then go on in that, and new ones wait for it. What becomes of which is told of
    /// [`ReconnectingClient`](super::ReconnectingClient).
    ///
    /// # Errors
    ///
    /// As for [`AsyncClient::connect_with`].
    ///
    /// # Panics
    ///
    /// As for [`AsyncClient::connect`].
    pub async fn connect_as(
        path: impl AsRef<Path>,
        config: &ClientConfig,
        link: &LinkOptions,
    ) -> Result<Self> {
        let address = Address::new(path.as_ref().to_owned(), config.clone())?;
        let LinkOptions { codec, bulk, reconnect } = link.clone();
        let revives = reconnect.is_some();
        let tell = |status: &LinkStatus| reconnect.iter().for_each(|reconnect| reconnect.tell(status));
        tell(&LinkStatus::Connecting);
        let connecting = tokio::task::spawn_blocking(move || Mux::connect(address, (codec, bulk), revives));
        // It does not panic, so only a runtime that ends keeps it from coming to an end.
        let mux = connecting.await.map_err(|_| IpcError::ClientClosed)??;
        let socket = register(mux.socket())?;
        let state = State { mux, driver: None, room: None, deserted: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), turn: tokio::sync::Mutex::new(()) });
        tell(&LinkStatus::Connected);
        let driver = Driver { shared: Arc::clone(&shared), socket, reconnect };
        tokio::spawn(driver.run());
        Ok(Self { owner: Arc::new(Owner { shared }) })
    }

    /// Sends `request` and returns the answer.
    ///
    /// # Errors
    ///
    /// What the server answered, or what became of the session; [`IpcError::ClientClosed`] if the runtime that the
    /// client was connected on has ended.
    pub async fn call(&self, message_type: MessageType, request: &[u8]) -> Result<Vec<u8>> {
        self.call_with(message_type, request, &CallOptions::default()).await
    }

    /// As [`AsyncClient::call`], with options; [`CallOptions::tag`] and [`CallOptions::pieces`] mean nothing here, and
    /// [`CallOptions::timeout`] counts from now, the wait for room included.
    ///
    /// # Errors
    ///
    /// As for [`AsyncClient::call`]; [`IpcError::Timeout`].
    pub async fn call_with(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<Vec<u8>> {
        let options = CallOptions { pieces: false, ..*options };
        within(&options, async {
            let mut call = self.begin(message_type, request, &options).await?;
            poll_fn(|cx| call.poll_next(cx)).await.map(|(bytes, _)| bytes)
        })
        .await
    }

    /// Sends `request` and returns its answer as a stream of frames. [`CallOptions::timeout`] bounds the wait for room;
    /// bound the waits for frames with `tokio::time::timeout`.
    ///
    /// ```no_run
    /// # use doorbell::{AsyncClient, CallOptions, MessageType};
    /// # async fn example(client: AsyncClient) -> doorbell::Result<()> {
    /// let mut answer = client.stream(MessageType::ECHO, &[7; 100_000], &CallOptions::default()).await?;
    /// let mut length = 0;
    /// while let Some(frame) = answer.next().await {
    ///     length += frame?.len();
    /// }
    /// assert_eq!(length, 100_000);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`AsyncClient::call`], as long as the request has not been sent; what comes later is the stream's last
    /// item.
    pub async fn stream(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<AsyncAnswer> {
        let options = CallOptions { pieces: true, ..*options };
        let call = within(&options, self.begin(message_type, request, &options)).await?;
        Ok(AsyncAnswer { call: Some(call) })
    }

    /// Submits a call, as soon as it is its turn and there is room.
    async fn begin(&self, message_type: MessageType, request: &[u8], options: &CallOptions) -> Result<Call> {
        let shared = &self.owner.shared;
        // The deadline counts from now, not from when there is room or a server.
        let start = options.deadline.and_then(|limit| Instant::now().checked_add(limit));
        let submitted = async {
            let _turn = shared.turn.lock().await;
            poll_fn(|cx| {
                let deadline = start.map(|start| start.saturating_duration_since(Instant::now()));
                shared.poll_submit(cx, message_type, request, &CallOptions { deadline, ..*options })
            })
            .await
        };
        let key = match start {
            Some(start) => {
                timeout_at(start.into(), submitted).await.unwrap_or(Err(IpcError::DeadlineExceeded))?
            }
            None => submitted.await?,
        };
        Ok(Call { owner: Arc::clone(&self.owner), key, over: false })
    }
}

/// Its successor is unsafe for types whose descriptor may change or be closed; that of an owned one does neither.
#[allow(deprecated)]
fn register(socket: Option<Arc<OwnedFd>>) -> Result<AsyncFd<Arc<OwnedFd>>> {
    let socket = socket.ok_or(IpcError::ClientClosed)?;
    AsyncFd::with_interest(socket, Interest::READABLE)
        .map_err(|e| IpcError::io("registering the session socket with tokio", e))
}

async fn within<T>(options: &CallOptions, work: impl Future<Output = Result<T>>) -> Result<T> {
    match options.timeout {
        Some(limit) => timeout(limit, work).await.unwrap_or(Err(IpcError::Timeout)),
        None => work.await,
    }
}

/// The answer of a call, frame by frame: every byte of it in order, then either nothing more or, once, the error that
/// it ended with. Frames that are not taken stay where the server put them, and it sends no more meanwhile. Dropping it
/// cancels the call.
#[derive(Debug)]
#[must_use = "dropping it cancels the call"]
pub struct AsyncAnswer {
    /// `None` once it is over.
    call: Option<Call>,
}

impl AsyncAnswer {
    /// The next frame, `None` once the answer has ended.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// The same answer as [records](crate::protocol::records): what a streamed AI answer consists of.
    pub fn records(self) -> AsyncRecords {
        AsyncRecords { answer: self, frames: Splitter::default() }
    }
}

impl Stream for AsyncAnswer {
    type Item = Result<Vec<u8>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(call) = &mut self.call else { return Poll::Ready(None) };
        let item = match ready!(call.poll_next(cx)) {
            Ok((bytes, false)) => return Poll::Ready(Some(Ok(bytes))),
            Ok((bytes, true)) => (!bytes.is_empty()).then_some(Ok(bytes)),
            Err(error) => Some(Err(error)),
        };
        self.call = None;
        Poll::Ready(item)
    }
}

impl FusedStream for AsyncAnswer {
    fn is_terminated(&self) -> bool {
        self.call.is_none()
    }
}

/// The records of a streamed answer, in order, then either nothing more or, once, an error. Dropping it cancels the
/// call.
#[derive(Debug)]
#[must_use = "dropping it cancels the call"]
pub struct AsyncRecords {
    answer: AsyncAnswer,
    frames: Splitter,
}

impl AsyncRecords {
    /// The next record, `None` once the answer has ended.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>>> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// Takes a record from the frames that are there, `None` at the end.
    fn poll_record(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Vec<u8>>>> {
        let mut record = Vec::new();
        while !self.frames.next_into(&mut record)? {
            match ready!(Pin::new(&mut self.answer).poll_next(cx)) {
                Some(frame) => *self.frames.refill() = frame?,
                None => return Poll::Ready(std::mem::take(&mut self.frames).finish().map(|()| None)),
            }
        }
        Poll::Ready(Ok(Some(record)))
    }
}

impl Stream for AsyncRecords {
    type Item = Result<Vec<u8>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let record = ready!(self.poll_record(cx));
        if record.is_err() {
            // What follows cannot be made sense of, and is not wanted.
            (self.answer.call, self.frames) = (None, Splitter::default());
        }
        Poll::Ready(record.transpose())
    }
}

/// A call that has been submitted; cancelled when dropped.
struct Call {
    owner: Arc<Owner>,
    key: Key,
    over: bool,
}

impl Call {
    /// The answer, or its next frame, and whether it is the last.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(Vec<u8>, bool)>> {
        let mut replaced = None;
        let (next, driver) = {
            let mut state = self.owner.shared.lock();
            let next = state.mux.next(self.key);
            let driver = match &next {
                Next::Pending => {
                    if let Some(waker) = state.mux.data_mut(self.key)
                        && !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
                    {
                        replaced = waker.replace(cx.waker().clone());
                    }
                    None
                }
                // There is room, for another frame or another call.
                Next::Frame { .. } | Next::Failed(_) => state.driver.take(),
            };
            (next, driver)
        };
        drop(replaced);
        driver.inspect(Waker::wake_by_ref);
        match next {
            Next::Pending => Poll::Pending,
            Next::Frame { bytes, last } => {
                self.over = last;
                Poll::Ready(Ok((bytes, last)))
            }
            Next::Failed(error) => {
                self.over = true;
                Poll::Ready(Err(error))
            }
        }
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("key", &self.key).field("over", &self.over).finish_non_exhaustive()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            let wakers = {
                let mut state = self.owner.shared.lock();
                (state.mux.drop_call(self.key), state.driver.take())
            };
            wakers.1.inspect(Waker::wake_by_ref);
        }
    }
}

/// Held by all who can still use the client; the driver ends with it.
struct Owner {
    shared: Arc<Shared>,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").finish_non_exhaustive()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let driver = {
            let mut state = self.shared.lock();
            state.deserted = true;
            state.driver.take()
        };
        driver.inspect(Waker::wake_by_ref);
    }
}

struct Shared {
    state: Mutex<State>,
    /// Held by the task whose turn it is to submit: the first of those that find no room.
    turn: tokio::sync::Mutex<()>,
}

struct State {
    mux: Mux<Option<Waker>>,
    /// Wakes the driver; `None` while it is awake, or about to be.
    driver: Option<Waker>,
    /// The task that waits for room.
    room: Option<Waker>,
    /// Nobody can use the client any more.
    deserted: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing of this file panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_submit(
        &self,
        cx: &mut Context<'_>,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Poll<Result<Key>> {
        let mut replaced = None;
        let (submitted, driver) = {
            let mut state = self.lock();
            match state.mux.submit(LINE, message_type, request, options, None) {
                Err((IpcError::WouldBlock, _)) => {
                    // Room comes with answers, which the driver waits for: it need not be woken, and wakes this one.
                    replaced = state.room.replace(cx.waker().clone());
                    (Poll::Pending, None)
                }
                other => (Poll::Ready(other.map_err(|(error, _)| error)), state.driver.take()),
            }
        };
        drop(replaced);
        // It rings, and marks the client's bell.
        driver.inspect(Waker::wake_by_ref);
        submitted
    }
}

/// The connection that all calls go on.
const LINE: usize = 0;

/// Rings, waits, and wakes those for whom something has come; connects again.
struct Driver {
    shared: Arc<Shared>,
    socket: AsyncFd<Arc<OwnedFd>>,
    reconnect: Option<Reconnect>,
}

/// What the driver waits for, beside the socket.
enum Wait {
    /// To be woken.
    Woken,
    /// That, or this moment.
    Until(std::time::Instant),
    /// The session is over, and another one is to follow.
    Away,
    /// Nobody can use the client any more.
    Deserted,
    /// The client is of no use any more, for that reason.
    Broken(IpcError),
}

impl Driver {
    async fn run(mut self) {
        loop {
            match self.serve().await {
                Ok(true) if self.come_back().await => {}
                Ok(_) => return,
                Err(reason) => {
                    let tell = |reconnect: &Reconnect| reconnect.tell(&LinkStatus::Disconnected { reason });
                    self.reconnect.as_ref().map(tell);
                    return;
                }
            }
        }
    }

    /// Works until the session is over; says whether another one is to follow, or why none can.
    async fn serve(&self) -> Result<bool> {
        let mut timer = pin!(None::<Sleep>);
        let mut woken = Vec::new();
        poll_fn(|cx| {
            // Before it is looked whether something is there: what comes later makes the socket readable again.
            let mut socket = Ok(());
            while let Poll::Ready(readable) = self.socket.poll_read_ready(cx) {
                match readable {
                    Ok(mut readable) => readable.clear_ready(),
                    Err(error) => {
                        socket = Err(IpcError::io("waiting for the session socket", error));
                        break;
                    }
                }
            }
            loop {
                let wait = self.turn(cx, &mut woken, std::mem::replace(&mut socket, Ok(())));
                woken.drain(..).for_each(Waker::wake);
                match wait {
                    Wait::Deserted => return Poll::Ready(Ok(false)),
                    Wait::Broken(reason) => return Poll::Ready(Err(reason)),
                    Wait::Away => return Poll::Ready(Ok(true)),
                    Wait::Woken => timer.set(None),
                    Wait::Until(at) => {
                        timer.set(Some(sleep_until(at.into())));
                        if timer.as_mut().as_pin_mut().is_some_and(|timer| timer.poll(cx).is_ready()) {
                            continue;
                        }
                    }
                }
                return Poll::Pending;
            }
        })
        .await
    }

    /// Looks for the server until it is there; `false` if that is not to be, or wanted by nobody any more.
    async fn come_back(&mut self) -> bool {
        let Some(reconnect) = self.reconnect.clone() else { return false };
        let found = {
            let mut searching = pin!(search(&self.shared, &reconnect));
            let mut timer = pin!(None::<Sleep>);
            let mut woken = Vec::new();
            poll_fn(|cx| {
                loop {
                    let (deserted, due, replaced) = {
                        let mut state = self.shared.lock();
                        state.expire(&mut woken);
                        (state.deserted, state.mux.expires_at(), state.driver.replace(cx.waker().clone()))
                    };
                    drop(replaced);
                    woken.drain(..).for_each(Waker::wake);
                    if deserted {
                        return Poll::Ready(None);
                    }
                    timer.set(due.map(|at| sleep_until(at.into())));
                    if !timer.as_mut().as_pin_mut().is_some_and(|timer| timer.poll(cx).is_ready()) {
                        return searching.as_mut().poll(cx).map(Some);
                    }
                }
            })
            .await
        };
        let socket = match found {
            None => return false,
            Some(Ok(link)) => {
                // The lock is free while wakers run, and while the old socket goes.
                let (socket, room) = {
                    let mut state = self.shared.lock();
                    state.mux.attach(link);
                    (state.mux.socket(), state.room.take())
                };
                room.inspect(Waker::wake_by_ref);
                register(socket)
            }
            Some(Err(error)) => Err(error),
        };
        match socket {
            Ok(socket) => {
                self.socket = socket;
                reconnect.tell(&LinkStatus::Connected);
                true
            }
            Err(reason) => {
                let mut woken = Vec::new();
                self.shared.lock().break_off(&reason, &mut woken);
                woken.drain(..).for_each(Waker::wake);
                reconnect.tell(&LinkStatus::Disconnected { reason });
                false
            }
        }
    }

    /// Takes all that has come, and prepares to be woken for more.
    fn turn(&self, cx: &mut Context<'_>, woken: &mut Vec<Waker>, socket: Result<()>) -> Wait {
        let mut state = self.shared.lock();
        if state.deserted {
            return Wait::Deserted;
        }
        state.expire(woken);
        let taken = socket.and_then(|()| state.take_all(woken));
        if taken.is_ok() && state.mux.is_away() {
            return Wait::Away;
        }
        // Whoever waits for room looks whether there is some.
        woken.extend(state.room.take());
        if let Err(error) = taken {
            state.break_off(&error, woken);
            return Wait::Broken(error);
        }
        // Dropped later, with the lock free, like all others.
        woken.extend(state.driver.replace(cx.waker().clone()).filter(|old| !old.will_wake(cx.waker())));
        state.mux.wakes_at().into_iter().chain(state.mux.expires_at()).min().map_or(Wait::Woken, Wait::Until)
    }
}

/// Tries to connect until that succeeds, or has become useless.
async fn search(shared: &Shared, reconnect: &Reconnect) -> Result<Link> {
    let (address, lines, reason) = {
        let mut state = shared.lock();
        (state.mux.address.clone(), state.mux.wanted(), state.mux.take_reason())
    };
    if let Some(reason) = reason {
        reconnect.tell(&LinkStatus::Disconnected { reason });
    }
    reconnect.tell(&LinkStatus::Connecting);
    let mut search = Search::new(reconnect);
    loop {
        let (address, lines) = (address.clone(), lines.clone());
        let attempt = tokio::task::spawn_blocking(move || address.connect(&lines));
        match attempt.await.map_err(|_| IpcError::ClientClosed)? {
            Ok(link) => return Ok(link),
            Err(error) => sleep(search.pause_after(error, reconnect)?).await,
        }
    }
}

impl Drop for Driver {
    /// Nobody waits for a driver that has gone, with the session or with its runtime.
    fn drop(&mut self) {
        let mut woken = Vec::new();
        self.shared.lock().break_off(&IpcError::ClientClosed, &mut woken);
        woken.drain(..).for_each(Waker::wake);
    }
}

impl State {
    /// Ends the calls that wait to be sent again and have not been started by when they had to be.
    fn expire(&mut self, woken: &mut Vec<Waker>) {
        if self.mux.expires_at().is_some_and(|at| at <= Instant::now()) {
            self.mux.expire(Instant::now());
            while let Some(key) = self.mux.take_news() {
                woken.extend(self.mux.data_mut(key).and_then(Option::take));
            }
        }
    }

    fn take_all(&mut self, woken: &mut Vec<Waker>) -> Result<()> {
        loop {
            while let Some(key) = self.mux.take()? {
                woken.extend(self.mux.data_mut(key).and_then(Option::take));
            }
            if !self.mux.prepare_to_wait()? {
                return Ok(());
            }
        }
    }

    fn break_off(&mut self, error: &IpcError, woken: &mut Vec<Waker>) {
        self.mux.break_off(error);
        let keys: Vec<Key> = self.mux.keys().collect();
        for key in keys {
            woken.extend(self.mux.data_mut(key).and_then(Option::take));
        }
        woken.extend(self.room.take());
        woken.extend(self.driver.take());
    }
}

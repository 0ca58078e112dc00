//! The blocking client that comes back to its server: calls that a dead session left are delivered, sent again or failed,
//! each as is provably right (R3.4, FAULTS §5).

use super::call::CallOptions;
use super::connect::ClientConfig;
use super::mux::{Key, Line, Mux, Next};
use super::reconnect::{Address, LinkStatus, Reconnect, Search, ends_soon, sleep_until};
use super::stream::Splitter;
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use doorbell_shm::entry::codec;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

/// What a call is for whoever made it.
#[derive(Debug, Clone, Copy)]
enum Use {
    /// Its answer comes from [`ReconnectingClient::poll`], with this tag.
    Polled(u64),
    /// Somebody waits for it.
    Waited,
}

/// Names a call that was submitted to a [`ReconnectingClient`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingCall(Key);

/// What has become of a submitted call.
#[derive(Debug)]
pub struct Outcome {
    /// The tag that it was submitted with.
    pub tag: u64,
    /// The answer, or why there is none.
    pub result: Result<Vec<u8>>,
}

/// A client of one thread that connects again, by itself, whenever its session ends, for as long as it takes or until
/// the caller's time is over.
///
/// | when the server goes, a call that | |
/// | --- | --- |
/// | was answered | is answered |
/// | was provably not started | is sent again |
/// | may have been executed, and is [idempotent](CallOptions::idempotent) | is sent again, three times at most |
/// | may have been executed otherwise | fails with [`IpcError::ConnectionLost`] |
/// | is a stream, and was started | ends with [`IpcError::StreamLost`], which says how far it got |
///
/// So a call is executed at most once, unless its caller allows more, and [`IpcError::NotExecuted`] is said of none that
/// was. After a time-out it is what a call fails with that was not sent at all; [`IpcError::Timeout`] is for one that may
/// have run. Connections are opened again as they were. A server that speaks no common version, belongs to somebody else
/// or refuses this user is no server to come back to: that ends the client for good.
///
/// Whoever uses the client drives it: there is no thread behind it. [`ReconnectingClient::wait`] is what a thread does
/// that has nothing else to do.
///
/// ```no_run
/// use doorbell::{CallOptions, MessageType, ReconnectingClient};
///
/// # fn main() -> doorbell::Result<()> {
/// let client = ReconnectingClient::connect(doorbell::default_socket_path())?;
/// let connection = client.open()?;
/// let idempotent = CallOptions { idempotent: true, ..CallOptions::default() };
/// let answer = connection.call_with(MessageType::ECHO, b"whatever happens", &idempotent)?;
/// assert_eq!(answer, b"whatever happens");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ReconnectingClient {
    mux: RefCell<Mux<Use>>,
    reconnect: Reconnect,
    /// While the server is away.
    searching: RefCell<Option<Search>>,
    /// Submitted calls that are over and have not been polled.
    ready: RefCell<VecDeque<Key>>,
}

impl ReconnectingClient {
    /// Connects to the server at `path`, which must be running.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect`](super::IpcClient::connect).
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(path, &ClientConfig::default(), Reconnect::default())
    }

    /// Connects with a configuration of the caller's.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`](super::IpcClient::connect_with).
    pub fn connect_with(path: impl AsRef<Path>, config: &ClientConfig, reconnect: Reconnect) -> Result<Self> {
        let client = Self::begin(path, config, reconnect)?;
        client.reconnect.tell(&LinkStatus::Connecting);
        let link = client.mux.borrow().address.connect(&[]);
        match link {
            Ok(link) => client.mux.borrow_mut().attach(link),
            Err(reason) => return Err(client.disconnected(reason)),
        }
        client.reconnect.tell(&LinkStatus::Connected);
        Ok(client)
    }

    /// A client that connects when it is first used, to a server that need not be there yet.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel has no random number for its name.
    pub fn begin(path: impl AsRef<Path>, config: &ClientConfig, reconnect: Reconnect) -> Result<Self> {
        let address = Address::new(path.as_ref().to_owned(), config.clone())?;
        let mux = RefCell::new(Mux::away(address, true));
        Ok(Self { mux, reconnect, searching: RefCell::default(), ready: RefCell::default() })
    }

    /// Opens an interactive connection for bodies that doorbell does not interpret.
    ///
    /// # Errors
    ///
    /// [`IpcError::TooMany`] when the server's limit is reached; what makes connecting impossible for good.
    pub fn open(&self) -> Result<ReconnectingConnection<'_>> {
        self.open_with(codec::RAW, false)
    }

    /// Opens a connection for bodies of `codec`, on the bulk rings if `bulk`; so it is opened again in later sessions.
    ///
    /// # Errors
    ///
    /// As for [`ReconnectingClient::open`].
    pub fn open_with(&self, codec: u8, bulk: bool) -> Result<ReconnectingConnection<'_>> {
        let line = Line { codec, bulk, id: None };
        loop {
            self.come_back(None)?;
            let mut mux = self.mux.borrow_mut();
            let opened = match &mux.client {
                Some(client) => client.open_with(codec, bulk).map(|connection| connection.detach()),
                None => continue,
            };
            match opened {
                Ok(id) => {
                    let line = mux.add_line(Line { id: Some(id), ..line });
                    return Ok(ReconnectingConnection { client: self, line });
                }
                // All slots are taken by answers that have come and by calls in flight.
                Err(IpcError::WouldBlock) => drop(mux),
                Err(error) if ends_soon(&error) => drop(mux),
                Err(error) => return Err(error),
            }
            if !self.turn(None, None)? {
                return Err(IpcError::WouldBlock);
            }
        }
    }

    /// Takes what has become of the next submitted call that is over, if there is one. Waits for nothing, except up to 20 ms
    /// for a place in the queue of a server that has come back and is busy.
    ///
    /// # Errors
    ///
    /// What ends the client for good; each call says what became of it first.
    pub fn poll(&self) -> Result<Option<Outcome>> {
        let now = Some(Instant::now());
        let taken =
            if self.next_ready() { Ok(true) } else { self.turn(now, now).and_then(|_| self.look_around()) };
        match (self.take_ready(), taken) {
            (Some(outcome), _) => Ok(Some(outcome)),
            (None, Ok(_) | Err(IpcError::Timeout)) => Ok(None),
            (None, Err(error)) => Err(error),
        }
    }

    /// Waits until [`ReconnectingClient::poll`] has something, or until `timeout` is over; says whether it has. While the
    /// server is away it is looked for. `false` at once if there is a server and no call is under way.
    ///
    /// # Errors
    ///
    /// As for [`ReconnectingClient::poll`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        while !self.next_ready() {
            let turned = match self.pending() {
                0 => self.come_back(deadline).map(|()| false),
                _ => self.turn(deadline, deadline),
            };
            match turned {
                Ok(true) => {}
                Ok(false) | Err(IpcError::Timeout) => return Ok(self.next_ready()),
                Err(_) if self.next_ready() => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Says that the answer of a submitted call is not wanted. It is answered exactly once in any case.
    pub fn cancel(&self, call: PendingCall) {
        self.mux.borrow_mut().cancel(call.0);
    }

    /// Submitted calls, and others under way, whose end has not been taken.
    pub fn pending(&self) -> usize {
        self.mux.borrow().keys().count()
    }

    /// Whether there is a session, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.mux.borrow().client.is_some()
    }

    fn next_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    fn take_ready(&self) -> Option<Outcome> {
        let mut mux = self.mux.borrow_mut();
        let key = self.ready.borrow_mut().pop_front()?;
        let tag = match mux.data_mut(key) {
            Some(Use::Polled(tag)) => *tag,
            Some(Use::Waited) | None => return None,
        };
        match mux.next(key) {
            Next::Frame { bytes, .. } => Some(Outcome { tag, result: Ok(bytes) }),
            Next::Failed(error) => Some(Outcome { tag, result: Err(error) }),
            Next::Pending => None,
        }
    }

    /// Takes what has come, or waits until something has, or there may be more room; `false` when `deadline` came first.
    /// While the server is away it is looked for until `away`, [`IpcError::Timeout`] if it is not back by then.
    fn turn(&self, deadline: Option<Instant>, away: Option<Instant>) -> Result<bool> {
        let mut mux = self.mux.borrow_mut();
        let before = mux.in_flight();
        // A call that was given up has left room, even if nobody is told of its end.
        if self.take_all(&mut mux)? || mux.in_flight() < before {
            return Ok(true);
        }
        if mux.is_away() {
            drop(mux);
            return self.come_back(away).map(|()| true);
        }
        let waited = mux.wait(deadline);
        self.or_end(&mut mux, waited)
    }

    /// Takes what has come; says whether that was anything.
    fn take_all(&self, mux: &mut Mux<Use>) -> Result<bool> {
        let mut any = false;
        loop {
            let taken = mux.take();
            let Some(key) = self.or_end(mux, taken)? else { return Ok(any) };
            any = true;
            if let Some(Use::Polled(_)) = mux.data_mut(key) {
                self.ready.borrow_mut().push_back(key);
            }
        }
    }

    /// Nothing has come for somebody who only polls: looks at the socket now and then, and takes what there is.
    fn look_around(&self) -> Result<bool> {
        if self.next_ready() {
            return Ok(true);
        }
        let mut mux = self.mux.borrow_mut();
        let looked = mux.client.as_ref().map_or(Ok(()), |c| c.session()?.look_after_server());
        if looked.is_err() {
            // The session is over: what it left is taken, and each call told what became of it.
            self.take_all(&mut mux)?;
        }
        Ok(self.next_ready())
    }

    /// Looks at the server's socket, and takes what there is.
    fn look(&self) -> Result<()> {
        let mut mux = self.mux.borrow_mut();
        let looked = mux.client.as_ref().map_or(Ok(()), |c| c.session()?.look_at_server());
        self.or_end(&mut mux, looked)?;
        self.take_all(&mut mux).map(|_| ())
    }

    /// What ends the client for good ends every call of it.
    fn or_end<T>(&self, mux: &mut Mux<Use>, result: Result<T>) -> Result<T> {
        let Err(error) = result else { return result };
        if !mux.is_broken() {
            mux.break_off(&error);
            let keys: Vec<Key> = mux.keys().collect();
            for key in keys {
                let queued = self.ready.borrow().contains(&key);
                if let (false, Some(Use::Polled(_))) = (queued, mux.data_mut(key)) {
                    self.ready.borrow_mut().push_back(key);
                }
            }
        }
        Err(error)
    }

    /// Connects, if there is no session, however often it takes until the deadline.
    fn come_back(&self, deadline: Option<Instant>) -> Result<()> {
        if self.mux.borrow().is_broken() {
            return Err(self.mux.borrow().why_broken());
        }
        while self.mux.borrow().is_away() {
            if !self.search()? {
                let due = {
                    let searching = self.searching.borrow();
                    let Some(search) = searching.as_ref() else { continue };
                    let now = Instant::now();
                    if deadline.is_some_and(|deadline| deadline <= now) {
                        return Err(IpcError::Timeout);
                    }
                    let until = deadline.map_or(search.due(), |deadline| deadline.min(search.due()));
                    sleep_until(search.descriptor().as_slice(), Some(until))
                };
                self.or_end(&mut self.mux.borrow_mut(), due)?;
            }
        }
        Ok(())
    }

    /// One step of the search for a server that is away; says whether it has been found.
    fn search(&self) -> Result<bool> {
        let reason = self.mux.borrow_mut().take_reason();
        if let Some(reason) = reason {
            self.reconnect.tell(&LinkStatus::Disconnected { reason });
        }
        let begins = self.searching.borrow().is_none();
        if begins {
            self.reconnect.tell(&LinkStatus::Connecting);
        }
        let found = {
            let mux = self.mux.borrow();
            let mut searching = self.searching.borrow_mut();
            let search = searching.get_or_insert_with(|| Search::new(&self.reconnect));
            search.step(&mux.address, &mux.wanted(), &self.reconnect)
        };
        match found {
            Ok(None) => Ok(false),
            Ok(Some(link)) => {
                *self.searching.borrow_mut() = None;
                self.mux.borrow_mut().attach(link);
                self.reconnect.tell(&LinkStatus::Connected);
                Ok(true)
            }
            Err(reason) => {
                *self.searching.borrow_mut() = None;
                let reason = self.disconnected(reason);
                self.or_end(&mut self.mux.borrow_mut(), Err(reason))
            }
        }
    }

    /// Tells why there is no session; gives the reason back.
    fn disconnected(&self, reason: IpcError) -> IpcError {
        let status = LinkStatus::Disconnected { reason };
        self.reconnect.tell(&status);
        let LinkStatus::Disconnected { reason } = status else { return IpcError::ClientClosed };
        reason
    }

    /// Submits a call, as soon as there is room and a server, until the caller's time is over.
    fn submit_until(&self, line: usize, request: &Request<'_>, bounds: Bounds) -> Result<Key> {
        loop {
            // Nothing has been sent: whatever ends this, it has not been executed.
            match self.come_back(bounds.away) {
                Err(IpcError::Timeout) => return Err(IpcError::NotExecuted),
                other => other?,
            }
            let submitted = self.mux.borrow_mut().submit(
                line,
                request.message_type,
                request.bytes,
                &request.options,
                Use::Waited,
            );
            match submitted {
                Ok(key) => return Ok(key),
                Err((IpcError::WouldBlock, _)) => {}
                Err((error, _)) => return Err(error),
            }
            match self.turn(bounds.answer, bounds.away) {
                Ok(true) => {}
                Ok(false) | Err(IpcError::Timeout) => return Err(IpcError::NotExecuted),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for what comes next of a call.
    fn wait_for(&self, key: Key, bounds: Bounds) -> Result<(Vec<u8>, bool)> {
        loop {
            let next = self.mux.borrow_mut().next(key);
            match next {
                Next::Frame { bytes, last } => return Ok((bytes, last)),
                Next::Failed(error) => return Err(error),
                Next::Pending => {}
            }
            match self.turn(bounds.answer, bounds.away) {
                Ok(true) => {}
                Ok(false) | Err(IpcError::Timeout) => {
                    // The answer, or the end of the session, may have come in the last moment. Whatever ended the
                    // client: the call knows what became of it.
                    self.look().unwrap_or_default();
                    let next = self.mux.borrow_mut().next(key);
                    return match next {
                        Next::Frame { bytes, last } => Ok((bytes, last)),
                        Next::Failed(error) => Err(error),
                        Next::Pending => Err(self.mux.borrow_mut().give_up(key)),
                    };
                }
                // The call knows what became of it.
                Err(_) => {}
            }
        }
    }
}

/// A call that is to be made.
struct Request<'a> {
    message_type: MessageType,
    bytes: &'a [u8],
    options: CallOptions,
}

/// How long a caller waits: for an answer, and for a server that is away.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    answer: Option<Instant>,
    away: Option<Instant>,
}

impl Bounds {
    fn of(options: &CallOptions) -> Self {
        let now = Instant::now();
        let at = |limit: Option<Duration>| limit.and_then(|limit| now.checked_add(limit));
        let (answer, start) = (at(options.timeout), at(options.deadline));
        // Beyond its deadline a call is not started: no need to look for a server any longer.
        Self { answer, away: answer.into_iter().chain(start).min() }
    }
}

/// A numbered, ordered conversation that outlives sessions. Dropping it closes it.
#[derive(Debug)]
pub struct ReconnectingConnection<'c> {
    client: &'c ReconnectingClient,
    line: usize,
}

impl<'c> ReconnectingConnection<'c> {
    /// Sends `request` and returns the answer.
    ///
    /// # Errors
    ///
    /// What the server answered; [`IpcError::ConnectionLost`] if the server went and the call may have been executed;
    /// what ends the client for good.
    pub fn call(&self, message_type: MessageType, request: &[u8]) -> Result<Vec<u8>> {
        self.call_with(message_type, request, &CallOptions::default())
    }

    /// As [`ReconnectingConnection::call`], with options; [`CallOptions::tag`] and [`CallOptions::pieces`] mean nothing
    /// here. While the server is away the call waits until [`CallOptions::timeout`] or [`CallOptions::deadline`] is over.
    ///
    /// # Errors
    ///
    /// As for [`ReconnectingConnection::call`]; [`IpcError::NotExecuted`] if the time was over before the call was sent,
    /// [`IpcError::Timeout`] if afterwards.
    pub fn call_with(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<Vec<u8>> {
        let bounds = Bounds::of(options);
        let options = CallOptions { pieces: false, ..*options };
        let request = Request { message_type, bytes: request, options };
        let key = self.client.submit_until(self.line, &request, bounds)?;
        self.client.wait_for(key, bounds).map(|(bytes, _)| bytes)
    }

    /// Submits a call without waiting; [`ReconnectingClient::poll`] brings what becomes of it, with
    /// [`CallOptions::tag`]. [`CallOptions::timeout`] and [`CallOptions::pieces`] mean nothing here.
    ///
    /// # Errors
    ///
    /// [`IpcError::WouldBlock`] while there is no room, or no server: nothing was sent.
    pub fn submit(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<PendingCall> {
        let options = CallOptions { pieces: false, ..*options };
        let mut mux = self.client.mux.borrow_mut();
        let submitted = mux.submit(self.line, message_type, request, &options, Use::Polled(options.tag));
        submitted.map(PendingCall).map_err(|(error, _)| error)
    }

    /// Sends `request` and returns its answer as a stream of frames. [`CallOptions::timeout`] bounds each wait for a
    /// frame, and the wait for room and for a server; [`CallOptions::pieces`] is implied.
    ///
    /// # Errors
    ///
    /// As for [`ReconnectingConnection::call`] before the request is sent; what comes later is the last item.
    pub fn stream(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<ReconnectingStream<'c>> {
        let bounds = Bounds::of(options);
        let options = CallOptions { pieces: true, ..*options };
        let request = Request { message_type, bytes: request, options };
        let key = self.client.submit_until(self.line, &request, bounds)?;
        Ok(ReconnectingStream { client: self.client, key: Some(key), options })
    }
}

impl Drop for ReconnectingConnection<'_> {
    fn drop(&mut self) {
        self.client.mux.borrow_mut().close_line(self.line);
    }
}

/// The answer of a call, frame by frame: every byte of it in order, then either nothing more or, once, the error that it
/// ended with, which is [`IpcError::StreamLost`] if the server went in the midst of it. Dropping it cancels the call.
#[derive(Debug)]
pub struct ReconnectingStream<'c> {
    client: &'c ReconnectingClient,
    /// `None` once it is over.
    key: Option<Key>,
    options: CallOptions,
}

impl<'c> ReconnectingStream<'c> {
    /// The same answer as [records](crate::protocol::records).
    pub fn records(self) -> ReconnectingRecords<'c> {
        ReconnectingRecords { stream: self, frames: Splitter::default(), over: false }
    }
}

impl Iterator for ReconnectingStream<'_> {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let key = self.key?;
        let item = match self.client.wait_for(key, Bounds::of(&self.options)) {
            Ok((bytes, false)) => return Some(Ok(bytes)),
            Ok((bytes, true)) => (!bytes.is_empty()).then_some(Ok(bytes)),
            Err(error) => Some(Err(error)),
        };
        self.key = None;
        item
    }
}

impl std::iter::FusedIterator for ReconnectingStream<'_> {}

impl Drop for ReconnectingStream<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.client.mux.borrow_mut().drop_call(key);
        }
    }
}

/// The records of a streamed answer, in order, then either nothing more or, once, an error. Dropping it cancels the call.
#[derive(Debug)]
pub struct ReconnectingRecords<'c> {
    stream: ReconnectingStream<'c>,
    frames: Splitter,
    over: bool,
}

impl ReconnectingRecords<'_> {
    /// The next record, `None` at the end.
    fn step(&mut self) -> Result<Option<Vec<u8>>> {
        let mut record = Vec::new();
        while !self.frames.next_into(&mut record)? {
            match self.stream.next() {
                Some(frame) => *self.frames.refill() = frame?,
                None => return self.frames.finish().map(|()| None),
            }
        }
        Ok(Some(record))
    }
}

impl Iterator for ReconnectingRecords<'_> {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let item = self.step().transpose();
        self.over = !matches!(item, Some(Ok(_)));
        item
    }
}

impl std::iter::FusedIterator for ReconnectingRecords<'_> {}

//! The client: a session with a server, cheap connections inside it, blocking and pipelined calls.

#[cfg(feature = "tokio")]
mod asynchronous;
mod body;
mod call;
mod callback;
mod classify;
mod connect;
mod doorbell;
mod lane;
mod mux;
mod reconnect;
mod reconnecting;
mod revive;
mod route;
mod session;
#[cfg(test)]
pub(crate) mod simulated;
mod start;
mod stream;
mod waiting;

#[cfg(feature = "tokio")]
pub use asynchronous::{AsyncAnswer, AsyncClient, AsyncRecords};
pub use call::{CallId, CallOptions, Reply, SlotWriter, Taken};
pub use callback::{CallHandle, CallbackClient, CallbackConfig, StreamEvent};
pub use connect::{ClientConfig, Connecting};
pub use reconnect::{LinkOptions, LinkStatus, Reconnect, StatusCallback};
pub use reconnecting::{
    Outcome as PendingOutcome, PendingCall, ReconnectingClient, ReconnectingConnection, ReconnectingRecords,
    ReconnectingStream,
};
pub use stream::{AnswerRecords, AnswerStream};

use crate::error::{IpcError, Result};
use crate::machine;
use crate::protocol::MessageType;
use doorbell_shm::entry::{Status, codec, flag};
use doorbell_shm::layout::LaneLayout;
use lane::{Answered, Outcome};
use session::Session;
use std::cell::{RefCell, RefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One session with a server: one socket, one shared segment, any number of connections.
///
/// It is of the process that connected it. In a fork of that every call is [`IpcError::ForkedClient`], and dropping it does
/// nothing to the session; a fork connects anew.
///
/// A client may move between threads but not be shared by them: its rings have one producer and one
/// consumer (trap 7), and the type says so. A thread of its own gets a client of its own, which costs 8 KiB
/// of shared memory at the smallest.
///
/// ```compile_fail
/// fn share<T: Sync>() {}
/// share::<doorbell::IpcClient>();
/// ```
#[derive(Debug)]
pub struct IpcClient {
    session: RefCell<Session>,
    socket: Arc<OwnedFd>,
}

impl IpcClient {
    fn of(session: Session) -> Self {
        let socket = Arc::clone(&session.socket);
        Self { session: RefCell::new(session), socket }
    }

    /// The session, unless this process is a fork of the one that it is of (F9).
    #[inline(always)]
    fn session(&self) -> Result<RefMut<'_, Session>> {
        let session = self.session.borrow_mut();
        if session.was_left_behind() { Err(IpcError::ForkedClient) } else { Ok(session) }
    }

    /// Gives back the slot of an answer. A fork gives nothing back.
    #[inline(always)]
    fn release(&self, answered: &Answered) {
        let mut session = self.session.borrow_mut();
        if !session.was_left_behind() {
            session.release(answered);
        }
    }

    /// Connects to the server at `path` with the default configuration.
    ///
    /// # Errors
    ///
    /// [`IpcError::NotRunning`] if nobody listens there; the other variants for what the server or the
    /// path make impossible, each saying what to do.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(path, &ClientConfig::default())
    }

    /// Connects with a configuration of the caller's.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect`].
    pub fn connect_with(path: impl AsRef<Path>, config: &ClientConfig) -> Result<Self> {
        Connecting::begin(path, config)?.finish()
    }

    /// Opens an interactive connection for bodies that doorbell does not interpret.
    ///
    /// # Errors
    ///
    /// [`IpcError::TooMany`] when the server's limit is reached; others if the session is lost.
    pub fn open(&self) -> Result<Connection<'_>> {
        self.open_with(codec::RAW, false)
    }

    /// Opens a connection for bodies of `codec`, on the bulk rings if `bulk`: interactive calls overtake
    /// those (R2.8).
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::open`].
    pub fn open_with(&self, codec: u8, bulk: bool) -> Result<Connection<'_>> {
        self.open_until(codec, bulk, None)
    }

    /// The same; [`IpcError::Timeout`] if it takes longer than until then. The client is of no use any more in that case.
    fn open_until(&self, codec: u8, bulk: bool, deadline: Option<Instant>) -> Result<Connection<'_>> {
        let flags = if bulk { flag::BULK } else { 0 };
        let slot = self.retry_until(deadline, |session| session.submit_open(codec, flags))?;
        let answered = self.wait_for(0, slot, deadline)?;
        let id = self.opened(&answered, codec, bulk)?;
        Ok(Connection { client: self, id, owned: true })
    }

    /// What the answer to an OPEN says.
    fn opened(&self, answered: &Answered, codec: u8, bulk: bool) -> Result<ConnectionId> {
        self.session()?.release(answered);
        match answered.outcome {
            Outcome::Reply { status, detail, .. } if status == Status::Ok as u8 => {
                Ok(ConnectionId { number: detail as u32, codec, bulk })
            }
            Outcome::Reply { status, detail, .. } if status == Status::Overloaded as u8 => {
                Err(IpcError::TooMany { scope: "connections", limit: detail, retry_ms: 100 })
            }
            Outcome::Reply { .. } | Outcome::Piece(_) => {
                Err(IpcError::Handshake("the server answered OPEN with an unknown status"))
            }
            Outcome::Lost { .. } => Err(IpcError::NotExecuted),
        }
    }

    /// The connection that `id` names, to be used and not closed when dropped. One that has been closed, or
    /// was opened by another client, is a violation of the protocol and ends this session.
    #[inline(always)]
    pub fn attached(&self, id: ConnectionId) -> Connection<'_> {
        Connection { client: self, id, owned: false }
    }

    /// Sends what has been submitted: one fence, and one wake if the server sleeps.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses the wake.
    #[inline(always)]
    pub fn flush(&self) -> Result<()> {
        self.session()?.flush()
    }

    /// Takes the next answer, if one has come, of whichever connection. Does not wait.
    ///
    /// Polling flushes: who polls until nothing comes need not call [`IpcClient::flush`], and the fence then
    /// falls into a moment when it costs less.
    ///
    /// # Errors
    ///
    /// [`IpcError::ServerFault`] if the server broke the protocol; [`IpcError::Disconnected`] or
    /// [`IpcError::NotExecuted`] when the session is over and every answer has been taken.
    #[inline(always)]
    pub fn poll(&self) -> Result<Option<Reply<'_>>> {
        let mut session = self.session()?;
        let next = match session.next_plain() {
            Some(plain) => Some(plain.into()),
            None => session.next()?,
        };
        Ok(next.map(|answered| Reply { client: self, answered }))
    }

    /// Takes the next answer, if one has come, into `target`, as many of its bytes as fit, and gives its slot
    /// back. As [`IpcClient::poll`] in one step, for those who look at every answer in memory of their own.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::poll`].
    #[inline(always)]
    pub fn poll_into(&self, target: &mut [u8]) -> Result<Option<Taken>> {
        let mut session = self.session()?;
        if let Some(plain) = session.next_plain() {
            let len = (plain.len as usize).min(target.len());
            let offset = LaneLayout::slot_offset(plain.response_slot);
            session.payload(0).read(offset, &mut target[..len]);
            session.home.release(plain.slot);
            return Ok(Some(Taken::of_plain(&plain)));
        }
        let Some(answered) = session.next()? else { return Ok(None) };
        let mut taken = Taken::of(&answered);
        if matches!(answered.outcome, Outcome::Piece(_)) {
            taken.len = session.body_len(&answered);
        }
        let len = taken.len.min(target.len());
        match session.read(&answered, &mut target[..len]) {
            Err(IpcError::MemoryTakenBack) => taken.status = Some(Status::TakenBack),
            other => other?,
        }
        session.release(&answered);
        Ok(Some(taken))
    }

    /// Flushes, then waits until [`IpcClient::poll`] has something, or until `timeout` is over; says
    /// whether it has. Calls that were given up, and connections that were closed, end no wait, unless nothing else was in
    /// flight: then it says `false` as soon as all of them have ended.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::poll`].
    pub fn wait(&self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|t| machine::now().checked_add(t));
        self.session()?.wait(deadline)
    }

    /// Flushes, and makes the client's descriptor ([`AsFd`]) readable as soon as there is an answer to take, or the
    /// session is over; returns for how long the caller may sleep: zero if there is something to take already, `None` for
    /// ever. For those who wait for other things too, in an event loop of their own:
    ///
    /// 1. [`IpcClient::poll`] until it brings nothing; 2. this; 3. wait until the descriptor is readable, at most as long
    ///    as this says, and back to 1. Nothing needs to be read from it.
    ///
    /// A long call that waits for memory of the server's begins without it after a while: in step 1, which is why step 3
    /// ends then.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::wait`].
    pub fn prepare_to_sleep(&self) -> Result<Option<Duration>> {
        self.session()?.prepare_to_sleep()
    }

    /// As [`IpcClient::prepare_to_sleep`], for a wait without a limit; says whether there is an answer to take already:
    ///
    /// 1. [`IpcClient::poll`] until it brings nothing; 2. this, and back to 1 if it says `true`; 3. wait until the
    ///    descriptor is readable, and back to 1.
    ///
    /// Where a long call waits for memory of the server's this sleeps until that comes, or the call begins without it:
    /// 5 ms at most, and while other calls of this client use its leases as much for each MiB of the request.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::wait`].
    pub fn prepare_to_wait(&self) -> Result<bool> {
        self.session()?.prepare_to_wait()
    }

    /// Says that the answer of a submitted call is no longer wanted. If the call has not been started it
    /// will be answered [`IpcError::Cancelled`]; it is answered exactly once in any case.
    pub fn cancel(&self, call: CallId) {
        if let Ok(mut session) = self.session() {
            session.cancel(call);
        }
    }

    /// Calls submitted and not yet answered or taken.
    pub fn in_flight(&self) -> usize {
        self.session.borrow().in_flight()
    }

    /// Bytes of shared memory that exist for this session, as the kernel counts them.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses fstat.
    pub fn shared_bytes(&self) -> Result<u64> {
        self.session.borrow().shared_bytes()
    }

    /// Longest request and longest answer, bytes.
    pub fn max_message_size(&self) -> usize {
        self.session.borrow().max_message
    }

    /// For how long this session has been waiting for memory of the server's to carry long requests and answers in;
    /// `None` if it does not. Its calls go on meanwhile, but more slowly; [`CallOptions::timeout`] bounds them.
    pub fn waits_for_memory(&self) -> Option<Duration> {
        self.session.borrow().waits_for_memory_since().map(|since| machine::now() - since)
    }

    /// Sends more of the request of a [started](Connection::start) call: as many of `bytes` as there is room for now;
    /// returns how many that were. More fits once the server has taken some: [`IpcClient::wait`] returns then too.
    ///
    /// # Errors
    ///
    /// [`IpcError::NoSuchCall`] if the call has been answered; [`IpcError::BodyFinished`] after its end, which comes with the
    /// last byte that was announced, if a length was.
    pub fn send(&self, call: CallId, bytes: &[u8]) -> Result<usize> {
        let mut sent = 0;
        while sent < bytes.len() {
            let mut written = 0;
            let write = |writer: &mut SlotWriter<'_>| {
                written = (bytes.len() - sent).min(writer.remaining());
                writer.write(&bytes[sent..sent + written])
            };
            let piece = self.session()?.send_piece(call, write);
            if sent > 0 && matches!(piece, Err(IpcError::BodyFinished)) {
                break;
            }
            if !piece? {
                if sent > 0 {
                    break;
                }
                // Whatever gives room has to come first, and has to be asked for.
                let mut session = self.session()?;
                session.stash()?;
                session.flush()?;
                drop(session);
                if !self.session()?.send_piece(call, |_| Ok(()))? {
                    break;
                }
                continue;
            }
            sent += written;
        }
        Ok(sent)
    }

    /// Sends one more frame of the request of a [started](Connection::start) call, which `write` fills right in its
    /// slot; `false` if there is no room now, and nothing was written.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::send`], and whatever `write` returns; then nothing was sent.
    pub fn send_with(
        &self,
        call: CallId,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<bool> {
        self.session()?.send_piece(call, write)
    }

    /// The request of a [started](Connection::start) call is complete. Need not be said of one whose length was
    /// announced.
    ///
    /// # Errors
    ///
    /// [`IpcError::BodyLength`] if less was sent than announced, [`IpcError::NoSuchCall`] if the call has been answered.
    pub fn finish(&self, call: CallId) -> Result<()> {
        self.session()?.finish_body(call)
    }

    /// Runs `attempt` until it does not block, or until `deadline`; while it does, flushes and waits for answers.
    fn retry_until<T>(
        &self,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Session) -> Result<T>,
    ) -> Result<T> {
        let mut session = self.session()?;
        let tried = session.retry_until(deadline, &mut attempt);
        session.bodies.tell_news();
        tried
    }

    /// Waits until the call `id` is answered, or can send more of its request (`None`).
    fn look_for(&self, id: CallId, deadline: Option<Instant>) -> Result<Option<Answered>> {
        let mut session = self.session()?;
        loop {
            while let Some(next) = session.next_completed()? {
                if (next.lane, next.slot) == (id.lane, id.slot) {
                    return Ok(Some(next));
                }
                session.keep(next);
            }
            // It has ended while somebody else was waited for, or with the session (F51).
            if let Some(answered) = session.take_kept(id.lane, id.slot) {
                return Ok(Some(answered));
            }
            if session.bodies.take_news() {
                return Ok(None);
            }
            if !session.wait_for_completion(deadline)? {
                return Err(IpcError::Timeout);
            }
        }
    }

    /// Waits for the next frame of the answer to `id`, or for its end; what comes for others is kept for `poll`.
    fn wait_for_frame(&self, id: CallId, deadline: Option<Instant>) -> Result<Answered> {
        // Frames that came while somebody else waited are older than those in the rings.
        let kept = self.session()?.take_kept(id.lane, id.slot);
        match kept {
            Some(answered) => Ok(answered),
            None => self.wait_for(id.lane, id.slot, deadline),
        }
    }

    /// Waits for the next completion of the call in `slot` of `lane`; others that come are kept for `poll`.
    #[inline]
    fn wait_for(&self, lane: u32, slot: u32, deadline: Option<Instant>) -> Result<Answered> {
        let mut session = self.session()?;
        let waited = session.wait_for(lane, slot, deadline);
        if session.bodies.are_active() {
            session.bodies.tell_news();
        }
        waited
    }
}

/// The session's socket, to be waited on after [`IpcClient::prepare_to_sleep`] or [`IpcClient::prepare_to_wait`]. Not to
/// be read from or written to.
impl AsFd for IpcClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A request beyond this many bytes does not go into a slot, whatever its class.
const LONG: usize = doorbell_shm::layout::SLOT_LARGE;

/// A numbered, ordered conversation inside a session. Cheap: a number here, 32 bytes at the server.
/// Dropping it closes it.
#[derive(Debug)]
pub struct Connection<'c> {
    client: &'c IpcClient,
    id: ConnectionId,
    owned: bool,
}

/// Names an open connection of a client without borrowing it: for those who keep both in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionId {
    number: u32,
    codec: u8,
    bulk: bool,
}

impl<'c> Connection<'c> {
    /// Its number at the server, for logs.
    pub fn number(&self) -> u32 {
        self.id.number
    }

    /// Keeps the connection open beyond this value; [`IpcClient::attached`] makes another of it.
    pub fn detach(mut self) -> ConnectionId {
        self.owned = false;
        self.id
    }

    /// The client it belongs to.
    pub fn client(&self) -> &'c IpcClient {
        self.client
    }

    /// Sends `request` and waits for the answer.
    ///
    /// # Errors
    ///
    /// What the server answered, or what became of the session; see [`IpcError`].
    pub fn call(&self, message_type: MessageType, request: &[u8]) -> Result<Vec<u8>> {
        self.call_owned(message_type, request, &CallOptions::default(), Reply::into_vec)?
    }

    /// Sends `request`, waits, and copies the answer into `target`; returns its length. Allocates nothing.
    ///
    /// # Errors
    ///
    /// As for [`Connection::call`]; [`IpcError::ReplyTooLarge`] if the answer is longer than `target`.
    #[inline]
    pub fn call_into(
        &self,
        message_type: MessageType,
        request: &[u8],
        target: &mut [u8],
        options: &CallOptions,
    ) -> Result<usize> {
        let options = CallOptions { reply_capacity: options.reply_capacity.max(target.len()), ..*options };
        self.call_with(message_type, request, &options, |reply| {
            if reply.len() > target.len() {
                return Err(IpcError::ReplyTooLarge(target.len()));
            }
            reply.copy_to(target)
        })?
    }

    /// Sends `request`, waits, and gives the answer to `read`, which may copy what it needs from it.
    ///
    /// # Errors
    ///
    /// As for [`Connection::call`].
    #[inline]
    pub fn call_with<R>(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        read: impl FnOnce(&Reply<'c>) -> R,
    ) -> Result<R> {
        self.call_owned(message_type, request, options, |reply| read(&reply))
    }

    #[inline]
    fn call_owned<R>(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        read: impl FnOnce(Reply<'c>) -> R,
    ) -> Result<R> {
        let client = self.client;
        let options = &CallOptions { pieces: false, ..*options };
        let deadline = options.timeout.and_then(|t| machine::now().checked_add(t));
        if request.len() > LONG {
            let reply = self.call_long(message_type, request, options, deadline)?;
            reply.result()?;
            return Ok(read(reply));
        }
        let id = match self.submit(message_type, request, options) {
            Err(IpcError::WouldBlock) => client.retry_until(deadline, |session| {
                session.submit(self.target(), message_type, request.len(), options, |w| w.write(request))
            })?,
            other => other?,
        };
        let answered = match client.wait_for(id.lane, id.slot, deadline) {
            Err(IpcError::Timeout) => {
                // The slot stays lent until the late answer has come: nobody else can get it (F58).
                client.session()?.abandon(id)?;
                return Err(IpcError::Timeout);
            }
            other => other?,
        };
        let reply = Reply { client, answered };
        reply.result()?;
        Ok(read(reply))
    }

    /// A call whose request goes out in frames, from where the caller has it.
    #[cold]
    fn call_long(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        deadline: Option<Instant>,
    ) -> Result<Reply<'c>> {
        let client = self.client;
        let total = Some(request.len() as u64);
        let start = |session: &mut Session| session.start_body(self.target(), message_type, total, options);
        let id = client.retry_until(deadline, start)?;
        let mut sent = 0;
        let answered = loop {
            if sent < request.len() {
                match client.send(id, &request[sent..]) {
                    Ok(more) => sent += more,
                    // Answered before it was complete.
                    Err(IpcError::NoSuchCall) => sent = request.len(),
                    // What became of it lies among the answers: it may have been started (F50).
                    Err(_) if client.session.borrow().end.is_some() => sent = request.len(),
                    Err(error) => return Err(error),
                }
            }
            let wait = if sent < request.len() {
                client.look_for(id, deadline)
            } else {
                client.wait_for(id.lane, id.slot, deadline).map(Some)
            };
            match wait {
                Ok(Some(answered)) => break answered,
                Ok(None) => {}
                Err(IpcError::Timeout) => {
                    client.session()?.abandon(id)?;
                    return Err(IpcError::Timeout);
                }
                Err(error) => return Err(error),
            }
        };
        Ok(Reply { client, answered })
    }

    /// Starts a call whose request is sent piece by piece with [`IpcClient::send`] and ended with
    /// [`IpcClient::finish`]; its answer comes as that of any submitted call. `body_len` is the length of the request in
    /// bytes where it is known.
    ///
    /// # Errors
    ///
    /// [`IpcError::WouldBlock`] when all slots are in use; [`IpcError::MessageTooLarge`] naming the limit;
    /// [`IpcError::Config`] where the session has fewer than three slots.
    pub fn start(
        &self,
        message_type: MessageType,
        body_len: Option<u64>,
        options: &CallOptions,
    ) -> Result<CallId> {
        self.client.session()?.start_body(self.target(), message_type, body_len, options)
    }

    /// Submits a call without waiting: [`IpcClient::flush`] sends it, [`IpcClient::poll`] brings its answer.
    ///
    /// # Errors
    ///
    /// [`IpcError::WouldBlock`] when all slots or entries are in use: nothing was sent or lost.
    /// [`IpcError::MessageTooLarge`] naming the limit. [`IpcError::Config`] where the session has fewer slots than such a
    /// call takes.
    #[inline(always)]
    pub fn submit(&self, message_type: MessageType, request: &[u8], options: &CallOptions) -> Result<CallId> {
        self.submit_with(message_type, request.len(), options, |writer| writer.write(request))
    }

    /// Submits a call whose request of at most `capacity` bytes is written by `write` right into the slot.
    ///
    /// # Errors
    ///
    /// As for [`Connection::submit`], and whatever `write` returns; then nothing was sent.
    #[inline(always)]
    pub fn submit_with(
        &self,
        message_type: MessageType,
        capacity: usize,
        options: &CallOptions,
        write: impl FnOnce(&mut SlotWriter<'_>) -> Result<()>,
    ) -> Result<CallId> {
        let mut session = self.client.session()?;
        session.submit(self.target(), message_type, capacity, options, write)
    }

    #[inline(always)]
    fn target(&self) -> session::Target {
        session::Target { connection: self.id.number, codec: self.id.codec, bulk: self.id.bulk }
    }
}

impl Drop for Connection<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.owned {
            self.close_now();
        }
    }
}

impl Connection<'_> {
    fn close_now(&self) {
        // A guard that is dropped inside a callback of the same client waits for the next flush.
        if let Ok(mut session) = self.client.session.try_borrow_mut()
            && !session.was_left_behind()
        {
            session.close_later(self.id.number, self.id.bulk);
            // Nobody may come to flush it. Where the kernel refuses the wake, the server's sweep finds the entry.
            if let Err(error) = session.flush() {
                tracing::debug!(%error, "the server could not be woken for a CLOSE");
            }
        }
    }
}

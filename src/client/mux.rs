//! Many callers on one client: whose answer it is that comes, and the frames that wait for their readers.
//!
//! Rule:  a whole answer is copied out at once, so its slot is free whether its caller comes for it or not; a frame of
//!        a stream stays where it is until its reader takes it, and no more come meanwhile (R1.9). Once a stream has
//!        ended what is left of it, a window at most, is copied out too.
//! Bound: as many calls as there are slots, and for each no more than its window of frames.
//! Loss:  `revive.rs` has what becomes of it all when the session is over and another one shall follow.

use super::call::{CallId, CallOptions, Reply};
use super::lane::{Answered, Outcome};
use super::reconnect::{Address, Link, Wanted, ends_soon};
use super::revive::{Again, Revival};
use super::{Connection, ConnectionId, IpcClient};
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::handshake::DisconnectReason;
use doorbell_shm::PeerFault;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Names a call of a [`Mux`] for good: an index, and how many calls there had been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    pub fn index(self) -> usize {
        self.0 as u32 as usize
    }

    /// How many calls there had been.
    pub fn begun(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What has come of a call.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing yet.
    Pending,
    /// The answer, or a frame of it; the call is over if it is the last. Only a last one may be empty.
    Frame { bytes: Vec<u8>, last: bool },
    /// The call is over, and this is why.
    Failed(IpcError),
}

/// A frame of a stream that its reader has not taken.
#[derive(Debug)]
pub(super) enum Frame {
    /// Where the server has put it.
    InPlace(Answered),
    /// Copied out; whether it is the last.
    Copied(Result<Vec<u8>>, bool),
}

#[derive(Debug)]
pub(super) enum State {
    /// To be answered as a whole, or so answered.
    Whole(Option<Result<Vec<u8>>>),
    /// To be answered frame by frame.
    Frames(VecDeque<Frame>),
}

#[derive(Debug)]
pub(super) struct Call<T> {
    pub key: Key,
    /// While it is in flight: what names it in the session.
    pub id: Option<CallId>,
    pub state: State,
    /// Of a client that connects again: what it takes to send it again.
    pub again: Option<Again>,
    data: T,
}

/// A connection: what it was opened with, and its number in the present session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Line {
    pub codec: u8,
    pub bulk: bool,
    pub id: Option<ConnectionId>,
}

/// Why a client cannot be used any more: an error that can be given to many.
#[derive(Debug, Clone)]
pub(super) enum Broken {
    Closed,
    Fault(PeerFault),
    Io(&'static str, Option<i32>),
    Told(DisconnectReason),
    NotRunning(PathBuf),
    Version { min: u16, max: u16, ours: u16 },
    WrongServer(PathBuf, u32),
    SocketPath(PathBuf, &'static str),
    NotPermitted,
    Handshake(&'static str),
    Config(String),
    Forked,
    Died,
}

impl Broken {
    pub fn by(error: &IpcError) -> Self {
        match error {
            IpcError::ClientClosed => Self::Closed,
            IpcError::ServerFault(fault) => Self::Fault(*fault),
            IpcError::Io { call, source } => Self::Io(call, source.raw_os_error()),
            IpcError::Disconnected(reason) => Self::Told(*reason),
            IpcError::NotRunning { path } => Self::NotRunning(path.clone()),
            IpcError::VersionMismatch { min, max, ours } => {
                Self::Version { min: *min, max: *max, ours: *ours }
            }
            IpcError::WrongServer { path, uid } => Self::WrongServer(path.clone(), *uid),
            IpcError::SocketPath { path, problem } => Self::SocketPath(path.clone(), problem),
            IpcError::NotPermitted => Self::NotPermitted,
            IpcError::Handshake(what) => Self::Handshake(what),
            IpcError::Config(what) => Self::Config(what.clone()),
            IpcError::ForkedClient => Self::Forked,
            _ => Self::Died,
        }
    }

    pub fn error(&self) -> IpcError {
        match self {
            Self::Closed => IpcError::ClientClosed,
            Self::Forked => IpcError::ForkedClient,
            Self::Fault(fault) => IpcError::ServerFault(*fault),
            Self::Io(call, code) => {
                let source = code.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
                IpcError::Io { call, source }
            }
            Self::Told(reason) => IpcError::Disconnected(*reason),
            Self::NotRunning(path) => IpcError::NotRunning { path: path.clone() },
            Self::Version { min, max, ours } => {
                IpcError::VersionMismatch { min: *min, max: *max, ours: *ours }
            }
            Self::WrongServer(path, uid) => IpcError::WrongServer { path: path.clone(), uid: *uid },
            Self::SocketPath(path, problem) => IpcError::SocketPath { path: path.clone(), problem },
            Self::NotPermitted => IpcError::NotPermitted,
            Self::Handshake(what) => IpcError::Handshake(what),
            Self::Config(what) => IpcError::Config(what.clone()),
            Self::Died => IpcError::NotExecuted,
        }
    }
}

/// A client, and the calls of all who use it; `T` is what its owner keeps of each.
#[derive(Debug)]
pub(super) struct Mux<T> {
    pub(super) address: Address,
    /// `None` while the client is away from its server.
    pub(super) client: Option<IpcClient>,
    pub(super) lines: Vec<Option<Line>>,
    pub(super) calls: Vec<Option<Call<T>>>,
    vacant: Vec<u32>,
    /// Calls so far.
    pub(super) begun: u32,
    broken: Option<Broken>,
    /// `None`: the client is of no use any more once its session is over.
    pub(super) revival: Option<Box<Revival>>,
}

impl<T> Mux<T> {
    /// Connects, and opens the connection that all calls go on, of this codec and priority. Blocks.
    pub fn connect(address: Address, line: (u8, bool), revives: bool) -> Result<Self> {
        let (codec, bulk) = line;
        let link = address.connect(&[Wanted { at: 0, codec, bulk }])?;
        let mut mux = Self::away(address, revives);
        mux.lines.push(Some(Line { codec, bulk, id: None }));
        mux.attach(link);
        Ok(mux)
    }

    /// Without connections, and not connected yet.
    pub fn away(address: Address, revives: bool) -> Self {
        Self {
            address,
            client: None,
            lines: Vec::new(),
            calls: Vec::new(),
            vacant: Vec::new(),
            begun: 0,
            broken: None,
            revival: revives.then(Box::default),
        }
    }

    /// What to wait on after [`Mux::prepare_to_wait`]; another one in each session.
    pub fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.client.as_ref().map(|client| Arc::clone(&client.socket))
    }

    /// Submits a call on a connection; `data` comes back if that cannot be done, or not now ([`IpcError::WouldBlock`]).
    pub fn submit(
        &mut self,
        line: usize,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        data: T,
    ) -> std::result::Result<Key, (IpcError, T)> {
        if self.broken.is_some() {
            return Err((self.why_broken(), data));
        }
        // Those that are to be sent again were there before.
        self.resend();
        let waits = self.revival.as_ref().is_some_and(|revival| revival.is_sending());
        let (Some(client), false) = (&self.client, waits) else { return Err((IpcError::WouldBlock, data)) };
        let Some(connection) = self.lines.get(line).and_then(|line| line.as_ref()?.id) else {
            return Err((IpcError::ConnectionClosed, data));
        };
        let index = self.vacant.last().copied().unwrap_or(self.calls.len() as u32);
        // No call has the key 0, which is the tag of what is not a caller's.
        let begun = self.begun.wrapping_add(1).max(1);
        let key = Key(u64::from(begun) << 32 | u64::from(index));
        let options = CallOptions { tag: key.0, ..*options };
        let id = match client.attached(connection).submit(message_type, request, &options) {
            Ok(id) => id,
            // Its end is taken note of when all that came before it has been taken.
            Err(error) if self.revival.is_some() && ends_soon(&error) => {
                return Err((IpcError::WouldBlock, data));
            }
            Err(error) => return Err((error, data)),
        };
        let again = self.revival.is_some().then(|| Again::new(client, line, message_type, request, &options));
        self.begun = begun;
        let state = if options.pieces { State::Frames(VecDeque::new()) } else { State::Whole(None) };
        let call = Some(Call { key, id: Some(id), state, again, data });
        match self.vacant.pop() {
            Some(index) => self.calls[index as usize] = call,
            None => self.calls.push(call),
        }
        Ok(key)
    }

    /// Takes note of something that has come for a call; says for which.
    pub fn take(&mut self) -> Result<Option<Key>> {
        if self.broken.is_some() {
            return Err(self.why_broken());
        }
        if let Some(key) = self.take_news() {
            return Ok(Some(key));
        }
        loop {
            let Some(client) = &self.client else { return Ok(None) };
            let next = client.session().and_then(|mut session| session.next());
            let answered = match next {
                Ok(Some(answered)) => answered,
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.lose(error)?;
                    return Ok(self.take_news());
                }
            };
            let key = Key(answered.tag);
            let Some(call) =
                self.calls.get_mut(key.index()).and_then(Option::as_mut).filter(|c| c.key == key)
            else {
                // Nobody waits for it any more.
                client.release(&answered);
                continue;
            };
            if answered.is_last() {
                call.id = None;
            }
            if let (Outcome::Lost { started }, Some(revival)) = (answered.outcome, &mut self.revival) {
                if revival.lost(client, call, &answered, started) {
                    return Ok(Some(key));
                }
                continue;
            }
            match &mut call.state {
                State::Whole(answer) => *answer = Some(copy_out(client, answered).0),
                State::Frames(frames) => note_frame(client, frames, answered),
            }
            return Ok(Some(key));
        }
    }

    /// What has come of a call. One that is over is forgotten with that.
    pub fn next(&mut self, key: Key) -> Next {
        let Some(call) = self.calls.get_mut(key.index()).and_then(Option::as_mut).filter(|c| c.key == key)
        else {
            return Next::Failed(self.why_broken());
        };
        let next = match &mut call.state {
            State::Whole(answer) => answer.take().map(|answer| (answer, true)),
            State::Frames(frames) => next_frame(self.client.as_ref(), frames),
        };
        match next {
            None if self.broken.is_some() => {
                let in_doubt = call.again.as_ref().is_some_and(Again::is_in_doubt);
                self.forget(key);
                Next::Failed(if in_doubt { IpcError::ConnectionLost } else { self.why_broken() })
            }
            None => Next::Pending,
            Some((Ok(bytes), last)) => {
                if let Some(again) = &mut call.again {
                    again.count_frame(&bytes);
                }
                if last {
                    self.forget(key);
                }
                Next::Frame { bytes, last }
            }
            Some((Err(error), _)) => {
                self.drop_call(key);
                Next::Failed(error)
            }
        }
    }

    /// What the owner keeps of a call.
    pub fn data_mut(&mut self, key: Key) -> Option<&mut T> {
        let call = self.calls.get_mut(key.index())?.as_mut()?;
        (call.key == key).then_some(&mut call.data)
    }

    /// What the owner keeps of all calls.
    pub fn all_data(&self) -> impl Iterator<Item = &T> {
        self.calls.iter().flatten().map(|call| &call.data)
    }

    /// The calls that are not over, or whose end has not been taken.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.calls.iter().flatten().map(|call| call.key)
    }

    /// Nobody wants anything of a call any more: cancels it unless it is over, and forgets it.
    pub fn drop_call(&mut self, key: Key) -> Option<T> {
        let call = self.forget(key)?;
        let Some(Ok(mut session)) = self.client.as_ref().map(IpcClient::session) else {
            return Some(call.data);
        };
        if let State::Frames(frames) = call.state {
            for frame in frames {
                if let Frame::InPlace(answered) = frame {
                    session.release(&answered);
                }
            }
        }
        // One whose end has come has no name any more: in this session, or the next, that may be another call's.
        if let Some(id) = call.id
            && let Err(error) = session.abandon(id)
        {
            // The cancel is published all the same; the server's sweep finds it.
            tracing::debug!(%error, "the server could not be woken for a cancel");
        }
        Some(call.data)
    }

    fn forget(&mut self, key: Key) -> Option<Call<T>> {
        let call = self.calls.get_mut(key.index())?.take_if(|call| call.key == key)?;
        self.vacant.push(key.index() as u32);
        Some(call)
    }

    /// Makes the descriptor readable as soon as there is something to take; says whether there is already. `false` while
    /// the client is away. What [`Mux::wakes_at`] says is the caller's to see to.
    pub fn prepare_to_wait(&mut self) -> Result<bool> {
        if self.broken.is_some() {
            return Err(self.why_broken());
        }
        self.resend();
        if self.revival.as_ref().is_some_and(|revival| revival.has_news()) {
            return Ok(true);
        }
        let Some(client) = &self.client else { return Ok(false) };
        let watched = client.session().and_then(|mut session| session.watch_socket());
        self.or_lose(watched)
    }

    /// Calls that have a slot of the session, given up or not.
    pub fn in_flight(&self) -> usize {
        self.client.as_ref().map_or(0, |client| client.session.borrow().in_flight())
    }

    /// Waits until there is something to take, or room for calls that wait for it, by the policy of the client; `false` when
    /// the deadline came first.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<bool> {
        self.resend();
        if self.revival.as_ref().is_some_and(|revival| revival.has_news()) {
            return Ok(true);
        }
        let Some(client) = &self.client else { return Ok(true) };
        let waited = client.session().and_then(|mut session| session.wait_for_any(deadline));
        self.or_lose(waited)
    }

    fn or_lose(&mut self, result: Result<bool>) -> Result<bool> {
        match result {
            Ok(ready) => Ok(ready),
            Err(error) => self.lose(error).map(|()| true),
        }
    }

    /// When something is to be done whether the descriptor becomes readable or not: a call that waits for memory begins
    /// without it.
    pub fn wakes_at(&self) -> Option<Instant> {
        self.client.as_ref()?.session.borrow().wakes_at()
    }

    /// Where the next call comes from, for the choice of lanes: keeps the server's work off this core.
    pub fn keep_off(&mut self, core: u32) {
        if let Some(client) = &self.client {
            client.session.borrow_mut().keep_off(core);
        }
    }

    /// Another session: connections as they are opened go on in it.
    pub fn attach(&mut self, link: Link) {
        let (client, connections) = link;
        for (at, id) in connections {
            match self.lines.get_mut(at).and_then(Option::as_mut) {
                Some(line) => line.id = Some(id),
                // Closed meanwhile.
                None => drop(Connection { client: &client, id, owned: true }),
            }
        }
        self.client = Some(client);
        self.resend();
    }

    /// Takes note of another connection; returns its index.
    pub fn add_line(&mut self, line: Line) -> usize {
        // Calls of one that has been closed still name it.
        let is_named =
            |at| self.calls.iter().flatten().any(|c| c.again.as_ref().is_some_and(|a| a.line == at));
        let free = (0..self.lines.len()).find(|at| self.lines[*at].is_none() && !is_named(*at));
        match free {
            Some(at) => self.lines[at] = Some(line),
            None => self.lines.push(Some(line)),
        }
        free.unwrap_or(self.lines.len() - 1)
    }

    /// Closes a connection. Its calls in flight go on, in this session.
    pub fn close_line(&mut self, at: usize) {
        let line = self.lines.get_mut(at).and_then(Option::take);
        if let (Some(client), Some(id)) = (&self.client, line.and_then(|line| line.id)) {
            drop(Connection { client, id, owned: true });
        }
    }

    /// The connections that the next session is to have.
    pub fn wanted(&self) -> Vec<Wanted> {
        let line = |(at, line): (usize, &Option<Line>)| {
            line.map(|Line { codec, bulk, .. }| Wanted { at, codec, bulk })
        };
        self.lines.iter().enumerate().filter_map(line).collect()
    }

    /// The client cannot be used any more: whoever asks after a call is told why.
    pub fn break_off(&mut self, error: &IpcError) {
        self.broken.get_or_insert_with(|| Broken::by(error));
    }

    /// Whether the client cannot be used any more.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// The error for whoever wants something of a client that cannot be used any more.
    pub fn why_broken(&self) -> IpcError {
        self.broken.as_ref().map_or(IpcError::ClientClosed, Broken::error)
    }
}

/// The bytes of an answer or of a frame, and whether it ends its call; its slot is free then.
fn copy_out(client: &IpcClient, answered: Answered) -> (Result<Vec<u8>>, bool) {
    let reply = Reply { client, answered };
    let last = reply.is_last();
    let bytes = match reply.result() {
        Ok(_) => reply.into_vec(),
        Err(error) => Err(error),
    };
    (bytes, last)
}

/// A frame has come; with the last one all of them are copied out, for the slots of a call that is over are wanted.
fn note_frame(client: &IpcClient, frames: &mut VecDeque<Frame>, answered: Answered) {
    frames.push_back(Frame::InPlace(answered));
    if answered.is_last() {
        for frame in frames {
            if let Frame::InPlace(answered) = frame {
                let (bytes, last) = copy_out(client, *answered);
                *frame = Frame::Copied(bytes, last);
            }
        }
    }
}

/// The next frame that is not empty, or the end.
fn next_frame(client: Option<&IpcClient>, frames: &mut VecDeque<Frame>) -> Option<(Result<Vec<u8>>, bool)> {
    while let Some(frame) = frames.pop_front() {
        let (bytes, last) = match (frame, client) {
            (Frame::InPlace(answered), Some(client)) => copy_out(client, answered),
            // It went with its session, and the end that follows says so.
            (Frame::InPlace(_), None) => continue,
            (Frame::Copied(bytes, last), _) => (bytes, last),
        };
        match bytes {
            // The session has ended since it came; the end that follows says how.
            Err(IpcError::NoSuchCall) if !last => {}
            Ok(bytes) if bytes.is_empty() && !last => {}
            bytes => return Some((bytes, last)),
        }
    }
    None
}

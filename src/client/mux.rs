//! Many callers on one client: whose answer it is that comes, and the frames that wait for their readers.
//!
//! Rule:  a whole answer is copied out at once, so its slot is free whether its caller comes for it or not; a frame of
//!        a stream stays where it is until its reader takes it, and no more come meanwhile (R1.9). Once a stream has
//!        ended what is left of it, a window at most, is copied out too.
//! Bound: as many calls as there are slots, and for each no more than its window of frames.

use super::call::{CallId, CallOptions, Reply};
use super::lane::Answered;
use super::{ClientConfig, ConnectionId, IpcClient};
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::handshake::DisconnectReason;
use doorbell_shm::PeerFault;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Names a call of a [`Mux`] for good: an index, and how many calls there had been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    fn index(self) -> usize {
        self.0 as u32 as usize
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
enum Frame {
    /// Where the server has put it.
    InPlace(Answered),
    /// Copied out; whether it is the last.
    Copied(Result<Vec<u8>>, bool),
}

#[derive(Debug)]
enum State {
    /// To be answered as a whole, or so answered.
    Whole(Option<Result<Vec<u8>>>),
    /// To be answered frame by frame.
    Frames(VecDeque<Frame>),
}

#[derive(Debug)]
struct Call<T> {
    key: Key,
    id: CallId,
    state: State,
    data: T,
}

/// Why a client cannot be used any more: an error that can be given to many.
#[derive(Debug, Clone)]
pub(super) enum Broken {
    Closed,
    Fault(PeerFault),
    Io(&'static str, Option<i32>),
    Told(DisconnectReason),
    NotRunning(PathBuf),
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
            _ => Self::Died,
        }
    }

    pub fn error(&self) -> IpcError {
        match self {
            Self::Closed => IpcError::ClientClosed,
            Self::Fault(fault) => IpcError::ServerFault(*fault),
            Self::Io(call, code) => {
                let source = code.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
                IpcError::Io { call, source }
            }
            Self::Told(reason) => IpcError::Disconnected(*reason),
            Self::NotRunning(path) => IpcError::NotRunning { path: path.clone() },
            Self::Died => IpcError::NotExecuted,
        }
    }
}

/// A client, and the calls of all who use it; `T` is what its owner keeps of each.
#[derive(Debug)]
pub(super) struct Mux<T> {
    client: IpcClient,
    connection: ConnectionId,
    calls: Vec<Option<Call<T>>>,
    vacant: Vec<u32>,
    /// Calls so far.
    begun: u32,
    broken: Option<Broken>,
}

impl<T> Mux<T> {
    /// Connects, and opens the connection that all calls go on. Blocks.
    pub fn connect(path: &Path, config: &ClientConfig) -> Result<Self> {
        let client = IpcClient::connect_with(path, config)?;
        let connection = client.open()?.detach();
        Ok(Self { client, connection, calls: Vec::new(), vacant: Vec::new(), begun: 0, broken: None })
    }

    /// What to wait on after [`Mux::prepare_to_wait`].
    pub fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.client.socket)
    }

    /// Submits a call; `data` comes back if that cannot be done, or not now ([`IpcError::WouldBlock`]).
    pub fn submit(
        &mut self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        data: T,
    ) -> std::result::Result<Key, (IpcError, T)> {
        if self.broken.is_some() {
            return Err((self.why_broken(), data));
        }
        let index = self.vacant.last().copied().unwrap_or(self.calls.len() as u32);
        // No call has the key 0, which is the tag of what is not a caller's.
        let begun = self.begun.wrapping_add(1).max(1);
        let key = Key(u64::from(begun) << 32 | u64::from(index));
        let options = CallOptions { tag: key.0, ..*options };
        let id = match self.client.attached(self.connection).submit(message_type, request, &options) {
            Ok(id) => id,
            Err(error) => return Err((error, data)),
        };
        self.begun = begun;
        let state = if options.pieces { State::Frames(VecDeque::new()) } else { State::Whole(None) };
        let call = Some(Call { key, id, state, data });
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
        loop {
            let Some(answered) = self.client.session.borrow_mut().next()? else { return Ok(None) };
            let key = Key(answered.tag);
            let Some(call) =
                self.calls.get_mut(key.index()).and_then(Option::as_mut).filter(|c| c.key == key)
            else {
                // Nobody waits for it any more.
                self.client.session.borrow_mut().release(&answered);
                continue;
            };
            match &mut call.state {
                State::Whole(answer) => *answer = Some(copy_out(&self.client, answered).0),
                State::Frames(frames) => note_frame(&self.client, frames, answered),
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
            State::Frames(frames) => next_frame(&self.client, frames),
        };
        match next {
            None if self.broken.is_some() => {
                self.forget(key);
                Next::Failed(self.why_broken())
            }
            None => Next::Pending,
            Some((Ok(bytes), last)) => {
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
        let mut session = self.client.session.borrow_mut();
        if let State::Frames(frames) = call.state {
            for frame in frames {
                if let Frame::InPlace(answered) = frame {
                    session.release(&answered);
                }
            }
        }
        if let Err(error) = session.abandon(call.id) {
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

    /// As [`IpcClient::prepare_to_wait`].
    pub fn prepare_to_wait(&mut self) -> Result<bool> {
        self.client.prepare_to_wait()
    }

    /// When something is to be done whether the descriptor becomes readable or not: a call that waits for memory begins
    /// without it.
    pub fn wakes_at(&self) -> Option<Instant> {
        let session = self.client.session.borrow();
        if session.bodies.are_active() { session.body_begins_at() } else { None }
    }

    /// Where calls come from, for the choice of lanes: keeps the server's work off this core.
    pub fn keep_off(&mut self, core: u32) {
        self.client.session.borrow_mut().keep_off(core);
    }

    /// The client cannot be used any more: whoever asks after a call is told why.
    pub fn break_off(&mut self, error: &IpcError) {
        self.broken.get_or_insert_with(|| Broken::by(error));
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
fn next_frame(client: &IpcClient, frames: &mut VecDeque<Frame>) -> Option<(Result<Vec<u8>>, bool)> {
    while let Some(frame) = frames.pop_front() {
        let (bytes, last) = match frame {
            Frame::InPlace(answered) => copy_out(client, answered),
            Frame::Copied(bytes, last) => (bytes, last),
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

//! The clients of a simulation: the shipped ones, joined to a server without a path.

use super::connect::ClientConfig;
use super::mux::{Key, Line, Mux, Next};
use super::reconnect::Address;
use super::session::{Joined, Session};
use super::{CallOptions, Connection, ConnectionId, IpcClient};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::handshake::{Welcome, doorbell_kind};
use doorbell_shm::segment::Segment;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

/// What the handshake came to.
pub(crate) fn join(
    socket: OwnedFd,
    welcome: &Welcome,
    segment: Segment,
    policy: WaitPolicy,
) -> Result<IpcClient> {
    let memory = socket.as_fd().try_clone_to_owned().map_err(|e| IpcError::io("dup", e))?;
    let session = Session::new(Joined {
        segment,
        socket,
        memory,
        clock_offset_ns: 0,
        home_core: welcome.home_core,
        reactors: welcome.reactors,
        max_message: welcome.max_message_size,
        policy,
        rings_sockets: welcome.doorbell_kind == doorbell_kind::SOCKET,
    })?;
    Ok(IpcClient::of(session))
}

/// Closes a connection that was detached.
pub(crate) fn close(client: &IpcClient, id: ConnectionId) {
    drop(Connection { client, id, owned: true });
}

/// When a call that waits for memory is to begin without it.
pub(crate) fn begins_at(client: &IpcClient) -> Option<std::time::Instant> {
    client.session.borrow().body_begins_at()
}

/// How a client stands, for whoever looks why it does not get on.
pub(crate) fn describe(client: &IpcClient) -> String {
    let session = client.session.borrow();
    let lanes: Vec<String> = session.lanes().map(super::lane::Lane::describe).collect();
    format!("{lanes:?} {}", session.bodies.describe())
}

/// Whether a session is over, as far as its client knows.
pub(crate) fn is_over(client: &IpcClient) -> bool {
    client.session.borrow().end.is_some()
}

/// Why a session is over, if it is.
pub(crate) fn why_over(client: &IpcClient) -> Option<IpcError> {
    let session = client.session.borrow();
    session.end.map(|_| session.ended())
}

/// Whether all connections of a client use its home lane as long as it keeps off no core, and may use others then.
pub(crate) fn stays_home(client: &IpcClient) -> bool {
    let session = client.session.borrow();
    session.routes.is_none() && session.segment.lanes() > 1
}

/// A client that many use, and that goes on in the next session.
#[derive(Debug)]
pub(crate) struct Many(Mux<u64>);

/// Names a call of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallKey(Key);

/// What has come of a call.
pub(crate) enum Came {
    Nothing,
    Frame { bytes: Vec<u8>, last: bool },
    Failed(IpcError),
}

impl Many {
    /// With so many connections, every other one of them bulk, and without a session yet.
    pub fn away(lines: usize) -> Self {
        let address = Address::new(PathBuf::from("nowhere"), ClientConfig::default());
        let mut mux = Mux::away(address.expect("random numbers"), true);
        for line in 0..lines {
            mux.add_line(Line { codec: 0, bulk: line % 2 == 1, id: None });
        }
        Self(mux)
    }

    pub fn is_away(&self) -> bool {
        self.0.is_away()
    }

    /// Goes on in this session; connections are opened for it, which may take a while.
    pub fn attach(&mut self, client: IpcClient) -> Result<()> {
        let mut opened = Vec::new();
        for wanted in self.0.wanted() {
            opened.push((wanted.at, client.open_with(wanted.codec, wanted.bulk)?.detach()));
        }
        self.0.attach((client, opened));
        Ok(())
    }

    pub fn submit(
        &mut self,
        line: usize,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
        tag: u64,
    ) -> std::result::Result<CallKey, IpcError> {
        self.0.submit(line, message_type, request, options, tag).map(CallKey).map_err(|(error, _)| error)
    }

    /// Where the next call comes from.
    pub fn keep_off(&mut self, core: u32) {
        self.0.keep_off(core);
    }

    /// The lane of a call that is in flight.
    pub fn lane_of(&self, key: CallKey) -> Option<u32> {
        self.0.calls.iter().flatten().find(|call| call.key == key.0)?.id.map(|id| id.lane())
    }

    /// Takes note of what has come; returns for which calls.
    pub fn take(&mut self) -> Result<Option<(CallKey, u64)>> {
        let Some(key) = self.0.take()? else { return Ok(None) };
        Ok(self.0.data_mut(key).map(|tag| (CallKey(key), *tag)))
    }

    pub fn next(&mut self, key: CallKey) -> Came {
        match self.0.next(key.0) {
            Next::Pending => Came::Nothing,
            Next::Frame { bytes, last } => Came::Frame { bytes, last },
            Next::Failed(error) => Came::Failed(error),
        }
    }

    pub fn cancel(&mut self, key: CallKey) {
        self.0.cancel(key.0);
    }

    pub fn drop_call(&mut self, key: CallKey) {
        self.0.drop_call(key.0);
    }

    pub fn prepare_to_wait(&mut self) -> Result<bool> {
        self.0.prepare_to_wait()
    }

    pub fn socket(&self) -> Option<Arc<OwnedFd>> {
        self.0.socket()
    }

    pub fn take_reason(&mut self) -> Option<IpcError> {
        self.0.take_reason()
    }

    /// When something is due by the clock.
    pub fn wakes(&self) -> Option<std::time::Instant> {
        [self.0.wakes_at(), self.0.expires_at()].into_iter().flatten().min()
    }

    pub fn expire(&mut self) {
        self.0.expire(crate::machine::now());
    }
}

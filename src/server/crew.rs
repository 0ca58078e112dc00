//! How the reactors of a server talk to each other: off the message path, about sessions and connections.
//!
//! Each reactor has an inbox (a channel of the standard library) and a ring; whoever has put a message in rings
//! with MSG_RING. No call ever waits for any of this: a reactor decides by what it has been told.
//!
//! Order: messages of one sender arrive in order. The home reactor tells the others of a connection *before* it
//! completes the client's OPEN, so whoever uses a connection that a look at the inbox does not bring lies (P6).

use super::core::SessionId;
use super::storm::Abuse;
use crate::protocol::handshake::NO_CORE;
use doorbell_shm::PeerFault;
use doorbell_shm::segment::Segment;
use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// What the home reactor tells the others of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    Opened { number: u32, codec: u8, bulk: bool },
    Closed { number: u32 },
}

/// What one reactor tells another.
#[derive(Debug)]
pub(crate) enum Message {
    /// From home: a connection of a session that has a lane there. Not worth ringing for.
    Notice(SessionId, Notice),
    /// From home: take this lane, and tell the client.
    Lane { id: SessionId, number: u32, segment: Arc<Segment>, socket: Arc<OwnedFd> },
    /// From home: the session is over.
    End(SessionId),
    /// To home: this session broke the protocol on a further lane.
    Fault(SessionId, PeerFault),
    /// To home: this session rings without cause.
    Abuse(SessionId, Abuse),
    /// From home: the server stops.
    Stop,
}

/// How to reach one reactor.
#[derive(Debug)]
pub(crate) struct Address {
    sender: Sender<Message>,
    ring: OwnedFd,
    /// The core that it is pinned to, or [`NO_CORE`].
    pub core: u32,
}

impl Address {
    /// The address of a reactor with this ring, and its inbox.
    pub fn new(ring: OwnedFd, core: Option<usize>) -> (Self, Inbox) {
        let (sender, receiver) = channel();
        let core = core.map_or(NO_CORE, |core| core as u32);
        (Self { sender, ring, core }, Inbox { receiver: Some(receiver), backlog: VecDeque::new() })
    }

    /// Puts a message into the inbox; `false` if its reactor has ended.
    pub fn put(&self, message: Message) -> bool {
        self.sender.send(message).is_ok()
    }

    /// The ring to send MSG_RING to.
    pub fn ring(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.ring.as_fd()
    }
}

/// All reactors, seen from one of them. Reactor 0 is the home of every session.
#[derive(Debug, Clone)]
pub(crate) struct Crew {
    pub own: usize,
    pub addresses: Arc<[Address]>,
}

impl Crew {
    /// Whether this is the reactor that sessions are at home with.
    pub fn is_home(&self) -> bool {
        self.own == 0
    }

    /// The core that this reactor is pinned to, or [`NO_CORE`].
    pub fn core(&self) -> u32 {
        self.addresses[self.own].core
    }
}

/// What others have told one reactor.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    receiver: Option<Receiver<Message>>,
    /// Messages that a look for notices has passed by.
    backlog: VecDeque<Message>,
}

impl Inbox {
    /// The next notice with the index of its session, whatever else has come before it. A notice may overtake
    /// other messages: it speaks of connections that exist now, and they of sessions that begin or end.
    pub fn next_notice(&mut self) -> Option<(u32, Notice)> {
        loop {
            match self.receive()? {
                Message::Notice(id, notice) => return Some((id.index, notice)),
                other => self.backlog.push_back(other),
            }
        }
    }

    /// The next message that a look for notices has passed by.
    pub fn next(&mut self) -> Option<Message> {
        self.backlog.pop_front()
    }

    fn receive(&mut self) -> Option<Message> {
        self.receiver.as_ref()?.try_recv().ok()
    }
}

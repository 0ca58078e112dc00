//! How the reactors of a server talk to each other: off the message path, about sessions and connections.
//!
//! Each reactor has an inbox (a channel of the standard library) and a ring; whoever has put a message in rings
//! with MSG_RING. No call ever waits for any of this: a reactor decides by what it has been told.
//!
//! Order: messages of one sender arrive in order. The home reactor tells the others of a connection *before* it
//! completes the client's OPEN, so whoever uses a connection that a look at the inbox does not bring lies (P6).

use super::core::SessionId;
use super::inspect::Part;
use super::jobs::Ticket;
use super::storm::Abuse;
use crate::config::Movable;
use crate::inspect::Inquiry;
use crate::protocol::handshake::{DisconnectReason, NO_CORE};
use doorbell_shm::PeerFault;
use doorbell_shm::segment::Segment;
use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// What the home reactor tells the others of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    Opened {
        number: u32,
        codec: u8,
        bulk: bool,
    },
    Closed {
        number: u32,
    },
    /// The session has ended, and its connections with it.
    Ended,
}

/// The bell of a further lane where reactors sleep on sockets.
#[derive(Debug)]
pub(crate) struct BellSocket {
    pub ours: OwnedFd,
    pub theirs: OwnedFd,
}

/// What one reactor tells another.
#[derive(Debug)]
pub(crate) enum Message {
    /// From home: a connection of a session that has a lane there. Not worth ringing for.
    Notice(SessionId, Notice),
    /// From home: take this lane, and tell the client.
    Lane { id: SessionId, number: u32, segment: Arc<Segment>, socket: Arc<OwnedFd>, bell: Option<BellSocket> },
    /// From home: the session is over.
    End(SessionId),
    /// To home: this session broke the protocol on a further lane.
    Fault(SessionId, PeerFault),
    /// To home: the bell of a lane of this session cannot be armed.
    Unarmed(SessionId),
    /// To home: this session rings without cause.
    Abuse(SessionId, Abuse),
    /// From home: the client has made pages exist that it was not granted; punch those of your lane.
    Punch(SessionId),
    /// To any: tell reactor `from` what you have.
    Inspect { ticket: Ticket, inquiry: Inquiry, from: u32 },
    /// What reactor `of` has, for the report of this ticket.
    Inspected { ticket: Ticket, part: Box<Part>, of: u32 },
    /// To home: somebody wants this session to end.
    Evict(SessionId),
    /// From home: these limits hold from now on.
    Limits(Box<Movable>),
    /// To home: the lane of this session here is idle, or is no longer.
    Idle(SessionId, bool),
    /// To home: this session is to be ended for that reason; its lane here has gone.
    EndFor(SessionId, DisconnectReason),
    /// From home: begin no more calls, finish those under way.
    Drain,
    /// To home: no call of this session is under way here, and its lane here has gone.
    Quiet(SessionId),
    /// From home: the server stops, whatever is under way.
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

    /// The ring to send MSG_RING to, or the eventfd.
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
    /// The next notice with the index of its session, whatever else has come before it. Notices keep their order
    /// among themselves, and the end of a session is one of them: its index may be another's in the next notice.
    pub fn next_notice(&mut self) -> Option<(u32, Notice)> {
        loop {
            match self.receive()? {
                Message::Notice(id, notice) => return Some((id.index, notice)),
                Message::End(id) => {
                    self.backlog.push_back(Message::End(id));
                    return Some((id.index, Notice::Ended));
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::connections::Attached::{NotOpen, Otherwise, Usable};
    use crate::server::connections::ConnectionPool;
    use std::os::fd::AsFd;

    /// Goal:   P6: what is told of a session's connections is not undone by the end of the session that had its
    ///         index before, although notices overtake other messages.
    /// Method: an end, a beginning and an OPEN of the same index in one go; then the same once more.
    #[test]
    fn p6_the_end_of_a_session_does_not_close_the_connections_of_the_next_one() {
        let ring = std::io::stderr().as_fd().try_clone_to_owned().unwrap();
        let (address, mut inbox) = Address::new(ring, None);
        let mut pool = ConnectionPool::on_demand(8);
        for generation in 1..3 {
            let (old, new) =
                (SessionId { index: 0, generation }, SessionId { index: 0, generation: generation + 1 });
            let number = generation << 20;
            assert!(address.put(Message::End(old)));
            assert!(address.put(Message::Notice(new, Notice::Opened { number, codec: 1, bulk: true })));
            pool.follow(&mut inbox);
            assert_eq!(pool.attach(0, number - (1 << 20), 1, true), NotOpen, "the old one's is gone");
            assert_eq!([pool.attach(0, number, 0, true), pool.attach(0, number, 1, false)], [Otherwise; 2]);
            assert!(pool.get(0, number).is_none(), "not before it is attached");
            assert!(pool.attach(0, number, 1, true) == Usable && pool.get(0, number).is_some());
            assert!(matches!(inbox.next(), Some(Message::End(id)) if id == old));
            assert!(inbox.next().is_none());
        }
        assert!(
            address.put(Message::Notice(
                SessionId { index: 0, generation: 3 },
                Notice::Closed { number: 2 << 20 }
            ))
        );
        pool.follow(&mut inbox);
        assert!(pool.get(0, 2 << 20).is_none() && pool.attach(0, 2 << 20, 1, true) == NotOpen);
    }
}

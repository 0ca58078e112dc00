//! Long bodies over unix stream sockets: each is its length and tag, then its bytes, in whatever chunks the socket takes.
//! Nobody has a whole body in memory; bodies of one connection go one after another.

use super::error::BenchError;
use super::long::{FRAME_MAX, Frame, LongTarget, Outgoing};
use super::options::Policy;
use super::uds::{Inbox, Outbox, Poller, UdsError, pause};
use super::work;
use super::worker::{self, ClientJob};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes received at once, at most.
pub const INBOX: usize = 64 << 10;

/// What is left of the body that is coming in.
#[derive(Debug, Default)]
pub struct Incoming {
    tag: u32,
    at: usize,
    left: usize,
}

/// Bytes of a body that have come.
struct Part<'b> {
    tag: u32,
    /// Their place in the body.
    at: usize,
    bytes: &'b [u8],
    /// They end it.
    last: bool,
}

impl Incoming {
    /// The next bytes of the body that is coming in, at most [`FRAME_MAX`]; `None` if none are there. `begins` hears
    /// of each header.
    fn next<'b>(
        &mut self,
        inbox: &'b mut Inbox,
        mut begins: impl FnMut(u32, usize),
    ) -> Result<Option<Part<'b>>, UdsError> {
        if self.left == 0 {
            let Some((tag, len)) = inbox.header()? else { return Ok(None) };
            *self = Self { tag, at: 0, left: len };
            begins(tag, len);
        }
        let bytes = inbox.bytes(self.left.min(FRAME_MAX));
        if bytes.is_empty() {
            return Ok(None);
        }
        let at = self.at;
        self.at += bytes.len();
        self.left -= bytes.len();
        Ok(Some(Part { tag: self.tag, at, bytes, last: self.left == 0 }))
    }

    /// Server: answers all that has been received, as it comes.
    pub fn answer(
        &mut self,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
        fd: BorrowedFd<'_>,
    ) -> Result<(), UdsError> {
        while let Some(Part { at, bytes, .. }) = self.next(inbox, |tag, len| outbox.header(tag, len))? {
            outbox.extend(bytes.len(), |reply| work::answer_at(at as u64, bytes, reply));
        }
        // It may sleep: the client never sleeps on sending, so it takes the answers.
        outbox.send(fd, SendFlags::empty()).map(|_| ())
    }
}

/// One connection of the client's.
#[derive(Debug)]
struct Stream {
    fd: OwnedFd,
    inbox: Inbox,
    incoming: Incoming,
    outbox: Outbox,
    /// Bodies to be sent, the first one being the one that is.
    turns: VecDeque<u32>,
    /// The header of the first one has been sent.
    begun: bool,
}

/// Connects the sessions of one client process; a session is as many sockets as it has connections.
#[derive(Debug)]
pub struct Connector {
    connector: super::uds::Sockets,
    policy: Policy,
    yields: bool,
    size: usize,
    streams: Vec<Stream>,
}

impl Connector {
    /// Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`BenchError`] if the address is none or descriptors are short.
    pub fn new(job: &ClientJob) -> Result<Self, BenchError> {
        Ok(Self {
            connector: super::uds::Sockets::new(&job.endpoint)?,
            policy: job.policy,
            yields: job.shares_core,
            size: job.shape.size,
            streams: Vec::new(),
        })
    }

    fn connect_one(&mut self) -> Result<(), UdsError> {
        let fd = self.connector.connect()?;
        let inbox = Inbox::of_bytes(INBOX, self.size);
        let (incoming, outbox) = (Incoming::default(), Outbox::default());
        self.streams.push(Stream { fd, inbox, incoming, outbox, turns: VecDeque::new(), begun: false });
        Ok(())
    }
}

impl worker::Connector for Connector {
    type Target = LongUdsTarget;

    fn begin(&mut self, _sessions: usize) -> Result<(), BenchError> {
        Ok(())
    }

    fn connect(&mut self, _index: usize, connections: usize) -> Result<(), BenchError> {
        (0..connections).try_for_each(|_| self.connect_one()).map_err(|e| BenchError::peer("connecting", e))
    }

    fn finish(self) -> Result<LongUdsTarget, BenchError> {
        let fds = self.streams.iter().map(|stream| stream.fd.as_fd());
        let poller = Poller::new(fds).map_err(|e| BenchError::peer("connecting", e))?;
        Ok(LongUdsTarget {
            streams: self.streams,
            owners: Vec::new(),
            poller,
            spins: self.policy == Policy::Spin,
            yields: self.yields,
            ready: VecDeque::new(),
        })
    }
}

/// All connections of one client process.
pub struct LongUdsTarget {
    streams: Vec<Stream>,
    /// The connection of each body, by tag.
    owners: Vec<usize>,
    poller: Poller,
    spins: bool,
    yields: bool,
    /// Connections that have received something since they were last looked through.
    ready: VecDeque<usize>,
}

impl LongUdsTarget {
    /// Receives from whoever has something, waiting at most so long for the first.
    fn poll(&mut self, at_most_ns: u64) -> Result<(), UdsError> {
        if let ([stream], 0) = (self.streams.as_mut_slice(), at_most_ns) {
            // A single connection needs no epoll.
            if stream.inbox.refill(stream.fd.as_fd(), RecvFlags::DONTWAIT)? {
                self.ready.push_back(0);
            }
            return Ok(());
        }
        self.poller.wait(Some(at_most_ns))?;
        for i in self.poller.ready() {
            let stream = &mut self.streams[i];
            if stream.inbox.refill(stream.fd.as_fd(), RecvFlags::DONTWAIT)? {
                self.ready.push_back(i);
            }
        }
        Ok(())
    }
}

impl LongTarget for LongUdsTarget {
    type Error = UdsError;

    /// Never refuses: bodies of one connection have their turns.
    fn try_start(&mut self, connection: usize, tag: u32, _size: usize) -> Result<bool, UdsError> {
        self.streams[connection].turns.push_back(tag);
        let tag = tag as usize;
        self.owners.resize(self.owners.len().max(tag + 1), 0);
        self.owners[tag] = connection;
        Ok(true)
    }

    fn try_send(&mut self, tag: u32, body: &Outgoing) -> Result<usize, UdsError> {
        let stream = &mut self.streams[self.owners[tag as usize]];
        if stream.turns.front() != Some(&tag)
            || !stream.outbox.send(stream.fd.as_fd(), SendFlags::DONTWAIT)?
        {
            return Ok(0);
        }
        if !stream.begun {
            stream.outbox.header(tag, body.left());
            stream.begun = true;
        }
        let len = body.left().min(FRAME_MAX);
        let outbox = &mut stream.outbox;
        body.write(len, |part| {
            outbox.append(part);
            Ok::<(), UdsError>(())
        })?;
        if len == body.left() {
            stream.turns.pop_front();
            stream.begun = false;
        }
        stream.outbox.send(stream.fd.as_fd(), SendFlags::DONTWAIT)?;
        Ok(len)
    }

    fn try_receive(&mut self, frame: &mut [u8]) -> Result<Option<Frame>, UdsError> {
        loop {
            while let Some(i) = self.ready.front() {
                let stream = &mut self.streams[*i];
                if let Some(Part { tag, bytes, last, .. }) =
                    stream.incoming.next(&mut stream.inbox, |_, _| {})?
                {
                    frame[..bytes.len()].copy_from_slice(bytes);
                    return Ok(Some(Frame { tag, len: bytes.len(), ok: true, last }));
                }
                self.ready.pop_front();
            }
            self.poll(0)?;
            if self.ready.is_empty() {
                return Ok(None);
            }
        }
    }

    /// What a socket did not take is sent when it has room: after the next answer, or a short sleep.
    fn flush(&mut self) -> Result<(), UdsError> {
        Ok(())
    }

    fn wait(&mut self, at_most_ns: u64) -> Result<(), UdsError> {
        let mut stuck = false;
        for stream in &mut self.streams {
            stuck |= !stream.outbox.send(stream.fd.as_fd(), SendFlags::DONTWAIT)?;
        }
        if self.spins {
            pause(self.yields);
            return Ok(());
        }
        self.poll(if stuck { at_most_ns.min(super::uds::STALLED_NS) } else { at_most_ns })
    }
}

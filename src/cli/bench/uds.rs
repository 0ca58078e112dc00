//! The peer `uds`: what everybody would use instead, a unix stream socket, with the same work and checks.
//!
//! A frame is its length and a tag (32 bits each, little-endian) and the payload. Both sides are as good as
//! plain sockets allow: whatever is there is read at once, all answers to it leave in one write, and one
//! connection that sleeps needs two system calls per round trip.
//!
//! Server: `block` runs one thread per connection up to [`THREADS_MAX`], each asleep in `recv`; beyond that,
//! and with `spin`, one thread serves all, from epoll (which it polls with `spin`), or, for a single
//! connection that spins, straight from `recv`. The client always drives all connections from one thread.

use super::child::{self, Role};
use super::clock::timespec;
use super::error::BenchError;
use super::load::{Received, Target};
use super::options::{BenchOptions, Policy, SLOT_MAX};
use super::placement::{self, Cpus};
use super::procfs;
use super::server::Server;
use super::uds_long::{self, Incoming};
use super::work;
use super::worker::{self, ClientJob};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;
use std::time::Duration;

/// Connections up to which a server that sleeps has a thread for each.
pub const THREADS_MAX: usize = 64;

const HEADER: usize = 8;
/// What a receive buffer holds at least: several small frames.
const INBOX_MIN: usize = 4 << 10;
const EVENTS: usize = 256;
/// How long a receive that sleeps sleeps at most, so that a server that hangs is noticed.
const RECV_TIMEOUT: Duration = Duration::from_millis(100);
/// How long to wait for answers while a request has not been written in full.
pub(super) const STALLED_NS: u64 = 100_000;

/// What went wrong on a socket.
#[derive(Debug, thiserror::Error)]
pub enum UdsError {
    /// The kernel refused a call.
    #[error("{call}: {source}")]
    Os {
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// A frame of another length than agreed.
    #[error("a frame of {len} bytes where all have {expected}")]
    Frame {
        /// The length it states.
        len: usize,
        /// The agreed one.
        expected: usize,
    },
}

fn os(call: &'static str) -> impl Fn(Errno) -> UdsError {
    move |e| UdsError::Os { call, source: e.into() }
}

/// Bytes received and not yet taken.
#[derive(Debug)]
pub struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    size: usize,
}

impl Inbox {
    fn new(size: usize, in_flight: usize) -> Self {
        let frames = (in_flight.min(16) * (HEADER + size)).max(HEADER + size).max(INBOX_MIN);
        Self { bytes: vec![0; frames].into_boxed_slice(), start: 0, end: 0, size }
    }

    /// An inbox of `len` bytes for bodies of `size` that pass through it in parts.
    pub fn of_bytes(len: usize, size: usize) -> Self {
        Self { bytes: vec![0; len].into_boxed_slice(), start: 0, end: 0, size }
    }

    /// Receives once. `false` if nothing was there.
    pub fn refill(&mut self, fd: BorrowedFd<'_>, flags: RecvFlags) -> Result<bool, UdsError> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match rustix::net::recv(fd, &mut self.bytes[self.end..], flags) {
            Ok((0, _)) => Err(UdsError::Closed),
            Ok((n, _)) => {
                self.end += n;
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::CONNRESET) => Err(UdsError::Closed),
            Err(e) => Err(os("recv")(e)),
        }
    }

    /// The oldest whole frame, as its tag and payload.
    fn next(&mut self) -> Result<Option<(u32, &[u8])>, UdsError> {
        let frame = &self.bytes[self.start..self.end];
        let Some((header, rest)) = frame.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (tag, len) = self.parse(header)?;
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        self.start += HEADER + len;
        Ok(Some((tag, payload)))
    }

    fn parse(&self, header: &[u8; HEADER]) -> Result<(u32, usize), UdsError> {
        let word = u64::from_le_bytes(*header);
        let (len, tag) = (word as u32 as usize, (word >> 32) as u32);
        if len == self.size { Ok((tag, len)) } else { Err(UdsError::Frame { len, expected: self.size }) }
    }

    /// Takes the header of a body: its tag and length.
    pub fn header(&mut self) -> Result<Option<(u32, usize)>, UdsError> {
        let Some(header) = self.bytes[self.start..self.end].first_chunk() else { return Ok(None) };
        let parsed = self.parse(header)?;
        self.start += HEADER;
        Ok(Some(parsed))
    }

    /// Takes what is there, at most so many bytes.
    pub fn bytes(&mut self, at_most: usize) -> &[u8] {
        let start = self.start;
        self.start = self.end.min(start + at_most);
        &self.bytes[start..self.start]
    }
}

/// Bytes to be sent.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    fn for_frames(size: usize, frames: usize) -> Self {
        Self { bytes: Vec::with_capacity(frames * (HEADER + size)), sent: 0 }
    }

    /// Appends `len` bytes that `write` writes.
    pub fn extend(&mut self, len: usize, write: impl FnOnce(&mut [u8])) {
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        write(&mut self.bytes[at..]);
    }

    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends the header of a frame or body.
    pub fn header(&mut self, tag: u32, len: usize) {
        self.bytes.extend_from_slice(&(len as u64 | u64::from(tag) << 32).to_le_bytes());
    }

    /// Sends all that it can. `false` if the socket's buffer is full.
    pub fn send(&mut self, fd: BorrowedFd<'_>, flags: SendFlags) -> Result<bool, UdsError> {
        while self.sent < self.bytes.len() {
            match rustix::net::send(fd, &self.bytes[self.sent..], flags | SendFlags::NOSIGNAL) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(UdsError::Closed),
                Err(e) => return Err(os("send")(e)),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(true)
    }
}

/// One connection, on either side.
#[derive(Debug)]
struct Line {
    fd: OwnedFd,
    inbox: Inbox,
    outbox: Outbox,
    /// At a server of long bodies: the one that is coming in.
    incoming: Option<Incoming>,
}

impl Line {
    fn new(fd: OwnedFd, size: usize, in_flight: usize) -> Self {
        let (inbox, outbox) = (Inbox::new(size, in_flight), Outbox::for_frames(size, in_flight));
        Self { fd, inbox, outbox, incoming: None }
    }

    /// Server: a connection whose bodies pass through it in parts.
    fn of_long(fd: OwnedFd, size: usize) -> Self {
        let inbox = Inbox::of_bytes(uds_long::INBOX, size);
        Self { fd, inbox, outbox: Outbox::default(), incoming: Some(Incoming::default()) }
    }

    /// Server: receives once and answers all that came. `false` if nothing did. The answers may sleep: the
    /// client never sleeps on sending, so it takes them.
    fn serve(&mut self, flags: RecvFlags) -> Result<bool, UdsError> {
        if !self.inbox.refill(self.fd.as_fd(), flags)? {
            return Ok(false);
        }
        if let Some(incoming) = &mut self.incoming {
            incoming.answer(&mut self.inbox, &mut self.outbox, self.fd.as_fd())?;
            return Ok(true);
        }
        while let Some((tag, request)) = self.inbox.next()? {
            self.outbox.header(tag, request.len());
            self.outbox.extend(request.len(), |reply| work::answer(request, reply));
        }
        self.outbox.send(self.fd.as_fd(), SendFlags::empty())?;
        Ok(true)
    }

    /// Server: serves until the client closes.
    fn serve_until_closed(mut self, flags: RecvFlags, yields: bool) -> Result<(), UdsError> {
        loop {
            match self.serve(flags) {
                Ok(true) => {}
                Ok(false) => pause(yields),
                Err(UdsError::Closed) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }
}

/// An empty poll.
pub fn pause(yields: bool) {
    if yields {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// Which connections have something to receive.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
}

impl Poller {
    /// Watches the sockets, which are numbered in this order.
    pub fn new<'f>(fds: impl Iterator<Item = BorrowedFd<'f>>) -> Result<Self, UdsError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(os("epoll_create1"))?;
        for (i, fd) in fds.enumerate() {
            epoll::add(&epoll, fd, EventData::new_u64(i as u64), EventFlags::IN).map_err(os("epoll_ctl"))?;
        }
        Ok(Self { epoll, events: Vec::with_capacity(EVENTS) })
    }

    /// Waits; afterwards [`Poller::ready`] says for whom.
    pub fn wait(&mut self, at_most_ns: Option<u64>) -> Result<(), UdsError> {
        self.events.clear();
        let timeout = at_most_ns.map(timespec);
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(os("epoll_wait")(e)),
        }
    }

    /// Who has something.
    pub fn ready(&self) -> impl Iterator<Item = usize> {
        self.events.iter().map(|event| event.data.u64() as usize)
    }
}

/// What a server process is told.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct UdsJob {
    /// Connections to accept.
    pub connections: usize,
    /// Calls in flight on each.
    pub in_flight: usize,
    /// Bytes of each request.
    pub size: usize,
    /// How to wait.
    pub policy: Policy,
    /// The core to run on.
    pub cpu: Option<usize>,
    /// Whether clients run on the same core: then an empty poll yields.
    pub yields: bool,
}

/// The listener's address, made by the kernel: abstract, free, gone with the listener.
pub fn listen() -> Result<(OwnedFd, String), UdsError> {
    let fd = socket()?;
    let unnamed = SocketAddrUnix::new_unnamed();
    rustix::net::bind(&fd, &unnamed).map_err(os("bind"))?;
    rustix::net::listen(&fd, 4096).map_err(os("listen"))?;
    let address = SocketAddrUnix::try_from(rustix::net::getsockname(&fd).map_err(os("getsockname"))?);
    let name =
        address.map_err(os("getsockname"))?.abstract_name().map(|name| name.to_vec()).unwrap_or_default();
    // The kernel's own choice is five hexadecimal digits.
    Ok((fd, String::from_utf8_lossy(&name).into_owned()))
}

fn socket() -> Result<OwnedFd, UdsError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(os("socket"))
}

/// Starts the server process. To be called from the main thread, with whose death it ends.
///
/// # Errors
///
/// [`BenchError`] if socket or process cannot be had.
pub fn start_server(options: &BenchOptions, cpus: &Cpus) -> Result<Server, BenchError> {
    let (fd, endpoint) = listen().map_err(|e| BenchError::peer("listening", e))?;
    let job = UdsJob {
        connections: options.connections,
        in_flight: options.in_flight,
        size: options.size,
        policy: options.policy,
        cpu: cpus.server,
        yields: cpus.shared,
    };
    let process = child::spawn(Role::UdsServer, &job, Stdio::from(fd), Stdio::null())?;
    Ok(Server::of_process(process, endpoint))
}

/// The server process itself: accepts all connections, then serves them until they are closed.
///
/// # Errors
///
/// [`BenchError`] if the kernel refuses something or a client breaks the protocol.
pub fn uds_server(listener: OwnedFd, job: &UdsJob) -> Result<(), BenchError> {
    placement::pin(job.cpu)?;
    procfs::raise_descriptor_limit()?;
    serve(&listener, job).map_err(|e| BenchError::peer("serving", e))
}

fn serve(listener: &OwnedFd, job: &UdsJob) -> Result<(), UdsError> {
    let accept = |_| {
        let fd = rustix::net::accept_with(listener, SocketFlags::CLOEXEC).map_err(os("accept"))?;
        Ok(match job.size > SLOT_MAX {
            true => Line::of_long(fd, job.size),
            false => Line::new(fd, job.size, job.in_flight),
        })
    };
    let mut lines = (0..job.connections).map(accept).collect::<Result<Vec<_>, _>>()?;
    let spins = job.policy == Policy::Spin;
    match lines.len() {
        1 if spins => lines.remove(0).serve_until_closed(RecvFlags::DONTWAIT, job.yields),
        n if n <= THREADS_MAX && !spins => serve_by_threads(lines),
        _ => serve_by_polling(lines, spins, job.yields),
    }
}

fn serve_by_threads(lines: Vec<Line>) -> Result<(), UdsError> {
    let serve = |line: Line| std::thread::spawn(move || line.serve_until_closed(RecvFlags::empty(), false));
    let threads: Vec<_> = lines.into_iter().map(serve).collect();
    threads.into_iter().try_for_each(|thread| thread.join().expect("a serving thread does not panic"))
}

fn serve_by_polling(lines: Vec<Line>, spins: bool, yields: bool) -> Result<(), UdsError> {
    let mut poller = Poller::new(lines.iter().map(|line| line.fd.as_fd()))?;
    let mut open = lines.len();
    let mut lines: Vec<Option<Line>> = lines.into_iter().map(Some).collect();
    while open > 0 {
        poller.wait(spins.then_some(0))?;
        if poller.events.is_empty() {
            pause(yields);
        }
        for i in poller.ready() {
            match lines[i].as_mut().map(|line| line.serve(RecvFlags::DONTWAIT)) {
                Some(Err(UdsError::Closed)) => {
                    lines[i] = None;
                    open -= 1;
                }
                Some(Err(e)) => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Makes sockets that are connected to the server.
#[derive(Debug)]
pub struct Sockets(SocketAddrUnix);

impl Sockets {
    /// For the server at `endpoint`.
    ///
    /// # Errors
    ///
    /// [`BenchError`] if the address is none or descriptors are short.
    pub fn new(endpoint: &str) -> Result<Self, BenchError> {
        procfs::raise_descriptor_limit()?;
        SocketAddrUnix::new_abstract_name(endpoint.as_bytes())
            .map(Self)
            .map_err(|e| BenchError::os("the server's address", e))
    }

    /// One more.
    ///
    /// # Errors
    ///
    /// [`UdsError::Os`] if the kernel refuses.
    pub fn connect(&self) -> Result<OwnedFd, UdsError> {
        let fd = socket()?;
        rustix::net::connect(&fd, &self.0).map_err(os("connect"))?;
        set_socket_timeout(&fd, Timeout::Recv, Some(RECV_TIMEOUT)).map_err(os("setsockopt(SO_RCVTIMEO)"))?;
        Ok(fd)
    }
}

/// Connects the sessions of one client process; a session is as many sockets as it has connections.
#[derive(Debug)]
pub struct Connector {
    sockets: Sockets,
    job: ClientJob,
    lines: Vec<Line>,
}

impl Connector {
    /// Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`BenchError`] if the address is none or descriptors are short.
    pub fn new(job: &ClientJob) -> Result<Self, BenchError> {
        Ok(Self {
            sockets: Sockets::new(&job.endpoint)?,
            job: job.clone(),
            lines: Vec::with_capacity(job.shape.connections),
        })
    }

    fn connect_one(&mut self) -> Result<(), UdsError> {
        let fd = self.sockets.connect()?;
        self.lines.push(Line::new(fd, self.job.shape.size, self.job.shape.in_flight));
        Ok(())
    }
}

impl worker::Connector for Connector {
    type Target = UdsTarget;

    fn begin(&mut self, _sessions: usize) -> Result<(), BenchError> {
        Ok(())
    }

    fn connect(&mut self, _index: usize, connections: usize) -> Result<(), BenchError> {
        (0..connections).try_for_each(|_| self.connect_one()).map_err(|e| BenchError::peer("connecting", e))
    }

    fn finish(self) -> Result<UdsTarget, BenchError> {
        let fds = self.lines.iter().map(|line| line.fd.as_fd());
        let poller = Poller::new(fds).map_err(|e| BenchError::peer("connecting", e))?;
        let count = self.lines.len();
        Ok(UdsTarget {
            lines: self.lines,
            poller,
            spins: self.job.policy == Policy::Spin,
            yields: self.job.shares_core,
            ready: VecDeque::with_capacity(count + EVENTS),
            dirty: Vec::with_capacity(count + 1),
        })
    }
}

/// All connections of one client process.
pub struct UdsTarget {
    lines: Vec<Line>,
    poller: Poller,
    spins: bool,
    yields: bool,
    /// Connections that have received something since they were last looked through.
    ready: VecDeque<usize>,
    /// Connections with something to send.
    dirty: Vec<usize>,
}

impl UdsTarget {
    /// Receives from whoever has something, waiting at most so long for the first.
    fn poll(&mut self, at_most_ns: u64) -> Result<(), UdsError> {
        if let [line] = self.lines.as_mut_slice() {
            // A single connection needs no epoll, unless it has to wait less than its socket's time-out.
            let sleeps = at_most_ns >= RECV_TIMEOUT.as_nanos() as u64;
            if sleeps || at_most_ns == 0 {
                let flags = if sleeps { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
                if line.inbox.refill(line.fd.as_fd(), flags)? {
                    self.ready.push_back(0);
                }
                return Ok(());
            }
        }
        self.poller.wait(Some(at_most_ns))?;
        for i in self.poller.ready() {
            let line = &mut self.lines[i];
            if line.inbox.refill(line.fd.as_fd(), RecvFlags::DONTWAIT)? {
                self.ready.push_back(i);
            }
        }
        Ok(())
    }

    fn send_dirty(&mut self) -> Result<(), UdsError> {
        let mut failed = Ok(());
        let lines = &mut self.lines;
        self.dirty.retain(|i| {
            let line = &mut lines[*i];
            match line.outbox.send(line.fd.as_fd(), SendFlags::DONTWAIT) {
                Ok(all) => !all,
                Err(e) => {
                    failed = Err(e);
                    true
                }
            }
        });
        failed
    }
}

impl Target for UdsTarget {
    type Error = UdsError;

    /// Never refuses: the buffer has room for all that can be in flight.
    #[inline]
    fn try_send(&mut self, connection: usize, payload: &[u8], tag: u32) -> Result<bool, UdsError> {
        let outbox = &mut self.lines[connection].outbox;
        if outbox.bytes.is_empty() {
            self.dirty.push(connection);
        }
        outbox.header(tag, payload.len());
        outbox.bytes.extend_from_slice(payload);
        Ok(true)
    }

    #[inline]
    fn flush(&mut self) -> Result<(), UdsError> {
        self.send_dirty()
    }

    #[inline]
    fn try_receive(&mut self, answer: &mut [u8]) -> Result<Option<Received>, UdsError> {
        loop {
            while let Some(i) = self.ready.front() {
                if let Some((tag, payload)) = self.lines[*i].inbox.next()? {
                    answer.copy_from_slice(payload);
                    return Ok(Some(Received { tag, len: payload.len(), ok: true }));
                }
                self.ready.pop_front();
            }
            if !self.spins {
                return Ok(None);
            }
            self.poll(0)?;
            if self.ready.is_empty() {
                return Ok(None);
            }
        }
    }

    fn wait(&mut self, at_most_ns: u64) -> Result<(), UdsError> {
        self.send_dirty()?;
        if self.spins {
            pause(self.yields);
            return Ok(());
        }
        self.poll(if self.dirty.is_empty() { at_most_ns } else { at_most_ns.min(STALLED_NS) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::load::{self, Shape};
    use crate::cli::bench::long;
    use crate::cli::bench::options::PeerKind;
    use crate::cli::bench::worker::Connector as _;

    fn job(endpoint: String, connections: usize, in_flight: usize, size: usize, policy: Policy) -> ClientJob {
        ClientJob {
            peer: PeerKind::Uds,
            endpoint,
            sessions: vec![connections],
            at_once: false,
            shape: Shape { sleeps: policy != Policy::Spin, ..Shape::closed(connections, in_flight, size) },
            policy,
            bulk: false,
            cpu: None,
            shares_core: true,
        }
    }

    /// Goal:   every way of serving answers every call rightly and ends when the client is gone.
    /// Method: server and client as threads; the last case has more in flight than a socket buffer holds.
    #[test]
    fn every_way_of_serving_answers_and_ends() {
        for (connections, in_flight, size, policy) in [
            (1, 1, 64, Policy::Block),
            (1, 1, 3, Policy::Spin),
            (5, 3, 1000, Policy::Block),
            (5, 3, 1000, Policy::Spin),
            (100, 2, 64, Policy::Block),
            (1, 64, 16_384, Policy::Block),
        ] {
            let (listener, endpoint) = listen().unwrap();
            let server_job = UdsJob { connections, in_flight, size, policy, cpu: None, yields: true };
            let server = std::thread::spawn(move || uds_server(listener, &server_job));
            let job = job(endpoint, connections, in_flight, size, policy);
            let mut connector = Connector::new(&job).unwrap();
            connector.connect(0, connections).unwrap();
            let mut target = connector.finish().unwrap();
            let result = load::run_until_answered(|schedule| load::run(&mut target, &job.shape, schedule));
            assert_eq!(result.errors, 0);
            assert!(result.requests > 0, "{connections} x {in_flight} {policy:?}");
            drop(target);
            server.join().unwrap().unwrap();
        }
    }

    /// Goal:   every way of serving long bodies answers every byte rightly and ends when the client is gone; several
    ///         bodies of one connection have their turns.
    #[test]
    fn every_way_of_serving_long_bodies_answers_and_ends() {
        for (connections, in_flight, size, policy) in [
            (1, 1, 1 << 20, Policy::Block),
            (1, 1, 1 << 20, Policy::Spin),
            (3, 2, 100_003, Policy::Block),
            (3, 2, 16_385, Policy::Spin),
            (70, 1, 65_537, Policy::Block),
        ] {
            let (listener, endpoint) = listen().unwrap();
            let server_job = UdsJob { connections, in_flight, size, policy, cpu: None, yields: true };
            let server = std::thread::spawn(move || uds_server(listener, &server_job));
            let job = job(endpoint, connections, in_flight, size, policy);
            let mut connector = uds_long::Connector::new(&job).unwrap();
            connector.connect(0, connections).unwrap();
            let mut target = connector.finish().unwrap();
            let result = load::run_until_answered(|schedule| long::run(&mut target, &job.shape, schedule));
            assert_eq!(result.errors, 0);
            assert!(result.requests > 0, "{connections} x {in_flight} {policy:?}");
            drop(target);
            server.join().unwrap().unwrap();
        }
    }

    #[test]
    fn a_frame_in_pieces_is_put_together_and_a_wrong_length_is_refused() {
        let mut inbox = Inbox::new(4, 1);
        let mut frame = (4u64 | 7 << 32).to_le_bytes().to_vec();
        frame.extend_from_slice(b"ring");
        for (i, byte) in frame.iter().enumerate() {
            assert!(inbox.next().unwrap().is_none(), "after {i} bytes");
            inbox.bytes[i] = *byte;
            inbox.end = i + 1;
        }
        assert_eq!(inbox.next().unwrap(), Some((7, &b"ring"[..])));
        assert!(inbox.next().unwrap().is_none());
        let mut wrong = Inbox::new(5, 1);
        wrong.bytes[..12].copy_from_slice(&frame);
        wrong.end = 12;
        assert!(matches!(wrong.next(), Err(UdsError::Frame { len: 4, expected: 5 })));
    }
}

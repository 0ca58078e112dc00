//! A client that goes past the library: it shakes hands by the book and then writes whatever it likes
//! into its segment.

use super::eventually;
use doorbell::protocol::handshake::{
    DisconnectReason, Goodbye, Hello, LaneChoice, LaneGrant, LaneRequest, Welcome, code, doorbell_kind,
};
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::lane::{ClientLane, INTERACTIVE};
use doorbell_shm::layout::{Geometry, LaneLayout, state};
use doorbell_shm::map::Shared;
use doorbell_shm::segment::Segment;
use doorbell_shm::slots::ClientWord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use zerocopy::{FromBytes, IntoBytes};

/// Eight entries a ring, one large slot (number 0), one medium (16), four small (20 to 23).
pub const GEOMETRY: Geometry = Geometry { ring_order: 3, large: 1, medium: 1, small: 4, lease_pages: 0 };
/// The large slot of [`GEOMETRY`].
pub const LARGE: u32 = 0;
/// The medium slot of [`GEOMETRY`].
pub const MEDIUM: u32 = 16;
/// The first of the four small slots of [`GEOMETRY`].
pub const SMALL: u32 = 20;
/// The first number behind the slots of [`GEOMETRY`].
pub const BEYOND: u32 = 24;

/// A socket connected to the server, nothing said yet.
pub fn connect_silently(path: &Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

/// A socket that listens as a server's does; its queue holds so many and one more.
pub fn listen(path: &Path, queue: i32) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, queue).unwrap();
    socket
}

/// A correct hello.
pub fn hello() -> Hello {
    Hello::new(GEOMETRY, [1, 2], 0, "raw")
}

/// Sends one packet.
pub fn send(socket: impl AsFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
}

/// Sends one packet with descriptors.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
}

/// What came on a socket.
#[derive(Debug)]
pub enum Heard {
    Welcome(Box<Welcome>, Option<OwnedFd>),
    Goodbye(DisconnectReason),
    /// The one-byte bell.
    Bell,
    /// The end. An orderly one, or a reset because the server had not read everything.
    End,
}

/// Waits for the next packet, half a minute at most.
pub fn hear(socket: impl AsFd) -> Heard {
    let mut fds = [PollFd::new(&socket, PollFlags::IN)];
    let half_a_minute = Timespec { tv_sec: 30, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&half_a_minute)).unwrap() > 0, "nothing came on the socket for 30 s");
    let mut bytes = [0u8; 256];
    let (len, mut received) = match receive(&socket, &mut bytes) {
        Ok(received) => received,
        Err(Errno::CONNRESET) => (0, Vec::new()),
        Err(other) => panic!("recvmsg: {other}"),
    };
    assert!(received.len() <= 1, "the server sends one descriptor at most");
    match len {
        0 => Heard::End,
        1 => Heard::Bell,
        16 => Heard::Goodbye(Goodbye::read(&bytes[..16]).expect("a goodbye")),
        _ => {
            let welcome = Welcome::read_from_bytes(&bytes[..len]).expect("a welcome");
            Heard::Welcome(Box::new(welcome), received.pop())
        }
    }
}

/// Receives one packet with its descriptors.
fn receive(socket: impl AsFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut ancillary, flags)?;
    let mut received = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            received.extend(fds);
        }
    }
    Ok((got.bytes, received))
}

/// Hears a goodbye, then the end.
pub fn hear_goodbye(socket: impl AsFd) -> DisconnectReason {
    let reason = loop {
        match hear(&socket) {
            Heard::Goodbye(reason) => break reason,
            Heard::Bell => {}
            other => panic!("expected a goodbye, got {other:?}"),
        }
    };
    assert!(matches!(hear(&socket), Heard::End), "something came after the goodbye");
    reason
}

/// Hears a refusal, then the end.
pub fn hear_refusal(socket: impl AsFd) -> Welcome {
    let Heard::Welcome(welcome, None) = hear(&socket) else { panic!("expected a refusal") };
    assert!(matches!(hear(&socket), Heard::End), "something came after the refusal");
    *welcome
}

/// A session without a library around it.
pub struct Raw {
    pub socket: OwnedFd,
    pub memory: OwnedFd,
    pub welcome: Welcome,
    pub segment: Segment,
    pub lane: ClientLane,
    pub layout: LaneLayout,
    /// Generations that went out, by slot.
    generations: Vec<u32>,
    /// An interactive connection, opened at the start.
    pub connection: u32,
    /// The lane that is not in use at the moment.
    other: Option<(ClientLane, LaneLayout, Vec<u32>)>,
    /// The socket that the lane in use is rung by, if that is another than the session's; that of the other lane.
    bell: Option<OwnedFd>,
    other_bell: Option<OwnedFd>,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let mut raw = Self::connect_only(path);
        raw.connection = raw.open(0, 0);
        raw
    }

    /// A session without a connection.
    pub fn connect_only(path: &Path) -> Self {
        Self::connect_with_lanes(path, 1)
    }

    /// A session without a connection, and with room for so many lanes.
    pub fn connect_with_lanes(path: &Path, lanes: u32) -> Self {
        Self::connect_shaped(path, GEOMETRY, lanes)
    }

    /// A session with one connection, and so many lease pages.
    pub fn connect_with_leases(path: &Path, lease_pages: u16) -> Self {
        let mut raw = Self::connect_shaped(path, Geometry { lease_pages, ..GEOMETRY }, 1);
        raw.connection = raw.open(0, 0);
        raw
    }

    fn connect_shaped(path: &Path, wanted: Geometry, lanes: u32) -> Self {
        let socket = connect_silently(path);
        send(&socket, Hello { lanes, geometry: wanted.pack(), ..hello() }.as_bytes()).unwrap();
        let Heard::Welcome(welcome, Some(memory)) = hear(&socket) else { panic!("no welcome") };
        assert_eq!(welcome.code, code::OK);
        let geometry = Geometry::unpack(welcome.geometry);
        assert_eq!(geometry, wanted);
        let segment = Segment::attach(memory.as_fd(), geometry, welcome.lanes, welcome.identity()).unwrap();
        let layout = LaneLayout::home(&geometry);
        let lane = ClientLane::open(segment.mapping(), &geometry, &layout).unwrap();
        let generations = vec![0; lane.slots.numbers() as usize];
        let (connection, other) = (0, None);
        let (bell, other_bell) = (None, None);
        let welcome = *welcome;
        Self {
            socket,
            memory,
            welcome,
            segment,
            lane,
            layout,
            generations,
            connection,
            other,
            bell,
            other_bell,
        }
    }

    /// Asks for a lane; returns the answer.
    pub fn ask_for_lane(&mut self, choice: LaneChoice) -> LaneGrant {
        self.ask_for_lane_and_bell(choice).0
    }

    /// The same, and the socket that the lane is rung by.
    fn ask_for_lane_and_bell(&mut self, choice: LaneChoice) -> (LaneGrant, Option<OwnedFd>) {
        send(&self.socket, LaneRequest::new(choice).as_bytes()).unwrap();
        loop {
            let mut bytes = [0; 32];
            let (len, mut fds) = receive(&self.socket, &mut bytes).unwrap();
            // Bells may come between.
            if let Some(grant) = LaneGrant::read(&bytes[..len]) {
                return (grant, fds.pop());
            }
            assert_eq!(len, 1, "{:?}", &bytes[..len]);
        }
    }

    /// Asks for a further lane, and uses it from here on.
    pub fn use_lane(&mut self, choice: LaneChoice) {
        let (grant, bell) = self.ask_for_lane_and_bell(choice);
        assert_ne!(grant.lane, 0, "no lane to be had");
        assert_eq!(bell.is_some(), self.welcome.doorbell_kind == doorbell_kind::SOCKET);
        self.other_bell = bell;
        let layout = self.segment.lane(grant.lane).unwrap().expect("the directory has the lane");
        let lane = ClientLane::open(self.segment.mapping(), &GEOMETRY, &layout).unwrap();
        let generations = vec![0; lane.slots.numbers() as usize];
        self.other = Some((lane, layout, generations));
        self.swap_lanes();
    }

    /// Uses the other lane from here on.
    pub fn swap_lanes(&mut self) {
        let (lane, layout, generations) = self.other.as_mut().expect("there is another lane");
        std::mem::swap(&mut self.lane, lane);
        std::mem::swap(&mut self.layout, layout);
        std::mem::swap(&mut self.generations, generations);
        std::mem::swap(&mut self.bell, &mut self.other_bell);
    }

    /// A correct ATTACH of this session's connection.
    pub fn attach(&self) -> Submission {
        Submission { kind: kind::ATTACH, connection: self.connection, ..Submission::default() }
    }

    /// A correct call of `message_type` with `body` in `slot`; the body is in place, nothing is sent.
    pub fn entry(&self, message_type: u32, slot: u32, body: &[u8]) -> Submission {
        self.lane.common.payload.write(LaneLayout::slot_offset(slot), body);
        Submission {
            kind: kind::CALL,
            flags: flag::END,
            message_type,
            connection: self.connection,
            slot,
            generation: self.generations[slot as usize].wrapping_add(1),
            len: body.len() as u32,
            response_count: 1,
            response_slot: slot,
            ..Submission::default()
        }
    }

    /// The first, empty frame of a call in `slot` whose body goes on, and whose answer goes to `window`: its first slot
    /// and how many. `body_len` is 0 for a length that is not told.
    pub fn begin(&self, message_type: u32, slot: u32, window: (u32, u16), body_len: u64) -> Submission {
        let (response_slot, response_count) = window;
        let call = self.entry(message_type, slot, b"");
        Submission { flags: flag::MORE, response_slot, response_count, body_len, ..call }
    }

    /// Frame `frame` of `call` in the slot `place`; the bytes are in place, nothing is sent.
    pub fn frame(&self, call: &Submission, frame: u32, place: u32, bytes: &[u8], last: bool) -> Submission {
        self.lane.common.payload.write(LaneLayout::slot_offset(place), bytes);
        Submission {
            kind: kind::FRAME,
            flags: if last { flag::END } else { flag::MORE },
            slot: call.slot,
            generation: call.generation,
            len: bytes.len() as u32,
            frame,
            payload_slot: place,
            ..Submission::default()
        }
    }

    /// A LEASE of `slots` slots of `bytes` each, named by `slot`.
    pub fn lease(&self, slot: u32, bytes: u32, slots: u16) -> Submission {
        let generation = self.generations[slot as usize].wrapping_add(1);
        let (len, response_count) = (bytes, slots);
        Submission { kind: kind::LEASE, slot, generation, len, response_count, ..Submission::default() }
    }

    /// A LEASE that is granted: its first slot, how many slots it has, and its epoch.
    pub fn leased(&mut self, slot: u32, bytes: u32, slots: u16) -> (u32, u32, u32) {
        let granted = self.call(&self.lease(slot, bytes, slots));
        assert_eq!(granted.status, Status::Ok as u8, "a lease");
        (granted.detail as u32, (granted.detail >> 32) as u32, granted.frame)
    }

    /// The RETURN of a lease, named by `slot`.
    pub fn give_back(&self, slot: u32, first: u32, epoch: u32) -> Submission {
        let generation = self.generations[slot as usize].wrapping_add(1);
        Submission {
            kind: kind::RETURN,
            flags: flag::LEASED,
            slot,
            generation,
            payload_slot: first,
            lease_epoch: epoch,
            ..Submission::default()
        }
    }

    /// Writes the client's word of a call and hints at it.
    pub fn say(&self, call: &Submission, cancelled: bool, released: u32) {
        let word = ClientWord { generation: call.generation, cancelled, released };
        self.lane.common.client_words[call.slot as usize].store(word.pack(), Ordering::SeqCst);
        self.lane.common.hints.set(call.slot);
        self.ring();
    }

    /// A correct OPEN or CLOSE.
    pub fn control(&self, kind: u8, connection: u32) -> Submission {
        let generation = self.generations[SMALL as usize].wrapping_add(1);
        Submission { kind, connection, slot: SMALL, generation, ..Submission::default() }
    }

    /// Writes an entry into a submission ring; does not ring.
    pub fn push(&mut self, ring: usize, entry: &Submission) {
        self.push_words(ring, entry.pack());
        if let Some(generation) = self.generations.get_mut(entry.slot as usize) {
            *generation = entry.generation;
        }
    }

    /// Writes an entry whatever the published position says.
    pub fn push_past_published(&mut self, ring: usize, entry: &Submission) {
        let published = self.word32(self.layout.published[ring]);
        // What the producer would read there if nobody had scribbled over it.
        published.store(self.lane.submissions[ring].next() as u32, Ordering::SeqCst);
        self.push(ring, entry);
        published.store(!0, Ordering::SeqCst);
    }

    /// The generation of the first call in [`SMALL`]: [`Raw::connect`] has used one for its OPEN.
    pub fn first_generation(&self) -> u32 {
        1
    }

    /// The segment's path, for opening it anew.
    pub fn memory_path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.memory.as_raw_fd())
    }

    pub fn push_words(&mut self, ring: usize, words: [u64; 8]) {
        assert!(self.lane.submissions[ring].push(words).unwrap(), "the ring is full");
    }

    /// Wakes the server whatever its bell says.
    pub fn ring(&self) {
        let bell = &self.lane.common.server_bell.0;
        bell.store(0, Ordering::SeqCst);
        self.wake();
    }

    /// The same, and leaves the bell as it is.
    pub fn wake(&self) {
        if self.welcome.doorbell_kind == doorbell_kind::FUTEX {
            doorbell_uring::futex::wake(&self.lane.common.server_bell.0, i32::MAX as u32).unwrap();
            return;
        }
        let socket = self.bell.as_ref().unwrap_or(&self.socket);
        match rustix::net::send(socket, &[1], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) | Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => {}
            Err(other) => panic!("send: {other}"),
        }
    }

    /// Waits for the next completion of a ring and takes it.
    pub fn completion(&mut self, ring: usize) -> Completion {
        let mut taken = None;
        eventually("a completion", || {
            taken = self.lane.completions[ring].pop().unwrap();
            taken.is_some()
        });
        self.lane.completions[ring].publish();
        Completion::unpack(taken.unwrap()).unwrap()
    }

    /// Sends an entry on the interactive ring and waits for its completion.
    pub fn call(&mut self, entry: &Submission) -> Completion {
        self.call_on(INTERACTIVE, entry)
    }

    /// Sends an entry and waits for its completion.
    pub fn call_on(&mut self, ring: usize, entry: &Submission) -> Completion {
        self.push(ring, entry);
        self.ring();
        let completion = self.completion(ring);
        assert_eq!((completion.slot, completion.generation), (entry.slot, entry.generation));
        completion
    }

    /// A correct echo, checked: the session still works.
    pub fn echo(&mut self, body: &[u8]) {
        let entry = self.entry(2, SMALL + 1, body);
        let completion = self.call(&entry);
        assert_eq!((completion.status, completion.len), (Status::Ok as u8, body.len() as u32));
        assert_eq!(self.slot(SMALL + 1, body.len()), body);
    }

    /// Opens a connection and returns its number.
    pub fn open(&mut self, codec: u8, flags: u16) -> u32 {
        let entry = Submission { codec, flags, ..self.control(kind::OPEN, 0) };
        let completion = self.call(&entry);
        assert_eq!(completion.status, Status::Ok as u8);
        completion.detail as u32
    }

    /// The first bytes of a slot.
    pub fn slot(&self, slot: u32, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.lane.common.payload.read(LaneLayout::slot_offset(slot), &mut bytes);
        bytes
    }

    /// Any aligned 32-bit word of the segment.
    pub fn word32(&self, offset: usize) -> Shared<AtomicU32> {
        self.segment.mapping().object(offset).unwrap()
    }

    /// Any aligned 64-bit word of the segment.
    pub fn word64(&self, offset: usize) -> Shared<AtomicU64> {
        self.segment.mapping().object(offset).unwrap()
    }

    /// Writes an entry where the next one belongs, with any lap.
    pub fn forge(&mut self, ring: usize, entry: &Submission, lap: u32) {
        let index = self.lane.submissions[ring].next() % u64::from(GEOMETRY.ring_len());
        let start = self.layout.submissions[ring] + 64 * index as usize;
        let words = entry.pack();
        for (i, word) in words.iter().enumerate().skip(1) {
            self.word64(start + 8 * i).store(*word, Ordering::Relaxed);
        }
        self.word64(start).store(words[0] | u64::from(lap), Ordering::Release);
    }

    /// The lap that the next entry of a submission ring has to carry.
    pub fn next_lap(&self, ring: usize) -> u32 {
        doorbell_shm::ring::lap(self.lane.submissions[ring].next(), GEOMETRY.ring_order.into())
    }

    /// Waits for the end of this session; returns the reason, which the socket and the header both tell (S9).
    pub fn ended(&self) -> DisconnectReason {
        let reason = hear_goodbye(&self.socket);
        assert_eq!(self.segment.state(), (state::CLOSED, reason as u32), "state and reason in the header");
        reason
    }

    /// Whether the session has not been ended, as far as its header says.
    pub fn runs(&self) -> bool {
        self.segment.state().0 == state::RUNNING
    }
}

//! Finding the server and shaking hands with it.

use super::IpcClient;
use super::session::{Joined, Session};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::protocol::handshake::{
    Answer, DisconnectReason, Hello, Scope, VERSION_MAX, Welcome, code, doorbell_kind,
};
use crate::protocol::rendezvous::{self, monotonic_ns};
use doorbell_shm::kill_point;
use doorbell_shm::layout::{Geometry, LANES_MAX};
use doorbell_shm::segment::Segment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketAddrUnix, SocketFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Longest time that connecting may take.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// Pauses between two attempts to connect, while the server cannot take us: the first one, then twice the last.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(16);

/// The other side of a handshake went away in the midst of it.
pub(super) const CLOSED_EARLY: &str = "the server closed the socket without an answer";
/// The segment's descriptor could not be received.
pub(super) const CUT: &str =
    "the answer was cut: no file descriptor is free for the segment (ulimit -n), or it is too long";

/// What a client asks for when it connects.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Entries of each ring: a power of two from 8 to 1024. All but one in 64 (at least one) of them can be
    /// calls in flight.
    pub ring_entries: u32,
    /// Slots of 1 KiB, in fours.
    pub small_slots: u16,
    /// Slots of 4 KiB.
    pub medium_slots: u16,
    /// Slots of 16 KiB.
    pub large_slots: u16,
    /// Pages of 4 KiB that each lane may lease at once, beyond its slots, to carry longer requests and answers. They
    /// exist, and count, only while they are leased.
    pub lease_pages: u16,
    /// How this client waits.
    pub policy: WaitPolicy,
    /// Most lanes, the home lane included, from 1 to 64: under `handoff` one for each core that the client calls
    /// from. Each costs as much shared memory as the first, once it is used.
    pub lanes: u32,
    /// How long connecting may take, a full backlog included.
    pub connect_timeout: Duration,
    /// Name for the server's logs, cut after 32 bytes.
    pub name: String,
}

impl Default for ClientConfig {
    /// 16 entries, four slots of 1 KiB, 64 pages to lease: 8 KiB of shared memory, and up to 256 KiB more in use.
    fn default() -> Self {
        Self {
            ring_entries: 16,
            small_slots: 4,
            medium_slots: 0,
            large_slots: 0,
            lease_pages: 64,
            policy: WaitPolicy::default(),
            lanes: 4,
            connect_timeout: Duration::from_secs(5),
            name: String::new(),
        }
    }
}

impl ClientConfig {
    /// The smallest session: 8 KiB, four slots of 1 KiB, nothing to lease. Longer requests go through these.
    pub fn smallest() -> Self {
        Self { lease_pages: 0, ..Self::default() }
    }

    /// A session that many tasks or callers share: 128 entries, 64 slots of 1 KiB, 128 pages to lease. 92 KiB of
    /// shared memory, and up to 512 KiB more in use.
    pub fn for_tasks() -> Self {
        Self { ring_entries: 128, small_slots: 64, lease_pages: 128, ..Self::default() }
    }

    /// A session that carries `in_flight` calls of `len` bytes at once, up to 16 KiB each. One that is
    /// [idempotent](super::CallOptions::idempotent) counts twice.
    pub fn for_load(in_flight: u32, len: usize) -> Self {
        use doorbell_shm::layout::{SLOT_MEDIUM, SLOT_SMALL};
        // One in 64 entries, at least one, is left to frames.
        let ring_entries = (in_flight + (in_flight / 63).max(1)).next_power_of_two().clamp(16, 1024);
        let slots = in_flight.min(4096) as u16;
        let empty = Self { ring_entries, small_slots: 0, lease_pages: 0, ..Self::default() };
        match len {
            _ if len <= SLOT_SMALL => Self { small_slots: slots, ..empty },
            _ if len <= SLOT_MEDIUM => Self { medium_slots: slots, small_slots: 4, ..empty },
            _ => Self { large_slots: slots, small_slots: 4, ..empty },
        }
    }

    fn geometry(&self) -> Result<Geometry> {
        if !self.ring_entries.is_power_of_two() {
            let n = self.ring_entries;
            return Err(IpcError::Config(format!(
                "ring_entries is {n}, allowed are powers of two from 8 to 1024"
            )));
        }
        let geometry = Geometry {
            ring_order: self.ring_entries.trailing_zeros() as u8,
            large: self.large_slots,
            medium: self.medium_slots,
            small: self.small_slots,
            lease_pages: self.lease_pages,
        };
        Ok(geometry.checked()?)
    }

    fn check_lanes(&self) -> Result<()> {
        if (1..=LANES_MAX).contains(&self.lanes) {
            return Ok(());
        }
        Err(IpcError::Config(format!("lanes is {}, allowed are 1 to {LANES_MAX}", self.lanes)))
    }
}

/// A client that has said hello and has not been answered yet.
///
/// Whoever connects many sessions, or has an event loop, begins all of them and finishes them as they are answered:
/// the descriptor is readable then.
///
/// ```no_run
/// # use doorbell::{ClientConfig, Connecting};
/// # fn main() -> doorbell::Result<()> {
/// let config = ClientConfig::default();
/// let begun: Vec<_> =
///     (0..100).map(|_| Connecting::begin("/run/doorbell.sock", &config)).collect::<doorbell::Result<_>>()?;
/// let clients: Vec<_> = begun.into_iter().map(Connecting::finish).collect::<doorbell::Result<_>>()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Connecting {
    path: PathBuf,
    config: ClientConfig,
    geometry: Geometry,
    client_id: [u64; 2],
    socket: OwnedFd,
    sent_ns: u64,
    give_up: Instant,
    backoff: Backoff,
}

/// What a server that was said hello to has answered, unless it has refused for good.
#[derive(Debug)]
enum Heard {
    /// A session, and the descriptor of its segment.
    Granted(Welcome, OwnedFd),
    /// It is busy, or was: why.
    Busy(IpcError),
}

impl AsFd for Connecting {
    /// Readable once the server has answered.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connecting {
    /// Connects, checks who is there, says hello. Waits for nobody but a server whose queue is full.
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`].
    pub fn begin(path: impl AsRef<Path>, config: &ClientConfig) -> Result<Self> {
        Self::begin_as(path.as_ref(), config, rendezvous::random_id()?)
    }

    /// The same for a client that has this id, which stays the same when it connects again.
    pub(super) fn begin_as(path: &Path, config: &ClientConfig, client_id: [u64; 2]) -> Result<Self> {
        rendezvous::check_length(path)?;
        let geometry = config.geometry()?;
        config.check_lanes()?;
        // A time-out beyond all clocks is none worth a name: a day will do.
        let give_up = Instant::now() + config.connect_timeout.min(CONNECT_TIMEOUT_MAX);
        let mut backoff = Backoff::until(give_up);
        let (socket, sent_ns) = say_hello(path, config, geometry, client_id, &mut backoff)?;
        let (path, config) = (path.to_owned(), config.clone());
        Ok(Self { path, config, geometry, client_id, socket, sent_ns, give_up, backoff })
    }

    /// The same, to be given up so long from now.
    pub(super) fn with_patience(mut self, patience: Duration) -> Self {
        self.give_up = Instant::now() + patience.min(CONNECT_TIMEOUT_MAX);
        self.backoff = Backoff::until(self.give_up);
        self.config.connect_timeout = patience;
        self
    }

    /// When it is given up.
    pub(super) fn gives_up_at(&self) -> Instant {
        self.give_up
    }

    /// Whether the server has answered, or has had its time.
    pub(super) fn is_due(&self) -> Result<bool> {
        let events = PollFlags::IN | PollFlags::RDHUP;
        match poll(&mut [PollFd::new(&self.socket, events)], Some(&Timespec::default())) {
            Ok(readable) => Ok(readable > 0 || Instant::now() >= self.give_up),
            Err(Errno::INTR) => Ok(false),
            Err(e) => Err(IpcError::io("poll of the session socket", e)),
        }
    }

    /// Waits for the answer and attaches the segment. What only means that the server is busy is tried again until
    /// the time is over: other handshakes of this process under way, and a hello that went out too late because this
    /// thread was kept from running (F27).
    ///
    /// # Errors
    ///
    /// As for [`IpcClient::connect_with`].
    pub fn finish(self) -> Result<IpcClient> {
        Ok(IpcClient::of(self.session()?))
    }

    /// As [`Connecting::finish`] for whoever tries again by himself: that the server is busy is an error, too. Waits for
    /// nothing where it [is due](Connecting::is_due).
    pub(super) fn finish_at_once(self) -> Result<IpcClient> {
        match self.hear()? {
            Heard::Granted(welcome, memory) => Ok(IpcClient::of(self.join(&welcome, memory)?)),
            Heard::Busy(why) => Err(why),
        }
    }

    fn session(mut self) -> Result<Session> {
        loop {
            let why = match self.hear()? {
                Heard::Granted(welcome, memory) => return self.join(&welcome, memory),
                Heard::Busy(why) => why,
            };
            if !self.backoff.pause()? {
                return Err(why);
            }
            (self.socket, self.sent_ns) =
                say_hello(&self.path, &self.config, self.geometry, self.client_id, &mut self.backoff)?;
        }
    }

    /// Waits for the answer to the hello.
    fn hear(&self) -> Result<Heard> {
        let (answer, memory) =
            receive_answer(&self.path, &self.socket, self.give_up, self.config.connect_timeout)?;
        kill_point!("client.welcome.received");
        match (answer, memory) {
            (Answer::Granted(welcome), Some(memory)) => Ok(Heard::Granted(welcome, memory)),
            (Answer::Granted(_), None) => Err(IpcError::Handshake("the welcome came without a segment")),
            (Answer::Refused(welcome), _) if welcome.scope() == Some(Scope::HandshakesOfProcess) => {
                Ok(Heard::Busy(refusal(&welcome)))
            }
            (Answer::Refused(welcome), _) => Err(refusal(&welcome)),
            (Answer::Ended(reason), _) if reason == DisconnectReason::HandshakeTimeout => {
                Ok(Heard::Busy(IpcError::Disconnected(reason)))
            }
            (Answer::Ended(reason), _) => Err(IpcError::Disconnected(reason)),
        }
    }

    fn join(self, welcome: &Welcome, memory: OwnedFd) -> Result<Session> {
        let granted = Geometry::unpack(welcome.geometry);
        let segment = Segment::attach(memory.as_fd(), granted, welcome.lanes, welcome.identity())?;
        kill_point!("client.segment.mapped");
        let took_ns = monotonic_ns() - self.sent_ns;
        let clock_offset_ns = clock_offset(welcome.clock_offset_ns, took_ns);
        let (home_core, reactors, policy) = (welcome.home_core, welcome.reactors, self.config.policy);
        let (socket, max_message) = (self.socket, welcome.max_message_size);
        Session::new(Joined {
            segment,
            socket,
            memory,
            clock_offset_ns,
            home_core,
            reactors,
            max_message,
            policy,
            rings_sockets: welcome.doorbell_kind == doorbell_kind::SOCKET,
        })
    }
}

/// Connects and says hello; returns the socket, and when that was.
fn say_hello(
    path: &Path,
    config: &ClientConfig,
    geometry: Geometry,
    client_id: [u64; 2],
    backoff: &mut Backoff,
) -> Result<(OwnedFd, u64)> {
    let socket = connect_socket(path, backoff)?;
    kill_point!("client.socket.connected");
    let uid = rendezvous::peer_uid(&socket)?;
    if uid != rustix::process::geteuid().as_raw() {
        return Err(IpcError::WrongServer { path: path.to_owned(), uid });
    }
    let sent_ns = monotonic_ns();
    let hello = Hello::new(geometry, client_id, sent_ns, &config.name);
    let hello = Hello { lanes: config.lanes, ..hello };
    match rendezvous::send(socket.as_fd(), hello.as_bytes(), None) {
        // Refused before it was heard: the answer says why.
        Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {
            kill_point!("client.hello.sent");
            Ok((socket, sent_ns))
        }
        Err(e) => Err(IpcError::io("send of the hello", e)),
    }
}

/// Pauses between attempts, each twice as long as the last and cut short at random, so that many who were sent away
/// at the same moment do not come back at the same moment.
#[derive(Debug)]
struct Backoff {
    next: Duration,
    give_up: Instant,
}

impl Backoff {
    fn until(give_up: Instant) -> Self {
        Self { next: PAUSE_MIN, give_up }
    }

    /// Sleeps; `false` at once if the time is over.
    fn pause(&mut self) -> Result<bool> {
        let left = self.give_up.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let [random, _] = rendezvous::random_id()?;
        // From half to all of it.
        let part = 512 + (random % 513) as u32;
        std::thread::sleep((self.next * part / 1024).min(left));
        self.next = (self.next * 2).min(PAUSE_MAX);
        Ok(true)
    }
}

/// The server's CLOCK_MONOTONIC minus ours, ns. The server measured it when it read the hello, which may
/// have lain there: the truth lies between that and `took_ns` less. Where 0 is possible it is 0: only a
/// time namespace makes the clocks differ.
fn clock_offset(measured_ns: u64, took_ns: u64) -> u64 {
    let (most, least) = (measured_ns as i64, (measured_ns as i64).saturating_sub_unsigned(took_ns));
    if (least..=most).contains(&0) { 0 } else { least.midpoint(most) as u64 }
}

fn connect_socket(path: &Path, backoff: &mut Backoff) -> Result<OwnedFd> {
    let not_running = || IpcError::NotRunning { path: path.to_owned() };
    let address = SocketAddrUnix::new(path).map_err(|e| IpcError::io("making a socket address", e))?;
    let socket = rendezvous::packet_socket(SocketFlags::NONBLOCK)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Err(not_running()),
            Err(Errno::INTR) => {}
            Err(Errno::PROTOTYPE | Errno::NOTSOCK) => {
                let problem =
                    "what lies there is not a doorbell socket: name the server's socket with --socket";
                return Err(IpcError::SocketPath { path: path.to_owned(), problem });
            }
            Err(Errno::NOTDIR) => {
                let problem = "a part of the path is not a directory: check it";
                return Err(IpcError::SocketPath { path: path.to_owned(), problem });
            }
            Err(Errno::ACCESS | Errno::PERM) => return Err(IpcError::NotPermitted),
            // The backlog is full: the server is there and busy (F26).
            Err(Errno::AGAIN) if backoff.pause()? => {}
            Err(Errno::AGAIN) => {
                return Err(IpcError::io(
                    "connect, with the server's queue full all the time,",
                    Errno::AGAIN,
                ));
            }
            Err(e) => return Err(IpcError::io("connect", e)),
        }
    }
}

fn receive_answer(
    path: &Path,
    socket: &OwnedFd,
    give_up: Instant,
    timeout: Duration,
) -> Result<(Answer, Option<OwnedFd>)> {
    let mut bytes = [0u8; size_of::<Welcome>() + 1];
    let mut reset = false;
    let mut packet = loop {
        match rendezvous::receive_last_word(socket.as_fd(), &mut bytes) {
            Ok(packet) => break packet,
            Err(Errno::AGAIN) => {
                let left = give_up.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(IpcError::HandshakeTimeout(timeout));
                }
                let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
                match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(IpcError::io("poll of the session socket", e)),
                }
            }
            // Told once; behind it lies what was sent before, or the end.
            Err(Errno::CONNRESET) if !reset => reset = true,
            Err(e) => return Err(IpcError::io("receive of the welcome", e)),
        }
    };
    if packet.len == 0 && reset {
        // A server that was killed with this socket in its queue (F50).
        return Err(IpcError::NotRunning { path: path.to_owned() });
    }
    if packet.len == 0 {
        return Err(IpcError::Handshake(CLOSED_EARLY));
    }
    if packet.truncated {
        // The kernel does not say which.
        return Err(IpcError::Handshake(CUT));
    }
    let answer = Answer::read(&bytes[..packet.len], packet.fds.len()).map_err(IpcError::Handshake)?;
    Ok((answer, packet.fds.pop()))
}

/// What a refusal means.
fn refusal(welcome: &Welcome) -> IpcError {
    let retry_ms = welcome.retry_ms;
    match welcome.code {
        code::VERSION_MISMATCH => {
            let (min, max) = (welcome.version_min, welcome.version_max);
            IpcError::VersionMismatch { min, max, ours: VERSION_MAX }
        }
        code::NOT_PERMITTED => IpcError::NotPermitted,
        code::TOO_MANY => {
            let scope = welcome.scope().map_or("things of an unknown kind", Scope::name);
            IpcError::TooMany { scope, limit: welcome.limit.into(), retry_ms }
        }
        code::NO_MEMORY => IpcError::NoMemory { retry_ms },
        code::DRAINING => IpcError::Draining { retry_ms },
        code::BAD_HELLO => IpcError::Handshake("the server did not understand our hello"),
        _ => IpcError::Handshake("the server refused with an unknown code"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s11_a_slow_handshake_is_no_clock_offset() {
        assert_eq!(clock_offset(30_000_000, 31_000_000), 0);
        assert_eq!(clock_offset(0, 5), 0);
        assert_eq!(clock_offset(1_000_000, 100), 999_950);
        assert_eq!(clock_offset(-1_000_000i64 as u64, 100), -1_000_050i64 as u64);
    }
}

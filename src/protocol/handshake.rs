//! The handshake: one fixed-size message each way over a SOCK_SEQPACKET unix socket; later, wishes for further
//! lanes and their answers.
//!
//! The client sends [`Hello`] right after connecting; the server answers [`Welcome`], with the segment's
//! descriptor if the code is [`code::OK`]. The socket stays open for the session's life: it tells of
//! death (trap 9), carries the one-byte bell for clients that wait on a descriptor, and the server's last
//! word, [`Goodbye`].
//!
//! Layout: `shm/LAYOUT.md`, section Handshake. Everything is little-endian; reserved is zero, and refused
//! when it is not.

use doorbell_shm::layout::{Geometry, MAGIC};
use doorbell_shm::segment::Identity;
use std::fmt;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Oldest protocol version spoken.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version spoken.
pub const VERSION_MAX: u16 = 1;

/// Answer codes of the handshake.
pub mod code {
    /// The session exists; the segment's descriptor comes with the message.
    pub const OK: u16 = 0;
    /// No common version; `version_min` and `version_max` are the server's. Final.
    pub const VERSION_MISMATCH: u16 = 1;
    /// The peer runs as another user. Final.
    pub const NOT_PERMITTED: u16 = 2;
    /// A limit is reached; `limit`, `retry_ms` and [`Welcome::scope`](super::Welcome::scope) say more.
    pub const TOO_MANY: u16 = 3;
    /// No memory for the segment; `retry_ms`.
    pub const NO_MEMORY: u16 = 4;
    /// The server is stopping; `retry_ms`.
    pub const DRAINING: u16 = 5;
    /// The hello was not one. Final.
    pub const BAD_HELLO: u16 = 6;
}

/// How each side may ring the other.
pub mod doorbell_kind {
    /// Futex words in the segment.
    pub const FUTEX: u32 = 0;
    /// The server sleeps on sockets: whoever has taken the mark of a lane's bell sends it one byte, on the session's
    /// socket for the home lane, for a further one on the socket that came with the [`LaneGrant`](super::LaneGrant). A
    /// full socket has been rung. Clients sleep as before.
    pub const SOCKET: u32 = 1;
}

/// What there are too many of, with [`code::TOO_MANY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Scope {
    /// Sessions of the server. All of them are its own user's, so this is that user's quota, too (F29).
    Sessions = 0,
    /// Sessions of the process that asks (F29).
    SessionsOfProcess = 1,
    /// Sockets of the process that asks that have not said hello (F27). Hello right after connecting, and all is well.
    HandshakesOfProcess = 2,
    /// Descriptors of the server's process (F32).
    Descriptors = 3,
    /// Descriptors that the user's processes have sent and nobody has received (F28).
    DescriptorsInFlight = 4,
}

impl Scope {
    /// Every scope, in the order of its number.
    pub const ALL: [Self; 5] = [
        Self::Sessions,
        Self::SessionsOfProcess,
        Self::HandshakesOfProcess,
        Self::Descriptors,
        Self::DescriptorsInFlight,
    ];

    /// In words, as a plural.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::SessionsOfProcess => "sessions of one process",
            Self::HandshakesOfProcess => "handshakes of one process under way",
            Self::Descriptors => "file descriptors",
            Self::DescriptorsInFlight => "file descriptors sent and not received",
        }
    }
}

/// The client's first and only message, 96 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Hello {
    /// "DOORBELL".
    pub magic: u64,
    /// Oldest version the client speaks.
    pub version_min: u16,
    /// Newest version the client speaks.
    pub version_max: u16,
    /// Lanes wanted, at least 1.
    pub lanes: u32,
    /// Feature bits that the client knows.
    pub features: u64,
    /// The geometry wanted, packed.
    pub geometry: u64,
    /// Random id of the client, kept across reconnections.
    pub client_id: [u64; 2],
    /// The client's CLOCK_MONOTONIC, ns.
    pub now_ns: u64,
    /// Reserved, zero.
    pub reserved: u64,
    /// Name for logs: UTF-8, padded with zeros.
    pub name: [u8; 32],
}

const _: () = assert!(size_of::<Hello>() == 96 && size_of::<Welcome>() == 96);
const _: () =
    assert!(size_of::<Goodbye>() == 16 && size_of::<LaneRequest>() == 16 && size_of::<LaneGrant>() == 16);

impl Hello {
    /// A hello of this library for `geometry`.
    pub fn new(geometry: Geometry, client_id: [u64; 2], now_ns: u64, client_name: &str) -> Self {
        let mut name = [0; 32];
        let mut len = client_name.len().min(name.len());
        while !client_name.is_char_boundary(len) {
            len -= 1;
        }
        name[..len].copy_from_slice(&client_name.as_bytes()[..len]);
        Self {
            magic: MAGIC,
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            lanes: 1,
            features: 0,
            geometry: geometry.pack(),
            client_id,
            now_ns,
            reserved: 0,
            name,
        }
    }

    /// Judges the bytes of a first message.
    ///
    /// # Errors
    ///
    /// The answer code to refuse it with: [`code::BAD_HELLO`] or [`code::VERSION_MISMATCH`].
    pub fn read(bytes: &[u8]) -> Result<Self, u16> {
        let hello = Self::read_from_bytes(bytes).map_err(|_| code::BAD_HELLO)?;
        if hello.magic != MAGIC {
            return Err(code::BAD_HELLO);
        }
        // The version decides what the rest means, so it is judged first.
        if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
            return Err(code::VERSION_MISMATCH);
        }
        let inverted = hello.version_min > hello.version_max;
        if inverted || hello.lanes == 0 || hello.reserved != 0 || hello.display_name().is_none() {
            return Err(code::BAD_HELLO);
        }
        Ok(hello)
    }

    /// The name without its padding; `None` if it is not UTF-8, holds control characters or goes on after
    /// a zero.
    pub fn display_name(&self) -> Option<&str> {
        let len = self.name.iter().position(|b| *b == 0).unwrap_or(self.name.len());
        let (name, padding) = self.name.split_at(len);
        let name = std::str::from_utf8(name).ok()?;
        (padding.iter().all(|b| *b == 0) && !name.chars().any(char::is_control)).then_some(name)
    }
}

/// The server's answer, 96 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Welcome {
    /// "DOORBELL".
    pub magic: u64,
    /// One of [`code`].
    pub code: u16,
    /// The version both will speak.
    pub version: u16,
    /// One of [`doorbell_kind`].
    pub doorbell_kind: u32,
    /// Feature bits in force.
    pub features: u64,
    /// The geometry granted, packed.
    pub geometry: u64,
    /// Lanes that the session may have.
    pub lanes: u32,
    /// Milliseconds after which to try again.
    pub retry_ms: u32,
    /// Random at the start of the server.
    pub epoch: u64,
    /// Random id of the session.
    pub session: [u64; 2],
    /// Server's CLOCK_MONOTONIC minus the client's, ns, two's complement: deadlines are the server's.
    pub clock_offset_ns: u64,
    /// Longest message, bytes.
    pub max_message_size: u64,
    /// The server's oldest version.
    pub version_min: u16,
    /// The server's newest version.
    pub version_max: u16,
    /// The limit that was reached, with [`code::TOO_MANY`].
    pub limit: u32,
    /// Core that the reactor of the home lane is pinned to, or [`NO_CORE`]. With [`code::TOO_MANY`] the number of a
    /// [`Scope`].
    pub home_core: u32,
    /// Reactors of the server; each has at most one lane of a session.
    pub reactors: u32,
}

/// Stands for a reactor that is not pinned to a core.
pub const NO_CORE: u32 = u32::MAX;

/// "LANE".
const LANE_MAGIC: u32 = u32::from_le_bytes(*b"LANE");

/// Which reactor a client wants a further lane with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneChoice {
    /// The one that is pinned to this core: cold calls are handed over there.
    On(u32),
    /// One of any other core: warm calls spin without keeping it from running.
    NotOn(u32),
}

/// The client's wish for a further lane, 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LaneRequest {
    magic: u32,
    core: u32,
    choice: u32,
    reserved: u32,
}

impl LaneRequest {
    /// The message for `choice`.
    pub fn new(choice: LaneChoice) -> Self {
        let (core, choice) = match choice {
            LaneChoice::On(core) => (core, 0),
            LaneChoice::NotOn(core) => (core, 1),
        };
        Self { magic: LANE_MAGIC, core, choice, reserved: 0 }
    }

    /// The wish in a received message; `None` if it is not one.
    pub fn read(bytes: &[u8]) -> Option<LaneChoice> {
        let request = Self::read_from_bytes(bytes).ok()?;
        match (request.magic, request.choice, request.reserved) {
            (LANE_MAGIC, 0, 0) => Some(LaneChoice::On(request.core)),
            (LANE_MAGIC, 1, 0) => Some(LaneChoice::NotOn(request.core)),
            _ => None,
        }
    }
}

/// The server's answer to a [`LaneRequest`], 16 bytes; with the lane's socket if that is how the server is rung
/// ([`doorbell_kind::SOCKET`]).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LaneGrant {
    magic: u32,
    /// Number of the lane; 0, the home lane, if there is none to be had.
    pub lane: u32,
    /// Core that its reactor is pinned to, or [`NO_CORE`].
    pub core: u32,
    reserved: u32,
}

impl LaneGrant {
    /// The answer that names `lane`.
    pub fn new(lane: u32, core: u32) -> Self {
        Self { magic: LANE_MAGIC, lane, core, reserved: 0 }
    }

    /// The answer in a received message; `None` if it is not one.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let grant = Self::read_from_bytes(bytes).ok()?;
        (grant.magic == LANE_MAGIC && grant.reserved == 0).then_some(grant)
    }
}

impl Welcome {
    /// An answer that refuses, with nothing but its code.
    pub fn refusal(code: u16) -> Self {
        Self {
            magic: MAGIC,
            code,
            version: 0,
            doorbell_kind: doorbell_kind::FUTEX,
            features: 0,
            geometry: 0,
            lanes: 0,
            retry_ms: 0,
            epoch: 0,
            session: [0; 2],
            clock_offset_ns: 0,
            max_message_size: 0,
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            limit: 0,
            home_core: 0,
            reactors: 0,
        }
    }

    /// The answer that `limit` of `scope` is reached, and when to try again.
    pub fn too_many(scope: Scope, limit: u32, retry_ms: u32) -> Self {
        Self { limit, retry_ms, home_core: scope as u32, ..Self::refusal(code::TOO_MANY) }
    }

    /// What there are too many of; `None` if the code is another one, or the number one that we do not know.
    pub fn scope(&self) -> Option<Scope> {
        let known = Scope::ALL.into_iter().find(|scope| *scope as u32 == self.home_core);
        known.filter(|_| self.code == code::TOO_MANY)
    }

    /// Who the segment belongs to.
    pub fn identity(&self) -> Identity {
        Identity { epoch: self.epoch, session: self.session }
    }
}

/// What a server answers a hello with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A session of a version that we speak; the segment's descriptor came along.
    Granted(Welcome),
    /// No session; the code says why, and is never [`code::OK`].
    Refused(Welcome),
    /// The end, before there was a session.
    Ended(DisconnectReason),
}

impl Answer {
    /// Judges a packet that came with so many descriptors.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub fn read(bytes: &[u8], descriptors: usize) -> Result<Self, &'static str> {
        if let Some(reason) = Goodbye::read(bytes) {
            return Ok(Self::Ended(reason));
        }
        let welcome = Welcome::read_from_bytes(bytes).ok().filter(|w| w.magic == MAGIC);
        let welcome = welcome.ok_or("the answer is not a doorbell welcome")?;
        if welcome.code != code::OK {
            return Ok(Self::Refused(welcome));
        }
        if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
            return Ok(Self::Refused(Welcome { code: code::VERSION_MISMATCH, ..welcome }));
        }
        if welcome.doorbell_kind > doorbell_kind::SOCKET || welcome.features != 0 {
            return Err("the welcome speaks of bells or features that this client does not know");
        }
        match descriptors {
            1 => Ok(Self::Granted(welcome)),
            _ => Err("the welcome did not come with exactly one descriptor"),
        }
    }
}

/// The server's last message on the socket, 16 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Goodbye {
    /// "BYE\0".
    pub magic: u32,
    /// Code of a [`DisconnectReason`].
    pub reason: u32,
    /// Reserved, zero.
    pub reserved: u64,
}

impl Goodbye {
    /// The message for `reason`.
    pub fn new(reason: DisconnectReason) -> Self {
        Self { magic: u32::from_le_bytes(*b"BYE\0"), reason: reason as u32, reserved: 0 }
    }

    /// The reason in a received message; `None` if it is not a goodbye.
    pub fn read(bytes: &[u8]) -> Option<DisconnectReason> {
        let bye = Self::read_from_bytes(bytes).ok()?;
        let right = bye.magic == u32::from_le_bytes(*b"BYE\0") && bye.reserved == 0;
        right.then(|| DisconnectReason::from_code(bye.reason))?
    }
}

/// Why the server ended a session (FAULTS §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DisconnectReason {
    /// The client wrote what no correct client writes.
    ProtocolViolation = 1,
    /// The client's process or socket is gone.
    PeerDied = 2,
    /// No hello in time.
    HandshakeTimeout = 3,
    /// More than its quota.
    Quota = 4,
    /// It holds completions and does not take them.
    SlowConsumer = 5,
    /// It rings without cause.
    DoorbellAbuse = 6,
    /// Nothing happened for the idle time-out.
    IdleTimeout = 7,
    /// The server is stopping.
    Draining = 8,
    /// Somebody who watches the server wanted it to end.
    Evicted = 9,
    /// The machine has lost memory of its segment.
    MemoryLost = 10,
}

impl DisconnectReason {
    /// Every reason, in the order of its code.
    pub const ALL: [Self; 10] = [
        Self::ProtocolViolation,
        Self::PeerDied,
        Self::HandshakeTimeout,
        Self::Quota,
        Self::SlowConsumer,
        Self::DoorbellAbuse,
        Self::IdleTimeout,
        Self::Draining,
        Self::Evicted,
        Self::MemoryLost,
    ];

    /// The reason numbered `code`, if there is one.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|r| *r as u32 == code)
    }
}

impl fmt::Display for DisconnectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ProtocolViolation => "this client broke the protocol (see the server's log)",
            Self::PeerDied => "the client is gone",
            Self::HandshakeTimeout => "no hello came in time",
            Self::Quota => "this client used more than its quota",
            Self::SlowConsumer => "this client did not take its completions",
            Self::DoorbellAbuse => "this client rang without cause",
            Self::IdleTimeout => "nothing was sent for the idle time-out",
            Self::Draining => "the server is stopping",
            Self::Evicted => "somebody who watches the server has ended this session",
            Self::MemoryLost => {
                "the machine has lost memory of this session (see the server's log): connect again"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn hello() -> Hello {
        Hello::new(Geometry::default(), [1, 2], 3, "test")
    }

    /// Goal:   every reason why a session ended has a code of its own, and words of its own for people.
    #[test]
    fn every_reason_has_a_code_and_words() {
        let words: BTreeSet<String> = DisconnectReason::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(words.len(), DisconnectReason::ALL.len());
        for reason in DisconnectReason::ALL {
            assert_eq!(DisconnectReason::from_code(reason as u32), Some(reason));
        }
        assert_eq!(DisconnectReason::from_code(u32::MAX), None);
    }

    #[test]
    fn trap20_our_own_hello_is_accepted() {
        assert_eq!(Hello::read(hello().as_bytes()), Ok(hello()));
    }

    /// Goal: every way to get the first message wrong has its refusal (F31, F48).
    #[test]
    fn f31_f48_a_wrong_hello_is_refused_by_code() {
        let mut cases: Vec<(Vec<u8>, u16)> = Vec::new();
        cases.push((Vec::new(), code::BAD_HELLO));
        cases.push((hello().as_bytes()[..95].to_vec(), code::BAD_HELLO));
        cases.push(([hello().as_bytes(), &[0]].concat(), code::BAD_HELLO));
        let bad = |change: &dyn Fn(&mut Hello), code| {
            let mut h = hello();
            change(&mut h);
            (h.as_bytes().to_vec(), code)
        };
        cases.push(bad(&|h| h.magic ^= 1, code::BAD_HELLO));
        cases.push(bad(&|h| h.reserved = 1, code::BAD_HELLO));
        cases.push(bad(&|h| h.lanes = 0, code::BAD_HELLO));
        cases.push(bad(&|h| h.name = [0xff; 32], code::BAD_HELLO));
        cases.push(bad(&|h| h.name[31] = b'x', code::BAD_HELLO));
        cases.push(bad(&|h| h.name[0] = b'\n', code::BAD_HELLO));
        cases.push(bad(&|h| (h.version_min, h.version_max) = (1, 0), code::VERSION_MISMATCH));
        cases.push(bad(&|h| (h.version_min, h.version_max) = (9, 12), code::VERSION_MISMATCH));
        for (bytes, code) in cases {
            assert_eq!(Hello::read(&bytes), Err(code), "{bytes:x?}");
        }
    }

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        let h = Hello::new(Geometry::default(), [0; 2], 0, &"ä".repeat(40));
        assert_eq!(h.display_name(), Some("ä".repeat(16).as_str()));
        let h = Hello::new(Geometry::default(), [0; 2], 0, &format!("x{}", "ä".repeat(40)));
        assert_eq!(h.display_name().map(str::len), Some(31));
    }

    /// Goal: a wish and its answer survive the wire; nothing else is taken for one.
    #[test]
    fn p6_lane_messages_are_read_as_they_were_written() {
        for choice in [LaneChoice::On(3), LaneChoice::NotOn(0)] {
            assert_eq!(LaneRequest::read(LaneRequest::new(choice).as_bytes()), Some(choice));
        }
        let grant = LaneGrant::new(2, NO_CORE);
        assert_eq!(LaneGrant::read(grant.as_bytes()), Some(grant));
        let good = LaneRequest::new(LaneChoice::On(3));
        for bad in [
            LaneRequest { magic: 1, ..good },
            LaneRequest { choice: 2, ..good },
            LaneRequest { reserved: 1, ..good },
        ] {
            assert_eq!(LaneRequest::read(bad.as_bytes()), None);
        }
        assert_eq!(LaneRequest::read(&good.as_bytes()[1..]), None);
        assert_eq!(LaneGrant::read(Goodbye::new(DisconnectReason::Draining).as_bytes()), None);
    }

    /// Goal:   a refusal says what there is too much of, and nothing else does.
    /// Method: every scope; a number that is none; another code.
    #[test]
    fn f29_a_refusal_names_its_scope() {
        for scope in Scope::ALL {
            let welcome = Welcome::too_many(scope, 7, 100);
            assert_eq!((welcome.scope(), welcome.limit, welcome.retry_ms), (Some(scope), 7, 100));
        }
        let unknown = Welcome { home_core: 5, ..Welcome::refusal(code::TOO_MANY) };
        assert_eq!((unknown.scope(), Welcome::refusal(code::NO_MEMORY).scope()), (None, None));
    }

    /// Goal:   a client takes for a session only what is one, of a version that it speaks.
    /// Method: each way to differ from a good answer.
    #[test]
    fn f14_an_answer_is_checked_before_it_is_believed() {
        let good = Welcome { version: VERSION_MAX, ..Welcome::refusal(code::OK) };
        assert_eq!(Answer::read(good.as_bytes(), 1), Ok(Answer::Granted(good)));
        for descriptors in [0, 2] {
            assert!(Answer::read(good.as_bytes(), descriptors).unwrap_err().contains("one descriptor"));
        }
        for bytes in [&good.as_bytes()[1..], &[good.as_bytes(), &[0]].concat(), &[], &[1]] {
            assert!(Answer::read(bytes, 1).unwrap_err().contains("not a doorbell"));
        }
        for unknown in [Welcome { doorbell_kind: 2, ..good }, Welcome { features: 1, ..good }] {
            assert!(Answer::read(unknown.as_bytes(), 1).unwrap_err().contains("does not know"));
        }
        let other = Welcome { magic: 0, ..good };
        assert!(Answer::read(other.as_bytes(), 1).unwrap_err().contains("not a doorbell"));
        let newer = Welcome { version: VERSION_MAX + 1, ..good };
        let mismatch = Welcome { code: code::VERSION_MISMATCH, ..newer };
        assert_eq!(Answer::read(newer.as_bytes(), 1), Ok(Answer::Refused(mismatch)));
        let refusal = Welcome::refusal(code::DRAINING);
        assert_eq!(Answer::read(refusal.as_bytes(), 0), Ok(Answer::Refused(refusal)));
        let bye = Goodbye::new(DisconnectReason::HandshakeTimeout);
        assert_eq!(Answer::read(bye.as_bytes(), 0), Ok(Answer::Ended(DisconnectReason::HandshakeTimeout)));
    }

    #[test]
    fn a_goodbye_carries_its_reason() {
        for reason in DisconnectReason::ALL {
            assert_eq!(Goodbye::read(Goodbye::new(reason).as_bytes()), Some(reason));
        }
        let reserved = Goodbye { reserved: 1, ..Goodbye::new(DisconnectReason::Draining) };
        assert_eq!(Goodbye::read(reserved.as_bytes()), None);
        assert_eq!(Goodbye::read(&[0; 16]), None);
        assert_eq!(Goodbye::read(b"x"), None);
    }
}

//! How a client comes back to its server: what it is told, how long it pauses between attempts, and which answers end
//! them (R3.4, FAULTS §5).

use super::connect::{CLOSED_EARLY, CUT, ClientConfig, Connecting};
use super::{ConnectionId, IpcClient};
use crate::error::{IpcError, Result};
use crate::machine;
use crate::protocol::rendezvous;
use doorbell_shm::entry::{codec, flag};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The first pause between two attempts to connect; each is twice the last.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest, unless the caller says otherwise.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// Longest time that opening connections may take, beyond which there are no clocks.
const PATIENCE_MAX: Duration = Duration::from_secs(24 * 3600);

/// What a client that connects again by itself tells its owner about its link to the server.
#[derive(Debug)]
#[non_exhaustive]
pub enum LinkStatus {
    /// It looks for the server. Told once, however many attempts that takes.
    Connecting,
    /// There is a session; calls go on.
    Connected,
    /// The session is over, or connecting has come to an end. Unless the reason is final, `Connecting` follows.
    Disconnected {
        /// Why.
        reason: IpcError,
    },
}

/// Is told whenever the link to the server changes, on the thread that finds out. It must not wait, and not use the
/// client.
pub type StatusCallback = Arc<dyn Fn(&LinkStatus) + Send + Sync>;

/// How a client connects again.
#[derive(Clone)]
pub struct Reconnect {
    /// Longest pause between two attempts. The pauses are 1, 2, 4 ms and so on, each cut short at random by up to half.
    pub pause_max: Duration,
    /// How long a server may be away before the client gives up for good; `None`: for ever.
    pub give_up_after: Option<Duration>,
    /// Is told of every change.
    pub on_status: Option<StatusCallback>,
}

impl Default for Reconnect {
    /// Pauses of at most 50 ms, for ever, telling nobody.
    fn default() -> Self {
        Self { pause_max: PAUSE_MAX, give_up_after: None, on_status: None }
    }
}

impl Reconnect {
    /// The same with somebody who is told of every change.
    pub fn on_status(mut self, told: impl Fn(&LinkStatus) + Send + Sync + 'static) -> Self {
        self.on_status = Some(Arc::new(told));
        self
    }

    pub(super) fn tell(&self, status: &LinkStatus) {
        if let Some(told) = &self.on_status {
            told(status);
        }
    }
}

impl fmt::Debug for Reconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnect")
            .field("pause_max", &self.pause_max)
            .field("give_up_after", &self.give_up_after)
            .field("on_status", &self.on_status.is_some())
            .finish()
    }
}

/// The connection of a client that many use, and what becomes of it when the server goes.
#[derive(Debug, Clone)]
pub struct LinkOptions {
    /// What the bodies on the connection are, one of [`doorbell_shm::entry::codec`]; raw bytes unless said otherwise.
    pub codec: u8,
    /// Its calls take the bulk rings: interactive ones of others overtake them (R2.8).
    pub bulk: bool,
    /// `None`: the client is of no use any more once its session is over.
    pub reconnect: Option<Reconnect>,
}

impl Default for LinkOptions {
    /// Raw bodies, interactive, no second session.
    fn default() -> Self {
        Self { codec: codec::RAW, bulk: false, reconnect: None }
    }
}

impl LinkOptions {
    /// The same with another session whenever one is over.
    pub fn reconnecting() -> Self {
        Self { reconnect: Some(Reconnect::default()), ..Self::default() }
    }
}

/// Whether an attempt that ended so is to be followed by another one. What cannot change by waiting is final.
pub(super) fn may_pass(error: &IpcError) -> bool {
    match error {
        IpcError::NotRunning { .. }
        | IpcError::TooMany { .. }
        | IpcError::NoMemory { .. }
        | IpcError::Draining { .. }
        | IpcError::HandshakeTimeout(_)
        | IpcError::Timeout
        | IpcError::Disconnected(_)
        | IpcError::NotExecuted
        | IpcError::Io { .. } => true,
        IpcError::Handshake(what) => [CLOSED_EARLY, CUT].contains(what),
        _ => false,
    }
}

/// Whether what a session ended with leaves room for another one.
pub(super) fn is_loss(error: &IpcError) -> bool {
    matches!(error, IpcError::Disconnected(_) | IpcError::NotExecuted)
}

/// Whether a session that refuses a call so is over, or about to be. Whoever waits for it learns of its end.
pub(super) fn ends_soon(error: &IpcError) -> bool {
    is_loss(error) || matches!(error, IpcError::Draining { .. })
}

/// The pauses between attempts, each twice as long as the last, up to a limit.
#[derive(Debug)]
pub(super) struct Pauses {
    next: Duration,
    max: Duration,
}

impl Pauses {
    pub fn up_to(max: Duration) -> Self {
        Self { next: PAUSE_MIN.min(max), max }
    }

    /// The next one, of which `random` decides what part, at least half, is waited. After a server that is there and has
    /// no room it is at least what that asked for.
    pub fn next(&mut self, random: u64, after: &IpcError) -> Duration {
        let part = 512 + (random % 513) as u32;
        let pause = self.next * part / 1024;
        self.next = (self.next * 2).min(self.max);
        match after {
            IpcError::TooMany { retry_ms, .. } | IpcError::NoMemory { retry_ms } => {
                pause.max(Duration::from_millis(u64::from(*retry_ms)) * part / 1024)
            }
            _ => pause,
        }
    }
}

/// Where a client connects to, again and again.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub path: PathBuf,
    pub config: ClientConfig,
    client_id: [u64; 2],
}

/// A connection that is to be opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// What its owner calls it.
    pub at: usize,
    pub codec: u8,
    pub bulk: bool,
}

/// A client, and the connections that were opened for it, each with what its owner calls it.
pub(super) type Link = (IpcClient, Vec<(usize, ConnectionId)>);

impl Address {
    pub fn new(path: PathBuf, config: ClientConfig) -> Result<Self> {
        Ok(Self { path, config, client_id: rendezvous::random_id()? })
    }

    /// Says hello. Waits only for a server whose queue is full, and no longer than that.
    fn begin(&self, patience: Duration) -> Result<Connecting> {
        let connect_timeout = self.config.connect_timeout.min(patience);
        let config = ClientConfig { connect_timeout, ..self.config.clone() };
        let begun = Connecting::begin_as(&self.path, &config, self.client_id)?;
        Ok(begun.with_patience(self.config.connect_timeout))
    }

    /// All of it, for those who can wait: a session with connections.
    pub fn connect(&self, lines: &[Wanted]) -> Result<Link> {
        let patience = self.config.connect_timeout;
        let client = self.begin(patience)?.finish()?;
        let deadline = machine::now().checked_add(patience);
        let open = |line: &Wanted| -> Result<_> {
            Ok((line.at, client.open_until(line.codec, line.bulk, deadline)?.detach()))
        };
        let connections = lines.iter().map(open).collect::<Result<_>>()?;
        Ok((client, connections))
    }
}

/// How long a step may wait for a place in the queue of a server that is there.
const QUEUE: Duration = Duration::from_millis(20);

/// Looks for a server that was there and will be there again, step by step.
#[derive(Debug)]
pub(super) struct Search {
    since: Instant,
    pauses: Pauses,
    stage: Stage,
    /// When to try again.
    next: Instant,
}

/// How far an attempt has got.
#[derive(Debug)]
enum Stage {
    /// None is under way.
    Pausing,
    /// The server has not answered the hello yet.
    Greeting(Connecting),
    /// There is a session, and some of its connections.
    Opening(Box<Opening>),
}

/// A session whose connections are being opened.
#[derive(Debug)]
struct Opening {
    client: IpcClient,
    wanted: Vec<Wanted>,
    connections: Vec<(usize, ConnectionId)>,
    /// The slot of the OPEN that has not been answered.
    asked: Option<u32>,
    give_up: Instant,
}

impl Opening {
    /// Does what can be done without waiting; says whether all connections are open.
    fn step(&mut self) -> Result<bool> {
        while let Some(Wanted { at, codec, bulk }) = self.wanted.get(self.connections.len()).copied() {
            let client = &self.client;
            let Some(slot) = self.asked else {
                let flags = if bulk { flag::BULK } else { 0 };
                self.asked = Some(client.session()?.submit_open(codec, flags)?);
                continue;
            };
            let next = client.session()?.next()?;
            match next {
                Some(answered) if answered.slot == slot => {
                    self.asked = None;
                    self.connections.push((at, client.opened(&answered, codec, bulk)?));
                }
                Some(other) => client.release(&other),
                None if client.prepare_to_wait()? => {}
                None if machine::now() >= self.give_up => return Err(IpcError::Timeout),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

impl Search {
    pub fn new(reconnect: &Reconnect) -> Self {
        let now = machine::now();
        Self { since: now, pauses: Pauses::up_to(reconnect.pause_max), stage: Stage::Pausing, next: now }
    }

    /// Does what there is to do now; `None` if that has not led to a session yet.
    ///
    /// # Errors
    ///
    /// What ends the search.
    pub fn step(
        &mut self,
        address: &Address,
        lines: &[Wanted],
        reconnect: &Reconnect,
    ) -> Result<Option<Link>> {
        loop {
            let stage = match std::mem::replace(&mut self.stage, Stage::Pausing) {
                Stage::Pausing if machine::now() < self.next => return Ok(None),
                Stage::Pausing => address.begin(QUEUE).map(Stage::Greeting),
                Stage::Greeting(begun) if !begun.is_due()? => {
                    self.stage = Stage::Greeting(begun);
                    return Ok(None);
                }
                Stage::Greeting(begun) => begun.finish_at_once().map(|client| {
                    let give_up = machine::now() + address.config.connect_timeout.min(PATIENCE_MAX);
                    let (wanted, connections) = (lines.to_vec(), Vec::new());
                    Stage::Opening(Box::new(Opening { client, wanted, connections, asked: None, give_up }))
                }),
                Stage::Opening(mut opening) => match opening.step() {
                    Ok(true) => return Ok(Some((opening.client, opening.connections))),
                    Ok(false) => {
                        self.stage = Stage::Opening(opening);
                        return Ok(None);
                    }
                    Err(error) => Err(error),
                },
            };
            match stage {
                Ok(stage) => self.stage = stage,
                Err(error) => self.next = machine::now() + self.pause_after(error, reconnect)?,
            }
        }
    }

    /// How long to wait after an attempt that ended so; gives the error back if it was the last.
    pub fn pause_after(&mut self, error: IpcError, reconnect: &Reconnect) -> Result<Duration> {
        let given_up = reconnect.give_up_after.is_some_and(|limit| self.since.elapsed() >= limit);
        if given_up || !may_pass(&error) {
            return Err(error);
        }
        let [random, _] = rendezvous::random_id()?;
        Ok(self.pauses.next(random, &error))
    }

    /// When the next step is due, if the [descriptor](Search::descriptor) does not become readable before.
    pub fn due(&self) -> Instant {
        match &self.stage {
            Stage::Pausing => self.next,
            Stage::Greeting(begun) => begun.gives_up_at(),
            Stage::Opening(opening) => opening.give_up,
        }
    }

    /// Readable when the next step is due, if there is one.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Pausing => None,
            Stage::Greeting(begun) => Some(begun.as_fd()),
            Stage::Opening(opening) => Some(opening.client.as_fd()),
        }
    }
}

/// Waits until one of the descriptors is readable, at most until then.
pub(super) fn sleep_until(descriptors: &[BorrowedFd<'_>], until: Option<Instant>) -> Result<()> {
    let left = until.map(|until| until.saturating_duration_since(machine::now()));
    let left = left.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    });
    let events = PollFlags::IN | PollFlags::RDHUP;
    let mut polled: Vec<PollFd<'_>> =
        descriptors.iter().map(|fd| PollFd::from_borrowed_fd(*fd, events)).collect();
    match poll(&mut polled, left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(IpcError::io("poll of a client", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::handshake::DisconnectReason;

    /// Goal:   R3.4: pauses grow from 1 ms to the limit, and are never cut short by more than half, nor prolonged.
    #[test]
    fn r3_4_pauses_double_up_to_their_limit() {
        let gone = IpcError::NotExecuted;
        for (random, part) in [(0, 512), (512, 1024), (513, 512), (u64::MAX, 512 + (u64::MAX % 513) as u32)] {
            let mut pauses = Pauses::up_to(Duration::from_millis(50));
            for whole in [1, 2, 4, 8, 16, 32, 50, 50] {
                let pause = pauses.next(random, &gone);
                assert_eq!(pause, Duration::from_millis(whole) * part / 1024);
            }
        }
        let full = IpcError::TooMany { scope: "sessions", limit: 1, retry_ms: 100 };
        assert_eq!(Pauses::up_to(PAUSE_MAX).next(512, &full), Duration::from_millis(100));
        assert_eq!(Pauses::up_to(Duration::ZERO).next(512, &gone), Duration::ZERO);
    }

    /// Goal:   R3.4, F48: what no waiting changes ends the attempts, and nothing else does.
    #[test]
    fn r3_4_f48_what_no_waiting_changes_is_final() {
        let path = || PathBuf::from("/s");
        for error in [
            IpcError::NotRunning { path: path() },
            IpcError::Draining { retry_ms: 1 },
            IpcError::NoMemory { retry_ms: 1 },
            IpcError::Disconnected(DisconnectReason::HandshakeTimeout),
            IpcError::Handshake(CLOSED_EARLY),
            IpcError::Handshake(CUT),
        ] {
            assert!(may_pass(&error), "{error}");
        }
        for error in [
            IpcError::VersionMismatch { min: 2, max: 3, ours: 1 },
            IpcError::NotPermitted,
            IpcError::WrongServer { path: path(), uid: 1 },
            IpcError::SocketPath { path: path(), problem: "" },
            IpcError::Handshake("the server did not understand our hello"),
            IpcError::Config(String::new()),
        ] {
            assert!(!may_pass(&error), "{error}");
        }
    }
}

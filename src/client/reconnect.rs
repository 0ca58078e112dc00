//! How a client comes back to its server: what it is told, how long it pauses between attempts, and which answers end
//! them (R3.4, FAULTS §5).

use super::connect::{CLOSED_EARLY, CUT, ClientConfig, Connecting};
use super::{ConnectionId, IpcClient};
use crate::error::{IpcError, Result};
use crate::protocol::rendezvous;
use doorbell_shm::entry::codec;
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
    /// What the bodies on the connection are, one of [`codec`](crate::codec)'s numbers; raw bytes unless said otherwise.
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

/// A client, and the connections that were opened for it.
pub(super) type Link = (IpcClient, Vec<ConnectionId>);

impl Address {
    pub fn new(path: PathBuf, config: ClientConfig) -> Result<Self> {
        Ok(Self { path, config, client_id: rendezvous::random_id()? })
    }

    /// Says hello; to be [finished](Address::finish). Waits only for a server whose queue is full, and no longer than
    /// that.
    fn begin(&self, patience: Duration) -> Result<Connecting> {
        let connect_timeout = self.config.connect_timeout.min(patience);
        let config = ClientConfig { connect_timeout, ..self.config.clone() };
        let begun = Connecting::begin_as(&self.path, &config, self.client_id)?;
        Ok(begun.with_patience(self.config.connect_timeout))
    }

    /// Waits for the session, and opens connections of these codecs and priorities.
    fn finish(&self, begun: Connecting, lines: &[(u8, bool)], patience: Duration) -> Result<Link> {
        let client = begun.finish()?;
        let deadline = Instant::now().checked_add(patience);
        let open = |(codec, bulk): &(u8, bool)| -> Result<ConnectionId> {
            Ok(client.open_until(*codec, *bulk, deadline)?.detach())
        };
        let connections = lines.iter().map(open).collect::<Result<_>>()?;
        Ok((client, connections))
    }

    /// Both, for those who can wait.
    pub fn connect(&self, lines: &[(u8, bool)]) -> Result<Link> {
        let patience = self.config.connect_timeout;
        self.finish(self.begin(patience)?, lines, patience)
    }
}

/// How long a step may wait for a server that is there: for a place in its queue, for connections to be opened.
const STEP: Duration = Duration::from_millis(100);

/// Looks for a server that was there and will be there again, step by step.
#[derive(Debug)]
pub(super) struct Search {
    since: Instant,
    pauses: Pauses,
    begun: Option<Connecting>,
    /// When to try again.
    next: Instant,
}

impl Search {
    pub fn new(reconnect: &Reconnect) -> Self {
        let now = Instant::now();
        Self { since: now, pauses: Pauses::up_to(reconnect.pause_max), begun: None, next: now }
    }

    /// Does what there is to do now; `None` if that has not led to a session yet.
    ///
    /// # Errors
    ///
    /// What ends the search.
    pub fn step(
        &mut self,
        address: &Address,
        lines: &[(u8, bool)],
        reconnect: &Reconnect,
    ) -> Result<Option<Link>> {
        loop {
            let attempt = match self.begun.take() {
                Some(begun) if !begun.is_due()? => {
                    self.begun = Some(begun);
                    return Ok(None);
                }
                Some(begun) => address.finish(begun, lines, STEP).map(Some),
                None if Instant::now() < self.next => return Ok(None),
                None => address.begin(STEP).map(|begun| {
                    self.begun = Some(begun);
                    None
                }),
            };
            match attempt {
                Ok(Some(link)) => return Ok(Some(link)),
                Ok(None) => {}
                Err(error) => {
                    let pause = self.pause_after(error, reconnect)?;
                    self.next = Instant::now() + pause;
                }
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
        self.begun.as_ref().map_or(self.next, Connecting::gives_up_at)
    }

    /// Readable when the next step is due, if there is one.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.begun.as_ref().map(Connecting::as_fd)
    }
}

/// Waits until one of the descriptors is readable, at most until then.
pub(super) fn sleep_until(descriptors: &[BorrowedFd<'_>], until: Option<Instant>) -> Result<()> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
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

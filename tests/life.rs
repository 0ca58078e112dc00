//! How sessions and servers end: in order, for want of use, for want of taking (R3.7, R4.4, R4.7; F8, F22, F49).

mod common;

use common::process::returns;
use common::raw::{Raw, SMALL};
use common::streams::ENDLESS;
use common::{Bystander, COUNT, TestDir, TestServer, eventually};
use doorbell::protocol::handshake::{DisconnectReason, LaneChoice};
use doorbell::{
    CallOptions, ClientConfig, Connection, Context, Deferred, HandlerError, HandlerTable, IpcClient,
    IpcError, IpcServer, MessageType, Metrics, ReloadHandle, Reply, ServerConfig, ShutdownHandle, WaitPolicy,
};
use doorbell_shm::lane::INTERACTIVE;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Is answered when the test says so.
const LATER: MessageType = MessageType(256);
/// Counts its calls.
const TALLY: MessageType = MessageType(257);

#[derive(Default)]
struct State {
    tickets: Mutex<Vec<Deferred>>,
    counted: AtomicU64,
}

type Shared = &'static State;

fn later(context: &Context<'_, Shared>, _: &[u8], ticket: Deferred) -> Result<(), HandlerError> {
    context.state().tickets.lock().unwrap().push(ticket);
    Ok(())
}

fn tally(context: &Context<'_, Shared>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let count = context.state().counted.fetch_add(1, SeqCst) + 1;
    reply.write(&count.to_le_bytes())
}

static TABLE: HandlerTable<Shared> = HandlerTable::with_builtins().on_deferred(LATER, later).on(TALLY, tally);

struct Server {
    path: PathBuf,
    handle: ShutdownHandle,
    reload: ReloadHandle,
    thread: Option<JoinHandle<Metrics>>,
    state: Shared,
    _directory: TestDir,
}

impl Server {
    fn start(config: ServerConfig) -> Self {
        let directory = TestDir::new();
        let path = directory.join("s");
        let state: Shared = Box::leak(Box::default());
        let bound = IpcServer::new(&TABLE, state).config(config).bind(&path).unwrap();
        let (handle, reload) = (bound.shutdown_handle(), bound.reload_handle());
        let thread = std::thread::spawn(move || bound.serve().unwrap());
        Self { path, handle, reload, thread: Some(thread), state, _directory: directory }
    }

    fn client(&self) -> IpcClient {
        let config = ClientConfig { policy: WaitPolicy::Block, ..ClientConfig::for_load(32, 1024) };
        IpcClient::connect_with(&self.path, &config).unwrap()
    }

    /// Begins a call that is answered by the next ticket.
    fn begin(&self, connection: &Connection<'_>) {
        let before = self.tickets();
        connection.submit(LATER, b"", &CallOptions { tag: 1, ..CallOptions::default() }).unwrap();
        eventually("the handler has run", || {
            connection.client().wait(Some(Duration::from_millis(1))).unwrap();
            self.tickets() > before
        });
    }

    fn tickets(&self) -> usize {
        self.state.tickets.lock().unwrap().len()
    }

    fn answer_oldest(&self) {
        let mut ticket = self.state.tickets.lock().unwrap().remove(0);
        ticket.write(&[7; 300]).unwrap();
        ticket.finish();
    }

    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn join(&mut self) -> Metrics {
        eventually("the server returns", || self.is_over());
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            // It may have returned by itself.
            self.handle.shutdown_now().ok();
            self.join();
        }
    }
}

fn one_reactor() -> ServerConfig {
    ServerConfig { policy: WaitPolicy::Block, reactors: 1, ..ServerConfig::default() }
}

fn is_told(error: &IpcError, reason: DisconnectReason) -> bool {
    matches!(error, IpcError::Disconnected(told) if *told == reason)
}

/// The answer of the call with this tag; others are dropped.
fn answer_of(client: &IpcClient, tag: u64) -> Result<Vec<u8>, IpcError> {
    loop {
        while let Some(answer) = client.poll()? {
            if answer.tag() == tag {
                return answer.result().map(|_| answer.to_vec().unwrap());
            }
        }
        client.wait(Some(Duration::from_secs(30)))?;
    }
}

/// Goal:   R3.7, F49: a server that is told to stop begins no call, finishes those under way, tells everybody, and ends
///         as soon as the last one has its answer; what was not taken is known as not executed.
/// Method: a deferred call under way; then the order to stop; then a call of the same session, one of an idle session
///         and a new session. The test answers last.
#[test]
fn r3_7_f49_calls_under_way_are_finished_and_none_is_begun() {
    let mut server = Server::start(ServerConfig { drain_timeout: Duration::from_secs(600), ..one_reactor() });
    let (busy, idle) = (server.client(), server.client());
    let (connection, other) = (busy.open().unwrap(), idle.open().unwrap());
    server.begin(&connection);
    server.handle.shutdown().unwrap();
    let refused = |error: &IpcError| matches!(error, IpcError::Draining { .. });
    eventually("new sessions are refused", || {
        IpcClient::connect(&server.path).map(|_| ()).is_err_and(|error| refused(&error))
    });
    let mut told = other.call(TALLY, b"").unwrap_err();
    while refused(&told) {
        told = other.call(TALLY, b"").unwrap_err();
    }
    assert!(is_told(&told, DisconnectReason::Draining), "the idle session has ended: {told}");
    connection.submit(TALLY, b"", &CallOptions { tag: 2, ..CallOptions::default() }).unwrap();
    busy.flush().unwrap();
    assert!(!busy.wait(Some(Duration::from_millis(50))).unwrap() && !server.is_over());
    server.answer_oldest();
    assert_eq!(answer_of(&busy, 1).unwrap(), [7; 300]);
    assert!(matches!(answer_of(&busy, 2), Err(IpcError::NotExecuted)));
    let metrics = server.join();
    assert_eq!((server.state.counted.load(SeqCst), metrics.ended(DisconnectReason::Draining)), (0, 2));
    assert!(is_told(&connection.call(TALLY, b"").unwrap_err(), DisconnectReason::Draining));
    assert!(!server.path.exists());
}

/// Tells a server to stop when it goes.
struct Stops<'a>(&'a ShutdownHandle);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.shutdown().unwrap();
    }
}

/// Goal:   F49: nothing that was acknowledged is lost and nothing runs twice or unknown to its caller, whatever is under
///         way when the server is told to stop: short calls, long bodies, several lanes.
/// Method: threads that call without pause, each counting its answers, against what the handlers have counted; every
///         other end has to say that the call was not executed.
#[test]
fn r3_7_f49_no_call_is_lost_or_doubled_when_the_server_stops() {
    // No spinning: beside other work, six threads that spin on two cores get nowhere.
    for round in 0..6 {
        let policy = [WaitPolicy::Block, WaitPolicy::Handoff][round % 2];
        let mut server = Server::start(ServerConfig { policy, reactors: 2, ..ServerConfig::default() });
        let answered = AtomicU64::new(0);
        let (path, counted) = (server.path.clone(), &answered);
        let call = move |number: usize| {
            let config = ClientConfig { policy, ..ClientConfig::for_load(8, 1024) };
            // The others may be quick, and the server told to stop before this one has begun.
            let Ok(client) = IpcClient::connect_with(&path, &config) else { return };
            let Ok(connection) = client.open() else { return };
            let body = vec![number as u8; 100_000 * (number % 3)];
            loop {
                let told = connection.call(TALLY, b"").map(|_| counted.fetch_add(1, SeqCst));
                let told = told.and_then(|_| {
                    connection.call(MessageType::ECHO, &body).map(|answer| assert!(answer == body))
                });
                match told {
                    Ok(()) => {}
                    Err(IpcError::NotExecuted | IpcError::Draining { .. }) => return,
                    Err(error) => {
                        assert!(is_told(&error, DisconnectReason::Draining), "{policy:?} {number}: {error}");
                        return;
                    }
                }
            }
        };
        let server = &mut server;
        std::thread::scope(|scope| {
            for number in 0..4 {
                let call = call.clone();
                scope.spawn(move || call(number));
            }
            // Also if that fails: those who call end with the server.
            let _stops = Stops(&server.handle);
            eventually("they call", || answered.load(SeqCst) > 50);
        });
        server.join();
        assert_eq!(server.state.counted.load(SeqCst), answered.load(SeqCst));
    }
}

/// Goal:   F49: waiting for calls under way has its limit, and a second order to stop ends it at once.
/// Method: a call that is never answered, against a short limit, and against a long one and a second order.
#[test]
fn r3_7_f49_the_wait_for_calls_under_way_is_bounded() {
    let limits = [Duration::from_millis(30), Duration::from_secs(600)];
    for (at, drain_timeout) in limits.into_iter().enumerate() {
        let mut server = Server::start(ServerConfig { drain_timeout, ..one_reactor() });
        let client = server.client();
        let connection = client.open().unwrap();
        server.begin(&connection);
        server.handle.shutdown().unwrap();
        if at == 1 {
            eventually("it drains", || {
                IpcClient::connect(&server.path).is_err_and(|e| matches!(e, IpcError::Draining { .. }))
            });
            server.handle.shutdown().unwrap();
        }
        server.join();
        let error = answer_of(&client, 1).unwrap_err();
        assert!(matches!(error, IpcError::ConnectionLost), "{error}");
        assert!(is_told(&connection.call(TALLY, b"").unwrap_err(), DisconnectReason::Draining));
    }
}

/// Goal:   F49: a body whose frames lie behind a call that has not been taken comes to its end all the same.
/// Method: by hand: the first frame, then the order to stop, then another call and the last frame in one go.
#[test]
fn r3_7_f49_the_frames_of_a_body_under_way_are_taken() {
    let server = TestServer::start(WaitPolicy::Block);
    let mut raw = Raw::connect(server.path());
    let call = raw.begin(common::LENGTH.0, SMALL, (SMALL, 1), 20);
    raw.push(INTERACTIVE, &call);
    let first = raw.frame(&call, 1, SMALL + 1, &[1; 10], false);
    raw.push(INTERACTIVE, &first);
    raw.ring();
    let published = raw.word32(raw.layout.published[INTERACTIVE]);
    let before = raw.lane.submissions[INTERACTIVE].next() as u32;
    eventually("the first frame is taken", || published.load(SeqCst) == before);
    let count = raw.entry(COUNT.0, SMALL + 2, b"");
    raw.push(INTERACTIVE, &count);
    let last = raw.frame(&call, 2, SMALL + 3, &[1; 10], true);
    raw.push(INTERACTIVE, &last);
    let path = server.path().to_owned();
    let stopped = std::thread::spawn(move || server.stop());
    let answers = [raw.completion(INTERACTIVE), raw.completion(INTERACTIVE)];
    let slots = answers.map(|answer| (answer.slot, answer.status));
    assert!(slots.contains(&(SMALL, 0)), "{slots:?}");
    let metrics = returns("the server returns", move || stopped.join().unwrap());
    assert_eq!(metrics.ended(DisconnectReason::Draining), 1);
    assert!(!path.exists());
}

/// Limits that a test can wait for.
fn impatient() -> ServerConfig {
    ServerConfig {
        idle_timeout: Some(Duration::from_millis(100)),
        slow_consumer_timeout: Some(Duration::from_millis(100)),
        sweep_interval: Duration::from_millis(1),
        ..one_reactor()
    }
}

/// Goal:   R4.4, trap 14: a session that does nothing is ended and its client is told so by its next call, which was not
///         executed; one with a call under way is not, however long that takes, nor one that calls now and then.
/// Method: one of each; the idle one is waited for, the others are tried long after.
#[test]
fn r4_4_trap14_an_idle_session_is_ended_and_told() {
    let server = Server::start(impatient());
    let (idle, busy, active) = (server.client(), server.client(), server.client());
    let (resting, waiting, calling) = (idle.open().unwrap(), busy.open().unwrap(), active.open().unwrap());
    server.begin(&waiting);
    let begun = Instant::now();
    let ended = || common::stat(&calling, "sessions_ended");
    eventually("the idle session ends", || ended() == 1);
    while begun.elapsed() < Duration::from_millis(400) {
        assert_eq!(ended(), 1, "no other session ends");
    }
    let told = resting.call(TALLY, b"").unwrap_err();
    assert!(is_told(&told, DisconnectReason::IdleTimeout) && told.to_string().contains("idle time-out"));
    server.answer_oldest();
    assert_eq!(answer_of(&busy, 1).unwrap(), [7; 300]);
    assert_eq!(server.state.counted.load(SeqCst), 0);
    drop(waiting);
    eventually("then it is idle, too", || ended() == 2);
    let told = busy.open().map(|_| ()).unwrap_err();
    assert!(is_told(&told, DisconnectReason::IdleTimeout), "{told}");
}

/// The core of the home reactor; a test that needs two cores says so and passes where there is one.
fn first_of_two_cores() -> Option<u32> {
    let cores = doorbell::reactor_cores(&ServerConfig::default()).unwrap();
    if cores.len() < 2 {
        eprintln!("one core alone: nothing to be tested here");
        return None;
    }
    cores[0].map(|core| core as u32)
}

/// Goal:   R4.4, P6: a session of several lanes is idle once all of them are.
/// Method: calls on the further lane alone keep it; then nothing.
#[test]
fn r4_4_a_session_is_idle_once_all_its_lanes_are() {
    let Some(home_core) = first_of_two_cores() else { return };
    let server = TestServer::start_with(ServerConfig { reactors: 2, ..impatient() });
    let watcher = Bystander::new(server.path());
    let mut raw = Raw::connect_with_lanes(server.path(), 2);
    raw.connection = raw.open(0, 0);
    raw.use_lane(LaneChoice::NotOn(home_core));
    let attach = raw.attach();
    raw.push_words(INTERACTIVE, attach.pack());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(400) {
        raw.echo(b"still here");
        watcher.check("a lane in use");
    }
    assert!(raw.runs());
    let reason = returns("it is ended", move || {
        eventually("it is ended", || {
            watcher.check("an idle session");
            !raw.runs()
        });
        raw.ended()
    });
    assert_eq!(reason, DisconnectReason::IdleTimeout);
}

/// Goal:   F8, F22: whoever takes nothing while his results fill his completion ring, or the window of a stream, is
///         ended as a slow consumer; a few untaken answers are no reason.
/// Method: a full ring by hand; a stream that nobody reads; an answer that nobody takes.
#[test]
fn f8_f22_a_client_that_takes_nothing_is_ended() {
    let server = TestServer::start_with(ServerConfig { idle_timeout: None, ..impatient() });
    let watcher = Bystander::new(server.path());
    let mut full = Raw::connect(server.path());
    for _ in 0..8 {
        let entry = full.entry(COUNT.0, SMALL, b"");
        full.push(INTERACTIVE, &entry);
    }
    full.ring();
    let lazy = common::client(server.path(), WaitPolicy::Block);
    let untaken = lazy.open().unwrap();
    untaken.submit(MessageType::PING, b"", &CallOptions::default()).unwrap();
    lazy.flush().unwrap();
    let reader = common::client(server.path(), WaitPolicy::Block);
    let connection = reader.open().unwrap();
    let options = CallOptions { pieces: true, tag: 5, ..CallOptions::default() };
    connection.submit(ENDLESS, b"", &options).unwrap();
    eventually("the stream begins", || {
        reader.wait(Some(Duration::from_millis(1))).unwrap();
        server.state.streams.load(SeqCst) == 1
    });
    eventually("both are ended", || watcher.stat("sessions_ended") == 2);
    assert_eq!(full.ended(), DisconnectReason::SlowConsumer);
    assert_eq!(server.state.streams.load(SeqCst), 0);
    let told = reader.open().map(|_| ()).unwrap_err();
    assert!(is_told(&told, DisconnectReason::SlowConsumer), "{told}");
    assert!(untaken.call(MessageType::PING, b"").is_ok(), "a few untaken answers hurt nobody");
}

/// Goal:   R4.7: limits of a running server can be changed.
/// Method: a server that lets sessions idle for ever, then not; more sessions than it was started for are not had.
#[test]
fn r4_7_a_running_server_takes_new_limits() {
    let patient = ServerConfig { idle_timeout: None, max_sessions: 2, max_half_open: 2, ..impatient() };
    let server = Server::start(patient.clone());
    let (idle, watcher) = (server.client(), server.client());
    let (resting, watching) = (idle.open().unwrap(), watcher.open().unwrap());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(200) {
        assert_eq!(common::stat(&watching, "sessions_ended"), 0);
    }
    server.reload.reload(&ServerConfig { max_sessions: 9, ..patient.clone() }).unwrap();
    server
        .reload
        .reload(&ServerConfig { idle_timeout: impatient().idle_timeout, max_sessions: 9, ..patient })
        .unwrap();
    eventually("the idle session ends", || common::stat(&watching, "sessions_ended") == 1);
    assert!(is_told(&resting.call(TALLY, b"").unwrap_err(), DisconnectReason::IdleTimeout));
    let next = server.client();
    let error = IpcClient::connect(&server.path).map(|_| ()).unwrap_err();
    assert!(matches!(error, IpcError::TooMany { limit: 2, .. }), "{error}");
    drop(next);
}

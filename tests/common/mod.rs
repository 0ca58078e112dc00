//! A server in a thread of the test, on a path of its own.

#![allow(dead_code)]

pub mod executed;
#[cfg(feature = "openai")]
pub mod openai;
pub mod process;
#[cfg(feature = "providers")]
pub mod provider;
pub mod raw;
pub mod streams;

use doorbell::{
    ClientConfig, Connection, Context, HandlerError, HandlerTable, IpcClient, IpcError, IpcServer,
    MessageType, Metrics, Pieces, Progress, Reply, ServerConfig, ShutdownHandle, WaitPolicy,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Panics.
pub const PANIC: MessageType = MessageType(256);
/// Answers with 2 MiB, more than any slot.
pub const FLOOD: MessageType = MessageType(257);
/// Refuses its body.
pub const REFUSE: MessageType = MessageType(258);
/// Counts its calls in the server's state and answers with the count.
pub const COUNT: MessageType = MessageType(259);
/// Waits until the test opens the gate, then counts.
pub const GATE: MessageType = MessageType(260);
/// Reads its request twice, with the gate in between, and answers whether both were the same.
pub const READ_TWICE: MessageType = MessageType(261);

/// Answers with the length of its body, which it wants whole.
pub const LENGTH: MessageType = MessageType(262);
/// The same, of at most 64 KiB.
pub const AT_MOST: MessageType = MessageType(263);
/// Takes its body piece by piece, and stops to after the first.
pub const STUCK: MessageType = MessageType(264);
/// Takes its body piece by piece, and has enough of it after the third.
pub const EARLY: MessageType = MessageType(265);
/// Takes its body piece by piece, and panics at the third.
pub const BREAKS: MessageType = MessageType(266);
/// Takes its body piece by piece, and waits for the gate with the first.
pub const HELD: MessageType = MessageType(267);

#[derive(Debug, Default)]
pub struct State {
    pub counted: AtomicU64,
    pub entered: AtomicU64,
    pub gate: AtomicU64,
    /// Streams of [`streams`] that are being answered.
    pub streams: AtomicU64,
}

pub type Shared = &'static State;

fn panic(_: &Context<'_, Shared>, _: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    panic!("a handler that panics on purpose")
}

fn flood(_: &Context<'_, Shared>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    // The error is ignored on purpose: the answer must not be cut short silently all the same.
    reply.write(&[7; 2 << 20]).ok();
    Ok(())
}

fn refuse(_: &Context<'_, Shared>, request: &[u8], _: &mut Reply<'_>) -> Result<(), HandlerError> {
    Err(HandlerError::Decode(format!("{} bytes make no sense", request.len())))
}

fn count(context: &Context<'_, Shared>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    let count = context.state().counted.fetch_add(1, Ordering::SeqCst) + 1;
    reply.write(&count.to_le_bytes())
}

fn gate(context: &Context<'_, Shared>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    pass_gate(context.state());
    count(context, request, reply)
}

fn pass_gate(state: &State) {
    let ticket = state.entered.fetch_add(1, Ordering::SeqCst) + 1;
    while state.gate.load(Ordering::SeqCst) < ticket {
        std::thread::yield_now();
    }
}

fn read_twice(
    context: &Context<'_, Shared>,
    request: &[u8],
    reply: &mut Reply<'_>,
) -> Result<(), HandlerError> {
    let first = request.to_vec();
    pass_gate(context.state());
    reply.write(&[u8::from(first == request)])
}

fn length(_: &Context<'_, Shared>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&(request.len() as u64).to_le_bytes())
}

/// Does so many pieces of work, and then what it is for.
struct After(u32, fn(&mut Reply<'_>) -> Result<Progress, HandlerError>);

impl Pieces<Shared> for After {
    fn take(
        &mut self,
        _: &Context<'_, Shared>,
        bytes: &[u8],
        _: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        if self.0 == 0 {
            return (self.1)(reply);
        }
        self.0 -= 1;
        Ok(Progress::Took(bytes.len()))
    }
}

pub type Made = Result<Box<dyn Pieces<Shared>>, HandlerError>;

fn stuck(_: &Context<'_, Shared>, _: Option<u64>) -> Made {
    Ok(Box::new(After(1, |_| Ok(Progress::Took(0)))))
}

fn early(_: &Context<'_, Shared>, _: Option<u64>) -> Made {
    Ok(Box::new(After(2, |reply| reply.write(b"enough").map(|()| Progress::Done))))
}

fn breaks(_: &Context<'_, Shared>, _: Option<u64>) -> Made {
    Ok(Box::new(After(2, |_| panic!("a handler of pieces that panics on purpose"))))
}

/// Waits for the gate, then takes what there is.
struct Held;

impl Pieces<Shared> for Held {
    fn take(
        &mut self,
        context: &Context<'_, Shared>,
        bytes: &[u8],
        last: bool,
        _: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        if !bytes.is_empty() {
            pass_gate(context.state());
        }
        Ok(if last { Progress::Done } else { Progress::Took(bytes.len()) })
    }
}

fn held(_: &Context<'_, Shared>, _: Option<u64>) -> Made {
    Ok(Box::new(Held))
}

static TABLE: HandlerTable<Shared> = HandlerTable::with_builtins()
    .on(LENGTH, length)
    .on(AT_MOST, length)
    .at_most(AT_MOST, 65_536)
    .on_pieces(STUCK, stuck)
    .on_pieces(EARLY, early)
    .on_pieces(BREAKS, breaks)
    .on_pieces(HELD, held)
    .on_pieces(streams::ENDLESS, streams::endless)
    .on_pieces(streams::RECORDS, streams::records)
    .on(streams::CORE, streams::core)
    .on(PANIC, panic)
    .on(FLOOD, flood)
    .on(REFUSE, refuse)
    .on(COUNT, count)
    .on(GATE, gate)
    .on(READ_TWICE, read_twice);

/// Serves the test handlers at `path` on the calling thread, until killed; `watch` gets a thread of its own.
pub fn serve_here(path: &Path, watch: impl FnOnce(Shared) + Send + 'static) {
    let state: Shared = Box::leak(Box::default());
    std::thread::spawn(move || watch(state));
    IpcServer::new(&TABLE, state).bind(path).unwrap().serve().unwrap();
}

/// A directory of the test's own, removed with it.
pub struct TestDir(pub PathBuf);

impl TestDir {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("doorbell-test-{}-{n}", std::process::id()));
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A server that runs until dropped.
pub struct TestServer {
    path: PathBuf,
    handle: ShutdownHandle,
    thread: Option<JoinHandle<Metrics>>,
    pub state: Shared,
    _directory: TestDir,
}

impl TestServer {
    /// Tells it to stop, once what is under way has been done.
    pub fn ask_to_stop(&self) {
        self.handle.shutdown().unwrap();
    }

    /// Asks it to end, whatever is under way.
    pub fn end_at_once(&self) {
        self.handle.shutdown_now().unwrap();
    }

    /// Whether all its reactors have ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// One reactor: what it counts is exact at once, and a handler that waits holds everybody up.
    pub fn start(policy: WaitPolicy) -> Self {
        Self::start_with(ServerConfig { policy, reactors: 1, ..ServerConfig::default() })
    }

    pub fn start_with(config: ServerConfig) -> Self {
        let directory = TestDir::new();
        let path = directory.join("s");
        let state: Shared = Box::leak(Box::default());
        let bound = IpcServer::new(&TABLE, state).config(config).bind(&path).unwrap();
        let handle = bound.shutdown_handle();
        let thread = std::thread::spawn(move || bound.serve().unwrap());
        Self { path, handle, thread: Some(thread), state, _directory: directory }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops the server and returns what it counted.
    pub fn stop(mut self) -> Metrics {
        self.handle.shutdown().unwrap();
        self.thread.take().unwrap().join().unwrap()
    }

    /// Lets one more call pass the gate.
    pub fn open_gate(&self) {
        self.state.gate.fetch_add(1, Ordering::SeqCst);
    }

    pub fn entered(&self) -> u64 {
        self.state.entered.load(Ordering::SeqCst)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.state.gate.store(u64::MAX, Ordering::SeqCst);
            // It may have ended.
            self.handle.shutdown_now().ok();
            if !std::thread::panicking() {
                thread.join().unwrap();
            }
        }
    }
}

/// A client that waits by `policy`, with four small slots, one of 4 KiB, one of 16 KiB.
pub fn client(path: &Path, policy: WaitPolicy) -> IpcClient {
    let slots = ClientConfig { medium_slots: 1, large_slots: 1, ..ClientConfig::default() };
    IpcClient::connect_with(path, &ClientConfig { policy, ..slots }).unwrap()
}

/// Sessions whose base slots use up the memory of a server.
pub fn all_memory(path: &Path) -> Vec<IpcClient> {
    let greedy = |pages| ClientConfig { medium_slots: pages, lease_pages: 0, ..ClientConfig::default() };
    let mut held = Vec::new();
    let mut pages = 256;
    while pages > 0 {
        match IpcClient::connect_with(path, &greedy(pages)) {
            Ok(client) => held.push(client),
            Err(IpcError::NoMemory { .. }) => pages /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    held
}

/// A counter of the server, as its `Stats` handler tells it.
pub fn stat(connection: &Connection<'_>, name: &str) -> u64 {
    let reply_capacity = connection.client().max_message_size().min(4096);
    let options = doorbell::CallOptions { reply_capacity, ..doorbell::CallOptions::default() };
    let json =
        connection.call_with(MessageType::STATS, b"", &options, |answer| answer.to_vec()).unwrap().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    json[name].as_u64().unwrap_or_else(|| panic!("no counter {name} in {json}"))
}

/// A client that was there before the attack and must not notice it.
pub struct Bystander {
    pub client: IpcClient,
    calls: AtomicU64,
}

impl Bystander {
    /// Connects and calls: an answered call means that the server has settled this session, too.
    pub fn new(path: &Path) -> Self {
        let bystander = Self { client: client(path, WaitPolicy::Block), calls: AtomicU64::new(0) };
        bystander.check("nothing yet");
        bystander
    }

    /// A few echoes, long and short, checked byte for byte.
    pub fn check(&self, after: &str) {
        let connection = self.client.open().unwrap_or_else(|e| panic!("after {after}: {e}"));
        for len in [0usize, 100, 5000, 16384] {
            let seed = self.calls.fetch_add(1, Ordering::Relaxed) as usize;
            let request: Vec<u8> = (0..len).map(|i| (i * 7 + seed) as u8).collect();
            let answer = connection.call(MessageType::ECHO, &request);
            assert!(answer.is_ok_and(|a| a == request), "the bystander failed after: {after}");
        }
    }

    /// A counter of the server.
    pub fn stat(&self, name: &str) -> u64 {
        stat(&self.client.open().unwrap(), name)
    }

    /// What of the server's memory budget is used, as it shows it with its next sweep.
    pub fn budget(&self) -> u64 {
        let sweeps = self.stat("sweeps");
        eventually("a sweep", || self.stat("sweeps") > sweeps);
        self.stat("budget_used")
    }
}

/// Waits until `condition` holds; fails after half a minute.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed().as_secs() < 30, "waited 30 s for: {what}");
        std::thread::yield_now();
    }
}

/// Runs `promtool` on a text that it must have nothing to say against.
pub fn promtool(arguments: &[&str], text: &str) {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is missing: run ci/setup.sh");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{text}");
}

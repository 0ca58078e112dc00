//! Zero heap allocations per message, on both sides (R1.7), by a counting allocator in each process.

#![allow(unsafe_code)]

use doorbell::protocol::records::RecordReader;
use doorbell::{
    CallOptions, ClientConfig, Connection, Context, Deferred, HandlerError, HandlerTable, IpcClient,
    IpcError, IpcServer, MessageType, Reply, ServerConfig, WaitPolicy,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts every allocation of the process.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: forwards to the system allocator and only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Answers with the allocations of the server's process so far.
const COUNT: MessageType = MessageType::USER;

fn count(_: &Context<'_, ()>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&ALLOCATIONS.load(Relaxed).to_le_bytes())
}

/// Streams as many chunks as its request says, from a thread.
const STREAM: MessageType = MessageType(257);

const CHUNK: [u8; 64] = [7; 64];

fn stream(_: &Context<'_, ()>, request: &[u8], mut answer: Deferred) -> Result<(), HandlerError> {
    let count = request.try_into().map(u64::from_le_bytes).map_err(|_| HandlerError::TooLarge)?;
    std::thread::spawn(move || {
        for _ in 0..count {
            answer.write_record(&CHUNK).unwrap();
        }
        answer.finish();
    });
    Ok(())
}

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(COUNT, count).on_deferred(STREAM, stream);

/// The variable that makes this executable a server, with the path to listen at.
const SERVER: &str = "DOORBELL_TEST_ALLOCATIONS_SERVER";

/// The server process: this executable once more. Does nothing in a test run.
#[test]
fn serve_for_the_other_test() {
    let Some(path) = std::env::var_os(SERVER) else { return };
    // On a busy machine a session may wait for its turn for longer than it may be idle.
    let config = ServerConfig { policy: WaitPolicy::Spin, idle_timeout: None, ..ServerConfig::default() };
    IpcServer::new(&TABLE, ()).config(config).bind(path).unwrap().serve().unwrap();
}

struct Server {
    child: Child,
    directory: std::path::PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.directory).ok();
    }
}

fn start_server(name: &str) -> (Server, IpcClient) {
    use std::os::unix::fs::DirBuilderExt;
    let directory = std::env::temp_dir().join(format!("doorbell-allocations-{name}-{}", std::process::id()));
    std::fs::DirBuilder::new().mode(0o700).create(&directory).unwrap();
    let path = directory.join("s");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "serve_for_the_other_test"])
        .env(SERVER, &path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let server = Server { child, directory };
    let config = ClientConfig { policy: WaitPolicy::Spin, ..ClientConfig::for_load(32, 1024) };
    let begun = std::time::Instant::now();
    loop {
        match IpcClient::connect_with(&path, &config) {
            Ok(client) => return (server, client),
            Err(IpcError::NotRunning { .. }) if begun.elapsed().as_secs() < 30 => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn server_allocations(connection: &Connection<'_>) -> u64 {
    let mut answer = [0; 8];
    connection.call_into(COUNT, b"", &mut answer, &CallOptions::default()).unwrap();
    u64::from_le_bytes(answer)
}

/// Sends `total` echoes, 16 at a time, and checks every one.
fn echo_pipelined(connection: &Connection<'_>, total: u64) {
    let client = connection.client();
    let (mut sent, mut received) = (0u64, 0u64);
    let mut request = [0u8; 200];
    let mut answer = [0u8; 200];
    while received < total {
        while sent < total && sent - received < 16 {
            request[..8].copy_from_slice(&sent.to_le_bytes());
            let options = CallOptions { tag: sent, ..CallOptions::default() };
            connection.submit(MessageType::ECHO, &request, &options).unwrap();
            sent += 1;
        }
        client.wait(None).unwrap();
        while let Some(reply) = client.poll().unwrap() {
            assert!(reply.is_ok() && reply.copy_to(&mut answer).unwrap() == 200);
            assert_eq!(answer[..8], reply.tag().to_le_bytes());
            received += 1;
        }
    }
}

/// Sends `total` blocking echoes into a buffer of the caller's.
fn echo_blocking(connection: &Connection<'_>, total: u64) {
    let mut answer = [0u8; 1024];
    for i in 0..total {
        let request = [i as u8; 1024];
        let len =
            connection.call_into(MessageType::ECHO, &request, &mut answer, &CallOptions::default()).unwrap();
        assert!(len == 1024 && answer == request);
    }
}

/// Sends `total` blocking echoes that no slot of the session's own is large enough for.
fn echo_leased(connection: &Connection<'_>, total: u64) {
    let mut answer = [0u8; 4096];
    for i in 0..total {
        let request = [i as u8; 4096];
        let options = CallOptions::default();
        assert_eq!(connection.call_into(MessageType::ECHO, &request, &mut answer, &options).unwrap(), 4096);
        assert!(answer == request);
    }
}

/// Reads a stream of `total` chunks.
fn read_stream(connection: &Connection<'_>, reader: &mut RecordReader, total: u64) {
    let options = CallOptions { pieces: true, ..CallOptions::default() };
    connection.submit(STREAM, &total.to_le_bytes(), &options).unwrap();
    let (client, mut chunks, mut frame, mut ended) = (connection.client(), 0, [0; 16 << 10], false);
    while !ended {
        client.wait(None).unwrap();
        while let Some(reply) = client.poll().unwrap() {
            assert!(reply.is_ok());
            let len = reply.copy_to(&mut frame).unwrap();
            let mut bytes = &frame[..len];
            while let Some(chunk) = reader.next(&mut bytes).unwrap() {
                assert_eq!(chunk, CHUNK);
                chunks += 1;
            }
            ended = reply.is_last();
        }
    }
    assert_eq!(chunks, total);
}

/// Sends `total` echoes from a task of a runtime of this thread; returns the allocations of this process meanwhile.
#[cfg(feature = "tokio")]
fn echo_from_a_task(path: &std::path::Path, total: u64) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = doorbell::AsyncClient::connect(path).await.unwrap();
        let mut before = 0;
        for i in 0..total + 1000 {
            // The first thousand warm up.
            if i == 1000 {
                before = ALLOCATIONS.load(Relaxed);
            }
            let request = [i as u8; 1024];
            assert!(client.call(MessageType::ECHO, &request).await.unwrap() == request);
        }
        ALLOCATIONS.load(Relaxed) - before
    })
}

fn path(server: &Server) -> std::path::PathBuf {
    server.directory.join("s")
}

/// Held by the test that runs: they would take each other's cores.
static ALONE: Mutex<()> = Mutex::new(());

/// Goal:   R1.7: no message costs an allocation, neither here nor in the server's process.
/// Method: 1 000 000 pipelined and 100 000 blocking calls, 20 000 through leased memory, 20 000 from a
///         task, whose answers are allocated, after a warm-up; counters of both before and after.
#[test]
fn r1_7_a_million_messages_allocate_nothing_on_either_side() {
    if std::env::var_os(SERVER).is_some() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
    let (server, client) = start_server("calls");
    // One for all: a connection is announced to other reactors when it opens, which is no message.
    let connection = &client.open().unwrap();
    let spins = ClientConfig { policy: WaitPolicy::Spin, ..ClientConfig::default() };
    let small = IpcClient::connect_with(path(&server), &spins).unwrap();
    // Before the warm-up: on a busy machine a reactor may hear late of a connection that has been opened.
    let leasing = &small.open().unwrap();
    echo_pipelined(connection, 1000);
    echo_blocking(connection, 1000);
    let count = || (server_allocations(connection), ALLOCATIONS.load(Relaxed));
    let (mut server_before, mut client_before) = count();
    echo_pipelined(connection, 1_000_000);
    echo_blocking(connection, 100_000);
    let (mut server_after, mut client_after) = count();
    if server_after != server_before {
        // A client that the scheduler has moved opens a lane there, once. What messages cost they cost again.
        (server_before, client_before) = (server_after, client_after);
        echo_pipelined(connection, 1_000_000);
        echo_blocking(connection, 100_000);
        (server_after, client_after) = count();
    }
    assert_eq!(server_after - server_before, 0, "allocations in the server");
    // A lease is made with the first call; it is not taken back as long as calls go on.
    echo_leased(leasing, 1000);
    let before = server_allocations(leasing);
    echo_leased(leasing, 20_000);
    assert_eq!(server_allocations(leasing) - before, 0, "allocations in the server for leased slots");
    #[cfg(feature = "tokio")]
    {
        let (before, total) = (server_allocations(leasing), 20_000);
        let in_client = echo_from_a_task(&path(&server), total);
        // Connecting and its end are no messages.
        assert!(server_allocations(leasing) - before < 100, "allocations in the server for a task");
        assert!(in_client < total + 100, "{in_client} allocations for {total} answers to a task");
    }
    // The harness may print and allocate on a thread of its own meanwhile; a message may not.
    assert!(client_after - client_before < 100, "{} allocations in the client", client_after - client_before);
}

/// Goal:   R1.7: no chunk of a streamed answer costs an allocation, neither where it is written and sent nor where it is
///         read.
/// Method: streams of 1000 and of 100 000 chunks cost the same, but for what their threads and calls do.
#[test]
fn r1_7_a_chunk_of_a_stream_allocates_nothing_on_either_side() {
    if std::env::var_os(SERVER).is_some() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
    let (_server, client) = start_server("stream");
    let connection = &client.open().unwrap();
    let mut reader = RecordReader::default();
    read_stream(connection, &mut reader, 50_000);
    let mut cost = |chunks| {
        let before = (server_allocations(connection), ALLOCATIONS.load(Relaxed));
        read_stream(connection, &mut reader, chunks);
        // The first: the harness of this process may allocate meanwhile, on a thread of its own.
        (server_allocations(connection) - before.0, ALLOCATIONS.load(Relaxed) - before.1)
    };
    let (short, long) = (cost(1000), cost(100_000));
    assert!(long.0 <= short.0 + 8, "{short:?} {long:?} allocations in the server");
    assert!(long.1 < 100, "{short:?} {long:?} allocations in the client");
}

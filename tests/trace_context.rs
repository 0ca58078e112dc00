//! The trace that a call belongs to: from the caller's options to the handler's context (R4.3), whatever way the request
//! takes.

mod common;

use common::TestDir;
use common::process::returns;
use doorbell::{
    Answer, Answering, CallOptions, CallbackClient, CallbackConfig, ClientConfig, Connection, Context,
    Deferred, Executor, HandlerError, HandlerTable, IpcClient, IpcServer, MessageType, Pieces, Progress,
    Reconnect, ReconnectingClient, Reply, ServerConfig, ShutdownHandle, TraceParent, WaitPolicy,
};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

/// Each answers with the traceparent of its call and a line end, then with its body; by every kind of handler.
const WHOLE: MessageType = MessageType(300);
const IN_PIECES: MessageType = MessageType(301);
const LATER: MessageType = MessageType(302);
const FUTURE: MessageType = MessageType(303);
const ALL: [MessageType; 4] = [WHOLE, IN_PIECES, LATER, FUTURE];

fn told(traceparent: Option<TraceParent>) -> Vec<u8> {
    let mut told = traceparent.map(|trace| trace.to_text().to_vec()).unwrap_or_default();
    told.push(b'\n');
    told
}

fn whole(context: &Context<'_, ()>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&told(context.traceparent()))?;
    reply.write(request)
}

struct Telling {
    made_with: Option<TraceParent>,
    body: Vec<u8>,
}

fn in_pieces(context: &Context<'_, ()>, _: Option<u64>) -> Result<Box<dyn Pieces<()>>, HandlerError> {
    Ok(Box::new(Telling { made_with: context.traceparent(), body: Vec::new() }))
}

impl Pieces<()> for Telling {
    fn take(
        &mut self,
        context: &Context<'_, ()>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        assert_eq!(context.traceparent(), self.made_with);
        self.body.extend_from_slice(bytes);
        if last {
            reply.write(&told(self.made_with))?;
            reply.write(&self.body)?;
            return Ok(Progress::Done);
        }
        Ok(Progress::Took(bytes.len()))
    }
}

fn later(context: &Context<'_, ()>, request: &[u8], ticket: Deferred) -> Result<(), HandlerError> {
    let answer = [&told(context.traceparent()), request].concat();
    std::thread::spawn(move || ticket.reply(&answer));
    Ok(())
}

fn future(context: &Context<'_, ()>, request: &[u8]) -> Answering {
    let answer = [&told(context.traceparent()), request].concat();
    Box::pin(async move { Ok(answer) })
}

static TABLE: HandlerTable<()> = HandlerTable::with_builtins()
    .on(WHOLE, whole)
    .on_pieces(IN_PIECES, in_pieces)
    .on_deferred(LATER, later)
    .on_async(FUTURE, future);

struct Server {
    path: PathBuf,
    handle: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
    _directory: TestDir,
}

impl Server {
    fn start() -> Self {
        let directory = TestDir::new();
        let path = directory.join("s");
        // The futures are done when they are first polled.
        let execute: Executor = Box::new(|mut call| {
            let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(call.as_mut().poll(&mut cx).is_ready());
        });
        let config = ServerConfig { reactors: 1, ..ServerConfig::default() };
        let bound = IpcServer::new(&TABLE, ()).config(config).executor(execute).bind(&path).unwrap();
        let handle = bound.shutdown_handle();
        let thread = std::thread::spawn(move || drop(bound.serve().unwrap()));
        Self { path, handle, thread: Some(thread), _directory: directory }
    }

    fn client(&self) -> IpcClient {
        let slots =
            ClientConfig { medium_slots: 2, large_slots: 2, small_slots: 8, ..ClientConfig::default() };
        IpcClient::connect_with(&self.path, &ClientConfig { policy: WaitPolicy::Block, ..slots }).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.handle.shutdown_now().unwrap();
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().unwrap();
        }
    }
}

fn trace(number: u8) -> TraceParent {
    TraceParent::new([number; 16], [7; 8], 1).unwrap()
}

fn body(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 % 251) as u8).collect()
}

/// Lengths at which a request changes its way, with the 60 bytes of metadata and without: small, medium and large slots,
/// leased ones, frames.
const LENGTHS: [usize; 16] =
    [0, 1, 963, 964, 965, 1024, 1025, 4036, 4037, 16_323, 16_324, 16_325, 16_384, 16_385, 40_000, 300_000];

fn check(connection: &Connection<'_>, message_type: MessageType, len: usize, options: &CallOptions) {
    let request = body(len);
    let answer = connection.call_with(message_type, &request, options, |answer| answer.to_vec());
    let expected = [&told(options.traceparent), &request[..]].concat();
    let what = format!("{message_type:?}, {len} bytes, {options:?}");
    assert!(answer.unwrap_or_else(|e| panic!("{what}: {e}")).unwrap() == expected, "{what}");
}

/// Goal:   R4.3: a handler of any kind sees the trace that the caller has named, and the request as it was sent, whatever its
///         length and options; a call without a trace after it has none.
/// Method: all of them, each with a trace of its own and without one; answers that fit and that do not.
#[test]
fn r4_3_a_handler_sees_the_trace_of_its_call() {
    let server = Server::start();
    // With slots of every class, and with small ones only, beside which there are leased ones.
    for client in [server.client(), IpcClient::connect(&server.path).unwrap()] {
        let connection = client.open().unwrap();
        for (number, message_type) in ALL.into_iter().enumerate() {
            for len in LENGTHS {
                for (idempotent, reply_capacity) in [(false, 0), (true, 0), (false, len + 100)] {
                    let traceparent = Some(trace(number as u8 + 1));
                    let options =
                        CallOptions { traceparent, idempotent, reply_capacity, ..CallOptions::default() };
                    check(&connection, message_type, len, &options);
                }
                check(&connection, message_type, len, &CallOptions::default());
            }
        }
    }
}

/// The next answer. There may be news before it that are no answers: room for more of a request.
fn next_answer(client: &IpcClient) -> Answer<'_> {
    loop {
        client.wait(None).unwrap();
        if let Some(answer) = client.poll().unwrap() {
            return answer;
        }
    }
}

/// Goal:   R4.3: the same of requests that are sent piece by piece, of streams, and of calls that are cancelled before they
///         begin.
#[test]
fn r4_3_a_request_in_pieces_and_a_stream_have_a_trace() {
    let server = Server::start();
    let client = server.client();
    let connection = client.open().unwrap();
    let options = CallOptions { traceparent: Some(trace(9)), ..CallOptions::default() };
    for message_type in ALL {
        for len in [0, 1, 5000, 70_000] {
            let request = body(len);
            for announced in [None, Some(len as u64)] {
                let id = connection.start(message_type, announced, &options).unwrap();
                let mut sent = 0;
                while sent < len {
                    sent += client.send(id, &request[sent..]).unwrap();
                    if sent < len {
                        client.wait(None).unwrap();
                    }
                }
                client.finish(id).unwrap();
                let answer = next_answer(&client).to_vec().unwrap();
                assert!(
                    answer == [&told(options.traceparent), &request[..]].concat(),
                    "{len} bytes in pieces"
                );
            }
            let mut streamed = Vec::new();
            let mut stream = connection.stream(message_type, &request, &options).unwrap();
            while let Some(frame) = stream.next_frame() {
                streamed.extend(frame.unwrap().to_vec().unwrap());
            }
            assert!(streamed == [&told(options.traceparent), &request[..]].concat(), "{len} bytes streamed");
        }
        let id = connection.start(message_type, None, &options).unwrap();
        client.cancel(id);
        assert!(!next_answer(&client).is_ok());
    }
    check(&connection, WHOLE, 10, &CallOptions::default());
}

/// Goal:   R4.3: every client passes the trace on: that which comes back, that of threads which must not wait, that of tasks.
#[test]
fn r4_3_every_client_names_the_trace() {
    let server = Server::start();
    let options = CallOptions { traceparent: Some(trace(3)), ..CallOptions::default() };
    let expected = |request: &[u8]| [&told(options.traceparent), request].concat();
    let client =
        ReconnectingClient::connect_with(&server.path, &ClientConfig::default(), Reconnect::default());
    let client = client.unwrap();
    for len in [10, 1000, 20_000] {
        let answer = client.open().unwrap().call_with(WHOLE, &body(len), &options).unwrap();
        assert!(answer == expected(&body(len)), "{len} bytes, reconnecting");
    }
    let client = CallbackClient::connect_with(&server.path, &CallbackConfig::default()).unwrap();
    for len in [10, 1000, 20_000] {
        let (tell, told) = channel();
        let answered = move |answer: doorbell::Result<Vec<u8>>| tell.send(answer.unwrap()).unwrap();
        client.call_with(WHOLE, body(len), &options, answered).unwrap().detach();
        let answer = returns("the call is called back", move || told.recv().unwrap());
        assert!(answer == expected(&body(len)), "{len} bytes, called back");
    }
    #[cfg(feature = "tokio")]
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let client = doorbell::AsyncClient::connect(&server.path).await.unwrap();
            for len in [10, 1000, 20_000] {
                let answer = client.call_with(WHOLE, &body(len), &options).await.unwrap();
                assert!(answer == expected(&body(len)), "{len} bytes, from a task");
            }
        });
    }
}

//! A server with an OpenAI-compatible API that does what a test tells it, byte by byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the server does next on a connection.
#[derive(Clone)]
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Writes bytes in pieces of so many, each by itself.
    Dribble(Vec<u8>, usize),
    /// Does nothing for so long.
    Wait(Duration),
    /// Writes the same bytes until the client closes or the test is over; counts them.
    SendForEver(Vec<u8>),
    /// Waits until the client closes the connection, and tells the test.
    UntilClosed,
    /// Waits for the next request on the same connection.
    Next,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub head: String,
    pub body: String,
    /// Which connection, and which request over all, both counted from 0.
    pub connection: usize,
    pub number: usize,
}

/// The server. Its threads end with their connections.
pub struct Fake {
    pub address: SocketAddr,
    pub requests: Arc<Mutex<Vec<Seen>>>,
    /// Bytes that `SendForEver` has written.
    pub written: Arc<AtomicU64>,
    closed: Receiver<Instant>,
}

type Script = Arc<dyn Fn(&Seen) -> Vec<Step> + Send + Sync>;

/// What one connection needs of its server.
struct Shared {
    script: Script,
    requests: Arc<Mutex<Vec<Seen>>>,
    written: Arc<AtomicU64>,
    closed: Sender<Instant>,
}

impl Fake {
    /// A server that answers each request by the script made for it.
    pub fn start(script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::start_with(script, |socket| Some(Box::new(socket)))
    }

    /// The same behind something that wraps its sockets, such as TLS.
    pub fn start_with(
        script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static,
        wrap: impl Fn(TcpStream) -> Option<Box<dyn Wire>> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (closing, closed) = channel();
        let requests: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let written: Arc<AtomicU64> = Arc::default();
        let shared = Shared {
            script: Arc::new(script),
            requests: Arc::clone(&requests),
            written: Arc::clone(&written),
            closed: closing,
        };
        let (shared, wrap) = (Arc::new(shared), Arc::new(wrap));
        std::thread::spawn(move || {
            for (connection, socket) in listener.incoming().enumerate() {
                let (shared, wrap) = (Arc::clone(&shared), Arc::clone(&wrap));
                let socket = socket.unwrap();
                socket.set_nodelay(true).unwrap();
                std::thread::spawn(move || wrap(socket).map(|socket| serve(socket, connection, &shared)));
            }
        });
        Self { address, requests, written, closed }
    }

    /// A server that answers each request alike.
    pub fn always(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone())
    }

    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    pub fn requests(&self) -> Vec<Seen> {
        self.requests.lock().unwrap().clone()
    }

    /// When the client closed a connection that waits for that.
    pub fn closed_at(&self) -> Instant {
        match self.closed.recv_timeout(Duration::from_secs(10)) {
            Ok(at) => at,
            Err(RecvTimeoutError::Timeout) => panic!("the client did not close the connection"),
            Err(RecvTimeoutError::Disconnected) => panic!("the server is gone"),
        }
    }
}

pub trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

fn serve(mut socket: Box<dyn Wire>, connection: usize, shared: &Shared) {
    while let Some(seen) = read_request(&mut socket, connection, shared) {
        let steps = (shared.script)(&seen);
        if !steps.iter().all(|step| run(step, &mut socket, shared))
            || !matches!(steps.last(), Some(Step::Next))
        {
            return;
        }
    }
}

/// Runs a step; whether the connection is still there.
fn run(step: &Step, socket: &mut Box<dyn Wire>, shared: &Shared) -> bool {
    match step {
        Step::Send(bytes) => socket.write_all(bytes).and_then(|()| socket.flush()).is_ok(),
        Step::Dribble(bytes, len) => bytes.chunks(*len).all(|piece| {
            std::thread::sleep(Duration::from_micros(200));
            socket.write_all(piece).and_then(|()| socket.flush()).is_ok()
        }),
        Step::Wait(time) => {
            std::thread::sleep(*time);
            true
        }
        Step::SendForEver(bytes) => loop {
            if socket.write_all(bytes).is_err() {
                shared.closed.send(Instant::now()).ok();
                return false;
            }
            shared.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        },
        Step::UntilClosed => {
            while matches!(socket.read(&mut [0; 64]), Ok(1..)) {}
            shared.closed.send(Instant::now()).ok();
            false
        }
        Step::Next => true,
    }
}

fn read_request(socket: &mut Box<dyn Wire>, connection: usize, shared: &Shared) -> Option<Seen> {
    let mut bytes = Vec::new();
    let head_len = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        read_more(socket, &mut bytes)?;
    };
    let head = String::from_utf8(bytes[..head_len].to_vec()).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let length: usize = length.map_or(0, |length| length.parse().unwrap());
    while bytes.len() < head_len + length {
        read_more(socket, &mut bytes)?;
    }
    let body = String::from_utf8(bytes[head_len..].to_vec()).unwrap();
    let mut requests = shared.requests.lock().unwrap();
    let seen = Seen { head, body, connection, number: requests.len() };
    requests.push(seen.clone());
    Some(seen)
}

fn read_more(socket: &mut Box<dyn Wire>, bytes: &mut Vec<u8>) -> Option<()> {
    let mut piece = [0; 4096];
    let read = socket.read(&mut piece).ok().filter(|read| *read > 0)?;
    bytes.extend_from_slice(&piece[..read]);
    Some(())
}

/// An answer with a body of known length.
pub fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The head of a stream that ends with its connection.
pub fn stream_head() -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n".to_vec()
}

/// The head of a stream in chunks of HTTP.
pub fn chunked_head() -> Vec<u8> {
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec()
}

/// A chunk of HTTP.
pub fn chunked(body: &str) -> Vec<u8> {
    format!("{:x}\r\n{body}\r\n", body.len()).into_bytes()
}

/// An event.
pub fn event(data: &str) -> String {
    format!("data: {data}\n\n")
}

/// An event with a piece of text.
pub fn text(text: &str) -> String {
    let text = serde_json::to_string(text).unwrap();
    event(&format!(
        r#"{{"id":"x","object":"chat.completion.chunk","choices":[{{"index":0,"delta":{{"content":{text}}},"finish_reason":null}}]}}"#
    ))
}

/// The events that end an answer.
pub fn end(reason: &str) -> String {
    let finish = event(&format!(r#"{{"choices":[{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}]}}"#));
    let usage = event(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#);
    format!("{finish}{usage}{}", event("[DONE]"))
}

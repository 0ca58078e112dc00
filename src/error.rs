//! The one public error of the library (R3.1): every variant says what was wrong and what to do.

use crate::protocol::MessageType;
use crate::protocol::handshake::DisconnectReason;
use crate::protocol::records::RecordError;
use doorbell_shm::{PeerFault, SegmentError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The result of everything that can fail here.
pub type Result<T, E = IpcError> = std::result::Result<T, E>;

/// What went wrong in a call, a connection or a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IpcError {
    /// A system call failed.
    #[error("{call} failed: {source}")]
    Io {
        /// The call and what it was for.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A request, or its answer, is longer than the limit given here, bytes. Nothing else is lost.
    #[error("the message is longer than the limit of {0} bytes: send less, or raise the server's limit")]
    MessageTooLarge(usize),
    /// The answer is longer than the memory that the caller gave for it, bytes.
    #[error("the answer is longer than the {0} bytes given for it: give more, or use a call that allocates")]
    ReplyTooLarge(usize),
    /// A request is not as long as it was announced. What was written last was not sent.
    #[error(
        "a request of {announced} bytes was announced, {sent} were sent: announce the right length, or none"
    )]
    BodyLength {
        /// Bytes announced.
        announced: u64,
        /// Bytes sent so far.
        sent: u64,
    },
    /// More of a request was to be sent after its end, or than had been announced. Nothing of that was sent.
    #[error("the request is complete: nothing more can be sent in it; announce the right length, or none")]
    BodyFinished,
    /// The call named is none of those in flight whose request is sent piece by piece.
    #[error("there is no such call in flight: it has been answered, or was never started piece by piece")]
    NoSuchCall,
    /// The server has no handler for this type. The connection goes on.
    #[error(
        "the server has no handler for message type {0}: check the number, or register a handler in its table"
    )]
    UnknownMessageType(MessageType),
    /// The handler panicked. The connection goes on.
    #[error("the handler panicked while it ran this call: see the server's log")]
    HandlerPanic,
    /// No answer within the caller's time-out. The call has been cancelled; it may have run.
    #[error("no answer within the time-out: the call was cancelled but may have run")]
    Timeout,
    /// The handler could not make sense of the body.
    #[error("the server could not decode the request: {0}")]
    Decode(String),
    /// The deadline passed before the call was started, which was then not run, or before its answer was complete.
    #[error("the deadline passed before the call was started, or before its answer was complete")]
    DeadlineExceeded,
    /// The call was cancelled before it was started, or before its answer was complete.
    #[error("the call was cancelled before its answer was complete")]
    Cancelled,
    /// The server could not take the call now.
    #[error("the server is overloaded: try again in {retry_ms} ms")]
    Overloaded {
        /// Milliseconds to wait.
        retry_ms: u64,
    },
    /// Memory that the call used was taken back, because this client did nothing with it while others waited for it. The
    /// call may or may not have been executed.
    #[error(
        "the server took back the memory of this call, which stood still while others waited: send it again"
    )]
    MemoryTakenBack,
    /// The handler reported a failure of its own.
    #[error("the handler failed: {0}")]
    Handler(String),
    /// A service behind the server failed, such as the provider of a model.
    #[error("{message} ({code})")]
    Upstream {
        /// A word for programs, such as `rate_limited`.
        code: String,
        /// A sentence for people: what failed, and what to do.
        message: String,
    },
    /// Every slot or ring entry, or every place in a callback client's queue, is in use: take answers, then try again.
    /// Nothing was sent or lost.
    #[error("all slots, ring entries or places in the queue are in use: take answers (`poll`) and try again")]
    WouldBlock,
    /// The connection has been closed by its owner.
    #[error("the connection is closed: open another one")]
    ConnectionClosed,
    /// Nobody listens at the path.
    #[error("no server listens at {path}: start one with `doorbell serve`, or name its socket with --socket")]
    NotRunning {
        /// The socket path tried.
        path: PathBuf,
    },
    /// The path does not fit into a socket address.
    #[error(
        "the socket path {path} has {len} bytes, a unix socket address holds {max}: choose a shorter one"
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length, bytes.
        len: usize,
        /// What fits, bytes.
        max: usize,
    },
    /// The path, or the directory it lies in, is not one that a socket can safely live at.
    #[error("cannot use the socket path {path}: {problem}")]
    SocketPath {
        /// The path concerned.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: &'static str,
    },
    /// Another server holds the path.
    #[error("a server is already running at {path}: stop it, or choose another path with --socket")]
    AlreadyRunning {
        /// The socket path.
        path: PathBuf,
    },
    /// The server that was started for this client has ended before it listened.
    #[error("the server that was started ended at once ({status}): what it wrote to stderr says why")]
    ServerEnded {
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// The server that was started for this client did not listen in time, and was killed.
    #[error(
        "the server that was started did not listen within {0:?}: check that it gets the same socket path"
    )]
    ServerNotReady(Duration),
    /// The server belongs to another user.
    #[error("the server at {path} runs as uid {uid}, not as yours: refusing to send it anything")]
    WrongServer {
        /// The socket path.
        path: PathBuf,
        /// The server's uid.
        uid: u32,
    },
    /// The server refuses this user.
    #[error("the server refuses other users than its own: run the client as the server's user")]
    NotPermitted,
    /// No common protocol version.
    #[error("the server speaks protocol versions {min} to {max}, this client {ours}: upgrade the older one")]
    VersionMismatch {
        /// The server's oldest.
        min: u16,
        /// The server's newest.
        max: u16,
        /// Ours.
        ours: u16,
    },
    /// A limit of the server is reached. Existing sessions and connections are unaffected.
    #[error(
        "the server's limit of {limit} {scope} is reached: close some, or raise it; try again in {retry_ms} ms"
    )]
    TooMany {
        /// `connections`, or the [name](crate::protocol::handshake::Scope::name) of what there are too many of.
        scope: &'static str,
        /// The limit.
        limit: u64,
        /// Milliseconds after which to try again.
        retry_ms: u32,
    },
    /// The server lacks the memory for this session.
    #[error("the server has no memory for this session: ask for fewer slots, or try again in {retry_ms} ms")]
    NoMemory {
        /// Milliseconds after which to try again.
        retry_ms: u32,
    },
    /// The server is stopping.
    #[error("the server is stopping and takes no new sessions or calls: try again in {retry_ms} ms")]
    Draining {
        /// Milliseconds after which to try again.
        retry_ms: u32,
    },
    /// The other side did not speak the handshake.
    #[error("the handshake went wrong: {0}")]
    Handshake(&'static str),
    /// The server did not answer the handshake in time.
    #[error("the server accepted the socket but did not answer the handshake within {0:?}: it may be stuck")]
    HandshakeTimeout(Duration),
    /// The server ended this session and said why.
    #[error("the server ended this session: {0}")]
    Disconnected(DisconnectReason),
    /// The server is gone; this call was provably not started.
    #[error("the server is gone; the call was not executed and can be sent again")]
    NotExecuted,
    /// The server is gone; this call may have been executed.
    #[error("the server is gone; the call may or may not have been executed")]
    ConnectionLost,
    /// The server is gone, and with it the rest of an answer that was handed out frame by frame. The call was started.
    /// Nothing resumes it but whoever knows what the answer was to be.
    #[error(
        "the server is gone after {frames} frames ({bytes} bytes) of the answer: ask again for what is missing"
    )]
    StreamLost {
        /// Frames that were handed out: the last one received has this number less one.
        frames: u64,
        /// Bytes in them.
        bytes: u64,
    },
    /// The answer is no sequence of records, or was cut off within one.
    #[error("the streamed answer cannot be taken apart: {0}: client and server may be of different versions")]
    Records(#[from] RecordError),
    /// The client was closed, or what it runs on has ended, while the call was under way: it may have been executed.
    #[error("the client was closed before the answer came: the call may or may not have been executed")]
    ClientClosed,
    /// This process is a fork of the one that the client is of, which alone may use it (F9). What is under way goes on there.
    #[error(
        "this client is of the process that connected it, of which this one is a fork: connect anew here"
    )]
    ForkedClient,
    /// What the server wrote into shared memory breaks the protocol.
    #[error("the server broke the protocol: {0}")]
    ServerFault(#[source] PeerFault),
    /// The shared segment could not be made or attached.
    #[error("shared memory: {0}")]
    Segment(#[from] SegmentError),
    /// The server's waiting machinery could not be set up, or failed.
    #[error(transparent)]
    Uring(#[from] doorbell_uring::SetupError),
    /// The kernel refused an operation of a running server.
    #[error(transparent)]
    Driver(#[from] doorbell_uring::DriverError),
    /// The configuration asks for something impossible.
    #[error("configuration: {0}")]
    Config(String),
}

impl IpcError {
    /// Of the text that goes with [`doorbell_shm::entry::Status::Upstream`].
    pub(crate) fn upstream(text: String) -> Self {
        match text.split_once(": ") {
            Some((code, message)) => Self::Upstream { code: code.to_owned(), message: message.to_owned() },
            None => Self::Upstream { code: "unknown".to_owned(), message: text },
        }
    }

    pub(crate) fn io(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io { call, source: source.into() }
    }
}

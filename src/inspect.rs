//! What a server tells about itself to whoever watches it: its sessions, connections, and calls in flight, without any
//! payload. Messages of the types [`MessageType::INSPECT`] and [`MessageType::END_SESSION`]; `doorbell stat`, `ps`, `top`
//! and `trace` are made of them.
//!
//! Both need the feature `messages`, which has the JSON.
//!
//! Everybody who can connect may ask: only processes of the server's own user can.

use crate::metrics::{ReactorMetrics, TypeMetrics};
use crate::protocol::MessageType;
use std::collections::BTreeMap;

/// What is asked of [`MessageType::INSPECT`], as JSON; an empty body stands for the default, which is counters alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "messages",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct Inquiry {
    /// Tell of sessions.
    pub sessions: bool,
    /// Tell of connections.
    pub connections: bool,
    /// Tell of calls in flight.
    pub calls: bool,
    /// Trace the calls of the connection of this number from now on, and tell what has been traced since the last time;
    /// 0 for none. One connection at a time is traced, and no longer than [`TRACE_SECONDS`] after it was last asked for.
    pub trace: u32,
}

/// How long a connection is traced of which nobody asks any more.
pub const TRACE_SECONDS: u64 = 5;

/// Traced calls that a reactor keeps until they are asked for; of those beyond, the number is told.
pub const TRACE_MAX: usize = 1024;

/// What is asked of [`MessageType::END_SESSION`], as JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct EndSession {
    /// The session's number.
    pub session: u32,
    /// Its generation, so that no other session of the same number is hit.
    pub generation: u32,
}

/// The answer of [`MessageType::INSPECT`], as JSON.
#[derive(Debug, Clone, Default, PartialEq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct Report {
    /// CLOCK_MONOTONIC of the server, ns.
    pub now_ns: u64,
    /// The server's process.
    pub pid: u32,
    /// Counters by name, as [`Counters`](crate::Counters) has them.
    pub counters: BTreeMap<String, u64>,
    /// Bytes that the memory budget grants a server of up to a hundred sessions.
    pub memory_budget: u64,
    /// Calls and times by type.
    pub types: Vec<TypeMetrics>,
    /// Each reactor.
    pub reactors: Vec<ReactorMetrics>,
    /// Reactors that did not answer in time: something holds them up, and what they have is missing here.
    pub silent: Vec<u32>,
    /// Handlers that run at this moment, or ran when the clock was last read.
    pub running: Vec<Running>,
    /// Sessions, one entry for each lane.
    pub sessions: Vec<LaneReport>,
    /// Connections, one entry for each reactor that they are used at.
    pub connections: Vec<ConnectionReport>,
    /// Calls in flight.
    pub calls: Vec<CallReport>,
    /// Calls of the traced connection that have ended.
    pub traced: Vec<TracedCall>,
    /// Calls that were not traced because nobody asked for those before.
    pub untraced: u64,
}

/// A handler that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct Running {
    /// The reactor that it holds.
    pub reactor: u32,
    /// The call's type.
    pub message_type: u32,
    /// Its connection.
    pub connection: u32,
    /// For how long, ns.
    pub for_ns: u64,
}

/// One lane of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct LaneReport {
    /// The session's number.
    pub session: u32,
    /// Tells it from sessions that had its number before.
    pub generation: u32,
    /// 0 is the home lane.
    pub lane: u32,
    /// The reactor that serves it.
    pub reactor: u32,
    /// The client's process as the server sees it; 0 but for the home lane.
    pub pid: u32,
    /// The reactor polls it.
    pub hot: bool,
    /// Entries taken so far.
    pub taken: u64,
    /// Entries that lie in its rings; 64 of each at most are counted.
    pub entries_waiting: u64,
    /// Answers that the client has not taken.
    pub answers_waiting: u64,
    /// Calls of several frames, or answered from elsewhere.
    pub exchanges: u64,
    /// Bytes leased beyond its own slots.
    pub leased_bytes: u64,
}

/// A connection, as far as one reactor has served it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct ConnectionReport {
    /// Its session.
    pub session: u32,
    /// Its number.
    pub connection: u32,
    /// The reactor.
    pub reactor: u32,
    /// Whether its calls are bulk.
    pub bulk: bool,
    /// Calls begun.
    pub requests: u64,
    /// Bytes of requests and answers; of calls in flight those of their first frames.
    pub bytes: u64,
    /// Time that its calls took, ns.
    pub time_ns: u64,
}

/// What a call is waiting for, or doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "messages",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum CallState {
    /// In the ring: the reactor has not taken it.
    Queued,
    /// For the client's next frame.
    WaitingForFrames,
    /// For memory to put its request together in.
    WaitingForMemory,
    /// For the client to be done with frames of the answer.
    WaitingForCredit,
    /// For the client to take completions.
    WaitingForSpace,
    /// For a file that is being read.
    ReadingFile,
    /// For a thread or a future to answer.
    Deferred,
    /// It has its turn soon.
    Moving,
}

/// A call in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct CallReport {
    /// Its session.
    pub session: u32,
    /// Its connection.
    pub connection: u32,
    /// The reactor that has it.
    pub reactor: u32,
    /// Its type.
    pub message_type: u32,
    /// The slot that names it, with its generation.
    pub slot: u32,
    /// See [`CallReport::slot`].
    pub generation: u32,
    /// What it waits for.
    pub state: CallState,
    /// Since it was taken up, ns; `None` while it is queued, or if calls are not timed.
    pub age_ns: Option<u64>,
    /// Bytes of its request that have come.
    pub received: u64,
    /// Bytes of its answer that have gone.
    pub sent: u64,
}

/// A call that was traced from beginning to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "messages", derive(serde::Serialize, serde::Deserialize))]
pub struct TracedCall {
    /// Its session.
    pub session: u32,
    /// Its connection.
    pub connection: u32,
    /// The reactor that ran it.
    pub reactor: u32,
    /// Its type.
    pub message_type: u32,
    /// The slot that named it, with its generation.
    pub slot: u32,
    /// See [`TracedCall::slot`].
    pub generation: u32,
    /// Whether it took several frames, or was answered from elsewhere.
    pub long: bool,
    /// CLOCK_MONOTONIC of the server when it was taken up, ns.
    pub began_ns: u64,
    /// And when its completion was published.
    pub ended_ns: u64,
    /// Status code of its end.
    pub status: u8,
    /// Bytes of its request.
    pub received: u64,
    /// Bytes of its answer.
    pub sent: u64,
}

impl Report {
    /// A counter by its name; 0 for one that this server does not have.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

/// The name of a type: that of the protocol, or its number.
pub fn type_name(message_type: u32) -> String {
    match MessageType(message_type).name() {
        Some(name) => name.to_owned(),
        None if message_type == crate::OTHER_TYPES => "other".to_owned(),
        None => message_type.to_string(),
    }
}

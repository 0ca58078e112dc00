//! A client process of level 4: every connection asks for completions, chats (as streams) and has files analysed, in turn,
//! a hundred times each. What comes back is compared with what has to come, word by word.

use crate::client::{Connect, Ready};
use crate::clock::{now_ns, sleep_until};
use crate::content::Nonces;
use crate::error::StressError;
use crate::load::{Outcome, Silence};
use crate::machine;
use crate::processes::{self, Process, Role};
use doorbell::codec::{Codec, Json};
use doorbell::files::Analysis;
use doorbell::messages::{AIRequest, AnalyzeFile, FinishReason, Message, MessageRole, StreamChunk};
use doorbell::protocol::records::RecordReader;
use doorbell::{
    Answer, CallOptions, ClientConfig, ConnectionId, IpcClient, IpcError, MessageType, WaitPolicy,
};
use doorbell_shm::entry::codec;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Kinds of calls: a completion, a chat, a file.
pub const KINDS: u64 = 3;
/// Calls in flight on each session, at most.
const IN_FLIGHT: usize = 12;
/// Files to be analysed.
const FILES: usize = 8;
/// Bytes that an answer gets room for at once.
const ANSWER: usize = 1 << 10;
const MODEL: &str = "loopback-fast-size-128";
static JSON: Json = Json::new();

/// What one client process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AssistantJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
    /// Sessions of this process.
    pub sessions: usize,
    /// Connections, spread over them.
    pub connections: usize,
    /// Calls of each kind that each connection makes.
    pub rounds: u64,
    /// Where the files lie.
    pub files: PathBuf,
    /// The run's seed.
    pub seed: u64,
    /// Which process this is.
    pub number: u64,
}

/// Writes the files that are analysed: of several sizes, each with a text of its own.
///
/// # Errors
///
/// [`StressError::Os`] if one cannot be written.
pub fn write_files(directory: &Path) -> Result<(), StressError> {
    (0..FILES).try_for_each(|number| {
        std::fs::write(directory.join(name(number)), text(number)).map_err(|e| StressError::os("write", e))
    })
}

fn name(number: usize) -> String {
    format!("{number}.txt")
}

fn text(number: usize) -> String {
    (0..8 << number).map(|line| format!("file {number}, line {line}\n")).collect()
}

/// Starts a process. It says `()`; to [`Connect`] it says [`Ready`], to `()` an [`Outcome`] in which `alive` is how many
/// connections made all their calls; then it ends, with its standard input.
///
/// # Errors
///
/// [`StressError::Os`] if it cannot be started.
pub fn start(job: &AssistantJob) -> Result<Process, StressError> {
    processes::spawn(Role::Assistant, job, Stdio::piped())
}

/// The process itself.
///
/// # Errors
///
/// Whatever keeps it from opening its connections. What happens later is counted.
pub fn run(job: &AssistantJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    processes::say(&())?;
    let Some(Connect { at_ns }) = processes::hear()? else { return Ok(()) };
    sleep_until(at_ns);
    let config = ClientConfig {
        ring_entries: 32,
        small_slots: 16,
        lease_pages: 16,
        lanes: 1,
        policy: WaitPolicy::Handoff,
        name: "assistant".to_owned(),
        ..ClientConfig::default()
    };
    let connect = |_| IpcClient::connect_with(&job.path, &config);
    let clients = (0..job.sessions).map(connect).collect::<Result<Vec<_>, _>>();
    let clients = clients.map_err(StressError::ipc("connecting"))?;
    let open = |n: usize| clients[n % job.sessions].open_with(codec::JSON, false).map(|c| c.detach());
    let connections = (0..job.connections).map(open).collect::<Result<Vec<_>, _>>();
    let connections = connections.map_err(StressError::ipc("opening a connection"))?;
    processes::say(&Ready { at_ns: now_ns() })?;
    while let Some(()) = processes::hear()? {
        processes::say(&Work::new(job, &clients, &connections).run())?;
    }
    Ok(())
}

/// A call in flight, or the next one to make.
#[derive(Debug, Clone, Copy, Default)]
struct Step {
    /// Calls that the connection has made.
    made: u64,
    nonce: u64,
}

struct Work<'a> {
    job: &'a AssistantJob,
    clients: &'a [IpcClient],
    connections: &'a [ConnectionId],
    facts: Vec<String>,
    nonces: Nonces,
    steps: Vec<Step>,
    /// For each session, the connections whose turn it is, and how many calls are in flight.
    ready: Vec<VecDeque<usize>>,
    in_flight: Vec<usize>,
    body: Vec<u8>,
    outcome: Outcome,
}

impl<'a> Work<'a> {
    fn new(job: &'a AssistantJob, clients: &'a [IpcClient], connections: &'a [ConnectionId]) -> Self {
        let sessions = clients.len();
        let mut ready = vec![VecDeque::new(); sessions];
        (0..connections.len()).for_each(|connection| ready[connection % sessions].push_back(connection));
        Self {
            job,
            clients,
            connections,
            facts: (0..FILES).map(|n| Analysis::of(text(n).as_bytes()).to_json()).collect(),
            nonces: Nonces::new(job.seed, job.number),
            steps: vec![Step::default(); connections.len()],
            ready,
            in_flight: vec![0; sessions],
            body: Vec::new(),
            outcome: Outcome::default(),
        }
    }

    fn run(mut self) -> Outcome {
        let mut silence = Silence::from_now();
        while self.is_busy() && !silence.is_over(now_ns(), self.outcome.answered_in_all) {
            let mut idle = true;
            for session in 0..self.clients.len() {
                while self.send_one(session) {}
                idle &= !self.take(session);
            }
            if idle && let Some(busy) = self.in_flight.iter().position(|n| *n > 0) {
                // What keeps it from waiting is the end of the session, which the next poll tells.
                self.clients[busy].wait(Some(std::time::Duration::from_millis(1))).ok();
            }
        }
        let all = KINDS * self.job.rounds;
        self.outcome.alive = self.steps.iter().filter(|step| step.made == all).count() as u64;
        self.outcome.lost = self.in_flight.iter().sum::<usize>() as u64;
        self.outcome
    }

    fn is_busy(&self) -> bool {
        self.in_flight.iter().any(|n| *n > 0) || self.ready.iter().any(|ready| !ready.is_empty())
    }

    /// Sends the next request of a session, if there is one and room for it.
    fn send_one(&mut self, session: usize) -> bool {
        if self.in_flight[session] >= IN_FLIGHT {
            return false;
        }
        let Some(connection) = self.ready[session].pop_front() else { return false };
        let nonce = self.nonces.draw();
        let message_type = self.compose(self.steps[connection].made, nonce);
        let options =
            CallOptions { tag: connection as u64, reply_capacity: ANSWER, ..CallOptions::default() };
        let to = self.clients[session].attached(self.connections[connection]);
        match to.submit(message_type, &self.body, &options) {
            Ok(_) => {
                self.steps[connection].nonce = nonce;
                self.in_flight[session] += 1;
                true
            }
            Err(IpcError::WouldBlock) => {
                self.outcome.waited += 1;
                self.ready[session].push_front(connection);
                false
            }
            Err(error) => {
                self.fault(error.to_string());
                false
            }
        }
    }

    /// Puts the request into `body`.
    fn compose(&mut self, made: u64, nonce: u64) -> MessageType {
        self.body.clear();
        let chat = match made % KINDS {
            0 => false,
            1 => true,
            _ => {
                let path = self.job.files.join(name(nonce as usize % FILES));
                let path = Some(path.to_string_lossy().into_owned());
                JSON.encode_analyze(&AnalyzeFile { path, ..AnalyzeFile::default() }, &mut self.body);
                return MessageType::ANALYZE_FILE;
            }
        };
        let message = Message { role: MessageRole::User, content: question(nonce), tool_calls: None };
        let request = AIRequest {
            messages: vec![message],
            model: MODEL.to_owned(),
            stream: chat.then_some(true),
            ..AIRequest::default()
        };
        JSON.encode_request(&request, &mut self.body);
        if chat { MessageType::CHAT } else { MessageType::COMPLETE }
    }

    /// Takes all answers of a session that have come; whether there were any.
    fn take(&mut self, session: usize) -> bool {
        let mut some = false;
        loop {
            match self.clients[session].poll() {
                Ok(None) => return some,
                Ok(Some(reply)) => {
                    some = true;
                    self.judge(session, &reply);
                }
                Err(error) => {
                    self.fault(error.to_string());
                    self.ready[session].clear();
                    self.outcome.lost += std::mem::take(&mut self.in_flight[session]) as u64;
                    return some;
                }
            }
        }
    }

    fn judge(&mut self, session: usize, reply: &Answer<'_>) {
        let connection = reply.tag() as usize;
        let Some(step) = self.steps.get(connection).copied().filter(|step| step.nonce != 0) else {
            self.outcome.wrong += 1;
            return self.outcome.note("an answer that nobody asked for".to_owned());
        };
        self.in_flight[session] -= 1;
        self.steps[connection].nonce = 0;
        match reply.result().and_then(|_| reply.to_vec()) {
            Ok(body) => {
                let right = match step.made % KINDS {
                    0 => is_completion(&body, step.nonce),
                    1 => is_chat(&body, step.nonce),
                    _ => body == self.facts[step.nonce as usize % FILES].as_bytes(),
                };
                if right {
                    self.outcome.answered_in_all += 1;
                } else {
                    self.outcome.wrong += 1;
                    self.outcome.note(format!(
                        "kind {}: {}",
                        step.made % KINDS,
                        String::from_utf8_lossy(&body)
                    ));
                }
            }
            // It has to be sent again, and is, as the same call.
            Err(IpcError::Overloaded { .. } | IpcError::MemoryTakenBack) => {
                self.outcome.waited += 1;
                return self.ready[session].push_back(connection);
            }
            Err(error) => self.fault(error.to_string()),
        }
        self.steps[connection].made += 1;
        if self.steps[connection].made < KINDS * self.job.rounds {
            self.ready[session].push_back(connection);
        }
    }

    #[cold]
    fn fault(&mut self, why: String) {
        self.outcome.errors += 1;
        self.outcome.note(why);
    }
}

/// A question that no other call asks.
fn question(nonce: u64) -> String {
    format!("{nonce:016x} ").repeat(8 + (nonce % 8) as usize)
}

/// What the loopback has to say to it.
fn told(nonce: u64) -> String {
    let question = question(nonce);
    format!("loopback: no model has been asked. Model {MODEL:?}, messages: 1. The last one says: {question}")
}

fn is_completion(body: &[u8], nonce: u64) -> bool {
    JSON.decode_response(body)
        .is_ok_and(|answer| answer.content == told(nonce) && answer.finish_reason == FinishReason::Stop)
}

/// Whether a streamed answer says the right thing, then ends once.
fn is_chat(mut body: &[u8], nonce: u64) -> bool {
    let mut reader = RecordReader::default();
    let (mut text, mut ends) = (String::new(), 0);
    while let Ok(Some(record)) = reader.next(&mut body) {
        match JSON.decode_chunk(record) {
            Ok(StreamChunk::Text { text: piece }) if ends == 0 => text.push_str(&piece),
            Ok(StreamChunk::Usage(_)) if ends == 0 => {}
            Ok(StreamChunk::End { finish_reason: FinishReason::Stop }) => ends += 1,
            _ => return false,
        }
    }
    reader.finish().is_ok() && ends == 1 && text == told(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use doorbell::protocol::records::head;

    fn streamed(chunks: &[StreamChunk]) -> Vec<u8> {
        let mut body = Vec::new();
        for chunk in chunks {
            let mut record = Vec::new();
            JSON.encode_chunk(chunk, &mut record);
            body.extend_from_slice(&head(record.len()).unwrap());
            body.extend_from_slice(&record);
        }
        body
    }

    /// Goal:   a streamed answer is right only with all its text, one end, and nothing behind or missing.
    /// Method: a right one in two pieces, then each way to spoil it.
    #[test]
    fn a_chat_is_right_only_if_all_of_it_is() {
        let told = told(9);
        let (first, second) = told.split_at(70);
        let text = |text: &str| StreamChunk::Text { text: text.to_owned() };
        let end = || StreamChunk::End { finish_reason: FinishReason::Stop };
        let right = streamed(&[text(first), text(second), end()]);
        assert!(is_chat(&right, 9) && !is_chat(&right, 8) && !is_chat(&right[..right.len() - 1], 9));
        for wrong in [
            vec![text(first), end()],
            vec![text(first), text(second)],
            vec![text(first), text(second), end(), end()],
            vec![text(second), text(first), end()],
            vec![end(), text(first), text(second)],
        ] {
            assert!(!is_chat(&streamed(&wrong), 9));
        }
    }

    #[test]
    fn no_two_files_are_alike_and_no_two_questions() {
        assert!((1..FILES).all(|n| text(n) != text(n - 1) && text(n).len() > text(n - 1).len()));
        assert_ne!(question(1), question(2));
    }
}

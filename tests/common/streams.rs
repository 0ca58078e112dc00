//! Handlers that stream, and one that says where it runs.

use super::{Made, Shared};
use doorbell::protocol::records;
use doorbell::{Context, HandlerError, MessageType, Pieces, Progress, Reply};
use std::sync::atomic::Ordering::SeqCst;

/// Answers with the bytes of [`pattern`], without end.
pub const ENDLESS: MessageType = MessageType(280);
/// Answers with records: as many as the first four bytes of the request say, each as long as the next four say, of the
/// bytes of [`pattern`]; then, if there is one, with the first part of another.
pub const RECORDS: MessageType = MessageType(281);
/// Answers with the number of the core that it runs on.
pub const CORE: MessageType = MessageType(282);

/// Byte `at` of a stream.
pub fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// The bytes of a stream from `at` on.
pub fn is_pattern(bytes: &[u8], at: usize) -> bool {
    bytes.iter().enumerate().all(|(i, byte)| *byte == pattern(at + i))
}

/// A request for records.
pub fn records_request(count: u32, len: u32, torn: bool) -> Vec<u8> {
    [&count.to_le_bytes()[..], &len.to_le_bytes(), if torn { b"torn" } else { b"" }].concat()
}

/// Counted while it lives.
struct Live(Shared);

impl Live {
    fn new(state: Shared) -> Self {
        state.streams.fetch_add(1, SeqCst);
        Self(state)
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, SeqCst);
    }
}

struct Endless(usize, #[allow(dead_code)] Live);

impl Pieces<Shared> for Endless {
    fn take(
        &mut self,
        _: &Context<'_, Shared>,
        bytes: &[u8],
        _: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        let more: Vec<u8> = (self.0..self.0 + reply.room()).map(pattern).collect();
        self.0 += more.len();
        reply.write(&more)?;
        Ok(Progress::Took(bytes.len()))
    }
}

pub fn endless(context: &Context<'_, Shared>, _: Option<u64>) -> Made {
    Ok(Box::new(Endless(0, Live::new(context.state()))))
}

struct Records {
    request: Vec<u8>,
    answer: Option<Vec<u8>>,
    sent: usize,
    _live: Live,
}

impl Pieces<Shared> for Records {
    fn take(
        &mut self,
        _: &Context<'_, Shared>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        self.request.extend_from_slice(bytes);
        if !last {
            return Ok(Progress::Took(bytes.len()));
        }
        let answer = self.answer.get_or_insert_with(|| {
            let number = |at: usize| u32::from_le_bytes(self.request[at..at + 4].try_into().unwrap());
            let (count, len) = (number(0), number(4) as usize);
            let mut answer = Vec::new();
            for _ in 0..count {
                answer.extend_from_slice(&records::head(len).unwrap());
                answer.extend((0..len).map(pattern));
            }
            if self.request.len() > 8 {
                answer.extend_from_slice(&records::head(100).unwrap());
                answer.push(1);
            }
            answer
        });
        let now = reply.room().min(answer.len() - self.sent);
        reply.write(&answer[self.sent..self.sent + now])?;
        self.sent += now;
        Ok(if self.sent == answer.len() { Progress::Done } else { Progress::Took(bytes.len()) })
    }
}

pub fn records(context: &Context<'_, Shared>, _: Option<u64>) -> Made {
    let live = Live::new(context.state());
    Ok(Box::new(Records { request: Vec::new(), answer: None, sent: 0, _live: live }))
}

pub fn core(_: &Context<'_, Shared>, _: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    reply.write(&doorbell_uring::current_cpu().to_le_bytes())
}

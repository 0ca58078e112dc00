//! What the handlers of a simulated server have executed, and what calls look like: the oracle of what clients are told.

use super::random::mixed;
use crate::server::{Context, Deferred, HandlerError, HandlerTable, Pieces, Progress, Reply};
use crate::{IpcError, MessageType};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Answers with its request, each byte changed.
pub const MIRROR: MessageType = MessageType(256);
/// The same, taken piece by piece.
pub const FLOW: MessageType = MessageType(257);
/// Answers with as many bytes as its request says.
pub const LONG: MessageType = MessageType(258);
/// Panics.
pub const PANIC: MessageType = MessageType(259);
/// Refuses its request.
pub const REFUSE: MessageType = MessageType(260);
/// As [`LONG`], through a ticket that is written to later.
pub const LATER: MessageType = MessageType(261);

/// What every request begins with: its number, a proof of that, the length of the answer that is wanted.
pub const HEAD: usize = 24;
const CHANGE: u8 = 0x5a;
/// Answers are numbered apart from requests.
const ANSWERS: u64 = 1 << 40;

type Answer = Result<(), HandlerError>;

/// One call, as its client sees it.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub id: u64,
    pub of: MessageType,
    pub len: usize,
    pub answer_len: usize,
    pub idempotent: bool,
    pub has_deadline: bool,
    /// Its caller said that the answer is not wanted.
    pub cancelled: bool,
    /// Bytes of the answer that have come.
    pub came: usize,
}

/// Bytes `from` and on of message `id`.
fn fill(id: u64, from: usize, target: &mut [u8]) {
    let mut at = from;
    let mut left = target;
    while !left.is_empty() {
        let word = mixed(id << 24 ^ (at / 8) as u64).to_le_bytes();
        let part = &word[at % 8..];
        let len = part.len().min(left.len());
        left[..len].copy_from_slice(&part[..len]);
        left = &mut left[len..];
        at += len;
    }
}

/// Whether these are bytes `from` and on of message `id`, each changed by `change`.
fn is_filled(id: u64, from: usize, bytes: &[u8], change: u8) -> bool {
    let mut at = from;
    let mut left = bytes;
    while !left.is_empty() {
        let word = mixed(id << 24 ^ (at / 8) as u64).to_le_bytes();
        let part = &word[at % 8..];
        let len = part.len().min(left.len());
        if part[..len].iter().zip(left).any(|(expected, byte)| expected ^ change != *byte) {
            return false;
        }
        left = &left[len..];
        at += len;
    }
    true
}

impl Call {
    fn head(&self, secret: u64) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&self.id.to_le_bytes());
        head[8..16].copy_from_slice(&mixed(self.id ^ secret).to_le_bytes());
        head[16..].copy_from_slice(&(self.answer_len as u64).to_le_bytes());
        head
    }

    /// Bytes of its request from `from` on.
    pub fn write(&self, secret: u64, from: usize, target: &mut [u8]) {
        fill(self.id, from, target);
        for (at, byte) in self.head(secret).iter().enumerate().skip(from) {
            if let Some(target) = target.get_mut(at - from) {
                *target = *byte;
            }
        }
    }

    pub fn request(&self, secret: u64) -> Vec<u8> {
        let mut request = vec![0; self.len];
        self.write(secret, 0, &mut request);
        request
    }

    /// Bytes that its answer has.
    fn whole_answer(&self) -> usize {
        if [LONG, LATER].contains(&self.of) { self.answer_len } else { self.len }
    }

    /// Takes note of bytes of its answer; whether they are right.
    fn takes(&mut self, secret: u64, bytes: &[u8]) -> bool {
        let from = self.came;
        self.came += bytes.len();
        if self.came > self.whole_answer() {
            return false;
        }
        if [LONG, LATER].contains(&self.of) {
            return is_filled(self.id + ANSWERS, from, bytes, 0);
        }
        let head = self.head(secret);
        let in_head = HEAD.saturating_sub(from).min(bytes.len());
        let (first, rest) = bytes.split_at(in_head);
        first.iter().enumerate().all(|(i, byte)| head[from + i] ^ CHANGE == *byte)
            && is_filled(self.id, from + in_head, rest, CHANGE)
    }
}

/// An answer that is still to be written.
struct Owed {
    id: u64,
    ticket: Deferred,
    written: usize,
    len: usize,
}

#[derive(Default)]
struct Inner {
    executed: Vec<u32>,
    owed: Vec<Owed>,
    wrong: Option<String>,
}

/// What all handlers of a simulation share.
pub struct Ledger {
    pub secret: u64,
    inner: Mutex<Inner>,
}

impl Ledger {
    pub fn new(secret: u64) -> Self {
        Self { secret, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number in a request and the answer that it wants; `None` if it is none of ours.
    fn read(&self, head: &[u8]) -> Option<(u64, usize)> {
        let word = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let id = word(0)?;
        (mixed(id ^ self.secret) == word(8)?).then_some(())?;
        Some((id, word(16)? as usize))
    }

    fn execute(&self, id: u64) {
        let mut inner = self.inner();
        let at = id as usize;
        if inner.executed.len() <= at {
            inner.executed.resize(at + 1, 0);
        }
        inner.executed[at] += 1;
    }

    /// Takes note of a whole request: its number and the answer that it wants.
    fn note(&self, request: &[u8]) -> Option<(u64, usize)> {
        let (id, wanted) = self.read(request)?;
        self.execute(id);
        if !is_filled(id, HEAD, &request[HEAD..], 0) {
            self.accuse(format!("request {id} of {} bytes is not what its client wrote", request.len()));
        }
        Some((id, wanted))
    }

    fn accuse(&self, what: String) {
        self.inner().wrong.get_or_insert(what);
    }

    /// What was found to be wrong.
    pub fn wrong(&self) -> Option<String> {
        self.inner().wrong.take()
    }

    /// How often a call was executed.
    pub fn executions(&self, id: u64) -> u32 {
        self.inner().executed.get(id as usize).copied().unwrap_or(0)
    }

    /// Writes some of an answer that is owed; `how` picks which, how much, and whether it is given up.
    pub fn write_later(&self, how: u64) {
        let mut owed = {
            let mut inner = self.inner();
            if inner.owed.is_empty() {
                return;
            }
            let at = how as usize % inner.owed.len();
            inner.owed.swap_remove(at)
        };
        let most = (how >> 32) as usize % 3000 + 1;
        let mut bytes = vec![0; most.min(owed.len - owed.written)];
        fill(owed.id + ANSWERS, owed.written, &mut bytes);
        match owed.ticket.try_write(&bytes) {
            Ok(written) => owed.written += written,
            Err(_) => return,
        }
        if owed.written == owed.len {
            owed.ticket.finish();
        } else {
            self.inner().owed.push(owed);
        }
    }

    pub fn owes(&self) -> bool {
        !self.inner().owed.is_empty()
    }

    /// The process that owed answers has gone.
    pub fn forget_owed(&self) {
        let owed = std::mem::take(&mut self.inner().owed);
        drop(owed);
    }

    /// Takes note of bytes of an answer, and of its end.
    ///
    /// # Errors
    ///
    /// What must not be.
    pub fn take_answer(&self, call: &mut Call, bytes: &[u8], last: bool) -> Result<(), String> {
        if !call.takes(self.secret, bytes) {
            return Err(format!("{call:?}: {} bytes of its answer are wrong", bytes.len()));
        }
        if last && call.came != call.whole_answer() {
            return Err(format!("{call:?}: its answer ends early"));
        }
        if last && [PANIC, REFUSE].contains(&call.of) {
            return Err(format!("{call:?}: answered by a handler that never does"));
        }
        let executed = self.executions(call.id);
        if executed == 0 && !last && call.of == FLOW && call.came < HEAD {
            // Its handler has not seen enough of it to know which call it is.
            return Ok(());
        }
        if executed == 0 || executed > 1 && !call.idempotent {
            return Err(format!("{call:?}: answered and executed {executed} times"));
        }
        Ok(())
    }

    /// Takes note that a call has ended without an answer; `over`: its session has, too.
    ///
    /// # Errors
    ///
    /// What must not be.
    pub fn take_error(&self, call: &Call, error: &IpcError, over: bool) -> Result<(), String> {
        let executed = self.executions(call.id);
        let wrong = |why: &str| Err(format!("{call:?}: {error}: {why}, executed {executed} times"));
        if executed > 1 && !call.idempotent {
            return wrong("executed more than once");
        }
        let long = call.len > 1024 || call.whole_answer() > 1024;
        let may_be = match error {
            IpcError::NotExecuted => executed == 0 && over,
            IpcError::ConnectionLost | IpcError::StreamLost { .. } => over,
            IpcError::HandlerPanic => call.of == PANIC && executed > 0,
            IpcError::Decode(_) => call.of == REFUSE && executed > 0,
            IpcError::Cancelled => call.cancelled,
            IpcError::DeadlineExceeded => call.has_deadline,
            IpcError::Overloaded { .. } => long || [LATER, LONG, FLOW].contains(&call.of),
            // Short ones use leases, too: for the answer that they expect, or if they are sent piece by piece.
            IpcError::MemoryTakenBack => true,
            // Dropped by a process that ended.
            IpcError::Handler(_) => call.of == LATER,
            _ => false,
        };
        if may_be { Ok(()) } else { wrong("no way for it to end") }
    }
}

fn mirror(context: &Context<'_, Ledger>, request: &[u8], reply: &mut Reply<'_>) -> Answer {
    if context.state().note(request).is_none() {
        return Err(HandlerError::Decode("none of ours".to_owned()));
    }
    let answer: Vec<u8> = request.iter().map(|byte| byte ^ CHANGE).collect();
    reply.write(&answer)
}

fn long(context: &Context<'_, Ledger>, request: &[u8], reply: &mut Reply<'_>) -> Answer {
    let Some((id, wanted)) = context.state().note(request) else {
        return Err(HandlerError::Decode("none of ours".to_owned()));
    };
    let mut answer = vec![0; wanted];
    fill(id + ANSWERS, 0, &mut answer);
    // In parts of different lengths, so that they end anywhere in a slot.
    answer.chunks(777).try_for_each(|part| reply.write(part))
}

fn panic(context: &Context<'_, Ledger>, request: &[u8], reply: &mut Reply<'_>) -> Answer {
    context.state().note(request);
    reply.write(b"something first")?;
    // Past the hook for panics: this one is meant.
    std::panic::resume_unwind(Box::new(()))
}

fn refuse(context: &Context<'_, Ledger>, request: &[u8], reply: &mut Reply<'_>) -> Answer {
    context.state().note(request);
    reply.write(b"something first")?;
    Err(HandlerError::Decode("no".to_owned()))
}

fn later(context: &Context<'_, Ledger>, request: &[u8], ticket: Deferred) -> Answer {
    let ledger = context.state();
    if let Some((id, len)) = ledger.note(request) {
        ledger.inner().owed.push(Owed { id, ticket, written: 0, len });
    }
    Ok(())
}

/// A request that is taken piece by piece.
#[derive(Default)]
struct Flow {
    head: Vec<u8>,
    id: Option<u64>,
    taken: usize,
}

impl Pieces<Ledger> for Flow {
    fn take(
        &mut self,
        context: &Context<'_, Ledger>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        let ledger = context.state();
        let taken = bytes.len().min(reply.room());
        let bytes_taken = &bytes[..taken];
        let in_head = (HEAD - self.head.len()).min(taken);
        self.head.extend(&bytes_taken[..in_head]);
        if self.id.is_none() && self.head.len() == HEAD {
            let Some((id, _)) = ledger.read(&self.head) else {
                return Err(HandlerError::Decode("none of ours".to_owned()));
            };
            ledger.execute(id);
            self.id = Some(id);
        }
        if let Some(id) = self.id
            && !is_filled(id, self.taken + in_head, &bytes_taken[in_head..], 0)
        {
            ledger.accuse(format!("request {id} is not what its client wrote from {} on", self.taken));
        }
        let answer: Vec<u8> = bytes_taken.iter().map(|byte| byte ^ CHANGE).collect();
        reply.write(&answer)?;
        self.taken += taken;
        Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
    }
}

/// The handlers of a simulated server.
pub static TABLE: HandlerTable<Ledger> = HandlerTable::empty()
    .on(MIRROR, mirror)
    .on_pieces(FLOW, |_, _| Ok(Box::new(Flow::default())))
    .on(LONG, long)
    .on(PANIC, panic)
    .on(REFUSE, refuse)
    .on_deferred(LATER, later);

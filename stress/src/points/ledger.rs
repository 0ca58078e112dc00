//! Who was executed how often, and who may have been: numbered calls, a log that outlives the server, and the judgement over
//! both (I3 to I5).
//!
//! A call's number is its request's first word; every other word follows from it. The handler writes the number down before
//! it answers, in one appended write: whole or not at all, whatever happens to the process.

use crate::content::{self, mix};
use crate::error::StressError;
use crate::server::{mask_piece, mask_whole};
use doorbell::{
    Context, HandlerError, HandlerTable, IpcError, IpcServer, MessageType, Pieces, Progress, Reply,
    ServerConfig, WaitPolicy,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Writes down the number of the call, then echoes its body under a mask.
pub const LOGGED: MessageType = MessageType(302);
/// Numbers of one caller.
const PER_CALLER: u32 = 32;
/// Callers from this number on are victims: they do not say what became of all of their calls.
pub const VICTIMS: u64 = 1 << 12;
/// Set in the numbers of calls that may be executed more than once.
const IDEMPOTENT: u64 = 1 << 63;

/// The numbers of one caller's calls.
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// Those of caller number `caller`.
    pub fn of(caller: u64) -> Self {
        Self(caller << PER_CALLER)
    }

    /// The next one.
    pub fn draw(&mut self, idempotent: bool) -> u64 {
        self.0 += 1;
        self.0 | if idempotent { IDEMPOTENT } else { 0 }
    }
}

fn is_idempotent(number: u64) -> bool {
    number & IDEMPOTENT != 0
}

/// Whether a call is one of a victim's.
fn is_victims(number: u64) -> bool {
    (number & !IDEMPOTENT) >> PER_CALLER >= VICTIMS
}

/// The request of a call, `len` bytes long: whole words, at least one.
pub fn request(number: u64, len: usize) -> Vec<u8> {
    let words = (1..len as u64 / 8).map(|i| mix(number.wrapping_add(i)).to_le_bytes());
    std::iter::once(number.to_le_bytes()).chain(words).flatten().collect()
}

/// Whether `answer` is that of the call's `request`, every byte of it.
pub fn is_right(request: &[u8], answer: &[u8]) -> bool {
    let mut expected = vec![0; request.len()];
    content::answer(request, &mut expected);
    answer == expected
}

/// Numbers that are written down so that they outlive the writer.
#[derive(Debug)]
pub struct Log(File);

impl Log {
    /// Opens or makes the log at `path`.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the kernel refuses.
    pub fn open(path: &Path) -> Result<Self, StressError> {
        let file = File::options().append(true).create(true).open(path);
        file.map(Self).map_err(|e| StressError::os("open of a log", e))
    }

    /// Appends a number: whole or not at all.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn note(&self, number: u64) -> std::io::Result<()> {
        (&self.0).write_all(&number.to_le_bytes())
    }
}

/// What has been read of a log.
#[derive(Debug)]
pub struct Reading {
    path: PathBuf,
    at: u64,
}

impl Reading {
    /// Of the log at `path`, from its begin.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), at: 0 }
    }

    /// How often each number has been noted since the last time.
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if the log cannot be read.
    pub fn counts(&mut self) -> Result<HashMap<u64, u32>, StressError> {
        let mut counts = HashMap::new();
        let read = |at: u64| -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            match File::open(&self.path) {
                Ok(mut file) => {
                    file.seek(SeekFrom::Start(at))?;
                    file.read_to_end(&mut bytes)?;
                }
                // Nobody has noted anything.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            Ok(bytes)
        };
        let bytes = read(self.at).map_err(|e| StressError::os("reading a log", e))?;
        let (numbers, _) = bytes.as_chunks::<8>();
        self.at += 8 * numbers.len() as u64;
        for number in numbers {
            *counts.entry(u64::from_le_bytes(*number)).or_default() += 1;
        }
        Ok(counts)
    }
}

/// What a caller was told of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// The right answer.
    Answered,
    /// Another one.
    Wrong,
    /// That it has not been executed.
    NotExecuted,
    /// Nothing of that kind: it may have been.
    Unknown,
}

impl Told {
    /// What the result of a call says.
    pub fn of(request: &[u8], result: &Result<Vec<u8>, IpcError>) -> Self {
        match result {
            Ok(answer) if is_right(request, answer) => Self::Answered,
            Ok(_) => Self::Wrong,
            Err(IpcError::NotExecuted) => Self::NotExecuted,
            Err(_) => Self::Unknown,
        }
    }
}

/// What became of some calls.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Audit {
    /// Calls answered right.
    pub answered: u64,
    /// Calls whose caller was told that they were not executed.
    pub not_executed: u64,
    /// Calls that may have been executed.
    pub unknown: u64,
    /// What must not be, in words.
    pub violations: Vec<String>,
}

/// Compares what callers were told with what was executed meanwhile.
pub fn judge(told: &[(u64, Told)], executed: &HashMap<u64, u32>) -> Audit {
    let mut audit = Audit::default();
    for (number, told) in told {
        let times = executed.get(number).copied().unwrap_or(0);
        let (count, fits) = match told {
            Told::Answered => (&mut audit.answered, times == 1 || is_idempotent(*number) && times > 1),
            Told::NotExecuted => (&mut audit.not_executed, times == 0),
            Told::Unknown => (&mut audit.unknown, times <= 1 || is_idempotent(*number)),
            Told::Wrong => (&mut audit.unknown, false),
        };
        *count += 1;
        if !fits {
            audit
                .violations
                .push(format!("I3, I4, I5: call {number:#x} was {told:?}, executed {times} times"));
        }
    }
    audit
}

/// The ledger of clients that do not live to tell: what the server has executed, and what they noted before they died.
#[derive(Debug)]
pub struct VictimsLedger {
    executed: Reading,
    noted: Reading,
}

/// What a victim notes instead of a number when it got a wrong answer.
pub const WRONG: u64 = 0;

impl VictimsLedger {
    /// Of a server that writes to `log`, and victims that write to `noted`.
    pub fn new(log: &Path, noted: &Path) -> Self {
        Self { executed: Reading::new(log), noted: Reading::new(noted) }
    }

    /// Compares what has been written since the last time, when no victim lives. Returns how many calls were answered, and
    /// what must not be, in words: a call executed twice that may not be (I3), one answered and never executed (I4), a wrong
    /// answer (I7).
    ///
    /// # Errors
    ///
    /// [`StressError::Os`] if a log cannot be read.
    pub fn compare(&mut self) -> Result<(u64, Vec<String>), StressError> {
        let (noted, executed) = (self.noted.counts()?, self.executed.counts()?);
        let mut violations = Vec::new();
        for number in noted.keys().filter(|number| !executed.contains_key(number)) {
            violations.push(match *number {
                WRONG => "I7: a victim got a wrong answer".to_owned(),
                number => format!("I4: call {number:#x} was answered and never executed"),
            });
        }
        let twice =
            |(number, times): &(&u64, &u32)| **times > 1 && !is_idempotent(**number) && is_victims(**number);
        for (number, times) in executed.iter().filter(twice) {
            violations.push(format!("I3: call {number:#x} was executed {times} times"));
        }
        Ok((noted.len() as u64, violations))
    }
}

/// What a server of this ledger is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LedgerJob {
    /// Where to listen.
    pub path: PathBuf,
    /// Where executions are noted.
    pub log: PathBuf,
    /// The cores of its reactors.
    pub cores: Vec<usize>,
}

static TABLE: HandlerTable<Log> = HandlerTable::with_builtins()
    .on(LOGGED, logged)
    .on_pieces(LOGGED, logged_pieces)
    .on(crate::server::MASKED_ECHO, |_, request, reply| mask_whole(request, reply));

fn note(context: &Context<'_, Log>, body: &[u8]) -> Result<(), HandlerError> {
    let number = body.first_chunk().ok_or_else(|| HandlerError::Decode("there is no number".to_owned()))?;
    context.state().note(u64::from_le_bytes(*number)).map_err(|e| HandlerError::Failed(e.to_string()))
}

fn logged(context: &Context<'_, Log>, request: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
    note(context, request)?;
    mask_whole(request, reply)
}

fn logged_pieces(_: &Context<'_, Log>, _: Option<u64>) -> Result<Box<dyn Pieces<Log>>, HandlerError> {
    Ok(Box::<LoggedPieces>::default())
}

/// Notes the call with the first piece of its body.
#[derive(Default)]
struct LoggedPieces {
    noted: bool,
}

impl Pieces<Log> for LoggedPieces {
    fn take(
        &mut self,
        context: &Context<'_, Log>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> Result<Progress, HandlerError> {
        if !self.noted && bytes.len() >= 8 {
            note(context, bytes)?;
            self.noted = true;
        }
        mask_piece(bytes, last, reply)
    }
}

/// The server process itself: a small budget, so that leases are scarce, and a reactor on each core.
///
/// # Errors
///
/// Whatever keeps it from serving.
pub fn serve(job: &LedgerJob) -> Result<(), StressError> {
    // Why sessions end, if not by the death of their clients.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .init();
    let config = ServerConfig {
        // Who is silent here is silent on purpose.
        idle_timeout: None,
        policy: WaitPolicy::Handoff,
        // What a wake costs need not be measured, at each of many starts.
        spin_percent: 0,
        thin_executable: false,
        reactors: job.cores.len() as u32,
        cores: job.cores.clone(),
        max_connections: 256,
        max_sessions: 64,
        max_half_open: 64,
        memory_budget: 2 << 20,
        ..ServerConfig::default()
    };
    let server = IpcServer::new(&TABLE, Log::open(&job.log)?).config(config);
    let bound = server.bind(&job.path).map_err(StressError::ipc("binding"))?;
    crate::processes::say(&())?;
    bound.serve().map_err(StressError::ipc("serving"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   I3 to I5: each way in which a ledger can be wrong is found, and a right one is not blamed.
    #[test]
    fn i3_i4_i5_a_wrong_ledger_is_found() {
        use Told::{Answered, NotExecuted, Unknown, Wrong};
        let (plain, idempotent) = (Numbers::of(7).draw(false), Numbers::of(7).draw(true));
        let judged = |number, told, times: u32| {
            let executed = (0..times.min(1)).map(|_| (number, times)).collect();
            judge(&[(number, told)], &executed).violations.is_empty()
        };
        for (told, right) in [(Answered, [false, true, false]), (NotExecuted, [true, false, false])] {
            assert_eq!([0, 1, 2].map(|times| judged(plain, told, times)), right, "{told:?}");
        }
        assert_eq!([0, 1, 2].map(|times| judged(plain, Unknown, times)), [true, true, false]);
        assert_eq!([0, 1, 2].map(|times| judged(idempotent, Answered, times)), [false, true, true]);
        assert_eq!([0, 1, 2].map(|times| judged(idempotent, Unknown, times)), [true; 3]);
        assert_eq!([0, 1, 2].map(|times| judged(plain, Wrong, times)), [false; 3]);
        assert!(!is_victims(plain) && is_victims(Numbers::of(VICTIMS).draw(true)));
    }

    #[test]
    fn only_the_masked_request_is_a_right_answer() {
        let (one, other) = (request(5, 512), request(6, 512));
        let mut answer = vec![0; 512];
        content::answer(&one, &mut answer);
        assert!(is_right(&one, &answer) && !is_right(&other, &answer) && !is_right(&one, &one));
        assert!(!is_right(&one, &answer[..504]));
    }
}

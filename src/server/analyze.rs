//! The files that a reactor reads for calls of `AnalyzeFile` (R2.11): jobs of the core in, answers out.
//!
//! Rule:   a job is begun after a round, a few of them at a time: opening a file takes microseconds, and others wait.
//!         From then on the ring reads, and the reactor does what it always does.
//! Memory: buffers that were not used for a second go back to the kernel (R1.6).

pub(super) use super::files::ReadId;
use super::files::{Analysis, AnalyzeRequest, Ended, FileError, FileFacts, FileReads, Roots, Subject};
use super::jobs::{Answer, Job, Ticket};
use super::reactor::{Reactor, Source};
use super::table::{Deferral, HandlerError};
use crate::codec::{Json, codec_of};
use crate::config::{QUESTION_MAX, ServerConfig};
use crate::error::Result;
use crate::protocol::rendezvous::monotonic_ns;
use rustix::io::Errno;
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Files opened between two rounds.
const FILES_PER_ROUND: u32 = 4;
/// Between two looks at buffers that are not used.
const TRIM_NS: u64 = 1_000_000_000;

/// A file, and what is asked about it (`AnalyzeFile`, R2.11).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileQuestion {
    /// What doorbell itself found out.
    pub facts: FileFacts,
    /// The file, at most [`QUESTION_MAX`](crate::config::QUESTION_MAX) bytes; not UTF-8 if the facts say so.
    pub content: Vec<u8>,
    /// The question, in words.
    pub question: String,
}

/// What all reactors of a server share.
#[derive(Debug)]
pub(super) struct FileSource {
    roots: Roots,
    /// That buffers are not registered has been logged (F40).
    refusal_is_told: AtomicBool,
}

impl FileSource {
    /// Opens the roots.
    ///
    /// # Errors
    ///
    /// As for [`Roots::open`].
    pub fn open(config: &ServerConfig) -> Result<Self> {
        let roots = Roots::open(&config.file_roots, config.max_file_size)?;
        Ok(Self { roots, refusal_is_told: AtomicBool::new(false) })
    }
}

/// For whom a file is read, and what he asks about it.
#[derive(Debug)]
struct Errand {
    ticket: Ticket,
    question: Option<String>,
}

/// The files of one reactor.
#[derive(Debug)]
pub(super) struct FileDesk {
    source: Arc<FileSource>,
    reads: FileReads<Errand>,
    /// When to look at unused buffers next; `u64::MAX` if there are none.
    trim_ns: u64,
}

impl FileDesk {
    pub fn new(source: Arc<FileSource>) -> Self {
        Self { source, reads: FileReads::new(|id| Source::File(id).token()), trim_ns: u64::MAX }
    }

    /// When it has something to do by the clock.
    pub fn due_ns(&self) -> u64 {
        self.trim_ns
    }
}

impl<S> Reactor<S> {
    /// Forgets files that nobody waits for, and begins some that somebody does; returns how many.
    #[cold]
    pub(super) fn serve_files(&mut self) -> Result<u32> {
        let given_up = self.core.take_given_up();
        if !given_up.is_empty() {
            self.desk.reads.give_up(&mut self.driver, |errand| given_up.contains(&errand.ticket.number))?;
        }
        let mut begun = 0;
        while begun < FILES_PER_ROUND
            && let Some(Job { ticket, path, question }) = self.core.next_job()
        {
            begun += 1;
            let (desk, staging) = (&mut self.desk, &mut self.core.staging);
            let (roots, keep) = (&desk.source.roots, question.as_ref().map(|_| QUESTION_MAX));
            let errand = Errand { ticket, question };
            let ended = desk.reads.begin_keeping(roots, &path, errand, keep, staging, &mut self.driver)?;
            if let Some(ended) = ended {
                self.file_ended(ended);
            } else if self.desk.trim_ns == u64::MAX {
                self.desk.trim_ns = monotonic_ns() + TRIM_NS;
            }
        }
        self.tell_of_refusal();
        Ok(begun)
    }

    /// A read has ended.
    pub(super) fn file_came(&mut self, id: ReadId, result: std::result::Result<u32, Errno>) -> Result<()> {
        let staging = &mut self.core.staging;
        if let Some(ended) = self.desk.reads.completed(id, result, staging, &mut self.driver)? {
            self.file_ended(ended);
        }
        self.tell_of_refusal();
        Ok(())
    }

    fn file_ended(&mut self, Ended { ticket: errand, result, content }: Ended<Errand>) {
        let Errand { ticket, question } = errand;
        let metrics = &mut self.core.metrics;
        let answer = match result {
            Ok(facts) => {
                metrics.files_read += 1;
                if let (Some(question), Some(content)) = (question, content) {
                    let asked = self.core.ask(ticket, FileQuestion { facts, content, question });
                    return asked.into_iter().for_each(|id| self.heat(id));
                }
                Answer::of(facts.to_json().into_bytes())
            }
            Err(error) => {
                metrics.files_refused += 1;
                match error {
                    FileError::Busy { .. } => Answer::busy(),
                    error => HandlerError::from(error).into(),
                }
            }
        };
        // Where nobody waits any more there is nobody to tell.
        if let Some(id) = self.core.answer(ticket, answer) {
            self.heat(id);
        }
    }

    /// Logs once for all reactors that the kernel does not register buffers: reads are a little dearer (F40).
    fn tell_of_refusal(&mut self) {
        if let Some(error) = self.driver.take_registration_refusal()
            && !self.desk.source.refusal_is_told.swap(true, Relaxed)
        {
            tracing::warn!(%error, "file buffers are not registered, reads go on without: raise RLIMIT_MEMLOCK (ulimit -l)");
        }
    }

    /// Gives the memory of unused buffers back, if that is due.
    pub(super) fn trim_files(&mut self, now_ns: u64) -> Result<()> {
        if now_ns < self.desk.trim_ns {
            return Ok(());
        }
        self.core.staging.trim(&mut self.driver)?;
        let none_left = self.core.staging.staged_bytes() == 0;
        self.desk.trim_ns = if none_left { u64::MAX } else { now_ns + TRIM_NS };
        Ok(())
    }
}

/// Content is analysed at once, a file when it has been read; a question about either goes on from there.
pub(super) fn analyze_file(codec: u8, request: &[u8]) -> Result<Deferral, HandlerError> {
    let codec = codec_of(codec).unwrap_or(&JSON);
    let AnalyzeRequest { subject, question } = AnalyzeRequest::decode(codec, request)?;
    let question = question.map(Cow::into_owned);
    let text = match subject {
        Subject::Content(text) => text,
        Subject::Path(path) => return Ok(Deferral::File(path.into_owned().into(), question)),
    };
    let facts = Analysis::of(text.as_bytes());
    let Some(question) = question else { return Ok(Deferral::Answer(facts.to_json().into_bytes())) };
    if text.len() as u64 > QUESTION_MAX {
        let len = text.len();
        let why = format!("`content` has {len} bytes: questions are answered about {QUESTION_MAX} at most");
        return Err(HandlerError::Decode(why));
    }
    Ok(Deferral::Question(FileQuestion { facts, content: text.into_owned().into_bytes(), question }))
}

/// Bodies that are not said to be anything else are taken for JSON.
static JSON: Json = Json::new();

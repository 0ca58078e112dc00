//! Calls whose answers take system calls: what the reactor is to do for them, and which of them nobody waits for any
//! more. Sans-I/O: doing it is the reactor's.
//!
//! Rule:   a job waits here, then the reactor has it, then it is over: with its answer, or when its call ends early.
//!         Its number is never used again, so that an answer that comes late meets nobody (S10).
//! Bound:  [`FILE_READS_MAX`] jobs that are not over; one more is answered `Overloaded` and never stored.

use super::inspect::{ENDS_MAX, INSPECTIONS_MAX, Question};
use super::table::HandlerError;
use crate::config::FILE_READS_MAX;
use doorbell_shm::entry::Status;
use std::collections::VecDeque;
use std::path::PathBuf;

/// Milliseconds after which a client may try again for which there was no room.
const RETRY_MS: u64 = 10;

/// Names a call that is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// The seat of its lane.
    pub seat: u32,
    /// Its exchange, if that is still the same: the number tells.
    pub exchange: u32,
    /// Unique at this reactor.
    pub number: u64,
}

/// A file that is to be analysed.
#[derive(Debug)]
#[cfg_attr(not(feature = "messages"), expect(dead_code, reason = "nobody asks for files"))]
pub(crate) struct Job {
    pub ticket: Ticket,
    /// As the client named it.
    pub path: PathBuf,
    /// What is asked about it.
    pub question: Option<String>,
}

/// What a call is answered with.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: Status,
    pub detail: u64,
    pub bytes: Vec<u8>,
}

impl Answer {
    /// Success.
    pub fn of(bytes: Vec<u8>) -> Self {
        Self { status: Status::Ok, detail: 0, bytes }
    }

    /// There are too many jobs.
    pub fn busy() -> Self {
        Self { status: Status::Overloaded, detail: RETRY_MS, bytes: Vec::new() }
    }
}

impl From<HandlerError> for Answer {
    fn from(error: HandlerError) -> Self {
        Self { status: error.status(), detail: 0, bytes: error.to_string().into_bytes() }
    }
}

/// The jobs of one reactor.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    last: u64,
    waiting: VecDeque<Job>,
    /// Numbers of jobs that the reactor has and that nobody waits for any more.
    given_up: Vec<u64>,
    /// Jobs that are not over.
    live: usize,
    /// Questions about the server itself that the reactor has not looked at, and the numbers of all that are not over;
    /// they count among the jobs.
    questions: VecDeque<(Ticket, Question)>,
    asking: Vec<u64>,
    /// Seats of the calls with such questions, those among them whose answers are still being sent.
    asked: Vec<u32>,
}

impl Jobs {
    /// A job for the call that this exchange is; returns its number, or `None` if there are as many as may be.
    pub fn add(&mut self, seat: u32, exchange: u32, path: PathBuf, question: Option<String>) -> Option<u64> {
        if self.live - self.asking.len() >= FILE_READS_MAX {
            return None;
        }
        self.live += 1;
        self.last += 1;
        let ticket = Ticket { seat, exchange, number: self.last };
        self.waiting.push_back(Job { ticket, path, question });
        Some(self.last)
    }

    /// The same for a question about the server itself.
    pub fn ask(&mut self, seat: u32, exchange: u32, question: Question) -> Option<u64> {
        // Whoever does not read his report, or wants sessions to end one after the other, keeps nobody from ending his.
        let ends = matches!(question, Question::End(_));
        let most = if ends { INSPECTIONS_MAX + ENDS_MAX } else { INSPECTIONS_MAX };
        let of_seat = self.asked.iter().filter(|of| **of == seat).count();
        if self.asked.len() >= most || of_seat > usize::from(ends) {
            return None;
        }
        self.asked.push(seat);
        self.live += 1;
        self.last += 1;
        self.asking.push(self.last);
        self.questions.push_back((Ticket { seat, exchange, number: self.last }, question));
        Some(self.last)
    }

    /// A call with a question has ended.
    pub fn asked_ended(&mut self, seat: u32) {
        if let Some(at) = self.asked.iter().position(|of| *of == seat) {
            self.asked.swap_remove(at);
        }
    }

    /// The oldest question that waits.
    pub fn next_question(&mut self) -> Option<(Ticket, Question)> {
        self.questions.pop_front()
    }

    /// Whether there are questions.
    #[inline(always)]
    pub fn has_questions(&self) -> bool {
        !self.questions.is_empty()
    }

    /// The call of this job has ended without its answer.
    pub fn give_up(&mut self, number: u64) {
        self.live -= 1;
        if let Some(at) = self.asking.iter().position(|asking| *asking == number) {
            // The reactor finds out when it answers.
            self.asking.swap_remove(at);
            self.questions.retain(|(ticket, _)| ticket.number != number);
            return;
        }
        match self.waiting.iter().position(|job| job.ticket.number == number) {
            Some(at) => drop(self.waiting.remove(at)),
            None => self.given_up.push(number),
        }
    }

    /// A job that the reactor had has been answered.
    pub fn answered(&mut self, number: u64) {
        self.live -= 1;
        self.asking.retain(|asking| *asking != number);
    }

    /// The oldest job that waits; the reactor has it now.
    pub fn next(&mut self) -> Option<Job> {
        self.waiting.pop_front()
    }

    /// Numbers of jobs that the reactor has and may forget.
    pub fn take_given_up(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.given_up)
    }

    /// Whether the reactor has anything to do.
    #[inline(always)]
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.given_up.is_empty()
    }

    /// Jobs that are not over.
    pub fn live(&self) -> usize {
        self.live
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inspect::EndSession;

    /// Goal:   S12: there are only so many jobs, those that the reactor has among them; whoever goes makes room.
    /// Method: as many as may be, then one for each way in which a job ends.
    #[test]
    fn s12_there_are_only_so_many_jobs() {
        let mut jobs = Jobs::default();
        let numbers: Vec<u64> =
            (0..FILE_READS_MAX as u32).map(|i| jobs.add(1, i, "f".into(), None).unwrap()).collect();
        assert_eq!(jobs.add(1, 99, "f".into(), None), None);
        let job = jobs.next().unwrap();
        assert_eq!(job.ticket, Ticket { seat: 1, exchange: 0, number: numbers[0] });
        assert_eq!(jobs.add(1, 99, "f".into(), None), None, "the reactor has it");
        jobs.answered(numbers[0]);
        assert!(jobs.add(1, 99, "f".into(), None).is_some());

        // One that waits is forgotten here; one that the reactor has is told to it.
        jobs.give_up(numbers[2]);
        assert!(jobs.take_given_up().is_empty());
        assert_eq!(jobs.next().unwrap().ticket.number, numbers[1]);
        jobs.give_up(numbers[1]);
        assert!(jobs.has_work());
        assert_eq!(jobs.take_given_up(), [numbers[1]]);
        assert_eq!(jobs.next().unwrap().ticket.number, numbers[3]);
        assert_eq!(jobs.live(), FILE_READS_MAX - 2);
    }

    /// Goal:   S12: there are only so many questions about the server whose answers have not been sent, two of a session at
    ///         most, one of them a report, and they take no place of files; whoever reads none of his, or asks without end,
    ///         keeps nobody from ending his session.
    #[test]
    fn s12_there_are_only_so_many_questions() {
        let mut jobs = Jobs::default();
        let question = Question::Inspect(Default::default());
        let seats = 0..INSPECTIONS_MAX as u32;
        let numbers: Vec<u64> = seats.map(|seat| jobs.ask(seat, seat, question).unwrap()).collect();
        assert_eq!(jobs.ask(99, 99, question), None);
        assert_eq!(jobs.next_question().unwrap().0.number, numbers[0]);
        jobs.answered(numbers[0]);
        assert_eq!(jobs.ask(99, 99, question), None, "its answer is being sent");
        jobs.asked_ended(0);
        assert_eq!(jobs.ask(1, 99, question), None, "one of a session");
        assert!(jobs.ask(99, 99, question).is_some());
        jobs.give_up(numbers[1]);
        jobs.asked_ended(1);
        assert_eq!(jobs.next_question().unwrap().0.number, numbers[2]);
        assert!(jobs.ask(98, 98, question).is_some());
        assert_eq!(jobs.ask(97, 97, question), None);
        let end = Question::End(EndSession { session: 1, generation: 1 });
        for seat in [98, 99] {
            assert!(jobs.ask(seat, 50, end).is_some());
            assert_eq!(jobs.ask(seat, 51, end), None, "two of a session");
        }
        assert!(jobs.ask(5, 50, end).is_some() && jobs.ask(5, 51, end).is_some());
        assert_eq!(jobs.ask(5, 52, end), None);
        assert_eq!(jobs.ask(6, 50, end), None, "as many as may be");
        for i in 0..FILE_READS_MAX as u32 {
            assert!(jobs.add(1, i, "f".into(), None).is_some());
        }
        assert!(jobs.add(1, 99, "f".into(), None).is_none());
    }
}

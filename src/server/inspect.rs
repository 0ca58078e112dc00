//! The reactor's side of [`crate::inspect`]: each reactor tells of what it has, the one that was asked puts it together.
//!
//! Rule:   nobody waits. What another reactor has comes as a message; one that does not answer within [`PATIENCE_NS`] is
//!         held up by a handler, and the report says so instead.
//! Cost:   off the message path; a reactor is busy for about a microsecond for each connection that it tells of.

use super::core::SessionId;
use super::crew::Message;
use super::jobs::{Answer, Ticket};
use super::json;
use super::reactor::Reactor;
use crate::error::Result;
use crate::inspect::{CallReport, ConnectionReport, EndSession, Inquiry, LaneReport, Report, TracedCall};
use crate::metrics::Metrics;
use crate::protocol::handshake::DisconnectReason;
use crate::protocol::rendezvous::monotonic_ns;

/// How long the other reactors have to answer.
const PATIENCE_NS: u64 = 300_000_000;
/// Questions of each reactor that have not been answered to the last byte: a report of a thousand connections has 150 KB.
pub(crate) const INSPECTIONS_MAX: usize = 4;

/// Places beside those for whoever wants a session to end.
pub(crate) const ENDS_MAX: usize = 4;
/// How long a call with a question may take, its answer read: it has a place that others wait for.
pub(crate) const QUESTION_NS: u64 = 5_000_000_000;
/// Calls that a reactor tells of, at most.
pub(crate) const CALLS_MAX: usize = 4096;

/// What is asked of a reactor about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    Inspect(Inquiry),
    End(EndSession),
}

/// What one reactor has.
#[derive(Debug, Default)]
pub(crate) struct Part {
    pub lanes: Vec<LaneReport>,
    pub connections: Vec<ConnectionReport>,
    pub calls: Vec<CallReport>,
    pub traced: Vec<TracedCall>,
    pub untraced: u64,
}

/// A report that is being put together.
#[derive(Debug)]
struct Pending {
    ticket: Ticket,
    inquiry: Inquiry,
    until_ns: u64,
    /// Reactors that have not answered.
    missing: Vec<u32>,
    part: Part,
}

/// The reports of one reactor that are being put together.
#[derive(Debug, Default)]
pub(crate) struct Inspections(Vec<Pending>);

impl Inspections {
    /// When something is due by the clock.
    pub fn due_ns(&self) -> u64 {
        self.0.iter().map(|pending| pending.until_ns).min().unwrap_or(u64::MAX)
    }
}

impl<S> Reactor<S> {
    /// Answers the next question, or begins to: one between two rounds, for others wait.
    #[cold]
    pub(super) fn serve_inspections(&mut self) -> Result<()> {
        match self.core.next_question() {
            Some((ticket, Question::Inspect(inquiry))) => self.inspect(ticket, inquiry),
            Some((ticket, Question::End(whom))) => self.end_asked(ticket, whom),
            None => Ok(()),
        }
    }

    fn inspect(&mut self, ticket: Ticket, inquiry: Inquiry) -> Result<()> {
        if self.inspections.0.len() >= INSPECTIONS_MAX {
            // Of questions that were given up meanwhile, while a reactor is held up.
            self.answer_question(ticket, Answer::busy());
            return Ok(());
        }
        let part = self.tell(&inquiry);
        let wants_parts = inquiry != Inquiry::default();
        let mut missing = Vec::new();
        let (own, reactors) = (self.crew.own, self.crew.addresses.len());
        for at in (0..reactors).filter(|at| wants_parts && *at != own) {
            let from = own as u32;
            if self.crew.addresses[at].put(Message::Inspect { ticket, inquiry, from }) {
                self.ring_reactor(at)?;
                missing.push(at as u32);
            }
        }
        let pending = Pending { ticket, inquiry, until_ns: monotonic_ns() + PATIENCE_NS, missing, part };
        if pending.missing.is_empty() {
            self.report(pending);
        } else {
            self.inspections.0.push(pending);
        }
        Ok(())
    }

    /// Another reactor asks.
    pub(super) fn inspect_for(&mut self, ticket: Ticket, inquiry: Inquiry, from: u32) -> Result<()> {
        let part = Box::new(self.tell(&inquiry));
        let own = self.crew.own as u32;
        if self.crew.addresses[from as usize].put(Message::Inspected { ticket, part, of: own }) {
            self.ring_reactor(from as usize)?;
        }
        Ok(())
    }

    /// Another reactor has answered.
    pub(super) fn inspected(&mut self, ticket: Ticket, part: Part, of: u32) {
        let Some(at) = self.inspections.0.iter().position(|pending| pending.ticket == ticket) else { return };
        let pending = &mut self.inspections.0[at];
        pending.missing.retain(|missing| *missing != of);
        pending.part.lanes.extend(part.lanes);
        pending.part.connections.extend(part.connections);
        pending.part.calls.extend(part.calls);
        pending.part.traced.extend(part.traced);
        pending.part.untraced += part.untraced;
        if pending.missing.is_empty() {
            let pending = self.inspections.0.swap_remove(at);
            self.report(pending);
        }
    }

    /// Reports without those that have not answered in time.
    pub(super) fn end_inspections(&mut self, now: u64) {
        while let Some(at) = self.inspections.0.iter().position(|pending| pending.until_ns <= now) {
            let pending = self.inspections.0.swap_remove(at);
            self.report(pending);
        }
        self.core.end_trace(now);
    }

    fn tell(&mut self, inquiry: &Inquiry) -> Part {
        let now = monotonic_ns();
        let mut part = self.core.tell(inquiry, self.crew.own as u32, now);
        for lane in part.lanes.iter_mut().filter(|lane| lane.lane == 0) {
            lane.pid = self.pid_of(SessionId { index: lane.session, generation: lane.generation });
        }
        part
    }

    /// Puts a report together and answers with it.
    fn report(&mut self, pending: Pending) {
        let Pending { ticket, missing, part, inquiry, .. } = pending;
        self.show();
        let (now_ns, Metrics { counters, types, reactors, memory_budget }) = (monotonic_ns(), self.metrics());
        let Part { lanes, connections, calls, traced, untraced } = part;
        let report = Report {
            now_ns,
            pid: std::process::id(),
            counters: counters.named().map(|(name, value)| (name.to_owned(), value)).collect(),
            memory_budget,
            types,
            reactors,
            silent: missing,
            running: if inquiry.calls { self.running(now_ns) } else { Vec::new() },
            sessions: lanes,
            connections,
            calls,
            traced,
            untraced,
        };
        self.answer_question(ticket, json::write(&report).map_or_else(Answer::from, Answer::of));
    }

    fn answer_question(&mut self, ticket: Ticket, answer: Answer) {
        // Where nobody waits any more there is nobody to tell.
        if let Some(id) = self.core.answer(ticket, answer) {
            self.heat(id);
        }
    }

    /// Somebody wants a session to end. Home ends it; who asked elsewhere is told that home has been told.
    fn end_asked(&mut self, ticket: Ticket, whom: EndSession) -> Result<()> {
        let id = SessionId { index: whom.session, generation: whom.generation };
        if !self.crew.is_home() {
            if self.crew.addresses[0].put(Message::Evict(id)) {
                self.ring_reactor(0)?;
            }
            self.answer_question(ticket, Answer::of(b"{\"ended\":null}".to_vec()));
            return Ok(());
        }
        let lives = self.core.lane(id).is_some();
        // First, since it may be the session that asks.
        self.answer_question(ticket, Answer::of(format!("{{\"ended\":{lives}}}").into_bytes()));
        self.evict(id)
    }

    /// Home: ends a session that somebody who watches wants to end.
    pub(super) fn evict(&mut self, id: SessionId) -> Result<()> {
        if self.core.lane(id).is_some() {
            tracing::warn!(session = id.index, "session ended on request");
        }
        self.end(id, DisconnectReason::Evicted)
    }
}

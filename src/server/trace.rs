//! The calls of one connection, from beginning to end, for whoever looks at them. Sans-I/O.
//!
//! Bound:  [`TRACE_MAX`] calls until they are taken; those beyond are counted. Nothing is kept once nobody has asked for
//!         [`TRACE_SECONDS`].

use crate::inspect::{TRACE_MAX, TRACE_SECONDS, TracedCall};

/// What one reactor traces.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// The connection; 0 for none, which is no connection's number.
    connection: u32,
    until_ns: u64,
    calls: Vec<TracedCall>,
    untraced: u64,
}

impl Trace {
    /// The connection that is traced; 0 for none.
    #[inline(always)]
    pub fn connection(&self) -> u32 {
        self.connection
    }

    /// From now on traces this connection; returns what there is of it, and how many calls had no room.
    pub fn ask(&mut self, connection: u32, now: u64) -> (Vec<TracedCall>, u64) {
        if connection != self.connection {
            *self = Self { connection, ..Self::default() };
        }
        self.until_ns = now + TRACE_SECONDS * 1_000_000_000;
        (std::mem::take(&mut self.calls), std::mem::take(&mut self.untraced))
    }

    /// Ends what nobody has asked for any more.
    pub fn end(&mut self, now: u64) {
        if self.connection != 0 && now >= self.until_ns {
            *self = Self::default();
        }
    }

    /// A call of the traced connection has ended.
    #[cold]
    pub fn note(&mut self, call: TracedCall) {
        if self.calls.len() < TRACE_MAX {
            self.calls.push(call);
        } else {
            self.untraced += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(connection: u32) -> TracedCall {
        TracedCall {
            session: 0,
            connection,
            reactor: 0,
            message_type: 2,
            slot: 1,
            generation: 1,
            long: false,
            began_ns: 1,
            ended_ns: 2,
            status: 0,
            received: 0,
            sent: 0,
        }
    }

    /// Goal:   S12: a trace that nobody reads is bounded, tells what it left out, and ends.
    #[test]
    fn s12_a_trace_is_bounded_and_ends() {
        let mut trace = Trace::default();
        assert!(trace.ask(7, 0).0.is_empty());
        (0..TRACE_MAX + 3).for_each(|_| trace.note(call(7)));
        let (calls, untraced) = trace.ask(7, 1_000_000_000);
        assert_eq!((calls.len(), untraced, trace.connection()), (TRACE_MAX, 3, 7));
        trace.note(call(7));
        trace.end(TRACE_SECONDS * 1_000_000_000);
        assert_eq!(trace.connection(), 7, "it was asked for a second ago");
        trace.end((TRACE_SECONDS + 1) * 1_000_000_000);
        assert_eq!(trace.connection(), 0);
        assert!(trace.ask(7, 0).0.is_empty());
        assert!(trace.ask(8, 0).0.is_empty());
    }
}

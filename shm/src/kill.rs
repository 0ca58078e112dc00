//! Kill points: labelled moments at which something is half done, where a test can have the process kill or stop itself
//! (FAULTS T9). Client and server name them where they happen: [`kill_point!`](crate::kill_point).
//!
//! Cost: none. Without the feature `kill-points` the macro expands to nothing, its arguments included.
//! Use:  one point of a process is armed by its environment, `DOORBELL_KILL_POINT=label:occurrence:signal`; the signal is
//!       `KILL` or `STOP`. A process that is continued afterwards goes on as if nothing had been, for good.
//!
//! ```sh
//! DOORBELL_KILL_POINT=server.position.published:3:KILL doorbell serve
//! ```

/// A labelled moment: the process that reaches it for the n-th time raises a signal at itself if its environment says so.
///
/// The second form is for code that both sides share: which of the two labels it is depends on a condition.
#[cfg(not(feature = "kill-points"))]
#[macro_export]
macro_rules! kill_point {
    ($label:literal) => {{}};
    ($is:expr => $label:literal, $otherwise:literal) => {{}};
}

/// A labelled moment: the process that reaches it for the n-th time raises a signal at itself if its environment says so.
///
/// The second form is for code that both sides share: which of the two labels it is depends on a condition.
#[cfg(feature = "kill-points")]
#[macro_export]
macro_rules! kill_point {
    ($label:literal) => {{
        const { assert!($crate::kill::is_listed($label), "every label is one of kill::POINTS") };
        $crate::kill::reached($label)
    }};
    ($is:expr => $label:literal, $otherwise:literal) => {{ if $is { $crate::kill_point!($label) } else { $crate::kill_point!($otherwise) } }};
}

/// The environment variable that arms a point.
pub const VARIABLE: &str = "DOORBELL_KILL_POINT";

/// Every label, with what is half done there. Those of clients come first.
pub const POINTS: &[(&str, &str)] = &[
    ("client.socket.connected", "connected, hello not sent"),
    ("client.hello.sent", "hello sent, answer not read"),
    ("client.welcome.received", "descriptor of the segment received, not mapped"),
    ("client.segment.mapped", "segment mapped, no lane opened on it"),
    ("client.open.sent", "OPEN published, nobody rung"),
    ("client.close.sent", "CLOSE published, nobody rung"),
    ("client.slot.taken", "slot taken, request not written"),
    ("client.request.written", "request in its slot, no entry"),
    ("client.entry.half", "words of an entry written, its lap not"),
    ("client.entry.published", "entry published, not noted, nobody rung"),
    ("client.bell.taken", "the server's mark taken, the server not woken"),
    ("client.bell.rung", "server woken"),
    ("client.wait.marked", "own bell marked, not asleep"),
    ("client.answer.taken", "completion copied, consumed position not published"),
    ("client.answer.passed", "consumed position published, completion not noted"),
    ("client.answer.read", "answer read, slot not given back"),
    ("client.cancel.written", "cancel in the slot's word, no hint"),
    ("client.cancel.hinted", "cancel hinted at, nobody rung"),
    ("client.body.begun", "first entry of a long call published, not noted"),
    ("client.frame.written", "frame in its slot, no entry"),
    ("client.frame.published", "frame published, not noted"),
    ("client.credit.written", "credit in the slot's word, no hint"),
    ("client.credit.hinted", "credit hinted at, nobody rung"),
    ("client.lease.asked", "LEASE published, not noted"),
    ("client.lease.granted", "grant read, not in the allocator"),
    ("client.lease.entered", "said to use leases, no slot taken"),
    ("client.lease.returned", "RETURN published, not noted"),
    ("client.lane.asked", "further lane asked for"),
    ("client.lane.mapped", "further lane granted and opened, not used"),
    ("client.lane.attached", "ATTACH published, not noted"),
    ("client.session.lost", "calls of a dead session judged, session not dropped"),
    ("client.call.resent", "call sent again in the next session, not noted"),
    ("server.lock.taken", "lock of the path held, path not looked at"),
    ("server.socket.bound", "socket bound beside the path, not listening"),
    ("server.socket.listening", "socket listens beside the path, not renamed"),
    ("server.socket.renamed", "socket at its path, no reactor"),
    ("server.socket.accepted", "client accepted, not looked at"),
    ("server.hello.heard", "hello read, not judged"),
    ("server.budget.taken", "budget of a session taken, no segment"),
    ("server.memory.sized", "memfd made, no page of it"),
    ("server.memory.backed", "base pages made, not sealed"),
    ("server.memory.sealed", "memfd sealed, not mapped"),
    ("server.segment.made", "segment made, not sent"),
    ("server.welcome.sent", "welcome and descriptor sent, session in no table"),
    ("server.session.opened", "session seated, its socket not listened to"),
    ("server.session.listed", "session listed"),
    ("server.connection.opened", "connection opened, not announced, not answered"),
    ("server.connection.closed", "connection closed, not announced, not answered"),
    ("server.entry.copied", "entry copied, position not published"),
    ("server.position.published", "position published, entry not run"),
    ("server.request.staged", "request copied, handler not run"),
    ("server.handler.returned", "handler has run, answer in the slot, no completion"),
    ("server.completion.half", "words of a completion written, its lap not"),
    ("server.completion.published", "completion published, nobody rung"),
    ("server.bell.taken", "a client's mark taken, the client not woken"),
    ("server.clients.rung", "wakes queued, not submitted"),
    ("server.sleep.marked", "own bell marked, lane not looked at again"),
    ("server.hints.taken", "hints taken, words not looked at"),
    ("server.cancel.heard", "cancel read, call not ended"),
    ("server.frame.parked", "frame of a request noted, not taken"),
    ("server.frame.taken", "frame taken, client not told"),
    ("server.frame.sent", "frame of an answer published, not noted"),
    ("server.exchange.ended", "long call taken out of its tables, not completed"),
    ("server.lease.backed", "pages of a lease made, not in the table"),
    ("server.lease.granted", "lease in the table, client not told"),
    ("server.lease.told", "client told of its lease, nobody rung, not counted"),
    ("server.lease.punched", "pages of a lease gone, still counted as granted"),
    ("server.lease.gone", "memory of a RETURN gone, not answered"),
    ("server.lane.backed", "pages of a further lane made, not in the directory"),
    ("server.lane.granted", "further lane in the directory, its reactor not told"),
    ("server.lane.seated", "further lane seated, client not told"),
    ("server.session.closed", "segment says closed, lane still seated"),
    ("server.session.unseated", "lane let go, budget not given back, socket open"),
    ("server.session.released", "session given back, socket not closed"),
];

/// Whether there is a point of this label.
pub const fn is_listed(label: &str) -> bool {
    let mut i = 0;
    while i < POINTS.len() {
        if equal(POINTS[i].0.as_bytes(), label.as_bytes()) {
            return true;
        }
        i += 1;
    }
    false
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

#[cfg(feature = "kill-points")]
pub use armed::reached;

#[cfg(feature = "kill-points")]
mod armed {
    use super::{VARIABLE, is_listed};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// What the environment asks for.
    struct Armed {
        label: String,
        /// How often the point has to be reached still; 0 once it was.
        left: AtomicU64,
        signal: i32,
    }

    static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
        let text = std::env::var(VARIABLE).ok()?;
        Some(
            parse(&text)
                .unwrap_or_else(|| panic!("{VARIABLE}={text}: label:occurrence:KILL or STOP is wanted")),
        )
    });

    fn parse(text: &str) -> Option<Armed> {
        let mut parts = text.split(':');
        let (label, occurrence, signal) = (parts.next()?, parts.next()?, parts.next()?);
        let signal = match signal {
            "KILL" => signal_hook::consts::signal::SIGKILL,
            "STOP" => signal_hook::consts::signal::SIGSTOP,
            _ => return None,
        };
        let left: u64 = occurrence.parse().ok().filter(|times| *times > 0)?;
        let whole = is_listed(label) && parts.next().is_none();
        whole.then(|| Armed { label: label.to_owned(), left: AtomicU64::new(left), signal })
    }

    /// The point of this label has been reached: raises the signal if it is the armed one, as often as it has to be.
    ///
    /// # Panics
    ///
    /// If the environment asks for a point that there is not.
    #[cold]
    pub fn reached(label: &str) {
        let Some(armed) = ARMED.as_ref().filter(|armed| armed.label == label) else { return };
        // Several threads may reach it: it is the last time for one of them.
        let counted = armed.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        if counted == Ok(1) {
            // At the calling thread: it does not run on until a stopped process is continued.
            signal_hook::low_level::raise(armed.signal).expect("a process may signal itself");
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn what_arms_a_point_is_understood_or_refused() {
            let armed = parse("client.entry.half:3:STOP").unwrap();
            assert_eq!((armed.label.as_str(), armed.left.load(Relaxed)), ("client.entry.half", 3));
            for wrong in ["client.entry.half", "client.entry.half:0:KILL", "client.entry:1:KILL"] {
                assert!(parse(wrong).is_none(), "{wrong}");
            }
            for wrong in ["client.entry.half:1:TERM", "client.entry.half:x:KILL", "client.entry.half:1:KILL:"]
            {
                assert!(parse(wrong).is_none(), "{wrong}");
            }
        }
    }
}

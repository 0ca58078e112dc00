//! An honest client that uses a session by itself: any number of connections, calls of every length, waiting or not.

use super::kernel;
use super::ledger::{Call, FLOW, LONG};
use super::world::World;
use crate::client::simulated;
use crate::client::{CallId, CallOptions, ConnectionId, IpcClient, Reply};
use crate::error::IpcError;
use crate::machine;
use rustix::event::PollFlags;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Connections that it has open at most.
const CONNECTIONS: usize = 6;
/// Calls that it has in flight at most.
const CALLS: usize = 24;

/// A call under way.
struct Begun {
    call: Call,
    id: CallId,
    /// Bytes of the request that have been sent, of one that is sent piece by piece.
    sent: Option<usize>,
    finished: bool,
    /// Only its caller gets it on: he must not wait for something else meanwhile without an end.
    wants_caller: bool,
}

/// The client.
pub struct Plain {
    client: IpcClient,
    connections: Vec<ConnectionId>,
    calls: BTreeMap<u64, Begun>,
    asleep: bool,
    /// When it wakes by the clock.
    due: Option<Instant>,
    /// Cancels every third call as soon as it has submitted it.
    fickle: bool,
    submitted: u64,
}

/// Why a step ended: the session is over, or something is wrong.
pub enum Ended {
    Session(IpcError),
    Wrong(String),
}

impl From<String> for Ended {
    fn from(what: String) -> Self {
        Self::Wrong(what)
    }
}

type Step<T = ()> = Result<T, Ended>;

/// What an error of an operation means, for which nothing else is said.
fn judge(error: IpcError) -> Step {
    match error {
        IpcError::WouldBlock | IpcError::TooMany { .. } | IpcError::Timeout | IpcError::Draining { .. } => {
            Ok(())
        }
        IpcError::Disconnected(_) | IpcError::NotExecuted => Err(Ended::Session(error)),
        error => Err(Ended::Wrong(format!("an honest client: {error}"))),
    }
}

impl Plain {
    pub fn new(client: IpcClient, fickle: bool) -> Self {
        let (connections, calls) = (Vec::new(), BTreeMap::new());
        Self { client, connections, calls, asleep: false, due: None, fickle, submitted: 0 }
    }

    /// Whether it does nothing until its socket says something.
    pub fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    pub fn describe(&self) -> String {
        let calls: Vec<&Call> = self.calls.values().map(|begun| &begun.call).collect();
        format!("asleep {}, {} {calls:?}", self.asleep, simulated::describe(&self.client))
    }

    /// One thing that it does.
    pub fn step(&mut self, world: &World, finishing: bool) -> Step {
        if self.asleep {
            let ready = kernel::is_ready(&self.client, PollFlags::IN | PollFlags::RDHUP);
            let due = self.due.is_some_and(|at| at <= machine::now());
            if !ready && !due && !world.one_in(400) {
                return Ok(());
            }
            self.asleep = false;
        }
        if finishing && self.is_idle() {
            // There are only so many connections, and others need some to get on.
            for connection in self.connections.drain(..) {
                simulated::close(&self.client, connection);
            }
        }
        let most = if finishing { 3 } else { 13 };
        match world.below(most) {
            0 => self.poll(world),
            1 => self.go_on(world, finishing),
            2 => self.sleep(world),
            3 | 4 => self.submit(world),
            5 => self.open(world),
            6 => self.close(world),
            7 => self.cancel(world),
            8 => self.client.flush().or_else(judge),
            9 => self.start(world),
            10 => self.call(world),
            11 => {
                let timeout = Duration::from_micros(world.below(3000) as u64);
                self.client.wait(Some(timeout)).map(|_| ()).or_else(judge)
            }
            _ => self.poll(world),
        }
    }

    fn open(&mut self, world: &World) -> Step {
        if self.connections.len() >= CONNECTIONS || self.is_wanted() || !kernel::may_wait() {
            return Ok(());
        }
        match self.client.open_with(0, world.one_in(3)) {
            Ok(connection) => self.connections.push(connection.detach()),
            Err(error) => return judge(error),
        }
        Ok(())
    }

    fn is_wanted(&self) -> bool {
        self.calls.values().any(|begun| begun.wants_caller)
    }

    fn close(&mut self, world: &World) -> Step {
        if self.connections.len() > 1 {
            let at = world.below(self.connections.len());
            simulated::close(&self.client, self.connections.swap_remove(at));
        }
        Ok(())
    }

    fn connection(&self, world: &World) -> Option<ConnectionId> {
        let at = world.below(self.connections.len());
        self.connections.get(at).copied()
    }

    fn submit(&mut self, world: &World) -> Step {
        let Some(connection) = self.connection(world) else { return self.open(world) };
        for _ in 0..=world.below(5) {
            if self.calls.len() >= CALLS {
                break;
            }
            let (call, options) = world.make_call();
            let request = call.request(world.secret());
            let submitted = self.client.attached(connection).submit(call.of, &request, &options);
            match submitted {
                Ok(id) => {
                    self.submitted += 1;
                    self.calls.insert(
                        call.id,
                        Begun { call, id, sent: None, finished: true, wants_caller: options.pieces },
                    );
                    if self.fickle && self.submitted.is_multiple_of(3) {
                        self.cancel_call(call.id);
                    }
                }
                Err(IpcError::MemoryTakenBack) => {}
                Err(error) => {
                    world.never_sent(&call)?;
                    judge(error)?;
                    break;
                }
            }
        }
        if world.one_in(2) { self.client.flush().or_else(judge) } else { Ok(()) }
    }

    fn cancel_call(&mut self, id: u64) {
        if let Some(begun) = self.calls.get_mut(&id) {
            begun.call.cancelled = true;
            self.client.cancel(begun.id);
        }
    }

    fn some_call(&self, world: &World) -> Option<u64> {
        let at = world.below(self.calls.len());
        self.calls.keys().nth(at).copied()
    }

    fn cancel(&mut self, world: &World) -> Step {
        if let Some(id) = self.some_call(world) {
            self.cancel_call(id);
        }
        Ok(())
    }

    /// Begins a call whose request is sent piece by piece.
    fn start(&mut self, world: &World) -> Step {
        let Some(connection) = self.connection(world) else { return Ok(()) };
        if self.calls.len() >= CALLS {
            return Ok(());
        }
        let (mut call, options) = world.make_call();
        call.of = if call.of == LONG { LONG } else { FLOW };
        let announced = world.one_in(2).then_some(call.len as u64);
        let options = CallOptions { idempotent: false, ..options };
        call.idempotent = false;
        match self.client.attached(connection).start(call.of, announced, &options) {
            Ok(id) => {
                self.calls
                    .insert(call.id, Begun { call, id, sent: Some(0), finished: false, wants_caller: true });
                Ok(())
            }
            Err(error) => judge(error),
        }
    }

    /// Sends more of the requests that are sent piece by piece.
    fn go_on(&mut self, world: &World, finishing: bool) -> Step {
        for begun in self.calls.values_mut() {
            let Some(sent) = begun.sent.filter(|_| !begun.finished) else { continue };
            if !finishing && world.one_in(2) {
                continue;
            }
            let most = if finishing { begun.call.len } else { 1 + world.below(5000) };
            let mut bytes = vec![0; most.min(begun.call.len - sent)];
            begun.call.write(world.secret(), sent, &mut bytes);
            let done = match self.client.send(begun.id, &bytes) {
                Ok(more) => {
                    begun.sent = Some(sent + more);
                    sent + more == begun.call.len
                }
                // Its end lies among the answers.
                Err(IpcError::NoSuchCall) => {
                    begun.finished = true;
                    false
                }
                Err(error) => return judge(error),
            };
            if done {
                begun.finished = true;
                match self.client.finish(begun.id) {
                    Ok(()) | Err(IpcError::NoSuchCall) => {}
                    Err(error) => return judge(error),
                }
            }
        }
        Ok(())
    }

    /// Calls and waits.
    fn call(&mut self, world: &World) -> Step {
        let Some(connection) = self.connection(world) else { return Ok(()) };
        let (mut call, options) = world.make_call();
        let timeout = (self.is_wanted() || !kernel::may_wait() || world.one_in(3))
            .then(|| Duration::from_micros(world.below(20_000) as u64));
        let options = CallOptions { timeout, pieces: false, ..options };
        let request = call.request(world.secret());
        let connection = self.client.attached(connection);
        match connection.call_with(call.of, &request, &options, Reply::to_vec) {
            Ok(Ok(bytes)) => Ok(world.take_answer(&mut call, &bytes, true)?),
            Ok(Err(error)) => Ok(world.take_error(&call, &error, false)?),
            Err(IpcError::WouldBlock) => Ok(world.never_sent(&call)?),
            Err(IpcError::Timeout) => Ok(world.given_up(&call)?),
            Err(IpcError::Draining { .. }) => Ok(world.never_sent(&call)?),
            Err(error @ IpcError::Disconnected(_)) => {
                // Before it was sent, or while it was in flight.
                world.given_up(&call)?;
                judge(error)
            }
            Err(error) => {
                world.take_error(&call, &error, simulated::is_over(&self.client))?;
                Ok(())
            }
        }
    }

    /// In a loop whose waits have a limit, or in one whose waits have none.
    fn sleep(&mut self, world: &World) -> Step {
        // Whoever is told of room once uses it before he sleeps.
        self.go_on(world, true)?;
        if world.one_in(2) {
            match self.client.prepare_to_wait() {
                Ok(ready) => (self.asleep, self.due) = (!ready, None),
                Err(error) => return judge(error),
            }
        } else {
            match self.client.prepare_to_sleep() {
                Ok(at_most) => {
                    self.asleep = at_most != Some(Duration::ZERO);
                    self.due = at_most.map(|at_most| machine::now() + at_most);
                }
                Err(error) => return judge(error),
            }
        }
        Ok(())
    }

    /// Takes some answers.
    fn poll(&mut self, world: &World) -> Step {
        for _ in 0..=world.below(8) {
            let (id, result, bytes, last) = match self.client.poll() {
                Ok(Some(reply)) => {
                    let result = reply.result().map(|_| ());
                    let bytes = if result.is_ok() { reply.to_vec() } else { Ok(Vec::new()) };
                    (reply.tag(), result, bytes, reply.is_last())
                }
                Ok(None) => break,
                Err(error) => return judge(error),
            };
            let Some(begun) = self.calls.get_mut(&id) else {
                return Err(Ended::Wrong(format!("an answer to call {id}, which is not under way")));
            };
            match (result, bytes) {
                // A frame of a session that has ended since it came: the end of its call follows.
                (Ok(()), Err(IpcError::NoSuchCall)) if !last && simulated::is_over(&self.client) => {}
                (Ok(()), Ok(bytes)) => world.take_answer(&mut begun.call, &bytes, last)?,
                (Err(error), _) | (Ok(()), Err(error)) => {
                    world.take_error(&begun.call, &error, simulated::is_over(&self.client))?
                }
            }
            if last {
                self.calls.remove(&id);
            }
        }
        Ok(())
    }

    /// Why its session is over.
    pub fn why_over(&self, otherwise: IpcError) -> IpcError {
        simulated::why_over(&self.client).unwrap_or(otherwise)
    }

    /// The session is over: every call that was in flight has come to an end.
    pub fn bury(mut self, world: &World) -> Result<(), String> {
        for _ in 0..2000 {
            match self.poll(world) {
                Ok(()) => {}
                Err(Ended::Wrong(what)) => return Err(what),
                Err(Ended::Session(_)) if self.calls.is_empty() => return Ok(()),
                Err(Ended::Session(error)) => {
                    let left: Vec<u64> = self.calls.keys().copied().collect();
                    return Err(format!("calls {left:?} have no end, the session has ({error})"));
                }
            }
        }
        Err("a session that is over goes on having answers".to_owned())
    }
}

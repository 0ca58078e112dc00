//! An honest client that many use and that goes on in the next session: what is behind `AsyncClient`, `CallbackClient` and
//! `ReconnectingClient`.

use super::kernel;
use super::ledger::Call;
use super::plain::Ended;
use super::world::World;
use crate::client::simulated::{CallKey, Came, Many as Mux};
use crate::client::{CallOptions, IpcClient};
use crate::error::IpcError;
use crate::machine;
use rustix::event::PollFlags;

/// Calls that it has under way at most.
const CALLS: usize = 24;
/// Its connections.
const LINES: usize = 3;

/// The client.
pub struct Many {
    mux: Mux,
    calls: Vec<(CallKey, Call)>,
    asleep: bool,
}

impl Many {
    pub fn new() -> Self {
        Self { mux: Mux::away(LINES), calls: Vec::new(), asleep: false }
    }

    pub fn is_away(&self) -> bool {
        self.mux.is_away()
    }

    pub fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    /// Goes on in this session.
    pub fn attach(&mut self, client: IpcClient) -> Result<(), String> {
        self.asleep = false;
        match self.mux.attach(client) {
            Ok(()) | Err(IpcError::Disconnected(_) | IpcError::NotExecuted) => Ok(()),
            Err(IpcError::TooMany { .. } | IpcError::Draining { .. }) => Ok(()),
            Err(error) => Err(format!("connections of the next session: {error}")),
        }
    }

    pub fn describe(&self) -> String {
        let calls: Vec<&Call> = self.calls.iter().map(|(_, call)| call).collect();
        format!("asleep {}, away {}, {calls:?}", self.asleep, self.is_away())
    }

    /// One thing that it does.
    pub fn step(&mut self, world: &World, finishing: bool) -> Result<(), Ended> {
        if self.asleep {
            let due = self.mux.wakes().is_some_and(|at| at <= machine::now());
            let ready = self
                .mux
                .socket()
                .is_none_or(|socket| kernel::is_ready(&socket, PollFlags::IN | PollFlags::RDHUP));
            if !ready && !due && !world.one_in(400) {
                return Ok(());
            }
            self.asleep = false;
        }
        match world.below(if finishing { 3 } else { 8 }) {
            0 => self.take(world)?,
            1 => match self.mux.prepare_to_wait() {
                Ok(ready) => self.asleep = !ready && !self.mux.is_away(),
                Err(error) => return Err(Ended::Wrong(format!("a client that many use: {error}"))),
            },
            2 => self.mux.expire(),
            3..=5 => self.submit(world)?,
            6 => self.cancel(world),
            _ => self.drop_call(world)?,
        }
        if let Some(reason) = self.mux.take_reason() {
            world.session_ended(&reason)?;
        }
        Ok(())
    }

    fn submit(&mut self, world: &World) -> Result<(), String> {
        if self.calls.len() >= CALLS {
            return Ok(());
        }
        let (call, options) = world.make_call();
        let options = CallOptions { timeout: None, ..options };
        let request = call.request(world.secret());
        match self.mux.submit(world.below(LINES), call.of, &request, &options, call.id) {
            Ok(key) => self.calls.push((key, call)),
            Err(IpcError::WouldBlock) => world.never_sent(&call)?,
            Err(error) => return Err(format!("{call:?}: {error}")),
        }
        Ok(())
    }

    fn cancel(&mut self, world: &World) {
        let at = world.below(self.calls.len());
        if let Some((key, call)) = self.calls.get_mut(at) {
            call.cancelled = true;
            self.mux.cancel(*key);
        }
    }

    fn drop_call(&mut self, world: &World) -> Result<(), String> {
        if self.calls.is_empty() || !world.one_in(3) {
            return Ok(());
        }
        let (key, call) = self.calls.swap_remove(world.below(self.calls.len()));
        self.mux.drop_call(key);
        world.given_up(&call)
    }

    /// Takes what has come.
    fn take(&mut self, world: &World) -> Result<(), Ended> {
        loop {
            match self.mux.take() {
                Ok(Some((key, _))) if !world.one_in(4) => self.read(world, key)?,
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => return Err(Ended::Wrong(format!("a client that many use: {error}"))),
            }
        }
        // Those that came and were not read then.
        for at in (0..self.calls.len()).rev() {
            let key = self.calls[at].0;
            self.read(world, key)?;
        }
        Ok(())
    }

    fn read(&mut self, world: &World, key: CallKey) -> Result<(), String> {
        let Some(at) = self.calls.iter().position(|(other, _)| *other == key) else { return Ok(()) };
        loop {
            match self.mux.next(key) {
                Came::Nothing => break,
                Came::Frame { bytes, last } => {
                    world.take_answer(&mut self.calls[at].1, &bytes, last)?;
                    if last {
                        self.calls.swap_remove(at);
                        break;
                    }
                }
                Came::Failed(error) => {
                    let (_, call) = self.calls.swap_remove(at);
                    return world.take_error(&call, &error, true);
                }
            }
        }
        Ok(())
    }
}

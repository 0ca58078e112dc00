//! Clients that suffer a kill point. Where one does not come, or the process is continued behind it, all goes on: every
//! answer is verified, and each call that was answered is noted in a file, for the parent to compare.

use super::ledger::{LOGGED, Log, Numbers, Told, VICTIMS, is_right, request};
use crate::content::mix;
use crate::error::StressError;
use crate::{machine, processes};
use doorbell::{
    CallOptions, ClientConfig, Connection, IpcClient, IpcError, Reconnect, ReconnectingClient, WaitPolicy,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Bytes of a call that fits its slot.
pub const SHORT: usize = 512;
/// Bytes of a call of several frames, and of their answers.
pub const LONG: usize = 160 << 10;
/// Calls that a client has under way when its server dies.
const UNDER_WAY: u64 = 3;

/// What a victim is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VictimJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// Where it notes the calls that were answered.
    pub answered: PathBuf,
    /// The core to run on: not the home reactor's.
    pub core: usize,
    /// Which one of the run it is.
    pub number: u64,
    /// What it does beside short calls.
    pub habit: Habit,
}

/// What a client does so that it comes by a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Habit {
    /// Sleeps at once when it waits.
    Sleeper,
    /// Takes a lane on its own core.
    Lanes,
    /// Cancels.
    Canceller,
    /// Calls of several frames.
    Long,
    /// The same all the time in one session, while others wait for memory.
    Lender,
    /// Everything but that.
    Everything,
    /// Has calls under way when its server dies, and comes back.
    Returning,
}

impl Habit {
    /// Of a client that is to come by the point of this label; now and then one that does everything.
    pub fn for_point(label: &str, dice: u64) -> Self {
        match label {
            "client.session.lost" | "client.call.resent" => return Self::Returning,
            "client.lease.returned" => return Self::Lender,
            _ if dice.is_multiple_of(8) => return Self::Everything,
            _ => {}
        }
        match label.split('.').nth(1) {
            Some("lane") => Self::Lanes,
            Some("cancel") => Self::Canceller,
            Some("body" | "frame" | "credit" | "lease") => Self::Long,
            _ => Self::Sleeper,
        }
    }
}

/// A victim's process: lives until it comes by its point, or until the parent closes its standard input.
///
/// # Errors
///
/// Whatever no client of a server that lives may meet, a wrong answer above all.
pub fn run(job: &VictimJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let log = Log::open(&job.answered)?;
    let mut client = Life { numbers: Numbers::of(VICTIMS + job.number), log: &log };
    if job.habit == Habit::Returning {
        return client.return_to(job);
    }
    for round in 0.. {
        if round > 0 && is_told() {
            break;
        }
        client.session(job, mix(job.number ^ round << 40))?;
    }
    Ok(())
}

/// Whether the parent has said something, or has closed the pipe.
fn is_told() -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    // What cannot be asked is told by the attempt to hear.
    poll(&mut [PollFd::new(&std::io::stdin(), PollFlags::IN)], Some(&now)) != Ok(0)
}

struct Life<'a> {
    numbers: Numbers,
    log: &'a Log,
}

impl Life<'_> {
    /// One session, from its begin to its end.
    fn session(&mut self, job: &VictimJob, dice: u64) -> Result<(), StressError> {
        let policy = match job.habit {
            Habit::Lanes | Habit::Everything => WaitPolicy::Handoff,
            Habit::Sleeper => WaitPolicy::Block,
            _ => [WaitPolicy::Handoff, WaitPolicy::Block][dice as usize % 2],
        };
        let config = ClientConfig { policy, lanes: 2, ..ClientConfig::default() };
        let client = loop {
            match IpcClient::connect_with(&job.path, &config) {
                // Others have leased all of it: they give it back when their calls have ended.
                Err(IpcError::NoMemory { .. }) => std::thread::sleep(AWAY),
                connected => break connected.map_err(StressError::ipc("connecting"))?,
            }
        };
        let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
        for _ in 0..3 {
            self.call(&connection, SHORT)?;
        }
        if matches!(job.habit, Habit::Canceller | Habit::Everything) {
            let number = self.numbers.draw(false);
            let told = cancelled(&client, &connection, number, SHORT);
            self.note(number, told.map_err(StressError::ipc("cancelling"))?)?;
        }
        if matches!(job.habit, Habit::Long | Habit::Everything) {
            self.call(&connection, LONG)?;
            let number = self.numbers.draw(false);
            let told = cancelled(&client, &connection, number, LONG);
            self.note(number, told.map_err(StressError::ipc("cancelling a long call"))?)?;
            self.call(&connection, LONG)?;
        }
        if job.habit == Habit::Lender {
            // With so many who want memory a client that comes now would be refused.
            processes::say(&())?;
            let Some(()) = processes::hear()? else { return Ok(()) };
            while !is_told() {
                self.call(&connection, LONG)?;
            }
        }
        let bulk = client.open_with(0, true).map_err(StressError::ipc("opening a connection"))?;
        self.call(&bulk, SHORT)
    }

    fn call(&mut self, connection: &Connection<'_>, len: usize) -> Result<(), StressError> {
        let number = self.numbers.draw(false);
        let request = request(number, len);
        match connection.call(LOGGED, &request) {
            Ok(answer) if is_right(&request, &answer) => self.note(number, Told::Answered),
            Ok(answer) => Err(wrong(number, answer.len())),
            // It has been stopped, and others waited for its memory.
            Err(IpcError::MemoryTakenBack) => Ok(()),
            Err(error) => Err(StressError::ipc("calling")(error)),
        }
    }

    fn note(&mut self, number: u64, told: Told) -> Result<(), StressError> {
        match told {
            Told::Answered => self.log.note(number).map_err(|e| StressError::os("write of a log", e)),
            Told::Wrong => Err(wrong(number, 0)),
            Told::NotExecuted | Told::Unknown => Ok(()),
        }
    }

    /// Has calls under way when the server dies, and gets their answers from the next one. The parent stops the server
    /// when it is told that there is a session, and kills it when it is told that the calls are under way.
    fn return_to(&mut self, job: &VictimJob) -> Result<(), StressError> {
        let client =
            ReconnectingClient::connect_with(&job.path, &ClientConfig::default(), Reconnect::default())
                .map_err(StressError::ipc("connecting"))?;
        let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
        processes::say(&())?;
        let Some(()) = processes::hear()? else { return Ok(()) };
        let mut requests = Vec::new();
        for tag in 0..UNDER_WAY {
            let number = self.numbers.draw(true);
            let options = CallOptions { tag, idempotent: tag > 0, ..CallOptions::default() };
            requests.push((number, request(number, SHORT)));
            let submitted = connection.submit(LOGGED, &requests[tag as usize].1, &options);
            // Each idempotent call takes two of the four slots.
            match submitted {
                Ok(_) => {}
                Err(IpcError::WouldBlock) => {
                    requests.pop();
                    break;
                }
                Err(error) => return Err(StressError::ipc("submitting")(error)),
            }
        }
        processes::say(&())?;
        let mut left = requests.len();
        while left > 0 {
            client.wait(None).map_err(StressError::ipc("waiting"))?;
            while let Some(outcome) = client.poll().map_err(StressError::ipc("polling"))? {
                left -= 1;
                let (number, request) = &requests[outcome.tag as usize];
                self.note(*number, Told::of(request, &outcome.result))?;
            }
        }
        while !is_told() {
            let number = self.numbers.draw(true);
            let request = request(number, SHORT);
            let answer = connection.call(LOGGED, &request).map_err(StressError::ipc("calling"))?;
            self.note(number, Told::of(&request, &Ok(answer)))?;
        }
        Ok(())
    }
}

#[cold]
fn wrong(number: u64, len: usize) -> StressError {
    StressError::Wrong(format!("call {number:#x} got {len} bytes that are not its answer"))
}

/// Submits a call, cancels it, a long one when the first frame of its answer has come, and takes its end.
///
/// # Errors
///
/// What becomes of the session.
pub fn cancelled(
    client: &IpcClient,
    connection: &Connection<'_>,
    number: u64,
    len: usize,
) -> Result<Told, IpcError> {
    let request = request(number, len);
    let options = CallOptions { pieces: len > SHORT, ..CallOptions::default() };
    let id = loop {
        match connection.submit(LOGGED, &request, &options) {
            Err(IpcError::WouldBlock) => client.wait(Some(Duration::from_millis(1))).map(drop)?,
            other => break other?,
        }
    };
    if !options.pieces {
        client.cancel(id);
    }
    loop {
        client.wait(None)?;
        while let Some(reply) = client.poll()? {
            let last = reply.is_last();
            let told = match reply.result() {
                Ok(_) if options.pieces => Told::Unknown,
                Ok(_) => Told::of(&request, &reply.to_vec()),
                Err(error) => Told::of(&request, &Err(error)),
            };
            drop(reply);
            if last {
                return Ok(told);
            }
            client.cancel(id);
        }
    }
}

/// How long a client pauses that has met a server which is away, or has no memory now.
pub const AWAY: Duration = Duration::from_micros(500);

//! The thread of a callback client: it has the session.

use super::ticket::{Delivery, Ticket};
use super::{FRAMES_MAX, Shared};
use crate::client::call::CallOptions;
use crate::client::mux::{Broken, Key, Mux, Next};
use crate::client::reconnect::{Address, LinkOptions, LinkStatus, Reconnect, Search, sleep_until};
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// The connection that all calls go on.
const LINE: usize = 0;

/// A call that is to be made.
#[derive(Debug)]
pub(super) struct Command {
    pub ticket: Arc<Ticket>,
    pub message_type: MessageType,
    pub request: Vec<u8>,
    pub options: CallOptions,
    /// Where the caller runs.
    pub core: u32,
    /// When its time is over.
    pub due: Option<Instant>,
    /// When it must have been started.
    pub start: Option<Instant>,
}

/// A call that has been made.
#[derive(Debug)]
struct Made {
    ticket: Arc<Ticket>,
    streams: bool,
    timeout: Option<Duration>,
    due: Option<Instant>,
    /// Its reader has enough to do: frames wait where they are, and the clock stands still.
    paused: bool,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    incoming: Receiver<Command>,
    /// To a caller who polls.
    outgoing: Option<Sender<Delivery>>,
    /// Calls for which there has been no room, in order.
    waiting: VecDeque<Command>,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, incoming: Receiver<Command>, outgoing: Option<Sender<Delivery>>) -> Self {
        Self { shared, incoming, outgoing, waiting: VecDeque::new() }
    }

    /// Connects, tells how that went, and works until the client is closed or the last session is over.
    pub fn run(mut self, address: Address, link: &LinkOptions, tell: Option<&Sender<Result<()>>>) {
        let reconnect = link.reconnect.as_ref();
        let status = |status: &LinkStatus| reconnect.into_iter().for_each(|reconnect| reconnect.tell(status));
        status(&LinkStatus::Connecting);
        let (error, mut mux) = match Mux::connect(address, (link.codec, link.bulk), reconnect.is_some()) {
            Ok(mut mux) => {
                if let Some(tell) = tell {
                    // Whoever asked waits for it.
                    tell.send(Ok(())).ok();
                }
                status(&LinkStatus::Connected);
                (self.work(&mut mux, reconnect), Some(mux))
            }
            Err(error) => (error, None),
        };
        self.shared.broken.get_or_init(|| Broken::by(&error));
        if let Some(mux) = &mut mux {
            mux.break_off(&error);
            let keys: Vec<Key> = mux.keys().collect();
            keys.into_iter().for_each(|key| self.hand_out(mux, key, usize::MAX));
        }
        self.waiting.extend(self.incoming.try_iter());
        for command in std::mem::take(&mut self.waiting) {
            self.deliver(Delivery::end(command.ticket, Err(self.shared.why_broken())));
        }
        if let (None, Some(tell)) = (mux, tell) {
            tell.send(Err(error)).ok();
        }
    }

    /// Returns why it cannot go on.
    fn work(&mut self, mux: &mut Mux<Made>, reconnect: Option<&Reconnect>) -> IpcError {
        loop {
            let session = self.work_in_session(mux);
            let Some(reconnect) = reconnect else {
                return session.err().unwrap_or(IpcError::ClientClosed);
            };
            if let Err(reason) = session.and_then(|()| self.come_back(mux, reconnect)) {
                let status = LinkStatus::Disconnected { reason };
                reconnect.tell(&status);
                let LinkStatus::Disconnected { reason } = status else { return IpcError::ClientClosed };
                return reason;
            }
        }
    }

    /// Returns once the session is over and another one shall follow.
    fn work_in_session(&mut self, mux: &mut Mux<Made>) -> Result<()> {
        while let Some(socket) = mux.socket() {
            while !mux.is_away() {
                if !self.turn(mux)? && !mux.is_away() {
                    self.sleep(socket.as_fd(), self.next_due(mux))?;
                }
            }
        }
        Ok(())
    }

    /// Looks for the server until it is there. Calls can be made, cancelled and overdue meanwhile.
    fn come_back(&mut self, mux: &mut Mux<Made>, reconnect: &Reconnect) -> Result<()> {
        if let Some(reason) = mux.take_reason() {
            reconnect.tell(&LinkStatus::Disconnected { reason });
        }
        reconnect.tell(&LinkStatus::Connecting);
        let mut search = Search::new(reconnect);
        loop {
            self.take_commands(mux)?;
            if let Some(link) = search.step(&mux.address, &mux.wanted(), reconnect)? {
                mux.attach(link);
                reconnect.tell(&LinkStatus::Connected);
                return Ok(());
            }
            let until = self.next_due(mux).into_iter().chain([search.due()]).min();
            let bell = self.shared.bell.descriptor.as_fd();
            match search.descriptor() {
                Some(begun) => sleep_until(&[begun, bell], until)?,
                None => sleep_until(&[bell], until)?,
            }
        }
    }

    /// Does what there is to do; `true` if there is more.
    fn turn(&mut self, mux: &mut Mux<Made>) -> Result<bool> {
        self.take_commands(mux)?;
        while let Some(key) = mux.take()? {
            self.hand_out(mux, key, FRAMES_MAX);
        }
        let keys: Vec<Key> = mux.keys().collect();
        for key in keys {
            if mux.data_mut(key).is_some_and(|made| made.paused) {
                self.hand_out(mux, key, FRAMES_MAX);
            }
        }
        self.submit_waiting(mux);
        mux.prepare_to_wait()
    }

    /// Hears what the caller wants, and ends what was cancelled or is overdue.
    fn take_commands(&mut self, mux: &mut Mux<Made>) -> Result<()> {
        self.shared.bell.hear();
        if self.shared.closing.load(SeqCst) {
            return Err(IpcError::ClientClosed);
        }
        self.waiting.extend(self.incoming.try_iter());
        if self.shared.cancelled.swap(false, SeqCst) {
            self.end_those(mux, |ticket, _| ticket.is_cancelled(), || IpcError::Cancelled);
        }
        let now = Instant::now();
        if self.next_due(mux).is_some_and(|due| due <= now) {
            self.end_expired(now);
            mux.expire(now);
            while let Some(key) = mux.take_news() {
                self.hand_out(mux, key, FRAMES_MAX);
            }
            self.end_those(mux, |_, due| due.is_some_and(|due| due <= now), || IpcError::Timeout);
        }
        Ok(())
    }

    /// Submits as many of those that wait as there is room for.
    fn submit_waiting(&mut self, mux: &mut Mux<Made>) {
        while let Some(command) = self.waiting.pop_front() {
            mux.keep_off(command.core);
            let Command { ticket, message_type, request, options, core, due, start } = command;
            let deadline = start.map(|start| start.saturating_duration_since(Instant::now()));
            let options = CallOptions { deadline, ..options };
            let (streams, timeout) = (options.pieces, options.timeout);
            let made = Made { ticket, streams, timeout, due, paused: false };
            match mux.submit(LINE, message_type, &request, &options, made) {
                Ok(_) => {}
                Err((IpcError::WouldBlock, Made { ticket, .. })) => {
                    let again = Command { ticket, message_type, request, options, core, due, start };
                    self.waiting.push_front(again);
                    return;
                }
                Err((error, made)) => self.deliver(Delivery::end(made.ticket, Err(error))),
            }
        }
    }

    /// Hands out what has come of a call, as long as no more than so many frames are on their way.
    fn hand_out(&self, mux: &mut Mux<Made>, key: Key, frames_max: usize) {
        loop {
            let Some(made) = mux.data_mut(key) else { return };
            made.paused = made.ticket.frames() >= frames_max;
            if made.paused {
                return;
            }
            let (ticket, streams) = (Arc::clone(&made.ticket), made.streams);
            if streams {
                made.due = made.timeout.and_then(|limit| Instant::now().checked_add(limit));
            }
            match mux.next(key) {
                Next::Pending => return,
                Next::Failed(error) => return self.deliver(Delivery::end(ticket, Err(error))),
                Next::Frame { bytes, .. } if !streams => {
                    return self.deliver(Delivery::end(ticket, Ok(bytes)));
                }
                Next::Frame { bytes, last } => {
                    if !bytes.is_empty() {
                        self.deliver(Delivery::frame(Arc::clone(&ticket), bytes));
                    }
                    if last {
                        return self.deliver(Delivery::end(ticket, Ok(Vec::new())));
                    }
                }
            }
        }
    }

    /// Ends the calls that have not been made by when they had to be started.
    fn end_expired(&mut self, now: Instant) {
        let is_expired = |command: &Command| command.start.is_some_and(|start| start <= now);
        let (expired, waiting): (VecDeque<Command>, _) =
            std::mem::take(&mut self.waiting).into_iter().partition(is_expired);
        self.waiting = waiting;
        for command in expired {
            self.deliver(Delivery::end(command.ticket, Err(IpcError::DeadlineExceeded)));
        }
    }

    /// Ends the calls of which that is true, made or not.
    fn end_those(
        &mut self,
        mux: &mut Mux<Made>,
        is_one: impl Fn(&Ticket, Option<Instant>) -> bool,
        error: impl Fn() -> IpcError,
    ) {
        let (ended, waiting): (VecDeque<Command>, _) =
            std::mem::take(&mut self.waiting).into_iter().partition(|c| is_one(&c.ticket, c.due));
        self.waiting = waiting;
        for command in ended {
            self.deliver(Delivery::end(command.ticket, Err(error())));
        }
        let keys: Vec<Key> = mux.keys().collect();
        for key in keys {
            let ends = mux.data_mut(key).is_some_and(|made| is_one(&made.ticket, made.clock()));
            if ends && let Some(made) = mux.drop_call(key) {
                self.deliver(Delivery::end(made.ticket, Err(error())));
            }
        }
    }

    /// Calls back here, or leaves it to the caller.
    fn deliver(&self, delivery: Delivery) {
        let Some(outgoing) = &self.outgoing else { return delivery.run() };
        match outgoing.send(delivery) {
            Ok(()) => self.shared.events.ring(),
            // Nobody will poll any more.
            Err(unsent) => unsent.0.run(),
        }
    }

    /// When the next of all calls' times is over, or a call that waits for memory begins without it.
    fn next_due(&self, mux: &mut Mux<Made>) -> Option<Instant> {
        let made = mux.all_data().filter_map(Made::clock).min();
        let waiting =
            self.waiting.iter().flat_map(|command| command.due.into_iter().chain(command.start)).min();
        made.into_iter().chain(waiting).chain(mux.wakes_at()).chain(mux.expires_at()).min()
    }

    fn sleep(&self, socket: BorrowedFd<'_>, until: Option<Instant>) -> Result<()> {
        sleep_until(&[socket, self.shared.bell.descriptor.as_fd()], until)
    }
}

impl Made {
    fn clock(&self) -> Option<Instant> {
        self.due.filter(|_| !self.paused)
    }
}

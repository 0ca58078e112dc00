//! What becomes of the calls of a [`Mux`] whose session is over, when another session follows (FAULTS §5).
//!
//! Memory: the request of a call that fits a slot stays in that slot, which the server does not write before it has
//!         started the call; an idempotent call has its answer in a slot of its own for that. So nothing is copied as
//!         long as nothing breaks: requests are taken out of what is left of the session. Longer ones, and those for which
//!         a session has no two slots, go out in frames from slots that are used again, so of those a copy is kept.
//! Order:  what is sent again goes first, in the order in which it was first sent.

use super::IpcClient;
use super::call::CallOptions;
use super::classify::{Fate, Terms, Verdict, judge};
use super::lane::Answered;
use super::mux::{Call, Frame, Key, Mux, State};
use super::reconnect::{ends_soon, is_loss};
use crate::error::{IpcError, Result};
use crate::machine;
use crate::protocol::MessageType;
use doorbell_shm::kill_point;
use std::collections::VecDeque;
use std::time::Instant;

/// What it takes to send a call again.
#[derive(Debug)]
pub(super) struct Again {
    /// Index of its connection.
    pub line: usize,
    message_type: MessageType,
    options: CallOptions,
    /// When it must have been started.
    deadline: Option<Instant>,
    len: usize,
    /// The request, where it does not lie in a slot.
    request: Option<Vec<u8>>,
    /// Earlier sessions in which it may have been executed.
    doubts: u32,
    /// Its answer is not wanted any more.
    cancelled: bool,
    /// Frames of its answer that have been handed out, and bytes in them.
    frames: u64,
    bytes: u64,
}

impl Again {
    /// Of a call that has just been submitted.
    pub fn new(
        client: &IpcClient,
        line: usize,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Self {
        let in_slot = client.session.borrow().keeps_request(request.len(), options);
        Self {
            line,
            message_type,
            options: *options,
            deadline: options.deadline.and_then(|limit| machine::now().checked_add(limit)),
            len: request.len(),
            request: (!in_slot).then(|| request.to_vec()),
            doubts: 0,
            cancelled: false,
            frames: 0,
            bytes: 0,
        }
    }

    /// Whether it may have been executed in an earlier session.
    pub fn is_in_doubt(&self) -> bool {
        self.doubts > 0
    }

    pub fn count_frame(&mut self, frame: &[u8]) {
        self.frames += u64::from(!frame.is_empty());
        self.bytes += frame.len() as u64;
    }

    /// What goes with it now; `None` if its deadline has passed.
    fn options(&self) -> Option<CallOptions> {
        let deadline = match self.deadline {
            Some(deadline) => Some(deadline.checked_duration_since(machine::now())?),
            None => None,
        };
        Some(CallOptions { deadline, ..self.options })
    }

    /// Why a call that has not been sent again, and will not be, has no answer.
    fn given_up(&self, otherwise: IpcError) -> IpcError {
        if self.is_in_doubt() { IpcError::ConnectionLost } else { otherwise }
    }
}

/// What a client keeps between two sessions.
#[derive(Debug, Default)]
pub(super) struct Revival {
    /// Calls to be sent again, oldest first.
    queue: VecDeque<Key>,
    /// Calls that have come to an end without an answer, and whose callers have not been told.
    news: VecDeque<Key>,
    /// Why the last session ended, until somebody asks.
    reason: Option<IpcError>,
}

impl Revival {
    /// Whether calls wait to be sent again.
    pub fn is_sending(&self) -> bool {
        !self.queue.is_empty()
    }

    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// Its session is over and has not completed this call: says whether it is over, too. Otherwise it will be sent again.
    pub fn lost<T>(
        &mut self,
        client: &IpcClient,
        call: &mut Call<T>,
        answered: &Answered,
        started: bool,
    ) -> bool {
        let fate = if started { Fate::Unknown } else { Fate::NotExecuted };
        let mut session = client.session.borrow_mut();
        let Some(again) = &mut call.again else {
            session.release(answered);
            call.state.end(IpcError::ConnectionLost);
            return true;
        };
        let terms = Terms {
            idempotent: again.options.idempotent,
            doubts: again.doubts,
            streams: again.options.pieces,
            has_frames: again.frames > 0,
            has_request: session.left_requests(),
        };
        let verdict = judge(fate, terms);
        if again.cancelled && verdict == Verdict::Resend {
            // The server may not have heard of that, and the next one never would.
            let error = again.given_up(if started { IpcError::ConnectionLost } else { IpcError::Cancelled });
            session.release(answered);
            call.state.end(error);
            return true;
        }
        if verdict == Verdict::Resend {
            again.request.get_or_insert_with(|| {
                let mut request = vec![0; again.len];
                session.read_request(answered, &again.options, &mut request);
                request
            });
            again.doubts += u32::from(started);
            self.queue.push_back(call.key);
        }
        session.release(answered);
        let (frames, bytes) = (again.frames, again.bytes);
        match verdict {
            Verdict::Resend => call.state.forget_frames(),
            Verdict::NotExecuted => call.state.end(IpcError::NotExecuted),
            Verdict::Lost => call.state.end(IpcError::ConnectionLost),
            Verdict::StreamLost => call.state.end(IpcError::StreamLost { frames, bytes }),
        }
        verdict != Verdict::Resend
    }
}

impl State {
    /// Frames of a session that is over cannot be read any more.
    fn forget_frames(&mut self) {
        if let Self::Frames(frames) = self {
            frames.clear();
        }
    }

    /// There will be no answer, or no more of it.
    fn end(&mut self, error: IpcError) {
        self.forget_frames();
        match self {
            Self::Whole(answer) => *answer = Some(Err(error)),
            Self::Frames(frames) => frames.push_back(Frame::Copied(Err(error), true)),
        }
    }
}

impl<T> Mux<T> {
    /// Whether there is no session now, but may be another one.
    pub fn is_away(&self) -> bool {
        self.client.is_none() && self.revival.is_some() && !self.is_broken()
    }

    /// Why the last session ended; told once.
    pub fn take_reason(&mut self) -> Option<IpcError> {
        self.revival.as_mut()?.reason.take()
    }

    /// A call that has come to an end without an answer.
    pub fn take_news(&mut self) -> Option<Key> {
        self.revival.as_mut()?.news.pop_front()
    }

    /// The session is over and all that it left has been taken. `Err` if there will be no other one.
    pub fn lose(&mut self, error: IpcError) -> Result<()> {
        let Some(revival) = self.revival.as_mut().filter(|_| is_loss(&error)) else { return Err(error) };
        kill_point!("client.session.lost");
        for call in self.calls.iter_mut().flatten() {
            // None is left: whoever waited for it would wait for ever.
            if call.id.take().is_some() {
                call.state.end(IpcError::ConnectionLost);
                revival.news.push_back(call.key);
            }
        }
        let begun = self.begun;
        let age = |key: &Key| std::cmp::Reverse(begun.wrapping_sub(key.begun()));
        revival.queue.make_contiguous().sort_by_key(age);
        revival.reason = Some(error);
        self.lines.iter_mut().flatten().for_each(|line| line.id = None);
        self.client = None;
        Ok(())
    }

    /// Sends again what there is room for.
    #[inline(always)]
    pub fn resend(&mut self) {
        if self.revival.as_ref().is_some_and(|revival| revival.is_sending()) {
            self.resend_queued();
        }
    }

    #[cold]
    fn resend_queued(&mut self) {
        let (Some(client), Some(revival)) = (&self.client, &mut self.revival) else { return };
        while let Some(key) = revival.queue.front().copied() {
            let call = self.calls.get_mut(key.index()).and_then(Option::as_mut).filter(|c| c.key == key);
            // Else nobody waits for it any more.
            if let Some(call) = call
                && let Some(again) = &mut call.again
            {
                let line = self.lines.get(again.line).and_then(|line| line.as_ref()?.id);
                let request = again.request.take().unwrap_or_default();
                let sent = match (line, again.options()) {
                    (None, _) => Err(IpcError::ConnectionClosed),
                    (_, None) => Err(IpcError::DeadlineExceeded),
                    (Some(line), Some(options)) => {
                        client.attached(line).submit(again.message_type, &request, &options)
                    }
                };
                match sent {
                    Ok(id) => {
                        kill_point!("client.call.resent");
                        call.id = Some(id);
                        let in_slot = client.session.borrow().keeps_request(request.len(), &again.options);
                        again.request = (!in_slot).then_some(request);
                    }
                    // There is no room now, or this session is over as well.
                    Err(error) if matches!(error, IpcError::WouldBlock) || ends_soon(&error) => {
                        again.request = Some(request);
                        return;
                    }
                    Err(error) => {
                        let error = again.given_up(error);
                        call.state.end(error);
                        revival.news.push_back(key);
                    }
                }
            }
            revival.queue.pop_front();
        }
    }

    /// When the first of the calls that wait to be sent again has to be started.
    pub fn expires_at(&self) -> Option<Instant> {
        let queue = &self.revival.as_ref()?.queue;
        let deadline = |key: &Key| self.calls.get(key.index())?.as_ref()?.again.as_ref()?.deadline;
        queue.iter().filter_map(deadline).min()
    }

    /// Ends those whose time to be started is over.
    pub fn expire(&mut self, now: Instant) {
        let (calls, Some(revival)) = (&mut self.calls, &mut self.revival) else { return };
        let Revival { queue, news, .. } = &mut **revival;
        queue.retain(|key| {
            let call = calls.get_mut(key.index()).and_then(Option::as_mut).filter(|call| call.key == *key);
            let Some((call, error)) = call.and_then(|call| {
                let again = call.again.as_ref().filter(|again| again.deadline.is_some_and(|at| at <= now))?;
                let error = again.given_up(IpcError::DeadlineExceeded);
                Some((call, error))
            }) else {
                return true;
            };
            call.state.end(error);
            news.push_back(*key);
            false
        });
    }

    /// The time of a call is over: forgets it, and says what its caller is told.
    pub fn give_up(&mut self, key: Key) -> IpcError {
        let call = self.calls.get(key.index()).and_then(Option::as_ref).filter(|c| c.key == key);
        let error = match call.map(|call| (call.id, &call.again)) {
            Some((None, Some(again))) => again.given_up(IpcError::NotExecuted),
            _ => IpcError::Timeout,
        };
        self.drop_call(key);
        error
    }

    /// Says that the answer of a call is not wanted. One that waits to be sent again is over with that.
    pub fn cancel(&mut self, key: Key) {
        let Some(call) = self.calls.get_mut(key.index()).and_then(Option::as_mut).filter(|c| c.key == key)
        else {
            return;
        };
        match (call.id, &self.client, &mut self.revival, &mut call.again) {
            (Some(id), Some(client), _, again) => {
                client.cancel(id);
                if let Some(again) = again {
                    again.cancelled = true;
                }
            }
            (None, _, Some(revival), Some(again)) if revival.queue.contains(&key) => {
                let error = again.given_up(IpcError::Cancelled);
                revival.queue.retain(|other| *other != key);
                call.state.end(error);
                revival.news.push_back(key);
            }
            _ => {}
        }
    }
}

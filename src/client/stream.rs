//! An answer read frame by frame while it comes, by a thread that blocks.

use super::call::{CallId, CallOptions, Reply};
use super::{Connection, IpcClient};
use crate::error::{IpcError, Result};
use crate::protocol::MessageType;
use crate::protocol::records::RecordReader;
use std::time::{Duration, Instant};

impl<'c> Connection<'c> {
    /// Sends `request` and returns its answer as a stream of frames, each handed out as it comes. The server sends more
    /// as frames are done with, so a reader that stops stops its own stream and nobody else's.
    ///
    /// [`CallOptions::timeout`] bounds each wait for a frame, and the wait for room to send the request;
    /// [`CallOptions::pieces`] is implied. Dropping the stream cancels the call.
    ///
    /// A thread that does not read the streams it has open may wait here for itself, if they hold all slots: a time-out
    /// bounds that, and [`Connection::submit`] answers [`IpcError::WouldBlock`] instead.
    ///
    /// ```no_run
    /// # use doorbell::{CallOptions, IpcClient, MessageType};
    /// # fn main() -> doorbell::Result<()> {
    /// let client = IpcClient::connect(doorbell::default_socket_path())?;
    /// let connection = client.open()?;
    /// let mut length = 0;
    /// for frame in connection.stream(MessageType::ECHO, &[7; 100_000], &CallOptions::default())? {
    ///     length += frame?.len();
    /// }
    /// assert_eq!(length, 100_000);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`Connection::call`] before the request is sent; what comes later is the last item of the stream.
    pub fn stream(
        &self,
        message_type: MessageType,
        request: &[u8],
        options: &CallOptions,
    ) -> Result<AnswerStream<'c>> {
        let options = &CallOptions { pieces: true, ..*options };
        let deadline = options.timeout.and_then(|t| Instant::now().checked_add(t));
        let (client, target) = (self.client, self.target());
        let id = client.retry_until(deadline, |session| {
            session.submit(target, message_type, request.len(), options, |writer| writer.write(request))
        })?;
        client.flush()?;
        Ok(AnswerStream { client, id, timeout: options.timeout, in_flight: true })
    }
}

/// The answer of a call, frame by frame: every byte of it in order, then either nothing more or, once, the error that
/// it ended with. Dropping it cancels the call.
#[derive(Debug)]
pub struct AnswerStream<'c> {
    client: &'c IpcClient,
    id: CallId,
    timeout: Option<Duration>,
    /// The end has not been taken.
    in_flight: bool,
}

impl<'c> AnswerStream<'c> {
    /// The call whose answer this is.
    pub fn id(&self) -> CallId {
        self.id
    }

    /// Waits for the next frame and hands it out where it lies, without a copy; `None` once the answer has ended. The
    /// server writes there again when the frame is dropped: whoever keeps frames has fewer of them under way, and
    /// whoever keeps all of them waits for ever.
    ///
    /// # Errors
    ///
    /// What the server answered, [`IpcError::Timeout`], or what became of the session. The stream is over then.
    pub fn next_frame(&mut self) -> Option<Result<Reply<'c>>> {
        while self.in_flight {
            let deadline = self.timeout.and_then(|t| Instant::now().checked_add(t));
            let answered = match self.client.wait_for_frame(self.id, deadline) {
                Ok(answered) => answered,
                Err(error) => {
                    self.give_up();
                    return Some(Err(error));
                }
            };
            let frame = Reply { client: self.client, answered };
            let result = frame.result();
            self.in_flight = !frame.is_last();
            match result {
                Ok(0) => {}
                Ok(_) => return Some(Ok(frame)),
                Err(error) => {
                    drop(frame);
                    self.give_up();
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Says that the rest is not wanted. The stream goes on to its end, which is [`IpcError::Cancelled`] unless the
    /// answer was complete before; whoever does not care drops it.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the kernel refuses the wake.
    pub fn cancel(&self) -> Result<()> {
        self.client.cancel(self.id);
        self.client.flush()
    }

    /// The same answer as [records](crate::protocol::records): what a streamed AI answer consists of.
    pub fn records(self) -> AnswerRecords<'c> {
        AnswerRecords { stream: self, frames: Splitter::default(), over: false }
    }

    /// Nobody wants what is still to come.
    fn give_up(&mut self) {
        if std::mem::take(&mut self.in_flight) {
            let Ok(mut session) = self.client.session() else { return };
            if let Err(error) = session.abandon(self.id) {
                // The cancel is published all the same; the server's sweep finds it.
                tracing::debug!(%error, "the server could not be woken for a cancel");
            }
            while let Some(answered) = session.take_kept(self.id.lane, self.id.slot) {
                session.release(&answered);
            }
        }
    }
}

impl Iterator for AnswerStream<'_> {
    type Item = Result<Vec<u8>>;

    /// The next frame in memory of its own.
    fn next(&mut self) -> Option<Self::Item> {
        let bytes = match self.next_frame()? {
            Ok(frame) => frame.to_vec(),
            Err(error) => Err(error),
        };
        if bytes.is_err() {
            self.give_up();
        }
        Some(bytes)
    }
}

impl std::iter::FusedIterator for AnswerStream<'_> {}

impl Drop for AnswerStream<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// The records of a streamed answer, in order, then either nothing more or, once, an error. Dropping it cancels the
/// call.
#[derive(Debug)]
pub struct AnswerRecords<'c> {
    stream: AnswerStream<'c>,
    frames: Splitter,
    over: bool,
}

impl AnswerRecords<'_> {
    /// The call whose answer this is.
    pub fn id(&self) -> CallId {
        self.stream.id()
    }

    /// As [`AnswerStream::cancel`].
    ///
    /// # Errors
    ///
    /// As for [`AnswerStream::cancel`].
    pub fn cancel(&self) -> Result<()> {
        self.stream.cancel()
    }

    /// Waits for the next record and puts it in `target` instead of what was there; `None` once the answer has ended.
    /// Allocates nothing as long as `target` has room.
    ///
    /// # Errors
    ///
    /// As for [`AnswerStream::next_frame`], and [`IpcError::Records`] for bytes that are no records.
    pub fn next_into(&mut self, target: &mut Vec<u8>) -> Option<Result<()>> {
        while !self.over {
            match self.step(target) {
                Ok(true) => return Some(Ok(())),
                Ok(false) => {}
                Err(error) => {
                    self.over = true;
                    self.stream.give_up();
                    return Some(Err(error));
                }
            }
        }
        None
    }

    /// Takes a record from the frame at hand, else gets another frame; says whether there is a record.
    fn step(&mut self, target: &mut Vec<u8>) -> Result<bool> {
        if self.frames.next_into(target)? {
            return Ok(true);
        }
        match self.stream.next_frame().transpose()? {
            Some(frame) => {
                let bytes = self.frames.refill();
                bytes.resize(frame.len(), 0);
                frame.copy_to(bytes)?;
            }
            None => {
                self.over = true;
                self.frames.finish()?;
            }
        }
        Ok(false)
    }
}

impl Iterator for AnswerRecords<'_> {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut record = Vec::new();
        self.next_into(&mut record).map(|result| result.map(|()| record))
    }
}

impl std::iter::FusedIterator for AnswerRecords<'_> {}

/// Frames in, records out.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    reader: RecordReader,
    frame: Vec<u8>,
    /// How much of the frame has been taken.
    at: usize,
}

impl Splitter {
    /// Puts the next record of the frame in `target`; `false` if another frame is needed.
    pub fn next_into(&mut self, target: &mut Vec<u8>) -> Result<bool> {
        let mut rest = &self.frame[self.at..];
        let Some(record) = self.reader.next(&mut rest)? else {
            self.at = self.frame.len();
            return Ok(false);
        };
        target.clear();
        target.extend_from_slice(record);
        self.at = self.frame.len() - rest.len();
        Ok(true)
    }

    /// Where the next frame goes.
    pub fn refill(&mut self) -> &mut Vec<u8> {
        self.at = 0;
        &mut self.frame
    }

    /// The answer has ended.
    pub fn finish(&self) -> Result<()> {
        self.reader.finish().map_err(IpcError::Records)
    }
}

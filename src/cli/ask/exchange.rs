//! One call whose answer is taken as it comes, and which an interrupt cancels.

use doorbell::codec::{Codec, Json};
use doorbell::messages::StreamChunk;
use doorbell::protocol::records::RecordReader;
use doorbell::{CallId, CallOptions, IpcClient, IpcError, MessageType};
use doorbell_shm::entry::codec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::SIGINT;
use std::collections::VecDeque;
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Ctrl-C, once; the second ends the program as ever.
pub struct Interrupt {
    bell: OwnedFd,
}

impl Interrupt {
    /// From now on the first interrupt is readable here.
    ///
    /// # Errors
    ///
    /// That of the kernel, if it gives no pipe.
    pub fn listen() -> std::io::Result<Self> {
        let (bell, end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        // In this order: the second interrupt finds the flag that the first has set.
        signal_hook::flag::register_conditional_default(SIGINT, seen.clone())?;
        signal_hook::flag::register(SIGINT, seen)?;
        signal_hook::low_level::pipe::register(SIGINT, end)?;
        Ok(Self { bell })
    }

    /// Whether it has come; said again and again.
    fn has_come(&self) -> Result<bool, Box<dyn Error>> {
        match poll(&mut [PollFd::new(&self.bell, PollFlags::IN)], Some(&Timespec::default())) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(format!("poll of the interrupt failed: {error}").into()),
        }
    }
}

/// A call under way.
pub struct Exchange<'c> {
    client: &'c IpcClient,
    id: CallId,
    records: RecordReader,
    codec: Json,
    /// Chunks that have come and have not been handed out.
    chunks: VecDeque<StreamChunk>,
    is_over: bool,
    is_cancelled: bool,
}

impl<'c> Exchange<'c> {
    /// Sends the request.
    pub fn begin(
        client: &'c IpcClient,
        message_type: MessageType,
        body: &[u8],
        options: &CallOptions,
    ) -> Result<Self, Box<dyn Error>> {
        if body.len() > client.max_message_size() {
            return Err(IpcError::MessageTooLarge(client.max_message_size()).into());
        }
        // Closed with the session, which ends with this program.
        let connection = client.attached(client.open_with(codec::JSON, false)?.detach());
        let options = CallOptions { pieces: true, ..*options };
        let id = connection.submit(message_type, body, &options)?;
        let (records, chunks) = (RecordReader::default(), VecDeque::new());
        let codec = Json::new();
        Ok(Self { client, id, records, codec, chunks, is_over: false, is_cancelled: false })
    }

    /// The next chunk, `None` after the last. An interrupt cancels the call, whose end then comes soon.
    pub fn next(&mut self, interrupt: &Interrupt) -> Result<Option<StreamChunk>, Box<dyn Error>> {
        loop {
            if let Some(chunk) = self.chunks.pop_front() {
                return Ok(Some(chunk));
            }
            if self.is_over {
                return Ok(None);
            }
            // However quickly more comes.
            if !self.is_cancelled && interrupt.has_come()? {
                self.cancel()?;
            }
            match self.take() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(_) if self.is_over && self.is_cancelled => return Ok(None),
                Err(error) => return Err(error),
            }
            let at_most = self.client.prepare_to_sleep()?;
            self.sleep(interrupt, at_most)?;
        }
    }

    /// Whether an interrupt ended it.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled
    }

    /// Takes what has come; whether that was anything.
    fn take(&mut self) -> Result<bool, Box<dyn Error>> {
        let Some(frame) = self.client.poll()? else { return Ok(false) };
        self.is_over = frame.is_last();
        frame.result()?;
        let bytes = frame.to_vec()?;
        drop(frame);
        let mut rest = &bytes[..];
        while let Some(record) = self.records.next(&mut rest)? {
            self.chunks.push_back(self.codec.decode_chunk(record)?);
        }
        if self.is_over {
            self.records.finish()?;
        }
        Ok(true)
    }

    /// Until something comes of the call, or an interrupt, or the client has something to do.
    fn sleep(&mut self, interrupt: &Interrupt, at_most: Option<Duration>) -> Result<(), Box<dyn Error>> {
        let at_most = at_most.map(Timespec::try_from).transpose()?;
        let mut both = [
            PollFd::new(self.client, PollFlags::IN | PollFlags::RDHUP),
            PollFd::from_borrowed_fd(interrupt.bell.as_fd(), PollFlags::IN),
        ];
        // Once is enough: after the first interrupt nobody looks at them any more.
        let watched = if self.is_cancelled { &mut both[..1] } else { &mut both[..] };
        match poll(watched, at_most.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(format!("poll of the session socket failed: {error}").into()),
        }
        Ok(())
    }

    fn cancel(&mut self) -> Result<(), Box<dyn Error>> {
        self.is_cancelled = true;
        self.client.cancel(self.id);
        Ok(self.client.flush()?)
    }
}

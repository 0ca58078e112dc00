//! The files that a reactor is reading for its clients: started, waiting for a buffer, ended, given up.

use super::analysis::FileFacts;
use super::error::FileError;
use super::read::FileRead;
use super::roots::Roots;
use crate::config::FILE_READS_MAX;
use crate::machine::Driver;
use crate::server::BufferPool;
use doorbell_uring::{Buffer, DriverError, Token};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Names a file being read, until it has ended: a number used again has another generation (S10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadId {
    /// Below [`FILE_READS_MAX`].
    pub index: u32,
    /// 28 bits, as many as a token has room for.
    pub generation: u32,
}

const GENERATION_MASK: u32 = (1 << 28) - 1;

/// A file that is not read any more, with what [`FileReads::begin`] was given to tell whose it was.
#[derive(Debug)]
pub struct Ended<T> {
    /// Whose.
    pub ticket: T,
    /// What was found.
    pub result: Result<FileFacts, FileError>,
    /// All of it, if it was to be kept and could be read.
    pub content: Option<Vec<u8>>,
}

/// The files that one reactor is reading. Each has one read in flight, or waits for a buffer of its class.
///
/// Every file that was begun ends exactly once: as what `begin` or `completed` returns, or by `give_up`.
#[derive(Debug)]
pub struct FileReads<T> {
    seats: Vec<Seat<T>>,
    free: Vec<u32>,
    /// Those without a buffer, the oldest first.
    waiting: VecDeque<ReadId>,
    token: fn(ReadId) -> Token,
}

#[derive(Debug)]
struct Seat<T> {
    generation: u32,
    reading: Option<Reading<T>>,
}

#[derive(Debug)]
struct Reading<T> {
    read: FileRead,
    file: Arc<OwnedFd>,
    ticket: T,
}

impl<T> FileReads<T> {
    /// No files. `token` makes the tokens by which the reactor finds its way back to [`FileReads::completed`].
    pub fn new(token: fn(ReadId) -> Token) -> Self {
        Self { seats: Vec::new(), free: Vec::new(), waiting: VecDeque::new(), token }
    }

    /// Files begun and not ended.
    pub fn len(&self) -> usize {
        self.seats.len() - self.free.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Files among them that wait for a buffer.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Opens a file and queues its first read, or lets it wait until a buffer is free. If it cannot be read it
    /// has ended at once.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if the ring is broken. A client cannot cause that.
    pub fn begin(
        &mut self,
        roots: &Roots,
        path: &Path,
        ticket: T,
        pool: &mut BufferPool,
        driver: &mut Driver,
    ) -> Result<Option<Ended<T>>, DriverError> {
        self.begin_keeping(roots, path, ticket, None, pool, driver)
    }

    /// The same; `keep`: the file's bytes are wanted, too, and there may be so many of them.
    ///
    /// # Errors
    ///
    /// As for [`FileReads::begin`].
    pub fn begin_keeping(
        &mut self,
        roots: &Roots,
        path: &Path,
        ticket: T,
        keep: Option<u64>,
        pool: &mut BufferPool,
        driver: &mut Driver,
    ) -> Result<Option<Ended<T>>, DriverError> {
        let refused = |ticket, error| Ok(Some(Ended { ticket, result: Err(error), content: None }));
        if self.len() >= FILE_READS_MAX {
            return refused(ticket, FileError::Busy { path: path.to_path_buf(), limit: FILE_READS_MAX });
        }
        let opened = match roots.open_file(path) {
            Ok(opened) => opened,
            Err(error) => return refused(ticket, error),
        };
        if let Some(limit) = keep.filter(|limit| opened.size > *limit) {
            return refused(ticket, FileError::TooLarge { path: opened.path, size: opened.size, limit });
        }
        let mut read = FileRead::new(opened.path, opened.size);
        if keep.is_some() {
            read = read.keeping();
        }
        let class = read.class();
        // One that waits for the same class comes first.
        let overtakes = |id: &ReadId| self.seat(*id).is_some_and(|reading| reading.read.class() == class);
        let buffer = match self.waiting.iter().any(overtakes) {
            true => None,
            false => match pool.buffer(class) {
                Ok(buffer) => buffer,
                Err(error) => return refused(ticket, no_memory(path, error)),
            },
        };
        let id = self.sit_down(Reading { read, file: opened.file, ticket });
        match buffer {
            Some(buffer) => self.queue(id, buffer, driver)?,
            None => self.waiting.push_back(id),
        }
        Ok(None)
    }

    /// A read has ended: to be called with the completion of a token made for `id`, before the next completion is
    /// taken from `driver`. That of a file given up is taken, too. Queues the next read of this file, and reads of
    /// those that wait if it has ended.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if the ring is broken.
    pub fn completed(
        &mut self,
        id: ReadId,
        result: Result<u32, Errno>,
        pool: &mut BufferPool,
        driver: &mut Driver,
    ) -> Result<Option<Ended<T>>, DriverError> {
        let buffer = driver.take_buffer();
        let ended = match (self.seat_mut(id), buffer) {
            (Some(reading), Some(buffer)) => match reading.read.came(result.map(|_| buffer.bytes())) {
                Ok(None) => {
                    self.queue(id, buffer, driver)?;
                    return Ok(None);
                }
                Ok(Some(facts)) => Some(Ok(facts)),
                Err(error) => Some(Err(error)),
            },
            // Its buffer was not taken in time, and went back to the pool.
            (Some(reading), None) => {
                let path = reading.read.path().to_path_buf();
                Some(Err(FileError::Os { path, call: "read", errno: result.err().unwrap_or(Errno::IO) }))
            }
            // Given up; the buffer goes back to the pool here.
            (None, _) => None,
        };
        let ended = ended.and_then(|result| {
            let Reading { mut read, ticket, .. } = self.stand_up(id)?;
            let content = read.take_content().filter(|_| result.is_ok());
            Some(Ended { ticket, result, content })
        });
        self.go_on(pool, driver)?;
        Ok(ended)
    }

    /// Queues reads of files that wait, as far as there are buffers. `completed` does this; to be called when
    /// buffers that others held were given back.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if the ring is broken.
    pub fn go_on(&mut self, pool: &mut BufferPool, driver: &mut Driver) -> Result<(), DriverError> {
        let mut next = 0;
        while let Some(id) = self.waiting.get(next).copied() {
            let Some(reading) = self.seat(id) else {
                self.waiting.remove(next);
                continue;
            };
            match pool.buffer(reading.read.class())? {
                Some(buffer) => {
                    self.waiting.remove(next);
                    self.queue(id, buffer, driver)?;
                }
                // Those behind it may wait for another class.
                None => next += 1,
            }
        }
        Ok(())
    }

    /// Gives up the files of these tickets, whose clients are gone or have cancelled; nothing more is heard of
    /// them. Their buffers go back to the pool when the kernel has let go of them.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if the ring is broken.
    pub fn give_up(
        &mut self,
        driver: &mut Driver,
        mut whose: impl FnMut(&T) -> bool,
    ) -> Result<(), DriverError> {
        for index in 0..self.seats.len() as u32 {
            let seat = &self.seats[index as usize];
            let id = ReadId { index, generation: seat.generation };
            if !seat.reading.as_ref().is_some_and(|reading| whose(&reading.ticket)) {
                continue;
            }
            self.stand_up(id);
            let before = self.waiting.len();
            self.waiting.retain(|waiting| *waiting != id);
            if self.waiting.len() == before {
                driver.cancel((self.token)(id))?;
            }
        }
        Ok(())
    }

    fn queue(&self, id: ReadId, buffer: Buffer, driver: &mut Driver) -> Result<(), DriverError> {
        let Some(reading) = self.seat(id) else { return Ok(()) };
        let want = reading.read.want();
        driver.read(Arc::clone(&reading.file), want.offset, want.len, buffer, (self.token)(id))
    }

    fn seat(&self, id: ReadId) -> Option<&Reading<T>> {
        let seat = self.seats.get(id.index as usize).filter(|seat| seat.generation == id.generation)?;
        seat.reading.as_ref()
    }

    fn seat_mut(&mut self, id: ReadId) -> Option<&mut Reading<T>> {
        let seat = self.seats.get_mut(id.index as usize).filter(|seat| seat.generation == id.generation)?;
        seat.reading.as_mut()
    }

    fn sit_down(&mut self, reading: Reading<T>) -> ReadId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Seat { generation: 0, reading: None });
            self.seats.len() as u32 - 1
        });
        let seat = &mut self.seats[index as usize];
        seat.reading = Some(reading);
        ReadId { index, generation: seat.generation }
    }

    fn stand_up(&mut self, id: ReadId) -> Option<Reading<T>> {
        let seat = self.seats.get_mut(id.index as usize).filter(|seat| seat.generation == id.generation)?;
        let reading = seat.reading.take()?;
        seat.generation = (seat.generation + 1) & GENERATION_MASK;
        self.free.push(id.index);
        Some(reading)
    }
}

fn no_memory(path: &Path, error: DriverError) -> FileError {
    let (call, errno) = match error {
        DriverError::Os { call, source } => (call, source),
        // Making a pool asks for memory and nothing else.
        DriverError::Reserved(_) | DriverError::Value(_) => ("mmap", Errno::NOMEM),
    };
    FileError::Os { path: path.to_path_buf(), call, errno }
}

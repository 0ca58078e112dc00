//! Reads in flight: each holds what the kernel may still touch, its file and its buffer, until it has ended.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::buffers::{Buffer, Staging};
use crate::op::Token;
use crate::ring::Ring;

/// One read that the kernel has, or will have with the next enter.
pub(crate) struct Read {
    /// What the caller calls it.
    pub(crate) token: Token,
    pub(crate) buffer: Buffer,
    /// Kept open: another file of the same number must not be read from instead.
    pub(crate) _file: Arc<OwnedFd>,
}

/// The reads in flight, by the number that their entries carry ([`Token::of_read`]).
#[derive(Default)]
pub(crate) struct Reads {
    places: Vec<Option<Read>>,
    free: Vec<u32>,
}

impl Reads {
    /// Keeps `read` until [`Reads::end`]; returns its number.
    pub(crate) fn begin(&mut self, read: Read) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            // Each has a buffer, and pools are small: 2^32 of them do not fit into memory.
            self.places.len() as u32 - 1
        });
        self.places[number as usize] = Some(read);
        number
    }

    /// The read of this number, which the kernel has ended.
    pub(crate) fn end(&mut self, number: u32) -> Option<Read> {
        let read = self.places.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(read)
    }

    /// The number of a read that the caller calls `token`.
    pub(crate) fn find(&self, token: Token) -> Option<u32> {
        self.numbers()
            .find(|number| self.places[*number as usize].as_ref().is_some_and(|read| read.token == token))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.places.len()
    }

    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.places).filter(|(_, read)| read.is_some()).map(|(number, _)| number)
    }

    /// Gives up what the kernel does not let go of: never freed, never used again.
    pub(crate) fn leak(&mut self) {
        for read in self.places.drain(..).flatten() {
            std::mem::forget(read);
        }
        self.free.clear();
    }
}

/// Which pool is registered with a ring: the first whose buffers are read into.
#[derive(Default)]
pub(crate) struct Registration {
    pool: Option<Staging>,
    refused: Option<Errno>,
    /// The refusal has not been told yet.
    untold: bool,
}

impl Registration {
    /// The number by which the ring knows `buffer`, registered now if need be; `None` for an ordinary read.
    ///
    /// A refusal is final: asking again would cost a system call per read and most likely be refused again.
    pub(crate) fn number(&mut self, buffer: &Buffer, ring: &Ring) -> Option<u16> {
        match &self.pool {
            Some(pool) if !buffer.is_of(pool) => return None,
            Some(_) if buffer.is_registered() => return Some(buffer.index()),
            _ if self.refused.is_some() => return None,
            Some(_) => {}
            None => {
                let pool = buffer.pool();
                if let Err(errno) = ring.register_table(pool.buffers()) {
                    return self.refuse(errno);
                }
                self.pool = Some(pool);
            }
        }
        if let Err(errno) = ring.register(buffer) {
            return self.refuse(errno);
        }
        buffer.set_registered();
        Some(buffer.index())
    }

    fn refuse(&mut self, errno: Errno) -> Option<u16> {
        self.refused = Some(errno);
        self.untold = true;
        None
    }

    /// The refusal, the first time that somebody asks after it (F40).
    pub(crate) fn take_refusal(&mut self) -> Option<Errno> {
        self.refused.filter(|_| std::mem::take(&mut self.untold))
    }

    pub(crate) fn is_of(&self, staging: &Staging) -> bool {
        self.pool.as_ref().is_some_and(|pool| pool.is(staging))
    }
}

impl Drop for Registration {
    /// The ring is about to be closed: to another ring the buffers are new.
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.forget_registrations();
        }
    }
}

//! What a reactor waits with in tests: the kernel's, or one that the simulated kernel answers.

use super::kernel::with_kernel;
use doorbell_uring::{
    Buffer, Completion, Counters, DriverError, Options, PollFlags, SetupError, Staging, Token, Wait,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Kind of token of a listening socket, at which nobody knocks in a simulation.
const LISTENER: u64 = 1;

/// A driver of the simulated kernel.
pub struct Simulated {
    node: usize,
    /// Where it gets mail.
    mailbox: OwnedFd,
    by_words: bool,
}

#[expect(
    clippy::large_enum_variant,
    reason = "there are few, each in its place for as long as its reactor lives"
)]
pub enum Driver {
    Kernel(doorbell_uring::Driver),
    Simulated(Simulated),
}

/// The kernel's does what it does; the other one does this.
macro_rules! either {
    ($self:ident, $driver:ident => $kernel:expr, $simulated:ident => $does:expr) => {
        match $self {
            Driver::Kernel($driver) => $kernel,
            Driver::Simulated($simulated) => $does,
        }
    };
}

impl Simulated {
    /// Another one; whether it can sleep on words.
    pub fn new(by_words: bool) -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let mailbox = eventfd(0, flags).expect("descriptors enough");
        let node = with_kernel(|kernel| kernel.add_node(mailbox.as_fd()));
        Self { node, mailbox, by_words }
    }

    pub fn node(&self) -> usize {
        self.node
    }
}

impl Driver {
    pub fn new(options: &Options) -> Result<Self, SetupError> {
        doorbell_uring::Driver::new(options).map(Self::Kernel)
    }

    pub fn epoll(mail: Token) -> Result<Self, DriverError> {
        doorbell_uring::Driver::epoll(mail).map(Self::Kernel)
    }

    pub fn waits_on_words(&self) -> bool {
        either!(self, driver => driver.waits_on_words(), simulated => simulated.by_words)
    }

    pub fn futex_wait(&mut self, word: &AtomicU32, expected: u32, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.futex_wait(word, expected, token), simulated => {
            if simulated.by_words {
                with_kernel(|kernel| kernel.futex_wait(simulated.node, word, expected, token));
            }
            Ok(())
        })
    }

    pub fn futex_wake(&mut self, word: &AtomicU32, count: u32) -> Result<(), DriverError> {
        either!(self, driver => driver.futex_wake(word, count), _simulated => {
            with_kernel(|kernel| kernel.futex_wake(word));
            Ok(())
        })
    }

    pub fn poll(&mut self, fd: BorrowedFd<'_>, events: PollFlags, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.poll(fd, events, token), simulated => {
            if token.0 >> 60 != LISTENER {
                with_kernel(|kernel| kernel.poll(simulated.node, fd, events, token));
            }
            Ok(())
        })
    }

    pub fn timeout(&mut self, at: Duration, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.timeout(at, token), simulated => {
            with_kernel(|kernel| kernel.timeout(simulated.node, at, token));
            Ok(())
        })
    }

    pub fn read(
        &mut self,
        file: Arc<OwnedFd>,
        offset: u64,
        len: usize,
        buffer: Buffer,
        token: Token,
    ) -> Result<(), DriverError> {
        either!(self, driver => driver.read(file, offset, len, buffer, token),
            _simulated => unreachable!("no file is read in a simulation"))
    }

    pub fn take_buffer(&mut self) -> Option<Buffer> {
        either!(self, driver => driver.take_buffer(), _simulated => None)
    }

    pub fn take_registration_refusal(&mut self) -> Option<Errno> {
        either!(self, driver => driver.take_registration_refusal(), _simulated => None)
    }

    pub fn forget(&mut self) {
        either!(self, driver => driver.forget(), _simulated => ())
    }

    pub fn trim(&mut self, staging: &Staging) -> Result<usize, DriverError> {
        // Nothing is registered with a simulated kernel.
        either!(self, driver => driver.trim(staging), _simulated => Ok(0))
    }

    pub fn cancel(&mut self, token: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.cancel(token), simulated => {
            with_kernel(|kernel| kernel.cancel(simulated.node, token));
            Ok(())
        })
    }

    pub fn msg_ring(&mut self, other: BorrowedFd<'_>, value: u32, there: Token) -> Result<(), DriverError> {
        either!(self, driver => driver.msg_ring(other, value, there), _simulated => {
            with_kernel(|kernel| kernel.send_mail(other, there));
            Ok(())
        })
    }

    pub fn pending(&self) -> bool {
        either!(self, driver => driver.pending(), simulated => {
            with_kernel(|kernel| kernel.has_come(simulated.node))
        })
    }

    pub fn enter(&mut self, wait: Wait) -> Result<(), DriverError> {
        either!(self, driver => driver.enter(wait), simulated => {
            if let Wait::Until(Some(at_most)) = wait {
                super::kernel::others_run_beside_reactor(at_most);
            }
            with_kernel(|kernel| kernel.enter(simulated.node));
            Ok(())
        })
    }

    pub fn next_completion(&mut self) -> Option<Completion> {
        either!(self, driver => driver.next_completion(), simulated => {
            with_kernel(|kernel| kernel.next_completion(simulated.node))
        })
    }

    pub fn counters(&self) -> Counters {
        either!(self, driver => driver.counters(), _simulated => Counters::default())
    }
}

impl AsFd for Driver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, driver => driver.as_fd(), simulated => simulated.mailbox.as_fd())
    }
}

//! How a running server is told something from outside: to stop, to stop at once, to take new limits. A byte in a pipe,
//! which a signal handler may write, too; the home reactor waits for it on its ring (F41).

use crate::config::{Movable, ServerConfig};
use crate::error::{IpcError, Result};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Stop, once what is under way has been finished. Any byte that is none of the others means the same.
const STOP: u8 = 1;
/// Stop, whatever is under way.
const STOP_NOW: u8 = 2;
/// There are new limits.
const RELOAD: u8 = 3;

/// Stops a server from outside. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ShutdownHandle {
    bell: Arc<OwnedFd>,
}

impl ShutdownHandle {
    /// Asks the server to take no more calls, to finish those under way, for
    /// [`drain_timeout`](ServerConfig::drain_timeout) at most, to take leave of its clients, and to return from
    /// [`BoundServer::serve`](crate::BoundServer::serve). Asked again, it waits for nothing any more.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the server has returned already.
    pub fn shutdown(&self) -> Result<()> {
        self.tell(STOP)
    }

    /// The same without waiting for calls that are under way: their callers are told that they are lost.
    ///
    /// # Errors
    ///
    /// [`IpcError::Io`] if the server has returned already.
    pub fn shutdown_now(&self) -> Result<()> {
        self.tell(STOP_NOW)
    }

    /// The writing end of a pipe: a byte written to it stops the server, which a signal handler may do.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.bell
    }

    fn tell(&self, what: u8) -> Result<()> {
        match rustix::io::write(&*self.bell, &[what]) {
            // A full pipe has been written to often enough.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(IpcError::io("write to the shutdown pipe", e)),
        }
    }
}

/// Gives a running server new limits. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ReloadHandle {
    shutdown: ShutdownHandle,
    limits: Sender<Movable>,
}

impl ReloadHandle {
    /// Has the server use those limits of `config` that can change while it runs: [`Movable`]. The others are not looked
    /// at.
    ///
    /// # Errors
    ///
    /// [`IpcError::Config`] for a limit out of range, and nothing changes; [`IpcError::Io`] if the server has returned.
    pub fn reload(&self, config: &ServerConfig) -> Result<()> {
        config.check()?;
        if self.limits.send(config.movable()).is_err() {
            return Err(IpcError::io("reload of a server that has returned", Errno::PIPE));
        }
        self.shutdown.tell(RELOAD)
    }
}

/// What the home reactor is told.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Orders {
    pub stop: bool,
    pub now: bool,
    /// The newest limits.
    pub limits: Option<Movable>,
}

/// The server's end.
#[derive(Debug)]
pub(crate) struct Control {
    bell: OwnedFd,
    limits: Receiver<Movable>,
}

impl Control {
    /// Both ends of it.
    pub fn new() -> Result<(Self, ShutdownHandle, ReloadHandle)> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|e| IpcError::io("pipe for the shutdown handle", e))?;
        let (sender, limits) = channel();
        let shutdown = ShutdownHandle { bell: Arc::new(write) };
        let reload = ReloadHandle { shutdown: shutdown.clone(), limits: sender };
        Ok((Self { bell: read, limits }, shutdown, reload))
    }

    /// Readable once there are orders.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// What has been ordered since this was last asked.
    pub fn orders(&self) -> Result<Orders> {
        let mut orders = Orders::default();
        let mut bytes = [0u8; 64];
        loop {
            match rustix::io::read(&self.bell, &mut bytes) {
                // Nobody is left who could tell anything: nobody ever will.
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(len) => {
                    for byte in &bytes[..len] {
                        // Asked twice, it waits no more.
                        orders.now |= *byte == STOP_NOW || (*byte != RELOAD && orders.stop);
                        orders.stop |= *byte != RELOAD;
                    }
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(IpcError::io("read of the shutdown pipe", e)),
            }
        }
        orders.limits = self.limits.try_iter().last();
        Ok(orders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Goal:   R4.7: each order is understood, several at once too, and none is heard twice.
    #[test]
    fn r4_7_orders_are_understood() {
        let (control, shutdown, reload) = Control::new().unwrap();
        assert_eq!(control.orders().unwrap(), Orders::default());
        shutdown.shutdown().unwrap();
        assert_eq!(control.orders().unwrap(), Orders { stop: true, ..Orders::default() });
        shutdown.shutdown_now().unwrap();
        assert_eq!(control.orders().unwrap(), Orders { stop: true, now: true, limits: None });
        shutdown.shutdown().unwrap();
        shutdown.shutdown().unwrap();
        assert!(control.orders().unwrap().now, "asked twice");
        let secs =
            |secs| ServerConfig { idle_timeout: Some(Duration::from_secs(secs)), ..ServerConfig::default() };
        reload.reload(&secs(7)).unwrap();
        reload.reload(&secs(8)).unwrap();
        let limits = Some(secs(8).movable());
        assert_eq!(control.orders().unwrap(), Orders { limits, ..Orders::default() });
        assert_eq!(control.orders().unwrap(), Orders::default());
        let wrong = ServerConfig { max_sessions: 0, ..ServerConfig::default() };
        assert!(matches!(reload.reload(&wrong), Err(IpcError::Config(_))));
        drop(control);
        assert!(shutdown.shutdown().is_err() && reload.reload(&secs(7)).is_err());
    }
}

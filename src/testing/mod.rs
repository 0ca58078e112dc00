//! For those who test programs that use doorbell: servers that are late, fail, hang, die and come back when the test says
//! so. Feature `testing`; nothing of it belongs in a program that is shipped.
//!
//! - [`TestServer`]: a server of the test's own handlers on a thread of the test, stopped and started again in order.
//! - [`TestProcess`]: a server in a process of its own, which can be killed and stopped like any other.
//! - [`Behaviour`]: what handlers do on demand instead of answering at once.
//!
//! Each has a socket path of its own, in a directory that is removed with it.
//!
//! ```
//! use doorbell::testing::{Behaviour, TestServer};
//! use doorbell::{Context, HandlerError, HandlerTable, IpcClient, IpcError, MessageType, Reply};
//!
//! const GREET: MessageType = MessageType::USER;
//!
//! fn greet(context: &Context<'_, Behaviour>, name: &[u8], reply: &mut Reply<'_>) -> Result<(), HandlerError> {
//!     context.state().pass()?;
//!     reply.write(b"hello ")?;
//!     reply.write(name)
//! }
//!
//! static TABLE: HandlerTable<Behaviour> = HandlerTable::with_builtins().on(GREET, greet);
//!
//! # fn main() -> doorbell::Result<()> {
//! let behaviour = Behaviour::default();
//! let server = TestServer::start(&TABLE, behaviour.clone())?;
//! let client = IpcClient::connect(server.path())?;
//! let connection = client.open()?;
//! assert_eq!(connection.call(GREET, b"world")?, b"hello world");
//! behaviour.fail(1);
//! assert!(matches!(connection.call(GREET, b"world"), Err(IpcError::Handler(_))));
//! assert_eq!(connection.call(GREET, b"again")?, b"hello again");
//! # Ok(())
//! # }
//! ```

mod behaviour;
mod process;
mod server;

pub use behaviour::Behaviour;
pub use process::{TestProcess, child_socket};
pub use server::TestServer;

use crate::error::{IpcError, Result};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A directory of one server's, removed with it.
#[derive(Debug)]
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let name = format!("doorbell-testing-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
            let path = std::env::temp_dir().join(name);
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                // Left by a process of the same number that was killed.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(IpcError::io("mkdir for a test's server", error)),
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.0.join("doorbell.sock")
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, "the directory of a test's server could not be removed");
        }
    }
}

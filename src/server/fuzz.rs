//! What the fuzz targets of `stress/fuzz` reach into. Under `cfg(fuzzing)` only: no part of the library.

pub use super::home::{Heard, hear};

use super::budget::Budget;
use super::core::{Core, Verdict};
use super::crew::Inbox;
use super::table::HandlerTable;
use crate::config::ServerConfig;
use crate::metrics::Totals;
use crate::protocol::handshake::Welcome;
use doorbell_shm::layout::Geometry;
use std::sync::Arc;

static TABLE: HandlerTable<()> = HandlerTable::empty();

/// A server's judgement of first messages, without the server.
pub struct Judge(Core<()>);

impl Judge {
    /// That of a server with these limits, and with one reactor if the number is left open.
    pub fn new(config: ServerConfig) -> Self {
        let config = ServerConfig { reactors: config.reactors.max(1), ..config };
        let budget = Budget::new(config.memory_budget);
        Self(Core::new(TABLE.as_slice(), Arc::new(()), config, Totals::new(0, 1), Inbox::default(), budget))
    }

    /// The same server once it is stopping.
    pub fn draining(mut self) -> Self {
        self.0.drain();
        self
    }

    /// The limits.
    pub fn config(&self) -> &ServerConfig {
        self.0.config()
    }

    /// What a first message deserves: a session of this geometry and an answer that lacks epoch and ids, or an answer
    /// that refuses.
    pub fn judge(&self, hello: &[u8], now_ns: u64) -> Result<(Geometry, Welcome), Welcome> {
        match self.0.judge(hello, now_ns) {
            Verdict::Grant(geometry, welcome) => Ok((geometry, *welcome)),
            Verdict::Refuse(welcome) => Err(*welcome),
        }
    }
}

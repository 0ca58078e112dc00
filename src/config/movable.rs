//! The limits that can change while a server runs: what no table was sized by, no client was told, and no thread was
//! started for.

use super::ServerConfig;
use std::time::Duration;

macro_rules! movable {
    ($($name:ident: $kind:ty,)*) => {
        /// The limits that a running server can be given anew; see [`ServerConfig`] for what they mean.
        ///
        /// A server never has more sessions than it was started for: a larger `max_sessions` counts as that.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(missing_docs, reason = "they are those of ServerConfig")]
        pub struct Movable { $(pub $name: $kind,)* }

        impl Movable {
            /// Their names.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];
        }

        impl ServerConfig {
            /// Those of its limits that can change while a server runs.
            pub fn movable(&self) -> Movable {
                Movable { $($name: self.$name,)* }
            }

            /// Takes these limits over.
            pub fn adopt(&mut self, limits: &Movable) {
                $(self.$name = limits.$name;)*
            }
        }
    };
}

movable! {
    max_sessions: u32,
    max_sessions_per_process: u32,
    entries_per_turn: u32,
    bytes_per_turn: u64,
    turn_time: Duration,
    storm_patience: Duration,
    default_deadline: Option<Duration>,
    idle_timeout: Option<Duration>,
    slow_consumer_timeout: Option<Duration>,
    drain_timeout: Duration,
}

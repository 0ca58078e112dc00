//! What a configuration file that is read again asks for, and what of it a running server can take.

use super::Movable;
use super::keys::{Ipc, KEYS};

/// Which keys of the section `ipc` have another value than before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that a running server takes.
    pub taken: Vec<&'static str>,
    /// Those that hold from the next start on.
    pub later: Vec<&'static str>,
}

/// Compares what a server runs with and what a file says now.
pub fn changes(now: &Ipc, wanted: &Ipc) -> Changes {
    // A key leads to its field by a mutable borrow, which serves for reading and writing.
    let (mut now, mut wanted) = (now.clone(), wanted.clone());
    let mut changes = Changes::default();
    for key in KEYS {
        if (key.field)(&mut now).to_toml() != (key.field)(&mut wanted).to_toml() {
            let of = if is_movable(key.name) { &mut changes.taken } else { &mut changes.later };
            of.push(key.name);
        }
    }
    changes
}

/// Whether a running server takes a new value of this key. Its name is that of a limit, with its unit if it has one.
fn is_movable(key: &str) -> bool {
    let is_it =
        |limit: &str| key.strip_prefix(limit).is_some_and(|unit| ["", "_secs", "_ms", "_us"].contains(&unit));
    key == "log_level" || Movable::NAMES.iter().any(|limit| is_it(limit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Goal:   R4.7: what is different is told apart by whether it can be taken.
    #[test]
    fn r4_7_changes_are_told_apart() {
        let now = Ipc::default();
        let mut wanted = now.clone();
        assert_eq!(changes(&now, &wanted), Changes::default());
        wanted.server.idle_timeout = None;
        wanted.server.turn_time = Duration::from_micros(77);
        wanted.server.max_sessions_per_process = 3;
        wanted.server.max_connections = 7;
        wanted.socket_path = Some("/run/x".into());
        let Changes { taken, later } = changes(&now, &wanted);
        assert_eq!(taken, ["max_sessions_per_process", "turn_time_us", "idle_timeout_secs"]);
        assert_eq!(later, ["socket_path", "max_connections"]);
    }

    /// Goal:   R4.7: every limit that can change has a key.
    #[test]
    fn r4_7_every_movable_limit_has_a_key() {
        let keys = KEYS.iter().filter(|key| is_movable(key.name)).count();
        assert_eq!(keys, Movable::NAMES.len() + 1, "and the log level");
    }
}

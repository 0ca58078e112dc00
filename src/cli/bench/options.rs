//! What `doorbell bench` can be asked, and what it refuses.

use super::error::BenchError;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Slots of the largest class, bytes: longer bodies need frames.
const SLOT_MAX: usize = 16 << 10;
/// The largest payload of the floor, bytes.
pub const FLOOR_SIZE_MAX: usize = 64 << 10;
/// The largest payload of the unix-socket peer, bytes.
const UDS_SIZE_MAX: usize = 1 << 20;

/// How each side waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Ring the reactor of the own core and sleep.
    Handoff,
    /// Poll, never sleep.
    Spin,
    /// Sleep in the kernel.
    Block,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerKind {
    /// This transport.
    Doorbell,
    /// A unix-socket echo with the same work and checks.
    Uds,
    /// One ring each way between two processes, nothing else.
    Floor,
}

/// Which cores server and clients are pinned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// The server on the first allowed core, clients on the second (further client processes on further ones).
    Apart,
    /// All on the first allowed core.
    Same,
    /// Wherever the scheduler likes.
    Unpinned,
}

/// Measure calls against a server process of its own, every byte of every answer checked.
#[derive(Debug, Clone, Args)]
pub struct BenchOptions {
    /// Connections in all, spread evenly over the sessions.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub connections: usize,
    /// Sessions in all, spread evenly over the client processes.
    #[arg(long, value_name = "M", default_value_t = 1)]
    pub sessions: usize,
    /// Client processes.
    #[arg(long, value_name = "P", default_value_t = 1)]
    pub processes: usize,
    /// Calls in flight on each connection.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub in_flight: usize,
    /// Bytes of each request and of each answer.
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    pub size: usize,
    /// Pause between an answer and the next request of that call, microseconds.
    #[arg(long, value_name = "T", default_value_t = 0)]
    pub think_us: u64,
    /// Requests per second in all, sent when due whether answers came or not; without it, as fast as answers come.
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// Length of the measured window, seconds; a warm-up precedes it.
    #[arg(long, value_name = "S", default_value_t = 3.0)]
    pub seconds: f64,
    /// How both sides wait.
    #[arg(long, value_enum, default_value_t = Policy::Spin)]
    pub policy: Policy,
    /// What is measured.
    #[arg(long, value_enum, default_value_t = PeerKind::Doorbell)]
    pub peer: PeerKind,
    /// Which cores server and clients are pinned to.
    #[arg(long, value_enum, default_value_t = Placement::Apart)]
    pub placement: Placement,
    /// Reactors of the server.
    #[arg(long, value_name = "R", default_value_t = 1)]
    pub reactors: usize,
    /// Connect, send nothing for the whole window, and report what idling costs.
    #[arg(long)]
    pub idle: bool,
    /// Connect, report time and memory, send nothing.
    #[arg(long)]
    pub connect_only: bool,
    /// Measure the server that listens at PATH (it must have the bench handler) instead of starting one.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl BenchOptions {
    /// Calls in flight in all.
    pub fn total_in_flight(&self) -> usize {
        self.connections * self.in_flight
    }

    /// Whether the floor is measured too: it has no pacing, and slots up to a limit.
    pub fn wants_floor(&self) -> bool {
        self.size <= FLOOR_SIZE_MAX && self.rate.is_none() && !self.connect_only && !self.idle
    }

    /// Refuses what cannot be meant and what is not honoured.
    ///
    /// # Errors
    ///
    /// [`BenchError::Option`] or [`BenchError::NotHonoured`], naming the option.
    pub fn validate(&self) -> Result<(), BenchError> {
        self.check_not_honoured_yet()?;
        self.check_counts()?;
        self.check_pace()?;
        self.check_peer()
    }

    /// Options that are known but do nothing yet. Whoever makes one work deletes its line here.
    fn check_not_honoured_yet(&self) -> Result<(), BenchError> {
        let doorbell = self.peer == PeerKind::Doorbell;
        let refused = [
            (self.policy == Policy::Handoff, "policy", "handoff".to_owned()),
            (self.reactors != 1, "reactors", self.reactors.to_string()),
            (self.idle, "idle", String::new()),
            (doorbell && self.size > SLOT_MAX, "size", format!("{} (above {SLOT_MAX})", self.size)),
        ];
        for (asked, option, value) in refused {
            if asked {
                return Err(BenchError::NotHonoured { option, value });
            }
        }
        Ok(())
    }

    fn check_counts(&self) -> Result<(), BenchError> {
        let counts = [
            ("connections", self.connections),
            ("sessions", self.sessions),
            ("processes", self.processes),
            ("in-flight", self.in_flight),
            ("size", self.size),
        ];
        if let Some((option, _)) = counts.iter().find(|(_, n)| *n == 0) {
            return Err(BenchError::option(option, "must be at least 1"));
        }
        if self.sessions > self.connections {
            let reason =
                format!("{} sessions for {} connections: each needs one", self.sessions, self.connections);
            return Err(BenchError::option("sessions", reason));
        }
        if self.processes > self.sessions {
            let reason =
                format!("{} processes for {} sessions: each needs one", self.processes, self.sessions);
            return Err(BenchError::option("processes", reason));
        }
        match self.connections.checked_mul(self.in_flight) {
            Some(total) if total <= 1 << 20 => Ok(()),
            _ => Err(BenchError::option("in-flight", "more than 1048576 calls in flight in all")),
        }
    }

    fn check_pace(&self) -> Result<(), BenchError> {
        if !(self.seconds > 0.0 && self.seconds <= 86_400.0) {
            return Err(BenchError::option("seconds", "must be above 0 and at most a day"));
        }
        if self.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e9)) {
            return Err(BenchError::option("rate", "must be above 0 and at most 1e9"));
        }
        if self.rate.is_some() && self.think_us > 0 {
            return Err(BenchError::option("think-us", "has no meaning with --rate, which sends when due"));
        }
        if self.idle && self.connect_only {
            return Err(BenchError::option("idle", "and --connect-only exclude each other"));
        }
        Ok(())
    }

    fn check_peer(&self) -> Result<(), BenchError> {
        let limit = match self.peer {
            PeerKind::Doorbell => usize::MAX,
            PeerKind::Uds => UDS_SIZE_MAX,
            PeerKind::Floor => FLOOR_SIZE_MAX,
        };
        if self.size > limit {
            return Err(BenchError::option("size", format!("this peer takes at most {limit} bytes")));
        }
        if self.peer != PeerKind::Doorbell && self.socket.is_some() {
            return Err(BenchError::option(
                "socket",
                "belongs to --peer doorbell: other peers start their own server",
            ));
        }
        if self.peer == PeerKind::Floor {
            self.check_floor()?;
        }
        Ok(())
    }

    /// The floor is one client process that polls one ring pair as fast as it goes.
    fn check_floor(&self) -> Result<(), BenchError> {
        let refused = [
            (self.policy != Policy::Spin, "policy"),
            (self.processes != 1, "processes"),
            (self.rate.is_some(), "rate"),
            (self.think_us != 0, "think-us"),
            (self.connect_only, "connect-only"),
        ];
        match refused.iter().find(|(asked, _)| *asked) {
            Some((_, option)) => Err(BenchError::option(
                option,
                "has no meaning with --peer floor: it polls, unpaced, from one process",
            )),
            None => Ok(()),
        }
    }
}

/// Part `index` of `total` things split into `parts`: sizes differ by one at most, larger parts first.
pub fn share(total: usize, parts: usize, index: usize) -> usize {
    total / parts + usize::from(index < total % parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchOptions,
    }

    fn parse(line: &str) -> BenchOptions {
        Cli::try_parse_from(std::iter::once("bench").chain(line.split_whitespace())).unwrap().bench
    }

    fn refusal(line: &str) -> String {
        parse(line).validate().unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_valid() {
        parse("").validate().unwrap();
        parse("--peer uds --policy block --connections 1000 --sessions 1000").validate().unwrap();
        parse("--peer floor --size 65536 --in-flight 64").validate().unwrap();
    }

    #[test]
    fn what_is_not_honoured_yet_is_refused_by_name() {
        for (line, name) in [
            ("--policy handoff", "--policy handoff"),
            ("--reactors 2", "--reactors 2"),
            ("--idle", "--idle"),
            ("--size 16385", "--size 16385"),
        ] {
            let refusal = refusal(line);
            assert!(refusal.contains(name) && refusal.contains("not honoured"), "{refusal}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name() {
        for (line, name) in [
            ("--connections 0", "connections"),
            ("--sessions 2", "sessions"),
            ("--connections 4 --sessions 2 --processes 3", "processes"),
            ("--in-flight 0", "in-flight"),
            ("--size 0", "size"),
            ("--seconds 0", "seconds"),
            ("--seconds NaN", "seconds"),
            ("--rate 0", "rate"),
            ("--rate 100 --think-us 5", "think-us"),
            ("--connections 1000000 --in-flight 1000000", "in-flight"),
            ("--peer floor --rate 100", "rate"),
            ("--peer floor --policy block", "policy"),
            ("--peer floor --size 65537", "size"),
            ("--peer uds --socket /run/x", "socket"),
        ] {
            let refusal = refusal(line);
            assert!(refusal.starts_with(&format!("--{name}")), "{line}: {refusal}");
        }
    }

    #[test]
    fn shares_add_up_and_differ_by_one_at_most() {
        for (total, parts) in [(10, 3), (1000, 7), (5, 5), (4, 1)] {
            let shares: Vec<usize> = (0..parts).map(|i| share(total, parts, i)).collect();
            assert_eq!(shares.iter().sum::<usize>(), total);
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }
    }

    #[test]
    fn the_floor_is_left_out_where_it_means_nothing() {
        assert!(parse("").wants_floor());
        for line in ["--rate 10", "--connect-only", "--peer uds --size 65537"] {
            assert!(!parse(line).wants_floor(), "{line}");
        }
    }
}

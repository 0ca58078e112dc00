//! What `doorbell bench` can be asked, and what it refuses.

use super::error::BenchError;
use super::floor_long::BODIES_MAX;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Slots of the largest class, bytes: longer bodies pass in frames.
pub const SLOT_MAX: usize = 16 << 10;
/// The longest body, bytes.
const SIZE_MAX: usize = 10 << 20;

/// Silent sockets: a thousand processes of four.
const HALF_OPEN_MAX: usize = 4000;

/// More reactors than any machine has cores.
const REACTORS_MAX: usize = 1024;

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
    /// Wherever the scheduler likes, but for the reactors of handoff, which stay one on each core.
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
    /// Bytes of each request and of each answer, up to 10485760; beyond 16384 they pass in frames, in a closed loop.
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    pub size: usize,
    /// Pause between an answer and the next request of that call, microseconds.
    #[arg(long, value_name = "T", default_value_t = 0)]
    pub think_us: u64,
    /// Pauses of random length, evenly spread between 0 and twice `--think-us`, instead of all alike.
    #[arg(long)]
    pub think_random: bool,
    /// Where --think-random starts [default: taken from the clock, and reported].
    #[arg(long, value_name = "N")]
    pub seed: Option<u32>,
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
    /// Reactors of the server; 0 means one for every core that it may use [default: 0 with handoff, else 1].
    #[arg(long, value_name = "R")]
    pub reactors: Option<usize>,
    /// Keep one busy process on every allowed core while the load runs.
    #[arg(long)]
    pub hogs: bool,
    /// Measure one interactive call of BYTES, always in flight, beside the load, whose connections are then bulk.
    #[arg(long, value_name = "BYTES")]
    pub probe: Option<usize>,
    /// Run the probe in a process of its own instead of the load's event loop.
    #[arg(long)]
    pub probe_process: bool,
    /// Memory budget of the server, bytes [default: 3 MiB, more if the sessions' base slots need it].
    #[arg(long, value_name = "BYTES")]
    pub memory_budget: Option<u64>,
    /// Connect, send nothing for the whole window, and report what idling costs.
    #[arg(long)]
    pub idle: bool,
    /// Connect, report time and memory, send nothing.
    #[arg(long)]
    pub connect_only: bool,
    /// With --connect-only: N sockets, of processes of four, that connect before the clients do, say nothing, and
    /// connect again whenever they are sent away.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub half_open: usize,
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

    /// Reactors asked for, 0 for one on every core. Handing a core over needs a reactor there; the other
    /// policies are compared with the floor, which has one thread.
    pub fn reactors(&self) -> usize {
        self.reactors.unwrap_or(if self.policy == Policy::Handoff { 0 } else { 1 })
    }

    /// Whether calls pass in frames.
    pub fn is_long(&self) -> bool {
        self.size > SLOT_MAX
    }

    /// Whether the floor is measured too: it has no pacing.
    pub fn wants_floor(&self) -> bool {
        self.rate.is_none() && !self.connect_only && !self.idle
    }

    /// Refuses what cannot be meant.
    ///
    /// # Errors
    ///
    /// [`BenchError::Option`], naming the option.
    pub fn validate(&self) -> Result<(), BenchError> {
        self.check_counts()?;
        self.check_sizes()?;
        self.check_pace()?;
        self.check_beside()?;
        self.check_peer()
    }

    fn check_counts(&self) -> Result<(), BenchError> {
        let counts = [
            ("connections", self.connections),
            ("sessions", self.sessions),
            ("processes", self.processes),
            ("in-flight", self.in_flight),
            ("size", self.size),
            ("probe", self.probe.unwrap_or(1)),
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
        if self.reactors() > REACTORS_MAX {
            return Err(BenchError::option("reactors", format!("must be at most {REACTORS_MAX}")));
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
        if self.think_random && self.think_us == 0 {
            return Err(BenchError::option("think-random", "needs --think-us: the mean of the pauses"));
        }
        if self.seed.is_some() && !self.think_random {
            return Err(BenchError::option("seed", "belongs to --think-random: nothing else is random"));
        }
        if self.idle && self.connect_only {
            return Err(BenchError::option("idle", "and --connect-only exclude each other"));
        }
        if self.idle && (self.rate.is_some() || self.think_us > 0) {
            let option = if self.rate.is_some() { "rate" } else { "think-us" };
            return Err(BenchError::option(option, "has no meaning with --idle, which sends nothing"));
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), BenchError> {
        if self.size > SIZE_MAX {
            return Err(BenchError::option("size", format!("must be at most {SIZE_MAX} bytes")));
        }
        if self.probe.is_some_and(|size| size > SLOT_MAX) {
            let reason = format!("is one interactive call of one frame: at most {SLOT_MAX} bytes");
            return Err(BenchError::option("probe", reason));
        }
        let paced = [(self.rate.is_some(), "rate"), (self.think_us > 0, "think-us")];
        match paced.iter().find(|(asked, _)| *asked && self.is_long()) {
            Some((_, option)) => {
                let reason =
                    format!("needs calls of one frame: bodies beyond {SLOT_MAX} bytes go in a closed loop");
                Err(BenchError::option(option, reason))
            }
            None => Ok(()),
        }
    }

    /// What goes on beside the load.
    fn check_beside(&self) -> Result<(), BenchError> {
        if self.probe_process && self.probe.is_none() {
            return Err(BenchError::option("probe-process", "needs --probe: the size of its calls"));
        }
        if self.memory_budget.is_some() && self.socket.is_some() {
            return Err(BenchError::option(
                "memory-budget",
                "of the server at --socket was chosen where it started",
            ));
        }
        if self.probe.is_some() && (self.idle || self.connect_only) {
            return Err(BenchError::option("probe", "needs a load: leave out --idle and --connect-only"));
        }
        if self.hogs && self.connect_only {
            return Err(BenchError::option("hogs", "has no meaning with --connect-only: no load runs"));
        }
        if self.half_open > 0 && !self.connect_only {
            return Err(BenchError::option(
                "half-open",
                "needs --connect-only: it is connecting that they disturb",
            ));
        }
        if self.half_open > HALF_OPEN_MAX {
            return Err(BenchError::option("half-open", format!("must be at most {HALF_OPEN_MAX}")));
        }
        if self.reactors.is_some() && self.socket.is_some() {
            return Err(BenchError::option(
                "reactors",
                "of the server at --socket were chosen where it started",
            ));
        }
        Ok(())
    }

    fn check_peer(&self) -> Result<(), BenchError> {
        if self.peer != PeerKind::Doorbell {
            self.check_other_peers()?;
        }
        if self.peer == PeerKind::Floor {
            self.check_floor()?;
        }
        Ok(())
    }

    /// What only this transport has.
    fn check_other_peers(&self) -> Result<(), BenchError> {
        let refused = [
            (self.socket.is_some(), "socket", "other peers start their own server"),
            (self.reactors.is_some(), "reactors", "other peers have none"),
            (self.memory_budget.is_some(), "memory-budget", "other peers have none"),
            (self.probe.is_some(), "probe", "other peers know no interactive and bulk connections"),
            (self.half_open > 0, "half-open", "other peers have no handshake"),
        ];
        if let Some((_, option, why)) = refused.iter().find(|(asked, ..)| *asked) {
            return Err(BenchError::option(option, format!("belongs to --peer doorbell: {why}")));
        }
        if self.peer == PeerKind::Uds && self.policy == Policy::Handoff {
            let reason = "handoff needs a reactor on the caller's core, which --peer uds has not: take block";
            return Err(BenchError::option("policy", reason));
        }
        Ok(())
    }

    /// The floor is one client process that polls one ring pair as fast as it goes.
    fn check_floor(&self) -> Result<(), BenchError> {
        let refused = [
            (self.policy != Policy::Spin, "policy"),
            (self.processes != 1, "processes"),
            (self.sessions != 1, "sessions"),
            (self.rate.is_some(), "rate"),
            (self.think_us != 0, "think-us"),
            (self.connect_only, "connect-only"),
            (self.idle, "idle"),
        ];
        if let Some((_, option)) = refused.iter().find(|(asked, _)| *asked) {
            let reason = "has no meaning with --peer floor: it polls, unpaced, from one process";
            return Err(BenchError::option(option, reason));
        }
        if self.is_long() && self.total_in_flight() > BODIES_MAX {
            let reason = format!("the floor carries at most {BODIES_MAX} long bodies at once");
            return Err(BenchError::option("connections", reason));
        }
        Ok(())
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
        parse("--policy handoff --think-us 1000 --think-random --seed 7 --hogs").validate().unwrap();
        parse("--policy handoff --idle --connections 1000 --sessions 1000").validate().unwrap();
        parse("--connections 999 --size 4096 --probe 1024").validate().unwrap();
        parse("--connections 100 --size 1048576 --probe 1024 --probe-process").validate().unwrap();
        parse("--size 10485760 --memory-budget 4000000 --connect-only").validate().unwrap();
        parse("--peer uds --size 10485760 --policy block --connections 3").validate().unwrap();
        parse("--peer floor --size 10485760 --connections 4").validate().unwrap();
        parse("--policy block --connections 4 --sessions 4 --processes 4").validate().unwrap();
        parse("--connect-only --connections 1000 --sessions 1000 --half-open 200").validate().unwrap();
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
            ("--size 10485761", "size"),
            ("--peer uds --size 10485761", "size"),
            ("--peer floor --size 10485761", "size"),
            ("--peer floor --size 16385 --connections 129", "connections"),
            ("--peer floor --connections 2 --sessions 2", "sessions"),
            ("--size 16385 --rate 10", "rate"),
            ("--size 16385 --think-us 10", "think-us"),
            ("--probe 16385", "probe"),
            ("--probe-process", "probe-process"),
            ("--socket /run/x --memory-budget 5000000", "memory-budget"),
            ("--peer uds --memory-budget 5000000", "memory-budget"),
            ("--peer uds --socket /run/x", "socket"),
            ("--peer uds --policy handoff", "policy"),
            ("--peer uds --reactors 2", "reactors"),
            ("--peer uds --probe 64", "probe"),
            ("--peer floor --probe 64", "probe"),
            ("--peer floor --idle", "idle"),
            ("--reactors 1025", "reactors"),
            ("--socket /run/x --reactors 1", "reactors"),
            ("--probe 0", "probe"),
            ("--probe 64 --idle", "probe"),
            ("--probe 64 --connect-only", "probe"),
            ("--hogs --connect-only", "hogs"),
            ("--think-random", "think-random"),
            ("--rate 100 --think-random", "think-random"),
            ("--seed 5", "seed"),
            ("--idle --rate 5", "rate"),
            ("--idle --think-us 5", "think-us"),
            ("--idle --connect-only", "idle"),
            ("--half-open 4", "half-open"),
            ("--connect-only --half-open 4001", "half-open"),
            ("--connect-only --peer uds --half-open 4", "half-open"),
        ] {
            let refusal = refusal(line);
            assert!(refusal.starts_with(&format!("--{name}")), "{line}: {refusal}");
        }
    }

    #[test]
    fn handoff_has_a_reactor_on_every_core_unless_told_otherwise() {
        for (line, reactors) in [
            ("", 1),
            ("--policy block", 1),
            ("--policy handoff", 0),
            ("--policy handoff --reactors 1", 1),
            ("--reactors 0", 0),
        ] {
            assert_eq!(parse(line).reactors(), reactors, "{line}");
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
        assert!(parse("").wants_floor() && parse("--size 10485760").wants_floor());
        for line in ["--rate 10", "--connect-only", "--idle"] {
            assert!(!parse(line).wants_floor(), "{line}");
        }
    }
}

//! The command line. Results go to stdout, everything else to stderr; exit status 0 means that everything
//! passed, 1 that something failed or could not be run, 2 that the question was wrong.

use crate::error::StressError;
use crate::gallery::{self, GalleryOptions};
use crate::kills::{self, KillsOptions};
use crate::machine::{Cores, Machine};
use crate::points::{self, PointsOptions};
use crate::processes::{self, ChildOptions};
use crate::reclaim::{self, ReclaimOptions};
use crate::reconnect::{self, ReconnectOptions};
use crate::report::Report;
use crate::scratch;
use crate::soak::{self, SoakOptions};
use crate::without::{self, WithoutOptions};
use crate::{level1, level2, level3, level4, level5};
use clap::{Args, Parser, Subcommand};
use std::io::IsTerminal;
use std::process::ExitCode;

/// Length of a window with `--short` and `--full`, seconds.
const SHORT: f64 = 5.0;
const FULL: f64 = 300.0;
/// The shortest window and the longest, a day.
const SECONDS_MIN: f64 = 0.05;
const SECONDS_MAX: f64 = 86_400.0;
/// Random seeds have so many bits: whole numbers that every JSON reader keeps.
const SEED_BITS: u32 = 48;

/// The stress levels of doorbell: real processes, every byte of every answer verified, a verdict.
#[derive(Debug, Parser)]
#[command(
    name = "doorbell-stress",
    version,
    about,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(flatten)]
    suite: SuiteOptions,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How soon many clients are back after their server was killed and started again.
    Reconnect(ReconnectOptions),
    /// A process of a level.
    #[command(name = processes::SUBCOMMAND, hide = true)]
    Child(ChildOptions),
    /// Hostile clients one after the other, while one that means well is measured.
    Gallery(GalleryOptions),
    /// Clients killed at random moments, while one that means well calls on.
    Kills(KillsOptions),
    /// How soon a server holds nothing of a client that was killed.
    Reclaim(ReclaimOptions),
    /// Every labelled point of client and server, suffered by real processes (built with `--features kill-points`).
    KillPoints(PointsOptions),
    /// Chaos for long against one server, and whether it comes to hold more and more.
    Soak(SoakOptions),
    #[command(name = "without-io-uring")]
    Without(WithoutOptions),
}

#[derive(Debug, Clone, PartialEq, Args)]
struct SuiteOptions {
    /// The level: connections (or 1), memory (2), latency (3), leaks (4), chaos (5), or all.
    #[arg(required = true, value_parser = parse_level)]
    level: Option<Level>,
    /// The short duration: a window of 5 s in each row of level 1, 40 of the 500 rounds of level 2, 8.5 s of level 3, 6 of
    /// the 120 cycles of level 4, 28 s of level 5.
    #[arg(long, required_unless_present = "full", conflicts_with = "full")]
    short: bool,
    /// The full duration: a window of 300 s in each row of level 1, all calls of level 2, 600 s of level 3, all cycles of
    /// level 4, 1800 s of level 5.
    #[arg(long)]
    full: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Seed of every content that is sent; random and printed unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Levels 1, 3 and 5: another length of the window, seconds; may be a fraction.
    #[arg(long, value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Level 2: another number of calls of 1 MiB on each connection; those of 4 KiB are twice as many.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rounds: Option<u64>,
    /// Level 4: another number of cycles.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    cycles: Option<u64>,
    /// Fewer connections, thousandths of a level's, to try it out; rates are then not judged.
    #[arg(long, hide = true, default_value_t = level1::CONNECTIONS, value_parser = parse_connections)]
    connections: usize,
}

/// What can be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    All,
    Connections,
    Memory,
    Latency,
    Leaks,
    Chaos,
}

/// The levels, by number and name.
const LEVELS: [(&str, &str, Level); 5] = [
    ("1", "connections", Level::Connections),
    ("2", "memory", Level::Memory),
    ("3", "latency", Level::Latency),
    ("4", "leaks", Level::Leaks),
    ("5", "chaos", Level::Chaos),
];

fn parse_level(text: &str) -> Result<Level, String> {
    if text == "all" {
        return Ok(Level::All);
    }
    let named = LEVELS.iter().find(|(number, name, _)| [*number, *name].contains(&text));
    named.map(|(_, _, level)| *level).ok_or_else(|| {
        let names: Vec<String> =
            LEVELS.iter().map(|(number, name, _)| format!("`{name}` (`{number}`)")).collect();
        format!("no level is called that: name {}, or `all`", names.join(", "))
    })
}

pub fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (SECONDS_MIN..=SECONDS_MAX).contains(&seconds) {
        Ok(seconds)
    } else {
        Err(format!("allowed are {SECONDS_MIN} to {SECONDS_MAX}"))
    }
}

fn parse_connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=level1::CONNECTIONS).contains(&n) => Ok(n),
        _ => Err(format!("allowed are 1 to {}", level1::CONNECTIONS)),
    }
}

/// Does what the arguments ask for.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Child(options)) => {
            return processes::run(&options).map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS);
        }
        Some(Command::Without(options)) => return failed(&without::run(&options)),
        Some(Command::Reconnect(options)) => return run_reconnect(&options),
        Some(Command::Gallery(options)) => {
            return run_gallery(&options).unwrap_or_else(|error| failed(&error));
        }
        Some(Command::Kills(options)) => return run_kills(&options).unwrap_or_else(|error| failed(&error)),
        Some(Command::Reclaim(options)) => {
            return run_reclaim(&options).unwrap_or_else(|error| failed(&error));
        }
        Some(Command::KillPoints(options)) => {
            return run_points(&options).unwrap_or_else(|error| failed(&error));
        }
        Some(Command::Soak(options)) => return run_soak(&options).unwrap_or_else(|error| failed(&error)),
        None => {}
    }
    match run_suite(&cli.suite) {
        Ok(report) => {
            if cli.suite.json {
                println!("{}", report.to_json());
            } else {
                print!("{report}");
            }
            if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failed(&error),
    }
}

fn run_reconnect(options: &ReconnectOptions) -> ExitCode {
    match reconnect::run(options, progress) {
        Ok(report) => {
            if options.json {
                println!("{}", serde_json::to_string(&report).expect("a report has string keys only"));
            } else {
                print!("{report}");
            }
            if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &StressError) -> ExitCode {
    eprintln!("doorbell-stress: {error}");
    ExitCode::FAILURE
}

fn run_gallery(options: &GalleryOptions) -> Result<ExitCode, StressError> {
    scratch::remove_on_signals()?;
    let gallery = gallery::run(options, &Cores::plan()?)?;
    match options.json {
        true => println!("{}", serde_json::to_string(&gallery).expect("numbers and names are JSON")),
        false => print!("{gallery}"),
    }
    Ok(if gallery.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_kills(options: &KillsOptions) -> Result<ExitCode, StressError> {
    scratch::remove_on_signals()?;
    let counts = kills::run(options, &Cores::plan()?, random_seed()?)?;
    print!("{counts}");
    Ok(if counts.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_reclaim(options: &ReclaimOptions) -> Result<ExitCode, StressError> {
    scratch::remove_on_signals()?;
    let reclaim = reclaim::run(options, &Cores::plan()?, random_seed()?)?;
    print!("{reclaim}");
    Ok(if reclaim.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_soak(options: &SoakOptions) -> Result<ExitCode, StressError> {
    scratch::remove_on_signals()?;
    let soak = soak::run(options, &Cores::plan()?, random_seed()?, progress)?;
    match options.json {
        true => println!("{}", serde_json::to_string(&soak).expect("numbers and names are JSON")),
        false => print!("{soak}"),
    }
    Ok(if soak.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_points(options: &PointsOptions) -> Result<ExitCode, StressError> {
    if !cfg!(feature = "kill-points") {
        eprintln!(
            "doorbell-stress: this one was built without kill points: \
             cargo run --release -p doorbell-stress --features kill-points -- kill-points"
        );
        return Ok(ExitCode::from(2));
    }
    scratch::remove_on_signals()?;
    let counts = points::run(options, &Cores::plan()?, random_seed()?, progress)?;
    print!("{counts}");
    Ok(if counts.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_suite(options: &SuiteOptions) -> Result<Report, StressError> {
    scratch::remove_on_signals()?;
    // The segments of every session are held open to be watched.
    doorbell::config::raise_file_limit(options.connections as u64)
        .map_err(StressError::ipc("raising limits"))?;
    let cores = Cores::plan()?;
    let seed = options.seed.map_or_else(random_seed, Ok)?;
    progress(&format!("seed {seed}"));
    let connections = options.connections;
    let asked = |level| options.level.is_some_and(|asked| asked == Level::All || asked == level);
    let seconds = |full, short| options.seconds.unwrap_or(if options.full { full } else { short });
    let mut rows = Vec::new();
    if asked(Level::Connections) {
        let seconds = seconds(FULL, SHORT);
        rows.extend(level1::run(&level1::Plan { seconds, seed, connections }, &cores, progress)?);
    }
    if asked(Level::Memory) {
        let usual = if options.full { level2::FULL } else { level2::SHORT_ROUNDS };
        let rounds = options.rounds.unwrap_or(usual);
        rows.extend(level2::run(&level2::Plan { rounds, seed, size: connections }, &cores, progress)?);
    }
    if asked(Level::Latency) {
        let seconds = seconds(level3::FULL, level3::SHORT);
        // One of them is the probe's.
        let connections = connections.max(2);
        rows.extend(level3::run(&level3::Plan { seconds, seed, connections }, &cores, progress)?);
    }
    if asked(Level::Leaks) {
        let cycles = options.cycles.unwrap_or(if options.full { level4::FULL } else { level4::SHORT });
        rows.extend(level4::run(&level4::Plan { cycles, seed, size: connections }, &cores, progress)?);
    }
    if asked(Level::Chaos) {
        let seconds = seconds(level5::FULL, level5::SHORT);
        rows.extend(level5::run(&level5::Plan { seconds, seed }, &cores, progress)?);
    }
    Ok(Report::new(Machine::describe(&cores), seed, rows))
}

fn random_seed() -> Result<u64, StressError> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| StressError::os("getrandom", e))?;
    Ok(u64::from_le_bytes(bytes) >> (u64::BITS - SEED_BITS))
}

fn progress(doing: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("stress: {doing}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<SuiteOptions, clap::Error> {
        Cli::try_parse_from(["doorbell-stress"].into_iter().chain(line.split_whitespace())).map(|c| c.suite)
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_level_goes_by_name_or_number_or_with_all() {
        for (number, name, level) in LEVELS {
            for text in [number, name] {
                assert_eq!(parse(&format!("{text} --short")).unwrap().level, Some(level));
            }
        }
        assert_eq!(parse("all --short").unwrap().level, Some(Level::All));
        let options = parse("1 --full --json --seed 7 --seconds 0.2").unwrap();
        assert!(options.full && options.json && options.connections == 1000);
        assert_eq!((options.seed, options.seconds), (Some(7), Some(0.2)));
    }

    /// Goal:   every wrong question is refused as one (exit status 2).
    #[test]
    fn wrong_questions_are_refused() {
        for line in [
            "connections",
            "--short",
            "nonsense --short",
            "1 --short --full",
            "1 --short --seconds 0",
            "1 --short --seconds NaN",
            "1 --short --connections 1001",
            "1 --short --seed -1",
            "2 --short --rounds 0",
            "4 --short --cycles 0",
            "6 --short",
            "child",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        assert_eq!(parse("--help").unwrap_err().kind(), ErrorKind::DisplayHelp);
    }

    #[test]
    fn a_random_seed_is_a_whole_number_for_every_json_reader() {
        assert!(random_seed().unwrap() < 1 << SEED_BITS);
    }
}

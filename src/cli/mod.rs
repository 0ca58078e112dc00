//! The command line. Results go to stdout, everything else to stderr; exit status 0 means that what was
//! asked for happened, 1 that it did not, 2 that the question was wrong; `doctor` has statuses of its own beside.

mod ask;
mod bench;
mod call;
mod caretaker;
mod config;
mod demo;
mod doctor;
mod generate;
#[cfg(feature = "hardening")]
mod harden;
mod log;
mod notify;
mod serve;
mod watch;

use clap::{Parser, Subcommand};
use doorbell::MessageType;
use std::process::ExitCode;

/// Request/response IPC between processes of one machine, through shared memory.
#[derive(Debug, Parser)]
#[command(name = "doorbell", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server: ping, echo, stats, analyze-file, and providers of models, a loopback unless configured.
    Serve(serve::ServeOptions),
    /// Ask a model and print its answer as it comes. Ctrl-C cancels it.
    Chat(ask::AskOptions),
    /// Have a model complete a text and print that as it comes. Ctrl-C cancels it.
    Complete(ask::AskOptions),
    /// Print what the server finds out about a file, and a model's answer to a question about it.
    Analyze(ask::AnalyzeOptions),
    /// Send one request and print its answer.
    Call(call::CallOptions),
    /// Check a configuration file, or print one with all defaults.
    Config(config::ConfigOptions),
    /// Print what a server has counted.
    Stat(watch::stat::StatOptions),
    /// Print the calls that a server has in flight, and what each of them waits for.
    Ps(watch::ps::PsOptions),
    /// Show a server at work: sessions, connections, message types, memory, reactors.
    Top(watch::top::TopOptions),
    /// Trace the calls of one connection: a file for Perfetto (ui.perfetto.dev) or chrome://tracing.
    Trace(watch::trace::TraceOptions),
    /// Measure calls against a server process of its own, every byte of every answer checked.
    Bench(bench::options::BenchOptions),
    /// Measure streamed answers against a server process of its own, every chunk checked.
    BenchStream(bench::stream::StreamOptions),
    /// Show in half a minute what it does: keystrokes beside a thousand busy sessions, a hostile client, a killed server.
    Demo(demo::DemoOptions),
    /// Check whether doorbell works well on this machine, what it will use and why, and what to change.
    Doctor(doctor::DoctorOptions),
    /// Print what a shell completes the command line with.
    Completions(generate::CompletionsOptions),
    /// Write man pages, one of each command.
    Man(generate::ManOptions),
    /// A process of `bench`.
    #[command(name = bench::child::SUBCOMMAND, hide = true)]
    BenchChild(bench::child::ChildOptions),
}

/// Runs the command that the arguments ask for.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(options) => serve::run(&options),
        Command::Chat(options) => return ask(&options, MessageType::CHAT, "chat"),
        Command::Complete(options) => return ask(&options, MessageType::COMPLETE, "complete"),
        Command::Analyze(options) => ask::analyze(&options),
        Command::Call(options) => call::run(&options),
        Command::Stat(options) => watch::stat::run(&options),
        Command::Ps(options) => watch::ps::run(&options),
        Command::Top(options) => watch::top::run(&options),
        Command::Trace(options) => watch::trace::run(&options),
        Command::Config(options) => config::run(&options),
        Command::Completions(options) => generate::completions::<Cli>(&options),
        Command::Man(options) => generate::man::<Cli>(&options),
        Command::Bench(options) => return run_bench(&options),
        Command::BenchStream(options) => return run_bench_stream(&options),
        Command::Demo(options) => return demo::run(&options).unwrap_or_else(|error| fail(&error)),
        Command::Doctor(options) => return doctor::run(&options).unwrap_or_else(|error| fail(&*error)),
        Command::BenchChild(options) => bench::child::run(&options).map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&*error),
    }
}

fn ask(options: &ask::AskOptions, message_type: MessageType, name: &str) -> ExitCode {
    ask::run(options, message_type, name).unwrap_or_else(|error| fail(&*error))
}

fn run_bench(options: &bench::options::BenchOptions) -> ExitCode {
    match bench::run(options) {
        Ok(report) => {
            bench::print(options, &report);
            if report.all_errors() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error @ bench::error::BenchError::Option { .. }) => {
            fail(&error);
            ExitCode::from(2)
        }
        Err(error) => fail(&error),
    }
}

fn run_bench_stream(options: &bench::stream::StreamOptions) -> ExitCode {
    match bench::stream::run(options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error @ bench::error::BenchError::Option { .. }) => {
            fail(&error);
            ExitCode::from(2)
        }
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("doorbell: {error}");
    ExitCode::FAILURE
}

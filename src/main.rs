//! The `doorbell` command: serve, call, bench.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}

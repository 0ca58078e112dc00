//! The `doorbell` command: serve, call, bench, doctor.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}

//! `doorbell completions` and `doorbell man`: what shells and readers want to know of the command line, made from it.

use clap::{Args, CommandFactory, ValueEnum};
use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

/// Shells whose completions can be made.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Elvish,
    Fish,
    Zsh,
}

/// Print what a shell completes the command line with.
#[derive(Debug, Args)]
pub struct CompletionsOptions {
    /// The shell; the output goes where its completions lie, or is sourced.
    shell: Shell,
}

/// Write man pages, one of each command.
#[derive(Debug, Args)]
pub struct ManOptions {
    /// Directory that they are written to; it exists.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Prints completions.
pub fn completions<C: CommandFactory>(options: &CompletionsOptions) -> Result<(), Box<dyn Error>> {
    let shell = match options.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Elvish => clap_complete::Shell::Elvish,
        Shell::Fish => clap_complete::Shell::Fish,
        Shell::Zsh => clap_complete::Shell::Zsh,
    };
    // In memory first: the generator panics where it cannot write.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut C::command(), "doorbell", &mut text);
    Ok(std::io::stdout().write_all(&text)?)
}

/// Writes man pages.
pub fn man<C: CommandFactory>(options: &ManOptions) -> Result<(), Box<dyn Error>> {
    Ok(clap_mangen::generate_to(C::command(), &options.directory)?)
}

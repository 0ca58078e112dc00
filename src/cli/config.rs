//! `doorbell config`: the configuration file, checked or written.

use clap::{Args, Subcommand};
use doorbell::config::file::ConfigFile;
use std::error::Error;
use std::io::{Write, stdout};
use std::path::PathBuf;

/// Check a configuration file, or print one with all defaults.
#[derive(Debug, Args)]
pub struct ConfigOptions {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say what is wrong with a file and the environment, and where; nothing is started.
    Check {
        /// The file; without it only the environment is checked.
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Print a file that says what holds without one.
    Default,
}

/// Does what was asked for.
pub fn run(options: &ConfigOptions) -> Result<(), Box<dyn Error>> {
    match &options.action {
        Action::Check { file } => {
            ConfigFile::load(file.as_deref())?;
            match file {
                Some(file) => writeln!(stdout(), "{}: good", file.display()),
                None => writeln!(stdout(), "the environment: good"),
            }
        }
        Action::Default => stdout().write_all(ConfigFile::default_text().as_bytes()),
    }
    .map_err(|error| format!("standard output cannot be written: {error}").into())
}

//! `doorbell-stress without-io-uring COMMAND`: runs a command where io_uring is refused, as in most containers (F38).

use crate::error::StressError;
use clap::Args;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;

/// io_uring_setup, io_uring_enter, io_uring_register: the same numbers on every architecture.
const SYSTEM_CALLS: [i64; 3] = [425, 426, 427];

/// Runs a command, and all that it starts, where io_uring is refused with EPERM.
#[derive(Debug, Args)]
pub struct WithoutOptions {
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Becomes the command. Returns only if that fails.
pub fn run(options: &WithoutOptions) -> StressError {
    match refuse_io_uring() {
        Ok(()) => {
            let (program, arguments) = options.command.split_first().expect("clap requires one");
            StressError::Os {
                call: "execve of the command",
                source: std::process::Command::new(program).args(arguments).exec(),
            }
        }
        Err(error) => StressError::Os { call: "seccomp", source: std::io::Error::other(error) },
    }
}

/// Refuses io_uring to this thread, and to all that it starts from here on.
fn refuse_io_uring() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let calls: BTreeMap<i64, Vec<_>> = SYSTEM_CALLS.into_iter().map(|call| (call, Vec::new())).collect();
    let refusal = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error() as u32);
    let filter =
        SeccompFilter::new(calls, SeccompAction::Allow, refusal, std::env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

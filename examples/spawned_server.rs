//! A program that brings its server with it: started by whoever comes first, shared by all, gone with the last.
//!
//! ```sh
//! cargo run --example spawned_server -- target/debug/doorbell & cargo run --example spawned_server -- target/debug/doorbell
//! ```

use doorbell::{ClientConfig, IpcClient, MessageType, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn main() -> Result<()> {
    let program = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("doorbell"), Into::into);
    let client = connect(&program, &doorbell::default_socket_path())?;
    client.open()?.call(MessageType::PING, b"")?;
    println!("there is a server, and it ends two seconds after its last client");
    Ok(())
}

/// Connects to the server at `socket`, and starts one if there is none.
pub fn connect(program: &Path, socket: &Path) -> Result<IpcClient> {
    let mut command = Command::new(program);
    command.args(["serve", "--linger", "2", "--socket"]).arg(socket).stderr(Stdio::null());
    IpcClient::connect_or_spawn(socket, &ClientConfig::default(), &mut command)
}

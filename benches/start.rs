//! How long from the start of `doorbell serve` until its first answer: a client tries to connect without pause, opens a
//! connection, and has an echo checked. The median and the longest of some starts.
//!
//! `cargo bench --bench start`; as a test it starts one server and says nothing of time.

use doorbell::{IpcClient, IpcError, MessageType};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Starts a server, and stops it once it has answered.
fn start(path: &Path) -> Duration {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doorbell"));
    command.args(["serve", "--socket"]).arg(path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let begun = Instant::now();
    let mut server = command.spawn().expect("the server starts");
    let client = loop {
        match IpcClient::connect(path) {
            Ok(client) => break client,
            Err(IpcError::NotRunning { .. }) => std::thread::sleep(Duration::from_micros(50)),
            Err(error) => panic!("{error}"),
        }
    };
    let answer = client.open().and_then(|connection| connection.call(MessageType::ECHO, b"first"));
    let took = begun.elapsed();
    assert_eq!(answer.expect("the first call is answered"), b"first");
    drop(client);
    server.kill().and_then(|()| server.wait()).expect("the server ends");
    took
}

fn main() {
    let measures = std::env::args().any(|argument| argument == "--bench");
    let directory = std::env::temp_dir().join(format!("doorbell-start-{}", std::process::id()));
    {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().mode(0o700).create(&directory).expect("a directory of its own");
    }
    let path = directory.join("s");
    let mut took: Vec<Duration> = (0..if measures { 51 } else { 1 }).map(|_| start(&path)).collect();
    took.sort_unstable();
    if measures {
        let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
        println!("start to first answer: median {median:?}, longest {most:?} of {}", took.len());
    }
    std::fs::remove_dir_all(&directory).expect("the directory can be removed");
}

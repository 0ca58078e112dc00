//! The stress levels: real processes, every byte of every answer verified, a verdict.
//!
//! ```sh
//! cargo run --release -p doorbell-stress -- connections --short
//! ```
//!
//! This process starts a server and its clients, which are this very executable once more, watches the
//! server's memory and judges what the clients report. Exit status: 0 all passed, 1 something failed,
//! 2 the question was wrong.

mod assistant;
mod cli;
mod client;
mod clock;
mod content;
mod error;
mod floor;
mod gallery;
mod hostile;
mod kept;
mod kills;
mod latency;
mod level1;
mod level2;
mod level3;
mod level4;
mod level5;
mod load;
mod machine;
mod memory;
mod mixed;
mod monitor;
mod normal;
mod points;
mod processes;
#[path = "../../tests/common/raw.rs"]
#[allow(dead_code)] // The tests use all of it.
mod raw;
mod reclaim;
mod reconnect;
mod report;
mod scratch;
mod server;
mod soak;
mod takeback;
mod torture;
mod without;

/// Waits until `condition` holds; panics after half a minute. What `raw.rs` waits with.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed().as_secs() < 30, "waited 30 s for: {what}");
        std::thread::yield_now();
    }
}

fn main() -> std::process::ExitCode {
    cli::run()
}

//! The client that means well: calls one after the other, every byte of every answer looked at, every latency kept.

use crate::clock::now_ns;
use crate::content;
use crate::error::StressError;
use crate::machine;
use crate::processes;
use crate::server::MASKED_ECHO;
use doorbell::{ClientConfig, IpcClient, WaitPolicy};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Bytes of a request.
const SIZE: usize = 512;
/// Latencies that are kept of one window; more are counted and not kept.
const SAMPLES_MAX: usize = 8 << 20;

/// What the process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BystanderJob {
    /// Where the server listens.
    pub path: PathBuf,
    /// The core to run on.
    pub core: usize,
}

/// Calls until then, and says what came of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Measure {
    /// CLOCK_MONOTONIC, ns.
    pub until_ns: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Calls that were answered right.
    pub calls: u64,
    /// Calls that were not.
    pub errors: u64,
    /// Median and 99th percentile of their latency.
    pub p50_ns: u64,
    /// See `p50_ns`.
    pub p99_ns: u64,
}

/// The process itself. It says `()` once it is connected, then obeys each [`Measure`].
///
/// # Errors
///
/// Whatever keeps it from connecting.
pub fn run(job: &BystanderJob) -> Result<(), StressError> {
    machine::pin(job.core)?;
    let config = ClientConfig { policy: WaitPolicy::Spin, ..ClientConfig::default() };
    let client = IpcClient::connect_with(&job.path, &config).map_err(StressError::ipc("connecting"))?;
    let connection = client.open().map_err(StressError::ipc("opening a connection"))?;
    processes::say(&())?;
    let mut samples: Vec<u32> = Vec::with_capacity(SAMPLES_MAX);
    let mut nonce = 0u64;
    while let Some(Measure { until_ns }) = processes::hear()? {
        let mut measured = Measured::default();
        samples.clear();
        loop {
            nonce += 1;
            let request: [u8; SIZE] = std::array::from_fn(|i| (nonce >> (8 * (i % 8))) as u8 ^ i as u8);
            let mut expected = [0; SIZE];
            content::answer(&request, &mut expected);
            let began_ns = now_ns();
            let answer = connection.call(MASKED_ECHO, &request);
            let ended_ns = now_ns();
            match answer {
                Ok(answer) if answer == expected => measured.calls += 1,
                Ok(_) | Err(_) => measured.errors += 1,
            }
            if samples.len() < SAMPLES_MAX {
                samples.push(u32::try_from(ended_ns - began_ns).unwrap_or(u32::MAX));
            }
            if ended_ns >= until_ns {
                break;
            }
        }
        samples.sort_unstable();
        let at = |permille: usize| u64::from(samples[(samples.len() - 1) * permille / 1000]);
        (measured.p50_ns, measured.p99_ns) = (at(500), at(990));
        processes::say(&measured)?;
    }
    Ok(())
}

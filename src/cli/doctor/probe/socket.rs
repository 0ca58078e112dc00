//! The socket path: its directory, whether a server could have it, whether one answers there.

use super::super::findings::{Directory, Place, Socket};
use super::files::Files;
use doorbell::{ClientConfig, IpcClient, IpcError, check_socket_path};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// How long a server that listens may take to answer. A live one takes microseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// Looks at `path`. A server that answers there sees one session come and go.
pub fn socket(files: &Files, path: &Path) -> Socket {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = std::fs::symlink_metadata(parent).ok();
    Socket {
        directory: directory.map(|of| Directory { uid: of.uid(), mode: of.mode() & 0o7777 }),
        has_proc: files.0.join("proc/self/fd").is_dir(),
        place: place(path),
    }
}

fn place(path: &Path) -> Place {
    match check_socket_path(path) {
        Ok(()) => Place::Free,
        Err(IpcError::AlreadyRunning { .. }) => ask(path),
        Err(refused) => Place::Refused(refused.to_string()),
    }
}

/// Shakes hands with the server that listens there.
fn ask(path: &Path) -> Place {
    let config = ClientConfig {
        connect_timeout: PATIENCE,
        name: "doorbell doctor".to_owned(),
        ..ClientConfig::smallest()
    };
    match IpcClient::connect_with(path, &config) {
        Ok(_) => Place::Answers,
        // It has ended between the two looks.
        Err(IpcError::NotRunning { .. }) => Place::Free,
        Err(error) => Place::Silent(error.to_string()),
    }
}

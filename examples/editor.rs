//! What an editor does: its one thread draws and reads keys, and must never wait. Each key cancels the completion that
//! is on its way and asks for another; what comes is handed over when the thread looks, and it looks when the client's
//! descriptor is readable, beside that of the keyboard.
//!
//! The server echoes what was typed, which stands for what a model would add: a real editor sends `Complete`.
//!
//! ```sh
//! doorbell serve &
//! cargo run --example editor
//! ```

use doorbell::{CallHandle, CallbackClient, CallbackConfig, IpcError, MessageType, Result, StreamEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::Path;
use std::sync::{Arc, Mutex};

fn main() -> Result<()> {
    let socket = std::env::args_os().nth(1).map_or_else(doorbell::default_socket_path, Into::into);
    let shown = run(&socket, "let answer = forty_two();")?;
    println!("shown at last: {shown}");
    Ok(())
}

/// Types `keys`, one after the other without waiting; returns what is shown beside the cursor in the end.
pub fn run(socket: &Path, keys: &str) -> Result<String> {
    let config = CallbackConfig { polled: true, ..CallbackConfig::default() };
    // Does not wait for the server either.
    let client = CallbackClient::begin(socket, &config)?;
    let (text, shown) = (String::new(), Arc::default());
    Editor { client, text, shown, asked: None, stale: false, frames: 0 }.edit(keys)
}

/// What is known of the completion that was asked for last.
#[derive(Default)]
struct Suggestion {
    text: Vec<u8>,
    end: Option<Result<()>>,
}

struct Editor {
    client: CallbackClient,
    text: String,
    shown: Arc<Mutex<Suggestion>>,
    /// Dropping it cancels what was asked for.
    asked: Option<CallHandle>,
    /// The last key has not been asked about.
    stale: bool,
    frames: u32,
}

impl Editor {
    fn edit(mut self, keys: &str) -> Result<String> {
        for key in keys.chars() {
            self.text.push(key);
            self.ask()?;
            self.draw();
        }
        loop {
            if self.stale {
                self.ask()?;
            }
            self.wait()?;
            self.draw();
            let shown = std::mem::take(&mut *self.shown.lock().expect("no callback panics"));
            match shown.end {
                Some(end) if !self.stale => {
                    println!("{} frames drawn, {} keys typed", self.frames, keys.chars().count());
                    return end.map(|()| String::from_utf8_lossy(&shown.text).into_owned());
                }
                _ => *self.shown.lock().expect("no callback panics") = shown,
            }
        }
    }

    /// A frame shows what has come by now.
    fn draw(&mut self) {
        self.client.poll_events(usize::MAX);
        self.frames += 1;
    }

    /// Asks for a completion of what is there now; the one before is cancelled.
    fn ask(&mut self) -> Result<()> {
        let suggestion = Arc::new(Mutex::new(Suggestion::default()));
        let shown = Arc::clone(&suggestion);
        let on_event = move |event| {
            let mut shown = shown.lock().expect("no callback panics");
            match event {
                StreamEvent::Frame(bytes) => shown.text.extend_from_slice(&bytes),
                // Of one that is not shown any more, this is `Cancelled`.
                StreamEvent::End(result) => shown.end = Some(result),
            }
        };
        match self.client.stream(MessageType::ECHO, self.text.clone().into_bytes(), on_event) {
            Ok(call) => {
                self.asked = Some(call);
                (self.shown, self.stale) = (suggestion, false);
                Ok(())
            }
            // Too many are being cancelled just now: to be asked again.
            Err(IpcError::WouldBlock) => {
                (self.asked, self.stale) = (None, true);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Until something has come; an editor waits for keys, too.
    fn wait(&self) -> Result<()> {
        let limit = Timespec { tv_sec: 0, tv_nsec: 16_000_000 };
        let mut descriptors = [PollFd::new(&self.client, PollFlags::IN)];
        poll(&mut descriptors, Some(&limit))
            .map(drop)
            .map_err(|error| IpcError::Io { call: "poll", source: error.into() })
    }
}

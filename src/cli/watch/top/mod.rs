//! `doorbell top`: a server at work, on a terminal. `model.rs` knows what is shown and what keys mean, `view.rs` draws it;
//! here are the terminal, the clock and the server.

mod model;
mod view;

use super::{Watched, Where};
use clap::Args;
use doorbell::inspect::Inquiry;
use model::{Asked, Model};
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use signal_hook::consts::{SIGHUP, SIGTERM};
use std::error::Error;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Show a server at work: sessions, connections, message types, memory, reactors. `?` shows the keys.
#[derive(Debug, Args)]
pub struct TopOptions {
    #[command(flatten)]
    at: Where,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECS", default_value_t = 1.0, value_parser = seconds)]
    interval: f64,
}

/// How soon a signal is seen that ends it.
const SIGNALS_EVERY: Duration = Duration::from_millis(200);

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(secs) if (0.1..=3600.0).contains(&secs) => Ok(secs),
        _ => Err("a number of seconds from 0.1 to 3600 is wanted".to_owned()),
    }
}

/// Shows it until the user has had enough.
pub fn run(options: &TopOptions) -> Result<(), Box<dyn Error>> {
    if !std::io::stdout().is_terminal() {
        return Err("standard output is no terminal: `doorbell stat --watch` prints lines".into());
    }
    let watched = Watched::connect(&options.at, "top")?;
    let mut model =
        Model::new(watched.ask(&Inquiry { sessions: true, connections: true, ..Inquiry::default() })?);
    let gone = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&gone))?;
    }
    let mut terminal = ratatui::try_init().inspect_err(|_| ratatui::restore())?;
    let interval = Duration::from_secs_f64(options.interval);
    let result = show(&mut terminal, &watched, &mut model, interval, &gone);
    let restored = ratatui::try_restore();
    result?;
    Ok(restored?)
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    watched: &Watched,
    model: &mut Model,
    interval: Duration,
    gone: &AtomicBool,
) -> Result<(), Box<dyn Error>> {
    let inquiry = Inquiry { sessions: true, connections: true, ..Inquiry::default() };
    let mut next = Instant::now() + interval;
    while !gone.load(Relaxed) {
        terminal.draw(|frame| view::draw(frame, model))?;
        let left = next.saturating_duration_since(Instant::now());
        if event::poll(left.min(SIGNALS_EVERY))? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match model.key(key) {
                    Asked::Nothing => {}
                    Asked::Quit => return Ok(()),
                    Asked::End(whom) => model.told(watched.end(whom).map_err(|e| e.to_string())),
                },
                _ => {}
            }
            continue;
        }
        if Instant::now() >= next {
            next = Instant::now() + interval;
            model.update(watched.ask(&inquiry)?);
        }
    }
    Ok(())
}

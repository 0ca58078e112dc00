//! A provider that needs nothing: it answers with what it was asked, and says so.

mod behaviour;
mod script;

use super::{BoxFuture, Call, ChunkStream, LoopbackConfig, Provider, ProviderError, collect};
use crate::messages::{AIResponse, StreamChunk};
use behaviour::{Behaviour, Failure};
use futures_core::Stream;
use script::Script;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Answers by itself, the same each time, at a steady pace. Every answer begins with `loopback: `.
///
/// The text names the model, counts the messages and repeats the first KiB of the last one. A tool whose name the last
/// message contains is called, with that message as parameters. A token is four bytes. An answer that is no stream comes
/// at once.
///
/// What follows `loopback-` in a model's name changes the answer; words are joined with `-`:
///
/// | words | effect |
/// | --- | --- |
/// | `fast`, `pace-N` | no pause between chunks; N chunks a second |
/// | `size-N`, `chunks-N` | N bytes of text a chunk; N chunks of text, numbered, instead of the last message |
/// | `stamped` | each chunk of text tells when it was made: CLOCK_MONOTONIC, nanoseconds |
/// | `reasoning`, `tools` | reasons first; calls every tool given |
/// | `slow` | answers after two seconds |
/// | `hang`, `stall`, `cut` | never answers; stops after the third chunk; breaks off after the third chunk |
/// | `error`, `unavailable`, `unauthorized`, `limited`, `badrequest`, `garbage`, `unknown`, `overloaded` | fails in that way |
///
/// Any other word makes the model unknown.
#[derive(Debug)]
pub struct Loopback {
    name: String,
    config: LoopbackConfig,
}

/// How long `slow` waits.
const SLOW: Duration = Duration::from_secs(2);
/// What `limited` asks for.
const LIMITED: Duration = Duration::from_secs(1);

impl Loopback {
    /// A loopback of this name.
    pub fn new(name: &str, config: LoopbackConfig) -> Self {
        Self { name: name.into(), config }
    }

    /// What happens before the first chunk; then what the answer is made by.
    async fn begin(&self, call: &Call) -> Result<(Behaviour, Script), ProviderError> {
        let request = &call.request;
        let behaviour =
            Behaviour::of(&request.model, &self.config).ok_or_else(|| self.unknown(&request.model))?;
        if behaviour.hangs {
            std::future::pending::<()>().await;
        }
        if behaviour.is_slow {
            tokio::time::sleep(SLOW).await;
        }
        if let Some(failure) = behaviour.failure {
            return Err(self.fail(failure, &request.model));
        }
        let script = Script::new(request, &behaviour);
        Ok((behaviour, script))
    }

    async fn paced(&self, call: &Call) -> Result<ChunkStream, ProviderError> {
        let (behaviour, script) = call.cancel.run(self.begin(call)).await?;
        let stream = Paced {
            script,
            interval: interval(behaviour.chunks_per_second),
            due: Instant::now(),
            sleep: Box::pin(tokio::time::sleep(Duration::ZERO)),
            pieces: 0,
            stops: behaviour.stops,
            breaks_off: behaviour.breaks_off,
            provider: self.name.clone(),
        };
        Ok(call.cancel.guard(stream))
    }

    async fn whole(&self, call: &Call) -> Result<AIResponse, ProviderError> {
        let unpaced = Self::new(&self.name, LoopbackConfig { chunks_per_second: 0.0, ..self.config.clone() });
        collect(&self.name, unpaced.paced(call).await?).await
    }

    fn unknown(&self, model: &str) -> ProviderError {
        let known = vec!["loopback".into(), "loopback-*".into()];
        ProviderError::UnknownModel { model: model.into(), known }
    }

    fn fail(&self, failure: Failure, model: &str) -> ProviderError {
        let provider = self.name.clone();
        let (code, message) = (Some("simulated".to_owned()), "a failure that was asked for".to_owned());
        match failure {
            Failure::Error => ProviderError::Failed { provider, code, message },
            Failure::Unavailable => ProviderError::Unavailable { provider, what: message, retry_after: None },
            Failure::Unauthorized => ProviderError::Unauthorized { provider, status: 401 },
            Failure::Limited => ProviderError::RateLimited { provider, retry_after: Some(LIMITED), code },
            Failure::BadRequest => ProviderError::BadRequest { provider, status: 400, code, message },
            Failure::Garbage => ProviderError::Protocol { provider, what: message },
            Failure::Unknown => self.unknown(model),
            Failure::Overloaded => {
                ProviderError::Overloaded { whom: format!("provider `{provider}`"), waiting: 0 }
            }
        }
    }
}

impl Provider for Loopback {
    fn name(&self) -> &str {
        &self.name
    }

    fn chat<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        Box::pin(self.whole(call))
    }

    fn stream<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<ChunkStream, ProviderError>> {
        Box::pin(self.paced(call))
    }

    fn health(&self) -> BoxFuture<'_, Result<(), ProviderError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn interval(chunks_per_second: f64) -> Duration {
    if chunks_per_second > 0.0 { Duration::from_secs_f64(1.0 / chunks_per_second) } else { Duration::ZERO }
}

/// Gives pieces of text and of reasoning when they are due, and all else at once.
struct Paced {
    script: Script,
    interval: Duration,
    due: Instant,
    sleep: Pin<Box<Sleep>>,
    /// Given so far.
    pieces: u64,
    stops: bool,
    breaks_off: bool,
    provider: String,
}

/// Pieces before `stall` and `cut` do what they are for.
const PIECES_BEFORE_A_FAILURE: u64 = 3;

impl Paced {
    /// Ready when the next piece is due.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.interval.is_zero() || self.pieces == 0 {
            return Poll::Ready(());
        }
        self.sleep.as_mut().poll(cx)
    }

    /// When the piece after this one is due: by the schedule, unless the reader has fallen behind it.
    fn schedule(&mut self) {
        self.pieces += 1;
        if !self.interval.is_zero() {
            let behind = Instant::now().checked_sub(self.interval);
            self.due = behind.map_or(self.due, |behind| behind.max(self.due)) + self.interval;
            self.sleep.as_mut().reset(self.due);
        }
    }
}

impl Stream for Paced {
    type Item = Result<StreamChunk, ProviderError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.pieces >= PIECES_BEFORE_A_FAILURE && this.stops {
            return Poll::Pending;
        }
        if this.pieces >= PIECES_BEFORE_A_FAILURE && this.breaks_off {
            return Poll::Ready(Some(Err(ProviderError::Interrupted { provider: this.provider.clone() })));
        }
        if this.script.next_is_piece() {
            std::task::ready!(this.poll_due(cx));
            this.schedule();
        }
        Poll::Ready(this.script.next().map(Ok))
    }
}

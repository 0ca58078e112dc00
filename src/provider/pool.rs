//! Which provider answers, how much at once, for how long, and how often it is asked.

use super::gate::{Gate, Permit};
use super::retry::{Backoff, random};
use super::route::Routes;
use super::stream::Times;
use super::{
    Answer, BoxFuture, Call, ChunkStream, ConfigFault, Kind, Loopback, Phase, Provider, ProviderConfig,
    ProviderError, ProviderKind, ProvidersConfig, RetryConfig, Timeouts,
};
use crate::messages::{AIResponse, StreamChunk};
use crate::server::throttle::Throttle;
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::{Instant, timeout_at};

/// The providers of a server. Shared by reference; asks need a tokio runtime, as [`Provider`] says.
pub struct ProviderPool {
    routes: Routes,
    members: Vec<Member>,
    gate: Gate,
    max_request_bytes: usize,
    log: Mutex<Throttle>,
}

struct Member {
    provider: Arc<dyn Provider>,
    gate: Gate,
    timeouts: Timeouts,
    retry: RetryConfig,
}

/// What a provider says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// Its name.
    pub provider: String,
    /// Whether it can be reached and accepts us.
    pub state: Result<(), ProviderError>,
}

/// A pool in the making.
pub struct ProviderPoolBuilder {
    config: ProvidersConfig,
    providers: Vec<Arc<dyn Provider>>,
}

impl ProviderPool {
    /// A pool to which providers are added one by one.
    pub fn builder() -> ProviderPoolBuilder {
        let config = ProvidersConfig { default: None, providers: Vec::new(), ..ProvidersConfig::default() };
        ProviderPoolBuilder { config, providers: Vec::new() }
    }

    /// The pool that a configuration describes. Keys are read from the environment of this process.
    ///
    /// # Errors
    ///
    /// [`ConfigFault`]: what is wrong, by provider and key.
    pub fn from_config(config: &ProvidersConfig) -> Result<Self, ConfigFault> {
        Self::from_config_with(config, |variable| std::env::var(variable).ok())
    }

    /// The same, with another way to look up environment variables.
    ///
    /// # Errors
    ///
    /// As [`ProviderPool::from_config`].
    pub fn from_config_with(
        config: &ProvidersConfig,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigFault> {
        config.check()?;
        let mut builder = Self::builder().limits(config.max_concurrent, config.max_waiting);
        for provider in &config.providers {
            builder = builder.register(make(provider, &variable)?, provider.clone());
        }
        builder.config.default.clone_from(&config.default);
        builder = builder.max_request_bytes(config.max_request_bytes);
        builder.build()
    }

    /// The whole answer.
    ///
    /// # Errors
    ///
    /// [`ProviderError`]: of the last provider asked.
    pub async fn answer(&self, call: &Call) -> Result<AIResponse, ProviderError> {
        call.cancel.run(self.ask(call, Member::answer)).await
    }

    /// The answer as it comes: returns with its first chunk, up to which a provider is asked again, or another one is.
    ///
    /// # Errors
    ///
    /// [`ProviderError`]: of the last provider asked. After the first chunk errors are chunks.
    pub async fn stream(&self, call: &Call) -> Result<Answer, ProviderError> {
        call.cancel.run(self.ask(call, Member::stream)).await
    }

    /// The state of every provider, asked all at once; each has its connect and first-chunk time.
    pub async fn health(&self) -> Vec<Health> {
        let mut asked: Vec<_> = self.members.iter().map(|member| Some(Box::pin(member.health()))).collect();
        let mut found: Vec<Option<Health>> = asked.iter().map(|_| None).collect();
        poll_fn(|cx| {
            for (future, found) in asked.iter_mut().zip(&mut found) {
                let Some(running) = future else { continue };
                if let std::task::Poll::Ready(health) = running.as_mut().poll(cx) {
                    (*found, *future) = (Some(health), None);
                }
            }
            if asked.iter().all(Option::is_none) {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        found.into_iter().flatten().collect()
    }

    /// Bytes that all requests under way may take.
    pub(super) fn max_request_bytes(&self) -> usize {
        self.max_request_bytes
    }

    /// All models and patterns of models, in the order of the configuration.
    pub fn models(&self) -> Vec<String> {
        self.routes.known()
    }

    /// Asks the providers for the call's model in turn until one answers, or none is left.
    async fn ask<'a, T>(
        &'a self,
        call: &'a Call,
        once: for<'b> fn(&'b Member, Attempt<'b>) -> BoxFuture<'b, Result<T, ProviderError>>,
    ) -> Result<T, ProviderError> {
        let begun = Instant::now();
        let mut last = None;
        for index in self.routes.find(&call.request.model) {
            let member = &self.members[index];
            match self.ask_member(member, call, begun, once).await {
                Err(error) if error.is_of_this_provider() => {
                    self.log(member.provider.name(), call, &error);
                    last = Some(error);
                }
                done => return done,
            }
        }
        Err(last.unwrap_or_else(|| self.unknown(call)))
    }

    /// A line for the operator; few of them, however many calls fail (F30).
    fn log(&self, provider: &str, call: &Call, error: &ProviderError) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let traceparent = call.traceparent.map(tracing::field::display);
        log.warn(|| tracing::warn!(provider, code = error.code(), traceparent, "no answer: {error}"));
    }

    fn unknown(&self, call: &Call) -> ProviderError {
        ProviderError::UnknownModel { model: call.request.model.clone(), known: self.models() }
    }

    /// Asks one provider, again after a pause where that may help, for its total time.
    async fn ask_member<'a, T>(
        &'a self,
        member: &'a Member,
        call: &'a Call,
        begun: Instant,
        once: for<'b> fn(&'b Member, Attempt<'b>) -> BoxFuture<'b, Result<T, ProviderError>>,
    ) -> Result<T, ProviderError> {
        let total_at = begun + member.timeouts.total();
        let work = async {
            let mut backoff = Backoff::new(&member.retry);
            loop {
                // The provider's place first: who waits for a slow one does not keep a place of the pool.
                let permits = [member.gate.enter().await?, self.gate.enter().await?];
                let error = match once(member, Attempt { call, permits, total_at }).await {
                    Err(error) => error,
                    done => return done,
                };
                let Some(pause) = backoff.pause(&error, random()) else { return Err(error) };
                tracing::debug!(provider = member.provider.name(), ?pause, "asking again: {error}");
                tokio::time::sleep(pause).await;
            }
        };
        timeout_at(total_at, work)
            .await
            .unwrap_or_else(|_elapsed| Err(member.timed_out(Phase::Total, member.timeouts.total())))
    }
}

/// One time that a provider is asked.
struct Attempt<'a> {
    call: &'a Call,
    permits: [Permit; 2],
    total_at: Instant,
}

impl Member {
    fn answer<'a>(&'a self, attempt: Attempt<'a>) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        Box::pin(async move {
            let _places = attempt.permits;
            match attempt.call.kind {
                Kind::Chat => self.provider.chat(attempt.call).await,
                Kind::Complete => self.provider.complete(attempt.call).await,
            }
        })
    }

    fn stream<'a>(&'a self, attempt: Attempt<'a>) -> BoxFuture<'a, Result<Answer, ProviderError>> {
        Box::pin(async move {
            let limit = self.timeouts.first_chunk();
            let (first, source) = timeout_at(Instant::now() + limit, self.first(attempt.call))
                .await
                .unwrap_or_else(|_elapsed| Err(self.timed_out(Phase::FirstChunk, limit)))?;
            let times = Times {
                total_at: attempt.total_at,
                total: self.timeouts.total(),
                gap: self.timeouts.between_chunks(),
            };
            Ok(Answer::new(self.provider.name(), first, source, attempt.permits, times))
        })
    }

    async fn first(&self, call: &Call) -> Result<(StreamChunk, ChunkStream), ProviderError> {
        let mut source = self.provider.stream(call).await?;
        match poll_fn(|cx| source.as_mut().poll_next(cx)).await {
            Some(first) => Ok((first?, source)),
            None => Err(ProviderError::Interrupted { provider: self.provider.name().into() }),
        }
    }

    async fn health(&self) -> Health {
        let limit = self.timeouts.connect() + self.timeouts.first_chunk().min(self.timeouts.connect());
        let state = timeout_at(Instant::now() + limit, self.provider.health())
            .await
            .unwrap_or_else(|_elapsed| Err(self.timed_out(Phase::FirstChunk, limit)));
        Health { provider: self.provider.name().into(), state }
    }

    fn timed_out(&self, phase: Phase, after: std::time::Duration) -> ProviderError {
        ProviderError::Timeout { provider: self.provider.name().into(), phase, after }
    }
}

impl ProviderPoolBuilder {
    /// Requests that run, and that wait, at once over all providers.
    pub fn limits(mut self, max_concurrent: usize, max_waiting: usize) -> Self {
        (self.config.max_concurrent, self.config.max_waiting) = (max_concurrent, max_waiting);
        self
    }

    /// Bytes that all requests under way may take; more are refused as overload.
    pub fn max_request_bytes(mut self, bytes: usize) -> Self {
        self.config.max_request_bytes = bytes;
        self
    }

    /// Adds a provider with its models, fail-over order and limits; what `config` says of keys and addresses does not
    /// count, and its name is the provider's own.
    pub fn register(mut self, provider: impl Provider + 'static, config: ProviderConfig) -> Self {
        let name = provider.name().to_owned();
        self.config.providers.push(ProviderConfig { name, ..config });
        self.providers.push(Arc::new(provider));
        self
    }

    /// The provider for models that none names.
    pub fn default_provider(mut self, name: &str) -> Self {
        self.config.default = Some(name.into());
        self
    }

    /// The pool.
    ///
    /// # Errors
    ///
    /// [`ConfigFault`]: what is wrong, by provider and key.
    pub fn build(self) -> Result<ProviderPool, ConfigFault> {
        let Self { config, providers } = self;
        config.check()?;
        let mut routes = Routes::default();
        let mut members = Vec::new();
        for (provider, config) in providers.into_iter().zip(config.providers) {
            routes.push(&config.name, config.models(), config.fail_over);
            let gate =
                Gate::new(format!("provider `{}`", config.name), config.max_concurrent, config.max_waiting);
            members.push(Member { provider, gate, timeouts: config.timeouts, retry: config.retry });
        }
        routes.default = config.default.as_deref().and_then(|name| routes.named(name));
        let gate = Gate::new("the pool of providers".into(), config.max_concurrent, config.max_waiting);
        let max_request_bytes = config.max_request_bytes;
        Ok(ProviderPool { routes, members, gate, max_request_bytes, log: Mutex::default() })
    }
}

fn make(
    config: &ProviderConfig,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Box<dyn Provider>, ConfigFault> {
    match config.kind {
        ProviderKind::Loopback => Ok(Box::new(Loopback::new(&config.name, config.loopback.clone()))),
        #[cfg(feature = "openai")]
        ProviderKind::OpenAi => Ok(Box::new(super::OpenAi::from_config(config, variable)?)),
        #[cfg(not(feature = "openai"))]
        ProviderKind::OpenAi => {
            let _without_openai = variable;
            Err(ConfigFault::NotBuilt { provider: config.name.clone() })
        }
    }
}

impl Provider for Box<dyn Provider> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn chat<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        (**self).chat(call)
    }

    fn complete<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        (**self).complete(call)
    }

    fn stream<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<ChunkStream, ProviderError>> {
        (**self).stream(call)
    }

    fn cancel(&self, call: &Call) {
        (**self).cancel(call);
    }

    fn health(&self) -> BoxFuture<'_, Result<(), ProviderError>> {
        (**self).health()
    }
}

impl fmt::Debug for ProviderPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProviderPool").field("routes", &self.routes).finish_non_exhaustive()
    }
}

impl fmt::Debug for ProviderPoolBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProviderPoolBuilder").field("config", &self.config).finish_non_exhaustive()
    }
}

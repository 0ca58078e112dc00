//! The configuration of providers, in TOML or JSON.

use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// Most requests that run, or wait, at once, whatever is configured.
const REQUESTS_LIMIT: usize = 1 << 20;
/// Longest time that may be configured, milliseconds: a day.
const TIME_LIMIT_MS: u64 = 24 * 60 * 60 * 1000;

/// All providers of a server. `Default` is a loopback that answers for every model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProvidersConfig {
    /// The provider that answers for models which none names. Without it such models are unknown.
    pub default: Option<String>,
    /// The model that answers questions about files (`AnalyzeFile`).
    pub file_model: String,
    /// Requests that run at once over all providers.
    pub max_concurrent: usize,
    /// Requests that may wait for one of those places; more are refused as overload.
    pub max_waiting: usize,
    /// Bytes that all requests under way may take, beside the server's memory budget; a request beyond that is refused as
    /// overload unless it is the only one.
    pub max_request_bytes: usize,
    /// The providers; where several name a model, earlier ones come first.
    pub providers: Vec<ProviderConfig>,
}

impl Default for ProvidersConfig {
    fn default() -> Self {
        let loopback = ProviderConfig { name: "loopback".into(), ..ProviderConfig::default() };
        Self {
            default: Some("loopback".into()),
            file_model: "loopback".into(),
            max_concurrent: 4096,
            max_waiting: 4096,
            max_request_bytes: 64 << 20,
            providers: vec![loopback],
        }
    }
}

/// One provider.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProviderConfig {
    /// Names it in routes, errors and logs.
    pub name: String,
    /// What it is.
    pub kind: ProviderKind,
    /// Models that it answers for; `*` stands for any characters. Of a loopback that names none: `loopback` and
    /// `loopback-*`.
    pub models: Vec<String>,
    /// Providers to ask for the same model when this one cannot answer, in this order.
    pub fail_over: Vec<String>,
    /// Requests that run at once.
    pub max_concurrent: usize,
    /// Requests that may wait for one of those places.
    pub max_waiting: usize,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How often to ask again.
    pub retry: RetryConfig,
    /// `openai`: where the API is, up to and with `/v1`.
    pub base_url: String,
    /// `openai`: the environment variable that holds the key; without it no key is sent.
    pub key_env: Option<String>,
    /// `openai`: a PEM file of certificate authorities to trust beside the public ones.
    pub ca_file: Option<PathBuf>,
    /// `openai`: whether streams ask for usage (`stream_options`), which some servers do not know.
    pub stream_usage: bool,
    /// `openai`: what the API calls the limit on tokens.
    pub max_tokens_field: MaxTokensField,
    /// `openai`: longest answer, bytes.
    pub max_answer: usize,
    /// `loopback`: how it answers.
    pub loopback: LoopbackConfig,
}

impl Default for ProviderConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            kind: ProviderKind::Loopback,
            models: Vec::new(),
            fail_over: Vec::new(),
            max_concurrent: 1024,
            max_waiting: 1024,
            timeouts: Timeouts::default(),
            retry: RetryConfig::default(),
            base_url: "https://api.openai.com/v1".into(),
            key_env: None,
            ca_file: None,
            stream_usage: true,
            max_tokens_field: MaxTokensField::MaxTokens,
            max_answer: 10 << 20,
            loopback: LoopbackConfig::default(),
        }
    }
}

/// What a provider is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProviderKind {
    /// Answers by itself, see [`Loopback`](super::Loopback).
    Loopback,
    /// Speaks the OpenAI-compatible HTTP API.
    OpenAi,
}

/// What an API calls the limit on tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    /// What nearly all servers understand.
    MaxTokens,
    /// What OpenAI's reasoning models want.
    MaxCompletionTokens,
}

/// How long a provider may take, milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// To be connected to: name, TCP and TLS.
    pub connect_ms: u64,
    /// Of a stream, from the request to the first chunk. An answer that is no stream has the total time.
    pub first_chunk_ms: u64,
    /// Of a stream, from one chunk to the next. Time in which the reader wants none does not count.
    pub between_chunks_ms: u64,
    /// For the whole answer, waiting and repetitions included.
    pub total_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect_ms: 5_000, first_chunk_ms: 60_000, between_chunks_ms: 60_000, total_ms: 600_000 }
    }
}

impl Timeouts {
    pub(crate) fn connect(&self) -> Duration {
        Duration::from_millis(self.connect_ms)
    }

    pub(crate) fn first_chunk(&self) -> Duration {
        Duration::from_millis(self.first_chunk_ms)
    }

    pub(crate) fn between_chunks(&self) -> Duration {
        Duration::from_millis(self.between_chunks_ms)
    }

    pub(crate) fn total(&self) -> Duration {
        Duration::from_millis(self.total_ms)
    }
}

/// How often a provider is asked again before the first chunk has come.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryConfig {
    /// Times that it is asked again.
    pub retries: u32,
    /// Longest first pause, milliseconds; it doubles each time, and each pause is a random part, at least half, of it.
    pub first_pause_ms: u64,
    /// Longest pause, milliseconds. A provider that wants more (Retry-After) is not asked again.
    pub max_pause_ms: u64,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { retries: 2, first_pause_ms: 250, max_pause_ms: 8_000 }
    }
}

/// How a loopback answers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoopbackConfig {
    /// Chunks a second of each stream; 0 is as fast as they are taken.
    pub chunks_per_second: f64,
    /// Bytes of text in a chunk; more where a character is longer.
    pub chunk_bytes: usize,
}

impl Default for LoopbackConfig {
    fn default() -> Self {
        Self { chunks_per_second: 50.0, chunk_bytes: 16 }
    }
}

/// What is impossible in a configuration, by key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigFault {
    /// A number is out of its range.
    #[error("{key} of provider `{provider}` is {value}, allowed are {min} to {max}")]
    Range {
        /// Whose; empty for those of all providers.
        provider: String,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A provider has no name.
    #[error("provider {index} of the configuration has no name: give it one")]
    NoName {
        /// Counted from 0.
        index: usize,
    },
    /// Two providers have one name.
    #[error("two providers are called `{provider}`: rename one of them")]
    TwiceNamed {
        /// The name.
        provider: String,
    },
    /// A key names a provider that there is not.
    #[error("{key} names the provider `{named}`, which is not configured")]
    NoSuchProvider {
        /// The key.
        key: &'static str,
        /// The name.
        named: String,
    },
    /// A provider would never be asked.
    #[error(
        "provider `{provider}` names no models and is neither the default nor anybody's fail_over: nobody would ask it"
    )]
    NoModels {
        /// Its name.
        provider: String,
    },
    /// The variable that is to hold a key does not, or holds one that cannot be sent.
    #[error("the environment variable {variable}, key_env of provider `{provider}`, {problem}")]
    Key {
        /// Its name.
        provider: String,
        /// The variable.
        variable: String,
        /// What is wrong with it; not its value.
        problem: &'static str,
    },
    /// A URL that cannot be used.
    #[error("base_url of provider `{provider}` {problem}")]
    BaseUrl {
        /// Its name.
        provider: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file of certificate authorities cannot be used.
    #[error("ca_file {path} of provider `{provider}` {problem}")]
    CaFile {
        /// Its name.
        provider: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// This program has been built without that kind of provider.
    #[error(
        "provider `{provider}` is of the kind openai, which this build lacks: build with the feature `openai`"
    )]
    NotBuilt {
        /// Its name.
        provider: String,
    },
}

impl ProvidersConfig {
    /// Checks every value against its range, and that all names have an owner.
    ///
    /// # Errors
    ///
    /// What is wrong, by provider and key.
    pub fn check(&self) -> Result<(), ConfigFault> {
        range("", "max_concurrent", self.max_concurrent, 1, REQUESTS_LIMIT)?;
        range("", "max_waiting", self.max_waiting, 0, REQUESTS_LIMIT)?;
        range("", "max_request_bytes", self.max_request_bytes, 1, 1 << 40)?;
        let names = self.names()?;
        let exists = |key, named: &String| {
            if names.contains(named.as_str()) {
                return Ok(());
            }
            Err(ConfigFault::NoSuchProvider { key, named: named.clone() })
        };
        self.default.iter().try_for_each(|named| exists("default", named))?;
        for provider in &self.providers {
            provider.fail_over.iter().try_for_each(|named| exists("fail_over", named))?;
            provider.check()?;
            if provider.models().is_empty() && !self.is_named(&provider.name) {
                return Err(ConfigFault::NoModels { provider: provider.name.clone() });
            }
        }
        Ok(())
    }

    fn names(&self) -> Result<BTreeSet<&str>, ConfigFault> {
        let mut names = BTreeSet::new();
        for (index, provider) in self.providers.iter().enumerate() {
            if provider.name.is_empty() {
                return Err(ConfigFault::NoName { index });
            }
            if !names.insert(provider.name.as_str()) {
                return Err(ConfigFault::TwiceNamed { provider: provider.name.clone() });
            }
        }
        Ok(names)
    }

    fn is_named(&self, name: &String) -> bool {
        self.default.as_ref() == Some(name) || self.providers.iter().any(|p| p.fail_over.contains(name))
    }
}

impl ProviderConfig {
    /// The patterns of models that it answers for.
    pub(crate) fn models(&self) -> Vec<String> {
        if self.models.is_empty() && self.kind == ProviderKind::Loopback {
            return vec!["loopback".into(), "loopback-*".into()];
        }
        self.models.clone()
    }

    fn check(&self) -> Result<(), ConfigFault> {
        let name = &self.name;
        let time = |key, value| range(name, key, value, 1, TIME_LIMIT_MS);
        range(name, "max_concurrent", self.max_concurrent, 1, REQUESTS_LIMIT)?;
        range(name, "max_waiting", self.max_waiting, 0, REQUESTS_LIMIT)?;
        range(name, "max_answer", self.max_answer, 1, 1 << 30)?;
        time("connect_ms", self.timeouts.connect_ms)?;
        time("first_chunk_ms", self.timeouts.first_chunk_ms)?;
        time("between_chunks_ms", self.timeouts.between_chunks_ms)?;
        time("total_ms", self.timeouts.total_ms)?;
        range(name, "retries", self.retry.retries, 0, 10u32)?;
        time("first_pause_ms", self.retry.first_pause_ms)?;
        time("max_pause_ms", self.retry.max_pause_ms)?;
        range(name, "chunk_bytes", self.loopback.chunk_bytes, 1, 1 << 20)?;
        let pace = self.loopback.chunks_per_second;
        if !(0.0..=1e6).contains(&pace) {
            let value = pace.to_string();
            return Err(ConfigFault::Range {
                provider: name.clone(),
                key: "chunks_per_second",
                value,
                min: 0,
                max: 1_000_000,
            });
        }
        Ok(())
    }
}

fn range<T>(provider: &str, key: &'static str, value: T, min: T, max: T) -> Result<(), ConfigFault>
where
    T: PartialOrd + Copy + std::fmt::Display + TryInto<u64>,
{
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let [min, max] = [min, max].map(|bound| bound.try_into().unwrap_or(u64::MAX));
    Err(ConfigFault::Range { provider: provider.into(), key, value: value.to_string(), min, max })
}

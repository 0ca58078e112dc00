//! What a server's refusals mean, and how much of its sentences may be passed on.

use crate::messages::AIRequest;
use crate::provider::ProviderError;
use hyper::HeaderMap;
use hyper::header::{DATE, HeaderValue, RETRY_AFTER};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// Longest sentence of a server that is passed on, bytes.
const SENTENCE_MAX: usize = 300;
/// Bytes in a row that a sentence may have in common with the request.
const COMMON_MAX: usize = 16;
/// Requests longer than this are not searched for what a sentence says; then the sentence is left out.
const SEARCHED_MAX: usize = 128 << 10;

/// What was found in an answer.
#[derive(Debug)]
pub enum Found {
    /// The server says that it refuses, or has failed.
    Refusal(Refusal),
    /// The server's filter stopped the answer.
    Filtered,
    /// It ends in the middle.
    Cut,
    /// It makes no sense, and why; nothing of it is quoted.
    Protocol(String),
}

/// What servers write under `error`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Refusal {
    /// As OpenAI does.
    Detailed {
        /// A sentence.
        #[serde(default)]
        message: Option<String>,
        /// A word.
        #[serde(default, rename = "type")]
        kind: Option<Word>,
        /// Another one, or the HTTP status.
        #[serde(default)]
        code: Option<Word>,
    },
    /// Only a sentence.
    Sentence(String),
    /// Something else.
    Other(serde::de::IgnoredAny),
}

/// A word or a number.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Word {
    /// A word.
    Text(String),
    /// A number.
    Number(i64),
    /// Something else.
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    error: Option<Refusal>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    detail: Option<Refusal>,
}

/// Who was asked for what.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub provider: &'a str,
    pub models: &'a [String],
    pub request: Option<&'a AIRequest>,
    pub key: Option<&'a HeaderValue>,
}

/// The same, for as long as a stream lives.
pub struct Naming {
    provider: String,
    models: Vec<String>,
    request: Arc<AIRequest>,
    key: Option<HeaderValue>,
}

impl Naming {
    pub fn new(asked: Asked<'_>, request: &Arc<AIRequest>) -> Self {
        let (provider, models) = (asked.provider.to_owned(), asked.models.to_vec());
        Self { provider, models, request: Arc::clone(request), key: asked.key.cloned() }
    }

    pub fn provider(&self) -> &str {
        &self.provider
    }

    /// The error that `found` is.
    pub fn name(&self, found: Found) -> ProviderError {
        let Self { provider, models, request, key } = self;
        of_answer(Asked { provider, models, request: Some(request), key: key.as_ref() }, found)
    }
}

impl Refusal {
    fn message(&self) -> &str {
        match self {
            Self::Detailed { message, .. } => message.as_deref().unwrap_or_default(),
            Self::Sentence(message) => message,
            Self::Other(_) => "",
        }
    }

    /// The first of its words that is one; servers repeat the status as a number.
    fn code(&self) -> Option<String> {
        let Self::Detailed { kind, code, .. } = self else { return None };
        let word = |word: &Option<Word>| match word {
            Some(Word::Text(text)) if !text.is_empty() => Some(shortened(text)),
            _ => None,
        };
        word(code).or_else(|| word(kind))
    }

    fn status(&self) -> Option<u16> {
        match self {
            Self::Detailed { code: Some(Word::Number(status)), .. } => u16::try_from(*status).ok(),
            Self::Detailed { code: Some(Word::Text(status)), .. } => status.parse().ok(),
            _ => None,
        }
        .filter(|status| (400..600).contains(status))
    }
}

/// The error that an answer with an HTTP status other than 200 is.
pub fn of_status(asked: Asked<'_>, status: u16, headers: &HeaderMap, body: &[u8]) -> ProviderError {
    let told = serde_json::from_slice::<ErrorBody>(body).ok();
    let refusal = told.and_then(|told| told.error.or(told.detail).or(told.message.map(Refusal::Sentence)));
    let refusal = refusal.unwrap_or(Refusal::Sentence(String::new()));
    classified(asked, status, &refusal, retry_after(headers))
}

/// The error that something in an answer with HTTP status 200 is.
pub fn of_answer(asked: Asked<'_>, found: Found) -> ProviderError {
    let provider = asked.provider.to_owned();
    match found {
        Found::Protocol(what) => ProviderError::Protocol { provider, what },
        Found::Cut => ProviderError::Interrupted { provider },
        Found::Filtered => ProviderError::Failed {
            provider,
            code: Some("content_filter".into()),
            message: "its content filter stopped the answer".into(),
        },
        Found::Refusal(refusal) => match status_of(&refusal) {
            Some(status) => classified(asked, status, &refusal, None),
            None => {
                ProviderError::Failed { provider, code: refusal.code(), message: sentence(asked, &refusal) }
            }
        },
    }
}

/// The status that a refusal would have, had it not come with 200.
fn status_of(refusal: &Refusal) -> Option<u16> {
    refusal.status().or_else(|| match refusal.code()?.as_str() {
        "rate_limit_exceeded" | "insufficient_quota" | "rate_limit_error" => Some(429),
        "invalid_api_key" | "authentication_error" => Some(401),
        "invalid_request_error" | "context_length_exceeded" => Some(400),
        "model_not_found" => Some(404),
        "overloaded_error" | "service_unavailable" => Some(503),
        _ => None,
    })
}

fn classified(
    asked: Asked<'_>,
    status: u16,
    refusal: &Refusal,
    retry_after: Option<Duration>,
) -> ProviderError {
    let provider = asked.provider.to_owned();
    let (code, message) = (refusal.code(), sentence(asked, refusal));
    match status {
        401 | 403 => ProviderError::Unauthorized { provider, status },
        404 if is_about_the_model(refusal) => ProviderError::UnknownModel {
            model: asked.request.map(|request| request.model.clone()).unwrap_or_default(),
            known: asked.models.to_vec(),
        },
        429 => ProviderError::RateLimited { provider, retry_after, code },
        408 | 500.. => {
            let what = if message.is_empty() {
                format!("HTTP {status}")
            } else {
                format!("HTTP {status}: {message}")
            };
            ProviderError::Unavailable { provider, what, retry_after }
        }
        400..500 => {
            let message = if message.is_empty() { "it does not say why".into() } else { message };
            ProviderError::BadRequest { provider, status, code, message }
        }
        // Redirections too: a key is not carried elsewhere.
        _ => ProviderError::Protocol {
            provider,
            what: format!("it answered with HTTP {status}, which is not followed"),
        },
    }
}

fn is_about_the_model(refusal: &Refusal) -> bool {
    let message = refusal.message().to_ascii_lowercase();
    refusal.code().as_deref() == Some("model_not_found")
        || message.contains("model") && (message.contains("not found") || message.contains("does not exist"))
}

/// How long a server wants to be left alone. A date is set against the server's own clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    if let Some(milliseconds) = text("retry-after-ms").and_then(|value| value.parse::<f64>().ok()) {
        return Duration::try_from_secs_f64(milliseconds / 1e3).ok();
    }
    let value = text(RETRY_AFTER.as_str())?;
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let [then, now] = [value, text(DATE.as_str())?].map(|date| httpdate::parse_http_date(date).ok());
    Some(then?.duration_since(now?).unwrap_or_default())
}

/// At most 100 characters, without controls.
pub fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

/// What a server says, on one line, shortened; nothing if it repeats the key or what the request says.
fn sentence(asked: Asked<'_>, refusal: &Refusal) -> String {
    let message = refusal.message();
    let repeats = asked.key.is_some_and(|key| repeats_key(message, key))
        || asked.request.is_some_and(|request| repeats_request(message, request));
    if repeats {
        return "(its sentence is left out, since it repeats what it was sent)".into();
    }
    let mut line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > SENTENCE_MAX {
        let end = (0..=SENTENCE_MAX).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
        line.truncate(end);
        line.push('…');
    }
    line.trim().to_owned()
}

fn repeats_key(message: &str, key: &HeaderValue) -> bool {
    let key = key.to_str().unwrap_or_default().trim_start_matches("Bearer ");
    !key.is_empty() && (message.contains(key) || common(message, &[key], 8))
}

fn repeats_request(message: &str, request: &AIRequest) -> bool {
    let mut said: Vec<&str> = request.messages.iter().map(|message| message.content.as_str()).collect();
    said.extend(request.system_prompt.as_deref());
    said.retain(|text| !text.trim().is_empty());
    let total: usize = said.iter().map(|text| text.len()).sum();
    let whole = said.iter().any(|text| text.len() >= 4 && message.contains(text.trim()));
    whole || !message.is_empty() && total > SEARCHED_MAX || common(message, &said, COMMON_MAX)
}

/// Whether `message`, as far as it is passed on, has `len` bytes in a row from one of `said`; up to half as many more may
/// go unseen.
fn common(message: &str, said: &[&str], len: usize) -> bool {
    let bytes = &message.as_bytes()[..message.len().min(SENTENCE_MAX + len)];
    let mut windows = (0..bytes.len()).step_by(len / 2).filter_map(|at| bytes.get(at..at + len));
    windows.any(|window| said.iter().any(|text| contains(text.as_bytes(), window)))
}

fn contains(text: &[u8], window: &[u8]) -> bool {
    text.windows(window.len()).any(|here| here == window)
}

//! Providers that speak the OpenAI-compatible HTTP API, with answers streamed as server-sent events.
//!
//! Trust: the server may send anything, at any pace, or stop at any byte. Each length is bounded, each fault is an error of
//! this one call. Its own sentences are passed on shortened, and without what the request said ([`fault`]).

mod answer;
mod assemble;
mod endpoint;
mod events;
mod fault;
mod http;
mod request;
mod tls;

use super::{
    BoxFuture, Call, ChunkStream, ConfigFault, MaxTokensField, Provider, ProviderConfig, ProviderError,
};
use crate::messages::AIResponse;
use endpoint::Endpoint;
use fault::Asked;
use http::{Body, Http};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use std::fmt;

/// The trace that a request belongs to, as W3C Trace Context has it.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Most bytes of a body that explains an error.
const ERROR_BODY_MAX: usize = 64 << 10;

/// A service with an OpenAI-compatible API.
pub struct OpenAi {
    name: String,
    http: Http,
    key: Option<HeaderValue>,
    models: Vec<String>,
    max_tokens_field: MaxTokensField,
    stream_usage: bool,
    max_answer: usize,
}

impl OpenAi {
    /// The provider that `config` describes; `variable` looks up environment variables.
    ///
    /// # Errors
    ///
    /// [`ConfigFault`]: the key, the base URL or the file of authorities cannot be used.
    pub fn from_config(
        config: &ProviderConfig,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigFault> {
        let endpoint = Endpoint::parse(&config.base_url)
            .map_err(|problem| ConfigFault::BaseUrl { provider: config.name.clone(), problem })?;
        let key = key(config, variable)?;
        if key.is_some() && !endpoint.is_tls && !endpoint.is_local() {
            tracing::warn!(provider = config.name, "the key goes over the network unencrypted: use https");
        }
        let tls = if endpoint.is_tls { Some(tls::connector(config)?) } else { None };
        Ok(Self {
            name: config.name.clone(),
            http: Http::new(&config.name, endpoint, tls, config.timeouts.connect()),
            key,
            models: config.models.clone(),
            max_tokens_field: config.max_tokens_field,
            stream_usage: config.stream_usage,
            max_answer: config.max_answer,
        })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        accept: &'static str,
        body: Vec<u8>,
    ) -> Request<Full<Bytes>> {
        let endpoint = self.http.endpoint();
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = method;
        *request.uri_mut() = endpoint.path(path);
        let headers = request.headers_mut();
        headers.insert(HOST, endpoint.host_header.clone());
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("doorbell/", env!("CARGO_PKG_VERSION"))));
        if let Some(key) = &self.key {
            headers.insert(AUTHORIZATION, key.clone());
        }
        request
    }

    /// Posts the call and waits for an answer that is no error.
    async fn post(&self, call: &Call, stream: bool) -> Result<Response<Body>, ProviderError> {
        let wire = request::Options {
            max_tokens_field: self.max_tokens_field,
            stream,
            usage: stream && self.stream_usage,
        };
        let body = request::body(&call.request, wire);
        let accept = if stream { "text/event-stream" } else { "application/json" };
        let mut request = self.request(Method::POST, "/chat/completions", accept, body);
        if let Some(traceparent) = call.traceparent {
            // Hexadecimal digits and hyphens: any header may have them.
            let value = HeaderValue::from_bytes(&traceparent.to_text());
            request.headers_mut().extend(value.ok().map(|value| (TRACEPARENT, value)));
        }
        let answer = self.http.send(request).await?;
        if answer.status() == StatusCode::OK {
            Ok(answer)
        } else {
            Err(self.refused(answer, Some(call)).await)
        }
    }

    /// What an answer that is an error means.
    async fn refused(&self, answer: Response<Body>, call: Option<&Call>) -> ProviderError {
        let (head, mut body) = answer.into_parts();
        // Without its explanation an error is still the error that its status says.
        let explanation = body.read(ERROR_BODY_MAX).await.unwrap_or_default();
        fault::of_status(self.asked(call), head.status.as_u16(), &head.headers, &explanation)
    }

    fn asked<'a>(&'a self, call: Option<&'a Call>) -> Asked<'a> {
        Asked {
            provider: &self.name,
            models: &self.models,
            request: call.map(|call| &*call.request),
            key: self.key.as_ref(),
        }
    }

    async fn whole(&self, call: &Call) -> Result<AIResponse, ProviderError> {
        let (_, mut body) = self.post(call, false).await?.into_parts();
        // JSON escapes a byte by six at most.
        let bytes =
            body.read(self.max_answer.saturating_mul(6)).await.map_err(|fault| fault.named(&self.name))?;
        answer::read(&bytes).map_err(|found| fault::of_answer(self.asked(Some(call)), found))
    }

    async fn streamed(&self, call: &Call) -> Result<ChunkStream, ProviderError> {
        let (head, mut body) = self.post(call, true).await?.into_parts();
        let kind = head.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let naming = fault::Naming::new(self.asked(Some(call)), &call.request);
        match kind.as_str() {
            "text/event-stream" | "" => {
                Ok(call.cancel.guard(events::Events::new(body, naming, self.max_answer)))
            }
            // A server that does not stream answers with the whole, or with an error.
            "application/json" => {
                let limit = self.max_answer.saturating_mul(6);
                let bytes = body.read(limit).await.map_err(|fault| fault.named(&self.name))?;
                let whole =
                    answer::read(&bytes).map_err(|found| fault::of_answer(self.asked(Some(call)), found))?;
                Ok(call.cancel.guard(answer::Chunks::new(whole)))
            }
            _ => Err(ProviderError::Protocol {
                provider: self.name.clone(),
                what: format!(
                    "a stream of events was asked for, it answered with {:?}",
                    fault::shortened(&kind)
                ),
            }),
        }
    }

    async fn reachable(&self) -> Result<(), ProviderError> {
        let answer =
            self.http.send(self.request(Method::GET, "/models", "application/json", Vec::new())).await?;
        match answer.status().as_u16() {
            // Not every server lists its models.
            200..=299 | 404 | 405 | 501 => Ok(()),
            _ => Err(self.refused(answer, None).await),
        }
    }
}

impl Provider for OpenAi {
    fn name(&self) -> &str {
        &self.name
    }

    fn chat<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        Box::pin(call.cancel.run(self.whole(call)))
    }

    fn stream<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<ChunkStream, ProviderError>> {
        Box::pin(call.cancel.run(self.streamed(call)))
    }

    fn health(&self) -> BoxFuture<'_, Result<(), ProviderError>> {
        Box::pin(self.reachable())
    }
}

/// The key, as the header that carries it; never printed, since it is marked as sensitive.
fn key(
    config: &ProviderConfig,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<HeaderValue>, ConfigFault> {
    let Some(name) = &config.key_env else { return Ok(None) };
    let wrong = |problem| ConfigFault::Key { provider: config.name.clone(), variable: name.clone(), problem };
    let value = variable(name).ok_or_else(|| wrong("is not set, or is no text: put the key into it"))?;
    let value = value.trim();
    if value.is_empty() {
        return Err(wrong("is empty: put the key into it"));
    }
    let mut header = HeaderValue::try_from(format!("Bearer {value}"))
        .map_err(|_invalid| wrong("has characters that cannot be sent: put nothing but the key into it"))?;
    header.set_sensitive(true);
    Ok(Some(header))
}

impl fmt::Debug for OpenAi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenAi")
            .field("name", &self.name)
            .field("endpoint", self.http.endpoint())
            .field("key", &self.key.as_ref().map(|_| "…"))
            .finish_non_exhaustive()
    }
}

//! Connections to one server: HTTP/1.1, one request at a time on each, kept for the next one.
//!
//! A connection belongs to whoever reads its answer; if that is dropped before the end, the connection is closed.

use super::endpoint::Endpoint;
use crate::provider::{Phase, ProviderError};
use http_body_util::Full;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Connections that are kept for later, and how long.
const IDLE_MAX: usize = 16;
const IDLE_TIME: Duration = Duration::from_secs(30);
/// What a connection reads ahead at most, headers of an answer included, bytes.
const READ_AHEAD: usize = 64 << 10;

/// One server.
pub struct Http {
    provider: String,
    endpoint: Endpoint,
    tls: Option<TlsConnector>,
    connect_limit: Duration,
    idle: Arc<Idle>,
}

/// A connection. Dropped, it is closed.
struct Link {
    sender: http1::SendRequest<Full<Bytes>>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        // The task owns the socket.
        self.task.abort();
    }
}

/// Connections without a request, the one used last at the end.
#[derive(Default)]
struct Idle(Mutex<Vec<(Link, Instant)>>);

impl Idle {
    fn put(&self, link: Link) {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|(link, since)| !link.sender.is_closed() && since.elapsed() < IDLE_TIME);
        if links.len() < IDLE_MAX {
            links.push((link, Instant::now()));
        }
    }

    fn take(&self) -> Option<Link> {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((link, since)) = links.pop() {
            if link.sender.is_ready() && since.elapsed() < IDLE_TIME {
                return Some(link);
            }
        }
        None
    }
}

impl Http {
    pub fn new(
        provider: &str,
        endpoint: Endpoint,
        tls: Option<TlsConnector>,
        connect_limit: Duration,
    ) -> Self {
        Self { provider: provider.into(), endpoint, tls, connect_limit, idle: Arc::default() }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends a request and waits for the head of its answer.
    pub async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Body>, ProviderError> {
        while let Some(mut link) = self.idle.take() {
            match link.sender.try_send_request(request).await {
                Ok(answer) => return Ok(self.with_link(answer, link)),
                // The server had closed it; nothing was sent.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(BodyFault::Http(error.into_error()).before_the_answer(&self.provider)),
                },
            }
        }
        let mut link = self.connect().await?;
        match link.sender.send_request(request).await {
            Ok(answer) => Ok(self.with_link(answer, link)),
            Err(error) => Err(BodyFault::Http(error).before_the_answer(&self.provider)),
        }
    }

    fn with_link(&self, answer: Response<Incoming>, link: Link) -> Response<Body> {
        answer.map(|incoming| Body { incoming, link: Some(link), idle: Arc::clone(&self.idle) })
    }

    async fn connect(&self) -> Result<Link, ProviderError> {
        timeout(self.connect_limit, self.connect_in_any_time()).await.unwrap_or_else(|_elapsed| {
            let (provider, phase, after) = (self.provider.clone(), Phase::Connect, self.connect_limit);
            Err(ProviderError::Timeout { provider, phase, after })
        })
    }

    async fn connect_in_any_time(&self) -> Result<Link, ProviderError> {
        let Endpoint { host, port, .. } = &self.endpoint;
        let socket = TcpStream::connect((host.as_str(), *port))
            .await
            .map_err(|error| self.unreachable("connect", error))?;
        // Requests are written at once and whole; without this the kernel might wait for more.
        socket.set_nodelay(true).map_err(|error| self.unreachable("set up the socket", error))?;
        let Some(tls) = &self.tls else { return self.handshake(socket).await };
        let name = ServerName::try_from(host.clone())
            .map_err(|_invalid| self.unreachable("use TLS", io::Error::other("the host is no name")))?;
        let encrypted =
            tls.connect(name, socket).await.map_err(|error| self.unreachable("agree on TLS", error))?;
        self.handshake(encrypted).await
    }

    async fn handshake<S>(&self, socket: S) -> Result<Link, ProviderError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(READ_AHEAD)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(|error| BodyFault::Http(error).before_the_answer(&self.provider))?;
        let task = tokio::spawn(async move {
            // Whoever sent a request learns of the error; without one nobody wants to.
            connection.await.ok();
        });
        Ok(Link { sender, task })
    }

    fn unreachable(&self, what: &str, error: io::Error) -> ProviderError {
        let Endpoint { host, port, .. } = &self.endpoint;
        let what = format!("cannot {what} with {host} port {port}: {error}");
        ProviderError::Unavailable { provider: self.provider.clone(), what, retry_after: None }
    }
}

/// The body of an answer, with the connection that it comes by.
pub struct Body {
    incoming: Incoming,
    link: Option<Link>,
    idle: Arc<Idle>,
}

/// Why a body cannot be read on.
pub enum BodyFault {
    Http(hyper::Error),
    TooLong { max: usize },
}

impl Body {
    /// The next piece; `None` at the end, which gives the connection to the next request.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, hyper::Error>>> {
        loop {
            match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Ok(piece) = frame.into_data() {
                        return Poll::Ready(Some(Ok(piece)));
                    }
                    // Trailers say nothing to us.
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    self.link.take().into_iter().for_each(|link| self.idle.put(link));
                    return Poll::Ready(None);
                }
            }
        }
    }

    /// All of it, of `max` bytes at most.
    pub async fn read(&mut self, max: usize) -> Result<Vec<u8>, BodyFault> {
        let mut bytes = Vec::new();
        while let Some(piece) = poll_fn(|cx| self.poll_piece(cx)).await {
            let piece = piece.map_err(BodyFault::Http)?;
            if bytes.len() + piece.len() > max {
                return Err(BodyFault::TooLong { max });
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

impl BodyFault {
    /// The error of a provider that had begun to answer.
    pub fn named(self, provider: &str) -> ProviderError {
        let provider = provider.to_owned();
        match self {
            Self::TooLong { max } => {
                ProviderError::Protocol { provider, what: format!("its answer is longer than {max} bytes") }
            }
            Self::Http(error) if is_no_http(&error) => {
                ProviderError::Protocol { provider, what: format!("its answer is no HTTP: {error}") }
            }
            Self::Http(_) => ProviderError::Interrupted { provider },
        }
    }

    /// The error of a provider that had not begun to answer.
    fn before_the_answer(self, provider: &str) -> ProviderError {
        match self {
            Self::Http(error) if !is_no_http(&error) => {
                let what = format!("it closed the connection without an answer ({error})");
                ProviderError::Unavailable { provider: provider.into(), what, retry_after: None }
            }
            other => other.named(provider),
        }
    }
}

/// Whether bytes came that make no sense, rather than none.
fn is_no_http(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    let invalid = source.is_some_and(|source| {
        matches!(source.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData)
    });
    error.is_parse() || error.is_parse_status() || invalid
}

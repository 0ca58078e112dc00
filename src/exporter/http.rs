//! The text of Prometheus by HTTP, at `/metrics`. It is read on this machine only, by whoever can connect.
//!
//! Bound:  [`CONNECTIONS_MAX`] connections, the oldest of which makes room for the next; [`HEADER_TIME`] for a request,
//!         whose head has at most [`HEAD_MAX`] bytes and whose body is not read; [`TOTAL_TIME`] for all; one request each.
//!         So whoever is slow, or opens many, holds up nobody else.

use crate::MetricsReader;
use crate::config::MetricsAddress;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;
/// From the first byte of a connection to the end of the head of its request.
const HEADER_TIME: Duration = Duration::from_secs(2);
/// From the beginning of a connection to its end.
const TOTAL_TIME: Duration = Duration::from_secs(5);
/// Bytes that are buffered for a connection: the head of a request must fit. The least that hyper takes.
const HEAD_MAX: usize = 8 << 10;
/// Before the next try when the kernel gives no connection.
const PAUSE: Duration = Duration::from_millis(100);

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, MetricsAddress),
}

impl Listener {
    /// Takes an address; from here on readers queue. To be called within a runtime.
    ///
    /// # Errors
    ///
    /// What the kernel refuses; `AddrInUse` if somebody serves there.
    pub fn bind(address: &MetricsAddress) -> io::Result<Self> {
        match address {
            MetricsAddress::Tcp(at) => {
                let listener = std::net::TcpListener::bind(at)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(TcpListener::from_std(listener)?))
            }
            MetricsAddress::Unix(path) => {
                remove_stale(path)?;
                let listener = std::os::unix::net::UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(UnixListener::from_std(listener)?, address.clone()))
            }
        }
    }

    /// The address, with the port that the kernel chose.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn address(&self) -> io::Result<MetricsAddress> {
        match self {
            Self::Tcp(listener) => Ok(MetricsAddress::Tcp(listener.local_addr()?)),
            Self::Unix(_, address) => Ok(address.clone()),
        }
    }

    /// Serves for ever.
    pub async fn serve(self, reader: MetricsReader) {
        let mut connections: VecDeque<JoinHandle<()>> = VecDeque::with_capacity(CONNECTIONS_MAX);
        loop {
            let connection = match &self {
                Self::Tcp(listener) => {
                    listener.accept().await.map(|(stream, _)| tokio::spawn(answer(stream, reader.clone())))
                }
                Self::Unix(listener, _) => match listener.accept().await {
                    Ok((stream, _)) if !is_ours(&stream) => continue,
                    Ok((stream, _)) => Ok(tokio::spawn(answer(stream, reader.clone()))),
                    Err(error) => Err(error),
                },
            };
            let Ok(connection) = connection else {
                // No descriptors, or a reader that is gone already: neither ends the server.
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            connections.retain(|connection| !connection.is_finished());
            if connections.len() >= CONNECTIONS_MAX
                && let Some(oldest) = connections.pop_front()
            {
                oldest.abort();
            }
            connections.push_back(connection);
        }
    }
}

/// Removes the socket that a server has left which is gone.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::from(io::ErrorKind::AddrInUse)),
        // What is no socket refuses, too.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match is_socket(path)? {
            true => std::fs::remove_file(path),
            false => Err(io::Error::from(io::ErrorKind::AlreadyExists)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_socket(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

fn is_ours(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw())
}

/// One connection, from beginning to end.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, reader: MetricsReader) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(&request, &reader);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(HEAD_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // Whatever a reader does wrong ends its connection, and is nobody's else business.
    if let Ok(Err(error)) = timeout(TOTAL_TIME, connection).await {
        tracing::debug!(%error, "a reader of the metrics");
    }
}

fn respond(request: &Request<Incoming>, reader: &MetricsReader) -> Response<Full<Bytes>> {
    let text = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    };
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response =
            text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD are answered.\n".to_owned());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if request.uri().path() != "/metrics" {
        return text(StatusCode::NOT_FOUND, "Metrics are at /metrics.\n".to_owned());
    }
    let mut response = text(StatusCode::OK, reader.export_prometheus());
    let prometheus = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, prometheus);
    response
}

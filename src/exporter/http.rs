//! The text of Prometheus by HTTP/1.1, at `/metrics`. It is read on this machine only, by whoever can connect.
//!
//! Bound:  [`CONNECTIONS_MAX`] connections, the oldest of which makes room for the next; [`HEADER_TIME`] for a request,
//!         whose head has at most [`HEAD_MAX`] bytes and whose body is not read; [`TOTAL_TIME`] for all; one request each,
//!         one read of it in a turn. So whoever is slow, or opens many, holds up nobody else.
//! Memory: httparse reads requests, the rest is by hand, for what a server library touches once somebody has asked stays
//!         resident: 0.9 MiB of code and heap, as measured (`docs/performance.md`, section Memory), for three answers.

use crate::MetricsReader;
use crate::config::MetricsAddress;
use crate::protocol::rendezvous;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;
/// From the first byte of a connection to the end of the head of its request.
const HEADER_TIME: Duration = Duration::from_secs(2);
/// From the beginning of a connection to its end.
const TOTAL_TIME: Duration = Duration::from_secs(5);
/// Bytes of the head of a request.
const HEAD_MAX: usize = 8 << 10;
/// Fields of a head.
const FIELDS_MAX: usize = 64;
/// Before the next try when the kernel gives no connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections at an address, and answers them.
#[derive(Debug)]
pub struct Server {
    /// The socket's file, if it has one; it goes before the socket does, which keeps its number from others.
    _file: Option<SocketFile>,
    listener: OwnedFd,
    address: MetricsAddress,
    reader: MetricsReader,
    /// The oldest first.
    connections: VecDeque<Connection>,
    /// No connection is taken before.
    rests_until: Option<Instant>,
}

impl Server {
    /// Takes an address; from here on readers queue.
    ///
    /// # Errors
    ///
    /// What the kernel refuses; `AddrInUse` if somebody serves there.
    pub fn bind(address: &MetricsAddress, reader: MetricsReader) -> io::Result<Self> {
        let (listener, file, address) = match address {
            MetricsAddress::Tcp(at) => {
                let listener = std::net::TcpListener::bind(at)?;
                listener.set_nonblocking(true)?;
                // With the port that the kernel chose.
                let address = MetricsAddress::Tcp(listener.local_addr()?);
                (OwnedFd::from(listener), None, address)
            }
            MetricsAddress::Unix(path) => {
                remove_stale(path)?;
                let listener = std::os::unix::net::UnixListener::bind(path)?;
                let file = SocketFile::just_bound(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                listener.set_nonblocking(true)?;
                (OwnedFd::from(listener), Some(file), address.clone())
            }
        };
        let connections = VecDeque::with_capacity(CONNECTIONS_MAX);
        Ok(Self { listener, _file: file, address, reader, connections, rests_until: None })
    }

    /// The address, with the port that the kernel chose.
    pub fn address(&self) -> &MetricsAddress {
        &self.address
    }

    /// Adds what is to be waited for.
    pub fn watch<'a>(&'a self, waiting: &mut Vec<PollFd<'a>>) {
        // Not listened to while it rests: it would wake us at once.
        let listens = if self.rests_until.is_none() { PollFlags::IN } else { PollFlags::empty() };
        waiting.push(PollFd::new(&self.listener, listens));
        for connection in &self.connections {
            waiting.push(PollFd::new(&connection.socket, connection.waits_for()));
        }
    }

    /// When something is to be done whatever comes.
    pub fn due(&self) -> Option<Instant> {
        self.connections.iter().map(Connection::ends_at).chain(self.rests_until).min()
    }

    /// Does what there is to do; `came` says of what [`Server::watch`] added whether anything has come.
    pub fn go_on(&mut self, came: &[bool]) {
        let now = Instant::now();
        let Self { connections, reader, .. } = self;
        let mut came = came.iter().copied();
        let listener_came = came.next().unwrap_or_default();
        connections.retain_mut(|connection| {
            let came = came.next().unwrap_or_default();
            now < connection.ends_at() && (!came || connection.go_on(reader))
        });
        if self.rests_until.is_some_and(|until| until <= now) {
            self.rests_until = None;
        }
        if listener_came && self.rests_until.is_none() {
            self.accept(now);
        }
    }

    /// Takes one connection.
    fn accept(&mut self, now: Instant) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => {
                if matches!(self.address, MetricsAddress::Unix(_)) && !rendezvous::is_ours(&socket) {
                    return;
                }
                if self.connections.len() >= CONNECTIONS_MAX {
                    self.connections.pop_front();
                }
                self.connections.push_back(Connection::new(socket, now));
            }
            // A reader that is gone already.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            // No descriptors, say: that does not end the server.
            Err(_) => self.rests_until = Some(now + PAUSE),
        }
    }
}

/// The file of a socket: removed with it, unless another has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and number of the file.
    identity: (u64, u64),
}

impl SocketFile {
    fn just_bound(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: Self::identity(path)? })
    }

    fn identity(path: &Path) -> io::Result<(u64, u64)> {
        let file = std::fs::symlink_metadata(path)?;
        Ok((file.dev(), file.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = Self::identity(&self.path).is_ok_and(|found| found == self.identity);
        if is_ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "could not remove the socket of the metrics");
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

/// What is being done for a reader.
#[derive(Debug)]
enum Stage {
    /// Its request comes; so much of the head is there.
    Head(Vec<u8>),
    /// It is answered: the answer, and how much of it has gone.
    Answer(Vec<u8>, usize),
    /// It has its answer. What it still sends is read and dropped, until it closes: to close before would take the answer
    /// away from it (RFC 9112, section 9.6).
    Over,
}

/// One connection, from beginning to end.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    begun: Instant,
    stage: Stage,
}

impl Connection {
    fn new(socket: OwnedFd, begun: Instant) -> Self {
        Self { socket, begun, stage: Stage::Head(Vec::new()) }
    }

    fn ends_at(&self) -> Instant {
        self.begun + if matches!(self.stage, Stage::Head(_)) { HEADER_TIME } else { TOTAL_TIME }
    }

    fn waits_for(&self) -> PollFlags {
        if matches!(self.stage, Stage::Answer(..)) { PollFlags::OUT } else { PollFlags::IN }
    }

    /// One read, or as much of the answer as there is room for; whether the connection goes on.
    fn go_on(&mut self, reader: &MetricsReader) -> bool {
        match &mut self.stage {
            Stage::Head(head) => {
                let mut bytes = [0; 1024];
                let Some(read) = receive(&self.socket, &mut bytes) else { return false };
                head.extend_from_slice(&bytes[..read]);
                let Some(answer) = answer(head, reader) else { return true };
                self.stage = Stage::Answer(answer, 0);
                self.send()
            }
            Stage::Answer(..) => self.send(),
            Stage::Over => receive(&self.socket, &mut [0; 1024]).is_some(),
        }
    }

    /// Sends what there is room for.
    fn send(&mut self) -> bool {
        let Stage::Answer(answer, sent) = &mut self.stage else { return true };
        while *sent < answer.len() {
            match rustix::net::send(&self.socket, &answer[*sent..], SendFlags::NOSIGNAL) {
                Ok(more) => *sent += more,
                Err(Errno::AGAIN | Errno::INTR) => return true,
                Err(_) => return false,
            }
        }
        self.stage = Stage::Over;
        rustix::net::shutdown(&self.socket, Shutdown::Write).is_ok()
    }
}

/// Reads what has come, if anything has; `None` at the end of the connection.
fn receive(socket: &OwnedFd, bytes: &mut [u8]) -> Option<usize> {
    match rustix::net::recv(socket, bytes, RecvFlags::empty()) {
        Ok((0, _)) => None,
        Ok((read, _)) => Some(read),
        Err(Errno::AGAIN | Errno::INTR) => Some(0),
        Err(_) => None,
    }
}

/// The answer to a request, once its head is complete, or can be none.
fn answer(head: &[u8], reader: &MetricsReader) -> Option<Vec<u8>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(head);
    let is_too_long = match parsed {
        Ok(httparse::Status::Complete(len)) => len > HEAD_MAX,
        Ok(httparse::Status::Partial) if head.len() <= HEAD_MAX => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => true,
        Err(_) => false,
    };
    if is_too_long {
        return Some(respond("431 Request Header Fields Too Large", "", "The request is too long.\n", true));
    }
    let (Ok(_), Some(method), Some(target)) = (parsed, request.method, request.path) else {
        return Some(respond("400 Bad Request", "", "This is no request of HTTP/1.\n", true));
    };
    if method != "GET" && method != "HEAD" {
        let allow = "allow: GET, HEAD\r\n";
        return Some(respond("405 Method Not Allowed", allow, "Only GET and HEAD are answered.\n", true));
    }
    let has_body = method == "GET";
    if path(target) != "/metrics" {
        return Some(respond("404 Not Found", "", "Metrics are at /metrics.\n", has_body));
    }
    Some(respond("200 OK", "", &reader.export_prometheus(), has_body))
}

/// The path of what is asked for: without a query, and without a server's name, which a proxy may send.
fn path(target: &str) -> &str {
    let target = target.split(['?', '#']).next().unwrap_or_default();
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

fn respond(status: &str, headers: &str, body: &str, has_body: bool) -> Vec<u8> {
    // The version of the format is that of the text; the other answers are text, too.
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: {}\r\n\
         {headers}connection: close\r\n\r\n",
        body.len()
    );
    let mut answer = head.into_bytes();
    if has_body {
        answer.extend_from_slice(body.as_bytes());
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn reader() -> MetricsReader {
        MetricsReader::default()
    }

    fn asked(request: &str) -> Option<String> {
        answer(request.as_bytes(), &reader()).map(|answer| String::from_utf8(answer).unwrap())
    }

    /// Goal:   R4.6, S12: a request is answered when its head is complete and not before, by what it asks for; what is none
    ///         is told so, and nobody can have us keep more than the head of a request.
    /// Method: requests as browsers, proxies and curl send them, cut at every byte; wrong ones; heads of every length
    ///         about the limit; empty lines before a request, which are passed over (RFC 9112, section 2.2).
    #[test]
    fn r4_6_s12_requests_are_answered_by_their_heads() {
        let whole = "GET /metrics?x=1 HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(asked(&whole[..end]), None, "{end}");
        }
        let text = Metrics::default().export_prometheus();
        let (head, body) =
            asked(whole).unwrap().split_once("\r\n\r\n").map(|(h, b)| (h.to_owned(), b.to_owned())).unwrap();
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n")
                && head.contains(&format!("content-length: {}\r\n", text.len()))
        );
        assert_eq!(body, text);
        let head_only = asked("HEAD http://localhost:9/metrics HTTP/1.0\r\n\r\n").unwrap();
        assert!(
            head_only.ends_with("\r\n\r\n")
                && head_only.contains(&format!("content-length: {}\r\n", text.len()))
        );
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404 "),
            ("GET http://localhost HTTP/1.1\r\n\r\n", "404 "),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", "404 "),
            ("PUT /metrics HTTP/1.1\r\n\r\n", "405 "),
            ("GET /metrics\r\n\r\n", "400 "),
            ("GET  /metrics HTTP/1.1\r\n\r\n", "400 "),
            ("GET /metrics HTTP/1.1 \r\n\r\n", "400 "),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400 "),
            ("\u{16}\u{3}\u{1}\r\n\r\n", "400 "),
        ] {
            let answer = asked(request).unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {answer}");
        }
        assert_eq!(asked("\r\n\r\n"), None);
        assert!(asked(&format!("\r\n{whole}")).unwrap().starts_with("HTTP/1.1 200 "));
        let many = "a: b\r\n".repeat(FIELDS_MAX + 1);
        assert!(asked(&format!("GET / HTTP/1.1\r\n{many}\r\n")).unwrap().starts_with("HTTP/1.1 431 "));
        for len in HEAD_MAX - 4..HEAD_MAX + 4 {
            let endless = "x".repeat(len);
            assert_eq!(asked(&endless).is_some(), len > HEAD_MAX, "{len}");
            assert!(asked(&format!("{endless}\r\n\r\n")).unwrap().starts_with("HTTP/1.1 4"));
        }
    }
}

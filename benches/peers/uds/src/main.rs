//! A unix stream socket, used as one does who knows it: frames, everything that has come answered in one write, epoll for
//! many connections. Sleeping (blocking reads), or polling with reads that do not block.

use peers_common::{Inbox, Link, Plan, Result, Serving, drive, fill, frame, say};
use rustix::event::{Timespec, epoll};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

const CHUNK: usize = 256 << 10;
const LISTENER: u64 = u64::MAX;

fn main() -> Result<()> {
    let plan = Plan::from_args();
    if plan.role == "server" { serve(&plan) } else { run_client(&plan) }
}

/// Which of many sockets are readable.
struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
    spins: bool,
}

impl Poller {
    fn new(spins: bool) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, events: Vec::with_capacity(1024), spins })
    }

    fn add(&self, fd: impl AsFd, number: u64) -> Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?;
        Ok(())
    }

    /// The numbers of those that are; waits for them as it was told.
    fn wait(&mut self, ready: &mut Vec<u64>) -> Result<()> {
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.events.clear();
        epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut self.events),
            self.spins.then_some(&none),
        )?;
        ready.clear();
        ready.extend(self.events.iter().map(|event| event.data.u64()));
        Ok(())
    }
}

/// Reads once; `None` if nothing is there, 0 at the end.
fn read(stream: &mut UnixStream, chunk: &mut [u8]) -> Result<Option<usize>> {
    match stream.read(chunk) {
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(Some(0)),
        Err(e) => Err(e.into()),
    }
}

/// Writes all of it, also where the socket does not block.
fn write(stream: &mut UnixStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn serve(plan: &Plan) -> Result<()> {
    let listener = UnixListener::bind(&plan.path)?;
    rustix::net::listen(&listener, 4096)?;
    say("ready")?;
    let mut chunk = vec![0; CHUNK.min(64 << 10)];
    let mut out = Vec::new();
    if plan.connections == 1 {
        return serve_one(&listener, plan, &mut chunk, &mut out);
    }
    let mut poller = Poller::new(plan.spins)?;
    poller.add(&listener, LISTENER)?;
    let mut streams: Vec<(UnixStream, Serving)> = Vec::new();
    let mut ready = Vec::new();
    loop {
        poller.wait(&mut ready)?;
        for number in &ready {
            if *number == LISTENER {
                let (stream, _) = listener.accept()?;
                poller.add(&stream, streams.len() as u64)?;
                streams.push((stream, Serving::default()));
                continue;
            }
            let (stream, serving) = &mut streams[*number as usize];
            out.clear();
            match read(stream, &mut chunk)? {
                Some(0) => return Ok(()),
                Some(n) => serving.take(&chunk[..n], &mut out),
                None => {}
            }
            write(stream, &out)?;
        }
    }
}

fn serve_one(listener: &UnixListener, plan: &Plan, chunk: &mut [u8], out: &mut Vec<u8>) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nonblocking(plan.spins)?;
    let mut serving = Serving::default();
    loop {
        match read(&mut stream, chunk)? {
            Some(0) => return Ok(()),
            Some(n) => {
                out.clear();
                serving.take(&chunk[..n], out);
                write(&mut stream, out)?;
            }
            None => std::hint::spin_loop(),
        }
    }
}

struct Streams {
    streams: Vec<(UnixStream, Inbox, Vec<u8>)>,
    dirty: Vec<usize>,
    poller: Poller,
    ready: Vec<u64>,
    chunk: Vec<u8>,
    size: usize,
}

fn run_client(plan: &Plan) -> Result<()> {
    let poller = Poller::new(plan.spins)?;
    let mut streams = Vec::new();
    for number in 0..plan.connections {
        let stream = UnixStream::connect(&plan.path)?;
        poller.add(&stream, number as u64)?;
        stream.set_nonblocking(plan.spins && plan.connections == 1)?;
        streams.push((stream, Inbox::default(), Vec::new()));
    }
    let (dirty, ready, chunk) = (Vec::new(), Vec::new(), vec![0; CHUNK]);
    drive(&mut Streams { streams, dirty, poller, ready, chunk, size: plan.size }, plan)
}

impl Link for Streams {
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()> {
        let out = &mut self.streams[connection].2;
        if out.is_empty() {
            self.dirty.push(connection);
        }
        frame(out, self.size, |request| fill(nonce, request));
        Ok(())
    }

    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()> {
        for connection in self.dirty.drain(..) {
            let (stream, _, out) = &mut self.streams[connection];
            write(stream, out)?;
            out.clear();
        }
        let mut some = false;
        while !some {
            if self.streams.len() == 1 {
                self.ready.clear();
                self.ready.push(0);
            } else {
                self.poller.wait(&mut self.ready)?;
            }
            for number in &self.ready {
                let (stream, inbox, _) = &mut self.streams[*number as usize];
                match read(stream, &mut self.chunk)? {
                    Some(0) => return Err("the server is gone".into()),
                    Some(n) => inbox.push(&self.chunk[..n]),
                    None => std::hint::spin_loop(),
                }
                while let Some(answer) = inbox.next_frame() {
                    take(*number as usize, answer, true);
                    some = true;
                }
            }
        }
        Ok(())
    }
}

//! tokio-uring over a unix stream socket: a task for each connection, one thread; everything that has come is answered in
//! one write.

use peers_common::{Conversation, Meter, Plan, Result, Serving, finish, say};
use std::cell::RefCell;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use tokio_uring::net::UnixStream;

fn main() -> Result<()> {
    let plan = Plan::from_args();
    let mut builder = tokio_uring::builder();
    builder.entries(2048);
    builder.start(async { if plan.role == "server" { serve(&plan).await } else { run(&plan).await } })
}

async fn serve(plan: &Plan) -> Result<()> {
    // Its own listener asks for SO_REUSEPORT, which later kernels refuse on unix sockets: connections are accepted by the
    // standard library, before the first call, and handed over.
    let listener = UnixListener::bind(&plan.path)?;
    say("ready")?;
    for _ in 0..plan.connections {
        let stream = UnixStream::from_std(listener.accept()?.0);
        tokio_uring::spawn(async move {
            if let Err(error) = answer(stream).await {
                eprintln!("a connection ended: {error}");
            }
        });
    }
    std::future::pending().await
}

async fn answer(stream: UnixStream) -> std::io::Result<()> {
    let (mut serving, mut chunk, mut out) = (Serving::default(), vec![0; 8 << 10], Vec::new());
    loop {
        let (read, buffer) = stream.read(chunk).await;
        chunk = buffer;
        let n = read?;
        if n == 0 {
            return Ok(());
        }
        out.clear();
        serving.take(&chunk[..n], &mut out);
        if n == chunk.len() && n < 256 << 10 {
            chunk.resize(2 * n, 0);
        }
        if !out.is_empty() {
            let (written, buffer) = stream.write_all(out).await;
            out = buffer;
            written?;
        }
    }
}

async fn run(plan: &Plan) -> Result<()> {
    let mut streams = Vec::new();
    for _ in 0..plan.connections {
        streams.push(connect(&plan.path).await?);
    }
    let meter = Rc::new(RefCell::new(Meter::new(plan)));
    let mut tasks = Vec::new();
    for stream in streams {
        tasks.push(tokio_uring::spawn(converse(stream, Rc::clone(&meter), plan.clone())));
    }
    let mut open = Vec::new();
    for task in tasks {
        open.push(task.await??);
    }
    let result = finish(&meter.borrow(), plan);
    drop(open);
    result
}

/// The listener's queue is short: a full one is tried again.
async fn connect(path: &str) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            other => return other,
        }
    }
}

async fn converse(stream: UnixStream, meter: Rc<RefCell<Meter>>, plan: Plan) -> std::io::Result<UnixStream> {
    let (mut conversation, mut out) = (Conversation::new(&plan), Vec::new());
    let mut chunk = vec![0; if plan.connections > 1 { 8 << 10 } else { 256 << 10 }];
    loop {
        out.clear();
        if !conversation.ask(&mut meter.borrow_mut(), &mut out) {
            return Ok(stream);
        }
        if !out.is_empty() {
            let (written, buffer) = stream.write_all(out).await;
            out = buffer;
            written?;
        }
        let (read, buffer) = stream.read(chunk).await;
        chunk = buffer;
        let n = read?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let before = meter.borrow().is_idle();
        conversation.take(&mut meter.borrow_mut(), &chunk[..n]);
        if !plan.think.is_zero() && !before && meter.borrow().is_idle() {
            std::thread::sleep(plan.think);
        }
    }
}

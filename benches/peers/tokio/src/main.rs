//! tokio over a unix stream socket: a task for each connection, one thread; everything that has come is answered in one
//! write.

use peers_common::{Conversation, Meter, Plan, Result, Serving, finish, say};
use std::cell::RefCell;
use std::rc::Rc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixSocket, UnixStream};
use tokio::task::LocalSet;

fn main() -> Result<()> {
    let plan = Plan::from_args();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    if plan.role == "server" {
        local.block_on(&runtime, serve(&plan))
    } else {
        local.block_on(&runtime, run(&plan))
    }
}

async fn serve(plan: &Plan) -> Result<()> {
    let socket = UnixSocket::new_stream()?;
    socket.bind(&plan.path)?;
    let listener: UnixListener = socket.listen(4096)?;
    say("ready")?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = answer(stream).await {
                eprintln!("a connection ended: {error}");
            }
        });
    }
}

async fn answer(mut stream: UnixStream) -> std::io::Result<()> {
    let (mut serving, mut chunk, mut out) = (Serving::default(), Vec::with_capacity(8 << 10), Vec::new());
    loop {
        chunk.clear();
        if stream.read_buf(&mut chunk).await? == 0 {
            return Ok(());
        }
        if chunk.len() == chunk.capacity() && chunk.capacity() < 256 << 10 {
            // Much comes: read more at once.
            chunk.reserve(2 * chunk.capacity());
        }
        out.clear();
        serving.take(&chunk, &mut out);
        stream.write_all(&out).await?;
    }
}

async fn run(plan: &Plan) -> Result<()> {
    let mut streams = Vec::new();
    for _ in 0..plan.connections {
        streams.push(UnixStream::connect(&plan.path).await?);
    }
    let meter = Rc::new(RefCell::new(Meter::new(plan)));
    let mut tasks = Vec::new();
    for stream in streams {
        tasks.push(tokio::task::spawn_local(converse(stream, Rc::clone(&meter), plan.clone())));
    }
    let mut open = Vec::new();
    for task in tasks {
        open.push(task.await??);
    }
    let result = finish(&meter.borrow(), plan);
    drop(open);
    result
}

async fn converse(
    mut stream: UnixStream,
    meter: Rc<RefCell<Meter>>,
    plan: Plan,
) -> std::io::Result<UnixStream> {
    let (mut conversation, mut out) = (Conversation::new(&plan), Vec::new());
    let mut chunk = Vec::with_capacity(256 << 10);
    loop {
        out.clear();
        if !conversation.ask(&mut meter.borrow_mut(), &mut out) {
            return Ok(stream);
        }
        stream.write_all(&out).await?;
        chunk.clear();
        if stream.read_buf(&mut chunk).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let before = meter.borrow().is_idle();
        conversation.take(&mut meter.borrow_mut(), &chunk);
        if !plan.think.is_zero() && !before && meter.borrow().is_idle() {
            // One call at a time: nothing else is kept from running, and tokio's clock is too coarse for it.
            std::thread::sleep(plan.think);
        }
    }
}

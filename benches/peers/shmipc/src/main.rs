//! shmipc: streams of its sessions over shared memory, one stream for each connection; sessions carry up to 256 each.

use peers_common::{Meter, Plan, Result, answer, fill, finish, say};
use shmipc::Listener;
use shmipc::config::{Config, SizePercentPair};
use shmipc::session::{SessionManager, SessionManagerConfig};
use shmipc::stream::Stream;
use shmipc::transport::{DefaultUnixConnect, DefaultUnixListen};
use std::cell::RefCell;
use std::os::unix::net::SocketAddr;
use std::rc::Rc;
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

/// Its own, but for the paths, and slices that a body fits into.
fn configure(config: &mut Config, plan: &Plan) {
    config.share_memory_path_prefix = format!("/dev/shm/{}", plan.name());
    config.queue_path = format!("/dev/shm/{}-queue", plan.name());
    config.buffer_slice_sizes = vec![
        SizePercentPair { size: plan.size as u32 + 256, percent: 70 },
        SizePercentPair { size: (16 << 10) + 256, percent: 20 },
        SizePercentPair { size: (64 << 10) + 256, percent: 10 },
    ];
}

async fn serve(plan: &Plan) -> Result<()> {
    let mut config = Config::default();
    configure(&mut config, plan);
    let address = SocketAddr::from_pathname(&plan.path)?;
    let mut listener = Listener::new(DefaultUnixListen, address, config).await?;
    say("ready")?;
    let size = plan.size;
    loop {
        let stream = listener.accept().await?;
        tokio::task::spawn_local(async move {
            // It ends with the client.
            if let Err(error) = work(stream, size).await {
                eprintln!("a stream ended: {error}");
            }
        });
    }
}

async fn work(mut stream: Stream, size: usize) -> std::result::Result<(), shmipc::Error> {
    let mut out = vec![0; size];
    loop {
        let request = stream.read_exact_bytes(size).await?;
        answer(&request, &mut out);
        drop(request);
        stream.release_read_and_reuse();
        stream.write_bytes(&out)?;
        stream.flush(false).await?;
    }
}

async fn run(plan: &Plan) -> Result<()> {
    let mut config = SessionManagerConfig::default().with_session_num(plan.connections.div_ceil(256));
    configure(config.config_mut(), plan);
    let address = SocketAddr::from_pathname(&plan.path)?;
    let manager = SessionManager::new(config, DefaultUnixConnect, address).await?;
    let meter = Rc::new(RefCell::new(Meter::new(plan)));
    let mut tasks = Vec::new();
    // Several calls in flight are several streams: its streams answer one call after the other.
    for _ in 0..plan.connections * plan.in_flight {
        let stream = manager.get_stream()?;
        tasks.push(tokio::task::spawn_local(converse(stream, Rc::clone(&meter), plan.clone())));
    }
    let mut open = Vec::new();
    for task in tasks {
        open.push(task.await??);
    }
    let result = finish(&meter.borrow(), plan);
    result
}

async fn converse(
    mut stream: Stream,
    meter: Rc<RefCell<Meter>>,
    plan: Plan,
) -> std::result::Result<Stream, shmipc::Error> {
    let mut request = vec![0; plan.size];
    loop {
        let Some(call) = meter.borrow_mut().request() else { return Ok(stream) };
        fill(call.nonce, &mut request);
        stream.write_bytes(&request)?;
        stream.flush(false).await?;
        let answer = stream.read_exact_bytes(plan.size).await?;
        meter.borrow_mut().answer(call, &answer, plan.size);
        drop(answer);
        stream.release_read_and_reuse();
        if !plan.think.is_zero() {
            std::thread::sleep(plan.think);
        }
    }
}

//! gRPC (tonic) over a unix stream socket: unary calls of one bytes field; a channel for each connection.

use http::Uri;
use hyper_util::rt::TokioIo;
use peers_common::{Meter, Plan, Result, answer, fill, finish, say};
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::LocalSet;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::server::{NamedService, UnaryService};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

#[derive(Clone, PartialEq, prost::Message)]
struct Payload {
    #[prost(bytes = "vec", tag = "1")]
    data: Vec<u8>,
}

const METHOD: &str = "/peers.Work/Do";
/// Longest message, bytes.
const MOST: usize = 16 << 20;

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
    let listener = std::os::unix::net::UnixListener::bind(&plan.path)?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    say("ready")?;
    Server::builder().add_service(WorkServer).serve_with_incoming(UnixListenerStream::new(listener)).await?;
    Ok(())
}

/// What `tonic-build` would make of a service of one method.
#[derive(Clone)]
struct WorkServer;

impl NamedService for WorkServer {
    const NAME: &'static str = "peers.Work";
}

struct Do;

impl UnaryService<Payload> for Do {
    type Response = Payload;
    type Future = std::future::Ready<std::result::Result<Response<Payload>, Status>>;

    fn call(&mut self, request: Request<Payload>) -> Self::Future {
        let request = request.into_inner().data;
        let mut data = vec![0; request.len()];
        answer(&request, &mut data);
        std::future::ready(Ok(Response::new(Payload { data })))
    }
}

impl tower::Service<http::Request<Body>> for WorkServer {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = std::result::Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let codec = ProstCodec::<Payload, Payload>::default();
            let mut grpc = tonic::server::Grpc::new(codec).max_decoding_message_size(MOST);
            Ok(grpc.unary(Do, request).await)
        })
    }
}

async fn connect(path: String) -> Result<Channel> {
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    Ok(Endpoint::try_from("http://unix.invalid")?.connect_with_connector(connector).await?)
}

async fn run(plan: &Plan) -> Result<()> {
    let mut channels = Vec::new();
    for _ in 0..plan.connections {
        channels.push(connect(plan.path.clone()).await?);
    }
    let meter = Rc::new(RefCell::new(Meter::new(plan)));
    let mut tasks = Vec::new();
    for channel in &channels {
        for _ in 0..plan.in_flight {
            tasks.push(tokio::task::spawn_local(converse(channel.clone(), Rc::clone(&meter), plan.clone())));
        }
    }
    for task in tasks {
        task.await??;
    }
    let result = finish(&meter.borrow(), plan);
    result
}

async fn converse(channel: Channel, meter: Rc<RefCell<Meter>>, plan: Plan) -> Result<()> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MOST);
    loop {
        let Some(call) = meter.borrow_mut().request() else { return Ok(()) };
        let mut data = vec![0; plan.size];
        fill(call.nonce, &mut data);
        grpc.ready().await?;
        let codec = ProstCodec::<Payload, Payload>::default();
        let path = http::uri::PathAndQuery::from_static(METHOD);
        let response = grpc.unary(Request::new(Payload { data }), path, codec).await?;
        meter.borrow_mut().answer(call, &response.into_inner().data, plan.size);
        if !plan.think.is_zero() {
            std::thread::sleep(plan.think);
        }
    }
}

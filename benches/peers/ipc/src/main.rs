//! ipc-channel: a pair of channels for each connection, bytes in both directions. Many connections are served by its
//! receiver set. Polling by `try_recv`, or sleeping in `recv`.

use ipc_channel::TryRecvError;
use ipc_channel::ipc::{self, IpcOneShotServer, IpcReceiver, IpcReceiverSet, IpcSelectionResult, IpcSender};
use peers_common::{Link, Plan, Result, answer, drive, fill, say};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// What a client gives the server: where it asks, and where it wants to be answered.
#[derive(Serialize, Deserialize)]
struct Pair {
    requests: IpcReceiver<ByteBuf>,
    answers: IpcSender<ByteBuf>,
}

fn main() -> Result<()> {
    let plan = Plan::from_args();
    if plan.role == "server" { serve(&plan) } else { run(&plan) }
}

fn serve(plan: &Plan) -> Result<()> {
    let (server, name) = IpcOneShotServer::<IpcReceiver<Pair>>::new()?;
    // Names are the system's own: the client reads it from the path.
    std::fs::write(format!("{}.tmp", plan.path), &name)?;
    std::fs::rename(format!("{}.tmp", plan.path), &plan.path)?;
    say("ready")?;
    let (_, pairs) = server.accept()?;
    if plan.connections == 1 {
        return serve_one(&pairs.recv().map_err(|e| e.to_string())?, plan.spins);
    }
    let mut set = IpcReceiverSet::new()?;
    let mut answers = std::collections::HashMap::new();
    for _ in 0..plan.connections {
        let pair = pairs.recv().map_err(|e| e.to_string())?;
        answers.insert(set.add(pair.requests)?, pair.answers);
    }
    loop {
        for event in set.select()? {
            let IpcSelectionResult::MessageReceived(id, message) = event else { return Ok(()) };
            let request: ByteBuf = message.to().map_err(|e| e.to_string())?;
            answers[&id].send(worked(&request)).map_err(|e| e.to_string())?;
        }
    }
}

fn serve_one(pair: &Pair, spins: bool) -> Result<()> {
    loop {
        match receive(&pair.requests, spins) {
            Ok(request) => pair.answers.send(worked(&request)).map_err(|e| e.to_string())?,
            Err(_) => return Ok(()),
        }
    }
}

fn worked(request: &[u8]) -> ByteBuf {
    let mut bytes = vec![0; request.len()];
    answer(request, &mut bytes);
    ByteBuf::from(bytes)
}

fn receive(from: &IpcReceiver<ByteBuf>, spins: bool) -> Result<ByteBuf> {
    if !spins {
        return from.recv().map_err(|e| e.to_string().into());
    }
    loop {
        match from.try_recv() {
            Ok(bytes) => return Ok(bytes),
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
            Err(error) => return Err(error.to_string().into()),
        }
    }
}

struct Channels {
    requests: Vec<IpcSender<ByteBuf>>,
    one: Option<IpcReceiver<ByteBuf>>,
    set: IpcReceiverSet,
    numbers: std::collections::HashMap<u64, usize>,
    spins: bool,
    size: usize,
}

fn run(plan: &Plan) -> Result<()> {
    let name = std::fs::read_to_string(&plan.path)?;
    let (pairs, receiver) = ipc::channel()?;
    IpcSender::<IpcReceiver<Pair>>::connect(name)?.send(receiver).map_err(|e| e.to_string())?;
    let mut channels = Channels {
        requests: Vec::new(),
        one: None,
        set: IpcReceiverSet::new()?,
        numbers: Default::default(),
        spins: plan.spins,
        size: plan.size,
    };
    for number in 0..plan.connections {
        let (asking, requests) = ipc::channel()?;
        let (answers, answered) = ipc::channel()?;
        pairs.send(Pair { requests, answers }).map_err(|e| e.to_string())?;
        channels.requests.push(asking);
        if plan.connections == 1 {
            channels.one = Some(answered);
        } else {
            channels.numbers.insert(channels.set.add(answered)?, number);
        }
    }
    drive(&mut channels, plan)
}

impl Link for Channels {
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()> {
        let mut request = vec![0; self.size];
        fill(nonce, &mut request);
        self.requests[connection].send(ByteBuf::from(request)).map_err(|e| e.to_string().into())
    }

    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()> {
        if let Some(one) = &self.one {
            take(0, &receive(one, self.spins)?, true);
            while let Ok(bytes) = one.try_recv() {
                take(0, &bytes, true);
            }
            return Ok(());
        }
        for event in self.set.select()? {
            let IpcSelectionResult::MessageReceived(id, message) = event else {
                return Err("the server is gone".into());
            };
            let bytes: ByteBuf = message.to().map_err(|e| e.to_string())?;
            take(self.numbers[&id], &bytes, true);
        }
        Ok(())
    }
}

//! doorbell itself, as a peer among peers.

use doorbell::{
    CallOptions, ClientConfig, ConnectionId, Context, HandlerError, HandlerTable, IpcClient, IpcError,
    IpcServer, MessageType, Pieces, Progress, Reply, ServerConfig, Status, WaitPolicy,
};
use peers_common::{
    BLOCK_BYTES as BLOCK, Link, Meter, Plan, Result, answer, drive, fill, fill_at, finish, say,
};
use std::collections::VecDeque;

const WORK: MessageType = MessageType::USER;
/// The longest body that goes in one piece.
const SLOT: usize = 16 << 10;
/// Calls in flight at most where memory is what matters; more wait in the client.
const FEW: u32 = 64;
/// Bytes of a cache line.
const LINE: usize = 64;

static TABLE: HandlerTable<()> = HandlerTable::with_builtins().on(WORK, work).on_pieces(WORK, long_work);

fn work(_: &Context<'_, ()>, request: &[u8], reply: &mut Reply<'_>) -> std::result::Result<(), HandlerError> {
    let (blocks, rest) = request.as_chunks::<BLOCK>();
    let (lines, tail) = rest.as_chunks::<LINE>();
    for block in blocks {
        work_on(block, &mut [0; BLOCK], reply)?;
    }
    for line in lines {
        work_on(line, &mut [0; LINE], reply)?;
    }
    work_on(tail, &mut [0; LINE][..tail.len()], reply)
}

/// Lengths are known where this is inlined: nothing is zeroed first.
#[inline(always)]
fn work_on(part: &[u8], done: &mut [u8], reply: &mut Reply<'_>) -> std::result::Result<(), HandlerError> {
    answer(part, done);
    reply.write(done)
}

fn long_work(_: &Context<'_, ()>, _: Option<u64>) -> std::result::Result<Box<dyn Pieces<()>>, HandlerError> {
    Ok(Box::new(Work))
}

struct Work;

impl Pieces<()> for Work {
    fn take(
        &mut self,
        context: &Context<'_, ()>,
        bytes: &[u8],
        last: bool,
        reply: &mut Reply<'_>,
    ) -> std::result::Result<Progress, HandlerError> {
        let taken = bytes.len().min(reply.room()) / 8 * 8;
        work(context, &bytes[..taken], reply)?;
        Ok(if last && taken == bytes.len() { Progress::Done } else { Progress::Took(taken) })
    }
}

fn main() -> Result<()> {
    let plan = Plan::from_args();
    let policy = if plan.spins { WaitPolicy::Spin } else { WaitPolicy::Handoff };
    if plan.role == "server" {
        let config = ServerConfig { policy, max_connections: 1000, ..ServerConfig::default() };
        let bound = IpcServer::new(&TABLE, ()).config(config).bind(&plan.path)?;
        say("ready")?;
        bound.serve()?;
        return Ok(());
    }
    if plan.role == "sessions" {
        return hold_sessions(&plan);
    }
    let most = (plan.connections * plan.in_flight).min(1000) as u32;
    let most = if plan.holds { most.min(FEW) } else { most };
    let base = ClientConfig::for_load(most, plan.size.min(SLOT));
    let lease_pages = if plan.size > SLOT { 256 } else { 0 };
    let client = IpcClient::connect_with(&plan.path, &ClientConfig { policy, lease_pages, ..base })?;
    let open = |_| client.open().map(|connection| connection.detach());
    let connections = (0..plan.connections).map(open).collect::<doorbell::Result<_>>()?;
    let (size, spins) = (plan.size, plan.spins);
    let (buffer, answer) = (vec![0; size], vec![0; size]);
    let alone = plan.connections * plan.in_flight == 1;
    if size > SLOT && !alone {
        return Err("long bodies go one after the other here".into());
    }
    drive(
        &mut Session {
            client: &client,
            connections,
            buffer,
            answer,
            waiting: None,
            queued: VecDeque::new(),
            spins,
            alone,
            size,
        },
        &plan,
    )
}

/// A session for each connection instead of one for all; one call on each, then they are held.
fn hold_sessions(plan: &Plan) -> Result<()> {
    doorbell::config::raise_file_limit(3 * plan.connections as u64)?;
    let config = ClientConfig { policy: WaitPolicy::Block, lanes: 1, ..ClientConfig::smallest() };
    let (mut meter, mut held) = (Meter::new(plan), Vec::new());
    let mut request = vec![0; plan.size];
    while let Some(call) = meter.request() {
        let client = IpcClient::connect_with(&plan.path, &config)?;
        let connection = client.open()?;
        let id = connection.detach();
        fill(call.nonce, &mut request);
        let answer = client.attached(id).call(WORK, &request)?;
        meter.answer(call, &answer, plan.size);
        held.push(client);
    }
    let result = finish(&meter, plan);
    drop(held);
    result
}

struct Session<'a> {
    client: &'a IpcClient,
    connections: Vec<ConnectionId>,
    buffer: Vec<u8>,
    answer: Vec<u8>,
    /// A call that is made by receiving: a long one.
    waiting: Option<(usize, u64)>,
    /// Calls that found no slot, in order.
    queued: VecDeque<(usize, u64)>,
    spins: bool,
    /// One call after the other.
    alone: bool,
    size: usize,
}

impl Link for Session<'_> {
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()> {
        if self.size > SLOT || self.alone && !self.spins {
            self.waiting = Some((connection, nonce));
            return Ok(());
        }
        if !self.queued.is_empty() || !self.submit(connection, nonce)? {
            self.queued.push_back((connection, nonce));
        }
        Ok(())
    }

    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()> {
        if let Some((connection, nonce)) = self.waiting.take() {
            return if self.size > SLOT {
                self.long_call(connection, nonce, take)
            } else {
                self.call(connection, nonce, take)
            };
        }
        loop {
            let mut some = false;
            while let Some(taken) = self.client.poll_into(&mut self.buffer)? {
                if taken.status != Some(Status::Ok) {
                    return Err(format!("refused: {:?}", taken.status).into());
                }
                take(taken.tag as usize, &self.buffer[..taken.len.min(self.size)], true);
                some = true;
            }
            while let Some(&(connection, nonce)) = self.queued.front() {
                if !self.submit(connection, nonce)? {
                    break;
                }
                self.queued.pop_front();
            }
            if some {
                return Ok(());
            }
            if !self.spins {
                self.client.wait(None)?;
            }
        }
    }
}

impl Session<'_> {
    /// Sends a call; says whether there was a slot for it.
    fn submit(&mut self, connection: usize, nonce: u64) -> Result<bool> {
        let options = CallOptions { tag: connection as u64, ..CallOptions::default() };
        fill(nonce, &mut self.buffer);
        let to = self.client.attached(self.connections[connection]);
        match to.submit(WORK, &self.buffer, &options) {
            Ok(_) => Ok(true),
            Err(IpcError::WouldBlock) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// One call, made and waited for.
    fn call(
        &mut self,
        connection: usize,
        nonce: u64,
        take: &mut impl FnMut(usize, &[u8], bool),
    ) -> Result<()> {
        fill(nonce, &mut self.buffer);
        let Self { client, buffer, answer, connections, size, .. } = self;
        let options = CallOptions { reply_capacity: *size, ..CallOptions::default() };
        let to = client.attached(connections[connection]);
        let len = to.call_with(WORK, buffer, &options, |reply| reply.copy_to(answer))??;
        take(connection, &answer[..len], true);
        Ok(())
    }

    /// The same for a long one: its frames are written where they are sent from and checked as they come.
    fn long_call(
        &mut self,
        connection: usize,
        nonce: u64,
        take: &mut impl FnMut(usize, &[u8], bool),
    ) -> Result<()> {
        let options = CallOptions { pieces: true, reply_capacity: self.size, ..CallOptions::default() };
        let to = self.client.attached(self.connections[connection]);
        let call = to.start(WORK, Some(self.size as u64), &options)?;
        let (mut sent, mut is_over) = (0, false);
        while !is_over {
            let mut moved = false;
            if sent < self.size {
                moved = self.client.send_with(call, |writer| {
                    // Frames are whole blocks, but for the last.
                    let end = sent + writer.remaining().min(self.size - sent);
                    let mut block = [0; BLOCK];
                    while sent < end {
                        let block = &mut block[..BLOCK.min(end - sent)];
                        fill_at(nonce, sent / BLOCK, block);
                        writer.write(block)?;
                        sent += block.len();
                    }
                    Ok(())
                })?;
            }
            if let Some(reply) = self.client.poll()? {
                if !reply.is_ok() {
                    return Err("refused".into());
                }
                let len = reply.copy_to(&mut self.answer)?;
                (moved, is_over) = (true, reply.is_last());
                take(connection, &self.answer[..len], is_over);
            }
            if !moved && !self.spins {
                self.client.wait(None)?;
            }
        }
        Ok(())
    }
}

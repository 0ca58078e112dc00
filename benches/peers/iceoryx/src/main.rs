//! iceoryx2, request-response over its shared-memory service: polling, or woken by its events. Requests and answers are
//! written right into memory that is loaned for them.

use iceoryx2::active_request::ActiveRequest;
use iceoryx2::pending_response::PendingResponse;
use iceoryx2::port::client::Client;
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::prelude::*;
use peers_common::{BLOCK_BYTES, Link, MASK, Plan, Result, drive, fill_at, say};
use std::collections::VecDeque;

type Ipc = ipc::Service;
type Asker = Client<Ipc, [u64], (), [u64], ()>;
type Pending = PendingResponse<Ipc, [u64], (), [u64], ()>;

fn main() -> Result<()> {
    set_log_level(LogLevel::Error);
    let plan = Plan::from_args();
    let node = NodeBuilder::new().create::<Ipc>()?;
    let service = node
        .service_builder(&plan.name().try_into()?)
        .request_response::<[u64], [u64]>()
        .max_servers(1)
        .max_clients(plan.connections.max(2))
        .max_active_requests_per_client(plan.in_flight.max(2))
        .max_loaned_requests(2)
        .max_response_buffer_size(2)
        .max_nodes(8)
        .open_or_create()?;
    let event = |name: &str| -> Result<_> {
        let name = format!("{}-{name}", plan.name());
        Ok(node.service_builder(&name.as_str().try_into()?).event().open_or_create()?)
    };
    let (asked, answered) = (event("asked")?, event("answered")?);
    let words = plan.size / 8;
    if plan.role == "server" {
        let server = service.server_builder().initial_max_slice_len(words).create()?;
        let bells = Bells {
            hear: asked.listener_builder().create()?,
            ring: answered.notifier_builder().create()?,
            spins: plan.spins,
        };
        say("ready")?;
        loop {
            let mut some = false;
            while let Some(request) = server.receive()? {
                work(&request)?;
                some = true;
            }
            if some {
                bells.ring()?;
            } else {
                bells.wait()?;
            }
        }
    }
    let client = |_| service.client_builder().initial_max_slice_len(words).create();
    let clients = (0..plan.connections).map(client).collect::<std::result::Result<Vec<_>, _>>()?;
    let bells = Bells {
        hear: answered.listener_builder().create()?,
        ring: asked.notifier_builder().create()?,
        spins: plan.spins,
    };
    let pending = (0..plan.connections).map(|_| VecDeque::with_capacity(plan.in_flight)).collect();
    drive(&mut Clients { clients, pending, bells, words, sent: false }, &plan)
}

fn work(request: &ActiveRequest<Ipc, [u64], (), [u64], ()>) -> Result<()> {
    let words: &[u64] = request.payload();
    let response = request.loan_slice_uninit(words.len())?;
    response.write_from_fn(|i| words[i] ^ MASK).send()?;
    Ok(())
}

struct Bells {
    hear: Listener<Ipc>,
    ring: Notifier<Ipc>,
    spins: bool,
}

impl Bells {
    fn ring(&self) -> Result<()> {
        if !self.spins {
            self.ring.notify()?;
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        if self.spins {
            std::hint::spin_loop();
        } else {
            self.hear.blocking_wait(|_| ())?;
        }
        Ok(())
    }
}

struct Clients {
    clients: Vec<Asker>,
    pending: Vec<VecDeque<Pending>>,
    bells: Bells,
    /// Words of a request.
    words: usize,
    sent: bool,
}

impl Link for Clients {
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()> {
        let mut request = self.clients[connection].loan_slice_uninit(self.words)?;
        let mut block = [0; BLOCK_BYTES];
        for (first, part) in request.payload_mut().chunks_mut(BLOCK_BYTES / 8).enumerate() {
            let block = &mut block[..8 * part.len()];
            fill_at(nonce, first, block);
            for (to, word) in part.iter_mut().zip(block.as_chunks::<8>().0) {
                to.write(u64::from_le_bytes(*word));
            }
        }
        // SAFETY: every word has just been written.
        let request = unsafe { request.assume_init() };
        self.pending[connection].push_back(request.send()?);
        self.sent = true;
        Ok(())
    }

    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()> {
        if std::mem::take(&mut self.sent) {
            self.bells.ring()?;
        }
        loop {
            let mut some = false;
            for (connection, pending) in self.pending.iter_mut().enumerate() {
                while let Some(first) = pending.front() {
                    let Some(response) = first.receive()? else { break };
                    let words: &[u64] = response.payload();
                    take(connection, as_bytes(words), true);
                    drop(response);
                    pending.pop_front();
                    some = true;
                }
            }
            if some {
                return Ok(());
            }
            self.bells.wait()?;
        }
    }
}

fn as_bytes(words: &[u64]) -> &[u8] {
    // SAFETY: every byte of a word is initialised, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

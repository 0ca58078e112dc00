//! Aeron over its IPC channel: an exclusive publication and a subscription each way, its media driver in a process of its
//! own. Terms are touched beforehand, and as small as what is in flight allows. Everybody polls, which is how it is meant to be used; where it is to
//! sleep, it sleeps for 50 µs when there was nothing.
//!
//! A publication may be ahead by half a term of what the driver has last seen of its subscription. A driver that naps for a
//! millisecond, as it does when it is not told otherwise, holds up whoever sends more than that in a millisecond: twentyfold
//! less with 64 calls of 64 B in flight. So it naps for 20 µs where others poll, and terms are larger where much is in flight.

use peers_common::{Link, Plan, Result, answer, drive, fill, say, until_told};
use rusteron_client::{
    Aeron, AeronContext, AeronExclusivePublication, AeronSubscription, Handlers, IntoCString,
};
use std::time::Duration;

const REQUESTS: i32 = 1001;
const ANSWERS: i32 = 1002;
const FRAGMENTS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a term at least, and where several calls are in flight.
const TERM: usize = 256 << 10;
const TERM_OF_MANY: usize = 1 << 20;
/// How long the driver sleeps between two looks, where others poll.
const NAP: &str = "20us";
/// Bytes that a frame carries.
const FRAME: usize = 1376;
/// In front of a body: which connection it is of.
const HEAD: usize = 8;

fn main() -> Result<()> {
    let plan = Plan::from_args();
    match plan.role.as_str() {
        "driver" => run_driver(&plan),
        "server" => serve(&plan),
        _ => run(&plan),
    }
}

/// Terms hold all that is in flight four times over, since a publication may be ahead by half a term; and a message is at
/// most an eighth of one.
fn channel(plan: &Plan) -> std::ffi::CString {
    let message = plan.size + HEAD + 64;
    let needed = message * (4 * plan.connections * plan.in_flight).max(8);
    let term = if plan.in_flight > 1 && !plan.holds { TERM_OF_MANY } else { TERM };
    format!("aeron:ipc?term-length={}", needed.next_power_of_two().max(term)).into_c_string()
}

/// Puts messages together that were cut into fragments. There is one publication: its fragments come in order.
#[derive(Default)]
struct Assembler(Vec<u8>);

impl Assembler {
    /// Hands out the message that this fragment completes.
    fn take(&mut self, len: usize, fragment: &[u8], each: impl FnOnce(&[u8])) {
        if fragment.len() == len {
            return each(fragment);
        }
        self.0.extend_from_slice(fragment);
        if self.0.len() == len {
            each(&self.0);
            self.0.clear();
        }
    }
}

fn run_driver(plan: &Plan) -> Result<()> {
    use rusteron_media_driver::bindings::aeron_threading_mode_enum;
    use rusteron_media_driver::{AeronDriver, AeronDriverContext};
    let context = AeronDriverContext::new()?;
    context.set_dir_delete_on_shutdown(true)?;
    context.set_dir_delete_on_start(true)?;
    context.set_dir(&format!("/dev/shm/{}", plan.name()).into_c_string())?;
    context.set_term_buffer_sparse_file(false)?;
    if plan.spins {
        context.set_threading_mode(aeron_threading_mode_enum::AERON_THREADING_MODE_SHARED)?;
        context.set_shared_idle_strategy(&"sleep-ns".into_c_string())?;
        context.set_shared_idle_strategy_init_args(&NAP.into_c_string())?;
    }
    let (stop, handle) = AeronDriver::launch_embedded(context.clone(), false);
    // The directory is there before its clients are started.
    let cnc = format!("/dev/shm/{}/cnc.dat", plan.name());
    while !std::path::Path::new(&cnc).exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(100));
    say("ready")?;
    until_told()?;
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    handle.join().map_err(|_| "the driver panicked")??;
    Ok(())
}

struct Ends {
    publication: AeronExclusivePublication,
    subscription: AeronSubscription,
    spins: bool,
    _aeron: Aeron,
}

fn join(plan: &Plan, publish: i32, subscribe: i32) -> Result<Ends> {
    let context = AeronContext::new()?;
    context.set_dir(&format!("/dev/shm/{}", plan.name()).into_c_string())?;
    context.set_pre_touch_mapped_memory(true)?;
    let aeron = Aeron::new(&context)?;
    aeron.start()?;
    let channel = channel(plan);
    let publication = aeron.async_add_exclusive_publication(&channel, publish)?.poll_blocking(PATIENCE)?;
    let subscription = aeron
        .async_add_subscription(&channel, subscribe, Handlers::NONE, Handlers::NONE)?
        .poll_blocking(PATIENCE)?;
    Ok(Ends { publication, subscription, spins: plan.spins, _aeron: aeron })
}

impl Ends {
    fn idle(&self) {
        if self.spins {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Publishes a message of `len` bytes, which `write` fills.
    fn publish(&self, len: usize, scratch: &mut Vec<u8>, write: impl Fn(&mut [u8])) -> Result<()> {
        loop {
            // What does not fit one frame is cut by an offer.
            let failed = if len <= FRAME {
                match self.publication.try_claim_owned(len) {
                    Ok(mut claim) => {
                        write(claim.data());
                        claim.commit()?;
                        return Ok(());
                    }
                    Err(error) => error,
                }
            } else {
                scratch.resize(len, 0);
                write(scratch);
                match self.publication.offer(scratch) {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                }
            };
            if !failed.is_retryable() {
                return Err(failed.into());
            }
            std::hint::spin_loop();
        }
    }
}

fn serve(plan: &Plan) -> Result<()> {
    let ends = join(plan, ANSWERS, REQUESTS)?;
    say("ready")?;
    let (mut scratch, mut assembler) = (Vec::new(), Assembler::default());
    let mut failed = None;
    loop {
        let each = |fragment: &[u8], _: _| {
            assembler.take(HEAD + plan.size, fragment, |request| {
                let work = |out: &mut [u8]| {
                    out[..HEAD].copy_from_slice(&request[..HEAD]);
                    answer(&request[HEAD..], &mut out[HEAD..]);
                };
                if let Err(error) = ends.publish(request.len(), &mut scratch, work) {
                    failed = Some(error);
                }
            });
        };
        let fragments = ends.subscription.poll_fn(each, FRAGMENTS)?;
        if let Some(error) = failed.take() {
            return Err(error);
        }
        if fragments == 0 {
            ends.idle();
        }
    }
}

struct Calls {
    ends: Ends,
    size: usize,
    scratch: Vec<u8>,
    assembler: Assembler,
}

fn run(plan: &Plan) -> Result<()> {
    let ends = join(plan, REQUESTS, ANSWERS)?;
    while !ends.publication.is_connected() || !ends.subscription.is_connected() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (scratch, assembler) = (Vec::new(), Assembler::default());
    drive(&mut Calls { ends, size: plan.size, scratch, assembler }, plan)
}

impl Link for Calls {
    fn send(&mut self, connection: usize, nonce: u64) -> Result<()> {
        self.ends.publish(HEAD + self.size, &mut self.scratch, |out| {
            out[..HEAD].copy_from_slice(&(connection as u64).to_le_bytes());
            fill(nonce, &mut out[HEAD..]);
        })
    }

    fn receive(&mut self, take: &mut impl FnMut(usize, &[u8], bool)) -> Result<()> {
        let mut some = false;
        loop {
            let each = |fragment: &[u8], _: _| {
                self.assembler.take(HEAD + self.size, fragment, |answer| {
                    let mut head = [0; HEAD];
                    head.copy_from_slice(&answer[..HEAD]);
                    take(u64::from_le_bytes(head) as usize, &answer[HEAD..], true);
                    some = true;
                });
            };
            let fragments = self.ends.subscription.poll_fn(each, FRAGMENTS)?;
            if some {
                return Ok(());
            }
            if fragments == 0 {
                self.ends.idle();
            }
        }
    }
}

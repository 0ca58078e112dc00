//! `doorbell bench-stream`: what streamed answers cost. A server process with a worker thread that writes chunks through
//! tickets, and this process, which reads them: every chunk carries its stream, its number and the time at which it was
//! written, and every one is checked (order, completeness, one end).
//!
//! Server and reader are processes of their own (trap 22); the worker is a thread of the server's, whose processor time
//! is told apart from that of the reactors.

use super::child::{self, Process, Role};
use super::clock::{SECOND, now_ns, sleep_until};
use super::error::BenchError;
use super::floor_stream::{self, StreamFloorJob};
use super::histogram::Latencies;
use super::memory::{Probe, Segments};
use super::options::Policy;
use super::placement;
use super::worker::say;
use clap::{Args, ValueEnum};
use doorbell::protocol::records::RecordReader;
use doorbell::{
    CallId, CallOptions, ClientConfig, Connection, Context, Deferred, HandlerError, HandlerTable, IpcClient,
    IpcError, IpcServer, MessageType, ServerConfig, WaitPolicy,
};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

/// Streams what its request asks for.
const STREAM: MessageType = MessageType::USER;
/// The longest chunk, bytes; the shortest has a stamp.
const CHUNK_MAX: usize = 512;
const STAMP: usize = 24;
/// The name of the worker's thread.
const WORKER: &str = "worker";
/// Chunks of a stream before it is cancelled.
const BEFORE_CANCEL: u64 = 100;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Question {
    /// One chunk at a time, everybody awake as far as there are cores: how long until it is read.
    Latency,
    /// One stream as fast as it goes.
    Throughput,
    /// Many paced streams at once.
    Many,
    /// From a cancel to the last chunk and to the end of the call.
    Cancel,
}

/// Measure streamed answers against a server process of its own, every chunk checked.
#[derive(Debug, Clone, Args)]
pub struct StreamOptions {
    /// What is measured.
    #[arg(value_enum)]
    question: Question,
    /// Bytes of a chunk.
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    size: usize,
    /// Streams at once, of `many`.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    streams: usize,
    /// Sessions that these are spread over.
    #[arg(long, value_name = "S", default_value_t = 4)]
    sessions: usize,
    /// Chunks a second of each stream, of `many` and `latency`.
    #[arg(long, value_name = "R", default_value_t = 50.0)]
    rate: f64,
    /// Seconds that are measured.
    #[arg(long, value_name = "S", default_value_t = 3.0)]
    seconds: f64,
    /// Memory budget of the server, bytes [default: 3 MiB].
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<u64>,
    /// How both sides wait.
    #[arg(long, value_enum, default_value_t = Policy::Spin)]
    policy: Policy,
    /// Leave reactor, worker and reader to the scheduler instead of pinning the reactor to one core, the others to
    /// another.
    #[arg(long)]
    unpinned: bool,
    /// Pin all three to one core.
    #[arg(long, conflicts_with = "unpinned")]
    same_core: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// What the server process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StreamJob {
    path: PathBuf,
    policy: Policy,
    reactor_cpu: Option<usize>,
    worker_cpu: Option<usize>,
    /// The worker yields until a chunk is due, instead of sleeping.
    worker_polls: bool,
    connections: u32,
    memory_budget: u64,
}

/// What one stream is to be; the request's own bytes.
#[derive(Debug, Clone, Copy)]
struct Wish {
    stream: u64,
    size: u64,
    /// Nanoseconds between two chunks; 0 for as fast as it goes.
    pause_ns: u64,
    /// When the first chunk is due, and after when there are no more.
    begin_ns: u64,
    end_ns: u64,
}

impl Wish {
    fn to_bytes(self) -> Vec<u8> {
        [self.stream, self.size, self.pause_ns, self.begin_ns, self.end_ns].map(u64::to_le_bytes).concat()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let [stream, size, pause_ns, begin_ns, end_ns] =
            <[[u8; 8]; 5]>::try_from(words).ok()?.map(u64::from_le_bytes);
        Some(Self { stream, size, pause_ns, begin_ns, end_ns })
    }
}

/// A stream that is being written.
struct Writing {
    wish: Wish,
    ticket: Deferred,
    number: u64,
    due_ns: u64,
}

type State = Mutex<Sender<Writing>>;

static TABLE: HandlerTable<State> = HandlerTable::with_builtins().on_deferred(STREAM, begin);

fn begin(context: &Context<'_, State>, request: &[u8], ticket: Deferred) -> Result<(), HandlerError> {
    let wish = Wish::parse(request).ok_or_else(|| HandlerError::Decode("no wish for a stream".to_owned()))?;
    let writing = Writing { wish, ticket, number: 0, due_ns: wish.begin_ns };
    let worker = context.state().lock().unwrap_or_else(PoisonError::into_inner);
    worker.send(writing).map_err(|_| HandlerError::Failed("the worker has ended".to_owned()))
}

/// The server process.
///
/// # Errors
///
/// [`BenchError`] if it cannot serve.
pub fn serve(job: &StreamJob) -> Result<(), BenchError> {
    let peer = |doing| move |error: IpcError| BenchError::peer(doing, error);
    let config = ServerConfig {
        // Who is silent here is silent on purpose.
        idle_timeout: None,
        policy: wait_policy(job.policy),
        reactors: 1,
        cores: job.reactor_cpu.into_iter().collect(),
        pinned: job.reactor_cpu.is_some(),
        max_connections: job.connections,
        max_message_size: 1 << 31,
        memory_budget: job.memory_budget,
        ..ServerConfig::default()
    };
    let (sender, streams) = channel();
    let bound =
        IpcServer::new(&TABLE, Mutex::new(sender)).config(config).bind(&job.path).map_err(peer("binding"))?;
    let (cpu, polls) = (job.worker_cpu, job.worker_polls);
    std::thread::Builder::new()
        .name(WORKER.to_owned())
        .spawn(move || work(cpu, polls, &streams))
        .map_err(|e| BenchError::os("starting the worker", e))?;
    say(&())?;
    bound.serve().map(|_| ()).map_err(peer("serving"))
}

/// The worker: writes every chunk when it is due, of all streams, until there are none any more.
fn work(cpu: Option<usize>, polls: bool, streams: &Receiver<Writing>) -> Result<(), BenchError> {
    placement::pin(cpu)?;
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))
        .map_err(|e| BenchError::os("prctl(PR_SET_TIMERSLACK)", e))?;
    let mut all: Vec<Writing> = Vec::new();
    let mut chunk = [0; CHUNK_MAX];
    while let Ok(first) = streams.recv() {
        all.push(first);
        while !all.is_empty() {
            all.extend(streams.try_iter());
            let now = now_ns();
            let mut at = 0;
            while at < all.len() {
                if write_due(&mut all[at], now, &mut chunk) {
                    at += 1;
                    continue;
                }
                let done = all.swap_remove(at);
                if !done.ticket.is_cancelled() {
                    done.ticket.finish();
                }
            }
            let next = all.iter().map(|writing| writing.due_ns).min().unwrap_or_default();
            if polls {
                // Going to sleep takes longer than the chunk does, and the reader may be on this very core.
                std::thread::yield_now();
            } else if next > now_ns() {
                // So that new streams are seen.
                sleep_until(next.min(now_ns() + SECOND / 1000));
            }
        }
    }
    Ok(())
}

/// Writes what is due of one stream; `false` if that is over.
fn write_due(writing: &mut Writing, now: u64, chunk: &mut [u8; CHUNK_MAX]) -> bool {
    let Wish { stream, size, pause_ns, end_ns, .. } = writing.wish;
    // Unpaced streams have the worker for a while.
    let most = if pause_ns == 0 { 1024 } else { 1 };
    for _ in 0..most {
        if writing.due_ns > now {
            return true;
        }
        let written_ns = now_ns();
        if written_ns >= end_ns {
            return false;
        }
        let stamp = [stream, writing.number, written_ns].map(u64::to_le_bytes);
        chunk[..STAMP].copy_from_slice(stamp.as_flattened());
        if writing.ticket.write_record(&chunk[..size as usize]).is_err() {
            return false;
        }
        writing.number += 1;
        writing.due_ns += pause_ns;
    }
    true
}

fn wait_policy(policy: Policy) -> WaitPolicy {
    match policy {
        Policy::Handoff => WaitPolicy::Handoff,
        Policy::Spin => WaitPolicy::Spin,
        Policy::Block => WaitPolicy::Block,
    }
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct StreamReport {
    chunks: u64,
    chunks_per_s: f64,
    delay_p50_ns: Option<u64>,
    delay_p99_ns: Option<u64>,
    delay_max_ns: Option<u64>,
    /// The same of the bare futex wakes of that path, measured before, and what doorbell takes over it.
    floor_p50_ns: Option<u64>,
    floor_p99_ns: Option<u64>,
    p50_over_floor: Option<f64>,
    /// Processor time of the reactors and of the worker, percent of the whole machine.
    reactor_percent: f64,
    worker_percent: f64,
    footprint_bytes: Option<u64>,
    cancel_to_last_chunk_p99_ns: Option<u64>,
    cancel_to_end_p50_ns: Option<u64>,
    cancel_to_end_p99_ns: Option<u64>,
    errors: u64,
}

/// One stream, as its reader sees it.
struct Reading {
    reader: RecordReader,
    number: u64,
    ended: bool,
}

struct Bench {
    options: StreamOptions,
    server: Process,
    clients: Vec<IpcClient>,
    readings: Vec<Reading>,
    frame: Vec<u8>,
    delays: Latencies,
    report: StreamReport,
    /// Streams end by being cancelled; any other that fails is an error.
    cancelling: bool,
    reader_cpu: Option<usize>,
    /// Where reactor and worker run.
    server_cpus: (Option<usize>, Option<usize>),
    directory: PathBuf,
}

/// Runs one measurement and prints it; the number of errors.
///
/// # Errors
///
/// [`BenchError`]: refused options, or whatever stopped the run.
pub fn run(options: &StreamOptions) -> Result<u64, BenchError> {
    if !(STAMP..=CHUNK_MAX).contains(&options.size) {
        return Err(BenchError::option(
            "size",
            format!("must be {STAMP} to {CHUNK_MAX}: a chunk has a stamp"),
        ));
    }
    if options.streams == 0 || options.sessions == 0 || options.sessions > options.streams {
        return Err(BenchError::option("sessions", "must be at least 1, and at most as many as streams"));
    }
    if !(options.rate > 0.0 && options.rate <= 1e6 && options.seconds > 0.0 && options.seconds <= 3600.0) {
        return Err(BenchError::option(
            "rate",
            "must be above 0 and at most a million, --seconds at most 3600",
        ));
    }
    let mut bench = Bench::start(options)?;
    match options.question {
        Question::Latency => {
            let pause_ns = (SECOND as f64 / options.rate) as u64;
            if options.policy != Policy::Spin {
                bench.floor(pause_ns)?;
            }
            bench.streams(1, pause_ns)?;
        }
        Question::Throughput => bench.streams(1, 0)?,
        Question::Many => bench.streams(options.streams, (SECOND as f64 / options.rate) as u64)?,
        Question::Cancel => bench.cancels()?,
    }
    bench.print();
    Ok(bench.report.errors)
}

fn peer(doing: &'static str) -> impl FnOnce(IpcError) -> BenchError {
    move |error| BenchError::peer(doing, error)
}

impl Bench {
    fn start(options: &StreamOptions) -> Result<Self, BenchError> {
        use std::os::unix::fs::DirBuilderExt;
        let directory = std::env::temp_dir().join(format!("doorbell-bench-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&directory).map_err(|e| BenchError::os("mkdir", e))?;
        let allowed = placement::allowed_cpus()?;
        let pinned =
            |index: usize| (!options.unpinned).then(|| allowed[if options.same_core { 0 } else { index }]);
        let (reactor_cpu, other) = (pinned(0), pinned(allowed.len() - 1));
        let path = directory.join("s");
        let connections = options.sessions as u32 + 8;
        let job = StreamJob {
            path: path.clone(),
            policy: options.policy,
            reactor_cpu,
            // A core of its own if there are three.
            worker_cpu: pinned(1.min(allowed.len() - 1)),
            worker_polls: options.question == Question::Latency && options.policy == Policy::Spin,
            connections,
            memory_budget: options.memory_budget.unwrap_or(ServerConfig::default().memory_budget),
        };
        let server_cpus = (job.reactor_cpu, job.worker_cpu);
        let mut server = child::spawn(Role::StreamServer, &job, Stdio::piped(), Stdio::piped())?;
        let () = server.receive()?;
        let sessions = if options.question == Question::Many { options.sessions } else { 1 };
        let streams = if options.question == Question::Many { options.streams } else { 1 };
        // A stream takes one.
        let slots = (streams.div_ceil(sessions) + 8).min(1008) as u32;
        let config = ClientConfig {
            policy: wait_policy(options.policy),
            name: "bench-stream".to_owned(),
            ..ClientConfig::for_load(slots, 1024)
        };
        placement::pin(other)?;
        let connect = |_| IpcClient::connect_with(&path, &config).map_err(peer("connecting"));
        let clients = (0..sessions).map(connect).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            options: options.clone(),
            server,
            clients,
            readings: Vec::new(),
            frame: vec![0; 16 << 10],
            delays: Latencies::new(),
            report: StreamReport::default(),
            cancelling: options.question == Question::Cancel,
            reader_cpu: other,
            server_cpus,
            directory,
        })
    }

    /// The bare futex wakes of the path, in the same places, at the same pace, for as long.
    fn floor(&mut self, pause_ns: u64) -> Result<(), BenchError> {
        let begin_ns = now_ns() + SECOND / 2;
        let measured = begin_ns + SECOND / 2..begin_ns + SECOND / 2 + self.window_ns();
        let (relay_cpu, worker_cpu) = self.server_cpus;
        let job = StreamFloorJob { relay_cpu, worker_cpu, pause_ns, begin_ns, end_ns: measured.end };
        let delays = floor_stream::measure(&job, &measured)?;
        self.report.floor_p50_ns = delays.quantile(0.5);
        self.report.floor_p99_ns = delays.quantile(0.99);
        Ok(())
    }

    fn window_ns(&self) -> u64 {
        (self.options.seconds * SECOND as f64) as u64
    }

    /// Waits in whichever way the policy says, of several sessions in turns.
    fn pause(&self) -> Result<(), BenchError> {
        match (&self.clients[..], self.options.policy) {
            ([only], Policy::Handoff | Policy::Block) => {
                only.wait(Some(std::time::Duration::from_millis(100))).map(|_| ()).map_err(peer("waiting"))
            }
            (_, Policy::Spin) => {
                std::thread::yield_now();
                Ok(())
            }
            // What an event loop would do with as many descriptors, at the price of a delay that is bounded.
            _ => {
                sleep_until(now_ns() + 20_000);
                Ok(())
            }
        }
    }

    /// Takes what has come of one session; how many frames.
    fn take(&mut self, client: usize, measured: &std::ops::Range<u64>) -> Result<u32, BenchError> {
        let mut frames = 0;
        while let Some(taken) = self.clients[client].poll().map_err(peer("polling"))? {
            frames += 1;
            let len = taken.copy_to(&mut self.frame).map_err(peer("reading"))?;
            let (stream, last, ok) = (taken.tag(), taken.is_last(), taken.is_ok());
            drop(taken);
            let now = now_ns();
            let Some(reading) = self.readings.get_mut(stream as usize) else {
                self.report.errors += 1;
                continue;
            };
            let mut bytes = &self.frame[..if ok { len } else { 0 }];
            loop {
                match reading.reader.next(&mut bytes) {
                    Ok(Some(chunk)) => {
                        let words = chunk[..STAMP.min(chunk.len())].as_chunks::<8>().0;
                        let word = |i: usize| words.get(i).copied().map_or(u64::MAX, u64::from_le_bytes);
                        let right = word(0) == stream && word(1) == reading.number;
                        self.report.errors += u64::from(!right || chunk.len() != self.options.size);
                        reading.number += 1;
                        if measured.contains(&word(2)) {
                            self.report.chunks += 1;
                            self.delays.record(now.saturating_sub(word(2)));
                        }
                    }
                    Ok(None) => break,
                    Err(_) => {
                        self.report.errors += 1;
                        break;
                    }
                }
            }
            if last {
                self.report.errors += u64::from(reading.ended || !ok && !self.cancelling);
                reading.ended = true;
                self.report.errors += u64::from(ok && reading.reader.finish().is_err());
            }
        }
        Ok(frames)
    }

    fn submit(&self, connection: &Connection<'_>, wish: Wish) -> Result<CallId, BenchError> {
        // As fast as it goes needs room for more than one frame; a paced stream gets on with its own slot.
        let reply_capacity = if wish.pause_ns == 0 { 64 << 10 } else { 0 };
        let options =
            CallOptions { tag: wish.stream, pieces: true, reply_capacity, ..CallOptions::default() };
        connection.submit(STREAM, &wish.to_bytes(), &options).map_err(peer("submitting"))
    }

    fn streams(&mut self, count: usize, pause_ns: u64) -> Result<(), BenchError> {
        let begin_ns = now_ns() + SECOND / 2;
        let measured = begin_ns + SECOND / 2..begin_ns + SECOND / 2 + self.window_ns();
        let open = |client: &IpcClient| client.open().map(Connection::detach).map_err(peer("opening"));
        let connections = self.clients.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        for index in 0..count {
            self.readings.push(Reading { reader: RecordReader::default(), number: 0, ended: false });
            let of = index % self.clients.len();
            let connection = self.clients[of].attached(connections[of]);
            // Spread over the pause.
            let begin_ns = begin_ns + pause_ns * index as u64 / count as u64;
            let (stream, size, end_ns) = (index as u64, self.options.size as u64, measured.end);
            self.submit(&connection, Wish { stream, size, pause_ns, begin_ns, end_ns })?;
        }
        let pid = self.server.pid();
        let (mut before, mut after, mut memory) = (None, None, None);
        while self.readings.iter().any(|reading| !reading.ended) {
            let mut frames = 0;
            for client in 0..self.clients.len() {
                frames += self.take(client, &measured)?;
            }
            let now = now_ns();
            if before.is_none() && now >= measured.start {
                before = Some((now, cpu_of(pid)));
            } else if after.is_none() && now + SECOND / 10 >= measured.end {
                after = Some((now, cpu_of(pid)));
                memory = Probe::new(pid, Segments::of(&[pid])).sample();
            }
            if now > measured.end + 10 * SECOND {
                return Err(BenchError::peer("reading", "streams that do not end"));
            }
            if frames == 0 {
                self.pause()?;
            }
        }
        self.report.chunks_per_s = self.report.chunks as f64 / self.options.seconds;
        self.report.footprint_bytes = memory.map(|memory| memory.footprint);
        if let (Some((from, cpu_before)), Some((to, cpu_after))) = (before, after) {
            let machine = (to - from) as f64 * placement::machine_cores() as f64 / 100.0;
            self.report.reactor_percent = (cpu_after.0 - cpu_before.0) as f64 / machine;
            self.report.worker_percent = (cpu_after.1 - cpu_before.1) as f64 / machine;
        }
        Ok(())
    }

    /// Cancels stream after stream in full flow.
    fn cancels(&mut self) -> Result<(), BenchError> {
        let (mut to_last, mut to_end) = (Latencies::new(), Latencies::new());
        let connection = self.clients[0].open().map_err(peer("opening"))?.detach();
        let ends = now_ns() + self.window_ns();
        let mut stream = 0;
        while now_ns() < ends {
            self.readings.push(Reading { reader: RecordReader::default(), number: 0, ended: false });
            let size = self.options.size as u64;
            let wish = Wish { stream, size, pause_ns: 0, begin_ns: 0, end_ns: u64::MAX };
            let call = self.submit(&self.clients[0].attached(connection), wish)?;
            let at = stream as usize;
            while self.readings[at].number < BEFORE_CANCEL {
                if self.take(0, &(0..u64::MAX))? == 0 {
                    self.pause()?;
                }
            }
            let cancelled = now_ns();
            self.clients[0].cancel(call);
            self.clients[0].flush().map_err(peer("flushing"))?;
            let mut last = cancelled;
            while !self.readings[at].ended {
                let before = self.readings[at].number;
                let frames = self.take(0, &(0..u64::MAX))?;
                if self.readings[at].number > before {
                    last = now_ns();
                }
                if frames == 0 {
                    self.pause()?;
                }
            }
            to_end.record(now_ns() - cancelled);
            to_last.record(last - cancelled);
            stream += 1;
        }
        self.report.cancel_to_last_chunk_p99_ns = to_last.quantile(0.99);
        self.report.cancel_to_end_p50_ns = to_end.quantile(0.5);
        self.report.cancel_to_end_p99_ns = to_end.quantile(0.99);
        Ok(())
    }

    fn print(&mut self) {
        let report = &mut self.report;
        report.delay_p50_ns = self.delays.quantile(0.5);
        report.delay_p99_ns = self.delays.quantile(0.99);
        report.delay_max_ns = self.delays.max();
        let over = |(p50, floor): (u64, u64)| p50 as f64 / floor as f64;
        report.p50_over_floor = report.delay_p50_ns.zip(report.floor_p50_ns).map(over);
        let json = serde_json::to_value(&*report).expect("a report has string keys only");
        if self.options.json {
            println!("{json}");
            return;
        }
        let place = self.reader_cpu.map_or("unpinned".to_owned(), |cpu| format!("reader on core {cpu}"));
        println!("stream {:?}, {} bytes, {place}", self.options.question, self.options.size);
        for (name, value) in json.as_object().into_iter().flatten() {
            if !value.is_null() {
                println!("  {name:28} {value}");
            }
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("bench: {} could not be removed: {error}", self.directory.display());
        }
    }
}

/// Processor time of a server: of its reactors, and of its worker.
fn cpu_of(pid: u32) -> (u64, u64) {
    let mut sums = (0, 0);
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let ns = read("schedstat").split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
        if read("comm").trim() == WORKER { sums.1 += ns } else { sums.0 += ns }
    }
    sums
}

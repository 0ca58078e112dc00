//! What do the codecs cost, beside plain serde_json on the same input? `plain` derives what a user of serde would, once
//! with memory of its own, once borrowing as much as serde_json lets it.

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use doorbell::codec::{Codec, Json, Rkyv};
use doorbell::messages::{AIRequest, StreamChunk};
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;

/// The time that this thread had a processor, ns: what else the machine does does not count.
struct ProcessorTime;

impl Measurement for ProcessorTime {
    type Intermediate = u64;
    type Value = u64;

    fn start(&self) -> u64 {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }

    fn end(&self, start: u64) -> u64 {
        self.start() - start
    }

    fn add(&self, a: &u64, b: &u64) -> u64 {
        a + b
    }

    fn zero(&self) -> u64 {
        0
    }

    fn to_f64(&self, value: &u64) -> f64 {
        *value as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// The floor: what `#[derive]` and `serde_json` do without us.
mod plain {
    use serde::{Deserialize, Serialize};
    use serde_json::value::RawValue;
    use std::borrow::Cow;

    /// The same fields, of types `$text` and `$raw`.
    macro_rules! request {
        ($name:ident $(<$life:lifetime>)?, $text:ty, $raw:ty $(, $borrow:meta)?) => {
            pub mod $name {
                use super::*;

                #[derive(Serialize, Deserialize)]
                #[serde(rename_all = "camelCase")]
                pub struct Request $(<$life>)? {
                    $(#[$borrow])?
                    pub messages: Vec<Message $(<$life>)?>,
                    $(#[$borrow])?
                    model: $text,
                    #[serde(skip_serializing_if = "Option::is_none")]
                    temperature: Option<f64>,
                    #[serde(skip_serializing_if = "Option::is_none")]
                    max_tokens: Option<f64>,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    tools: Option<Vec<Tool $(<$life>)?>>,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    system_prompt: Option<$text>,
                    #[serde(skip_serializing_if = "Option::is_none")]
                    stream: Option<bool>,
                }

                #[derive(Serialize, Deserialize)]
                #[serde(rename_all = "lowercase")]
                pub enum Role {
                    System,
                    User,
                    Assistant,
                }

                #[derive(Serialize, Deserialize)]
                #[serde(rename_all = "camelCase")]
                pub struct Message $(<$life>)? {
                    role: Role,
                    $(#[$borrow])?
                    content: $text,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    tool_calls: Option<Vec<Call $(<$life>)?>>,
                }

                #[derive(Serialize, Deserialize)]
                struct Call $(<$life>)? {
                    $(#[$borrow])?
                    name: $text,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    parameters: Option<$raw>,
                    $(#[$borrow])?
                    id: $text,
                }

                #[derive(Serialize, Deserialize)]
                struct Tool $(<$life>)? {
                    $(#[$borrow])?
                    name: $text,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    description: Option<$text>,
                    $(#[$borrow])?
                    #[serde(skip_serializing_if = "Option::is_none")]
                    parameters: Option<$raw>,
                }
            }
        };
    }

    request!(owned, String, Box<RawValue>);
    request!(borrowed<'a>, Cow<'a, str>, &'a RawValue, serde(borrow));

    #[derive(Serialize, Deserialize)]
    #[serde(tag = "type", rename_all = "camelCase")]
    pub enum Chunk {
        Text { text: String },
    }
}

/// What an editor sends for one line.
const SMALL: &str = r#"{"messages":[{"role":"system","content":"You are terse."},{"role":"user","content":"Complete: fn main() {"}],"model":"gpt-4o-mini","temperature":0.2,"maxTokens":64,"stream":true}"#;

/// A conversation of about 100 KiB with code in it, calls of tools, and tools with schemas.
fn large() -> String {
    let code = "    if let Some(value) = map.get(\"key\") {\n        println!(\"{value}\");\n    }\n";
    let prose =
        "The function walks over all the entries of the table and keeps those whose age is below the limit. ";
    let content = serde_json::to_string(&format!("{}{}", prose.repeat(8), code.repeat(12))).unwrap();
    let call = r#"{"name":"read_file","parameters":{"path":"src/main.rs","lines":[1,400],"options":{"numbers":true,"limit":1e3}},"id":"call_17"}"#;
    let mut messages = Vec::new();
    for i in 0..44 {
        messages.push(match i % 2 {
            0 => format!(r#"{{"role":"user","content":{content}}}"#),
            _ => format!(r#"{{"role":"assistant","content":{content},"toolCalls":[{call},{call}]}}"#),
        });
    }
    let tool = r#"{"name":"read_file","description":"Reads a file of the workspace.","parameters":{"type":"object","properties":{"path":{"type":"string","description":"relative to the workspace"},"lines":{"type":"array","items":{"type":"integer"},"minItems":2,"maxItems":2}},"required":["path"]}}"#;
    let tools = vec![tool; 24].join(",");
    let messages = messages.join(",");
    format!(
        r#"{{"messages":[{messages}],"model":"gpt-4o","temperature":0.7,"tools":[{tools}],"systemPrompt":"Be brief","stream":true}}"#
    )
}

fn decode_json(group: &mut BenchmarkGroup<'_, ProcessorTime>, body: &[u8]) {
    let messages = Json::new().decode_request(body).unwrap().messages.len();
    group.bench_function("decode/view/ours", |b| {
        b.iter(|| assert_eq!(Json::new().decode_request(black_box(body)).unwrap().messages.len(), messages))
    });
    group.bench_function("decode/view/plain", |b| {
        b.iter(|| {
            let request: plain::borrowed::Request<'_> = serde_json::from_slice(black_box(body)).unwrap();
            assert_eq!(request.messages.len(), messages);
        })
    });
    group.bench_function("decode/owned/ours", |b| {
        b.iter(|| {
            let request = Json::new().decode_request(black_box(body)).unwrap().into_owned();
            assert_eq!(request.messages.len(), messages);
        })
    });
    group.bench_function("decode/owned/plain", |b| {
        b.iter(|| {
            let request: plain::owned::Request = serde_json::from_slice(black_box(body)).unwrap();
            assert_eq!(request.messages.len(), messages);
        })
    });
}

fn encode_json(group: &mut BenchmarkGroup<'_, ProcessorTime>, body: &[u8]) {
    let ours = Json::new().decode_request(body).unwrap().into_owned();
    let plain: plain::owned::Request = serde_json::from_slice(body).unwrap();
    let mut out = Vec::with_capacity(body.len() * 2);
    group.bench_function("encode/ours", |b| {
        b.iter(|| {
            out.clear();
            Json::new().encode_request(black_box(&ours), &mut out);
            assert_eq!(out.len(), body.len());
        })
    });
    group.bench_function("encode/plain", |b| {
        b.iter(|| {
            out.clear();
            serde_json::to_writer(&mut out, black_box(&plain)).unwrap();
            // It writes 64 as 64.0.
            assert!(out.len() >= body.len());
        })
    });
}

fn archives(group: &mut BenchmarkGroup<'_, ProcessorTime>, request: &AIRequest) {
    let mut archive = Vec::new();
    Rkyv::new().encode_request(request, &mut archive);
    let messages = request.messages.len();
    // Once at an address as archives want it, once one byte further.
    let mut shifted = vec![0; 16 + archive.len()];
    let start = shifted.as_ptr().align_offset(16);
    for (name, shift) in [("aligned", 0), ("unaligned", 1)] {
        let place = start + shift..start + shift + archive.len();
        let place = if place.end > shifted.len() { 0..0 } else { place };
        if place.is_empty() {
            continue;
        }
        shifted[place.clone()].copy_from_slice(&archive);
        let body = &shifted[place];
        group.bench_function(format!("decode/rkyv/{name}"), |b| {
            b.iter(|| {
                assert_eq!(Rkyv::new().decode_request(black_box(body)).unwrap().messages.len(), messages)
            })
        });
    }
    let mut out = Vec::with_capacity(archive.len());
    group.bench_function("encode/rkyv", |b| {
        b.iter(|| {
            out.clear();
            Rkyv::new().encode_request(black_box(request), &mut out);
            assert_eq!(out.len(), archive.len());
        })
    });
}

/// What does a request cost, read and written?
fn requests(c: &mut Criterion<ProcessorTime>) {
    for (name, body) in [("small", SMALL.to_owned()), ("large", large())] {
        let mut group = c.benchmark_group(format!("codec/{name}"));
        group.throughput(Throughput::Bytes(body.len() as u64));
        decode_json(&mut group, body.as_bytes());
        encode_json(&mut group, body.as_bytes());
        let request = Json::new().decode_request(body.as_bytes()).unwrap().into_owned();
        archives(&mut group, &request);
        group.finish();
    }
}

/// What does a chunk of a stream cost?
fn chunks(c: &mut Criterion<ProcessorTime>) {
    let text = " and then some\n".to_owned();
    let (ours, plain) = (StreamChunk::Text { text: text.clone() }, plain::Chunk::Text { text });
    let mut out = Vec::with_capacity(1024);
    let mut group = c.benchmark_group("codec/chunk");
    group.bench_function("encode/ours", |b| {
        b.iter(|| {
            out.clear();
            Json::new().encode_chunk(black_box(&ours), &mut out);
        })
    });
    group.bench_function("encode/plain", |b| {
        b.iter(|| {
            out.clear();
            serde_json::to_writer(&mut out, black_box(&plain)).unwrap();
        })
    });
    let body = out.clone();
    group.bench_function("decode/ours", |b| {
        b.iter(|| assert_eq!(Json::new().decode_chunk(black_box(&body)).unwrap(), ours))
    });
    group.bench_function("decode/plain", |b| {
        b.iter(|| {
            let plain::Chunk::Text { text } = serde_json::from_slice(black_box(&body)).unwrap();
            assert_eq!(text.len(), 15);
        })
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(ProcessorTime);
    targets = requests, chunks
}
criterion_main!(benches);

//! From a client through the server to a provider and back: requests, streams, cancels, deadlines, errors
//! (R2.3–R2.7, R2.9–R2.11).
#![cfg(feature = "openai")]

mod common;

use common::openai::{self, Fake, Step};
use common::provider::{assert_ends, request, text_of};
use common::{TestDir, eventually, stat};
use doorbell::codec::{Codec, codec_of};
use doorbell::messages::{AIRequest, AIResponse, FinishReason, StreamChunk};
use doorbell::provider::{HostHandle, ProviderHost, ProviderPool, ProvidersConfig};
use doorbell::{
    CallOptions, ClientConfig, Connection, HandlerTable, IpcClient, IpcError, IpcServer, MessageType,
    ServerConfig, ShutdownHandle,
};
use doorbell_shm::entry::codec;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

static TABLE: HandlerTable<HostHandle> = HandlerTable::with_builtins().register_provider_handlers();

/// A server whose providers are a loopback, as the default, and an OpenAI-compatible one for `gpt-*`.
struct Server {
    path: PathBuf,
    stop: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
    _host: ProviderHost,
    directory: TestDir,
}

impl Server {
    fn start(upstream: Option<&Fake>) -> Self {
        Self::start_with(upstream, ServerConfig { reactors: 1, ..ServerConfig::default() })
    }

    fn start_with(upstream: Option<&Fake>, config: ServerConfig) -> Self {
        let directory = TestDir::new();
        let loopback = json!({ "name": "loopback", "kind": "loopback" });
        let base_url = upstream.map_or_else(|| "http://127.0.0.1:9/v1".to_owned(), Fake::base_url);
        let openai = json!({ "name": "upstream", "kind": "openai", "base_url": base_url, "models": ["gpt-*"],
            "retry": { "retries": 0 } });
        let providers = json!({ "default": null, "providers": [loopback, openai] });
        let providers: ProvidersConfig = serde_json::from_value(providers).unwrap();
        let pool = ProviderPool::from_config(&providers).unwrap();
        let host = ProviderHost::start(Arc::new(pool)).unwrap();
        let path = directory.join("s");
        let config = ServerConfig { file_roots: vec![directory.0.clone()], ..config };
        let bound = IpcServer::new(&TABLE, host.handle()).config(config).bind(&path).unwrap();
        let stop = bound.shutdown_handle();
        let thread = std::thread::spawn(move || {
            bound.serve().unwrap();
        });
        Self { path, stop, thread: Some(thread), _host: host, directory }
    }

    fn client(&self) -> IpcClient {
        IpcClient::connect(&self.path).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.shutdown().unwrap();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn json_codec() -> &'static dyn Codec {
    codec_of(codec::JSON).unwrap()
}

fn encoded(codec: &dyn Codec, request: &AIRequest) -> Vec<u8> {
    let mut body = Vec::new();
    codec.encode_request(request, &mut body);
    body
}

fn streamed(model: &str, content: &str) -> AIRequest {
    AIRequest { stream: Some(true), ..request(model, content) }
}

/// All chunks of a streamed answer; its error, if it ended with one.
fn chunks(
    connection: &Connection<'_>,
    message_type: MessageType,
    codec: &dyn Codec,
    request: &AIRequest,
) -> (Vec<StreamChunk>, Option<IpcError>) {
    let records =
        connection.stream(message_type, &encoded(codec, request), &CallOptions::default()).unwrap().records();
    let mut chunks = Vec::new();
    for record in records {
        match record {
            Ok(record) => chunks.push(codec.decode_chunk(&record).unwrap()),
            Err(error) => return (chunks, Some(error)),
        }
    }
    (chunks, None)
}

fn whole(
    connection: &Connection<'_>,
    codec: &dyn Codec,
    request: &AIRequest,
) -> Result<AIResponse, IpcError> {
    let answer = connection.call(MessageType::CHAT, &encoded(codec, request))?;
    Ok(codec.decode_response(&answer).unwrap())
}

/// Goal:   R2.4, R2.5, R2.10: both messages are answered in both codecs, whole and as a stream, with the same text; a
///         stream ends exactly once, with its reason.
#[test]
fn r2_10_r2_5_complete_and_chat_are_answered_whole_and_streamed_in_each_codec() {
    let server = Server::start(None);
    let client = server.client();
    for id in [codec::JSON, codec::RKYV, codec::RAW] {
        let codec = codec_of(id).unwrap_or(json_codec());
        let connection = client.open_with(id, false).unwrap();
        let response = whole(&connection, codec, &request("loopback-fast", "tell me")).unwrap();
        assert!(response.content.starts_with("loopback: ") && response.content.ends_with("tell me"));
        assert_eq!(response.finish_reason, FinishReason::Stop);
        for message_type in [MessageType::CHAT, MessageType::COMPLETE] {
            let (chunks, error) =
                chunks(&connection, message_type, codec, &streamed("loopback-fast", "tell me"));
            assert!(error.is_none(), "{error:?}");
            assert_ends(&chunks, FinishReason::Stop);
            assert_eq!(text_of(&chunks), response.content, "codec {id}");
            assert!(chunks.iter().any(|chunk| matches!(chunk, StreamChunk::Usage(_))));
        }
    }
}

/// Goal:   R2.5, R1.9: ten thousand chunks come in order, none is lost or doubled, whatever cuts them into frames.
#[test]
fn r2_5_r1_9_many_chunks_come_in_order() {
    let server = Server::start(None);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let asked = streamed("loopback-fast-chunks-10000", "go");
    let (chunks, error) = chunks(&connection, MessageType::CHAT, json_codec(), &asked);
    assert!(error.is_none(), "{error:?}");
    assert_ends(&chunks, FinishReason::Stop);
    let texts: Vec<&str> = chunks
        .iter()
        .filter_map(|chunk| match chunk {
            StreamChunk::Text { text } => Some(text.as_str()),
            _ => None,
        })
        .collect();
    let numbers: Vec<u64> =
        texts.iter().filter_map(|text| text.split_whitespace().find_map(|word| word.parse().ok())).collect();
    assert_eq!(numbers.len(), 10_000, "{:?}", &texts[..3]);
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
}

/// Goal:   R2.6, trap 19: a cancel in mid-stream ends the call once, with that status, and closes the upstream connection;
///         the next call on the connection is not touched.
#[test]
fn r2_6_trap19_a_cancel_reaches_the_upstream_connection() {
    let upstream = Fake::start(|_| {
        vec![Step::Send(openai::stream_head()), Step::Send(openai::text("one").into()), Step::UntilClosed]
    });
    let server = Server::start(Some(&upstream));
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let body = encoded(json_codec(), &streamed("gpt-x", "go"));
    for drops in [false, true] {
        let mut stream = connection.stream(MessageType::CHAT, &body, &CallOptions::default()).unwrap();
        let first = stream.next_frame().unwrap().unwrap().to_vec().unwrap();
        assert!(String::from_utf8(first).unwrap().contains("one"));
        if drops {
            drop(stream);
        } else {
            stream.cancel().unwrap();
            stream.cancel().unwrap();
            let end = stream.next_frame().unwrap();
            assert!(matches!(end, Err(IpcError::Cancelled)), "{end:?}");
            assert!(stream.next_frame().is_none(), "it ends once");
        }
        upstream.closed_at();
    }
    let answer = whole(&connection, json_codec(), &request("loopback", "hello")).unwrap();
    assert!(answer.content.ends_with("hello"));
    eventually("no ticket is held", || stat(&connection, "deferred_live") == 0);
}

/// Goal:   R2.6: a cancel of a call that has not been answered at all; one of a call that has ended hits nobody.
#[test]
fn r2_6_a_cancel_before_the_first_chunk_and_one_after_the_end() {
    let server = Server::start(None);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let body = encoded(json_codec(), &streamed("loopback-hang", "go"));
    let mut stream = connection.stream(MessageType::CHAT, &body, &CallOptions::default()).unwrap();
    let late = stream.id();
    stream.cancel().unwrap();
    assert!(matches!(stream.next_frame(), Some(Err(IpcError::Cancelled))));
    for _ in 0..100 {
        client.cancel(late);
        let answer = whole(&connection, json_codec(), &request("loopback", "hello")).unwrap();
        assert!(answer.content.ends_with("hello"));
    }
}

/// Goal:   R2.9: a deadline ends a call that its provider keeps, and the upstream connection with it; so does the server's
///         default deadline, where the call has none.
#[test]
fn r2_9_a_deadline_ends_what_a_provider_keeps() {
    let upstream = Fake::start(|_| vec![Step::Send(openai::stream_head()), Step::UntilClosed]);
    let config = ServerConfig {
        reactors: 1,
        default_deadline: Some(Duration::from_millis(150)),
        ..ServerConfig::default()
    };
    let server = Server::start_with(Some(&upstream), config);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let body = encoded(json_codec(), &streamed("gpt-x", "go"));
    for deadline in [Some(Duration::from_millis(50)), None] {
        let options = CallOptions { deadline, ..CallOptions::default() };
        let begun = Instant::now();
        let mut stream = connection.stream(MessageType::CHAT, &body, &options).unwrap();
        let end = stream.next_frame().unwrap();
        assert!(matches!(end, Err(IpcError::DeadlineExceeded)), "{end:?}");
        assert!(begun.elapsed() >= deadline.unwrap_or(Duration::from_millis(150)));
        upstream.closed_at();
    }
}

/// Goal:   every failure of a provider is one typed error of its call, with a word for programs and what to do; the
///         connection goes on.
/// Method: the table of what a provider can do, whole and streamed.
#[test]
fn r2_7_r3_1_what_a_provider_fails_with_is_one_typed_error() {
    let body =
        |status: &str, headers: &str, body: &str| vec![Step::Send(openai::answer(status, headers, body))];
    let table = [
        (
            "401 Unauthorized",
            "",
            r#"{"error":{"message":"bad key","type":"auth"}}"#,
            "unauthorized",
            "key_env",
        ),
        (
            "429 Too Many Requests",
            "retry-after: 7\r\n",
            r#"{"error":{"message":"slow down"}}"#,
            "rate_limited",
            "7",
        ),
        ("400 Bad Request", "", r#"{"error":{"message":"no such thing"}}"#, "bad_request", "no such thing"),
        ("200 OK", "", "no json", "protocol", "base_url"),
    ];
    for (status, headers, text, code, part) in table {
        let steps = body(status, headers, text);
        let upstream = Fake::always(steps);
        let server = Server::start(Some(&upstream));
        let client = server.client();
        let connection = client.open_with(codec::JSON, false).unwrap();
        for stream in [None, Some(true)] {
            let asked = AIRequest { stream, ..request("gpt-x", "a secret prompt") };
            let (chunks, error) = chunks(&connection, MessageType::CHAT, json_codec(), &asked);
            assert!(chunks.is_empty(), "{chunks:?}");
            let Some(IpcError::Upstream { code: found, message }) = error else {
                panic!("{status}: {error:?}")
            };
            assert_eq!(found, code, "{message}");
            assert!(message.contains(part) && !message.contains("secret"), "{message}");
        }
        assert!(whole(&connection, json_codec(), &request("loopback", "x")).is_ok());
    }
    // Down: nobody listens at port 9.
    let server = Server::start(None);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let down = whole(&connection, json_codec(), &request("gpt-x", "x")).unwrap_err();
    assert!(matches!(&down, IpcError::Upstream { code, .. } if code == "unavailable"), "{down:?}");
    let unknown = whole(&connection, json_codec(), &request("nobody", "x")).unwrap_err();
    assert!(matches!(&unknown, IpcError::Upstream { code, message }
        if code == "unknown_model" && message.contains("nobody") && message.contains("gpt-*")));
}

/// Goal:   S12: requests that their provider keeps take so much memory and no more: the next one is told so, and has room
///         again once they have gone. An answer without end is given up, and the thread of the providers goes on meanwhile.
/// Method: requests of a mebibyte to a model that hangs, until one is refused; then a whole answer of endless chunks.
#[test]
fn s12_neither_requests_nor_answers_take_memory_without_end() {
    let server = Server::start(None);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let config = ClientConfig { ring_entries: 256, small_slots: 250, ..ClientConfig::default() };
    let hoarder = IpcClient::connect_with(&server.path, &config).unwrap();
    let hoard = hoarder.open_with(codec::JSON, false).unwrap();
    let long = encoded(json_codec(), &streamed("loopback-hang", &"x".repeat(1 << 20)));
    let mut kept = 0;
    let error = loop {
        hoard.submit(MessageType::CHAT, &long, &CallOptions::default()).unwrap();
        let mut refused = None;
        eventually("the request is kept or refused", || {
            hoarder.wait(Some(Duration::from_millis(1))).unwrap();
            refused = hoarder.poll().unwrap().map(|answer| answer.result().unwrap_err());
            refused.is_some() || stat(&connection, "deferred_live") > kept
        });
        match refused {
            Some(error) => break error,
            None => kept += 1,
        }
        assert!(kept < 100, "there is no end to it");
    };
    assert!(
        matches!(&error, IpcError::Upstream { code, message }
        if code == "overloaded" && message.contains("max_request_bytes")),
        "{error:?}"
    );
    assert!(kept >= 60, "{kept}");
    drop(hoard);
    drop(hoarder);
    eventually("there is room again", || whole(&connection, json_codec(), &request("loopback", "x")).is_ok());

    let endless = request("loopback-size-1048576-chunks-18446744073709551615", "x");
    let error = whole(&connection, json_codec(), &endless).unwrap_err();
    assert!(
        matches!(&error, IpcError::Upstream { code, message }
        if code == "protocol" && message.contains("longer than 10485760")),
        "{error:?}"
    );
    assert!(whole(&connection, json_codec(), &request("loopback", "x")).is_ok());
}

/// Goal:   trap 17: a stream that breaks off in the middle says so: an error chunk, then the end, and no status that says
///         all is well in silence.
#[test]
fn trap17_a_stream_that_is_cut_off_ends_with_an_error() {
    let upstream =
        Fake::always(vec![Step::Send(openai::stream_head()), Step::Send(openai::text("half").into())]);
    let server = Server::start(Some(&upstream));
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let (chunks, error) = chunks(&connection, MessageType::CHAT, json_codec(), &streamed("gpt-x", "go"));
    assert!(error.is_none(), "{error:?}");
    assert_ends(&chunks, FinishReason::Error);
    assert_eq!(text_of(&chunks), "half");
    assert!(matches!(&chunks[chunks.len() - 2], StreamChunk::Error { code, .. } if code == "interrupted"));
}

/// Goal:   bad input: a body that makes no sense is one decode error, with field and place; nothing hangs, and the next
///         call is answered.
#[test]
fn r3_1_a_body_that_makes_no_sense_is_told_with_field_and_place() {
    let server = Server::start(None);
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let deep = format!(r#"{{"messages":{}"#, "[".repeat(100_000));
    let table = [
        ("{broken", "invalid JSON"),
        (r#"{"messages":[{"role":"robot","content":"x"}],"model":"m"}"#, "messages[0].role"),
        (r#"{"messages":[{"role":"user"}],"model":"m"}"#, "messages[0]"),
        (r#"{"messages":[{"role":"user","content":5}],"model":"m"}"#, "messages[0].content"),
        (r#"{"messages":[]}"#, "model"),
        (deep.as_str(), "nested deeper than"),
    ];
    for (body, part) in table {
        for message_type in [MessageType::CHAT, MessageType::COMPLETE] {
            let error = connection.call(message_type, body.as_bytes()).unwrap_err();
            assert!(
                matches!(&error, IpcError::Decode(text) if text.contains(part) && text.contains("byte")),
                "{error}"
            );
        }
    }
    let long = vec![b' '; 11 << 20];
    assert!(matches!(connection.call(MessageType::CHAT, &long), Err(IpcError::MessageTooLarge(_))));
    assert!(whole(&connection, json_codec(), &request("loopback", "x")).is_ok());
}

/// Goal:   R2.11: a question about a file is answered by the provider, beside the facts, for content and for a path;
///         without one nobody is asked.
#[test]
fn r2_11_a_question_about_a_file_goes_to_the_provider() {
    let server = Server::start(None);
    std::fs::write(server.directory.join("poem.txt"), "roses are red\n").unwrap();
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let path = server.directory.join("poem.txt");
    let ask = |body: serde_json::Value| {
        let answer = connection.call(MessageType::ANALYZE_FILE, body.to_string().as_bytes())?;
        Ok::<serde_json::Value, IpcError>(serde_json::from_slice(&answer).unwrap())
    };
    for subject in [json!({ "content": "roses are red\n" }), json!({ "path": path })] {
        let facts = ask(subject.clone()).unwrap();
        assert_eq!((&facts["size"], &facts["lines"]), (&json!(14), &json!(1)));
        assert!(facts.get("answer").is_none());
        let mut question = subject;
        question["question"] = json!("what colour?");
        let answered = ask(question).unwrap();
        assert_eq!(answered["sha256"], facts["sha256"]);
        let content = answered["answer"]["content"].as_str().unwrap();
        let position = |part: &str| content.find(part).unwrap_or_else(|| panic!("{content} has {part}"));
        assert!(content.starts_with("loopback: ") && position("what colour?") < position("roses are red"));
    }
    // Too long for a question, and fine without one.
    let long = vec![b'x'; (1 << 20) + 1];
    std::fs::write(server.directory.join("long.txt"), &long).unwrap();
    let path = server.directory.join("long.txt");
    assert_eq!(ask(json!({ "path": path })).unwrap()["size"], json!(long.len()));
    let refused = ask(json!({ "path": path, "question": "?" })).unwrap_err().to_string();
    assert!(refused.contains("1048576"), "{refused}");
    let refused = ask(json!({ "content": "x".repeat(long.len()), "question": "?" })).unwrap_err().to_string();
    assert!(refused.contains("1048576"), "{refused}");
    std::fs::write(server.directory.join("binary"), [0xff, 0xfe, 0xff]).unwrap();
    let binary = ask(json!({ "path": server.directory.join("binary"), "question": "?" })).unwrap_err();
    assert!(binary.to_string().contains("UTF-8"), "{binary}");
}

/// Goal:   R1.9: a reader that stops stops the provider's socket behind its own stream, and nobody else; when it reads on,
///         everything comes.
#[test]
fn r1_9_a_reader_that_stops_stops_its_providers_socket() {
    let upstream = Fake::start(|_| {
        vec![Step::Send(openai::stream_head()), Step::SendForEver(openai::text(&"x".repeat(1000)).into())]
    });
    let server = Server::start(Some(&upstream));
    let client = server.client();
    let connection = client.open_with(codec::JSON, false).unwrap();
    let body = encoded(json_codec(), &streamed("gpt-x", "go"));
    let mut stream = connection.stream(MessageType::CHAT, &body, &CallOptions::default()).unwrap();
    stream.next_frame().unwrap().unwrap();
    let written = || upstream.written.load(std::sync::atomic::Ordering::SeqCst);
    // It stops when the sockets are full: the same for a hundred calls of somebody else's.
    let other = server.client();
    let others = other.open_with(codec::JSON, false).unwrap();
    eventually("the provider stops writing", || {
        let before = written();
        for _ in 0..100 {
            assert!(whole(&others, json_codec(), &request("loopback", "x")).is_ok());
        }
        written() == before
    });
    let before = written();
    while written() == before {
        assert!(!stream.next_frame().unwrap().unwrap().is_empty());
    }
}

//! The OpenAI-compatible provider against a server that misbehaves in every way.
#![cfg(feature = "openai")]

mod common;

use common::openai::{Fake, Step, answer, chunked, chunked_head, end, event, stream_head, text};
use common::provider::{Ended, all, assert_ends, call, next, request, run, sink, text_of};
use doorbell::messages::{AIResponse, FinishReason, StreamChunk, Usage};
use doorbell::provider::{
    Call, Kind, OpenAi, Phase, ProviderConfig, ProviderError, ProviderHost, ProviderKind, ProviderPool,
    ProvidersConfig, RetryConfig, Timeouts,
};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const KEY: &str = "sk-very-secret-key-0123456789";
const PROMPT: &str = "the user's own words, which nobody else may read";

fn config(base_url: String) -> ProviderConfig {
    ProviderConfig {
        name: "fake".into(),
        kind: ProviderKind::OpenAi,
        base_url,
        key_env: Some("FAKE_KEY".into()),
        models: vec!["m".into(), "gpt-*".into()],
        timeouts: Timeouts { connect_ms: 1000, first_chunk_ms: 400, between_chunks_ms: 300, total_ms: 5000 },
        retry: RetryConfig { retries: 0, first_pause_ms: 10, max_pause_ms: 2000 },
        ..ProviderConfig::default()
    }
}

fn variable(name: &str) -> Option<String> {
    (name == "FAKE_KEY").then(|| format!("{KEY}\n"))
}

fn pool_of(providers: Vec<ProviderConfig>) -> ProviderPool {
    let config = ProvidersConfig { default: None, providers, ..ProvidersConfig::default() };
    ProviderPool::from_config_with(&config, variable).unwrap()
}

fn pool(server: &Fake) -> ProviderPool {
    pool_of(vec![config(server.base_url())])
}

/// Goal:   R2.7, R4.3: the server of a provider is told the trace of the call, as it came, and of no other call.
/// Method: calls with and without a trace, whole and streamed, on one connection; the heads of the requests.
#[test]
fn r2_7_r4_3_the_provider_is_told_the_trace() {
    let whole =
        r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}"#;
    let server = Fake::always(vec![Step::Send(answer("200 OK", "", whole)), Step::Next]);
    let pool = pool(&server);
    let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    run(async {
        for trace in [None, Some(text.parse().unwrap()), None] {
            let call = call("m", PROMPT).with_traceparent(trace);
            pool.answer(&call).await.unwrap();
            all(pool.stream(&call).await.unwrap()).await;
        }
    });
    let told: Vec<_> = server
        .requests()
        .iter()
        .map(|seen| {
            seen.head
                .lines()
                .filter_map(|line| line.strip_prefix("traceparent: "))
                .map(str::to_owned)
                .collect()
        })
        .collect::<Vec<Vec<String>>>();
    let (none, some) = (vec![], vec![text.to_owned()]);
    assert_eq!(told, [&none, &none, &some, &some, &none, &none].map(Clone::clone));
}

/// A server that streams these bytes and closes.
fn streams(body: impl Into<Vec<u8>>) -> Fake {
    Fake::always(vec![Step::Send(stream_head()), Step::Send(body.into())])
}

fn chunks_of(server: &Fake) -> Result<Vec<StreamChunk>, ProviderError> {
    let pool = pool(server);
    run(async { Ok(all(pool.stream(&call("m", PROMPT)).await?).await) })
}

fn whole_of(server: &Fake) -> Result<AIResponse, ProviderError> {
    let pool = pool(server);
    run(async { pool.answer(&call("m", PROMPT)).await })
}

/// Of chunks that end with an error: the text before it, and the error.
fn broken(chunks: &[StreamChunk]) -> (String, &str, &str) {
    assert_ends(chunks, FinishReason::Error);
    let Some(StreamChunk::Error { code, message }) = chunks.iter().rev().nth(1) else { panic!("{chunks:?}") };
    assert_is_discreet(message);
    (text_of(chunks), code, message)
}

/// Trap 21: neither key nor conversation.
fn assert_is_discreet(text: &str) {
    assert!(!text.contains("secret") && !text.contains("own words"), "{text}");
}

const CALLS: &str = r#"{"choices":[{"message":{"role":"assistant","content":null,"reasoning_content":"why",
    "tool_calls":[{"id":"c1","type":"function","function":{"name":"t","arguments":"{\"x\": 1e400}"}}]},
    "finish_reason":"tool_calls"}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#;

/// Goal:   R2.7: a request reaches the API with its key, and the whole answer comes back in our words.
#[test]
fn r2_7_a_whole_answer_with_calls_reasoning_and_usage() {
    let server = Fake::always(vec![Step::Send(answer("200 OK", "", CALLS))]);
    let response = whole_of(&server).unwrap();
    let calls = response.tool_calls.unwrap();
    assert_eq!((response.content.as_str(), response.reasoning.as_deref()), ("", Some("why")));
    assert_eq!((calls[0].id.as_str(), calls[0].name.as_str()), ("c1", "t"));
    assert_eq!(calls[0].parameters.as_ref().unwrap().get(), r#"{"x": 1e400}"#);
    let usage = Usage { prompt_tokens: 3.0, completion_tokens: 4.0, total_tokens: 7.0 };
    assert_eq!((response.usage, response.finish_reason), (Some(usage), FinishReason::ToolCalls));
    let seen = &server.requests()[0];
    assert!(seen.head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{}", seen.head);
    assert!(seen.head.contains(&format!("authorization: Bearer {KEY}\r\n")), "{}", seen.head);
    assert!(seen.body.contains(PROMPT) && seen.body.ends_with(r#""stream":false}"#), "{}", seen.body);
}

/// Goal:   R2.5, R2.7: a stream gives the same chunks in whatever pieces it comes: half events and half characters.
#[test]
fn r2_7_r2_5_a_stream_comes_whole_in_pieces_of_any_length() {
    let calls = event(
        r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"t","arguments":"{}"}}]}}]}"#,
    );
    let reasoning = event(r#"{"choices":[{"index":0,"delta":{"reasoning":"hm"}}]}"#);
    let body =
        format!(": hello\r\n\r\n{reasoning}{}{}{calls}{}", text("ü😀"), text(" end"), end("tool_calls"));
    let expected = [
        r#"{"type":"reasoning","text":"hm"}"#,
        r#"{"type":"text","text":"ü😀"}"#,
        r#"{"type":"text","text":" end"}"#,
        r#"{"type":"toolCallStart","id":"c","name":"t"}"#,
        r#"{"type":"toolCallDelta","id":"c","parameters":"{}"}"#,
        r#"{"type":"toolCallEnd","id":"c"}"#,
        r#"{"type":"usage","promptTokens":3,"completionTokens":4,"totalTokens":7}"#,
        r#"{"type":"end","finishReason":"toolCalls"}"#,
    ];
    for len in [1, 2, 3, 7, 1000] {
        let server =
            Fake::always(vec![Step::Send(stream_head()), Step::Dribble(body.clone().into_bytes(), len)]);
        let chunks = chunks_of(&server).unwrap();
        let json: Vec<String> = chunks.iter().map(|chunk| serde_json::to_string(chunk).unwrap()).collect();
        assert_eq!(json, expected, "in pieces of {len}");
    }
}

/// Goal:   a server that does not stream gives the same answer as chunks.
#[test]
fn r2_7_a_server_that_does_not_stream_gives_chunks_all_the_same() {
    let chunks = chunks_of(&Fake::always(vec![Step::Send(answer("200 OK", "", CALLS))])).unwrap();
    assert_ends(&chunks, FinishReason::ToolCalls);
    assert_eq!(chunks.len(), 6, "{chunks:?}");
}

/// Goal:   a provider that is down, or closes without an answer, is unavailable, by name and address.
#[test]
fn r2_7_a_provider_that_is_down_is_unavailable() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pool = pool_of(vec![config(format!("http://{free}/v1"))]);
    let error = run(async { pool.stream(&call("m", PROMPT)).await }).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ProviderError::Unavailable { .. }), "{error:?}");
    assert!(
        text.contains("`fake`") && text.contains(&free.port().to_string()) && text.contains("refused"),
        "{text}"
    );
    let error = chunks_of(&Fake::always(vec![])).unwrap_err();
    assert!(matches!(error, ProviderError::Unavailable { .. }), "{error:?}");
}

/// Goal:   each time-out ends the call, and says what took too long.
#[test]
fn r2_7_a_slow_provider_times_out_in_each_phase() {
    let silent = chunks_of(&Fake::always(vec![Step::UntilClosed]));
    assert!(matches!(silent, Err(ProviderError::Timeout { phase: Phase::FirstChunk, .. })), "{silent:?}");
    let comments =
        Fake::always(vec![Step::Send(stream_head()), Step::Send(b": wait\n\n".to_vec()), Step::UntilClosed]);
    let waiting = chunks_of(&comments);
    assert!(matches!(waiting, Err(ProviderError::Timeout { phase: Phase::FirstChunk, .. })), "{waiting:?}");
    comments.closed_at();

    let stalls =
        Fake::always(vec![Step::Send(stream_head()), Step::Send(text("one").into()), Step::UntilClosed]);
    let chunks = chunks_of(&stalls).unwrap();
    let (text, code, message) = broken(&chunks);
    assert_eq!((text.as_str(), code), ("one", "timeout"));
    assert!(message.contains("between_chunks_ms") && message.contains("300ms"), "{message}");
    stalls.closed_at();
}

/// Goal:   the total time ends a stream that goes on and on, and an answer that never comes.
#[test]
fn r2_7_the_total_time_is_the_last_limit() {
    let piece: Vec<Step> = (0..200)
        .flat_map(|_| [Step::Send(common::openai::text("x").into()), Step::Wait(Duration::from_millis(20))])
        .collect();
    let server = Fake::always([vec![Step::Send(stream_head())], piece].concat());
    let mut short = config(server.base_url());
    short.timeouts.total_ms = 500;
    let pool = pool_of(vec![short.clone()]);
    let chunks =
        run(async { Ok::<_, ProviderError>(all(pool.stream(&call("m", PROMPT)).await?).await) }).unwrap();
    let (text, code, message) = broken(&chunks);
    assert!(text.len() > 3 && code == "timeout" && message.contains("total_ms"), "{text} {message}");
    let silent = Fake::always(vec![Step::UntilClosed]);
    let pool = pool_of(vec![ProviderConfig { base_url: silent.base_url(), ..short }]);
    let error = run(async { pool.answer(&call("m", PROMPT)).await }).unwrap_err();
    assert!(matches!(error, ProviderError::Timeout { phase: Phase::Total, .. }), "{error:?}");
    silent.closed_at();
}

/// Goal:   a server that accepts and says nothing of TLS does not keep us connecting.
#[test]
fn r2_7_a_connection_that_is_not_made_times_out() {
    let silent = Fake::always(vec![Step::UntilClosed]);
    let mut slow = config(format!("https://localhost:{}/v1", silent.address.port()));
    slow.timeouts.connect_ms = 200;
    let pool = pool_of(vec![slow]);
    let error = run(async { pool.answer(&call("m", PROMPT)).await }).unwrap_err();
    assert!(matches!(error, ProviderError::Timeout { phase: Phase::Connect, .. }), "{error:?}");
}

/// Goal:   garbage in place of HTTP, of a stream, of an event, is a protocol error that quotes nothing.
#[test]
fn r2_7_trap21_garbage_is_a_protocol_error() {
    let garbage: Vec<u8> = (0..4000u32).map(|n| (n * 7919 % 251) as u8).collect();
    let html = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 3\r\n\r\n<p>".to_vec();
    for steps in [
        vec![Step::Send(garbage.clone())],
        vec![Step::Send(b"secret protocol\r\n\r\n".to_vec())],
        vec![Step::Send(html)],
        vec![Step::Send(stream_head()), Step::Send(event("{secret").into())],
        vec![Step::Send(stream_head()), Step::Send(event(r#"{"choices":"secret"}"#).into())],
        vec![Step::Send(stream_head()), Step::Send(b"data: \xff\xfe secret\n\n".to_vec())],
        vec![Step::Send(stream_head()), Step::Send(vec![b'x'; 300 << 10])],
        vec![
            Step::Send(stream_head()),
            Step::Send(format!("data: {}\n", "x".repeat(1000)).repeat(1100).into()),
        ],
    ] {
        let error = chunks_of(&Fake::always(steps)).unwrap_err();
        assert!(matches!(error, ProviderError::Protocol { .. }), "{error:?}");
        assert_is_discreet(&error.to_string());
    }
    let mut body = text("good").into_bytes();
    body.extend(garbage.repeat(100));
    body.extend(b"\n\ndata: {nonsense\n\n");
    let chunks = chunks_of(&streams(body)).unwrap();
    assert_eq!(broken(&chunks).1, "protocol");
}

/// Goal:   a stream that ends in mid-event, or without its end, is interrupted; what came before is kept.
/// Method: cut in an event, behind an event, in a chunk of HTTP, by close and by reset.
#[test]
fn r2_7_a_stream_that_is_cut_is_interrupted() {
    for tail in ["", "data: {\"choices\":[", ": comment\n"] {
        let chunks = chunks_of(&streams(format!("{}{tail}", text("one")))).unwrap();
        let (text, code, _) = broken(&chunks);
        assert_eq!((text.as_str(), code), ("one", "interrupted"), "{tail}");
    }
    let half = b"40\r\ndata: {".to_vec();
    let server =
        Fake::always(vec![Step::Send(chunked_head()), Step::Send(chunked(&text("one"))), Step::Send(half)]);
    let chunks = chunks_of(&server).unwrap();
    assert_eq!(broken(&chunks).1, "interrupted");
    let error = chunks_of(&streams("data: {\"cho")).unwrap_err();
    assert!(matches!(error, ProviderError::Interrupted { .. }), "{error:?}");
    let cut = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{".to_vec();
    let error = whole_of(&Fake::always(vec![Step::Send(cut)])).unwrap_err();
    assert!(matches!(error, ProviderError::Interrupted { .. }), "{error:?}");
}

/// Goal:   a last `[DONE]` without its empty line, and an end without `[DONE]`, are ends.
#[test]
fn r2_7_ends_are_understood_however_servers_write_them() {
    let finish = event(r#"{"choices":[{"delta":{"content":"!"},"finish_reason":"length"}]}"#);
    for tail in ["", "data: [DONE]", "data: [DONE]\n", "data:[DONE]\r\n\r\n"] {
        let chunks = chunks_of(&streams(format!("{finish}{tail}"))).unwrap();
        assert_ends(&chunks, FinishReason::Length);
    }
}

fn refusal(status: &str, headers: &str, body: &str) -> ProviderError {
    let server = Fake::always(vec![Step::Send(answer(status, headers, body))]);
    let [whole, streamed] = [whole_of(&server).unwrap_err(), chunks_of(&server).unwrap_err()];
    assert_eq!(whole, streamed);
    assert_is_discreet(&format!("{whole} {whole:?}"));
    whole
}

/// Goal:   each status with its explanation is one typed error.
#[test]
fn r2_7_each_status_is_one_typed_error() {
    let body = format!(
        r#"{{"error":{{"message":"Incorrect API key provided: {KEY}","type":"x","code":"invalid_api_key"}}}}"#
    );
    assert_eq!(
        refusal("401 Unauthorized", "", &body),
        ProviderError::Unauthorized { provider: "fake".into(), status: 401 }
    );

    let body =
        r#"{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded"}}"#;
    let bad = |status, code: Option<&str>, message: &str| ProviderError::BadRequest {
        provider: "fake".into(),
        status,
        code: code.map(Into::into),
        message: message.into(),
    };
    assert_eq!(refusal("400 Bad Request", "", body), bad(400, Some("context_length_exceeded"), "too long"));
    assert_eq!(refusal("422 Unprocessable", "", r#"{"error":"no\nway"}"#), bad(422, None, "no way"));
    assert_eq!(refusal("404 Not Found", "", "<html>"), bad(404, None, "it does not say why"));

    let body = r#"{"error":{"message":"The model `m` does not exist","code":"model_not_found"}}"#;
    let known = vec!["m".into(), "gpt-*".into()];
    assert_eq!(refusal("404 Not Found", "", body), ProviderError::UnknownModel { model: "m".into(), known });

    let body = r#"{"error":{"message":"slow down","code":"rate_limit_exceeded","param":null}}"#;
    let limited = |seconds: Option<f64>| ProviderError::RateLimited {
        provider: "fake".into(),
        retry_after: seconds.map(Duration::from_secs_f64),
        code: Some("rate_limit_exceeded".into()),
    };
    assert_eq!(refusal("429 Too Many", "retry-after: 20\r\n", body), limited(Some(20.0)));
    assert_eq!(refusal("429 Too Many", "retry-after-ms: 1500\r\n", body), limited(Some(1.5)));
    assert_eq!(refusal("429 Too Many", "", body), limited(None));
    let dates = "date: Wed, 21 Oct 2026 07:28:00 GMT\r\nretry-after: Wed, 21 Oct 2026 07:28:30 GMT\r\n";
    assert_eq!(refusal("429 Too Many", dates, body), limited(Some(30.0)));

    for status in ["500 Broken", "503 Busy", "529 Overloaded"] {
        let error = refusal(status, "retry-after: 7\r\n", r#"{"error":{"message":"oops"}}"#);
        assert!(error.to_string().contains("oops") && error.to_string().contains(&status[..3]), "{error}");
        assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    }
    let moved = refusal("302 Found", "location: http://elsewhere/\r\n", "");
    assert!(matches!(moved, ProviderError::Protocol { .. }), "{moved:?}");
    let filtered =
        refusal("200 OK", "", r#"{"choices":[{"message":{"content":""},"finish_reason":"content_filter"}]}"#);
    assert_eq!(filtered.code(), "failed");
}

/// Goal:   trap 21: a server that repeats key or conversation in its sentence is not passed on.
#[test]
fn r2_7_trap21_no_key_and_no_conversation_in_an_error() {
    for told in [PROMPT, &PROMPT[3..30], KEY, &KEY[3..20]] {
        let body = format!(r#"{{"error":{{"message":"cannot do `{told}`"}}}}"#);
        let error = refusal("400 Bad Request", "", &body);
        assert!(error.to_string().contains("left out"), "{error}");
    }
    let config = config("https://api.example.org/v1".into());
    let provider = OpenAi::from_config(&config, variable).unwrap();
    assert_is_discreet(&format!("{provider:?}"));
}

/// Goal:   an error among the events ends the stream with that error; before the first chunk it is the call's.
#[test]
fn r2_7_an_error_in_the_stream_is_told() {
    let error = event(r#"{"error":{"message":"busy","type":"overloaded_error","code":null}}"#);
    assert!(matches!(chunks_of(&streams(error.clone())), Err(ProviderError::Unavailable { .. })));
    let chunks = chunks_of(&streams(format!("{}{error}{}", text("one"), text("two")))).unwrap();
    let (text, code, message) = broken(&chunks);
    assert_eq!((text.as_str(), code), ("one", "unavailable"));
    assert!(message.contains("busy"), "{message}");
    let limited = event(r#"{"error":{"message":"slow","code":429}}"#);
    assert!(matches!(chunks_of(&streams(limited)), Err(ProviderError::RateLimited { .. })));
}

fn retrying(server: &Fake, retries: u32) -> ProviderPool {
    let mut config = config(server.base_url());
    config.retry.retries = retries;
    pool_of(vec![config])
}

/// Goal:   failures before the first chunk are tried again, Retry-After is waited for, and 401 is final.
#[test]
fn r2_7_a_failure_before_the_first_chunk_is_tried_again() {
    let server = Fake::start(|seen| match seen.number {
        0 => vec![Step::Send(answer("429 Too Many", "retry-after: 1\r\n", ""))],
        1 => vec![Step::Send(answer("500 Broken", "", ""))],
        2 => vec![],
        _ => vec![Step::Send(stream_head()), Step::Send((text("at last") + &end("stop")).into())],
    });
    let begun = Instant::now();
    let pool = retrying(&server, 3);
    let chunks =
        run(async { Ok::<_, ProviderError>(all(pool.stream(&call("m", "x")).await?).await) }).unwrap();
    assert_eq!(text_of(&chunks), "at last");
    assert_ends(&chunks, FinishReason::Stop);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(server.requests().len(), 4);

    let server = Fake::always(vec![Step::Send(answer("401 No", "", ""))]);
    let pool = retrying(&server, 3);
    run(async { pool.answer(&call("m", "x")).await }).unwrap_err();
    assert_eq!(server.requests().len(), 1);

    let server = Fake::always(vec![Step::Send(answer("429 Too Many", "retry-after: 60\r\n", ""))]);
    let pool = retrying(&server, 3);
    let error = run(async { pool.answer(&call("m", "x")).await }).unwrap_err();
    assert_eq!((error.retry_after(), server.requests().len()), (Some(Duration::from_secs(60)), 1));
}

/// Goal:   after the first chunk nothing is asked again: the reader would read it twice.
#[test]
fn r2_7_nothing_is_asked_again_after_the_first_chunk() {
    let server = streams(text("one"));
    let pool = retrying(&server, 3);
    let chunks =
        run(async { Ok::<_, ProviderError>(all(pool.stream(&call("m", "x")).await?).await) }).unwrap();
    assert_eq!(broken(&chunks).0, "one");
    assert_eq!(server.requests().len(), 1);
}

/// Goal:   another provider answers where the first cannot, in the order configured, and not for a bad request.
#[test]
fn r2_7_providers_fail_over_in_order() {
    let broken = Fake::always(vec![Step::Send(answer("503 Busy", "", ""))]);
    let refusing = Fake::always(vec![Step::Send(answer("400 No", "", ""))]);
    let good = streams(text("good") + &end("stop"));
    let named = |name: &str, server: &Fake, models: &[&str], fail_over: &[&str]| ProviderConfig {
        name: name.into(),
        models: models.iter().map(|m| (*m).into()).collect(),
        fail_over: fail_over.iter().map(|m| (*m).into()).collect(),
        ..config(server.base_url())
    };
    let pool = pool_of(vec![
        named("broken", &broken, &["m"], &["good", "refusing"]),
        named("refusing", &refusing, &["bad"], &["good"]),
        named("good", &good, &[], &[]),
    ]);
    let ask = |model: &'static str| {
        run(async { pool.stream(&call(model, "x")).await.map(|a| a.provider().to_owned()) })
    };
    assert_eq!(ask("m").unwrap(), "good");
    assert!(matches!(ask("bad"), Err(ProviderError::BadRequest { .. })));
    assert_eq!([&broken, &refusing, &good].map(|server| server.requests().len()), [1, 1, 1]);
    let known = vec!["m".to_owned(), "bad".into()];
    assert_eq!(ask("other"), Err(ProviderError::UnknownModel { model: "other".into(), known }));
}

/// A server that has begun to stream and waits for the client to close.
fn waiting() -> Fake {
    Fake::always(vec![Step::Send(chunked_head()), Step::Send(chunked(&text("one"))), Step::UntilClosed])
}

const SOON: Duration = Duration::from_millis(10);

/// Runs a cancel several times: on a busy machine one may be late. Asserted of the best, printed of all.
fn assert_closes_soon(mut cancelled: impl FnMut() -> Duration) {
    let mut times: Vec<Duration> = (0..5).map(|_| cancelled()).collect();
    times.sort_unstable();
    println!("closed after {times:?}");
    assert!(times[0] < SOON, "{times:?}");
}

/// Goal:   R2.6, trap 19: cancel closes the connection to the provider within 10 ms, however it is said, and wherever the
///         call is.
#[test]
fn r2_7_r2_6_trap19_cancel_closes_the_upstream_connection() {
    // Dropped in mid-stream.
    assert_closes_soon(|| {
        let server = waiting();
        let pool = pool(&server);
        run(async {
            let mut answer = pool.stream(&call("m", "x")).await.unwrap();
            next(&mut answer).await.unwrap();
            let begun = Instant::now();
            drop(answer);
            tokio::task::spawn_blocking(move || server.closed_at() - begun).await.unwrap()
        })
    });
    // By the token, in mid-stream: an end follows.
    assert_closes_soon(|| {
        let server = waiting();
        let pool = pool(&server);
        run(async {
            let call = call("m", "x");
            let mut answer = pool.stream(&call).await.unwrap();
            next(&mut answer).await.unwrap();
            let begun = Instant::now();
            call.cancel.cancel();
            assert_ends(&all(answer).await, FinishReason::Cancelled);
            tokio::task::spawn_blocking(move || server.closed_at() - begun).await.unwrap()
        })
    });
    // Before the answer has begun.
    assert_closes_soon(|| {
        let server = Fake::always(vec![Step::UntilClosed]);
        let pool = Arc::new(pool(&server));
        run(async {
            let call = call("m", "x");
            let asked = tokio::spawn({
                let (pool, call) = (Arc::clone(&pool), call.clone());
                async move { pool.answer(&call).await }
            });
            while server.requests().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let begun = Instant::now();
            call.cancel.cancel();
            assert_eq!(asked.await.unwrap().unwrap_err(), ProviderError::Cancelled);
            tokio::task::spawn_blocking(move || server.closed_at() - begun).await.unwrap()
        })
    });
}

/// Goal:   the same through the host, by the reader.
#[test]
fn r2_7_r2_6_a_reader_that_cancels_closes_the_upstream_connection() {
    let server = waiting();
    let host = ProviderHost::start(Arc::new(pool(&server))).unwrap();
    assert_closes_soon(|| {
        let (sink, reader) = sink(16);
        let mut request = request("m", "x");
        request.stream = Some(true);
        host.handle().submit(request, Kind::Chat, sink);
        while reader.unread() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let begun = Instant::now();
        reader.cancel();
        let ended = reader.ended();
        assert!(matches!(ended, Ended::Failed(ProviderError::Cancelled)), "{ended:?}");
        server.closed_at() - begun
    });
}

/// Goal:   R1.9: a reader that stops stops the server's socket and nobody else, and is cancelled at its total time.
#[test]
fn r2_7_r1_9_a_reader_that_stops_stops_the_providers_socket() {
    let endless =
        Fake::always(vec![Step::Send(stream_head()), Step::SendForEver(text(&"x".repeat(1000)).into())]);
    let other = streams(text("fine") + &end("stop"));
    let mut slow = config(endless.base_url());
    slow.timeouts.total_ms = 3000;
    let other = ProviderConfig { name: "other".into(), models: vec!["o".into()], ..config(other.base_url()) };
    let host = ProviderHost::start(Arc::new(pool_of(vec![slow, other]))).unwrap();
    let submit = |model: &str, room| {
        let (sink, reader) = sink(room);
        let mut request = request(model, "x");
        request.stream = Some(true);
        host.handle().submit(request, Kind::Chat, sink);
        reader
    };
    let stopped = submit("m", 4);
    let mut before = 0;
    let stands_still = |before: &mut u64| {
        std::thread::sleep(Duration::from_millis(200));
        let now = endless.written.load(Ordering::Relaxed);
        now > 0 && now == std::mem::replace(before, now)
    };
    assert!((0..10).any(|_| stands_still(&mut before)), "the server goes on sending");
    assert_eq!(stopped.unread(), 4);
    println!("the server stood still after {before} bytes");
    let (chunks, ended) = submit("o", 4).read_all();
    assert!(matches!(ended, Ended::Finished) && text_of(&chunks) == "fine", "{ended:?}");
    // Its time is up, although it does not read; its end is there when it does.
    endless.closed_at();
    let (chunks, ended) = stopped.read_all();
    assert!(matches!(ended, Ended::Finished), "{ended:?}");
    assert_eq!(broken(&chunks).1, "timeout");
}

/// Goal:   a connection is used again after an answer that came to its end; one that the server closed meanwhile costs
///         nobody an error.
#[test]
fn r2_7_connections_are_used_again() {
    let body = |tail: &str| [chunked(&(text("one") + &end("stop"))), tail.into()].concat();
    let server = Fake::start(move |seen| {
        let mut steps = vec![Step::Send(chunked_head()), Step::Send(body("0\r\n\r\n"))];
        steps.extend((seen.number < 2).then_some(Step::Next));
        steps
    });
    let pool = pool(&server);
    run(async {
        for _ in 0..5 {
            let chunks = all(pool.stream(&call("m", "x")).await.unwrap()).await;
            assert_ends(&chunks, FinishReason::Stop);
            // A close on this machine is seen at once.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let connections: Vec<usize> = server.requests().iter().map(|seen| seen.connection).collect();
    assert_eq!(connections, [0, 0, 0, 1, 2]);
}

/// Goal:   health tells who can be reached and accepts us, of all at once.
#[test]
fn r2_7_health_of_all_providers() {
    let list = r#"{"data":[]}"#;
    let good = Fake::always(vec![Step::Send(answer("200 OK", "", list))]);
    let closed = Fake::always(vec![Step::Send(answer("401 No", "", ""))]);
    let named = |name: &str, server: &Fake| ProviderConfig { name: name.into(), ..config(server.base_url()) };
    let pool = pool_of(vec![named("good", &good), named("closed", &closed)]);
    let health = run(pool.health());
    assert_eq!(health[0].state, Ok(()));
    assert!(matches!(health[1].state, Err(ProviderError::Unauthorized { .. })), "{health:?}");
    assert!(good.requests()[0].head.starts_with("GET /v1/models "));
}

/// Goal:   keys come from the variable that the configuration names, and what is wrong with them is told without them.
#[test]
fn r2_7_trap21_a_key_that_cannot_be_used_is_told() {
    let config = config("http://127.0.0.1:1/v1".into());
    for (value, problem) in
        [(None, "not set"), (Some(" \n"), "empty"), (Some("sk-secret\nmore"), "characters")]
    {
        let error = OpenAi::from_config(&config, |_| value.map(Into::into)).unwrap_err().to_string();
        assert!(error.contains("FAKE_KEY") && error.contains("`fake`") && error.contains(problem), "{error}");
        assert_is_discreet(&error);
    }
}

/// Goal:   TLS: a server whose authority is in the configured file is trusted, another is not.
#[test]
fn r2_7_tls_with_an_authority_of_ones_own() {
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::ring};
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let tls = Arc::new(tls);
    let body = [stream_head(), (text("private") + &end("stop")).into()].concat();
    let server = Fake::start_with(
        move |_| vec![Step::Send(body.clone())],
        move |socket| Some(Box::new(StreamOwned::new(ServerConnection::new(Arc::clone(&tls)).ok()?, socket))),
    );
    let file = std::env::temp_dir().join(format!("doorbell-test-ca-{}.pem", std::process::id()));
    std::fs::write(&file, made.cert.pem()).unwrap();
    let untrusted = config(format!("https://localhost:{}/v1", server.address.port()));
    let trusted = ProviderConfig { ca_file: Some(file.clone()), ..untrusted.clone() };
    let ask = |config: ProviderConfig| {
        let pool = pool_of(vec![config]);
        run(async { Ok::<_, ProviderError>(all(pool.stream(&call("m", "x")).await?).await) })
    };
    let chunks = ask(trusted);
    std::fs::remove_file(&file).unwrap();
    let chunks = chunks.unwrap();
    assert_eq!(text_of(&chunks), "private");
    let error = ask(untrusted).unwrap_err();
    assert!(matches!(&error, ProviderError::Unavailable { what, .. } if what.contains("TLS")), "{error:?}");
}

/// Goal:   many calls at once with a server that fails in all ways: every one ends, and none disturbs another.
#[test]
fn r2_7_nothing_hangs_and_nobody_disturbs_another() {
    let server = Fake::start(|seen| match seen.number % 5 {
        0 => vec![],
        1 => vec![Step::Send(stream_head()), Step::Send(text("cut").into())],
        2 => vec![Step::UntilClosed],
        3 => vec![Step::Send(b"\0\0\0garbage".to_vec())],
        _ => vec![Step::Send(stream_head()), Step::Send((text("good") + &end("stop")).into())],
    });
    let host = ProviderHost::start(Arc::new(pool(&server))).unwrap();
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let (sink, reader) = sink(8);
            let mut request = request("m", "x");
            request.stream = Some(true);
            host.handle().submit_call(Call::new(Kind::Complete, request), sink);
            reader
        })
        .collect();
    let good = readers.iter().filter(|reader| {
        let (chunks, ended) = reader.read_all();
        assert!(!matches!(ended, Ended::Dropped | Ended::Answered(_)), "{ended:?}");
        text_of(&chunks) == "good" && matches!(ended, Ended::Finished)
    });
    assert_eq!(good.count(), 20);
}

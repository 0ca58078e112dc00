//! The pool, the host's thread and the loopback, without a network.
#![cfg(feature = "providers")]

mod common;

use common::provider::{Ended, all, assert_ends, call, next, request, run, sink, text_of};
use doorbell::messages::{AIRequest, AIResponse, FinishReason, StreamChunk};
use doorbell::provider::{
    BoxFuture, Call, ChunkStream, Kind, Loopback, LoopbackConfig, Phase, Provider, ProviderConfig,
    ProviderError, ProviderHost, ProviderPool, ProvidersConfig,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn default_pool() -> ProviderPool {
    ProviderPool::from_config(&ProvidersConfig::default()).unwrap()
}

fn chunks_of(pool: &ProviderPool, call: &Call) -> Result<Vec<StreamChunk>, ProviderError> {
    run(async { Ok(all(pool.stream(call).await?).await) })
}

/// Goal:   R2.7: the loopback needs nothing, says what it is in every answer, and says the same each time.
/// Method: streamed and whole, for any model, with a limit of one token.
#[test]
fn r2_7_every_answer_of_a_loopback_says_so() {
    let pool = default_pool();
    for model in ["gpt-4o", "loopback-fast", "", "loopback-fast-chunks-9"] {
        for max_tokens in [None, Some(1.0), Some(-5.0)] {
            let asked = || {
                let mut request = request(model, "Grüße");
                request.max_tokens = max_tokens;
                Call::new(Kind::Complete, request)
            };
            let whole = run(pool.answer(&asked())).unwrap();
            assert!(whole.content.starts_with("loopback: "), "{whole:?}");
            let chunks = chunks_of(&pool, &asked()).unwrap();
            assert_eq!(text_of(&chunks), whole.content);
            assert_eq!(chunks_of(&pool, &asked()).unwrap(), chunks);
            assert_ends(&chunks, whole.finish_reason);
        }
    }
    let whole = run(pool.answer(&call("gpt-4o", "Grüße"))).unwrap();
    assert!(whole.content.contains("\"gpt-4o\"") && whole.content.contains("Grüße"), "{whole:?}");
    assert_eq!(whole.finish_reason, FinishReason::Stop);
    assert_eq!(whole.usage.unwrap().prompt_tokens, 2.0);
}

/// Goal:   the loopback calls tools that the last message names, and not again when it has their result.
#[test]
fn r2_7_a_loopback_calls_tools() {
    let asked = |last: &str| -> Call {
        let text = format!(
            r#"{{"messages":[{last}],"model":"loopback-fast","tools":[{{"name":"weather"}},{{"name":"clock"}}]}}"#
        );
        Call::new(Kind::Chat, serde_json::from_str(&text).unwrap())
    };
    let pool = default_pool();
    let call = asked(r#"{"role":"user","content":"use the clock, \"please\""}"#);
    let whole = run(pool.answer(&call)).unwrap();
    let calls = whole.tool_calls.unwrap();
    assert_eq!((calls.len(), calls[0].name.as_str()), (1, "clock"));
    assert_eq!(
        calls[0].parameters.as_ref().unwrap().get(),
        r#"{"loopback":true,"message":"use the clock, \"please\""}"#
    );
    assert_eq!(whole.finish_reason, FinishReason::ToolCalls);
    let kinds: Vec<String> = chunks_of(&pool, &call)
        .unwrap()
        .iter()
        .map(|chunk| serde_json::to_value(chunk).unwrap()["type"].as_str().unwrap().to_owned())
        .filter(|kind| kind != "text")
        .collect();
    assert_eq!(kinds, ["toolCallStart", "toolCallDelta", "toolCallDelta", "toolCallEnd", "usage", "end"]);
    let result = asked(r#"{"role":"user","content":"clock: noon","toolCalls":[{"name":"clock","id":"x"}]}"#);
    assert!(run(pool.answer(&result)).unwrap().tool_calls.is_none());
}

/// Goal:   every failure that can be asked for is that typed error, and says that it is with the loopback.
#[test]
fn r2_7_simulated_failures_are_typed() {
    let mut config = ProviderConfig { name: "loopback".into(), ..ProviderConfig::default() };
    config.retry.retries = 0;
    (config.timeouts.first_chunk_ms, config.timeouts.between_chunks_ms) = (200, 200);
    let config = ProvidersConfig { default: None, providers: vec![config], ..ProvidersConfig::default() };
    let pool = ProviderPool::from_config(&config).unwrap();
    for (word, code) in [
        ("error", "failed"),
        ("unavailable", "unavailable"),
        ("unauthorized", "unauthorized"),
        ("limited", "rate_limited"),
        ("badrequest", "bad_request"),
        ("garbage", "protocol"),
        ("unknown", "unknown_model"),
        ("overloaded", "overloaded"),
        ("hang", "timeout"),
        ("slow", "timeout"),
        ("nonsense", "unknown_model"),
    ] {
        let error = chunks_of(&pool, &call(&format!("loopback-{word}"), "x")).unwrap_err();
        assert_eq!(error.code(), code, "{word}");
        assert!(error.to_string().contains("loopback"), "{error}");
    }
    for (word, code) in [("cut", "interrupted"), ("stall", "timeout")] {
        let chunks = chunks_of(&pool, &call(&format!("loopback-fast-{word}"), "x")).unwrap();
        assert_ends(&chunks, FinishReason::Error);
        let error = &chunks[chunks.len() - 2];
        assert!(matches!(error, StreamChunk::Error { code: told, .. } if told == code), "{chunks:?}");
        assert_eq!(chunks.len(), 5);
    }
    assert_eq!(chunks_of(&pool, &call("gpt-4o", "x")).unwrap_err().code(), "unknown_model");
}

/// Goal:   a loopback keeps its pace: neither faster nor, over a second, much slower.
#[test]
fn r2_7_a_loopback_keeps_its_pace() {
    let pool = default_pool();
    let begun = Instant::now();
    let chunks = chunks_of(&pool, &call("loopback-pace-100-chunks-51", "x")).unwrap();
    assert_eq!(chunks.len(), 53);
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(495) && took < Duration::from_millis(1500), "{took:?}");
}

/// Goal:   a stamped chunk tells when it was made, by the monotonic clock.
#[test]
fn r2_7_stamped_chunks_tell_when_they_were_made() {
    let chunks = chunks_of(&default_pool(), &call("loopback-pace-1000-stamped-chunks-20", "x")).unwrap();
    let stamps: Vec<u64> = chunks
        .iter()
        .filter_map(|chunk| match chunk {
            StreamChunk::Text { text } => Some(text.split(' ').next().unwrap().parse().unwrap()),
            _ => None,
        })
        .collect();
    assert_eq!(stamps.len(), 20);
    assert!(stamps.is_sorted() && stamps[19] - stamps[0] >= 18_000_000, "{stamps:?}");
}

/// Goal:   S12: no more run at once, and no more wait, than may; those that wait are answered in their turn.
#[test]
fn r2_7_s12_what_runs_and_what_waits_is_bounded() {
    let config = ProviderConfig { max_concurrent: 2, max_waiting: 3, ..ProviderConfig::default() };
    let pool =
        ProviderPool::builder().register(Loopback::new("l", LoopbackConfig::default()), config).build();
    let pool = Arc::new(pool.unwrap());
    run(async {
        let ask = |model: &'static str| {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.stream(&call(model, "x")).await })
        };
        let mut running = Vec::new();
        for _ in 0..2 {
            running.push(ask("loopback").await.unwrap().unwrap());
        }
        let waiting: Vec<_> = (0..3).map(|_| ask("loopback-fast")).collect();
        tokio::task::yield_now().await;
        let refused = ask("loopback-fast").await.unwrap().unwrap_err();
        assert_eq!(refused, ProviderError::Overloaded { whom: "provider `l`".into(), waiting: 3 });
        assert!(waiting.iter().all(|task| !task.is_finished()));
        // One that is dropped makes room for all three, one after the other.
        running.pop();
        for task in waiting {
            assert_ends(&all(task.await.unwrap().unwrap()).await, FinishReason::Stop);
        }
    });
}

/// Goal:   who waits in the queue is timed out, and can be cancelled, there.
#[test]
fn r2_7_r2_6_waiting_ends_by_time_and_by_cancel() {
    let mut config = ProviderConfig { max_concurrent: 1, ..ProviderConfig::default() };
    config.timeouts.total_ms = 300;
    let pool = ProviderPool::builder()
        .register(Loopback::new("l", LoopbackConfig::default()), config)
        .build()
        .unwrap();
    run(async {
        let _first = pool.stream(&call("loopback", "x")).await.unwrap();
        let cancelled = call("loopback", "x");
        let token = cancelled.cancel.clone();
        tokio::spawn(async move { token.cancel() });
        assert_eq!(pool.answer(&cancelled).await.unwrap_err(), ProviderError::Cancelled);
        // Cancelled before it starts, and twice.
        assert_eq!(pool.answer(&cancelled).await.unwrap_err(), ProviderError::Cancelled);
        let late = pool.answer(&call("loopback", "x")).await.unwrap_err();
        assert!(matches!(late, ProviderError::Timeout { phase: Phase::Total, .. }), "{late:?}");
    });
}

/// A provider that does what its model says.
struct Odd;

impl Provider for Odd {
    fn name(&self) -> &str {
        "odd"
    }

    fn chat<'a>(&'a self, _: &'a Call) -> BoxFuture<'a, Result<AIResponse, ProviderError>> {
        panic!("a provider that panics on purpose")
    }

    fn stream<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<ChunkStream, ProviderError>> {
        Box::pin(async {
            let text = || StreamChunk::Text { text: "t".into() };
            let end = || StreamChunk::End { finish_reason: FinishReason::Stop };
            Ok(chunks(match call.request.model.as_str() {
                "empty" => vec![],
                "endless" => vec![text()],
                "ends twice" => vec![text(), end(), text(), end()],
                "only ends" => vec![end(), end()],
                _ => panic!("a provider that panics on purpose"),
            }))
        })
    }

    fn health(&self) -> BoxFuture<'_, Result<(), ProviderError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

struct Chunks(std::vec::IntoIter<StreamChunk>);

impl futures_core::Stream for Chunks {
    type Item = Result<StreamChunk, ProviderError>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.0.next().map(Ok))
    }
}

fn chunks(chunks: Vec<StreamChunk>) -> ChunkStream {
    Box::pin(Chunks(chunks.into_iter()))
}

fn odd_pool() -> ProviderPool {
    let mut config = ProviderConfig { models: vec!["*".into()], ..ProviderConfig::default() };
    config.retry.retries = 0;
    ProviderPool::builder().register(Odd, config).build().unwrap()
}

/// Goal:   R2.5, trap 17: whatever a provider does, a stream has exactly one end.
#[test]
fn r2_7_r2_5_trap17_a_stream_has_exactly_one_end() {
    let pool = odd_pool();
    assert!(matches!(chunks_of(&pool, &call("empty", "x")), Err(ProviderError::Interrupted { .. })));
    assert_ends(&chunks_of(&pool, &call("endless", "x")).unwrap(), FinishReason::Error);
    for model in ["ends twice", "only ends"] {
        assert_ends(&chunks_of(&pool, &call(model, "x")).unwrap(), FinishReason::Stop);
    }
}

fn streamed(model: &str) -> AIRequest {
    let mut request = request(model, "x");
    request.stream = Some(true);
    request
}

/// Goal:   the host gives whole answers and streams to their sinks, and failures to both.
#[test]
fn r2_7_the_host_answers_into_sinks() {
    let host = ProviderHost::start(Arc::new(default_pool())).unwrap();
    let submit = |request: AIRequest| {
        let (sink, reader) = sink(2);
        host.handle().submit(request, Kind::Chat, sink);
        reader.read_all()
    };
    let (chunks, ended) = submit(streamed("loopback-fast-chunks-100"));
    assert!(matches!(ended, Ended::Finished), "{ended:?}");
    assert_ends(&chunks, FinishReason::Stop);
    assert_eq!(chunks.len(), 102);
    let (chunks, ended) = submit(request("loopback", "x"));
    assert!(
        chunks.is_empty()
            && matches!(&ended, Ended::Answered(whole) if whole.content.starts_with("loopback: "))
    );
    for request in [streamed("loopback-error"), request("loopback-error", "x")] {
        let (chunks, ended) = submit(request);
        assert!(
            chunks.is_empty() && matches!(ended, Ended::Failed(ProviderError::Failed { .. })),
            "{ended:?}"
        );
    }
}

/// Goal:   R2.6: a call ends once, as cancelled, wherever it is when its reader or its token says so.
#[test]
fn r2_7_r2_6_the_host_ends_cancelled_calls_once() {
    let host = ProviderHost::start(Arc::new(default_pool())).unwrap();
    for request in [
        streamed("loopback-hang"),
        request("loopback-hang", "x"),
        streamed("loopback"),
        streamed("loopback-fast"),
    ] {
        for by_token in [false, true] {
            // Of the last model nothing is read: the sink is full when it is cancelled.
            let (sink, reader) = sink(2);
            let call = Call::new(Kind::Chat, request.clone());
            host.handle().submit_call(call.clone(), sink);
            std::thread::sleep(Duration::from_millis(30));
            if by_token {
                call.cancel.cancel()
            } else {
                reader.cancel()
            }
            let ended = reader.ended();
            assert!(matches!(ended, Ended::Failed(ProviderError::Cancelled)), "{ended:?}");
        }
    }
}

/// Goal:   a provider that panics costs its own call only, and a host that goes ends all calls.
#[test]
fn r2_7_a_panic_costs_one_call_and_a_stop_ends_all() {
    let host = ProviderHost::start(Arc::new(odd_pool())).unwrap();
    let submit = |handle: &doorbell::provider::HostHandle, request| {
        let (sink, reader) = sink(8);
        handle.submit(request, Kind::Chat, sink);
        reader
    };
    let handle = host.handle();
    for request in [request("x", "x"), streamed("x")] {
        assert!(matches!(submit(&handle, request).ended(), Ended::Dropped));
    }
    assert!(matches!(submit(&handle, streamed("ends twice")).ended(), Ended::Finished));
    drop(host);
    assert!(matches!(submit(&handle, streamed("x")).ended(), Ended::Failed(ProviderError::Stopped)));

    let host = ProviderHost::start(Arc::new(default_pool())).unwrap();
    let reader = submit(&host.handle(), streamed("loopback-hang"));
    drop(host);
    assert!(matches!(reader.ended(), Ended::Dropped));
}

/// Goal:   a thousand streams at 50 chunks a second come whole and in order, and cost little.
/// Method: two seconds of each; the time of the host's thread is printed and asserted far above what it takes.
#[test]
fn r2_7_a_thousand_paced_streams_are_cheap() {
    let host = ProviderHost::start(Arc::new(default_pool())).unwrap();
    let begun = Instant::now();
    let readers: Vec<_> = (0..1000)
        .map(|_| {
            let (sink, reader) = sink(200);
            host.handle().submit(streamed("loopback-pace-50-chunks-100"), Kind::Chat, sink);
            reader
        })
        .collect();
    for reader in &readers {
        let ended = reader.ended();
        assert!(matches!(ended, Ended::Finished), "{ended:?}");
        let chunks = reader.read();
        assert_ends(&chunks, FinishReason::Stop);
        let expected: String = (1..=100)
            .map(|n| format!("{:.<16}", format!("{}{n} ", if n == 1 { "loopback: " } else { "" })))
            .collect();
        assert_eq!(text_of(&chunks), expected);
    }
    let took = begun.elapsed();
    let cpu = cpu_of_thread("providers");
    println!("1000 streams of 100 chunks took {took:?}, the thread {cpu:?}");
    assert!(cpu < took, "{cpu:?} of {took:?}");
}

/// What the busiest thread of that name of this process has run for.
fn cpu_of_thread(name: &str) -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap().path());
    let own = threads
        .filter(|path| std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let nanoseconds = own.filter_map(|path| {
        let stat = std::fs::read_to_string(path.join("schedstat")).ok()?;
        stat.split(' ').next()?.parse().ok()
    });
    Duration::from_nanos(nanoseconds.max().unwrap_or(0))
}

/// Goal:   a call that the reader drops in mid-stream frees its place at once.
#[test]
fn r2_7_a_dropped_answer_frees_its_place() {
    let config = ProviderConfig { max_concurrent: 1, max_waiting: 0, ..ProviderConfig::default() };
    let pool = ProviderPool::builder()
        .register(Loopback::new("l", LoopbackConfig::default()), config)
        .build()
        .unwrap();
    run(async {
        for _ in 0..50 {
            let mut answer = pool.stream(&call("loopback", "x")).await.unwrap();
            next(&mut answer).await.unwrap();
        }
    });
}

/// Goal:   what is wrong with a configuration is named by provider and key, and a right one is read.
#[test]
fn r2_7_a_configuration_is_read_and_checked() {
    let read = |text: &str| serde_json::from_str::<ProvidersConfig>(text);
    let config = read(
        r#"{"default":"local","max_concurrent":64,"providers":[
            {"name":"local","loopback":{"chunks_per_second":20}},
            {"name":"cloud","kind":"openai","base_url":"https://api.example.org/v1","key_env":"CLOUD_KEY",
             "models":["gpt-*"],"fail_over":["local"],"max_tokens_field":"max_completion_tokens",
             "timeouts":{"total_ms":1000},"retry":{"retries":1}}]}"#,
    )
    .unwrap();
    config.check().unwrap();
    assert_eq!(config.providers[1].timeouts.connect_ms, 5000);
    for (text, words) in [
        (r#"{"default":"x","providers":[]}"#, ["default", "`x`"]),
        (r#"{"default":null,"providers":[{"name":""}]}"#, ["provider 0", "name"]),
        (r#"{"default":null,"providers":[{"name":"a"},{"name":"a"}]}"#, ["two providers", "`a`"]),
        (r#"{"default":null,"providers":[{"name":"a","fail_over":["b"]}]}"#, ["fail_over", "`b`"]),
        (r#"{"default":null,"providers":[{"name":"a","kind":"openai"}]}"#, ["`a`", "no models"]),
        (r#"{"default":null,"providers":[{"name":"a","timeouts":{"connect_ms":0}}]}"#, ["connect_ms", "`a`"]),
        (r#"{"default":null,"providers":[{"name":"a","retry":{"retries":99}}]}"#, ["retries", "99"]),
        (
            r#"{"default":null,"providers":[{"name":"a","loopback":{"chunks_per_second":-1}}]}"#,
            ["chunks_per_second", "-1"],
        ),
    ] {
        let fault = read(text).unwrap().check().unwrap_err().to_string();
        assert!(words.iter().all(|word| fault.contains(word)), "{fault}");
    }
    assert!(read(r#"{"provider":[]}"#).is_err(), "unknown keys are refused");
    assert!(
        read(r#"{"providers":[{"name":"a","api_key":"x"}]}"#).is_err(),
        "keys are not written into files"
    );
}

/// Goal:   every error says what was wrong and what to do, on one line.
#[test]
fn r2_7_errors_say_what_to_do() {
    let pool = odd_pool();
    assert_eq!(run(pool.health())[0].state, Ok(()));
    let provider = || "p".to_owned();
    for error in [
        ProviderError::Unavailable { provider: provider(), what: "w".into(), retry_after: None },
        ProviderError::Unauthorized { provider: provider(), status: 401 },
        ProviderError::RateLimited { provider: provider(), retry_after: None, code: Some("c".into()) },
        ProviderError::Timeout { provider: provider(), phase: Phase::Connect, after: Duration::from_secs(1) },
        ProviderError::Interrupted { provider: provider() },
        ProviderError::UnknownModel { model: "m\n".repeat(500), known: vec!["k".into(); 500] },
        ProviderError::Overloaded { whom: "p".into(), waiting: 1 },
        ProviderError::Stopped,
    ] {
        let text = error.to_string();
        assert!(text.len() < 400 && !text.contains('\n'), "{text}");
        assert!(
            ["try", "ask again", "put", "connect", "raise", "known are"]
                .iter()
                .any(|word| text.contains(word)),
            "{text}"
        );
    }
}

//! The codecs by the library's public names: JSON to the byte, hostile bodies refused by name, archives checked.

use doorbell::HandlerError;
use doorbell::codec::{Codec, DEPTH_MAX, DecodeError, Json, Problem, codec_of};
use doorbell::messages::{
    AIRequest, AIResponse, AnalyzeFile, FinishReason, Message, MessageRole, RawJson, StreamChunk, Tool,
    ToolCall, Usage,
};
use doorbell_shm::entry::codec;
use proptest::prelude::*;
use rustix::time::{ClockId, clock_gettime};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::time::Duration;

const VECTORS: &str = include_str!("data/airequest_vectors.jsonl");
/// Made by `data/vectors.mjs`.
const MORE_VECTORS: &str = include_str!("data/requests.jsonl");
const NUMBERS: &str = include_str!("data/numbers.jsonl");
/// Answers, chunks and questions, as JavaScript would write them: their bytes are part of the interface.
const GOLDEN: &str = include_str!("data/golden.jsonl");

fn decoded(body: &str) -> AIRequest {
    Json::new().decode_request(body.as_bytes()).unwrap_or_else(|e| panic!("{e}: {body}")).into_owned()
}

fn encoded(request: &AIRequest) -> String {
    let mut body = Vec::new();
    Json::new().encode_request(request, &mut body);
    String::from_utf8(body).unwrap()
}

#[track_caller]
fn refused(body: impl AsRef<[u8]>) -> DecodeError {
    Json::new().decode_request(body.as_ref()).expect_err("it is not refused")
}

/// A request with everything in it.
fn full() -> AIRequest {
    let raw = |text: &str| Some(RawJson::new(text.to_owned()).unwrap());
    let call = ToolCall { name: "read".into(), parameters: raw(r#"{"b":1,"a":"\ud800"}"#), id: "1".into() };
    let bare = ToolCall { name: "a name that is longer".into(), parameters: None, id: String::new() };
    let message = |role, content: &str, tool_calls| Message { role, content: content.into(), tool_calls };
    AIRequest {
        messages: vec![
            message(MessageRole::System, "Be brief.", None),
            message(MessageRole::User, "quote \" and line\n, 漢字 😀", None),
            message(MessageRole::Assistant, "", Some(vec![call, bare])),
        ],
        model: "model-1".into(),
        temperature: Some(0.7),
        max_tokens: Some(64.0),
        tools: Some(vec![Tool {
            name: "read".into(),
            description: Some("reads".into()),
            parameters: raw("null"),
        }]),
        system_prompt: Some("prompt".into()),
        stream: Some(true),
    }
}

fn responses() -> Vec<AIResponse> {
    let usage = Usage { prompt_tokens: 12.0, completion_tokens: 0.5, total_tokens: f64::NAN };
    let response = AIResponse {
        content: "a\u{2028}b\u{7f}".into(),
        reasoning: None,
        tool_calls: None,
        usage: None,
        finish_reason: FinishReason::Stop,
    };
    let calls = full().messages.remove(2).tool_calls;
    let reasoning = Some("because".to_owned());
    let more = AIResponse { reasoning, tool_calls: calls, usage: Some(usage), ..response.clone() };
    let reasons =
        [FinishReason::Length, FinishReason::ToolCalls, FinishReason::Cancelled, FinishReason::Error];
    let others = reasons.map(|finish_reason| AIResponse { finish_reason, ..response.clone() });
    [response, more].into_iter().chain(others).collect()
}

fn chunks() -> Vec<StreamChunk> {
    let usage = Usage { prompt_tokens: 1.0, completion_tokens: 2.0, total_tokens: 3.0 };
    vec![
        StreamChunk::Text { text: "tok\"en".into() },
        StreamChunk::Reasoning { text: "hm".into() },
        StreamChunk::Usage(usage),
        StreamChunk::ToolCallStart { id: "1".into(), name: "read".into() },
        StreamChunk::ToolCallDelta { id: "1".into(), parameters: "{\"a\"".into() },
        StreamChunk::ToolCallEnd { id: "1".into() },
        StreamChunk::Error { code: "rate_limited".into(), message: "later".into() },
        StreamChunk::End { finish_reason: FinishReason::ToolCalls },
    ]
}

fn questions() -> Vec<AnalyzeFile> {
    let text = |text: &str| Some(text.to_owned());
    vec![
        AnalyzeFile { path: text("src/lib.rs"), content: None, question: text("what?") },
        AnalyzeFile { path: None, content: text("a\nb"), question: None },
    ]
}

/// Equal, where NaN is equal to itself: their texts are.
#[track_caller]
fn assert_same<T: std::fmt::Debug>(left: &T, right: &T) {
    assert_eq!(format!("{left:?}"), format!("{right:?}"));
}

/// Goal:   R2.3, trap 16: what JavaScript wrote is read and written again to the byte.
/// Method: every line of the vectors that were given, and of those that `vectors.mjs` makes; as views are made of owned
///         requests, too.
#[test]
fn r2_3_trap16_every_request_is_written_as_javascript_wrote_it() {
    assert!(VECTORS.lines().count() >= 20 && MORE_VECTORS.lines().count() >= 300);
    for line in VECTORS.lines().chain(MORE_VECTORS.lines()) {
        assert_eq!(encoded(&decoded(line)), line);
        let view = doorbell::messages::AIRequestRef::from(decoded(line));
        assert_eq!(encoded(&view.into_owned()), line);
    }
}

/// Goal:   R2.3: numbers are printed as JavaScript prints them, and read as it reads them.
/// Method: 1500 numbers with their bits and what JavaScript printed, infinities and NaN among them.
#[test]
fn r2_3_numbers_are_javascripts() {
    let mut count = 0;
    for line in NUMBERS.lines() {
        let (bits, text): (String, String) = serde_json::from_str(line).unwrap();
        let number = f64::from_bits(u64::from_str_radix(&bits, 16).unwrap());
        let body = encoded(&AIRequest { temperature: Some(number), ..AIRequest::default() });
        assert_eq!(body, format!(r#"{{"messages":[],"model":"","temperature":{text}}}"#));
        let read = decoded(&body).temperature.unwrap();
        match number.is_finite() {
            true => assert_eq!(read, number),
            false => assert!(read.is_nan()),
        }
        count += 1;
    }
    assert_eq!(count, 1500);
    for (text, number) in
        [("1e999", "null"), ("-0", "0"), ("-0.0e5", "0"), ("1E2", "100"), ("0.10", "0.1"), ("1e-400", "0")]
    {
        let body = |text| format!(r#"{{"messages":[],"model":"","maxTokens":{text}}}"#);
        assert_eq!(encoded(&decoded(&body(text))), body(number));
    }
}

/// Goal:   R2.3: `null` is what JavaScript makes of NaN, and comes back where a number or raw JSON is; elsewhere it is as
///         good as absent.
#[test]
fn r2_3_null_comes_back_where_javascript_writes_it() {
    let body = r#"{"messages":[],"model":"m","temperature":null,"tools":[{"name":"t","parameters":null}]}"#;
    assert_eq!(encoded(&decoded(body)), body);
    assert!(decoded(body).temperature.unwrap().is_nan());
    let nulls = r#"{"messages":[{"role":"user","content":"","toolCalls":null}],"model":"m","tools":null,"systemPrompt":null,"stream":null}"#;
    assert_eq!(encoded(&decoded(nulls)), r#"{"messages":[{"role":"user","content":""}],"model":"m"}"#);
    assert_eq!(refused(r#"{"messages":null,"model":""}"#).path, "messages");
}

/// Goal:   R2.3: `JSON.parse`'s rules for keys: unknown ones are ignored, whatever they hold; the last of a name counts, and
///         it alone has to be right; escapes in keys mean nothing; space is where it may be.
#[test]
fn r2_3_keys_are_read_as_javascript_reads_them() {
    let plain = r#"{"messages":[{"role":"user","content":"x"}],"model":"m"}"#;
    for body in [
        r#" { "model" : "m" , "messages" : [ { "content":"x", "role":"user" } ] } "#,
        r#"{"messages":5,"model":{"a":[1]},"messages":[{"role":"user","content":"x"}],"model":"m"}"#,
        r#"{"messages":[{"role":"robot","content":"x"}],"model":"m","messages":[{"role":"robot","role":"user","content":"x"}]}"#,
        r#"{"model":"\ud800","model":"m","messages":[{"role":"user","content":"x"}]}"#,
        r#"{"mod\u0065l":"m","\u006dessages":[{"r\u006fle":"us\u0065r","content":"\u0078"}]}"#,
        r#"{"\ud800":1,"toString":{"a":[{},[],"\udc00"]},"__proto__":null,"messages":[{"role":"user","content":"x","y":[[[]]]}],"model":"m"}"#,
        "{\"model\":\"m\",\r\n\t\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n",
        r#"{"stream":true,"stream":null,"messages":[{"role":"user","content":"x"}],"model":"m"}"#,
    ] {
        assert_eq!(encoded(&decoded(body)), plain, "{body}");
    }
}

/// Goal:   R2.3: texts are borrowed from the body unless they have escapes.
#[test]
fn r2_4_texts_are_borrowed_where_they_can_be() {
    let body = r#"{"messages":[{"role":"user","content":"plain 漢字"},{"role":"user","content":"a\nb"}],"model":"m"}"#;
    let request = Json::new().decode_request(body.as_bytes()).unwrap();
    assert!(matches!(request.model, Cow::Borrowed("m")));
    assert!(matches!(request.messages[0].content, Cow::Borrowed("plain 漢字")));
    assert!(matches!(&request.messages[1].content, Cow::Owned(text) if text == "a\nb"));
}

/// Goal:   bad input: every refusal names field, byte and what must be there.
/// Method: one body for each kind of fault, in each kind of place; the byte is where the mark `§` stood.
#[test]
fn s9_what_is_wrong_with_json_is_named() {
    for (marked, path, parts) in [
        ("§", "", &["invalid JSON", "the request", "the end"][..]),
        ("§[]", "", &["must be an object", "not an array"]),
        ("§null", "", &["must be an object", "not null"]),
        ("§\"x\"", "", &["not a string"]),
        ("\u{feff}{}", "", &["invalid JSON"]),
        (r#"§{"model":"m"}"#, "messages", &["is missing", "an array of messages"]),
        (r#"§{"messages":[]}"#, "model", &["is missing", "a string"]),
        (r#"{"messages":[],"model":§5}"#, "model", &["must be a string", "not a number"]),
        (r#"{"messages":[],"model":§null}"#, "model", &["must be a string", "not null"]),
        (r#"{"messages":§{},"model":""}"#, "messages", &["an array of messages", "not an object"]),
        (r#"{"messages":[§1],"model":""}"#, "messages[0]", &["a message", "not a number"]),
        (r#"{"messages":[§{}],"model":""}"#, "messages[0].role", &["is missing", "\"system\""]),
        (
            r#"{"messages":[{"role":"user","content":""},{"role":§"tool","content":""}],"model":""}"#,
            "messages[1].role",
            &["\"system\", \"user\" or \"assistant\"", "not \"tool\""],
        ),
        (r#"{"messages":[{"role":§5,"content":""}],"model":""}"#, "messages[0].role", &["not a number"]),
        (
            r#"{"messages":[{"role":"user","content":§[]}],"model":""}"#,
            "messages[0].content",
            &["not an array"],
        ),
        (
            r#"{"messages":[{"role":"user","content":"","toolCalls":[{"name":"n","id":"1"},§{"name":"n"}]}],"model":""}"#,
            "messages[0].toolCalls[1].id",
            &["is missing"],
        ),
        (r#"{"messages":[],"model":"","temperature":§"1"}"#, "temperature", &["a number", "not a string"]),
        (r#"{"messages":[],"model":"","maxTokens":§true}"#, "maxTokens", &["a number", "not a boolean"]),
        (r#"{"messages":[],"model":"","stream":§1}"#, "stream", &["a boolean", "not a number"]),
        (r#"{"messages":[],"model":"","tools":[§{}]}"#, "tools[0].name", &["is missing"]),
        (
            r#"{"messages":[],"model":"","tools":[{"name":"","description":§2}]}"#,
            "tools[0].description",
            &["a string"],
        ),
        (
            r#"{"messages":[],"model":"","tools":[{"name":"","parameters":{"a":[1,§}}]}"#,
            "tools[0].parameters",
            &["a value"],
        ),
        (
            r#"{"messages":[],"model":"","temperature":01§}"#.replacen("01§", "0§1", 1).leak(),
            "",
            &["`,` or `}`"],
        ),
        (r#"{"messages":[],"model":"","temperature":1.§}"#, "temperature", &["a digit"]),
        (r#"{"messages":[],"model":"","temperature":-§a}"#, "temperature", &["a digit"]),
        (r#"{"messages":[],"model":"","temperature":§NaN}"#, "temperature", &["invalid JSON"]),
        (r#"{"messages":[],"model":"","stream":§tru}"#, "stream", &["invalid JSON"]),
        (r#"{"messages":[],"model":"a§"#, "model", &["the end"]),
        ("{\"messages\":[],\"model\":\"a§\nb\"}", "model", &["a character", "'\\n'"]),
        (r#"{"messages":[],"model":"\§x"}"#, "model", &["behind a backslash"]),
        (r#"{"messages":[],"model":"\u12§g4"}"#, "model", &["a hexadecimal digit"]),
        (r#"{"messages":[],"model":"","extra":{"a"§}}"#, "extra", &["`:`"]),
        (r#"{"messages":[],§}"#, "", &["a key in quotes"]),
        (r#"{"messages":[§,],"model":""}"#, "messages[0]", &["a message"]),
        (r#"{"messages":[] §"model":""}"#, "", &["`,` or `}`"]),
        (r#"{"messages":[],"model":""}§x"#, "", &["the end must be here", "'x'"]),
        (r#"{'messages':[]}"#, "", &["a key in quotes"]),
    ] {
        let offset = marked.find('§');
        let body = marked.replace('§', "");
        let error = refused(&body);
        assert_eq!(error.path, path, "{marked}: {error}");
        assert!(offset.is_none_or(|offset| offset == error.offset), "{marked}: {error}");
        let text = error.to_string();
        let place = format!("byte {}", error.offset);
        assert!(text.contains(path) && text.contains(&place), "{marked}: {text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{marked}: {text}");
    }
}

/// Goal:   R2.3: half a surrogate pair passes where JSON passes; where Rust has to hold it, it is refused by field and byte.
#[test]
fn r2_3_a_lone_surrogate_passes_in_parameters_and_is_named_elsewhere() {
    for (marked, path, unit) in [
        (r#"{"messages":[],"model":"ab§\ud800"}"#, "model", 0xd800),
        (r#"{"messages":[],"model":"§\uDC00x"}"#, "model", 0xdc00),
        (
            r#"{"messages":[{"role":"user","content":"😀\ud83d\ude00§\udbff\u0041"}],"model":""}"#,
            "messages[0].content",
            0xdbff,
        ),
        (r#"{"messages":[],"model":"","systemPrompt":"§\ud83d\ud83d\ude00"}"#, "systemPrompt", 0xd83d),
        (r#"{"messages":[],"model":"","tools":[{"name":"§\udfff"}]}"#, "tools[0].name", 0xdfff),
    ] {
        let offset = marked.find('§').unwrap();
        let error = refused(marked.replace('§', ""));
        assert_eq!((&*error.path, error.offset), (path, offset), "{marked}");
        assert_eq!(error.what, Problem::LoneSurrogate { unit }, "{marked}");
    }
    let body = r#"{"messages":[],"model":"","tools":[{"name":"","parameters":["\ud800",{"\udc00":1,"a":1,"a":123456789012345678901234567890}, 1.0 ]}]}"#;
    assert_eq!(encoded(&decoded(body)), body);
}

/// Goal:   what is no UTF-8 is named by byte and field, unless something is wrong before.
#[test]
fn s9_bytes_that_are_no_text_are_named() {
    let error = refused(b"{\"messages\":[],\"model\":\"a\xff\"}");
    assert_eq!((&*error.path, error.offset, error.what), ("model", 25, Problem::NotUtf8));
    let error = refused(b"{\"messages\":[],\"tools\":[{\"parameters\":\"\xe2\x82\"}]}");
    assert_eq!((&*error.path, error.offset), ("tools[0].parameters", 39));
    let error = refused(b"{\"messages\":x,\"model\":\"a\xff\"}");
    assert_eq!((&*error.path, error.offset), ("messages", 12));
    assert_eq!(refused(b"{\"messages\":[],\"model\":\"\"}\xff").what, Problem::NotUtf8);
}

/// Goal:   bad input: nesting is bounded wherever it is, without the stack; what is allowed passes.
/// Method: 100 000 levels (and a million) in every kind of place, open or closed, in threads with little stack; then the
///         deepest that is read.
#[test]
fn s9_deep_nesting_is_refused_and_takes_no_stack() {
    let places = [
        ("", "", ""),
        (r#"{"messages":"#, "", "messages"),
        (r#"{"messages":[{"role":"user","content":"#, "", "messages[0].content"),
        (
            r#"{"messages":[{"role":"user","content":"","toolCalls":[{"name":"","id":"","parameters":"#,
            "}]}]}",
            "messages[0].toolCalls[0].parameters",
        ),
        (r#"{"model":"","messages":[],"tools":[{"name":"","parameters":"#, "}]}", "tools[0].parameters"),
        (r#"{"model":"","messages":[],"unknown":"#, "}", "unknown"),
    ];
    let work = move || {
        for (before, behind, path) in places {
            for (open, close) in [("[", "]"), (r#"{"a":"#, "}"), (r#"[{"a":"#, "}]")] {
                for levels in [100_000, 1_000_000] {
                    let body = format!("{before}{}1{}{behind}", open.repeat(levels), close.repeat(levels));
                    let error = refused(&body);
                    if !before.is_empty() {
                        assert_eq!(error.what, Problem::Depth { max: DEPTH_MAX }, "{before} {open}");
                        assert!(error.path.starts_with(path), "{error}");
                        assert!(error.to_string().contains("nested deeper than 1024 levels"), "{error}");
                    }
                    let open = refused(format!("{before}{}", open.repeat(levels)));
                    assert!(before.is_empty() || open.path.starts_with(path), "{open}");
                }
            }
        }
    };
    std::thread::Builder::new().stack_size(128 << 10).spawn(work).unwrap().join().unwrap();
    let raw = |levels: usize| RawJson::new(format!("{}{}", "[".repeat(levels), "]".repeat(levels)));
    assert!(raw(DEPTH_MAX).is_ok());
    assert_eq!(raw(DEPTH_MAX + 1).unwrap_err().what, Problem::Depth { max: DEPTH_MAX });
    let shallow = Json::with_limits(1000, 3);
    let body =
        |inner: &str| format!(r#"{{"messages":[],"model":"","tools":[{{"name":"","parameters":{inner}}}]}}"#);
    assert!(shallow.decode_request(body("5").as_bytes()).is_ok());
    assert_eq!(shallow.decode_request(body("[]").as_bytes()).unwrap_err().what, Problem::Depth { max: 3 });
}

/// Of this thread: other work on the machine does not count.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Goal:   bad input: a body above the limit is refused by number; and time grows with length, whatever the body.
/// Method: bodies made to be slow: many fields of a name, wrong ones, many escapes, deep ones side by side, a long number,
///         many small elements; 16 times the length may take 100 times as long, no more; it would be 256 times if time grew with
///         the square.
#[test]
fn s9_size_is_limited_and_time_is_linear() {
    let small = Json::with_limits(20, 8);
    let error = small.decode_request(&[b' '; 21]).unwrap_err();
    assert_eq!(error.what, Problem::Length { len: 21, max: 20 });
    assert_eq!(small.decode_request(&[b' '; 20]).unwrap_err().offset, 20);
    type Make = fn(usize) -> String;
    let bodies: [(&str, Make); 7] = [
        ("wrong fields again and again", |n| format!("{{{}", r#""messages":[{"role":5}],"#.repeat(n / 24))),
        ("wrong at the end of nested lists", |n| {
            let calls = r#"{"name":"","id":""},"#.repeat(n / 20);
            format!(r#"{{"messages":[{{"role":"user","content":"","toolCalls":[{calls}5]}}]}}"#)
        }),
        ("escapes", |n| format!(r#"{{"model":"{}""#, r"\u0041\n".repeat(n / 8))),
        ("deep ones side by side", |n| {
            let deep = format!("{}{},", "[".repeat(1000), "]".repeat(1000));
            format!(r#"{{"unknown":[{}1]}}"#, deep.repeat(n / 2001))
        }),
        ("a long number", |n| format!(r#"{{"temperature":{}"#, "9".repeat(n))),
        ("small elements", |n| {
            format!(r#"{{"messages":[{}"#, r#"{"role":"user","content":""},"#.repeat(n / 29))
        }),
        ("keys", |n| format!("{{{}", r#""k":1,"#.repeat(n / 6))),
    ];
    for (name, make) in bodies {
        let time = |body: &str| {
            let best = (0..5).map(|_| {
                let start = processor_time();
                refused(body);
                processor_time() - start
            });
            best.min().unwrap()
        };
        let (short, long) = (make(64 << 10), make(1 << 20));
        let (short, long) = (time(&short), time(&long));
        assert!(long < short * 100, "{name}: {short:?}, sixteen times as much {long:?}");
    }
}

/// Goal:   an error repeats little of what a client sent, and nothing that would break a line of a log.
#[test]
fn s9_trap21_an_error_repeats_little_of_a_body() {
    let secret = "secret\n".repeat(1000);
    let words = [
        json!({ "messages": [{ "role": secret, "content": "" }], "model": "" }),
        json!({ secret.clone(): 1, "messages": [{ "role": "user", "content": "hidden" }] }),
    ];
    for body in words {
        let text = refused(body.to_string()).to_string();
        assert!(text.len() < 200 && !text.contains('\n') && !text.contains("hidden"), "{text}");
    }
    let text = refused(format!(r#"{{"{}":[}}"#, "k".repeat(1000))).to_string();
    assert!(text.starts_with("`kkk") && text.len() < 120, "{text}");
    let error = HandlerError::from(refused("{}"));
    assert!(
        matches!(error, HandlerError::Decode(text) if text.starts_with("`messages`, byte 0: is missing"))
    );
}

/// Goal:   trap 20, R2.5: the bytes of answers, chunks and questions in JSON are those of the file, both ways.
#[test]
fn trap20_r2_5_golden_json_is_what_the_codec_writes_and_reads() {
    let json = Json::new();
    let mut written = Vec::new();
    let mut line = |write: &dyn Fn(&mut Vec<u8>)| {
        write(&mut written);
        written.push(b'\n');
    };
    line(&|out| json.encode_request(&full(), out));
    responses().iter().for_each(|response| line(&|out| json.encode_response(response, out)));
    chunks().iter().for_each(|chunk| line(&|out| json.encode_chunk(chunk, out)));
    questions().iter().for_each(|question| line(&|out| json.encode_analyze(question, out)));
    assert_eq!(String::from_utf8(written).unwrap(), GOLDEN);
    let mut lines = GOLDEN.lines();
    let mut next = || lines.next().unwrap().as_bytes();
    assert_eq!(json.decode_request(next()).unwrap().into_owned(), full());
    responses().iter().for_each(|response| assert_same(&json.decode_response(next()).unwrap(), response));
    chunks().iter().for_each(|chunk| assert_eq!(json.decode_chunk(next()).unwrap(), *chunk));
    questions().iter().for_each(|q| assert_eq!(json.decode_analyze(next()).unwrap().into_owned(), *q));
    assert!(lines.next().is_none());
}

/// Goal:   R2.5: what is wrong with a chunk or an answer is named; what its kind does not have is ignored in it.
#[test]
fn r2_5_what_is_wrong_with_a_chunk_is_named() {
    let chunk = |body: &str| Json::new().decode_chunk(body.as_bytes());
    assert_eq!(
        chunk(r#"{"id":5,"text":"a","type":"text","more":[]}"#),
        Ok(StreamChunk::Text { text: "a".into() })
    );
    for (body, path, part) in [
        (r#"{"text":"a"}"#, "type", "is missing"),
        (r#"{"type":"txt","text":"a"}"#, "type", "\"toolCallStart\""),
        (r#"{"type":"text"}"#, "text", "is missing"),
        (r#"{"type":"toolCallDelta","id":"","parameters":{}}"#, "parameters", "a string"),
        (r#"{"type":"usage","promptTokens":1,"completionTokens":2}"#, "totalTokens", "is missing"),
        (r#"{"type":"end","finishReason":"done"}"#, "finishReason", "\"cancelled\""),
        (r#"{"type":"end"}"#, "finishReason", "is missing"),
    ] {
        let error = chunk(body).unwrap_err();
        assert_eq!(error.path, path, "{body}");
        assert!(error.to_string().contains(part), "{body}: {error}");
    }
    let error =
        Json::new().decode_response(br#"{"content":"","usage":{"promptTokens":""},"finishReason":"stop"}"#);
    assert_eq!(error.unwrap_err().path, "usage.promptTokens");
    let error = Json::new().decode_analyze(br#"{"pth":"a"}"#).unwrap_err();
    assert_eq!((&*error.path, error.offset), ("pth", 7));
}

/// Goal:   R2.2: plain serde reads and writes the same values; names are the document's.
/// Method: every vector, compared as JSON values, since serde_json prints some numbers otherwise.
#[test]
fn r2_2_plain_serde_has_the_same_messages() {
    let same = |line: &str| {
        let ours = decoded(line);
        let plain: AIRequest = serde_json::from_str(line).unwrap();
        assert_same(&plain, &ours);
        let text = serde_json::to_string(&ours).unwrap();
        assert_same(&serde_json::from_str::<AIRequest>(&text).unwrap(), &ours);
    };
    VECTORS.lines().chain(MORE_VECTORS.lines()).for_each(same);
    for chunk in chunks() {
        let text = serde_json::to_string(&chunk).unwrap();
        assert_eq!(Json::new().decode_chunk(text.as_bytes()).unwrap(), chunk);
        assert_eq!(serde_json::from_str::<StreamChunk>(&text).unwrap(), chunk);
    }
    for line in VECTORS.lines().filter(|line| !line.contains("e-7") && !line.contains("e+21")) {
        assert_eq!(serde_json::to_string(&decoded(line)).unwrap(), line);
    }
    let deep = format!(r#"{{"name":"","parameters":{}{}}}"#, "[".repeat(1025), "]".repeat(1025));
    assert!(serde_json::from_str::<Tool>(&deep).unwrap_err().to_string().contains("nested deeper"));
}

/// Goal:   R2.4: codecs are found by the numbers that connections name them by.
#[test]
fn r2_4_codecs_are_found_by_their_numbers() {
    assert_eq!(codec_of(codec::JSON).map(Codec::id), Some(codec::JSON));
    assert_eq!(codec_of(codec::RKYV).map(Codec::id), cfg!(feature = "rkyv").then_some(codec::RKYV));
    for id in [codec::RAW, 3, 255] {
        assert!(codec_of(id).is_none(), "{id}");
    }
}

/// Any JSON, rather small.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(any::<String>(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A value that is right for a field (`right`), mostly; or any.
fn mostly(right: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Option<Value>> {
    prop_oneof![20 => right.prop_map(Some), 1 => value().prop_map(Some), 1 => Just(None)]
}

fn optional(right: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Option<Value>> {
    prop_oneof![1 => mostly(right), 1 => Just(None)]
}

fn object<const N: usize>(fields: [(&'static str, Option<Value>); N]) -> Value {
    let there = fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Value::Object(there.collect())
}

fn text() -> impl Strategy<Value = Value> {
    any::<String>().prop_map(Value::from)
}

fn number() -> impl Strategy<Value = Value> {
    any::<f64>().prop_map(Value::from)
}

fn list(element: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    prop::collection::vec(element, 0..4).prop_map(Value::from)
}

/// What is like a request.
fn like_a_request() -> impl Strategy<Value = Value> {
    let call = (mostly(text()), optional(value()), mostly(text()))
        .prop_map(|(name, parameters, id)| object([("name", name), ("parameters", parameters), ("id", id)]));
    let role = prop::sample::select(vec!["system", "user", "assistant"]).prop_map(Value::from);
    let message = (mostly(role), mostly(text()), optional(list(call)), optional(value())).prop_map(
        |(role, content, calls, other)| {
            object([("role", role), ("content", content), ("toolCalls", calls), ("other", other)])
        },
    );
    let tool =
        (mostly(text()), optional(text()), optional(value())).prop_map(|(name, description, parameters)| {
            object([("name", name), ("description", description), ("parameters", parameters)])
        });
    let head = (mostly(list(message)), mostly(text()), optional(number()), optional(number()));
    let rest = (optional(list(tool)), optional(text()), optional(any::<bool>().prop_map(Value::from)));
    (head, rest).prop_map(|((messages, model, temperature, max_tokens), (tools, system_prompt, stream))| {
        object([
            ("messages", messages),
            ("model", model),
            ("temperature", temperature),
            ("maxTokens", max_tokens),
            ("tools", tools),
            ("systemPrompt", system_prompt),
            ("stream", stream),
        ])
    })
}

/// The value of field `key` as `kind` takes it: a `null` is absent.
fn oracle_field<T>(object: &Value, key: &str, kind: impl Fn(&Value) -> Option<T>) -> Option<Option<T>> {
    match object.get(key) {
        None | Some(Value::Null) => Some(None),
        Some(value) => kind(value).map(Some),
    }
}

fn oracle_text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn oracle_number(object: &Value, key: &str) -> Option<Option<f64>> {
    match object.get(key) {
        None => Some(None),
        Some(Value::Null) => Some(Some(f64::NAN)),
        Some(value) => value.as_f64().map(Some),
    }
}

fn oracle_list<T>(value: &Value, element: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(element).collect()
}

fn oracle_raw(object: &Value) -> Option<RawJson> {
    object.get("parameters").map(|value| RawJson::new(value.to_string()).unwrap())
}

fn oracle_message(value: &Value) -> Option<Message> {
    let call = |call: &Value| {
        let name = call.get("name").and_then(oracle_text)?;
        Some(ToolCall { name, parameters: oracle_raw(call), id: call.get("id").and_then(oracle_text)? })
    };
    let role = match value.get("role")?.as_str()? {
        "system" => MessageRole::System,
        "user" => MessageRole::User,
        "assistant" => MessageRole::Assistant,
        _ => return None,
    };
    let content = value.get("content").and_then(oracle_text)?;
    Some(Message {
        role,
        content,
        tool_calls: oracle_field(value, "toolCalls", |list| oracle_list(list, call))?,
    })
}

/// The request in a JSON value, naively; `None` if there is none.
fn oracle(value: &Value) -> Option<AIRequest> {
    let tool = |tool: &Value| {
        let description = oracle_field(tool, "description", oracle_text)?;
        let name = tool.get("name").and_then(oracle_text)?;
        Some(Tool { name, description, parameters: oracle_raw(tool) })
    };
    value.is_object().then_some(())?;
    Some(AIRequest {
        messages: oracle_list(value.get("messages")?, oracle_message)?,
        model: value.get("model").and_then(oracle_text)?,
        temperature: oracle_number(value, "temperature")?,
        max_tokens: oracle_number(value, "maxTokens")?,
        tools: oracle_field(value, "tools", |list| oracle_list(list, tool))?,
        system_prompt: oracle_field(value, "systemPrompt", oracle_text)?,
        stream: oracle_field(value, "stream", Value::as_bool)?,
    })
}

proptest! {
    /// Goal:   R2.3: what is like a request is read, or refused, as a naive reader of JSON values does it; and comes back.
    #[test]
    fn r2_3_requests_are_read_as_the_oracle_reads_them(value in like_a_request()) {
        let body = value.to_string();
        match (Json::new().decode_request(body.as_bytes()), oracle(&value)) {
            (Ok(request), Some(expected)) => {
                let request = request.into_owned();
                assert_same(&request, &expected);
                // -0 is written as 0.
                prop_assert_eq!(encoded(&decoded(&encoded(&request))), encoded(&expected));
            }
            (Err(error), None) => {
                prop_assert!(error.offset < body.len() && !error.path.is_empty(), "{}", error);
            }
            (read, expected) => prop_assert!(false, "{:?}, not {:?}: {}", read, expected, body),
        }
    }

    /// Goal:   what is JSON is what serde_json takes for JSON.
    /// Method: JSON with some bytes changed, removed or doubled, and any text.
    #[test]
    fn r2_3_json_is_what_serde_json_takes_for_it(
        value in value(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, prop::sample::select(b" {}[]\",:0-1.eE+tfn\\u\ndD8\x00".to_vec())), 0..4),
        pretty: bool,
    ) {
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
        let mut bytes = text.unwrap().into_bytes();
        for (place, kind, byte) in changes {
            let place = place.index(bytes.len() + 1);
            match kind {
                0 => bytes.insert(place, byte),
                1 if place < bytes.len() => bytes[place] = byte,
                _ => bytes.truncate(place.max(1)),
            }
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let serde = serde_json::from_str::<&RawValue>(&text);
            let ours = RawJson::new(text.clone());
            prop_assert_eq!(serde.is_ok(), ours.is_ok(), "{:?} {:?}: {}", serde, ours, text);
        }
    }
}

#[cfg(feature = "rkyv")]
mod archives {
    use super::*;
    use doorbell::codec::Rkyv;

    /// Archives of the messages of `golden.jsonl`, in its order, a hexadecimal line each.
    const GOLDEN_ARCHIVES: &str = include_str!("data/golden_rkyv.txt");

    fn archived(encode: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut body = Vec::new();
        encode(&mut body);
        body
    }

    fn hexadecimal(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn bytes(line: &str) -> Vec<u8> {
        line.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    /// Calls `judge` with the same bytes at every place relative to a multiple of 16.
    fn at_every_alignment(bytes: &[u8], mut judge: impl FnMut(&[u8], usize)) {
        let mut room = vec![0u8; bytes.len() + 64];
        let start = room.as_ptr().addr().next_multiple_of(16) - room.as_ptr().addr();
        for shift in 0..16 {
            let place = start + shift..start + shift + bytes.len();
            room[place.clone()].copy_from_slice(bytes);
            judge(&room[place], shift);
        }
    }

    /// Goal:   R2.4: what the JSON codec reads comes back through an archive, wherever the archive lies and whatever stood
    ///         before it in the vector that it was written to; texts are borrowed where its place allows it.
    #[test]
    fn r2_4_requests_come_back_through_archives_at_any_alignment() {
        for line in VECTORS.lines().chain(MORE_VECTORS.lines()) {
            let request = decoded(line);
            let archive = archived(|out| Rkyv::new().encode_request(&request, out));
            at_every_alignment(&archive, |body, shift| {
                let view = Rkyv::new().decode_request(body).unwrap();
                assert_eq!(matches!(view.model, Cow::Borrowed(_)), shift % 8 == 0);
                assert_eq!(encoded(&view.into_owned()), line);
            });
            let mut behind = vec![7; 13];
            Rkyv::new().encode_request(&request, &mut behind);
            assert_eq!(behind[13..], archive);
        }
    }

    /// Goal:   trap 20: archives are, byte for byte, those of the file, both ways.
    #[test]
    fn trap20_r2_4_golden_archives_are_what_the_codec_writes_and_reads() {
        let rkyv = Rkyv::new();
        let mut written = String::new();
        let mut line = |archive: Vec<u8>| written.push_str(&(hexadecimal(&archive) + "\n"));
        line(archived(|out| rkyv.encode_request(&full(), out)));
        responses().iter().for_each(|response| line(archived(|out| rkyv.encode_response(response, out))));
        chunks().iter().for_each(|chunk| line(archived(|out| rkyv.encode_chunk(chunk, out))));
        questions().iter().for_each(|question| line(archived(|out| rkyv.encode_analyze(question, out))));
        assert_eq!(written, GOLDEN_ARCHIVES);
        let mut lines = GOLDEN_ARCHIVES.lines();
        let mut next = || bytes(lines.next().unwrap());
        assert_eq!(rkyv.decode_request(&next()).unwrap().into_owned(), full());
        responses()
            .iter()
            .for_each(|response| assert_same(&rkyv.decode_response(&next()).unwrap(), response));
        chunks().iter().for_each(|chunk| assert_eq!(rkyv.decode_chunk(&next()).unwrap(), *chunk));
        questions().iter().for_each(|q| assert_eq!(rkyv.decode_analyze(&next()).unwrap().into_owned(), *q));
        assert!(lines.next().is_none());
    }

    /// Goal:   R2.4: an archive that was changed or cut is refused or is another message; nothing panics.
    /// Method: every bit of every golden archive, and every length, for every kind of message.
    #[test]
    fn r2_4_s9_a_broken_archive_is_refused() {
        let rkyv = Rkyv::new();
        let mut refused = 0;
        let mut judge = |body: &[u8]| {
            let results = [
                rkyv.decode_request(body).map(|request| drop(request.into_owned())),
                rkyv.decode_response(body).map(drop),
                rkyv.decode_chunk(body).map(drop),
                rkyv.decode_analyze(body).map(|request| drop(request.into_owned())),
            ];
            for error in results.into_iter().filter_map(Result::err) {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        };
        for line in GOLDEN_ARCHIVES.lines() {
            let mut body = bytes(line);
            for bit in 0..body.len() * 8 {
                body[bit / 8] ^= 1 << (bit % 8);
                judge(&body);
                body[bit / 8] ^= 1 << (bit % 8);
            }
            (0..body.len()).for_each(|len| judge(&body[..len]));
        }
        assert!(refused > 10_000, "{refused}");
        let error = rkyv.decode_request(b"{\"messages\":[],\"model\":\"\"}").unwrap_err();
        assert!(error.to_string().contains("no valid rkyv archive"), "{error}");
    }

    /// Goal:   R2.4: raw JSON in an archive is checked as JSON, its depth included, and named by field and byte.
    /// Method: archives of the same structure whose `parameters` are no JSON.
    #[test]
    fn r2_4_raw_json_in_archives_is_checked() {
        let mut request = full();
        let archive = |raw: &str, request: &mut AIRequest| {
            let calls = request.messages[2].tool_calls.as_mut().unwrap();
            calls[0].parameters = Some(RawJson::new(raw.to_owned()).unwrap());
            archived(|out| Rkyv::new().encode_request(request, out))
        };
        let mut body = archive(r#"["this text is found"]"#, &mut request);
        let place = body.windows(9).position(|window| window == b"this text").unwrap();
        body[place - 1] = b'x';
        let error = Rkyv::new().decode_request(&body).unwrap_err();
        assert_eq!((&*error.path, error.offset), ("messages[2].toolCalls[0].parameters", place - 1));
        let mut body = archive(&format!("[\"{}\"]", "a".repeat(4000)), &mut request);
        for byte in body.iter_mut().filter(|byte| **byte == b'a') {
            *byte = b'[';
        }
        let begin = body.windows(2).position(|window| window == b"[\"").unwrap();
        body[begin + 1] = b'[';
        let error = Rkyv::new().decode_request(&body).unwrap_err();
        assert_eq!(error.what, Problem::Depth { max: DEPTH_MAX }, "{error}");
        let response =
            AIResponse { tool_calls: request.messages.remove(2).tool_calls, ..responses().remove(0) };
        let mut body = archived(|out| Rkyv::new().encode_response(&response, out));
        let place = body.windows(4).position(|window| window == b"[\"aa").unwrap();
        body[place] = b'?';
        let error = Rkyv::new().decode_response(&body).unwrap_err();
        assert_eq!((&*error.path, error.offset), ("toolCalls[0].parameters", place));
    }

    proptest! {
        /// Goal:   R2.4: any request comes back through an archive.
        #[test]
        fn r2_4_any_request_comes_back_through_an_archive(value in like_a_request()) {
            if let Some(request) = oracle(&value) {
                let archive = archived(|out| Rkyv::new().encode_request(&request, out));
                assert_same(&Rkyv::new().decode_request(&archive).unwrap().into_owned(), &request);
            }
        }
    }
}

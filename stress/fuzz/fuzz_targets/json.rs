//! The JSON codec, whatever a client sends.
//!
//! Asserted: nothing panics; what is refused is refused at a byte of the body; what serde_json takes for JSON is JSON here,
//! and the other way round, as far as depth allows; what is read is, written, read as the same and written as the same
//! bytes; every request that plain serde_json reads is read, as the same.
#![no_main]

use doorbell::codec::{Codec, DecodeError, Json, Problem};
use doorbell::messages::{AIRequest, RawJson};
use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;

const JSON: Json = Json::new();

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = Vec::new();
    write(&mut body);
    body
}

/// What is refused is refused somewhere in the body.
fn inside<T>(result: Result<T, DecodeError>, body: &[u8]) -> Option<T> {
    result.inspect_err(|e| assert!(e.offset <= body.len() && e.to_string().len() < 1000, "{e}")).ok()
}

/// Plain serde takes arrays for objects, and objects for words, and does not look whether what it ignores is UTF-8.
fn is_serdes_own(what: &Problem) -> bool {
    matches!(
        what,
        Problem::Type { found: "an array" | "an object", .. } | Problem::Depth { .. } | Problem::NotUtf8
    )
}

fn request(body: &[u8]) {
    let plain = serde_json::from_slice::<AIRequest>(body);
    let request = match (JSON.decode_request(body), &plain) {
        (Ok(request), _) => request.into_owned(),
        (Err(error), Ok(_)) => return assert!(is_serdes_own(&error.what), "plain serde reads it: {error}"),
        (error, Err(_)) => return drop(inside(error, body)),
    };
    if let Ok(plain) = plain {
        assert_eq!(format!("{plain:?}"), format!("{request:?}"));
    }
    let first = written(|out| JSON.encode_request(&request, out));
    let again = JSON.decode_request(&first).expect("what was written is read").into_owned();
    assert_eq!(written(|out| JSON.encode_request(&again, out)), first);
}

fn others(body: &[u8]) {
    if let Some(response) = inside(JSON.decode_response(body), body) {
        let first = written(|out| JSON.encode_response(&response, out));
        let again = JSON.decode_response(&first).expect("what was written is read");
        assert_eq!(written(|out| JSON.encode_response(&again, out)), first);
    }
    if let Some(chunk) = inside(JSON.decode_chunk(body), body) {
        let first = written(|out| JSON.encode_chunk(&chunk, out));
        let again = JSON.decode_chunk(&first).expect("what was written is read");
        assert_eq!(written(|out| JSON.encode_chunk(&again, out)), first);
    }
    if let Some(question) = inside(JSON.decode_analyze(body), body) {
        let question = question.into_owned();
        let first = written(|out| JSON.encode_analyze(&question, out));
        assert_eq!(JSON.decode_analyze(&first).expect("what was written is read").into_owned(), question);
    }
}

fuzz_target!(|body: &[u8]| {
    request(body);
    others(body);
    if let Ok(text) = std::str::from_utf8(body) {
        match (RawJson::new(text.to_owned()), serde_json::from_str::<&RawValue>(text)) {
            (Ok(raw), Ok(_)) => assert_eq!(raw.get(), text),
            (Err(error), Ok(_)) => assert!(matches!(error.what, Problem::Depth { .. }), "{error}"),
            (ours, Err(theirs)) => assert!(ours.is_err(), "{theirs}"),
        }
    }
});

//! The codecs through the library's public names: JSON to the byte, archives checked, hostile bodies refused by name.

use doorbell::codec::{Codec, Json, codec_of};
use doorbell_shm::entry::codec;

const VECTORS: &str = include_str!("data/airequest_vectors.jsonl");

fn again(line: &str) -> String {
    let request = Json::new().decode_request(line.as_bytes()).unwrap_or_else(|e| panic!("{e}: {line}"));
    let mut body = Vec::new();
    Json::new().encode_request(&request.into_owned(), &mut body);
    String::from_utf8(body).unwrap()
}

/// Goal:   R2.3, trap 16: what JavaScript wrote is read and written again to the byte.
/// Method: every line of the vectors.
#[test]
fn r2_3_trap16_every_request_is_written_as_javascript_wrote_it() {
    assert!(VECTORS.lines().count() >= 20);
    for line in VECTORS.lines() {
        assert_eq!(again(line), line);
    }
}

/// Goal:   R2.4: codecs are found by the numbers that connections name them by.
#[test]
fn r2_4_codecs_are_found_by_their_numbers() {
    for id in [codec::JSON, codec::RKYV] {
        assert_eq!(codec_of(id).map(|codec| codec.id()), Some(id));
    }
    for id in [codec::RAW, 3, 255] {
        assert!(codec_of(id).is_none(), "{id}");
    }
}

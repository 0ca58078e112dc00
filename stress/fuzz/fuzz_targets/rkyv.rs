//! Archives, whatever a client sends.
//!
//! The first byte says how far from a multiple of 16 the archive lies; the rest is the archive.
//!
//! Asserted: nothing panics or reads what is not there (the address sanitizer watches); what is read is the same wherever
//! it lies, and comes back through an archive of our own and through JSON.
#![no_main]

use doorbell::codec::{Codec, Json, Rkyv};
use libfuzzer_sys::fuzz_target;

const RKYV: Rkyv = Rkyv::new();
const JSON: Json = Json::new();

fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = Vec::new();
    write(&mut body);
    body
}

fn request(body: &[u8], moved: &[u8]) {
    let (request, elsewhere) = (RKYV.decode_request(body), RKYV.decode_request(moved));
    assert_eq!(request.is_ok(), elsewhere.is_ok());
    let (Ok(request), Ok(elsewhere)) = (request, elsewhere) else { return };
    let (request, elsewhere) = (request.into_owned(), elsewhere.into_owned());
    let json = written(|out| JSON.encode_request(&request, out));
    assert_eq!(written(|out| JSON.encode_request(&elsewhere, out)), json);
    let again = JSON.decode_request(&json).expect("what was written is read").into_owned();
    assert_eq!(written(|out| JSON.encode_request(&again, out)), json);
    let archive = written(|out| RKYV.encode_request(&request, out));
    let again = RKYV.decode_request(&archive).expect("what was written is read").into_owned();
    assert_eq!(written(|out| JSON.encode_request(&again, out)), json);
}

fn others(body: &[u8], moved: &[u8]) {
    assert_eq!(RKYV.decode_response(body).is_ok(), RKYV.decode_response(moved).is_ok());
    if let Ok(response) = RKYV.decode_response(body) {
        let json = written(|out| JSON.encode_response(&response, out));
        let again = JSON.decode_response(&json).expect("what was written is read");
        assert_eq!(written(|out| JSON.encode_response(&again, out)), json);
    }
    assert_eq!(RKYV.decode_chunk(body).is_ok(), RKYV.decode_chunk(moved).is_ok());
    if let Ok(chunk) = RKYV.decode_chunk(body) {
        let archive = written(|out| RKYV.encode_chunk(&chunk, out));
        let again = RKYV.decode_chunk(&archive).expect("what was written is read");
        assert_eq!(format!("{again:?}"), format!("{chunk:?}"));
    }
    let questions = (RKYV.decode_analyze(body), RKYV.decode_analyze(moved));
    assert_eq!(questions.0.ok(), questions.1.ok());
}

fuzz_target!(|input: &[u8]| {
    let Some((shift, archive)) = input.split_first() else { return };
    let mut room = vec![0u8; archive.len() + 64];
    let base = room.as_ptr().addr().next_multiple_of(16) - room.as_ptr().addr();
    let mut other = room.clone();
    let far = other.as_ptr().addr().next_multiple_of(16) - other.as_ptr().addr() + usize::from(shift % 16);
    room[base..base + archive.len()].copy_from_slice(archive);
    other[far..far + archive.len()].copy_from_slice(archive);
    let (body, moved) = (&room[base..base + archive.len()], &other[far..far + archive.len()]);
    request(body, moved);
    others(body, moved);
});

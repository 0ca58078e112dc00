//! How messages are put into bodies: as JSON, to the byte as `JSON.stringify` writes it, or as rkyv archives.
//!
//! A client names the codec of a connection when it opens it, and in each call; a handler learns it from
//! [`Context::codec`](crate::Context::codec) and finds it by [`codec_of`].
//!
//! Trust:  a body may be anything. It is read once, in time that grows with its length; objects and arrays are read to a
//!         depth of [`DEPTH_MAX`], without recursion where nothing is looked for; archives are checked as a whole
//!         before they are looked at.
//! Memory: texts are borrowed from the body where they stand there as they are. A request takes at most eight times its
//!         length beside it, since the smallest tool has 11 bytes and its record 72.

mod error;
mod json;
mod read;
#[cfg(feature = "rkyv")]
mod rkyv;
mod scan;
mod write;

pub use error::{DEPTH_MAX, DecodeError, Problem};
pub use json::Json;
#[cfg(feature = "rkyv")]
pub use rkyv::Rkyv;

use crate::messages::{AIRequest, AIRequestRef, AIResponse, AnalyzeFile, AnalyzeFileRef, StreamChunk};
use doorbell_shm::entry::codec;

/// Bodies of one kind: messages in, bytes out, and the other way round.
///
/// What is encoded is appended. Decoding errs with [`DecodeError`]: field, place and what must be there.
pub trait Codec: std::fmt::Debug + Send + Sync {
    /// The number that connections and calls name it by, one of [`doorbell_shm::entry::codec`].
    fn id(&self) -> u8;

    /// Reads a request.
    ///
    /// # Errors
    ///
    /// What is wrong with the body, and where.
    fn decode_request<'a>(&self, body: &'a [u8]) -> Result<AIRequestRef<'a>, DecodeError>;

    /// Appends a request.
    fn encode_request(&self, request: &AIRequest, body: &mut Vec<u8>);

    /// Reads an answer.
    ///
    /// # Errors
    ///
    /// What is wrong with the body, and where.
    fn decode_response(&self, body: &[u8]) -> Result<AIResponse, DecodeError>;

    /// Appends an answer.
    fn encode_response(&self, response: &AIResponse, body: &mut Vec<u8>);

    /// Reads a chunk of a streamed answer.
    ///
    /// # Errors
    ///
    /// What is wrong with the body, and where.
    fn decode_chunk(&self, body: &[u8]) -> Result<StreamChunk, DecodeError>;

    /// Appends a chunk of a streamed answer.
    fn encode_chunk(&self, chunk: &StreamChunk, body: &mut Vec<u8>);

    /// Reads a request to analyse a file. Unknown fields are errors in it, so that a misspelt one is noticed.
    ///
    /// # Errors
    ///
    /// What is wrong with the body, and where.
    fn decode_analyze<'a>(&self, body: &'a [u8]) -> Result<AnalyzeFileRef<'a>, DecodeError>;

    /// Appends a request to analyse a file.
    fn encode_analyze(&self, request: &AnalyzeFile, body: &mut Vec<u8>);
}

/// The codec of number `id`, `None` if doorbell does not interpret such bodies: they are raw, of a codec that does not
/// exist, or of one whose feature is off. The built-in handlers take raw bodies for JSON.
pub fn codec_of(id: u8) -> Option<&'static dyn Codec> {
    static JSON: Json = Json::new();
    match id {
        codec::JSON => Some(&JSON),
        #[cfg(feature = "rkyv")]
        codec::RKYV => {
            static RKYV: Rkyv = Rkyv::new();
            Some(&RKYV)
        }
        _ => None,
    }
}

/// Whether `text` is JSON, and not nested too deeply.
pub(crate) fn check_json(text: &str) -> Result<(), DecodeError> {
    read::Reader::new(text, DEPTH_MAX).whole(read::Reader::skip_value).map_err(|e| *e)
}

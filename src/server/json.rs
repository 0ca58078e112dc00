//! JSON of questions about the server itself, and of the answers. A server without the feature `messages` has none, and
//! says so.

use super::table::HandlerError;

/// Reads a question.
#[cfg(feature = "messages")]
pub(super) fn read<T: serde::de::DeserializeOwned>(question: &[u8]) -> Result<T, HandlerError> {
    serde_json::from_slice(question).map_err(|e| HandlerError::Decode(e.to_string()))
}

#[cfg(not(feature = "messages"))]
pub(super) fn read<T>(_: &[u8]) -> Result<T, HandlerError> {
    Err(HandlerError::left_out())
}

/// Writes an answer.
#[cfg(feature = "messages")]
pub(super) fn write(report: &impl serde::Serialize) -> Result<Vec<u8>, HandlerError> {
    serde_json::to_vec(report)
        .map_err(|error| HandlerError::Failed(format!("the report could not be written: {error}")))
}

#[cfg(not(feature = "messages"))]
pub(super) fn write<T>(_: &T) -> Result<Vec<u8>, HandlerError> {
    Err(HandlerError::left_out())
}

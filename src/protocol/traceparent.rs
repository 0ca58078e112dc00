//! The trace that a call belongs to: `traceparent` of W3C Trace Context, version 00, and the block of metadata that
//! carries it (`shm/LAYOUT.md`, section Metadata).
//!
//! Source: <https://www.w3.org/TR/trace-context/>, sections 3.2 (the format) and 4 (what to do with one that is wrong).

use doorbell_shm::PeerFault;
use doorbell_shm::entry::tlv;
use doorbell_shm::meta::{Elements, element_len, put};
use std::fmt;
use std::str::FromStr;

/// Bytes of a traceparent as text.
const TEXT_LEN: usize = 55;
/// Bytes of metadata that carry one.
pub(crate) const BLOCK_LEN: usize = element_len(TEXT_LEN);

/// A `traceparent` of W3C Trace Context: which trace a call belongs to, and which span of it has made the call.
///
/// ```
/// let trace: doorbell::TraceParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse()?;
/// assert!(trace.is_sampled());
/// let options = doorbell::CallOptions { traceparent: Some(trace), ..Default::default() };
/// # Ok::<(), doorbell::TraceParentError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    trace_id: [u8; 16],
    parent_id: [u8; 8],
    flags: u8,
}

/// Why a text is no `traceparent` of version 00.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TraceParentError {
    /// It has not 55 bytes.
    #[error("a traceparent has 55 characters, as in 00-<32 hex digits>-<16>-<2>; this one has {0} bytes")]
    Length(usize),
    /// Another version than 00, or none.
    #[error("a traceparent begins with its version, 00: no other is known here")]
    Version,
    /// A byte that is neither a lower-case hexadecimal digit nor the hyphen that belongs there.
    #[error("byte {0} of the traceparent is wrong: it is 00-<32 hex digits>-<16>-<2>, in lower case")]
    Byte(usize),
    /// An id of zeros, which means none.
    #[error("the {0} of the traceparent is all zeros: give one that names something")]
    Zero(&'static str),
}

impl TraceParent {
    /// Of its parts: 16 bytes that name the trace, 8 that name the span that calls, flags (bit 0: sampled).
    ///
    /// # Errors
    ///
    /// [`TraceParentError::Zero`] for an id of zeros.
    pub fn new(trace_id: [u8; 16], parent_id: [u8; 8], flags: u8) -> Result<Self, TraceParentError> {
        if trace_id == [0; 16] {
            return Err(TraceParentError::Zero("trace id"));
        }
        if parent_id == [0; 8] {
            return Err(TraceParentError::Zero("parent id"));
        }
        Ok(Self { trace_id, parent_id, flags })
    }

    /// Reads the text of one: `00-<trace id>-<parent id>-<flags>` in lower-case hexadecimal digits, 55 bytes.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and where.
    pub fn parse(text: &[u8]) -> Result<Self, TraceParentError> {
        let text: &[u8; TEXT_LEN] = text.try_into().map_err(|_| TraceParentError::Length(text.len()))?;
        if !text.starts_with(b"00") {
            return Err(TraceParentError::Version);
        }
        if let Some(at) = [2, 35, 52].into_iter().find(|at| text[*at] != b'-') {
            return Err(TraceParentError::Byte(at));
        }
        let (mut trace_id, mut parent_id, mut flags) = ([0; 16], [0; 8], [0]);
        read_hex(text, 3, &mut trace_id)?;
        read_hex(text, 36, &mut parent_id)?;
        read_hex(text, 53, &mut flags)?;
        Self::new(trace_id, parent_id, flags[0])
    }

    /// The id of the trace.
    pub fn trace_id(&self) -> [u8; 16] {
        self.trace_id
    }

    /// The id of the span that has made the call.
    pub fn parent_id(&self) -> [u8; 8] {
        self.parent_id
    }

    /// The flags as they came; bit 0 is the one with a meaning.
    pub fn flags(&self) -> u8 {
        self.flags
    }

    /// Whether the caller records this trace.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 != 0
    }

    /// The text, as it stands in a header of HTTP.
    pub fn to_text(&self) -> [u8; TEXT_LEN] {
        let mut text = *b"00-................................-................-..";
        write_hex(&mut text[3..35], &self.trace_id);
        write_hex(&mut text[36..52], &self.parent_id);
        write_hex(&mut text[53..], &[self.flags]);
        text
    }

    /// The metadata that carries it.
    pub(crate) fn to_block(self) -> [u8; BLOCK_LEN] {
        let mut block = [0; BLOCK_LEN];
        put(&mut block, tlv::TRACEPARENT, &self.to_text());
        block
    }

    /// The one in a private copy of a call's metadata. One that is wrong, or comes twice, is none.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Metadata`] if the block is no sequence of elements.
    pub(crate) fn in_block(block: &[u8]) -> Result<Option<Self>, PeerFault> {
        let (mut found, mut count) = (None, 0);
        for element in Elements::new(block) {
            let (kind, value) = element?;
            if kind == tlv::TRACEPARENT {
                found = Self::parse(value).ok();
                count += 1;
            }
        }
        Ok(found.filter(|_| count == 1))
    }
}

/// Reads hexadecimal digits of lower case from byte `at` on.
fn read_hex(text: &[u8; TEXT_LEN], at: usize, target: &mut [u8]) -> Result<(), TraceParentError> {
    let digit = |at: usize| match text[at] {
        byte @ b'0'..=b'9' => Ok(byte - b'0'),
        byte @ b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(TraceParentError::Byte(at)),
    };
    for (i, byte) in target.iter_mut().enumerate() {
        *byte = digit(at + 2 * i)? << 4 | digit(at + 2 * i + 1)?;
    }
    Ok(())
}

fn write_hex(target: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (digits, byte) in target.chunks_exact_mut(2).zip(bytes) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 15)];
    }
}

impl FromStr for TraceParent {
    type Err = TraceParentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text.as_bytes())
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_text().into_iter().try_for_each(|byte| fmt::Write::write_char(f, char::from(byte)))
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TraceParent({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8; TEXT_LEN] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    /// Goal:   F13: a traceparent is read as the recommendation writes it, and in no other way.
    /// Method: the recommendation's example; each byte of it set to every value: what is read is written again as it
    ///         came, and all else is an error that names the place; other lengths; ids of zeros.
    #[test]
    fn f13_a_traceparent_is_read_strictly() {
        let trace = TraceParent::parse(TEXT).unwrap();
        assert_eq!(trace.trace_id()[..4], [0x4b, 0xf9, 0x2f, 0x35]);
        assert_eq!((trace.parent_id()[1], trace.flags(), trace.is_sampled()), (0xf0, 1, true));
        assert_eq!(trace.to_string().as_bytes(), TEXT);
        for at in 0..TEXT_LEN {
            for value in 0..=u8::MAX {
                let mut text = *TEXT;
                text[at] = value;
                let hyphen = [2, 35, 52].contains(&at);
                let right = match at {
                    0 | 1 => value == b'0',
                    _ if hyphen => value == b'-',
                    _ => matches!(value, b'0'..=b'9' | b'a'..=b'f'),
                };
                match TraceParent::parse(&text) {
                    Ok(trace) => assert!(right && trace.to_text() == text, "byte {at} = {value}"),
                    Err(TraceParentError::Version) => assert!(!right && at < 2),
                    Err(error) => assert!(!right && error == TraceParentError::Byte(at), "{error}"),
                }
            }
        }
        for len in (0..TEXT_LEN).chain([TEXT_LEN + 1, TEXT_LEN + 3]) {
            let text: Vec<u8> = TEXT.iter().cycle().take(len).copied().collect();
            assert_eq!(TraceParent::parse(&text), Err(TraceParentError::Length(len)));
        }
        for (zeros, what) in [(3..35, "trace id"), (36..52, "parent id")] {
            let mut text = *TEXT;
            text[zeros].fill(b'0');
            assert_eq!(TraceParent::parse(&text), Err(TraceParentError::Zero(what)));
        }
    }

    /// Goal:   F13, S3: whatever a client writes into its metadata, the server finds a traceparent that is right, none, or
    ///         a violation.
    /// Method: a block with other elements around it; one that is wrong; two of them; every byte of a block set to every
    ///         value.
    #[test]
    fn f13_s3_what_is_found_in_metadata_is_right_or_nothing() {
        let trace = TraceParent::parse(TEXT).unwrap();
        let block = trace.to_block();
        assert_eq!(TraceParent::in_block(&block), Ok(Some(trace)));
        assert_eq!(TraceParent::in_block(&[]), Ok(None));
        let around = [&[9, 0, 1, 0, 77, 0, 0, 0][..], &block, &[2, 0, 0, 0]].concat();
        assert_eq!(TraceParent::in_block(&around), Ok(Some(trace)));
        let twice = [block, block].concat();
        assert_eq!(TraceParent::in_block(&twice), Ok(None));
        for at in 0..BLOCK_LEN {
            for value in 0..=u8::MAX {
                let mut block = block;
                block[at] = value;
                match TraceParent::in_block(&block) {
                    Ok(Some(trace)) => assert_eq!(trace.to_text(), block[4..59]),
                    Ok(None) => assert!(at < 59),
                    Err(fault) => {
                        assert!(matches!(fault, PeerFault::Metadata { .. }) && !(4..59).contains(&at))
                    }
                }
            }
        }
    }
}

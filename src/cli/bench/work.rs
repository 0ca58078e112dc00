//! The work that every peer does alike: the server answers each 64-bit word XOR a constant, every payload
//! is different, and every byte of every answer is checked.
//!
//! Words are little-endian; up to seven trailing bytes are treated as the low bytes of one more word.
//! The loops are written so that the compiler turns them into vector instructions.

use std::ops::{Deref, DerefMut};

/// What the server XORs every word with.
pub const XOR_CONSTANT: u64 = 0x9E37_79B9_7F4A_7C15;

/// The size of a cache line, bytes.
const LINE: usize = 64;

/// Zeroed private memory at a fixed place relative to cache lines, so that no figure depends on where the
/// allocator happened to put it: a copy of 64 bytes that straddles lines costs a tenth of a whole call.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` bytes that starts `offset` bytes behind the begin of a line.
    pub fn at(offset: usize, len: usize) -> Self {
        let bytes = vec![0; len + 2 * LINE];
        let start = bytes.as_ptr().align_offset(LINE) + offset % LINE;
        Self { bytes, start, len }
    }

    /// Where the reference (`bare_ring`) finds a small vector of its own: 48 bytes into a line. The load
    /// generator uses it for every peer.
    pub fn as_allocated(len: usize) -> Self {
        Self::at(48, len)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
}

impl DerefMut for Buffer {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// The nonce of the `count`-th request: different for each, in all its bytes.
#[inline(always)]
pub fn nonce(count: u64) -> u64 {
    count.wrapping_mul(XOR_CONSTANT)
}

/// Writes the request of this nonce: word i is `nonce ^ i`.
#[inline(always)]
pub fn fill(nonce: u64, payload: &mut [u8]) {
    let (words, tail) = payload.as_chunks_mut::<8>();
    let count = words.len() as u64;
    for (i, word) in words.iter_mut().enumerate() {
        *word = (nonce ^ i as u64).to_le_bytes();
    }
    // Guarded: for whole words this would be a call of memcpy with nothing to do, in every request.
    if !tail.is_empty() {
        tail.copy_from_slice(&(nonce ^ count).to_le_bytes()[..tail.len()]);
    }
}

/// Writes the answer to `request` into the first bytes of `reply`.
///
/// # Panics
///
/// If `reply` is shorter than `request`.
#[inline(always)]
pub fn answer(request: &[u8], reply: &mut [u8]) {
    let (words, tail) = request.as_chunks::<8>();
    let (reply_words, reply_tail) = reply[..request.len()].as_chunks_mut::<8>();
    for (reply, word) in reply_words.iter_mut().zip(words) {
        *reply = (u64::from_le_bytes(*word) ^ XOR_CONSTANT).to_le_bytes();
    }
    for ((reply, byte), key) in reply_tail.iter_mut().zip(tail).zip(XOR_CONSTANT.to_le_bytes()) {
        *reply = byte ^ key;
    }
}

/// Whether `reply` is, in every byte, the answer to the request of this nonce.
#[inline(always)]
pub fn check(nonce: u64, reply: &[u8]) -> bool {
    let expected = nonce ^ XOR_CONSTANT;
    let (words, tail) = reply.as_chunks::<8>();
    // OR of all differences rather than an early exit: that is what vectorises.
    let wrong = words
        .iter()
        .enumerate()
        .fold(0, |wrong, (i, word)| wrong | (u64::from_le_bytes(*word) ^ expected ^ i as u64));
    wrong == 0 && (tail.is_empty() || tail == &(expected ^ words.len() as u64).to_le_bytes()[..tail.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   a correct answer passes and nothing else does.
    /// Method: every length up to 40 bytes, every byte of it broken in turn.
    #[test]
    fn every_byte_of_an_answer_is_checked() {
        for len in 1..=40 {
            let (mut request, mut reply) = (vec![0; len], vec![0; len]);
            fill(nonce(7), &mut request);
            answer(&request, &mut reply);
            assert!(check(nonce(7), &reply), "{len}");
            assert!(!check(nonce(8), &reply), "{len}");
            assert!(!check(nonce(7), &request), "{len}");
            for i in 0..len {
                reply[i] ^= 0x40;
                assert!(!check(nonce(7), &reply), "byte {i} of {len}");
                reply[i] ^= 0x40;
            }
        }
    }

    #[test]
    fn the_answer_is_each_little_endian_word_xor_the_constant() {
        let mut reply = [0; 11];
        answer(&[0; 11], &mut reply);
        assert_eq!(reply, [0x15, 0x7C, 0x4A, 0x7F, 0xB9, 0x79, 0x37, 0x9E, 0x15, 0x7C, 0x4A]);
    }

    #[test]
    fn a_buffer_is_where_it_was_asked_for_and_has_its_length() {
        for (offset, len) in [(0, 1), (48, 64), (0, 1000), (48, 16384)] {
            let mut buffer = Buffer::at(offset, len);
            buffer.fill(7);
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % LINE), (len, offset));
        }
    }

    #[test]
    fn payloads_differ_between_requests_and_between_words() {
        let (mut a, mut b) = ([0; 24], [0; 24]);
        fill(nonce(1), &mut a);
        fill(nonce(2), &mut b);
        assert!(a.iter().zip(&b).filter(|(a, b)| a != b).count() > 12);
        assert_ne!(a[..8], a[8..16]);
    }
}

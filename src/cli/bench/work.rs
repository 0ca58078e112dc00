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
    answer_with(XOR_CONSTANT, request, reply);
}

#[inline(always)]
fn answer_with(key: u64, request: &[u8], reply: &mut [u8]) {
    let (words, tail) = request.as_chunks::<8>();
    let (reply_words, reply_tail) = reply[..request.len()].as_chunks_mut::<8>();
    for (reply, word) in reply_words.iter_mut().zip(words) {
        *reply = (u64::from_le_bytes(*word) ^ key).to_le_bytes();
    }
    for ((reply, byte), key) in reply_tail.iter_mut().zip(tail).zip(key.to_le_bytes()) {
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

/// Splits `len` bytes that begin at byte `at` of a body: how many belong to a word that began earlier.
#[inline(always)]
fn head(at: u64, len: usize) -> usize {
    ((at.wrapping_neg() % 8) as usize).min(len)
}

/// Byte `at` of the body whose word i is `nonce ^ i`.
#[inline(always)]
fn byte(nonce: u64, at: u64) -> u8 {
    (nonce ^ (at / 8)).to_le_bytes()[(at % 8) as usize]
}

/// Writes the part from byte `at` on of the request that [`fill`] writes as a whole.
#[inline(always)]
pub fn fill_at(nonce: u64, at: u64, part: &mut [u8]) {
    let (begun, rest) = part.split_at_mut(head(at, part.len()));
    for (at, target) in (at..).zip(begun.iter_mut()) {
        *target = byte(nonce, at);
    }
    let first = (at + begun.len() as u64) / 8;
    let (words, tail) = rest.as_chunks_mut::<8>();
    let count = words.len() as u64;
    for (i, word) in words.iter_mut().enumerate() {
        *word = (nonce ^ (first + i as u64)).to_le_bytes();
    }
    tail.copy_from_slice(&(nonce ^ (first + count)).to_le_bytes()[..tail.len()]);
}

/// Writes the answer to the part of a request that begins at byte `at` of it.
///
/// # Panics
///
/// If `reply` is shorter than `request`.
#[inline(always)]
pub fn answer_at(at: u64, request: &[u8], reply: &mut [u8]) {
    let key = XOR_CONSTANT.rotate_right(8 * (at % 8) as u32);
    answer_with(key, request, reply);
}

/// Whether `part` is, in every byte, the part from byte `at` on of the answer to the request of this nonce.
#[inline(always)]
pub fn check_at(nonce: u64, at: u64, part: &[u8]) -> bool {
    let expected = nonce ^ XOR_CONSTANT;
    let (begun, rest) = part.split_at(head(at, part.len()));
    let begun_right = (at..).zip(begun).all(|(at, found)| *found == byte(expected, at));
    let first = (at + begun.len() as u64) / 8;
    let (words, tail) = rest.as_chunks::<8>();
    let wrong = words
        .iter()
        .enumerate()
        .fold(0, |wrong, (i, word)| wrong | (u64::from_le_bytes(*word) ^ expected ^ (first + i as u64)));
    let last = (expected ^ (first + words.len() as u64)).to_le_bytes();
    begun_right && wrong == 0 && tail == &last[..tail.len()]
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

    /// Goal:   a body generated, answered and checked in parts is the same as in one go, wherever it is cut.
    /// Method: lengths around words; every pair of cuts, aligned or not; every byte broken in turn.
    #[test]
    fn parts_of_any_length_from_any_place_make_up_the_whole() {
        for len in [1, 7, 8, 9, 16, 29] {
            let (mut request, mut reply) = (vec![0; len], vec![0; len]);
            fill(nonce(5), &mut request);
            answer(&request, &mut reply);
            for from in 0..=len {
                for to in from..=len {
                    let at = from as u64;
                    let (mut part, mut answered) = (vec![0; to - from], vec![0; to - from]);
                    fill_at(nonce(5), at, &mut part);
                    assert_eq!(part, request[from..to], "{from}..{to} of {len}");
                    answer_at(at, &part, &mut answered);
                    assert_eq!(answered, reply[from..to], "{from}..{to} of {len}");
                    assert!(check_at(nonce(5), at, &answered));
                    for i in 0..answered.len() {
                        answered[i] ^= 0x40;
                        assert!(!check_at(nonce(5), at, &answered), "byte {i} of {from}..{to}");
                        answered[i] ^= 0x40;
                    }
                }
            }
        }
        let mut far = [0; 24];
        fill_at(nonce(5), 10 << 20, &mut far);
        assert_eq!(far[8..16], (nonce(5) ^ ((10 << 20) / 8 + 1)).to_le_bytes(), "a place beyond all windows");
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

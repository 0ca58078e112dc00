//! What is sent and what must come back.
//!
//! Every request of a run has a content of its own: 64-bit word i is the request's nonce XOR a constant of
//! that word's. Nonces come from the seed by a bijection, so no two requests share one.
//!
//! The server echoes under a mask: every word of the answer is what was sent XOR [`MASK`]. Request and answer
//! share a slot of shared memory, so a plain echo would look right even if the server had written nothing.
//!
//! A longer body is made of blocks of [`SIZE`] bytes, each with a nonce of its own that follows from the body's: no two
//! blocks of a body are alike, nor are two bodies, so whatever got to another place is found.

/// Bytes of a request and of its answer.
pub const SIZE: usize = 1024;
const WORDS: usize = SIZE / 8;

/// What every word of an answer differs by. No byte of it is 0.
pub const MASK: u64 = 0x9E37_79B9_7F4A_7C15;

/// The constants of the words.
static PATTERN: [u64; WORDS] = pattern();

const fn pattern() -> [u64; WORDS] {
    let mut words = [0; WORDS];
    let mut i = 0;
    while i < WORDS {
        words[i] = mix(i as u64 + 1);
        i += 1;
    }
    words
}

/// The finaliser of SplitMix64: a bijection that spreads every bit over all.
#[inline(always)]
pub const fn mix(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

/// The nonces of one client process.
#[derive(Debug, Clone)]
pub struct Nonces {
    seed: u64,
    number: u64,
}

impl Nonces {
    /// Requests that a process can number before it meets the next one's.
    const PER_PROCESS: u32 = 44;

    /// Those of process number `process` in a run of this seed.
    pub fn new(seed: u64, process: u64) -> Self {
        Self { seed: mix(seed), number: process << Self::PER_PROCESS }
    }

    /// The next one, never 0.
    #[inline(always)]
    pub fn draw(&mut self) -> u64 {
        loop {
            let nonce = mix(self.number ^ self.seed);
            self.number += 1;
            if nonce != 0 {
                return nonce;
            }
        }
    }
}

/// Writes the request of this nonce.
#[inline(always)]
pub fn fill(nonce: u64, request: &mut [u8; SIZE]) {
    for (word, constant) in request.as_chunks_mut::<8>().0.iter_mut().zip(&PATTERN) {
        *word = (nonce ^ constant).to_le_bytes();
    }
}

/// Writes the answer to whole words of a request.
#[inline(always)]
pub fn answer(request: &[u8], answer: &mut [u8]) {
    let words = answer.as_chunks_mut::<8>().0.iter_mut().zip(request.as_chunks::<8>().0);
    for (answer, word) in words {
        *answer = (u64::from_le_bytes(*word) ^ MASK).to_le_bytes();
    }
}

/// Whether `answer` is, in every byte, the answer to the request of this nonce.
#[inline(always)]
pub fn is_right(nonce: u64, answer: &[u8; SIZE]) -> bool {
    let expected = nonce ^ MASK;
    // OR of all differences rather than an early exit: that is what vectorises.
    let words = answer.as_chunks::<8>().0.iter().zip(&PATTERN);
    words.fold(0, |wrong, (word, constant)| wrong | (u64::from_le_bytes(*word) ^ expected ^ constant)) == 0
}

/// The nonce of block `index` of a longer body: for each index a bijection of the body's nonce.
#[inline(always)]
const fn block_nonce(nonce: u64, index: u64) -> u64 {
    mix(nonce ^ mix(index + 1))
}

/// Writes block `index` of the long body of this nonce.
#[inline(always)]
pub fn fill_block(nonce: u64, index: u64, block: &mut [u8; SIZE]) {
    fill(block_nonce(nonce, index), block);
}

/// Whether `piece` is, in every byte, what the answer to the long body of this nonce has from byte `at` on.
pub fn is_right_from(nonce: u64, at: u64, piece: &[u8]) -> bool {
    let (mut at, mut piece) = (at, piece);
    while !piece.is_empty() {
        let (index, within) = (at / SIZE as u64, (at % SIZE as u64) as usize);
        let nonce = block_nonce(nonce, index);
        let (now, rest) = piece.split_at(piece.len().min(SIZE - within));
        let right = match now.try_into() {
            Ok(block) => is_right(nonce, block),
            Err(_) => is_right_part(nonce, within, now),
        };
        if !right {
            return false;
        }
        (at, piece) = (at + now.len() as u64, rest);
    }
    true
}

/// Whether `part` is what the answer to the request of this nonce has from byte `within` on.
fn is_right_part(nonce: u64, within: usize, part: &[u8]) -> bool {
    let (mut request, mut expected) = ([0; SIZE], [0; SIZE]);
    fill(nonce, &mut request);
    answer(&request, &mut expected);
    expected[within..within + part.len()] == *part
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Goal:   every byte of a long answer is checked, however it is cut into pieces, and at its place.
    /// Method: pieces of sizes that meet the ends of blocks and do not; then each byte broken, and the pieces moved.
    #[test]
    fn every_byte_of_a_long_answer_is_checked_at_its_place() {
        const LEN: usize = 4 * SIZE;
        let (mut request, mut reply) = (Vec::new(), vec![0; LEN]);
        for index in 0..4 {
            let mut block = [0; SIZE];
            fill_block(9, index, &mut block);
            request.extend_from_slice(&block);
        }
        answer(&request, &mut reply);
        for len in [1, 7, 1000, SIZE, SIZE + 1, 2 * SIZE, LEN] {
            assert!((0..).zip(reply.chunks(len)).all(|(i, p)| is_right_from(9, i * len as u64, p)), "{len}");
        }
        assert!(!is_right_from(8, 0, &reply) && !is_right_from(9, 0, &request));
        assert!(!is_right_from(9, SIZE as u64, &reply[..SIZE]) && !is_right_from(9, 1, &reply[..8]));
        for i in 0..LEN {
            reply[i] ^= 1;
            assert!(!is_right_from(9, 0, &reply), "byte {i}");
            reply[i] ^= 1;
        }
    }

    /// Goal:   a right answer passes and nothing else does.
    /// Method: every byte broken in turn; the request itself; another request's answer.
    #[test]
    fn every_byte_of_an_answer_is_checked() {
        let (mut request, mut reply) = ([0; SIZE], [0; SIZE]);
        fill(7, &mut request);
        answer(&request, &mut reply);
        assert!(is_right(7, &reply));
        assert!(!is_right(8, &reply) && !is_right(7, &request));
        for i in 0..SIZE {
            reply[i] ^= 0x40;
            assert!(!is_right(7, &reply), "byte {i}");
            reply[i] ^= 0x40;
        }
    }

    #[test]
    fn an_answer_differs_from_its_request_in_every_byte() {
        let (mut request, mut reply) = ([0; SIZE], [0; SIZE]);
        fill(1, &mut request);
        answer(&request, &mut reply);
        assert!(request.iter().zip(&reply).all(|(a, b)| a != b));
    }

    /// Goal:   no two requests of a run look alike, in any word; two seeds send different things.
    /// Method: some thousands of several processes, all words of all in one set.
    #[test]
    fn every_request_has_a_content_of_its_own() {
        let mut words = HashSet::new();
        let mut request = [0; SIZE];
        for process in 0..10 {
            let mut nonces = Nonces::new(5, process);
            for _ in 0..100 {
                fill(nonces.draw(), &mut request);
                assert!(request.as_chunks::<8>().0.iter().all(|word| words.insert(*word)));
            }
        }
        assert_ne!(Nonces::new(5, 0).draw(), Nonces::new(6, 0).draw());
        assert_eq!(Nonces::new(5, 3).draw(), Nonces::new(5, 3).draw());
    }
}

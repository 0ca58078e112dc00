//! Where the next byte of a JSON text is that is not plain.

const ONES: u64 = u64::MAX / 255;
const TOPS: u64 = ONES * 0x80;
/// Bytes looked at together in long texts.
const CHUNK: usize = 32;

/// Bytes before the first quote, backslash or control character (all of them if there is none).
///
/// Cost:   32 bytes at a time, then eight.
#[inline]
pub(crate) fn plain_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(chunk) = bytes[at..].first_chunk::<CHUNK>() {
        // Without a branch in it, so that it becomes a few vector instructions.
        if chunk.iter().fold(false, |any, byte| any | is_special(*byte)) {
            break;
        }
        at += CHUNK;
    }
    while let Some(word) = bytes[at..].first_chunk::<8>() {
        let special = special_in(u64::from_le_bytes(*word));
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    at + bytes[at..].iter().take_while(|byte| !is_special(**byte)).count()
}

fn is_special(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// The top bit of every byte that is special. Bits above the lowest may be wrong, where a borrow has passed.
fn special_in(word: u64) -> u64 {
    let control = word.wrapping_sub(ONES * 0x20) & !word;
    let quote = (word ^ (ONES * u64::from(b'"'))).wrapping_sub(ONES) & !word;
    let backslash = (word ^ (ONES * u64::from(b'\\'))).wrapping_sub(ONES) & !word;
    (control | quote | backslash) & TOPS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   the first special byte is found wherever it is, whatever surrounds it.
    /// Method: every byte value at every place of texts around the sizes of chunk and word, against the plain loop.
    #[test]
    fn the_first_special_byte_is_found_wherever_it_is() {
        for len in [0, 1, 7, 8, 9, 31, 32, 33, 40, 71] {
            for filler in [b'a', 0x7f, 0x80, 0xff, b'!', b'#', b'[', b']', b' '] {
                for place in 0..len {
                    for byte in 0..=255u8 {
                        let mut bytes = vec![filler; len];
                        bytes[place] = byte;
                        let expected = bytes.iter().position(|b| is_special(*b)).unwrap_or(len);
                        assert_eq!(plain_len(&bytes), expected, "{byte:#x} at {place} of {len} {filler:#x}");
                    }
                }
            }
        }
    }
}

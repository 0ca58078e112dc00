//! Metadata at the start of a slot: elements `u16 type, u16 length, value`, padded with zeros to a multiple of 4.
//!
//! Trust:  the bytes are a private copy, but what they say is the client's: every length is judged before it is used.
//! Layout: `shm/LAYOUT.md`, section Metadata.

use crate::error::PeerFault;

/// Bytes before the value of an element.
pub const HEAD: usize = 4;

/// Bytes that an element takes whose value has `len` bytes.
pub const fn element_len(len: usize) -> usize {
    HEAD + len.next_multiple_of(4)
}

/// Writes an element into `target`, which has [`element_len`] bytes for it.
///
/// # Panics
///
/// If `target` has another length, or the value more than 65 535 bytes.
pub fn put(target: &mut [u8], kind: u16, value: &[u8]) {
    assert!(value.len() <= usize::from(u16::MAX) && target.len() == element_len(value.len()));
    target[..2].copy_from_slice(&kind.to_le_bytes());
    target[2..HEAD].copy_from_slice(&(value.len() as u16).to_le_bytes());
    target[HEAD..][..value.len()].copy_from_slice(value);
    target[HEAD + value.len()..].fill(0);
}

/// The elements of a block, type and value, in order. Ends with the first thing that is wrong.
#[derive(Debug)]
pub struct Elements<'a> {
    block: &'a [u8],
    at: usize,
}

impl<'a> Elements<'a> {
    /// Those of a private copy of a block.
    pub fn new(block: &'a [u8]) -> Self {
        Self { block, at: 0 }
    }

    fn element(&mut self) -> Option<(u16, &'a [u8])> {
        let rest = &self.block[self.at..];
        let (kind, rest) = rest.split_first_chunk::<2>()?;
        let (len, rest) = rest.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_le_bytes(*len));
        let padding = rest.get(len..len.next_multiple_of(4))?;
        if padding.iter().any(|byte| *byte != 0) {
            return None;
        }
        self.at += element_len(len);
        Some((u16::from_le_bytes(*kind), &rest[..len]))
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<(u16, &'a [u8]), PeerFault>;

    /// [`PeerFault::Metadata`] for an element that leaves the block, and for padding that is not zero.
    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.block.len() {
            return None;
        }
        let at = self.at as u32;
        let element = self.element().ok_or(PeerFault::Metadata { at });
        if element.is_err() {
            self.at = self.block.len();
        }
        Some(element)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(block: &[u8]) -> Result<Vec<(u16, Vec<u8>)>, PeerFault> {
        Elements::new(block).map(|element| element.map(|(kind, value)| (kind, value.to_vec()))).collect()
    }

    /// Goal:   F13: what is written is read, one element after the other, whatever the padding.
    /// Method: values of 0 to 9 bytes in every order of two.
    #[test]
    fn f13_elements_of_metadata_come_back() {
        for (first, second) in (0..10).flat_map(|first| (0..10).map(move |second| (first, second))) {
            let values = [vec![0xa5; first], vec![0x5a; second]];
            let (len, all) = (element_len(first), element_len(first) + element_len(second));
            let mut block = vec![0xff; all];
            put(&mut block[..len], 7, &values[0]);
            put(&mut block[len..], 0xfffe, &values[1]);
            assert_eq!(read(&block), Ok(vec![(7, values[0].clone()), (0xfffe, values[1].clone())]));
        }
    }

    /// Goal:   F13: no block makes the reader leave it, and none that is cut or padded wrongly is believed.
    /// Method: a block of two elements: cut at every byte, and with each of its bytes set to every value; whoever reads
    ///         must say where it is wrong, or return bytes of the block.
    #[test]
    fn f13_metadata_that_is_wrong_is_refused_where_it_is() {
        let mut block = vec![0; element_len(5) + element_len(3)];
        put(&mut block[..12], 1, b"abcde");
        put(&mut block[12..], 2, b"xyz");
        let whole = read(&block).unwrap();
        for end in 0..block.len() {
            let cut = read(&block[..end]);
            match end {
                0 => assert_eq!(cut, Ok(vec![])),
                12 => assert_eq!(cut.unwrap(), whole[..1]),
                _ => assert_eq!(cut, Err(PeerFault::Metadata { at: if end < 12 { 0 } else { 12 } })),
            }
        }
        for at in 0..block.len() {
            for value in 0..=u8::MAX {
                let mut wrong = block.clone();
                wrong[at] = value;
                let padding = (9..12).contains(&at) || at == 19;
                match read(&wrong) {
                    Ok(found) => {
                        assert!(!padding || value == 0, "byte {at} = {value}");
                        assert!(
                            found.iter().map(|(_, value)| element_len(value.len())).sum::<usize>()
                                == wrong.len()
                        );
                    }
                    Err(fault) => {
                        assert!(matches!(fault, PeerFault::Metadata { at: 0 | 4 | 8 | 12 | 16 }), "{fault}")
                    }
                }
            }
        }
    }
}

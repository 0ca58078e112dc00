//! Records: how a streamed answer keeps its chunks apart. Sans-I/O.
//!
//! The body of a streamed answer is a sequence of records, and a record is one encoded chunk behind its length:
//!
//! ```text
//!  0        4               4 + length
//! | length | encoded chunk | the next record …
//!   u32 LE   length bytes
//! ```
//!
//! Frames cut the body anywhere: a record may span frames, a frame may hold many records. The order of chunks is
//! their order in the body, which frames keep. An answer that ends with status `Ok` ends behind a record; one that
//! ends otherwise (cancelled, past its deadline, failed) may end within one, and what came of that one is dropped.
//!
//! ```
//! use doorbell::protocol::records::{RecordReader, head};
//!
//! let mut body = Vec::new();
//! for chunk in ["one", "two"] {
//!     body.extend_from_slice(&head(chunk.len())?);
//!     body.extend_from_slice(chunk.as_bytes());
//! }
//! let mut reader = RecordReader::new(1024);
//! let mut chunks = Vec::new();
//! for mut frame in body.chunks(5) {
//!     while let Some(record) = reader.next(&mut frame)? {
//!         chunks.push(String::from_utf8_lossy(record).into_owned());
//!     }
//! }
//! reader.finish()?;
//! assert_eq!(chunks, ["one", "two"]);
//! # Ok::<(), doorbell::protocol::records::RecordError>(())
//! ```

/// Bytes before each record: its length.
pub const RECORD_HEAD: usize = 4;

/// Longest record that a reader takes unless told otherwise, bytes without the head.
pub const RECORD_MAX: usize = 1 << 20;

/// What is wrong with a sequence of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A record longer than the reader takes, or than a length can say.
    #[error("a record of {len} bytes is longer than the {most} that are taken")]
    TooLong {
        /// Its length, bytes.
        len: usize,
        /// The most, bytes.
        most: usize,
    },
    /// The body has ended within a record.
    #[error("the answer ended within a record: {have} of its bytes came, {missing} did not")]
    Truncated {
        /// Bytes that came, the head included.
        have: usize,
        /// Bytes that are known to be missing.
        missing: usize,
    },
}

/// What is written before a record of `len` bytes.
///
/// # Errors
///
/// [`RecordError::TooLong`] if `len` does not fit 32 bits.
pub fn head(len: usize) -> Result<[u8; RECORD_HEAD], RecordError> {
    let too_long = RecordError::TooLong { len, most: u32::MAX as usize };
    u32::try_from(len).map(u32::to_le_bytes).map_err(|_| too_long)
}

/// Takes a body apart into its records, however it has been cut into frames.
///
/// A record that lies whole in what is given is handed out from there; only one that spans frames is put together
/// in memory of the reader's own, which is kept for the next one.
#[derive(Debug)]
pub struct RecordReader {
    /// Of the record that is being put together: its head, then its bytes.
    partial: Vec<u8>,
    /// `partial` is whole and has been handed out.
    handed_out: bool,
    most: usize,
}

impl Default for RecordReader {
    fn default() -> Self {
        Self::new(RECORD_MAX)
    }
}

impl RecordReader {
    /// A reader of records of up to `most` bytes each.
    pub fn new(most: usize) -> Self {
        Self { partial: Vec::new(), handed_out: false, most }
    }

    /// The next record, taken from the front of `bytes`; `None` once all of `bytes` has been taken and the rest of
    /// the record, if there is one, is still to come.
    ///
    /// # Errors
    ///
    /// [`RecordError::TooLong`] for a record above the reader's limit. Nothing that follows can be made sense of:
    /// the reader goes on answering so.
    pub fn next<'s, 'b: 's>(&'s mut self, bytes: &mut &'b [u8]) -> Result<Option<&'s [u8]>, RecordError> {
        if std::mem::take(&mut self.handed_out) {
            self.partial.clear();
        }
        if self.partial.is_empty()
            && let Some((head, rest)) = bytes.split_first_chunk()
        {
            let len = self.checked(*head)?;
            if let Some((record, rest)) = rest.split_at_checked(len) {
                *bytes = rest;
                return Ok(Some(record));
            }
        }
        self.put_together(bytes)
    }

    /// To be asked once the body has ended.
    ///
    /// # Errors
    ///
    /// [`RecordError::Truncated`] if it ended within a record.
    pub fn finish(&self) -> Result<(), RecordError> {
        let have = self.partial.len();
        if have == 0 || self.handed_out {
            return Ok(());
        }
        Err(RecordError::Truncated { have, missing: self.missing()?.max(1) })
    }

    fn put_together(&mut self, bytes: &mut &[u8]) -> Result<Option<&[u8]>, RecordError> {
        loop {
            let missing = self.missing()?;
            if missing == 0 {
                self.handed_out = true;
                return Ok(Some(&self.partial[RECORD_HEAD..]));
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.partial.extend_from_slice(now);
            *bytes = later;
        }
    }

    /// Bytes that the head, or else the record, still lacks; 0 if the record is whole.
    fn missing(&self) -> Result<usize, RecordError> {
        match self.partial.first_chunk() {
            None => Ok(RECORD_HEAD - self.partial.len()),
            Some(head) => Ok(RECORD_HEAD + self.checked(*head)? - self.partial.len()),
        }
    }

    fn checked(&self, head: [u8; RECORD_HEAD]) -> Result<usize, RecordError> {
        let len = u32::from_le_bytes(head) as usize;
        if len > self.most {
            return Err(RecordError::TooLong { len, most: self.most });
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn body(records: &[Vec<u8>]) -> Vec<u8> {
        records.iter().flat_map(|r| [&head(r.len()).unwrap()[..], r].concat()).collect()
    }

    fn read(reader: &mut RecordReader, mut frame: &[u8]) -> Result<Vec<Vec<u8>>, RecordError> {
        let mut records = Vec::new();
        while let Some(record) = reader.next(&mut frame)? {
            records.push(record.to_vec());
        }
        assert!(frame.is_empty());
        Ok(records)
    }

    proptest! {
        /// Goal:   R2.5: chunks come out as they went in, however frames cut them.
        /// Method: random records, random frame lengths.
        #[test]
        fn r2_5_records_come_out_as_they_went_in(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
            cut in 1usize..50,
        ) {
            let mut reader = RecordReader::new(40);
            let mut got = Vec::new();
            for frame in body(&records).chunks(cut) {
                got.extend(read(&mut reader, frame)?);
            }
            prop_assert_eq!(got, records);
            prop_assert_eq!(reader.finish(), Ok(()));
        }
    }

    /// Goal:   an answer that ends within a record is told from one that ends behind it.
    #[test]
    fn r2_5_a_record_that_is_cut_off_is_reported() {
        let whole = body(&[b"abc".to_vec(), b"defg".to_vec()]);
        for end in 0..=whole.len() {
            let mut reader = RecordReader::new(8);
            let records = read(&mut reader, &whole[..end]).unwrap();
            assert_eq!(records.len(), [0, 7, 15].iter().filter(|at| **at <= end).count() - 1);
            let expected = match end {
                0 | 7 | 15 => Ok(()),
                1..4 => Err(RecordError::Truncated { have: end, missing: 4 - end }),
                4..7 => Err(RecordError::Truncated { have: end, missing: 7 - end }),
                8..11 => Err(RecordError::Truncated { have: end - 7, missing: 11 - end }),
                _ => Err(RecordError::Truncated { have: end - 7, missing: 15 - end }),
            };
            assert_eq!(reader.finish(), expected, "{end}");
        }
    }

    /// Goal:   a length above the limit is refused before memory is taken for it, for good.
    /// Method: such a head in one piece and byte by byte.
    #[test]
    fn r2_5_a_record_beyond_the_limit_is_refused() {
        for cut in 1..5 {
            let mut reader = RecordReader::new(3);
            let bytes = [4, 0, 0, 0, 1, 2, 3, 4];
            let error = bytes.chunks(cut).find_map(|frame| read(&mut reader, frame).err());
            assert_eq!(error, Some(RecordError::TooLong { len: 4, most: 3 }));
            assert!(reader.partial.capacity() < 16);
        }
        assert_eq!(head(3), Ok([3, 0, 0, 0]));
        assert!(head(1 << 32).is_err());
    }
}

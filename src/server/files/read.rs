//! One file being read, without I/O: which bytes to read next, and what to make of those that came.

use super::analysis::{Analysis, FileFacts};
use super::error::FileError;
use doorbell_uring::Class;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// How often one file's reads may be interrupted and repeated.
const INTERRUPTIONS_MAX: u32 = 16;

/// A file on its way from the disk into an [`Analysis`]: read from its beginning to its end, one read at a time.
///
/// It must have the size at its end that it had when it was opened, else what was read is no version of it that
/// ever was.
#[derive(Debug)]
pub struct FileRead {
    path: PathBuf,
    /// When it was opened.
    size: u64,
    offset: u64,
    interruptions: u32,
    analysis: Analysis,
    /// What has come, if it is wanted afterwards.
    content: Option<Vec<u8>>,
}

/// A read that is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Where in the file.
    pub offset: u64,
    /// Most bytes; at least 1, and no more than the buffer of [`FileRead::class`] holds.
    pub len: usize,
}

impl FileRead {
    /// A file of `size` bytes, nothing of it read yet.
    pub fn new(path: PathBuf, size: u64) -> Self {
        Self { path, size, offset: 0, interruptions: 0, analysis: Analysis::new(), content: None }
    }

    /// The same, keeping what comes.
    pub fn keeping(self) -> Self {
        Self { content: Some(Vec::with_capacity(self.size as usize)), ..self }
    }

    /// What has come, if it was to be kept.
    pub fn take_content(&mut self) -> Option<Vec<u8>> {
        self.content.take()
    }

    /// The file, as the client named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The class of the buffer that it is to be read into: small files need no large one, and for longer ones
    /// 64 KiB are as good as more.
    pub fn class(&self) -> Class {
        if self.size <= Class::Small.size() as u64 { Class::Small } else { Class::Medium }
    }

    /// The next read: up to one byte more than there should be, which tells whether there is one.
    pub fn want(&self) -> Want {
        let left = self.size.saturating_sub(self.offset).saturating_add(1);
        Want { offset: self.offset, len: left.min(self.class().size() as u64) as usize }
    }

    /// What the read of [`FileRead::want`] has brought; empty at the end of the file. `None`: read on.
    ///
    /// # Errors
    ///
    /// [`FileError::Changed`] if the file has ended early or goes on where it should not; [`FileError::Os`] if
    /// reading failed. It is over then.
    pub fn came(&mut self, result: Result<&[u8], Errno>) -> Result<Option<FileFacts>, FileError> {
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(Errno::INTR) if self.interruptions < INTERRUPTIONS_MAX => {
                self.interruptions += 1;
                return Ok(None);
            }
            Err(errno) => return Err(FileError::Os { path: self.path.clone(), call: "read", errno }),
        };
        let asked = self.want().len;
        self.offset += bytes.len() as u64;
        if self.offset > self.size || (bytes.is_empty() && self.offset < self.size) {
            let path = self.path.clone();
            return Err(FileError::Changed { path, opened: self.size, found: self.offset });
        }
        self.analysis.push(bytes);
        if let Some(content) = &mut self.content {
            content.extend_from_slice(bytes);
        }
        // The read that asked for one byte more has not got it. Reads of regular files end short only at the end,
        // and what ends here by a signal is still the file as it was opened.
        let ended = self.offset == self.size && bytes.len() < asked;
        Ok(ended.then(|| std::mem::take(&mut self.analysis).finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads `file`, which had `opened` bytes when it was opened, in reads of at most `most` bytes; returns how it
    /// ended and how many reads that took.
    fn run(file: &[u8], opened: u64, most: usize) -> (Result<FileFacts, FileError>, usize) {
        let mut read = FileRead::new("f".into(), opened);
        for reads in 1.. {
            let want = read.want();
            assert!((1..=read.class().size()).contains(&want.len));
            let from = (want.offset as usize).min(file.len());
            let to = (from + want.len.min(most)).min(file.len());
            match read.came(Ok(&file[from..to])) {
                Ok(None) => {}
                Ok(Some(facts)) => return (Ok(facts), reads),
                Err(error) => return (Err(error), reads),
            }
        }
        unreachable!("a file ends")
    }

    fn content(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8 & 0x7f).collect()
    }

    /// Goal:   R2.11: a file is read whole, with as few reads as can be.
    /// Method: sizes around those of the buffers.
    #[test]
    fn r2_11_a_file_is_read_whole() {
        for (size, reads) in [
            (0, 1),
            (1, 1),
            (4095, 1),
            (4096, 2), // the buffer is full: only another read can tell that this was all
            (4097, 1),
            (65535, 1),
            (65536, 2),
            (65537, 2),
            (200_000, 4),
        ] {
            let file = content(size);
            assert_eq!(run(&file, size as u64, usize::MAX), (Ok(Analysis::of(&file)), reads), "{size}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal:   however short the reads are, the answer is the same, and a file that had another size is noticed.
        #[test]
        fn r2_11_short_reads_and_other_sizes(len in 0..9000usize, opened in 0..9000u64, same: bool, most in 1..9000usize) {
            let file = content(len);
            let opened = if same { len as u64 } else { opened };
            // Each read is another step: the smallest ones only for small files.
            let most = most.max(len / 50 + 1);
            let (result, _) = run(&file, opened, most);
            if opened == len as u64 {
                prop_assert_eq!(result, Ok(Analysis::of(&file)));
            } else if result.is_ok() {
                // A short read in the middle of the file has ended right where the file once did.
                prop_assert!(opened < len as u64 && opened.is_multiple_of(most as u64));
                prop_assert_eq!(result, Ok(Analysis::of(&file[..opened as usize])));
            } else {
                let error = result.unwrap_err();
                prop_assert!(matches!(error, FileError::Changed { opened: o, found, .. }
                    if o == opened && (found == len as u64 || (found > opened && found <= len as u64))), "{:?}", error);
            }
        }
    }

    /// Goal:   a file that changes while it is read is an error that names both sizes.
    /// Method: it ends early, at once or later; it goes on.
    #[test]
    fn r2_11_a_changed_file_is_told_with_both_sizes() {
        for (len, opened, found, text) in [
            (0, 10, 0, "10 bytes when it was opened, 0 when it was read"),
            (70_000, 200_000, 70_000, "200000 bytes when it was opened, 70000 when it was read"),
            (11, 10, 11, "10 bytes when it was opened, 11 or more when it was read"),
            (100, 0, 1, "0 bytes when it was opened, 1 or more when it was read"),
        ] {
            let (result, _) = run(&content(len), opened, usize::MAX);
            let error = result.unwrap_err();
            assert_eq!(error, FileError::Changed { path: "f".into(), opened, found });
            assert!(error.to_string().starts_with("\"f\" was changed") && error.to_string().contains(text));
        }
    }

    /// Goal:   F41: an interrupted read is repeated, not for ever; any other error ends the reading and is told.
    #[test]
    fn f41_an_interrupted_read_is_repeated() {
        let mut read = FileRead::new("f".into(), 3);
        assert_eq!(read.came(Ok(b"a")), Ok(None));
        for _ in 0..INTERRUPTIONS_MAX {
            assert_eq!(read.came(Err(Errno::INTR)), Ok(None));
            assert_eq!(read.want(), Want { offset: 1, len: 3 });
        }
        assert!(matches!(read.came(Err(Errno::INTR)), Err(FileError::Os { errno: Errno::INTR, .. })));

        let error = FileRead::new("f".into(), 3).came(Err(Errno::IO)).unwrap_err();
        assert!(error.to_string().starts_with("\"f\" was not read: read: "), "{error}");
    }
}

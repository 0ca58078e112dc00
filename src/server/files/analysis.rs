//! What can be said of a file by looking at each byte once, in pieces of any size.

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

/// How the bytes of a file are to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// Only bytes below 128. So is a file of none.
    Ascii,
    /// Valid UTF-8 without a byte order mark.
    #[serde(rename = "utf-8")]
    Utf8,
    /// Valid UTF-8 behind a byte order mark.
    #[serde(rename = "utf-8-bom")]
    Utf8Bom,
    /// Valid UTF-16, little-endian by its byte order mark. Without a mark it is one of the others.
    #[serde(rename = "utf-16le")]
    Utf16Le,
    /// Valid UTF-16, big-endian by its byte order mark.
    #[serde(rename = "utf-16be")]
    Utf16Be,
    /// Anything else.
    Binary,
}

/// How the lines of a file end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LineEnding {
    /// No line ends.
    None,
    /// All by `\n`.
    Lf,
    /// All by `\r\n`.
    Crlf,
    /// Some so, some so.
    Mixed,
}

/// What was found. As JSON: `{"size":6,"lines":1,"encoding":"ascii","lineEnding":"lf","sha256":"..."}`, and
/// `invalidUtf8At` behind the encoding if that is `binary`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FileFacts {
    /// Bytes.
    pub size: u64,
    /// Line ends, `\n`, and one more if something stands behind the last of them. A byte order mark is nothing.
    /// In UTF-16 a line end is the 16-bit unit, not any byte 10.
    pub lines: u64,
    /// How the bytes are to be understood.
    pub encoding: Encoding,
    /// Where a binary file stops being UTF-8: offset of the first byte that begins no valid sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invalid_utf8_at: Option<u64>,
    /// How its lines end.
    pub line_ending: LineEnding,
    /// SHA-256 of all bytes; 64 hexadecimal digits in JSON.
    #[serde(serialize_with = "hexadecimal")]
    pub sha256: [u8; 32],
}

impl FileFacts {
    /// One JSON object on one line, about 150 bytes.
    pub fn to_json(&self) -> String {
        // Numbers, fixed words and a string: nothing in it can be refused.
        serde_json::to_string(self).expect("facts are JSON")
    }
}

fn hexadecimal<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    serializer.collect_str(&digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect::<String>())
}

const UTF8_MARK: [u8; 3] = [0xef, 0xbb, 0xbf];
const UTF16_LE_MARK: [u8; 2] = [0xff, 0xfe];
const UTF16_BE_MARK: [u8; 2] = [0xfe, 0xff];

/// An analysis under way: give it the bytes in order, in pieces of any size.
///
/// Cost:   one pass for the hash and four short ones, a piece staying in the cache. 64 KiB of text take 50 to 75 µs where
///         the processor has SHA instructions, most of it for the hash, UTF-16 166 µs. Nothing is allocated.
#[derive(Debug, Clone, Default)]
pub struct Analysis {
    size: u64,
    /// The first bytes, where a byte order mark would be.
    head: [u8; 3],
    not_ascii: bool,
    utf8: Utf8,
    lines: Lines,
    /// Kept beside the others as long as a UTF-16 mark is confirmed by what follows.
    utf16: Option<Utf16>,
    hash: Sha256,
}

impl Analysis {
    /// Of nothing so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// All of some bytes at once.
    pub fn of(bytes: &[u8]) -> FileFacts {
        let mut analysis = Self::new();
        analysis.push(bytes);
        analysis.finish()
    }

    /// The next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        // Byte by byte while a mark may still come.
        let head = 3u64.saturating_sub(self.size) as usize;
        let (head, rest) = bytes.split_at(head.min(bytes.len()));
        for byte in head {
            self.head[self.size as usize] = *byte;
            self.look_at(std::slice::from_ref(byte));
            if self.size == 2 {
                self.utf16 = Utf16::after(self.head[..2].try_into().expect("two bytes"));
            }
        }
        self.look_at(rest);
    }

    fn look_at(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.not_ascii |= !bytes.is_ascii();
        self.utf8.push(bytes);
        self.lines.push(bytes);
        if let Some(utf16) = &mut self.utf16 {
            utf16.push(bytes);
        }
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What was found, there being no more bytes.
    pub fn finish(self) -> FileFacts {
        let invalid_at = self.utf8.invalid_at();
        let mark = if self.size >= 3 && self.head == UTF8_MARK { 3 } else { 0 };
        let of_bytes = (self.lines.count(self.size > mark), self.lines.ending());
        let (encoding, (lines, line_ending)) = match (&self.utf16, invalid_at) {
            (Some(utf16), _) if utf16.is_whole() => {
                (utf16.encoding(), (utf16.lines.count(utf16.units > 0), utf16.lines.ending()))
            }
            (_, Some(_)) => (Encoding::Binary, of_bytes),
            _ if mark > 0 => (Encoding::Utf8Bom, of_bytes),
            _ if self.not_ascii => (Encoding::Utf8, of_bytes),
            _ => (Encoding::Ascii, of_bytes),
        };
        FileFacts {
            size: self.size,
            lines,
            encoding,
            invalid_utf8_at: invalid_at.filter(|_| encoding == Encoding::Binary),
            line_ending,
            sha256: self.hash.finalize().into(),
        }
    }
}

/// Bytes whose line ends are counted in a byte: only so does the compiler count sixteen of them at once, which is
/// twenty times faster.
const BLOCK: usize = 192;

fn newlines(block: &[u8]) -> u8 {
    block.iter().map(|byte| u8::from(*byte == b'\n')).sum()
}

/// `\r\n` where `next` is `block` from its second byte on.
fn pairs_in(block: &[u8], next: &[u8]) -> u8 {
    let both = block.iter().zip(next);
    both.map(|(first, second)| u8::from(*first == b'\r') & u8::from(*second == b'\n')).sum()
}

/// Line ends, in bytes or in 16-bit units.
#[derive(Debug, Clone, Copy, Default)]
struct Lines {
    newlines: u64,
    /// Those with a `\r` before.
    after_return: u64,
    ends_in_return: bool,
    ends_in_newline: bool,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return };
        let blocks = bytes.chunks(BLOCK);
        let pairs = blocks.clone().zip(bytes[1..].chunks(BLOCK));
        self.newlines += blocks.map(|block| u64::from(newlines(block))).sum::<u64>();
        self.after_return += pairs.map(|(block, next)| u64::from(pairs_in(block, next))).sum::<u64>();
        self.after_return += u64::from(self.ends_in_return && *first == b'\n');
        self.ends_in_return = *last == b'\r';
        self.ends_in_newline = *last == b'\n';
    }

    fn push_unit(&mut self, unit: u16) {
        let newline = unit == u16::from(b'\n');
        self.newlines += u64::from(newline);
        self.after_return += u64::from(newline && self.ends_in_return);
        self.ends_in_return = unit == u16::from(b'\r');
        self.ends_in_newline = newline;
    }

    /// Lines of a text that has anything in it or not.
    fn count(&self, anything: bool) -> u64 {
        self.newlines + u64::from(anything && !self.ends_in_newline)
    }

    fn ending(&self) -> LineEnding {
        match (self.newlines, self.after_return) {
            (0, _) => LineEnding::None,
            (_, 0) => LineEnding::Lf,
            (all, crlf) if all == crlf => LineEnding::Crlf,
            _ => LineEnding::Mixed,
        }
    }
}

/// Validity of UTF-8 across pieces.
#[derive(Debug, Clone, Default)]
struct Utf8 {
    /// Bytes before `begun`.
    checked: u64,
    /// A sequence that the last piece has begun and not ended.
    begun: [u8; 4],
    begun_len: usize,
    invalid: bool,
}

impl Utf8 {
    /// Once invalid, `checked` stays where that was found.
    fn push(&mut self, mut bytes: &[u8]) {
        while !self.invalid && self.begun_len > 0 {
            let Some((next, rest)) = bytes.split_first() else { return };
            bytes = rest;
            self.begun[self.begun_len] = *next;
            self.begun_len += 1;
            match std::str::from_utf8(&self.begun[..self.begun_len]) {
                Ok(_) => {
                    self.checked += self.begun_len as u64;
                    self.begun_len = 0;
                }
                Err(error) => self.invalid = error.error_len().is_some(),
            }
        }
        if self.invalid {
            return;
        }
        match std::str::from_utf8(bytes) {
            Ok(_) => self.checked += bytes.len() as u64,
            Err(error) => {
                let rest = &bytes[error.valid_up_to()..];
                self.checked += error.valid_up_to() as u64;
                self.invalid = error.error_len().is_some();
                if !self.invalid {
                    self.begun[..rest.len()].copy_from_slice(rest);
                    self.begun_len = rest.len();
                }
            }
        }
    }

    /// Offset of the first byte that begins no valid sequence; a sequence that the end cuts short is none.
    fn invalid_at(&self) -> Option<u64> {
        (self.invalid || self.begun_len > 0).then_some(self.checked)
    }
}

/// UTF-16 behind a byte order mark, across pieces.
#[derive(Debug, Clone)]
struct Utf16 {
    big_endian: bool,
    units: u64,
    half: Option<u8>,
    /// The last unit was the first of a pair.
    in_pair: bool,
    invalid: bool,
    lines: Lines,
}

impl Utf16 {
    fn after(mark: [u8; 2]) -> Option<Self> {
        let big_endian = match mark {
            UTF16_LE_MARK => false,
            UTF16_BE_MARK => true,
            _ => return None,
        };
        let lines = Lines::default();
        Some(Self { big_endian, units: 0, half: None, in_pair: false, invalid: false, lines })
    }

    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.invalid {
                return;
            }
            let Some(first) = self.half.take() else {
                self.half = Some(*byte);
                continue;
            };
            let unit = [first, *byte];
            self.unit(if self.big_endian { u16::from_be_bytes(unit) } else { u16::from_le_bytes(unit) });
        }
    }

    fn unit(&mut self, unit: u16) {
        let (high, low) = ((0xd800..0xdc00).contains(&unit), (0xdc00..0xe000).contains(&unit));
        self.invalid = self.in_pair != low;
        self.in_pair = high;
        self.units += 1;
        self.lines.push_unit(unit);
    }

    fn is_whole(&self) -> bool {
        !self.invalid && !self.in_pair && self.half.is_none()
    }

    fn encoding(&self) -> Encoding {
        if self.big_endian { Encoding::Utf16Be } else { Encoding::Utf16Le }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The naive way: all bytes at once, with the standard library.
    fn oracle(bytes: &[u8]) -> FileFacts {
        let utf16 = |from: fn([u8; 2]) -> u16| {
            let units: Vec<u16> = bytes[2..].chunks_exact(2).map(|pair| from([pair[0], pair[1]])).collect();
            bytes.len().is_multiple_of(2).then(|| String::from_utf16(&units).ok()).flatten()
        };
        let valid = std::str::from_utf8(bytes);
        let (encoding, text) = match bytes {
            [0xff, 0xfe, ..] if utf16(u16::from_le_bytes).is_some() => {
                (Encoding::Utf16Le, utf16(u16::from_le_bytes))
            }
            [0xfe, 0xff, ..] if utf16(u16::from_be_bytes).is_some() => {
                (Encoding::Utf16Be, utf16(u16::from_be_bytes))
            }
            [0xef, 0xbb, 0xbf, rest @ ..] if valid.is_ok() => {
                (Encoding::Utf8Bom, Some(String::from_utf8_lossy(rest).into_owned()))
            }
            _ if bytes.iter().all(|byte| *byte < 128) => (Encoding::Ascii, None),
            _ if valid.is_ok() => (Encoding::Utf8, None),
            _ => (Encoding::Binary, None),
        };
        // Where it is not decoded, each byte is as good as a character: 10 and 13 mean the same in both. Only the
        // mark of a file that is binary all the same does not count as something.
        let text = text.unwrap_or_else(|| {
            let bytes = bytes.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(bytes);
            bytes.iter().map(|byte| char::from(*byte)).collect()
        });
        let mut lines: Vec<&str> = text.split('\n').collect();
        let last = lines.pop().unwrap();
        let crlf = lines.iter().filter(|line| line.ends_with('\r')).count();
        FileFacts {
            size: bytes.len() as u64,
            lines: lines.len() as u64 + u64::from(!last.is_empty()),
            encoding,
            invalid_utf8_at: match encoding {
                Encoding::Binary => Some(valid.unwrap_err().valid_up_to() as u64),
                _ => None,
            },
            line_ending: match (lines.len(), crlf) {
                (0, _) => LineEnding::None,
                (_, 0) => LineEnding::Lf,
                (all, crlf) if all == crlf => LineEnding::Crlf,
                _ => LineEnding::Mixed,
            },
            sha256: Sha256::digest(bytes).into(),
        }
    }

    /// Bytes that mean something at the borders of pieces: marks, sequences of each length, halves of them.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            4 => "[a-z\r\n ]{0,8}".prop_map(String::into_bytes),
            4 => "[äßλ€√𝄞😀\r\n]{0,4}".prop_map(String::into_bytes),
            2 => prop::collection::vec(any::<char>(), 0..4)
                .prop_map(|chars| chars.into_iter().flat_map(|c| c.to_string().into_bytes()).collect()),
            1 => prop::collection::vec(any::<u8>(), 0..5),
            1 => prop::sample::select(vec![
                vec![0xe2], vec![0xe2, 0x82], vec![0xf0, 0x9f], vec![0xf0, 0x9f, 0x98], vec![0x82], vec![0xc0],
                vec![0xed, 0xa0, 0x80], vec![0xf4, 0x90], b"\r".to_vec(), b"\n".to_vec(), vec![0xff],
            ]),
        ]
    }

    /// A text in UTF-16, whole or with a unit or byte too much.
    fn utf16() -> impl Strategy<Value = Vec<u8>> {
        (any::<bool>(), "[a\u{a0d}\u{d0a}ਊ😀\r\n]{0,8}", prop::option::of(any::<u16>()), 0..4u8).prop_map(
            |(big, text, more, odd)| {
                let units = std::iter::once(0xfeff).chain(text.encode_utf16()).chain(more);
                let bytes = |unit: u16| if big { unit.to_be_bytes() } else { unit.to_le_bytes() };
                units.flat_map(bytes).chain((odd == 0).then_some(10)).collect()
            },
        )
    }

    fn file() -> impl Strategy<Value = Vec<u8>> {
        let mark =
            prop::sample::select(vec![vec![], UTF8_MARK.to_vec(), UTF8_MARK[..2].to_vec(), vec![0xff]]);
        let of_pieces = (mark, prop::collection::vec(piece(), 0..12))
            .prop_map(|(mark, pieces)| [mark, pieces.concat()].concat());
        prop_oneof![3 => of_pieces, 1 => utf16()]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal:   R2.11: however a file is cut into pieces, what is found is what the standard library finds in
        ///         the whole of it.
        /// Method: files of pieces that mean something where they are cut; cut anywhere, and into single bytes.
        #[test]
        fn r2_11_pieces_are_analysed_like_the_whole(bytes in file(), cuts in prop::collection::vec(0..200usize, 0..6)) {
            let mut analysis = Analysis::new();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let mut from = 0;
            for to in cuts {
                analysis.push(&bytes[from..to]);
                from = to;
            }
            let expected = oracle(&bytes);
            prop_assert_eq!(&analysis.finish(), &expected);

            let mut analysis = Analysis::new();
            bytes.iter().for_each(|byte| analysis.push(&[*byte]));
            prop_assert_eq!(&analysis.finish(), &expected);
        }
    }

    /// Goal:   line ends are counted right where blocks meet, and beyond what a byte counts to.
    #[test]
    fn r2_11_line_ends_are_counted_across_blocks() {
        for len in [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5000] {
            for text in ["\n", "\r\n", "x\r\n", "\r\n\n"] {
                let bytes: Vec<u8> = text.bytes().cycle().take(len).collect();
                assert_eq!(Analysis::of(&bytes), oracle(&bytes), "{len} of {text:?}");
            }
        }
    }

    fn facts(bytes: &[u8]) -> (u64, Encoding, Option<u64>, LineEnding) {
        let facts = Analysis::of(bytes);
        (facts.lines, facts.encoding, facts.invalid_utf8_at, facts.line_ending)
    }

    /// Goal:   R2.11: what a line is, what an encoding is, and where a file is not UTF-8.
    /// Method: one of each, by hand.
    #[test]
    fn r2_11_lines_encodings_and_line_endings() {
        use Encoding::*;
        use LineEnding::*;
        for (bytes, expected) in [
            (&b""[..], (0, Ascii, Option::None, None)),
            (b"one", (1, Ascii, Option::None, None)),
            (b"one\n", (1, Ascii, Option::None, Lf)),
            (b"one\r\ntwo", (2, Ascii, Option::None, Crlf)),
            (b"one\r\n\ntwo\n", (3, Ascii, Option::None, Mixed)),
            (b"old mac\rlines\r", (1, Ascii, Option::None, None)),
            (b"\n\n", (2, Ascii, Option::None, Lf)),
            (b"nul\0is ascii", (1, Ascii, Option::None, None)),
            ("größer\n".as_bytes(), (1, Utf8, Option::None, Lf)),
            (b"\xef\xbb\xbf", (0, Utf8Bom, Option::None, None)),
            (b"\xef\xbb\xbfa\r\n", (1, Utf8Bom, Option::None, Crlf)),
            (b"\xef\xbb", (1, Binary, Some(0), None)),
            (b"\xef\xbb\xbf\xff\n", (1, Binary, Some(3), Lf)),
            (b"abc\xe2\x82", (1, Binary, Some(3), None)),
            (b"abc\xe2\x82\n\xff", (2, Binary, Some(3), Lf)),
            (b"\xff\xfe", (0, Utf16Le, Option::None, None)),
            (b"\xfe\xff\0a\0\n\0b", (2, Utf16Be, Option::None, Lf)),
            (b"\xff\xfe\x0d\0\x0a\0", (1, Utf16Le, Option::None, Crlf)),
            (b"\xff\xfe\x0a\x0a\x0d\x0a", (1, Utf16Le, Option::None, None)),
            (b"\xff\xfe\x0a\x0a\x0d", (3, Binary, Some(0), Lf)),
            (b"\xff\xfe\0\xd8", (1, Binary, Some(0), None)),
        ] {
            assert_eq!(facts(bytes), expected, "{:?}", bytes.escape_ascii().to_string());
        }
    }

    /// Goal:   the answer is JSON with these names, and the digest that sha256sum(1) prints.
    #[test]
    fn r2_11_facts_as_json() {
        assert_eq!(
            Analysis::of(b"hello\n").to_json(),
            "{\"size\":6,\"lines\":1,\"encoding\":\"ascii\",\"lineEnding\":\"lf\",\
             \"sha256\":\"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03\"}"
        );
        assert_eq!(
            Analysis::of(b"ab\xff\r\n").to_json(),
            "{\"size\":5,\"lines\":1,\"encoding\":\"binary\",\"invalidUtf8At\":2,\"lineEnding\":\"crlf\",\
             \"sha256\":\"413c9c75c466aa62096a33d6978e6f3b43c4de82cb93173e5e40f6c5ab0d7eaf\"}"
        );
        let names = [
            (Encoding::Ascii, "\"ascii\""),
            (Encoding::Utf8, "\"utf-8\""),
            (Encoding::Utf8Bom, "\"utf-8-bom\""),
            (Encoding::Utf16Le, "\"utf-16le\""),
            (Encoding::Utf16Be, "\"utf-16be\""),
            (Encoding::Binary, "\"binary\""),
        ];
        for (encoding, name) in names {
            assert_eq!(serde_json::to_string(&encoding).unwrap(), name);
        }
    }
}

//! Reads JSON value by value: what stands where is asked for, and told where it does not.
//!
//! Trust:  the text may be anything.
//! Bound:  one pass, and one more for each level of a message's own structure (five) where a field has the wrong kind.
//!         Values that are not looked into are passed over without recursion; depth is limited for all.
//! Memory: texts are borrowed unless they have escapes; values that are passed over take none.

use super::error::{DEPTH_MAX, DecodeError, Problem, beginning};
use super::scan::plain_len;
use std::borrow::Cow;

/// What the steps of reading give; boxed, so that the good case is small.
pub(crate) type Step<T> = Result<T, Box<DecodeError>>;

/// A place in a JSON text.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Objects and arrays around this place.
    depth: usize,
    depth_max: usize,
}

impl<'a> Reader<'a> {
    /// At the start of `text`; objects and arrays may be `depth_max` deep, at most [`DEPTH_MAX`].
    pub fn new(text: &'a str, depth_max: usize) -> Self {
        Self { text, at: 0, depth: 0, depth_max: depth_max.min(DEPTH_MAX) }
    }

    /// Reads the whole text with `read`; behind its value is nothing but space.
    pub fn whole<T>(mut self, read: impl FnOnce(&mut Self) -> Step<T>) -> Step<T> {
        let value = read(&mut self)?;
        match self.next() {
            None => Ok(value),
            Some(_) => Err(self.syntax("the end")),
        }
    }

    #[inline]
    fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    /// The next byte that is no space, not taken.
    #[inline]
    fn next(&mut self) -> Option<u8> {
        while let Some(byte) = self.bytes().get(self.at) {
            if !matches!(byte, b' ' | b'\n' | b'\t' | b'\r') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    /// Takes `byte` if it comes next.
    #[inline]
    fn take(&mut self, byte: u8) -> bool {
        let comes = self.next() == Some(byte);
        self.at += usize::from(comes);
        comes
    }

    #[cold]
    fn syntax(&self, expected: &'static str) -> Box<DecodeError> {
        let found = self.text.get(self.at..).and_then(|rest| rest.chars().next());
        DecodeError::at(self.at, Problem::Syntax { expected, found })
    }

    /// Something else than `expected` comes: of another kind, or no JSON.
    #[cold]
    fn mismatch(&mut self, expected: &'static str) -> Box<DecodeError> {
        let found = match self.next() {
            Some(b'"') => "a string",
            Some(b'{') => "an object",
            Some(b'[') => "an array",
            Some(b'-' | b'0'..=b'9') => "a number",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            _ => return self.syntax(expected),
        };
        DecodeError::at(self.at, Problem::Type { expected, found })
    }

    /// Where the next value begins.
    pub fn offset(&mut self) -> usize {
        self.next();
        self.at
    }

    #[inline]
    fn enter(&mut self) -> Step<()> {
        if self.depth == self.depth_max {
            return Err(DecodeError::at(self.at, Problem::Depth { max: self.depth_max }));
        }
        self.at += 1;
        self.depth += 1;
        Ok(())
    }

    /// Reads an object: `field` is called at each value, with its key, and reads or skips it.
    #[inline]
    pub fn object(
        &mut self,
        expected: &'static str,
        mut field: impl FnMut(&mut Self, &str) -> Step<()>,
    ) -> Step<()> {
        if self.next() != Some(b'{') {
            return Err(self.mismatch(expected));
        }
        self.enter()?;
        if !self.take(b'}') {
            loop {
                let key = self.key()?;
                field(self, &key)?;
                if self.take(b'}') {
                    break;
                }
                if !self.take(b',') {
                    return Err(self.syntax("`,` or `}`"));
                }
            }
        }
        self.depth -= 1;
        Ok(())
    }

    /// Reads an array of what `element` reads.
    #[inline]
    pub fn array<T>(
        &mut self,
        expected: &'static str,
        mut element: impl FnMut(&mut Self) -> Step<T>,
    ) -> Step<Vec<T>> {
        if self.next() != Some(b'[') {
            return Err(self.mismatch(expected));
        }
        self.enter()?;
        let mut elements = Vec::new();
        if !self.take(b']') {
            loop {
                elements.push(element(self).map_err(|e| e.in_element(elements.len()))?);
                if self.take(b']') {
                    break;
                }
                if !self.take(b',') {
                    return Err(self.syntax("`,` or `]`"));
                }
            }
        }
        self.depth -= 1;
        Ok(elements)
    }

    /// A key and its colon. A lone surrogate in it is no error: no field that is known has one.
    #[inline]
    fn key(&mut self) -> Step<Cow<'a, str>> {
        if self.next() != Some(b'"') {
            return Err(self.syntax("a key in quotes"));
        }
        let key = self.quoted(true)?;
        if !self.take(b':') {
            return Err(self.syntax("`:`"));
        }
        Ok(key)
    }

    /// A text.
    #[inline]
    pub fn string(&mut self) -> Step<Cow<'a, str>> {
        if self.next() != Some(b'"') {
            return Err(self.mismatch("a string"));
        }
        self.quoted(false)
    }

    /// What stands between quotes, the first of which is next.
    #[inline]
    fn quoted(&mut self, lossy: bool) -> Step<Cow<'a, str>> {
        let start = self.at + 1;
        let end = start + plain_len(&self.bytes()[start..]);
        self.at = end;
        if self.bytes().get(end) == Some(&b'"') {
            self.at += 1;
            return Ok(Cow::Borrowed(&self.text[start..end]));
        }
        self.unescaped(start, lossy).map(Cow::Owned)
    }

    /// The rest of a text that began at `start` and is plain up to here.
    fn unescaped(&mut self, start: usize, lossy: bool) -> Step<String> {
        let mut text = String::with_capacity((self.at - start) * 2 + 32);
        let mut plain = start;
        loop {
            text.push_str(&self.text[plain..self.at]);
            match self.bytes().get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => text.push(self.escape(lossy)?),
                _ => return Err(self.syntax("a character, or `\"` at the end of the string,")),
            }
            plain = self.at;
            self.at += plain_len(&self.bytes()[plain..]);
        }
        self.at += 1;
        Ok(text)
    }

    /// The character of the escape that is next.
    fn escape(&mut self, lossy: bool) -> Step<char> {
        let begin = self.at;
        self.at += 1;
        let char = match self.bytes().get(self.at) {
            Some(b'n') => '\n',
            Some(byte @ (b'"' | b'\\' | b'/')) => char::from(*byte),
            Some(b't') => '\t',
            Some(b'r') => '\r',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'u') => {
                self.at += 1;
                return self.unit(begin, lossy);
            }
            _ => return Err(self.syntax("one of `\"\\/bfnrtu` behind a backslash")),
        };
        self.at += 1;
        Ok(char)
    }

    /// The character that the four digits which are next begin: alone, or with the escape behind them.
    fn unit(&mut self, begin: usize, lossy: bool) -> Step<char> {
        let first = self.digits()?;
        if let Some(char) = char::from_u32(u32::from(first)) {
            return Ok(char);
        }
        let behind = self.at;
        if first < 0xdc00 && self.bytes()[behind..].starts_with(b"\\u") {
            self.at += 2;
            let second = self.digits()?;
            if (0xdc00..0xe000).contains(&second) {
                let both = 0x10000 + (u32::from(first - 0xd800) << 10) + u32::from(second - 0xdc00);
                return Ok(char::from_u32(both).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            self.at = behind;
        }
        match lossy {
            true => Ok(char::REPLACEMENT_CHARACTER),
            false => Err(DecodeError::at(begin, Problem::LoneSurrogate { unit: first })),
        }
    }

    /// Four hexadecimal digits.
    fn digits(&mut self) -> Step<u16> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self.bytes().get(self.at).and_then(|byte| char::from(*byte).to_digit(16));
            let Some(digit) = digit else { return Err(self.syntax("a hexadecimal digit")) };
            unit = unit << 4 | digit as u16;
            self.at += 1;
        }
        Ok(unit)
    }

    /// A number as JavaScript has it. `null` is what `JSON.stringify` writes for NaN and the infinities: it is NaN.
    pub fn number(&mut self) -> Step<f64> {
        match self.next() {
            Some(b'-' | b'0'..=b'9') => {
                let start = self.at;
                self.skip_number()?;
                // JSON's grammar of numbers is part of Rust's; what is too large for f64 is infinite, as in JavaScript.
                Ok(self.text[start..self.at].parse().unwrap_or(f64::NAN))
            }
            Some(b'n') => self.literal("null").map(|()| f64::NAN),
            _ => Err(self.mismatch("a number")),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self) -> Step<bool> {
        match self.next() {
            Some(b't') => self.literal("true").map(|()| true),
            Some(b'f') => self.literal("false").map(|()| false),
            _ => Err(self.mismatch("a boolean")),
        }
    }

    /// What `read` reads, or nothing for `null`.
    pub fn nullable<T>(&mut self, read: impl FnOnce(&mut Self) -> Step<T>) -> Step<Option<T>> {
        match self.next() {
            Some(b'n') => self.literal("null").map(|()| None),
            _ => read(self).map(Some),
        }
    }

    /// One of the words that `meaning` knows.
    pub fn word<T>(&mut self, expected: &'static str, meaning: impl FnOnce(&str) -> Option<T>) -> Step<T> {
        let offset = self.offset();
        if self.next() != Some(b'"') {
            return Err(self.mismatch(expected));
        }
        let word = self.string()?;
        meaning(&word)
            .ok_or_else(|| DecodeError::at(offset, Problem::Word { expected, found: beginning(&word) }))
    }

    /// Any value, as the text that it is.
    pub fn raw(&mut self) -> Step<&'a str> {
        let start = self.offset();
        self.skip_value()?;
        Ok(&self.text[start..self.at])
    }

    /// Passes over any value.
    pub fn skip_value(&mut self) -> Step<()> {
        let outside = self.depth;
        let mut objects = Nest::default();
        loop {
            match self.next() {
                Some(b'"') => self.skip_string()?,
                Some(b'-' | b'0'..=b'9') => self.skip_number()?,
                Some(b'{') => {
                    self.enter()?;
                    objects.set(self.depth, true);
                    if !self.take(b'}') {
                        self.skip_key()?;
                        continue;
                    }
                    self.depth -= 1;
                }
                Some(b'[') => {
                    self.enter()?;
                    objects.set(self.depth, false);
                    if !self.take(b']') {
                        continue;
                    }
                    self.depth -= 1;
                }
                Some(b't') => self.literal("true")?,
                Some(b'f') => self.literal("false")?,
                Some(b'n') => self.literal("null")?,
                _ => return Err(self.syntax("a value")),
            }
            if !self.skip_ends(outside, &objects)? {
                return Ok(());
            }
        }
    }

    /// Passes over what is behind a value, up to the next one; `false` if none comes inside of depth `outside`.
    #[inline]
    fn skip_ends(&mut self, outside: usize, objects: &Nest) -> Step<bool> {
        while self.depth > outside {
            let in_object = objects.get(self.depth);
            match self.next() {
                Some(b',') => {
                    self.at += 1;
                    if in_object {
                        self.skip_key()?;
                    }
                    return Ok(true);
                }
                Some(b'}') if in_object => {}
                Some(b']') if !in_object => {}
                _ if in_object => return Err(self.syntax("`,` or `}`")),
                _ => return Err(self.syntax("`,` or `]`")),
            }
            self.at += 1;
            self.depth -= 1;
        }
        Ok(false)
    }

    #[inline]
    fn skip_key(&mut self) -> Step<()> {
        if self.next() != Some(b'"') {
            return Err(self.syntax("a key in quotes"));
        }
        self.skip_string()?;
        match self.take(b':') {
            true => Ok(()),
            false => Err(self.syntax("`:`")),
        }
    }

    /// Passes over a string, the quote of which is next. Lone surrogates are as good as others.
    #[inline]
    fn skip_string(&mut self) -> Step<()> {
        self.at += 1;
        loop {
            self.at += plain_len(&self.bytes()[self.at..]);
            match self.bytes().get(self.at) {
                Some(b'"') => break,
                Some(b'\\') => self.skip_escape()?,
                _ => return Err(self.syntax("a character, or `\"` at the end of the string,")),
            }
        }
        self.at += 1;
        Ok(())
    }

    fn skip_escape(&mut self) -> Step<()> {
        self.at += 1;
        match self.bytes().get(self.at) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') => {
                self.at += 1;
                self.digits()?;
            }
            _ => return Err(self.syntax("one of `\"\\/bfnrtu` behind a backslash")),
        }
        Ok(())
    }

    fn skip_number(&mut self) -> Step<()> {
        self.at += usize::from(self.bytes().get(self.at) == Some(&b'-'));
        match self.bytes().get(self.at) {
            Some(b'0') => self.at += 1,
            _ => self.skip_digits()?,
        }
        if self.bytes().get(self.at) == Some(&b'.') {
            self.at += 1;
            self.skip_digits()?;
        }
        if let Some(b'e' | b'E') = self.bytes().get(self.at) {
            self.at += 1;
            self.at += usize::from(matches!(self.bytes().get(self.at), Some(b'+' | b'-')));
            self.skip_digits()?;
        }
        Ok(())
    }

    /// One digit or more.
    fn skip_digits(&mut self) -> Step<()> {
        let start = self.at;
        while self.bytes().get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
        if self.at == start {
            return Err(self.syntax("a digit"));
        }
        Ok(())
    }

    fn literal(&mut self, word: &'static str) -> Step<()> {
        if !self.bytes()[self.at..].starts_with(word.as_bytes()) {
            return Err(self.syntax("a value"));
        }
        self.at += word.len();
        Ok(())
    }
}

/// Which of the levels around a place are objects; the others are arrays.
struct Nest([u64; DEPTH_MAX.div_ceil(64)]);

impl Default for Nest {
    fn default() -> Self {
        Self([0; DEPTH_MAX.div_ceil(64)])
    }
}

impl Nest {
    /// `depth` is 1 or more.
    #[inline]
    fn set(&mut self, depth: usize, object: bool) {
        let (word, bit) = ((depth - 1) / 64, (depth - 1) % 64);
        self.0[word] = self.0[word] & !(1 << bit) | u64::from(object) << bit;
    }

    #[inline]
    fn get(&self, depth: usize) -> bool {
        self.0[(depth - 1) / 64] >> ((depth - 1) % 64) & 1 == 1
    }
}

/// A field of an object that is being read. As in `JSON.parse`, the last one of a name counts, and no other.
#[derive(Debug)]
pub(crate) enum Field<T> {
    Absent,
    Read(T),
    /// It is there and of the wrong kind.
    Wrong(Box<DecodeError>),
}

impl<T> Field<T> {
    /// Reads the value that is next.
    #[inline]
    pub fn read<'a>(
        &mut self,
        reader: &mut Reader<'a>,
        name: &'static str,
        read: impl FnOnce(&mut Reader<'a>) -> Step<T>,
    ) -> Step<()> {
        let (at, depth) = (reader.at, reader.depth);
        match read(reader) {
            Ok(value) => *self = Self::Read(value),
            Err(error) => {
                let error = error.in_field(name);
                if !error.is_about_kind() {
                    return Err(error);
                }
                // The same name may come again, with a value of the right kind.
                (reader.at, reader.depth) = (at, depth);
                reader.skip_value().map_err(|e| e.in_field(name))?;
                *self = Self::Wrong(error);
            }
        }
        Ok(())
    }

    /// The value of a field that must be there, in the object at `offset`.
    #[inline]
    pub fn required(self, name: &'static str, expected: &'static str, offset: usize) -> Step<T> {
        match self {
            Self::Read(value) => Ok(value),
            Self::Wrong(error) => Err(error),
            Self::Absent => Err(DecodeError::at(offset, Problem::Missing { expected }).in_field(name)),
        }
    }
}

impl<T> Field<Option<T>> {
    /// The value of a field that may be absent, or `null`.
    #[inline]
    pub fn optional(self) -> Step<Option<T>> {
        match self {
            Self::Read(value) => Ok(value),
            Self::Wrong(error) => Err(error),
            Self::Absent => Ok(None),
        }
    }
}

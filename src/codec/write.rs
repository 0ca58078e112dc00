//! Writes JSON as `JSON.stringify` writes it.

use super::scan::plain_len;

/// An object that is being written: fields in the order of the calls.
#[derive(Debug)]
pub(crate) struct Object<'o> {
    out: &'o mut Vec<u8>,
    /// What stands before the next key.
    before: u8,
}

impl<'o> Object<'o> {
    pub fn begin(out: &'o mut Vec<u8>) -> Self {
        Self { out, before: b'{' }
    }

    /// The place of the value of field `key`, which needs no escapes.
    #[inline]
    pub fn field(&mut self, key: &'static str) -> &mut Vec<u8> {
        self.out.reserve(key.len() + 4);
        self.out.extend_from_slice(&[self.before, b'"']);
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
        self.before = b',';
        self.out
    }

    pub fn end(self) {
        if self.before == b'{' {
            self.out.push(b'{');
        }
        self.out.push(b'}');
    }
}

/// An array of what `element` writes.
#[inline]
pub(crate) fn array<T>(out: &mut Vec<u8>, elements: &[T], mut element: impl FnMut(&mut Vec<u8>, &T)) {
    out.push(b'[');
    for (i, each) in elements.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        element(out, each);
    }
    out.push(b']');
}

/// A string. Only what JSON demands is escaped, in the shortest way, and hexadecimal digits are small.
#[inline]
pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
    let mut rest = text.as_bytes();
    out.reserve(rest.len() + 2);
    out.push(b'"');
    loop {
        let (plain, behind) = rest.split_at(plain_len(rest));
        out.extend_from_slice(plain);
        let Some((special, behind)) = behind.split_first() else { break };
        escape(out, *special);
        rest = behind;
    }
    out.push(b'"');
}

fn escape(out: &mut Vec<u8>, special: u8) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let letter = match special {
        b'\n' => b'n',
        b'\t' => b't',
        b'\r' => b'r',
        0x08 => b'b',
        0x0c => b'f',
        b'"' | b'\\' => special,
        _ => {
            let digits = [DIGITS[usize::from(special >> 4)], DIGITS[usize::from(special & 15)]];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&digits);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', letter]);
}

/// A number as JavaScript prints it: the shortest digits that are this number, `0` for -0, `null` for NaN and the
/// infinities.
pub(crate) fn number(out: &mut Vec<u8>, number: f64) {
    if !number.is_finite() {
        return out.extend_from_slice(b"null");
    }
    out.extend_from_slice(ryu_js::Buffer::new().format_finite(number).as_bytes());
}

pub(crate) fn boolean(out: &mut Vec<u8>, boolean: bool) {
    out.extend_from_slice(if boolean { b"true" } else { b"false" });
}

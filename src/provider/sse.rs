//! Server-sent events, read from bytes as they come; sans-I/O.
//!
//! Trust:  the server may send anything. Lines and events are bounded, whatever it sends.
//! Bound:  one pass over the bytes; memory for one line and one event.
//! Source: <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>, except that
//!         bytes which are no UTF-8 are an error and not replaced (trap 16).

/// Longest line, bytes, unless told otherwise.
pub const LINE_MAX: usize = 256 << 10;
/// Longest data of one event, bytes, unless told otherwise.
pub const EVENT_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SseEvent {
    /// Its type; empty where none was given, which means `message`.
    pub name: String,
    /// Its data, lines joined with a line feed.
    pub data: String,
}

/// Why a stream of events cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    /// A line without end.
    #[error("a line of events is longer than {max} bytes")]
    LineTooLong {
        /// The limit.
        max: usize,
    },
    /// An event without end.
    #[error("an event is longer than {max} bytes")]
    EventTooLong {
        /// The limit.
        max: usize,
    },
    /// Data that is no text.
    #[error("an event is no UTF-8 from byte {at} of its line on")]
    NotUtf8 {
        /// Where.
        at: usize,
    },
}

/// Reads events from bytes that come in pieces of any length.
#[derive(Debug)]
pub struct SseParser {
    line_max: usize,
    event_max: usize,
    /// The line so far, if it was not whole in the piece before.
    line: Vec<u8>,
    event: SseEvent,
    has_data: bool,
    /// The last byte was a carriage return: a line feed right behind it belongs to it.
    after_return: bool,
    /// No line has been read yet.
    at_start: bool,
}

impl Default for SseParser {
    fn default() -> Self {
        Self::new(LINE_MAX, EVENT_MAX)
    }
}

impl SseParser {
    /// A parser with these limits, bytes.
    pub fn new(line_max: usize, event_max: usize) -> Self {
        Self {
            line_max,
            event_max,
            line: Vec::new(),
            event: SseEvent::default(),
            has_data: false,
            after_return: false,
            at_start: true,
        }
    }

    /// Reads the next piece and appends the events that it completes to `events`.
    ///
    /// # Errors
    ///
    /// [`SseError`]; events before the fault have been appended, and the parser is of no further use.
    pub fn feed(&mut self, mut bytes: &[u8], events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        if !bytes.is_empty() && std::mem::take(&mut self.after_return) {
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let (line, ending) = bytes.split_at(end);
            bytes = self.skip_ending(ending);
            if self.line.is_empty() {
                self.whole_line(line, events)?;
            } else {
                self.keep(line)?;
                let line = std::mem::take(&mut self.line);
                self.whole_line(&line, events)?;
            }
        }
        self.keep(bytes)
    }

    /// What is behind a line's end, which `bytes` begin with.
    fn skip_ending<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        match bytes {
            [b'\r'] => {
                self.after_return = true;
                &[]
            }
            [b'\r', b'\n', rest @ ..] | [_, rest @ ..] => rest,
            [] => bytes,
        }
    }

    fn keep(&mut self, piece: &[u8]) -> Result<(), SseError> {
        self.fits(self.line.len() + piece.len())?;
        self.line.extend_from_slice(piece);
        Ok(())
    }

    fn fits(&self, len: usize) -> Result<(), SseError> {
        if len > self.line_max { Err(SseError::LineTooLong { max: self.line_max }) } else { Ok(()) }
    }

    /// What the end of the bytes left unfinished: `None`, or an event that no empty line has ended.
    ///
    /// # Errors
    ///
    /// [`SseError`], if the last line, whose end is missing, cannot be read.
    pub fn finish(mut self) -> Result<Option<SseEvent>, SseError> {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() {
            self.field(&line)?;
        }
        Ok((self.has_data || !line.is_empty()).then_some(self.event))
    }

    fn whole_line(&mut self, line: &[u8], events: &mut Vec<SseEvent>) -> Result<(), SseError> {
        self.fits(line.len())?;
        if !line.is_empty() {
            return self.field(line);
        }
        self.at_start = false;
        let event = std::mem::take(&mut self.event);
        if std::mem::take(&mut self.has_data) {
            events.push(event);
        }
        Ok(())
    }

    fn field(&mut self, line: &[u8]) -> Result<(), SseError> {
        let line = match std::mem::take(&mut self.at_start) {
            true => line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line),
            false => line,
        };
        let colon = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let (name, value) = line.split_at(colon);
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => self.data(text(value, line.len() - value.len())?),
            b"event" => {
                self.event.name = text(value, line.len() - value.len())?.to_owned();
                Ok(())
            }
            // Comments, ids, times to reconnect after, and what is not known.
            _ => Ok(()),
        }
    }

    fn data(&mut self, value: &str) -> Result<(), SseError> {
        let separator = if self.has_data { "\n" } else { "" };
        if self.event.data.len() + separator.len() + value.len() > self.event_max {
            return Err(SseError::EventTooLong { max: self.event_max });
        }
        self.has_data = true;
        self.event.data.push_str(separator);
        self.event.data.push_str(value);
        Ok(())
    }
}

fn text(value: &[u8], before: usize) -> Result<&str, SseError> {
    std::str::from_utf8(value).map_err(|fault| SseError::NotUtf8 { at: before + fault.valid_up_to() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Read = (Vec<SseEvent>, Result<Option<SseEvent>, SseError>);

    /// Feeds `bytes` in pieces that end at `cuts`.
    fn read(bytes: &[u8], cuts: &[usize]) -> Read {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let (mut parser, mut events) = (SseParser::new(64, 100), Vec::new());
        for piece in cuts.windows(2) {
            if let Err(error) = parser.feed(&bytes[piece[0]..piece[1]], &mut events) {
                return (events, Err(error));
            }
        }
        (events, parser.finish())
    }

    fn event(name: &str, data: &str) -> SseEvent {
        SseEvent { name: name.into(), data: data.into() }
    }

    /// Goal:   the cases of the specification, and ours.
    #[test]
    fn r2_7_events_are_read() {
        let cases: [(&str, &[SseEvent]); 10] = [
            ("data: a\n\ndata: b\n\n", &[event("", "a"), event("", "b")]),
            ("data: a\r\n\r\ndata:b\r\rdata: c\n\r\n", &[event("", "a"), event("", "b"), event("", "c")]),
            ("data: YHOO\ndata: +2\ndata: 10\n\n", &[event("", "YHOO\n+2\n10")]),
            (": comment\n\ndata:  two spaces\nid: 1\nretry: 5\n\n", &[event("", " two spaces")]),
            ("data\n\ndata\ndata\n\n", &[event("", ""), event("", "\n")]),
            ("event: error\ndata: x\n\nevent: lost\n\ndata: y\n\n", &[event("error", "x"), event("", "y")]),
            ("\u{feff}data: bom\n\n", &[event("", "bom")]),
            ("data: one\n\n\u{feff}data: no field\n\n", &[event("", "one")]),
            ("data: {\"a\":\"ü😀\"}\n\n", &[event("", "{\"a\":\"ü😀\"}")]),
            ("nonsense\ndata: [DONE]\n\n", &[event("", "[DONE]")]),
        ];
        for (bytes, expected) in cases {
            assert_eq!(read(bytes.as_bytes(), &[]), (expected.to_vec(), Ok(None)), "{bytes:?}");
        }
    }

    /// Goal:   what is cut off is told, and is no event.
    #[test]
    fn r2_7_half_an_event_is_told() {
        assert_eq!(read(b"data: a\n\ndata: b", &[]), (vec![event("", "a")], Ok(Some(event("", "b")))));
        assert_eq!(read(b"data: b\n", &[]), (vec![], Ok(Some(event("", "b")))));
        assert_eq!(read(b"data: b\n\nda", &[]), (vec![event("", "b")], Ok(Some(event("", "")))));
    }

    /// Goal:   S12: no line and no event grows without end, and what is no text is told with its place.
    #[test]
    fn r2_7_s12_lines_and_events_are_bounded() {
        let long = format!("data: {}", "x".repeat(58));
        assert_eq!(read(format!("{long}\n\n").as_bytes(), &[]).0.len(), 1);
        assert_eq!(read(format!("{long}x\n\n").as_bytes(), &[]).1, Err(SseError::LineTooLong { max: 64 }));
        assert_eq!(read(format!("{long}x").as_bytes(), &[]).1, Err(SseError::LineTooLong { max: 64 }));
        let two = format!("{long}\n{long}\n\n");
        assert_eq!(read(two.as_bytes(), &[]).1, Err(SseError::EventTooLong { max: 100 }));
        assert_eq!(read(b"data: a\xff\n\n", &[]).1, Err(SseError::NotUtf8 { at: 7 }));
        assert_eq!(read(b":\xff\ndata: a\n\n", &[]).0, [event("", "a")]);
    }

    fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
        let tokens: [&[u8]; 14] = [
            b"data: ",
            b"data",
            b"event: e",
            b":",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            "ü😀".as_bytes(),
            "\u{feff}".as_bytes(),
            b"\xff",
            b" ",
            b"{}",
            b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ];
        let token = prop::sample::select(tokens.to_vec());
        prop::collection::vec(token, 0..24).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        /// Goal:   the same events however the bytes are split.
        #[test]
        fn r2_7_the_same_events_however_the_bytes_are_split(
            bytes in some_bytes(),
            cuts in prop::collection::vec(0usize..1000, 0..12),
        ) {
            let whole = read(&bytes, &[]);
            let single: Vec<usize> = (0..bytes.len()).collect();
            prop_assert_eq!(&read(&bytes, &cuts), &whole);
            prop_assert_eq!(&read(&bytes, &single), &whole);
        }
    }
}

//! Server-sent events from a provider, whatever it sends and however the network splits it.
//!
//! The first bytes of the input choose the limits and where the rest is split, the rest is what is sent.
//!
//! Asserted: nothing panics; the same events, the same end and the same fault come whether the bytes come at once, one by
//! one, or split anywhere; no event is longer than its limit; an event, written again, is read as itself; a second, plainer
//! reader of the same bytes finds the same events.
#![no_main]

use doorbell::provider::sse::{SseError, SseEvent, SseParser};
use libfuzzer_sys::fuzz_target;

type Read = (Vec<SseEvent>, Result<Option<SseEvent>, SseError>);

fn read<'a>(limits: (usize, usize), pieces: impl Iterator<Item = &'a [u8]>) -> Read {
    let (mut parser, mut events) = (SseParser::new(limits.0, limits.1), Vec::new());
    for piece in pieces {
        if let Err(error) = parser.feed(piece, &mut events) {
            return (events, Err(error));
        }
    }
    (events, parser.finish())
}

/// Events of a text without limits, line by line, as the specification tells it.
fn plainly(text: &str) -> Vec<SseEvent> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let (mut events, mut name, mut data) = (Vec::new(), String::new(), None::<String>);
    let mut lines: Vec<&str> = text.split('\n').collect();
    lines.pop(); // What no line end has ended is no line.
    for line in lines {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                let name = std::mem::take(&mut name);
                events.extend(data.take().map(|data| SseEvent { name, data }));
            }
            "event" => name = value.into(),
            "data" => data = Some(data.map_or_else(|| value.into(), |data| format!("{data}\n{value}"))),
            _ => {}
        }
    }
    events
}

fn written(event: &SseEvent) -> String {
    let lines: String = event.data.split('\n').map(|line| format!("data: {line}\n")).collect();
    format!("event: {}\n{lines}\n", event.name)
}

fuzz_target!(|input: &[u8]| {
    let Some((head, bytes)) = input.split_first_chunk::<4>() else { return };
    let limits =
        if head[0] & 1 == 0 { (1 << 20, 1 << 20) } else { (usize::from(head[0]), usize::from(head[1])) };
    let whole = read(limits, std::iter::once(bytes));
    assert_eq!(read(limits, bytes.chunks(1)), whole);
    assert_eq!(read(limits, bytes.chunks(usize::from(head[2]) + 1)), whole);
    let (first, second) = bytes.split_at(usize::from(head[3]).min(bytes.len()));
    assert_eq!(read(limits, [first, second].into_iter()), whole);

    for event in &whole.0 {
        assert!(event.data.len() <= limits.1 && event.name.len() <= limits.0);
        let again = read((usize::MAX, usize::MAX), std::iter::once(written(event).as_bytes()));
        assert_eq!(again, (vec![event.clone()], Ok(None)));
    }
    if let (Ok(text), Ok(_), 0) = (std::str::from_utf8(bytes), &whole.1, head[0] & 1) {
        assert_eq!(plainly(text), whole.0);
    }
});

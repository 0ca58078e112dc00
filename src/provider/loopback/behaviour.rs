//! What a model's name asks of the loopback.

use crate::provider::LoopbackConfig;

/// How one answer is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Behaviour {
    pub chunks_per_second: f64,
    pub chunk_bytes: usize,
    /// So many numbered chunks instead of the last message.
    pub chunks: Option<u64>,
    pub is_stamped: bool,
    pub reasons: bool,
    pub calls_all_tools: bool,
    pub is_slow: bool,
    pub hangs: bool,
    pub stops: bool,
    pub breaks_off: bool,
    pub failure: Option<Failure>,
}

/// How it fails before the first chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    Error,
    Unavailable,
    Unauthorized,
    Limited,
    BadRequest,
    Garbage,
    Unknown,
    Overloaded,
}

impl Behaviour {
    /// What `model` asks for; `None` if it has a word that means nothing. Names that do not begin with `loopback-` have no
    /// words.
    pub fn of(model: &str, config: &LoopbackConfig) -> Option<Self> {
        let mut behaviour = Self {
            chunks_per_second: config.chunks_per_second,
            chunk_bytes: config.chunk_bytes.max(1),
            chunks: None,
            is_stamped: false,
            reasons: false,
            calls_all_tools: false,
            is_slow: false,
            hangs: false,
            stops: false,
            breaks_off: false,
            failure: None,
        };
        let mut words = model.strip_prefix("loopback-").into_iter().flat_map(|words| words.split('-'));
        while let Some(word) = words.next() {
            behaviour.apply(word, &mut words)?;
        }
        Some(behaviour)
    }

    fn apply<'a>(&mut self, word: &str, words: &mut impl Iterator<Item = &'a str>) -> Option<()> {
        match word {
            "fast" => self.chunks_per_second = 0.0,
            "pace" => self.chunks_per_second = number(words, 1_000_000)? as f64,
            "size" => self.chunk_bytes = usize::try_from(number(words, 1 << 20)?).ok()?.max(1),
            "chunks" => self.chunks = Some(number(words, u64::MAX)?),
            "stamped" => self.is_stamped = true,
            "reasoning" => self.reasons = true,
            "tools" => self.calls_all_tools = true,
            "slow" => self.is_slow = true,
            "hang" => self.hangs = true,
            "stall" => self.stops = true,
            "cut" => self.breaks_off = true,
            failure => self.failure = Some(Failure::of(failure)?),
        }
        Some(())
    }
}

impl Failure {
    fn of(word: &str) -> Option<Self> {
        Some(match word {
            "error" => Self::Error,
            "unavailable" => Self::Unavailable,
            "unauthorized" => Self::Unauthorized,
            "limited" => Self::Limited,
            "badrequest" => Self::BadRequest,
            "garbage" => Self::Garbage,
            "unknown" => Self::Unknown,
            "overloaded" => Self::Overloaded,
            _ => return None,
        })
    }
}

fn number<'a>(words: &mut impl Iterator<Item = &'a str>, max: u64) -> Option<u64> {
    words.next()?.parse().ok().filter(|number| *number <= max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal:   words change the behaviour, and what is no word makes the model unknown.
    #[test]
    fn r2_7_words_of_a_model_change_the_loopback() {
        let config = LoopbackConfig::default();
        let of = |model| Behaviour::of(model, &config);
        let plain = of("loopback").unwrap();
        assert_eq!(of("gpt-4o-mini"), Some(plain.clone()));
        let fast = Behaviour { chunks_per_second: 0.0, chunks: Some(7), ..plain.clone() };
        assert_eq!(of("loopback-fast-chunks-7"), Some(fast));
        let limited = Behaviour { failure: Some(Failure::Limited), is_slow: true, ..plain };
        assert_eq!(of("loopback-slow-limited"), Some(limited));
        for unknown in
            ["loopback-", "loopback-x", "loopback-pace", "loopback-pace-x", "loopback-pace-1000001"]
        {
            assert_eq!(of(unknown), None, "{unknown}");
        }
    }
}

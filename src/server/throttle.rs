//! At most so many log lines a second, however many faults clients make (F30).

use crate::protocol::rendezvous::monotonic_ns;

const LINES_PER_SECOND: u32 = 10;
const SECOND_NS: u64 = 1_000_000_000;

/// Lets the first [`LINES_PER_SECOND`] lines of each second through and counts the others.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    second_began_ns: u64,
    lines: u32,
    suppressed: u64,
}

impl Throttle {
    /// Writes a line, unless there were too many.
    pub fn warn(&mut self, line: impl FnOnce()) {
        if self.admit(monotonic_ns()) {
            line();
        }
    }

    fn admit(&mut self, now_ns: u64) -> bool {
        if now_ns.wrapping_sub(self.second_began_ns) >= SECOND_NS {
            if self.suppressed > 0 {
                tracing::warn!(lines = self.suppressed, "log lines suppressed");
            }
            *self = Self { second_began_ns: now_ns, lines: 0, suppressed: 0 };
        }
        self.lines += 1;
        let admitted = self.lines <= LINES_PER_SECOND;
        self.suppressed += u64::from(!admitted);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f30_a_flood_of_lines_is_cut_to_ten_a_second() {
        let mut throttle = Throttle::default();
        let admitted = |throttle: &mut Throttle, now| (0..1000).filter(|_| throttle.admit(now)).count();
        assert_eq!(admitted(&mut throttle, SECOND_NS), 10);
        assert_eq!(admitted(&mut throttle, SECOND_NS + 5), 0);
        assert_eq!(admitted(&mut throttle, 2 * SECOND_NS), 10);
    }
}

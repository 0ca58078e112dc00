//! What a reactor does about a lane whose client rings although there is nothing to do (F24). Sans-I/O.
//!
//! Rule:   after 16 wakes in a row without an entry the lane is left alone, neither polled nor armed, for 1 ms, then
//!         2, 4, 8, 16 ms as long as that goes on; its calls wait meanwhile. Any entry ends the storm. A storm
//!         that outlasts the server's patience ends the session.

/// Wakes in a row without work before a lane is left alone.
const EMPTY_WAKES: u8 = 16;
/// The first pause.
const PAUSE_NS: u64 = 1_000_000;
/// Doublings of it, at most.
const DOUBLINGS: u8 = 4;

/// What to do with a lane that has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Arm its bell.
    Arm,
    /// Leave it alone until then.
    RestUntil(u64),
    /// End its session.
    End(Abuse),
}

/// A storm that lasted too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abuse {
    pub lasted_ns: u64,
}

/// What one lane's client has rung for.
#[derive(Debug, Default)]
pub(crate) struct Storm {
    empty_wakes: u8,
    pauses: u8,
    began_ns: u64,
}

impl Storm {
    /// The lane has done something since it was woken.
    pub fn worked(&mut self) {
        *self = Self::default();
    }

    /// The lane was woken, or kept awake, and there was nothing to do. `now_ns` is asked only in a storm.
    pub fn woken_for_nothing(&mut self, now_ns: impl FnOnce() -> u64, patience_ns: u64) -> Next {
        self.empty_wakes += 1;
        if self.empty_wakes < EMPTY_WAKES {
            return Next::Arm;
        }
        self.empty_wakes = 0;
        let now = now_ns();
        if self.pauses == 0 {
            self.began_ns = now;
        }
        let lasted_ns = now - self.began_ns;
        if lasted_ns >= patience_ns {
            return Next::End(Abuse { lasted_ns });
        }
        let pause = PAUSE_NS << self.pauses.min(DOUBLINGS);
        self.pauses = self.pauses.saturating_add(1);
        Next::RestUntil(now + pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Goal:   F24: 16 empty wakes, then pauses of 1 to 16 ms, then the end; work in between forgives all.
    /// Method: time by hand.
    #[test]
    fn f24_a_storm_is_damped_by_doubling_pauses_and_ended_at_last() {
        let mut storm = Storm::default();
        let mut now = 5 * MS;
        let rest = |storm: &mut Storm, now: &mut u64| loop {
            match storm.woken_for_nothing(|| *now, 100 * MS) {
                Next::Arm => {}
                Next::RestUntil(until) => {
                    let pause = until - *now;
                    *now = until;
                    return Ok(pause);
                }
                Next::End(abuse) => return Err(abuse),
            }
        };
        for _ in 0..EMPTY_WAKES - 1 {
            assert_eq!(storm.woken_for_nothing(|| unreachable!("no clock before a storm"), MS), Next::Arm);
        }
        storm.worked();
        for pause in [1, 2, 4, 8, 16, 16, 16, 16, 16] {
            assert_eq!(rest(&mut storm, &mut now), Ok(pause * MS));
        }
        assert_eq!(rest(&mut storm, &mut now), Ok(16 * MS));
        assert_eq!(rest(&mut storm, &mut now), Err(Abuse { lasted_ns: 111 * MS }));
        storm.worked();
        assert_eq!(rest(&mut storm, &mut now), Ok(MS));
    }
}

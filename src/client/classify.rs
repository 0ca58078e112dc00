//! What became of the calls of a session that is over, and what is to be done about each (FAULTS §5). Sans-I/O: what the
//! session left goes in, a verdict comes out.
//!
//! Proof:  a server publishes the position of an entry before it runs it, and shared memory outlives the server. So a
//!         call whose entry lies at or behind the published position has not been run, and never will be if nobody is
//!         left who could take it.
//! Doubt:  a reactor that lives may still take entries of a session whose end another one has announced. The home
//!         reactor lets go of its own lane before it says so; each other one takes its lane out of the directory when it
//!         does, and of a lane that is still there nothing can be told.

/// Who says that the session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Witness {
    /// The kernel: the socket broke, which it does when the last thread of the server has gone.
    Kernel,
    /// The home reactor of a server that lives.
    Server,
}

/// What a session that is over has left of a call whose end nobody has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Remains {
    /// The completion that ends it has come.
    pub completed: bool,
    /// Where its first entry lies in its ring; `None` if that was never published.
    pub position: Option<u64>,
    /// Entries of that ring below this position have been taken, as far as the server has published.
    pub taken: u64,
    /// It went to the home reactor, or to another one that has let go of its lane since.
    pub let_go: bool,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Its answer is there.
    Completed,
    /// It was not started, and will not be.
    NotExecuted,
    /// It may have been executed, wholly or in part.
    Unknown,
}

/// What became of a call of which a session that is over has left this. A call of several frames is unknown once its
/// first entry was taken.
pub(super) fn fate(remains: Remains, witness: Witness) -> Fate {
    if remains.completed {
        return Fate::Completed;
    }
    let Some(position) = remains.position else { return Fate::NotExecuted };
    let nobody_takes_more = witness == Witness::Kernel || remains.let_go;
    if position >= remains.taken && nobody_takes_more { Fate::NotExecuted } else { Fate::Unknown }
}

/// How often a call that may have been executed is sent again at most. One that was under way so often when its server
/// died is likely to be the cause.
pub(super) const UNKNOWN_RESENDS_MAX: u32 = 3;

/// What matters about a call when its session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Its caller says that it may be executed more than once.
    pub idempotent: bool,
    /// In how many earlier sessions it may have been executed.
    pub doubts: u32,
    /// Its answer is handed out in frames.
    pub streams: bool,
    /// Frames of its answer have been handed out.
    pub has_frames: bool,
    /// The request is at hand, unharmed.
    pub has_request: bool,
}

/// What is to be done about a call whose session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is sent again in the next session.
    Resend,
    /// Its caller is told that it has not been executed.
    NotExecuted,
    /// Its caller is told that it may have been executed.
    Lost,
    /// Its caller is told how much of the answer had come.
    StreamLost,
}

/// What is to be done about a call that has not been completed.
pub(super) fn judge(fate: Fate, terms: Terms) -> Verdict {
    // A call that may have been executed in an earlier session stays one of which nobody knows.
    let certain = fate == Fate::NotExecuted && terms.doubts == 0;
    let may_resend = match fate {
        Fate::Completed => false,
        Fate::NotExecuted => true,
        Fate::Unknown => terms.idempotent && terms.doubts < UNKNOWN_RESENDS_MAX,
    };
    match (may_resend && terms.has_request && !terms.has_frames, certain) {
        (true, _) => Verdict::Resend,
        (false, true) => Verdict::NotExecuted,
        (false, false) if terms.streams => Verdict::StreamLost,
        (false, false) => Verdict::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all_terms() -> impl Iterator<Item = Terms> {
        (0..16u32).flat_map(|bits| {
            (0..=UNKNOWN_RESENDS_MAX).map(move |doubts| Terms {
                idempotent: bits & 1 != 0,
                doubts,
                streams: bits & 2 != 0,
                has_frames: bits & 4 != 0,
                has_request: bits & 8 != 0,
            })
        })
    }

    /// Goal:   F50: nothing but what provably has not been run is called so, and all of that is, as far as the witness
    ///         can tell.
    /// Method: every combination of the facts, positions around the published one.
    #[test]
    fn f50_r3_4_every_combination_of_what_a_session_left_is_classified() {
        for witness in [Witness::Kernel, Witness::Server] {
            for (completed, let_go) in [(false, false), (false, true), (true, false), (true, true)] {
                for taken in 0..4 {
                    for position in [None, Some(0), Some(1), Some(2), Some(3), Some(4), Some(u64::MAX)] {
                        let remains = Remains { completed, position, taken, let_go };
                        let expected = match (completed, position) {
                            (true, _) => Fate::Completed,
                            (_, None) => Fate::NotExecuted,
                            (_, Some(at)) if at < taken => Fate::Unknown,
                            _ if witness == Witness::Server && !let_go => Fate::Unknown,
                            _ => Fate::NotExecuted,
                        };
                        assert_eq!(fate(remains, witness), expected, "{remains:?} {witness:?}");
                    }
                }
            }
        }
    }

    /// Goal:   R3.4: what may have been executed is sent again only where its caller allows that, and not for ever;
    ///         nothing is sent again whose answer has begun to be handed out, and nobody is told "not executed" of a call
    ///         of which that was once in doubt.
    /// Method: every combination.
    #[test]
    fn r3_4_every_combination_of_terms_is_judged() {
        for terms in all_terms() {
            for fate in [Fate::NotExecuted, Fate::Unknown] {
                let verdict = judge(fate, terms);
                let sound = fate == Fate::NotExecuted || terms.idempotent;
                if verdict == Verdict::Resend {
                    assert!(sound && terms.has_request && !terms.has_frames, "{terms:?} {fate:?}");
                }
                if verdict == Verdict::NotExecuted {
                    assert!(fate == Fate::NotExecuted && terms.doubts == 0, "{terms:?} {fate:?}");
                }
                let lost = if terms.streams { Verdict::StreamLost } else { Verdict::Lost };
                assert!(
                    [lost, Verdict::Resend, Verdict::NotExecuted].contains(&verdict),
                    "{terms:?} {fate:?}"
                );
                let can = terms.has_request && !terms.has_frames;
                let within = fate == Fate::NotExecuted || terms.doubts < UNKNOWN_RESENDS_MAX;
                assert_eq!(verdict == Verdict::Resend, sound && can && within, "{terms:?} {fate:?}");
            }
        }
    }

    /// What happens in the model, one after the other.
    #[derive(Debug, Clone)]
    enum Step {
        /// The client publishes a call on this lane.
        Publish(usize),
        /// The reactor of this lane publishes the next position.
        Take(usize),
        /// It runs what it has taken.
        Run(usize),
        /// It completes one of those that it has run.
        Complete(usize, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => (0..2usize).prop_map(Step::Publish),
            3 => (0..2usize).prop_map(Step::Take),
            3 => (0..2usize).prop_map(Step::Run),
            2 => (0..2usize, 0..8usize).prop_map(|(lane, which)| Step::Complete(lane, which)),
        ];
        prop::collection::vec(step, 0..80)
    }

    /// One lane of the model: what the server does, and what can be seen of it.
    #[derive(Debug, Default)]
    struct Reactor {
        calls: Vec<Seen>,
        taken: usize,
        run: usize,
    }

    #[derive(Debug, Clone, Copy, Default)]
    struct Seen {
        runs: u32,
        completed: bool,
    }

    impl Reactor {
        fn step(&mut self, step: &Step) {
            match *step {
                Step::Publish(_) => self.calls.push(Seen::default()),
                // One position is published, then that entry is run, before the next is.
                Step::Take(_) if self.taken == self.run && self.taken < self.calls.len() => self.taken += 1,
                Step::Run(_) if self.run < self.taken => {
                    self.calls[self.run].runs += 1;
                    self.run += 1;
                }
                Step::Complete(_, which) => {
                    let mut ran = self.calls[..self.run].iter_mut().filter(|call| !call.completed);
                    if let Some(call) = ran.nth(which) {
                        call.completed = true;
                    }
                }
                Step::Take(_) | Step::Run(_) => {}
            }
        }
    }

    fn lane_of(step: &Step) -> usize {
        match *step {
            Step::Publish(lane) | Step::Take(lane) | Step::Run(lane) | Step::Complete(lane, _) => lane,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Goal:   F50, I3 to I5: whatever a server does until its client learns of the end, and whatever its other
        ///         reactors go on doing afterwards if it lives, a call that is sent again as not executed runs once in
        ///         all, and a completed one has run once.
        /// Method: a model of two reactors that publish, run and complete; the client looks at any moment, the further
        ///         reactor of a live server goes on unless it has let go of its lane; then what was judged is compared
        ///         with what was run.
        #[test]
        fn f50_i3_i5_no_call_that_is_sent_again_has_run(
            before in steps(),
            after in steps(),
            told in any::<bool>(),
            has_let_go in any::<bool>(),
        ) {
            let mut reactors = [Reactor::default(), Reactor::default()];
            before.iter().for_each(|step| reactors[lane_of(step)].step(step));
            let witness = if told { Witness::Server } else { Witness::Kernel };
            let mut fates = Vec::new();
            for (lane, reactor) in reactors.iter().enumerate() {
                for (position, seen) in reactor.calls.iter().enumerate() {
                    let remains = Remains {
                        completed: seen.completed,
                        position: Some(position as u64),
                        taken: reactor.taken as u64,
                        let_go: lane == 0 || has_let_go,
                    };
                    fates.push((lane, position, fate(remains, witness)));
                }
            }
            if told && !has_let_go {
                // The further reactor has not heard of the end yet. The client publishes nothing more.
                let goes_on = |step: &&Step| lane_of(step) == 1 && !matches!(step, Step::Publish(_));
                after.iter().filter(goes_on).for_each(|step| reactors[1].step(step));
            }
            for (lane, position, fate) in fates {
                let runs = reactors[lane].calls[position].runs;
                match fate {
                    Fate::Completed => prop_assert_eq!(runs, 1),
                    Fate::NotExecuted => prop_assert_eq!(runs, 0),
                    Fate::Unknown => prop_assert!(runs <= 1),
                }
            }
        }
    }
}

//! Which lane a connection's calls take, on a session that has, or may have, several (DESIGN §3, §4).
//!
//! Rule:   a connection changes its lane only while none of its calls is in flight (P6), so its calls start in
//!         order. Under `handoff` a call that may have to wait takes the lane of the reactor whose core it runs on,
//!         unless the reactor of its present lane is polling on another core, or so many calls are in flight that
//!         two cores do them sooner than one. Under `spin` a caller stays off its own core's reactor. Whoever keeps off
//!         a core uses any lane but that of its reactor, if there is one.

use super::session::{Session, Target};
use crate::config::WaitPolicy;
use crate::error::{IpcError, Result};
use crate::machine::current_cpu;
use crate::protocol::CONNECTION_INDEX_BITS;
use crate::protocol::handshake::{LaneChoice, NO_CORE};
use doorbell_shm::entry::{Submission, flag, kind};
use doorbell_shm::kill_point;

/// Calls in flight from which on a client does not wait for one of them, but keeps a reactor busy: on another core.
const PIPELINED: usize = 4;

/// What is known of one connection.
#[derive(Debug, Clone, Copy, Default)]
struct Route {
    number: u32,
    in_flight: u32,
    lane: u32,
    /// Lanes that the connection has been attached to.
    attached: u64,
}

#[derive(Debug)]
pub(super) struct Routes {
    policy: WaitPolicy,
    /// By the index in a connection's number.
    records: Vec<Route>,
    /// Cores whose reactor gave no lane.
    refused: Vec<u32>,
    /// Cores that there was no lane away from.
    refused_away: Vec<u32>,
    /// The lane of a client that spins.
    spins_on: Option<u32>,
}

fn index(number: u32) -> usize {
    (number & ((1 << CONNECTION_INDEX_BITS) - 1)) as usize
}

impl Routes {
    /// `None` if all connections stay on the home lane, whose reactor, one of so many, is pinned to `home_core`.
    pub fn new(policy: WaitPolicy, home_core: u32, reactors: u32) -> Option<Box<Self>> {
        let needed = match policy {
            WaitPolicy::Handoff => home_core != NO_CORE,
            // Where there are many reactors, clients that keep one busy are spread over them.
            WaitPolicy::Spin => home_core == current_cpu() || reactors > 2,
            WaitPolicy::Block => false,
        };
        needed.then(|| Box::new(Self::by(policy)))
    }

    /// Those of a client that sleeps whatever its core, and keeps off one; to be made while none of its calls is in flight,
    /// since they count from nothing. `None` if no reactor is pinned.
    pub fn keeping_off(home_core: u32) -> Option<Box<Self>> {
        (home_core != NO_CORE).then(|| Box::new(Self::by(WaitPolicy::Block)))
    }

    fn by(policy: WaitPolicy) -> Self {
        let (records, refused, refused_away) = (Vec::new(), Vec::new(), Vec::new());
        Self { policy, records, refused, refused_away, spins_on: None }
    }

    fn record(&mut self, number: u32) -> &mut Route {
        let index = index(number);
        if self.records.len() <= index {
            self.records.resize(index + 1, Route::default());
        }
        let record = &mut self.records[index];
        if record.number != number {
            *record = Route { number, ..Route::default() };
        }
        record
    }

    /// The lane of a call that is about to be submitted, and the flags that go with it. Attaches the connection to
    /// the lane if this is its first call there.
    pub fn choose(&mut self, session: &mut Session, target: Target) -> Result<(u32, u16)> {
        let cpu = current_cpu();
        let Route { in_flight, mut lane, .. } = *self.record(target.connection);
        if in_flight == 0 {
            lane = match (self.policy, session.avoided) {
                (_, Some(avoided)) => self.of_another_core(session, lane, avoided)?,
                (WaitPolicy::Spin, None) => self.where_it_spins(session, cpu)?,
                _ if session.in_flight() >= PIPELINED => self.of_another_core(session, lane, cpu)?,
                (WaitPolicy::Handoff | WaitPolicy::Block, None) => self.of_this_core(session, lane, cpu)?,
            };
        }
        let record = self.record(target.connection);
        record.lane = lane;
        if lane != 0 && record.attached & 1 << lane == 0 {
            let entry = Submission {
                kind: kind::ATTACH,
                flags: if target.bulk { flag::BULK } else { 0 },
                codec: target.codec,
                connection: target.connection,
                ..Submission::default()
            };
            if !session.lane_mut(lane).send_bare(&entry, target.bulk)? {
                return Err(IpcError::WouldBlock);
            }
            kill_point!("client.lane.attached");
            record.attached |= 1 << lane;
        }
        let hands_over = self.policy == WaitPolicy::Handoff && session.lane(lane).core == cpu;
        Ok((lane, if hands_over { flag::HANDOFF } else { 0 }))
    }

    fn of_this_core(&mut self, session: &mut Session, lane: u32, cpu: u32) -> Result<u32> {
        let present = session.lane(lane);
        if present.core == cpu || present.seems_polled() {
            return Ok(lane);
        }
        if let Some(own) = session.lanes().position(|lane| lane.core == cpu) {
            return Ok(own as u32);
        }
        if self.refused.contains(&cpu) {
            return Ok(lane);
        }
        match session.request_lane(LaneChoice::On(cpu))? {
            0 if session.home.core != cpu => {
                self.refused.push(cpu);
                Ok(lane)
            }
            granted => Ok(granted),
        }
    }

    fn of_another_core(&mut self, session: &mut Session, lane: u32, cpu: u32) -> Result<u32> {
        if session.lane(lane).core != cpu {
            return Ok(lane);
        }
        if let Some(other) = session.lanes().position(|lane| lane.core != cpu) {
            return Ok(other as u32);
        }
        if self.refused_away.contains(&cpu) {
            return Ok(lane);
        }
        let granted = session.request_lane(LaneChoice::NotOn(cpu))?;
        if session.lane(granted).core == cpu {
            self.refused_away.push(cpu);
        }
        Ok(granted)
    }

    fn where_it_spins(&mut self, session: &mut Session, cpu: u32) -> Result<u32> {
        if let Some(lane) = self.spins_on {
            return Ok(lane);
        }
        let lane = session.request_lane(LaneChoice::NotOn(cpu))?;
        self.spins_on = Some(lane);
        Ok(lane)
    }

    #[inline(always)]
    fn known(&mut self, number: u32) -> Option<&mut Route> {
        self.records.get_mut(index(number)).filter(|record| record.number == number)
    }

    /// A call of this connection has been submitted.
    #[inline(always)]
    pub fn started(&mut self, number: u32) {
        if let Some(record) = self.known(number) {
            record.in_flight += 1;
        }
    }

    /// A call of this connection has been answered.
    #[inline(always)]
    pub fn ended(&mut self, number: u32) {
        // A late answer on a connection that has been closed is none of the one that has its index now.
        if let Some(record) = self.known(number) {
            record.in_flight = record.in_flight.saturating_sub(1);
        }
    }

    /// Whether calls of this connection are in flight on a lane that is not its home lane.
    pub fn is_busy_elsewhere(&self, number: u32) -> bool {
        let record = self.records.get(index(number)).filter(|record| record.number == number);
        record.is_some_and(|record| record.in_flight > 0 && record.lane != 0)
    }
}

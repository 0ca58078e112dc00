//! What leases are made of: pages that the kernel gives and takes. The only part of the core that makes system calls,
//! and none of them on a segment that lies on the heap; the reactor asks for it.

use super::budget::Budget;
use super::core::{Core, SessionId};
use super::lane::SessionLane;
use super::leases::Verdict;
use crate::error::{IpcError, Result};
use doorbell_shm::PeerFault;
use doorbell_shm::entry::Status;
use doorbell_shm::kill_point;
use doorbell_shm::layout::{LaneLayout, SLOTS_PER_PAGE};
use doorbell_shm::lease::{Granted, NoRoom};
use doorbell_shm::map::PAGE;

/// Memory that has been leased.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    /// Its first slot.
    pub slot: u32,
    pub slots: u32,
    pub bytes: u32,
}

/// Why there is no memory now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// The budget is used up.
    Budget,
    /// The kernel has none (F34).
    Kernel,
}

impl SessionLane {
    fn layout(&self) -> LaneLayout {
        LaneLayout::nth(self.segment().geometry(), self.number())
    }

    /// Leases at most `slots` slots of `bytes` each, as many as there is room and memory for; `None` if the lane has no
    /// room for even one.
    pub(super) fn grant(
        &mut self,
        budget: &Budget,
        bytes: u32,
        slots: u32,
    ) -> std::result::Result<Option<Grant>, Shortage> {
        let (page, fit) = match self.lane().leases.room(bytes, slots) {
            Ok(room) => room,
            Err(NoRoom) => return Ok(None),
        };
        let got = budget.take_spare(1, fit.into(), bytes.into()) as u32;
        if got == 0 {
            return Err(Shortage::Budget);
        }
        let len = (got * bytes) as usize;
        let offset = self.layout().slots + page as usize * PAGE;
        if let Err(error) = self.segment().back(offset, len) {
            tracing::warn!(%error, "no memory to lease");
            budget.give(len as u64);
            return Err(Shortage::Kernel);
        }
        kill_point!("server.lease.backed");
        self.lane_mut().leases.grant(page, bytes, got);
        kill_point!("server.lease.granted");
        Ok(Some(Grant { slot: page * SLOTS_PER_PAGE, slots: got, bytes: len as u32 }))
    }

    /// Gives the memory of a lease that has been returned to the kernel; returns how many bytes that were.
    pub(super) fn give_back_memory(&mut self, lease: Granted) -> Result<u64> {
        let len = lease.pages as usize * PAGE;
        self.segment().give_back(self.layout().slots + lease.page as usize * PAGE, len)?;
        self.note_gone();
        Ok(len as u64)
    }

    /// Takes the memory of all void leases; returns how many bytes that were.
    pub(super) fn take_memory(&mut self) -> Result<u64> {
        let mut gone = Vec::new();
        self.lane_mut().leases.take_back(|lease| gone.push(lease));
        let mut bytes = 0;
        for lease in gone {
            bytes += self.give_back_memory(lease)?;
        }
        self.note_gone();
        Ok(bytes)
    }

    fn note_gone(&mut self) {
        if !self.has_void_leases() {
            self.leases_gone();
        }
    }

    /// Makes holes of all lease pages that are not leased, whoever made them exist.
    pub(super) fn punch_excess(&mut self) -> Result<()> {
        let geometry = *self.segment().geometry();
        let slots = self.layout().slots;
        let mut from = geometry.base_pages();
        let end = (geometry.slot_pages(), geometry.slot_pages());
        let granted: Vec<(u32, u32)> =
            self.lane().leases.granted().iter().map(|l| (l.page, l.page + l.pages)).chain([end]).collect();
        for (start, next) in granted {
            self.segment()
                .punch(slots + from as usize * PAGE, (start - from) as usize * PAGE)
                .map_err(IpcError::from)?;
            from = next;
        }
        Ok(())
    }
}

/// Memory that has been taken back from a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    pub bytes: u64,
    /// Calls that had it have ended for it.
    pub by_force: bool,
}

impl<S> Core<S> {
    /// Gives back what lanes have returned, and grants what there is memory for, in the order of the wishes. Lanes that
    /// cannot be answered are among the faults afterwards.
    pub fn serve_memory(&mut self, now_ns: &mut dyn FnMut() -> u64) -> Result<()> {
        while let Some(giving) = self.leases.next_giving() {
            let Some((id, lane)) = self.seated_mut(giving.seat) else { continue };
            let bytes = lane.give_back_memory(giving.lease)?;
            kill_point!("server.lease.gone");
            let answer = lane.answer_control(giving.ring, giving.slot, giving.generation, Status::Ok, 0);
            self.memory_is_free(bytes);
            self.answered(id, answer);
        }
        while let Some(wish) = self.leases.first() {
            let budget = self.budget.clone();
            let Some((id, lane)) = self.seated_mut(wish.seat) else {
                self.leases.pop();
                continue;
            };
            let granted = lane.grant(&budget, wish.bytes, wish.slots);
            let answer = match &granted {
                Ok(Some(grant)) => (Status::Ok, u64::from(grant.slot) | u64::from(grant.slots) << 32),
                Ok(None) => (Status::Overloaded, 0),
                // Nobody gives any back: its call goes on without.
                Err(Shortage::Budget) => break,
                Err(Shortage::Kernel) => (Status::Overloaded, 10),
            };
            let answer = lane.answer_control(wish.ring, wish.slot, wish.generation, answer.0, answer.1);
            kill_point!("server.lease.told");
            if let Ok(Some(grant)) = granted {
                self.metrics.leases_granted += 1;
                self.metrics.leased_bytes += u64::from(grant.bytes);
            }
            let waited_since = self.leases.waits_since_ns;
            if waited_since != 0 {
                self.metrics.lease_wait_ns += now_ns() - waited_since;
            }
            self.leases.pop();
            self.answered(id, answer);
        }
        let waits = self.leases.len() > 0;
        if !waits {
            // The last one may have been cancelled, or have gone.
            self.leases.waits_since_ns = 0;
        } else if self.leases.waits_since_ns == 0 {
            self.leases.waits_since_ns = now_ns();
            self.metrics.leases_waited += 1;
        }
        if self.leases.begins_or_ceases_to_wait() {
            self.budget.wait(waits);
        }
        Ok(())
    }

    /// A lane has been answered outside of its turn.
    fn answered(&mut self, id: SessionId, answer: std::result::Result<(), PeerFault>) {
        match answer {
            Ok(()) => self.touch(id.index),
            Err(fault) => self.note_fault(id, fault),
        }
    }

    fn memory_is_free(&mut self, bytes: u64) {
        self.metrics.leased_bytes -= bytes;
        self.budget.give(bytes);
    }

    /// Whether somebody waits for memory at another reactor.
    pub fn others_want_memory(&self) -> bool {
        self.budget.waiting() > u32::from(self.leases.is_waiting())
    }

    /// Takes back the leases of the lane seated at `index` if nobody uses them, or if others wait and nothing is done
    /// with them; says whether it did.
    pub fn look_after_leases(
        &mut self,
        index: u32,
        now: u64,
        wanted_elsewhere: bool,
    ) -> Result<Option<Taken>> {
        let by_force = match self.judge_leases(index, now, wanted_elsewhere) {
            Verdict::Leave => return Ok(None),
            Verdict::Take => false,
            Verdict::Force => true,
        };
        let Some((_, lane)) = self.seated_mut(index) else { return Ok(None) };
        let bytes = lane.take_memory()?;
        self.memory_is_free(bytes);
        self.metrics.leases_forced += u64::from(by_force);
        Ok(Some(Taken { bytes, by_force }))
    }
}

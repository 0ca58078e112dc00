//! What a lane's leases are made of: pages that the kernel gives and takes. The only part of a lane that makes system
//! calls; the reactor asks for it.

use super::budget::Budget;
use super::lane::SessionLane;
use crate::error::{IpcError, Result};
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
        let got = budget.take(1, fit.into(), bytes.into()) as u32;
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
        self.lane_mut().leases.grant(page, bytes, got);
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

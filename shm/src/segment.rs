//! Segments: sealed memfds, made by the server, mapped by it and by one client, by nobody else.
//!
//! A segment is never reused for another client (S8): its first owner may map it for ever. There is no
//! file in /dev/shm and nothing to leak (trap 6). Pages exist only where they were granted, and every
//! grant is backed by `fallocate`, so a shortage is an error here and never a SIGBUS later (F34).

use crate::bytes::SharedBytes;
use crate::error::{PeerFault, SegmentError};
use crate::kill_point;
use crate::layout::{self, Geometry, HEADER_LEN, LaneLayout, MAGIC, VERSION, header};
use crate::map::{Mapping, PAGE, Shared};
use crate::sync::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Seals that every segment carries before anybody maps it.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Who a segment belongs to; written into its header and repeated in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Random at the start of the server.
    pub epoch: u64,
    /// Random for each session.
    pub session: [u64; 2],
}

/// A mapped segment.
#[derive(Debug)]
pub struct Segment {
    map: Arc<Mapping>,
    geometry: Geometry,
    /// Lanes there is room for.
    lanes: u32,
    words: Shared<[AtomicU64]>,
    /// Server: the memfd, to back and to punch pages; `None` of one on the heap.
    memory: Option<OwnedFd>,
    /// Server: bytes that have been granted, of all lanes. Never less than what the server has backed.
    granted: AtomicU64,
    /// On the heap: the next pages are refused.
    scarce: AtomicBool,
}

impl Segment {
    /// Makes, seals, fills in and maps a segment for one client, with room for `lanes` lanes of which the
    /// home lane exists. Its descriptor ([`Segment::memory`]) goes to that client.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Geometry`] for a geometry or a number of lanes outside the limits; [`SegmentError::Os`]
    /// naming the call that the kernel refused. Whatever had been made is gone again (F33).
    pub fn create(geometry: Geometry, lanes: u32, identity: Identity) -> Result<Self, SegmentError> {
        let (geometry, len) = checked(geometry, lanes)?;
        let layout = LaneLayout::home(&geometry);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
        let fd = rustix::fs::memfd_create("doorbell-session", flags)
            .map_err(|e| SegmentError::os("memfd_create", len, e))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(|e| SegmentError::os("ftruncate", len, e))?;
        kill_point!("server.memory.sized");
        let base_end = layout.slots + geometry.base_pages() as usize * PAGE;
        allocate(&fd, FallocateFlags::empty(), 0, base_end)
            .map_err(|e| SegmentError::os("fallocate", base_end, e))?;
        kill_point!("server.memory.backed");
        rustix::fs::fcntl_add_seals(&fd, SEALS)
            .map_err(|e| SegmentError::os("fcntl(F_ADD_SEALS)", len, e))?;
        kill_point!("server.memory.sealed");
        let map = Mapping::guarded(map_shared(fd.as_fd(), len)?);
        let segment = Self { memory: Some(fd), ..Self::on(map, geometry, lanes)? };
        segment.write_header(identity);
        Ok(segment)
    }

    /// The same on the heap: for tests and simulations, where both ends live in one process.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Geometry`] for a geometry or a number of lanes outside the limits.
    pub fn on_heap(geometry: Geometry, lanes: u32, identity: Identity) -> Result<Self, SegmentError> {
        let (geometry, len) = checked(geometry, lanes)?;
        let segment = Self::on(Mapping::on_heap(len), geometry, lanes)?;
        segment.write_header(identity);
        Ok(segment)
    }

    /// Maps a segment that a server sent, after checking that it cannot change its size (F17, F20) and
    /// that its header says what the handshake said.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Unsealed`], [`SegmentError::Os`], [`SegmentError::Geometry`] or
    /// [`SegmentError::Header`].
    pub fn attach(
        fd: BorrowedFd<'_>,
        geometry: Geometry,
        lanes: u32,
        identity: Identity,
    ) -> Result<Self, SegmentError> {
        let (geometry, len) = checked(geometry, lanes)?;
        let seals =
            rustix::fs::fcntl_get_seals(fd).map_err(|e| SegmentError::os("fcntl(F_GET_SEALS)", len, e))?;
        if !seals.contains(SEALS) {
            return Err(SegmentError::Unsealed { missing: (SEALS - seals).bits() });
        }
        let size = rustix::fs::fstat(fd).map_err(|e| SegmentError::os("fstat", len, e))?.st_size as u64;
        if size != len as u64 {
            let (theirs, expected) = (size, len as u64);
            return Err(PeerFault::Header { field: "size", theirs, expected }.into());
        }
        // A forked child would be a second writer of the same rings (F9).
        let map = Mapping::not_inherited(map_shared(fd, len)?)?;
        let segment = Self::on(map, geometry, lanes)?;
        segment.check_header(identity)?;
        Ok(segment)
    }

    fn on(map: Arc<Mapping>, geometry: Geometry, lanes: u32) -> Result<Self, SegmentError> {
        let words = map.slice(0, HEADER_LEN / 8)?;
        let granted = AtomicU64::new(granted_bytes(&geometry) as u64);
        Ok(Self { map, geometry, lanes, words, memory: None, granted, scarce: AtomicBool::new(false) })
    }

    /// The other side's end of a segment on the heap.
    ///
    /// # Errors
    ///
    /// As for [`Segment::on_heap`].
    pub fn other_end(&self) -> Result<Self, SegmentError> {
        Self::on(Arc::clone(&self.map), self.geometry, self.lanes)
    }

    /// Of a segment on the heap: the next pages that are asked for are refused, as by a kernel that has none.
    pub fn refuse_pages(&self) {
        self.scarce.store(true, Relaxed);
    }

    /// Server: the memfd; `None` of a segment on the heap.
    pub fn memory(&self) -> Option<BorrowedFd<'_>> {
        self.memory.as_ref().map(AsFd::as_fd)
    }

    /// Client: whether this process is a fork of the one that attached it: there is no memory behind it here (F9).
    #[inline(always)]
    pub fn was_left_behind(&self) -> bool {
        self.map.was_left_behind()
    }

    /// Server: whether memory of it has been lost: its session cannot go on (F19).
    pub fn has_failed(&self) -> bool {
        self.map.has_failed()
    }

    /// Server: makes the pages of a range exist, or fails now rather than with SIGBUS later (F34). They are zero where
    /// they were holes, and count as granted.
    ///
    /// Shape:  whole pages inside the segment.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] if the kernel has no memory; nothing is granted then.
    pub fn back(&self, offset: usize, len: usize) -> Result<(), SegmentError> {
        self.granted.fetch_add(len as u64, Relaxed);
        let Some(memory) = &self.memory else {
            if !self.scarce.swap(false, Relaxed) {
                return Ok(());
            }
            self.granted.fetch_sub(len as u64, Relaxed);
            return Err(SegmentError::os("fallocate", len, rustix::io::Errno::NOMEM));
        };
        allocate(memory, FallocateFlags::empty(), offset, len).map_err(|e| {
            self.granted.fetch_sub(len as u64, Relaxed);
            SegmentError::os("fallocate", len, e)
        })
    }

    /// Server: gives the pages of a range that was granted back to the kernel. Whoever touches them finds zeros, and
    /// makes them exist again.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] if the kernel refuses; the range still counts as granted.
    pub fn give_back(&self, offset: usize, len: usize) -> Result<(), SegmentError> {
        self.punch(offset, len)?;
        kill_point!("server.lease.punched");
        self.granted.fetch_sub(len as u64, Relaxed);
        Ok(())
    }

    /// Server: makes holes of the pages of a range that nobody was granted.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] if the kernel refuses.
    pub fn punch(&self, offset: usize, len: usize) -> Result<(), SegmentError> {
        if len == 0 {
            return Ok(());
        }
        let Some(memory) = &self.memory else {
            // Whoever looks there finds zeros.
            SharedBytes::new(&self.map, offset, len)?.write(0, &vec![0; len]);
            return Ok(());
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        allocate(memory, flags, offset, len)
            .map_err(|e| SegmentError::os("fallocate(FALLOC_FL_PUNCH_HOLE)", len, e))
    }

    /// Server: bytes that exist beyond what has been granted, made by a client that touches what is not its own; 0
    /// for a segment on the heap.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Os`] if the kernel refuses fstat.
    pub fn excess(&self) -> Result<u64, SegmentError> {
        let Some(memory) = &self.memory else { return Ok(0) };
        let stat = rustix::fs::fstat(memory).map_err(|e| SegmentError::os("fstat", self.len(), e))?;
        // Asked after the blocks: a grant made meanwhile counts for the client.
        Ok((stat.st_blocks as u64 * 512).saturating_sub(self.granted.load(Relaxed)))
    }

    /// Server: makes the pages of lane `lane` (at least 1) exist and enters it in the directory. The server's
    /// end must be open before the client is told.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Geometry`] for a lane that there is no room for; [`SegmentError::Os`] if the kernel has
    /// no memory.
    pub fn grant_lane(&self, lane: u32) -> Result<LaneLayout, SegmentError> {
        let (value, max) = (u64::from(lane), u64::from(self.lanes.saturating_sub(1)));
        if lane == 0 || value > max {
            return Err(SegmentError::Geometry { what: "number of a further lane", value, min: 1, max });
        }
        let layout = LaneLayout::nth(&self.geometry, lane);
        let start = LaneLayout::nth(&self.geometry, lane - 1).end;
        self.back(start, lane_bytes(&self.geometry))?;
        kill_point!("server.lane.backed");
        let (word, shift) = directory_place(lane);
        // Release pairs with the Acquire in `lane`. A word is of several lanes, whose reactors let go of them.
        self.words[word].fetch_or(((start / PAGE) as u64) << shift, Release);
        Ok(layout)
    }

    /// Server: takes lane `lane` (at least 1) out of the directory. Whoever finds it gone there sees all that its reactor
    /// has published, and it publishes nothing more.
    pub fn let_go_lane(&self, lane: u32) {
        if lane == 0 || lane >= self.lanes {
            return;
        }
        let (word, shift) = directory_place(lane);
        // Release pairs with the Acquire in `lane`: the last position and completion come before it.
        self.words[word].fetch_and(!(0xffff << shift), Release);
    }

    /// Client: where lane `lane` (at least 1) lies, if the directory has it.
    ///
    /// # Errors
    ///
    /// [`PeerFault::Header`] if the directory says anything but what the layout says.
    pub fn lane(&self, lane: u32) -> Result<Option<LaneLayout>, PeerFault> {
        if lane == 0 || lane >= self.lanes {
            return Ok(None);
        }
        let (word, shift) = directory_place(lane);
        // Acquire pairs with the Release in `grant_lane` and in `let_go_lane`.
        let theirs = self.words[word].load(Acquire) >> shift & 0xffff;
        let expected = (LaneLayout::nth(&self.geometry, lane - 1).end / PAGE) as u64;
        match theirs {
            0 => Ok(None),
            page if page == expected => Ok(Some(LaneLayout::nth(&self.geometry, lane))),
            _ => Err(PeerFault::Header { field: "directory", theirs, expected }),
        }
    }

    /// Lanes that there is room for, the home lane included.
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// The header fields that never change, as (name, offset, value).
    fn fixed_fields(&self, identity: Identity) -> [(&'static str, usize, u64); 8] {
        [
            ("magic", header::MAGIC, MAGIC),
            ("version", header::VERSION, u64::from(VERSION) | (HEADER_LEN as u64) << 32),
            ("features_required", header::FEATURES_REQUIRED, 0),
            ("features_optional", header::FEATURES_OPTIONAL, 0),
            ("epoch", header::EPOCH, identity.epoch),
            ("session.0", header::SESSION, identity.session[0]),
            ("session.1", header::SESSION + 8, identity.session[1]),
            ("geometry", header::GEOMETRY, self.geometry.pack()),
        ]
    }

    fn write_header(&self, identity: Identity) {
        for (_, offset, value) in self.fixed_fields(identity) {
            self.words[offset / 8].store(value, Relaxed);
        }
    }

    fn check_header(&self, identity: Identity) -> Result<(), PeerFault> {
        for (field, offset, expected) in self.fixed_fields(identity) {
            let theirs = self.words[offset / 8].load(Relaxed);
            if theirs != expected {
                return Err(PeerFault::Header { field, theirs, expected });
            }
        }
        Ok(())
    }

    /// Server: says how the session stands; `reason` is a disconnect reason code, 0 for none.
    pub fn set_state(&self, state: u32, reason: u32) {
        // Release pairs with the Acquire in `state`: whatever was completed before is visible with it.
        self.words[header::STATE / 8].store(u64::from(state) | u64::from(reason) << 32, Release);
    }

    /// Client: how the server says that the session stands, as (state, reason).
    pub fn state(&self) -> (u32, u32) {
        // Acquire pairs with the Release in `set_state`.
        let word = self.words[header::STATE / 8].load(Acquire);
        (word as u32, (word >> 32) as u32)
    }

    /// The geometry that the handshake fixed, checked.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Bytes of the segment, allocated or not.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never true: a segment has at least a header.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The mapping, to open lanes on.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.map
    }
}

/// fallocate(2), which a signal may interrupt (F41).
fn allocate(fd: &OwnedFd, flags: FallocateFlags, offset: usize, len: usize) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, flags, offset as u64, len as u64))
}

/// Word of the header, and shift in it, of a lane's directory entry.
fn directory_place(lane: u32) -> (usize, u32) {
    (header::DIRECTORY / 8 + lane as usize / 4, 16 * (lane % 4))
}

/// The geometry with its limits checked, and the bytes that so many lanes of it take.
fn checked(geometry: Geometry, lanes: u32) -> Result<(Geometry, usize), SegmentError> {
    let geometry = geometry.checked()?;
    let (value, max) = (u64::from(lanes), u64::from(layout::lanes_max(&geometry)));
    if !(1..=max).contains(&value) {
        return Err(SegmentError::Geometry { what: "number of lanes", value, min: 1, max });
    }
    Ok((geometry, layout::segment_len(&geometry, lanes)))
}

/// Bytes that a further lane of this geometry takes from the memory budget: its head and its base slots.
pub fn lane_bytes(geometry: &Geometry) -> usize {
    LaneLayout::at(0, geometry).slots + geometry.base_pages() as usize * PAGE
}

/// Bytes that a new segment of this geometry takes from the memory budget: header, home lane, base slots.
pub fn granted_bytes(geometry: &Geometry) -> usize {
    LaneLayout::home(geometry).slots + geometry.base_pages() as usize * PAGE
}

fn map_shared(fd: BorrowedFd<'_>, len: usize) -> Result<MmapRaw, SegmentError> {
    MmapOptions::new().len(len).map_raw(&fd).map_err(|e| SegmentError::os("mmap", len, e))
}

/// An anonymous memfd mapped shared, without header or seals: what two processes of one benchmark need.
///
/// # Errors
///
/// [`SegmentError::Os`] naming the call.
pub fn scratch(len: usize) -> Result<(Arc<Mapping>, OwnedFd), SegmentError> {
    let fd = rustix::fs::memfd_create("doorbell-scratch", MemfdFlags::CLOEXEC)
        .map_err(|e| SegmentError::os("memfd_create", len, e))?;
    rustix::fs::ftruncate(&fd, len as u64).map_err(|e| SegmentError::os("ftruncate", len, e))?;
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64)
        .map_err(|e| SegmentError::os("fallocate", len, e))?;
    let map = attach_scratch(fd.as_fd(), len)?;
    Ok((map, fd))
}

/// Maps what [`scratch`] made, in the other process.
///
/// # Errors
///
/// [`SegmentError::Os`] naming the call.
pub fn attach_scratch(fd: BorrowedFd<'_>, len: usize) -> Result<Arc<Mapping>, SegmentError> {
    Ok(Mapping::of_file(map_shared(fd, len)?))
}

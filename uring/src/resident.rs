#![allow(unsafe_code)]
//! How much memory a process that mostly waits keeps resident: its own executable, and what its heap has free.
//!
//! At the first touch of a page of a file the kernel also maps what it has cached of the 64 KiB around it
//! (`fault_around_bytes`). Code that runs together lies apart, so that brings nearly all of an executable into the
//! resident set: 2.5 of 2.7 MiB of a server that works with 0.12 MiB. The kernel does so within one mapping only.
//! So the mappings are cut into small pieces, and what start-up has left in them is let go.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::mm::{Advice, madvise};

/// The length of a piece, bytes, unless there would be too many. Half as much leaves a quarter less resident and
/// takes twice the kernel memory; twice as much leaves 1.4 times as much (`docs/performance.md`, section Memory).
const PIECE: usize = 8 << 10;
/// Most pieces: each takes 192 bytes of kernel memory and some more for the tree that it is found by. Executables of up to
/// 12 MiB have pieces of [`PIECE`].
const PIECES_MAX: usize = 1536;

/// Bits of an entry of `/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst.
mod page {
    /// Mapped here and now.
    pub const PRESENT: u64 = 1 << 63;
    /// Swapped out, or on its way to another place in memory.
    pub const SWAPPED: u64 = 1 << 62;
    /// The file's own page, as opposed to a private copy of it.
    pub const OF_FILE: u64 = 1 << 61;
}

/// Lets go of the resident pages of this process's executable that nobody has written to, and has the kernel map
/// them again one piece at a time, when they are next used. Done once in a process; later calls do nothing.
///
/// Shape:  the bytes that were resident and are no more, before those in use come back.
/// Cost:   about a millisecond; later about 1 µs for each piece that is used again, once: its pages stay cached.
///         Nothing else changes: the code stays where it is, and the kernel may take such pages away at any time
///         anyway. Kernel memory: about 250 bytes a piece, at most 1536 pieces.
/// Source: madvise(2), `MADV_DONTNEED`; `filemap_map_pages` of mm/filemap.c.
///
/// Whoever patches his own code while it runs must not do so during this call.
///
/// # Errors
///
/// If `/proc` cannot be read, or if the kernel refuses; then nothing or a part has been let go.
pub fn thin_executable() -> io::Result<usize> {
    static BEGUN: AtomicBool = AtomicBool::new(false);
    if BEGUN.swap(true, Relaxed) {
        return Ok(0);
    }
    let executable = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read("/proc/self/maps")?;
    thin(&String::from_utf8_lossy(&maps), &executable.to_string_lossy())
}

/// The same for the mappings of `file` among `maps`, which is `/proc/self/maps`.
fn thin(maps: &str, file: &str) -> io::Result<usize> {
    let pagemap = std::fs::File::open("/proc/self/pagemap")?;
    let mut clean = Vec::new();
    let mut resident = 0;
    for range in read_only_mappings(maps, file) {
        if let Some(bytes) = clean_resident_bytes(&pagemap, &range)? {
            clean.push(range);
            resident += bytes;
        }
    }
    let piece = piece_len(clean.iter().map(Range::len).sum());
    for range in clean {
        cut(&range, piece)?;
        let_go(&range)?;
    }
    Ok(resident)
}

/// Addresses at which `file` is mapped privately and cannot be written to.
fn read_only_mappings(maps: &str, file: &str) -> impl Iterator<Item = Range<usize>> {
    maps.lines().filter_map(move |line| {
        // "address permissions offset device inode   path", and the path may have spaces.
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?;
        let path = fields.nth(3)?.trim_start();
        let fits = permissions.starts_with("r-") && permissions.ends_with('p') && path == file;
        let address = |text| usize::from_str_radix(text, 16).ok();
        fits.then_some(address(start)?..address(end)?)
    })
}

/// The bytes of `range` that are resident, or `None` if one of its pages has been written to: relocated, patched
/// by a debugger, whatever.
fn clean_resident_bytes(pagemap: &std::fs::File, range: &Range<usize>) -> io::Result<Option<usize>> {
    let page = rustix::param::page_size();
    let mut entries = vec![0; range.len() / page * 8];
    pagemap.read_exact_at(&mut entries, (range.start / page * 8) as u64)?;
    let (entries, _) = entries.as_chunks();
    let mut resident = 0;
    for entry in entries.iter().map(|entry| u64::from_ne_bytes(*entry)) {
        if entry & (page::PRESENT | page::SWAPPED) != 0 && entry & page::OF_FILE == 0 {
            return Ok(None);
        }
        resident += if entry & page::PRESENT != 0 { page } else { 0 };
    }
    Ok(Some(resident))
}

/// The length of pieces of `total` bytes: whole pages.
fn piece_len(total: usize) -> usize {
    total.div_ceil(PIECES_MAX).next_multiple_of(rustix::param::page_size()).max(PIECE)
}

/// Cuts a mapping into pieces: the kernel joins neighbours that are alike, so every other one is told apart, by a
/// property that means nothing for it. (Code is in no core dump unless asked for, and is in the file anyway.)
fn cut(range: &Range<usize>, piece: usize) -> io::Result<()> {
    for start in range.clone().step_by(piece).skip(1).step_by(2) {
        advise(&(start..range.end.min(start + piece)), Advice::LinuxDontDump)?;
    }
    Ok(())
}

fn let_go(range: &Range<usize>) -> io::Result<()> {
    advise(range, Advice::LinuxDontNeed)
}

fn advise(range: &Range<usize>, advice: Advice) -> io::Result<()> {
    // SAFETY:
    // - `LinuxDontDump` is a mark, no byte changes.
    // - `LinuxDontNeed` takes pages away from a private mapping of a file. `clean_resident_bytes` has found that
    //   each of them is the file's own, so what comes back at the next touch are the same bytes, as after the
    //   kernel has reclaimed them. The file of a running executable cannot be written to (ETXTBSY).
    // - The range is still that mapping: nothing unmaps or replaces the code that is running.
    // - No page has been written to since: the mapping is read-only, and the caller was told.
    unsafe { madvise(std::ptr::with_exposed_provenance_mut(range.start), range.len(), advice) }?;
    Ok(())
}

/// Gives the pages in which the heap has nothing but free memory back to the kernel. The C library does so by
/// itself only at the end of the heap, and one small live allocation there is in its way.
///
/// Cost:   50 µs, and 0.1 µs for each KiB that is given back. Every thread that allocates meanwhile waits.
/// Source: malloc_trim(3). A C library that has no such call keeps its memory.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and locks what it works on; live allocations stay where they are.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};
    use std::fs::File;
    use std::os::fd::AsFd;

    const MAPS: &str = "\
7f1840000000-7f184008f000 r--p 00000000 fe:00 123                        /opt/a b/doorbell
7f184008f000-7f18402b4000 r-xp 0008e000 fe:00 123                        /opt/a b/doorbell
7f18402b4000-7f18402c2000 rw-p 002b2000 fe:00 123                        /opt/a b/doorbell
7f18402c2000-7f18402c6000 r--s 002bf000 fe:00 123                        /opt/a b/doorbell
7f18402c6000-7f18402cd000 r--p 00000000 fe:00 124                        /opt/a b/doorbell2
7f18402d0000-7f18402d1000 r--p 00000000 00:00 0 
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
";

    #[test]
    fn only_private_read_only_mappings_of_that_file_are_found() {
        let found: Vec<_> = read_only_mappings(MAPS, "/opt/a b/doorbell").collect();
        assert_eq!(found, [0x7f1840000000..0x7f184008f000, 0x7f184008f000..0x7f18402b4000]);
        assert_eq!(read_only_mappings(MAPS, "/opt/a").count(), 0);
        assert_eq!(read_only_mappings("", "").count(), 0);
    }

    #[test]
    fn pieces_are_small_and_not_too_many() {
        for total in [0, 1 << 12, 3 << 20, 4 << 20, 5 << 20, 100 << 20, 1 << 30] {
            let piece = piece_len(total);
            assert!(piece >= PIECE && piece.is_multiple_of(4096) && total.div_ceil(piece) <= PIECES_MAX);
        }
        assert_eq!(piece_len(3 << 20), PIECE);
    }

    /// A private mapping of a file of some pages, each filled with its number.
    struct FileMapping {
        path: String,
        range: Range<usize>,
    }

    impl FileMapping {
        const PAGES: usize = 64;

        fn new(name: &str) -> Self {
            let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
            let bytes: Vec<u8> = (0..Self::PAGES).flat_map(|page| [page as u8; 4096]).collect();
            file.write_all_at(&bytes, 0).unwrap();
            let len = bytes.len();
            // SAFETY: the kernel chooses the address.
            let start = unsafe {
                mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file.as_fd(), 0)
            };
            let start = start.unwrap().expose_provenance();
            Self { path: format!("/memfd:{name} (deleted)"), range: start..start + len }
        }

        fn byte(&self, page: usize) -> u8 {
            let address = self.range.start + page * 4096;
            // SAFETY: inside the mapping, which nobody writes to at this moment.
            unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() }
        }

        /// Writes a byte, as a relocation or a breakpoint does, and makes the mapping read-only again.
        fn patch(&self, page: usize, byte: u8) {
            let start = std::ptr::with_exposed_provenance_mut::<u8>(self.range.start);
            // SAFETY: inside the mapping, which is this test's alone.
            unsafe {
                mprotect(start.cast(), self.range.len(), MprotectFlags::READ | MprotectFlags::WRITE).unwrap();
                start.add(page * 4096).write_volatile(byte);
                mprotect(start.cast(), self.range.len(), MprotectFlags::READ).unwrap();
            }
        }

        /// Bytes resident and, as far as the mapping goes, mappings.
        fn seen(&self) -> (Option<usize>, usize) {
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let resident = clean_resident_bytes(&pagemap, &self.range).unwrap();
            (resident, read_only_mappings(&maps, &self.path).count())
        }

        fn thin(&self) -> io::Result<usize> {
            thin(&std::fs::read_to_string("/proc/self/maps").unwrap(), &self.path)
        }
    }

    impl Drop for FileMapping {
        fn drop(&mut self) {
            let start = std::ptr::with_exposed_provenance_mut(self.range.start);
            // SAFETY: made by `new`, and no reference to it exists.
            unsafe { munmap(start, self.range.len()) }.unwrap();
        }
    }

    /// Goal:   R5.3: what nobody uses is not resident, and what is used comes back alone, with the same bytes.
    /// Method: a file of 64 pages is mapped like an executable and read; let go; then one page is read.
    #[test]
    fn r5_3_a_touched_page_brings_only_its_piece_back() {
        let mapping = FileMapping::new("thinned");
        for page in 0..FileMapping::PAGES {
            assert_eq!(mapping.byte(page), page as u8);
        }
        let len = mapping.range.len();
        assert_eq!(mapping.seen(), (Some(len), 1));
        assert_eq!(mapping.thin().unwrap(), len);
        assert_eq!(mapping.seen(), (Some(0), len / PIECE));
        assert_eq!(mapping.byte(33), 33);
        let (resident, _) = mapping.seen();
        assert!((1..=PIECE).contains(&resident.unwrap()), "{resident:?} bytes came with one");
        for page in 0..FileMapping::PAGES {
            assert_eq!(mapping.byte(page), page as u8);
        }
    }

    /// Goal:   a mapping that was written to keeps what was written: relocated data above all.
    /// Method: the same with one byte patched while the mapping was writable; nothing is let go or cut.
    #[test]
    fn r5_3_what_was_written_to_stays() {
        let mapping = FileMapping::new("patched");
        mapping.patch(40, 0xcc);
        assert_eq!(mapping.seen(), (None, 1));
        assert_eq!(mapping.thin().unwrap(), 0);
        assert_eq!(mapping.seen(), (None, 1));
        assert_eq!((mapping.byte(39), mapping.byte(40)), (39, 0xcc));
    }

    /// Goal:   a process goes on running in the executable that it has let go of, and does so once.
    /// Method: this one; then code that has not run yet formats, allocates, panics and unwinds.
    #[test]
    fn r5_3_a_process_thins_its_own_executable_once() {
        let let_go = thin_executable().unwrap();
        assert!(let_go > 0, "nothing of a running executable was resident");
        assert_eq!(thin_executable().unwrap(), 0);
        let caught = std::panic::catch_unwind(|| format!("{:?}", 1.5).parse::<u32>().unwrap());
        assert!(caught.is_err());
    }
}

//! What the binary is made of.

/// Type of the program header that names an ELF interpreter, elf(5).
const PT_INTERP: u32 = 3;

/// Goal:   the served binary is linked statically: a megabyte less resident (KERNEL, Process size). RUSTFLAGS
///         in the environment silently drop that setting; this test does not let them.
/// Method: its ELF program headers are read; none names an interpreter. The test program itself, built with
///         the same flags, is read by the same code, and so is the system's shell, which has one.
#[test]
fn r5_3_the_binary_has_no_elf_interpreter() {
    assert!(!has_interpreter(env!("CARGO_BIN_EXE_doorbell")), "the binary is not linked statically");
    let shell = std::fs::canonicalize("/bin/sh").unwrap();
    assert!(has_interpreter(shell.to_str().unwrap()), "this test does not find an interpreter where one is");
}

fn has_interpreter(path: &str) -> bool {
    let elf = std::fs::read(path).unwrap();
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01", "a 64-bit little-endian ELF file");
    let word = |at: usize, len: usize| {
        elf[at..at + len].iter().rev().fold(0usize, |word, byte| word << 8 | usize::from(*byte))
    };
    let (table, size, count) = (word(32, 8), word(54, 2), word(56, 2));
    assert!(count > 0, "an executable has program headers");
    (0..count).any(|i| word(table + i * size, 4) == PT_INTERP as usize)
}

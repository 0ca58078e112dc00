#!/bin/sh
# Runs what doorbell-shm does on the heap under Miri: undefined behaviour, data races, weak memory. Tests of
# real memfds are compiled out there (Miri knows no seals); racing payload copies, which exist by design
# between processes, are not among the tests. Concurrent tests run once per seed. Usage: ci/miri.sh [seeds]
set -eu
cd "$(dirname "$0")/.."
seeds=${1:-16}
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/miri"

rustup component add --toolchain nightly miri rust-src >/dev/null 2>&1 ||
    { echo "no nightly toolchain with Miri: rustup toolchain install nightly -c miri -c rust-src" >&2; exit 1; }
export RUSTFLAGS=--cap-lints=warn # a newer compiler may know more lints than the pinned one
# One thread: no weak memory, whose emulation gives up where a test scribbles with atomics of another size.
MIRIFLAGS=-Zmiri-disable-weak-memory-emulation \
    cargo +nightly miri test --quiet -p doorbell-shm --lib --test ring --test slots --test hostile
MIRIFLAGS=-Zmiri-disable-weak-memory-emulation \
    cargo +nightly miri test --quiet -p doorbell-shm --test layout golden
MIRIFLAGS="-Zmiri-many-seeds=0..$seeds" \
    cargo +nightly miri test --quiet -p doorbell-shm --test threads

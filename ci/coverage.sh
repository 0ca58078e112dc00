#!/bin/sh
# Line coverage of all tests (R5.7): a table, worst files first, and the share of every crate. Fails at 90 % or less in any.
# Not part of .ci/run: everything is built twice more, with counters. Usage: ci/coverage.sh [argument of cargo test ...]
set -eu
cd "$(dirname "$0")/.."
command -v cargo-llvm-cov >/dev/null || cargo install cargo-llvm-cov --locked
rustup component add llvm-tools >/dev/null 2>&1 || rustup component add llvm-tools-preview
# Counters lie in files that are mapped (%c), one for each executable (%m): what a process did before it was killed counts.
export RUSTFLAGS="-C llvm-args=-runtime-counter-relocation"
export LLVM_PROFILE_FILE_NAME="doorbell-%m%c.profraw"
cargo llvm-cov clean --workspace
# Where a test takes descriptors or rights away, the counters cannot be opened, and it fails on the words that say so: such
# tests do not matter here.
cargo llvm-cov --no-report --workspace --ignore-run-fail "$@"
# What is compiled in for them alone: points at which processes kill themselves.
cargo llvm-cov --no-report --ignore-run-fail -p doorbell-stress -p doorbell-shm \
    --features doorbell-stress/kill-points -- t9_ what_arms
cargo llvm-cov report -p doorbell -p doorbell-shm -p doorbell-uring -p doorbell-stress --json --output-path target/coverage.json --ignore-filename-regex '/(tests|benches|fuzz)/'
exec python3 ci/coverage.py target/coverage.json

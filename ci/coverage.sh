#!/bin/sh
# Line coverage of all tests (R5.7): a table, worst files first, and the share of every crate. Fails at 90 % or less in any.
# Not part of .ci/run: everything is built once more, with counters. Usage: ci/coverage.sh [argument of cargo test ...]
set -eu
cd "$(dirname "$0")/.."
command -v cargo-llvm-cov >/dev/null || cargo install cargo-llvm-cov --locked
rustup component add llvm-tools >/dev/null 2>&1 || rustup component add llvm-tools-preview
# Processes that are killed on purpose write no counters; those of servers that end by themselves count. Where a test takes
# descriptors or rights away, the counters cannot be written, and it fails on the words that say so: such tests do not matter here.
cargo llvm-cov --workspace --ignore-run-fail --json --output-path target/coverage.json \
    --ignore-filename-regex '/(tests|benches|fuzz)/' "$@"
exec python3 ci/coverage.py target/coverage.json

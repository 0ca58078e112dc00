#!/bin/sh
# Runs the loom models of shm/tests/loom.rs: every interleaving of the small cases. Arguments go to the tests.
# RUSTFLAGS replaces the flags of .cargo/config.toml, which is harmless: nothing here is served.
set -eu
cd "$(dirname "$0")/.."
export RUSTFLAGS="--cfg loom"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
export CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_PROFILE_DEV_DEBUG=0
exec cargo test --quiet -p doorbell-shm --test loom -- "$@"

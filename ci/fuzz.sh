#!/bin/sh
# Fuzzes the server's end of a lane (shm/fuzz). Usage: ci/fuzz.sh [seconds] [target]
# The corpus in shm/fuzz/corpus is read and not written; new inputs go to a scratch directory.
# `ci/fuzz.sh minimise [target]` merges what was found there into the corpus.
# cargo-fuzz sets RUSTFLAGS of its own, which drops crt-static: the address sanitizer refuses that.
set -eu
cd "$(dirname "$0")/../shm"
seconds=${1:-30}
target=${2:-consumer}
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/../target}/fuzz"
export RUSTFLAGS="--cap-lints=warn" # a newer compiler may know more lints than the pinned one
corpus=fuzz/corpus/$target
found=$CARGO_TARGET_DIR/found-$target
mkdir -p "$corpus" "$found"

if [ "$seconds" = minimise ]; then
    rm -rf "$found.min" && mkdir "$found.min"
    cargo +nightly fuzz run "$target" "$found.min" "$corpus" "$found" -- -merge=1 -max_len=512
    rm -rf "$corpus" && mv "$found.min" "$corpus"
    exit
fi
# Artifacts of a failure, with the input to replay it, go to shm/fuzz/artifacts.
exec cargo +nightly fuzz run "$target" "$found" "$corpus" -- \
    -max_total_time="$seconds" -max_len=512 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1

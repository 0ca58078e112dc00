#!/bin/sh
# Fuzzes what reads from untrusted peers: a server's end of a lane (shm/fuzz: consumer), the handshake and all that a
# session can ask of a core (stress/fuzz: handshake, session), the bodies of messages (json, rkyv), events from a
# provider (sse). Usage: ci/fuzz.sh [seconds] [target]; without a target each of them runs for so long.
# A target's corpus is read and not written; new inputs go to a scratch directory.
# `ci/fuzz.sh minimise [target]` merges what was found there into the corpus. `ci/fuzz.sh runs=100000000 consumer` is the long
# run: so many executions, without the address sanitizer, which makes them four times as fast.
# cargo-fuzz sets RUSTFLAGS of its own, which drops crt-static: the address sanitizer refuses that.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-30}
command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/fuzz"
export RUSTFLAGS="--cap-lints=warn" # a newer compiler may know more lints than the pinned one

# Where each target lies: the names of the files are those of the targets.
place_of() {
    for place in shm stress; do
        [ ! -f "$place/fuzz/fuzz_targets/$1.rs" ] || { echo "$place"; return; }
    done
    echo "no fuzz target is called $1" >&2
    exit 2
}

fuzz() (
    cd "$2"
    target=$1 corpus=fuzz/corpus/$1 found=$CARGO_TARGET_DIR/found-$1
    mkdir -p "$corpus" "$found"
    if [ "$seconds" = minimise ]; then
        rm -rf "$found.min" && mkdir "$found.min"
        cargo +nightly fuzz run "$target" "$found.min" "$corpus" "$found" -- -merge=1 -max_len=512
        rm -rf "$corpus" && mv "$found.min" "$corpus"
        return
    fi
    case $seconds in
    runs=*)
        cargo +nightly fuzz run --sanitizer none "$target" "$found" "$corpus" -- \
            "-$seconds" -max_len=192 -timeout=5 -print_final_stats=1
        return
        ;;
    esac
    # Artifacts of a failure, with the input to replay it, go to fuzz/artifacts beside the targets.
    cargo +nightly fuzz run "$target" "$found" "$corpus" -- \
        -max_total_time="$seconds" -max_len=512 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1
)

if [ $# -ge 2 ]; then
    place=$(place_of "$2")
    fuzz "$2" "$place"
    exit
fi
for file in shm/fuzz/fuzz_targets/*.rs stress/fuzz/fuzz_targets/*.rs; do
    target=$(basename "$file" .rs)
    echo "fuzzing $target"
    fuzz "$target" "${file%%/*}"
done

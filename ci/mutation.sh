#!/bin/sh
# Mutation testing by cargo-mutants of what everything stands on: rings, bells and slot tables of doorbell-shm, and the
# classifier of calls whose session is over. Mutants that tests do not notice are tried against the loom models, too, which
# alone see orderings. Those that change nothing anybody could notice stand in .cargo/mutants.toml, each with its reason.
# Fails if any other survives. Not part of .ci/run: 20 minutes to half an hour on two cores. Usage: ci/mutation.sh [shm | classifier]
set -eu
cd "$(dirname "$0")/.."
command -v cargo-mutants >/dev/null || cargo install cargo-mutants --locked
export CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_DEV_OPT_LEVEL=1
out=target/cargo-mutants

# mutate DIRECTORY ARGUMENT ...: what survived, one a line, is then in $out/DIRECTORY/mutants.out/missed.txt.
mutate() {
    directory=$out/$1
    shift
    mkdir -p "$directory"
    # 2: some survived; 3: some ran into the time limit, which is a way of being noticed.
    status=0
    cargo mutants --output "$directory" --cap-lints=true --jobs "$(nproc)" --timeout 120 --colors never "$@" || status=$?
    case $status in 0 | 2 | 3) ;; *) exit "$status" ;; esac
}

shm() {
    rm -rf "$out/shm"
    set -- --package doorbell-shm --file shm/src/ring.rs --file shm/src/bell.rs --file shm/src/slots.rs
    mutate shm "$@"
    cp "$out/shm/mutants.out/missed.txt" "$out/unnoticed"
    [ -s "$out/unnoticed" ] || return 0
    # What hung before is tried again, too, and may pass now: only what neither noticed has survived.
    RUSTFLAGS="--cfg loom" mutate shm --iterate "$@" -- --test loom
    found=$out/shm/mutants.out/missed.txt
    grep -F -x -f "$out/unnoticed" "$found" >"$found.both" || :
    mv "$found.both" "$found"
}

classifier() {
    rm -rf "$out/classifier"
    # Building takes longer than its tests do.
    CARGO_PROFILE_DEV_OPT_LEVEL=0 mutate classifier --package doorbell --no-default-features \
        --file src/client/classify.rs -- --lib client::classify
}

case ${1:-both} in
    both) shm && classifier ;;
    shm | classifier) "$1" ;;
    *) echo "ci/mutation.sh: shm or classifier, not $1" >&2 && exit 2 ;;
esac
case ${1:-both} in
    both) survivors=$(cat "$out/shm/mutants.out/missed.txt" "$out/classifier/mutants.out/missed.txt") ;;
    *) survivors=$(cat "$out/$1/mutants.out/missed.txt") ;;
esac
[ -z "$survivors" ] || { printf 'survived:\n%s\n' "$survivors" >&2; exit 1; }
echo "every mutant was noticed"

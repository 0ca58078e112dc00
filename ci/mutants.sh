#!/usr/bin/env bash
# Weakens each ordering of doorbell-shm in copies of the tree and expects a loom model to fail. A mutant that
# survives, no longer applies or no longer compiles fails the run. As many at once as there are cores.
# Usage: ci/mutants.sh [quick] [list ...]; `quick` takes every twelfth, which ones differs from commit to commit.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."
. ci/mutants/plant.sh
step=1 first=0
if [ "${1:-}" = quick ]; then
    shift
    step=12 first=$(($(git rev-list --count HEAD 2>/dev/null || echo 0) % 12))
fi
[ $# -gt 0 ] || set -- ci/mutants/!(faults|simulation).txt # those are other scripts'

export RUSTFLAGS="--cfg loom"
# Directories of their own: cargo would take the artifacts of a mutant for those of the real tree.
targets="${CARGO_TARGET_DIR:-$PWD/target}/mutants"
export CARGO_PROFILE_DEV_OPT_LEVEL=1
export CARGO_PROFILE_DEV_DEBUG=0

work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
mapfile -t mutants < <(cat "$@" | grep -v -e '^#' -e '^$' | awk -v s="$step" -v f="$first" 'NR % s == f % s')

# models TREE SECONDS [ARGUMENT ...]
models() {
    local tree=$1 limit=$2 && shift 2
    (cd "$tree" && timeout "$limit" cargo test --quiet -p doorbell-shm --test loom "$@") >"$tree.log" 2>&1
}

judge() {
    if ! plant "shm/src/$file" "$nth" >"$tree/shm/src/$file"; then
        echo "DOES NOT APPLY"
    elif ! models "$tree" 120 --no-run; then
        cat "$tree.log" >&2
        echo "DOES NOT COMPILE"
    else
        local status=0
        models "$tree" 60 || status=$?
        case $status in 0) echo SURVIVED ;; 124) echo "TIMED OUT" ;; *) echo killed ;; esac
    fi
}

# Takes every mutant whose turn it is: worker W of N.
worker() {
    local number=$1 workers=$2 tree=$work/$1 i entry line replacement place file nth
    export CARGO_TARGET_DIR=$targets/$number
    mkdir "$tree"
    tar -c --exclude=./target --exclude=./.git --exclude=./shm/fuzz . | tar -x -C "$tree"
    find "$tree/shm" -name '*.rs' -exec touch {} + # newer than whatever an earlier run has built
    # A weakened line may leave an import unused.
    sed -i 's/^warnings = "deny"/warnings = "allow"/' "$tree/Cargo.toml"
    # Without a mutant the models pass; this also builds what all mutants share.
    models "$tree" 300 || { cat "$tree.log"; echo "the models fail without any mutant" >&2; return 1; }
    for ((i = number; i < ${#mutants[@]}; i += workers)); do
        entry=${mutants[i]/ | | / |  | }
        place=$(field 1) line=$(field 2) replacement=$(field 3)
        file=${place%%#*}
        case $place in *'#'*) nth=${place#*#} ;; *) nth=1 ;; esac
        printf '%-16s %s: %s\n' "$(judge)" "$file" "$(field 4)" | tee -a "$work/verdicts"
        cp "shm/src/$file" "$tree/shm/src/$file"
    done
}

workers=$(nproc)
pids=()
for ((w = 0; w < workers; w++)); do
    worker "$w" "$workers" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
killed=$(grep -c '^killed ' "$work/verdicts" || true)
echo "$killed mutants killed, $((${#mutants[@]} - killed)) not"
[ "$killed" -gt 0 ] && [ "$killed" -eq ${#mutants[@]} ]

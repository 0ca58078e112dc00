#!/usr/bin/env bash
# Plants the bugs of ci/simulation-mutants.txt in a copy of the tree, one at a time, and expects the simulation to find each
# within 3000 seeds of 600 steps. A bug that is not found, no longer applies or no longer compiles fails the run.
# Usage: ci/simulation-mutants.sh [FIRST [LAST]]: all of them, or those of these numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
first=${1:-1} last=${2:-999}
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/simulation-mutants"
export CARGO_PROFILE_SIMULATION_OPT_LEVEL=1 CARGO_INCREMENTAL=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -c --exclude=./target --exclude=./.git . | tar -x -C "$work"
# A planted bug may leave something unused.
sed -i 's/^warnings = "deny"/warnings = "allow"/' "$work/Cargo.toml"
mapfile -t mutants < <(grep -v -e '^#' -e '^$' ci/simulation-mutants.txt)

field() { printf '%s\n' "$entry" | awk -F' [|] ' -v n="$1" '{ gsub(/\\[|]/, "\1"); $0 = $0; gsub(/\1/, "|", $n); print $n }'; }

# The first line of a file that reads LINE, or the nth such, is replaced.
plant() {
    LINE=$line WITH=$replacement awk -v nth="$nth" '
        { bare = $0; sub(/^ +/, "", bare) }
        bare == ENVIRON["LINE"] && ++seen == nth { print ENVIRON["WITH"]; done = 1; next }
        { print }
        END { exit !done }' "$file" >"$work/$file"
}

simulate() {
    (cd "$work" && timeout "$1" cargo test --quiet --lib --no-default-features --profile simulation "${@:2}") >"$work.log" 2>&1
}

judge() {
    export DOORBELL_SEED=0 DOORBELL_SEEDS=3000 DOORBELL_EVENTS=600
    if ! plant; then
        echo "DOES NOT APPLY"
    elif ! simulate 300 --no-run; then
        cat "$work.log" >&2
        echo "DOES NOT COMPILE"
    else
        local status=0
        simulate 60 simulation_of_many_seeds -- --ignored --nocapture || status=$?
        case $status in 0) echo SURVIVED ;; 124) echo "TIMED OUT" ;; *) echo found ;; esac
    fi
}

found=0 tried=0
for i in "${!mutants[@]}"; do
    [ $((i + 1)) -ge "$first" ] && [ $((i + 1)) -le "$last" ] || continue
    entry=${mutants[i]/ | | / |  | }
    place=$(field 1) line=$(field 2) replacement=$(field 3)
    file=${place%%#*}
    case $place in *'#'*) nth=${place#*#} ;; *) nth=1 ;; esac
    verdict=$(judge)
    seed=$(grep -a -o -m1 'seed [0-9]*, event [0-9]*' "$work.log" || :)
    printf '%2d %-16s %s: %s (%s)\n' "$((i + 1))" "$verdict" "$file" "$(field 4)" "$seed"
    cp "$file" "$work/$file"
    touch "$work/$file"
    tried=$((tried + 1))
    [ "$verdict" != found ] || found=$((found + 1))
done
rm -f "$work.log"
echo "$found bugs found, $((tried - found)) not"
[ "$found" -gt 0 ] && [ "$found" -eq "$tried" ]

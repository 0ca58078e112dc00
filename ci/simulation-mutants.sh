#!/usr/bin/env bash
# Plants the bugs of ci/mutants/simulation.txt in a copy of the tree, one at a time, and expects the simulation to find each
# within 3000 seeds of 600 steps. A bug that is not found, no longer applies or no longer compiles fails the run, but for those
# of which the list says why they are not found here.
# Usage: ci/simulation-mutants.sh [FIRST [LAST]]: all of them, or those of these numbers;
#        ci/simulation-mutants.sh --check: only whether each has its line; compiles nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/mutants/plant.sh
mapfile -t mutants < <(grep -v -e '^#' -e '^$' ci/mutants/simulation.txt)

# take I: the fields of the Ith mutant.
take() {
    entry=${mutants[$1]/ | | / |  | }
    place=$(field 1) line=$(field 2) replacement=$(field 3)
    file=${place%%#*}
    case $place in *'#'*) nth=${place#*#} ;; *) nth=1 ;; esac
}

if [ "${1:-}" = --check ]; then
    bad=0
    for i in "${!mutants[@]}"; do
        take "$i"
        plant "$file" "$nth" >/dev/null || { echo "$file has no line that reads: $line" && bad=1; }
    done
    exit $bad
fi
first=${1:-1} last=${2:-999}
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/simulation-mutants"
export CARGO_PROFILE_SIMULATION_OPT_LEVEL=1 CARGO_INCREMENTAL=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -c --exclude=./target --exclude=./.git . | tar -x -C "$work"
# A planted bug may leave something unused.
sed -i 's/^warnings = "deny"/warnings = "allow"/' "$work/Cargo.toml"

simulate() {
    (cd "$work" && timeout "$1" cargo test --quiet --lib --no-default-features --profile simulation "${@:2}") >"$work.log" 2>&1
}

export DOORBELL_SEED=0 DOORBELL_SEEDS=3000 DOORBELL_EVENTS=600
many=(simulation_of_many_seeds -- --ignored --nocapture)
# With nothing planted no seed fails, or what is found later would tell nothing.
simulate 600 "${many[@]}" || { cat "$work.log" >&2; echo "a seed fails with nothing planted" >&2; exit 1; }

judge() {
    if ! plant "$file" "$nth" >"$work/$file"; then
        echo "DOES NOT APPLY"
    elif ! simulate 300 --no-run; then
        cat "$work.log" >&2
        echo "DOES NOT COMPILE"
    else
        local status=0
        simulate 120 "${many[@]}" || status=$?
        case $status in
        0) echo SURVIVED ;;
        124) echo "TIMED OUT" ;;
        *) if grep -a -q '^seed [0-9]*, event' "$work.log"; then echo found; else echo "FAILS OTHERWISE"; fi ;;
        esac
    fi
}

found=0 tried=0 known=0
for i in "${!mutants[@]}"; do
    [ $((i + 1)) -ge "$first" ] && [ $((i + 1)) -le "$last" ] || continue
    take "$i"
    verdict=$(judge)
    seed=$(grep -a -o -m1 'seed [0-9]*, event [0-9]*' "$work.log" || :)
    printf '%2d %-16s %s: %s (%s)\n' "$((i + 1))" "$verdict" "$file" "$(field 4)" "$seed"
    cp "$file" "$work/$file"
    touch "$work/$file"
    why=$(field 5)
    if [ "$verdict" = SURVIVED ] && [ -n "$why" ]; then
        echo "   as known: $why"
        known=$((known + 1))
    else
        tried=$((tried + 1))
    fi
    [ "$verdict" != found ] || found=$((found + 1))
done
rm -f "$work.log"
echo "$found bugs found, $((tried - found)) not, $known not to be found here"
[ $((found + known)) -gt 0 ] && [ "$found" -eq "$tried" ]

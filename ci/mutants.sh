#!/bin/sh
# Weakens each ordering of doorbell-shm in a copy of the tree and expects a loom model to fail. A mutant that
# survives, no longer applies or no longer compiles fails the run. Usage: ci/mutants.sh [list ...]
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- ci/mutants/*.txt

export RUSTFLAGS="--cfg loom"
# A directory of its own: cargo would take the artifacts of a mutant for those of the real tree.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/mutants"
export CARGO_PROFILE_DEV_OPT_LEVEL=1
export CARGO_PROFILE_DEV_DEBUG=0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
tree=$work/tree
mkdir "$tree"
tar -c --exclude=./target --exclude=./.git --exclude=./shm/fuzz . | tar -x -C "$tree"
find "$tree/shm" -name '*.rs' -exec touch {} + # newer than whatever an earlier run has built
cp -r "$tree/shm/src" "$work/src"
# A weakened line may leave an import unused.
sed -i 's/^warnings = "deny"/warnings = "allow"/' "$tree/Cargo.toml"

models() {
    limit=$1 && shift
    (cd "$tree" && timeout "$limit" cargo test --quiet -p doorbell-shm --test loom "$@") >"$work/log" 2>&1
}

# Without a mutant the models pass; this also builds what all mutants share.
models 300 || { cat "$work/log"; echo "the models fail without any mutant" >&2; exit 1; }

killed=0 bad=0
field() { printf '%s\n' "$entry" | awk -F' [|] ' -v n="$1" '{ gsub(/\\[|]/, "\1"); $0 = $0; gsub(/\1/, "|", $n); print $n }'; }
for list in "$@"; do
    while IFS= read -r entry; do
        case $entry in '' | '#'*) continue ;; esac
        entry=$(printf '%s\n' "$entry" | sed 's/ | | / |  | /')
        place=$(field 1) line=$(field 2) replacement=$(field 3) name=$(field 4)
        file=${place%%#*}
        case $place in *'#'*) nth=${place#*#} ;; *) nth=1 ;; esac
        if ! LINE=$line WITH=$replacement awk -v nth="$nth" '
            { bare = $0; sub(/^ +/, "", bare) }
            bare == ENVIRON["LINE"] && ++seen == nth { print ENVIRON["WITH"]; done = 1; next }
            { print }
            END { exit !done }' "$work/src/$file" >"$tree/shm/src/$file"; then
            verdict="DOES NOT APPLY" bad=$((bad + 1))
        elif ! models 120 --no-run; then
            cat "$work/log"
            verdict="DOES NOT COMPILE" bad=$((bad + 1))
        else
            status=0
            models 60 || status=$?
            case $status in
                0) verdict="SURVIVED" bad=$((bad + 1)) ;;
                124) verdict="TIMED OUT" bad=$((bad + 1)) ;;
                *) verdict=killed killed=$((killed + 1)) ;;
            esac
        fi
        printf '%-16s %s: %s\n' "$verdict" "$file" "$name"
        cp "$work/src/$file" "$tree/shm/src/$file"
    done <"$list"
done
echo "$killed mutants killed, $bad not"
[ "$bad" -eq 0 ] && [ "$killed" -gt 0 ]

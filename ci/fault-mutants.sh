#!/usr/bin/env bash
# Takes away, one at a time, what stands against each fault (ci/mutants/faults.txt) in a copy of the tree, and expects the
# test of that row to fail, or to hang. A mutant that survives, no longer applies or no longer compiles fails the run.
# Usage: ci/fault-mutants.sh [row ...]   those rows, or all; what has been found is not tried again while the
#                                        mutant, its file and its test are as they were
#        ci/fault-mutants.sh --check     only: every mutant has its line and its test; compiles nothing
#        ci/fault-mutants.sh --table     the table of docs/reliability.md
# What was built stays, so a mutant costs what it changes. Delete target/fault-mutants/state to begin anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/mutants/plant.sh
list=ci/mutants/faults.txt
home=${CARGO_TARGET_DIR:-$PWD/target}/fault-mutants
tree=$home/tree state=$home/state

# The fields of all mutants behind their number, a tab between any two.
mutants() {
    sed -e '/^#/d' -e '/^$/d' -e 's/ | | / |  | /g' "$list" | awk -v OFS='\t' '
        { gsub(/\\[|]/, "\1"); fields = split($0, field, " [|] ") }
        fields != 6 { print "not six fields: " $0 > "/dev/stderr"; exit 1 }
        { if (split(field[2], place, "#") < 2) place[2] = 1
          if (field[4] == "") field[4] = " "
          line = NR OFS field[1] OFS place[1] OFS place[2]
          for (i = 3; i <= 6; i++) line = line OFS field[i]
          gsub("\1", "|", line); print line }'
}

# Where the test may stand that the arguments of cargo select.
place_of_test() {
    local folder=. target=''
    while [ $# -gt 1 ]; do
        case $1 in
        -p) folder=${2#doorbell-} && shift ;;
        --test) target=$2 && shift ;;
        esac
        shift
    done
    if [ -n "$target" ]; then echo "$folder/tests/$target.rs"; else echo "$folder/src"; fi
}

fields=(number row file nth line replacement test name)
all=$(mutants) # the same all the time, whatever becomes of the file
if [ "${1:-}" = --check ]; then
    bad=0
    while IFS=$'\t' read -r "${fields[@]}"; do
        plant "$file" "$nth" >/dev/null || { echo "$row ($name): $file has no such line" && bad=1; }
        # shellcheck disable=SC2046,SC2086 # arguments
        grep -rq "^ *fn ${test##* }(" $(place_of_test $test) || { echo "$row ($name): there is no such test" && bad=1; }
    done <<<"$all"
    exit $bad
fi

if [ "${1:-}" = --table ]; then
    awk -F'\t' '{ sub(/.* /, "", $7); printf "| %s | `%s` | %s |\n", $2, $7, $8 }' <<<"$all"
    exit
fi

export CARGO_TARGET_DIR=$home/build CARGO_PROFILE_DEV_DEBUG=0
trap 'exit 1' INT TERM
mkdir -p "$tree" "$home/logs"
exec 9>"$home/lock"
flock -n 9 || { echo "another run is under way" >&2 && exit 1; }

# Brings the copy up to date. A file that is as it was keeps its time, so that nothing is built twice.
while IFS= read -r -d '' path; do
    cmp -s "$path" "$tree/$path" || { mkdir -p "$tree/${path%/*}" && cp "$path" "$tree/$path"; }
done < <(find . \( -name target -o -name .git -o -path ./shm/fuzz -o -path ./stress/fuzz \) -prune \
    -o -type f ! -path ./Cargo.toml -print0)
while IFS= read -r -d '' path; do
    [ -e "$path" ] || rm "$tree/$path"
done < <(cd "$tree" && find . -type f -print0)
# What is taken away may have been the last use of something.
sed 's/^warnings = "deny"/warnings = "allow"/' Cargo.toml >"$home/Cargo.toml"
cmp -s "$home/Cargo.toml" "$tree/Cargo.toml" || cp "$home/Cargo.toml" "$tree/Cargo.toml"

# cargo_test SECONDS ARGUMENT ...: in the copy; what it says goes to the log.
cargo_test() {
    local limit=$1 && shift
    (cd "$tree" && timeout -k 5 "$limit" cargo test --locked --quiet "$@") >"$log" 2>&1 </dev/null 9>&-
}

# What becomes of the test in the copy as it is.
judge() {
    local status=0
    # shellcheck disable=SC2086 # arguments
    cargo_test 900 ${test% *} --no-run || { echo "DOES NOT COMPILE" && return; }
    # shellcheck disable=SC2086 # arguments
    cargo_test 60 $test || status=$?
    case $status in
    0) if grep -q '^test result: ok. [1-9]' "$log"; then echo passes; else echo "NO SUCH TEST"; fi ;;
    124 | 137) echo hangs ;;
    *) echo fails ;;
    esac
}

count=0 known=0
todo=() failures=()
while IFS=$'\t' read -r "${fields[@]}"; do
    case " $* " in "  " | *" $row "*) ;; *) continue ;; esac
    count=$((count + 1))
    # shellcheck disable=SC2046,SC2086 # arguments
    place=$(place_of_test $test)
    [ -f "$place" ] || place=$file
    key=$({ cat "$file" "$place" && echo "$file $nth $line $replacement $test"; } | sha256sum | cut -c1-20)
    if grep -q "^$key " "$state" 2>/dev/null; then known=$((known + 1)); else todo+=("$number $key"); fi
done <<<"$all"

# Twice over all: first without the mutants, where each test passes, or its failure would tell nothing.
for mutated in no yes; do
    while IFS=$'\t' read -r "${fields[@]}"; do
        for one in ${todo[@]+"${todo[@]}"}; do
            [ "${one% *}" = "$number" ] || continue
            began=$SECONDS log=$home/logs/$row.$number.$mutated
            if [ $mutated = no ]; then
                verdict=$(judge)
                printf '%-4s %-16s %3s s  %s\n' "$row" "$verdict" $((SECONDS - began)) "${test##* } without a mutant"
                [ "$verdict" = passes ] || failures+=("$row: the test $verdict without a mutant: ${test##* }")
                continue
            fi
            if plant "$file" "$nth" >"$home/mutant"; then
                cp "$home/mutant" "$tree/$file"
                verdict=$(judge)
                cp "$file" "$tree/$file"
            else
                verdict="DOES NOT APPLY"
            fi
            case $verdict in
            fails | hangs) echo "${one#* } $row" >>"$state" ;;
            passes) verdict=SURVIVED && failures+=("$row SURVIVED: $name") ;;
            *) failures+=("$row $verdict: $name") ;;
            esac
            printf '%-4s %-16s %3s s  %s: %s\n' "$row" "$verdict" $((SECONDS - began)) "${test##* }" "$name"
        done
    done <<<"$all"
    [ ${#failures[@]} -eq 0 ] || [ $mutated = yes ] || { printf '%s\n' "${failures[@]}" && exit 1; }
done
echo "$((count - ${#failures[@]})) of $count mutants found, $known of them before"
[ ${#failures[@]} -eq 0 ] || printf '%s\n' "${failures[@]}" "what cargo said is in $home/logs"
[ $count -gt 0 ] && [ ${#failures[@]} -eq 0 ]

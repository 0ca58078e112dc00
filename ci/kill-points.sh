#!/bin/sh
# Has clients and servers kill themselves at each labelled point once, and checks what is left (FAULTS T9). Needs some
# 15 seconds beside the build, which is one of its own: the points are compiled in by a feature.
# Usage: ci/kill-points.sh [arguments of `doorbell-stress kill-points`]; in full, some six minutes:
#   ci/kill-points.sh --count 185 --state target/kill-points.json
set -eu
cd "$(dirname "$0")/.."
profile=--release
if [ $# -eq 0 ]; then
    # Assertions are checked. A bystander may wait: this may run beside other work.
    profile=
    # Both signals, going on from saved counts, and what arms a point.
    cargo test --quiet -p doorbell-stress -p doorbell-shm --features doorbell-stress/kill-points -- t9_ what_arms
    set -- --count 1 --signal kill --patience-ms 5000
fi
# shellcheck disable=SC2086
exec cargo run --quiet $profile -p doorbell-stress --features kill-points -- kill-points "$@"

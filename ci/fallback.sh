#!/bin/sh
# Runs the integration tests again where io_uring is refused with EPERM, as the default seccomp profile of container
# engines does: the server then waits with epoll (F38). Usage: ci/fallback.sh [quick | all] [arguments for cargo test]
# `quick`, which CI runs, takes the test programs that ring, wait, die, attack and hand answers over; `all` takes every
# one of the server and its clients.
set -eu
cd "$(dirname "$0")/.."
ci/setup.sh
part=${1:-quick}
[ $# -eq 0 ] || shift

quick="call bodies lanes death deferred hostile hostile_bodies limits socket"
case $part in
quick) programs=$quick ;;
all) programs="$quick allocations analyze async_client callback_client command conversations fallback files handshake memory
    providers streams" ;;
*) echo "ci/fallback.sh: quick or all, not $part" >&2 && exit 2 ;;
esac

tests=
for program in $programs; do tests="$tests --test $program"; done
# Built outside: only what runs is refused anything.
# shellcheck disable=SC2086
cargo test --no-run $tests
# tests/files.rs tries the ring's own reads.
# shellcheck disable=SC2086
exec cargo run --quiet --package doorbell-stress -- without-io-uring cargo test $tests "$@"

#!/bin/sh
# Builds the command, starts a server, answers real requests with it on the screen, and stops it.
set -eu
cd "$(dirname "$0")/.."
ci/setup.sh build
cargo build --release --bin doorbell

doorbell=target/x86_64-unknown-linux-gnu/release/doorbell
directory=$(mktemp -d)
socket=$directory/doorbell.sock
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; wait; rm -rf "$directory"' EXIT
trap 'exit 1' INT TERM

"$doorbell" serve --socket "$socket" &
server=$!
tries=0
until [ -S "$socket" ]; do
    kill -0 "$server" 2>/dev/null || { echo "the server did not start" >&2; exit 1; }
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { echo "the server's socket did not appear within 10 s" >&2; exit 1; }
    sleep 0.1
done

show() {
    echo
    echo "\$ doorbell $*"
    "$doorbell" "$@" --socket "$socket"
}
show call --type ping
show call --type echo --json examples/chat.json
echo
echo "\$ every line of tests/data/airequest_vectors.jsonl, echoed and compared"
answered=0
while IFS= read -r request; do
    answer=$(printf '%s\n' "$request" | "$doorbell" call --type echo --json - --socket "$socket")
    [ "$answer" = "$request" ] || { echo "not what was sent: $answer" >&2; exit 1; }
    answered=$((answered + 1))
done <tests/data/airequest_vectors.jsonl
echo "$answered requests answered, byte for byte"
show call --type stats
echo
kill "$server"
wait "$server"
server=

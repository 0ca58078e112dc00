#!/bin/sh
# Judges the dependencies by deny.toml: licences, bans, sources, and known vulnerabilities where their list can be had.
# Installs cargo-deny if it is not there. Usage: ci/deny.sh [arguments for cargo deny]
set -eu
cd "$(dirname "$0")/.."
command -v cargo-deny >/dev/null || cargo install cargo-deny --locked
cargo deny check --hide-inclusion-graph "$@" licenses bans sources
# The list lies in a repository of its own, which cannot be reached from everywhere.
if cargo deny fetch db >/dev/null 2>&1; then
    cargo deny check --hide-inclusion-graph "$@" advisories
else
    echo "ci/deny.sh: the list of vulnerabilities cannot be had here: not judged" >&2
fi

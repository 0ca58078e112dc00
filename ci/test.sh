#!/bin/sh
# Runs all tests of the workspace.
set -eu
cd "$(dirname "$0")/.."
ci/setup.sh
exec cargo test --workspace "$@"

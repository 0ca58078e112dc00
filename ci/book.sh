#!/bin/sh
# Renders the book of docs/ into target/book; installs mdBook if it is not there.
set -eu
cd "$(dirname "$0")/.."
command -v mdbook >/dev/null || cargo install mdbook --locked
mdbook build docs
echo "target/book/index.html"

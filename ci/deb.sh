#!/bin/sh
# Builds the Debian package: the release binary, what it says of itself for shells and readers, units, documents.
# Needs cargo-deb (`cargo install cargo-deb`). The package lies in target/x86_64-unknown-linux-gnu/debian.
set -eu
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-gnu
cargo build --release --bin doorbell
doorbell=target/$target/release/doorbell
dist=target/dist
rm -rf "$dist"
mkdir -p "$dist/man"
"$doorbell" man "$dist/man"
"$doorbell" completions bash >"$dist/doorbell.bash"
"$doorbell" completions fish >"$dist/doorbell.fish"
"$doorbell" completions zsh >"$dist/_doorbell"
cargo deb --no-build --target "$target"

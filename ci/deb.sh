#!/bin/sh
# Builds the Debian package: the release binary, what it says of itself for shells and readers, units, documents.
# Installs cargo-deb if it is not there. The package lies in target/x86_64-unknown-linux-gnu/debian.
set -eu
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-gnu
command -v cargo-deb >/dev/null || cargo install cargo-deb --locked
cargo build --release --bin doorbell
doorbell=target/$target/release/doorbell
dist=target/dist
rm -rf "$dist"
mkdir -p "$dist/man"
"$doorbell" man "$dist/man"
"$doorbell" completions bash >"$dist/doorbell.bash"
"$doorbell" completions fish >"$dist/doorbell.fish"
"$doorbell" completions zsh >"$dist/_doorbell"
# Without its debug information, which is four fifths of it.
cargo deb --no-build --strip --target "$target"

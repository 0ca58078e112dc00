#!/bin/sh
# Installs what is needed and not there; says nothing when there is nothing to do.
# Usage: ci/setup.sh [build | test | ci]
#   build  a C linker, and Rust as rust-toolchain.toml names it: what ci/first-run.sh needs
#   test   strace, python3 and promtool beside, and Rust's formatter and linter: what ci/test.sh needs (the default)
#   ci     a C++ compiler for the fuzzer, and a nightly toolchain with Miri beside: what .ci/run needs
set -eu
cd "$(dirname "$0")/.."
for_what=${1:-test}
case $for_what in build | test | ci) ;; *) echo "ci/setup.sh: build, test or ci, not $for_what" >&2 && exit 2 ;; esac

# need PROGRAM PACKAGE WHY
need() {
    command -v "$1" >/dev/null 2>&1 && return
    echo "installing $2: $3" >&2
    apt-get update -qq
    apt-get install -y -qq "$2" >/dev/null
}

# Of Debian's package of Prometheus this one program: the server would be started.
install_promtool() (
    echo "installing promtool, which judges metrics and alert rules" >&2
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch"
    apt-get update -qq
    cd "$scratch"
    apt-get download -qq prometheus >/dev/null
    dpkg-deb -x prometheus_*.deb .
    install usr/bin/promtool /usr/local/bin/promtool
)

need cc build-essential "a C linker"
if ! command -v cargo >/dev/null 2>&1; then
    echo "Rust is missing: install rustup (apt-get install rustup, or rustup.rs), then run this again" >&2
    exit 1
fi
cargo --version >/dev/null 2>&1 || rustup toolchain install
[ "$for_what" != build ] || exit 0

need strace strace "tests make system calls fail by it"
need python3 python3 "the client in another language, and the scripts of benches/"
command -v promtool >/dev/null 2>&1 || install_promtool
cargo-fmt --version >/dev/null 2>&1 || rustup component add rustfmt
cargo-clippy --version >/dev/null 2>&1 || rustup component add clippy
[ "$for_what" != test ] || exit 0

need c++ g++ "the fuzzer's own library is built by it"
cargo +nightly miri --version >/dev/null 2>&1 ||
    rustup toolchain install nightly --profile minimal --component miri --component rust-src

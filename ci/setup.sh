#!/bin/sh
# Installs what building and testing need and is not there: a C linker, strace, python3, promtool, Rust with its formatter
# and linter.
# Run by ci/first-run.sh and ci/test.sh; says nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/.."

if ! command -v cc >/dev/null 2>&1; then
    echo "installing a C linker (build-essential)" >&2
    apt-get update -qq && apt-get install -y -qq build-essential >/dev/null
fi
if ! command -v strace >/dev/null 2>&1; then
    echo "installing strace, by which tests make system calls fail" >&2
    apt-get update -qq && apt-get install -y -qq strace >/dev/null
fi
if ! command -v python3 >/dev/null 2>&1; then
    echo "installing python3, for the client in another language and the scripts of benches/" >&2
    apt-get update -qq && apt-get install -y -qq python3 >/dev/null
fi
if ! command -v promtool >/dev/null 2>&1; then
    echo "installing promtool, which judges metrics and alert rules" >&2
    # Of Debian's package of Prometheus this one program: the server would be started.
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch"
    apt-get update -qq
    (cd "$scratch" && apt-get download -qq prometheus >/dev/null && dpkg-deb -x prometheus_*.deb .)
    install "$scratch/usr/bin/promtool" /usr/local/bin/promtool
fi
if ! command -v cargo >/dev/null 2>&1; then
    echo "Rust is missing: install rustup (apt-get install rustup, or rustup.rs), then run this again" >&2
    exit 1
fi
# The toolchain that rust-toolchain.toml names, with its components.
if ! cargo --version >/dev/null 2>&1; then
    rustup toolchain install
fi
for component in rustfmt clippy; do
    case $component in rustfmt) tool=cargo-fmt ;; *) tool=cargo-clippy ;; esac
    "$tool" --version >/dev/null 2>&1 || rustup component add "$component"
done

#!/bin/sh
# Installs what the peers need and is not there: Node.js, and for Aeron clang, a CMake of 3.30 or later, and two libraries.
# What is missing in the end is left out of the comparison, and said so.
set -u
cd "$(dirname "$0")/../.."
missing=
command -v node >/dev/null || missing="$missing nodejs"
command -v clang >/dev/null || missing="$missing clang libclang-dev"
[ -f /usr/include/uuid/uuid.h ] || missing="$missing uuid-dev"
[ -d /usr/include/bsd ] || missing="$missing libbsd-dev"
# shellcheck disable=SC2086 # several words
[ -z "$missing" ] || { apt-get update -qq && apt-get install -y -qq $missing >/dev/null; }
cmake=target/peers-cmake/bin/cmake
[ -x "$cmake" ] || { python3 -m venv target/peers-cmake && target/peers-cmake/bin/pip install --quiet cmake; }

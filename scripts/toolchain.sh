#!/usr/bin/env bash
# Says in one sentence what a machine lacks to build Fullbore.
set -euo pipefail
fail() { echo "fullbore: $*" >&2; exit 1; }
command -v cc >/dev/null && command -v c++ >/dev/null || fail "no C and C++ compiler found; on Debian: apt-get install build-essential"
command -v python3 >/dev/null && python3 -m pip --version >/dev/null 2>&1 || fail "no pip found; on Debian: apt-get install python3-pip"
command -v cargo >/dev/null || fail "cargo was not found; install Rust 1.88 or newer with rustup"
version=$(cargo --version | cut -d' ' -f2)
minor=$(echo "$version" | cut -d. -f2)
[ "${version%%.*}" -gt 1 ] || [ "$minor" -ge 88 ] || fail "cargo is $version; Fullbore needs Rust 1.88 or newer (rustup update stable)"

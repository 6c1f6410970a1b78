#!/usr/bin/env bash
# The test command behind `make test`, step by step; it fails at the first step that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { echo; echo "== $* ($(date +%H:%M:%S))"; }

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --locked --workspace --all-targets -- -D warnings

step "build"
# As `cargo test` builds below, so that nothing is compiled twice.
cargo build --locked --workspace --lib --bins --tests

step "models"
scripts/models.sh

step "drivers"
source target/lavapipe/env
source target/cuda/env
target/debug/fullbore devices

step "tests"
cargo test --locked --workspace

step "end to end"
scripts/e2e.sh target/debug/fullbore

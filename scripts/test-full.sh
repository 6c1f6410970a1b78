#!/usr/bin/env bash
# What `make test` leaves out for its time: the same tests with more of everything, and the fresh machine.
set -euo pipefail
cd "$(dirname "$0")/.."
source target/lavapipe/env
FULLBORE_TEST_FULL=1 cargo test --locked --workspace
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
benches/gpu.sh --small target/debug/fullbore "${FULLBORE_CACHE:-$HOME/.cache/fullbore}"/models/SmolLM2-135M-Instruct.Q4_1.gguf "$out" vulkan:0
scripts/fuzz-api.sh target/debug/fullbore
FUZZ_SECONDS=${FUZZ_SECONDS:-10} scripts/fuzz.sh
if [ "$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null; then scripts/test-fresh.sh; else echo "test-full: without root and mmdebstrap the fresh machine is left out" >&2; fi

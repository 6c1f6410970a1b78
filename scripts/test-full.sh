#!/usr/bin/env bash
# What `make test` leaves out for its time: the same tests with more of everything, and the fresh machine.
set -euo pipefail
cd "$(dirname "$0")/.."
source target/lavapipe/env
source target/cuda/env
FULLBORE_TEST_FULL=1 cargo test --locked --workspace
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
benches/gpu.sh --small target/debug/fullbore "$out" vulkan:0 "${FULLBORE_CACHE:-$HOME/.cache/fullbore}"/models/SmolLM2-135M-Instruct.Q4_1.gguf
scripts/fuzz-api.sh target/debug/fullbore
scripts/cluster.sh target/debug/fullbore
FUZZ_SECONDS=${FUZZ_SECONDS:-10} scripts/fuzz.sh
# Copied to another distribution the binary asks for no library but these, and for no newer glibc than the README says.
beyond=$(ldd target/debug/fullbore | grep -vE 'linux-vdso|ld-linux|/lib(c|m|gcc_s)\.so' || true)
newest=$(objdump -T target/debug/fullbore | grep -oE 'GLIBC_[0-9.]+' | sort -Vu | tail -n 1)
[ -z "$beyond" ] && [ "$(printf '%s\n' "$newest" GLIBC_2.35 | sort -V | tail -n 1)" = GLIBC_2.35 ] || { echo "test-full: the binary needs $newest, and beside it: $beyond" >&2; exit 1; }
if [ "$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null; then scripts/test-fresh.sh; else echo "test-full: without root and mmdebstrap the fresh machine is left out" >&2; fi

#!/usr/bin/env bash
# Fullbore beside llama.cpp on this machine, in one run: see benches/peers.py.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p fullbore
packages=$PWD/target/python-bench
if [ ! -f "$packages/.complete" ]; then
  rm -rf "$packages"
  python3 -m pip install --quiet --target "$packages" 'xllamacpp==2026.10.11549'
  touch "$packages/.complete"
fi
target/release/fullbore fetch smollm2
source target/lavapipe/env
model=${FULLBORE_CACHE:-$HOME/.cache/fullbore}/models/SmolLM2-135M-Instruct.Q4_1.gguf
PYTHONPATH=$packages exec python3 benches/peers.py --model "$model" --device cpu --device vulkan:llvmpipe "$@"

#!/usr/bin/env bash
# Fullbore beside llama.cpp's Vulkan backend on the same software Vulkan, for each Mesa version: see benches/peers.md.
# A run takes about 20 minutes, nearly all of it the peer's; RUNS=3 takes medians.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p fullbore
scripts/llama-vulkan.sh
target/release/fullbore fetch smollm2
source target/lavapipe/env
model=${FULLBORE_CACHE:-$HOME/.cache/fullbore}/models/SmolLM2-135M-Instruct.Q4_1.gguf
out=${1:-}
for driver in target/lavapipe/*/icd.json; do
  mesa=$(basename "$(dirname "$driver")")
  echo "Mesa $mesa"
  for shape in "16 32 16" "128 16 4"; do
    read -r prompt output streams <<< "$shape"
    VK_DRIVER_FILES=$PWD/$driver python3 benches/peers.py --model "$model" --device vulkan:llvmpipe --runs "${RUNS:-1}" \
      --llama-server target/llama-vulkan/llama-server --prompt "$prompt" --output "$output" --streams "$streams" \
      ${out:+--out "$out-mesa-$mesa-$prompt-$output.json"}
  done
done

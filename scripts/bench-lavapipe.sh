#!/usr/bin/env bash
# Fullbore beside llama.cpp's Vulkan backend on the same software Vulkan, for each Mesa version: many streams, one stream,
# and a prompt of 128 tokens (benches/peers.md). Three runs take seven minutes on Mesa 25, nearly all of it the peer's; with
# RUNS=1 the results say that they are not valid.
#
#   scripts/bench-lavapipe.sh [FOLDER]       RUNS=3
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/bench-lavapipe}
cargo build --release --locked -p fullbore
scripts/llama-vulkan.sh
target/release/fullbore fetch smollm2
source target/lavapipe/env
source scripts/peer.sh
model=${FULLBORE_CACHE:-$HOME/.cache/fullbore}/models/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"
for driver in target/lavapipe/[0-9]*/icd.json; do
  mesa=$(basename "$(dirname "$driver")")
  export VK_DRIVER_FILES=$PWD/$driver
  peer_on_vulkan "$model" "$out/$mesa-peer.log"
  for load in "16 16 16 32" "2 1 128 16"; do
    read -r requests clients prompt output <<< "$load"
    echo "Mesa $mesa: $clients at once, prompts of $prompt, $output out"
    target/release/fullbore bench serve --model "$model" --device vulkan:llvmpipe "${own_contexts[@]}" \
      --against "$peer" --about "$peer_about" --extra '{"cache_prompt": false}' \
      --warm-up 1 --patience 600 --runs "${RUNS:-3}" \
      --concurrency "$clients" --limit "$requests" --lengths "fixed:$prompt:$output" --output "$out/$mesa-$clients-$prompt.json"
  done
  peer_ends
done

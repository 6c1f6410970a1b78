#!/usr/bin/env bash
# Fullbore on each device of this machine beside llama.cpp on the same: result files and one page of them, in under 20
# minutes on 2 cores without a GPU. The peers are built or fetched first, once (benches/peers.md).
#
#   scripts/bench.sh [FOLDER]       RUNS=3; FULLBORE=BINARY instead of a release build
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/bench}
binary=${FULLBORE:-target/release/fullbore}
[ -n "${FULLBORE:-}" ] || cargo build --release --locked -p fullbore
scripts/llama-vulkan.sh
"$binary" fetch smollm2
source target/lavapipe/env
source scripts/peer.sh
model=${FULLBORE_CACHE:-$HOME/.cache/fullbore}/models/SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$out"
begin=$SECONDS

# NAME COMMAND...: a bench with its result in NAME.json.
bench() {
  echo "== $1 ($((SECONDS - begin)) s)"
  "$binary" bench "${@:2}" --output "$out/$1.json"
}
runs=(--runs "${RUNS:-3}")
engine=(--model "$model" "${own_contexts[@]}")
# No prompt is sent twice, but beginnings of texts are alike; the peer is told not to look for them.
peers=(--extra '{"cache_prompt": false}')

cpu=("${engine[@]}" --device cpu)
bench cpu-startup startup "${cpu[@]}" "${runs[@]}"
bench cpu-latency latency "${cpu[@]}" "${runs[@]}"
bench cpu-ops ops --device cpu --shapes small --m 1,16,64 --seconds 8
peer_on_cpu "$model" "$out/cpu-peer.log"
bench cpu-sweep sweep "${cpu[@]}" --against "$peer" --about "$peer_about" "${peers[@]}" --concurrency 1,4,16 --all \
  --lengths fixed:128:32 "${runs[@]}"
peer_ends
for driver in target/lavapipe/[0-9]*/icd.json; do
  mesa=lavapipe-$(basename "$(dirname "$driver")")
  export VK_DRIVER_FILES=$PWD/$driver
  lavapipe=("${engine[@]}" --device vulkan:llvmpipe)
  bench "$mesa-startup" startup "${lavapipe[@]}" "${runs[@]}"
  bench "$mesa-ops" ops --device vulkan:llvmpipe --shapes small --m 1,16,64 --seconds 8
  peer_on_vulkan "$model" "$out/$mesa-peer.log"
  bench "$mesa-serve" serve "${lavapipe[@]}" --against "$peer" --about "$peer_about" "${peers[@]}" --warm-up 1 \
    --concurrency 16 --limit 16 --lengths fixed:16:16 --patience 300 "${runs[@]}"
  peer_ends
done
for page in html md; do "$binary" bench report "$out"/*.json --output "$out/report.$page"; done
echo "$out/report.html, after $((SECONDS - begin)) s"

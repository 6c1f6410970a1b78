#!/usr/bin/env bash
# What a machine with a GPU measures in one call, without a network: whether its kernels are right, single ops beside the
# roofline, the prices of steps, a model of 8B's size with random weights, then tokens a second at several widths.
#
#   benches/gpu.sh BINARY MODEL OUT [DEVICE]
#
# BINARY is a release build of fullbore, MODEL a GGUF file or a folder, OUT a folder for the results, DEVICE as in
# `--device` (default: auto, which takes the best hardware GPU). Each run is one JSON file; a run that fails leaves its log.
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: benches/gpu.sh BINARY MODEL OUT [DEVICE]" >&2; exit 2; }
binary=$1 model=$2 out=$3 device=${4:-auto}
mkdir -p "$out"
"$binary" devices | tee "$out/devices.txt"
"$binary" run "Name three primary colours." --model "$model" --device "$device" --max-tokens 48 --temperature 0 \
  > "$out/run.txt" 2> "$out/run.log" || echo "gpu: the model does not run on $device; see $out/run.log" >&2
"$binary" verify --device "$device" > "$out/verify.txt" 2>&1 || echo "gpu: a kernel is wrong; see $out/verify.txt" >&2
"$binary" bench profile --model "$model" --device "$device" --seconds 30 --output "$out/device.json" \
  > "$out/profile.json" 2> "$out/profile.log" || echo "gpu: no profile; see $out/profile.log" >&2
for shapes in 1b 8b 70b; do
  "$binary" bench ops --device "$device" --shapes $shapes --seconds 20 > "$out/ops-$shapes.json" 2> "$out/ops-$shapes.txt" \
    || echo "gpu: ops of $shapes failed; see $out/ops-$shapes.txt" >&2
done
for requests in 1 32; do
  "$binary" bench offline --weights random --shape llama-3.1-8b --device "$device" --num-requests $requests \
    --max-num-seqs 32 --prompt-tokens 512 --output-tokens 64 > "$out/8b-$requests.json" 2> "$out/8b-$requests.log" \
    || echo "gpu: 8B's size at $requests failed; see $out/8b-$requests.log" >&2
done
for requests in 1 4 16 64 256; do
  result=$out/offline-$requests.json
  if "$binary" bench offline --model "$model" --device "$device" --num-requests $requests --max-num-seqs $requests \
    --max-num-batched-tokens 2048 > "$result" 2> "$out/offline-$requests.log"; then
    echo "gpu: $requests at once: $(grep -o '"output_tokens_per_s":[0-9.]*' "$result")"
  else
    echo "gpu: $requests at once failed; see $out/offline-$requests.log" >&2
  fi
done

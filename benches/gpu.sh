#!/usr/bin/env bash
# What a machine with a GPU measures in one call, without a network and within nine minutes: whether its kernels are
# right, a model of 8B's size with random weights in each arithmetic, single ops beside the roofline, the host's time of
# a step, the prices of steps, tokens a second at several widths, and what tuning finds. What matters most comes first,
# because what would go past the nine minutes is left out.
#
#   benches/gpu.sh [--small] BINARY OUT [DEVICE [MODEL]]
#
# BINARY is a release build of fullbore; where it has to travel, without what only debuggers read (`strip -s`, 21 MB of
# 134). OUT is a folder for the results, DEVICE as in `--device` (default: auto, which takes the best hardware GPU).
# MODEL is a GGUF file or a folder; without one, random weights of SmolLM2-135M's size stand in. The machine needs the
# Vulkan loader (Debian's libvulkan1) and its driver's manifest where the loader looks, or in VK_DRIVER_FILES.
#
# `runs.csv` says how each run went, `throughput.csv` what whole models reached and by which arithmetic, `devices.txt`
# what there is; tables are CSV files. Where CUDA gives a GPU too, what has `cuda` in its name ran there, and all else on
# Vulkan; with NVRTC's folder in LD_LIBRARY_PATH its kernels are compiled there, and else what was compiled beforehand
# is loaded. All else, JSON and logs, is in `all.tar.gz`, so that few files have to travel back.
# It ends with 0 if all runs went well. --small does a little of each, to see on software Vulkan that the script works.
set -euo pipefail
size=full
if [ "${1:-}" = --small ]; then size=small; shift; fi
[ $# -ge 2 ] || { echo "usage: benches/gpu.sh [--small] BINARY OUT [DEVICE [MODEL]]" >&2; exit 2; }
binary=$1 out=$2 device=${3:-auto}
if [ -n "${4:-}" ]; then model=(--model "$4"); else model=(--weights random --shape smollm2-135m); fi
mkdir -p "$out"
kept=$(mktemp -d)
export FULLBORE_CACHE=${FULLBORE_CACHE:-$kept/cache}
finish() {
  tar -czf "$out/all.tar.gz" -C "$kept" --exclude cache .
  cp "$kept"/*.csv "$kept"/devices.txt "$out"/
  rm -rf "$kept"
}
trap finish EXIT
deadline=$((SECONDS + 9 * 60))
failed=0
echo "run,status,seconds" > "$kept/runs.csv"
echo "run,tier,arithmetic,prompt_tokens,output_tokens,seconds,output_tokens_per_s" > "$kept/throughput.csv"

# run NAME LIMIT ARGUMENTS...: its standard output is NAME.json, or NAME.txt if it is not of a bench.
run() {
  local name=$1 limit=$2 begun=$SECONDS status=0 left=$((deadline - SECONDS)) type=txt
  shift 2
  [ "$1" != bench ] || type=json
  if [ "$left" -lt 5 ] || [ "$limit" -lt 5 ]; then
    echo "$name,left out,0" >> "$kept/runs.csv"
    echo "gpu: no time is left for $name" >&2
    return
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$binary" "$@" --device "$device" \
    > "$kept/$name.$type" 2> "$kept/$name.log" || status=$?
  echo "$name,$status,$((SECONDS - begun))" >> "$kept/runs.csv"
  if [ "$status" != 0 ]; then
    failed=1
    echo "gpu: $name ended with $status; see $name.log" >&2
  fi
}

# offline NAME LIMIT ARGUMENTS...: tokens a second of one run, with what it was computed by, which is not always what was
# asked for.
offline() {
  run "$1" "$2" bench offline "${@:3}"
  local line=$1 field
  for field in tier arithmetic prompt_tokens output_tokens elapsed_s output_tokens_per_s; do
    line=$line,$(grep -oE "\"$field\":(\"[^\"]*\"|[0-9.]+)" "$kept/$1.json" 2> /dev/null | head -1 | cut -d: -f2 | tr -d '"' || true)
  done
  echo "$line" | tee -a "$kept/throughput.csv"
}

"$binary" devices | tee "$kept/devices.txt"
if [ $size = full ] && ! grep -E '^(cuda|vulkan|metal|dx12):' "$kept/devices.txt" | grep -qv lavapipe; then
  echo "gpu: there is no hardware GPU to measure; is the Vulkan loader there, and the driver's manifest?" >&2
  exit 1
fi
if [ $size = small ]; then
  run run 60 run "Name three primary colours." "${model[@]}" --max-tokens 8 --temperature 0
  run verify 60 verify --only gated_act
  run profile 90 bench profile "${model[@]}" --seconds 1 --max-num-seqs 2 --max-num-batched-tokens 32 \
    --max-model-len 256 --output "$kept/device.json"
  run submit 60 bench submit --steps 5
  run ops-small 60 bench ops --shapes small --m 1,8 --only "mat_mul attn" --seconds 1 --csv "$kept/ops-small.csv"
  offline offline-1 60 "${model[@]}" --num-requests 1 --prompt-tokens 16 --output-tokens 4
  offline offline-4 90 "${model[@]}" --num-requests 4 --prompt-tokens 16 --output-tokens 4
  exit $failed
fi
big=(--weights random --shape llama-3.1-8b --max-num-batched-tokens 2048 --max-model-len 4096)
one=("${big[@]}" --max-num-seqs 32 --num-requests 1 --prompt-tokens 448 --output-tokens 128)
many=("${big[@]}" --max-num-seqs 32 --num-requests 32 --prompt-tokens 448 --output-tokens 128)
prompts=("${big[@]}" --max-num-seqs 32 --num-requests 4 --prompt-tokens 2048 --output-tokens 1)
most=(--weights random --shape llama-3.1-8b:q8_0 --max-num-batched-tokens 2048 --max-model-len 1024 --max-num-seqs 256
  --num-requests 256 --prompt-tokens 448 --output-tokens 64)
# A GPU that CUDA gives is measured by it first, and by Vulkan only where the loader gives it too.
cuda=$(grep -oE '^cuda:[0-9]+' "$kept/devices.txt" | head -1 || true)
hardware=$(grep -E '^(vulkan|metal|dx12):' "$kept/devices.txt" | grep -v lavapipe | grep -oE '^[a-z0-9]+:[0-9]+' | head -1 || true)
[ "$device" != auto ] || device=${hardware:-none}
if [ -n "$cuda" ]; then
  other=$device device=$cuda
  run run-cuda 30 run "Name three primary colours." "${model[@]}" --max-tokens 48 --temperature 0
  run verify-cuda 60 verify
  run verify-cuda-matrix-units 60 verify --arithmetic matrix-units --formats q4_0,q5_k
  offline 8b-decode-1-cuda 30 "${one[@]}" --arithmetic matrix-units
  offline 8b-decode-32-cuda-matrix-units 30 "${many[@]}" --arithmetic matrix-units
  offline 8b-prefill-cuda-matrix-units 30 "${prompts[@]}" --arithmetic matrix-units
  offline 8b-decode-256-cuda-matrix-units 45 "${most[@]}" --arithmetic matrix-units
  offline 8b-decode-32-cuda 30 "${many[@]}"
  run ops-8b-cuda 20 bench ops --shapes 8b --seconds 10 --csv "$kept/ops-8b-cuda.csv"
  device=$other
fi
[ "$device" != none ] || exit $failed
run run 30 run "Name three primary colours." "${model[@]}" --max-tokens 48 --temperature 0
run verify 90 verify
offline 8b-decode-1 40 "${one[@]}"
offline 8b-decode-32 40 "${many[@]}"
offline 8b-prefill 40 "${prompts[@]}"
for arithmetic in matrix-units f16 integer-dot; do
  run verify-$arithmetic 45 verify --arithmetic $arithmetic --only mat_mul --formats q4_0,q5_k
  offline 8b-prefill-$arithmetic 30 "${prompts[@]}" --arithmetic $arithmetic
  offline 8b-decode-32-$arithmetic 30 "${many[@]}" --arithmetic $arithmetic
done
run ops-8b 30 bench ops --shapes 8b --seconds 15 --csv "$kept/ops-8b.csv"
run ops-8b-matrix-units 20 bench ops --shapes 8b --arithmetic matrix-units --m 16,64,512 --only mat_mul --seconds 5 \
  --csv "$kept/ops-8b-matrix-units.csv"
run submit 20 bench submit
for shapes in 1b 70b; do
  run ops-$shapes 25 bench ops --shapes $shapes --seconds 10 --csv "$kept/ops-$shapes.csv"
done
run profile 40 bench profile "${model[@]}" --seconds 15 --output "$kept/device.json"
for requests in 1 4 16 64 256; do
  offline offline-$requests 20 "${model[@]}" --num-requests $requests --max-num-seqs $requests \
    --max-num-batched-tokens 2048
done
# Last, for it takes what is left: what it finds is kept only where it ends.
run tune $((deadline - SECONDS - 40)) tune --weights random --shape llama-3.1-8b --seconds 25
offline 8b-decode-32-tuned 40 "${many[@]}"
exit $failed

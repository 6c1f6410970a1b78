#!/usr/bin/env bash
# What a machine with a GPU measures in one call, without a network and within nine minutes: whether its kernels are
# right, a model of 8B's size with random weights in each arithmetic, single ops beside the roofline, the host's time of
# a step, the prices of steps, tokens a second at several widths, and what tuning finds. What matters most comes first,
# because what would go past the nine minutes is left out.
#
#   benches/gpu.sh [--small] BINARY MODEL OUT [DEVICE]
#
# BINARY is a release build of fullbore, MODEL a GGUF file or a folder, OUT a folder for the results, DEVICE as in
# `--device` (default: auto, which takes the best hardware GPU). Each bench leaves JSON (and CSV, where it is a table),
# any other run its text, and all of them a log; `runs.csv` says how each went, `throughput.csv` what whole models reached. --small does a little of each, to
# see on software Vulkan that the script works.
set -euo pipefail
size=full
if [ "${1:-}" = --small ]; then size=small; shift; fi
[ $# -ge 3 ] || { echo "usage: benches/gpu.sh [--small] BINARY MODEL OUT [DEVICE]" >&2; exit 2; }
binary=$1 model=$2 out=$3 device=${4:-auto}
mkdir -p "$out"
export FULLBORE_CACHE=${FULLBORE_CACHE:-$out/cache}
deadline=$((SECONDS + 9 * 60))
failed=0
echo "run,status,seconds" > "$out/runs.csv"
echo "run,output_tokens_per_s" > "$out/throughput.csv"

# run NAME LIMIT ARGUMENTS...: its standard output is NAME.json, or NAME.txt if it is not of a bench.
run() {
  local name=$1 limit=$2 begun=$SECONDS status=0 left=$((deadline - SECONDS)) type=txt
  shift 2
  [ "$1" != bench ] || type=json
  if [ "$left" -lt 5 ]; then
    echo "$name,left out,0" >> "$out/runs.csv"
    echo "gpu: no time is left for $name" >&2
    return
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$binary" "$@" --device "$device" \
    > "$out/$name.$type" 2> "$out/$name.log" || status=$?
  echo "$name,$status,$((SECONDS - begun))" >> "$out/runs.csv"
  if [ "$status" != 0 ]; then
    failed=1
    echo "gpu: $name ended with $status; see $out/$name.log" >&2
  fi
}

# offline NAME LIMIT ARGUMENTS...: tokens a second of one run.
offline() {
  run "$1" "$2" bench offline "${@:3}"
  local rate
  rate=$(grep -oE '"output_tokens_per_s":[0-9.]+' "$out/$1.json" 2> /dev/null | cut -d: -f2 || true)
  [ -z "$rate" ] || echo "$1,$rate" | tee -a "$out/throughput.csv"
}

"$binary" devices | tee "$out/devices.txt"
if [ $size = small ]; then
  run run 60 run "Name three primary colours." --model "$model" --max-tokens 8 --temperature 0
  run verify 60 verify --only gated_act
  run profile 90 bench profile --model "$model" --seconds 1 --max-num-seqs 2 --max-num-batched-tokens 32 \
    --max-model-len 256 --output "$out/device.json"
  run submit 60 bench submit --steps 5
  run ops-small 60 bench ops --shapes small --m 1,8 --only "mat_mul attn" --seconds 1 --csv "$out/ops-small.csv"
  offline offline-1 60 --model "$model" --num-requests 1 --prompt-tokens 16 --output-tokens 4
  offline offline-4 90 --model "$model" --num-requests 4 --prompt-tokens 16 --output-tokens 4
  exit $failed
fi
run run 60 run "Name three primary colours." --model "$model" --max-tokens 48 --temperature 0
run verify 60 verify
big=(--weights random --shape llama-3.1-8b --max-num-seqs 32 --max-num-batched-tokens 2048)
offline 8b-decode-1 40 "${big[@]}" --num-requests 1 --prompt-tokens 16 --output-tokens 128
offline 8b-decode-32 40 "${big[@]}" --num-requests 32 --prompt-tokens 16 --output-tokens 128
offline 8b-prefill 40 "${big[@]}" --num-requests 4 --prompt-tokens 2048 --output-tokens 1
for arithmetic in matrix-units f16 integer-dot; do
  run verify-$arithmetic 30 verify --arithmetic $arithmetic --only mat_mul
  offline 8b-prefill-$arithmetic 40 "${big[@]}" --num-requests 4 --prompt-tokens 2048 --output-tokens 1 \
    --arithmetic $arithmetic
done
run ops-8b 30 bench ops --shapes 8b --seconds 15 --csv "$out/ops-8b.csv"
run ops-8b-matrix-units 20 bench ops --shapes 8b --arithmetic matrix-units --m 16,64,512 --only mat_mul --seconds 5 \
  --csv "$out/ops-8b-matrix-units.csv"
run submit 20 bench submit
run tune 45 tune --weights random --shape llama-3.1-8b --seconds 25
offline 8b-decode-32-tuned 40 "${big[@]}" --num-requests 32 --prompt-tokens 16 --output-tokens 128
for shapes in 1b 70b; do
  run ops-$shapes 25 bench ops --shapes $shapes --seconds 10 --csv "$out/ops-$shapes.csv"
done
run profile 40 bench profile --model "$model" --seconds 15 --output "$out/device.json"
for requests in 1 4 16 64 256; do
  offline offline-$requests 20 --model "$model" --num-requests $requests --max-num-seqs $requests \
    --max-num-batched-tokens 2048
done
exit $failed

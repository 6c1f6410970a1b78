#!/usr/bin/env bash
# What a machine with a GPU measures in one call, without a network and within nine minutes, and whether it is what is
# asked of it: whether kernels are right, a model of 8B's size with random weights at several widths, beside the device's
# own bandwidth and matrix rate and beside a peer; then single ops, the host's time of a step, the prices of steps, and
# what tuning finds. What matters most comes first, because what would go past the nine minutes is left out.
#
#   benches/gpu.sh [--small] BINARY OUT [DEVICE [MODEL]]
#
# BINARY is a release build of fullbore; where it has to travel, without what only debuggers read (`strip -s`, 21 MB of
# 134). OUT is a folder for the results, DEVICE as in `--device` (default: auto, which takes the best hardware GPU).
# MODEL is a GGUF file or a folder; where it travelled in pieces, MODEL.part* are put together. Goldens are of
# SmolLM2-135M-Instruct.Q4_1; without a model, random weights of that size stand in, and no golden is followed. The machine
# needs Python, the Vulkan loader (Debian's libvulkan1) and its driver's manifest where the loader looks, or in
# VK_DRIVER_FILES; PyTorch and transformers are the peer where they are there.
#
# `verdict.csv` has a line for each thing that is asked of CUDA: measured, wanted, and pass, fail or not there. `runs.csv`
# says how each run went, `throughput.csv` what whole models reached and by which arithmetic, `devices.txt` what there is.
# Where CUDA gives a GPU, what has `cuda` in its name ran there, and all else on Vulkan. Kernels are those that were
# compiled beforehand, unless FULLBORE_NVRTC=1. JSON, tables and logs are in `all.tar.gz`, so that few files have to
# travel back. It ends with 0 if all runs went well, whatever the verdict. --small does a little of each, to see on
# software Vulkan that the script works.
set -euo pipefail
size=full
if [ "${1:-}" = --small ]; then size=small; shift; fi
[ $# -ge 2 ] || { echo "usage: benches/gpu.sh [--small] BINARY OUT [DEVICE [MODEL]]" >&2; exit 2; }
binary=$1 out=$2 device=${3:-auto}
benches=$(cd "$(dirname "$0")" && pwd)
golden=$benches/../tests/golden/smollm2.json
mkdir -p "$out"
kept=$(mktemp -d)
if [ -n "${4:-}" ]; then
  file=$4
  if [ ! -e "$file" ] && [ -e "$file.part0" ]; then
    file=$kept/cache/$(basename "$4")
    mkdir -p "$kept/cache"
    cat "$4".part* > "$file"
  fi
  model=(--model "$file")
else
  model=(--weights random --shape smollm2-135m)
fi
export FULLBORE_CACHE=${FULLBORE_CACHE:-$kept/cache} CUDA_CACHE_PATH=$kept/cache/cuda FULLBORE_NVRTC=${FULLBORE_NVRTC:-0}
# Whatever ends this: what there is by now goes to OUT.
keep() {
  python3 "$benches/gpu_verdict.py" "$kept" > "$kept/verdict.csv" || true
  cp "$kept"/{verdict,runs,throughput}.csv "$kept/devices.txt" "$out"/ || true
  tar -czf "$out/all.tar.gz" -C "$kept" --exclude cache .
}
trap 'keep; rm -rf "$kept"' EXIT
trap 'exit 143' TERM INT
deadline=$((SECONDS + 9 * 60 - 15))
echo "run,status,seconds" > "$kept/runs.csv"
echo "run,tier,arithmetic,prompt_tokens,output_tokens,seconds,output_tokens_per_s,steady_tokens_per_s" > "$kept/throughput.csv"

# timed NAME LIMIT COMMAND...: its standard output is NAME.json, or NAME.txt if it is not JSON.
timed() {
  local name=$1 limit=$2 begun=$SECONDS status=0 left=$((deadline - SECONDS)) type=txt
  shift 2
  case " $* " in *" bench "* | *" $benches/gpu_peer.py "*) type=json ;; esac
  if [ "$left" -lt 5 ] || [ "$limit" -lt 5 ]; then
    echo "$name,left out,0" >> "$kept/runs.csv"
    echo "gpu: no time is left for $name" >&2
    return
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$kept/$name.$type" 2> "$kept/$name.log" || status=$?
  echo "$name,$status,$((SECONDS - begun))" >> "$kept/runs.csv"
  if [ "$status" != 0 ]; then
    touch "$kept/failed"
    echo "gpu: $name ended with $status; see $name.log" >&2
  fi
}

# run NAME LIMIT ARGUMENTS...: of the binary, on the device.
run() { timed "$1" "$2" "$binary" "${@:3}" --device "$device"; }

# offline NAME LIMIT ARGUMENTS...: tokens a second, medians of some runs, with what they were computed by, which is not
# always what was asked for.
offline() {
  run "$1" "$2" bench offline "${@:3}"
  python3 "$benches/gpu_verdict.py" "$kept" "$1" | tee -a "$kept/throughput.csv"
}

# follow NAME LIMIT ARGUMENTS...: the golden on the device, and each answer alone and among others; its tokens are
# NAME.json.
follow() {
  [ -n "${file:-}" ] || return 0
  run "$1" "$2" verify --golden "$golden" --model "$file" --output "$kept/$1.json" "${@:3}"
}

# ended: whether all went well.
ended() { if [ -e "$kept/failed" ]; then exit 1; else exit 0; fi; }

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
  offline offline-1 60 "${model[@]}" --limit 1 --lengths fixed:16:4
  offline offline-4 90 "${model[@]}" --limit 4 --lengths fixed:16:4
  ended
fi
# Kernels have been tried before what is timed begins.
engine=(--no-verify --no-tuning --no-saved-costs --profile throughput --max-num-batched-tokens 2048)
big=(--weights random --shape llama-3.1-8b "${engine[@]}" --max-model-len 4096 --max-num-seqs 32)
one=(--limit 1 --lengths fixed:448:128)
many=(--limit 32 --lengths fixed:448:128)
prompts=(--limit 4 --lengths fixed:2048:1)
q8_0=(--weights random --shape llama-3.1-8b:q8_0 "${engine[@]}" --max-model-len 1024 --max-num-seqs 256)
# As many tokens of an answer as it takes until all prompts have been read, and as many again.
most=(--limit 256 --lengths fixed:448:192 --runs 2)
bf16=(--weights random --shape llama-3.1-8b:bf16 "${engine[@]}" --max-model-len 1024 --max-num-seqs 32)
# A GPU that CUDA gives is measured by it first, and by Vulkan only where the loader gives it too.
cuda=$(grep -oE '^cuda:[0-9]+' "$kept/devices.txt" | head -1 || true)
hardware=$(grep -E '^(vulkan|metal|dx12):' "$kept/devices.txt" | grep -v lavapipe | grep -oE '^[a-z0-9]+:[0-9]+' | head -1 || true)
[ "$device" != auto ] || device=${hardware:-none}
if [ -n "$cuda" ]; then
  other=$device device=$cuda
  # What is not timed goes side by side: most of it is the driver's own compiler, a core each.
  follow golden-cuda 110 &
  run verify-cuda-mat_mul 110 verify --only mat_mul --formats q4_0,q5_k,q8_0,bf16 &
  run verify-cuda-attention 110 verify --only attention &
  run verify-cuda-mat_mul-matrix-units 110 verify --only mat_mul --arithmetic matrix-units --formats q4_0,q5_k,q8_0,bf16 &
  run verify-cuda-attention-matrix-units 110 verify --only attention --arithmetic matrix-units &
  for op in add_norm embed gated_act mul_add reset_counts rms_norm rope_kv sample update_table; do
    run verify-cuda-$op 110 verify --only $op
  done &
  if [ "$other" != none ]; then (device=$other && follow golden-vulkan 110) & fi
  wait
  units=(--arithmetic matrix-units)
  run ops-8b-cuda 30 bench ops --shapes 8b --m 1,8,32,256,2048 --only mat_mul --seconds 5 "${units[@]}" --csv "$kept/ops-8b-cuda.csv"
  timed peer-matrix 40 python3 "$benches/gpu_peer.py" matrix
  offline 8b-decode-1-cuda 30 "${big[@]}" "${one[@]}" "${units[@]}"
  offline 8b-decode-32-cuda 40 "${big[@]}" "${many[@]}" "${units[@]}"
  offline 8b-prefill-cuda 40 "${big[@]}" "${prompts[@]}" "${units[@]}"
  offline 8b-q8_0-decode-32-cuda 40 "${q8_0[@]}" "${many[@]}" "${units[@]}"
  offline 8b-q8_0-decode-256-cuda 75 "${q8_0[@]}" "${most[@]}" "${units[@]}"
  offline 8b-bf16-32-cuda 60 "${bf16[@]}" "${many[@]}" "${units[@]}"
  timed peer-transformers 90 python3 "$benches/gpu_peer.py" throughput
  device=$other
  # What was asked of CUDA is settled, whatever becomes of the rest.
  keep
fi
[ "$device" != none ] || ended
run run 30 run "Name three primary colours." "${model[@]}" --max-tokens 48 --temperature 0
offline 8b-decode-1 40 "${big[@]}" "${one[@]}"
offline 8b-decode-32 40 "${big[@]}" "${many[@]}"
offline 8b-prefill 40 "${big[@]}" "${prompts[@]}"
run verify 90 verify
for arithmetic in matrix-units f16 integer-dot; do
  run verify-$arithmetic 45 verify --arithmetic $arithmetic --only mat_mul --formats q4_0,q5_k
  offline 8b-prefill-$arithmetic 30 "${big[@]}" "${prompts[@]}" --arithmetic $arithmetic
  offline 8b-decode-32-$arithmetic 30 "${big[@]}" "${many[@]}" --arithmetic $arithmetic
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
  offline offline-$requests 20 "${model[@]}" --limit $requests --lengths fixed:128:64 \
    --max-num-seqs $requests --max-num-batched-tokens 2048
done
# Last, for it takes what is left: what it finds is kept only where it ends.
device=${cuda:-$device}
run tune $((deadline - SECONDS - 40)) tune --weights random --shape llama-3.1-8b --seconds 25
offline 8b-decode-32-tuned 40 --weights random --shape llama-3.1-8b --no-verify "${many[@]}"
ended

#!/usr/bin/env bash
# What a machine with a GPU measures in one call, without a network and within nine minutes, and whether it is what is
# asked of it, of CUDA and of Vulkan: whether kernels are right, a model of 8B's size with random weights at several
# widths, beside the device's own bandwidth and matrix rate and beside a peer. What has a line in the verdict comes first,
# because what would go past the nine minutes is left out; then what else there is: single ops, the prices of steps, and
# what tuning finds.
#
#   benches/gpu.sh [--small] BINARY OUT [DEVICE [MODEL]]
#
# BINARY is a release build of fullbore; where it has to travel, without what only debuggers read (`strip -s`, 21 MB of
# 134). OUT is a folder for the results. DEVICE is as in `--device`: a GPU of CUDA (`cuda:1`) or one of Vulkan, Metal or
# DX12 alone; with `auto` (which it is unless given) both, the first GPU that CUDA gives and the first hardware GPU of the
# others. MODEL is a GGUF file or a folder; where it travelled in pieces, MODEL.part* are put together. Goldens are of
# SmolLM2-135M-Instruct.Q4_1; without a model, random weights of that size stand in, and no golden is followed.
#
# The machine needs Python. The Vulkan loader (Debian's libvulkan1) is taken from a folder `vulkan` beside BINARY where
# there is one. Where the loader finds no GPU by itself, the driver's manifest is looked for in ICD_FOLDERS; where there is
# none, one is written for NVIDIA's libraries. PyTorch and transformers are a peer where they are there, and llama.cpp where
# its `llama-batched-bench` lies beside BINARY, built for that GPU: on MODEL.
#
# `verdict.csv` has a line for each thing that is asked: measured, wanted, and pass, fail or not there. `runs.csv` says
# how each run went, `throughput.csv` what whole models reached and by which arithmetic, `devices.txt` what there is. What
# has `cuda` in its name ran there, and all else on Vulkan. What could not run for want of a device or of time is `left
# out`, with the reason. Kernels are those that were compiled beforehand, unless FULLBORE_NVRTC=1. JSON, tables and logs
# are in `all.tar.gz`, so that few files have to travel back. It ends with 0 if all runs went well, whatever the verdict.
# --small does a little of each, to see on software Vulkan that the script works.
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
# What ends at its limit takes seconds more, and so does the end.
deadline=$((SECONDS + 9 * 60 - 15))
echo "run,status,seconds,limit" > "$kept/runs.csv"
echo "run,tier,arithmetic,prompt_tokens,output_tokens,seconds,output_tokens_per_s,steady_tokens_per_s" > "$kept/throughput.csv"

# timed NAME LIMIT COMMAND...: its standard output is NAME.json, or NAME.txt if it is not JSON. At its limit it is
# interrupted, so that it tells what it has by then.
timed() {
  local name=$1 limit=$2 begun=$SECONDS status=0 left=$((deadline - SECONDS)) type=txt
  shift 2
  case " $* " in *" bench "* | *" $benches/gpu_peer.py "*) type=json ;; esac
  if [ "$device" = none ]; then
    leave_out "$name" "$limit" "$why_none"
    return
  fi
  if [ "$left" -lt 5 ] || [ "$limit" -lt 5 ]; then
    leave_out "$name" "$limit" "no time was left"
    echo "gpu: no time is left for $name" >&2
    return
  fi
  timeout -s INT -k 5 "$((limit < left ? limit : left))" "$@" > "$kept/$name.$type" 2> "$kept/$name.log" || status=$?
  echo "$name,$status,$((SECONDS - begun)),$limit" >> "$kept/runs.csv"
  if [ "$status" != 0 ]; then
    touch "$kept/failed"
    echo "gpu: $name ended with $status; see $name.log" >&2
  fi
}

# run NAME LIMIT ARGUMENTS...: of the binary, on the device.
run() { timed "$1" "$2" "$binary" "${@:3}" --device "$device"; }

# offline NAME LIMIT ARGUMENTS...: tokens a second, with what they were computed by, which is not always what was asked
# for.
offline() {
  run "$1" "$2" bench offline "${@:3}"
  [ "$device" = none ] || python3 "$benches/gpu_verdict.py" "$kept" "$1" | tee -a "$kept/throughput.csv"
}

# leave_out NAME LIMIT REASON
leave_out() { echo "$1,left out: $3,0,$2" >> "$kept/runs.csv"; }

# follow NAME LIMIT ARGUMENTS...: the golden on the device, and each answer alone and among others; its tokens are
# NAME.json.
follow() {
  if [ -z "${file:-}" ]; then
    leave_out "$1" "$2" "no model was given"
    return
  fi
  run "$1" "$2" verify --golden "$golden" --model "$file" --output "$kept/$1.json" "${@:3}"
}

# ended: whether all went well.
ended() { if [ -e "$kept/failed" ]; then exit 1; else exit 0; fi; }

# Ids of hardware by API: `first cuda`, `first 'vulkan|metal|dx12'`.
first() { sed -nE "s/^(($1):[0-9]+) +gpu .*/\1/p" "$kept/devices.txt" | head -1; }

look() { "$binary" devices > "$kept/devices.txt"; }

beside=$(cd "$(dirname "$binary")" && pwd)
[ ! -d "$beside/vulkan" ] || export LD_LIBRARY_PATH=$beside/vulkan${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
look
if [ $size = full ] && [ -z "${VK_DRIVER_FILES:-}" ] && [ -z "$(first 'vulkan|metal|dx12')" ]; then
  # A container may have NVIDIA's libraries and no manifest; the one for EGL needs nothing of X11.
  own=$kept/cache/icd.d
  mkdir -p "$own"
  for library in libEGL_nvidia.so.0 libGLX_nvidia.so.0; do
    echo "{\"file_format_version\":\"1.0.0\",\"ICD\":{\"library_path\":\"$library\",\"api_version\":\"1.3.0\"}}" > "$own/$library.json"
  done
  folders=${ICD_FOLDERS:-/usr/local/nvidia/share/vulkan/icd.d /run/opengl-driver/share/vulkan/icd.d /opt/nvidia/share/vulkan/icd.d}
  for folder in $folders "$own"; do
    for manifest in "$folder"/*.json; do
      [ -e "$manifest" ] || continue
      export VK_DRIVER_FILES=$manifest
      look
      if [ -n "$(first 'vulkan|metal|dx12')" ]; then break 2; fi
      unset VK_DRIVER_FILES
    done
  done
  look
fi
cat "$kept/devices.txt"
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
asked=$device
case $asked in
  auto) cuda=$(first cuda) other=$(first 'vulkan|metal|dx12') ;;
  cuda | cuda:*) cuda=$device other= ;;
  *) cuda= other=$device ;;
esac
if [ -z "$cuda$other" ]; then
  echo "gpu: there is no hardware GPU to measure; is the Vulkan loader there, and the driver's manifest?" >&2
  exit 1
fi
# on cuda, on vulkan: where the runs that follow go; those without such a device are left out.
on() {
  if [ "$1" = cuda ]; then device=${cuda:-none}; else device=${other:-none}; fi
  if [ "$asked" = auto ]; then why_none="no GPU that $1 gives"; else why_none="$asked alone was asked for"; fi
}
# Kernels have been tried before what is timed begins. A run of each: there is no time for more.
engine=(--no-verify --no-saved-costs --profile throughput --max-num-batched-tokens 2048)
plain=("${engine[@]}" --no-tuning --runs 1)
llama=(--weights random --shape llama-3.1-8b --max-model-len 4096 --max-num-seqs 32)
big=("${llama[@]}" "${plain[@]}")
one=(--limit 1 --lengths fixed:448:128)
many=(--limit 32 --lengths fixed:448:128)
prompts=(--limit 4 --lengths fixed:2048:1)
q8_0=(--weights random --shape llama-3.1-8b:q8_0 "${plain[@]}" --max-model-len 1024 --max-num-seqs 256)
# As many tokens of an answer as it takes until all prompts have been read, and as many again.
most=(--limit 256 --lengths fixed:448:192)
bf16=(--weights random --shape llama-3.1-8b:bf16 "${plain[@]}" --max-model-len 1024 --max-num-seqs 32)
units=(--arithmetic matrix-units)
few=(--formats q4_0,q5_k,q8_0,bf16)
others=add_norm,embed,gated_act,mul_add,rms_norm,rope_kv,sample,update_table

# What is not timed goes side by side: most of it is the driver's own compiler, a core each. No run asks for free memory,
# and each has all of the time: none waits for another.
side=80
on cuda
follow golden-cuda $side &
follow golden-cuda-matrix-units $side "${units[@]}" &
run verify-cuda-mat_mul $side verify --only mat_mul "${few[@]}" &
run verify-cuda-attention $side verify --only attention &
run verify-cuda-mat_mul-matrix-units $side verify --only mat_mul "${units[@]}" "${few[@]}" &
run verify-cuda-attention-matrix-units $side verify --only attention "${units[@]}" &
run verify-cuda-others $side verify --only "$others" &
# A first import reads gigabytes, which the time of no peer is for.
timed peer-versions $side python3 "$benches/gpu_peer.py" versions &
on vulkan
follow golden-vulkan $side &
follow golden-vulkan-matrix-units $side "${units[@]}" &
run verify-vulkan-mat_mul $side verify --only mat_mul "${few[@]}" &
run verify-vulkan-attention $side verify --only attention &
run verify-vulkan-mat_mul-matrix-units $side verify --only mat_mul "${units[@]}" "${few[@]}" &
run verify-vulkan-others $side verify --only "$others" &
wait
# Limits of what is asked, and of what ran side by side, sum to less than there is: between runs there is Python.
on cuda
run ops-8b-cuda 25 bench ops --shapes 8b --m 1,2,4,8,32,256,2048 --only "mat_mul ffn" --seconds 4 "${units[@]}" --csv "$kept/ops-8b-cuda.csv"
timed peer-matrix 20 python3 "$benches/gpu_peer.py" matrix
offline 8b-decode-1-cuda 20 "${big[@]}" "${one[@]}" "${units[@]}"
offline 8b-decode-32-cuda 25 "${big[@]}" "${many[@]}" "${units[@]}"
offline 8b-prefill-cuda 20 "${big[@]}" "${prompts[@]}" "${units[@]}"
on vulkan
run ops-8b-peaks 20 bench ops --shapes 8b --m 1,512 --only "mat_mul ffn_gate_up" --seconds 4 "${units[@]}" --csv "$kept/ops-8b-peaks.csv"
offline 8b-decode-1 25 "${big[@]}" "${one[@]}"
offline 8b-decode-32 25 "${big[@]}" "${many[@]}" "${units[@]}"
offline 8b-prefill-matrix-units 25 "${big[@]}" "${prompts[@]}" "${units[@]}"
offline 8b-prefill 25 "${big[@]}" "${prompts[@]}"
run submit 10 bench submit
on cuda
offline 8b-q8_0-decode-32-cuda 25 "${q8_0[@]}" "${many[@]}" "${units[@]}"
offline 8b-q8_0-decode-256-cuda 40 "${q8_0[@]}" "${most[@]}" "${units[@]}"
offline 8b-bf16-32-cuda 30 "${bf16[@]}" "${many[@]}" "${units[@]}"
timed peer-transformers 70 python3 "$benches/gpu_peer.py" throughput
peer=$beside/llama-batched-bench
if [ -x "$peer" ] && [ -n "${file:-}" ]; then
  offline model-32-cuda 15 "${model[@]}" "${plain[@]}" --max-model-len 1024 --max-num-seqs 32 "${many[@]}" "${units[@]}"
  timed peer-llama-cpp 15 python3 "$benches/gpu_peer.py" llama-cpp --binary "$peer" --model "$file"
else
  leave_out peer-llama-cpp 15 "no llama-batched-bench lies beside the binary or no model was given"
fi
# What was asked is settled, whatever becomes of the rest.
keep
on vulkan
run profile 40 bench profile "${model[@]}" --seconds 15 --output "$kept/device.json"
on cuda
# Few rows in f32, beside what tensor cores were above.
offline 8b-decode-1-f32-cuda 20 "${big[@]}" "${one[@]}"
run ops-8b-f32-cuda 20 bench ops --shapes 8b --m 1,2,4,8 --only "mat_mul ffn" --seconds 4 --csv "$kept/ops-8b-f32-cuda.csv"
on vulkan
run verify 90 verify
run run 30 run "Name three primary colours." "${model[@]}" --max-tokens 48 --temperature 0
offline 8b-decode-32-f32 40 "${big[@]}" "${many[@]}"
for arithmetic in f16 integer-dot; do
  run verify-$arithmetic 45 verify --arithmetic $arithmetic --only mat_mul --formats q4_0,q5_k
  offline 8b-prefill-$arithmetic 30 "${big[@]}" "${prompts[@]}" --arithmetic $arithmetic
  offline 8b-decode-32-$arithmetic 30 "${big[@]}" "${many[@]}" --arithmetic $arithmetic
done
# The widest shape alone, and then a model with what was found.
run tune 60 tune --weights random --shape llama-3.1-8b --only "28672 x 4096" --seconds 25
offline 8b-decode-32-tuned 40 "${llama[@]}" "${engine[@]}" --runs 1 "${many[@]}"
run ops-8b 30 bench ops --shapes 8b --seconds 15 --csv "$kept/ops-8b.csv"
for shapes in 1b 70b; do
  run ops-$shapes 25 bench ops --shapes $shapes --seconds 10 --csv "$kept/ops-$shapes.csv"
done
for requests in 1 4 16 64 256; do
  offline offline-$requests 20 "${model[@]}" --limit $requests --lengths fixed:128:64 \
    --max-num-seqs $requests --max-num-batched-tokens 2048 --runs 1
done
on cuda
run tune-cuda 60 tune --weights random --shape llama-3.1-8b --only "28672 x 4096" --seconds 25 "${units[@]}"
offline 8b-decode-32-tuned-cuda 40 "${llama[@]}" "${engine[@]}" --runs 1 "${many[@]}" "${units[@]}"
ended

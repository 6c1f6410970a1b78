#!/usr/bin/env bash
# `fullbore verify` on the cpu, on every GPU that this machine's own drivers show, and on the drivers of the tests: both
# software Vulkans and SwiftShader; on Vulkan, Metal and DX12 at a device's own tier and at the plainest one.
set -euo pipefail
cd "$(dirname "$0")/.."
fullbore=target/debug/fullbore
cargo build --locked -p fullbore
failed=0

verify_all() { # verify_all KIND...: the devices of these kinds that are seen with the drivers that are set
  local kinds device tiers tier
  kinds=$(IFS='|'; echo "$*")
  for device in $($fullbore devices | grep -oE "^($kinds):[0-9]+"); do
    tiers=("" base)
    [[ $device != cuda:* ]] || tiers=("")
    for tier in "${tiers[@]}"; do
      echo
      $fullbore verify --device "$device" ${tier:+--tier "$tier"} || failed=1
    done
  done
}

$fullbore verify --device cpu || failed=1
# Before the drivers of the tests, which take the place of all others.
verify_all vulkan metal dx12 cuda
source target/lavapipe/env
verify_all vulkan
export VK_DRIVER_FILES=$SWIFTSHADER_ICD
verify_all vulkan
exit $failed

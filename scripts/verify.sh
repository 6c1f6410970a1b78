#!/usr/bin/env bash
# `fullbore verify` on the cpu and on every GPU and driver that wgpu finds, software Vulkan too, at its own tier and at
# the plainest one.
set -euo pipefail
cd "$(dirname "$0")/.."
fullbore=target/debug/fullbore
cargo build --locked -p fullbore
source target/lavapipe/env
failed=0
$fullbore verify --device cpu || failed=1
for device in $($fullbore devices | grep -oE '^(vulkan|metal|dx12):[0-9]+'); do
  for tier in "" base; do
    echo
    $fullbore verify --device "$device" ${tier:+--tier $tier} || failed=1
  done
done
exit $failed

#!/usr/bin/env bash
# `fullbore verify` on the cpu, on every GPU that this machine's own drivers show, and on the drivers of the tests: both
# software Vulkans and SwiftShader; on Vulkan, Metal and DX12 at a device's own tier and at the plainest one. Fails where
# a check does, and where a driver of the tests shows no device.
set -euo pipefail
cd "$(dirname "$0")/.."
fullbore=target/debug/fullbore
cargo build --locked -p fullbore
failed=0

verify_all() { # verify_all KIND: each device of that kind that is seen with the drivers that are set, the cpu aside
  local device tiers tier
  for device in $(sed -nE "s/^([a-z0-9]+:[0-9]+) +$1 .*/\1/p" <<<"$devices"); do
    tiers=("" base)
    [[ $device != cuda:* ]] || tiers=("")
    for tier in "${tiers[@]}"; do
      echo
      $fullbore verify --device "$device" ${tier:+--tier "$tier"} || failed=1
    done
  done
}

of_tests() { # of_tests DRIVER NAME: that driver alone, which is there, whatever else is
  export VK_DRIVER_FILES=$1
  devices=$($fullbore devices)
  grep -qF "$2" <<<"$devices" || {
    echo "verify: $1 shows no device of $2: remove target/lavapipe, so that its drivers are fetched again" >&2
    failed=1
  }
  verify_all software
}

$fullbore verify --device cpu || failed=1
# Before the drivers of the tests, which take the place of all others. A system's own software Vulkan is passed over.
devices=$($fullbore devices)
verify_all gpu
source target/lavapipe/env
IFS=: read -ra drivers <<<"$VK_DRIVER_FILES"
[ ${#drivers[@]} = 2 ] || { echo "verify: two versions of Mesa are to be tried, not ${#drivers[@]}" >&2; failed=1; }
for driver in "${drivers[@]}"; do of_tests "$driver" "Mesa $(basename "$(dirname "$driver")")"; done
of_tests "$SWIFTSHADER_ICD" SwiftShader
exit $failed

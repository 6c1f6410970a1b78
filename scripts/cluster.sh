#!/usr/bin/env bash
# Installs a router and a subscriber under target/cluster and runs tests/cluster against the binary given, where the
# system allows it in a network of its own that has loopback alone. What is installed is pinned here, and kept until a
# pin changes.
#
#   scripts/cluster.sh [BINARY]
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-target/debug/fullbore}
packages=$PWD/target/cluster
pins='smg==1.13.0 pyzmq==27.3.0 msgpack==1.2.4 kubernetes-validate==1.37.0'
if [ "$(cat "$packages/.complete" 2>/dev/null)" != "$pins" ]; then
  rm -rf "$packages"
  # shellcheck disable=SC2086
  python3 -m pip install --quiet --target "$packages" $pins
  echo "$pins" > "$packages/.complete"
fi
export PYTHONPATH=$packages PYTHONDONTWRITEBYTECODE=1
failed=0
for part in manifests smg; do
  run=(python3 "tests/cluster/$part.py" "$binary")
  if unshare --map-root-user --net true 2>/dev/null; then
    # shellcheck disable=SC2016
    unshare --map-root-user --net sh -c 'ip link set lo up && exec "$@"' sh "${run[@]}" || failed=1
  else
    "${run[@]}" || failed=1
  fi
done
exit $failed

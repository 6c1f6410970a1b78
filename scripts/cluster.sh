#!/usr/bin/env bash
# Installs routers and a subscriber under target/cluster and runs tests/cluster against the binary given, where the
# system allows it in a network of its own that has loopback alone. What is installed is pinned here, and kept until a
# pin changes.
#
#   scripts/cluster.sh [BINARY]
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-target/debug/fullbore}
smg='smg==1.13.0 pyzmq==27.3.0 msgpack==1.2.4 kubernetes-validate==1.37.0'
# Dynamo's own list of requirements cannot be met, so that what it imports is named here.
dynamo='ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1'
imports='aiohttp==3.14.5 kubernetes==32.0.1 msgspec==0.22.0 prometheus-client==0.26.0 pydantic==2.13.5 pyzmq==27.3.0
  redis==8.1.0 tqdm==4.70.1 transformers==5.24.0 uvloop==0.23.0 zstandard==0.25.0'

# install FOLDER PINS [OPTION...]: into target/cluster/FOLDER, if they are not there.
install() {
  local folder=$PWD/target/cluster/$1 pins=$2
  shift 2
  if [ "$(cat "$folder/.complete" 2>/dev/null)" != "$pins" ]; then
    rm -rf "$folder"
    # shellcheck disable=SC2086
    python3 -m pip install --quiet --only-binary :all: --target "$folder" "$@" $pins
    echo "$pins" > "$folder/.complete"
  fi
}
install smg "$smg"
install dynamo "$dynamo" --no-deps
install dynamo-imports "$imports"
export PYTHONDONTWRITEBYTECODE=1
failed=0
for part in manifests smg dynamo; do
  case $part in
    dynamo) packages=$PWD/target/cluster/dynamo:$PWD/target/cluster/dynamo-imports ;;
    *) packages=$PWD/target/cluster/smg ;;
  esac
  run=(env PYTHONPATH="$packages" python3 "tests/cluster/$part.py" "$binary")
  if unshare --map-root-user --net true 2>/dev/null; then
    # shellcheck disable=SC2016
    unshare --map-root-user --net sh -c 'ip link set lo up && exec "$@"' sh "${run[@]}" || failed=1
  else
    "${run[@]}" || failed=1
  fi
done
exit $failed

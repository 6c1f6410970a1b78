#!/usr/bin/env bash
# Random requests by our own /openapi.json, right ones and wrong ones, against a server on the simulator: no answer may
# be a server's error, and each is what the document says of it.
#
#   scripts/fuzz-api.sh [BINARY] [SECONDS]
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-target/debug/fullbore} seconds=${2:-120}
packages=$PWD/target/schemathesis
pin='schemathesis==4.32.5'
if [ "$(cat "$packages/.complete" 2>/dev/null)" != "$pin" ]; then
  rm -rf "$packages"
  python3 -m pip install --quiet --target "$packages" "$pin"
  echo "$pin" > "$packages/.complete"
fi
folder=$(mktemp -d)
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$binary" serve --model smollm2 --device sim --port "$port" --max-model-len 256 --kv-memory 64MiB --no-saved-costs \
  --pooling last > "$folder/log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true; rm -rf "$folder"' EXIT
for _ in $(seq 600); do
  if python3 -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health/ready')" 2>/dev/null; then break; fi
  kill -0 $server 2>/dev/null || { cat "$folder/log"; exit 1; }
  sleep 0.1
done
cd "$folder"
PYTHONPATH=$packages "$packages/bin/st" run "http://127.0.0.1:$port/openapi.json" \
  --checks not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance \
  --phases examples,coverage,fuzzing --max-examples 60 --max-time "$seconds" --seed 1 --suppress-health-check all \
  --generation-database none --no-color
if grep -q panicked "$folder/log"; then cat "$folder/log"; exit 1; fi

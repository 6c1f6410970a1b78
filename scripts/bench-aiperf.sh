#!/usr/bin/env bash
# Our client beside PyPI's `aiperf` on one server: both must count the same (benches/aiperf.py, docs/bench.md). Installs
# aiperf under target/python-aiperf once (1.2 GB); then takes about three minutes.
#
#   scripts/bench-aiperf.sh [RESULT [FLAG...]]     FULLBORE=BINARY instead of a release build; flags: benches/aiperf.py
set -euo pipefail
cd "$(dirname "$0")/.."
result=${1:-target/bench-aiperf.json}
binary=${FULLBORE:-target/release/fullbore}
[ -n "${FULLBORE:-}" ] || cargo build --release --locked -p fullbore
venv=target/python-aiperf
pin='aiperf==0.13.0'
if [ "$(cat "$venv/.complete" 2> /dev/null)" != "$pin" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet "$pin"
  echo "$pin" > "$venv/.complete"
fi
"$binary" fetch smollm2
exec python3 benches/aiperf.py --binary "$binary" --aiperf "$venv/bin/aiperf" --output "$result" "${@:2}"

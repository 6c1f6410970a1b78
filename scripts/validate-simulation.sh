#!/usr/bin/env bash
# Whether `fullbore simulate` predicts what this machine does: see benches/validate_simulation.py.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --locked -p fullbore
exec python3 benches/validate_simulation.py "$@"

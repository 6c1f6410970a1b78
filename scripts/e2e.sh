#!/usr/bin/env bash
# Installs the OpenAI client under target/python and runs tests/e2e against the binary given.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=$PWD/target/python
if [ ! -f "$packages/.complete" ]; then
  rm -rf "$packages"
  python3 -m pip install --quiet --target "$packages" 'openai==3.54.0'
  touch "$packages/.complete"
fi
PYTHONPATH=$packages exec python3 tests/e2e/run.py "${1:-target/debug/fullbore}"

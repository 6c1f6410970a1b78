#!/usr/bin/env bash
# Puts what tests read into the cache folder: both models and llama.cpp's tokenizer vectors, each by version and sha256.
set -euo pipefail
cd "$(dirname "$0")/.."
fullbore=target/debug/fullbore
[ -x $fullbore ] || cargo build --locked -p fullbore
$fullbore fetch smollm2
$fullbore fetch gemma3-270m
[ ! -f scripts/vocab.sh ] || scripts/vocab.sh

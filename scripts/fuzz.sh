#!/usr/bin/env bash
# Fuzzes each target of fuzz/ on stable Rust, for FUZZ_SECONDS each, from the corpus that is kept. What is found lies in
# fuzz/artifacts: mend its cause, and put it into fuzz/corpus, whose files are ordinary tests too.
#
#   scripts/fuzz.sh [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-300}
export PATH=$PWD/target/tools/bin:$PATH
if [ "$(cargo-fuzz --version 2>/dev/null)" != "cargo-fuzz 0.13.2" ]; then
  cargo install --quiet cargo-fuzz --version 0.13.2 --locked --root target/tools
fi
cp Cargo.lock fuzz/Cargo.lock
# Without a sanitizer, for those want a nightly compiler; coverage needs none.
options=(--sanitizer none --target-dir target/fuzz)
cargo fuzz build "${options[@]}"
if [ $# = 0 ]; then mapfile -t targets < <(cargo fuzz list); else targets=("$@"); fi
for target in "${targets[@]}"; do
  echo "== fuzz $target ($(date +%H:%M:%S))"
  # New inputs go to the first folder.
  found=target/fuzz/corpus/$target
  mkdir -p "$found"
  dictionary=$target longest=16384
  case $target in
    request | stream) dictionary=api ;;
    grammar | chat_template) longest=2048 ;;
  esac
  cargo fuzz run "${options[@]}" "$target" "$found" "fuzz/corpus/$target" -- -max_total_time="$seconds" -timeout=30 \
    -rss_limit_mb=4096 -malloc_limit_mb=2048 -max_len=$longest \
    -dict="fuzz/dictionaries/$dictionary.dict" -print_final_stats=1 -verbosity=0
done

# Sourced by benches: llama.cpp's server as a peer on loopback (benches/peers.md), one at a time.
#
#   peer_on_cpu MODEL LOG       PyPI's xllamacpp, as many threads as there are cores
#   peer_on_vulkan MODEL LOG    target/llama-vulkan/llama-server on the driver of VK_DRIVER_FILES
#   peer_ends
#
# $peer is what `bench serve --against` takes, $peer_about what `--about` does, with the sha256 of the model's file, which
# stands in results beside that of ours. A peer ends with the shell at the latest.
#
# Both engines hold 16 contexts of 256 tokens: $own_contexts are the flags of ours.
own_contexts=(--max-num-seqs 16 --max-model-len 256 --block-size 32 --kv-blocks 128)
peer_contexts=(--parallel 16 --ctx-size 4096)
packages=$PWD/target/python-bench
pin='xllamacpp==2026.10.11549'
peer_id=
trap peer_ends EXIT

peer_ends() {
  [ -z "$peer_id" ] || { kill "$peer_id" && wait "$peer_id" || true; } 2> /dev/null
  peer_id=
}

# MODEL
model_file() {
  echo "$(basename "$1"), $(stat --dereference --format %s "$1") bytes, sha256 $(sha256sum < "$1" | cut -d ' ' -f 1)"
}

peer_on_cpu() {
  if [ "$(cat "$packages/.complete" 2> /dev/null)" != "$pin" ]; then
    rm -rf "$packages"
    python3 -m pip install --quiet --target "$packages" "$pin"
    echo "$pin" > "$packages/.complete"
  fi
  local flags=("${peer_contexts[@]}" --threads "$(nproc)")
  peer_about="llama.cpp=${pin/==/ } of PyPI: benches/llama_cpp_server.py ${flags[*]}; $(model_file "$1")"
  peer_starts "llama.cpp=" "$2" env PYTHONPATH="$packages" python3 benches/llama_cpp_server.py --model "$1" "${flags[@]}"
}

peer_on_vulkan() {
  local name version flags=("${peer_contexts[@]}" --threads "$(nproc)" --gpu-layers 99)
  name="llama.cpp with Vulkan on Mesa $(basename "$(dirname "$VK_DRIVER_FILES")")"
  version=$(sed -n 's/^version=//p' scripts/llama-vulkan.sh)
  peer_about="$name=llama-cpp-python $version of PyPI, built with Vulkan: llama-server ${flags[*]}; $(model_file "$1")"
  # It leaves devices that are CPUs alone unless one is named.
  peer_starts "$name=" "$2" env GGML_VK_VISIBLE_DEVICES=0 target/llama-vulkan/llama-server --model "$1" "${flags[@]}"
}

# NAME= LOG COMMAND...
peer_starts() {
  local port
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  peer=$1http://127.0.0.1:$port
  "${@:3}" --port "$port" > "$2" 2>&1 &
  peer_id=$!
  local ready="import urllib.request; urllib.request.urlopen('http://127.0.0.1:$port/health')"
  local tries=0
  until python3 -c "$ready" 2> /dev/null; do
    kill -0 "$peer_id" 2> /dev/null || { echo "llama.cpp's server ended; $2 says more" >&2; return 1; }
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { echo "llama.cpp's server is not ready after minutes; $2 says more" >&2; return 1; }
    sleep 0.2
  done
}

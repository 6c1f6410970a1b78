#!/usr/bin/env bash
# Builds llama.cpp's server with its Vulkan backend from the sources that PyPI's llama-cpp-python carries, as a peer for
# benches: target/llama-vulkan/llama-server. Once; some 20 minutes on 2 cores.
#
# Debian 12's Vulkan headers are too old for it (1.3.239), so those of Debian 13 are fetched, and unpacked under target/;
# cmake, ninja and glslc are Debian 12's own and must be installed. glslc 2023.2 knows neither cooperative matrices nor
# integer dot products in GLSL; lavapipe has no use for the first, and what the second would gain there is not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/target/llama-vulkan
[ -x "$out/llama-server" ] && exit 0
say() { echo "llama-vulkan: $*" >&2; }
for tool in cmake ninja glslc; do
  command -v $tool > /dev/null || { say "$tool is missing: apt-get install -y cmake ninja-build glslc"; exit 1; }
done
scripts/lavapipe.sh

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
mkdir -p "$out"/apt/{lists/partial,cache/archives/partial}
sdist=$out/llama_cpp_python-$version.tar.gz
if [ ! -f "$sdist" ]; then
  say "fetching the sources"
  echo "llama-cpp-python==$version --hash=sha256:$sha256" > "$out/requirements.txt"
  python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$out" --requirement "$out/requirements.txt"
fi
source=$out/llama_cpp_python-$version/vendor/llama.cpp
[ -d "$source" ] || tar -xzf "$sdist" -C "$out"

say "fetching Vulkan's headers of Debian 13"
mirror=$(apt-get -o Debug::NoLocking=1 --print-uris update 2> /dev/null | sed -n "s#^'\(.*\)/dists/bookworm/InRelease'.*#\1#p" | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$out/apt/sources.list"
options=(-qq -o Debug::NoLocking=1 -o Dir::State::Lists="$out/apt/lists" -o Dir::Cache="$out/apt/cache" -o APT::Sandbox::User=
  -o Dir::Etc::sourcelist="$out/apt/sources.list" -o Dir::Etc::sourceparts=- -o Acquire::Retries=3)
apt-get "${options[@]}" update >&2
(cd "$out/apt" && apt-get "${options[@]}" download libvulkan-dev spirv-headers >&2
  for deb in libvulkan-dev_*.deb spirv-headers_*.deb; do dpkg-deb -x "$deb" root; done)

say "building"
headers=$out/apt/root/usr
cmake -S "$source" -B "$out/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_VULKAN=ON \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DVulkan_INCLUDE_DIR="$headers/include" -DVulkan_LIBRARY="$PWD/target/lavapipe/lib/libvulkan.so.1" \
  -DCMAKE_CXX_FLAGS="-I$headers/include" -DSPIRV-Headers_DIR="$headers/share/cmake/SPIRV-Headers" > "$out/configure.log"
ninja -C "$out/build" llama-server > "$out/build.log"
cp "$out/build/bin/llama-server" "$out/llama-server"
say "done: $out/llama-server"

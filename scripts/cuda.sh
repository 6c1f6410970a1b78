#!/usr/bin/env bash
# Puts NVRTC and ptxas, NVIDIA's compilers, under target/cuda, from PyPI, by version and sha256: what compiles CUDA
# kernels on a machine without a GPU. `source target/cuda/env` to use them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/target/cuda
pins='nvidia-cuda-nvrtc-cu12==12.2.140 --hash=sha256:b1cdcae6443cb7cdcfb5d1bf51896a148c9f82f9e65b27db9ab095eaed689aa7
nvidia-cuda-nvcc-cu12==12.2.140 --hash=sha256:c6ff4ae7a636eb6cab7621191e19ac3779690686bbcf52c04d8b1ca2944e1e27'
[ "$(cat "$out/.complete" 2> /dev/null)" != "$pins" ] || exit 0
echo "cuda: fetching NVRTC and ptxas" >&2
rm -rf "$out"
mkdir -p "$out/lib" "$out/bin"
echo "$pins" > "$out/pins.txt"
python3 -m pip download --quiet --no-deps --require-hashes --dest "$out/wheels" --requirement "$out/pins.txt"
for wheel in "$out"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$out/wheels"; done
mv "$out"/wheels/nvidia/cuda_nvrtc/lib/libnvrtc*.so* "$out/lib/"
mv "$out/wheels/nvidia/cuda_nvcc/bin/ptxas" "$out/bin/"
chmod +x "$out/bin/ptxas"
rm -rf "$out/wheels"
printf 'export LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\nexport PTXAS=%q\n' "$out/lib" "$out/bin/ptxas" > "$out/env"
echo "$pins" > "$out/.complete"

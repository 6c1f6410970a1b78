#!/usr/bin/env bash
# Puts llama.cpp's tokenizer vectors (vocabularies, texts and their ids) and its collection of published chat templates
# into the cache folder, each file checked by sha256.
#
# They come out of llama-cpp-python's source package on PyPI, which carries llama.cpp's tree. pip insists on asking a
# source package's build backend for its name, so it is given one that answers just that: nothing is built or run.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.3.36
archive_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
vocab=${FULLBORE_CACHE:-$HOME/.cache/fullbore}/vocab
say() { echo "vocab: $*" >&2; }

mkdir -p "$vocab"
sums=$PWD/scripts/vocab.sha256
if (cd "$vocab" && sha256sum --check --status "$sums" 2>/dev/null); then exit 0; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/backend/scikit_build_core"
touch "$work/backend/scikit_build_core/__init__.py"
cat > "$work/backend/scikit_build_core/build.py" <<PY
import os

def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "llama_cpp_python-$version.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: $version\n")
    return name
PY
echo "llama-cpp-python==$version --hash=sha256:$archive_sha256" > "$work/requirements.txt"
say "fetching llama-cpp-python $version (77 MB)"
PYTHONPATH=$work/backend python3 -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation \
  --require-hashes --requirement "$work/requirements.txt" --dest "$work" || {
  say "pip could not fetch llama-cpp-python==$version; check the network and pip's own settings (pip config list)"
  exit 1
}
models=llama_cpp_python-$version/vendor/llama.cpp/models
tar -xzf "$work/llama_cpp_python-$version.tar.gz" -C "$work" --wildcards "$models/ggml-vocab-*" "$models/templates/*"
(cd "$work/$models" && sha256sum --check --quiet "$sums")
mkdir -p "$vocab/templates"
# Renamed into place, so that a cut-off copy is never found.
while read -r _ file; do
  cp "$work/$models/$file" "$vocab/$file.part"
  mv "$vocab/$file.part" "$vocab/$file"
done < "$sums"
say "$(wc -l < "$sums") files in $vocab"

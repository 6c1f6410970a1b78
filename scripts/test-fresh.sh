#!/usr/bin/env bash
# Proves `make serve` and `make test` on a fresh Debian 12: a root made by mmdebstrap that holds git, build-essential and
# python3-pip, this machine's Rust toolchain, and a clone of the committed tree. Needs root (for chroot) and mmdebstrap.
#
#   scripts/test-fresh.sh [FOLDER]   FOLDER is where the root is made and left; default: a temporary one, removed at the end
set -euo pipefail
cd "$(dirname "$0")/.."
say() { echo "test-fresh: $*" >&2; }
[ "$(id -u)" = 0 ] || { say "needs root to enter the new system"; exit 1; }
command -v mmdebstrap >/dev/null || { say "mmdebstrap was not found; apt-get install mmdebstrap"; exit 1; }
rustup=$(rustc --print sysroot)

if [ $# -gt 0 ]; then folder=$1; mkdir -p "$folder"; else folder=$(mktemp -d); fi
root=$folder/root
cleanup() {
  mountpoint -q "$root/proc" && umount "$root/proc"
  mountpoint -q "$root/dev" && umount "$root/dev"
  [ -n "${keep:-}" ] || rm -rf --one-file-system "$folder"
}
[ $# -eq 0 ] || keep=yes
trap cleanup EXIT

say "making a Debian 12 root"
mirror=$(apt-get -o Debug::NoLocking=1 --print-uris update | sed -n "s#^'\(.*\)/dists/bookworm/InRelease'.*#\1#p" | head -n 1)
mmdebstrap --quiet --variant=minbase --include=git,build-essential,python3-pip,ca-certificates,apt bookworm "$root" "$mirror"
say "adding the Rust toolchain of this machine"
mkdir -p "$root/opt"
cp -a "$rustup" "$root/opt/rust"
cp -a /etc/ssl/certs/. "$root/etc/ssl/certs/"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
[ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
chroot "$root" useradd --create-home user
git clone --quiet . "$root/home/user/fullbore"
chroot "$root" chown -R user:user /home/user/fullbore

# inside COMMAND: as an ordinary user without a terminal, in the clone; certificates are the only thing taken from outside.
inside() {
  chroot --userspec=user:user "$root" env -i HOME=/home/user PATH=/opt/rust/bin:/usr/bin:/bin LANG=C.UTF-8 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt bash -c "cd ~/fullbore && $1" < /dev/null
}

say "make serve"
inside 'set -m
  make serve ARGS="--port 18080" > ~/serve.log 2>&1 & echo $! > ~/serve.pid
  for _ in $(seq 1200); do
    if python3 -c "import urllib.request; urllib.request.urlopen(\"http://127.0.0.1:18080/health/ready\")" 2>/dev/null; then break; fi
    kill -0 $(cat ~/serve.pid) 2>/dev/null || { cat ~/serve.log; exit 1; }
    sleep 1
  done
  tail -n 20 ~/serve.log
  python3 - <<PY
import json, urllib.request
page = urllib.request.urlopen("http://127.0.0.1:18080/").read().decode()
assert "<title>" in page
body = {"model": "smollm2", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
request = urllib.request.Request("http://127.0.0.1:18080/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
reply = json.load(urllib.request.urlopen(request))
assert reply["usage"]["completion_tokens"] > 0
print("completion:", reply["choices"][0]["message"]["content"])
PY
  status=$?
  # The server and the make above it are one process group.
  kill -INT -- -$(cat ~/serve.pid)
  wait
  exit $status'
say "make test"
inside 'make test'
say "both commands work on a fresh Debian 12"

#!/usr/bin/env bash
# Finds Chromium, Prometheus' promtool and wrk, for the end-to-end tests; what is missing is fetched from Debian and
# unpacked under target/browser: nothing is installed, and no root is needed.
#
#   target/browser/env   what to source: CHROMIUM and WRK (command lines) and PROMTOOL
#
# Packages come from the mirror that this machine's apt already uses, checked by apt against Debian's keyring.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/target/browser
grep -q WRK "$out/env" 2>/dev/null && exit 0
say() { echo "browser: $*" >&2; }

chromium=$(command -v chromium || command -v chromium-headless-shell || true)
promtool=$(command -v promtool || true)
wrk=$(command -v wrk || true)
mkdir -p "$out"
if [ -n "$chromium" ] && [ -n "$promtool" ] && [ -n "$wrk" ]; then
  printf 'export CHROMIUM=%q\nexport PROMTOOL=%q\nexport WRK=%q\n' "$chromium" "$promtool" "$wrk" > "$out/env"
  exit 0
fi

command -v apt-get >/dev/null || { say "apt-get is missing: install chromium, prometheus and wrk, for the tests of the page, of the metrics and under load"; exit 1; }
mirror=$(apt-get -o Debug::NoLocking=1 --print-uris update 2>/dev/null | sed -n "s#^'\(.*\)/dists/bookworm/InRelease'.*#\1#p" | head -n 1 || true)
[ -n "$mirror" ] || { say "this machine's apt has no bookworm source, so there is no mirror to ask; add one to /etc/apt/sources.list"; exit 1; }
work=$out/work
rm -rf "$out"
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,debs,root}
: > "$work/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" > "$work/sources.list"
# apt with its own state: the machine's package lists and locks stay untouched, and every package counts as absent.
options=(-qq -o Debug::NoLocking=1 -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache"
  -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0 -o APT::Sandbox::User=
  -o APT::Install-Recommends=0 -o Acquire::Retries=3)
say "reading package lists"
apt-get "${options[@]}" update >&2

say "fetching Chromium, a font, promtool and wrk"
# What the base system has in every case; unpacking it would shadow the machine's own.
base='^(libc6|libcrypt1|libgcc-s1|gcc-12-base|libstdc\+\+6|python3.*|libpython3.*|perl.*|libperl.*|debconf|dpkg|tar|tzdata|ucf|sensible-utils)$'
(cd "$work/debs" && apt-get "${options[@]}" --print-uris install chromium-headless-shell fonts-dejavu-core fontconfig-config wrk \
  | sed -n "s/^'[^']*' \([^ _]*\)_.*/\1/p" | sort -u | while read -r name; do [[ $name =~ $base ]] || echo "$name"; done \
  | xargs apt-get "${options[@]}" download >&2
  apt-get "${options[@]}" download prometheus >&2)
for deb in "$work"/debs/*.deb; do
  case $(basename "$deb") in
    prometheus_*) dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/root" ./usr/bin/promtool ;;
    *) dpkg-deb -x "$deb" "$work/root" ;;
  esac
done
# What draws on a screen, and what is to be read.
find "$work/root" \( -name 'libLLVM*' -o -path '*/dri/*' -o -path '*/share/doc/*' -o -name 'libvk_swiftshader*' \) -delete
mv "$work/root" "$out/root"
rm -rf "$work"

root=$out/root
libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat > "$out/fonts.conf" <<EOF
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>$root/usr/share/fonts</dir><cachedir>$out/font-cache</cachedir></fontconfig>
EOF
program=$(find "$root/usr/lib" -name 'chromium-headless-shell' -o -name headless_shell | head -n 1)
[ -n "$program" ] || { say "the package chromium-headless-shell holds no program of that name"; exit 1; }
printf 'export CHROMIUM=%q\nexport PROMTOOL=%q\nexport WRK=%q\n' \
  "env LD_LIBRARY_PATH=$libraries FONTCONFIG_FILE=$out/fonts.conf $program" "$root/usr/bin/promtool" \
  "env LD_LIBRARY_PATH=$libraries $root/usr/bin/wrk" > "$out/env"
say "unpacked $("$root/usr/bin/promtool" --version 2>&1 | head -n 1), wrk and $(basename "$program")"

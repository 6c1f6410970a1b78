#!/usr/bin/env bash
# Fetches Debian's software Vulkan drivers (lavapipe, and SwiftShader out of Chromium) and its SPIR-V validator and
# unpacks them under target/lavapipe; installs nothing, needs no root.
#
#   target/lavapipe/lib            the Vulkan loader and the libraries that the drivers link to
#   target/lavapipe/<mesa>/icd.json one driver a Mesa version: bookworm's and bookworm-backports'
#   target/lavapipe/bin/spirv-val  what the tests hold the shaders against
#   target/lavapipe/swiftshader    a driver that one test asks for by itself
#   target/lavapipe/env            what to source: VK_DRIVER_FILES (lavapipe's), LD_LIBRARY_PATH, SPIRV_VAL, SWIFTSHADER_ICD
#
# Packages come from the mirror that this machine's apt already uses, checked by apt against Debian's keyring.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$PWD/target/lavapipe
# Two drivers and SwiftShader.
icds=("$out"/*/icd.json)
[ -f "$out/env" ] && [ -x "$out/bin/spirv-val" ] && [ ${#icds[@]} = 3 ] && exit 0
say() { echo "lavapipe: $*" >&2; }

command -v apt-get >/dev/null || { say "apt-get is missing: these drivers come from Debian packages, so this needs Debian 12"; exit 1; }
# What apt would ask for an update names its mirror, on a machine that has never fetched a list, too.
mirror=$(apt-get -o Debug::NoLocking=1 --print-uris update 2>/dev/null | sed -n "s#^'\(.*\)/dists/bookworm/InRelease'.*#\1#p" | head -n 1 || true)
[ -n "$mirror" ] || { say "this machine's apt has no bookworm source, so there is no mirror to ask; add one to /etc/apt/sources.list"; exit 1; }

work=$out/work
rm -rf "$out"
mkdir -p "$out"/{bin,lib,swiftshader} "$work"/{state/lists/partial,cache/archives/partial,debs}
: > "$work/status"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for suite in bookworm bookworm-backports; do
  echo "deb [signed-by=$keyring] $mirror $suite main"
done > "$work/sources.list"

# apt with its own state: the machine's package lists and locks stay untouched, and every package counts as absent.
options=(-qq -o Debug::NoLocking=1 -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache"
  -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0 -o APT::Sandbox::User=
  -o APT::Install-Recommends=0 -o Acquire::Retries=3)

say "reading package lists"
apt-get "${options[@]}" update >&2 || { say "$mirror has no lists of bookworm and bookworm-backports, which the drivers are of"; exit 1; }
# What the base system has in every case, or what only python3 pulls in; unpacking it would shadow the machine's own.
base='^(libc6|libcrypt1|libgcc-s1|gcc-12-base|libstdc\+\+6|python3.*|libpython3.*|media-types|mailcap|perl.*|libperl.*|debconf|dpkg|tar|libssl.*|tzdata|readline-common|lib(krb5|gssapi|k5|com-err|keyutils|db5|sqlite|nsl|tirpc|readline|ncurses|pcre|selinux|acl|bz2|uuid).*)=$'
fetch() { # fetch SUITE DIRECTORY: the driver of that suite and all it links to
  mkdir -p "$2"
  apt-get "${options[@]}" -t "$1" --print-uris install mesa-vulkan-drivers libvulkan1 \
    | sed -n "s/^'[^']*' \([^ _]*\)_\([^ _]*\)_.*/\1= \2/p" | sed 's/%3a/:/g' \
    | while read -r name version; do [[ $name =~ $base ]] || echo "$name$version"; done > "$2.list" \
    && (cd "$2" && xargs -a "$2.list" apt-get "${options[@]}" download >&2)
}

drivers=()
for suite in bookworm bookworm-backports; do
  say "fetching the driver of $suite"
  debs=$work/debs/$suite
  fetch "$suite" "$debs" || { say "the driver of $suite cannot be had: tests need two versions of Mesa, so they cannot run"; exit 1; }
  for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$work/root-$suite"; done
  driver=$(find "$work/root-$suite" -name libvulkan_lvp.so | head -n 1)
  [ -n "$driver" ] || { say "mesa-vulkan-drivers of $suite holds no libvulkan_lvp.so"; exit 1; }
  version=$(dpkg-deb -f "$debs"/mesa-vulkan-drivers_*.deb Version | sed 's/-.*//')
  [ ! -e "$out/$version" ] || { say "$suite has Mesa $version, as the suite before it: tests need two versions"; exit 1; }
  mkdir "$out/$version"
  mv "$driver" "$out/$version/"
  printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.3.0"}}\n' "$out/$version/libvulkan_lvp.so" > "$out/$version/icd.json"
  # The later suite's libraries replace the earlier one's: they are newer, and both drivers run on them.
  find "$work/root-$suite" -name '*.so*' ! -name 'libvulkan_*' ! -path '*/vulkan/*' \( -type f -o -type l \) -exec cp -a -f {} "$out/lib/" \;
  drivers+=("$out/$version/icd.json")
done

say "fetching SwiftShader"
library=./usr/lib/chromium/libvk_swiftshader.so
(cd "$work" && mkdir root-swiftshader && apt-get "${options[@]}" -t bookworm download chromium-common >&2 \
  && dpkg-deb --fsys-tarfile chromium-common_*.deb | tar -x -C root-swiftshader "$library") \
  || { say "chromium-common could not be had: one test needs its SwiftShader, so the tests cannot run"; exit 1; }
mv "$work/root-swiftshader/$library" "$out/swiftshader/"
printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.1.0"}}\n' "$out/swiftshader/libvk_swiftshader.so" > "$out/swiftshader/icd.json"

say "fetching the SPIR-V validator"
(cd "$work" && apt-get "${options[@]}" -t bookworm download spirv-tools >&2 && dpkg-deb -x spirv-tools_*.deb root-tools) \
  || { say "spirv-tools could not be had: tests need its spirv-val, so they cannot run"; exit 1; }
mv "$work/root-tools/usr/bin/spirv-val" "$out/bin/"

files=$(IFS=:; echo "${drivers[*]}")
printf 'export VK_DRIVER_FILES=%q\nexport LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\nexport MESA_SHADER_CACHE_DIR=%q\nexport SPIRV_VAL=%q\nexport SWIFTSHADER_ICD=%q\n' "$files" "$out/lib" "$out/shader-cache" "$out/bin/spirv-val" "$out/swiftshader/icd.json" > "$out/env"
rm -rf "$work"
say "drivers: $(for driver in "${drivers[@]}"; do basename "$(dirname "$driver")"; done | tr '\n' ' ')"

#!/usr/bin/env bash
# The plots of a page that `fullbore bench report` has made, as PNG files, drawn by a headless Chromium.
#
#   scripts/plots.sh PAGE.html FOLDER
set -euo pipefail
[ $# = 2 ] || { echo "say which page and which folder: scripts/plots.sh PAGE.html FOLDER" >&2; exit 2; }
page=$(realpath "$1") folder=$(realpath -m "$2")
cd "$(dirname "$0")/.."
scripts/browser.sh
source target/browser/env
mkdir -p "$folder"
PYTHONPATH=tests/e2e python3 scripts/plots.py "$page" "$folder"

#!/usr/bin/env bash
# Starts SMG before workers that are given by their addresses; needs `pip install smg` (1.13).
#
#   deploy/smg.sh http://10.0.0.1:8080 http://10.0.0.2:8080        # HOST and PORT (127.0.0.1, 30000) say where it listens
#
# METRICS_PORT (29000) is where it tells Prometheus, and POLICY (cache_aware) how it chooses a worker.
set -euo pipefail
[ $# -gt 0 ] || { echo "smg.sh: give the addresses of workers, such as http://10.0.0.1:8080" >&2; exit 2; }
# Health is asked every second, so that a worker that leaves is sent nothing after two.
exec smg launch --host "${HOST:-127.0.0.1}" --port "${PORT:-30000}" --policy "${POLICY:-cache_aware}" \
  --prometheus-host "${HOST:-127.0.0.1}" --prometheus-port "${METRICS_PORT:-29000}" --worker-urls "$@" \
  --health-check-interval-secs 1 --health-check-timeout-secs 2 --health-failure-threshold 2 \
  --health-success-threshold 1 --worker-startup-check-interval 1 --disable-tokenizer-autoload

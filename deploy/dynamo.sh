#!/usr/bin/env bash
# Starts NVIDIA Dynamo's frontend, and a sidecar for each worker that is given by its --grpc-port's address; needs
# ai-dynamo 1.6 (docs/scaling.md has how to install it).
#
#   deploy/dynamo.sh 127.0.0.1:50051 127.0.0.1:50052        # HOST and PORT (127.0.0.1, 8000) say where it listens
#
# NODE, an address of this machine that others reach (127.0.0.1), and DYN_FILE_KV, a folder that all of them see, let
# machines find each other: each runs this for its own workers, those without a frontend with PORT=none. Told to end, it
# takes nothing more and ends DRAIN (60) seconds later, which is to be the time of the longest answers; then end the workers.
set -euo pipefail
[ $# -gt 0 ] || { echo "dynamo.sh: give the addresses of workers, such as 127.0.0.1:50051" >&2; exit 2; }
node=${NODE:-127.0.0.1}
export DYN_TCP_RPC_HOST=$node DYN_TCP_RESPONSE_STREAM_HOST=$node DYN_EVENT_PLANE_HOST=$node
export DYN_FILE_KV=${DYN_FILE_KV:-/tmp/dynamo-$(id -u)} HF_HUB_OFFLINE=1
# What a sidecar still serves so long after it was told to end it cuts off, and tells clients that it was whole.
export DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS=${DRAIN:-60} DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT=$((${DRAIN:-60} + 30))
planes=(--discovery-backend file --request-plane tcp --event-plane zmq)
pids=()
end() { kill "${pids[@]}" 2>/dev/null || true; wait; }
trap end EXIT
trap 'exit 143' INT TERM
for worker in "$@"; do
  python3 -m dynamo.vllm.sidecar "${planes[@]}" --grpc-endpoint "$worker" &
  pids+=($!)
done
if [ "${PORT:-8000}" != none ]; then
  # A request that its worker has lost is tried elsewhere, three times at most.
  python3 -m dynamo.frontend --http-host "${HOST:-127.0.0.1}" --http-port "${PORT:-8000}" "${planes[@]}" \
    --router-mode kv --migration-limit 3 &
  pids+=($!)
fi
# One that ends takes the others with it, for whoever watches this script to start all anew.
wait -n

"""End to end: many connections that ask as fast as they are answered, by wrk.

    python3 tests/e2e/load.py BINARY

Needs what run.py needs, and wrk (scripts/e2e.sh sees to all). A check of what is answered, and no measurement.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

from run import Server, run, until

SECONDS = 2
NUM_CONNECTIONS = 64
SCRIPT = pathlib.Path(__file__).with_name("load.lua")


def load(server):
    """What wrk was answered."""
    command = [*shlex.split(os.environ["WRK"]), "-t1", f"-c{NUM_CONNECTIONS}", f"-d{SECONDS}s", "-s", str(SCRIPT),
               server.url + "/v1/completions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"        {told}")
    assert told["other"] == 0 and told["broken"] == 0, told
    return told


def is_at_rest(server):
    """Nothing of it is left: no sequence, no block, no complaint."""
    until("all to end", lambda: server.gauge("fullbore_requests_running") == server.gauge("fullbore_requests_waiting") == 0)
    until("the blocks", lambda: server.gauge('fullbore_kv_blocks{model_name="smollm2",state="used"}') == 0)
    assert server.get("/health/ready")[0] == server.get("/health/live")[0] == 200
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 4})[0] == 200
    assert 'status="5xx"' not in server.get("/metrics")[1], "an error of the server's own"


def what_fits_is_answered():
    with Server("sim") as server:
        told = load(server)
        assert told["refused"] == 0 and told["ok"] > NUM_CONNECTIONS, told
        is_at_rest(server)


def what_does_not_fit_is_told_when_to_come_again():
    with Server("sim", "--max-queued-requests", "8") as server:
        told = load(server)
        assert told["refused"] > 0 and told["ok"] > NUM_CONNECTIONS, told
        # Some were not waited for.
        assert server.gauge('fullbore_requests_refused_total{cause="queue_full"}') >= told["refused"], told
        is_at_rest(server)


def main():
    tests = [what_fits_is_answered, what_does_not_fit_is_told_when_to_come_again]
    results = [run("load", test) for test in tests]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(0 if all(results) else 1)


main()

"""Whether `fullbore bench serve` counts what an outside client does: PyPI's `aiperf` and ours, in turns, on one server.

    python3 benches/aiperf.py --binary target/release/fullbore --aiperf target/python-aiperf/bin/aiperf

Both send requests of one form in a closed loop: prompts of random token ids to /v1/completions, streamed, greedy, ends
ignored. The server's log of each request is the third count, which neither client makes: where the device itself drifts
from run to run, it tells that from a client that is wrong. The server has one core and the clients have the others, so
that a client which takes more of the machine does not slow what it measures. Ends with status 1 where clients differ by
more than the tolerance.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

WARM_UP = 4
# Ids of SmolLM2 that are ordinary tokens.
IDS = range(1000, 48000)
TOLERANCE = 0.02
# Of these both clients must say the same.
COUNTS = ["requests", "prompt_tokens", "output_tokens"]
# Of these too, each divided by what the server's log of the same run says.
RATES = ["requests_per_s", "output_tokens_per_s"]
LATENCIES = ["ttft_p50_ms", "ttft_p90_ms", "itl_p50_ms", "tpot_p50_ms", "e2e_p50_ms"]
CLIENTS = ["aiperf", "fullbore"]


def on_cores(cores):
    return lambda: os.sched_setaffinity(0, cores)


def all_cores():
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("the server and the clients need a core each, and there is one")
    return {cores[0]}, set(cores[1:])


class Server:
    """`fullbore serve` on the cpu; `with` ends it."""

    def __init__(self, args, folder, cores):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log_path = folder / "server.log"
        command = [args.binary, "serve", "--model", args.model, "--served-model-name", "model", "--device", "cpu",
                   "--port", self.url.rsplit(":", 1)[1], "--max-num-seqs", str(args.clients), "--max-model-len", "1024",
                   "--kv-memory", "256MiB", "--no-saved-costs", "--log-format", "json"]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, preexec_fn=on_cores(cores))
        deadline = time.monotonic() + 60
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                sys.exit(f"the server did not become ready:\n{self.log_path.read_text()}")
            time.sleep(0.05)
        self.read = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def is_ready(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health/ready", timeout=5) as reply:
            return reply.status == 200

    def ended(self):
        """What the log says of requests that ended since the last call, in the order in which they came."""
        # A client has its answer before the line about it is written.
        time.sleep(0.5)
        lines = self.log_path.read_text().splitlines()
        new, self.read = lines[self.read:], len(lines)
        requests = []
        for line in (json.loads(line) for line in new if line.startswith("{")):
            if line["target"] == "fullbore::request":
                ended = datetime.datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp()
                requests.append({**line, "ended": ended, "came": ended - line["total_ms"] / 1e3})
        return sorted(requests, key=lambda request: request["came"])


def by_the_log(requests):
    """What the server's log of a run comes to, without its warm-up."""
    requests = requests[WARM_UP:]
    all_of = lambda name: [request[name] for request in requests]
    assert sum(all_of("cached_tokens")) == 0, "a prompt came from the cache"
    duration, output_tokens = max(all_of("ended")) - min(all_of("came")), sum(all_of("generated_tokens"))
    return {
        "requests": len(requests),
        "prompt_tokens": sum(all_of("prompt_tokens")),
        "output_tokens": output_tokens,
        "requests_per_s": len(requests) / duration,
        "output_tokens_per_s": output_tokens / duration,
        "ttft_p50_ms": statistics.median(all_of("first_token_ms")),
        "e2e_p50_ms": statistics.median(all_of("total_ms")),
    }


def run(command, folder, cores, environment={}):
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=on_cores(cores), cwd=folder,
                          env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{command[0]} ended with status {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def by_fullbore(args, server, folder, cores, seed):
    run([args.binary, "bench", "serve", "--model", args.model, "--url", server.url, "--concurrency", str(args.clients),
         "--limit", str(args.requests), "--lengths", f"fixed:{args.prompt}:{args.output_tokens}", "--runs", "1",
         "--warm-up", str(WARM_UP), "--seed", str(seed), "--output", str(folder / "ours.json")], folder, cores)
    [measurement] = json.loads((folder / "ours.json").read_text())["measurements"]
    [told] = measurement["runs"]
    if told["invalid"]:
        sys.exit(f"our client doubts its run: {told['invalid']}")
    counts = {"requests": told["counts"]["completed"], **{name: told["counts"][name] for name in COUNTS[1:]}}
    return {**counts, **{name: told["metrics"][name] for name in RATES + LATENCIES}}


def no_tokenizer(folder):
    """Where aiperf finds a tokenizer, without which it does not start though it counts by what servers say: one without
    words, in the form of a Hugging Face cache."""
    model = folder / "tokenizer" / "hub" / "models--model"
    files = {
        "refs/main": "0",
        "snapshots/0/tokenizer.json": json.dumps({
            "version": "1.0", "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}),
        "snapshots/0/tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}),
    }
    for name, text in files.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    return {"HF_HOME": str(folder / "tokenizer"), "HF_HUB_OFFLINE": "1"}


def by_aiperf(args, server, folder, cores, seed):
    """It sends bodies as they are given; the first of them are its warm-up."""
    ids = random.Random(seed)
    body = {"model": "model", "max_tokens": args.output_tokens, "temperature": 0, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True}
    bodies = [{**body, "prompt": ids.choices(IDS, k=args.prompt)} for _ in range(WARM_UP + args.requests)]
    inputs = folder / "inputs.json"
    inputs.write_text(json.dumps({"data": [{"session_id": str(n), "payloads": [b]} for n, b in enumerate(bodies)]}))
    artifacts = folder / f"aiperf-{seed}"
    run([args.aiperf, "profile", "--model", "model", "--url", server.url, "--endpoint-type", "completions",
         "--streaming", "--use-server-token-count", "--input-file", str(inputs), "--custom-dataset-type", "inputs-json",
         "--dataset-sampling-strategy", "sequential", "--concurrency", str(args.clients),
         "--request-count", str(args.requests), "--warmup-request-count", str(WARM_UP), "--workers-max", "1",
         "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--output-artifact-dir", str(artifacts)],
        folder, cores, {**no_tokenizer(folder), "NO_PROXY": "127.0.0.1"})
    told = json.loads((artifacts / "profile_export_aiperf.json").read_text())
    if told.get("error_summary") or told.get("was_cancelled") or told.get("is_complete") is False:
        sys.exit(f"aiperf's run is not whole: {told.get('error_summary')} {told.get('incomplete_reason')}")
    return {
        "requests": told["request_count"]["avg"],
        "prompt_tokens": told["total_isl"]["avg"],
        "output_tokens": told["total_osl"]["avg"],
        "requests_per_s": told["request_throughput"]["avg"],
        "output_tokens_per_s": told["output_token_throughput"]["avg"],
        "ttft_p50_ms": told["time_to_first_token"]["p50"],
        "ttft_p90_ms": told["time_to_first_token"]["p90"],
        "itl_p50_ms": told["inter_chunk_latency"]["p50"],
        # Its "inter token latency" is of a request: what we, as vLLM, call the time per output token.
        "tpot_p50_ms": told["inter_token_latency"]["p50"],
        "e2e_p50_ms": told["request_latency"]["p50"],
    }


def rounds_of(args, folder):
    server_cores, client_cores = all_cores()
    with Server(args, folder, server_cores) as server:
        for nth in range(args.rounds):
            told = {}
            # Who begins changes from round to round.
            for client in CLIENTS if nth % 2 else reversed(CLIENTS):
                measure = by_aiperf if client == "aiperf" else by_fullbore
                told[client] = measure(args, server, folder, client_cores, 1 + nth)
                told[client + "_by_the_log"] = by_the_log(server.ended())
                print(f"round {nth + 1}, {client}: {told[client]['output_tokens_per_s']:.1f} tokens/s", flush=True)
            yield told


def summed_up(rounds):
    """A row a metric: medians over rounds of both clients and of the log under each, and of ratios within a round."""
    rows = {}
    for name in COUNTS + RATES + LATENCIES:
        median = lambda of: statistics.median(map(of, rounds))
        row = {client: median(lambda told: told[client][name]) for client in CLIENTS}
        row["ratio"] = median(lambda told: told["fullbore"][name] / told["aiperf"][name])
        if name in rounds[0]["aiperf_by_the_log"]:
            for client in CLIENTS:
                log = client + "_by_the_log"
                row[log] = median(lambda told: told[log][name])
                row[client + "_to_log"] = median(lambda told: told[client][name] / told[log][name])
        rows[name] = row
    return rows


def differences(rounds, rows):
    """In words, what is outside the tolerance: counts in any round, rates in the median of them."""
    compared = {}
    for nth, told in enumerate(rounds):
        for name in COUNTS:
            at = f"{name} of round {nth + 1}"
            compared[f"{at}, fullbore to aiperf"] = told["fullbore"][name] / told["aiperf"][name]
            for client in CLIENTS:
                compared[f"{at}, {client} to the log"] = told[client][name] / told[client + "_by_the_log"][name]
    for name in RATES:
        to_log = {client: rows[name][client + "_to_log"] for client in CLIENTS}
        compared.update({f"{name}, {client} to the log": ratio for client, ratio in to_log.items()})
        # The device's own drift is in a client's rate and in the log's of that run.
        compared[f"{name}, each to the log, fullbore to aiperf"] = to_log["fullbore"] / to_log["aiperf"]
    return [f"{what}: {ratio:.4f}" for what, ratio in compared.items() if abs(ratio - 1) > TOLERANCE]


def table(rows):
    columns = {"fullbore": "fullbore", "aiperf": "aiperf", "ratio": "ratio", "fullbore_to_log": "fullbore/log",
               "aiperf_to_log": "aiperf/log"}
    print(f"{'':22}" + "".join(f"{title:>14}" for title in columns.values()))
    for name, row in rows.items():
        number = lambda key: "-" if key not in row else f"{row[key]:.{2 if key in CLIENTS else 4}f}"
        print(f"{name:22}" + "".join(f"{number(key):>14}" for key in columns))


def result_of(args, ours, rounds, rows, differ):
    software = ours["software"]
    outside = subprocess.run([args.aiperf, "--version"], capture_output=True, text=True).stdout.strip()
    load = {name: getattr(args, name) for name in ["clients", "requests", "prompt", "output_tokens"]}
    rounded = lambda of: {name: rounded(row) if isinstance(row, dict) else round(row, 4) for name, row in of.items()}
    return {
        "what": "one server, measured by two clients in turns and by its own log; docs/bench.md says what they are",
        "when": datetime.date.today().isoformat(),
        "command": "scripts/bench-aiperf.sh",
        "commit": software["commit"],
        "machine": f"{ours['machine']['cpu']}, {os.cpu_count()} cores",
        "driver": f"fullbore {software['version']}, {software['build']} profile, cpu on one core",
        "outside_client": f"aiperf {outside}",
        "model": args.model,
        **load,
        "tolerance": TOLERANCE,
        "differ": differ,
        "medians": rounded(rows),
        "rounds": list(map(rounded, rounds)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True, type=os.path.abspath)
    parser.add_argument("--aiperf", required=True, type=os.path.abspath)
    parser.add_argument("--model", default="smollm2")
    for flag, default in [("clients", 8), ("requests", 48), ("prompt", 32), ("output-tokens", 32), ("rounds", 3)]:
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rounds = list(rounds_of(args, folder))
        ours = json.loads((folder / "ours.json").read_text())
    rows = summed_up(rounds)
    table(rows)
    differ = differences(rounds, rows)
    if args.output:
        args.output.write_text(json.dumps(result_of(args, ours, rounds, rows, differ), indent=1) + "\n")
    for difference in differ:
        print(f"more than {TOLERANCE:.0%} apart: {difference}", file=sys.stderr)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()

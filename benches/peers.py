"""Fullbore beside llama.cpp on the same machine, in one run, as ratios.

Both serve the same model file over HTTP with the same number of slots and threads. The same client sends each the same
prompts (seeded random token ids, all distinct, so that no prefix cache helps), taking turns, so that a drifting machine
hurts both alike. Prints a table and, with --out, appends a result file as JSON.

  decode     (time of PROMPT+OUTPUT tokens - time of PROMPT+1 tokens), one stream: tokens a second after the first
  streams    output tokens of 16 concurrent requests / time until all have ended, prefill included
  ready      from process start until /health/ready answers 200, the model file in the page cache
  memory     peak resident bytes / (packed weights + KV + scratch as the server's own table says)
"""

import argparse
import concurrent.futures
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import urllib.request

PROMPT, OUTPUT, VOCAB = 128, 64, 49152


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


class Fullbore:
    def __init__(self, binary, model, device, port, slots, kv):
        self.url = f"http://127.0.0.1:{port}"
        command = [binary, "serve", "--model", model, "--device", device, "--port", str(port), "--max-num-seqs", str(slots),
                   "--kv-memory", kv]
        start = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_ready(self.url + "/health/ready", self.process)
        self.ready_s = time.monotonic() - start
        with urllib.request.urlopen(self.url + "/v1/models", timeout=10) as reply:
            self.card = json.load(reply)["data"][0]

    def complete(self, prompt, output):
        body = {"model": self.card["id"], "prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
        reply = post(self.url + "/v1/completions", body)
        assert reply["usage"]["completion_tokens"] == output, reply["usage"]

    def peak_bytes(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


class LlamaCpp:
    def __init__(self, model, port, slots, threads):
        self.url = f"http://127.0.0.1:{port}"
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama_cpp_server.py")
        command = [sys.executable, script, model, str(port), str(slots), str(threads), str((PROMPT + OUTPUT + 16) * slots)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_ready(self.url + "/health", self.process)

    def complete(self, prompt, output):
        body = {"prompt": prompt, "n_predict": output, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        reply = post(self.url + "/completion", body)
        assert reply["tokens_predicted"] == output, reply["tokens_predicted"]


def wait_ready(url, process):
    for _ in range(6000):
        if process.poll() is not None:
            sys.exit(f"a server ended with status {process.returncode} before it was ready: {process.args}")
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.02)
    sys.exit(f"a server was not ready after minutes: {process.args}")


def prompt(seed):
    draw = random.Random(seed)
    return [draw.randrange(1000, VOCAB - 1000) for _ in range(PROMPT)]


def decode_rate(server, seed):
    start = time.monotonic()
    server.complete(prompt(seed), 1)
    first = time.monotonic()
    server.complete(prompt(seed + 1), OUTPUT)
    end = time.monotonic()
    return (OUTPUT - 1) / ((end - first) - (first - start))


def stream_rate(server, seed, streams):
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        start = time.monotonic()
        list(pool.map(lambda i: server.complete(prompt(seed + i), OUTPUT), range(streams)))
        return streams * OUTPUT / (time.monotonic() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fullbore", default="target/release/fullbore")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", action="append", help="may be given more than once; default: cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--out")
    args = parser.parse_args()

    threads = os.cpu_count()
    peer = LlamaCpp(args.model, args.port, args.streams, threads)
    servers = {"llama.cpp": peer}
    for index, device in enumerate(args.device or ["cpu"]):
        servers[device] = Fullbore(args.fullbore, args.model, device, args.port + 1 + index, args.streams, "256MiB")
    samples = {name: {"decode": [], "streams": []} for name in servers}
    try:
        for name, server in servers.items():
            server.complete(prompt(-1), 2)
        for run in range(args.runs):
            for name, server in servers.items():
                samples[name]["decode"].append(decode_rate(server, 1000 * run))
                samples[name]["streams"].append(stream_rate(server, 1000 * run + 100, args.streams))
                print(f"run {run + 1} {name}: decode {samples[name]['decode'][-1]:.1f} tok/s, "
                      f"{args.streams} streams {samples[name]['streams'][-1]:.1f} tok/s", file=sys.stderr)
        report(args, servers, samples)
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait()


def report(args, servers, samples):
    median = {name: {what: statistics.median(values) for what, values in rates.items()} for name, rates in samples.items()}
    base = median["llama.cpp"]
    print(f"\n| device | decode tok/s | ratio | {args.streams} streams tok/s | ratio | ready s | memory ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for name, rates in median.items():
        row = {"device": name, **rates, "decode_ratio": rates["decode"] / base["decode"],
               "streams_ratio": rates["streams"] / base["streams"], "samples": samples[name]}
        server = servers[name]
        if isinstance(server, Fullbore):
            row |= {"ready_s": server.ready_s, "name": server.card.get("device"), "peak_bytes": server.peak_bytes()}
            if planned := server.card.get("memory_bytes"):
                row["memory_ratio"] = row["peak_bytes"] / planned
        rows.append(row)
        cell = lambda key, form: form.format(row[key]) if key in row else "-"
        print(f"| {name} | {rates['decode']:.1f} | {row['decode_ratio']:.2f} | {rates['streams']:.1f} | {row['streams_ratio']:.2f} | "
              f"{cell('ready_s', '{:.2f}')} | {cell('memory_ratio', '{:.2f}')} |")
    if args.out:
        from importlib.metadata import version
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
        result = {"when": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{cpu}, {os.cpu_count()} threads",
                  "system": platform.platform(), "peer": f"llama.cpp through xllamacpp {version('xllamacpp')}",
                  "model": os.path.basename(args.model), "prompt": PROMPT, "output": OUTPUT, "streams": args.streams,
                  "command": f"make bench, --runs {args.runs}", "rows": rows}
        with open(args.out, "w") as out:
            json.dump(result, out, indent=1)


main()

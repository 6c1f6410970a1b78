"""Fullbore beside llama.cpp on the same machine, in one run, as ratios.

Both serve the same model file over HTTP with the same number of slots and threads. The same client sends each the same
prompts (seeded random token ids, all distinct, so that no prefix cache helps), taking turns, so that a drifting machine
hurts both alike. Prints a table and, with --out, writes a result file as JSON. benches/peers.md says how peers are got.

  prefill    PROMPT tokens / time of PROMPT+1 tokens, one stream
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

VOCAB = 49152


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
    """PyPI's xllamacpp on the CPU, or a llama-server with the Vulkan backend on the driver of VK_DRIVER_FILES."""

    def __init__(self, args, threads):
        self.url = f"http://127.0.0.1:{args.port}"
        context = (args.prompt + args.output + 16) * args.streams
        environment = dict(os.environ)
        if args.llama_server:
            command = [args.llama_server, "--model", args.model, "--port", str(args.port), "--parallel", str(args.streams),
                       "--ctx-size", str(context), "--threads", str(threads), "--gpu-layers", "99"]
            # It leaves devices that are CPUs alone unless one is named.
            environment["GGML_VK_VISIBLE_DEVICES"] = "0"
            version = subprocess.run([args.llama_server, "--version"], capture_output=True, text=True).stderr
            self.name = "llama.cpp with Vulkan, " + version.split("version:")[-1].splitlines()[0].strip()
        else:
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama_cpp_server.py")
            command = [sys.executable, script, args.model, str(args.port), str(args.streams), str(threads), str(context)]
            from importlib.metadata import version
            self.name = f"llama.cpp through xllamacpp {version('xllamacpp')}"
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


class Client:
    """What is asked, and how long it takes."""

    def __init__(self, args):
        self.num_prompt, self.num_output, self.num_streams = args.prompt, args.output, args.streams

    def prompt(self, seed):
        draw = random.Random(seed)
        return [draw.randrange(1000, VOCAB - 1000) for _ in range(self.num_prompt)]

    def one_stream(self, server, seed):
        start = time.monotonic()
        server.complete(self.prompt(seed), 1)
        first = time.monotonic()
        server.complete(self.prompt(seed + 1), self.num_output)
        end = time.monotonic()
        return {"prefill": self.num_prompt / (first - start),
                "decode": (self.num_output - 1) / ((end - first) - (first - start))}

    def all_streams(self, server, seed):
        with concurrent.futures.ThreadPoolExecutor(self.num_streams) as pool:
            start = time.monotonic()
            list(pool.map(lambda i: server.complete(self.prompt(seed + i), self.num_output), range(self.num_streams)))
            return {"streams": self.num_streams * self.num_output / (time.monotonic() - start)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fullbore", default="target/release/fullbore")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", action="append", help="may be given more than once; default: cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--llama-server", help="a llama-server with the Vulkan backend, instead of xllamacpp")
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--out")
    args = parser.parse_args()

    client = Client(args)
    peer = LlamaCpp(args, os.cpu_count())
    servers = {"llama.cpp": peer}
    for index, device in enumerate(args.device or ["cpu"]):
        servers[device] = Fullbore(args.fullbore, args.model, device, args.port + 1 + index, args.streams, "256MiB")
    samples = {name: [] for name in servers}
    try:
        for name, server in servers.items():
            server.complete(client.prompt(-1), 2)
        for run in range(args.runs):
            for name, server in servers.items():
                sample = client.one_stream(server, 1000 * run) | client.all_streams(server, 1000 * run + 100)
                samples[name].append(sample)
                rates = ", ".join(f"{what} {rate:.1f}" for what, rate in sample.items())
                print(f"run {run + 1} {name}: {rates} tokens/s", file=sys.stderr)
        report(args, servers, samples)
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait()


def report(args, servers, samples):
    rates = ["prefill", "decode", "streams"]
    median = {name: {what: statistics.median(sample[what] for sample in runs) for what in rates} for name, runs in samples.items()}
    base = median["llama.cpp"]
    titles = [title for what in rates for title in (what if what != "streams" else f"{args.streams} streams", "ratio")]
    print("\n| device | " + " | ".join(titles) + " | ready s | memory ratio |")
    print("|---" * (len(titles) + 3) + "|")
    rows = []
    for name in servers:
        row = {"device": name, **median[name], "samples": samples[name]}
        row |= {f"{what}_ratio": median[name][what] / base[what] for what in rates}
        server = servers[name]
        if isinstance(server, Fullbore):
            row |= {"ready_s": server.ready_s, "name": server.card.get("device"), "peak_bytes": server.peak_bytes()}
            if planned := server.card.get("memory_bytes"):
                row["memory_ratio"] = row["peak_bytes"] / planned
        rows.append(row)
        cell = lambda key, form: form.format(row[key]) if key in row else "-"
        cells = [cell(key, form) for what in rates for key, form in ((what, "{:.1f}"), (f"{what}_ratio", "{:.2f}"))]
        print(f"| {name} | " + " | ".join(cells) + f" | {cell('ready_s', '{:.2f}')} | {cell('memory_ratio', '{:.2f}')} |")
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
        result = {"when": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{cpu}, {os.cpu_count()} threads",
                  "system": platform.platform(), "peer": servers["llama.cpp"].name,
                  "model": os.path.basename(args.model), "prompt": args.prompt, "output": args.output, "streams": args.streams,
                  "command": "benches/peers.py " + " ".join(command_words()), "rows": rows}
        with open(args.out, "w") as out:
            json.dump(result, out, indent=1)


def command_words():
    """The command line, without the paths of one machine."""
    return [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]


main()

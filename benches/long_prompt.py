#!/usr/bin/env python3
"""A long prompt that arrives among answers: what it costs them, and what they cost it. One JSON file.

    python3 benches/long_prompt.py target/release/fullbore --device cpu --target-itl-ms 250 --json out.json

Over HTTP, on a server of its own. The prompt alone first, then eight answers alone, then the prompt among them. Held
against it: while the prompt is computed, the 99th percentile of the answers' gaps is at most twice the target; and its
first token comes after at most twice the time that it takes alone, plus the decoders' share: as many of their steps as
there were meanwhile, at the pace they had before. Ends with status 1 if either does not hold. Nothing beyond Python's own
library.
"""
import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time

from curve import cpu_name

VOCABULARY = range(1000, 40_000)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    def __init__(self, args):
        self.port = free_port()
        command = [args.fullbore, "serve", "--device", args.device, "--model", args.model, "--port", str(self.port),
                   "--target-itl-ms", str(args.target_itl_ms), "--max-num-seqs", "16", "--max-model-len", "8192"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_until_ready(self):
        for _ in range(600):
            if self.process.poll() is not None:
                sys.exit(f"the server ended with status {self.process.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health/ready")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        sys.exit("the server is not ready after a minute")

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


class Answer(threading.Thread):
    """One streamed request; `times` are those of its tokens as they came."""

    def __init__(self, server, num_prompt_tokens, max_tokens, seed):
        super().__init__(daemon=True)
        chance = random.Random(seed)
        prompt = [chance.choice(VOCABULARY) for _ in range(num_prompt_tokens)]
        self.body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0,
                                "ignore_eos": True})
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        self.sent, self.times = None, []
        self.wanted = True
        self.start()

    def run(self):
        self.sent = time.monotonic()
        self.connection.request("POST", "/v1/completions", self.body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        if response.status != 200:
            sys.exit(f"{response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {") and b'"error"' not in line:
                self.times.append(time.monotonic())
            if not self.wanted:
                break
        self.connection.close()

    def wait_for(self, num_tokens, limit_s=600):
        deadline = time.monotonic() + limit_s
        while len(self.times) < num_tokens:
            if time.monotonic() > deadline or not self.is_alive() and len(self.times) < num_tokens:
                sys.exit(f"{len(self.times)} tokens came, {num_tokens} were awaited")
            time.sleep(0.005)

    def gaps_ms(self, begun, ended):
        """Between tokens, where the later one came in the window."""
        pairs = zip(self.times, self.times[1:])
        return [(later - earlier) * 1e3 for earlier, later in pairs if begun <= later <= ended]


def first_token_s(server, num_tokens, seed):
    answer = Answer(server, num_tokens, 2, seed)
    answer.wait_for(1)
    answer.join()
    return answer.times[0] - answer.sent


def measure(args):
    server = Server(args)
    try:
        server.wait_until_ready()
        # The prices of the device are learnt from these.
        warm = [Answer(server, 600, 48, seed) for seed in range(100, 109)]
        [answer.join() for answer in warm]
        alone_s = first_token_s(server, args.prompt_tokens, 1)
        answers = [Answer(server, 16, 4000, seed) for seed in range(2, 2 + args.decoders)]
        [answer.wait_for(64) for answer in answers]
        begun = time.monotonic()
        before = [gap for answer in answers for gap in answer.gaps_ms(answer.times[16], begun)]
        prompt = Answer(server, args.prompt_tokens, 2, 50)
        prompt.wait_for(1)
        ended = prompt.times[0]
        gaps = [answer.gaps_ms(prompt.sent, ended) for answer in answers]
        for answer in [*answers, prompt]:
            answer.wanted = False
        [answer.join(60) for answer in [*answers, prompt]]
    finally:
        server.stop()
    pooled = sorted(gap for own in gaps for gap in own)
    base_ms = statistics.median(before)
    num_steps = statistics.median(len(own) for own in gaps)
    return {
        "first_token_alone_s": alone_s,
        "first_token_among_answers_s": ended - prompt.sent,
        "gap_before_ms_p50": base_ms,
        "gap_meanwhile_ms_p50": statistics.median(pooled),
        "gap_meanwhile_ms_p99": pooled[min(len(pooled) - 1, int(0.99 * len(pooled)))],
        "steps_meanwhile": num_steps,
        "decoders_share_s": num_steps * base_ms / 1e3,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fullbore")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--target-itl-ms", type=int, default=250)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--decoders", type=int, default=8)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = measure(args)
    gap = result["gap_meanwhile_ms_p99"] / args.target_itl_ms
    bound_s = 2 * result["first_token_alone_s"] + result["decoders_share_s"]
    first_token = result["first_token_among_answers_s"] / bound_s
    result = {"machine": cpu_name(), "device": args.device, "model": args.model,
              "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
              "command": f"long_prompt.py --device {args.device} --model {args.model} --target-itl-ms {args.target_itl_ms} "
                         f"--prompt-tokens {args.prompt_tokens} --decoders {args.decoders}",
              **result, "gap_p99_over_target": gap, "first_token_over_bound": first_token}
    print(json.dumps(result, indent=1))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    if gap > 2 or first_token > 1:
        sys.exit("the bounds do not hold; was the machine quiet?")


if __name__ == "__main__":
    main()

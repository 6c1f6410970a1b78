"""What tests of a cluster share: workers, gateways, and requests to either. On 127.0.0.1 alone."""

import contextlib
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
from dataclasses import dataclass

DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(what, ready, seconds=30):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not after {seconds} s"
        time.sleep(0.05)


def exchange(url, method, path, body=None, seconds=120):
    """Connection and response; the body is yet to be read."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=seconds)
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
    return connection, connection.getresponse()


class Process:
    """A program with a log; `with` ends it, and nothing but it."""

    # What requests to it have beside what is asked.
    extra = {}

    def __init__(self, name, port, command, path, environment=None):
        self.name, self.port, self.command, self.path, self.environment = name, port, command, path, environment
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"fullbore-cluster-{name}-{port}-", suffix=".log")
        self.start()

    def start(self):
        self.log_before = os.path.getsize(self.log.name)
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT, env=self.environment)
        try:
            until(f"{self.name} to be ready", self.is_ready, 90)
        except AssertionError:
            self.terminate()
            raise AssertionError(f"{self.name} did not become ready:\n{self.text()[-3000:]}") from None

    def is_ready(self):
        assert self.process.poll() is None, f"{self.name} ended"
        try:
            connection, response = exchange(self.url, "GET", self.path, seconds=5)
            connection.close()
            return response.status == 200
        except OSError:
            return False

    def text(self):
        """The log since the last start."""
        with open(self.log.name, "rb") as log:
            log.seek(self.log_before)
            return log.read().decode(errors="replace")

    def get(self, path):
        connection, response = exchange(self.url, "GET", path)
        with contextlib.closing(connection):
            return response.read().decode()

    def post(self, path, body):
        connection, response = exchange(self.url, "POST", path, body)
        with contextlib.closing(connection):
            return json.loads(response.read())

    def answered_by(self, response, reply):
        """Which worker that was, where a gateway says it."""
        return None

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.process.wait()
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.close()


class Worker(Process):
    def __init__(self, binary, device, *flags):
        port = free_port()
        command = [binary, "serve", "--model", "smollm2", "--device", device, "--port", str(port), "--no-saved-costs",
                   "--no-tuning", "--block-size", "16", "--drain-timeout", "60", *flags]
        if "--max-num-seqs" not in flags:
            command += ["--max-num-seqs", "4"]
        if "--max-model-len" not in flags:
            command += ["--max-model-len", "1024", "--kv-memory", "96MiB"]
        super().__init__("worker", port, command, "/health")

    def metric(self, name):
        """The sample of this name that has these labels, whatever others it has."""
        name, _, labels = name.partition("{")
        labels = [label for label in labels.rstrip("}").split(",") if label]
        for line in self.get("/metrics").splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(label in sample for label in labels):
                return float(value)
        return 0.0


class Smg(Process):
    def __init__(self, urls, policy):
        port, self.urls = free_port(), urls
        # The command lies beside the package.
        folders = [f"{folder}/bin" for folder in os.environ.get("PYTHONPATH", "").split(":")]
        environment = {**os.environ, "PATH": ":".join([*folders, os.environ["PATH"]]), "PORT": str(port),
                       "METRICS_PORT": str(free_port()), "POLICY": policy}
        super().__init__("smg", port, [DEPLOY / "smg.sh", *urls], "/readiness", environment)

    def is_ready(self):
        return super().is_ready() and self.healthy() == set(self.urls)

    def answered_by(self, response, reply):
        return response.getheader("x-smg-routed-worker-id")

    def healthy(self):
        connection, response = exchange(self.url, "GET", "/workers")
        with contextlib.closing(connection):
            return {worker["url"] for worker in json.loads(response.read())["workers"] if worker["is_healthy"]}


@dataclass
class Reply:
    text: str
    # The address of who answered.
    worker: str
    num_prompt_tokens: int
    cached: int


@dataclass
class End:
    """Of a stream."""
    worker: str
    finished: bool
    error: str
    text: str


def chat(server, messages, max_tokens):
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "model": "smollm2", "ignore_eos": True,
            **server.extra}
    connection, response = exchange(server.url, "POST", "/v1/chat/completions", body)
    with contextlib.closing(connection):
        text = response.read().decode()
        assert response.status == 200, f"{response.status}: {text}"
        reply = json.loads(text)
        text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Reply(text, server.answered_by(response, reply), usage["prompt_tokens"], cached)


def stream(server, messages, max_tokens, begun):
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "model": "smollm2", "stream": True,
            "ignore_eos": True, **server.extra}
    connection, response = exchange(server.url, "POST", "/v1/chat/completions", body)
    with contextlib.closing(connection):
        assert response.status == 200, f"{response.status}: {response.read()}"
        worker, finished, error, num_chunks, text = None, False, None, 0, ""
        try:
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if not data.startswith("{"):
                    continue
                event = json.loads(data)
                num_chunks += 1
                worker = worker or server.answered_by(response, event)
                text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
                if num_chunks == 3:
                    begun.set()
                if "error" in event:
                    error = json.dumps(event["error"])
                elif any(choice.get("finish_reason") for choice in event.get("choices", [])):
                    finished = True
        except (OSError, http.client.HTTPException) as broken:
            error = repr(broken)
        return End(worker, finished, error, text)


def run(*tests):
    """Each, or those that the command line names after the binary, and how that went."""
    by_name = {test.__name__: test for test in tests}
    tests = [by_name[name] for name in sys.argv[2:]] or tests
    num_failed = 0
    for test in tests:
        begun = time.monotonic()
        try:
            test()
            print(f"ok {test.__name__} ({time.monotonic() - begun:.1f} s)", flush=True)
        except Exception:
            num_failed += 1
            print(f"FAILED {test.__name__}\n{traceback.format_exc()}", flush=True)
    print(f"{len(tests) - num_failed} passed, {num_failed} failed")
    sys.exit(1 if num_failed else 0)

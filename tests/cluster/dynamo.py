"""Workers behind NVIDIA Dynamo, for real: its stock frontend, and for each worker its stock sidecar, which speaks vLLM's
gRPC: what its frontend makes of a GGUF file's folder, and routing by KV content.

    python3 tests/cluster/dynamo.py BINARY

Needs ai-dynamo and what it imports (scripts/cluster.sh sees to them), and the default model in the cache. All sockets
are on 127.0.0.1. Ends with `N passed, N failed`, and with status 1 if any failed.
"""

import concurrent.futures
import contextlib
import json
import os
import sys
import tempfile

from cluster import Process, Worker, chat, exchange, free_port, run
from load import PLACES, hits, sessions

BINARY = sys.argv[1]
NUM_WORKERS = 3
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq", "--namespace", "fullbore"]
LOCAL = ["DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"]


def environment(folder):
    """Of frontends and sidecars that find each other by this folder, on loopback alone."""
    return {**os.environ, **dict.fromkeys(LOCAL, "127.0.0.1"), "HOME": folder, "DYN_FILE_KV": f"{folder}/discovery",
            "DYN_SELF_HOST_METADATA": "0", "HF_HUB_OFFLINE": "1"}


class Sidecar(Process):
    def __init__(self, folder, grpc_port):
        command = [sys.executable, "-m", "dynamo.vllm.sidecar", *PLANES, "--grpc-endpoint", f"127.0.0.1:{grpc_port}"]
        super().__init__("sidecar", grpc_port, command, None, environment(folder))

    def is_ready(self):
        assert self.process.poll() is None, f"{self.name} ended"
        return "Serving smollm2" in self.text()


class Frontend(Process):
    extra = {"nvext": {"extra_fields": ["worker_id"]}}

    def __init__(self, folder, mode):
        port = free_port()
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port),
                   *PLANES, "--router-mode", mode, "--migration-limit", "3"]
        super().__init__("frontend", port, command, "/v1/models", environment(folder))

    def is_ready(self):
        if not super().is_ready():
            return False
        connection, response = exchange(self.url, "GET", "/v1/models")
        with contextlib.closing(connection):
            return any(model["id"] == "smollm2" for model in json.loads(response.read())["data"])

    def answered_by(self, response, reply):
        return ((reply.get("nvext") or {}).get("worker_id") or {}).get("decode_worker_id")


class Node:
    """A worker with its sidecar."""

    def __init__(self, folder, core, *flags):
        grpc_port = free_port()
        endpoints = {name: f"tcp://127.0.0.1:{free_port()}" for name in ["endpoint", "replay_endpoint"]}
        self.worker = Worker(BINARY, f"cpu@{core}", "--grpc-port", str(grpc_port), "--kv-events-config",
                             json.dumps(endpoints), *flags)
        self.sidecar = Sidecar(folder, grpc_port)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sidecar.__exit__()
        self.worker.__exit__()


@contextlib.contextmanager
def cluster(mode, num_workers=NUM_WORKERS, *flags):
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fullbore-dynamo-"))
        start = lambda index: Node(folder, index % 2, *flags)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            nodes = [stack.enter_context(node) for node in pool.map(start, range(num_workers))]
        yield stack.enter_context(Frontend(folder, mode)), nodes


def hits_of(mode, num_workers=NUM_WORKERS):
    with cluster(mode, num_workers) as (frontend, nodes):
        sessions(frontend)
        return hits([node.worker for node in nodes])


def kv_content_decides_where_a_request_goes():
    ideal = hits_of("round-robin", 1)
    round_robin = hits_of("round-robin")
    routed = hits_of("kv")
    print(f"  tokens found: {routed:.0f} by KV content, {round_robin:.0f} round robin, {ideal:.0f} by one worker")
    assert routed > round_robin, f"{routed} tokens were found by KV content, and {round_robin} round robin"


def frontends_tokenize_as_the_server_does():
    """What a GGUF file's folder says: the same tokens, texts and forms, through Dynamo and without it."""
    with cluster("kv", 1) as (frontend, [node]):
        for place in PLACES:
            messages = [{"role": "user", "content": f"{place}: 12,345 naïve 漢字 🙂 <b>  two  spaces</b>\n\n\tand a tab"}]
            through, direct = [chat(server, messages, max_tokens=16) for server in [frontend, node.worker]]
            assert through.text == direct.text, (through, direct)
            assert through.num_prompt_tokens == direct.num_prompt_tokens, (through, direct)
        form = {"response_format": {"type": "json_object"}, "max_tokens": 40}
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Describe a cat in JSON."}], "temperature": 0}
        through, direct = [server.post("/v1/chat/completions", {**body, **form}) for server in [frontend, node.worker]]
        assert texts(through) == texts(direct) and texts(through)[0].lstrip().startswith("{"), (through, direct)
        # Its frontend tells none of the log-probabilities, but would fail without them.
        told = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
        through, direct = [server.post("/v1/chat/completions", {**body, **told}) for server in [frontend, node.worker]]
        assert texts(through) == texts(direct), (through, direct)
        # What can never be is refused, as the server's client is.
        connection, response = exchange(frontend.url, "POST", "/v1/chat/completions", {**body, "max_tokens": 4000})
        with contextlib.closing(connection):
            assert response.status == 400, f"{response.status}: {response.read()}"


def texts(reply):
    return [choice["message"]["content"] for choice in reply["choices"]]


run(frontends_tokenize_as_the_server_does, kv_content_decides_where_a_request_goes)

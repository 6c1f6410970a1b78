"""Workers behind NVIDIA Dynamo, for real: its stock frontend, and for each worker its stock sidecar, which speaks vLLM's
gRPC: what its frontend makes of a GGUF file's folder, routing by KV content, and nodes that die, leave and return.

    python3 tests/cluster/dynamo.py BINARY [TEST...]

Needs ai-dynamo and what it imports (scripts/cluster.sh sees to them), and the default model in the cache. All sockets
are on 127.0.0.1. Ends with `N passed, N failed`, and with status 1 if any failed.
"""

import concurrent.futures
import contextlib
import json
import os
import sys
import tempfile
import time

from cluster import DEPLOY, Process, Worker, chat, exchange, free_port, run, until
from events import Index, Subscriber
from load import PLACES, Load, hits, long_streams, session, sessions

BINARY = sys.argv[1]
NUM_WORKERS = 3
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq", "--namespace", "fullbore"]
LOCAL = ["DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST"]
# Sidecars that are told to end cut off what they still serve after so many seconds, as if it were whole (deploy/dynamo.sh).
LEAVING = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "40", "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "70"}
# A share of what one worker with all sessions finds.
LEAST_OF_IDEAL = 0.7
# Prompts that each worker, and nobody else, has.
NUM_PROMPTS_EACH = 3
# A share of what their workers have of them.
LEAST_OF_TOLD = 0.9


def environment(folder):
    """Of frontends and sidecars that find each other by this folder, on loopback alone."""
    return {**os.environ, **dict.fromkeys(LOCAL, "127.0.0.1"), "HOME": folder, "DYN_FILE_KV": f"{folder}/discovery",
            "DYN_SELF_HOST_METADATA": "0", "HF_HUB_OFFLINE": "1", **LEAVING}


class Sidecar(Process):
    def __init__(self, folder, grpc_port):
        command = [sys.executable, "-m", "dynamo.vllm.sidecar", *PLANES, "--grpc-endpoint", f"127.0.0.1:{grpc_port}"]
        super().__init__("sidecar", grpc_port, command, None, environment(folder))

    def is_ready(self):
        assert self.process.poll() is None, f"{self.name} ended"
        return "Serving smollm2" in self.text()


class Frontend(Process):
    extra = {"nvext": {"extra_fields": ["worker_id"]}}

    def __init__(self, folder, mode, command=None, **others):
        port = free_port()
        command = command or [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port",
                              str(port), *PLANES, "--router-mode", mode, "--migration-limit", "3"]
        super().__init__("frontend", port, command, "/v1/models", {**environment(folder), "PORT": str(port), **others})

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

    def __init__(self, folder, core, tells_events):
        grpc_port, self.replay_port = free_port(), free_port()
        endpoints = {"endpoint": f"tcp://127.0.0.1:{free_port()}", "replay_endpoint": f"tcp://127.0.0.1:{self.replay_port}"}
        events = ["--kv-events-config", json.dumps(endpoints)] if tells_events else []
        self.worker = Worker(BINARY, f"cpu@{core}", "--grpc-port", str(grpc_port), *events)
        self.sidecar = Sidecar(folder, grpc_port)

    def told(self):
        """An index of all that its events have told since it was started."""
        index = Index()
        Subscriber.replay(self.replay_port, 0, index)
        return index

    def is_busy(self):
        return self.worker.metric("vllm:num_requests_running") > 0

    def kill(self):
        """As a machine dies: both at once."""
        self.sidecar.process.kill()
        self.worker.kill()

    def leave(self):
        """The sidecar first, which serves what it has; nobody asks the worker then."""
        self.sidecar.terminate()
        self.sidecar.process.wait(120)
        self.worker.terminate()
        assert self.worker.process.wait(60) == 0

    def restart(self):
        self.worker.restart()
        self.sidecar.restart()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sidecar.__exit__()
        self.worker.__exit__()


@contextlib.contextmanager
def cluster(mode, num_workers=NUM_WORKERS, tells_events=True):
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fullbore-dynamo-"))
        start = lambda index: Node(folder, index % 2, tells_events)
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
    assert routed >= LEAST_OF_IDEAL * ideal > round_robin, f"{routed} tokens were found, and {round_robin} round robin"


def own_prompts(nodes, round_number):
    """Prompts that begin unlike each other, each asked of one worker behind its router's back; how many tokens those have."""
    prompts, num_tokens = [], 0
    for number in range(NUM_PROMPTS_EACH * len(nodes)):
        topic = f"Round {round_number}, number {number}: {PLACES[number % len(PLACES)]}. "
        messages = [{"role": "system", "content": topic * 12}, {"role": "user", "content": "What is this about?"}]
        # Not in turns, as a router that knows nothing may go.
        worker = nodes[number // NUM_PROMPTS_EACH].worker
        chat(worker, messages, max_tokens=1)
        num_tokens += chat(worker, messages, max_tokens=1).cached
        prompts.append(messages)
    return prompts, num_tokens


def share_found(frontend, nodes):
    """Of tokens that workers have and their router has heard of by events alone, those found: the best of some rounds."""
    best = 0
    for round_number in range(5):
        prompts, num_tokens = own_prompts(nodes, round_number)
        # Events are on their way meanwhile, for longer each time.
        time.sleep(0.2 * 2**round_number)
        before = hits([node.worker for node in nodes])
        for messages in prompts:
            chat(frontend, messages, max_tokens=1)
        best = max(best, (hits([node.worker for node in nodes]) - before) / num_tokens)
        if best >= LEAST_OF_TOLD:
            break
    return best


def check_told(share):
    assert share >= LEAST_OF_TOLD, f"{share:.2f} of the tokens were found that workers have and told of"


def events_decide_where_a_request_goes():
    with cluster("kv") as (frontend, nodes):
        told = share_found(frontend, nodes)
        check_told(told)
        # One after the other no conversation has a reason to leave.
        for number in range(2):
            workers = session(frontend, number)
            assert None not in workers and len(set(workers)) == 1, f"session {number} was with {workers}"
        for node in nodes:
            cached = lambda: node.worker.metric('fullbore_kv_blocks{state="cached"}')
            until("events of all blocks", lambda: not node.is_busy() and len(node.told().blocks) == cached())
    # Whoever is told nothing guesses from what it has sent where, and finds these by chance.
    with cluster("kv", tells_events=False) as (frontend, nodes):
        untold = share_found(frontend, nodes)
    print(f"  {told:.2f} of what workers have is found by events, and {untold:.2f} without")
    try:
        check_told(untold)
    except AssertionError:
        return
    raise AssertionError(f"{untold:.2f} of what nobody told of was found, and nobody minds")


def nodes_die_leave_and_return():
    with cluster("kv") as (frontend, nodes), concurrent.futures.ThreadPoolExecutor() as pool:
        undisturbed = [one.result(120) for one in long_streams(frontend, pool)]
        assert all(end.finished and not end.error for end in undisturbed), undisturbed
        # One dies: its streams go on elsewhere, with the same text, and whole answers come.
        streams = long_streams(frontend, pool)
        victim = next(node for node in nodes if node.is_busy())
        with Load(frontend) as load:
            victim.kill()
            ends = [one.result(120) for one in streams]
            until("requests after the loss", lambda: load.num_done >= 6)
        assert not load.failures, f"whole answers failed: {load.failures[:3]}"
        assert all(end.finished and not end.error for end in ends), ends
        assert [end.text for end in ends] == [end.text for end in undisturbed], (ends, undisturbed)
        # It returns, with nothing, and is used again.
        victim.restart()
        index = victim.told()
        assert index.first_seq == 0 and not index.blocks, f"a worker that was started anew knows {index.blocks}"
        asked = lambda: victim.worker.metric("fullbore_steps_total")
        steps = asked()
        with Load(frontend, 6) as load:
            until("the node that was started anew", lambda: asked() > steps, 60)
        assert not load.failures, f"requests failed while a node came: {load.failures[:3]}"
        # One is told to end: nobody notices.
        streams = long_streams(frontend, pool)
        leaver = next(node for node in nodes if node.is_busy())
        with Load(frontend) as load:
            leaver.leave()
            done = load.num_done
            until("requests after the end", lambda: load.num_done >= done + 6)
            ends = [one.result(120) for one in streams]
        assert not load.failures, f"requests failed while a node ended: {load.failures[:3]}"
        assert [end.text for end in ends] == [end.text for end in undisturbed], (ends, undisturbed)


@contextlib.contextmanager
def deployed():
    """A worker behind what deploy/dynamo.sh starts for it; nothing of that is left."""
    grpc_port = free_port()
    with tempfile.TemporaryDirectory(prefix="fullbore-dynamo-") as folder, \
            Worker(BINARY, "cpu@0", "--grpc-port", str(grpc_port)) as worker:
        script = [DEPLOY / "dynamo.sh", f"127.0.0.1:{grpc_port}"]
        with Frontend(folder, "kv", script, DRAIN="1") as frontend:
            yield frontend, worker
            frontend.terminate()
            assert frontend.process.wait(60) == 143
            try:
                exchange(frontend.url, "GET", "/v1/models")
            except OSError:
                return
            raise AssertionError("deploy/dynamo.sh has ended, and its frontend has not")


def frontends_tokenize_as_the_server_does():
    """What a GGUF file's folder says: the same tokens, texts and forms, through Dynamo and without it."""
    with deployed() as (frontend, worker):
        for place in PLACES:
            messages = [{"role": "user", "content": f"{place}: 12,345 naïve 漢字 🙂 <b>  two  spaces</b>\n\n\tand a tab"}]
            through, direct = [chat(server, messages, max_tokens=16) for server in [frontend, worker]]
            assert through.text == direct.text, (through, direct)
            assert through.num_prompt_tokens == direct.num_prompt_tokens, (through, direct)
        form = {"response_format": {"type": "json_object"}, "max_tokens": 40}
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Describe a cat in JSON."}], "temperature": 0}
        through, direct = [server.post("/v1/chat/completions", {**body, **form}) for server in [frontend, worker]]
        assert texts(through) == texts(direct) and texts(through)[0].lstrip().startswith("{"), (through, direct)
        # Its frontend tells none of the log-probabilities, but would fail without them.
        told = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
        through, direct = [server.post("/v1/chat/completions", {**body, **told}) for server in [frontend, worker]]
        assert texts(through) == texts(direct), (through, direct)
        # What can never be is refused, as the server's client is.
        connection, response = exchange(frontend.url, "POST", "/v1/chat/completions", {**body, "max_tokens": 4000})
        with contextlib.closing(connection):
            assert response.status == 400, f"{response.status}: {response.read()}"


def texts(reply):
    return [choice["message"]["content"] for choice in reply["choices"]]


run(frontends_tokenize_as_the_server_does, kv_content_decides_where_a_request_goes, events_decide_where_a_request_goes,
    nodes_die_leave_and_return)

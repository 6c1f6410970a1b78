"""End to end: the command line, and official clients against the running binary on sim, cpu and lavapipe.

    python3 tests/e2e/run.py BINARY

Needs the clients and the default model in the cache (scripts/e2e.sh sees to both). Each device gets a server of
its own on a free port of 127.0.0.1. Ends with `N passed, N failed`, and with status 1 if any failed.
"""

import concurrent.futures
import contextlib
import glob
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

import clients
import openai
import pydantic

BINARY = sys.argv[1]
PROMPTS = [f"Question {i}: name {i + 2} things that a cook in {place} would buy. Answer:" for i, place in enumerate(
    ["Rome", "Lima", "Oslo", "Cairo", "Delhi", "Kyoto", "Quito", "Paris", "Accra", "Perth", "Minsk", "Havana", "Seoul",
     "Tunis", "Dakar", "Turin"])]
CHAT = [{"role": "user", "content": "Name three primary colours."}]


class Server:
    """A running `fullbore serve`; `with` ends it."""

    def __init__(self, device, *extra, descriptors=None, stderr=subprocess.STDOUT, environment={}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.device = device
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(os.path.join(os.environ.get("TMPDIR", "/tmp"), f"fullbore-e2e-{port}.log"), "w+")
        command = [BINARY, "serve", "--model", "smollm2", "--device", device, "--port", str(port), "--max-num-seqs", "16",
                   "--max-model-len", "1024", "--kv-memory", "128MiB", "--no-saved-costs", *extra]
        limit = descriptors and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, descriptors))
        self.process = subprocess.Popen(command, stdout=self.log, stderr=stderr, preexec_fn=limit,
                                        env={**os.environ, **environment})
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=300)
        deadline = time.monotonic() + 120
        while self.get("/health/ready")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.log.seek(0)
                raise RuntimeError(f"the server on {device} did not become ready:\n{self.log.read()}")
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        status = self.process.wait(20)
        self.log.seek(0)
        log = self.log.read()
        self.log.close()
        assert status == 0, f"the server ended with status {status}:\n{log[-2000:]}"
        assert "panicked" not in log, log[-2000:]

    def get(self, path, **headers):
        return self.exchange(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path, body, content_type="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.exchange(urllib.request.Request(self.url + path, data, {"Content-Type": content_type}))

    @staticmethod
    def exchange(request):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def tokens(self, prompt, count):
        reply = self.client.completions.create(model="smollm2", prompt=prompt, max_tokens=count, temperature=0,
                                               extra_body={"ignore_eos": True, "return_token_ids": True})
        return reply.choices[0].token_ids

    def gauge(self, name):
        """The first sample of that name that has these labels, whatever others it has."""
        name, _, labels = name.rstrip("}").partition("{")
        wanted = [label for label in labels.split(",") if label]
        for line in self.get("/metrics")[1].splitlines():
            found, _, its = line.rpartition(" ")[0].rstrip("}").partition("{")
            if found == name and all(label in its.split(",") for label in wanted):
                return float(line.split()[-1])
        raise AssertionError(f"no {name} with {wanted}")


def models_are_listed(server):
    ids = [model.id for model in server.client.models.list().data]
    assert ids == ["smollm2"], ids
    assert server.client.models.retrieve("smollm2").id == "smollm2"


def page_is_served(server):
    status, page = server.get("/")
    assert status == 200 and "<title>" in page and "http://" not in page.replace("http://www.w3.org", ""), page[:200]


def chat_streams_what_it_says(server):
    ask = {"model": "smollm2", "messages": CHAT, "max_tokens": 24, "temperature": 0}
    # Once before, so that the prefix cache has the prompt for both.
    server.client.chat.completions.create(**ask)
    whole = server.client.chat.completions.create(**ask)
    parts = list(server.client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage, parts[-1]
    reasons = [part.choices[0].finish_reason for part in parts if part.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) <= {None}, reasons
    assert whole.usage.prompt_tokens > 0 and whole.usage.completion_tokens <= 24


def truncation_is_length_and_stop_is_stop(server):
    whole = server.client.completions.create(model="smollm2", prompt=PROMPTS[0], max_tokens=16, temperature=0)
    assert whole.choices[0].finish_reason == "length", whole
    text = whole.choices[0].text
    stop = text[len(text) // 2:][:3]
    cut = server.client.completions.create(model="smollm2", prompt=PROMPTS[0], max_tokens=16, temperature=0, stop=stop)
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == text[:text.index(stop)], (text, stop, cut)


def logprobs_and_echo(server):
    reply = server.client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=4, temperature=0, logprobs=True,
                                                  top_logprobs=3)
    for token in reply.choices[0].logprobs.content:
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and abs(token.logprob - tops[0]) < 1e-5, token
    reply = server.client.completions.create(model="smollm2", prompt="One two three four", max_tokens=1, temperature=0, echo=True,
                                             logprobs=1)
    logprobs = reply.choices[0].logprobs.token_logprobs
    assert logprobs[0] is None and all(value <= 0 for value in logprobs[1:]) and len(logprobs) >= 5, logprobs
    assert reply.choices[0].text.startswith("One two three four"), reply


def seeds_repeat(server):
    ask = lambda seed: server.client.completions.create(model="smollm2", prompt=PROMPTS[1], max_tokens=16, temperature=1.0, top_p=0.9,
                                                        seed=seed).choices[0].text
    first, again, other = ask(7), ask(7), ask(8)
    assert first == again and first != other, (first, again, other)


def prompts_as_ids_and_lists(server):
    ids = server.client.completions.create(model="smollm2", prompt="Hello there", max_tokens=1, temperature=0,
                                           extra_body={"return_token_ids": True}).choices[0].prompt_token_ids
    by_text = server.tokens("Hello there", 8)
    assert server.tokens(ids, 8) == by_text
    both = server.client.completions.create(model="smollm2", prompt=["Hello there", "Hello there"], max_tokens=8, temperature=0)
    assert len(both.choices) == 2 and both.choices[0].text == both.choices[1].text


class Person(pydantic.BaseModel):
    name: str
    age: int


WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"], "additionalProperties": False}}}
TIME = {"type": "function", "function": {"name": "time", "description": "Tells the time."}}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def forms_are_followed(server):
    people = [{"role": "user", "content": "Invent a person, as JSON."}]
    ask = {"model": "smollm2", "messages": people, "max_tokens": 200, "temperature": 0}
    reply = server.client.chat.completions.parse(**ask, response_format=Person)
    assert reply.choices[0].finish_reason in ("stop", "length"), reply
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(reply.choices[0].message.parsed, Person), reply
    short = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"],
             "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": short}}
    whole = server.client.chat.completions.create(**ask, response_format=form)
    assert whole.choices[0].finish_reason == "stop" and json.loads(whole.choices[0].message.content)["colour"] in short[
        "properties"]["colour"]["enum"], whole
    parts = server.client.chat.completions.create(**ask, response_format=form, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    for extra, pattern in [({"structured_outputs": {"regex": "[0-9]{3}-[a-z]+"}}, "[0-9]{3}-[a-z]+"),
                           ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
                           ({"structured_outputs": {"grammar": "start: A+\nA: \"ab\" | \"cd\""}}, "(ab|cd)+")]:
        reply = server.client.chat.completions.create(**{**ask, "max_tokens": 30}, extra_body=extra)
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert reason == "length" or re.fullmatch(pattern, text), (extra, reply)
    try:
        server.client.chat.completions.create(**ask, extra_body={"structured_outputs": {"regex": "("}})
        raise AssertionError("a broken regex was taken")
    except openai.BadRequestError as error:
        assert error.param == "structured_outputs.regex", error


def a_form_that_never_ends_is_stopped(server):
    def busy():
        """Of the server's own processes, those that run or may."""
        pids = []
        for path in glob.glob(f"/proc/{server.process.pid}/task/*/children"):
            with contextlib.suppress(OSError):
                pids += open(path).read().split()
        assert pids, "forms are tried in no process"
        running = []
        for pid in pids:
            # One that has ended meanwhile does not.
            with contextlib.suppress(OSError):
                running += [pid] if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "R" else []
        return running

    form = {"guided_json": {"type": "integer", "multipleOf": 20_000_003}}
    status, text = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4, **form})
    assert status == 400 and "make it simpler" in text, text
    status, text = server.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4, "guided_regex": "[a-d]{3}"})
    assert status == 200, text
    until("the end of what was refused", lambda: busy() == [])


def functions_are_called(server):
    ask = {"model": "smollm2", "messages": ASK_WEATHER, "tools": [WEATHER, TIME], "max_tokens": 200, "temperature": 0,
           "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, reason in [("required", "tool_calls"), (named, "stop")]:
        whole = server.client.chat.completions.create(**ask, tool_choice=choice)
        assert whole.choices[0].finish_reason == reason and whole.choices[0].message.content is None, whole
        [call] = whole.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.type == "function" and call.id, call
        if call.function.name == "weather":
            assert isinstance(arguments["city"], str) and isinstance(arguments["days"], int), call
        # The client's own way to add up a stream.
        with server.client.chat.completions.stream(**ask, tool_choice=choice) as stream:
            streamed = stream.get_final_completion()
        [again] = streamed.choices[0].message.tool_calls
        assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments), again
        assert streamed.choices[0].finish_reason == reason, streamed
    history = ASK_WEATHER + [whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 3 days."}]
    reply = server.client.chat.completions.create(**{**ask, "messages": history, "max_tokens": 16}, tool_choice="none")
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls, reply
    free = server.client.chat.completions.create(**{**ask, "max_tokens": 40}, tool_choice="auto")
    assert free.choices[0].finish_reason in ("stop", "length", "tool_calls"), free


def texts_become_tokens(server):
    status, text = server.post("/tokenize", {"prompt": "Hello there"})
    tokens = json.loads(text)["tokens"]
    assert status == 200 and json.loads(server.post("/detokenize", {"tokens": tokens})[1])["prompt"].endswith("Hello there")
    assert "Name three primary colours." in json.loads(server.post("/apply-template", {"messages": CHAT})[1])["prompt"]


def bad_input_is_named(server):
    good = {"model": "smollm2", "prompt": "x", "max_tokens": 1}
    cases = [
        ({**good, "model": "nope"}, 404, "nope"), ({**good, "temperature": -1}, 400, "temperature"),
        ({**good, "temperature": "hot"}, 400, "temperature"), ({**good, "max_tokens": -5}, 400, "max_tokens"),
        ({**good, "max_tokens": 10**30}, 400, "max_tokens"), ({**good, "top_p": 3}, 400, "top_p"),
        ({**good, "prompt": [1, 2, 99999999]}, 400, "99999999"), ({**good, "prompt": "word " * 5000}, 400, "context"),
        ({**good, "n": 10**9}, 400, "n"), (b'{"model": ', 400, "JSON"), (b"\xff\xfe", 400, "JSON"),
        (b'{"model": "smollm2", "prompt": "x", "temperature": NaN}', 400, ""), (b"[" * 100000, 400, ""),
        (b'{"prompt": "' + b"a" * (100 << 20) + b'"}', 413, "")]
    for body, status, word in cases:
        got, text = server.post("/v1/completions", body)
        # A server that refuses a body of 100 MB may close before all of it was sent.
        if status == 413 and got == 0:
            continue
        assert got == status, (str(body)[:80], got, text[:300])
        assert word.lower() in json.loads(text)["error"]["message"].lower(), (str(body)[:80], text[:300])
    assert server.get("/health/ready")[0] == 200


def a_dropped_client_frees_its_blocks(server):
    stream = server.client.completions.create(model="smollm2", prompt=PROMPTS[2], max_tokens=900, temperature=0, stream=True,
                                              extra_body={"ignore_eos": True})
    next(iter(stream))
    # The gauge is of the last whole step, and the first token comes within one.
    wait_for(lambda: server.gauge("fullbore_requests_running") == 1, "a sequence that has a token does not run")
    stream.close()
    wait_for(lambda: server.gauge("fullbore_requests_running") == 0, "the sequence of a client that left still runs")


def wait_for(holds, otherwise):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def sixteen_streams_equal_each_alone(server):
    count = 12
    alone = [server.tokens(prompt, count) for prompt in PROMPTS]
    barrier = threading.Barrier(len(PROMPTS))

    def one(prompt):
        barrier.wait()
        return server.tokens(prompt, count)

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(one, PROMPTS))
    for prompt, left, right in zip(PROMPTS, alone, together):
        assert left == right, f"{prompt!r}: alone {left}, among 16 {right}"


def command(*arguments, status=0, **environment):
    """Runs the binary and gives what it printed; without a terminal, nothing may be asked."""
    done = subprocess.run([BINARY, *arguments], env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == status, (arguments, done)
    return done.stdout if status == 0 else done.stderr


def devices_are_listed():
    lines = command("devices").splitlines()
    assert lines[0].split()[:4] == ["device", "kind", "name", "memory"] and lines[1].split()[:2] == ["cpu", "cpu"], lines
    drivers = os.environ["VK_DRIVER_FILES"].split(":")
    assert len(lines) == 2 + len(drivers) and all(re.match(r"vulkan:\d+ +software ", line) for line in lines[2:]), lines


def a_dry_run_prints_the_table_alone():
    lines = command("serve", "--device", "cpu", "--dry-run", "--kv-memory", "64MiB").splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "KV", "scratch", "tables", "total", "swap"], lines
    assert "900.0 GiB" in command("serve", "--device", "sim", "--dry-run", "--kv-memory", "900GiB")
    assert "--kv-memory" in command("serve", "--device", "cpu", "--dry-run", "--kv-memory", "900GiB", status=1)


def one_prompt_is_answered():
    assert len(command("run", "Name a colour.", "--device", "cpu", "--max-tokens", "8", "--temperature", "0").strip()) > 3


def models_are_fetched_or_named():
    assert command("fetch", "smollm2").strip().endswith("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert command("fetch", __file__).strip() == __file__
    assert "nothing-known" in command("fetch", "nothing-known", status=1)
    # Nobody listens there, as on a machine without a network.
    with tempfile.TemporaryDirectory() as folder:
        error = command("fetch", "owner/name", status=1, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=folder)
    assert "cannot get owner/name from Hugging Face" in error and "give a path to a local file" in error, error


def what_cannot_be_served_is_named():
    for arguments, word in [(["--model", __file__, "--device", "cpu"], "not a GGUF file"), (["--device", "vulkan:none"], "vulkan:none"),
                            (["--max-model-len", "99999", "--device", "cpu"], "8192"), (["--host", "192.0.2.1"], "192.0.2.1")]:
        error = command("serve", *arguments, status=1)
        assert word in error and "panicked" not in error, error


def keys_are_read_again_on_sighup():
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        def keys(text):
            file.seek(0)
            file.truncate()
            file.write(text)
            file.flush()

        def status(key):
            return server.get("/v1/models", Authorization=f"Bearer {key}")[0]

        keys("first-secret-key alice\n")
        with Server("sim", "--api-key-file", file.name) as server:
            assert [status("first-secret-key"), status("wrong-secret-key"), server.get("/v1/models")[0]] == [200, 401, 401]
            keys("second-secret-key alice=2:8\n")
            server.process.send_signal(signal.SIGHUP)
            until("the new key", lambda: status("second-secret-key") == 200)
            assert status("first-secret-key") == 401
            keys("short\n")
            server.process.send_signal(signal.SIGHUP)
            until("a line of the log", lambda: "stay as they were" in open(server.log.name).read())
            assert status("second-secret-key") == 200
            client = openai.OpenAI(base_url=server.url + "/v1", api_key="second-secret-key", max_retries=0)
            assert client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=2).usage.completion_tokens == 2


def half_a_request(server):
    """One of which not all has come: it is open, however fast others are, and however slow this machine."""
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                       b"content-length: 15\r\n\r\n{\"prompt\"")
    return connection


def sigterm_lets_running_requests_end():
    with Server("cpu", "--drain-timeout", "300") as server:
        prompts = [list(range(100, 300)), list(range(400, 600))]
        with half_a_request(server) as begun, concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = [pool.submit(server.tokens, prompt, 120) for prompt in prompts]
            until("both to run", lambda: server.gauge("fullbore_requests_running") == 2)
            server.process.send_signal(signal.SIGTERM)
            until("readiness to end", lambda: server.get("/health/ready")[0] == 503)
            # Readiness ends first, so that who looks at it stops to send.
            until("refusals", lambda: server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 503)
            status, body = server.post("/v1/completions", {"prompt": "x"})
            assert status == 503 and "shutting down" in body, (status, body)
            assert [len(request.result()) for request in running] == [120, 120]
            assert server.process.poll() is None
            begun.sendall(b": \"x\"}")
            assert begun.recv(4096).startswith(b"HTTP/1.1 503")
        assert server.process.wait(20) == 0


def a_log_that_nobody_reads_stalls_nothing():
    with Server("sim", stderr=subprocess.PIPE, environment={"RUST_LOG": "trace"}) as server:
        def dropped():
            return server.gauge("fullbore_log_lines_dropped_total")
        # The pipe holds 64 KiB, what waits for it 8,192 lines; a step is more than one.
        deadline = time.monotonic() + 60
        while not dropped():
            assert time.monotonic() < deadline, "no line was dropped"
            status, _ = server.post("/v1/completions", {"prompt": ["x"] * 16, "max_tokens": 500, "ignore_eos": True})
            assert status == 200, status
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 4})[0] == 200
    server.process.stderr.close()


def several_models_are_served():
    small, second = "smollm2", "second"
    with Server("cpu", "--drain-timeout", "300", "--model", f"{second}=smollm2,kv-memory=48MiB,max-model-len=512") as server:
        cards = {card["id"]: card for card in json.loads(server.get("/v1/models")[1])["data"]}
        assert [(name, card["max_model_len"], card["dtype"]) for name, card in cards.items()] == [
            (small, 1024, "q4_1"), (second, 512, "q4_1")], cards
        ask = {"messages": CHAT, "max_tokens": 16, "temperature": 0}
        answers = [server.client.chat.completions.create(model=name, **ask) for name in cards]
        assert [answer.model for answer in answers] == list(cards)
        assert answers[0].choices[0].message.content == answers[1].choices[0].message.content, "the same weights"
        try:
            server.client.chat.completions.create(model="third", **ask)
            raise AssertionError("an unknown model answered")
        except openai.NotFoundError as error:
            assert error.code == "model_not_found" and small in error.message and second in error.message, error
        top = command("top", "--url", server.url, "--once", "--model", second)
        assert top.startswith(f"{second} on ") and f"{small} on " not in top, top
        assert f"{small} on " in command("top", "--url", server.url, "--once")
        assert "third" in command("top", "--url", server.url, "--once", "--model", "third", status=1)
        with half_a_request(server), concurrent.futures.ThreadPoolExecutor(2) as pool:
            prompt = list(range(100, 300))
            running = [pool.submit(server.client.completions.create, model=name, prompt=prompt, max_tokens=300,
                                   extra_body={"ignore_eos": True}) for name in cards]
            until("both to run", lambda: all(server.gauge(f'fullbore_requests_running{{model_name="{name}"}}') == 1 for name in cards))
            server.process.send_signal(signal.SIGTERM)
            until("readiness to end", lambda: server.get("/health/ready")[0] == 503)
            assert [request.result().usage.completion_tokens for request in running] == [300, 300]
        assert server.process.wait(10) == 0
    both = ["serve", "--device", "cpu", "--dry-run", "--model", "a=smollm2", "--model", "b=smollm2,kv-memory=64MiB"]
    lines = command(*both).splitlines()
    assert [line.split()[0] for line in lines if line][::7] == ["a", "b", "together"], lines
    error = command(*both, "--kv-memory", "900GiB", status=1)
    assert "together" in error and "(a 90" in error and ", b " in error, error
    assert "two models are called a" in command(*both, "--model", "a=smollm2", status=1)


def an_interrupted_bench_leaves_what_is_whole():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "result.json")
        words = ["bench", "serve", "--device", "sim", "--concurrency", "2", "--limit", "8", "--lengths", "fixed:8:4",
                 "--runs", "100000", "--output", path]
        with subprocess.Popen([BINARY, *words], stderr=subprocess.PIPE, text=True) as bench:
            assert any(", run 3 of" in line for line in bench.stderr)
            bench.send_signal(signal.SIGINT)
            told = bench.stderr.read()
        assert bench.returncode == 130 and "interrupted" in told, told
        with open(path) as file:
            result = json.load(file)
    runs = result["measurements"][0]["runs"]
    assert 3 <= len(runs) < 100000 and all(run["counts"]["completed"] == 8 for run in runs), len(runs)
    assert not result["valid"] and result["invalid"][0].startswith("interrupted"), result["invalid"]


def until(what, ready):
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


COMMANDS = [devices_are_listed, a_dry_run_prints_the_table_alone, one_prompt_is_answered, models_are_fetched_or_named,
            what_cannot_be_served_is_named, keys_are_read_again_on_sighup, sigterm_lets_running_requests_end,
            a_log_that_nobody_reads_stalls_nothing, several_models_are_served,
            an_interrupted_bench_leaves_what_is_whole]
EVERYWHERE = [models_are_listed, page_is_served, sixteen_streams_equal_each_alone]
ON_CPU = [chat_streams_what_it_says, truncation_is_length_and_stop_is_stop, logprobs_and_echo, seeds_repeat, prompts_as_ids_and_lists,
          forms_are_followed, a_form_that_never_ends_is_stopped, functions_are_called, texts_become_tokens, bad_input_is_named,
          a_dropped_client_frees_its_blocks, *clients.TESTS]


def run(name, test, *arguments):
    """Whether the test passed; says so."""
    start = time.monotonic()
    try:
        test(*arguments)
    except Exception:
        print(f"FAILED  {name:18} {test.__name__}", flush=True)
        traceback.print_exc()
        return False
    print(f"ok      {name:18} {test.__name__} ({time.monotonic() - start:.1f} s)", flush=True)
    return True


def main():
    results = [run("command line", test) for test in COMMANDS]
    for device, extra, tests in [("sim", [], EVERYWHERE), ("cpu", ["--pooling", "mean"], EVERYWHERE + ON_CPU), ("vulkan:llvmpipe", [], EVERYWHERE)]:
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(Server(device, *extra))
            except Exception:
                traceback.print_exc()
                results += [False] * len(tests)
                continue
            results += [run(device, test, server) for test in tests]
    passed = sum(results)
    print(f"{passed} passed, {len(results) - passed} failed")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()

"""End to end: `/metrics` as Prometheus reads it, the dashboard that is drawn from it, and the log.

    python3 tests/e2e/metrics.py BINARY

Needs what run.py needs, `prometheus_client` and promtool (scripts/e2e.sh sees to all).
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from prometheus_client.parser import text_string_to_metric_families

from run import CHAT, Server, run, until

DASHBOARD = pathlib.Path(__file__).parents[2] / "deploy" / "grafana.json"
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$__range": "30m", "$instance": ".*", "$model": ".*"}


def samples(server):
    """By name and labels."""
    families = list(text_string_to_metric_families(server.get("/metrics")[1]))
    assert all(family.documentation and family.type in ("counter", "gauge", "histogram") for family in families), families
    found = [sample for family in families for sample in family.samples]
    names = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in found]
    assert len(names) == len(set(names)), "a sample is there twice"
    return dict(zip(names, (sample.value for sample in found)))


def of(found, name, **labels):
    [value] = [value for (known, its), value in found.items() if known == name and labels.items() <= dict(its).items()]
    return value


def metrics_are_read_by_the_official_parser(server):
    before = samples(server)
    for _ in range(3):
        server.client.chat.completions.create(model="smollm2", messages=CHAT, max_tokens=8, extra_body={"ignore_eos": True})
    after = samples(server)
    assert set(before) <= set(after)
    falls = [name for name, value in before.items() if re.search("_(total|count|sum|bucket)$", name[0]) and after[name] < value]
    assert not falls, falls
    assert of(after, "vllm:generation_tokens_total") == of(after, "fullbore_tokens_generated_total") == 24
    assert of(after, "vllm:request_success_total", finished_reason="length") == 3
    for name in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"]:
        buckets = sorted((float(dict(labels)["le"]), value) for (known, labels), value in after.items() if known == f"vllm:{name}_bucket")
        counts = [count for _, count in buckets]
        assert counts == sorted(counts) and counts[-1] == of(after, f"vllm:{name}_count") == 3, (name, buckets)
    assert of(after, "vllm:inter_token_latency_seconds_count") == 21


def the_dashboard_names_what_there_is(server):
    board = json.loads(DASHBOARD.read_text())
    there = {name for name, _ in samples(server)}
    expressions = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 15
    for title, expression in expressions:
        named = set(re.findall(r"(?:vllm:|fullbore_)\w+", expression))
        assert named and named <= there, (title, named - there)
    for variable in board["templating"]["list"]:
        assert set(re.findall(r"(?:vllm:|fullbore_)\w+", json.dumps(variable["query"]))) <= there, variable
    # Each expression as the rule of a record: promtool reads rules alone.
    rules = []
    for index, (_, expression) in enumerate(expressions):
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        assert "$" not in expression, expression
        rules.append({"record": f"panel:{index}", "expr": expression})
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        # JSON is YAML.
        json.dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)
        file.flush()
        done = subprocess.run([os.environ["PROMTOOL"], "check", "rules", file.name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done


def every_request_is_one_line_of_the_log():
    with Server("cpu", "--log-format", "json") as server:
        def all_lines():
            return [json.loads(line) for line in open(server.log.name) if line.startswith("{")]

        def lines():
            return [line for line in all_lines() if line["target"] == "fullbore::request"]

        ask = {"model": "smollm2", "messages": CHAT, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
        first = server.client.chat.completions.create(**ask)
        until("the first line", lambda: len(lines()) == 1)
        again = server.client.chat.completions.create(**ask, stop=first.choices[0].message.content[3:6])
        stream = server.client.completions.create(model="smollm2", prompt="One two", max_tokens=1000, stream=True,
                                                  extra_body={"ignore_eos": True})
        gone = next(iter(stream)).id
        stream.close()
        until("a line for each request", lambda: len(lines()) == 3)
        by_id = {line["request"]: line for line in lines()}
        assert all(line["model"] == "smollm2" for line in lines()), lines()
        whole, stopped, left = by_id[first.id], by_id[again.id], by_id[gone]
        assert (whole["reason"], whole["generated_tokens"], whole["prompt_tokens"]) == ("length", 8, first.usage.prompt_tokens), whole
        assert whole["queue_ms"] <= whole["first_token_ms"] <= whole["total_ms"] and "phase" not in whole, whole
        assert (stopped["reason"], stopped["generated_tokens"]) == ("stop", again.usage.completion_tokens), stopped
        assert stopped["cached_tokens"] == again.usage.prompt_tokens_details.cached_tokens, stopped
        assert (left["reason"], left["phase"]) == ("aborted", "decode") and 0 < left["generated_tokens"] < 1000, left
        assert of(samples(server), "fullbore_requests_aborted_total", phase="decode") == 1
        assert of(samples(server), "vllm:e2e_request_latency_seconds_count") == 2, "a stop string ends a request well"
        server.post("/v1/completions", {"prompt": ["x", "y " * 3000], "max_tokens": 4})
        assert len(lines()) == 3, "what was refused has no line"
        for id in by_id:
            told = [line for line in all_lines() if id in json.dumps(line)]
            assert len(told) == 1, told


def main():
    with Server("sim") as server:
        results = [run("metrics", test, server) for test in [metrics_are_read_by_the_official_parser, the_dashboard_names_what_there_is]]
    results.append(run("metrics", every_request_is_one_line_of_the_log))
    passed = sum(results)
    print(f"{passed} passed, {len(results) - passed} failed")
    sys.exit(0 if all(results) else 1)


main()

"""Kubernetes manifests of deploy/ against the schemas of what they are, and against this server's own flags.

    python3 tests/cluster/manifests.py BINARY

Needs kubernetes-validate, which has Kubernetes' own schemas (scripts/cluster.sh sees to it). What is no part of
Kubernetes is held against the few lines below, from the resources' definitions. No cluster is asked.
"""

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jsonschema
import kubernetes_validate
import yaml

from cluster import DEPLOY, run

BINARY = sys.argv[1]
FOLDER = DEPLOY / "kubernetes"
VERSION = "1.33"


def thing(properties, *required):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT = thing({"number": {"type": "integer", "minimum": 1, "maximum": 65535}}, "number")
TEXT = {"type": "string", "minLength": 1}
OTHERS = {
    ("inference.networking.k8s.io/v1", "InferencePool"): thing({
        "selector": thing({"matchLabels": {"type": "object", "minProperties": 1,
                                           "additionalProperties": {"type": "string", "maxLength": 63}}}, "matchLabels"),
        "targetPorts": {"type": "array", "minItems": 1, "maxItems": 8, "items": PORT},
        "endpointPickerRef": thing({"group": {"type": "string"}, "kind": TEXT, "name": NAME, "port": PORT,
                                    "failureMode": {"enum": ["FailOpen", "FailClose"]}}, "name"),
    }, "selector", "targetPorts", "endpointPickerRef"),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): thing({
        "parentRefs": {"type": "array", "maxItems": 32, "items": thing({"name": NAME, "namespace": NAME}, "name")},
        "hostnames": {"type": "array", "items": TEXT},
        "rules": {"type": "array", "maxItems": 16, "items": thing({
            "matches": {"type": "array", "items": thing({"path": thing({
                "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]}, "value": TEXT}, "type", "value")})},
            "backendRefs": {"type": "array", "items": thing(
                {"group": {"type": "string"}, "kind": TEXT, "name": NAME, "port": {"type": "integer"}}, "name")},
        })},
    }, "parentRefs", "rules"),
}


def documents():
    return [document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def check(document):
    spec = OTHERS.get((document["apiVersion"], document["kind"]))
    if spec is None:
        kubernetes_validate.validate(document, VERSION, strict=True)
    else:
        jsonschema.validate(document, thing({"apiVersion": TEXT, "kind": TEXT, "metadata": thing({"name": NAME}, "name"),
                                             "spec": spec}, "apiVersion", "kind", "metadata", "spec"))


def find(kind):
    return next(document for document in documents() if document["kind"] == kind)


def manifests_follow_their_schemas():
    kinds = sorted(document["kind"] for document in documents())
    assert kinds == ["Deployment", "HTTPRoute", "InferencePool", "NetworkPolicy", "PodDisruptionBudget", "Service"], kinds
    [check(document) for document in documents()]


def mistakes_are_seen():
    def refused(kind, change):
        document = copy.deepcopy(find(kind))
        change(document["spec"])
        try:
            check(document)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError):
            return
        raise AssertionError(f"a wrong {kind} is taken")

    refused("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].pop("name"))
    refused("Deployment", lambda spec: spec["template"]["spec"]["containers"][0].update(readinesProbe={}))
    refused("Deployment", lambda spec: spec.update(replicas="three"))
    refused("InferencePool", lambda spec: spec.update(extensionRef={"name": "older"}))
    refused("InferencePool", lambda spec: spec["targetPorts"][0].update(number=0))
    refused("HTTPRoute", lambda spec: spec["rules"][0]["backendRefs"][0].pop("name"))


def manifests_go_with_each_other_and_with_the_server():
    template = find("Deployment")["spec"]["template"]
    [container] = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind, selector in [("Service", lambda spec: spec["selector"]),
                           ("InferencePool", lambda spec: spec["selector"]["matchLabels"]),
                           ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"]),
                           ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"])]:
        assert selector(find(kind)["spec"]).items() <= template["metadata"]["labels"].items(), kind
    assert find("InferencePool")["spec"]["targetPorts"] == [{"number": ports["http"]}]
    # The server takes the flags as they are: the table alone is printed.
    given = dict(arg.split("=", 1) for arg in container["args"] if "=" in arg)
    assert int(given["--port"]) == ports["http"]
    events = json.loads(given["--kv-events-config"])
    for name, port in [("endpoint", "kv-events"), ("replay_endpoint", "kv-replay")]:
        assert re.fullmatch(r"tcp://\*:(\d+)", events[name])[1] == str(ports[port])
    assert "KV cache" in planned([*container["args"], "--device=cpu"])
    # Gateways and Prometheus have namespaces of their own.
    client = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"fullbore-client": "true"}}}
    assert find("NetworkPolicy")["spec"]["ingress"] == [{"from": [client]}]
    # It may drain for as long as it is given.
    drain = int(given["--drain-timeout"]) + container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain < template["spec"]["terminationGracePeriodSeconds"]


def planned(args, limit=None):
    """The table of memory; in a cgroup of `limit` bytes, as the process sees it that runs in a container."""
    command, environment = [BINARY, *args, "--dry-run"], {"PATH": os.environ["PATH"], **cache()}
    with tempfile.TemporaryDirectory(prefix="fullbore-cgroup-") as folder:
        if limit is not None:
            os.mkdir(f"{folder}/memory")
            for file in ["memory.max", "memory/memory.limit_in_bytes"]:
                pathlib.Path(folder, file).write_text(f"{limit}\n")
            mounted = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
            command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, folder, *command]
        dry = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert dry.returncode == 0, dry.stderr
    return dry.stdout


def what_is_planned_is_within_the_pods_memory():
    """Also on a node that has much more: who takes more is ended by the system, without a word."""
    [container] = find("Deployment")["spec"]["template"]["spec"]["containers"]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30

    def total(limit):
        table = planned([*container["args"], "--device=cpu"], limit)
        units = {"MiB": 1 << 20, "GiB": 1 << 30}
        rows = [re.search(rf"^{row} +([0-9.]+) (MiB|GiB)", table, re.MULTILINE) for row in ["total", "swap"]]
        return sum(float(row[1]) * units[row[2]] for row in rows)

    # The rest is the process's own.
    assert total(limit // 2) < total(limit) < limit - (512 << 20), f"{total(limit) / 2**30:.1f} GiB are planned"


def cache():
    return {name: os.environ[name] for name in ["HOME", "FULLBORE_CACHE"] if name in os.environ}


run(manifests_follow_their_schemas, mistakes_are_seen, manifests_go_with_each_other_and_with_the_server,
    what_is_planned_is_within_the_pods_memory)

"""What benches/gpu.sh measured, held against what CUDA and Vulkan are to reach: verdict.csv, a line for each demand, from the JSON in a
folder. A line that could not be measured is `not there`, with the reason; none is left out. With NAME, the line of that
`bench offline` in throughput.csv.

    python3 benches/gpu_verdict.py FOLDER [NAME]
"""

import csv
import json
import pathlib
import sys
from itertools import zip_longest

# Bits of a weight as it is stored.
BITS = {"q4_0": 4.5, "q8_0": 8.5, "bf16": 16}
# Bytes of an element of K or V.
KV_BYTES = 2
# Of `bench offline` in gpu.sh: in the middle of an answer that many positions are seen.
CONTEXT = 512
# Columns of throughput.csv.
COUNTS = ["prompt_tokens", "output_tokens"]
METRICS = ["duration_s", "output_tokens_per_s", "steady_tokens_per_s"]
# What `timeout` ends with.
CUT_OFF = "124"
# Two most likely tokens that are nearer have not been decided.
UNDECIDED = 0.05
# What gpu.sh has verify compute, a run each.
VERIFIED = {
    "cuda": ["attention", "attention-matrix-units", "mat_mul", "mat_mul-matrix-units", "others"],
    "vulkan": ["attention", "mat_mul", "others"],
    # A GPU may have none.
    "vulkan on matrix units": ["mat_mul-matrix-units"],
}


class NotThere(Exception):
    """Why a number could not be had."""


class Results:
    def __init__(self, folder):
        self.folder = folder
        with open(folder / "runs.csv") as lines:
            rows = list(csv.DictReader(lines))
        self.runs = {row["run"]: row["status"] for row in rows}
        self.limits = {row["run"]: row["limit"] for row in rows}

    def why_missing(self, name):
        status = self.runs.get(name)
        if status is None:
            return f"{name} did not run here"
        if status.startswith("left out: "):
            return f"{name} was {status}"
        if status == CUT_OFF:
            return f"{name} did not end in its {self.limits[name]} s"
        return f"{name} ended with {status}"

    def text(self, name):
        if self.runs.get(name) != "0":
            raise NotThere(self.why_missing(name))
        return (self.folder / f"{name}.json").read_text()

    def json(self, name):
        """The last line of what a program wrote."""
        try:
            result = json.loads(self.text(name).splitlines()[-1])
        except (OSError, IndexError, ValueError) as error:
            raise NotThere(f"{name}.json: {error}")
        if "not_there" in result:
            raise NotThere(result["not_there"])
        return result

    def offline(self, name):
        """A result of `bench offline`: its one target and its one measurement."""
        try:
            result = json.loads(self.text(name))
            target, measurement, doubts = result["targets"][0], result["measurements"][0], result["invalid"]
        except (OSError, IndexError, KeyError, ValueError) as error:
            raise NotThere(f"{name}.json: {error!r}")
        # There is no time for three runs of everything.
        doubts = [doubt for doubt in doubts if "whole runs" not in doubt]
        if doubts:
            raise NotThere(f"{name} is not valid: {'; '.join(doubts)}")
        return target, measurement

    def num_failures(self, name):
        """Of a table of `verify`, which ends with 1 where there are any, and not only then."""
        if self.runs.get(name) not in ["0", "1"]:
            raise NotThere(self.why_missing(name))
        title, *lines = (self.folder / f"{name}.txt").read_text().splitlines() or [""]
        failures = [line for line in lines if "FAIL: " in line]
        if (self.runs[name] == "1") != bool(failures):
            raise NotThere(self.why_missing(name))
        arithmetic = "matrix-units" if name.endswith("matrix-units") else "f32"
        if not title.endswith(f", {arithmetic}"):
            raise NotThere(f"{name} was not computed in {arithmetic}: the device has nothing else")
        return len(failures)

    def median(self, name, metric):
        return self.offline(name)[1]["summary"][metric]["median"]

    def steady(self, name):
        if "steady_tokens_per_s" not in self.offline(name)[1]["summary"]:
            raise NotThere(f"in {name} the requests never decoded all at once")
        return self.median(name, "steady_tokens_per_s")

    def throughput(self, name):
        """A line of throughput.csv; of what could not be measured the name alone."""
        try:
            target, measurement = self.offline(name)
        except NotThere:
            return [name, "", "", "", "", "", "", ""]
        summary, counts = measurement["summary"], measurement["runs"][0]["counts"]
        rates = [summary.get(metric, {}).get("median", "") for metric in METRICS]
        return [name, target["device"]["tier"], target["device"]["arithmetic"], *map(counts.get, COUNTS), *rates]

    def num_weights(self, shape):
        """Of all products of a layer, and of the output: what a step reads once."""
        dim, ffn = shape["dim"], shape["ffn_dim"]
        q, kv = shape["num_heads"] * shape["head_dim"], shape["num_kv_heads"] * shape["head_dim"]
        return dim * (q + 2 * kv) + q * dim + 3 * dim * ffn, shape["vocab_size"] * dim

    def step_bytes(self, shape, weights, layers=32):
        of_layer, of_output = self.num_weights(shape)
        kv = 2 * layers * shape["num_kv_heads"] * shape["head_dim"] * CONTEXT * KV_BYTES
        return (layers * of_layer + of_output) * BITS[weights] / 8 + kv

    def prefill_flops(self, shape, tokens, layers=32):
        """Of a prompt: products of all layers, the output of its last token, and attention to what is before."""
        of_layer, of_output = self.num_weights(shape)
        attention = 4 * shape["num_heads"] * shape["head_dim"] * tokens * (tokens + 1) / 2
        return 2 * of_layer * layers * tokens + 2 * of_output + attention * layers

    def answers(self, name):
        """Whatever the run's end was: those who do not follow are told of too."""
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            raise NotThere(self.why_missing(name))


def batch_1_bandwidth(name, peaks):
    def measure(results):
        seconds = results.median(name, "tpot_mean_ms") / 1e3
        ops = results.json(peaks)
        return results.step_bytes(ops["shape"], "q4_0") / seconds / ops["peaks"]["copy_bytes_per_s"]

    return measure


def batch_32(many, one):
    return lambda results: results.steady(many) / results.steady(one)


def batch_256(results):
    return results.steady("8b-q8_0-decode-256-cuda") / results.steady("8b-q8_0-decode-32-cuda")


def prefill_rate(results, name, shape):
    """FLOP/s, and the arithmetic."""
    target, measurement = results.offline(name)
    tokens = 2048
    num_prompts = measurement["runs"][0]["counts"]["prompt_tokens"] / tokens
    flops = results.prefill_flops(shape, tokens) * num_prompts
    return flops / results.median(name, "duration_s"), target["device"]["arithmetic"]


def prefill_cuda(results):
    """Beside the best that anyone reaches there. Our own products alone, of an instruction that may not reach what the chip
    has, are nothing to pass by."""
    ops = results.json("ops-8b-cuda")
    rate, _ = prefill_rate(results, "8b-prefill-cuda", ops["shape"])
    own = ops["peaks"].get("matrix_flops_per_s") or 0
    try:
        return rate / max(results.json("peer-matrix")["bf16_flops_per_s"], own)
    except NotThere as reason:
        raise NotThere(f"{reason}; it is {rate / own:.3g} of our own matrix peak" if own else str(reason))


def prefill(name, peak):
    def measure(results):
        ops = results.json("ops-8b-peaks")
        rate, arithmetic = prefill_rate(results, name, ops["shape"])
        if name.endswith(arithmetic) or arithmetic == "f32" and peak == "flops_per_s":
            return rate / ops["peaks"][peak]
        raise NotThere(f"{name} was computed in {arithmetic}: the device has nothing else")

    return measure


def host_ms(results):
    """The worst of all numbers of sequences."""
    steps = [json.loads(line)["step"] for line in results.text("submit").splitlines()]
    if not steps or any(step["num_layers"] != 32 for step in steps):
        raise NotThere("submit.json has no steps of 32 layers")
    return max(step["record_and_submit_ms"] for step in steps)


def follows(name, arithmetic="f32"):
    def measure(results):
        answers = results.answers(name)
        if answers["arithmetic"] != arithmetic:
            raise NotThere(f"{name} was computed in {answers['arithmetic']}: the device has nothing else")
        return len(answers["followed"]["failures"])

    return measure


def agree(results):
    """Answers that part, or of which one ends, before either side was undecided."""
    cuda, vulkan = (results.answers(f"golden-{api}")["followed"]["answers"] for api in ["cuda", "vulkan"])
    num_apart = num_compared = 0
    for one, other in zip(cuda, vulkan, strict=True):
        pairs = zip_longest(one["ids"], other["ids"], one["gaps"], other["gaps"], fillvalue=None)
        for a, b, gap, other_gap in pairs:
            if any(found is not None and found < UNDECIDED for found in [gap, other_gap]):
                break
            num_compared += 1
            if a != b or gap is None or other_gap is None:
                num_apart += 1
                break
    if num_compared == 0:
        raise NotThere("golden-cuda and golden-vulkan have no token that both had decided")
    return num_apart


def ops_apart(what):
    def measure(results):
        api = what.split()[0]
        return sum(results.num_failures(f"verify-{api}-{name}") for name in VERIFIED[what])

    return measure


def same_in_company(name):
    def measure(results):
        return int(results.answers(name)["same_in_company"])

    return measure


def beside_transformers(results):
    peer = results.json("peer-transformers")["output_tokens_per_s"]
    return results.median("8b-bf16-32-cuda", "output_tokens_per_s") / peer


def beside_llama_cpp(results):
    peer = results.json("peer-llama-cpp")["output_tokens_per_s"]
    return results.median("model-32-cuda", "output_tokens_per_s") / peer


# What, how it is measured, what it is held against, and whether more or less of it is better.
DEMANDS = [
    (
        "CUDA batch 1 at context 512: share of the copy bandwidth",
        batch_1_bandwidth("8b-decode-1-cuda", "ops-8b-cuda"),
        ">=",
        0.75,
    ),
    (
        "CUDA batch 32: tokens a second over those of batch 1",
        batch_32("8b-decode-32-cuda", "8b-decode-1-cuda"),
        ">=",
        20,
    ),
    ("CUDA batch 256 (q8_0): tokens a second over those of batch 32", batch_256, ">=", 1.3),
    ("CUDA batch 256 (q8_0): tokens a second", lambda results: results.steady("8b-q8_0-decode-256-cuda"), ">=", 10_000),
    ("CUDA prefill of 2048: share of the measured matrix rate", prefill_cuda, ">=", 0.45),
    (
        "Vulkan batch 1 at context 512: share of the copy bandwidth",
        batch_1_bandwidth("8b-decode-1", "ops-8b-peaks"),
        ">=",
        0.6,
    ),
    ("Vulkan batch 32: tokens a second over those of batch 1", batch_32("8b-decode-32", "8b-decode-1"), ">=", 16),
    (
        "Vulkan prefill of 2048 on matrix units: share of their measured peak",
        prefill("8b-prefill-matrix-units", "matrix_flops_per_s"),
        ">=",
        0.25,
    ),
    ("Vulkan prefill of 2048 in f32: share of the measured peak", prefill("8b-prefill", "flops_per_s"), ">=", 0.4),
    ("Vulkan: host ms to record and submit a step of 32 layers", host_ms, "<=", 1.5),
    ("CUDA: checks of ops that differ from the cpu", ops_apart("cuda"), "<=", 0),
    ("Vulkan: checks of ops that differ from the cpu", ops_apart("vulkan"), "<=", 0),
    ("Vulkan on matrix units: checks of products that differ", ops_apart("vulkan on matrix units"), "<=", 0),
    ("CUDA against the golden: failures", follows("golden-cuda"), "<=", 0),
    ("CUDA on tensor cores against the golden: failures", follows("golden-cuda-matrix-units", "matrix-units"), "<=", 0),
    ("Vulkan against the golden: failures", follows("golden-vulkan"), "<=", 0),
    (
        "Vulkan on matrix units against the golden: failures",
        follows("golden-vulkan-matrix-units", "matrix-units"),
        "<=",
        0,
    ),
    ("CUDA and Vulkan: answers that part where both are decided", agree, "<=", 0),
    ("CUDA: the same alone as among 31", same_in_company("golden-cuda"), ">=", 1),
    ("Vulkan: the same alone as among 31", same_in_company("golden-vulkan"), ">=", 1),
    ("32 streams (bf16) over transformers' continuous batching", beside_transformers, ">=", 1.5),
    ("32 streams (the model) over llama.cpp", beside_llama_cpp, ">=", 1.5),
]


def main():
    results = Results(pathlib.Path(sys.argv[1]))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if len(sys.argv) > 2:
        writer.writerow(results.throughput(sys.argv[2]))
        return
    writer.writerow(["line", "measured", "wanted", "verdict", "reason"])
    for what, measure, sense, wanted in DEMANDS:
        try:
            measured = measure(results)
            passes = measured >= wanted if sense == ">=" else measured <= wanted
            writer.writerow([what, f"{measured:.6g}", f"{sense} {wanted}", "pass" if passes else "fail", ""])
        except NotThere as reason:
            writer.writerow([what, "", f"{sense} {wanted}", "not there", str(reason)])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            writer.writerow([what, "", f"{sense} {wanted}", "not there", f"a result of another form: {error!r}"])


if __name__ == "__main__":
    main()

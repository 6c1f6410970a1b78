"""A float32 forward pass in numpy over gguf's dequantiser: the outside reference of tests/golden.rs.

Usage: python tests/golden/reference.py MODEL.gguf OUT.json, with numpy and gguf from PyPI. OUT.json must already hold
the prompts as llama_cpp.py wrote them; greedy continuations, gaps and the passage's mean NLL are added to it.
"""

import json
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NUM_NEW_TOKENS = 48


class Model:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.cache = {}
        self.arch = reader.fields["general.architecture"].contents()

        def field(key, default=None):
            found = reader.fields.get(f"{self.arch}.{key}")
            return default if found is None else found.contents()

        self.num_layers = field("block_count")
        self.dim = field("embedding_length")
        self.num_heads = field("attention.head_count")
        self.num_kv_heads = field("attention.head_count_kv")
        self.head_dim = field("attention.key_length", self.dim // self.num_heads)
        self.eps = field("attention.layer_norm_rms_epsilon")
        self.base = field("rope.freq_base", 10000.0)
        self.window = field("attention.sliding_window")
        self.gemma = self.arch == "gemma3"
        self.interleaved = self.arch == "llama"

    def weight(self, name):
        if name not in self.cache:
            tensor = self.tensors[name]
            self.cache[name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return self.cache[name]

    def norm(self, x, name):
        scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.eps))
        return x * scale * self.weight(name)

    def rotate(self, x, base):
        """x: (tokens, heads, head_dim)"""
        half = self.head_dim // 2
        frequencies = float(base) ** (-np.arange(half, dtype=np.float64) / half)
        angles = np.arange(x.shape[0])[:, None] * frequencies[None, :]
        cos, sin = np.cos(angles).astype(np.float32)[:, None, :], np.sin(angles).astype(np.float32)[:, None, :]
        out = np.empty_like(x)
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            out[..., 0::2], out[..., 1::2] = a * cos - b * sin, a * sin + b * cos
        else:
            a, b = x[..., :half], x[..., half:]
            out[..., :half], out[..., half:] = a * cos - b * sin, a * sin + b * cos
        return out

    def attention(self, x, layer):
        prefix = f"blk.{layer}."
        tokens = x.shape[0]
        local = self.gemma and (layer + 1) % 6 != 0
        heads = {}
        for name, count in [("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads)]:
            heads[name] = (x @ self.weight(prefix + f"attn_{name}.weight").T).reshape(tokens, count, self.head_dim)
            if name != "v":
                if self.gemma:
                    heads[name] = self.norm(heads[name], prefix + f"attn_{name}_norm.weight")
                heads[name] = self.rotate(heads[name], 10000.0 if local else self.base)
        # The cache holds f16.
        k = heads["k"].astype(np.float16).astype(np.float32)
        v = heads["v"].astype(np.float16).astype(np.float32)
        positions = np.arange(tokens)
        visible = positions[None, :] <= positions[:, None]
        if local and self.window:
            visible &= positions[:, None] - positions[None, :] < self.window
        group = self.num_heads // self.num_kv_heads
        out = np.empty_like(heads["q"])
        for head in range(self.num_heads):
            scores = heads["q"][:, head] @ k[:, head // group].T / np.float32(np.sqrt(self.head_dim))
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = weights @ v[:, head // group] / weights.sum(axis=-1, keepdims=True)
        return out.reshape(tokens, -1) @ self.weight(prefix + "attn_output.weight").T

    def feed_forward(self, x, layer):
        prefix = f"blk.{layer}."
        gate = x @ self.weight(prefix + "ffn_gate.weight").T
        up = x @ self.weight(prefix + "ffn_up.weight").T
        if self.gemma:
            act = 0.5 * gate * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)))
        else:
            act = gate / (1 + np.exp(-gate))
        return (act * up) @ self.weight(prefix + "ffn_down.weight").T

    def logits(self, ids, rows):
        """Logits of the last `rows` positions of one sequence."""
        x = self.weight("token_embd.weight")[ids]
        if self.gemma:
            x = x * np.float32(np.sqrt(self.dim))
        for layer in range(self.num_layers):
            prefix = f"blk.{layer}."
            branch = self.attention(self.norm(x, prefix + "attn_norm.weight"), layer)
            if self.gemma:
                branch = self.norm(branch, prefix + "post_attention_norm.weight")
            x = x + branch
            branch = self.feed_forward(self.norm(x, prefix + "ffn_norm.weight"), layer)
            if self.gemma:
                branch = self.norm(branch, prefix + "post_ffw_norm.weight")
            x = x + branch
        output = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.norm(x[-rows:], "output_norm.weight") @ self.weight(output).T


def greedy(model, prompt):
    """Ids, and the gap between the two best logits at each."""
    ids, gaps = list(prompt), []
    for _ in range(NUM_NEW_TOKENS):
        row = model.logits(ids, 1)[0]
        second, first = np.partition(row, -2)[-2:]
        gaps.append(round(float(first - second), 5))
        ids.append(int(np.argmax(row)))
    return ids[len(prompt) :], gaps


def mean_nll(model, ids):
    logits = model.logits(ids, len(ids))[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(-log_probabilities[np.arange(len(ids) - 1), ids[1:]].mean())


def main():
    model_path, out_path = sys.argv[1:]
    golden = json.load(open(out_path))
    model = Model(model_path)
    for case in golden["cases"]:
        case["reference"], case["reference_gaps"] = greedy(model, case["prompt"])
    golden["passage_nll"] = round(mean_nll(model, golden["passage"]), 6)
    json.dump(golden, open(out_path, "w"), indent=None, separators=(",", ":"))


if __name__ == "__main__":
    main()

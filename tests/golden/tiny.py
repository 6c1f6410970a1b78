"""Writes tiny/: one small random model a family in Hugging Face's layout, and what `transformers` makes of it.

    python tests/golden/tiny.py

with torch, transformers and safetensors from PyPI. Each folder has config.json and weights in 16 bits as `transformers`
saves them, what tiny_tokenizer.py puts beside them, and expected.json: natural log-probabilities in float32 of each prompt token but the first, the greedy
continuation with the gap between the two best logits of each, and whole rows of the last prompt positions. Those rows
alone are with K and V rounded to f16, as Fullbore's cache holds them, so that they can be compared closely.
"""

import json
import pathlib
import shutil

import tiny_tokenizer
import torch
import transformers
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

ROOT = pathlib.Path(__file__).parent / "tiny"
PROMPT_LEN = 24
NUM_WHOLE_ROWS = 8
NUM_NEW_TOKENS = 12
WINDOW = 8
FIRST_SEED = 70
# Two shards.
MAX_SHARD_BYTES = {"llama": 70_000}

SHAPE = dict(
    vocab_size=128, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)
# Eight frequencies a head: some kept, one on the ramp, some divided.
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama": (torch.bfloat16, transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "mistral": (torch.float16, transformers.MistralConfig(
        **SHAPE, sliding_window=WINDOW, rope_parameters=dict(rope_type="default", rope_theta=5000.0),
        tie_word_embeddings=True,
    )),
    "qwen2": (torch.float16, transformers.Qwen2Config(
        **SHAPE, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=20000.0), tie_word_embeddings=True,
    )),
    "qwen3": (torch.bfloat16, transformers.Qwen3Config(
        **{**SHAPE, "hidden_size": 48}, head_dim=32, use_sliding_window=True, sliding_window=WINDOW,
        max_window_layers=1, rope_parameters=dict(rope_type="default", rope_theta=50000.0), tie_word_embeddings=True,
    )),
    "gemma3": (torch.bfloat16, transformers.Gemma3TextConfig(
        **{**SHAPE, "hidden_size": 32, "num_hidden_layers": 7, "num_key_value_heads": 1}, head_dim=16,
        query_pre_attn_scalar=24, sliding_window=WINDOW, tie_word_embeddings=True,
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=1000.0),
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=100000.0),
        ),
    )),
}


def randomise(model, seed, gemma):
    """Values under which every part of a layer matters: a trained model's widths, biases and norms far from neutral.

    Embeddings are small beside what the layers add, and the last norm makes up for it: else tied models repeat a token.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight"):
            mean = 2.0 if name == "model.norm.weight" else 1.0
            value.data = 0.3 * noise + mean - (1.0 if gemma else 0.0)
        elif name.endswith(".bias"):
            value.data = 0.2 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value.data = 0.06 * noise
        else:
            value.data = noise * (0.8 / value.shape[1] ** 0.5)


def rounded_attention(module, q, k, v, mask, **rest):
    return eager_attention_forward(module, q, k.half().float(), v.half().float(), mask, **rest)


def load(folder, attention):
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def rounded(rows):
    return [[round(float(value), 5) for value in row] for row in rows]


@torch.no_grad()
def expected(folder, prompt):
    """What is held against the engine is the files, not what made them."""
    model, ids, gaps = load(folder, "eager"), list(prompt), []
    rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    for _ in range(NUM_NEW_TOKENS):
        best = torch.topk(model(torch.tensor([ids])).logits[0, -1], 2)
        ids.append(int(best.indices[0]))
        gaps.append(round(float(best.values[0] - best.values[1]), 5))
    as_cached = torch.log_softmax(load(folder, "rounded")(torch.tensor([prompt])).logits[0], -1)
    return {
        "prompt": prompt,
        "logprobs": [round(float(rows[at, token]), 5) for at, token in enumerate(prompt[1:])],
        "greedy": ids[len(prompt):],
        "gaps": gaps,
        "last_rows": rounded(as_cached[-NUM_WHOLE_ROWS:]),
    }


def main():
    transformers.AttentionInterface.register("rounded", rounded_attention)
    transformers.AttentionMaskInterface.register("rounded", eager_mask)
    for seed, (name, (dtype, config)) in enumerate(FAMILIES.items(), FIRST_SEED):
        folder = ROOT / name
        shutil.rmtree(folder, ignore_errors=True)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model, seed, name == "gemma3")
        model.tie_weights()
        model.to(dtype).save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES.get(name, 1 << 30))
        tiny_tokenizer.write(folder)
        generator = torch.Generator().manual_seed(1000 + seed)
        prompt = torch.randint(0, config.vocab_size, (PROMPT_LEN,), generator=generator).tolist()
        (folder / "expected.json").write_text(json.dumps(expected(folder, prompt)) + "\n")
        print(name, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()

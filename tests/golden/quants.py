"""Writes quants.bin: what PyPI's gguf makes of blocks of every format, and of one row of each test model.

    python tests/golden/quants.py ~/.cache/fullbore/models

A record is: u32 length and UTF-8 label, u32 length and stored bytes, u32 count and f32 values; all little-endian.
A label is a format's name, or `file:tensor:row`.
"""

import pathlib
import struct
import sys

import gguf
import numpy as np

# Where a block has its f16 scales. `None` is a random but ordinary scale.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}
# Smallest and largest subnormal, largest finite, minus zero, infinity.
EXTREMES = [0x0001, 0x83FF, 0x7BFF, 0x8000, 0xFC00, None, None]
ROWS = [
    ("SmolLM2-135M-Instruct.Q4_1.gguf", "blk.0.attn_k.weight", 11),
    ("gemma-3-270m-Q4_K_M.gguf", "token_embd.weight", 262143),
]


def blocks(name, rng):
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    made = [np.zeros(size, np.uint8), np.full(size, 0xFF, np.uint8)]
    for bits in EXTREMES:
        block = rng.integers(0, 256, size, dtype=np.uint8)
        for at in SCALES[name]:
            scale = np.array([bits], np.uint16) if bits is not None else rng.normal(0, 0.1, 1).astype(np.float16)
            block[at : at + 2] = scale.view(np.uint8)
        made.append(block)
    return np.concatenate(made)


def floats(name, rng):
    if name == "F32":
        edges = np.array([0x8000_0000, 1, 0x807F_FFFF, 0x7F7F_FFFF, 0xFF80_0000, 0x7FC0_0001], np.uint32)
        return np.concatenate([edges, rng.normal(0, 1, 58).astype(np.float32).view(np.uint32)]).view(np.uint8)
    edges = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80], np.uint16)
    return np.concatenate([edges, rng.integers(0, 65536, 53, dtype=np.uint16)]).view(np.uint8)


def record(label, stored, qtype):
    values = gguf.quants.dequantize(stored, qtype).astype("<f4").tobytes()
    label = label.encode()
    head = struct.pack("<I", len(label)) + label + struct.pack("<I", stored.size)
    return head + stored.tobytes() + struct.pack("<I", len(values) // 4) + values


def main():
    models = pathlib.Path(sys.argv[1])
    rng = np.random.default_rng(2)
    out = b""
    for name in ["F32", "F16", "BF16", *SCALES]:
        stored = blocks(name, rng) if name in SCALES else floats(name, rng)
        out += record(name.lower(), stored, gguf.GGMLQuantizationType[name])
    for file, tensor, row in ROWS:
        found = next(t for t in gguf.GGUFReader(models / file).tensors if t.name == tensor)
        rows = found.data.reshape(-1, found.data.shape[-1])
        out += record(f"{file}:{tensor}:{row}", np.ascontiguousarray(rows[row]), found.tensor_type)
    pathlib.Path(__file__).with_name("quants.bin").write_bytes(out)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()

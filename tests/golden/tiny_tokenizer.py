"""Writes what lies beside the weights in tiny/: tokenizers, templates and defaults, in the layouts that folders have.

    python3 tests/golden/tiny_tokenizer.py

Every folder gets the same byte-level vocabulary of 128 tokens. Its chat template lies where older folders have it
(llama: a text in tokenizer_config.json; mistral: a list of named ones there), where newer ones do (the qwens:
chat_template.jinja), or nowhere (gemma3: a base model).
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).parent / "tiny"
SPACE, NEWLINE = "\u0120", "\u010a"
MERGES = [(SPACE, "t"), ("h", "e"), ("i", "n"), ("r", "e"), ("a", "n"), ("o", "n"), ("e", "r"), (SPACE + "t", "he"),
          ("a", "t"), ("o", "r"), ("e", "s"), ("i", "s"), (SPACE, "a"), ("l", "l"), ("o", "u"), ("e", "d"),
          ("in", "g"), (SPACE, "s"), (SPACE, "w"), ("an", "d"), (SPACE, "c"), (SPACE, "o"), ("i", "t"), ("s", "t")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{index}|>" for index in range(5))]
TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
            "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
OTHER = "{{ raise_exception('this template is for something else') }}"


def tokenizer():
    pieces = [chr(code) for code in range(ord("!"), ord("~") + 1)] + [SPACE, NEWLINE]
    pieces += [left + right for left, right in MERGES]
    added = [{"id": len(pieces) + index, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for index, text in enumerate(SPECIAL)]
    assert len(pieces) + len(added) == 128
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {piece: index for index, piece in enumerate(pieces)},
                  "merges": [f"{left} {right}" for left, right in MERGES]},
    }


def write(folder):
    def write_json(file, value):
        (folder / file).write_text(json.dumps(value, ensure_ascii=False) + "\n")

    name = folder.name
    config = {"eos_token": "<|im_end|>", "bos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    if name == "llama":
        config["chat_template"] = TEMPLATE
    if name == "mistral":
        config["chat_template"] = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": TEMPLATE}]
    if name.startswith("qwen"):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        config["chat_template"] = OTHER
    write_json("tokenizer.json", tokenizer())
    write_json("tokenizer_config.json", config)
    write_json("generation_config.json", {"eos_token_id": [122, 120], "temperature": 0.5, "top_p": 0.9, "top_k": 20})


if __name__ == "__main__":
    for folder in sorted(ROOT.iterdir()):
        write(folder)

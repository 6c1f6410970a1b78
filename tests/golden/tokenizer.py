"""Makes tokenizer-NAME.json beside this file: texts and the ids that llama.cpp gives them.

Needs PyPI's xllamacpp==2026.10.11549 and the two models in the cache folder (make models).
    python3 tests/golden/tokenizer.py
"""

import json
import os
import pathlib
import random
import socket
import urllib.request

import xllamacpp

MODELS = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-Q4_K_M.gguf"}
HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("FULLBORE_CACHE") or pathlib.Path.home() / ".cache/fullbore")

TEXTS = [
    "Hello, world!",
    " leading space",
    "trailing space ",
    "   three   inside   ",
    "\n",
    "\n\n\n",
    "\t\ttabs\t",
    " \n \n\n \t\n x",
    "\r\nwindows\r\n\r\nlines\r\n",
    "a\u00a0b\u2003c\u3000d",
    " " * 40 + "x" + " " * 17,
    "\n" * 40 + "x",
    "1 12 123 1234 12345 3.14159 1,000,000 -42 0x1F 1e-9",
    "２０２４年 ½ ² ٣ ४",
    "I'm you're he'll we've they'd it's DON'T CAN'T I'M",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case",
    "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n    println!(\"{:?}\", &x[..4]);\n}\n",
    "def f(a, *b, **c):\n\treturn {k: v for k, v in c.items() if k != 'x'}  # comment\n",
    "<html><body class=\"a\">&nbsp;</body></html>",
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x' -- end",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"\\u00e9\"}}",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️",
    "emoji🙂in🙂words",
    "你好，世界！今天天气很好。",
    "こんにちは世界。カタカナとひらがな",
    "안녕하세요 세계",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "naïve café Ångström ﬁ ﬂ e\u0301 n\u0303",
    "mixed 中文 and English と日本語 123 mixed",
    "\u200b\u200d\ufeff zero width",
    "\u2581 lower one eighth block \u2581\u2581",
    "<0x41> <0x0A> byte tokens as text",
    "...!!!???---===***///",
    "«quotes» “curly” ‘single’ —dash… §¶†‡",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 𐍈 🜁",
    "\x00\x01\x1f\x7f\x80 control",
    "http://example.com/path?query=1&b=2#frag user@example.org",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 100 + "\n" + "=" * 70,
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<eos><pad><unk>",
    "text<|im_end|>text <|im_end|> text",
    "<|im_end <|im_end|x <<|im_end|>>",
    "<repo_name>a<file_sep>b<unused0><unused12>[multimodal]",
]


def random_texts(count):
    """Texts over alphabets that stress the borders between classes of characters."""
    draw = random.Random(7)
    alphabets = ["ab  \n", "aB1 .'", "é中🙂 a1", " \t\n\r", "<|im_end>s ", "0123456789 ,.", "tshe 'lv", "{}();= \n\tx", "▁ a<0x>"]
    for index in range(count):
        alphabet = alphabets[index % len(alphabets)]
        yield "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 40)))


def tokenize(url, text, parse_special):
    body = {"content": text, "add_special": False, "parse_special": parse_special}
    request = urllib.request.Request(url + "/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["tokens"]


def main():
    for name, file in MODELS.items():
        params = xllamacpp.CommonParams()
        params.model.path = str(CACHE / "models" / file)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            params.port = free.getsockname()[1]
        params.n_ctx = 256
        params.warmup = False
        server = xllamacpp.Server(params)
        cases = []
        for text in TEXTS + list(random_texts(180)):
            as_text, parsed = (tokenize(server.listening_address, text, parse) for parse in (False, True))
            case = {"text": text, "as_text": as_text}
            if parsed != as_text:
                case["parse"] = parsed
            cases.append(case)
        lines = ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in cases)
        (HERE / f"tokenizer-{name}.json").write_text("[\n" + lines + "\n]\n")
        print(name, len(cases), "texts")
        del server


main()

"""Ids and greedy continuations from llama.cpp: the second outside reference of tests/golden.rs.

Usage: python tests/golden/llama_cpp.py MODEL.gguf OUT.json, with xllamacpp from PyPI. Then run reference.py.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import urllib.request

NUM_NEW_TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees because",
]


@contextlib.contextmanager
def llama_cpp(model_path):
    script = pathlib.Path(__file__).parents[2] / "benches" / "llama_cpp_server.py"
    command = [sys.executable, str(script), model_path, "18431", "1", "2", "2048"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=300))


def main():
    model_path, out_path = sys.argv[1:]
    passage = (pathlib.Path(__file__).parent / "passage.txt").read_text()
    with llama_cpp(model_path) as url:
        tokenize = lambda text: post(url, "/tokenize", {"content": text, "add_special": True})["tokens"]
        golden = {"passage": tokenize(passage), "cases": []}
        for text in PROMPTS + [passage]:
            prompt = tokenize(text)
            body = {"prompt": prompt, "n_predict": NUM_NEW_TOKENS, "temperature": 0, "n_probs": 2, "ignore_eos": True}
            body |= {"cache_prompt": False, "return_tokens": True, "post_sampling_probs": False}
            answer = post(url, "/completion", body)
            tops = [entry["top_logprobs"] for entry in answer["completion_probabilities"]]
            gaps = [round(top[0]["logprob"] - top[1]["logprob"], 5) for top in tops]
            case = {"text": text, "prompt": prompt, "llama_cpp": answer["tokens"], "llama_cpp_gaps": gaps}
            golden["cases"].append(case)
    json.dump(golden, open(out_path, "w"))


if __name__ == "__main__":
    main()

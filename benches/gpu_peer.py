"""What PyTorch, transformers and llama.cpp reach on the GPU that benches/gpu.sh measures: the rate of a large product of
bf16; tokens a second of continuous batching on a Llama of 8B's shape with random bf16 weights, on the same lengths; and of
llama.cpp's `llama-batched-bench` on a GGUF file; or, after which none of these waits for a disk, versions alone. One line
of JSON; what is not there is a key `not_there` with the reason."""

import argparse
import json
import random
import subprocess
import time


def median(values):
    return sorted(values)[len(values) // 2]


def matrix_rate(torch, size=8192):
    """FLOP/s of a square product on random values."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / median(times)


def llama(torch, transformers):
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval()


def throughput(torch, transformers, args):
    """Output tokens a second of all requests at once, prefill included: as `fullbore bench offline` has it."""
    model = llama(torch, transformers)
    generation = transformers.GenerationConfig(
        max_new_tokens=args.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # One manager, with its cache and what graphs it has, for all runs; the first of them warms up.
    with model.continuous_batching_context_manager(generation_config=generation) as manager:
        for run in range(2):
            source = random.Random(run)
            prompts = [[source.randrange(128000) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]
            torch.cuda.synchronize()
            begun = time.perf_counter()
            num_tokens = answer_all(manager, prompts)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
            if num_tokens != args.requests * args.output_tokens:
                raise RuntimeError(f"{num_tokens} tokens came of {args.requests} x {args.output_tokens}")
        # Not all that it can have is there everywhere: the end gives the model its own attention back.
        settings = getattr(manager, "continuous_batching_config", None)
        return {
            "output_tokens_per_s": num_tokens / seconds,
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "has_graphs": getattr(settings, "use_cuda_graph", None),
        }


def answer_all(manager, prompts):
    """Tokens of all answers, when the last has ended."""
    manager.add_requests(prompts)
    num_tokens = num_ended = 0
    while num_ended < len(prompts):
        answer = manager.get_result(timeout=1)
        if answer is None:
            if not manager.is_running():
                raise RuntimeError("its manager has ended")
        elif answer.error is not None:
            raise RuntimeError(answer.error)
        elif answer.is_finished():
            num_tokens += len(answer.generated_tokens)
            num_ended += 1
    return num_tokens


def llama_cpp(args):
    """Output tokens a second of all requests at once, prefill included, from its table: a row that begins with the lengths
    and the requests, and whose last number but one is all of its seconds."""
    asked = [args.prompt_tokens, args.output_tokens, args.requests]
    positions = args.requests * (args.prompt_tokens + args.output_tokens)
    flags = {"-m": args.model, "-c": positions, "-b": 2048, "-ngl": 999}
    flags |= dict(zip(["-npp", "-ntg", "-npl"], asked))
    command = [args.binary, *(str(word) for flag in flags.items() for word in flag)]
    ended = subprocess.run(command, capture_output=True, text=True)
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in ended.stdout.splitlines()]
    for row in rows:
        if row[:3] == [str(number) for number in asked]:
            return args.requests * args.output_tokens / float(row[-2])
    said = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
    raise RuntimeError(f"llama-batched-bench ended with {ended.returncode}: {' '.join(said)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["versions", "matrix", "throughput", "llama-cpp"])
    parser.add_argument("--binary")
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=448)
    parser.add_argument("--output-tokens", type=int, default=128)
    args = parser.parse_args()
    try:
        if args.what == "llama-cpp":
            print(json.dumps({"output_tokens_per_s": llama_cpp(args)}))
            return
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no CUDA device")
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        if args.what == "matrix":
            result["bf16_flops_per_s"] = matrix_rate(torch)
        else:
            import transformers

            # To name it is what reads its modules.
            result |= {"transformers": transformers.__version__, "model": transformers.LlamaForCausalLM.__name__}
            if args.what == "throughput":
                result |= throughput(torch, transformers, args)
    # Whatever it is that is missing or does not go together there.
    except Exception as error:
        result = {"not_there": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

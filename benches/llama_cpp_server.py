"""llama.cpp's own server through PyPI's xllamacpp, with the flags of `llama-server` that benches give."""

import argparse
import threading

import xllamacpp

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
for flag in ["--port", "--parallel", "--ctx-size", "--threads"]:
    parser.add_argument(flag, type=int, required=True)
args = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path = args.model
params.port = args.port
params.n_parallel = args.parallel
params.n_ctx = args.ctx_size
params.cpuparams.n_threads = args.threads
params.cpuparams_batch.n_threads = args.threads
params.cont_batching = True
params.warmup = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()

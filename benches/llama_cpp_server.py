"""llama.cpp's own server through PyPI's xllamacpp: MODEL PORT SLOTS THREADS CONTEXT."""

import sys
import threading

import xllamacpp

model, port, slots, threads, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = model
params.port = port
params.n_parallel = slots
params.n_ctx = context
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
params.cont_batching = True
params.warmup = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()

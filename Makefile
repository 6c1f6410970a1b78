# The commands of the README. Each does its own set-up and names its steps as it goes; none asks a question.

CACHE := $(or $(FULLBORE_CACHE),$(HOME)/.cache/fullbore)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: serve test test-full test-e2e test-cluster fuzz test-fresh verify bench bench-lavapipe models ptx drivers toolchain

# Builds the server, fetches the default model and serves it.
serve: toolchain
	@echo "serve: building (a first build takes some minutes)"
	cargo build --release --locked -p fullbore
	target/release/fullbore serve $(ARGS)

# Everything that CI runs.
test: toolchain drivers
	@scripts/test.sh

# What takes too long for every change.
test-full: test
	@scripts/test-full.sh

# Official clients against a debug build: part of `make test`.
test-e2e: toolchain drivers
	@scripts/models.sh
	cargo build --locked -p fullbore
	@. target/lavapipe/env && scripts/e2e.sh target/debug/fullbore

# Several workers behind SMG and NVIDIA Dynamo, for real, and the manifests of deploy/.
test-cluster: toolchain
	@scripts/models.sh
	cargo build --locked -p fullbore
	@scripts/cluster.sh target/debug/fullbore

# What strangers send, at random, from the corpus that is kept: FUZZ_SECONDS (300) for each target of fuzz/.
fuzz: toolchain
	@scripts/fuzz.sh

# Both commands above on a fresh Debian 12, in a root of its own.
test-fresh:
	@scripts/test-fresh.sh

# Every op in every variant on every GPU of this machine, as tables, and after them on the drivers of the tests.
verify: toolchain drivers
	@scripts/verify.sh

# Measured ratios to llama.cpp on this machine.
bench: toolchain drivers
	@scripts/bench.sh

# Measured ratios to llama.cpp's Vulkan backend on software Vulkan; builds that once.
bench-lavapipe: toolchain drivers
	@scripts/bench-lavapipe.sh

# The two models and the tokenizer vectors that tests read, into $(CACHE).
models: toolchain
	@scripts/models.sh

# The CUDA kernels as PTX, for machines without NVRTC, after their text has changed.
ptx: toolchain drivers
	@. target/cuda/env && FULLBORE_REWRITE_PTX=1 cargo test --locked --workspace --test fullbore ptx_that_is_shipped

drivers:
	@scripts/lavapipe.sh
	@scripts/cuda.sh

toolchain:
	@scripts/toolchain.sh

//! The integration tests of the workspace, one binary. Each module says what it needs.

/// Needs nothing: benches in their small form.
mod benches;
/// Needs nothing: random operations against a trivially correct model.
mod block_pool;
/// Needs nothing: every file of the fuzzers' corpora, as tests.
mod corpus;
/// Needs nothing: fast paths of the cpu backend against its plain twins.
mod cpu;
/// Needs a C++ compiler, NVRTC and `ptxas`: the CUDA backend on the host, and its kernels compiled for GPUs.
mod cuda;
/// Needs a C++ compiler: what calls the CUDA driver, against a double of it.
mod cuda_driver;
/// Ops on seeded inputs, for any backend.
mod device;
/// Needs nothing: what the doctor says of simulated devices.
mod doctor;
/// Needs nothing: what prompts are pooled to, on tiny models.
mod embeddings;
/// Needs nothing: readers and dequantisers against stored vectors, hostile files.
mod formats;
/// What is fuzzed.
#[path = "../fuzz/src/lib.rs"]
mod fuzzed;
/// GGUF files to be.
mod gguf_file;
/// Needs the two models and tiny ones: logits and greedy tokens against stored vectors.
mod golden;
/// Needs bash and Python: what `benches/gpu.sh` makes of what a GPU measured.
mod gpu_script;
/// Needs nothing: what compiles and what is refused in time, and engines on `sim` whose requests follow grammars.
mod grammar;
/// Needs nothing: the server on `sim` over real sockets.
mod http;
/// Needs nothing: what others are told of KV blocks against what is findable.
mod kv_events;
/// Needs nothing: what holds a simulated device back, provoked and named.
mod limits;
/// Needs Vulkan drivers: a device that is destroyed while it works, and comes back or does not.
mod loss;
/// Needs Vulkan drivers: KV blocks that go from one device to another.
mod moves;
/// Needs Vulkan drivers: every op on wgpu against the cpu twins.
mod ops;
/// Needs nothing: forecasts and fair shares on `sim`, in virtual time.
mod overload;
/// Needs Vulkan drivers: two steps in flight against one, on the cpu and on wgpu.
mod pipeline;
/// Needs nothing: traces, profiles and simulations, from the command line's words.
mod planner;
/// Seeded numbers.
mod random;
/// Needs Vulkan drivers: draws on the cpu and on wgpu against the exact distribution.
mod sampling;
/// Needs nothing: traces of steps, as expected text.
mod scheduler;
/// The form of results of benches, for the tests that have some.
mod schema;
/// Needs nothing: whole model files and folders, served, and damaged at random.
mod serving;
/// Needs Vulkan drivers: every shader variant validates, and does what its op says.
mod shaders;
/// Needs nothing: whole engines on `sim`, seeded, invariants after every step.
mod simulation;
/// Needs Vulkan drivers: layers over several devices against one.
mod split;
/// Needs Vulkan drivers: blocks that leave for the host's memory and come back, on every backend.
mod swap;
/// Needs the two models: tokenizers, detokenizer, templates.
mod text;
/// Needs nothing: the rules of the tree.
mod tidy;
/// Needs nothing: tiny models of every family against `transformers`; what a config.json is refused for.
mod tiny;
/// Needs `spirv-val`: every shader variant as SPIR-V, MSL and HLSL.
mod translate;
/// Needs Vulkan drivers: tables of matmul kernels, kept and taken at a start.
mod tuning;
/// Needs Vulkan drivers: what finds a device that computes wrongly, gives out or is too small.
mod verify;

//! Model files: readers of GGUF and of safetensors, and the block formats inside them.

pub mod quant;

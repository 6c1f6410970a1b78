//! Room in the host's memory for blocks of preempted sequences, and the copies between it and the KV cache.
//!
//! Invariant: a block keeps its bits. Which block lies where is the plan's to know; nothing here remembers any.

use crate::backend::{Backend, DeviceError, Place};
use crate::batch::{BlockCopy, CopyDirection};
use crate::model::{ModelConfig, StateLimits};
use crate::recording::{BufferCopy, Recording};
use crate::tensor::KvTensor;

/// As many blocks a layer as the limits say.
pub(super) struct SwapArena {
    /// One a layer, of the same shape as the cache but for the number of blocks.
    layers: Vec<KvTensor>,
}

impl SwapArena {
    /// `None` where none is asked for, or where the device has no host memory that it can copy to.
    pub fn alloc(
        config: &ModelConfig,
        limits: &StateLimits,
        cache: &[KvTensor],
        backend: &mut dyn Backend,
    ) -> Result<Option<SwapArena>, DeviceError> {
        if limits.num_host_blocks == 0 {
            return Ok(None);
        }
        let layer_bytes = SwapArena::size_bytes(config, limits) / u64::from(config.num_layers) / 2;
        let mut layers = Vec::with_capacity(cache.len());
        for (index, layer) in (0..).zip(cache) {
            backend.place(Place::Layer(index));
            let k = backend.alloc_host("swapped K", layer_bytes)?;
            let v = backend.alloc_host("swapped V", layer_bytes)?;
            let (Some(k), Some(v)) = (k, v) else { return Ok(None) };
            layers.push(KvTensor { k, v, num_blocks: limits.num_host_blocks, ..*layer });
        }
        Ok(Some(SwapArena { layers }))
    }

    /// Bytes that `alloc` takes of the host.
    pub fn size_bytes(config: &ModelConfig, limits: &StateLimits) -> u64 {
        let num_tokens = u64::from(limits.num_host_blocks) * u64::from(limits.block_size);
        num_tokens * config.kv_bytes_per_token(limits.kv_type)
    }

    pub fn num_blocks(&self) -> u32 {
        self.layers.first().map_or(0, |layer| layer.num_blocks)
    }

    /// Appends `copies`, in their order, for every layer of `cache`. Neighbours that stay neighbours go together.
    pub fn record(&self, copies: &[BlockCopy], cache: &[KvTensor], recording: &mut Recording) {
        for run in copies.chunk_by(|a, b| b.follows(a)) {
            for (device, host) in cache.iter().zip(&self.layers) {
                let at = |tensor: &KvTensor, block: u32| {
                    assert!(block + run.len() as u32 <= tensor.num_blocks, "{run:?} of {}", tensor.num_blocks);
                    u64::from(block) * tensor.size_of_block()
                };
                let (in_device, in_host) = (at(device, run[0].device_block), at(host, run[0].host_block));
                let size_bytes = run.len() as u64 * device.size_of_block();
                for (of_device, of_host) in [(device.k, host.k), (device.v, host.v)] {
                    recording.copy(match run[0].direction {
                        CopyDirection::ToHost => BufferCopy {
                            from: of_device,
                            from_bytes: in_device,
                            to: of_host,
                            to_bytes: in_host,
                            size_bytes,
                        },
                        CopyDirection::ToDevice => BufferCopy {
                            from: of_host,
                            from_bytes: in_host,
                            to: of_device,
                            to_bytes: in_device,
                            size_bytes,
                        },
                    });
                }
            }
        }
    }
}

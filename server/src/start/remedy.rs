//! What to do where memory is missing. Invariant: what a sentence says would do is enough, as far as the plan is right.

use fullbore_engine::backend::{DeviceError, LoadError};
use fullbore_engine::memory::capacity::{MemoryTable, human_bytes};

use super::StartError;

/// Flags that free `missing` bytes of what is planned. `has_floats` where weights could be packed.
pub fn remedy(memory: &MemoryTable, missing: u64, has_floats: bool) -> String {
    let least_kv = memory.kv / u64::from(memory.num_blocks.max(1));
    match memory.kv.checked_sub(missing).filter(|&left| left >= least_kv) {
        Some(left) => format!(
            "give --kv-memory {} or less (it is {} now), which --max-model-len has to fit, or a lower \
             --memory-fraction",
            whole_mebibytes(left),
            human_bytes(memory.kv)
        ),
        None if has_floats => format!(
            "that is more than the KV cache takes: pack the {} of weights with --quantize q8_0 or q4_0, choose a \
             smaller model, or lower --max-num-batched-tokens and --max-num-seqs",
            human_bytes(memory.weights)
        ),
        None => format!(
            "that is more than the KV cache takes: choose a smaller model, or a file of it that is packed more tightly \
             (the weights take {}), or lower --max-num-batched-tokens and --max-num-seqs",
            human_bytes(memory.weights)
        ),
    }
}

/// The error that loading ended with; where the device had too little memory, with what is missing of the plan.
pub fn out_of_memory(error: StartError, memory: &MemoryTable, has_floats: bool) -> StartError {
    match error {
        StartError::Load(LoadError::Device(DeviceError::OutOfMemory { device, what, needed_bytes, taken_bytes }))
        | StartError::Lost(DeviceError::OutOfMemory { device, what, needed_bytes, taken_bytes }) => {
            // What comes after it in the plan would find no room either.
            let missing = memory.total().saturating_sub(taken_bytes).max(needed_bytes);
            StartError::OutOfMemory {
                device,
                what,
                needed: needed_bytes,
                taken: taken_bytes,
                missing,
                planned: memory.total(),
                remedy: remedy(memory, missing, has_floats),
            }
        }
        error => error,
    }
}

/// As the command line takes it, rounded down.
fn whole_mebibytes(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{}KiB", bytes >> 10),
        mebibytes => format!("{mebibytes}MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fullbore_engine::tensor::KvType;

    fn table() -> MemoryTable {
        MemoryTable {
            weights: 3 << 30,
            kv: 1 << 30,
            scratch: 100 << 20,
            tables: 10 << 20,
            kv_type: KvType::F16,
            swap: 0,
            num_blocks: 1024,
            num_host_blocks: 0,
            block_size: 32,
            kv_bytes_per_token: 32 << 10,
        }
    }

    #[test]
    fn what_the_cache_can_spare_is_a_number_and_what_it_cannot_is_weights() {
        let cache = remedy(&table(), 300 << 20, true);
        assert!(cache.contains("--kv-memory 724MiB or less (it is 1.0 GiB now)"), "{cache}");
        assert!(cache.contains("--max-model-len") && cache.contains("--memory-fraction"), "{cache}");
        let floats = remedy(&table(), 1 << 30, true);
        assert!(floats.contains("pack the 3.0 GiB of weights with --quantize q8_0 or q4_0"), "{floats}");
        let packed = remedy(&table(), 2 << 30, false);
        assert!(!packed.contains("--quantize") && packed.contains("a smaller model"), "{packed}");
        // All but one block may go.
        assert!(remedy(&table(), (1 << 30) - (1 << 20), false).contains("--kv-memory 1MiB"));
    }

    #[test]
    fn other_errors_stay_what_they_are() {
        let lost = || DeviceError::Lost { device: "d".to_owned(), reason: "unplugged".to_owned() };
        let error = out_of_memory(StartError::Lost(lost()), &table(), true);
        assert_eq!(error.to_string(), lost().to_string());
    }
}

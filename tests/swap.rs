//! Blocks that leave for the host's memory and come back elsewhere, on every backend, driver and tier: what the model
//! computes then is what it computes where they stayed, bit for bit. Needs Vulkan drivers: fails without one.

use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
use fullbore_engine::backend::sim::{SimBackend, SimOptions};
use fullbore_engine::backend::wgpu::{WgpuBackend, WgpuOptions, devices};
use fullbore_engine::backend::{Backend, Ticket};
use fullbore_engine::batch::CopyDirection::{ToDevice, ToHost};
use fullbore_engine::batch::{
    Batch, BlockCopy, CopyDirection, InputToken, Logits, PackedBatch, SequenceId, Slice, SlotId,
};
use fullbore_engine::model::{Checkpoint, Inputs, Model, ModelConfig, StateLimits};
use fullbore_engine::request::{MAX_LOGPROBS, Request, TokenId};
use fullbore_engine::sampling;
use fullbore_engine::tensor::{KvType, WeightFormat};
use fullbore_shaders::Tier;

const VOCAB_SIZE: u32 = 64;
const BLOCK_SIZE: u32 = 16;
const PROMPT_LEN: u32 = 40;

/// Where the blocks of the first sequence lie, at first and when it goes on, and those of the second.
struct Places {
    first: [u32; 3],
    later: [u32; 3],
    second: [u32; 3],
}

/// Each has room of its own.
const APART: Places = Places { first: [2, 0, 5], later: [2, 0, 5], second: [1, 3, 4] };
/// The second takes the blocks of the first, which comes back into others.
const SWAPPED: Places = Places { first: [2, 0, 5], later: [3, 4, 1], second: [0, 5, 2] };

/// Pairs of a device block and a host block. The first leaves while the second is computed into its blocks.
const OUT: [(u32, u32); 3] = [(2, 2), (0, 3), (5, 0)];
/// Two of the three go together, and the row that follows writes into the last.
const BACK: [(u32, u32); 3] = [(3, 2), (4, 3), (1, 0)];

fn copies(direction: CopyDirection, pairs: &[(u32, u32)]) -> Vec<BlockCopy> {
    pairs.iter().map(|&(device_block, host_block)| BlockCopy { direction, device_block, host_block }).collect()
}

#[test]
fn what_comes_back_from_the_host_is_what_left() {
    for kv_type in KvType::ALL {
        check("sim", kv_type, || Box::new(SimBackend::new(SimOptions::default())));
        check("cpu", kv_type, || Box::new(CpuBackend::new(CpuOptions::default()).expect("threads can be started")));
    }
    check("cuda on the host", KvType::F16, || crate::cuda::on_host(false));
    let found = devices();
    assert!(!found.is_empty(), "no Vulkan driver: run `make test`, which fetches lavapipe");
    for device in &found {
        for (tier, kv_type) in Tier::ALL.into_iter().zip(KvType::ALL) {
            let options =
                WgpuOptions { selector: device.id.clone(), tier: Some(tier), checked: true, ..WgpuOptions::default() };
            let open = || -> Box<dyn Backend> { Box::new(WgpuBackend::open(&options).expect("a listed device opens")) };
            check(&format!("{} {}", device.driver, tier.name()), kv_type, open);
        }
    }
}

fn check(name: &str, kv_type: KvType, open: impl Fn() -> Box<dyn Backend>) {
    let expected = run(open(), kv_type, &APART, &[], &[]);
    let (out, back) = (copies(ToHost, &OUT), copies(ToDevice, &BACK));
    let swapped = run(open(), kv_type, &SWAPPED, &out, &back);
    assert!(swapped == expected, "{name}, {}: swapped rows differ", kv_type.name());
    // And without either copy it would be seen.
    for (out, back) in [(&[][..], &back[..]), (&out[..], &[][..])] {
        assert!(
            run(open(), kv_type, &SWAPPED, out, back) != expected,
            "{name}: nothing was copied, and nothing differs"
        );
    }
}

/// Three steps: the first prompt; the second prompt after `out`; one token of each after `back`. Returns the choices of
/// the last two and their likeliest tokens' logprobs, which are in flight together.
fn run(
    mut backend: Box<dyn Backend>,
    kv_type: KvType,
    places: &Places,
    out: &[BlockCopy],
    back: &[BlockCopy],
) -> Vec<u8> {
    let limits = StateLimits {
        max_num_seqs: 2,
        max_num_batched_tokens: PROMPT_LEN,
        max_logit_rows: 2,
        max_model_len: 64,
        kv_type,
        block_size: BLOCK_SIZE,
        num_blocks: 6,
        num_host_blocks: 4,
    };
    let checkpoint = Checkpoint::Random { seed: 5, format: WeightFormat::F32 };
    let config = ModelConfig { num_heads: 4, num_kv_heads: 2, ..ModelConfig::tiny(VOCAB_SIZE, 2) };
    let model = Model::load(config, limits, &checkpoint, backend.as_mut(), &mut |_| {}).expect("a small model");
    assert_eq!(model.num_host_blocks(), 4);
    let (first, second) = (SlotId(0), SlotId(1));
    let prompt = Batch::default().with_rows(first, 0..PROMPT_LEN, &places.first, true);
    let other = Batch { copies: out.to_vec(), ..Batch::default() };
    let other = other.with_rows(second, 0..PROMPT_LEN, &places.second, true);
    let decode = Batch { copies: back.to_vec(), ..Batch::default() };
    let decode = decode.with_rows(first, PROMPT_LEN..PROMPT_LEN + 1, &places.later, true);
    let decode = decode.with_rows(second, PROMPT_LEN..PROMPT_LEN + 1, &places.second, false);

    let mut choices = Vec::new();
    let ticket = submit(&prompt, &model, backend.as_mut());
    backend.wait(ticket, &mut Vec::new()).expect("the device is there");
    let tickets = [submit(&other, &model, backend.as_mut()), submit(&decode, &model, backend.as_mut())];
    for ticket in tickets {
        backend.wait(ticket, &mut choices).expect("the device is there");
    }
    choices
}

trait Rows {
    /// Appends tokens of a sequence at `positions`, and its blocks to the table if it is new there.
    fn with_rows(self, slot: SlotId, positions: std::ops::Range<u32>, blocks: &[u32; 3], new: bool) -> Batch;
}

impl Rows for Batch {
    fn with_rows(mut self, slot: SlotId, positions: std::ops::Range<u32>, blocks: &[u32; 3], new: bool) -> Batch {
        let first = self.num_tokens();
        for position in positions.clone() {
            self.input.push(InputToken::Id(TokenId((position * 7 + slot.0 * 5 + 1) % VOCAB_SIZE)));
            let block = blocks[(position / BLOCK_SIZE) as usize];
            self.slot_mapping.push(block * BLOCK_SIZE + position % BLOCK_SIZE);
        }
        if new {
            self.table_updates.extend(blocks.iter().zip(0..).map(|(&block, index)| (slot, index, block)));
        }
        self.slices.push(Slice {
            sequence: SequenceId(u64::from(slot.0)),
            slot,
            start: positions.start,
            tokens: first..self.num_tokens(),
            logits: Logits::Last,
            sample: true,
            logprobs: Some(MAX_LOGPROBS),
            num_targets: 0,
            prompt_logprobs: 0,
            pooled: false,
        });
        self
    }
}

fn submit(batch: &Batch, model: &Model, backend: &mut dyn Backend) -> Ticket {
    let mut packed = PackedBatch::default();
    packed.pack(batch, model.limits.max_blocks_per_seq(), &model.attention);
    let greedy = Request::default();
    sampling::pack(batch, |_| Some(&greedy), |_| None, &mut packed);
    let mut recording = model.recording();
    let inputs = Inputs::upload(&packed, &mut recording);
    model.record_copies(&batch.copies, &mut recording);
    let choices = model.record(&inputs, &mut recording).expect("every slice asks for logits");
    sampling::downloads(batch, choices, &mut recording.downloads);
    backend.submit(&recording).expect("the device is there")
}

#[test]
fn neighbours_are_copied_together_and_order_is_kept() {
    let mut backend = SimBackend::new(SimOptions::default());
    let limits = StateLimits {
        max_num_seqs: 1,
        max_num_batched_tokens: 8,
        max_logit_rows: 1,
        max_model_len: 32,
        kv_type: KvType::Q8_0,
        block_size: 4,
        num_blocks: 8,
        num_host_blocks: 8,
    };
    let checkpoint = Checkpoint::Random { seed: 5, format: WeightFormat::F32 };
    let config = ModelConfig::tiny(VOCAB_SIZE, 3);
    let block_bytes = 4 * u64::from(KvType::Q8_0.head_words(config.head_dim)) * 4;
    let model = Model::load(config, limits, &checkpoint, &mut backend, &mut |_| {}).expect("a small model");
    let mut recording = model.recording();
    let to_host = copies(ToHost, &[(4, 2), (5, 3), (6, 4), (7, 6), (3, 7)]);
    let back = copies(ToDevice, &[(4, 7), (5, 0)]);
    model.record_copies(&[to_host, back].concat(), &mut recording);
    let of_first_k: Vec<_> = recording.copies.iter().step_by(2 * 3).collect();
    let sizes: Vec<u64> = of_first_k.iter().map(|copy| copy.size_bytes / block_bytes).collect();
    let places: Vec<_> =
        of_first_k.iter().map(|copy| (copy.from_bytes / block_bytes, copy.to_bytes / block_bytes)).collect();
    assert_eq!(sizes, [3, 1, 1, 1, 1]);
    assert_eq!(places, [(4, 2), (7, 6), (3, 7), (7, 4), (0, 5)]);
    assert_eq!(recording.copies.len(), 5 * 2 * 3, "K and V of three layers each");
    // K and V of every layer are buffers of their own, and each goes to the one that belongs to it.
    let pairs: std::collections::HashSet<_> = recording.copies[..6].iter().map(|copy| (copy.from, copy.to)).collect();
    let reversed = recording.copies[24..].iter().map(|copy| (copy.to, copy.from));
    assert_eq!(pairs, reversed.collect());
}

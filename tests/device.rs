//! A device under test: ops on seeded inputs, the same for every backend, and what each writes.

use fullbore_engine::backend::{Backend, RowSource};
use fullbore_engine::batch::attention::{AttentionLimits, AttentionPlan, QueryRows};
use fullbore_engine::model::Checkpoint;
use fullbore_engine::op::*;
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, KvTensor, KvType, Tensor, Weight, WeightFormat};

use crate::random::Random;

pub struct Device {
    pub backend: Box<dyn Backend>,
    upload: BufferId,
}

impl Device {
    pub fn new(mut backend: Box<dyn Backend>) -> Device {
        let upload = backend.alloc("upload", 1 << 16).expect("64 KiB");
        Device { backend, upload }
    }

    pub fn f32(&mut self, rows: u32, cols: u32, values: &[f32]) -> Tensor {
        self.tensor(Tensor::f32(BufferId(0), rows, cols), bytemuck::cast_slice(values))
    }

    pub fn u32(&mut self, rows: u32, cols: u32, values: &[u32]) -> Tensor {
        self.tensor(Tensor::u32(BufferId(0), rows, cols), bytemuck::cast_slice(values))
    }

    /// Starts as NaN, so that an element that an op does not write is seen.
    pub fn unwritten(&mut self, rows: u32, cols: u32) -> Tensor {
        self.f32(rows, cols, &vec![f32::NAN; (rows * cols) as usize])
    }

    pub fn random(&mut self, rows: u32, cols: u32, random: &mut Random) -> Tensor {
        self.f32(rows, cols, &random.floats((rows * cols) as usize))
    }

    pub fn weight(&mut self, format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Weight {
        let checkpoint = Checkpoint::Random { seed, format };
        let (format, mut source) = checkpoint.open("weight", rows, cols).expect("random rows never fail");
        let spec = fullbore_engine::backend::WeightSpec { name: "weight".to_owned(), rows, cols, format };
        self.backend.load_weight(&spec, source.as_mut()).expect("the weight fits")
    }

    /// Runs `ops` and reads tensors back as words.
    pub fn run(&mut self, ops: &[Op], downloads: &[Tensor]) -> Vec<u32> {
        let mut recording = Recording::new(self.upload);
        ops.iter().for_each(|op| recording.push(*op));
        recording.downloads.extend_from_slice(downloads);
        let ticket = self.backend.submit(&recording).expect("the device is there");
        let mut bytes = Vec::new();
        self.backend.wait(ticket, &mut bytes).expect("the device is there");
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
    }

    pub fn run_f32(&mut self, ops: &[Op], out: Tensor) -> Vec<f32> {
        self.run(ops, &[out]).into_iter().map(f32::from_bits).collect()
    }

    fn tensor(&mut self, shape: Tensor, data: &[u8]) -> Tensor {
        let buffer = self.backend.alloc("test", shape.size_bytes()).expect("a small buffer");
        self.backend.write(buffer, 0, data).expect("a small write");
        Tensor { buffer, ..shape }
    }
}

/// The rows of a seeded weight as numbers, through the file format's own reference.
pub fn weight_values(format: WeightFormat, rows: u32, cols: u32, seed: u64) -> Vec<Vec<f32>> {
    let (_, mut source) = Checkpoint::Random { seed, format }.open("weight", rows, cols).expect("never fails");
    let mut row = || {
        let mut bytes = vec![0; format.row_bytes(cols) as usize];
        RowSource::read_rows(source.as_mut(), &mut bytes).expect("never fails");
        let mut values = vec![0.0; cols as usize];
        fullbore_engine::format::quant::dequantize_row(format, &bytes, &mut values);
        values
    };
    (0..rows).map(|_| row()).collect()
}

/// What an op wrote, and how near another device must come.
pub struct Output {
    pub name: String,
    pub words: Vec<u32>,
    /// Largest difference over the largest magnitude; 0 for integers.
    pub tolerance: f32,
}

impl Output {
    /// Asserts that `self`, of the device called `device`, is `expected` within tolerance.
    pub fn assert_near(&self, expected: &Output, device: &str) {
        let name = format!("{} on {device}", self.name);
        assert_eq!(self.words.len(), expected.words.len(), "{name}");
        if expected.tolerance == 0.0 {
            assert_eq!(self.words, expected.words, "{name}");
            return;
        }
        let values = |output: &Output| output.words.iter().map(|&word| f32::from_bits(word)).collect::<Vec<f32>>();
        let (actual, wanted) = (values(self), values(expected));
        let largest = wanted.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        for (index, (actual, wanted)) in actual.iter().zip(&wanted).enumerate() {
            let near = (actual - wanted).abs() <= expected.tolerance * largest;
            assert!(near, "{name}: element {index} is {actual}, not {wanted}");
        }
    }
}

/// Every op on inputs that reach its branches; the same seeds, whatever the device.
pub fn run_every_op(device: &mut Device) -> Vec<Output> {
    let mut outputs = Vec::new();
    tables(device, &mut outputs);
    embeds(device, &mut outputs);
    rows_and_elements(device, &mut outputs);
    mat_muls(device, &mut outputs);
    ropes(device, &mut outputs);
    KvType::ALL.into_iter().for_each(|kv_type| attentions(device, kv_type, &mut outputs));
    stores(device, &mut outputs);
    [37, 1000, 9001].into_iter().for_each(|vocab| outputs.extend(samples(device, vocab)));
    outputs
}

fn tables(device: &mut Device, outputs: &mut Vec<Output>) {
    let table = device.u32(3, 5, &(0..15).collect::<Vec<u32>>());
    let entries = device.u32(4, 2, &[0, 100, 7, 101, 14, 102, 3, 103]);
    let words = device.run(&[Op::UpdateTable(UpdateTable { entries, table })], &[table]);
    outputs.push(Output { name: "update_table".to_owned(), words, tolerance: 0.0 });
}

fn embeds(device: &mut Device, outputs: &mut Vec<Output>) {
    for format in WeightFormat::ALL {
        let table = device.weight(format, 70, 512, 1);
        let ids = device.u32(6, 1, &[0, 69, SAMPLED_BY_SLOT | 2, 33, SAMPLED_BY_SLOT, SAMPLED_BY_SLOT | 3]);
        // What a broken row sampled stands for any token.
        let sampled = device.u32(4, 1, &[64, 5, 31, NON_FINITE]);
        let out = device.unwritten(6, 512);
        let words = device.run(&[Op::Embed(Embed { ids, sampled, table, scale: 1.5, out })], &[out]);
        outputs.push(Output { name: format!("embed {}", format.name()), words, tolerance: 1e-6 });
    }
}

fn rows_and_elements(device: &mut Device, outputs: &mut Vec<Output>) {
    let random = &mut Random::new(2);
    for (rows, cols) in [(1, 64), (3, 100), (17, 576), (70, 640)] {
        let x = device.random(rows, cols, random);
        let y = device.random(rows, cols, random);
        let weight = device.random(1, cols, random);
        let mut push = |name: &str, words| {
            outputs.push(Output { name: format!("{name} {rows} x {cols}"), words, tolerance: 1e-5 });
        };
        let out = device.unwritten(rows, cols);
        push("rms_norm", device.run(&[Op::RmsNorm(RmsNorm { x, weight, eps: 1e-5, out })], &[out]));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let out = device.unwritten(rows, cols);
            let op = Op::GatedAct(GatedAct { gate: x, up: y, activation, out });
            push("gated_act", device.run(&[op], &[out]));
        }
        let picks: Vec<u32> = (0..4).map(|i| (i * 7 + rows - 1) % rows).collect();
        let picks = device.u32(4, 1, &picks);
        let out = device.unwritten(4, cols);
        push("gather_rows", device.run(&[Op::GatherRows(GatherRows { x, rows: picks, out })], &[out]));
        push("add", device.run(&[Op::Add(Add { x, y })], &[x]));
    }
}

fn mat_muls(device: &mut Device, outputs: &mut Vec<Output>) {
    let random = &mut Random::new(3);
    let quantised = WeightFormat::ALL
        .into_iter()
        .flat_map(|format| [(format, 1, 64, 256), (format, 5, 100, 512), (format, 16, 96, 256), (format, 37, 33, 768)]);
    let plain = [(WeightFormat::F32, 3, 40, 68), (WeightFormat::F16, 3, 40, 68), (WeightFormat::Q8_0, 9, 48, 576)];
    for (format, m, n, k) in quantised.chain(plain) {
        let weight = device.weight(format, n, k, 4);
        let x = device.random(m, k, random);
        let bias = device.random(1, n, random);
        let out = device.unwritten(m, n);
        let bias = (m % 2 == 1).then_some(bias);
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias, out })], &[out]);
        let name = format!("mat_mul {} M {m} N {n} K {k}", format.name());
        outputs.push(Output { name, words, tolerance: 1e-5 });
    }
}

fn ropes(device: &mut Device, outputs: &mut Vec<Output>) {
    let random = &mut Random::new(5);
    for (style, head_dim, rotary_dim) in
        [(RopeStyle::Interleaved, 64, 64), (RopeStyle::Halves, 256, 256), (RopeStyle::Halves, 16, 8)]
    {
        let x = device.random(9, 3 * head_dim, random);
        let table = device.random(50, rotary_dim, random);
        let positions = device.u32(9, 1, &[0, 1, 2, 49, 3, 17, 17, 8, 30]);
        let words = device.run(&[Op::Rope(Rope { x, head_dim, positions, table, style })], &[x]);
        outputs.push(Output { name: format!("rope {style:?} {head_dim}"), words, tolerance: 1e-6 });
    }
}

/// What an attention op reads of a plan.
pub struct Planned {
    pub items: Tensor,
    pub num_single_rows: u32,
    pub merges: Tensor,
    pub partials: Tensor,
}

impl Planned {
    /// `tensor` makes one of some words in rows of so many.
    pub fn new(
        rows: &[QueryRows],
        window: u32,
        cache: KvTensor,
        num_heads: u32,
        num_partials: u32,
        mut tensor: impl FnMut(&[u32], u32) -> Tensor,
    ) -> Planned {
        let mut plan = AttentionPlan::default();
        let limits = AttentionLimits { windows: vec![window], num_kv_heads: cache.num_kv_heads, num_partials };
        plan.fill(rows.iter().copied(), window, &limits);
        let merges = [&plan.merges[..], &[0; ATTENTION_MERGE_WORDS as usize]].concat();
        let merges =
            tensor(&merges, ATTENTION_MERGE_WORDS).first_rows(plan.merges.len() as u32 / ATTENTION_MERGE_WORDS);
        let cols = Attention::partial_cols(num_heads, cache.head_dim);
        let partials = tensor(&vec![f32::NAN.to_bits(); (num_partials.max(1) * cols) as usize], cols);
        Planned {
            items: tensor(&plan.items, ATTENTION_ITEM_WORDS),
            num_single_rows: plan.num_single_rows,
            merges,
            partials: Tensor::f32(partials.buffer, partials.rows, cols),
        }
    }
}

/// Sequences that have grown in a shuffled cache, with the items of a mixed step, some of them split.
fn attentions(device: &mut Device, kv_type: KvType, outputs: &mut Vec<Output>) {
    // Every shape that differs is a kernel to compile: not all with all types.
    let (f16, quantised) = (kv_type == KvType::F16, kv_type != KvType::F16);
    let shapes = [
        (true, 64, 3, 3, 32, 0, 90, 0.0),
        (true, 64, 3, 3, 16, 20, 90, 0.5),
        (f16, 256, 1, 4, 8, 40, 90, 0.0),
        (f16, 16, 2, 2, 5, 0, 90, 0.0),
        (f16, 100, 1, 2, 8, 0, 300, 0.0),
        (f16, 128, 1, 7, 32, 0, 700, 0.0),
        (quantised, 96, 2, 5, 5, 0, 90, 30.0),
        (quantised, 32, 1, 16, 16, 300, 700, 0.0),
    ];
    for (_, head_dim, num_kv_heads, group, block_size, window, num_positions, soft_cap) in
        shapes.into_iter().filter(|(takes_part, ..)| *takes_part)
    {
        let random = &mut Random::new(6);
        let num_blocks = 3 * u32::div_ceil(num_positions, block_size);
        let cache = kv_cache(device, kv_type, num_blocks, block_size, num_kv_heads, head_dim);
        let mut blocks: Vec<u32> = (0..num_blocks).collect();
        for index in 0..blocks.len() {
            blocks.swap(index, random.below(num_blocks) as usize);
        }
        let table_cols = u32::div_ceil(num_positions, block_size);
        let table = device.u32(3, table_cols, &blocks);
        let slot = |row: u32, position: u32| {
            blocks[(row * table_cols + position / block_size) as usize] * block_size + position % block_size
        };
        let tokens: Vec<u32> =
            (0..3).flat_map(|row| (0..num_positions).map(move |p| (row, p))).map(|(r, p)| slot(r, p)).collect();
        let num_tokens = tokens.len() as u32;
        let (k, v) = (
            device.random(num_tokens, num_kv_heads * head_dim, random),
            device.random(num_tokens, num_kv_heads * head_dim, random),
        );
        let slots = device.u32(num_tokens, 1, &tokens);
        // A decode at the end, a chunk across a tile or a cut, the begin of a prompt, and another decode.
        let chunk = if num_positions > 260 { 252 } else { 28 };
        let rows = [(0, 1, 2, num_positions - 1), (1, 8, 0, chunk), (9, 3, 1, 0), (12, 1, 1, 40)];
        let rows = rows.map(|(first_row, num_rows, slot, position)| QueryRows { first_row, num_rows, slot, position });
        let num_heads = num_kv_heads * group;
        let Planned { items, num_single_rows, merges, partials } =
            Planned::new(&rows, window, cache, num_heads, 8, |words, cols| {
                device.u32(words.len() as u32 / cols, cols, words)
            });
        assert_eq!(merges.rows, u32::from(num_positions > ATTENTION_CUT));
        let q = device.random(13, num_heads * head_dim, random);
        let out = device.unwritten(13, num_heads * head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let attention = Attention {
            q,
            cache,
            items,
            num_single_rows,
            merges,
            partials,
            table,
            num_heads,
            scale,
            soft_cap,
            window,
            out,
        };
        let ops = [Op::StoreKv(StoreKv { k, v, slots, cache }), Op::Attention(attention)];
        let words = device.run(&ops, &[out]);
        let shape = format!("head {head_dim}, {num_kv_heads} x {group}, block {block_size}, window {window}");
        let name = format!("attention {} {shape}, {num_positions} positions", kv_type.name());
        outputs.push(Output { name, words, tolerance: 2e-5 });
    }
}

/// What lies in a cache, bit for bit, after values of every magnitude and kind.
fn stores(device: &mut Device, outputs: &mut Vec<Output>) {
    for (kv_type, head_dim) in
        [(KvType::F16, 20), (KvType::Q8_0, 64), (KvType::Q8_0, 96), (KvType::Q4_0, 64), (KvType::Q4_0, 96)]
    {
        let random = &mut Random::new(9);
        let cache = kv_cache(device, kv_type, 3, 8, 2, head_dim);
        // The last token first, into a block of others; each group of a token has a power of its own.
        let slots: Vec<u32> = (0..20).map(|token| (token * 7 + 3) % 24).collect();
        let cols = 2 * head_dim;
        let mut values = |first: usize| {
            let mut values = random.floats(20 * cols as usize);
            for (group, values) in values.chunks_mut(32).enumerate() {
                let power = ((first + group) % 50) as i32 * 2 - 60;
                values.iter_mut().for_each(|value| *value *= 2f32.powi(power));
            }
            values[first] = 0.0;
            values[64 + first..64 + first + 32].fill(-0.0);
            values[128 + first] = f32::INFINITY;
            values[200 + first] = -3e38;
            values[300 + first] = f32::MIN_POSITIVE / 8.0;
            values
        };
        let (k, v) = (values(0), values(11));
        let (k, v) = (device.f32(20, cols, &k), device.f32(20, cols, &v));
        let slots = device.u32(20, 1, &slots);
        let size = 24 * 2 * cache.head_words();
        let words = device.run(
            &[Op::StoreKv(StoreKv { k, v, slots, cache })],
            &[Tensor::u32(cache.k, 1, size), Tensor::u32(cache.v, 1, size)],
        );
        outputs.push(Output { name: format!("store_kv {} head {head_dim}", kv_type.name()), words, tolerance: 0.0 });
    }
}

pub fn kv_cache(
    device: &mut Device,
    kv_type: KvType,
    num_blocks: u32,
    block_size: u32,
    num_kv_heads: u32,
    head_dim: u32,
) -> KvTensor {
    let size_bytes = u64::from(num_blocks) * KvTensor::block_bytes(kv_type, block_size, num_kv_heads, head_dim);
    let mut alloc = |label| device.backend.alloc(label, size_bytes).expect("a small cache");
    KvTensor { k: alloc("k"), v: alloc("v"), kv_type, num_blocks, block_size, num_kv_heads, head_dim }
}

/// An `Op::Sample` over `rows`, with fresh state: a slot for each that is named.
pub fn sampling(device: &mut Device, logits: &[f32], vocab: u32, rows: &[SampleRow], extras: &[u32]) -> Sample {
    let num_rows = rows.len() as u32;
    let num_slots = rows.iter().map(|row| row.slot.wrapping_add(1)).max().unwrap_or(0).max(1);
    let mut filled = |rows, cols, with| device.u32(rows, cols, &vec![with; (rows * cols) as usize]);
    let (counts, slices) = (filled(num_slots, vocab, 0), filled(num_rows, slice_cols(vocab), 66));
    let (sampled, chosen) = (filled(num_slots, 1, 77), filled(num_rows, CHOSEN_WORDS, 88));
    let top = filled(num_rows, 2 * MAX_TOP, 99);
    let logits = device.f32(num_rows, vocab, logits);
    let rows = device.u32(num_rows, SAMPLE_ROW_WORDS, bytemuck::cast_slice(rows));
    // A buffer has at least one word.
    let extras = [extras, &[0]].concat();
    let extras = device.u32(extras.len() as u32, 1, &extras);
    Sample { logits, rows, extras, counts, slices, sampled, chosen, top }
}

/// Rows of every kind in one op: each filter and each adjustment alone and together, ties, masks, broken rows.
pub fn samples(device: &mut Device, vocab: u32) -> Vec<Output> {
    let random = &mut Random::new(7);
    let (rows, mut logits, extras) = sample_rows(vocab, random);
    for (index, value) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NEG_INFINITY)] {
        logits[index * vocab as usize + vocab as usize - 1 - index] = value;
    }
    (3..5).for_each(|at| logits[3 * vocab as usize + at] = 50.0);
    logits[4 * vocab as usize..5 * vocab as usize].fill(-3.0);
    let op = sampling(device, &logits, vocab, &rows, &extras);
    let Sample { counts, sampled, chosen, top, .. } = op;
    let num_slots = counts.rows;
    let resets: Vec<u32> = (0..num_slots).flat_map(|slot| [slot, slot % 4, 4 + slot % 3, 14]).collect();
    let resets = device.u32(num_slots, 4, &resets);
    let tokens: Vec<u32> = (0..14).map(|i| [3, 8, 3, i, 30][i as usize % 5] % vocab).collect();
    let tokens = device.u32(14, 1, &tokens);
    // Counts that were there before are cleared.
    let dirt = device.u32(3, 2, &[5, 9, vocab + 3, IN_PROMPT | 7, 2 * vocab, 1]);
    let ops = [
        Op::UpdateTable(UpdateTable { entries: dirt, table: counts }),
        Op::ResetCounts(ResetCounts { resets, tokens, counts }),
        Op::Sample(op),
    ];
    let words = device.run(&ops, &[counts, sampled, chosen, top]);
    let (counts, words) = words.split_at((num_slots * vocab) as usize);
    let (sampled, words) = words.split_at(num_slots as usize);
    let (chosen, top) = words.split_at(chosen.num_elements() as usize);
    let ids_and_ranks = chosen.chunks_exact(4).flat_map(|row| [row[0], row[2], row[3]]).collect();
    let written = |row: &usize| rows[*row].logprobs > 0 && chosen[4 * row] != NON_FINITE;
    let logprobs = (0..rows.len()).filter(written).map(|row| chosen[4 * row + 1]).collect();
    let tops: Vec<(u32, u32)> = top.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let top_ids = tops.iter().map(|(id, _)| *id).collect();
    let top_logprobs = tops.iter().filter(|(id, logprob)| (*id, *logprob) != (99, 99)).map(|(_, bits)| *bits).collect();
    let outputs: [(&str, Vec<u32>, f32); 6] = [
        ("counts", counts.to_vec(), 0.0),
        ("sampled", sampled.to_vec(), 0.0),
        ("ids and ranks", ids_and_ranks, 0.0),
        ("logprobs", logprobs, 1e-6),
        ("top ids", top_ids, 0.0),
        ("top logprobs", top_logprobs, 1e-6),
    ];
    let output = |(name, words, tolerance)| Output { name: format!("sample of {vocab}: {name}"), words, tolerance };
    outputs.into_iter().map(output).collect()
}

/// Five rows that the caller spoils, an idle one, and rows with one, two or all parameters drawn at random.
fn sample_rows(vocab: u32, random: &mut Random) -> (Vec<SampleRow>, Vec<f32>, Vec<u32>) {
    let mut rows = Vec::new();
    let mut extras = vec![u32::MAX; 3];
    let greedy = SampleRow { logprobs: 1, ..SampleRow::IDLE };
    rows.extend([greedy; 5]);
    for index in 0..40 {
        let mut row = SampleRow { position: random.below(5000), logprobs: random.below(22), ..SampleRow::IDLE };
        row.seed = [random.next() as u32, random.below(3)];
        // Each bit switches one parameter on.
        let on = if index < 10 { 1 << index } else { random.next() as u32 & 1023 };
        let is_on = |bit: u32| on >> bit & 1 == 1;
        let draws = (0..4).any(is_on) || random.one_in(2);
        row.temperature = if draws { [0.3, 1.0, 1.7][random.below(3) as usize] } else { 0.0 };
        row.top_k = if is_on(1) { 1 + random.below(40) } else { 0 };
        row.top_p = if is_on(2) { 0.3 + 0.65 * random.unit().abs() } else { 1.0 };
        row.min_p = if is_on(3) { 0.02 + 0.3 * random.unit().abs() } else { 0.0 };
        row.presence = if is_on(4) { 1.5 * random.unit() } else { 0.0 };
        row.frequency = if is_on(5) { random.unit() } else { 0.0 };
        row.repetition = if is_on(6) { 1.0 + 0.6 * random.unit() } else { 1.0 };
        if is_on(7) {
            let mut tokens: Vec<u32> = (0..1 + random.below(30)).map(|_| random.below(vocab)).collect();
            tokens.sort_unstable();
            tokens.dedup();
            (row.bias_at, row.num_biases) = (extras.len() as u32, tokens.len() as u32);
            extras.extend(tokens.iter().flat_map(|token| [*token, (6.0 * random.unit()).to_bits()]));
        }
        if is_on(8) {
            row.mask_at = extras.len() as u32;
            extras.extend((0..vocab.div_ceil(32)).map(|_| random.next() as u32 & random.next() as u32));
        }
        if is_on(9) && index % 3 == 0 {
            row = SampleRow { target: random.below(vocab), logprobs: 1 + random.below(21), ..SampleRow::IDLE };
        }
        rows.push(row);
    }
    rows.push(SampleRow::IDLE);
    // A mask that allows nothing.
    rows.push(SampleRow { mask_at: extras.len() as u32, temperature: 1.0, top_p: 0.5, logprobs: 3, ..SampleRow::IDLE });
    extras.extend(vec![0; vocab.div_ceil(32) as usize]);
    // Slots from the last down; the first is nobody's.
    let choosing: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].target == NONE && *row != 45).collect();
    for (nth, row) in choosing.iter().enumerate() {
        rows[*row].slot = (choosing.len() - nth) as u32;
    }
    let logits = random.floats(rows.len() * vocab as usize).iter().map(|value| value * 8.0).collect();
    (rows, logits, extras)
}

/// The rows of a matmul for every M up to `most`: each must be the row that M = 1 gives, bit for bit.
pub fn assert_rows_do_not_depend_on_m(
    device: &mut Device,
    format: WeightFormat,
    n: u32,
    k: u32,
    most: u32,
    name: &str,
) {
    let random = &mut Random::new(8);
    let weight = device.weight(format, n, k, 9);
    let values = random.floats((most * k) as usize);
    let x = device.f32(most, k, &values);
    let out = device.unwritten(1, n);
    let mut alone = Vec::new();
    for row in 0..most {
        let x = Tensor { offset: row * k, rows: 1, ..x };
        alone.extend(device.run(&[Op::MatMul(MatMul { x, weight, bias: None, out })], &[out]));
    }
    for m in 1..=most {
        // Anew, so that a row that is not written is seen.
        let (x, out) = (x.first_rows(m), device.unwritten(m, n));
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias: None, out })], &[out]);
        assert!(words[..] == alone[..words.len()], "{name}: {} N {n} K {k} at M {m}", format.name());
    }
}

//! A device under test: ops on seeded inputs, the same for every backend, and what each writes.

use fullbore_engine::backend::{Backend, RowSource};
use fullbore_engine::model::Checkpoint;
use fullbore_engine::op::*;
use fullbore_engine::recording::Recording;
use fullbore_engine::tensor::{BufferId, KvTensor, Tensor, Weight, WeightFormat};

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
    attentions(device, &mut outputs);
    arg_maxes(device, &mut outputs);
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
        let ids = device.u32(5, 1, &[0, 69, SAMPLED_BY_SLOT | 2, 33, SAMPLED_BY_SLOT]);
        let sampled = device.u32(3, 1, &[64, 5, 31]);
        let out = device.unwritten(5, 512);
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

/// Sequences that have grown in a shuffled cache, with the items of a mixed step.
fn attentions(device: &mut Device, outputs: &mut Vec<Output>) {
    for (head_dim, num_kv_heads, group, block_size, window) in [
        (64, 3, 3, 32, 0),
        (64, 3, 3, 16, 20),
        (256, 1, 4, 32, 0),
        (256, 1, 4, 8, 40),
        (16, 2, 2, 5, 0),
        (128, 2, 1, 1, 0),
    ] {
        let random = &mut Random::new(6);
        let num_positions = 90u32;
        let num_blocks = 3 * num_positions.div_ceil(block_size);
        let cache = kv_cache(device, num_blocks, block_size, num_kv_heads, head_dim);
        let mut blocks: Vec<u32> = (0..num_blocks).collect();
        for index in 0..blocks.len() {
            blocks.swap(index, random.below(num_blocks) as usize);
        }
        let table_cols = num_positions.div_ceil(block_size);
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
        // A decode at the end, a chunk across a tile, the begin of a prompt, and another decode.
        let items = device.u32(4, 4, &[0, 1, 2, 89, 1, 8, 0, 28, 9, 3, 1, 0, 12, 1, 1, 40]);
        let num_heads = num_kv_heads * group;
        let q = device.random(13, num_heads * head_dim, random);
        let out = device.unwritten(13, num_heads * head_dim);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let ops = [
            Op::StoreKv(StoreKv { k, v, slots, cache }),
            Op::Attention(Attention { q, cache, items, table, num_heads, scale, window, out }),
        ];
        let words = device.run(&ops, &[out]);
        let name = format!("attention head {head_dim}, {num_kv_heads} x {group}, block {block_size}, window {window}");
        outputs.push(Output { name, words, tolerance: 2e-5 });
    }
}

pub fn kv_cache(device: &mut Device, num_blocks: u32, block_size: u32, num_kv_heads: u32, head_dim: u32) -> KvTensor {
    let size_bytes = u64::from(num_blocks) * KvTensor::block_bytes(block_size, num_kv_heads, head_dim);
    let mut alloc = |label| device.backend.alloc(label, size_bytes).expect("a small cache");
    KvTensor { k: alloc("k"), v: alloc("v"), num_blocks, block_size, num_kv_heads, head_dim }
}

fn arg_maxes(device: &mut Device, outputs: &mut Vec<Output>) {
    let random = &mut Random::new(7);
    for cols in [5, 300, 5000] {
        let mut values = random.floats(8 * cols);
        values[cols + 3] = 9.0;
        (values[2 * cols + 1], values[2 * cols + 4]) = (5.0, 5.0);
        values[3 * cols + 2] = f32::NAN;
        values[4 * cols + cols - 1] = f32::INFINITY;
        values[5 * cols] = f32::NEG_INFINITY;
        values[6 * cols..7 * cols].fill(-3.0);
        values[8 * cols - 1] = 2.0;
        let logits = device.f32(8, cols as u32, &values);
        let slots = device.u32(8, 1, &[7, 0, 3, 2, 4, 1, 6, u32::MAX]);
        let sampled = device.u32(9, 1, &[77; 9]);
        let words = device.run(&[Op::ArgMax(ArgMax { logits, slots, sampled })], &[sampled]);
        outputs.push(Output { name: format!("arg_max of {cols}"), words, tolerance: 0.0 });
    }
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

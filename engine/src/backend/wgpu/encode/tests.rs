//! How many dispatches a layer takes in steps of every kind: each costs a device time of its own, whatever it computes.

use fullbore_shaders::{Arithmetic, MatrixUnits};

use super::*;
use crate::backend::sim::{SimBackend, SimOptions};
use crate::batch::PackedBatch;
use crate::batch::attention::{AttentionPlan, QueryRows};
use crate::config::EngineConfig;
use crate::model::{Checkpoint, Inputs, Model, ModelConfig};
use crate::op::{AddNorm, MatMul, SampleRow};
use crate::tensor::{WeightFormat, WeightId};
use crate::tuning::{MatMulLine, MatMulShape};

/// What the whole of a layer may take.
const MAX_DISPATCHES: usize = 10;

/// A model whose weights are one shard each.
struct Layers {
    model: Model,
    num_layers: usize,
    weights: Vec<Vec<Shard>>,
}

impl Layers {
    fn new(shape: &str) -> Layers {
        let config = ModelConfig::of_shape(shape).expect("a known shape");
        let num_layers = config.num_layers as usize;
        let limits = EngineConfig { max_model_len: 8192, ..EngineConfig::default() }.state_limits();
        let checkpoint = Checkpoint::Random { seed: 1, format: WeightFormat::Q4_0 };
        let mut backend = SimBackend::new(SimOptions::default());
        let model = Model::load(config, limits, &checkpoint, &mut backend, &mut |_| {}).expect("it loads");
        // More than any model has; what a dispatch reads is not looked at.
        let shard = vec![Shard { buffer: BufferId(0), first_row: 0, num_rows: 1 }];
        Layers { model, num_layers, weights: vec![shard; 1000] }
    }

    /// Dispatches by layer, without the norm after the last.
    fn count(&self, tier: Tier, slices: &[(u32, u32)]) -> usize {
        self.count_by(&MatMulTables::new(tier, Arithmetic::F32), tier, slices)
    }

    fn count_by(&self, mat_muls: &MatMulTables, tier: Tier, slices: &[(u32, u32)]) -> usize {
        let mut first_row = 0;
        let slice = |(slot, &(num_rows, position)): (usize, &(u32, u32))| {
            let rows = QueryRows { first_row, num_rows, slot: slot as u32, position };
            first_row += num_rows;
            rows
        };
        let rows: Vec<QueryRows> = slices.iter().enumerate().map(slice).collect();
        let mut plan = AttentionPlan::default();
        let limits = &self.model.attention;
        plan.fill(rows.iter().copied(), 0, limits);
        let num_tokens = first_row as usize;
        let batch = PackedBatch {
            ids: vec![1; num_tokens],
            positions: vec![0; num_tokens],
            slots: vec![0; num_tokens],
            attention: vec![plan; limits.windows.len()],
            table_updates: vec![0, 1],
            logit_rows: vec![0],
            sample_rows: vec![SampleRow::IDLE],
            extras: vec![0],
            ..PackedBatch::default()
        };
        let mut recording = self.model.recording();
        self.model.record(&Inputs::upload(&batch, &mut recording), &mut recording).expect("a row of logits");
        let is_first = |op: &Op| matches!(op, Op::RmsNorm(_));
        let is_last = |op: &Op| matches!(op, Op::AddNorm(AddNorm { rows: Some(_), .. }));
        let [begin, end] = [recording.ops.iter().position(is_first), recording.ops.iter().position(is_last)];
        let ops = &recording.ops[begin.expect("the first norm")..=end.expect("the last norm")];
        let mut out = Vec::new();
        let (weights, max_work) = (&self.weights, u64::MAX);
        let partials = (tier != Tier::Lavapipe).then_some(Partials { buffer: BufferId(1), num_elements: 1 << 21 });
        let mut encoder = Encoder { tier, mat_muls, weights, recording: &recording, max_work, partials, out: &mut out };
        encoder.ops(ops);
        let of_layers = out.len() - 1;
        assert_eq!(of_layers % self.num_layers, 0, "{slices:?}");
        of_layers / self.num_layers
    }
}

#[test]
fn no_step_takes_more_dispatches_a_layer_than_its_bound() {
    let decodes = |num: usize, position| vec![(1, position); num];
    for shape in ["llama-3.2-1b", "llama-3.1-8b"] {
        let layers = Layers::new(shape);
        for tier in Tier::ALL {
            let count = |slices: &[(u32, u32)]| layers.count(tier, slices);
            assert_eq!(count(&decodes(16, 20)), 9, "{shape}: decodes");
            assert_eq!(count(&[(64, 0)]), 9, "{shape}: a prompt");
            assert_eq!(count(&decodes(2, 5000)), 10, "{shape}: long contexts, which are split");
            assert_eq!(count(&[decodes(4, 20), vec![(28, 0)]].concat()), 10, "{shape}: decodes and a prompt");
            let worst = [decodes(3, 5000), vec![(28, 900), (1, 700)]].concat();
            assert_eq!(count(&worst), MAX_DISPATCHES, "{shape}: split decodes, a prompt and the last token of one");
        }
    }
}

#[test]
fn workgroups_that_share_k_cost_no_dispatch_where_a_norm_follows() {
    let layers = Layers::new("llama-3.1-8b");
    let (qkv, down) = ((6144, 4096), (4096, 14336));
    let count = |(rows, cols): (u32, u32), tokens: u32| {
        let mut tables = MatMulTables::new(Tier::Subgroup, Arithmetic::F32);
        let shape = MatMulShape { format: WeightFormat::Q4_0, rows, cols };
        tables.set(shape, &MatMulLine::only("split 8x32 spread")).expect("a kernel of this tier");
        layers.count_by(&tables, Tier::Subgroup, &[(tokens, 0)])
    };
    assert_eq!(count(down, 8), 9, "the norm adds up");
    assert_eq!(count(qkv, 8), 10, "no norm follows");
    assert_eq!(count(down, 512), 9, "no room for so many rows: nothing is shared");
}

/// A product of (m, k) by (n, k), and where it goes.
fn product(m: u32, n: u32, k: u32) -> MatMul {
    let weight = Weight { id: WeightId(0), rows: n, cols: k, format: WeightFormat::Q4_0 };
    let [x, out] = [(2, k), (3, n)].map(|(buffer, cols)| Tensor::f32(BufferId(buffer), m, cols));
    MatMul { x, weight, bias: None, first_col: 0, out }
}

fn dispatches(tier: Tier, mat_muls: &MatMulTables, max_work: u64, n: u32, ops: &[Op]) -> Vec<Dispatch> {
    let mut dispatches = Vec::new();
    Encoder {
        tier,
        mat_muls,
        weights: &[vec![Shard { buffer: BufferId(0), first_row: 0, num_rows: n }]],
        recording: &Recording::new(BufferId(0)),
        max_work,
        partials: (tier != Tier::Lavapipe).then_some(Partials { buffer: BufferId(1), num_elements: 1 << 21 }),
        out: &mut dispatches,
    }
    .ops(ops);
    dispatches
}

#[test]
fn few_rows_of_few_columns_share_k_before_a_norm_by_themselves() {
    let norm_follows = |tables: &MatMulTables, tier: Tier, m: u32, n: u32, k: u32| {
        let product = product(m, n, k);
        let tensor = |buffer, rows| Tensor::f32(BufferId(buffer), rows, n);
        let (residual, weight, out) = (tensor(5, m), tensor(6, 1), tensor(4, m));
        let norm = AddNorm { x: residual, y: product.out, post_weight: None, rows: None, weight, eps: 1e-5, out };
        let dispatches = dispatches(tier, tables, u64::MAX, n, &[Op::MatMul(product), Op::AddNorm(norm)]);
        dispatches.iter().map(|dispatch| dispatch.workgroups).collect::<Vec<u32>>()
    };
    let by_own_table = |tier, m, n, k| norm_follows(&MatMulTables::new(tier, Arithmetic::F32), tier, m, n, k);
    for tier in [Tier::Base, Tier::Subgroup] {
        // Four spans, and three.
        assert_eq!(by_own_table(tier, 1, 4096, 14336), [4 * 128, 1]);
        assert_eq!(by_own_table(tier, 4, 4096, 2304), [3 * 128, 4]);
        assert_eq!(by_own_table(tier, 1, 16384, 4096), [512, 1], "columns enough");
        assert_eq!(by_own_table(tier, 1, 4096, 1024), [128, 1], "one span");
        assert_eq!(by_own_table(tier, 8, 4096, 4096), [4 * 128, 8]);
        assert_eq!(by_own_table(tier, 8, 8192, 4096), [256, 8], "columns enough for eight rows");
        assert_eq!(by_own_table(tier, 32, 4096, 4096), [4 * 64, 32]);
        assert_eq!(by_own_table(tier, 64, 8192, 4096), [4 * 128, 64]);
        assert_eq!(by_own_table(tier, 128, 4096, 4096), [2 * 32, 128], "more rows, and more sums");
    }
    assert_eq!(by_own_table(Tier::Lavapipe, 1, 4096, 4096), [128, 1], "software Vulkan has no spans");
    let units = Arithmetic::MatrixUnits(MatrixUnits { size: 16, subgroup_lanes: 32 });
    let tables = MatMulTables::new(Tier::Subgroup, units);
    assert_eq!(norm_follows(&tables, Tier::Subgroup, 32, 4096, 4096), [4 * 64, 32], "on matrix units");
    let mut tuned = MatMulTables::new(Tier::Subgroup, Arithmetic::F32);
    let shape = MatMulShape { format: WeightFormat::Q4_0, rows: 4096, cols: 4096 };
    tuned.set(shape, &MatMulLine::only("split 4x32")).expect("a kernel of this tier");
    assert_eq!(norm_follows(&tuned, Tier::Subgroup, 4, 4096, 4096), [128, 4], "a table that was set has its way");
}

/// A row too many would be written behind its tensor.
#[test]
fn a_product_in_several_dispatches_has_each_row_once() {
    let units = MatrixUnits { size: 16, subgroup_lanes: 32 };
    let word = |of: fn(&MatMulParams) -> u32, dispatch: &Dispatch| {
        let size = size_of::<MatMulParams>() / 4;
        of(bytemuck::from_bytes(bytemuck::cast_slice(&dispatch.params[..size])))
    };
    for tier in Tier::ALL {
        for arithmetic in [Arithmetic::F32, Arithmetic::F16, Arithmetic::IntegerDot, Arithmetic::MatrixUnits(units)] {
            for (m, max_work) in (1..=300).chain([513, 640, 700]).flat_map(|m| [(m, 1), (m, 100 << 15), (m, u64::MAX)])
            {
                let (n, k) = (256, 128);
                let tables = MatMulTables::new(tier, arithmetic);
                let dispatches = dispatches(tier, &tables, max_work, n, &[Op::MatMul(product(m, n, k))]);
                let mut next = 0;
                for dispatch in &dispatches {
                    assert_eq!(word(|params| params.first_row, dispatch), next, "{tier:?} {arithmetic:?} {m}");
                    next = word(|params| params.num_rows, dispatch);
                }
                assert_eq!(next, m, "{tier:?} {arithmetic:?}, work {max_work}");
            }
        }
    }
}

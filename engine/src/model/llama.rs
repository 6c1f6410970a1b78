//! One forward pass of the Llama family, as ops. Families differ by data: optional norms, biases, windows, scales.

use crate::backend::{Backend, DeviceError};
use crate::batch::attention::AttentionLimits;
use crate::model::{Choices, Inputs, Model, ModelConfig, StateLimits, alloc_f32, alloc_u32};
use crate::op::{
    Add, Attention, CHOSEN_WORDS, Embed, GatedAct, GatherRows, MAX_TOP, MatMul, Op, ResetCounts, RmsNorm, Rope, Sample,
    StoreKv, UpdateTable, slice_cols,
};
use crate::recording::Recording;
use crate::tensor::{Tensor, Weight};

impl Model {
    /// Appends the pass over `inputs` to `recording`. Returns where the choices will lie, if any row has logits.
    pub fn record(&self, inputs: &Inputs, recording: &mut Recording) -> Option<Choices> {
        let scratch = self.scratch.first_rows(inputs.ids.rows);
        if let Some(entries) = inputs.table_updates {
            recording.push(Op::UpdateTable(UpdateTable { entries, table: self.block_table }));
        }
        if let Some((resets, tokens)) = inputs.resets {
            recording.push(Op::ResetCounts(ResetCounts { resets, tokens, counts: self.counts }));
        }
        recording.push(Op::Embed(Embed {
            ids: inputs.ids,
            sampled: self.sampled,
            table: self.weights.embed,
            scale: self.config.embed_scale,
            out: scratch.hidden,
        }));
        for layer in 0..self.weights.layers.len() {
            self.record_attention(layer, inputs, &scratch, recording);
            self.record_ffn(layer, &scratch, recording);
        }
        let rows = inputs.logit_rows?;
        let last = self.scratch.last.first_rows(rows.rows);
        let last_normed = self.scratch.last_normed.first_rows(rows.rows);
        let logits = self.scratch.logits.first_rows(rows.rows);
        recording.push(Op::GatherRows(GatherRows { x: scratch.hidden, rows, out: last }));
        self.norm(last, self.weights.final_norm, last_normed, recording);
        matmul(last_normed, self.weights.output, None, logits, recording);
        let choices =
            Choices { chosen: self.scratch.chosen.first_rows(rows.rows), top: self.scratch.top.first_rows(rows.rows) };
        recording.push(Op::Sample(Sample {
            logits,
            rows: inputs.sample_rows,
            extras: inputs.extras,
            counts: self.counts,
            slices: self.scratch.slices.first_rows(rows.rows),
            sampled: self.sampled,
            chosen: choices.chosen,
            top: choices.top,
        }));
        Some(choices)
    }

    fn record_attention(&self, layer: usize, inputs: &Inputs, scratch: &Scratch, recording: &mut Recording) {
        let config = &self.config;
        let weights = &self.weights.layers[layer];
        let cache = self.kv[layer];
        let window = config.windows[layer];
        self.norm(scratch.hidden, weights.attn_norm, scratch.normed, recording);
        matmul(scratch.normed, weights.q, weights.q_bias, scratch.q, recording);
        matmul(scratch.normed, weights.k, weights.k_bias, scratch.k, recording);
        matmul(scratch.normed, weights.v, weights.v_bias, scratch.v, recording);
        let (mut q, mut k) = (scratch.q, scratch.k);
        if let Some(weight) = weights.q_norm {
            self.norm(q.with_cols(config.head_dim), weight, scratch.q_normed.with_cols(config.head_dim), recording);
            q = scratch.q_normed;
        }
        if let Some(weight) = weights.k_norm {
            self.norm(k.with_cols(config.head_dim), weight, scratch.k_normed.with_cols(config.head_dim), recording);
            k = scratch.k_normed;
        }
        let table = match self.local_rope_table {
            Some(local) if window.is_some() => local,
            _ => self.rope_table,
        };
        for x in [q, k] {
            recording.push(Op::Rope(Rope {
                x,
                head_dim: config.head_dim,
                positions: inputs.positions,
                table,
                style: config.rope_style,
            }));
        }
        recording.push(Op::StoreKv(StoreKv { k, v: scratch.v, slots: inputs.slots, cache }));
        recording.push(self.attention(layer, q, inputs, scratch));
        matmul(scratch.attn, weights.attn_output, None, scratch.projected, recording);
        self.add_branch(weights.post_attn_norm, scratch, recording);
    }

    fn attention(&self, layer: usize, q: Tensor, inputs: &Inputs, scratch: &Scratch) -> Op {
        let window = self.config.windows[layer].unwrap_or(0);
        let plans = self.attention.windows.iter().zip(&inputs.attention);
        let (_, plan) = plans.into_iter().find(|(found, _)| **found == window).expect("a plan for each window");
        Op::Attention(Attention {
            q,
            cache: self.kv[layer],
            items: plan.items,
            num_single_rows: plan.num_single_rows,
            merges: plan.merges,
            partials: scratch.partials,
            table: self.block_table,
            num_heads: self.config.num_heads,
            scale: self.config.attention_scale,
            soft_cap: 0.0,
            window,
            out: scratch.attn,
        })
    }

    fn record_ffn(&self, layer: usize, scratch: &Scratch, recording: &mut Recording) {
        let weights = &self.weights.layers[layer];
        self.norm(scratch.hidden, weights.ffn_norm, scratch.normed, recording);
        matmul(scratch.normed, weights.gate, None, scratch.gate, recording);
        matmul(scratch.normed, weights.up, None, scratch.up, recording);
        recording.push(Op::GatedAct(GatedAct {
            gate: scratch.gate,
            up: scratch.up,
            activation: self.config.activation,
            out: scratch.act,
        }));
        matmul(scratch.act, weights.down, None, scratch.projected, recording);
        self.add_branch(weights.post_ffn_norm, scratch, recording);
    }

    /// `hidden += projected`, through a norm where the family has one.
    fn add_branch(&self, post_norm: Option<Tensor>, scratch: &Scratch, recording: &mut Recording) {
        let mut y = scratch.projected;
        if let Some(weight) = post_norm {
            self.norm(y, weight, scratch.normed, recording);
            y = scratch.normed;
        }
        recording.push(Op::Add(Add { x: scratch.hidden, y }));
    }

    fn norm(&self, x: Tensor, weight: Tensor, out: Tensor, recording: &mut Recording) {
        recording.push(Op::RmsNorm(RmsNorm { x, weight, eps: self.config.norm_eps, out }));
    }
}

/// Activations of a pass; each has its own buffer, so that independent ops need no barrier between them.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// f32 (tokens, dim): the residual stream.
    pub hidden: Tensor,
    /// f32 (tokens, dim)
    pub normed: Tensor,
    /// f32 (tokens, num_heads * head_dim)
    pub q: Tensor,
    pub q_normed: Tensor,
    /// f32 (tokens, num_kv_heads * head_dim)
    pub k: Tensor,
    pub k_normed: Tensor,
    pub v: Tensor,
    /// f32 (tokens, num_heads * head_dim)
    pub attn: Tensor,
    /// f32 (partials, `Attention::partial_cols`): what a split row gets of each cut of its context.
    pub partials: Tensor,
    /// f32 (tokens, dim): what a branch adds to the residual stream.
    pub projected: Tensor,
    /// f32 (tokens, ffn_dim)
    pub gate: Tensor,
    pub up: Tensor,
    pub act: Tensor,
    /// f32 (max logit rows, dim)
    pub last: Tensor,
    pub last_normed: Tensor,
    /// f32 (max logit rows, vocab)
    pub logits: Tensor,
    /// u32 (max logit rows, ..): what `Op::Sample` notes, chooses and ranks.
    pub slices: Tensor,
    pub chosen: Tensor,
    pub top: Tensor,
}

impl Scratch {
    pub fn alloc(
        config: &ModelConfig,
        limits: &StateLimits,
        backend: &mut dyn Backend,
    ) -> Result<Scratch, DeviceError> {
        let tokens = limits.max_num_batched_tokens;
        let q_dim = config.num_heads * config.head_dim;
        let kv_dim = config.num_kv_heads * config.head_dim;
        let mut u32 = |label, cols| alloc_u32(label, limits.max_logit_rows, cols, backend);
        let slices = u32("slices", slice_cols(config.vocab_size))?;
        let (chosen, top) = (u32("chosen", CHOSEN_WORDS)?, u32("top", 2 * MAX_TOP)?);
        let mut f32 = |label, rows, cols| alloc_f32(label, rows, cols, backend);
        Ok(Scratch {
            slices,
            chosen,
            top,
            hidden: f32("hidden", tokens, config.dim)?,
            normed: f32("normed", tokens, config.dim)?,
            q: f32("q", tokens, q_dim)?,
            q_normed: f32("q normed", tokens, q_dim)?,
            k: f32("k", tokens, kv_dim)?,
            k_normed: f32("k normed", tokens, kv_dim)?,
            v: f32("v", tokens, kv_dim)?,
            attn: f32("attn", tokens, q_dim)?,
            partials: f32("attention partials", num_partials(limits), partial_cols(config))?,
            projected: f32("projected", tokens, config.dim)?,
            gate: f32("gate", tokens, config.ffn_dim)?,
            up: f32("up", tokens, config.ffn_dim)?,
            act: f32("act", tokens, config.ffn_dim)?,
            last: f32("last", limits.max_logit_rows, config.dim)?,
            last_normed: f32("last normed", limits.max_logit_rows, config.dim)?,
            logits: f32("logits", limits.max_logit_rows, config.vocab_size)?,
        })
    }

    /// Bytes that `alloc` takes.
    pub fn size_bytes(config: &ModelConfig, limits: &StateLimits) -> u64 {
        let q_dim = config.num_heads * config.head_dim;
        let kv_dim = config.num_kv_heads * config.head_dim;
        let per_token = u64::from(3 * config.dim + 3 * q_dim + 3 * kv_dim) + 3 * u64::from(config.ffn_dim);
        let choice_words = slice_cols(config.vocab_size) + CHOSEN_WORDS + 2 * MAX_TOP;
        let per_logit_row = u64::from(2 * config.dim) + u64::from(config.vocab_size) + u64::from(choice_words);
        let partials = u64::from(num_partials(limits)) * u64::from(partial_cols(config));
        let logit_rows = u64::from(limits.max_logit_rows) * per_logit_row;
        4 * (u64::from(limits.max_num_batched_tokens) * per_token + logit_rows + partials)
    }

    /// The first `rows` tokens of everything that has a row a token.
    fn first_rows(&self, rows: u32) -> Scratch {
        Scratch {
            hidden: self.hidden.first_rows(rows),
            normed: self.normed.first_rows(rows),
            q: self.q.first_rows(rows),
            q_normed: self.q_normed.first_rows(rows),
            k: self.k.first_rows(rows),
            k_normed: self.k_normed.first_rows(rows),
            v: self.v.first_rows(rows),
            attn: self.attn.first_rows(rows),
            projected: self.projected.first_rows(rows),
            gate: self.gate.first_rows(rows),
            up: self.up.first_rows(rows),
            act: self.act.first_rows(rows),
            ..*self
        }
    }
}

fn num_partials(limits: &StateLimits) -> u32 {
    AttentionLimits::num_partials(limits.max_model_len, limits.max_num_seqs)
}

fn partial_cols(config: &ModelConfig) -> u32 {
    Attention::partial_cols(config.num_heads, config.head_dim)
}

fn matmul(x: Tensor, weight: Weight, bias: Option<Tensor>, out: Tensor, recording: &mut Recording) {
    recording.push(Op::MatMul(MatMul { x, weight, bias, out }));
}

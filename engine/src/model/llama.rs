//! One forward pass of the Llama family, as ops. Families differ by data: optional norms, biases, windows, scales.

use crate::backend::{Backend, DeviceError, Place};
use crate::batch::attention::AttentionLimits;
use crate::model::weights::{Linear, Part};
use crate::model::{Choices, Inputs, Model, ModelConfig, SamplingInputs, StateLimits, alloc_f32, alloc_u32};
use crate::op::{
    AddNorm, Attention, CHOSEN_WORDS, Embed, GatedAct, MAX_TOP, MatMul, Op, ResetCounts, RmsNorm, RopeKv, Sample,
    UpdateTable, slice_cols,
};
use crate::recording::Recording;
use crate::tensor::Tensor;

impl Model {
    /// Appends the pass over `inputs` to `recording`. Returns where the choices will lie, if any row has logits.
    pub fn record(&self, inputs: &Inputs, recording: &mut Recording) -> Option<Choices> {
        let num_rows = self.record_logits(inputs, recording)?;
        assert_eq!(num_rows, inputs.sampling.rows.rows, "a sample row for each row of logits");
        Some(self.record_choices(&inputs.sampling, recording))
    }

    /// The same up to the logits. Returns how many rows have them.
    pub fn record_logits(&self, inputs: &Inputs, recording: &mut Recording) -> Option<u32> {
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
        let layers = &self.weights.layers;
        for (layer, weights) in layers.iter().enumerate() {
            // Each branch begins with the norm that ends the one before it.
            match layer.checked_sub(1) {
                None => recording.push(Op::RmsNorm(RmsNorm {
                    x: scratch.hidden,
                    weight: weights.attn_norm,
                    eps: self.config.norm_eps,
                    out: scratch.normed,
                })),
                Some(before) => {
                    let post_norm = layers[before].post_ffn_norm;
                    self.add_norm(post_norm, weights.attn_norm, None, scratch.normed, &scratch, recording);
                }
            }
            self.record_attention(layer, inputs, &scratch, recording);
            self.add_norm(weights.post_attn_norm, weights.ffn_norm, None, scratch.normed, &scratch, recording);
            self.record_ffn(layer, &scratch, recording);
        }
        let rows = inputs.logit_rows?;
        let last_normed = self.scratch.last_normed.first_rows(rows.rows);
        let logits = self.scratch.logits.first_rows(rows.rows);
        let post_norm = layers.last().and_then(|weights| weights.post_ffn_norm);
        self.add_norm(post_norm, self.weights.final_norm, Some(rows), last_normed, &scratch, recording);
        let weight = self.weights.output;
        recording.push(Op::MatMul(MatMul { x: last_normed, weight, bias: None, first_col: 0, out: logits }));
        Some(rows.rows)
    }

    /// Appends the choice from the logits that the last pass left, one row for each of `inputs`.
    pub fn record_choices(&self, inputs: &SamplingInputs, recording: &mut Recording) -> Choices {
        let num_rows = inputs.rows.rows;
        let choices = Choices {
            chosen: self.scratch.chosen.first_rows(num_rows),
            top: self.scratch.top.first_rows(num_rows),
            hidden: self.scratch.last_normed.first_rows(num_rows),
        };
        recording.push(Op::Sample(Sample {
            logits: self.scratch.logits.first_rows(num_rows),
            rows: inputs.rows,
            extras: inputs.extras,
            counts: self.counts,
            slices: self.scratch.slices.first_rows(num_rows),
            sampled: self.sampled,
            chosen: choices.chosen,
            top: choices.top,
        }));
        choices
    }

    fn record_attention(&self, layer: usize, inputs: &Inputs, scratch: &Scratch, recording: &mut Recording) {
        let config = &self.config;
        let weights = &self.weights.layers[layer];
        let window = config.windows[layer];
        product(scratch.normed, &weights.qkv, scratch.qkv, recording);
        let table = match self.local_rope_table {
            Some(local) if window.is_some() => local,
            _ => self.rope_table,
        };
        recording.push(Op::RopeKv(RopeKv {
            qkv: scratch.qkv,
            norms: weights.head_norms,
            eps: config.norm_eps,
            positions: inputs.positions,
            table,
            style: config.rope_style,
            slots: inputs.slots,
            cache: self.kv[layer],
            q: scratch.q,
        }));
        recording.push(self.attention(layer, inputs, scratch));
        product(scratch.attn, &weights.attn_output, scratch.projected, recording);
    }

    fn attention(&self, layer: usize, inputs: &Inputs, scratch: &Scratch) -> Op {
        let window = self.config.windows[layer].unwrap_or(0);
        let plans = self.attention.windows.iter().zip(&inputs.attention);
        let (_, plan) = plans.into_iter().find(|(found, _)| **found == window).expect("a plan for each window");
        Op::Attention(Attention {
            q: scratch.q,
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
        product(scratch.normed, &weights.gate_up, scratch.gate_up, recording);
        recording.push(Op::GatedAct(GatedAct {
            gate_up: scratch.gate_up,
            activation: self.config.activation,
            out: scratch.act,
        }));
        product(scratch.act, &weights.down, scratch.projected, recording);
    }

    /// Adds what a branch projected to the residual stream, through a norm where the family has one; then the norm of
    /// the next branch.
    fn add_norm(
        &self,
        post_weight: Option<Tensor>,
        weight: Tensor,
        rows: Option<Tensor>,
        out: Tensor,
        scratch: &Scratch,
        recording: &mut Recording,
    ) {
        let (x, y, eps) = (scratch.hidden, scratch.projected, self.config.norm_eps);
        recording.push(Op::AddNorm(AddNorm { x, y, post_weight, rows, weight, eps, out }));
    }
}

/// Activations of a pass; each has its own buffer, so that independent ops need no barrier between them.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    /// f32 (tokens, dim): the residual stream.
    pub hidden: Tensor,
    /// f32 (tokens, dim)
    pub normed: Tensor,
    /// f32 (tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    pub qkv: Tensor,
    /// f32 (tokens, num_heads * head_dim)
    pub q: Tensor,
    pub attn: Tensor,
    /// f32 (partials, `Attention::partial_cols`): what a split row gets of each cut of its context.
    pub partials: Tensor,
    /// f32 (tokens, dim): what a branch adds to the residual stream.
    pub projected: Tensor,
    /// f32 (tokens, 2 * ffn_dim)
    pub gate_up: Tensor,
    /// f32 (tokens, ffn_dim)
    pub act: Tensor,
    /// f32 (max logit rows, dim)
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
        backend.place(Place::Last);
        let mut u32 = |label, cols| alloc_u32(label, limits.max_logit_rows, cols, backend);
        let slices = u32("slices", slice_cols(config.vocab_size))?;
        let (chosen, top) = (u32("chosen", CHOSEN_WORDS)?, u32("top", 2 * MAX_TOP)?);
        let last_normed = alloc_f32("last normed", limits.max_logit_rows, config.dim, backend)?;
        let logits = alloc_f32("logits", limits.max_logit_rows, config.vocab_size, backend)?;
        backend.place(Place::Stream);
        let hidden = alloc_f32("hidden", tokens, config.dim, backend)?;
        let projected = alloc_f32("projected", tokens, config.dim, backend)?;
        backend.place(Place::Throughout);
        let mut f32 = |label, rows, cols| alloc_f32(label, rows, cols, backend);
        Ok(Scratch {
            slices,
            chosen,
            top,
            last_normed,
            logits,
            hidden,
            projected,
            normed: f32("normed", tokens, config.dim)?,
            qkv: f32("qkv", tokens, q_dim + 2 * kv_dim)?,
            q: f32("q", tokens, q_dim)?,
            attn: f32("attn", tokens, q_dim)?,
            partials: f32("attention partials", num_partials(limits), partial_cols(config))?,
            gate_up: f32("gate and up", tokens, 2 * config.ffn_dim)?,
            act: f32("act", tokens, config.ffn_dim)?,
        })
    }

    /// Bytes that `alloc` takes.
    pub fn size_bytes(config: &ModelConfig, limits: &StateLimits) -> u64 {
        let q_dim = config.num_heads * config.head_dim;
        let kv_dim = config.num_kv_heads * config.head_dim;
        let per_token = u64::from(3 * config.dim + 3 * q_dim + 2 * kv_dim) + 3 * u64::from(config.ffn_dim);
        let partials = u64::from(num_partials(limits)) * u64::from(partial_cols(config));
        let tokens = u64::from(limits.max_num_batched_tokens) * per_token;
        4 * (tokens + partials) + Scratch::last_bytes(config, limits)
    }

    /// Of these, the ones for what is behind all layers.
    pub fn last_bytes(config: &ModelConfig, limits: &StateLimits) -> u64 {
        let choice_words = slice_cols(config.vocab_size) + CHOSEN_WORDS + 2 * MAX_TOP;
        let per_logit_row = u64::from(config.dim) + u64::from(config.vocab_size) + u64::from(choice_words);
        4 * u64::from(limits.max_logit_rows) * per_logit_row
    }

    /// The first `rows` tokens of everything that has a row a token.
    fn first_rows(&self, rows: u32) -> Scratch {
        Scratch {
            hidden: self.hidden.first_rows(rows),
            normed: self.normed.first_rows(rows),
            qkv: self.qkv.first_rows(rows),
            q: self.q.first_rows(rows),
            attn: self.attn.first_rows(rows),
            projected: self.projected.first_rows(rows),
            gate_up: self.gate_up.first_rows(rows),
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

/// Each part of `linear` fills the columns of `out` that follow those of the part before it.
fn product(x: Tensor, linear: &Linear, out: Tensor, recording: &mut Recording) {
    let mut first_col = 0;
    for &Part { weight, bias } in &linear.0 {
        recording.push(Op::MatMul(MatMul { x, weight, bias, first_col, out }));
        first_col += weight.rows;
    }
}

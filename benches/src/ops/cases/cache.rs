//! Ops on the KV cache, whatever it holds its elements as: heads turned and stored, and attention to what is there, of
//! one token each of many sequences and of the tokens of one prompt.

use fullbore_engine::backend::DeviceError;
use fullbore_engine::batch::attention::QueryRows;
use fullbore_engine::op::{ATTENTION_CUT, Attention, Op, RopeKv, RopeStyle};
use fullbore_engine::tensor::{KvTensor, KvType, Tensor};
use fullbore_engine::verify::attention::Planned;

use super::{Case, Loader, MAX_SEQUENCES, part};
use crate::ops::OpsError;

const BLOCK_SIZE: u32 = 32;

/// Some sequences, each in blocks of its own.
#[derive(Clone, Copy)]
struct Cache {
    kv: KvTensor,
    /// u32 (sequences, blocks of one)
    table: Tensor,
}

impl Loader<'_, '_> {
    pub(super) fn caches(&mut self) -> Result<(), OpsError> {
        for kv_type in KvType::ALL.into_iter().filter(|kv_type| kv_type.takes(self.options.shape.head_dim)) {
            let name = |op: &str| format!("{op} {}", kv_type.name());
            let (rope, decode, prefill) = (name("rope_kv"), name("attention"), name("prefill"));
            if [&rope, &decode, &prefill].iter().all(|name| self.rows(name, u32::MAX).is_empty()) {
                continue;
            }
            let context = self.options.shape.context;
            let longest = self.options.rows.iter().copied().max().unwrap_or(0).max(context);
            let num_sequences = self.rows(&decode, MAX_SEQUENCES).into_iter().max().unwrap_or(1);
            let caches = self.cache(kv_type, num_sequences, context);
            let caches = caches.and_then(|many| Ok((many, self.cache(kv_type, 1, longest)?)));
            let (many, one) = match caches {
                Ok(caches) => caches,
                Err(error @ (DeviceError::OutOfMemory { .. } | DeviceError::BufferTooLarge { .. })) => {
                    self.skipped.push(format!("a cache of {}: {error}", kv_type.name()));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            self.at_each(&rope, u32::MAX, |loader, m| loader.rope_kv(&rope, one.kv, m))?;
            self.at_each(&decode, MAX_SEQUENCES, |loader, m| loader.decode(&decode, many, m))?;
            self.at_each(&prefill, u32::MAX, |loader, m| loader.prefill(&prefill, one, m))?;
        }
        Ok(())
    }

    /// Of `num_positions` positions each.
    fn cache(&mut self, kv_type: KvType, num_sequences: u32, num_positions: u32) -> Result<Cache, DeviceError> {
        let shape = self.options.shape;
        let (num_kv_heads, head_dim) = (shape.num_kv_heads, shape.head_dim);
        let table_cols = num_positions.div_ceil(BLOCK_SIZE);
        let num_blocks = num_sequences * table_cols;
        let block_bytes = KvTensor::block_bytes(kv_type, BLOCK_SIZE, num_kv_heads, head_dim);
        let size_bytes = u64::from(num_blocks) * block_bytes;
        let (k, v) = (self.rig.backend.alloc("K", size_bytes)?, self.rig.backend.alloc("V", size_bytes)?);
        let kv = KvTensor { k, v, kv_type, num_blocks, block_size: BLOCK_SIZE, num_kv_heads, head_dim };
        Ok(Cache { kv, table: self.rig.words(table_cols, &(0..num_blocks).collect::<Vec<u32>>())? })
    }

    /// `3 x 64, 1 KV`.
    fn heads(&self) -> String {
        let shape = self.options.shape;
        format!("{} x {}, {} KV", shape.num_heads, shape.head_dim, shape.num_kv_heads)
    }

    /// `m` tokens of one sequence.
    fn rope_kv(&mut self, name: &str, kv: KvTensor, m: u32) -> Result<Case, DeviceError> {
        let shape = self.options.shape;
        let words: Vec<u32> = (0..m).collect();
        let (positions, slots) = (self.rig.words(1, &words)?, self.rig.words(1, &words)?);
        let table = self.rig.random(m, shape.head_dim)?;
        let q_dim = shape.num_heads * shape.head_dim;
        let kv_dim = shape.num_kv_heads * shape.head_dim;
        let (qkv, q) = (part(self.x, m, q_dim + 2 * kv_dim), part(self.out, m, q_dim));
        let style = RopeStyle::Halves;
        let op = RopeKv { qkv, norms: None, eps: 1e-5, positions, table, style, slots, cache: kv, q };
        let stored = u64::from(m) * kv_bytes(kv);
        let bytes = qkv.size_bytes() + q.size_bytes() + table.size_bytes() + stored + 8 * u64::from(m);
        // Two elements that turn together take four products and two sums.
        let flops = 3 * u64::from(m) * u64::from(q_dim + kv_dim);
        Ok(Case::new(name.to_owned(), self.heads(), m, bytes, flops, vec![Op::RopeKv(op)]))
    }

    /// A token each of `m` sequences.
    fn decode(&mut self, name: &str, cache: Cache, m: u32) -> Result<Case, DeviceError> {
        let context = self.options.shape.context;
        let position = context - 1;
        let rows: Vec<QueryRows> =
            (0..m).map(|row| QueryRows { first_row: row, num_rows: 1, slot: row, position }).collect();
        let loaded = u64::from(m) * u64::from(context);
        let shape = format!("{}, {context} seen", self.heads());
        self.attention((name, shape), cache, &rows, (loaded, loaded))
    }

    /// The last `m` tokens of a prompt of `context`, or of `m` if those are more.
    fn prefill(&mut self, name: &str, cache: Cache, m: u32) -> Result<Case, DeviceError> {
        let context = self.options.shape.context.max(m);
        let position = context - m;
        let rows = [QueryRows { first_row: 0, num_rows: m, slot: 0, position }];
        let seen = (u64::from(position + 1) + u64::from(context)) * u64::from(m) / 2;
        let shape = format!("{}, to {context}", self.heads());
        self.attention((name, shape), cache, &rows, (u64::from(context), seen))
    }

    /// Rows that load so many positions, each once, and see so many in all.
    fn attention(
        &mut self,
        (name, shape): (&str, String),
        Cache { kv, table }: Cache,
        rows: &[QueryRows],
        (loaded, seen): (u64, u64),
    ) -> Result<Case, DeviceError> {
        let num_heads = self.options.shape.num_heads;
        let num_rows: u32 = rows.iter().map(|rows| rows.num_rows).sum();
        let num_partials = rows.len() as u32 * self.options.shape.context.div_ceil(ATTENTION_CUT);
        let Planned { items, num_single_rows, merges, partials } =
            Planned::new(rows, 0, kv, num_heads, num_partials, |words, cols| self.rig.words(cols, words))?;
        let cols = num_heads * kv.head_dim;
        let (q, out) = (part(self.x, num_rows, cols), part(self.out, num_rows, cols));
        let op = Op::Attention(Attention {
            q,
            cache: kv,
            items,
            num_single_rows,
            merges,
            partials,
            table,
            num_heads,
            scale: 1.0 / (kv.head_dim as f32).sqrt(),
            soft_cap: 0.0,
            window: 0,
            out,
        });
        let bytes = loaded * kv_bytes(kv) + 2 * q.size_bytes();
        // A score and a value: a product and a sum each for every element.
        Ok(Case::new(name.to_owned(), shape, num_rows, bytes, 4 * seen * u64::from(cols), vec![op]))
    }
}

/// Of K and V of one position.
fn kv_bytes(kv: KvTensor) -> u64 {
    2 * kv.size_of_block() / u64::from(kv.block_size)
}

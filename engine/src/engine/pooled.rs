//! Hidden states of a prompt, as steps bring them, on their way to one vector. Invariant: each row counts once: slices
//! of a sequence follow one another, and one that begins at 0 begins anew, as after a preemption.

use super::Engine;
use crate::batch::Batch;
use crate::request::Pooling;
use crate::sampling;

/// The sum of rows, or the last one.
#[derive(Clone, Debug, Default)]
pub(super) struct Pooled {
    sum: Vec<f32>,
    num_rows: u32,
}

impl Pooled {
    fn take(&mut self, pooling: Pooling, rows: &[f32], dim: usize) {
        for row in rows.chunks_exact(dim) {
            match pooling {
                Pooling::Mean if self.num_rows > 0 => {
                    self.sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                    self.num_rows += 1;
                }
                Pooling::Mean | Pooling::Last => {
                    self.sum = row.to_vec();
                    self.num_rows = 1;
                }
            }
        }
    }

    /// `None` where nothing was asked for.
    pub fn vector(&mut self) -> Option<Vec<f32>> {
        let mut vector = std::mem::take(&mut self.sum);
        vector.iter_mut().for_each(|value| *value /= self.num_rows as f32);
        (!vector.is_empty()).then_some(vector)
    }
}

impl Engine {
    /// Hands the hidden states of a step to their clients; a slice whose rows are not all finite has failed.
    pub(super) fn pool(&mut self, batch: &Batch) {
        let dim = self.model.config.dim;
        let asked = batch.slices.iter().enumerate().filter(|(_, slice)| slice.pooled);
        for ((index, slice), rows) in asked.zip(sampling::read_hidden(batch, &self.downloads, dim)) {
            let Some(client) = self.clients.get_mut(&slice.sequence) else { continue };
            let Some(pooling) = client.request.pooling else { continue };
            if !rows.iter().all(|value| value.is_finite()) {
                self.choices[index] = sampling::broken_row();
                continue;
            }
            if slice.start == 0 {
                client.pooled = Pooled::default();
            }
            client.pooled.take(pooling, &rows, dim as usize);
        }
    }
}

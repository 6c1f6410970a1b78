//! Where weights come from: a GGUF file, a safetensors directory, either of them packed on the way, or a seed.
//!
//! Invariant: tensors are asked for by their GGUF names, and one that does not have the shape the config calls for is
//! refused by name. This file is the one place that knows Hugging Face's names.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{LoadError, RowSource};
use crate::format::TensorInfo;
use crate::format::gguf::Gguf;
use crate::format::quant::dequantize_row;
use crate::format::quantize::{self, QuantizedRows};
use crate::format::safetensors::SafetensorsDir;
use crate::model::config::Family;
use crate::tensor::WeightFormat;

// There is one, while a model loads.
#[allow(clippy::large_enum_variant)]
pub enum Checkpoint {
    Gguf(Gguf),
    Safetensors {
        dir: SafetensorsDir,
        family: Family,
    },
    /// Seeded values of a given format, for the simulator, tests and benches.
    Random {
        seed: u64,
        format: WeightFormat,
    },
    /// Another whose floats are packed to one of [`quantize::TARGETS`] while they are read.
    Quantized {
        of: Arc<Checkpoint>,
        to: WeightFormat,
    },
}

impl Checkpoint {
    /// Bytes of all tensors in the file or files.
    pub fn total_bytes(&self) -> u64 {
        match self {
            Checkpoint::Gguf(file) => file.total_tensor_bytes(),
            Checkpoint::Safetensors { dir, .. } => dir.total_tensor_bytes(),
            Checkpoint::Random { .. } => 0,
            Checkpoint::Quantized { of, .. } => of.total_bytes(),
        }
    }

    /// The folder of safetensors files that it is read from, if it is.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Checkpoint::Safetensors { dir, .. } => Some(dir.path()),
            Checkpoint::Quantized { of, .. } => of.folder(),
            Checkpoint::Gguf(_) | Checkpoint::Random { .. } => None,
        }
    }

    /// Its files of weights, in their order; none where values are made up.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Checkpoint::Gguf(file) => vec![file.path().to_owned()],
            Checkpoint::Safetensors { dir, .. } => dir.weight_files(),
            Checkpoint::Random { .. } => Vec::new(),
            Checkpoint::Quantized { of, .. } => of.files(),
        }
    }

    /// Whether there is a tensor of this GGUF name.
    pub(super) fn contains(&self, name: &str) -> bool {
        match self {
            Checkpoint::Random { .. } => MATRICES.iter().chain(&NORMS).any(|part| name.ends_with(part)),
            _ => self.info(name).is_some(),
        }
    }

    /// A matrix of `rows` x `cols`: how it is stored, and its rows.
    pub fn open(&self, name: &str, rows: u32, cols: u32) -> Result<(WeightFormat, Box<dyn RowSource>), LoadError> {
        if let Checkpoint::Random { seed, format } = *self {
            let name_hash = name.bytes().fold(seed, |hash, byte| hash.rotate_left(8) ^ mix(u64::from(byte)));
            let row_bytes = format.row_bytes(cols) as usize;
            return Ok((format, Box::new(RandomRows { state: mix(name_hash), format, row_bytes })));
        }
        if let Checkpoint::Quantized { of, to } = self {
            let (from, source) = of.open(name, rows, cols)?;
            let to = packed_format(name, from, cols, *to);
            return Ok(match to == from {
                true => (from, source),
                false => (to, Box::new(QuantizedRows { source, from, to, cols })),
            });
        }
        let missing = || LoadError::Shape { name: name.to_owned(), problem: "is not in the model file".to_owned() };
        let info = self.info(name).ok_or_else(missing)?;
        // A vector may be stored as a column of one.
        let as_asked = (info.rows, info.cols) == (rows, cols) || (rows == 1 && (info.rows, info.cols) == (cols, 1));
        if !as_asked {
            let problem =
                format!("is {} x {} in the file; the model's config calls for {rows} x {cols}", info.rows, info.cols);
            return Err(LoadError::Shape { name: name.to_owned(), problem });
        }
        let source = match self {
            Checkpoint::Gguf(file) => file.rows(&info.name)?,
            Checkpoint::Safetensors { dir, .. } => dir.rows(&info.name)?,
            Checkpoint::Random { .. } | Checkpoint::Quantized { .. } => unreachable!("answered above"),
        };
        Ok((info.format, source))
    }

    /// A vector of `cols` values.
    pub(super) fn read_vector(&self, name: &str, cols: u32) -> Result<Vec<f32>, LoadError> {
        if let Checkpoint::Random { .. } = self {
            return Ok(vec![1.0; cols as usize]);
        }
        if let Checkpoint::Quantized { of, .. } = self {
            return of.read_vector(name, cols);
        }
        let (format, mut source) = self.open(name, 1, cols)?;
        let mut bytes = vec![0; format.row_bytes(cols) as usize];
        source.read_rows(&mut bytes).map_err(|source| LoadError::Read { name: name.to_owned(), source })?;
        let mut values = vec![0.0; cols as usize];
        dequantize_row(format, &bytes, &mut values);
        if self.stores_norms_less_one() && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(values)
    }

    /// Refuses a file with tensors beside the `used` ones (by GGUF name): without them the numbers would be wrong.
    pub(super) fn refuse_others(&self, used: &HashSet<String>) -> Result<(), LoadError> {
        let other = match self {
            // `rope_freqs` is read with the config.
            Checkpoint::Gguf(file) => {
                file.tensors().find(|tensor| tensor.name != "rope_freqs.weight" && !used.contains(&tensor.name))
            }
            Checkpoint::Safetensors { dir, family } => {
                let used: HashSet<String> = used.iter().filter_map(|name| hugging_face_name(name, *family)).collect();
                let mut others = dir.tensors().filter(|tensor| !used.contains(&tensor.name));
                others.find(|tensor| !tensor.name.ends_with("rotary_emb.inv_freq"))
            }
            Checkpoint::Random { .. } => None,
            Checkpoint::Quantized { of, .. } => return of.refuse_others(used),
        };
        match other {
            Some(tensor) => Err(LoadError::Shape {
                name: tensor.name.clone(),
                problem: "is in the model file, and Fullbore would not use it: its answers would be wrong".to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// How the matrix of this GGUF name is stored, if there is one.
    pub(super) fn format(&self, name: &str) -> Option<WeightFormat> {
        match self {
            Checkpoint::Random { format, .. } => self.contains(name).then_some(*format),
            Checkpoint::Quantized { of, to } => {
                let info = of.info(name)?;
                Some(packed_format(name, info.format, info.cols, *to))
            }
            _ => Some(self.info(name)?.format),
        }
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self {
            Checkpoint::Gguf(file) => file.tensor(name),
            Checkpoint::Safetensors { dir, family } => dir.tensor(&hugging_face_name(name, *family)?),
            Checkpoint::Random { .. } => None,
            Checkpoint::Quantized { of, .. } => of.info(name),
        }
    }

    /// Gemma multiplies by 1 + weight; converters to GGUF add the 1, safetensors files have the weight alone.
    fn stores_norms_less_one(&self) -> bool {
        matches!(self, Checkpoint::Safetensors { family: Family::Gemma3, .. })
    }
}

/// What a matrix is packed to that is stored in `from`. The embedding and the output stay at 8 bits: an error there is
/// in every logit.
fn packed_format(name: &str, from: WeightFormat, cols: u32, to: WeightFormat) -> WeightFormat {
    match quantize::is_packed(from, cols) {
        true if ENDS.contains(&name) => WeightFormat::Q8_0,
        true => to,
        false => from,
    }
}

/// Matrices beside the layers; the output may be the embedding.
pub(super) const ENDS: [&str; 2] = ["token_embd.weight", "output.weight"];

/// What a plain Llama has.
const MATRICES: [&str; 8] = [
    "token_embd.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
];
const NORMS: [&str; 3] = ["attn_norm.weight", "ffn_norm.weight", "output_norm.weight"];

fn hugging_face_name(name: &str, family: Family) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let part = match (part, family) {
        ("attn_norm", _) => "input_layernorm",
        ("attn_q", _) => "self_attn.q_proj",
        ("attn_k", _) => "self_attn.k_proj",
        ("attn_v", _) => "self_attn.v_proj",
        ("attn_q_norm", _) => "self_attn.q_norm",
        ("attn_k_norm", _) => "self_attn.k_norm",
        ("attn_output", _) => "self_attn.o_proj",
        ("ffn_norm", Family::Gemma3) => "pre_feedforward_layernorm",
        ("ffn_norm", _) | ("post_attention_norm", Family::Gemma3) => "post_attention_layernorm",
        ("post_ffw_norm", Family::Gemma3) => "post_feedforward_layernorm",
        ("ffn_gate", _) => "mlp.gate_proj",
        ("ffn_up", _) => "mlp.up_proj",
        ("ffn_down", _) => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Finite values of any format: random codes under random scales, about as large as a trained model's weights. They do
/// not depend on how many rows are read at once, nor on how many threads fill them.
struct RandomRows {
    /// Of the words before the next row.
    state: u64,
    format: WeightFormat,
    row_bytes: usize,
}

impl RowSource for RandomRows {
    fn read_rows(&mut self, out: &mut [u8]) -> io::Result<()> {
        assert!(out.len().is_multiple_of(self.row_bytes), "whole rows of {} bytes, not {}", self.row_bytes, out.len());
        // Floats are too small for a word each.
        let block_bytes = match self.format.block_bytes() as usize {
            block_bytes if block_bytes < WORD => self.row_bytes,
            block_bytes => block_bytes,
        };
        let words_of_row = (self.row_bytes / block_bytes * block_bytes.div_ceil(WORD)) as u64;
        let (first, format) = (self.state, self.format);
        let of_row = |row: usize| first.wrapping_add((row as u64 * words_of_row).wrapping_mul(STEP));
        out.par_chunks_exact_mut(self.row_bytes).enumerate().for_each(|(row, bytes)| {
            let mut state = of_row(row);
            bytes.chunks_exact_mut(block_bytes).for_each(|block| fill(block, format, &mut state));
        });
        self.state = of_row(out.len() / self.row_bytes);
        Ok(())
    }
}

/// Bytes of what [`mix`] gives at once.
const WORD: usize = 8;
/// SplitMix64's.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Begins with a word of its own.
fn fill(block: &mut [u8], format: WeightFormat, state: &mut u64) {
    let (kept, exponents) = floats(format);
    let mut next = || {
        *state = state.wrapping_add(STEP);
        (mix(*state) & kept | exponents).to_le_bytes()
    };
    let (words, rest) = block.as_chunks_mut::<WORD>();
    words.iter_mut().for_each(|word| *word = next());
    if !rest.is_empty() {
        rest.copy_from_slice(&next()[..rest.len()]);
    }
    for &(at, half) in half_scales(format) {
        let drawn = u16::from_le_bytes([block[at], block[at + 1]]);
        block[at..at + 2].copy_from_slice(&(half | drawn & below(half)).to_le_bytes());
    }
}

/// The bits of an f16 below its highest, which are zero in `half`: with them a scale is nobody else's, and less than
/// twice `half`. A subnormal's highest bit is of its fraction.
fn below(half: u16) -> u16 {
    if half & 0x7c00 == 0 { half - 1 } else { 0x3ff }
}

/// What floats keep of random bits, a word of them, and their exponents: of 2^-5 and below.
fn floats(format: WeightFormat) -> (u64, u64) {
    match format {
        WeightFormat::F32 => (0x80ff_ffff_80ff_ffff, 0x3c00_0000_3c00_0000),
        WeightFormat::F16 => (0x83ff_83ff_83ff_83ff, 0x2800_2800_2800_2800),
        WeightFormat::BF16 => (0x80ff_80ff_80ff_80ff, 0x3c00_3c00_3c00_3c00),
        _ => (u64::MAX, 0),
    }
}

/// Where a block's f16 scales lie, and the bits of the least that suits the format's codes.
fn half_scales(format: WeightFormat) -> &'static [(usize, u16)] {
    // 2^-7, 2^-8, 2^-11 and 2^-13 as f16, and minus 2^-4.
    const D4: u16 = 0x2000;
    const D5: u16 = 0x1c00;
    const D8: u16 = 0x1000;
    const DK: u16 = 0x0800;
    const MIN: u16 = 0xac00;
    match format {
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => &[],
        WeightFormat::Q4_0 => &[(0, D4)],
        WeightFormat::Q4_1 => &[(0, D4), (2, MIN)],
        WeightFormat::Q5_0 => &[(0, D5)],
        WeightFormat::Q5_1 => &[(0, D5), (2, MIN)],
        WeightFormat::Q8_0 | WeightFormat::IQ4NL => &[(0, D8)],
        WeightFormat::Q2K => &[(80, DK), (82, DK)],
        WeightFormat::Q3K => &[(108, DK)],
        WeightFormat::Q4K | WeightFormat::Q5K => &[(0, DK), (2, DK)],
        WeightFormat::Q6K => &[(208, 0x0100)],
        WeightFormat::IQ4XS => &[(0, 0x0100)],
    }
}

/// SplitMix64's output function.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::tensor::WeightFormat;

    fn rows(format: WeightFormat, rows: u32, cols: u32, at_once: u32) -> Vec<u8> {
        let checkpoint = Checkpoint::Random { seed: 5, format };
        let (_, mut source) = checkpoint.open("output.weight", rows, cols).expect("never fails");
        let mut bytes = vec![0; (rows * format.row_bytes(cols) as u32) as usize];
        let pieces = bytes.chunks_mut((at_once * format.row_bytes(cols) as u32) as usize);
        pieces.for_each(|piece| source.read_rows(piece).expect("never fails"));
        bytes
    }

    /// Rows of floats that fill no word among them.
    #[test]
    fn random_weights_are_the_same_however_they_are_read_small_and_all_different() {
        for format in WeightFormat::ALL {
            let cols = if format.block_bytes() < 8 { 515 } else { 512 };
            let all = rows(format, 7, cols, 7);
            assert_eq!(
                [1, 2, 3].map(|at_once| rows(format, 7, cols, at_once)),
                [&all; 3].map(Vec::clone),
                "{format:?}"
            );
            let mut values = vec![0.0; cols as usize];
            let rows: Vec<&[u8]> = all.chunks(format.row_bytes(cols) as usize).collect();
            for row in &rows {
                dequantize_row(format, row, &mut values);
                let (least, most) = values.iter().fold((0.0f32, 0.0f32), |(a, b), &x| (a.min(x), b.max(x)));
                assert!(least < 0.0 && (1e-3..1.0).contains(&(most - least)), "{format:?}: {least} to {most}");
            }
            for &(at, half) in half_scales(format) {
                let blocks = all.chunks(format.block_bytes() as usize);
                let scales: Vec<f32> =
                    blocks.map(|block| f16::from_le_bytes([block[at], block[at + 1]]).to_f32()).collect();
                let least = f16::from_bits(half).to_f32();
                assert!(scales.iter().all(|scale| (1.0..2.0).contains(&(scale / least))), "{format:?}: {scales:?}");
                let distinct: std::collections::HashSet<u32> = scales.iter().map(|scale| scale.to_bits()).collect();
                assert!(distinct.len() * 4 > scales.len() * 3, "{format:?}: the same scale again and again");
            }
            let words: std::collections::HashSet<&[u8]> = rows.iter().flat_map(|row| row.chunks_exact(16)).collect();
            assert_eq!(words.len(), rows.len() * (rows[0].len() / 16), "{format:?}: the same comes again");
        }
    }
}

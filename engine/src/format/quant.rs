//! GGML's block formats: from bytes to codes and scales, and from those to f32.
//!
//! Invariant: every block is affine, `value = scale[g] * code - min[g]` in f32 with `g = index / group_len`, and that
//! expression in that order equals `gguf.quants.dequantize` of PyPI's gguf bit for bit. A packer that keeps codes and
//! scales therefore loses nothing. This file knows no file and no backend.

use half::{bf16, f16};

use crate::tensor::WeightFormat;

/// Elements of the longest block, and groups of the block with most.
pub const MAX_BLOCK_LEN: usize = 256;
pub const MAX_GROUPS: usize = 16;

/// A decoded block: the first `format.block_len()` codes, and one scale and min for each `group_len` of them.
///
/// `min` is subtracted; a format without one has 0.0, which changes no bit of `scale * code`.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    pub codes: [i16; MAX_BLOCK_LEN],
    pub scale: [f32; MAX_GROUPS],
    pub min: [f32; MAX_GROUPS],
    pub group_len: usize,
}

impl Block {
    fn empty() -> Block {
        Block { codes: [0; MAX_BLOCK_LEN], scale: [0.0; MAX_GROUPS], min: [0.0; MAX_GROUPS], group_len: 1 }
    }

    /// One group of `len` with a scale and a min.
    fn one_group(&mut self, len: usize, scale: f32, min: f32) {
        self.group_len = len;
        self.scale[0] = scale;
        self.min[0] = min;
    }

    /// The values of the first `out.len()` elements.
    pub fn write_values(&self, out: &mut [f32]) {
        let codes = self.codes.chunks_exact(self.group_len);
        let groups = codes.zip(self.scale.iter().zip(&self.min));
        for (out, (codes, (scale, min))) in out.chunks_exact_mut(self.group_len).zip(groups) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(*code) - min;
            }
        }
    }
}

/// Decodes one block of `format.block_bytes()` bytes. A block of a float format is one element: its scale times 1.
pub fn decode_block(format: WeightFormat, bytes: &[u8]) -> Block {
    let mut block = Block::empty();
    decode_into(format, bytes, &mut block);
    block
}

/// Decodes whole blocks of a row: `bytes` holds `out.len()` elements of `format`.
pub fn dequantize_row(format: WeightFormat, bytes: &[u8], out: &mut [f32]) {
    let block_len = format.block_len() as usize;
    let block_bytes = format.block_bytes() as usize;
    assert!(out.len().is_multiple_of(block_len), "{} elements are no whole {} blocks", out.len(), format.name());
    assert_eq!(bytes.len(), out.len() / block_len * block_bytes, "bytes of {} {} elements", out.len(), format.name());
    match format {
        WeightFormat::F32 => convert(bytes, out, f32::from_le_bytes),
        WeightFormat::F16 => convert(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        WeightFormat::BF16 => convert(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        _ => {
            let mut block = Block::empty();
            for (bytes, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(block_len)) {
                decode_into(format, bytes, &mut block);
                block.write_values(out);
            }
        }
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let mut element = [0; N];
    for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(N)) {
        element.copy_from_slice(bytes);
        *out = value(element);
    }
}

fn decode_into(format: WeightFormat, bytes: &[u8], block: &mut Block) {
    assert_eq!(bytes.len(), format.block_bytes() as usize, "bytes of a {} block", format.name());
    match format {
        WeightFormat::F32 => float(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), block),
        WeightFormat::F16 => float(f16_at(bytes, 0), block),
        WeightFormat::BF16 => float(bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(), block),
        WeightFormat::Q4_0 => q4_0(bytes, block),
        WeightFormat::Q4_1 => q4_1(bytes, block),
        WeightFormat::Q5_0 => q5_0(bytes, block),
        WeightFormat::Q5_1 => q5_1(bytes, block),
        WeightFormat::Q8_0 => q8_0(bytes, block),
        WeightFormat::Q2K => q2_k(bytes, block),
        WeightFormat::Q3K => q3_k(bytes, block),
        WeightFormat::Q4K => q4_k(bytes, block),
        WeightFormat::Q5K => q5_k(bytes, block),
        WeightFormat::Q6K => q6_k(bytes, block),
        WeightFormat::IQ4NL => iq4_nl(bytes, block),
        WeightFormat::IQ4XS => iq4_xs(bytes, block),
    }
}

fn float(value: f32, block: &mut Block) {
    block.codes[0] = 1;
    block.one_group(1, value, 0.0);
}

/// f16 d; 16 bytes of codes
fn q4_0(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), 0.0);
    nibbles(&bytes[2..18], 16, &mut block.codes);
    shift_codes(&mut block.codes[..32], -8);
}

/// f16 d; f16 m; 16 bytes of codes
fn q4_1(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), -f16_at(bytes, 2));
    nibbles(&bytes[4..20], 16, &mut block.codes);
}

/// f16 d; 32 high bits; 16 bytes of low codes
fn q5_0(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), 0.0);
    nibbles(&bytes[6..22], 16, &mut block.codes);
    fifth_bits(&bytes[2..6], &mut block.codes);
    shift_codes(&mut block.codes[..32], -16);
}

/// f16 d; f16 m; 32 high bits; 16 bytes of low codes
fn q5_1(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), -f16_at(bytes, 2));
    nibbles(&bytes[8..24], 16, &mut block.codes);
    fifth_bits(&bytes[4..8], &mut block.codes);
}

/// f16 d; 32 signed codes
fn q8_0(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), 0.0);
    for (code, byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
        *code = i16::from(byte.cast_signed());
    }
}

/// 16 bytes of (scale, min) nibbles; 64 bytes of codes; f16 d; f16 dmin
fn q2_k(bytes: &[u8], block: &mut Block) {
    let (d, dmin) = (f16_at(bytes, 80), f16_at(bytes, 82));
    block.group_len = 16;
    for group in 0..16 {
        block.scale[group] = d * f32::from(bytes[group] & 15);
        block.min[group] = dmin * f32::from(bytes[group] >> 4);
    }
    bit_pairs(&bytes[16..80], &mut block.codes, |code, pair| *code = pair);
}

/// 32 bytes of high bits; 64 bytes of low codes; 12 bytes of 6-bit scales; f16 d
fn q3_k(bytes: &[u8], block: &mut Block) {
    let (scales, d) = (&bytes[96..108], f16_at(bytes, 108));
    block.group_len = 16;
    block.min = [0.0; MAX_GROUPS];
    for group in 0..16 {
        let low = scales[group % 8] >> (4 * (group / 8)) & 15;
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        block.scale[group] = d * f32::from(i16::from(low | high << 4) - 32);
    }
    bit_pairs(&bytes[32..96], &mut block.codes, |code, pair| *code = pair);
    // A clear bit means minus four.
    bit_planes(&bytes[..32], &mut block.codes, |code, bit| *code += 4 * bit - 4);
}

/// f16 d; f16 dmin; 12 bytes of 6-bit scales and mins; 128 bytes of codes
fn q4_k(bytes: &[u8], block: &mut Block) {
    scales_and_mins(bytes, block);
    nibbles(&bytes[16..144], 32, &mut block.codes);
}

/// f16 d; f16 dmin; 12 bytes of 6-bit scales and mins; 32 bytes of high bits; 128 bytes of low codes
fn q5_k(bytes: &[u8], block: &mut Block) {
    scales_and_mins(bytes, block);
    nibbles(&bytes[48..176], 32, &mut block.codes);
    bit_planes(&bytes[16..48], &mut block.codes, |code, bit| *code |= bit << 4);
}

/// 128 bytes of low codes; 64 bytes of high pairs; 16 signed scales; f16 d
fn q6_k(bytes: &[u8], block: &mut Block) {
    let d = f16_at(bytes, 208);
    block.group_len = 16;
    block.min = [0.0; MAX_GROUPS];
    for group in 0..16 {
        block.scale[group] = d * f32::from(bytes[192 + group].cast_signed());
    }
    nibbles(&bytes[..128], 64, &mut block.codes);
    bit_pairs(&bytes[128..192], &mut block.codes, |code, pair| *code |= pair << 4);
    shift_codes(&mut block.codes, -32);
}

/// f16 d; 16 bytes of indices
fn iq4_nl(bytes: &[u8], block: &mut Block) {
    block.one_group(32, f16_at(bytes, 0), 0.0);
    nibbles(&bytes[2..18], 16, &mut block.codes);
    look_up(&mut block.codes[..32]);
}

/// f16 d; 16 bits of high scales; 4 bytes of low scales; 128 bytes of indices
fn iq4_xs(bytes: &[u8], block: &mut Block) {
    let d = f16_at(bytes, 0);
    let high_scales = u16::from_le_bytes([bytes[2], bytes[3]]);
    block.group_len = 32;
    block.min = [0.0; MAX_GROUPS];
    for group in 0..8 {
        let low = i16::from(bytes[4 + group / 2] >> (4 * (group % 2)) & 15);
        let high = (high_scales >> (2 * group) & 3) as i16;
        block.scale[group] = d * f32::from((low | high << 4) - 32);
    }
    nibbles(&bytes[8..136], 16, &mut block.codes);
    look_up(&mut block.codes);
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Each `run` bytes hold `2 * run` codes: the low nibbles, then the high ones.
fn nibbles(bytes: &[u8], run: usize, codes: &mut [i16]) {
    for (bytes, codes) in bytes.chunks_exact(run).zip(codes.chunks_exact_mut(2 * run)) {
        let (low, high) = codes.split_at_mut(run);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            *low = i16::from(byte & 15);
            *high = i16::from(byte >> 4);
        }
    }
}

/// Each 32 bytes hold 128 pairs of bits: the lowest of all 32, then the next.
fn bit_pairs(bytes: &[u8], codes: &mut [i16], merge: impl Fn(&mut i16, i16)) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (plane, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                merge(code, i16::from(byte >> (2 * plane) & 3));
            }
        }
    }
}

/// 32 bytes hold 256 bits: the lowest of all 32, then the next.
fn bit_planes(bytes: &[u8], codes: &mut [i16], merge: impl Fn(&mut i16, i16)) {
    for (plane, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            merge(code, i16::from(byte >> plane & 1));
        }
    }
}

/// 4 bytes hold the fifth bits of 32 codes, in order.
fn fifth_bits(bytes: &[u8], codes: &mut [i16]) {
    for (bit, code) in codes[..32].iter_mut().enumerate() {
        *code |= i16::from(bytes[bit / 8] >> (bit % 8) & 1) << 4;
    }
}

fn shift_codes(codes: &mut [i16], by: i16) {
    codes.iter_mut().for_each(|code| *code += by);
}

/// The head that Q4_K and Q5_K share: groups 0..4 have six bits in place, groups 4..8 four here and two there.
fn scales_and_mins(bytes: &[u8], block: &mut Block) {
    let (d, dmin, packed) = (f16_at(bytes, 0), f16_at(bytes, 2), &bytes[4..16]);
    block.group_len = 32;
    for group in 0..4 {
        let (scale, min, low) = (packed[group], packed[group + 4], packed[group + 8]);
        block.scale[group] = d * f32::from(scale & 63);
        block.min[group] = dmin * f32::from(min & 63);
        block.scale[group + 4] = d * f32::from(low & 15 | scale >> 2 & 48);
        block.min[group + 4] = dmin * f32::from(low >> 4 | min >> 2 & 48);
    }
}

/// The values of the non-linear 4-bit formats.
pub const IQ4_VALUES: [i16; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn look_up(codes: &mut [i16]) {
    codes.iter_mut().for_each(|code| *code = IQ4_VALUES[*code as usize]);
}

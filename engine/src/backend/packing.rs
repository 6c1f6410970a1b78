//! From the file's blocks to a GPU's words: one layout a format, stated at the top of `shaders/weight.wgsl`, and the
//! same in CUDA.
//!
//! Invariant: packing moves integers and f16 bits and computes nothing, so the device sees the file's exact values, in
//! at most 1.12 times the file's bytes.

use std::time::Instant;

use rayon::prelude::*;

use super::{DeviceError, LoadError, LoadTimes, RowSource, WeightSpec};
use crate::tensor::WeightFormat;

/// Values along K that a kernel takes at a time.
pub const UNIT: u32 = 32;
/// Rows of a weight that lie interleaved.
pub const TILE: u32 = 32;
/// Bytes of a weight on their way to the device at one time, about.
const LOAD_BYTES: u64 = 8 << 20;

/// How a format's blocks lie on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// 1 for f32, 2 for f16, 3 for bf16, 0 for quantised formats.
    float: u32,
    /// Units in a block.
    units: u32,
    low_bits: u32,
    high_bits: u32,
    /// Values that share a stored min; 0 where the min is `-offset * scale`.
    min_group: u32,
    offset: u32,
    /// Whether codes index IQ4_NL's table.
    lookup: bool,
}

impl Layout {
    pub const fn of(format: WeightFormat) -> Layout {
        let (float, units, low_bits, high_bits, min_group, offset) = match format {
            WeightFormat::F32 => (1, 1, 0, 0, 0, 0),
            WeightFormat::F16 => (2, 1, 0, 0, 0, 0),
            WeightFormat::BF16 => (3, 1, 0, 0, 0, 0),
            WeightFormat::Q4_0 => (0, 1, 4, 0, 0, 8),
            WeightFormat::Q4_1 => (0, 1, 4, 0, 32, 0),
            WeightFormat::Q5_0 => (0, 1, 4, 1, 0, 16),
            WeightFormat::Q5_1 => (0, 1, 4, 1, 32, 0),
            WeightFormat::Q8_0 => (0, 1, 8, 0, 0, 128),
            WeightFormat::Q2K => (0, 8, 2, 0, 16, 0),
            WeightFormat::Q3K => (0, 8, 2, 1, 0, 4),
            WeightFormat::Q4K => (0, 8, 4, 0, 32, 0),
            WeightFormat::Q5K => (0, 8, 4, 1, 32, 0),
            WeightFormat::Q6K => (0, 8, 4, 2, 0, 32),
            WeightFormat::IQ4NL => (0, 1, 4, 0, 0, 0),
            WeightFormat::IQ4XS => (0, 8, 4, 0, 0, 0),
        };
        let lookup = matches!(format, WeightFormat::IQ4NL | WeightFormat::IQ4XS);
        Layout { float, units, low_bits, high_bits, min_group, offset, lookup }
    }

    /// Whether it has values and no codes.
    pub const fn is_float(self) -> bool {
        self.float > 0
    }

    /// Words of scales before the codes.
    const fn low_at(self) -> u32 {
        if self.units > 1 { 1 + self.units / 2 } else { 1 }
    }

    const fn high_at(self) -> u32 {
        self.low_at() + self.units * self.low_bits
    }

    const fn block_words(self) -> u32 {
        match self.float {
            0 => self.high_at() + self.units * self.high_bits,
            1 => UNIT,
            _ => UNIT / 2,
        }
    }

    /// Words of a tile of rows of `cols` values.
    pub const fn tile_words(self, cols: u32) -> u64 {
        cols.div_ceil(UNIT * self.units) as u64 * self.block_words() as u64 * TILE as u64
    }

    /// As kernels are composed with.
    pub fn constants(self) -> Vec<(&'static str, u32)> {
        vec![
            ("FLOAT", self.float),
            ("UNITS", self.units),
            ("SUPER", u32::from(self.units > 1)),
            ("LOW_BITS", self.low_bits),
            ("HIGH_BITS", self.high_bits),
            ("MIN_GROUP", self.min_group),
            ("OFFSET", self.offset),
            ("LOOKUP", u32::from(self.lookup)),
            ("LOW_AT", self.low_at()),
            ("HIGH_AT", self.high_at()),
            ("BLOCK_WORDS", self.block_words()),
        ]
    }
}

/// Bytes of `num_rows` rows of a weight, packed.
pub fn packed_bytes(format: WeightFormat, num_rows: u32, cols: u32) -> u64 {
    u64::from(num_rows.div_ceil(TILE)) * Layout::of(format).tile_words(cols) * 4
}

/// Pulls `num_rows` rows of a weight out of `source`, and gives them to `write` packed, a few tiles at a time and in
/// order, with their distance from the begin in bytes. What that took is added to `times`.
pub fn pack_rows(
    spec: &WeightSpec,
    num_rows: u32,
    source: &mut dyn RowSource,
    times: &mut LoadTimes,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), DeviceError>,
) -> Result<(), LoadError> {
    assert!(spec.format.has_whole_blocks(spec.cols), "{}: rows of {} {}", spec.name, spec.cols, spec.format.name());
    let tile_words = Layout::of(spec.format).tile_words(spec.cols);
    let row_bytes = spec.format.row_bytes(spec.cols);
    let tiles_at_once = (LOAD_BYTES / (tile_words * 4)).max(1);
    let rows_at_once = (tiles_at_once * u64::from(TILE)).min(u64::from(num_rows)) as u32;
    let mut offset_bytes = 0;
    for first in (0..num_rows).step_by(rows_at_once as usize) {
        let rows = rows_at_once.min(num_rows - first);
        let mut bytes = vec![0; (u64::from(rows) * row_bytes) as usize];
        let read = |source| LoadError::Read { name: spec.name.clone(), source };
        let begun = Instant::now();
        source.read_rows(&mut bytes).map_err(read)?;
        let has_read = Instant::now();
        let mut words = vec![0u32; (u64::from(rows.div_ceil(TILE)) * tile_words) as usize];
        let tiles = words.par_chunks_mut(tile_words as usize);
        tiles
            .zip(bytes.par_chunks(row_bytes as usize * TILE as usize))
            .for_each(|(words, rows)| pack_tile(spec.format, spec.cols, rows, words));
        let has_packed = Instant::now();
        write(offset_bytes, bytemuck::cast_slice(&words))?;
        times.read += has_read - begun;
        times.pack += has_packed - has_read;
        times.upload += has_packed.elapsed();
        offset_bytes += words.len() as u64 * 4;
    }
    Ok(())
}

/// Packs up to `TILE` rows of `cols` values out of `rows` into `out`, `tile_words` long.
fn pack_tile(format: WeightFormat, cols: u32, rows: &[u8], out: &mut [u32]) {
    let layout = Layout::of(format);
    let block_words = layout.block_words() as usize;
    out.fill(0);
    let mut block = Block::default();
    let mut words = [0u32; 64];
    let file_bytes = format.row_bytes(UNIT * layout.units) as usize;
    for (index, row) in rows.chunks_exact(format.row_bytes(cols) as usize).enumerate() {
        for (bytes, out) in row.chunks(file_bytes).zip(out.chunks_exact_mut(block_words * TILE as usize)) {
            let words = &mut words[..block_words];
            match layout.float {
                0 => {
                    block.read(format, bytes);
                    block.pack(layout, words);
                }
                _ => pack_floats(layout.float == 1, bytes, words),
            }
            for (word, out) in words.iter().zip(out.chunks_exact_mut(TILE as usize)) {
                out[index] = *word;
            }
        }
    }
}

/// A row's last unit may be short; the rest of it is zeros.
fn pack_floats(wide: bool, bytes: &[u8], words: &mut [u32]) {
    words.fill(0);
    let step = if wide { 4 } else { 2 };
    for (index, value) in bytes.chunks_exact(step).enumerate() {
        match wide {
            true => words[index] = u32::from_le_bytes([value[0], value[1], value[2], value[3]]),
            false => words[index / 2] |= u32::from(half_at(value, 0)) << (index % 2 * 16),
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// A block of the file, taken apart.
struct Block {
    /// Codes in the order of K.
    codes: [u8; 256],
    /// f16 bits of the scale, and of the min or the scale of the mins.
    scale: u16,
    min: u16,
    /// A unit's small scales, as the shader reads them.
    small: [u16; 8],
}

impl Default for Block {
    fn default() -> Block {
        Block { codes: [0; 256], scale: 0, min: 0, small: [0; 8] }
    }
}

impl Block {
    fn pack(&self, layout: Layout, words: &mut [u32]) {
        words.fill(0);
        words[0] = u32::from(self.scale) | u32::from(self.min) << 16;
        let units = layout.units as usize;
        if units > 1 {
            for (unit, small) in self.small.iter().enumerate() {
                words[1 + unit / 2] |= u32::from(*small) << (unit % 2 * 16);
            }
        }
        let codes = &self.codes[..units * UNIT as usize];
        let mut plane = |at: u32, shift: u32, bits: u32| {
            let Some(a_word) = 32u32.checked_div(bits) else { return };
            let words = &mut words[at as usize..];
            for (word, codes) in words.iter_mut().zip(codes.chunks_exact(a_word as usize)) {
                let field = |code: &u8| u32::from(code >> shift) & ((1 << bits) - 1);
                *word = codes.iter().rev().fold(0, |word, code| word << bits | field(code));
            }
        };
        plane(layout.low_at(), 0, layout.low_bits);
        plane(layout.high_at(), layout.low_bits, layout.high_bits);
    }

    /// Takes one block of `format` apart; layouts are GGML's.
    fn read(&mut self, format: WeightFormat, bytes: &[u8]) {
        match format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => unreachable!("floats have no codes"),
            WeightFormat::Q4_0 | WeightFormat::IQ4NL => {
                self.scale = half_at(bytes, 0);
                self.nibbles(0, &bytes[2..18]);
            }
            WeightFormat::Q4_1 => {
                self.scale = half_at(bytes, 0);
                self.min = half_at(bytes, 2);
                self.nibbles(0, &bytes[4..20]);
            }
            WeightFormat::Q5_0 => {
                self.scale = half_at(bytes, 0);
                self.nibbles(0, &bytes[6..22]);
                self.fifth_bits(&bytes[2..6]);
            }
            WeightFormat::Q5_1 => {
                self.scale = half_at(bytes, 0);
                self.min = half_at(bytes, 2);
                self.nibbles(0, &bytes[8..24]);
                self.fifth_bits(&bytes[4..8]);
            }
            WeightFormat::Q8_0 => {
                self.scale = half_at(bytes, 0);
                for (code, byte) in self.codes.iter_mut().zip(&bytes[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            WeightFormat::Q2K => self.read_q2_k(bytes),
            WeightFormat::Q3K => self.read_q3_k(bytes),
            WeightFormat::Q4K => self.read_q4_k(bytes, &bytes[16..144]),
            WeightFormat::Q5K => {
                self.read_q4_k(bytes, &bytes[48..176]);
                for (index, code) in self.codes.iter_mut().enumerate() {
                    *code |= (bytes[16 + index % 32] >> (index / 32) & 1) << 4;
                }
            }
            WeightFormat::Q6K => self.read_q6_k(bytes),
            WeightFormat::IQ4XS => self.read_iq4_xs(bytes),
        }
    }

    /// 32 codes from 16 bytes: the low nibbles, then the high ones.
    fn nibbles(&mut self, at: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.codes[at + index] = byte & 15;
            self.codes[at + 16 + index] = byte >> 4;
        }
    }

    fn fifth_bits(&mut self, bytes: &[u8]) {
        for (index, code) in self.codes[..32].iter_mut().enumerate() {
            *code |= (bytes[index / 8] >> (index % 8) & 1) << 4;
        }
    }

    /// Codes of 2 bits: 32 bytes hold four runs of 32.
    fn crumbs(&mut self, bytes: &[u8]) {
        for (index, code) in self.codes.iter_mut().enumerate() {
            let (half, run, lane) = (index / 128, index / 32 % 4, index % 32);
            *code = bytes[32 * half + lane] >> (2 * run) & 3;
        }
    }

    /// 16 scales, each with a min in its high nibble; 64 bytes of codes; the two f16.
    fn read_q2_k(&mut self, bytes: &[u8]) {
        self.crumbs(&bytes[16..80]);
        self.small = std::array::from_fn(|unit| half_at(bytes, 2 * unit));
        self.scale = half_at(bytes, 80);
        self.min = half_at(bytes, 82);
    }

    /// 32 bytes of third bits, 64 of codes, 16 scales of 6 bits in 12 bytes, the f16.
    fn read_q3_k(&mut self, bytes: &[u8]) {
        self.crumbs(&bytes[32..96]);
        for (index, code) in self.codes.iter_mut().enumerate() {
            *code |= (bytes[index % 32] >> (index / 32) & 1) << 2;
        }
        let packed = &bytes[96..108];
        self.small = two_scales(|index| {
            let low = packed[index % 8] >> (index / 8 * 4) & 15;
            let high = packed[8 + index % 4] >> (index / 4 * 2) & 3;
            (low | high << 4) as i8 - 32
        });
        self.scale = half_at(bytes, 108);
    }

    /// The two f16, 8 scales and 8 mins of 6 bits in 12 bytes; `codes` are four runs of 32 bytes.
    fn read_q4_k(&mut self, bytes: &[u8], codes: &[u8]) {
        self.scale = half_at(bytes, 0);
        self.min = half_at(bytes, 2);
        let packed = &bytes[4..16];
        self.small = std::array::from_fn(|unit| {
            let (scale, min) = match unit {
                0..4 => (packed[unit] & 63, packed[unit + 4] & 63),
                _ => {
                    (packed[unit + 4] & 15 | packed[unit - 4] >> 6 << 4, packed[unit + 4] >> 4 | packed[unit] >> 6 << 4)
                }
            };
            u16::from_le_bytes([scale, min])
        });
        for (index, code) in self.codes.iter_mut().enumerate() {
            let (run, high, lane) = (index / 64, index / 32 % 2, index % 32);
            *code = codes[32 * run + lane] >> (4 * high) & 15;
        }
    }

    /// 128 bytes of low nibbles, 64 of high pairs of bits, 16 signed scales, the f16.
    fn read_q6_k(&mut self, bytes: &[u8]) {
        for (index, code) in self.codes.iter_mut().enumerate() {
            let (half, run, lane) = (index / 128, index / 32 % 4, index % 32);
            let low = bytes[64 * half + 32 * (run % 2) + lane] >> (4 * (run / 2)) & 15;
            let high = bytes[128 + 32 * half + lane] >> (2 * run) & 3;
            *code = low | high << 4;
        }
        self.small = two_scales(|index| bytes[192 + index] as i8);
        self.scale = half_at(bytes, 208);
    }

    /// The f16, high bits of 8 scales, their low nibbles, 128 bytes of codes.
    fn read_iq4_xs(&mut self, bytes: &[u8]) {
        self.scale = half_at(bytes, 0);
        let high_bits = half_at(bytes, 2);
        self.small = two_scales(|index| {
            let unit = index / 2;
            let low = bytes[4 + unit / 2] >> (unit % 2 * 4) & 15;
            let high = (high_bits >> (2 * unit) & 3) as u8;
            (low | high << 4) as i8 - 32
        });
        for unit in 0..8 {
            self.nibbles(32 * unit, &bytes[8 + 16 * unit..24 + 16 * unit]);
        }
    }
}

/// Two signed scales a unit, by the index of the scale among 16.
fn two_scales(scale: impl Fn(usize) -> i8) -> [u16; 8] {
    std::array::from_fn(|unit| u16::from_le_bytes([scale(2 * unit) as u8, scale(2 * unit + 1) as u8]))
}

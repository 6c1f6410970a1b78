//! Weights as the cpu reads them: panels of 32 rows, interleaved, so that a vector holds one column of eight rows.
//!
//! Codes stay codes: four bits where a format's span sixteen values, else eight; floats keep their type. Scales and
//! mins are f32, one a row and group. Invariant: an unpacked value equals `dequantize_row` bit for bit.

use half::{bf16, f16};
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::backend::{LoadError, RowSource, WeightSpec};
use crate::format::quant::{Block, MAX_BLOCK_LEN, decode_block};
use crate::tensor::WeightFormat;

/// Rows of a panel.
pub const PANEL: usize = 32;

/// How the codes of a format lie in a panel; `k` is the column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[k][16]` bytes: row j in the low nibble of byte j, row j + 16 in the high one. A code is nibble + `least`.
    Nibbles {
        least: i8,
    },
    /// `[k][32]` signed bytes.
    Bytes,
    /// `[k][32]` f16 or bf16.
    F16,
    BF16,
    /// `[k][32]` f32.
    F32,
}

impl Layout {
    pub const fn of(format: WeightFormat) -> Layout {
        match format {
            WeightFormat::F32 => Layout::F32,
            WeightFormat::F16 => Layout::F16,
            WeightFormat::BF16 => Layout::BF16,
            WeightFormat::Q4_0 => Layout::Nibbles { least: -8 },
            WeightFormat::Q3K => Layout::Nibbles { least: -4 },
            WeightFormat::Q4_1 | WeightFormat::Q4K | WeightFormat::Q2K => Layout::Nibbles { least: 0 },
            _ => Layout::Bytes,
        }
    }

    /// Bytes of one column of a panel.
    pub const fn column_bytes(self) -> usize {
        match self {
            Layout::Nibbles { .. } => PANEL / 2,
            Layout::Bytes => PANEL,
            Layout::F16 | Layout::BF16 => 2 * PANEL,
            Layout::F32 => 4 * PANEL,
        }
    }
}

/// Elements of a row that share a scale; 0 for floats, which have none.
const fn group_len(format: WeightFormat) -> usize {
    match format {
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => 0,
        WeightFormat::Q2K | WeightFormat::Q3K | WeightFormat::Q6K => 16,
        _ => 32,
    }
}

const fn has_min(format: WeightFormat) -> bool {
    matches!(
        format,
        WeightFormat::Q4_1 | WeightFormat::Q5_1 | WeightFormat::Q2K | WeightFormat::Q4K | WeightFormat::Q5K
    )
}

pub struct PackedWeight {
    pub layout: Layout,
    pub rows: usize,
    pub cols: usize,
    pub group_len: usize,
    /// `[panel]` of columns. Words, because floats must be aligned.
    codes: Vec<u32>,
    /// `[panel][group][32]`
    scales: Vec<f32>,
    /// As `scales`, or empty.
    mins: Vec<f32>,
}

/// One panel of a weight.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    pub layout: Layout,
    pub cols: usize,
    pub group_len: usize,
    /// `cols * layout.column_bytes()` bytes.
    pub codes: &'a [u8],
    /// `[group][32]`
    pub scales: &'a [f32],
    /// As `scales`, or empty.
    pub mins: &'a [f32],
}

impl PackedWeight {
    pub fn load(spec: &WeightSpec, source: &mut dyn RowSource, pool: &ThreadPool) -> Result<PackedWeight, LoadError> {
        let (rows, cols) = (spec.rows as usize, spec.cols as usize);
        let layout = Layout::of(spec.format);
        let num_panels = rows.div_ceil(PANEL);
        let num_groups = num_groups(spec);
        let mins_len = if has_min(spec.format) { num_groups * PANEL } else { 0 };
        let mut packed = PackedWeight {
            layout,
            rows,
            cols,
            group_len: group_len(spec.format),
            codes: vec![0; num_panels * cols * layout.column_bytes() / 4],
            scales: vec![0.0; num_panels * num_groups * PANEL],
            mins: vec![0.0; num_panels * mins_len],
        };
        let row_bytes = spec.format.row_bytes(spec.cols) as usize;
        // A few megabytes of the file at a time.
        let panels_at_once = ((4 << 20) / (row_bytes * PANEL).max(1)).max(1);
        let mut staging = Vec::new();
        let codes_of = cols * layout.column_bytes() / 4;
        for first in (0..num_panels).step_by(panels_at_once) {
            let last = (first + panels_at_once).min(num_panels);
            let num_rows = (last * PANEL).min(rows) - first * PANEL;
            staging.resize(num_rows * row_bytes, 0);
            let read = source.read_rows(&mut staging);
            read.map_err(|source| LoadError::Read { name: spec.name.clone(), source })?;
            let codes = packed.codes[first * codes_of..last * codes_of].par_chunks_mut(codes_of);
            let scales = chunks(&mut packed.scales, first..last, num_groups * PANEL);
            let mins = chunks(&mut packed.mins, first..last, mins_len);
            let work = codes.zip(scales).zip(mins).zip(staging.par_chunks(row_bytes * PANEL));
            pool.install(|| {
                work.for_each(|(((codes, scales), mins), bytes)| {
                    pack_panel(spec, bytes, bytemuck::cast_slice_mut(codes), scales, mins);
                });
            });
        }
        Ok(packed)
    }

    /// Bytes that `load` would allocate.
    pub fn size_bytes(spec: &WeightSpec) -> u64 {
        let per_panel = spec.cols as usize * Layout::of(spec.format).column_bytes();
        let scale_bytes = num_groups(spec) * PANEL * 4 * if has_min(spec.format) { 2 } else { 1 };
        spec.rows.div_ceil(PANEL as u32) as u64 * (per_panel + scale_bytes) as u64
    }

    pub fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub fn panel(&self, index: usize) -> Panel<'_> {
        let codes: &[u8] = bytemuck::cast_slice(&self.codes);
        let codes_of = self.cols * self.layout.column_bytes();
        let scales_of = self.scales.len() / self.num_panels();
        let mins_of = self.mins.len() / self.num_panels();
        Panel {
            layout: self.layout,
            cols: self.cols,
            group_len: self.group_len,
            codes: &codes[index * codes_of..][..codes_of],
            scales: &self.scales[index * scales_of..][..scales_of],
            mins: &self.mins[index * mins_of..][..mins_of],
        }
    }

    /// The values of one row.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        let panel = self.panel(row / PANEL);
        for (k, out) in out.iter_mut().enumerate() {
            *out = panel.value(row % PANEL, k);
        }
    }
}

impl Panel<'_> {
    fn value(&self, row: usize, k: usize) -> f32 {
        let column = &self.codes[k * self.layout.column_bytes()..][..self.layout.column_bytes()];
        let code = match self.layout {
            Layout::F32 => return bytemuck::cast_slice(column)[row],
            Layout::F16 => return f16::from_bits(bytemuck::cast_slice(column)[row]).to_f32(),
            Layout::BF16 => return bf16::from_bits(bytemuck::cast_slice(column)[row]).to_f32(),
            Layout::Bytes => column[row].cast_signed(),
            Layout::Nibbles { least } => (column[row % 16] >> (row / 16 * 4) & 15).cast_signed() + least,
        };
        let at = k / self.group_len * PANEL + row;
        let scaled = self.scales[at] * f32::from(code);
        match self.mins {
            [] => scaled,
            mins => scaled - mins[at],
        }
    }
}

fn num_groups(spec: &WeightSpec) -> usize {
    (spec.cols as usize).checked_div(group_len(spec.format)).unwrap_or(0)
}

/// The part of `values` that belongs to a range of panels, a chunk each; empty chunks where there is none.
fn chunks(
    values: &mut [f32],
    panels: std::ops::Range<usize>,
    len: usize,
) -> impl IndexedParallelIterator<Item = &mut [f32]> {
    let mut rest = &mut values[panels.start * len..panels.end * len];
    let mut chunks = Vec::with_capacity(panels.len());
    for _ in panels {
        let (chunk, others) = rest.split_at_mut(len);
        chunks.push(chunk);
        rest = others;
    }
    chunks.into_par_iter()
}

/// Interleaves up to 32 rows of the file.
fn pack_panel(spec: &WeightSpec, bytes: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
    let layout = Layout::of(spec.format);
    let row_bytes = spec.format.row_bytes(spec.cols) as usize;
    let column_bytes = layout.column_bytes();
    for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
        if group_len(spec.format) == 0 {
            let width = column_bytes / PANEL;
            for (column, element) in codes.chunks_exact_mut(column_bytes).zip(bytes.chunks_exact(width)) {
                column[row * width..][..width].copy_from_slice(element);
            }
            continue;
        }
        let blocks = bytes.chunks_exact(spec.format.block_bytes() as usize);
        for (index, bytes) in blocks.enumerate() {
            let block = decode_block(spec.format, bytes);
            let block_len = spec.format.block_len() as usize;
            let columns = &mut codes[index * block_len * column_bytes..][..block_len * column_bytes];
            pack_codes(layout, &block.codes, row, columns);
            pack_scales(&block, block_len, index, row, scales, mins);
        }
    }
}

fn pack_codes(layout: Layout, codes: &[i16; MAX_BLOCK_LEN], row: usize, columns: &mut [u8]) {
    for (column, &code) in columns.chunks_exact_mut(layout.column_bytes()).zip(codes) {
        match layout {
            Layout::Nibbles { least } => column[row % 16] |= ((code - i16::from(least)) as u8) << (row / 16 * 4),
            _ => column[row] = code as i8 as u8,
        }
    }
}

fn pack_scales(block: &Block, block_len: usize, index: usize, row: usize, scales: &mut [f32], mins: &mut [f32]) {
    let num_groups = block_len / block.group_len;
    for group in 0..num_groups {
        let at = (index * num_groups + group) * PANEL + row;
        scales[at] = block.scale[group];
        if let Some(min) = mins.get_mut(at) {
            *min = block.min[group];
        }
    }
}

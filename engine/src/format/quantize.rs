//! From floats to blocks of Q8_0 and Q4_0, row by row, for weights that are packed while they are loaded.
//!
//! The blocks are GGML's, rounding included (`quantize_row_q8_0_ref`, `quantize_row_q4_0_ref` in ggml-quants.c), so
//! that a model packed here computes what one computes that llama.cpp's tool packed. Invariant: a row with a NaN or an
//! infinity is refused. This file knows no file and no backend.

use std::io;

use half::f16;
use rayon::prelude::*;

use super::quant::dequantize_row;
use crate::backend::RowSource;
use crate::tensor::WeightFormat;

const BLOCK: usize = 32;
/// Elements that are widened at one time, about.
const PIECE: usize = 1 << 20;

/// Rows of `cols` floats, packed as they are read.
pub struct QuantizedRows {
    pub source: Box<dyn RowSource>,
    pub from: WeightFormat,
    /// One of [`TARGETS`].
    pub to: WeightFormat,
    pub cols: u32,
}

/// What floats can be packed to.
pub const TARGETS: [WeightFormat; 2] = [WeightFormat::Q8_0, WeightFormat::Q4_0];

/// Whether rows of `cols` elements of a format are packed, and not passed on as they are.
pub fn is_packed(format: WeightFormat, cols: u32) -> bool {
    matches!(format, WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16) && cols.is_multiple_of(BLOCK as u32)
}

impl RowSource for QuantizedRows {
    fn read_rows(&mut self, out: &mut [u8]) -> io::Result<()> {
        let (from_bytes, to_bytes) = (self.from.row_bytes(self.cols) as usize, self.to.row_bytes(self.cols) as usize);
        assert!(out.len().is_multiple_of(to_bytes), "{} bytes are no whole rows of {to_bytes}", out.len());
        let rows_at_once = (PIECE / self.cols as usize).max(1);
        for out in out.chunks_mut(rows_at_once * to_bytes) {
            let mut bytes = vec![0; out.len() / to_bytes * from_bytes];
            self.source.read_rows(&mut bytes)?;
            let rows = bytes.par_chunks(from_bytes).zip(out.par_chunks_mut(to_bytes));
            let all_finite = rows.map(|(bytes, out)| {
                let mut values = vec![0.0; self.cols as usize];
                dequantize_row(self.from, bytes, &mut values);
                quantize_row(self.to, &values, out);
                values.iter().all(|value| value.is_finite())
            });
            if !all_finite.reduce(|| true, |a, b| a && b) {
                let sentence = "a weight is not finite (NaN or infinity), so it cannot be quantised";
                return Err(io::Error::new(io::ErrorKind::InvalidData, sentence));
            }
        }
        Ok(())
    }
}

/// Packs whole blocks of finite `values` into `out`.
pub fn quantize_row(to: WeightFormat, values: &[f32], out: &mut [u8]) {
    assert_eq!(out.len() as u64, to.row_bytes(values.len() as u32), "bytes of {} {} elements", values.len(), to.name());
    let blocks = values.chunks_exact(BLOCK).zip(out.chunks_exact_mut(to.block_bytes() as usize));
    match to {
        WeightFormat::Q8_0 => blocks.for_each(|(values, out)| q8_0(values, out)),
        WeightFormat::Q4_0 => blocks.for_each(|(values, out)| q4_0(values, out)),
        _ => unreachable!("{} is none of TARGETS", to.name()),
    }
}

fn q8_0(values: &[f32], out: &mut [u8]) {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let steps = write_scale(largest / 127.0, out);
    for (code, value) in out[2..].iter_mut().zip(values) {
        *code = ((value * steps).round() as i8).cast_unsigned();
    }
}

fn q4_0(values: &[f32], out: &mut [u8]) {
    let extreme =
        values.iter().fold(0.0f32, |extreme, value| if value.abs() > extreme.abs() { *value } else { extreme });
    let steps = write_scale(extreme / -8.0, out);
    let code = |value: f32| ((value * steps + 8.5) as u8).min(15);
    let (low, high) = values.split_at(BLOCK / 2);
    for ((both, low), high) in out[2..].iter_mut().zip(low).zip(high) {
        *both = code(*low) | code(*high) << 4;
    }
}

/// Writes a scale as f16 and returns how many of it there are in 1; none of a scale that is zero.
fn write_scale(scale: f32, out: &mut [u8]) -> f32 {
    out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(to: WeightFormat, values: &[f32]) -> String {
        let mut out = vec![0xee; to.row_bytes(values.len() as u32) as usize];
        quantize_row(to, values, &mut out);
        out.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// By `gguf.quants.quantize` of PyPI's gguf.
    #[test]
    fn blocks_are_gguf_s_bit_for_bit() {
        let mut values: Vec<f32> = (0..64).map(|i| ((i * 37 + 11) % 64) as f32).map(|v| (v - 31.5) / 16.0).collect();
        values[32..].iter_mut().for_each(|value| *value *= 2.0);
        values[5] = -7.25;
        let q8_0 = "4f2bea12f51dff810aed15f82003e50ef019fbde06e811f31cfee109ec14f71f02e4\
                    f0272ec257ea7f12a53ace63f6891eb147da6f02952abd53e67b0ea136ca5ff2851a";
        let q4_0 = "403b8769877a9870a98769977a9876a9876ae0b7158cf359c037ae047be259bf269df46a";
        assert_eq!(packed(WeightFormat::Q8_0, &values), q8_0);
        assert_eq!(packed(WeightFormat::Q4_0, &values), q4_0);
        assert_eq!(packed(WeightFormat::Q8_0, &[0.0; 32]), "00".repeat(34));
        assert_eq!(packed(WeightFormat::Q4_0, &[0.0; 32]), "0080".to_owned() + &"88".repeat(16));
    }

    struct Bytes(Vec<u8>);

    impl RowSource for Bytes {
        fn read_rows(&mut self, out: &mut [u8]) -> io::Result<()> {
            out.copy_from_slice(&self.0.drain(..out.len()).collect::<Vec<u8>>());
            Ok(())
        }
    }

    #[test]
    fn rows_are_packed_as_they_are_read_and_broken_ones_refused() {
        let read = |values: &[f32]| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let (from, to) = (WeightFormat::F32, WeightFormat::Q4_0);
            let mut rows = QuantizedRows { source: Box::new(Bytes(bytes)), from, to, cols: 32 };
            let mut out = vec![0; 4 * 18];
            rows.read_rows(&mut out[..18])?;
            rows.read_rows(&mut out[18..])?;
            Ok::<_, io::Error>(out)
        };
        let mut values: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut whole = vec![0; 4 * 18];
        quantize_row(WeightFormat::Q4_0, &values, &mut whole);
        assert_eq!(read(&values).expect("finite"), whole);
        for broken in [f32::NAN, f32::NEG_INFINITY] {
            values[77] = broken;
            let error = read(&values).expect_err("a weight is broken").to_string();
            assert!(error.contains("not finite"), "{error}");
        }
    }
}

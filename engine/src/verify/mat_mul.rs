//! Cases of `mat_mul`: a format of weights, and how many rows of activations.

use super::device::{Device, MAT_MUL_TOLERANCE};
use super::random::Random;
use super::{Case, Output};
use crate::backend::DeviceError;
use crate::op::{AddNorm, MatMul, Op};
use crate::tensor::{Tensor, Weight, WeightFormat};
use crate::tuning::{MatMulKernel, MatMulLine, MatMulShape};

/// Of spans that are longer than what a kernel for one row stages at once, the last of them short.
pub const LONG_K: u32 = 8448;

/// With a bias where M is odd.
pub fn mat_mul(format: WeightFormat, m: u32, n: u32, k: u32) -> Case {
    let shape = format!("M {m} N {n} K {k}{}", if m % 2 == 1 { ", bias" } else { "" });
    Case::new("mat_mul", format.name(), shape, move |device| {
        let random = &mut Random::new(3);
        let weight = device.weight(format, n, k, 4)?;
        let x = device.random(m, k, random)?;
        let bias = if m % 2 == 1 { Some(device.random(1, n, random)?) } else { None };
        let out = device.unwritten(m, n)?;
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias, first_col: 0, out })], &[out])?;
        Ok(Output::f32(words, device.mat_mul_tolerance(format)))
    })
    .of_formats(&[format])
}

/// A product whose sums a norm may add up, and that norm.
struct BeforeNorm {
    ops: [Op; 2],
    /// What the product was added to.
    added: Tensor,
    normed: Tensor,
}

impl BeforeNorm {
    /// Rows are the same however many there are.
    fn new(device: &mut Device, x: Tensor, weight: Weight, has_post: bool) -> Result<BeforeNorm, DeviceError> {
        let ((m, n), random) = ((x.rows, weight.rows), &mut Random::new(12));
        let (norm, post) = (device.random(1, n, random)?, device.random(1, n, random)?);
        let (added, y, normed) = (device.random(m, n, random)?, device.unwritten(m, n)?, device.unwritten(m, n)?);
        let product = MatMul { x, weight, bias: None, first_col: 0, out: y };
        let post_weight = has_post.then_some(post);
        let add_norm = AddNorm { x: added, y, post_weight, rows: None, weight: norm, eps: 1e-5, out: normed };
        Ok(BeforeNorm { ops: [Op::MatMul(product), Op::AddNorm(add_norm)], added, normed })
    }
}

/// Products of so many rows before a norm: few share K among workgroups, and the norm adds up what these leave.
pub fn before_norm(format: WeightFormat, rows: &'static [u32], has_post: bool) -> Case {
    // Two spans of K.
    let (n, k, most) = (70, 1280, *rows.last().expect("several numbers of rows"));
    let shape = format!("N {n} K {k}, before {}", if has_post { "two norms" } else { "a norm" });
    Case::new("mat_mul", format.name(), shape, move |device| {
        let (weight, x) = (device.weight(format, n, k, 4)?, device.random(most, k, &mut Random::new(3))?);
        let each = rows.iter().map(|&m| BeforeNorm::new(device, x.first_rows(m), weight, has_post));
        let each = each.collect::<Result<Vec<_>, _>>()?;
        let ops: Vec<Op> = each.iter().flat_map(|one| one.ops).collect();
        let words = device.run(&ops, &each.iter().map(|one| one.added).collect::<Vec<_>>())?;
        Ok(vec![Output { name: "added", words, tolerance: device.mat_mul_tolerance(format) }])
    })
    .of_formats(&[format])
}

/// By one kernel alone, on rows that fill a workgroup of it and begin another; where workgroups may share K, before
/// a norm too, which adds up their sums.
pub fn by_kernel(format: WeightFormat, kernel: &MatMulKernel) -> Case {
    let (shares, tolerance) = (kernel.least_cols > 1, kernel.tolerance);
    let k = match kernel.rows {
        1 | 2 => LONG_K,
        _ if shares => 2304,
        _ => 512,
    };
    let (m, n) = (kernel.rows + 1, 70);
    let (variant, table) = (format!("{}, {}", format.name(), kernel.name), MatMulLine::only(&kernel.name));
    Case::new("mat_mul", &variant, format!("M {m} N {n} K {k}"), move |device| {
        let random = &mut Random::new(3);
        let weight = device.weight(format, n, k, 4)?;
        let (x, out) = (device.random(m, k, random)?, device.unwritten(m, n)?);
        let before_norm = BeforeNorm::new(device, x, weight, false)?;
        let [product, add_norm] = before_norm.ops;
        let ops = [Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out }), product, add_norm];
        let shape = MatMulShape::of(weight);
        let before = device.backend().mat_mul_table(shape);
        device.backend().set_mat_mul_table(shape, &table).expect("a kernel that the device has named");
        let words = if shares { device.run(&ops, &[out, before_norm.added]) } else { device.run(&ops[..1], &[out]) };
        device.backend().set_mat_mul_table(shape, &before).expect("the table that was there");
        let mut words = words?;
        let after = words.split_off((m * n) as usize);
        let mut outputs = Output::f32(words, tolerance);
        if shares {
            outputs.push(Output { name: "added", words: after, tolerance });
        }
        Ok(outputs)
    })
    .of_formats(&[format])
}

/// How many elements the kernels of a table write otherwise than the first of them, by themselves and before a norm:
/// none, where they are in f32.
pub fn same_bits(format: WeightFormat) -> Case {
    // Two spans, and rows of more than one workgroup.
    let (m, n, k) = (18, 70, 1312 / format.block_len() * format.block_len());
    Case::new("mat_mul", &format!("{}, all kernels", format.name()), format!("M {m} N {n} K {k}"), move |device| {
        let random = &mut Random::new(3);
        let (weight, x) = (device.weight(format, n, k, 4)?, device.random(m, k, random)?);
        let shape = MatMulShape::of(weight);
        let mut kernels = device.backend().mat_mul_kernels(format);
        kernels.retain(|kernel| kernel.tolerance <= MAT_MUL_TOLERANCE && kernel.least_cols <= k);
        let before = device.backend().mat_mul_table(shape);
        let mut written = Vec::new();
        for kernel in kernels {
            let (out, before_norm) = (device.unwritten(m, n)?, BeforeNorm::new(device, x, weight, false)?);
            let [product, add_norm] = before_norm.ops;
            let ops = [Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out }), product, add_norm];
            let table = MatMulLine::only(&kernel.name);
            device.backend().set_mat_mul_table(shape, &table).expect("a kernel that the device has named");
            written.push(device.run(&ops, &[out, before_norm.added]));
        }
        device.backend().set_mat_mul_table(shape, &before).expect("the table that was there");
        let written = written.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(Output::differing(written.iter().map(|words| (&words[..], &written[0][..]))))
    })
    .of_formats(&[format])
}

/// How many elements of products of so many rows, by whatever kernels the device's table has for them, by themselves
/// and before a norm, are not the same to the bit as in that of the most, which is the last.
pub fn in_company(format: WeightFormat, rows: &'static [u32], has_post: bool) -> Case {
    let (n, k, most) = (161, 1280, *rows.last().expect("several numbers of rows"));
    Case::new("mat_mul", format.name(), format!("N {n} K {k}, alone and in company"), move |device| {
        let (weight, x) = (device.weight(format, n, k, 4)?, device.random(most, k, &mut Random::new(3))?);
        let (mut ops, mut written) = (Vec::new(), Vec::new());
        for &m in rows {
            let (x, out) = (x.first_rows(m), device.unwritten(m, n)?);
            let before_norm = BeforeNorm::new(device, x, weight, has_post)?;
            ops.push(Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out }));
            ops.extend(before_norm.ops);
            written.push([out, before_norm.added, before_norm.normed]);
        }
        let words = device.run(&ops, written.as_flattened())?;
        let mut rest = &words[..];
        let mut next = |tensor: &Tensor| rest.split_off(..tensor.num_elements() as usize).expect("all rows");
        let written: Vec<[&[u32]; 3]> = written.iter().map(|tensors| tensors.each_ref().map(&mut next)).collect();
        let whole = written[written.len() - 1];
        let pairs = written.iter().flat_map(|words| words.iter().zip(whole));
        Ok(Output::differing(pairs.map(|(words, whole)| (*words, &whole[..words.len()]))))
    })
    .of_formats(&[format])
}

/// More workgroups than a dispatch has in a row, where the kernel for the fewest rows takes all. For devices alone:
/// they are too many to be imitated.
pub fn many_workgroups() -> Case {
    let (format, m, n, k) = (WeightFormat::Q8_0, 2100, 1024, 32);
    Case::new("mat_mul", format.name(), format!("M {m} N {n} K {k}, by the kernel for fewest rows"), move |device| {
        let random = &mut Random::new(3);
        let (weight, x, out) = (device.weight(format, n, k, 4)?, device.random(m, k, random)?, device.unwritten(m, n)?);
        let (shape, tolerance) = (MatMulShape::of(weight), device.mat_mul_tolerance(format));
        let kernels = device.backend().mat_mul_kernels(format).into_iter();
        let fewest = kernels.filter(|kernel| kernel.least_cols <= k).min_by_key(|kernel| kernel.rows);
        let before = device.backend().mat_mul_table(shape);
        let table = fewest.map_or(before.clone(), |kernel| MatMulLine::only(&kernel.name).to_vec());
        device.backend().set_mat_mul_table(shape, &table).expect("a kernel that the device has named");
        let words = device.run(&[Op::MatMul(MatMul { x, weight, bias: None, first_col: 0, out })], &[out]);
        device.backend().set_mat_mul_table(shape, &before).expect("the table that was there");
        Ok(Output::f32(words?, tolerance))
    })
    .of_formats(&[format])
}

/// Two products in one tensor, whose other columns stay as they are; of rows that fill a tile, and a few more.
pub fn into_columns(left: WeightFormat, right: WeightFormat) -> Case {
    let variant = format!("{}, {}", left.name(), right.name());
    let formats = [left, right];
    Case::new("mat_mul", &variant, "M 67 N 40 and 24 K 256, into columns".to_owned(), move |device| {
        let random = &mut Random::new(3);
        let (left, right) = (device.weight(left, 40, 256, 4)?, device.weight(right, 24, 256, 5)?);
        let (x, bias) = (device.random(67, 256, random)?, device.random(1, 24, random)?);
        let out = device.f32(67, 80, &[7.0; 67 * 80])?;
        let ops = [(left, None, 3), (right, Some(bias), 43)];
        let ops = ops.map(|(weight, bias, first_col)| Op::MatMul(MatMul { x, weight, bias, first_col, out }));
        let tolerance = formats.map(|format| device.mat_mul_tolerance(format)).into_iter().fold(0.0, f32::max);
        Ok(Output::f32(device.run(&ops, &[out])?, tolerance))
    })
    .of_formats(&formats)
}

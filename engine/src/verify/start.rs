//! The short form before a model is loaded: the kernels that it will use, on small shapes, and a plainer backend where
//! one of them is wrong.
//!
//! Invariant: what passes here has computed every case as the twin does. No backend is known by name: who asks says
//! what is plainer than what.

use super::attention::{self, Heads, Turn, attention, rope_kv, stores};
use super::device::Device;
use super::mat_mul::{self, LONG_K, before_norm, mat_mul};
use super::rows::{add_norm, embed, gated_act, rms_norm, update_table};
use super::sample::sample;
use super::{Case, Check, holds_in_company, twin};
use crate::backend::{Backend, DeviceError, DeviceInfo, ModelKernels};
use crate::model::ModelConfig;
use crate::model::config::Family;
use crate::tensor::{KvType, WeightFormat};
use crate::tuning::{MatMulLine, MatMulShape};

/// Why no backend was left.
#[derive(Debug, thiserror::Error)]
pub enum StartCheckError<E: std::error::Error + 'static> {
    #[error(
        "device {device} computes wrongly with its plainest kernels, or cannot make them: {what}; update its driver \
         ({driver}), or choose another device (--device cpu); `fullbore verify --device {device}` says more, \
         --no-verify starts all the same"
    )]
    Wrong { device: String, driver: String, what: String },
    #[error(transparent)]
    Twin(DeviceError),
    #[error(transparent)]
    Plainer(E),
}

/// Rows that between them reach every matmul kernel of every tier's own table.
pub const MAT_MUL_ROWS: [u32; 11] = [1, 2, 3, 4, 5, 7, 8, 12, 18, 34, 66];
/// And those of a long prompt, where a table has a kernel of their own, on a small shape.
pub const PROMPT_ROWS: u32 = 514;

/// What a model makes of a device: every variant that its formats, its heads and its cache call for.
pub fn cases_of_model(
    backend: &dyn Backend,
    config: &ModelConfig,
    formats: &[WeightFormat],
    kv_type: KvType,
) -> Vec<Case> {
    let (head_dim, rotary_dim) = (config.head_dim, config.rope.rotary_dim);
    let has_norms = matches!(config.family, Family::Qwen3 | Family::Gemma3);
    let has_post = has_post(config);
    let mut cases = vec![
        update_table(),
        rms_norm(2, config.dim.min(1024)),
        rope_kv(kv_type, Turn { style: config.rope_style, head_dim, rotary_dim, has_norms }),
        gated_act(config.activation, 2, 100),
        add_norm(2, 3, 100, has_post),
        stores(kv_type, head_dim),
        sample(500),
    ];
    cases.extend(heads_of(config).into_iter().map(|heads| attention(kv_type, heads)));
    for &format in formats {
        cases.push(embed(format));
        // Two spans of K, and columns that fill no tile.
        cases.extend(MAT_MUL_ROWS.map(|m| mat_mul(format, m, 161, 1280)));
        cases.push(before_norm(format, &MAT_MUL_ROWS, has_post));
        cases.push(mat_mul(format, 1, 40, LONG_K));
        let (rows, cols) = (40, 256);
        let table = backend.mat_mul_table(MatMulShape { format, rows, cols });
        // Of CUDA's, one kernel divides K for few rows and not for many.
        if backend.matrix_size().is_some() || has_prompt_kernel(&table) {
            cases.push(mat_mul(format, PROMPT_ROWS, rows, cols));
        }
    }
    cases
}

/// Whether a long prompt has another kernel than the most of the other rows.
fn has_prompt_kernel(table: &[MatMulLine]) -> bool {
    let line = |rows| table.iter().position(|line| line.max_rows.is_none_or(|most| most >= rows));
    line(PROMPT_ROWS) != line(MAT_MUL_ROWS[MAT_MUL_ROWS.len() - 1])
}

/// By the same kernels, rows alone and in company: elements that differ, which are none where a driver leaves the order
/// of additions as it is written.
pub fn cases_in_company(config: &ModelConfig, formats: &[WeightFormat], kv_type: KvType) -> Vec<Case> {
    let products = formats.iter().map(|&format| mat_mul::in_company(format, &MAT_MUL_ROWS, has_post(config)));
    let heads = heads_of(config).into_iter().map(|heads| attention::in_company(kv_type, heads));
    heads.chain(products).collect()
}

/// Whether what a layer adds goes through a norm first.
fn has_post(config: &ModelConfig) -> bool {
    config.family == Family::Gemma3
}

/// With and without a window, as its layers are, and with sequences that are long enough for a row to be split.
fn heads_of(config: &ModelConfig) -> Vec<Heads> {
    let group = config.num_heads / config.num_kv_heads;
    let of_layers = |window: &u32| config.windows.iter().any(|of_layer| of_layer.is_some() == (*window > 0));
    let heads = |window| Heads { window, num_positions: 300, ..Heads::new(config.head_dim, 1, group, 16) };
    [0, 20].into_iter().filter(of_layers).map(heads).collect()
}

/// What those cases need, to be made at once.
pub fn kernels_of_model(config: &ModelConfig, formats: &[WeightFormat], kv_type: KvType) -> ModelKernels {
    let group = config.num_heads / config.num_kv_heads;
    ModelKernels { formats: formats.to_vec(), kv_type, head_dim: config.head_dim, group }
}

/// A backend, or why there is none.
pub type Opened<E> = Result<Box<dyn Backend>, E>;

/// `backend` if it computes every case as the twin does, once it has made its `kernels`; else the first that does of
/// those that `plainer` gives, each for the one before it.
pub fn first_right<E: std::error::Error + 'static>(
    cases: &[Case],
    kernels: &ModelKernels,
    mut backend: Box<dyn Backend>,
    plainer: &mut dyn FnMut(&DeviceInfo) -> Option<Opened<E>>,
) -> Opened<StartCheckError<E>> {
    loop {
        let info = backend.info().clone();
        let what = match backend.make_kernels(kernels) {
            Ok(()) => match tried(cases, backend).map_err(StartCheckError::Twin)? {
                Ok(backend) => return Ok(backend),
                Err(what) => what,
            },
            Err(error) => error.to_string(),
        };
        let DeviceInfo { id: device, driver, tier, .. } = info.clone();
        let Some(next) = plainer(&info) else { return Err(StartCheckError::Wrong { device, driver, what }) };
        backend = next.map_err(StartCheckError::Plainer)?;
        let plainer = &backend.info().tier;
        tracing::warn!(
            device,
            driver,
            tier,
            what,
            plainer,
            "a kernel is wrong or cannot be made: going on with plainer ones"
        );
    }
}

/// The backend again, or the first check that it does not pass, in words. The outer error is the twin's.
pub fn tried(cases: &[Case], backend: Box<dyn Backend>) -> Result<Result<Box<dyn Backend>, String>, DeviceError> {
    let mut twin = twin()?;
    let mut device = Device::new(backend);
    for case in cases {
        let checks = case.check(&case.run(&mut device), &case.run(&mut twin)?);
        if let Some(Check { op, variant, shape, failure: Some(failure), .. }) =
            checks.into_iter().find(|check| check.failure.is_some())
        {
            return Ok(Err(format!("{}: {failure}", in_words([op, &variant, &shape]))));
        }
    }
    Ok(Ok(device.into_backend()))
}

fn in_words(words: [&str; 3]) -> String {
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The backend again, and what it computes otherwise in company than alone, the first of `cases`, in words. None where
/// its arithmetic promises nothing of the kind.
pub fn apart_in_company(
    cases: &[Case],
    backend: Box<dyn Backend>,
) -> (Box<dyn Backend>, Result<Option<String>, DeviceError>) {
    if !holds_in_company(&backend.info().arithmetic) {
        return (backend, Ok(None));
    }
    let mut device = Device::new(backend);
    let apart = first_apart(cases, &mut device);
    (device.into_backend(), apart)
}

fn first_apart(cases: &[Case], device: &mut Device) -> Result<Option<String>, DeviceError> {
    for case in cases {
        let differ: u32 = case.run(device)?.iter().flat_map(|output| &output.words).sum();
        if differ > 0 {
            let what = in_words([case.op, &case.variant, &case.shape]);
            return Ok(Some(format!("{what}: {differ} elements differ")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn layers_with_a_window_and_without_are_both_tried() {
        let windows = |windows: &[Option<u32>]| {
            let config = ModelConfig { windows: windows.to_vec(), ..Bundle::simulated().config };
            heads_of(&config).iter().map(|heads| heads.window).collect::<Vec<_>>()
        };
        assert_eq!(windows(&[None, None]), [0]);
        assert_eq!(windows(&[Some(512), None, Some(512)]), [0, 20]);
        assert_eq!(windows(&[Some(512)]), [20]);
    }

    #[test]
    fn rows_of_a_long_prompt_are_tried_where_they_have_a_kernel_of_their_own() {
        let line = |max_rows| MatMulLine { max_rows, kernel: "a kernel".to_owned(), fills: true };
        assert!(has_prompt_kernel(&[line(Some(16)), line(Some(512)), line(None)]));
        assert!(!has_prompt_kernel(&[line(Some(16)), line(Some(64)), line(None)]));
        assert!(!has_prompt_kernel(&[]), "a device without a choice");
    }
}

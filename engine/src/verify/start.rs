//! The short form before a model is loaded: the kernels that it will use, on small shapes, and a plainer backend where
//! one of them is wrong.
//!
//! Invariant: what passes here has computed every case as the twin does. No backend is known by name: who asks says
//! what is plainer than what.

use super::attention::{Heads, Turn, attention, rope_kv, stores};
use super::device::Device;
use super::mat_mul::{LONG_K, mat_mul};
use super::rows::{add_norm, embed, gated_act, rms_norm, update_table};
use super::sample::sample;
use super::{Case, Check, twin};
use crate::backend::{Backend, DeviceError, DeviceInfo, ModelKernels};
use crate::model::ModelConfig;
use crate::model::config::Family;
use crate::tensor::{KvType, WeightFormat};

/// Why no backend was left.
#[derive(Debug, thiserror::Error)]
pub enum StartCheckError<E: std::error::Error + 'static> {
    #[error(
        "device {device} computes wrongly with its plainest kernels: {what}; update its driver ({driver}), or choose \
         another device (--device cpu); `fullbore verify --device {device}` says more, --no-verify starts all the same"
    )]
    Wrong { device: String, driver: String, what: String },
    #[error(transparent)]
    Twin(DeviceError),
    #[error(transparent)]
    Plainer(E),
}

/// Rows that between them reach every matmul kernel of every tier's own table.
pub const MAT_MUL_ROWS: [u32; 11] = [1, 2, 3, 4, 5, 7, 8, 12, 18, 34, 66];

/// What a model makes of a device: every variant that its formats, its heads and its cache call for.
pub fn cases_of_model(config: &ModelConfig, formats: &[WeightFormat], kv_type: KvType) -> Vec<Case> {
    let (head_dim, rotary_dim) = (config.head_dim, config.rope.rotary_dim);
    let has_norms = matches!(config.family, Family::Qwen3 | Family::Gemma3);
    let has_post = config.family == Family::Gemma3;
    let group = config.num_heads / config.num_kv_heads;
    let window = if config.windows.iter().any(Option::is_some) { 20 } else { 0 };
    // Long enough for a row to be split.
    let heads = Heads { window, num_positions: 300, ..Heads::new(head_dim, 1, group, 16) };
    let mut cases = vec![
        update_table(),
        rms_norm(2, config.dim.min(1024)),
        rope_kv(kv_type, Turn { style: config.rope_style, head_dim, rotary_dim, has_norms }),
        gated_act(config.activation, 2, 100),
        add_norm(2, 3, 100, has_post),
        stores(kv_type, head_dim),
        attention(kv_type, heads),
        sample(500),
    ];
    for &format in formats {
        cases.push(embed(format));
        // Two spans of K, and columns that fill no tile.
        cases.extend(MAT_MUL_ROWS.map(|m| mat_mul(format, m, 161, 1280)));
        cases.push(mat_mul(format, 1, 40, LONG_K));
    }
    cases
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
        tracing::warn!(device, driver, tier, what, plainer, "a kernel computes wrongly: going on with plainer ones");
    }
}

/// The backend again, or the first check that it does not pass, in words. The outer error is the twin's.
pub fn tried(cases: &[Case], backend: Box<dyn Backend>) -> Result<Result<Box<dyn Backend>, String>, DeviceError> {
    let mut twin = twin()?;
    let mut device = match Device::new(backend) {
        Ok(device) => device,
        Err(error) => return Ok(Err(error.to_string())),
    };
    for case in cases {
        let checks = case.check(&case.run(&mut device), &case.run(&mut twin)?);
        if let Some(Check { op, variant, shape, failure: Some(failure), .. }) =
            checks.into_iter().find(|check| check.failure.is_some())
        {
            let name = [op, &variant, &shape].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
            return Ok(Err(format!("{name}: {failure}")));
        }
    }
    Ok(Ok(device.into_backend()))
}

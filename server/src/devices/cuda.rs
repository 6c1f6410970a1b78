//! NVIDIA GPUs through CUDA, where this was built with it.

use fullbore_engine::backend::{Backend, DeviceInfo, wgpu as adapters};

/// Whether a name is of a CUDA device: `cuda`, `cuda:0`, `cuda:GPU-...`.
pub fn is_meant(name: &str) -> bool {
    name == "cuda" || name.starts_with("cuda:")
}

/// An error says why there is none.
#[cfg(feature = "cuda")]
pub fn devices() -> Result<Vec<DeviceInfo>, String> {
    fullbore_engine::backend::cuda::devices().map_err(|error| error.to_string())
}

/// By its number or the begin of its UUID; the first for neither. Arithmetic that it does not have is f32.
#[cfg(feature = "cuda")]
pub fn open(selector: &str, arithmetic: adapters::ArithmeticChoice) -> Result<Box<dyn Backend>, String> {
    use fullbore_engine::backend::cuda::{Arithmetic, CudaBackend};
    let arithmetic = match arithmetic {
        adapters::ArithmeticChoice::MatrixUnits => Arithmetic::MatrixUnits,
        _ => Arithmetic::F32,
    };
    let backend = CudaBackend::open(selector, arithmetic).map_err(|error| error.to_string())?;
    if let Some(unused) = unused(arithmetic) {
        tracing::info!(device = backend.info().id, "{unused}");
    }
    Ok(Box::new(backend))
}

/// What a GPU has and is not asked for.
#[cfg(feature = "cuda")]
fn unused(asked: fullbore_engine::backend::cuda::Arithmetic) -> Option<&'static str> {
    use fullbore_engine::backend::cuda::Arithmetic;
    (asked == Arithmetic::F32).then_some(
        "computing in f32, by which an answer has the same bits in any company: --arithmetic matrix-units takes this \
         GPU's tensor cores, by which it may not",
    )
}

#[cfg(not(feature = "cuda"))]
const NOT_BUILT: &str = "this was built without CUDA; build with --features cuda";

#[cfg(not(feature = "cuda"))]
pub fn devices() -> Result<Vec<DeviceInfo>, String> {
    Err(NOT_BUILT.to_owned())
}

#[cfg(not(feature = "cuda"))]
pub fn open(_: &str, _: adapters::ArithmeticChoice) -> Result<Box<dyn Backend>, String> {
    Err(NOT_BUILT.to_owned())
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use fullbore_engine::backend::cuda::Arithmetic;

    use super::*;

    #[test]
    fn tensor_cores_that_are_not_asked_for_are_told_of() {
        assert!(unused(Arithmetic::F32).is_some_and(|told| told.contains("--arithmetic matrix-units")));
        assert_eq!(unused(Arithmetic::MatrixUnits), None);
    }
}

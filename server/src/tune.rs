//! `fullbore tune`: tries the matmul kernels that a model could use on a device, and keeps the fastest for later
//! starts.
//!
//! Invariant: a kernel that computes wrongly is named and never chosen. What is found of a shape is kept at once, so
//! that a run that is ended has it; at the end what is no faster as a whole is taken back.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use fullbore_bench::ops::OpsError;
use fullbore_bench::tune::{Found, StepProducts, TuneOptions, Tuned, TunedShape, tune};
use fullbore_engine::backend::{Backend, DeviceError};
use fullbore_engine::model::Weights;
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::tuning::{MatMulShape, TunedMatMul};
use fullbore_engine::verify::device::Device;
use fullbore_engine::verify::mat_mul::by_kernel;
use fullbore_engine::verify::{Check, twin};

use crate::args::TuneArgs;
use crate::devices::{self, DeviceChoiceError};
use crate::fetch::FetchError;
use crate::start::{self, StartError};
use crate::tuning::{self, SavedTuning};

#[derive(Debug, thiserror::Error)]
pub enum TuneError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Device(#[from] DeviceChoiceError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Lost(#[from] DeviceError),
    #[error(transparent)]
    Ops(#[from] OpsError),
    #[error("{device} has one way to multiply: there is nothing to tune; choose a GPU with --device")]
    NoChoice { device: String },
    #[error("no weight of this model is called {only:?}; there is {known}")]
    Unknown { only: String, known: String },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// More than the caches of a processor hold.
const COLD_BYTES: u64 = 64 << 20;

pub fn run(args: &TuneArgs) -> Result<(), TuneError> {
    let backend = devices::open(&args.model.device)?;
    let no_choice = || TuneError::NoChoice { device: backend.info().id.clone() };
    let saved = SavedTuning::new(&tuning::folder()?, backend.info()).ok_or_else(no_choice)?;
    let bundle = start::open_bundle(&args.model, &backend.info().id)?;
    let shapes = called(&args.only, Weights::mat_mul_shapes(&bundle.config, &bundle.checkpoint))?;
    println!("{}", devices::title(backend.info()));
    let formats = Weights::formats(&bundle.config, &bundle.checkpoint);
    let (mut backend, wrong) = try_kernels(backend, &formats)?;
    let wrong_of = |format| wrong.iter().filter(|(of, _)| *of == format).map(|(_, name)| name.clone()).collect();
    let products = match Weights::products(&bundle.config, &bundle.checkpoint) {
        Some((layers, output)) => StepProducts { layers, output: Some(output) },
        None => StepProducts { layers: shapes.clone(), output: None },
    };
    let options = TuneOptions {
        wrong: shapes.iter().map(|shape| wrong_of(shape.format)).collect(),
        shapes,
        products,
        time: Duration::from_secs(args.seconds),
        cold_bytes: devices::cold_bytes(backend.info(), COLD_BYTES),
    };
    let mut kept = Ok(());
    let tuned = tune(backend.as_mut(), &options, &mut |found| {
        print!("{found}");
        if let (Found::Shape(shape), Ok(())) = (&found, &kept) {
            kept = saved.keep(&[shape.found()]);
        }
    })?;
    let found = tuned.shapes.iter().map(TunedShape::found).collect::<Vec<TunedMatMul>>();
    let write = |source| TuneError::Write { path: saved.path().to_owned(), source };
    kept.and_then(|()| saved.keep(&found)).map_err(write)?;
    println!("{}", verdict(&tuned));
    println!("{} shapes are tuned; the next start uses {}", found.len(), saved.path().display());
    Ok(())
}

/// Those shapes that have `only` in what they are called.
fn called(only: &str, mut shapes: Vec<MatMulShape>) -> Result<Vec<MatMulShape>, TuneError> {
    let known: Vec<String> = shapes.iter().map(MatMulShape::to_string).collect();
    shapes.retain(|shape| shape.to_string().contains(only));
    let unknown = || TuneError::Unknown { only: only.to_owned(), known: known.join(", ") };
    (!shapes.is_empty()).then_some(shapes).ok_or_else(unknown)
}

/// What is kept as a whole, and why.
fn verdict(tuned: &Tuned) -> String {
    let kept = tuned.steps.iter().filter(|step| step.is_kept).count();
    match tuned.steps.len() {
        0 => "nothing is faster than the device's own choice beyond the noise: its tables stay, with their times"
            .to_owned(),
        all => {
            format!("of {all} numbers of rows with other kernels, {kept} are kept: their steps are faster as a whole")
        }
    }
}

/// Kernels by what they compute wrongly.
type Wrong = Vec<(WeightFormat, String)>;

/// Holds every kernel against the plain cpu. The backend again, and what is not to be chosen.
fn try_kernels(backend: Box<dyn Backend>, formats: &[WeightFormat]) -> Result<(Box<dyn Backend>, Wrong), TuneError> {
    let (mut device, mut twin, mut wrong) = (Device::new(backend), twin()?, Wrong::new());
    for &format in formats {
        for kernel in device.backend().mat_mul_kernels(format) {
            let case = by_kernel(format, &kernel);
            let outputs = case.run(&mut device);
            if let Err(error @ DeviceError::Lost { .. }) = outputs {
                return Err(error.into());
            }
            let checks = case.check(&outputs, &case.run(&mut twin)?);
            if let Some(Check { failure: Some(failure), .. }) = checks.iter().find(|check| check.failure.is_some()) {
                println!("{} is wrong on {} and is left out: {failure}", kernel.name, format.name());
                wrong.push((format, kernel.name));
            }
        }
    }
    Ok((device.into_backend(), wrong))
}

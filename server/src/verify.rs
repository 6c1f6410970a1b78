//! `fullbore verify`: every op in every variant on one device, held against the plain cpu, as a table; or a whole
//! model, held against a golden.
//!
//! Invariant: a line is printed when its check is done, so that a driver that hangs or dies shows where. It ends with
//! an error if a check fails, and a device that gives out is a line too.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fullbore_engine::backend::{Backend, DeviceError, DeviceInfo};
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::verify::golden::{Golden, Share};
use fullbore_engine::verify::mat_mul::many_workgroups;
use fullbore_engine::verify::{self, Case, Check, every_case, every_mat_mul_kernel, holds_in_company};

use crate::args::{EngineArgs, ModelArgs, VerifyArgs};
use crate::devices::{self, DeviceChoiceError};
use crate::start::{self, StartError};

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Device(#[from] DeviceChoiceError),
    #[error("there is no op {only}; there is {known}")]
    Unknown { only: String, known: String },
    #[error("the device sim makes hashes instead of tokens: there is nothing to verify")]
    Simulator,
    #[error(
        "{num_failed} of {num_checks} checks failed on device {device}, tier {tier}: do not trust its answers; update \
         the driver ({driver}) and try again, or serve with --device cpu{hint}"
    )]
    Failed { num_failed: usize, num_checks: usize, device: String, tier: String, driver: String, hint: &'static str },
    #[error(transparent)]
    Twin(#[from] DeviceError),
    #[error("cannot write the table: {0}")]
    Write(#[from] io::Error),
    #[error("cannot read or write {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is no golden: {source}", path.display())]
    Golden { path: PathBuf, source: serde_json::Error },
    #[error(transparent)]
    Start(Box<StartError>),
    #[error("{model} on {device} does not follow {}: do not trust this device's answers", golden.display())]
    NotFollowed { model: String, device: String, golden: PathBuf },
}

pub fn verify(args: &VerifyArgs) -> Result<(), VerifyError> {
    match &args.golden.golden {
        Some(golden) => follow(args, golden),
        None => verify_all(args, &|_| true, &mut io::stdout()),
    }
}

/// Requests that a case is held among.
const COMPANY: u32 = 32;

/// The model on the device as it is: nothing is replaced by plainer kernels.
fn follow(args: &VerifyArgs, path: &Path) -> Result<(), VerifyError> {
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::File { path, source }
    };
    let text = fs::read_to_string(path).map_err(file_error(path))?;
    let golden = Golden::read(&text).map_err(|source| VerifyError::Golden { path: path.to_owned(), source })?;
    let model = ModelArgs { device: args.device.clone(), ..ModelArgs::new(&args.golden.model, "") };
    let engine_args = EngineArgs { max_num_seqs: COMPANY, no_verify: true, ..EngineArgs::new(model) };
    // As many as are needed, so that the device is not asked for its free memory: others may be taking it.
    let blocks = COMPANY * golden.longest(Share::WHOLE).div_ceil(engine_args.block_size.max(1));
    let engine_args = EngineArgs { kv_blocks: Some(blocks), ..engine_args };
    let started = |error: StartError| VerifyError::Start(Box::new(error));
    let mut engine = start::plan(&engine_args, None).and_then(start::Plan::load_engine).map_err(started)?;
    let info = engine.backend().info().clone();
    println!("{}", devices::title(&info));
    let mut followed = golden.follow(&mut engine, Share::WHOLE)?;
    let apart = golden.compare_company(&mut engine, Share::WHOLE, COMPANY as usize)?;
    println!("mean NLL of the passage {:.5}, reference {:.5}", followed.passage_nll, followed.wanted_nll);
    println!("{} tokens were decided by a reference", followed.num_compared);
    println!(
        "{} of {} answers are the same among {COMPANY}",
        followed.answers.len() - apart.len(),
        followed.answers.len()
    );
    let same_in_company = apart.is_empty();
    // Else it is told of, and no fault.
    if holds_in_company(&info.arithmetic) {
        followed.failures.extend(apart);
    }
    followed.failures.iter().for_each(|failure| println!("FAIL: {failure}"));
    if let Some(path) = &args.golden.output {
        let DeviceInfo { id: device, tier, arithmetic, .. } = &info;
        let report = serde_json::json!({
            "device": device,
            "tier": tier,
            "arithmetic": arithmetic,
            "same_in_company": same_in_company,
            "followed": followed,
        });
        fs::write(path, report.to_string()).map_err(file_error(path))?;
    }
    let failed = || {
        let (model, golden) = (args.golden.model.clone(), path.to_owned());
        VerifyError::NotFollowed { model, device: info.id.clone(), golden }
    };
    followed.failures.is_empty().then_some(()).ok_or_else(failed)
}

/// Those cases that `keep` keeps, as a table into `out`.
pub fn verify_all(args: &VerifyArgs, keep: &dyn Fn(&Case) -> bool, out: &mut dyn Write) -> Result<(), VerifyError> {
    let backend = devices::open_at(&args.device, args.tier)?;
    let info = backend.info().clone();
    if info.id == "sim" {
        return Err(VerifyError::Simulator);
    }
    let formats = if args.formats.is_empty() { &WeightFormat::ALL[..] } else { &args.formats };
    let mut cases = every_case();
    if !backend.mat_mul_kernels(WeightFormat::Q8_0).is_empty() {
        cases.push(many_workgroups());
    }
    cases.retain(|case| case.formats.iter().all(|format| formats.contains(format)));
    cases.extend(every_mat_mul_kernel(backend.as_ref(), formats));
    if !args.only.is_empty() {
        let mut known: Vec<&str> = cases.iter().map(|case| case.op).collect();
        known.sort_unstable();
        known.dedup();
        if let Some(only) = args.only.iter().find(|only| !known.contains(&only.as_str())) {
            return Err(VerifyError::Unknown { only: only.clone(), known: known.join(", ") });
        }
        cases.retain(|case| args.only.iter().any(|only| case.op == *only));
    }
    cases.retain(keep);
    let mut opened = Some(backend);
    let lost = |error: DeviceChoiceError| DeviceError::Lost { device: info.id.clone(), reason: error.to_string() };
    let mut open = || match opened.take() {
        Some(backend) => Ok(backend),
        None => devices::open_at(&args.device, args.tier).map_err(lost),
    };
    verify_on(&cases, &info, &mut open, out)
}

/// On what `open` gives, at first and after each loss.
pub fn verify_on(
    cases: &[Case],
    info: &DeviceInfo,
    open: &mut dyn FnMut() -> Result<Box<dyn Backend>, DeviceError>,
    out: &mut dyn Write,
) -> Result<(), VerifyError> {
    let mut table = Table::new(cases, out);
    writeln!(table.out, "{}", devices::title(info))?;
    let mut written = table.head();
    verify::verify(cases, open, &mut |check| {
        let line = table.line(&check);
        written = std::mem::replace(&mut written, Ok(())).and(line);
    })?;
    written?;
    let Table { num_failed, num_checks, .. } = table;
    if num_failed == 0 {
        return Ok(writeln!(table.out, "{num_checks} checks pass")?);
    }
    let hint = if devices::has_plainer(info) { "; a start takes plainer kernels by itself" } else { "" };
    let DeviceInfo { id: device, driver, tier, .. } = info.clone();
    Err(VerifyError::Failed { num_failed, num_checks, device, tier, driver, hint })
}

/// Columns as wide as the cases call for.
struct Table<'a> {
    out: &'a mut dyn Write,
    widths: [usize; 3],
    num_checks: usize,
    num_failed: usize,
}

const HEAD: [&str; 3] = ["op", "variant", "shape"];
/// Of one of several outputs, behind its case's shape.
const OUTPUT_WIDTH: usize = ": ids and ranks".len();

impl Table<'_> {
    fn new<'a>(cases: &[Case], out: &'a mut dyn Write) -> Table<'a> {
        let mut widths = HEAD.map(str::len);
        for case in cases {
            let cells = [case.op.len(), case.variant.len(), case.shape.len()];
            widths.iter_mut().zip(cells).for_each(|(width, cell)| *width = cell.max(*width));
        }
        if cases.iter().any(|case| case.op == "sample") {
            widths[2] = widths[2].max("of 9001".len() + OUTPUT_WIDTH);
        }
        Table { out, widths, num_checks: 0, num_failed: 0 }
    }

    fn head(&mut self) -> io::Result<()> {
        self.write(HEAD, "error", "tolerance", "")
    }

    fn line(&mut self, check: &Check) -> io::Result<()> {
        self.num_checks += 1;
        self.num_failed += usize::from(check.failure.is_some());
        let (error, tolerance) = match check.tolerance {
            0.0 if check.error == 0.0 => ("0".to_owned(), "exact".to_owned()),
            0.0 => ("-".to_owned(), "exact".to_owned()),
            tolerance => (format!("{:.1e}", check.error), format!("{tolerance:.0e}")),
        };
        let verdict = check.failure.as_ref().map_or("pass".to_owned(), |failure| format!("FAIL: {failure}"));
        self.write([check.op, &check.variant, &check.shape], &error, &tolerance, &verdict)
    }

    fn write(&mut self, cells: [&str; 3], error: &str, tolerance: &str, verdict: &str) -> io::Result<()> {
        let [op, variant, shape] = self.widths;
        let [a, b, c] = cells;
        let line = format!("{a:<op$}  {b:<variant$}  {c:<shape$}  {error:>8}  {tolerance:>9}  {verdict}");
        writeln!(self.out, "{}", line.trim_end())?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use fullbore_engine::backend::wgpu::ArithmeticChoice;

    use super::*;

    #[test]
    fn company_is_a_fault_where_a_row_depends_on_no_other() {
        let held = ArithmeticChoice::ALL.map(ArithmeticChoice::name).map(|name| (name, holds_in_company(name)));
        assert_eq!(held, [("f32", true), ("f16", true), ("integer-dot", false), ("matrix-units", false)]);
    }
}

//! `fullbore report`: all that is known of a device in one file, which the owner of an odd one attaches to an issue.
//!
//! Invariant: a part that fails is a sentence in the file, and the others are there all the same. What was found is on
//! disk before the next part begins, so that a driver that ends the process is seen by where the file ends. No name of
//! this machine is in it, and no path but in the sentence of an error.

use std::any::Any;
use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use fullbore_bench::ops::{self, ModelShape, OpsOptions};
use fullbore_bench::result::{BenchResult, Machine, Software, rfc3339};
use fullbore_engine::memory::capacity::human_bytes;
use fullbore_engine::tensor::WeightFormat;
use fullbore_engine::verify::TWO_FORMATS;

use crate::args::{DeviceReportArgs, DoctorArgs, EngineArgs, GoldenArgs, ResultArgs, VerifyArgs};
use crate::bench::measure_doctor;
use crate::verify::verify_all;
use crate::version::COMMIT;
use crate::{devices, start};

#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub struct ReportError {
    path: PathBuf,
    source: io::Error,
}

type Part = Result<String, Box<dyn Error>>;

/// Says at the end where the report is, and which parts of it failed.
pub fn report(args: &DeviceReportArgs) -> Result<(), ReportError> {
    let unwritable = |source| ReportError { path: args.output.clone(), source };
    let mut file = File::create(&args.output).map_err(unwritable)?;
    let parts: [(&str, &dyn Fn() -> Part); 5] = [
        ("Devices", &|| Ok(block(&devices::list()?))),
        ("Plan", &|| plan(args)),
        ("Verify", &|| verify(args)),
        ("Ops", &|| ops(args)),
        ("Limits, and what the doctor says", &|| doctor(args)),
    ];
    let mut failed = Vec::new();
    file.write_all(head().as_bytes()).map_err(unwritable)?;
    for (title, part) in parts {
        eprintln!("{title}");
        writeln!(file, "\n## {title}\n").and_then(|()| file.sync_data()).map_err(unwritable)?;
        let text = match catch_unwind(AssertUnwindSafe(part)) {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => {
                failed.push(title);
                format!("This failed: {error}\n")
            }
            Err(panic) => {
                failed.push(title);
                format!("This failed, by a bug of ours: {}\n", words_of(panic.as_ref()))
            }
        };
        file.write_all(text.as_bytes()).and_then(|()| file.sync_data()).map_err(unwritable)?;
    }
    let what =
        if failed.is_empty() { "every part is there".to_owned() } else { format!("failed: {}", failed.join("; ")) };
    eprintln!("{}: {what}", args.output.display());
    Ok(())
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

fn block(text: &str) -> String {
    format!("```\n{}\n```\n", text.trim_end().replace("```", "` ` `"))
}

fn head() -> String {
    let (software, machine) = (Software::this(COMMIT), Machine::this());
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let lines = [
        ("program", format!("fullbore {}, {} build", software.version, software.build)),
        ("commit", known(software.commit)),
        ("made", rfc3339(SystemTime::now())),
        ("system", machine.system),
        ("processor", format!("{}, {} threads", known(machine.cpu), machine.num_threads)),
        ("memory", known(machine.memory_bytes.map(human_bytes))),
        ("load average", known(machine.load_average.map(|load| load.to_string()))),
    ];
    let lines = lines.map(|(name, value)| format!("- {name}: {value}\n"));
    format!("# A device, as Fullbore sees it\n\n{}", lines.concat())
}

/// Which device it is, and where memory would go.
fn plan(args: &DeviceReportArgs) -> Part {
    let plan = start::plan(&args.engine, None)?;
    let info = plan.backend.info();
    let memory = info.memory_bytes.map_or_else(|| "unknown".to_owned(), human_bytes);
    let bound = human_bytes(info.max_buffer_bytes);
    let about = format!("{}; {memory} of memory, buffers of up to {bound}", devices::title(info));
    plan.check_memory()?;
    Ok(format!("{about}\n\n{}", block(&format!("{}\n{}", plan.name, plan.memory))))
}

fn verify(args: &DeviceReportArgs) -> Part {
    let (device, tier, only) = (args.engine.model.device.clone(), None, Vec::new());
    let formats = if args.small { TWO_FORMATS.to_vec() } else { Vec::new() };
    // The first of each kind, where it has to be short.
    let seen = Mutex::new(BTreeSet::new());
    let is_new = |case: &fullbore_engine::verify::Case| {
        let mut seen = seen.lock().expect("no panic holds it");
        seen.insert((case.op, case.variant.clone()))
    };
    let mut table = Vec::new();
    let verify_args = VerifyArgs { device, tier, only, formats, golden: GoldenArgs::default() };
    let verified = verify_all(&verify_args, &|case| !args.small || is_new(case), &mut table);
    let table = String::from_utf8_lossy(&table).into_owned();
    match verified {
        Ok(()) => Ok(block(&table)),
        Err(error) if table.is_empty() => Err(error.into()),
        Err(error) => Err(format!("{error}\n\n{}", block(&table)).into()),
    }
}

fn ops(args: &DeviceReportArgs) -> Part {
    let mut backend = devices::open(&args.engine.model.device)?;
    let (model, rows, only, seconds, cold_bytes) = match args.small {
        true => ("smollm2-135m", vec![1, 8], "mat_mul ffn_down", 0, 1 << 20),
        false => ("llama-3.2-1b", vec![1, 8, 64, 512], "", 30, 128 << 20),
    };
    let options = OpsOptions {
        shape: ModelShape::of_model(model, OPS_CONTEXT).expect("the engine knows these models"),
        format: WeightFormat::Q4_0,
        rows,
        only: only.to_owned(),
        time: Duration::from_secs(seconds),
        cold_bytes,
    };
    Ok(block(&ops::measure(backend.as_mut(), &options, &mut |_, _| {})?.to_string()))
}

/// Positions that attention sees.
const OPS_CONTEXT: u32 = 256;

/// Where the device's time goes under load, what to change, and all that was measured, as a result file has it.
fn doctor(args: &DeviceReportArgs) -> Part {
    let small = EngineArgs { max_num_seqs: 4, max_model_len: Some(256), ..args.engine.clone() };
    let (engine, lengths, limit, seconds, runs) = match args.small {
        true => (small, "fixed:32:8", Some(8), 1, 1),
        false => (args.engine.clone(), "uniform:32-128:32-64", None, 5, 3),
    };
    let asked = DoctorArgs {
        engine,
        device_profile: args.device_profile.clone(),
        trace: None,
        arrivals: None,
        lengths: lengths.parse().expect("our own words"),
        limit,
        seconds,
        seed: 1,
        ids: false,
        no_check: false,
        slow_tokenizer: 0.0,
        result: ResultArgs { runs, output: None },
    };
    let mut result = measure_doctor(&asked, &mut |_| {})?;
    // The command that asked is this one, and says where its files are.
    result.command.clear();
    let json = block(&result.to_json()).replacen("```", "```json", 1);
    let details = format!("<details><summary>As a result file</summary>\n\n{json}\n</details>\n");
    Ok(format!("{}\n{}\n{details}", block(&seconds_by_cause(&result)), block(&result.to_string())))
}

/// Of the first run as it is.
fn seconds_by_cause(result: &BenchResult) -> String {
    let run = result.measurements.first().and_then(|measurement| measurement.runs.first());
    let seconds = run.into_iter().flat_map(|run| &run.metrics).filter_map(|(name, seconds)| {
        let cause = name.strip_prefix("device_")?.strip_suffix("_s")?;
        (*seconds > 0.0).then(|| format!("{cause:<20}{seconds:>10.3} s\n"))
    });
    format!("seconds of the device, by what they went to\n{}", seconds.collect::<String>())
}

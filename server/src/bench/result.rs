//! What a result file says of a model of ours, and where it goes.

use std::collections::BTreeMap;

use fullbore_bench::ops::OpsReport;
use fullbore_bench::result::{BenchResult, Device, Measurement, Run, Target};
use fullbore_engine::backend::DeviceInfo;
use fullbore_engine::config::{EngineConfig, LatencyTarget};
use fullbore_engine::memory::capacity::MemoryTable;
use fullbore_engine::model::Weights;
use fullbore_engine::tensor::WeightFormat;
use serde_json::{Value, json};

use super::BenchCommandError;
use super::interrupt::{Keep, until_interrupted};
use super::model_files;
use crate::api::ServedModel;
use crate::args::ResultArgs;
use crate::start::Plan;
use crate::version::VERSION;

pub fn target_of(model: &ServedModel) -> Target {
    let (device, config) = (model.engine.device(), model.engine.config());
    let model_files = model_files::told(&model.weight_files);
    Target { model_files, ..target(&model.name, model.dtype, &device, config, &model.memory) }
}

/// Of a model that has not been loaded.
pub fn target_of_plan(plan: &Plan) -> Target {
    let dtype = Weights::main_format(&plan.bundle.config, &plan.bundle.checkpoint);
    let model_files = model_files::told(&plan.bundle.checkpoint.files());
    Target {
        model_files,
        ..target(&plan.name, dtype, plan.backend.info(), &plan.config, std::slice::from_ref(&plan.memory))
    }
}

/// Called after its device.
fn target(
    name: &str,
    weights: WeightFormat,
    device: &DeviceInfo,
    config: &EngineConfig,
    memory: &[MemoryTable],
) -> Target {
    Target {
        name: format!("fullbore {}", device.id),
        url: None,
        version: Some(format!("fullbore {VERSION}")),
        about: None,
        model: Some(name.to_owned()),
        weights: Some(weights.name().to_owned()),
        device: Some(device_of(device)),
        limits: limits_of(config),
        memory_bytes: memory_of(memory),
        model_files: Vec::new(),
    }
}

pub fn device_of(device: &DeviceInfo) -> Device {
    let DeviceInfo { id, name, driver, tier, arithmetic, memory_bytes, .. } = device.clone();
    Device { id, name, driver, tier, arithmetic, memory_bytes }
}

fn limits_of(config: &EngineConfig) -> BTreeMap<String, Value> {
    let latency = match config.latency {
        LatencyTarget::None => json!("none"),
        LatencyTarget::Milliseconds(ms) => json!(format!("{ms} ms")),
        LatencyTarget::Stretch(percent) => json!(format!("{percent} %")),
    };
    let fields = [
        ("max_num_seqs", json!(config.max_num_seqs)),
        ("max_num_batched_tokens", json!(config.max_num_batched_tokens)),
        ("max_model_len", json!(config.max_model_len)),
        ("kv_type", json!(config.kv_type.name())),
        ("block_size", json!(config.block_size)),
        ("num_blocks", json!(config.num_blocks)),
        ("num_host_blocks", json!(config.num_host_blocks)),
        ("max_queued_requests", json!(config.max_queued_requests)),
        ("pipeline_depth", json!(config.pipeline_depth)),
        ("prefix_cache", json!(config.prefix_cache)),
        ("latency_target", latency),
    ];
    fields.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Of all its devices.
fn memory_of(memory: &[MemoryTable]) -> BTreeMap<String, u64> {
    let sum = |part: fn(&MemoryTable) -> u64| memory.iter().map(part).sum::<u64>();
    let weights = sum(|table| table.weights);
    let (kv, scratch, tables) = (sum(|table| table.kv), sum(|table| table.scratch), sum(|table| table.tables));
    [("weights", weights), ("kv", kv), ("scratch", scratch), ("tables", tables)]
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .into()
}

/// What single ops measured, so many times over, since `begun`: a measurement for each op and M.
pub fn of_ops(begun: &BenchResult, reports: &[OpsReport], device: &DeviceInfo) -> BenchResult {
    let mut result = begun.clone();
    let name = format!("fullbore {}", device.id);
    let Some(first) = reports.first() else { return result };
    result.targets = vec![Target {
        name: name.clone(),
        version: Some(format!("fullbore {VERSION}")),
        weights: Some(first.format.to_owned()),
        device: Some(device_of(device)),
        ..Target::default()
    }];
    let workload =
        [("shapes", json!(first.shape.model)), ("peaks", json!(first.peaks)), ("left_out", json!(first.skipped))];
    result.workload = workload.map(|(name, value)| (name.to_owned(), value)).into();
    let measurement = |nth: usize| {
        let op = &first.ops[nth];
        let run = |report: &OpsReport| {
            let (mut run, op) = (Run::default(), &report.ops[nth]);
            run.metric("median_us", op.median_ns / 1e3);
            run.metric("bytes_per_s", op.bytes_per_s);
            run.metric("flops_per_s", op.flops_per_s);
            run.metric("roofline_share", op.roofline_share);
            if op.is_too_good() {
                run.invalid.push(format!("{:.2} of the roofline: a peak was measured too low", op.roofline_share));
            }
            run
        };
        Measurement {
            target: name.clone(),
            subject: Some(format!("{} {}", op.name, op.shape)),
            at: [("m".to_owned(), f64::from(op.m))].into(),
            runs: reports.iter().map(run).collect(),
            ..Measurement::default()
        }
    };
    result.measurements = (0..first.ops.len()).map(measurement).collect();
    result.finish();
    result
}

/// A bench of this process, from its first run to its result.
pub fn measured(
    args: &ResultArgs,
    measure: impl FnOnce(Keep) -> Result<BenchResult, BenchCommandError>,
) -> Result<(), BenchCommandError> {
    let of_what_is_whole = args.clone();
    let result = until_interrupted(measure, move |result| finish(result, &of_what_is_whole))?;
    finish(&result, args)
}

/// Tells people on standard error, and puts the result where it was asked for.
pub fn finish(result: &BenchResult, args: &ResultArgs) -> Result<(), BenchCommandError> {
    eprint!("{result}");
    match &args.output {
        Some(path) => result.write(path)?,
        None => println!("{}", result.to_json()),
    }
    Ok(())
}

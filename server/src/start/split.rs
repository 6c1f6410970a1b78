//! A model that is divided over its devices: when it is, which layers go where, and what is told of it.
//!
//! Invariant: it is divided where that was asked for, or where no device has memory for all of it; a device that can
//! serve it alone never waits for another.

use std::collections::HashMap;
use std::fmt::Write;
use std::ops::Range;
use std::time::Duration;

use fullbore_engine::backend::split::balance::{Candidate, balance};
use fullbore_engine::backend::split::{SplitBackend, Stage};
use fullbore_engine::config::EngineConfig;
use fullbore_engine::engine::probe;
use fullbore_engine::memory::capacity::{MemoryTable, human_bytes};
use fullbore_engine::model::{Footprint, Model, Weights};

use super::config::{USUAL_LEN, least_bytes, least_config};
use super::together::Pool;
use super::{Opened, Seat, StartError, StartTimes, memory_table};
use crate::args::EngineArgs;
use crate::devices;

/// A device's part in a model that is divided.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// Of the device, as it is called in errors, and what it is.
    pub device: String,
    pub title: String,
    pub layers: Range<u32>,
    /// Memory that it has for this, where that is known.
    pub available: Option<u64>,
    /// What it is predicted to take of a step of [`probe::NUM_ROWS`] answers.
    pub step: Duration,
    /// As packed there.
    weights: u64,
    pub memory: MemoryTable,
}

/// Whether the whole model, with a block of KV, has room on its device, as far as that is known.
pub(super) fn fits(opened: &Opened) -> Result<bool, StartError> {
    let Opened { args, bundle, backend, weights, .. } = opened;
    let block = bundle.config.kv_bytes_per_token(args.model.kv_type) * u64::from(args.block_size);
    let needed = least_bytes(args, bundle, *weights)? + block;
    Ok(devices::memory_bytes(backend.info()).is_none_or(|available| needed <= available))
}

/// Whether devices are to divide the model among them.
pub(super) fn is_wanted(opened: &[Opened], asked: bool) -> Result<bool, StartError> {
    if asked {
        return if opened.len() > 1 { Ok(true) } else { Err(StartError::SplitOverOne) };
    }
    let mut fitting = opened.iter().map(fits);
    Ok(opened.len() > 1 && fitting.try_fold(true, |none, fits| fits.map(|fits| none && !fits))?)
}

/// What a stage has and takes, before it has layers.
struct Room {
    available: Option<u64>,
    /// Ends of the model, activations, tables.
    fixed: u64,
    /// Of the largest layer, and of the output layer where it has that.
    layer_weights: u64,
    output_weights: u64,
    /// What a layer takes of a step, once that was tried.
    per_layer: Duration,
}

impl Room {
    fn candidate(&self, kv_per_layer: u64) -> Candidate {
        let for_layers = self.available.map(|available| available.saturating_sub(self.fixed));
        let fitting = for_layers.map_or(u64::from(u32::MAX), |bytes| bytes / (self.layer_weights + kv_per_layer));
        let max_layers = u32::try_from(fitting).unwrap_or(u32::MAX);
        let beside = self.per_layer.mul_f64(self.output_weights as f64 / self.layer_weights as f64);
        Candidate { max_layers, per_layer: self.per_layer, beside }
    }
}

/// Divides a model over devices, at least two, in their order.
pub(super) fn join(mut opened: Vec<Opened>) -> Result<Opened, StartError> {
    if let Some(simulated) = opened.iter().find(|stage| stage.backend.info().id == "sim") {
        return Err(StartError::Simulated { device: simulated.seat.title.clone() });
    }
    let (args, bundle) = (opened[0].args.clone(), opened[0].bundle.clone());
    let least = least_config(&args, &bundle)?;
    let num_layers = bundle.config.num_layers;
    let mut rooms = rooms(&opened, &least);
    let block_bytes =
        bundle.config.kv_bytes_per_token(args.model.kv_type) / u64::from(num_layers) * u64::from(least.block_size);
    let (least_blocks, wanted_blocks) = blocks(&args, &least, block_bytes * u64::from(num_layers));
    let divided = |rooms: &[Room], num_blocks: u64| {
        let stages: Vec<Candidate> = rooms.iter().map(|room| room.candidate(num_blocks * block_bytes)).collect();
        balance(&stages, num_layers).map(|layers| (stages, layers))
    };
    if divided(&rooms, least_blocks).is_none() {
        return Err(no_room(&opened, &rooms, num_layers, least_blocks * block_bytes));
    }
    measure(&mut opened, &mut rooms)?;
    let as_wanted = divided(&rooms, wanted_blocks).or_else(|| divided(&rooms, least_blocks));
    let (candidates, layers) = as_wanted.expect("there is room for the least");
    let mut stages = Vec::with_capacity(opened.len());
    let (mut max_blocks, mut weights) = (u64::MAX, 0);
    for (index, stage) in opened.iter().enumerate() {
        let (layers, room) = (layers[index].clone(), &rooms[index]);
        let of_layer = |layer| Weights::layer_bytes(&bundle.config, &bundle.checkpoint, layer, stage.backend.as_ref());
        let of_layers: u64 = layers.clone().map(of_layer).sum();
        let num_layers = layers.end - layers.start;
        if let Some(available) = room.available {
            let left = available.saturating_sub(room.fixed + of_layers);
            max_blocks = max_blocks.min(left / (block_bytes * u64::from(num_layers)));
        }
        let of_stage = of_layers + ends(stage, &layers, bundle.config.num_layers);
        weights += of_stage;
        stages.push(StagePlan {
            device: stage.backend.info().id.clone(),
            title: format!("{}, {}", stage.seat.title, stage.backend.info().name),
            step: candidates[index].step(num_layers),
            available: room.available,
            weights: of_stage,
            memory: memory_table(&bundle.config, &least, of_stage),
            layers,
        });
    }
    let num_blocks = num_blocks(&args, wanted_blocks, least_blocks, max_blocks);
    let kv_memory = Some(num_blocks * block_bytes * u64::from(num_layers));
    let args = EngineArgs { kv_blocks: None, kv_memory, memory_fraction: None, ..args };
    Ok(joined(opened, args, stages, weights))
}

fn joined(opened: Vec<Opened>, args: EngineArgs, stages: Vec<StagePlan>, weights: u64) -> Opened {
    let titles: Vec<&str> = opened.iter().map(|stage| stage.seat.title.as_str()).collect();
    let seat = Seat { title: titles.join("+"), cores: None, is_optional: false };
    let (name, bundle) = (opened[0].name.clone(), opened[0].bundle.clone());
    let (mut parts, mut all_times) = (Vec::new(), Vec::new());
    for (stage, StagePlan { layers, .. }) in opened.into_iter().zip(&stages) {
        parts.push(Stage { backend: stage.backend, layers: layers.clone() });
        all_times.push(stage.times);
    }
    let backend = Box::new(SplitBackend::new(parts));
    let times = all_times.into_iter().reduce(StartTimes::then).expect("there are stages");
    let slowest = stages.iter().map(|stage| stage.step).max().expect("there are stages");
    let layers: Vec<String> = stages.iter().map(|stage| told_layers(&stage.layers)).collect();
    tracing::info!(
        device = seat.title,
        layers = layers.join(", "),
        slowest_stage_ms = slowest.as_secs_f64() * 1e3,
        "the model is divided over its devices"
    );
    let (tuned, has_own_fraction, choice) = (Vec::new(), false, None);
    Opened { name, seat, has_own_fraction, args, bundle, backend, tuned, stages, choice, weights, times }
}

/// Tries each device, on which nothing is afterwards.
fn measure(opened: &mut [Opened], rooms: &mut [Room]) -> Result<(), StartError> {
    for (stage, room) in opened.iter_mut().zip(rooms) {
        room.per_layer = layer_time(stage)?;
    }
    Ok(())
}

fn layer_time(stage: &mut Opened) -> Result<Duration, StartError> {
    let format = Weights::main_format(&stage.bundle.config, &stage.bundle.checkpoint);
    Ok(probe::layer_time(&stage.bundle.config, format, stage.backend.as_mut())?)
}

/// What a step of [`probe::NUM_ROWS`] answers is predicted to take of a device that has all of the model: its layers by
/// what one was measured to take, and the output layer by its size beside one.
pub(super) fn whole_step(device: &mut Opened) -> Result<Duration, StartError> {
    let per_layer = layer_time(device)?;
    let Opened { bundle, backend, .. } = &*device;
    let (config, checkpoint) = (&bundle.config, &bundle.checkpoint);
    let num_layers = config.num_layers;
    let of_layer = |layer| Weights::layer_bytes(config, checkpoint, layer, backend.as_ref());
    let layer_bytes = (0..num_layers).map(of_layer).max().unwrap_or(0).max(1);
    let output_bytes = ends(device, &(num_layers - 1..num_layers), num_layers);
    Ok(per_layer.mul_f64(f64::from(num_layers) + output_bytes as f64 / layer_bytes as f64))
}

fn rooms(opened: &[Opened], least: &EngineConfig) -> Vec<Room> {
    let mut sharing: HashMap<Pool, u64> = HashMap::new();
    for stage in opened.iter() {
        *sharing.entry(Pool::of(stage.backend.info())).or_default() += 1;
    }
    let last = opened.len() - 1;
    let room = |(index, stage): (usize, &Opened)| {
        let (config, checkpoint) = (&stage.bundle.config, &stage.bundle.checkpoint);
        let memory = devices::memory_bytes(stage.backend.info());
        let fraction = stage.args.memory_fraction.unwrap_or(1.0);
        let num_sharing = sharing[&Pool::of(stage.backend.info())];
        let first_layer = if index == last { config.num_layers - 1 } else { (index as u32).min(1) };
        let place = first_layer..first_layer + 1;
        let Footprint { scratch, tables, .. } = Model::footprint_of_stage(config, &least.state_limits(), &place);
        let of_layer = |layer| Weights::layer_bytes(config, checkpoint, layer, stage.backend.as_ref());
        let layer_weights = (0..config.num_layers).map(of_layer).max().unwrap_or(0).max(1);
        let of_ends = ends(stage, &place, config.num_layers);
        Room {
            available: memory.map(|bytes| (bytes as f64 * fraction) as u64 / num_sharing),
            fixed: of_ends + scratch + tables,
            layer_weights,
            output_weights: if index == last { of_ends } else { 0 },
            per_layer: Duration::ZERO,
        }
    };
    opened.iter().enumerate().map(room).collect()
}

/// Bytes of the embedding and the output layer, where a stage with these layers has them.
fn ends(stage: &Opened, layers: &Range<u32>, num_layers: u32) -> u64 {
    let Opened { bundle, backend, .. } = stage;
    let [embed, output] = Weights::end_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref());
    let of = |is_there: bool, bytes: u64| if is_there { bytes } else { 0 };
    of(layers.start == 0, embed) + of(layers.end == num_layers, output)
}

/// Blocks of KV, at least and as wanted; what was asked for is both.
fn blocks(args: &EngineArgs, least: &EngineConfig, block_bytes: u64) -> (u64, u64) {
    let asked = args.kv_blocks.map(u64::from).or(args.kv_memory.map(|bytes| bytes / block_bytes));
    let of_tokens = |tokens: u64| tokens.div_ceil(u64::from(least.block_size));
    let one = of_tokens(u64::from(args.max_model_len.unwrap_or(1)));
    let usual = u64::from(args.max_num_seqs) * u64::from(least.max_model_len.min(USUAL_LEN));
    let usual = of_tokens(usual.max(u64::from(least.max_model_len)));
    (asked.unwrap_or(one), asked.unwrap_or(usual))
}

/// All that fits where a share of the memory was asked for; else as wanted, and half of what fits at most.
fn num_blocks(args: &EngineArgs, wanted: u64, least: u64, max: u64) -> u64 {
    if args.kv_blocks.is_some() || args.kv_memory.is_some() {
        return wanted;
    }
    match args.memory_fraction {
        Some(_) if max < u64::MAX => max,
        _ => wanted.min((max / 2).max(least)),
    }
}

fn no_room(opened: &[Opened], rooms: &[Room], num_layers: u32, kv_per_layer: u64) -> StartError {
    let told = opened.iter().zip(rooms).map(|(stage, room)| {
        let max_layers = room.candidate(kv_per_layer).max_layers.min(num_layers);
        let available = room.available.map_or_else(|| "unknown".to_owned(), human_bytes);
        format!("{} has {available}, for {max_layers} beside {}", stage.seat.title, human_bytes(room.fixed))
    });
    StartError::TooSmallTogether { num_layers, num_devices: opened.len(), each: told.collect::<Vec<_>>().join("; ") }
}

impl StagePlan {
    /// With its memory as `config` has it.
    pub(super) fn planned(self, model: &fullbore_engine::model::ModelConfig, config: &EngineConfig) -> StagePlan {
        let Footprint { kv, scratch, tables, swap } =
            Model::footprint_of_stage(model, &config.state_limits(), &self.layers);
        let whole = memory_table(model, config, self.weights);
        let num_layers = u64::from(self.layers.end - self.layers.start);
        let kv_bytes_per_token = whole.kv_bytes_per_token / u64::from(model.num_layers) * num_layers;
        StagePlan { memory: MemoryTable { kv, scratch, tables, swap, kv_bytes_per_token, ..whole }, ..self }
    }
}

/// What all stages take together.
pub(super) fn sum(stages: &[StagePlan], whole: MemoryTable) -> MemoryTable {
    let of = |field: fn(&MemoryTable) -> u64| stages.iter().map(|stage| field(&stage.memory)).sum();
    MemoryTable { scratch: of(|memory| memory.scratch), tables: of(|memory| memory.tables), ..whole }
}

/// Where memory will go, stage by stage, and what is predicted.
pub(super) fn table(stages: &[StagePlan]) -> String {
    let mut text = String::new();
    for StagePlan { title, layers, available, step, memory, .. } in stages {
        let of = available.map_or_else(String::new, |bytes| format!(" of {}", human_bytes(bytes)));
        let (layers, ms) = (told_layers(layers), step.as_secs_f64() * 1e3);
        let rows = probe::NUM_ROWS;
        writeln!(text, "layers {layers} on {title}: {}{of}, {ms:.1} ms a step of {rows}", human_bytes(memory.total()))
            .expect("a string takes everything");
        writeln!(text, "{memory}\n").expect("the same");
    }
    let slowest = stages.iter().map(|stage| stage.step).max().unwrap_or_default();
    let all: Duration = stages.iter().map(|stage| stage.step).sum();
    let rate = |step: Duration| f64::from(probe::NUM_ROWS) / step.as_secs_f64().max(1e-9);
    let (most, least) = (rate(slowest), rate(all));
    write!(
        text,
        "predicted for {} answers: {least:.0} tokens/s if stages took turns, {most:.0} if all are busy",
        probe::NUM_ROWS
    )
    .expect("the same");
    text
}

/// From the first to the last, from 0.
fn told_layers(layers: &Range<u32>) -> String {
    format!("{} to {}", layers.start, layers.end - 1)
}

#[cfg(test)]
pub(super) mod tests {
    use fullbore_engine::backend::around::Around;
    use fullbore_engine::backend::cpu::{CpuBackend, CpuOptions};
    use fullbore_engine::backend::{Backend, DeviceInfo};
    use fullbore_engine::bundle::Bundle;
    use fullbore_engine::tensor::WeightFormat;

    use super::super::config::Room as KvRoom;
    use super::*;
    use crate::args::ModelArgs;

    pub(in crate::start) const MIB: u64 = 1 << 20;

    /// The cpu, with so much memory.
    struct Small {
        cpu: CpuBackend,
        info: DeviceInfo,
    }

    impl Around for Small {
        fn inner(&self) -> &dyn Backend {
            &self.cpu
        }

        fn inner_mut(&mut self) -> &mut dyn Backend {
            &mut self.cpu
        }

        fn info(&self) -> &DeviceInfo {
            &self.info
        }
    }

    pub(in crate::start) fn opened(title: &str, memory_bytes: u64) -> Opened {
        let cpu = CpuBackend::new(CpuOptions { num_threads: 1, ..CpuOptions::default() }).expect("threads");
        let info = DeviceInfo { memory_bytes: Some(memory_bytes), ..cpu.info().clone() };
        let bundle = Bundle::random("smollm2-135m", WeightFormat::Q4_0).expect("a known shape");
        let backend: Box<dyn Backend> = Box::new(Small { cpu, info });
        Opened {
            name: "small".to_owned(),
            seat: Seat::whole(title),
            has_own_fraction: false,
            args: EngineArgs { max_num_seqs: 4, no_saved_costs: true, ..EngineArgs::new(ModelArgs::new("", "cpu")) },
            weights: Weights::size_bytes(&bundle.config, &bundle.checkpoint, backend.as_ref()),
            bundle,
            backend,
            tuned: Vec::new(),
            stages: Vec::new(),
            choice: None,
            times: StartTimes::default(),
        }
    }

    fn both(memory: [u64; 2]) -> Vec<Opened> {
        vec![opened("a", memory[0]), opened("b", memory[1])]
    }

    #[test]
    fn a_model_is_divided_where_no_device_has_room_for_all_of_it() {
        let needed = least_bytes(&opened("a", 1).args, &opened("a", 1).bundle, opened("a", 1).weights).expect("a plan");
        assert!(is_wanted(&both([needed - 1; 2]), false).expect("a plan"));
        for memory in [[needed - 1, 2 * needed], [2 * needed; 2]] {
            assert!(!is_wanted(&both(memory), false).expect("a plan"));
            assert!(is_wanted(&both(memory), true).expect("a plan"));
        }
        let alone = is_wanted(&[opened("a", needed)], true).expect_err("one device").to_string();
        assert!(alone.contains("--split") && alone.contains("one was given"), "{alone}");
    }

    #[test]
    fn stages_take_no_more_than_their_devices_have_and_sum_to_the_table() {
        // The two share the host's memory, so that each has half of what it says.
        let memory = 2 * 130 * MIB;
        let plan = join(both([memory; 2])).expect("it fits").plan(KvRoom::alone(None)).expect("a plan");
        let [first, second] = &plan.stages[..] else { panic!("two stages") };
        assert_eq!((first.layers.start, first.layers.end, second.layers.end), (0, second.layers.start, 30));
        for stage in &plan.stages {
            assert!(stage.memory.total() <= memory / 2, "{:?}", stage.memory);
            assert!(stage.step > Duration::ZERO);
        }
        let sum: u64 = plan.stages.iter().map(|stage| stage.memory.total()).sum();
        assert_eq!(plan.memory.total(), sum);
        let text = table(&plan.stages);
        assert!(text.starts_with("layers 0 to ") && text.contains(" on b, "), "{text}");
        assert!(text.contains("predicted for 16 answers"), "{text}");
        plan.check_memory().expect("it was planned so");
    }

    #[test]
    fn what_all_devices_together_have_no_room_for_is_refused_with_each() {
        let told = join(both([60 * MIB; 2])).err().expect("too small").to_string();
        assert!(told.contains("30 layers do not fit on its 2 devices") && told.contains("a has 30.0 MiB"), "{told}");
        assert!(told.contains("; b has 30.0 MiB"), "{told}");
    }
}

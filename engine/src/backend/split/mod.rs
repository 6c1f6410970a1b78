//! Several devices that are one: each has some consecutive layers of a model, with their KV, and activations go from
//! one to the next through the host's memory.
//!
//! A recording is cut twice. By rows into [`parts`], so that all stages have something to do; and each part by layers,
//! one recording a stage, which goes through the [`pipeline`]. What is before all layers lies in the first stage, what
//! is behind them, choices included, in the last. What both ends need, the choices, goes back to the first stage with
//! the next part that reads them, and a part waits only for the parts that chose what it reads.
//!
//! Invariant: nobody above knows. There is one space of block ids over all stages, recordings take effect in order on
//! each of them, and tokens are those of one device, bit for bit where the devices compute the same.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{
    Backend, DeviceError, DeviceInfo, LoadError, LoadTimes, MAX_IN_FLIGHT, Place, RowSource, Ticket, WeightSpec,
};
use crate::op::{AddNorm, Embed, Op, SAMPLE_ROW_WORDS, SAMPLED_BY_SLOT, Sample};
use crate::recording::{BufferCopy, Recording};
use crate::tensor::{BufferId, Tensor, Weight, WeightId};

pub mod balance;
mod operands;
mod parts;
mod pipeline;

use operands::{Names, renamed};
use parts::Parts;
use pipeline::{Job, Pipeline, Shared, lock};

/// A device and the layers that it has.
pub struct Stage {
    pub backend: Box<dyn Backend>,
    pub layers: Range<u32>,
}

pub struct SplitBackend {
    info: DeviceInfo,
    stages: Vec<Shared>,
    /// By stage.
    layers: Vec<Range<u32>>,
    /// Of what comes next.
    place: Place,
    buffers: Vec<Buffer>,
    /// Each with its stage.
    weights: Vec<(usize, Weight)>,
    /// Where what slots choose lies, and by slot the last part that was told to choose for it.
    choices: Option<BufferId>,
    chosen_by: Vec<u64>,
    /// From the first submission on.
    pipeline: Option<Pipeline>,
    num_parts: u64,
    num_submitted: u64,
    num_waited: u64,
    /// When the last recording that was waited for was done; before the first, when there was none.
    done_at: Instant,
    /// To be filled again.
    spare: Vec<Job>,
}

struct Buffer {
    place: Place,
    size_bytes: u64,
    /// By stage, where it is there.
    ids: Vec<Option<BufferId>>,
}

impl SplitBackend {
    /// Of at least two stages, in the order of their layers, with nothing on their devices that they need.
    pub fn new(stages: Vec<Stage>) -> SplitBackend {
        assert!(stages.len() > 1, "one stage is no split");
        let mut next = 0;
        for Stage { layers, .. } in &stages {
            assert!(layers.start == next && layers.end > next, "layers {layers:?} behind {next}");
            next = layers.end;
        }
        let info = together(&stages);
        let layers = stages.iter().map(|stage| stage.layers.clone()).collect();
        SplitBackend {
            info,
            stages: stages.into_iter().map(|stage| Arc::new(Mutex::new(stage.backend))).collect(),
            layers,
            place: Place::Throughout,
            buffers: Vec::new(),
            weights: Vec::new(),
            choices: None,
            chosen_by: Vec::new(),
            pipeline: None,
            num_parts: 0,
            num_submitted: 0,
            num_waited: 0,
            done_at: Instant::now(),
            spare: Vec::new(),
        }
    }

    /// The stages that have what is used at a place.
    fn stages_of(&self, place: Place) -> Vec<usize> {
        let last = self.stages.len() - 1;
        match place {
            Place::Throughout | Place::Inputs | Place::Stream => (0..=last).collect(),
            Place::Choices => vec![0, last],
            Place::First => vec![0],
            Place::Last => vec![last],
            Place::Layer(layer) => {
                let stage = self.layers.iter().position(|layers| layers.contains(&layer));
                vec![stage.expect("every layer has a stage")]
            }
        }
    }

    /// What a stage's upload has to hold beside the inputs: what comes from the stage before, or the choices.
    fn handed_on_bytes(&self, stage: usize) -> u64 {
        let place = if stage == 0 { Place::Choices } else { Place::Stream };
        self.buffers.iter().filter(|buffer| buffer.place == place).map(|buffer| buffer.size_bytes).sum()
    }

    /// Where an op is done, unless everywhere or where the one before it was.
    fn stage_of(&self, op: &Op) -> Option<usize> {
        let of_buffer = |buffer: BufferId| self.stages_of(self.buffers[buffer.0 as usize].place)[0];
        match op {
            Op::UpdateTable(_) | Op::GatedAct(_) | Op::MulAdd(_) => None,
            Op::Embed(op) => Some(self.weights[op.table.id.0 as usize].0),
            Op::MatMul(op) => Some(self.weights[op.weight.id.0 as usize].0),
            Op::RmsNorm(op) => Some(of_buffer(op.weight.buffer)),
            Op::AddNorm(op) => Some(of_buffer(op.weight.buffer)),
            Op::RopeKv(op) => Some(of_buffer(op.cache.k)),
            Op::Attention(op) => Some(of_buffer(op.cache.k)),
            Op::ResetCounts(op) => Some(of_buffer(op.counts.buffer)),
            Op::Sample(op) => Some(of_buffer(op.counts.buffer)),
        }
    }

    /// Without work.
    fn job(&self, upload_buffer: BufferId) -> Job {
        let recording = |stage| Recording::new(StageNames { split: self, stage }.buffer(upload_buffer));
        Job::new((0..self.stages.len()).map(recording))
    }

    /// Fills a job with a part of `recording`.
    fn fill(&mut self, job: &mut Job, recording: &Recording, parts: &Parts, part: usize) {
        job.clear();
        self.num_parts += 1;
        job.number = self.num_parts;
        job.is_end = part + 1 == parts.len();
        for stage in &mut job.stages {
            stage.recording.upload.extend_from_slice(&parts.upload);
        }
        if part == 0 {
            recording.copies.iter().for_each(|copy| self.push_copy(job, *copy));
        }
        let mut stage = 0;
        parts.ops(recording, part, |op| stage = self.push(job, op, stage, &parts.upload));
        let last = self.stages.len() - 1;
        let names = StageNames { split: self, stage: last };
        if job.is_end {
            let downloads = recording.downloads.iter().map(|tensor| names.tensor(*tensor));
            job.stages[last].recording.downloads.extend(downloads);
        }
        if let Some(choices) = self.choices.filter(|_| job.chooses) {
            let all = Tensor::u32(names.buffer(choices), self.chosen_by.len() as u32, 1);
            job.stages[last].recording.downloads.push(all);
        }
    }

    /// Appends an op to the part, and says where it is done.
    fn push(&mut self, job: &mut Job, op: Op, before: usize, upload: &[u32]) -> usize {
        match &op {
            Op::UpdateTable(_) => {
                for stage in 0..self.stages.len() {
                    job.stages[stage].recording.push(renamed(op, &StageNames { split: self, stage }));
                }
                return before;
            }
            Op::Embed(op) => self.read_choices(job, op, upload),
            Op::Sample(op) => self.choose(job, op, upload),
            _ => {}
        }
        let stage = self.stage_of(&op).unwrap_or(before);
        match &op {
            Op::AddNorm(op) if stage > 0 && job.stages[stage].incoming.is_empty() => self.hand_on(job, op, stage),
            _ => {}
        }
        job.stages[stage].recording.push(renamed(op, &StageNames { split: self, stage }));
        // Counts are begun anew before the pass, where they are.
        if matches!(op, Op::ResetCounts(_)) { before } else { stage }
    }

    /// Has a part wait for the parts that chose what it reads.
    fn read_choices(&self, job: &mut Job, op: &Embed, upload: &[u32]) {
        let ids = &upload[op.ids.offset as usize..][..op.ids.rows as usize];
        let slots = ids.iter().filter(|&id| id & SAMPLED_BY_SLOT != 0).map(|id| id & !SAMPLED_BY_SLOT);
        job.needs = slots.map(|slot| self.chosen_by[slot as usize]).max().unwrap_or(0);
        if job.needs > 0 {
            let names = StageNames { split: self, stage: 0 };
            job.stages[0].incoming.push(names.tensor(op.sampled));
        }
    }

    /// Notes for whom a part chooses.
    fn choose(&mut self, job: &mut Job, op: &Sample, upload: &[u32]) {
        job.chooses = true;
        assert_eq!(self.choices, Some(op.sampled.buffer), "the choices were placed");
        let rows = &upload[op.rows.offset as usize..][..op.rows.num_elements() as usize];
        for row in rows.chunks_exact(SAMPLE_ROW_WORDS as usize) {
            if let Some(chosen_by) = self.chosen_by.get_mut(row[0] as usize) {
                *chosen_by = job.number;
            }
        }
    }

    fn push_copy(&self, job: &mut Job, copy: BufferCopy) {
        let stage = self.stages_of(self.buffers[copy.from.0 as usize].place)[0];
        let names = StageNames { split: self, stage };
        let renamed = BufferCopy { from: names.buffer(copy.from), to: names.buffer(copy.to), ..copy };
        job.stages[stage].recording.copy(renamed);
    }

    /// Has the stage before read back what a stage begins with.
    fn hand_on(&self, job: &mut Job, op: &AddNorm, stage: usize) {
        let [before, names] = [stage - 1, stage].map(|stage| StageNames { split: self, stage });
        for tensor in [op.x, op.y] {
            assert_eq!(self.buffers[tensor.buffer.0 as usize].place, Place::Stream, "what goes to the next stage");
            job.stages[stage - 1].recording.downloads.push(before.tensor(tensor));
            job.stages[stage].incoming.push(names.tensor(tensor));
        }
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        let no_thread = |error: std::io::Error| DeviceError::Lost {
            device: self.info.id.clone(),
            reason: format!("its threads cannot be started: {error}"),
        };
        self.pipeline = Some(Pipeline::start(&self.stages, self.chosen_by.len()).map_err(no_thread)?);
        Ok(())
    }

    fn on_all<T>(&self, what: impl Fn(&mut dyn Backend) -> T) -> impl Iterator<Item = T> {
        self.stages.iter().map(move |stage| what(lock(stage).as_mut()))
    }
}

/// What buffers and weights are called in a stage.
struct StageNames<'a> {
    split: &'a SplitBackend,
    stage: usize,
}

impl Names for StageNames<'_> {
    fn buffer(&self, buffer: BufferId) -> BufferId {
        let Buffer { place, ids, .. } = &self.split.buffers[buffer.0 as usize];
        ids[self.stage].unwrap_or_else(|| panic!("stage {} has nothing that is used at {place:?}", self.stage))
    }

    fn weight(&self, weight: Weight) -> Weight {
        let (stage, weight) = self.split.weights[weight.id.0 as usize];
        assert_eq!(stage, self.stage, "a weight of another stage");
        weight
    }
}

/// All devices as one, under the ids and names of all.
fn together(stages: &[Stage]) -> DeviceInfo {
    let infos = || stages.iter().map(|stage| stage.backend.info());
    let join = |of: fn(&DeviceInfo) -> &str| {
        let mut words: Vec<&str> = infos().map(of).collect();
        words.dedup();
        words.join(" + ")
    };
    DeviceInfo {
        id: infos().map(|info| info.id.as_str()).collect::<Vec<_>>().join("+"),
        name: join(|info| &info.name),
        driver: join(|info| &info.driver),
        tier: join(|info| &info.tier),
        arithmetic: join(|info| &info.arithmetic),
        // What each has chosen stays; what is behind a table of all would be no device.
        kernels: String::new(),
        pci_bus_id: None,
        memory_bytes: None,
        max_buffer_bytes: infos().map(|info| info.max_buffer_bytes).min().expect("there are stages"),
    }
}

impl Backend for SplitBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn place(&mut self, place: Place) {
        self.place = place;
    }

    fn are_ends_apart(&self) -> bool {
        true
    }

    fn alloc(&mut self, label: &str, size_bytes: u64) -> Result<BufferId, DeviceError> {
        let place = self.place;
        let mut ids = vec![None; self.stages.len()];
        for stage in self.stages_of(place) {
            let more = if place == Place::Inputs { self.handed_on_bytes(stage) } else { 0 };
            ids[stage] = Some(lock(&self.stages[stage]).alloc(label, size_bytes + more)?);
        }
        let id = BufferId(self.buffers.len() as u32);
        self.buffers.push(Buffer { place, size_bytes, ids });
        if place == Place::Choices {
            self.choices = Some(id);
            self.chosen_by = vec![0; size_bytes as usize / 4];
        }
        Ok(id)
    }

    fn alloc_host(&mut self, label: &str, size_bytes: u64) -> Result<Option<BufferId>, DeviceError> {
        let mut ids = vec![None; self.stages.len()];
        for stage in self.stages_of(self.place) {
            ids[stage] = lock(&self.stages[stage]).alloc_host(label, size_bytes)?;
            if ids[stage].is_none() {
                return Ok(None);
            }
        }
        self.buffers.push(Buffer { place: self.place, size_bytes, ids });
        Ok(Some(BufferId(self.buffers.len() as u32 - 1)))
    }

    fn write(&mut self, buffer: BufferId, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let ids = &self.buffers[buffer.0 as usize].ids;
        for (stage, id) in self.stages.iter().zip(ids) {
            if let Some(id) = *id {
                lock(stage).write(id, offset_bytes, data)?;
            }
        }
        Ok(())
    }

    fn load_weight(&mut self, spec: &WeightSpec, source: &mut dyn RowSource) -> Result<Weight, LoadError> {
        let [stage] = self.stages_of(self.place)[..] else { panic!("{} is placed in no stage", spec.name) };
        let weight = lock(&self.stages[stage]).load_weight(spec, source)?;
        self.weights.push((stage, weight));
        Ok(Weight { id: WeightId(self.weights.len() as u32 - 1), ..weight })
    }

    /// In whichever stage takes most.
    fn weight_bytes(&self, spec: &WeightSpec) -> u64 {
        self.on_all(|backend| backend.weight_bytes(spec)).max().expect("there are stages")
    }

    fn submit(&mut self, recording: &Recording) -> Result<Ticket, DeviceError> {
        assert!(self.num_submitted - self.num_waited < MAX_IN_FLIGHT as u64, "too many recordings in flight");
        if self.pipeline.is_none() {
            self.start()?;
        }
        let parts = Parts::of(recording, self.stages.len() as u32);
        for part in 0..parts.len() {
            let mut job = self.spare.pop().unwrap_or_else(|| self.job(recording.upload_buffer));
            self.fill(&mut job, recording, &parts, part);
            self.pipeline.as_ref().expect("it was started").push(job);
        }
        self.num_submitted += 1;
        Ok(Ticket(self.num_submitted))
    }

    /// A device's first part of it begins it, and the last stage's last part ends it.
    fn wait(&mut self, ticket: Ticket, out: &mut Vec<u8>) -> Result<Range<Instant>, DeviceError> {
        self.num_waited += 1;
        assert_eq!(self.num_waited, ticket.0, "tickets are waited for in order");
        let pipeline = self.pipeline.as_ref().expect("something was submitted");
        let (mut begun, mut ended, mut result) = (None, None, Ok(()));
        loop {
            let mut job = pipeline.pop();
            out.extend_from_slice(&job.downloads);
            if let Some(ran) = job.ran.take() {
                begun = begun.or(Some(ran.start));
                ended = Some(ran.end);
            }
            result = result.and(std::mem::replace(&mut job.result, Ok(())));
            let is_end = job.is_end;
            self.spare.push(job);
            if is_end {
                break;
            }
        }
        result?;
        let ended = ended.unwrap_or_else(Instant::now);
        let begun = begun.unwrap_or(ended).max(self.done_at).min(ended);
        self.done_at = ended;
        Ok(begun..ended)
    }

    fn settle(&mut self) -> LoadTimes {
        let mut times = LoadTimes::default();
        self.on_all(|backend| backend.settle()).for_each(|of_stage| times += of_stage);
        times
    }

    /// All of them, for what is on one is worth nothing without the others.
    fn reopen(&mut self) -> Result<(), DeviceError> {
        self.pipeline = None;
        self.spare.clear();
        self.buffers.clear();
        self.weights.clear();
        self.chosen_by.clear();
        (self.place, self.choices) = (Place::Throughout, None);
        (self.num_parts, self.num_submitted, self.num_waited) = (0, 0, 0);
        self.on_all(|backend| backend.reopen()).collect()
    }

    fn attention_tolerance(&self) -> f32 {
        self.on_all(|backend| backend.attention_tolerance()).fold(0.0, f32::max)
    }

    /// That of the machine, which its threads share: no device of a split has a time of its own.
    fn now(&self) -> Instant {
        Instant::now()
    }
}
